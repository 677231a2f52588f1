"""Train write gates for a frozen model, by distillation from the model itself.

    python train.py                                       gates for the bundled model, without any data, on a laptop
    python train.py --data book.txt --model FOLDER        for another model, from text (a file, or a folder of .txt)

The teacher is the model with full attention. The student is the same weights, with each key's gate as a bias on the
scores outside the window (`wgkv.SoftAttention`). Only the gates learn:

    loss = mean (student's last hidden state - teacher's)^2  +  lambda * expected size of the cache

so a gate closes where nobody misses the key. lambda sets how hard it tries: larger keeps less.

Without --data the documents are made on the spot: the frozen model writes passages, and tiny/tasks.py hides facts,
lists, classes and passages to copy in them.
"""
import math
import random
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from generate import Parser, Text, check_writable, decode, load_model, model_options, prefill, run_program, sampler
from model import UserError, say
from tiny import tasks
from wgkv import DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, admission_cost


# ---------------------------------------------------------------------------------------------------------- documents

def model_writes(model, text, tokens, seed, batch=32):
    """About `tokens` tokens of prose, sampled from the model: a haystack for when there is no text at hand."""
    choose, passages = sampler(1.0, 0.95, seed, model.device), []
    start = text.begin or [min(text.end, default=0)]
    length = min(512, model.config.max_positions)
    with tqdm(total=tokens, desc="the model writes passages", unit=" tokens", unit_scale=True, leave=False) as bar:
        while bar.n < tokens:
            kv, rows = DenseCache(model, batch), [[] for _ in range(batch)]
            for ids in decode(model, kv, prefill(model, kv, [start] * batch), length, text.end, choose):
                for row, token in zip(rows, ids):
                    row.extend(() if token is None else (token,))
                bar.update(sum(token is not None for token in ids))
            passages += [text.decode(row) for row in rows]
    return "\n\n".join(passages)


def read_text(path):
    """The text of a file, or of all .txt files under a folder."""
    path = Path(path)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--data {path}: {e}") from None


def make_haystack(prose, args):
    try:
        return tasks.Haystack(prose)
    except ValueError as e:
        raise UserError(f"{args.data or 'what the model writes'} is no prose to hide tasks in: {e}") from None


def batches(args, model, text):
    """An iterator over (ids (B, T), lengths (B) or None): stretches of the text given, or documents made here."""
    rng, rows = random.Random(args.seed), max(1, args.tokens_per_step // args.seq_len)
    if args.data and not args.tasks:
        ids = text.encode(read_text(args.data), begin=False)
        body = args.seq_len - len(text.begin)
        if len(ids) < body:
            raise UserError(f"--data {args.data}: {len(ids):,} tokens, fewer than the {body:,} that --seq-len asks for")

        def draw():
            starts = [rng.randrange(len(ids) - body + 1) for _ in range(rows)]
            return torch.tensor([text.begin + ids[s:s + body] for s in starts]), None
    else:
        prose = read_text(args.data) if args.data else model_writes(model, text, args.haystack_tokens, args.seed)
        haystack = make_haystack(prose, args)

        def draw():
            documents = [tasks.make(tasks.pick(rng), haystack, args.seq_len, text.tokenizer.encode, rng)[1]
                         for _ in range(rows)]
            lengths = torch.tensor([len(d) for d in documents])
            return torch.tensor([d + [0] * (int(lengths.max()) - len(d)) for d in documents]), lengths

    return (draw() for _ in range(args.steps))


# ----------------------------------------------------------------------------------------------------------- training

def distance(student, teacher, lengths):
    """Mean squared difference of last hidden states (B, T, hidden), over the real tokens."""
    squares = (student.float() - teacher.float()).square().mean(dim=-1)
    if lengths is None:
        return squares.mean()
    real = torch.arange(squares.shape[1], device=squares.device) < lengths[:, None].to(squares.device)
    return squares[real].mean()


def train(model, gates, data, args):
    """AdamW with linear warm-up over a tenth of the steps and cosine decay to 0; one progress line."""
    optimizer = torch.optim.AdamW(gates.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / max(1, args.steps // 10),
        0.5 + 0.5 * math.cos(math.pi * max(0, step - args.steps // 10) / max(1, args.steps - args.steps // 10))))
    hard, device = math.nan, model.device
    with tqdm(total=args.steps * args.tokens_per_step, unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for step, (tokens, lengths) in enumerate(data):
            tokens = tokens.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                with torch.no_grad():
                    teacher = model(tokens)
                student = SoftAttention(gates, device)
                soft = distance(model(tokens, student, checkpoint=device.type == "cuda"), teacher, lengths)
                g = torch.stack([student.g[i] for i in range(len(student.g))])           # (L, B, Hkv, T)
                (soft + args.lam * admission_cost(g, gates.window)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                if step % 25 == 0 or step == args.steps - 1:                              # it costs a forward pass
                    with torch.no_grad():
                        hard = distance(model(tokens, SoftAttention(gates, device, hard=True)), teacher, lengths).item()
            bar.set_postfix_str(f"step {step + 1}/{args.steps}, soft {soft.item():.4f}, hard {hard:.4f}, "
                                f"admitted {(g >= gates.tau).float().mean().item():.1%}", refresh=False)
            bar.update(args.tokens_per_step)


# --------------------------------------------------------------------------------------------------------- evaluation

def evaluate(model, text, make_kv, documents, batch=8, progress=lambda documents: None):
    """Free greedy answers to the questions of documents: (share that is right, kept share at the end of the bodies).

    make_kv(batch) gives an empty cache. Each body is read once, each of its questions goes on from a copy of its cache.
    """
    right, cases, kept, dense = 0.0, 0, 0, 0
    for start in range(0, len(documents), batch):
        group = documents[start:start + batch]
        kv = make_kv(len(group))
        prefill(model, kv, [text.encode(d.body) for d in group])
        kept, dense = kept + kv.kept_bytes(), dense + kv.dense_bytes()
        for n in range(max(len(d.questions) for d in group)):
            asked = [d.questions[n % len(d.questions)] for d in group]
            branch = kv.clone()
            hidden = prefill(model, branch, [text.encode(question, begin=False) for question, _ in asked])
            steps = max(len(text.encode(answer, begin=False)) for _, answer in asked)
            said = [[] for _ in group]
            for ids in decode(model, branch, hidden, steps, text.end):
                for row, token in zip(said, ids):
                    row.extend(() if token is None else (token,))
            for d, (_, answer), row in zip(group, asked, said):
                if n < len(d.questions):
                    right, cases = right + tasks.correct(d.task, answer, text.decode(row)), cases + 1
        progress(len(group))
    return right / cases, kept / dense


def final_table(model, text, gates, args):
    """Recall of facts with everything, with the gates, and with the window alone, on documents not trained on."""
    rng = random.Random(f"{args.seed}/final")
    prose = read_text(args.data) if args.data else model_writes(model, text, 8192, args.seed + 1)
    haystack = make_haystack(prose, args)
    documents = [tasks.make("facts", haystack, args.seq_len, text.tokenizer.encode, rng)[0] for _ in range(32)]
    count = sum(len(d.questions) for d in documents)
    print(f"facts recalled, {count} questions in documents of {args.seq_len:,} tokens (W = {gates.window})")
    print(f"{'':14}{'kept':>8}{'recall':>9}")
    recalls = {}
    for name, make_kv in (("full attention", lambda B: DenseCache(model, B)),
                          ("gated", lambda B: DualCache(model, gates, B)),
                          ("window only", lambda B: DualCache(model, RandomAdmission(0.0), B, gates.window))):
        with tqdm(total=len(documents), desc=name, unit=" documents", delay=1, leave=False) as bar:
            recalls[name], kept = evaluate(model, text, make_kv, documents, progress=bar.update)
        print(f"{name:14}{kept:8.1%}{recalls[name]:9.1%}", flush=True)
    return recalls


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    model_options(parser)
    parser.add_argument("--data", metavar="FILE_OR_FOLDER", help="text to train on, instead of what the model writes")
    parser.add_argument("--tasks", action="store_true", help="hide facts, lists, classes and passages in that text")
    parser.add_argument("--out", default="gates.safetensors")
    parser.add_argument("--lam", type=float, default=0.16, help="lambda: larger admits less")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--expansion", type=float, default=4.0, help="hidden width of a gate, in head dims")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--haystack-tokens", type=int, default=65536, help="how much the model writes, without --data")
    args = parser.parse_args(argv)
    for name, low in (("lam", 0), ("window", 1), ("steps", 1), ("seq_len", 256), ("expansion", 0.1), ("lr", 0)):
        if not getattr(args, name) >= low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least {low}")
    if not 0 < args.tau <= 1:
        raise UserError(f"--tau {args.tau}: should be above 0, and at most 1")
    check_writable(args.out)
    torch.manual_seed(args.seed)
    text, model = Text(args.model), load_model(args)
    gates = Gates.for_model(model, window=args.window, tau=args.tau, expansion=args.expansion)
    start, status = time.time(), 0
    try:
        train(model, gates, batches(args, model, text), args)
    except KeyboardInterrupt:
        say("\ninterrupted: the gates as they are now are written")
        status = 130
    gates.eval().requires_grad_(False).save(args.out, model, args.lam)
    say(f"{args.out} written after {time.time() - start:.0f} s; try: python generate.py --model {args.model} "
        f"--gates {args.out}")
    if not status:
        final_table(model, text, gates, args)
    return status


if __name__ == "__main__":
    sys.exit(run_program(main))
