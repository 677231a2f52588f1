"""A text file in, text out, with a cache that keeps only what its gates admit.

    python generate.py                                    the bundled model reads tiny/example.txt and answers
    python generate.py --prompt file.txt                  another text; - is standard input, several files are a batch
    python generate.py --prompt file.txt --admit none     the same with a sliding window only; --dense keeps everything
    python generate.py --prompt file.txt --model ~/Llama-3.2-1B-Instruct --gates gates.safetensors --chat

From top to bottom: text and tokens, reading a prompt (`prefill`), writing an answer (`decode`), the page that shows
what was kept, the program. Answers go to stdout as they are made, everything else to stderr.
"""
import argparse
import base64
import contextlib
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model import DTYPES, Llama, UserError, find_folder, read_json, say
from wgkv import DenseCache, DualCache, Gates, RandomAdmission

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------- text and tokens

class Text:
    """The text side of a model folder: its tokenizer, its end tokens, its chat template."""

    def __init__(self, path):
        folder = self.folder = find_folder(path)
        file = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(file) and os.path.exists(os.path.join(folder, "tokenizer.model")):
            raise UserError(f"{folder} has tokenizer.model but no tokenizer.json; to convert it: python -c \"from "
                            f"transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained("
                            f"'{folder}')\"")
        read_json(file)                                                 # a clear error if it is absent or broken
        try:
            self.tokenizer = Tokenizer.from_file(file)
        except Exception as e:                                          # the library raises nothing narrower
            raise UserError(f"{file} cannot be read as a tokenizer: {e}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        bare, full = (self.tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((n for n in range(len(full)) if full[n:n + len(bare)] == bare), 0)
        self.begin = full[:start]                                       # what the tokenizer's post-processor puts first
        self.end = set()                                                # the union of what the folder's files say
        for name in ("config.json", "generation_config.json"):
            ids = read_json(os.path.join(folder, name), required=False).get("eos_token_id")
            self.end |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def encode(self, text, begin=True):
        """Token ids, with the begin token that the tokenizer asks for; never two: a chat template may bring one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if not begin or ids[:len(self.begin)] == self.begin else self.begin + ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages):
        """The text of a conversation, up to where the model's next turn begins, by the folder's own template."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment        # templates are code from the folder
        settings = read_json(os.path.join(self.folder, "tokenizer_config.json"), required=False)
        file = Path(self.folder, "chat_template.jinja")
        template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
        if isinstance(template, list):                                  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not template:
            raise UserError(f"{self.folder} has no chat template, neither chat_template.jinja nor one in "
                            "tokenizer_config.json")

        def raise_exception(message):
            raise TemplateError(message)

        def strftime_now(pattern):
            return datetime.datetime.now().strftime(pattern)

        special = {name: t["content"] if isinstance(t, dict) else t for name, t in settings.items()
                   if name in ("bos_token", "eos_token", "unk_token", "pad_token") and t}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as e:
            raise UserError(f"{self.folder}: the chat template failed: {e}") from None

    def next_turn(self, messages):
        """What the template adds between the end of the model's last reply and the model's next turn."""
        reply = messages[-2]["content"].strip()
        return self.chat(messages).rpartition(reply)[2] if reply else self.chat(messages[-1:])


class TextStream:
    """Text out of a growing list of ids: `push` gives only what no later token can change, `flush` the rest.

    A character may take several tokens, and some decoders treat the first token of a text differently, so a short tail
    of ids is decoded again with each new one, and what is new in it is given out. context: the ids before.
    """

    def __init__(self, text, context=()):
        self.text, self.tail = text, list(context[-8:])
        self.shown = text.decode(self.tail)

    def push(self, token):
        self.tail.append(token)
        decoded = self.text.decode(self.tail)
        if decoded.endswith("\N{REPLACEMENT CHARACTER}"):               # perhaps half a character: wait
            if len(decoded) - len(self.shown) < 8:                      # (a character is 4 bytes at most: not for ever)
                return ""
        new, self.tail = decoded[len(self.shown):], self.tail[-8:]
        self.shown = self.text.decode(self.tail)
        return new

    def flush(self):
        decoded = self.text.decode(self.tail)
        new, self.shown = decoded[len(self.shown):], decoded
        return new


# ------------------------------------------------------------------------------------------------ reading and writing

@torch.no_grad()
def prefill(model, kv, prompts, chunk=4096, progress=lambda tokens: None):
    """Read prompts, B lists of ids, into the cache; a chunk at a time, so that activations stay small.

    Returns the hidden state (B, hidden_size) of each prompt's last token. Lists of unequal length are padded.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    if lengths.min() < 1:
        raise ValueError("a prompt needs at least one token")
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for b, prompt in enumerate(prompts):
        tokens[b, :len(prompt)] = torch.tensor(prompt)
    last = None
    for t in range(0, tokens.shape[1], chunk):
        part = tokens[:, t:t + chunk].to(model.device)
        counts = (lengths - t).clamp(0, part.shape[1])
        real = counts.to(model.device)
        hidden = model(part, kv, None if (lengths == lengths[0]).all() else real)
        ends_here = hidden[torch.arange(len(real)), (real - 1).clamp(min=0)]
        last = ends_here if last is None else torch.where((real > 0)[:, None], ends_here, last)
        progress(int(counts.sum()))
    return last


LAG = 3                # steps that a GPU may be ahead of the text that is shown


@torch.no_grad()
def decode(model, kv, hidden, steps, end=(), choose=None):
    """Write up to `steps` tokens from the hidden state (B, hidden_size) of the last token read.

    Yields, token by token, a list of B ids; None for a sequence whose end token (one of `end`) was given before. The
    last ids given are not in the cache: a further turn begins with them. choose: logits (B, vocab) -> ids (B), else
    the greedy choice.

    On a GPU the host runs a few steps ahead of what it reads, so that the card never waits for it. Which sequences have
    ended is therefore decided there: `alive` falls with an end token, and a sequence that is not alive writes nothing.
    (If you stop reading before the end, up to LAG more tokens than you have seen are in the cache.)
    """
    device, choose_one, ahead = model.device, choose or greedy, LAG if kv.kernels else 0
    ends = torch.tensor(sorted(end), device=device, dtype=torch.long)
    logits = model.logits(hidden)
    token = choose_one(logits)
    alive, done = (token[:, None] != ends).all(dim=1), [False] * len(token)

    def read():
        lengths = None if device.type == "cpu" and alive.all() else alive.long()
        logits.copy_(model.logits(model(token[:, None], kv, lengths)[:, 0]))
        if choose is None:
            write()

    def write():
        token.copy_(choose_one(logits))
        alive.logical_and_((token[:, None] != ends).all(dim=1))

    graph, shown, taken = None, [to_host(token)], 0
    if kv.kernels:
        kv.prepare(steps)
    try:
        while shown or taken < steps - 1:
            while taken < steps - 1 and len(shown) <= ahead:
                if kv.kernels and taken == 1 and steps > 8:                  # the first step was the warm-up
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        read()
                graph.replay() if graph else read()
                if choose is not None:
                    write()
                shown.append(to_host(token))
                taken += 1
            ids = shown.pop(0)()
            yield [None if over else i for i, over in zip(ids, done)]
            done = [over or i in end for i, over in zip(ids, done)]
            if all(done):
                return
    finally:
        kv.ready = 0                                                 # what is left of the reserve is counted anew


def warm_up(model, kv):
    """Seconds that the first use of a GPU takes: kernels are compiled and libraries started, on a copy of the cache."""
    if model.device.type != "cuda":
        return 0.0
    start, copy = clock(model.device), kv.clone()
    for _ in decode(model, copy, prefill(model, copy, [[0] * 300] * kv.B, 200), 12):
        pass
    return clock(model.device) - start


def to_host(ids):
    """A copy of ids on its way to the host: call what is returned to wait for it and have the list."""
    if ids.device.type == "cpu":
        return ids.tolist
    copy = torch.empty(ids.shape, dtype=ids.dtype, device="cpu", pin_memory=True).copy_(ids, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return lambda: (event.synchronize(), copy.tolist())[1]


def greedy(logits):
    return logits.argmax(dim=-1)


def sampler(temperature, top_p, seed, device):
    """A choice by chance: softmax(logits / temperature), from the fewest tokens that hold top_p of it."""
    generator = torch.Generator(device).manual_seed(seed)

    def choose(logits):
        p, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        p[p.cumsum(dim=-1) - p >= top_p] = 0
        # As torch.multinomial, which would wait for the device to check p: the first of exponential waiting times.
        first = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
        return ids.gather(-1, first)[:, 0]

    return choose


# ------------------------------------------------------------------------------------------------------- what was kept

def kept_page(pieces, admitted, window, tau, title, kept_share):
    """A self-contained HTML page: the prompt, each token coloured by the share of heads that admitted it.

    pieces: the text of the S tokens; admitted (L, Hkv, S) bool. That travels in base64 as S rows of
    ceil(L * Hkv / 8) bytes: head n of a token, counted layer by layer, is bit n % 8 of byte n // 8.
    """
    L, Hkv, S = admitted.shape
    bits = torch.nn.functional.pad(admitted.cpu().flatten(0, 1).T, (0, -L * Hkv % 8)).reshape(-1, 8)
    bits = base64.b64encode(bytes((bits << torch.arange(8, dtype=torch.uint8)).sum(-1).tolist())).decode()
    data = json.dumps(dict(pieces=pieces, layers=L, heads=Hkv, ring=window, bits=bits, tau=tau, title=title,
                           kept_share=kept_share)).replace("<", "\\u003c")      # so that no text can end the script
    return (HERE / "assets" / "kept.html").read_text(encoding="utf-8").replace("{{data}}", data)


# -------------------------------------------------------------------------------------------------------- the program

class Parser(argparse.ArgumentParser):
    """Errors as one line like all others."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def model_options(parser):
    """The options that every program here shares."""
    parser.add_argument("--model", default=str(HERE / "tiny"), help="folder or hub name (the bundled model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(the model's own; float32 on a CPU)")
    parser.add_argument("--seed", type=int, default=0)


def load_model(args):
    """The Llama that --model, --device and --dtype ask for."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: should be cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device that torch {torch.__version__} can use")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)              # Triton launches on the current one
    return Llama.from_pretrained(args.model, device, DTYPES[args.dtype] if args.dtype else None)


def make_admission(args, model):
    """(admission, gate file or None) for --gates and --admit; the window is the gate file's where there is one."""
    file = args.gates or os.path.join(args.model, "gates.safetensors")
    gates = Gates.load(file, model) if args.gates or os.path.exists(file) else None
    if args.admit == "gates":
        if gates is None:
            raise UserError(f"{args.model} has no gates.safetensors: name a file with --gates, train one with "
                            "train.py, or choose --dense or --admit all, none or a share")
        return gates, file
    try:
        share = {"all": 1.0, "none": 0.0}.get(args.admit) if args.admit in ("all", "none") else float(args.admit)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise UserError(f"--admit {args.admit}: should be gates, all, none or a share between 0 and 1")
    admission = RandomAdmission(share, args.seed)
    if gates is not None:
        admission.window, admission.tau = gates.window, gates.tau
    return admission, None


def read_prompt(path):
    """The text of a file, or of standard input for "-", less the line ends at its end."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"--prompt {path}: {e.strerror}") from None
    name = "standard input" if path == "-" else path
    try:
        text = data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text: byte {data[e.start]:#04x} at offset {e.start}") from None
    if not text.strip():
        raise UserError(f"{name} is empty: a prompt needs some text")
    return text


def check_writable(path):
    """UserError now rather than after the work, if a file cannot be written at path."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or os.path.isdir(path) or not os.access(folder, os.W_OK):
        why = "it is a folder" if os.path.isdir(path) else f"{folder} is no folder that can be written to"
        raise UserError(f"{path} cannot be written: {why}")


def write_whole(path, text):
    """Write beside the final name, then rename: an interrupted program leaves the old file or the new one."""
    try:
        Path(f"{path}.part").write_text(text, encoding="utf-8")
        os.replace(f"{path}.part", path)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


def peak_bytes(device):
    """The most memory held at once: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource                                                    # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Session:
    """A model, a cache and the conversation in it, with the figures that are shown at the end."""

    def __init__(self, args):
        self.args = args
        self.names = args.prompt or [str(HERE / "tiny" / "example.txt")]
        texts = [read_prompt(name) for name in self.names]                  # before the model: a wrong path fails fast
        self.text, self.model = Text(args.model), load_model(args)
        if args.dense:
            self.kv, self.gates = DenseCache(self.model, len(texts)), None
        else:
            admission, self.gates = make_admission(args, self.model)
            self.kv = DualCache(self.model, admission, len(texts), tau=args.tau)
        self.first_use_s = warm_up(self.model, self.kv)
        self.choose = None
        if args.temperature > 0:
            self.choose = sampler(args.temperature, args.top_p, args.seed, self.model.device)
        self.messages = [{"role": "user", "content": texts[0]}]
        if args.chat:
            texts = [self.text.chat([{"role": "user", "content": text}]) for text in texts]
        self.prompts = [self.text.encode(text) for text in texts]
        self.read = self.new = 0
        self.prefill_s = self.decode_s = 0.0
        longest, positions = max(map(len, self.prompts)) + args.max_new_tokens, self.model.config.max_positions
        if longest > positions:
            say(f"warning: up to {longest:,} tokens will be read and written, {args.model} was trained for "
                f"{positions:,} positions: expect worse answers")

    def run(self):
        """The first turn, the page if one is asked for, and further turns from the terminal."""
        self.answer(self.prompts)
        while self.args.interactive:
            line = self.ask()
            if line is None:
                return
            if self.args.chat:
                self.messages.append({"role": "user", "content": line})
                turn = self.text.next_turn(self.messages)
            else:
                turn = f"\n\n{line}"
            # The reply's last token was given but is not in the cache; the template may repeat an end token.
            ids = self.text.encode(turn, begin=False)
            self.answer([ids if ids[:1] == [self.last] else [self.last, *ids]])

    def ask(self):
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        return next((line for line in map(str.strip, sys.stdin) if line), None)

    def answer(self, prompts):
        """One turn: read the prompts, then write and show the answers."""
        device, total = self.model.device, sum(map(len, prompts))
        with tqdm(total=total, desc="reading", unit=" tokens", unit_scale=True, delay=1, leave=False) as bar:
            start = clock(device)

            def progress(tokens):
                bar.update(tokens)
                self.read += tokens

            try:
                hidden = prefill(self.model, self.kv, prompts, self.args.chunk, progress)
            finally:
                self.prefill_s += clock(device) - start
        if self.args.show_kept and prompts is self.prompts:
            self.show_kept()
        streams = [TextStream(self.text, prompt) for prompt in prompts]
        parts, start = [[] for _ in prompts], clock(device)
        try:
            for ids in decode(self.model, self.kv, hidden, self.args.max_new_tokens, self.text.end, self.choose):
                self.last = ids[0]
                self.new += sum(token is not None for token in ids)
                for token, stream, part in zip(ids, streams, parts):
                    if token is not None:
                        part.append(stream.push(token))
                if len(prompts) == 1:
                    print(parts[0][-1], end="", flush=True)
        finally:
            self.decode_s += clock(device) - start
            if len(prompts) == 1:
                print(streams[0].flush(), flush=True)
        self.messages.append({"role": "assistant", "content": "".join(parts[0])})
        if len(prompts) > 1:
            for name, part, stream in zip(self.names, parts, streams):
                print(f"==> {name} <==\n{''.join(part)}{stream.flush()}", flush=True)

    def show_kept(self):
        ids = self.prompts[0]
        stream = TextStream(self.text)
        pieces = [stream.push(token) or (self.text.tokenizer.id_to_token(token) if token in self.text.begin else "")
                  for token in ids]
        kv = self.kv
        decided_by = Path(self.gates).name if self.gates else f"--admit {self.args.admit}"
        page = kept_page(pieces, kv.admitted(), kv.window, kv.tau, f"{self.model.name}, {decided_by}",
                         kv.kept_bytes() / kv.dense_bytes())
        write_whole(self.args.show_kept, page)

    def figures(self):
        kept, dense = self.kv.kept_bytes(), self.kv.dense_bytes()
        return dict(prompt_tokens=self.read, new_tokens=self.new, first_use_s=round(self.first_use_s, 4),
                    prefill_s=round(self.prefill_s, 4), decode_s=round(self.decode_s, 4),
                    kept_share=round(kept / max(dense, 1), 4), kept_bytes=kept, dense_bytes=dense,
                    peak_bytes=peak_bytes(self.model.device), model=self.args.model, gates=self.gates,
                    device=str(self.model.device), dtype=str(self.model.dtype)[6:], seed=self.args.seed)

    def report(self):
        f = self.figures()

        def rate(tokens, seconds):
            return f"{seconds:8.2f} s   {tokens / max(seconds, 1e-9):10,.1f} tokens/s"

        note = "" if f["kept_share"] <= 1 else "   (more than dense: the text is shorter than the window has room for)"
        say(f"prompt   {f['prompt_tokens']:8,} tokens")
        if f["first_use_s"]:
            say(f"compile  {f['first_use_s']:8.2f} s   (the kernels, at a process's first use; not in the times below)")
        say(f"prefill  {rate(self.read, self.prefill_s)}")
        say(f"decode   {rate(self.new, self.decode_s)}   ({self.new} tokens)")
        say(f"kept     {f['kept_share']:8.1%}     {f['kept_bytes'] / 2**20:10,.2f} MiB, where a dense cache holds "
            f"{f['dense_bytes'] / 2**20:,.2f} MiB{note}")
        say(f"peak     {f['peak_bytes'] / 2**20:8,.0f} MiB of memory")
        if self.args.json:
            say(json.dumps(f))


def check(args):
    """UserError for options out of range or at odds with each other, before anything slow."""
    for name, low, high in (("tau", 0, 1), ("top_p", 1e-9, 1), ("temperature", 0, float("inf")),
                            ("max_new_tokens", 1, float("inf")), ("chunk", 1, float("inf"))):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: should be "
                            f"{'between 0 and 1' if high == 1 else f'at least {low}'}")
    several = len(args.prompt or ()) > 1
    for clash, message in ((args.interactive and several, "--interactive goes with one prompt, not several"),
                           (args.interactive and args.prompt == ["-"], "--interactive reads further turns from "
                            "standard input, so the prompt cannot come from there"),
                           (args.show_kept and (several or args.dense), "--show-kept goes with one prompt and with the "
                            "dual cache, not with several or --dense"),
                           (args.dense and (args.gates or args.admit != "gates" or args.tau is not None),
                            "--dense keeps everything: --gates, --admit and --tau do not go with it")):
        if clash:
            raise UserError(message)
    if args.show_kept:
        check_writable(args.show_kept)


def run_program(main, argv=None):
    """main(argv) with every UserError as one line on stderr and exit status 2."""
    name = Path(sys.argv[0]).name
    try:
        return main(argv) or 0
    except UserError as e:
        say(f"{name}: {e}")
    except torch.OutOfMemoryError as e:
        say(f"{name}: out of memory, a smaller --chunk or --dtype may help: {str(e).splitlines()[0]}")
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    return 2


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", nargs="+", metavar="FILE", help="text to read; - is standard input (an example)")
    model_options(parser)
    parser.add_argument("--gates", help="gate file, or an official .pt (gates.safetensors in the model's folder)")
    parser.add_argument("--admit", default="gates", help="what decides: gates, all, none, or a random share like 0.25")
    parser.add_argument("--dense", action="store_true", help="a cache that keeps everything, for comparison")
    parser.add_argument("--tau", type=float, help="a gate this high admits (what the gate file says)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--chunk", type=int, default=4096, help="prompt tokens that are read at once")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--interactive", action="store_true", help="then each line you type is a further turn")
    parser.add_argument("--show-kept", metavar="FILE.html", help="write a page that shows which tokens were kept")
    parser.add_argument("--json", action="store_true", help="end with the figures as one line of JSON on stderr")
    args = parser.parse_args(argv)
    check(args)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")                       # a terminal may not know every character
    session, status = Session(args), 0
    try:
        session.run()
    except KeyboardInterrupt:
        say("\ninterrupted")
        status = 130
    except BrokenPipeError:                                            # the reader has gone; so say nothing more there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    session.report()
    return status


if __name__ == "__main__":
    sys.exit(run_program(main))
