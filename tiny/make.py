"""How the bundled model was made: tokenizer, curriculum, weights; on a GPU, a quarter of an hour for all four runs.

    python tiny/make.py --text BOOKS --out RUN --compile
    python tiny/make.py --text BOOKS --out RUN --start RUN --stages 4096:3000:passages --lr 1e-3 --warmup 100 \\
        --seed 1 --compile                            and so on: README.md in this folder has all the commands

Retrieval is learnt short first and then stretched: the curriculum is a list of stages, each a length and a number of
steps, the first and the last with more to look back for. Where all documents are of one length the model comes to
expect it, so at last lengths are drawn at random (512-8192:4000:passages). Novels are few for this many steps: a weight
decay six times the usual keeps the model from learning them by heart. Gates come afterwards, from train.py.
"""
import argparse
import functools
import json
import math
import os
import random
import re
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Config, Llama, UserError, checkpoint_names, say       # noqa: E402
from tiny import tasks                                                  # noqa: E402

BEGIN, END = "<|begin|>", tasks.END
ANSWER_WEIGHT = 5.0                                     # a token of an answer counts as much as five others


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with digits one by one; every text begins with BEGIN (a place for attention to rest on)."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    return tokenizer


class Sentences:
    """encode(text) for documents out of a haystack, whose sentences are looked up: four times as fast, the same ids.

    No token of our tokenizer crosses from a full stop to the space before the next word, so a text is the sum of its
    sentences. Tokens of those that are known all have the offsets of their sentence: it is in an answer, or it is not.
    """
    seam = re.compile(r"(?<=[a-z]{2}[.!?])(?= [A-Z])")

    def __init__(self, tokenizer, haystack):
        self.bare, self.known = functools.partial(tokenizer.encode, add_special_tokens=False), {}
        self.begin = tokenizer.token_to_id(BEGIN)
        sentences = self.seam.split(haystack.text)
        for n in range(0, len(sentences), 10000):
            some = sentences[n:n + 10000]
            for sentence, encoding in zip(some, tokenizer.encode_batch_fast(some, add_special_tokens=False)):
                self.known[sentence] = array("H", encoding.ids)

    def __call__(self, text):
        ids, offsets, at = [self.begin], [(0, 0)], 0
        for sentence in self.seam.split(text):
            known = self.known.get(sentence)
            if known:
                ids.extend(known)
                offsets += [(at, at + len(sentence))] * len(known)
            else:
                encoding = self.bare(sentence)
                ids += encoding.ids
                offsets += [(at + first, at + last) for first, last in encoding.offsets]
            at += len(sentence)
        return SimpleNamespace(ids=ids, offsets=offsets)


class Documents(torch.utils.data.IterableDataset):
    """Batches of documents from the mix, without end: ids (B, T), targets (B, T), weights (B, T).

    Documents have `shortest` to T tokens. A token of padding weighs 0, of an answer ANSWER_WEIGHT, any other 1.
    """

    def __init__(self, haystack, encode, shortest, tokens, batch, seed, mix):
        self.haystack, self.encode, self.shortest, self.tokens = haystack, encode, shortest, tokens
        self.batch, self.seed, self.mix = batch, seed, mix

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{self.tokens}/{worker.id if worker else 0}")
        while True:
            ids = torch.zeros(self.batch, self.tokens + 1, dtype=torch.long)
            weights = torch.zeros(self.batch, self.tokens + 1)
            for b in range(self.batch):
                task = tasks.pick(rng, self.mix)
                length = rng.randint(self.shortest, self.tokens)
                _, doc, answer = tasks.make(task, self.haystack, length + 1, self.encode, rng)
                ids[b, :len(doc)] = torch.tensor(doc)
                weights[b, :len(doc)] = torch.tensor(answer).float() * (ANSWER_WEIGHT - 1) + 1
            yield ids[:, :-1], ids[:, 1:], weights[:, 1:]


def initialise(model):
    """Normal weights of 0.02; the two matrices that write into the residual stream smaller, by its depth."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 1 / math.sqrt(2 * model.config.num_layers) if name.endswith(("out.weight", "down.weight")) else 1
            torch.nn.init.normal_(p, std=0.02 * scale)
        else:
            torch.nn.init.ones_(p)


def token_losses(model, hidden, targets):
    """Cross-entropy of each token, (B * T)."""
    return F.cross_entropy(model.logits(hidden).flatten(0, 1).float(), targets.flatten(), reduction="none")


def train(model, haystack, encode, args):
    """The curriculum. One progress line every few seconds, a checkpoint every few minutes."""
    device, losses_of = torch.device(args.device), token_losses
    if args.compile:                                    # layers are alike, so what is compiled for one serves all
        losses_of = torch.compile(token_losses, dynamic=False)
        for layer in model.layers:
            layer.compile(dynamic=False)
    matrices, norms = ([p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    groups = [dict(params=matrices, weight_decay=args.decay), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    total, done, shown, waited = sum(steps for _, _, steps, _ in args.stages), 0, 0.0, 0.0
    started = saved = time.time()
    log = []
    for shortest, length, steps, mix in args.stages:
        micro = max(1, min(args.tokens_per_step, args.micro_tokens) // length)
        accumulate = max(1, round(args.tokens_per_step / (micro * length)))
        documents = Documents(haystack, encode, shortest, length, micro, args.seed, mix)
        data = iter(torch.utils.data.DataLoader(documents, batch_size=None, num_workers=args.workers))
        for step in range(steps):
            rate = args.lr * min(1, (done + 1) / args.warmup) * min(1, (total - done) / (0.4 * total))
            sums = torch.zeros(4, device=device)           # loss and count of prose tokens, of answer tokens
            for _ in range(accumulate):
                asked = time.time()
                ids, targets, weights = (x.to(device, non_blocking=True) for x in next(data))
                waited += time.time() - asked
                with torch.autocast(device.type, torch.bfloat16):
                    losses = losses_of(model, model(ids), targets)
                w = weights.flatten()
                (losses * w).sum().div(w.sum() * accumulate).backward()
                with torch.no_grad():
                    sums += torch.stack([(losses * (w == 1)).sum(), (w == 1).sum(),
                                         (losses * (w > 1)).sum(), (w > 1).sum()])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            if time.time() - shown > args.log_seconds or step == steps - 1:
                shown, s = time.time(), sums.tolist()
                left = (shown - started) / done * (total - done)
                log.append(dict(step=done, length=length, prose=s[0] / max(s[1], 1), answers=s[2] / max(s[3], 1),
                                seconds=round(shown - started)))
                say(f"step {done}/{total}  T {length}  loss {log[-1]['prose']:.3f}  answers {log[-1]['answers']:.3f}"
                    f"  lr {rate:.1e}  {shown - started:.0f} s ({waited:.0f} for documents), {left:.0f} s left")
            if time.time() - saved > 300:
                saved = time.time()
                save(model, args.out, log)
    return log


def save(model, folder, log):
    """A folder in Hugging Face layout: the stacked matrices apart again, in bf16; each file renamed into place."""
    c, params = model.config, dict(model.named_parameters())
    tensors = {("" if name.startswith("lm_head") else "model.") + name:
               params[ours][start:stop].detach().to("cpu", torch.bfloat16).contiguous().clone()
               for name, (ours, start, stop) in checkpoint_names(c).items()}
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=c.vocab_size,
                  hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers,
                  num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
                  hidden_act="silu", rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_positions,
                  rope_theta=c.rope_theta, tie_word_embeddings=c.tied, torch_dtype="bfloat16", bos_token_id=0,
                  eos_token_id=1)
    template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}" + END +
                "{% else %}{{ '' if loop.first else '\n\n' }}{{ m.content }}{% endif %}{% endfor %}")
    write(folder, "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    for name, value in (("config.json", config), ("generation_config.json", dict(bos_token_id=0, eos_token_id=1)),
                        ("tokenizer_config.json", dict(bos_token=BEGIN, eos_token=END, chat_template=template)),
                        ("training_log.json", log)):
        write(folder, name, lambda path: Path(path).write_text(json.dumps(value, indent=1) + "\n"))


def write(folder, name, writer):
    temporary = os.path.join(folder, name + ".part")
    writer(temporary)
    os.replace(temporary, os.path.join(folder, name))


def read_books(folder, held_out):
    paths = sorted(p for p in Path(folder).rglob("*.txt") if held_out not in p.name)
    if not paths:
        raise UserError(f"{folder}: no *.txt in it")
    return {p.name: p.read_text(encoding="utf-8") for p in paths}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="folder of .txt files (all but the held-out one are used)")
    parser.add_argument("--hold-out", default="the-moonstone", help="files with this in their name are left out")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent))
    parser.add_argument("--start", metavar="FOLDER", help="weights to go on from, instead of random ones")
    parser.add_argument("--stages", help="length:steps or length:steps:mix, ...; length may be a range", default=(
        "256:500:back,256:1500,1024:1300,4096:3500,8192:500:copying,4096:1500:copying"))
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--micro-tokens", type=int, default=65536, help="tokens that go through the model at once")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--decay", type=float, default=0.6, help="of the matrices, as AdamW counts it: times the rate")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    stages = [stage.split(":") for stage in args.stages.split(",")]
    args.stages = [(int(length.split("-")[0]), int(length.split("-")[-1]), int(steps), *(mix or ["all"]))
                   for length, steps, *mix in stages]
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)

    books = read_books(args.text, args.hold_out)
    say(f"{len(books)} books, {sum(map(len, books.values())) / 1e6:.1f} M characters")
    path = os.path.join(args.start or args.out, "tokenizer.json")
    config = Config(rope_theta=1e5, num_layers=args.layers, max_positions=max(t for _, t, *_ in args.stages))
    if args.start or os.path.exists(path):
        tokenizer = Tokenizer.from_file(path)
    else:
        tokenizer = train_tokenizer(books.values(), config.vocab_size)
    write(args.out, "tokenizer.json", lambda p: tokenizer.save(p))
    haystack = tasks.Haystack("\n\n".join(books.values()))

    if args.start:
        model = Llama.from_pretrained(args.start, args.device, torch.float32).train().requires_grad_(True)
        model.config = replace(model.config, max_positions=max(model.config.max_positions, config.max_positions))
    else:
        model = Llama(config).to(args.device)
        initialise(model)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {args.device}")

    log = train(model, haystack, Sentences(tokenizer, haystack), args)
    save(model, args.out, log)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        say(f"make.py: {e}")
        sys.exit(2)
