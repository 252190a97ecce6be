"""What the tuner times and judges: right kernels pass its gate, wrong ones do not."""

from __future__ import annotations

import pytest
import torch

from bench import tune_head
from bench.tune_head import GATE_ROWS, regimes
from fastpo.kernels.tile import Config

SHAPE = (64, 32, 272)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tune_head, "NARROW", 16)
    monkeypatch.setattr(tune_head, "_hash_in_order", lambda: None)  # nothing compiles


@pytest.mark.parametrize("regime", regimes(tma=True), ids=lambda r: f"{r.kernel} {r.key}")
def test_the_gate_lets_right_kernels_pass_and_no_others(regime, monkeypatch):
    config = Config(64, 64, 16)
    assert tune_head.gate(regime, SHAPE, CPU, programs=4)(config) is None

    bind = tune_head.bind

    def wrong(*arguments):
        run, plain = bind(*arguments)

        def run_wrong(config):
            found = run(config)
            name, value = next(iter(found.items()))
            value[-1] += value.abs().max() / 8  # of the last row alone, which is ragged
            return {**found, name: value}

        return run_wrong, plain

    monkeypatch.setattr(tune_head, "bind", wrong)
    assert "is off by" in tune_head.gate(regime, SHAPE, CPU, programs=4)(config)


@pytest.mark.parametrize("regime", regimes(tma=False), ids=lambda r: f"{r.kernel} {r.key}")
def test_the_gate_runs_the_first_rows_of_what_is_timed(regime):
    timed, _ = tune_head.bind(regime, SHAPE, CPU, 4)
    judged, _ = tune_head.bind(regime, SHAPE, CPU, 4, GATE_ROWS)
    config = Config(64, 64, 16)
    for name, value in timed(config).items():
        assert value.shape == (SHAPE[0], *value.shape[1:])
        assert judged(config)[name].shape == (GATE_ROWS, *value.shape[1:])
