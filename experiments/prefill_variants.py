"""Variants of the prefill kernels beside the present ones and cuDNN's dense attention, on a GPU.

    python experiments/prefill_variants.py --json FILE

Each variant is first checked in a process of its own, with a time limit: a kernel that waits for
ever costs its own process, not the run. Those that fail are not timed. hopper_variants.py says
what the variants are; `portable` ones are kernels.prefill_kernel and folded_kernel (below) with
other tiles: queries, warps, stages, and where it is set, registers a thread.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels
from kernels import INITIAL_MAX, MASKED, UNSPECIALIZED

D, P = 128, 64


@triton.jit
def folded_softmax(s, v, m, l, o, scale):
    """kernels.online_softmax of raw scores: they are scaled inside exp2, in the same instruction
    as the subtraction.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * scale - (m_new * scale)[:, None])
    rescale = tl.exp2((m - m_new) * scale)
    l = l * rescale + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])
    return m_new, l, o


@triton.jit(do_not_specialize=UNSPECIALIZED)
def folded_kernel(q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, out, tau, scale,
                  T, W, columns, Hq, q_b, q_h, q_t, out_b, out_h, out_t, G: tl.constexpr,
                  D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr):
    """kernels.prefill_kernel with folded_softmax, and one loop for the partial page and the band.

    The pages' unused slots must be finite.
    """
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b = (tl.program_id(0) // Hq).to(tl.int64)
    hq = (tl.program_id(0) % Hq).to(tl.int64)
    row = b * (Hq // G) + hq // G
    t = t0 + tl.arange(0, BM)
    d = tl.arange(0, DP)
    valid = (t < T)[:, None] & (d < D)[None, :]
    q += b * q_b + hq * q_h
    Q = tl.load(q + t.to(tl.int64)[:, None] * q_t + d[None, :], valid, 0.)
    m = tl.full([BM], INITIAL_MAX, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DP], tl.float32)
    n = tl.load(num_old + row * T + t0).to(tl.int32)
    page_table += row * columns
    for page in range(0, n // P):
        first = tl.load(page_table + page) * P
        s = tl.dot(Q, page_k.load([first, 0]).T)
        m, l, o = folded_softmax(s, page_v.load([first, 0]), m, l, o, scale)
    if n % P > 0:
        first = tl.load(page_table + n // P) * P
        s = tl.dot(Q, page_k.load([first, 0]).T)
        s = tl.where((tl.arange(0, P) < n % P)[None, :], s, MASKED)
        m, l, o = folded_softmax(s, page_v.load([first, 0]), m, l, o, scale)
    start = (row * (W + T)).to(tl.int32)
    band_g += row * (W + T)
    for j0 in range(t0 + 1, tl.minimum(t0 + BM, T) + W, P):
        j = j0 + tl.arange(0, P)
        g = tl.load(band_g + j, j < W + T, -float("inf"))
        # Queries j - W .. end - 1 see key j: for ever if it is admitted, never if there is none.
        end = tl.where(g >= tau, 2**30, j)
        end = tl.where(g > -float("inf"), end, 0)
        visible = ((j - W)[None, :] <= t[:, None]) & (t[:, None] < end[None, :])
        s = tl.dot(Q, band_k.load([start + j0, 0]).T)
        s = tl.where(visible, s, MASKED)
        m, l, o = folded_softmax(s, band_v.load([start + j0, 0]), m, l, o, scale)
    o = (o / l[:, None]).to(out.dtype.element_ty)
    out += b * out_b + hq * out_h
    tl.store(out + t.to(tl.int64)[:, None] * out_t + d[None, :], o, valid)


# name: (kernel, queries, warps, stages, options)
PORTABLE = dict(
    portable_64_4_3=(kernels.prefill_kernel, 64, 4, 3, {}),
    folded_64_4_3=(folded_kernel, 64, 4, 3, {}),
    folded_128_4_2=(folded_kernel, 128, 4, 2, {}),
    folded_128_4_3=(folded_kernel, 128, 4, 3, {}),
    folded_128_8_2=(folded_kernel, 128, 8, 2, dict(maxnreg=128)),
    portable_128_4_3=(kernels.prefill_kernel, 128, 4, 3, {}))


def run_variant(name, q, band_k, band_v, band_g, page_k, page_v, table, num_old, W, tau, out):
    """Write a variant's result to out (B, Hq, T, D)."""
    if name not in PORTABLE:
        import hopper_variants
        hopper_variants.prefill_attention(q, band_k, band_v, band_g, page_k, page_v, table, num_old,
                                          W, tau, name, out)
        return
    kernel, BM, warps, stages, options = PORTABLE[name]
    B, Hq, T, _ = q.shape
    tiles = [TensorDescriptor.from_tensor(x.view(-1, D), [P, D])
             for x in (band_k, band_v, page_k, page_v)]
    kernel[(B * Hq, triton.cdiv(T, BM))](
        q, *tiles[:2], band_g, *tiles[2:], table, num_old, out, tau,
        1 / math.sqrt(D) / math.log(2), T, W, table.stride(1), Hq, *q.stride()[:3],
        *out.stride()[:3], G=Hq // band_g.shape[1], D=D, DP=D, BM=BM, P=P,
        num_warps=warps, num_stages=stages, **options)


def output(q):
    """Room for the result, laid out as kernels.prefill_attention does it."""
    B, Hq, T, _ = q.shape
    return q.new_empty(B, T, Hq, D).transpose(1, 2)


# ---------------------------------------------------------------------------------------- checks

# (sequences, query heads, KV heads, tokens before the call, new tokens, W, share admitted)
CASES = ((1, 4, 1, 0, 1, 100, 0.5), (1, 4, 4, 3, 65, 1, 0.25), (2, 6, 2, 0, 300, 100, 0.0),
         (2, 8, 2, 500, 777, 256, 0.25), (1, 8, 2, 1000, 129, 256, 1.0),
         (1, 32, 8, 700, 2001, 256, 0.25))


def check(name, device="cuda"):
    """Raise if a variant differs from a dense fp32 softmax under the definition's mask."""
    for case in CASES:
        B, Hq, Hkv, before, T, W, share = case
        N = before + T
        k, v = torch.randn(2, B, Hkv, N, D, device=device, dtype=torch.bfloat16)
        q = torch.randn(B, Hq, T, D, device=device, dtype=torch.bfloat16)
        admitted = torch.rand(B, Hkv, N, device=device) < share

        # Rows' admitted tokens in pages of random order. What is unused is finite and large.
        M = N // P + 2
        order = torch.randperm(B * Hkv * M, device=device).view(B, Hkv, M) + 1
        pages = torch.full((2, B * Hkv * M + 1, P, D), 300., device=device, dtype=torch.bfloat16)
        for b in range(B):
            for h in range(Hkv):
                tokens = admitted[b, h].nonzero()[:, 0]
                place = torch.arange(len(tokens), device=device)
                page = order[b, h, place // P]
                pages[0, page, place % P] = k[b, h, tokens]
                pages[1, page, place % P] = v[b, h, tokens]
        count = F.pad(admitted.long().cumsum(2), (W, 0))        # [j]: of the tokens up to j - W
        num_old = count[..., before:before + T].contiguous()

        g = torch.where(admitted, 1., -1.)
        pad = max(0, W - before)
        skip = max(0, before - W)
        band_k, band_v = (F.pad(x[:, :, skip:], (0, 0, pad, 0)).contiguous() for x in (k, v))
        band_g = F.pad(g[..., skip:], (pad, 0), value=-torch.inf).contiguous()
        out = output(q).fill_(torch.nan)
        again = output(q).fill_(torch.nan)
        for x in (out, again):
            run_variant(name, q, band_k, band_v, band_g, *pages, order.int(), num_old, W, 0.1, x)

        i = torch.arange(before, N, device=device)[:, None]
        j = torch.arange(N, device=device)[None, :]
        seen = (j <= i) & ((i - j < W) | admitted[:, :, None])          # (B, Hkv, T, N)
        G = Hq // Hkv
        worst = 0.
        for h in range(Hq):                     # a head at a time: little memory
            s = q[:, h].float() @ k[:, h // G].float().mT / math.sqrt(D)
            p = s.masked_fill(~seen[:, h // G], -torch.inf).softmax(-1)
            error = (p @ v[:, h // G].float() - out[:, h].float()).abs().max().item()
            worst = max(worst, error if error == error else math.inf)
        assert worst < 0.02, f"{case}: differs by {worst:.3g}"
        assert torch.equal(out, again), f"{case}: two runs differ"


def check_all(names, limit):
    """Those that pass. All processes at a time: they mostly compile."""
    started = {name: subprocess.Popen([sys.executable, __file__, "--check", name],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      start_new_session=True) for name in names}
    end = time.time() + limit
    good = []
    for name, process in started.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, end - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            text += "\ntime limit"
        if process.returncode == 0:
            good.append(name)
        else:
            print(f"{name} FAILED: " + " | ".join(text.strip().splitlines()[-3:]), flush=True)
    return good


# ---------------------------------------------------------------------------------------- timing

def time_all(names, tokens, runs, setup, results):
    """All sides in turn at one length."""
    import bench
    c = bench.LLAMA_8B
    W = setup.window
    G = c.num_heads // c.num_kv_heads
    pages = bench.RandomPages(c, [0.25], tokens, W, torch.device("cuda"))
    q = torch.randn(1, c.num_heads, tokens, D, device="cuda", dtype=torch.bfloat16)
    band_k, band_v = torch.randn(2, 1, c.num_kv_heads, W + tokens, D, device="cuda",
                                 dtype=torch.bfloat16)
    band_g = F.pad(pages.g, (W, 0), value=-torch.inf)
    table = pages.table[0][..., pages.ring_pages:]
    dense_k, dense_v = (x[:, :, W:].repeat_interleave(G, dim=1) for x in (band_k, band_v))
    arguments = (q, band_k, band_v, band_g, pages.k, pages.v, table, pages.num_old, W, 0.1)

    def dense():
        with bench.strongest_attention(q.device):
            F.scaled_dot_product_attention(q, dense_k, dense_v, is_causal=True)

    present = kernels.prefill_attention(*arguments)
    out = output(q)
    sides = dict(cudnn=dense, present=lambda: kernels.prefill_attention(*arguments))
    for name in names:
        try:
            run_variant(name, *arguments, out.fill_(torch.nan))
            torch.testing.assert_close(out, present, atol=0.02, rtol=0.02)
        except Exception as error:      # it is left out
            print(f"{name} at {tokens}: {str(error).splitlines()[0]}", flush=True)
            continue
        sides[name] = lambda name=name: run_variant(name, *arguments, out)
    times = dict(zip(sides, bench.device_times(*sides.values(), runs=runs, inner=1)))
    in_window = torch.arange(1, tokens + 1, device="cuda").clamp(max=W)
    needed = 4 * D * G * int((pages.num_old + in_window).sum())
    dense_flops = 2 * D * tokens * (tokens + 1) * c.num_heads
    cudnn = dense_flops / bench.median(times["cudnn"])
    print(f"\n{tokens} tokens" + " " * 10 + "ms  spread  TFLOP/s    MFU  of cuDNN's rate")
    for name, seconds in times.items():
        rate = (dense_flops if name == "cudnn" else needed) / bench.median(seconds)
        print(f"{name:18} {bench.median(seconds) * 1e3:8.3f} {bench.spread(seconds):7.1%} "
              f"{rate / 1e12:8.0f} {rate / setup.peaks['flops']:6.1%} {rate / cudnn:8.3f}",
              flush=True)
        results.append(dict(tokens=tokens, name=name, seconds=seconds, flops_per_s=rate,
                            of_cudnn=rate / cudnn))


def main():
    import hopper_variants
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--check", metavar="NAME", help="check this variant and end")
    parser.add_argument("--limit", type=float, default=35, help="seconds for all checks (35)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 102400, 204800])
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    import bench
    start = time.time()
    good = check_all([*hopper_variants.VARIANTS, *PORTABLE], args.limit)
    print(f"checked in {time.time() - start:.0f} s: {', '.join(good)}", flush=True)
    with torch.no_grad():
        setup = bench.Setup(256, bench.measure_peaks(torch.device("cuda")))
        results = dict(bench.machine(torch.device("cuda")), triton=triton.__version__,
                       peaks=setup.peaks, good=good, rows=[])
        for tokens in args.tokens:
            names = [name for name in good if name not in PORTABLE or tokens == 102400]
            time_all(names, tokens, 7 if tokens < 65536 else 3, setup, results["rows"])
            torch.cuda.empty_cache()
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nall in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
