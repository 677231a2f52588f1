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

import bench
import generate
import model as M
import train
import wgkv
from generate import Text, TextStream, kept_page, sampler
from model import Config, Llama, UserError, rotate
from tiny import tasks
from tiny.make import ANSWER_WEIGHT, Documents, Sentences
from wgkv import (GATE_FLOOR, P, DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, admission_cost,
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
        self.admission, self.seen = admission, torch.zeros(batch, dtype=torch.long)

    def begin(self, T, lengths=None):
        self.positions = torch.arange(T, device=self.seen.device).expand(len(self.seen), T)
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
        T, spans = max(1, *new), [(b, at, at + n) for b, (at, n) in enumerate(zip(cache.seen.tolist(), new))]
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
    for c in cache.layers:
        held = [p for row, n in zip(c["table"].tolist(), c["count"].tolist()) for p in row[:-(-n // P)]]
        free = c["free"][:int(c["free_count"])].tolist()
        assert sorted(held + free) == list(range(1, len(c["page_k"]))), f"held {held}, free {free}"


def memory_of(cache, b):
    """Everything a DualCache has of one sequence, as a list of tensors."""
    rows = range(b * cache.Hkv, (b + 1) * cache.Hkv)
    return [cache.seen[b]] + [t.clone() for c in cache.layers for t in (
        c["ring_k"][b], c["ring_v"][b], c["ring_g"][b], *(c["count"][r] for r in rows),
        *(c["table"][r, :-(-int(c["count"][r]) // P)] for r in rows),
        *(cache.row(c, name, b, h) for h in range(cache.Hkv) for name in ("page_k", "page_v", "page_pos")))]


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
        assert cache.layers[1]["count"].tolist() == [n, n // 2]
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
        for c in cache.layers:
            cache.reserve(c, 40, 3, int(c["free_count"]))
            for name in ("ring_k", "ring_v", "page_k", "page_v"):
                c[name].fill_(poison)              # finite: a masked place is multiplied by a weight of 0
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
    assert dual.seen.tolist() == dense.seen.tolist() == lengths
    assert [c["count"][:2].tolist() for c in dual.layers] == [[183, 0], [0, 183]]
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
    assert cache.seen.tolist() == [108, 93, 103]


# ------------------------------------------------------------------------------------------- clone, state, reset, pages

@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_clone_and_state(kind, tmp_path, card):
    """A clone that shares memory with its original, in either direction; a state that forgets something."""
    torch.manual_seed(4)
    one, two, g = random_qkv(2, 2, 2, 180), random_qkv(2, 2, 2, 180), random_gates(2, 2, 2, 180, 0.6)
    for a, b in zip(one, two):
        b[..., :90, :] = a[..., :90, :]                             # the same beginning, two continuations
    g = g if kind == "dual" else torch.ones_like(g)
    inputs, wants = (one, two, one), [expected(qkv, g, 17) for qkv in (one, two, one)]
    for step in (1, 9, 90):
        cache, fresh = (DualCache(bare(), Replay(g, 17), 2) if kind == "dual" else DenseCache(bare(), 2) for _ in "12")
        feed(cache, one, [[60, 60], [1, 1], [29, 29]])
        save_file(cache.state(), tmp_path / "state")
        fresh.restore(load_file(tmp_path / "state"))
        caches = cache, cache.clone(), fresh
        for _, i in itertools.product(range(0, 90, step), range(3)):    # by turns, so that each could spoil the others
            equal(feed(caches[i], inputs[i], [[step, step]]), wants[i], f"cache {i}, step {step}")


def test_pages_come_back(card):
    """A reset that loses pages, or gives them back twice: after it the same input needs no new memory."""
    torch.manual_seed(5)
    qkv, g = random_qkv(2, 3, 2, 400), random_gates(2, 3, 2, 400, 0.8)
    want, cache, lengths = expected(qkv, g, 8), DualCache(bare(), Replay(g, 8), 3), (400, 300, 200)
    feed(cache, qkv, [lengths])
    reserved, resets = cache.reserved_bytes(), ((None,), (1,), (2, 0, 1), (0, 0), (None, None))
    # Kernels have pages set aside for the worst case, so there it is the second time round that needs nothing new.
    for again, sequences in itertools.product((False, True) if cache.kernels else (True,), resets):
        for b in sequences:
            cache.reset(b)
            check_pages(cache)
        equal(feed(cache, qkv, [[n - seen for n, seen in zip(lengths, cache.seen.tolist())]]), want, f"{sequences}")
        reserved = reserved if again else cache.reserved_bytes()
        assert cache.reserved_bytes() == reserved, f"after reset of {sequences}"
    cache.reset()
    assert cache.dense_bytes() == 0 == sum(int(c["count"].sum()) for c in cache.layers)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_operations(seed, card):
    """A page that two rows hold, or none, after feeding, resets, clones and restores in any order."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    qkv, g = random_qkv(2, 3, 2, 300), random_gates(2, 3, 2, 300, 0.7)
    want, cache = expected(qkv, g, 4), DualCache(bare(), Replay(g, 4), 3)
    for step in range(60):
        operation = rng.choice(("feed", "feed", "feed", "reset", "clone", "restore"))
        if operation == "feed":
            most = rng.choice((1, 10, 100))
            plan = [[min(rng.randint(0, most), 300 - n) for n in cache.seen.tolist()]]
            equal(feed(cache, qkv, plan), want, f"step {step}, plan {plan}")
        elif operation == "reset":
            cache.reset(rng.choice((0, 1, 2, None)))
        elif operation == "clone":
            left, cache = cache, cache.clone()
            left.reset()
        else:
            left, cache = cache, DualCache(bare(), Replay(g, 4), 3)
            cache.restore(left.state())
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
    kept = 2 * 8                                                                             # seen
    for (layer, c), b, h in itertools.product(enumerate(cache.layers), range(2), range(3)):
        old = (g[layer, b, h, :S[b] - W] >= TAU).nonzero()[:, 0].tolist()
        cos, sin = angles(torch.tensor([old]), D)
        assert cache.row(c, "page_pos", b, h).tolist() == old
        equal(cache.row(c, "page_k", b, h), rotate(qkv[1][layer, b, h, old], cos[0, 0], sin[0, 0]), "page_k")
        equal(cache.row(c, "page_v", b, h), qkv[2][layer, b, h, old], "page_v")
        kept += math.ceil(len(old) / 64) * (64 * (D * 4 * 2 + 4) + 4)                        # K, V, position; table
        kept += W * (D * 4 * 2 + 4) + 8                                                      # K, V, gate; count
    assert cache.kept_bytes() == kept
    assert cache.dense_bytes() == dense.dense_bytes() == dense.kept_bytes() == 2 * 2 * 3 * D * 4 * sum(S)


@pytest.mark.parametrize("rate", (0.1, 0.5, 1))
def test_reserved_stays_near_used(rate, card):
    """A pool that doubles: after a long prefill in chunks, reserved memory is not far above what is in use."""
    S, chunk, slot = 6000, 448, 2 * (8 * 4 * 2 + 4)                    # a slot: the bytes of a token in both heads
    cache, qkv = DualCache(bare(1, 2, 8), RandomAdmission(rate), window=64), random_qkv(1, 1, 2, S, 1, 8)
    for _ in range(S // chunk):
        feed(cache, qkv, [[chunk]])
        kept, reserved = cache.kept_bytes(), cache.reserved_bytes()
        assert kept <= reserved <= kept + 0.15 * (kept - 64 * slot) + (chunk + P) * slot       # P: page 0 and tables


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
    log_g = (torch.rand(2, 2, 49) * math.log(GATE_FLOOR)).requires_grad_()
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
    floor = naive_soft(rotate(q, *turn), rotate(k, *turn), v, torch.full((2, 2, 70), math.log(GATE_FLOOR)), 9)
    equal(soft.attend(0, q, k, v, *turn).double(), floor, "floor")


def test_admission_cost():
    """The expected cache size, against a case by hand: T = 4, W = 2, so o = 2/4, 2/3, 1, 1."""
    g = torch.tensor([[0.5, 0.2, 0.9, 0.0], [1.0, 0.0, 0.0, 0.0]])
    by_hand = (0.5 + 0.5 * 0.75) + (2 / 3 + 1 / 3 * 0.36) + 1 + 1 + 1 + 2 / 3 + 1 + 1
    assert abs(admission_cost(g, 2) - by_hand / 8) < 1e-6
    assert admission_cost(torch.zeros(3, 100), 100) == 1 and admission_cost(torch.ones(100), 1) == 1


# -------------------------------------------------------------------------------------------------------------- demo

def test_demo(capsys):
    """A demo that prints another pattern than the definition, or another ring than the cache has."""
    wgkv.demo()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    pattern = visible_mask(torch.tensor([float(j in (0, 3, 9)) for j in range(16)])[None, None], 4, 0.5)[0, 0].tolist()
    assert [row[1:] for row in rows[:16]] == [[".#"[x] for x in line[:i + 1]] for i, line in enumerate(pattern)]
    steps = {int(row[0]): " ".join(row[1:]) for row in rows[16:]}
    assert len(steps) == 16 and steps[0] == "0 - - - -" and steps[3] == "0 1 2 3 -" and steps[4] == "4 1 2 3 0"
    assert steps[6] == "4 5 6 3 0" and steps[7] == "4 5 6 7 0 3" and steps[12] == "12 9 10 11 0 3"
    assert steps[13] == "12 13 10 11 0 3 9" and steps[15] == "12 13 14 15 0 3 9"


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
    model = SimpleNamespace(config=SimpleNamespace(num_layers=L, num_kv_heads=Hkv, head_dim=D), dtype=torch.float32,
                            device=torch.device(device))
    cache, reference, compared = DualCache(model, Replay(g, W), B), wgkv.banded_attention, []
    cache.kernels = None                            # so that the cache is the reference

    def unused_is_nan(c):
        """Copies of the pools in which every place that holds no token is NaN."""
        used = torch.zeros_like(c["page_pos"], dtype=torch.bool)
        for row, n in enumerate(c["count"].tolist()):
            for i in range(-(-n // P)):
                used[c["table"][row, i], :n - i * P] = True
        return [c[x].masked_fill(~used[..., None], math.nan) for x in ("page_k", "page_v")]

    def both(q, band_k, band_v, band_g, old_k, old_v, old_count, window, tau):
        c, want = cache.layers[0], reference(q, band_k, band_v, band_g, old_k, old_v, old_count, window, tau)
        pools = [x.nan_to_num(1e4) for x in unused_is_nan(c)]
        args = (x.contiguous() for x in (band_k, band_v, band_g))
        got = kernels.prefill_attention(q, *args, *pools, c["table"], old_count.contiguous(), window, tau)
        compared.append((got - want).abs().max().item())
        return want

    monkeypatch.setattr(wgkv, "banded_attention", both)
    for T in calls:
        q, k, v = (torch.randn(B, heads, T, D, device=device) for heads in (Hkv * G, Hkv, Hkv))
        cache.begin(T)
        want = cache.attend(0, q, k, v, torch.ones(1, device=device), torch.zeros(1, device=device))
        cache.end()
        c = cache.layers[0]
        for programs in (1, 3, 16) if T == 1 else ():
            got = kernels.decode_attention(q, c["ring_k"], c["ring_v"], c["ring_g"], *unused_is_nan(c), c["table"],
                                           c["count"], programs)
            compared.append((got - want).abs().max().item())
            assert not kernels.tickets(q.device, 1).any()
    assert len(compared) >= len(calls) and all(error < 1e-5 for error in compared), compared     # a NaN is an error


@pytest.mark.parametrize("window, G, D, rate", [(1, 1, 16, 0.5), (17, 3, 24, 0.3), (64, 4, 16, 0.9)])
def test_the_caches_through_the_kernels(window, G, D, rate, monkeypatch):
    """The contract with every operation in Triton: unequal lengths, single tokens, a clone, and a pause."""
    import kernels
    monkeypatch.setattr(wgkv, "triton_kernels", lambda device, D: kernels)
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
            assert torch.equal(dual.admitted(0), g[:, 0, :, :int(dual.seen[0])].cpu() >= TAU)


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
            for _ in range(2):                                         # tickets are zero again
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
    assert kv.seen.tolist() == [len(p) + len(s) - 1 for p, s in zip(prompts, said)]
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


# ------------------------------------------------------------------------------------------- parity with transformers

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
PARITY = {                                                                        # what differs from SIZES
    "llama, as many key heads": dict(num_key_value_heads=4),
    "llama, 4 queries a key head, tied": dict(num_attention_heads=8, tie_word_embeddings=True),
    "llama, every bias": dict(attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": dict(head_dim=32, rope_parameters=dict(
        LLAMA3, rope_theta=500.0, original_max_position_embeddings=32)),
    "llama, linear rope": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0)),
    "mistral": dict(sliding_window=None, head_dim=32, rms_norm_eps=1e-2),
    "qwen2, 7 queries a key head, tied": dict(hidden_size=112, num_attention_heads=14, tie_word_embeddings=True,
                                              sliding_window=16, use_sliding_window=False),
    "qwen2, yarn": dict(max_position_embeddings=128, rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=32)),
    "qwen3": dict(head_dim=24, sliding_window=None),
}


@torch.no_grad()
@pytest.mark.parametrize("case", PARITY)
def test_equals_transformers(case, tmp_path):
    """Any slip in the arithmetic, and positions or keys that slip between the calls of greedy decoding."""
    transformers, family = pytest.importorskip("transformers"), case.split(",")[0].capitalize()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **PARITY[case]})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, p in theirs.named_parameters():                   # random enough that every single one matters
        if p.dim() == 1:
            p.uniform_(*(-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5))
        else:
            p.normal_(std=0.15 if "embed" in name else 1.3 * p.shape[1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    ours = M.Llama.from_pretrained(tmp_path)

    ids = torch.randint(96, (2, 80))
    want = theirs(ids).logits
    torch.testing.assert_close(ours.logits(ours(ids)), want, rtol=0, atol=1e-4 * want.abs().max().item())

    ids, cache, got = ids[:1, :12], DenseCache(ours, 1), []
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=64,
                           max_new_tokens=64, pad_token_id=0)[0, 12:].tolist()
    for _ in range(64):
        ids = ours.logits(ours(ids, cache)[:, -1:]).argmax(-1)
        got.append(ids.item())
    assert got == want and len(set(got)) > 8


# -------------------------------------------------------------------------------------------------------------- RoPE

def llama3_by_hand(factor, D=128, base=5e5, original=8192):
    """Meta's rule as Meta words it, by wavelength, in doubles."""
    for m in range(D // 2):
        f = base ** (-2 * m / D)
        wave = 2 * math.pi / f
        s = (original / wave - 1) / (4 - 1)
        yield f if wave < original / 4 else f / factor if wave > original else (1 - s) * f / factor + s * f


@pytest.mark.parametrize("factor, literal", [
    (8.0, {28: 3.211445994752591e-3, 31: 8.567514129196321e-4, 63: 3.068925988914511e-07}),
    (32.0, {28: 3.211445994752591e-3, 31: 7.625412033563571e-4, 63: 7.672314972286278e-08})], ids=("3.1", "3.2"))
def test_llama3_frequencies(factor, literal):
    """Scaling that is parsed and not applied, or a factor that is not the config's: both only show in long texts."""
    rope = dict(LLAMA3, factor=factor, original_max_position_embeddings=8192)
    got, scale = M.rope_frequencies(M.Config(head_dim=128, rope_theta=5e5, rope=rope))
    assert scale == 1 and got.dtype == torch.float32
    assert got.tolist() == pytest.approx(list(llama3_by_hand(factor)), rel=1e-5)
    assert [got[m].item() for m in literal] == pytest.approx(list(literal.values()), rel=1e-5)


def test_yarn_frequencies():
    """Qwen2.5 beyond 32768 tokens: the blend's two ends in the wrong dimension, or scores without their temperature."""
    D, base, factor, original = 128, 1e6, 4.0, 32768
    want = []                                   # pair 23.6 turns 32 times in 32768 tokens, 39.7 once: 23 to 40
    for m in range(D // 2):
        f, share = base ** (-2 * m / D), min(1, max(0, (m - 23) / (40 - 23)))     # share of the interpolated frequency
        want.append(f * (1 - share) + f / factor * share)
    rope = dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    got, scale = M.rope_frequencies(M.Config(head_dim=D, rope_theta=base, rope=rope))
    assert got.tolist() == pytest.approx(want, rel=1e-5) and scale == pytest.approx(1.1386294361)
    assert got[[23, 31, 63]].tolist() == pytest.approx([6.978306e-3, 8.029597e-4, 3.102344e-7], rel=1e-5)


def test_angles_at_100000_are_fp32_in_a_bf16_model(tmp_path):
    """Tables, or a buffer of frequencies, that went to bf16 with the weights (row 10)."""
    model = M.Llama.from_pretrained(make_folder(tmp_path), dtype=torch.bfloat16)
    cos, sin = model.rope(torch.tensor([[100_000]]))
    angles = 2 * [100_000 * 10_000 ** (-m / 4) for m in range(4)]
    assert model.dtype == torch.bfloat16 and cos.dtype == sin.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=0.02)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=0.02)
    x = torch.randn(1, 2, 1, 8).bfloat16()
    assert torch.equal(M.rotate(x, cos, sin), M.rotate(x.float(), cos, sin).bfloat16())


# ------------------------------------------------------------------- folders, good and bad; "row" is one of loader.md's

TINY = dict(model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
            rope_theta=10000.0, tie_word_embeddings=True)
LINEAR = dict(rope_type="linear", factor=2)
ABSENT = object()                                                     # as a value in a config: no such key
EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00002-of-00002.safetensors"


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**TINY, **changes}.items() if v is not ABSENT}))
    return folder


def make_folder(folder, edit=lambda tensors: None, shards=0, **changes):
    """A random checkpoint with TINY's config but for the changes; edit(tensors) alters what is stored."""
    config = M.read_config(write_config(folder, **changes))
    with torch.device("meta"):
        params = dict(M.Llama(config).named_parameters())
    torch.manual_seed(0)                          # lm_head comes last, so that tied and untied folders share the rest
    tensors = {("" if name == HEAD else "model.") + name: 0.3 * torch.randn(params[ours][start:stop].shape)
               for name, (ours, start, stop) in sorted(M.checkpoint_names(config).items(), key=lambda x: x[0] == HEAD)}
    edit(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    for file, names in (files or {M.SINGLE: tensors}).items():
        save_file({n: tensors[n].contiguous() for n in names}, folder / file)
    if shards:
        edit_index(folder, {n: file for file, names in files.items() for n in names})
    return folder


def edit_index(folder, changes):
    index = M.read_json(folder / M.INDEX, required=False) or {"weight_map": {}}
    index["weight_map"].update(changes)
    (folder / M.INDEX).write_text(json.dumps(index))


@torch.no_grad()
def logits(folder):
    model = M.Llama.from_pretrained(folder)
    out = model.logits(model(torch.arange(20).view(2, 10)))
    for p in model.parameters():
        p.fill_(math.nan)                         # memory that is used again must not hold the right numbers by chance
    return out


def not_loaded(folder, *words):
    """from_pretrained must raise a UserError, and nothing else, of one line that holds all of the words."""
    with pytest.raises(M.UserError) as error:
        M.Llama.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def put(name, make):
    """An edit: the tensor make(tensors) under this name."""
    return lambda tensors: tensors.update({name: make(tensors)})


def rename(old, new):
    return lambda tensors: [tensors.update({n.replace(old, new, 1): tensors.pop(n)}) for n in list(tensors) if old in n]


SAME = {                                     # id: (edit, changes of make_folder, what stderr says)
    "row 2, the same lm_head": (put(HEAD, lambda t: t[EMBED].clone()), {}, ""),
    "row 2, another lm_head": (put(HEAD, lambda t: t[EMBED] + 1), {}, "lm_head differs"),
    "row 3": (lambda t: t.pop(HEAD), dict(tie_word_embeddings=False), "the embedding is used"),
    "row 3, sharded": (lambda t: t.pop(HEAD), dict(tie_word_embeddings=False, shards=2), "the embedding is used"),
    "row 4": (rename(EMBED, HEAD), {}, ""),
    "row 14": (put("model.layers.1.self_attn.rotary_emb.inv_freq", lambda t: torch.full((4,), math.nan)), {}, ""),
    "row 30": (rename("model.", ""), {}, ""),
    "sharded": (lambda t: None, dict(shards=3), ""),
    "row 27": (lambda t: None, dict(sliding_window=2, use_sliding_window=False, layer_types=["full_attention"]), ""),
    "row 27, no switch": (lambda t: None, dict(sliding_window=2), ""),
}


@pytest.mark.parametrize("edit, changes, remark", SAME.values(), ids=SAME)
def test_other_forms_of_the_same_model(edit, changes, remark, tmp_path, capsys):
    """A form of the same weights that is refused, read as other weights, or (rows 2, 3) read without a remark."""
    want = logits(make_folder(tmp_path))
    (tmp_path / M.SINGLE).unlink()
    got, said = logits(make_folder(tmp_path, edit, **changes)), capsys.readouterr().err
    assert torch.equal(got, want) and (remark in said if remark else said == "")


def test_tied_and_untied_heads(tmp_path):
    """Scores from the wrong one of embedding and lm_head, or a needless call for lm_head.weight (row 1)."""
    x = torch.randn(3, 32)
    for tied, name in ((True, EMBED), (False, HEAD)):
        model = M.Llama.from_pretrained(make_folder(tmp_path, tie_word_embeddings=tied))
        stored = load_file(tmp_path / M.SINGLE)
        assert torch.equal(model.logits(x), x @ stored[name].T) and (HEAD in stored) != tied


@pytest.mark.parametrize("changes, theta, rope, remark", [
    (dict(rope_theta=5e5, rope_scaling=None), 5e5, {}, False),
    (dict(rope_theta=ABSENT, rope_parameters=dict(rope_theta=5e5, rope_type="default")), 5e5, {}, False),
    (dict(rope_theta=None, rope_parameters=dict(rope_theta=5e5)), 5e5, {}, False),
    (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)), 5e5, {}, False),        # as transformers decides it
    (dict(rope_theta=ABSENT, rope_scaling=dict(type="default")), 1e4, {}, True),
    (dict(rope_scaling=dict(type="linear", factor=2)), 1e4, LINEAR, False),
    (dict(rope_scaling=dict(type="linear", rope_type="linear", factor=2)), 1e4, LINEAR, False),
    (dict(rope_theta=ABSENT, rope_parameters=dict(LINEAR, rope_theta=5e5)), 5e5, LINEAR, False)])
def test_where_rope_settings_are_found(changes, theta, rope, remark, tmp_path, capsys):
    """A base of 10000 in silence, or scaling overlooked, since the key is another release's or null (rows 6, 7, 28)."""
    model = M.Llama.from_pretrained(make_folder(tmp_path, **changes))
    assert (model.config.rope_theta, model.config.rope) == (theta, rope)
    assert ("rope_theta" in capsys.readouterr().err) == remark
    slower = 2 if rope else 1
    assert model.inv_freq[:2].tolist() == pytest.approx([1 / slower, theta ** -0.25 / slower])


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gemma2"), ("model_type", "'gemma2'", "llama, mistral, qwen2, qwen3")),                      # 25
    (dict(model_type=ABSENT), ("model_type", "None", "llama, mistral, qwen2, qwen3")),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), ("quantization_config", "gptq")),               # 26
    (dict(model_type="mistral", sliding_window=4096), ("sliding_window", "4096")),                                # 27
    (dict(model_type="qwen2", sliding_window=64, use_sliding_window=True), ("sliding_window", "64")),
    (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), ("sliding_window",)),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2)), ("'longrope'", "default, linear, llama3 and yarn")),  # 28
    (dict(rope_scaling=dict(type="dynamic", factor=2)), ("'dynamic'",)),
    (dict(rope_scaling=dict(type="yarn")), ("yarn", "factor")),
    (dict(rope_scaling=dict(LLAMA3, factor=None)), ("llama3", "factor")),
    (dict(rope_scaling=LLAMA3), ("llama3", "original_max_position_embeddings")),
    (dict(hidden_act="gelu"), ("hidden_act", "'gelu'")),                                                          # 29
    (dict(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3")),
    (dict(hidden_size=ABSENT), ("hidden_size", "None")), (dict(vocab_size="many"), ("vocab_size", "'many'")),
    (dict(head_dim=9), ("head_dim 9",)), (dict(num_key_value_heads="2"), ("num_key_value_heads", "'2'")),
    (dict(rope_theta="1e4"), ("rope_theta", "'1e4'")), (dict(rope_scaling="yarn"), ("rope_scaling", "yarn")),
    (dict(rope_scaling=dict(rope_type="yarn", factor=0)), ("yarn", "factor", "0")),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=2))), ("rope_parameters",)),
    (dict(quantization_config="fp8"), ("quantization_config", "fp8"))])
def test_refused_configs(changes, words, tmp_path):
    """Text from a model that this code computes wrongly, or a refusal that does not say why (rows 25 to 29)."""
    not_loaded(write_config(tmp_path, **changes), str(tmp_path / "config.json"), *words)


def damaged(cut):
    """A folder's spoiler: model.safetensors with its bytes cut up."""
    return lambda f: (make_folder(f) / M.SINGLE).write_bytes(cut((f / M.SINGLE).read_bytes()))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 4242\n"
BAD_FOLDERS = {                                      # id: (what makes the folder, words of the refusal)
    "no config": (lambda f: None, ("config.json", "missing")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "list")),
    "no weights": (write_config, (M.SINGLE, M.INDEX)),
    "row 5, tensor, row 3": (lambda f: edit_index(make_folder(f, lambda t: t.pop(HEAD), 2, tie_word_embeddings=False),
                                                  {HEAD: SHARD}), (M.INDEX, HEAD, SHARD)),
    "row 5, shard": (lambda f: (make_folder(f, shards=2) / SHARD).unlink(), (M.INDEX, SHARD, "model.")),
    "index {}": (lambda f: (write_config(f) / M.INDEX).write_text("{}"), (M.INDEX, "weight_map")),
    "index {": (lambda f: (write_config(f) / M.INDEX).write_text("{"), (M.INDEX, "JSON")),
    "row 11, files": (lambda f: (write_config(f) / "consolidated.00.pth").write_text(""), ("consolidated", M.SINGLE)),
    "row 11, names": (lambda f: make_folder(f, rename("self_attn.q_proj", "attention.wq")), (M.SINGLE, "wq", "q_proj")),
    "row 12": (lambda f: make_folder(f, put(Q, lambda t: t[Q][:1]), head_dim=16), (M.SINGLE, Q, "(1, 32)", "(64, 32)")),
    "row 13, a bias": (lambda f: make_folder(f, lambda t: t.pop(Q[:-6] + "bias"), model_type="qwen2"),
                       ("missing", "layers.0.self_attn.q_proj.bias")),
    "row 13, too few": (lambda f: make_folder(f, lambda t: t.pop("model.norm.weight")), ("missing", "norm.weight")),
    "row 13, too many": (lambda f: make_folder(f, put("model.extra", lambda t: torch.ones(8))), ("not used", "extra")),
    "row 16": (lambda f: (make_folder(f) / M.SINGLE).write_text(POINTER), (M.SINGLE, "run git lfs pull")),
    "row 16, sharded": (lambda f: (make_folder(f, shards=2) / SHARD).write_text(POINTER), (SHARD, "run git lfs pull")),
    **{f"row 23, {shard!r}": (lambda f, shard=shard: edit_index(make_folder(f, shards=2), {EMBED: shard}),
                              (M.INDEX, repr(shard), "outside the folder"))
       for shard in ("/etc/hosts", "../model.safetensors", "a/../../model.safetensors", "..\\model.safetensors", 7)},
    **{f"row 24, {what}": (damaged(cut), (M.SINGLE, "truncated")) for what, cut in {
        "empty": lambda b: b"", "5 bytes": lambda b: b[:5], "100 bytes": lambda b: b[:100],
        "a byte short": lambda b: b[:-1], "no header": lambda b: b"\xff" * 4096,
        "mangled header": lambda b: b[:8] + b"{" + b[9:30] + b"\n\n" + b[32:],
    }.items()},
}


@pytest.mark.parametrize("spoil, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(spoil, words, tmp_path):
    """Another file read, a parameter left as it was allocated, or a traceback where a sentence would do."""
    spoil(tmp_path)
    not_loaded(tmp_path, str(tmp_path), *words)


def test_no_folder(tmp_path):
    """A wrong path that is looked up on the hub, or ends in a traceback."""
    for path in (tmp_path / "nowhere", write_config(tmp_path) / "config.json", "just-a-name", "./own/name"):
        not_loaded(path, str(path), "is no folder")


def test_duplicates_beside_the_real_files(tmp_path):
    """A glob that also reads what lies beside the files of the index, or beside model.safetensors (row 15)."""
    want = logits(make_folder(tmp_path))
    wrong = {name: t + 1 for name, t in load_file(tmp_path / M.SINGLE).items()}
    (tmp_path / "original").mkdir()
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors", "original/model.safetensors"):
        save_file(wrong, tmp_path / name)
    assert torch.equal(logits(tmp_path), want)
    save_file(wrong, make_folder(tmp_path, shards=3) / M.SINGLE)
    assert torch.equal(logits(tmp_path), want)


def test_biases_that_only_the_file_knows(tmp_path):
    """Biases dropped since the config says nothing about them (row 13)."""
    want = logits(make_folder(tmp_path, attention_bias=True, mlp_bias=True))
    assert torch.equal(logits(write_config(tmp_path)), want)
    block, stored = M.Llama.from_pretrained(tmp_path).layers[0], load_file(tmp_path / M.SINGLE)
    for ours, theirs in ((block.qkv.bias[:32], "self_attn.q_proj"), (block.out.bias, "self_attn.o_proj"),
                         (block.gate_up.bias[48:], "mlp.up_proj"), (block.down.bias, "mlp.down_proj")):
        assert torch.equal(ours, stored[f"model.layers.0.{theirs}.bias"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes_of_files(dtype, tmp_path):
    """Stored bits that are misread, or rounded on the way (row 17)."""
    make_folder(tmp_path, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}))
    stored = load_file(tmp_path / M.SINGLE)
    for want in (torch.float32, torch.bfloat16):
        model = M.Llama.from_pretrained(tmp_path, dtype=want)
        assert {p.dtype for p in model.parameters()} == {want} and not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model.embed.weight, stored[EMBED].to(want))
        assert torch.equal(model.layers[0].qkv.weight[:32], stored[Q].to(want))


def test_no_second_copy_while_loading(tmp_path, monkeypatch):
    """A loader that reads the whole file before it fills, or that fills a random model on its way (row 17)."""
    make_folder(tmp_path)
    real_open, real_empty, given = M.open_tensors, M.Llama.to_empty, []

    def watched_open(path):
        handle = real_open(path)

        def get_tensor(name):
            assert not any(ref() is not None for ref in given), f"{name} is read while an earlier tensor is held"
            tensor = handle.get_tensor(name)
            given.append(weakref.ref(tensor))
            return tensor
        return SimpleNamespace(keys=handle.keys, get_slice=handle.get_slice, get_tensor=get_tensor)

    def to_empty(self, *args, **kwargs):
        assert all(p.is_meta for p in self.parameters()), "parameters had memory before their file was read"
        return real_empty(self, *args, **kwargs)

    monkeypatch.setattr(M, "open_tensors", watched_open)
    monkeypatch.setattr(M.Llama, "to_empty", to_empty)
    M.Llama.from_pretrained(tmp_path)
    assert len(given) == len(load_file(tmp_path / M.SINGLE))


@pytest.mark.parametrize("key", ("torch_dtype", "dtype", "neither"))
def test_which_dtype(key, tmp_path):
    """bf16 at a crawl on a CPU; an answer other than --dtype, else the config's, else the tensors' own (row 18)."""
    make_folder(tmp_path, lambda t: t.update({n: x.half() for n, x in t.items()}), **{key: "bfloat16"})
    config = M.read_config(tmp_path)
    files = M.find_tensors(tmp_path, config)
    assert M.pick_dtype(config, files, "cuda") == (torch.float16 if key == "neither" else torch.bfloat16)
    assert M.Llama.from_pretrained(tmp_path).dtype == torch.float32
    assert M.Llama.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_too_little_memory(tmp_path, monkeypatch):
    """A kill by the kernel instead of a sentence with the bytes (row 18)."""
    with pytest.raises(M.UserError, match=r"1048576\.0 GiB as float32, cpu has .* GiB free; --dtype bfloat16 halves"):
        M.check_memory(2**50, "cpu", torch.float32)
    with pytest.raises(M.UserError, match=r"1048576\.0 GiB as bfloat16, cpu has [\d.]+ GiB free$"):
        M.check_memory(2**50, "cpu", torch.bfloat16)
    asked = []
    monkeypatch.setattr(M, "check_memory", lambda *args: asked.append(args))
    stored = sum(t.numel() for t in load_file(make_folder(tmp_path) / M.SINGLE).values())
    M.Llama.from_pretrained(tmp_path)
    M.Llama.from_pretrained(tmp_path, dtype=torch.float16)
    assert asked == [(4 * stored, "cpu", torch.float32), (2 * stored, "cpu", torch.float16)]


# ---------------------------------------------------------------------------------------------------------- hub names

def fake_hub(monkeypatch, folder, error=None):
    """hf_hub_download that serves a local folder; returns the list of the names it is asked for."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, name, **options):
        assert repo == "owner/name"
        asked.append(name)
        if not os.path.exists(folder / name):
            raise error or hub.errors.EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("shards", (0, 2))
def test_hub_fetches_only_what_is_read(shards, tmp_path, monkeypatch):
    """All formats of a repository downloaded, original/ too; a path with .. refused only when fetched (row 23)."""
    make_folder(tmp_path, shards=shards)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("")
    asked = fake_hub(monkeypatch, tmp_path)
    assert M.Llama.from_pretrained("owner/name").name == "owner/name"
    weights = {f.name for f in tmp_path.glob("model-*.safetensors")} or {M.SINGLE}
    assert sorted(asked) == sorted(weights | {"config.json", "generation_config.json", "tokenizer.json", M.INDEX,
                                              "tokenizer_config.json", "chat_template.jinja"})
    edit_index(tmp_path, {EMBED: "../model.safetensors"})
    not_loaded("owner/name", M.INDEX, "outside the folder")
    assert "../model.safetensors" not in asked


def test_hub_failures(tmp_path, monkeypatch):
    """A network library's traceback, or forty lines of it, for a name that cannot be fetched."""
    errors = pytest.importorskip("huggingface_hub.errors")
    for error in (errors.LocalEntryNotFoundError("no connection\nand more"), OSError(), ValueError("bad name"),
                  type("ReadTimeout", (Exception,), {})("too slow"), errors.OfflineModeIsEnabled("offline")):
        fake_hub(monkeypatch, tmp_path, error)
        not_loaded("owner/name", "owner/name", "config.json", "hub", (str(error) or "OSError").splitlines()[0])
    fake_hub(monkeypatch, tmp_path)
    not_loaded("owner/name", "owner/name", "config.json")


def test_hub_offline(tmp_path, monkeypatch, capsys):
    """A cached model that cannot be opened offline, since a file that its repository never had is not in the cache."""
    error = pytest.importorskip("huggingface_hub.errors").LocalEntryNotFoundError("no connection")
    fake_hub(monkeypatch, make_folder(tmp_path), error)
    assert M.Llama.from_pretrained("owner/name").config.vocab_size == 40
    assert "tokenizer.json is not in its cache" in capsys.readouterr().err
    (tmp_path / M.SINGLE).unlink()
    not_loaded("owner/name", M.SINGLE, "no connection")


# ----------------------------------------------------------------------------------------------------- forward passes

def test_right_padding(tmp_path):
    """Padding that is seen by, or remembered for, the shorter rows of a batch."""
    model = M.Llama.from_pretrained(make_folder(tmp_path))
    tokens, lengths, more = torch.randint(40, (3, 13)), torch.tensor([5, 13, 1]), torch.randint(40, (3, 4))
    cache = DenseCache(model, 3)
    plain, cached, after = model(tokens, lengths=lengths), model(tokens, cache, lengths), model(more, cache)
    for b, n in enumerate(lengths.tolist()):
        alone = model(torch.cat((tokens[b:b + 1, :n], more[b:b + 1]), dim=1))[0]
        for got, want in ((plain[b, :n], alone[:n]), (cached[b, :n], alone[:n]), (after[b], alone[n:])):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the page

HOSTILE = ["</script><b>", "<!--<script>", "\u2028\u2029", "a\nb", " &amp;\"'`${x}\\", "", "\ud800", "\ufffd"]


def page_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def page_of(L=2, Hkv=3, pieces=HOSTILE, title="tiny, gates.safetensors", seed=0):
    admitted = torch.rand(L, Hkv, len(pieces), generator=torch.Generator().manual_seed(seed)) < 0.4
    return kept_page(pieces, admitted, 4, 0.1, title, 0.25), admitted


def test_the_page_needs_nothing_from_outside():
    """A page that loads a font or a script does not open offline, and tells others what was read."""
    page, _ = page_of(pieces=["plain", " text"])
    assert not re.search(r"//\w|\b(src|import|fetch|url)\b\s*[=(]|<link|<img|@import", page)


def test_no_token_and_no_title_can_break_out():
    """What the browser runs must be the same for a hostile prompt as for a harmless one, and the text must survive."""
    hostile, _ = page_of(title="<img onerror=x>\"'")
    harmless, _ = page_of(pieces=["a"] * len(HOSTILE), title="TITLE")
    assert page_data(hostile)["pieces"] == HOSTILE
    data = re.search(r'application/json">(.*?)</script>', hostile, re.S)[1]
    assert "<" not in data and data.isascii()
    outside = [re.sub(r'(application/json">).*?(</script>)', r"\1\2", page, flags=re.S) for page in (hostile, harmless)]
    assert outside[0] == outside[1]
    hostile.replace("\ud800", "").encode("utf-8")


@pytest.mark.parametrize("L, Hkv", [(1, 1), (2, 4), (3, 3), (32, 8)])       # 1, 8, 9 and 256 heads: padded and not
def test_the_bits_are_what_was_admitted(L, Hkv):
    """A bit in the wrong place shows another head's admissions."""
    page, admitted = page_of(L, Hkv)
    data = page_data(page)
    packed, S = base64.b64decode(data["bits"]), len(data["pieces"])
    row = len(packed) // S
    assert row == -(-L * Hkv // 8)
    bits = [[packed[t * row + n // 8] >> n % 8 & 1 for t in range(S)] for n in range(L * Hkv)]
    assert torch.equal(torch.tensor(bits).view(L, Hkv, S).bool(), admitted)


# --------------------------------------------------------------------------------------------- the programs: fixtures

TINY_FOLDER = generate.HERE / "tiny"
STORY = (TINY_FOLDER / "example.txt").read_text()


@pytest.fixture(scope="module")
def tiny():
    """The bundled model and its text side."""
    return Llama.from_pretrained(str(TINY_FOLDER)), Text(str(TINY_FOLDER))


@pytest.fixture
def prompt(tmp_path_factory):
    """A short prompt, in a folder of its own."""
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(STORY[:700] + "\n")
    return str(path)


def copy_text_files(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY_FOLDER / name).read_bytes())


# ------------------------------------------------------------------------------------------- text, prompts and answers

def test_the_main_job_answers_from_what_was_kept_and_a_window_alone_cannot(capsys):
    """The promise of the README: a fact far outside the window is recalled from a small share of the cache."""
    assert generate.main(["--max-new-tokens", "24", "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(err.splitlines()[-1])
    assert "2954" in out and figures["prompt_tokens"] > 3000 and figures["kept_share"] < 0.25
    assert generate.main(["--max-new-tokens", "24", "--admit", "none", "--device", "cpu"]) == 0
    assert "2954" not in capsys.readouterr().out


def test_json_has_the_promised_keys_and_is_the_last_line(capsys, prompt):
    """Programs read this line: a missing or renamed key breaks them."""
    assert generate.main(["--prompt", prompt, "--max-new-tokens", "2", "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert set(figures) == set("prompt_tokens new_tokens first_use_s prefill_s decode_s kept_share kept_bytes "
                               "dense_bytes peak_bytes model gates device dtype seed".split())
    assert figures["dense_bytes"] == 2 * 8 * 4 * 32 * 4 * (figures["prompt_tokens"] + figures["new_tokens"] - 1)


def test_chunks_batches_and_standard_input_change_nothing(capsys, monkeypatch, tmp_path):
    """How a text comes in (whole, in chunks, piped, with others in a batch) must not change what is said."""
    texts = [STORY[-900:], STORY[-2400:-1200], STORY[:500]]
    files = [str(tmp_path / f"{n}.txt") for n in range(3)]
    said = []
    for file, text in zip(files, texts):
        Path(file).write_text(text)
        assert generate.main(["--prompt", file, "--max-new-tokens", "12", "--device", "cpu"]) == 0
        said.append(capsys.readouterr().out)
    for chunk in ("7", "64"):
        argv = ["--prompt", files[0], "--max-new-tokens", "12", "--chunk", chunk, "--device", "cpu"]
        assert generate.main(argv) == 0
        assert capsys.readouterr().out == said[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts[0].encode())))
    assert generate.main(["--prompt", "-", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == said[0]
    assert generate.main(["--prompt", *files, "--max-new-tokens", "12", "--chunk", "100", "--device", "cpu"]) == 0
    together = capsys.readouterr().out
    assert together == "".join(f"==> {file} <==\n{text}" for file, text in zip(files, said))


def test_interactive_turns_share_one_cache(capsys, monkeypatch, tiny):
    """A second turn must find what the first left: equal to one conversation read at once."""
    model, text = tiny
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the code of Silas?\n\nWhat is the code of Clara?\n"))
    assert generate.main(["--interactive", "--max-new-tokens", "16", "--admit", "all", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    conversation = STORY.rstrip("\n")
    for line, question in zip(lines, ("What is the code of Silas?", "What is the code of Clara?", None)):
        ids = list(generate.decode(model, kv := DenseCache(model, 1),
                                   generate.prefill(model, kv, [text.encode(conversation)]), 16, text.end))
        said = text.tokenizer.decode([i for i, in ids], skip_special_tokens=False)
        assert said.replace("<|end|>", "").strip() == line.strip()
        conversation += f"{said}\n\n{question}"


def test_a_chat_turn_is_what_the_template_says(tiny):
    """One begin token, the end token between turns once, and only what is new is read in a later turn."""
    _, text = tiny
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "Three?"}]
    assert text.encode(text.chat(messages[:1])).count(text.begin[0]) == 1
    assert text.next_turn(messages) == "<|end|>\n\nThree?"


@pytest.mark.parametrize("where", ["jinja file", "named list", "string", "nowhere", "broken", "raises", "escapes"])
def test_chat_templates_are_found_and_sandboxed(tmp_path, where):
    """loader.md 22 and 31: a template in its own file, in a list of named ones; it is code, and may not get out."""
    copy_text_files(tmp_path)
    good = "{{ bos_token }}[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    template = {"jinja file": None, "nowhere": None, "string": good, "broken": "{% if %}",
                "named list": [{"name": "tool", "template": "no"}, {"name": "default", "template": good}],
                "raises": "{{ raise_exception('no system turns') }}",
                "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}[where]
    if where == "jinja file":
        (tmp_path / "chat_template.jinja").write_text(good)
    settings = {"bos_token": {"content": "<|begin|>"}, **({"chat_template": template} if template else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = Text(str(tmp_path))
    if where in ("jinja file", "named list", "string"):
        assert text.chat([{"role": "user", "content": "hi"}]) == "<|begin|>[hi]>"
        assert text.encode("<|begin|>[hi]>").count(0) == 1
    else:
        with pytest.raises(UserError, match="chat template"):
            text.chat([{"role": "user", "content": "hi"}])


def test_end_tokens_are_the_union_and_the_begin_token_is_the_tokenizers(tmp_path):
    """loader.md 19 and 20: an end token only in generation_config.json; a begin id that no post-processor adds."""
    copy_text_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert Text(str(tmp_path)).end == {5, 9}
    assert Text(str(tmp_path)).encode("a")[0] == 0
    bare = json.loads((tmp_path / "tokenizer.json").read_text())
    bare["post_processor"], bare["truncation"] = None, dict(max_length=3, strategy="LongestFirst", stride=0,
                                                            direction="Right")
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    text = Text(str(tmp_path))
    assert text.begin == [] and len(text.encode("a long text that a saved truncation would cut")) > 3


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    """loader.md 21: only tokenizer.model, and how to convert it; no tokenizer at all; one that is not a tokenizer."""
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        Text(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(UserError, match="no tokenizer.json; to convert it: python -c"):
        Text(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        Text(str(tmp_path))


@pytest.mark.parametrize("written", ["a \N{GRINNING FACE} face", " leading space", "na\u00efve caf\u00e9",
                                     "\u4f60\u597d", "a\n\n b"])
def test_streamed_pieces_make_the_text_and_never_half_a_character(tiny, written):
    """A character of four bytes comes in several tokens: nothing may be shown before it is whole."""
    _, text = tiny
    context = text.encode("The text is:")
    ids = text.encode(written, begin=False)
    stream = TextStream(text, context)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == written
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streams_survive_bytes_that_are_no_text(tiny):
    """Invalid bytes, and an end in the middle of a character, are shown as replacement characters, and do not block."""
    _, text = tiny
    face = text.encode("\N{GRINNING FACE}", begin=False)
    assert len(face) > 1
    stream = TextStream(text)
    shown = "".join(map(stream.push, [*face[1:2] * 12, *text.encode(" and on", begin=False)])) + stream.flush()
    assert shown.endswith(" and on") and "\N{REPLACEMENT CHARACTER}" in shown
    stream = TextStream(text)
    assert stream.push(face[0]) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_sampling_follows_seed_temperature_and_top_p():
    """A wrong top-p keeps a token too many or too few; a seed that is not used makes runs differ."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    share = torch.bincount(sampler(1.0, 1.0, 0, "cpu")(logits), minlength=4) / 4000
    assert (share - logits[0].exp()).abs().max() < 0.03
    assert set(sampler(1.0, 0.7, 0, "cpu")(logits).tolist()) == {0, 1}
    assert set(sampler(1.0, 0.4, 0, "cpu")(logits).tolist()) == {0}
    assert set(sampler(0.01, 1.0, 0, "cpu")(logits).tolist()) == {0}
    assert torch.equal(sampler(1.0, 1.0, 3, "cpu")(logits), sampler(1.0, 1.0, 3, "cpu")(logits))


def test_finished_sequences_stop_and_leave_the_others_alone(tiny):
    """In a batch each sequence ends on its own; what it would have said next must not be given or remembered."""
    model, text = tiny
    prompts = [text.encode("It was a dark night."), text.encode("He said that he would")]
    kv = DenseCache(model, 2)
    first = list(generate.decode(model, kv, generate.prefill(model, kv, prompts), 12))
    stop = first[3][0]
    kv = DualCache(model, RandomAdmission(1.0), 2, 4)
    seen = list(generate.decode(model, kv, generate.prefill(model, kv, prompts), 12, {stop}))
    ends = next(n for n, ids in enumerate(seen) if ids[0] == stop)
    assert all(ids[0] is None for ids in seen[ends + 1:])
    assert [ids[1] for ids in seen] == [ids[1] for ids in first][:len(seen)]
    assert int(kv.seen[0]) == len(prompts[0]) + ends and len(seen) > ends + 1


# ----------------------------------------------------------------------------------------------------------- bad input

BAD_ARGUMENTS = [
    (["--prompt", "nowhere.txt"], "nowhere.txt"), (["--prompt", "EMPTY"], "is empty"), (["--prompt", "LATIN"], "UTF-8"),
    (["--prompt", "FOLDER"], "FOLDER"), (["--model", "nowhere/at/all"], "nowhere/at/all"),
    (["--model", "EMPTYFOLDER"], "is missing"), (["--gates", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--gates", "GARBAGE"], "cannot be read"), (["--gates", "OTHER"], "these gates are for"),
    (["--admit", "some"], "--admit some"), (["--admit", "1.5"], "--admit 1.5"), (["--admit", "-0.1"], "--admit -0.1"),
    (["--admit", "nan"], "--admit nan"), (["--tau", "1.5"], "--tau 1.5"), (["--tau", "-1"], "--tau -1"),
    (["--tau", "much"], "--tau"), (["--top-p", "0"], "--top-p"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"), (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--chunk", "0"], "--chunk"), (["--dtype", "int8"], "--dtype"), (["--device", "tpu"], "--device tpu"),
    (["--device", "mps"], "--device mps"), (["--show-kept", "no/such/folder/x.html"], "no/such/folder"),
    (["--show-kept", "x.html", "--dense"], "--show-kept"), (["--interactive", "--prompt", "-"], "--interactive"),
    (["--dense", "--tau", "0.5"], "--dense"), (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize("argv, names", BAD_ARGUMENTS, ids=[" ".join(argv) for argv, _ in BAD_ARGUMENTS])
def test_bad_input_is_one_line_and_status_2(argv, names, tmp_path, capsys, monkeypatch):
    """A mistake gives one line that names it: no traceback, nothing on stdout, nothing half-written."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("EMPTY", b" \n"), ("LATIN", "caf\u00e9".encode("latin-1")), ("GARBAGE", b"\x08" * 100)):
        Path(name).write_bytes(data)
    Path("FOLDER").mkdir()
    Path("EMPTYFOLDER").mkdir()
    if "OTHER" in argv:
        other = Llama(Config(num_layers=2, head_dim=16)).eval()
        Gates(2, 4, 16).save("OTHER", other)
    before = sorted(tmp_path.rglob("*"))
    assert generate.run_program(generate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and names in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_is_not_there_is_said(capsys, monkeypatch):
    """Asked for a GPU, the program must not fall back in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate.run_program(generate.main, ["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_model_without_gates_says_what_to_do(capsys, tmp_path):
    """Without gates there is nothing to admit by: the way out must be in the message."""
    for file in TINY_FOLDER.glob("*"):
        if file.suffix in (".json", ".safetensors") and not file.name.startswith("gates"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert generate.run_program(generate.main, ["--model", str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "--gates" in err and "train.py" in err and err.count("\n") == 1


def test_a_prompt_longer_than_the_training_warns_and_goes_on(capsys, tmp_path):
    """Beyond its positions a model gets worse, not wrong: both numbers are said, and the answer still comes."""
    (tmp_path / "long.txt").write_text(STORY * 3)
    argv = ["--prompt", str(tmp_path / "long.txt"), "--max-new-tokens", "1", "--admit", "0.1", "--device", "cpu"]
    assert generate.main(argv) == 0
    positions = Llama.from_pretrained(str(TINY_FOLDER)).config.max_positions
    err = capsys.readouterr().err
    assert err.startswith("warning: up to 11,1") and f"{positions:,}" in err.splitlines()[0]


def test_ctrl_c_ends_with_the_statistics(capsys, monkeypatch, prompt):
    """Whoever stops a long answer still wants the figures, and no traceback."""
    def interrupted(*args, **kwargs):
        yield [100]
        raise KeyboardInterrupt
    monkeypatch.setattr(generate, "decode", interrupted)
    assert generate.main(["--prompt", prompt, "--device", "cpu"]) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err and "kept" in err and "(1 tokens)" in err


def test_a_closed_pipe_is_no_traceback(prompt):
    """`python generate.py | head -c 1` must end in silence, but for the statistics."""
    run = subprocess.run(f"{sys.executable} generate.py --prompt {prompt} --max-new-tokens 40 --device cpu | head -c 1",
                         shell=True, capture_output=True, text=True, cwd=generate.HERE)
    assert len(run.stdout) == 1 and "Traceback" not in run.stderr and "kept" in run.stderr, run.stderr


def test_the_real_program_from_another_folder(tmp_path, prompt):
    """The files must find each other whatever the working directory, and errors reach the shell as status 2."""
    run = subprocess.run([sys.executable, str(generate.HERE / "generate.py"), "--prompt", prompt, "--max-new-tokens",
                          "3", "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "tokens/s" in run.stderr and "Error" not in run.stderr, run.stderr
    run = subprocess.run([sys.executable, str(generate.HERE / "generate.py"), "--prompt", "no.txt"],
                         capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "") and run.stderr.startswith("generate.py: ")


def test_show_kept_writes_one_page(capsys, tmp_path, prompt):
    """The page must hold the prompt's own text and the cache's own admissions."""
    page = tmp_path / "kept.html"
    argv = ["--prompt", prompt, "--max-new-tokens", "1", "--show-kept", str(page), "--device", "cpu"]
    assert generate.main(argv) == 0
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text()).group(1))
    assert "".join(data["pieces"][1:]) == Path(prompt).read_text().rstrip("\n")
    assert list(tmp_path.iterdir()) == [page]


# ------------------------------------------------------------------------------------------------- tasks and training

def test_documents_come_from_their_seed_and_hold_their_answers(tiny):
    """A document whose answer is not in its text, or whose answer's tokens are marked wrongly, teaches nonsense."""
    _, text = tiny
    haystack = tasks.Haystack(STORY * 3)
    for task, tokens in itertools.product(tasks.MAKERS, (256, 1024)):
        one, two = (tasks.make(task, haystack, tokens, text.tokenizer.encode, random.Random(7)) for _ in range(2))
        document, ids, answer = one
        assert one == two and len(ids) <= tokens and text.tokenizer.encode(document.text).ids == ids
        marked = text.tokenizer.decode([i for i, a in zip(ids, answer) if a], skip_special_tokens=False)
        assert marked == "".join(a for _, a in document.questions)
        for question, said in document.questions:
            assert tasks.correct(task, said, said) == 1 and tasks.correct(task, said, " No idea.") < 0.2
            value = said.removesuffix(tasks.END).rstrip(".").split()[-1]
            assert value in document.body and question.startswith("\n\n")


@pytest.fixture
def trainee(tmp_path):
    """What main needs to train a small random model for six steps; its folder, its text and what it writes."""
    model = make_folder(tmp_path, vocab_size=4096, max_position_embeddings=1024)
    copy_text_files(model)
    (tmp_path / "story.txt").write_text(STORY)
    return ["--model", str(model), "--data", str(tmp_path / "story.txt"), "--seq-len", "256,512", "--tokens-per-step",
            "1024", "--steps", "6", "--window", "32", "--device", "cpu"]


def same_gates(one, two, tolerance=0.0):
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) <= tolerance


def read_log(path):
    return [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]


def test_training_writes_gates_that_fit_and_repeat(tmp_path, capsys, monkeypatch, prompt):
    """Two runs from one seed must give the same gates; --data must be used; the recipe must be in the file."""
    monkeypatch.setattr(train, "final_table", lambda *a: print("table"))
    common = ["--steps", "2", "--seq-len", "256", "--tokens-per-step", "512", "--device", "cpu", "--window", "32"]
    for n in (1, 2):
        out = str(tmp_path / f"{n}.safetensors")
        assert train.main([*common, "--data", str(TINY_FOLDER / "example.txt"), "--out", out]) == 0
    same_gates(tmp_path / "1.safetensors", out)
    printed, err = capsys.readouterr()
    assert printed == "table\n" * 2 and "step 2/2, soft " in err and "hard " in err and "admitted " in err
    recipe = json.loads(safe_open(out, "pt").metadata()["recipe"])
    assert recipe == {**json.loads(json.dumps(vars(train.BUNDLED))), "steps": 2, "seq_len": [256],
                      "tokens_per_step": 512, "window": 32}
    assert f"recipe: {json.dumps(recipe)}\n" in err and "memory: weights 0.03 GiB" in err
    assert generate.main(["--prompt", prompt, "--gates", out, "--max-new-tokens", "1", "--device", "cpu"]) == 0


def test_the_log_has_every_step_and_ends_with_the_validation(trainee, tmp_path, capsys):
    """A log that loses a step, or a validation whose shares by head or by size of g do not add up to the whole."""
    assert train.main([*trainee, "--out", str(tmp_path / "g")]) == 0
    *steps, last = read_log(tmp_path / "g")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line, hard in zip(steps, (True, False, False, False, False, True), strict=True):
        assert abs(line["loss"] - line["soft"] - train.PAPER.lam * line["cost"]) < 1e-6
        assert (line["hard"] is not None) == hard
        assert line["seconds"] * line["tokens_per_s"] == pytest.approx(1024) and line["length"] in (256, 512)
        assert 0 <= line["admitted"] <= 1 and line["gradient"] > 0
    v = last["validation"]
    heads = torch.tensor(v["heads"])
    assert heads.shape == (2, 2) and heads.mean().item() == pytest.approx(v["admitted"])
    assert v["samples"] == 16 and len(v["histogram"]) == 10 and sum(v["histogram"]) == pytest.approx(1)
    assert v["admitted"] >= sum(v["histogram"][1:]) - 1e-6 and v["soft"] > 0 and v["hard"] >= 0
    out, err = capsys.readouterr()
    assert out == "" and "validation: soft " in err                    # no table: a random model recalls nothing
    assert not (tmp_path / "g.resume").exists()


def alike(ids):
    """A sample of train.py whose tokens weigh 1 each."""
    return torch.tensor(ids), torch.ones(len(ids))


def test_training_lowers_what_it_is_asked_to_lower(tiny):
    """With lambda large the gates close; with lambda 0 and closed gates they open where keys are missed."""
    model, text = tiny
    ids = text.encode(STORY)[:300]
    for lam, closed, sign in ((5.0, False, -1), (0.0, True, 1)):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        with torch.no_grad():
            for gate in gates.layers:
                gate.b2.fill_(-3.0 if closed else 1.0)
        def mean_gate():
            with torch.no_grad():
                return train.distill(model, gates, [alike(ids)])[3][0].mean().item()
        before = mean_gate()
        recipe = train.Recipe(lr=3e-3, steps=8, tokens_per_step=300, seq_len=(300,), lam=lam)
        samples, optimizer = train.Samples(lambda rng, n: alike(ids), recipe), torch.optim.AdamW(gates.parameters())
        assert train.train(model, gates, optimizer, samples, recipe) == (8, None)
        assert sign * (mean_gate() - before) > 0.01


def test_checkpointed_layers_give_the_same_gradients(tiny):
    """Gates of the second run of a layer in the place of the first's; a gradient that does not get through."""
    model, text = tiny
    ids, found = text.encode(STORY)[:300], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        soft, _, cost, _ = train.distill(model, gates, [alike(ids)], checkpoint)
        (soft + cost).backward()
        found.append([p.grad for p in gates.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_the_second_run_of_a_layer_leaves_nothing_behind(tiny):
    """Gates of the second run kept, and with them all that led to them: twice the memory, of all layers at once."""
    model, text = tiny
    gates, ids = Gates.for_model(model, window=16), torch.tensor([text.encode(STORY)[:100]])
    student = SoftAttention(gates, model.device)
    hidden = model(ids, student, checkpoint=True)
    first = dict(student.g)
    (hidden.sum() + sum(g.sum() for g in first.values())).backward()
    assert len(first) == model.config.num_layers and all(student.g[layer] is g for layer, g in first.items())


def test_a_step_is_the_mean_of_its_samples(tiny):
    """Gradients that grow with the samples of a step: AdamW hides it, until it meets the weight decay or a log."""
    model, text = tiny
    ids, lines = text.encode(STORY)[:256], []
    for rows in (1, 3):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        recipe = train.Recipe(steps=1, tokens_per_step=256 * rows, seq_len=(256,))
        samples, optimizer = train.Samples(lambda rng, n: alike(ids), recipe), torch.optim.AdamW(gates.parameters())
        train.train(model, gates, optimizer, samples, recipe, log=lines.append)
    for key in ("gradient", "loss", "soft", "hard", "cost", "admitted"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-4)


def test_answers_weigh_more(tiny):
    """A weight that lands on the wrong tokens, is lost among padding, or changes the size of the loss."""
    model, text = tiny
    haystack, recipe = tasks.Haystack(STORY), train.Recipe(answer_weight=7.0, tasks="asked")
    ids, weights = train.task_samples(haystack, text.tokenizer.encode, recipe)(random.Random(1), 400)
    assert set(weights.tolist()) == {1.0, 7.0} and "." in text.decode(ids[weights == 7].tolist())
    gates = Gates.for_model(model, window=16)
    with torch.no_grad():
        for gate in gates.layers:
            gate.b2.fill_(-3.0)
        student, teacher = model(ids[None], SoftAttention(gates, model.device)), model(ids[None])
        wanted = sum(w * (a - b).square().mean() for w, a, b in zip(weights, student[0], teacher[0])) / weights.sum()
        soft = train.distill(model, gates, [(ids, weights)])[0]
        both = train.distill(model, gates, [(ids, weights), alike(ids[:300].tolist())])[0]
        other = train.distill(model, gates, [alike(ids[:300].tolist())])[0]
    assert soft == pytest.approx(wanted.item(), rel=1e-4) and both == pytest.approx((soft + other).item() / 2, rel=1e-4)


def test_samples_side_by_side(tiny):
    """Padding that is seen, or that counts; a last, smaller group that weighs as much as the others."""
    model, text = tiny
    ids, lines, trained = text.encode(STORY), [], []
    for at_once in (1, 2, 3):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        recipe = train.Recipe(steps=1, tokens_per_step=3 * 256, seq_len=(256,))
        samples = train.Samples(lambda rng, n: alike(ids[:rng.randint(60, 256)]), recipe)
        train.train(model, gates, torch.optim.AdamW(gates.parameters()), samples, recipe, how={256: (at_once, False)},
                    log=lines.append)
        trained.append(torch.cat([p.detach().flatten() for p in gates.parameters()]))
    for other in (1, 2):
        for key in ("gradient", "loss", "soft", "hard", "cost", "admitted"):
            assert lines[0][key] == pytest.approx(lines[other][key], rel=1e-4)
        torch.testing.assert_close(trained[0], trained[other], rtol=1e-4, atol=1e-5)


def test_the_plan_of_the_paper_and_others():
    """Lengths in other shares than asked for; a sample used twice or left out; a step of too few tokens."""
    lengths = [length for length, _, _ in train.plan(train.PAPER)]
    assert [lengths.count(n) for n in train.PAPER.seq_len] == [4000, 2000, 1000, 500]
    assert lengths[:100] != sorted(lengths[:100])
    for recipe in (train.PAPER, train.BUNDLED, train.Recipe(seq_len=(300, 700, 1000), tokens_per_step=2500, steps=77)):
        steps, samples = train.plan(recipe), 0
        for length, first, rows in steps:
            assert first == samples and recipe.tokens_per_step <= rows * length < recipe.tokens_per_step + length
            samples += rows
        assert len(steps) == recipe.steps
    per_length = {n: sum(rows for length, _, rows in steps if length == n) for n in (300, 700, 1000)}
    assert per_length[300] / per_length[700] == pytest.approx(7 / 3, rel=0.15)
    rates = [train.learning_rate(train.PAPER, step) for step in range(7500)]
    assert max(rates) == rates[749] == 1e-3 and rates[0] == pytest.approx(1e-3 / 750) and 0 < rates[-1] < 1e-9
    assert rates[4125] == pytest.approx(5e-4)


def test_documents_sentence_by_sentence(tiny):
    """make.py's faster way to tokens: others than the tokenizer's, or an answer's tokens taken for prose."""
    tokenizer, haystack = tiny[1].tokenizer, tasks.Haystack(STORY)
    encode = Sentences(tokenizer, haystack)
    for n, task in enumerate([*tasks.MAKERS] * 4):
        _, *want = tasks.make(task, haystack, 400, tokenizer.encode, random.Random(n))
        _, *got = tasks.make(task, haystack, 400, encode, random.Random(n))
        assert got == want, task
    assert len(encode.known) > 50


def test_documents_of_many_lengths(tiny):
    """One length for a stage that asks for a range; padding that counts; targets that are not the next tokens."""
    tokenizer, haystack = tiny[1].tokenizer, tasks.Haystack(STORY)
    rows = iter(Documents(haystack, tokenizer.encode, 100, 400, 12, seed=0, mix="asked"))
    ids, targets, weights = next(rows)
    assert ids.shape == targets.shape == weights.shape == (12, 400) and torch.equal(ids[:, 1:], targets[:, :-1])
    lengths = (weights > 0).sum(dim=1)
    assert lengths.min() < 200 and lengths.max() > 300 and len(set(lengths.tolist())) > 6
    for row, weight, n in zip(targets, weights, lengths.tolist()):
        assert weight[:n].all() and not weight[n:].any() and set(weight[:n].tolist()) <= {1.0, ANSWER_WEIGHT}
        assert "\n\nWh" not in tokenizer.decode(row[weight > 1].tolist()) and not row[n:].any()
    assert (weights == ANSWER_WEIGHT).any(dim=1).sum() >= 6


def test_samples_are_stretches_of_one_document(tiny):
    """Text joined across documents; ends that are never drawn; what is held out drawn in training; a lost template."""
    _, text = tiny
    words, rng = STORY.split(), random.Random(0)
    documents = [" ".join(rng.choices(words, k=n)) for n in (50, 300, 400, 500, 900)]
    ids = [text.encode(d, begin=False) for d in documents]
    for chat in (False, True):
        recipe = train.Recipe(seq_len=(256, 512), chat=chat)
        draw, held = train.split_text(documents, text, recipe, "x")
        turn = [dict(role="user", content=f"Please analyze and summarize the following text:\n\n{documents[4]}")]
        head = text.encode(text.chat(turn).partition(documents[4])[0]) if chat else text.begin
        seen = {}
        for n in range(60):
            for length, source in ((256, draw), (512, draw), (256, held)):
                sample = source(random.Random(n), length)[0].tolist()
                assert len(sample) == length and sample[:len(head)] == head
                body = sample[len(head):]
                [place] = [(i, s) for i, d in enumerate(ids) for s in range(len(d) - len(body) + 1)
                           if d[s] == body[0] and d[s:s + len(body)] == body]
                seen.setdefault((length, source is held), set()).add(place)
        used = {key: {i for i, _ in places} for key, places in seen.items()}
        assert len(used[256, True]) == 1 and not used[256, True] & (used[256, False] | used[512, False])
        assert used[256, False] | used[256, True] == {i for i, d in enumerate(ids) if len(d) >= 256 - len(head)}
        assert max(i for i in used[512, False]) == 4 and len(seen[256, False]) > 50
    draw, held = train.split_text([STORY], text, train.Recipe(seq_len=(256,)), "x")
    story = text.encode(STORY, begin=False)
    trained, kept_back = ([next(s for s in range(len(story)) if story[s:s + 255] == sample[1:])
                           for sample in (source(random.Random(n), 256)[0].tolist() for n in range(50))]
                          for source in (draw, held))
    assert max(trained) + 255 <= min(kept_back)                        # the end of an only document is held out


def test_which_files_are_read(tmp_path):
    """A document lost, in a subfolder or a last line; a line of JSON cut at U+2028; another file taken for text."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "2.jsonl").write_text('{"text": "two\u2028lines", "id": 7}\n\n{"text": " "}\n'
                                                      '{"text": "three"}')
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "b" / "x.bin").write_bytes(b"\xff")
    assert train.read_documents(tmp_path) == ["one\n", "two\u2028lines", "three"]
    assert train.read_documents(tmp_path / "1.txt") == ["one\n"]
    for line in ("{", '{"body": "x"}', '["text"]', '{"text": 3}', "7"):
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line)
        refused(lambda: train.read_documents(tmp_path / "bad.jsonl"), "bad.jsonl, line 2", '"text"')


DIES = """
import os, signal, sys, torch, train
real, saved = torch.save, []
def save(state, path):
    real(state, path)
    saved.append(path)
    if len(saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
train.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_gates(trainee, tmp_path, monkeypatch, capsys):
    """Killed while it saves, or stopped with Ctrl-C: half a file read, a sample drawn twice, AdamW begun anew."""
    assert train.main([*trainee, "--out", str(tmp_path / "whole")]) == 0
    out = str(tmp_path / "killed")
    run = subprocess.run([sys.executable, "-c", DIES, *trainee, "--out", out, "--save-every", "2"], cwd=generate.HERE,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert Path(f"{out}.resume.part").exists() and not Path(out).exists() and len(read_log(out)) == 4
    capsys.readouterr()
    assert train.main([*trainee, "--out", out, "--resume"]) == 0
    assert "going on after step 2" in capsys.readouterr().err
    same_gates(tmp_path / "whole", out)

    out, log = str(tmp_path / "stopped"), train.write_log
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_log", lambda path, line: (
            log(path, line), line["step"] == 2 and os.kill(os.getpid(), signal.SIGINT)))
        assert train.main([*trainee, "--out", out]) == 130
    assert "interrupted" in capsys.readouterr().err and Gates.load(out, Llama.from_pretrained(tmp_path)).window == 32
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train.main([*trainee, "--out", out, "--resume"]) == 0
    same_gates(tmp_path / "whole", out)
    for name in ("killed", "stopped"):
        lines = read_log(tmp_path / name)
        assert [line.get("step") for line in lines] == [1, 2, 3, 4, 5, 6, None]
        assert not (tmp_path / f"{name}.resume").exists()


def test_what_resume_refuses(trainee, tmp_path, monkeypatch, capsys):
    """Gates that go on with another model, other text or other settings, or from a file that runs when it is read."""
    out = str(tmp_path / "g")
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *a: exec("raise KeyboardInterrupt"))
        assert generate.run_program(train.main, [*trainee, "--out", out, "--save-every", "5"]) == 130
    kept = Path(f"{out}.resume").read_bytes()

    def refuse(changes, *words):
        capsys.readouterr()
        assert generate.run_program(train.main, [*trainee, "--out", out, "--resume", *changes]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(w in err for w in ("g.resume", *words)), err

    (tmp_path / "other.txt").write_text(STORY.replace("a", "e"))
    refuse(["--lam", "0.3"], f"lam {train.PAPER.lam} there, 0.3 here")
    refuse(["--steps", "7", "--seed", "1"], "steps 6 there, 7 here, seed 0 there, 1 here")
    refuse(["--data", str(tmp_path / "other.txt")], "data ")
    weights = load_file(tmp_path / M.SINGLE)
    save_file({n: -t for n, t in weights.items()}, tmp_path / M.SINGLE)
    refuse([], "model ")
    save_file(weights, tmp_path / M.SINGLE)
    for content in (kept[:1000], b"", b"garbage"):
        Path(f"{out}.resume").write_bytes(content)
        refuse([], "cannot be read")
    for content in ({}, [1], Bomb(tmp_path / "exploded")):
        torch.save(content, f"{out}.resume")
        refuse([], "cannot be read")
    assert not (tmp_path / "exploded").exists()
    Path(f"{out}.resume").write_bytes(kept)
    assert train.main([*trainee, "--out", out, "--resume"]) == 0


def test_two_processes_train_as_one(trainee, tmp_path):
    """Gradients averaged wrongly, a sample that two processes take or none, or two that write the same file."""
    assert train.main([*trainee, "--out", str(tmp_path / "one")]) == 0
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          str(generate.HERE / "train.py"), *trainee, "--out", str(tmp_path / "two")],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.count("validation: ") == 1, run.stderr
    same_gates(tmp_path / "one", tmp_path / "two", 1e-5)
    for one, two in zip(read_log(tmp_path / "one")[:-1], read_log(tmp_path / "two")[:-1], strict=True):
        for key in ("soft", "hard", "cost", "admitted", "gradient"):   # AdamW alone would not see gradients too large
            assert (one[key] or 0) == pytest.approx(two[key] or 0, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("at", (1, 4))
def test_a_loss_that_is_not_finite_ends_the_run(at, trainee, tmp_path, monkeypatch, capsys):
    """NaN written over good gates; the gates of the update that broke them; a run that goes on with NaN."""
    real, calls = train.distill, []

    def broken(model, gates, ids, *a, **k):
        soft, *rest = real(model, gates, ids, *a, **k)
        calls.append([p.detach().clone() for p in gates.parameters()])
        return (soft * math.nan if len(calls) == at else soft, *rest)

    monkeypatch.setattr(train, "distill", broken)
    argv = [*trainee, "--seq-len", "256", "--tokens-per-step", "256", "--out", str(tmp_path / "g")]
    Path(tmp_path / "g").write_text("old")
    assert generate.run_program(train.main, argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"step {at}: the loss or its gradient is not finite" in last and "--lr" in last
    if at == 1:
        assert (tmp_path / "g").read_text() == "old"
    else:                                                              # step 3 had a finite loss, of the gates after 2
        assert "gates after step 2" in last
        gates = Gates.load(tmp_path / "g", Llama.from_pretrained(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), calls[2], strict=True))


def test_too_little_memory_for_training(trainee, tmp_path, monkeypatch, capsys):
    """A kill by the kernel, hours in, instead of a sentence at the beginning; layers checkpointed for no reason."""
    model = Llama.from_pretrained(tmp_path)
    gates, recipe = Gates.for_model(model), train.Recipe(seq_len=(512, 1024))
    whole, again = (train.activation_bytes(model, gates, 1024, c) for c in (False, True))
    assert whole > again > train.activation_bytes(model, gates, 512, True) == again / 2
    state = 20 * sum(p.numel() for p in gates.parameters())
    for free, want in ((2 * (whole + state), {512: (1, False), 1024: (1, False)}),
                       (whole + state, {512: (1, False), 1024: (1, True)})):
        monkeypatch.setattr(train, "free_bytes", lambda device: free)
        assert train.fit(model, gates, recipe)[0] == want
    free = again
    assert generate.run_program(train.main, [*trainee, "--seq-len", "1024", "--out", str(tmp_path / "g")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--seq-len 1024 needs about" in err and "lower --seq-len" in err


def test_convert(tmp_path, capsys):
    """An official checkpoint that comes out as other gates, or as a file that does not load."""
    model = make_folder(tmp_path)
    torch.save(official(2, 2, 8, 4, torch.Tensor.bfloat16), tmp_path / "x.pt")
    argv = ["--convert", str(tmp_path / "x.pt"), "--model", str(model), "--out", str(tmp_path / "g.safetensors")]
    assert train.main([*argv, "--lam", "0.04"]) == 0
    capsys.readouterr()
    model = Llama.from_pretrained(model)
    ours, theirs = Gates.load(tmp_path / "g.safetensors", model), Gates.load(tmp_path / "x.pt", model)
    assert capsys.readouterr().err == "" and (ours.window, ours.tau, ours.expansion) == (256, 0.1, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert generate.run_program(train.main, [*argv[:3], str(TINY_FOLDER), *argv[4:]]) == 2
    assert "8 layers, 4 KV heads of 32" in capsys.readouterr().err


@pytest.mark.parametrize("argv, names", [
    (["--data", "nowhere"], "nowhere"), (["--out", "no/such/x"], "no/such"), (["--lam", "-1"], "--lam"),
    (["--window", "0"], "--window"), (["--tau", "0"], "--tau"), (["--seq-len", "8"], "--seq-len"),
    (["--data", "SHORT"], "fewer than"), (["--steps", "x"], "--steps"), (["--data", "EMPTY"], "no text found"),
    (["--data", "FOLDER"], "no text found"), (["--data", "LATIN"], "LATIN: not UTF-8 text at byte 3"),
    (["--data", "SHORT", "--tasks"], "no prose to hide tasks in"), (["--seq-len", "256,many"], "--seq-len"),
    (["--window", "1024"], "--window 1024 should be smaller than --seq-len 1024"), (["--chat"], "--chat"),
    (["--data", "SHORT", "--chat", "--tasks"], "--chat"), (["--warmup", "1.5"], "--warmup"), (["--lr", "nan"], "--lr"),
    (["--save-every", "0"], "--save-every"), (["--model", "OTHER"], "model_type 'gemma'"),
    (["--out", "OTHER"], "OTHER"), (["--convert", "nowhere.pt"], "nowhere.pt"),
    (["--convert", "LATIN"], "LATIN")], ids=str)
def test_training_refuses_what_cannot_work(argv, names, capsys, tmp_path, monkeypatch):
    """Mistakes must be found before the training, not after it."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("SHORT", b"A few words."), ("EMPTY", b" \n"), ("LATIN", "caf\u00e9".encode("latin-1"))):
        Path(name).write_bytes(data)
    Path("FOLDER").mkdir()
    Path("FOLDER/x.pdf").write_text("no text")
    copy_text_files(Path("OTHER").mkdir() or write_config(Path("OTHER"), model_type="gemma"))
    before = sorted(tmp_path.rglob("*"))
    assert generate.run_program(train.main, [*argv, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_more_processes_than_samples(monkeypatch, capsys):
    """A process without a sample waits for gradients that it has not."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert generate.run_program(train.main, ["--device", "cpu"]) == 2
    assert "--tokens-per-step 2048: it should be at least 3072" in capsys.readouterr().err


def test_evaluation_scores_answers_and_counts_kept_bytes(tiny):
    """A scorer that cannot fail proves nothing: right with everything kept must beat nothing kept."""
    model, text = tiny
    haystack = tasks.Haystack(STORY * 3)
    documents = [tasks.make("facts", haystack, 512, text.tokenizer.encode, random.Random(n))[0] for n in range(8)]
    full, kept = train.evaluate(model, text, lambda group: DenseCache(model, len(group)), documents)
    assert kept == 1.0 and len(full) == sum(len(d.questions) for d in documents) and sum(full) > 0.8 * len(full)
    none, kept = train.evaluate(model, text, lambda group: DualCache(model, RandomAdmission(0.0), len(group), 32),
                                documents)
    assert sum(none) < 0.3 * len(none) and 0.05 < kept < 0.12


def test_bench_prints_rows_and_writes_its_figures(tmp_path, capsys):
    """The figures in assets/ must come from a run that says what it was."""
    out = tmp_path / "x.json"
    assert bench.main(["prefill", "--tokens", "200", "300", "--runs", "2", "--json", str(out), "--device", "cpu",
                       "--admit", "0.2"]) == 0
    figures = json.loads(out.read_text())
    assert [row["tokens"] for row in figures["prefill"]] == [200, 300] and figures["machine"] and figures["command"]
    assert len(figures["prefill"][0]["dense_s"]) == 2 and "ratio" in capsys.readouterr().out
    assert bench.main(["memory", "--tokens", "300", "--steps", "3", "--json", str(out), "--device", "cpu"]) == 0
    [row] = json.loads(out.read_text())["memory"]
    assert row["kept"] <= row["reserved"] and row["rest"] == row["peak"] - row["weights"] - row["kept"]
    assert row["prefill_s"] > 0 and row["decode_s"] > 0 and row["steps"] == 3
    for what in ("kernels", "train"):
        capsys.readouterr()
        assert generate.run_program(bench.main, [what, "--device", "cpu"]) == 2
        assert f"{what} needs a CUDA device" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- the experiments

def fact_document(text, n=0, tokens=300):
    return tasks.make("facts", tasks.Haystack(STORY), tokens, text.tokenizer.encode, random.Random(n))[0]


def read_by(policy, tiny, documents):
    """A cache that has read the bodies under a policy."""
    model, text = tiny
    kv = bench.cache_of(model, text, policy)(documents)
    generate.prefill(model, kv, [text.encode(d.body) for d in documents])
    return kv


def test_the_oracle_keeps_what_the_question_looks_at(tiny, monkeypatch):
    """An oracle that looks from the wrong end, or at the body alone; one whose heads share a budget."""
    model, text = tiny
    d, asked = fact_document(text), []
    d = tasks.Document("facts", d.body, d.questions[:1])

    def peaks(model, ids, last):
        asked.append((ids, last))
        return (torch.arange(len(ids)) == torch.arange(100, 132).view(8, 4, 1)).float()     # at 100 in the first head

    monkeypatch.setattr(bench, "attention_mass", peaks)
    body, question = text.encode(d.body), text.encode(d.questions[0][0], begin=False)
    admitted = read_by(bench.Oracle(8, 6.5 / len(body)), tiny, [d]).admitted()
    for n, row in enumerate(admitted.flatten(0, 1)):
        assert row.nonzero()[:, 0].tolist() == list(range(97 + n, 104 + n))
    assert asked == [(body + question, len(question))]


def test_attention_mass_is_full_attention(tiny):
    """A watcher that changes what it watches, or whose last queries see keys after them."""
    model, text = tiny
    ids = text.encode(STORY)[:100]
    watch = bench.Watch(CPU, 100)
    with torch.no_grad():
        equal(model(torch.tensor([ids]), watch), model(torch.tensor([ids])), tolerance=2e-4)
    mass = bench.attention_mass(model, ids, 100)
    assert mass.shape == (8, 4, 100) and (mass.sum(-1) - 1).abs().max() < 1e-5
    assert mass[..., -1].max() <= 0.01 and mass[..., -2].max() <= 0.02              # seen by one query of 100, by two
    assert bench.attention_mass(model, ids, 1)[..., -1].max() > 0.01
    q = torch.arange(4.).view(1, 4, 1, 1) + 1                            # heads 2 and 3 of the queries read KV head 1
    k, one = torch.tensor([[[[0.], [1.]], [[0.], [-1.]]]]), torch.ones(1)
    watch = bench.Watch(CPU, 1)
    watch.attend(0, q.expand(1, 4, 2, 1).repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), one, 0 * one)
    want = [[torch.sigmoid(sign * 2 ** 0.5 * torch.tensor(some)).mean() for some in ([1., 2.], [3., 4.])][h]
            for h, sign in ((0, 1.0), (1, -1.0))]
    equal(watch.g[0][0, :, 1], torch.stack(want))


def test_policies_admit_what_their_names_say(tiny):
    """Counts of the future, heads in the wrong order, padding of a shorter row taken for its values."""
    model, text = tiny
    short, long = (tasks.Document("prose", s) for s in ("the the the cat the cat", "a b a b a b a b a b a b"))
    rare = bench.Rare(4, 0.3)
    values, ids = rare.values(model, text, short)[0, 0].tolist(), text.encode(short.body)
    for n, (value, token) in enumerate(zip(values, ids)):
        assert 1 / (2 + ids[:n].count(token)) < value <= 1 / (1 + ids[:n].count(token))
    rare.tell(model, text, [short, long])
    k = torch.zeros(2, 4, 5, 32)
    g = rare.gate(3, k, k, torch.arange(len(ids) - 2, len(ids) + 3).expand(2, -1))
    assert g.shape == (2, 4, 5) and g.dtype == torch.float32
    assert g[0, 1].tolist() == pytest.approx([*values[-2:], 1, 1, 1]) and g[1, 0, 0] != 1
    ranking = torch.arange(32).flip(0).view(8, 4)                            # the last layer's last head comes first
    heads = bench.Heads(8, ranking, 2.5 / 32, 328)
    admitted = read_by(heads, tiny, [fact_document(text)]).admitted()
    assert heads.window == 8 + 5 and admitted[7, 2:].all() and admitted.sum() == admitted[7, 2:].sum()
    sinks = read_by(bench.Sinks(8, 3), tiny, [fact_document(text)]).admitted()
    assert sinks[..., :3].all() and not sinks[..., 3:].any()


def test_heads_are_ranked_by_what_answers_look_at(tiny, monkeypatch):
    """The head that looks far most must be 0: a ranking the wrong way round keeps the heads that need it least."""
    model, text = tiny
    far = torch.rand(8, 4)
    monkeypatch.setattr(bench, "attention_mass", lambda model, ids, last: far[:, :, None].expand(8, 4, len(ids)))
    ranking = bench.rank_heads(model, text, [fact_document(text)], 16)
    assert torch.equal(far.flatten()[ranking.flatten().argsort()], far.flatten().sort(descending=True).values)


@pytest.mark.parametrize("name", ("window only", "whole heads", "rare tokens"))
def test_simpler_policies_keep_as_many_bytes(name, tiny):
    """A comparison that gives one side more bytes than the other."""
    model, text = tiny
    documents = [fact_document(text, tokens=400)]
    ranking = lambda: torch.arange(32).view(8, 4)                                               # noqa: E731
    policy = bench.matched(lambda share: bench.SIMPLER[name](16, share, 400, ranking), 0.4, model, text, documents)
    kv = read_by(policy, tiny, documents)
    kept, counts = kv.kept_bytes() / kv.dense_bytes(), torch.stack([c["count"] for c in kv.layers])
    if name == "rare tokens":                          # all rows alike: a page for each is the least step; it is full
        assert 0.4 <= kept < 0.4 + 70 / 390 and (-counts % P < 8).all()
    else:
        assert 0.38 < kept < 0.41                      # a head comes with its pages, and all windows shrink again


def test_intervals():
    """Wilson's for right and wrong, with published values; never outside 0 and 1, never of no width for 0 of 10."""
    for right, low, high in ((0, 0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1)):
        r = bench.interval([1.0] * right + [0.0] * (10 - right))
        assert (r["low"], r["high"]) == pytest.approx((low, high), abs=2e-4) and (r["mean"], r["n"]) == (right / 10, 10)
    r = bench.interval([0.5, 0.75, 1.0, 0.75])
    assert r["high"] - r["mean"] == pytest.approx(1.96 * 0.20412 / 2, abs=1e-4)
    assert bench.interval([0.0, 0.0], bounded=False)["high"] == 0 and bench.interval([0.9, 1.0])["high"] == 1


def test_a_single_fact_lies_at_its_depth(tiny):
    """A grid whose rows are not the depths that they say."""
    _, text = tiny
    for depth in (0, 0.5, 1):
        d = bench.single_fact(tasks.Haystack(STORY), 400, depth, text.tokenizer.encode, random.Random(1))
        [(question, answer)] = d.questions
        fact = answer.removesuffix(tasks.END).strip()
        assert abs(d.body.index(fact) / len(d.body) - depth) < 0.2 and len(text.encode(d.text)) <= 400
        assert question.split()[-1].strip("?") in fact


def test_a_left_out_input_stays_out(tiny):
    """Gates that learn to see again what they were not to see."""
    model, text = tiny
    for inputs in ("before", "after"):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        bench.leave_out(gates, inputs)
        start = [p.clone() for p in gates.parameters()]
        recipe = train.Recipe(steps=2, tokens_per_step=100, seq_len=(100,), lam=1.0)
        samples = train.Samples(lambda rng, n: alike(text.encode(STORY)[:n]), recipe)
        train.train(model, gates, torch.optim.AdamW(gates.parameters()), samples, recipe)
        assert all(not torch.equal(a, b) or not a.any() for a, b in zip(start, gates.parameters()))
        k, other = torch.randn(2, 1, 4, 9, 32)
        keys = [(k, x) if inputs == "before" else (x, k) for x in (k, other)]
        assert torch.equal(gates.gate(0, *keys[0], None), gates.gate(0, *keys[1], None))
        assert bench.cost_of(gates, model)["parameters"] == sum(p.numel() for p in start) - 8 * (32 + 4 * 128 * 32)


@pytest.fixture
def toy(tmp_path):
    """Options that make an experiment take seconds."""
    story = str(TINY_FOLDER / "example.txt")
    return ["quality", "--cases", "2", "--length", "300", "--data", story, "--books", story, "--train-steps", "1",
            "--train-tokens-per-step", "256", "--train-seq-len", "256", "--device", "cpu", "--work",
            str(tmp_path / "gates"), "--lam", "0.1", "--taus", "0.1", "0.4", "--lengths", "256", "--depths", "0.5"]


def test_an_interrupted_experiment_goes_on(toy, tmp_path, monkeypatch, capsys):
    """Finished points done again, gates trained twice, rows of other options in one file, rows without their origin."""
    scored, trained, score, training = [], [], bench.score, train.train

    def interrupt(*args):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(args)
        return score(*args)

    monkeypatch.setattr(bench, "score", interrupt)
    monkeypatch.setattr(train, "train", lambda *args, **more: (trained.append(args), training(*args, **more))[1])
    path = tmp_path / "quality-1.json"
    toy += ["--json", str(path)]
    assert generate.run_program(bench.main, [*toy, "--item", "1"]) == 130
    before = json.loads(path.read_text())["rows"]
    assert len(before) == 2 and len(trained) == 1
    scored.append(None)                                                              # no longer 2: it goes through
    assert bench.main([*toy, "--item", "1"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == before and len(rows) == 3 and len(scored) == 4 and len(trained) == 1
    for row in rows[1:]:
        assert {"kept", "admitted", "loss", "facts", "prose", "commit", "command", "machine", "seed"} <= row.keys()
        assert row["full"] == {"facts": rows[0]["facts"]["mean"], "prose": rows[0]["prose"]["mean"]}
    assert rows[1]["settings"]["tau"] == 0.1 and rows[2]["kept"] < rows[1]["kept"]
    capsys.readouterr()
    assert bench.main([*toy, "--item", "1"]) == 0 and len(scored) == 4               # all of it is there
    out, _ = capsys.readouterr()
    assert out.count("\n") == 3 and "tau 0.4: kept" in out
    assert generate.run_program(bench.main, [*toy, "--item", "1", "--seed", "1"]) == 2
    assert "has rows of another run, seed 0 there and 1 here" in capsys.readouterr().err


def test_the_model_has_written_before_samples_are_drawn(toy, monkeypatch):
    """Its own writing put off until a sample asks for it: that is in another process, which cannot use the card."""
    wrote = []
    monkeypatch.setattr(train, "model_writes", lambda *args: wrote.append(args) or STORY)
    monkeypatch.setattr(bench, "bench_quality", lambda model, args: bench.Experiment(5, model, args).draw("both"))
    assert bench.main(toy) == 0 and len(wrote) == 1


def test_pictures_are_drawn_of_what_is_there(toy, tmp_path, monkeypatch, capsys):
    """Items 4 and 7 from end to end, and their pictures; one that fails for the lack of another's figures."""
    pytest.importorskip("matplotlib")
    tmp_path = tmp_path / "gates"                                                    # --work, where figures go
    monkeypatch.setattr(bench, "ALL", ("facts", "prose"))
    monkeypatch.setattr(bench, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="no figures"):
        bench.plot()
    assert bench.main([*toy, "--item", "4", "--item", "7"]) == 0
    rows = json.loads((tmp_path / "quality-4.json").read_text())["rows"]
    assert len(rows) == 6 and {row["settings"]["length"] for row in rows} == {256}
    [row] = json.loads((tmp_path / "quality-7.json").read_text())["rows"]
    shares = torch.tensor(row["map"])
    assert shares.shape == (8, 4) and row["heads"][0]["share"] == pytest.approx(shares.max().item())
    assert all(kept <= seen for head in row["heads"] for _, kept, seen in head["kept"])
    bench.plot()
    assert {p.name for p in tmp_path.glob("*.png")} == {"quality-4.png", "quality-7.png"}


def test_other_engines_are_scored_like_ours(toy, tmp_path, capsys):
    """Expected answers that do not score 100%, wrong ones that do, and answers that went missing unseen."""
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    assert bench.main([*toy, "--prompts", str(prompts)]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"facts", "lists", "classes", "copy"} and len(rows) >= 8

    def scored(rows, *words):
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = generate.run_program(bench.main, ["quality", "--prompts", str(prompts), "--score", str(answers)])
        out, err = capsys.readouterr()
        assert status == (2 if words else 0) and all(word in out + err for word in words) and err.count("\n") <= 1
        return dict(re.findall(r"^(\w+) +([\d.]+)%", out, re.M))

    good = [dict(id=row["id"], answer=f" {row['answer']}{tasks.END} and more") for row in rows]
    assert scored(good) == dict.fromkeys(("facts", "lists", "classes", "copy"), "100.0")
    assert scored([dict(good[0], answer="no idea"), *good[1:]])["facts"] == "50.0"
    scored(good[1:], "has no answer to facts/0/0")
    scored([*good, dict(id="x", answer="")], "has no prompt x")
    scored([*good, good[0]], "was there before")
    scored([dict(id=3, answer="")], "line 1", "no JSON object with id, answer")


def test_the_quick_run_needs_nothing_from_outside(monkeypatch, capsys):
    """What CI runs: all tasks, and gates between full attention and a window only."""
    monkeypatch.setattr(bench, "QUICK", (2, 512, 64))         # at 256 the ring alone is half of it
    monkeypatch.setattr(train, "model_writes", lambda model, text, tokens, seed: STORY)      # 20 s of a CPU
    assert bench.main(["quality", "--quick", "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    full, gates, window = out.splitlines()
    assert full.startswith("full attention: kept 100.0%") and all(f"; {task} " in gates for task in bench.ALL)
    kept = [float(re.search(r"kept ([\d.]+)%", line).group(1)) for line in (window, gates)]
    assert kept[0] < kept[1] < 100 and "window only" in window


@pytest.mark.parametrize("argv, words", [
    (["--item", "8"], "--item"), (["--item", "5"], "--books"), (["--item", "2", "--gates", "x"], "item 2 trains its"),
    (["--item", "1", "2", "--json", "x.json"], "--json"), (["--quick", "--item", "1"], "one of --item"),
    (["--score", "a.jsonl"], "--score needs --prompts"), (["--prompts", "no/such/p.jsonl"], "no/such"),
    (["--prompts", "no.jsonl", "--score", "no.jsonl"], "no.jsonl cannot be read"),
    (["--item", "1", "--work", str(TINY_FOLDER / "config.json")], "--work"),
    (["--quick", "--json", str(TINY_FOLDER / "config.json")], "holds no rows"),
    (["--item", "4", "--lengths", "50", "--data", "x"], "lengths 128"), (["--depths", "2"], "--depths"),
    (["--taus", "0"], "--taus"), (["prefill"], "quality goes alone"),
    (["--item", "3", "--gates", "no.safetensors"], "no.safetensors"), (["--admit", "all"], "--admit")])
def test_experiments_refuse_what_cannot_work(argv, words, capsys, tmp_path, monkeypatch):
    """A mistake is one line, before anything slow."""
    monkeypatch.chdir(tmp_path)
    assert generate.run_program(bench.main, ["quality", *argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- the README

README = (generate.HERE / "README.md").read_text()


def test_the_readmes_program_runs(monkeypatch, capsys):
    """The ten lines that others will copy must be ten, work, and give the answer."""
    program = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    monkeypatch.chdir(generate.HERE)
    exec(program, {})
    assert "2954" in capsys.readouterr().out and program.count("\n") <= 12


def test_the_readmes_figures_about_itself():
    """Counts of lines rot first; the two commands are what CI runs, and belong on the first screen."""
    rows = re.findall(r"^\| \[(\S+)\]\(\S+\) \|.*\| ([\d,]+) \|$", README, re.M)
    assert len(rows) >= 8
    for name, lines in rows:
        assert int(lines.replace(",", "")) == len((generate.HERE / name).read_text().splitlines()), name
    screen = "\n".join(README.splitlines()[:30])
    assert screen.count("\npip install -r requirements.txt && ") == 2


@pytest.mark.parametrize("script", ("generate", "train", "bench"))
def test_the_readmes_options_exist(script, capsys):
    """An option that is named in the README and was renamed since."""
    with pytest.raises(SystemExit):
        {"generate": generate, "train": train, "bench": bench}[script].main(["--help"])
    known = capsys.readouterr().out
    commands = re.findall(rf"python {script}\.py([^\n`#]*)", README)
    assert commands
    for option in re.findall(r"--[a-z][a-z-]+", " ".join(commands)):
        assert option in known, option
