"""Speed and memory of the dual cache, beside the strongest dense baseline and the hardware's limit.

    python bench.py                                   the bundled model: prefill and decode
    python bench.py kernels --shape llama-3.1-8b      one layer's attention beside cuDNN's, on a GPU
    python bench.py primitives --shape llama-3.1-8b   selection and eviction, on a GPU
    python bench.py serve --shape llama-3.1-8b        many prompts in a fixed memory, on a GPU
    python bench.py saved --shape llama-3.1-8b        a cache from a file, or its text read again
    python bench.py train --shape llama-3.1-8b        soft attention and a training step, on a GPU
    python bench.py all --shape llama-3.1-8b          everything, for an 8B model of random weights
    python bench.py --plot                            draws assets/time.png from assets/h200.json

BENCHMARKS.md has the results. How we compare:

    in turn     Both sides run in one process, A B A B ..., so a GPU that slows down slows both.
    dense       The fastest dense attention we know. In prefill it is torch's
                scaled_dot_product_attention over the whole prompt at once (cuDNN on a GPU), in
                decode our own paged kernel and CUDA graph with a cache that keeps everything.
    roofline    Prefill is bound by compute, decode by memory bandwidth. So we report
                    MFU = FLOPs that are needed / time / peak FLOP/s
                    MBU = bytes that are needed / time / memory bandwidth
                and measure both peaks in the same run instead of taking a datasheet's.

Speed does not depend on the values of weights, so --shape runs a real model's shape with random
weights and admits a random share of the tokens (--admit). A table shows medians and spreads, and
only the columns that have figures. --json keeps everything, with command, commit and machine. Its
fields:

    tokens              is the length of a prompt; in `serve`, of the prompts on average
    NAME_s              lists the seconds of each run, or is a number where there is only one
    dense_s, gated_s    are the two sides; transformers_s is Hugging Face's, in `decode`
    prefill_s           is our side in `kernels`, and in `decode` the prefill before the steps
    ratio               divides our median by dense's: below 1 we win. In `primitives` it divides
                        chosen_s by all_s, in `saved` load_s by read_s
    flops_ratio         divides the FLOPs instead of the times: the ratio to hope for
    roofline_s          is the time at the roofline; mfu or mbu is its share of the measured time
    admitted            counts admitted keys, as a share of those outside the window
    kept_share          divides the cache's bytes by those of a dense cache
    weights_gib         is the memory of the weights, kept_gib of what the cache keeps
    reserved_gib        is what the cache has allocated: kept_gib, and pages that are still free
    peak_gib            is the most that was held at once, weights included
    imbalance           divides what the heaviest of several processes keeps by the mean

    plan_s              is the time to plan a decode step: which program attends to which pages
    all_s               is the time to attend to all pages of a layer
    choose_s            is the time to choose some pages by their key ranges
    chosen_s            is the time to choose pages and attend to these alone
    gate_s, snapkv_s    are the times to evict a tenth of a cache, by gates or SnapKV's score
    over_dense          divides soft_s (soft attention) by dense_s; step_s is a training step

    sequences           counts those that `serve` answers at a time: as many as there is memory for
                        (sequences_that_fit), but no more than there are prompts
    first_token_s       is the median time from a prompt's arrival to its first token,
                        first_token_99_s that of the slowest prompt
    between_s           is the median time between two tokens of an answer, pauses for other
                        prompts' prefill included; between_99_s is the 99th percentile
    pages_a_token       divides the slots of pages in use by the tokens in them
"""
import contextlib
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# Before torch, which takes seconds to import: common installs the hook that turns Ctrl-C into one
# line.
from common import (DTYPES, HERE, Parser, UserError, check_writable, clock, model_options,
                    peak_bytes, pick_device, process_group, progress, rank_and_processes, read_json,
                    read_text, real, run_program, say, torchrun_processes, whole, write_text)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from generate import (Server, decode, load_model, make_admission, own_or_bundled_gates, prefill,
                      warm_up)
from model import Config, Llama, attention, check_memory, share_config
from tokenizer import Text
from wgkv import P, DenseCache, DualCache, Gates, RandomAdmission, pages_for

UNCOUNTED_STEPS = 8         # of each decode run: a CUDA graph is captured in the second

LLAMA_8B = Config(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_positions=131072, rope_theta=5e5, tied=False,
    rope=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192))
SHAPES = {                  # of --shape
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.1-70b": replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80,
                             num_heads=64),
}


# -------------------------------------------------------------------------------------- measuring

def machine(device):
    """What the figures were measured on, and by which command of which commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    commit = None
    with contextlib.suppress(OSError):      # git is not installed
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                             text=True, cwd=HERE)
        commit = git.stdout.strip() or None
    command = ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
    return dict(machine=name, torch=torch.__version__, command=" ".join(command), commit=commit)


def cpu_name():
    """The processor's name where Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


def in_turn(runs, device, **sides):
    """{name: [seconds]}: each side runs `runs` times, A B A B ...

    A side may return the seconds that count; else the whole call counts.
    """
    times = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            start = clock(device)
            counted = side()
            elapsed = clock(device) - start
            times[name].append(elapsed if counted is None else counted)
    return times


def capture(side, calls):
    """A CUDA graph of so many calls of side(): replaying it costs the host next to nothing."""
    side()                                  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            side()
    return graph


def event_seconds(side):
    """Seconds of a call by the GPU's own clock."""
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    side()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def device_times(*sides, runs=7, inner=3):
    """For each side a list of seconds a call, by the GPU's own clock, the sides in turn."""
    graphs = [capture(side, inner) for side in sides]
    for graph in graphs:
        graph.replay()                      # the first replay also uploads the graph
    times = [[] for _ in sides]
    for _ in range(runs):
        for graph, seconds in zip(graphs, times):
            seconds.append(event_seconds(graph.replay) / inner)
    return times


def median(times):
    return statistics.median(times)


def spread(times):
    """Half of max - min, as a share of the median."""
    return (max(times) - min(times)) / 2 / median(times)


def over(ours, theirs):
    """Our median time over theirs; None if theirs was not measured."""
    return median(ours) / median(theirs) if theirs else None


def free_memory(device):
    """Give unused memory back, and begin to count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(model, kv):
    """Fields of a row: the peak and what it is made of. On a CPU it is the whole process's peak.

    Of several processes the figures are the first one's, and `imbalance` is what the heaviest one
    keeps over the mean.
    """
    weights = sum(p.nbytes for p in model.parameters())
    kept = kv.kept_bytes()
    row = dict(weights_gib=weights / 2**30, kept_gib=kept / 2**30,
               reserved_gib=kv.reserved_bytes() / 2**30, peak_gib=peak_bytes(model.device) / 2**30,
               kept_share=kept / kv.dense_bytes())
    processes = model.config.processes
    if processes > 1:
        kept_by_all = [torch.zeros(1, device=model.device) for _ in range(processes)]
        dist.all_gather(kept_by_all, torch.tensor([float(kept)], device=model.device))
        kept_by_all = [x.item() for x in kept_by_all]
        row.update(processes=processes, imbalance=max(kept_by_all) / statistics.mean(kept_by_all))
    return row


# --------------------------------------------------------------------------------------- roofline

def measure_peaks(device):
    """This GPU's {"bandwidth": bytes/s, "flops": bf16 FLOP/s} as measured now; None on a CPU."""
    if device.type != "cuda":
        return None
    stretch = torch.zeros(2**30, device=device)                         # 4 GiB: no cache holds it
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    read, product = device_times(stretch.sum, lambda: square @ square)
    return dict(bandwidth=stretch.nbytes / median(read), flops=2 * 8192**3 / median(product))


def prefill_flops(c, tokens, admitted=1.0, window=0):
    """FLOPs of a prefill; a multiply-add is two. With everything admitted it is dense."""
    q_and_out = 2 * c.num_heads * c.head_dim
    k_and_v = 2 * c.num_kv_heads * c.head_dim
    weights = c.hidden_size * (q_and_out + k_and_v + 3 * c.intermediate_size)
    linear = 2 * tokens * weights * c.num_layers

    # All pairs of query and key under the diagonal, but for the far ones that nobody admitted.
    # Each pair costs D multiply-adds in q k and D in p v.
    far = max(0, tokens - window)
    pairs = tokens * (tokens + 1) / 2 - (1 - admitted) * far * (far + 1) / 2
    attention = 4 * c.head_dim * pairs * c.num_heads * c.num_layers
    return linear + attention


def bytes_a_step(model, kv):
    """What one decode step must read: the cache, and all weights but the embedding's table."""
    weights = 0
    for name, p in model.named_parameters():
        is_lookup = name == "embed.weight" and model.lm_head is not None
        if not is_lookup:
            weights += p.nbytes
    return weights + kv.kept_bytes()


# ------------------------------------------------------------------------- models, prompts, caches

class Setup(NamedTuple):
    """What all benches of a run share."""
    window: int         # W: the gates' own; --window, where no gate file says it
    peaks: dict         # see `measure_peaks`; None on a CPU


@torch.no_grad()
def random_model(shape, device, dtype, split=True):
    """A model of a named shape with random weights; split: of several processes each has a part."""
    share = rank_and_processes() if split else (0, 1)
    with torch.device("meta"):
        model = Llama(share_config(SHAPES[shape], *share)).to(dtype)
    check_memory(sum(p.nbytes for p in model.parameters()), device, dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:
            p.fill_(1)                      # norms
        else:
            p.normal_(std=0.02)
    model.name = f"{shape} (random weights)"
    return model


def random_admissions(shares, heads, tokens, device, first_head=0):
    """(heads, tokens) bool: what a random policy admits. The heads take the shares in turn."""
    share = torch.tensor([shares[(first_head + head) % len(shares)] for head in range(heads)],
                         device=device)
    return torch.rand(heads, tokens, device=device) < share[:, None]


class SimulatedAdmission:
    """Admits random tokens; gates of the right shape run beside it, so that their cost counts.

    A decision is one lookup, because wgkv.RandomAdmission's hash takes some twenty small
    operations, which would be felt in a decode step of 5 ms. There is one table for all layers,
    to keep it small; layer l begins at column STEP * l.
    """
    STEP = 997

    def __init__(self, model, shares, tokens, window):
        c = model.config
        self.window = window
        self.tau = 0.1
        self.gates = Gates.for_model(model, window=window).eval().requires_grad_(False)
        admitted = random_admissions(shares, c.num_kv_heads, tokens + self.STEP * c.num_layers,
                                     model.device, first_head=c.rank * c.num_kv_heads)
        self.table = torch.where(admitted, 1.0, -1.0)                   # (Hkv, columns) fp32

    def identity(self):
        return "simulated"                  # of a saved cache; only this process loads it again

    def stacked(self):
        """As Gates.stacked: for decode, all layers in one call."""
        gates = self.gates.stacked()
        L, _, _ = self.gates.shape
        column = self.STEP * torch.arange(L, device=self.table.device)[:, None, None]

        def admitted(k, k_rotated, positions):
            gates(k, k_rotated, positions)  # only its time counts: the decision is random
            return self.table[:, positions + column].permute(2, 1, 0, 3)    # (B, L, Hkv, T)

        return admitted

    def gate(self, layer, k, k_rotated, positions):
        self.gates.gate(layer, k, k_rotated, positions)     # as above
        table = self.table[:, self.STEP * layer:]
        return table[:, positions].transpose(0, 1)                      # (B, Hkv, T)


class AdmitAll:
    """Admits every token, for next to nothing: the dense side of `serve`."""
    tau = 0.1

    def __init__(self, window):
        self.window = window

    def gate(self, layer, k, k_rotated, positions):
        return torch.ones(k.shape[:-1], device=k.device)                # (B, Hkv, T)

    def stacked(self):
        """As Gates.stacked: keys (B, L, Hkv, T, D) of all layers, gates (B, L, Hkv, T)."""
        return lambda k, k_rotated, positions: torch.ones(k.shape[:-1], device=k.device)


def gate_window(model, args):
    """W of the gates; --window, where no gate file says it."""
    if args.admit != "gates":
        return args.window
    file = args.gates or own_or_bundled_gates(args, model)
    if file is None:                        # kernels, primitives and train need no gates
        return args.window
    return Gates.load(file, model).window


def admission_policy(model, args, window):
    """The gates of a file, or what --admit says."""
    if args.admit == "gates":
        return make_admission(args, model)[0]
    decoded = max((args.runs + 1) * (args.steps + UNCOUNTED_STEPS), *args.answers)
    return SimulatedAdmission(model, args.admit, max(args.tokens) + decoded, window)


def make_prompt(model, tokens, args):
    """Ids of a prompt: the example's text as often as it takes, or for a bare shape random ids."""
    if args.shape:
        return torch.randint(model.config.vocab_size, (tokens,)).tolist()
    ids = Text(args.model).encode(read_text(HERE / "tiny" / "example.txt"))
    return (ids * (tokens // len(ids) + 1))[:tokens]


def strongest_attention(device):
    """Inside, scaled_dot_product_attention takes the fastest kernel that can do the work."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    fastest_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                     SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(fastest_first, set_priority=True)


def read_prompts(model, kv, prompts, chunk):
    """Prefill, one sequence after another: (seconds, last hidden states (B, hidden_size))."""
    total = sum(len(prompt) for prompt in prompts)
    last = []
    start = clock(model.device)
    kv.expect([len(prompt) for prompt in prompts])
    with strongest_attention(model.device), progress(total, "prefill", "tokens") as bar:
        for b, prompt in enumerate(prompts):
            last.append(prefill(model, kv.sequences(b), [prompt], chunk, bar.update))
    return clock(model.device) - start, torch.cat(last)


def seconds_a_step(device, steps):
    """The median seconds of a decode step; `steps` is an iterator that takes one a turn."""
    times = []
    last = clock(device)
    for _ in steps:
        now = time.perf_counter()           # no synchronization: the host may run ahead
        times.append(now - last)
        last = now
    return median(times[UNCOUNTED_STEPS:])


# ------------------------------------------------------------------------------ attention kernels

class RandomPages:
    """Pages, page tables and counts of one sequence in all layers, as DualCache has them.

    Keys and values are random, and so is the order of the pages: what a cache looks like after
    many sequences have come and gone. A row's table has the R pages of its ring first.
    """

    def __init__(self, c, shares, tokens, window, device):
        L, Hkv, D = c.num_layers, c.num_kv_heads, c.head_dim
        admitted = random_admissions(shares, Hkv, tokens, device)
        self.g = torch.where(admitted, 1.0, -1.0)[None]                 # (1, Hkv, T)

        # num_old[h, t]: admitted tokens among 0 .. t - W, those that query t reads from pages. A
        # row holds as many as its last query reads.
        num_old = F.pad(admitted.cumsum(dim=1), (window, 0))[:, :tokens]    # (Hkv, T)
        self.num_old = num_old[None].contiguous()                       # (1, Hkv, T)
        self.counts = num_old[:, -1].expand(L, 1, Hkv).contiguous()     # (L, 1, Hkv)

        # Each row gets its pages out of a random order. Page 0 is a dummy: unused entries of the
        # page table point to it.
        self.ring_pages = pages_for(window)
        pages = self.ring_pages + pages_for(self.counts)                # (L, 1, Hkv)
        used = torch.arange(int(pages.max()), device=device) < pages[..., None]
        self.table = torch.zeros_like(used, dtype=torch.int32)          # (L, 1, Hkv, M)
        total = int(pages.sum())
        self.table[used] = torch.randperm(total, device=device).int() + 1
        self.k = torch.randn(total + 1, P, D, device=device, dtype=torch.bfloat16)
        self.v = torch.randn_like(self.k)


@torch.no_grad()
def bench_kernels(model, args, setup):
    """Attention of one layer on random bf16 inputs: prefill beside cuDNN's, and decode."""
    shares = [0.25] if args.admit == "gates" else args.admit
    for tokens in args.tokens:
        pages = RandomPages(model.config, shares, tokens, setup.window, model.device)
        prompt = time_prefill_attention(model.config, pages, tokens, args, setup)
        step = time_decode_attention(model.config, pages, tokens, args, setup)
        yield dict(tokens=tokens, shares=shares, **prompt, **step)


def time_prefill_attention(c, pages, tokens, args, setup):
    """A whole prompt's attention in one layer, ours and cuDNN's dense in turn."""
    import kernels
    Hq, Hkv, D = c.num_heads, c.num_kv_heads, c.head_dim
    G = Hq // Hkv
    W = setup.window
    q = torch.randn(1, Hq, tokens, D, device=pages.k.device, dtype=pages.k.dtype)

    # The band is the W tokens before the call and then its own. At the start of a text there are
    # none before it, which a gate of -inf says.
    band_k = torch.randn(1, Hkv, W + tokens, D, device=q.device, dtype=q.dtype)
    band_v = torch.randn_like(band_k)
    band_g = F.pad(pages.g, (W, 0), value=-torch.inf)
    table = pages.table[0][..., pages.ring_pages:]                      # of the promoted tokens

    # One KV head for each query head. (We have not compared cuDNN's own grouped queries.)
    dense_k = band_k[:, :, W:].repeat_interleave(G, dim=1)
    dense_v = band_v[:, :, W:].repeat_interleave(G, dim=1)

    def dense():
        with strongest_attention(q.device):
            F.scaled_dot_product_attention(q, dense_k, dense_v, is_causal=True)

    def ours():
        kernels.prefill_attention(q, band_k, band_v, band_g, pages.k, pages.v, table,
                                  pages.num_old, W, tau=0.1)

    dense_s, prefill_s = device_times(dense, ours, runs=args.runs, inner=1)

    # MFU counts what the definition asks for: a kernel that visits masked keys gains nothing.
    in_window = torch.arange(1, tokens + 1, device=q.device).clamp(max=W)
    needed = 4 * D * G * int((pages.num_old + in_window).sum())
    return dict(dense_s=dense_s, prefill_s=prefill_s, ratio=over(prefill_s, dense_s),
                needed_flops=needed, mfu=needed / median(prefill_s) / setup.peaks["flops"])


def time_decode_attention(c, pages, tokens, args, setup):
    """One token's attention in one layer.

    We time all layers one after another, each with its own pages, as a decode step runs them: the
    keys of a single layer, read again and again, would soon come from the GPU's L2 cache.
    """
    import kernels
    L, Hkv, D = c.num_layers, c.num_kv_heads, c.head_dim
    q = torch.randn(L, 1, c.num_heads, 1, D, device=pages.k.device, dtype=pages.k.dtype)
    num_tokens = torch.tensor([tokens], device=q.device)
    num_new = torch.ones_like(num_tokens)

    def make_plan():
        return kernels.plan_decode(pages.counts, num_tokens, num_new, pages.ring_pages,
                                   setup.window, P)

    plan = make_plan()

    def all_layers():
        for layer in range(L):
            kernels.decode_attention(q[layer], pages.k, pages.v, pages.table[layer], plan, layer)

    step_s, plan_s = device_times(all_layers, make_plan, runs=args.runs, inner=1)
    decode_s = [seconds / L for seconds in step_s]
    keys = int(pages.counts[0].sum()) + Hkv * min(setup.window, tokens)
    needed = 2 * keys * D * q.itemsize                                  # K and V of one layer
    return dict(decode_s=decode_s, plan_s=plan_s, needed_bytes=needed,
                mbu=needed / median(decode_s) / setup.peaks["bandwidth"])


# ------------------------------------------------------------------------- selection and eviction

@torch.no_grad()
def bench_primitives(model, args, setup):
    """Selection in each layer of a decode step; evicting a tenth of a cache, by two scores."""
    share = 0.25 if args.admit == "gates" else args.admit[0]
    for tokens in args.tokens:
        yield dict(tokens=tokens, share=share, select=args.select,
                   **time_selection(model, share, tokens, args, setup.window),
                   **time_evictions(model, share, tokens, args, setup.window))


def random_cache(model, share, tokens, window, **settings):
    """A DualCache behind so many tokens, of which each row has promoted `share`, in random pages.

    No model has read them: keys, values and gates are random numbers.
    """
    policy = RandomAdmission(share)
    policy.window = window
    kv = DualCache(model, policy, **settings)
    count = int(share * max(0, tokens - window))
    pages = pages_for(count)
    kv.pool.grow(kv.counts.numel() * pages)
    ids = kv.pool.take(kv.counts.numel() * pages)
    ids = ids[torch.randperm(len(ids), device=ids.device)].view(*kv.counts.shape, pages)
    kv.all_page_table = torch.cat((kv.all_page_table, ids), dim=3)
    kv.pool.k.normal_()
    kv.pool.v.normal_()
    kv.pool.g.uniform_(kv.tau, 1)
    kv.pool.pos[ids.long()] = torch.arange(pages * P, device=ids.device).int().view(-1, P)
    kv.all_counts.fill_(count)
    kv.all_num_tokens.fill_(tokens)
    if kv.queries is not None:
        kv.queries.normal_()
        kv.num_queries.fill_(tokens)
    kv.update_key_ranges(kv.all_page_table, torch.zeros_like(kv.all_counts), kv.all_counts)
    return kv


def time_selection(model, share, tokens, args, window):
    """Seconds a layer to attend to all pages, to choose some, and to choose and attend to these.

    All layers in turn, each with its own pages, so that nothing sits in the GPU's L2 cache.
    """
    import kernels
    kv = random_cache(model, share, tokens, window, select=args.select)
    c = model.config
    q = torch.randn(kv.L, 1, c.num_heads, 1, c.head_dim, device=model.device, dtype=model.dtype)
    num_new = torch.ones_like(kv.num_tokens)

    def plan(counts):
        return kernels.plan_decode(counts, kv.num_tokens, num_new, kv.R, kv.window, P)

    def choose(layer):
        return kernels.select_pages(q[layer], kv.pool, kv.page_table[layer], kv.counts[layer],
                                    kv.R, kv.chosen_pages)

    everything = plan(kv.counts)
    with kv.decoding():
        chosen = plan(kv.attended())

    def attend_to_all():
        for layer in range(kv.L):
            kernels.decode_attention(q[layer], kv.pool.k, kv.pool.v, kv.page_table[layer],
                                     everything, layer)

    def only_choose():
        for layer in range(kv.L):
            choose(layer)

    def choose_and_attend():
        for layer in range(kv.L):
            kernels.decode_attention(q[layer], kv.pool.k, kv.pool.v, choose(layer), chosen, layer)

    times = device_times(attend_to_all, only_choose, choose_and_attend, runs=args.runs, inner=1)
    all_s, choose_s, chosen_s = times       # of all layers
    return dict(all_s=[seconds / kv.L for seconds in all_s],
                choose_s=[seconds / kv.L for seconds in choose_s],
                chosen_s=[seconds / kv.L for seconds in chosen_s],
                ratio=over(chosen_s, all_s))


def time_evictions(model, share, tokens, args, window):
    """Seconds to evict a tenth of a cache in all layers, by each score."""
    result = {}
    for score in ("gate", "snapkv"):
        seconds = []
        for run in range(args.runs + 1):
            kv = random_cache(model, share, tokens, window, budget=2**60, evict_by=score)
            target = 9 * int(pages_for(kv.counts).sum()) // 10
            start = clock(model.device)
            kv.evict(target)
            seconds.append(clock(model.device) - start)
            del kv
            free_memory(model.device)
        result[f"{score}_s"] = seconds[1:]          # the first one compiles kernels
    return result


# ------------------------------------------------------------------------------------ whole models

@torch.no_grad()
def bench_prefill(model, args, setup):
    """The whole model reads a prompt: gated in chunks, dense all at once."""
    policy = admission_policy(model, args, setup.window)
    short = [make_prompt(model, min(max(args.tokens), 2 * args.chunk), args)]
    read_prompts(model, DualCache(model, policy), short, args.chunk)    # compiles the kernels
    if args.dense_up_to:
        read_prompts(model, DenseCache(model), short, 2 * args.chunk)
    for tokens in args.tokens:
        if tokens <= args.dense_up_to:
            warm_dense_attention(model, tokens)
        yield time_prefill(model, policy, tokens, args, setup.peaks)


@torch.no_grad()
def warm_dense_attention(model, tokens):
    """One layer's dense attention, uncounted: cuDNN makes a plan for each new shape."""
    c = model.config

    def random_heads(heads, capacity):
        return torch.randn(1, heads, capacity, c.head_dim, device=model.device, dtype=model.dtype)

    q = random_heads(c.num_heads, tokens)
    # Strides are part of the shape, so K and V are views of whole pages, as in a DenseCache.
    k = random_heads(c.num_kv_heads, pages_for(tokens) * P)[:, :, :tokens]
    v = random_heads(c.num_kv_heads, pages_for(tokens) * P)[:, :, :tokens]
    with strongest_attention(model.device):
        attention(q, k, v, is_causal=True)


def time_prefill(model, policy, tokens, args, peaks):
    """A row of bench_prefill; memory is the gated side's."""
    prompts = [make_prompt(model, tokens, args)]
    dense_s = []
    gated_s = []
    for _ in range(args.runs):
        kv = None                           # the last run's cache goes before the next is made
        if tokens <= args.dense_up_to:
            seconds, _ = read_prompts(model, DenseCache(model), prompts, tokens)
            dense_s.append(seconds)
        free_memory(model.device)
        kv = DualCache(model, policy)
        seconds, _ = read_prompts(model, kv, prompts, args.chunk)
        gated_s.append(seconds)

    admitted = kv.num_promoted() / (kv.L * kv.Hkv * max(1, tokens - kv.window))
    flops = prefill_flops(model.config, tokens, admitted, kv.window)
    dense_flops = prefill_flops(model.config, tokens)
    row = dict(tokens=tokens, dense_s=dense_s, gated_s=gated_s, ratio=over(gated_s, dense_s),
               flops_ratio=flops / dense_flops, admitted=admitted, **memory(model, kv))
    if peaks:
        row["roofline_s"] = flops / peaks["flops"]
        row["mfu"] = row["roofline_s"] / median(gated_s)
    return row


@torch.no_grad()
def bench_decode(model, args, setup):
    """Decode steps behind a prompt: gated, dense and, where it is installed, transformers."""
    policy = admission_policy(model, args, setup.window)
    for tokens in args.tokens:
        yield time_decode(model, policy, tokens, args, setup.peaks)


def time_decode(model, policy, tokens, args, peaks):
    """A row of bench_decode; memory is the gated side's."""
    # A batch has prompts from half of the length up to all of it, as real ones are uneven.
    B = args.batch
    lengths = [tokens * (B + b) // (2 * B - 1) for b in range(B)]
    prompts = [make_prompt(model, length, args) for length in lengths]
    steps = args.steps + UNCOUNTED_STEPS

    def our_side(kv, hidden):
        """A function that times some steps; the cache grows by their tokens."""
        return lambda: seconds_a_step(model.device, decode(model, kv, hidden, steps))

    # The gated side comes first and decodes once, so that the peak is its own.
    gated = DualCache(model, policy, B)
    prefill_s, hidden = read_prompts(model, gated, prompts, args.chunk)
    sides = dict(gated=our_side(gated, hidden))
    sides["gated"]()
    row = dict(tokens=tokens, lengths=lengths, prefill_s=[prefill_s], **memory(model, gated))

    if tokens <= args.dense_up_to:
        dense = DenseCache(model, B)
        _, hidden = read_prompts(model, dense, prompts, tokens)
        sides["dense"] = our_side(dense, hidden)
    if B == 1 and not args.shape and find_spec("transformers"):
        theirs = transformers_decode(args.model, model, prompts[0])
        sides["transformers"] = lambda: seconds_a_step(model.device, theirs(steps))

    times = in_turn(args.runs, model.device, **sides)
    for name, seconds in times.items():
        row[f"{name}_s"] = seconds
    row["ratio"] = over(times["gated"], times.get("dense"))
    row["ratio_transformers"] = over(times["gated"], times.get("transformers"))
    if peaks:
        row["needed_bytes"] = bytes_a_step(model, gated)
        row["roofline_s"] = row["needed_bytes"] / peaks["bandwidth"]
        row["mbu"] = row["roofline_s"] / median(times["gated"])
    return row


def transformers_decode(path, ours, ids):
    """What most people run: the same weights in Hugging Face transformers with its DynamicCache.

    Reads the prompt `ids`; returns a function that takes so many greedy steps, one a turn.
    """
    from transformers import AutoModelForCausalLM, DynamicCache
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=ours.dtype).to(ours.device).eval()
    cache = DynamicCache()

    def forward(tokens):
        out = theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    for chunk in torch.tensor([ids], device=ours.device).split(2048, dim=1):
        first = forward(chunk)

    def steps(count):
        token = first
        for _ in range(count):
            token = forward(token)
            yield token.tolist()            # on the host, as a streamed token is

    return steps


# ----------------------------------------------------------------------------------------- serving

class TimedServer(Server):
    """A Server whose prompts arrive at given times, and which notes when tokens come.

    Tokens reach the host once a run of up to 64 decode steps. We take the steps of a run as equally
    long. The first one of an answer also has the pause since that answer's last token, in which
    other prompts were read.
    """

    def __init__(self, *args, arrivals, **settings):
        super().__init__(*args, **settings)
        self.arrivals = arrivals    # seconds after the start, one for each prompt
        self.start = clock(self.model.device)
        self.first_s = []           # from a prompt's arrival to its first token
        self.between_s = []         # between two tokens of an answer
        self.last_end = {}          # index of a prompt -> when its last token so far came
        self.decoded = 0            # tokens
        self.pages_a_token = []     # slots in pages over tokens in them, while it runs

    def now(self):
        return time.perf_counter() - self.start

    def is_there(self, index):
        self.reading = index
        return self.arrivals[index] <= self.now()

    def read(self, chunks, b, last):
        count = super().read(chunks, b, last)
        if count == last:
            now = self.now()
            self.first_s.append(now - self.arrivals[self.reading])
            self.last_end[self.reading] = now
        return count

    def run(self, decoding, most):
        before = {b: len(answer.ids) for b, answer in decoding.items()}
        start = self.now()
        super().run(decoding, most)
        end = self.now()

        # All answers take the same steps: none ends early, since no id ends an answer here.
        new = max(len(answer.ids) - before[b] for b, answer in decoding.items())
        if new > 0:
            step = (end - start) / new
            for answer in decoding.values():
                pause = start - self.last_end[answer.index]
                self.between_s += [pause + step] + [step] * (new - 1)
                self.last_end[answer.index] = end
            self.decoded += new * len(decoding)
            if self.kv.num_promoted() > 0:
                slots = int(pages_for(self.kv.counts).sum()) * P
                self.pages_a_token.append(slots / self.kv.num_promoted())


@torch.no_grad()
def bench_serve(model, args, setup):
    """Prompts arrive at random; as many sequences at a time as a fixed memory for caches holds.

    Prompts have from the shortest to the longest of --tokens, uniformly. Dense is our own paged
    cache with everything admitted: it wastes no memory on unequal lengths.
    """
    rng = random.Random(args.seed)
    lengths = [rng.randint(args.tokens[0], args.tokens[-1]) for _ in range(args.requests)]
    prompts = [make_prompt(model, n, args) for n in lengths]
    policies = dict(dense=AdmitAll(setup.window), gated=admission_policy(model, args, setup.window))
    for answers in args.answers:
        times = {}
        for side, policy in policies.items():
            if side == "dense" and max(lengths) > args.dense_up_to:
                continue
            times[side] = serve(model, policy, prompts, answers, args)
            yield dict(tokens=sum(lengths) // len(lengths), side=side, answers=answers,
                       **times[side])
            free_memory(model.device)
        if len(times) < 2:
            continue
        dense, gated = times["dense"], times["gated"]
        say(f"answers of {answers}: gated over dense, sequences that fit "
            f"{gated['sequences_that_fit'] / dense['sequences_that_fit']:.2f}, tokens/s "
            f"{gated['tokens_per_s'] / dense['tokens_per_s']:.2f}")


def serve(model, policy, prompts, answers, args):
    """Answer all prompts, with as many sequences as --memory holds on average."""
    # The longest prompt says what is kept. It also compiles the prefill kernels.
    kv = DualCache(model, policy)
    read_prompts(model, kv, [max(prompts, key=len)], args.chunk)
    share = kv.kept_bytes() / kv.dense_bytes()
    dense_token = kv.dense_bytes() / int(kv.num_tokens)

    # On average an answer is half done.
    mean_tokens = sum(map(len, prompts)) / len(prompts) + answers / 2
    sequences_that_fit = max(1, int(args.memory * 2**30 / (mean_tokens * dense_token * share)))
    sequences = min(sequences_that_fit, len(prompts))
    del kv
    free_memory(model.device)

    kv = DualCache(model, policy, sequences)
    warm_up(model, kv)                      # decode kernels, too, on a copy
    # All the memory at once, as a server would take it: a pool that grows is copied meanwhile, and
    # then a captured step must be captured again.
    spare = int(args.memory * 2**30) - kv.reserved_bytes()
    most_tokens = max(map(len, prompts)) + answers
    most_pages = kv.counts.numel() * pages_for(most_tokens)
    kv.pool.grow(max(0, min(spare // kv.page_bytes(), most_pages)))
    free_memory(model.device)
    rng = random.Random(args.seed)
    arrivals = list(accumulate(rng.expovariate(args.rate) for _ in prompts))
    server = TimedServer(model, kv, answers, chunk=args.chunk, arrivals=arrivals)
    new = 0
    with strongest_attention(model.device), progress(len(prompts), "serve", "answers") as bar:
        for _, ids, _, _ in server.answers(prompts):
            new += len(ids)
            bar.update(1)
    seconds = server.now()

    between = sorted(server.between_s or [0.0])
    return dict(sequences=sequences, sequences_that_fit=sequences_that_fit, kept_share=share,
                tokens_per_s=new / seconds,
                decode_tokens_per_s=server.decoded / max(server.decode_s, 1e-9),
                first_token_s=median(server.first_s), first_token_99_s=max(server.first_s),
                between_s=median(between), between_99_s=between[99 * len(between) // 100],
                pages_a_token=statistics.mean(server.pages_a_token or [1.0]),
                peak_gib=peak_bytes(model.device) / 2**30)


# ------------------------------------------------------------------------------------ saved caches

QUESTION_TOKENS = 32        # of what is asked about a text: any number that is small beside it


@torch.no_grad()
def bench_saved(model, args, setup):
    """Time to the first token about a text: reading it again, or loading the cache it left.

    Both include the question's prefill. The file was just written, so it comes from the system's
    memory and not from a disk.
    """
    policy = admission_policy(model, args, setup.window)
    for tokens in args.tokens:
        sides = (("dense", lambda: DenseCache(model), tokens),
                 ("gated", lambda: DualCache(model, policy), args.chunk))
        for side, make_kv, chunk in sides:
            yield dict(tokens=tokens, side=side, **time_saved(model, make_kv, tokens, chunk, args))
            free_memory(model.device)


def time_saved(model, make_kv, tokens, chunk, args):
    """A row of bench_saved. The first run of each side only compiles kernels."""
    prompt = make_prompt(model, tokens, args)
    question = make_prompt(model, QUESTION_TOKENS, args)

    def ask(kv):
        _, hidden = read_prompts(model, kv, [question], args.chunk)
        return int(model.logits(hidden).argmax())

    kv = make_kv()
    read_prompts(model, kv, [prompt], chunk)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.cache")
        kv.save(path, model, [prompt])
        shares = memory(model, kv)
        file_gib = path.stat().st_size / 2**30
        del kv

        def read_again():
            kv = make_kv()
            read_prompts(model, kv, [prompt], chunk)
            ask(kv)

        def load():
            kv = make_kv()
            kv.load(path, model)
            ask(kv)

        times = in_turn(args.runs + 1, model.device, read_s=read_again, load_s=load)
    read_s, load_s = times["read_s"][1:], times["load_s"][1:]
    return dict(read_s=read_s, load_s=load_s, ratio=over(load_s, read_s), file_gib=file_gib,
                **shares)


# --------------------------------------------------------------------------------------- training

def bench_train(model, args, setup):
    """Soft attention of one layer, forward and backward; then a training step of train.py."""
    for tokens in args.tokens:
        times = time_soft_attention(model, tokens, args.runs, setup.window)
        free_memory(model.device)
        yield dict(tokens=tokens, **times,
                   over_dense=over(times["soft_s"], times["dense_s"]),
                   **time_train_step(model, tokens, setup.window, args.seed))


def time_soft_attention(model, tokens, runs, window):
    """Forward and backward of soft attention, and of dense attention, which has no gates."""
    import kernels
    c = model.config
    device = model.device
    G = c.num_heads // c.num_kv_heads

    def random_heads(heads):
        shape = (1, heads, tokens, c.head_dim)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    q = random_heads(c.num_heads)
    k = random_heads(c.num_kv_heads)
    v = random_heads(c.num_kv_heads)
    log_g = torch.rand(1, c.num_kv_heads, tokens, device=device).log().requires_grad_()
    grad = torch.randn_like(q)

    # One KV head for each query head, as in `time_prefill_attention`.
    dense_k = k.detach().repeat_interleave(G, dim=1).requires_grad_()
    dense_v = v.detach().repeat_interleave(G, dim=1).requires_grad_()

    def soft():
        out = kernels.soft_attention(q, k, v, log_g, window)
        torch.autograd.grad(out, (q, k, v, log_g), grad)

    def dense():
        with strongest_attention(device):
            out = F.scaled_dot_product_attention(q, dense_k, dense_v, is_causal=True)
        torch.autograd.grad(out, (q, dense_k, dense_v), grad)

    sides = dict(soft_s=lambda: event_seconds(soft), dense_s=lambda: event_seconds(dense))
    in_turn(2, device, **sides)             # they compile, and cuDNN picks its algorithm
    return in_turn(runs, device, **sides)


def time_train_step(model, tokens, window, seed):
    """A step of train.py on one sample of random ids a process; tokens_per_s is of them all."""
    import train
    _, processes = rank_and_processes()
    config = replace(train.PAPER, seq_len=(tokens,), tokens_per_step=processes * tokens, steps=3,
                     window=window, seed=seed)

    def draw(rng, length):
        ids = rng.choices(range(model.config.vocab_size), k=length)
        return torch.tensor(ids), torch.ones(length)

    gates = Gates.for_model(model, window=window)
    micro_batches, estimate = train.plan_micro_batches(model, gates, config)
    optimizer = torch.optim.AdamW(gates.parameters())
    log = []
    train.train(model, gates, optimizer, train.Samples(draw, config), config,
                micro_batches=micro_batches, log=log.append)

    # The first step compiles, and it and the last measure the hard distillation loss as well.
    middle = log[1]
    return dict(step_s=middle["seconds"], tokens_per_s=middle["tokens_per_s"],
                peak_gib=peak_bytes(model.device) / 2**30, layers_keep=micro_batches[tokens][1],
                estimate=estimate)


# ---------------------------------------------------------------------------------------- picture

def plot():
    """Draw assets/time.png: time against length, out of assets/h200.json."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figures = read_json(HERE / "assets" / "h200.json")
    draw_time(pyplot, figures).savefig(HERE / "assets" / "time.png", dpi=150)
    say("assets/time.png drawn")


def draw_time(pyplot, figures):
    """Prefill and decode side by side: dense, gated, and the roofline of gated."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, what, unit in zip(axes, ("prefill", "decode"), (1.0, 1e-3)):
        rows = figures[what]
        lengths = [row["tokens"] for row in rows]
        for side, color in (("dense", "#888888"), ("gated", "#c2410c")):
            timed = [row for row in rows if row.get(f"{side}_s")]
            axis.plot([row["tokens"] for row in timed],
                      [median(row[f"{side}_s"]) / unit for row in timed],
                      "o-", color=color, label=side)
        axis.plot(lengths, [row["roofline_s"] / unit for row in rows], ":", color="#c2410c",
                  label="roofline of gated")
        axis.set(xlabel="tokens", title=what)
        axis.set_ylabel("seconds" if what == "prefill" else "milliseconds a token")
        axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{figures['model']}, {figures['machine']}", fontsize=9)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------- program

BENCHES = dict(kernels=bench_kernels, primitives=bench_primitives, prefill=bench_prefill,
               decode=bench_decode, serve=bench_serve, saved=bench_saved, train=bench_train)
NEED_A_GPU = ("kernels", "primitives", "train")         # what they time is Triton on CUDA
COLUMNS = dict(
    kernels="tokens dense_s prefill_s ratio mfu decode_s mbu plan_s",
    primitives="tokens all_s choose_s chosen_s ratio gate_s snapkv_s",
    prefill="tokens dense_s gated_s ratio flops_ratio mfu admitted kept_share kept_gib peak_gib "
            "imbalance",
    decode="tokens dense_s gated_s transformers_s ratio ratio_transformers mbu kept_share kept_gib "
           "peak_gib imbalance",
    serve="side sequences sequences_that_fit answers tokens tokens_per_s decode_tokens_per_s "
          "first_token_s first_token_99_s between_s between_99_s pages_a_token kept_share peak_gib",
    saved="side tokens read_s load_s ratio file_gib kept_share",
    train="tokens dense_s soft_s over_dense step_s tokens_per_s peak_gib")
HEADINGS = {                                # of columns whose name in --json is too long
    "flops_ratio": "of FLOPs", "ratio_transformers": "ratio hf", "over_dense": "ratio",
    "transformers_s": "transf. (hf)", "all_s": "attend all", "chosen_s": "choose, attend",
    "gate_s": "evict by gate", "snapkv_s": "by snapkv", "kept_share": "kept",
    "sequences_that_fit": "would fit", "tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "decode/s", "first_token_s": "first token",
    "first_token_99_s": "slowest", "between_s": "between", "between_99_s": "99%",
    "pages_a_token": "slots/tok",
    "kept_gib": "kept GiB", "peak_gib": "peak GiB", "file_gib": "file GiB",
    "read_s": "read again"}
LOSES = dict(kernels="gating loses", prefill="gating loses", decode="gating loses",
             primitives="selection loses", saved="loading loses")      # at a ratio above 1


def run(name, model, args, setup):
    """Run one bench, print its rows as they come, and yield them."""
    print(f"\n{name}. {BENCHES[name].__doc__}")
    free_memory(model.device)
    columns = None
    for row in BENCHES[name](model, args, setup):
        if columns is None:                 # the shortest prompt's row: no other has a column more
            columns = [column for column in COLUMNS[name].split()
                       if shown(column, row.get(column)) != "-"]
            print("".join(cell(column, heading(column)) for column in columns))
        line = "".join(cell(column, shown(column, row.get(column))) for column in columns)
        if (row.get("ratio") or 0) > 1:
            line += f"  {LOSES[name]}"
        print(line, flush=True)
        yield row
        free_memory(model.device)


def heading(column):
    """What stands above a column."""
    return HEADINGS.get(column, column.removesuffix("_s"))


def is_time(column):
    """Does a column hold seconds?"""
    return column.endswith("_s") and not column.endswith("per_s")


def cell(column, text):
    """text at the right of a table's column: times, with their spread, need more room."""
    return f" {text:>13}" if is_time(column) else f" {text:>9}"


def shown(column, value):
    """A figure as text; of a list the median and the spread; times in a unit that fits."""
    if value is None or value == []:
        return "-"
    if isinstance(value, str):
        return value
    if is_time(column):
        runs = value if isinstance(value, list) else [value]
        text = shown_seconds(median(runs))
        return text if len(runs) == 1 else f"{text} ±{spread(runs):.0%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def shown_seconds(seconds):
    """In seconds, milliseconds or microseconds."""
    if seconds >= 1:
        return f"{seconds:.4g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.4g} ms"
    return f"{seconds * 1e6:.4g} us"


def shares_option(text):
    """The type of --admit: numbers from 0 to 1 between commas."""
    return [real(0, 1)(share) for share in text.split(",")]


def make_parser():
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["prefill", "decode"], metavar="WHAT",
                        help=f"{', '.join(BENCHES)} or all (default: prefill decode)")
    model_options(parser)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, no --model")
    admission = parser.add_mutually_exclusive_group()
    admission.add_argument("--gates", metavar="FILE", help="gate file (default: the model's own)")
    admission.add_argument("--admit", type=shares_option, metavar="SHARE",
                           help="admit a random share, such as 0.25, while random gates run "
                           "beside; 0.45,0.05: of the KV heads in turn (default: what the gates "
                           "say; with --shape 0.25)")
    parser.add_argument("--window", type=whole(1), default=256, metavar="W",
                        help="W, where no gate file says it (256)")
    parser.add_argument("--tokens", type=whole(2), nargs="+", default=[1024, 4096, 16384, 32768],
                        metavar="N", help="prompt lengths (default: 1024 4096 16384 32768)")
    parser.add_argument("--dense-up-to", type=whole(0), default=2**40, metavar="N",
                        help="no dense side for longer prompts; 0: none at all")
    parser.add_argument("--batch", type=whole(1), default=1, metavar="B",
                        help="decode: sequences, from half of the length up to all of it (1)")
    parser.add_argument("--chunk", type=whole(1), metavar="N",
                        help="prompt tokens that are read at once (4096; on a GPU 8192)")
    parser.add_argument("--runs", type=whole(1), default=3, metavar="N", help="of each side (3)")
    parser.add_argument("--select", type=whole(1), default=4096, metavar="N",
                        help="primitives: tokens of a row that are selected (4096)")
    parser.add_argument("--memory", type=real(0.001), default=40.0, metavar="GIB",
                        help="serve: GiB that caches may take (40)")
    parser.add_argument("--requests", type=whole(1), default=32, metavar="N",
                        help="serve: prompts (32)")
    parser.add_argument("--rate", type=real(0.001), default=1.0, metavar="X",
                        help="serve: prompts that arrive a second, on average (1)")
    parser.add_argument("--answers", type=whole(1), nargs="+", default=[256, 4096], metavar="N",
                        help="serve: tokens of an answer (256 4096)")
    parser.add_argument("--steps", type=whole(1), default=32, metavar="N",
                        help="decode steps a run (32)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--plot", action="store_true", help="draw assets/time.png and end")
    return parser


def check_options(args, device):
    """UserError for options that contradict each other; fill in what depends on others."""
    if "all" in args.what:
        args.what = list(BENCHES)
    for name in args.what:
        if name not in BENCHES:
            raise UserError(f"{name}: there are {', '.join(BENCHES)} and all")
        if name in NEED_A_GPU and device.type != "cuda":
            raise UserError(f"{name} needs a CUDA device: what it times is Triton on a GPU")
    if "saved" in args.what and torchrun_processes() > 1:
        raise UserError("saved is for one process: several do not save their caches")
    if "train" in args.what and len(args.what) > 1 and torchrun_processes() > 1:
        raise UserError("with torchrun, train is a command of its own: each process has the whole "
                        "model then, and a part of it in the others")
    if args.shape and args.gates:
        raise UserError("--shape has random weights, for which there are no gates: give --admit")
    if args.admit is None:
        args.admit = [0.25] if args.shape else "gates"
    args.tokens.sort()                      # the shortest prompt first: `run` relies on it
    if args.chunk is None:
        args.chunk = 8192 if device.type == "cuda" else 4096
    if args.json:
        check_writable(args.json)


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.plot:
        return plot()
    with process_group(args):
        return measure(args)


def measure(args):
    """Run the benches that the options ask for."""
    device = pick_device(args.device)
    check_options(args, device)
    torch.manual_seed(args.seed)
    # Inference splits the model by KV head. Training gives each process all of it, and other
    # samples.
    split = "train" not in args.what
    if args.shape:
        model = random_model(args.shape, device, DTYPES[args.dtype or "bfloat16"], split)
    else:
        model = load_model(args, split)
    setup = Setup(gate_window(model, args), measure_peaks(device))

    results = dict(machine(device), model=model.name, date=time.strftime("%Y-%m-%d"),
                   peaks=setup.peaks, admit=args.admit, window=setup.window, chunk=args.chunk,
                   batch=args.batch)
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    say(f"{results['machine']}, torch {results['torch']}; {model.name}, {weights:.2f} GiB")
    for name in args.what:
        results[name] = []
        for row in run(name, model, args, setup):
            results[name].append(row)
            # After each row: what is measured is not lost.
            if args.json and rank_and_processes()[0] == 0:
                write_text(args.json, json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
