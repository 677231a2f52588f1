"""hopper.py's prefill kernel with switches, for experiments/prefill_variants.py only.

hopper.py's source computes a pair's softmax between the start of p.v and the wait for it. The
machine code does not: ptxas (CUDA 12.8, in Triton 3.6) moves the wait to the top of its basic
block, before the softmax. So no warpgroup's softmax overlaps with its own p.v, and all overlap is
with the other warpgroup, by chance. The switches, each alone or with others:

    ORDER       a wait at an mbarrier (a loop, so a new basic block) between softmax and the wait
                for p.v. It keeps the two in order. We wait for the next pair's K there, which must
                be waited for anyway. q.k of the next pair then starts before o is rescaled.
    TURNS       the warpgroups take turns at the tensor cores (FlashAttention-3's ping-pong): each
                starts q.k and p.v, then hands the turn to the other and computes its softmax.
    SPLIT       whole pages, which need no mask, have a loop of their own: fewer registers there.
    programs    of the launch. One per block of queries and head, as in hopper.py; or one per SM
                (persistent): the copying warp then runs ahead into the next block's tiles, and the
                next Q is loaded while this block's output is written.
"""
import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# As in kernels.py.
UNSPECIALIZED = ["T", "W", "columns", "heads", "Hq"]
INITIAL_MAX = gl.constexpr(-1e30)
MASKED = gl.constexpr(-2e30)


@gluon.jit
def locate(round, num_old, T, heads, Hq, G: gl.constexpr):
    """Where this program works in a round: (sequence and head, row, first query t0, n old tokens).

    There are `heads` query heads, those of all sequences. Items are numbered from the longest: the
    last block of queries of all heads, then the block before. Programs go through a round's items
    forward, then backward, ..., for even sums. Past the last item (asked for only to load ahead) it
    is the last item again.
    """
    programs = gl.num_programs(0)
    item = gl.program_id(0)
    if round % 2 == 1:
        item = programs - 1 - item
    blocks = (T + 127) // 128
    item = gl.minimum(item + round * programs, heads * blocks - 1)
    t0 = (blocks - 1 - item // heads) * 128
    bh = item % heads
    row = bh // Hq * (Hq // G) + bh % Hq // G
    n = gl.load(num_old + row.to(gl.int64) * T + t0).to(gl.int32)
    return bh, row, t0, n


@gluon.jit
def count_rounds(T, heads):
    """Items of this program."""
    programs = gl.num_programs(0)
    items = heads * ((T + 127) // 128)
    full = items // programs
    place = gl.program_id(0)
    if full % 2 == 1:
        place = programs - 1 - place
    return full + (place < items % programs).to(gl.int32)


@gluon.jit
def count_tiles(n, t0, T, W, P: gl.constexpr):
    """(pages, tiles): tiles of pages and band, an even number."""
    pages = (n + P - 1) // P
    tiles = pages + (gl.minimum(t0 + 128, T) - t0 + W + P - 2) // P
    return pages, tiles + tiles % 2


@gluon.jit
def copy_pair(page, band, full, buffer, stage, page_a, page_b, band_a, band_b, kinds,
              P: gl.constexpr):
    """Start the copies of two tiles into a stage; kinds: how many of them are pages."""
    mbarrier.expect(full.index(stage), 2 * page.block_type.nbytes)
    a = buffer.index(stage * 2)
    b = buffer.index(stage * 2 + 1)
    if kinds > 0:
        tma.async_copy_global_to_shared(page, [page_a, 0], full.index(stage), a)
    else:
        tma.async_copy_global_to_shared(band, [band_a, 0], full.index(stage), a)
    if kinds > 1:
        tma.async_copy_global_to_shared(page, [page_b, 0], full.index(stage), b)
    else:
        tma.async_copy_global_to_shared(band, [band_b, 0], full.index(stage), b)


@gluon.jit
def copy_warp(page_k, page_v, band_k, band_v, page_table, num_old, barriers, buffers, T, W, columns,
              heads, Hq, G: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    k_full, k_free, v_full, v_free, turns = barriers
    k_buffer, v_buffer = buffers
    done = 0
    rounds = count_rounds(T, heads)
    bh, row, t0, n = locate(0, num_old, T, heads, Hq, G)
    for round in range(rounds):
        bh, next_row, next_t0, next_n = locate(round + 1, num_old, T, heads, Hq, G)
        pages, tiles = count_tiles(n, t0, T, W, P)
        table = page_table + row.to(gl.int64) * columns
        start = row * (W + T) + t0 + 1
        for i in range(0, tiles, 2):
            kinds = gl.maximum(gl.minimum(pages - i, 2), 0)
            # Both loads before the wait: they are ready when a stage is.
            page_a = gl.load(table + i, kinds > 0, 0) * P
            page_b = gl.load(table + i + 1, kinds > 1, 0) * P
            band_a = start + (i - pages) * P
            use = done + i // 2
            stage = use % STAGES
            phase = use // STAGES & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            copy_pair(page_k, band_k, k_full, k_buffer, stage, page_a, page_b, band_a, band_a + P,
                      kinds, P)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            copy_pair(page_v, band_v, v_full, v_buffer, stage, page_a, page_b, band_a, band_a + P,
                      kinds, P)
        done += tiles // 2
        row = next_row
        t0 = next_t0
        n = next_n


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
def attend_pair(i, Q, o, p_a, p_b, m, l, rescale, done, taken, gates, barriers, buffers, n, pages,
                tiles, t_s, first, t0, mine, T, W, tau, scale, P: gl.constexpr,
                STAGES: gl.constexpr, ORDER: gl.constexpr, TURNS: gl.constexpr, MASK: gl.constexpr):
    """q.k of pair i, i + 1 and p.v of the pair before; then the pair's softmax."""
    k_full, k_free, v_full, v_free, turns = barriers
    k_buffer, v_buffer = buffers
    m_o_layout: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    p_layout: gl.constexpr = p_a.type.layout
    s_layout: gl.constexpr = Q.type.layout.parent
    zero = gl.zeros([64, P], gl.float32, s_layout)
    use = done + i // 2
    stage = use % STAGES
    previous = (use - 1) % STAGES
    if not ORDER:
        mbarrier.wait(k_full.index(stage), use // STAGES & 1)
    if TURNS:
        mbarrier.wait(turns.index(mine), (taken + 1 - mine) & 1)
    s_a, s_b = start_scores(Q, k_buffer, stage, zero)
    if ORDER:
        o = o * gl.convert_layout(rescale, m_o_layout)[:, None]
    mbarrier.wait(v_full.index(previous), (use - 1) // STAGES & 1)
    o = start_values(p_a, p_b, v_buffer, previous, o)
    if TURNS:
        mbarrier.arrive(turns.index(1 - mine))
        taken += 1
    s_a, s_b = warpgroup_mma_wait(2, (s_a, s_b))
    mbarrier.arrive(k_free.index(stage))
    if MASK:
        if i * P + 2 * P > n:
            s_a = mask_scores(s_a, i, gates, n, pages, t_s, first, t0, T, W, tau, P)
            s_b = mask_scores(s_b, i + 1, gates, n, pages, t_s, first, t0, T, W, tau, P)
    m_new = gl.maximum(m, gl.max(gl.maximum(s_a, s_b), 1))
    s_a = gl.exp2(s_a * scale - (m_new * scale)[:, None])
    s_b = gl.exp2(s_b * scale - (m_new * scale)[:, None])
    rescale = gl.exp2((m - m_new) * scale)
    l = l * rescale + gl.sum(s_a + s_b, 1)
    m = m_new
    if ORDER:
        p_new_a = gl.convert_layout(s_a.to(Q.dtype), p_layout)
        p_new_b = gl.convert_layout(s_b.to(Q.dtype), p_layout)
        mbarrier.wait(k_full.index((use + 1) % STAGES), (use + 1) // STAGES & 1,
                      pred=i + 2 < tiles)
        o, p_a, p_b = warpgroup_mma_wait(0, (o, p_a, p_b))
        mbarrier.arrive(v_free.index(previous))
        p_a = p_new_a
        p_b = p_new_b
    else:
        o, p_a, p_b = warpgroup_mma_wait(0, (o, p_a, p_b))
        mbarrier.arrive(v_free.index(previous))
        o = o * gl.convert_layout(rescale, m_o_layout)[:, None]
        p_a = gl.convert_layout(s_a.to(Q.dtype), p_layout)
        p_b = gl.convert_layout(s_b.to(Q.dtype), p_layout)
    return o, p_a, p_b, m, l, rescale, taken


@gluon.jit
def load_q(q, bh, t0, half, T, Hq, q_b, q_h, q_t, D: gl.constexpr, layout: gl.constexpr):
    """Q (64, D) of a warpgroup."""
    t = t0 + half + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    q += (bh // Hq).to(gl.int64) * q_b + (bh % Hq).to(gl.int64) * q_h
    return gl.load(q + t.to(gl.int64)[:, None] * q_t + d[None, :], (t < T)[:, None], 0.)


@gluon.jit
def attend_warpgroup(q, band_g, num_old, out, barriers, buffers, half, T, W, heads, Hq, tau, scale,
                     q_b, q_h, q_t, out_b, out_h, out_t, G: gl.constexpr, D: gl.constexpr,
                     P: gl.constexpr, STAGES: gl.constexpr, ORDER: gl.constexpr,
                     TURNS: gl.constexpr, SPLIT: gl.constexpr):
    k_full, k_free, v_full, v_free, turns = barriers
    k_buffer, v_buffer = buffers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, P, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    m_o_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([64, P], gl.float32, s_layout)
    mine = half // 64
    done = 0                # pairs of tiles of the items before
    taken = 0               # turns
    rounds = count_rounds(T, heads)
    bh, row, t0, n = locate(0, num_old, T, heads, Hq, G)
    Q = load_q(q, bh, t0, half, T, Hq, q_b, q_h, q_t, D, q_layout)
    for round in range(rounds):
        next_bh, next_row, next_t0, next_n = locate(round + 1, num_old, T, heads, Hq, G)
        pages, tiles = count_tiles(n, t0, T, W, P)
        gates = band_g + row.to(gl.int64) * (W + T)
        first = t0 + half
        t_s = first + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o = gl.zeros([64, D], gl.float32, o_layout)

        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), done // STAGES & 1)
        s_a, s_b = start_scores(Q, k_buffer, stage, zero)
        s_a, s_b = warpgroup_mma_wait(0, (s_a, s_b))
        mbarrier.arrive(k_free.index(stage))
        if n < 2 * P:
            s_a = mask_scores(s_a, 0, gates, n, pages, t_s, first, t0, T, W, tau, P)
            s_b = mask_scores(s_b, 1, gates, n, pages, t_s, first, t0, T, W, tau, P)
        m = gl.maximum(gl.max(gl.maximum(s_a, s_b), 1), INITIAL_MAX)
        s_a = gl.exp2(s_a * scale - (m * scale)[:, None])
        s_b = gl.exp2(s_b * scale - (m * scale)[:, None])
        l = gl.sum(s_a + s_b, 1)
        p_a = gl.convert_layout(s_a.to(Q.dtype), p_layout)
        p_b = gl.convert_layout(s_b.to(Q.dtype), p_layout)
        rescale = gl.full([64], 1., gl.float32, gl.SliceLayout(1, s_layout))
        if ORDER:
            mbarrier.wait(k_full.index((done + 1) % STAGES), (done + 1) // STAGES & 1,
                          pred=tiles > 2)

        # Whole pages need no mask.
        unmasked = gl.maximum(n // (2 * P) * 2, 2) if SPLIT else 2
        if SPLIT:
            for i in range(2, unmasked, 2):
                o, p_a, p_b, m, l, rescale, taken = attend_pair(
                    i, Q, o, p_a, p_b, m, l, rescale, done, taken, gates, barriers, buffers, n,
                    pages, tiles, t_s, first, t0, mine, T, W, tau, scale, P, STAGES, ORDER, TURNS,
                    False)
        for i in range(unmasked, tiles, 2):
            o, p_a, p_b, m, l, rescale, taken = attend_pair(
                i, Q, o, p_a, p_b, m, l, rescale, done, taken, gates, barriers, buffers, n, pages,
                tiles, t_s, first, t0, mine, T, W, tau, scale, P, STAGES, ORDER, TURNS, True)

        if ORDER:
            o = o * gl.convert_layout(rescale, m_o_layout)[:, None]
        use = done + tiles // 2 - 1
        mbarrier.wait(v_full.index(use % STAGES), use // STAGES & 1)
        o = start_values(p_a, p_b, v_buffer, use % STAGES, o)
        Q = load_q(q, next_bh, next_t0, half, T, Hq, q_b, q_h, q_t, D, q_layout)
        o = warpgroup_mma_wait(0, (o,))
        mbarrier.arrive(v_free.index(use % STAGES))
        o = o / gl.convert_layout(l, m_o_layout)[:, None]
        t_o = first + gl.arange(0, 64, layout=m_o_layout)
        d_o = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
        block = out + (bh // Hq).to(gl.int64) * out_b + (bh % Hq).to(gl.int64) * out_h
        gl.store(block + t_o.to(gl.int64)[:, None] * out_t + d_o[None, :], o.to(Q.dtype),
                 (t_o < T)[:, None])
        done += tiles // 2
        bh = next_bh
        row = next_row
        t0 = next_t0
        n = next_n


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau, scale,
                   T, W, columns, heads, Hq, q_b, q_h, q_t, out_b, out_h, out_t, G: gl.constexpr,
                   D: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, ORDER: gl.constexpr,
                   TURNS: gl.constexpr, SPLIT: gl.constexpr):
    k_buffer = gl.allocate_shared_memory(page_k.dtype, [2 * STAGES, P, D], page_k.layout)
    v_buffer = gl.allocate_shared_memory(page_v.dtype, [2 * STAGES, P, D], page_v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    barriers = (k_full, k_free, v_full, v_free, turns)
    buffers = (k_buffer, v_buffer)
    gl.warp_specialize([
        (attend_warpgroup, (q, band_g, num_old, out, barriers, buffers, 0, T, W, heads, Hq, tau,
                            scale, q_b, q_h, q_t, out_b, out_h, out_t, G, D, P, STAGES,
                            ORDER, TURNS, SPLIT)),
        (attend_warpgroup, (q, band_g, num_old, out, barriers, buffers, 64, T, W, heads, Hq, tau,
                            scale, q_b, q_h, q_t, out_b, out_h, out_t, G, D, P, STAGES,
                            ORDER, TURNS, SPLIT)),
        (copy_warp, (page_k, page_v, band_k, band_v, page_table, num_old, barriers, buffers, T, W,
                     columns, heads, Hq, G, P, STAGES)),
    ], [4, 1], [240, 24])


# What switches each variant sets. persistent: one program an SM, else one an item.
VARIANTS = dict(
    same=dict(ORDER=False, TURNS=False, SPLIT=False, persistent=False),
    order=dict(ORDER=True, TURNS=False, SPLIT=False, persistent=False),
    turns=dict(ORDER=True, TURNS=True, SPLIT=False, persistent=False),
    persistent=dict(ORDER=True, TURNS=False, SPLIT=False, persistent=True),
    split=dict(ORDER=True, TURNS=False, SPLIT=True, persistent=True),
    all=dict(ORDER=True, TURNS=True, SPLIT=True, persistent=True),
)


def prefill_attention(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, window, tau,
                      variant, out=None):
    """As kernels.prefill_attention, by a variant."""
    B, Hq, T, D = q.shape
    Hkv = band_g.shape[1]
    P = page_k.shape[1]
    if out is None:
        out = q.new_empty(B, T, Hq, D).transpose(1, 2)
    switches = dict(VARIANTS[variant])
    persistent = switches.pop("persistent")
    layout = gl.NVMMASharedLayout.get_default_for([P, D], gl.bfloat16)
    band_k, band_v, page_k, page_v = (TensorDescriptor.from_tensor(x.view(-1, D), [P, D], layout)
                                      for x in (band_k, band_v, page_k, page_v))
    programs = B * Hq * triton.cdiv(T, 128)
    if persistent:
        programs = min(programs, torch.cuda.get_device_properties(q.device).multi_processor_count)
    prefill_kernel[(programs,)](
        q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau,
        1 / math.sqrt(D) / math.log(2), T, window, page_table.stride(1), B * Hq, Hq,
        *q.stride()[:3], *out.stride()[:3], G=Hq // Hkv, D=D, P=P, STAGES=2, **switches,
        maxnreg=168, num_warps=4)
    return out
