"""Tests of chat.py, with the bundled model. Each docstring names the bug that its test catches."""
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

# Set before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import HERE, UserError, run_program
from experiments import chat
from experiments.policies import SIMPLER, Limited, attention_mass, make_cache, rank_heads
from generate import prefill
from model import Llama
from tiny import tasks
from tokenizer import Text
from wgkv import P, Gates, RandomAdmission

torch.set_num_threads(1)        # everything here is small: threads would only wait for each other
TINY = HERE / "tiny"
BOOK = (TINY / "example.txt").read_text(encoding="utf-8")
TURNS = ("{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def tiny():
    """The bundled model and its text side: 8 layers of 4 KV heads."""
    return Llama.from_pretrained(str(TINY)), Text(str(TINY))


@pytest.fixture(scope="module")
def text(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """The bundled tokenizer with a template as chat models have: named turns, control tokens."""
    folder = tmp_path_factory.mktemp("turns")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    return Text(str(folder))


def admit_all(window=16):
    policy = RandomAdmission(1.0)
    policy.window = window
    return policy


@pytest.fixture
def plain_turns(monkeypatch):
    """Questions as the bundled model was taught them: with a frame around them it finds nothing."""
    def split_turn(text, context, question):
        return text.insert(context, replies=0), f"\n\n{question}"

    monkeypatch.setattr(chat, "split_turn", split_turn)


def prompt_of(case, text):
    return text.tokenizer.decode(case.ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------- the cases

@pytest.mark.parametrize("task", chat.ASKED)
def test_prompts_are_nearly_as_long_as_asked_for(task, text, turns):
    """A prompt above the limit, or one that wastes a fifth of it; a question that is cut off."""
    for side in (text, turns):
        for tokens in (400, 900):
            cases = chat.make_cases(task, BOOK, tokens, 4, side, seed=1)
            assert len(cases) == 4
            for case in cases:
                assert 0.8 * tokens < len(case.ids) <= tokens
                assert case.task == task and case.answers
                assert side.decode(case.ids[:case.split]) == side.decode(side.encode(case.body))
                assert "?" in side.decode(case.ids[case.split:])
            assert sum(len(case.ids) for case in cases) > 0.88 * 4 * tokens


def test_prompts_are_the_templates_own(turns):
    """Ids that differ from those of a chat; a second turn without the end of the reply before."""
    [case] = chat.make_cases("needle", BOOK, 400, 1, turns, seed=2)
    middle = re.search(r"<\|begin\|>user\n(.*)<\|end\|>", prompt_of(case, turns), re.DOTALL)[1]
    assert case.ids == turns.turn(middle)

    [case] = chat.make_cases("chat", BOOK, 400, 1, turns, seed=2)
    found = re.fullmatch(r"<\|begin\|>user\n(.*)<\|end\|>\n<\|begin\|>assistant\n(.*)<\|end\|>\n"
                         r"<\|begin\|>user\n(.*)<\|end\|>\n<\|begin\|>assistant\n",
                         prompt_of(case, turns), re.DOTALL)
    first, reply, second = found.groups()
    assert second == chat.PAGE[0][0] and case.answers == [chat.PAGE[0][1]]
    [end] = turns.end
    whole = turns.turn(first) + turns.encode(reply, begin=False)
    assert case.ids == whole + turns.turn(second, replies=1, last=end)


def test_a_book_cannot_end_a_turn(turns):
    """Control tokens out of a book that has their names in it."""
    forged = BOOK.replace(", ", ", <|end|> ")
    for task in ("needle", "chat"):
        [case] = chat.make_cases(task, forged, 400, 1, turns, seed=0)
        assert prompt_of(case, turns).count("<|end|>") > 5
        assert case.ids.count(min(turns.end)) == {"needle": 1, "chat": 3}[task]


@pytest.mark.parametrize("task", chat.ASKED)
def test_cases_depend_on_the_seed_and_their_number_alone(task, text):
    """Figures that change with --cases, from run to run, or not at all from seed to seed."""
    three = chat.make_cases(task, BOOK, 400, 3, text, seed=5)
    assert chat.make_cases(task, BOOK, 400, 2, text, seed=5) == three[:2]
    other = chat.make_cases(task, BOOK, 400, 3, text, seed=6)
    assert all(a.ids != b.ids for a, b in zip(three, other))
    assert three[0].ids != three[1].ids


@pytest.mark.parametrize("task", ("needle", "needles", "values"))
def test_codes_are_in_the_text_once(task, text):
    """A question about somebody whose code was cut off; a code that the question gives away."""
    for case in chat.make_cases(task, BOOK, 500, 3, text, seed=3):
        body, question = text.decode(case.ids[:case.split]), text.decode(case.ids[case.split:])
        name = re.search(r"of (\w+)\?", question)[1]
        codes = re.findall(rf"secret codes? of {name} is (\d{{4}})\.", body)
        assert sorted(codes) == sorted(case.answers)
        assert len(codes) == (4 if task == "values" else 1)
        assert len(re.findall(r"secret code", body)) == dict(needle=1, needles=8, values=4)[task]
        assert not any(code in question for code in codes)


def test_variables_can_be_followed(text):
    """A variable that is used before it has a value, or another one with the same value."""
    for case in chat.make_cases("tracking", BOOK, 500, 3, text, seed=3):
        body, question = text.decode(case.ids[:case.split]), text.decode(case.ids[case.split:])
        value = {}
        for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", body):
            value[name] = number or value[other]
        assert list(value) == case.answers and len(set(value)) == 4
        assert set(value.values()) == {re.search(r"value (\d+)\?", question)[1]}


def test_the_frequent_words_are_the_most_frequent(text):
    """Counts that are so close that the answer is a matter of taste; an answer inside a word."""
    for case in chat.make_cases("words", BOOK, 500, 3, text, seed=3):
        listed = text.decode(case.ids[:case.split]).partition("\n\n")[2].split()
        counts = Counter(listed).most_common()
        assert {word for word, _ in counts[:3]} == set(case.answers)
        assert counts[2][1] > 4 * counts[3][1]
        assert not any(a != b and a in b for a in case.answers for b in set(listed))


def test_the_page_has_questions_with_one_answer(text):
    """An answer that stands in its question: the model only has to repeat it."""
    questions = [question for question, _ in chat.PAGE]
    assert len(set(questions)) == len(questions) >= 60
    for question, answer in chat.PAGE:
        assert answer.lower() not in question.lower()
    assert len(chat.make_cases("chat", BOOK, 300, 999, text, seed=0)) == len(chat.PAGE)


def test_what_does_not_fit_is_refused(text):
    """A case without its needles, or an endless loop, where there is no room."""
    with pytest.raises(UserError, match="no needles fits into 100 tokens"):
        chat.make_cases("needles", BOOK, 100, 1, text, seed=0)
    with pytest.raises(UserError, match="too short"):
        chat.make_cases("needle", BOOK, 9000, 1, text, seed=0)
    with pytest.raises(UserError, match="no prose to hide tasks in"):
        chat.make_cases("needle", "No sentences", 400, 1, text, seed=0)


def test_a_short_cut_is_made_elsewhere(text):
    """A cut that ends with a sentence can be half as long: a run that stops at one such place."""
    sentence = "It was a bright cold day in April, and the clocks were striking. "
    cuts = iter([sentence * 3, sentence * 40])
    haystack = SimpleNamespace(cut=lambda chars, rng: next(cuts))
    prose = chat.stretch(haystack, 200, text, random.Random(0))(150)
    assert prose.startswith(sentence) and len(prose) > len(sentence * 3)
    haystack = SimpleNamespace(cut=lambda chars, rng: sentence)
    with pytest.raises(UserError, match="too short to be cut into stretches of 200 tokens"):
        chat.stretch(haystack, 200, text, random.Random(0))


def test_passages(text):
    """Passages above the limit, the same one again and again, or from the short document."""
    documents = ["short\n" * 50, BOOK, "\n".join(f"x{n} = {n}" for n in range(900))]
    passages = chat.make_passages(documents, 300, 8, text, "seed")
    assert passages == chat.make_passages(documents, 300, 8, text, "seed")
    assert passages[:3] == chat.make_passages(documents, 300, 3, text, "seed")
    assert len(set(passages)) == 8
    for passage in passages:
        assert 290 <= len(text.encode(passage)) <= 300
        assert passage in BOOK or passage in documents[2]
    with pytest.raises(UserError, match="no text is long enough for passages of 9,000"):
        chat.make_passages(documents, 9000, 1, text, "seed")


# --------------------------------------------------------------------------------------- the scores

def test_scores_by_hand():
    """Upper and lower case that count; a score that is all or nothing."""
    assert chat.contained(["Paris"], "it is PARIS.") == 1
    assert chat.contained(["1234", "5678"], "The codes are 5678 and 1235.") == 0.5
    assert chat.contained(["H2O"], "") == 0


def test_a_full_dual_cache_scores_as_full_attention(tiny, plain_turns, monkeypatch):
    """Questions that are read at wrong positions, rows of unequal length that are mixed up."""
    model, text = tiny
    monkeypatch.setitem(chat.ANSWER_TOKENS, "needle", 16)
    cases = [chat.make_cases("needle", BOOK, tokens, 3, text, seed=4)[n]
             for n, tokens in enumerate((300, 420, 350))]
    seen = []
    dense, kept = chat.score_cases(model, text, None, cases, report=seen.append)
    assert kept == 1 and sum(seen) == 3
    assert sum(dense) > 0, "full attention finds nothing: this test says nothing"
    gated, kept = chat.score_cases(model, text, admit_all(), cases)
    assert gated == dense and kept >= 1

    # One after the other as in a batch, and the window alone finds less.
    alone = [chat.score_cases(model, text, None, [case])[0][0] for case in cases]
    assert alone == dense
    nothing = RandomAdmission(0.0)
    nothing.window = 16
    scores, kept = chat.score_cases(model, text, nothing, cases)
    assert sum(scores) < sum(dense) and kept < 0.5


def test_an_answer_counts_up_to_its_limit(tiny, monkeypatch):
    """A case that is given more tokens because another one in its batch has more."""
    model, text = tiny
    cases = (chat.make_cases("needle", BOOK, 300, 1, text, seed=0)
             + chat.make_cases("values", BOOK, 300, 1, text, seed=0))
    asked = []

    def write(model, text, kv, hidden, steps):
        asked.append((steps, kv.num_tokens.tolist()))
        return [text.encode(" no" * 40 + case.answers[0], begin=False) for case in cases]

    monkeypatch.setattr(chat.train, "write", write)
    monkeypatch.setitem(chat.ANSWER_TOKENS, "values", 64)
    scores, _ = chat.score_cases(model, text, None, cases)
    assert scores == [0, 0.25]
    assert asked == [(64, [len(case.ids) for case in cases])]


def test_a_budget_holds_before_the_answer_begins(tiny, monkeypatch):
    """First tokens of answers that are chosen with all keys, evicted only afterwards."""
    model, text = tiny
    cases = chat.make_cases("needle", BOOK, 600, 1, text, seed=0)
    calls = []

    def spy(model, kv, prompts):
        calls.append([len(prompt) for prompt in prompts])
        return prefill(model, kv, prompts)

    monkeypatch.setattr(chat, "prefill", spy)
    _, kept = chat.score_cases(model, text, Limited(admit_all(), tokens=192), cases)
    assert calls == [[cases[0].split], [len(cases[0].ids) - cases[0].split]]
    assert kept < 0.5


def test_nats_are_the_mean_cross_entropy(tiny, monkeypatch):
    """Targets that are shifted, padding that is counted, a token lost between two chunks."""
    model, text = tiny
    passages = [BOOK[:700], BOOK[700:1900], BOOK[2000:2900]]
    expected = []
    with torch.no_grad():
        for passage in passages:
            ids = torch.tensor([text.encode(passage.rstrip())])
            logits = model.logits(model(ids))[0, :-1]
            expected.append(F.cross_entropy(logits, ids[0, 1:]).item())
    for policy in (None, admit_all()):
        means, kept = chat.nats(model, text, policy, passages)
        assert means == pytest.approx(expected, abs=1e-4)
    assert kept > 1                     # whole pages, all tokens

    ids = [text.encode(passage.rstrip()) for passage in passages]
    documents = [tasks.Document("prose", passage) for passage in passages]
    for size in (max(map(len, ids)) - 1, 100, 99):
        kv = make_cache(model, text, None, documents)
        assert chat.read_nats(model, kv, ids, chunk=size) == pytest.approx(expected, abs=1e-4)
    worse, _ = chat.nats(model, text, Gates.load(TINY / "gates.safetensors", model), passages)
    assert worse != expected


def test_batches_fit(tiny):
    """A batch that takes more memory the longer its prompts are."""
    model, _ = tiny
    parts = chat.batches(model, [5000, 100, 100], lambda length: length)
    assert parts == [[5000], [100], [100]]
    assert [len(part) for part in chat.batches(model, [100] * 10, lambda length: length)] == [8, 2]


# ----------------------------------------------------------------------------------- the comparison

def test_policies_take_cases_for_documents(tiny):
    """An oracle that does not see the question, or a ranking that misses the answer."""
    model, text = tiny
    [case] = chat.make_cases("needle", BOOK, 300, 1, text, seed=0)
    oracle = SIMPLER[chat.ORACLE](16, 0.2, 300, None)
    kv = make_cache(model, text, oracle, [case])
    prefill(model, kv, [case.ids[:case.split]])
    mass = attention_mass(model, case.ids, last=len(case.ids) - case.split)[..., :case.split]
    top = F.max_pool1d(mass, 7, 1, 3).argmax(dim=-1)                    # (L, Hkv)
    assert kv.admitted()[:, :, :case.split].gather(2, top[..., None]).all()
    assert case.questions == [(case.question, f" {case.answers[0]}")]
    assert sorted(rank_heads(model, text, [case], 16).flatten().tolist()) == list(range(32))


@pytest.fixture
def toy(tmp_path, plain_turns, monkeypatch):
    """Run the program on a few short cases; returns its rows."""
    monkeypatch.setattr(chat, "LONGEST_PASSAGE", 10**6)
    monkeypatch.setattr(chat, "MATCHED_ON", 1)
    monkeypatch.setattr(chat, "CHAT_TOKENS", 300)
    monkeypatch.setattr(chat, "ANSWER_TOKENS", dict.fromkeys(chat.ASKED, 16))

    def run(*argv, json_file="rows.json", status=0):
        path = tmp_path / json_file
        options = ["--data", str(TINY / "example.txt"), "--cases", "8", "--lengths", "300",
                   "--device", "cpu", "--json", str(path)]
        assert run_program(chat.main, [*options, *map(str, argv)]) == status
        return json.loads(path.read_text())["rows"] if path.exists() else []

    return run


def test_a_run_and_its_rows(toy, tmp_path, capsys, monkeypatch):
    """Rows without what they are compared with; a second run that measures everything again."""
    for name in ("a", "b"):
        shutil.copy(TINY / "gates.safetensors", tmp_path / f"{name}.safetensors")
    options = ["--gates", tmp_path / "a.safetensors", tmp_path / "b.safetensors",
               "--tasks", "needle", "prose", "--select", "192"]
    rows = toy(*options)
    assert [row["settings"]["policy"] for row in rows] == ["full attention", *"aabb"] * 2
    needle = rows[:5]
    assert all(row["settings"]["lam"] == "10.24" for row in needle[1:])
    assert [row["settings"].get("select") for row in needle] == [None, None, 192, None, 192]
    full, own = needle[0]["needle"], needle[1]["needle"]
    assert len(own["scores"]) == own["n"] == 8
    assert own["minus_full"]["mean"] == pytest.approx(own["mean"] - full["mean"])
    assert needle[0]["kept"] == 1 > needle[1]["kept"] and needle[1]["window"] == 128
    assert rows[5]["prose"]["n"] == 4 and rows[5]["prose"]["mean"] > 1

    out, _ = capsys.readouterr()
    assert "needle: share of the expected strings" in out and "prose: nats a token" in out
    assert f"{own['mean']:.3f} {own['minus_full']['mean']:+.3f}" in out

    # Again, and with one task more: only that is measured.
    measured = []
    monkeypatch.setattr(chat, "nats", None)
    real = chat.score_cases
    monkeypatch.setattr(chat, "score_cases", lambda model, text, policy, cases, report: (
        measured.append(cases[0].task) or real(model, text, policy, cases, report)))
    assert toy(*options) == rows and not measured
    more = toy("--tasks", "needle", "prose", "values")
    assert more[:10] == rows and len(more) == 11 and measured == ["values"]


def test_simpler_policies_keep_the_bytes_of_the_gates(toy, monkeypatch):
    """A comparison at other bytes, one that is not with the gates, or an oracle not marked so."""
    for name in ("16 sinks + window", "uniform random"):
        monkeypatch.delitem(chat.BESIDE, name)
    rows = toy("--gates", TINY / "gates.safetensors", "--tasks", "needle", "--simpler")
    gates, *simpler = rows[1:]
    assert [row["settings"]["policy"] for row in simpler] == list(chat.BESIDE)
    assert sum("unfair" in row["settings"]["policy"] for row in simpler) == 1
    page = P / 250                      # of a dense cache, where all heads agree
    for row in simpler:
        assert row["settings"]["beside"] == "gates"
        assert gates["kept"] - 0.1 < row["kept"] < gates["kept"] + 1.1 * page
        difference = row["needle"]["mean"] - gates["needle"]["mean"]
        assert row["needle"]["minus_gates"]["mean"] == pytest.approx(difference)


def test_rows_about_code_name_its_version(toy, monkeypatch):
    """Figures about an older version of the code, taken for those of this one."""
    [row] = toy("--tasks", "code")
    assert len(row["settings"]["text"]) == 8 and row["code"]["mean"] > 1
    monkeypatch.setattr(chat.Comparison, "documents", lambda self, source: [BOOK])
    assert len(toy("--tasks", "code")) == 2


def test_merge(toy, tmp_path, capsys):
    """Rows twice or lost, rows of other settings, a missing file that counts as an empty one."""
    a = toy("--tasks", "needle", json_file="a.json")
    b = toy("--tasks", "needle", "values", json_file="b.json")
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    out = tmp_path / "out.json"
    capsys.readouterr()
    assert run_program(chat.main, ["--merge", *paths, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == a + b[1:]
    assert json.loads(out.read_text())["settings"] == json.loads(Path(paths[0]).read_text())[
        "settings"]
    assert "values: share" in capsys.readouterr().out

    toy("--tasks", "needle", "--seed", "1", json_file="c.json")
    for other, words in (("c.json", "seed"), ("absent.json", "absent.json is missing")):
        assert run_program(chat.main, ["--merge", paths[0], str(tmp_path / other)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "empty.json").write_text("{}")
    assert run_program(chat.main, ["--merge", str(tmp_path / "empty.json"), paths[0]]) == 2
    assert "holds no rows" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- wrong input

@pytest.mark.parametrize("argv, words", [
    (["--tasks", "facts"], "invalid choice"),
    (["--lengths", "100"], "of at least 256"),
    (["--lengths", "9000"], "positions"),
    (["--gates", "absent.safetensors"], "--gates absent.safetensors: there is no such file"),
    (["--data", "absent.txt"], "--data absent.txt: there is no such file"),
    (["--simpler"], "--simpler goes with --gates"),
    (["--budget-tokens", "512"], "--budget-tokens goes with --gates"),
    (["--gates", "tiny/gates.safetensors", "tiny/gates.safetensors"], "2 files are called gates"),
    (["--gates", "tiny/gates.safetensors", "--select", "64"], "too few"),
    (["--json", "absent/rows.json"], "absent/rows.json cannot be written"),
])
def test_wrong_options_are_one_line(argv, words, toy, capsys, monkeypatch):
    """A traceback, or an error after an hour of work."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(chat.Comparison, "row", None)
    toy(*argv, status=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert words in line, line


def test_data_is_needed(capsys):
    """A book that the user did not choose."""
    assert run_program(chat.main, []) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_make_case_is_for_other_programs(text):
    """A signature that another program relies on."""
    haystack = tasks.Haystack(BOOK)
    for task in (*chat.HIDDEN, "words"):
        case = chat.make_case(task, haystack, 400, text, random.Random(1))
        assert case == chat.make_case(task, haystack, 400, text, random.Random(1))
        assert case.task == task and len(case.ids) <= 400
