"""tiny/tasks.py and train.py (a part of test_programs.py)."""
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# Before triton is imported: without a GPU its kernels run in an interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import generate
import train
from common import HERE, UserError, run_program
from model import SINGLE, Llama
from test_generate import STORY, TINY_FOLDER, copy_text_files, prompt, tiny  # noqa: F401
from test_loader import make_folder, write_config
from test_wgkv import Bomb, official, refused
from tiny import tasks
from tiny.make import ANSWER_WEIGHT, Documents, Sentences
from wgkv import P, DenseCache, DualCache, Gates, RandomAdmission, SoftAttention

torch.set_num_threads(1)    # most things here are small: threads would only wait for each other


# ------------------------------------------------------------------------------------ tiny/tasks.py

def test_documents_come_from_their_seed_and_hold_their_answers(tiny):
    """A document whose answer is not in its text, or whose answer's tokens are marked wrongly."""
    _, text = tiny
    encode = text.tokenizer.encode
    haystack = tasks.Haystack(STORY * 3)
    for task, tokens in itertools.product(tasks.MAKERS, (256, 1024)):
        made = tasks.make(task, haystack, tokens, encode, random.Random(7))
        assert made == tasks.make(task, haystack, tokens, encode, random.Random(7))

        document, ids, in_answer = made
        assert len(ids) <= tokens
        assert encode(document.text).ids == ids
        marked = [i for i, a in zip(ids, in_answer) if a]
        answers = "".join(answer for _, answer in document.questions)
        assert text.tokenizer.decode(marked, skip_special_tokens=False) == answers
        for question, answer in document.questions:
            assert question.startswith("\n\n")
            assert tasks.correct(task, answer, answer) == 1
            assert tasks.correct(task, answer, " No idea.") < 0.2
            value = answer.removesuffix(tasks.END).rstrip(".").split()[-1]
            assert value in document.body


def test_documents_sentence_by_sentence(tiny):
    """make.py's faster way to tokens: other tokens, or an answer's tokens taken for prose."""
    tokenizer = tiny[1].tokenizer
    haystack = tasks.Haystack(STORY)
    encode = Sentences(tokenizer, haystack)
    for n, task in enumerate([*tasks.MAKERS] * 4):
        _, *want = tasks.make(task, haystack, 400, tokenizer.encode, random.Random(n))
        _, *got = tasks.make(task, haystack, 400, encode, random.Random(n))
        assert got == want, task
    assert len(encode.known) > 50


def test_documents_of_many_lengths(tiny):
    """One length for a range of them; padding that counts; targets that are not the next tokens."""
    tokenizer = tiny[1].tokenizer
    haystack = tasks.Haystack(STORY)
    documents = Documents(haystack, tokenizer.encode, 100, 400, 12, seed=0, mix="asked")
    ids, targets, weights = next(iter(documents))
    assert ids.shape == targets.shape == weights.shape == (12, 400)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    lengths = (weights > 0).sum(dim=1)
    assert lengths.min() < 200 and lengths.max() > 300 and len(set(lengths.tolist())) > 6
    for sample, weight, n in zip(targets, weights, lengths.tolist()):
        assert weight[:n].all() and not weight[n:].any() and not sample[n:].any()
        assert set(weight[:n].tolist()) <= {1.0, ANSWER_WEIGHT}
        assert "\n\nWh" not in tokenizer.decode(sample[weight > 1].tolist())
    assert (weights == ANSWER_WEIGHT).any(dim=1).sum() >= 6


# ------------------------------------------------------------------------------ the loss and a step

def sample_of(ids):
    """A training sample whose tokens weigh 1 each."""
    return torch.tensor(ids), torch.ones(len(ids))


def gates_for(model, bias=None):
    """New gates of seed 0 with a window of 16; bias: of their outputs."""
    torch.manual_seed(0)
    gates = Gates.for_model(model, window=16)
    if bias is not None:
        with torch.no_grad():
            for gate in gates.layers:
                gate.b2.fill_(bias)
    return gates


def train_on(model, gates, config, make_sample, **options):
    """train.train with its own samples and a plain AdamW."""
    optimizer = torch.optim.AdamW(gates.parameters())
    return train.train(model, gates, optimizer, train.Samples(make_sample, config), config,
                       **options)


@pytest.mark.parametrize("lam, bias, sign", [(5.0, 1.0, -1), (0.0, -3.0, 1)])
def test_training_lowers_what_it_is_asked_to_lower(lam, bias, sign, tiny):
    """Gates that do not close when lambda is large, or do not open where keys are missed."""
    model, text = tiny
    ids = text.encode(STORY)[:300]
    gates = gates_for(model, bias)

    def mean_gate():
        with torch.no_grad():
            return train.distill(model, gates, [sample_of(ids)]).gates[0].mean().item()

    before = mean_gate()
    config = train.TrainConfig(lr=3e-3, steps=8, tokens_per_step=300, seq_len=(300,), lam=lam)
    assert train_on(model, gates, config, lambda rng, n: sample_of(ids)) == (8, None)
    assert sign * (mean_gate() - before) > 0.01


def test_checkpointed_layers_give_the_same_gradients(tiny):
    """Gates of a layer's second run in the place of the first's; a gradient that gets lost."""
    model, text = tiny
    ids = text.encode(STORY)[:300]
    found = []
    for checkpoint in (False, True):
        gates = gates_for(model)
        losses = train.distill(model, gates, [sample_of(ids)], checkpoint)
        (losses.distill + losses.sparsity).backward()
        found.append([p.grad for p in gates.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed) and plain.any()


def test_the_second_run_of_a_layer_leaves_nothing_behind(tiny):
    """Gates of the second run kept, and all that led to them: the memory of all layers at once."""
    model, text = tiny
    student = SoftAttention(gates_for(model), model.device)
    hidden = model(torch.tensor([text.encode(STORY)[:100]]), student, checkpoint=True)
    first = dict(student.g)
    (hidden.sum() + sum(g.sum() for g in first.values())).backward()
    assert len(first) == model.config.num_layers
    assert all(student.g[layer] is g for layer, g in first.items())


FIGURES = ("grad_norm", "loss", "distill_loss", "hard_distill_loss", "sparsity_loss", "admitted")


def test_a_step_is_the_mean_of_its_samples(tiny):
    """Gradients that grow with the samples of a step: AdamW hides it, weight decay does not."""
    model, text = tiny
    ids = text.encode(STORY)[:256]
    lines = []
    for count in (1, 3):
        config = train.TrainConfig(steps=1, tokens_per_step=256 * count, seq_len=(256,))
        train_on(model, gates_for(model), config, lambda rng, n: sample_of(ids), log=lines.append)
    for key in FIGURES:
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-4)


def test_micro_batches(tiny):
    """Padding that is seen, or that counts; a smaller last micro-batch that counts as much."""
    model, text = tiny
    ids = text.encode(STORY)
    config = train.TrainConfig(steps=1, tokens_per_step=3 * 256, seq_len=(256,))

    def sample(rng, length):
        return sample_of(ids[:rng.randint(60, 256)])

    lines = []
    trained = []
    for count in (1, 2, 3):
        gates = gates_for(model)
        train_on(model, gates, config, sample, micro_batches={256: (count, False)},
                 log=lines.append)
        trained.append(torch.cat([p.detach().flatten() for p in gates.parameters()]))
    for other in (1, 2):
        for key in FIGURES:
            assert lines[0][key] == pytest.approx(lines[other][key], rel=1e-4)
        torch.testing.assert_close(trained[0], trained[other], rtol=1e-4, atol=1e-5)


def test_answers_weigh_more(tiny):
    """A weight on wrong tokens, lost among padding, or one that changes the size of the loss."""
    model, text = tiny
    config = train.TrainConfig(answer_weight=7.0, tasks="asked")
    make_sample = train.task_samples(tasks.Haystack(STORY), text.tokenizer.encode, config)
    ids, weights = make_sample(random.Random(1), 400)
    assert set(weights.tolist()) == {1.0, 7.0}
    assert "." in text.decode(ids[weights == 7].tolist())

    gates = gates_for(model, bias=-3.0)
    other = sample_of(ids[:300].tolist())
    with torch.no_grad():
        student = model(ids[None], SoftAttention(gates, model.device))[0]
        teacher = model(ids[None])[0]
        errors = [(a - b).square().mean() for a, b in zip(student, teacher)]
        wanted = sum(w * e for w, e in zip(weights, errors)) / weights.sum()
        alone = train.distill(model, gates, [(ids, weights)]).distill
        other_alone = train.distill(model, gates, [other]).distill
        together = train.distill(model, gates, [(ids, weights), other]).distill
    assert alone == pytest.approx(wanted.item(), rel=1e-4)
    assert together == pytest.approx((alone + other_alone).item() / 2, rel=1e-4)


# ----------------------------------------------------------------------- schedule and training text

def test_the_schedule_of_the_paper_and_others():
    """Lengths in wrong shares; a sample used twice or left out; a step of too few tokens."""
    lengths = [length for length, _, _ in train.schedule(train.PAPER)]
    assert [lengths.count(n) for n in train.PAPER.seq_len] == [4000, 2000, 1000, 500]
    assert lengths[:100] != sorted(lengths[:100])

    odd = train.TrainConfig(seq_len=(300, 700, 1000), tokens_per_step=2500, steps=77)
    for config in (train.PAPER, train.BUNDLED, odd):
        steps = train.schedule(config)
        assert len(steps) == config.steps
        samples = 0
        for length, first, count in steps:
            assert first == samples
            assert config.tokens_per_step <= count * length < config.tokens_per_step + length
            samples += count
    per_length = {n: sum(count for length, _, count in steps if length == n) for n in odd.seq_len}
    assert per_length[300] / per_length[700] == pytest.approx(7 / 3, rel=0.15)

    rates = [train.learning_rate(train.PAPER, step) for step in range(7500)]
    assert max(rates) == rates[749] == 1e-3
    assert rates[0] == pytest.approx(1e-3 / 750) and 0 < rates[-1] < 1e-9
    assert rates[4125] == pytest.approx(5e-4)


@pytest.mark.parametrize("chat", (False, True))
def test_samples_are_stretches_of_one_document(chat, tiny):
    """Text joined across documents; ends that never come up; held-out text that is trained on."""
    _, text = tiny
    rng = random.Random(0)
    words = STORY.split()
    documents = [" ".join(rng.choices(words, k=n)) for n in (50, 300, 400, 500, 900)]
    ids = [text.encode(document, begin=False) for document in documents]
    head = text.begin
    if chat:
        intro = "Please analyze and summarize the following text:\n\n"
        turn = text.chat([dict(role="user", content=intro + documents[4])])
        head = text.encode(turn.partition(documents[4])[0], control=True)
        assert len(head) > 5 and head[:1] == text.begin

    config = train.TrainConfig(seq_len=(256, 512), chat=chat)
    training, held_out = train.split_text(documents, text, config, "x")
    places = {}
    for n in range(60):
        for length, samples in ((256, training), (512, training), (256, held_out)):
            sample = samples(random.Random(n), length)[0].tolist()
            assert len(sample) == length and sample[:len(head)] == head
            place = find_stretch(sample[len(head):], ids)
            places.setdefault((length, samples is held_out), set()).add(place)

    used = {key: {document for document, _ in found} for key, found in places.items()}
    long_enough = {i for i, document in enumerate(ids) if len(document) >= 256 - len(head)}
    assert len(used[256, True]) == 1
    assert not used[256, True] & (used[256, False] | used[512, False])
    assert used[256, False] | used[256, True] == long_enough
    assert max(used[512, False]) == 4
    assert len(places[256, False]) > 50


def find_stretch(body, documents):
    """The only (document, start) where these ids stand."""
    found = []
    for i, document in enumerate(documents):
        for start in range(len(document) - len(body) + 1):
            if document[start:start + len(body)] == body:
                found.append((i, start))
    [place] = found
    return place


def test_the_end_of_an_only_document_is_held_out(tiny):
    """Validation on text that was trained on."""
    _, text = tiny
    story = text.encode(STORY, begin=False)
    training, held_out = train.split_text([STORY], text, train.TrainConfig(seq_len=(256,)), "x")

    def starts(samples):
        found = [samples(random.Random(n), 256)[0].tolist()[1:] for n in range(50)]
        return [find_stretch(body, [story])[1] for body in found]

    assert max(starts(training)) + 255 <= min(starts(held_out))


def test_special_tokens_in_a_text_are_text(tiny):
    """A text that ends the model's turn because it has "<|end|>" in it."""
    _, text = tiny
    config = train.TrainConfig(seq_len=(256,))
    samples, _ = train.split_text([STORY[:3000] + tasks.END + STORY], text, config, "x")
    end = min(text.end)
    for n in range(100):
        assert end not in samples(random.Random(n), 256)[0].tolist()


def test_which_files_are_read(tmp_path):
    """A document lost in a subfolder or a last line; a line cut at U+2028; other files read.

    And what is no regular file: a dangling link, or a named pipe, which would never end.
    """
    (tmp_path / "b" / "c.txt").mkdir(parents=True)
    lines = ['{"text": "two\u2028lines", "id": 7}', "", '{"text": " "}', '{"text": "three"}']
    (tmp_path / "b" / "c.txt" / "2.jsonl").write_text("\n".join(lines))
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "b" / "x.bin").write_bytes(b"\xff")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert train.read_documents(tmp_path) == ["one\n", "two\u2028lines", "three"]
    assert train.read_documents(tmp_path / "1.txt") == ["one\n"]
    refused(lambda: train.read_documents(tmp_path / "pipe.jsonl"), "pipe.jsonl", "regular file")


@pytest.mark.parametrize("line", ("{", '{"body": "x"}', '["text"]', '{"text": 3}',
                                  '{"text": "half \\ud800 a pair"}'), ids=range(5))
def test_broken_lines_are_named(line, tmp_path):
    """A traceback, or a document that the tokenizer cannot take, hours after it was read."""
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line)
    refused(lambda: train.read_documents(tmp_path), "bad.jsonl, line 2", '"text"')


# --------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def trainee(tmp_path):
    """Options that train a small random model for six steps, but for --out."""
    folder = make_folder(tmp_path, vocab_size=4096, max_position_embeddings=1024)
    copy_text_files(folder)
    story = tmp_path / "story.txt"
    story.write_text(STORY)
    return ["--model", str(folder), "--data", str(story), "--seq-len", "256,512",
            "--tokens-per-step", "1024", "--steps", "6", "--window", "32", "--device", "cpu"]


def same_gates(one, two, tolerance=0.0):
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) <= tolerance


def read_log(path):
    return [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]


def run_with_error(argv, status, capsys):
    """Run train.py, which must end with this status; returns what it said."""
    capsys.readouterr()
    assert run_program(train.main, argv) == status
    return capsys.readouterr().err


def test_training_writes_gates_that_fit_and_repeat(tmp_path, capsys, monkeypatch, prompt):
    """Two runs of one seed that differ; --data that is not used; a config that is nowhere kept."""
    monkeypatch.setattr(train, "final_table", lambda *a: print("table"))
    example = str(TINY_FOLDER / "example.txt")
    argv = ["--steps", "2", "--seq-len", "256", "--tokens-per-step", "512", "--device", "cpu",
            "--window", "32", "--data", example]
    for n in (1, 2):
        out = str(tmp_path / f"{n}.safetensors")
        assert train.main([*argv, "--out", out]) == 0
    same_gates(tmp_path / "1.safetensors", out)

    printed, err = capsys.readouterr()
    assert printed == "table\n" * 2
    assert "memory: a sample of 256 tokens takes about" in err and f"{out}.log.jsonl" in err
    assert f"generate.py --model {TINY_FOLDER} --gates {out}" in err
    wanted = {**json.loads(json.dumps(vars(train.BUNDLED))), "steps": 2, "seq_len": [256],
              "tokens_per_step": 512, "window": 32}
    written = [json.loads(value) for value in safe_open(out, "pt").metadata().values()
               if value.startswith("{")]
    assert written == [wanted]
    assert f"config: {json.dumps(wanted)}\n" in err
    assert generate.main(["--prompt", prompt, "--gates", out, "--max-new-tokens", "1",
                          "--device", "cpu"]) == 0


def test_the_log_has_every_step_and_ends_with_the_validation(trainee, tmp_path, capsys):
    """A log that loses a step; shares by head or by size of g that do not add up to the whole."""
    assert train.main([*trainee, "--out", str(tmp_path / "g"), "--save-every", "2"]) == 0
    assert {path.name for path in tmp_path.glob("g*")} == {"g", "g.log.jsonl"}
    *steps, last = read_log(tmp_path / "g")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        sparsity = train.PAPER.lam * line["sparsity_loss"]
        assert abs(line["loss"] - line["distill_loss"] - sparsity) < 1e-6
        assert (line["hard_distill_loss"] is not None) == (line["step"] in (1, 6))
        assert line["seconds"] * line["tokens_per_s"] == pytest.approx(1024)
        assert line["seq_len"] in (256, 512)
        assert 0 <= line["admitted"] <= 1 and line["grad_norm"] > 0

    v = last["validation"]
    heads = torch.tensor(v["admitted_by_head"])
    assert heads.shape == (2, 2) and heads.mean().item() == pytest.approx(v["admitted"])
    assert v["samples"] == 16
    assert len(v["gate_histogram"]) == 10 and sum(v["gate_histogram"]) == pytest.approx(1)
    assert v["admitted"] >= sum(v["gate_histogram"][1:]) - 1e-6
    assert v["distill_loss"] > 0 and v["hard_distill_loss"] >= 0
    out, err = capsys.readouterr()
    assert out == ""                            # no table: a random model recalls nothing
    assert "validation: distill loss " in err
    assert err.count("training: step ") == 6    # at most ten lines, where stderr is no terminal


DIES = """
import os, signal, sys, torch, train
real, saved = train.save_file, []
def save(tensors, path, metadata):
    real(tensors, path, metadata)
    saved.append(path)
    if len(saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
train.save_file = save
train.main(sys.argv[1:])
"""


def test_a_killed_run_continues_to_the_same_gates(trainee, tmp_path, capsys):
    """Killed while it saves: half a file read, a sample used twice, AdamW begun anew."""
    assert train.main([*trainee, "--out", str(tmp_path / "whole")]) == 0
    out = str(tmp_path / "killed")
    run = subprocess.run([sys.executable, "-c", DIES, *trainee, "--out", out, "--save-every", "2"],
                         cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert Path(f"{out}.resume.part").exists()
    assert not Path(out).exists() and len(read_log(out)) == 4

    err = run_with_error([*trainee, "--out", out, "--resume"], 0, capsys)
    assert "continuing after step 2" in err
    same_gates(tmp_path / "whole", out)
    check_continued(tmp_path, "killed")


def test_a_stopped_run_continues_to_the_same_gates(trainee, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of an update: gates of two steps, or a step that is taken twice."""
    assert train.main([*trainee, "--out", str(tmp_path / "whole")]) == 0
    out = str(tmp_path / "stopped")
    log = train.RunFiles.log

    def log_and_interrupt(self, figures):
        log(self, figures)
        if figures["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.RunFiles, "log", log_and_interrupt)
        err = run_with_error([*trainee, "--out", out], 130, capsys)
    assert "interrupted" in err
    assert Gates.load(out, Llama.from_pretrained(tmp_path)).window == 32
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert train.main([*trainee, "--out", out, "--resume"]) == 0
    same_gates(tmp_path / "whole", out)
    check_continued(tmp_path, "stopped")


def check_continued(folder, name):
    """The log of a continued run has each step once, and none of its other files is left."""
    assert [line.get("step") for line in read_log(folder / name)] == [1, 2, 3, 4, 5, 6, None]
    assert {path.name for path in folder.glob(f"{name}*")} == {name, f"{name}.log.jsonl"}


@pytest.fixture
def unfinished(trainee, tmp_path, monkeypatch):
    """Options that resume a run which was interrupted at its end; its state is in g.resume."""
    def interrupt(*args):
        raise KeyboardInterrupt

    argv = [*trainee, "--out", str(tmp_path / "g"), "--save-every", "5"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupt)
        assert run_program(train.main, argv) == 130
    return [*argv, "--resume"]


def test_another_run_is_not_resumed(unfinished, tmp_path, capsys):
    """Gates that continue with another model, other text or other settings."""
    def refuse(options, *words):
        err = run_with_error([*unfinished, *options], 2, capsys)
        assert err.count("\n") == 1 and all(word in err for word in ("g.resume", *words)), err

    (tmp_path / "other.txt").write_text(STORY.replace("a", "e"))
    refuse(["--lam", "0.3"], f"lam {train.PAPER.lam} there, 0.3 here")
    refuse(["--steps", "7", "--seed", "1"], "steps 6 there, 7 here", "seed 0 there, 1 here")
    refuse(["--data", str(tmp_path / "other.txt")], "data ")
    weights = load_file(tmp_path / SINGLE)
    save_file({name: -t for name, t in weights.items()}, tmp_path / SINGLE)
    refuse([], "model ")
    save_file(weights, tmp_path / SINGLE)
    assert train.main(unfinished) == 0


def test_a_broken_resume_file_is_refused(unfinished, tmp_path, capsys):
    """A cut file, a pickle that runs, other tensors: a traceback, or steps taken with them."""
    path = tmp_path / "g.resume"
    good = path.read_bytes()
    tensors = {name: t.clone() for name, t in load_file(path).items()}      # not mapped to the file
    metadata = safe_open(path, "pt").metadata()

    def refuse():
        err = run_with_error(unfinished, 2, capsys)
        assert err.count("\n") == 1 and "g.resume cannot be read" in err, err

    for content in (b"", b"garbage", good[:1000], good[:-4]):
        path.write_bytes(content)
        refuse()
    torch.save(Bomb(tmp_path / "exploded"), path)
    refuse()
    assert not (tmp_path / "exploded").exists()
    save_file(tensors, path)
    refuse()
    del tensors["layers.0.w1.exp_avg"]
    save_file(tensors, path, metadata)
    refuse()

    path.write_bytes(good)
    assert train.main(unfinished) == 0


def test_two_processes_train_as_one(trainee, tmp_path):
    """Gradients averaged wrongly; a sample that two processes take, or none."""
    assert train.main([*trainee, "--out", str(tmp_path / "one")]) == 0
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node", "2", str(HERE / "train.py"), *trainee,
                          "--out", str(tmp_path / "two")],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.count("validation: ") == 1, run.stderr
    same_gates(tmp_path / "one", tmp_path / "two", 1e-5)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for a, b in zip(one[:-1], two[:-1], strict=True):
        for key in FIGURES:                     # AdamW alone hides gradients that are too large
            assert (a[key] or 0) == pytest.approx(b[key] or 0, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("at", (1, 4))
def test_a_loss_that_is_not_finite_ends_the_run(at, trainee, tmp_path, monkeypatch, capsys):
    """NaN written over good gates; an update with NaN; a run that goes on."""
    real = train.distill
    calls = []

    def broken(model, gates, *args, **options):
        losses = real(model, gates, *args, **options)
        calls.append([p.detach().clone() for p in gates.parameters()])
        if len(calls) == at:
            losses = losses._replace(distill=losses.distill * math.nan)
        return losses

    monkeypatch.setattr(train, "distill", broken)
    out = tmp_path / "g"
    out.write_text("old")
    argv = [*trainee, "--seq-len", "256", "--tokens-per-step", "256", "--out", str(out)]
    last = run_with_error(argv, 2, capsys).splitlines()[-1]
    assert f"step {at}: the loss or its gradient is not finite" in last and "--lr" in last
    if at == 1:
        assert out.read_text() == "old"
    else:
        assert "gates after step 3" in last
        gates = Gates.load(out, Llama.from_pretrained(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), calls[3], strict=True))


# ------------------------------------------------------------------- full disks and other trainings

@pytest.fixture
def small_disk():
    """A function that limits the size of each file that is written, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_the_state(trainee, tmp_path, small_disk, capsys):
    """A half-written file that is left behind or resumed; a traceback."""
    out = str(tmp_path / "g")
    assert train.main([*trainee, "--out", str(tmp_path / "whole")]) == 0
    small_disk(1000)
    err = run_with_error([*trainee, "--out", out, "--save-every", "2"], 2, capsys)
    assert "g.resume cannot be written" in err.splitlines()[-1]
    assert {path.name for path in tmp_path.glob("g*")} == {"g.log.jsonl"}


def test_a_disk_that_is_full_for_the_log(trainee, tmp_path, small_disk, capsys):
    """Half a line that a resumed run keeps."""
    small_disk(700)
    err = run_with_error([*trainee, "--out", str(tmp_path / "g")], 2, capsys)
    assert "g.log.jsonl cannot be written" in err.splitlines()[-1]


def test_a_disk_that_is_full_for_the_gates(trainee, tmp_path, monkeypatch, capsys):
    """The steps since the last save lost, because the gates have no room at the very end."""
    def no_room(self, path, *args):
        raise UserError(f"{path} cannot be written: No space left on device")

    out = str(tmp_path / "g")
    with monkeypatch.context() as patch:
        patch.setattr(Gates, "save", no_room)
        err = run_with_error([*trainee, "--out", out], 2, capsys)
    last = err.splitlines()[-1]
    assert "No space left" in last and "--resume continues from" in last and "g.resume" in last

    assert train.main([*trainee, "--out", out, "--resume"]) == 0
    assert train.main([*trainee, "--out", str(tmp_path / "whole")]) == 0
    same_gates(tmp_path / "whole", out)
    check_continued(tmp_path, "g")


def test_two_trainings_with_one_out(trainee, tmp_path, capsys):
    """A second training that writes the files of the first, or one that a stale lock keeps out."""
    argv = [*trainee, "--out", str(tmp_path / "g")]
    with train.RunFiles(str(tmp_path / "g"), None, None, {}).locked_log(0):
        err = run_with_error(argv, 2, capsys)
        assert "another training is writing" in err and "--out" in err
        assert not (tmp_path / "g").exists()
    assert train.main(argv) == 0


# ----------------------------------------------------------------------------------------- refusals

def test_too_little_memory_for_training(trainee, tmp_path, monkeypatch, capsys):
    """A kill by the system, hours in, instead of a sentence; layers checkpointed for no reason."""
    model = Llama.from_pretrained(tmp_path)
    gates = Gates.for_model(model)
    config = train.TrainConfig(seq_len=(512, 1024))
    plain = train.training_bytes(model, gates, 1024, False)
    checkpointed = train.training_bytes(model, gates, 1024, True)
    assert plain > checkpointed > 1.5 * train.training_bytes(model, gates, 512, True)

    free = 2 * plain
    monkeypatch.setattr(train, "free_bytes", lambda device: free)
    assert train.plan_micro_batches(model, gates, config)[0] == {512: (1, False), 1024: (1, False)}
    free = plain
    assert train.plan_micro_batches(model, gates, config)[0] == {512: (1, False), 1024: (1, True)}

    free = checkpointed // 2
    argv = [*trainee, "--seq-len", "1024", "--out", str(tmp_path / "g")]
    err = run_with_error(argv, 2, capsys)
    assert err.count("\n") == 1
    assert "--seq-len 1024 needs about" in err and "GiB free" in err and "lower --seq-len" in err


def test_a_tokenizer_that_does_not_fit(tmp_path, capsys):
    """The tokenizer of another model: an index out of range, or on a GPU a dead process."""
    folder = make_folder(tmp_path, max_position_embeddings=1024)
    copy_text_files(folder)
    argv = ["--model", str(folder), "--data", str(TINY_FOLDER / "example.txt"), "--seq-len", "256",
            "--window", "32", "--device", "cpu", "--out", str(tmp_path / "g")]
    last = run_with_error(argv, 2, capsys).splitlines()[-1]
    assert "vocabulary of 40" in last and "the id " in last


def test_a_task_that_does_not_fit(tiny):
    """A traceback because no document of a task is as short as a sample."""
    encode = tiny[1].tokenizer.encode
    make_sample = train.task_samples(tasks.Haystack(STORY), encode, train.BUNDLED)
    refused(lambda: [make_sample(random.Random(n), 20) for n in range(20)], "20 tokens", "--seq")


def test_convert(tmp_path, capsys):
    """An official checkpoint that comes out as other gates, or as a file that does not load."""
    folder = make_folder(tmp_path)
    torch.save(official(2, 2, 8, 4, torch.Tensor.bfloat16), tmp_path / "x.pt")
    out = tmp_path / "g.safetensors"
    argv = ["--convert", str(tmp_path / "x.pt"), "--out", str(out), "--lam", "0.04"]
    assert train.main([*argv, "--model", str(folder)]) == 0
    capsys.readouterr()
    model = Llama.from_pretrained(folder)
    ours = Gates.load(out, model)
    theirs = Gates.load(tmp_path / "x.pt", model)
    assert capsys.readouterr().err == ""
    assert (ours.window, ours.tau, ours.expansion) == (256, 0.1, 4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    err = run_with_error([*argv, "--model", str(TINY_FOLDER)], 2, capsys)
    assert "8 layers, 4 KV heads of 32" in err


BAD_OPTIONS = [
    *([option, value] for option in ("--lam", "--window", "--tau", "--seq-len", "--steps", "--seed")
      for value in ("nan", "-1", "x")),
    ["--window", "0"], ["--tau", "0"], ["--tau", "1.5"], ["--seq-len", "8"], ["--warmup", "1.5"],
    ["--steps", "0"], ["--seq-len", "256,"], ["--save-every", "0"], ["--expansion", "1000"],
]
BAD_INPUTS = [                                          # options, words of the refusal
    (["--data", "nowhere"], "nowhere"),
    (["--data", "no\0where"], "no\\x00where"),
    (["--data", "SHORT"], "fewer than"),
    (["--data", "EMPTY"], "no text found"),
    (["--data", "FOLDER"], "no text found"),
    (["--data", "LATIN"], "LATIN cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    (["--data", "SHORT", "--tasks"], "no prose to hide tasks in"),
    (["--data", "SHORT", "--chat", "--tasks"], "--chat"),
    (["--chat"], "--chat"),
    (["--tasks", "nothing"], "--tasks"),
    (["--window", "1024"], "--window 1024 should be smaller than --seq-len 1024"),
    (["--model", "OTHER"], "model_type 'gemma'"),
    (["--model", "SMALL", "--data", "SHORT"], "--window 256 should be smaller than --seq-len 128"),
    (["--out", ""], "'' is no name for a file"),
    (["--out", "a\0b"], "is no name for a file"),
    (["--out", "no/such/x"], "no/such"),
    (["--out", "OTHER"], "OTHER"),
    (["--convert", "nowhere.pt"], "nowhere.pt"),
    (["--convert", "LATIN"], "LATIN"),
]


@pytest.mark.parametrize("argv, words", [*((argv, argv[0]) for argv in BAD_OPTIONS), *BAD_INPUTS],
                         ids=repr)
def test_training_refuses_what_cannot_work(argv, words, capsys, tmp_path, monkeypatch):
    """A mistake that is found after the training and not before it, or files left by a refusal."""
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("A few words.")
    Path("EMPTY").write_text(" \n")
    Path("LATIN").write_bytes("caf\u00e9".encode("latin-1"))
    for name in ("FOLDER", "OTHER", "SMALL"):
        Path(name).mkdir()
    Path("FOLDER/x.pdf").write_text("no text")
    write_config(Path("OTHER"), model_type="gemma")
    make_folder(Path("SMALL"))
    for name in ("OTHER", "SMALL"):
        copy_text_files(Path(name))
    before = sorted(tmp_path.rglob("*"))
    err = run_with_error([*argv, "--device", "cpu"], 2, capsys)
    assert words in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_more_processes_than_samples(monkeypatch, capsys):
    """A process without a sample waits for gradients that it does not have."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")      # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "3")
    err = run_with_error(["--device", "cpu"], 2, capsys)
    assert "--tokens-per-step 2048: it should be at least 3072" in err


def test_help_names_every_option_and_both_defaults(capsys):
    """A setting without an option or a group; defaults of one preset given for both."""
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in vars(train.PAPER):
        assert f"--{name.replace('_', '-')} " in text
    assert "(default: 0.16; 5.12 for the bundled model)" in text
    assert "4096,8192,16384,32768; 1024 for the bundled model" in text
    assert "examples: python train.py" in text and "gates:" in text and "training:" in text


def test_evaluation_scores_answers_and_counts_kept_bytes(tiny):
    """A scorer that cannot fail: right with everything kept must beat nothing kept."""
    model, text = tiny
    haystack = tasks.Haystack(STORY * 3)
    documents = [tasks.make("facts", haystack, 512, text.tokenizer.encode, random.Random(n))[0]
                 for n in range(8)]
    scores, kept = train.evaluate(model, text, lambda group: DenseCache(model, len(group)),
                                  documents)
    assert kept == 1.0
    assert len(scores) == sum(len(document.questions) for document in documents)
    assert sum(scores) > 0.8 * len(scores)

    nothing = RandomAdmission(0.0)
    scores, kept = train.evaluate(
        model, text, lambda group: DualCache(model, nothing, len(group), P), documents)
    assert sum(scores) < 0.3 * len(scores)
    # Each body leaves a window of P tokens, with positions and gates of some percent.
    window = len(documents) * P / sum(len(text.encode(d.body)) for d in documents)
    assert window < kept < 1.05 * window
