"""Candidates for decode's attention on a GPU: less time before and after the bytes are read.

    python experiments/decode_variants.py --json decode_variants.json       on a GPU, 8B shape

One layer's attention takes some 15 us plus the time of its bytes. Each layer here is three kernels,
as in a decode step: a stand-in for the product that makes q, k and v; rotate_and_write; attention.
All layers run in one CUDA graph, each with pages of its own. What we vary:

    shares      as in kernels.py: each program takes an even share of all tiles. A share that spans
                two rows pays twice for filling its pipeline, and the last program decides.
    pieces      each row is cut into pieces of nearly equal length, a program takes one piece.
                `slots` bounds their number. Partials are combined in one pass, not two.
    PDL         programmatic dependent launch: attention starts while rotate_and_write runs, reads
                its plan, and only then waits for q and the new key.
    prefetch    before that wait it asks for its first tiles, into the L2 cache. (The new token's
                page may be among them: L2 is where its writes arrive too.)
    fused       attention rotates q and k itself. The new token is the state in which the online
                softmax of its row begins, and rotate_and_write is not launched.

Nobody calls these kernels but this file.
"""
import json
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
import kernels                                                                  # noqa: E402
from common import Parser, run_program, write_text                              # noqa: E402
from kernels import (INITIAL_MAX, MASKED, UNSPECIALIZED, combine, online_softmax,   # noqa: E402
                     rotate_and_write_kernel)

P = 64
STRETCH = 2**29         # fp32 numbers to measure the bandwidth with: no cache holds them
PIECE = 8               # numbers a piece has in the plan: row, first, last, start, splits, 3 unused
NAN = float("nan")


# --------------------------------------------------------------------------------------- the plan

@triton.jit(do_not_specialize=UNSPECIALIZED)
def plan_pieces_kernel(counts, starts, pieces, rows, R, counts_l, SLOTS: tl.constexpr,
                       LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
                       P: tl.constexpr):
    """One program: one layer. Rows become pieces, at most SLOTS (>= rows) of them.

    A piece has at most `longest` tiles, the least number with which SLOTS pieces are enough. Rows
    of 5, 1 and 6 tiles and 6 slots: with longest = 2 there are 3 + 1 + 3 pieces, too many; with 3
    there are 2 + 1 + 2.
    """
    layer = tl.program_id(0)
    starts += layer * (rows + 1)
    pieces += layer * SLOTS * 8
    r = tl.arange(0, ROWS)
    count = tl.load(counts + layer.to(tl.int64) * counts_l + r, r < rows, 0).to(tl.int32)
    tiles = tl.where(r < rows, tl.maximum(R + tl.cdiv(count, P), 1), 0)
    # The largest number that is too small, bit by bit from the top; one more is enough.
    too_small = 0
    for bit in tl.static_range(20, -1, -1):
        try_this = too_small + (1 << bit)
        too_small = tl.where(tl.sum(tl.cdiv(tiles, try_this), 0) > SLOTS, try_this, too_small)
    num_splits = tl.cdiv(tiles, too_small + 1)
    tl.store(starts, 0)
    tl.store(starts + 1 + r, tl.cumsum(num_splits, 0), r < rows)
    tl.debug_barrier()                                      # all of starts can be read now

    # The row of piece p is the last one whose first piece is not after p: a binary search.
    p = tl.arange(0, LANES)
    row = tl.zeros([LANES], tl.int32)
    for step in tl.static_range(STEPS):
        later = row + (ROWS >> (step + 1))
        start = tl.load(starts + later, later < rows, 2**31 - 1)
        row = tl.where(start <= p, later, row)
    start = tl.load(starts + row)
    splits = tl.load(starts + row + 1) - start
    row_count = tl.load(counts + layer.to(tl.int64) * counts_l + row).to(tl.int32)
    row_tiles = tl.maximum(R + tl.cdiv(row_count, P), 1)
    part = p - start
    used = part < splits
    first = tl.where(used, row_tiles * part // splits, 0)
    last = tl.where(used, row_tiles * (part + 1) // splits, 0)
    pieces += p * 8
    tl.store(pieces, row, p < SLOTS)
    tl.store(pieces + 1, first, p < SLOTS)
    tl.store(pieces + 2, last, p < SLOTS)
    tl.store(pieces + 3, start, p < SLOTS)
    tl.store(pieces + 4, splits, p < SLOTS)


def plan_pieces(counts, ring_pages, slots):
    """counts (L, B, Hkv) int64 -> pieces (L, slots, PIECE) int32."""
    L, B, Hkv = counts.shape
    rows = B * Hkv
    slots = max(slots, rows)
    starts = torch.empty(L, rows + 1, device=counts.device, dtype=torch.int32)
    pieces = torch.zeros(L, slots, PIECE, device=counts.device, dtype=torch.int32)
    ROWS = triton.next_power_of_2(rows)
    plan_pieces_kernel[(L,)](counts, starts, pieces, rows, ring_pages, counts.stride(0),
                             SLOTS=slots, LANES=triton.next_power_of_2(slots), ROWS=ROWS,
                             STEPS=ROWS.bit_length() - 1, P=P)
    return pieces


# ------------------------------------------------------------------------------- kernels in common

@triton.jit(do_not_specialize=UNSPECIALIZED)
def standin_kernel(x, out, n, BLOCK: tl.constexpr):
    """Copies q, k and v to where attention's predecessor finds them. Does not end early."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n), i < n)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def early_rotate_and_write_kernel(q, k, v, cos, sin, q_out, page_k, page_v, page_pos, page_table,
                                  num_tokens, num_new, ring_size, columns, Hq, Hkv, cos_b, q_b,
                                  q_h, k_b, k_h, v_b, v_h, D: tl.constexpr, DP: tl.constexpr,
                                  HALF: tl.constexpr, P: tl.constexpr, GATED: tl.constexpr):
    """rotate_and_write_kernel, which lets the next kernel start as soon as it has started."""
    tl.extra.cuda.gdc_launch_dependents()
    rotate_and_write_kernel(q, k, v, cos, sin, q_out, page_k, page_v, page_pos, page_table,
                            num_tokens, num_new, ring_size, columns, Hq, Hkv, cos_b, q_b, q_h, k_b,
                            k_h, v_b, v_h, D, DP, HALF, P, GATED)


@triton.jit
def combine_once(partial_o, partial_m, partial_l, out, row, first_piece, num_splits,
                 G: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 COMBINE: tl.constexpr):
    """A row's output from its partials, whose m, l and o are read at the same time."""
    query = tl.arange(0, GM)
    d = tl.arange(0, DP)
    n = tl.arange(0, COMBINE)
    m = tl.full([GM], INITIAL_MAX, tl.float32)
    l = tl.zeros([GM], tl.float32)
    o = tl.zeros([GM, DP], tl.float32)
    for start in range(0, num_splits, COMBINE):
        partial = (first_piece + start + n)[:, None] * GM + query[None, :]          # (COMBINE, GM)
        here = (start + n < num_splits)[:, None] & (query < G)[None, :]
        part_m = tl.load(partial_m + partial, here, MASKED, cache_modifier=".cg")
        part_l = tl.load(partial_l + partial, here, 0., cache_modifier=".cg")
        part_o = tl.load(partial_o + partial[:, :, None] * DP + d[None, None, :],
                         here[:, :, None], 0., cache_modifier=".cg")                # (.., .., DP)
        m_new = tl.maximum(m, tl.max(part_m, 0))
        weight = tl.exp2(part_m - m_new[None, :])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(part_l * weight, 0)
        o = o * rescale[:, None] + tl.sum(part_o * weight[:, :, None], 0)
        m = m_new
    y = (o / l[:, None]).to(out.dtype.element_ty)
    offsets = (row * G + query).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + offsets, y, (query < G)[:, None] & (d < D)[None, :])


@triton.jit
def prefetch_tiles(page_k, page_v, table, first, last, D: tl.constexpr, P: tl.constexpr,
                   TILES: tl.constexpr, THREADS: tl.constexpr):
    """Into L2: the pages of tiles `first` to first + TILES - 1. Each thread asks for a part."""
    # Chunks of 2 KiB. The GPU asks for one after the other within a warp, so all warps share them.
    CHUNKS: tl.constexpr = P * D // 1024                            # of a page of bf16
    IN_WARP: tl.constexpr = CHUNKS * TILES * 32 // THREADS
    thread = tl.arange(0, THREADS)
    chunk = thread // 32 * IN_WARP + thread % 32
    tile = first + chunk // CHUNKS
    here = (tile < last) & (thread % 32 < IN_WARP)
    page = tl.load(table + tile, here, 0).to(tl.int64)
    at = page * (P * D) + chunk % CHUNKS * 1024
    for pages in tl.static_range(2):
        address = ((page_k if pages == 0 else page_v) + at).to(tl.int64)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0; }",
            "=r,l,r", [address, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


# ------------------------------------------------------------------------------------------ shares

@triton.jit(do_not_specialize=UNSPECIALIZED)
def shares_kernel(q, page_k, page_v, page_table, counts, num_tokens, num_new, tile_starts,
                  first_row, first_tile, partial_o, partial_m, partial_l, arrivals, out, scale,
                  rows, Hkv, columns, R, W, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                  DP: tl.constexpr, P: tl.constexpr, GM: tl.constexpr, COMBINE: tl.constexpr,
                  PDL: tl.constexpr):
    """kernels.decode_kernel, with a wait for the kernel before it."""
    pid = tl.program_id(0)
    total = tl.load(tile_starts + rows).to(tl.int64)
    programs = tl.minimum(tl.num_programs(0), total)
    tile = (total * pid // programs).to(tl.int32)
    end = tl.where(pid < programs, total * (pid + 1) // programs, 0).to(tl.int32)
    row = tl.load(first_row + pid)
    first = tl.load(first_tile + pid)
    query = tl.arange(0, GP)
    d = tl.arange(0, DP)
    in_page = tl.arange(0, P)
    q_mask = (query < G)[:, None] & (d < D)[None, :]
    offsets = in_page[:, None] * D + d[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    while tile < end:
        table = page_table + row.to(tl.int64) * columns
        page = tl.load(table + first)
        row_start = tl.load(tile_starts + row)
        row_end = tl.load(tile_starts + row + 1)
        last = tl.minimum(end, row_end) - row_start
        count = tl.load(counts + row).to(tl.int32)
        tokens = tl.load(num_tokens + row // Hkv) + tl.load(num_new + row // Hkv)
        in_ring = tl.minimum(tokens, W).to(tl.int32)
        q_offsets = (row * G + query).to(tl.int64)[:, None] * D + d[None, :]
        Q = tl.load(q + q_offsets, q_mask, 0.)
        m = tl.full([GP], INITIAL_MAX, tl.float32)
        l = tl.zeros([GP], tl.float32)
        o = tl.zeros([GP, DP], tl.float32)
        for i in range(first, last):
            limit = tl.where(i < R, in_ring, R * P + count)
            visible = i * P + in_page < limit
            here = visible[:, None] & (d < D)[None, :]
            at = tl.multiple_of(page.to(tl.int64) * (P * D), 16)
            page = tl.load(table + i + 1, i + 1 < last, 0)
            K = tl.load(page_k + at + offsets, here, 0.)
            V = tl.load(page_v + at + offsets, here, 0.)
            s = tl.dot(Q, K.T, input_precision="ieee") * scale
            s = tl.where(visible[None, :], s, MASKED)
            m, l, o = online_softmax(s, V, m, l, o)
        first_program = (((row_start + 1) * programs - 1) // total).to(tl.int32)
        last_program = ((row_end * programs - 1) // total).to(tl.int32)
        num_splits = last_program - first_program + 1
        if num_splits == 1:
            tl.store(out + q_offsets, (o / l[:, None]).to(out.dtype.element_ty), q_mask)
        else:
            partial = (pid + row).to(tl.int64) * GM + query
            tl.store(partial_m + partial, m, query < G)
            tl.store(partial_l + partial, l, query < G)
            tl.store(partial_o + partial[:, None] * DP + d[None, :], o, (query < G)[:, None])
            tl.debug_barrier()
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == num_splits - 1:
                combine(partial_o, partial_m, partial_l, out, row, first_program, num_splits, G,
                        GM, D, DP, COMBINE)
                tl.store(arrivals + row, 0)
        tile = row_start + last
        row += 1
        first = 0


# ------------------------------------------------------------------------------------------ pieces

@triton.jit
def rotate_rows(x, row, d, mask, cos, sin, D: tl.constexpr):
    """Rows (n) of x, each a head, rotated: (n, DP). Channel d's partner is half a head away."""
    HALF: tl.constexpr = D // 2
    sign = tl.where(d < HALF, -1., 1.)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    # cos and sin of both halves are the same; the kernels of kernels.py read the first half.
    angle = tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, d < D, 0.)
    s = tl.load(sin + angle, d < D, 0.)
    x1 = tl.load(x + row[:, None] * D + d[None, :], mask, 0.).to(tl.float32)
    x2 = tl.load(x + row[:, None] * D + partner[None, :], mask, 0.).to(tl.float32)
    return (x1 * c[None, :] + x2 * (sign * s)[None, :]).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pieces_kernel(q, k, v, cos, sin, page_k, page_v, page_pos, page_table, counts, num_tokens,
                  num_new, pieces, partial_o, partial_m, partial_l, arrivals, out, scale, Hkv,
                  columns, R, W, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                  DP: tl.constexpr, P: tl.constexpr, GM: tl.constexpr, COMBINE: tl.constexpr,
                  PDL: tl.constexpr, PREFETCH: tl.constexpr, FUSED: tl.constexpr,
                  THREADS: tl.constexpr):
    """decode_kernel for one piece of one row. FUSED: q, k, v are not rotated, not yet written."""
    pid = tl.program_id(0)
    pieces += pid * 8
    row = tl.load(pieces)
    first = tl.load(pieces + 1)
    last = tl.load(pieces + 2)
    first_piece = tl.load(pieces + 3)
    num_splits = tl.load(pieces + 4)
    query = tl.arange(0, GP)
    d = tl.arange(0, DP)
    in_page = tl.arange(0, P)
    q_mask = (query < G)[:, None] & (d < D)[None, :]
    offsets = in_page[:, None] * D + d[None, :]             # of a page's K or V, (P, DP)
    if first < last:
        # All of this was written before the kernel that precedes us began.
        table = page_table + row.to(tl.int64) * columns
        page = tl.load(table + first)
        count = tl.load(counts + row).to(tl.int32)
        position = tl.load(num_tokens + row // Hkv)
        new = tl.load(num_new + row // Hkv)
        in_ring = tl.minimum(position + new, W).to(tl.int32)
        place = (position % W).to(tl.int32)
        if PREFETCH:
            prefetch_tiles(page_k, page_v, table, first, last, D, P, PREFETCH, THREADS)
        if PDL:
            tl.extra.cuda.gdc_wait()
        q_rows = row * G + query
        q_offsets = q_rows.to(tl.int64)[:, None] * D + d[None, :]
        m = tl.full([GP], INITIAL_MAX, tl.float32)
        l = tl.zeros([GP], tl.float32)
        o = tl.zeros([GP, DP], tl.float32)
        if FUSED:
            b = row // Hkv
            cos += b * D
            sin += b * D
            Q = rotate_rows(q, q_rows, d, q_mask, cos, sin, D)
            one = tl.zeros([1], tl.int32)
            new_k = rotate_rows(k, row + one, d, (d < D)[None, :], cos, sin, D)     # (1, DP)
            new_v = tl.load(v + row * D + d, d < D, 0.)
            # One piece of a row has the new token's tile; it begins with the new token.
            mine = (new > 0) & (place // P >= first) & (place // P < last)
            new_s = tl.sum(Q.to(tl.float32) * new_k.to(tl.float32), 1) * scale      # (GP,)
            m = tl.where(mine, new_s, m)
            l = tl.where(mine, 1., l)
            o = tl.where(mine, o + new_v.to(tl.float32)[None, :], o)
            if mine:
                target = tl.load(table + place // P).to(tl.int64) * P + place % P
                tl.store(page_k + target * D + (one[:, None] + d[None, :]), new_k, (d < D)[None, :])
                tl.store(page_v + target * D + d, new_v, d < D)
                tl.store(page_pos + target, position.to(tl.int32))
        else:
            Q = tl.load(q + q_offsets, q_mask, 0.)          # (GP, DP)
        for i in range(first, last):
            limit = tl.where(i < R, in_ring, R * P + count)
            visible = i * P + in_page < limit
            if FUSED:                                       # that token is in the state already
                visible = visible & ((i * P + in_page != place) | (new == 0))
            here = visible[:, None] & (d < D)[None, :]
            at = tl.multiple_of(page.to(tl.int64) * (P * D), 16)
            page = tl.load(table + i + 1, i + 1 < last, 0)
            K = tl.load(page_k + at + offsets, here, 0.)
            V = tl.load(page_v + at + offsets, here, 0.)
            s = tl.dot(Q, K.T, input_precision="ieee") * scale                      # (GP, P)
            s = tl.where(visible[None, :], s, MASKED)
            m, l, o = online_softmax(s, V, m, l, o)

        if num_splits == 1:
            tl.store(out + q_offsets, (o / l[:, None]).to(out.dtype.element_ty), q_mask)
        else:
            partial = pid * GM + query
            tl.store(partial_m + partial, m, query < G)
            tl.store(partial_l + partial, l, query < G)
            tl.store(partial_o + partial[:, None] * DP + d[None, :], o, (query < G)[:, None])
            tl.debug_barrier()                              # every thread's part, before we arrive
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == num_splits - 1:
                if COMBINE > 0:
                    combine_once(partial_o, partial_m, partial_l, out, row, first_piece,
                                 num_splits, G, GM, D, DP, COMBINE)
                tl.store(arrivals + row, 0)


# ------------------------------------------------------------------------------------------ layers

# name: settings; the riskiest last. Those in DIAGNOSTICS leave out a part, to see what it costs.
DIAGNOSTICS = ("256 x 4, PDL, combines nothing", "256 x 4, PDL, empty pieces")
VARIANTS = {
    "base": dict(kind="base"),
    "pieces 132 x 6": dict(kind="pieces", slots=132, stages=6),
    "pieces 256 x 4": dict(kind="pieces", slots=256, stages=4),
    "shares 132 x 6, PDL": dict(kind="shares", pdl=True),
    "pieces 132 x 6, PDL": dict(kind="pieces", slots=132, stages=6, pdl=True),
    "pieces 256 x 4, PDL": dict(kind="pieces", slots=256, stages=4, pdl=True),
    "pieces 384 x 3, PDL": dict(kind="pieces", slots=384, stages=3, pdl=True, combine=16),
    "256 x 4, fused": dict(kind="pieces", slots=256, stages=4, fused=True),
    "256 x 4, fused, PDL": dict(kind="pieces", slots=256, stages=4, pdl=True, fused=True),
    "256 x 4, PDL, combines nothing": dict(kind="pieces", slots=256, stages=4, pdl=True, combine=0),
    "256 x 4, PDL, empty pieces": dict(kind="pieces", slots=256, stages=4, pdl=True, empty=True),
    "256 x 4, PDL, prefetch 2": dict(kind="pieces", slots=256, stages=4, pdl=True, prefetch=2),
    "256 x 4, PDL, prefetch 4": dict(kind="pieces", slots=256, stages=4, pdl=True, prefetch=4),
}
COMPILING = threading.local()


def launch(kernel, grid, *args, **settings):
    """kernel[grid](...), or, in a thread that sets COMPILING.on, only compile it."""
    if getattr(COMPILING, "on", False):
        kernel.warmup(*args, grid=grid, **settings)
    else:
        kernel[grid](*args, **settings)


class Layers:
    """Pages, inputs and outputs of L layers of B sequences; each row is NaN where it has no token.

    promoted (B, Hkv): how many tokens each row has in pages after its ring; num_tokens, num_new
    (B): lengths before this step, and new tokens.
    """

    def __init__(self, L, Hq, D, window, num_tokens, num_new, promoted, device, dtype):
        self.L = L
        self.Hq = Hq
        self.D = D
        self.window = window
        self.R = (window + P - 1) // P
        self.num_tokens = torch.tensor(num_tokens, device=device)
        self.num_new = torch.tensor(num_new, device=device)
        promoted = torch.tensor(promoted, device=device)
        B, Hkv = promoted.shape
        self.B = B
        self.Hkv = Hkv
        self.counts = promoted.expand(L, B, Hkv).contiguous()
        pages = self.R + (self.counts + P - 1) // P                 # (L, B, Hkv)
        M = int(pages.max())
        used = torch.arange(M, device=device) < pages[..., None]
        self.table = torch.zeros_like(used, dtype=torch.int32)
        total = int(pages.sum())
        self.table[used] = torch.randperm(total, device=device).int() + 1
        self.k = torch.randn(total + 1, P, D, device=device, dtype=dtype)
        self.v = torch.randn_like(self.k)
        self.pos = torch.zeros(total + 1, P, device=device, dtype=torch.int32)
        self.k[0] = self.v[0] = NAN
        self.bytes = int(self.counts[0].sum()) * 4 * D              # K and V of a layer, in bf16
        self.bytes += B * Hkv * window * 4 * D

        # What no query may see: after `count`, and, in the ring, what has not been written. The new
        # token's place is poisoned before each test.
        end = self.R * P + self.counts
        in_ring = (self.num_tokens + self.num_new).clamp(max=window)[:, None]
        for layer in range(L):
            for b in range(B):
                for h in range(Hkv):
                    self.poison(layer, b, h, int(in_ring[b]), self.R * P)
                    tail = int(end[layer, b, h])
                    self.poison(layer, b, h, tail, (tail + P - 1) // P * P)
        self.new = torch.randn(L, B * (Hq + 2 * Hkv) * D, device=device, dtype=dtype)
        angle = torch.rand(B, 1, 1, D // 2, device=device) * 6
        self.cos = torch.cat((angle.cos(),) * 2, -1)
        self.sin = torch.cat((angle.sin(),) * 2, -1)
        self.buffer = torch.empty_like(self.new)
        self.rotated = torch.empty(L, B, Hq, 1, D, device=device, dtype=dtype)
        self.out = torch.empty_like(self.rotated)
        self.plan = kernels.plan_decode(self.counts, self.num_tokens, self.num_new, self.R, window,
                                        P)
        self.pieces = {}
        self.no_pieces = {}
        self.arrivals = torch.zeros(4096, device=device, dtype=torch.int32)
        self.partial_o = torch.full((4096, self.G, max(16, triton.next_power_of_2(D))), NAN,
                                    device=device)
        self.partial_m = torch.full((4096, self.G), NAN, device=device)
        self.partial_l = torch.full((4096, self.G), NAN, device=device)

    @property
    def G(self):
        return self.Hq // self.Hkv

    def poison(self, layer, b, h, start, stop):
        place = torch.arange(start, stop, device=self.k.device)
        pages = self.table[layer, b, h, place // P].long()
        self.k[pages, place % P] = NAN
        self.v[pages, place % P] = NAN

    def poison_new(self):
        """The new tokens' places, outputs and rotated queries, as if nothing had been written."""
        for b, n in enumerate(self.num_tokens.tolist()):
            place = n % self.window
            if self.num_new[b] > 0:
                pages = self.table[:, b, :, place // P].long()
                self.k[pages, place % P] = NAN
                self.v[pages, place % P] = NAN
        self.out.fill_(NAN)
        self.rotated.fill_(NAN)
        self.buffer.fill_(NAN)

    def split(self, x):
        q, k, v = x.split([self.B * h * self.D for h in (self.Hq, self.Hkv, self.Hkv)])
        return (q.view(self.B, self.Hq, 1, self.D), k.view(self.B, self.Hkv, 1, self.D),
                v.view(self.B, self.Hkv, 1, self.D))

    def reference(self, layer):
        """What attention must give, in fp32: (B, Hq, 1, D)."""
        q, k, v = self.split(self.new[layer])

        def rotate(x):
            x1, x2 = x.float().chunk(2, -1)
            c, s = (y[..., :self.D // 2] for y in (self.cos, self.sin))
            return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1).to(x.dtype).float()

        q = rotate(q)
        k = rotate(k)
        out = torch.full(q.shape, NAN, device=q.device)
        for b in range(self.B):
            n = int(self.num_tokens[b])
            new = int(self.num_new[b])
            for h in range(self.Hkv):
                count = int(self.counts[layer, b, h])
                place = torch.arange(min(n + new, self.window), device=q.device)
                if new:
                    place = place[place != n % self.window]
                place = torch.cat((place, self.R * P + torch.arange(count, device=q.device)))
                pages = self.table[layer, b, h, place // P].long()
                keys = self.k[pages, place % P].float()
                values = self.v[pages, place % P].float()
                if new:
                    keys = torch.cat((keys, k[b, h]))
                    values = torch.cat((values, v[b, h].float()))
                queries = q[b, h * self.G:(h + 1) * self.G, 0]
                weights = (queries @ keys.T / self.D ** 0.5).softmax(-1)
                out[b, h * self.G:(h + 1) * self.G, 0] = weights @ values
        return out

    def error(self, layer):
        """The largest difference from the reference; NaN where a sequence has nothing is fine.

        NaN too if the new token is not where it belongs.
        """
        want = self.reference(layer)
        _, _, v = self.split(self.new[layer])
        for b, n in enumerate(self.num_tokens.tolist()):
            if self.num_new[b] > 0:
                pages = self.table[layer, b, :, n % self.window // P].long()
                place = n % self.window % P
                if self.k[pages, place].isnan().any() or not self.v[pages, place].equal(v[b, :, 0]):
                    return NAN
        some = (self.num_tokens + self.num_new > 0)
        wrong = (self.out[layer].float() - want)[some].abs()
        return NAN if wrong.isnan().any() else wrong.max().item()

    # The three kernels of a layer.

    def stand_in(self, layer):
        n = self.new.shape[1]
        launch(standin_kernel, (triton.cdiv(n, 1024),), self.new[layer], self.buffer[layer], n,
               BLOCK=1024, num_warps=4)

    def rotate_and_write(self, layer, early=False):
        q, k, v = self.split(self.buffer[layer])
        kernel = early_rotate_and_write_kernel if early else rotate_and_write_kernel
        D = self.D
        launch(kernel, (self.B * (self.Hq + self.Hkv),),
               q, k, v, self.cos, self.sin, self.rotated[layer], self.k, self.v, self.pos,
               self.table[layer], self.num_tokens, self.num_new, self.window,
               self.table.stride(2), self.Hq, self.Hkv, self.cos.stride(0), *q.stride()[:2],
               *k.stride()[:2], *v.stride()[:2], D=D, DP=triton.next_power_of_2(D),
               HALF=triton.next_power_of_2(D // 2), P=P, GATED=True, num_warps=1)

    def attention(self, layer, kind, slots=132, stages=6, pdl=False, prefetch=0, fused=False,
                  empty=False, combine=32):
        if kind == "base":
            self.out[layer] = kernels.decode_attention(self.rotated[layer], self.k, self.v,
                                                       self.table[layer], self.plan, layer)
            return
        G = self.G
        D = self.D
        GM = triton.next_power_of_2(G)
        DP = max(16, triton.next_power_of_2(D))
        scale = 1.4426950408889634 / D ** 0.5
        tile = dict(G=G, GP=max(16, GM), D=D, DP=DP, P=P, GM=GM,
                    COMBINE=min(combine, max(1, 16384 // (GM * DP))), PDL=pdl, num_warps=4,
                    num_stages=stages)
        if pdl:
            tile["launch_pdl"] = True
        if kind == "shares":
            plan = self.plan
            launch(shares_kernel, (plan.first_row.shape[1],), self.rotated[layer], self.k, self.v,
                   self.table[layer], self.counts[layer], self.num_tokens, self.num_new,
                   plan.tile_starts[layer], plan.first_row[layer], plan.first_tile[layer],
                   self.partial_o, self.partial_m, self.partial_l, self.arrivals, self.out[layer],
                   scale, self.B * self.Hkv, self.Hkv, self.table.stride(2), self.R, self.window,
                   **tile)
            return
        if slots not in self.pieces:
            self.pieces[slots] = plan_pieces(self.counts, self.R, slots)
            self.no_pieces[slots] = torch.zeros_like(self.pieces[slots])
        pieces = (self.no_pieces if empty else self.pieces)[slots]
        q, k, v = self.split(self.buffer[layer])
        launch(pieces_kernel, (pieces.shape[1],), q if fused else self.rotated[layer], k, v,
               self.cos, self.sin, self.k, self.v, self.pos, self.table[layer], self.counts[layer],
               self.num_tokens, self.num_new, pieces[layer], self.partial_o, self.partial_m,
               self.partial_l, self.arrivals, self.out[layer], scale, self.Hkv,
               self.table.stride(2), self.R, self.window, PREFETCH=prefetch, FUSED=fused,
               THREADS=128, **tile)

    def layer(self, layer, settings):
        self.stand_in(layer)
        if not settings.get("fused"):
            # The producer lets only those start early that know how to wait.
            self.rotate_and_write(layer, early=settings.get("pdl", False))
        self.attention(layer, **settings)

    def step(self, settings):
        for layer in range(self.L):
            self.layer(layer, settings)

    def test(self, settings, layers):
        """The largest error of some layers, after the whole step ran twice."""
        worst = 0.
        for _ in range(2):
            self.poison_new()
            self.step(settings)
            for layer in layers:
                error = self.error(layer)
                if not error <= worst:
                    worst = error
        return worst


# ------------------------------------------------------------------------------------------ timing

CONFIGS = {     # name: (tokens, shares of the heads, layers)
    "32K": (32768, [0.25], 16),
    "100K": (102400, [0.25], 12),
    "200K": (204800, [0.25], 8),
    "400K": (409600, [0.25], 4),
    "200K uneven": (204800, [0.45, 0.05], 8),
}


def make_layers(tokens, shares, L, device):
    """The 8B shape. Counts differ by a few tokens, so that last pages are partial."""
    counts = [int((tokens - 256) * shares[h % len(shares)]) - 5 * h for h in range(8)]
    return Layers(L, 32, 128, 256, [tokens], [1], [counts], device, torch.bfloat16)


def edge_cases(device, dtype, D=128, Hq=32, Hkv=8):
    """Short, empty and uneven rows; a ring that is not full; a sequence without a new token."""
    short = [0, 1, 63, 64, 65, 200, 0, 3][:Hkv]
    long = [3000, 5, 0, 700, 64, 63, 129, 2][:Hkv]
    yield Layers(2, Hq, D, 256, [1000], [1], [short], device, dtype)
    yield Layers(2, Hq, D, 100, [4000], [1], [long], device, dtype)
    yield Layers(1, Hq, D, 256, [0, 90, 700], [1, 1, 0], [[0] * Hkv, [0] * Hkv, long], device,
                 dtype)


def fit(points):
    """us = intercept + MB / (bytes a us), by least squares: (intercept, TB/s)."""
    x = torch.tensor([mb for mb, _ in points], dtype=torch.float64)
    y = torch.tensor([us for _, us in points], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return (y.mean() - slope * x.mean()).item(), (1 / slope).item()


class Watchdog:
    """Starts this program anew without a candidate that hangs or breaks the CUDA context."""

    def __init__(self, argv):
        self.argv = argv

    def restart(self, name):
        print(f"-- {name} hangs or broke the device: once more without it", flush=True)
        os.execv(sys.executable, [sys.executable, __file__, *self.argv, "--skip", name])

    def guard(self, name, call, seconds=20):
        timer = threading.Timer(seconds, self.restart, [name])
        timer.daemon = True
        timer.start()
        try:
            result = call()
            torch.cuda.synchronize()
            return result
        except Exception:
            traceback.print_exc(limit=2)
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device="cuda").item()
            except Exception:
                self.restart(name)
            return None
        finally:
            timer.cancel()


def compile_all(layers, variants):
    """In threads. Returns {name: the exception, as text} of those that do not compile."""
    for slots in {s["slots"] for s in variants.values() if "slots" in s}:
        layers.pieces[slots] = plan_pieces(layers.counts, layers.R, slots)
        layers.no_pieces[slots] = torch.zeros_like(layers.pieces[slots])

    def compile_one(settings):
        if settings["kind"] != "base":
            COMPILING.on = True
            try:
                layers.layer(0, settings)
                layers.layer(1, settings)       # other alignments of the plan's slices
            finally:
                COMPILING.on = False

    failed = {}
    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(compile_one, s) for name, s in variants.items()}
        for name, future in futures.items():
            try:
                future.result()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[-600:]
    return failed


@torch.no_grad()
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME",
                        help="a candidate to leave out")
    parser.add_argument("--runs", type=int, default=15, help="timed rounds (15)")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    watchdog = Watchdog(sys.argv[1:] if argv is None else argv)
    variants = {name: s for name, s in VARIANTS.items() if name not in args.skip}
    results = dict(bench.machine(device), date=time.strftime("%Y-%m-%d"), skipped=args.skip,
                   errors={}, failed={}, rows=[])

    def save():
        if args.json:
            write_text(args.json, json.dumps(results, indent=1) + "\n")

    # First whether they compile, then whether they are right.
    cases = list(edge_cases(device, torch.bfloat16))
    failed = compile_all(cases[0], variants)
    print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
    for name in list(variants):
        errors = None
        if name not in failed:
            errors = watchdog.guard(name, lambda: [
                layers.test(variants[name], range(layers.L)) for layers in cases])
            if errors is None:
                failed[name] = "raised an exception"
        print(f"{name:31} errors", errors or failed[name], flush=True)
        results["errors"][name] = errors
        right = errors is not None and all(e < 0.05 for e in errors)
        if errors is None or (not right and name not in DIAGNOSTICS):
            failed.setdefault(name, f"wrong: {errors}")
            del variants[name]
    results["failed"] = failed
    save()
    print(f"tested after {time.perf_counter() - began:.1f} s", flush=True)

    stretch = torch.zeros(STRETCH, device=device)
    read, = bench.device_times(stretch.sum, inner=1, runs=9)
    results["bandwidth"] = stretch.nbytes / bench.median(read)
    del stretch
    for config, (tokens, shares, L) in CONFIGS.items():
        layers = make_layers(tokens, shares, L, device)

        def only_stand_ins(layers=layers):
            for layer in range(layers.L):
                layers.stand_in(layer)

        def without_attention(layers=layers):
            for layer in range(layers.L):
                layers.stand_in(layer)
                layers.rotate_and_write(layer)

        errors = {}
        for name, settings in variants.items():
            if name in DIAGNOSTICS:
                continue
            errors[name] = watchdog.guard(name, lambda: layers.test(settings, [0, L - 1]))
        sides = {"stand-in": only_stand_ins, "+ rotate_and_write": without_attention}
        for name, settings in variants.items():
            if settings["kind"] == "base":      # without the copy of its output
                def base(layers=layers):
                    for layer in range(layers.L):
                        layers.stand_in(layer)
                        layers.rotate_and_write(layer)
                        kernels.decode_attention(layers.rotated[layer], layers.k, layers.v,
                                                 layers.table[layer], layers.plan, layer)

                sides[name] = base
            else:
                sides[name] = lambda s=settings, layers=layers: layers.step(s)
        times = bench.device_times(*sides.values(), inner=1, runs=args.runs)
        us = {name: [t / L * 1e6 for t in seconds] for name, seconds in zip(sides, times)}
        base_us = {name: bench.median(x) for name, x in us.items()}
        for name in sides:
            row = dict(config=config, name=name, layer_us=us[name], error=errors.get(name),
                       bytes=layers.bytes, total=base_us[name],
                       with_producer=base_us[name] - base_us["stand-in"],
                       attention=base_us[name] - base_us["+ rotate_and_write"])
            results["rows"].append(row)
        save()
        print(f"{config}: {layers.bytes / 1e6:.1f} MB, errors "
              f"{max((e if e == e and e is not None else 9.) for e in errors.values()):.4f} at "
              f"most, after {time.perf_counter() - began:.1f} s", flush=True)
        del layers, sides, only_stand_ins, without_attention
        torch.cuda.empty_cache()

    # The table. `attention` is what a layer takes beyond stand-in and rotate_and_write.
    bandwidth = results["bandwidth"]
    print(f"\nread bandwidth {bandwidth / 1e12:.2f} TB/s. us a layer: attention alone (with "
          f"rotate_and_write)\n{'':31}" + "".join(f"{c:>17}" for c in CONFIGS)
          + f"{'intercept':>11}{'TB/s':>6}")
    ideal = {row["config"]: row["bytes"] / bandwidth * 1e6 for row in results["rows"]}
    print(f"{'bytes / bandwidth':31}" + "".join(f"{ideal[c]:17.1f}" for c in CONFIGS))
    results["fits"] = {}
    for name in ["stand-in", "+ rotate_and_write", *variants]:
        rows = {r["config"]: r for r in results["rows"] if r["name"] == name}
        cells = [f"{r['attention']:9.1f} ({r['with_producer']:5.1f})" for r in rows.values()]
        key = "with_producer" if VARIANTS.get(name, {}).get("fused") else "attention"
        points = [(r["bytes"] / 1e6, r[key]) for c, r in rows.items() if "uneven" not in c]
        line = f"{name:31}" + "".join(f"{cell:>17}" for cell in cells)
        if name in variants:
            intercept, rate = results["fits"][name] = fit(points)
            line += f"{intercept:11.1f}{rate:6.2f}"
        print(line, flush=True)
    for name, why in failed.items():
        print(f"{name}: {why}")
    print(f"(a fused candidate's intercept includes rotate_and_write) "
          f"{time.perf_counter() - began:.0f} s in all")
    save()


if __name__ == "__main__":
    sys.exit(run_program(main))
