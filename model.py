"""A Llama, from a folder of safetensors to hidden states.

Reads the config.json, tokenizer.json and *.safetensors of a Hugging Face folder (Llama 2, 3, 3.1 and 3.2, Mistral
without a sliding window, Qwen2.5, Qwen3) and runs it:

    model = Llama.from_pretrained("path/to/folder", device="cuda")
    hidden = model(tokens)                   # (B, T) ids -> (B, T, hidden_size), after the final norm
    logits = model.logits(hidden[:, -1])     # only for the positions that need them

Nothing here knows about caches or gates. The forward pass hands q, k and v of each layer to an object `kv`, which owns
everything that is remembered: positions, lengths, rotation and attention.

    kv.begin(T, lengths) -> positions        once a call, before the first layer
    kv.attend(layer, q, k, v, cos, sin)      once a layer; q and k come unrotated
    kv.end()                                 once a call: the only place where positions advance

Without a `kv` it is plain causal attention over the call's own tokens. wgkv.py has the others.

Letters in shapes: B sequences, T new tokens, Hq query heads, Hkv key/value heads, D head dim. Tensors that have heads
are (B, heads, T, D).
"""
import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UserError(Exception):
    """Something the person at the keyboard can mend. The scripts print it as one line and exit with status 2."""


def say(message):
    """A remark for the person: stderr, so that stdout carries only results."""
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- config.json

@dataclass(frozen=True)
class Config:
    """What the shapes and the arithmetic depend on; see `read_config` for where each number is found."""
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
    rope: dict = field(default_factory=dict)       # scaling: {"rope_type": "llama3", "factor": 8.0, ...} or empty
    tied: bool = True                              # lm_head is the embedding
    qk_norm: bool = False                          # Qwen3: RMSNorm of every q and k head before the rotation
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None                       # what the folder says its weights are in


def read_json(path, required=True):
    """The object in a JSON file; {} if it is absent and not required. UserError if it cannot be read."""
    if not os.path.exists(path):
        if required:
            raise UserError(f"{path} is missing: a model is a folder in Hugging Face layout, with config.json, "
                            "tokenizer.json and model.safetensors (or an index and its shards)")
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def read_config(folder):
    """Config from folder/config.json. UserError, naming the key, for anything this code would compute wrongly."""
    path = os.path.join(folder, "config.json")
    c = read_json(path)
    kind = c.get("model_type")
    if kind not in SUPPORTED:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    if c.get("quantization_config"):
        raise UserError(f"{path}: quantization_config {json.dumps(c['quantization_config'])[:80]}: quantised folders "
                        "are not supported")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {c['hidden_act']!r} is not supported, only 'silu'")
    slides = c.get("use_sliding_window", kind == "mistral") and c.get("sliding_window")
    if slides or "sliding_attention" in (c.get("layer_types") or ()):
        raise UserError(f"{path}: sliding_window {c.get('sliding_window')} is in use: sliding-window models are not "
                        "supported")

    def need(key, default=None):
        value = c.get(key) if c.get(key) is not None else default
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key} should be a whole number above 0, it is {value!r}")
        return value

    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_parameters (or rope_scaling) should be one set of settings for all layers, it "
                        f"is {json.dumps(rope)[:80]}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or c.get("rope_theta")         # of two, the one transformers would take
    if theta is None:
        theta = 10000.0
        say(f"{path}: no rope_theta in it, neither at the top nor in rope_parameters: 10000 is assumed")
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{path}: rope type {rope_type!r} is not supported; supported are default, linear, llama3 and "
                        "yarn")
    if rope_type != "default":
        wanted = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        for key in wanted.get(rope_type, ("factor",)):
            if not isinstance(rope.get(key), (int, float)) or not rope[key] > 0:
                raise UserError(f"{path}: rope type {rope_type} needs a number {key}, it is {rope.get(key)!r}")
    hidden, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads, head_dim = need("num_key_value_heads", heads), need("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"{path}: num_attention_heads {heads} should be a multiple of num_key_value_heads {kv_heads}, "
                        f"and head_dim {head_dim} even")
    if not isinstance(theta, (int, float)):
        raise UserError(f"{path}: rope_theta should be a number, it is {theta!r}")
    bias = bool(c.get("attention_bias", False))
    return Config(
        model_type=kind, vocab_size=need("vocab_size"), hidden_size=hidden,
        intermediate_size=need("intermediate_size"), num_layers=need("num_hidden_layers"), num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, norm_eps=c.get("rms_norm_eps", 1e-6),
        max_positions=need("max_position_embeddings"), rope_theta=float(theta),
        rope={} if rope_type == "default" else {"rope_type": rope_type, **rope},
        tied=bool(c.get("tie_word_embeddings", False)), qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2", out_bias=bias, mlp_bias=bool(c.get("mlp_bias", False)),
        dtype=c.get("dtype") or c.get("torch_dtype"))


# -------------------------------------------------------------------------------------------------------------- RoPE
# Rotary position embedding (arXiv 2104.09864): dimension pair m of a head, (x[m], x[m + D/2]), is turned by the angle
# position * inv_freq[m], so that q . k depends on positions only through their difference.

def rope_frequencies(config):
    """inv_freq (D/2) fp32 on the CPU, and the factor on cos and sin (1 except for yarn)."""
    D, base, r = config.head_dim, config.rope_theta, config.rope
    inv_freq = base ** (-torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    kind = r.get("rope_type", "default")
    if kind == "linear":
        return inv_freq / r["factor"], 1.0
    if kind == "llama3":
        # Slow waves (longer than the original context allows for) are stretched, fast ones kept, those between blended.
        turns = r["original_max_position_embeddings"] * inv_freq / (2 * math.pi)       # in the original context
        low, high = r["low_freq_factor"], r["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (keep + (1 - keep) / r["factor"]), 1.0
    if kind == "yarn":
        # arXiv 2309.00071: the same idea, with the blend linear in the dimension, and a temperature on the scores.
        original = r.get("original_max_position_embeddings") or config.max_positions

        def dimension(turns):                          # the (fractional) pair that turns this often in the context
            return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(r.get("beta_fast") or 32), dimension(r.get("beta_slow") or 1)
        if r.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        stretch = ((torch.arange(D // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)

        def temperature(m):
            return 0.1 * m * math.log(r["factor"]) + 1 if r["factor"] > 1 else 1.0

        scale = r.get("attention_factor")
        if scale is None:
            m, m_all = r.get("mscale"), r.get("mscale_all_dim")
            scale = temperature(m) / temperature(m_all) if m and m_all else temperature(1)
        return inv_freq * (1 - stretch + stretch / r["factor"]), scale
    return inv_freq, 1.0


def rotate(x, cos, sin):
    """x (B, heads, T, D) turned by the angles of its positions; cos, sin (B, 1, T, D) fp32. Computed in fp32."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------------- the model

def attention(q, k, v, mask=None, is_causal=False):
    """torch's own attention, (B, Hq, T, D), where query head h reads KV head h // G of k, v (B, Hkv, S, D).

    On a GPU none of its fused kernels takes fp32 with fewer KV heads, and what is left holds all T x S scores at once:
    so there the KV heads are repeated.
    """
    G = q.shape[1] // k.shape[1]
    if G > 1 and q.is_cuda and q.dtype == torch.float32:
        k, v, G = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=G > 1)


class CausalAttention:
    """The `kv` of a call without one: every token sees itself and all before it in the call; nothing is remembered."""

    def __init__(self, device):
        self.device = device

    def begin(self, T, lengths=None):
        return torch.arange(T, device=self.device)[None]

    def attend(self, layer, q, k, v, cos, sin):
        return attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)

    def end(self):
        pass


def add_norm(x, y, norm):
    """x + y (or x, if y is None) and its norm. On a GPU and without gradients in one kernel, which writes over x."""
    if x.is_cuda and not torch.is_grad_enabled():
        import kernels
        return kernels.add_norm(x, y, norm)
    x = x if y is None else x + y
    return x, norm(x)


def silu_product(x):
    """SiLU(gate) * up for x = [gate ; up] along the last dimension."""
    if x.is_cuda and not torch.is_grad_enabled():
        import kernels
        return kernels.silu_product(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attn_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.qkv = nn.Linear(c.hidden_size, q + 2 * kv, bias=c.qkv_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.out = nn.Linear(q, c.hidden_size, bias=c.out_bias)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x, y, kv, layer, cos, sin):
        """The residual stream x (B, T, hidden_size) and what the layer before adds to it, y or None -> the same."""
        B, T, _ = x.shape
        Hq, Hkv, D = self.heads
        x, y = add_norm(x, y, self.attn_norm)
        qkv = self.qkv(y).view(B, T, Hq + 2 * Hkv, D).transpose(1, 2)
        q, k, v = qkv.split((Hq, Hkv, Hkv), dim=1)                                  # (B, Hq or Hkv, T, D)
        y = kv.attend(layer, self.q_norm(q), self.k_norm(k), v, cos, sin)           # (B, Hq, T, D)
        x, y = add_norm(x, self.out(y.transpose(1, 2).reshape(B, T, Hq * D)), self.mlp_norm)
        return x, self.down(silu_product(self.gate_up(y)))


class Llama(nn.Module):
    """The whole decoder. `model(tokens, kv, lengths)` gives hidden states, `model.logits(hidden)` the scores."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.name = "model"
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.lm_head = None if c.tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        # Not a buffer: angles need fp32, and model.to(bfloat16) would take a buffer along.
        self.inv_freq, self.rope_scale = rope_frequencies(c)

    def forward(self, tokens, kv=None, lengths=None, checkpoint=False):
        """Hidden states (B, T, hidden_size) of new tokens (B, T), after the final norm.

        lengths (B) int64: how many of the T tokens of each sequence are real; the rest is padding on the right, which
        is never remembered and whose hidden states mean nothing. checkpoint: recompute layers in the backward pass.
        """
        kv = kv if kv is not None else CausalAttention(tokens.device)
        cos, sin = self.rope(kv.begin(tokens.shape[1], lengths))
        x, y = self.embed(tokens), None
        for i, layer in enumerate(self.layers):
            if checkpoint:
                x, y = torch.utils.checkpoint.checkpoint(layer, x, y, kv, i, cos, sin, use_reentrant=False)
            else:
                x, y = layer(x, y, kv, i, cos, sin)
        kv.end()
        return add_norm(x, y, self.norm)[1]

    def rope(self, positions):
        """cos, sin (B, 1, T, D) fp32 for positions (B, T)."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def logits(self, hidden):
        """Scores (..., vocab_size) for hidden states (..., hidden_size)."""
        return F.linear(hidden, self.embed.weight if self.lm_head is None else self.lm_head.weight)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """The model in a local folder, or of a hub name such as "meta-llama/Llama-3.2-1B".

        dtype: a torch dtype, else the config's, else the tensors' own; on the CPU half precision becomes fp32 unless
        asked for. One tensor at a time goes from the memory-mapped file to its place on the device, so nothing is held
        twice. Every tensor must be used and every parameter filled. Raises UserError with the tensor and the file.
        """
        folder = find_folder(path)
        config = read_config(folder)
        files = find_tensors(folder, config)
        has = {name.rsplit("layers.0.", 1)[-1] for name in files if "layers.0." in name}
        config = replace(config, tied=config.tied or "lm_head.weight" not in files,
                         qkv_bias=config.qkv_bias or "self_attn.q_proj.bias" in has,
                         out_bias=config.out_bias or "self_attn.o_proj.bias" in has,
                         mlp_bias=config.mlp_bias or "mlp.up_proj.bias" in has)
        dtype = dtype or pick_dtype(config, files, device)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        check_memory(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device, dtype)
        try:
            model.to_empty(device=device)
        except torch.OutOfMemoryError as e:
            raise UserError(f"{folder}: the weights do not fit on {device}: {str(e).splitlines()[0]}") from None
        fill(model, files, folder)
        model.name = Path(path).resolve().name if os.path.isdir(path) else str(path)
        return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- from files to parameters

READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def find_folder(path):
    """The local folder of a model: path itself, or where the hub's files are cached. Fetches only what is read."""
    path = str(path)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{path} is no folder, and no hub name of the form owner/name either")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    found = {}

    def fetch(name, optional=False):
        try:
            found[name] = hf_hub_download(path, name)
        except Exception as e:                                  # the network's libraries raise their own kinds
            offline = isinstance(e, LocalEntryNotFoundError)    # and the file is not in the cache either
            if offline and optional:
                say(f"{path}: the hub cannot be reached and {name} is not in its cache: going on without it")
            elif offline or not isinstance(e, EntryNotFoundError):
                why = " ".join(str(e).split())[:300] or type(e).__name__
                raise UserError(f"{path} is no local folder, and fetching {name} from the hub failed: {why}") from None

    for name in (*READ, INDEX):
        fetch(name, optional=name != "config.json")
    if INDEX in found:
        for shard in sorted(set(read_index(found[INDEX]).values())):
            fetch(shard)
    else:
        fetch(SINGLE)
    if "config.json" not in found:
        raise UserError(f"{path}: the hub's repository has no config.json")
    return os.path.dirname(found["config.json"])


def read_index(index):
    """{tensor: shard} from an index file; a shard outside the folder is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: it has no weight_map")
    for shard in weight_map.values():
        parts = Path(shard).parts if isinstance(shard, str) else ("..",)
        if os.path.isabs(str(shard)) or ".." in parts or "\\" in str(shard):
            raise UserError(f"{index}: the shard {shard!r} lies outside the folder; refused")
    return weight_map


def open_tensors(path):
    """A memory-mapped safetensors file. UserError if it is absent, a git-lfs pointer, or broken."""
    try:
        with open(path, "rb") as f:
            if f.read(20).startswith(b"version https://git"):
                raise UserError(f"{path} is a git-lfs pointer, not the data: run git lfs pull")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path} cannot be read as safetensors, it may be truncated: {e}") from None


def find_tensors(folder, config):
    """{name without "model.": (open file, name in the file, path)} for every tensor to load.

    The index decides where there is one, else model.safetensors; other files in the folder are not looked at.
    """
    index, single = os.path.join(folder, INDEX), os.path.join(folder, SINGLE)
    files = {}
    if os.path.exists(index):
        handles = {}
        for name, shard in read_index(index).items():
            path = os.path.join(folder, shard)
            if shard not in handles:
                if not os.path.exists(path):
                    raise UserError(f"{index}: the shard {shard} that should hold {name} is not in the folder")
                handles[shard] = open_tensors(path)
                handles[shard] = (handles[shard], set(handles[shard].keys()))
            if name not in handles[shard][1]:
                raise UserError(f"{index}: {name} should be in {shard} and is not")
            files[name] = (handles[shard][0], name, path)
    elif os.path.exists(single):
        handle = open_tensors(single)
        files = {name: (handle, name, single) for name in handle.keys()}
    elif any(f.startswith("consolidated") for f in os.listdir(folder)):
        raise UserError(f"{folder}: consolidated.* are Meta's own files, whose q and k rows are laid out differently; "
                        "use the model.safetensors (or shards and index) of the Hugging Face repository")
    else:
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there (pickled *.bin files are not read)")
    metas = [path for name, (_, _, path) in files.items() if name.endswith("attention.wq.weight")]
    if metas:
        raise UserError(f"{metas[0]}: tensors named attention.wq are Meta's own layout, whose q and k rows are ordered "
                        "differently; use the Hugging Face files of the model (self_attn.q_proj)")
    files = {n.removeprefix("model."): v for n, v in files.items() if not n.endswith("rotary_emb.inv_freq")}
    if "embed_tokens.weight" not in files and "lm_head.weight" in files and config.tied:
        files["embed_tokens.weight"] = files.pop("lm_head.weight")
    elif config.tied and "lm_head.weight" in files:
        head, embedding = (f.get_tensor(n) for f, n, _ in (files.pop("lm_head.weight"), files["embed_tokens.weight"]))
        if not torch.equal(head, embedding):
            say(f"{folder}: the config ties lm_head to the embedding, a stored lm_head differs: the embedding is used")
    elif not config.tied and "lm_head.weight" not in files:
        say(f"{folder}: the config says lm_head is not tied, but none is stored: the embedding is used")
    return files


def checkpoint_names(config):
    """{name in a checkpoint: (our parameter, first row, last row + 1)}; q, k, v and gate, up are stacked in ours."""
    c, names = config, {"embed_tokens.weight": ("embed.weight", 0, None), "norm.weight": ("norm.weight", 0, None)}
    q, kv, m = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    if not c.tied:
        names["lm_head.weight"] = ("lm_head.weight", 0, None)
    stacked = (("self_attn.q_proj", "qkv", 0, q, c.qkv_bias), ("self_attn.k_proj", "qkv", q, q + kv, c.qkv_bias),
               ("self_attn.v_proj", "qkv", q + kv, q + 2 * kv, c.qkv_bias),
               ("self_attn.o_proj", "out", 0, None, c.out_bias), ("mlp.down_proj", "down", 0, None, c.mlp_bias),
               ("mlp.gate_proj", "gate_up", 0, m, c.mlp_bias), ("mlp.up_proj", "gate_up", m, 2 * m, c.mlp_bias))
    norms = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm"))
    norms += (("self_attn.q_norm", "q_norm"), ("self_attn.k_norm", "k_norm")) if c.qk_norm else ()
    for i in range(c.num_layers):
        for theirs, ours, start, stop, bias in stacked:
            for what in ("weight", "bias") if bias else ("weight",):
                names[f"layers.{i}.{theirs}.{what}"] = (f"layers.{i}.{ours}.{what}", start, stop)
        for theirs, ours in norms:
            names[f"layers.{i}.{theirs}.weight"] = (f"layers.{i}.{ours}.weight", 0, None)
    return names


@torch.no_grad()
def fill(model, files, folder):
    """Copy every tensor into its rows; UserError names what is missing, left over or misshapen."""
    names, params = checkpoint_names(model.config), dict(model.named_parameters())
    missing, unused = sorted(names.keys() - files.keys()), sorted(files.keys() - names.keys())
    if missing or unused:
        parts = [f"{what}: {', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''}"
                 for what, n in (("missing", missing), ("not used by this model", unused)) if n]
        raise UserError(f"{folder}: the tensors do not fit the config; " + "; ".join(parts))
    for name, (ours, start, stop) in names.items():
        handle, stored, path = files[name]
        target, shape = params[ours][start:stop], tuple(handle.get_slice(stored).get_shape())
        if shape != tuple(target.shape):
            raise UserError(f"{path}: {stored} has shape {shape}, the config asks for {tuple(target.shape)}")
        try:
            target.copy_(handle.get_tensor(stored))
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: {stored} cannot be read: {e}") from None


def pick_dtype(config, files, device):
    """The config's dtype, else the embedding's own; fp32 on the CPU, where half precision is slow or absent."""
    if torch.device(device).type == "cpu":
        return torch.float32
    if config.dtype in DTYPES:
        return DTYPES[config.dtype]
    handle, stored, _ = files.get("embed_tokens.weight") or next(iter(files.values()))
    return handle.get_slice(stored)[:1].dtype


def free_bytes(device):
    """Memory that is free on a device, or None where nobody says: on a CPU only Linux does."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")), None)
    return None


def check_memory(needed, device, dtype):
    """UserError, with the bytes, if the weights cannot fit. (Where nobody says what is free we just try.)"""
    free = free_bytes(device)
    if free is not None and needed > free:
        hint = "; --dtype bfloat16 halves it" if dtype == torch.float32 else ""
        raise UserError(f"the weights need {needed / 2**30:.1f} GiB as {str(dtype)[6:]}, {device} has "
                        f"{free / 2**30:.1f} GiB free{hint}")
