"""What a model can still do with the cache that its gates leave it.

    python experiments/quality.py --quick
        the bundled model and its gates beside full attention, in minutes on a CPU
    python experiments/quality.py --data BOOK
        more questions, about a text of yours, and more policies
    python experiments/quality.py --data BOOK --books BOOKS --item 1
        an experiment, 1 to 10, into .gates/quality-1.json
    python experiments/quality.py --prompts Q.jsonl
        the questions, for another engine to answer
    python experiments/quality.py --prompts Q.jsonl --score ANSWERS.jsonl
        the score of that engine's answers

The model prefills documents in which something is hidden, then answers questions by free greedy
decoding. Four tasks have answers (tiny/tasks.py makes them), the fifth is language modelling:

    facts     needle retrieval: "The code of Clara is 4821.", among other people's codes
    lists     multi-value retrieval: several friends of one person, all of them asked for
    classes   many-shot classification of made-up words
    copy      a passage to be repeated word for word
    prose     bits per byte of the text itself: lower is better

The experiments:

    1  lambda and tau: is tau = 0.1 on the frontier of quality against memory?
    2  the grace period: what does the sliding window bring?
    3  simpler policies (policies.py) that keep as many bytes as the gates
    4  every task by length, and a single fact by length and depth
    5  gates trained on one kind of text, tested on another
    6  the width of the gate, and the key before or after RoPE alone
    7  what each head keeps
    8  selection: tokens attended against right answers, with and without gates
    9  a budget: eviction by gates and by SnapKV, with and without admission
    10 a budget beside fixed lambda and tau of the same bytes

Experiments 1, 2, 3, 5, 6 and 10 train the gates they need. Trained gates and finished rows stay in
--work: give the same command again, and it goes on where it was stopped. Gates are trained on the
text --books, questions are asked about the text --data. Where one of them is missing, the model
writes a text itself.
"""
import functools
import hashlib
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
import train                                                                    # noqa: E402
from common import (HERE, Parser, UserError, check_writable, model_options,     # noqa: E402
                    progress, read_json, read_text, real, run_program, say, whole, write_text)
from experiments.policies import (SIMPLER, Limited, OracleAdmission,            # noqa: E402
                                  SinksAndWindow, make_cache, matched, rank_heads, uniform_random)
from files import fingerprint                                                # noqa: E402
from generate import decode, load_model, prefill                                # noqa: E402
from tiny import tasks                                                          # noqa: E402
from tokenizer import Text, TextStream                                          # noqa: E402
from wgkv import DualCache, Gates, RandomAdmission                              # noqa: E402

TASKS = ("facts", "lists", "classes", "copy", "prose")

# The settings of the experiments. Figures of other settings do not go into the same file.
LAMBDAS = (0.02, 0.08, 0.32, 1.28, 5.12)            # experiments 1 to 3
ONE_LAMBDA = 5.12                                   # experiments 5 and 6: keeps a tenth
TAUS = (0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6)       # experiment 1
LENGTHS = (512, 1024, 2048, 4096, 8192)             # experiment 4, in tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)                # experiment 4, as shares of a document
SELECTED = (4096, 2048, 1024, 512, 256, 192)        # experiment 8: tokens of a row
BUDGETS = (2048, 1024, 512, 384, 256)               # experiments 9 and 10: tokens a row on average
RISING_LAMBDAS = (0.32, 1.28, 5.12)                 # experiment 10
RISING_TAUS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)        # experiment 10

# How gates are trained here: for the bundled model with larger steps than train.py's, for a GPU.
SWEEP = replace(train.BUNDLED, seq_len=(4096,), tokens_per_step=32768, steps=300, lr=1e-3)

# --quick: questions per task, tokens per document, and tokens of the text that the model writes.
QUICK = dict(cases=24, length=1024, haystack_tokens=8192)


# ----------------------------------------------------------------------------------------- scores

def interval(values, bounded=True, sizes=None):
    """{"mean", "low", "high", "n"}: the mean of the values with its 95% confidence interval.

    If every value is right (1) or wrong (0), it is Wilson's interval, which has a width even if all
    are right; else the normal one. bounded: values lie from 0 to 1, and so must the interval.
    sizes: how many values, one after the other, come from the same document. They are not
    independent (a block of classes is kept or lost as a whole), so the documents count as the
    sample; "documents" says how many there are.
    """
    n = len(values)
    mean = statistics.mean(values)
    if sizes is None or len(sizes) < 2:     # of one document alone nothing better can be said
        sizes = [1] * n
    documents = len(sizes)
    variance = variance_of_mean(values, sizes)
    z = 1.96
    if bounded and set(values) <= {0, 1}:
        # So many independent values would vary as much: from one a document up to all of them.
        # Where all are right or all are wrong nothing varies, and we count the documents.
        independent = documents
        if 0 < mean < 1:
            independent = n
            if variance > 0:
                independent = min(n, max(documents, mean * (1 - mean) / variance))
        centre = (mean + z**2 / (2 * independent)) / (1 + z**2 / independent)
        spread = independent * mean * (1 - mean) + z**2 / 4
        half = z / (independent + z**2) * spread ** 0.5
    else:
        centre = mean
        half = z * variance ** 0.5
    low = centre - half
    high = centre + half
    if bounded:
        low = max(0.0, low)
        high = min(1.0, high)
    result = dict(mean=mean, low=low, high=high, n=n)
    if documents < n:
        result["documents"] = documents
    return result


def variance_of_mean(values, sizes):
    """The variance of the values' mean, if only values of different documents are independent.

    With a value a document it is stdev^2 / n. Else a document counts by the sum of its deviations:
    eight equal values are worth one.
    """
    if len(sizes) == 1:
        return math.inf             # nothing to compare it with
    mean = statistics.mean(values)
    total = 0.0
    start = 0
    for size in sizes:
        deviation = sum(value - mean for value in values[start:start + size])
        total += deviation ** 2
        start += size
    assert start == len(values), f"{start} values in documents, but there are {len(values)}"
    return total / len(values) ** 2 * len(sizes) / (len(sizes) - 1)


@torch.no_grad()
def score(model, text, policy, tests):
    """Measure an admission policy (None: full attention) on tests, {task: documents}.

    Returns {task: an `interval` of its scores, and in it "kept", the bytes held over those of a
    dense cache; "kept": the mean of these}. Prose adds two more: see `score_prose`.
    """
    if isinstance(policy, OracleAdmission):         # it decides by one question: a document each
        tests = {task: one_question_each(documents) for task, documents in tests.items()}
    result = {}
    total = sum(len(documents) for documents in tests.values())
    with progress(total, "scoring", "documents") as bar:
        for task, documents in tests.items():
            if task == "prose":
                result.update(score_prose(model, text, policy, documents))
                bar.update(len(documents))
            else:
                result[task] = score_answers(model, text, policy, documents, bar.update)
    kept = statistics.mean(result[task]["kept"] for task in tests)
    return dict(kept=kept, **result)


def one_question_each(documents):
    """A document for each question; documents without any (prose) as they are."""
    alone = [tasks.Document(d.task, d.body, [q]) for d in documents for q in d.questions]
    return alone or documents


def score_answers(model, text, policy, documents, report):
    """The interval of how right the answers to the documents' questions are, and what was kept.

    With a budget also "evictions_a_batch" and "evicted_a_document", tokens of all its rows. They
    count evictions while documents are read: each question is asked to a copy of the cache.
    """
    batch = 8
    if model.device.type == "cuda":                 # about 131,072 tokens at once
        longest = max(len(d.body) for d in documents) // 4          # 4 characters a token
        batch = max(1, min(32, 2**17 // longest))

    evicted = EvictionCount()

    def make_kv(group):
        evicted.end_batch()                         # the one before this one is done
        kv = make_cache(model, text, policy, group)
        if isinstance(policy, Limited):
            evicted.begin_batch(kv)
        return kv

    read = prefill
    if isinstance(policy, Limited) and policy.decoded:
        read = functools.partial(read_by_decoding, end=min(text.end))
    scores, kept = train.evaluate(model, text, make_kv, documents, batch, report, read)
    evicted.end_batch()
    sizes = [len(document.questions) for document in documents]
    result = dict(interval(scores, sizes=sizes), kept=kept, scores=scores, sizes=sizes)
    if isinstance(policy, Limited) and policy.tokens is not None:
        batches = math.ceil(len(documents) / batch)
        result.update(evictions_a_batch=evicted.evictions / batches, batch=batch,
                      evicted_a_document=evicted.tokens / len(documents))
    return result


class EvictionCount:
    """What the caches of all batches have evicted, in all: `evictions`, and `tokens` by them.

    A cache counts while its batch is read, so we read its counts when that is done. Then we let go
    of it: the caches of all batches would be more than the GPU holds.
    """

    def __init__(self):
        self.evictions = 0
        self.tokens = 0
        self.kv = None                              # of the batch that is being read

    def begin_batch(self, kv):
        self.kv = kv

    def end_batch(self):
        if self.kv is not None:
            self.evictions += self.kv.shared.num_evictions
            self.tokens += self.kv.shared.num_evicted
            self.kv = None


@torch.no_grad()
def read_by_decoding(model, kv, bodies, end):
    """Read texts token by token, as if the model had just written them, and then the token end."""
    prefill(model, kv, [body[:1] for body in bodies])
    longest = max(len(body) for body in bodies)
    columns = torch.tensor([body[1:] + [end] * (longest + 1 - len(body)) for body in bodies])
    columns = iter(columns.T.contiguous().to(model.device).unbind())    # longest of (B)
    hidden = torch.zeros(len(bodies), model.config.hidden_size, device=model.device,
                         dtype=model.dtype)
    for _ in decode(model, kv, hidden, longest, {end}, choose=lambda logits: next(columns)):
        pass


def minus(scores, others, bounded=True, sizes=None):
    """The interval of the paired differences of two lists of scores.

    bounded: scores lie from 0 to 1, and so differences from -1 to 1. sizes: as in `interval`.
    """
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    result = interval(differences, bounded=False, sizes=sizes)
    if bounded:
        if not any(differences):
            # The normal interval has no width here, as if we knew that no question ever comes out
            # differently. The rule of three: what was not seen in n documents may still happen, in
            # up to 3 / n of all documents (95%), and then moves the score by 1 at most.
            n = len(sizes or differences)
            result.update(low=-3 / n, high=3 / n)
        result.update(low=max(-1.0, result["low"]), high=min(1.0, result["high"]))
    return result


def score_prose(model, text, policy, documents):
    """Language modelling on plain passages, each in one call:

        prose      bits per byte of text
        loss       the hard distillation loss: mean squared difference of the last hidden states
                   from those of full attention
        admitted   the share of the keys outside the window that were admitted
    """
    bits, losses, kept, admitted = [], [], [], []
    for document in documents:
        ids = torch.tensor([text.encode(document.body)], device=model.device)       # (1, T)
        kv = make_cache(model, text, policy, [document])
        hidden = model(ids, kv)                                                     # (1, T, C)
        teacher = model(ids)
        losses.append((hidden.float() - teacher.float()).square().mean().item())

        # The logits of token t predict token t + 1. Cross-entropy is in nats; 1 bit is ln 2 nats.
        logits = model.logits(hidden)[0, :-1].float()                               # (T - 1, vocab)
        nats = F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_bytes = len(document.body.encode())
        bits.append(nats / math.log(2) / num_bytes)

        kept.append(kv.kept_bytes() / kv.dense_bytes())
        admitted.append(share_admitted(kv, ids.shape[1]))
    return dict(prose=dict(interval(bits, bounded=False), kept=statistics.mean(kept), scores=bits),
                loss=interval(losses, bounded=False),
                admitted=statistics.mean(admitted))


def share_admitted(kv, tokens):
    """The share of the keys outside the window that a cache has admitted; 1 for a dense cache."""
    if not isinstance(kv, DualCache):
        return 1.0
    outside = kv.L * kv.Hkv * max(1, tokens - kv.window)
    return kv.num_promoted() / outside


def single_fact(haystack, tokens, depth, encode, rng):
    """One fact in about `tokens` tokens of prose, and the question about it.

    depth: where the fact is, from 0 (the beginning of the text) to 1 (its end).
    """
    room = 48                                       # tokens of the fact, question and answer
    prose = tasks.make("prose", haystack, tokens - room, encode, rng)[0].body
    name = rng.choice(tasks.NAMES)
    code = rng.randint(1000, 9999)
    fact = f"The code of {name} is {code}."

    # The fact goes to the sentence boundary that is nearest to the depth.
    seams = [0] + [m.end() for m in re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", prose)]
    seam = min(seams, key=lambda at: abs(at - depth * len(prose)))
    body = f"{prose[:seam]}{fact} {prose[seam:]}"
    question = (f"\n\nWhat is the code of {name}?", f" {fact}{tasks.END}")
    return tasks.Document("fact", body, [question])


# ------------------------------------------------------------------------------------------- rows

class Results:
    """The rows of an experiment, and the file that keeps them.

    A row is written as soon as it is measured. The file also holds the settings that all its rows
    share, and is refused if they differ: figures of different settings must not stand side by side.
    """

    def __init__(self, path, settings, origin):
        self.path = path                # None: keep nothing
        self.settings = settings
        self.origin = origin            # machine, commit, command, date: they go into every new row
        self.rows = []
        self.shown = []
        if path and Path(path).exists():
            self.load()

    def load(self):
        file = read_json(self.path)
        rows, settings = file.get("rows"), file.get("settings")
        if not isinstance(rows, list) or not isinstance(settings, dict) or not all(
                isinstance(row, dict) and "settings" in row for row in rows):
            raise UserError(f"{self.path} holds no rows of an experiment: give another --json")
        for name, here in self.settings.items():
            there = settings.get(name)
            if there != here:
                raise UserError(f"{self.path} has rows of another run, {name} {there} there and "
                                f"{here} here: give the same options, or another --json")
        self.rows = rows

    def row(self, settings, measure):
        """The row with these settings: the finished one, or a new one of what measure() returns."""
        found = [row for row in self.rows if row["settings"] == settings]
        if found:
            [row] = found
        else:
            row = dict(settings=settings, **measure(), **self.origin)
            self.rows.append(row)
            if self.path:
                file = dict(settings=self.settings, rows=self.rows)
                write_text(self.path, json.dumps(file, indent=1) + "\n")
        if row not in self.shown:       # full attention is asked for again beside every policy
            self.shown.append(row)
            show(row)
        return row


def show(row):
    """Print a row: its settings, the share kept, each mean with its interval."""
    label = []
    for name, value in row["settings"].items():
        if name == "policy":
            label.append(value)
        elif name != "tasks":
            label.append(f"{name} {value}")
    line = f"{', '.join(label)}: kept {row['kept']:.1%}"

    full = row.get("full", {})
    for name, r in row.items():
        if isinstance(r, dict) and "mean" in r:
            line += f"; {name} {r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f}"
            line += f"; full {full[name]:.3f})" if name in full else ")"
            if "minus_full" in r:
                d = r["minus_full"]
                line += f", minus full {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
    print(line, flush=True)


def digest(*facts):
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------- experiment

class Experiment:
    """What all experiments need: documents to ask about, trained gates, and rows of results.

    Everything depends only on the options, documents and samples included. So a run that was
    interrupted, started again, measures what is missing and nothing else.
    """

    def __init__(self, item, model, args):
        self.model = model
        self.args = args
        self.text = Text(args.model)
        self.config = training_config(args, model)
        self.lambdas = args.lam or LAMBDAS
        self.lam = args.lam[0] if args.lam else ONE_LAMBDA

        path = args.json
        if item in ITEMS:
            Path(args.work).mkdir(parents=True, exist_ok=True)
            path = path or Path(args.work, f"quality-{item}.json")
        origin = bench.machine(model.device)
        origin["command"] = " ".join(["python", "experiments/quality.py", *sys.argv[1:]])
        origin.update(seed=args.seed, date=time.strftime("%Y-%m-%d"))
        self.results = Results(path, self.settings(item), origin)

    def settings(self, item):
        """All that the rows of a file have in common, as JSON has it."""
        args = self.args
        gates = None
        if args.gates or item in GIVEN_GATES:
            # The gates and not their file: calibrating it (train.py --calibrate) changes no row.
            given = self.given_gates()                  # a file that holds no gates is refused here
            gates = [given.identity(), given.window, given.tau]
        settings = dict(
            item=item, model=self.model.name, weights=fingerprint(self.model),
            dtype=str(self.model.dtype).removeprefix("torch."), seed=args.seed, cases=args.cases,
            length=args.length, train=asdict(self.config), data=identity(args.data),
            books=identity(args.books), gates=gates, tau=args.tau)
        return json.loads(json.dumps(settings))         # tuples become lists

    # ---- texts and documents

    @functools.cache
    def prose(self, name):
        """A text, by name: data, books, code (this repository's), own or own for training."""
        if name == "code":
            folders = (HERE, HERE / "tiny", HERE / "experiments")
            files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
            return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        if name == "books":
            return train.read_prose(self.args.books)
        if name == "data" and self.args.data:
            return train.read_prose(self.args.data)
        # The model writes two texts: questions never stand in the one that gates were trained on.
        seed = self.args.seed if name == "own for training" else self.args.seed + 1
        return train.generate_prose(self.model, self.text, self.config.haystack_tokens, seed)

    @functools.cache
    def haystack(self, name):
        source = dict(data=self.args.data, books=self.args.books).get(name)     # for the error
        return train.make_haystack(self.prose(name), source)

    @functools.cache
    def documents(self, task, length=None, text="data", depth=None):
        """At least --cases questions of a task (prose: an eighth as many passages)."""
        # Seeded by what is asked for: the same documents in every run and for every policy.
        rng = random.Random(f"{self.args.seed}/{text}/{task}/{length}/{depth}")
        length = length or self.args.length
        wanted = self.args.cases
        if task == "prose":
            wanted = max(4, wanted // 8)
        found, count = [], 0
        with progress(wanted, f"{task} to be asked", "questions") as bar:
            while count < wanted:
                document = self.make_document(task, self.haystack(text), length, depth, rng)
                found.append(document)
                count += len(document.questions) or 1
                bar.update(len(document.questions) or 1)
        return found

    def make_document(self, task, haystack, length, depth, rng):
        encode = self.text.tokenizer.encode
        try:
            if task == "fact":
                return single_fact(haystack, length, depth, encode, rng)
            return tasks.make(task, haystack, length, encode, rng)[0]
        except ValueError as e:
            raise UserError(f"{e}: raise --length") from None

    # ---- gates

    def given_gates(self):
        """The gates of --gates, or the model's own, with --tau."""
        gates = Gates.load(gates_file(self.args), self.model)
        if self.args.tau is not None:
            gates.tau = self.args.tau
        return gates

    def compared_gates(self):
        """[(settings, make)] of the gates to compare: those of --gates, or one for each lambda."""
        if self.args.gates:
            return [(dict(gates=Path(self.args.gates).name), self.given_gates)]
        return [(dict(lam=lam), functools.partial(self.gates, lam)) for lam in self.lambdas]

    def gates(self, lam, window=None, expansion=None, source=None, inputs="both"):
        """Gates trained with these settings: from --work, or else trained now and put there."""
        config = replace(self.config, lam=lam, window=window or self.config.window,
                         expansion=expansion or self.config.expansion)
        source = source or ("books" if self.args.books else "own")
        settings = self.results.settings
        facts = (settings["weights"], settings["dtype"], source, asdict(config))
        if source != "own":
            facts += tuple(settings["books"])
        name = (f"{source}-lam{config.lam:g}-W{config.window}-E{config.expansion:g}-{inputs}-"
                f"{digest(*facts)[:8]}.safetensors")
        path = Path(self.args.work, name.replace(" ", "-"))
        if not path.exists():
            say(f"training {path}")
            self.train_gates(path, config, source, inputs)
        return Gates.load(path, self.model)

    def train_gates(self, path, config, source, inputs):
        torch.manual_seed(config.seed)
        gates = Gates.for_model(self.model, window=config.window, tau=config.tau,
                                expansion=config.expansion)
        leave_out(gates, inputs)
        optimizer = torch.optim.AdamW(gates.parameters(), config.lr,
                                      weight_decay=config.weight_decay)
        micro_batches, _ = train.plan_micro_batches(self.model, gates, config)
        samples = train.Samples(self.draw(source), config)
        _, why = train.train(self.model, gates, optimizer, samples, config,
                             micro_batches=micro_batches)
        if why == "interrupted":
            raise KeyboardInterrupt
        if why:
            raise UserError(f"{path}: {why}")
        gates.eval().requires_grad_(False).save(path, self.model, config.lam,
                                                json.dumps(asdict(config)))

    @functools.cache
    def draw(self, source):
        """draw(rng, length) -> (ids, weights): what gates are trained on, for train.Samples.

        own: tasks hidden in the model's own writing; books: tasks hidden in --books; both: either,
        at random; plain books: --books with nothing hidden in them.
        """
        if source == "both":
            # Made here and not in the function: that runs in a worker process, without a GPU.
            either = [self.draw("own"), self.draw("books")]
            return lambda rng, length: rng.choice(either)(rng, length)
        if source == "plain books":
            documents = train.read_documents(self.args.books)
            config = replace(self.config, tasks="")
            return train.split_text(documents, self.text, config, self.args.books)[0]
        haystack = self.haystack("books" if source == "books" else "own for training")
        return train.task_samples(haystack, self.text.tokenizer.encode, self.config)

    # ---- measuring

    def measure(self, settings, make, names, also=None, **where):
        """The row of the policy make() on these tasks, beside full attention on the same documents.

        where: length, text and depth of the documents, if not the usual ones. also(policy) gives
        more to write into the row.
        """
        common = dict(tasks=[*names], **where)
        text = where.get("text")
        if text in ("code", "own"):
            # No option names these texts, and they change with our code: rows of an older version
            # of them must not stand beside new ones.
            common["digest"] = digest(self.prose(text))[:8]

        full = self.results.row(dict(policy="full attention", **common),
                                lambda: self.scores(None, names, where))
        return self.results.row(dict(settings, **common),
                                lambda: self.policy_scores(make, names, where, full, also))

    def scores(self, policy, names, where):
        tests = {task: self.documents(task, **where) for task in names}
        return score(self.model, self.text, policy, tests)

    def policy_scores(self, make, names, where, full, also):
        """What is measured of the policy make(); full: the row of full attention."""
        policy = make()
        result = self.scores(policy, names, where)
        for name in names:
            # Scores of single questions stay with full attention alone, for these differences.
            own = result[name].pop("scores")
            result[name].pop("sizes", None)
            if "scores" in full[name]:
                result[name]["minus_full"] = minus(own, full[name]["scores"],
                                                   bounded=name != "prose",
                                                   sizes=full[name].get("sizes"))
        result["full"] = {name: full[name]["mean"] for name in names}
        if also is not None:
            result.update(also(policy))
        return result


def training_config(args, model):
    """How gates are trained: the model's preset, at lengths that it was trained for."""
    preset = SWEEP if train.is_bundled(args) else train.PAPER
    positions = model.config.max_positions
    seq_len = tuple(n for n in preset.seq_len if n <= positions) or (positions,)
    config = replace(preset, seq_len=seq_len, tasks="asked", seed=args.seed)
    if args.train_steps:
        config = replace(config, steps=args.train_steps)
    if args.quick:
        config = replace(config, haystack_tokens=QUICK["haystack_tokens"])
    return config


def gates_file(args):
    path = Path(args.gates or Path(args.model, "gates.safetensors"))
    if not path.exists():
        raise UserError(f"{path} is missing: give gates with --gates, or train some with train.py")
    return path


def identity(path):
    """[name, digest of the text] of a file or folder: it may move, but not change."""
    return path and [Path(path).name, digest(train.read_prose(path))]


def leave_out(gates, inputs):
    """Make gates see the key only "before" or only "after" RoPE; "both" changes nothing.

    The norm of the other input and its columns of W1 become zero. Each is a factor in the other's
    gradient, so training never moves either of them.
    """
    D = gates.shape[2]
    with torch.no_grad():
        for gate in gates.layers:
            if inputs == "before":
                gate.post_norm.zero_()
                gate.w1[..., D:].zero_()
            if inputs == "after":
                gate.pre_norm.zero_()
                gate.w1[..., :D].zero_()


# ------------------------------------------------------------------------------------ experiments

def with_tau(make, tau):
    """The gates make() with another threshold."""
    gates = make()
    gates.tau = tau
    return gates


def sparsity(x):
    """1. lambda times tau: is tau = 0.1 on the frontier of loss, or of facts, against memory?"""
    for settings, make in x.compared_gates():
        for tau in TAUS:
            x.measure(dict(policy="gates", **settings, tau=tau),
                      functools.partial(with_tau, make, tau), ("facts", "prose"))


def grace_period(x):
    """2. W = 1 beside the usual window, with gates trained for each."""
    usual = x.config.window
    points = [(usual, lam) for lam in x.lambdas] + [(1, lam) for lam in x.lambdas]
    # Without a window gates keep more: two larger lambdas, so that the curves overlap.
    points += [(1, 4 * x.lambdas[-1]), (1, 16 * x.lambdas[-1])]
    for window, lam in points:
        x.measure(dict(policy="gates", W=window, lam=lam),
                  functools.partial(x.gates, lam, window), ("facts", "prose"))


def simpler_policies(x):
    """3. Each policy of SIMPLER with as many bytes as the gates keep."""
    for settings, make in x.compared_gates():
        kept = x.measure(dict(policy="gates", **settings), make, TASKS)["kept"]
        for name, family in SIMPLER.items():
            x.measure(dict(policy=name, beside=settings),
                      functools.partial(same_bytes, x, family, make, kept), TASKS,
                      also=lambda policy: dict(W=policy.window))


def same_bytes(x, family, make_gates, kept):
    """The policy of a family in SIMPLER that keeps `kept` of the bytes, in a few documents."""
    window = make_gates().window

    @functools.cache
    def ranking():
        # By other documents than those of the test.
        some = []
        for task in ("facts", "copy"):
            rng = random.Random(f"{x.args.seed}/heads/{task}")
            for _ in range(4):
                some.append(x.make_document(task, x.haystack("data"), x.args.length, None, rng))
        return rank_heads(x.model, x.text, some, window)

    def make(share):
        return family(window, share, x.args.length, ranking)

    one_of_each = [x.documents(task)[0] for task in TASKS]
    return matched(make, kept, x.model, x.text, one_of_each)


def by_task(x):
    """4. A single fact by length and depth, and every task by length."""
    for length in LENGTHS:
        for depth in DEPTHS:
            x.measure(dict(policy="gates"), x.given_gates, ("fact",), length=length, depth=depth)
        for task in TASKS:
            x.measure(dict(policy="gates"), x.given_gates, (task,), length=length)


def by_domain(x):
    """5. Gates trained on one kind of text, tested on another."""
    for source in ("own", "books", "both", "plain books"):
        for text in ("data", "code", "own"):
            make = functools.partial(x.gates, x.lam, source=source)
            x.measure(dict(policy="gates", source=source), make, ("facts", "prose"), text=text)


def by_width(x):
    """6. The gate's hidden width, and the key only before or only after RoPE."""
    usual = x.config.expansion
    gates = [(0.5, "both"), (1.0, "both"), (2.0, "both"),
             (usual, "both"), (usual, "before"), (usual, "after")]
    for width, inputs in gates:
        x.measure(dict(policy="gates", width=width, inputs=inputs),
                  functools.partial(x.gates, x.lam, expansion=width, inputs=inputs),
                  ("facts", "prose"), also=lambda gates: cost_of(gates, x.model))


@torch.no_grad()
def cost_of(gates, model):
    """Parameters in use (those left out are 0), and the time of a layer's gates for 4,096 keys."""
    _, Hkv, D = gates.shape
    k = torch.randn(1, Hkv, 4096, D, device=model.device, dtype=model.dtype)

    def run():
        gates.gate(0, k, k, None)

    if model.device.type == "cuda":
        [times] = bench.device_times(run)
    else:
        times = bench.in_turn(7, model.device, gate=run)["gate"]
    parameters = sum(int((p != 0).sum()) for p in gates.parameters())
    return dict(parameters=parameters, gate_ms=1e3 * statistics.median(times))


def by_head(x):
    """7. The share of tiny/example.txt that each head admits, and what the extreme heads keep."""
    row = x.results.row(dict(policy="gates", text="tiny/example.txt"),
                        lambda: heads_of(x.model, x.text, x.given_gates()))
    for head in row["heads"]:
        often = ", ".join(f"{piece!r} {kept} of {seen}" for piece, kept, seen in head["kept"][:8])
        print(f"layer {head['layer']}, head {head['head']} ({head['which']} admitting) admits "
              f"{head['share']:.1%}: {often}\n    {head['excerpt']!r}")


def heads_of(model, text, gates):
    """{"kept", "map": the share that each head admits, (L, Hkv), "heads": six of the heads}.

    A head has its share, the tokens it keeps most often (text, times kept, times seen), and a
    stretch of the text around the first fact, with _ for each token that is not kept.
    """
    story = (HERE / "tiny" / "example.txt").read_text(encoding="utf-8")
    ids = text.encode(story)
    kv = DualCache(model, gates)
    prefill(model, kv, [ids])
    admitted = kv.admitted()                                    # (L, Hkv, S)
    shares = admitted.float().mean(dim=-1)                      # (L, Hkv)

    stream = TextStream(text)
    pieces = [stream.push(token) for token in ids]
    seen = Counter(pieces)
    first_fact = len(text.encode(story[:story.index("The code of")]))
    start = max(0, first_fact - 20)

    # Heads that admit nothing have nothing to show.
    order = [divmod(n, kv.Hkv) for n in shares.flatten().argsort(descending=True).tolist()]
    order = [(layer, head) for layer, head in order if shares[layer, head] > 0]
    chosen = [("most", *at) for at in order[:3]] + [("least", *at) for at in order[-3:]]
    heads = []
    for which, layer, head in chosen:
        mask = admitted[layer, head].tolist()
        kept = Counter(piece for piece, is_kept in zip(pieces, mask) if is_kept)
        shown = zip(pieces[start:start + 80], mask[start:start + 80])
        heads.append(dict(
            which=which, layer=layer, head=head, share=shares[layer, head].item(),
            excerpt="".join(piece if is_kept else "_" for piece, is_kept in shown),
            kept=[(piece, count, seen[piece]) for piece, count in kept.most_common(40)]))
    return dict(kept=kv.kept_bytes() / kv.dense_bytes(), map=shares.tolist(), heads=heads)


def limited(x, gated, **limits):
    """The gates at hand under some limits, or without them everything, with the same window."""
    admission = x.given_gates()
    if not gated:
        window = admission.window
        admission = RandomAdmission(1.0)
        admission.window = window
    return Limited(admission, **limits)


def selection(x):
    """8. Tokens attended in decode: selection alone (Quest), and from what gates leave."""
    names = ("facts", "lists", "classes")
    for tokens in SELECTED:
        for policy, gated in (("selection alone", False), ("gates + selection", True)):
            make = functools.partial(limited, x, gated, select=tokens)
            x.measure(dict(policy=policy, tokens=tokens), make, names)
    x.measure(dict(policy="gates"), x.given_gates, names)


EVICTORS = {"oldest first": (False, "gate"),        # all gates are 1: attention sinks and a window
            "SnapKV": (False, "snapkv"), "gates + SnapKV": (True, "snapkv"),
            "gates + gate": (True, "gate")}


def by_budget(x):
    """9. A budget of tokens held, for long prompts and for long answers."""
    for decoded, names in ((False, ("facts", "lists", "classes")), (True, ("facts", "classes"))):
        for tokens in BUDGETS:
            for policy, (gated, evict_by) in EVICTORS.items():
                make = functools.partial(limited, x, gated, tokens=tokens, evict_by=evict_by,
                                         decoded=decoded)
                x.measure(dict(policy=policy, tokens=tokens, decoded=decoded), make, names)


def rising_tau(x):
    """10. A budget is a tau that rises: is it as good as the best fixed lambda and tau?"""
    names = ("facts", "classes")
    for lam in x.args.lam or RISING_LAMBDAS:
        trained = functools.partial(x.gates, lam)
        for tau in RISING_TAUS:
            x.measure(dict(policy="fixed tau", lam=lam, tau=tau),
                      functools.partial(with_tau, trained, tau), names)
        for tokens in BUDGETS[1:]:
            x.measure(dict(policy="budget", lam=lam, tokens=tokens),
                      functools.partial(with_budget, trained, tokens), names)


def with_budget(make, tokens):
    """The gates make() in a cache with a budget."""
    return Limited(make(), tokens)


ITEMS = {1: sparsity, 2: grace_period, 3: simpler_policies, 4: by_task, 5: by_domain, 6: by_width,
         7: by_head, 8: selection, 9: by_budget, 10: rising_tau}
GIVEN_GATES = (4, 7, 8, 9, "summary")   # these measure given gates, the others train their own
MUST_TRAIN = (2, 5, 6, 10)              # these compare trainings: --gates does not go with them


def summary(x):
    """Without --item: the gates at hand beside full attention and the simplest policies."""
    gates = x.given_gates()
    kept = x.measure(dict(policy="gates"), lambda: gates, TASKS)["kept"]
    x.measure(dict(policy="sliding window"), lambda: SinksAndWindow(gates.window, sinks=0), TASKS)
    if x.args.quick:
        return
    x.measure(dict(policy="16 sinks + window"), lambda: SinksAndWindow(gates.window), TASKS)

    def same_share():
        one_of_each = [x.documents(task)[0] for task in TASKS]
        make = functools.partial(uniform_random, gates.window)
        return matched(make, kept, x.model, x.text, one_of_each)

    x.measure(dict(policy="uniform random, same share"), same_share, TASKS)


# -------------------------------------------------------------------------------- another engine

def write_prompts(x, path):
    """The questions as JSON lines: id, task, prompt and the expected answer."""
    lines = []
    for task in TASKS[:-1]:
        for n, document in enumerate(x.documents(task)):
            for m, (question, answer) in enumerate(document.questions):
                row = dict(id=f"{task}/{n}/{m}", task=task, prompt=document.body + question,
                           answer=answer.removesuffix(tasks.END).strip())
                lines.append(json.dumps(row) + "\n")
    write_text(path, "".join(lines))
    say(f"{path}: {len(lines)} prompts")


def read_lines(path, *names):
    """{id: object} of a .jsonl file whose objects all have these fields (and id), as text."""
    found = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fine = all(isinstance(row[name], str) for name in ("id", *names))
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise UserError(f"{path}, line {number}: no JSON object with id, {', '.join(names)} "
                            "as text")
        if row["id"] in found:
            raise UserError(f"{path}, line {number}: {row['id']} was there before")
        found[row["id"]] = row
    return found


def score_file(prompts_path, answers_path):
    """Score another engine's answers as ours are scored: up to the end mark, if there is one."""
    prompts = read_lines(prompts_path, "task", "prompt", "answer")
    answers = read_lines(answers_path, "answer")
    for name in prompts:
        if name not in answers:
            raise UserError(f"{answers_path} has no answer to {name}")
    for name in answers:
        if name not in prompts:
            raise UserError(f"{prompts_path} has no prompt {name}")

    scores = {}
    for name, prompt in prompts.items():
        said = answers[name]["answer"].partition(tasks.END)[0]
        right = tasks.correct(prompt["task"], prompt["answer"], said)
        scores.setdefault(prompt["task"], []).append(right)
    for task, values in scores.items():
        r = interval(values)
        print(f"{task:10}{r['mean']:8.1%}   ({r['low']:.1%} to {r['high']:.1%}, {r['n']} answers)")


# ---------------------------------------------------------------------------------------- program

def parse(argv):
    parser = Parser(description=__doc__)
    model_options(parser)
    group = parser.add_argument_group("what to measure (default: the gates beside simple policies)")
    group.add_argument("--item", type=int, nargs="+", action="extend", default=[], choices=ITEMS,
                       metavar="N", help="these experiments, 1 to 10")
    group.add_argument("--quick", action="store_true",
                       help=f"fewer policies, {QUICK['cases']} questions a task, documents of "
                            f"{QUICK['length']:,} tokens")
    group.add_argument("--prompts", metavar="FILE.jsonl",
                       help="write the questions to this file (with --score: read them from it)")
    group.add_argument("--score", metavar="FILE.jsonl",
                       help="score answers to --prompts: lines with id and answer")

    group = parser.add_argument_group("questions")
    group.add_argument("--data", metavar="TEXT", help="file or folder: a text that is new to the "
                       "model, to hide the tasks in (default: the model writes one)")
    group.add_argument("--cases", type=whole(2), metavar="N",
                       help="questions per task (default: 256)")
    group.add_argument("--length", type=whole(128), metavar="N",
                       help="tokens per document (default: 4096)")

    group = parser.add_argument_group("gates")
    group.add_argument("--gates", metavar="FILE",
                       help="gates to measure (default: the model's own)")
    group.add_argument("--tau", type=real(0, 1), help="instead of the gates' own threshold")
    group.add_argument("--books", metavar="TEXT", help="file or folder: a text to train gates on "
                       "in experiments 1, 2, 3, 5, 6 and 10 (default: the model writes one)")
    lambdas = " ".join(str(lam) for lam in LAMBDAS)
    rising = " ".join(str(lam) for lam in RISING_LAMBDAS)
    group.add_argument("--lam", type=real(0), nargs="+", metavar="X",
                       help=f"lambdas of experiments 1 to 3 (default: {lambdas}) and 10 (default: "
                            f"{rising}); 5 and 6 take the first one (default: {ONE_LAMBDA})")
    group.add_argument("--train-steps", type=whole(1), metavar="N",
                       help=f"steps per training (default: {SWEEP.steps} for the bundled model)")

    group = parser.add_argument_group("output")
    group.add_argument("--work", metavar="FOLDER", default=".gates",
                       help="trained gates and finished experiments (default: .gates)")
    group.add_argument("--json", metavar="FILE", help="where the figures go (default: nowhere; "
                       "those of an experiment into quality-N.json in --work)")
    args = parser.parse_args(argv)
    check(args)
    defaults = QUICK if args.quick else dict(cases=256, length=4096)
    args.cases = args.cases or defaults["cases"]
    args.length = args.length or defaults["length"]
    return args


def check(args):
    """UserError for options that clash or name what is not there, before anything slow."""
    modes = [f"--{name}" for name in ("item", "quick", "prompts") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"{modes[0]} and {modes[1]} do not go together")
    if args.score and not args.prompts:
        raise UserError("--score needs --prompts too: the file with the questions")
    if args.json and args.prompts:
        raise UserError("--json is for scores, --prompts measures nothing: they do not go together")
    if args.json and len(args.item) > 1:
        raise UserError("--json is one file: it goes with one --item")
    for item in args.item:
        if args.gates and item in MUST_TRAIN:
            raise UserError(f"experiment {item} trains its own gates: --gates does not go with it")
    if 5 in args.item and not (args.books and args.data):
        raise UserError("experiment 5 needs --books, to train on, and another text in --data")

    check_paths(args, [(name, getattr(args, name)) for name in ("data", "books", "gates")])
    if args.prompts and not args.score:
        check_writable(args.prompts)


def check_paths(args, inputs):
    """UserError for inputs (option, path or None) that are not there, or outputs that cannot be."""
    for name, path in inputs:
        if path is not None and not Path(path).exists():
            raise UserError(f"--{name} {path}: there is no such file or folder")
    if Path(args.work).is_file():
        raise UserError(f"--work {args.work} is a file, it should be a folder")
    if args.json:
        check_writable(args.json)


def main(argv=None):
    args = parse(argv)
    if args.score:
        score_file(args.prompts, args.score)
        return 0
    model = load_model(args)
    say(f"{bench.machine(model.device)['machine']}, torch {torch.__version__}, {model.name} in "
        f"{str(model.dtype).removeprefix('torch.')}")
    if args.prompts:
        write_prompts(Experiment("prompts", model, args), args.prompts)
    elif args.item:
        for item in args.item:
            say(f"experiment {ITEMS[item].__doc__}")
            ITEMS[item](Experiment(item, model, args))
    else:
        summary(Experiment("summary", model, args))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
