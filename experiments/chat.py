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
    library     the source of Python's standard library

Small models fail at some of this with full attention already, so every row also has its difference
from full attention on the same cases. Rows are kept in --json as soon as they are measured: give
the same command again, and it goes on where it was stopped.
"""
import functools
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train                                                                    # noqa: E402
from common import UserError                                                    # noqa: E402
from experiments.policies import make_cache                                     # noqa: E402
from generate import prefill                                                    # noqa: E402
from tiny import tasks                                                          # noqa: E402

ASKED = ("needle", "needles", "values", "tracking", "words", "chat")    # tasks with answers
READ = ("prose", "code", "library")                                     # language modelling

# The longest answer, in tokens. Where several strings are expected, one sentence with four codes
# takes some 40 tokens. Much more would let a model that lists everything it saw be right.
ANSWER_TOKENS = dict(needle=32, needles=32, values=64, tracking=64, words=64, chat=32)


# ---------------------------------------------------------------------------------------- the cases

@dataclass
class Case:
    """A prompt in chat form, and what its answer should contain.

    policies.py takes it for a document: a body that is read first, and a question about it. Both
    are text in which the template's control tokens have secret names (generate.Text).
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
    """A Case of at most `tokens` tokens, and of nearly as many."""
    if task == "words":
        return most_frequent(haystack, tokens, text, rng)
    if task == "chat":
        return second_turn(haystack, tokens, text, rng, *rng.choice(PAGE))
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
    """(body, question) of a first user turn."""
    question = f"\n\n{question}"
    turn = text.insert(context + question, replies=0)
    start = turn.rindex(question)
    return turn[:start], turn[start:]


def stretch(haystack, tokens, text, rng):
    """A random stretch of a book, as a function: prose(size) is its first `size` tokens, or less.

    It ends with a sentence, if one ends in its last tenth, else with a word.
    """
    piece = haystack.cut(6 * tokens, rng)           # books have 4 to 5 characters a token
    offsets = text.tokenizer.encode(piece, add_special_tokens=False).offsets
    if len(offsets) < tokens:
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

COMMON, OTHERS = 3, 40      # words: so many are frequent, so many are not
COMMON_SHARE = 0.1          # of the list, for each of the frequent ones; the others: 0.0175


def most_frequent(haystack, tokens, text, rng):
    """A list of words of the book; the three that occur most often are asked for."""
    words = distinct_words(haystack, COMMON + OTHERS, rng)
    common, others = words[:COMMON], words[COMMON:]
    seed = rng.getrandbits(64)

    def one_turn(size):
        count = round(COMMON_SHARE * size)          # a word has a token at least
        listed = common * count
        listed += [others[n % OTHERS] for n in range(size - len(listed))]
        random.Random(seed).shuffle(listed)
        return split_turn(text, "Here is a list of words: " + " ".join(listed) + ".",
                          "Which three words occur most often in this list?")

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


PAGE = [
    ("What is the capital of France?", "Paris"),
]


def contained(answers, said):
    """The share of the expected strings that were said, in whatever case (RULER's score)."""
    said = said.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


# ------------------------------------------------------------------------------------------ measuring

def batches(model, items, length):
    """Parts of a list for one cache each: on a GPU some 131,072 tokens, 32 sequences at most."""
    tokens, most = (2**17, 32) if model.device.type == "cuda" else (2**13, 8)
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
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts],
                                             batch_first=True).to(model.device)     # (B, longest)
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
