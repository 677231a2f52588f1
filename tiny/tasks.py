"""Synthetic documents: what the bundled model was taught to do, and what its cache is tested on.

A document is a body (prose with something hidden in it) and questions with their answers. Everything comes from a seed
and a haystack, which may be any prose. The tasks:

    facts    "The code of Clara is 4821." scattered in the prose, with other people's codes beside it
    lists    "A friend of Clara is Thomas.", several of them for one person: all are asked for
    classes  a block of examples, "bekuro is a vomita.", somewhere in the prose: which class is bekuro?
    copy     a passage marked as such, to be repeated word for word
    again    a passage that comes back later, unannounced (no question; in training it teaches looking back)
    prose    the haystack as it is
"""
import bisect
import random
import re
from dataclasses import dataclass, field

END = "<|end|>"
NAMES = """Ada Agnes Albert Alfred Alice Amelia Amos Anna Arthur Basil Beatrice Bertha Bridget Caleb Cecil Charles Clara
Conrad Cora Cyril Daisy Daniel David Dinah Dora Edgar Edith Edmund Edward Eleanor Eliza Ella Emma Ernest Esther Ethel
Eva Felix Flora Frances Frank George Grace Hannah Harold Harriet Harry Helen Henry Herbert Hester Hilda Horace Hugh Ida
Irene Isaac Isabel Jacob James Jane Jasper Joan Joseph Julia Kate Laura Leonard Leah Lewis Lily Louisa Lucy Luke Mabel
Margaret Maria Mark Martha Martin Mary Matilda Maud Miriam Nancy Nathan Nell Nicholas Nora Oliver Oscar Owen Patrick
Paul Percy Peter Philip Phoebe Ralph Rebecca Richard Robert Roger Rosa Rose Ruth Samuel Sarah Silas Simon Sophia
Stephen Susan Sybil Thomas Timothy Ursula Victor Viola Walter Wilfred William Winifred""".split()
# All but the last are for the model itself, in the stages of make.py. "asked" is for gates: no passage in it comes back
# unannounced, which a gate cannot foresee but by keeping everything.
MIXES = {"all": {"facts": 0.25, "lists": 0.10, "classes": 0.15, "copy": 0.10, "again": 0.10, "prose": 0.30},
         "back": {"facts": 0.25, "lists": 0.05, "classes": 0.10, "copy": 0.15, "again": 0.40, "prose": 0.05},
         "copying": {"facts": 0.15, "lists": 0.10, "classes": 0.15, "copy": 0.25, "again": 0.25, "prose": 0.10},
         "passages": {"facts": 0.10, "lists": 0.20, "classes": 0.05, "copy": 0.45, "again": 0.15, "prose": 0.05},
         "asked": {"facts": 0.25, "lists": 0.15, "classes": 0.15, "copy": 0.30, "prose": 0.15}}


@dataclass
class Document:
    task: str
    body: str
    questions: list = field(default_factory=list)      # (question, answer) pairs of text; answers end with END

    def __post_init__(self):
        self.body = self.body.rstrip()                 # questions begin with an empty line: a clean seam for tokens

    @property
    def text(self):
        return self.body + "".join(question + answer for question, answer in self.questions)

    @property
    def spans(self):
        """(first, last + 1) characters of each answer in `text`."""
        found, at = [], len(self.body)
        for question, answer in self.questions:
            found.append((at + len(question), at + len(question) + len(answer)))
            at += len(question) + len(answer)
        return found


def correct(task, answer, said):
    """The share of an answer that was given, 0 to 1: all or nothing but for lists (members) and copy (words)."""
    answer, said = answer.removesuffix(END).strip(), said.removesuffix(END).strip()
    if task == "lists":
        wanted, got = (set(re.findall(r"[A-Z]\w+", s.partition(" are ")[2])) for s in (answer, said))
        return len(wanted & got) / max(len(wanted), len(got))
    if task == "copy":
        wanted, got = answer.split(), said.split()
        return sum(a == b for a, b in zip(wanted, got)) / len(wanted)
    return float(answer == said)


class Haystack:
    """Prose to hide things in: `cut` gives a stretch of it that begins and ends with a sentence."""

    def __init__(self, text):
        self.text = re.sub(r"[ \t]+", " ", text)
        # After a full stop, a space and before a capital: good enough a sentence for hiding things between two.
        self.starts = [m.end() for m in re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", self.text)]
        if len(self.starts) < 8:
            raise ValueError(f"a haystack needs at least 8 sentences, this one has {len(self.starts)}")

    def cut(self, chars, rng):
        """About `chars` characters; shorter only if the haystack is."""
        last = max(1, bisect.bisect_left(self.starts, len(self.text) - chars))
        first = self.starts[rng.randrange(last)]
        piece = self.text[first:first + chars]
        ends = [m.end() for m in re.finditer(r"[a-z]{2}[.!?] ", piece)]
        return piece[:ends[-1]] if ends and ends[-1] > chars // 2 else piece.rsplit(" ", 1)[0] + ". "


def scatter(prose, pieces, rng):
    """The prose with each piece at a sentence boundary of its own choosing, the order of the pieces kept."""
    seams = [0] + [m.end() for m in re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", prose)]
    at = sorted(rng.choice(seams) for _ in pieces)
    out, last = [], 0
    for seam, piece in zip(at, pieces):
        out += [prose[last:seam], piece]
        last = seam
    return "".join(out) + prose[last:]


def ending(haystack, rng):
    """How a body may end before its questions: with a sentence, a quotation, or anywhere. A model that has only ever
    been asked after a full stop takes a question after a closing quote for dialogue."""
    piece = haystack.cut(200, rng).replace("\n", " ").strip()
    return rng.choice(["", "", '"', "\n\n" + piece, f'\n\n"{piece}"', " " + piece.rsplit(" ", rng.randint(1, 9))[0]])


def made_up_word(rng, syllables):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def facts(haystack, chars, size, rng):
    """size questions about as many facts, up to twice as many facts in all."""
    people = rng.sample(NAMES, rng.randint(size, 2 * size))
    codes = {name: rng.randint(1000, 9999) for name in people}
    pieces = [f"The code of {name} is {codes[name]}. " for name in people]
    questions = [(f"\n\nWhat is the code of {n}?", f" The code of {n} is {codes[n]}.{END}") for n in people[:size]]
    rng.shuffle(pieces)
    rng.shuffle(questions)
    return Document("facts", scatter(haystack.cut(chars - sum(map(len, pieces)), rng), pieces, rng), questions)


def lists(haystack, chars, size, rng):
    """Several values of one key: two or three friends each of two to four people; in the order of the text."""
    names = rng.sample(NAMES, 16)
    friends = {names.pop(): [names.pop() for _ in range(rng.randint(2, 3))] for _ in range(min(4, size))}
    told = [(who, friend) for who, all_of in friends.items() for friend in all_of]
    rng.shuffle(told)
    pieces = [f"A friend of {who} is {friend}. " for who, friend in told]
    questions = []
    for who in friends:
        *most, last = [friend for w, friend in told if w == who]
        questions.append((f"\n\nWho are the friends of {who}?",
                          f" The friends of {who} are {', '.join(most)} and {last}.{END}"))
    return Document("lists", scatter(haystack.cut(chars - sum(map(len, pieces)), rng), pieces, rng), questions)


def classes(haystack, chars, size, rng):
    """Many-shot classification: a block of examples with a handful of labels, then words out of it."""
    count = round(5 * (size / 2) ** 1.6)                              # 5, 15, 46 examples for 2, 4, 8 questions
    labels = [made_up_word(rng, 3) for _ in range(rng.randint(2, 2 + size // 2))]
    words = list({made_up_word(rng, 3): None for _ in range(rng.randint(max(2, count // 2), count))})
    label = {word: rng.choice(labels) for word in words}
    block = "\n\n" + "".join(f"{word} is a {label[word]}.\n" for word in words) + "\n"
    questions = [(f"\n\nWhat is {word}?", f" {word} is a {label[word]}.{END}")
                 for word in rng.sample(words, min(size, len(words)))]
    return Document("classes", scatter(haystack.cut(chars - len(block), rng), [block], rng), questions)


def copy(haystack, chars, size, rng):
    """A passage of 30 to 120, 240 or 480 characters, to be repeated word for word."""
    passage = haystack.cut(rng.randint(30, 60 * size), rng).replace("\n", " ").strip()
    piece, answer = f"\n\nThe passage: {passage}\n\n", f" The passage: {passage}{END}"
    return Document("copy", scatter(haystack.cut(chars - 2 * len(piece), rng), [piece], rng),
                    [("\n\nWhat was the passage?", answer)])


def again(haystack, chars, size, rng):
    """A passage that comes back after other text; its words may be shuffled, and then looking back is the only way."""
    passage = haystack.cut(rng.randint(chars // 8, int(chars / 2.2)), rng)
    if rng.random() < 0.5:
        words = passage.split()
        passage = " ".join(rng.sample(words, len(words))) + " "
    return Document("again", passage + haystack.cut(max(40, chars - 2 * len(passage)), rng) + passage)


def prose(haystack, chars, size, rng):
    return Document("prose", haystack.cut(chars, rng))


MAKERS = {f.__name__: f for f in (facts, lists, classes, copy, again, prose)}


def make(task, haystack, tokens, encode, rng):
    """A document of at most `tokens` tokens, and as near to it as sentences allow. encode: text -> Encoding.

    Returns (document, ids, answer) where answer[t] is True for the tokens of an answer. A shorter cut is tried until
    the document fits: nothing is ever truncated, so each question's answer is in the text.
    """
    size = max(2, min(8, round(2 * (tokens / 256) ** 0.5)))           # 2, 4, 8 questions for 256, 1024, 4096 tokens
    for attempt in range(80):
        if attempt % 8 == 0:                                          # a new document, if one cannot be cut to fit
            chars, seed = int(3.5 * tokens), rng.getrandbits(64)
        document, end = MAKERS[task](haystack, chars, size, random.Random(seed)), random.Random(f"end {seed}")
        document.body += ending(haystack, end) if document.questions else ""
        encoding = encode(document.text)
        if len(encoding.ids) <= tokens:
            break
        chars = int(chars * min(0.98, (tokens - 12) / len(encoding.ids)))
    else:
        raise ValueError(f"no {task} document fits into {tokens} tokens")
    answer, spans = [False] * len(encoding.ids), iter(document.spans)
    span = next(spans, None)
    for t, (first, last) in enumerate(encoding.offsets):
        while span and first >= span[1]:
            span = next(spans, None)
        answer[t] = bool(span and first >= span[0] and last > first)
    return document, encoding.ids, answer


def pick(rng, mix="all"):
    """The name of a task, drawn by its weight in a mix."""
    mix = MIXES[mix]
    return rng.choices(list(mix), weights=list(mix.values()))[0]
