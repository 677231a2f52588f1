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
from triton.tools.tensor_descriptor import TensorDescriptor

from wgkv import P

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


# ------------------------------------------------------------------------------------------------------------ prefill

@triton.jit
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
    Q = tl.load(q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :], here, 0.)
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
    tl.store(out + b * out_b + h * out_h + t[:, None] * out_t + d[None, :], o, here)


def prefill_attention(q, band_k, band_v, band_g, page_k, page_v, table, old_count, window, tau):
    """softmax(q k / sqrt(D)) v over the admitted keys outside the window and the visible ones of the band.

    q (B, Hq, T, D) rotated; band_k, band_v (B, Hkv, W + T, D) and band_g (B, Hkv, W + T) fp32: the W tokens before the
    call, then its own, -inf where there was none; page_k, page_v (N, P, D); table (B * Hkv, M) int32; old_count
    (B, Hkv, T) int64: how many of a row's admitted tokens lie outside the window of new token t. All but q contiguous.
    Returns (B, Hq, T, D). The reference is wgkv.banded_attention.
    """
    B, Hq, T, D = q.shape
    DP = max(16, triton.next_power_of_2(D))
    BM, warps = tile(DP, q.dtype)
    out = torch.empty_like(q)
    page_k, page_v, band_k, band_v = (TensorDescriptor.from_tensor(x.view(-1, D), [P, DP])
                                      for x in (page_k, page_v, band_k, band_v))
    prefill_kernel[(B * Hq, triton.cdiv(T, BM))](
        q, band_k, band_v, band_g, page_k, page_v, table, old_count, out, tau, 1 / math.sqrt(D) / math.log(2), T,
        window, table.shape[1], Hq, *q.stride()[:3], *out.stride()[:3], G=Hq // band_g.shape[1], D=D, DP=DP, BM=BM, P=P,
        num_warps=warps, num_stages=3 if DP <= 128 else 2)
    return out


def tile(DP, dtype):
    """(queries a program, warps) for a padded head dim: what fits into registers and shared memory."""
    if dtype == torch.float32 or DP > 128:
        return 64, 4
    return 128, 4


# ------------------------------------------------------------------------------------------------------------- decode

@triton.jit
def decode_kernel(q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l, tickets, out, scale,
                  rows, columns, W, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  RP: tl.constexpr, P: tl.constexpr):
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
            o = (o / l[:, None]).to(out.dtype.element_ty)
            tl.store(out + (row * G + g).to(tl.int64)[:, None] * D + d[None, :], o, mine)
        u = last
        row += 1


def decode_attention(q, ring_k, ring_v, ring_g, page_k, page_v, table, count, tickets, programs=None):
    """Attention of one new token a sequence over its rows' pages and rings, the token itself being in the ring.

    q (B, Hq, 1, D); ring_k, ring_v (B, Hkv, W, D), ring_g (B, Hkv, W) fp32, -inf in slots never written; pages and
    table as above; count (B * Hkv) int64. tickets (B * Hkv) int32 zeros, and zeros again afterwards. Returns q's shape.
    The reference is the end of wgkv.DualCache.decode.
    """
    B, Hq, _, D = q.shape
    Hkv, W = ring_k.shape[1:3]
    rows, G = B * Hkv, Hq // Hkv
    GP, DP = max(16, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(D))
    if programs is None:
        programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    part_o = torch.empty(programs + rows, GP, DP, device=q.device, dtype=torch.float32)
    part_m, part_l = (torch.empty(programs + rows, GP, device=q.device, dtype=torch.float32) for _ in range(2))
    q, out = q.contiguous(), torch.empty(q.shape, device=q.device, dtype=q.dtype)
    decode_kernel[(programs,)](q, ring_k, ring_v, ring_g, page_k, page_v, table, count, part_o, part_m, part_l, tickets,
                               out, 1 / math.sqrt(D) / math.log(2), rows, table.shape[1], W, G=G, GP=GP, D=D, DP=DP,
                               RP=triton.next_power_of_2(rows), P=P, num_warps=4, num_stages=5)
    return out
