"""Every figure of speed and quality that the README states.

    python bench.py                            prefill and decode with the bundled model, gated beside dense
    python bench.py all --shape llama-3.1-8b   kernels, prefill, decode and memory at the size of a real model, on a GPU
    python bench.py quality --data BOOK        what the bundled model still knows under each policy (long)
    python bench.py --plot                     draws assets/time.png from assets/*.json

Both sides of a comparison run in turn in one process; times are medians, with the spread beside them, and the ratio is
what counts. The dense side is the strongest there is: in prefill torch's scaled_dot_product_attention (on a GPU its
cuDNN kernel) over the whole prompt at once, in decode our own kernel and graph with everything kept. Beside each time
stands its floor: the bytes that must be read over the read bandwidth, or the operations over the matrix rate, both
measured in the same run. Figures go to assets/*.json with command, commit and machine.
"""
import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import train
from generate import HERE, Parser, Text, clock, decode, load_model, make_admission, model_options, prefill, run_program
from generate import write_whole
from model import Config, Llama, UserError, say
from tiny import tasks
from wgkv import DenseCache, DualCache, Gates, RandomAdmission

SHAPES = {"llama-3.1-8b": Config(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_positions=131072, rope_theta=5e5, tied=False, rope=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)),
    "llama-3.2-1b": Config(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, max_positions=131072, rope_theta=5e5, rope=dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192))}


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


# ----------------------------------------------------------------------------------------- what is needed, and how fast

def operations(c, tokens, admitted=1.0, window=0):
    """Operations of a prefill, (linear layers, attention): two a multiply-add; with this share of keys admitted."""
    per_layer = c.hidden_size * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size)
    older = max(0, tokens - window)
    pairs = tokens * (tokens + 1) / 2 - (1 - admitted) * older * (older + 1) / 2
    return 2 * tokens * per_layer * c.num_layers, 4 * pairs * c.num_layers * c.num_heads * c.head_dim


def ceilings(device):
    """The card's rates, measured now: {"read": bytes/s, "matrix": bf16 operations/s}; nothing on a CPU."""
    if device.type != "cuda":
        return None
    big = torch.zeros(2 ** 31, device=device, dtype=torch.bfloat16)
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    read, matrix = device_times(lambda: big.view(torch.float32).sum(), lambda: square @ square)
    return dict(read=big.nbytes / median(read), matrix=2 * 8192 ** 3 / median(matrix))


def device_times(*sides, runs=7, inner=3):
    """Seconds of each side on a GPU, by its own clock and in turn; out of graphs, so without the host's part."""
    graphs, times = [], [[] for _ in sides]
    for side in sides:
        side()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(inner):
                side()
    for run in range(runs + 1):
        for graph, some in zip(graphs, times):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in "12")
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            some += [start.elapsed_time(stop) / 1e3 / inner] * (run > 0)
    return times


class Simulated:
    """Admits a share at random, one number or one for each KV head; real gates run as well, so that they cost.

    Which tokens is read off one long list of numbers, each layer from a place of its own: looking up must cost nothing.
    """
    tau = 0.1

    def __init__(self, shares, tokens, gates=None, window=256):
        self.gates, self.window = gates, window
        self.g = (torch.rand(len(shares), tokens + 64 * 997, device=shares.device) < shares[:, None]).float()

    def gate(self, layer, k, k_rotated, positions):
        if self.gates is not None:
            self.gates.gate(layer, k, k_rotated, positions)
        return self.g[:, layer * 997:][:, positions].transpose(0, 1)


def admission_of(args, model):
    """What --admit says: with a number, random gates of the right shape run beside the simulation."""
    if not args.shape and args.admit in ("gates", "all", "none"):
        return make_admission(args, model)[0]
    try:
        shares = [float(share) for share in args.admit.split(",")]
    except ValueError:
        raise UserError(f"--admit {args.admit}: should be a share, or several for the heads in turn") from None
    heads = torch.tensor([shares[h % len(shares)] for h in range(model.config.num_kv_heads)], device=model.device)
    gates = Gates.for_model(model, window=args.window).eval().requires_grad_(False)
    return Simulated(heads, max(args.tokens) + 4096, gates, args.window)


def free_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def strongest_dense(device):
    """torch's fastest causal attention there: cuDNN on a GPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


# ------------------------------------------------------------------------------------------------------------ kernels

@torch.no_grad()
def bench_kernels(model, args):
    """One layer's attention, prefill and decode, even and uneven heads: rates beside cuDNN and the read bandwidth."""
    c, device, rates = model.config, model.device, args.ceilings
    if device.type != "cuda":
        raise UserError("bench.py kernels needs a CUDA device: what it times is Triton on a card")
    G = c.num_heads // c.num_kv_heads
    shape = SimpleNamespace(num_layers=1, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    layer = SimpleNamespace(config=shape, device=device, dtype=torch.bfloat16)
    print(f"one layer; matrix rate {rates['matrix'] / 1e12:.0f} TFLOP/s, read {rates['read'] / 1e12:.2f} TB/s")
    print(f"{'':10}{'tokens':>9}{'admitted':>12}{'cuDNN ms':>10}{'TFLOP/s':>9}{'ours ms':>9}{'TFLOP/s':>9}{'rate':>7}"
          f"{'faster':>8}")
    rows = []
    for tokens in args.tokens:
        runs = 5 if tokens < 65536 else 3
        q, k, v = (torch.randn(1, heads, tokens, c.head_dim, device=device, dtype=torch.bfloat16)
                   for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
        wide = [x.repeat_interleave(G, dim=1) for x in (k, v)]
        for shares in args.admit.split("/"):
            heads = [float(share) for share in shares.split(",")]
            admission = Simulated(torch.tensor(heads * (c.num_kv_heads // len(heads)), device=device), tokens + 1,
                                  window=args.window)
            cache = DualCache(layer, admission)
            cache.kernels = recorder = Recorder(cache.kernels)
            cos, sin = model.rope(torch.arange(tokens + 1, device=device)[None])
            cache.begin(tokens)
            cache.attend(0, q, k, v, cos[:, :, :tokens], sin[:, :, :tokens])
            cache.end()
            old_count = recorder.args["prefill_attention"][7]
            window = torch.arange(1, tokens + 1, device=device).clamp(max=args.window)
            needed = 4 * c.head_dim * G * int((old_count + window).sum())
            row = dict(what="prefill", tokens=tokens, admitted=shares, needed_operations=needed)
            for name, plain in [("prefill", False), ("  plain", True)][:1 + args.plain]:
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                    dense, ours = device_times(lambda: F.scaled_dot_product_attention(q, *wide, is_causal=True),
                                               lambda: recorder.again("prefill_attention", plain=plain),
                                               runs=runs, inner=1)
                dense_rate = 2 * tokens * (tokens + 1) * c.num_heads * c.head_dim / median(dense)
                rate = needed / median(ours)
                print(f"{name:10}{tokens:9,}{shares:>12}{median(dense) * 1e3:10.2f}{dense_rate / 1e12:9.0f}"
                      f"{median(ours) * 1e3:9.2f}{rate / 1e12:9.0f}{rate / dense_rate:7.2f}"
                      f"{median(dense) / median(ours):8.2f}", flush=True)
                row[name.strip()] = dict(dense_s=dense, ours_s=ours, rate_over_dense=rate / dense_rate)
            cache.begin(1)
            cache.attend(0, *(x[:, :, -1:] for x in (q, k, v, cos, sin)))
            needed = 4 * c.head_dim * (int(cache.layers[0]["count"].sum()) + args.window * c.num_kv_heads)
            [times] = device_times(lambda: recorder.again("decode_attention"), inner=10)
            rate = needed / median(times)
            print(f"{'decode':10}{tokens:9,}{shares:>12}{'':19}{median(times) * 1e3:9.4f}  {rate / 1e12:.2f} TB/s, "
                  f"{rate / rates['read']:.2f} of the read bandwidth", flush=True)
            rows += [row, dict(what="decode", tokens=tokens, admitted=shares, decode_s=times, needed_bytes=needed,
                               share_of_read=rate / rates["read"])]
            cache = recorder = old_count = None                 # for the next setting's
            free_memory(device)
    return rows


class Recorder:
    """kernels.py, remembering what each of its functions was last called with."""

    def __init__(self, kernels):
        self.kernels, self.args = kernels, {}

    def __getattr__(self, name):
        def call(*args):
            self.args[name] = args
            return self.again(name)
        return call

    def again(self, name, **options):
        return getattr(self.kernels, name)(*self.args[name], **options)


# -------------------------------------------------------------------------------------------------------- whole model

def bench_prefill(model, args):
    """Gated prefill over dense prefill, whole model, at each length; with the floor that the operations set."""
    admission, c, rates = admission_of(args, model), model.config, args.ceilings
    print("prefill, whole model: seconds (median, spread), gated over dense, and what the operations alone would give")
    print(f"{'tokens':>9}{'dense':>16}{'gated':>16}{'ratio':>8}{'operations':>12}{'admitted':>10}{'kept':>7}"
          + ("{:>9}{:>8}{:>11}".format("floor s", "share", "peak GiB") if rates else ""))
    rows = []
    for tokens in args.tokens:
        prompt, kept = prompt_of(tokens, args, model), {}

        def dense():
            with strongest_dense(model.device):
                prefill(model, DenseCache(model), [prompt], tokens)

        def gated():
            kept["kv"] = None
            free_memory(model.device)
            kept["kv"] = DualCache(model, admission, tau=args.tau)
            start = clock(model.device)
            prefill(model, kept["kv"], [prompt], args.chunk)
            return clock(model.device) - start

        sides = dict(dense=dense, gated=gated) if tokens <= args.dense_up_to else dict(gated=gated)
        if model.device.type == "cuda" and not rows:
            prefill(model, DualCache(model, admission, tau=args.tau), [prompt[:2 * args.chunk]], args.chunk)   # compile
        runs = args.runs if tokens < 16384 else min(args.runs, 3) if tokens < 100000 else 1
        times = in_turn(runs, model.device, **sides)
        kv = kept["kv"]
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if rates else None
        admitted = sum(int(layer["count"].sum()) for layer in kv.layers) / (kv.L * kv.Hkv * max(1, tokens - kv.window))
        linear, attention = operations(c, tokens, admitted, kv.window)
        row = dict(tokens=tokens, gated_s=times["gated"], dense_s=times.get("dense"), admitted=admitted,
                   bound=(linear + attention) / sum(operations(c, tokens)),
                   kept_share=kv.kept_bytes() / kv.dense_bytes(),
                   reserved_over_kept=kv.reserved_bytes() / kv.kept_bytes(), peak_gib=peak)
        cells = "".join(f"{median(times[n]):9.3f} ±{spread(times[n]):4.0%}" if n in times else f"{'-':>16}"
                        for n in ("dense", "gated"))
        ratio = median(times["gated"]) / median(times["dense"]) if "dense" in times else None
        if rates:
            row["floor_s"] = (linear + attention) / rates["matrix"]
        rows.append(dict(row, ratio=ratio))
        floor = f"{row['floor_s']:9.2f}{row['floor_s'] / median(times['gated']):8.0%}{peak:11.1f}" if rates else ""
        past = "  past the model's training" if tokens > c.max_positions and not args.shape else ""
        lost = "  gating loses here" if ratio and ratio > 1 else ""
        print(f"{tokens:9,}{cells}{ratio or 0:8.2f}{row['bound']:12.2f}{admitted:10.1%}{row['kept_share']:7.1%}{floor}"
              f"{lost}{past}", flush=True)
        del kv
        kept.clear()
        free_memory(model.device)
    return rows


def bench_decode(model, args):
    """One token after another on a prompt: gated, dense, and transformers with its own cache."""
    admission, rates = admission_of(args, model), args.ceilings
    theirs = None if args.shape else transformers_model(args)
    weights = sum(p.nbytes for n, p in model.named_parameters() if n != "embed.weight" or model.lm_head is None)
    print(f"decode, whole model, {args.batch} sequence(s): milliseconds a step (median of {args.steps} steps a run)")
    print(f"{'tokens':>9}{'dense':>16}{'gated':>16}{'transformers':>16}{'gated/dense':>13}{'gated/transf.':>15}"
          + ("{:>11}{:>8}".format("floor ms", "share") if rates else ""))
    rows = []
    for tokens in args.tokens:
        lengths = [tokens * (args.batch + b) // (2 * args.batch - 1) if args.batch > 1 else tokens
                   for b in range(args.batch)]
        prompts = [] if args.shape else [prompt_of(n, args, model) for n in lengths]
        row, times = dict(tokens=tokens, lengths=lengths), {}
        for name in ("dense", "gated"):                      # one cache at a time: two of 400K tokens may not fit
            if name == "dense" and tokens > args.dense_up_to:
                continue
            kv = DenseCache(model, args.batch) if name == "dense" else DualCache(model, admission, args.batch,
                                                                                 tau=args.tau)
            hidden = pretend(model, kv, lengths, args.chunk) if args.shape else prefill(model, kv, prompts, args.chunk)
            times[name] = [seconds_a_step(model, kv, hidden, args.steps) for _ in range(args.runs)]
            if name == "gated" and rates:
                row["needed_bytes"] = weights + kv.kept_bytes()
                row["floor_s"] = row["needed_bytes"] / rates["read"]
            del kv
            free_memory(model.device)
        if theirs:
            times["transformers"] = [transformers_seconds(theirs, prompts[0], args.steps) for _ in range(args.runs)]
        for name, seconds in times.items():
            row[f"{name}_s"] = seconds
            row[f"ratio_{name}"] = median(times["gated"]) / median(seconds)
        cells = "".join(f"{median(times[n]) * 1e3:9.2f} ±{spread(times[n]):4.0%}" if n in times else f"{'-':>16}"
                        for n in ("dense", "gated", "transformers"))
        floor = f"{row['floor_s'] * 1e3:11.2f}{row['floor_s'] / median(times['gated']):8.0%}" if rates else ""
        rows.append(row)
        print(f"{tokens:9,}{cells}{row.get('ratio_dense', 0):13.2f}{row.get('ratio_transformers', 0):15.2f}{floor}",
              flush=True)
    return rows


@torch.no_grad()
def pretend(model, kv, lengths, chunk):
    """As prefill, for a bare shape: random keys and values are remembered, and the attention over them is left out."""
    c = model.config

    class NoAttention(Recorder):
        def prefill_attention(self, q, *others):
            return q

    kv.kernels, kernels = NoAttention(kv.kernels) if kv.kernels else None, kv.kernels
    lengths = torch.tensor(lengths, device=model.device)
    chunk = int(lengths.max()) if isinstance(kv, DenseCache) else chunk
    for start in range(0, int(lengths.max()), chunk):
        new = (lengths - start).clamp(0, chunk)
        T = int(new.max())
        cos, sin = model.rope(kv.begin(T, new))
        if isinstance(kv, DenseCache):
            for layer in kv.layers:
                kv.grow(layer, T)
                layer["k"].normal_(), layer["v"].normal_()
            kv.end()
            break
        q, k, v = torch.randn(len(lengths), c.num_heads + 2 * c.num_kv_heads, T, c.head_dim, device=model.device,
                              dtype=model.dtype).split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        for layer in range(c.num_layers):
            kv.attend(layer, q, k, v, cos, sin)
        kv.end()
    kv.kernels = kernels
    return torch.randn(len(lengths), c.hidden_size, device=model.device, dtype=model.dtype)


def seconds_a_step(model, kv, hidden, steps):
    """The median seconds of a greedy step; the cache grows by what is written. The first few steps do not count."""
    times, last = [], clock(model.device)
    for _ in decode(model, kv, hidden, steps + 8):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return median(times[8:])


def bench_memory(model, args):
    """Peak memory of reading a prompt and writing 16 tokens, gated, and what it is made of."""
    admission, rows = admission_of(args, model), []
    weights = sum(p.nbytes for p in model.parameters())
    print("memory, GiB: weights, what is kept, what is held for it, the peak, and the peak less weights and kept")
    for tokens in args.tokens:
        free_memory(model.device)
        kv = DualCache(model, admission, tau=args.tau)
        hidden = prefill(model, kv, [prompt_of(tokens, args, model)], args.chunk)
        for _ in decode(model, kv, hidden, 16):
            pass
        if model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            import generate
            peak = generate.peak_bytes(model.device)
        row = dict(tokens=tokens, weights=weights, kept=kv.kept_bytes(), reserved=kv.reserved_bytes(), peak=peak,
                   rest=peak - weights - kv.kept_bytes())
        rows.append(row)
        print(f"{tokens:9,}" + "".join(f"{row[name] / 2 ** 30:9.2f}" for name in ("weights", "kept", "reserved", "peak",
                                                                               "rest")), flush=True)
        del kv, hidden
    return rows


def transformers_model(args):
    """The same weights in transformers, or None with a word."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        say("transformers is not installed: its rows are left out")
        return None
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device or "cpu").eval()


@torch.no_grad()
def transformers_seconds(theirs, ids, steps):
    """The median seconds of a greedy step of transformers behind a prompt."""
    from transformers import DynamicCache
    cache, tokens, times = DynamicCache(), torch.tensor([ids], device=theirs.device), []
    for t in range(0, len(ids), 2048):
        out = theirs(tokens[:, t:t + 2048], past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = clock(theirs.device)
    for _ in range(steps + 8):
        token = out.logits[:, -1].argmax(dim=-1)
        token.tolist()                                                   # a streamed token is read by the host
        out = theirs(token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        now = clock(theirs.device)
        times.append(now - last)
        last = now
    return median(times[8:])


def prompt_of(tokens, args, model):
    """Ids of `tokens` tokens: the example's text as often as it takes, or for a bare shape, numbers."""
    if args.shape:
        return torch.randint(model.config.vocab_size, (tokens,)).tolist()
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
                scores[task], kept_share = train.evaluate(
                    model, text, make_kv, some, 32 if model.device.type == "cuda" else 8, bar.update)
                kept.append(kept_share)
        bits = bits_per_byte(model, text, make_kv, passages)
        rows.append(dict(policy=name, kept=statistics.mean(kept), bits_per_byte=bits, **scores))
        if name == "gates":                                              # what random has to admit to keep as much
            share = max(0.0, (rows[-1]["kept"] - window / args.length) / (1 - window / args.length))
        print(f"{name:22}{rows[-1]['kept']:7.1%}" + "".join(f"{s:9.1%}" for s in scores.values()) + f"{bits:11.3f}",
              flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------ program

def plot():
    """assets/time.png: time against length, dense and gated, with the floor of what is needed; from assets/*.json."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figures = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "assets").glob("*.json"))}
    shown = {name: f for name, f in figures.items() if f.get("prefill") and f["prefill"][0].get("floor_s")}
    if not shown:
        raise UserError("assets/ has no figures with a floor: python bench.py prefill decode --json comes first")
    name, f = next(iter(shown.items()))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, what, unit in zip(axes, ("prefill", "decode"), (1, 1e3)):
        for side, colour, label in (("dense_s", "#888888", "dense"), ("gated_s", "#c2410c", "gated")):
            points = [(r["tokens"], median(r[side]) * unit) for r in f.get(what, ()) if r.get(side)]
            axis.plot(*zip(*points), "o-", color=colour, label=label)
        points = [(r["tokens"], r["floor_s"] * unit) for r in f.get(what, ())]
        axis.plot(*zip(*points), ":", color="#c2410c", label="floor of gated")
        lengths = sorted({r["tokens"] for r in f.get(what, ())})
        axis.set(xlabel="tokens", title=what, ylabel="seconds" if unit == 1 else "milliseconds a token")
        axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{f['model']}, {f['machine']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "assets" / "time.png", dpi=150)
    say(f"assets/time.png drawn from assets/{name}.json")


def random_model(args):
    """A model of a named shape with random weights: for time and memory, which do not depend on them."""
    device, dtype = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")), torch.bfloat16
    with torch.device("meta"):
        model = Llama(SHAPES[args.shape]).to(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(std=0.02)
    model.name = f"{args.shape} (random weights)"
    return model


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    benches = dict(kernels=bench_kernels, prefill=bench_prefill, decode=bench_decode, memory=bench_memory,
                   quality=bench_quality)
    parser.add_argument("what", nargs="*", default=["prefill", "decode"], metavar="WHAT",
                        help=f"{', '.join(benches)} or all (all but quality)")
    model_options(parser)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, instead of --model")
    parser.add_argument("--gates", help="gate file")
    parser.add_argument("--admit", default="gates", help="gates, all, none or a share, simulated while gates run; with "
                        "commas, shares for the heads in turn; with slashes, several settings for kernels")
    parser.add_argument("--tau", type=float)
    parser.add_argument("--window", type=int, default=256, help="with a simulated share")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--dense-up-to", type=int, default=2 ** 40, help="no dense side past this length")
    parser.add_argument("--batch", type=int, default=1, help="decode: sequences, from half of --tokens up to all of it")
    parser.add_argument("--chunk", type=int, help="prompt tokens read at once (4096; on a GPU 8192)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode: steps a run")
    parser.add_argument("--plain", action="store_true", help="kernels: the plain Triton prefill kernel as well")
    parser.add_argument("--data", help="quality: the haystack, a text the model was not trained on")
    parser.add_argument("--length", type=int, default=4096, help="quality: tokens a document")
    parser.add_argument("--cases", type=int, default=500, help="quality: questions a task")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, such as assets/cpu.json")
    parser.add_argument("--plot", action="store_true", help="draw assets/time.png from assets/*.json and end")
    args = parser.parse_args(argv)
    if args.plot:
        return plot()
    what = [name for name in benches if name != "quality"] if "all" in args.what else args.what
    for name in what:
        if name not in benches:
            raise UserError(f"{name}: there are {', '.join(benches)} and all")
    if "quality" in what and not args.data:
        raise UserError("quality needs --data, a text for the haystack that the model was not trained on")
    if min(args.tokens) < 2 or min(args.runs, args.steps, args.cases, args.batch, args.window) < 1:
        raise UserError("--tokens should be at least 2; --runs, --steps, --cases, --batch and --window at least 1")
    if args.shape and args.admit == "gates":
        args.admit = "0.25"
    model = random_model(args) if args.shape else load_model(args)
    args.chunk = args.chunk or (8192 if model.device.type == "cuda" else 4096)
    args.ceilings = ceilings(model.device)
    about = dict(machine(model.device), model=model.name, date=time.strftime("%Y-%m-%d"), ceilings=args.ceilings,
                 admit=args.admit, window=args.window, chunk=args.chunk, batch=args.batch)
    say(f"{about['machine']}, torch {about['torch']}, {model.name} in {str(model.dtype)[6:]}")
    results = {}
    for name in what:
        results[name] = benches[name](model, args)
        free_memory(model.device)
        if args.json:                                                    # after each: what is finished is not lost
            write_whole(args.json, json.dumps(dict(about, **results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
