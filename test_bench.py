"""bench.py and the README (a part of test_programs.py)."""
import json
import os
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

# Before triton is imported: without a GPU its kernels run in an interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import bench
import generate
import train
from common import HERE, run_program
from model import Config, Llama
from wgkv import P, pages_for

torch.set_num_threads(1)                # most things here are small: threads would only wait
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------- bench.py

def bench_rows(tmp_path, what, *options):
    """The figures of one bench on the bundled model, out of its --json."""
    out = tmp_path / "figures.json"
    assert run_program(bench.main, [what, "--device", "cpu", "--json", str(out), *options]) == 0
    figures = json.loads(out.read_text())
    assert figures["machine"] and figures["command"] and "commit" in figures
    return figures[what]


def test_bench_prints_rows_and_writes_its_figures(tmp_path, capsys):
    """The figures in assets/ must come from a run that says what it was."""
    rows = bench_rows(tmp_path, "prefill", "--tokens", "200", "600", "--runs", "2",
                      "--admit", "0.2")
    assert [row["tokens"] for row in rows] == [200, 600]
    for row in rows:
        assert len(row["dense_s"]) == 2 and len(row["gated_s"]) == 2 and row["ratio"] > 0
        assert row["kept_gib"] <= row["reserved_gib"]
        assert row["weights_gib"] + row["kept_gib"] < row["peak_gib"]
    assert rows[0]["flops_ratio"] == 1          # the window covers it all: nothing is saved
    assert 0.15 < rows[1]["admitted"] < 0.25 and rows[1]["flops_ratio"] < 1
    printed = capsys.readouterr().out
    assert "flops_ratio" in printed and len(printed.strip().splitlines()) == 4


def test_bench_decode_reads_its_prompts(tmp_path):
    """A decode step on an empty cache is fast, and says nothing."""
    [row] = bench_rows(tmp_path, "decode", "--tokens", "300", "--steps", "3", "--runs", "2",
                       "--batch", "2", "--admit", "1")
    assert row["lengths"] == [200, 300] and row["prefill_s"][0] > 0
    assert len(row["gated_s"]) == 2 and len(row["dense_s"]) == 2 and row["ratio"] > 0
    assert row["kept_share"] > 0.9              # of 500 tokens, all of them admitted


def test_bench_without_a_dense_side(tmp_path):
    """A million tokens: dense would take hours or more memory than there is."""
    for what in ("prefill", "decode"):
        [row] = bench_rows(tmp_path, what, "--tokens", "150", "--steps", "1", "--runs", "1",
                           "--dense-up-to", "149")
        assert not row.get("dense_s") and row["ratio"] is None and row["gated_s"][0] > 0


@pytest.mark.parametrize("argv, words", (
    (["kernels"], "kernels needs a CUDA device"),
    (["train"], "train needs a CUDA device"),
    (["all"], "needs a CUDA device"),
    (["memory"], "memory: there are kernels, prefill, decode, train and all"),
    (["--admit", "1.5"], "should be a number from 0 to 1, it is '1.5'"),
    (["--admit", "0.2,"], "should be a number from 0 to 1, it is ''"),
    (["--tokens", "1"], "should be a whole number of at least 2, it is '1'"),
    (["--runs", "0"], "should be a whole number of at least 1, it is '0'"),
    (["--shape", "llama-3.1-8b", "--gates", "x.safetensors"], "--shape has random weights"),
    (["--gates", "x.safetensors", "--admit", "0.2"], "not allowed with argument --gates"),
    (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json cannot be written"),
), ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bench_refuses_bad_options_in_one_line(argv, words, capsys):
    """A mistake that shows after the work, or as a traceback."""
    assert run_program(bench.main, [*argv, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_sides_run_in_turn():
    """A A B B would count a GPU that slows down against B; a side may say what counts."""
    order = []
    times = bench.in_turn(2, torch.device("cpu"), a=lambda: order.append("a"),
                          b=lambda: order.append("b") or 7.0)
    assert order == ["a", "b", "a", "b"]
    assert times["b"] == [7.0, 7.0] and len(times["a"]) == 2 and max(times["a"]) < 7


@pytest.mark.parametrize("tokens, window", ((5, 8), (8, 8), (50, 8)))
def test_flops_are_those_of_the_definition(tokens, window):
    """MFU and the ratio to hope for rest on this formula."""
    c = Config(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32)
    i = torch.arange(tokens)[:, None]
    j = torch.arange(tokens)
    near = int(((j <= i) & (i - j < window)).sum())
    far = int((i - j >= window).sum())
    pair = 2 * 2 * c.head_dim * c.num_heads * c.num_layers          # q k and p v, multiply and add
    dense = bench.prefill_flops(c, tokens)
    assert dense - bench.prefill_flops(c, tokens, 0.25, window) == pytest.approx(0.75 * far * pair)
    qkv_out = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32
    linear = 2 * tokens * 3 * (qkv_out + 3 * 32 * c.intermediate_size)
    assert dense == pytest.approx(linear + (near + far) * pair)


def tiny_shape(Hkv=2, L=2):
    return Config(num_layers=L, num_heads=4, num_kv_heads=Hkv, head_dim=16, hidden_size=64)


def test_simulated_admission_admits_its_shares():
    """Heads that share a decision, layers that do; a split that changes what is admitted."""
    model = SimpleNamespace(config=tiny_shape(), device=DEVICE)
    policy = bench.SimulatedAdmission(model, [0.5, 0.1], tokens=4000, window=16)
    ran = []
    policy.gates = SimpleNamespace(gate=lambda *args: ran.append(args))
    positions = torch.arange(4000, device=DEVICE)[None]
    layers = [policy.gate(layer, None, None, positions) for layer in range(2)]
    assert len(ran) == 2                                            # real gates cost their time
    for g in layers:
        assert g.shape == (1, 2, 4000) and g.dtype == torch.float32
        shares = (g >= policy.tau).float().mean(-1)[0].tolist()
        assert shares == pytest.approx([0.5, 0.1], abs=0.03)
    assert not torch.equal(*layers)
    parts = [policy.gate(1, None, None, part) for part in positions.split([1, 999, 3000], dim=1)]
    assert torch.equal(torch.cat(parts, dim=2), layers[1])


def test_random_pages_are_a_cache_that_could_be():
    """A page in two rows, a dummy that is in use, or counts of other tokens: figures of nothing."""
    W = 100
    pages = bench.RandomPages(tiny_shape(L=3), [0.6, 0.1], 700, W, DEVICE)
    R = pages_for(W)
    assert pages.ring_pages == R
    admitted = pages.g[0] > 0                                       # (Hkv, T)
    for t in (0, W - 1, W, 699):
        outside = admitted[:, :max(0, t - W + 1)].sum(dim=1)        # the tokens 0 .. t - W
        assert torch.equal(pages.num_old[0, :, t], outside)
    assert torch.equal(pages.counts, pages.num_old[None, :, :, -1].expand(3, -1, -1))
    assert pages.counts[0, 0, 0] > 3 * pages.counts[0, 0, 1]        # uneven, as asked

    used = pages.table[pages.table > 0]
    assert len(used.unique()) == len(used) == len(pages.k) - 1
    in_row = (pages.table > 0).sum(dim=-1)
    assert torch.equal(in_row, R + pages_for(pages.counts))
    assert pages.k.shape[1] == P and bool((pages.table[..., :R] > 0).all())


def test_bench_kernels_calls_what_kernels_has(monkeypatch):
    """Without a GPU nobody would notice that kernels.py's functions take other arguments by now."""
    called = []

    def once(*sides, runs, inner):
        for side in sides:
            called.append(side)
            side()
        return [[1.0] * runs for _ in sides]

    def spy(*inputs, **options):
        given.append(inputs)
        return prefill_attention(*inputs, **options)

    import kernels
    given = []
    prefill_attention = kernels.prefill_attention
    monkeypatch.setattr(kernels, "prefill_attention", spy)
    monkeypatch.setattr(bench, "device_times", once)
    args = SimpleNamespace(tokens=[140], admit=[0.5, 0.1], window=40, runs=2,
                           peaks=dict(bandwidth=1e12, flops=1e14))
    model = SimpleNamespace(config=tiny_shape(), device=DEVICE)
    [row] = bench.bench_kernels(model, args)
    assert len(called) == 4                     # dense, ours; all layers' decode, the plan
    assert row["ratio"] == 1 and len(row["decode_s"]) == 2

    # The kernels do not check shapes: what they get must be what they are documented to take.
    q, band_k, band_v, band_g, page_k, page_v, page_table, num_old, W = given[0]
    assert q.shape == (1, 4, 140, 16) and W == 40
    assert band_k.shape == band_v.shape == (1, 2, 180, 16) and band_g.shape == (1, 2, 180)
    assert page_table.shape[:2] == (1, 2) and num_old.shape == (1, 2, 140)
    promoted = (page_table > 0).sum(dim=-1)
    assert torch.equal(promoted, pages_for(num_old[..., -1])) and int(promoted.sum()) > 0
    # Needed: K and V, 2 bytes a number, of the keys that one layer's query sees.
    keys = 2 * 40 + int(num_old[..., -1].sum())
    assert row["needed_bytes"] == 2 * 2 * 16 * keys


def test_bench_train_takes_a_step_of_train_py():
    """As above, of train.py's: the bench must time the step that users wait for."""
    model = Llama(tiny_shape()).to(DEVICE).requires_grad_(False)
    row = bench.time_train_step(model, 64, SimpleNamespace(window=16, seed=0))
    assert row["tokens_per_s"] == pytest.approx(64 / row["step_s"][0])
    assert row["checkpointed"] is False and "memory" in row["estimate"]


def test_the_picture_shows_medians():
    """Lengths without a dense side must leave a gap, not shift the others."""
    rows = [dict(tokens=1024, dense_s=[5, 1, 2], gated_s=[1, 1, 4], roofline_s=0.5),
            dict(tokens=2048, dense_s=[], gated_s=[3], roofline_s=1.0)]
    pyplot, axes = MagicMock(), (MagicMock(), MagicMock())
    pyplot.subplots.return_value = MagicMock(), axes
    bench.draw_time(pyplot, dict(prefill=rows, decode=rows, model="m", machine="n"))
    for axis, unit in zip(axes, (1, 1000)):
        drawn = {call.kwargs["label"]: call.args[:2] for call in axis.plot.call_args_list}
        assert drawn == {"dense": ([1024], [2 * unit]), "gated": ([1024, 2048], [unit, 3 * unit]),
                         "roofline of gated": ([1024, 2048], [0.5 * unit, 1.0 * unit])}


# ------------------------------------------------------------------------------------- the README

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readmes_program_runs(monkeypatch, capsys):
    """The ten lines that others will copy must be ten, work, and give the answer."""
    program = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    monkeypatch.chdir(HERE)
    exec(program, {})
    assert "2954" in capsys.readouterr().out and program.count("\n") <= 12


def test_ci_finds_the_readmes_commands():
    """CI runs the two lines that a newcomer copies, which belong on the first screen."""
    screen = "\n".join(README.splitlines()[:35])
    assert screen.count("\npip install -r requirements.txt && ") == 2


@pytest.mark.parametrize("script", ("generate", "train", "bench"))
def test_the_options_in_the_texts_exist(script, capsys):
    """An option that is named in README.md or BENCHMARKS.md and was renamed since."""
    with pytest.raises(SystemExit):
        {"generate": generate, "train": train, "bench": bench}[script].main(["--help"])
    known = capsys.readouterr().out
    texts = README + (HERE / "BENCHMARKS.md").read_text(encoding="utf-8")
    commands = re.findall(rf"python {script}\.py([^\n`#]*)", texts)
    assert commands
    for option in re.findall(r"--[a-z][a-z-]+", " ".join(commands)):
        assert option in known, option
