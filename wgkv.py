"""Write-Gated KV: decide, when a key is made, whether it is worth remembering (arXiv 2512.17452).

A dense cache writes every token's key and value for ever. Here a small gate looks at each key as it is made and
predicts whether distant queries will want it. Recent tokens stay in a ring whatever their gate says, since most tokens
matter to their neighbours and to nobody later. A token that leaves the ring is promoted to paged memory if its gate
reached tau, else it is gone. Each layer and each KV head decides for itself.

THE DEFINITION. In each layer and KV head, for a query at position i and a key at position j with gate g[j],

    visible(i, j)  =  j <= i  and  ( i - j < W  or  g[j] >= tau )

and attention is softmax attention over the visible keys. Everything below computes this, to rounding: in one call or
in many, token by token or a second turn on a used cache.

    a new token ──► ring of W slots ──► g >= tau? ──► pages of P tokens (K, V, position), in order
                    slot = pos mod W        └──► no: gone

    W = 4, after 6 tokens       ring   slot 0 1 2 3       page table of this row  [7, 2]
    of which 0 was admitted            pos  4 5 2 3       page 7: pos 0 - -  (length 1)

THE LETTERS. B sequences, T new tokens, S tokens seen, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head dim,
W window, P tokens a page, L layers. Tensors are (B, heads, T, D). A row is one (sequence, KV head): everything ragged
is a matter of rows, and a batch is more rows.

    python wgkv.py        prints the pattern of a 16-token prompt, and ring and pages after each of its steps
"""
import contextlib
import copy
import hashlib
import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from model import UserError, attention, open_tensors, rotate, say

P = 64                      # tokens a page: small enough to waste little, large enough to be read at full speed
GATE_FLOOR = 1e-3           # in training, so that log g stays finite
FORMAT = "1"                # of gate files


# ---------------------------------------------------------------------------------------------------- the definition

def visible(i, j, g, window, tau):
    """May a query at position i see the key at position j whose gate is g? Tensors that broadcast; bool."""
    return (j <= i) & ((i - j < window) | (g >= tau))


def visible_mask(g, window, tau):
    """The whole pattern, (B, Hkv, T, T) bool, for gates g (B, Hkv, T): for tests and pictures, quadratic in T."""
    t = torch.arange(g.shape[-1], device=g.device)
    return visible(t[:, None], t, g[:, :, None, :], window, tau)


def dense_attention(q, k, v, mask):
    """Softmax attention over the keys where mask (B, Hkv, T, S) is True: what every faster path must equal.

    q (B, Hq, T, D); k, v (B, Hkv, S, D); query head h reads KV head h // G. Returns (B, Hq, T, D).
    """
    B, Hq, T, D = q.shape
    grouped = q.view(B, k.shape[1], -1, T, D)                                            # (B, Hkv, G, T, D)
    scores = grouped @ k[:, :, None].transpose(-1, -2) / math.sqrt(D)                   # (B, Hkv, G, T, S)
    weights = scores.masked_fill(~mask[:, :, None], -math.inf).softmax(dim=-1)
    return (weights @ v[:, :, None]).view(B, Hq, T, D)


# ------------------------------------------------------------------------------------------------------------- gates

class Gate(nn.Module):
    """The gates of one layer, one for each KV head; all heads in one batched product.

        x = [ RMSNorm(k before RoPE) ; RMSNorm(k after RoPE) ]      2D numbers
        g = sigmoid( w2 . GELU(W1 x + b1) + b2 )                    E*D hidden numbers, one gate in (0, 1)

    The two norm weights are shared by the layer's heads. (Section 3 of the paper; parameters start as Conv1d's do.)
    """

    def __init__(self, Hkv, D, expansion):
        super().__init__()
        hidden = round(expansion * D)
        self.pre_norm, self.post_norm = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.w1, self.b1 = nn.Parameter(torch.empty(Hkv, hidden, 2 * D)), nn.Parameter(torch.empty(Hkv, hidden))
        self.w2, self.b2 = nn.Parameter(torch.empty(Hkv, hidden)), nn.Parameter(torch.empty(Hkv))
        for p, fan_in in ((self.w1, 2 * D), (self.b1, 2 * D), (self.w2, hidden), (self.b2, hidden)):
            nn.init.uniform_(p, -fan_in ** -0.5, fan_in ** -0.5)

    def forward(self, k, k_rotated):
        """k, k_rotated (B, Hkv, T, D), before and after RoPE -> g (B, Hkv, T) fp32."""
        B, Hkv, T, D = k.shape
        kernels = triton_kernels(k.device, D)
        if kernels and not torch.is_grad_enabled():
            return kernels.gate(self, k, k_rotated)
        x = F.rms_norm(torch.stack((k, k_rotated), dim=-2).float(), (D,), None, 1e-6)    # (B, Hkv, T, 2, D)
        x = x * torch.stack((self.pre_norm, self.post_norm))
        x = x.transpose(0, 1).reshape(Hkv, B * T, 2 * D)
        h = F.gelu(torch.baddbmm(self.b1[:, None], x, self.w1.transpose(1, 2)))          # (Hkv, B * T, E * D)
        g = torch.baddbmm(self.b2[:, None, None], h, self.w2[:, :, None]).float().sigmoid()
        return g.view(Hkv, B, T).transpose(0, 1)


class Gates(nn.Module):
    """A Gate for each layer, with the window and tau they belong to. An admission: see `gate`."""

    def __init__(self, L, Hkv, D, window=256, tau=0.1, expansion=4.0):
        super().__init__()
        self.shape, self.window, self.tau, self.expansion = (L, Hkv, D), window, tau, expansion
        self.layers = nn.ModuleList(Gate(Hkv, D, expansion) for _ in range(L))

    @classmethod
    def for_model(cls, model, **settings):
        return cls(*gate_shape(model), **settings).to(model.device)

    def gate(self, layer, k, k_rotated, positions):
        """The one method of an admission: keys of new tokens in, gate values (B, Hkv, T) fp32 out."""
        return self.layers[layer](k, k_rotated)

    def save(self, path, model, lam=0.0, recipe=""):
        """One safetensors file, written beside its final name and then renamed: never half a file.

        recipe: how they were trained, as JSON; kept in the file for the reader, and read by nothing here.
        """
        L, Hkv, D = self.shape
        tensors = {n: p.detach().float().cpu().contiguous() for n, p in self.named_parameters()}
        metadata = dict(format=FORMAT, window=self.window, tau=self.tau, expansion=self.expansion, lam=lam,
                        model=model.name, layers=L, kv_heads=Hkv, head_dim=D, fingerprint=fingerprint(model),
                        recipe=recipe)
        part = f"{path}.part"
        try:
            save_file(tensors, part, metadata={k: str(v) for k, v in metadata.items()})
            os.replace(part, path)
        except Exception as e:                                  # safetensors raises its own kinds for a full disk
            raise UserError(f"{path} cannot be written: {e}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    @classmethod
    def load(cls, path, model):
        """Gates for this model from a file of `save`, or from an official .pt checkpoint.

        UserError if they do not fit by shape; a remark if they were trained for a sibling that fits by shape only.
        """
        if str(path).endswith(".pt"):
            return cls.load_official(path, model)
        handle = open_tensors(path)
        meta = handle.metadata() or {}
        if meta.get("format") != FORMAT:
            raise UserError(f"{path} is no gate file of format {FORMAT}: its metadata says {meta.get('format')!r}")
        try:
            saved = tuple(int(meta[key]) for key in ("layers", "kv_heads", "head_dim"))
            settings = dict(window=int(meta["window"]), tau=float(meta["tau"]), expansion=float(meta["expansion"]))
            if not (settings["window"] >= 1 and 0 <= settings["tau"] <= 1 and settings["expansion"] > 0):
                raise ValueError(f"window, tau or expansion out of range in {settings}")
        except (KeyError, ValueError) as e:
            raise UserError(f"{path}: its metadata is broken: {e}") from None
        refuse_misfit(path, meta.get("model", "?"), saved, model)
        if meta.get("fingerprint") != fingerprint(model):
            say(f"{path}: these gates were trained for another model ({meta.get('model')}) than {model.name}: the "
                "shapes fit, the weights differ")
        gates = cls(*saved, **settings)
        gates.fill(path, {name: handle.get_tensor(name) for name in handle.keys()})
        return gates.to(model.device).eval().requires_grad_(False)

    @classmethod
    def load_official(cls, path, model):
        """The layout of the authors' checkpoints: a pickled dict of tensors, read without running any of it."""
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            raise UserError(f"{path} cannot be read as a dict of tensors: {str(e).splitlines()[0]}") from None
        theirs = {"pre_key_norm.weight": "pre_norm", "post_key_norm.weight": "post_norm", "conv1.weight": "w1",
                  "conv1.bias": "b1", "conv2.weight": "w2", "conv2.bias": "b2"}
        ours = {}
        for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
            layer, found, what = str(name).removeprefix("model.layers.").partition(".self_attn.g_predictors.")
            if not found or what not in theirs or not layer.isdigit() or not torch.is_tensor(tensor):
                raise UserError(f"{path}: {name} is no tensor of an official gate checkpoint")
            ours[f"layers.{layer}.{theirs[what]}"] = tensor.detach()
        if not {"layers.0.pre_norm", "layers.0.w1", "layers.0.w2"} <= ours.keys():
            raise UserError(f"{path}: it holds no gates of layer 0 (model.layers.0.self_attn.g_predictors.*)")
        D, Hkv, rows = (ours[f"layers.0.{name}"].shape[:1].numel() for name in ("pre_norm", "w2", "w1"))
        L = 1 + max(int(name.split(".")[1]) for name in ours)
        refuse_misfit(path, "its model", (L, Hkv, D), model)
        hidden = max(1, rows // Hkv)
        gates = cls(L, Hkv, D, expansion=hidden / D)
        stored = {"w1": (Hkv * hidden, 2 * D, 1), "b1": (Hkv * hidden,), "w2": (Hkv, hidden, 1)}
        shapes = {name: p.shape for name, p in gates.named_parameters()}
        gates.fill(path, {n: t.reshape(shapes[n]) if n in shapes and t.shape == stored.get(n.split(".")[2]) else t
                          for n, t in ours.items()})
        return gates.to(model.device).eval().requires_grad_(False)

    @torch.no_grad()
    def fill(self, path, tensors):
        params = dict(self.named_parameters())
        for name in sorted(params.keys() ^ tensors.keys()):
            raise UserError(f"{path}: {name} is {'missing' if name in params else 'not a gate parameter'}")
        for name, p in params.items():
            if tensors[name].shape != p.shape:
                raise UserError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(p.shape)}")
            p.copy_(tensors[name])


def gate_shape(model):
    c = model.config
    return c.num_layers, c.num_kv_heads, c.head_dim


def refuse_misfit(path, trained_for, shape, model):
    if shape != gate_shape(model):
        a, b = ("{} layers, {} KV heads of {}".format(*s) for s in (shape, gate_shape(model)))
        raise UserError(f"{path}: these gates are for {trained_for} with {a}, the model {model.name} has {b}")


def fingerprint(model):
    """A short hash of a model's shape and some of its first layer's weights, rounded to bf16: siblings differ."""
    c = model.config
    sample = model.layers[0].qkv.weight[-c.num_kv_heads * c.head_dim * 2::7, ::5].to("cpu", torch.bfloat16)
    facts = (c.model_type, c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size)
    # Through Python numbers: bf16 has no bytes of its own to hash without numpy.
    return hashlib.sha256(repr((facts, sample.flatten()[:4096].tolist())).encode()).hexdigest()[:16]


class RandomAdmission:
    """Admits a share of the tokens, whatever their keys: 1.0 is everything, 0.0 nothing.

    Which ones depends on seed, layer, head and position alone, so any split into calls admits the same.
    """

    def __init__(self, share, seed=0):
        self.share, self.seed = share, seed

    def gate(self, layer, k, k_rotated, positions):
        B, Hkv, T, _ = k.shape
        head = torch.arange(Hkv, device=k.device)[:, None]
        x = positions[:, None, :] + (head + 131 * layer + 65537 * self.seed) * 0x9E3779B1        # (B or 1, Hkv, T)
        for factor in (0x45D9F3B, 0x45D9F3B, 0x9E3779B1):                   # a well-mixing hash of 32-bit numbers
            x = (((x & 0xFFFFFFFF) >> 16) ^ (x & 0xFFFFFFFF)) * factor
        admitted = (x & 0xFFFFFF).float() / 2 ** 24 < self.share
        return torch.where(admitted, 1.0, -1.0).expand(B, Hkv, T)           # -1 is below every tau, also tau 0


# -------------------------------------------------------------------------------------------------- attention, sparse

def banded_attention(q, k, v, g, old_k, old_v, old_count, window, tau, block=256):
    """Attention of T new tokens over a band of recent keys and a list of older admitted ones, by blocks of queries.

    q (B, Hq, T, D). k, v (B, Hkv, W + T, D), g (B, Hkv, W + T): the W tokens before the call, then its own; new token
    t stands at index W + t, and what stands before the beginning of a sequence has g = -inf and must not be seen.
    old_k, old_v: for each row a (N, D) tensor of its admitted keys, oldest first; old_count (B, Hkv, T): how many of
    them lie outside the window of new token t. Returns (B, Hq, T, D).

    A block's queries t0 .. t1-1 all see the old_count[t0] oldest admitted keys; the keys after those lie in the band
    from index t0 + 1 to W + t1 - 1, where the definition is applied key by key. So no mask is larger than a block.
    """
    B, Hq, T, D = q.shape
    Hkv, W = k.shape[1], window
    G = Hq // Hkv
    q = q.view(B, Hkv, G, T, D)
    out = torch.empty_like(q)
    counts = old_count[:, :, ::block].tolist()
    for t0 in range(0, T, block):
        t1 = min(t0 + block, T)
        i = torch.arange(t0, t1, device=q.device)[:, None] + W
        j = torch.arange(t0 + 1, W + t1, device=q.device)
        for b in range(B):
            for h in range(Hkv):
                n = counts[b][h][t0 // block]
                mask = q.new_ones(t1 - t0, n + len(j), dtype=torch.bool)
                band_g = g[b, h, t0 + 1:W + t1]
                mask[:, n:] = visible(i, j, band_g, W, tau) & (band_g > -math.inf)
                keys = torch.cat((old_k[b][h][:n], k[b, h, t0 + 1:W + t1])).expand(1, G, -1, -1)
                values = torch.cat((old_v[b][h][:n], v[b, h, t0 + 1:W + t1])).expand(1, G, -1, -1)
                out[b, h, :, t0:t1] = F.scaled_dot_product_attention(q[b:b + 1, h, :, t0:t1], keys, values, mask)[0]
    return out.view(B, Hq, T, D)


# ------------------------------------------------------------------------------------------------------------ caches

def triton_kernels(device, D):
    """kernels.py where a CUDA device runs it, else None: everything here works without, and means the same."""
    if device.type != "cuda" or D % 8:
        return None
    import kernels
    return kernels


class Cache:
    """What both caches share: lengths, the state of their layers, and how many bytes a dense cache would hold.

    `seen` (B) int64 on the device is how many tokens of each sequence are remembered; only `end` changes it. Each of
    `layers` is a dict of tensors, and these with `seen` are the whole state.
    """

    def __init__(self, model, batch=1):
        c = model.config
        self.L, self.Hkv, self.D, self.B = c.num_layers, c.num_kv_heads, c.head_dim, batch
        self.device, self.dtype = model.device, model.dtype
        self.kernels, self.ready = triton_kernels(self.device, self.D), 0
        self.seen = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.layers = [self.new_layer() for _ in range(self.L)]

    def begin(self, T, lengths=None):
        """Positions (B, T) of the T new tokens. lengths (B): how many of them are real, in each sequence."""
        self.new = self.seen.new_full((self.B,), T) if lengths is None else lengths.to(self.seen)
        self.positions = self.seen[:, None] + torch.arange(T, device=self.device)
        return self.positions

    def end(self):
        self.seen += self.new                          # in place: a captured step finds it where it was

    def dense_bytes(self):
        """What a dense cache holds for the tokens seen: K and V, every layer and head."""
        return 2 * self.L * self.Hkv * self.D * self.dtype.itemsize * int(self.seen.sum())

    def clone(self):
        """An independent copy: what is added to one is not seen by the other."""
        other = copy.copy(self)
        other.seen = self.seen.clone()
        other.layers = [{name: t.clone() for name, t in layer.items()} for layer in self.layers]
        return other

    def state(self):
        """Every tensor by name, for saving; `restore` takes it back. Save or clone them before the cache goes on: these
        are the tensors it works with.
        """
        return {"seen": self.seen, **{f"layers.{i}.{name}": t for i, layer in enumerate(self.layers)
                                      for name, t in layer.items()}}

    def restore(self, state):
        rings = {x["layers.0.ring_g"].shape for x in (state, self.state()) if "layers.0.ring_g" in x}
        assert state["seen"].shape == self.seen.shape and f"layers.{self.L}.count" not in state and len(rings) < 2, (
            f"another cache's state: {tuple(state['seen'].shape)} sequences, rings {rings}")
        self.seen, self.ready = state["seen"].to(self.device, copy=True), 0
        self.layers = [{name: state[f"layers.{i}.{name}"].to(self.device, copy=True) for name in layer}
                       for i, layer in enumerate(self.layers)]


class DenseCache(Cache):
    """Keeps everything: the baseline. K and V (B, Hkv, capacity, D) a layer, capacity growing by a quarter."""

    def new_layer(self):
        empty = torch.empty(self.B, self.Hkv, 0, self.D, device=self.device, dtype=self.dtype)
        return {"k": empty, "v": empty.clone()}

    def reset(self):
        """Forget everything."""
        self.seen, self.ready = torch.zeros_like(self.seen), 0
        self.layers = [self.new_layer() for _ in range(self.L)]

    def prepare(self, steps):
        """Make room for `steps` single-token calls, so that none of them has to ask the device for its lengths."""
        self.start = self.seen.tolist()
        for cache in self.layers:
            self.grow(cache, max(self.start) + steps)
        rows, pages = self.B * self.Hkv, self.layers[0]["k"].shape[2] // P
        self.table = torch.arange(rows * pages, device=self.device, dtype=torch.int32).view(rows, pages)
        self.ready = steps

    def grow(self, cache, tokens):
        """Room for so many tokens a row, in whole pages, and a quarter more than was there."""
        have = cache["k"].shape[2]
        if have < tokens:
            room = pages_for(max(tokens, have + have // 4)) * P
            for name in ("k", "v"):
                cache[name] = F.pad(cache[name], (0, 0, 0, room - have))

    def begin(self, T, lengths=None):
        positions = super().begin(T, lengths)
        if T == 1 and self.kernels:
            if not self.ready:
                self.prepare(64)
            self.ready -= 1
            self.counts = (self.seen + self.new).repeat_interleave(self.Hkv)
        else:
            self.start, self.ready = self.seen.tolist(), 0
            self.stop = max(self.start) + T
        return positions

    def attend(self, layer, q, k, v, cos, sin):
        cache, T = self.layers[layer], q.shape[2]
        if self.kernels:
            q, k = self.kernels.rotate(q, k, cos, sin)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if T == 1 and self.kernels:                    # a page table that is the identity: the dual cache's own kernel
            self.kernels.append(cache, k, v, self.seen, self.new)
            return self.kernels.decode_attention(q, None, None, None, cache["k"], cache["v"], self.table, self.counts)
        self.grow(cache, self.stop)
        b = torch.arange(self.B, device=self.device)[:, None]
        for name, new in (("k", k), ("v", v)):         # padding is written too, and overwritten before it can be seen
            cache[name][b, :, self.positions] = new.transpose(1, 2)
        keys, values = cache["k"][:, :, :self.stop], cache["v"][:, :, :self.stop]
        if T == self.stop:
            return attention(q, keys, values, is_causal=True)
        if self.kernels and min(self.start) == max(self.start):
            return attention(q, keys, values, causal_lower_right(T, self.stop))
        out, j = torch.empty_like(q), torch.arange(self.stop, device=q.device)
        if T == 1:                                     # the G queries of a row see the same keys
            mask = None if min(self.start) == max(self.start) else j <= self.positions[:, None, :, None]
            grouped = q.view(self.B, self.Hkv, -1, self.D)
            return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(q.shape)
        for t0 in range(0, T, 256):
            mask = j <= self.positions[:, None, t0:t0 + 256, None]
            out[:, :, t0:t0 + 256] = attention(q[:, :, t0:t0 + 256], keys, values, mask)
        return out

    def kept_bytes(self):
        return self.dense_bytes()


class DualCache(Cache):
    """The cache of Write-Gated KV: a ring of recent tokens and pages of admitted ones. One layer's tensors:

        ring_k, ring_v (B, Hkv, W, D), ring_g (B, Hkv, W) fp32    the token at position p is in slot p mod W
        page_k, page_v (N, P, D), page_pos (N, P) int32           the pool: N pages, whoever's they are
        table (B * Hkv, M) int32, count (B * Hkv) int64           a row's pages in order, and its admitted tokens
        free (N) int64, free_count (1) int64                      a stack of the pages nobody holds

    The token number n of a row is at place n mod P of page table[row, n // P]. Page 0 is nobody's: it is
    what the places of the table that no row has reached yet point to.
    """

    def __init__(self, model, admission, batch=1, window=None, tau=None):
        self.admission = admission
        self.window = window or getattr(admission, "window", 256)
        self.tau = getattr(admission, "tau", 0.1) if tau is None else tau
        super().__init__(model, batch)

    def new_layer(self):
        rows, W, device = self.B * self.Hkv, self.window, self.device

        def zeros(*shape, dtype=self.dtype):
            return torch.zeros(shape, device=device, dtype=dtype)

        return dict(ring_k=zeros(self.B, self.Hkv, W, self.D), ring_v=zeros(self.B, self.Hkv, W, self.D),
                    ring_g=torch.full((self.B, self.Hkv, W), -math.inf, device=device),
                    page_k=zeros(1, P, self.D), page_v=zeros(1, P, self.D), page_pos=zeros(1, P, dtype=torch.int32),
                    table=zeros(rows, 1, dtype=torch.int32), count=zeros(rows, dtype=torch.long),
                    free=zeros(1, dtype=torch.long), free_count=zeros(1, dtype=torch.long))

    def reset(self, sequence=None):
        """Forget everything, or one sequence: its pages go back to the free stack."""
        for b in range(self.B) if sequence is None else (sequence,):
            self.seen[b] = 0
            for layer in self.layers:
                layer["ring_g"][b] = -math.inf
                layer["ring_k"][b], layer["ring_v"][b] = 0, 0      # a place that is not seen has weight 0, and 0 times
                for row in range(b * self.Hkv, (b + 1) * self.Hkv):
                    pages = layer["table"][row, :pages_for(int(layer["count"][row]))].long()
                    layer["page_k"][pages], layer["page_v"][pages] = 0, 0      # a NaN that was left there is NaN
                    top = int(layer["free_count"])
                    layer["free"][top:top + len(pages)] = pages
                    layer["free_count"] += len(pages)
                    layer["count"][row], layer["table"][row] = 0, 0

    def begin(self, T, lengths=None):
        positions = super().begin(T, lengths)
        if self.kernels:
            if self.ready < T:
                self.prepare(max(T, P))
            self.ready -= T
        else:
            # For `decode`, the same in all layers: the rows with a new token, its place among the slots of all rings,
            # and how many slots of each row's ring are in use with it.
            seen, new = (x.repeat_interleave(self.Hkv) for x in (self.seen, self.new))
            self.rows = slice(None) if lengths is None else new.nonzero()[:, 0]
            self.place = (torch.arange(len(seen), device=self.device) * self.window + seen % self.window)[self.rows]
            self.filled = (seen + new).clamp(max=self.window)
        return positions

    def prepare(self, tokens):
        """Set pages aside for so many more tokens a row, so that a call with them asks the device for nothing."""
        extra = pages_for(tokens)                      # at most: what is left of a row's last page comes first
        numbers = torch.stack([torch.stack((pages_for(c["count"].max()), c["free_count"][0])) for c in self.layers])
        for c, (used, free_count) in zip(self.layers, numbers.tolist()):
            self.reserve(c, self.B * self.Hkv * extra, used + extra, free_count)
        self.ready = tokens

    # A call: gates, then the band (ring unrolled + new tokens), then what leaves the window goes into pages, then
    # attention over pages and band, and last the ring takes the newest W tokens of the band.

    def attend(self, layer, q, k, v, cos, sin):
        """q (B, Hq, T, D), k and v (B, Hkv, T, D) unrotated -> attention output (B, Hq, T, D)."""
        if self.kernels:
            q, k_rotated = self.kernels.rotate(q, k, cos, sin)
        else:
            q, k_rotated = rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], self.Hkv), dim=1)
        g = self.admission.gate(layer, k, k_rotated, self.positions)
        step = self.decode if q.shape[2] == 1 else self.prefill
        return step(self.layers[layer], q, k_rotated, v, g)

    def prefill(self, c, q, k, v, g):
        T, W = q.shape[2], self.window
        # The band: index b is position seen - W + b. Slots that were never written have g = -inf.
        unroll = (self.seen[:, None] + torch.arange(W, device=self.device)) % W                       # (B, W)
        band_k = torch.cat((take(c["ring_k"], unroll), k), dim=2)                          # (B, Hkv, W + T, D)
        band_v = torch.cat((take(c["ring_v"], unroll), v), dim=2)
        band_g = torch.cat((take(c["ring_g"], unroll), g), dim=2)                          # (B, Hkv, W + T)
        # Index t leaves the window when new token t arrives.
        real = torch.arange(T, device=self.device) < self.new[:, None, None]
        leaves = (band_g[:, :, :T] >= self.tau) & real                                     # (B, Hkv, T) bool
        counts = c["count"].view(self.B, self.Hkv, 1) + leaves.cumsum(-1)
        self.promote(c, leaves, counts, band_k[:, :, :T], band_v[:, :, :T], self.positions - W)
        if self.kernels:
            y = self.kernels.prefill_attention(q, band_k, band_v, band_g, c["page_k"], c["page_v"], c["table"], counts,
                                               W, self.tau)
        else:
            old_k, old_v = ([[self.row(c, name, b, h) for h in range(self.Hkv)] for b in range(self.B)]
                            for name in ("page_k", "page_v"))
            y = banded_attention(q, band_k, band_v, band_g, old_k, old_v, counts, W, self.tau)
        # Slot s takes the one of the newest W indices (new .. new + W - 1) whose position is s modulo W.
        newest = self.new[:, None] + (torch.arange(W, device=self.device) - (self.seen + self.new)[:, None]) % W
        c["ring_k"], c["ring_v"], c["ring_g"] = (take(x, newest).contiguous() for x in (band_k, band_v, band_g))
        return y

    def promote(self, c, leaves, counts, k, v, positions):
        """Append the tokens where `leaves` (B, Hkv, T); counts (B, Hkv, T): a row's admitted tokens after each.

        k, v (B, Hkv, T, D); positions (B, T).
        """
        after = counts[:, :, -1].flatten().contiguous()
        have, need = pages_for(c["count"]), pages_for(after)
        fresh = need - have
        if self.kernels:                                                   # where `prepare` has made room
            self.kernels.promote(c, leaves, counts, k, v, positions, have, fresh.cumsum(0) - fresh)
            c["free_count"] -= fresh.sum()
            c["count"] = after
            return
        if torch.equal(after, c["count"]):
            return
        self.reserve(c, int(fresh.sum()), int(need.max()), int(c["free_count"]))
        # Pages come off the top of the stack; which row gets which is a matter of a running sum.
        row = torch.arange(len(fresh), device=self.device).repeat_interleave(fresh)
        nth = torch.arange(len(row), device=self.device)
        c["table"][row, have[row] + nth - (fresh.cumsum(0) - fresh)[row]] = c["free"][c["free_count"] - 1 - nth].int()
        c["free_count"] -= len(row)
        c["count"] = after
        row, n = leaves.flatten(0, 1).nonzero()[:, 0], counts[leaves] - 1
        at = c["table"][row, n // P].long() * P + n % P
        c["page_k"].view(-1, self.D)[at], c["page_v"].view(-1, self.D)[at] = k[leaves], v[leaves]
        c["page_pos"].view(-1)[at] = positions[:, None].expand_as(leaves)[leaves].int()

    def decode(self, c, q, k, v, g):
        """One new token a sequence: its slot's old token to the pages or gone, the new one in, then attention."""
        if self.kernels:
            self.kernels.remember(c, k, v, g, self.seen, self.new, self.tau)
            return self.kernels.decode_attention(q, c["ring_k"], c["ring_v"], c["ring_g"], c["page_k"], c["page_v"],
                                                 c["table"], c["count"])
        rows, W, D = self.B * self.Hkv, self.window, self.D
        ring_k, ring_v, ring_g = (c[name].view(rows * W, -1) for name in ("ring_k", "ring_v", "ring_g"))
        leaves = ring_g.index_select(0, self.place)[:, 0] >= self.tau
        if leaves.any():                                                    # few rows at a time: one by one
            for place in self.place[leaves].tolist():
                row, n = place // W, int(c["count"][place // W])
                if n % P == 0:                                              # its last page is full
                    self.reserve(c, 1, n // P + 1, int(c["free_count"]))
                    c["free_count"] -= 1
                    c["table"][row, n // P] = c["free"][int(c["free_count"])]
                page, n = int(c["table"][row, n // P]), n % P
                c["page_k"][page, n], c["page_v"][page, n] = ring_k[place], ring_v[place]
                c["page_pos"][page, n] = self.seen[row // self.Hkv] - W
                c["count"][row] += 1
        for ring, new in ((ring_k, k), (ring_v, v), (ring_g, g)):
            ring.index_copy_(0, self.place, new.reshape(rows, -1)[self.rows])
        # Pages are read where they lie, each by the queries of its row: q goes to the pages by the table, the scores
        # come back by it, and so it is with weights and values. Only scores are padded to the longest row.
        q, table = q.reshape(rows, -1, D) / math.sqrt(D), c["table"].long()             # (B * Hkv, G, D), (B * Hkv, M)
        page_q = q.new_zeros(len(c["page_k"]), *q.shape[1:])
        page_q[table] = q[:, None]
        older = torch.bmm(page_q, c["page_k"].transpose(1, 2))[table].transpose(1, 2).flatten(2)
        recent = torch.bmm(q, ring_k.view(rows, W, D).transpose(1, 2))
        scores = torch.cat((recent, older), dim=2)                                      # (B * Hkv, G, W + M * P)
        # A row has nothing in pages before its ring is full, so what it sees is one stretch from the beginning.
        unseen = torch.arange(scores.shape[2], device=self.device) >= (self.filled + c["count"])[:, None, None]
        weights = scores.masked_fill_(unseen, -math.inf).softmax(dim=2)
        page_weights = q.new_zeros(len(page_q), q.shape[1], P)
        page_weights[table] = weights[:, :, W:].unflatten(2, (-1, P)).transpose(1, 2)
        page_weights[0] = 0                            # page 0 is nobody's: the NaN of one row would reach the others
        older = torch.bmm(page_weights, c["page_v"])[table].sum(dim=1)
        return torch.baddbmm(older, weights[:, :, :W], ring_v.view(rows, W, D)).view(self.B, -1, 1, D)

    def row(self, c, name, b, h):
        """The admitted tokens of one row, oldest first: (count, ...) out of its pages."""
        row = b * self.Hkv + h
        count = int(c["count"][row])
        return c[name][c["table"][row, :pages_for(count)].long()].flatten(0, 1)[:count]

    def reserve(self, c, pages, columns, free_count):
        """See that `pages` pages are free and that the table has `columns` columns; grow what is too small.

        A pool grows by what is asked for and a tenth of what it holds, so that reserved stays near used.
        """
        N = len(c["free"])
        if free_count < pages:
            extra = pages - free_count + N // 10
            for name in ("page_k", "page_v", "page_pos"):
                c[name] = torch.cat((c[name], c[name].new_zeros(extra, *c[name].shape[1:])))
            new = torch.arange(N + extra - 1, N - 1, -1, device=self.device)
            c["free"] = torch.cat((c["free"][:free_count], new, c["free"].new_zeros(N - free_count)))
            c["free_count"] += extra
        if c["table"].shape[1] < columns:
            c["table"] = F.pad(c["table"], (0, columns + columns // 4 - c["table"].shape[1]))

    def kept_bytes(self):
        """Bytes that are needed for what is remembered: rings, pages in use (whole), tables and counts."""
        slot = 2 * self.D * self.dtype.itemsize + 4            # K, V, and 4 bytes of gate (ring) or position (page)
        ring = self.B * self.Hkv * (self.window * slot + 8)    # with each row's count
        pages = sum(int(pages_for(c["count"]).sum()) for c in self.layers)
        return self.L * ring + pages * (P * slot + 4) + 8 * self.B

    def reserved_bytes(self):
        """Bytes held, used or not."""
        return sum(t.numel() * t.itemsize for t in self.state().values())

    def admitted(self, sequence=0):
        """(L, Hkv, S) bool: which of a sequence's tokens are, or on leaving the window would be, in the pages."""
        S = int(self.seen[sequence])
        out = torch.zeros(self.L, self.Hkv, S, dtype=torch.bool, device="cpu")
        recent = torch.arange(max(0, S - self.window), S, device=self.device)
        for layer, c in enumerate(self.layers):
            g = c["ring_g"][sequence, :, recent % self.window]
            out[layer, :, max(0, S - self.window):] = (g >= self.tau).cpu()
            for h in range(self.Hkv):
                out[layer, h, self.row(c, "page_pos", sequence, h).long().cpu()] = True
        return out


def pages_for(tokens):
    return (tokens + P - 1) // P


def take(x, index):
    """x[b, :, index[b]] for x (B, Hkv, N, ...) and index (B, n): the same places of every head."""
    return x[torch.arange(len(x), device=x.device)[:, None], :, index].transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- training

def soft_attention(q, k, v, log_g, window, block=256):
    """Causal softmax(q k / sqrt(D) + bias) v, where the bias is 0 inside the window and log_g of the key outside it.

    q (B, Hq, T, D), k, v (B, Hkv, T, D); log_g (B, Hkv, T) fp32, -inf allowed. Returns (B, Hq, T, D), with gradients
    for all four. By blocks of queries, computed again in the backward pass, so that only one block's scores exist at a
    time; kernels.soft_attention is the same on a GPU.
    """
    out = []
    for t0 in range(0, q.shape[2], block):
        t1 = min(t0 + block, q.shape[2])
        args = (q[:, :, t0:t1], k[:, :, :t1], v[:, :, :t1], log_g[:, :, :t1], window, t0)
        if torch.is_grad_enabled():
            out.append(torch.utils.checkpoint.checkpoint(soft_block, *args, use_reentrant=False))
        else:
            out.append(soft_block(*args))
    return torch.cat(out, dim=2)


def soft_block(q, k, v, log_g, window, t0):
    B, Hq, T, D = q.shape
    i, j = torch.arange(t0, t0 + T, device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    bias = torch.where(i - j < window, 0.0, log_g[:, :, None])                                 # (B, Hkv, T, S)
    bias = bias.masked_fill(j > i, -math.inf)[:, :, None]
    grouped = q.view(B, k.shape[1], -1, T, D)
    scores = (grouped @ k[:, :, None].transpose(-1, -2)).float() / math.sqrt(D) + bias         # (B, Hkv, G, T, S)
    return (scores.softmax(dim=-1).to(v.dtype) @ v[:, :, None]).view(B, Hq, T, D)


class SoftAttention:
    """The student: full attention, where the gate of a key outside the window is a bias in log space.

        score(i, j) = q_i . k_j / sqrt(D) + ( 0 if i - j < W else log g_j )          (g at least GATE_FLOOR)

    With hard=True the bias is 0 or -inf, as at inference. After a forward pass `g` has each layer's gates (B, Hkv, T).
    One of these for each pass: a checkpointed layer runs again in the backward pass, and what it makes then must not
    take the place of the first, or all that the second run has computed would stay in memory behind it.
    """

    def __init__(self, gates, device, hard=False):
        self.gates, self.device, self.hard, self.g = gates, device, hard, {}

    def begin(self, T, lengths=None):
        self.positions = torch.arange(T, device=self.device)[None]
        return self.positions

    def end(self):
        pass

    def attend(self, layer, q, k, v, cos, sin):
        q, k_rotated = rotate(q, cos, sin), rotate(k, cos, sin)
        g = self.gates.gate(layer, k, k_rotated, self.positions)
        self.g.setdefault(layer, g)
        if self.hard:
            log_g = torch.where(g >= self.gates.tau, 0.0, -math.inf)
        else:
            log_g = g.clamp(min=GATE_FLOOR).log()
        kernels = triton_kernels(q.device, q.shape[3])
        attend = kernels.soft_attention if kernels else soft_attention
        return attend(q.to(v.dtype), k_rotated.to(v.dtype), v, log_g, self.gates.window)


def admission_cost(g, window):
    """The expected share of a dense cache that gates g (..., T) ask for: the second term of the loss.

    A token costs its time in the window in any case, o = min(1, W / (T - s)) of the rest of the sequence, and what is
    left of it if it is admitted: o + (1 - o)(1 - (1 - g)^2). The square pushes gates to 0 or 1.
    """
    T = g.shape[-1]
    o = (window / torch.arange(T, 0, -1, device=g.device)).clamp(max=1.0)
    return (o + (1 - o) * (1 - (1 - g) ** 2)).mean()


# -------------------------------------------------------------------------------------------------------------- demo

def demo():
    """One layer, one head, W = 4, and a gate that admits the tokens 0, 3 and 9 of 16."""
    class Tiny:                                        # as much of a model as a cache asks for
        class config:
            num_layers, num_kv_heads, head_dim = 1, 1, 2
        device, dtype = torch.device("cpu"), torch.float32

    class Chosen:
        window, tau = 4, 0.5

        def gate(self, layer, k, k_rotated, positions):
            return torch.isin(positions, torch.tensor([0, 3, 9])).float()[:, None]

    g = Chosen().gate(0, None, None, torch.arange(16)[None])
    print("Which keys (across) each query (down) of a 16-token prompt sees, W = 4; tokens 0, 3 and 9 are admitted.\n"
          "The stripes are the admitted keys, the slash is the window:\n")
    for i, line in enumerate(visible_mask(g, 4, 0.5)[0, 0].tolist()):
        print(f"{i:6}  " + " ".join("#" if seen else "." if j <= i else " " for j, seen in enumerate(line)))
    print("\nThe same, token by token. The ring has a slot for each position modulo 4:\n")
    print("  token   ring (positions)   pages (positions)")
    cache, nothing = DualCache(Tiny, Chosen()), torch.zeros(1, 1, 1, 2)
    for i in range(16):
        cache.begin(1)
        cache.attend(0, nothing, nothing, nothing, torch.ones(1), torch.zeros(1))
        cache.end()
        ring = " ".join(f"{p:3}" for p in ((i - (i - s) % 4) if i >= (i - s) % 4 else "-" for s in range(4)))
        pages = cache.row(cache.layers[0], "page_pos", 0, 0).tolist()
        print(f"  {i:5}  {ring}     {' '.join(map(str, pages)) or '-'}")


if __name__ == "__main__":
    demo()
