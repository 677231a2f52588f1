"""Times kernels.gemv, a linear layer of one token as a kernel of our own, beside cuBLAS.

    python experiments/gemv.py --json gemv.json      on a GPU, in the shape of an 8B model

The section "linear layers of one token" of kernels.py says what the kernel fuses and what PDL is.
Each candidate is a size of tile. It is first compared with plain PyTorch. Then we time the linear
layers of a whole decode step, without attention, and each of the four products alone. All 32 layers
come in turn, 14 GB of weights, so that none are left in a cache.
"""
import functools
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
import kernels                                                                  # noqa: E402
from common import Parser, UserError, check_writable, run_program, whole, write_text    # noqa: E402
from model import Block, add_norm, silu_product                                 # noqa: E402

# Candidates: (BN, BK, STAGES, num_warps, PDL). With STAGES = 1 weights go straight
# to registers, with more through shared memory. The last two are the first two without PDL.
TILES = [(8, 1024, 3, 4, 1), (8, 1024, 1, 4, 1), (16, 1024, 2, 4, 1), (16, 1024, 1, 4, 1),
         (8, 2048, 2, 8, 1), (4, 1024, 3, 4, 1), (16, 512, 1, 4, 1), (8, 512, 1, 2, 1),
         (8, 1024, 3, 4, 0), (8, 1024, 1, 4, 0)]


def settings_of(candidate):
    """The arguments of kernels.gemv for one of TILES."""
    BN, BK, STAGES, num_warps, pdl = candidate
    return dict(BN=BN, BK=BK, STAGES=STAGES, num_warps=num_warps, pdl=bool(pdl))


def reference(x, linear, y=None, norm=None, silu=False):
    """What kernels.gemv computes, in plain PyTorch."""
    if y is not None:
        x = x + y
    product = F.linear(x if norm is None else norm(x), linear.weight, linear.bias)
    if silu:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    return x, product


def gemv(x, linear, y=None, norm=None, silu=False, **settings):
    """kernels.gemv with the arguments of `reference`."""
    return kernels.gemv(x, linear.weight, linear.bias, y, norm, silu, **settings)


def relative_error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def step_with_cublas(layers, x):
    """The linear layers of a decode step as model.Block has them for several tokens.

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
    """The same by kernels.gemv."""
    y = None
    for layer in layers:
        x, qkv = gemv(x, layer.qkv, y, layer.attn_norm, **settings)
        _, y = gemv(qkv[..., :layer.out.in_features], layer.out, **settings)
        x, product = gemv(x, layer.gate_up, y, layer.mlp_norm, silu=True, **settings)
        _, y = gemv(product, layer.down, **settings)
    return x, y


def check(layer, settings):
    """The largest relative error of the four products of a layer, and of what goes with them."""
    errors = []
    for linear, norm, silu in ((layer.qkv, layer.attn_norm, False), (layer.out, None, False),
                               (layer.gate_up, layer.mlp_norm, True), (layer.down, None, False)):
        x, y = torch.randn(2, 1, 1, linear.in_features, device=linear.weight.device,
                           dtype=linear.weight.dtype)
        if norm is None:
            y = None
        want = reference(x, linear, y, norm, silu)
        got = gemv(x, linear, y, norm, silu, **settings)
        errors += [relative_error(a, b) for a, b in zip(got, want)]
    return max(errors)


def compare_steps(layers, x, bandwidth):
    """A row for cuBLAS and each candidate: microseconds a layer, share of the bandwidth, error."""
    weights = sum(p.nbytes for layer in layers for p in layer.parameters())
    sides = {"cuBLAS": lambda: step_with_cublas(layers, x.clone())}
    errors = {"cuBLAS": 0.0}
    for candidate in TILES:
        settings = settings_of(candidate)
        name = ",".join(map(str, candidate))
        errors[name] = check(layers[0], settings)
        sides[name] = lambda settings=settings: step_with_gemv(layers, x, **settings)
    times = bench.device_times(*sides.values(), inner=1)
    for name, seconds in zip(sides, times):
        yield dict(candidate=name, layer_us=[s / len(layers) * 1e6 for s in seconds],
                   mbu=weights / bench.median(seconds) / bandwidth,
                   ratio=bench.over(seconds, times[0]), relative_error=errors[name])


def compare_products(layers, x):
    """A row for each of a layer's four products, by cuBLAS and by each candidate."""
    config = bench.LLAMA_8B
    y = torch.randn_like(x)
    wide = torch.randn(1, 1, config.intermediate_size, device=x.device, dtype=x.dtype)
    for name, source, norm, silu in (("qkv", x, "attn_norm", False), ("out", x, None, False),
                                     ("gate_up", x, "mlp_norm", True), ("down", wide, None, False)):
        def with_cublas():
            for layer in layers:
                F.linear(source, getattr(layer, name).weight)

        def with_gemv(settings):
            for layer in layers:
                gemv(source, getattr(layer, name), y if norm else None,
                     getattr(layer, norm) if norm else None, silu, **settings)

        sides = {"cuBLAS": with_cublas}
        for candidate in TILES:
            sides[",".join(map(str, candidate))] = functools.partial(with_gemv,
                                                                     settings_of(candidate))
        nbytes = getattr(layers[0], name).weight.nbytes
        for side, seconds in zip(sides, bench.device_times(*sides.values(), inner=1)):
            us = bench.median(seconds) / len(layers) * 1e6
            yield dict(product=name, candidate=side, us=us, bytes_per_second=nbytes / us * 1e6)


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
    torch.cuda.synchronize()            # a kernel with PDL reads weights before it waits
    bandwidth = bench.measure_peaks(device)["bandwidth"]
    results = dict(bench.machine(device), date=time.strftime("%Y-%m-%d"), bandwidth=bandwidth,
                   layers=args.layers, rows=[], products=[])
    print(f"bandwidth {bandwidth / 1e12:.2f} TB/s; candidates: BN,BK,STAGES,warps,PDL", flush=True)
    for row in compare_steps(layers, x, bandwidth):
        results["rows"].append(row)
        print(f"{row['candidate']:14} {bench.median(row['layer_us']):8.2f} us a layer, "
              f"{row['mbu']:5.1%} of the bandwidth, {row['ratio']:.3f} of cuBLAS, error "
              f"{row['relative_error']:.4f}", flush=True)
    for row in compare_products(layers, x):
        results["products"].append(row)
        print(f"{row['product']:8} {row['candidate']:14} {row['us']:8.2f} us, "
              f"{row['bytes_per_second'] / 1e12:.2f} TB/s", flush=True)
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
