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
import json
import math
import os
import re
import sys
from pathlib import Path

# Before torch: importing takes seconds, and from here on Ctrl-C is no traceback.
from common import (DTYPES, HERE, Parser, UserError, all_reduce_sum, check_writable, clock,
                    drop_stdout, model_options, peak_bytes, pick_device, printable, progress,
                    process_group, quoted, rank_and_processes, read_json, read_text, reading, real,
                    run_program, say, whole, write_text)

import torch
import torch.distributed as dist
import torch.nn.functional as F

from files import find_gates, page_share, saved_tau
from model import Llama
from tokenizer import Text, TextStream, token_texts
from wgkv import DenseCache, DualCache, Gates, P, RandomAdmission, pages_for


# ----------------------------------------------------------------------------------------- text in

def read_prompt(name):
    """The text of a file, or of standard input for "-", without the line ends at its end."""
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
    loop = DecodeStep(model, kv, end, choose, use_graph=steps > FEW_STEPS)
    loop.start(0, hidden)       # the prefill gives the first id, so 3 ids take 2 steps
    ahead = LAG if kv.capturable else 0
    pending = [HostCopy(loop.token)]        # ids on their way to the host, oldest first
    ended = [False] * len(hidden)
    started = 0
    with contextlib.ExitStack() as room:
        while pending or started < steps - 1:
            while started < steps - 1 and len(pending) <= ahead:
                # On a GPU no step may ask for memory, so we ask before, but not for all steps:
                # a reply can be much shorter than its limit. A CPU makes room step by step.
                if kv.capturable and started % kv.most_steps == 0:
                    room.close()
                    room.enter_context(kv.reserve(min(kv.most_steps, steps - 1 - started)))
                loop.run()
                pending.append(HostCopy(loop.token))
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
        self.agree()
        self.alive[these] = self.no_end()[these]

    def agree(self):
        """Of several processes all take the first one's ids, whatever the last bits of logits."""
        if self.model.config.processes > 1:
            dist.broadcast(self.token, 0)

    def no_end(self):
        """Which of the current ids are no end tokens: (B,) bool."""
        return (self.token[:, None] != self.ends).all(dim=1)

    def run(self):
        """Take a step: the first plainly, because it compiles kernels, the others by the graph."""
        if self.use_graph:
            self.kv.ensure_room(1)          # a replay does not ask, and a capture must not
        if self.kv.reallocations != self.reallocations:
            self.graph = None               # it holds addresses that have changed
            self.reallocations = self.kv.reallocations
            self.body()
        elif self.use_graph and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                  # records, runs nothing
                self.body()
            self.graph.replay()
        elif self.graph is not None:
            self.graph.replay()
            self.kv.take_room(1)
        else:
            self.body()
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
        self.agree()
        self.alive.logical_and_(self.no_end())


RUN = 16                # decode steps between two chunks of a prompt that is being read


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
        self.loop = DecodeStep(model, kv, end, choose, use_graph=steps > FEW_STEPS)
        self.prefill_s = self.decode_s = 0.0

    @torch.no_grad()
    def answers(self, prompts):
        """Yields (index of the prompt, ids of its answer) as soon as an answer is done.

        And the bytes that its sequence kept in the end, and what a dense cache would have held.
        """
        waiting = list(enumerate(prompts))
        free = list(range(self.kv.B))
        reading = None              # (sequence, index, chunks, tokens unread)
        said = {}                   # sequence -> (index, ids so far)
        self.kv.expect([len(prompt) for prompt in prompts[:self.kv.B]]
                       + [0] * (self.kv.B - len(prompts)))
        while waiting or reading or said:
            if reading is None and waiting and free and self.is_there(waiting[0][0]):
                b = free.pop(0)
                index, prompt = waiting.pop(0)
                chunks = prefill_chunks(self.model, self.kv.sequences(b), [prompt], self.chunk)
                reading = (b, index, chunks, len(prompt))
            if reading is not None:
                b, index, chunks, unread = reading
                unread -= self.read(chunks, b, last=unread)
                reading = (b, index, chunks, unread)
                if unread == 0:
                    reading = None
                    said[b] = (index, [int(self.loop.token[b])])
            if said:
                self.run(said, RUN if reading or waiting and free else self.kv.most_steps)
            for b, (index, ids) in list(said.items()):
                if ids[-1] in self.end or len(ids) == self.steps:
                    del said[b]
                    self.loop.alive[b] = False
                    sequence = self.kv.sequences(b)
                    kept, dense = sequence.kept_bytes(), sequence.dense_bytes()
                    sequence.reset()
                    free.append(b)
                    yield index, ids, kept, dense

    def is_there(self, index):
        """Has this prompt arrived? (Here all are there from the start.)"""
        return True

    def read(self, chunks, b, last):
        """Read a chunk into sequence b, and choose its first id if it was the last: its length."""
        start = clock(self.model.device)
        count, hidden = next(chunks)
        if count == last:
            self.loop.start(b, hidden)
        self.prefill_s += clock(self.model.device) - start
        self.advance(count)
        return count

    def run(self, said, most):
        """Some decode steps: as many as all answers can still take, and `most` at most."""
        start = clock(self.model.device)
        steps = min(most, P, *(self.steps - len(ids) for _, ids in said.values()))
        taken = torch.empty(steps, self.kv.B, dtype=torch.long, device=self.model.device)
        with contextlib.ExitStack() as room:
            if self.kv.capturable and steps > 0:
                room.enter_context(self.kv.reserve(steps))
            for n in range(steps):
                self.loop.run()
                taken[n] = self.loop.token
        for ids_of_step in taken.tolist():          # here the host waits, once a run
            for b, (_, ids) in said.items():
                if ids[-1] not in self.end:
                    ids.append(ids_of_step[b])
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
        # waits an exponential time at the rate p, and the first one to come is chosen.
        waiting = torch.empty_like(p).exponential_(generator=generator)
        first = (p / waiting).argmax(dim=-1, keepdim=True)              # (B, 1)
        return ids.gather(-1, first)[:, 0]

    return choose


def warm_up(model, kv):
    """Seconds that a GPU's first use takes: kernels are compiled, on a copy of the cache."""
    if model.device.type != "cuda":
        return 0.0
    start = clock(model.device)
    copy = kv.clone()
    hidden = prefill(model, copy, [[0] * 300] * kv.B, chunk=200)
    for _ in decode(model, copy, hidden, FEW_STEPS + 4):
        pass
    if isinstance(copy, DualCache) and copy.most_pages is not None:
        copy.evict(0)       # even the sinks: the first eviction would be a pause in the text
    return clock(model.device) - start


# ------------------------------------------------------------------------------------------ report

class Session:
    """A model, a cache and the conversation in it, with the figures that are shown at the end."""

    def __init__(self, args):
        self.args = args
        self.names = args.prompt or [str(HERE / "tiny" / "example.txt")]
        if args.load_cache and not args.prompt:
            self.names = []         # the conversation goes on with what is typed
        self.done = {}              # name -> the object of an answer that --jsonl has already
        if args.jsonl:
            self.done = read_answers(args.jsonl, args.model)
            self.names = [name for name in self.names if name not in self.done]
        texts = [read_prompt(name) for name in self.names]      # first: a wrong path fails fast
        self.text = Text(args.model)
        self.replies = 0
        self.last = None            # the last id decoded, not in the cache yet
        self.ids = []               # those in the cache
        if not args.load_cache:
            self.prompts = [self.encode(text) for text in texts]

        self.model = load_model(args, split=True)
        self.gates = None
        batch = max(1, min(len(texts), args.batch or len(texts)))
        if args.dense:
            self.kv = DenseCache(self.model, batch)
        else:
            admission, self.gates = make_admission(args, self.model)
            settings = dict(budget=self.budget(batch), evict_by=args.evict, select=args.select)
            tau = self.pick_tau(admission, settings)
            self.kv = DualCache(self.model, admission, batch, tau=tau, **settings)
        self.choose = None
        if args.temperature >= COLDEST:
            self.choose = sampler(args.temperature, args.top_p, args.seed, self.model.device)

        if args.load_cache:
            self.load_cache()
            self.prompts = [self.encode(text) for text in texts]
        self.warned = False
        self.first_use_s = warm_up(self.model, self.kv)
        self.prompt_tokens = self.new_tokens = 0
        self.prefill_s = self.decode_s = 0.0
        self.kept = self.dense = 0              # bytes of the sequences that several prompts had

    def pick_tau(self, admission, settings):
        """The cache's tau: of --tau or --keep, or as --load-cache has it; None: the gates' own."""
        args = self.args
        if args.load_cache is not None and args.tau is None:
            return saved_tau(args.load_cache)
        if args.keep is None or not self.prompts:               # --jsonl has all answers already
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
            budget = int(budget * numbers * self.model.dtype.itemsize)
        return budget

    def encode(self, text):
        """The ids of the next turn."""
        if self.args.chat:
            return self.text.turn(text, self.replies, self.last)
        if not self.ids:
            return self.text.encode(text)
        last = [] if self.last is None else [self.last]
        return last + self.text.encode(f"\n\n{text}", begin=False)

    def load_cache(self):
        """Go on where the process that wrote --load-cache has ended."""
        [self.ids], notes = self.kv.load(self.args.load_cache, self.model)
        self.replies, self.last = notes.get("replies"), notes.get("last")
        chat = notes.get("chat")
        if not isinstance(self.replies, int) or not isinstance(self.last, (int, type(None))):
            raise UserError(f"{self.args.load_cache}: its notes do not say where the text stops")
        if chat is not self.args.chat:
            raise UserError(f"{self.args.load_cache} was saved {'with' if chat else 'without'} "
                            "--chat: go on in the same way")

    def save_cache(self):
        """Write --save-cache: the cache, and where the conversation stands."""
        notes = dict(replies=self.replies, last=self.last, chat=self.args.chat)
        self.kv.save(self.args.save_cache, self.model, [self.ids], notes)
        say(f"{self.args.save_cache} written: the cache of {len(self.ids):,} tokens")

    def run(self):
        """Answer the prompts, then each line from the terminal."""
        if len(self.prompts) > 1 or self.args.jsonl:
            self.answer_all()
            return
        if self.prompts:
            self.answer()
        if self.args.interactive:
            for line in typed_lines():
                self.decode(self.prefill([self.encode(line)]))
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
        self.warn_if_too_long(self.prompts)
        names = self.args.prompt or self.names
        shown = 0                                               # names whose answers were printed
        total = sum(map(len, self.prompts))
        with progress(total, "reading", "tokens") as bar:
            server = Server(self.model, self.kv, self.args.max_new_tokens, self.text.end,
                            self.choose, self.args.chunk, bar.update)
            try:
                for index, ids, kept, dense in server.answers(self.prompts):
                    self.finish(index, ids, kept, dense)
                    while shown < len(names) and names[shown] in self.done:
                        self.show(names[shown])
                        shown += 1
            finally:                                            # also after Ctrl-C
                self.prefill_s, self.decode_s = server.prefill_s, server.decode_s
        for name in names[shown:]:                              # all that --jsonl had already
            self.show(name)

    def finish(self, index, ids, kept, dense):
        """Note an answer that is done: its text, its figures, its line for --jsonl."""
        stream = TextStream(self.text, continues=True)
        answer = "".join(map(stream.push, ids)) + stream.flush()
        prompt_tokens = len(self.prompts[index])
        self.prompt_tokens += prompt_tokens
        self.new_tokens += len(ids)
        self.kept += kept
        self.dense += dense
        name = self.names[index]
        self.done[name] = dict(prompt=name, answer=answer, prompt_tokens=prompt_tokens,
                               new_tokens=len(ids), kept_bytes=kept, dense_bytes=dense,
                               model=self.args.model)
        if self.args.jsonl and self.model.config.rank == 0:
            with open(self.args.jsonl, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[name]) + "\n")

    def show(self, name):
        print(f"==> {printable(name)} <==\n{self.done[name]['answer']}", flush=True)

    def prefill(self, prompts):
        """Read prompts into the cache; returns the hidden states that decode starts from."""
        self.warn_if_too_long(prompts)
        total = sum(len(prompt) for prompt in prompts)
        start = clock(self.model.device)
        with progress(total, "prefill", "tokens") as bar:
            hidden = prefill(self.model, self.kv, prompts, self.args.chunk, bar.update)
        self.prefill_s += clock(self.model.device) - start
        self.prompt_tokens += total
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
                print(stream.push(token), end="", flush=True)
        finally:                                                # also after Ctrl-C
            self.decode_s += clock(self.model.device) - start
            self.replies += 1
            print(stream.flush(), flush=True)

    def figures(self):
        """What --json prints."""
        processes = self.model.config.processes
        evicted = self.kv.num_evicted if self.args.budget is not None else 0
        counts = torch.tensor([self.kept or self.kv.kept_bytes(),
                               self.dense or self.kv.dense_bytes(), evicted],
                              device=self.model.device)
        own = int(counts[0])
        kept, dense, evicted = all_reduce_sum(counts, processes).tolist()
        evictions = {}
        if self.args.budget is not None:
            evictions = dict(evicted_tokens=evicted, evictions=self.kv.num_evictions,
                             final_tau=self.kv.tau_now)
        if processes > 1:
            heaviest = torch.tensor(own, device=self.model.device)
            dist.all_reduce(heaviest, dist.ReduceOp.MAX)
            evictions.update(processes=processes, heaviest_kept_bytes=int(heaviest))
        return dict(
            prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens,
            first_use_s=round(self.first_use_s, 4), prefill_s=round(self.prefill_s, 4),
            decode_s=round(self.decode_s, 4), kept_share=round(kept / dense, 4) if dense else None,
            kept_bytes=kept, dense_bytes=dense, peak_bytes=peak_bytes(self.model.device),
            model=self.args.model, gates=self.gates, device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."), seed=self.args.seed,
            tau=None if self.args.dense else self.kv.tau, **evictions)

    def report(self):
        """The figures, for people."""
        f = self.figures()
        if f["kept_share"] is None:             # --jsonl, and its file has all answers already
            return say("no prompt was read")
        prefill_rate = self.prompt_tokens / max(self.prefill_s, 1e-9)
        decode_rate = self.new_tokens / max(self.decode_s, 1e-9)
        say(f"prompt   {self.prompt_tokens:8,} tokens")
        if self.first_use_s:
            say(f"compile  {self.first_use_s:8.2f} s   (the kernels, at a process's first use; not "
                "in the times below)")
        say(f"prefill  {self.prefill_s:8.2f} s   {prefill_rate:10,.1f} tokens/s")
        say(f"decode   {self.decode_s:8.2f} s   {decode_rate:10,.1f} tokens/s   "
            f"({self.new_tokens} tokens)")
        say(f"kept     {f['kept_share']:8.1%}     {f['kept_bytes'] / 2**20:10,.2f} MiB, where a "
            f"dense cache holds {f['dense_bytes'] / 2**20:,.2f} MiB")
        if "processes" in f:
            heaviest = f["heaviest_kept_bytes"] / (f["kept_bytes"] / f["processes"])
            say(f"         ({f['processes']} processes; the heaviest keeps {heaviest:.2f} times "
                "the mean)")
        if f["kept_share"] > 1:
            say("         (more than dense: whole pages and tables cost more than was refused)")
        if self.args.keep is not None and self.prompts:
            say(f"tau      {f['tau']:8.3g}     chosen for --keep {self.args.keep:.1%}")
        if self.args.budget is not None:
            say(f"evicted  {f['evicted_tokens']:8,} tokens of all heads   (evictions: "
                f"{self.kv.num_evictions}; tau is now {self.kv.tau_now:.3g})")
        say(f"peak     {f['peak_bytes'] / 2**20:8,.0f} MiB of memory")
        if self.args.json:
            say(json.dumps(f))

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
            self.kv.tau_now, f"{self.model.name}, {decided_by}",
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


def read_answers(path, model):
    """{prompt: object} of the answers that a --jsonl file has; nothing if there is no file.

    A last line that a killed run left half-written is cut off the file.
    """
    if not os.path.exists(path):
        return {}
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_text(path, "".join(lines[:-1]))
        lines.pop()
    done = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            done[row["prompt"]] = dict(row, answer=str(row["answer"]))
            other = row["model"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--jsonl {path}, line {number}: no answer of generate.py") from None
        if other != model:
            raise UserError(f"--jsonl {path} has answers of another model, {quoted(other)}: give "
                            "another file")
    return done


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
    by_token = mask.cpu().flatten(0, 1).T                               # (S, L * Hkv)
    unused_bits = -by_token.shape[1] % 8
    bits = F.pad(by_token, (0, unused_bits)).reshape(-1, 8)             # (S * bytes, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=-1)   # (S * bytes,)
    return base64.b64encode(bytes(packed.tolist())).decode()


# ----------------------------------------------------------------------------------------- options

COLDEST = 0.01          # lower temperatures are 0: dividing by almost nothing overflows


def parse(argv):
    """The command line as a Namespace; UserError if it makes no sense."""
    parser = Parser(description=__doc__.partition("\n\nThe file is in")[0])
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", nargs="+", metavar="FILE",
                       help="texts to read, - is standard input (default: tiny/example.txt)")
    group.add_argument("--batch", type=whole(1), metavar="N",
                       help="answer so many prompts at a time, the others wait (default: all)")
    group.add_argument("--chat", action="store_true",
                       help="put the prompt into the model's chat template")
    group.add_argument("--interactive", action="store_true",
                       help="then each line you type is a further turn")
    model_options(parser)
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
    group = parser.add_argument_group("output")
    group.add_argument("--show-kept", metavar="FILE.html",
                       help="write a page that shows which tokens were kept, and which evicted")
    group.add_argument("--jsonl", metavar="FILE",
                       help="add each answer to this file as soon as it is done; prompts that it "
                       "has already are not answered again")
    group.add_argument("--json", action="store_true",
                       help="end with the figures as one line of JSON on stderr")
    args = parser.parse_args(argv)
    refuse_clashes(args)
    return args


def admission_rule(text):
    """The type of --admit: "gates", or the share of tokens to admit."""
    if text == "gates":
        return text
    return real(0, 1)({"all": "1", "none": "0"}.get(text, text))


def keep_share(text):
    """The type of --keep: 15% or 0.15."""
    if text.endswith("%"):
        return real(0, 100)(text[:-1]) / 100
    return real(0, 1)(text)


SIZE = re.compile(r"(\d+(?:\.\d*)?) ?(?:([KMGT]i?)?B?|(%))", re.IGNORECASE)


def size_or_share(text):
    """The type of --budget: bytes as an int, or a share as a float."""
    match = SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no size like 256MiB and no share like 10%")
    number, unit, percent = float(match[1]), (match[2] or "").upper(), match[3]
    if percent:
        return number / 100
    base = 1024 if unit.endswith("I") else 1000
    return int(number * base ** " KMGT".index(unit[:1] or " "))


def refuse_clashes(args):
    """UserError for options that do not go together, before anything slow."""
    several = args.prompt is not None and len(args.prompt) > 1
    own_admission = (args.gates is not None or args.admit != "gates" or args.tau is not None
                     or args.keep is not None)
    other_primitives = args.budget is not None or args.select is not None
    single = args.interactive or args.show_kept is not None
    if single and (several or args.jsonl is not None):
        raise UserError("--interactive and --show-kept go with one prompt, not with several and "
                        "not with --jsonl")
    if args.dense and (own_admission or other_primitives or args.show_kept is not None):
        raise UserError("--dense keeps everything: --gates, --admit, --tau, --keep, --budget, "
                        "--select and --show-kept do not go with it")
    if args.keep is not None and (args.tau is not None or args.admit != "gates"):
        raise UserError("--keep chooses a tau for gates: --tau and --admit do not go with it")
    if args.keep is not None and args.load_cache is not None:
        raise UserError("--keep chooses tau for a new text: with --load-cache it is the one that "
                        "the cache was saved with")
    if args.interactive and isinstance(args.budget, float):
        raise UserError("--budget as a share needs to know how long the text will be, and with "
                        "--interactive nobody does: give it in bytes, like 256MiB")
    if args.evict != "gate" and args.budget is None:
        raise UserError(f"--evict {args.evict} says what goes when a --budget is full: give one")
    if args.top_p < 1 and args.temperature < COLDEST:
        raise UserError(f"--top-p is for sampling: it needs a --temperature of at least {COLDEST}")
    saved = args.save_cache is not None or args.load_cache is not None
    if saved and (several or args.jsonl is not None):
        raise UserError("--save-cache and --load-cache go with one prompt, not with several")
    if args.load_cache is not None and args.show_kept is not None:
        raise UserError("--show-kept shows a text from its beginning: it does not go with "
                        "--load-cache")
    if args.load_cache is not None and isinstance(args.budget, float):
        raise UserError("--budget as a share is one of the prompt: with --load-cache give it in "
                        "bytes, like 256MiB")
    if args.load_cache is not None and args.prompt is None and not args.interactive:
        raise UserError("--load-cache needs a --prompt, or --interactive")
    if args.max_new_tokens == 0 and (args.save_cache is None or args.chat):
        raise UserError("--max-new-tokens 0 is for --save-cache without --chat")
    for path in (args.show_kept, args.jsonl, args.save_cache):
        if path is not None:
            check_writable(path)


def load_model(args, split=False):
    """The Llama that --model, --device and --dtype ask for.

    split: of several processes that torchrun started, each has its part of the heads.
    """
    device = pick_device(args.device)
    share = rank_and_processes() if split else (0, 1)
    return Llama.from_pretrained(args.model, device, DTYPES.get(args.dtype), *share)


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


def tau_for(share, gates, kv, lengths):
    """The tau at which texts of these lengths keep about this share of a dense cache's bytes.

    kv: an empty cache of one sequence, which says what pages cost. One tau is for all texts
    together: the share is that of their sum. UserError for less than what their windows take.
    """
    def page_bytes(tokens):
        """Of all promoted tokens, if every token were promoted."""
        return kv.L * kv.Hkv * pages_for(max(0, tokens - kv.window)) * kv.page_bytes()

    def kept(tau):
        return len(lengths) * kv.fixed_bytes() + sum(
            page_bytes(n) * page_share(gates.quantiles, tau, n) for n in lengths)

    dense = 2 * kv.L * kv.Hkv * kv.D * kv.dtype.itemsize * sum(lengths)
    least = len(lengths) * kv.fixed_bytes() / dense
    if share < least:
        percent = math.ceil(1000 * least) / 10
        windows = "the window takes" if len(lengths) == 1 else "the windows take"
        raise UserError(f"--keep {share:.1%} of a dense cache of {sum(lengths):,} tokens is too "
                        f"little: without any promoted token {windows} {percent:.1f}%")
    shortest, longest = min(gates.quantiles), max(gates.quantiles)
    if min(lengths) < shortest or max(lengths) > longest:
        say(f"warning: the gates' quantiles are of texts from {shortest:,} to {longest:,} tokens; "
            f"at {max(lengths):,} another share than {share:.1%} may be kept")

    # What is kept falls as tau rises, so we halve an interval, of log tau.
    low, high = math.log(1e-30), 0.0
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
        say("\ninterrupted")
        status = 130
    except BrokenPipeError:         # `| head`: the reader has what it wanted
        drop_stdout()
    session.report()
    return status


def refuse_several_processes(args):
    """UserError for options that only one process can do."""
    for name in ("interactive", "show_kept", "save_cache", "load_cache"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} goes with one process, not with several")
    if "-" in (args.prompt or []):
        raise UserError("--prompt - goes with one process: several cannot share standard input")


if __name__ == "__main__":
    sys.exit(run_program(main))
