"""Gates and caches in files: what is written, and what is refused.

To be skipped at a first reading. Gates and saved caches are safetensors files. Everything in a file
is untrusted: each check names the file, what it found and what it expected, in one line. Nothing
is unpickled but an official checkpoint, and of that only tensors.
"""
import bisect
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from common import UserError, check_number, check_regular, quoted, reading, replacing, say
from model import check_finite, open_tensors, refuse_pointer

FORMAT = "1"        # of gate files: a file of another format is refused
CACHE_FORMAT = "1"  # of cache files
PAGES_AT_ONCE = 1024        # of a cache file's keys and values, checked and copied together


# ------------------------------------------------------------------------------------- gate files

def gate_shape(model):
    """What gates must share with a model: (layers, KV heads, head dim)."""
    c = model.config
    return c.num_layers, c.num_kv_heads * c.processes, c.head_dim


def own_shape(model):
    """The same for the KV heads that this process has."""
    c = model.config
    return c.num_layers, c.num_kv_heads, c.head_dim


def save_gates(gates, path, model, lam=0.0, recipe="", dtype=torch.float32):
    """Write one safetensors file: the parameters, and in its metadata what belongs to them.

    lam and recipe say how the gates were trained (lambda, and the settings as JSON). They are
    kept for the reader; nothing here reads them. dtype: of the parameters in the file, float32 or
    bfloat16, which halves it. Gates compute in fp32 either way.
    """
    L, Hkv, D = gates.shape
    tensors = {}
    for name, p in gates.named_parameters():
        tensors[name] = p.detach().to("cpu", dtype).contiguous()
    metadata = dict(format=FORMAT, window=gates.window, tau=gates.tau, expansion=gates.expansion,
                    lam=lam, model=model.name, layers=L, kv_heads=Hkv, head_dim=D,
                    fingerprint=fingerprint(model), recipe=recipe)
    if gates.quantiles:
        metadata["quantiles"] = json.dumps(gates.quantiles)
    with replacing(path) as part:           # never half a file where a good one was
        save_file(tensors, part, metadata={key: str(value) for key, value in metadata.items()})


def load_gates(make, path, model):
    """Gates for this model from a file of save_gates, or from an official .pt checkpoint.

    make: wgkv.Gates (this file does not import wgkv.py).

    UserError if they do not fit by shape. If only the shape fits, because they were trained for
    another model of the family, they load with a remark.
    """
    if str(path).endswith(".pt"):
        return load_official(make, path, model)
    file = open_tensors(path)
    meta = file.metadata() or {}
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} is no gate file of format {FORMAT}: its metadata says "
                        f"{quoted(meta.get('format'))}")

    def number(key, low, high, kind):
        return metadata_number(path, key, meta.get(key), low, high, kind)

    shape = tuple(number(key, 1, 2**20, int) for key in ("layers", "kv_heads", "head_dim"))
    refuse_misfit(path, quoted(meta.get("model")), shape, model)
    # A cache allocates its ring, `window` tokens of every head, before it sees a single token.
    settings = dict(window=number("window", 1, 2**20, int), tau=number("tau", 0, 1, float),
                    expansion=number("expansion", 1 / shape[2], 256, float))
    quantiles = read_quantiles(path, meta)
    # In fp16 small weights lose bits, and with them the fingerprint.
    if meta.get("fingerprint") != fingerprint(model) and model.dtype != torch.float16:
        say_of_other_weights(path, meta, model)
    shapes = {}
    with reading(path):
        for name in file.keys():
            header = file.get_slice(name)
            shapes[name] = tuple(header.get_shape())
            if header.get_dtype() not in ("F32", "BF16"):
                raise UserError(f"{path}: {quoted(name)} has the dtype {header.get_dtype()}, gates "
                                "are stored in F32 or BF16")
    gates = fill_gates(make, path, model, settings, shapes, file.get_tensor)
    gates.quantiles = quantiles
    return gates


def say_of_other_weights(path, meta, model):
    """The remark on gates that fit a model by shape and were trained with other weights."""
    if same_name(meta.get("model"), model.name):
        say(f"{path}: these gates were trained with other weights of {model.name} than the ones "
            "here; a quantized copy has such. The shapes fit")
    else:
        say(f"{path}: these gates were trained for another model ({quoted(meta.get('model'))}) "
            f"than {model.name}: the shapes fit, the weights differ")


def same_name(one, other):
    """Do two names mean the same model? The hub's owner/Name is a local folder Name, or name.

    A file may name none, or something that is no text: that is no model's name.
    """
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    one = one.rpartition("/")[2].casefold()
    other = other.rpartition("/")[2].casefold()
    return one != "" and one == other


def find_gates(folder, model, names):
    """The gate file in a folder that fits a model by shape and by one of its names, or None.

    A file's own names are its stem and its metadata's `model`. Only headers are read.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        meta = open_tensors(path).metadata() or {}
        own_names = path.stem, meta.get("model")
        named = any(same_name(own, name) for own in own_names for name in names)
        shape = tuple(meta.get(key) for key in ("layers", "kv_heads", "head_dim"))
        if named and shape == tuple(map(str, gate_shape(model))):
            return str(path)
    return None


def load_official(make, path, model):
    """Gates in the layout of the authors' checkpoints: a pickled dict of tensors."""
    tensors = read_official(path)
    L = 1 + max(int(name.split(".")[1]) for name in tensors)
    D = first_size(tensors["layers.0.pre_norm"])
    Hkv = first_size(tensors["layers.0.w2"])
    rows = first_size(tensors["layers.0.w1"])
    refuse_misfit(path, "its model", (L, Hkv, D), model)

    # Theirs are weights of Conv1d (rows, columns, 1), and the rows of all heads stand in one
    # matrix, head after head. With 2 heads of 64 hidden numbers, rows 64 to 128 are head 1's.
    hidden = max(1, rows // Hkv)
    their_shapes = {"w1": (Hkv * hidden, 2 * D, 1), "b1": (Hkv * hidden,), "w2": (Hkv, hidden, 1)}
    our_shapes = {"w1": (Hkv, hidden, 2 * D), "b1": (Hkv, hidden), "w2": (Hkv, hidden)}
    reshaped = {}
    for name, tensor in tensors.items():
        part = name.split(".")[2]           # "w1" of "layers.0.w1"
        if part in their_shapes and tensor.shape == their_shapes[part]:
            tensor = tensor.reshape(our_shapes[part])
        reshaped[name] = tensor             # in another shape it does not fit: fill_gates says so
    shapes = {name: tuple(tensor.shape) for name, tensor in reshaped.items()}
    return fill_gates(make, path, model, dict(expansion=hidden / D), shapes, reshaped.get)


@torch.no_grad()
def fill_gates(make, path, model, settings, shapes, get_tensor):
    """Gates for model, with the tensors of a file.

    shapes: name -> shape of all its tensors. get_tensor: name -> tensor.

    UserError unless they are exactly the parameters. The shapes are compared on the meta
    device, where parameters have no memory: a broken file must not make us allocate what it
    asks for.
    """
    with torch.device("meta"):
        gates = make(*gate_shape(model), **settings)
    params = dict(gates.named_parameters())
    missing = sorted(params.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - params.keys())
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing")
    if unknown:
        raise UserError(f"{path}: {quoted(unknown[0])} is not a gate parameter")
    for name, p in params.items():
        if shapes[name] != tuple(p.shape):
            raise UserError(f"{path}: {name} has shape {quoted(shapes[name])}, "
                            f"not {tuple(p.shape)}")

    with torch.device("meta"):
        gates = make(*own_shape(model), **settings)
    gates.to_empty(device=model.device)
    first = model.config.rank * model.config.num_kv_heads
    for name, p in gates.named_parameters():
        with reading(path):
            data = get_tensor(name)
        if not name.endswith("_norm"):              # one for each head
            data = data[first:first + len(p)]
        p.copy_(data)
        check_finite(path, name, p)
    return gates.eval().requires_grad_(False)


def metadata_number(path, key, text, low, high, kind):
    """A number from a gate file's metadata, where everything is text."""
    try:
        value = kind(text)
    except (TypeError, ValueError):
        value = text
    return check_number(path, f"its metadata's {key}", value, low, high, whole=kind is int)


# The quantiles of gates, by which generate.py --keep chooses tau.
#
# How many pages does a row need at some tau? With n promoted tokens it has ceil(n / 64) pages. So
# it takes a page with its 1st promoted token, and the next ones with its 65th, 129th, ...
# Sort a row's gates in falling order. Then the row has its first page if tau is at most the 1st
# gate, the second page if tau is at most the 65th, and so on: each of these *opening gates* stands
# for one page. All others do not matter. For example, a row of 100 tokens:
#
#     gates, sorted       0.9 (the 1st)   ...   0.2 (the 65th)   ...   0.01 (the 100th)
#     opening gates       0.9                   0.2
#     tau = 0.5           opens one page of two
#     tau = 0.1           opens both
#
# A gate file has the quantiles of the opening gates of all rows of some texts, for some lengths of
# a text:
#
#     {"1024": [65 numbers, ascending], "2048": ...}
#
# If the number for the level 0.9 is 0.07, then 90% of the opening gates are below 0.07. So
# tau = 0.07 opens 10% of the pages that all tokens would fill. The levels are 1 - (n / 64)^2: they
# lie closest near 1, where small shares are.

LEVELS = [1 - (n / 64) ** 2 for n in range(64, -1, -1)]


def page_share(quantiles, tau, tokens):
    """About which share of its pages tau opens in a text of so many tokens.

    All pages are those that its tokens would fill if every one were promoted. Between two lengths
    the share changes with the logarithm of the length; outside of them it is the nearest one's.
    """
    lengths = sorted(quantiles)
    tokens = min(max(tokens, lengths[0]), lengths[-1])
    upper = bisect.bisect_left(lengths, tokens)                 # the first of at least `tokens`
    upper_share = share_at(quantiles[lengths[upper]], tau)
    if lengths[upper] == tokens:
        return upper_share
    lower_share = share_at(quantiles[lengths[upper - 1]], tau)
    # Where the length lies between its two neighbors, from 0 to 1. All three are logarithms.
    weight = math.log(tokens / lengths[upper - 1]) / math.log(lengths[upper] / lengths[upper - 1])
    return lower_share + weight * (upper_share - lower_share)


def share_at(values, tau):
    """The share of opening gates that reach tau, from the quantiles of one length.

    Between two quantiles it changes with the logarithm of tau: most gates are tiny.
    """
    upper = bisect.bisect_left(values, tau)                     # the first that reaches tau
    if upper == 0:                  # all do
        return 1.0
    if upper == len(values):        # none does
        return 0.0
    log_tau = math.log(max(tau, 1e-30))
    log_low = math.log(max(values[upper - 1], 1e-30))
    log_high = math.log(max(values[upper], 1e-30))
    weight = 1.0
    if log_high > log_low:
        weight = (log_tau - log_low) / (log_high - log_low)
    level = LEVELS[upper - 1] + weight * (LEVELS[upper] - LEVELS[upper - 1])
    return 1 - level                # `level` of the gates are below tau


def read_quantiles(path, meta):
    """{length: the quantiles of opening gates} from a gate file's metadata; {} if it has none."""
    text = meta.get("quantiles")
    if text is None:
        return {}
    if len(text) > 2**17:
        raise UserError(f"{path}: its metadata's quantiles take {len(text):,} characters")
    with reading(f"{path}: its metadata's quantiles", "read as JSON"):
        stored = json.loads(text)
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"{path}: its metadata's quantiles should be an object with a list for "
                        f"each length, they are {quoted(text)}")
    quantiles = {}
    for key, values in stored.items():
        if not re.fullmatch("[1-9][0-9]{0,8}", key):
            raise UserError(f"{path}: its metadata's quantiles name {quoted(key)} as a length")
        what = f"its metadata's quantiles for {key} tokens"
        if not isinstance(values, list) or len(values) != len(LEVELS):
            raise UserError(f"{path}: {what} should be {len(LEVELS)} numbers, they are "
                            f"{quoted(values)}")
        for value in values:
            check_number(path, what, value, 0, 1)
        if any(one > next_one for one, next_one in itertools.pairwise(values)):
            raise UserError(f"{path}: {what} should ascend, they are {quoted(values)}")
        quantiles[int(key)] = values
    return dict(sorted(quantiles.items()))


def write_quantiles(path, quantiles):
    """Put quantiles into a gate file's metadata; all else in the file stays, byte for byte.

    A safetensors file is the size of its header, the header as JSON, and the tensors' bytes.
    """
    with reading(path), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"]["quantiles"] = json.dumps(quantiles)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)                 # tensors begin at a multiple of 8
        with replacing(path) as part, open(part, "wb") as copy:
            copy.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, copy)


OFFICIAL_NAME = re.compile(r"(?:model\.layers\.)?([0-9]{1,6})\.self_attn\.g_predictors\.(\w+\.\w+)")
OFFICIAL_PARTS = {"pre_key_norm.weight": "pre_norm", "post_key_norm.weight": "post_norm",
                  "conv1.weight": "w1", "conv1.bias": "b1",
                  "conv2.weight": "w2", "conv2.bias": "b2"}


def read_official(path):
    """{our name: tensor} from an official checkpoint."""
    refuse_pointer(path)
    check_regular(path, most=2**32)             # gates of an 8B model have some 128 MiB
    with reading(path, "read as a dict of tensors"):
        # weights_only: a pickle can run any code while it is read; this way it cannot.
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except (KeyError, IndexError, EOFError):        # the unpickler, from a file of another kind
            raise pickle.UnpicklingError from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} should hold a dict of tensors, it holds a {type(stored).__name__}")
    tensors = {}
    for name, tensor in stored.items():
        match = OFFICIAL_NAME.fullmatch(str(name))
        if not match or match[2] not in OFFICIAL_PARTS or not is_plain(tensor, path):
            raise UserError(f"{path}: {quoted(name)} is no tensor of an official gate checkpoint")
        tensors[f"layers.{match[1]}.{OFFICIAL_PARTS[match[2]]}"] = tensor.detach()
    if not {"layers.0.pre_norm", "layers.0.w1", "layers.0.w2"} <= tensors.keys():
        raise UserError(f"{path}: it holds no gates of layer 0 "
                        "(model.layers.0.self_attn.g_predictors.*)")
    return tensors


def is_plain(tensor, path):
    """Is it an ordinary tensor of real numbers, with as many bytes as its file has at most?

    Pickles can hold other kinds: sparse, nested and quantised tensors, and four bytes that are
    expanded to 10^8 rows.
    """
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return False
    with reading(path):
        return tensor.numel() * tensor.itemsize <= os.path.getsize(path)


def first_size(tensor):
    """The first of a tensor's sizes, 1 if it has none."""
    return tensor.shape[0] if tensor.dim() else 1


def refuse_misfit(path, trained_for, shape, model):
    """UserError, naming both sides, unless gates of this shape fit the model."""
    if shape != gate_shape(model):
        form = "{} layers, {} KV heads of {}"
        raise UserError(f"{path}: these gates are for {trained_for} with {form.format(*shape)}, "
                        f"the model {model.name} has {form.format(*gate_shape(model))}")


def fingerprint(model):
    """A short hash of a model's shape and of some of its first layer's weights.

    Gates of Llama-3.2-1B fit Llama-3.2-1B-Instruct by shape. The hash tells the two apart. The
    weights are rounded to bf16, so that it is the same for a model loaded in fp32 and in bf16.
    """
    c = model.config
    kv_rows = 2 * c.num_kv_heads * c.head_dim                       # k_proj and v_proj
    weight = model.layers[0].qkv.weight[-kv_rows:]
    if c.processes > 1:                             # all of k_proj, and then all of v_proj
        parts = [torch.empty_like(weight) for _ in range(c.processes)]
        dist.all_gather(parts, weight.contiguous())
        keys = [part.chunk(2)[0] for part in parts]
        values = [part.chunk(2)[1] for part in parts]
        weight = torch.cat(keys + values)
    sample = weight[::7, ::5].to("cpu", torch.bfloat16)
    sizes = (c.model_type, c.num_layers, c.hidden_size, c.num_heads * c.processes,
             c.num_kv_heads * c.processes, c.head_dim, c.vocab_size)
    # Through Python numbers: without numpy, bf16 has no bytes that hashlib takes.
    text = repr((sizes, sample.flatten()[:4096].tolist()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------- cache files
#
# A file has no page ids: pages lie in it row after row, and get new ids when they are loaded. So
# there is no id that could point outside the pool. What counts say decides how many pages a row
# has; all other tensors must then have the sizes that follow from them.

def save_cache(kv, path, model, ids, notes):
    """Write a cache to one safetensors file; see wgkv.Cache.save."""
    assert kv.view_of is None, "a view cannot be saved"
    num_tokens = kv.num_tokens.tolist()
    assert [len(x) for x in ids] == num_tokens, f"{[len(x) for x in ids]} ids of {num_tokens}"
    tensors = dict(kv.state(), num_tokens=kv.num_tokens,
                   ids=torch.tensor([token for x in ids for token in x], dtype=torch.int32))
    metadata = dict(cache_metadata(kv, model), model=model.name, notes=json.dumps(notes))
    with replacing(path) as part:
        save_file({name: x.contiguous() for name, x in tensors.items()}, part,
                  metadata={key: str(value) for key, value in metadata.items()})


def cache_metadata(kv, model):
    """What must be the same in the cache that a file is loaded into."""
    L, Hkv, D = gate_shape(model)
    return dict(cache_format=CACHE_FORMAT, kind=type(kv).__name__, fingerprint=fingerprint(model),
                dtype=str(kv.dtype).removeprefix("torch."), layers=L, kv_heads=Hkv, head_dim=D,
                sequences=kv.B, **kv.settings())


def saved_tau(path):
    """The tau of the cache in a file, or None if it has none: a dense one, or no cache at all."""
    meta = open_tensors(path).metadata() or {}
    if "tau" not in meta or "cache_format" not in meta:
        return None                         # load_cache says what is wrong
    return metadata_number(path, "tau", meta["tau"], 0, 1, float)


def load_cache(kv, path, model):
    """Fill an empty cache from a file of save_cache: (ids, notes); see wgkv.Cache.load.

    The header is checked before memory is taken, the contents while they are read. After a
    UserError the cache is empty.
    """
    assert kv.view_of is None and not kv.num_tokens.any(), "only an empty cache can be loaded"
    check_regular(path)
    file = open_tensors(path)
    meta = file.metadata() or {}
    if "cache_format" not in meta:
        raise UserError(f"{path} is no saved cache: its metadata names no cache_format")
    here = cache_metadata(kv, model)
    if meta.get("kind") != here["kind"]:
        if meta.get("kind") == "DenseCache":
            raise UserError(f"{path}: this cache was saved with --dense: give --dense here too")
        if meta.get("kind") == "DualCache":
            raise UserError(f"{path}: this cache was saved without --dense: leave it out here too")
    for key, value in here.items():
        if meta.get(key) != str(value):
            raise UserError(f"{path}: this cache was saved with {key} {quoted(meta.get(key))}, "
                            f"here it is {quoted(str(value))}")
    with reading(path):
        notes = json.loads(meta.get("notes", "{}"))
    if not isinstance(notes, dict):
        raise UserError(f"{path}: its notes are no JSON object")

    num_tokens = stored(path, file, "num_tokens", (kv.B,), torch.int64)
    if (num_tokens < 0).any() or (num_tokens >= 2**31).any():
        raise UserError(f"{path}: num_tokens should be from 0 to 2^31, it is {num_tokens.tolist()}")
    ids = stored(path, file, "ids", (int(num_tokens.sum()),), torch.int32)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise UserError(f"{path}: ids should be from 0 to {model.config.vocab_size - 1}")
    try:
        kv.restore(path, file, num_tokens)
        kv.num_tokens.copy_(num_tokens)
    except BaseException:
        kv.reset()
        raise
    return [part.tolist() for part in ids.split(num_tokens.tolist())], notes


def stored(path, file, name, shape, dtype):
    """A tensor of a cache file, which must have this shape and dtype."""
    check_stored(path, file, name, shape, dtype)
    with reading(path):
        return file.get_tensor(name)


def check_stored(path, file, name, shape, dtype):
    """UserError unless the header names a tensor of this shape and dtype."""
    with reading(path):
        if name not in file.keys():
            raise UserError(f"{path}: {name} is missing")
        view = file.get_slice(name)
        there = tuple(view.get_shape()), view.get_dtype()
    kinds = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16",
             torch.float16: "F16"}
    if there != (tuple(shape), kinds[dtype]):
        raise UserError(f"{path}: {name} should be {kinds[dtype]} of shape {tuple(shape)}, it is "
                        f"{quoted(there[1])} of shape {quoted(there[0])}")


def finite_parts(path, file, name, at_once, device):
    """(start, stop, part on the device) of a tensor's first dimension, without NaN and infinity.

    The device looks for these: a GPU does it faster than the host.
    """
    with reading(path):
        view = file.get_slice(name)
        length = view.get_shape()[0]
    for start in range(0, length, at_once):
        stop = min(start + at_once, length)
        with reading(path):
            part = view[start:stop].to(device)
        if part.numel() > 0:
            check_finite(path, name, part)
        yield start, stop, part
