"""Write-Gated KV: decide, when a key is made, whether it is worth keeping (arXiv 2512.17452).

A dense KV cache keeps every token's key and value until the end. Here a small gate looks at each
key when it is made and predicts whether distant queries will need it. Recent tokens stay in a
sliding window whatever their gate says, since most tokens matter to their neighbors and to
nobody later. A token that leaves the window is promoted to paged memory if its gate reached tau;
otherwise it is gone. Each layer and each KV head decides for itself.

THE DEFINITION. In each layer and KV head, for a query at position i and a key at position j with
gate g[j],

    visible(i, j)  =  j <= i  and  ( i - j < W  or  g[j] >= tau )

and attention is softmax attention over the visible keys. DualCache computes this, to rounding,
however a token sequence is split into calls: one prefill, chunks of any size, token by token, a
second turn on a used cache. (A budget or a selection, both off unless you ask for them, changes the
definition; their sections say how. Training, at the end, softens it.)

    a new token --> ring of W places --> g >= tau? --yes--> pages of P tokens, in order
                    place = pos mod W        |
                                             +------no----> gone (its place is overwritten)

WHY. For Llama-3.1-8B a token's keys and values take 2 x 32 layers x 8 heads x 128 numbers x 2 bytes
= 128 KiB. A decode step reads the whole cache to make one token, a few operations a byte where
a GPU has time for hundreds, so it is bound by memory bandwidth: a cache of a fifth of the size is
read in a fifth of the time.

SOME WORDS. A token is *admitted* if its gate reached tau, *refused* if not. An admitted token is
*promoted* when it leaves the window: copied to the pages of its row. It is *held* from then on,
until it is *evicted*, which only a cache with a budget does. The share a cache *keeps* is the bytes
it uses over the bytes a dense cache would use.

A *row* is one (layer, sequence, KV head): rows have different lengths, and a batch just adds rows.
(Functions that serve one layer number its rows b * Hkv + h.) A *place* is an index in a row's list
of pages, a *slot* an index in the pool. A *call* is one forward pass, a *step* a call of decode,
with one new token a sequence. A step's *plan* says which pages it reads. On a GPU a step is
*captured* as a CUDA graph, and then *replayed*. A *view* is a cache of some sequences of another
cache. *Twin* names the function of kernels.py (or, there, of this file) that computes the same.

THE LETTERS. B sequences, T new tokens, S keys that a call attends to, Hq query heads, Hkv KV heads,
G = Hq / Hkv, D head dim, W window, P tokens a page, L layers, R = ceil(W / P) pages of a ring, M
columns of a page table (a row's list of pages), N pages in the pool; n is how many there are of
what the text names. Tensors are (B, heads, T, D).

    python wgkv.py        shows the definition on 16 tokens, and the cache after each of them

To be read in this order: the definition; the method in thirty lines; gates; the paged cache, whose
passages on eviction and selection can wait; attention in plain PyTorch; training. kernels.py has
the same operations in Triton.
"""
import contextlib
import copy
import hashlib
import math
import sys
import types
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as recompute

import files
from common import UserError, all_reduce_sum, run_program
from model import attention, kernels_for, rotate_both

P = 64              # tokens a page: a tile of the kernels, and small enough to waste little
MIN_GATE = 1e-3     # in training, so that log g stays finite
SINKS = 4           # the first tokens of a text, which eviction never takes
QUERIES = 256       # the last queries that are kept for SnapKV's score
REFUSED = -1.0      # a gate below every tau; -inf would say that there is no token


# --------------------------------------------------------------------------------- the definition

def visible(i, j, g, window, tau):
    """May a query at position i see the key at position j with gate g? Tensors that broadcast."""
    return (j <= i) & ((i - j < window) | (g >= tau))


def visible_mask(g, window, tau):
    """The whole pattern (B, Hkv, T, T) of gates g (B, Hkv, T). Quadratic: for tests, pictures."""
    t = torch.arange(g.shape[-1], device=g.device)
    return visible(t[:, None], t, g[:, :, None, :], window, tau)


def dense_attention(q, k, v, mask):
    """Softmax attention over the keys where mask is True: what every faster path must equal.

    q (B, Hq, T, D); k, v (B, Hkv, S, D); mask (B, Hkv, T, S) bool. Query head h reads KV head
    h // G. Returns (B, Hq, T, D).
    """
    B, Hq, T, D = q.shape
    q = q.view(B, k.shape[1], -1, T, D)                                     # (B, Hkv, G, T, D)
    scores = q @ k[:, :, None].transpose(-1, -2) / math.sqrt(D)             # (B, Hkv, G, T, S)
    weights = scores.masked_fill(~mask[:, :, None], -math.inf).softmax(dim=-1)
    return (weights @ v[:, :, None]).view(B, Hq, T, D)


# --------------------------------------------------------------------- the method in thirty lines

class Token(NamedTuple):
    position: int
    k: torch.Tensor             # (D), after RoPE
    v: torch.Tensor             # (D)
    g: float


class SimpleCache:
    """One head of one sequence, in Python lists. All that follows is this, fast and for many rows.
    """

    def __init__(self, window, tau):
        self.window = window
        self.tau = tau
        self.ring = []          # the last `window` tokens (a queue; DualCache has places)
        self.promoted = []      # admitted tokens that have left the window, oldest first

    def step(self, q, token):
        """Add one token, and return the attention output (D) of its query q (D)."""
        if len(self.ring) == self.window:
            leaving = self.ring.pop(0)
            # Why only now? Inside the window a token is visible whatever its gate says; copied any
            # earlier it would be seen twice.
            if leaving.g >= self.tau:
                self.promoted.append(leaving)
        self.ring.append(token)

        tokens = self.promoted + self.ring
        keys = torch.stack([token.k for token in tokens])                   # (n, D)
        values = torch.stack([token.v for token in tokens])
        weights = (keys @ q / math.sqrt(len(q))).softmax(dim=0)             # (n)
        return weights @ values


def demo(argv=None):
    """One head, W = 4, 16 tokens, of which 0, 3 and 9 are admitted: the pattern, then the steps."""
    window, tau, admitted = 4, 0.1, (0, 3, 9)
    g = torch.tensor([float(t in admitted) for t in range(16)])
    print("Which keys (across) each query (down) of 16 tokens sees; W = 4; tokens 0, 3 and 9 are\n"
          "admitted. The stripes are the admitted keys, the slash is the window:\n")
    for i, row in enumerate(visible_mask(g[None, None], window, tau)[0, 0].tolist()):
        print(f"{i:6}  " + " ".join("#" if seen else "." for seen in row[:i + 1]))
    print("\nThe same, token by token:\n\n   token   ring            promoted")
    cache = SimpleCache(window, tau)
    for i in range(16):
        cache.step(torch.zeros(2), Token(i, torch.zeros(2), torch.zeros(2), g[i].item()))
        ring = " ".join(f"{token.position:2}" for token in cache.ring)
        promoted = " ".join(str(token.position) for token in cache.promoted)
        print(f"  {i:6}   {ring:14}  {promoted or '-'}")


# ------------------------------------------------------------------------------------------ gates

class Gate(nn.Module):
    """The gates of one layer, one for each KV head (section 3 of the paper).

    With D = 128 and E = 4 each is a small network of 256 -> 512 -> 1 numbers:

        x = [ RMSNorm(k before RoPE) ; RMSNorm(k after RoPE) ]      (2 D)
        h = GELU(W1 x + b1)                                         (E D)
        g = sigmoid(w2 . h + b2)                                    one number in (0, 1)

    The gate sees the key twice. Before RoPE it says what the token is, wherever it stands. After
    RoPE it is what later queries meet. The norm weights are shared by the heads of a layer, all
    else is each head's own. E is the expansion. (The authors' gate is two Conv1d layers with
    kernel size 1 and one group a head, which is the same; parameters start as theirs do.)
    """

    def __init__(self, Hkv, D, expansion):
        super().__init__()
        hidden = round(expansion * D)
        self.pre_norm = nn.Parameter(torch.ones(D))
        self.post_norm = nn.Parameter(torch.ones(D))
        self.w1 = nn.Parameter(torch.empty(Hkv, hidden, 2 * D))
        self.b1 = nn.Parameter(torch.empty(Hkv, hidden))
        self.w2 = nn.Parameter(torch.empty(Hkv, hidden))
        self.b2 = nn.Parameter(torch.empty(Hkv))
        for p, fan_in in ((self.w1, 2 * D), (self.b1, 2 * D), (self.w2, hidden), (self.b2, hidden)):
            nn.init.uniform_(p, -fan_in ** -0.5, fan_in ** -0.5)

    def forward(self, k, k_rotated):
        """k, k_rotated (B, Hkv, T, D), before and after RoPE -> g (B, Hkv, T) fp32."""
        return gate(self, k, k_rotated)


def gate(p, k, k_rotated):
    """The gates g (B, H, T) fp32 of keys k, k_rotated (B, H, T, D).

    p: the parameters. A Gate, or all layers' (`Gates.stacked`), whose heads stand one layer after
    the other: H = L Hkv.
    """
    kernels = kernels_for(k)
    if kernels and not torch.is_grad_enabled():             # the kernel has no backward pass
        return kernels.gate(p, k, k_rotated)
    B, H, T, D = k.shape
    x = torch.stack((k, k_rotated), dim=-2).float()                         # (B, H, T, 2, D)
    x = F.rms_norm(x, (D,), eps=1e-6)
    norms = torch.stack((p.pre_norm.view(-1, D), p.post_norm.view(-1, D)), dim=1)   # (L, 2, D)
    x = x.view(B, len(norms), -1, T, 2, D) * norms[:, None, None]           # (B, L, Hkv, T, 2, D)

    # Each head has matrices of its own: one batched product, with the heads as its batch.
    x = x.view(B, H, T, 2 * D).transpose(0, 1).reshape(H, B * T, 2 * D)
    h = torch.baddbmm(p.b1[:, None], x, p.w1.transpose(1, 2))               # (H, B * T, E * D)
    h = F.gelu(h)
    g = torch.baddbmm(p.b2[:, None, None], h, p.w2[:, :, None])             # (H, B * T, 1)
    g = g.float().sigmoid()     # float: under training's autocast the two products are bf16
    return g.view(H, B, T).transpose(0, 1)                                  # (B, H, T)


class Gates(nn.Module):
    """A Gate for each layer, with the window and tau they belong to.

    Anything with a method `gate` like this one's is an *admission policy*; it may have a window and
    a tau (else they are 256 and 0.1), and a method `stacked`, which decode then asks instead of
    `gate`. (A subclass with a `gate` of its own needs its own `stacked`, or None in its place.)

    Why tau = 0.1? Training pushes gates to 0 or 1, but some stay between, and the model learned
    to use their keys with that weight. 0.1 is the largest tau at which cutting gates to 0 or 1 cost
    no answer that the uncut gates gave, whatever lambda (the weight of sparsity_loss). At a large
    lambda the bundled model finds 100% of the facts hidden in a text at 0.1, 97.5% at 0.2, 0.5% at
    0.4. To keep less, raise lambda instead.
    """

    def __init__(self, L, Hkv, D, window=256, tau=0.1, expansion=4.0):
        super().__init__()
        self.shape = (L, Hkv, D)
        self.window = window
        self.tau = tau
        self.expansion = expansion
        self.quantiles = {}     # of gates, by length of the text: see files.page_share
        self.layers = nn.ModuleList(Gate(Hkv, D, expansion) for _ in range(L))
        self.stack = None       # all layers' parameters one after the other: see `stacked`

    @classmethod
    def for_model(cls, model, **settings):
        """New gates that fit the model."""
        return cls(*files.own_shape(model), **settings).to(model.device)

    def gate(self, layer, k, k_rotated, positions):
        """Keys of new tokens in, their gates (B, Hkv, T) fp32 out.

        k and k_rotated (B, Hkv, T, D); positions (B or 1, T), which these gates do not look at.
        """
        return self.layers[layer](k, k_rotated)

    def stacked(self):
        """A function like `gate` for the keys (B, L, Hkv, T, D) of all layers; g (B, L, Hkv, T).

        In decode one call then replaces L.
        """
        # Anew too where the parameters have moved (to another device, or by a deepcopy) and are no
        # longer views of the stack.
        first = self.layers[0]
        if self.stack is None or self.stack.w1.data_ptr() != first.w1.data_ptr():
            self.stack = types.SimpleNamespace()
            for name, _ in first.named_parameters():
                parts = [getattr(layer, name) for layer in self.layers]
                together = torch.cat([p.detach() for p in parts])
                setattr(self.stack, name, together)
                # The layers' parameters become views of it: nothing is in memory twice, and
                # training or loading changes both.
                for p, view in zip(parts, together.chunk(len(parts))):
                    p.data = view

        def gate_all_layers(k, k_rotated, positions):
            g = gate(self.stack, k.flatten(1, 2), k_rotated.flatten(1, 2))  # (B, L * Hkv, T)
            return g.unflatten(1, (len(self.layers), -1))

        return gate_all_layers

    def identity(self):
        """A hash of all parameters: a saved cache is no use to other gates."""
        digest = hashlib.sha256()
        for p in self.parameters():
            digest.update(p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path, model, lam=0.0, recipe="", dtype=torch.float32):
        """Write one safetensors file; see files.save_gates."""
        files.save_gates(self, path, model, lam, recipe, dtype)

    @classmethod
    def load(cls, path, model):
        """The gates in a file, for this model: ours, or an official .pt; see files.load_gates."""
        return files.load_gates(cls, path, model)


class RandomAdmission:
    """An admission policy: a share of the tokens uniformly at random, whatever their keys.

    The share 1.0 admits all, 0.0 none. Which tokens depends on seed, layer, head and position
    alone, so any split of a text into calls admits the same ones.
    """

    def __init__(self, share, seed=0, first_head=0):
        self.share = share
        self.seed = seed
        self.first_head = first_head        # of several processes: the first KV head of this one

    def identity(self):
        return f"random {self.share}, seed {self.seed}"

    def gate(self, layer, k, k_rotated, positions):
        """k (B, Hkv, T, D), positions (B or 1, T) -> gates (B, Hkv, T) fp32, each 1 or -1."""
        B, Hkv, T, _ = k.shape
        head = self.first_head + torch.arange(Hkv, device=k.device)[:, None]        # (Hkv, 1)
        # 131: more than a layer has heads, so every (layer, head) has a number of its own.
        stream = head + 131 * layer + 65537 * (self.seed % 2**32)           # (Hkv, 1)
        # The product may wrap around; only the low 32 bits are used.
        x = positions[:, None, :] + stream * 0x9E3779B1                     # (B or 1, Hkv, T)

        # A hash of 32-bit numbers that mixes well: shift, xor and multiply, three times.
        for factor in (0x45D9F3B, 0x45D9F3B, 0x9E3779B1):
            x = x & 0xFFFFFFFF
            x = ((x >> 16) ^ x) * factor
        uniform = (x & 0xFFFFFF).float() / 2**24                            # in [0, 1)
        g = torch.where(uniform < self.share, 1.0, REFUSED)     # refused even if tau is 0
        return g.expand(B, Hkv, T)


# ---------------------------------------------------------------------------------- the page pool

def pages_for(tokens):
    """ceil(tokens / P), for numbers and for tensors."""
    return (tokens + P - 1) // P


class PagePool:
    """Pages of P tokens for all rows of all layers, and a stack of the free ones.

        k, v (N, P, D)         keys after RoPE, and values
        g    (N, P) fp32       the token's gate: asked when it leaves the ring, and by eviction
        pos  (N, P) int32      its position: for eviction, saved caches and pictures
        low, high (N, D)       channelwise least and largest key of a full page, for selection only
        free (N) int32         ids of free pages: a stack; num_free (1) int32 is its height

    Slots count through all pages: slot p * P + i is the i-th of page p. Page 0 is a dummy that
    nobody owns. Unused entries of page tables are 0, so a read through one stays inside the pool;
    what it finds is masked.
    """

    def __init__(self, D, dtype, device, key_ranges=False):
        self.D = D
        self.names = ["k", "v", "g", "pos", "free"]         # tensors with an entry for each page
        if key_ranges:
            self.names += ["low", "high"]
            self.low = torch.zeros(1, D, dtype=dtype, device=device)
            self.high = torch.zeros(1, D, dtype=dtype, device=device)
        self.k = torch.zeros(1, P, D, dtype=dtype, device=device)
        self.v = torch.zeros(1, P, D, dtype=dtype, device=device)
        self.g = torch.zeros(1, P, dtype=torch.float32, device=device)
        self.pos = torch.zeros(1, P, dtype=torch.int32, device=device)
        self.free = torch.zeros(1, dtype=torch.int32, device=device)
        self.num_free = torch.zeros(1, dtype=torch.int32, device=device)

    def tensors(self):
        return {name: getattr(self, name) for name in (*self.names, "num_free")}

    def clone(self):
        other = copy.copy(self)
        for name, tensor in self.tensors().items():
            setattr(other, name, tensor.clone())
        return other

    def grow(self, pages):
        """Add free pages. One tensor is copied at a time, so at most K or V exists twice."""
        old = len(self.k)
        for name in self.names:
            tensor = getattr(self, name)
            larger = tensor.new_empty(old + pages, *tensor.shape[1:])
            larger[:old] = tensor
            larger[old:] = 0    # not NaN: a masked key has weight 0, but 0 * NaN is NaN
            setattr(self, name, larger)
        height = int(self.num_free)
        self.free[height:height + pages] = torch.arange(old + pages - 1, old - 1, -1)
        self.num_free += pages

    def take(self, pages):
        """Ids of free pages, off the top of the stack. Twin: kernels.take_pages."""
        height = int(self.num_free)
        assert height >= pages, f"{pages} pages wanted, {height} are free"
        self.num_free -= pages
        return self.free[height - pages:height].flip(0)

    def release(self, ids):
        """Put pages back on the stack, cleared: a NaN left there would reach their next row."""
        for name in ("k", "v", "g", "pos"):
            getattr(self, name)[ids.long()] = 0
        height = int(self.num_free)
        self.free[height:height + len(ids)] = ids
        self.num_free += len(ids)

    def read(self, slots):
        """k, v (..., D), g, pos (...) of flat slots (...)."""
        return (self.k.view(-1, self.D)[slots], self.v.view(-1, self.D)[slots],
                self.g.view(-1)[slots], self.pos.view(-1)[slots])

    def write(self, slots, k, v, g, pos):
        """The reverse; no slot may occur twice. What is None stays as it is."""
        if k is not None:
            self.k.view(-1, self.D)[slots] = k
            self.v.view(-1, self.D)[slots] = v
        if g is not None:
            self.g.view(-1)[slots] = g
        if pos is not None:
            self.pos.view(-1)[slots] = pos.int()


# ------------------------------------------------------------------------------------------ caches

# At a first reading `begin`, `end` and num_tokens of Cache are enough; then go on with DualCache.
# (*Room* is memory that is ready for tokens to come: free pages, and columns of page tables.)

class Cache:
    """What DenseCache and DualCache share: lengths, positions, views of some sequences, room.

    cache.sequences(2) is a view: a cache of sequence 2 alone. It has positions and a plan of its
    own and shares all memory with its `base`, the whole cache. A tensor that grows is replaced by
    a larger one, so only the base holds it; everything else is updated in place. One call at a
    time.
    """

    def __init__(self, model, batch=1):
        c = model.config
        self.L = c.num_layers
        self.Hkv = c.num_kv_heads
        self.D = c.head_dim
        # Processes that share the model's KV heads: a budget is one for all of them together.
        self.processes = getattr(c, "processes", 1)
        self.device = model.device
        self.dtype = model.dtype
        # None if there are no kernels for this device or head dim.
        self.kernels = kernels_for(torch.empty(self.D, device=self.device))
        self.view_of = None         # of a view: the whole cache
        self.first = 0              # its first sequence in there
        self.B = batch
        self.all_num_tokens = torch.zeros(batch, dtype=torch.long, device=self.device)
        # What a cache and its views have in common: one object, to which all of them point.
        self.shared = types.SimpleNamespace(
            expected=[0] * batch,   # tokens that each sequence will have, where someone has said so
            room=(0, batch, 0),     # (first, count, tokens): these sequences have room for so many
            in_call=None,           # the sequences (first, count) of a call that has not ended
            in_decode=False,        # inside `decoding`
            most_steps=1024,        # how many steps one `reserve` can be asked for
            # How often a tensor of the cache was replaced by a larger one. Where that has changed,
            # a CUDA graph must be captured anew.
            reallocations=0)

    @property
    def base(self):
        return self if self.view_of is None else self.view_of

    @property
    def num_tokens(self):
        """(B) int64: the tokens that each sequence has. `end` adds to it, `reset` clears it."""
        return self.base.all_num_tokens[self.first:self.first + self.B]

    @property
    def capturable(self):
        """Can a one-token call be captured in a CUDA graph? (It can if the kernels do the work.)"""
        return self.kernels is not None and self.device.type == "cuda"

    def sequences(self, first, count=1):
        """A view of `count` sequences from `first` on: a cache too, in the same memory."""
        assert 0 <= first and first + count <= self.B, f"sequences {first} + {count} of {self.B}"
        view = copy.copy(self)
        view.view_of = self.base
        view.first = self.first + first
        view.B = count
        return view

    def begin(self, T, lengths=None):
        """Start a call with T new tokens a sequence. Returns their positions (B, T).

        lengths (B): how many of the T are valid, in each sequence; the rest is padding on the
        right.
        """
        if self.shared.in_call:
            raise RuntimeError("the last call on this cache did not reach its end: some layers "
                               "have its tokens, others do not. reset() the cache.")
        num_tokens = self.num_tokens
        self.padded = lengths is not None
        if lengths is None:
            self.num_new = num_tokens.new_full((self.B,), T)
        else:
            self.num_new = lengths.to(num_tokens)
        self.positions = num_tokens[:, None] + torch.arange(T, device=self.device)
        self.ensure_room(T)
        self.take_room(T)
        self.shared.in_call = (self.first, self.B)
        return self.positions

    def end(self):
        self.num_tokens.add_(self.num_new)      # in place: a captured step finds it where it was
        self.shared.in_call = None

    def ensure_room(self, tokens):
        """Make room for so many more tokens a sequence, if these sequences do not have it.

        For 64 at least: that is one page a row, and one synchronization in 64 decode steps.
        """
        first, count, room = self.shared.room
        if (first, count) != (self.first, self.B) or room < tokens:
            room = max(tokens, P)
            self.make_room(room)
            self.set_room(room)

    def take_room(self, tokens):
        """Note that a call has used room. A replayed CUDA graph runs no Python, so whoever
        replays it must call this.
        """
        self.set_room(self.shared.room[2] - tokens)

    def set_room(self, tokens):
        """Note that these sequences have room. Others may have lost theirs: all share one pool."""
        self.shared.room = (self.first, self.B, tokens)

    def expect(self, tokens):
        """A hint before long prompts: how many tokens each sequence will hold after it, a list."""
        self.shared.expected[self.first:self.first + self.B] = tokens

    @contextlib.contextmanager
    def reserve(self, steps):
        """Make room for `steps` one-token calls; inside, none of them synchronizes with the host.

        To ask a GPU for a number the host waits until the GPU's queue has run empty, and then the
        GPU waits for new work. Besides, decode records its step as a CUDA graph. A graph replays
        kernels, not Python: the check for room in `begin` does not run, and the pool must not
        move under it. So who replays a graph calls `ensure_room` before and `take_room` after.
        """
        most = self.shared.most_steps
        assert steps <= most, f"{steps} steps reserved, at most {most}"
        self.make_room(steps)
        self.set_room(steps)
        try:
            yield
        finally:
            self.set_room(0)

    @contextlib.contextmanager
    def decoding(self):
        """Inside, a one-token call is a step of decode, and selection applies to it.

        Outside it may be a prompt's last chunk, which reads all that the cache holds.
        """
        before = self.shared.in_decode
        self.shared.in_decode = True
        try:
            yield
        finally:
            self.shared.in_decode = before

    def reset(self):
        """Forget everything (a view: its sequences; a tau that a budget has raised stays risen)."""
        self.num_tokens.zero_()
        self.expect([0] * self.B)
        self.set_room(0)
        first, count = self.shared.in_call or (self.first, 0)
        if self.first <= first and first + count <= self.first + self.B:
            self.shared.in_call = None     # what a broken call left behind goes too
        self.forget()

    def copy_of_base(self):
        """What `clone` begins with: tensors are still shared, lists are not."""
        assert self.view_of is None, "a view cannot be cloned"
        other = copy.copy(self)
        other.shared = copy.copy(self.shared)
        other.shared.expected = list(self.shared.expected)
        other.shared.room = (0, self.B, 0)
        other.shared.in_decode = False
        return other

    def dense_bytes(self):
        """What a dense cache holds for the same tokens: K and V, every layer and head."""
        return 2 * self.L * self.Hkv * self.D * self.dtype.itemsize * int(self.num_tokens.sum())

    def save(self, path, model, ids, notes=None):
        """Write the cache to one safetensors file, for another process to `load`.

        ids: for each sequence the list of the tokens that it has. notes: anything that JSON can
        hold, for the reader.
        """
        files.save_cache(self, path, model, ids, notes or {})

    def load(self, path, model):
        """Fill this empty cache from a file of `save`: (ids, notes) as they were given there.

        UserError if the file is broken, or from another model, other gates or other settings.
        What comes next is then what would have come in the process that saved it.
        """
        return files.load_cache(self, path, model)


class DenseCache(Cache):
    """Keeps everything: the baseline. K and V of each layer are one tensor (B, Hkv, capacity, D).

    Capacity is in whole pages, so that the paged cache's decode kernel (below) serves here as
    well: a row's page table is then 0, 1, 2, ... counted from its own first page.
    """

    def __init__(self, model, batch=1):
        super().__init__(model, batch)
        empty = torch.empty(batch, self.Hkv, 0, self.D, device=self.device, dtype=self.dtype)
        self.k = [empty] * self.L
        self.v = [empty] * self.L

    def forget(self):
        pass                        # lengths say what is seen; nothing else is read

    def clone(self):
        other = self.copy_of_base()
        other.all_num_tokens = self.all_num_tokens.clone()
        other.k = [k.clone() for k in self.k]
        other.v = [v.clone() for v in self.v]
        return other

    def make_room(self, tokens):
        """Room for so many more tokens a sequence; capacity grows by a quarter, or as expected."""
        base = self.base
        needed = int(self.num_tokens.max()) + tokens
        capacity = base.k[0].shape[2]
        if needed <= capacity:
            return
        capacity = pages_for(max(needed, *self.shared.expected, capacity + capacity // 4)) * P
        self.shared.reallocations += 1
        for layers in (base.k, base.v):
            for layer in range(self.L):         # one at a time: no other is in memory twice
                layers[layer] = F.pad(layers[layer], (0, 0, 0, capacity - layers[layer].shape[2]))

    def begin(self, T, lengths=None):
        positions = super().begin(T, lengths)
        if T == 1 and self.kernels:
            # All layers share one page table, one set of counts and one plan. There is no ring: all
            # tokens count as promoted.
            pages = self.base.k[0].shape[2] // P
            table = torch.arange(self.base.B * self.Hkv * pages, device=self.device).int()
            table = table.view(self.base.B, self.Hkv, pages)
            self.page_table = table[self.first:self.first + self.B]
            counts = (self.num_tokens + self.num_new)[None, :, None].expand(1, self.B, self.Hkv)
            self.plan = self.kernels.plan_decode(counts.contiguous(), self.num_tokens, self.num_new,
                                                 ring_pages=0, window=1, page_size=P)
        else:
            starts = self.num_tokens.tolist()
            self.longest = max(starts) + T                  # keys of the longest sequence
            self.even = min(starts) == max(starts)          # all sequences have the same length
        return positions

    def attend(self, layer, q, k, v, cos, sin):
        """q (B, Hq, T, D), k, v (B, Hkv, T, D), unrotated -> attention output (B, Hq, T, D)."""
        if q.shape[2] == 1 and self.kernels:
            pages = [x[layer].view(-1, P, self.D) for x in (self.base.k, self.base.v)]
            q = self.kernels.rotate_and_write(q, k, v, cos, sin, *pages, self.page_table,
                                              self.num_tokens, self.num_new)
            return self.kernels.decode_attention(q, *pages, self.page_table, self.plan, 0,
                                                 early=True)
        q, k = rotate_both(q, k, cos, sin)

        # Padding is written too; the next tokens overwrite it before anyone may see it.
        b = torch.arange(self.first, self.first + self.B, device=self.device)[:, None]
        self.base.k[layer][b, :, self.positions] = k.transpose(1, 2)
        self.base.v[layer][b, :, self.positions] = v.transpose(1, 2)
        keys = self.base.k[layer][self.first:self.first + self.B, :, :self.longest]
        values = self.base.v[layer][self.first:self.first + self.B, :, :self.longest]
        return self.causal_attention(q, keys, values)

    def settings(self):
        """What a saved cache must have in common with one that loads it."""
        return {}

    def state(self):
        """The tensors that `save` writes: of each layer k and v (B, Hkv, S, D), S the longest."""
        S = int(self.num_tokens.max())
        parts = {}
        for layer in range(self.L):
            parts[f"k.{layer}"] = self.k[layer][:, :, :S]
            parts[f"v.{layer}"] = self.v[layer][:, :, :S]
        return parts

    def restore(self, path, file, num_tokens):
        """The reverse of `state`, from an untrusted file."""
        S = int(num_tokens.max())
        names = [(x, f"{name}.{layer}", layer) for layer in range(self.L)
                 for name, x in (("k", self.k), ("v", self.v))]
        for _, name, _ in names:
            files.check_stored(path, file, name, (self.B, self.Hkv, S, self.D), self.dtype)
        self.make_room(S)
        for x, name, layer in names:
            for start, stop, part in files.finite_parts(path, file, name, 1, self.device):
                x[layer][start:stop, :, :S] = part

    def causal_attention(self, q, keys, values):
        """Causal attention of the T last tokens, by the fastest way that the lengths allow."""
        T = q.shape[2]
        S = self.longest
        if T == S:                                          # a first prompt
            return attention(q, keys, values, is_causal=True)
        if self.even and self.kernels:
            return attention(q, keys, values, causal_lower_right(T, S))
        j = torch.arange(S, device=q.device)
        if T == 1:                                      # the G queries of a row see the same keys
            mask = None if self.even else j <= self.positions[:, None, :, None]
            grouped = q.view(self.B, self.Hkv, -1, self.D)
            return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(q.shape)
        out = torch.empty_like(q)
        for t in range(0, T, 256):                          # no mask is larger than 256 x S
            mask = j <= self.positions[:, None, t:t + 256, None]
            out[:, :, t:t + 256] = attention(q[:, :, t:t + 256], keys, values, mask)
        return out

    def kept_bytes(self):
        return self.dense_bytes()

    def reserved_bytes(self):
        return sum(x.nbytes for x in (*self.base.k, *self.base.v))


class DualCache(Cache):
    """The cache of Write-Gated KV: a ring for the window, and pages for what is promoted.

    A row is one list of pages, first its ring:

        page_table (L, B, Hkv, M) int32     a row's pages, in order
        counts     (L, B, Hkv)    int64     a row's promoted tokens

    Place n of a row is slot page_table[row, n // P] * P + n mod P of the pool. The first
    R = ceil(W / P) pages are the ring: the token at position p lies in place p mod W. Promoted
    tokens follow from place R * P on, oldest first. With W = 100 and P = 64:

        R = 2      |<---------- the ring ----------->|<------ promoted, oldest first ------>|
        place      0 .............. 99  100 .... 127   128 ...................... 127 + count
                   position mod 100     never used     the first promoted token is in 128
        page       page_table[row, 0] and [row, 1]     page_table[row, 2], [row, 3], ...

    A query sees the places n < min(tokens, W) and R * P <= n < R * P + count: one list, and so one
    loop over one page table in decode. A row wastes less than a page at its end (at most 63 tokens,
    17 KB at D = 64 in bf16, with gates and positions) and the unused places of its ring, here 28.
    """

    def __init__(self, model, admission, batch=1, window=None, tau=None, budget=None,
                 evict_by="gate", select=None):
        """budget and evict_by turn eviction on, select turns selection on (see their sections).

        budget: the most bytes that `kept_bytes` may be after a call. evict_by: the score of the
        tokens that go first, "gate" or "snapkv". select: the most tokens of a row that a step of
        decode attends to. UserError if budget or select is too small to work.
        """
        super().__init__(model, batch)
        self.step_keys = []             # of a decode step: each layer's new keys before RoPE
        self.admission = admission
        self.window = getattr(admission, "window", 256) if window is None else window
        self.tau = getattr(admission, "tau", 0.1) if tau is None else tau
        assert self.window >= 1, f"a window of {self.window}: every token must see itself"
        assert self.tau >= 0, f"tau {self.tau}: it must be at least 0, since {REFUSED} is refused"
        assert evict_by in EVICTION_SCORES, f"evict_by {evict_by!r}, not {list(EVICTION_SCORES)}"
        self.R = pages_for(self.window)

        self.chosen_pages = None        # pages after the ring that a step of decode attends to
        if select is not None:
            self.chosen_pages = select // P - self.R
            if self.chosen_pages < 1:
                raise UserError(f"selecting {select} tokens is too few: the window's pages and one "
                                f"more have {(self.R + 1) * P}")
        self.pool = PagePool(self.D, self.dtype, self.device, key_ranges=select is not None)
        rings = self.L * batch * self.Hkv * self.R
        self.pool.grow(rings)
        self.all_page_table = self.pool.take(rings).view(self.L, batch, self.Hkv, self.R)
        self.all_counts = torch.zeros(self.L, batch, self.Hkv, dtype=torch.long, device=self.device)
        self.pool.g[self.all_page_table.long()] = -math.inf         # no slot holds a token

        # On the device too, where a captured step finds its present value.
        self.shared.tau_now = self.tau
        self.tau_on_device = torch.full((1,), self.tau, dtype=torch.float32, device=self.device)
        self.shared.num_evicted = 0
        self.shared.num_evictions = 0
        self.shared.most_pages = None
        self.evict_by = evict_by
        self.queries = None
        if budget is not None:
            if evict_by == "snapkv":
                heads = model.config.num_heads
                self.queries = torch.zeros(self.L, batch, heads, QUERIES, self.D, dtype=self.dtype,
                                           device=self.device)
                self.num_queries = torch.zeros(self.L, batch, dtype=torch.long, device=self.device)
            self.set_budget(int(budget))

    @property
    def admission(self):
        return self._admission

    @admission.setter
    def admission(self, policy):
        self._admission = policy
        self.shared.reallocations += 1      # a captured step has the old one's parameters
        # For decode the gates of all layers in one call; None if the policy has only `gate`.
        stacked = getattr(policy, "stacked", None)
        self.all_gates = stacked() if stacked else None

    @property
    def page_table(self):
        return self.base.all_page_table[:, self.first:self.first + self.B]

    @property
    def counts(self):
        return self.base.all_counts[:, self.first:self.first + self.B]

    def forget(self):
        """Promoted tokens' pages go back to the free stack; rings keep theirs, emptied."""
        if self.view_of is None:
            self.shared.num_evicted = 0
            self.shared.num_evictions = 0
            self.set_tau(self.tau)
        table = self.page_table
        columns = torch.arange(table.shape[3] - self.R, device=self.device)
        used = columns < pages_for(self.counts)[..., None]                  # (L, B, Hkv, M - R)
        self.pool.release(table[..., self.R:][used])
        table[..., self.R:] = 0
        self.counts.zero_()
        rings = table[..., :self.R].long()
        for x in (self.pool.k, self.pool.v, self.pool.pos):
            x[rings] = 0
        self.pool.g[rings] = -math.inf

    def clone(self):
        """An independent copy: what is added to one is not seen by the other."""
        other = self.copy_of_base()
        other.pool = self.pool.clone()
        names = ["all_num_tokens", "all_page_table", "all_counts", "tau_on_device"]
        if self.queries is not None:
            names += ["queries", "num_queries"]
        for name in names:
            setattr(other, name, getattr(self, name).clone())
        return other

    # ------------------------------------------------- room in the pool (skip at first reading)

    def make_room(self, tokens):
        """Room for `tokens` more tokens in each row, whatever their gates say.

        Asking the device for some numbers here, once a call, spares every layer from asking. A
        row that takes n tokens needs at most ceil(n / P) new pages. With P = 64 and n = 70 that
        is at most 2: a row of 50 tokens needs 1 more page (1 to 2), a row of 60 needs 2 (1 to 3).

        Gates are not known yet, so a prefill must find free pages for all its tokens, although most
        will be refused. Read a long prompt in chunks, and only one chunk's worth stands empty.
        """
        extra = pages_for(tokens)
        base = self.base
        wanted = self.L * self.B * self.Hkv * extra
        limit = self.shared.most_pages
        if limit is not None:
            # This may evict, since a captured step cannot.
            wanted = base.free_pages_needed(wanted, self.B * self.Hkv * extra, evict=tokens <= P)
        num_free = self.pool.num_free[0].long()
        longest = pages_for(self.counts.max())          # pages of the longest row
        promoted = base.all_counts.sum()
        departed = (base.all_num_tokens - self.window).clamp(min=0).sum()
        # One synchronization for all four.
        numbers = torch.stack((num_free, longest, promoted, departed)).tolist()
        num_free, longest, promoted, departed = numbers
        if num_free < wanted:
            larger = self.pool_size(wanted, promoted, departed)
            if limit is not None:               # a budget's pages, and one layer's beyond them
                rings = base.L * base.B * self.Hkv * self.R
                larger = min(larger, 1 + rings + limit + self.B * self.Hkv * extra)
            self.pool.grow(max(wanted - num_free, larger - len(self.pool.k)))
            self.shared.reallocations += 1
        columns = self.R + longest + extra
        table = base.all_page_table
        if table.shape[3] < columns:
            base.all_page_table = F.pad(table, (0, columns + columns // 4 - table.shape[3]))
            self.shared.reallocations += 1

    def pool_size(self, wanted, promoted, departed):
        """The least size, in pages, of a pool that has to grow.

        A growing pool is copied. So where the lengths of prompts are known, the pool grows early,
        while it is small: to 1.04 times what all of them will need at the rate so far, plus one
        call's room. If 500 pages were promoted from 8K of 200K tokens, that is 500 * 25 * 1.04
        pages and one call's. Where lengths are not known, it grows by a tenth.

        departed: how many tokens have left the windows, over all sequences. Only those count.
        """
        pages = len(self.pool.k)
        will_depart = sum(max(0, tokens - self.window) for tokens in self.shared.expected)
        if will_depart <= departed or departed == 0:
            return pages + pages // 10
        rows = self.L * self.base.B * self.Hkv
        will_be_promoted = promoted * will_depart // departed       # at the rate so far
        needed = pages_for(will_be_promoted) + rows     # each row's last page is a partial one
        return rows * self.R + needed + needed // 25 + wanted

    def ring_slots(self, table, positions):
        """Flat slots (..., Hkv, n) in the pool where tokens at positions (B, n) lie in their rings.

        table: the page table (B, Hkv, M) of one layer, or (L, B, Hkv, M) of all.
        """
        place = (positions % self.window)[:, None]                          # (B, 1, n)
        pages = table.gather(-1, (place // P).expand(*table.shape[:-1], -1))
        return pages.long() * P + place % P

    # ------------------------------------------------------------------------------ a call begins

    def begin(self, T, lengths=None):
        positions = super().begin(T, lengths)
        self.step_keys = []
        if T == 1:
            # Which tokens leave the rings depends only on what is in them, not on what this step
            # computes. So all layers promote now, in one launch; then all counts are known, and the
            # work of all layers' attention is divided in another.
            if self.kernels:
                self.slots = self.kernels.promote_leaving(
                    self.pool, self.page_table, self.counts, self.num_tokens, self.num_new,
                    self.window, self.base.tau_on_device)
                # attended() is self.counts, unless there is a selection. Then how many tokens a row
                # attends to is known, although which ones is not.
                self.plan = self.kernels.plan_decode(self.attended(), self.num_tokens, self.num_new,
                                                     self.R, self.window, P)
            else:
                self.promote_leaving()
                # What a selection reads depends on each layer's queries.
                if not self.selects():
                    self.plan = self.plan_decode(self.page_table, self.counts)
        return positions

    def promote_leaving(self):
        """The token that leaves each ring as one new token arrives: to the pages, or gone."""
        # The new token takes the slot of the one that leaves, since (p - W) mod W is p mod W;
        # `decode` writes it there.
        self.slots = self.ring_slots(self.page_table, self.positions)       # (L, B, Hkv, 1)
        leaving = (self.num_tokens >= self.window) & (self.num_new > 0)     # (B)
        g = self.pool.g.view(-1)[self.slots]                                # (L, B, Hkv, 1)
        promote_mask = leaving[:, None, None] & (g >= self.shared.tau_now)
        if promote_mask.any():
            tokens = self.pool.read(self.slots)
            self.promote(self.page_table, self.counts, promote_mask, *tokens)

    def promote(self, table, counts, promote_mask, k, v, g, pos):
        """Append the tokens where promote_mask is True to their rows' lists, in order.

        table (n, B, Hkv, M) and counts (n, B, Hkv) of n layers, updated in place; promote_mask, g
        and pos (n, B, Hkv, T), k, v (n, B, Hkv, T, D). Twin: kernels.promote.
        """
        # The row's promoted tokens after each of the T. From 63 and the mask 1 0 1: 64 64 65. The
        # first goes to the last slot of the row's old page, the other needs a new one.
        num_old = counts[..., None] + promote_mask.cumsum(-1)               # (n, B, Hkv, T)
        after = num_old[..., -1]
        # A row's list grows from `have` pages to `need`: its new entries get free pages.
        column = torch.arange(table.shape[3] - self.R, device=self.device)
        have = pages_for(counts)[..., None]
        need = pages_for(after)[..., None]
        fresh = (have <= column) & (column < need)                  # (n, B, Hkv, M - R)
        table[..., self.R:][fresh] = self.pool.take(int(fresh.sum()))
        counts_before = counts.clone()
        counts.copy_(after)

        layer, b, h, _ = promote_mask.nonzero().unbind(1)
        n = num_old[promote_mask] - 1       # the number of each promoted token in its row, from 0
        slots = table[layer, b, h, self.R + n // P].long() * P + n % P
        self.pool.write(slots, *(x[promote_mask] for x in (k, v, g, pos)))
        self.update_key_ranges(table, counts_before, counts)        # for selection only

    # ------------------------------------------------------------------------------ in each layer

    def attend(self, layer, q, k, v, cos, sin):
        """q (B, Hq, T, D), k, v (B, Hkv, T, D), unrotated -> attention output (B, Hq, T, D)."""
        if q.shape[2] == 1:
            return self.decode(layer, q, k, v, cos, sin)
        q, k_rotated = rotate_both(q, k, cos, sin)
        g = self.admission.gate(layer, k, k_rotated, self.positions)        # (B, Hkv, T)
        if self.base.queries is not None:
            self.record_queries(layer, q)
        return self.prefill(layer, q, k_rotated, v, g)

    def prefill(self, layer, q, k, v, g):
        """Many new tokens in four steps: lay out the band, promote, attend, rewrite the ring.

        The *band* is one stretch of keys: the W tokens before the call, out of the ring, and then
        the call's own. Index W + t is new token t; index t is the token that leaves the window when
        new token t arrives:

            band index      0 ... W-1   |   W ... W+T-1
            position        n-W ... n-1 |   n ... n+T-1         (n tokens before the call)
        """
        W = self.window
        table = self.page_table[layer]
        # 1. The band. In a short text the ring's positions begin below 0. Those places are empty,
        # with the gate -inf.
        positions = self.num_tokens[:, None] + torch.arange(-W, 0, device=self.device)  # (B, W)
        ring_k, ring_v, ring_g, _ = self.pool.read(self.ring_slots(table, positions))
        band_k = torch.cat((ring_k, k), dim=2)                              # (B, Hkv, W + T, D)
        band_v = torch.cat((ring_v, v), dim=2)
        band_g = torch.cat((ring_g, g), dim=2)                              # (B, Hkv, W + T)

        # 2. Promotion.
        num_old = self.promote_from_band(layer, band_k, band_v, band_g)     # (B, Hkv, T)

        # 3. Attention.
        tau = self.shared.tau_now
        if self.kernels:
            y = self.kernels.prefill_attention(q, band_k, band_v, band_g, self.pool.k, self.pool.v,
                                               table[..., self.R:], num_old, W, tau)
        else:
            # Each row's pages as one list: refused keys are neither read nor multiplied.
            old_k = self.all_rows(self.pool.k, layer)
            old_v = self.all_rows(self.pool.v, layer)
            y = banded_attention(q, band_k, band_v, band_g, old_k, old_v, num_old, W, tau)

        # 4. The ring takes the newest W tokens of the band: from index num_new of it on.
        newest = self.num_new[:, None] + torch.arange(W, device=self.device)            # (B, W)
        positions = self.num_tokens[:, None] - W + newest
        slots = self.ring_slots(table, positions)                           # (B, Hkv, W)
        new_k, new_v, new_g = [gather_tokens(x, newest) for x in (band_k, band_v, band_g)]
        self.pool.write(slots, new_k, new_v, new_g, positions[:, None].expand_as(slots))
        return y

    def promote_from_band(self, layer, band_k, band_v, band_g):
        """Step 2 of `prefill`. Band index t leaves the window when new token t arrives.

        With W = 4 and T = 6 these are the four tokens of the ring, and the call's own tokens 0 and
        1 (band indices 4 and 5). Under a budget it may evict, and change band_g.

        Returns num_old (B, Hkv, T), how many *old* tokens there are for new token t: promoted, and
        outside its window. Tokens that are promoted later in this call stand after them in the
        list; t still has those in its window, and reads them from the band.
        """
        T = band_g.shape[2] - self.window
        table = self.page_table[layer]
        counts = self.counts[layer]
        valid = torch.arange(T, device=self.device) < self.num_new[:, None, None]
        promote_mask = (band_g[:, :, :T] >= self.shared.tau_now) & valid    # (B, Hkv, T)
        num_old = counts[..., None] + promote_mask.cumsum(-1)
        band_index = torch.arange(band_g.shape[2], device=self.device)
        band_pos = self.num_tokens[:, None] - self.window + band_index      # (B, W + T)
        if self.kernels:
            counts_before = counts.clone()
            self.kernels.promote(self.pool, table, counts, promote_mask, num_old, band_k, band_v,
                                 band_g, band_pos, self.R)
            self.update_key_ranges(table, counts_before, counts)
        else:
            pos = band_pos[:, None, :T].expand_as(promote_mask)
            leaving = (promote_mask, band_k[:, :, :T], band_v[:, :, :T], band_g[:, :, :T], pos)
            self.promote(table[None], counts[None], *(x[None] for x in leaving))

        if self.base.evict_over_budget():
            # The eviction may have taken tokens that were just promoted. So the band's gates now
            # say what is held (+inf) and what is lost, and `g >= tau` means `held`. num_old counts
            # the held tokens older than the band, and those of the band up to t. If 100 are held,
            # 3 of them at band indices 5, 9 and 20: 97 before 5, 98 from 5 on, 99 from 9 on, 100
            # from 20 on.
            held = self.held_of_band(layer, T)                              # (B, Hkv, T) bool
            band_g[:, :, :T].masked_fill_(promote_mask, REFUSED).masked_fill_(held, math.inf)
            num_old = counts[..., None] - held.sum(-1, keepdim=True) + held.cumsum(-1)
        return num_old

    def decode(self, layer, q, k, v, cos, sin):
        """One new token a sequence: into its ring, and then attention over the row's whole list.

        `begin` has promoted the token whose place it takes. Its own gate comes in `end`.
        """
        self.step_keys.append(k)
        q = self.write_new_token(layer, q, k, v, cos, sin)
        if self.base.queries is not None:
            self.record_queries(layer, q)
        table = self.page_table[layer]
        if self.kernels:
            if self.selects():
                table = self.kernels.select_pages(q, self.pool, table, self.counts[layer], self.R,
                                                  self.chosen_pages)
            return self.kernels.decode_attention(q, self.pool.k, self.pool.v, table, self.plan,
                                                 layer, early=not self.selects())
        if self.selects():          # the pages depend on q, so this layer needs a plan of its own
            table = self.select_pages(layer, q)[None]               # (1, B, Hkv, R + chosen)
            counts = self.attended()[layer:layer + 1]               # (1, B, Hkv)
            plan = self.plan_decode(table, counts)
            pages, row, unseen = [tensors[0] for tensors in plan]
        else:
            pages, row, unseen = [tensors[layer] for tensors in self.plan]
        q = q.reshape(self.B * self.Hkv, -1, self.D)                        # (rows, G, D)
        k = self.pool.k.index_select(0, pages)                              # (n, P, D)
        v = self.pool.v.index_select(0, pages)
        y = paged_attention(q, k, v, row, unseen)
        return y.view(self.B, -1, 1, self.D)

    def write_new_token(self, layer, q, k, v, cos, sin):
        """Write the rotated key and the value of the new token; returns the rotated query."""
        pool = self.pool
        if self.kernels:
            return self.kernels.rotate_and_write(q, k, v, cos, sin, pool.k, pool.v,
                                                 self.page_table[layer], self.num_tokens,
                                                 self.num_new, self.window, pool.pos)
        q, k = rotate_both(q, k, cos, sin)
        slots = self.slots[layer]                                           # (B, Hkv, 1)
        pos = self.positions[:, None].expand_as(slots)
        if self.padded:                 # a sequence without a new token writes nothing
            active = self.num_new > 0
            slots, k, v, pos = (x[active] for x in (slots, k, v, pos))
        pool.write(slots, k, v, None, pos)
        return q

    def end(self):
        if self.step_keys:
            self.write_gates()
            self.step_keys = []
        super().end()

    def write_gates(self):
        """Decode: the gates of the new tokens of all layers, into their places in the rings.

        They are not needed before these tokens leave their rings. So all layers' are computed after
        the last layer: in one call, if the policy has `stacked`.
        """
        k = torch.stack(self.step_keys, dim=1)                              # (B, L, Hkv, 1, D)
        slots = self.slots.transpose(0, 1)                                  # (B, L, Hkv, 1)
        k_rotated = self.pool.k.view(-1, self.D)[slots]
        if self.all_gates is not None:
            g = self.all_gates(k, k_rotated, self.positions)                # (B, L, Hkv, 1)
        else:
            g = torch.stack([self.admission.gate(layer, k[:, layer], k_rotated[:, layer],
                                                 self.positions) for layer in range(self.L)], dim=1)
        if self.padded:         # a sequence without a new token keeps the gate that is there
            old = self.pool.g.view(-1)[slots]
            g = torch.where((self.num_new > 0)[:, None, None, None], g, old)
        self.pool.write(slots, None, None, g, None)

    def plan_decode(self, table, counts):
        """What decode reads, by page tables (L, B, Hkv, M) and counts (L, B, Hkv) of some layers.

        Returns (pages, row, unseen), each a tuple with a tensor for each layer. pages (n): the ids
        of all pages in use, row after row; row (n): the row of each, in its layer; unseen (n, P)
        bool: the tokens of a page that a query does not see.
        """
        columns = torch.arange(table.shape[3], device=self.device)
        used = columns < self.R + pages_for(counts)[..., None]              # (L, B, Hkv, M)
        layer, b, h, column = used.nonzero().unbind(1)                      # of each used page
        # The ring holds tokens in its places below min(tokens, W), the rest of the list to its end.
        in_ring = (self.num_tokens + self.num_new).clamp(max=self.window)[b]
        end = torch.where(column < self.R, in_ring, self.R * P + counts[layer, b, h])
        unseen = column[:, None] * P + torch.arange(P, device=self.device) >= end[:, None]
        sizes = used.flatten(1).sum(1).tolist()         # pages of each layer
        pages = table[used].long()
        row = b * self.Hkv + h                          # 0 .. B * Hkv - 1
        return pages.split(sizes), row.split(sizes), unseen.split(sizes)

    # ------------------------------------------------------- eviction (skip at first reading)
    #
    # Admission bounds nothing: a text in which everything matters keeps everything. With a budget
    # the promoted tokens of all rows together take at most `most_pages` pages. When they would take
    # more, those of lowest score are evicted, down to 90% of the limit, so that it happens rarely.
    # There are two scores:
    #
    #     gate      The token's own gate. No head has a quota, which would undo what gates decided.
    #     snapkv    The attention that the last queries give it (arXiv 2404.14469). Weights add up
    #               to 1 in each row, so long rows have lower ones, and lose first.
    #
    # By gate, eviction is a tau that rises. Let tau' be just above the highest gate that goes. All
    # held tokens have passed an older, lower tau; so what is left is what admission at tau' would
    # have promoted. Tokens that leave the ring later must reach tau'. There are two exceptions: the
    # first tokens stay as attention sinks; and if of several tokens with exactly the same gate only
    # the newest can stay, then tau' is that gate.
    #
    # The definition becomes
    #
    #     visible(i, j)  =  j <= i  and  ( i - j < W  or  held(j) )
    #
    # where held(j) says that j is in its row's pages when i's layer attends. When evictions come
    # depends on how a text is split into calls: after the first one, another split gives another
    # result.

    def set_budget(self, budget):
        """Turn a budget in bytes into pages; UserError if it is smaller than what works at all."""
        assert self.view_of is None, "a budget is one of the whole cache"
        # Two pages a row: one for what is held, one that a row may begin in 64 steps of decode.
        own = torch.tensor([self.fixed_bytes(), self.all_counts.numel()], device=self.device)
        fixed, rows = all_reduce_sum(own, self.processes).tolist()
        least = fixed + 2 * rows * self.page_bytes()
        if budget < least:
            queries = "" if self.queries is None else ", SnapKV's queries"
            raise UserError(f"a budget of {budget:,} bytes is too small for this cache: its "
                            f"windows{queries} and two pages a row take {least:,} "
                            f"({least / 2**20:,.1f} MiB)")
        self.shared.most_pages = (budget - fixed) // self.page_bytes()
        self.shared.most_steps = P
        self.evict_over_budget()

    def has_budget(self):
        return self.shared.most_pages is not None

    def free_pages_needed(self, wanted, wanted_a_layer, evict):
        """How many free pages a call needs, under a budget; it may evict to have them.

        wanted: if all its tokens were promoted, in all layers; wanted_a_layer: in one. A call of at
        most P tokens evicts now (evict=True), because captured steps cannot. A longer one evicts
        after each layer's promotion, so it fills the limit and one layer beyond it at most. With
        100 pages left below the limit and 32 layers that want 64 each: min(2048, 100 + 64) = 164.
        """
        limit = self.shared.most_pages
        wanted_by_all = wanted * self.processes
        if evict and self.pages_in_all_rows() + wanted_by_all > limit:
            self.evict(min(9 * limit // 10, limit - wanted_by_all))
            return wanted
        # Of several processes one may fill what the others let go, so only its own pages count.
        own = int(pages_for(self.all_counts).sum())
        return min(wanted, limit - own + wanted_a_layer)

    def pages_in_all_rows(self):
        """How many pages of promoted tokens there are, in all processes."""
        return int(all_reduce_sum(pages_for(self.all_counts).sum(), self.processes))

    def evict_over_budget(self):
        """After a promotion: evict if there are too many pages, and say whether that was so.

        Under a budget this asks the device once a layer.
        """
        limit = self.shared.most_pages
        if limit is None or self.pages_in_all_rows() <= limit:
            return False
        self.evict(9 * limit // 10)
        return True

    def evict(self, target):
        """Evict the promoted tokens of lowest score until all rows together use `target` pages.

        The first tokens of a text stay, as attention sinks. What is left of a row moves together,
        in order, and pages that become empty return to the pool.
        """
        table = self.all_page_table.flatten(0, 2)                           # (rows, M), a view
        counts = self.all_counts.flatten()                                  # (rows), a view
        columns = torch.arange(table.shape[1] - self.R, device=self.device)
        row, column = (columns < pages_for(counts)[:, None]).nonzero().unbind(1)
        if self.pages_in_all_rows() <= target:
            return
        pages = table[row, self.R + column].long()      # (n): all pages in use, row after row
        held = column[:, None] * P + torch.arange(P, device=self.device) < counts[row][:, None]
        pos = self.pool.pos[pages]                                          # (n, P)
        scores = EVICTION_SCORES[self.evict_by](self, pages, row, held)     # (n, P)
        scores = scores.masked_fill(pos < SINKS, math.inf)
        scores = scores.masked_fill(~held, -1)          # last: positions there are stale
        keep, cut = best_tokens(scores, pos, row, len(counts), target, self.processes)

        remaining = torch.zeros_like(counts).index_add_(0, row, keep.sum(dim=1))
        if self.kernels:
            self.kernels.compact(self.pool, table, counts, keep, self.R)
        else:
            self.compact(table, pages, row, keep, remaining)
        empty = column >= pages_for(remaining)[row]
        self.pool.release(pages[empty].int())
        table[row[empty], self.R + column[empty]] = 0
        self.shared.num_evictions += 1
        self.shared.num_evicted += int((counts - remaining).sum())
        counts.copy_(remaining)
        # Every full page may have new contents.
        nothing = torch.zeros_like(self.all_counts)
        self.update_key_ranges(self.all_page_table, nothing, self.all_counts)
        if self.evict_by == "gate":
            self.set_tau(max(cut, self.shared.tau_now))

    def compact(self, table, pages, row, keep, remaining):
        """Move the tokens to keep (n, P) of each row together, in order. Twin: kernels.compact.

        pages, row (n): the pages in use and their rows, row after row; remaining (rows): tokens to
        keep.
        """
        # A row's promoted token n goes to place R * P + n. It was there, or further on. If two rows
        # keep 3 and 2 tokens, n is: 0 1 2 3 4, less those of earlier rows, 0 0 0 3 3: 0 1 2 0 1.
        row_of_token = row[:, None].expand_as(keep)[keep]
        before = remaining.cumsum(0) - remaining
        n = torch.arange(len(row_of_token), device=self.device) - before[row_of_token]
        source = (pages[:, None] * P + torch.arange(P, device=self.device))[keep]
        target = table[row_of_token, self.R + n // P].long() * P + n % P
        self.pool.write(target, *self.pool.read(source))

    def set_tau(self, tau):
        self.shared.tau_now = tau
        self.tau_on_device.fill_(tau)

    def held_of_band(self, layer, T):
        """(B, Hkv, T) bool: which of the band's first T tokens are in their row's pages.

        With 500 tokens before the call and W = 100, position 437 has band index 37.
        """
        n = torch.arange((self.page_table.shape[3] - self.R) * P, device=self.device)
        pages = self.page_table[layer, ..., self.R:].long()
        pos = self.pool.pos[pages].flatten(2)                               # (B, Hkv, (M - R) P)
        index = pos - (self.num_tokens - self.window)[:, None, None]
        in_band = (n < self.counts[layer][..., None]) & (index >= 0) & (index < T)
        index = index.masked_fill(~in_band, T)          # index T is a spare column, cut off below
        held = torch.zeros(self.B, self.Hkv, T + 1, dtype=torch.bool, device=self.device)
        return held.scatter_(2, index.long(), True)[..., :T]

    def record_queries(self, layer, q):
        """Keep each sequence's last QUERIES rotated queries, that of position p at index p mod
        QUERIES.

        If 3 of T = 5 are valid: n = 5, index -2 -1 0 1 2, and the first two write what was there.
        """
        n = min(q.shape[2], QUERIES)
        index = self.num_new[:, None] - n + torch.arange(n, device=self.device)         # (B, n)
        store_index = (self.num_tokens[:, None] + index) % QUERIES
        b = torch.arange(self.B, device=self.device)[:, None]
        queries = self.base.queries[layer, self.first:self.first + self.B]
        new = q.transpose(1, 2)[b, index.clamp(min=0)]                      # (B, n, Hq, D)
        valid = (index >= 0)[..., None, None]       # fewer than n new ones: the older ones stay
        queries[b, :, store_index] = torch.where(valid, new, queries[b, :, store_index])
        num_queries = self.base.num_queries[layer, self.first:self.first + self.B]
        num_queries.copy_(self.num_tokens + self.num_new)

    # ------------------------------------------------------ selection (skip at first reading)
    #
    # A step of decode attends to the ring, to the row's last, partial page, and of its full pages
    # to those that may hold the largest scores (Quest, arXiv 2406.10774). With the least and the
    # largest number that a page's keys have in each channel,
    #
    #     q . k  <=  sum over d of max(q_d low_d, q_d high_d)      for every key k of the page
    #
    # is an upper bound, and a page's bound costs the reading of two keys instead of 64. The pages
    # chosen, in their order, are a shorter page table for the same attention.

    def selects(self):
        """Does this call select?"""
        return self.chosen_pages is not None and self.shared.in_decode

    def attended(self):
        """(L, B, Hkv): how many promoted tokens of each row a step of decode attends to.

        If 3 pages may be chosen, a row of 200 tokens (pages of 64, 64, 64 and 8) gets 2 full pages
        and its last one: 136 tokens.
        """
        if not self.selects():
            return self.counts
        in_last_page = (self.counts - 1) % P + 1        # 64 for an empty row: the minimum is 0
        return self.counts.minimum((self.chosen_pages - 1) * P + in_last_page)

    def select_pages(self, layer, q):
        """One query a head (B, Hq, 1, D) -> page table (B, Hkv, R + pages) of what it attends to.

        A KV head's queries choose together: the largest bound of the G counts. Twin:
        kernels.select_pages.
        """
        table = self.page_table[layer]
        counts = self.counts[layer][..., None]
        pages = table[..., self.R:].long()                                  # (B, Hkv, M - R)
        q = q.view(self.B, self.Hkv, -1, 1, self.D).float()                 # (B, Hkv, G, 1, D)
        low = self.pool.low[pages][:, :, None]                              # (B, Hkv, 1, M - R, D)
        high = self.pool.high[pages][:, :, None]
        bounds = torch.maximum(q * low, q * high).sum(-1).amax(2)           # (B, Hkv, M - R)
        column = torch.arange(pages.shape[2], device=self.device)
        partial = (column == counts // P) & (counts % P > 0)
        bounds = bounds.masked_fill(column >= counts // P, -math.inf)
        bounds = bounds.masked_fill(partial, math.inf)      # no bound yet: it always goes along
        best = bounds.argsort(dim=-1, descending=True, stable=True)[..., :self.chosen_pages]
        return torch.cat((table[..., :self.R], table.gather(2, self.R + best.sort().values)), dim=2)

    def update_key_ranges(self, table, before, after):
        """Store the key ranges (`low`, `high`) of pages that have become full.

        They became so when counts went from `before` to `after`. table (..., M), before and after
        (...). Nothing to do without selection.
        """
        if self.chosen_pages is None:
            return
        if self.kernels:
            self.kernels.update_key_ranges(self.pool, table, before, after, self.R)
            return
        column = torch.arange(table.shape[-1] - self.R, device=self.device)
        filled = (column >= before[..., None] // P) & (column < after[..., None] // P)
        pages = table[..., self.R:][filled].long()
        self.pool.low[pages] = self.pool.k[pages].amin(1)
        self.pool.high[pages] = self.pool.k[pages].amax(1)

    # ------------------------------------------------------- saved caches (skip at first reading)

    def settings(self):
        """What a saved cache must have in common with one that loads it."""
        identity = getattr(self.admission, "identity", lambda: type(self.admission).__name__)
        return dict(page=P, window=self.window, tau=self.tau, admission=identity(),
                    evict_by=self.evict_by if self.queries is not None else "gate")

    def state(self):
        """The tensors that `save` writes: the pages in use, row after row, and what rows need.

        k, v (n, P, D), g, pos (n, P): a row's ring, then its promoted tokens.
        """
        pages = self.page_table[self.pages_in_use(self.counts)].long()
        parts = {name: getattr(self.pool, name)[pages] for name in ("k", "v", "g", "pos")}
        parts.update(counts=self.counts, tau_now=self.tau_on_device)
        parts["evicted"] = torch.tensor([self.shared.num_evicted, self.shared.num_evictions])
        if self.queries is not None:
            parts.update(queries=self.queries, num_queries=self.num_queries)
        return parts

    def pages_in_use(self, counts):
        """(L, B, Hkv, M) bool: which columns of the page table have a page, by counts."""
        column = torch.arange(self.page_table.shape[3], device=self.device)
        return column < self.R + pages_for(counts)[..., None]

    def restore(self, path, file, num_tokens):
        """The reverse of `state`, from an untrusted file. Pages get new ids."""
        shape = (self.L, self.B, self.Hkv)
        counts = files.stored(path, file, "counts", shape, torch.int64)
        departed = (num_tokens - self.window).clamp(min=0)          # have left the window, (B)
        if (counts < 0).any() or (counts > departed[:, None]).any():
            raise UserError(f"{path}: a row's count of promoted tokens should be from 0 to the "
                            "number of tokens that have left the window")
        n = int((self.R + pages_for(counts)).sum())
        for name in ("k", "v"):
            files.check_stored(path, file, name, (n, P, self.D), self.dtype)
        tau_now = files.stored(path, file, "tau_now", (1,), torch.float32).item()
        evicted = files.stored(path, file, "evicted", (2,), torch.int64).tolist()
        if not self.tau_on_device.item() <= tau_now < math.inf or min(evicted) < 0:
            raise UserError(f"{path}: tau_now {tau_now} or evicted {evicted} is out of range")
        g = files.stored(path, file, "g", (n, P), torch.float32)
        pos = files.stored(path, file, "pos", (n, P), torch.int32)
        g = self.checked_slots(path, g, pos, counts, num_tokens)

        # Only now memory is taken: free pages for all rows, in the file's order.
        more = n - self.L * self.B * self.Hkv * self.R
        if int(self.pool.num_free) < more:
            self.pool.grow(more - int(self.pool.num_free))
        columns = self.R + int(pages_for(counts.max()))
        if self.page_table.shape[3] < columns:
            self.all_page_table = F.pad(self.page_table, (0, columns - self.page_table.shape[3]))
        self.shared.reallocations += 1
        counts = counts.to(self.device)
        used = self.pages_in_use(counts)
        used[..., :self.R] = False                                  # rings have their pages
        self.page_table[used] = self.pool.take(more)
        self.counts.copy_(counts)
        pages = self.page_table[self.pages_in_use(counts)].long()
        self.pool.g[pages] = g.to(self.device)
        self.pool.pos[pages] = pos.to(self.device)
        for name in ("k", "v"):
            x = getattr(self.pool, name)
            for start, stop, part in files.finite_parts(path, file, name, files.PAGES_AT_ONCE,
                                                        self.device):
                x[pages[start:stop]] = part
        if self.queries is not None:
            size = tuple(self.queries.shape)
            files.check_stored(path, file, "queries", size, self.dtype)
            self.num_queries.copy_(num_tokens.expand(self.L, -1))
            for start, stop, part in files.finite_parts(path, file, "queries", 1, self.device):
                self.queries[start:stop] = part

        nothing = torch.zeros_like(self.all_counts)
        self.update_key_ranges(self.all_page_table, nothing, self.all_counts)
        if tau_now > self.tau_on_device.item():
            self.set_tau(tau_now)
        self.shared.num_evicted, self.shared.num_evictions = evicted
        self.evict_over_budget()

    def checked_slots(self, path, g, pos, counts, num_tokens):
        """The gates g (n, P) with -inf in the ring's empty slots; UserError if g or pos is broken.

        A row's promoted tokens must ascend and have left the window; those in its ring are the
        last W, each in the place of its position.
        """
        column = torch.arange(self.R + int(pages_for(counts.max())), device="cpu")
        used = column < (self.R + pages_for(counts.flatten()))[:, None]
        row, column = used.nonzero().unbind(1)                              # of each page
        S = num_tokens[row // self.Hkv % self.B][:, None]                   # (n, 1)
        place = column[:, None] * P + torch.arange(P, device="cpu")         # (n, P)
        in_ring = (column < self.R)[:, None].expand_as(place)
        is_token = torch.where(in_ring, place < S.clamp(max=self.window),
                               place - self.R * P < counts.flatten()[row][:, None])
        newest = S - 1 - (S - 1 - place) % self.window      # the last position with this place
        right = torch.where(in_ring, pos == newest, (pos >= 0) & (pos < S - self.window))
        promoted = (is_token & ~in_ring).flatten()
        rows = row.repeat_interleave(P)
        neighbors = promoted[1:] & promoted[:-1] & (rows[1:] == rows[:-1])
        ascend = pos.flatten().diff() > 0
        if not right[is_token].all() or not ascend[neighbors].all():
            raise UserError(f"{path}: the positions of a row's tokens do not ascend, or are not "
                            "where they should be")
        if g[is_token].isnan().any() or (g[is_token] == -math.inf).any():
            raise UserError(f"{path}: a token's gate is NaN or -infinity")
        return torch.where(is_token, g, torch.where(in_ring, -math.inf, 0.0))

    # --------------------------------------------------------------------------- looking inside

    def row(self, x, layer, b, h):
        """A row's promoted tokens, oldest first: (count, ...) out of x, a tensor of the pool."""
        count = int(self.counts[layer, b, h])
        ids = self.page_table[layer, b, h, self.R:self.R + pages_for(count)]
        return x[ids.long()].flatten(0, 1)[:count]

    def all_rows(self, x, layer):
        """`row` for every sequence and head: a list of lists."""
        return [[self.row(x, layer, b, h) for h in range(self.Hkv)] for b in range(self.B)]

    def num_promoted(self):
        """Tokens in pages, over all rows."""
        return int(self.counts.sum())

    def kept_bytes(self):
        """Bytes of what is kept: whole pages of rings and promoted tokens, tables, counts."""
        return self.fixed_bytes() + int(pages_for(self.counts).sum()) * self.page_bytes()

    def page_bytes(self):
        """Bytes of a page: K, V, gate and position of each slot, key range, entry in a table."""
        key = self.D * self.dtype.itemsize
        key_range = 0 if self.chosen_pages is None else 2 * key
        return P * (2 * key + 8) + key_range + 4

    def fixed_bytes(self):
        """Bytes of what does not grow: rings, counts, lengths, and SnapKV's queries."""
        rows = self.L * self.B * self.Hkv
        queries = 0
        if self.base.queries is not None:
            queries = self.base.queries[:, :self.B].nbytes + 8 * self.L * self.B
        return rows * self.R * self.page_bytes() + 8 * rows + 8 * self.B + queries

    def reserved_bytes(self):
        """Bytes held, used or not."""
        tensors = [*self.pool.tensors().values(), self.base.all_page_table, self.base.all_counts,
                   self.base.all_num_tokens]
        if self.base.queries is not None:
            tensors.append(self.base.queries)
        return sum(t.nbytes for t in tensors)

    def admitted(self, sequence=0):
        """(L, Hkv, S) bool: which tokens of a sequence are, or will be on leaving, in the pages."""
        S = int(self.num_tokens[sequence])
        out = torch.zeros(self.L, self.Hkv, S, dtype=torch.bool, device="cpu")
        recent = torch.arange(max(0, S - self.window), S, device=self.device)
        slots = self.ring_slots(self.page_table[:, sequence:sequence + 1], recent[None])
        out[:, :, max(0, S - self.window):] = \
            (self.pool.g.view(-1)[slots[:, 0]] >= self.shared.tau_now).cpu()
        for layer in range(self.L):
            for h in range(self.Hkv):
                out[layer, h, self.row(self.pool.pos, layer, sequence, h).long().cpu()] = True
        return out


# ------------------------------------------------ eviction: scores, choice (skip at first reading)

def gate_scores(cache, pages, row, held):
    """The gates (n, P) of promoted tokens."""
    return cache.pool.g[pages]


def snapkv_scores(cache, pages, row, held):
    """The attention (n, P) that the last queries give to promoted tokens.

    pages (n), row (n) and held (n, P) bool: all pages in use, their rows, and their slots that hold
    a token. Four steps:

        1. for each of the last min(W, QUERIES) queries: a softmax over the row's promoted keys
        2. over the G queries of a group: the maximum
        3. over the queries: the mean
        4. over 5 neighbors in the row: the maximum

    Every key in the pages is older than all of these queries: it has left the window.
    """
    table = cache.all_page_table.flatten(0, 2)
    counts = cache.all_counts.flatten()
    score = cache.kernels.query_attention if cache.kernels else query_attention
    weights = score(cache.queries, cache.num_queries, min(cache.window, QUERIES), cache.pool.k,
                    table, counts, pages, row, cache.R)
    # Step 4. Two spare tokens of no row at each end, so that each token has 5 neighbors (itself
    # is one). A neighbor in another row does not count.
    weights = F.pad(weights.masked_fill(~held, 0).flatten(), (2, 2))        # (n P + 4)
    row_of_token = F.pad(row.repeat_interleave(P), (2, 2), value=-1)
    largest_near = torch.zeros_like(weights[4:])                            # (n P)
    for shift in range(5):
        same_row = row_of_token[shift:shift + len(largest_near)] == row_of_token[2:-2]
        near = weights[shift:shift + len(largest_near)]
        largest_near = torch.where(same_row, largest_near.maximum(near), largest_near)
    return largest_near.view(-1, P)


def query_attention(queries, num_queries, newest, page_k, table, counts, pages, row, R):
    """Steps 1 to 3 of snapkv_scores: (n, P) fp32.

    queries (L, B, Hq, QUERIES, D), of num_queries (L, B) that were recorded; the `newest` of them
    count. page_k (N, P, D); table (rows, M) and counts (rows) of all rows. Twin:
    kernels.query_attention.
    """
    L, B, Hq, _, D = queries.shape
    Hkv = len(counts) // (L * B)
    queries = queries.view(len(counts), Hq // Hkv, -1, D)                   # (rows, G, QUERIES, D)
    scores = torch.zeros(len(pages), P, device=pages.device)
    start = 0
    for r, count in enumerate(counts.tolist()):
        stop = start + pages_for(count)
        if count > 0:
            end = int(num_queries.flatten()[r // Hkv])
            recent = torch.arange(max(0, end - newest), end, device=pages.device) % QUERIES
            q = queries[r, :, recent]                                       # (G, n, D)
            k = page_k[pages[start:stop]].flatten(0, 1)[:count]             # (count, D)
            weights = (q @ k.T).float().div_(math.sqrt(D)).softmax(dim=-1)
            scores[start:stop].view(-1)[:count] = weights.amax(dim=0).mean(dim=0)
        start = stop
    return scores


EVICTION_SCORES = {"gate": gate_scores, "snapkv": snapkv_scores}


def best_tokens(scores, pos, row, rows, target, processes=1):
    """The tokens of highest score whose rows need `target` pages in all, at most.

    scores (n, P) fp32, at least 0, or -1 where there is no token; pos (n, P) their positions; row
    (n): the row of each page. Among equal scores the newest stay. Returns (keep (n, P) bool, cut):
    just above the highest score that goes, or that score itself if others with it stay. Of several
    processes each has its own rows, and all find the same cut: every answer in the search is a sum
    over processes.
    """
    def too_many(keep):
        counts = torch.zeros(rows, dtype=torch.int32, device=row.device)
        counts.index_add_(0, row, keep.sum(dim=1, dtype=torch.int32))
        return all_reduce_sum(pages_for(counts).sum(), processes) > target

    # The bits of floats from 0 on, read as int32, are ordered like the floats.
    bits = scores.view(torch.int32)
    # The highest score of which at least one token must go.
    threshold = largest(lambda c: too_many(bits >= c), row.device)
    better = bits > threshold
    tied = bits == threshold
    if all_reduce_sum(tied.sum(), processes) == 1:      # nearly always: it goes, without a search
        tied = torch.zeros_like(tied)
    else:
        oldest = largest(lambda c: too_many(better | (tied & (pos >= c))), row.device)
        tied = tied & (pos > oldest)
    any_tied = all_reduce_sum(tied.sum(), processes) > 0
    cut = torch.where(any_tied, threshold, threshold + 1)           # + 1: the next float up
    return better | tied, cut.view(torch.float32).item()


def largest(holds, device):
    """The largest c of 31 bits for which holds(c), which is true of 0 and false from some c on.

    Bit by bit from the top, without asking the device: if it holds up to 5, bits 4 and 1 are set.
    """
    c = torch.zeros((), dtype=torch.int32, device=device)
    for bit in range(30, -1, -1):
        c = torch.where(holds(c + 2**bit), c + 2**bit, c)
    return c


def gather_tokens(x, index):
    """x[b, :, index[b]] for x (B, Hkv, N, ...) and index (B, n): the same places of every head."""
    b = torch.arange(len(x), device=x.device)[:, None]
    return x[b, :, index].transpose(1, 2)


# --------------------------------------------------------------------- attention in plain PyTorch

def banded_attention(q, k, v, g, old_k, old_v, num_old, window, tau, block=128):
    """Prefill: attention of T new tokens over older admitted keys and a band, by blocks of queries.

    q (B, Hq, T, D). k, v (B, Hkv, W + T, D) and g (B, Hkv, W + T): the band, where index W + t is
    new token t, and g is -inf where there is no token. old_k, old_v: for each row a tensor (n, D)
    of its admitted keys, oldest first. num_old (B, Hkv, T): how many of them lie outside the
    window of new token t. Returns (B, Hq, T, D).

    The queries t0 .. t1-1 of a block all see the num_old[t0] oldest admitted keys, without a
    mask. Later keys lie in the band from index t0 + 1 (the beginning of t0's window) to W + t1 -
    1 (t1 - 1 itself), where the definition is applied key by key. With W = 100 and a block of
    queries 512 to 639: the band from 513 to 739, 227 keys, however long the text is.
    """
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    G = Hq // Hkv
    W = window
    q = q.view(B, Hkv, -1, T, D)                                            # (B, Hkv, G, T, D)
    out = torch.empty_like(q)
    # The keys of the band that a block's queries see if these are refused, and if admitted. Counted
    # from the band's first key it is the same for every block, so it is computed once.
    n_queries = min(block, T)
    i = torch.arange(W - 1, W - 1 + n_queries, device=q.device)[:, None]
    j = torch.arange(W - 1 + n_queries, device=q.device)
    if_refused = visible(i, j, REFUSED, W, tau)
    if_admitted = visible(i, j, math.inf, W, tau)
    is_admitted = g >= tau
    is_token = g > -math.inf

    old_at_block = num_old[:, :, ::block].tolist()
    for t0 in range(0, T, block):
        t1 = min(t0 + block, T)
        n_queries = t1 - t0
        n_band = W - 1 + n_queries
        band = slice(t0 + 1, t0 + 1 + n_band)
        for b in range(B):
            for h in range(Hkv):
                n_old = old_at_block[b][h][t0 // block]
                mask = q.new_ones(n_queries, n_old + n_band, dtype=torch.bool)
                admitted = if_admitted[:n_queries, :n_band] & is_admitted[b, h, band]
                mask[:, n_old:] = if_refused[:n_queries, :n_band] | admitted
                mask[:, n_old:] &= is_token[b, h, band]
                keys = torch.cat((old_k[b][h][:n_old], k[b, h, band]))      # (n_old + n_band, D)
                values = torch.cat((old_v[b][h][:n_old], v[b, h, band]))
                keys, values = (x.expand(1, G, -1, -1) for x in (keys, values))
                y = F.scaled_dot_product_attention(q[b:b + 1, h, :, t0:t1], keys, values, mask)
                out[b, h, :, t0:t1] = y[0]
    return out.view(B, Hq, T, D)


def paged_attention(q, k, v, row, unseen):
    """Decode: attention of one query a head over the pages of its row; rows have different lengths.

    q (rows, G, D); k, v (n, P, D): the pages of all rows, one after the other; row (n): the row
    that each page belongs to; unseen (n, P) bool: the slots its query does not see. Returns
    (rows, G, D).

    This is split-KV, as in Flash-Decoding: the keys of one query are split into parts, here
    pages, and the partial sums are added. With row_max the largest score of the whole row, the sums
    under weights exp(s - row_max) simply add up. Pages are the unit, so nothing is padded to the
    longest row. (A row without any token has the largest score -inf, and -inf - -inf is NaN.
    Nobody reads it.)
    """
    rows, G, D = q.shape
    q = (q / math.sqrt(D)).index_select(0, row)                             # (n, G, D)
    scores = torch.bmm(q, k.transpose(1, 2)).float()                        # (n, G, P)
    scores.masked_fill_(unseen[:, None], -math.inf)

    # The largest score of each page, then of each row.
    row_max = scores.new_full((rows, G), -math.inf)
    row_max.scatter_reduce_(0, row[:, None].expand(-1, G), scores.amax(dim=-1), "amax")

    # Pages with the scores 1 and 3: row_max 3, weights e^-2 and 1, row_sum 1.135.
    weights = scores.sub_(row_max.index_select(0, row)[:, :, None]).exp_()
    row_sum = torch.zeros_like(row_max).index_add_(0, row, weights.sum(dim=-1))     # (rows, G)

    o = torch.bmm(weights.to(v.dtype), v).float()                           # (n, G, D)
    o = o.new_zeros(rows, G, D).index_add_(0, row, o)                       # (rows, G, D)
    return (o / row_sum[:, :, None]).to(v.dtype)


# --------------------------------------------------------------------------------------- training

def soft_attention(q, k, v, log_g, window, block=256):
    """Causal softmax(q k / sqrt(D) + bias) v; bias: 0 inside the window, log_g of the key outside.

    q (B, Hq, T, D), k, v (B, Hkv, T, D); log_g (B, Hkv, T) fp32, -inf allowed. Returns (B, Hq, T,
    D), with gradients for all four. By blocks of queries that the backward pass computes again,
    so that only one block's scores exist at a time. kernels.soft_attention is the same on a GPU.
    """
    out = []
    for t0 in range(0, q.shape[2], block):
        t1 = min(t0 + block, q.shape[2])
        args = (q[:, :, t0:t1], k[:, :, :t1], v[:, :, :t1], log_g[:, :, :t1], window, t0)
        if torch.is_grad_enabled():
            out.append(recompute(soft_block, *args, use_reentrant=False))
        else:
            out.append(soft_block(*args))
    return torch.cat(out, dim=2)


def soft_block(q, k, v, log_g, window, t0):
    """The queries t0 .. t0 + T - 1 of soft_attention, over the keys 0 .. t0 + T - 1."""
    B, Hq, T, D = q.shape
    i = torch.arange(t0, t0 + T, device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    bias = torch.where(i - j < window, 0.0, log_g[:, :, None])              # (B, Hkv, T, S)
    bias = bias.masked_fill(j > i, -math.inf)[:, :, None]
    q = q.view(B, k.shape[1], -1, T, D)                                     # (B, Hkv, G, T, D)
    scores = (q @ k[:, :, None].transpose(-1, -2)).float() / math.sqrt(D) + bias
    weights = scores.softmax(dim=-1).to(v.dtype)                            # (B, Hkv, G, T, S)
    return (weights @ v[:, :, None]).view(B, Hq, T, D)


class SoftAttention:
    """The student of distillation; its teacher is the same model with full attention.

    A key outside the window has its gate as a bias:

        score(i, j) = q_i . k_j / sqrt(D) + ( 0 if i - j < W else log g_j )    (g >= MIN_GATE)

    The bias is log g because exp(s + log g) = g exp(s): a gate of 1 leaves the key as it is, a
    gate near 0 removes it, and in between there is a slope to learn from. (Below MIN_GATE there
    is none: a gate that low has closed for good.) With hard=True the bias is 0 or -inf, as at
    inference. After a forward pass, `g` has each layer's gates (B, Hkv, T).

    keep_outputs, for checkpointed layers on a GPU: a layer that runs again takes attention's output
    from its first run. In Llama-3.1-8B it takes 8 GiB for 32K tokens, and saves 0.6 of 7.0 s a
    training step on an H200.

    Make a new one per forward pass. Checkpointing runs a layer again in the backward pass; if the
    rerun's gates were kept, the memory of its whole graph would not be freed.
    """

    def __init__(self, gates, device, hard=False, keep_outputs=False):
        self.gates = gates
        self.device = device
        self.hard = hard
        self.keep_outputs = keep_outputs
        self.first_runs = defaultdict(list)     # of layers: see kernels.soft_attention
        self.g = {}

    def begin(self, T, lengths=None):
        self.positions = torch.arange(T, device=self.device)[None]
        return self.positions

    def end(self):
        pass

    def attend(self, layer, q, k, v, cos, sin):
        q, k_rotated = rotate_both(q, k, cos, sin)
        g = self.gates.gate(layer, k, k_rotated, self.positions)
        self.g.setdefault(layer, g)             # the first run's, not the rerun's
        if self.hard:
            log_g = torch.where(g >= self.gates.tau, 0.0, -math.inf)
        else:
            log_g = g.clamp(min=MIN_GATE).log()
        args = (q.to(v.dtype), k_rotated.to(v.dtype), v, log_g, self.gates.window)
        kernels = kernels_for(q)
        if not kernels:
            return soft_attention(*args)
        return kernels.soft_attention(*args, self.first_runs[layer] if self.keep_outputs else None)


def sparsity_loss(g, window):
    """A measure of the cache that gates g (..., T) ask for, as a share of a dense one.

    The training loss is the MSE of the student's and the teacher's last hidden states, plus
    lambda times this. The token at position p lies in the window of o_p = min(1, W / (T - p)) of
    the queries p .. T - 1, whatever its gate says. The remaining 1 - o_p is charged at
    1 - (1 - g)^2 instead of g. That curve is concave: two half-open gates pay 1.5, an open and a
    closed one pay 1. So gates move to 0 or 1, and cutting them off at tau changes little.
    """
    T = g.shape[-1]
    in_window = (window / torch.arange(T, 0, -1, device=g.device)).clamp(max=1.0)       # o_p, (T)
    return (in_window + (1 - in_window) * (1 - (1 - g) ** 2)).mean()


if __name__ == "__main__":
    sys.exit(run_program(demo))
