"""bench.py and the README (a part of test_programs.py)."""
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


def test_bench_prints_rows_and_writes_its_figures(tmp_path, capsys):
    """The figures in assets/ must come from a run that says what it was."""
    out = tmp_path / "x.json"
    assert bench.main(["prefill", "--tokens", "200", "300", "--runs", "2", "--json", str(out), "--device", "cpu",
                       "--admit", "0.2"]) == 0
    figures = json.loads(out.read_text())
    assert [row["tokens"] for row in figures["prefill"]] == [200, 300] and figures["machine"] and figures["command"]
    assert len(figures["prefill"][0]["dense_s"]) == 2 and "ratio" in capsys.readouterr().out
    assert bench.main(["memory", "--tokens", "300", "--steps", "3", "--json", str(out), "--device", "cpu"]) == 0
    [row] = json.loads(out.read_text())["memory"]
    assert row["kept"] <= row["reserved"] and row["rest"] == row["peak"] - row["weights"] - row["kept"]
    assert row["prefill_s"] > 0 and row["decode_s"] > 0 and row["steps"] == 3
    for what in ("kernels", "train"):
        capsys.readouterr()
        assert generate.run_program(bench.main, [what, "--device", "cpu"]) == 2
        assert f"{what} needs a CUDA device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the README

README = (generate.HERE / "README.md").read_text()


def test_the_readmes_program_runs(monkeypatch, capsys):
    """The ten lines that others will copy must be ten, work, and give the answer."""
    program = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    monkeypatch.chdir(generate.HERE)
    exec(program, {})
    assert "2954" in capsys.readouterr().out and program.count("\n") <= 12


def test_the_readmes_figures_about_itself():
    """Counts of lines rot first; the two commands are what CI runs, and belong on the first screen."""
    rows = re.findall(r"^\| \[(\S+)\]\(\S+\) \|.*\| ([\d,]+) \|$", README, re.M)
    assert len(rows) >= 8
    for name, lines in rows:
        assert int(lines.replace(",", "")) == len((generate.HERE / name).read_text().splitlines()), name
    screen = "\n".join(README.splitlines()[:30])
    assert screen.count("\npip install -r requirements.txt && ") == 2


@pytest.mark.parametrize("script", ("generate", "train", "bench"))
def test_the_readmes_options_exist(script, capsys):
    """An option that is named in the README and was renamed since."""
    with pytest.raises(SystemExit):
        {"generate": generate, "train": train, "bench": bench}[script].main(["--help"])
    known = capsys.readouterr().out
    commands = re.findall(rf"python {script}\.py([^\n`#]*)", README)
    assert commands
    for option in re.findall(r"--[a-z][a-z-]+", " ".join(commands)):
        assert option in known, option

