"""tasks.py and train.py (a part of test_programs.py)."""
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
        head = text.encode(text.chat(turn).partition(documents[4])[0], control=True) if chat else text.begin
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


