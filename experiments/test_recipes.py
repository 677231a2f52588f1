"""Tests of recipes.py. Each docstring names the bug that its test catches."""
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# Set before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import HERE, run_program
from experiments import recipes
from experiments.recipes import WAYS, WaySamples
from generate import prefill
from model import Llama
from tokenizer import Text
from wgkv import DualCache, Gates, sparsity_loss

torch.set_num_threads(1)        # most things here are small: threads would only wait for each other
TINY = HERE / "tiny"
STORY = (TINY / "example.txt").read_text(encoding="utf-8")
CONFIG = replace(train.BUNDLED, seq_len=(192, 256), tokens_per_step=256, steps=3, window=64,
                 lam=1.0)


@pytest.fixture(scope="module")
def tiny():
    """The bundled model and its text side: 8 layers of 4 KV heads."""
    return Llama.from_pretrained(str(TINY)), Text(str(TINY))


@pytest.fixture(scope="module")
def passages(tiny):
    """Samples of plain text: one document."""
    _, text = tiny
    return train.text_samples([torch.tensor(text.encode(STORY, begin=False))], text.begin)


def samples_of(way, tiny, passages, config=CONFIG):
    _, text = tiny
    repeated = recipes.repeat_samples(passages, text, bundled=True)
    return WaySamples(passages, repeated, way, config)


def trained(name, tiny, passages):
    return recipes.train_gates(tiny[0], WAYS[name], CONFIG, samples_of(WAYS[name], tiny, passages))


def gates_of(policy, model, ids):
    """The gates (L, Hkv, T) of a prompt, as a cache asks for them."""
    class Recorder:
        window, tau = policy.window, policy.tau
        g = {}

        def gate(self, layer, *args):
            self.g[layer] = policy.gate(layer, *args)[0]
            return self.g[layer][None]

    prefill(model, DualCache(model, Recorder()), [ids])
    return torch.stack([Recorder.g[layer] for layer in sorted(Recorder.g)])


# ------------------------------------------------------------------------------------- each way

@pytest.mark.parametrize("name", WAYS)
def test_every_way_trains_gates_that_a_cache_takes(name, tiny, passages, tmp_path):
    """A gradient that does not reach all parameters or is not finite; a file that loads as others.

    With three steps, `future` takes its first one with its own loss.
    """
    model, text = tiny
    before = WAYS[name].gates.for_model(model, window=64, tau=0.1, expansion=4.0).state_dict()
    gates = trained(name, tiny, passages)
    for key, p in gates.named_parameters():
        assert torch.isfinite(p).all(), key
        assert not torch.equal(p, before[key]), key

    path = tmp_path / "gates.safetensors"
    gates.save(path, model, 1.0, f'{{"way": "{name}", "steps": 3}}')
    policy = recipes.load(path, model)
    assert type(policy) is WAYS[name].gates
    assert recipes.describe(path)["policy"] == name
    ids = text.encode(STORY)[:200]
    assert torch.equal(gates_of(policy, model, ids), gates_of(gates, model, ids))
    # A token at a time, as in decode, a gate is what it is in a prompt.
    kv = DualCache(model, policy)
    prefill(model, kv, [ids[:192]])
    for token in ids[192:]:
        hidden = prefill(model, kv, [[token]])
    whole = DualCache(model, policy)
    expected = prefill(model, whole, [ids])
    assert torch.allclose(hidden, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["paper", "repeat", "hard-concrete", "hidden"])
def test_checkpointed_layers_have_the_same_gradient(name, tiny, passages):
    """Noise that differs in the rerun, or values of the rerun in the place of the first run's."""
    model, _ = tiny
    way = WAYS[name]
    batch = samples_of(way, tiny, passages)[0]
    gradients = []
    for keep in (train.EVERYTHING, train.INPUT):
        torch.manual_seed(0)
        gates = way.gates.for_model(model, window=64, tau=0.1, expansion=1.0)
        recipes.add_gradients(model, gates, CONFIG, way, 0, batch, 0, (1, keep))
        gradients.append(torch.cat([p.grad.flatten() for p in gates.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_paper_is_what_train_py_does(tiny, passages):
    """A loop that has come apart from train.train: other samples, schedule, or loss."""
    model, _ = tiny
    torch.manual_seed(CONFIG.seed)
    gates = Gates.for_model(model, window=64, tau=CONFIG.tau, expansion=CONFIG.expansion)
    optimizer = torch.optim.AdamW(gates.parameters(), CONFIG.lr, weight_decay=CONFIG.weight_decay)
    train.train(model, gates, optimizer, train.Samples(passages, CONFIG), CONFIG)
    ours = trained("paper", tiny, passages)
    for name, p in gates.named_parameters():
        assert torch.allclose(p, ours.get_parameter(name), atol=1e-5), name


# ------------------------------------------------------------------------------------ other gates

def test_first4_admits_the_first_four(tiny):
    """Sinks that are counted from the end of a chunk, or in a later chunk again."""
    model, _ = tiny
    gates = recipes.FirstFourGates.for_model(model, window=64)
    plain = Gates.for_model(model, window=64)
    plain.load_state_dict(gates.state_dict())
    k = torch.randn(1, 4, 6, 32)
    for first, sinks in ((0, 4), (2, 2), (4, 0)):
        positions = torch.arange(first, first + 6)[None]
        g = gates.gate(3, k, k, positions)
        assert (g[..., :sinks] == 1).all()
        assert torch.equal(g[..., sinks:], plain.gate(3, k, k, positions)[..., sinks:])


def test_the_moved_tau_decides_as_hard_concrete_gates_do(tiny, tmp_path):
    """A saved file that admits other keys than stretched, clipped gates reach the paper's tau."""
    model, _ = tiny
    gates = recipes.HardConcreteGates.for_model(model, tau=0.1, window=64).eval()
    gates.save(tmp_path / "gates.safetensors", model)
    loaded = Gates.load(tmp_path / "gates.safetensors", model)
    assert math.isclose(loaded.tau, 0.2 / 1.2)
    with torch.no_grad():
        for gate in loaded.layers:
            gate.w2 *= 100                          # gates from 0 to 1
    k = torch.randn(1, 4, 500, 32)
    p = loaded.gate(0, k, k, None)
    own = (p * 1.2 - 0.1).clamp(0, 1)
    near = (own - 0.1).abs() < 1e-5
    assert torch.equal((own >= 0.1)[~near], (p >= loaded.tau)[~near])
    assert 0 < (p >= loaded.tau).float().mean() < 1


def test_noisy_gates_are_open_as_often_as_the_loss_says(tiny):
    """A wrong sign or temperature in P(g > 0), on which all of the pressure rests."""
    model, _ = tiny
    gates = recipes.HardConcreteGates.for_model(model, tau=0.1, window=64)
    torch.manual_seed(0)
    k = torch.randn(1, 4, 1, 32).expand(1, 4, 4000, 32)
    g = gates.gate(0, k, k, None)                                           # (1, 4, 4000)
    assert torch.allclose((g > 0).float().mean(-1), gates.p_open[0].mean(-1), atol=0.03)
    assert (g == 0).any() and (g == 1).any()


def test_l0_counts_open_gates_and_the_window():
    """A size that is not that of the cache: as sparsity_loss where all gates are 0 or 1."""
    p = (torch.rand(2, 3, 200) < 0.3).float()
    assert torch.allclose(recipes.l0_loss(p, 16), sparsity_loss(p, 16))


# ---------------------------------------------------------------------------------- other samples

def test_repeats_are_two_copies_and_the_first_is_light(tiny, passages):
    """Weights that are shifted against the copy, a copy that is cut, or a sample that is too long.
    """
    _, text = tiny
    sample = recipes.repeat_samples(passages, text, bundled=True)
    for length in (256, 257):
        ids, weights = sample(random.Random(7), length)
        first, count = recipes.first_copy(weights)
        assert length - 1 <= len(ids) <= length
        assert torch.equal(ids[first:first + count], ids[-count:])
        assert ids[:first].tolist() == text.encode("The passage:")
        assert (weights[first:first + count] == recipes.FIRST_COPY_WEIGHT).all()
        assert (weights[:first] == 1).all() and (weights[first + count:] == 1).all()


def test_the_request_of_a_chat_stands_after_the_text(tiny, passages):
    """Keys that know that they will be asked for; a reply that does not begin with the text."""
    _, text = tiny                  # the bundled model has a simple template too
    ids, weights = recipes.repeat_samples(passages, text, bundled=False)(random.Random(7), 256)
    first, count = recipes.first_copy(weights)
    between = text.decode(ids[first + count:-count].tolist())
    assert recipes.REQUEST in between
    assert torch.equal(ids[first:first + count], ids[-count:])


def test_shares_of_repeats(tiny, passages):
    """`repeat` without plain samples, `paper` with repeats, or `future` with them to the end."""
    config = replace(CONFIG, steps=60, tokens_per_step=768)

    def repeats(name, steps):
        samples = samples_of(WAYS[name], tiny, passages, config)
        return [bool((weights < 1).any()) for step in steps for _, weights in samples[step]]

    assert not any(repeats("paper", range(60)))
    assert 0.35 < sum(repeats("repeat", range(60))) / len(repeats("repeat", range(60))) < 0.65
    assert all(repeats("future", range(20))) and not any(repeats("future", range(20, 60)))


# -------------------------------------------------------------------------------- prices and losses

def test_drawn_lambdas_are_reproducible():
    """Lambdas that depend on the run, on the order of samples, or leave their range."""
    drawn = [recipes.random_price(CONFIG, n, 256) for n in range(2000)]
    assert drawn == [recipes.random_price(CONFIG, n, 8192) for n in range(2000)]
    assert 0.25 <= min(drawn) < 0.27 and 3.7 < max(drawn) <= 4
    assert abs(sum(map(math.log, drawn)) / 2000) < 0.1          # the median is lambda
    assert drawn[0] != recipes.random_price(replace(CONFIG, seed=1), 0, 256)


def test_prices_by_length_keep_their_mean():
    """A pressure that is larger or smaller on average than the paper's at the same lambda."""
    config = replace(CONFIG, lam=0.5, seq_len=(2048, 4096, 8192))
    for price in (recipes.price_by_length, recipes.inverse_price_by_length):
        prices = [price(config, 0, n) for n in config.seq_len]
        assert math.isclose(sum(prices) / 3, 0.5)
    assert math.isclose(recipes.price_by_length(config, 0, 8192),
                        4 * recipes.price_by_length(config, 0, 2048))


@pytest.mark.parametrize("name", ["target", "lambdas"])
def test_each_sample_pays_its_own_price(name, tiny, passages):
    """The mean of prices times the mean of sizes, or prices of other samples of the step."""
    model, _ = tiny
    gates = Gates.for_model(model, window=64)
    batch = [passages(random.Random(n), length) for n, length in enumerate((200, 300))]
    numbers = range(5, 7)
    with torch.no_grad():
        way = WAYS[name]
        loss, _ = recipes.distillation(model, gates, CONFIG, way, batch, numbers, False)
        expected = train.distill(model, gates, batch).distill
        for number, sample in zip(numbers, batch):
            size = train.distill(model, gates, [sample]).sparsity
            expected += way.price(CONFIG, number, len(sample[0])) * size / 2
    assert torch.allclose(loss, expected, atol=1e-5)


def test_the_future_is_the_largest_attention_of_the_copy():
    """A block of queries that is left out, the wrong group, or keys that see the future."""
    torch.manual_seed(0)
    Hq, Hkv, T, D = 6, 2, 29, 8
    q, k = torch.randn(Hq, T, D), torch.randn(Hkv, T, D)
    first, count = 3, 11
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for block in (4, 512):
        largest = recipes.largest_attention(q, k, first, count, block)
        for h in range(Hkv):
            for j in range(count):
                expected = 0.0
                for head in (3 * h, 3 * h + 1, 3 * h + 2):
                    scores = (q[head] @ k[h].T / math.sqrt(D)).masked_fill(~causal, -math.inf)
                    column = scores.softmax(dim=-1)[T - count:, first + j]
                    expected = max(expected, column.max().item())
                assert math.isclose(largest[h, j].item(), expected, rel_tol=1e-5)


def test_the_target_is_a_share_of_all_heads_together():
    """A share of each head: KVzip lets heads keep different amounts."""
    values = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    assert recipes.largest_share(values, 0.25).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_padding_does_not_change_the_prediction(tiny, passages):
    """Samples of a micro-batch have different lengths: queries of padding, or spans that shift."""
    model, text = tiny
    sample = recipes.repeat_samples(passages, text, bundled=True)
    gates = Gates.for_model(model, window=64)
    batch = [sample(random.Random(n), length) for n, length in enumerate((200, 300))]
    with torch.no_grad():
        def loss(samples):
            return recipes.prediction(model, gates, CONFIG, WAYS["future"], samples, None, False)[0]

        assert torch.allclose(loss(batch), (loss(batch[:1]) + loss(batch[1:])) / 2, atol=1e-4)


def test_several_ways_at_once():
    """A change that is lost, or one that silently replaces another."""
    way = recipes.way_named("repeat+target+hidden")
    assert way.repeats == WAYS["repeat"].repeats and way.gates is WAYS["hidden"].gates
    assert way.price is WAYS["target"].price
    assert recipes.way_named("paper") == WAYS["paper"]


# ---------------------------------------------------------------------------------------- program

def test_the_program_trains_once_and_keeps_its_rows(monkeypatch, tmp_path, capsys):
    """Gates that are trained again, rows that are measured again, a table without one of them."""
    monkeypatch.setattr(recipes, "BUNDLED_TESTS", [[("facts", 300), ("prose", 300)]])
    book = str(TINY / "example.txt")
    argv = ["--books", book, "--data", book, "--way", "paper", "first4", "--lam", "1",
            "--steps", "1", "--seq-len", "256", "--tokens-per-step", "256", "--cases", "8",
            "--device", "cpu", "--work", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert run_program(recipes.main, argv) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["full", "paper", "first4"]
    assert max(map(len, out.splitlines())) <= 100
    assert err.count("training ") >= 2

    monkeypatch.setattr(recipes, "train_gates", None)       # called, it would be an error
    monkeypatch.setattr(recipes.Comparison, "scores", None)
    assert run_program(recipes.main, argv) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("argv, words", [
    ([], "--way, --lam and --books"),
    (["--way", "paper", "--lam", "1", "--books", "nowhere", "--data", "x"], "nowhere"),
    (["--evaluate-only", "a", "--way", "paper"], "trains nothing"),
    (["--evaluate-only", __file__], "--data is missing"),
    (["--way", "best", "--lam", "1", "--books", __file__, "--data", __file__], "called best"),
    (["--way", "target+lambdas", "--lam", "1", "--books", __file__, "--data", __file__],
     "change the same thing, price"),
    (["--way", "paper", "--lam", "1", "--books", __file__, "--data", __file__, "--seq-len", "256",
      "--work", __file__], "should be a folder"),
])
def test_wrong_options_are_one_line(argv, words, capsys):
    """A traceback, or minutes of training before an error."""
    assert run_program(recipes.main, argv) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
