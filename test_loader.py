"""The model and its loader: parity with transformers, RoPE, good and bad folders, hostile input."""
import contextlib
import fnmatch
import itertools
import json
import math
import os
import random
import shutil
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import model as M
from common import UserError
from generate import Text
from wgkv import DenseCache, Gates

torch.set_num_threads(1)        # most things here are small: threads would only wait for each other
CPU = torch.device("cpu")


# ----------------------------------------------------------------------- parity with transformers

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=32)
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             bos_token_id=None, eos_token_id=None)
PARITY = {                      # what differs from SIZES
    "llama, as many key heads": dict(num_key_value_heads=4),
    "llama, 4 queries a key head, tied": dict(num_attention_heads=8, tie_word_embeddings=True),
    "llama, every bias": dict(attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": dict(head_dim=32, rope_parameters=dict(
        LLAMA3, rope_theta=500.0, original_max_position_embeddings=32)),
    "llama, linear rope": dict(rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=500.0)),
    "mistral": dict(sliding_window=None, head_dim=32, rms_norm_eps=1e-2),
    "qwen2, 7 queries a key head, tied": dict(
        hidden_size=112, num_attention_heads=14, tie_word_embeddings=True,
        sliding_window=16, use_sliding_window=False),
    "qwen2, yarn": dict(max_position_embeddings=128, rope_parameters=YARN),
    "qwen2, yarn with mscale": dict(max_position_embeddings=128, rope_parameters=dict(
        YARN, mscale=2.0, mscale_all_dim=0.5, beta_fast=16, beta_slow=2, truncate=False)),
    "qwen3": dict(head_dim=24, sliding_window=None),
}


def their_model(transformers, case):
    """transformers' model of a case, with weights random enough that every single one matters."""
    family = case.split(",")[0].capitalize()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **PARITY[case]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.uniform_(-0.5, 0.5)
        elif p.dim() == 1:                          # norms
            p.uniform_(0.5, 1.5)
        elif "embed" in name:
            p.normal_(std=0.15)
        else:
            p.normal_(std=1.3 * p.shape[1] ** -0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", PARITY)
def test_equals_transformers(case, tmp_path):
    """A slip in the arithmetic; positions or keys that slip between calls of greedy decoding."""
    theirs = their_model(pytest.importorskip("transformers"), case)
    theirs.save_pretrained(tmp_path)
    ours = M.Llama.from_pretrained(tmp_path)

    ids = torch.randint(96, (2, 80))
    want = theirs(ids).logits
    tolerance = 1e-4 * want.abs().max().item()
    torch.testing.assert_close(ours.logits(ours(ids)), want, rtol=0, atol=tolerance)

    ids = ids[:1, :12]
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           min_new_tokens=64, max_new_tokens=64, pad_token_id=0)
    cache = DenseCache(ours, 1)
    got = []
    for _ in range(64):
        ids = ours.logits(ours(ids, cache)[:, -1:]).argmax(-1)
        got.append(ids.item())
    assert got == want[0, 12:].tolist() and len(set(got)) > 8


# ------------------------------------------------------------------------------------------- RoPE

@pytest.mark.parametrize("factor, pairs", [
    (8.0, {28: 3.211445994752591e-3, 31: 8.567514129196321e-4, 63: 3.068925988914511e-07}),
    (32.0, {28: 3.211445994752591e-3, 31: 7.625412033563571e-4, 63: 7.672314972286278e-08}),
], ids=("3.1", "3.2"))
def test_llama3_frequencies(factor, pairs):
    """Scaling that is parsed and not applied, or another factor than the config's.

    Either shows only in long texts. Of the pairs, 28 is kept, 31 blended and 63 scaled.
    """
    rope = dict(LLAMA3, factor=factor, original_max_position_embeddings=8192)
    got, scale = M.rope_frequencies(M.Config(head_dim=128, rope_theta=5e5, rope=rope))
    assert scale == 1 and got.dtype == torch.float32
    assert [got[m].item() for m in pairs] == pytest.approx(list(pairs.values()), rel=1e-5)


def test_yarn_frequencies():
    """Qwen2.5 beyond 32768 tokens: the blend's ends in the wrong pairs, or no temperature."""
    D, base, factor, original = 128, 1e6, 4.0, 32768
    want = []
    for m in range(D // 2):
        f = base ** (-2 * m / D)
        # Pair 23.6 turns 32 times in 32768 tokens and pair 39.7 once: the blend is from 23 to 40.
        scaled = min(1, max(0, (m - 23) / (40 - 23)))
        want.append(f * (1 - scaled) + f / factor * scaled)
    rope = dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    got, scale = M.rope_frequencies(M.Config(head_dim=D, rope_theta=base, rope=rope))
    assert got.tolist() == pytest.approx(want, rel=1e-5)
    assert scale == pytest.approx(1.1386294361)


def test_angles_at_100000_are_fp32_in_a_bf16_model(tmp_path):
    """Tables, or a buffer of frequencies, that went to bf16 with the weights."""
    model = M.Llama.from_pretrained(make_folder(tmp_path), dtype=torch.bfloat16)
    cos, sin = model.rope(torch.tensor([[100_000]]))
    angles = 2 * [100_000 * 10_000 ** (-m / 4) for m in range(4)]
    assert model.dtype == torch.bfloat16
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=0.02)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=0.02)
    x = torch.randn(1, 2, 1, 8).bfloat16()
    assert torch.equal(M.rotate(x, cos, sin), M.rotate(x.float(), cos, sin).bfloat16())


# ------------------------------------------------------------------------- folders, good and bad

TINY = dict(model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
            tie_word_embeddings=True)
LINEAR = dict(rope_type="linear", factor=2)
ABSENT = object()               # as a value in a config: no such key
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
SHARD = "model-00002-of-00002.safetensors"


def write_config(folder, **changes):
    config = {key: value for key, value in {**TINY, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_folder(folder, edit=None, shards=0, **changes):
    """A random checkpoint with TINY's config but for the changes; edit(tensors) alters them."""
    config = M.read_config(write_config(folder, **changes))
    with torch.device("meta"):
        params = dict(M.Llama(config).named_parameters())
    names = M.checkpoint_names(config)
    torch.manual_seed(0)
    tensors = {}
    # lm_head comes last, so that tied and untied folders have the rest in common.
    for name in sorted(names, key=lambda name: name == HEAD):
        ours, start, stop = names[name]
        prefix = "" if name == HEAD else "model."
        tensors[prefix + name] = 0.3 * torch.randn(params[ours][start:stop].shape)
    if edit:
        edit(tensors)
    files = {M.SINGLE: list(tensors)}
    if shards:
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[i::shards]
                 for i in range(shards)}
        edit_index(folder, {name: file for file, names in files.items() for name in names})
    for file, names in files.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file)
    return folder


def edit_index(folder, changes):
    index = common.read_json(folder / M.INDEX, required=False) or {"weight_map": {}}
    index["weight_map"].update(changes)
    (folder / M.INDEX).write_text(json.dumps(index))


@torch.no_grad()
def logits(folder):
    model = M.Llama.from_pretrained(folder)
    out = model.logits(model(torch.arange(20).view(2, 10)))
    for p in model.parameters():
        p.fill_(math.nan)       # memory that is used again must not hold the right numbers
    return out


def not_loaded(folder, *words):
    """from_pretrained must raise a UserError, and nothing else: one line with all of the words."""
    with pytest.raises(UserError) as error:
        M.Llama.from_pretrained(folder)
    message = str(error.value)
    assert is_clean(message) and all(word in message for word in words), message


def is_clean(message):
    """Is it one line that a terminal shows as it is?"""
    return message.isprintable() and len(message) < 1200


def put(name, make):
    """An edit: the tensor make(tensors) under this name."""
    return lambda tensors: tensors.update({name: make(tensors)})


def drop(name):
    """An edit: without this tensor."""
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    """An edit: `new` instead of `old` in every name."""
    def edit(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)
    return edit


INV_FREQ = "model.layers.1.self_attn.rotary_emb.inv_freq"
UNTIED = dict(tie_word_embeddings=False)
UNUSED_WINDOW = dict(sliding_window=2, use_sliding_window=False, layer_types=["full_attention"])
SAME = {                        # id: (edit, changes of make_folder, what stderr says)
    "tied, the same lm_head stored": (put(HEAD, lambda t: t[EMBED].clone()), {}, ""),
    "tied, another lm_head stored": (put(HEAD, lambda t: t[EMBED] + 1), {}, "lm_head differs"),
    "tied, a small lm_head stored": (put(HEAD, lambda t: torch.ones(3)), {}, "lm_head differs"),
    "untied, no lm_head": (drop(HEAD), UNTIED, "the embedding is used"),
    "only lm_head": (rename(EMBED, HEAD), {}, ""),
    "stale inv_freq": (put(INV_FREQ, lambda t: torch.full((4,), math.nan)), {}, ""),
    "no prefix": (rename("model.", ""), {}, ""),
    "sharded": (None, dict(shards=3), ""),
    "a sliding window that is off": (None, UNUSED_WINDOW, ""),
    "a sliding window, no switch": (None, dict(sliding_window=2), ""),
}


@pytest.mark.parametrize("edit, changes, remark", SAME.values(), ids=SAME)
def test_other_forms_of_the_same_model(edit, changes, remark, tmp_path, capsys):
    """A form of the same weights that is refused, read as others, or read without its remark."""
    want = logits(make_folder(tmp_path))
    (tmp_path / M.SINGLE).unlink()
    capsys.readouterr()
    got = logits(make_folder(tmp_path, edit, **changes))
    said = capsys.readouterr().err
    assert torch.equal(got, want)
    assert remark in said if remark else said == ""


def test_tied_and_untied_heads(tmp_path):
    """Scores from the wrong one of embedding and lm_head; a call for an lm_head that is tied."""
    x = torch.randn(3, 32)
    for tied, name in ((True, EMBED), (False, HEAD)):
        model = M.Llama.from_pretrained(make_folder(tmp_path, tie_word_embeddings=tied))
        stored = load_file(tmp_path / M.SINGLE)
        assert torch.equal(model.logits(x), x @ stored[name].T)
        assert (HEAD in stored) != tied


@pytest.mark.parametrize("changes, theta, factor, remark", [
    (dict(rope_theta=5e5, rope_scaling=None), 5e5, 1, False),
    (dict(rope_theta=ABSENT, rope_parameters=dict(rope_theta=5e5, rope_type="default")),
     5e5, 1, False),
    (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)),        # as transformers decides it
     5e5, 1, False),
    (dict(rope_theta=ABSENT, rope_scaling=dict(type="default")), 1e4, 1, True),
    (dict(rope_scaling=dict(type="linear", factor=2)), 1e4, 2, False),
    (dict(rope_scaling=dict(type="linear", rope_type=None, factor=2)), 1e4, 2, False),
    (dict(rope_theta=None, rope_parameters=dict(LINEAR, rope_theta=5e5)), 5e5, 2, False),
    (dict(rope_scaling=LINEAR, rope_parameters=dict(LINEAR, factor=3)), 1e4, 2, False),
])
def test_where_rope_settings_are_found(changes, theta, factor, remark, tmp_path, capsys):
    """A base of 10000 in silence, or scaling that is overlooked.

    The key may be another release's, or null.
    """
    model = M.Llama.from_pretrained(make_folder(tmp_path, **changes))
    assert model.inv_freq[:2].tolist() == pytest.approx([1 / factor, theta ** -0.25 / factor])
    assert ("rope_theta" in capsys.readouterr().err) == remark


REFUSED = [                     # (changes of the config, words of the refusal)
    (dict(model_type="gemma2"), ("model_type", "'gemma2'", "llama, mistral, qwen2, qwen3")),
    (dict(model_type=ABSENT), ("model_type", "None")),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), ("quantization_config", "gptq")),
    (dict(model_type="mistral", sliding_window=32), ("sliding_window", "32")),
    (dict(model_type="mistral", sliding_window=32, use_sliding_window=False),
     ("sliding_window", "32")),
    (dict(model_type="mistral"), ("sliding_window", "4096", "missing")),
    (dict(model_type="qwen2", sliding_window=64, use_sliding_window=True),
     ("sliding_window", "64")),
    (dict(layer_types=["full_attention", "sliding_attention"]), ("layer_types", "sliding")),
    (dict(hidden_act="gelu"), ("hidden_act", "'gelu'")),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2)),
     ("'longrope'", "default, linear, llama3 and yarn")),
    (dict(rope_parameters=dict(full_attention=LINEAR)), ("rope_parameters", "all layers")),
    (dict(rope_scaling=dict(type="yarn")), ("factor", "missing")),
    (dict(rope_scaling=dict(rope_type="yarn", factor=0)), ("yarn", "factor", "0")),
    (dict(rope_scaling=LLAMA3), ("original_max_position_embeddings", "missing")),
    (dict(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3")),
    (dict(head_dim=9), ("head_dim 9",)),
    (dict(hidden_size=ABSENT), ("hidden_size", "missing")),
    (dict(vocab_size="many"), ("vocab_size", "'many'")),
    (dict(num_hidden_layers=2.0), ("num_hidden_layers", "2.0")),
    (dict(num_hidden_layers=10**5), ("num_hidden_layers", "100000")),
    (dict(tie_word_embeddings="no"), ("tie_word_embeddings", "'no'")),
    (dict(rope_theta=math.nan), ("NaN is not a number",)),
    (dict(rms_norm_eps=0), ("rms_norm_eps", "0")),
]


@pytest.mark.parametrize("changes, words", REFUSED)
def test_refused_configs(changes, words, tmp_path):
    """Text from a model that we compute wrongly, or a refusal that does not say why."""
    with at_most(2):
        not_loaded(write_config(tmp_path, **changes), str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize("changes", [
    dict(num_hidden_layers=1000), dict(vocab_size=2**24), dict(hidden_size=2**20, head_dim=8)],
    ids=str)
def test_sizes_are_compared_before_memory_is_allocated(changes, tmp_path, monkeypatch):
    """A model of the size that the config asks for is built, and only then the file is read."""
    make_folder(tmp_path)
    monkeypatch.setattr(M.Llama, "to_empty", lambda *args, **kwargs: pytest.fail("allocated"))
    with at_most(5):
        not_loaded(write_config(tmp_path, **changes), str(tmp_path), "the config")


# ---------------------------------------------------------------------------------- broken files

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 4242\n"


def in_place_of(name, make):
    """A spoiler of folders: make(path) in place of a file."""
    def spoil(folder):
        make_folder(folder, shards=0 if name == M.SINGLE else 2)
        (folder / name).unlink()
        make(folder / name)
    return spoil


def holding(content):
    """A maker of files with this content."""
    return lambda path: path.write_text(content)


def cut_up(cut):
    """A spoiler of folders: model.safetensors with its bytes cut up."""
    def spoil(folder):
        file = make_folder(folder) / M.SINGLE
        file.write_bytes(cut(file.read_bytes()))
    return spoil


def stored(edit, **changes):
    """A spoiler of folders: tensors that were edited."""
    return lambda folder: make_folder(folder, edit, **changes)


def indexed(name, shard):
    """A spoiler of folders: an index that has another shard for a name."""
    return lambda folder: edit_index(make_folder(folder, shards=2), {name: shard})


def set_to(value, name=Q):
    """An edit: one number of a tensor is this value."""
    return lambda tensors: tensors[name].view(-1)[7:8].fill_(value)


def lost_head(folder):
    make_folder(folder, drop(HEAD), 2, tie_word_embeddings=False)
    edit_index(folder, {HEAD: SHARD})


BAD_FOLDERS = {                 # id: (what makes the folder, words of the refusal)
    "no config": (lambda folder: None, ("config.json", "missing")),
    "config is a list": (in_place_of("config.json", holding("[]")), ("config.json", "list")),
    "config nested 100,000 deep": (in_place_of("config.json", holding("[" * 10**5 + "]" * 10**5)),
                                   ("config.json", "JSON")),
    "only the config": (write_config, (M.SINGLE, M.INDEX, "consolidated", "Hugging Face")),
    "lm_head in the index only": (lost_head, (HEAD, SHARD)),
    "a shard in the index only": (lambda folder: (make_folder(folder, shards=2) / SHARD).unlink(),
                                  (M.INDEX, SHARD, "model.")),
    "index {}": (in_place_of(M.INDEX, holding("{}")), (M.INDEX, "weight_map")),
    "a shard that is a number": (indexed(EMBED, 7), (M.INDEX,)),
    "an absolute shard": (indexed(EMBED, "/etc/hosts"), (M.INDEX, "'/etc/hosts'", "outside")),
    "a shard above": (indexed(EMBED, "a/../../" + M.SINGLE), (M.INDEX, "outside")),
    "Meta's names": (stored(rename("self_attn.q_proj", "attention.wq")),
                     (M.SINGLE, "wq", "q_proj")),
    "head_dim is not stored so": (stored(put(Q, lambda t: t[Q][:1]), head_dim=16),
                                  (M.SINGLE, Q, "(1, 32)", "(64, 32)")),
    "a bias is missing": (stored(drop(Q_BIAS), model_type="qwen2"),
                          ("missing", "layers.0.self_attn.q_proj.bias")),
    "a tensor too many": (stored(put("a\x1b[31m\nb", lambda t: torch.ones(8))),
                          ("not used", r"a\x1b[31m\nb")),
    "stored under both names": (stored(put(EMBED[6:], lambda t: t[EMBED] + 1)),
                                (M.SINGLE, EMBED[6:], "twice")),
    "whole numbers": (stored(put(Q, lambda t: t[Q].int())), (M.SINGLE, Q, "I32", "BF16")),
    "NaN": (stored(set_to(math.nan)), (M.SINGLE, Q, "NaN")),
    "infinity": (stored(set_to(-math.inf, EMBED)), (M.SINGLE, EMBED, "infinity")),
    "git-lfs": (in_place_of(M.SINGLE, holding(POINTER)), (M.SINGLE, "run git lfs pull")),
    "a byte short": (cut_up(lambda b: b[:-1]), (M.SINGLE, "truncated")),
    "a header of 2^60 bytes": (cut_up(lambda b: (2**60).to_bytes(8, "little") + b[8:]),
                               (M.SINGLE, "truncated")),
    "a named pipe": (in_place_of(M.SINGLE, os.mkfifo), (M.SINGLE, "not a regular file")),
    "a dangling link": (in_place_of("config.json", lambda path: path.symlink_to("nowhere")),
                        ("config.json", "missing")),
}


@pytest.mark.parametrize("spoil, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(spoil, words, tmp_path):
    """Another file read, a parameter left as allocated, or a traceback where a line would do."""
    spoil(tmp_path)
    with at_most(5):
        not_loaded(tmp_path, str(tmp_path), *words)


def test_a_wrong_path_is_not_looked_up_on_the_hub(tmp_path):
    """A wrong path that is looked up on the hub, or ends in a traceback."""
    file = write_config(tmp_path) / "config.json"
    for path in (tmp_path / "nowhere", file, "just-a-name", "./own/name", "../name", ""):
        not_loaded(path, str(path), "is no folder")


def test_links_are_followed_and_duplicates_are_not_read(tmp_path):
    """The hub's own cache (it is all links) refused; a glob that reads the same weights twice."""
    want = logits(make_folder(tmp_path))
    wrong = {name: t + 1 for name, t in load_file(tmp_path / M.SINGLE).items()}
    links = tmp_path / "links"
    (links / "original").mkdir(parents=True)
    for name in ("config.json", M.SINGLE):
        (links / name).symlink_to(tmp_path / name)
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors",
                 "original/model.safetensors"):
        save_file(wrong, links / name)
    assert torch.equal(logits(links), want)
    save_file(wrong, make_folder(tmp_path, shards=3) / M.SINGLE)
    assert torch.equal(logits(tmp_path), want)


def test_biases_that_only_the_file_knows(tmp_path):
    """Biases that are dropped, since the config says nothing about them."""
    want = logits(make_folder(tmp_path, attention_bias=True, mlp_bias=True))
    assert torch.equal(logits(write_config(tmp_path)), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_stored_dtypes(dtype, tmp_path):
    """Stored bits that are misread, or rounded on the way."""
    make_folder(tmp_path, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}))
    q = load_file(tmp_path / M.SINGLE)[Q]
    for want in (torch.float32, torch.bfloat16):
        model = M.Llama.from_pretrained(tmp_path, dtype=want)
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(want, False)}
        assert torch.equal(model.layers[0].qkv.weight[:32], q.to(want))


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path):
    """Infinities, and then NaN for an answer, from weights that are fine in the file."""
    make_folder(tmp_path, set_to(1e5))
    M.Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=f"{Q}.*infinity .as float16"):
        M.Llama.from_pretrained(tmp_path, dtype=torch.float16)


def test_no_second_copy_while_loading(tmp_path, monkeypatch):
    """A loader that reads the whole file before it fills."""
    make_folder(tmp_path)
    real_read = M.StoredTensor.read
    given = []

    def watched_read(stored):
        held = [ref for ref in given if ref() is not None]
        assert not held, f"{stored.name} is read while an earlier tensor is held"
        tensor = real_read(stored)
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(M.StoredTensor, "read", watched_read)
    M.Llama.from_pretrained(tmp_path)
    assert len(given) == len(load_file(tmp_path / M.SINGLE))


@pytest.mark.parametrize("key", ("torch_dtype", "dtype", "neither"))
def test_which_dtype(key, tmp_path):
    """bf16 at a crawl on a CPU; not --dtype, else the config's, else the tensors' own."""
    make_folder(tmp_path, lambda t: t.update({n: x.half() for n, x in t.items()}),
                **{key: "bfloat16"})
    config = M.read_config(tmp_path)
    files = M.find_tensors(tmp_path)
    want = torch.float16 if key == "neither" else torch.bfloat16
    assert M.pick_dtype(config, files, torch.device("cuda")) == want
    assert M.Llama.from_pretrained(tmp_path).dtype == torch.float32
    assert M.Llama.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_too_little_memory_is_said_before_loading(tmp_path, monkeypatch):
    """A kill by the kernel instead of a line with the bytes."""
    with pytest.raises(UserError, match=r"1048576\.0 GiB as float32, cpu has .* GiB free; "
                                        "--dtype bfloat16 halves"):
        M.check_memory(2**50, CPU, torch.float32)
    asked = []
    monkeypatch.setattr(M, "check_memory", lambda *args: asked.append(args))
    count = sum(t.numel() for t in load_file(make_folder(tmp_path) / M.SINGLE).values())
    M.Llama.from_pretrained(tmp_path)
    M.Llama.from_pretrained(tmp_path, dtype=torch.float16)
    assert asked == [(4 * count, CPU, torch.float32), (2 * count, CPU, torch.float16)]


# -------------------------------------------------------------------------------------- hub names

@pytest.mark.parametrize("shards", (0, 2))
def test_the_hub_is_asked_only_for_what_is_read(shards, tmp_path, monkeypatch):
    """All formats of a repository downloaded, original/ too."""
    hub = pytest.importorskip("huggingface_hub")
    make_folder(tmp_path, shards=shards)
    needed = {file.name for file in tmp_path.iterdir()}
    needed |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "chat_template.jinja"}
    others = {"consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors",
              "original/config.json", "model.onnx", "README.md"}

    def download(repo, allow_patterns, ignore_patterns):
        def matches(name, patterns):
            return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

        assert repo == "owner/name"
        assert needed == {name for name in needed | others if matches(name, allow_patterns)
                          and not matches(name, ignore_patterns)}
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert M.Llama.from_pretrained("owner/name").name == "owner/name"


def test_hub_failures_are_one_line(monkeypatch):
    """A network library's traceback, or forty lines of it, for a name that cannot be fetched."""
    hub = pytest.importorskip("huggingface_hub")
    for error in (ConnectionError("no connection\n\nand more"), OSError(), ValueError("bad name")):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", download)
        why = str(error).split() or ["OSError"]
        not_loaded("owner/name", "owner/name is no local folder", "hub", *why)


# ---------------------------------------------------------------------------------- hostile input
# Whatever a file holds, loading ends soon, either with one clean line or with a model that computes
# numbers. First every bad value in every field, then random damage from a seed.

CASES = int(os.environ.get("HOSTILE_CASES", 50))    # of random damage to each file


class Stuck(BaseException):
    """The time is over. Not an Exception: those are what the loader turns into UserErrors."""


@contextlib.contextmanager
def at_most(seconds):
    """Stuck is raised if the block takes longer."""
    def stop(*args):
        raise Stuck(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ends_well(case, use, *args):
    """use(*args) must end within 5 seconds, with an answer or a UserError of one clean line."""
    try:
        with at_most(5):
            use(*args)
    except UserError as e:
        assert is_clean(str(e)), f"{case}: {e!r}"
    except BaseException as e:
        raise AssertionError(f"{case}: {type(e).__name__} {e}") from e


@pytest.fixture
def little_memory():
    """The test may not need more than 300 MiB."""
    before = common.peak_bytes(CPU)
    yield
    assert common.peak_bytes(CPU) - before < 300 * 2**20


def use_model(folder):
    assert logits(folder).isfinite().all()


def use_gates(path, model):
    gates = Gates.load(path, model)
    k = torch.randn(2, 2, 5, 8)
    with torch.no_grad():
        g = gates.gate(1, k, k, None)
    assert ((0 <= g) & (g <= 1)).all()
    assert 1 <= gates.window <= 2**20 and 0 <= gates.tau <= 1


def use_text(folder):
    text = Text(folder)
    tokens = text.encode("Some words.")
    assert all(type(token) is int for token in [*tokens, *text.end])
    assert isinstance(text.decode(tokens), str)
    text.chat([dict(role="user", content="Some words.")])


NASTY = [math.nan, math.inf, -1, 0, 1, 2, 0.5, 1e-300, 10**5, 10**12, 10**400,
         "", "x", "\x1b[31m\n", "\ud800", "a" * 10**5, [], {}, [1], ["x", None], {"a": {}},
         True, False, None, "DEEP 500", "DEEP 990", "DEEP 100000"]
NASTY_TEXT = ["nan", "inf", "1e400", "10000000", "9" * 5000, "٣", "0", "-1", "x", "\x1b[31m\n"]


def json_text(value):
    """json.dumps, where "DEEP 500" stands for lists in lists, 500 deep."""
    text = json.dumps(value)
    for depth in (500, 990, 100_000):
        text = text.replace(f'"DEEP {depth}"', "[" * depth + "]" * depth)
    return text


FIELDS = (*TINY, "head_dim", "dtype", "torch_dtype", "attention_bias", "mlp_bias", "hidden_act",
          "sliding_window", "use_sliding_window", "layer_types", "quantization_config",
          "rope_scaling", "rope_parameters")
ROPES = {
    "linear": dict(LINEAR, type="linear"),
    "llama3": dict(LLAMA3, original_max_position_embeddings=32, rope_theta=500.0),
    "yarn": dict(YARN, beta_fast=32, beta_slow=1, attention_factor=1.0, mscale=1, mscale_all_dim=1,
                 truncate=True),
}


@pytest.mark.parametrize("rope", (None, *ROPES))
def test_every_bad_value_in_every_field_of_a_config(rope, tmp_path, little_memory):
    """A type or a range that is not checked: NaN for an answer, a hang, or a traceback."""
    make_folder(tmp_path)
    for key, value in itertools.product(ROPES.get(rope, FIELDS), NASTY):
        change = {"rope_parameters": {**ROPES[rope], key: value}} if rope else {key: value}
        (tmp_path / "config.json").write_text(json_text({**TINY, **change}))
        ends_well(f"{rope} {key} = {value!r:.50}", use_model, tmp_path)


def official_gates(hidden, make=torch.randn, L=2, Hkv=2, D=8):
    """Gates in the layout of the authors' checkpoints; make(shape) is one of their tensors."""
    shapes = {"pre_key_norm.weight": (D,), "post_key_norm.weight": (D,),
              "conv1.weight": (Hkv * hidden, 2 * D, 1), "conv1.bias": (Hkv * hidden,),
              "conv2.weight": (Hkv, hidden, 1), "conv2.bias": (Hkv,)}
    return {f"model.layers.{i}.self_attn.g_predictors.{name}": make(shape)
            for i in range(L) for name, shape in shapes.items()}


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with everything in it that a model, its text and its gates can have; its model."""
    folder = make_folder(tmp_path_factory.mktemp("good"))
    for name in TEXT_FILES:
        shutil.copy(common.HERE / "tiny" / name, folder / name)
    model = M.Llama.from_pretrained(folder)
    Gates.for_model(model).save(folder / "gates.safetensors", model)
    torch.save(official_gates(12), folder / "gates.pt")
    return SimpleNamespace(folder=folder, model=model)


def test_every_bad_value_in_the_metadata_of_gates(good, tmp_path, little_memory):
    """A window for which a cache allocates gigabytes, or an expansion that no tensor can have."""
    tensors = load_file(good.folder / "gates.safetensors")
    metadata = safe_open(good.folder / "gates.safetensors", "pt").metadata()
    path = tmp_path / "gates.safetensors"
    for key, value in itertools.product(metadata, NASTY_TEXT):
        save_file(tensors, path, {**metadata, key: value})
        ends_well(f"{key} = {value!r:.50}", use_gates, path, good.model)


def test_official_gates_larger_than_their_file(good, tmp_path, little_memory):
    """A file of some kilobytes that asks for gigabytes: each tensor is one number, expanded."""
    path = tmp_path / "gates.pt"
    torch.save(official_gates(10**7, lambda shape: torch.ones(1).expand(shape)), path)
    with pytest.raises(UserError):
        Gates.load(path, good.model)


def spoil_json(value, rng):
    """Replace, remove or rename something somewhere in a JSON value, in place."""
    if not value:
        return
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], (dict, list)) and rng.random() < 0.8:
        spoil_json(value[key], rng)
    elif isinstance(value, list) or rng.random() < 0.8:
        value[key] = rng.choice(NASTY)
    elif rng.random() < 0.5:
        value[rng.choice(("", "\n\x1b", "model.norm.weight", "norm.weight"))] = value.pop(key)
    else:
        del value[key]


def spoil_json_file(path, rng):
    value = json.loads(path.read_text())
    spoil_json(value, rng)
    path.write_text(json_text(value))


def spoil_header(path, rng):
    """Change the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    spoil_json(header, rng)
    text = json_text(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size:])


def spoil_bytes(path, rng):
    """Cut a file, or change or insert some bytes; half of the time near its beginning."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(rng.choice((len(data), min(len(data), 500))))
    some = rng.choice((b"", b"\0", b"\xff" * 9, b"[" * 10**5, b'"', b"\xed\xa0\x80"))
    end = rng.choice((at, at + len(some) + 1, len(data)))
    data[at:end] = some
    path.write_bytes(data)


def spoil_kind(path, rng):
    """Something else in a file's place."""
    path.unlink()
    rng.choice((os.mkfifo, os.mkdir, holding(""), holding(POINTER), lambda path: None,
                lambda path: path.symlink_to("nowhere"),
                lambda path: path.symlink_to("/dev/zero")))(path)


def spoil_tensors(path, rng):
    """Another value, shape, dtype or name of one tensor."""
    metadata = safe_open(path, "pt").metadata()
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    new_name = rng.choice((name, name, name, "\n\x1b", name[6:], "model." + name))
    tensors[new_name] = rng.choice((
        tensor, tensor * math.nan, tensor + math.inf, tensor[:1], tensor[None], tensor[:0],
        tensor.to(torch.int8), tensor.bool(), tensor.double(), tensor.half())).contiguous()
    save_file(tensors, path, metadata)


def spoil_pickle(path, rng):
    """What a pickle can hold in a tensor's place, or a name that asks for 10^9 layers."""
    tensors = torch.load(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    new_name = rng.choice((name, name, name.replace("layers.0", "layers.999999999")))
    tensors[new_name] = rng.choice((
        tensor, tensor.to_sparse(), torch.ones(1).expand(10**8), tensor.to("meta"),
        tensor.to(torch.complex64), tensor * math.nan, tensor.flatten()[0], {"a": tensor}, None))
    torch.save(tensors, path)


JSON_SPOILERS = (spoil_json_file, spoil_json_file, spoil_bytes, spoil_kind)
TENSOR_SPOILERS = (spoil_tensors, spoil_tensors, spoil_header, spoil_bytes, spoil_kind)
HOSTILE = {                     # file: what may happen to it
    "config.json": JSON_SPOILERS,
    M.INDEX: JSON_SPOILERS,
    M.SINGLE: TENSOR_SPOILERS,
    "gates.safetensors": TENSOR_SPOILERS,
    "gates.pt": (spoil_pickle, spoil_pickle, spoil_bytes, spoil_kind),
    **{name: JSON_SPOILERS for name in TEXT_FILES},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input(name, good, tmp_path, little_memory):
    """A traceback, a hang, gigabytes of memory, NaN for an answer, or escape codes in a message."""
    for seed in range(CASES):
        folder = tmp_path / str(seed)
        shutil.copytree(good.folder, folder)
        if name == M.INDEX:
            (folder / M.SINGLE).unlink()
            make_folder(folder, shards=2)
        rng = random.Random(f"{name} {seed}")
        rng.choice(HOSTILE[name])(folder / name, rng)
        if name.startswith("gates"):
            ends_well(f"seed {seed}", use_gates, folder / name, good.model)
        elif name in TEXT_FILES:
            ends_well(f"seed {seed}", use_text, folder)
        else:
            ends_well(f"seed {seed}", use_model, folder)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------- PyTorch or the kernels

def test_kernels_need_a_gpu_and_rows_of_16_bytes():
    """Rows of no multiple of 16 bytes given to kernels that load 16; kernels without a GPU."""
    assert M.kernels_for(torch.ones(2, 16)) is None
    on_gpu = SimpleNamespace(is_cuda=True, shape=(2, 12))
    assert M.kernels_for(on_gpu) is None
    on_gpu.shape = (2, 16)
    assert M.kernels_for(on_gpu).__name__ == "kernels"
