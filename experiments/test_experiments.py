"""Tests of the laboratory: policies.py, quality.py, plot.py and the figures in README.md."""
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# Set before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import HERE, UserError, run_program
from experiments import plot, policies, quality
from generate import prefill
from model import Llama
from tiny import tasks
from tokenizer import Text
from wgkv import P, DualCache, Gates, RandomAdmission, pages_for

torch.set_num_threads(1)        # most things here are small: threads would only wait for each other
CPU = torch.device("cpu")
TINY = HERE / "tiny"
STORY = (TINY / "example.txt").read_text(encoding="utf-8")
README = (HERE / "experiments" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    """The bundled model and its text side: 8 layers of 4 KV heads."""
    return Llama.from_pretrained(str(TINY)), Text(str(TINY))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Options, and settings in quality.py, with which an experiment takes seconds."""
    monkeypatch.setattr(quality, "TAUS", (0.1, 0.4))
    monkeypatch.setattr(quality, "LENGTHS", (256,))
    monkeypatch.setattr(quality, "DEPTHS", (0.5,))
    monkeypatch.setattr(quality, "SELECTED", (192,))
    monkeypatch.setattr(quality, "BUDGETS", (2048, 256))
    monkeypatch.setattr(quality, "RISING_TAUS", (0.1, 0.4))
    small = replace(quality.SWEEP, seq_len=(256,), tokens_per_step=256)
    monkeypatch.setattr(quality, "SWEEP", small)
    story = str(TINY / "example.txt")
    return ["--cases", "2", "--length", "300", "--data", story, "--books", story,
            "--train-steps", "1", "--lam", "0.1", "--device", "cpu",
            "--work", str(tmp_path / "gates")]


def fact_document(text, seed=0, tokens=300):
    encode = text.tokenizer.encode
    return tasks.make("facts", tasks.Haystack(STORY), tokens, encode, random.Random(seed))[0]


def cache_after(policy, tiny, documents):
    """A cache that holds the bodies of documents under a policy."""
    model, text = tiny
    kv = policies.make_cache(model, text, policy, documents)
    prefill(model, kv, [text.encode(d.body) for d in documents])
    return kv


# --------------------------------------------------------------------------------------- policies

def test_sinks_admit_the_first_tokens():
    """Off by one, or sinks that are counted from the end of a chunk."""
    k = torch.zeros(2, 4, 5, 32)
    positions = torch.arange(1, 6).expand(2, -1)            # a chunk that begins at position 1
    g = policies.SinksAndWindow(8, sinks=3).gate(0, k, k, positions)
    assert g.shape == (2, 4, 5)
    assert (g >= 0.5)[1, 3].tolist() == [True, True, False, False, False]


def test_frequencies_count_only_the_past(tiny):
    """A policy that knows what comes later; padding of a short row that is taken for its values."""
    model, text = tiny
    short = tasks.Document("prose", "the the the cat the cat")
    long = tasks.Document("prose", "a b a b a b a b a b a b")
    policy = policies.FrequencyAdmission(4, 0.3)
    values = policy.values(model, text, short)[0, 0].tolist()
    ids = text.encode(short.body)
    for n, (value, token) in enumerate(zip(values, ids)):
        before = ids[:n].count(token)
        assert 1 / (2 + before) < value <= 1 / (1 + before)

    policy.prepare(model, text, [short, long])
    k = torch.zeros(2, 4, 5, 32)
    last_two_and_three_more = torch.arange(len(ids) - 2, len(ids) + 3).expand(2, -1)
    g = policy.gate(3, k, k, last_two_and_three_more)
    assert g.shape == (2, 4, 5)
    assert g[0, 1].tolist() == pytest.approx([*values[-2:], 1, 1, 1])
    assert g[1, 0, 0] != 1                                  # the long document goes on there


def test_whole_heads_keep_everything_and_others_their_sinks(tiny):
    """Heads in the wrong order; heads without the first tokens, on which their softmax rests."""
    _, text = tiny
    ranking = torch.arange(32).flip(0).view(8, 4)           # the last layer's last head comes first
    policy = policies.HeadwiseAdmission(8, ranking, share=2 / 32)
    admitted = cache_after(policy, tiny, [fact_document(text)]).admitted()
    assert admitted[7, 2:].all()
    others = admitted.flatten(0, 1)[:30]
    assert others[:, :policies.KEPT_SINKS].all() and not others[:, policies.KEPT_SINKS:].any()


def test_random_admission_keeps_its_sinks(tiny):
    """A baseline that fails on account of its missing sinks, and is then called beaten."""
    _, text = tiny
    admitted = cache_after(policies.RandomAndSinks(8, 0.25), tiny, [fact_document(text)]).admitted()
    assert admitted[..., :policies.KEPT_SINKS].all()
    assert 0.2 < admitted[..., policies.KEPT_SINKS:].float().mean() < 0.3


def test_heads_are_ranked_by_how_far_answers_look(tiny, monkeypatch):
    """A ranking the wrong way round would keep the heads that need it least."""
    model, text = tiny
    strength = torch.rand(8, 4)
    monkeypatch.setattr(policies, "attention_mass", lambda *others: strength)
    ranking = policies.rank_heads(model, text, [fact_document(text)], 16)
    in_order = strength.flatten()[ranking.flatten().argsort()]
    assert torch.equal(in_order, strength.flatten().sort(descending=True).values)


def test_heads_are_ranked_by_single_keys_far_away():
    """A rank by attention that a window or sinks keep, or by what is spread over a whole text."""
    T = 200
    i = torch.tensor([[T - 1]])
    j = torch.arange(T)

    def strength(*peaks):
        """Of a head with these (key, weight), the rest of its attention spread evenly."""
        weights = torch.full((1, 1, 1, 1, T), (1 - sum(w for _, w in peaks)) / T)
        for key, weight in peaks:
            weights[..., key] += weight
        return policies.largest_far_weight(weights, i, j, window=50).item()

    spread = strength()
    assert strength((100, 0.4)) == pytest.approx(0.4 + 0.6 / T)
    assert strength((149, 0.4)) > 0.4                   # just outside the window
    assert strength((150, 0.9)) < spread                # inside it
    assert strength((0, 0.9)) < spread                  # a sink
    assert strength((60, 0.2), (90, 0.3)) == pytest.approx(0.3 + 0.5 / T)


def test_the_oracle_keeps_what_the_question_attends_to(tiny, monkeypatch):
    """An oracle that looks from the wrong end, or at the body alone, or with one budget for all."""
    model, text = tiny
    document = fact_document(text)
    document = tasks.Document("facts", document.body, document.questions[:1])
    asked = []

    def one_peak_per_head(model, ids, last):
        asked.append((ids, last))
        peaks = torch.arange(100, 132).view(8, 4, 1)        # position 100 + n in head n of 32
        return (torch.arange(len(ids)) == peaks).float()

    monkeypatch.setattr(policies, "attention_mass", one_peak_per_head)
    body = text.encode(document.body)
    question = text.encode(document.questions[0][0], begin=False)
    policy = policies.OracleAdmission(8, share=6.5 / len(body))
    admitted = cache_after(policy, tiny, [document]).admitted()
    for n, row in enumerate(admitted.flatten(0, 1)):        # the peak and its three neighbors
        assert row.nonzero()[:, 0].tolist() == list(range(97 + n, 104 + n))
    assert asked == [(body + question, len(question))]


def test_the_recorder_changes_nothing_and_is_causal(tiny):
    """A recorder that changes what it records, or whose last queries attend to keys after them."""
    model, text = tiny
    ids = text.encode(STORY)[:100]
    with torch.no_grad():
        recorded = model(torch.tensor([ids]), policies.AttentionRecorder(CPU, last=100))
        plain = model(torch.tensor([ids]))
    torch.testing.assert_close(recorded, plain, atol=2e-4, rtol=0)

    mass = policies.attention_mass(model, ids, last=100)
    assert mass.shape == (8, 4, 100)
    assert (mass.sum(-1) - 1).abs().max() < 1e-5
    # The last key is attended to by one query of 100, the one before it by two.
    assert mass[..., -1].max() <= 0.01 and mass[..., -2].max() <= 0.02
    assert policies.attention_mass(model, ids, last=1)[..., -1].max() > 0.01


def test_recorded_attention_by_hand():
    """Query heads that are counted for the wrong KV head, a wrong scale, a key from the future."""
    q = torch.tensor([1., 2., 3., 4.]).view(1, 4, 1, 1).expand(1, 4, 2, 2)  # heads 2, 3: KV head 1
    k = torch.tensor([[[[0.], [1.]], [[0.], [-1.]]]]).repeat(1, 1, 1, 2)    # (1, 2, 2, 2)
    cos, sin = torch.ones(1), torch.zeros(1)                                # no rotation
    recorder = policies.AttentionRecorder(CPU, last=2)
    recorder.attend(0, q, k, k, cos, sin)
    # The first query sees the first key alone. For the second the scores of the two keys are 0 and
    # +-q 2 / sqrt(2), and a softmax over two is a sigmoid.
    head_0 = (0 + torch.sigmoid(2 ** 0.5 * torch.tensor([1., 2.])).mean()) / 2
    head_1 = (0 + torch.sigmoid(-2 ** 0.5 * torch.tensor([3., 4.])).mean()) / 2
    torch.testing.assert_close(recorder.measured[0][0, :, 1], torch.stack((head_0, head_1)))


@pytest.mark.parametrize("name", ("sliding window", "uniform random", "rare tokens", "whole heads"))
def test_simpler_policies_keep_as_many_bytes(name, tiny):
    """A comparison that gives one side more bytes than the other."""
    model, text = tiny
    documents = [fact_document(text, tokens=400)]

    def ranking():
        return torch.arange(32).view(8, 4)

    def make(share):
        return policies.SIMPLER[name](16, share, 400, ranking)

    kv = cache_after(policies.matched(make, 0.4, model, text, documents), tiny, documents)
    kept = kv.kept_bytes() / kv.dense_bytes()
    page_in_each_head = (P + 6) / int(kv.num_tokens)        # 6: positions, gates and page tables
    if name == "sliding window":
        assert 0.4 <= kept < 0.4 + page_in_each_head
        assert -kv.window % P < 2                           # no page is left half full
    if name == "rare tokens":
        assert 0.4 <= kept < 0.4 + page_in_each_head
        assert -kv.num_promoted() / (kv.L * kv.Hkv) % P < 8
    if name == "uniform random":
        assert 0.4 <= kept < 0.4 + page_in_each_head / 16   # a page in two heads of 32
    if name == "whole heads":
        assert 0.4 <= kept < 0.4 + 1 / 32                   # one head of 32


# --------------------------------------------------------------------------- with other primitives

@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("evict_by", ("gate", "snapkv"))
def test_a_bound_is_what_was_asked_for(evict_by, batch, tiny):
    """Bytes of another cache: one without SnapKV's queries, with one sequence, or without rings."""
    model, text = tiny
    everything = policies.uniform_random(128, 1.0)
    for tokens, pages in ((192, 2), (256, 2), (384, 4), (2048, 30)):    # the window takes two more
        kv = policies.Limited(everything, tokens, evict_by).make_cache(model, batch)
        assert kv.shared.most_pages == pages * 8 * batch * 4
        assert (kv.evict_by, kv.chosen_pages) == (evict_by, None)

    kv = policies.Limited(everything, 256, evict_by).make_cache(model, batch)
    prefill(model, kv, [text.encode(STORY)[:600]] * batch)
    assert 0 < int(pages_for(kv.counts).sum()) <= kv.shared.most_pages
    assert kv.shared.num_evictions > 0
    kv = policies.Limited(everything, select=256).make_cache(model, batch)
    assert (kv.shared.most_pages, kv.chosen_pages) == (None, 2)


def test_a_selection_cuts_the_longest_row_alone(tiny):
    """The README's figures of tiny/example.txt: 1,024 tokens are enough for all rows but one."""
    model, text = tiny
    kv = DualCache(model, Gates.load(str(TINY / "gates.safetensors"), model))
    prefill(model, kv, [text.encode(STORY)])
    held = kv.counts.flatten() + kv.window
    assert round(held.float().mean().item()) == 280
    longest, second = held.sort(descending=True).values[:2].tolist()
    assert (longest, second) == (2726, 714)
    assert "280 tokens on average" in README and "2,726 and the next 714" in README


def test_at_the_least_bound_rows_hold_their_sinks(tiny):
    """The README's reason for what 256 tokens a row cost: to answer, each row has one page."""
    model, text = tiny
    gates = Gates.load(str(TINY / "gates.safetensors"), model)
    kv = policies.Limited(gates, 256).make_cache(model, 1)
    prefill(model, kv, [text.encode(STORY)])
    assert kv.shared.num_evictions > 0 and kv.shared.most_pages == 64
    prefill(model, kv, [text.encode("\n\nWhat is the code of Martha?", begin=False)])
    assert pages_for(kv.counts).sum() <= 32                 # a page a row,
    assert (kv.counts > 0).sum() >= 31                      # and nearly every row has one
    assert f"{kv.kept_bytes() / kv.dense_bytes():.1%}" == "5.3%"


def test_decoded_texts_leave_what_prompts_leave(tiny):
    """A text whose first or last token is missing, or with an end token; padding that is kept."""
    model, text = tiny
    bodies = [text.encode(STORY)[:100], text.encode(STORY)[200:260]]
    policy = policies.uniform_random(16, 0.3)
    prompt, decoded = DualCache(model, policy, 2), DualCache(model, policy, 2)
    with torch.no_grad():
        prefill(model, prompt, bodies)
    quality.read_by_decoding(model, decoded, bodies, min(text.end))
    assert decoded.num_tokens.tolist() == [100, 60]
    assert torch.equal(decoded.counts, prompt.counts) and prompt.counts.sum() > 0
    for layer in (0, 7):
        for b in range(2):
            one = [kv.row(kv.pool.pos, layer, b, 2) for kv in (prompt, decoded)]
            assert torch.equal(*one)
            for name in ("k", "v"):
                one = [kv.row(getattr(kv.pool, name), layer, b, 2) for kv in (prompt, decoded)]
                torch.testing.assert_close(*one, atol=2e-4, rtol=0)
    question = [text.encode("What", begin=False)] * 2       # the rings, too, say the same
    with torch.no_grad():
        after = [prefill(model, kv, question) for kv in (prompt, decoded)]
    torch.testing.assert_close(*after, atol=5e-4, rtol=0)


# ----------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("right, low, high", ((0, 0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1)))
def test_wilson_intervals(right, low, high):
    """Published values; an interval outside 0 to 1, or of no width for 0 of 10."""
    r = quality.interval([1.0] * right + [0.0] * (10 - right))
    assert (r["low"], r["high"]) == pytest.approx((low, high), abs=2e-4)
    assert (r["mean"], r["n"]) == (right / 10, 10)


def test_normal_intervals():
    """The standard deviation of the population instead of the sample's; bounds where none are."""
    r = quality.interval([0.5, 0.75, 1.0, 0.75])
    assert r["high"] - r["mean"] == pytest.approx(1.96 * 0.20412 / 2, abs=1e-4)
    assert quality.interval([0.9, 1.0])["high"] == 1
    assert quality.interval([0.9, 1.1], bounded=False)["high"] > 1
    assert quality.interval([0.0, 0.0], bounded=False)["high"] == 0


def test_values_of_one_document_are_not_independent():
    """Eight questions about one block of classes that count as eight proofs."""
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]       # four documents of two equal values
    alone = quality.interval([1.0, 0.0, 1.0, 0.0])
    pairs = quality.interval(values, sizes=[2, 2, 2, 2])
    assert (pairs["low"], pairs["high"]) == pytest.approx((alone["low"], alone["high"]))
    assert (pairs["n"], pairs["documents"]) == (8, 4)
    # Documents that all have the same mean: their questions tell as much as independent ones.
    mixed = quality.interval([1.0, 0.0] * 4, sizes=[2, 2, 2, 2])
    free = quality.interval([1.0, 0.0] * 4)
    assert (mixed["low"], mixed["high"]) == pytest.approx((free["low"], free["high"]))
    # Unequal documents, by hand: deviations of the documents are 1, -0.5 and -0.5, of 4 values.
    r = quality.interval([0.75, 0.75, -0.25, -0.25], bounded=False, sizes=[2, 1, 1])
    assert r["high"] - r["mean"] == pytest.approx(1.96 * (1.5 / 16 * 3 / 2) ** 0.5)
    same = quality.minus([1.0] * 8, [1.0] * 8, sizes=[2, 2, 2, 2])
    assert (same["low"], same["high"]) == (-0.75, 0.75)
    assert quality.interval([1.0, 0.0, 1.0], sizes=[3])["n"] == 3
    with pytest.raises(AssertionError):
        quality.interval(values, sizes=[2, 2])


def test_differences_are_paired():
    """A difference of means with the width of two samples, or of answers to other questions."""
    scores, others = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    r = quality.minus(scores, others)
    assert (r["mean"], r["n"]) == (0.25, 4)
    assert r["high"] - r["mean"] == pytest.approx(1.96 * 0.5 / 2)   # of 0, 0, 1, 0
    assert quality.minus(others, scores)["low"] == -r["high"]       # below 0: no bound there
    with pytest.raises(ValueError):
        quality.minus(scores, others[:3])


def test_answers_that_all_agree_are_no_proof():
    """An interval of no width after ten questions; one that no difference of scores can reach."""
    for value in (0.0, 1.0, 0.5):
        same = quality.minus([value] * 10, [value] * 10)
        assert (same["mean"], same["low"], same["high"], same["n"]) == (0, -0.3, 0.3, 10)
    few = quality.minus([1.0, 1.0], [1.0, 1.0])             # 3 / n is 1.5 here
    assert (few["low"], few["high"]) == (-1, 1)
    assert quality.minus([1.0, 1.0, 0.0], [0.0, 0.0, 0.0])["high"] == 1
    nats = quality.minus([3.0, 9.0], [1.0, 2.0], bounded=False)
    assert nats["mean"] == 4.5 and nats["high"] > 9
    assert quality.minus([3.0, 3.0], [3.0, 3.0], bounded=False)["high"] == 0


@pytest.mark.parametrize("depth", (0, 0.5, 1))
def test_a_single_fact_is_at_its_depth(depth, tiny):
    """A map whose rows are not the depths that they say."""
    _, text = tiny
    d = quality.single_fact(tasks.Haystack(STORY), 400, depth, text.tokenizer.encode,
                            random.Random(1))
    [(question, answer)] = d.questions
    fact = answer.removesuffix(tasks.END).strip()
    assert abs(d.body.index(fact) / len(d.body) - depth) < 0.2
    assert len(text.encode(d.text)) <= 400
    assert question.split()[-1].strip("?") in fact


def test_prose_is_scored_against_full_attention(tiny):
    """Bits per token for bits per byte; a loss that is not that of the cache; wrong shares."""
    model, text = tiny
    documents = [tasks.Document("prose", STORY[:900]), tasks.Document("prose", STORY[900:1800])]
    full = quality.score(model, text, None, {"prose": documents})
    window = quality.score(model, text, policies.SinksAndWindow(16, sinks=0), {"prose": documents})
    everything = quality.score(model, text, policies.uniform_random(16, 1.0), {"prose": documents})
    # The model reads such English at about 1.5 bits per byte, or some 5 bits per token.
    assert 1 < full["prose"]["mean"] < 2 < window["prose"]["mean"]
    assert full["loss"]["mean"] < 1e-6 < 0.1 < window["loss"]["mean"]
    assert (full["kept"], full["admitted"]) == (1, 1)
    assert (window["admitted"], everything["admitted"]) == (0, 1)
    assert everything["prose"]["mean"] == pytest.approx(full["prose"]["mean"], abs=1e-3)


# ------------------------------------------------------------------------------------ experiments

def test_an_input_that_is_left_out_stays_out(tiny):
    """Gates that learn to see again what they were not to see."""
    model, text = tiny
    ids = torch.tensor(text.encode(STORY)[:100])
    config = replace(quality.SWEEP, steps=2, tokens_per_step=100, seq_len=(100,), lam=1.0)
    for inputs in ("before", "after"):
        torch.manual_seed(0)
        gates = Gates.for_model(model, window=16)
        quality.leave_out(gates, inputs)
        start = [p.clone() for p in gates.parameters()]
        samples = train.Samples(lambda rng, length: (ids, torch.ones(len(ids))), config)
        train.train(model, gates, torch.optim.AdamW(gates.parameters()), samples, config)
        for before, after in zip(start, gates.parameters()):
            assert not torch.equal(before, after) or not before.any()   # all else has learned

        k, other = torch.randn(2, 1, 4, 9, 32)
        if inputs == "before":
            one, two = gates.gate(0, k, k, None), gates.gate(0, k, other, None)
        else:
            one, two = gates.gate(0, k, k, None), gates.gate(0, other, k, None)
        assert torch.equal(one, two)
        norm, columns = 32, 4 * 128 * 32                    # of each layer, left out
        in_use = sum(p.numel() for p in start) - 8 * (norm + columns)
        assert quality.cost_of(gates, model)["parameters"] == in_use


def test_every_experiment_measures_what_its_rows_say(toy, tmp_path, monkeypatch):
    """A loop variable that a function sees too late: all rows would measure the last setting."""
    scored = []

    def score(model, text, policy, tests):
        scored.append(policy)
        return dict(kept=0.5, **{task: dict(mean=1.0, low=1.0, high=1.0, n=2, kept=0.5,
                                            scores=[1.0, 1.0]) for task in tests})

    monkeypatch.setattr(quality, "score", score)
    monkeypatch.setattr(quality, "matched", lambda make, *others: make(0.5))
    monkeypatch.setattr(quality, "rank_heads", lambda *others: torch.arange(32).view(8, 4))
    monkeypatch.setattr(train, "train", lambda *args, **more: (1, None))
    monkeypatch.setattr(train, "generate_prose", lambda *args: STORY)

    def rows(item):
        scored.clear()
        assert quality.main([*toy, "--item", str(item)]) == 0
        file = json.loads((tmp_path / "gates" / f"quality-{item}.json").read_text())
        settings = [row["settings"] for row in file["rows"]]
        pairs = list(zip(settings, scored, strict=True))
        return [(s, policy) for s, policy in pairs if policy is not None]

    assert [s["tau"] for s, gates in rows(1) if gates.tau == s["tau"]] == [0.1, 0.4]
    windows = [(s["W"], s["lam"]) for s, gates in rows(2) if gates.window == s["W"]]
    assert windows == [(128, 0.1), (1, 0.1), (1, 0.4), (1, 1.6)]
    by_name = {s["policy"]: type(policy).__name__ for s, policy in rows(3)}
    assert list(by_name) == ["gates", *policies.SIMPLER]
    assert by_name["whole heads"] == "HeadwiseAdmission"
    assert by_name["rare tokens"] == "FrequencyAdmission"
    assert len(rows(5)) == 4 * 3
    widths = [(s["width"], s["inputs"]) for s, gates in rows(6) if gates.expansion == s["width"]]
    assert len(widths) == 6

    selected = [(s["policy"], s["tokens"], type(policy.policy)) for s, policy in rows(8)[:-1]
                if policy.select == s["tokens"] and policy.policy.window == 128]
    assert selected == [("selection alone", 192, RandomAdmission),
                        ("gates + selection", 192, Gates)]
    assert isinstance(scored[-1], Gates)
    bounds = [(s["policy"], s["decoded"], s["tokens"], len(s["tasks"]), policy.evict_by,
               type(policy.policy)) for s, policy in rows(9)
              if (policy.tokens, policy.decoded) == (s["tokens"], s["decoded"])]
    evictors = (("oldest first", "gate", RandomAdmission), ("SnapKV", "snapkv", RandomAdmission),
                ("gates + SnapKV", "snapkv", Gates), ("gates + gate", "gate", Gates))
    assert bounds == [(name, decoded, tokens, 2 if decoded else 3, evict_by, admission)
                      for decoded in (False, True) for tokens in (2048, 256)
                      for name, evict_by, admission in evictors]
    rising = rows(10)
    assert [policy.tau for s, policy in rising if s["policy"] == "fixed tau"] == [0.1, 0.4]
    [(s, budget)] = [(s, policy) for s, policy in rising if s["policy"] == "budget"]
    assert (budget.tokens, budget.policy.tau) == (s["tokens"], 0.1) == (256, 0.1)
    trained = {path.name.rpartition("-")[0] for path in (tmp_path / "gates").glob("*.safetensors")}
    assert {"own-lam0.1-W128-E4-both", "plain-books-lam0.1-W128-E4-both", "books-lam0.1-W1-E4-both",
            "books-lam0.1-W128-E4-after", "books-lam0.1-W128-E0.5-both"} <= trained


def test_selection_and_bounds_from_end_to_end(toy, tmp_path, monkeypatch):
    """Experiments 8 to 10 on a few tokens: evictions that are not counted or do not happen, scores
    in rows that need none, a difference from other documents."""
    oldest_first = quality.EVICTORS["oldest first"]
    monkeypatch.setattr(quality, "EVICTORS", {"oldest first": oldest_first})
    monkeypatch.setattr(quality, "BUDGETS", (256, 256))     # experiment 10 leaves out the first
    monkeypatch.setattr(quality, "RISING_TAUS", (0.4,))
    assert quality.main([*toy, "--item", "8", "9", "10", "--length", "384"]) == 0
    files = {}
    for item in (8, 9, 10):
        file = json.loads((tmp_path / "gates" / f"quality-{item}.json").read_text())
        files[item] = file["rows"]
        full = [row for row in file["rows"] if row["settings"]["policy"] == "full attention"]
        assert len(full) == (2 if item == 9 else 1)
        for row in file["rows"]:
            for task in row["settings"]["tasks"]:
                is_full = row in full
                assert ("scores" in row[task], "minus_full" in row[task]) == (is_full, not is_full)
                if not is_full:
                    difference = row[task]["mean"] - row["full"][task]
                    assert row[task]["minus_full"]["mean"] == pytest.approx(difference)

    assert [row["settings"]["policy"] for row in files[8]] == [
        "full attention", "selection alone", "gates + selection", "gates"]
    oldest = [row for row in files[9] if row["settings"]["policy"] == "oldest first"]
    assert [row["settings"]["decoded"] for row in oldest] == [False, True]
    assert all(row["facts"]["evictions_a_batch"] > 0 for row in oldest)
    assert all(row["facts"]["evicted_a_document"] > 0 for row in oldest)
    [budget] = [row for row in files[10] if row["settings"]["policy"] == "budget"]
    assert {"evictions_a_batch", "evicted_a_document", "batch"} <= budget["facts"].keys()


def test_the_files_hold_what_experiments_measure(tiny, monkeypatch):
    """Rows that are missing, twice, in another order or of other settings."""
    wanted = []
    monkeypatch.setattr(quality.Results, "row", lambda self, settings, measure: wanted.append(
        settings))
    for item in (8, 9, 10):
        file = json.loads((HERE / "experiments" / f"quality-{item}.json").read_text())
        argv = ["--cases", "1000", "--device", "cpu", "--dtype", "bfloat16"]
        x = quality.Experiment(item, tiny[0], quality.parse(
            argv if item < 10 else [*argv, "--train-steps", "200"]))
        same = {**x.results.settings, "dtype": "bfloat16", "data": file["settings"]["data"],
                "books": file["settings"]["books"]}         # the texts are not here
        assert file["settings"] == same

        wanted.clear()
        quality.ITEMS[item](x)
        once = [s for n, s in enumerate(wanted) if s not in wanted[:n]]
        assert [row["settings"] for row in file["rows"]] == once

        for row in file["rows"]:
            full = row["settings"]["policy"] == "full attention"
            for task in row["settings"]["tasks"]:
                r = row[task]
                assert r["n"] == 1000 and ("scores" in r) == full != ("minus_full" in r)
                if full:
                    assert sum(r["scores"]) / 1000 == pytest.approx(r["mean"], abs=1e-4)
                else:
                    assert r["minus_full"]["mean"] == pytest.approx(r["mean"] - row["full"][task])


def test_rows_about_texts_that_change_name_their_version(toy, tiny, monkeypatch):
    """Rows about an older version of this repository's code, beside those of a new one."""
    asked = []
    monkeypatch.setattr(quality.Results, "row",
                        lambda self, settings, measure: asked.append(settings))
    for story in (STORY, STORY + "The end."):
        monkeypatch.setattr(quality.Experiment, "prose", lambda self, name: story)
        x = quality.Experiment(5, tiny[0], quality.parse(toy))
        for text in ("data", "code", "own"):
            x.measure(dict(policy="gates"), None, ("facts",), text=text)
    digests = [settings.get("digest") for settings in asked]
    old = digests[:6]                                       # full attention and gates, three texts
    new = digests[6:]
    assert old[:2] == new[:2] == [None, None]               # --data is in the file's settings
    assert None not in old[2:] + new[2:]
    assert not set(old[2:]) & set(new[2:])


def test_what_gates_are_trained_on(toy, tiny, monkeypatch):
    """Text of another source, or one that is written when a sample asks for it: that happens in a
    worker process, which has no GPU."""
    model, text = tiny
    wrote = []

    def generate_prose(*args):
        wrote.append(args)
        return STORY.replace(" the ", " ZZ ")

    monkeypatch.setattr(train, "generate_prose", generate_prose)
    x = quality.Experiment(5, model, quality.parse(toy))
    draws = {"both": x.draw("both")}
    assert len(wrote) == 1
    draws.update({source: x.draw(source) for source in ("own", "books", "plain books")})
    from_model, heaviest = {}, {}
    for source, draw in draws.items():
        samples = [draw(random.Random(n), 256) for n in range(12)]
        assert all(0 < len(ids) == len(weights) <= 256 for ids, weights in samples)
        from_model[source] = sum(" ZZ " in text.decode(ids.tolist()) for ids, _ in samples)
        heaviest[source] = max(weights.max().item() for _, weights in samples)
    assert len(wrote) == 1
    assert (from_model["own"], from_model["books"], from_model["plain books"]) == (12, 0, 0)
    assert 0 < from_model["both"] < 12
    assert heaviest == {"own": 30, "books": 30, "both": 30, "plain books": 1}


def test_an_interrupted_experiment_goes_on(toy, tmp_path, monkeypatch, capsys):
    """Finished rows measured again, gates trained twice, rows of other options in one file."""
    score, training = quality.score, train.train
    scored, trained = [], []
    stop_at = 2

    def score_or_stop(*args):
        if len(scored) == stop_at:
            raise KeyboardInterrupt
        scored.append(args)
        return score(*args)

    def count_training(*args, **more):
        trained.append(args)
        return training(*args, **more)

    monkeypatch.setattr(quality, "score", score_or_stop)
    monkeypatch.setattr(train, "train", count_training)
    path = tmp_path / "quality-1.json"
    command = [*toy, "--json", str(path), "--item", "1"]
    assert run_program(quality.main, command) == 130
    before = json.loads(path.read_text())["rows"]
    assert (len(before), len(trained)) == (2, 1)

    stop_at = None
    assert quality.main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == before
    assert (len(rows), len(scored), len(trained)) == (3, 3, 1)
    for row in rows[1:]:
        assert {"kept", "admitted", "loss", "commit", "command", "machine", "seed"} <= row.keys()
        assert row["command"].startswith("python experiments/quality.py")
        assert row["full"] == {task: rows[0][task]["mean"] for task in ("facts", "prose")}
    assert rows[1]["settings"]["tau"] == 0.1
    assert rows[2]["kept"] < rows[1]["kept"]

    capsys.readouterr()
    assert quality.main(command) == 0                       # everything is there: it is only shown
    out, _ = capsys.readouterr()
    assert len(scored) == 3
    assert out.count("\n") == 3 and "tau 0.4: kept" in out
    assert run_program(quality.main, [*command, "--seed", "1"]) == 2
    assert "has rows of another run, seed 0 there and 1 here" in capsys.readouterr().err


def test_the_quick_run_needs_nothing_from_outside(monkeypatch, capsys):
    """What CI runs: all tasks, with the gates between full attention and the window alone."""
    # At 256 tokens the ring alone would be half of the cache.
    monkeypatch.setattr(quality, "QUICK", dict(cases=2, length=512, haystack_tokens=64))
    monkeypatch.setattr(train, "generate_prose", lambda *args: STORY)         # 20 s of a CPU
    assert quality.main(["--quick", "--device", "cpu"]) == 0
    full, gates, window = capsys.readouterr().out.splitlines()
    assert full.startswith("full attention: kept 100.0%")
    assert all(f"; {task} " in gates for task in quality.TASKS)
    assert window.startswith("sliding window")
    least, most = [float(re.search(r"kept ([\d.]+)%", line).group(1)) for line in (window, gates)]
    assert least < most < 100


def test_pictures_of_what_is_there(toy, tmp_path, monkeypatch):
    """Experiments 4 and 7 from end to end; a picture that needs the figures of another."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "gates"                             # --work, where the figures go
    monkeypatch.setattr(quality, "TASKS", ("facts", "prose"))
    monkeypatch.setattr(plot, "FOLDER", folder)
    with pytest.raises(UserError, match="no figures"):
        plot.main([])
    assert quality.main([*toy, "--item", "4", "--item", "7"]) == 0

    rows = json.loads((folder / "quality-4.json").read_text())["rows"]
    assert len(rows) == 6
    assert {row["settings"]["length"] for row in rows} == {256}
    [row] = json.loads((folder / "quality-7.json").read_text())["rows"]
    shares = torch.tensor(row["map"])
    assert shares.shape == (8, 4)
    assert row["heads"][0]["share"] == pytest.approx(shares.max().item())
    assert all(kept <= seen for head in row["heads"] for _, kept, seen in head["kept"])

    assert plot.main([]) == 0
    assert {path.name for path in folder.glob("*.png")} == {"quality-4.png", "quality-7.png"}


def test_all_pictures_of_this_folder(tmp_path, monkeypatch):
    """A picture that the figures in this folder no longer fit."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "FOLDER", tmp_path)
    for item in plot.PICTURES:
        name = f"quality-{item}.json"
        (tmp_path / name).write_text((HERE / "experiments" / name).read_text())
    assert plot.main([]) == 0
    assert len(list(tmp_path.glob("*.png"))) == len(plot.PICTURES)
    assert not list(tmp_path.glob("*.part"))


# -------------------------------------------------------------------------------- another engine

def test_other_engines_are_scored_like_ours(toy, tmp_path, capsys):
    """Right answers that do not score 100%, wrong ones that do, answers that are missing unseen."""
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    assert quality.main([*toy, "--prompts", str(prompts)]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"facts", "lists", "classes", "copy"}
    assert len(rows) >= 8

    def scored(rows, error=None):
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = run_program(quality.main, ["--prompts", str(prompts), "--score", str(answers)])
        out, err = capsys.readouterr()
        assert status == (2 if error else 0)
        if error:
            assert error in err and err.count("\n") == 1
        return dict(re.findall(r"^(\w+) +([\d.]+)%", out, re.M))

    good = [dict(id=row["id"], answer=f" {row['answer']}{tasks.END} and more") for row in rows]
    assert scored(good) == dict.fromkeys(("facts", "lists", "classes", "copy"), "100.0")
    assert scored([dict(good[0], answer="no idea"), *good[1:]])["facts"] == "50.0"
    scored(good[1:], "has no answer to facts/0/0")
    scored([*good, dict(id="x", answer="")], "has no prompt x")
    scored([*good, good[0]], "was there before")
    scored([dict(id=3, answer="")], "line 1: no JSON object with id, answer as text")


def test_from_another_folder(tmp_path):
    """Programs that find the repository only when it is the working directory."""
    row = dict(id="1", task="facts", prompt="?", answer="4821")
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    program = str(HERE / "experiments" / "quality.py")
    command = [sys.executable, program, "--prompts", "p.jsonl", "--score", "p.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100.0%" in done.stdout


# ---------------------------------------------------------------------------------------- mistakes

BAD_OPTIONS = (
    (["--item", "11"], "--item"),
    (["--item", "1", "--quick"], "--item and --quick do not go together"),
    (["--quick", "--prompts", "p.jsonl"], "--quick and --prompts do not go together"),
    (["--score", "TEXT"], "--score needs --prompts"),
    (["--prompts", "p.jsonl", "--json", "x.json"], "--json"),
    (["--item", "1", "2", "--json", "x.json"], "--json is one file"),
    (["--item", "2", "--gates", "TEXT"], "experiment 2 trains its own gates"),
    (["--item", "10", "--gates", "TEXT"], "experiment 10 trains its own gates"),
    (["--item", "5", "--data", "TEXT"], "experiment 5 needs --books"),
    (["--data", "nowhere"], "--data nowhere"),
    (["--books", "nowhere"], "--books nowhere"),
    (["--gates", "nowhere"], "--gates nowhere"),
    (["--work", "TEXT"], "--work TEXT is a file"),
    (["--json", "no/such/x.json"], "no/such"),
    (["--prompts", "no/such/p.jsonl"], "no/such"),
    (["--cases", "1"], "--cases"),
    (["--length", "8"], "--length"),
    (["--tau", "2"], "--tau"),
    (["--lam", "-1"], "--lam"),
    (["--train-steps", "0"], "--train-steps"),
)


@pytest.mark.parametrize("argv, words", BAD_OPTIONS, ids=str)
def test_bad_options_are_one_line_and_early(argv, words, tmp_path, monkeypatch, capsys):
    """A mistake that is found after an hour, or that ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "load_model", lambda args: pytest.fail("the model was loaded"))
    Path("TEXT").write_text("A few words.")
    assert run_program(quality.main, argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["TEXT"]


@pytest.mark.parametrize("argv, words", (
    (["--gates", "TEXT"], "TEXT"),
    (["--json", "TEXT"], "TEXT"),
    (["--json", "OTHER"], "OTHER holds no rows of an experiment"),
    (["--data", "TEXT", "--quick"], "no prose to hide tasks in"),
    (["--model", "BARE"], "gates.safetensors is missing"),
), ids=str)
def test_bad_files_are_one_line(argv, words, tmp_path, monkeypatch, capsys):
    """A file of another kind that ends in a traceback, or is overwritten."""
    monkeypatch.chdir(tmp_path)
    Path("TEXT").write_text("A few words.")
    Path("OTHER").write_text('{"rows": 3}')
    Path("BARE").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        Path("BARE", file).symlink_to(TINY / file)
    assert run_program(quality.main, [*argv, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    assert Path("TEXT").read_text() == "A few words."


@pytest.mark.parametrize("command, status, words", (
    (["experiments/policies.py"], 1, "run experiments/quality.py"),
    (["assets/figures.py", "--help"], 0, "usage: figures.py")))
def test_files_that_take_no_work_say_so(command, status, words, tmp_path):
    """Fault: a traceback of imports; drawings that are written because somebody asked for help."""
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "bytes" not in done.stdout


# ------------------------------------------------------------------------------------- the README

def test_the_readmes_figures_are_those_of_the_files():
    """A figure that was typed wrong, or whose file was measured again since."""
    files = [json.loads(path.read_text()) for path in (HERE / "experiments").glob("quality-*.json")]
    files += [part for part in json.loads((HERE / "experiments/quality.json").read_text()).values()
              if isinstance(part, dict)]
    measured = set()
    for row in [row for file in files for row in file["rows"]]:
        if all(task in row for task in quality.TASKS):
            cells = [row["kept"]] + [row[task]["mean"] for task in quality.TASKS[:-1]]
            percent = " | ".join(f"{cell:.1%}" for cell in cells)
            measured.add(f"{percent} | {row['prose']['mean']:.3f}")

    table_rows = re.findall(r"^\|[^|]+\| ((?:[\d.]+% \| ){5}[\d.]+) \|$", README, re.M)
    assert len(table_rows) == 5 + 5 + 4 + 6
    for cells in table_rows:
        assert cells in measured, cells


def figures_of(item):
    """{(policy and all else that is not the tasks): row} of an experiment."""
    file = json.loads((HERE / "experiments" / f"quality-{item}.json").read_text())
    return {tuple(value for name, value in row["settings"].items() if name != "tasks"): row
            for row in file["rows"]}


def test_the_readmes_figures_of_bounds_and_budgets():
    """The same for the tables of experiments 9 and 10."""
    def percent(*cells):
        return [f"{cell:.1%}" for cell in cells]

    rows = figures_of(9)
    for name in quality.EVICTORS:
        [cells] = re.findall(rf"^\|[ *]+{re.escape(name)}[ *]+\| (.*) \|$", README, re.M)
        prompt, decoded = rows[name, 384, False], rows[name, 384, True]
        assert cells.split(" | ") == percent(
            prompt["kept"], *(prompt[task]["mean"] for task in ("facts", "lists", "classes")),
            *(decoded[task]["mean"] for task in ("facts", "classes")))

    rows = figures_of(10)
    table = re.findall(r"^\| \**([\d.]+)\** \| (tau )?([\d.]+)(?: tokens)? \| (.*) \|$", README,
                       re.M)
    assert len(table) == 6
    for lam, is_tau, number, cells in table:
        where = ("fixed tau", float(lam), float(number))
        row = rows[where if is_tau else ("budget", float(lam), int(number))]
        assert cells.split(" | ") == percent(row["kept"], row["facts"]["mean"],
                                             row["classes"]["mean"])


def test_the_readmes_differences_are_measured():
    """A difference whose sign or interval is wrong, here or in gates/README.md."""
    measured = set()
    for name in ("experiments/quality-8", "experiments/quality-9", "experiments/quality-10",
                 "experiments/recipes", "experiments/chat", "experiments/chat-tasks",
                 "gates/SmolLM2-135M-Instruct"):
        for row in json.loads((HERE / f"{name}.json").read_text())["rows"]:
            for r in row.values():
                if isinstance(r, dict) and "minus_full" in r:
                    d = r["minus_full"]
                    measured.add(tuple(round(100 * d[key], 1) for key in ("mean", "low", "high")))

    number = r"([+-]?\d+\.\d)"
    text = README + (HERE / "gates" / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(rf"{number}\s+points\s+\({number}\s+to\s+{number}\)", text)
    assert len(quoted) == 13
    for cells in quoted:
        assert tuple(map(float, cells)) in measured, cells


def test_the_readmes_figures_of_the_bundled_models_recipes():
    """The same for the table of recipes: kept shares of needles' documents, and differences."""
    rows = {}
    for row in json.loads((HERE / "experiments/recipes.json").read_text())["rows"]:
        s = row["settings"]
        if s["policy"] != "full":
            key = (s["policy"], s["lam"], s["steps"])
            rows.setdefault(key, {})[s["task"], s["tokens"]] = row
    tests = [(task, tokens) for tokens in (4096, 8192) for task in ("facts", "classes", "copy")]

    for (policy, lam, steps), measured in rows.items():
        name = policy
        if lam != "5.12":
            name += f", lambda {lam}"
        if steps == 1200:
            name += ", 1,200 steps"
        cells = []
        for task, tokens in tests:
            row = measured.get((task, tokens))
            if task == "facts":
                cells.append(f"{row['kept']:.1%}")
                if tokens == 4096:
                    continue                            # all find every needle there
            points = "not measured"
            if row is not None:
                points = f"{100 * row[task]['minus_full']['mean']:+.1f}"
            cells.append("0.0" if points == "+0.0" else points)
        line = f"| {name} | " + " | ".join(cells) + " |"
        assert line in README.splitlines(), line


def chat_rows(file):
    """The rows of a JSON file of chat.py by (policy, beside, task, tokens, cases)."""
    rows = {}
    for row in json.loads((HERE / "experiments" / file).read_text())["rows"]:
        s = row["settings"]
        rows[s["policy"], s.get("beside"), s["task"], s["tokens"], s["cases"]] = row
    return rows


def in_points(share):
    """A difference in points as the tables have it: whole, halves away from 0, with its sign."""
    points = math.floor(0.5 + abs(round(100 * share, 6)))
    return f"{'+' if share > 0 else '-'}{points}" if points else "0"


def chat_cell(row):
    task = row["settings"]["task"]
    difference = row[task]["minus_full"]["mean"]
    return f"{difference:.3f}" if task in ("prose", "code") else in_points(difference)


CHAT_COLUMNS = [("prose", 4096), ("code", 4096), ("needle", 600), ("needle", 1024),
                ("needle", 2048), ("needle", 4096), ("needles", 2048), ("values", 2048),
                ("tracking", 2048), ("chat", 2048)]


def test_the_readmes_figures_of_the_chat_model():
    """The same for the tables of the chat model: policies beside gates of two lambdas."""
    rows = chat_rows("chat.json") | chat_rows("chat-tasks.json")
    lines = README.replace("*", "").splitlines()
    columns = CHAT_COLUMNS
    policies = {name: name for name in ("16 sinks + window", "sliding window", "uniform random",
                                        "whole heads")}
    policies["SnapKV's signal (sees the question)"] = "SnapKV's signal (unfair: sees the question)"
    for asked, lam, gates, columns in (
            ("0.2", "0.2", "lambda 0.2", columns),
            ("0.9", "0.64", "lambda 0.64, tau 0.05", columns[:6] + columns[9:])):
        table = {f"gates, lambda {lam}": (gates, None),
                 f"gates, lambda {asked}, tasks": (f"lambda {asked}, tasks", None)}
        table.update((name, (policy, gates)) for name, policy in policies.items())
        for name, key in table.items():
            cells = [chat_cell(rows[*key, *column, 200]) for column in columns]
            line = f"| {name} | " + " | ".join(cells) + " |"
            assert line in lines, line

    for name in ("lambda 0.2, tasks", "lambda 0.2", "lambda 0.9, tasks", "lambda 0.64, tau 0.05",
                 "lambda 0.64"):
        cells = []
        for task, tokens in (("prose", 4096), ("needle", 600), ("needle", 1024), ("needle", 2048)):
            row = rows[name, None, task, tokens, 1000]
            d = row[task]["minus_full"]
            low, mean, high = (100 * d[key] for key in ("low", "mean", "high"))
            needle = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            cells += [f"{row['kept']:.1%}", f"{d['mean']:.4f}" if task == "prose" else needle]
        assert f"| {name} | " + " | ".join(cells) + " |" in lines


def test_the_readmes_ladder_of_lambda():
    """The same for the small trainings, and for the choice of W and tau with tasks."""
    lines = README.replace("*", "").splitlines()
    rows = chat_rows("chat-ladder.json")
    for name in ("lambda 0.04", "lambda 0.16", "lambda 0.64", "lambda 1.28", "lambda 0.8, tasks",
                 "lambda 2, tasks"):
        cells = [f"{rows[name, None, task, tokens, 200]['kept']:.1%}"
                 for task, tokens in (("prose", 4096), ("needle", 2048))]
        cells += [chat_cell(rows[name, None, *column, 200]) for column in CHAT_COLUMNS]
        assert f"| {name} | " + " | ".join(cells) + " |" in lines

    rows = chat_rows("chat-tasks-tau.json")
    settings = sorted({policy for policy, *_ in rows if policy != "full attention"})
    assert len(settings) == 12
    for policy in settings:
        lam, W, tau = re.fullmatch(r"lambda (\S+), tasks, W (\d+), tau (\S+)", policy).groups()
        prose = rows[policy, None, "prose", 4096, 96]
        cells = [f"{prose['kept']:.1%}", f"{prose['prose']['minus_full']['mean']:.4f}"]
        for tokens in (600, 1024, 2048):
            needle = rows[policy, None, "needle", tokens, 128]
            cells += [f"{needle['kept']:.1%}", chat_cell(needle)]
        assert f"| {lam}, {W}, {tau} | " + " | ".join(cells) + " |" in lines


def test_the_readmes_figures_of_what_the_chat_models_gates_read():
    """The same for the table of training texts, and for the choice of W and tau."""
    lines = README.replace("*", "").splitlines()
    rows = chat_rows("chat-shift.json")
    for read in ("novels", "code", "novels and code"):
        cells = []
        for task, tokens, cases in (("prose", 4096, 96), ("code", 4096, 96), ("needle", 1024, 200),
                                    ("needle", 2048, 200), ("chat", 2048, 200)):
            row = rows[read, None, task, tokens, cases]
            cells += [f"{row['kept']:.1%}", chat_cell(row)]
        assert f"| {read} | " + " | ".join(cells) + " |" in lines

    rows = chat_rows("chat-tau.json")
    table = README[README.index("| lambda, W, tau |"):].split("\n\n")[0]
    chosen = re.findall(r"^\| \**([\d.]+), (\d+), ([\d.]+)\** \| (.*) \|$", table, re.M)
    assert len(chosen) == 12
    for lam, W, tau, line in chosen:
        policy = f"lambda {lam}, W {W}, tau {tau}"
        prose = rows[policy, None, "prose", 4096, 64]
        needle = rows[policy, None, "needle", 2048, 128]
        nats = prose["prose"]["minus_full"]["mean"]
        assert line == (f"{prose['kept']:.1%} | {nats:.4f} | {needle['kept']:.1%} | "
                        f"{chat_cell(needle)}")


def test_the_figures_of_the_gates_page():
    """The same for gates/README.md: what SmolLM2's gates keep and find."""
    page = (HERE / "gates" / "README.md").read_text(encoding="utf-8")
    file = json.loads((HERE / "gates" / "SmolLM2-135M-Instruct.json").read_text())
    rows = {}
    for row in file["rows"]:
        s = row["settings"]
        if s["cases"] == 1000:
            rows[s["policy"] == "full attention", s["task"], s["tokens"]] = row
    for tokens in (600, 1024, 2048):
        gates = rows[False, "needle", tokens]
        found = gates["needle"]["mean"]
        with_all = rows[True, "needle", tokens]["needle"]["mean"]
        d = gates["needle"]["minus_full"]
        low, mean, high = (100 * d[key] for key in ("low", "mean", "high"))
        assert (f"| {tokens:,} | {gates['kept']:.1%} | {found:.1%} | {with_all:.1%} | "
                f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) |") in page
    prose = rows[False, "prose", 4096]
    nats = prose["prose"]["minus_full"]["mean"]
    assert f"| 384 | 0.24 | {prose['kept']:.1%} | +{nats:.4f} |" in page
    assert f"{rows[True, 'prose', 4096]['prose']['mean']:.3f} nats a token" in page


def test_the_readmes_commands_parse():
    """An option that is named in the README and was renamed since."""
    commands = re.findall(r"^python experiments/quality\.py (.*?)(?: +#.*)?$", README, re.M)
    assert len(commands) >= 10
    known = (HERE / "experiments" / "quality.py").read_text()
    for option in re.findall(r"--[a-z-]+", " ".join(commands)):
        assert f'"{option}"' in known or option in ("--model", "--device", "--dtype"), option


def test_the_readmes_figures_of_the_real_model():
    """The same for the tables of recipes on the real model: kept shares, and differences."""
    rows = {}
    for row in json.loads((HERE / "experiments/recipes-smollm2.json").read_text())["rows"]:
        s = row["settings"]
        if s["policy"] != "full":
            key = (s["policy"], s["books"], s["lam"], s["steps"], s["window"], s["cases"])
            rows.setdefault(key, {})[s["task"], s["tokens"]] = row

    def cells(*key):
        prose, *needles = (rows[key][test] for test in
                           (("prose", 4096), ("needle", 1024), ("needle", 2048)))
        result = [f"{prose['kept']:.1%}", f"{prose['prose']['minus_full']['mean']:.3f}"]
        for row in needles:
            points = round(100 * row["needle"]["minus_full"]["mean"], 6)
            result += [f"{row['kept']:.1%}", f"-{math.floor(0.5 - points)}"]
        return result

    def line(start):
        [found] = re.findall(rf"^\| \**{re.escape(start)}\** \| (.*) \|$", README, re.M)
        return found.replace("*", "").split(" | ")

    texts = {"novels": "books", "code": "code", "novels and code": "books and code"}
    for text, lam in (("novels", "0.32"), ("novels", "0.64"), ("novels", "1.28"), ("code", "0.64"),
                      ("novels and code", "0.64")):
        assert line(f"{text}, {lam}") == cells("paper", texts[text], lam, 150, 256, 100)
    for way, lam in (("hidden", "0.64"), ("hard-concrete", "0.64"), ("target-inverse", "0.64"),
                     ("target", "0.64"), ("lambdas", "0.64"), ("first4", "0.64"),
                     ("repeat", "1.28"), ("future", "0.64")):
        found = re.findall(rf"^\| \**{way}\**, {lam} \| (.*) \|$", README, re.M)[0]
        kept, nats, _, *needles = found.replace("*", "").split(" | ")
        want = cells(way, "books", lam, 150, 256, 200)
        assert [kept, nats, *needles[:2], *needles[3:5]] == want, way
