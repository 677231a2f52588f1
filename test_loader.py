"""The model and its loader (a part of test_programs.py)."""
import functools
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")    # before triton is imported

import bench
import generate
import model as M
import train
import wgkv
from generate import Text, TextStream, kept_page, sampler
from model import Config, Llama, UserError, rotate
from tiny import tasks
from tiny.make import ANSWER_WEIGHT, Documents, Sentences
from wgkv import (GATE_FLOOR, P, DenseCache, DualCache, Gates, RandomAdmission, SoftAttention, admission_cost,
                  dense_attention, visible_mask)

torch.set_num_threads(1)                   # most things here are small: threads would only wait for each other
TAU, CPU = 0.1, torch.device("cpu")
RATES = (0, 0.03, 0.3, 0.9, 1)


# ------------------------------------------------------------------------------------------- parity with transformers

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
PARITY = {                                                                        # what differs from SIZES
    "llama, as many key heads": dict(num_key_value_heads=4),
    "llama, 4 queries a key head, tied": dict(num_attention_heads=8, tie_word_embeddings=True),
    "llama, every bias": dict(attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": dict(head_dim=32, rope_parameters=dict(
        LLAMA3, rope_theta=500.0, original_max_position_embeddings=32)),
    "llama, linear rope": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0)),
    "mistral": dict(sliding_window=None, head_dim=32, rms_norm_eps=1e-2),
    "qwen2, 7 queries a key head, tied": dict(hidden_size=112, num_attention_heads=14, tie_word_embeddings=True,
                                              sliding_window=16, use_sliding_window=False),
    "qwen2, yarn": dict(max_position_embeddings=128, rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=32)),
    "qwen3": dict(head_dim=24, sliding_window=None),
}


@torch.no_grad()
@pytest.mark.parametrize("case", PARITY)
def test_equals_transformers(case, tmp_path):
    """Any slip in the arithmetic, and positions or keys that slip between the calls of greedy decoding."""
    transformers, family = pytest.importorskip("transformers"), case.split(",")[0].capitalize()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **PARITY[case]})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, p in theirs.named_parameters():                   # random enough that every single one matters
        if p.dim() == 1:
            p.uniform_(*(-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5))
        else:
            p.normal_(std=0.15 if "embed" in name else 1.3 * p.shape[1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    ours = M.Llama.from_pretrained(tmp_path)

    ids = torch.randint(96, (2, 80))
    want = theirs(ids).logits
    torch.testing.assert_close(ours.logits(ours(ids)), want, rtol=0, atol=1e-4 * want.abs().max().item())

    ids, cache, got = ids[:1, :12], DenseCache(ours, 1), []
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=64,
                           max_new_tokens=64, pad_token_id=0)[0, 12:].tolist()
    for _ in range(64):
        ids = ours.logits(ours(ids, cache)[:, -1:]).argmax(-1)
        got.append(ids.item())
    assert got == want and len(set(got)) > 8


# -------------------------------------------------------------------------------------------------------------- RoPE

def llama3_by_hand(factor, D=128, base=5e5, original=8192):
    """Meta's rule as Meta words it, by wavelength, in doubles."""
    for m in range(D // 2):
        f = base ** (-2 * m / D)
        wave = 2 * math.pi / f
        s = (original / wave - 1) / (4 - 1)
        yield f if wave < original / 4 else f / factor if wave > original else (1 - s) * f / factor + s * f


@pytest.mark.parametrize("factor, literal", [
    (8.0, {28: 3.211445994752591e-3, 31: 8.567514129196321e-4, 63: 3.068925988914511e-07}),
    (32.0, {28: 3.211445994752591e-3, 31: 7.625412033563571e-4, 63: 7.672314972286278e-08})], ids=("3.1", "3.2"))
def test_llama3_frequencies(factor, literal):
    """Scaling that is parsed and not applied, or a factor that is not the config's: both only show in long texts."""
    rope = dict(LLAMA3, factor=factor, original_max_position_embeddings=8192)
    got, scale = M.rope_frequencies(M.Config(head_dim=128, rope_theta=5e5, rope=rope))
    assert scale == 1 and got.dtype == torch.float32
    assert got.tolist() == pytest.approx(list(llama3_by_hand(factor)), rel=1e-5)
    assert [got[m].item() for m in literal] == pytest.approx(list(literal.values()), rel=1e-5)


def test_yarn_frequencies():
    """Qwen2.5 beyond 32768 tokens: the blend's two ends in the wrong dimension, or scores without their temperature."""
    D, base, factor, original = 128, 1e6, 4.0, 32768
    want = []                                   # pair 23.6 turns 32 times in 32768 tokens, 39.7 once: 23 to 40
    for m in range(D // 2):
        f, share = base ** (-2 * m / D), min(1, max(0, (m - 23) / (40 - 23)))     # share of the interpolated frequency
        want.append(f * (1 - share) + f / factor * share)
    rope = dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    got, scale = M.rope_frequencies(M.Config(head_dim=D, rope_theta=base, rope=rope))
    assert got.tolist() == pytest.approx(want, rel=1e-5) and scale == pytest.approx(1.1386294361)
    assert got[[23, 31, 63]].tolist() == pytest.approx([6.978306e-3, 8.029597e-4, 3.102344e-7], rel=1e-5)


def test_angles_at_100000_are_fp32_in_a_bf16_model(tmp_path):
    """Tables, or a buffer of frequencies, that went to bf16 with the weights (row 10)."""
    model = M.Llama.from_pretrained(make_folder(tmp_path), dtype=torch.bfloat16)
    cos, sin = model.rope(torch.tensor([[100_000]]))
    angles = 2 * [100_000 * 10_000 ** (-m / 4) for m in range(4)]
    assert model.dtype == torch.bfloat16 and cos.dtype == sin.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=0.02)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=0.02)
    x = torch.randn(1, 2, 1, 8).bfloat16()
    assert torch.equal(M.rotate(x, cos, sin), M.rotate(x.float(), cos, sin).bfloat16())


# ------------------------------------------------------------------- folders, good and bad; "row" is one of loader.md's

TINY = dict(model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
            rope_theta=10000.0, tie_word_embeddings=True)
LINEAR = dict(rope_type="linear", factor=2)
ABSENT = object()                                                     # as a value in a config: no such key
EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00002-of-00002.safetensors"


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**TINY, **changes}.items() if v is not ABSENT}))
    return folder


def make_folder(folder, edit=lambda tensors: None, shards=0, **changes):
    """A random checkpoint with TINY's config but for the changes; edit(tensors) alters what is stored."""
    config = M.read_config(write_config(folder, **changes))
    with torch.device("meta"):
        params = dict(M.Llama(config).named_parameters())
    torch.manual_seed(0)                          # lm_head comes last, so that tied and untied folders share the rest
    tensors = {("" if name == HEAD else "model.") + name: 0.3 * torch.randn(params[ours][start:stop].shape)
               for name, (ours, start, stop) in sorted(M.checkpoint_names(config).items(), key=lambda x: x[0] == HEAD)}
    edit(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    for file, names in (files or {M.SINGLE: tensors}).items():
        save_file({n: tensors[n].contiguous() for n in names}, folder / file)
    if shards:
        edit_index(folder, {n: file for file, names in files.items() for n in names})
    return folder


def edit_index(folder, changes):
    index = M.read_json(folder / M.INDEX, required=False) or {"weight_map": {}}
    index["weight_map"].update(changes)
    (folder / M.INDEX).write_text(json.dumps(index))


@torch.no_grad()
def logits(folder):
    model = M.Llama.from_pretrained(folder)
    out = model.logits(model(torch.arange(20).view(2, 10)))
    for p in model.parameters():
        p.fill_(math.nan)                         # memory that is used again must not hold the right numbers by chance
    return out


def not_loaded(folder, *words):
    """from_pretrained must raise a UserError, and nothing else, of one line that holds all of the words."""
    with pytest.raises(M.UserError) as error:
        M.Llama.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def put(name, make):
    """An edit: the tensor make(tensors) under this name."""
    return lambda tensors: tensors.update({name: make(tensors)})


def rename(old, new):
    return lambda tensors: [tensors.update({n.replace(old, new, 1): tensors.pop(n)}) for n in list(tensors) if old in n]


SAME = {                                     # id: (edit, changes of make_folder, what stderr says)
    "row 2, the same lm_head": (put(HEAD, lambda t: t[EMBED].clone()), {}, ""),
    "row 2, another lm_head": (put(HEAD, lambda t: t[EMBED] + 1), {}, "lm_head differs"),
    "row 3": (lambda t: t.pop(HEAD), dict(tie_word_embeddings=False), "the embedding is used"),
    "row 3, sharded": (lambda t: t.pop(HEAD), dict(tie_word_embeddings=False, shards=2), "the embedding is used"),
    "row 4": (rename(EMBED, HEAD), {}, ""),
    "row 14": (put("model.layers.1.self_attn.rotary_emb.inv_freq", lambda t: torch.full((4,), math.nan)), {}, ""),
    "row 30": (rename("model.", ""), {}, ""),
    "sharded": (lambda t: None, dict(shards=3), ""),
    "row 27": (lambda t: None, dict(sliding_window=2, use_sliding_window=False, layer_types=["full_attention"]), ""),
    "row 27, no switch": (lambda t: None, dict(sliding_window=2), ""),
}


@pytest.mark.parametrize("edit, changes, remark", SAME.values(), ids=SAME)
def test_other_forms_of_the_same_model(edit, changes, remark, tmp_path, capsys):
    """A form of the same weights that is refused, read as other weights, or (rows 2, 3) read without a remark."""
    want = logits(make_folder(tmp_path))
    (tmp_path / M.SINGLE).unlink()
    got, said = logits(make_folder(tmp_path, edit, **changes)), capsys.readouterr().err
    assert torch.equal(got, want) and (remark in said if remark else said == "")


def test_tied_and_untied_heads(tmp_path):
    """Scores from the wrong one of embedding and lm_head, or a needless call for lm_head.weight (row 1)."""
    x = torch.randn(3, 32)
    for tied, name in ((True, EMBED), (False, HEAD)):
        model = M.Llama.from_pretrained(make_folder(tmp_path, tie_word_embeddings=tied))
        stored = load_file(tmp_path / M.SINGLE)
        assert torch.equal(model.logits(x), x @ stored[name].T) and (HEAD in stored) != tied


@pytest.mark.parametrize("changes, theta, rope, remark", [
    (dict(rope_theta=5e5, rope_scaling=None), 5e5, {}, False),
    (dict(rope_theta=ABSENT, rope_parameters=dict(rope_theta=5e5, rope_type="default")), 5e5, {}, False),
    (dict(rope_theta=None, rope_parameters=dict(rope_theta=5e5)), 5e5, {}, False),
    (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)), 5e5, {}, False),        # as transformers decides it
    (dict(rope_theta=ABSENT, rope_scaling=dict(type="default")), 1e4, {}, True),
    (dict(rope_scaling=dict(type="linear", factor=2)), 1e4, LINEAR, False),
    (dict(rope_scaling=dict(type="linear", rope_type="linear", factor=2)), 1e4, LINEAR, False),
    (dict(rope_theta=ABSENT, rope_parameters=dict(LINEAR, rope_theta=5e5)), 5e5, LINEAR, False)])
def test_where_rope_settings_are_found(changes, theta, rope, remark, tmp_path, capsys):
    """A base of 10000 in silence, or scaling overlooked, since the key is another release's or null (rows 6, 7, 28)."""
    model = M.Llama.from_pretrained(make_folder(tmp_path, **changes))
    assert (model.config.rope_theta, model.config.rope) == (theta, rope)
    assert ("rope_theta" in capsys.readouterr().err) == remark
    slower = 2 if rope else 1
    assert model.inv_freq[:2].tolist() == pytest.approx([1 / slower, theta ** -0.25 / slower])


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gemma2"), ("model_type", "'gemma2'", "llama, mistral, qwen2, qwen3")),                      # 25
    (dict(model_type=ABSENT), ("model_type", "None", "llama, mistral, qwen2, qwen3")),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), ("quantization_config", "gptq")),               # 26
    (dict(model_type="mistral", sliding_window=4096), ("sliding_window", "4096")),                                # 27
    (dict(model_type="qwen2", sliding_window=64, use_sliding_window=True), ("sliding_window", "64")),
    (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), ("sliding_window",)),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2)), ("'longrope'", "default, linear, llama3 and yarn")),  # 28
    (dict(rope_scaling=dict(type="dynamic", factor=2)), ("'dynamic'",)),
    (dict(rope_scaling=dict(type="yarn")), ("yarn", "factor")),
    (dict(rope_scaling=dict(LLAMA3, factor=None)), ("llama3", "factor")),
    (dict(rope_scaling=LLAMA3), ("llama3", "original_max_position_embeddings")),
    (dict(hidden_act="gelu"), ("hidden_act", "'gelu'")),                                                          # 29
    (dict(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3")),
    (dict(hidden_size=ABSENT), ("hidden_size", "None")), (dict(vocab_size="many"), ("vocab_size", "'many'")),
    (dict(head_dim=9), ("head_dim 9",)), (dict(num_key_value_heads="2"), ("num_key_value_heads", "'2'")),
    (dict(rope_theta="1e4"), ("rope_theta", "'1e4'")), (dict(rope_scaling="yarn"), ("rope_scaling", "yarn")),
    (dict(rope_scaling=dict(rope_type="yarn", factor=0)), ("yarn", "factor", "0")),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=2))), ("rope_parameters",)),
    (dict(quantization_config="fp8"), ("quantization_config", "fp8"))])
def test_refused_configs(changes, words, tmp_path):
    """Text from a model that this code computes wrongly, or a refusal that does not say why (rows 25 to 29)."""
    not_loaded(write_config(tmp_path, **changes), str(tmp_path / "config.json"), *words)


def damaged(cut):
    """A folder's spoiler: model.safetensors with its bytes cut up."""
    return lambda f: (make_folder(f) / M.SINGLE).write_bytes(cut((f / M.SINGLE).read_bytes()))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 4242\n"
BAD_FOLDERS = {                                      # id: (what makes the folder, words of the refusal)
    "no config": (lambda f: None, ("config.json", "missing")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "list")),
    "no weights": (write_config, (M.SINGLE, M.INDEX)),
    "row 5, tensor, row 3": (lambda f: edit_index(make_folder(f, lambda t: t.pop(HEAD), 2, tie_word_embeddings=False),
                                                  {HEAD: SHARD}), (M.INDEX, HEAD, SHARD)),
    "row 5, shard": (lambda f: (make_folder(f, shards=2) / SHARD).unlink(), (M.INDEX, SHARD, "model.")),
    "index {}": (lambda f: (write_config(f) / M.INDEX).write_text("{}"), (M.INDEX, "weight_map")),
    "index {": (lambda f: (write_config(f) / M.INDEX).write_text("{"), (M.INDEX, "JSON")),
    "row 11, files": (lambda f: (write_config(f) / "consolidated.00.pth").write_text(""), ("consolidated", M.SINGLE)),
    "row 11, names": (lambda f: make_folder(f, rename("self_attn.q_proj", "attention.wq")), (M.SINGLE, "wq", "q_proj")),
    "row 12": (lambda f: make_folder(f, put(Q, lambda t: t[Q][:1]), head_dim=16), (M.SINGLE, Q, "(1, 32)", "(64, 32)")),
    "row 13, a bias": (lambda f: make_folder(f, lambda t: t.pop(Q[:-6] + "bias"), model_type="qwen2"),
                       ("missing", "layers.0.self_attn.q_proj.bias")),
    "row 13, too few": (lambda f: make_folder(f, lambda t: t.pop("model.norm.weight")), ("missing", "norm.weight")),
    "row 13, too many": (lambda f: make_folder(f, put("model.extra", lambda t: torch.ones(8))), ("not used", "extra")),
    "row 16": (lambda f: (make_folder(f) / M.SINGLE).write_text(POINTER), (M.SINGLE, "run git lfs pull")),
    "row 16, sharded": (lambda f: (make_folder(f, shards=2) / SHARD).write_text(POINTER), (SHARD, "run git lfs pull")),
    **{f"row 23, {shard!r}": (lambda f, shard=shard: edit_index(make_folder(f, shards=2), {EMBED: shard}),
                              (M.INDEX, repr(shard), "outside the folder"))
       for shard in ("/etc/hosts", "../model.safetensors", "a/../../model.safetensors", "..\\model.safetensors", 7)},
    **{f"row 24, {what}": (damaged(cut), (M.SINGLE, "truncated")) for what, cut in {
        "empty": lambda b: b"", "5 bytes": lambda b: b[:5], "100 bytes": lambda b: b[:100],
        "a byte short": lambda b: b[:-1], "no header": lambda b: b"\xff" * 4096,
        "mangled header": lambda b: b[:8] + b"{" + b[9:30] + b"\n\n" + b[32:],
    }.items()},
}


@pytest.mark.parametrize("spoil, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(spoil, words, tmp_path):
    """Another file read, a parameter left as it was allocated, or a traceback where a sentence would do."""
    spoil(tmp_path)
    not_loaded(tmp_path, str(tmp_path), *words)


def test_no_folder(tmp_path):
    """A wrong path that is looked up on the hub, or ends in a traceback."""
    for path in (tmp_path / "nowhere", write_config(tmp_path) / "config.json", "just-a-name", "./own/name"):
        not_loaded(path, str(path), "is no folder")


def test_duplicates_beside_the_real_files(tmp_path):
    """A glob that also reads what lies beside the files of the index, or beside model.safetensors (row 15)."""
    want = logits(make_folder(tmp_path))
    wrong = {name: t + 1 for name, t in load_file(tmp_path / M.SINGLE).items()}
    (tmp_path / "original").mkdir()
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors", "original/model.safetensors"):
        save_file(wrong, tmp_path / name)
    assert torch.equal(logits(tmp_path), want)
    save_file(wrong, make_folder(tmp_path, shards=3) / M.SINGLE)
    assert torch.equal(logits(tmp_path), want)


def test_biases_that_only_the_file_knows(tmp_path):
    """Biases dropped since the config says nothing about them (row 13)."""
    want = logits(make_folder(tmp_path, attention_bias=True, mlp_bias=True))
    assert torch.equal(logits(write_config(tmp_path)), want)
    block, stored = M.Llama.from_pretrained(tmp_path).layers[0], load_file(tmp_path / M.SINGLE)
    for ours, theirs in ((block.qkv.bias[:32], "self_attn.q_proj"), (block.out.bias, "self_attn.o_proj"),
                         (block.gate_up.bias[48:], "mlp.up_proj"), (block.down.bias, "mlp.down_proj")):
        assert torch.equal(ours, stored[f"model.layers.0.{theirs}.bias"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes_of_files(dtype, tmp_path):
    """Stored bits that are misread, or rounded on the way (row 17)."""
    make_folder(tmp_path, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}))
    stored = load_file(tmp_path / M.SINGLE)
    for want in (torch.float32, torch.bfloat16):
        model = M.Llama.from_pretrained(tmp_path, dtype=want)
        assert {p.dtype for p in model.parameters()} == {want} and not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model.embed.weight, stored[EMBED].to(want))
        assert torch.equal(model.layers[0].qkv.weight[:32], stored[Q].to(want))


def test_no_second_copy_while_loading(tmp_path, monkeypatch):
    """A loader that reads the whole file before it fills, or that fills a random model on its way (row 17)."""
    make_folder(tmp_path)
    real_open, real_empty, given = M.open_tensors, M.Llama.to_empty, []

    def watched_open(path):
        handle = real_open(path)

        def get_tensor(name):
            assert not any(ref() is not None for ref in given), f"{name} is read while an earlier tensor is held"
            tensor = handle.get_tensor(name)
            given.append(weakref.ref(tensor))
            return tensor
        return SimpleNamespace(keys=handle.keys, get_slice=handle.get_slice, get_tensor=get_tensor)

    def to_empty(self, *args, **kwargs):
        assert all(p.is_meta for p in self.parameters()), "parameters had memory before their file was read"
        return real_empty(self, *args, **kwargs)

    monkeypatch.setattr(M, "open_tensors", watched_open)
    monkeypatch.setattr(M.Llama, "to_empty", to_empty)
    M.Llama.from_pretrained(tmp_path)
    assert len(given) == len(load_file(tmp_path / M.SINGLE))


@pytest.mark.parametrize("key", ("torch_dtype", "dtype", "neither"))
def test_which_dtype(key, tmp_path):
    """bf16 at a crawl on a CPU; an answer other than --dtype, else the config's, else the tensors' own (row 18)."""
    make_folder(tmp_path, lambda t: t.update({n: x.half() for n, x in t.items()}), **{key: "bfloat16"})
    config = M.read_config(tmp_path)
    files = M.find_tensors(tmp_path, config)
    assert M.pick_dtype(config, files, "cuda") == (torch.float16 if key == "neither" else torch.bfloat16)
    assert M.Llama.from_pretrained(tmp_path).dtype == torch.float32
    assert M.Llama.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_too_little_memory(tmp_path, monkeypatch):
    """A kill by the kernel instead of a sentence with the bytes (row 18)."""
    with pytest.raises(M.UserError, match=r"1048576\.0 GiB as float32, cpu has .* GiB free; --dtype bfloat16 halves"):
        M.check_memory(2**50, "cpu", torch.float32)
    with pytest.raises(M.UserError, match=r"1048576\.0 GiB as bfloat16, cpu has [\d.]+ GiB free$"):
        M.check_memory(2**50, "cpu", torch.bfloat16)
    asked = []
    monkeypatch.setattr(M, "check_memory", lambda *args: asked.append(args))
    stored = sum(t.numel() for t in load_file(make_folder(tmp_path) / M.SINGLE).values())
    M.Llama.from_pretrained(tmp_path)
    M.Llama.from_pretrained(tmp_path, dtype=torch.float16)
    assert asked == [(4 * stored, "cpu", torch.float32), (2 * stored, "cpu", torch.float16)]


# ---------------------------------------------------------------------------------------------------------- hub names

def fake_hub(monkeypatch, folder, error=None):
    """hf_hub_download that serves a local folder; returns the list of the names it is asked for."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, name, **options):
        assert repo == "owner/name"
        asked.append(name)
        if not os.path.exists(folder / name):
            raise error or hub.errors.EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("shards", (0, 2))
def test_hub_fetches_only_what_is_read(shards, tmp_path, monkeypatch):
    """All formats of a repository downloaded, original/ too; a path with .. refused only when fetched (row 23)."""
    make_folder(tmp_path, shards=shards)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("")
    asked = fake_hub(monkeypatch, tmp_path)
    assert M.Llama.from_pretrained("owner/name").name == "owner/name"
    weights = {f.name for f in tmp_path.glob("model-*.safetensors")} or {M.SINGLE}
    assert sorted(asked) == sorted(weights | {"config.json", "generation_config.json", "tokenizer.json", M.INDEX,
                                              "tokenizer_config.json", "chat_template.jinja"})
    edit_index(tmp_path, {EMBED: "../model.safetensors"})
    not_loaded("owner/name", M.INDEX, "outside the folder")
    assert "../model.safetensors" not in asked


def test_hub_failures(tmp_path, monkeypatch):
    """A network library's traceback, or forty lines of it, for a name that cannot be fetched."""
    errors = pytest.importorskip("huggingface_hub.errors")
    for error in (errors.LocalEntryNotFoundError("no connection\nand more"), OSError(), ValueError("bad name"),
                  type("ReadTimeout", (Exception,), {})("too slow"), errors.OfflineModeIsEnabled("offline")):
        fake_hub(monkeypatch, tmp_path, error)
        not_loaded("owner/name", "owner/name", "config.json", "hub", (str(error) or "OSError").splitlines()[0])
    fake_hub(monkeypatch, tmp_path)
    not_loaded("owner/name", "owner/name", "config.json")


def test_hub_offline(tmp_path, monkeypatch, capsys):
    """A cached model that cannot be opened offline, since a file that its repository never had is not in the cache."""
    error = pytest.importorskip("huggingface_hub.errors").LocalEntryNotFoundError("no connection")
    fake_hub(monkeypatch, make_folder(tmp_path), error)
    assert M.Llama.from_pretrained("owner/name").config.vocab_size == 40
    assert "tokenizer.json is not in its cache" in capsys.readouterr().err
    (tmp_path / M.SINGLE).unlink()
    not_loaded("owner/name", M.SINGLE, "no connection")


# ----------------------------------------------------------------------------------------------------- forward passes

def test_right_padding(tmp_path):
    """Padding that is seen by, or remembered for, the shorter rows of a batch."""
    model = M.Llama.from_pretrained(make_folder(tmp_path))
    tokens, lengths, more = torch.randint(40, (3, 13)), torch.tensor([5, 13, 1]), torch.randint(40, (3, 4))
    cache = DenseCache(model, 3)
    plain, cached, after = model(tokens, lengths=lengths), model(tokens, cache, lengths), model(more, cache)
    for b, n in enumerate(lengths.tolist()):
        alone = model(torch.cat((tokens[b:b + 1, :n], more[b:b + 1]), dim=1))[0]
        for got, want in ((plain[b, :n], alone[:n]), (cached[b, :n], alone[:n]), (after[b], alone[n:])):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


