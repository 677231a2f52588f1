"""The experiments."""
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


