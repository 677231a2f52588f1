"""Admission policies to compare the gates with.

An admission policy decides which tokens stay in the cache when they leave the sliding window. The
cache asks it as it asks the gates: `gate` returns a number for each new key, and a key is admitted
if its number reaches `tau`. Every policy here has the signature of `wgkv.Gates.gate`:

    gate(layer, k, k_rotated, positions) -> (B, Hkv, T)     with k (B, Hkv, T, D), positions (B, T)

    SinksAndWindow         the first tokens and a sliding window (StreamingLLM); with no sinks, the
                           sliding window alone
    wgkv.RandomAdmission   tokens chosen uniformly at random
    FrequencyAdmission     tokens that were rare so far in this document
    HeadwiseAdmission      some heads keep every token, the others their window (as DuoAttention)
    OracleAdmission        the keys that the question attends to (the signal of SnapKV). Unfair: it
                           sees the question before it decides, and no other policy here does
    Limited                any of them, in a cache with a budget or a selection

`SIMPLER` is the table of all of them. `matched` makes one that keeps as many bytes as the gates.
"""
import sys
from collections import Counter

if __name__ == "__main__":
    sys.exit("policies.py is a module: run experiments/quality.py, which compares the policies")

import torch
import torch.nn.functional as F

from generate import prefill
from model import CausalAttention, rotate
from wgkv import DenseCache, DualCache, P, RandomAdmission

SINKS = 16


# --------------------------------------------------------------------------- policies in one line

class SinksAndWindow:
    """Admit the first `sinks` tokens and nothing else."""
    tau = 0.5

    def __init__(self, window, sinks=SINKS):
        self.window = window
        self.sinks = sinks

    def gate(self, layer, k, k_rotated, positions):
        is_sink = positions < self.sinks                        # (B, T)
        return is_sink.float()[:, None].expand(k.shape[:3])     # (B, Hkv, T)


def uniform_random(window, share):
    """Admit this share of the tokens, chosen at random and differently in each head."""
    policy = RandomAdmission(share)
    policy.window = window
    return policy


class HeadwiseAdmission:
    """One decision per head: the best heads keep every token, the others only their window.

    This is DuoAttention's idea, with a ranking instead of learned weights: ranking (L, Hkv) is 0
    for the head that most deserves a full cache. `share` is the share of heads that get one.
    """
    tau = 0.5

    def __init__(self, window, ranking, share, length):
        num_heads = ranking.numel()
        num_full = int(share * num_heads)
        self.is_full = ranking < num_full                       # (L, Hkv)

        # share * num_heads is rarely a whole number. What is left of a head pays for a wider window
        # in all heads, in documents of `length` tokens: so the bytes of the gates are met closely.
        left_over = share * num_heads - num_full
        self.window = window + round(left_over * (length - window) / num_heads)

    def gate(self, layer, k, k_rotated, positions):
        return self.is_full[layer].float()[None, :, None].expand(k.shape[:3])


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
        self.g = torch.stack(padded, dim=1)                     # (L or 1, B, Hkv or 1, longest + 1)

    def gate(self, layer, k, k_rotated, positions):
        B, Hkv, T, _ = k.shape
        g = self.g[layer % len(self.g)].expand(B, Hkv, -1)      # layer % 1 is 0: all layers agree
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
        rank = mass.argsort(dim=-1, descending=True).argsort(dim=-1)            # 0: the most
        return 1 - rank / len(body)


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

class AttentionRecorder(CausalAttention):
    """Full causal attention that records how much of it the last queries give to each key.

    After a forward pass mass[layer] is (B, Hkv, T): the mean over the `last` queries and over the G
    query heads that share a KV head. It sums to 1 over the keys.
    """

    def __init__(self, device, last):
        super().__init__(device)
        self.last = last
        self.mass = {}

    def attend(self, layer, q, k, v, cos, sin):
        B, Hkv, T, D = k.shape
        n = min(self.last, T)
        q_last = rotate(q, cos, sin)[:, :, -n:].reshape(B, Hkv, -1, n, D)       # (B, Hkv, G, n, D)
        keys = rotate(k, cos, sin)[:, :, None]                                  # (B, Hkv, 1, T, D)
        scores = q_last.float() @ keys.float().transpose(-1, -2) / D ** 0.5     # (B, Hkv, G, n, T)

        i = torch.arange(T - n, T, device=q.device)[:, None]
        j = torch.arange(T, device=q.device)
        weights = scores.masked_fill(j > i, -torch.inf).softmax(dim=-1)
        self.mass[layer] = weights.mean(dim=(2, 3))                             # over G and n
        return super().attend(layer, q, k, v, cos, sin)


@torch.no_grad()
def attention_mass(model, ids, last):
    """(L, Hkv, S): the share of the last queries' attention that each of the S ids gets."""
    recorder = AttentionRecorder(model.device, last)
    model(torch.tensor([ids], device=model.device), recorder)
    layers = range(model.config.num_layers)
    return torch.cat([recorder.mass[layer] for layer in layers])                # B is 1


def rank_heads(model, text, documents, window):
    """Rank the heads by how much the answers attend to keys outside the window.

    Returns (L, Hkv): 0 for the head that attends most, 1 for the next.
    """
    far = 0
    for d in documents:
        body = text.encode(d.body)
        said = "".join(question + answer for question, answer in d.questions)
        asked = text.encode(said, begin=False, control=True)                    # with END
        mass = attention_mass(model, body + asked, last=len(asked))             # (L, Hkv, S)
        outside = max(1, len(body) - window)
        far = far + mass[:, :, :outside].sum(dim=-1)                            # (L, Hkv)
    order = far.flatten().argsort(descending=True)      # order[n]: the head in place n
    return order.argsort().view_as(far)                 # its inverse: the place of each head


# ------------------------------------------------------------------------------- at the same bytes

# name -> make(window, share, length, ranking), for share from 0 to 1: a larger share keeps more.
# ranking() gives the ranking of heads. It is a function because it costs forward passes, and only
# HeadwiseAdmission needs it.
SIMPLER = {
    "sliding window": lambda window, share, length, ranking:
        SinksAndWindow(max(1, round(share * length)), sinks=0),
    "16 sinks + window": lambda window, share, length, ranking:
        SinksAndWindow(max(1, round(share * length))),
    "uniform random": lambda window, share, length, ranking: uniform_random(window, share),
    "rare tokens": lambda window, share, length, ranking: FrequencyAdmission(window, share),
    "whole heads": lambda window, share, length, ranking:
        HeadwiseAdmission(window, ranking(), share, length),
    "oracle (unfair: sees the question)": lambda window, share, length, ranking:
        OracleAdmission(window, share),
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

    The bytes are measured on `documents`. They grow in steps: where all heads agree, the least step
    is a page for every head. We then take the step above `kept`, and the largest share that needs
    no further page: the simpler policy should not be the one with fewer bytes. (HeadwiseAdmission
    may end a little below: with one full head more, all windows shrink again.)
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
    share, _ = bracket(kept_by(above))
    return make(share)
