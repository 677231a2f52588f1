"""Train write gates for a frozen model, by distillation from the model itself.

The teacher is the model with full attention. The student has the same weights, but its attention
adds log g to the scores of all keys outside the window (`wgkv.SoftAttention`), so a key whose gate
g is near 0 fades away there. Only the gates learn:

    loss = distillation loss + lambda * sparsity loss

    distillation loss    mean squared error between the student's final hidden states and the
                         teacher's; tokens that answer a question can weigh more than others
    sparsity loss        a stand-in for the share of a dense cache that is kept
                         (`wgkv.sparsity_loss`)

A gate closes where nobody misses its key. Lambda says how hard it tries: larger keeps less. (AdamW,
linear warmup, cosine decay.)

What --data is matters. A gate that reads only novels learns to let numbers and names go: nobody
repeats them there. On 2,048 tokens, gates trained on novels alone lost 72 points of needle recall.
With one byte of source code to five of novels, and as much kept, they lost 21
(experiments/README.md). So give it text of all kinds that the model will read, and some in which
details come back.

And let train.py ask: --tasks all --answer-weight 10 hides facts, lists, classifications and
passages (tiny/tasks.py) in the text and asks for them at its end, where the tokens of answers weigh
ten times. With as many bytes, SmolLM2's gates then lost half as many needles, or a quarter where
they keep little; prose cost them some thousandths of a nat.

Without --data, the model writes its own training text: prose, in which tiny/tasks.py hides facts,
lists, many-shot classifications and passages, and asks for them.

What is random in sample n depends on the seed and n alone. So a run can be resumed after any step,
and its samples can be split over any number of processes: the gates come out the same, to rounding.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# Before torch, which takes seconds to import: common installs the hook that turns Ctrl-C into one
# line.
from common import (DTYPES, HERE, Parser, UserError, check_writable, free_bytes, model_options,
                    process_group, progress, quoted, rank_and_processes, read_text, reading, real,
                    replacing, run_program, say, torchrun_processes, whole)

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from files import LEVELS, fingerprint, load_official, write_quantiles
from generate import GateLog, decode, load_model, prefill, sampler
from model import model_files, open_tensors
from tiny import tasks
from tokenizer import Text
from wgkv import DenseCache, DualCache, Gates, P, RandomAdmission, SoftAttention, sparsity_loss

EXAMPLES = """examples:
  python train.py                               the bundled model: no data, minutes on a laptop
  python train.py --data books/ --model FOLDER  another model, with the paper's settings
  python train.py --data books/ --model FOLDER --tasks all --answer-weight 10
                                                the same, and it hides tasks in the text: best
  python train.py ... --resume                  continue an interrupted run, with its options
  torchrun --nproc-per-node 4 train.py --data books/ --model FOLDER --tokens-per-step 131072
                                                on four GPUs
  python train.py --convert official.pt --model FOLDER
                                                convert the authors' gates, no training
  python train.py --calibrate gates.safetensors --model FOLDER --data TEXT
                                                what generate.py --keep needs, into any gate file

Beside the gates OUT, a run writes OUT.log.jsonl, one line a step and the validation last. Until it
is complete, it keeps OUT.resume, from which --resume continues; without --resume, no training
begins over it."""


# ---------------------------------------------------------------------------- settings and schedule

@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training. By default the paper's: 7,500 samples, 65 million tokens."""
    lam: float = 0.16                   # lambda, the weight of the sparsity loss
    window: int = 256                   # W: so many recent tokens are always visible
    tau: float = 0.1                    # a token is admitted if its gate is at least this
    expansion: float = 4.0              # hidden width of a gate, in head dims
    seq_len: tuple = (4096, 8192, 16384, 32768)     # tokens a sample, see `schedule`
    tokens_per_step: int = 4096         # a step takes whole samples until it has so many
    steps: int = 7500
    lr: float = 1e-3                    # the peak learning rate
    warmup: float = 0.1                 # share of the steps in which the learning rate rises
    weight_decay: float = 0.01
    answer_weight: float = 1.0          # weight of an answer's token in the distillation loss
    haystack_tokens: int = 65536        # how much the model writes, if there is no --data
    tasks: str = ""                     # hide tasks in --data: the name of a mix in tiny/tasks.py
    chat: bool = False                  # put each sample into the model's chat template
    seed: int = 0


PAPER = TrainConfig()
# For a laptop. Lambda is not comparable between models: the distillation loss of the bundled one is
# larger, since answers weigh 30 times. (tiny/README.md says how its own gates were trained.)
BUNDLED = TrainConfig(lam=5.12, window=128, seq_len=(1024,), tokens_per_step=2048, steps=240,
                      lr=2e-3, answer_weight=30.0)


def schedule(config):
    """[(tokens a sample, number of the first sample, how many samples)], one entry for each step.

    A step has samples of one length, as many as reach --tokens-per-step. Each length gets about
    the same number of tokens in all: twice the length, half as many samples. Which step has which
    length is random. With the paper's settings: 4,000, 2,000, 1,000 and 500 steps of one sample of
    4K, 8K, 16K and 32K tokens, 16.4 million tokens of each, 65.5 million in all.
    """
    samples_per_step = {n: math.ceil(config.tokens_per_step / n) for n in config.seq_len}

    # A step of length n has n * samples tokens. So that each length gets as many tokens, its steps
    # are in proportion to the reciprocal. From cumulative shares: rounding cannot lose or add a
    # step.
    shares = list(accumulate(1 / (n * samples_per_step[n]) for n in config.seq_len))
    ends = [round(config.steps * share / shares[-1]) for share in shares]
    length_of_step = []
    for n, start, end in zip(config.seq_len, [0, *ends], ends):
        length_of_step += [n] * (end - start)
    random.Random(f"{config.seed}/lengths").shuffle(length_of_step)

    steps = []
    first = 0
    for n in length_of_step:
        steps.append((n, first, samples_per_step[n]))
        first += samples_per_step[n]
    return steps


def learning_rate(config, step):
    """The learning rate of step 0, 1, ...: a linear warmup, then a cosine down to 0."""
    warmup = int(config.warmup * config.steps)
    if step < warmup:
        return config.lr * ((step + 1) / warmup)
    decayed = (step - warmup) / (config.steps - warmup)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * decayed))


# ------------------------------------------------------------------------------- text to learn from

def read_jsonl(path):
    """The "text" of each line of a .jsonl file."""
    texts = []
    # Not splitlines(): that would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(read_text(path, most=None).split("\n"), 1):
        if line.strip():
            with reading(f"--data {path}, line {number}", 'read as {"text": "..."}'):
                text = json.loads(line)["text"]
                text.encode()       # fails for half a surrogate pair, which JSON can write
                texts.append(text)
    return texts


def read_documents(path):
    """The documents of a text file, of a .jsonl file, or of all of both in a folder."""
    files = [Path(path)]
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*")
                       if file.suffix in (".txt", ".jsonl") and file.is_file())
    documents = []
    for file in files:
        if file.suffix == ".jsonl":
            documents += read_jsonl(file)
        else:
            documents.append(read_text(file, most=None))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"--data {path}: no text found; it should be a text file, a .jsonl file, "
                        "or a folder of .txt and .jsonl files")
    return documents


def read_prose(path):
    """All documents as one text."""
    return "\n\n".join(read_documents(path))


def write(model, text, kv, hidden, steps, choose=None, report=lambda tokens: None):
    """Decode up to `steps` tokens for each sequence of a cache; returns their ids."""
    written = [[] for _ in range(kv.B)]
    for ids in decode(model, kv, hidden, steps, text.end, choose):
        for sequence, token in zip(written, ids):
            if token is not None:               # None: this sequence has ended
                sequence.append(token)
                report(1)
    return written


def generate_prose(model, text, num_tokens, seed, batch=32):
    """At least `num_tokens` tokens of prose that the model writes."""
    choose = sampler(1.0, 0.95, seed, model.device)
    start = text.begin or [min(text.end, default=0)]
    length = min(512, model.config.max_positions)
    passages = []
    with progress(num_tokens, "the model writes prose", "tokens") as bar:
        while sum(map(len, passages)) < num_tokens:
            kv = DenseCache(model, batch)
            hidden = prefill(model, kv, [start] * batch)
            passages += write(model, text, kv, hidden, length, choose, bar.update)
    return "\n\n".join(text.decode(ids) for ids in passages)


def shared_prose(model, text, config):
    """The prose that the first process's model writes, for all processes.

    Sampling may differ between two GPUs, and then the samples would, too.
    """
    prose = [None]
    if rank_and_processes()[0] == 0:
        prose = [generate_prose(model, text, config.haystack_tokens, config.seed)]
    if dist.is_initialized():
        dist.broadcast_object_list(prose)
    return prose[0]


def make_haystack(prose, source):
    """A tasks.Haystack of this prose; source names it in the error."""
    try:
        return tasks.Haystack(prose)
    except ValueError as e:
        raise UserError(f"{source or 'what the model writes'} is no prose to hide tasks in: "
                        f"{e}") from None


def make_task(task, haystack, length, encode, rng):
    """tasks.make: (document, ids, which of them belong to an answer)."""
    try:
        return tasks.make(task, haystack, length, encode, rng)
    except ValueError as e:                 # a tokenizer that needs many tokens for a word
        raise UserError(f"{e}: raise --seq-len") from None


# --------------------------------------------------------------------------------- training samples
# A sample is a pair (ids, weights) of (T,) tensors. `text_samples` and `task_samples` return a
# function (rng, length) -> sample, and `Samples` gives it the right random generator.

def text_samples(documents, head):
    """Samples of plain text: `head`, then a stretch of one document. All tokens weigh 1.

    documents: int tensors of ids. Every stretch of the right length has the same probability,
    whichever document it is in. Documents are never joined; those that are too short are skipped.
    If all are (held-out ones can be), a sample is the whole of the longest.
    """
    longest = max(len(document) for document in documents)

    def sample_text(rng, length):
        size = min(length - len(head), longest)
        stretches = [max(0, len(document) - size + 1) for document in documents]
        [document] = rng.choices(documents, stretches)
        start = rng.randrange(len(document) - size + 1)
        ids = torch.cat((torch.tensor(head, dtype=document.dtype), document[start:start + size]))
        return ids, torch.ones(len(ids))

    return sample_text


def task_samples(haystack, encode, config):
    """Samples of tiny/tasks.py: a task hidden in the haystack, whose answers can weigh more."""
    def sample_task(rng, length):
        task = tasks.pick(rng, config.tasks or "asked")
        _, ids, in_answer = make_task(task, haystack, length, encode, rng)
        weights = torch.where(torch.tensor(in_answer), config.answer_weight, 1.0)
        return torch.tensor(ids), weights

    return sample_task


INSTRUCTION = "Please analyze and summarize the following text:\n\n"
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"


def split_text(documents, text, config, source):
    """(samples to train on, held-out samples) of documents, a list of str.

    With --chat, a sample begins as the chat template does, up to where the user's text begins. As
    in the paper, it leaves off what the template puts after the text.
    """
    head, encoded = encode_documents(documents, text, config)
    encoded.sort(key=len)

    shortest = min(config.seq_len) - len(head)
    longest = max(config.seq_len) - len(head)
    if len(encoded[-1]) < longest:
        raise UserError(f"--data {source}: the longest document has {len(encoded[-1]):,} tokens, "
                        f"fewer than the {longest:,} that --seq-len {max(config.seq_len)} asks "
                        "for: lower it, or give longer texts")
    encoded = [document for document in encoded if len(document) >= shortest]
    training, held_out = hold_out(encoded, shortest, longest)
    if not held_out:
        say(f"--data {source}: too short to hold a part out: validation uses the training text")
        held_out = training

    say(f"documents to train on: {len(training):,}, of {sum(map(len, training)):,} tokens")
    return text_samples(training, head), text_samples(held_out, head)


def encode_documents(documents, text, config):
    """(ids that a sample begins with, the ids of each document)."""
    head = text.begin
    if config.chat:
        turn = text.chat([dict(role="user", content=INSTRUCTION + PLACEHOLDER)])
        head = text.encode(turn.partition(PLACEHOLDER)[0], control=True)
    encoded = []
    with progress(len(documents), "tokenizing", "documents") as bar:
        for document in documents:
            encoded.append(torch.tensor(text.encode(document, begin=False), dtype=torch.int32))
            bar.update()
    return head, encoded


def hold_out(documents, shortest, longest):
    """(training, held out): every 20th of some documents, or the end of the only one.

    documents: tensors, sorted by length. The last one stays for training, because there may be no
    other that is long enough for the longest samples.
    """
    *training, last = documents
    if training:
        held_out = training[::20]
        del training[::20]
        return [*training, last], held_out
    # There is only one. Its end is held out: a twentieth, but at least one of the shortest samples.
    # What is before it must still have room for the longest.
    size = min(len(last) - longest, max(shortest, len(last) // 20))
    if size < shortest:
        return [last], []
    return [last[:-size]], [last[-size:]]


def make_samples(source, documents, config, text):
    """(samples to train on, samples to validate on). source: the --data of the documents, if any.

    Tasks are validated in the same prose as they are trained in; the tasks themselves are new.
    """
    if source and not config.tasks:
        return split_text(documents, text, config, source)
    haystack = make_haystack("\n\n".join(documents), source)
    samples = task_samples(haystack, text.tokenizer.encode, config)
    return samples, samples


class Samples(Dataset):
    """samples[step]: the samples of a step, as a list; of several processes, this one's part."""

    def __init__(self, make_sample, config):
        self.make_sample = make_sample
        self.seed = config.seed
        self.schedule = schedule(config)
        self.rank, self.world_size = rank_and_processes()

    def __getitem__(self, step):
        length, first, count = self.schedule[step]
        mine = range(first + self.rank, first + count, self.world_size)
        return [self.make_sample(random.Random(f"{self.seed}/{n}"), length) for n in mine]


# ----------------------------------------------------------------------------------------- the loss

class Losses(NamedTuple):
    """The losses of a micro-batch, each a mean over its samples."""
    distill: torch.Tensor       # with soft gates: what is trained
    hard_distill: float         # with gates of 0 or 1, as at inference; NaN unless asked for
    sparsity: torch.Tensor
    gates: list                 # the gates of each sample, (L, Hkv, T)


def distillation_loss(student, teacher, weights):
    """MSE of final hidden states (B, T, hidden_size); weights (B, T) sum to 1 in each sample."""
    errors = (student.float() - teacher.float()).square().mean(dim=-1)                  # (B, T)
    return (errors * weights).sum(dim=1).mean()


# What a layer keeps of its forward pass. The backward pass computes the rest again (checkpointing).
EVERYTHING = "everything"
ATTENTION = "attention"         # its input and the output of attention, which takes longest
INPUT = "input"


def distill(model, gates, samples, keep=EVERYTHING, with_hard=False):
    """The Losses of some samples. keep: what the student's layers keep for the backward pass.

    Samples are padded on the right. Attention is causal, so no token sees padding, and in the
    losses padding has no weight.
    """
    device = model.device
    ids = pad_sequence([ids for ids, _ in samples], batch_first=True).to(device).long()  # (B, T)
    weights = pad_sequence([weights for _, weights in samples], batch_first=True)
    weights = weights.to(device).float()                                                # (B, T)
    weights = weights / weights.sum(dim=1, keepdim=True)

    hard_distill = math.nan
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            teacher = model(ids)                                            # (B, T, hidden_size)
        attention = SoftAttention(gates, device, keep_outputs=keep == ATTENTION)
        student = model(ids, attention, checkpoint=keep != EVERYTHING)
        soft_distill = distillation_loss(student, teacher, weights)
        if with_hard:                                                       # costs another pass
            with torch.no_grad():
                student = model(ids, SoftAttention(gates, device, hard=True))
                hard_distill = distillation_loss(student, teacher, weights).item()

    g = torch.stack([attention.g[layer] for layer in sorted(attention.g)], dim=1)  # (B, L, Hkv, T)
    g = [gates_of_one[..., :len(ids)] for gates_of_one, (ids, _) in zip(g, samples)]
    sparsity = torch.stack([sparsity_loss(gates_of_one, gates.window) for gates_of_one in g]).mean()
    return Losses(soft_distill, hard_distill, sparsity, g)


# ------------------------------------------------------------------------------------------- memory

MICRO_BATCH_TOKENS = 32768      # on a GPU: enough to keep it busy


def training_bytes(model, gates, num_tokens, keep):
    """About what a micro-batch takes beside the weights, in bytes. It errs on the high side.

    A layer that keeps everything keeps its residual streams, q, k, v and the MLP, and fp32
    activations of its gates. Else there is all of this for one layer at a time, the one that is
    computed again.
    """
    c = model.config
    on_gpu = model.device.type == "cuda"
    size = 2 if on_gpu else model.dtype.itemsize                            # autocast to bf16
    numbers = 2 * c.hidden_size + 3 * c.intermediate_size
    numbers += 2 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    # In head dims, and in fp32: a gate's key three times, and its hidden units before and after
    # GELU. (On a CPU twice that: its libraries take buffers of their own.)
    gate = 2 * gates.expansion + 3 if on_gpu else 4 * gates.expansion + 8
    layer = size * numbers + 4 * c.num_kv_heads * c.head_dim * gate
    kept = c.num_layers * layer
    if keep != EVERYTHING:
        inputs = 2 * c.hidden_size * model.dtype.itemsize       # the residual stream and its update
        outputs = size * c.num_heads * c.head_dim if keep == ATTENTION else 0
        kept = c.num_layers * (inputs + outputs) + layer
    # PyTorch's soft attention holds scores of 256 queries, five times in fp32.
    scores = 0 if on_gpu else 5 * 4 * c.num_heads * 256
    # For each parameter of the gates: gradient, a copy for all-reduce, two moments.
    state = 4 * 4 * sum(p.numel() for p in gates.parameters())
    # `layer` once more: the gradients of the layer that the backward pass is in.
    return state + int(num_tokens * (kept + layer + scores))


def plan_micro_batches(model, gates, config):
    """({length: (samples per micro-batch, what layers keep)}, the memory estimate as a line).

    A step's samples go through the model in micro-batches whose gradients add up. Not to keep
    everything costs one more forward pass. UserError if not even one sample of the longest fits.
    """
    if model.device.type == "cuda":
        torch.cuda.empty_cache()            # torch's own cache would count as taken
    free = free_bytes(model.device) or math.inf     # only Linux says it of a CPU's memory
    plan = {length: pick_micro_batch(model, gates, length, free) for length in config.seq_len}

    longest = max(config.seq_len)
    _, keep = plan[longest]
    needed = training_bytes(model, gates, longest, keep)
    has = f"{model.device} has {free / 2**30:.2f} GiB free"
    if needed > free:
        raise UserError(f"--seq-len {longest} needs about {needed / 2**30:.2f} GiB beside the "
                        f"weights, {has}: lower --seq-len, or try --dtype bfloat16")
    if free == math.inf:
        has = f"how much {model.device} has free is not known"
    note = {EVERYTHING: "", ATTENTION: " with checkpointed layers (but not their attention)",
            INPUT: " with checkpointed layers"}[keep]
    return plan, (f"memory: a sample of {longest:,} tokens takes about {needed / 2**30:.2f} GiB"
                  f"{note}; {has}")


def pick_micro_batch(model, gates, length, free):
    """(samples per micro-batch, what layers keep) for samples of this length: fastest first."""
    if model.device.type == "cuda":
        most = max(1, MICRO_BATCH_TOKENS // length)
        choices = [(count, keep) for keep in (EVERYTHING, ATTENTION, INPUT) for count in (most, 1)]
    else:                   # it gains nothing from more samples, and keeps no outputs of attention
        choices = [(1, EVERYTHING), (1, INPUT)]
    for count, keep in choices:
        if training_bytes(model, gates, count * length, keep) <= 0.8 * free:
            return count, keep
    return choices[-1]                      # it may still fit: 0.8 is a margin


# -------------------------------------------------------------------------------- the training loop

LOGGED = ("distill_loss", "hard_distill_loss", "sparsity_loss", "admitted")     # means of a step


def train(model, gates, optimizer, samples, config, done=0, micro_batches=None, log=None, save=None,
          save_every=50):
    """Take the steps after `done`. Returns (steps done, None or the reason why there are no more).

    samples: a `Samples`. micro_batches: see `plan_micro_batches`. log(figures) is called after each
    step, save(steps done) after every `save_every` steps and after the last.
    """
    micro_batches = micro_batches or {}
    tokens = [length * count for length, _, count in samples.schedule]
    hard = math.nan                         # the last hard distillation loss, for the status
    with (finish_the_step() as signals,
          progress(sum(tokens[done:]), "training", "tokens", delay=0) as bar):
        started = time.perf_counter()
        batches = load_batches(samples, range(done, config.steps), model.device)
        for step, batch in enumerate(batches, done):
            length, _, num_samples = samples.schedule[step]
            last = step + 1 == config.steps
            with_hard = step % 25 == 0 or last      # rarely: it costs another forward pass
            micro_batch = micro_batches.get(length, (1, EVERYTHING))
            sums = add_gradients(model, gates, config, batch, num_samples, micro_batch, with_hard)
            figures, num_tokens, stop = reduce_step(gates, config, sums, bool(signals))
            # Before the update: the gates stay those of the last good step.
            if not math.isfinite(figures["loss"] + figures["grad_norm"]):
                return step, f"step {step + 1}: the loss or its gradient is not finite"
            update(optimizer, learning_rate(config, step))

            # What is not measured is null in the log; the status shows the last that was.
            seconds = time.perf_counter() - started
            if with_hard:
                hard = figures["hard_distill_loss"]
            else:
                figures["hard_distill_loss"] = None
            if log:
                log(dict(step=step + 1, **figures, seq_len=length, seconds=seconds,
                         tokens_per_s=num_tokens / seconds))
            report_step(bar, step, config.steps, figures, hard)
            bar.update(tokens[step])
            if save and (stop or last or (step + 1) % save_every == 0):
                save(step + 1)
            if stop:
                return step + 1, "interrupted"
            started = time.perf_counter()   # a save is no part of the next step's time
    return config.steps, None


def load_batches(samples, steps, device):
    """Iterates over the samples of these steps. On a GPU, workers make them ahead of it."""
    workers = num_workers(device)
    # batch_size None: samples[step] is a whole step already.
    # fork: workers share the tokenized text and the functions that cut samples from it. Other ways
    # to start a process (Python 3.14's default is one) pickle both, and a closure cannot be
    # pickled. Workers do not use the GPU, which a forked process may not.
    return DataLoader(samples, batch_size=None, sampler=steps, num_workers=workers,
                      worker_init_fn=ignore_signals,
                      multiprocessing_context="fork" if workers else None)


def reduce_step(gates, config, sums, stop):
    """(figures of the step, its tokens, does any process want to stop?), over all processes.

    Their gradients are summed as well, so all take the same update. And because `stop` is summed,
    all of them stop after the same step.
    """
    gradients = [p.grad for p in gates.parameters()]
    totals = all_reduce(gradients, dict(sums, stop=stop))
    figures = {name: totals[name] for name in LOGGED}
    figures["loss"] = totals["distill_loss"] + config.lam * totals["sparsity_loss"]
    figures["grad_norm"] = torch.nn.utils.get_total_norm(gradients).item()
    return figures, totals["tokens"], totals["stop"] > 0


def update(optimizer, lr):
    """One step of AdamW at this learning rate; the next gradients start at zero."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def report_step(bar, step, steps, figures, hard):
    """Show where the training stands: beside the bar, or as a line where there is no terminal."""
    status = (f"step {step + 1}/{steps}, distill loss {figures['distill_loss']:.4f}, "
              f"hard {hard:.4f}, admitted {figures['admitted']:.1%}")
    bar.set_postfix_str(status, refresh=False)
    # Without a terminal there is no bar: ten lines in all show that the run is alive.
    if bar.disable and (step + 1) * 10 // steps > step * 10 // steps:
        say(f"training: {status}")


def add_gradients(model, gates, config, batch, num_samples, micro_batch, with_hard):
    """Add the gradients of a step's batch to the gates; returns sums for the step's figures.

    batch: this process's samples of the step, which has num_samples in all. The loss of a step is
    the mean over all of them, so each micro-batch counts by its share.
    """
    size, keep = micro_batch
    sums = {**dict.fromkeys(LOGGED, 0.0), "tokens": 0}
    for start in range(0, len(batch), size):
        samples = batch[start:start + size]
        check_vocabulary(model, samples)
        losses = distill(model, gates, samples, keep, with_hard)
        loss = losses.distill + config.lam * losses.sparsity
        (loss * len(samples) / num_samples).backward()

        admitted = torch.stack([(g >= gates.tau).float().mean() for g in losses.gates]).mean()
        means = dict(distill_loss=losses.distill.item(), hard_distill_loss=losses.hard_distill,
                     sparsity_loss=losses.sparsity.item(), admitted=admitted.item())
        for name, mean in means.items():
            sums[name] += mean * len(samples) / num_samples
        sums["tokens"] += sum(len(ids) for ids, _ in samples)
    return sums


def check_vocabulary(model, samples):
    """UserError if the tokenizer is another model's: on a GPU, such ids end the whole process."""
    largest = max(int(ids.max()) for ids, _ in samples)
    if largest >= model.config.vocab_size:
        raise UserError(f"the tokenizer gives the id {largest:,}, but the model has a vocabulary "
                        f"of {model.config.vocab_size:,}: are both of one model?")


@contextlib.contextmanager
def finish_the_step():
    """A list that gets the signal when Ctrl-C or SIGTERM (as clusters send it) asks us to stop.

    The loop looks into it after each step, because in the middle of an update the gates are a mix
    of two steps. A second Ctrl-C interrupts at once. A second SIGTERM does not, because some
    clusters send it twice.
    """
    signals = []

    def ask_to_stop(number, frame):
        signals.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask_to_stop)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def num_workers(device):
    """Processes that make samples: a GPU waits for a single one; a CPU has enough to do."""
    if device.type != "cuda":
        return 0
    _, processes = rank_and_processes()
    return max(0, min(12, (os.cpu_count() or 1) // processes - 1))


def ignore_signals(worker):
    """For workers: the process that trains decides when to stop, and needs them until then.

    A terminal sends Ctrl-C, and many clusters SIGTERM, to all processes of a group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# -------------------------------------------------------------------------------- several processes

def all_reduce(gradients, sums):
    """Sum gradients, in place, and a dict of numbers over the processes, in a single exchange."""
    if not dist.is_initialized():
        return dict(sums)
    numbers = torch.tensor([*sums.values()], dtype=torch.float32, device=gradients[0].device)
    tensors = [*gradients, numbers]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))
    return dict(zip(sums, numbers.tolist()))


# ------------------------------------------------------------------------------- the files of a run

MOMENTS = ("exp_avg", "exp_avg_sq")         # AdamW's


class RunFiles:
    """OUT.resume and OUT.log.jsonl, which a training writes on its way.

    OUT.resume is a safetensors file, so that nothing in it can run: the gates, AdamW's moments of
    them (NAME.exp_avg, NAME.exp_avg_sq), and as metadata the steps done and the run's settings.
    """

    def __init__(self, out, gates, optimizer, settings):
        self.out = out
        self.resume_path = f"{out}.resume"
        self.log_path = f"{out}.log.jsonl"
        self.gates = gates
        self.optimizer = optimizer
        self.settings = settings

    def save(self, done):
        """Write OUT.resume after so many steps."""
        tensors = {}
        for name, p in self.gates.named_parameters():
            tensors[name] = p.detach()
            for moment in MOMENTS:
                tensors[f"{name}.{moment}"] = self.optimizer.state[p][moment]
        metadata = dict(done=str(done), settings=json.dumps(self.settings))
        with replacing(self.resume_path) as part:
            save_file(tensors, part, metadata)

    @torch.no_grad()
    def load(self):
        """Fill gates and optimizer from OUT.resume; returns the steps done.

        UserError if it is the state of another run, or of none.
        """
        path = self.resume_path
        with reading(path, "read as the state of a run"):
            file = open_tensors(path)
            metadata = file.metadata() or {}
            saved = json.loads(metadata["settings"])
            differing = [f"{key} {quoted(saved[key])} there, {quoted(value)} here"
                         for key, value in self.settings.items() if saved[key] != value]
            if differing:
                raise UserError(f"{path} is of another run: {', '.join(differing)}; give the same, "
                                "or another --out")
            done = int(metadata["done"])
            for name, p in self.gates.named_parameters():
                p.copy_(read_like(file, name, p))
                state = self.optimizer.state[p] = dict(step=torch.tensor(float(done)))
                for moment in MOMENTS:
                    saved_moment = read_like(file, f"{name}.{moment}", p)
                    state[moment] = saved_moment.to(p.device, copy=True)
        return done

    @contextlib.contextmanager
    def locked_log(self, done):
        """Begin the log, and keep other trainings out: two would spoil each other's files.

        A resumed run drops the lines after step `done`: it writes them again. The system ends a
        lock together with its process, so a killed run leaves none behind.
        """
        with open(self.log_path, "a+", encoding="utf-8") as file:
            lock(file, self.out)
            file.seek(0)
            for _ in range(done):
                file.readline()
            file.truncate(file.tell())
            yield

    def log(self, figures):
        """Append a line to the log."""
        with reading(self.log_path, "written"), open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def read_like(file, name, p):
    """The tensor of this name in a safetensors file, which must have the shape of p."""
    tensor = file.get_tensor(name)
    if tensor.shape != p.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(p.shape)}")
    return tensor


def lock(file, out):
    """UserError if another process has locked this file of OUT."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training is writing {out}: wait for it, or give another "
                        "--out") from None
    except (ImportError, OSError):
        pass                                # Windows and some network file systems have no locks


# ------------------------------------------------------------------------ validation and evaluation

@torch.no_grad()
def validate(model, gates, make_sample, config):
    """Losses and gates on about 16 samples that were not trained on, as a dict for the log.

    admitted_by_head: the share that each head admits, one list of Hkv for each layer.
    gate_histogram: the share of gates in each tenth of the range 0 to 1.
    """
    sample_lengths = config.seq_len * max(1, 16 // len(config.seq_len))
    soft = []
    hard = []
    heads = []
    tenths = []
    with progress(len(sample_lengths), "validation", "samples") as bar:
        for n, length in enumerate(sample_lengths):
            sample = make_sample(random.Random(f"{config.seed}/validation/{n}"), length)
            losses = distill(model, gates, [sample], with_hard=True)
            [g] = losses.gates                                                  # (L, Hkv, T)
            soft.append(losses.distill.item())
            hard.append(losses.hard_distill)
            heads.append((g >= gates.tau).float().mean(dim=-1).cpu())           # (L, Hkv)
            tenths.append(torch.histc(g.float(), 10, 0, 1).cpu() / g.numel())   # (10,)
            bar.update()

    heads = torch.stack(heads).mean(dim=0)
    tenths = torch.stack(tenths).mean(dim=0)
    result = dict(samples=len(sample_lengths), distill_loss=sum(soft) / len(soft),
                  hard_distill_loss=sum(hard) / len(hard), admitted=heads.mean().item(),
                  admitted_by_head=heads.tolist(), gate_histogram=tenths.tolist())
    say(f"validation: distill loss {result['distill_loss']:.4f}, "
        f"hard {result['hard_distill_loss']:.4f}, admitted {result['admitted']:.1%} "
        f"(a head {heads.min():.1%} to {heads.max():.1%}); gates in tenths of 0 to 1: "
        + " ".join(f"{share:.0%}" for share in tenths.tolist()))
    return result


CALIBRATION_TOKENS = 32768      # of all samples, unless four of them have more
LONGEST = 32768                 # tokens of a sample, unless the training had longer ones


def measure_quantiles(model, gates, make_sample, shortest, longest, seed):
    """{length: the quantiles of opening gates} for texts of some lengths; see files.LEVELS.

    A gate depends on what came before it alone, so a few long samples are measured, and the gates
    of a shorter text are the first ones of a long one. Samples of `longest` tokens, of half as many
    if no text is that long, and so on; lengths from `shortest` on, two for each doubling.

    A key of an upper layer depends on what the layers below admitted, so its gate depends on the
    tau of the run. We measure twice: at the gates' own tau, and at one that opens about half of all
    pages. (For the bundled gates, the first alone keeps 49.2% where 50% were asked for.)
    `blend_quantiles` makes one list of both.
    """
    # 0.75: with another tokenizer than the bundled one, documents of tiny/tasks.py are that short.
    while longest > shortest and len(make_sample(random.Random(seed), longest)[0]) < 0.75 * longest:
        longest = max(shortest, longest // 2)
    samples = []
    for n in range(max(4, CALIBRATION_TOKENS // longest)):
        rng = random.Random(f"{seed}/calibration/{n}")
        samples.append(make_sample(rng, longest)[0].tolist())
    doublings = math.log2(longest / shortest)
    cuts = [round(shortest * 2 ** (n / 2)) for n in range(math.ceil(2 * doublings))] + [longest]

    at_own = opening_gates(model, gates, samples, cuts, gates.tau)
    half = at_own[longest].quantile(0.5).item()
    at_half = opening_gates(model, gates, samples, cuts, half)
    return {cut: blend_quantiles(at_own[cut], gates.tau, at_half[cut], half) for cut in cuts}


def blend_quantiles(g_a, tau_a, g_b, tau_b):
    """The quantiles at LEVELS of a text's opening gates, out of two measurements, as a list.

    g_a: the opening gates when the text was read at tau_a; g_b, at tau_b. Each is right where its
    own tau is: at the share of pages that this tau opens. Between the two shares we go from one to
    the other in proportion.
    """
    levels = torch.tensor(LEVELS)                                           # (65,)
    # With the quantile of level x as tau, the gates above it open: a share of 1 - x.
    share = 1 - levels
    share_a = (g_a >= tau_a).float().mean()
    share_b = (g_b >= tau_b).float().mean()
    weight_b = (share - share_a) / (share_b - share_a)
    weight_b = weight_b.nan_to_num(0.0).clamp(0, 1)     # NaN: both shares are the same

    # In logarithms, because gates span many powers of ten.
    log_a = g_a.quantile(levels).clamp(1e-30, 1).log()
    log_b = g_b.quantile(levels).clamp(1e-30, 1).log()
    blended = log_a.lerp(log_b, weight_b).exp()                             # (65,)

    # Two rising curves may fall where they are blended, but quantiles cannot.
    blended = blended.cummax(dim=0).values.clamp(max=1)
    return [float(f"{g:.6g}") for g in blended.tolist()]


@torch.no_grad()
def opening_gates(model, gates, samples, cuts, tau):
    """{length: the opening gates of all samples cut to it}, for the lengths in cuts, at this tau.

    samples: lists of ids. In a row, promoted tokens 1, 65, 129, ... each open a page. So of its
    gates in falling order every 64th counts; and only gates of tokens that have left the window.
    """
    opening = {length: [] for length in cuts}
    with progress(sum(map(len, samples)), "calibration", "tokens") as bar:
        for ids in samples:
            log = GateLog(gates)
            kv = DualCache(model, log, window=gates.window, tau=tau)
            prefill(model, kv, [ids], advance=bar.update)
            g = log.gates()                                                 # (L, Hkv, S)
            for length in cuts:
                left = g[..., :max(0, min(length, len(ids)) - gates.window)]
                in_order = left.sort(dim=-1, descending=True).values
                # Those of rank 1, 65, 129, ...: a page is opened if tau is at most its gate.
                opening[length].append(in_order[..., ::P].flatten())
    return {length: torch.cat(parts) for length, parts in opening.items()}


def evaluate(model, text, make_kv, documents, batch=8, report=lambda documents: None,
             read=prefill):
    """Greedy answers to the questions of documents.

    Returns ([score of each answer, 0 to 1], share of a dense cache that is kept after the bodies).
    make_kv(documents of a batch) makes an empty cache. Each body is read once, by
    read(model, kv, bodies); every question then continues from a copy of its cache.
    """
    scores = []
    kept = 0
    dense = 0
    for start in range(0, len(documents), batch):
        group = documents[start:start + batch]
        kv = make_kv(group)
        read(model, kv, [text.encode(document.body) for document in group])
        kept += kv.kept_bytes()
        dense += kv.dense_bytes()
        # The n-th questions of all documents are a batch; a document with fewer repeats one.
        scores_of = [[] for _ in group]
        for n in range(max(len(document.questions) for document in group)):
            asked = [document.questions[n % len(document.questions)] for document in group]
            answers = answer(model, text, kv.clone(), asked)
            for i, (document, given) in enumerate(zip(group, answers)):
                if n < len(document.questions):
                    right_answer = asked[i][1]
                    scores_of[i].append(tasks.correct(document.task, right_answer, given))
        # In the order of documents and their questions, whatever the batch is.
        for own in scores_of:
            scores += own
        report(len(group))
    return scores, kept / dense


def answer(model, text, kv, asked):
    """The model's answers to asked, a (question, right answer) for each sequence of a cache."""
    hidden = prefill(model, kv, [text.encode(question, begin=False) for question, _ in asked])
    # As long as the right answers, whose last token is the end token: control=True.
    longest = max(len(text.encode(right, begin=False, control=True)) for _, right in asked)
    return [text.decode(ids) for ids in write(model, text, kv, hidden, longest)]


def final_table(model, text, gates, args, config):
    """Recall of hidden facts with full attention, the gates, or only the sliding window."""
    rng = random.Random(f"{config.seed}/final")
    length = min(config.seq_len)
    if args.data:
        prose = read_prose(args.data)
    else:                                   # other prose than that of the training
        prose = generate_prose(model, text, 8192, config.seed + 1)
    try:
        haystack = make_haystack(prose, args.data)
        documents = [make_task("facts", haystack, length, text.tokenizer.encode, rng)[0]
                     for _ in range(32)]
    except UserError as e:                  # --data is source code, for instance
        say(f"no table of facts recalled: {e}")
        return {}
    nothing = RandomAdmission(0.0)
    caches = {
        "full attention": lambda group: DenseCache(model, len(group)),
        "gated": lambda group: DualCache(model, gates, len(group)),
        "sliding window": lambda group: DualCache(model, nothing, len(group), gates.window),
    }
    count = sum(len(document.questions) for document in documents)
    print(f"facts recalled, {count} questions in documents of {length:,} tokens "
          f"(W = {gates.window})")
    print(f"{'':14}{'kept':>8}{'recall':>9}")
    recalls = {}
    shares = []
    for name, make_kv in caches.items():
        with progress(len(documents), name, "documents") as bar:
            scores, kept = evaluate(model, text, make_kv, documents, report=bar.update)
        recalls[name] = sum(scores) / len(scores)
        print(f"{name:14}{kept:8.1%}{recalls[name]:9.1%}", flush=True)
        shares.append(kept)
    if max(shares) > 1:
        say("(more than 100%: whole pages and tables cost more than was refused)")
    return recalls


# -------------------------------------------------------------------------------------- the program

def parse(argv):
    """The arguments, and the config: the model's preset, changed by the options that were given."""
    parser = Parser(description=__doc__.partition("\n")[0], epilog=EXAMPLES)
    model_options(parser)
    add_config_options(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--out", default="gates.safetensors", metavar="FILE",
                       help="where the gates go (default: gates.safetensors)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run whose state is in OUT.resume")
    group.add_argument("--save-every", type=whole(1), default=50, metavar="N",
                       help="write OUT.resume every N steps (default: 50)")
    group.add_argument("--gates-dtype", choices=("float32", "bfloat16"), default="float32",
                       help="of the gates in OUT: bfloat16 halves the file (default: float32)")
    group.add_argument("--convert", metavar="FILE.pt",
                       help="do not train: convert these official gates to OUT")
    group.add_argument("--calibrate", metavar="FILE",
                       help="do not train: measure, on --data or on what the model writes, what "
                       "generate.py --keep needs to know of these gates, and add it to FILE")
    args = parser.parse_args(argv)

    config = replace(BUNDLED if is_bundled(args) else PAPER, **given_settings(args))
    check(args, config)
    return args, config


def given_settings(args):
    """The fields of TrainConfig for which there are options, as far as these were given."""
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    return {name: value for name, value in given.items() if value is not None}


def add_config_options(parser):
    """An option for each field of TrainConfig; only --seed is one of every program's."""
    def show(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"

    def option(group, name, kind, text, metavar="N"):
        paper = getattr(PAPER, name)
        bundled = getattr(BUNDLED, name)
        default = show(paper)
        if bundled != paper:
            default += f"; {show(bundled)} for the bundled model"
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar,
                           help=f"{text} (default: {default})")

    gates = parser.add_argument_group("gates")
    option(gates, "lam", real(0, 10**9), "lambda, the weight of the sparsity loss: larger admits "
           "less")
    option(gates, "window", whole(1, 2**31 - 1), "W: so many recent tokens are always visible")
    option(gates, "tau", real(1e-9, 1), "a token is admitted if its gate is at least this")
    option(gates, "expansion", real(0.1, 64), "hidden width of a gate, in head dims")

    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE_OR_FOLDER",
                      help='text to train on: a text file, a .jsonl file with a "text" in each '
                           "line, or a folder of .txt and .jsonl files (default: the model "
                           "writes it)")
    data.add_argument("--tasks", nargs="?", const="asked", choices=[*tasks.MIXES],
                      help="hide facts, lists, classes and passages in the text of --data: a mix "
                           "of tiny/tasks.py (default, without --data: asked)")
    data.add_argument("--chat", action="store_true", default=None,
                      help="put each sample into the model's chat template, as a text to summarize")
    option(data, "haystack_tokens", whole(1, 10**9), "how much the model writes without --data")
    option(data, "answer_weight", real(0, 10**9), "weight of an answer's token in the distillation "
           "loss; any other token weighs 1")

    training = parser.add_argument_group("training")
    option(training, "seq_len", lengths, "tokens a sample, several lengths with commas between "
           "them; twice the length, half as many samples", metavar="N,N")
    option(training, "tokens_per_step", whole(1, 2**31), "at least: a step has whole samples of "
           "one length")
    option(training, "steps", whole(1, 10**6), "updates of the gates")
    option(training, "lr", real(0, 10**9), "the peak learning rate")
    option(training, "warmup", real(0, 1), "share of the steps in which the learning rate rises")
    option(training, "weight_decay", real(0, 10**9), "of AdamW")


def lengths(text):
    """The type of --seq-len: whole numbers with commas between them."""
    return tuple(whole(256, 2**24)(n) for n in text.split(","))


def check(args, config):
    """UserError for settings that are at odds with each other, before anything slow."""
    if args.calibrate is not None and (args.convert is not None or config.tasks):
        raise UserError("--calibrate goes with --data, without --tasks and --convert")
    if config.chat and (config.tasks or not args.data):
        raise UserError("--chat is for the plain text of --data, not for --tasks or what the model "
                        "writes")
    if args.calibrate is not None:
        check_writable(args.calibrate)
        return
    if os.path.lexists(f"{args.out}.resume") and not args.resume and args.convert is None:
        raise UserError(f"{args.out}.resume is there, from a run that was not completed: --resume "
                        "continues it; to train anew, remove it or give another --out")
    # Gates may go into the model's folder, but not in the place of its other files.
    inputs = model_files(args.model)
    if args.data is not None:
        inputs.append(args.data)
    for suffix in ("", ".resume", ".log.jsonl"):
        output = args.out + suffix
        check_writable(output)
        for file in inputs:
            with reading(file):
                same = os.path.realpath(output) == os.path.realpath(file)
            if same:
                raise UserError(f"--out {args.out} would overwrite {file}: give another file")


def say_unused(args, config):
    """A remark about options that were given and have no effect."""
    given = given_settings(args).keys() - {"seed"}
    if args.data:
        given |= {"data"}
    if args.resume:
        given |= {"resume"}

    if args.convert is not None:
        unused = given - {"lam", "window", "tau"}
    elif args.calibrate is not None:
        unused = given - {"data", "chat"}
    elif args.data and not config.tasks:    # there are no answers in plain text
        unused = given & {"haystack_tokens", "answer_weight"}
    elif args.data:
        unused = given & {"haystack_tokens"}
    else:
        unused = set()
    if unused:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(unused))
        say(f"without effect here: {names}")


def check_lengths(config):
    """UserError if samples are too short for the window, or too few for the processes."""
    shortest, longest = min(config.seq_len), max(config.seq_len)
    if config.window >= shortest:
        raise UserError(f"--window {config.window} should be smaller than --seq-len {shortest}: no "
                        "key would ever leave the window, and gates would learn nothing")
    processes = torchrun_processes()
    # A step takes whole samples until it has its tokens: one more than those of n - 1 samples makes
    # n samples.
    least = (processes - 1) * longest + 1
    if config.tokens_per_step < least:
        raise UserError(f"--tokens-per-step {config.tokens_per_step}: it should be at least "
                        f"{least}, which gives each of {processes} processes a sample of {longest} "
                        "tokens")


def is_bundled(args):
    """Is --model the bundled model?"""
    return Path(args.model).resolve() == HERE / "tiny"


def convert(args):
    """Write official gates as a file of ours. The model only gives shape and fingerprint."""
    args.device = args.device or "cpu"
    args.dtype = args.dtype or "bfloat16"
    model = load_model(args)
    gates = load_official(Gates, args.convert, model)
    gates.window = args.window or gates.window
    gates.tau = args.tau or gates.tau
    gates.save(args.out, model, args.lam or 0.0, dtype=DTYPES[args.gates_dtype])
    say(f"{args.out} written: {args.convert} with window {gates.window} and tau {gates.tau} "
        "(--calibrate adds what generate.py --keep needs)")


def calibrate(args, config):
    """Add the quantiles of its gates to a gate file, or renew them. Nothing else in it changes."""
    if args.calibrate.endswith(".pt"):
        raise UserError(f"{args.calibrate}: an official checkpoint has no place for quantiles: "
                        "make a gate file of it with --convert, and calibrate that")
    documents = read_documents(args.data) if args.data else []
    text = Text(args.model)
    model = load_model(args)
    gates = Gates.load(args.calibrate, model)
    if not documents:
        # Passages of its own, in one text, twice as long as the longest sample.
        num_tokens = 2 * min(model.config.max_positions, LONGEST)
        documents = [generate_prose(model, text, num_tokens, config.seed)]
    head, encoded = encode_documents(documents, text, config)
    shortest = max(256, 2 * gates.window)
    available = len(head) + max(map(len, encoded))
    if available < shortest:
        raise UserError(f"--data {args.data}: the longest document has {available:,} tokens; to "
                        f"calibrate gates with a window of {gates.window} takes {shortest:,}")
    longest = min(model.config.max_positions, LONGEST)
    quantiles = measure_quantiles(model, gates, text_samples(encoded, head), shortest,
                                  max(shortest, longest), config.seed)
    write_quantiles(args.calibrate, quantiles)
    say_calibrated(args.calibrate, quantiles)


def say_calibrated(path, quantiles):
    say(f"{path} has quantiles for texts of {min(quantiles):,} to {max(quantiles):,} tokens now: "
        "generate.py --keep can use it")


def run(args, config):
    """One training from beginning to end. Returns the exit status."""
    say_unused(args, config)
    if args.resume and os.path.exists(args.out) and not os.path.lexists(f"{args.out}.resume"):
        say(f"{args.out} is complete: there is nothing to resume. Without --resume it is trained "
            "anew")
        return 0
    documents = read_documents(args.data) if args.data else []
    text = Text(args.model)
    model = load_model(args)
    config = fit_lengths(args, config, model)
    torch.manual_seed(config.seed)
    gates = Gates.for_model(model, window=config.window, tau=config.tau, expansion=config.expansion)
    optimizer = torch.optim.AdamW(gates.parameters(), config.lr, weight_decay=config.weight_decay)
    micro_batches, estimate = plan_micro_batches(model, gates, config)
    if not args.data:
        documents = [shared_prose(model, text, config)]
    files = RunFiles(args.out, gates, optimizer, run_settings(config, model, documents))
    done = resume(args, files)
    make_sample, make_held_out = make_samples(args.data, documents, config, text)
    say(f"config: {json.dumps(asdict(config))}\n{estimate}\na line for each step: {files.log_path}")

    samples = Samples(make_sample, config)
    if rank_and_processes()[0] > 0:         # only the first process writes files
        _, why = train(model, gates, optimizer, samples, config, done, micro_batches)
        return 130 if why == "interrupted" else 0
    with files.locked_log(done):
        done, why = train(model, gates, optimizer, samples, config, done, micro_batches, files.log,
                          files.save, args.save_every)
        write_gates(args, config, model, files, done, why)
        if why == "interrupted":
            return 130
        gates = Gates.load(args.out, model)         # as they are in the file, perhaps in bf16
        finish_run(args, config, model, gates, files, make_held_out)
    if config.tasks or not args.data or is_bundled(args):
        final_table(model, text, gates, args, config)
    return 0


def fit_lengths(args, config, model):
    """The config with its final --seq-len, checked."""
    positions = model.config.max_positions
    if args.seq_len is None:                # a preset's lengths, as far as the model knows them
        known = tuple(n for n in config.seq_len if n <= positions)
        config = replace(config, seq_len=known or (positions,))
    check_lengths(config)
    if max(config.seq_len) > positions:
        say(f"warning: --seq-len {max(config.seq_len)}, and {args.model} was trained for "
            f"{positions:,} positions")
    return config


def resume(args, files):
    """The steps done by an earlier run, whose state --resume loads; 0 if there is none.

    `check` has refused a state without --resume, and `run` has left a complete run alone.
    """
    if not args.resume:
        return 0
    if not os.path.lexists(files.resume_path):
        say(f"{files.resume_path} is not there: starting at step 1")
        return 0
    done = files.load()
    say(f"{files.resume_path}: continuing after step {done}")
    return done


def finish_run(args, config, model, gates, files, make_held_out):
    """Validate the gates in OUT, add their quantiles, and remove the state: the run is complete."""
    files.log(dict(validation=validate(model, gates, make_held_out, config)))
    longest = max(min(model.config.max_positions, LONGEST), *config.seq_len)
    quantiles = measure_quantiles(model, gates, make_held_out, min(config.seq_len), longest,
                                  config.seed)
    write_quantiles(args.out, quantiles)
    say_calibrated(args.out, quantiles)
    os.unlink(files.resume_path)


def run_settings(config, model, documents):
    """What must be the same for a run to be continued. Not the path of --data: that may change.

    documents: those of --data, or the prose that the model has written.
    """
    data = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    return dict(json.loads(json.dumps(asdict(config))), model=fingerprint(model),
                dtype=str(model.dtype), data=data)


def write_gates(args, config, model, files, done, why):
    """Write OUT and say so. UserError if there is no room for it, or if a step failed."""
    if done:
        try:
            files.gates.eval().requires_grad_(False)
            files.gates.save(args.out, model, config.lam, json.dumps(asdict(config)),
                             DTYPES[args.gates_dtype])
        except UserError as e:
            raise UserError(f"{e}; make room, then --resume continues from {files.resume_path}"
                            ) from None
    written = f"{args.out} has the gates after step {done}"
    if why is None:
        command = shlex.join(["python", "generate.py", "--model", args.model, "--gates", args.out])
        say(f"{written}; try: {command}")
    elif why == "interrupted":
        say(f"\ninterrupted: {written}; --resume continues there")
    else:
        if done:
            why += f"; {written}"
        raise UserError(f"{why}; a lower --lr than {config.lr} may help")


def main(argv=None):
    args, config = parse(argv)
    if args.convert is not None or args.calibrate is not None:
        # The work of one process: torchrun's others would write the same file.
        if torchrun_processes() > 1 and os.environ["RANK"] != "0":
            return 0
        say_unused(args, config)
        if args.convert is not None:
            convert(args)
        else:
            calibrate(args, config)
        return 0
    with process_group(args):
        return run(args, config)


if __name__ == "__main__":
    sys.exit(run_program(main))
