"""Every figure of speed and quality that the README states.

    python bench.py                            prefill and decode with the bundled model, gated beside dense
    python bench.py all --shape llama-3.1-8b   kernels, prefill, decode, memory and training of a real model, on a GPU
    python bench.py quality --quick            what the bundled model still knows with its gates: minutes on a CPU
    python bench.py quality --data BOOK        the same in an unseen book, beside simpler policies
    python bench.py quality --item 1 --books BOOKS --data BOOK    an experiment (1 to 7) into .gates/quality-1.json
    python bench.py quality --prompts OUT.jsonl                   the questions, for any other engine ...
    python bench.py quality --prompts OUT.jsonl --score ANSWERS.jsonl        ... and the score of its answers
    python bench.py --plot                     draws assets/*.png from assets/*.json

Both sides of a comparison run in one process, in turn (in decode one after the other, as two caches may not fit); times
are medians, with the spread beside them, and the ratio is what counts. The dense side is the strongest there is: in
prefill torch's scaled_dot_product_attention (on a GPU its cuDNN kernel) over the whole prompt at once, in decode our
own kernel and graph with everything kept. Beside each time stands its floor: the bytes that must be read over the read
bandwidth, or the operations over the matrix rate, both measured in the same run. --json keeps figures with command,
commit and machine; those of the README are in assets/*.json.

The experiments on quality: 1 lambda and tau, 2 the grace period, 3 simpler policies at equal bytes, 4 tasks by length
and depth, 5 shift of domain, 6 the gate's width, 7 heads. Each trains the gates it needs (kept in --work) and writes
after every finished point, so the same command goes on where it was stopped. --train-steps, --cases and --length make
it small. Without --books gates are trained on what the model writes; without --data the questions stand in that too.
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

import train
from generate import (HERE, Parser, Text, TextStream, check_writable, clock, decode, load_model, make_admission,
                      model_options, peak_bytes, prefill, run_program, write_whole)
from model import Config, Llama, UserError, attention, rotate, say
from tiny import tasks
from wgkv import DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, fingerprint

ASSETS = HERE / "assets"

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


def shares_of(text, model):
    """One share for each KV head (Hkv), out of what --admit says: a share, or several for the heads in turn."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        raise UserError(f"--admit {text}: should be a share, or several for the heads in turn") from None
    return torch.tensor([shares[h % len(shares)] for h in range(model.config.num_kv_heads)], device=model.device)


def admission_of(args, model):
    """What --admit says: with a number, random gates of the right shape run beside the simulation."""
    if not args.shape and args.admit in ("gates", "all", "none"):
        return make_admission(args, model)[0]
    gates = Gates.for_model(model, window=args.window).eval().requires_grad_(False)
    return Simulated(shares_of(args.admit, model), max(args.tokens) + 4096, gates, args.window)


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
        for shares in ("0.25" if args.admit == "gates" else args.admit).split("/"):
            cache = DualCache(layer, Simulated(shares_of(shares, model), tokens + 1, window=args.window))
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
        peak = peak_bytes(model.device) / 2 ** 30
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
    """Peak memory of reading a prompt and writing --steps tokens, gated, what it is made of, and the seconds."""
    admission, rows, names = admission_of(args, model), [], ("weights", "kept", "reserved", "peak", "rest")
    weights = sum(p.nbytes for p in model.parameters())
    print("GiB: weights, what is kept, what is held for it, the peak, the peak less weights and kept; seconds")
    print(f"{'tokens':>9}" + "".join(f"{name:>9}" for name in (*names, "read s", "write s")))
    for tokens in args.tokens:
        free_memory(model.device)
        kv, start = DualCache(model, admission, tau=args.tau), clock(model.device)
        with tqdm(total=tokens, desc="reading", unit=" tokens", unit_scale=True, delay=5, leave=False) as bar:
            hidden = prefill(model, kv, [prompt_of(tokens, args, model)], args.chunk, bar.update)
        read = clock(model.device)
        for _ in decode(model, kv, hidden, args.steps):
            pass
        peak = peak_bytes(model.device)
        row = dict(tokens=tokens, steps=args.steps, weights=weights, kept=kv.kept_bytes(), reserved=kv.reserved_bytes(),
                   peak=peak, rest=peak - weights - kv.kept_bytes(), prefill_s=read - start,
                   decode_s=clock(model.device) - read)
        rows.append(row)
        print(f"{tokens:9,}" + "".join(f"{row[name] / 2 ** 30:9.2f}" for name in names)
              + f"{row['prefill_s']:9.2f}{row['decode_s']:9.2f}", flush=True)
        del kv, hidden
    return rows


# ----------------------------------------------------------------------------------------------------------- training

def bench_train(model, args):
    """The student's attention in one layer, beside dense attention without gates (cuDNN) and compiled flex_attention;
    then a step of training as train.py makes it, the second of three: the others have a hard pass as well."""
    device, rows = model.device, []
    print("the student's attention, one layer, ms forward + backward; and a step of training, whole model")
    for tokens in args.tokens:
        times = student_times(model.config, tokens, args.window, device)
        total = {name: median(forward) + median(backward) for name, (forward, backward) in times.items()}
        print(f"{tokens:9,}  " + ", ".join(f"{name} {median(forward) * 1e3:.2f} + {median(backward) * 1e3:.2f}"
                                           for name, (forward, backward) in times.items())
              + f"; ours over cuDNN {total['ours'] / total['cuDNN']:.2f}, flex over ours "
              f"{total['flex'] / total['ours']:.2f}", flush=True)
        free_memory(device)
        recipe = replace(train.PAPER, seq_len=(tokens,), steps=3, window=args.window, tokens_per_step=tokens)
        gates, lines = Gates.for_model(model, window=args.window), []
        how, estimate = train.fit(model, gates, recipe)
        samples = train.Samples(lambda rng, n: (torch.tensor(rng.choices(range(model.config.vocab_size), k=n)),
                                                torch.ones(n)), recipe)
        train.train(model, gates, torch.optim.AdamW(gates.parameters()), samples, recipe, how=how, log=lines.append)
        rate, peak = lines[1]["tokens_per_s"], peak_bytes(device)
        rows.append(dict(tokens=tokens, attention={name: dict(forward_s=forward, backward_s=backward)
                                                   for name, (forward, backward) in times.items()}, estimate=estimate,
                         checkpointed=how[tokens][1], peak=peak, step_s=lines[1]["seconds"], tokens_per_s=rate))
        print(f"{'':9}  {lines[1]['seconds']:.2f} s a step, {rate:,.0f} tokens/s; the paper's 65 million tokens would "
              f"take {65e6 / rate / 3600:.1f} hours; peak {peak / 2 ** 30:.1f} GiB ({estimate})", flush=True)
    return rows


def student_times(c, tokens, window, device):
    """{name: ([forward seconds], [backward seconds])} of one layer's attention in training, in turn."""
    import kernels
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    G = c.num_heads // c.num_kv_heads
    q, k, v = (torch.randn(1, heads, tokens, c.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
               for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    wide_k, wide_v = (x.detach().repeat_interleave(G, dim=1).requires_grad_() for x in (k, v))
    log_g = torch.rand(1, c.num_kv_heads, tokens, device=device).log().requires_grad_()
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)

    def bias(score, b, h, i, j):
        return torch.where(i - j < window, score, score + log_g[b, h // G, j])

    flex = torch.compile(functools.partial(flex_attention, score_mod=bias, block_mask=causal, enable_gqa=True),
                         dynamic=False)
    sides = {"ours": (lambda *qkvg: kernels.soft_attention(*qkvg, window), (q, k, v, log_g)),
             "cuDNN": (lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), (q, wide_k, wide_v)),
             "flex": (lambda *qkvg: flex(*qkvg[:3]), (q, k, v, log_g))}
    times, do, runs = {name: ([], []) for name in sides}, torch.randn_like(q), 3 if tokens > 16384 else 7
    for run in range(runs + 2):
        for name, (attend, inputs) in sides.items():
            a, b, c = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                a.record()
                out = attend(*inputs)
                b.record()
                torch.autograd.grad(out, inputs, do)
                c.record()
            torch.cuda.synchronize()
            for some, seconds in zip(times[name], (a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3)):
                some += [seconds] * (run > 1)
    return times


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


# -------------------------------------------------------------------------------- quality: policies to compare with

class Sinks:
    """Admits the first tokens and nothing else: attention sinks and a window (StreamingLLM); 0 sinks: a window only."""
    tau = 0.5

    def __init__(self, window, sinks=16):
        self.window, self.sinks = window, sinks

    def gate(self, layer, k, k_rotated, positions):
        return torch.where(positions < self.sinks, 1.0, -1.0)[:, None].expand(k.shape[:3])


class Uniform(RandomAdmission):
    """Admits this share of the tokens at random, each head others."""

    def __init__(self, window, share):
        super().__init__(share)
        self.window = window


class Heads:
    """One decision a head: the first of a ranking keep everything, the others their window (DuoAttention's idea).

    ranking (L, Hkv): 0 for the head that comes first. What a share of heads leaves over of a whole head widens all
    windows, so that any number of bytes can be met in documents of `length` tokens.
    """
    tau = 0.5

    def __init__(self, window, ranking, share, length):
        whole, part = divmod(share * ranking.numel(), 1)
        self.chosen = torch.where(ranking < whole, 1.0, -1.0)
        self.window = window + round(part * (length - window) / ranking.numel())

    def gate(self, layer, k, k_rotated, positions):
        return self.chosen[layer][None, :, None].expand(k.shape[:3])


class Told:
    """Admits by values made before a batch is read, out of its documents. What comes behind them (question, answer) is
    admitted: that little is in the window in any case."""

    def __init__(self, window, share):
        self.window, self.tau = window, 1 - share

    def tell(self, model, text, documents):
        values = [self.values(model, text, d).to(model.device) for d in documents]       # (L or 1, Hkv or 1, S) each
        longest = max(v.shape[2] for v in values)
        self.g = torch.stack([F.pad(v, (0, longest + 1 - v.shape[2]), value=1.0) for v in values], dim=1)

    def gate(self, layer, k, k_rotated, positions):
        g = self.g[layer % len(self.g)].expand(*k.shape[:2], -1)
        return g.gather(2, positions.clamp(max=g.shape[2] - 1)[:, None].expand(k.shape[:3]))


class Rare(Told):
    """Admits tokens that are rare so far: 1 / (1 + how often the id came before), ties at random; all heads alike."""

    def values(self, model, text, document):
        seen, counts = Counter(), []
        for token in text.encode(document.body):
            counts.append(seen[token])
            seen[token] += 1
        ties = torch.rand(len(counts), generator=torch.Generator().manual_seed(0))
        return 1 / (1 + torch.tensor(counts) + ties)[None, None]


class Oracle(Told):
    """Admits, alike many in each head, the keys that the question looks at (SnapKV's signal: mean attention of the
    prompt's last queries, spread over 7 neighbours). UNFAIR: it sees the question before it decides what to keep."""
    one_question = True                                              # each question needs a reading of its own

    def values(self, model, text, document):
        body = text.encode(document.body)
        asked = text.encode(document.questions[0][0], begin=False) if document.questions else []
        mass = F.max_pool1d(attention_mass(model, body + asked, len(asked) or 32)[:, :, :len(body)], 7, 1, 3)
        rank = mass.argsort(dim=-1, descending=True).argsort(dim=-1)
        return 1 - rank / len(body)


class Watch(SoftAttention):
    """Full attention that notes how much of it the last queries give to each key: g[layer] (B, Hkv, T), its sum 1."""

    def __init__(self, device, last):
        super().__init__(None, device)
        self.last = last

    def attend(self, layer, q, k, v, cos, sin):
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        B, Hkv, T, D = k.shape
        n = min(self.last, T)
        later = torch.arange(T, device=q.device) > torch.arange(T - n, T, device=q.device)[:, None]
        grouped = q[:, :, -n:].reshape(B, Hkv, -1, n, D).float()
        scores = (grouped @ k[:, :, None].float().transpose(-1, -2) / D ** 0.5).masked_fill(later, -torch.inf)
        self.g[layer] = scores.softmax(dim=-1).mean(dim=(2, 3))
        return attention(q, k, v, is_causal=True)


@torch.no_grad()
def attention_mass(model, ids, last):
    """(L, Hkv, S): the share of the last queries' attention that each of the S ids gets, with everything kept."""
    watch = Watch(model.device, last)
    model(torch.tensor([ids], device=model.device), watch)
    return torch.cat([watch.g[layer] for layer in range(len(watch.g))])


def rank_heads(model, text, documents, window):
    """(L, Hkv): heads by how much the answers of documents look at keys outside the window; 0 looks most."""
    far = 0
    for d in documents:
        asked = text.encode("".join(question + answer for question, answer in d.questions), begin=False)
        body = text.encode(d.body)
        far = far + attention_mass(model, body + asked, len(asked))[:, :, :max(1, len(body) - window)].sum(dim=-1)
    return far.flatten().argsort(descending=True).argsort().view_as(far)


SIMPLER = {                                        # make(window, share, length, ranking), share from 0 to 1: keeps more
    "window only": lambda W, share, length, ranking: Sinks(max(1, round(share * length)), 0),
    "16 sinks + window": lambda W, share, length, ranking: Sinks(max(1, round(share * length))),
    "uniform random": lambda W, share, length, ranking: Uniform(W, share),
    "rare tokens": lambda W, share, length, ranking: Rare(W, share),
    "whole heads": lambda W, share, length, ranking: Heads(W, ranking(), share, length),
    "oracle (unfair: sees the question)": lambda W, share, length, ranking: Oracle(W, share)}


def matched(make, kept, model, text, documents):
    """make(share) that keeps `kept` of a dense cache's bytes, measured on documents, by bisection. Where a page of each
    head is the least step it is the larger number, and all of that page is used."""
    bodies = [text.encode(d.body) for d in documents]

    def kept_by(share):
        kv = cache_of(model, text, make(share))(documents)
        prefill(model, kv, bodies)
        return kv.kept_bytes() / kv.dense_bytes()

    def largest(limit):
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if kept_by(middle) <= limit else (low, middle)
        return low, high

    return make(largest(kept_by(largest(kept)[1]))[0])


# ------------------------------------------------------------------------------------------------- quality: the scores

def interval(values, bounded=True):
    """{"mean", "low", "high", "n"} with a 95% interval, as if cases were independent: Wilson's where all are right or
    wrong, the normal one of a mean elsewhere."""
    n, mean = len(values), statistics.mean(values)
    if bounded and set(values) <= {0, 1}:
        middle, half = (mean + 1.92 / n) / (1 + 3.84 / n), 1.96 / (n + 3.84) * (n * mean * (1 - mean) + 0.96) ** 0.5
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    else:
        half = 1.96 * statistics.stdev(values) / n ** 0.5
        low, high = (max(0.0, mean - half), min(1.0, mean + half)) if bounded else (mean - half, mean + half)
    return dict(mean=mean, low=low, high=high, n=n)


def cache_of(model, text, policy):
    """What train.evaluate asks for: an empty cache for a batch of documents. policy: an admission; None keeps all."""
    def make_kv(documents):
        if policy is None:
            return DenseCache(model, len(documents))
        if hasattr(policy, "tell"):
            policy.tell(model, text, documents)
        return DualCache(model, policy, len(documents))

    return make_kv


@torch.no_grad()
def score(model, text, policy, tests):
    """A policy on tests, {task: documents}: {"kept": share of a dense cache's bytes, task: an `interval` and its kept}.

    Prose gives bits a byte of text, with "loss", the mean squared distance of last hidden states from full attention's
    (the hard distillation loss), and "admitted", the share of the keys outside the window that were.
    """
    make_kv, out = cache_of(model, text, policy), {}
    free_memory(model.device)
    with tqdm(total=sum(map(len, tests.values())), unit=" documents", desc="scoring", delay=1, leave=False) as bar:
        for task, documents in tests.items():
            if task == "prose":
                bits, loss, kept, admitted = zip(*(read_passage(model, text, make_kv, d) for d in documents))
                out.update(prose=interval(bits, False), loss=interval(loss, False), admitted=statistics.mean(admitted))
                out["prose"]["kept"] = statistics.mean(kept)
                continue
            if hasattr(policy, "one_question"):
                documents = [tasks.Document(task, d.body, [asked]) for d in documents for asked in d.questions]
            longest = max(len(d.body) for d in documents) // 4                       # tokens, about
            batch = max(1, min(32, 2 ** 17 // longest)) if model.device.type == "cuda" else 8
            scores, kept = train.evaluate(model, text, make_kv, documents, batch, bar.update)
            out[task] = dict(interval(scores), kept=kept)
    return dict(kept=statistics.mean(out[task]["kept"] for task in tests), **out)


def read_passage(model, text, make_kv, document):
    """(bits a byte, squared distance from full attention, kept share, admitted share), read in one call."""
    kv, ids = make_kv([document]), torch.tensor([text.encode(document.body)], device=model.device)
    hidden = model(ids, kv)
    logits, admitted = model.logits(hidden)[0, :-1].float(), 1.0
    bits = F.cross_entropy(logits, ids[0, 1:], reduction="sum").item() / 0.6931471805599453
    if isinstance(kv, DualCache):
        older = kv.L * kv.Hkv * max(1, ids.shape[1] - kv.window)
        admitted = sum(int(layer["count"].sum()) for layer in kv.layers) / older
    loss = (hidden.float() - model(ids).float()).square().mean().item()
    return bits / len(document.body.encode()), loss, kv.kept_bytes() / kv.dense_bytes(), admitted


def single_fact(haystack, tokens, depth, encode, rng):
    """One fact at this share of a text of about `tokens` tokens (0: its beginning), and the question about it."""
    body = tasks.make("prose", haystack, tokens - 48, encode, rng)[0].body
    name, code, wanted = rng.choice(tasks.NAMES), rng.randint(1000, 9999), depth * len(body)
    seam = min([0] + [m.end() for m in re.finditer(r"[a-z]{2}[.!?] (?=[A-Z])", body)], key=lambda at: abs(at - wanted))
    return tasks.Document("fact", f"{body[:seam]}The code of {name} is {code}. {body[seam:]}", [
        (f"\n\nWhat is the code of {name}?", f" The code of {name} is {code}.{tasks.END}")])


# -------------------------------------------------------------------------------------------- quality: the experiments

ALL = ("facts", "lists", "classes", "copy", "prose")
LAMBDAS = (0.02, 0.08, 0.32, 1.28, 5.12)
ONE_LAMBDA = 5.12                                   # of items 5 and 6: a tenth of the cache is kept
QUICK = 24, 1024, 8192                              # questions a task, tokens a document, tokens that the model writes
SWEEP = replace(train.BUNDLED, seq_len=(4096,), tokens_per_step=32768, steps=300, lr=1e-3)       # for a GPU


def digest(*facts):
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path} cannot be made: {e.strerror}") from None


class Experiment:
    """One item: its file of finished rows, its documents, its trained gates. All of it comes from the settings, so an
    interrupted run, started again, does only what is missing."""

    def __init__(self, item, model, args):
        self.model, self.args, self.text = model, args, Text(args.model)
        self.path = args.json or (Path(args.work, f"quality-{item}.json") if item in ITEMS else None)
        preset, positions = SWEEP if train.is_bundled(args) else train.PAPER, model.config.max_positions
        asked = dict(seq_len=args.train_seq_len or tuple(n for n in preset.seq_len if n <= positions) or (positions,),
                     tokens_per_step=args.train_tokens_per_step, steps=args.train_steps,
                     haystack_tokens=args.train_haystack_tokens)
        asked = {name: value for name, value in asked.items() if value is not None}
        self.recipe = replace(preset, seed=args.seed, tasks="asked", **asked)
        given = args.gates or ("" if item in (1, 2, 3, 5, 6) else str(Path(args.model, "gates.safetensors")))
        if args.gates:
            self.given()                                              # a file that is no gates is a mistake made early
        self.settings = dict(
            item=item, model=model.name, weights=fingerprint(model), dtype=str(model.dtype)[6:], seed=args.seed,
            cases=args.cases, length=args.length, train=json.loads(json.dumps(asdict(self.recipe))),
            **{name: path and [Path(path).name, digest(train.read_text(path))]
               for name, path in (("data", args.data), ("books", args.books))},
            gates=digest(Path(given).read_bytes()) if Path(given).is_file() else None, tau=args.tau)
        self.lam = (args.lam or [ONE_LAMBDA])[0]
        self.rows, self.shown, self.about = [], [], dict(machine(model.device), seed=args.seed,
                                                            date=time.strftime("%Y-%m-%d"))
        if self.path and Path(self.path).exists():
            try:
                there = json.loads(Path(self.path).read_text(encoding="utf-8"))
                self.rows, there = there["rows"], there["settings"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path} holds no rows of an experiment: give another --json") from None
            for name, value in self.settings.items():
                if there.get(name) != value:
                    raise UserError(f"{self.path} has rows of another run, {name} {there.get(name)} there and {value} "
                                    "here: give the same options, or another --json")

    def row(self, settings, measure):
        """The row with these settings: the one in the file, or else what measure() gives, written at once."""
        row = next((row for row in self.rows if row["settings"] == settings), None)
        if row is None:
            row = dict(settings=settings, **measure(), **self.about)
            self.rows.append(row)
            if self.path:
                make_folder(Path(self.path).parent)
                write_whole(self.path, json.dumps(dict(settings=self.settings, rows=self.rows), indent=1) + "\n")
        if row in self.shown:
            return row
        self.shown.append(row)
        label = ", ".join(v if k == "policy" else f"{k} {v}" for k, v in row["settings"].items() if k != "tasks")
        print(f"{label}: kept {row['kept']:.1%}" + "".join(
            f"; {name} {r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f}" + (
                f"; full {row['full'][name]:.3f})" if name in row.get("full", ()) else ")")
            for name, r in row.items() if isinstance(r, dict) and "mean" in r), flush=True)
        return row

    def scored(self, settings, make, names, also=lambda policy: {}, **where):
        """The row of a policy, make(), on these tasks, with full attention's scores on the same documents beside it.

        where: length, text and depth of the documents, if not the usual. also(policy) -> more for the row.
        """
        def measure(policy):
            return score(self.model, self.text, policy, {task: self.documents(task, **where) for task in names})

        def gated():
            policy = make()
            return dict(measure(policy), full={name: full[name]["mean"] for name in names}, **also(policy))

        full = self.row(dict(policy="full attention", tasks=[*names], **where), lambda: measure(None))
        return self.row(dict(settings, tasks=[*names], **where), gated)

    @functools.cache
    def prose(self, which):
        """A text to hide things in: data, code (this repository's), own (written by the model)."""
        if which == "code":
            files = [*sorted(HERE.glob("*.py")), *sorted(HERE.glob("tiny/*.py"))]
            return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        if which == "data":
            return train.read_text(self.args.data) if self.args.data else self.prose("own")
        seed = self.args.seed + (which != "own, to train on")        # never the passages that gates were trained on
        return train.model_writes(self.model, self.text, self.recipe.haystack_tokens, seed)

    @functools.cache
    def haystack(self, which):
        return train.make_haystack(self.prose(which), which)

    @functools.cache
    def documents(self, task, length=None, text="data", depth=None):
        """At least --cases questions of a task (prose: an eighth as many passages), the same in every run."""
        rng, haystack = random.Random(f"{self.args.seed}/{text}/{task}/{length}/{depth}"), self.haystack(text)
        length, encode, cases, found = length or self.args.length, self.text.tokenizer.encode, self.args.cases, []
        with tqdm(total=cases, desc=f"{task} to be asked", unit=" questions", delay=1, leave=False) as bar:
            while bar.n < (max(4, cases // 8) if task == "prose" else cases):
                try:
                    found.append(single_fact(haystack, length, depth, encode, rng) if task == "fact" else
                                 tasks.make(task, haystack, length, encode, rng)[0])
                except ValueError as e:
                    raise UserError(f"{e}: raise the length") from None
                bar.update(len(found[-1].questions) or 1)
        return found

    @functools.cache
    def draw(self, source):
        """What gates are trained on: draw(rng, length) -> (ids, weights). Tasks hidden in the model's own writing, in
        books or in either; "plain books" is books with nothing hidden."""
        if source == "both":
            both = self.draw("own"), self.draw("books")               # here and now: a worker has no card to write with
            return lambda rng, length: rng.choice(both)(rng, length)
        documents = [self.prose("own, to train on")] if source == "own" else train.read_documents(self.args.books)
        plain = source == "plain books"
        recipe = replace(self.recipe, tasks="") if plain else self.recipe
        return train.samples(SimpleNamespace(data=plain and self.args.books), recipe, documents, self.model,
                             self.text)[0]

    @functools.cache
    def samples(self, source):
        """The samples of each step, as train.Samples has them: drawn once, into --work, for all gates of a source."""
        facts = {name: self.settings["train"][name] for name in ("seed", "seq_len", "tokens_per_step", "steps")}
        path = self.kept(f"{source}-samples-{{}}.pt", source, self.recipe.haystack_tokens, facts)
        if not path.exists():
            drawn, steps = train.Samples(self.draw(source), self.recipe), range(self.recipe.steps)
            small = torch.int16 if self.model.config.vocab_size < 2 ** 15 else torch.int32
            loader = DataLoader(drawn, None, sampler=steps, num_workers=train.workers(self.model.device))
            drawn = [[(ids.to(small), weights.half()) for ids, weights in step]
                     for step in tqdm(loader, desc=path.name, unit=" steps", delay=1)]
            train.save_whole(path, drawn)
        return torch.load(path, weights_only=True)

    def kept(self, name, source, *facts):
        """The path in --work of what depends on the model, a source and these facts: a mark of them goes into {}."""
        make_folder(self.args.work)
        mark = digest(self.settings["weights"], source, source != "own" and self.settings["books"], *facts)[:8]
        return Path(self.args.work, name.format(mark).replace(" ", "-"))

    def gates(self, lam, window=None, expansion=None, source=None, inputs="both"):
        """Gates trained with these settings: those in the folder --work, or else new ones, which go there."""
        recipe = replace(self.recipe, lam=lam, window=window or self.recipe.window, expansion=expansion or
                         self.recipe.expansion)
        source = source or ("books" if self.args.books else "own")
        path = self.kept(f"{source}-lam{lam:g}-W{recipe.window}-E{recipe.expansion:g}-{inputs}-{{}}.safetensors",
                         source, asdict(recipe))
        if not path.exists():
            say(f"training {path}")
            torch.manual_seed(recipe.seed)
            gates = Gates.for_model(self.model, window=recipe.window, tau=recipe.tau, expansion=recipe.expansion)
            leave_out(gates, inputs)
            optimizer = torch.optim.AdamW(gates.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
            how, _ = train.fit(self.model, gates, recipe)
            why = train.train(self.model, gates, optimizer, self.samples(source), recipe, how=how)[1]
            if why:
                raise KeyboardInterrupt if why == "interrupted" else UserError(f"{path}: {why}")
            gates.eval().requires_grad_(False).save(path, self.model, lam, json.dumps(asdict(recipe)))
        return Gates.load(path, self.model)

    def sweep(self):
        """(settings, make) of the gates to compare: those of --gates, or one for each --lam."""
        if self.args.gates:
            return [(dict(gates=Path(self.args.gates).name), self.given)]
        return [(dict(lam=lam), functools.partial(self.gates, lam)) for lam in self.args.lam or LAMBDAS]

    def given(self):
        """The gates of --gates, or the model's own, with --tau."""
        gates, tau = make_admission(self.args, self.model)[0], self.args.tau
        gates.tau = gates.tau if tau is None else tau
        return gates


def leave_out(gates, inputs):
    """Gates that see the key only "before" or "after" RoPE, if not "both". The other's norm and columns of W1 are zero:
    each is a factor of the other's gradient, so that training leaves them so."""
    D = gates.shape[2]
    with torch.no_grad():
        for gate in gates.layers if inputs != "both" else ():
            norm, columns = ((gate.post_norm, gate.w1[..., D:]) if inputs == "before" else
                             (gate.pre_norm, gate.w1[..., :D]))
            norm.zero_(), columns.zero_()


def sparsity(x):
    """1. lambda times tau: is tau = 0.1 on the frontier of loss, or of facts, against kept share?"""
    def at(make, tau):
        gates = make()
        gates.tau = tau
        return gates

    for settings, make in x.sweep():
        for tau in x.args.taus:
            x.scored(dict(policy="gates", **settings, tau=tau), functools.partial(at, make, tau), ("facts", "prose"))


def grace_period(x):
    """2. W = 1 beside the usual window, gates trained for each; W = 1 keeps more, so it gets larger lambdas as well."""
    lams = x.args.lam or LAMBDAS
    for window, some in ((x.recipe.window, lams), (1, [*lams, 4 * lams[-1], 16 * lams[-1]])):
        for lam in some:
            x.scored(dict(policy="gates", W=window, lam=lam), lambda: x.gates(lam, window), ("facts", "prose"))


def simpler_policies(x):
    """3. Each of SIMPLER with as many bytes as the gates keep."""
    for settings, make in x.sweep():
        kept = x.scored(dict(policy="gates", **settings), make, ALL)["kept"]
        for name, family in SIMPLER.items():
            def match():
                gates, documents = make(), {task: x.documents(task)[:4] for task in ALL}
                ranking = functools.cache(lambda: rank_heads(x.model, x.text, documents["facts"] + documents["copy"],
                                                             gates.window))
                return matched(lambda share: family(gates.window, share, x.args.length, ranking), kept, x.model, x.text,
                               [some[0] for some in documents.values()])
            x.scored(dict(policy=name, beside=settings), match, ALL,
                     also=lambda policy: dict(W=policy.window, share=getattr(policy, "share", None)))


def by_task(x):
    """4. A single fact by depth and length, and every task by length."""
    for length in x.args.lengths:
        for depth in x.args.depths:
            x.scored(dict(policy="gates"), x.given, ("fact",), length=length, depth=depth)
        for task in ALL:
            x.scored(dict(policy="gates"), x.given, (task,), length=length)


def by_domain(x):
    """5. Gates trained on one kind of text, tested on another: an unseen book, source code, the model's own writing."""
    for source in ("own", "books", "both", "plain books"):
        for text in ("data", "code", "own"):
            x.scored(dict(policy="gates", source=source), lambda: x.gates(x.lam, source=source), ("facts", "prose"),
                     text=text)


def by_width(x):
    """6. The gate's hidden width, and the key only before or only after RoPE."""
    usual = x.recipe.expansion
    for width, inputs in ((0.5, "both"), (1.0, "both"), (2.0, "both"), (usual, "both"), (usual, "before"),
                          (usual, "after")):
        x.scored(dict(policy="gates", width=width, inputs=inputs),
                 lambda: x.gates(x.lam, expansion=width, inputs=inputs), ("facts", "prose"),
                 also=lambda gates: cost_of(gates, x.model))


@torch.no_grad()
def cost_of(gates, model):
    """Parameters (those left out, which are 0, not counted), and milliseconds of one layer's gates for 4,096 tokens."""
    def side():
        gates.gate(0, k, k, None)

    _, Hkv, D = gates.shape
    k = torch.randn(1, Hkv, 4096, D, device=model.device, dtype=model.dtype)
    times = device_times(side)[0] if model.device.type == "cuda" else in_turn(7, model.device, gate=side)["gate"]
    return dict(parameters=sum(int((p != 0).sum()) for p in gates.parameters()), gate_ms=median(times) * 1e3)


def by_head(x):
    """7. The share that each head admits of tiny/example.txt, and what the most and the least admitting heads keep."""
    row = x.row(dict(policy="gates", text="tiny/example.txt"), lambda: heads_of(x.model, x.text, x.given()))
    for head in row["heads"]:
        print(f"layer {head['layer']}, head {head['head']} ({head['which']} admitting) admits {head['share']:.1%}: "
              + ", ".join(f"{piece!r} {kept} of {seen}" for piece, kept, seen in head["kept"][:8])
              + f"\n    {head['excerpt']!r}")


def heads_of(model, text, gates):
    """{"map": shares (L, Hkv), "heads": of six heads the tokens kept most often, and a stretch of the text with _ for
    what is not kept}."""
    story = (HERE / "tiny" / "example.txt").read_text(encoding="utf-8")
    ids, kv, stream = text.encode(story), DualCache(model, gates), TextStream(text)
    prefill(model, kv, [ids])
    pieces, admitted, heads = [stream.push(token) for token in ids], kv.admitted(), []
    shares, seen = admitted.float().mean(-1), Counter(pieces)
    order = [divmod(int(n), kv.Hkv) for n in shares.flatten().argsort(descending=True) if shares.flatten()[n] > 0]
    start = max(0, len(text.encode(story[:story.index("The code of")])) - 20)
    for which, (layer, head) in [("most", at) for at in order[:3]] + [("least", at) for at in order[-3:]]:
        mask = admitted[layer, head].tolist()
        kept = Counter(piece for piece, is_kept in zip(pieces, mask) if is_kept).most_common(40)
        excerpt = "".join(p if is_kept else "_" for p, is_kept in list(zip(pieces, mask))[start:start + 80])
        heads.append(dict(which=which, layer=layer, head=head, share=shares[layer, head].item(), excerpt=excerpt,
                          kept=[(piece, count, seen[piece]) for piece, count in kept]))
    return dict(kept=kv.kept_bytes() / kv.dense_bytes(), map=shares.tolist(), heads=heads)


ITEMS = {1: sparsity, 2: grace_period, 3: simpler_policies, 4: by_task, 5: by_domain, 6: by_width, 7: by_head}


def bench_quality(model, args):
    """The experiments of --item; the prompts for another engine; or else the gates at hand beside simpler policies."""
    for item in args.item:
        say(f"item {ITEMS[item].__doc__}")
        ITEMS[item](Experiment(item, model, args))
    if args.item:
        return
    x = Experiment("prompts" if args.prompts else "summary", model, args)
    if args.prompts:
        rows = [dict(id=f"{task}/{n}/{m}", task=task, prompt=d.body + question,
                     answer=answer.removesuffix(tasks.END).strip())
                for task in ALL[:-1] for n, d in enumerate(x.documents(task)) for m, (question, answer) in
                enumerate(d.questions)]
        write_whole(args.prompts, "".join(json.dumps(row) + "\n" for row in rows))
        return say(f"{args.prompts}: {len(rows)} prompts")
    gates = x.given()
    row = x.scored(dict(policy="gates"), lambda: gates, ALL)
    x.scored(dict(policy="window only"), lambda: Sinks(gates.window, 0), ALL)
    if not args.quick:
        x.scored(dict(policy="16 sinks + window"), lambda: Sinks(gates.window), ALL)
        x.scored(dict(policy="random, same share"), lambda: matched(
            lambda share: Uniform(gates.window, share), row["kept"], model, x.text,
            [x.documents(task)[0] for task in ALL]), ALL)


def read_lines(path, *names):
    """{id: object} of a .jsonl file whose lines have these fields, text all of them. UserError names file and line."""
    found = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                row = {name: row[name] + "" for name in ("id", *names)}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}: no JSON object with id, {', '.join(names)} as text") from None
            if row["id"] in found:
                raise UserError(f"{path}, line {number}: {row['id']} was there before")
            found[row["id"]] = row
    return found


def score_answers(args):
    """Scores another engine's answers to --prompts as our own are scored, up to the end mark if there is one."""
    prompts, answers = read_lines(args.prompts, "task", "prompt", "answer"), read_lines(args.score, "answer")
    for one, other, what in ((prompts, answers, f"{args.score} has no answer to"),
                             (answers, prompts, f"{args.prompts} has no prompt")):
        missing = [name for name in one if name not in other]
        if missing:
            raise UserError(f"{what} {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    scores = {}
    for name, p in prompts.items():
        said = answers[name]["answer"].partition(tasks.END)[0]
        scores.setdefault(p["task"], []).append(tasks.correct(p["task"], p["answer"], said))
    for task, values in scores.items():
        r = interval(values)
        print(f"{task:10}{r['mean']:8.1%}   ({r['low']:.1%} to {r['high']:.1%}, {r['n']} answers)")


# ----------------------------------------------------------------------------------------------------------- pictures

# Of the paper's figure data (arXiv 2512.17452, Llama-3.1-8B): (admitted share, hard distillation loss).
# llama-3.1-8b_threshold.csv, W = 256: for lambda, at the taus of item 1.
PAPER_TAUS = {
    0.02: ((.639, .0040), (.632, .0040), (.625, .0042), (.614, .0043), (.605, .0045), (.589, .0058), (.576, .0101)),
    0.08: ((.371, .0136), (.361, .0142), (.351, .0147), (.334, .0157), (.318, .0166), (.294, .0276), (.266, .0404)),
    0.32: ((.207, .0403), (.195, .0419), (.181, .0438), (.159, .0478), (.136, .0552), (.104, .0832), (.082, .1391)),
    1.28: ((.109, .1089), (.097, .1129), (.082, .1182), (.059, .1311), (.040, .1506), (.023, .2073), (.016, .2794))}
# The same and llama-3.1-8b_threshold_local1.csv, tau 0.1, for lambda 0.16 to 2.56.
PAPER_WINDOWS = {"W = 256": ((.236, .0287), (.159, .0478), (.099, .0807), (.059, .1311), (.033, .1737)),
                 "W = 1": ((.789, .0146), (.684, .0347), (.541, .0886), (.380, .2101), (.241, .4527))}


def rows_of(item):
    """(rows of policies, rows of full attention) of assets/quality-N.json; empty if it is not there."""
    path = ASSETS / f"quality-{item}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [[row for row in rows if (row["settings"]["policy"] == "full attention") == full] for full in (False, True)]


def curves(axis, rows, key, x, y):
    """A line with intervals for each value of key(row); x: the name of a share in a row, y: of an interval."""
    for i, value in enumerate(dict.fromkeys(map(key, rows))):
        points = sorted((row[x], row[y]["mean"], row[y]["mean"] - row[y]["low"], row[y]["high"] - row[y]["mean"])
                        for row in rows if key(row) == value)
        xs, ys, *errors = zip(*points)
        axis.errorbar(xs, ys, errors, fmt="o-", ms=3, lw=1.2, elinewidth=0.6, label=value, color=f"C{i}")
    axis.set_xscale("log")
    ticks = 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1
    axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axis.autoscale(axis="x")                             # to what is drawn, where ticks had widened it
    axis.minorticks_off()


def draw_sparsity(pyplot, rows, full):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, x, y in ((left, "admitted", "loss"), (right, "kept", "facts")):
        curves(axis, rows, lambda row: f"lambda {row['settings'].get('lam', 'as given')}", x, y)
        at = [(row[x], row[y]["mean"]) for row in rows if row["settings"]["tau"] == 0.1]
        axis.plot(*zip(*at) if at else ((), ()), "k*", ms=9, zorder=3, label="tau = 0.1")
    for i, points in enumerate(PAPER_TAUS.values()):
        left.plot(*zip(*points), ":", color="#888888", label="the paper, Llama-3.1-8B" if not i else None)
    right.axhline(full[0]["facts"]["mean"], color="#888888", lw=0.8, label="full attention")
    left.set(yscale="log", xlabel="share admitted", ylabel="hard distillation loss")
    left.set_title("another model than the paper's: only shapes compare", fontsize=9)
    right.set(xlabel="share of a dense cache kept, in bytes", ylabel="facts recalled")
    return figure, (left, right)


def draw_grace_period(pyplot, rows, full):
    figure, axis = pyplot.subplots(figsize=(6, 4))
    curves(axis, rows, lambda row: f"W = {row['settings']['W']}", "admitted", "loss")
    for style, (name, points) in zip((":", "--"), PAPER_WINDOWS.items()):
        axis.plot(*zip(*points), style, color="#888888", label=f"the paper, {name}")
    axis.set(yscale="log", xlabel="share admitted outside the window", ylabel="hard distillation loss",
             title="the paper's is Llama-3.1-8B: only shapes compare")
    return figure, (axis,)


def draw_policies(pyplot, rows, full):
    figure, axes = pyplot.subplots(1, len(ALL), figsize=(17, 3.6))
    for axis, task in zip(axes, ALL):
        curves(axis, rows, lambda row: row["settings"]["policy"], "kept", task)
        axis.axhline(full[0][task]["mean"], color="#888888", lw=0.8, label="full attention")
        axis.set(xlabel="kept", title="prose, bits a byte" if task == "prose" else task)
    axes[0].legend(frameon=False, fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.95))
    return figure, ()


def draw_tasks(pyplot, gated, full):
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8))
    lengths, depths = (sorted({row["settings"][name] for row in gated if name in row["settings"]})
                       for name in ("length", "depth"))
    for axis, rows, title in zip(axes, (full, gated), ("full attention", "gates")):
        grid = {(row["settings"]["depth"], row["settings"]["length"]): row["fact"]["mean"] for row in rows
                if "fact" in row}
        axis.imshow([[grid.get((d, n), float("nan")) for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn",
                    aspect="auto")
        for (d, n), value in grid.items():
            axis.text(lengths.index(n), depths.index(d), f"{value:.0%}", ha="center", va="center", fontsize=8)
        axis.set(xlabel="tokens", ylabel="depth of the fact", title=f"a single fact, {title}")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    for i, task in enumerate(ALL[:-1]):
        for rows, style in ((gated, "o-"), (full, ":")):
            points = sorted((row["settings"]["length"], row[task]["mean"]) for row in rows if task in row)
            axes[2].plot(*zip(*points), style, color=f"C{i}", ms=3, label=None if style == ":" else task)
    axes[2].set(xscale="log", ylim=(0, 1.02), xlabel="tokens", title="gates (lines) and full attention (dotted)")
    axes[2].set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes[2].minorticks_off()
    return figure, axes[2:]


def draw_heads(pyplot, rows, full):
    figure, axis = pyplot.subplots(figsize=(4.5, 4))
    image = axis.imshow(rows[0]["map"], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="share of the tokens admitted")
    axis.set(xlabel="KV head", ylabel="layer", title=rows[0]["settings"]["text"])
    return figure, ()


def draw_time(pyplot):
    """Time against length, dense and gated, with the floor of what is needed; of the first file that has one."""
    figures = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ASSETS.glob("*.json"))]
    f = next((f for f in figures if f.get("prefill") and f["prefill"][0].get("floor_s")), None)
    if not f:
        return None
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
    figure.suptitle(f"{f['model']}, {f['machine']}", fontsize=9)
    return figure, axes


PICTURES = {1: draw_sparsity, 2: draw_grace_period, 3: draw_policies, 4: draw_tasks, 7: draw_heads}


def plot():
    """The pictures in assets/ whose figures are there. What draws gives (figure, axes with a legend)."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    found = {item: rows_of(item) for item in PICTURES}
    drawn = dict({f"quality-{n}": PICTURES[n](pyplot, *rows) for n, rows in found.items() if rows[0]},
                 **{name: drawing for name, drawing in [("time", draw_time(pyplot))] if drawing})
    if not drawn:
        raise UserError(f"{ASSETS} has no figures: python bench.py prefill decode --json on a GPU, or quality --item N")
    for name, (figure, with_legend) in drawn.items():
        for axis in with_legend:
            axis.legend(frameon=False, fontsize=7)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(ASSETS / f"{name}.png", dpi=150)
        say(f"assets/{name}.png drawn")


# ------------------------------------------------------------------------------------------------------------ program

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


def check_quality(args, what):
    """UserError for options of quality at odds with each other, before anything slow. --quick sets some of them."""
    trains = [n for n in args.item if n in (2, 5, 6)]
    for clash, message in (
            (what != ["quality"], "quality goes alone, and --item, --quick, --prompts and --score with it"),
            (bool(args.item) + args.quick + bool(args.prompts or args.score) > 1,
             "one of --item, --quick and --prompts at a time"),
            (args.cases < 2 or min(args.length, *args.lengths) < 128, "--cases should be at least 2, lengths 128"),
            (args.admit != "gates", "--admit is for speed, not for quality"),
            (min(args.depths) < 0 or max(args.depths) > 1, "--depths go from 0 to 1"),
            (min(args.taus) <= 0 or max(args.taus) > 1, "--taus should be above 0, and at most 1"),
            (args.score and not args.prompts, "--score needs --prompts too: the file with the questions"),
            (args.json and len(args.item) > 1, "--json is one file: it goes with one --item"),
            (args.gates and trains, f"item {trains and trains[0]} trains its own gates: --gates does not go with it"),
            (Path(args.work).is_file(), f"--work {args.work} is a file, it should be a folder"),
            (5 in args.item and not (args.books and args.data), "item 5 needs --books, to train on, and another, --data"
             )):
        if clash:
            raise UserError(message)
    for path in filter(None, (args.json, args.prompts if not args.score else None)):
        check_writable(path)
    if args.quick:
        args.cases, args.length, args.train_haystack_tokens = QUICK


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    benches = dict(kernels=bench_kernels, prefill=bench_prefill, decode=bench_decode, memory=bench_memory,
                   train=bench_train, quality=bench_quality)
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
    parser.add_argument("--steps", type=int, default=32, help="decode, memory: tokens written")
    parser.add_argument("--plain", action="store_true", help="kernels: the plain Triton prefill kernel as well")
    parser.add_argument("--item", type=int, nargs="+", action="extend", default=[], choices=ITEMS,
                        help="quality: these experiments, each into quality-N.json in --work, if no --json is given")
    parser.add_argument("--quick", action="store_true", help="quality: 24 questions a task in 1,024 tokens")
    parser.add_argument("--data", help="quality: the haystack, a text the model was not trained on (its own writing)")
    parser.add_argument("--books", help="quality: text to train gates on (the model's own writing)")
    parser.add_argument("--length", type=int, default=4096, help="quality: tokens a document")
    parser.add_argument("--cases", type=int, default=256, help="quality: questions a task")
    parser.add_argument("--lam", type=float, nargs="+", help=f"quality: lambdas of items 1 to 3 {LAMBDAS}; items "
                        f"5 and 6 take the first ({ONE_LAMBDA})")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6], help="item 1")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="item 4")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.9], help="item 4")
    parser.add_argument("--work", metavar="FOLDER", default=".gates",
                        help="quality: where trained gates and finished experiments are kept")
    parser.add_argument("--train-steps", type=int, help="quality: of a training of gates")
    parser.add_argument("--train-tokens-per-step", type=int, metavar="N")
    parser.add_argument("--train-seq-len", type=train.lengths, metavar="N", help="tokens a sample")
    parser.add_argument("--train-haystack-tokens", type=int, metavar="N", help="how much the model writes")
    parser.add_argument("--prompts", metavar="OUT.jsonl", help="quality: write the questions: id, task, prompt, answer")
    parser.add_argument("--score", metavar="ANSWERS.jsonl", help="quality: score answers (id, answer) to --prompts")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, such as assets/cpu.json")
    parser.add_argument("--plot", action="store_true", help="draw assets/*.png from assets/*.json and end")
    args = parser.parse_args(argv)
    if args.plot:
        return plot()
    what = [name for name in benches if name != "quality"] if "all" in args.what else args.what
    for name in what:
        if name not in benches:
            raise UserError(f"{name}: there are {', '.join(benches)} and all")
    if "quality" in what or args.score or args.prompts or args.item or args.quick:
        check_quality(args, what)
    if args.score:
        return score_answers(args)
    if min(args.tokens) < 2 or min(args.runs, args.steps, args.cases, args.batch, args.window) < 1:
        raise UserError("--tokens should be at least 2; --runs, --steps, --cases, --batch and --window at least 1")
    if args.shape and args.admit == "gates":
        args.admit = "0.25"
    model = random_model(args) if args.shape else load_model(args)
    args.chunk = args.chunk or (8192 if model.device.type == "cuda" else 4096)
    for name in [name for name in ("kernels", "train") if name in what and model.device.type != "cuda"]:
        if "all" not in args.what:
            raise UserError(f"{name} needs a CUDA device: what it times is Triton on a card")
        what.remove(name)
        say(f"{name} is left out: what it times is Triton on a CUDA device")
    args.ceilings = ceilings(model.device) if what != ["quality"] else None
    about = dict(machine(model.device), model=model.name, date=time.strftime("%Y-%m-%d"), ceilings=args.ceilings,
                 admit=args.admit, window=args.window, chunk=args.chunk, batch=args.batch)
    say(f"{about['machine']}, torch {about['torch']}, {model.name} in {str(model.dtype)[6:]}")
    results = {}
    for name in what:
        results[name] = benches[name](model, args)
        free_memory(model.device)
        if args.json and name != "quality":                              # after each: what is finished is not lost
            write_whole(args.json, json.dumps(dict(about, **results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
