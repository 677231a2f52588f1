"""Do other recipes train better gates than the paper's, at equal bytes kept?

    python experiments/recipes.py --model FOLDER --books BOOKS --data BOOK --way paper --lam 0.16
        train gates on BOOKS, test them on BOOK, beside full attention
    python experiments/recipes.py ... --way repeat first4 --lam 0.16 0.64 --json repeat.json
        two other ways with two lambdas each, and the rows in a file
    python experiments/recipes.py ... --evaluate-only A.safetensors B.safetensors
        no training: gates that are there already

Each way changes one thing in the paper's recipe (train.py), so that it can be judged alone:

    paper           nothing
    repeat          half of the samples ask the model to repeat a text
    target          the price of a token that is kept is the same in short and in long texts
    target-inverse  the opposite: the longer the text, the cheaper
    lambdas         each sample has a lambda of its own, at random around --lam
    hard-concrete   noisy gates that can be exactly 0 or 1 in training
    future          for the first third of the steps, gates learn to predict what will be attended
    first4          the first four tokens are always admitted
    hidden          the gate sees the layer's hidden state and not the key

Several at once: --way repeat+target.

The bundled model learns from tasks that are hidden in BOOKS and is tested on such tasks. Any other
is taken for a chat model: it learns from BOOKS as they are, and is tested on prose and on needles
(chat.py). Gates stay in --work, and are not trained again; rows stay in --json.
"""
import contextlib
import functools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench                                                                    # noqa: E402
import files                                                                    # noqa: E402
import train                                                                    # noqa: E402
from common import (Parser, UserError, model_options, peak_bytes,               # noqa: E402
                    progress, real, run_program, say, whole)
from experiments import chat, quality                                           # noqa: E402
from generate import load_model                                                 # noqa: E402
from model import CausalAttention, open_tensors, rotate                         # noqa: E402
from tokenizer import Text                                                      # noqa: E402
from wgkv import SINKS, Gates, sparsity_loss                                    # noqa: E402


# ------------------------------------------------------------------------------------ other gates

class FirstFourGates(Gates):
    """first4: the first tokens of a text are admitted, in training and at inference.

    Nearly every head attends to them (attention sinks), whatever they say. If they are a matter of
    course, a gate need not learn it.
    """
    stacked = None              # decode, too, asks `gate`

    def gate(self, layer, k, k_rotated, positions):
        g = super().gate(layer, k, k_rotated, positions)                        # (B, Hkv, T)
        return torch.where(positions[:, None] < SINKS, 1.0, g)


class HardConcreteGates(Gates):
    """hard-concrete: gates of Louizos, Welling, Kingma, "L0 regularization" (arXiv 1712.01312).

        s = sigmoid((logit + noise) / TEMPERATURE)          noise: logistic, new in each pass
        g = s stretched from (0, 1) to (LOW, HIGH), then clipped to [0, 1]

    In training a gate is thus exactly 0 or exactly 1 most of the time: the student learns with keys
    that are gone or there, as at inference. The sparsity loss charges the probability of g > 0
    (`l0_loss`). At inference there is neither noise nor temperature:

        g = sigmoid(logit) stretched and clipped >= tau     <=>     sigmoid(logit) >= tau',
        tau' = (tau - LOW) / (HIGH - LOW)

    So what we save is an ordinary file of gates, with tau' as its tau: 0.167 for 0.1.
    """
    # These three are that paper's.
    TEMPERATURE = 2 / 3
    LOW = -0.1
    HIGH = 1.1

    @classmethod
    def for_model(cls, model, tau, **settings):
        moved = (tau - cls.LOW) / (cls.HIGH - cls.LOW)
        gates = super().for_model(model, tau=moved, **settings)
        gates.p_open = {}       # layer -> P(g > 0) (B, Hkv, T), of the last forward pass
        return gates

    def gate(self, layer, k, k_rotated, positions):
        p = super().gate(layer, k, k_rotated, positions)                        # (B, Hkv, T)
        if not self.training:
            return p
        logit = torch.logit(p, eps=1e-6)
        # -1.6: with this logit a gate is open half of the time.
        shift = self.TEMPERATURE * math.log(-self.LOW / self.HIGH)
        # Checkpointing runs a layer again: the first run's values stay. torch gives the rerun the
        # same random numbers, so both have the same noise.
        self.p_open.setdefault(layer, (logit - shift).sigmoid())
        noise = torch.logit(torch.rand_like(logit), eps=1e-6)
        s = ((logit + noise) / self.TEMPERATURE).sigmoid()
        return (s * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)


class HiddenGate(nn.Module):
    """A wgkv.Gate with another input: the hidden state that q, k and v are made of."""

    def __init__(self, Hkv, D, expansion, hidden_size):
        super().__init__()
        width = round(expansion * D)
        self.input_norm = nn.Parameter(torch.ones(hidden_size))
        self.w1 = nn.Parameter(torch.empty(Hkv, width, hidden_size))
        self.b1 = nn.Parameter(torch.empty(Hkv, width))
        self.w2 = nn.Parameter(torch.empty(Hkv, width))
        self.b2 = nn.Parameter(torch.empty(Hkv))
        for p, fan_in in ((self.w1, hidden_size), (self.b1, hidden_size), (self.w2, width),
                          (self.b2, width)):
            nn.init.uniform_(p, -fan_in ** -0.5, fan_in ** -0.5)

    def forward(self, hidden):
        """hidden (B, T, hidden_size) -> g (B, Hkv, T) fp32."""
        B, T, C = hidden.shape
        Hkv = len(self.w1)
        x = F.rms_norm(hidden.float(), (C,), eps=1e-6) * self.input_norm
        x = x.reshape(B * T, C).expand(Hkv, -1, -1)                             # (Hkv, B * T, C)
        h = F.gelu(torch.baddbmm(self.b1[:, None], x, self.w1.transpose(1, 2)))
        g = torch.baddbmm(self.b2[:, None, None], h, self.w2[:, :, None])       # (Hkv, B * T, 1)
        return g.float().sigmoid().view(Hkv, B, T).transpose(0, 1)


class HiddenGates(Gates):
    """hidden: the gate sees the layer's input, normalized: it knows what the key left out.

    A policy is only asked about keys. So each layer's qkv projection hands us its input, just
    before the layer asks for gates. W1 has hidden_size columns instead of 2 D.
    """
    stacked = None

    def __init__(self, L, Hkv, D, *, hidden_size, **settings):
        super().__init__(L, Hkv, D, **settings)
        self.layers = nn.ModuleList(HiddenGate(Hkv, D, self.expansion, hidden_size)
                                    for _ in range(L))

    @classmethod
    def for_model(cls, model, **settings):
        return super().for_model(model, hidden_size=model.config.hidden_size,
                                 **settings).watch(model)

    @classmethod
    def load(cls, path, model):
        make = functools.partial(cls, hidden_size=model.config.hidden_size)
        return files.load_gates(make, path, model).watch(model)

    def watch(self, model):
        self.hidden = {}                                    # layer -> (B, T, hidden_size)
        for number, layer in enumerate(model.layers):
            layer.qkv.register_forward_pre_hook(functools.partial(self.take, number))
        return self

    def take(self, layer, qkv, inputs):
        [self.hidden[layer]] = inputs

    def gate(self, layer, k, k_rotated, positions):
        return self.layers[layer](self.hidden.pop(layer))


# ------------------------------------------------------------------------------------ other samples

# The request stands after the text. Before it, every key could know that it will be needed, and
# gates would learn to keep a text if they are told to.
REQUEST = "\n\nRepeat the text above, word for word."
# The bundled model has learned to copy on this one (tiny/tasks.py).
BUNDLED_TURN = ("The passage:", "\n\nWhat was the passage? The passage:")

FIRST_COPY_WEIGHT = 0.1     # of a token of the first copy in the distillation loss; others have 1


def repeat_samples(passages, text, bundled):
    """Samples of a text, a request to repeat it, and the text again.

    passages: the samples of `train.text_samples`, from which the text is taken. The first copy
    teaches what plain samples teach, so it weighs little: the loss is about the second.
    """
    if bundled:
        before, after = BUNDLED_TURN
    else:
        turn = text.insert(train.PLACEHOLDER + REQUEST, replies=0)
        before, _, after = turn.partition(train.PLACEHOLDER)
    head = torch.tensor(text.encode(before), dtype=torch.int32)
    tail = torch.tensor(text.encode(after, begin=False), dtype=torch.int32)

    def sample_repeat(rng, length):
        size = (length - len(head) - len(tail)) // 2
        if size < 1:
            raise UserError(f"a text and its copy do not fit into {length} tokens: raise --seq-len")
        ids, _ = passages(rng, size + len(text.begin))
        passage = ids[len(text.begin):]                                         # (size,)
        ids = torch.cat((head, passage, tail, passage))
        weights = torch.ones(len(ids))
        weights[len(head):len(head) + size] = FIRST_COPY_WEIGHT
        return ids, weights

    return sample_repeat


def first_copy(weights):
    """(first, count) of the tokens of the first copy in a sample of `repeat_samples`."""
    light = (weights < 1).nonzero()[:, 0]
    return int(light[0]), len(light)


class WaySamples:
    """As train.Samples, and a way's share of them are texts to be repeated.

    repeated: None if the way has no use for it. In its early steps a way has nothing but repeats.
    """

    def __init__(self, plain, repeated, way, config):
        self.early = train.Samples(functools.partial(draw, plain, repeated, 1.0), config)
        self.usual = train.Samples(functools.partial(draw, plain, repeated, way.repeats), config)
        self.schedule = self.usual.schedule
        self.way = way
        self.config = config

    def __getitem__(self, step):
        if self.way.is_early(step, self.config):
            return self.early[step]
        return self.usual[step]


def draw(plain, repeated, share, rng, length):
    """A sample that with probability `share` is a text to be repeated."""
    # Without repeats rng is left alone: `paper` has the samples that train.py has.
    if share > 0 and rng.random() < share:
        return repeated(rng, length)
    return plain(rng, length)


# -------------------------------------------------------------------------------- prices of memory
# A price is the lambda of one sample: (config, number of the sample, its length) -> float.

def fixed_price(config, number, length):
    return config.lam


def price_by_length(config, number, length):
    """target: lambda * length / T0, where T0 is the mean of --seq-len.

    With K tokens kept of T the paper's loss is D + lambda K / T: one token more costs lambda / T,
    in a text of 8,192 a quarter of what it costs in one of 2,048. But memory is paid by the token.
    This is D + lambda K / T0: the pressure is on the number K, and a token costs the same
    everywhere. All lengths have equally many steps, so on average lambda is what it was.

    (D is a mean over T tokens: an error at one token, as of a needle's answer, counts 1 / T in it.
    In the paper's form the price falls with T in the same way. Here it does not, so in a long text
    a key must save more error to be kept.)
    """
    return config.lam * length / statistics.mean(config.seq_len)


def inverse_price_by_length(config, number, length):
    """target-inverse: lambda * T0 / length, with T0 such that the mean is lambda again.

    In a long text a key that is needed once need not save much to be kept.
    """
    return config.lam / length / statistics.mean(1 / n for n in config.seq_len)


def random_price(config, number, length):
    """lambdas: log-uniform from lambda / 4 to 4 lambda, by the sample's number. Nobody is told.

    The mean is 1.35 lambda, the median lambda.
    """
    exponent = random.Random(f"{config.seed}/lambda/{number}").uniform(-1, 1)
    return config.lam * 4 ** exponent


# ------------------------------------------------------------------------------------------- losses
# A loss: (model, gates, config, way, samples, their numbers, what layers keep)
# -> (what is trained, a mean over the samples; figures to show).

def distillation(model, gates, config, way, samples, numbers, keep):
    """The paper's loss, with the way's own prices and sizes."""
    gates.p_open = {}                       # only hard-concrete gates have a use for it
    losses = train.distill(model, gates, samples, keep)
    sizes = torch.stack(way.sizes(gates, losses.gates))                         # (samples,)
    prices = [way.price(config, number, len(ids)) for number, (ids, _) in zip(numbers, samples)]
    loss = losses.distill + (torch.tensor(prices, device=sizes.device) * sizes).mean()
    return loss, dict(distill_loss=losses.distill.item(), sparsity_loss=sizes.mean().item())


def expected_sizes(gates, g):
    """The sparsity loss of each sample. g: its gates (L, Hkv, T)."""
    return [sparsity_loss(one, gates.window) for one in g]


def l0_sizes(gates, g):
    """The same for hard-concrete gates: by P(g > 0), since noise has pushed g to 0 or 1 already."""
    layers = [gates.p_open[layer] for layer in sorted(gates.p_open)]
    p = torch.stack(layers, dim=1)                                              # (B, L, Hkv, T)
    return [l0_loss(p_of_one[..., :one.shape[-1]], gates.window) for p_of_one, one in zip(p, g)]


def l0_loss(p, window):
    """wgkv.sparsity_loss with the probability p (..., T) that a gate is open, as in L0.

    There the curve 1 - (1 - g)^2 drives gates to their ends. Here they get there by themselves, and
    p is the expected number of keys as it is.
    """
    T = p.shape[-1]
    in_window = (window / torch.arange(T, 0, -1, device=p.device)).clamp(max=1.0)       # (T)
    return (in_window + (1 - in_window) * p).mean()


# The share of the keys, over all heads and layers of a sample, that `future` wants open. Some heads
# then keep nearly all and others nothing, as with KVzip's budgets. It is only where distillation
# begins: from there lambda decides.
FUTURE_SHARE = 0.2


def prediction(model, gates, config, way, samples, numbers, keep):
    """future: binary cross-entropy of gates with KVzip's choice (arXiv 2505.23416).

    The model with full attention repeats a text. What counts for a key of the first copy is the
    largest attention that it gets meanwhile. No gradient goes through the model, so a step costs
    less than one of distillation.
    """
    ids = pad_sequence([ids for ids, _ in samples], batch_first=True).to(model.device).long()
    copies = [(*first_copy(weights), len(ids)) for ids, weights in samples]
    attention = FutureAttention(gates, model.device, copies)
    with (torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"),
          torch.no_grad()):
        model(ids, attention)

    losses = []
    for n in range(len(samples)):
        g = torch.stack([of_layer[n] for of_layer in attention.g])              # (L, Hkv, count)
        attended = torch.stack([of_layer[n] for of_layer in attention.attended])
        target = largest_share(attended, FUTURE_SHARE)
        losses.append(F.binary_cross_entropy(g.float(), target))
    loss = torch.stack(losses).mean()
    return loss, dict(cross_entropy=loss.item())


def largest_share(values, share):
    """1 where a value is among the largest `share` of all, else 0."""
    count = max(1, round(share * values.numel()))
    least = values.flatten().topk(count).values[-1]
    return (values >= least).float()


class FutureAttention(CausalAttention):
    """Full attention. It asks the gates about the first copy, and records what will be attended.

    copies: (first, count, length) of each sample, see `first_copy`. After a forward pass g and
    attended have for each layer a list, for each sample (Hkv, count).
    """

    def __init__(self, gates, device, copies):
        super().__init__(device)
        self.gates = gates
        self.copies = copies
        self.g = []
        self.attended = []

    def attend(self, layer, q, k, v, cos, sin):
        q_rotated = rotate(q, cos, sin)
        k_rotated = rotate(k, cos, sin)
        positions = torch.arange(k.shape[2], device=k.device)[None]
        with torch.enable_grad():           # for the gates alone: their input has no graph
            g = self.gates.gate(layer, k, k_rotated, positions)                 # (B, Hkv, T)
        self.g.append([])
        self.attended.append([])
        for b, (first, count, length) in enumerate(self.copies):
            self.g[-1].append(g[b, :, first:first + count])
            self.attended[-1].append(largest_attention(
                q_rotated[b, :, :length], k_rotated[b, :, :length], first, count))
        return super().attend(layer, q, k, v, cos, sin)


def largest_attention(q, k, first, count, block=512):
    """The largest attention (Hkv, count) that `count` keys get from the last `count` queries.

    q (Hq, T, D) and k (Hkv, T, D) of one sample, after RoPE; the maximum is also over the group. By
    blocks of queries, so that only one block's scores exist at a time.
    """
    Hkv, T, D = k.shape
    q = q.reshape(Hkv, -1, T, D)                                                # (Hkv, G, T, D)
    largest = torch.zeros(Hkv, count, device=k.device)
    for t0 in range(T - count, T, block):
        t1 = min(t0 + block, T)
        scores = q[:, :, t0:t1] @ k[:, None, :t1].transpose(-1, -2)             # (Hkv, G, n, t1)
        i = torch.arange(t0, t1, device=k.device)[:, None]
        j = torch.arange(t1, device=k.device)
        scores = (scores.float() / math.sqrt(D)).masked_fill_(j > i, -math.inf)
        weights = scores.softmax(dim=-1)[..., first:first + count]
        largest = largest.maximum(weights.amax(dim=(1, 2)))
    return largest


# ----------------------------------------------------------------------------------------- the ways

@dataclass(frozen=True)
class Way:
    """What differs from the paper's recipe."""
    gates: type = Gates
    price: Callable = fixed_price
    sizes: Callable = expected_sizes
    repeats: float = 0.0                    # share of the samples that repeat a text
    early_loss: Callable = None             # for the first third of the steps, which all repeat

    def is_early(self, step, config):
        return self.early_loss is not None and step < config.steps // 3

    def loss(self, step, config):
        return self.early_loss if self.is_early(step, config) else distillation

    def needs_repeats(self):
        return self.repeats > 0 or self.early_loss is not None


WAYS = {
    "paper": Way(),
    "repeat": Way(repeats=0.5),
    "target": Way(price=price_by_length),
    "target-inverse": Way(price=inverse_price_by_length),
    "lambdas": Way(price=random_price),
    "hard-concrete": Way(gates=HardConcreteGates, sizes=l0_sizes),
    "future": Way(early_loss=prediction),
    "first4": Way(gates=FirstFourGates),
    "hidden": Way(gates=HiddenGates),
}


def way_named(name):
    """One of WAYS, or several of them at once: "repeat+target"."""
    changes = {}
    for part in name.split("+"):
        if part not in WAYS:
            raise UserError(f"there is no way called {part}; there are {', '.join(WAYS)}")
        for field in fields(Way):
            value = getattr(WAYS[part], field.name)
            if value == field.default:
                continue
            if field.name in changes:
                raise UserError(f"{name}: {part} and another of these ways change the same thing, "
                                f"{field.name}")
            changes[field.name] = value
    return Way(**changes)


# ----------------------------------------------------------------------------------------- training

MICRO_BATCH_BYTES = 20 * 2**30      # by train.py's estimate: several processes can share a GPU


def train_gates(model, way, config, samples):
    """Gates of a way, trained: train.train for one process, with the way's loss."""
    torch.manual_seed(config.seed)
    gates = way.gates.for_model(model, window=config.window, tau=config.tau,
                                expansion=config.expansion)
    optimizer = torch.optim.AdamW(gates.parameters(), config.lr, weight_decay=config.weight_decay)
    plan = micro_batches(model, gates, config)
    batches = DataLoader(samples, batch_size=None, num_workers=train.num_workers(model.device),
                         sampler=range(config.steps), worker_init_fn=train.ignore_signals)
    tokens = [length * count for length, _, count in samples.schedule]
    with progress(sum(tokens), "training", "tokens", delay=0) as bar:
        for step, batch in enumerate(batches):
            length, first, _ = samples.schedule[step]
            figures = add_gradients(model, gates, config, way, step, batch, first, plan[length])
            gradients = [p.grad for p in gates.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(norm):
                raise UserError(f"step {step + 1}: the gradient is not finite; a lower --lr than "
                                f"{config.lr:g} may help")
            optimizer.param_groups[0]["lr"] = train.learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            status = ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in figures.items())
            bar.set_postfix_str(status, refresh=False)
            bar.update(tokens[step])
            # Without a terminal there is no bar: ten lines in all show that the run is alive.
            if bar.disable and (step + 1) * 10 // config.steps > step * 10 // config.steps:
                say(f"step {step + 1}/{config.steps}: {status}")
    return gates.eval().requires_grad_(False)


def add_gradients(model, gates, config, way, step, batch, first, micro_batch):
    """Add the gradients of a step's batch to the gates; returns means to show.

    first: the number of the batch's first sample.
    """
    size, keep = micro_batch
    loss_of = way.loss(step, config)
    sums = {}
    for start in range(0, len(batch), size):
        samples = batch[start:start + size]
        train.check_vocabulary(model, samples)
        numbers = range(first + start, first + start + len(samples))
        loss, figures = loss_of(model, gates, config, way, samples, numbers, keep)
        share = len(samples) / len(batch)
        (loss * share).backward()
        for name, mean in figures.items():
            sums[name] = sums.get(name, 0.0) + mean * share
    return sums


def micro_batches(model, gates, config):
    """train.plan_micro_batches within MICRO_BATCH_BYTES, as far as fewer samples at once help."""
    plan, estimate = train.plan_micro_batches(model, gates, config)
    for length, (count, keep) in plan.items():
        while count > 1 and (train.training_bytes(model, gates, count * length, keep)
                             > MICRO_BATCH_BYTES):
            count -= 1
        plan[length] = (count, keep)
    say(f"{estimate}; samples at once: "
        + ", ".join(f"{count} of {length:,}" for length, (count, _) in plan.items()))
    return plan


# --------------------------------------------------------------------------------------- evaluation

# (task, tokens): each group is a table.
CHAT_TESTS = [[("prose", 4096), ("prose", 8192), ("needle", 1024), ("needle", 2048)]]
BUNDLED_TESTS = [[(task, tokens) for task in ("facts", "classes", "copy", "prose")]
                 for tokens in (4096, 8192)]


class Comparison:
    """What all ways share: texts, gates that are trained or in --work, and rows of results."""

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.text = Text(args.model)
        self.bundled = train.is_bundled(args)
        self.tables = BUNDLED_TESTS if self.bundled else CHAT_TESTS
        settings = dict(program="recipes", model=model.name, weights=files.fingerprint(model),
                        dtype=str(model.dtype).removeprefix("torch."), seed=args.seed,
                        cases=args.cases, data=quality.identity(args.data))
        origin = bench.machine(model.device)
        origin["command"] = " ".join(["python", "experiments/recipes.py", *sys.argv[1:]])
        origin["date"] = time.strftime("%Y-%m-%d")
        self.results = quality.Results(args.json, settings, origin)

    # ---- gates

    def trained(self, name, lam):
        """The path of the gates of a way, trained now if they are not there yet."""
        way = way_named(name)
        config = training_config(self.args, self.model, lam)
        facts = (files.fingerprint(self.model), self.model.dtype, name, asdict(config),
                 self.books_identity)
        path = Path(self.args.work, f"{name}-lam{lam:g}-{quality.digest(*facts)[:8]}.safetensors")
        if path.exists():
            say(f"{path} is there already")
            return path
        say(f"training {path}")
        repeated = self.repeated(config.seq_len) if way.needs_repeats() else None
        samples = WaySamples(self.plain(config.seq_len), repeated, way, config)
        started = time.perf_counter()
        gates = train_gates(self.model, way, config, samples)
        say(f"trained in {time.perf_counter() - started:.0f} s, peak of memory "
            f"{peak_bytes(self.model.device) / 2**30:.1f} GiB")
        Path(self.args.work).mkdir(parents=True, exist_ok=True)
        recipe = dict(asdict(config), way=name, books=self.books_identity)
        gates.save(path, self.model, lam, json.dumps(recipe))
        return path

    @functools.cached_property
    def books_identity(self):
        return quality.identity(self.args.books)

    @functools.cache
    def plain(self, seq_len):
        """The paper's samples: the books as they are, or tasks in them for the bundled model."""
        if not self.bundled:
            return self.passages(seq_len)
        config = training_config(self.args, self.model)
        haystack = train.make_haystack(train.read_prose(self.args.books), self.args.books)
        return train.task_samples(haystack, self.text.tokenizer.encode, config)

    @functools.cache
    def passages(self, seq_len):
        config = replace(train.PAPER, seq_len=seq_len)
        documents = train.read_documents(self.args.books)
        return train.split_text(documents, self.text, config, self.args.books)[0]

    def repeated(self, seq_len):
        return repeat_samples(self.passages(seq_len), self.text, self.bundled)

    # ---- tests

    @functools.cache
    def haystack(self):
        return train.make_haystack(train.read_prose(self.args.data), self.args.data)

    @functools.cache
    def tests(self, task, tokens):
        """What a task is measured on: documents, cases of chat.py, or passages."""
        args = self.args
        rng = random.Random(f"{args.seed}/{task}/{tokens}")
        passages = max(4, args.cases // 8)
        if task == "needle":
            prose = train.read_prose(args.data)
            return chat.make_cases(task, prose, tokens, args.cases, self.text, args.seed)
        if not self.bundled:
            return [self.passage(tokens, rng) for _ in range(passages)]
        documents = []
        wanted = passages if task == "prose" else args.cases
        while sum(len(d.questions) or 1 for d in documents) < wanted:
            documents.append(train.make_task(task, self.haystack(), tokens,
                                             self.text.tokenizer.encode, rng)[0])
        return documents

    def passage(self, tokens, rng):
        """A string of `tokens` tokens of the book, or of a few less."""
        piece = self.haystack().cut(8 * tokens, rng)    # books have 4 to 5 characters a token
        offsets = self.text.tokenizer.encode(piece, add_special_tokens=False).offsets
        if len(offsets) < tokens:
            raise UserError(f"--data {self.args.data} is too short for passages of {tokens:,} "
                            "tokens")
        return piece[:offsets[tokens - 8][1]]           # room for a begin token, or a word cut off

    def scores(self, policy, task, tokens):
        """(a score for each case, share of the bytes kept) of a policy; None is full attention."""
        tests = self.tests(task, tokens)
        if self.bundled:
            result = quality.score(self.model, self.text, policy, {task: tests})[task]
            return result["scores"], result["kept"]
        with progress(len(tests), f"{task}, {tokens:,} tokens", "cases") as bar:
            run = chat.score_cases if task == "needle" else chat.nats
            return run(self.model, self.text, policy, tests, report=bar.update)

    def measure(self, settings, policy):
        """The rows of a policy, each beside full attention on the same cases."""
        for tests in self.tables:
            for task, tokens in tests:
                where = dict(task=task, tokens=tokens)
                full = self.row(dict(policy="full", **where), None)
                self.row(dict(settings, **where), policy, full)

    def row(self, settings, policy, full=None):
        task = settings["task"]

        def measured():
            scores, kept = self.scores(policy, task, settings["tokens"])
            sizes = None            # questions of each document
            if self.bundled and task != "prose":
                tests = self.tests(task, settings["tokens"])
                sizes = [len(document.questions) for document in tests]
            result = quality.interval(scores, task != "prose", sizes)
            if full is not None:
                result["minus_full"] = quality.minus(scores, full[task]["scores"],
                                                     task != "prose", sizes)
            return {"kept": kept, task: dict(result, scores=[round(s, 5) for s in scores])}

        with contextlib.redirect_stdout(sys.stderr):    # a row as it comes; the table is at the end
            return self.results.row(settings, measured)


def training_config(args, model, lam=0.0):
    """The paper's settings at the sizes of this experiment, changed by the options."""
    if train.is_bundled(args):
        preset = replace(quality.SWEEP, tasks="asked", seq_len=(1024, 2048, 4096, 8192))
    else:
        preset = replace(train.PAPER, seq_len=(2048, 4096, 8192), tokens_per_step=32768, steps=200)
    positions = model.config.max_positions
    seq_len = tuple(n for n in preset.seq_len if n <= positions) or (positions,)
    given = {name: getattr(args, name) for name in
             ("seq_len", "steps", "lr", "tokens_per_step", "window", "expansion")
             if getattr(args, name) is not None}
    config = replace(preset, **{"seq_len": seq_len, **given}, lam=lam, seed=args.seed)
    train.check_lengths(config)
    return config


def describe(path):
    """What a row says about a file of gates, as far as the file knows it."""
    settings = dict(policy=Path(path).stem, gates=quality.digest(Path(path).read_bytes())[:8])
    if Path(path).suffix == ".pt":          # the authors' files have no metadata
        return settings
    settings["lam"] = (open_tensors(path).metadata() or {}).get("lam", "?")
    recipe = recipe_of(path)
    settings.update({key: recipe.get(key) for key in ("steps", "window", "books")})
    settings["policy"] = recipe.get("way", settings["policy"])
    return settings


def recipe_of(path):
    """The recipe in a file's metadata, a dict; empty if it was not made here."""
    if Path(path).suffix == ".pt":          # the authors' files have no metadata
        return {}
    metadata = open_tensors(path).metadata() or {}
    with contextlib.suppress(ValueError):
        recipe = json.loads(metadata.get("recipe", ""))
        if isinstance(recipe, dict):
            return recipe
    return {}


def load(path, model):
    """The gates in a file, of the class that their way has."""
    return way_named(recipe_of(path).get("way", "paper")).gates.load(path, model)


def print_tables(rows, tables):
    """For each policy and test: the score (of prose the difference from full), and bytes kept."""
    print("prose: difference from full attention in nats a token (bundled model: bits a byte); the "
          "others:\nshare of right answers; after each the share of the bytes kept")
    cells = {}
    for row in rows:
        settings = row["settings"]
        name = settings["policy"]
        for letter, key in (("W", "window"), ("steps", "steps")):
            if settings.get(key):
                name += f" {letter}={settings[key]}"
        key = (name, settings.get("lam", ""), settings.get("gates"))
        cells.setdefault(key, {})[settings["task"], settings["tokens"]] = cell(row)
    for tests in tables:
        headings = ""
        for task, tokens in tests:
            name = f"{task} {tokens:,}"
            headings += f"{name:>15}"
        print(f"\n{'way':32}{'lam':>7} {headings}")
        for (policy, lam, _), of_policy in cells.items():
            values = "".join(f"{of_policy.get(test, '-'):>15}" for test in tests)
            print(f"{policy:32.32}{lam:>7} {values}")


def cell(row):
    task = row["settings"]["task"]
    result = row[task]
    score = f"{result['mean']:.1%}"
    if task == "prose":
        score = f"{result['mean']:.3f}"
        if "minus_full" in result:
            score = f"{result['minus_full']['mean']:+.4f}"
    return f"{score} {row['kept']:.1%}"


# ------------------------------------------------------------------------------------------ program

def parse(argv):
    parser = Parser(description=__doc__)
    model_options(parser)
    group = parser.add_argument_group("gates")
    group.add_argument("--way", nargs="+", default=[], metavar="NAME",
                       help="ways to train: " + ", ".join(WAYS))
    group.add_argument("--lam", type=real(0), nargs="+", default=[], metavar="X",
                       help="lambdas: each way is trained with each of them")
    group.add_argument("--evaluate-only", nargs="+", default=[], metavar="FILE",
                       help="measure these gates, and train none")

    group = parser.add_argument_group("training (the default: bundled model; others)")
    group.add_argument("--books", metavar="TEXT", help="file or folder to train on")
    group.add_argument("--steps", type=whole(1), metavar="N", help="default: 300; 200")
    group.add_argument("--seq-len", type=train.lengths, metavar="N,N", help="tokens a sample "
                       "(default: 1024,2048,4096,8192; 2048,4096,8192)")
    group.add_argument("--tokens-per-step", type=whole(1), metavar="N", help="default: 32768")
    group.add_argument("--lr", type=real(0), metavar="X", help="the peak (default: 0.001)")
    group.add_argument("--window", type=whole(1), metavar="W", help="tokens that are always kept "
                       "(default: 128; 256)")
    group.add_argument("--expansion", type=real(0.1), metavar="X", help="a gate has X times "
                       "as many hidden numbers as a head has dimensions (default: 4)")

    group = parser.add_argument_group("tests and output")
    group.add_argument("--data", metavar="TEXT", help="file or folder: a book that is new to the "
                       "gates, to test them on")
    group.add_argument("--cases", type=whole(8), default=300, metavar="N",
                       help="questions a test; of prose an eighth as many passages (default: 300)")
    group.add_argument("--work", metavar="FOLDER", default=".gates",
                       help="where trained gates go (default: .gates)")
    group.add_argument("--json", metavar="FILE", help="where the rows go (default: nowhere)")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """UserError for options that clash or name what is not there, before anything slow."""
    if args.evaluate_only and (args.way or args.lam):
        raise UserError("--evaluate-only trains nothing: it goes without --way and --lam")
    if not args.evaluate_only and not (args.way and args.lam and args.books):
        raise UserError("give --way, --lam and --books to train gates, or --evaluate-only FILE")
    if not args.data:
        raise UserError("--data is missing: a book to test the gates on")
    for name in args.way:
        way_named(name)
    quality.check_paths(args, [("books", args.books), ("data", args.data),
                               *(("evaluate-only", path) for path in args.evaluate_only)])


def main(argv=None):
    args = parse(argv)
    model = load_model(args)
    say(f"{bench.machine(model.device)['machine']}, torch {torch.__version__}, {model.name} in "
        f"{str(model.dtype).removeprefix('torch.')}")
    x = Comparison(model, args)
    for path in args.evaluate_only:
        x.measure(describe(path), load(path, model))
    for way in args.way:
        for lam in args.lam:
            path = x.trained(way, lam)
            x.measure(describe(path), load(path, model))
    print_tables(x.results.shown, x.tables)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
