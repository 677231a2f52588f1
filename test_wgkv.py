"""The proofs: each fast path equals the definition, any split of a text equals one call, and no bad input gets through.

    pytest                        all of it, some minutes on two CPU cores (parity tests skip without transformers)
    pytest -k transformers        our Llama against transformers, family by family

In order: the cache, the gates, training (against `visible` and `dense_attention`), kernels, the model and its loader,
the page, the programs. Each docstring names the bug that its test is there to catch.
"""
import base64
import functools
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")    # before triton is imported

import generate
import wgkv
from common import UserError
from model import Config, Llama, rotate
from wgkv import (MIN_GATE, P, DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, sparsity_loss,
                  dense_attention, visible_mask)

torch.set_num_threads(1)                   # most things here are small: threads would only wait for each other
TAU, CPU = 0.1, torch.device("cpu")
RATES = (0, 0.03, 0.3, 0.9, 1)


# ----------------------------------------------------------------------------- helpers: the definition, and a feeder

class Replay:
    """An admission that replays gates (L, B, Hkv, S) by position; padding gets 1, so that remembering it is noticed."""

    def __init__(self, g, window, tau=TAU):
        self.g, self.window, self.tau = F.pad(g, (0, 1), value=1.0), window, tau

    def gate(self, layer, k, k_rotated, positions):
        g = self.g[layer]
        return g.gather(2, positions.clamp(max=g.shape[2] - 1)[:, None].expand(g.shape[0], g.shape[1], -1))


class Definition:
    """The `kv` of one call that computes dense attention under the definition."""

    def __init__(self, admission, batch=1):
        self.admission = admission
        self.num_tokens = torch.zeros(batch, dtype=torch.long)

    def begin(self, T, lengths=None):
        self.positions = torch.arange(T, device=self.num_tokens.device).expand(len(self.num_tokens), T)
        return self.positions

    def attend(self, layer, q, k, v, cos, sin):
        q, k_rotated = rotate(q, cos, sin), rotate(k, cos, sin)
        g = self.admission.gate(layer, k, k_rotated, self.positions)
        return dense_attention(q, k_rotated, v, visible_mask(g, self.admission.window, self.admission.tau))

    def end(self):
        pass


def bare(L=2, Hkv=2, D=16):
    """As much of a model as a cache asks for."""
    config = SimpleNamespace(num_layers=L, num_kv_heads=Hkv, head_dim=D)
    return SimpleNamespace(config=config, device=torch.get_default_device(), dtype=torch.float32)


def small_llama(seed=0, **settings):
    torch.manual_seed(seed)
    model = Llama(Config(**{**dict(vocab_size=50, hidden_size=48, intermediate_size=64, num_layers=3, num_heads=6,
                                   num_kv_heads=2, head_dim=16), **settings}))
    for layer in model.layers:
        layer.qkv.weight.data *= 3                                 # so that attention is not the same everywhere
    return model.eval().requires_grad_(False)


def random_gates(L, B, Hkv, S, rate):
    """Of which `rate` are admitted. A half sits as near to tau as fp32 can: on it if admitted, just below if not."""
    tau = torch.tensor(TAU)
    admitted, edge, u = torch.rand(3, L, B, Hkv, S)
    high, low = torch.where(edge < 0.5, tau, tau + 0.9 * u), torch.where(edge < 0.5, tau.nextafter(0 * tau), 0.09 * u)
    return torch.where(admitted < rate, high, low)


def random_qkv(L, B, Hkv, S, G=1, D=16):
    return [torch.randn(L, B, heads, S, D) * scale for heads, scale in ((Hkv * G, 2), (Hkv, 1), (Hkv, 1))]


def angles(positions, D):
    a = positions[:, None, :, None] * 0.7 ** (torch.arange(D) % ((D + 1) // 2))         # a head's halves turn alike
    return a.cos(), a.sin()


def feed(cache, qkv, plan):
    """Give a cache its next tokens out of qkv; a plan has, for each call, each sequence's number of new tokens.

    Returns the outputs (L, B, Hq, S, D) in the places of their tokens, infinity elsewhere. Padding is 1e4.
    """
    out = torch.full_like(qkv[0], math.inf)
    for new in plan:
        T, spans = max(1, *new), [(b, at, at + n) for b, (at, n) in enumerate(zip(cache.num_tokens.tolist(), new))]
        cos, sin = angles(cache.begin(T, None if min(new) == T else torch.tensor(new)), out.shape[-1])
        for layer in range(len(out)):
            parts = [x.new_full((*x.shape[1:3], T, x.shape[4]), 1e4) for x in qkv]
            for (part, x), (b, a, z) in itertools.product(zip(parts, qkv), spans):
                part[b, :, :z - a] = x[layer, b, :, a:z]
            y = cache.attend(layer, *parts, cos, sin)
            for b, a, z in spans:
                out[layer, b, :, a:z] = y[b, :, :z - a]
        cache.end()
    return out


def expected(qkv, g, window):
    return feed(Definition(Replay(g, window), g.shape[1]), qkv, [[g.shape[3]] * g.shape[1]])


def equal(got, want, what="", tolerance=1e-5):
    """Equal to rounding wherever `got` was computed; a NaN is no equal."""
    error = (got - want)[got != math.inf].abs()
    assert (error < tolerance).all(), f"{what}: off by {error.max():.2g}"


def splits(S, rng):
    """Four ways to cut S tokens into calls: whole, in chunks, one by one, and as two turns with single tokens."""
    chunks, turns = [], [n for n in (S // 2, *[1] * (S // 8), S // 4) if n]
    while sum(chunks) < S:
        chunks.append(min(rng.randint(1, 1 + S // 3), S - sum(chunks)))
    return [S], chunks, [1] * S, turns + [1] * (S - sum(turns))


def ragged(lengths, rng):
    """A plan that brings each sequence to its length, in calls where some have nothing and others much."""
    left, plan = list(lengths), []
    while any(left):
        most = rng.choice((1, 1, 5, 40))
        plan.append([rng.choice((0, min(n, rng.randint(0, most)), min(n, most))) for n in left])
        left = [n - new for n, new in zip(left, plan[-1])]
    return plan


def check_pages(cache):
    """Every page is held once or free once, and page 0 is neither."""
    held = []
    for table, count in zip(cache.page_table.flatten(0, 2).tolist(), cache.counts.flatten().tolist()):
        held += table[:cache.R - (-count // P)]
    free = cache.pool.free[:int(cache.pool.num_free)].tolist()
    assert sorted(held + free) == list(range(1, len(cache.pool.k))), f"held {held}, free {free}"


def memory_of(cache, b):
    """Everything a DualCache has of one sequence, as a list of tensors."""
    found = [cache.num_tokens[b].clone(), cache.counts[:, b].clone()]
    for table, count in zip(cache.page_table[:, b].flatten(0, 1), cache.counts[:, b].flatten().tolist()):
        pages = table[:cache.R - (-count // P)].clone()
        found += [pages, *(x[pages.long()] for x in (cache.pool.k, cache.pool.v, cache.pool.g, cache.pool.pos))]
    return found


def refused(call, *words):
    """The call raises a UserError of one line that has these words in it."""
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), f"{words} not all in: {e.value}"


@pytest.fixture
def card():
    """A test that asks for this runs on a GPU, and so through the kernels, if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------- the contract

def test_visible():
    """The definition itself: a window of W that includes the query's own token, and >= at tau in fp32."""
    on = torch.tensor(TAU)
    below = on.nextafter(0 * on)
    rows = visible_mask(torch.stack((on, below, on, below, below))[None, None], 2, TAU)[0, 0].int().tolist()
    assert rows == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]


@pytest.mark.parametrize("window", (1, 4, 17, 64, 128))
def test_any_split_equals_the_definition(window, card):
    """The contract for the cache alone: a wrong slot, count, page or edge of the window, in any split into calls."""
    torch.manual_seed(window)
    rng, shapes = random.Random(window), itertools.cycle([(1, 16), (3, 80), (4, 32), (7, 15), (3, 17)])
    for S in sorted({1, 2, max(1, window - 1), window, window + 1, window + P + 2}):
        for rate, (G, D) in zip(RATES, shapes):
            qkv, g = random_qkv(2, 1, 2, S, G, D), random_gates(2, 1, 2, S, rate)
            want = expected(qkv, g, window)
            for plan in splits(S, rng):
                what = f"S {S}, rate {rate}, G {G}, D {D}, {plan[:3]}"
                cache = DualCache(bare(2, 2, D), Replay(g, window))
                equal(feed(cache, qkv, [[n] for n in plan]), want, what)
                assert torch.equal(cache.admitted(), (g[:, 0] >= TAU).cpu()), what


@pytest.mark.parametrize("S", (255, 256, 257, 513, 1100))
def test_long_inputs(S, card):
    """The edges of banded_attention's blocks of 256 queries, alone and behind a prefix, and many pages."""
    torch.manual_seed(S)
    for window, rate in ((4, 0.9), (64, 0.3), (300, 1)):
        qkv, g = random_qkv(2, 1, 2, S + 70, 2), random_gates(2, 1, 2, S + 70, rate)
        want = expected(qkv, g, window)
        for plan in ([70, S], [S, 69, 1], [S - 9] + [1] * 79):
            got = feed(DualCache(bare(), Replay(g, window)), qkv, [[n] for n in plan])
            equal(got, want, f"W {window}, rate {rate}, plan {plan[:3]}")


@pytest.mark.parametrize("n", (P - 1, P, P + 1, 2 * P))
def test_page_edges(n, card):
    """A page that is just not full, just full, or one token over, filled by one call, by single tokens, by both."""
    torch.manual_seed(n)
    qkv, g = random_qkv(2, 1, 2, n + 9), random_gates(2, 1, 2, n + 9, 0)
    g[:, :, 0, :n], g[:, :, 1, 1:n:2] = 1, 1        # one head admits n in a row, the other every second of them
    for plan in ([n + 4, 1, 4], [1] * (n + 9), [n + 3, 1, 1, 1, 1, 1, 1], [n + 5, 4], [5, n - 2, 1, 5]):
        cache = DualCache(bare(), Replay(g, 4))
        equal(feed(cache, qkv, [[m] for m in plan]), expected(qkv, g, 4), f"plan {plan[:4]}")
        assert cache.counts[1].tolist() == [[n, n // 2]]
        check_pages(cache)


@pytest.mark.parametrize("rate", RATES)
def test_whole_model(rate, card):
    """The contract end to end: layers that mix, positions that advance twice, a rotation at the wrong position."""
    torch.manual_seed(1000 + int(100 * rate))
    rng, model = random.Random(rate), small_llama()
    for S, window in ((1, 4), (40, 17), (300, 64)):
        tokens, admission = torch.randint(50, (2, S)), Replay(random_gates(3, 2, 2, S, rate), window)
        want = model(tokens, Definition(admission, 2))
        for plan in splits(S, rng):
            cache = DualCache(model, admission, 2)
            got = torch.cat([model(part, cache) for part in tokens.split(plan, 1)], 1)
            equal(got, want, f"S {S}, W {window}, plan {plan[:3]}")
        cache = DualCache(model, admission, 2)
        equal(model(tokens, cache, torch.tensor([S, S // 3]))[1, :S // 3], want[1, :S // 3], "padded")
        equal(model(tokens[:, S // 3:], cache, torch.tensor([0, S - S // 3]))[1], want[1, S // 3:], "second turn")


def test_gates_in_the_model(card):
    """Gates that are given the wrong keys; a tau of 0 that is taken for none; a student that is not the cache."""
    torch.manual_seed(13)
    model, gates = small_llama(), random_gate_parameters(3, 2, 16, window=9, tau=0.5)
    tokens = torch.randint(50, (2, 120))
    want = model(tokens, Definition(gates, 2))
    for plan in splits(120, random.Random(13)):
        cache = DualCache(model, gates, 2)
        equal(torch.cat([model(part, cache) for part in tokens.split(plan, 1)], 1), want, f"plan {plan[:3]}")
    assert 0.1 < cache.admitted(1).float().mean() < 0.9 and (cache.window, cache.tau) == (9, 0.5)
    equal(model(tokens, SoftAttention(gates, tokens.device, hard=True)), want, "hard student")
    equal(model(tokens, DualCache(model, gates, 2, window=3, tau=0)), model(tokens), "tau 0")


def test_nothing_unwritten_is_read(card):
    """Memory that holds no token and gets weight: ring slots, pages and places in pages that were never written."""
    torch.manual_seed(6)
    qkv, g = random_qkv(2, 2, 2, 150), random_gates(2, 2, 2, 150, 0.7)
    want, plans = expected(qkv, g, 32), ([[1, 1]] * 9 + [[141, 141]], ragged([150, 90], random.Random(6)))
    for poison, plan in itertools.product((1e30, -1e30), plans):
        cache = DualCache(bare(), Replay(g, 32), 2)
        cache.pool.grow(40)
        for x in (cache.pool.k, cache.pool.v):
            x.fill_(poison)                        # finite: a masked place is multiplied by a weight of 0
        equal(feed(cache, qkv, plan), want, f"poison {poison}")


# --------------------------------------------------------------------------------------------------- rows and batches

@pytest.mark.parametrize("seed", range(4))
def test_a_row_of_a_batch_equals_the_sequence_alone(seed, card):
    """Rows that mix: padding that is remembered, a neighbour's count or tokens, a pause that advances a sequence."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lengths = [200, *rng.sample((0, 1, 16, 18, 130, 150), 3)]
    qkv, g = random_qkv(2, 4, 2, 200, 3), random_gates(2, 4, 2, 200, rng.choice(RATES[1:]))
    g[0, 0, 0], g[0, 0, 1], g[1, 0, 0], g[1, 0, 1] = 1, 0, 0, 1                      # uneven heads: all, and none
    dual, dense, plan = DualCache(bare(), Replay(g, 17), 4), DenseCache(bare(), 4), ragged(lengths, rng)
    got_dual, got_dense = feed(dual, qkv, plan), feed(dense, qkv, plan)
    assert dual.num_tokens.tolist() == dense.num_tokens.tolist() == lengths
    assert dual.counts[:, 0].tolist() == [[183, 0], [0, 183]]
    check_pages(dual)
    for b, n in enumerate(lengths):
        alone, cache = [x[:, b:b + 1] for x in qkv], DualCache(bare(), Replay(g[:, b:b + 1], 17))
        plan = [[n]] if n else []
        equal(got_dual[:, b:b + 1], feed(cache, alone, plan), f"dual, lengths {lengths}")
        equal(got_dense[:, b:b + 1], feed(DenseCache(bare(), 1), alone, plan), f"dense, lengths {lengths}")
        assert torch.equal(cache.admitted(), dual.admitted(b))


def test_a_finished_sequence_rests(card):
    """A replayed decode step that writes for a finished sequence: its second turn must find everything as it was."""
    torch.manual_seed(3)
    qkv, g = random_qkv(2, 3, 2, 120, 2), random_gates(2, 3, 2, 120, 0.6)
    want, cache = expected(qkv, g, 8), DualCache(bare(), Replay(g, 8), 3)
    feed(cache, qkv, [[30, 5, 0], [1, 25, 0]])
    before = [memory_of(cache, b) for b in (1, 2)]
    for plan in ([[1, 0, 0]] * 20, [[50, 0, 0], [0, 0, 0], [1, 0, 0]]):
        equal(feed(cache, qkv, plan), want)
        for old, new in zip(before, (memory_of(cache, b) for b in (1, 2))):
            assert len(old) == len(new) and all(map(torch.equal, old, new))
    equal(feed(cache, qkv, [[1, 1, 1], [3, 60, 0], [1, 1, 1], [0, 0, 100], [1, 1, 1]]), want)
    assert cache.num_tokens.tolist() == [108, 93, 103]


# ------------------------------------------------------------------------------------------- clone, state, reset, pages

@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_clone(kind, card):
    """A clone that shares memory with its original, in either direction."""
    torch.manual_seed(4)
    one, two, g = random_qkv(2, 2, 2, 180), random_qkv(2, 2, 2, 180), random_gates(2, 2, 2, 180, 0.6)
    for a, b in zip(one, two):
        b[..., :90, :] = a[..., :90, :]                             # the same beginning, two continuations
    g = g if kind == "dual" else torch.ones_like(g)
    inputs, wants = (one, two), [expected(qkv, g, 17) for qkv in (one, two)]
    for step in (1, 9, 90):
        cache = DualCache(bare(), Replay(g, 17), 2) if kind == "dual" else DenseCache(bare(), 2)
        feed(cache, one, [[60, 60], [1, 1], [29, 29]])
        caches = cache, cache.clone()
        for _, i in itertools.product(range(0, 90, step), range(2)):    # by turns, so that each could spoil the other
            equal(feed(caches[i], inputs[i], [[step, step]]), wants[i], f"cache {i}, step {step}")


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_views_of_rows(kind, card):
    """A view that reads or writes its neighbours, or that does not see what they made grow or move."""
    torch.manual_seed(14)
    rng = random.Random(14)
    qkv, g = random_qkv(2, 4, 2, 250, 3), random_gates(2, 4, 2, 250, 0.6)
    g = g if kind == "dual" else torch.ones_like(g)
    want = expected(qkv, g, 17)
    whole = DualCache(bare(), Replay(g, 17), 4) if kind == "dual" else DenseCache(bare(), 4)
    for _ in range(40):
        first = rng.randrange(4)
        count = rng.randint(1, 4 - first)
        view = whole.rows(first, count)
        if kind == "dual":
            view.admission = Replay(g[:, first:first + count], 17)      # its rows' gates
        part = [x[:, first:first + count] for x in qkv]
        if rng.random() < 0.2:
            view.reset()
        most = rng.choice((1, 10, 100))
        plan = [[min(rng.randint(0, most), 250 - n) for n in view.num_tokens.tolist()]]
        equal(feed(view, part, plan), want[:, first:first + count], f"rows {first} + {count}, plan {plan}")
        lengths = whole.num_tokens.tolist()
        equal(feed(whole, qkv, [[min(1, 250 - n) for n in lengths]]), want, f"the whole after {first} + {count}")
        if kind == "dual":
            check_pages(whole)


def test_pages_come_back(card):
    """A reset that loses pages, or gives them back twice: after it the same input needs no new memory."""
    torch.manual_seed(5)
    qkv, g = random_qkv(2, 3, 2, 400), random_gates(2, 3, 2, 400, 0.8)
    want, cache, lengths = expected(qkv, g, 8), DualCache(bare(), Replay(g, 8), 3), (400, 300, 200)
    feed(cache, qkv, [lengths])
    reserved, resets = cache.reserved_bytes(), ((None,), (1,), (2, 0, 1), (0, 0), (None, None))
    # Room is made for the worst case, so it is the second time round that needs nothing new.
    for again, sequences in itertools.product((False, True), resets):
        for b in sequences:
            (cache if b is None else cache.rows(b)).reset()
            check_pages(cache)
        equal(feed(cache, qkv, [[n - seen for n, seen in zip(lengths, cache.num_tokens.tolist())]]), want, f"{sequences}")
        reserved = reserved if again else cache.reserved_bytes()
        assert cache.reserved_bytes() == reserved, f"after reset of {sequences}"
    cache.reset()
    assert cache.dense_bytes() == 0 == cache.num_promoted()


@pytest.mark.parametrize("seed", range(4))
def test_mixed_operations(seed, card):
    """A page that two rows hold, or none, after feeding, resets, clones and restores in any order."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    qkv, g = random_qkv(2, 3, 2, 300), random_gates(2, 3, 2, 300, 0.7)
    want, cache = expected(qkv, g, 4), DualCache(bare(), Replay(g, 4), 3)
    for step in range(60):
        operation = rng.choice(("feed", "feed", "feed", "reset", "clone"))
        if operation == "feed":
            most = rng.choice((1, 10, 100))
            plan = [[min(rng.randint(0, most), 300 - n) for n in cache.num_tokens.tolist()]]
            equal(feed(cache, qkv, plan), want, f"step {step}, plan {plan}")
        elif operation == "reset":
            b = rng.choice((0, 1, 2, None))
            (cache if b is None else cache.rows(b)).reset()
        else:
            left, cache = cache, cache.clone()
            left.reset()
        check_pages(cache)


# -------------------------------------------------------------------------------------------------------- dense, bytes

def test_dense_cache(card):
    """The baseline itself: in any split it equals plain causal attention, and so does a dual cache of everything."""
    torch.manual_seed(7)
    rng, model = random.Random(7), small_llama(7)
    for S in (1, 2, 50, 300):
        tokens = torch.randint(50, (3, S))
        for plan, everything in itertools.product(splits(S, rng), (False, True)):
            cache = DualCache(model, RandomAdmission(1.0), 3, window=17) if everything else DenseCache(model, 3)
            got = torch.cat([model(part, cache) for part in tokens.split(plan, 1)], 1)
            equal(got, model(tokens), f"S {S}, {type(cache).__name__}, plan {plan[:3]}")
    cache.reset()
    equal(model(tokens[:, :9], cache), model(tokens[:, :9]), "after reset")


def test_bytes_and_positions(card):
    """A count of bytes that misses something or counts a page twice; a page that holds other tokens, or disorder."""
    torch.manual_seed(8)
    S, W, D = (500, 260), 32, 24
    qkv, g = random_qkv(2, 2, 3, 500, 1, D), random_gates(2, 2, 3, 500, 0.4)
    cache, dense = DualCache(bare(2, 3, D), Replay(g, W), 2), DenseCache(bare(2, 3, D), 2)
    feed(cache, qkv, ragged(S, random.Random(8)))
    feed(dense, qkv, [S])
    kept = 2 * 8                                                                             # num_tokens
    pool = cache.pool
    for layer, b, h in itertools.product(range(2), range(2), range(3)):
        old = (g[layer, b, h, :S[b] - W] >= TAU).nonzero()[:, 0].tolist()
        cos, sin = angles(torch.tensor([old]), D)
        assert cache.row(pool.pos, layer, b, h).tolist() == old
        assert torch.equal(cache.row(pool.g, layer, b, h), g[layer, b, h, old])
        equal(cache.row(pool.k, layer, b, h), rotate(qkv[1][layer, b, h, old], cos[0, 0], sin[0, 0]), "keys")
        equal(cache.row(pool.v, layer, b, h), qkv[2][layer, b, h, old], "values")
        pages = 1 + math.ceil(len(old) / 64)                                                 # W = 32: a page of ring
        kept += pages * (64 * (D * 4 * 2 + 4 + 4) + 4) + 8                # K, V, gate, position; table; count
    assert cache.kept_bytes() == kept
    assert cache.dense_bytes() == dense.dense_bytes() == dense.kept_bytes() == 2 * 2 * 3 * D * 4 * sum(S)


@pytest.mark.parametrize("told", (False, True))
@pytest.mark.parametrize("rate", (0.1, 0.5, 1))
def test_reserved_stays_near_used(rate, told, card):
    """A pool that doubles: after a long prefill in chunks, reserved memory is not far above what is in use."""
    S, chunk, slot = 6000, 448, 2 * (8 * 4 * 2 + 8)                    # a slot: the bytes of a token in both heads
    cache, qkv = DualCache(bare(1, 2, 8), RandomAdmission(rate), window=64), random_qkv(1, 1, 2, S, 1, 8)
    if told:
        cache.expect(S)
    for _ in range(S // chunk):
        feed(cache, qkv, [[chunk]])
        kept, reserved = cache.kept_bytes(), cache.reserved_bytes()
        bound = kept + 0.15 * (kept - 64 * slot) + (chunk + P) * slot               # P: page 0 and tables
        assert kept <= reserved and (told or reserved <= bound)
    assert reserved <= bound


# ------------------------------------------------------------------------------------------------------------- gates

def naive_gate(k, k_rotated, *parameters):
    """One gate by the formula, for one head and one token, in float64."""
    k, k_rotated, pre, post, w1, b1, w2, b2 = (x.double() for x in (k, k_rotated, *parameters))
    x = torch.cat([x / (x.pow(2).mean() + 1e-6).sqrt() * weight for x, weight in ((k, pre), (k_rotated, post))])
    h = w1 @ x + b1
    return torch.sigmoid(w2 @ (h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))) + b2)


def random_gate_parameters(*args, **settings):
    gates = Gates(*args, **settings)
    for p in gates.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return gates


@pytest.mark.parametrize("expansion", (4.0, 1.5))
def test_gates_by_the_formula(expansion):
    """Heads or sequences mixed up in the batched product; the tanh GELU; a norm without its weight or epsilon."""
    torch.manual_seed(10)
    gates = random_gate_parameters(2, 3, 6, expansion=expansion)
    k, k_rotated = torch.randn(2, 2, 3, 5, 6) * torch.tensor([1.0, 1e-3]).view(1, 2, 1, 1, 1)
    for layer, m in enumerate(gates.layers):
        g = gates.gate(layer, k, k_rotated, None)
        assert g.shape == (2, 3, 5) and g.dtype == torch.float32
        for b, h, t in itertools.product(range(2), range(3), range(5)):
            parameters = m.pre_norm, m.post_norm, m.w1[h], m.b1[h], m.w2[h], m.b2[h]
            assert abs(g[b, h, t] - naive_gate(k[b, h, t], k_rotated[b, h, t], *parameters)) < 1e-5


def test_gate_files(tmp_path, capsys):
    """A file that loses a setting or a tensor, or fits what it does not fit; a sibling model taken silently."""
    model, sibling, path = small_llama(), small_llama(1), tmp_path / "g.safetensors"
    sibling.name = "the-sibling"
    gates = random_gate_parameters(3, 2, 16, window=33, tau=0.25, expansion=1.5)
    gates.save(path, model, lam=0.16)
    assert os.listdir(tmp_path) == ["g.safetensors"] and safe_open(path, "pt").metadata()["lam"] == "0.16"
    for reader, remarks in ((model, 0), (sibling, 1)):
        loaded = Gates.load(path, reader)
        assert (loaded.window, loaded.tau, loaded.expansion, loaded.shape) == (33, 0.25, 1.5, (3, 2, 16))
        assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), loaded.parameters(), strict=True))
        said = capsys.readouterr().err
        assert said.count("\n") == said.count("the-sibling") == remarks
    other = small_llama(num_layers=2, num_kv_heads=3)
    refused(lambda: Gates.load(path, other), "3 layers, 2 KV heads of 16", "2 layers, 3 KV heads of 16", str(path))

    tensors, meta, name = load_file(path), safe_open(path, "pt").metadata(), "layers.1.w2"
    no_window, no_tensor = ({k: v for k, v in d.items() if k not in ("window", name)} for d in (meta, tensors))
    for content, metadata, words in (
            (tensors, {**meta, "format": "0"}, "'0'"), (tensors, None, "format 1"), (tensors, no_window, "window"),
            (tensors, {**meta, "tau": "high"}, "high"), (no_tensor, meta, f"{name} is missing"),
            ({**tensors, "layers.3.w2": torch.ones(2, 24)}, meta, "layers.3.w2"),
            ({**tensors, name: torch.ones(24, 2)}, meta, f"{name} has shape (24, 2), not (2, 24)")):
        save_file(content, tmp_path / "broken", metadata)
        refused(lambda: Gates.load(tmp_path / "broken", model), "broken", words)
    for size in (0, 4, 100, os.path.getsize(path) - 1):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
        refused(lambda: Gates.load(tmp_path / "cut", model), "cut")
    refused(lambda: Gates.load(tmp_path / "absent", model), "absent")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A save that opens the final name first: half a file where a good one was."""
    model, path = small_llama(), tmp_path / "g"
    Gates.for_model(model).save(path, model)
    before = path.read_bytes()

    def full_disk(tensors, part, metadata):
        with open(part, "wb") as f:
            f.write(before[:1000])
        raise OSError("No space left on device")

    def killed(*args):
        raise KeyboardInterrupt

    faults = (wgkv, "save_file", full_disk, UserError), (os, "replace", killed, KeyboardInterrupt)
    for where, name, fault, error in faults:
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(where, name, fault)
            Gates.for_model(model).save(path, model)
        assert path.read_bytes() == before
    refused(lambda: Gates.for_model(model).save(tmp_path / "no folder" / "g", model), "no folder")


THEIRS = [f"{name}.{what}" for name, what in (("pre_key_norm", "weight"), ("post_key_norm", "weight"),
          ("conv1", "weight"), ("conv1", "bias"), ("conv2", "weight"), ("conv2", "bias"))]


def official(L, Hkv, D, E, kind=torch.Tensor):
    """A checkpoint in the layout of the authors' files."""
    shapes = (D,), (D,), (Hkv * int(E * D), 2 * D, 1), (Hkv * int(E * D),), (Hkv, int(E * D), 1), (Hkv,)
    return {f"model.layers.{i}.self_attn.g_predictors.{name}": kind(torch.randn(shape))
            for i in range(L) for name, shape in zip(THEIRS, shapes)}


@pytest.mark.parametrize("E", (4, 1.5))
def test_official_checkpoints(E, tmp_path):
    """Heads that are not consecutive groups of rows; the norms exchanged; Parameters or bf16 that do not load."""
    torch.manual_seed(11)
    model, path = small_llama(), tmp_path / "g.pt"
    for kind in (torch.Tensor.bfloat16, torch.nn.Parameter):
        file = official(3, 2, 16, E, kind)
        torch.save(file, path)
        gates = Gates.load(path, model)
        assert (gates.window, gates.tau, gates.expansion) == (256, 0.1, E)
        k, k_rotated = torch.randn(2, 1, 2, 3, 16)
        for layer, h, t in itertools.product(range(3), range(2), range(3)):
            pre, post, w1, b1, w2, b2 = (file[f"model.layers.{layer}.self_attn.g_predictors.{name}"] for name in THEIRS)
            rows = slice(h * int(E * 16), (h + 1) * int(E * 16))
            want = naive_gate(k[0, h, t], k_rotated[0, h, t], pre, post, w1[rows, :, 0], b1[rows], w2[h, :, 0], b2[h])
            assert abs(gates.gate(layer, k, k_rotated, None)[0, h, t] - want) < 1e-5


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_broken_official_checkpoints(tmp_path):
    """A pickle that runs; a missing, unknown or misshapen tensor that is taken, or ends in a traceback."""
    model, path = small_llama(), tmp_path / "g.pt"
    good, at = official(3, 2, 16, 4), "model.layers.1.self_attn.g_predictors."

    def refuse(content, *words):
        torch.save(content, path)
        refused(lambda: Gates.load(path, model), "g.pt", *words)

    refuse({**good, at + "conv1.weight": Bomb(tmp_path / "exploded")})
    assert not (tmp_path / "exploded").exists()
    refuse({n: t for n, t in good.items() if n != at + "conv2.bias"}, "layers.1.b2 is missing")
    for name in (at + "conv3.weight", "model.norm.weight", 7):
        refuse({**good, name: torch.ones(2)}, str(name))
    refuse({**good, at + "conv1.bias": 3.0}, at + "conv1.bias")
    for name, layer, shape in itertools.product(THEIRS, "01", ((128, 32, 2), (32, 128, 1), (1,), (0,), ())):
        refuse({**good, at.replace("1", layer) + name: torch.ones(shape)})
    refuse(official(2, 2, 16, 4), "2 layers, 2 KV heads of 16", "3 layers, 2 KV heads of 16")
    refuse(official(3, 4, 32, 4), "3 layers, 4 KV heads of 32", "3 layers, 2 KV heads of 16")
    for content in ({}, torch.ones(3), [good], None):
        refuse(content)
    path.write_bytes(path.read_bytes()[:50])
    refused(lambda: Gates.load(path, model), "g.pt")


# ------------------------------------------------------------------------------------------------- random admission

@pytest.mark.parametrize("share", (0.0, 0.25, 1.0))
def test_random_admission(share):
    """A hash that is not fair, or the same for two heads, layers or seeds, or that depends on the split."""
    positions, k, by_chance = torch.arange(100_000)[None], torch.empty(2, 3, 100_000, 1), share ** 2 + (1 - share) ** 2
    g = torch.cat([RandomAdmission(share, seed).gate(layer, k, k, positions)[0] >= 0
                   for seed in (0, 1) for layer in (0, 1, 30)])                                  # (18, S) bool
    assert ((g.float().mean(1) - share).abs() <= (0.02 if 0 < share < 1 else 0)).all()
    agree = torch.stack([(g[a] == g[b]).float().mean() for a, b in itertools.combinations(range(18), 2)])
    along = (g[:, 1:] == g[:, :-1]).float().mean(1)                                              # and along a head
    assert ((torch.cat((agree, along)) - by_chance).abs() < 0.02).all()
    part = RandomAdmission(share).gate(1, k[:, :, :7], k, torch.stack((positions[0, 50:57], positions[0, 3:10])))
    assert torch.equal(part[0] >= 0, g[3:6, 50:57]) and torch.equal(part[1] >= 0, g[3:6, 3:10])


# ---------------------------------------------------------------------------------------------------------- training

def naive_soft(q, k, v, log_g, window):
    """The student's attention, dense, in float64, written out in exponentials."""
    q, k, v, log_g = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (q, k, v, log_g))
    near = torch.ones(q.shape[2], q.shape[2]).triu(1 - window).bool()
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.where(near, scores.exp(), scores.exp() * log_g.exp()[:, :, None]).tril()
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("window,block", ((1, 16), (5, 16), (5, 256), (40, 16), (64, 256)))
def test_soft_attention(window, block, monkeypatch):
    """A gradient of log g that misses queries or heads, or comes from inside the window; a wrong block edge."""
    monkeypatch.setattr(wgkv, "soft_attention", functools.partial(wgkv.soft_attention, block=block))
    torch.manual_seed(window)
    q, k, v = (x[0] for x in random_qkv(1, 2, 2, 49, 3, 8))
    log_g = (torch.rand(2, 2, 49) * math.log(MIN_GATE)).requires_grad_()
    soft = SoftAttention(Replay(log_g.exp()[None], window), CPU)
    cos, sin = angles(soft.begin(49), 8)
    y = soft.attend(0, q, k, v, cos, sin)
    want = naive_soft(rotate(q, cos, sin), rotate(k, cos, sin), v, log_g, window)
    equal(y.double(), want, "forward")
    weight = torch.randn_like(y)
    grad, want_grad = (torch.autograd.grad((x * weight).sum(), log_g)[0] for x in (y, want))
    assert (grad - want_grad).norm() <= 1e-5 * want_grad.norm()
    assert (grad[..., max(0, 49 - window):] == 0).all()                # no query sees these from outside its window
    equal(soft.g[0], log_g.exp(), "the gates it reports")
    with torch.no_grad():
        equal(soft.attend(0, q, k, v, cos, sin), y, "without gradients")


def test_soft_attention_hard_and_floor():
    """A hard student that is not the definition; a gate of 0 that makes log g infinite."""
    torch.manual_seed(12)
    qkv, g = random_qkv(1, 2, 2, 70, 2), random_gates(1, 2, 2, 70, 0.4)
    want = expected(qkv, g, 9)[0]
    hard, soft = SoftAttention(Replay(g, 9), CPU, hard=True), SoftAttention(Replay(0 * g, 9), CPU)
    q, k, v = (x[0] for x in qkv)
    turn = angles(hard.begin(70), 16)
    equal(hard.attend(0, q, k, v, *turn), want, "hard")
    soft.begin(70)
    floor = naive_soft(rotate(q, *turn), rotate(k, *turn), v, torch.full((2, 2, 70), math.log(MIN_GATE)), 9)
    equal(soft.attend(0, q, k, v, *turn).double(), floor, "floor")


def test_sparsity_loss():
    """The expected cache size, against a case by hand: T = 4, W = 2, so o = 2/4, 2/3, 1, 1."""
    g = torch.tensor([[0.5, 0.2, 0.9, 0.0], [1.0, 0.0, 0.0, 0.0]])
    by_hand = (0.5 + 0.5 * 0.75) + (2 / 3 + 1 / 3 * 0.36) + 1 + 1 + 1 + 2 / 3 + 1 + 1
    assert abs(sparsity_loss(g, 2) - by_hand / 8) < 1e-6
    assert sparsity_loss(torch.zeros(3, 100), 100) == 1 and sparsity_loss(torch.ones(100), 1) == 1


# -------------------------------------------------------------------------------------------------------------- demo

def test_demo(capsys):
    """A demo that prints another pattern than the definition, or another cache than the method's."""
    wgkv.demo()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    g = torch.tensor([float(j in (0, 3, 9)) for j in range(16)])
    pattern = visible_mask(g[None, None], 4, 0.5)[0, 0].tolist()
    assert [row[1:] for row in rows[:16]] == [[".#"[x] for x in line[:i + 1]] for i, line in enumerate(pattern)]
    steps = {int(row[0]): " ".join(row[1:]) for row in rows[16:]}
    assert len(steps) == 16 and steps[0] == "0 -" and steps[3] == "0 1 2 3 -" and steps[4] == "1 2 3 4 0"
    assert steps[6] == "3 4 5 6 0" and steps[7] == "4 5 6 7 0 3" and steps[12] == "9 10 11 12 0 3"
    assert steps[13] == "10 11 12 13 0 3 9" and steps[15] == "12 13 14 15 0 3 9"


def test_the_simple_cache_is_the_method():
    """The forty lines at the top are the definition too, and so what the caches are."""
    torch.manual_seed(15)
    qkv, g = random_qkv(1, 1, 1, 60), random_gates(1, 1, 1, 60, 0.4)
    q, k, v = (x[0, 0, 0] for x in qkv)
    cos, sin = angles(torch.arange(60)[None], 16)
    q, k = (rotate(x[None, None], cos, sin)[0, 0] for x in (q, k))
    cache = wgkv.SimpleCache(9, TAU)
    got = torch.stack([cache.step(q[i], (i, k[i], v[i], g[0, 0, 0, i])) for i in range(60)])
    equal(got, expected(qkv, g, 9)[0, 0, 0])
    equal(got, feed(DualCache(bare(1, 1), Replay(g, 9)), qkv, [[20], *[[1]] * 40])[0, 0, 0])


# ----------------------------------------------------------------------------------------------------------- kernels

KERNEL_SHAPES = [                                   # (B, Hkv, G, W, D, calls, share admitted of each head)
    (1, 2, 2, 16, 16, [70, 1, 33, 1], [0.5, 0.9]), (2, 2, 3, 20, 24, [130, 1, 2, 1], [0.0, 1.0]),
    (1, 1, 1, 64, 32, [1, 1, 150, 1], [0.4]), (1, 3, 7, 1, 80, [131, 1], [0.3, 0.6, 0.99])]


@pytest.mark.parametrize("B, Hkv, G, W, D, calls, share", KERNEL_SHAPES)
def test_kernels_equal_their_references(B, Hkv, G, W, D, calls, share, monkeypatch):
    """A tile, page, window or head edge that is off by one; a slot that two programs share; a read of unused memory."""
    pytest.importorskip("triton")
    import kernels                                  # on a CPU in Triton's interpreter: see the top of this file
    device, (S, L) = "cuda" if torch.cuda.is_available() else "cpu", (sum(calls), 1)
    torch.manual_seed(S)
    g = (torch.rand(L, B, Hkv, S) < torch.tensor(share)[:, None]).float().to(device)
    config = SimpleNamespace(num_layers=L, num_kv_heads=Hkv, head_dim=D)
    model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device(device))
    cache = DualCache(model, Replay(g, W), B)
    cache.kernels = None                            # so that the cache is the reference
    prefill, decode, errors = wgkv.banded_attention, wgkv.paged_attention, []

    def pools(fill):
        """Copies of K and V in which every slot that holds no token is `fill`."""
        held = torch.zeros_like(cache.pool.pos, dtype=torch.bool)
        tokens = (cache.num_tokens + cache.num_new).clamp(max=W).tolist() if T == 1 else [W] * B
        for b, h in itertools.product(range(B), range(Hkv)):
            places = [*range(tokens[b]), *range(cache.R * P, cache.R * P + int(cache.counts[0, b, h]))]
            for n in places:
                held[cache.page_table[0, b, h, n // P], n % P] = True
        return [x.masked_fill(~held[..., None], fill) for x in (cache.pool.k, cache.pool.v)]

    def both_prefill(q, band_k, band_v, band_g, old_k, old_v, num_old, window, tau):
        want = prefill(q, band_k, band_v, band_g, old_k, old_v, num_old, window, tau)
        table = cache.page_table[0, :, :, cache.R:]
        got = kernels.prefill_attention(q, band_k, band_v, band_g, *pools(1e4), table, num_old, window, tau)
        errors.append((got - want).abs().max().item())
        return want

    def both_decode(q, k, v, owner, hidden):
        want = decode(q, k, v, owner, hidden)
        for programs in (1, 3, 16):
            plan = kernels.plan_decode(cache.counts, cache.num_tokens, cache.num_new, cache.R, W, P, programs)
            got = kernels.decode_attention(q.view(B, -1, 1, D), *pools(math.nan), cache.page_table[0], plan, 0)
            errors.append((got.view_as(want) - want).abs().max().item())
            assert not kernels.arrival_counters(q.device, 1).any()
        return want

    monkeypatch.setattr(wgkv, "banded_attention", both_prefill)
    monkeypatch.setattr(wgkv, "paged_attention", both_decode)
    for T in calls:
        q, k, v = (torch.randn(B, heads, T, D, device=device) for heads in (Hkv * G, Hkv, Hkv))
        cache.begin(T)
        cache.attend(0, q, k, v, torch.ones(1, device=device), torch.zeros(1, device=device))
        cache.end()
    assert len(errors) >= len(calls) and all(error < 1e-5 for error in errors), errors          # a NaN is an error


@pytest.mark.parametrize("counts", ([[3]], [[0, 1, 700]], [[64, 65, 0, 129, 1, 5]] * 3, [[0, 0], [500, 3]]))
@pytest.mark.parametrize("ring_pages, programs", ((0, 1), (2, 5), (4, 132)))
def test_plan_of_decode(counts, ring_pages, programs):
    """A share that begins in the wrong row, or a tile that no program or two of them take."""
    pytest.importorskip("triton")
    import kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = torch.tensor(counts, device=device)[:, None]
    one = torch.ones(1, dtype=torch.long, device=device)
    plan = kernels.plan_decode(counts, one, one, ring_pages, 1, P, programs)
    for layer, row_counts in enumerate(counts[:, 0].tolist()):
        tiles = [row for row, n in enumerate(row_counts) for _ in range(max(1, ring_pages + math.ceil(n / P)))]
        starts = [tiles.index(row) for row in range(len(row_counts))]
        assert plan.tile_starts[layer].tolist() == [*starts, len(tiles)]
        active = min(programs, len(tiles))
        first = [len(tiles) * n // active for n in range(active)]
        assert plan.first_row[layer, :active].tolist() == [tiles[tile] for tile in first]
        assert plan.first_tile[layer, :active].tolist() == [tile - starts[tiles[tile]] for tile in first]


@pytest.mark.parametrize("window, G, D, rate", [(1, 1, 16, 0.5), (17, 3, 24, 0.3), (64, 4, 16, 0.9)])
def test_the_caches_through_the_kernels(window, G, D, rate, monkeypatch):
    """The contract with every operation in Triton: unequal lengths, single tokens, a clone, and a pause."""
    import kernels
    monkeypatch.setattr(wgkv, "kernels_for", lambda x: kernels)
    torch.manual_seed(window)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        qkv, g = random_qkv(1, 2, 2, 140, G, D), random_gates(1, 2, 2, 140, rate).to(torch.get_default_device())
        want, full = expected(qkv, g, window), expected(qkv, torch.ones_like(g), window)
        for plan in ([[70, 66], [1, 1], [1, 0], [1, 1], [67, 7]], [[1, 1]] * (window + 2) + [[138 - window, 0]]):
            dual, dense = DualCache(bare(1, 2, D), Replay(g, window), 2), DenseCache(bare(1, 2, D), 2)
            equal(feed(dual, qkv, plan[:3]), want)
            equal(feed(dense, qkv, plan), full, "dense")
            branch = dual.clone()
            equal(feed(dual, qkv, plan[3:]), want)
            equal(feed(branch, qkv, plan[3:]), want, "clone")
            check_pages(dual)
            assert torch.equal(dual.admitted(0), g[:, 0, :, :int(dual.num_tokens[0])].cpu() >= TAU)


@torch.no_grad()
def test_the_small_kernels_equal_their_references(monkeypatch):
    """Gates with odd numbers of hidden units and of tokens, shared out or not; rotation, norms and products."""
    import kernels
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for B, Hkv, T, D, expansion in ((1, 2, 1, 16, 4), (3, 2, 1, 24, 2.3), (2, 3, 41, 80, 0.6), (1, 1, 70, 32, 4)):
            torch.manual_seed(T)
            gate = wgkv.Gate(Hkv, D, expansion)
            gate.pre_norm.data, gate.post_norm.data = torch.rand(2, D) + 0.5
            gate.w2.data *= 20
            qkv = torch.randn(B, T, Hkv * 4, D).transpose(1, 2)
            q, k = qkv[:, :Hkv * 3], qkv[:, Hkv * 3:]
            cos, sin = angles(torch.arange(T) + torch.arange(B)[:, None], D)
            turned = kernels.rotate(q, k, cos, sin)
            equal(turned[0], rotate(q, cos, sin))
            equal(turned[1], rotate(k, cos, sin))
            with torch.enable_grad():                                  # the reference: kernels are not for training
                want = gate(k, turned[1])
            for _ in range(2):                                         # arrival counters are zero again
                equal(kernels.gate(gate, k, turned[1]), want, f"gate {B, T, D, expansion}")
            assert want.std() > 0.05
            norm, x, y = torch.nn.RMSNorm(D, eps=1e-2), torch.randn(B, T, D), torch.randn(B, T, D)
            norm.weight.data = torch.rand(D)
            equal(kernels.silu_product(qkv := torch.randn(T, 2 * D)), F.silu(qkv[:, :D]) * qkv[:, D:])
            equal(kernels.add_norm(x.clone(), None, norm)[1], norm(x))
            for got, want in zip(kernels.add_norm(x.clone(), y, norm), (x + y, norm(x + y))):
                equal(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter's bf16 is wrong")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("D, G, W", [(128, 4, 100), (128, 7, 1), (64, 1, 64), (64, 8, 256), (80, 3, 17), (256, 2, 33),
                                     (16, 4, 128)])
def test_half_precision_on_the_card(D, G, W, dtype, card):
    """A product or a sum that loses more than half precision must: torch's own attention, both against fp64."""
    import kernels
    torch.manual_seed(D + G)
    B, Hkv, calls = 2, 2, [300, 413, 1, 1, 130, 1]
    S, errors = sum(calls), []
    model = SimpleNamespace(config=SimpleNamespace(num_layers=1, num_kv_heads=Hkv, head_dim=D), dtype=dtype,
                            device=torch.device("cuda"))
    q, k, v = (torch.randn(B, heads, S, D, dtype=dtype) for heads in (Hkv * G, Hkv, Hkv))
    g = (torch.rand(1, B, Hkv, S) < torch.tensor([0.9, 0.2])[:, None]).float()
    mask = visible_mask(g[0], W, TAU)
    want = dense_attention(q.double(), k.double(), v.double(), mask)
    wide_k, wide_v, wide_mask = (x.repeat_interleave(G, dim=1) for x in (k, v, mask))
    theirs = F.scaled_dot_product_attention(q, wide_k, wide_v, wide_mask) - want
    for plain in (False, True):
        cache, at, got = DualCache(model, Replay(g, W), B), 0, torch.full_like(q, math.nan)
        cache.kernels = SimpleNamespace(**vars(kernels))
        cache.kernels.prefill_attention = lambda *args: kernels.prefill_attention(*args, plain=plain)
        for T in calls:
            del [torch.full_like(q[:, :, :T], math.nan) for _ in range(4)][:]      # so that fresh memory is poisoned
            cache.begin(T)
            ones, zeros = torch.ones(1, 1, T, D), torch.zeros(1, 1, T, D)
            got[:, :, at:at + T] = cache.attend(0, *(x[:, :, at:at + T] for x in (q, k, v)), ones, zeros)
            cache.end()
            at += T
        ours = got - want
        errors.append([(ours.abs().max() / theirs.abs().max()).item(),
                       (ours.square().mean() / theirs.square().mean()).sqrt().item()])
    assert all(ratio <= 1.5 for pair in errors for ratio in pair), f"max and rms error over torch's: {errors}"


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_running_ahead_changes_nothing(kind, card):
    """Decoding in a captured graph, some steps ahead of the reader: what is written, and what a second turn finds."""
    model = small_llama(3, num_layers=2, vocab_size=400, tied=False)
    torch.manual_seed(3)
    prompts = [torch.randint(50, (n,)).tolist() for n in (90, 40, 61)]

    def start():
        kv = DualCache(model, RandomAdmission(0.5), 3, 17) if kind == "dual" else DenseCache(model, 3)
        return kv, generate.prefill(model, kv, prompts, 32)

    kv, hidden = start()
    step_by_step, alive = [], torch.ones(3, dtype=torch.long)
    ids = model.logits(hidden).argmax(-1)
    for _ in range(80):
        step_by_step.append(ids.tolist())
        ids = model.logits(model(ids[:, None], kv, alive)[:, 0]).argmax(-1)
    columns, early = list(zip(*step_by_step)), set(sum(step_by_step[:3], []))
    end = {max(set(column) - early, key=column.index, default=-1) for column in columns[:2]}   # the latest new token
    want, done = [], [False] * 3
    for ids in step_by_step:
        want.append([None if over else i for over, i in zip(done, ids)])
        done = [over or i in end for over, i in zip(done, ids)]
        if all(done):
            break
    kv, hidden = start()
    assert list(generate.decode(model, kv, hidden, 80, end)) == want and any(None in ids for ids in want)
    said = [[i for i in column if i is not None] for column in zip(*want)]
    assert kv.num_tokens.tolist() == [len(p) + len(s) - 1 for p, s in zip(prompts, said)]
    again = start()[0]
    generate.prefill(model, again, [s[:-1] for s in said], 1)              # the same tokens, one at a time
    for more in ([[5, 6, 7]] * 3, [[8]] * 3):
        equal(generate.prefill(model, kv, more), generate.prefill(model, again, more))


# ---------------------------------------------------------------------------------- the student's attention, both ways

SOFT_NAMES = "out dq dk dv d_log_g".split()


def soft_definition(q, k, v, log_g, window):
    """With the whole T x T matrix, for autograd."""
    T, G = q.shape[2], q.shape[1] // k.shape[1]
    i, j = torch.arange(T)[:, None], torch.arange(T)
    k, v, log_g = (x.repeat_interleave(G, dim=1) for x in (k, v, log_g))
    scores = q @ k.mT / math.sqrt(q.shape[3]) + torch.where(i - j < window, 0., log_g[:, :, None])
    return scores.masked_fill(j > i, -math.inf).softmax(dim=-1) @ v


def torchs(q, k, v, log_g, window):
    """What it is with every gate at 1."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 0 * log_g.sum()


def soft_inputs(B, Hkv, G, T, D, dtype=torch.float32):
    """q, k, v, log_g and the gradient of the output."""
    q, k, v, do = (torch.randn(B, heads, T, D, dtype=dtype) for heads in (Hkv * G, Hkv, Hkv, Hkv * G))
    return q, k, v, 3 * torch.rand(B, Hkv, T).log(), do


def soft_gradients(attention, q, k, v, log_g, do, window, dtype=None):
    """(out, dq, dk, dv, d_log_g)"""
    with torch.enable_grad():
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, log_g)]
        out = attention(*leaves, window)
        return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def same_gradients(got, want, tolerance=2e-5):
    for name, x, y in zip(SOFT_NAMES, got, want):
        assert x.shape == y.shape and x.isfinite().all(), name
        worst, most = (x.double() - y).abs().max().item(), max(1, y.abs().max().item())
        assert worst <= tolerance * most, f"{name}: off by {worst:.2e}, of {most:.2e}"


@pytest.fixture(params=("pytorch", "triton"))
def soft(request, card):
    """wgkv.soft_attention and kernels.soft_attention: the same function, so the same tests."""
    import kernels
    return wgkv.soft_attention if request.param == "pytorch" else kernels.soft_attention


@pytest.mark.parametrize("T, W, G, D", [
    (1, 1, 1, 16), (2, 16, 1, 80), (63, 16, 4, 24), (65, 1, 3, 16), (65, 64, 1, 64), (130, 100, 1, 24),
    (150, 15, 3, 16), (150, 1000, 1, 16), (65, 18, 2, 17), (40, 8, 1, 160)])
def test_soft_gradients_equal_autograd_of_the_definition(soft, T, W, G, D):
    """Every loop's bounds, the padding of T and D, the sum over a group's heads."""
    torch.manual_seed(T)
    x = soft_inputs(2, 2 if T < 100 else 1, G, T, D)
    same_gradients(soft_gradients(soft, *x, W), soft_gradients(soft_definition, *x, W, dtype=torch.float64))


def test_soft_gates_open_closed_and_mixed(soft):
    """g = 1 is plain attention, g = 0 is the window alone: no NaN, and no gradient for a gate that is shut."""
    torch.manual_seed(2)
    q, k, v, log_g, do = soft_inputs(1, 2, 2, 130, 24)
    same_gradients(soft_gradients(soft, q, k, v, 0 * log_g, do, 16)[:4],
                   soft_gradients(torchs, q, k, v, 0 * log_g, do, 16, torch.float64)[:4])
    for shut in (torch.full_like(log_g, -math.inf), log_g.masked_fill(torch.rand_like(log_g) < 0.5, -math.inf)):
        want = soft_gradients(soft_definition, q, k, v, shut.clamp(min=-1e4), do, 16, torch.float64)
        got = soft_gradients(soft, q, k, v, shut, do, 16)
        same_gradients(got, want)
        assert (got[4][shut == -math.inf] == 0).all()


def test_soft_strides_and_bits(soft):
    """q, k, v as a fused projection leaves them, an expanded gradient; and two runs give the same bits."""
    torch.manual_seed(3)
    leaves = torch.randn(2, 70, 4 + 2 + 2, 24).transpose(1, 2).split([4, 2, 2], dim=1)
    log_g, do = torch.rand(2, 70, 2).log().transpose(1, 2), torch.randn(2, 1, 70, 1).expand(2, 4, 70, 24)
    got, again = (soft_gradients(soft, *leaves, log_g, do, 16) for _ in range(2))
    same_gradients(got, soft_gradients(soft_definition, *leaves, log_g, do, 16, dtype=torch.float64))
    assert all(map(torch.equal, got, again))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 tiles of this size take long to compile, and spill")
@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 64), (64, 128)])
@pytest.mark.parametrize("T, W", [(150, 15), (130, 18), (200, 100)])
def test_soft_gradients_for_oblong_tiles(tile, T, W, monkeypatch, card):
    """Tiles of the shapes that half precision uses: bounds that hold only for square ones, or for whole windows."""
    import kernels
    monkeypatch.setattr(kernels, "tile", lambda table, DP, dtype: (*tile, 4, 1))
    torch.manual_seed(T)
    x = soft_inputs(1, 1, 2, T, 16)
    same_gradients(soft_gradients(kernels.soft_attention, *x, W),
                   soft_gradients(soft_definition, *x, W, dtype=torch.float64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter's bf16 is wrong")
@pytest.mark.parametrize("T, G, D, dtype", [
    (150, 3, 16, torch.bfloat16), (513, 1, 64, torch.bfloat16), (777, 2, 80, torch.bfloat16),
    (1000, 4, 128, torch.bfloat16), (1000, 4, 128, torch.float16), (333, 2, 256, torch.bfloat16)])
def test_soft_half_precision_on_the_card(T, G, D, dtype, card):
    """With every gate open, at most 1.5 times the error of torch's attention; with gates, near fp64."""
    import kernels
    torch.manual_seed(T)
    q, k, v, log_g, do = soft_inputs(2, 2, G, T, D, dtype)
    want = soft_gradients(torchs, q, k, v, 0 * log_g, do, 100, torch.float64)
    ours = soft_gradients(kernels.soft_attention, q, k, v, 0 * log_g, do, 100)
    theirs = soft_gradients(torchs, q, k, v, (0 * log_g).to(dtype), do, 100)
    for name, a, b, truth in [*zip(SOFT_NAMES, ours, theirs, want)][:4]:
        error, bar = ((x.double() - truth).square().mean().sqrt().item() for x in (a, b))
        assert error <= 1.5 * bar, f"{name}: {error:.2e}, torch {bar:.2e}"
    want = soft_gradients(soft_definition, q, k, v, log_g, do, 100, torch.float64)
    got = soft_gradients(kernels.soft_attention, q, k, v, log_g, do, 100)
    same_gradients(got, want, 2e-2 if dtype == torch.bfloat16 else 3e-3)


