"""Prefill attention for Hopper GPUs (H100, H200), in Gluon: kernels.prefill_kernel, but faster.

Gluon is Triton's own lower level: the parts of a Hopper multiprocessor (SM) are named and the
program says which warps do what. Here, as in FlashAttention-3, one warp only copies tiles from
memory into shared memory (with the copy engine, TMA), and two warpgroups of 4 warps compute, each
on 64 of the program's 128 queries. While the tensor cores multiply one pair of tiles, a warpgroup
computes the softmax of another: the order of issue makes them overlap. And while one warpgroup is
busy with exponents, the tensor cores are free for the other. Nothing forces that, but it usually
happens.

    copy warp           K 0,1 | V 0,1 | K 2,3 | V 2,3 | ...        two tiles at a time, into a stage
    a warpgroup         q.k 0,1    softmax 0,1    q.k 2,3 and p.v 0,1    softmax 2,3 ...

The warps wait for each other at barriers in shared memory (mbarriers). Each of the STAGES stages
for K, and for V, has two barriers: `full` completes when a copy has landed, `free` when both
warpgroups have read the stage. wait(0) returns after completions 1, 3, 5, ..., wait(1) after 2, 4,
6, ... and at once before the first. So readers wait for phase n mod 2 of `full` at use n of a
stage, counted from 0, and the copying warp for the other phase of `free`.

What is masked must be finite, since 0 * NaN is NaN: the unused slots of a page (see wgkv.PagePool),
and what a last tile may read past a row's band, the beginning of the next row's.

compute-sanitizer's memcheck finds nothing; BENCHMARKS.md says what its other tools report.
"""
import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# As in kernels.py.
UNSPECIALIZED = ["T", "W", "columns", "Hq"]
INITIAL_MAX = gl.constexpr(-1e30)
MASKED = gl.constexpr(-2e30)


@gluon.jit
def copy_tile(page, band, first, in_page, full, target):
    """Start the copy of one tile of K or V, from its row `first` of the pages or of the band on."""
    if in_page:
        tma.async_copy_global_to_shared(page, [first, 0], full, target)
    else:
        tma.async_copy_global_to_shared(band, [first, 0], full, target)


@gluon.jit
def copy_warp(page_k, page_v, band_k, band_v, page_table, barriers, buffers, pages, tiles, start,
              P: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: all tiles of K and V, two at a time, as stages come free.

    Tile i is page i of the row, or after its `pages` pages the band's tile i - pages.
    """
    k_full, k_free, v_full, v_free = barriers
    k_buffer, v_buffer = buffers
    for i in range(0, tiles, 2):
        # Where the pair i, i + 1 begins. Page numbers are read before the wait: they are there when
        # a stage comes free.
        a_in_page = i < pages
        b_in_page = i + 1 < pages
        page_a = gl.load(page_table + i, a_in_page, 0) * P
        page_b = gl.load(page_table + i + 1, b_in_page, 0) * P
        a = gl.where(a_in_page, page_a, start + (i - pages) * P)
        b = gl.where(b_in_page, page_b, start + (i + 1 - pages) * P)

        stage = i // 2 % STAGES
        phase = i // 2 // STAGES & 1
        # The first use of a stage waits for the phase before the first, which counts as complete.
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), 2 * page_k.block_type.nbytes)
        copy_tile(page_k, band_k, a, a_in_page, k_full.index(stage), k_buffer.index(2 * stage))
        copy_tile(page_k, band_k, b, b_in_page, k_full.index(stage), k_buffer.index(2 * stage + 1))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), 2 * page_v.block_type.nbytes)
        copy_tile(page_v, band_v, a, a_in_page, v_full.index(stage), v_buffer.index(2 * stage))
        copy_tile(page_v, band_v, b, b_in_page, v_full.index(stage), v_buffer.index(2 * stage + 1))


@gluon.jit
def start_scores(Q, k_buffer, stage, zero):
    """Start q.k of the two tiles of a stage: (64, P) each, not yet there."""
    s_a = warpgroup_mma(Q, k_buffer.index(2 * stage).permute((1, 0)), zero, use_acc=False,
                        is_async=True)
    s_b = warpgroup_mma(Q, k_buffer.index(2 * stage + 1).permute((1, 0)), zero, use_acc=False,
                        is_async=True)
    return s_a, s_b


@gluon.jit
def start_values(p_a, p_b, v_buffer, stage, o):
    """Start o += p.v of the two tiles of a stage."""
    o = warpgroup_mma(p_a, v_buffer.index(2 * stage), o, is_async=True)
    return warpgroup_mma(p_b, v_buffer.index(2 * stage + 1), o, is_async=True)


@gluon.jit
def mask_scores(s, i, band_g, n, pages, t, first, t0, T, W, tau, P: gl.constexpr):
    """Tile i of the scores, with MASKED for keys that the warpgroup's queries t do not see.

    first .. first + 63 are the queries t. In a page, keys past the row's n old tokens are
    masked. In the band, the definition is applied. Of its six tiles (W = 256) most lie inside the
    window of all queries, or on the diagonal: the gates, which are far away in memory, are read
    only for the one or two at the window's edge.
    """
    key = gl.arange(0, P, layout=gl.SliceLayout(0, s.type.layout))
    j0 = t0 + 1 + (i - pages) * P                           # the tile's first index in the band
    if i < pages:
        s = gl.where((key < n - i * P)[None, :], s, MASKED)
    elif (j0 < W) | (first + 63 >= j0):
        # The gates decide: ring places may be empty (g = -inf), or the tile's first key is outside
        # the last query's window.
        g = gl.load(band_g + j0 + key, j0 + key < W + T, -float("inf"))
        age = (t + W - j0)[:, None] - key[None, :]          # query's position minus key's
        visible = (age >= 0) & ((age < W) | (g >= tau)[None, :])
        s = gl.where(visible & (g > -float("inf"))[None, :], s, MASKED)
    elif j0 + P - 1 > first + W:
        # All keys are in all queries' windows, but some are newer than some queries.
        s = gl.where((t + W - j0)[:, None] >= key[None, :], s, MASKED)
    return s


@gluon.jit
def attend_warpgroup(q, band_g, out, barriers, buffers, n, pages, tiles, t0, half, T, W, tau, scale,
                     q_t, out_t, D: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    """One warpgroup: queries t0 + half .. + 63 over all tiles, two tiles at a time.

    The softmax of kernels.online_softmax, with q.k of a pair issued before p.v of the
    pair before it: so this pair's softmax, which needs only the first, runs beside the second.
    """
    k_full, k_free, v_full, v_free = barriers
    k_buffer, v_buffer = buffers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, P, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    # A layout says which thread holds which element of a tile: of the scores s, the output o, and
    # of the left factors Q and p. The queries' numbers are needed in three of them: t_q, t_s, t_o.
    first = t0 + half
    t_q = first + gl.arange(0, 64, layout=gl.SliceLayout(1, q_layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, q_layout))
    q_offsets = t_q.to(gl.int64)[:, None] * q_t + d[None, :]
    Q = gl.load(q + q_offsets, (t_q < T)[:, None], 0.)                      # (64, D)
    t_s = first + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    zero = gl.zeros([64, P], gl.float32, s_layout)
    o = gl.zeros([64, D], gl.float32, o_layout)

    # The first pair has nothing before it. Only tiles that reach past the n old tokens need a mask.
    mbarrier.wait(k_full.index(0), 0)
    s_a, s_b = start_scores(Q, k_buffer, 0, zero)
    s_a, s_b = warpgroup_mma_wait(0, (s_a, s_b))
    mbarrier.arrive(k_free.index(0))
    if n < 2 * P:
        s_a = mask_scores(s_a, 0, band_g, n, pages, t_s, first, t0, T, W, tau, P)
        s_b = mask_scores(s_b, 1, band_g, n, pages, t_s, first, t0, T, W, tau, P)
    # Scores are scaled inside exp2, where that is one instruction with the subtraction. p_a and p_b
    # (64, P) are the weights, laid out as left factors of p.v.
    m = gl.maximum(gl.max(gl.maximum(s_a, s_b), 1), INITIAL_MAX)
    s_a = gl.exp2(s_a * scale - (m * scale)[:, None])
    s_b = gl.exp2(s_b * scale - (m * scale)[:, None])
    l = gl.sum(s_a + s_b, 1)
    p_a = gl.convert_layout(s_a.to(Q.dtype), p_layout)
    p_b = gl.convert_layout(s_b.to(Q.dtype), p_layout)

    for i in range(2, tiles, 2):
        stage = i // 2 % STAGES
        previous = (i // 2 - 1) % STAGES
        # Start q.k of this pair, and behind it p.v of the pair before.
        mbarrier.wait(k_full.index(stage), i // 2 // STAGES & 1)
        s_a, s_b = start_scores(Q, k_buffer, stage, zero)
        mbarrier.wait(v_full.index(previous), (i // 2 - 1) // STAGES & 1)
        o = start_values(p_a, p_b, v_buffer, previous, o)
        s_a, s_b = warpgroup_mma_wait(2, (s_a, s_b))    # all but the two newest, p.v: q.k is done
        mbarrier.arrive(k_free.index(stage))
        if i * P + 2 * P > n:
            s_a = mask_scores(s_a, i, band_g, n, pages, t_s, first, t0, T, W, tau, P)
            s_b = mask_scores(s_b, i + 1, band_g, n, pages, t_s, first, t0, T, W, tau, P)
        # This pair's softmax, while p.v is still running. (So it is written. The assembler of CUDA
        # 12.8 moves the wait below up to here, and forcing it down made it no faster: see
        # BENCHMARKS.md, "What bounds it". It is the other warpgroup that fills the gap.)
        m_new = gl.maximum(m, gl.max(gl.maximum(s_a, s_b), 1))
        s_a = gl.exp2(s_a * scale - (m_new * scale)[:, None])
        s_b = gl.exp2(s_b * scale - (m_new * scale)[:, None])
        rescale = gl.exp2((m - m_new) * scale)
        l = l * rescale + gl.sum(s_a + s_b, 1)
        m = m_new
        # p.v is done: its stage is free, and o can be rescaled to the new maximum.
        o, p_a, p_b = warpgroup_mma_wait(0, (o, p_a, p_b))
        mbarrier.arrive(v_free.index(previous))
        o = o * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
        p_a = gl.convert_layout(s_a.to(Q.dtype), p_layout)
        p_b = gl.convert_layout(s_b.to(Q.dtype), p_layout)

    # p.v of the last pair.
    last = (tiles // 2 - 1) % STAGES
    mbarrier.wait(v_full.index(last), (tiles // 2 - 1) // STAGES & 1)
    o = start_values(p_a, p_b, v_buffer, last, o)
    o = warpgroup_mma_wait(0, (o,)) / gl.convert_layout(l, gl.SliceLayout(1, o_layout))[:, None]
    t_o = first + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    d_o = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    out_offsets = t_o.to(gl.int64)[:, None] * out_t + d_o[None, :]
    gl.store(out + out_offsets, o.to(Q.dtype), (t_o < T)[:, None])


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau, scale,
                   T, W, columns, Hq, q_b, q_h, q_t, out_b, out_h, out_t, G: gl.constexpr,
                   D: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    """One program: 128 queries of one query head; grid, pointers and masks as in kernels.py.

    Tiles come in pairs, so there may be one past the band's end: nothing of it is visible.
    """
    t0 = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    b = (gl.program_id(0) // Hq).to(gl.int64)
    h = (gl.program_id(0) % Hq).to(gl.int64)
    row = b * (Hq // G) + h // G
    n = gl.load(num_old + row * T + t0).to(gl.int32)
    pages = (n + P - 1) // P
    # The band from index t0 + 1 to min(t0 + 128, T) - 1 + W, in tiles of P.
    tiles = pages + (gl.minimum(t0 + 128, T) - t0 + W + P - 2) // P
    tiles += tiles % 2

    k_buffer = gl.allocate_shared_memory(page_k.dtype, [2 * STAGES, P, D], page_k.layout)
    v_buffer = gl.allocate_shared_memory(page_v.dtype, [2 * STAGES, P, D], page_v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)         # one copying warp
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)         # two warpgroups
        mbarrier.init(v_free.index(i), count=2)

    barriers = (k_full, k_free, v_full, v_free)
    buffers = (k_buffer, v_buffer)
    q += b * q_b + h * q_h
    out += b * out_b + h * out_h
    band_g += row * (W + T)
    page_table += row * columns
    start = (row * (W + T)).to(gl.int32) + t0 + 1
    # The first function runs on this program's own 4 warps, the others on 4 and 1 warps more, with
    # 240 and 24 registers a thread.
    gl.warp_specialize([
        (attend_warpgroup, (q, band_g, out, barriers, buffers, n, pages, tiles, t0, 0, T, W, tau,
                            scale, q_t, out_t, D, P, STAGES)),
        (attend_warpgroup, (q, band_g, out, barriers, buffers, n, pages, tiles, t0, 64, T, W, tau,
                            scale, q_t, out_t, D, P, STAGES)),
        (copy_warp, (page_k, page_v, band_k, band_v, page_table, barriers, buffers, pages, tiles,
                     start, P, STAGES)),
    ], [4, 1], [240, 24])


def prefill_attention(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, window,
                      tau):
    """Write kernels.prefill_attention's result to out (B, Hq, T, D); D 64 or 128, 16-bit types."""
    B, Hq, T, D = q.shape
    Hkv = band_g.shape[1]
    P = page_k.shape[1]
    # Of any 16-bit type.
    layout = gl.NVMMASharedLayout.get_default_for([P, D], gl.bfloat16)
    described = [TensorDescriptor.from_tensor(x.view(-1, D), [P, D], layout)
                 for x in (band_k, band_v, page_k, page_v)]
    band_k, band_v, page_k, page_v = described
    prefill_kernel[(B * Hq, triton.cdiv(T, 128))](
        q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau,
        1 / math.sqrt(D) / math.log(2), T, window, page_table.stride(1), Hq, *q.stride()[:3],
        *out.stride()[:3], G=Hq // Hkv, D=D, P=P, STAGES=2, maxnreg=168, num_warps=4)
