"""Triton on a CUDA device: the same functions as in wgkv.py and model.py, at the speed of the card.

    rotate, gate, promote       keys on their way into the cache
    prefill_attention           many new tokens over pages and band: the vertical-slash pattern, exact
    remember, append,           one new token a sequence: into ring and pages, or a dense cache, and then attention
    decode_attention            over ragged rows, shared out evenly
    add_norm, silu_product      what else of a layer pays to be fused
    soft_attention              the student's attention in training, with its gradients

Each stands beside its formula and the way its grid maps to the data. On a machine without a GPU they run, slowly, in
Triton's interpreter: TRITON_INTERPRET=1, set before this file is imported (fp32 only: its bf16 products are wrong).

All attention here is streaming softmax (arXiv 2112.05682, 2205.14135). For scores s_j of one query, in base 2 since
exp2 is what the hardware has, and whatever order the keys come in,

    m = max_j s_j        l = sum_j 2^(s_j - m)        o = sum_j 2^(s_j - m) v_j        output = o / l

and two parts (m, l, o) and (m', l', o') of the keys merge by rescaling both to the larger of m and m'.
"""
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from wgkv import P

AS_THEY_COME = ["T", "W", "N", "rows", "columns", "heads", "Hq", "Hkv"]      # one compilation for all values of these
NEVER = tl.constexpr(-1e30)          # below every score, and finite, so that NEVER - NEVER is 0 and not NaN
UNSEEN = tl.constexpr(-2e30)         # the score of a key that is not seen: 2^(UNSEEN - NEVER) is 0
LOG2E = tl.constexpr(1 / math.log(2))


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
                SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    """One program: BN tokens (of all sequences) of one head, and one of SPLITS shares of the hidden numbers.

        x = [ RMSNorm(k) ; RMSNorm(rotated k) ]     g = sigmoid( w2 . GELU(W1 x + b1) + b2 )

    In fp32, but for the factors of W1 x where keys have half precision: those go in as tf32, finer than such a key.

    A single new token would leave the card idle while 8 programs read all of W1, so the hidden numbers are shared out;
    whoever comes last adds the shares, in their order, so that the same call always gives the same gates.
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
        a = tl.dot(x, tl.load(w1 + at, real, 0.).T, input_precision=PRECISION)
        a = tl.dot(y, tl.load(w1 + at + D, real, 0.).T, a, input_precision=PRECISION)
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
            shares = tl.arange(0, SPLITS)[:, None] * BN + tl.arange(0, BN)[None, :]
            all_of = (tl.program_id(0) * heads + h) * SPLITS * BN
            logit = tl.sum(tl.load(part + all_of + shares, cache_modifier=".cg"), 0)
            tl.store(ticket, 0)
    if mine:
        g = 1 / (1 + tl.exp(-(logit + tl.load(b2 + h))))
        tl.store(out + (b * heads + h) * T + t, g, n < N)


def gate(gate, k, k_rotated):
    """wgkv.Gate.forward: k, k_rotated (B, Hkv, T, D) of any strides but 1 in D -> g (B, Hkv, T) fp32."""
    B, Hkv, T, D = k.shape
    hidden, N = gate.w1.shape[1], B * T
    BN, BH = (16 if N <= 16 else 64 if D <= 128 else 32), 32
    splits = min(triton.next_power_of_2(triton.cdiv(hidden, BH)), 16) if N <= 64 else 1
    blocks, out = triton.cdiv(N, BN), torch.empty(B, Hkv, T, device=k.device, dtype=torch.float32)
    part = torch.empty(blocks * Hkv * splits * BN if splits > 1 else 1, device=k.device, dtype=torch.float32)
    gate_kernel[(blocks, Hkv, splits)](
        k, k_rotated, gate.pre_norm, gate.post_norm, gate.w1, gate.b1, gate.w2, gate.b2, part,
        tickets(k.device, blocks * Hkv if splits > 1 else 1), out, N, T, *k.stride()[:3], *k_rotated.stride()[:3], Hkv,
        D=D, DP=max(16, triton.next_power_of_2(D)), HIDDEN=hidden, BN=BN, BH=BH, SPLITS=splits,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2)
    return out


TICKETS = {}


def tickets(device, n):
    """At least n int32 zeros for "who is last?": each kernel that takes tickets leaves zeros behind. For one stream."""
    if device not in TICKETS or len(TICKETS[device]) < n:
        TICKETS[device] = torch.zeros(max(n, 4096), device=device, dtype=torch.int32)
    return TICKETS[device]


@triton.jit(do_not_specialize=AS_THEY_COME)
def promote_kernel(k, v, leaves, counts, positions, have, before, free, free_count, table, page_k, page_v, page_pos, T,
                   columns, heads, k_r, positions_b, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
                   P: tl.constexpr):
    """One program: BT tokens of one row; those that leave the window and are admitted are copied to their places.

    The n-th admitted token of a row goes to place n mod P of the row's page n // P. The first `have` of these are in
    its table; page number have + i is the one below the top of the free stack by `before` (what the rows before this
    one take) and i. So each token knows its place without waiting for another; the first of a page enters it.
    """
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, DP)
    row = tl.program_id(1).to(tl.int64)
    go = tl.load(leaves + row * T + t, t < T, 0) != 0
    n = tl.load(counts + row * T + t, go, 1) - 1
    new = n // P - tl.load(have + row)
    top = tl.load(free_count) - 1 - tl.load(before + row)
    page = tl.load(table + row * columns + n // P, go & (new < 0), 0).to(tl.int64)
    page = tl.where(new < 0, page, tl.load(free + top - new, go & (new >= 0), 0))
    tl.store(table + row * columns + n // P, page.to(tl.int32), go & (n % P == 0))
    place = page * P + n % P
    here = go[:, None] & (d < D)[None, :]
    source, target = row * k_r + t[:, None] * D + d[None, :], place[:, None] * D + d[None, :]
    tl.store(page_k + target, tl.load(k + source, here, 0.), here)
    tl.store(page_v + target, tl.load(v + source, here, 0.), here)
    tl.store(page_pos + place, tl.load(positions + (row // heads) * positions_b + t, go, 0).to(tl.int32), go)


def promote(c, leaves, counts, band_k, band_v, positions, have, before):
    """Copy the tokens where `leaves` (B, Hkv, T) bool is True from the band's first T places into pages.

    counts (B, Hkv, T): a row's admitted tokens up to and with each; positions (B, T); have, before (B * Hkv): see the
    kernel. All integers are int64. The free stack must hold enough pages, and the table enough columns.
    """
    (B, Hkv, T), D = leaves.shape, band_k.shape[3]
    promote_kernel[(triton.cdiv(T, 32), B * Hkv)](
        band_k, band_v, leaves.contiguous(), counts.contiguous(), positions, have, before, c["free"], c["free_count"],
        c["table"], c["page_k"], c["page_v"], c["page_pos"], T, c["table"].shape[1], Hkv, band_k.stride(1),
        positions.stride(0), D=D, DP=triton.next_power_of_2(D), BT=32, P=P)


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
# it. In Gluon, Triton's own lower level. What is masked must be finite all the same, since 0 times NaN is NaN: unused
# places of a page, and after a row's band the beginning of the next one's.

@gluon.jit
def hopper_copy(page_k, page_v, band_k, band_v, table, bars, buffers, pages, tiles, start, P: gl.constexpr,
                SLOTS: gl.constexpr):
    """The copying warp: two tiles of K and V at a time, the pages of the row and then the band, as slots come free."""
    k_full, k_free, v_full, v_free = bars
    k_buffer, v_buffer = buffers
    for i in range(0, tiles, 2):
        slot, phase = i // 2 % SLOTS, i // 2 // SLOTS & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), 2 * page_k.block_type.nbytes)
        for half in gl.static_range(2):
            to = k_buffer.index(slot * 2 + half)
            if i + half < pages:
                tma.async_copy_global_to_shared(page_k, [gl.load(table + i + half) * P, 0], k_full.index(slot), to)
            else:
                tma.async_copy_global_to_shared(band_k, [start + (i + half - pages) * P, 0], k_full.index(slot), to)
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), 2 * page_v.block_type.nbytes)
        for half in gl.static_range(2):
            to = v_buffer.index(slot * 2 + half)
            if i + half < pages:
                tma.async_copy_global_to_shared(page_v, [gl.load(table + i + half) * P, 0], v_full.index(slot), to)
            else:
                tma.async_copy_global_to_shared(band_v, [start + (i + half - pages) * P, 0], v_full.index(slot), to)


@gluon.jit
def hopper_scores(Q, k_buffer, slot, zero):
    """q.k of the two tiles in a slot, under way."""
    a = warpgroup_mma(Q, k_buffer.index(2 * slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    b = warpgroup_mma(Q, k_buffer.index(2 * slot + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    return a, b


@gluon.jit
def hopper_mask(s, i, band_g, n, pages, t, first, t0, T, W, tau, P: gl.constexpr):
    """Tile i of the scores with what must not be seen at UNSEEN: places past the n-th key, or the band's definition.

    first .. first + 63 are the warpgroup's queries t. Of the band's six tiles (W = 256) most lie inside the window of
    all of these, or on the diagonal: gates, which are far away, are read only for the one or two at the window's edge.
    """
    place = gl.arange(0, P, layout=gl.SliceLayout(0, s.type.layout))
    j0 = t0 + 1 + (i - pages) * P
    if i < pages:
        s = gl.where((place < n - i * P)[None, :], s, UNSEEN)
    elif (j0 < W) | (first + 63 >= j0):                     # before the call, or older than some query's window
        g = gl.load(band_g + j0 + place, j0 + place < W + T, -float("inf"))
        age = (t + W - j0)[:, None] - place[None, :]
        s = gl.where((age >= 0) & ((age < W) | (g >= tau)[None, :]) & (g > -float("inf"))[None, :], s, UNSEEN)
    elif j0 + P - 1 > first + W:                            # the diagonal
        s = gl.where((t + W - j0)[:, None] >= place[None, :], s, UNSEEN)
    return s


@gluon.jit
def hopper_attend(q, band_g, out, bars, buffers, n, pages, tiles, t0, half, T, W, tau, scale, q_t, out_t,
                  D: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr):
    """A warpgroup: 64 queries over all tiles, two at a time. q.k of a pair is issued before p.v of the pair before, so
    that the softmax of this pair, which waits for the first only, runs beside the second."""
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
    a, b = hopper_scores(Q, k_buffer, 0, zero)
    a, b = warpgroup_mma_wait(0, (a, b))
    mbarrier.arrive(k_free.index(0))
    if n < 2 * P:
        a = hopper_mask(a, 0, band_g, n, pages, t, t0 + half, t0, T, W, tau, P)
        b = hopper_mask(b, 1, band_g, n, pages, t, t0 + half, t0, T, W, tau, P)
    m = gl.maximum(gl.max(gl.maximum(a, b), 1), NEVER)
    a = gl.exp2(a * scale - (m * scale)[:, None])
    b = gl.exp2(b * scale - (m * scale)[:, None])
    l = gl.sum(a + b, 1)
    p = gl.convert_layout(a.to(Q.dtype), p_layout)
    r = gl.convert_layout(b.to(Q.dtype), p_layout)
    for i in range(2, tiles, 2):
        slot, last = i // 2 % SLOTS, (i // 2 - 1) % SLOTS
        mbarrier.wait(k_full.index(slot), i // 2 // SLOTS & 1)
        a, b = hopper_scores(Q, k_buffer, slot, zero)
        mbarrier.wait(v_full.index(last), (i // 2 - 1) // SLOTS & 1)
        o = warpgroup_mma(p, v_buffer.index(2 * last), o, is_async=True)
        o = warpgroup_mma(r, v_buffer.index(2 * last + 1), o, is_async=True)
        a, b = warpgroup_mma_wait(2, (a, b))
        mbarrier.arrive(k_free.index(slot))
        if i * P + 2 * P > n:
            a = hopper_mask(a, i, band_g, n, pages, t, t0 + half, t0, T, W, tau, P)
            b = hopper_mask(b, i + 1, band_g, n, pages, t, t0 + half, t0, T, W, tau, P)
        m_new = gl.maximum(m, gl.max(gl.maximum(a, b), 1))
        a = gl.exp2(a * scale - (m_new * scale)[:, None])
        b = gl.exp2(b * scale - (m_new * scale)[:, None])
        shrink = gl.exp2((m - m_new) * scale)
        l = l * shrink + gl.sum(a + b, 1)
        m = m_new
        o, p, r = warpgroup_mma_wait(0, (o, p, r))
        mbarrier.arrive(v_free.index(last))
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(a.to(Q.dtype), p_layout)
        r = gl.convert_layout(b.to(Q.dtype), p_layout)
    last = (tiles // 2 - 1) % SLOTS
    mbarrier.wait(v_full.index(last), (tiles // 2 - 1) // SLOTS & 1)
    o = warpgroup_mma(p, v_buffer.index(2 * last), o, is_async=True)
    o = warpgroup_mma(r, v_buffer.index(2 * last + 1), o, is_async=True)
    o = warpgroup_mma_wait(0, (o,)) / gl.convert_layout(l, gl.SliceLayout(1, o_layout))[:, None]
    t = t0 + half + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    gl.store(out + t.to(gl.int64)[:, None] * out_t + d[None, :], o.to(Q.dtype), (t < T)[:, None])


@gluon.jit(do_not_specialize=AS_THEY_COME)
def hopper_prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, scale, T, W, columns,
                          heads, q_b, q_h, q_t, out_b, out_h, out_t, G: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
                          SLOTS: gl.constexpr):
    """One program: 128 queries of one query head, on a grid and over tiles as in prefill_kernel.

    Tiles come in pairs, so there may be one past the band's end; the definition leaves nothing of it to be seen.
    """
    t0 = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    b, h = (gl.program_id(0) // heads).to(gl.int64), (gl.program_id(0) % heads).to(gl.int64)
    row = b * (heads // G) + h // G
    n = gl.load(old_count + row * T + t0).to(gl.int32)
    pages = (n + P - 1) // P
    tiles = pages + (gl.minimum(t0 + 128, T) - t0 + W + P - 2) // P
    tiles += tiles % 2
    k_buffer = gl.allocate_shared_memory(page_k.dtype, [2 * SLOTS, P, D], page_k.layout)
    v_buffer = gl.allocate_shared_memory(page_v.dtype, [2 * SLOTS, P, D], page_v.layout)
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
    hopper = not plain and on_hopper(q)
    DP = max(16, triton.next_power_of_2(D))
    BM, warps = (128, 4) if hopper else prefill_tile(DP, q.dtype)
    tensors = [x.view(-1, D) for x in (band_k, band_v, page_k, page_v)]
    if hopper:
        layout = gl.NVMMASharedLayout.get_default_for([P, D], gl.bfloat16)
        band_k, band_v, page_k, page_v = (GluonDescriptor.from_tensor(x, [P, D], layout) for x in tensors)
        kernel, sizes = hopper_prefill_kernel, dict(SLOTS=2, maxnreg=168)
    else:
        band_k, band_v, page_k, page_v = (TensorDescriptor.from_tensor(x, [P, DP]) for x in tensors)
        kernel, sizes = prefill_kernel, dict(DP=DP, BM=BM, num_stages=stages(DP, q.dtype))
    kernel[(B * Hq, triton.cdiv(T, BM))](
        q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, 1 / math.sqrt(D) / math.log(2), T,
        window, table.shape[1], Hq, *q.stride()[:3], *out.stride()[:3], G=Hq // band_g.shape[1], D=D, P=P,
        num_warps=warps, **sizes)
    return out


def on_hopper(q):
    """Is q (..., D) on a Hopper GPU, and of a dtype and head dim that are tuned there?"""
    return (q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.shape[-1] in (64, 128)
            and q.dtype.itemsize == 2)


def prefill_tile(DP, dtype):
    """(queries a program, warps) for a padded head dim: what fits into registers."""
    if dtype == torch.float32 or DP >= 128:
        return 64, 4
    return 128, 4


def stages(DP, dtype):
    """Copies of a tile of keys under way at a time, by the bytes of a key: what fits into shared memory."""
    return {256: 3, 512: 2}.get(max(256, DP * dtype.itemsize), 1)


# ------------------------------------------------------------------------------------------------------------- decode

@triton.jit(do_not_specialize=AS_THEY_COME)
def decode_kernel(q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l, tickets, out, scale,
                  rows, columns, W, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  RP: tl.constexpr, P: tl.constexpr, RING: tl.constexpr, GM: tl.constexpr,
                  MERGE: tl.constexpr, BYTES: tl.constexpr):
    """One program: an even share of one list, in which each row has its pages and then its ring in pieces of P slots.

    A row of many pages is spread over programs, and a program may hold the end of one row and the beginning of the
    next. Each (program, row) leaves a part (m, l, o) in slot program + row: from one part to the next either the
    program or the row goes up by one, so no two share a slot. Whoever finishes a row last merges its parts.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, RP)
    counts = tl.load(count + r, r < rows, 0).to(tl.int32)
    pages_of = tl.cdiv(counts, P)
    units_of = tl.where(r < rows, pages_of + tl.cdiv(W, P), 0)
    stops = tl.cumsum(units_of, 0)
    total = tl.sum(units_of, 0).to(tl.int64)
    programs = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)             # of a short list some get nothing
    u, hi = (total * pid // programs).to(tl.int32), (total * (pid + 1) // programs).to(tl.int32)
    hi = tl.where(pid < programs, hi, 0)
    row = tl.sum((stops <= u).to(tl.int32), 0)
    g, d, place = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, P)
    mine = (g < G)[:, None] & (d < D)[None, :]
    at, k_d = place[:, None] * D + d[None, :], (d < D)[None, :]
    while u < hi:
        here = r == row
        stop, pages = tl.sum(tl.where(here, stops, 0), 0), tl.sum(tl.where(here, pages_of, 0), 0)
        start = stop - tl.sum(tl.where(here, units_of, 0), 0)
        tokens, last = tl.sum(tl.where(here, counts, 0), 0), tl.minimum(hi, stop)
        mine_of, ring = table + row.to(tl.int64) * columns, row.to(tl.int64) * W
        page = tl.load(mine_of + (u - start), u - start < pages, 0)
        Q = tl.load(q + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], mine, 0.)
        m = tl.full([GP], NEVER, tl.float32)
        l = tl.zeros([GP], tl.float32)
        o = tl.zeros([GP, DP], tl.float32)
        for i in range(u - start, last - start):
            # One loop, one pipeline of copies, for pages and ring: the ring is so far from the pool of pages.
            seen = i * P + place < tokens
            k_at = page.to(tl.int64) * (P * D)
            v_at = k_at
            if RING:
                slot = (i - pages) * P + place
                ring_at = (ring + (i - pages) * P) * D
                k_at = tl.where(i < pages, k_at, ring_at + (ring_k.to(tl.int64) - page_k.to(tl.int64)) // BYTES)
                v_at = tl.where(i < pages, v_at, ring_at + (ring_v.to(tl.int64) - page_v.to(tl.int64)) // BYTES)
                written = tl.load(ring_g + ring + slot, (i >= pages) & (slot < W), -float("inf")) > -float("inf")
                seen = tl.where(i < pages, seen, written)
                there = tl.where(i < pages, i * P + place < tokens, slot < W)
            else:
                there = seen
            page = tl.load(mine_of + i + 1, i + 1 < pages, 0)                   # a step ahead: the copies need not wait
            K = tl.load(page_k + tl.multiple_of(k_at, 16) + at, there[:, None] & k_d, 0.)
            V = tl.load(page_v + tl.multiple_of(v_at, 16) + at, there[:, None] & k_d, 0.)
            s = tl.where(seen[None, :], tl.dot(Q, K.T, input_precision="ieee") * scale, UNSEEN)
            m, l, o = online_softmax(s, V, m, l, o)
        first = (((start + 1) * programs - 1) // total).to(tl.int32)            # the programs that share this row
        parts = ((stop * programs - 1) // total).to(tl.int32) - first + 1
        if parts == 1:
            y = (o / l[:, None]).to(out.dtype.element_ty)
            tl.store(out + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], y, mine)
        else:
            slot, wide = (pid + row).to(tl.int64) * GM, (g < G)[:, None] & (d < DP)[None, :]
            tl.store(part_m + slot + g, m, g < G)
            tl.store(part_l + slot + g, l, g < G)
            tl.store(part_o + (slot + g)[:, None] * DP + d[None, :], o, wide)
            tl.debug_barrier()                                                  # every thread's part before the ticket
            if tl.atomic_add(tickets + row, 1, sem="acq_rel") == parts - 1:
                merge(part_o, part_m, part_l, out, row, first, parts, G, GM, D, DP, MERGE)
                tl.store(tickets + row, 0)                                      # as the next launch expects it
        u = last
        row += 1


@triton.jit
def merge(part_o, part_m, part_l, out, row, first, parts, G: tl.constexpr, GM: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, MERGE: tl.constexpr):
    """The parts of a row, from the programs first, first + 1, ...: MERGE reads are under way at a time, as each waits
    for far memory. First the largest m, and then everything is a plain sum."""
    i, g, d = tl.arange(0, 64), tl.arange(0, GM), tl.arange(0, DP)
    m = tl.full([GM], NEVER, tl.float32)
    for start in range(0, parts, 64):
        slot = (first + start + i + row).to(tl.int64)[:, None] * GM + g[None, :]
        here = (start + i < parts)[:, None] & (g < G)[None, :]
        m = tl.maximum(m, tl.max(tl.load(part_m + slot, here, NEVER, cache_modifier=".cg"), 0))
    l = tl.zeros([GM], tl.float32)
    o = tl.zeros([GM, DP], tl.float32)
    for start in range(0, parts, MERGE):
        for n in tl.static_range(MERGE):
            slot = (first + start + n + row).to(tl.int64) * GM + g
            here = (start + n < parts) & (g < G)
            weight = tl.exp2(tl.load(part_m + slot, here, UNSEEN, cache_modifier=".cg") - m)
            l += tl.load(part_l + slot, here, 0., cache_modifier=".cg") * weight
            o += tl.load(part_o + slot[:, None] * DP + d[None, :], here[:, None], 0., cache_modifier=".cg"
                         ) * weight[:, None]
    y = (o / l[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], y, (g < G)[:, None] & (d < D)[None, :])


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
    if programs is None:                               # one a multiprocessor: two leave twice the parts to merge
        programs = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    GM = triton.next_power_of_2(G)
    part_o = torch.empty(programs + rows, GM, DP, device=q.device, dtype=torch.float32)
    part_m, part_l = (torch.empty(programs + rows, GM, device=q.device, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(q)
    decode_kernel[(programs,)](q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l,
                               tickets(q.device, rows), out, 1 / math.sqrt(D) / math.log(2), rows, table.shape[1], W,
                               G=G, GP=GP, D=D, DP=DP, RP=triton.next_power_of_2(rows), P=P, RING=W > 0, GM=GM,
                               MERGE=max(1, min(32, 16384 // (GM * DP))), BYTES=q.itemsize, num_warps=4,
                               num_stages=6 if on_hopper(q) else stages(DP, q.dtype))
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


# ----------------------------------------------------------------------------------------------------------- training
# soft_attention is wgkv.SoftAttention's formula with gradients for q, k, v and log_g.
#
# For query i and key j <= i, the gate of a key outside the window being a bias in log space,
#
#     S(i, j) = q_i . k_j / sqrt(D) + (0 if i - j < W else log g_j)      P = softmax_j(S)      o_i = sum_j P(i, j) v_j
#
# and, with dP(i, j) = do_i . v_j and delta_i = o_i . do_i = sum_j P(i, j) dP(i, j), the gradients are
#
#     dS = P (dP - delta)      dV = P^T dO      dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)
#     d log g_j = sum of dS(i, j) over the queries i >= j + W of the G query heads that share key j
#
# P is not kept but computed again from L_i = log2 sum_j 2^S2(i, j), where S2 = S log2(e): 2^(S2 - L) is P itself, and
# exp2 is what the hardware has. Whatever is a sum, one program adds up in one order: no atomics, so two runs give the
# same bits. Where the gate is 0 (log_g = -inf), P and all that follows from it is 0.
#
# Tiles of queries and keys come in three kinds, and each kernel below has one loop for each, because the mask costs:
#
#     FAR     every pair lies outside the window: add log g_j, no mask         (nearly all tiles of a long text)
#     NEAR    every pair lies inside the window and below the diagonal: nothing to add, no mask
#     EDGE    the diagonal or the window's edge runs through the tile: the exact mask
#
# All tiles move through tensor descriptors of (batch, head, token, channel): they take any strides, a head dim below
# its power of two DP, and the end of T, since what lies outside reads as 0 and is not written. A query beyond T is then
# 0 and has do = 0, which adds nothing to any sum; a key beyond T comes after every query: the diagonal hides it.

FAR, NEAR, EDGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def key_bias(log_g, j, T, KIND: tl.constexpr):
    """log2 g of keys j; only an EDGE tile may have keys beyond T. A NEAR tile has no use for it."""
    bias = tl.zeros(j.shape, tl.float32)
    if KIND == FAR:
        bias = tl.load(log_g + j) * LOG2E
    if KIND == EDGE:
        bias = tl.load(log_g + j, j < T, 0.) * LOG2E
    return bias


@triton.jit
def biased(s, log_g, i, j, W, KIND: tl.constexpr):
    """Scores s of queries i and keys j, base 2, of one kind of tile; i, j and log_g broadcast either way round."""
    if KIND == FAR:
        s += log_g
    if KIND == EDGE:
        s = tl.where(j <= i, s + tl.where(i - j < W, 0., log_g), UNSEEN)
    return s


@triton.jit
def key_tiles(t0, T, W, BM: tl.constexpr, BN: tl.constexpr):
    """Bounds for queries t0 .. t0 + BM: keys [0, a) are FAR, [a, b) EDGE, [b, c) NEAR, [c, stop) EDGE again."""
    a = tl.maximum(t0 + 1 - W, 0) // BN * BN                                    # t0 - (j0 + BN - 1) >= W
    c = (t0 + 1) // BN * BN                                                     # j0 + BN - 1 <= t0
    b = tl.minimum(tl.cdiv(tl.maximum(t0 + BM - W, 0), BN) * BN, c)             # t0 + BM - 1 - j0 < W
    return a, b, c, tl.minimum(t0 + BM, T)


@triton.jit
def query_tiles(j0, T, W, BM: tl.constexpr, BN: tl.constexpr):
    """Bounds for keys j0 .. j0 + BN: queries [start, a) are EDGE, [a, b) NEAR, [b, c) EDGE again, [c, T) FAR."""
    a = tl.cdiv(j0 + BN - 1, BM) * BM                                           # t0 >= j0 + BN - 1
    b = tl.maximum((j0 + W) // BM * BM, a)                                      # t0 + BM - 1 - j0 < W
    c = tl.cdiv(j0 + BN - 1 + W, BM) * BM                                       # t0 - (j0 + BN - 1) >= W
    return j0 // BM * BM, a, b, c


@triton.jit
def forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, KIND: tl.constexpr, DP: tl.constexpr,
                 BN: tl.constexpr):
    """One tile of keys into the running m (BM), l (BM), o (BM, DP) of the streaming softmax."""
    j = j0 + tl.arange(0, BN)
    s = tl.dot(Q, k.load([b, h, j0, 0]).reshape(BN, DP).T, input_precision="ieee") * scale
    bias = key_bias(log_g, j, T, KIND)
    s = biased(s, bias[None, :], i[:, None], j[None, :], W, KIND)
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    V = v.load([b, h, j0, 0]).reshape(BN, DP)
    o = tl.dot(p.to(V.dtype), V, o * shrink[:, None], input_precision="ieee")
    return m_new, l, o


@triton.jit
def forward_kernel(q, k, v, log_g, out, lse, scale, T, TP, W, heads, G, DP: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):
    """One program: BM queries of one query head. Axis 0 is sequence and head, axis 1 the block, the last block first.

    The last queries see the most keys, so they start first and the short blocks fill the gaps at the end. Query heads
    of a group are neighbours on axis 0: they run at the same time over the same keys, which then come from L2.
    """
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, hq = tl.program_id(0) // heads, tl.program_id(0) % heads
    h = hq // G
    i = t0 + tl.arange(0, BM)
    log_g += (b * (heads // G) + h).to(tl.int64) * T
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    m = tl.full([BM], NEVER, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)
    far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
    for j0 in range(0, far, BN):
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, FAR, DP, BN)
    for j0 in range(near, diagonal, BN):
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, NEAR, DP, BN)
    for x in range(far, stop - (diagonal - near), BN):                          # both edges, what lies between left out
        j0 = tl.where(x < near, x, x + diagonal - near)
        m, l, o = forward_tile(Q, k, v, log_g, b, h, j0, i, m, l, o, scale, T, W, EDGE, DP, BN)
    tl.store(lse + tl.program_id(0).to(tl.int64) * TP + i, m + tl.log2(l), i < T)
    out.store([b, hq, t0, 0], (o / l[:, None]).to(Q.dtype).reshape(1, 1, BM, DP))


@triton.jit
def dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, KIND: tl.constexpr, DP: tl.constexpr,
            BN: tl.constexpr):
    """One tile of keys into dQ (BM, DP), which lacks its factor 1 / sqrt(D)."""
    j = j0 + tl.arange(0, BN)
    K = k.load([b, h, j0, 0]).reshape(BN, DP)
    s = tl.dot(Q, K.T, input_precision="ieee") * scale - L[:, None]
    dP = tl.dot(dO, v.load([b, h, j0, 0]).reshape(BN, DP).T, input_precision="ieee")
    bias = key_bias(log_g, j, T, KIND)
    p = tl.exp2(biased(s, bias[None, :], i[:, None], j[None, :], W, KIND))
    dS = p * (dP - Delta[:, None])
    return tl.dot(dS.to(K.dtype), K, dQ, input_precision="ieee")


@triton.jit
def dq_kernel(q, k, v, log_g, out, do, lse, delta, dq, scale, T, TP, W, heads, G, DP: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr):
    """One program: dQ of BM queries of one query head, on the forward kernel's grid, and their delta on the way."""
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, hq = tl.program_id(0) // heads, tl.program_id(0) % heads
    h = hq // G
    i = t0 + tl.arange(0, BM)
    log_g += (b * (heads // G) + h).to(tl.int64) * T
    row = tl.program_id(0).to(tl.int64) * TP
    dO = do.load([b, hq, t0, 0]).reshape(BM, DP)
    Delta = tl.sum(out.load([b, hq, t0, 0]).reshape(BM, DP).to(tl.float32) * dO.to(tl.float32), 1)
    tl.store(delta + row + i, Delta, i < T)
    L = tl.load(lse + row + i, i < T, -NEVER)
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    dQ = tl.zeros([BM, DP], tl.float32)
    far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
    for j0 in range(0, far, BN):
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, FAR, DP, BN)
    for j0 in range(near, diagonal, BN):
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, NEAR, DP, BN)
    for x in range(far, stop - (diagonal - near), BN):
        j0 = tl.where(x < near, x, x + diagonal - near)
        dQ = dq_tile(Q, dO, L, Delta, k, v, log_g, b, h, j0, i, dQ, scale, T, W, EDGE, DP, BN)
    dq.store([b, hq, t0, 0], (dQ * (scale / LOG2E)).to(Q.dtype).reshape(1, 1, BM, DP))


@triton.jit
def dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale, W, KIND: tl.constexpr, DP: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr):
    """One tile of queries into dK, dV (BN, DP) and dG (BN). Keys are the rows: P^T and dS^T go in as they come out.

    Both products of the tile are begun at what is taken from them, L and delta: that needs no registers of its own.
    """
    i = t0 + tl.arange(0, BM)
    Q = q.load([b, hq, t0, 0]).reshape(BM, DP)
    L = lse.load([b, hq, t0]).reshape(BM) * (-1 / scale)
    s = tl.dot(K, Q.T, tl.broadcast_to(L[None, :], (BN, BM)), input_precision="ieee") * scale
    p = tl.exp2(biased(s, bias[:, None], i[None, :], j[:, None], W, KIND))
    dO = do.load([b, hq, t0, 0]).reshape(BM, DP)
    Delta = -delta.load([b, hq, t0]).reshape(BM)
    dS = p * tl.dot(V, dO.T, tl.broadcast_to(Delta[None, :], (BN, BM)), input_precision="ieee")
    dV = tl.dot(p.to(dO.dtype), dO, dV, input_precision="ieee")
    if KIND == FAR:
        dG += tl.sum(dS, 1)
    if KIND == EDGE:
        dG += tl.sum(tl.where(i[None, :] - j[:, None] < W, 0., dS), 1)
    dK = tl.dot(dS.to(Q.dtype), Q, dK, input_precision="ieee")
    return dK, dV, dG


@triton.jit
def dk_dv_kernel(q, k, v, log_g, do, lse, delta, dk, dv, d_log_g, scale, T, W, kv_heads, G,
                 DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """One program: dK, dV and d log g of BN keys of one KV head, over the G query heads that share it, one by one.

    Axis 0 is sequence and KV head, axis 1 the block of keys. The first keys are seen by the most queries and start
    first. STAGES stands at the loops too: said only at the launch, it would leave the loads of L and delta waiting.
    """
    j0 = tl.program_id(1) * BN
    b, h = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    j = j0 + tl.arange(0, BN)
    row = tl.program_id(0).to(tl.int64) * T
    bias = tl.load(log_g + row + j, j < T, 0.) * LOG2E
    K, V = k.load([b, h, j0, 0]).reshape(BN, DP), v.load([b, h, j0, 0]).reshape(BN, DP)
    dK = tl.zeros([BN, DP], tl.float32)
    dV = tl.zeros([BN, DP], tl.float32)
    dG = tl.zeros([BN], tl.float32)
    start, below, edge, far = query_tiles(j0, T, W, BM, BN)
    stop = tl.maximum(tl.minimum(far, T) - (edge - below), tl.minimum(below, T))
    for hq in range(h * G, h * G + G):
        for x in tl.range(start, stop, BM, num_stages=STAGES):                  # both edges, without what lies between
            t0 = tl.where(x < below, x, x + edge - below)
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale, W, EDGE, DP, BM, BN)
        for t0 in tl.range(below, tl.minimum(edge, T), BM, num_stages=STAGES):
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale, W, NEAR, DP, BM, BN)
        for t0 in tl.range(far, T, BM, num_stages=STAGES):
            dK, dV, dG = dk_dv_tile(K, V, bias, q, do, lse, delta, b, hq, t0, j, dK, dV, dG, scale, W, FAR, DP, BM, BN)
    tl.store(d_log_g + row + j, dG, j < T)
    dk.store([b, h, j0, 0], (dK * (scale / LOG2E)).to(K.dtype).reshape(1, 1, BN, DP))
    dv.store([b, h, j0, 0], dV.to(K.dtype).reshape(1, 1, BN, DP))


# (queries, keys, warps, stages) of a tile by padded head dim up to which it serves: what fits into registers.
# No line here spills on sm_90. At 128 the dK, dV tiles are small enough for two programs a multiprocessor: while one
# works out its exponents, the other has the tensor cores.
FORWARD = {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)}
DQ = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)}
DK_DV = {64: (64, 128, 8, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)}


def tile(table, DP, dtype):
    """(queries, keys, warps, stages). fp32 has no tensor cores and spills all the same: it is for proofs, not speed."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if DP <= 64 else (16, 16, 4, 1)
    return next(tiles for most, tiles in table.items() if DP <= most)


def readable(x):
    """x, or a copy if a tensor descriptor cannot take it: the last stride must be 1, the others whole 16 bytes."""
    steps = [s for n, s in zip(x.shape[:-1], x.stride()) if n > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.itemsize % 16 == 0 for s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def described(x, *block):
    """x (B, H, T, D) or (B, H, T) in blocks of one head. A dimension of size 1 may have any stride, so it gets one."""
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride())]
    return TensorDescriptor(x, list(x.shape), strides + [1], [1, 1, *block])


class SoftAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_g, window, scale):
        q, k, v, log_g = readable(q), readable(k), readable(v), log_g.contiguous()
        (B, Hq, T, D), Hkv = q.shape, k.shape[1]
        out = torch.empty_like(q)
        TP = triton.cdiv(T, 128) * 128                         # whole tiles of L, where P of no query comes to 0
        lse = torch.full((B, Hq, TP), -NEVER.value, device=q.device, dtype=torch.float32)
        DP = max(16, triton.next_power_of_2(D))
        BM, BN, warps, stages = tile(FORWARD, DP, q.dtype)
        forward_kernel[(B * Hq, triton.cdiv(T, BM))](
            described(q, BM, DP), described(k, BN, DP), described(v, BN, DP), log_g, described(out, BM, DP), lse,
            scale, T, TP, window, Hq, Hq // Hkv, DP=DP, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        ctx.save_for_backward(q, k, v, log_g, out, lse)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, log_g, out, lse = ctx.saved_tensors
        do = readable(do)
        (B, Hq, T, D), Hkv = q.shape, k.shape[1]
        dq, dk, dv, d_log_g = (torch.empty_like(x) for x in (q, k, v, log_g))
        delta = torch.zeros_like(lse)
        DP = max(16, triton.next_power_of_2(D))
        BM, BN, warps, stages = tile(DQ, DP, q.dtype)
        Q, O, dO, dQ = (described(x, BM, DP) for x in (q, out, do, dq))
        K, V = (described(x, BN, DP) for x in (k, v))
        dq_kernel[(B * Hq, triton.cdiv(T, BM))](
            Q, K, V, log_g, O, dO, lse, delta, dQ, ctx.scale, T, lse.shape[2], ctx.window, Hq, Hq // Hkv, DP=DP,
            BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        BM, BN, warps, stages = tile(DK_DV, DP, q.dtype)
        Q, dO = (described(x, BM, DP) for x in (q, do))
        K, V, dK, dV = (described(x, BN, DP) for x in (k, v, dk, dv))
        dk_dv_kernel[(B * Hkv, triton.cdiv(T, BN))](
            Q, K, V, log_g, dO, described(lse, BM), described(delta, BM), dK, dV, d_log_g, ctx.scale, T, ctx.window,
            Hkv, Hq // Hkv, DP=DP, BM=BM, BN=BN, STAGES=stages, num_warps=warps, num_stages=stages)
        return dq, dk, dv, d_log_g, None, None


def soft_attention(q, k, v, log_g, window):
    """Causal softmax(q k / sqrt(D) + bias) v, where the bias is 0 inside the window and log_g of the key outside it.

    q (B, Hq, T, D), k, v (B, Hkv, T, D) of one dtype, any strides; log_g (B, Hkv, T) fp32, -inf allowed; window >= 1.
    Returns (B, Hq, T, D). Gradients for q, k, v and log_g. The reference is wgkv.SoftAttention.attend_block.
    """
    D = q.shape[-1]
    spare = -D % (16 // q.itemsize)                            # a descriptor's rows are whole 16 bytes
    if spare:
        q, k, v = (F.pad(x, (0, spare)) for x in (q, k, v))
    out = SoftAttentionFunction.apply(q, k, v, log_g, min(window, q.shape[2]), 1 / math.sqrt(D) / math.log(2))
    return out[..., :D] if spare else out
