"""Candidate for decode on a GPU: the linear layers of one token as kernels of our own.

    python experiments/gemv.py --json gemv.json      times them beside cuBLAS, on a GPU (8B shape)

With one token a linear layer is a matrix-vector product (GEMV): each weight is read once and used
once, so the time is that of reading the weights. A layer of decode calls, with cuBLAS,

    add_norm, qkv; out; add_norm, gate_up, silu_product; down     7 launches, and 2 split-K sums

and with `gemv`

    gemv(add, norm); gemv; gemv(add, norm, SiLU); gemv            4 launches

What is fused costs next to nothing in a kernel that waits for memory, and each launch less saves
the time in which the GPU's memory idles between two kernels, 1 to 3 us. With programmatic dependent
launch (PDL) a kernel starts while the one before it still runs, and fetches its first weights: they
do not depend on what the other kernel writes. Only then does it wait for x.

It has not been timed on a GPU yet, so model.py does not call it.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
from common import Parser, UserError, check_writable, run_program, whole, write_text    # noqa: E402
from model import Block, add_norm, silu_product                                 # noqa: E402


@triton.jit
def gemv_kernel(x, y, norm_weight, weight, bias, total, out, N, K, eps, ADD: tl.constexpr,
                NORM: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):
    """One program: BN outputs, out[n] = sum_k weight[n, k] x[k], in fp32.

    With ADD x is x + y, and program 0 stores that to `total`. With NORM it is RMSNorm(x): since
    1 / rms is the same for all k, we multiply by it at the end, and one pass over x is enough:

        out[n] = 1 / rms(x)  *  sum_k weight[n, k] norm_weight[k] x[k]

    With SILU weight has 2 N rows, and out[n] = SiLU(product of row n) * product of row N + n.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]        # (BN, BK) pointers
    up = rows + N.to(tl.int64) * K
    valid = (n < N)[:, None]
    # The first tile's weights are on their way before we wait for the kernel that makes x.
    first = tl.load(rows, valid & (k < K)[None, :], 0.)
    if SILU:
        first_up = tl.load(up, valid & (k < K)[None, :], 0.)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    s, factors = load_x(x, y, norm_weight, total, k, K, ADD, NORM)
    squares = s * s                                                 # (BK,)
    products = first.to(tl.float32) * factors[None, :]              # (BN, BK)
    if SILU:
        products_up = first_up.to(tl.float32) * factors[None, :]
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        here = valid & (start + k < K)[None, :]
        w = tl.load(rows + start, here, 0.)
        if SILU:
            w_up = tl.load(up + start, here, 0.)
        s, factors = load_x(x, y, norm_weight, total, start + k, K, ADD, NORM)
        squares += s * s
        products += w.to(tl.float32) * factors[None, :]
        if SILU:
            products_up += w_up.to(tl.float32) * factors[None, :]
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    result = tl.sum(products, 1) * scale                            # (BN,)
    if BIAS:
        result += tl.load(bias + n, n < N, 0.).to(tl.float32)
    if SILU:
        result_up = tl.sum(products_up, 1) * scale
        if BIAS:
            result_up += tl.load(bias + N + n, n < N, 0.).to(tl.float32)
        result = result / (1 + tl.exp(-result)) * result_up
    tl.store(out + n, result.to(out.dtype.element_ty), n < N)


@triton.jit
def load_x(x, y, norm_weight, total, k, K, ADD: tl.constexpr, NORM: tl.constexpr):
    """The numbers k of x (+ y), and what a weight is multiplied by: those times norm_weight."""
    s = tl.load(x + k, k < K, 0.)
    if ADD:
        s += tl.load(y + k, k < K, 0.)
        if tl.program_id(0) == 0:
            tl.store(total + k, s, k < K)
    s = s.to(tl.float32)
    factors = s
    if NORM:
        factors = s * tl.load(norm_weight + k, k < K, 0.).to(tl.float32)
    return s, factors


# One tile is BN rows of BK weights; STAGES of them are in flight. To keep memory busy, a
# multiprocessor of an H200 must have some 4.5 TB/s * 1 us / 132 = 34 KB in flight.
DEFAULT = dict(BN=16, BK=256, STAGES=4, num_warps=4)


def gemv(x, linear, y=None, norm=None, silu=False, pdl=False, **tile):
    """linear(norm(x + y)) of one token: (x + y, product). y and norm (an nn.RMSNorm) may be None.

    x, y (..., K) with K numbers in all; linear: an nn.Linear of weight (N, K). silu: weight (2 N,
    K) = [gate ; up], and the product is SiLU(gate) * up (..., N). Twin: `reference`.
    """
    weight = linear.weight
    rows, K = weight.shape
    N = rows // 2 if silu else rows
    tile = {**DEFAULT, **tile}
    total = torch.empty_like(x) if y is not None else x
    out = x.new_empty(*x.shape[:-1], N)
    gemv_kernel[(triton.cdiv(N, tile["BN"]),)](
        x, x if y is None else y, x if norm is None else norm.weight, weight,
        x if linear.bias is None else linear.bias, total, out, N, K,
        0.0 if norm is None else norm.eps, ADD=y is not None, NORM=norm is not None,
        BIAS=linear.bias is not None, SILU=silu, PDL=pdl, launch_pdl=pdl, **tile)
    return total, out


def reference(x, linear, y=None, norm=None, silu=False):
    """What `gemv` computes, in plain PyTorch."""
    if y is not None:
        x = x + y
    product = linear(x if norm is None else norm(x))
    if silu:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    return x, product


# ------------------------------------------------------------------------------------------ timing

def step_with_cublas(layers, x):
    """The linear layers of a decode step as model.Block has them, attention left out.

    layers: Blocks. x (1, 1, hidden_size). All products are of the right shapes; attention's output
    is played by the first numbers of qkv's.
    """
    y = None
    for layer in layers:
        x, normed = add_norm(x, y, layer.attn_norm)
        qkv = F.linear(normed, layer.qkv.weight)
        y = F.linear(qkv[..., :layer.out.in_features], layer.out.weight)
        x, normed = add_norm(x, y, layer.mlp_norm)
        y = F.linear(silu_product(F.linear(normed, layer.gate_up.weight)), layer.down.weight)
    return x, y


def step_with_gemv(layers, x, **settings):
    """The same by `gemv`."""
    y = None
    for layer in layers:
        x, qkv = gemv(x, layer.qkv, y, layer.attn_norm, **settings)
        _, y = gemv(qkv[..., :layer.out.in_features], layer.out, **settings)
        x, product = gemv(x, layer.gate_up, y, layer.mlp_norm, silu=True, **settings)
        _, y = gemv(product, layer.down, **settings)
    return x, y


# The candidates: (BN, BK, STAGES, num_warps).
TILES = [(16, 256, 4, 4), (16, 256, 6, 4), (8, 256, 4, 4), (8, 512, 4, 4), (4, 1024, 3, 4),
         (16, 512, 4, 8), (32, 256, 3, 8), (4, 512, 6, 2)]


def compare(layers, x, bandwidth):
    """A row for each candidate: microseconds a layer, share of the read bandwidth, over cuBLAS."""
    weights = sum(p.nbytes for layer in layers for p in layer.parameters())
    candidates = {"cuBLAS": lambda: step_with_cublas(layers, x.clone())}
    for BN, BK, STAGES, num_warps in TILES:
        for pdl in (False, True):
            def step(settings=dict(BN=BN, BK=BK, STAGES=STAGES, num_warps=num_warps, pdl=pdl)):
                return step_with_gemv(layers, x, **settings)

            name = f"BN {BN}, BK {BK}, {STAGES} stages, {num_warps} warps"
            candidates[name + (", PDL" if pdl else "")] = step
    expected = torch.cat(candidates["cuBLAS"]()).float()
    times = bench.device_times(*candidates.values(), inner=1)
    for (name, step), seconds in zip(candidates.items(), times):
        error = (torch.cat(step()).float() - expected).norm() / expected.norm()
        yield dict(candidate=name, layer_us=[s / len(layers) * 1e6 for s in seconds],
                   mbu=weights / bench.median(seconds) / bandwidth,
                   ratio=bench.over(seconds, times[0]), relative_error=error.item())


@torch.no_grad()
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--layers", type=whole(1), default=32, metavar="N",
                        help="of the 8B shape (32)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA device: what it times is Triton on a GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    with device:
        layers = [Block(bench.LLAMA_8B).to(torch.bfloat16) for _ in range(args.layers)]
        x = torch.randn(1, 1, bench.LLAMA_8B.hidden_size, dtype=torch.bfloat16)
    bandwidth = bench.measure_peaks(device)["bandwidth"]
    results = dict(bench.machine(device), date=time.strftime("%Y-%m-%d"), bandwidth=bandwidth,
                   layers=args.layers, rows=[])
    for row in compare(layers, x, bandwidth):
        results["rows"].append(row)
        print(f"{row['candidate']:44} {bench.median(row['layer_us']):8.2f} us a layer, "
              f"{row['mbu']:5.1%} of the bandwidth, {row['ratio']:.3f} of cuBLAS, error "
              f"{row['relative_error']:.4f}", flush=True)
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
