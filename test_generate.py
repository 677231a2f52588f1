"""The page and generate.py (a part of test_programs.py)."""
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


