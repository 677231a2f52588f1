"""The proofs of wgkv.py and kernels.py: what they compute, and what they may never do.

    pytest test_wgkv.py                 some two minutes on one CPU core
    pytest test_wgkv.py -k any_split    only the contract

Where there is a GPU, the tests run on it and go through the kernels. Elsewhere the kernels run in
Triton's interpreter, and the tests of half precision are skipped.

    claim                                                   test_...

    The definition, in any split
    `visible` is the definition, exact at W and at tau      visible
    a cache equals it in any split of a text into calls     any_split, long_inputs, page_edges
    so does a model, with its own gates, as it always did   whole_model, gates_in_the_model, golden

    Rows, batches, views
    a sequence of a batch is what it would be alone         a_sequence_of_a_batch
    clones are independent, views share all memory          clone, views_resets_and_clones

    Memory
    pages come back, nothing unwritten is read              pages_come_back, nothing_unwritten
    a call that broke off is noticed                        broken_call
    reserved room is enough, and is made once               reserve, room_of_views
    a cache is freed as soon as it is dropped               freed

    Eviction and selection
    every call sees what is held, and of it what is chosen  held_and_selected
    a budget is a tau that rises, and it holds              budget_is_a_rising_tau
    the tokens of lowest score go, the oldest of equals     best_tokens
    SnapKV's scores are its formula                         snapkv_scores
    what changes nothing changes no bit                     changes_no_bit
    budgets and selections that cannot work are refused     too_small

    Bytes
    kept bytes are right, pages hold what was promoted      bytes_and_positions
    what is reserved stays near what is kept                reserved_stays_near
    the dense baseline is causal attention                  dense_cache

    Gates and gate files
    a gate is the formula                                   gates_by_the_formula
    files come back whole, others are refused in a line     gate_files, interrupted_write
    the authors' checkpoints load, broken ones do not       official
    random admission is fair, in any split                  random_admission

    Saved caches
    a loaded cache goes on as the saved one, bit by bit     loaded_cache
    broken and hostile files are refused in a line          broken_cache_files
    a save that fails leaves the old file                   killed_save

    Training
    soft attention and its gradients are autograd's         soft, student
    the sparsity loss is the expected share                 sparsity_loss

    Kernels
    the caches through the kernels equal the definition     caches_through_the_kernels
    decode's work is divided as planned                     plan_of_decode
    compiling kernels all together changes nothing          rehearsal, compile_together
    gates, RoPE, norms and products equal PyTorch's         small_kernels
    one token's linear layers are the linear layers         linear_layers, decode_of_one
    half precision loses no more than torch's attention     half_precision

    Programs
    running ahead in a CUDA graph changes nothing           running_ahead
    prompts that wait get the answers they get alone        many_prompts, soak
    the demo and SimpleCache are the method                 demo, simple_cache
    imports run one way                                     imports
"""
import ast
import functools
import gc
import itertools
import math
import os
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# Before triton is imported: without a GPU its kernels run in an interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import files
import generate
import model
import wgkv
from common import HERE, UserError
from model import Config, Llama, rotate
from tokenizer import Text
from wgkv import (MIN_GATE, P, DenseCache, DualCache, Gates, PagePool, RandomAdmission,
                  SoftAttention, dense_attention, pages_for, sparsity_loss, visible_mask)

torch.set_num_threads(1)    # most things here are small: threads would only wait for each other
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAU = 0.1
SHARES = (0, 0.03, 0.3, 0.9, 1)     # of tokens that are admitted
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter's bf16 is wrong")


@pytest.fixture
def gpu():
    """A test that asks for this makes its tensors on the GPU, if there is one."""
    with DEVICE, torch.no_grad():
        yield


@pytest.fixture
def kernels():
    """kernels.py, if there is a Triton to run it."""
    pytest.importorskip("triton")
    import kernels
    return kernels


# ---------------------------------------------------------------- helpers: the definition, a feeder

class Replay:
    """An admission policy that replays given gates (L, B, Hkv, S), by position.

    The padding of a call gets the gate 1, so that a cache which stores padding is noticed.
    """

    def __init__(self, g, window, tau=TAU):
        self.g = F.pad(g, (0, 1), value=1.0)
        self.window = window
        self.tau = tau

    def gate(self, layer, k, k_rotated, positions):
        g = self.g[layer]                                           # (B, Hkv, S + 1)
        last = g.shape[2] - 1
        index = positions.clamp(max=last)[:, None].expand(*g.shape[:2], -1)     # (B, Hkv, T)
        return g.gather(2, index)


class Definition:
    """The `kv` of one call that is dense attention under the visibility mask."""

    def __init__(self, policy, batch=1):
        self.policy = policy
        self.num_tokens = torch.zeros(batch, dtype=torch.long)

    def begin(self, T, lengths=None):
        positions = torch.arange(T, device=self.num_tokens.device)
        self.positions = positions.expand(len(self.num_tokens), T)
        return self.positions

    def attend(self, layer, q, k, v, cos, sin):
        q = rotate(q, cos, sin)
        k_rotated = rotate(k, cos, sin)
        g = self.policy.gate(layer, k, k_rotated, self.positions)
        mask = visible_mask(g, self.policy.window, self.policy.tau)
        return dense_attention(q, k_rotated, v, mask)

    def end(self):
        pass


def bare(L=2, Hkv=2, D=16, dtype=torch.float32, G=1):
    """As much of a model as a cache asks for."""
    config = SimpleNamespace(num_layers=L, num_kv_heads=Hkv, head_dim=D, num_heads=Hkv * G)
    return SimpleNamespace(config=config, device=torch.get_default_device(), dtype=dtype)


def make_cache(kind, g, window):
    """A cache of this kind for gates g (2, B, 2, S) and heads of 16; a dense one has no gates."""
    if kind == "dense":
        return DenseCache(bare(), g.shape[1])
    return DualCache(bare(), Replay(g, window), g.shape[1])


def small_llama(seed=0, **settings):
    """A model with random weights, of three layers, six query heads and two KV heads."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=48, intermediate_size=64, num_layers=3, num_heads=6,
                 num_kv_heads=2, head_dim=16)
    model = Llama(Config(**{**sizes, **settings}))
    for layer in model.layers:
        layer.qkv.weight.data *= 3          # so that attention is far from uniform
    return model.eval().requires_grad_(False)


def random_qkv(L, B, Hkv, S, G=1, D=16):
    """q (L, B, Hkv * G, S, D) and k, v (L, B, Hkv, S, D), with sharp attention."""
    q = 2 * torch.randn(L, B, Hkv * G, S, D)
    k = torch.randn(L, B, Hkv, S, D)
    v = torch.randn(L, B, Hkv, S, D)
    return q, k, v


def random_gates(L, B, Hkv, S, share):
    """Gates (L, B, Hkv, S), of which a share is admitted.

    Half of them lie as near to tau as fp32 can: tau itself, or the largest number below it.
    """
    tau = torch.tensor(TAU)
    below = tau.nextafter(torch.tensor(0.0))
    u, coin, chance = torch.rand(3, L, B, Hkv, S)
    admitted = torch.where(coin < 0.5, tau, tau + 0.9 * u)
    refused = torch.where(coin < 0.5, below, 0.09 * u)
    return torch.where(chance < share, admitted, refused)


def angles(positions, D):
    """cos and sin (B, 1, T, D) for positions (B, T). Both halves of a head turn by one angle."""
    pair = torch.arange(D) % ((D + 1) // 2)
    angle = positions[:, None, :, None] * 0.7 ** pair
    return angle.cos(), angle.sin()


def feed(cache, qkv, plan):
    """Give a cache its next tokens out of qkv. A plan says how many, for each call and sequence.

    Returns outputs (L, B, Hq, S, D) in the places of their tokens, infinity where there is none.
    Padding is 1e4, so that reading it is noticed.
    """
    out = torch.full_like(qkv[0], math.inf)
    for new in plan:
        T = max(1, *new)
        spans = [(start, start + n) for start, n in zip(cache.num_tokens.tolist(), new)]
        lengths = None if min(new) == T else torch.tensor(new)
        cos, sin = angles(cache.begin(T, lengths), out.shape[-1])
        for layer in range(len(out)):
            inputs = []
            for x in qkv:
                padded = x.new_full((*x.shape[1:3], T, x.shape[4]), 1e4)
                for b, (start, stop) in enumerate(spans):
                    padded[b, :, :stop - start] = x[layer, b, :, start:stop]
                inputs.append(padded)
            y = cache.attend(layer, *inputs, cos, sin)
            for b, (start, stop) in enumerate(spans):
                out[layer, b, :, start:stop] = y[b, :, :stop - start]
        cache.end()
    return out


def expected(qkv, g, window):
    """What `feed` must give for all tokens, by the definition."""
    _, B, _, S = g.shape
    return feed(Definition(Replay(g, window), B), qkv, [[S] * B])


def equal(got, want, what="", tolerance=1e-5):
    """Assert that both are equal to rounding, wherever `got` was computed. NaN equals nothing."""
    error = (got - want)[got != math.inf].abs()
    assert (error < tolerance).all(), f"{what}: off by {error.max():.2g}"


def splits(S, rng):
    """Four ways to cut S tokens into calls: whole, chunks, one by one, two turns with answers."""
    chunks = []
    while sum(chunks) < S:
        chunks.append(min(rng.randint(1, 1 + S // 3), S - sum(chunks)))
    turns = [n for n in (S // 2, *[1] * (S // 8), S // 4) if n > 0]
    turns += [1] * (S - sum(turns))
    return [S], chunks, [1] * S, turns


def ragged(lengths, rng):
    """A plan that brings each sequence to its length. In a call some get nothing, others much."""
    left = list(lengths)
    plan = []
    while any(left):
        most = rng.choice((1, 1, 5, 40))
        new = [min(n, rng.choice((0, rng.randint(0, most), most))) for n in left]
        plan.append(new)
        left = [n - m for n, m in zip(left, new)]
    return plan


def run_model(model, tokens, cache, plan):
    """The hidden states of tokens (B, S), cut into the calls of a plan."""
    return torch.cat([model(part, cache) for part in tokens.split(plan, dim=1)], dim=1)


def check_pages(cache):
    """Assert that every page is held once or free once, and page 0 neither."""
    held = []
    tables = cache.page_table.flatten(0, 2).tolist()
    for table, count in zip(tables, cache.counts.flatten().tolist()):
        held += table[:cache.R + pages_for(count)]
    free = cache.pool.free[:int(cache.pool.num_free)].tolist()
    assert sorted(held + free) == list(range(1, len(cache.pool.k))), f"held {held}, free {free}"


def refused(call, *words):
    """Assert that the call raises a UserError of one line that has these words in it."""
    with pytest.raises(UserError) as e:
        call()
    message = str(e.value)
    assert "\n" not in message
    assert all(word in message for word in words), f"{words} not all in: {message}"


# ------------------------------------------------------------------- the definition, in any split

def test_visible():
    """A window of W includes the query's own token, and tau itself is admitted, in fp32."""
    on = torch.tensor(TAU)
    below = on.nextafter(torch.tensor(0.0))
    g = torch.stack((on, below, on, below, below))
    pattern = visible_mask(g[None, None], 2, TAU)[0, 0]
    assert pattern.int().tolist() == [[1, 0, 0, 0, 0],
                                      [1, 1, 0, 0, 0],
                                      [1, 1, 1, 0, 0],
                                      [1, 0, 1, 1, 0],
                                      [1, 0, 1, 1, 1]]


@pytest.mark.parametrize("window", (1, 4, 17, 64, 100, 128, 130))
def test_any_split_equals_the_definition(window, gpu):
    """The contract. Faults: a wrong slot, count, page or edge of the window."""
    torch.manual_seed(window)
    rng = random.Random(window)
    shapes = itertools.cycle([(1, 16), (3, 80), (4, 32), (7, 15), (3, 17)])     # (G, D)
    for S in sorted({1, 2, max(1, window - 1), window, window + 1, window + P + 2}):
        for share, (G, D) in zip(SHARES, shapes):
            qkv = random_qkv(2, 1, 2, S, G, D)
            g = random_gates(2, 1, 2, S, share)
            want = expected(qkv, g, window)
            for plan in splits(S, rng):
                what = f"S {S}, share {share}, G {G}, D {D}, {plan[:3]}"
                cache = DualCache(bare(2, 2, D), Replay(g, window))
                equal(feed(cache, qkv, [[n] for n in plan]), want, what)
                assert torch.equal(cache.admitted(), (g[:, 0] >= TAU).cpu()), what


@pytest.mark.parametrize("S", (255, 256, 257, 513, 1100))
def test_long_inputs(S, gpu):
    """The edges of prefill's blocks of 256 queries, alone and behind a prefix, and many pages."""
    torch.manual_seed(S)
    for window, share in ((4, 0.9), (64, 0.3), (300, 1)):
        qkv = random_qkv(2, 1, 2, S + 70, 2)
        g = random_gates(2, 1, 2, S + 70, share)
        want = expected(qkv, g, window)
        for plan in ([70, S], [S, 69, 1], [S - 9] + [1] * 79):
            got = feed(DualCache(bare(), Replay(g, window)), qkv, [[n] for n in plan])
            equal(got, want, f"W {window}, share {share}, plan {plan[:3]}")


@pytest.mark.parametrize("n", (P - 1, P, P + 1, 2 * P))
def test_page_edges(n, gpu):
    """A page that is almost full, full, or a token over: by one call, by single tokens, by both."""
    torch.manual_seed(n)
    qkv = random_qkv(2, 1, 2, n + 9)
    g = random_gates(2, 1, 2, n + 9, 0)
    g[:, :, 0, :n] = 1              # one head admits n tokens in a row,
    g[:, :, 1, 1:n:2] = 1           # the other every second one of them
    want = expected(qkv, g, 4)
    for plan in ([n + 4, 1, 4], [1] * (n + 9), [n + 3] + [1] * 6, [n + 5, 4], [5, n - 2, 1, 5]):
        cache = DualCache(bare(), Replay(g, 4))
        equal(feed(cache, qkv, [[m] for m in plan]), want, f"plan {plan[:4]}")
        assert cache.counts[1].tolist() == [[n, n // 2]]
        check_pages(cache)


@pytest.mark.parametrize("share", SHARES)
def test_whole_model(share, gpu):
    """Faults: layers that mix, positions that advance twice, RoPE at the wrong position."""
    torch.manual_seed(1000 + int(100 * share))
    rng = random.Random(share)
    model = small_llama()
    for S, window in ((1, 4), (40, 17), (300, 64)):
        tokens = torch.randint(50, (2, S))
        policy = Replay(random_gates(3, 2, 2, S, share), window)
        want = model(tokens, Definition(policy, 2))
        for plan in splits(S, rng):
            got = run_model(model, tokens, DualCache(model, policy, 2), plan)
            equal(got, want, f"S {S}, W {window}, plan {plan[:3]}")

        # The second sequence stops after a third, and goes on in a second turn.
        cache = DualCache(model, policy, 2)
        third = S // 3
        got = model(tokens, cache, torch.tensor([S, third]))
        equal(got[1, :third], want[1, :third], "padded")
        got = model(tokens[:, third:], cache, torch.tensor([0, S - third]))
        equal(got[1], want[1, third:], "second turn")


def test_gates_in_the_model(gpu):
    """Faults: gates that see the wrong keys; tau = 0 taken for "no tau"."""
    torch.manual_seed(13)
    model = small_llama()
    gates = perturbed_gates(3, 2, 16, window=9, tau=0.5)
    tokens = torch.randint(50, (2, 120))
    want = model(tokens, Definition(gates, 2))
    for plan in splits(120, random.Random(13)):
        cache = DualCache(model, gates, 2)
        equal(run_model(model, tokens, cache, plan), want, f"plan {plan[:3]}")
    assert (cache.window, cache.tau) == (9, 0.5)
    assert 0.1 < cache.admitted(1).float().mean() < 0.9
    equal(model(tokens, DualCache(model, gates, 2, window=3, tau=0)), model(tokens), "tau 0")


GOLDEN = [517, 278, 564, 70, 284, 936, 397, 66, 367, 222, 19, 26, 22, 21, 15, 1]


@torch.no_grad()
def test_golden_transcript():
    """The bundled model's answer to its example, on a CPU, id by id."""
    folder = HERE / "tiny"
    model = Llama.from_pretrained(str(folder), dtype=torch.float32)
    text = Text(str(folder))
    gates = Gates.load(folder / "gates.safetensors", model)
    prompt = text.encode((folder / "example.txt").read_text())
    cache = DualCache(model, gates)
    hidden = generate.prefill(model, cache, [prompt])
    ids = [step[0] for step in generate.decode(model, cache, hidden, 16, text.end)]
    assert ids == GOLDEN
    assert text.decode(ids) == "The code of Martha is 2954."


def test_nothing_unwritten_is_read(gpu):
    """Faults: a ring slot, page or part of a page that holds no token, and gets weight."""
    torch.manual_seed(6)
    qkv = random_qkv(2, 2, 2, 150)
    g = random_gates(2, 2, 2, 150, 0.7)
    want = expected(qkv, g, 32)
    for plan in ([[1, 1]] * 9 + [[141, 141]], ragged([150, 90], random.Random(6))):
        for poison in (1e30, -1e30):        # finite, since a weight of 0 times NaN is NaN
            cache = DualCache(bare(), Replay(g, 32), 2)
            cache.pool.grow(40)
            cache.pool.k.fill_(poison)
            cache.pool.v.fill_(poison)
            equal(feed(cache, qkv, plan), want, f"poison {poison}")


# ----------------------------------------------------------------------------- rows, batches, views

@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_of_a_batch_equals_the_sequence_alone(seed, gpu):
    """Faults: stored padding, a neighbor's count or tokens, a pause that advances a sequence."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lengths = [200, *rng.sample((0, 1, 16, 18, 130, 150), 3)]
    qkv = random_qkv(2, 4, 2, 200, 3)
    g = random_gates(2, 4, 2, 200, rng.choice(SHARES[1:]))
    for layer in range(2):                          # in sequence 0 one head admits all, one none
        g[layer, 0, layer] = 1
        g[layer, 0, 1 - layer] = 0
    plan = ragged(lengths, rng)
    dual = DualCache(bare(), Replay(g, 17), 4)
    dense = DenseCache(bare(), 4)
    got_dual = feed(dual, qkv, plan)
    got_dense = feed(dense, qkv, plan)
    assert dual.num_tokens.tolist() == dense.num_tokens.tolist() == lengths
    assert dual.counts[:, 0].tolist() == [[183, 0], [0, 183]]
    check_pages(dual)

    for b, n in enumerate(lengths):
        alone = [x[:, b:b + 1] for x in qkv]
        plan = [[n]] if n else []
        cache = DualCache(bare(), Replay(g[:, b:b + 1], 17))
        equal(got_dual[:, b:b + 1], feed(cache, alone, plan), f"dual, lengths {lengths}")
        assert torch.equal(cache.admitted(), dual.admitted(b))
        want = feed(DenseCache(bare(), 1), alone, plan)
        equal(got_dense[:, b:b + 1], want, f"dense, lengths {lengths}")


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_clone(kind, gpu):
    """Two caches go on from one beginning with different texts: neither spoils the other."""
    torch.manual_seed(4)
    one = random_qkv(2, 2, 2, 180)
    two = random_qkv(2, 2, 2, 180)
    for a, b in zip(one, two):
        b[..., :90, :] = a[..., :90, :]
    g = random_gates(2, 2, 2, 180, 0.6 if kind == "dual" else 1)
    wants = [expected(one, g, 17), expected(two, g, 17)]
    for step in (1, 9, 90):
        cache = make_cache(kind, g, 17)
        feed(cache, one, [[60, 60], [1, 1], [29, 29]])
        clone = cache.clone()
        for _ in range(0, 90, step):
            equal(feed(cache, one, [[step, step]]), wants[0], f"original, step {step}")
            equal(feed(clone, two, [[step, step]]), wants[1], f"clone, step {step}")


@pytest.mark.parametrize("kind", ("dual", "dense"))
@pytest.mark.parametrize("window", (4, 17, 70))
def test_views_resets_and_clones_in_any_order(window, kind, gpu):
    """Faults: a page with two owners, or none; a view that misses what others made grow or move."""
    torch.manual_seed(window)
    rng = random.Random(window)
    S = 250
    qkv = random_qkv(2, 4, 2, S, 3)
    g = random_gates(2, 4, 2, S, 0.6 if kind == "dual" else 1)
    want = expected(qkv, g, window)
    whole = make_cache(kind, g, window)
    for step in range(40):
        first = rng.randrange(4)
        count = rng.randint(1, 4 - first)
        rows = slice(first, first + count)
        view = whole.sequences(first, count)
        if kind == "dual":
            view.admission = Replay(g[:, rows], window)     # the gates of its sequences

        operation = rng.choice(("feed", "feed", "feed", "reset", "clone"))
        if operation == "feed":
            most = rng.choice((1, 10, 100))
            plan = [[min(rng.randint(0, most), S - n) for n in view.num_tokens.tolist()]]
            got = feed(view, [x[:, rows] for x in qkv], plan)
            equal(got, want[:, rows], f"step {step}, {rows}, plan {plan}")
        elif operation == "reset":
            view.reset()
        else:
            left = whole
            whole = whole.clone()
            left.reset()

        plan = [[min(1, S - n) for n in whole.num_tokens.tolist()]]
        equal(feed(whole, qkv, plan), want, f"the whole after step {step}, {operation}")
        if kind == "dual":
            check_pages(whole)


# ------------------------------------------------------------------------------------------- memory

def test_pages_come_back(gpu):
    """Faults: a reset that loses pages or frees them twice: the same text then needs new ones."""
    torch.manual_seed(5)
    lengths = (400, 300, 200)
    qkv = random_qkv(2, 3, 2, 400)
    g = random_gates(2, 3, 2, 400, 0.8)
    want = expected(qkv, g, 8)
    cache = DualCache(bare(), Replay(g, 8), 3)
    feed(cache, qkv, [lengths])
    resets = ([(0, 3)], [(1, 1)], [(2, 1), (0, 1), (1, 1)], [(0, 1), (0, 1)], [(0, 3), (0, 3)])
    # Room is made for the worst case, so it is the second round that needs nothing new.
    for again in (False, True):
        for views in resets:
            for first, count in views:
                cache.sequences(first, count).reset()
                check_pages(cache)
            plan = [[n - m for n, m in zip(lengths, cache.num_tokens.tolist())]]
            equal(feed(cache, qkv, plan), want, f"{views}")
            if not again:
                reserved = cache.reserved_bytes()
            assert cache.reserved_bytes() == reserved, f"after reset of {views}"
    cache.reset()
    assert cache.dense_bytes() == 0
    assert cache.num_promoted() == 0


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_a_broken_call_needs_a_reset(kind, gpu):
    """After an exception between two layers, a cache refuses to go on until a reset.

    It must be a reset of the call's own sequences.
    """
    model = small_llama()
    tokens = torch.randint(50, (2, 60))
    cache = DenseCache(model, 2)
    if kind == "dual":
        cache = DualCache(model, RandomAdmission(1.0), 2, window=17)
    model(tokens[:, :20], cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens[1:, 20:], cache.sequences(1))
    hook.remove()
    cache.sequences(0).reset()
    for kv in (cache, cache.sequences(0), cache.sequences(1)):
        with pytest.raises(RuntimeError, match="reset"):
            kv.begin(1)
    cache.sequences(1).reset()
    equal(model(tokens, cache), model(tokens))


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_reserve(kind, gpu, monkeypatch):
    """Inside `reserve` nothing asks for room, or moves; unless a view has used it in between."""
    torch.manual_seed(16)
    qkv = random_qkv(2, 2, 2, 200)
    g = random_gates(2, 2, 2, 200, 1)
    want = expected(qkv, g, 17)
    cache = make_cache(kind, g, 17)
    feed(cache, qkv, [[30, 30]])
    calls = []
    make_room = type(cache).make_room

    def counted(self, tokens):
        calls.append((self.B, tokens))
        make_room(self, tokens)

    def memory():
        tensors = cache.k if kind == "dense" else [cache.pool.k, cache.page_table]
        return [x.data_ptr() for x in tensors]

    monkeypatch.setattr(type(cache), "make_room", counted)
    with cache.reserve(140):
        before = memory()
        equal(feed(cache, qkv, [[1, 1]] * 130), want)
        assert calls == [(2, 140)]
        assert memory() == before
        view = cache.sequences(1)
        if kind == "dual":
            view.admission = Replay(g[:, 1:], 17)
        equal(feed(view, [x[:, 1:] for x in qkv], [[1]]), want[:, 1:])
        equal(feed(cache, qkv, [[1, 1]] * 5), want)
    assert calls == [(2, 140), (1, P), (2, P)]
    equal(feed(cache, qkv, [[1, 1]] * 5), want)
    assert calls[3:] == [(2, P)], "what is left at the end of the block is not counted on"


def test_room_of_views_clones_and_replays(gpu):
    """Faults: a graph replays into memory that has moved; steps find no page, or a neighbor's."""
    torch.manual_seed(12)
    qkv = random_qkv(2, 2, 2, 600)
    g = torch.ones(2, 2, 2, 600)
    cache = DualCache(bare(), Replay(g, 9), 2)
    view = cache.sequences(1)
    view.admission = Replay(g[:, 1:], 9)
    before = cache.shared.reallocations
    with view.reserve(600):                     # what the pool did is seen through the view, too
        assert view.shared.reallocations == cache.shared.reallocations > before

    with cache.reserve(128):
        cache.take_room(128)                    # as many steps were replayed
        for other in (cache.clone(), cache):
            feed(other, qkv, [[128, 128]])      # makes room of its own
            check_pages(other)

    first, second = cache.sequences(0), cache.sequences(1)
    with first.reserve(64):
        with second.reserve(64):
            pass
        first.ensure_room(1)                    # the others may have taken what was reserved
        assert int(cache.pool.num_free) >= 4 and cache.shared.room[:2] == (0, 1)

    bounded = watched(g, 9, 20)
    feed(bounded, qkv, [[600, 500]])
    view = bounded.sequences(0)
    assert view.shared is bounded.shared and view.shared.tau_now == 1.0
    assert view.shared.num_evicted > 0 and view.shared.most_steps == P
    with bounded.decoding():
        with view.decoding():
            pass
        assert bounded.shared.in_decode and not bounded.clone().shared.in_decode
    assert not bounded.shared.in_decode


@pytest.mark.parametrize("kind", ("dual", "dense"))
def test_a_cache_is_freed_at_once(kind, gpu):
    """A reference cycle would keep gigabytes alive until the garbage collector comes by."""
    g = random_gates(2, 2, 2, 100, 0.5)
    gc.collect()
    gc.disable()
    try:
        cache = make_cache(kind, g, 17)
        feed(cache, random_qkv(2, 2, 2, 100), [[90, 80], [1, 1], [1, 0]])
        alive = [weakref.ref(cache), weakref.ref(cache.clone()), weakref.ref(cache.sequences(1))]
        del cache
        assert [ref() for ref in alive] == [None, None, None]
    finally:
        gc.enable()


# -------------------------------------------------------------------------- eviction and selection

class Watched(DualCache):
    """A cache that compares each output with dense attention over what its queries should see.

    It remembers all keys and values itself, and takes from the cache only the positions in pages.
    """

    def attend(self, layer, q, k, v, cos, sin):
        y = super().attend(layer, q, k, v, cos, sin)
        assert self.shared.most_pages is None or in_use(self) <= self.shared.most_pages
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        for b, (before, n) in enumerate(zip(self.num_tokens.tolist(), self.num_new.tolist())):
            if n == 0:
                continue
            history = self.base.__dict__.setdefault("history", {})
            old_k, old_v = history.get((layer, self.first + b), (k[b, :, :0], v[b, :, :0]))
            keys = torch.cat((old_k[:, :before], k[b, :, :n]), dim=1)           # (Hkv, S, D)
            values = torch.cat((old_v[:, :before], v[b, :, :n]), dim=1)
            history[layer, self.first + b] = keys, values
            S = before + n
            held = torch.zeros(self.Hkv, S, dtype=torch.bool)
            for h in range(self.Hkv):
                pos = self.row(self.pool.pos, layer, b, h).long()
                assert (pos.diff() > 0).all() and (pos <= S - 1 - self.window).all()
                group = q[b].view(self.Hkv, -1, *q.shape[2:])[h, :, 0]          # (G, D)
                if self.shared.in_decode and q.shape[2] == 1 and self.chosen_pages is not None:
                    pos = chosen_by_hand(pos, keys[h], group, self.chosen_pages)
                held[h, pos] = True
            i = torch.arange(before, S)[:, None]
            j = torch.arange(S)
            mask = (j <= i) & ((i - j < self.window) | held[:, None])           # (Hkv, n, S)
            want = dense_attention(q[b:b + 1, :, :n], keys[None], values[None], mask[None])
            equal(y[b:b + 1, :, :n], want, f"layer {layer}, sequence {b}, {n} tokens at {before}")
        return y

    def end(self):
        super().end()
        assert self.shared.most_pages is None or self.base.kept_bytes() <= self.base.budget
        check_pages(self.base)


def in_use(cache):
    return int(pages_for(cache.base.counts).sum())


def chosen_by_hand(pos, keys, q, most):
    """The positions of a row's promoted tokens that queries q (G, D) attend to: `most` pages.

    pos (count): of its promoted tokens; keys (S, D): all keys of the text.
    """
    bounds = []
    if len(pos) == 0:
        return pos
    pages = pos.split(P)
    for n, page in enumerate(pages):
        k = keys[page]                                                  # (P, D)
        bound = torch.maximum(q * k.amin(0), q * k.amax(0)).sum(-1).max().item()
        bounds.append((-math.inf if len(page) < P else -bound, n))      # a partial page comes first
    best = sorted(n for _, n in sorted(bounds)[:most])
    return torch.cat([pages[n] for n in best])


def watched(g, window, pages=None, Hkv=2, D=16, G=2, **settings):
    """A Watched cache whose budget has room for so many pages."""
    model = bare(len(g), Hkv, D, G=G)
    budget = None
    if pages is not None:
        free = DualCache(model, Replay(g, window), g.shape[1], budget=2**40, **settings)
        budget = free.fixed_bytes() + pages * free.page_bytes()
    cache = Watched(model, Replay(g, window), g.shape[1], budget=budget, **settings)
    cache.budget = budget
    return cache


@pytest.mark.parametrize("path, W, pages, select, evict_by", [
    ("pytorch", 20, 17, None, "gate"), ("pytorch", 20, 30, 192, "gate"),
    ("pytorch", 64, 22, 256, "snapkv"), ("pytorch", 65, 30, None, "snapkv"),
    ("pytorch", 100, None, 256, "gate"), ("triton", 20, 17, 192, "gate"),
    ("triton", 65, 18, 256, "snapkv")])
def test_every_call_sees_what_is_held_and_selected(path, W, pages, select, evict_by, request,
                                                   monkeypatch, gpu):
    """Prefills, steps, pauses, views, resets and clones, under a budget and a selection.

    Faults: a token moved to a wrong place, bounds that eviction or a refilled page left behind, a
    query that sees what has just been evicted, more bytes than the budget.
    """
    if path == "triton":
        kernels = request.getfixturevalue("kernels")
        monkeypatch.setattr(wgkv, "kernels_for", lambda x: PoisonedKernels(kernels, 3))
    elif DEVICE.type == "cuda":
        monkeypatch.setattr(wgkv, "kernels_for", lambda x: None)
    torch.manual_seed(W)
    rng = random.Random(W)
    steps = 70 if path == "pytorch" or DEVICE.type == "cuda" else 4
    qkv = random_qkv(2, 2, 2, 1500, 2)
    g = torch.rand(2, 2, 2, 1500)
    cache = watched(g, W, pages, select=select, evict_by=evict_by)
    feed(cache, qkv, [[3, 0], [1, 1], [280, 300], [1, 1], [0, 1], [66, 2], [1, 0]])
    with cache.decoding():
        feed(cache, qkv, [[1, 1]] * steps + [[1, 0], [0, 1], [130, 1]])
    clone = cache.clone()
    clone.history = dict(cache.history)
    for turn in (clone, cache):
        feed(turn, qkv, ragged([rng.randint(5, 80) for _ in range(2)], rng))
        with turn.decoding():
            feed(turn, qkv, [[1, 1]] * steps)
        one = turn.sequences(1)
        one.admission = Replay(g[:, 1:], W)
        if turn is cache:
            one.reset()
        feed(one, [x[:, 1:] for x in qkv], [[150], [1]])
        with turn.decoding():
            feed(one, [x[:, 1:] for x in qkv], [[1]] * (steps // 2))
            feed(turn, qkv, [[1, 1]] * 3)
    assert (cache.shared.num_evictions > 1) == (pages is not None)
    cache.reset()
    assert (cache.shared.num_evictions, cache.shared.tau_now) == (0, TAU)
    feed(cache, qkv, [[200, 90], [1, 1]])


@pytest.mark.parametrize("plan", ([[900]], [[100]] * 9, [[1]] * 900, [[500], *[[1]] * 300, [100]]))
def test_a_budget_is_a_rising_tau(plan, gpu):
    """What is held is what admission at the risen tau had promoted; later calls are the definition.

    Every gate is another number. The first tokens, which stay as sinks, have gates of 1.
    """
    torch.manual_seed(len(plan))
    S = 1000
    qkv = random_qkv(2, 1, 2, S)
    g = (torch.randperm(4 * S).float() / (4 * S)).view(2, 1, 2, S)
    g[..., :wgkv.SINKS] = 1.0
    cache = watched(g, 40, 22)
    for new in plan:
        feed(cache, qkv, [new])
    tau = cache.shared.tau_now
    assert cache.shared.num_evictions > 0 and tau > 0.3
    assert cache.shared.num_evicted > 0
    assert torch.equal(cache.admitted(), (g[:, 0, :, :900] >= tau).cpu())

    want = feed(Definition(Replay(g, 40, tau)), qkv, [[S]])
    for rest in ([[40]], [[1]] * 40):
        later = cache.clone()
        later.history = dict(cache.history)
        later.set_budget(2**30)                 # from now on there is room
        later.budget = 2**30
        got = feed(later, qkv, rest)
        equal(got[:, :, :, 900:940], want[:, :, :, 900:940])


@pytest.mark.parametrize("seed", range(6))
def test_best_tokens(seed, gpu):
    """The tokens of lowest score go one after the other, of equals the oldest, until it fits."""
    rng = random.Random(seed)
    values = [0.0, 0.25, 0.5, 1.0, math.inf] if seed % 2 else [rng.random() for _ in range(999)]
    rows = 3
    counts = [rng.randint(0, 300) for _ in range(rows)]
    row, scores, pos, tokens = [], [], [], []
    for r, count in enumerate(counts):
        for start in range(0, count, P):
            row.append(r)
            here = [rng.choice(values) for _ in range(min(P, count - start))]
            where = list(range(start * rows + r, (start + len(here)) * rows, rows))
            tokens += zip(here, where, [r] * len(here))
            scores.append(here + [-1.0] * (P - len(here)))
            pos.append(where + [7] * (P - len(where)))
    for target in {sum(map(pages_for, counts)) - n for n in (1, 2, 5)}:
        left = sorted(tokens)
        while sum(pages_for(sum(r == t[2] for t in left)) for r in range(rows)) > target:
            gone = left.pop(0)
        keep, cut = wgkv.best_tokens(torch.tensor(scores), torch.tensor(pos, dtype=torch.int32),
                                     torch.tensor(row), rows, target)
        got = {int(where) for where in torch.tensor(pos)[keep]}
        assert got == {where for _, where, _ in left}
        some_stay = any(score == torch.tensor(gone[0]) for score, _, _ in left)
        assert (cut == torch.tensor(gone[0])) if some_stay else cut > gone[0]


@pytest.mark.parametrize("path", ("pytorch", "triton"))
def test_snapkv_scores(path, request, monkeypatch, gpu):
    """Softmax over a row's held keys, largest of the group, mean of last queries, largest of 5."""
    torch.manual_seed(4)
    D, G = 24, 3
    for S, W in ((90, 20), (400, 20), (700, 300), (400, 270)):
        qkv = random_qkv(1, 2, 2, S, G, D)
        g = torch.rand(1, 2, 2, S)
        g[0, 0, 0, :P] = 1                      # a row of full pages
        g[0, 0, 0, P:] = 0
        monkeypatch.setattr(wgkv, "kernels_for", lambda x: None)
        cache = watched(g, W, 40, D=D, G=G, evict_by="snapkv")
        feed(cache, qkv, [[S - 30, S - 70]] + [[1, 1]] * 30)
        if path == "triton":
            cache.kernels = request.getfixturevalue("kernels")
        cos, sin = angles(torch.arange(S)[None], D)
        q = rotate(qkv[0][0], cos, sin)
        k = rotate(qkv[1][0], cos, sin)
        counts = cache.counts.flatten()
        row = torch.arange(4).repeat_interleave(pages_for(counts))
        pages, held = [], []
        for r, count in enumerate(counts.tolist()):
            table = cache.page_table.flatten(0, 2)[r, cache.R:]
            pages += table[:pages_for(count)].tolist()
            held += [i < count for i in range(pages_for(count) * P)]
        scores = wgkv.snapkv_scores(cache, torch.tensor(pages), row, torch.tensor(held).view(-1, P))
        start = 0
        for b, n in enumerate((S, S - 40)):
            last = q[b, :, max(0, n - min(W, 256)):n].view(2, G, -1, D)
            for h in range(2):
                pos = cache.row(cache.pool.pos, 0, b, h).long()
                weights = (last[h] @ k[b, h, pos].T / D ** 0.5).softmax(-1)     # (G, n, count)
                mean = weights.max(0).values.mean(0)
                want = [mean[max(0, x - 2):x + 3].max() for x in range(len(pos))]
                stop = start + pages_for(len(pos))
                equal(scores[start:stop].flatten()[:len(pos)], torch.stack(want))
                start = stop


@pytest.mark.parametrize("evict_by", ("gate", "snapkv"))
def test_what_changes_nothing_changes_no_bit(evict_by, gpu):
    """A budget that is never reached, a selection of everything; and one split gives one result."""
    torch.manual_seed(8)
    qkv = random_qkv(2, 2, 2, 420, 2)
    g = torch.rand(2, 2, 2, 420)
    plan = [[200, 170], *[[1, 1]] * 70, [30, 12], *[[1, 0]] * 9]

    def outputs(**settings):
        model = bare(G=2)
        cache = DualCache(model, Replay(g, 30), 2, **settings)
        with cache.decoding():
            return feed(cache, qkv, plan), cache

    want, cache = outputs()
    roomy, _ = outputs(budget=2**30, evict_by=evict_by, select=4096)
    assert torch.equal(roomy, want)
    tight = cache.fixed_bytes() + 22 * cache.page_bytes()
    if evict_by == "snapkv":            # 256 queries of 4 heads of 16 numbers, and their number
        tight += 2 * 2 * (4 * 256 * 16 * 4 + 8)
    first, cache = outputs(budget=tight, evict_by=evict_by)
    again, _ = outputs(budget=tight, evict_by=evict_by)
    assert cache.shared.num_evictions > 0
    assert torch.equal(first, again) and not torch.equal(first, want)


def test_too_small_budgets_and_selections(gpu):
    """Faults: a bound that cannot hold. The message names what can."""
    g = torch.rand(2, 1, 2, 10)
    for settings in ({}, dict(evict_by="snapkv"), dict(select=256)):
        model = bare(G=2)
        least = watched(g, 70, 8, **settings).budget        # two pages for each of four rows
        DualCache(model, Replay(g, 70), budget=least, **settings)
        refused(lambda: DualCache(model, Replay(g, 70), budget=least - 1, **settings),
                f"{least - 1:,}", f"{least:,}")
    DualCache(bare(), Replay(g, 70), select=3 * P)
    refused(lambda: DualCache(bare(), Replay(g, 70), select=3 * P - 1), "191", "192")


# -------------------------------------------------------------------------------------------- bytes

def test_bytes_and_positions(gpu):
    """Faults: bytes that are missed or counted twice; pages with other tokens, or in disorder."""
    torch.manual_seed(8)
    lengths = (500, 260)
    W = 32
    D = 24
    qkv = random_qkv(2, 2, 3, 500, 1, D)
    g = random_gates(2, 2, 3, 500, 0.4)
    cache = DualCache(bare(2, 3, D), Replay(g, W), 2)
    dense = DenseCache(bare(2, 3, D), 2)
    feed(cache, qkv, ragged(lengths, random.Random(8)))
    feed(dense, qkv, [lengths])

    pool = cache.pool
    page = 64 * (2 * D * 4 + 4 + 4) + 4             # K, V, gate, position; and an entry of a table
    kept = 2 * 8                                    # num_tokens
    for layer, b, h in itertools.product(range(2), range(2), range(3)):
        old = (g[layer, b, h, :lengths[b] - W] >= TAU).nonzero()[:, 0].tolist()
        cos, sin = angles(torch.tensor([old]), D)
        keys = rotate(qkv[1][layer, b, h, old], cos[0, 0], sin[0, 0])
        assert cache.row(pool.pos, layer, b, h).tolist() == old
        assert torch.equal(cache.row(pool.g, layer, b, h), g[layer, b, h, old])
        equal(cache.row(pool.k, layer, b, h), keys, "keys")
        equal(cache.row(pool.v, layer, b, h), qkv[2][layer, b, h, old], "values")
        kept += (1 + math.ceil(len(old) / 64)) * page + 8       # a ring of one page; the count
    assert cache.kept_bytes() == kept
    assert cache.dense_bytes() == dense.dense_bytes() == 2 * 2 * 3 * D * 4 * sum(lengths)
    assert dense.kept_bytes() == dense.dense_bytes()


@pytest.mark.parametrize("told", (False, True))
@pytest.mark.parametrize("every", (1, 2, 10))
def test_reserved_stays_near_kept(every, told, gpu, monkeypatch):
    """A pool that doubles wastes half. One that knows the prompt's length grows early, and twice.

    Once for the first chunk, and once for all that follow: to grow, it must copy itself.
    """
    S = 6000
    chunk = 448
    slot = 2 * (8 * 4 * 2 + 8)                      # the bytes of a token in both heads
    g = torch.zeros(1, 1, 2, S)
    g[..., ::every] = 1
    qkv = random_qkv(1, 1, 2, S, 1, 8)
    cache = DualCache(bare(1, 2, 8), Replay(g, 64))
    growths = []
    grow = PagePool.grow

    def counted(self, pages):
        growths.append(pages)
        grow(self, pages)

    monkeypatch.setattr(PagePool, "grow", counted)
    if told:
        cache.expect([S])
    for _ in range(S // chunk):
        feed(cache, qkv, [[chunk]])
        kept = cache.kept_bytes()
        reserved = cache.reserved_bytes()
        bound = kept + 0.15 * (kept - P * slot) + (chunk + P) * slot        # P: page 0 and tables
        assert kept <= reserved
        assert told or reserved <= bound
    assert reserved <= bound
    assert not told or len(growths) <= 2, f"grew by {growths} pages"


def test_dense_cache(gpu):
    """The baseline is causal attention, in any split, and after a reset."""
    torch.manual_seed(7)
    rng = random.Random(7)
    model = small_llama(7)
    for S in (1, 2, 50, 300):
        tokens = torch.randint(50, (3, S))
        want = model(tokens)
        for plan in splits(S, rng):
            cache = DenseCache(model, 3)
            equal(run_model(model, tokens, cache, plan), want, f"S {S}, plan {plan[:3]}")
    cache.reset()
    equal(model(tokens[:, :9], cache), model(tokens[:, :9]), "after reset")


# ----------------------------------------------------------------------------- gates and gate files

def naive_gate(k, k_rotated, *parameters):
    """The formula for one head and one token, in fp64. parameters: as in wgkv.Gate."""
    k, k_rotated, pre, post, w1, b1, w2, b2 = (x.double() for x in (k, k_rotated, *parameters))
    k = k / (k.square().mean() + 1e-6).sqrt() * pre
    k_rotated = k_rotated / (k_rotated.square().mean() + 1e-6).sqrt() * post
    h = w1 @ torch.cat((k, k_rotated)) + b1
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return torch.sigmoid(w2 @ h + b2)


def perturbed_gates(*args, **settings):
    """Gates whose norms, too, are no longer what they start as."""
    gates = Gates(*args, **settings)
    for p in gates.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return gates


@pytest.mark.parametrize("expansion", (4.0, 1.5))
def test_gates_by_the_formula(expansion):
    """Faults: mixed heads or sequences, the tanh GELU, a norm without its weight or epsilon."""
    torch.manual_seed(10)
    gates = perturbed_gates(2, 3, 6, expansion=expansion)
    k, k_rotated = torch.randn(2, 2, 3, 5, 6)
    k[1] *= 1e-3                    # so small that epsilon matters
    k_rotated[1] *= 1e-3
    for layer, m in enumerate(gates.layers):
        g = gates.gate(layer, k, k_rotated, None)
        assert g.shape == (2, 3, 5) and g.dtype == torch.float32
        for b, h, t in itertools.product(range(2), range(3), range(5)):
            parameters = m.pre_norm, m.post_norm, m.w1[h], m.b1[h], m.w2[h], m.b2[h]
            want = naive_gate(k[b, h, t], k_rotated[b, h, t], *parameters)
            assert abs(g[b, h, t] - want) < 1e-5


def test_gate_files(tmp_path, capsys):
    """A file comes back whole. Faults: others' gates, or broken ones, taken in silence."""
    model = small_llama()
    sibling = small_llama(1)
    sibling.name = "the-sibling"
    path = tmp_path / "g.safetensors"
    gates = perturbed_gates(3, 2, 16, window=33, tau=0.25, expansion=1.5)
    gates.save(path, model, lam=0.16)
    assert os.listdir(tmp_path) == ["g.safetensors"]
    meta = safe_open(path, "pt").metadata()
    assert meta["lam"] == "0.16"
    for reader, remarks in ((model, 0), (sibling, 1)):
        loaded = Gates.load(path, reader)
        assert loaded.shape == (3, 2, 16)
        assert (loaded.window, loaded.tau, loaded.expansion) == (33, 0.25, 1.5)
        for a, b in zip(gates.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
        said = capsys.readouterr().err
        assert said.count("\n") == said.count("the-sibling") == remarks

    other = small_llama(num_layers=2, num_kv_heads=3)
    refused(lambda: Gates.load(path, other), str(path), "3 layers, 2 KV heads of 16",
            "2 layers, 3 KV heads of 16")
    tensors = load_file(path)
    name = "layers.1.w2"
    no_tensor = {key: x for key, x in tensors.items() if key != name}
    no_window = {key: x for key, x in meta.items() if key != "window"}
    for content, metadata, words in (
            (tensors, None, "format 1"),
            (tensors, {**meta, "format": "0"}, "'0'"),
            (tensors, no_window, "window"),
            (tensors, {**meta, "tau": "high"}, "high"),
            (no_tensor, meta, f"{name} is missing"),
            ({**tensors, "layers.3.w2": torch.ones(2, 24)}, meta, "layers.3.w2"),
            ({**tensors, name: torch.ones(24, 2)}, meta, f"{name} has shape (24, 2), not (2, 24)")):
        save_file(content, tmp_path / "broken", metadata)
        refused(lambda: Gates.load(tmp_path / "broken", model), "broken", words)
    for size in (0, 4, 100, os.path.getsize(path) - 1):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
        refused(lambda: Gates.load(tmp_path / "cut", model), "cut")
    refused(lambda: Gates.load(tmp_path / "absent", model), "absent")


def test_gates_in_bf16(tmp_path, capsys):
    """Half the file, rounded once. Faults: gates that compute in bf16, or of whole numbers."""
    model = small_llama()
    gates = perturbed_gates(3, 2, 16)
    gates.quantiles = {256: [n / 64 for n in range(65)]}
    gates.save(tmp_path / "fp32", model)
    gates.save(tmp_path / "bf16", model, dtype=torch.bfloat16)
    sizes = [os.path.getsize(tmp_path / name) for name in ("fp32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Gates.load(tmp_path / "bf16", model)
    for a, b in zip(gates.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)
    assert loaded.quantiles == gates.quantiles

    meta = safe_open(tmp_path / "bf16", "pt").metadata()
    tensors = {name: x.half() for name, x in load_file(tmp_path / "bf16").items()}
    save_file(tensors, tmp_path / "fp16", meta)
    refused(lambda: Gates.load(tmp_path / "fp16", model), "F16", "F32 or BF16")
    assert capsys.readouterr().err == ""

    other = small_llama(1)                      # the same model's name, other weights
    model.name, other.name = "hub/A-Model", "a-model"
    gates.save(tmp_path / "g", model)
    Gates.load(tmp_path / "g", other)
    assert "other weights of a-model" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk never leaves half a file where a good one was."""
    model = small_llama()
    path = tmp_path / "g"
    Gates.for_model(model).save(path, model)
    before = path.read_bytes()

    def full_disk(tensors, part, metadata):
        with open(part, "wb") as f:
            f.write(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    refused(lambda: Gates.for_model(model).save(path, model), "No space left")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["g"]
    refused(lambda: Gates.for_model(model).save(tmp_path / "no folder" / "g", model), "no folder")


# The authors' names of pre_norm, post_norm, w1, b1, w2 and b2.
THEIRS = ["pre_key_norm.weight", "post_key_norm.weight", "conv1.weight", "conv1.bias",
          "conv2.weight", "conv2.bias"]


def official(L, Hkv, D, E, kind=torch.Tensor):
    """Random gates in the layout of the authors' checkpoints."""
    hidden = int(E * D)
    shapes = [(D,), (D,), (Hkv * hidden, 2 * D, 1), (Hkv * hidden,), (Hkv, hidden, 1), (Hkv,)]
    file = {}
    for layer in range(L):
        for name, shape in zip(THEIRS, shapes):
            tensor = kind(torch.randn(shape))
            file[f"model.layers.{layer}.self_attn.g_predictors.{name}"] = tensor
    return file


@pytest.mark.parametrize("E", (4, 1.5))
def test_official_checkpoints(E, tmp_path):
    """Faults: a head's rows taken from another, the norms exchanged, Parameters or bf16 refused."""
    torch.manual_seed(11)
    model = small_llama()
    hidden = int(E * 16)
    for kind in (torch.Tensor.bfloat16, torch.nn.Parameter):
        file = official(3, 2, 16, E, kind)
        torch.save(file, tmp_path / "g.pt")
        gates = Gates.load(tmp_path / "g.pt", model)
        assert (gates.window, gates.tau, gates.expansion) == (256, 0.1, E)
        for layer, gate in enumerate(gates.layers):
            prefix = f"model.layers.{layer}.self_attn.g_predictors."
            pre, post, w1, b1, w2, b2 = (file[prefix + name].float() for name in THEIRS)
            assert torch.equal(gate.pre_norm, pre)
            assert torch.equal(gate.post_norm, post)
            assert torch.equal(gate.b2, b2)
            for h in range(2):
                rows = slice(h * hidden, (h + 1) * hidden)      # of head h
                assert torch.equal(gate.w1[h], w1[rows, :, 0])
                assert torch.equal(gate.b1[h], b1[rows])
                assert torch.equal(gate.w2[h], w2[h, :, 0])


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_broken_official_checkpoints(tmp_path):
    """Faults: a pickle that runs; a missing, unknown or misshapen tensor that is taken."""
    model = small_llama()
    path = tmp_path / "g.pt"
    good = official(3, 2, 16, 4)
    prefix = "model.layers.1.self_attn.g_predictors."

    def refuse(content, *words):
        torch.save(content, path)
        refused(lambda: Gates.load(path, model), "g.pt", *words)

    refuse({**good, prefix + "conv1.weight": Bomb(tmp_path / "exploded")})
    assert not (tmp_path / "exploded").exists()
    incomplete = dict(good)
    del incomplete[prefix + "conv2.bias"]
    refuse(incomplete, "layers.1.b2 is missing")
    for name in (prefix + "conv3.weight", "model.norm.weight", 7):
        refuse({**good, name: torch.ones(2)}, str(name))
    refuse({**good, prefix + "conv1.bias": 3.0}, prefix + "conv1.bias")
    for name, layer in itertools.product(THEIRS, "01"):
        for shape in ((128, 32, 2), (32, 128, 1), (1,), (0,), ()):
            refuse({**good, prefix.replace("1", layer) + name: torch.ones(shape)})
    refuse(official(2, 2, 16, 4), "2 layers, 2 KV heads of 16", "3 layers, 2 KV heads of 16")
    refuse(official(3, 4, 32, 4), "3 layers, 4 KV heads of 32", "3 layers, 2 KV heads of 16")
    for content in ({}, torch.ones(3), [good], None):
        refuse(content)
    path.write_bytes(path.read_bytes()[:50])
    refused(lambda: Gates.load(path, model), "g.pt")


@pytest.mark.parametrize("share", (0.0, 0.25, 1.0))
def test_random_admission(share):
    """Faults: a hash that is unfair, or that repeats itself over heads, layers or seeds."""
    S = 100_000
    positions = torch.arange(S)[None]
    k = torch.empty(2, 3, S, 1)
    streams = []
    for seed, layer in itertools.product((0, 1), (0, 1, 30)):
        streams.append(RandomAdmission(share, seed).gate(layer, k, k, positions)[0] >= 0)
    admitted = torch.cat(streams)                                       # (18, S) bool
    error = (admitted.float().mean(1) - share).abs()
    assert (error <= (0.02 if 0 < share < 1 else 0)).all()

    # Two streams, or a stream and itself one token later, agree as often as two coins do.
    by_chance = share ** 2 + (1 - share) ** 2
    pairs = [(a, b) for a, b in itertools.combinations(admitted, 2)]
    pairs += [(a[1:], a[:-1]) for a in admitted]
    for a, b in pairs:
        assert abs((a == b).float().mean() - by_chance) < 0.02

    some = torch.stack((positions[0, 50:57], positions[0, 3:10]))       # of two sequences
    part = RandomAdmission(share).gate(1, k[:, :, :7], k, some) >= 0
    assert torch.equal(part[0], admitted[3:6, 50:57])
    assert torch.equal(part[1], admitted[3:6, 3:10])


# ------------------------------------------------------------------------------------- saved caches

@pytest.mark.parametrize("kind", ("dual", "dense", "gate", "snapkv", "select"))
def test_a_loaded_cache_goes_on_as_the_saved_one(kind, gpu, tmp_path):
    """Another process gets the outputs of one process, bit by bit, and may save again.

    Faults: a partial page, a ring that is not full, an empty sequence, lost queries, stale bounds.
    """
    model = small_llama(7, num_layers=2)
    torch.manual_seed(7)
    tokens = torch.randint(50, (3, 500))
    budget = DualCache(model, RandomAdmission(0.6), 3, 30, budget=2**40).fixed_bytes()
    page = DualCache(model, RandomAdmission(0.6), 3, 30).page_bytes()

    def make():
        if kind == "dense":
            return DenseCache(model, 3)
        settings = dict(window=30)
        if kind in ("gate", "snapkv"):
            settings.update(evict_by=kind, budget=budget + 24 * page)
        if kind == "snapkv":
            settings["budget"] += 2 * 3 * (6 * 256 * 16 * 4 + 8)
        if kind == "select":
            settings["select"] = 128
        return DualCache(model, RandomAdmission(0.6), 3, **settings)

    def more(kv):
        outputs = [model(tokens[:, 300:370], kv, torch.tensor([70, 0, 9]))]
        with kv.decoding():
            outputs += [model(tokens[:, n:n + 1], kv) for n in range(370, 380)]
        return [x[[0, 2]] for x in outputs]         # the second sequence was empty

    for lengths in ([450, 0, 300], [20, 0, 5], [0, 0, 0]):
        kv = make()
        for start in range(0, 450, 150):
            model(tokens[:, start:start + 150], kv,
                  (torch.tensor(lengths) - start).clamp(0, 150))
        ids = [tokens[b, :n].tolist() for b, n in enumerate(lengths)]
        path = tmp_path / "x.cache"
        kv.save(path, model, ids, dict(about="x"))
        loaded = make()
        assert loaded.load(path, model) == (ids, dict(about="x"))
        assert loaded.kept_bytes() == kv.kept_bytes()
        loaded.save(tmp_path / "again.cache", model, ids, dict(about="x"))
        saved, again = load_file(path), load_file(tmp_path / "again.cache")
        assert saved.keys() == again.keys()
        assert all(torch.equal(again[name], x) for name, x in saved.items() if x.isfinite().all())
        if kind in ("gate", "snapkv"):
            assert loaded.shared.num_evicted == kv.shared.num_evicted
            assert loaded.shared.tau_now == kv.shared.tau_now
            assert kv.shared.num_evicted > 0 or lengths[0] < 450
        for got, want in zip(more(loaded), more(kv)):
            assert torch.equal(got[want.isfinite()], want[want.isfinite()])
        if kind != "dense":
            check_pages(loaded)


def test_broken_cache_files(tmp_path):
    """Each is refused in a line, before memory is taken for what it claims, and leaves no trace."""
    model = small_llama(8, num_layers=2)
    torch.manual_seed(8)
    tokens = torch.randint(50, (1, 200))
    kv = DualCache(model, RandomAdmission(0.6), window=30)
    model(tokens, kv)
    path = tmp_path / "x.cache"
    kv.save(path, model, tokens.tolist())
    good = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()

    def broken(change=lambda tensors: None, **metadata):
        tensors = {name: x.clone() for name, x in good.items()}
        change(tensors)
        save_file(tensors, tmp_path / "broken", metadata={**meta, **metadata})
        return tmp_path / "broken"

    def put(name, index, value):
        def change(tensors):
            tensors[name][index] = value
        return broken(change)

    def swap(name, value):
        return broken(lambda tensors: tensors.update({name: value}))

    cases = [
        (lambda: put("counts", (0, 0, 0), -1), "count of promoted"),
        (lambda: put("counts", (0, 0, 0), 171), "count of promoted"),
        (lambda: put("counts", (1, 0, 1), 2**62), "count of promoted"),
        (lambda: put("counts", (0, 0, 0), 1), "k should be F32 of shape"),
        (lambda: put("num_tokens", 0, 2**40), "num_tokens"),
        (lambda: put("num_tokens", 0, -5), "num_tokens"),
        (lambda: put("num_tokens", 0, 199), "ids should be I32 of shape (199,)"),
        (lambda: put("ids", 0, 50), "ids should be from 0 to 49"),
        (lambda: put("ids", 0, -1), "ids should be from 0 to 49"),
        (lambda: put("k", (0, 0, 0), math.nan), "'k' holds NaN"),
        (lambda: put("v", (3, 9, 1), math.inf), "'v' holds NaN"),
        (lambda: put("g", (0, 2), math.nan), "gate is NaN"),
        (lambda: put("g", (0, 2), -math.inf), "gate is NaN"),
        (lambda: put("pos", (0, 0), 7), "positions"),
        (lambda: put("pos", (1, 0), 180), "positions"),
        (lambda: put("pos", (1, 0), -3), "positions"),
        (lambda: put("pos", (1, 1), good["pos"][1, 0]), "positions"),
        (lambda: put("tau_now", 0, 0.05), "tau_now"),
        (lambda: put("tau_now", 0, math.nan), "tau_now"),
        (lambda: swap("k", good["k"][:-1].clone()), "k should be"),
        (lambda: swap("k", good["k"].half()), "k should be F32"),
        (lambda: swap("counts", good["counts"].int()), "counts should be I64"),
        (lambda: broken(lambda tensors: tensors.pop("g")), "g is missing"),
        (lambda: broken(fingerprint="0"), "fingerprint"),
        (lambda: broken(window="31"), "window"),
        (lambda: broken(tau="0.2"), "tau"),
        (lambda: broken(dtype="bfloat16"), "dtype"),
        (lambda: broken(admission="random 0.5, seed 0"), "admission"),
        (lambda: broken(cache_format="0"), "cache_format"),
        (lambda: broken(notes="["), "cannot be read"),
        (lambda: broken(notes="7"), "notes"),
    ]
    for make, words in cases:
        empty = DualCache(model, RandomAdmission(0.6), window=30)
        file = make()
        refused(lambda: empty.load(file, model), "broken", words)
        assert not empty.num_tokens.any() and not empty.counts.any()
        check_pages(empty)
        equal(model(tokens, empty), model(tokens, kv_like(model)))

    whole = path.read_bytes()
    texts = [whole[:100], whole[:-10], b"", b"\xff" * 200,
             (2**60).to_bytes(8, "little") + whole[8:],
             b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]
    for text in texts:
        path.write_bytes(text)
        refused(lambda: kv_like(model).load(path, model), str(path))
    refused(lambda: kv_like(model).load(tmp_path, model), "not a regular file")
    refused(lambda: kv_like(model).load(tmp_path / "nowhere", model), "nowhere")


def kv_like(model):
    return DualCache(model, RandomAdmission(0.6), window=30)


def test_a_killed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A disk that is full while a cache is written: the old file stays, no part of the new one."""
    model = small_llama(9, num_layers=1)
    kv = kv_like(model)
    path = tmp_path / "x.cache"
    path.write_bytes(b"old")

    def full_disk(tensors, part, metadata):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    refused(lambda: kv.save(path, model, [[]]), "No space left")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------- training

SOFT_NAMES = ("out", "dq", "dk", "dv", "d_log_g")


def soft_definition(q, k, v, log_g, window):
    """Soft attention with the whole T x T matrix, so that autograd finds its gradients."""
    T = q.shape[2]
    G = q.shape[1] // k.shape[1]
    i = torch.arange(T)[:, None]
    j = torch.arange(T)
    k, v, log_g = (x.repeat_interleave(G, dim=1) for x in (k, v, log_g))
    bias = torch.where(i - j < window, 0.0, log_g[:, :, None])              # (B, Hq, T, T)
    scores = q @ k.mT / math.sqrt(q.shape[3]) + bias
    return scores.masked_fill(j > i, -math.inf).softmax(dim=-1) @ v


def causal_attention(q, k, v, log_g, window):
    """torch's own, which soft attention must be with every gate at 1."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y + 0 * log_g.sum()              # so that log_g has a gradient, too


def soft_inputs(B, Hkv, G, T, D, dtype=torch.float32):
    """q, k, v, log_g, and the gradient of the output."""
    q = torch.randn(B, Hkv * G, T, D, dtype=dtype)
    k = torch.randn(B, Hkv, T, D, dtype=dtype)
    v = torch.randn(B, Hkv, T, D, dtype=dtype)
    do = torch.randn(B, Hkv * G, T, D, dtype=dtype)
    return q, k, v, 3 * torch.rand(B, Hkv, T).log(), do


def soft_gradients(attention, q, k, v, log_g, do, window, dtype=None):
    """[out, dq, dk, dv, d_log_g], computed in another dtype if one is given."""
    with torch.enable_grad():
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, log_g)]
        out = attention(*leaves, window)
        return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def same_gradients(got, want, tolerance=2e-5):
    for name, x, y in zip(SOFT_NAMES, got, want):
        assert x.shape == y.shape and x.isfinite().all(), name
        error = (x.double() - y).abs().max().item()
        largest = max(1, y.abs().max().item())
        assert error <= tolerance * largest, f"{name}: off by {error:.2e}, of {largest:.2e}"


@pytest.fixture(params=("pytorch", "triton"))
def soft(request, kernels, gpu):
    """wgkv.soft_attention, in many blocks, and kernels.soft_attention: one function, one test."""
    if request.param == "pytorch":
        return functools.partial(wgkv.soft_attention, block=32)
    return kernels.soft_attention


@pytest.mark.parametrize("T, W, G, D", [
    (1, 1, 1, 16), (2, 16, 1, 80), (63, 16, 4, 24), (65, 1, 3, 16), (65, 64, 1, 64),
    (130, 100, 1, 24), (150, 15, 3, 16), (150, 1000, 1, 16), (65, 18, 2, 17), (40, 8, 1, 160)])
def test_soft_gradients(soft, T, W, G, D):
    """Faults: a bound of a loop, the padding of T and D, the sum over a group's heads."""
    torch.manual_seed(T)
    x = soft_inputs(2, 2 if T < 100 else 1, G, T, D)
    want = soft_gradients(soft_definition, *x, W, dtype=torch.float64)
    same_gradients(soft_gradients(soft, *x, W), want)


def test_soft_gates_closed_and_mixed(soft):
    """A gate of 0 hides its key outside the window: no NaN, and no gradient for the gate."""
    torch.manual_seed(2)
    q, k, v, log_g, do = soft_inputs(1, 2, 2, 130, 24)
    closed = torch.full_like(log_g, -math.inf)
    mixed = log_g.masked_fill(torch.rand_like(log_g) < 0.5, -math.inf)
    for shut in (closed, mixed):
        finite = shut.clamp(min=-1e4)       # autograd of the definition gives NaN for -inf
        want = soft_gradients(soft_definition, q, k, v, finite, do, 16, torch.float64)
        got = soft_gradients(soft, q, k, v, shut, do, 16)
        same_gradients(got, want)
        assert (got[4][shut == -math.inf] == 0).all()


def test_soft_strides_and_bits(soft):
    """q, k, v as a fused projection leaves them, an expanded gradient; two runs give equal bits."""
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 70, 4 + 2 + 2, 24).transpose(1, 2).split([4, 2, 2], dim=1)
    log_g = torch.rand(2, 70, 2).log().transpose(1, 2)
    do = torch.randn(2, 1, 70, 1).expand(2, 4, 70, 24)
    got = soft_gradients(soft, q, k, v, log_g, do, 16)
    again = soft_gradients(soft, q, k, v, log_g, do, 16)
    want = soft_gradients(soft_definition, q, k, v, log_g, do, 16, dtype=torch.float64)
    same_gradients(got, want)
    assert all(map(torch.equal, got, again))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="fp32 tiles of this size spill")
@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 64), (64, 128)])
@pytest.mark.parametrize("T, W", [(150, 15), (130, 18), (200, 100)])
def test_soft_gradients_for_oblong_tiles(tile, T, W, kernels, monkeypatch, gpu):
    """Half precision has such tiles. Faults: bounds that hold for square ones or whole windows."""
    monkeypatch.setattr(kernels, "tile", lambda table, DP, dtype: (*tile, 4, 1))
    torch.manual_seed(T)
    x = soft_inputs(1, 1, 2, T, 16)
    want = soft_gradients(soft_definition, *x, W, dtype=torch.float64)
    same_gradients(soft_gradients(kernels.soft_attention, *x, W), want)


def test_soft_attention_of_a_checkpointed_layer(kernels, gpu, monkeypatch):
    """The second run takes the first one's result, with the same gradients, and leaves nothing."""
    torch.manual_seed(5)
    *x, do = soft_inputs(1, 2, 2, 70, 24)
    first_run = []
    attend = functools.partial(kernels.soft_attention, first_run=first_run)
    want = soft_gradients(attend, *x, do, 16)
    assert len(first_run) == 1 and not first_run[0][0].requires_grad
    monkeypatch.setattr(kernels, "soft_forward", None)
    assert all(map(torch.equal, soft_gradients(attend, *x, do, 16), want))
    assert not first_run


@needs_gpu
@pytest.mark.parametrize("T, G, D, dtype", [
    (150, 3, 16, torch.bfloat16), (513, 1, 64, torch.bfloat16), (777, 2, 80, torch.bfloat16),
    (1000, 4, 128, torch.bfloat16), (1000, 4, 128, torch.float16), (333, 2, 256, torch.bfloat16)])
def test_soft_half_precision(T, G, D, dtype, kernels, gpu):
    """With open gates, at most 1.5 times the error of torch's attention; with others, near fp64."""
    torch.manual_seed(T)
    q, k, v, log_g, do = soft_inputs(2, 2, G, T, D, dtype)
    is_open = torch.zeros_like(log_g)
    want = soft_gradients(causal_attention, q, k, v, is_open, do, 100, torch.float64)
    ours = soft_gradients(kernels.soft_attention, q, k, v, is_open, do, 100)
    theirs = soft_gradients(causal_attention, q, k, v, is_open.to(dtype), do, 100)
    for name, a, b, truth in list(zip(SOFT_NAMES, ours, theirs, want))[:4]:
        our_error = (a.double() - truth).square().mean().sqrt().item()
        their_error = (b.double() - truth).square().mean().sqrt().item()
        assert our_error <= 1.5 * their_error, f"{name}: {our_error:.2e}, torch {their_error:.2e}"
    want = soft_gradients(soft_definition, q, k, v, log_g, do, 100, torch.float64)
    got = soft_gradients(kernels.soft_attention, q, k, v, log_g, do, 100)
    same_gradients(got, want, 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_the_student(gpu):
    """SoftAttention keeps log g finite and reports its gates; hard, it is the definition."""
    torch.manual_seed(12)
    qkv = random_qkv(1, 2, 2, 70, 2)
    g = random_gates(1, 2, 2, 70, 0.4)
    g[..., ::5] = 0                         # below MIN_GATE: log g would be -inf
    q, k, v = (x[0] for x in qkv)
    hard = SoftAttention(Replay(g, 9), DEVICE, hard=True)
    cos, sin = angles(hard.begin(70), 16)
    equal(hard.attend(0, q, k, v, cos, sin), expected(qkv, g, 9)[0], "hard")

    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in (g, q, k, v)]
        soft = SoftAttention(Replay(g, 9), DEVICE)
        soft.begin(70)
        y = soft.attend(0, q, k, v, cos, sin)
        log_g = g[0].clamp(min=MIN_GATE).log()
        want = soft_definition(rotate(q, cos, sin), rotate(k, cos, sin), v, log_g, 9)
        equal(y, want, "soft")
        weight = torch.randn_like(y)
        got_grads = torch.autograd.grad((y * weight).sum(), leaves)
        want_grads = torch.autograd.grad((want * weight).sum(), leaves)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert (got_grads[0][..., 70 - 9:] == 0).all()     # no query sees these from outside its window
    assert torch.equal(soft.g[0], g[0])


def test_sparsity_loss():
    """The expected share, by hand: T = 4 and W = 2, so o = 2/4, 2/3, 1, 1."""
    g = torch.tensor([[0.5, 0.2, 0.9, 0.0], [1.0, 0.0, 0.0, 0.0]])
    first = (0.5 + 0.5 * 0.75) + (2 / 3 + 1 / 3 * 0.36) + 1 + 1
    second = 1 + 2 / 3 + 1 + 1
    assert abs(sparsity_loss(g, 2) - (first + second) / 8) < 1e-6
    assert sparsity_loss(torch.zeros(3, 100), 100) == 1
    assert sparsity_loss(torch.ones(100), 1) == 1


# ------------------------------------------------------------------------------------------ kernels

class PoisonedKernels:
    """kernels.py for a cache; attention finds poison in every slot that holds no token it may see.

    programs: among how many decode divides its work.
    """

    def __init__(self, kernels, programs):
        self.kernels = kernels
        self.programs = programs

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def plan_decode(self, *args, **settings):
        return self.kernels.plan_decode(*args, **settings, programs=self.programs)

    def prefill_attention(self, q, band_k, band_v, band_g, page_k, page_v, table, num_old, W, tau):
        place = torch.arange(table.shape[2] * P)
        held = place < num_old[..., -1:]                            # (B, Hkv, places)
        page_k = poisoned(page_k, table, held, 1e4)
        page_v = poisoned(page_v, table, held, 1e4)
        return self.kernels.prefill_attention(q, band_k, band_v, band_g, page_k, page_v, table,
                                              num_old, W, tau)

    def decode_attention(self, q, page_k, page_v, table, plan, layer, early=False):
        place = torch.arange(table.shape[2] * P)
        ring = plan.ring_pages * P
        in_ring = (plan.num_tokens + plan.num_new).clamp(max=plan.window)[:, None, None]
        end = ring + plan.counts[layer][..., None]
        held = (place < in_ring.clamp(max=ring)) | ((place >= ring) & (place < end))
        page_k = poisoned(page_k, table, held, math.nan)
        page_v = poisoned(page_v, table, held, math.nan)
        y = self.kernels.decode_attention(q, page_k, page_v, table, plan, layer, early)
        assert not self.kernels.arrival_counters(q.device, 1).any(), "counters are not zero again"
        return y


def poisoned(pages, table, held, poison):
    """A copy of pages (N, P, D) with poison wherever no row's list holds a token.

    table (B, Hkv, M); held (B, Hkv, M * P) bool: which places of the lists hold one.
    """
    place = torch.arange(held.shape[2])
    slots = table[..., place // P].long() * P + place % P           # (B, Hkv, M * P)
    in_use = torch.zeros(len(pages) * P, dtype=torch.bool)
    in_use[slots[held]] = True
    return pages.masked_fill(~in_use.view(-1, P, 1), poison)


UNEVEN = [[70, 66], [1, 1], [1, 0], [1, 1], [67, 7]]


@pytest.mark.parametrize("W, G, D, shares, programs, plan", [
    (1, 7, 80, (0.3, 0.6, 0.99), 3, [[131, 60], [1, 1]]),
    (1, 1, 16, (0.5, 0.5), 16, UNEVEN),
    (16, 2, 16, (0.5, 0.9), 1, [[70, 70], [1, 1], [33, 32], [1, 1]]),
    (17, 3, 24, (0.3, 0.3), 16, [[1, 1]] * 19 + [[119, 0]]),
    (20, 3, 24, (0.0, 1.0), 3, [[130, 130], [1, 1], [2, 0], [1, 1]]),
    (64, 1, 32, (0.4,), 16, [[1, 1], [1, 1], [150, 149], [1, 1]]),
    (64, 4, 16, (0.9, 0.9), 3, UNEVEN)])
def test_the_caches_through_the_kernels(W, G, D, shares, programs, plan, kernels, gpu, monkeypatch):
    """The contract with every operation in Triton: uneven sequences, pauses, a clone, poison."""
    monkeypatch.setattr(wgkv, "kernels_for", lambda x: PoisonedKernels(kernels, programs))
    torch.manual_seed(W + G)
    Hkv = len(shares)
    qkv = random_qkv(1, 2, Hkv, 140 + W, G, D)
    g = random_gates(1, 2, Hkv, 140 + W, torch.tensor(shares)[:, None])
    want = expected(qkv, g, W)
    dual = DualCache(bare(1, Hkv, D), Replay(g, W), 2)
    equal(feed(dual, qkv, plan[:1]), want)
    clone = dual.clone()
    for cache in (dual, clone):
        equal(feed(cache, qkv, plan[1:]), want)
        check_pages(cache)
        for b, n in enumerate(cache.num_tokens.tolist()):
            assert torch.equal(cache.admitted(b), g[:, b, :, :n].cpu() >= TAU)
    dense = DenseCache(bare(1, Hkv, D), 2)
    equal(feed(dense, qkv, plan), expected(qkv, torch.ones_like(g), W), "dense")


@pytest.mark.parametrize("kind", ("dual", "budget", "select", "dense"))
def test_a_rehearsal_needs_no_results(kind, kernels, gpu, monkeypatch):
    """warm_up has kernels compiled and not run: an index made from what they left is anywhere."""
    monkeypatch.setattr(wgkv, "kernels_for", lambda x: kernels)
    asked = []

    class NotRun:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: asked.append(self.name)

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, NotRun(name))
    empty = torch.empty

    def poison(*args, **settings):
        x = empty(*args, **settings)
        return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)
    monkeypatch.setattr(torch, "empty", poison)

    net = small_llama(seed=1)
    gates = Gates.for_model(net, window=100)
    kv = DenseCache(net, 2) if kind == "dense" else DualCache(
        net, gates, 2, select=192 if kind == "select" else None,
        budget=2**20 if kind == "budget" else None)
    generate.read_and_decode(net, kv, generate.FEW_STEPS)
    assert "decode_kernel" in asked and ("prefill_kernel" in asked or kind == "dense")


@needs_gpu
def test_kernels_that_compile_together_are_the_same(kernels, gpu):
    """First with none compiled, in this process: what runs after it is what would have run."""
    net = small_llama(seed=1).to(torch.bfloat16)
    gates = Gates.for_model(net, window=100)
    prompts = [[1, 2, 3] * 100, [4, 5] * 70]
    found = []
    for together in (True, False):
        for function in vars(kernels).values():
            if hasattr(function, "device_caches"):
                function.device_caches.clear()
        kv = DualCache(net, gates, 2)
        if together:
            assert generate.warm_up(net, kv) > 0
        assert not kv.num_tokens.any()
        hidden = generate.prefill(net, kv, prompts, chunk=128)
        ids = [ids for ids in generate.decode(net, kv, hidden, 20)]
        found.append((hidden, ids))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("counts", (
    [[3]], [[0, 1, 700]], [[64, 65, 0, 129, 1, 5]] * 3, [[0, 0], [500, 3]]))
@pytest.mark.parametrize("ring_pages, programs", ((0, 1), (2, 5), (4, 132)))
def test_plan_of_decode(counts, ring_pages, programs, kernels, gpu):
    """Faults: a tile that no program takes, or two; a piece of two rows; a row cut too fine."""
    one = torch.ones(1, dtype=torch.long)
    counts = torch.tensor(counts)[:, None]                          # (L, 1, rows)
    plan = kernels.plan_decode(counts, one, one, ring_pages, 1, P, programs)
    for layer, row_counts in enumerate(counts[:, 0].tolist()):
        tiles = [max(1, ring_pages + math.ceil(n / P)) for n in row_counts]
        allowed = max(programs, len(tiles))
        longest = next(length for length in range(1, max(tiles) + 1)
                       if sum(math.ceil(n / length) for n in tiles) <= allowed)
        pieces = []
        for row, n in enumerate(tiles):
            splits = math.ceil(n / longest)
            start = len(pieces)
            pieces += [[row, n * i // splits, n * (i + 1) // splits, start, splits]
                       for i in range(splits)]
        got = plan.pieces[layer, :, :5].tolist()
        assert got[:len(pieces)] == pieces
        for _, first, last, _, _ in got[len(pieces):]:
            assert first == last                                    # nothing to do


@pytest.mark.parametrize("B, Hkv, T, D, expansion", [
    (1, 2, 1, 16, 4), (3, 2, 1, 24, 2.3), (2, 3, 41, 80, 0.6), (3, 1, 11, 32, 4),
    (1, 1, 70, 32, 4)])
def test_small_kernels(B, Hkv, T, D, expansion, kernels, gpu):
    """Gates with odd numbers of hidden units and tokens, split or not; RoPE, norms, products."""
    torch.manual_seed(T)
    qkv = torch.randn(B, T, Hkv * 4, D).transpose(1, 2)
    q = qkv[:, :Hkv * 3]
    k = qkv[:, Hkv * 3:]
    cos, sin = angles(torch.arange(T) + torch.arange(B)[:, None], D)
    q_rotated, k_rotated = kernels.rotate(q, k, cos, sin)
    equal(q_rotated, rotate(q, cos, sin))
    equal(k_rotated, rotate(k, cos, sin))

    gate = wgkv.Gate(Hkv, D, expansion)
    gate.pre_norm.data = torch.rand(D) + 0.5
    gate.post_norm.data = torch.rand(D) + 0.5
    gate.w2.data *= 20                      # so that gates are far from all equal
    with torch.enable_grad():               # PyTorch's path: this kernel has no gradients
        want = gate(k, k_rotated)
    for _ in range(2):                      # twice: the arrival counters must be zero again
        equal(kernels.gate(gate, k, k_rotated), want)
    # Keys in half precision: products of factors with 10 bits. (Beyond 64 tokens W1 is in fp16.)
    half = k.half(), k_rotated.half()
    with torch.enable_grad():
        want = gate(*(x.float() for x in half))
    assert (kernels.gate(gate, *half) - want).abs().max() < 2e-3
    # The gates of three layers in one call, as decode asks for them.
    gates = perturbed_gates(3, Hkv, D)
    k, k_rotated = (torch.randn(B, 3, Hkv, T, D) for _ in range(2))
    with torch.enable_grad():
        want = [gates.gate(layer, k[:, layer], k_rotated[:, layer], None) for layer in range(3)]
        equal(gates.stacked()(k, k_rotated, None), torch.stack(want, dim=1))
    got = kernels.gate(gates.stack, k.flatten(1, 2), k_rotated.flatten(1, 2))
    equal(got.unflatten(1, (3, Hkv)), torch.stack(want, dim=1))
    gates.layers[1].b2.data += 1                # the stack has the parameters themselves
    with torch.enable_grad():
        equal(gates.stacked()(k, k_rotated, None)[:, 1], gates.gate(1, k[:, 1], k_rotated[:, 1], 0))

    # Rotated, and written where each row has its place.
    page_k, page_v = torch.full((2, 2 * B * Hkv, P, D), 7.0)
    page_pos = torch.zeros(2 * B * Hkv, P, dtype=torch.int32)
    table = torch.randperm(2 * B * Hkv).int().view(B, Hkv, 2)
    num_tokens = torch.tensor([130, 5, 63])[:B]
    num_new = torch.tensor([1, 0, 1])[:B]
    q, k = (x[:, :, :1] for x in (q, qkv[:, Hkv * 3:]))
    v = torch.randn(B, Hkv, 1, D)
    cos, sin = (x[:, :, :1] for x in (cos, sin))
    equal(kernels.rotate_and_write(q, k, v, cos, sin, page_k, page_v, table, num_tokens, num_new,
                                   100, page_pos), rotate(q, cos, sin))
    want_k, want_v = torch.full((2, 2 * B * Hkv, P, D), 7.0)
    for b in range(B):
        if num_new[b]:
            place = int(num_tokens[b]) % 100
            at = table[b, :, place // P].long(), place % P
            want_k[at] = rotate(k, cos, sin)[b, :, 0]
            want_v[at] = v[b, :, 0]
            assert (page_pos[at] == num_tokens[b]).all()
    equal(page_k, want_k)
    equal(page_v, want_v)

    norm = torch.nn.RMSNorm(D, eps=1e-2)
    norm.weight.data = torch.rand(D)
    x = torch.randn(B, T, D)
    y = torch.randn(B, T, D)
    equal(kernels.add_norm(x.clone(), None, norm)[1], norm(x))
    total, normed = kernels.add_norm(x.clone(), y, norm)
    equal(total, x + y)
    equal(normed, norm(x + y))
    x = torch.randn(T, 2 * D)
    equal(kernels.silu_product(x), F.silu(x[:, :D]) * x[:, D:])


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("silu, bias", ((False, True), (True, False), (True, True)))
def test_linear_layers_of_one_token(silu, bias, norm, add, kernels, gpu):
    """Rows or columns past the end, a norm of other numbers, halves of gate and up mixed up."""
    torch.manual_seed(0)
    for K, N in ((104, 37), (512, 33), (296, 16), (8, 1)):
        x, y = torch.randn(2, 1, 1, K)
        linear = torch.nn.Linear(K, 2 * N if silu else N, bias=bias)
        rms_norm = torch.nn.RMSNorm(K, eps=1e-2)
        torch.nn.init.normal_(rms_norm.weight)
        total = x + y if add else x
        want = linear(rms_norm(total) if norm else total)
        if silu:
            want = F.silu(want[..., :N]) * want[..., N:]
        before = x.clone()
        got = kernels.gemv(x, linear.weight, linear.bias, y if add else None,
                           rms_norm if norm else None, silu, BN=16, BK=128)
        equal(got[0], total)
        equal(got[1], want)
        equal(x, before)                    # other programs still read it


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), pytest.param(torch.bfloat16, 1e-2, marks=needs_gpu),
    pytest.param(torch.float16, 2e-3, marks=needs_gpu)])
def test_decode_of_one_sequence(dtype, tolerance, monkeypatch, kernels, gpu):
    """Decode by gemv is decode by torch's products, and the same again in a CUDA graph."""
    llama = small_llama(7, num_layers=2, vocab_size=400, tied=False, qk_norm=True, qkv_bias=True,
                        out_bias=True, mlp_bias=True).to(dtype)
    for name, p in llama.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.1)
    prompt = torch.randint(400, (1, 70))
    products = []
    gemv = kernels.gemv
    monkeypatch.setattr(kernels, "gemv", lambda *args: products.append(1) or gemv(*args))
    if dtype == torch.float32:              # which the model leaves to torch; the kernel can do it
        monkeypatch.setattr(model, "one_token_kernels",
                            lambda x: kernels if x.numel() == x.shape[-1] else None)

    def start():
        kv = DenseCache(llama, 1)
        return kv, llama(prompt, kv)[:, -1]

    kv, hidden = start()
    tokens = []
    ours = []
    for _ in range(12):
        tokens.append(llama.logits(hidden).argmax(-1))
        hidden = llama(tokens[-1][:, None], kv)[:, 0]
        ours.append(hidden)
    assert len(products) == 12 * 2 * 4                  # steps, layers, products of a layer

    kv, hidden = start()
    said = list(generate.decode(llama, kv, hidden, 12, set()))
    assert said == [token.tolist() for token in tokens]

    monkeypatch.setattr(model, "one_token_kernels", lambda x: None)
    kv, _ = start()
    theirs = [llama(token[:, None], kv)[:, 0] for token in tokens]
    ours, theirs = torch.stack(ours).float(), torch.stack(theirs).float()
    assert (ours - theirs).norm() / theirs.norm() < tolerance


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize("D, G, W", [
    (128, 4, 100), (128, 7, 1), (64, 1, 64), (64, 8, 256), (80, 3, 17), (256, 2, 33), (16, 4, 128)])
def test_half_precision(D, G, W, plain, dtype, kernels, gpu):
    """At most 1.5 times the error of torch's attention. plain: without the Hopper kernel."""
    torch.manual_seed(D + G)
    calls = [300, 413, 1, 1, 130, 1]
    S = sum(calls)
    q = torch.randn(2, 2 * G, S, D, dtype=dtype)
    k = torch.randn(2, 2, S, D, dtype=dtype)
    v = torch.randn(2, 2, S, D, dtype=dtype)
    g = (torch.rand(1, 2, 2, S) < torch.tensor([0.9, 0.2])[:, None]).float()
    mask = visible_mask(g[0], W, TAU)
    want = dense_attention(q.double(), k.double(), v.double(), mask)
    wide = [x.repeat_interleave(G, dim=1) for x in (k, v, mask)]
    theirs = F.scaled_dot_product_attention(q, *wide) - want

    cache = DualCache(bare(1, 2, D, dtype), Replay(g, W), 2)
    attend = functools.partial(kernels.prefill_attention, plain=plain)
    cache.kernels = SimpleNamespace(**{**vars(kernels), "prefill_attention": attend})
    parts = []
    for T in calls:
        at = slice(cache.num_tokens[0], cache.num_tokens[0] + T)
        poison = [torch.full_like(q[:, :, at], math.nan) for _ in range(4)]
        del poison                          # so that the allocator hands out memory full of NaN
        cache.begin(T)
        cos = torch.ones(1, 1, T, D)
        parts.append(cache.attend(0, q[:, :, at], k[:, :, at], v[:, :, at], cos, 0 * cos))
        cache.end()
    ours = torch.cat(parts, dim=2) - want
    worst = (ours.abs().max() / theirs.abs().max()).item()
    rms = (ours.square().mean() / theirs.square().mean()).sqrt().item()
    assert worst <= 1.5 and rms <= 1.5, f"error over torch's: maximum {worst:.2f}, rms {rms:.2f}"


# ----------------------------------------------------------------------------------------- programs

@pytest.mark.parametrize("kind", ("gates", "random", "dense"))
def test_running_ahead_changes_nothing(kind, gpu):
    """decode in a captured graph, steps ahead of its reader, is decode step by step.

    And the cache then holds what was said, no more: a second turn finds what it would alone.
    """
    model = small_llama(3, num_layers=2, vocab_size=400, tied=False)
    torch.manual_seed(3)
    prompts = [torch.randint(50, (n,)).tolist() for n in (90, 40, 61)]
    c = model.config
    gates = perturbed_gates(c.num_layers, c.num_kv_heads, c.head_dim, tau=0.5)

    def start():
        kv = DenseCache(model, 3)
        if kind != "dense":
            kv = DualCache(model, RandomAdmission(0.5) if kind == "random" else gates, 3, window=17)
        return kv, generate.prefill(model, kv, prompts, 32)

    kv, hidden = start()
    steps = []
    ids = model.logits(hidden).argmax(-1)
    for _ in range(80):
        steps.append(ids.tolist())
        ids = model.logits(model(ids[:, None], kv)[:, 0]).argmax(-1)

    # The end token: of the first sequence's 40 ids, the one that it says last for the first time.
    first = [ids[0] for ids in steps[:40]]
    end = {max(first, key=first.index)}
    want = []
    ended = [False] * 3
    for ids in steps:
        want.append([None if over else token for token, over in zip(ids, ended)])
        ended = [over or token in end for token, over in zip(ids, ended)]
        if all(ended):
            break
    assert any(None in ids for ids in want)

    kv, hidden = start()
    assert list(generate.decode(model, kv, hidden, 80, end)) == want
    said = [[token for token in column if token is not None] for column in zip(*want)]
    lengths = [len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts, said)]
    assert kv.num_tokens.tolist() == lengths            # the last id is not read yet
    again, _ = start()
    generate.prefill(model, again, [ids[:-1] for ids in said], chunk=1)
    for more in ([[5, 6, 7]] * 3, [[8]] * 3):
        equal(generate.prefill(model, kv, more), generate.prefill(model, again, more))


@pytest.mark.parametrize("kind", ("dual", "dense", "budget"))
def test_many_prompts_through_few_sequences(kind, gpu):
    """Every answer is the prompt's own, whoever its neighbors are; and no page is lost.

    With a budget there is room for all here: what is evicted depends on the neighbors.
    """
    model = small_llama(5, num_layers=2, vocab_size=400, tied=False)
    rng = random.Random(5)
    prompts = [[rng.randrange(400) for _ in range(rng.choice((1, 3, 40, 150)))] for _ in range(9)]

    def make(batch):
        if kind == "dense":
            return DenseCache(model, batch)
        budget = 2**24 if kind == "budget" else None
        return DualCache(model, RandomAdmission(0.5), batch, window=17, budget=budget)

    for batch, steps, end in ((2, 1, ()), (3, 30, ()), (4, 40, range(0, 400, 30)), (12, 9, ())):
        want = {}
        for index, prompt in enumerate(prompts):
            kv = make(1)
            hidden = generate.prefill(model, kv, [prompt])
            want[index] = [token for [token] in generate.decode(model, kv, hidden, steps, end)]
        kv = make(batch)
        server = generate.Server(model, kv, steps, end, chunk=40)
        got = {index: ids for index, ids, *_ in server.answers(prompts)}
        assert got == want, f"batch {batch}"
        if kind != "dense":
            assert kv.num_promoted() == 0
            check_pages(kv)


def test_a_soak_loses_no_page(gpu):
    """Hundreds of sequences come and go, in any order: all pages return, and memory stays."""
    model = small_llama(6, num_layers=1, hidden_size=16, intermediate_size=16, head_dim=8,
                        num_heads=2, num_kv_heads=1)
    rng = random.Random(6)
    kv = DualCache(model, RandomAdmission(0.5), 4, window=5)
    server = generate.Server(model, kv, 12, range(0, 50, 9), chunk=64)
    sizes = []
    for _ in range(5):
        prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 300))] for _ in range(60)]
        assert len(list(server.answers(prompts))) == 60
        check_pages(kv)
        assert kv.num_promoted() == 0 and not kv.num_tokens.any()
        sizes.append(len(kv.pool.k))
    assert sizes[-1] == sizes[1], f"the pool grew: {sizes} pages"


def test_demo(capsys):
    """The demo prints the pattern of the definition, and the steps of the method."""
    wgkv.demo()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    g = torch.tensor([float(j in (0, 3, 9)) for j in range(16)])
    for i, seen in enumerate(visible_mask(g[None, None], 4, 0.5)[0, 0].tolist()):
        assert rows[i][1:] == ["#" if x else "." for x in seen[:i + 1]]
    steps = {int(row[0]): " ".join(row[1:]) for row in rows[16:]}
    assert len(steps) == 16
    assert steps[3] == "0 1 2 3 -"
    assert steps[4] == "1 2 3 4 0"
    assert steps[7] == "4 5 6 7 0 3"
    assert steps[12] == "9 10 11 12 0 3"
    assert steps[13] == "10 11 12 13 0 3 9"


def test_the_simple_cache_is_the_method():
    """The thirty lines at the top of wgkv.py equal the definition, and so what the caches are."""
    torch.manual_seed(15)
    qkv = random_qkv(1, 1, 1, 60)
    g = random_gates(1, 1, 1, 60, 0.4)
    cos, sin = angles(torch.arange(60)[None], 16)
    q = rotate(qkv[0][0], cos, sin)[0, 0]                           # (60, D)
    k = rotate(qkv[1][0], cos, sin)[0, 0]
    v = qkv[2][0, 0, 0]
    cache = wgkv.SimpleCache(9, TAU)
    got = [cache.step(q[i], wgkv.Token(i, k[i], v[i], g[0, 0, 0, i])) for i in range(60)]
    equal(torch.stack(got), expected(qkv, g, 9)[0, 0, 0])


OUR_FILES = ["common", "hopper", "kernels", "model", "files", "wgkv", "tokenizer", "generate",
             "train", "bench"]


def imported(name):
    """All that one of our files imports, also inside functions, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way():
    """Each file imports only earlier ones: no circle, and an order to read them in."""
    for n, name in enumerate(OUR_FILES):
        assert imported(name) & set(OUR_FILES) <= set(OUR_FILES[:n]), name
    assert imported("hopper") & set(OUR_FILES) == set()
    assert imported("kernels") & set(OUR_FILES) == {"hopper"}
    # Gluon is not in every Triton; what needs it lies in hopper.py.
    assert not any(name.startswith("triton.experimental") for name in imported("kernels"))
