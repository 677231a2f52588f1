"""How the bundled model was made: tokenizer, curriculum, weights. All four runs took a quarter of
an hour on a GPU.

    python tiny/make.py --text BOOKS --out RUN --compile
    python tiny/make.py --text BOOKS --out RUN --start RUN --stages 4096:3000:passages \\
        --lr 1e-3 --warmup 100 --seed 1 --compile
    ...     README.md in this folder has all the commands

The model learns retrieval in short documents first and then in longer ones: the curriculum is a
list of stages, each a length and a number of steps, and the first and the last have more to look
back for. A model that only meets documents of one length comes to expect it, so the lengths of the
last run are random (512-8192:4000:passages). The novels are little text for this many steps: a
weight decay of six times the usual keeps the model from learning them by heart. The gates come
afterwards, from train.py.
"""
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
from common import Parser, UserError, replacing, run_program, say, write_text       # noqa: E402
from model import Config, Llama, checkpoint_names                                   # noqa: E402
from tiny import tasks                                                              # noqa: E402

BEGIN, END = "<|begin|>", tasks.END
ANSWER_WEIGHT = 5.0         # a token of an answer counts as much in the loss as five others


# -------------------------------------------------------------------------------- text and samples

def train_tokenizer(texts, vocab_size):
    """Byte-level BPE in which every digit is a token of its own.

    Every text begins with BEGIN: a place for attention to rest on (an attention sink).
    """
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    return tokenizer


class Sentences:
    """encode(text) for documents from a haystack: it looks its sentences up.

    That is four times as fast and gives the same ids, because no token of our tokenizer crosses
    from a full stop to the space before the next word: the ids of a text are those of its sentences
    in a row. All tokens of a known sentence have the offsets of the whole sentence. That is enough:
    a sentence lies in an answer, or outside.
    """
    seam = re.compile(r"(?<=[a-z]{2}[.!?])(?= [A-Z])")

    def __init__(self, tokenizer, haystack):
        self.encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.begin = tokenizer.token_to_id(BEGIN)
        self.known = {}                             # sentence -> ids, of 16 bits to save memory
        sentences = self.seam.split(haystack.text)
        for n in range(0, len(sentences), 10000):
            some = sentences[n:n + 10000]
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
            for sentence, encoding in zip(some, encodings):
                self.known[sentence] = array("H", encoding.ids)

    def __call__(self, text):
        ids = [self.begin]
        offsets = [(0, 0)]
        start = 0
        for sentence in self.seam.split(text):
            end = start + len(sentence)
            known = self.known.get(sentence)
            if known:
                ids.extend(known)
                offsets += [(start, end)] * len(known)
            else:
                encoding = self.encode(sentence)
                ids += encoding.ids
                offsets += [(start + first, start + last) for first, last in encoding.offsets]
            start = end
        return SimpleNamespace(ids=ids, offsets=offsets)


class Documents(torch.utils.data.IterableDataset):
    """Batches of documents of a mix, without end: ids (B, T), targets (B, T), weights (B, T).

    Documents have `shortest` to T tokens. Padding weighs 0, an answer's token ANSWER_WEIGHT, any
    other token 1.
    """

    def __init__(self, haystack, encode, shortest, tokens, batch, seed, mix):
        self.haystack = haystack
        self.encode = encode
        self.shortest = shortest
        self.tokens = tokens
        self.batch = batch
        self.seed = seed
        self.mix = mix

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{self.tokens}/{worker.id if worker else 0}")
        while True:
            # One token more than T: the targets are the ids, moved by one.
            ids = torch.zeros(self.batch, self.tokens + 1, dtype=torch.long)
            weights = torch.zeros(self.batch, self.tokens + 1)
            for b in range(self.batch):
                task = tasks.pick(rng, self.mix)
                length = rng.randint(self.shortest, self.tokens)
                _, document, in_answer = tasks.make(task, self.haystack, length + 1, self.encode,
                                                    rng)
                n = len(document)
                ids[b, :n] = torch.tensor(document)
                weights[b, :n] = torch.tensor(in_answer).float() * (ANSWER_WEIGHT - 1) + 1
            yield ids[:, :-1], ids[:, 1:], weights[:, 1:]


# ---------------------------------------------------------------------------------------- training

def initialise(model):
    """Normal weights of 0.02. The two matrices that write into the residual stream get less, by
    the number of layers, so that the stream does not grow with depth."""
    for name, p in model.named_parameters():
        if p.dim() != 2:
            torch.nn.init.ones_(p)
            continue
        scale = 1
        if name.endswith(("out.weight", "down.weight")):
            scale = 1 / math.sqrt(2 * model.config.num_layers)
        torch.nn.init.normal_(p, std=0.02 * scale)


def token_losses(model, hidden, targets):
    """Cross-entropy of each token, (B * T)."""
    logits = model.logits(hidden).flatten(0, 1).float()                 # (B * T, vocab_size)
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


def make_optimizer(model, args):
    """AdamW: weight decay is for the matrices, not for the norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    groups = [dict(params=matrices, weight_decay=args.decay), dict(params=norms, weight_decay=0.0)]
    on_gpu = torch.device(args.device).type == "cuda"
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), fused=on_gpu)


def train(model, haystack, encode, args):
    """The curriculum. A line every few seconds, a checkpoint every few minutes; returns the log."""
    device = torch.device(args.device)
    losses_of = token_losses
    if args.compile:                # layers are alike: what is compiled for one serves all
        losses_of = torch.compile(token_losses, dynamic=False)
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizer = make_optimizer(model, args)

    total = sum(steps for _, _, steps, _ in args.stages)
    done = 0
    shown = 0.0                     # time of the last line
    waited = 0.0                    # seconds for documents
    started = saved = time.time()
    log = []
    for shortest, length, steps, mix in args.stages:
        # A step's gradients add up over micro-batches, as many documents as fit at once.
        micro = max(1, min(args.tokens_per_step, args.micro_tokens) // length)
        accumulate = max(1, round(args.tokens_per_step / (micro * length)))
        documents = Documents(haystack, encode, shortest, length, micro, args.seed, mix)
        data = iter(torch.utils.data.DataLoader(documents, batch_size=None,
                                                num_workers=args.workers))
        for step in range(steps):
            sums = torch.zeros(4, device=device)    # loss and count of prose, and of answer tokens
            for _ in range(accumulate):
                asked = time.time()
                batch = [t.to(device, non_blocking=True) for t in next(data)]
                waited += time.time() - asked
                sums += backward(model, losses_of, batch, accumulate)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # A linear warmup; a linear decay to 0 in the last 40% of all steps.
            lr = args.lr * min(1, (done + 1) / args.warmup) * min(1, (total - done) / (0.4 * total))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1

            if time.time() - shown > args.log_seconds or step == steps - 1:
                shown = time.time()
                seconds = shown - started
                prose, prose_tokens, answers, answer_tokens = sums.tolist()
                log.append(dict(step=done, length=length, prose=prose / max(prose_tokens, 1),
                                answers=answers / max(answer_tokens, 1), seconds=round(seconds)))
                say(f"step {done}/{total}  T {length}  loss {log[-1]['prose']:.3f}  "
                    f"answers {log[-1]['answers']:.3f}  lr {lr:.1e}  {seconds:.0f} s "
                    f"({waited:.0f} for documents), {seconds / done * (total - done):.0f} s left")
            if time.time() - saved > 300:
                saved = time.time()
                save(model, args.out, log)
    return log


def backward(model, losses_of, batch, accumulate):
    """Add a micro-batch's gradients; returns loss and count of its prose and its answer tokens."""
    ids, targets, weights = batch                                       # each (B, T)
    with torch.autocast(ids.device.type, torch.bfloat16):
        losses = losses_of(model, model(ids), targets)                  # (B * T)
    w = weights.flatten()
    (losses * w).sum().div(w.sum() * accumulate).backward()
    with torch.no_grad():
        prose = w == 1
        answer = w > 1
        return torch.stack([(losses * prose).sum(), prose.sum(),
                            (losses * answer).sum(), answer.sum()])


# ---------------------------------------------------------------------------------------- the files

def save(model, folder, log):
    """Write a folder in Hugging Face layout, in bf16; stacked matrices become several again."""
    c = model.config
    params = dict(model.named_parameters())
    tensors = {}
    for name, (ours, start, stop) in checkpoint_names(c).items():
        prefix = "" if name.startswith("lm_head") else "model."
        rows = params[ours][start:stop].detach().to("cpu", torch.bfloat16)
        tensors[prefix + name] = rows.contiguous().clone()
    with replacing(os.path.join(folder, "model.safetensors")) as part:
        save_file(tensors, part, metadata={"format": "pt"})

    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=c.vocab_size,
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, hidden_act="silu",
        rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_positions, rope_theta=c.rope_theta,
        tie_word_embeddings=c.tied, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} "
                "{{ m.content }}" + END + "{% else %}{{ '' if loop.first else '\n\n' }}"
                "{{ m.content }}{% endif %}{% endfor %}")
    files = {
        "config.json": config,
        "generation_config.json": dict(bos_token_id=0, eos_token_id=1),
        "tokenizer_config.json": dict(bos_token=BEGIN, eos_token=END, chat_template=template),
        "training_log.json": log,
    }
    for name, value in files.items():
        write_text(os.path.join(folder, name), json.dumps(value, indent=1) + "\n")


def read_books(folder, held_out):
    """{file name: text} of the .txt files in a folder, but for the held-out book."""
    paths = sorted(path for path in Path(folder).rglob("*.txt") if held_out not in path.name)
    if not paths:
        raise UserError(f"{folder}: no *.txt in it")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def parse_stages(text):
    """[(shortest, length, steps, mix)] from "256:500:back,512-8192:4000"."""
    stages = []
    for stage in text.split(","):
        lengths, steps, *mix = stage.split(":")
        shortest, _, longest = lengths.partition("-")
        [mix] = mix or ["all"]
        stages.append((int(shortest), int(longest or shortest), int(steps), mix))
    return stages


def parse(argv):
    parser = Parser(description=__doc__)
    option = parser.add_argument
    option("--text", required=True,
           help="folder of .txt files (all but the held-out one are used)")
    option("--hold-out", default="the-moonstone", help="leave out files with this in their name")
    option("--out", default=str(Path(__file__).resolve().parent))
    option("--start", metavar="FOLDER", help="weights to start from, instead of random ones")
    option("--stages", type=parse_stages, help="length:steps or length:steps:mix, ...; a length "
           "may be a range", default="256:500:back,256:1500,1024:1300,4096:3500,8192:500:copying,"
           "4096:1500:copying")
    option("--tokens-per-step", type=int, default=65536)
    option("--micro-tokens", type=int, default=65536, help="tokens in a micro-batch")
    option("--lr", type=float, default=3e-3)
    option("--warmup", type=int, default=200)
    option("--decay", type=float, default=0.6, help="weight decay of the matrices")
    option("--layers", type=int, default=8)
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    option("--compile", action="store_true")
    option("--log-seconds", type=float, default=10)
    option("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)

    books = read_books(args.text, args.hold_out)
    say(f"{len(books)} books, {sum(map(len, books.values())) / 1e6:.1f} M characters")
    longest = max(length for _, length, _, _ in args.stages)
    config = Config(rope_theta=1e5, num_layers=args.layers, max_positions=longest)
    path = os.path.join(args.start or args.out, "tokenizer.json")
    if args.start or os.path.exists(path):
        tokenizer = Tokenizer.from_file(path)
    else:
        tokenizer = train_tokenizer(books.values(), config.vocab_size)
    write_text(os.path.join(args.out, "tokenizer.json"), tokenizer.to_str(pretty=True))
    haystack = tasks.Haystack("\n\n".join(books.values()))

    if args.start:
        model = Llama.from_pretrained(args.start, args.device, torch.float32)
        model.train().requires_grad_(True)
        positions = max(model.config.max_positions, config.max_positions)
        model.config = replace(model.config, max_positions=positions)
    else:
        model = Llama(config).to(args.device)
        initialise(model)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters / 1e6:.2f} M parameters on {args.device}")

    log = train(model, haystack, Sentences(tokenizer, haystack), args)
    save(model, args.out, log)


if __name__ == "__main__":
    sys.exit(run_program(main))
