"""The README's figures of speed and quality. (Those of a single run of generate.py or train.py are what these print.)

    python bench.py                    prefill and decode with the bundled model, gated beside dense (some minutes)
    python bench.py quality            what the bundled model still knows under each policy, at 4,096 tokens (long)

Both sides of a comparison run in turn in one process; times are medians, with the spread beside them, and the ratio is
what counts. Dense prefill is torch's own scaled_dot_product_attention; dense decode is our dense cache and, where it is
installed, transformers with the same weights. Figures go to assets/*.json with command, commit and machine.
"""
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import train
from generate import HERE, Parser, Text, clock, decode, load_model, make_admission, model_options, prefill, run_program
from generate import write_whole
from model import UserError, say
from tiny import tasks
from wgkv import DenseCache, DualCache, RandomAdmission


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        names = [line.partition(": ")[2] for line in cpu.read_text().splitlines() if line.startswith("model name")
                 ] if cpu.exists() else []
        name = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    return dict(machine=name, torch=torch.__version__, command=" ".join(["python", "bench.py", *sys.argv[1:]]),
                commit=git.stdout.strip() or None)


def in_turn(runs, device, **sides):
    """Times each side `runs` times, A B A B ...; {name: [seconds]}. A side may return the seconds to count."""
    times = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            start = clock(device)
            counted = side()
            times[name].append(counted if counted is not None else clock(device) - start)
    return times


def median(times):
    return statistics.median(times)


def spread(times):
    """Half of max - min, as a share of the median."""
    return (max(times) - min(times)) / 2 / median(times)


def operations(model, tokens, kept=None, window=0):
    """Multiply-adds times two of a prefill: linear layers and attention, dense or with this share of keys kept."""
    c = model.config
    linear = 2 * tokens * sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    pairs = tokens * tokens / 2 if kept is None else kept * tokens * tokens / 2 + (1 - kept) * tokens * window
    return linear + 4 * pairs * c.num_layers * c.num_heads * c.head_dim


def bench_prefill(model, args):
    """Gated prefill over dense prefill, whole model, at each length."""
    admission, _ = make_admission(args, model)
    print("prefill, whole model: seconds (median, spread), gated over dense, and what the operations alone would give")
    print(f"{'tokens':>8}{'dense':>16}{'gated':>16}{'ratio':>8}{'operations':>12}{'admitted':>10}{'kept':>7}")
    rows = []
    for tokens in args.tokens:
        ids = prompt_of(tokens, args)
        kept = {}

        def dense(ids=ids, tokens=tokens):
            prefill(model, DenseCache(model), [ids], tokens)

        def gated(ids=ids, kept=kept):
            kept["kv"] = DualCache(model, admission, tau=args.tau)
            prefill(model, kept["kv"], [ids], args.chunk)

        times = in_turn(args.runs if tokens < 16384 else min(args.runs, 3), model.device, dense=dense, gated=gated)
        kv = kept["kv"]
        admitted = sum(int(c["count"].sum()) for c in kv.layers) / (kv.L * kv.Hkv * max(1, tokens - kv.window))
        ratio = median(times["gated"]) / median(times["dense"])
        bound = operations(model, tokens, admitted, kv.window) / operations(model, tokens)
        rows.append(dict(tokens=tokens, dense_s=times["dense"], gated_s=times["gated"], ratio=ratio, bound=bound,
                         admitted=admitted, kept_share=kv.kept_bytes() / kv.dense_bytes()))
        cells = "".join(f"{median(t):9.3f} ±{spread(t):4.0%}" for t in times.values())
        past = "  past the model's training" if tokens > model.config.max_positions else ""
        lost = "  gating loses here" if ratio > 1 else ""
        print(f"{tokens:8,}{cells}{ratio:8.2f}{bound:12.2f}{admitted:10.1%}{rows[-1]['kept_share']:7.1%}{lost}{past}",
              flush=True)
    return rows


def bench_decode(model, args):
    """One token after another on a prompt: gated, dense, and transformers with its own cache."""
    admission, _ = make_admission(args, model)
    theirs = transformers_model(args)
    print(f"decode, whole model: milliseconds a token (median of {args.steps} steps a run)")
    print(f"{'tokens':>8}{'dense':>16}{'gated':>16}{'transformers':>16}{'gated/dense':>13}{'gated/transf.':>15}")
    rows = []
    for tokens in args.tokens:
        ids = prompt_of(tokens, args)
        sides = {}
        for name, kv in (("dense", DenseCache(model)), ("gated", DualCache(model, admission, tau=args.tau))):
            sides[name] = stepper(model, kv, prefill(model, kv, [ids], args.chunk), args.steps)
        if theirs:
            sides["transformers"] = transformers_stepper(theirs, ids, args.steps)
        times = in_turn(args.runs, model.device, **sides)
        row = dict(tokens=tokens, **{f"{name}_s": t for name, t in times.items()},
                   ratio_dense=median(times["gated"]) / median(times["dense"]))
        cells = "".join(f"{median(t) * 1e3:9.2f} ±{spread(t):4.0%}" for t in times.values())
        last = f"{'':16}{row['ratio_dense']:13.2f}"
        if theirs:
            row["ratio_transformers"] = median(times["gated"]) / median(times["transformers"])
            last = f"{row['ratio_dense']:13.2f}{row['ratio_transformers']:15.2f}"
        rows.append(row)
        print(f"{tokens:8,}{cells}{last}", flush=True)
    return rows


def stepper(model, kv, hidden, steps):
    """A side for `in_turn`: `steps` greedy tokens from a copy of the cache; the median seconds of a token."""
    def side():
        branch, times, last = kv.clone(), [], clock(model.device)
        for _ in decode(model, branch, hidden, steps + 1):
            now = clock(model.device)
            times.append(now - last)
            last = now
        return median(times[1:])
    return side


def transformers_model(args):
    """The same weights in transformers, or None with a word."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        say("transformers is not installed: its rows are left out")
        return None
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device or "cpu").eval()


@torch.no_grad()
def transformers_stepper(theirs, ids, steps):
    from transformers import DynamicCache
    cache, tokens = DynamicCache(), torch.tensor([ids], device=theirs.device)
    for t in range(0, len(ids), 2048):
        out = theirs(tokens[:, t:t + 2048], past_key_values=cache, use_cache=True, logits_to_keep=1)
    first = out.logits[:, -1].argmax(dim=-1)

    @torch.no_grad()
    def side():
        branch, token, times, last = copy.deepcopy(cache), first, [], clock(theirs.device)
        for _ in range(steps + 1):
            out = theirs(token[:, None], past_key_values=branch, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(dim=-1)
            token.tolist()                                               # a streamed token is read by the host
            now = clock(theirs.device)
            times.append(now - last)
            last = now
        return median(times[1:])
    return side


def prompt_of(tokens, args):
    """Ids of `tokens` tokens of the example's text, repeated as often as it takes."""
    ids = Text(args.model).encode((HERE / "tiny" / "example.txt").read_text(encoding="utf-8"))
    return (ids * (tokens // len(ids) + 1))[:tokens]


# ------------------------------------------------------------------------------------------------------------ quality

class Sinks(RandomAdmission):
    """Admits the first 16 tokens and nothing else: attention sinks and a window, as in StreamingLLM."""

    def __init__(self, sinks=16):
        super().__init__(0.0)
        self.sinks = sinks

    def gate(self, layer, k, k_rotated, positions):
        g = torch.where(positions < self.sinks, 1.0, -1.0)
        return g[:, None].expand(k.shape[:3])


@torch.no_grad()
def bits_per_byte(model, text, make_kv, passages):
    """Mean cross-entropy of passages, in bits a byte of text, each read from an empty cache in one call."""
    bits = size = 0
    for passage in passages:
        ids = torch.tensor([text.encode(passage)], device=model.device)
        logits = model.logits(model(ids, make_kv(1)))[0, :-1].float()
        bits += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item() / 0.6931471805599453
        size += len(passage.encode())
    return bits / size


def bench_quality(model, args):
    """Each task by free greedy generation, and prose by bits a byte, under each policy."""
    text, gates = Text(args.model), make_admission(args, model)[0]
    haystack, rng = tasks.Haystack(train.read_text(args.data)), random.Random(args.seed)
    documents = {}
    for task in ("facts", "lists", "classes", "copy"):
        documents[task] = []
        while sum(len(d.questions) for d in documents[task]) < args.cases:
            documents[task].append(tasks.make(task, haystack, args.length, text.tokenizer.encode, rng)[0])
    passages = [tasks.make("prose", haystack, args.length, text.tokenizer.encode, rng)[0].body
                for _ in range(max(4, args.cases // 20))]
    rows, window = [], gates.window
    print(f"{args.length:,} tokens, {args.cases} cases a task, haystack {Path(args.data).name}")
    print(f"{'policy':22}{'kept':>7}" + "".join(f"{task:>9}" for task in documents) + f"{'bits/byte':>11}")
    share = None
    for name in ("full attention", "gates", "random, same share", "16 sinks + window", "window only"):
        if name == "full attention":
            def make_kv(batch):
                return DenseCache(model, batch)
        else:
            admission = {"gates": gates, "random, same share": RandomAdmission(share or 0), "window only":
                         RandomAdmission(0.0), "16 sinks + window": Sinks()}[name]

            def make_kv(batch, admission=admission):
                return DualCache(model, admission, batch, window, args.tau)
        scores, kept = {}, []
        with tqdm(total=sum(map(len, documents.values())), desc=name, unit=" documents", leave=False) as bar:
            for task, some in documents.items():
                scores[task], kept_share = train.evaluate(model, text, make_kv, some, progress=bar.update)
                kept.append(kept_share)
        bits = bits_per_byte(model, text, make_kv, passages)
        rows.append(dict(policy=name, kept=statistics.mean(kept), bits_per_byte=bits, **scores))
        if name == "gates":                                              # what random has to admit to keep as much
            share = max(0.0, (rows[-1]["kept"] - window / args.length) / (1 - window / args.length))
        print(f"{name:22}{rows[-1]['kept']:7.1%}" + "".join(f"{s:9.1%}" for s in scores.values()) + f"{bits:11.3f}",
              flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------ program

def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", default="all", choices=("all", "prefill", "decode", "quality"))
    model_options(parser)
    parser.add_argument("--gates", help="gate file")
    parser.add_argument("--admit", default="gates", help="gates, all, none or a share (simulated)")
    parser.add_argument("--tau", type=float)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens a run")
    parser.add_argument("--data", help="quality: the haystack, a text the model was not trained on")
    parser.add_argument("--length", type=int, default=4096, help="quality: tokens a document")
    parser.add_argument("--cases", type=int, default=500, help="quality: questions a task")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, such as assets/cpu.json")
    args = parser.parse_args(argv)
    if args.what == "quality" and not args.data:
        raise UserError("quality needs --data, a text for the haystack that the model was not trained on")
    if min(args.tokens) < 2 or min(args.runs, args.steps, args.cases) < 1:
        raise UserError("--tokens should be at least 2; --runs, --steps and --cases at least 1")
    model = load_model(args)
    about = dict(machine(model.device), model=model.name, date=time.strftime("%Y-%m-%d"))
    say(f"{about['machine']}, torch {about['torch']}, {model.name} in {str(model.dtype)[6:]}")
    results = {}
    for name, bench in (("prefill", bench_prefill), ("decode", bench_decode), ("quality", bench_quality)):
        if args.what in (name, "all") and not (name == "quality" and args.what == "all"):
            results[name] = bench(model, args)
    if args.json:
        write_whole(args.json, json.dumps(dict(about, **results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
