"""Admission policies to compare the gates with.

An admission policy decides which tokens stay in the cache when they leave the sliding window. The
cache asks it as it asks the gates: `gate` returns a number for each new key, and a key is admitted
if its number reaches `tau`. Every policy here has the signature of `wgkv.Gates.gate`:

    gate(layer, k, k_rotated, positions) -> (B, Hkv, T)     with k (B, Hkv, T, D), positions (B, T)

    SinksAndWindow         the first tokens and a sliding window (StreamingLLM); with no sinks, the
                           sliding window alone
    RandomAndSinks         the first tokens, and tokens chosen uniformly at random
    FrequencyAdmission     tokens that were rare so far in this document
    HeadwiseAdmission      some heads keep every token, the others sinks and window (DuoAttention)
    OracleAdmission        the keys that the question attends to (the signal of SnapKV). Unfair: it
                           sees the question before it decides, and no other policy here does
    Limited                any of them, in a cache with a budget or a selection

`SIMPLER` is the table of all of them. `matched` makes one that keeps as many bytes as the gates.
"""
import functools
import sys
from collections import Counter

if __name__ == "__main__":
    sys.exit("policies.py is a module: run experiments/quality.py, which compares the policies")

import torch
import torch.nn.functional as F

from generate import prefill
from model import CausalAttention, rotate
from wgkv import DenseCache, DualCache, P, RandomAdmission

KEPT_SINKS = 16         # the first tokens, which some policies keep; eviction spares wgkv.SINKS, 4


# --------------------------------------------------------------------------- policies in one line

class SinksAndWindow:
    """Admit the first `sinks` tokens and nothing else."""
    tau = 0.5

    def __init__(self, window, sinks=KEPT_SINKS):
        self.window = window
        self.sinks = sinks

    def gate(self, layer, k, k_rotated, positions):
        is_sink = positions < self.sinks                        # (B, T)
        return is_sink.float()[:, None].expand(k.shape[:3])     # (B, Hkv, T)


class RandomAndSinks(RandomAdmission):
    """Admit the first `sinks` tokens, and a share of the others at random, others in each head.

    Attention that finds nothing rests on the first tokens. Without them prose suffers far more than
    it does from what else is missing, so a baseline without them would be too easy to beat.
    """

    def __init__(self, window, share, sinks=KEPT_SINKS):
        super().__init__(share)
        self.window = window
        self.sinks = sinks

    def gate(self, layer, k, k_rotated, positions):
        is_sink = (positions < self.sinks)[:, None]             # (B or 1, 1, T)
        return super().gate(layer, k, k_rotated, positions).masked_fill(is_sink, 1.0)


class HeadwiseAdmission:
    """One decision per head: the best heads keep every token, the others sinks and their window.

    This is DuoAttention's idea, with a ranking instead of learned weights: ranking (L, Hkv) is 0
    for the head that most deserves a full cache. `share` is the share of heads that get one.
    """
    tau = 0.5

    def __init__(self, window, ranking, share, sinks=KEPT_SINKS):
        self.window = window
        self.sinks = sinks
        self.is_full = ranking < round(share * ranking.numel())     # (L, Hkv)

    def gate(self, layer, k, k_rotated, positions):
        is_sink = (positions < self.sinks)[:, None]             # (B or 1, 1, T)
        is_full = self.is_full[layer][None, :, None]            # (1, Hkv, 1)
        return (is_sink | is_full).float().expand(k.shape[:3])  # (B, Hkv, T)


# ------------------------------------------------------- policies that look at the document first

class PrecomputedAdmission:
    """Admit by values that are computed from the documents before they are prefilled.

    A subclass defines values(model, text, document), from 0 to 1, as a tensor of S columns, one for
    each token of the document's body: (L, Hkv, S), or (1, 1, S) if all heads agree. Call `prepare`
    with the documents of a batch before they are prefilled.
    """

    def __init__(self, window, share):
        self.window = window
        self.tau = 1 - share

    def prepare(self, model, text, documents):
        values = [self.values(model, text, d).to(model.device) for d in documents]
        longest = max(v.shape[-1] for v in values)

        # Pad all documents to one length, with one column more than the longest has: 1 (admitted)
        # is the value of every token after the body. Those are the question and the answer, a few
        # tokens that lie in the window anyway.
        padded = [F.pad(v, (0, longest + 1 - v.shape[-1]), value=1.0) for v in values]
        g = torch.stack(padded, dim=1)                          # (L or 1, B, Hkv or 1, longest + 1)
        self.g = g.expand(model.config.num_layers, -1, -1, -1)

    def gate(self, layer, k, k_rotated, positions):
        B, Hkv, T, _ = k.shape
        g = self.g[layer].expand(B, Hkv, -1)
        last_column = g.shape[-1] - 1
        columns = positions.clamp(max=last_column)              # (B, T)
        return g.gather(2, columns[:, None].expand(B, Hkv, T))


class FrequencyAdmission(PrecomputedAdmission):
    """Admit tokens that were rare so far: a token seen n times before has the value 1 / (1 + n)."""

    def values(self, model, text, document):
        seen = Counter()
        counts = []
        for token in text.encode(document.body):
            counts.append(seen[token])
            seen[token] += 1
        # A random part of less than 1 orders tokens of the same count: any share can be met.
        ties = torch.rand(len(counts), generator=torch.Generator().manual_seed(0))
        return 1 / (1 + torch.tensor(counts) + ties)[None, None]


class OracleAdmission(PrecomputedAdmission):
    """Admit the keys that the question attends to, equally many in each head.

    The signal is SnapKV's: the mean attention of the prompt's last queries, max-pooled over 7
    neighbors. It is UNFAIR, an upper bound for what such a signal can do: it sees the question,
    while all others decide before there is one. Each document must have one question at most.
    """

    def values(self, model, text, document):
        body = text.encode(document.body)
        question = []
        for asked, _ in document.questions[:1]:
            question = text.encode(asked, begin=False)

        # Without a question (prose) the last 32 tokens of the body look back, as in SnapKV.
        mass = attention_mass(model, body + question, last=len(question) or 32)
        mass = mass[:, :, :len(body)]                                           # (L, Hkv, S)
        mass = F.max_pool1d(mass, kernel_size=7, stride=1, padding=3)

        # Only the order counts: the key with the most attention gets 1, whatever its mass is.
        return 1 - places(mass) / len(body)


# --------------------------------------------------------------------------- with other primitives

class Limited:
    """An admission policy in a cache that also evicts, or selects.

    tokens: the budget, in tokens a row on average, its window included (SnapKV's queries come on
    top: this compares scores, and not their costs). To read a question and to decode, the cache
    sets a page a row aside: answers come from P tokens less. evict_by and select: as in DualCache.
    decoded: documents are read token by token, as if the model had written them.
    """

    def __init__(self, policy, tokens=None, evict_by="gate", select=None, decoded=False):
        self.policy = policy
        self.tokens = tokens
        self.evict_by = evict_by
        self.select = select
        self.decoded = decoded

    def make_cache(self, model, batch):
        settings = dict(evict_by=self.evict_by, select=self.select)
        budget = None
        if self.tokens is not None:
            # A cache without a bound tells what is fixed, and what a page takes.
            kv = DualCache(model, self.policy, batch, budget=2**60, **settings)
            pages = kv.L * batch * kv.Hkv * max(2, self.tokens // P - kv.R)
            budget = kv.fixed_bytes() + pages * kv.page_bytes()
        return DualCache(model, self.policy, batch, budget=budget, **settings)


# --------------------------------------------------------------------- what full attention looks at

def mean_weight(weights, i, j):
    """How much attention each key gets: (B, Hkv, T), which sums to 1 over the keys.

    weights (B, Hkv, G, n, T): the softmax weights of n queries, at positions i (n, 1), over keys at
    positions j (T). The mean is over the queries and over the G query heads of a KV head.
    """
    return weights.mean(dim=(2, 3))


def largest_far_weight(weights, i, j, window):
    """(B, Hkv): how strongly a head looks at single keys that a window and sinks would not keep.

    For each query the largest weight of such a key, and then the mean over queries and query heads.
    The sum of these weights would not do: a head that spreads its attention evenly over a long text
    has a large sum far away, and loses little without it.
    """
    far = (i - j >= window) & (j >= KEPT_SINKS)                             # (n, T)
    return weights.masked_fill(~far, 0).amax(dim=-1).mean(dim=(2, 3))


class AttentionRecorder(CausalAttention):
    """Full causal attention that measures what the last queries attend to.

    After a forward pass measured[layer] is measure(weights, i, j) of the `last` queries.
    """

    def __init__(self, device, last, measure=mean_weight):
        super().__init__(device)
        self.last = last
        self.measure = measure
        self.measured = {}

    def attend(self, layer, q, k, v, cos, sin):
        B, Hkv, T, D = k.shape
        n = min(self.last, T)
        q_last = rotate(q, cos, sin)[:, :, -n:].reshape(B, Hkv, -1, n, D)       # (B, Hkv, G, n, D)
        keys = rotate(k, cos, sin)[:, :, None]                                  # (B, Hkv, 1, T, D)
        scores = q_last.float() @ keys.float().transpose(-1, -2) / D ** 0.5     # (B, Hkv, G, n, T)

        i = torch.arange(T - n, T, device=q.device)[:, None]
        j = torch.arange(T, device=q.device)
        weights = scores.masked_fill(j > i, -torch.inf).softmax(dim=-1)
        self.measured[layer] = self.measure(weights, i, j)
        return super().attend(layer, q, k, v, cos, sin)


@torch.no_grad()
def attention_mass(model, ids, last, measure=mean_weight):
    """(L, Hkv, S): the share of the last queries' attention that each of the S ids gets.

    With another measure: (L, Hkv, ...), what it gives for each layer.
    """
    recorder = AttentionRecorder(model.device, last, measure)
    model(torch.tensor([ids], device=model.device), recorder)
    layers = range(model.config.num_layers)
    return torch.cat([recorder.measured[layer] for layer in layers])            # B is 1


def rank_heads(model, text, documents, window):
    """Rank the heads by how strongly questions and answers look at single keys far away.

    Returns (L, Hkv): 0 for the head that looks most strongly, 1 for the next.
    """
    measure = functools.partial(largest_far_weight, window=window)
    strength = 0
    for d in documents:
        body = text.encode(d.body)
        said = "".join(question + answer for question, answer in d.questions)
        asked = text.encode(said, begin=False, control=True)                    # with END
        strength = strength + attention_mass(model, body + asked, len(asked), measure)
    return places(strength.flatten()).view_as(strength)                         # (L, Hkv)


def places(values):
    """The place of each number along the last axis: 0 for the largest, 1 for the next."""
    order = values.argsort(dim=-1, descending=True)     # order[n]: who is in place n
    return order.argsort(dim=-1)                        # its inverse


# ------------------------------------------------------------------------------- at the same bytes

# Each makes a policy of `share`, from 0 to 1: a larger share keeps more. window: that of the gates.
# length: of the documents, in tokens. ranking() gives the ranking of heads: a function, because it
# costs forward passes.

def sliding_window(window, share, length, ranking):
    return SinksAndWindow(max(1, round(share * length)), sinks=0)


def sinks_and_window(window, share, length, ranking):
    return SinksAndWindow(max(1, round(share * length)))


def uniform_random(window, share, length=None, ranking=None):
    return RandomAndSinks(window, share)


def rare_tokens(window, share, length, ranking):
    return FrequencyAdmission(window, share)


def whole_heads(window, share, length, ranking):
    return HeadwiseAdmission(window, ranking(), share)


def oracle(window, share, length, ranking):
    return OracleAdmission(window, share)


SIMPLER = {
    "sliding window": sliding_window,
    "16 sinks + window": sinks_and_window,
    "uniform random": uniform_random,
    "rare tokens": rare_tokens,
    "whole heads": whole_heads,
    "oracle (unfair: sees the question)": oracle,
}


def make_cache(model, text, policy, documents):
    """An empty cache for a batch of documents under a policy; None is full attention."""
    if policy is None:
        return DenseCache(model, len(documents))
    if isinstance(policy, Limited):
        return policy.make_cache(model, len(documents))
    if isinstance(policy, PrecomputedAdmission):
        policy.prepare(model, text, documents)
    return DualCache(model, policy, len(documents))


def matched(make, kept, model, text, documents):
    """make(share) with the share that keeps `kept` of a dense cache's bytes, found by bisection.

    The bytes are measured on `documents`. They grow with the share, in steps: where all heads
    agree, the least step is a page for every head. We then take the step above `kept`, and the
    largest share that needs no further page: the simpler policy should not be the one with fewer
    bytes.
    """
    bodies = [text.encode(d.body) for d in documents]

    def kept_by(share):
        kv = make_cache(model, text, make(share), documents)
        prefill(model, kv, bodies)
        return kv.kept_bytes() / kv.dense_bytes()

    def bracket(limit):
        """(below, above): the largest share tried that keeps at most `limit`, and the next one."""
        below, above = 0.0, 1.0
        for _ in range(10):
            middle = (below + above) / 2
            if kept_by(middle) <= limit:
                below = middle
            else:
                above = middle
        return below, above

    _, above = bracket(kept)
    step_above = kept_by(above)
    share, _ = bracket(step_above)
    return make(share)
