"""A training step's kernels, with variants; the gate kernel's tiles; the portable prefill; prefill of 200K."""
import contextlib, json, os, sys, time
sys.path.insert(0, os.getcwd())
import torch, triton
import bench, train, kernels, wgkv
from wgkv import DualCache, Gates
OUT = os.environ["OUT"]; dev = torch.device("cuda"); res = {}
def save(): json.dump(res, open(f"{OUT}/two.json", "w"), indent=1)
def table(prof):
    rows, ops = [], []
    for e in prof.key_averages():
        t = getattr(e, "self_device_time_total", 0)
        if t > 0: (ops if str(e.device_type).endswith("CPU") else rows).append((e.key[:140], round(t / 1e3, 3), e.count))
    rows.sort(key=lambda r: -r[1]); ops.sort(key=lambda r: -r[1])
    return rows, ops
args = bench.make_parser().parse_args(["prefill", "--shape", "llama-3.1-8b", "--tokens", "204800", "--runs", "3"])
bench.check_options(args, dev)
torch.manual_seed(0)
model = bench.random_model("llama-3.1-8b", dev, torch.bfloat16)
peaks = bench.measure_peaks(dev); res["peaks"] = peaks; print(peaks, flush=True)
setup = bench.Setup(256, peaks); c = model.config
# the gate kernel
with torch.no_grad():
    gates = Gates.for_model(model, window=256); p = gates.layers[0] if hasattr(gates, "layers") else list(gates.children())[0][0]
    p = p.to(dev)
    k = torch.randn(1, 8, 8192, 128, device=dev, dtype=torch.bfloat16); kr = torch.randn_like(k)
    want = kernels.gate(p, k, kr)
    N, T, H = 8192, 8192, 8
    def launch(w1, BN, BH, warps, stages):
        out = torch.empty(1, 8, T, device=dev)
        kernels.gate_kernel[(triton.cdiv(N, BN), H, 1)](k, kr, p.pre_norm, p.post_norm, w1, p.b1, p.w2, p.b2, out, kernels.arrival_counters(dev, 1), out, N, T,
            *k.stride()[:3], *kr.stride()[:3], H, H * 128 // p.pre_norm.numel(), D=128, DP=128, HIDDEN=p.w1.shape[1], BN=BN, BH=BH, SPLITS=1, PRECISION="tf32", num_warps=warps, num_stages=stages)
        return out
    def ms(f, n=20):
        for _ in range(3): f()
        a, b = torch.cuda.Event(True), torch.cuda.Event(True); a.record()
        for _ in range(n): f()
        b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / n
    rows = [("now", ms(lambda: kernels.gate(p, k, kr)), 0.)]
    ref = torch.sigmoid  # fp64 reference
    h = p.w1.half()
    exact = wgkv.gate(p, k.double(), kr.double()) if False else None
    for name, w1 in (("fp32", p.w1), ("fp16", h)):
        for BN, BH, warps, stages in ((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)):
            try:
                out = launch(w1, BN, BH, warps, stages)
                rows.append((f"{name} {BN} {BH} {warps} {stages}", ms(lambda: launch(w1, BN, BH, warps, stages)), (out - want).abs().max().item()))
            except Exception as e: rows.append((f"{name} {BN} {BH} {warps} {stages}", str(e)[:60], 0))
    res["gate"] = rows
    for r in rows: print(r, flush=True)
    save()
del gates
# training step
gates = Gates.for_model(model, window=256).to(dev)
opt = torch.optim.AdamW(gates.parameters()); gates.train().requires_grad_(True)
ids = torch.randint(0, c.vocab_size, (32768,))
def step(keep):
    plain = train.SoftAttention
    train.SoftAttention = lambda *a, **b: plain(*a, keep_outputs=keep, **b)
    torch.cuda.reset_peak_memory_stats(); torch.cuda.synchronize(); t = time.time()
    losses = train.distill(model, gates, [(ids, torch.ones(32768))], checkpoint=True)
    (losses.distill + 0.16 * losses.sparsity).backward()
    torch.cuda.synchronize(); g = [p.grad.clone() for p in gates.parameters()]; opt.zero_grad()
    train.SoftAttention = plain
    return time.time() - t, g, torch.cuda.max_memory_allocated() / 2**30
a = step(False); b = step(True)
res["same gradients"] = all(torch.equal(x, y) for x, y in zip(a[1], b[1])); print("same", res["same gradients"], flush=True)
for name, keep, ctx in (("plain", False, contextlib.nullcontext), ("kept", True, contextlib.nullcontext), ("kept, cuDNN teacher", True, lambda: bench.strongest_attention(dev))):
    with ctx():
        step(keep); r = [step(keep) for _ in range(2)]
    res[f"step {name}"] = [(x[0], x[2]) for x in r]; print(name, res[f"step {name}"], flush=True)
PA = torch.profiler.ProfilerActivity
with torch.profiler.profile(activities=[PA.CUDA, PA.CPU]) as p:
    s = step(True)
rows, ops = table(p)
res["profile step"] = dict(wall=s[0], busy_ms=sum(r[1] for r in rows), rows=rows[:70], ops=ops[:50]); save()
print("profile step", s[0], sum(r[1] for r in rows), flush=True)
for r in rows[:32]: print("  ", r[0][:90], r[1:])
for r in ops[:22]: print("  op", r)
del gates, opt, a, b, r, p, s; bench.free_memory(dev)
# prefill of 200K
with torch.no_grad():
    policy = bench.admission_policy(model, args, 256); prompts = [bench.make_prompt(model, 204800, args)]
    for profiled in (False, True):
        kv = DualCache(model, policy)
        with torch.profiler.profile(activities=[PA.CUDA]) if profiled else contextlib.nullcontext() as p:
            s, _ = bench.read_prompts(model, kv, prompts, 8192)
        print("200K", profiled, s, flush=True); res[f"200K {profiled}"] = s
        del kv; bench.free_memory(dev)
    rows, _ = table(p); res["profile 200K"] = dict(busy_ms=sum(r[1] for r in rows), rows=rows[:50]); save()
    for r in rows[:24]: print("  ", r[0][:90], r[1:])
del model, policy, p; bench.free_memory(dev)
for tokens in (102400, 32768):
    pages = bench.RandomPages(c, [0.25], tokens, 256, dev)
    keep = kernels.hopper_kernels; out = {}
    for name in ("hopper", "plain"):
        kernels.hopper_kernels = keep if name == "hopper" else (lambda q: None)
        with torch.no_grad(): out[name] = bench.time_prefill_attention(c, pages, tokens, args, setup)
    kernels.hopper_kernels = keep
    need_dense = 2 * 128 * 32 * tokens * (tokens + 1)
    r = {n: o["needed_flops"] / bench.median(o["prefill_s"]) / (need_dense / bench.median(o["dense_s"])) for n, o in out.items()}
    res[f"portable {tokens}"] = dict(out, over_cudnn=r); print("portable", tokens, r, flush=True); save()
    del pages; bench.free_memory(dev)
