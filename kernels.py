"""The two attentions of the dual cache in Triton: the same functions as in wgkv.py, at the speed of the card.

    prefill_attention    many new tokens over pages and band: the vertical-slash pattern, exact
    decode_attention     one new token a sequence over pages and ring: ragged rows, shared out evenly

Each stands beside its formula and the way its grid maps to the data. On a machine without a GPU they run, slowly, in
Triton's interpreter: TRITON_INTERPRET=1, set before this file is imported (fp32 only: its bf16 products are wrong).

Both are streaming softmax (arXiv 2112.05682, 2205.14135). For scores s_j of one query, in base 2 since exp2 is what the
hardware has, and whatever order the keys come in,

    m = max_j s_j        l = sum_j 2^(s_j - m)        o = sum_j 2^(s_j - m) v_j        output = o / l

and two parts (m, l, o) and (m', l', o') of the keys merge by rescaling both to the larger of m and m'.
"""
import math

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from wgkv import P

AS_THEY_COME = ["T", "W", "N", "rows", "columns", "heads", "Hq", "Hkv"]      # one compilation for all values of these
NEVER = tl.constexpr(-1e30)          # below every score, and finite, so that NEVER - NEVER is 0 and not NaN
UNSEEN = tl.constexpr(-2e30)         # the score of a key that is not seen: 2^(UNSEEN - NEVER) is 0


@triton.jit
def online_softmax(s, v, m, l, o):
    """One tile of scores s (M, N) and values v (N, D) into the running m (M), l (M), o (M, D)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return m_new, l, o


# ------------------------------------------------------------------------------------------- keys on their way in

@triton.jit(do_not_specialize=AS_THEY_COME)
def rotate_kernel(q, k, cos, sin, q_out, k_out, T, Hq, Hkv, cos_b, q_b, q_h, q_t, k_b, k_h, k_t, D: tl.constexpr,
                  DH: tl.constexpr, BT: tl.constexpr):
    """One program: BT tokens of one head, a query head or after those a key head. (x1, x2) are a head's halves."""
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, DH)
    b, h = (tl.program_id(1) // (Hq + Hkv)).to(tl.int64), (tl.program_id(1) % (Hq + Hkv)).to(tl.int64)
    if h < Hq:
        q += b * q_b + h * q_h
        q_out += (b * Hq + h) * T * D
        turn(q, q_t, cos, sin, b * cos_b, q_out, t, d, T, D)
    else:
        k += b * k_b + (h - Hq) * k_h
        k_out += (b * Hkv + h - Hq) * T * D
        turn(k, k_t, cos, sin, b * cos_b, k_out, t, d, T, D)


@triton.jit
def turn(x, x_t, cos, sin, at, out, t, d, T, D: tl.constexpr):
    t, here = t.to(tl.int64), (t < T)[:, None] & (d < D // 2)[None, :]
    x += t[:, None] * x_t + d[None, :]
    at += t[:, None] * D + d[None, :]
    c, s = tl.load(cos + at, here, 0.), tl.load(sin + at, here, 0.)
    x1, x2 = tl.load(x, here, 0.).to(tl.float32), tl.load(x + D // 2, here, 0.).to(tl.float32)
    out += t[:, None] * D + d[None, :]
    tl.store(out, (x1 * c - x2 * s).to(out.dtype.element_ty), here)
    tl.store(out + D // 2, (x2 * c + x1 * s).to(out.dtype.element_ty), here)


def rotate(q, k, cos, sin):
    """q (B, Hq, T, D) and k (B, Hkv, T, D), of any strides but 1 in D, both turned: model.rotate in one launch."""
    (B, Hq, T, D), Hkv = q.shape, k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    BT = 32 if T > 1 else 1
    rotate_kernel[(triton.cdiv(T, BT), B * (Hq + Hkv))](
        q, k, cos, sin, q_out, k_out, T, Hq, Hkv, cos.stride(0) if len(cos) > 1 else 0, *q.stride()[:3],
        *k.stride()[:3], D=D, DH=triton.next_power_of_2(D // 2), BT=BT, num_warps=4 if T > 1 else 1)
    return q_out, k_out


@triton.jit(do_not_specialize=AS_THEY_COME)
def gate_kernel(k, k_rot, pre, post, w1, b1, w2, b2, part, tickets, out, N, T, k_b, k_h, k_t, r_b, r_h, r_t, heads,
                D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
                SPLITS: tl.constexpr):
    """One program: BN tokens (of all sequences) of one head, and one of SPLITS shares of the hidden numbers.

        x = [ RMSNorm(k) ; RMSNorm(rotated k) ]     g = sigmoid( w2 . GELU(W1 x + b1) + b2 ), all in fp32

    A single new token would leave the card idle while 8 programs read all of W1, so the hidden numbers are shared out;
    whoever comes last adds the shares, in their order, so that the same token always gets the same gate.
    """
    h, share = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, DP)
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    here, wide = (n < N)[:, None] & (d < D)[None, :], (d < D)[None, :]
    x = tl.load(k + b[:, None] * k_b + h * k_h + t[:, None] * k_t + d[None, :], here, 0.).to(tl.float32)
    y = tl.load(k_rot + b[:, None] * r_b + h * r_h + t[:, None] * r_t + d[None, :], here, 0.).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / D + 1e-6)[:, None] * tl.load(pre + d, d < D, 0.)[None, :]
    y = y * tl.rsqrt(tl.sum(y * y, 1) / D + 1e-6)[:, None] * tl.load(post + d, d < D, 0.)[None, :]
    logit = tl.zeros([BN], tl.float32)
    for start in range(share * BH, HIDDEN, SPLITS * BH):
        e = start + tl.arange(0, BH)
        at, real = (h * HIDDEN + e)[:, None] * (2 * D) + d[None, :], (e < HIDDEN)[:, None] & wide
        a = tl.dot(x, tl.load(w1 + at, real, 0.).T, input_precision="tf32x3")
        a = tl.dot(y, tl.load(w1 + at + D, real, 0.).T, a, input_precision="tf32x3")
        a += tl.load(b1 + h * HIDDEN + e, e < HIDDEN, 0.)[None, :]
        a = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
        logit += tl.sum(a * tl.load(w2 + h * HIDDEN + e, e < HIDDEN, 0.)[None, :], 1)
    mine = True
    if SPLITS > 1:
        slot = (tl.program_id(0) * heads + h) * SPLITS * BN + tl.arange(0, BN)
        tl.store(part + slot + share * BN, logit)
        tl.debug_barrier()
        ticket = tickets + tl.program_id(0) * heads + h
        mine = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if mine:
            logit = tl.zeros([BN], tl.float32)
            for i in range(SPLITS):
                logit += tl.load(part + slot + i * BN, cache_modifier=".cg")
            tl.store(ticket, 0)
    if mine:
        g = 1 / (1 + tl.exp(-(logit + tl.load(b2 + h))))
        tl.store(out + (b * heads + h) * T + t, g, n < N)


def gate(gate, k, k_rotated):
    """wgkv.Gate.forward: k, k_rotated (B, Hkv, T, D) of any strides but 1 in D -> g (B, Hkv, T) fp32."""
    B, Hkv, T, D = k.shape
    hidden, N = gate.w1.shape[1], B * T
    BN, BH = (16 if N <= 16 else 64 if D <= 128 else 32), 32
    splits = min(triton.cdiv(hidden, BH), 16) if N <= 64 else 1
    blocks, out = triton.cdiv(N, BN), torch.empty(B, Hkv, T, device=k.device, dtype=torch.float32)
    part = torch.empty(blocks * Hkv * splits * BN if splits > 1 else 1, device=k.device, dtype=torch.float32)
    gate_kernel[(blocks, Hkv, splits)](
        k, k_rotated, gate.pre_norm, gate.post_norm, gate.w1, gate.b1, gate.w2, gate.b2, part,
        tickets(k.device, blocks * Hkv), out, N, T, *k.stride()[:3], *k_rotated.stride()[:3], Hkv, D=D,
        DP=max(16, triton.next_power_of_2(D)), HIDDEN=hidden, BN=BN, BH=BH, SPLITS=splits,
        num_warps=4 if N <= 16 else 8, num_stages=2)
    return out


TICKETS = {}


def tickets(device, n):
    """At least n int32 zeros for "who is last?": each kernel that takes tickets leaves zeros behind."""
    if device not in TICKETS or len(TICKETS[device]) < n:
        TICKETS[device] = torch.zeros(max(n, 4096), device=device, dtype=torch.int32)
    return TICKETS[device]


@triton.jit(do_not_specialize=AS_THEY_COME)
def promote_kernel(k, v, leaves, counts, positions, table, page_k, page_v, page_pos, T, N, columns, heads, k_r,
                   positions_b, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, P: tl.constexpr):
    """One program: BT tokens of one row; those that leave the window and are admitted are copied to their places.

    The n-th admitted token of a row goes to place n mod P of page table[n // P]: where, is known before anyone writes.
    """
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, DP)
    row = tl.program_id(1).to(tl.int64)
    go = tl.load(leaves + row * T + t, t < T, 0) != 0
    n = tl.load(counts + row * T + t, go, 1).to(tl.int32) - 1
    place = tl.load(table + row * columns + n // P, go, 0).to(tl.int64) * P + n % P
    here = go[:, None] & (d < D)[None, :]
    source, target = row * k_r + t[:, None] * D + d[None, :], place[:, None] * D + d[None, :]
    tl.store(page_k + target, tl.load(k + source, here, 0.), here)
    tl.store(page_v + target, tl.load(v + source, here, 0.), here)
    tl.store(page_pos + place, tl.load(positions + (row // heads) * positions_b + t, go, 0).to(tl.int32), go)


def promote(c, leaves, counts, band_k, band_v, positions):
    """Copy the tokens where `leaves` (B, Hkv, T) bool is True from the band's first T places into their pages.

    counts (B, Hkv, T): a row's admitted tokens up to and with each; positions (B, T). Pages and table must be there.
    """
    (B, Hkv, T), D = leaves.shape, band_k.shape[3]
    promote_kernel[(triton.cdiv(T, 32), B * Hkv)](
        band_k, band_v, leaves.contiguous(), counts.contiguous(), positions, c["table"], c["page_k"], c["page_v"],
        c["page_pos"], T, len(c["page_k"]), c["table"].shape[1], Hkv, band_k.stride(1), positions.stride(0), D=D,
        DP=triton.next_power_of_2(D), BT=32, P=P)


@triton.jit(do_not_specialize=AS_THEY_COME)
def remember_kernel(k, v, g, seen, new, ring_k, ring_v, ring_g, page_k, page_v, page_pos, table, count, free,
                    free_count, tau, W, columns, heads, v_b, v_h, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
                    PROMOTE: tl.constexpr):
    """One program: one row. The token that leaves its slot goes to the pages if it was admitted; the new one moves in.

    A row whose last page is full takes a page off the top of the free stack. A sequence without a new token (new is 0)
    does nothing at all.
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    b, h, wide = row // heads, row % heads, d < D
    if tl.load(new + b) > 0:
        position = tl.load(seen + b)
        slot = row * W + position % W
        at = slot * D + d
        if PROMOTE:
            if tl.load(ring_g + slot) >= tau:
                n = tl.load(count + row)
                if n % P == 0:
                    page = tl.load(free + tl.atomic_add(free_count, -1) - 1).to(tl.int32)
                    tl.store(table + row * columns + n // P, page)
                else:
                    page = tl.load(table + row * columns + n // P)
                place = page.to(tl.int64) * P + n % P
                tl.store(page_k + place * D + d, tl.load(ring_k + at, wide, 0.), wide)
                tl.store(page_v + place * D + d, tl.load(ring_v + at, wide, 0.), wide)
                tl.store(page_pos + place, (position - W).to(tl.int32))
                tl.store(count + row, n + 1)
                tl.debug_barrier()
            tl.store(ring_g + slot, tl.load(g + row))
        tl.store(ring_k + at, tl.load(k + row * D + d, wide, 0.), wide)
        tl.store(ring_v + at, tl.load(v + b * v_b + h * v_h + d, wide, 0.), wide)


def remember(c, k, v, g, seen, new, tau):
    """One new token a sequence into its rings, and what leaves them into pages: DualCache.decode up to attention.

    k (B, Hkv, 1, D) rotated and contiguous, v (B, Hkv, 1, D), g (B, Hkv, 1) fp32; seen, new (B) int64. The free stack
    must hold a page for every row, and the table a column for it: see DualCache.prepare.
    """
    B, Hkv, _, D = k.shape
    remember_kernel[(B * Hkv,)](
        k, v, g.contiguous(), seen, new, c["ring_k"], c["ring_v"], c["ring_g"], c["page_k"], c["page_v"],
        c["page_pos"], c["table"], c["count"], c["free"], c["free_count"], tau, c["ring_k"].shape[2],
        c["table"].shape[1], Hkv, *v.stride()[:2], D=D, DP=triton.next_power_of_2(D), P=P, PROMOTE=True, num_warps=1)


def append(c, k, v, seen, new):
    """The same for a dense cache: one new token a sequence at its place. A ring that is never full."""
    B, Hkv, _, D = k.shape
    none = c["k"]
    remember_kernel[(B * Hkv,)](
        k, v, none, seen, new, c["k"], c["v"], none, none, none, none, none, none, none, none, 0., c["k"].shape[2], 0,
        Hkv, *v.stride()[:2], D=D, DP=triton.next_power_of_2(D), P=P, PROMOTE=False, num_warps=1)


# ------------------------------------------------------------------------------------------------------------ prefill

@triton.jit(do_not_specialize=AS_THEY_COME)
def prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, scale, T, W, columns, heads,
                   q_b, q_h, q_t, out_b, out_h, out_t, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   BM: tl.constexpr, P: tl.constexpr):
    """One program: BM queries of one query head. Axis 0 is sequence and head, axis 1 the block, the last block first.

    The last queries see the most keys, so they start first and the short blocks fill the gaps at the end. Query heads
    of a group are neighbours on axis 0: they run at the same time over the same pages, which then come from L2.
    K and V come through tensor descriptors, P tokens at a time: where there is a copy engine, it does the addressing.
    """
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = b * (heads // G) + h // G
    t, d = t0 + tl.arange(0, BM), tl.arange(0, DP)
    here = (t < T)[:, None] & (d < D)[None, :]
    Q = tl.load(q + b * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :], here, 0.)
    m = tl.full([BM], NEVER, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)

    # Pages: what is older than the window of the block's first query, seen by every query of the block.
    n = tl.load(old_count + row * T + t0).to(tl.int32)
    table += row * columns
    for i in range(0, n // P):
        at = tl.load(table + i) * P
        s = tl.dot(Q, page_k.load([at, 0]).T, input_precision="ieee") * scale
        m, l, o = online_softmax(s, page_v.load([at, 0]), m, l, o)
    if n % P > 0:                                                               # the page that only counts in part
        at = tl.load(table + n // P) * P
        counts = tl.arange(0, P) < n % P
        s = tl.dot(Q, page_k.load([at, 0]).T, input_precision="ieee") * scale
        V = page_v.load([at, 0])
        s, V = tl.where(counts[None, :], s, UNSEEN), tl.where(counts[:, None], V, 0.).to(V.dtype)
        m, l, o = online_softmax(s, V, m, l, o)

    # The band: index W + t is new token t. From t0 + 1 on, where the first query's window begins, key by key.
    i = W + t
    start = (row * (W + T)).to(tl.int32)
    band_g += row * (W + T)
    for j0 in range(t0 + 1, tl.minimum(t0 + BM, T) + W, P):
        j = j0 + tl.arange(0, P)
        g = tl.load(band_g + j, j < W + T, -float("inf"))
        seen = (j[None, :] <= i[:, None]) & ((i[:, None] - j[None, :] < W) | (g >= tau)[None, :])
        s = tl.dot(Q, band_k.load([start + j0, 0]).T, input_precision="ieee") * scale
        s = tl.where(seen & (g > -float("inf"))[None, :], s, UNSEEN)
        m, l, o = online_softmax(s, band_v.load([start + j0, 0]), m, l, o)
    o = (o / l[:, None]).to(out.dtype.element_ty)
    tl.store(out + b * out_b + h * out_h + t.to(tl.int64)[:, None] * out_t + d[None, :], o, here)


# ------------------------------------------------------------------------------------------------- prefill on Hopper
# The same function with the parts of a Hopper SM named: one warp copies (TMA), two warpgroups of 4 warps compute, each
# on 64 of the program's 128 queries, and while one of them is at its softmax the matrix unit works for the other. What
# a warpgroup waits for is an mbarrier: `full` of a slot is reached when its copy has landed, `free` when both have read
# it. In Gluon, Triton's own lower level. The masked places of a page must hold finite numbers: 0 times NaN is NaN.

@gluon.jit
def hopper_copy(page_k, page_v, band_k, band_v, table, bars, buffers, pages, tiles, start, P: gl.constexpr,
                SLOTS: gl.constexpr):
    """The copying warp: tile after tile of K and V, the pages of the row and then the band, as slots become free."""
    k_full, k_free, v_full, v_free = bars
    k_buffer, v_buffer = buffers
    for i in range(tiles):
        slot, phase = i % SLOTS, i // SLOTS & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), page_k.block_type.nbytes)
        if i < pages:
            at = gl.load(table + i) * P
            tma.async_copy_global_to_shared(page_k, [at, 0], k_full.index(slot), k_buffer.index(slot))
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), page_v.block_type.nbytes)
            tma.async_copy_global_to_shared(page_v, [at, 0], v_full.index(slot), v_buffer.index(slot))
        else:
            at = start + (i - pages) * P
            tma.async_copy_global_to_shared(band_k, [at, 0], k_full.index(slot), k_buffer.index(slot))
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), band_v.block_type.nbytes)
            tma.async_copy_global_to_shared(band_v, [at, 0], v_full.index(slot), v_buffer.index(slot))


@gluon.jit
def hopper_mask(s, i, band_g, n, pages, t, t0, T, W, tau, P: gl.constexpr):
    """Tile i of the scores with what must not be seen at UNSEEN: places past the n-th key, or the band's definition."""
    place = gl.arange(0, P, layout=gl.SliceLayout(0, s.type.layout))
    if i < pages:
        return gl.where((place < n - i * P)[None, :], s, UNSEEN)
    j = t0 + 1 + (i - pages) * P + place
    g = gl.load(band_g + j, j < W + T, -float("inf"))
    age = (t + W)[:, None] - j[None, :]
    return gl.where((age >= 0) & ((age < W) | (g >= tau)[None, :]) & (g > -float("inf"))[None, :], s, UNSEEN)


@gluon.jit
def hopper_attend(q, band_g, out, bars, buffers, n, pages, tiles, t0, half, T, W, tau, scale, q_t, out_t,
                  D: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr):
    """A warpgroup: 64 queries over all tiles. q.k of a tile is issued before p.v of the one before, so that the
    softmax of this tile, which waits for the first only, runs beside the second."""
    k_full, k_free, v_full, v_free = bars
    k_buffer, v_buffer = buffers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    t = t0 + half + gl.arange(0, 64, layout=gl.SliceLayout(1, q_layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, q_layout))
    Q = gl.load(q + t.to(gl.int64)[:, None] * q_t + d[None, :], (t < T)[:, None], 0.)
    t = t0 + half + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    zero = gl.zeros([64, P], gl.float32, s_layout)
    o = gl.zeros([64, D], gl.float32, o_layout)

    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(Q, k_buffer.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, (s,))
    mbarrier.arrive(k_free.index(0))
    if n < P:
        s = hopper_mask(s, 0, band_g, n, pages, t, t0, T, W, tau, P)
    m = gl.maximum(gl.max(s, 1), NEVER)
    weights = gl.exp2(s * scale - (m * scale)[:, None])
    l = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(Q.dtype), p_layout)
    for i in range(1, tiles):
        slot, last = i % SLOTS, (i - 1) % SLOTS
        mbarrier.wait(k_full.index(slot), i // SLOTS & 1)
        s_next = warpgroup_mma(Q, k_buffer.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), (i - 1) // SLOTS & 1)
        o_next = warpgroup_mma(p, v_buffer.index(last), o, is_async=True)
        s = warpgroup_mma_wait(1, (s_next,))
        mbarrier.arrive(k_free.index(slot))
        if i * P + P > n:
            s = hopper_mask(s, i, band_g, n, pages, t, t0, T, W, tau, P)
        m_new = gl.maximum(m, gl.max(s, 1))
        weights = gl.exp2(s * scale - (m_new * scale)[:, None])
        shrink = gl.exp2((m - m_new) * scale)
        l = l * shrink + gl.sum(weights, 1)
        m = m_new
        o, p = warpgroup_mma_wait(0, (o_next, p))
        mbarrier.arrive(v_free.index(last))
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(Q.dtype), p_layout)
    last = (tiles - 1) % SLOTS
    mbarrier.wait(v_full.index(last), (tiles - 1) // SLOTS & 1)
    o = warpgroup_mma(p, v_buffer.index(last), o, is_async=True)
    o = warpgroup_mma_wait(0, (o,)) / gl.convert_layout(l, gl.SliceLayout(1, o_layout))[:, None]
    t = t0 + half + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    gl.store(out + t.to(gl.int64)[:, None] * out_t + d[None, :], o.to(Q.dtype), (t < T)[:, None])


@gluon.jit(do_not_specialize=AS_THEY_COME)
def hopper_prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, scale, T, W, columns,
                          heads, q_b, q_h, q_t, out_b, out_h, out_t, G: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
                          SLOTS: gl.constexpr):
    """One program: 128 queries of one query head, on the same grid and over the same tiles as prefill_kernel."""
    t0 = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    b, h = (gl.program_id(0) // heads).to(gl.int64), (gl.program_id(0) % heads).to(gl.int64)
    row = b * (heads // G) + h // G
    n = gl.load(old_count + row * T + t0).to(gl.int32)
    pages = (n + P - 1) // P
    tiles = pages + (gl.minimum(t0 + 128, T) - t0 + W + P - 2) // P
    k_buffer = gl.allocate_shared_memory(page_k.dtype, [SLOTS, P, D], page_k.layout)
    v_buffer = gl.allocate_shared_memory(page_v.dtype, [SLOTS, P, D], page_v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    bars, buffers = (k_full, k_free, v_full, v_free), (k_buffer, v_buffer)
    q += b * q_b + h * q_h
    out += b * out_b + h * out_h
    band_g += row * (W + T)
    start = (row * (W + T)).to(gl.int32) + t0 + 1
    gl.warp_specialize([
        (hopper_attend, (q, band_g, out, bars, buffers, n, pages, tiles, t0, 0, T, W, tau, scale, q_t, out_t, D, P,
                         SLOTS)),
        (hopper_attend, (q, band_g, out, bars, buffers, n, pages, tiles, t0, 64, T, W, tau, scale, q_t, out_t, D, P,
                         SLOTS)),
        (hopper_copy, (page_k, page_v, band_k, band_v, table + row * columns, bars, buffers, pages, tiles, start, P,
                       SLOTS)),
    ], [4, 1], [240, 24])


def prefill_attention(q, band_k, band_v, band_g, page_k, page_v, table, old_count, window, tau, plain=False):
    """softmax(q k / sqrt(D)) v over the admitted keys outside the window and the visible ones of the band.

    q (B, Hq, T, D) rotated; band_k, band_v (B, Hkv, W + T, D) and band_g (B, Hkv, W + T) fp32: the W tokens before the
    call, then its own, -inf where there was none; page_k, page_v (N, P, D); table (B * Hkv, M) int32; old_count
    (B, Hkv, T) int64: how many of a row's admitted tokens lie outside the window of new token t. All but q contiguous.
    Returns (B, Hq, T, D), laid out as (B, T, Hq, D), which is what the next product reads. The reference is
    wgkv.banded_attention. plain: not the Hopper kernel, even where there is one.
    """
    B, Hq, T, D = q.shape
    out = q.new_empty(B, T, Hq, D).transpose(1, 2)
    hopper = not plain and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and D in (64, 128) and (
        q.dtype.itemsize == 2)
    DP = max(16, triton.next_power_of_2(D))
    BM, warps = (128, 4) if hopper else tile(DP, q.dtype)
    tensors = [x.view(-1, D) for x in (band_k, band_v, page_k, page_v)]
    if hopper:
        layout = gl.NVMMASharedLayout.get_default_for([P, D], gl.bfloat16)
        band_k, band_v, page_k, page_v = (GluonDescriptor.from_tensor(x, [P, D], layout) for x in tensors)
        kernel, sizes = hopper_prefill_kernel, dict(SLOTS=4, maxnreg=168)
    else:
        band_k, band_v, page_k, page_v = (TensorDescriptor.from_tensor(x, [P, DP]) for x in tensors)
        kernel, sizes = prefill_kernel, dict(DP=DP, BM=BM, num_stages=3 if DP <= 128 else 2)
    kernel[(B * Hq, triton.cdiv(T, BM))](
        q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, 1 / math.sqrt(D) / math.log(2), T,
        window, table.shape[1], Hq, *q.stride()[:3], *out.stride()[:3], G=Hq // band_g.shape[1], D=D, P=P,
        num_warps=warps, **sizes)
    return out


def tile(DP, dtype):
    """(queries a program, warps) for a padded head dim: what fits into registers and shared memory."""
    if dtype == torch.float32 or DP > 128:
        return 64, 4
    return 128, 4


# ------------------------------------------------------------------------------------------------------------- decode

@triton.jit(do_not_specialize=AS_THEY_COME)
def decode_kernel(q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l, tickets, out, scale,
                  rows, columns, W, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  RP: tl.constexpr, P: tl.constexpr, RING: tl.constexpr):
    """One program: an even share of one list, in which each row has its pages and then its ring in pieces of P slots.

    A row of many pages is spread over programs, and a program may hold the end of one row and the beginning of the
    next. Each (program, row) leaves a part (m, l, o) in slot program + row: from one part to the next either the
    program or the row goes up by one, so no two share a slot. Whoever finishes a row last merges its parts.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, RP)
    pieces = tl.cdiv(W, P)
    pages_of = tl.cdiv(tl.load(count + r, r < rows, 0), P)
    units_of = tl.where(r < rows, pages_of + pieces, 0)
    stops = tl.cumsum(units_of, 0)
    total = tl.sum(units_of, 0)
    programs = tl.minimum(tl.num_programs(0), total)                            # of a short list some get nothing
    u, hi = total * pid // programs, tl.where(pid < programs, total * (pid + 1) // programs, 0)
    row = tl.sum((stops <= u).to(tl.int32), 0)
    g, d, place = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, P)
    mine = (g < G)[:, None] & (d < D)[None, :]
    k_d = (d < D)[None, :]
    while u < hi:
        stop = tl.sum(tl.where(r == row, stops, 0), 0)
        start = stop - tl.sum(tl.where(r == row, units_of, 0), 0)
        pages = tl.sum(tl.where(r == row, pages_of, 0), 0)
        tokens = tl.load(count + row)
        last = tl.minimum(hi, stop)
        Q = tl.load(q + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], mine, 0.)
        m = tl.full([GP], NEVER, tl.float32)
        l = tl.zeros([GP], tl.float32)
        o = tl.zeros([GP, DP], tl.float32)
        for i in range(u - start, tl.minimum(last - start, pages)):
            page = tl.load(table + row.to(tl.int64) * columns + i).to(tl.int64)
            full = i * P + place < tokens
            at = (page * P + place)[:, None] * D + d[None, :]
            K, V = tl.load(page_k + at, full[:, None] & k_d, 0.), tl.load(page_v + at, full[:, None] & k_d, 0.)
            s = tl.where(full[None, :], tl.dot(Q, K.T, input_precision="ieee") * scale, UNSEEN)
            m, l, o = online_softmax(s, V, m, l, o)
        if RING:
            for i in range(tl.maximum(u - start, pages), last - start):
                slot = (i - pages) * P + place
                full = slot < W
                full = full & (tl.load(ring_g + row.to(tl.int64) * W + slot, full, -float("inf")) > -float("inf"))
                at = (row.to(tl.int64) * W + slot)[:, None] * D + d[None, :]
                K, V = tl.load(ring_k + at, full[:, None] & k_d, 0.), tl.load(ring_v + at, full[:, None] & k_d, 0.)
                s = tl.where(full[None, :], tl.dot(Q, K.T, input_precision="ieee") * scale, UNSEEN)
                m, l, o = online_softmax(s, V, m, l, o)
        first = ((start + 1) * programs - 1) // total                           # the programs that share this row
        parts = (stop * programs - 1) // total - first + 1
        mine_last = parts == 1
        if parts > 1:
            slot = (pid + row).to(tl.int64) * GP
            tl.store(part_m + slot + g, m)
            tl.store(part_l + slot + g, l)
            tl.store(part_o + (slot + g)[:, None] * DP + d[None, :], o)
            tl.debug_barrier()                                                  # every thread's part before the ticket
            mine_last = tl.atomic_add(tickets + row, 1, sem="acq_rel") == parts - 1
            if mine_last:
                m = tl.full([GP], NEVER, tl.float32)
                l = tl.zeros([GP], tl.float32)
                o = tl.zeros([GP, DP], tl.float32)
                for i in range(first, first + parts):
                    slot = (i + row).to(tl.int64) * GP
                    m_i = tl.load(part_m + slot + g, cache_modifier=".cg")
                    m_new = tl.maximum(m, m_i)
                    keep, add = tl.exp2(m - m_new), tl.exp2(m_i - m_new)
                    l = l * keep + tl.load(part_l + slot + g, cache_modifier=".cg") * add
                    o_i = tl.load(part_o + (slot + g)[:, None] * DP + d[None, :], cache_modifier=".cg")
                    o = o * keep[:, None] + o_i * add[:, None]
                    m = m_new
                tl.store(tickets + row, 0)                                      # as the next launch expects it
        if mine_last:
            y = (o / l[:, None]).to(out.dtype.element_ty)
            tl.store(out + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], y, mine)
        u = last
        row += 1


def decode_attention(q, ring_k, ring_v, ring_g, page_k, page_v, table, count, programs=None):
    """Attention of one new token a sequence over its rows' pages and rings, the token itself being remembered already.

    q (B, Hq, 1, D) contiguous; ring_k, ring_v (B, Hkv, W, D), ring_g (B, Hkv, W) fp32, -inf in slots never written, or
    None three times; pages and table as above; count (B * Hkv) int64. Returns (B, Hq, 1, D). The reference is the end
    of wgkv.DualCache.decode.
    """
    B, Hq, _, D = q.shape
    rows, W = len(count), 0 if ring_k is None else ring_k.shape[2]
    G = Hq * B // rows
    GP, DP = max(16, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(D))
    if programs is None:
        programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    part_o = torch.empty(programs + rows, GP, DP, device=q.device, dtype=torch.float32)
    part_m, part_l = (torch.empty(programs + rows, GP, device=q.device, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(q)
    decode_kernel[(programs,)](q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l,
                               tickets(q.device, rows), out, 1 / math.sqrt(D) / math.log(2), rows, table.shape[1], W,
                               G=G, GP=GP, D=D, DP=DP, RP=triton.next_power_of_2(rows), P=P, RING=W > 0, num_warps=4,
                               num_stages=5)
    return out


# ------------------------------------------------------------------------------------------------ the rest of a layer

@triton.jit
def silu_product_kernel(x, out, n, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one row of x = [a ; b] -> a * sigmoid(a) * b."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + row * 2 * n + i, i < n, 0.).to(tl.float32)
    b = tl.load(x + row * 2 * n + n + i, i < n, 0.)
    tl.store(out + row * n + i, (a / (1 + tl.exp(-a))).to(b.dtype) * b, i < n)


def silu_product(x):
    """SiLU(a) * b for x (..., 2n) = [a ; b] contiguous: (..., n)."""
    n = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], n)
    silu_product_kernel[(out.numel() // n, triton.cdiv(n, 2048))](x, out, n, BLOCK=2048)
    return out


@triton.jit
def add_norm_kernel(x, y, weight, out, n, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one token. x += y, out = x / sqrt(mean(x^2) + eps) * weight."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    s = tl.load(x + row * n + i, i < n, 0.)
    if ADD:
        s += tl.load(y + row * n + i, i < n, 0.)
        tl.store(x + row * n + i, s, i < n)
    s = s.to(tl.float32)
    s = s * tl.rsqrt(tl.sum(s * s, 0) / n + eps)
    tl.store(out + row * n + i, (s * tl.load(weight + i, i < n, 0.).to(tl.float32)).to(out.dtype.element_ty), i < n)


def add_norm(x, y, norm):
    """x + y, written over x, and norm of it (an nn.RMSNorm); y may be None. x, y (..., n) contiguous -> (x, normed)."""
    n = x.shape[-1]
    out = torch.empty_like(x)
    add_norm_kernel[(x.numel() // n,)](x, y, norm.weight, out, n, norm.eps, ADD=y is not None,
                                       BLOCK=triton.next_power_of_2(n), num_warps=8 if n > 1024 else 4)
    return x, out
