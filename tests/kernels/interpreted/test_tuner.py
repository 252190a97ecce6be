"""What the tuner times is right by its own gate, and the gate is no formality."""

from __future__ import annotations

import pytest
import torch

from bench import tune_head
from bench.tune_head import Regime
from fastpo.kernels.tile import Config

CPU, SHAPE = torch.device("cpu"), (33, 64, 300)
BLOCKS = {
    Regime("split_kernel", 16, ("pointers",)): Config(32, 128, 64),
    Regime("split_kernel", 32, ("rich",)): Config(32, 128, 64),
    Regime("coefficients_kernel", 32, ("rich",)): Config(32, 128, 64),
    Regime("coefficients_kernel", 32): Config(32, 128, 64),
    Regime("epilogue_kernel", 32): Config(32, 128),
    Regime("divergence_kernel", 32): Config(32, 128),
    Regime("divergence_coefficients_kernel", 32): Config(32, 128),
}


@pytest.mark.parametrize("regime", BLOCKS, ids=lambda r: f"{r.kernel} {r.key}")
def test_gate(regime, monkeypatch):
    wrong = tune_head.gate(regime, CPU, SHAPE)
    assert wrong(BLOCKS[regime]) is None
    bind = tune_head.bind

    def broken(*args):
        run, plain = bind(*args)
        return lambda config: {name: x * 1.001 for name, x in run(config).items()}, plain

    monkeypatch.setattr(tune_head, "bind", broken)
    assert "is off by" in tune_head.gate(regime, CPU, SHAPE)(BLOCKS[regime])
