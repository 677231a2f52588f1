"""Train write gates for a frozen model, by distillation from the model itself.

    python train.py                                       gates for the bundled model, without any data, on a laptop
    python train.py --data books/ --model FOLDER          for another model, from text, by the paper's recipe
    python train.py ... --resume                          go on after an interruption, to the very same gates
    torchrun --nproc-per-node 4 train.py ... --tokens-per-step 131072         on several GPUs
    python train.py --convert official.pt --model FOLDER  the authors' gates as a file of ours

The teacher is the model with full attention. The student is the same weights, with each key's gate as a bias on the
scores outside the window (`wgkv.SoftAttention`). Only the gates learn:

    loss = mean (student's last hidden state - teacher's)^2  +  lambda * expected size of the cache

so a gate closes where nobody misses the key. lambda sets how hard it tries: larger keeps less. The mean is over tokens;
where it is known which of them answer a question, they may count for more, as they are few.

Without --data the documents are made on the spot: the frozen model writes passages, and tiny/tasks.py hides facts,
lists, classes and passages to copy in them.

Everything that is drawn in step n depends on the seed and n alone. So a run can go on from any step, and its samples
can be dealt out to any number of processes. Beside the gates OUT lie OUT.log.jsonl, a line for each step and the
validation last, and, until the run is complete, OUT.resume.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from generate import (HERE, Parser, Text, check_writable, decode, load_model, model_options, prefill, run_program,
                      sampler, write_whole)
from model import UserError, free_bytes, say
from tiny import tasks
from wgkv import (DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, admission_cost, fingerprint,
                  triton_kernels)


# ------------------------------------------------------------------------------------------------------------- recipe

def setting(default, text, **option):
    return field(default=default, metadata=dict(help=text, option=option))


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training. The defaults are the paper's, for real models: 7,500 samples, 65 million tokens."""
    lam: float = setting(0.16, "lambda: larger admits less")
    window: int = setting(256, "W, the tokens that stay in any case")
    tau: float = setting(0.1, "a gate this high admits")
    expansion: float = setting(4.0, "hidden width of a gate, in head dims")
    seq_len: tuple = setting((4096, 8192, 16384, 32768), "tokens a sample; twice the length, half as many samples")
    tokens_per_step: int = setting(4096, "at least; a step has whole samples of one length")
    steps: int = setting(7500, "updates of the gates")
    lr: float = setting(1e-3, "the learning rate at its highest")
    warmup: float = setting(0.1, "share of the steps in which it rises; then it falls to 0, a cosine")
    weight_decay: float = setting(0.01, "AdamW's")
    answer_weight: float = setting(1.0, "a token of an answer counts as much in the mean as so many others")
    haystack_tokens: int = setting(65536, "how much the model writes, without --data")
    tasks: str = setting("", "hide facts, lists, classes and passages in the text of --data: a mix of tiny/tasks.py",
                         nargs="?", const="asked", choices=[*tasks.MIXES])
    chat: bool = setting(False, "put each sample into the model's chat template, as a text to summarise",
                         action="store_true")
    seed: int = setting(0, "of everything drawn")


PAPER = Recipe()
BUNDLED = Recipe(lam=5.12, window=128, seq_len=(1024,), tokens_per_step=2048, steps=240, lr=2e-3, answer_weight=30.0)


def plan(recipe):
    """(length, first sample, samples) of each step: the lengths in a random order, samples numbered through the run.

    A step has as many samples of its length as --tokens-per-step takes, and lengths share the samples by 1 / length.
    """
    rows = {length: -(-recipe.tokens_per_step // length) for length in recipe.seq_len}
    shares = list(accumulate(1 / length / rows[length] for length in recipe.seq_len))
    ends = [round(recipe.steps * share / shares[-1]) for share in shares]
    lengths = [n for n, a, z in zip(recipe.seq_len, [0, *ends], ends) for _ in range(z - a)]
    random.Random(f"{recipe.seed}/lengths").shuffle(lengths)
    return list(zip(lengths, accumulate((rows[n] for n in lengths), initial=0), (rows[n] for n in lengths)))


def learning_rate(recipe, step):
    """In step 0, 1, ...: up in a line, down in a cosine."""
    warmup = int(recipe.warmup * recipe.steps)
    down = max(0, step - warmup) / max(1, recipe.steps - warmup)
    return recipe.lr * min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * down))


# -------------------------------------------------------------------------------------------------------- documents

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


INSTRUCTION, MARK = "Please analyze and summarize the following text:\n\n", "\N{OBJECT REPLACEMENT CHARACTER}"


def read_documents(path):
    """The documents, not empty, of a .jsonl file (the "text" of each line), a text file, or all of both in a folder."""
    path, documents = Path(path), []
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    for file in tqdm(files, desc="reading", unit=" files", delay=1, leave=False):
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else f"not UTF-8 text at byte {e.start}"
            raise UserError(f"--data {file}: {why}") from None
        lines = content.split("\n") if file.suffix == ".jsonl" else ()      # splitlines would cut at U+2028 as well
        for number, line in enumerate(lines, 1):
            try:
                documents += [json.loads(line)["text"] + ""] if line.strip() else []
            except (ValueError, KeyError, TypeError):
                raise UserError(f'--data {file}, line {number}: no JSON object with a "text" that is text') from None
        documents += [] if lines else [content]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"--data {path}: no text found" + " in its .txt and .jsonl files" * path.is_dir())
    return documents


def read_text(path):
    return "\n\n".join(read_documents(path))


def make_haystack(prose, source):
    try:
        return tasks.Haystack(prose)
    except ValueError as e:
        raise UserError(f"{source or 'what the model writes'} is no prose to hide tasks in: {e}") from None


def text_samples(documents, head):
    """draw(rng, length) -> (ids, weights): head, and a stretch of one of the documents (tensors of ids), all alike
    likely; each token weighs 1.

    Documents are not joined: those too short for a length are passed over (if all are, the longest is the sample).
    """
    def draw(rng, length):
        body = min(length - len(head), max(map(len, documents)))
        [document] = rng.choices(documents, [max(0, len(d) - body + 1) for d in documents])
        start = rng.randrange(len(document) - body + 1)
        ids = torch.cat((torch.tensor(head, dtype=document.dtype), document[start:start + body]))
        return ids, torch.ones(len(ids))

    return draw


def task_samples(haystack, encode, recipe):
    """draw(rng, length) -> (ids, weights): one of tiny/tasks.py hidden in the haystack, its answers weighing more."""
    def draw(rng, length):
        _, ids, answer = tasks.make(tasks.pick(rng, recipe.tasks or "asked"), haystack, length, encode, rng)
        return torch.tensor(ids), torch.tensor(answer) * (recipe.answer_weight - 1) + 1

    return draw


def split_text(documents, text, recipe, source):
    """Two draws out of documents, a list of str: to train on, and held out: every 20th, or the end of the only one.

    With --chat samples begin as the model's chat template does, up to where the user's text begins; as in the paper,
    the rest of the template falls off.
    """
    head = text.begin
    if recipe.chat:
        chat = text.chat([dict(role="user", content=INSTRUCTION + MARK)])
        head = text.encode(chat.partition(MARK)[0], control=True)           # the template's own tokens
    bar = tqdm(documents, desc="tokens of the text", unit=" documents", delay=1, leave=False)
    ids = sorted((torch.tensor(text.encode(d, begin=False), dtype=torch.int32) for d in bar), key=len)
    shortest, longest = min(recipe.seq_len) - len(head), max(recipe.seq_len) - len(head)
    if len(ids[-1]) < longest:
        raise UserError(f"--data {source}: the longest document has {len(ids[-1]):,} tokens, fewer than the "
                        f"{longest:,} that --seq-len {max(recipe.seq_len)} asks for: lower it, or give longer texts")
    ids = [d for d in ids if len(d) >= shortest]
    held, spare = ids[:-1:20], len(ids[-1]) - longest
    if held:                                                         # never the longest, there may be no other as long
        ids = [d for i, d in enumerate(ids) if i % 20 or i == len(ids) - 1]
    elif spare >= shortest:
        ids, held = ids[0].tensor_split([-min(spare, max(shortest, len(ids[0]) // 20))])
        ids, held = [ids], [held]
    else:
        say(f"--data {source}: too short to hold a part out: the validation is on what was trained on")
    say(f"documents to train on: {len(ids):,}, of {sum(map(len, ids)):,} tokens; long enough: " + ", ".join(
        f"{sum(len(d) >= n - len(head) for d in ids):,} for {n:,} tokens" for n in recipe.seq_len))
    return text_samples(ids, head), text_samples(held or ids, head)


# ------------------------------------------------------------------------------------------------------------- memory

def activation_bytes(model, gates, length, checkpoint):
    """About what one sample of `length` tokens takes at its peak beside weights and gates. In numbers for a token:

        a layer keeps    2 hidden + 2 (Hq + 2 Hkv) D + 3 intermediate, and 4 E D + 8 D in fp32 for each of its gates
        checkpointed     2 hidden for each layer, and the above only for the one that runs again
        besides          as much as a layer keeps, for gradients, and, without kernels.py, five fp32 scores of 256
                         queries for each head

    Numbers are of the model's dtype; on CUDA autocast makes most of them bf16. It errs on the high side: on a CPU, at
    4,096 tokens, two thirds of it were measured.
    """
    c, size = model.config, 2 if model.device.type == "cuda" else model.dtype.itemsize
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = size * (2 * c.hidden_size + 2 * heads + 3 * c.intermediate_size)
    layer += 4 * c.num_kv_heads * c.head_dim * (4 * gates.expansion + 8)
    kept = 2 * c.hidden_size * model.dtype.itemsize * c.num_layers + layer if checkpoint else c.num_layers * layer
    scores = 0 if triton_kernels(model.device, c.head_dim) else 5 * 4 * c.num_heads * 256
    return int(length * (kept + layer + scores))


def fit(model, gates, recipe):
    """({length: (samples side by side, are layers checkpointed)}, the estimate as a line of text).

    UserError if not even one sample fits. Layers are checkpointed where all that they keep would not fit: it costs
    another forward pass. Short samples of a step go through a GPU side by side, as many as SIDE_BY_SIDE tokens.
    """
    if model.device.type == "cuda":
        torch.cuda.empty_cache()                                     # what is cached counts as taken
    free, longest = free_bytes(model.device) or math.inf, max(recipe.seq_len)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = 5 * 4 * sum(p.numel() for p in gates.parameters())       # gradients twice, AdamW's moments, the last good

    def needs(tokens, checkpoint):
        return state + activation_bytes(model, gates, tokens, checkpoint)

    how = {}
    for length in recipe.seq_len:
        checkpoint = needs(length, False) > 0.8 * free
        rows = SIDE_BY_SIDE // length if model.device.type == "cuda" else 1
        while rows > 1 and needs(rows * length, checkpoint) > 0.8 * free:
            rows //= 2
        how[length] = max(1, rows), checkpoint
    needed = needs(longest, how[longest][1])
    if needed > free:
        raise UserError(f"--seq-len {longest} needs about {needed / 2**30:.2f} GiB beside the weights, {model.device} "
                        f"has {free / 2**30:.2f} GiB free: lower --seq-len, or try --dtype bfloat16")
    return how, (f"memory: weights {weights / 2**30:.2f} GiB; a sample of {longest:,} tokens takes about "
                 f"{needed / 2**30:.2f} GiB{', layers checkpointed,' * how[longest][1]} of the {free / 2**30:.2f} GiB "
                 f"free on {model.device}")


# ----------------------------------------------------------------------------------------------------------- training

SIDE_BY_SIDE = 32768        # tokens


def distill(model, gates, samples, checkpoint=False, hard=False):
    """What the loss is made of, as means over samples, pairs (ids, weights) of (T,) each: (soft, hard, cost, g).

    soft: mean squared difference of the student's last hidden states from the teacher's, a mean by weight over tokens.
    hard: the same with gates of 0 or 1, as at inference, without gradients; NaN unless asked for, as it takes another
    pass. cost: the expected share of a dense cache. g: the gates of each sample, (L, Hkv, T). Samples are padded on the
    right, where none looks and nothing weighs.
    """
    device, lengths = model.device, [len(ids) for ids, _ in samples]
    ids, weights = (pad_sequence(part, batch_first=True).to(device) for part in zip(*samples))
    ids, weights = ids.long(), weights.float() / weights.float().sum(dim=1, keepdim=True)

    def distance(student, teacher):
        return ((student.float() - teacher.float()).square().mean(dim=-1) * weights).sum(dim=1).mean()

    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            teacher = model(ids)
        student = SoftAttention(gates, device)
        soft = distance(model(ids, student, checkpoint=checkpoint), teacher)
        with torch.no_grad():
            hard = distance(model(ids, SoftAttention(gates, device, hard=True)), teacher).item() if hard else math.nan
    g = torch.stack([student.g[layer] for layer in range(len(student.g))], dim=1)            # (B, L, Hkv, T)
    g = [row[..., :n] for row, n in zip(g, lengths)]
    return soft, hard, torch.stack([admission_cost(row, gates.window) for row in g]).mean(), g


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensors):
    """Sum each tensor over the processes, in place, in one exchange."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


@contextlib.contextmanager
def finish_the_step():
    """A list that Ctrl-C, or SIGTERM as clusters send it, puts something into; a second one interrupts at once.

    For a stop in the middle of an update would leave gates of two steps.
    """
    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    asked, before = [], {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Samples(Dataset):
    """samples[n]: those of step n that are this process's, (ids, weights) each, by draw(rng, length) of its own number.
    """

    def __init__(self, draw, recipe):
        self.draw, self.recipe, self.steps, (self.rank, self.size) = draw, recipe, plan(recipe), rank_and_size()

    def __getitem__(self, step):
        length, first, rows = self.steps[step]
        return [self.draw(random.Random(f"{self.recipe.seed}/{n}"), length)
                for n in range(first + self.rank, first + rows, self.size)]


def workers(device):
    """How many processes may draw samples beside a GPU, which is faster than one; none beside a CPU, which is busy."""
    return max(0, min(12, (os.cpu_count() or 1) // rank_and_size()[1] - 1)) if device.type == "cuda" else 0


def leave_ctrl_c(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                     # to the process that trains


def train(model, gates, optimizer, samples, recipe, done=0, how=None, save=None, save_every=50, log=None):
    """The steps after `done`. Returns (steps done, None or why there are not more of them).

    samples: see `Samples`. how: see `fit`. save(steps done) and log(a dict) are called if given. A step's samples go
    through a few at a time and their gradients add up: memory is that of a few, and several processes may share them.
    If a loss or gradient is not finite, the gates go back to the last that had a finite one.
    """
    steps, parameters = plan(recipe), list(gates.parameters())
    batches = DataLoader(samples, None, sampler=range(done, recipe.steps), num_workers=workers(model.device),
                         worker_init_fn=leave_ctrl_c)
    total, over = (sum(n * rows for n, _, rows in part) for part in (steps, steps[:done]))
    good, shown = None, math.nan
    with finish_the_step() as asked, tqdm(total=total, initial=over, unit=" tokens", unit_scale=True,
                                          mininterval=1) as bar:
        start = time.perf_counter()
        for step, here in enumerate(batches, done):
            (length, _, rows), ask_hard = steps[step], step % 25 == 0 or step == recipe.steps - 1
            at_once, checkpoint = how[length] if how else (1, False)
            sums = torch.zeros(6, device=model.device)
            for n in range(0, len(here), at_once):
                some = here[n:n + at_once]
                soft, hard, cost, g = distill(model, gates, some, checkpoint, ask_hard)
                ((soft + recipe.lam * cost) * len(some) / rows).backward()
                admitted = torch.stack([(row >= gates.tau).float().mean() for row in g]).mean().item()
                figures = torch.tensor([soft.item(), hard, cost.item(), admitted], device=model.device)
                sums[:4] += figures * len(some) / rows
                sums[4] += sum(len(ids) for ids, _ in some)
            gradients, sums[5] = [p.grad for p in parameters], len(asked)
            add_up([*gradients, sums])
            soft, hard, cost, admitted, tokens, stop = sums.tolist()
            norm = torch.nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(soft + cost + norm):
                with torch.no_grad():
                    for p, last in zip(parameters, good or parameters):
                        p.copy_(last)
                return step - bool(good), f"step {step + 1}: the loss or its gradient is not finite"
            good = [p.detach().clone() for p in parameters]
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now, shown = time.perf_counter(), hard if ask_hard else shown
            start, seconds = now, now - start
            if log:
                log(dict(step=step + 1, loss=soft + recipe.lam * cost, soft=soft, hard=hard if ask_hard else None,
                         cost=cost, admitted=admitted, gradient=norm, length=length, seconds=seconds,
                         tokens_per_s=tokens / seconds))
            bar.set_postfix_str(f"step {step + 1}/{recipe.steps}, soft {soft:.4f}, hard {shown:.4f}, "
                                f"admitted {admitted:.1%}", refresh=False)
            bar.update(length * rows)
            if save and (stop or (step + 1) % save_every == 0):
                save(step + 1)
            if stop:
                return step + 1, "interrupted"
    return recipe.steps, None


# ------------------------------------------------------------------------------------------------------- going on later

def save_resume(path, gates, optimizer, done, settings):
    """All that a run needs to go on."""
    save_whole(path, dict(done=done, settings=settings, gates=gates.state_dict(), optimizer=optimizer.state_dict()))


def save_whole(path, state):
    """torch.save beside the name, then renamed: a kill leaves the last one whole. UserError if it cannot be written."""
    try:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path} cannot be written: {str(e).splitlines()[0]}") from None


def load_resume(path, gates, optimizer, settings):
    """Fills gates and optimizer; returns the steps done. UserError for the state of another run, or of no run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)     # never runs what is in the file
        differing = [f"{k} {state['settings'][k]} there, {v} here" for k, v in settings.items()
                     if state["settings"][k] != v]
        if not differing:
            gates.load_state_dict(state["gates"])
            optimizer.load_state_dict(state["optimizer"])
            return state["done"]
    except Exception as e:                                           # a broken pickle raises almost anything
        why = (str(e) or repr(e)).splitlines()[0]
        raise UserError(f"{path} cannot be read as the state of a run: {why}") from None
    raise UserError(f"{path} is of another run: {', '.join(differing)}; give the same, or leave out --resume")


def start_log(path, done):
    """Empty, or for a run that goes on, without the lines after step `done`: those will be written once more."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True) if done and os.path.exists(path) else []
    write_whole(path, "".join(lines[:done]))


def write_log(path, figures):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


# --------------------------------------------------------------------------------------------------------- evaluation

def validate(model, gates, draw, recipe):
    """Distances and gates on 16 samples not trained on, alike many of each length: a dict for the log.

    heads: the share that each head admits, a list of Hkv for each layer. histogram: shares of g in tenths of 0 to 1.
    """
    lengths, sums = recipe.seq_len * max(1, 16 // len(recipe.seq_len)), 0
    for n, length in enumerate(tqdm(lengths, desc="validation", unit=" samples", delay=1, leave=False)):
        with torch.no_grad():
            soft, hard, _, [g] = distill(model, gates, [draw(random.Random(f"{recipe.seed}/validation/{n}"), length)],
                                         hard=True)
        heads, tenths = (g >= gates.tau).float().mean(-1).cpu(), torch.histc(g.float(), 10, 0, 1).cpu() / g.numel()
        sums = sums + torch.cat((torch.tensor([soft.item(), hard]), tenths, heads.flatten()))
    (soft, hard), tenths, shares = (sums / len(lengths)).split([2, 10, heads.numel()])
    say(f"validation: soft {soft:.4f}, hard {hard:.4f}, admitted {shares.mean():.1%} (a head {shares.min():.1%} to "
        f"{shares.max():.1%}); gates in tenths of 0 to 1: {' '.join(f'{share:.0%}' for share in tenths)}")
    return dict(samples=len(lengths), soft=soft.item(), hard=hard.item(), admitted=shares.mean().item(),
                heads=shares.view_as(heads).tolist(), histogram=tenths.tolist())


def evaluate(model, text, make_kv, documents, batch=8, progress=lambda documents: None):
    """Free greedy answers to the questions of documents: ([how right each is, 0 to 1], kept share after the bodies).

    make_kv(documents of a batch) gives an empty cache. Each body is read once, each of its questions goes on from a
    copy of its cache.
    """
    scores, kept, dense = [], 0, 0
    for start in range(0, len(documents), batch):
        group = documents[start:start + batch]
        kv = make_kv(group)
        prefill(model, kv, [text.encode(d.body) for d in group])
        kept, dense = kept + kv.kept_bytes(), dense + kv.dense_bytes()
        for n in range(max(len(d.questions) for d in group)):
            asked = [d.questions[n % len(d.questions)] for d in group]
            branch = kv.clone()
            hidden = prefill(model, branch, [text.encode(question, begin=False) for question, _ in asked])
            steps = max(len(text.encode(answer, begin=False, control=True)) for _, answer in asked)
            said = [[] for _ in group]
            for ids in decode(model, branch, hidden, steps, text.end):
                for row, token in zip(said, ids):
                    row.extend(() if token is None else (token,))
            for d, (_, answer), row in zip(group, asked, said):
                if n < len(d.questions):
                    scores.append(tasks.correct(d.task, answer, text.decode(row)))
        progress(len(group))
    return scores, kept / dense


def final_table(model, text, gates, args, recipe):
    """Recall of facts with everything, with the gates, and with the window alone, on documents not trained on."""
    rng, length = random.Random(f"{recipe.seed}/final"), min(recipe.seq_len)
    prose = read_text(args.data) if args.data else model_writes(model, text, 8192, recipe.seed + 1)
    haystack = make_haystack(prose, args.data)
    documents = [tasks.make("facts", haystack, length, text.tokenizer.encode, rng)[0] for _ in range(32)]
    count = sum(len(d.questions) for d in documents)
    print(f"facts recalled, {count} questions in documents of {length:,} tokens (W = {gates.window})")
    print(f"{'':14}{'kept':>8}{'recall':>9}")
    recalls = {}
    for name, make_kv in (("full attention", lambda group: DenseCache(model, len(group))),
                          ("gated", lambda group: DualCache(model, gates, len(group))),
                          ("window only", lambda group: DualCache(model, RandomAdmission(0.0), len(group),
                                                                  gates.window))):
        with tqdm(total=len(documents), desc=name, unit=" documents", delay=1, leave=False) as bar:
            scores, kept = evaluate(model, text, make_kv, documents, progress=bar.update)
        recalls[name] = sum(scores) / len(scores)
        print(f"{name:14}{kept:8.1%}{recalls[name]:9.1%}", flush=True)
    return recalls


# -------------------------------------------------------------------------------------------------------- the program

@contextlib.contextmanager
def processes(args):
    """Joins the processes that torchrun started, if it did; all but the first keep silent, unless they fail."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.cuda.is_available() and args.device is None:
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            dist.init_process_group("nccl" if (args.device or "cpu").startswith("cuda") else "gloo")
            stack.callback(dist.destroy_process_group)
            if dist.get_rank() > 0:
                quiet = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
                stack.enter_context(contextlib.redirect_stderr(quiet))
        yield


def is_bundled(args):
    return Path(args.model).resolve() == HERE / "tiny"


def lengths(text):
    return tuple(int(n) for n in text.split(","))


def parse(argv):
    """The arguments, and the recipe: the model's preset with what was asked for put in."""
    parser = Parser(description=__doc__.partition("\n")[0])
    model_options(parser)
    parser.add_argument("--data", metavar="FILE_OR_FOLDER", help="text to train on, instead of what the model writes: "
                        "a text file, a .jsonl file with a \"text\" in each line, or a folder of .txt and .jsonl")
    parser.add_argument("--out", default="gates.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on with the run whose state is in OUT.resume")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two writings of OUT.resume (50)")
    parser.add_argument("--recall", action="store_true", help="end with the table of recalled facts even after plain "
                        "--data for another model than the bundled one, which may not know how to answer")
    parser.add_argument("--convert", metavar="FILE.pt", help="do not train: write these official gates to OUT")
    for f in fields(Recipe):
        name = "--" + f.name.replace("_", "-")
        if f.metadata["option"]:
            parser.add_argument(name, default=None, help=f.metadata["help"], **f.metadata["option"])
        elif f.name != "seed":                                       # that is one of model_options
            paper, bundled = (str(getattr(preset, f.name)).strip("(,)").replace(" ", "") for preset in (PAPER, BUNDLED))
            default = paper if paper == bundled else f"{paper}; {bundled} for the bundled model"
            parser.add_argument(name, type=lengths if f.type is tuple else f.type, metavar="N",
                                help=f"{f.metadata['help']} ({default})")
    args = parser.parse_args(argv)
    asked = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    recipe = replace(BUNDLED if is_bundled(args) else PAPER, **asked)
    check(args, recipe)
    return args, recipe


def check(args, recipe):
    """UserError for settings out of range or at odds with each other, before anything slow."""
    shortest, longest, size = min(recipe.seq_len), max(recipe.seq_len), int(os.environ.get("WORLD_SIZE", 1))
    for name, value, low in (("seq_len", shortest, 256), ("save_every", args.save_every, 1), *(
            (name, getattr(recipe, name), low) for name, low in (
                ("lam", 0), ("window", 1), ("expansion", 0.1), ("tokens_per_step", 1), ("steps", 1), ("lr", 0),
                ("warmup", 0), ("weight_decay", 0), ("answer_weight", 0), ("haystack_tokens", 1)))):
        if not value >= low:
            raise UserError(f"--{name.replace('_', '-')} {value}: should be at least {low}")
    fewest = -(-recipe.tokens_per_step // longest)
    for clash, message in ((not 0 < recipe.tau <= 1, f"--tau {recipe.tau}: should be above 0, and at most 1"),
                           (recipe.warmup > 1, f"--warmup {recipe.warmup}: should be at most 1"),
                           (recipe.window >= shortest, f"--window {recipe.window} should be smaller than --seq-len "
                            f"{shortest}: no key would ever leave the window, and gates learn nothing"),
                           (recipe.chat and (recipe.tasks or not args.data), "--chat is for the plain text of --data, "
                            "not for --tasks or what the model writes"),
                           (fewest < size, f"--tokens-per-step {recipe.tokens_per_step}: it should be at least "
                            f"{size * longest}, a sample of {longest} tokens for each of {size} processes")):
        if clash:
            raise UserError(message)
    check_writable(args.out)


def convert(args):
    """Official gates as a file of ours. Of the model only shape and fingerprint matter: half precision will do."""
    args.device, args.dtype = args.device or "cpu", args.dtype or "bfloat16"
    model = load_model(args)
    gates = Gates.load_official(args.convert, model)
    gates.window, gates.tau = args.window or gates.window, args.tau or gates.tau
    gates.save(args.out, model, args.lam or 0.0)
    say(f"{args.out} written: {args.convert} with window {gates.window} and tau {gates.tau}")


def samples(args, recipe, documents, model, text):
    """Two draws, draw(rng, length) -> (ids, weights): to train on, to validate on (tasks: of the same prose, anew)."""
    if args.data and not recipe.tasks:
        return split_text(documents, text, recipe, args.data)
    prose = "\n\n".join(documents) or model_writes(model, text, recipe.haystack_tokens, recipe.seed)
    return [task_samples(make_haystack(prose, args.data), text.tokenizer.encode, recipe)] * 2


def run(args, recipe):
    """One training from beginning to end; the first of several processes does all the writing. Returns exit status."""
    start, first, resume, log = time.time(), not rank_and_size()[0], f"{args.out}.resume", f"{args.out}.log.jsonl"
    documents = read_documents(args.data) if args.data else []
    text, model = Text(args.model), load_model(args)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    positions = model.config.max_positions
    if args.seq_len is None:
        recipe = replace(recipe, seq_len=tuple(n for n in recipe.seq_len if n <= positions) or (positions,))
    torch.manual_seed(recipe.seed)
    gates = Gates.for_model(model, window=recipe.window, tau=recipe.tau, expansion=recipe.expansion)
    optimizer = torch.optim.AdamW(gates.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    recipe_json, done = json.dumps(asdict(recipe)), 0
    settings = dict(json.loads(recipe_json), model=fingerprint(model), dtype=str(model.dtype),
                    data=hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16])   # a path may change
    going_on = args.resume and os.path.exists(resume)
    if going_on:
        done = load_resume(resume, gates, optimizer, settings)
    how, estimate = fit(model, gates, recipe)
    draw, draw_held_out = samples(args, recipe, documents, model, text)
    say(f"recipe: {recipe_json}\n{estimate}")                        # only now: a mistake is to be one line
    if max(recipe.seq_len) > positions:
        say(f"warning: --seq-len {max(recipe.seq_len)}, and {args.model} was trained for {positions:,} positions")
    if args.resume:
        say(f"{resume}: going on after step {done}" if going_on else f"{resume} is not there: beginning at step 1")
    elif os.path.exists(resume):
        say(f"{resume} is there, of a run that was not completed: it will be overwritten (--resume would go on)")
    if first:
        start_log(log, done)
    done, why = train(model, gates, optimizer, Samples(draw, recipe), recipe, done, how, save_every=args.save_every,
                      save=first and (lambda done: save_resume(resume, gates, optimizer, done, settings)),
                      log=first and (lambda figures: write_log(log, figures)))
    if first and done:
        gates.eval().requires_grad_(False).save(args.out, model, recipe.lam, recipe_json)
    if why == "interrupted":
        say(f"\ninterrupted: {args.out} has the gates after step {done}; --resume goes on from there")
        return 130
    if not first:
        return 2 if why else 0
    if why:
        raise UserError(f"{why}; " + (f"{args.out} has the gates after step {done}; " if done else "") +
                        f"a lower --lr than {recipe.lr} may help")
    say(f"{args.out} written after {time.time() - start:.0f} s; try: python generate.py --model {args.model} "
        f"--gates {args.out}")
    write_log(log, dict(validation=validate(model, gates, draw_held_out, recipe)))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(resume)
    if args.recall or recipe.tasks or not args.data or is_bundled(args):
        final_table(model, text, gates, args, recipe)
    return 0


def main(argv=None):
    args, recipe = parse(argv)
    if args.convert:
        convert(args)
        return 0
    with processes(args):
        return run(args, recipe)


if __name__ == "__main__":
    sys.exit(run_program(main))
