"""What a chat model can still do with the cache that its gates leave it.

    python experiments/chat.py --model FOLDER --data BOOK --gates A.safetensors B.safetensors
        full attention, and each gates file, on every task at every length
    python experiments/chat.py ... --simpler --json chat.json
        simpler policies too (policies.py), each with as many bytes as the gates keep
    python experiments/chat.py ... --tasks needle prose --lengths 600 --json a.json
        a part of the work, for instance one of several processes
    python experiments/chat.py --merge a.json b.json --json chat.json
        the parts in one file

The model gets a stretch of a book in its own chat template, and is asked about what we have hidden
there. The tasks are those of RULER (arXiv 2404.06654), at lengths that small models can read:

    needle      "The secret code of Clara is 4821.", once in the book
    needles     eight such sentences with eight names, one of them asked for
    values      four codes of one name, all asked for
    tracking    "VAR K47 = 58213.", "VAR B20 = VAR K47.", ...: which variables have that value?
    words       no book but a list of words: which three are the most frequent?
    chat        questions that need no text ("What is the capital of France?"), asked as a second
                turn: does the model still answer with a long first turn in its cache?

A score is the share of the expected strings that the answer contains. Three more tasks are language
modelling, in nats a token, without the chat template: lower is better.

    prose       the book
    code        the source of this repository
    library     the source of Python's standard library (not for gates that were trained on it)

Small models fail at some of this with full attention already, so every row also has its difference
from full attention on the same cases. Rows are kept in --json as soon as they are measured: give
the same command again, and it goes on where it was stopped.
"""
import functools
import json
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
import train                                                                    # noqa: E402
from common import (HERE, Parser, UserError, check_writable, model_options,     # noqa: E402
                    progress, read_json, run_program, say, whole, write_text)
from experiments.policies import (SIMPLER, Limited, make_cache, matched,        # noqa: E402
                                  rank_heads)
from experiments.quality import Results, digest, identity, interval, minus      # noqa: E402
from files import fingerprint                                                   # noqa: E402
from generate import load_model, prefill                                        # noqa: E402
from model import open_tensors                                                  # noqa: E402
from tiny import tasks                                                          # noqa: E402
from tokenizer import Text                                                      # noqa: E402
from wgkv import Gates                                                          # noqa: E402

ASKED = ("needle", "needles", "values", "tracking", "words", "chat")    # tasks with answers
READ = ("prose", "code", "library")                                     # language modelling

LENGTHS = (600, 1024, 2048, 4096)       # tokens of a prompt, or of a passage
LONGEST_PASSAGE = 8192                  # passages have this length too, if the model can
MATCHED_ON = 4                          # tests on which bytes are made equal
CHAT_TOKENS = 2048                      # of the task chat, whatever --lengths says

# The longest answer, in tokens. Where several strings are expected, one sentence with four codes
# takes some 40 tokens. Much more would let a model that lists everything it saw be right.
ANSWER_TOKENS = dict(needle=32, needles=32, values=64, tracking=64, words=64, chat=32)


# ---------------------------------------------------------------------------------------- the cases

@dataclass
class Case:
    """A prompt in chat form, and what its answer should contain.

    policies.py takes it for a document: a body that is read first, and a question about it. Both
    are text in which the template's control tokens have secret names (tokenizer.Text).
    """
    task: str
    body: str           # the conversation up to the question
    question: str       # the rest of it, up to where the model's reply begins
    answers: list       # the strings that should be in the reply
    ids: list           # of the whole prompt
    split: int          # so many of the ids are the body's

    @property
    def questions(self):
        return [(self.question, " " + ", ".join(self.answers))]


def make_cases(task, source_text, tokens, count, text, seed):
    """`count` cases of a task, each at most `tokens` tokens long, hidden in source_text.

    Case n depends on the seed, the task, the length and n alone. chat has each question of its page
    once, and so at most as many cases as the page has questions.
    """
    haystack = make_haystack(source_text)
    cases = []
    for n in range(count):
        rng = random.Random(f"{seed}/{task}/{tokens}/{n}")
        if task == "chat":
            if n == len(PAGE):
                break
            cases.append(second_turn(haystack, tokens, text, rng, *PAGE[n]))
        else:
            cases.append(make_case(task, haystack, tokens, text, rng))
    return cases


@functools.lru_cache(maxsize=4)
def make_haystack(source_text):
    return train.make_haystack(source_text, "the text")


def make_case(task, haystack, tokens, text, rng):
    """A Case of any task but chat, of at most `tokens` tokens and of nearly as many."""
    if task == "words":
        return most_frequent(haystack, tokens, text, rng)
    pieces, question, answers = HIDDEN[task](rng)
    prose = stretch(haystack, tokens, text, rng)
    seed = rng.getrandbits(64)

    def one_turn(size):
        hidden = tasks.scatter(prose(size), pieces, random.Random(seed))
        return split_turn(text, hidden.strip(), question)

    return fit(task, tokens, text, one_turn, answers)


def fit(task, tokens, text, compose, answers):
    """The Case of compose(size) -> (body, question), with the largest size that `tokens` allow.

    size: tokens of filling. What the template, the question and what is hidden take is only known
    when we have encoded them, so the first try is too long by as much.
    """
    size = tokens
    for _ in range(20):
        body, question = compose(size)
        ids = text.encode(body)
        split = len(ids)
        # The question begins with an empty line or a control token: no token crosses over to it.
        ids = ids + text.encode(question, begin=False)
        if len(ids) <= tokens:
            return Case(task, body, question, answers, ids, split)
        # A stretch ends with a sentence, so a token less may change nothing: larger steps.
        size -= max(len(ids) - tokens, tokens // 32)
        if size < tokens // 8:
            break
    raise UserError(f"no {task} fits into {tokens} tokens: raise --lengths")


def split_turn(text, context, question):
    """(body, question) of a first user turn.

    The frame matters to a small model: with full attention SmolLM2-135M-Instruct found 16 of 16
    needles in 600 tokens with these words, and 11 without them, when it went on with the book.
    """
    question = f"\n\nQuestion about the text: {question}"
    turn = text.insert(f"Here is a text:\n\n{context}{question}", replies=0)
    start = turn.rindex(question)
    return turn[:start], turn[start:]


def stretch(haystack, tokens, text, rng):
    """A random stretch of a book, as a function: prose(size) is its first `size` tokens, or less.

    It ends with a sentence, if one ends in its last tenth, else with a word.
    """
    for _ in range(20):
        piece = haystack.cut(6 * tokens, rng)       # books have 4 to 5 characters a token
        offsets = text.tokenizer.encode(piece, add_special_tokens=False).offsets
        if len(offsets) >= tokens:
            break
        # A cut ends with a sentence: near a table of verse it may be half as long. Another place.
    else:
        raise UserError(f"the text is too short to be cut into stretches of {tokens:,} tokens")

    def prose(size):
        first = piece[:offsets[size - 1][1]]
        ends = [end.end() for end in re.finditer(r"[a-z]{2}[.!?] ", first)]
        if ends and ends[-1] > 0.9 * len(first):
            return first[:ends[-1]]
        return first.rsplit(" ", 1)[0] + ". "

    return prose


# ---- what is hidden: functions (rng) -> (pieces of text, the question, the expected strings)

def needle(rng):
    return hidden_codes(rng, 1)


def needles(rng):
    return hidden_codes(rng, 8)


def hidden_codes(rng, count):
    """Codes of `count` people, and the first one's is asked for."""
    names = rng.sample(tasks.NAMES, count)
    codes = rng.sample(range(1000, 10000), count)
    pieces = [f"The secret code of {name} is {code}. " for name, code in zip(names, codes)]
    rng.shuffle(pieces)
    return pieces, f"What is the secret code of {names[0]}?", [str(codes[0])]


def values(rng):
    name = rng.choice(tasks.NAMES)
    codes = rng.sample(range(1000, 10000), 4)
    pieces = [f"One of the secret codes of {name} is {code}. " for code in codes]
    return pieces, f"What are the four secret codes of {name}?", [str(code) for code in codes]


def tracking(rng):
    """A chain of four assignments. All names have three characters: none contains another."""
    letters = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 4)
    names = [f"{letter}{rng.randint(10, 99)}" for letter in letters]
    value = rng.randint(10000, 99999)
    pieces = [f"VAR {names[0]} = {value}. "]
    pieces += [f"VAR {new} = VAR {old}. " for old, new in zip(names, names[1:])]
    question = f"Which four variables (VAR) have the value {value}? List all of them."
    return pieces, question, names


HIDDEN = dict(needle=needle, needles=needles, values=values, tracking=tracking)


# ---- cases that hide nothing in a book

COMMON = 3                  # words: so many are frequent,
OTHERS = 20                 # and so many are not
COMMON_SHARE = 0.2          # of the list, for each of the frequent ones; the others: 0.02


def most_frequent(haystack, tokens, text, rng):
    """A list of words of the book; the three that occur most often are asked for."""
    words = distinct_words(haystack, COMMON + OTHERS, rng)
    common, others = words[:COMMON], words[COMMON:]
    seed = rng.getrandbits(64)

    def listed(size):
        """`size` words, shuffled."""
        result = common * round(COMMON_SHARE * size)
        result += [others[n % OTHERS] for n in range(size - len(result))]
        random.Random(seed).shuffle(result)
        return " ".join(result)

    tokens_per_word = len(text.encode(listed(tokens), begin=False)) / tokens

    def one_turn(size):
        return split_turn(text, listed(int(size / tokens_per_word)),
                          "Which three words occur most often in it?")

    return fit("words", tokens, text, one_turn, common)


def distinct_words(haystack, count, rng):
    """Random words of the book, none of which is a part of another."""
    chosen = []
    for word in rng.sample(usual_words(haystack), len(usual_words(haystack))):
        if not any(word in other or other in word for other in chosen):
            chosen.append(word)
        if len(chosen) == count:
            return chosen
    raise UserError(f"the text has too few different words: {count} are needed")


@functools.lru_cache(maxsize=4)
def usual_words(haystack):
    """The words of 4 to 7 letters that stand in a book three times or more, in a fixed order."""
    counts = Counter(re.findall(r"\b[a-z]{4,7}\b", haystack.text))
    return sorted(word for word, n in counts.items() if n >= 3)


def second_turn(haystack, tokens, text, rng, question, answer):
    """A question of the page, after a first turn in which the model has read part of a book."""
    prose = stretch(haystack, tokens, text, rng)

    def two_turns(size):
        first = text.insert(f"Please read this passage.\n\n{prose(size).strip()}", replies=0)
        reply = "I have read the passage. What would you like to know?"
        return first + reply, text.insert(question, replies=1)

    return fit("chat", tokens, text, two_turns, [answer])


# Each answer has one usual form and is not a part of its question: we look for it anywhere in what
# the model says. (So "10" is found in "100", too.)
PAGE = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Portugal?", "Lisbon"),
    ("What is the capital of China?", "Beijing"),
    ("What is the capital of the United States?", "Washington"),
    ("On which continent is Kenya?", "Africa"),
    ("On which continent is India?", "Asia"),
    ("On which continent is Poland?", "Europe"),
    ("In which country is the Eiffel Tower?", "France"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("In which country is the city of Toronto?", "Canada"),
    ("In which country is the city of Sydney?", "Australia"),
    ("Which is the largest ocean on Earth?", "Pacific"),
    ("Which river flows through Cairo?", "Nile"),
    ("Which is the highest mountain on Earth?", "Everest"),
    ("What is 8 plus 4? Answer with digits.", "12"),
    ("What is 7 plus 6? Answer with digits.", "13"),
    ("What is 30 minus 10? Answer with digits.", "20"),
    ("What is 3 times 5? Answer with digits.", "15"),
    ("What is 5 times 5? Answer with digits.", "25"),
    ("What is 20 divided by 2? Answer with digits.", "10"),
    ("What is 100 minus 1? Answer with digits.", "99"),
    ("How many minutes are there in an hour? Answer with digits.", "60"),
    ("How many hours are there in a day? Answer with digits.", "24"),
    ("How many days are there in a year? Answer with digits.", "365"),
    ("How many months are there in a year? Answer with digits.", "12"),
    ("In which year did the Second World War end?", "1945"),
    ("How many degrees does a right angle have? Answer with digits.", "90"),
    ("How many cents are there in a dollar? Answer with digits.", "100"),
    ("What is the chemical formula of water?", "H2O"),
    ("Which metal has the chemical symbol Au?", "gold"),
    ("Which gas do plants take from the air?", "carbon dioxide"),
    ("Which gas do we need to breathe?", "oxygen"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is called the red planet?", "Mars"),
    ("Which is the largest planet of the solar system?", "Jupiter"),
    ("Which star does the Earth go around?", "Sun"),
    ("Which force pulls things to the ground?", "gravity"),
    ("Which organ pumps blood through the body?", "heart"),
    ("Which organ do we think with?", "brain"),
    ("What do cows give us to drink?", "milk"),
    ("What do bees make that people eat?", "honey"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"),
    ("What is the opposite of up?", "down"),
    ("What color is the sky on a clear day?", "blue"),
    ("What color is grass?", "green"),
    ("What color is a ripe banana?", "yellow"),
    ("What color is fresh snow?", "white"),
    ("Which day comes after Monday?", "Tuesday"),
    ("Which month comes after June?", "July"),
    ("Which season comes after winter?", "spring"),
    ("Who wrote the play Hamlet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo"),
    ("Who was the first president of the United States?", "Washington"),
    ("Which language do people speak in Brazil?", "Portuguese"),
    ("Which animal barks and is kept as a pet?", "dog"),
]


def contained(answers, said):
    """The share of the expected strings that were said, in whatever case (RULER's score)."""
    said = said.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


# --------------------------------------------------------------------------------------- the scores

def batches(model, items, length):
    """Parts of a list for one cache each: on a GPU some 131,072 tokens, 32 sequences at most."""
    tokens = 2**13
    most = 8
    if model.device.type == "cuda":
        tokens = 2**17
        most = 32
    size = max(1, min(most, tokens // max(map(length, items))))
    return [items[start:start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def score_cases(model, text, policy, cases, report=lambda cases: None):
    """([score of each case], the share of a dense cache that is kept when the bodies are read).

    policy: an admission policy, a policies.Limited, or None for full attention. The question is
    read in a second call: a budget then holds before the first token of the answer is chosen.
    """
    scores = []
    kept, dense = 0, 0
    for group in batches(model, cases, lambda case: len(case.ids)):
        kv = make_cache(model, text, policy, group)
        prefill(model, kv, [case.ids[:case.split] for case in group])
        kept += kv.kept_bytes()
        dense += kv.dense_bytes()
        hidden = prefill(model, kv, [case.ids[case.split:] for case in group])  # (B, hidden_size)
        steps = max(ANSWER_TOKENS[case.task] for case in group)
        for case, ids in zip(group, train.write(model, text, kv, hidden, steps)):
            scores.append(contained(case.answers, text.decode(ids[:ANSWER_TOKENS[case.task]])))
        report(len(group))
    return scores, kept / dense


@torch.no_grad()
def nats(model, text, policy, passages, report=lambda passages: None):
    """([mean nats a token of each passage], the share of a dense cache that is kept).

    passages: strings. policy: as in `score_cases`.
    """
    means = []
    kept, dense = 0, 0
    documents = [tasks.Document("prose", passage) for passage in passages]
    for group in batches(model, documents, lambda document: len(text.encode(document.body))):
        kv = make_cache(model, text, policy, group)
        means += read_nats(model, kv, [text.encode(document.body) for document in group])
        kept += kv.kept_bytes()
        dense += kv.dense_bytes()
        report(len(group))
    return means, kept / dense


def read_nats(model, kv, prompts, chunk=4096):
    """Read prompts, B lists of ids, into a cache: the mean cross-entropy of each one's tokens."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)        # (B,)
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    tokens = tokens.to(model.device)                                                # (B, longest)
    padded = bool((lengths < tokens.shape[1]).any())
    kv.expect(lengths.tolist())
    sums = [0.0] * len(prompts)
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start:start + chunk]                                       # (B, T)
        valid = (lengths - start).clamp(0, part.shape[1])                           # (B,)
        hidden = model(part, kv, valid if padded else None)                         # (B, T, C)
        # The logits of token t predict token t + 1. A sequence at a time: all of them together
        # would take 26 GB for 131,072 tokens and a vocabulary of 49,152.
        for b, prompt in enumerate(prompts):
            targets = tokens[b, start + 1:min(start + 1 + chunk, len(prompt))]      # (n,)
            if len(targets):
                logits = model.logits(hidden[b, :len(targets)]).float()             # (n, vocab)
                sums[b] += F.cross_entropy(logits, targets, reduction="sum").item()
    return [total / (len(prompt) - 1) for total, prompt in zip(sums, prompts)]


# ------------------------------------------------------------------------------------- the passages

def make_passages(documents, tokens, count, text, seed):
    """`count` stretches of at most `tokens` tokens, and of nearly as many, of random documents."""
    long_enough = [document for document in documents if len(document) > 2 * tokens]
    sizes = [len(document) for document in long_enough]
    passages = []
    for n in range(count):
        rng = random.Random(f"{seed}/{tokens}/{n}")
        passage = None
        tries = 200 if long_enough else 0       # a document can be too short from a line on
        while passage is None and tries:
            [document] = rng.choices(long_enough, sizes)
            passage = random_stretch(document, tokens, text, rng)
            tries -= 1
        if passage is None:
            raise UserError(f"no text is long enough for passages of {tokens:,} tokens")
        passages.append(passage)
    return passages


def random_stretch(document, tokens, text, rng):
    """A stretch from a random line on; None if the document ends before it has enough tokens."""
    start = document.find("\n", rng.randrange(len(document))) + 1
    piece = document[start:start + 8 * tokens]
    offsets = text.tokenizer.encode(piece, add_special_tokens=False).offsets
    size = tokens - len(text.begin)
    if len(offsets) < size:
        return None
    passage = piece[:offsets[size - 1][1]].rstrip()
    while len(text.encode(passage)) > tokens:       # a word that was cut can have more tokens
        passage = passage[:-1].rstrip()
    return passage


# ----------------------------------------------------------------------------------- the comparison

# Those of policies.py that see nothing but keys and positions, and SnapKV's signal as a bound.
ORACLE = "oracle (unfair: sees the question)"
BESIDE = {name: SIMPLER[name] for name in ("sliding window", "16 sinks + window", "uniform random",
                                           "whole heads")}
BESIDE["SnapKV's signal (unfair: sees the question)"] = SIMPLER[ORACLE]


class Comparison:
    """Rows of results, and what they are measured on.

    Cases depend only on the options, so a run that was interrupted and started again measures what
    is missing and nothing else.
    """

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.text = Text(args.model)
        self.gates = [(gate_settings(path), Gates.load(path, model)) for path in args.gates]
        for _, gates in self.gates:                     # limits that no cache can keep: say it now
            self.limited(gates).make_cache(model, 1)
        settings = dict(program="chat", model=model.name, weights=fingerprint(model),
                        dtype=str(model.dtype).removeprefix("torch."), seed=args.seed,
                        cases=args.cases, data=identity(args.data))
        origin = bench.machine(model.device)
        origin["command"] = " ".join(["python", "experiments/chat.py", *sys.argv[1:]])
        origin["date"] = time.strftime("%Y-%m-%d")
        self.results = Results(args.json, settings, origin)

    # ---- what is measured on

    @functools.cache
    def documents(self, source):
        """The texts of a source: prose, code or library."""
        if source == "prose":
            return [train.read_prose(self.args.data)]
        folders = [HERE, HERE / "tiny", HERE / "experiments"]
        if source == "library":
            folders = [Path(sysconfig.get_paths()["stdlib"])]
        files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]

    @functools.lru_cache(maxsize=2)
    def tests(self, task, tokens):
        """The cases of a task, or (language modelling) a quarter as many passages."""
        args = self.args
        if task in ASKED:
            [book] = self.documents("prose")
            return make_cases(task, book, tokens, args.cases, self.text, args.seed)
        count = max(4, args.cases // 4)
        return make_passages(self.documents(task), tokens, count, self.text, f"{args.seed}/{task}")

    def lengths(self, task):
        if task == "chat":
            return [CHAT_TOKENS]
        lengths = self.args.lengths
        if task in READ and self.model.config.max_positions >= LONGEST_PASSAGE:
            lengths = {*lengths, LONGEST_PASSAGE}
        return sorted(lengths)

    def measure(self, policy, task, tokens):
        """(scores, kept share) of a policy."""
        tests = self.tests(task, tokens)
        with progress(len(tests), f"{task}, {tokens:,} tokens", "cases") as bar:
            run = nats if task in READ else score_cases
            return run(self.model, self.text, policy, tests, bar.update)

    # ---- policies

    def compare(self, task, tokens):
        """The rows of all policies on one task at one length."""
        full = self.row(dict(policy="full attention"), lambda: None, task, tokens)
        for settings, gates in self.gates:
            own = self.row(settings, lambda: gates, task, tokens, full=full)
            limits = dict(budget=self.args.budget_tokens, select=self.args.select)
            if any(limits.values()):
                make = functools.partial(self.limited, gates)
                self.row(dict(settings, **limits), make, task, tokens, full=full)
            for name, family in (BESIDE if self.args.simpler else {}).items():
                make = functools.partial(self.same_bytes, family, gates.window, own["kept"], task,
                                         tokens)
                beside = dict(policy=name, beside=settings["policy"], gates=settings["gates"])
                self.row(beside, make, task, tokens, full=full, gates=own)

    def limited(self, gates):
        return Limited(gates, self.args.budget_tokens, select=self.args.select)

    def row(self, settings, make, task, tokens, **others):
        """The row of the policy make(). others: rows of the same cases, to subtract from it."""
        settings = dict(settings, task=task, tokens=tokens)
        if task in ("code", "library"):
            # Code changes with its version, and with it what its rows can be compared with.
            settings["text"] = digest(*self.documents(task))[:8]

        def measured():
            policy = make()
            scores, kept = self.measure(policy, task, tokens)
            result = interval(scores, bounded=task in ASKED)
            for name, other in others.items():
                result[f"minus_{name}"] = minus(scores, other[task]["scores"],
                                                 bounded=task in ASKED)
            result["scores"] = [round(score, 4) for score in scores]
            return {"kept": kept, "window": getattr(policy, "window", None), task: result}

        return self.results.row(settings, measured)

    def same_bytes(self, family, window, kept, task, tokens):
        """The policy of a family that keeps `kept` of the bytes, in the first few tests."""
        some = self.tests(task, tokens)[:MATCHED_ON]
        if task in READ:
            some = [tasks.Document(task, passage) for passage in some]

        def make(share):
            return family(window, share, tokens, lambda: self.ranking(window))

        return matched(make, kept, self.model, self.text, some)

    @functools.cache
    def ranking(self, window):
        """The heads, best first, by what answers attend to in a few cases that are not measured."""
        [book] = self.documents("prose")
        some = []
        for task in ("needle", "values"):
            some += make_cases(task, book, 1024, 4, self.text, f"{self.args.seed}/heads")
        return rank_heads(self.model, self.text, some, window)


def gate_settings(path):
    """What a row says about a gates file: its name, its digest, and lambda if the file says it."""
    settings = dict(policy=Path(path).stem, gates=digest(Path(path).read_bytes())[:8])
    if not str(path).endswith(".pt"):               # the authors' files have no metadata
        metadata = open_tensors(path).metadata() or {}
        if "lam" in metadata:
            settings["lam"] = metadata["lam"]
    return settings


# --------------------------------------------------------------------------------- tables and files

def print_tables(rows):
    """A table for each task: for each length score, difference from full attention, share kept."""
    for task in ASKED + READ:
        here = [row for row in rows if row["settings"]["task"] == task]
        lengths = sorted({row["settings"]["tokens"] for row in here})
        if not here:
            continue
        what = "nats a token" if task in READ else "share of the expected strings"
        print(f"\n{task}: {what}, difference from full attention, bytes kept")
        print(f"{'tokens':40}" + "".join(f"{tokens:>22,}" for tokens in lengths))
        lines = {}
        for row in here:
            lines.setdefault(label(row["settings"]), {})[row["settings"]["tokens"]] = row
        for name, by_length in lines.items():
            cells = [cell(by_length.get(tokens), task) for tokens in lengths]
            print(f"{name:40.40}" + "".join(f"{text:>22}" for text in cells))


def label(settings):
    """The name of a policy in a table."""
    name = settings["policy"]
    for key in ("beside", "budget", "select"):
        if settings.get(key):
            name += f", {key} {settings[key]}"
    return name


def cell(row, task):
    if row is None:
        return "-"
    result = row[task]
    minus_full = f"{result['minus_full']['mean']:+.3f}" if "minus_full" in result else ""
    return f"{result['mean']:.3f} {minus_full} {row['kept']:5.1%}"


def merge(paths, out):
    """Join the rows of files of the same settings; of rows with equal settings the first stays."""
    settings = read_json(paths[0]).get("settings")
    rows = {}
    for path in paths:
        read_json(path)                     # Results would take a missing file for an empty one
        for row in Results(path, settings if isinstance(settings, dict) else {}, {}).rows:
            rows.setdefault(json.dumps(row["settings"], sort_keys=True), row)
    if out:
        write_text(out, json.dumps(dict(settings=settings, rows=[*rows.values()]), indent=1) + "\n")
    print_tables([*rows.values()])
    say(f"{len(rows)} rows of {len(paths)} files")


# ------------------------------------------------------------------------------------------ program

def parse(argv):
    parser = Parser(description=__doc__)
    model_options(parser)
    group = parser.add_argument_group("cases")
    group.add_argument("--data", metavar="TEXT", help="file or folder: a book that is new to the "
                       "gates, to hide the tasks in")
    group.add_argument("--tasks", nargs="+", choices=ASKED + READ, default=list(ASKED + READ),
                       metavar="TASK", help="some of: " + " ".join(ASKED + READ))
    group.add_argument("--lengths", type=whole(256), nargs="+", default=list(LENGTHS), metavar="N",
                       help="tokens of a prompt, at most (default: "
                            f"{' '.join(map(str, LENGTHS))}); passages also have "
                            f"{LONGEST_PASSAGE}, and chat always has {CHAT_TOKENS}")
    group.add_argument("--cases", type=whole(8), default=200, metavar="N",
                       help="cases of a task at a length; a quarter as many passages; of chat "
                            f"{len(PAGE)} at most (default: 200)")

    group = parser.add_argument_group("policies (full attention is always measured)")
    group.add_argument("--gates", nargs="+", default=[], metavar="FILE", help="gates to measure")
    group.add_argument("--simpler", action="store_true",
                       help="also simpler policies, each at the bytes that each gates file keeps")
    group.add_argument("--budget-tokens", type=whole(128), metavar="N",
                       help="also the gates with a budget of N tokens a row on average")
    group.add_argument("--select", type=whole(1), metavar="N",
                       help="also the gates with at most N tokens of a row attended in decode "
                            "(together with --budget-tokens, if it is given)")

    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="where the rows go (default: nowhere)")
    group.add_argument("--merge", nargs="+", metavar="FILE", help="measure nothing: join the rows "
                       "of these files into --json, and print them")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """UserError for options that clash or name what is not there, before anything slow."""
    if args.json:
        check_writable(args.json)
    if args.merge:
        return
    if not args.data:
        raise UserError("--data is missing: a book to hide the tasks in")
    for name, paths in (("data", [args.data]), ("gates", args.gates)):
        for path in paths:
            if not Path(path).exists():
                raise UserError(f"--{name} {path}: there is no such file or folder")
    stems = Counter(Path(path).stem for path in args.gates)
    for stem, count in stems.items():
        if count > 1:
            raise UserError(f"--gates: {count} files are called {stem}, and rows are known by name")
    for name in ("simpler", "budget_tokens", "select"):
        if getattr(args, name) and not args.gates:
            raise UserError(f"--{name.replace('_', '-')} goes with --gates")


def check_positions(args, model):
    """UserError if a prompt with its answer has more positions than the model was trained for."""
    most = model.config.max_positions
    needed = []
    for task in args.tasks:
        tokens = CHAT_TOKENS if task == "chat" else max(args.lengths)
        needed.append((tokens + ANSWER_TOKENS.get(task, 0), f"the task {task}"))
    for tokens, why in needed:
        if tokens > most:
            raise UserError(f"{why} needs {tokens:,} positions with the answer, {model.name} has "
                            f"{most:,}")


def main(argv=None):
    args = parse(argv)
    if args.merge:
        merge(args.merge, args.json)
        return 0
    model = load_model(args)
    check_positions(args, model)
    x = Comparison(model, args)
    say(f"{bench.machine(model.device)['machine']}, torch {torch.__version__}, {model.name} in "
        f"{str(model.dtype).removeprefix('torch.')}")
    for task in args.tasks:
        for tokens in x.lengths(task):
            x.compare(task, tokens)
    print_tables(x.results.shown)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
