"""Tests of gemv.py: one token's linear layers with what is fused into them."""
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# Set before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_program
from experiments import gemv
from model import Block, Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("silu, bias", ((False, True), (True, False), (True, True)))
@torch.no_grad()
def test_gemv_is_the_linear_layer(add, norm, silu, bias):
    """Rows or columns past the end, a norm of other numbers, halves of gate and up mixed up."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        for K, N in ((100, 37), (512, 33), (300, 16)):
            x = torch.randn(1, 1, K)
            y = torch.randn(1, 1, K) if add else None
            linear = nn.Linear(K, 2 * N if silu else N, bias=bias)
            rms_norm = None
            if norm:
                rms_norm = nn.RMSNorm(K, eps=1e-5)
                nn.init.normal_(rms_norm.weight)
            want = gemv.reference(x, linear, y, rms_norm, silu)
            got = gemv.gemv(x, linear, y, rms_norm, silu, BN=16, BK=128)
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it runs")
def test_without_a_gpu_it_says_so(capsys):
    assert run_program(gemv.main, []) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
