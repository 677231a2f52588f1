"""A text file in, text out, with a KV cache that keeps only what its gates admit.

    python generate.py                              the bundled model answers tiny/example.txt
    python generate.py --prompt a.txt               another text; "-" reads standard input
    python generate.py --prompt a.txt b.txt         two texts, decoded as one batch
    python generate.py --prompt *.txt --batch 8 --jsonl out.jsonl       many, eight at a time
    python generate.py --prompt a.txt --save-cache a.cache              read once,
    python generate.py --load-cache a.cache --prompt q.txt              ask often
    python generate.py --prompt a.txt --dense       keep everything, for comparison
    python generate.py --prompt a.txt --keep 15%    keep so much of a dense cache, by the gates
    python generate.py --prompt a.txt --admit none  keep only the sliding window
    python generate.py --prompt a.txt --model ~/Llama-3.2-1B-Instruct --gates g.safetensors --chat

The answer goes to stdout while it is made, everything else to stderr.

The file is in the order of a run: text in, prefill, decode, report, options. The loop that every
language model runs is in `prefill` and `decode`. (Text becomes tokens in tokenizer.py.)
"""
import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Before torch: importing takes seconds, and from here on Ctrl-C is no traceback.
from common import (DTYPES, HERE, MAX_TEXT_FILE, Parser, UserError, all_reduce_sum,
                    check_appendable, check_number, check_regular, check_writable, clock,
                    drop_stdout, model_options, one_line, peak_bytes, pick_device, printable,
                    process_group, progress, quoted, rank_and_processes, read_json, reading, real,
                    reason, run_program, say, whole, write_text)

import torch
import torch.distributed as dist
import torch.nn.functional as F

from files import find_gates, page_share, saved_tau
from model import Llama, model_files
from tokenizer import Text, TextStream, token_texts
from wgkv import DenseCache, DualCache, Gates, P, RandomAdmission, pages_for


# ----------------------------------------------------------------------------------------- text in

def read_prompt(name):
    """The text of a file, or of standard input for "-", without the line ends at its end."""
    if not name:
        raise UserError("--prompt: '' is no name of a file")
    with reading(f"--prompt {name}", "read as UTF-8 text"):
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8-sig").rstrip("\r\n")          # without a byte-order mark
    if not text.strip():
        raise UserError(f"--prompt {name} is empty: a prompt needs some text")
    return text


def typed_lines():
    """The lines of standard input that say something, each as soon as it is typed."""
    while True:
        if sys.stdin.isatty():
            say("> ", end="")
        line = sys.stdin.buffer.readline()
        if not line:                                            # the end: Ctrl-D
            return
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            say("this line is not UTF-8 text, so it was left out")
            continue
        if text:
            yield text


# ----------------------------------------------------------------------------------------- prefill

@torch.no_grad()
def prefill(model, kv, prompts, chunk=4096, advance=lambda tokens: None):
    """Read prompts, B lists of ids, into the cache.

    Returns the hidden state (B, hidden_size) of each prompt's last token. A long prompt goes
    through the model in chunks, so that activations stay small. Shorter prompts are padded.
    advance: called after each chunk with the number of tokens read.
    """
    for count, hidden in prefill_chunks(model, kv, prompts, chunk):
        advance(count)
    return hidden


def prefill_chunks(model, kv, prompts, chunk):
    """`prefill` in steps: yields (tokens read, last hidden states so far) after each chunk."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")       # (B,)
    longest = int(lengths.max())
    if int(lengths.min()) < 1:
        raise UserError("the tokenizer gives no token for a prompt")
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device="cpu")     # (B, longest)
    for b, prompt in enumerate(prompts):
        tokens[b, :len(prompt)] = torch.tensor(prompt)
    if int(tokens.max()) >= model.config.vocab_size:
        raise UserError(f"the tokenizer gives the id {int(tokens.max()):,}, but {model.name} has "
                        f"a vocabulary of {model.config.vocab_size:,}")
    padded = bool((lengths < longest).any())

    # The cache can grow once, now, rather than copy itself again and again.
    if hasattr(kv, "expect"):
        kv.expect((kv.num_tokens.cpu() + lengths).tolist())

    last = None
    for start in range(0, longest, chunk):
        part = tokens[:, start:start + chunk].to(model.device)          # (B, T)
        counts = (lengths - start).clamp(0, part.shape[1])              # (B,) valid tokens
        valid = counts.to(model.device)
        hidden = model(part, kv, valid if padded else None)             # (B, T, hidden_size)
        # Where a prompt has no token in this chunk, any index will do: we keep the old state.
        ends_here = hidden[torch.arange(len(prompts)), (valid - 1).clamp(min=0)]
        if last is None:
            last = ends_here                                            # (B, hidden_size)
        else:
            last = torch.where((valid > 0)[:, None], ends_here, last)
        yield int(counts.sum()), last


# ------------------------------------------------------------------------------------------ decode

LAG = 3                 # decode steps that the host starts before it reads the token of the first
FEW_STEPS = 8           # up to so many, capturing a CUDA graph costs more than it saves


@torch.no_grad()
def decode(model, kv, hidden, steps, end=(), choose=None):
    """Decode up to `steps` tokens after a prefill, from its last hidden states (B, hidden_size).

    Yields a list of B ids a step; None for a sequence that has given an end token (one of `end`)
    before. choose: logits (B, vocab) -> ids (B,); by default the greedy choice. The ids of the
    last step are not in the cache: a further turn begins with them.

    On a GPU the host runs LAG steps ahead of the ids it reads, so that the GPU never waits for it.
    (So if you stop reading early, up to LAG more tokens than you have seen are in the cache.)
    """
    assert steps >= 1, f"{steps} steps: the prefill gives the first id already"
    decoder = DecodeStep(model, kv, end, choose, use_graph=steps > FEW_STEPS)
    decoder.start(0, hidden)
    remaining = steps - 1       # the prefill gives the first id, so 3 ids take 2 steps
    ahead = LAG if kv.capturable else 0
    pending = [HostCopy(decoder.token)]     # ids on their way to the host, oldest first
    ended = [False] * len(hidden)
    started = 0
    # On a GPU no step may ask for memory, so we reserve it before. Not for all steps at once: a
    # reply can be much shorter than its limit. So a reservation is given back and the next one
    # made in the middle of the loop, which a plain `with` cannot do. (A CPU makes room step by
    # step.)
    with contextlib.ExitStack() as reserved:
        while pending or started < remaining:
            while started < remaining and len(pending) <= ahead:
                if kv.capturable and started % kv.shared.most_steps == 0:
                    reserved.close()
                    steps_ahead = min(kv.shared.most_steps, remaining - started)
                    reserved.enter_context(kv.reserve(steps_ahead))
                decoder.run()
                pending.append(HostCopy(decoder.token))
                started += 1
            ids = pending.pop(0).wait()
            yield [None if over else token for token, over in zip(ids, ended)]
            ended = [over or token in end for token, over in zip(ids, ended)]
            if all(ended):
                return


class DecodeStep:
    """One step of decode for all sequences: the model reads the last ids and we choose the next.

    Every step works on the same tensors, in place, so that a CUDA graph can repeat it: one launch
    instead of hundreds. Nothing in it may wait for the GPU. So which sequences have ended is kept
    on the GPU, too: `alive` becomes False with an end token, and then nothing more is written.
    """

    def __init__(self, model, kv, end, choose, use_graph):
        self.model = model
        self.kv = kv
        self.choose = choose or greedy
        self.ends = torch.tensor(sorted(end), dtype=torch.long, device=model.device)
        self.logits = model.embed.weight.new_zeros(kv.B, model.config.vocab_size)
        self.token = torch.zeros(kv.B, dtype=torch.long, device=model.device)
        self.alive = torch.zeros(kv.B, dtype=torch.bool, device=model.device)
        self.use_graph = use_graph and kv.capturable
        self.choice_in_graph = choose is None                   # a sampler's state is on the host
        self.graph = None
        self.reallocations = None           # of the cache, at the last step

    def start(self, first, hidden):
        """Choose the first ids of sequences `first` and on, by their states (n, hidden_size)."""
        these = slice(first, first + len(hidden))
        self.logits[these] = self.model.logits(hidden)
        self.token[these] = self.choose(self.logits[these])
        self.broadcast_ids()
        self.alive[these] = self.no_end()[these]

    def broadcast_ids(self):
        """Of several processes all take the first one's ids, whatever the last bits of logits."""
        if self.model.config.processes > 1:
            dist.broadcast(self.token, 0)

    def no_end(self):
        """Which of the current ids are no end tokens: (B,) bool."""
        return (self.token[:, None] != self.ends).all(dim=1)

    def run(self):
        """Take a step, by the graph if there is one."""
        if self.use_graph:
            # A replay runs no Python that could ask for memory, and a capture must not ask.
            self.kv.ensure_room(1)
        if self.kv.shared.reallocations != self.reallocations:
            # The first step, or the cache has moved and a graph would hold old addresses: plainly.
            # This also compiles the kernels, which a capture cannot do.
            self.graph = None
            self.reallocations = self.kv.shared.reallocations
            self.body()
        elif not self.use_graph:
            self.body()
        elif self.graph is None:
            # Capture: body() runs as Python, so the cache's `begin` takes the room. Its kernels
            # are only recorded: the replay runs them.
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.body()
            self.graph.replay()
        else:
            # Replay: no `begin` runs, so we take the room.
            self.graph.replay()
            self.kv.take_room(1)
        if not self.choice_in_graph:
            self.pick()

    def body(self):
        """What the graph holds."""
        on_cpu = self.token.device.type == "cpu"
        all_alive = on_cpu and bool(self.alive.all())           # a GPU would have to be waited for
        lengths = None if all_alive else self.alive.long()      # (B,) 1 or 0 valid tokens
        with self.kv.decoding():
            hidden = self.model(self.token[:, None], self.kv, lengths)  # (B, 1, hidden_size)
        self.logits.copy_(self.model.logits(hidden[:, 0]))
        if self.choice_in_graph:
            self.pick()

    def pick(self):
        """Choose the next ids."""
        self.token.copy_(self.choose(self.logits))
        self.broadcast_ids()
        self.alive.logical_and_(self.no_end())


STEPS_BETWEEN_CHUNKS = 16       # decode steps between two chunks of a prompt


@dataclass
class PromptInPrefill:
    """A prompt that a Server is reading."""
    b: int                  # the sequence that it goes to
    index: int              # which of the prompts it is
    chunks: Iterator        # prefill_chunks(...), a step for each chunk
    unread: int             # tokens


class Answer(NamedTuple):
    """An answer that a Server is decoding."""
    index: int              # of its prompt
    ids: list               # so far


class Server:
    """Answers to more prompts than a cache has sequences (continuous batching).

        for index, ids, kept, dense in Server(model, kv, steps).answers(prompts): ...

    A sequence whose answer is done is emptied and takes the next prompt, which is read through a
    view of that sequence alone: a chunk at a time, between runs of decode steps of the others.
    Greedy answers are those that each prompt gets alone. (A sampler draws for all at once, so
    there an answer depends on its neighbors.)

        sequence 0    read A  A  A | decode A .................. done | read C  C | decode C ...
        sequence 1                 | read B | decode B ........................................
    """

    def __init__(self, model, kv, steps, end=(), choose=None, chunk=4096, advance=lambda n: None):
        self.model = model
        self.kv = kv
        self.steps = steps          # ids of an answer at most
        self.end = end
        self.chunk = chunk
        self.advance = advance      # called with the number of tokens read
        self.decoder = DecodeStep(model, kv, end, choose, use_graph=steps > FEW_STEPS)
        self.prefill_s = 0.0
        self.decode_s = 0.0

    @torch.no_grad()
    def answers(self, prompts):
        """Yields (index of the prompt, ids of its answer) as soon as an answer is done.

        And the bytes that its sequence kept in the end, and what a dense cache would have held.
        """
        waiting = list(enumerate(prompts))      # not begun yet
        free = list(range(self.kv.B))           # sequences
        prefilling = None                       # at most one prompt is read at a time
        decoding = {}                           # sequence -> its Answer
        lengths = [len(prompt) for prompt in prompts[:self.kv.B]]
        self.kv.expect(lengths + [0] * (self.kv.B - len(lengths)))
        while waiting or prefilling is not None or decoding:
            # A free sequence takes the next prompt.
            if prefilling is None and waiting and free and self.is_there(waiting[0][0]):
                b = free.pop(0)
                index, prompt = waiting.pop(0)
                chunks = prefill_chunks(self.model, self.kv.sequences(b), [prompt], self.chunk)
                prefilling = PromptInPrefill(b, index, chunks, unread=len(prompt))

            # Read one chunk. The last one gives the answer's first id.
            if prefilling is not None:
                b = prefilling.b
                prefilling.unread -= self.read(prefilling.chunks, b, last=prefilling.unread)
                if prefilling.unread == 0:
                    decoding[b] = Answer(prefilling.index, [int(self.decoder.token[b])])
                    prefilling = None

            # Go on with the answers, for a short time if a chunk can be read after that.
            if decoding:
                most = self.kv.shared.most_steps
                if prefilling is not None or waiting and free:
                    most = STEPS_BETWEEN_CHUNKS
                self.run(decoding, most)
            for b, answer in list(decoding.items()):
                if answer.ids[-1] in self.end or len(answer.ids) == self.steps:
                    del decoding[b]
                    self.decoder.alive[b] = False
                    sequence = self.kv.sequences(b)
                    kept = sequence.kept_bytes()
                    dense = sequence.dense_bytes()
                    sequence.reset()
                    free.append(b)
                    yield answer.index, answer.ids, kept, dense

    def is_there(self, index):
        """Has this prompt arrived? Here all are there from the start; bench.py overrides this."""
        return True

    def read(self, chunks, b, last):
        """Read a chunk into sequence b; after the last chunk choose the answer's first id.

        last: how many tokens were unread. A chunk of so many is the last one.
        Returns how many tokens were read.
        """
        start = clock(self.model.device)
        count, hidden = next(chunks)
        if count == last:
            self.decoder.start(b, hidden)
        self.prefill_s += clock(self.model.device) - start
        self.advance(count)
        return count

    def run(self, decoding, most):
        """Some decode steps: as many as all answers can still take, and `most` at most.

        Why P at most? We read the ids only after the last step. An answer that has ended before
        holds its sequence up to then, while another prompt may wait for it. And P tokens take at
        most one more page a row, so that is all that we reserve.
        """
        start = clock(self.model.device)
        steps = min(self.steps - len(answer.ids) for answer in decoding.values())
        steps = min(steps, most, P)
        taken = torch.empty(steps, self.kv.B, dtype=torch.long, device=self.model.device)
        with contextlib.ExitStack() as reserved:
            if self.kv.capturable and steps > 0:
                reserved.enter_context(self.kv.reserve(steps))
            for n in range(steps):
                self.decoder.run()
                taken[n] = self.decoder.token
        for ids_of_step in taken.tolist():          # here the host waits, once a run
            for b, answer in decoding.items():
                if answer.ids[-1] not in self.end:
                    answer.ids.append(ids_of_step[b])
        self.decode_s += clock(self.model.device) - start


class HostCopy:
    """Ids on their way from the device to the host; `wait` returns them as a list."""

    def __init__(self, ids):
        self.event = None
        if ids.device.type == "cpu":
            self.ids = ids.clone()
            return
        # Pinned memory, so that the copy runs beside the host; the event says when it is done.
        self.ids = torch.empty(ids.shape, dtype=ids.dtype, device="cpu", pin_memory=True)
        self.ids.copy_(ids, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self):
        if self.event is not None:
            self.event.synchronize()
        return self.ids.tolist()


def greedy(logits):
    """The most probable ids (B,) of logits (B, vocab)."""
    return logits.argmax(dim=-1)


def sampler(temperature, top_p, seed, device):
    """A `choose` for decode: sample from softmax(logits / temperature), cut to its nucleus.

    The nucleus (arXiv 1904.09751) is the fewest ids that together have a probability of top_p.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def choose(logits):
        p = (logits.float() / temperature).softmax(dim=-1)              # (B, vocab)
        p, ids = p.sort(dim=-1, descending=True)
        before = p.cumsum(dim=-1) - p
        p[before >= top_p] = 0
        # torch.multinomial would wait for the device to check p. The same distribution: each id
        # comes after an exponential time at the rate p, e / p, and we choose the first to come.
        e = torch.empty_like(p).exponential_(generator=generator)
        first = (p / e).argmax(dim=-1, keepdim=True)                    # (B, 1)
        return ids.gather(-1, first)[:, 0]

    return choose


def warm_up(model, kv):
    """Seconds that a GPU's first use takes: kernels are compiled, on copies of the cache."""
    if model.device.type != "cuda":
        return 0.0
    start = clock(model.device)
    if kv.kernels is not None:
        with kv.kernels.compiled_together():
            read_and_decode(model, kv.clone(), FEW_STEPS)
    use_once(model, kv.clone())
    return clock(model.device) - start


def use_once(model, kv):
    """Do with a cache what answering a prompt will do: read in chunks, decode, evict."""
    read_and_decode(model, kv, FEW_STEPS + 4)
    if isinstance(kv, DualCache) and kv.has_budget():
        kv.evict(0)         # even the sinks: the first eviction would be a pause in the text


def read_and_decode(model, kv, steps):
    """Read 300 tokens in two chunks and decode; the ids are of no use."""
    hidden = prefill(model, kv, [[0] * 300] * kv.B, chunk=200)
    for _ in decode(model, kv, hidden, steps):
        pass


# ------------------------------------------------------------------------------------------ report

class Session:
    """A model, a cache and the conversation in it, with the figures that are shown at the end.

    What the model says to a prompt is an answer. In a chat, where a turn follows it, the chat
    template calls it a reply, and so do we where we count them.
    """

    def __init__(self, args):
        self.args = args
        self.names = args.prompt or [str(HERE / "tiny" / "example.txt")]
        if args.load_cache is not None and not args.prompt:
            self.names = []         # the conversation goes on with what is typed
        texts = [read_prompt(name) for name in self.names]      # first: a wrong path fails fast
        self.answer_file = None     # of --jsonl
        self.done = {}              # number of a prompt -> the row of its answer
        if args.jsonl is not None:
            self.answer_file = AnswerFile(args, self.names, texts)
            for n, name in enumerate(self.names):
                if name in self.answer_file.rows:
                    self.done[n] = self.answer_file.rows[name]
        self.unanswered = [n for n in range(len(self.names)) if n not in self.done]
        self.shown = 0              # prompts whose answers were printed
        self.text = Text(args.model)
        self.replies = 0
        self.last = None            # the last id decoded, not in the cache yet
        self.ids = []               # those in the cache
        if args.load_cache is None:             # a mistake in a prompt is found before the model
            self.prompts = [self.encode(text) for text in texts]

        self.model = load_model(args, split=True)
        self.gates = None           # the gate file
        self.kv = self.make_cache(len(texts))
        if args.load_cache is not None:         # what is encoded depends on what stands before
            self.load_cache()
            self.prompts = [self.encode(text) for text in texts]
        self.choose = None
        if args.temperature >= COLDEST:
            self.choose = sampler(args.temperature, args.top_p, args.seed, self.model.device)

        self.warned = False
        self.first_use_s = warm_up(self.model, self.kv)
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.kept = 0               # bytes of the sequences that several prompts had
        self.dense = 0
        self.longest = 0            # tokens of the longest of these

    def make_cache(self, num_prompts):
        """The empty cache that the options ask for.

        Its batch, budget and tau follow from all prompts, answered before or not: so an answer does
        not depend on where a run with --jsonl was stopped.
        """
        args = self.args
        batch = max(1, min(num_prompts, args.batch or num_prompts))
        if args.dense:
            return DenseCache(self.model, batch)
        admission, self.gates = make_admission(args, self.model)
        settings = dict(budget=self.budget(batch), evict_by=args.evict, select=args.select)
        tau = self.pick_tau(admission, settings)
        return DualCache(self.model, admission, batch, tau=tau, **settings)

    def pick_tau(self, admission, settings):
        """The cache's tau: of --tau or --keep, or as --load-cache has it; None: the gates' own."""
        args = self.args
        if args.load_cache is not None and args.tau is None:
            return saved_tau(args.load_cache)
        if args.keep is None:
            return args.tau
        if not admission.quantiles:
            first = ""
            if self.gates.endswith(".pt"):
                first = "make a gate file of it with --convert, then "
            raise UserError(f"{self.gates} has no quantiles, from which --keep chooses tau: {first}"
                            "python train.py --calibrate FILE adds them (with --model, if it is "
                            "not the bundled one)")
        tau = tau_for(args.keep, admission, DualCache(self.model, admission, **settings),
                      [len(prompt) + args.max_new_tokens for prompt in self.prompts])
        if tau > 2 * admission.tau:         # at 0.4 instead of 0.1 the bundled model finds nothing
            say(f"warning: --keep {args.keep:.1%} takes a tau of {tau:.2g}, and these gates are "
                f"made for {admission.tau:g}: they will refuse what answers need. Gates that were "
                "trained with a larger lambda keep less")
        return tau

    def budget(self, batch):
        """--budget in bytes. A share is one of what a dense cache would hold at the end.

        If more prompts wait than the batch holds: of the longest that it can hold together.
        """
        budget = self.args.budget
        if isinstance(budget, float):
            longest = sorted(map(len, self.prompts), reverse=True)[:batch]
            tokens = sum(longest) + batch * self.args.max_new_tokens
            c = self.model.config
            heads = c.num_kv_heads * c.processes
            numbers = 2 * c.num_layers * heads * c.head_dim * tokens                # of K and V
            budget = min(int(budget * numbers * self.model.dtype.itemsize), LARGEST)
        return budget

    def encode(self, text):
        """The ids of the next turn."""
        if self.args.chat:
            return self.text.turn(text, self.replies, self.last)
        if not self.ids:
            return self.text.encode(text)
        ids = self.text.encode(f"\n\n{text}", begin=False)
        if self.last is not None:
            ids = [self.last] + ids
        return ids

    def load_cache(self):
        """Go on where the process that wrote --load-cache has ended."""
        file = self.args.load_cache
        [self.ids], notes = self.kv.load(file, self.model)
        chat = notes.get("chat")
        if not isinstance(chat, bool):
            raise UserError(f"{file}: its notes do not say if it was saved with --chat")
        if chat != self.args.chat:
            raise UserError(f"{file} was saved {'with' if chat else 'without'} --chat: go on in "
                            "the same way")
        # Each reply has left a token at least.
        self.replies = check_number(file, "its notes' replies", notes.get("replies"), 0,
                                    len(self.ids), whole=True)
        self.last = notes.get("last")
        if self.last is not None:
            check_number(file, "its notes' last", self.last, 0, self.model.config.vocab_size - 1,
                         whole=True)

    def save_cache(self):
        """Write --save-cache: the cache, and where the conversation stands."""
        notes = dict(replies=self.replies, last=self.last, chat=self.args.chat)
        self.kv.save(self.args.save_cache, self.model, [self.ids], notes)
        say(f"{self.args.save_cache} written: the cache of {len(self.ids):,} tokens")

    def run(self):
        """Answer the prompts, then each line from the terminal."""
        if len(self.prompts) > 1 or self.answer_file is not None:
            self.answer_all()
            return
        if self.prompts:
            self.answer()
        if self.args.interactive:
            for line in typed_lines():
                try:
                    hidden = self.prefill([self.encode(line)])
                except UserError as e:          # the line has not reached the cache
                    say(f"this line was left out: {one_line(e)}")
                    continue
                self.decode(hidden)
        if self.args.save_cache is not None:
            self.save_cache()

    def answer(self):
        """Answer the one prompt."""
        if self.args.show_kept is not None:
            self.kv.admission = GateLog(self.kv.admission)
        hidden = self.prefill(self.prompts)
        if self.args.show_kept is not None:
            self.show_kept(self.kv.admission.gates() >= self.kv.tau)
            self.kv.admission = self.kv.admission.policy
        self.decode(hidden)

    def answer_all(self):
        """Answer several prompts; stdout has the answers in the order of the prompts."""
        self.show_done()
        prompts = [self.prompts[n] for n in self.unanswered]
        self.warn_if_too_long(prompts)
        with self.counting(prompts, "reading") as advance:
            server = Server(self.model, self.kv, self.args.max_new_tokens, self.text.end,
                            self.choose, self.args.chunk, advance)
            try:
                for index, ids, kept, dense in server.answers(prompts):
                    self.finish(self.unanswered[index], ids, kept, dense)
                    self.show_done()
            finally:                                            # also after Ctrl-C
                self.prefill_s = server.prefill_s
                self.decode_s = server.decode_s
        if not prompts:
            self.count_stored()

    @contextlib.contextmanager
    def counting(self, prompts, description):
        """A progress bar; yields what moves it, and counts the tokens read: also after Ctrl-C."""
        with progress(sum(map(len, prompts)), description, "tokens") as bar:
            def advance(count):
                bar.update(count)
                self.prompt_tokens += count

            yield advance

    def finish(self, n, ids, kept, dense):
        """Note prompt n's answer, which is done: its text, its figures, its row for --jsonl."""
        stream = TextStream(self.text, continues=True)
        answer = "".join(map(stream.push, ids)) + stream.flush()
        prompt_tokens = len(self.prompts[n])
        self.new_tokens += len(ids)
        self.kept += kept
        self.dense += dense
        self.longest = max(self.longest, prompt_tokens + len(ids))
        # A row is about all KV heads, of which a process has a part.
        total = torch.tensor([kept, dense], device=self.model.device)
        kept, dense = all_reduce_sum(total, self.model.config.processes).tolist()
        self.done[n] = dict(prompt=self.names[n], answer=answer, prompt_tokens=prompt_tokens,
                            new_tokens=len(ids), kept_bytes=kept, dense_bytes=dense,
                            model=self.args.model)
        if self.answer_file is not None and self.model.config.rank == 0:
            self.answer_file.add(self.done[n])

    def count_stored(self):
        """--jsonl had all answers: the figures are theirs, as after the runs that made them."""
        say(f"{self.args.jsonl} has all answers: nothing was left to do")
        for row in self.done.values():
            self.prompt_tokens += row["prompt_tokens"]
            self.new_tokens += row["new_tokens"]
            self.longest = max(self.longest, row["prompt_tokens"] + row["new_tokens"])
            # `figures` adds up what each process has.
            self.kept += row["kept_bytes"] // self.model.config.processes
            self.dense += row["dense_bytes"] // self.model.config.processes

    def show_done(self):
        """Print the answers whose turn it is."""
        while self.shown in self.done:
            name = printable(self.names[self.shown])
            self.put(f"==> {name} <==\n{self.done[self.shown]['answer']}\n")
            self.shown += 1

    def put(self, text):
        """Print to stdout, at once."""
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            # Its reader has gone (`| head`). A file that was asked for is still written, and
            # other processes would wait for this one.
            drop_stdout()
            file_asked_for = self.args.save_cache is not None or self.args.jsonl is not None
            if not file_asked_for and self.model.config.processes == 1:
                raise

    def prefill(self, prompts):
        """Read prompts into the cache; returns the hidden states that decode starts from."""
        self.warn_if_too_long(prompts)
        start = clock(self.model.device)
        try:
            with self.counting(prompts, "prefill") as advance:
                hidden = prefill(self.model, self.kv, prompts, self.args.chunk, advance)
        finally:                                                # also after Ctrl-C
            self.prefill_s += clock(self.model.device) - start
        self.ids += prompts[0]
        self.last = None
        return hidden

    def warn_if_too_long(self, prompts):
        """Say once if this turn can pass the positions that the model was trained for."""
        longest = max(map(len, prompts), default=0)
        total = int(self.kv.num_tokens.max()) + longest + self.args.max_new_tokens
        positions = self.model.config.max_positions
        if total > positions and not self.warned:
            say(f"warning: up to {total:,} tokens will be read and decoded, {self.args.model} was "
                f"trained for {positions:,} positions: expect worse answers")
            self.warned = True

    def decode(self, hidden):
        """Decode an answer, shown token by token."""
        if self.args.max_new_tokens == 0:                       # only to be saved
            return
        stream = TextStream(self.text, continues=True)
        start = clock(self.model.device)
        try:
            for [token] in decode(self.model, self.kv, hidden, self.args.max_new_tokens,
                                  self.text.end, self.choose):
                if self.last is not None:
                    self.ids.append(self.last)
                self.last = token
                self.new_tokens += 1
                self.put(stream.push(token))
        finally:                                                # also after Ctrl-C
            self.decode_s += clock(self.model.device) - start
            self.replies += 1
            self.put(stream.flush() + "\n")

    def figures(self):
        """What --json prints."""
        processes = self.model.config.processes
        kept_bytes = self.kept
        dense_bytes = self.dense
        if dense_bytes == 0:        # no sequence was finished and emptied: it is still in the cache
            kept_bytes = self.kv.kept_bytes()
            dense_bytes = self.kv.dense_bytes()
        evicted = 0
        if self.args.budget is not None:
            evicted = self.kv.shared.num_evicted
        counts = torch.tensor([kept_bytes, dense_bytes, evicted], device=self.model.device)
        kept, dense, evicted = all_reduce_sum(counts, processes).tolist()

        kept_share = None
        if dense:
            kept_share = round(kept / dense, 4)
        tau = None
        if not self.args.dense:
            tau = self.kv.tau
        extra = {}
        if self.args.budget is not None:
            extra.update(evicted_tokens=evicted, evictions=self.kv.shared.num_evictions,
                         final_tau=self.kv.shared.tau_now)
        if processes > 1:
            heaviest = torch.tensor(kept_bytes, device=self.model.device)
            dist.all_reduce(heaviest, dist.ReduceOp.MAX)
            extra.update(processes=processes, heaviest_kept_bytes=int(heaviest))
        return dict(
            prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens,
            first_use_s=round(self.first_use_s, 4), prefill_s=round(self.prefill_s, 4),
            decode_s=round(self.decode_s, 4), kept_share=kept_share, kept_bytes=kept,
            dense_bytes=dense, peak_bytes=peak_bytes(self.model.device), model=self.args.model,
            gates=self.gates, device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."), seed=self.args.seed, tau=tau,
            **extra)

    def report(self):
        """The figures, for people, and for programs with --json."""
        f = self.figures()
        if self.prompt_tokens == 0 and not self.ids or not f["dense_bytes"]:
            say("no prompt was read")           # Ctrl-C in its first chunk
        else:
            self.report_times(f)
            self.report_bytes(f)
        if self.args.json:
            say(json.dumps(f))

    def report_times(self, f):
        """The lines about tokens and seconds."""
        say(f"prompt   {self.prompt_tokens:8,} tokens")
        if self.first_use_s:
            say(f"compile  {self.first_use_s:8.2f} s   (the kernels, at a process's first use; not "
                "in the times below)")
        if self.prefill_s == 0:                 # --jsonl had all answers
            return
        prefill_rate = self.prompt_tokens / self.prefill_s
        decode_rate = self.new_tokens / max(self.decode_s, 1e-9)
        say(f"prefill  {self.prefill_s:8.2f} s   {prefill_rate:10,.1f} tokens/s")
        say(f"decode   {self.decode_s:8.2f} s   {decode_rate:10,.1f} tokens/s   "
            f"({self.new_tokens} tokens)")

    def report_bytes(self, f):
        """The lines about what was kept."""
        kept_mib = f["kept_bytes"] / 2**20
        dense_mib = f["dense_bytes"] / 2**20
        tokens = len(self.ids) or self.prompt_tokens + self.new_tokens
        longest = max(self.longest, int(self.kv.num_tokens.max()))
        if not self.args.dense and longest <= self.kv.window:
            # A share would be hundreds of percent: a ring has its whole size from the start.
            say(f"kept     all {tokens:,} tokens    {kept_mib:,.2f} MiB for windows of "
                f"{self.kv.window:,} tokens; a dense cache holds {dense_mib:,.2f} MiB")
        else:
            say(f"kept     {f['kept_share']:8.1%}     {kept_mib:10,.2f} MiB, where a dense cache "
                f"holds {dense_mib:,.2f} MiB")
            if f["kept_share"] > 1:
                say("         (more than dense: whole pages and tables cost more than was refused)")
        if "processes" in f:
            heaviest = f["heaviest_kept_bytes"] / (f["kept_bytes"] / f["processes"])
            say(f"         ({f['processes']} processes; the heaviest keeps {heaviest:.2f} times "
                "the mean)")
        if self.args.keep is not None:
            say(f"tau      {f['tau']:8.3g}     chosen for --keep {self.args.keep:.1%}")
        if self.args.budget is not None:
            say(f"evicted  {f['evicted_tokens']:8,} tokens of all heads   (evictions: "
                f"{self.kv.shared.num_evictions}; tau is now {self.kv.shared.tau_now:.3g})")
        if f["peak_bytes"] is not None:
            say(f"peak     {f['peak_bytes'] / 2**20:8,.0f} MiB of memory")

    def show_kept(self, admitted):
        """Write the page of --show-kept for the prompt, which has just been read.

        admitted (L, Hkv, S) bool: by the gates and the first tau, whatever was evicted since.
        """
        decided_by = f"--admit {self.args.admit}"
        if self.gates is not None:
            decided_by = Path(self.gates).name
        held = self.kv.admitted()
        page = kept_page(
            token_texts(self.text, self.prompts[0]), held, admitted & ~held, self.kv.window,
            self.kv.shared.tau_now, f"{self.model.name}, {decided_by}",
            self.kv.kept_bytes() / self.kv.dense_bytes())
        write_text(self.args.show_kept, page)


class GateLog:
    """An admission policy that notes the gates of another one, of a cache's first sequence."""

    def __init__(self, policy):
        self.policy = policy
        self.layers = {}            # layer -> for each call (Hkv, T) fp32

    def gate(self, layer, k, k_rotated, positions):
        g = self.policy.gate(layer, k, k_rotated, positions)
        self.layers.setdefault(layer, []).append(g[0].cpu())
        return g

    def gates(self):
        """(L, Hkv, S) fp32."""
        return torch.stack([torch.cat(self.layers[n], dim=1) for n in sorted(self.layers)])


class AnswerFile:
    """The file of --jsonl: a row of JSON for each answer, found again by its prompt's name.

    An answer is still right if the prompt has the same text and the options are the same. So a row
    has a hash of each, and a file with other hashes is refused.
    The path may be that of a user's own file, which must stay as it is. So we check every line
    before we write, and cut off a half-written last row only when the next row takes its place.
    """

    BEGIN = b'{"options_hash": "'       # of each row

    def __init__(self, args, names, texts):
        self.path = args.jsonl
        self.options_hash = options_hash(args, texts)
        self.prompt_hashes = {name: short_hash(text) for name, text in zip(names, texts)}
        self.rows = {}                  # prompt's name -> its row
        self.cut_at = None              # where half a row begins, in bytes
        if os.path.exists(self.path):
            self.read()

    def read(self):
        """Fill `rows` from the file."""
        check_regular(self.path, MAX_TEXT_FILE)
        with reading(self.path):
            data = Path(self.path).read_bytes()
        *lines, tail = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            row = self.checked(line, number)
            self.rows[row["prompt"]] = row
        # A killed run leaves half a row, perhaps not even its whole beginning.
        if tail:
            if not lines and not (tail.startswith(self.BEGIN) or self.BEGIN.startswith(tail)):
                raise self.not_ours(1)
            self.cut_at = len(data) - len(tail)

    def checked(self, line, number):
        """A row of the file; UserError if it is none, or not one of this run."""
        try:
            row = json.loads(line)
            strings = [row[key] for key in ("prompt", "answer", "options_hash", "prompt_hash")]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.not_ours(number) from None
        if not all(isinstance(string, str) for string in strings):
            raise self.not_ours(number)
        for key in ("prompt_tokens", "new_tokens", "kept_bytes", "dense_bytes"):
            check_number(f"--jsonl {self.path}, line {number}", key, row.get(key), 0, LARGEST,
                         whole=True)
        if row["options_hash"] != self.options_hash:
            raise UserError(f"--jsonl {self.path} has answers of another model, of other options "
                            "or, for --keep and a --budget share, of other prompts: give another "
                            "file")
        name = row["prompt"]
        if name in self.prompt_hashes and row["prompt_hash"] != self.prompt_hashes[name]:
            raise UserError(f"--jsonl {self.path} has an answer to {quoted(name)}, which had "
                            "another text then: give another file")
        return row

    def not_ours(self, number):
        return UserError(f"--jsonl {self.path}, line {number}: no answer of generate.py")

    def add(self, row):
        """Write the row of an answer at the file's end."""
        hashes = dict(options_hash=self.options_hash,
                      prompt_hash=self.prompt_hashes[row["prompt"]])
        line = json.dumps({**hashes, **row}) + "\n"
        try:
            with open(self.path, "ab") as file:
                if self.cut_at is not None:
                    file.truncate(self.cut_at)
                    self.cut_at = None
                file.write(line.encode())
        except OSError as e:
            raise UserError(f"--jsonl {self.path} cannot be written: {reason(e)}") from None


def options_hash(args, texts):
    """A short hash of all that decides an answer besides its prompt."""
    names = ["model", "dtype", "gates", "admit", "tau", "keep", "dense", "budget", "evict",
             "select", "chat", "max_new_tokens", "temperature", "top_p", "seed"]
    # What is evicted depends on the other sequences, and so does what a sampler draws.
    if args.budget is not None or args.temperature >= COLDEST:
        names += ["batch", "chunk"]
    values = [getattr(args, name) for name in names]
    # tau and budget are chosen for all prompts together if they are shares.
    if args.keep is not None or isinstance(args.budget, float):
        values.append(sorted(texts))
    return short_hash(repr(values))


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_page(pieces, held, evicted, window, tau, title, kept_share):
    """An HTML page that needs nothing else: each token, colored by how many heads hold it.

    pieces: the text of the S tokens. held, evicted (L, Hkv, S) bool: by which heads.
    """
    data = json.dumps(dict(
        pieces=pieces, layers=held.shape[0], heads=held.shape[1], ring=window,
        bits=packed_bits(held), evicted=packed_bits(evicted) if evicted.any() else None, tau=tau,
        title=title, kept_share=kept_share))
    data = data.replace("<", "\\u003c")         # so that no text can end the script
    page = (HERE / "assets" / "kept.html").read_text(encoding="utf-8")
    return page.replace("{{data}}", data)


def packed_bits(mask):
    """A mask (L, Hkv, S) for the page, in base64: S rows of ceil(L * Hkv / 8) bytes.

    Head n of a token, counted layer by layer, is bit n % 8 of byte n // 8.
    """
    by_token = mask.cpu().flatten(0, 1).T                               # (S, L * Hkv) bool
    # Fill up the last byte of each token with zeros: 10 heads take 2 bytes, 6 bits of them unused.
    unused_bits = -by_token.shape[1] % 8
    bits = F.pad(by_token, (0, unused_bits)).reshape(-1, 8)             # (S * bytes, 8)
    # Bit n counts 2^n: the bits 1 0 1 0 0 0 0 0 become the byte 1 + 4 = 5.
    weights = 2 ** torch.arange(8)
    packed = (bits * weights).sum(dim=-1)                               # (S * bytes,)
    return base64.b64encode(bytes(packed.tolist())).decode()


# ----------------------------------------------------------------------------------------- options

COLDEST = 0.01          # lower temperatures are 0: dividing by almost nothing overflows
LARGEST = 2**63 - 1     # of the numbers that a tensor holds


def parse(argv):
    """The command line as a Namespace; UserError if it makes no sense."""
    parser = Parser(description=__doc__.partition("\n\nThe file is in")[0])
    text_options(parser)
    model_options(parser)
    cache_options(parser)
    decoding_options(parser)
    output_options(parser)
    args = parser.parse_args(argv)
    refuse_clashes(args)
    return args


def text_options(parser):
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", nargs="+", action="extend", metavar="FILE",
                       help="texts to read, - is standard input (default: tiny/example.txt)")
    group.add_argument("--batch", type=whole(1), metavar="N",
                       help="answer so many prompts at a time, the others wait (default: all)")
    group.add_argument("--chat", action="store_true",
                       help="put the prompt into the model's chat template")
    group.add_argument("--interactive", action="store_true",
                       help="then each line you type is a further turn")


def cache_options(parser):
    group = parser.add_argument_group("cache")
    group.add_argument("--gates", metavar="FILE", help="a gate file, or an official .pt (default: "
                       "gates.safetensors in the model's folder, else one of gates/ that fits)")
    group.add_argument("--admit", type=admission_rule, default="gates", metavar="RULE",
                       help="what is admitted: gates (the default) decide, all, none, or a random "
                       "share like 0.25")
    group.add_argument("--tau", type=real(0, 1), metavar="T",
                       help="admit where a gate is at least T (default: as the gate file says)")
    group.add_argument("--keep", type=keep_share, metavar="SHARE",
                       help="choose tau so that about this share of a dense cache's bytes is kept, "
                       "as in 15%% or 0.15: once, for the prompt (with --interactive the first) "
                       "and --max-new-tokens. The gate file needs quantiles: train.py --calibrate")
    group.add_argument("--dense", action="store_true", help="a dense cache: keep everything")
    group.add_argument("--budget", type=size_or_share, metavar="SIZE",
                       help="never hold more: bytes as in 256MiB, or a share of a dense cache, as "
                       "in 10%%")
    group.add_argument("--evict", choices=("gate", "snapkv"), default="gate",
                       help="what goes when the budget is full: the tokens of the lowest gate (the "
                       "default), or those that the last 256 queries attended to least")
    group.add_argument("--select", type=whole(1), metavar="N",
                       help="in decode, attend to at most N tokens of each layer and head")
    group.add_argument("--chunk", type=whole(1), default=4096, metavar="N",
                       help="prefill N tokens at once; fewer need less memory (default: 4096)")
    group.add_argument("--save-cache", metavar="FILE",
                       help="in the end write the cache to this file: read once, ask often")
    group.add_argument("--load-cache", metavar="FILE",
                       help="begin with a cache that --save-cache has written; the prompt goes on "
                       "from there")


def decoding_options(parser):
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=whole(0), default=128, metavar="N",
                       help="stop after so many tokens (default: 128; 0 only reads the prompt, for "
                       "--save-cache)")
    group.add_argument("--temperature", type=real(0), default=0.0, metavar="T",
                       help="sample at this temperature (default: 0; below "
                       f"{COLDEST} it is always the likeliest token)")
    group.add_argument("--top-p", type=real(0.001, 1), default=1.0, metavar="P",
                       help="sample only from the likeliest tokens of this total probability "
                       "(default: 1, from all)")


def output_options(parser):
    group = parser.add_argument_group("output")
    group.add_argument("--show-kept", metavar="FILE.html",
                       help="write a page that shows which tokens were kept, and which evicted")
    group.add_argument("--jsonl", metavar="FILE",
                       help="add each answer to this file as soon as it is done; prompts that it "
                       "has already are not answered again")
    group.add_argument("--json", action="store_true",
                       help="end with the figures as one line of JSON on stderr")


def admission_rule(text):
    """The type of --admit: "gates", or the share of tokens to admit."""
    if text == "gates":
        return text
    if text == "all":
        return 1.0
    if text == "none":
        return 0.0
    try:
        return real(0, 1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} should be gates, all, none or a share "
                                         "from 0 to 1") from None


def keep_share(text):
    """The type of --keep: 15% or 0.15."""
    if text.endswith("%"):
        return real(0, 100)(text[:-1]) / 100
    return real(0, 1)(text)


SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]*)?) ?(?P<unit>%|([KMGT]I?)?B?)", re.IGNORECASE)
BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_or_share(text):
    """The type of --budget: bytes as an int, or a share as a float."""
    match = SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no size like 256MiB and no share like 10%")
    number = float(match["number"])         # 400 digits are infinity
    unit = match["unit"].upper()
    if number > LARGEST:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is more than any memory")
    if unit == "%":
        return number / 100
    if 0 < number < 1 and unit == "":
        raise argparse.ArgumentTypeError(f"{quoted(text)} is less than a byte; a share is written "
                                         f"like {number:.0%}")
    return min(int(number * BYTES[unit.removesuffix("B")]), LARGEST)


def refuse_clashes(args):
    """UserError for options that do not go together, before anything slow."""
    several = args.prompt is not None and len(args.prompt) > 1
    own_admission = (args.gates is not None or args.admit != "gates" or args.tau is not None
                     or args.keep is not None)
    other_primitives = args.budget is not None or args.select is not None

    # What there can be only one of.
    single = args.interactive or args.show_kept is not None
    if single and (several or args.jsonl is not None):
        raise UserError("--interactive and --show-kept go with one prompt, not with several and "
                        "not with --jsonl")
    saved = args.save_cache is not None or args.load_cache is not None
    if saved and (several or args.jsonl is not None):
        raise UserError("--save-cache and --load-cache go with one prompt, not with several")

    # Who decides what is kept.
    if args.dense and (own_admission or other_primitives or args.show_kept is not None):
        raise UserError("--dense keeps everything: --gates, --admit, --tau, --keep, --budget, "
                        "--select and --show-kept do not go with it")
    if args.keep is not None and (args.tau is not None or args.admit != "gates"):
        raise UserError("--keep chooses a tau for gates: --tau and --admit do not go with it")
    if args.admit != "gates" and (args.gates is not None or args.tau is not None):
        raise UserError("--admit decides in place of gates: --gates and --tau do not go with it")
    if args.evict != "gate" and args.budget is None:
        raise UserError(f"--evict {args.evict} says what goes when a --budget is full: give one")
    if args.interactive and isinstance(args.budget, float):
        raise UserError("--budget as a share needs to know how long the text will be, and with "
                        "--interactive nobody does: give it in bytes, like 256MiB")

    # A loaded cache has its tau and its tokens already.
    if args.load_cache is not None:
        if args.keep is not None:
            raise UserError("--keep chooses tau for a new text: with --load-cache it is the one "
                            "that the cache was saved with")
        if args.show_kept is not None:
            raise UserError("--show-kept shows a text from its beginning: it does not go with "
                            "--load-cache")
        if isinstance(args.budget, float):
            raise UserError("--budget as a share is one of the prompt: with --load-cache give it "
                            "in bytes, like 256MiB")
        if args.prompt is None and not args.interactive:
            raise UserError("--load-cache needs a --prompt, or --interactive")

    # How to decode.
    if args.top_p < 1 and args.temperature < COLDEST:
        raise UserError(f"--top-p is for sampling: it needs a --temperature of at least {COLDEST}")
    if args.max_new_tokens == 0 and (args.save_cache is None or args.chat):
        raise UserError("--max-new-tokens 0 is for --save-cache without --chat")

    refuse_files(args)


def refuse_files(args):
    """UserError for files that cannot be written, or must not be."""
    for path in (args.show_kept, args.save_cache):
        if path is not None:
            check_writable(path)
    if args.jsonl is not None:
        check_appendable(args.jsonl)
        # An answer is found again by the name of its prompt.
        names = set()
        for name in args.prompt or []:
            if name in names:
                raise UserError(f"--jsonl knows prompts by their names, and {quoted(name)} is "
                                "given twice")
            names.add(name)
            if name == "-" or os.path.exists(name) and not os.path.isfile(name):
                raise UserError(f"--jsonl knows prompts by their names: {quoted(name)} is no "
                                "regular file, which has the same text in the next run")

    # No output may replace an input, or another output. (A cache may be saved to where it was
    # loaded from: that goes on in one file.)
    taken = [name for name in args.prompt or [] if name != "-"]
    if args.gates is not None:
        taken.append(args.gates)
    taken += [*model_files(args.model), os.path.join(args.model, "gates.safetensors")]
    for option, path in (("--jsonl", args.jsonl), ("--show-kept", args.show_kept),
                         ("--save-cache", args.save_cache)):
        if path is None:
            continue
        for other in taken:
            with reading(other):
                same = os.path.realpath(path) == os.path.realpath(other)
            if same:
                raise UserError(f"{option} {path} would overwrite {other}: give another file")
        taken.append(path)


def load_model(args, split=False):
    """The Llama that --model, --device and --dtype ask for.

    split: of several processes that torchrun started, each has its part of the heads.
    """
    device = pick_device(args.device)
    rank, processes = rank_and_processes() if split else (0, 1)
    return Llama.from_pretrained(args.model, device, DTYPES.get(args.dtype), rank, processes)


def make_admission(args, model):
    """(admission policy, its gate file or None) for --gates and --admit.

    A random policy takes window and tau from the gate file, if there is one, to be comparable.
    """
    file = args.gates
    if file is None:
        file = own_or_bundled_gates(args, model)
    gates = None
    if file is not None:
        gates = Gates.load(file, model)
        if file.endswith(".pt"):
            say(f"{file}: an official checkpoint names no window and no tau: they are the paper's "
                f"(window {gates.window}, tau {gates.tau})")
    if args.admit != "gates":
        c = model.config
        policy = RandomAdmission(args.admit, args.seed, first_head=c.rank * c.num_kv_heads)
        if gates is not None:
            policy.window = gates.window
            policy.tau = gates.tau
        return policy, None
    if gates is None:
        raise UserError(f"{args.model} has no gates.safetensors: name a file with --gates, train "
                        "one with train.py, or choose --dense or --admit all, none or a share")
    return gates, file


GATES = HERE / "gates"      # gates that come with this repository, for models that do not


def own_or_bundled_gates(args, model):
    """The gate file in the model's folder, else one of GATES that fits, else None."""
    file = os.path.join(args.model, "gates.safetensors")
    if os.path.exists(file):
        return file
    names = [model.name]
    config = os.path.join(args.model, "config.json")
    if os.path.exists(config):              # a copy in a folder of another name
        names.append(read_json(config).get("_name_or_path"))
    file = find_gates(GATES, model, names)
    if file is not None:
        say(f"{args.model} has no gates.safetensors: using {file}, which comes with this program")
    return file


def all_page_bytes(kv, tokens):
    """The pages of a text of so many tokens, if all that leave the window were promoted."""
    return kv.L * kv.Hkv * pages_for(max(0, tokens - kv.window)) * kv.page_bytes()


def tau_for(share, gates, kv, lengths):
    """The tau at which texts of these lengths keep about this share of a dense cache's bytes.

    kv: an empty cache of one sequence, which says what pages cost. One tau is for all texts
    together: the share is that of their sum. UserError for less than what their windows take.
    """
    def kept(tau):
        pages = sum(all_page_bytes(kv, n) * page_share(gates.quantiles, tau, n) for n in lengths)
        return len(lengths) * kv.fixed_bytes() + pages

    dense = 2 * kv.L * kv.Hkv * kv.D * kv.dtype.itemsize * sum(lengths)
    least = len(lengths) * kv.fixed_bytes() / dense
    if share < least:
        percent = math.ceil(1000 * least) / 10
        windows = "the window takes" if len(lengths) == 1 else "the windows take"
        raise UserError(f"--keep {share:.1%} of a dense cache of {sum(lengths):,} tokens is too "
                        f"little: without any promoted token {windows} {percent:.1f}%")
    shortest = min(gates.quantiles)
    longest = max(gates.quantiles)
    if min(lengths) < shortest or max(lengths) > longest:
        say(f"warning: the gates' quantiles are of texts from {shortest:,} to {longest:,} tokens; "
            f"at {max(lengths):,} another share than {share:.1%} may be kept")

    # What is kept falls as tau rises, so we halve an interval, of log tau.
    low = math.log(1e-30)
    high = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if kept(math.exp(middle)) > share * dense:
            low = middle
        else:
            high = middle
    return float(f"{math.exp(high):.6g}")               # short enough to be typed after --tau


def main(argv=None):
    args = parse(argv)
    if sys.stdout is None:
        raise UserError("standard output is closed, so there is no place for the answer")
    if sys.stdin is None:           # the shell closed it (<&-): the same as an empty one
        sys.stdin = open(os.devnull)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a terminal may not know every character
    with process_group(args):
        return run(args)


def run(args):
    """Answer what the options ask for, and report; returns the exit status."""
    if rank_and_processes()[1] > 1:
        refuse_several_processes(args)
    session = Session(args)
    status = 0
    try:
        session.run()
    except KeyboardInterrupt:
        unsaved = f": {args.save_cache} was not written" if args.save_cache is not None else ""
        say(f"\ninterrupted{unsaved}")
        status = 130
    except BrokenPipeError:         # `put` has dropped stdout: the reader has what it wanted
        pass
    session.report()
    return status


def refuse_several_processes(args):
    """UserError for options that only one process can do."""
    for name in ("interactive", "show_kept", "save_cache", "load_cache"):
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} goes with one process, not with several")
    if "-" in (args.prompt or []):
        raise UserError("--prompt - goes with one process: several cannot share standard input")


if __name__ == "__main__":
    sys.exit(run_program(main))
