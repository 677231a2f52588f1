"""Synthetic documents: what the bundled model was taught to do, and what its cache is tested on.

A document is a body, prose with something hidden in it, and questions with their answers. All of it
comes from a seed and from a haystack, which may be any prose. The tasks:

    facts    needle retrieval: "The code of Clara is 4821." somewhere in the prose, and around it
             other people's codes as distractors
    lists    multi-value retrieval: "A friend of Clara is Thomas.", several of them for one person,
             and the question asks for all
    classes  many-shot classification: a block of examples, "bekuro is a vomita.", somewhere in the
             prose: what is bekuro?
    copy     copying: a passage marked as such, to be repeated word for word
    again    a passage that comes back later, unannounced (no question; in training it teaches the
             model to look back)
    prose    plain language modelling: the haystack as it is
"""
import bisect
import random
import re
from dataclasses import dataclass, field

END = "<|end|>"         # the end token, as text: answers end with it
NAMES = """Ada Agnes Albert Alfred Alice Amelia Amos Anna Arthur Basil Beatrice Bertha Bridget Caleb
Cecil Charles Clara Conrad Cora Cyril Daisy Daniel David Dinah Dora Edgar Edith Edmund Edward
Eleanor Eliza Ella Emma Ernest Esther Ethel Eva Felix Flora Frances Frank George Grace Hannah Harold
Harriet Harry Helen Henry Herbert Hester Hilda Horace Hugh Ida Irene Isaac Isabel Jacob James Jane
Jasper Joan Joseph Julia Kate Laura Leonard Leah Lewis Lily Louisa Lucy Luke Mabel Margaret Maria
Mark Martha Martin Mary Matilda Maud Miriam Nancy Nathan Nell Nicholas Nora Oliver Oscar Owen
Patrick Paul Percy Peter Philip Phoebe Ralph Rebecca Richard Robert Roger Rosa Rose Ruth Samuel
Sarah Silas Simon Sophia Stephen Susan Sybil Thomas Timothy Ursula Victor Viola Walter Wilfred
William Winifred""".split()

# Mixes of tasks, by weight. All but the last are for the model, in the stages of make.py. "asked"
# is for gates: in it no passage comes back unannounced, since a gate cannot foresee which passage
# will, and could only keep them all.
MIXES = {
    "all": {"facts": 0.25, "lists": 0.10, "classes": 0.15, "copy": 0.10, "again": 0.10,
            "prose": 0.30},
    "back": {"facts": 0.25, "lists": 0.05, "classes": 0.10, "copy": 0.15, "again": 0.40,
             "prose": 0.05},
    "copying": {"facts": 0.15, "lists": 0.10, "classes": 0.15, "copy": 0.25, "again": 0.25,
                "prose": 0.10},
    "passages": {"facts": 0.10, "lists": 0.20, "classes": 0.05, "copy": 0.45, "again": 0.15,
                 "prose": 0.05},
    "asked": {"facts": 0.25, "lists": 0.15, "classes": 0.15, "copy": 0.30, "prose": 0.15},
}


@dataclass
class Document:
    task: str
    body: str
    questions: list = field(default_factory=list)       # (question, answer) pairs of strings

    def __post_init__(self):
        # Questions begin with an empty line, so no token crosses from the body into a question.
        self.body = self.body.rstrip()

    @property
    def text(self):
        return self.body + "".join(question + answer for question, answer in self.questions)

    @property
    def spans(self):
        """(first, last + 1) characters of each answer in `text`."""
        spans = []
        end = len(self.body)
        for question, answer in self.questions:
            start = end + len(question)
            end = start + len(answer)
            spans.append((start, end))
        return spans


def correct(task, answer, given):
    """How much of the right answer was given, from 0 to 1.

    Lists count the members that are right, copies the words that are right and in their place. All
    other answers are right or wrong.
    """
    answer = answer.removesuffix(END).strip()
    given = given.removesuffix(END).strip()
    if task == "lists":
        wanted = names_after_are(answer)
        found = names_after_are(given)
        return len(wanted & found) / max(len(wanted), len(found))
    if task == "copy":
        wanted = answer.split()
        return sum(a == b for a, b in zip(wanted, given.split())) / len(wanted)
    return float(answer == given)


def names_after_are(answer):
    """{"Thomas", "Ida"} from "The friends of Clara are Thomas and Ida."."""
    return set(re.findall(r"[A-Z]\w+", answer.partition(" are ")[2]))


# ------------------------------------------------------------------------------------ the haystack

class Haystack:
    """Prose to hide things in."""

    def __init__(self, text):
        self.text = re.sub(r"[ \t]+", " ", text)
        # A sentence begins after a full stop and a space, with a capital. That is not always so,
        # but good enough to hide things between two sentences.
        boundaries = re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", self.text)
        self.starts = [boundary.end() for boundary in boundaries]
        if len(self.starts) < 8:
            raise ValueError("a haystack needs at least 8 sentences, this one has "
                             f"{len(self.starts)}")

    def cut(self, chars, rng):
        """About `chars` characters of it, in whole sentences; fewer only if it is shorter."""
        last = max(1, bisect.bisect_left(self.starts, len(self.text) - chars))
        start = self.starts[rng.randrange(last)]
        piece = self.text[start:start + chars]
        ends = [end.end() for end in re.finditer(r"[a-z]{2}[.!?] ", piece)]
        if ends and ends[-1] > chars // 2:
            return piece[:ends[-1]]
        return piece.rsplit(" ", 1)[0] + ". "           # a sentence of half the piece: cut it


def scatter(prose, pieces, rng):
    """The prose with each piece at a random sentence boundary; the pieces keep their order."""
    boundaries = re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", prose)
    seams = [0] + [boundary.end() for boundary in boundaries]
    places = sorted(rng.choice(seams) for _ in pieces)
    parts = []
    last = 0
    for place, piece in zip(places, pieces):
        parts += [prose[last:place], piece]
        last = place
    return "".join(parts) + prose[last:]


def ending(haystack, rng):
    """What a body ends with before its questions: a sentence, a quotation, or half a sentence.

    A model that was only ever asked after a full stop takes a question after a closing quotation
    mark for dialogue.
    """
    piece = haystack.cut(200, rng).replace("\n", " ").strip()
    return rng.choice(["", "", '"', "\n\n" + piece, f'\n\n"{piece}"',
                       " " + piece.rsplit(" ", rng.randint(1, 9))[0]])


def made_up_word(rng, syllables):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


# --------------------------------------------------------------------------------------- the tasks
# Each makes a Document of about `chars` characters; size says how much is hidden in it.

def facts(haystack, chars, size, rng):
    """`size` questions, and up to twice as many facts."""
    people = rng.sample(NAMES, rng.randint(size, 2 * size))
    codes = {name: rng.randint(1000, 9999) for name in people}
    pieces = [f"The code of {name} is {codes[name]}. " for name in people]
    questions = []
    for name in people[:size]:
        questions.append((f"\n\nWhat is the code of {name}?",
                          f" The code of {name} is {codes[name]}.{END}"))
    rng.shuffle(pieces)
    rng.shuffle(questions)
    prose = haystack.cut(chars - sum(map(len, pieces)), rng)
    return Document("facts", scatter(prose, pieces, rng), questions)


def lists(haystack, chars, size, rng):
    """Two or three friends of each of two to four people; asked for in the order of the text."""
    names = rng.sample(NAMES, 16)
    friends = {names.pop(): [names.pop() for _ in range(rng.randint(2, 3))]
               for _ in range(min(4, size))}
    pairs = [(person, friend) for person in friends for friend in friends[person]]
    rng.shuffle(pairs)
    pieces = [f"A friend of {person} is {friend}. " for person, friend in pairs]
    questions = []
    for person in friends:
        *most, last = [friend for other, friend in pairs if other == person]
        questions.append((f"\n\nWho are the friends of {person}?",
                          f" The friends of {person} are {', '.join(most)} and {last}.{END}"))
    prose = haystack.cut(chars - sum(map(len, pieces)), rng)
    return Document("lists", scatter(prose, pieces, rng), questions)


def classes(haystack, chars, size, rng):
    """A block of examples with a handful of labels; some of its words are asked for."""
    count = round(5 * (size / 2) ** 1.6)            # 5, 15, 46 examples for 2, 4, 8 questions
    labels = [made_up_word(rng, 3) for _ in range(rng.randint(2, 2 + size // 2))]
    count = rng.randint(max(2, count // 2), count)
    words = list({made_up_word(rng, 3): None for _ in range(count)})       # no word twice
    label = {word: rng.choice(labels) for word in words}
    block = "\n\n" + "".join(f"{word} is a {label[word]}.\n" for word in words) + "\n"
    questions = []
    for word in rng.sample(words, min(size, len(words))):
        questions.append((f"\n\nWhat is {word}?", f" {word} is a {label[word]}.{END}"))
    prose = haystack.cut(chars - len(block), rng)
    return Document("classes", scatter(prose, [block], rng), questions)


def copy(haystack, chars, size, rng):
    """A passage of at least 30 and at most 120, 240 or 480 characters, to be repeated."""
    passage = haystack.cut(rng.randint(30, 60 * size), rng).replace("\n", " ").strip()
    piece = f"\n\nThe passage: {passage}\n\n"
    questions = [("\n\nWhat was the passage?", f" The passage: {passage}{END}")]
    prose = haystack.cut(chars - 2 * len(piece), rng)
    return Document("copy", scatter(prose, [piece], rng), questions)


def again(haystack, chars, size, rng):
    """A passage that comes back after other text."""
    passage = haystack.cut(rng.randint(chars // 8, int(chars / 2.2)), rng)
    if rng.random() < 0.5:
        # Shuffled words cannot be guessed: the only way is to look back.
        words = passage.split()
        passage = " ".join(rng.sample(words, len(words))) + " "
    between = haystack.cut(max(40, chars - 2 * len(passage)), rng)
    return Document("again", passage + between + passage)


def prose(haystack, chars, size, rng):
    return Document("prose", haystack.cut(chars, rng))


MAKERS = {maker.__name__: maker for maker in (facts, lists, classes, copy, again, prose)}


def make(task, haystack, tokens, encode, rng):
    """A document of at most `tokens` tokens, and of nearly as many as sentences allow.

    encode: text -> an Encoding of the tokenizers library (ids, and offsets in the text).
    Returns (document, ids, in_answer); in_answer[t] is True where token t belongs to an answer.

    Nothing is ever truncated, so what is asked for is in the text: until the document fits, it is
    made again from the same seed in a shorter cut of the haystack.
    """
    size = max(2, min(8, round(2 * (tokens / 256) ** 0.5)))     # 2, 4, 8 for 256, 1024, 4096 tokens
    for attempt in range(80):
        if attempt % 8 == 0:                # some cannot be cut to fit: try another seed
            chars = int(3.5 * tokens)
            seed = rng.getrandbits(64)
        document = MAKERS[task](haystack, chars, size, random.Random(seed))
        if document.questions:
            document.body += ending(haystack, random.Random(f"end {seed}"))
        encoding = encode(document.text)
        if len(encoding.ids) <= tokens:
            return document, encoding.ids, mark_answers(document, encoding)
        chars = int(chars * min(0.98, (tokens - 12) / len(encoding.ids)))
    raise ValueError(f"no {task} document fits into {tokens} tokens")


def mark_answers(document, encoding):
    """For each token: does it belong to an answer?"""
    in_answer = [False] * len(encoding.ids)
    spans = iter(document.spans)
    span = next(spans, None)
    for t, (start, end) in enumerate(encoding.offsets):
        while span and start >= span[1]:
            span = next(spans, None)
        # A token without characters, like the begin token, belongs to nothing.
        in_answer[t] = bool(span and start >= span[0] and end > start)
    return in_answer


def pick(rng, mix="all"):
    """The name of a task, drawn by its weight in a mix."""
    weights = MIXES[mix]
    return rng.choices(list(weights), weights=list(weights.values()))[0]
