"""Where the time of prefill and of a training step goes; the portable prefill kernel."""
import json, os, sys, time
sys.path.insert(0, os.getcwd())
import torch
import bench, train, kernels
from wgkv import DualCache, Gates
OUT = os.environ["OUT"]
dev = torch.device("cuda")
res = {}
def save():
    json.dump(res, open(f"{OUT}/one.json", "w"), indent=1)
def table(prof, n=45):
    rows = []
    for e in prof.key_averages():
        t = getattr(e, "self_device_time_total", 0)
        if t > 0:
            rows.append((e.key[:110], round(t / 1e3, 3), e.count))
    rows.sort(key=lambda r: -r[1])
    return rows[:n], round(sum(r[1] for r in rows), 2)
args = bench.make_parser().parse_args(["prefill", "--shape", "llama-3.1-8b", "--tokens", "32768", "--runs", "3"])
bench.check_options(args, dev)
torch.manual_seed(0)
model = bench.random_model("llama-3.1-8b", dev, torch.bfloat16)
peaks = bench.measure_peaks(dev)
res["peaks"] = peaks
print(peaks, flush=True)
# sustained matrix products
with torch.no_grad():
    a = torch.randn(8192, 8192, device=dev, dtype=torch.bfloat16); b = torch.randn_like(a)
    torch.cuda.synchronize(); t = time.time(); n = 0
    while time.time() - t < 2:
        for _ in range(50): a @ b
        n += 50; torch.cuda.synchronize()
    res["sustained_tflops"] = n * 2 * 8192**3 / (time.time() - t) / 1e12
    c = model.config; lay = model.layers[0]
    rates = {}
    for rows in (8192, 16384, 32768):
        for name, lin in (("qkv", lay.qkv), ("out", lay.out), ("gate_up", lay.gate_up), ("down", lay.down)):
            x = torch.randn(1, rows, lin.weight.shape[1], device=dev, dtype=torch.bfloat16)
            for _ in range(3): lin(x)
            e0, e1 = torch.cuda.Event(True), torch.cuda.Event(True)
            e0.record()
            for _ in range(12): lin(x)
            e1.record(); torch.cuda.synchronize()
            rates[f"{name} {rows}"] = round(12 * 2 * rows * lin.weight.numel() / e0.elapsed_time(e1) / 1e9, 1)
    res["rates"] = rates
    print(res["sustained_tflops"], rates, flush=True); save()
    setup = bench.Setup(256, peaks)
    policy = bench.admission_policy(model, args, 256)
    for tokens, chunks in ((32768, (8192, 16384, 32768, 4096)), (204800, (8192,))):
        prompts = [bench.make_prompt(model, tokens, args)]
        for chunk in chunks:
            times = []
            for _ in range(3 if tokens < 99999 else 1):
                kv = DualCache(model, policy)
                s, _ = bench.read_prompts(model, kv, prompts, chunk); times.append(s)
                del kv; bench.free_memory(dev)
            res[f"prefill {tokens} chunk {chunk}"] = times
            print(tokens, chunk, times, flush=True)
        kv = DualCache(model, policy)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            s, _ = bench.read_prompts(model, kv, prompts, 8192)
        rows, total = table(p)
        res[f"profile {tokens}"] = dict(wall=s, busy_ms=total, rows=rows)
        print("profile", tokens, s, total, flush=True)
        for r in rows[:26]: print("   ", r, flush=True)
        del kv, p; bench.free_memory(dev); save()
# training step
def sample(T):
    return torch.randint(0, model.config.vocab_size, (T,)), torch.ones(T)
gates = Gates.for_model(model, window=256)
opt = torch.optim.AdamW(gates.parameters())
gates.train().requires_grad_(True)
def step(T):
    torch.cuda.synchronize(); t = time.time()
    losses = train.distill(model, gates, [sample(T)], checkpoint=True)
    (losses.distill + 0.16 * losses.sparsity).backward()
    torch.cuda.synchronize(); opt.step(); opt.zero_grad()
    return time.time() - t
print("step", step(32768), flush=True)
res["step"] = [step(32768), step(32768)]
print("step", res["step"], flush=True)
PA = torch.profiler.ProfilerActivity
with torch.profiler.profile(activities=[PA.CUDA, PA.CPU]) as p:
    s = step(32768)
rows = []; ops = []
for e in p.key_averages():
    t = getattr(e, "self_device_time_total", 0)
    if t > 0: (ops if str(e.device_type).endswith("CPU") else rows).append((e.key[:110], round(t / 1e3, 2), e.count))
rows.sort(key=lambda r: -r[1]); ops.sort(key=lambda r: -r[1])
res["profile step"] = dict(wall=s, busy_ms=sum(r[1] for r in rows), rows=rows[:60], ops=ops[:40])
print("profile step", s, sum(r[1] for r in rows), flush=True)
for r in rows[:40]: print("   ", r)
for r in ops[:30]: print("  op", r)
save()
# the portable prefill
del model, gates, opt, p
bench.free_memory(dev)
class M: pass
cfg = c
for tokens in (32768, 102400, 204800):
    pages = bench.RandomPages(cfg, [0.25], tokens, 256, dev)
    keep = kernels.hopper_kernels
    out = {}
    for name in ("hopper", "plain"):
        kernels.hopper_kernels = keep if name == "hopper" else (lambda q: None)
        with torch.no_grad():
            out[name] = bench.time_prefill_attention(cfg, pages, tokens, args, setup)
    kernels.hopper_kernels = keep
    d = bench.median(out["plain"]["dense_s"]); need_dense = 2 * 128 * 32 * tokens * (tokens + 1)
    r = {n: o["needed_flops"] / bench.median(o["prefill_s"]) / (need_dense / bench.median(o["dense_s"])) for n, o in out.items()}
    res[f"portable {tokens}"] = dict(out, over_cudnn=r)
    print("portable", tokens, r, flush=True); save()
    del pages; bench.free_memory(dev)
