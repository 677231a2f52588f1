"""A Llama, from a folder of safetensors to hidden states.

Reads the config.json and *.safetensors of a Hugging Face folder (Llama 2, 3, 3.1 and 3.2, Mistral
without a sliding window, Qwen2.5, Qwen3) and runs the model:

    model = Llama.from_pretrained("path/to/folder", device="cuda")
    hidden = model(tokens)                   # (B, T) ids -> (B, T, hidden_size), after final norm
    logits = model.logits(hidden[:, -1])     # (B, vocab_size), only for positions that need them

This file knows nothing of KV caches or gates. Each layer hands its q, k and v to an object `kv`.
That object decides what is stored, which keys a query attends to, and where in its sequence each
token stands:

    positions = kv.begin(T, lengths)         # once per forward pass, before the first layer
    y = kv.attend(layer, q, k, v, cos, sin)  # once per layer; q and k are not yet rotated by RoPE
    kv.end()                                 # once per forward pass: only here positions advance

Without a `kv` the model is plain causal attention over the tokens of the call (`CausalAttention`).
wgkv.py has the caches.

Letters in shapes: B sequences, T new tokens, S keys, Hq query heads, Hkv key/value heads, D head
dim. Tensors that have heads are (B, heads, T, D).

In order: RoPE, the model, the loader. Skip the loader at first reading: it is long and dull,
because folders in the wild come in many forms.
"""
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import (DTYPES, UserError, all_reduce_sum, check_number, check_regular, free_bytes,
                    one_line, quoted, read_json, reading, say)


@dataclass(frozen=True)
class Config:
    """What shapes and arithmetic depend on. The loader finds the values in config.json."""
    model_type: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    norm_eps: float = 1e-5
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope: dict = field(default_factory=dict)    # {"rope_type": "llama3", "factor": 8.0, ...} or {}
    tied: bool = True                           # the embedding is the LM head too
    qk_norm: bool = False                       # Qwen3: RMSNorm of every q and k head before RoPE
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: torch.dtype | None = None            # what the folder says its weights are
    # Several processes may share a model: each has its part of the heads and of the MLP, and the
    # numbers above are those of the part.
    rank: int = 0
    processes: int = 1


def share_config(config, rank, processes):
    """The Config of the part that process `rank` of so many has; UserError if heads do not divide.

    KV heads, with the query heads that read them, are dealt out: attention then needs no exchange,
    and a layer two sums over processes, after `out` and after `down`.
    """
    c = config
    if c.num_kv_heads % processes or c.intermediate_size % processes:
        raise UserError(f"{c.num_kv_heads} KV heads and an MLP of {c.intermediate_size} cannot be "
                        f"divided among {processes} processes: start as many as divide both")
    return replace(c, num_heads=c.num_heads // processes, num_kv_heads=c.num_kv_heads // processes,
                   intermediate_size=c.intermediate_size // processes, rank=rank,
                   processes=processes)


# ------------------------------------------------------------------------------------------- RoPE
# Rotary position embedding (arXiv 2104.09864). A head of D numbers is D/2 pairs (x[m], x[m + D/2]),
# and pair m is rotated by the angle position * inv_freq[m], with
#
#     inv_freq[m] = theta^(-2m / D)
#
# The dot product of two rotated pairs depends only on the difference of their angles. So q . k
# depends on how far apart query and key are, not on where they are. With D = 128 and theta =
# 500,000 (Llama 3), pair 0 makes a full turn every 6.3 tokens and pair 63 every 2.6 million.

def rotate(x, cos, sin):
    """RoPE of x (B, heads, T, D). cos and sin (B, 1, T, D) are fp32, and so is the arithmetic."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)     # each pair (a, b) as (-b, a)
    return (x * cos + turned * sin).to(x.dtype)


def rotate_both(q, k, cos, sin):
    """RoPE of q (B, Hq, T, D) and k (B, Hkv, T, D): one launch on a GPU, one pass on a CPU."""
    kernels = kernels_for(q)
    if kernels:
        return kernels.rotate(q, k, cos, sin)
    return rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], k.shape[1]), dim=1)


def rope_frequencies(config):
    """inv_freq (D/2,) fp32 on the CPU, and the factor on cos and sin (1 except for yarn)."""
    D = config.head_dim
    pair = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    inv_freq = config.rope_theta ** (-2 * pair / D)

    # A model trained on short texts has never met the angles of long ones. Scaling slows the
    # rotation down by a factor such as 8, so a text 8 times as long brings no new angles.
    kind = config.rope.get("rope_type", "default")
    if kind == "linear":
        return inv_freq / config.rope["factor"], 1.0
    if kind == "llama3":
        return llama3_frequencies(config, inv_freq), 1.0
    if kind == "yarn":
        return yarn_frequencies(config, inv_freq), yarn_temperature(config.rope)
    return inv_freq, 1.0


def llama3_frequencies(config, inv_freq):
    """Slow pairs are scaled, fast ones (which tell neighbors apart) kept, those between blended.

    Llama 3.1 has original context 8192, factor 8, low 1, high 4, theta 500,000, D = 128:

        pair   full turns in 8192 tokens   new frequency, as a share of the old one
        28     4.19, above 4               1
        31     2.26, 0.42 of the way       0.42 + 0.58 / 8 = 0.49
        63     0.003, below 1              1 / 8
    """
    r = config.rope
    turns = r["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = (turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
    keep = keep.clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / r["factor"])


def yarn_frequencies(config, inv_freq):
    """YaRN (arXiv 2309.00071): the same idea, with a blend that is linear in the pair's number.

    Qwen2.5 has original context 32768, theta 1,000,000, D = 128. Pair 23.6 turns 32 times in it,
    pair 39.7 once. So pairs up to 23 are kept, those from 40 on are scaled, 31 is about halfway.
    """
    D = config.head_dim
    r = config.rope
    original = r.get("original_max_position_embeddings", config.max_positions)

    def pair_that_turns(times):
        """Which m, as a real number, has original * inv_freq[m] = times * 2 pi?"""
        return D * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_that_turns(r.get("beta_fast", 32))
    high = pair_that_turns(r.get("beta_slow", 1))
    if r.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    scaled = (torch.arange(D // 2, device="cpu") - low) / max(high - low, 0.001)
    scaled = scaled.clamp(0, 1)
    return inv_freq * (1 - scaled + scaled / r["factor"])


def yarn_temperature(r):
    """YaRN's factor on cos and sin sharpens attention: 1 + 0.1 log(4) = 1.139 for factor 4."""
    if "attention_factor" in r:
        return r["attention_factor"]
    growth = 0.1 * math.log(r["factor"])
    if r.get("mscale") and r.get("mscale_all_dim"):
        return (1 + growth * r["mscale"]) / (1 + growth * r["mscale_all_dim"])
    return 1 + growth


# -------------------------------------------------------------------------------------- the model

def kernels_for(x):
    """The module of Triton kernels if it can run on x, else None: PyTorch then computes the same.

    The kernels run on CUDA devices. They load 16 bytes at a time, which is 8 numbers of 2 bytes, so
    each row of x must be a multiple of 8 long. All our files choose here and nowhere else.
    """
    if not x.is_cuda or x.shape[-1] % 8:
        return None
    import kernels          # here and not above: without a GPU nobody needs to have Triton
    return kernels


def attention(q, k, v, mask=None, is_causal=False):
    """torch's attention with grouped queries (GQA): query head h reads KV head h // G.

    q (B, Hq, T, D); k, v (B, Hkv, S, D); mask (..., T, S); G = Hq / Hkv. Returns (B, Hq, T, D).
    """
    G = q.shape[1] // k.shape[1]
    if G > 1 and q.is_cuda and q.dtype == torch.float32:
        # None of torch's fused kernels has GQA in fp32, and what it falls back on holds all T x S
        # scores at once. Repeated KV heads take less.
        k = k.repeat_interleave(G, dim=1)       # (B, Hq, S, D)
        v = v.repeat_interleave(G, dim=1)
        G = 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=G > 1)


class CausalAttention:
    """The `kv` of a call without one: a token attends to itself and all before it."""

    def __init__(self, device):
        self.device = device

    def begin(self, T, lengths=None):
        return torch.arange(T, device=self.device)[None]    # (1, T), for every sequence

    def attend(self, layer, q, k, v, cos, sin):
        # Padding is on the right, where no real token looks: `lengths` changes nothing here.
        q, k = rotate_both(q, k, cos, sin)
        return attention(q, k, v, is_causal=True)

    def end(self):
        pass


def add_norm(residual, update, norm):
    """(residual + update, its norm), both (B, T, n); update may be None.

    It may write the sum over residual: go on with what is returned.
    """
    kernels = kernels_for(residual)
    if kernels and not torch.is_grad_enabled():
        return kernels.add_norm(residual, update, norm)
    if update is not None:
        residual = residual + update
    return residual, norm(residual)


def silu_product(x):
    """SwiGLU's product: x (B, T, 2m) = [gate ; up] -> SiLU(gate) * up (B, T, m)."""
    kernels = kernels_for(x)
    if kernels and not torch.is_grad_enabled():
        return kernels.silu_product(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x, weight, bias=None):
    """F.linear. For a single token in fp32 on a CPU it keeps all threads busy.

    For one token this is a matrix-vector product: each weight is read once and used once. torch
    gives it to one thread, which cannot read as fast as memory delivers. As a batch of n products,
    each with a part of the weight's rows, n threads read at the same time: decode of a model of 135
    million parameters got 1.5 times as fast with two.

    x (..., in), weight (out, in), bias (out) or None -> (..., out)
    """
    n = torch.get_num_threads()
    one_token = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == torch.float32
    if not one_token or n == 1 or len(weight) % n or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    parts = weight.view(n, -1, weight.shape[1])                     # (n, out / n, in)
    x_for_all = x.reshape(1, 1, -1).expand(n, 1, -1)                # (n, 1, in)
    y = torch.bmm(x_for_all, parts.transpose(1, 2))                 # (n, 1, out / n)
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def one_token_kernels(x):
    """kernels_for(x) if x is one token of one sequence, without gradients; else None.

    Only in half precision, for which the kernel's tiles are tuned.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    if x.numel() != x.shape[-1] or not half or torch.is_grad_enabled():
        return None
    return kernels_for(x)


class Linear(nn.Linear):
    """An nn.Linear that is fast for a single token: a kernel of ours on a GPU, `linear` on a CPU.

    On a GPU cuBLAS would take as long for a large matrix. The matrices of an 8B model are small
    ones, 8 to 50 us each on an H200, and there the pause before each kernel counts, which ours
    fills: see "linear layers of one token" in kernels.py.
    """

    def forward(self, x):
        kernels = one_token_kernels(x)
        if kernels:
            return kernels.gemv(x, self.weight, self.bias)[1]
        return linear(x, self.weight, self.bias)


def norm_linear(residual, update, norm, project, silu=False):
    """(residual + update, project(norm(residual + update))), (B, T, in) and (B, T, out).

    update (B, T, in) may be None. project: a Linear; with silu its rows are [gate ; up], and the
    second result is SiLU(gate) * up (B, T, out / 2). For a single token on a GPU all of it is one
    kernel. Like add_norm this may write over residual: go on with what is returned.
    """
    kernels = one_token_kernels(residual)
    if kernels:
        return kernels.gemv(residual, project.weight, project.bias, update, norm, silu)
    residual, x = add_norm(residual, update, norm)
    product = project(x)
    return residual, silu_product(product) if silu else product


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    q, k, v are rows of one matrix, and so are the MLP's gate and up (SwiGLU's gate, unrelated to
    write gates): one large matrix product is faster than several small ones.
    """

    def __init__(self, c):
        super().__init__()
        self.num_heads = c.num_heads
        self.num_kv_heads = c.num_kv_heads
        self.head_dim = c.head_dim
        self.processes = c.processes
        q_size = c.num_heads * c.head_dim
        kv_size = c.num_kv_heads * c.head_dim
        self.attn_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.qkv = Linear(c.hidden_size, q_size + 2 * kv_size, bias=c.qkv_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.out = Linear(q_size, c.hidden_size, bias=c.out_bias)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, residual, update, kv, layer, cos, sin):
        """residual (B, T, hidden_size) is the residual stream, update what the layer before adds.

        Returns both for the next layer. (The first layer has no update, None.) Their sum is left to
        the next norm, where one kernel does both.
        """
        B, T, _ = residual.shape
        Hq, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim
        # residual stays (B, T, hidden_size), qkv is (B, T, (Hq + 2 Hkv) * D).
        residual, qkv = norm_linear(residual, update, self.attn_norm, self.qkv)
        qkv = qkv.view(B, T, Hq + 2 * Hkv, D).transpose(1, 2)       # (B, Hq + 2 Hkv, T, D)
        q, k, v = qkv.split((Hq, Hkv, Hkv), dim=1)                  # (B, Hq or Hkv, T, D) each
        q = self.q_norm(q)
        k = self.k_norm(k)
        y = kv.attend(layer, q, k, v, cos, sin)                     # (B, Hq, T, D)
        y = y.transpose(1, 2).reshape(B, T, Hq * D)                 # heads side by side
        update = all_reduce_sum(self.out(y), self.processes)        # (B, T, hidden_size)

        # x (B, T, intermediate_size)
        residual, x = norm_linear(residual, update, self.mlp_norm, self.gate_up, silu=True)
        update = all_reduce_sum(self.down(x), self.processes)       # (B, T, hidden_size)
        return residual, update


class Llama(nn.Module):
    """The decoder: model(tokens, kv, lengths) gives hidden states, model.logits(hidden) scores."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = config
        self.name = "model"
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.lm_head = None if c.tied else Linear(c.hidden_size, c.vocab_size, bias=False)
        # Not a buffer: angles need fp32, and model.to(bfloat16) would convert a buffer too. At
        # position 100,000 bf16 has steps of 512.
        self.inv_freq, self.rope_scale = rope_frequencies(c)

    def forward(self, tokens, kv=None, lengths=None, checkpoint=False):
        """Hidden states (B, T, hidden_size) of new tokens (B, T), after the final norm.

        lengths (B,) int64: how many of the T tokens of each sequence are real. The rest is padding
        on the right. It is never stored, and its hidden states mean nothing.
        checkpoint: keep no activations inside layers, but compute them again in the backward pass.
        """
        if kv is None:
            kv = CausalAttention(tokens.device)
        positions = kv.begin(tokens.shape[1], lengths)              # (B or 1, T)
        cos, sin = self.rope(positions)                             # (B or 1, 1, T, D)
        residual = self.embed(tokens)                               # (B, T, hidden_size)
        update = None
        for i, layer in enumerate(self.layers):
            inputs = (residual, update, kv, i, cos, sin)
            if checkpoint:
                residual, update = recompute(layer, *inputs, use_reentrant=False)
            else:
                residual, update = layer(*inputs)
        kv.end()
        return add_norm(residual, update, self.norm)[1]

    def rope(self, positions):
        """cos and sin (B, 1, T, D) fp32 of the angles at positions (B, T); the 1 is for heads."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[:, None, :, None].float() * self.inv_freq        # (B, 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)    # both numbers of a pair have the same angle
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def logits(self, hidden):
        """Scores (..., vocab_size) for hidden states (..., hidden_size)."""
        head = self.embed if self.lm_head is None else self.lm_head
        # `linear` is cuBLAS on a GPU, also for one token: it reads so large a matrix at full speed.
        # The other choice would be kernels.gemv(hidden, head.weight)[1].
        return linear(hidden, head.weight)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, rank=0, processes=1):
        """The model in a local folder, or of a hub name such as "meta-llama/Llama-3.2-1B".

        rank, processes: take only the part that this process has, of so many (see share_config).

        dtype: a torch dtype, else the config's, else the tensors' own. On a CPU the default is
        fp32, where half precision is slow or absent. Every tensor must be used and every parameter
        filled. Raises UserError, with the tensor and the file.
        """
        device = torch.device(device)
        folder = find_folder(path)
        config = read_config(folder)
        files = find_tensors(folder)
        config = complete_config(config, files, folder)
        spare_head = files.pop("lm_head.weight", None) if config.tied else None

        # Names and shapes stand in the files' headers. We compare them all before we allocate: on
        # the meta device parameters have shapes and no memory.
        with torch.device("meta"):
            model = cls(config)
        check_files(model, files, folder)
        dtype = dtype or pick_dtype(config, files, device)
        if processes > 1:
            with torch.device("meta"):
                model = cls(share_config(config, rank, processes))
        model = model.to(dtype)
        check_memory(sum(p.nbytes for p in model.parameters()), device, dtype)

        model.to_empty(device=device)
        fill(model, files)
        if spare_head is not None:
            compare_head(model, spare_head)
        model.name = Path(path).resolve().name if os.path.isdir(path) else str(path)
        return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- the loader
# `Llama.from_pretrained` uses this part from top to bottom: find the folder, read config.json, read
# the headers of the safetensors files, compare names and shapes, copy the data.

READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# Numbers in a config.json: (smallest, largest, must it be whole?). The limits are far above every
# model we know: Llama 405B has 126 layers of 16,384. They only keep a broken config from making us
# work for hours; `check_files` compares with the tensors.
NUMBERS = {
    "vocab_size": (1, 2**24, True),
    "hidden_size": (1, 2**20, True),
    "intermediate_size": (1, 2**20, True),
    "num_hidden_layers": (1, 1024, True),
    "num_attention_heads": (1, 2**14, True),
    "num_key_value_heads": (1, 2**14, True),
    "head_dim": (1, 2**14, True),
    "max_position_embeddings": (1, 2**30, True),
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (2, 1e15),
    "factor": (1, 1e6),                     # this and the next are of RoPE scaling
    "attention_factor": (1e-3, 1e3),
}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def model_files(path):
    """The files of a model's folder that programs read, and that no output may replace."""
    files = []
    if os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            if name in READ or name.startswith("model") and ".safetensors" in name:
                files.append(os.path.join(path, name))
    return files


def find_folder(path):
    """The local folder of a model: path itself, or the hub's cached copy, fetched if need be."""
    path = str(path)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(f"{path} is no folder, and no hub name of the form owner/name either")
    try:
        from huggingface_hub import snapshot_download
        # Only what we read, at the top level: original/ and *.bin hold the same weights again.
        return snapshot_download(path, allow_patterns=[*READ, INDEX, "model*.safetensors"],
                                 ignore_patterns=["*/*"])
    except Exception as e:      # of any kind; the third line of a message may be the one to read
        why = one_line(e, 400) or type(e).__name__
        raise UserError(f"{path} is no local folder, and the hub did not give it: {why}") from None


def read_config(folder):
    """The Config in folder/config.json; UserError for a model that we would get wrong."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: a model is a folder in Hugging Face layout, with "
                        "config.json, tokenizer.json and model.safetensors (or index and shards)")
    with reading(path):
        c = read_json(path)
        if c.get("model_type") == "mistral":
            c.setdefault("sliding_window", 4096)    # transformers' default; null would mean none
        c = without_nulls(c)
        refuse_unsupported(path, c)
        check_fields(path, c)
        kind = c["model_type"]
        theta, rope = read_rope(path, c)
        heads = c["num_attention_heads"]
        kv_heads = c.get("num_key_value_heads", heads)
        head_dim = c.get("head_dim", c["hidden_size"] // heads)
        if heads % kv_heads or head_dim % 2 or head_dim == 0:
            raise UserError(f"{path}: num_attention_heads {heads} should be a multiple of "
                            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even")
        bias = c.get("attention_bias", False)
        config = Config(
            model_type=kind,
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            max_positions=c["max_position_embeddings"],
            rope_theta=theta,
            rope=rope,
            tied=c.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            qkv_bias=bias or kind == "qwen2",       # Qwen2 has them, and no key says so
            out_bias=bias,
            mlp_bias=c.get("mlp_bias", False),
            dtype=DTYPES.get(c.get("dtype", c.get("torch_dtype"))))
        rope_frequencies(config)        # a RoPE setting that is missing or no number fails here
        return config


def without_nulls(fields):
    """A null counts as absent: folders write `"rope_scaling": null` and the like."""
    return {key: value for key, value in fields.items() if value is not None}


def check_fields(where, fields):
    """UserError unless each number is one in its range, and each flag true or false."""
    for key, value in fields.items():
        if key in NUMBERS:
            check_number(where, key, value, *NUMBERS[key])
        if key in FLAGS and not isinstance(value, bool):
            raise UserError(f"{where}: {key} should be true or false, it is {quoted(value)}")


def refuse_unsupported(path, c):
    """UserError for a model that needs what this file does not have."""
    kind = c.get("model_type")
    # Qwen2.5 stores a sliding window and switches it off. Mistral has no such switch.
    window_in_use = c.get("sliding_window") and (kind == "mistral" or c.get("use_sliding_window"))
    for key, unsupported, why in (
            ("model_type", kind not in SUPPORTED, f"supported are {', '.join(SUPPORTED)}"),
            ("quantization_config", c.get("quantization_config"), "such folders cannot be read"),
            ("hidden_act", c.get("hidden_act", "silu") != "silu", "only 'silu' is"),
            ("sliding_window", window_in_use, "only null or an unused one is; Mistral's is 4096 "
             "where the key is missing"),
            ("layer_types", any(t != "full_attention" for t in c.get("layer_types", [])),
             "every layer should be 'full_attention', not sliding_window or linear")):
        if unsupported:
            raise UserError(f"{path}: {key} {quoted(c.get(key))} is not supported: {why}")


def read_rope(path, c):
    """rope_theta and the settings of RoPE scaling from the fields of a config.

    transformers 5 moved rope_theta and rope_scaling into rope_parameters, and both forms are
    around. A loader that knows one of them takes 10000 and no scaling for the other, and its model
    goes wrong only in long texts.
    """
    rope = without_nulls(c.get("rope_scaling") or c.get("rope_parameters") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{path}: rope type {quoted(kind)} is not supported; supported are "
                        "default, linear, llama3 and yarn")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_parameters {quoted(rope)} should be one set for all layers")
    check_fields(f"{path}, {kind} RoPE", rope)

    theta = rope.pop("rope_theta", c.get("rope_theta"))         # of two, the one transformers takes
    if theta is None:
        theta = 10000.0
        say(f"{path}: no rope_theta, neither at the top nor in rope_parameters: 10000 is assumed")
    return float(theta), {"rope_type": kind, **rope}


def open_tensors(path):
    """A memory-mapped safetensors file, of which only the header is read; UserError if broken."""
    refuse_pointer(path)
    with reading(path, "read as safetensors, it may be truncated"):
        return safe_open(path, framework="pt")


def refuse_pointer(path):
    """UserError if path is no regular file, or what git leaves in its place without git-lfs."""
    check_regular(path)
    with reading(path), open(path, "rb") as f:
        start = f.read(20)
    if start.startswith(b"version https://git"):
        raise UserError(f"{path} is a git-lfs pointer, not the data: run git lfs pull")


class StoredTensor:
    """A tensor in a safetensors file: shape and dtype from the header, the data by `read`."""

    def __init__(self, path, file, name):
        self.path, self.file, self.name = path, file, name
        with reading(path):                             # an index may name what is not there
            header = file.get_slice(name)
            self.shape = tuple(header.get_shape())
            self.dtype = header.get_dtype()             # "BF16" and the like

    def read(self, axis=None, part=slice(None)):
        """The tensor; or only a part of its rows (axis 0) or columns (axis 1)."""
        with reading(self.path):
            if axis is None:
                return self.file.get_tensor(self.name)
            view = self.file.get_slice(self.name)
            return view[part] if axis == 0 else view[:, part]


def find_tensors(folder):
    """{name without "model.": StoredTensor} of all tensors that the folder has for us."""
    opened = {}
    tensors = {}
    for name, file in weight_map(folder).items():
        path = os.path.join(folder, file)
        if name.endswith("attention.wq.weight"):
            raise UserError(f"{path}: tensors named attention.wq are Meta's own, with q and k rows "
                            "in another order; use the Hugging Face files of the model, with names "
                            "like self_attn.q_proj")
        if name.endswith("rotary_emb.inv_freq"):
            continue                            # old files store what `rope_frequencies` computes
        short = name.removeprefix("model.")
        if short in tensors:
            raise UserError(f"{path}: {quoted(short)} is there twice, with and without 'model.'")
        if file not in opened:
            opened[file] = open_tensors(path)
        tensors[short] = StoredTensor(path, opened[file], name)
    return tensors


def weight_map(folder):
    """{name of a tensor: its file}, from the index if there is one, else from model.safetensors.

    We read no other file: folders often hold the same weights again in another form.
    """
    index = os.path.join(folder, INDEX)
    single = os.path.join(folder, SINGLE)
    if os.path.exists(index):
        with reading(index):
            shards = read_json(index)["weight_map"]
            for name, shard in shards.items():
                if os.path.basename(shard) != shard:
                    raise UserError(f"{index}: the shard {quoted(shard)} lies outside the folder")
                if not os.path.exists(os.path.join(folder, shard)):
                    raise UserError(f"{index}: the shard {quoted(shard)} that should hold "
                                    f"{quoted(name)} is not in the folder")
        return shards
    if os.path.exists(single):
        return dict.fromkeys(open_tensors(single).keys(), SINGLE)
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there; *.bin and Meta's "
                    "consolidated.* are not read, use the Hugging Face files of the model")


def complete_config(config, files, folder):
    """config with what only the files know: is there an LM head, and where are biases?"""
    tied = config.tied
    if not tied and "lm_head.weight" not in files:
        say(f"{folder}: the config says lm_head is not tied, but none is stored: "
            "the embedding is used")
        tied = True
    if tied and "embed_tokens.weight" not in files and "lm_head.weight" in files:
        files["embed_tokens.weight"] = files.pop("lm_head.weight")
    return replace(config, tied=tied,
                   qkv_bias=config.qkv_bias or "layers.0.self_attn.q_proj.bias" in files,
                   out_bias=config.out_bias or "layers.0.self_attn.o_proj.bias" in files,
                   mlp_bias=config.mlp_bias or "layers.0.mlp.up_proj.bias" in files)


def checkpoint_names(config):
    """{name in a checkpoint, without "model.": (our parameter, first row, last row + 1)}.

    A checkpoint has q_proj, k_proj and v_proj where we have qkv, and gate_proj and up_proj where we
    have gate_up. With 4 query heads and 2 KV heads of 8, k_proj is the rows 32 to 48 of our qkv.
    """
    c = config
    q = c.num_heads * c.head_dim
    kv = c.num_kv_heads * c.head_dim
    m = c.intermediate_size
    table = [       # theirs, ours, first row, last row + 1, has a bias
        ("input_layernorm", "attn_norm", 0, None, False),
        ("self_attn.q_proj", "qkv", 0, q, c.qkv_bias),
        ("self_attn.k_proj", "qkv", q, q + kv, c.qkv_bias),
        ("self_attn.v_proj", "qkv", q + kv, q + 2 * kv, c.qkv_bias),
        ("self_attn.o_proj", "out", 0, None, c.out_bias),
        ("post_attention_layernorm", "mlp_norm", 0, None, False),
        ("mlp.gate_proj", "gate_up", 0, m, c.mlp_bias),
        ("mlp.up_proj", "gate_up", m, 2 * m, c.mlp_bias),
        ("mlp.down_proj", "down", 0, None, c.mlp_bias),
    ]
    if c.qk_norm:
        table += [("self_attn.q_norm", "q_norm", 0, None, False),
                  ("self_attn.k_norm", "k_norm", 0, None, False)]

    names = {"embed_tokens.weight": ("embed.weight", 0, None),
             "norm.weight": ("norm.weight", 0, None)}
    if not c.tied:
        names["lm_head.weight"] = ("lm_head.weight", 0, None)
    for i in range(c.num_layers):
        for theirs, ours, start, stop, has_bias in table:
            names[f"layers.{i}.{theirs}.weight"] = (f"layers.{i}.{ours}.weight", start, stop)
            if has_bias:
                names[f"layers.{i}.{theirs}.bias"] = (f"layers.{i}.{ours}.bias", start, stop)
    return names


def check_files(model, files, folder):
    """UserError unless the files hold what the config asks for, and nothing else."""
    names = checkpoint_names(model.config)
    missing = sorted(names.keys() - files.keys())
    unused = sorted(files.keys() - names.keys())
    if missing or unused:
        raise UserError(f"{folder}: the tensors do not fit the config; "
                        f"{len(missing)} missing: {quoted(missing[:3], 200)}, "
                        f"{len(unused)} not used by this model: {quoted(unused[:3], 200)}")

    params = dict(model.named_parameters())
    for name, (ours, start, stop) in names.items():
        stored = files[name]
        wanted = tuple(params[ours][start:stop].shape)
        if stored.shape != wanted or stored.dtype not in STORED_DTYPES:
            raise UserError(f"{stored.path}: {stored.name} is {stored.dtype} of shape "
                            f"{quoted(stored.shape)}; the config asks for shape {wanted}, and we "
                            f"read {', '.join(STORED_DTYPES)}")


def pick_dtype(config, files, device):
    """fp32 on a CPU, else the config's dtype, else the embedding's own."""
    if device.type == "cpu":
        return torch.float32
    return config.dtype or STORED_DTYPES[files["embed_tokens.weight"].dtype]


def check_memory(needed, device, dtype):
    """UserError, with the bytes, if the weights cannot fit. Where nobody knows, we just try."""
    free = free_bytes(device)
    if free is not None and needed > free:
        hint = "; --dtype bfloat16 halves it" if dtype == torch.float32 else ""
        raise UserError(f"the weights need {needed / 2**30:.1f} GiB as {str(dtype)[6:]}, "
                        f"{device} has {free / 2**30:.1f} GiB free{hint}")


@torch.no_grad()
def fill(model, files):
    """Copy every tensor into its rows. One at a time: the model is never in memory twice.

    Of several processes each reads its own part: rows of qkv and gate_up, whose outputs are
    divided, and columns of out and down, whose inputs are. The biases of out and down would be
    summed over the processes, so only the first has them.
    """
    c = model.config
    axes = {"qkv.weight": 0, "qkv.bias": 0, "gate_up.weight": 0, "gate_up.bias": 0,
            "out.weight": 1, "down.weight": 1}
    params = dict(model.named_parameters())
    for name, (ours, start, stop) in checkpoint_names(c).items():
        rows = params[ours][start:stop]
        kind = ".".join(ours.split(".")[-2:])
        axis = axes.get(kind) if c.processes > 1 else None
        part = slice(None)
        if axis is not None:
            size = files[name].shape[axis] // c.processes
            part = slice(c.rank * size, (c.rank + 1) * size)
        rows.copy_(files[name].read(axis, part))    # converts to the parameter's device and dtype
        check_finite(files[name].path, files[name].name, rows)
        if kind in ("out.bias", "down.bias") and c.rank > 0:
            rows.zero_()


def check_finite(path, name, tensor):
    """UserError if a tensor holds NaN or infinity: the model's answers would be empty or senseless.

    The smallest and the largest number tell, for a NaN makes both NaN. `isfinite` of all numbers
    would take some 50 times as long, and as much memory as the tensor.
    """
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {quoted(name)} holds NaN or infinity (as {kind})")


def compare_head(model, head):
    """Say so if a tied model's folder stores an LM head as well, and one that differs."""
    embedding = model.embed.weight
    if head.shape != tuple(embedding.shape) or not head.read().to(embedding).equal(embedding):
        say(f"{head.path}: the config ties lm_head to the embedding, but the stored lm_head "
            "differs: the embedding is used")
