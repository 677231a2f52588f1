"""The operations of wgkv.py and model.py as Triton kernels: the same functions, at GPU speed.

    rotate, gate                    keys on their way into the cache (rotate: prefill only)
    promote, promote_leaving        what leaves the window: into pages, or gone
    rotate_and_write                decode: the new token into its row
    prefill_attention               many new tokens over pages and band (stripes and slash), exact
    plan_decode, decode_attention   one new token a sequence over ragged rows of pages
    update_key_ranges, select_pages       selection: which pages a step of decode attends to
    query_attention, compact        eviction: SnapKV's score, and moving together what is left
    add_norm, silu_product          other parts of a layer that are worth fusing
    gemv                            a linear layer of one token, with what stands around it
    soft_attention                  the student's attention in training, with its gradients

Kernels say their formula, how the grid maps to the data, what pointers point to, what is masked
and why. Each operation has a twin, the same in plain PyTorch, named in its wrapper, and a test
that both are equal. Without a GPU they run, slowly, in Triton's interpreter: set
TRITON_INTERPRET=1 before this file is imported (fp32 only: its bf16 products are wrong).

A Triton primer. A kernel is one function. A launch runs many copies of it in parallel, the
*programs*; together they are the *grid*. A program is a block of GPU threads, and tl.program_id
says which one it is. Inside a program every tensor is a small tile, of sizes known at compile
time (tl.constexpr), and tl.load and tl.store take a mask for what lies outside.
tl.debug_barrier() makes a program's threads wait for each other (__syncthreads), so that one may
read what another wrote. A tensor descriptor is a base, shape and strides, from which newer GPUs
copy tiles by a unit of their own (TMA). num_warps and num_stages tune a kernel; skip them at
first.

All attention here is an online softmax (arXiv 2112.05682, 2205.14135). For the scores s_j of one
query (in base 2, since the hardware has exp2), in whatever order the keys come,

    m = max_j s_j       l = sum_j 2^(s_j - m)       o = sum_j 2^(s_j - m) v_j       output = o / l

and two partial results (m, l, o) and (m', l', o') of disjoint keys combine by rescaling both to the
larger of m and m'.

Letters as in wgkv.py. BT, BM, BN, BH are how many tokens, queries, keys, hidden units one program
takes at a time. DP and GP are D and G padded to a power of two, as tl.arange wants; where they go
into tl.dot, to at least 16, as the tensor cores want.
"""
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton makes a special version of a kernel if an integer argument is 1, and another if it is a
# multiple of 16. These vary from call to call, so one version serves all their values.
UNSPECIALIZED = ["T", "W", "N", "R", "H", "layer_heads", "band", "rows", "columns", "Hq", "Hkv",
                 "ring_size", "newest"]

# A masked score, and the maximum before any score has been seen. They differ so that a query
# which has seen only masked keys has weights 2^(MASKED - INITIAL_MAX) = 0; and both are finite,
# because -inf - -inf is NaN.
INITIAL_MAX = tl.constexpr(-1e30)
MASKED = tl.constexpr(-2e30)
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def online_softmax(s, v, m, l, o, scale=1.):
    """Add a tile of scores s (BM, BN) and values v (BN, D) to the running m, l (BM), o (BM, D).

    s * scale are scores in base 2. m is in the units of s: where scale is not 1, it is multiplied
    inside the exponent, where product and subtraction are one instruction.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * scale - (m_new * scale)[:, None])
    rescale = tl.exp2((m - m_new) * scale)
    l = l * rescale + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
    return m_new, l, o


# ------------------------------------------------------------------------------- compilation

@contextlib.contextmanager
def compiled_together():
    """Inside, a launch only has its kernel compiled, in a thread; at the end all are ready to run.

    Otherwise each kernel is compiled at its first launch, while nobody does anything else. Nothing
    runs in here: results are what memory happened to hold, so whoever computes an index from one
    must not be called. On an H200's host the 8B shape's kernels take 10 s one after another and
    some 4 s together, most of that for a single one.
    """
    run = triton.JITFunction.run

    def only_compile(kernel, *args, grid, warmup, **options):
        return run(kernel, *args, grid=grid, warmup=True, **options)

    triton.JITFunction.run = only_compile
    try:
        with ThreadPoolExecutor() as threads:
            with triton.AsyncCompileMode(threads) as mode:
                yield
            # They are compiled. Asked for `run`, each is loaded onto the GPU.
            list(threads.map(lambda kernel: kernel.result().run, mode.future_kernels.values()))
    finally:
        triton.JITFunction.run = run


# --------------------------------------------------------------------------- rotation and gates

@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotate_kernel(q, k, cos, sin, q_out, k_out, T, Hq, Hkv, cos_b, q_b, q_h, q_t, k_b, k_h, k_t,
                  D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr):
    """One program: BT tokens of one head, a query head or, after those, a key head."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, HALF)
    b = (tl.program_id(1) // (Hq + Hkv)).to(tl.int64)
    h = (tl.program_id(1) % (Hq + Hkv)).to(tl.int64)
    if h < Hq:
        q += b * q_b + h * q_h
        q_out += (b * Hq + h) * T * D
        rotate_head(q, q_t, cos, sin, b * cos_b, q_out, t, d, T, D)
    else:
        k += b * k_b + (h - Hq) * k_h
        k_out += (b * Hkv + h - Hq) * T * D
        rotate_head(k, k_t, cos, sin, b * cos_b, k_out, t, d, T, D)


@triton.jit
def rotate_head(x, x_t, cos, sin, angle_offset, out, t, d, T, D: tl.constexpr):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of a head.

    x and out point to the head's token 0; x_t is x's stride from token to token (out's is D). t
    (BT): tokens; d (HALF): channels of the first half. cos and sin (T, D) begin at angle_offset.
    """
    t = t.to(tl.int64)
    valid = (t < T)[:, None] & (d < D // 2)[None, :]
    x += t[:, None] * x_t + d[None, :]
    angle = angle_offset + t[:, None] * D + d[None, :]              # (BT, HALF)
    c = tl.load(cos + angle, valid, 0.)
    s = tl.load(sin + angle, valid, 0.)
    x1 = tl.load(x, valid, 0.).to(tl.float32)
    x2 = tl.load(x + D // 2, valid, 0.).to(tl.float32)
    out += t[:, None] * D + d[None, :]
    tl.store(out, (x1 * c - x2 * s).to(out.dtype.element_ty), valid)
    tl.store(out + D // 2, (x2 * c + x1 * s).to(out.dtype.element_ty), valid)


def rotate(q, k, cos, sin):
    """q (B, Hq, T, D) and k (B, Hkv, T, D), both rotated, in one launch. Twin: model.rotate.

    Any strides, as long as D is contiguous. cos, sin (B or 1, 1, T, D) fp32. With gradients for q
    and k.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return Rotation.apply(q, k, cos, sin)
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
    BT = 32
    rotate_kernel[(triton.cdiv(T, BT), B * (Hq + Hkv))](
        q, k, cos, sin, q_out, k_out, T, Hq, Hkv, cos.stride(0) if len(cos) > 1 else 0,
        *q.stride()[:3], *k.stride()[:3], D=D, HALF=triton.next_power_of_2(D // 2), BT=BT,
        num_warps=4)
    return q_out, k_out


class Rotation(torch.autograd.Function):
    """`rotate` in training. The transpose of a rotation turns the other way: sin becomes -sin.

    In PyTorch the rotation and its gradient are some twenty passes over q and k: 0.4 s more of a
    training step of Llama-3.1-8B with 32K tokens on an H200, which takes 6.0 s with this kernel.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        dq, dk = rotate(dq.contiguous(), dk.contiguous(), cos, -sin)
        return dq, dk, None, None


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_kernel(k, k_rot, pre, post, w1, b1, w2, b2, partial, arrivals, out, N, T, k_b, k_h, k_t,
                r_b, r_h, r_t, H, layer_heads, D: tl.constexpr, DP: tl.constexpr,
                HIDDEN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, SPLITS: tl.constexpr,
                PRECISION: tl.constexpr):
    """x = [ RMSNorm(k) ; RMSNorm(rotated k) ]     g = sigmoid( w2 . GELU(W1 x + b1) + b2 )

    One program: BN of the N = B T tokens, one head, and one of SPLITS parts of the hidden units.
    Few tokens would make few programs: 32 for one token of a model of 8 layers with 4 heads, on a
    GPU of 132 multiprocessors. So the hidden units are split over programs too. The last to arrive
    adds the parts in a fixed order, so that the same call always gives the same gates.

    w1 (H, HIDDEN, 2 D), b1, w2 (H, HIDDEN), b2 (H): the H heads of one layer, or of all, one layer
    after the other. The norms pre and post have D numbers for every layer_heads heads. All in
    fp32; only the factors of W1 x have 10 bits when keys have half precision (tf32, or fp16 if w1
    comes in fp16), which is no coarser than such a key.
    """
    h = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    b = (n // T).to(tl.int64)
    t = (n % T).to(tl.int64)
    valid = (n < N)[:, None] & (d < D)[None, :]

    # The two halves of x, each (BN, DP). A layer's heads share its norms.
    k += b[:, None] * k_b + h * k_h + t[:, None] * k_t + d[None, :]
    k_rot += b[:, None] * r_b + h * r_h + t[:, None] * r_t + d[None, :]
    norm = h // layer_heads * D + d
    x_pre = rms_norm(tl.load(k, valid, 0.), tl.load(pre + norm, d < D, 0.), D)
    x_post = rms_norm(tl.load(k_rot, valid, 0.), tl.load(post + norm, d < D, 0.), D)
    x_pre = x_pre.to(w1.dtype.element_ty)
    x_post = x_post.to(w1.dtype.element_ty)

    # BH hidden units at a time: their rows of W1 have 2 D columns, D for each half. The tile of W1
    # is (BH, DP), that of the hidden units, a, is (BN, BH).
    logit = tl.zeros([BN], tl.float32)
    for start in range(split * BH, HIDDEN, SPLITS * BH):
        e = start + tl.arange(0, BH)
        offsets = (h * HIDDEN + e)[:, None] * (2 * D) + d[None, :]
        here = (e < HIDDEN)[:, None] & (d < D)[None, :]
        a = tl.dot(x_pre, tl.load(w1 + offsets, here, 0.).T, input_precision=PRECISION)
        a = tl.dot(x_post, tl.load(w1 + offsets + D, here, 0.).T, a, input_precision=PRECISION)
        a += tl.load(b1 + h * HIDDEN + e, e < HIDDEN, 0.)[None, :]
        a = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))                  # exact GELU
        logit += tl.sum(a * tl.load(w2 + h * HIDDEN + e, e < HIDDEN, 0.)[None, :], 1)

    is_last = True
    if SPLITS > 1:
        group = tl.program_id(0) * H + h          # the SPLITS programs of these tokens and head
        partial += group * SPLITS * BN + tl.arange(0, BN)
        tl.store(partial + split * BN, logit)
        tl.debug_barrier()                          # every thread's part is written: we arrive
        is_last = tl.atomic_add(arrivals + group, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            splits = tl.arange(0, SPLITS)[:, None] * BN
            # .cg: past the L1 cache, which may hold what was there before the others wrote.
            logit = tl.sum(tl.load(partial[None, :] + splits, cache_modifier=".cg"), 0)
            tl.store(arrivals + group, 0)           # as the next launch expects it
    if is_last:
        g = 1 / (1 + tl.exp(-(logit + tl.load(b2 + h))))
        tl.store(out + (b * H + h) * T + t, g, n < N)


@triton.jit
def rms_norm(x, weight, D: tl.constexpr):
    """x (BN, DP), zero from D on, over its root mean square, times weight (DP): fp32."""
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) / D + 1e-6)[:, None] * weight[None, :]


def gate(parameters, k, k_rotated):
    """k, k_rotated (B, H, T, D), D contiguous -> g (B, H, T) fp32. Twin: wgkv.gate.

    parameters: a wgkv.Gate, or the parameters of several layers' gates, one after the other.
    """
    B, H, T, D = k.shape
    p = parameters
    hidden = p.w1.shape[1]
    N = B * T
    BN = 64 if D <= 128 else 32
    if N <= 16:
        BN = 16
    BH = 32 if D <= 128 else 16     # two tiles of W1, in two stages: at most 64 KB
    blocks = triton.cdiv(N, BN)
    splits = 1
    if N <= 64:
        # Few tokens: split the hidden units until there are about 1024 programs (8 for each
        # multiprocessor), into 16 parts at most, and at least BH units a part.
        wanted = triton.next_power_of_2(triton.cdiv(1024, blocks * H))
        splits = min(wanted, 16, triton.next_power_of_2(triton.cdiv(hidden, BH)))
    out = torch.empty(B, H, T, device=k.device, dtype=torch.float32)
    partial = out.new_empty(blocks * H * splits * BN if splits > 1 else 1)
    w1 = p.w1
    if k.dtype != torch.float32 and N > 64:
        # The bits of tf32 at twice its rate: 94 us instead of 226 for 8,192 tokens of a layer of
        # Llama-3.1-8B on an H200. fp16's small range is no danger to weights and normed keys.
        w1 = w1.half()
    gate_kernel[(blocks, H, splits)](
        k, k_rotated, p.pre_norm, p.post_norm, w1, p.b1, p.w2, p.b2, partial,
        arrival_counters(k.device, blocks * H if splits > 1 else 1), out, N, T, *k.stride()[:3],
        *k_rotated.stride()[:3], H, H * D // p.pre_norm.numel(), D=D,
        DP=max(16, triton.next_power_of_2(D)), HIDDEN=hidden, BN=BN, BH=BH,
        SPLITS=splits, PRECISION="ieee" if k.dtype == torch.float32 else "tf32", num_warps=4,
        num_stages=2)
    return out


ARRIVALS = {}


def arrival_counters(device, n):
    """At least n int32 zeros, for "am I the last to arrive?". Each kernel leaves them zero.

    All launches on a device share them, which is safe on one stream. They never move, because a
    captured graph remembers where they are.
    """
    assert n <= 65536, f"{n} arrival counters wanted: make them larger"
    if device not in ARRIVALS:
        # While a graph is captured the zeros would be recorded, and not be there now.
        assert not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        ARRIVALS[device] = torch.zeros(65536, device=device, dtype=torch.int32)
    return ARRIVALS[device]


# ------------------------------------------------------------------------------ into the pages

@triton.jit
def take_pages(free, num_free, table, have, need):
    """Move free pages into a row's page table, its columns have .. need - 1.

    The atomic takes need - have off the stack's height and returns what it was before. So this
    row has a part of the stack for itself: with 9 free and 2 wanted it gets the entries 8 and 7,
    and the next row, whichever that is, begins at 6. Callers have seen to it that enough are free
    (DualCache.make_room).
    """
    height = tl.atomic_add(num_free, have - need)
    for start in range(have, need, 32):
        i = start + tl.arange(0, 32)
        page = tl.load(free + height - 1 - (i - have), i < need, 0)
        tl.store(table + i, page, i < need)
    tl.debug_barrier()                          # all threads of this program may read them now


@triton.jit(do_not_specialize=UNSPECIALIZED)
def extend_rows_kernel(num_old, counts, page_table, free, num_free, T, columns, R,
                       P: tl.constexpr):
    """One program: one row. Its list grows to num_old[row, T - 1] tokens; it takes pages for them.

    num_old (rows, T) int64: the row's promoted tokens after each of T tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row).to(tl.int32)
    after = tl.load(num_old + row * T + T - 1).to(tl.int32)
    take_pages(free, num_free, page_table + row * columns + R, tl.cdiv(count, P), tl.cdiv(after, P))
    tl.store(counts + row, after.to(tl.int64))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def promote_kernel(k, v, g, pos, promote_mask, num_old, page_table, page_k, page_v, page_g,
                   page_pos, T, columns, Hkv, R, band, D: tl.constexpr, DP: tl.constexpr,
                   BT: tl.constexpr, P: tl.constexpr):
    """One program: BT tokens of one row; those in promote_mask are copied to their pages.

    Promoted token n of a row, counted from 0, goes into page page_table[row, R + n // P], as its
    entry n mod P. k, v (rows, band, D), g (rows, band) and pos (B, band) are the band of W + T
    tokens, whose first T may leave the window. promote_mask, num_old (rows, T): num_old counts this
    token too.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, DP)
    row = tl.program_id(1).to(tl.int64)
    promoted = tl.load(promote_mask + row * T + t, t < T, 0) != 0
    n = tl.load(num_old + row * T + t, promoted, 1) - 1
    page = tl.load(page_table + row * columns + R + n // P, promoted, 0).to(tl.int64)
    target = page * P + n % P
    source = row * band + t

    here = promoted[:, None] & (d < D)[None, :]
    wide_source = source[:, None] * D + d[None, :]
    wide_target = target[:, None] * D + d[None, :]
    tl.store(page_k + wide_target, tl.load(k + wide_source, here, 0.), here)
    tl.store(page_v + wide_target, tl.load(v + wide_source, here, 0.), here)
    tl.store(page_g + target, tl.load(g + source, promoted, 0.), promoted)
    position = tl.load(pos + (row // Hkv) * band + t, promoted, 0).to(tl.int32)
    tl.store(page_pos + target, position, promoted)


def promote(pool, page_table, counts, promote_mask, num_old, band_k, band_v, band_g, band_pos, R):
    """Append tokens of the band to their rows' lists. Twin: wgkv.DualCache.promote.

    pool: a wgkv.PagePool with enough free pages. page_table (B, Hkv, M) int32 and counts (B, Hkv)
    int64 of one layer, updated in place. promote_mask (B, Hkv, T) bool: of the band's first T
    tokens; num_old (B, Hkv, T) int64: the row's promoted tokens after each of them. band_k,
    band_v (B, Hkv, W + T, D), band_g (B, Hkv, W + T), band_pos (B, W + T) int64, all contiguous.
    """
    B, Hkv, T = promote_mask.shape
    D = band_k.shape[3]
    rows = B * Hkv
    columns = page_table.stride(1)
    P = pool.k.shape[1]
    num_old = num_old.contiguous()
    extend_rows_kernel[(rows,)](num_old, counts, page_table, pool.free, pool.num_free, T, columns,
                                R, P=P, num_warps=1)
    promote_kernel[(triton.cdiv(T, 32), rows)](
        band_k, band_v, band_g, band_pos, promote_mask.contiguous(), num_old, page_table, pool.k,
        pool.v, pool.g, pool.pos, T, columns, Hkv, R, band_k.shape[2], D=D,
        DP=triton.next_power_of_2(D), BT=32, P=P)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def promote_leaving_kernel(page_k, page_v, page_g, page_pos, page_table, counts, free, num_free,
                           num_tokens, num_new, tau, low, high, slots, W, R, columns, Hkv, table_l,
                           counts_l, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
                           KEY_RANGES: tl.constexpr):
    """One program: one row of one layer. The new token at `position` will take the ring's place of
    the token at position - W. That one is promoted now, if its gate reached tau; else it is gone.
    slots (L, B, Hkv): the slot of the pool that the two share.

    Grid (B Hkv, L). page_table (L, B, Hkv, M) and counts (L, B, Hkv) may be views of some
    sequences: table_l and counts_l are their strides from layer to layer. tau is read from
    memory, since an eviction may raise it between two replays of a captured graph.
    """
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    b = row // Hkv
    page_table += layer * table_l + row * columns
    counts += layer * counts_l + row
    # With W = 100, token 612 will take place 12, where token 512 is now.
    position = tl.load(num_tokens + b)
    place = position % W
    source = tl.load(page_table + place // P).to(tl.int64) * P + place % P
    tl.store(slots + layer * tl.num_programs(0) + row, source)
    if (tl.load(num_new + b) > 0) & (position >= W):
        g = tl.load(page_g + source)
        if g >= tl.load(tau):
            n = tl.load(counts)
            if n % P == 0:                      # its last page is full, or it has none
                take_pages(free, num_free, page_table + R, (n // P).to(tl.int32),
                           (n // P).to(tl.int32) + 1)
            target = tl.load(page_table + R + n // P).to(tl.int64) * P + n % P
            d = tl.arange(0, DP)
            tl.store(page_k + target * D + d, tl.load(page_k + source * D + d, d < D, 0.), d < D)
            tl.store(page_v + target * D + d, tl.load(page_v + source * D + d, d < D, 0.), d < D)
            tl.store(page_g + target, g)
            tl.store(page_pos + target, (position - W).to(tl.int32))
            tl.debug_barrier()                      # all threads have read `counts`
            tl.store(counts, n + 1)
            if KEY_RANGES:
                if n % P == P - 1:              # this token fills its page
                    tl.debug_barrier()          # all threads see its key
                    key_range(page_k, low, high, target // P, D, DP, P)


def promote_leaving(pool, page_table, counts, num_tokens, num_new, window, tau):
    """Decode: promote what one new token a sequence pushes out of all layers' rings, in one launch.

    page_table (L, B, Hkv, M) and counts (L, B, Hkv), updated in place; num_tokens, num_new (B)
    int64; tau (1) fp32. The pool must hold a free page for each row. Returns the slots (L, B, Hkv,
    1) int64 of the places that new tokens take. Twin: wgkv.DualCache.promote_leaving.
    """
    L, B, Hkv, _ = page_table.shape
    _, P, D = pool.k.shape
    key_ranges = "low" in pool.names
    # Zeros: the gates are read at these places, also where the kernel is only compiled.
    slots = torch.zeros(L, B, Hkv, 1, device=pool.k.device, dtype=torch.long)
    promote_leaving_kernel[(B * Hkv, L)](
        pool.k, pool.v, pool.g, pool.pos, page_table, counts, pool.free, pool.num_free, num_tokens,
        num_new, tau, pool.low if key_ranges else pool.k,
        pool.high if key_ranges else pool.k, slots, window, triton.cdiv(window, P),
        page_table.stride(2), Hkv, page_table.stride(0), counts.stride(0), D=D,
        DP=triton.next_power_of_2(D), P=P, KEY_RANGES=key_ranges, num_warps=1)
    return slots


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotate_and_write_kernel(q, k, v, cos, sin, q_out, page_k, page_v, page_pos, page_table,
                            num_tokens, num_new, ring_size, columns, Hq, Hkv, cos_b, q_b, q_h, k_b,
                            k_h, v_b, v_h, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
                            P: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr):
    """One program: one head of the one new token of a sequence.

    A query head is rotated into q_out. A key head is rotated into the page where its row has the
    place `position mod ring_size`, and its value copied beside it.
    """
    if PDL:
        # Attention may start now; it waits for what we write. Any other kernel starts after us.
        tl.extra.cuda.gdc_launch_dependents()
    b = (tl.program_id(0) // (Hq + Hkv)).to(tl.int64)
    h = (tl.program_id(0) % (Hq + Hkv)).to(tl.int64)
    t = tl.zeros([1], tl.int32)                 # rotate_head takes tiles of tokens: this is one
    half = tl.arange(0, HALF)
    if h < Hq:
        q_out += (b * Hq + h) * D
        rotate_head(q + b * q_b + h * q_h, D, cos, sin, b * cos_b, q_out, t, half, 1, D)
    elif tl.load(num_new + b) > 0:              # a sequence that has ended writes nothing
        kv_head = h - Hq
        row = b * Hkv + kv_head
        position = tl.load(num_tokens + b)
        place = position % ring_size
        target = tl.load(page_table + row * columns + place // P).to(tl.int64) * P + place % P
        rotate_head(k + b * k_b + kv_head * k_h, D, cos, sin, b * cos_b, page_k + target * D, t,
                    half, 1, D)
        d = tl.arange(0, DP)
        new_v = tl.load(v + b * v_b + kv_head * v_h + d, d < D, 0.)
        tl.store(page_v + target * D + d, new_v, d < D)
        if GATED:                               # a dense cache stores no positions
            tl.store(page_pos + target, position.to(tl.int32))


def rotate_and_write(q, k, v, cos, sin, page_k, page_v, page_table, num_tokens, num_new,
                     window=None, page_pos=None):
    """Decode: q rotated; k rotated, and v, into the pages of their rows, in one launch a layer.

    q (B, Hq, 1, D), k, v (B, Hkv, 1, D), D contiguous; cos, sin (B or 1, 1, 1, D) fp32; page_table
    (B, Hkv, M) int32; num_tokens, num_new (B) int64. With a window the place is position mod
    window, and positions go to page_pos; without one (a dense cache) it is the position itself.
    Returns the rotated q. Twin: wgkv.DualCache.write_new_token.
    """
    B, Hq, _, D = q.shape
    Hkv = k.shape[1]
    gated = page_pos is not None
    q_out = q.new_empty(q.shape)
    rotate_and_write_kernel[(B * (Hq + Hkv),)](
        q, k, v, cos, sin, q_out, page_k, page_v, page_pos if gated else page_table, page_table,
        num_tokens, num_new, window if gated else 2**31 - 1, page_table.stride(1), Hq, Hkv,
        cos.stride(0) if len(cos) > 1 else 0, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        D=D, DP=triton.next_power_of_2(D), HALF=triton.next_power_of_2(D // 2), P=page_k.shape[1],
        GATED=gated, PDL=on_hopper(q), num_warps=1)
    return q_out


# ------------------------------------------------------------------------------------- prefill

@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau, scale,
                   T, W, columns, Hq, q_b, q_h, q_t, out_b, out_h, out_t, G: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr):
    """Softmax attention over a row's admitted keys outside the window, then over its band.

    Grid: axis 0 is sequence and query head, axis 1 the block of BM queries, the last block first.
    The last queries see the most keys, so they start first and the short ones keep all processors
    busy to the end. Query heads of a group are neighbors on axis 0: they run at the same time
    over the same pages, which then come from the L2 cache. scale is log2(e) / sqrt(D): scores in
    base 2.

    page_k, page_v, band_k, band_v are tensor descriptors of (token, channel), read P tokens at a
    time: where there is a copy engine (TMA), it computes the addresses. num_old (rows, T).

    With W = 100, P = 64, BM = 64, the block of queries t0 = 128 .. 191 whose row has num_old[128]
    = 150: pages 0 and 1 whole, the first 22 tokens of page 2, then the band's indices 129 .. 291 in
    three tiles.
    """
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b = (tl.program_id(0) // Hq).to(tl.int64)
    hq = (tl.program_id(0) % Hq).to(tl.int64)
    row = b * (Hq // G) + hq // G
    t = t0 + tl.arange(0, BM)
    d = tl.arange(0, DP)
    valid = (t < T)[:, None] & (d < D)[None, :]
    q += b * q_b + hq * q_h
    Q = tl.load(q + t.to(tl.int64)[:, None] * q_t + d[None, :], valid, 0.)      # (BM, DP)
    m = tl.full([BM], INITIAL_MAX, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)

    # 1. Whole pages: tokens older than the window of the first query; all of the block see them.
    n = tl.load(num_old + row * T + t0).to(tl.int32)
    page_table += row * columns
    for page in range(0, n // P):
        first = tl.load(page_table + page) * P
        s = tl.dot(Q, page_k.load([first, 0]).T, input_precision="ieee")                # (BM, P)
        m, l, o = online_softmax(s, page_v.load([first, 0]), m, l, o, scale)

    # 2. The partial page. The rest of it holds tokens promoted later in this call, which the band
    # serves, or nothing: scores there are masked. (Their weights are 0, and what they multiply must
    # be finite: see wgkv.PagePool.)
    if n % P > 0:
        first = tl.load(page_table + n // P) * P
        s = tl.dot(Q, page_k.load([first, 0]).T, input_precision="ieee")
        s = tl.where((tl.arange(0, P) < n % P)[None, :], s, MASKED)
        m, l, o = online_softmax(s, page_v.load([first, 0]), m, l, o, scale)

    # 3. The band, where index W + t is new token t: from t0 + 1, where the first query's window
    # begins, to the last query's own token. Here the definition is applied key by key: key j is
    # seen by the queries t from j - W, its own token, to the last before `end`. That is j, where it
    # leaves the window of query t = j; an admitted key is seen for ever. Before the beginning of
    # the text (g = -inf) there is none to see.
    start = (row * (W + T)).to(tl.int32)
    band_g += row * (W + T)
    for j0 in range(t0 + 1, tl.minimum(t0 + BM, T) + W, P):
        j = j0 + tl.arange(0, P)
        g = tl.load(band_g + j, j < W + T, -float("inf"))
        end = tl.where(g > -float("inf"), tl.where(g >= tau, 2**31 - 1, j), 0)
        visible = ((j - W)[None, :] <= t[:, None]) & (t[:, None] < end[None, :])
        s = tl.dot(Q, band_k.load([start + j0, 0]).T, input_precision="ieee")
        s = tl.where(visible, s, MASKED)
        m, l, o = online_softmax(s, band_v.load([start + j0, 0]), m, l, o, scale)

    o = (o / l[:, None]).to(out.dtype.element_ty)
    out += b * out_b + hq * out_h
    tl.store(out + t.to(tl.int64)[:, None] * out_t + d[None, :], o, valid)


def prefill_attention(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, window, tau,
                      plain=False):
    """softmax(q k / sqrt(D)) v over the admitted keys outside the window and the visible band.

    q (B, Hq, T, D) rotated, D contiguous. band_k, band_v (B, Hkv, W + T, D), band_g (B, Hkv, W +
    T) fp32, contiguous: the W tokens before the call, then its own; g is -inf where there is
    none. page_k, page_v (N, P, D). page_table (B, Hkv, M) int32: entry 0 is the row's first page
    of promoted tokens. num_old (B, Hkv, T) int64: how many of those lie outside the window of new
    token t. Returns (B, Hq, T, D), laid out as (B, T, Hq, D), which the next product reads.
    plain=True: do not use the Hopper kernel, even on a Hopper GPU. Twin: wgkv.banded_attention.
    """
    B, Hq, T, D = q.shape
    Hkv = band_g.shape[1]
    P = page_k.shape[1]
    out = q.new_empty(B, T, Hq, D).transpose(1, 2)
    num_old = num_old.contiguous()
    hopper = None if plain else hopper_kernels(q)
    if hopper:
        hopper.prefill_attention(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old,
                                 out, window, tau)
        return out
    DP = max(16, triton.next_power_of_2(D))
    BM, options = prefill_tile(DP, q.dtype)
    band_k, band_v, page_k, page_v = (TensorDescriptor.from_tensor(x.view(-1, D), [P, DP])
                                      for x in (band_k, band_v, page_k, page_v))
    prefill_kernel[(B * Hq, triton.cdiv(T, BM))](
        q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau,
        1 / math.sqrt(D) / math.log(2), T, window, page_table.stride(1), Hq, *q.stride()[:3],
        *out.stride()[:3], G=Hq // Hkv, D=D, DP=DP, BM=BM, P=P, **options)
    return out


def on_hopper(q):
    """Is q (..., D) on a Hopper GPU, and of a dtype and head dim that were tuned there?"""
    return (q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
            and q.shape[-1] in (64, 128) and q.dtype.itemsize == 2)


def hopper_kernels(q):
    """hopper.py, where q is on a Hopper GPU and this Triton has Gluon; else None."""
    if not on_hopper(q):
        return None
    try:
        import hopper
    except ImportError:
        return None
    return hopper


def prefill_tile(DP, dtype):
    """(queries a program, the compiler's options) for a padded head dim: what registers can hold.

    At 128, two programs of 256 threads share a multiprocessor's 65,536 registers, 128 a thread:
    while one computes its exponents, the other has the tensor cores.
    """
    if DP == 128 and dtype.itemsize == 2:
        return 128, dict(num_warps=8, num_stages=2, maxnreg=128)
    BM = 64 if dtype == torch.float32 or DP >= 128 else 128
    return BM, dict(num_warps=4, num_stages=stages(DP, dtype))


def stages(DP, dtype):
    """Tiles of keys in flight at a time, by the bytes of a key: what fits into shared memory."""
    bytes_a_key = DP * dtype.itemsize
    if bytes_a_key <= 256:
        return 3
    return 2 if bytes_a_key <= 512 else 1


# -------------------------------------------------------------------------------------- decode
# Split-KV, as in Flash-Decoding, over all rows at once. Each row's tiles (pages) are cut into
# pieces of nearly equal length, and each of the launch's programs takes one piece. A program leaves
# a partial result; the last to finish at a row combines the row's partials. Longer rows get more
# pieces.
#
# Three rows of 5, 1 and 6 tiles, five programs. Pieces of at most 3 tiles are the shortest of which
# five are enough:
#
#     tile       0  1 | 2  3  4 | 0 | 0  1  2 | 3  4  5
#     row        0  0 | 0  0  0 | 1 | 2  2  2 | 2  2  2
#     program    0    | 1       | 2 | 3       | 4
#
# A piece never spans two rows. It would have to wait for its first keys twice.

class DecodePlan(NamedTuple):
    """How a step's attention is divided among programs, for all layers; see plan_decode."""
    counts: torch.Tensor            # (L, B, Hkv) int64: tokens after the ring
    num_tokens: torch.Tensor        # (B) int64, before this step
    num_new: torch.Tensor           # (B) int64: 1, or 0 for a sequence without a new token
    ring_pages: int
    window: int
    pieces: torch.Tensor            # (L, programs, 8) int32, for each program: its row; from which
                                    # tile to before which; the row's first program, and how many
                                    # it has; three unused, so that a layer's part is aligned


@triton.jit(do_not_specialize=UNSPECIALIZED)
def plan_kernel(counts, starts, pieces, rows, R, counts_l, PROGRAMS: tl.constexpr,
                LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr):
    """One program: one layer. Element p of its tiles (LANES) is the piece of decode's program p.

    counts (L, rows) with a stride; starts (L, rows + 1): for the first piece of each row, then the
    number of pieces; pieces (L, PROGRAMS, 8). LANES >= PROGRAMS >= rows and ROWS >= rows; LANES and
    ROWS are powers of two, STEPS = log2 ROWS.
    """
    layer = tl.program_id(0).to(tl.int64)
    counts += layer * counts_l
    starts += layer * (rows + 1)
    pieces += layer * PROGRAMS * 8
    r = tl.arange(0, ROWS)
    tiles = row_tiles(tl.load(counts + r, r < rows, 0), R, P)
    tiles = tl.where(r < rows, tiles, 0)

    # The longest piece: the least length of which PROGRAMS pieces are enough. We look for the
    # largest that is too short, bit by bit from the top; it is one less.
    too_short = 0
    for bit in tl.static_range(20, -1, -1):
        length = too_short + (1 << bit)
        too_short = tl.where(tl.sum(tl.cdiv(tiles, length), 0) > PROGRAMS, length, too_short)
    tl.store(starts, 0)
    tl.store(starts + 1 + r, tl.cumsum(tl.cdiv(tiles, too_short + 1), 0), r < rows)
    tl.debug_barrier()                                      # all of starts can be read now

    # The row of program p is the last one whose first piece is not after p: a binary search, for
    # all p at once.
    p = tl.arange(0, LANES)
    row = tl.zeros([LANES], tl.int32)
    for step in tl.static_range(STEPS):
        later = row + (ROWS >> (step + 1))
        start = tl.load(starts + later, later < rows, 2**31 - 1)
        row = tl.where(start <= p, later, row)
    start = tl.load(starts + row)
    num_splits = tl.load(starts + row + 1) - start
    tiles_of_row = row_tiles(tl.load(counts + row), R, P)
    piece = tl.minimum(p - start, num_splits)               # num_splits: there is none left for p
    first = tiles_of_row * piece // num_splits
    last = tiles_of_row * tl.minimum(piece + 1, num_splits) // num_splits
    pieces += p * 8
    tl.store(pieces, row, p < PROGRAMS)
    tl.store(pieces + 1, first, p < PROGRAMS)
    tl.store(pieces + 2, last, p < PROGRAMS)
    tl.store(pieces + 3, start, p < PROGRAMS)
    tl.store(pieces + 4, num_splits, p < PROGRAMS)


@triton.jit
def row_tiles(count, R, P: tl.constexpr):
    """The tiles of rows with R pages of ring. An empty row has one too, all masked."""
    return tl.maximum(R + tl.cdiv(count.to(tl.int32), P), 1)


def plan_decode(counts, num_tokens, num_new, ring_pages, window, page_size, programs=None):
    """Divide decode's attention of all layers among programs, in one launch, on the device.

    counts (L, B, Hkv) int64: a row's tokens after its ring; num_tokens, num_new (B) int64.
    ring_pages and window: 0 and 1 for a dense cache, whose rows have no ring. programs: at most so
    many, but one a row at least (4 in the interpreter). Usually two for each multiprocessor, so
    that one computes while the other waits for memory; in a large batch four for each row: with
    248 rows of 8K to 64K tokens and only 264 programs, nearly every row would be one piece, and all
    would wait for the longest. Returns a DecodePlan. (No twin: PyTorch divides its work itself, and
    wgkv.DualCache.plan_decode lists the pages.)
    """
    L, B, Hkv = counts.shape
    rows = B * Hkv
    device = counts.device
    if programs is None:
        programs = 4
        if device.type == "cuda":
            # 8 rows of equal length can share 256 programs evenly, but not 2 * 132.
            programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
            programs = max(programs // 32 * 32, 4 * rows)
    programs = max(programs, rows)
    starts = torch.empty(L, rows + 1, device=device, dtype=torch.int32)
    pieces = torch.empty(L, programs, 8, device=device, dtype=torch.int32)
    ROWS = triton.next_power_of_2(rows)
    plan_kernel[(L,)](counts, starts, pieces, rows, ring_pages, counts.stride(0),
                      PROGRAMS=programs, LANES=triton.next_power_of_2(programs), ROWS=ROWS,
                      STEPS=ROWS.bit_length() - 1, P=page_size)
    return DecodePlan(counts, num_tokens, num_new, ring_pages, window, pieces)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_kernel(q, page_k, page_v, page_table, counts, num_tokens, num_new, pieces, partial_o,
                  partial_m, partial_l, arrivals, out, scale, Hkv, columns, R, W, G: tl.constexpr,
                  GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
                  GM: tl.constexpr, COMBINE: tl.constexpr, PDL: tl.constexpr):
    """softmax(q k / sqrt(D)) v for one query a head over all that its row holds.

    The grid has one axis: each program takes one piece of one row (see above). The G queries that
    share a KV head are multiplied together, padded to GP, at least 16.

    q, out (rows, G, D); page_k, page_v (N, P, D); page_table (rows, columns). In the ring the first
    min(tokens, W) places hold tokens, after it the first `count`; the rest is masked. pieces
    (programs, 8): this layer's part of the plan. partial_o (programs, GM, DP), partial_m, partial_l
    (programs, GM): partial results; GM is G padded to a power of two. arrivals (rows): zeros.

    With PDL (programmatic dependent launch) we may begin while rotate_and_write is still running,
    and must wait before we read what it writes: q and the new key and value. The plan and the page
    table are older.
    """
    pid = tl.program_id(0)
    pieces += pid * 8
    row = tl.load(pieces)
    first = tl.load(pieces + 1)
    last = tl.load(pieces + 2)
    first_program = tl.load(pieces + 3)
    num_splits = tl.load(pieces + 4)
    query = tl.arange(0, GP)
    d = tl.arange(0, DP)
    in_page = tl.arange(0, P)
    q_mask = (query < G)[:, None] & (d < D)[None, :]
    offsets = in_page[:, None] * D + d[None, :]             # of a page's K or V, (P, DP)

    if first < last:
        # These loads do not depend on one another, so together they take the time of one.
        table = page_table + row.to(tl.int64) * columns
        page = tl.load(table + first)
        count = tl.load(counts + row).to(tl.int32)
        tokens = tl.load(num_tokens + row // Hkv) + tl.load(num_new + row // Hkv)
        in_ring = tl.minimum(tokens, W).to(tl.int32)
        if PDL:
            tl.extra.cuda.gdc_wait()        # not in the loop: its loads would be moved before it
        q_offsets = (row * G + query).to(tl.int64)[:, None] * D + d[None, :]
        Q = tl.load(q + q_offsets, q_mask, 0.)              # (GP, DP)
        m = tl.full([GP], INITIAL_MAX, tl.float32)
        l = tl.zeros([GP], tl.float32)
        o = tl.zeros([GP, DP], tl.float32)
        for i in range(first, last):
            limit = tl.where(i < R, in_ring, R * P + count)     # places below it hold a token
            visible = i * P + in_page < limit
            here = visible[:, None] & (d < D)[None, :]
            # multiple_of tells the compiler that it may load 16 bytes at a time.
            at = tl.multiple_of(page.to(tl.int64) * (P * D), 16)
            page = tl.load(table + i + 1, i + 1 < last, 0)  # a tile ahead: the next copy can start
            K = tl.load(page_k + at + offsets, here, 0.)
            V = tl.load(page_v + at + offsets, here, 0.)
            s = tl.dot(Q, K.T, input_precision="ieee") * scale                          # (GP, P)
            s = tl.where(visible[None, :], s, MASKED)
            m, l, o = online_softmax(s, V, m, l, o)

        if num_splits == 1:
            tl.store(out + q_offsets, (o / l[:, None]).to(out.dtype.element_ty), q_mask)
        else:
            partial = pid.to(tl.int64) * GM + query
            tl.store(partial_m + partial, m, query < G)
            tl.store(partial_l + partial, l, query < G)
            tl.store(partial_o + partial[:, None] * DP + d[None, :], o, (query < G)[:, None])
            tl.debug_barrier()                              # every thread's part, before we arrive
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == num_splits - 1:
                combine(partial_o, partial_m, partial_l, out, row, first_program, num_splits, G,
                        GM, D, DP, COMBINE)
                tl.store(arrivals + row, 0)                 # as the next launch expects it


@triton.jit
def combine(partial_o, partial_m, partial_l, out, row, first_program, num_splits, G: tl.constexpr,
            GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COMBINE: tl.constexpr):
    """A row's output from its partials, COMBINE of them at a time, in an online softmax.

    Each read waits for the L2 cache or DRAM. So m, l and o of COMBINE partials, tiles of (COMBINE,
    GM) and (COMBINE, GM, DP), are read at the same time. (In a loop over single partials the
    compiler puts a barrier after each, and so a wait for memory: 32 of them where 256 programs
    serve 8 rows.) Reads bypass the L1 cache (.cg), which may hold what these addresses had before
    other programs wrote to them.
    """
    query = tl.arange(0, GM)
    d = tl.arange(0, DP)
    n = tl.arange(0, COMBINE)
    m = tl.full([GM], INITIAL_MAX, tl.float32)
    l = tl.zeros([GM], tl.float32)
    o = tl.zeros([GM, DP], tl.float32)
    for start in range(0, num_splits, COMBINE):
        partial = (first_program + start + n).to(tl.int64)[:, None] * GM + query[None, :]
        here = (start + n < num_splits)[:, None] & (query < G)[None, :]             # (COMBINE, GM)
        part_o = tl.load(partial_o + partial[:, :, None] * DP + d[None, None, :],
                         here[:, :, None], 0., cache_modifier=".cg")                # (.., .., DP)
        part_m = tl.load(partial_m + partial, here, MASKED, cache_modifier=".cg")
        part_l = tl.load(partial_l + partial, here, 0., cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(part_m, 0))
        weight = tl.exp2(part_m - m_new[None, :])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(part_l * weight, 0)
        o = o * rescale[:, None] + tl.sum(part_o * weight[:, :, None], 0)
        m = m_new
    y = (o / l[:, None]).to(out.dtype.element_ty)
    offsets = (row * G + query).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + offsets, y, (query < G)[:, None] & (d < D)[None, :])


def decode_attention(q, page_k, page_v, page_table, plan, layer, early=False):
    """Attention of one new token a sequence, already written, over its rows' lists of pages.

    q (B, Hq, 1, D) contiguous; page_k, page_v (N, P, D); page_table (B, Hkv, M) int32 of this
    layer; plan: from plan_decode. Returns (B, Hq, 1, D). Twin: wgkv.paged_attention.

    early: may it begin while the kernel launched last is still running? Only if that one writes
    nothing but q and the new tokens. (A kernel that selects pages writes a page table.)
    """
    B, Hq, _, D = q.shape
    Hkv = page_table.shape[1]
    rows = B * Hkv
    G = Hq // Hkv
    GP = max(16, triton.next_power_of_2(G))         # G, padded for tl.dot
    GM = triton.next_power_of_2(G)                  # and for storing partials
    DP = max(16, triton.next_power_of_2(D))
    programs = plan.pieces.shape[1]
    partial_o = torch.empty(programs, GM, DP, device=q.device, dtype=torch.float32)
    partial_m = torch.empty(programs, GM, device=q.device, dtype=torch.float32)
    partial_l = torch.empty_like(partial_m)
    out = torch.empty_like(q)
    # Partials that are combined at a time: 16384 numbers, 64 KB, are what 128 threads can hold.
    combine_at_once = max(1, min(32, 16384 // (GM * DP)))
    pdl = early and on_hopper(q)
    launch = dict(launch_pdl=True) if pdl else {}           # not every GPU knows it
    decode_kernel[(programs,)](
        q, page_k, page_v, page_table, plan.counts[layer], plan.num_tokens, plan.num_new,
        plan.pieces[layer], partial_o, partial_m, partial_l, arrival_counters(q.device, rows), out,
        1 / math.sqrt(D) / math.log(2), Hkv, page_table.stride(1), plan.ring_pages, plan.window,
        G=G, GP=GP, D=D, DP=DP, P=page_k.shape[1], GM=GM, COMBINE=combine_at_once, PDL=pdl,
        num_warps=4, num_stages=4 if on_hopper(q) else stages(DP, q.dtype), **launch)
    return out


# ------------------------------------------------------------------------------------ selection
# Quest (arXiv 2406.10774): see wgkv.py. For the keys k of a page whose channels lie between low
# and high, q . k <= sum over d of max(q_d low_d, q_d high_d). It is exact if all keys are
# equal, and never too low.

@triton.jit
def key_range(page_k, low, high, page, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """The channelwise smallest and largest key of a full page, 16 keys at a time."""
    d = tl.arange(0, DP)
    smallest = tl.full([DP], float("inf"), tl.float32)
    largest = tl.full([DP], -float("inf"), tl.float32)
    for start in range(0, P, 16):
        token = page.to(tl.int64) * P + start + tl.arange(0, 16)
        K = tl.load(page_k + token[:, None] * D + d[None, :], (d < D)[None, :], 0.).to(tl.float32)
        smallest = tl.minimum(smallest, tl.min(K, 0))
        largest = tl.maximum(largest, tl.max(K, 0))
    tl.store(low + page.to(tl.int64) * D + d, smallest.to(low.dtype.element_ty), d < D)
    tl.store(high + page.to(tl.int64) * D + d, largest.to(high.dtype.element_ty), d < D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_ranges_kernel(page_k, low, high, page_table, before, after, columns, R,
                      D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """One program: one page that became full as its row went from `before` to `after` tokens.

    Grid (rows, columns - R). Most programs find no new full page, and stop.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(before + row) // P + tl.program_id(1)
    if column < tl.load(after + row) // P:
        page = tl.load(page_table + row * columns + R + column)
        key_range(page_k, low, high, page, D, DP, P)


def update_key_ranges(pool, page_table, before, after, R):
    """Store the key ranges of pages that have become full. Twin: wgkv.DualCache.update_key_ranges.

    page_table (..., M) int32; before, after (...) int64: tokens of each row, all contiguous.
    """
    _, P, D = pool.k.shape
    columns = page_table.shape[-1]
    if columns > R:
        key_ranges_kernel[(after.numel(), columns - R)](
            pool.k, pool.low, pool.high, page_table, before, after, columns, R, D=D,
            DP=triton.next_power_of_2(D), P=P, num_warps=1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def page_bounds_kernel(q, low, high, page_table, counts, bounds, columns, R, G: tl.constexpr,
                       D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """The largest bound of the G queries of a row, for each of its full pages.

    One program: BC pages of a row. bounds (rows, columns - R) fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    full = tl.load(counts + row) // P
    if tl.program_id(1) * BC < full:
        d = tl.arange(0, DP)
        page = tl.load(page_table + row * columns + R + column, column < full, 0).to(tl.int64)
        here = (column < full)[:, None] & (d < D)[None, :]
        offsets = page[:, None] * D + d[None, :]
        smallest = tl.load(low + offsets, here, 0.).to(tl.float32)          # (BC, DP)
        largest = tl.load(high + offsets, here, 0.).to(tl.float32)
        best = tl.full([BC], -float("inf"), tl.float32)
        for g in tl.static_range(G):
            Q = tl.load(q + (row * G + g) * D + d, d < D, 0.).to(tl.float32)[None, :]
            best = tl.maximum(best, tl.sum(tl.maximum(Q * smallest, Q * largest), 1))
        tl.store(bounds + row * (columns - R) + column, best, column < full)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def choose_pages_kernel(bounds, page_table, counts, out, columns, R, CHOSEN: tl.constexpr,
                        BC: tl.constexpr, P: tl.constexpr):
    """Writes a row's ring pages, and then the CHOSEN best of its other pages, in their order.

    One program: one row. bounds (rows, columns - R), out (rows, R + CHOSEN), BC >= columns - R. The
    last, partial page is always among the chosen. Among equal bounds the older pages win.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    page_table += row * columns
    out += row * (R + CHOSEN)
    count = tl.load(counts + row)
    full = count // P
    used = c < tl.cdiv(count, P)

    # Integers in the order of the bounds. The bits of floats from 0 on already are. Of a negative
    # one all but the sign are flipped: -1.0 is 0xBF800000 and becomes 0xC07FFFFF, above -2.0, which
    # is 0xC0000000 and becomes 0xBFFFFFFF. 64 bits, since "no page" lies below every int32.
    x = tl.load(bounds + row * (columns - R) + c, c < full, 0.).to(tl.int32, bitcast=True)
    x = tl.where(x < 0, x ^ 0x7FFFFFFF, x).to(tl.int64)
    x = tl.where(c < full, x, 2**31 - 1)                # the partial page, above all others
    x = tl.where(used, x, -2**31 - 1)                   # no page

    # The largest number that at least CHOSEN pages reach, by bisection. If a row has fewer pages,
    # it is the lowest of all, and all its pages are taken.
    lowest = tl.full([], -2**31 - 1, tl.int64)
    highest = tl.full([], 2**31 - 1, tl.int64)
    for _ in range(33):
        middle = (lowest + highest + 1) >> 1
        enough = tl.sum((x >= middle).to(tl.int32), 0) >= CHOSEN
        lowest = tl.where(enough, middle, lowest)
        highest = tl.where(enough, highest, middle - 1)
    better = (used & (x > lowest)).to(tl.int32)
    tied = (used & (x == lowest)).to(tl.int32)
    fits = tl.cumsum(tied, 0) <= CHOSEN - tl.sum(better, 0)
    take = better + tl.where(fits, tied, 0)

    place = tl.cumsum(take, 0) - 1
    page = tl.load(page_table + R + c, used, 0)
    tl.store(out + R + place, page, take > 0)
    for start in range(0, R, 32):
        i = start + tl.arange(0, 32)
        tl.store(out + i, tl.load(page_table + i, i < R, 0), i < R)


def select_pages(q, pool, page_table, counts, R, chosen):
    """The page tables (B, Hkv, R + chosen) int32 of what one query a head attends to.

    q (B, Hq, 1, D) contiguous, page_table (B, Hkv, M) int32 and counts (B, Hkv) int64 of a layer.
    Unused entries are 0. Twin: wgkv.DualCache.select_pages.
    """
    B, Hkv, _ = page_table.shape
    rows = B * Hkv
    _, P, D = pool.k.shape
    columns = page_table.stride(1)
    out = page_table.new_zeros(B, Hkv, R + chosen)
    bounds = torch.empty(rows, columns - R, device=q.device, dtype=torch.float32)
    G = q.shape[1] // Hkv
    BC = 16
    page_bounds_kernel[(rows, max(1, triton.cdiv(columns - R, BC)))](
        q, pool.low, pool.high, page_table, counts, bounds, columns, R, G=G, D=D,
        DP=triton.next_power_of_2(D), BC=BC, P=P, num_warps=4)
    choose_pages_kernel[(rows,)](
        bounds, page_table, counts, out, columns, R, CHOSEN=chosen,
        BC=max(16, triton.next_power_of_2(columns - R)), P=P, num_warps=8)
    return out


# ------------------------------------------------------------------------------------- eviction

@triton.jit(do_not_specialize=UNSPECIALIZED)
def compact_kernel(page_k, page_v, page_g, page_pos, page_table, counts, pages_before, keep,
                   columns, R, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """One program: one row. Page after page, its tokens to keep move to the next free places.

    keep (n, P) of all pages in use, row after row; pages_before (rows): how many precede a row's.
    The n-th token to keep goes to place n: its own place, or an earlier one. Page i is read whole
    before it is written, and its tokens go to places below (i + 1) P, so page i + 1 is still
    untouched. If page 0 keeps 40 tokens, page 1's first one goes to place 40.
    """
    row = tl.program_id(0).to(tl.int64)
    page_table += row * columns + R
    keep += tl.load(pages_before + row) * P
    in_page = tl.arange(0, P)
    d = tl.arange(0, DP)
    kept = 0
    for i in range(0, tl.cdiv(tl.load(counts + row).to(tl.int32), P)):
        stays = tl.load(keep + i * P + in_page).to(tl.int32)
        source = tl.load(page_table + i).to(tl.int64) * P + in_page
        n = kept + tl.cumsum(stays, 0) - 1                      # the number of each token to keep
        move = (stays > 0) & (n < i * P + in_page)
        target = tl.load(page_table + n // P, move, 0).to(tl.int64) * P + n % P
        here = move[:, None] & (d < D)[None, :]
        K = tl.load(page_k + source[:, None] * D + d[None, :], here, 0.)
        V = tl.load(page_v + source[:, None] * D + d[None, :], here, 0.)
        g = tl.load(page_g + source, move, 0.)
        pos = tl.load(page_pos + source, move, 0)
        tl.debug_barrier()                                      # all threads have read the page
        tl.store(page_k + target[:, None] * D + d[None, :], K, here)
        tl.store(page_v + target[:, None] * D + d[None, :], V, here)
        tl.store(page_g + target, g, move)
        tl.store(page_pos + target, pos, move)
        kept += tl.sum(stays, 0)


def compact(pool, page_table, counts, keep, R):
    """Move the tokens to keep of each row together, in order. Twin: wgkv.DualCache.compact.

    page_table (rows, M) int32, counts (rows) int64, both as before; keep (n, P) bool: of all pages
    in use, row after row.
    """
    _, P, D = pool.k.shape
    pages = (counts + P - 1) // P
    pages_before = pages.cumsum(0) - pages
    compact_kernel[(len(counts),)](
        pool.k, pool.v, pool.g, pool.pos, page_table, counts, pages_before, keep,
        page_table.shape[1], R, D=D, DP=triton.next_power_of_2(D), P=P, num_warps=8)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_sums_kernel(queries, page_k, page_table, counts, sums, scale, columns, R,
                      QUERIES: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                      BM: tl.constexpr, P: tl.constexpr):
    """log2 of the sum of 2^score over a row's promoted keys. One program: BM of a row's queries.

    Grid (rows, G * QUERIES / BM). queries (rows, G * QUERIES, D), sums (rows, G * QUERIES) fp32.
    Queries that were not recorded are zeros, and nobody reads their sums.
    """
    row = tl.program_id(0).to(tl.int64)
    i = row * G * QUERIES + tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    in_page = tl.arange(0, P)
    page_table += row * columns + R
    count = tl.load(counts + row).to(tl.int32)
    Q = tl.load(queries + i[:, None] * D + d[None, :], (d < D)[None, :], 0.)        # (BM, DP)
    m = tl.full([BM], INITIAL_MAX, tl.float32)
    l = tl.zeros([BM], tl.float32)
    for c in range(0, tl.cdiv(count, P)):
        at = tl.load(page_table + c).to(tl.int64) * P + in_page
        held = c * P + in_page < count
        K = tl.load(page_k + at[:, None] * D + d[None, :], held[:, None] & (d < D)[None, :], 0.)
        s = tl.where(held[None, :], tl.dot(Q, K.T, input_precision="ieee") * scale, MASKED)
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(sums + i, m + tl.log2(l))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_attention_kernel(queries, num_queries, newest, page_k, pages, row, sums, scores, scale,
                           Hkv, QUERIES: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                           DP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr):
    """Mean over a row's newest queries of the largest weight in a group. One program: one page.

    Grid (n). The weight of a key is 2^(score - sum), with query_sums_kernel's sums. Position p is
    in place p mod QUERIES: with 300 recorded and newest = 100, the places 200 to 255 and 0 to 43.
    """
    n = tl.program_id(0)
    r = tl.load(row + n)
    d = tl.arange(0, DP)
    in_page = tl.arange(0, P)
    at = tl.load(pages + n).to(tl.int64) * P + in_page
    K = tl.load(page_k + at[:, None] * D + d[None, :], (d < D)[None, :], 0.)        # (P, DP)
    end = tl.load(num_queries + r // Hkv)
    valid = tl.minimum(end, newest)
    total = tl.zeros([P], tl.float32)
    for start in range(0, QUERIES, BM):
        i = start + tl.arange(0, BM)
        age = (end - 1 - i + QUERIES) % QUERIES         # 0 is the newest query
        largest = tl.zeros([BM, P], tl.float32)
        for g in tl.static_range(G):
            query = (r * G + g) * QUERIES + i
            Q = tl.load(queries + query[:, None] * D + d[None, :], (d < D)[None, :], 0.)
            s = tl.dot(Q, K.T, input_precision="ieee") * scale
            largest = tl.maximum(largest, tl.exp2(s - tl.load(sums + query)[:, None]))
        total += tl.sum(tl.where((age < valid)[:, None], largest, 0.), 0)
    tl.store(scores + n * P + in_page, total / valid)


def query_attention(queries, num_queries, newest, page_k, page_table, counts, pages, row, R):
    """SnapKV's score of promoted tokens, before the neighbors. Twin: wgkv.query_attention.

    queries (L, B, Hq, 256, D), of num_queries (L, B) int64 that were recorded; the `newest` of them
    count. page_table (rows, M) int32 and counts (rows) int64 of all rows; pages, row (n) int64: all
    pages in use and their rows. Returns (n, P) fp32, with anything where there is no token.
    """
    L, B, Hq, QUERIES, D = queries.shape
    Hkv = len(counts) // (L * B)
    P = page_k.shape[1]
    DP = max(16, triton.next_power_of_2(D))
    G = Hq // Hkv
    sums = torch.empty(len(counts), G * QUERIES, device=queries.device, dtype=torch.float32)
    scores = torch.empty(len(pages), P, device=queries.device, dtype=torch.float32)
    scale = 1 / math.sqrt(D) / math.log(2)
    sizes = dict(QUERIES=QUERIES, G=G, D=D, DP=DP, BM=64, P=P)
    query_sums_kernel[(len(counts), G * QUERIES // 64)](
        queries, page_k, page_table, counts, sums, scale, page_table.shape[1], R, **sizes)
    query_attention_kernel[(len(pages),)](
        queries, num_queries, newest, page_k, pages, row, sums, scores, scale, Hkv, **sizes)
    return scores


# -------------------------------------------------------------------------- the rest of a layer

@triton.jit
def silu_product_kernel(x, out, n, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one token's x = [a ; b] -> a * sigmoid(a) * b."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + token * 2 * n + i, i < n, 0.).to(tl.float32)
    b = tl.load(x + token * 2 * n + n + i, i < n, 0.)
    # Rounded before the product, as the twin does: both give the same bits.
    tl.store(out + token * n + i, (a / (1 + tl.exp(-a))).to(b.dtype) * b, i < n)


def silu_product(x):
    """SiLU(a) * b for x (..., 2n) = [a ; b] contiguous: (..., n). Twin: model.silu_product."""
    n = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], n)
    silu_product_kernel[(out.numel() // n, triton.cdiv(n, 2048))](x, out, n, BLOCK=2048)
    return out


@triton.jit
def add_norm_kernel(x, y, weight, out, n, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one token. x += y; out = x / sqrt(mean(x^2) + eps) * weight."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    s = tl.load(x + token * n + i, i < n, 0.)
    if ADD:                 # in x's dtype, as the twin adds: the residual stream has the same bits
        s += tl.load(y + token * n + i, i < n, 0.)
        tl.store(x + token * n + i, s, i < n)
    s = s.to(tl.float32)
    s = s * tl.rsqrt(tl.sum(s * s, 0) / n + eps)
    s = s * tl.load(weight + i, i < n, 0.).to(tl.float32)
    tl.store(out + token * n + i, s.to(out.dtype.element_ty), i < n)


def add_norm(x, y, norm):
    """x + y, written over x, and its norm (an nn.RMSNorm); y may be None. Twin: model.add_norm.

    x, y (..., n) contiguous. Returns (x, normed).
    """
    n = x.shape[-1]
    out = torch.empty_like(x)
    add_norm_kernel[(x.numel() // n,)](x, y, norm.weight, out, n, norm.eps, ADD=y is not None,
                                       BLOCK=triton.next_power_of_2(n),
                                       num_warps=8 if n > 1024 else 4)
    return x, out


# ---------------------------------------------------------------------- linear layers of one token
# With one token a linear layer is a matrix-vector product (GEMV). Each weight is used once, so the
# time is that of reading the weights, and of the pauses between kernels, in which memory idles. A
# layer of decode calls
#
#     with cuBLAS     add_norm | qkv | out | add_norm | gate_up | silu_product | down
#     with gemv                  qkv | out |            gate_up |                down
#
# (and cuBLAS launches two more, to add up parts of a product). Each of gemv's programs computes the
# sum and the norm again, of 8 KB each, from the L2 cache: beside its 64 KB of weights that is
# hardly noticed.
#
# With programmatic dependent launch (PDL, the option launch_pdl) a kernel may start as soon as
# every program of the kernel before it has called gdc_launch_dependents or has ended, if a
# multiprocessor has registers free for it. Of these kernels only gemv calls it: gate_up, down and
# the next layer's qkv start early, `out`, which follows attention, does not. A program requests its
# first weights and then waits, in gdc_wait, for the end of the kernel before. This is safe:
#
# - Before gdc_wait a program reads only weights, and writes nothing. No recent kernel may have
#   written these weights: several gemvs in a row can have started, and only gdc_wait makes visible
#   what was written. In decode nobody writes weights.
# - When gdc_wait returns, all earlier kernels have ended, not just the last: that one's programs
#   have all returned from their own gdc_wait, and so on back to a kernel without PDL, which starts
#   only after all before it. So memory that PyTorch's allocator hands out again has no reader left.
#   (For that, some program of each kernel with PDL must reach gdc_wait.)

@triton.jit
def gemv_tile(w, x, y, norm_weight, total, k, K, p, sum_squares, ADD: tl.constexpr,
              NORM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Columns k (BK) of the product: add their part to p (BN, BK / 8), and with NORM the squares of
    x + y to sum_squares (BK / 8), both fp32. w (BN, BK): the weights; columns from K on are zero.
    """
    here = k < K
    s = tl.load(x + k, here, 0.)
    if NORM:
        factor = tl.load(norm_weight + k, here, 0.).to(tl.float32)
    if ADD:                 # in x's dtype, as the twin adds: the residual stream has the same bits
        s += tl.load(y + k, here, 0.)
        tl.store(total + k, s, here & (tl.program_id(0) == 0))
    s = s.to(tl.float32)
    if NORM:
        sum_squares += tl.sum(tl.reshape(s * s, [BK // 8, 8]), 1)
        s *= factor
    # With weights of 2 bytes and K a multiple of 16, a thread has 8 neighboring columns of a row.
    # It adds their products at once: so p takes an eighth of the registers, and these are what
    # limits how many weights can be in flight.
    p += tl.sum(tl.reshape(w.to(tl.float32) * s[None, :], [BN, BK // 8, 8]), 2)
    return p, sum_squares


@triton.jit
def gemv_kernel(x, y, norm_weight, weight, bias, total, out, N, K, eps, ADD: tl.constexpr,
                NORM: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, PDL: tl.constexpr):
    """One program: BN rows p[n] of the product, in fp32.

        p[n] = bias[n] + sum_k weight[n, k] s[k]

    weight (N, K), bias (N), norm_weight, x, y, total (K). s is x, or with ADD x + y; then program 0
    stores that to `total`: not to x, which other programs still read. With NORM it is the norm of
    that; since 1 / rms is the same for all k, we multiply by it at the end, and one pass is enough:

        p[n] = bias[n] + 1 / rms(s) * sum_k weight[n, k] norm_weight[k] s[k]

    Without SILU out (N) is p. With SILU weight is [gate ; up], and out (N / 2) is SiLU(gate) * up.
    The program's rows are then gate 0, up 0, gate 1, up 1, ...: with BN = 4 and N = 100 program 0
    has the rows 0, 50, 1, 51.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = n
    if SILU:
        row = n // 2 + n % 2 * (N // 2)
    row = tl.minimum(row, N - 1)            # past the end: some row, whose result is not stored
    pointers = weight + row.to(tl.int64)[:, None] * K + k[None, :]          # (BN, BK)

    # The first weights are on their way before we wait for the kernel that makes x. evict_first:
    # they are not read again in this step, so x, y and the norm's weight may keep the L2 cache.
    w = tl.load(pointers, (k < K)[None, :], 0., eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    p = tl.zeros([BN, BK // 8], tl.float32)
    sum_squares = tl.zeros([BK // 8], tl.float32)
    p, sum_squares = gemv_tile(w, x, y, norm_weight, total, k, K, p, sum_squares, ADD, NORM, BN, BK)
    for start in tl.range(BK, K, BK, num_stages=1):
        w = tl.load(pointers + start, (start + k < K)[None, :], 0., eviction_policy="evict_first")
        p, sum_squares = gemv_tile(w, x, y, norm_weight, total, start + k, K, p, sum_squares, ADD,
                                   NORM, BN, BK)

    p = tl.sum(p, 1)                                                        # (BN,)
    if NORM:
        p *= tl.rsqrt(tl.sum(sum_squares, 0) / K + eps)
    if BIAS:
        p += tl.load(bias + row).to(tl.float32)
    if SILU:
        gate, up = tl.split(tl.reshape(p, [BN // 2, 2]))
        n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(out + n, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), n < N // 2)
    else:
        tl.store(out + n, p.to(out.dtype.element_ty), n < N)


# Bytes in flight are bandwidth times latency (about 1 us under load): to keep an H200's memory
# busy, each of its 132 multiprocessors must have 4.4 TB/s * 1 us / 132 = 33 KB on the way. A
# tile has 16 KB: 128 threads, each with 8 columns of 8 rows. With the 72 to 90 registers that a
# thread takes, a multiprocessor holds 5 to 7 programs, so at least 80 KB. So weights go straight to
# registers (num_stages=1 above): the four products of a layer of the 8B shape take 106 us, and 111
# with the best pipeline through shared memory; cuBLAS, norm and SiLU 128.
GEMV_TILE = dict(BN=8, BK=1024)


def gemv(x, weight, bias=None, y=None, norm=None, silu=False, **tile):
    """One token's linear layer: (x + y, the product of norm(x + y)). Twin: model.norm_linear.

    x, y (..., K), K >= 8 numbers in all; y and norm (an nn.RMSNorm) may be None. weight (N, K),
    contiguous, bias (N) or None; all of one dtype. silu: weight is [gate ; up], N is even, and the
    product is SiLU(gate) * up. Returns x + y (..., K), a new tensor, or x itself (a copy if it is
    not contiguous) without y; and the product (..., N), with silu (..., N / 2), of x's dtype.
    tile: another BN or BK than GEMV_TILE's.

    x + y has the twin's bits. The product does not: here norm, product and SiLU stay in fp32 and
    are rounded once, where the twin rounds after each.
    """
    N, K = weight.shape
    tile = {**GEMV_TILE, **tile}
    tile["BK"] = min(tile["BK"], triton.next_power_of_2(K))
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    x = x.contiguous()
    total = x
    if y is not None:
        y = y.contiguous()
        total = torch.empty_like(x)
    out = x.new_empty(*x.shape[:-1], N // 2 if silu else N)
    # Where something is None the kernel gets x, which it does not read there.
    gemv_kernel[(triton.cdiv(N, tile["BN"]),)](
        x, x if y is None else y, x if norm is None else norm.weight, weight,
        x if bias is None else bias, total, out, N, K, 0.0 if norm is None else norm.eps,
        ADD=y is not None, NORM=norm is not None, BIAS=bias is not None, SILU=silu, PDL=pdl,
        launch_pdl=pdl, num_warps=4, **tile)
    return total, out


# ------------------------------------------------------------------------------------ training
# soft_attention: wgkv.SoftAttention's formula, with gradients for q, k, v and log_g. To be
# skipped at a first reading. In this section S are the scores, P their softmax (not the page
# size), L the logarithm of the sums that normalize it, and dX the gradient with respect to X.
#
# For query i and key j <= i, the gate of a key outside the window being a bias in log space,
#
#     S(i, j) = q_i . k_j / sqrt(D) + (0 if i - j < W else log g_j)
#     P(i, j) = softmax over j of S(i, j)              o_i = sum_j P(i, j) v_j
#
# and, with dP(i, j) = do_i . v_j and delta_i = o_i . do_i = sum_j P(i, j) dP(i, j), the gradients
# are
#
#     dS = P (dP - delta)      dV = P^T dO      dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)
#     d log g_j = sum of dS(i, j) over the queries i >= j + W of the G query heads that share key j
#
# The last line is the chain rule: log g_j is added to S(i, j) for exactly those queries. It is
# one more sum where dK and dV are made.
#
# P is not kept but computed again from L_i = log2 sum_j 2^S2(i, j), where S2 = S log2(e): 2^(S2 -
# L) is P itself. Every sum is made by one program in one order: no atomics, so two runs give the
# same bits. Where the gate is 0 (log_g = -inf), P outside the window and all that follows from it
# is 0.
#
# Tiles of queries and keys come in three kinds, and each kernel has one loop for each, because a
# mask costs time:
#
#     FAR     every pair lies outside the window: add log g_j, no mask   (nearly all of a long text)
#     NEAR    every pair lies inside the window and below the diagonal: nothing to add, no mask
#     EDGE    the diagonal or the window's edge runs through the tile: the exact mask
#
#     keys ->       0 . . . . . . . . . . . t0      For a block of queries t0 .. t0 + BM - 1:
#     query t0      F F F F F F E E N N N N E       [0, far) FAR, [far, near) EDGE,
#     ...           F F F F F F E E N N N N E       [near, diagonal) NEAR, [diagonal, stop) EDGE
#
# All tiles move through tensor descriptors of (batch, head, token, channel): they take any
# strides, a head dim below its power of two DP, and the end of T, since what lies outside reads
# as 0 and is not written. A query beyond T is then 0 and has do = 0, which adds nothing to any
# sum; a key beyond T comes after every query, so the diagonal hides it.

FAR = tl.constexpr(0)
NEAR = tl.constexpr(1)
EDGE = tl.constexpr(2)


@triton.jit
def key_bias(log_g, j, T, KIND: tl.constexpr):
    """log2 g of keys j. Only an EDGE tile may have keys beyond T; a NEAR tile has no use for it."""
    bias = tl.zeros(j.shape, tl.float32)
    if KIND == FAR:
        bias = tl.load(log_g + j) * LOG2E
    if KIND == EDGE:
        bias = tl.load(log_g + j, j < T, 0.) * LOG2E
    return bias


@triton.jit
def add_bias(s, bias, i, j, W, KIND: tl.constexpr):
    """Scores s of queries i and keys j, base 2, with bias and mask; i, j, bias broadcast."""
    if KIND == FAR:
        s += bias
    if KIND == EDGE:
        s = tl.where(j <= i, s + tl.where(i - j < W, 0., bias), MASKED)
    return s


@triton.jit
def key_tiles(t0, T, W, BM: tl.constexpr, BN: tl.constexpr):
    """(far, near, diagonal, stop) as drawn above, for queries t0 .. t0 + BM - 1.

    A tile of keys j0 .. j0 + BN - 1 is FAR if its last key is outside the first query's window,
    t0 - (j0 + BN - 1) >= W. It is NEAR if its first key is inside the last query's window,
    t0 + BM - 1 - j0 < W, and its last key is not after the first query, j0 + BN - 1 <= t0.
    """
    far = tl.maximum(t0 + 1 - W, 0) // BN * BN
    near = tl.cdiv(tl.maximum(t0 + BM - W, 0), BN) * BN
    diagonal = (t0 + 1) // BN * BN
    stop = tl.minimum(t0 + BM, T)
    return far, tl.minimum(near, diagonal), diagonal, stop


@triton.jit
def query_tiles(j0, T, W, BM: tl.constexpr, BN: tl.constexpr):
    """(start, below, edge, far): the same for keys j0 .. j0 + BN - 1, down a column of the drawing.

    The queries [start, below) are EDGE, [below, edge) NEAR, [edge, far) EDGE again, [far, T) FAR.
    The conditions are those of key_tiles.
    """
    start = j0 // BM * BM
    below = tl.cdiv(j0 + BN - 1, BM) * BM
    edge = tl.maximum((j0 + W) // BM * BM, below)
    far = tl.cdiv(j0 + BN - 1 + W, BM) * BM
    return start, below, edge, far


@triton.jit
def forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, KIND: tl.constexpr,
                 DP: tl.constexpr, BN: tl.constexpr):
    """One tile of keys into the running m (BM), l (BM), o (BM, DP)."""
    j = j0 + tl.arange(0, BN)
    K = k.load([b, h, j0, 0]).reshape(BN, DP)
    s = tl.dot(Q, K.T, input_precision="ieee") * scale      # (BM, BN)
    bias = key_bias(log_g, j, T, KIND)
    s = add_bias(s, bias[None, :], i[:, None], j[None, :], W, KIND)
    return online_softmax(s, v.load([b, h, j0, 0]).reshape(BN, DP), m, l, o)


@triton.jit
def forward_kernel(q, k, v, log_g, out, lse, scale, T, TP, W, Hq, G, DP: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):
    """One program: BM queries of one query head, on prefill_kernel's grid. L goes into lse."""
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b = tl.program_id(0) // Hq
    hq = tl.program_id(0) % Hq
    h = hq // G
    i = t0 + tl.arange(0, BM)
    log_g += (b * (Hq // G) + h).to(tl.int64) * T
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    m = tl.full([BM], INITIAL_MAX, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)
    far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
    for j0 in range(0, far, BN):
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, FAR, DP, BN)
    for j0 in range(near, diagonal, BN):
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, NEAR, DP, BN)
    # Both EDGE stretches in one loop, so that its body is compiled once: x runs through
    # [far, near), and then through [diagonal, stop) as if that followed at once.
    for x in range(far, stop - (diagonal - near), BN):
        j0 = tl.where(x < near, x, x + diagonal - near)
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, EDGE, DP, BN)
    tl.store(lse + tl.program_id(0).to(tl.int64) * TP + i, m + tl.log2(l), i < T)
    out.store([b, hq, t0, 0], (o / l[:, None]).to(Q.dtype).reshape(1, 1, BM, DP))


@triton.jit
def dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, KIND: tl.constexpr,
            DP: tl.constexpr, BN: tl.constexpr):
    """One tile of keys into dQ (BM, DP), which lacks its factor 1 / sqrt(D)."""
    j = j0 + tl.arange(0, BN)
    K = k.load([b, h, j0, 0]).reshape(BN, DP)
    s = tl.dot(Q, K.T, input_precision="ieee") * scale - L[:, None]
    dP = tl.dot(dO, v.load([b, h, j0, 0]).reshape(BN, DP).T, input_precision="ieee")
    bias = key_bias(log_g, j, T, KIND)
    p = tl.exp2(add_bias(s, bias[None, :], i[:, None], j[None, :], W, KIND))
    dS = p * (dP - Delta[:, None])                          # (BM, BN)
    return tl.dot(dS.to(K.dtype), K, dQ, input_precision="ieee")


@triton.jit
def dq_kernel(q, k, v, log_g, out, do, lse, delta, dq, scale, T, TP, W, Hq, G, DP: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr):
    """One program: dQ of BM queries of one query head, on the forward grid; and their delta."""
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b = tl.program_id(0) // Hq
    hq = tl.program_id(0) % Hq
    h = hq // G
    i = t0 + tl.arange(0, BM)
    log_g += (b * (Hq // G) + h).to(tl.int64) * T
    row = tl.program_id(0).to(tl.int64) * TP
    dO = do.load([b, hq, t0, 0]).reshape(BM, DP)
    O = out.load([b, hq, t0, 0]).reshape(BM, DP)
    Delta = tl.sum(O.to(tl.float32) * dO.to(tl.float32), 1)
    tl.store(delta + row + i, Delta, i < T)
    L = tl.load(lse + row + i, i < T, -INITIAL_MAX)         # so that P of a query beyond T is 0
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    dQ = tl.zeros([BM, DP], tl.float32)
    far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
    for j0 in range(0, far, BN):
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, FAR, DP, BN)
    for j0 in range(near, diagonal, BN):
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, NEAR, DP, BN)
    for x in range(far, stop - (diagonal - near), BN):      # both EDGE stretches, as above
        j0 = tl.where(x < near, x, x + diagonal - near)
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, EDGE, DP, BN)
    dq.store([b, hq, t0, 0], (dQ * (scale / LOG2E)).to(Q.dtype).reshape(1, 1, BM, DP))


@triton.jit
def dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale, W,
               KIND: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One tile of queries into dK, dV (BN, DP) and dG (BN), the gradient of log g.

    Keys are the rows here, so P^T and dS^T need no transposing. Both products need something
    subtracted, L and delta. Their accumulators begin with minus that: K Q^T begins at -L / scale,
    so that times scale it is s - L. That saves registers.
    """
    i = t0 + tl.arange(0, BM)
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    L = lse.load([b, hq, t0]).reshape(BM) * (-1 / scale)
    s = tl.dot(K, Q.T, tl.broadcast_to(L[None, :], (BN, BM)), input_precision="ieee") * scale
    p = tl.exp2(add_bias(s, bias[:, None], i[None, :], j[:, None], W, KIND))            # (BN, BM)
    dO = do.load([b, hq, t0, 0]).reshape(BM, DP)
    Delta = -delta.load([b, hq, t0]).reshape(BM)
    dS = p * tl.dot(V, dO.T, tl.broadcast_to(Delta[None, :], (BN, BM)), input_precision="ieee")
    dV = tl.dot(p.to(dO.dtype), dO, dV, input_precision="ieee")
    # log g_j was added to the scores of queries outside the window only. dS is with respect to S in
    # natural logarithms, so no factor is due here, as one is for dK and dQ.
    if KIND == FAR:
        dG += tl.sum(dS, 1)
    if KIND == EDGE:
        dG += tl.sum(tl.where(i[None, :] - j[:, None] < W, 0., dS), 1)
    dK = tl.dot(dS.to(Q.dtype), Q, dK, input_precision="ieee")
    return dK, dV, dG


@triton.jit
def dk_dv_kernel(q, k, v, log_g, do, lse, delta, dk, dv, d_log_g, scale, T, W, Hkv, G,
                 DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """One program: dK, dV and d log g of BN keys of one KV head, over the G query heads sharing it.

    Axis 0 is sequence and KV head, axis 1 the block of keys. The first keys are seen by the most
    queries and start first. STAGES stands at the loops too: given only at the launch, it would
    not make the compiler pipeline the loads of L and delta.
    """
    j0 = tl.program_id(1) * BN
    b = tl.program_id(0) // Hkv
    h = tl.program_id(0) % Hkv
    j = j0 + tl.arange(0, BN)
    row = tl.program_id(0).to(tl.int64) * T
    bias = tl.load(log_g + row + j, j < T, 0.) * LOG2E
    K = k.load([b, h, j0, 0]).reshape(BN, DP)
    V = v.load([b, h, j0, 0]).reshape(BN, DP)
    dK = tl.zeros([BN, DP], tl.float32)
    dV = tl.zeros([BN, DP], tl.float32)
    dG = tl.zeros([BN], tl.float32)
    start, below, edge, far = query_tiles(j0, T, W, BM, BN)
    # Both EDGE stretches in one loop: x runs through [start, below), and then through [edge, far)
    # as if that followed at once. T cuts either; if it ends before `edge` there is only the first.
    stop = tl.maximum(tl.minimum(far, T) - (edge - below), tl.minimum(below, T))
    for hq in range(h * G, h * G + G):
        for x in tl.range(start, stop, BM, num_stages=STAGES):
            t0 = tl.where(x < below, x, x + edge - below)
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale,
                                    W, EDGE, DP, BM, BN)
        for t0 in tl.range(below, tl.minimum(edge, T), BM, num_stages=STAGES):
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale,
                                    W, NEAR, DP, BM, BN)
        for t0 in tl.range(far, T, BM, num_stages=STAGES):
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale,
                                    W, FAR, DP, BM, BN)
    tl.store(d_log_g + row + j, dG, j < T)
    dk.store([b, h, j0, 0], (dK * (scale / LOG2E)).to(K.dtype).reshape(1, 1, BN, DP))
    dv.store([b, h, j0, 0], dV.to(K.dtype).reshape(1, 1, BN, DP))


# (queries, keys, warps, stages) of a tile, by the padded head dim up to which it serves: what fits
# into registers. No line here spills on sm_90. At 128 the tiles of the forward pass and of dK, dV
# are small enough for two programs a multiprocessor: while one computes its exponents, the other
# has the tensor cores.
FORWARD = {64: (128, 128, 8, 3), 128: (128, 64, 4, 2), 256: (128, 64, 8, 2)}
DQ = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)}
DK_DV = {64: (64, 128, 8, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)}


def tile(table, DP, dtype):
    """(queries, keys, warps, stages). fp32 uses no tensor cores: it is for tests, not speed."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if DP <= 64 else (16, 16, 4, 1)
    return next(tiles for most, tiles in table.items() if DP <= most)


def describable(x):
    """x, or a copy if a tensor descriptor cannot take it.

    It asks for a last stride of 1, and for the others and the address in whole 16 bytes.
    """
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    aligned = all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in strides)
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def descriptor(x, *block):
    """x (B, H, T, D) or (B, H, T) as a descriptor that loads blocks of one head.

    A dimension of size 1 may have any stride, also one that a descriptor refuses: it gets a good
    one.
    """
    strides = [x.shape[-1] if size == 1 else stride
               for size, stride in zip(x.shape[:-1], x.stride())]
    return TensorDescriptor(x, list(x.shape), strides + [1], [1, 1, *block])


class SoftAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_g, window, scale, first_run):
        q, k, v = describable(q), describable(k), describable(v)
        log_g = log_g.contiguous()
        if first_run:
            out, lse = first_run.pop()
        else:
            out, lse = soft_forward(q, k, v, log_g, window, scale)
            if first_run is not None:
                # detach(): `out` itself becomes a part of the graph, and would keep it alive.
                first_run.append((out.detach(), lse))
        ctx.save_for_backward(q, k, v, log_g, out, lse)
        ctx.window = window
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, log_g, out, lse = ctx.saved_tensors
        do = describable(do)
        B, Hq, T, D = q.shape
        Hkv = k.shape[1]
        DP = max(16, triton.next_power_of_2(D))
        dq, dk, dv, d_log_g = (torch.empty_like(x) for x in (q, k, v, log_g))
        delta = torch.zeros_like(lse)

        BM, BN, warps, stages = tile(DQ, DP, q.dtype)
        dq_kernel[(B * Hq, triton.cdiv(T, BM))](
            descriptor(q, BM, DP), descriptor(k, BN, DP), descriptor(v, BN, DP), log_g,
            descriptor(out, BM, DP), descriptor(do, BM, DP), lse, delta, descriptor(dq, BM, DP),
            ctx.scale, T, lse.shape[2], ctx.window, Hq, Hq // Hkv, DP=DP, BM=BM, BN=BN,
            num_warps=warps, num_stages=stages)

        BM, BN, warps, stages = tile(DK_DV, DP, q.dtype)
        dk_dv_kernel[(B * Hkv, triton.cdiv(T, BN))](
            descriptor(q, BM, DP), descriptor(k, BN, DP), descriptor(v, BN, DP), log_g,
            descriptor(do, BM, DP), descriptor(lse, BM), descriptor(delta, BM),
            descriptor(dk, BN, DP), descriptor(dv, BN, DP), d_log_g, ctx.scale, T, ctx.window, Hkv,
            Hq // Hkv, DP=DP, BM=BM, BN=BN, STAGES=stages, num_warps=warps, num_stages=stages)
        return dq, dk, dv, d_log_g, None, None, None


def soft_forward(q, k, v, log_g, window, scale):
    """The forward pass: (out as q, lse (B, Hq, TP) fp32)."""
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    out = torch.empty_like(q)
    # lse is padded to TP, whole tiles; where no query is, P comes to 0.
    TP = triton.cdiv(T, 128) * 128
    lse = torch.full((B, Hq, TP), -INITIAL_MAX.value, device=q.device, dtype=torch.float32)
    DP = max(16, triton.next_power_of_2(D))
    BM, BN, warps, stages = tile(FORWARD, DP, q.dtype)
    forward_kernel[(B * Hq, triton.cdiv(T, BM))](
        descriptor(q, BM, DP), descriptor(k, BN, DP), descriptor(v, BN, DP), log_g,
        descriptor(out, BM, DP), lse, scale, T, TP, window, Hq, Hq // Hkv, DP=DP, BM=BM, BN=BN,
        num_warps=warps, num_stages=stages)
    return out, lse


def soft_attention(q, k, v, log_g, window, first_run=None):
    """Causal softmax(q k / sqrt(D) + bias) v; bias: 0 inside the window, log_g of the key outside.

    q (B, Hq, T, D), k, v (B, Hkv, T, D) of one dtype, any strides; log_g (B, Hkv, T) fp32, -inf
    allowed; window >= 1. Returns (B, Hq, T, D), with gradients for q, k, v and log_g. Twin:
    wgkv.soft_attention.

    first_run: a list, for a layer that is checkpointed. The first call leaves its result there, and
    the second, in the backward pass, takes it instead of computing it again.
    """
    D = q.shape[-1]
    spare = -D % (16 // q.itemsize)             # a descriptor's rows are whole 16 bytes
    if spare:
        q, k, v = (F.pad(x, (0, spare)) for x in (q, k, v))
    scale = 1 / math.sqrt(D) / math.log(2)      # base 2
    # A window longer than the text is the text; it also keeps sums of positions small.
    out = SoftAttentionFunction.apply(q, k, v, log_g, min(window, q.shape[2]), scale, first_run)
    return out[..., :D] if spare else out
