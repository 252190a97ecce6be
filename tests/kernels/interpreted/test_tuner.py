"""What the tuner times is right by its own gate, and the gate is no formality."""

from __future__ import annotations

import pytest
import torch

from bench import tune_head
from bench.tune_head import Regime
from fastpo.kernels.tile import Config

CPU, SHAPE = torch.device("cpu"), (64, 64, 300)
BLOCKS = {
    Regime("split_kernel", 16, ("pointers",)): Config(32, 128, 64),
    Regime("split_kernel", 32, ("rich",)): Config(32, 128, 64),
    Regime("coefficients_kernel", 32, ("rich",)): Config(32, 128, 64),
    Regime("coefficients_kernel", 32): Config(32, 128, 64),
    Regime("epilogue_kernel", 32): Config(32, 128),
    Regime("divergence_kernel", 32): Config(32, 128),
    Regime("divergence_coefficients_kernel", 32): Config(32, 128),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(tune_head, "hash_in_order", lambda: None)  # nothing compiles
    monkeypatch.setattr(tune_head, "GATE_ROWS", 33)


@pytest.mark.parametrize("regime", BLOCKS, ids=lambda r: f"{r.kernel} {r.key}")
def test_gate(regime, monkeypatch):
    wrong = tune_head.gate(regime, SHAPE, CPU, programs=4)
    assert wrong(BLOCKS[regime]) is None
    bind = tune_head.bind

    def broken(*args):
        run, plain = bind(*args)
        return lambda config: {name: x * 1.001 for name, x in run(config).items()}, plain

    monkeypatch.setattr(tune_head, "bind", broken)
    assert "is off by" in tune_head.gate(regime, SHAPE, CPU, programs=4)(BLOCKS[regime])


@pytest.mark.parametrize("regime", BLOCKS, ids=lambda r: f"{r.kernel} {r.key}")
def test_the_gate_runs_the_first_rows_of_a_launch_cut_as_it_is_timed(regime, monkeypatch):
    cuts = []

    def blocks_per_split(num_n, num_v, programs):
        cuts.append((num_n, num_v, programs))
        return 2

    monkeypatch.setattr(tune_head, "blocks_per_split", blocks_per_split)
    timed, _ = tune_head.bind(regime, SHAPE, CPU, 4)
    judged, _ = tune_head.bind(regime, SHAPE, CPU, 4, tune_head.GATE_ROWS)
    few = judged(BLOCKS[regime])
    for name, value in timed(BLOCKS[regime]).items():
        assert (len(value), len(few[name])) == (64, 33)
    assert cuts == [(2, 3, 4)] * 2 * (regime.kernel == "split_kernel")
