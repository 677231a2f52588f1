"""Tests of gemv.py: both sides compute the same. (The kernel's own tests are in test_wgkv.py.)"""
import os
import sys
from pathlib import Path

import pytest
import torch

# Set before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_program
from experiments import gemv
from model import Block, Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def test_both_steps_are_the_same():
    """A comparison of two things that compute something else."""
    torch.manual_seed(0)
    config = Config(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
    with torch.device(DEVICE):
        layers = [Block(config) for _ in range(2)]
        x = torch.randn(1, 1, 64)
    for a, b in zip(gemv.step_with_gemv(layers, x, BN=16, BK=32),
                    gemv.step_with_cublas(layers, x.clone())):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert gemv.check(layers[0], dict(BN=16, BK=32)) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it runs")
def test_without_a_gpu_it_says_so(capsys):
    assert run_program(gemv.main, []) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
