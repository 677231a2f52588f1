import json, os, sys, time
sys.path.insert(0, os.getcwd())
import torch
import bench, train, kernels
from wgkv import DualCache, Gates
OUT = os.environ["OUT"]; dev = torch.device("cuda"); res = {}
def save(): json.dump(res, open(f"{OUT}/three.json", "w"), indent=1)
args = bench.make_parser().parse_args(["prefill", "--shape", "llama-3.1-8b", "--tokens", "204800"])
bench.check_options(args, dev); torch.manual_seed(0)
model = bench.random_model("llama-3.1-8b", dev, torch.bfloat16)
res["peaks"] = bench.measure_peaks(dev); setup = bench.Setup(256, res["peaks"]); c = model.config
with torch.no_grad():
    policy = bench.admission_policy(model, args, 256)
    for tokens, runs in ((32768, 5), (204800, 1)):
        prompts = [bench.make_prompt(model, tokens, args)]; times = []
        for _ in range(runs):
            kv = DualCache(model, policy); s, _ = bench.read_prompts(model, kv, prompts, 8192); times.append(s)
            adm = kv.num_promoted() / (kv.L * kv.Hkv * (tokens - 256)); del kv; bench.free_memory(dev)
        fl = bench.prefill_flops(c, tokens, adm, 256)
        res[f"prefill {tokens}"] = dict(times=times, mfu=fl / res["peaks"]["flops"] / min(times), flops=fl); print(tokens, res[f"prefill {tokens}"], flush=True); save()
del policy
gates = Gates.for_model(model, window=256).to(dev); gates.train().requires_grad_(True)
def step(T, keep):
    ids = torch.randint(0, c.vocab_size, (T,))
    torch.cuda.reset_peak_memory_stats(); torch.cuda.synchronize(); t = time.time()
    losses = train.distill(model, gates, [(ids, torch.ones(T))], keep)
    (losses.distill + 0.16 * losses.sparsity).backward(); torch.cuda.synchronize()
    for p in gates.parameters(): p.grad = None
    return time.time() - t, torch.cuda.max_memory_allocated() / 2**30
for T, keep, n in ((32768, train.ATTENTION, 3), (8192, train.EVERYTHING, 3), (4096, train.EVERYTHING, 3)):
    res[f"step {T} {keep}"] = [step(T, keep) for _ in range(n)]; print(T, keep, res[f"step {T} {keep}"], flush=True); save()
