"""A text file in, text out, with a KV cache that keeps only what its gates admit.

    python generate.py                              the bundled model answers tiny/example.txt
    python generate.py --prompt a.txt               another text; "-" reads standard input
    python generate.py --prompt a.txt b.txt         two texts, decoded as one batch
    python generate.py --prompt a.txt --dense       keep everything, for comparison
    python generate.py --prompt a.txt --admit none  keep only the sliding window
    python generate.py --prompt a.txt --model ~/Llama-3.2-1B-Instruct --gates g.safetensors --chat

The answer goes to stdout while it is made, everything else to stderr.

In this order: text and tokens, prefill, decode, the page of --show-kept, the program. To read the
loop that every language model runs, start at `prefill` and `decode`.
"""
import argparse
import base64
import codecs
import contextlib
import datetime
import functools
import json
import os
import re
import secrets
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders

from common import (DTYPES, HERE, Parser, UserError, check_number, check_writable, clock,
                    drop_stdout, model_options, peak_bytes, pick_device, printable, progress,
                    quoted, read_json, read_text, reading, real, run_program, say, whole,
                    write_text)
from model import Llama, find_folder
from wgkv import DenseCache, DualCache, Gates, RandomAdmission

# Strings with a random number in them: no text contains one, not even a text written to attack us.
SECRET = secrets.token_hex(16)
USER = f"user{SECRET}"              # stands for the user's text while a chat template is rendered,
REPLY = f"reply{SECRET}"            # for a reply that is in the cache already,
PAST = f"past{SECRET}"              # and for an earlier text of the user's

BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)       # <think>, [INST], <|im_start|>
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


# --------------------------------------------------------------------------------- text and tokens

class Text:
    """The text side of a model's folder: its tokenizer, end tokens and chat template.

    A tokenizer turns a string like "<|end|>" into a control token wherever it stands. In a user's
    text it must not: a document could forge the turns of a chat. So there are two tokenizers here,

        self.tokenizer    the folder's own
        self.plain        the same, except that each control token has a secret name

    and we encode with the second. Where we want a control token, we write its secret name. With
    one call for a whole text, no token boundary changes: a text without such strings gets exactly
    the ids that self.tokenizer gives.
    """

    def __init__(self, path):
        self.folder = find_folder(path)
        self.file = os.path.join(self.folder, "tokenizer.json")
        self.tokenizer = load_tokenizer(self.folder, self.file)
        with reading(self.file, "used as a tokenizer"):
            self.begin = begin_tokens(self.tokenizer)
            self.hide_control_tokens()
        self.end = end_tokens(self.folder)
        # Byte-level tokenizers (Llama 3, Qwen) spell every token in letters that stand for bytes.
        self.byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)

    def hide_control_tokens(self):
        """Make self.plain, the secret `names` of control tokens, and what `plain`'s ids mean."""
        self.plain = Tokenizer(self.tokenizer.model)        # shares the vocabulary
        self.plain.normalizer = self.tokenizer.normalizer
        self.plain.pre_tokenizer = self.tokenizer.pre_tokenizer
        self.special = set()        # ids that decode leaves out
        self.names = {}             # "<|end|>" -> its secret name
        self.own_ids = {}           # id in self.plain -> id in self.tokenizer, where they differ
        for token_id, token in sorted(self.tokenizer.get_added_tokens_decoder().items()):
            name = token.content
            if token.special:
                self.special.add(token_id)
            # Qwen3's <think> and <tool_call> control the model but are not flagged as special.
            # Added tokens of another look are text: runs of spaces, rare letters.
            control = token.special or BRACKETED.fullmatch(name)
            if control:
                name = f"<{SECRET}:{token_id}>"
                self.names[token.content] = name
            self.plain.add_tokens([AddedToken(
                name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                normalized=token.normalized and not control)])
            self.own_ids[self.plain.token_to_id(name)] = token_id
        # Control tokens that the vocabulary itself can spell, which is rare (Unigram models).
        self.spelled = {self.plain.token_to_id(string): string for string in self.names}
        self.spelled.pop(None, None)
        # At one place the longest control token counts, as in the tokenizer. (?!) matches nothing.
        longest_first = sorted(self.names, key=len, reverse=True)
        self.control_strings = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, text, begin=True, control=False):
        """The token ids of a text. Strings like "<|end|>" in it are text.

        begin:    put the begin token first that the tokenizer asks for
        control:  strings like "<|end|>" are control tokens: for texts that no user has written
        """
        if control:
            text = self.with_names(text)
        ids = self.encode_named(text)
        return self.with_begin(ids) if begin else ids

    def with_begin(self, ids):
        """ids after one begin token, if the tokenizer asks for it: some templates print it too."""
        if ids[:len(self.begin)] == self.begin:
            return ids
        return self.begin + ids

    def with_names(self, text):
        """text with each control token under its secret name, so that `plain` recognises it."""
        return self.control_strings.sub(lambda found: self.names[found[0]], text)

    def encode_named(self, text):
        """The token ids of a text in which control tokens stand under their secret names."""
        with reading(self.file, "used on this text"):       # for instance a lone surrogate
            ids = self.plain.encode(text, add_special_tokens=False).ids
        for token in self.spelled.keys() & set(ids):
            if self.spelled[token] in text:
                raise UserError(f"{self.file} cannot encode {self.spelled[token]} as text: it "
                                "always becomes the control token")
        return [self.own_ids.get(token, token) for token in ids]

    def decode(self, ids):
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def shown(self, token):
        """The string of a token in the vocabulary, or None if decode leaves that token out."""
        if token in self.special:
            return None
        return self.tokenizer.id_to_token(token)

    def is_byte(self, token):
        """Is it a byte of byte fallback, like <0xE2>?"""
        return BYTE_TOKEN.fullmatch(self.shown(token) or "") is not None

    def pieces(self, ids):
        """The text of each token, for a picture. What several tokens spell goes to the last one."""
        stream = TextStream(self)
        pieces = []
        for i, token in enumerate(ids):
            piece = stream.push(token)
            if token in self.special:
                piece = self.tokenizer.id_to_token(token)
            run_ends = i + 1 == len(ids) or not self.is_byte(ids[i + 1])
            if self.is_byte(token) and run_ends:
                piece += stream.flush()
            pieces.append(piece)
        pieces[-1] += stream.flush()
        return pieces

    # ------------------------------------------------------------------------------ chat templates

    @functools.cached_property
    def template(self):
        """The folder's chat template, compiled, with the special tokens that it may print."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment    # it is code from the folder
        settings = read_json(os.path.join(self.folder, "tokenizer_config.json"), required=False)
        source = settings.get("chat_template")
        if isinstance(source, list):        # several, by name
            named = [entry for entry in source if isinstance(entry, dict)]
            source = [entry.get("template") for entry in named if entry.get("name") == "default"]
            source = source[0] if source else None
        file = os.path.join(self.folder, "chat_template.jinja")
        if os.path.lexists(file):
            source = read_text(file)
        if not isinstance(source, str) or not source:
            raise UserError(f"{self.folder} has no chat template, neither chat_template.jinja nor "
                            "one in tokenizer_config.json")
        # The environment that transformers gives to templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                environment.globals[name] = token
        with reading(f"{self.folder}: the chat template", "compiled"):
            return environment.from_string(source)

    def chat(self, messages):
        """A conversation as text, up to where the model's next reply begins, by the template."""
        limit = 2**20 + 4 * sum(len(message["content"]) for message in messages)
        parts = []
        size = 0
        # Whatever a template does, dividing by zero or recursing, becomes one line.
        with reading(f"{self.folder}: the chat template", "rendered"):
            for part in self.template.generate(messages=messages, add_generation_prompt=True):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise UserError(f"{self.folder}: the chat template prints more than {limit:,} "
                                    "characters")
        return "".join(parts)

    def turn(self, content, replies=0, last=None):
        """The ids of a user's turn in a chat, up to where the model's reply begins.

        replies: how many replies came before. The first turn is the whole conversation so far. A
        later one is only what it adds: the conversation is in the cache already, as it was said
        (a template may render it differently, for instance without a reply's thoughts).
        last: the last id of the reply before this turn, which is not in the cache yet.

        """
        text = self.insert(content, replies)
        if last is None:
            return self.with_begin(self.encode_named(text))
        # A reply that the model has ended is not ended twice: the template's end token stands for
        # the model's own, together with what the template prints before it (Llama 2: a space).
        ends = [name for string, name in self.names.items()
                if self.tokenizer.token_to_id(string) in self.end]
        if last in self.end and text.lstrip().startswith(tuple(ends)):
            return self.encode_named(text.lstrip())
        return [last] + self.encode_named(text)

    def insert(self, content, replies):
        """The text of a user's turn, with secret names for the template's own control tokens only.

        We render the template twice, with the user's text and with a mark in its place. If it only
        inserts what it is given, we know which part of the result is the user's text.
        """
        core = content.strip()      # the spaces around it stay: the template may trim them
        marked = self.render_turn(content.replace(core, USER, 1), replies)
        complete = self.render_turn(content, replies)
        if marked.replace(USER, core) == complete:
            return self.with_names(marked).replace(USER, core)
        found = self.control_strings.search(content)
        if found:
            raise UserError(f"{self.folder}: the chat template changes the texts it is given, so "
                            f"they must not contain the control token {found[0]}")
        return self.with_names(complete)

    def render_turn(self, content, replies):
        """What a user's turn adds to the rendered text of a conversation with so many replies."""
        messages = []
        for _ in range(replies):
            messages.append({"role": "user", "content": PAST})
            messages.append({"role": "assistant", "content": REPLY})
        text = self.chat([*messages, {"role": "user", "content": content}])
        if replies == 0:
            return text
        _, found, added = text.rpartition(REPLY)
        if not found:
            raise UserError(f"{self.folder}: the chat template does not print the replies it is "
                            "given, so a chat cannot go on after the first one")
        return added


def load_tokenizer(folder, file):
    """The Tokenizer in a folder's tokenizer.json, without the truncation saved with some."""
    if not os.path.exists(file) and os.path.exists(os.path.join(folder, "tokenizer.model")):
        raise UserError(
            f"{folder} has tokenizer.model but no tokenizer.json; to convert it: python -c \"from "
            f"transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\"")
    read_json(file)         # a clear error if it is absent or broken
    with reading(file, "read as a tokenizer"):
        tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def begin_tokens(tokenizer):
    """What the tokenizer's post-processor puts before a text: a begin token, or nothing."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    for start in range(len(full)):
        if full[start:start + len(bare)] == bare:
            return full[:start]
    return []


def end_tokens(folder):
    """The union of the end tokens that a folder's files name: a chat model often has two."""
    end = set()
    for name in ("config.json", "generation_config.json"):
        file = os.path.join(folder, name)
        tokens = read_json(file, required=False).get("eos_token_id")
        if tokens is None:
            continue
        if not isinstance(tokens, list):
            tokens = [tokens]
        for token in tokens:
            end.add(check_number(file, "eos_token_id", token, 0, 2**31 - 1, whole=True))
    return end


def raise_exception(message):
    """What a chat template calls to refuse a conversation."""
    raise ValueError(message)


def strftime_now(pattern):
    """What a chat template calls to print the date."""
    return datetime.datetime.now().strftime(pattern)


# ----------------------------------------------------------------------------------- streamed text

class TextStream:
    """Text out of a growing list of ids: `push` returns what no later token can change.

    Together the pieces are exactly text.decode(ids). The difficulty is a character in several
    tokens, of which there are two kinds:

        byte-level     every token is some bytes. They go through an incremental UTF-8 decoder.
        byte-fallback  (Llama 2, Mistral) a rare character is a run of tokens like <0xE2>. A single
                       bad byte makes the whole run unreadable, so we wait until the run ends.

    context: the ids before. If there are any, the stream is not the beginning of a text, and a
    first space stays, which these decoders drop at a beginning. So it gives what decode(context +
    ids) adds to decode(context).
    """

    def __init__(self, text, context=()):
        self.text = text
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.waiting = []           # ids whose text was not returned yet (byte fallback)
        self.before = []            # the last token with a text of its own: enough of a context
        for token in reversed(context):
            if text.shown(token) is not None and not text.is_byte(token):
                self.before = [token]
                break

    def push(self, token):
        """Add a token; return the text that is now certain, often that of the token."""
        letters = self.text.shown(token)
        if letters is None:
            return ""
        if self.text.byte_level:
            return self.utf8.decode(token_bytes(letters))
        self.waiting.append(token)
        if self.text.is_byte(token):
            return ""
        return self.take()

    def take(self):
        """Return the text of the waiting tokens."""
        new = self.text.decode(self.before + self.waiting)[len(self.text.decode(self.before)):]
        self.before = self.waiting[-1:] or self.before
        self.waiting = []
        return new

    def flush(self):
        """Return the rest: half a character comes out as the replacement character."""
        return self.utf8.decode(b"", final=True) + self.take()


def byte_letters():
    """The alphabet of byte-level BPE: {letter: byte}.

    A printable byte is its own letter, the others are U+0100, U+0101, ... in turn: a space, the
    33rd of them, is U+0120.
    """
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other_bytes = [byte for byte in range(256) if byte not in printable_bytes]
    letters = {chr(byte): byte for byte in printable_bytes}
    for n, byte in enumerate(other_bytes):
        letters[chr(256 + n)] = byte
    return letters


BYTE_LETTERS = byte_letters()


def token_bytes(letters):
    """The bytes of a token of a byte-level vocabulary; an added token is written in plain text."""
    if all(letter in BYTE_LETTERS for letter in letters):
        return bytes(BYTE_LETTERS[letter] for letter in letters)
    return letters.encode()


# ------------------------------------------------------------------------------ prefill and decode

@torch.no_grad()
def prefill(model, kv, prompts, chunk=4096, progress=lambda tokens: None):
    """Read prompts, B lists of ids, into the cache.

    Returns the hidden state (B, hidden_size) of each prompt's last token. A long prompt goes
    through the model in chunks, so that activations stay small. Shorter prompts are padded.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")       # (B,)
    longest = int(lengths.max())
    if int(lengths.min()) < 1:
        raise ValueError("a prompt needs at least one token")
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device="cpu")     # (B, longest)
    for b, prompt in enumerate(prompts):
        tokens[b, :len(prompt)] = torch.tensor(prompt)
    padded = bool((lengths < longest).any())

    # The cache can grow once, now, rather than copy itself again and again.
    if hasattr(kv, "expect"):
        kv.expect(int((kv.num_tokens.cpu() + lengths).max()))

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
        progress(int(counts.sum()))
    return last


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
    loop = DecodeStep(model, kv, hidden, end, choose, use_graph=steps > FEW_STEPS)
    ahead = LAG if kv.capturable else 0
    pending = [HostCopy(loop.token)]        # ids on their way to the host, oldest first
    ended = [False] * len(hidden)
    started = 0
    # A CPU can make room step by step; set aside at once, `steps` may be more than memory holds.
    room = kv.reserve(steps) if kv.capturable else contextlib.nullcontext()
    with room:
        while pending or started < steps - 1:
            while started < steps - 1 and len(pending) <= ahead:
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

    def __init__(self, model, kv, hidden, end, choose, use_graph):
        self.model = model
        self.kv = kv
        self.choose = choose or greedy
        self.ends = torch.tensor(sorted(end), dtype=torch.long, device=model.device)
        self.logits = model.logits(hidden)                      # (B, vocab)
        self.token = self.choose(self.logits)                   # (B,)
        self.alive = self.no_end()                              # (B,) bool
        self.use_graph = use_graph and kv.capturable
        self.choice_in_graph = choose is None                   # a sampler's state is on the host
        self.warm = False
        self.graph = None

    def no_end(self):
        """Which of the current ids are no end tokens: (B,) bool."""
        return (self.token[:, None] != self.ends).all(dim=1)

    def run(self):
        """Take a step."""
        if self.use_graph and self.warm and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                  # records, runs nothing
                self.body()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.body()
        if not self.choice_in_graph:
            self.pick()
        self.warm = True                                        # the first step compiles kernels

    def body(self):
        """What the graph holds."""
        on_cpu = self.token.device.type == "cpu"
        all_alive = on_cpu and bool(self.alive.all())           # a GPU would have to be waited for
        lengths = None if all_alive else self.alive.long()      # (B,) 1 or 0 valid tokens
        hidden = self.model(self.token[:, None], self.kv, lengths)      # (B, 1, hidden_size)
        self.logits.copy_(self.model.logits(hidden[:, 0]))
        if self.choice_in_graph:
            self.pick()

    def pick(self):
        """Choose the next ids."""
        self.token.copy_(self.choose(self.logits))
        self.alive.logical_and_(self.no_end())


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


def warm_up(model, kv):
    """Seconds that a GPU's first use takes: kernels are compiled, on a copy of the cache."""
    if model.device.type != "cuda":
        return 0.0
    start = clock(model.device)
    copy = kv.clone()
    hidden = prefill(model, copy, [[0] * 300] * kv.B, chunk=200)
    for _ in decode(model, copy, hidden, FEW_STEPS + 4):
        pass
    return clock(model.device) - start


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


# -------------------------------------------------------------------------- the page of --show-kept

def kept_page(pieces, admitted, window, tau, title, kept_share):
    """An HTML page that needs nothing else: each token, coloured by how many heads admitted it.

    pieces: the text of the S tokens. admitted (L, Hkv, S) bool. The page gets that in base64, as S
    rows of ceil(L * Hkv / 8) bytes: head n of a token, counted layer by layer, is bit n % 8 of
    byte n // 8.
    """
    by_token = admitted.cpu().flatten(0, 1).T                           # (S, L * Hkv)
    unused_bits = -by_token.shape[1] % 8
    bits = F.pad(by_token, (0, unused_bits)).reshape(-1, 8)             # (S * bytes, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=-1)   # (S * bytes,)
    data = json.dumps(dict(
        pieces=pieces, layers=admitted.shape[0], heads=admitted.shape[1], ring=window,
        bits=base64.b64encode(bytes(packed.tolist())).decode(), tau=tau, title=title,
        kept_share=kept_share))
    data = data.replace("<", "\\u003c")         # so that no text can end the script
    page = (HERE / "assets" / "kept.html").read_text(encoding="utf-8")
    return page.replace("{{data}}", data)


# ------------------------------------------------------------------------------------- the program

def parse(argv):
    """The command line as a Namespace; UserError if it makes no sense."""
    parser = Parser(description=__doc__.partition("\n\nIn this order")[0])
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", nargs="+", metavar="FILE",
                       help="texts to read, - is standard input (default: tiny/example.txt)")
    group.add_argument("--chat", action="store_true",
                       help="put the prompt into the model's chat template")
    group.add_argument("--interactive", action="store_true",
                       help="then each line you type is a further turn")
    model_options(parser)
    group = parser.add_argument_group("cache")
    group.add_argument("--gates", metavar="FILE", help="a gate file, or an official .pt (default: "
                       "gates.safetensors in the model's folder)")
    group.add_argument("--admit", type=admission_rule, default="gates", metavar="RULE",
                       help="what is admitted: gates (the default) decide, all, none, or a random "
                       "share like 0.25")
    group.add_argument("--tau", type=real(0, 1), metavar="T",
                       help="admit where a gate is at least T (default: as the gate file says)")
    group.add_argument("--dense", action="store_true", help="a dense cache: keep everything")
    group.add_argument("--chunk", type=whole(1), default=4096, metavar="N",
                       help="prefill N tokens at once; fewer need less memory (default: 4096)")
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=whole(1, 10**6), default=128, metavar="N",
                       help="stop after so many tokens (default: 128)")
    group.add_argument("--temperature", type=sane_temperature, default=0.0, metavar="T",
                       help="sample at this temperature (default: 0, always the likeliest token)")
    group.add_argument("--top-p", type=real(0.001, 1), default=1.0, metavar="P",
                       help="sample only from the likeliest tokens of this total probability "
                       "(default: 1, from all)")
    group = parser.add_argument_group("output")
    group.add_argument("--show-kept", metavar="FILE.html",
                       help="write a page that shows which tokens were kept")
    group.add_argument("--json", action="store_true",
                       help="end with the figures as one line of JSON on stderr")
    args = parser.parse_args(argv)
    refuse_clashes(args)
    return args


def admission_rule(text):
    """The type of --admit: "gates", or the share of tokens to admit."""
    if text == "gates":
        return text
    shares = {"all": 1.0, "none": 0.0}
    if text in shares:
        return shares[text]
    try:
        return real(0, 1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError("should be gates, all, none or a share from 0 to 1, it is "
                                         f"{quoted(text)}") from None


def sane_temperature(text):
    """The type of --temperature: dividing by almost nothing would give infinite logits."""
    value = real(0)(text)
    if 0 < value < 0.01:
        raise argparse.ArgumentTypeError(f"should be 0 or at least 0.01, it is {quoted(text)}")
    return value


def refuse_clashes(args):
    """UserError for options that do not go together, before anything slow."""
    several = args.prompt is not None and len(args.prompt) > 1
    admission = args.gates is not None or args.admit != "gates" or args.tau is not None
    if args.interactive and several:
        raise UserError("--interactive goes with one prompt, not with several")
    if args.interactive and args.prompt == ["-"]:
        raise UserError("--interactive reads further turns from standard input, so the prompt "
                        "cannot come from there")
    if args.interactive and sys.stdin is None:
        raise UserError("--interactive reads further turns from standard input, which is closed")
    if args.show_kept is not None and (several or args.dense):
        raise UserError("--show-kept goes with one prompt and with the dual cache, not with "
                        "several prompts or --dense")
    if args.dense and admission:
        raise UserError("--dense keeps everything: --gates, --admit and --tau do not go with it")
    if args.top_p < 1 and args.temperature == 0:
        raise UserError("--top-p is for sampling, which needs a --temperature above 0")
    if args.show_kept is not None:
        check_writable(args.show_kept)
    if sys.stdout is None:
        raise UserError("standard output is closed, so there is no place for the answer")


def load_model(args):
    """The Llama that --model, --device and --dtype ask for."""
    device = pick_device(args.device)
    return Llama.from_pretrained(args.model, device, DTYPES.get(args.dtype))


def make_admission(args, model):
    """(admission policy, its gate file or None) for --gates and --admit.

    A random policy takes window and tau from the gate file, if there is one, to be comparable.
    """
    file = args.gates
    if file is None:
        file = os.path.join(args.model, "gates.safetensors")
    gates = None
    if args.gates is not None or os.path.exists(file):
        gates = Gates.load(file, model)
    if args.admit != "gates":
        policy = RandomAdmission(args.admit, args.seed)
        if gates is not None:
            policy.window = gates.window
            policy.tau = gates.tau
        return policy, None
    if gates is None:
        raise UserError(f"{args.model} has no gates.safetensors: name a file with --gates, train "
                        "one with train.py, or choose --dense or --admit all, none or a share")
    return gates, file


def read_prompt(name):
    """The text of a file, or of standard input for "-", without the line ends at its end."""
    if name == "-":
        name = "standard input"
        if sys.stdin is None:
            raise UserError("--prompt -: standard input is closed")
        with reading(name):
            data = sys.stdin.buffer.read()
    else:
        with reading(f"--prompt {name}"):
            data = Path(name).read_bytes()      # of any kind: <(command) in a shell is a pipe
    try:
        text = data.decode("utf-8-sig").rstrip("\r\n")      # without a byte-order mark
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text: byte {data[e.start]:#04x} at offset "
                        f"{e.start:,}") from None
    if not text.strip():
        raise UserError(f"{name} is empty: a prompt needs some text")
    return text


def read_line():
    """The next line from standard input that says something, or None at its end."""
    while True:
        if sys.stdin.isatty():
            say("> ", end="")
        line = sys.stdin.buffer.readline()
        if not line:
            return None
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            say("this line is not UTF-8 text, so it was left out")
            continue
        if text:
            return text


class Session:
    """A model, a cache and the conversation in it, with the figures that are shown at the end."""

    def __init__(self, args):
        self.args = args
        self.names = args.prompt or [str(HERE / "tiny" / "example.txt")]
        texts = [read_prompt(name) for name in self.names]      # first: a wrong path fails fast
        self.text = Text(args.model)
        self.replies = 0
        self.last = None            # the last id decoded, not in the cache yet
        if args.chat and args.interactive:
            self.text.turn("a", replies=1, last=0)              # can this template go on?
        self.model = load_model(args)
        self.prompts = [self.encode(text, name) for text, name in zip(texts, self.names)]

        self.gates = None
        if args.dense:
            self.kv = DenseCache(self.model, len(texts))
        else:
            admission, self.gates = make_admission(args, self.model)
            self.kv = DualCache(self.model, admission, len(texts), tau=args.tau)
        self.choose = None
        if args.temperature > 0:
            self.choose = sampler(args.temperature, args.top_p, args.seed, self.model.device)

        self.warned = False
        self.first_use_s = warm_up(self.model, self.kv)
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0

    def encode(self, text, name):
        """The ids of the next turn. UserError if the model cannot read them."""
        if self.args.chat:
            ids = self.text.turn(text, self.replies, self.last)
        elif self.last is None:
            ids = self.text.encode(text)
        else:
            ids = [self.last] + self.text.encode(f"\n\n{text}", begin=False)
        if not ids:
            raise UserError(f"{name}: {self.text.file} gives no token for this text")
        vocab_size = self.model.config.vocab_size
        if max(ids) >= vocab_size:
            raise UserError(f"{name}: {self.text.file} gives the id {max(ids):,}, but the model "
                            f"has a vocabulary of {vocab_size:,}")
        return ids

    def run(self):
        """Answer the prompts, then each line from the terminal."""
        hidden = self.prefill(self.prompts)
        if self.args.show_kept is not None:
            self.show_kept()
        self.decode(hidden, self.prompts)
        while self.args.interactive:
            line = read_line()
            if line is None:
                return
            turn = [self.encode(line, "this line")]
            self.decode(self.prefill(turn), turn)

    def prefill(self, prompts):
        """Read prompts into the cache; returns the hidden states that decode starts from."""
        self.warn_if_too_long(prompts)
        total = sum(len(prompt) for prompt in prompts)
        start = clock(self.model.device)
        with progress(total, "prefill", "tokens") as bar:

            def advance(tokens):
                bar.update(tokens)
                self.prompt_tokens += tokens

            try:
                return prefill(self.model, self.kv, prompts, self.args.chunk, advance)
            finally:
                self.prefill_s += clock(self.model.device) - start

    def warn_if_too_long(self, prompts):
        """Say once if this turn can pass the positions that the model was trained for."""
        longest = max(len(prompt) for prompt in prompts)
        total = int(self.kv.num_tokens.max()) + longest + self.args.max_new_tokens
        positions = self.model.config.max_positions
        if total > positions and not self.warned:
            say(f"warning: up to {total:,} tokens will be read and decoded, {self.args.model} was "
                f"trained for {positions:,} positions: expect worse answers")
            self.warned = True

    def decode(self, hidden, prompts):
        """Decode the answers: a single one is shown token by token, several at the end."""
        single = len(prompts) == 1
        streams = [TextStream(self.text, prompt) for prompt in prompts]
        answers = ["" for _ in prompts]
        start = clock(self.model.device)
        try:
            for ids in decode(self.model, self.kv, hidden, self.args.max_new_tokens,
                              self.text.end, self.choose):
                self.last = ids[0]
                for b, token in enumerate(ids):
                    if token is None:
                        continue
                    self.new_tokens += 1
                    piece = streams[b].push(token)
                    answers[b] += piece
                    if single:
                        print(piece, end="", flush=True)
        finally:        # also after Ctrl-C
            self.decode_s += clock(self.model.device) - start
            self.replies += 1
            for name, answer, stream in zip(self.names, answers, streams):
                if single:
                    print(stream.flush(), flush=True)
                else:
                    print(f"==> {printable(name)} <==\n{answer}{stream.flush()}", flush=True)

    def show_kept(self):
        """Write the page of --show-kept for the prompt, which has just been read."""
        decided_by = f"--admit {self.args.admit}"
        if self.gates is not None:
            decided_by = Path(self.gates).name
        page = kept_page(
            self.text.pieces(self.prompts[0]), self.kv.admitted(), self.kv.window, self.kv.tau,
            f"{self.model.name}, {decided_by}", self.kv.kept_bytes() / self.kv.dense_bytes())
        write_text(self.args.show_kept, page)

    def figures(self):
        """What --json prints."""
        kept = self.kv.kept_bytes()
        dense = self.kv.dense_bytes()
        return dict(
            prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens,
            first_use_s=round(self.first_use_s, 4), prefill_s=round(self.prefill_s, 4),
            decode_s=round(self.decode_s, 4), kept_share=round(kept / max(dense, 1), 4),
            kept_bytes=kept, dense_bytes=dense, peak_bytes=peak_bytes(self.model.device),
            model=self.args.model, gates=self.gates, device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."), seed=self.args.seed)

    def report(self):
        """The figures, for people."""
        f = self.figures()
        prefill_rate = self.prompt_tokens / max(self.prefill_s, 1e-9)
        decode_rate = self.new_tokens / max(self.decode_s, 1e-9)
        say(f"prompt   {self.prompt_tokens:8,} tokens")
        if self.first_use_s:
            say(f"compile  {self.first_use_s:8.2f} s   (the kernels, at a process's first use; not "
                "in the times below)")
        say(f"prefill  {self.prefill_s:8.2f} s   {prefill_rate:10,.1f} tokens/s")
        say(f"decode   {self.decode_s:8.2f} s   {decode_rate:10,.1f} tokens/s   "
            f"({self.new_tokens} tokens)")
        note = ""
        if f["kept_share"] > 1:
            note = "   (more than dense: the text is shorter than the window has room for)"
        say(f"kept     {f['kept_share']:8.1%}     {f['kept_bytes'] / 2**20:10,.2f} MiB, where a "
            f"dense cache holds {f['dense_bytes'] / 2**20:,.2f} MiB{note}")
        say(f"peak     {f['peak_bytes'] / 2**20:8,.0f} MiB of memory")
        if self.args.json:
            say(json.dumps(f))


def main(argv=None):
    args = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a terminal may not know every character
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


if __name__ == "__main__":
    sys.exit(run_program(main))
