"""Backends are checked against float64, so that a wrong one is seen; what a head will cost."""

from __future__ import annotations

import pytest
import torch

from fastpo.head.head import Head
from fastpo.model import installation
from fastpo.model.attention import merge as attention_merge
from fastpo.model.attention.merge import Band
from fastpo.model.installation import Verdict

CPU = torch.device("cpu")


def test_a_wrong_attention_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    error, bound = installation.check_attention("merge", CPU, torch.float32)
    assert 0 < error <= bound
    monkeypatch.setattr(attention_merge, "_band", lambda *_: Band(True, -1))
    error, bound = installation.check_attention("merge", CPU, torch.float32)
    assert error > bound


def test_a_wrong_backend_of_the_head_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(verdict.sound for verdict in installation.head_verdicts(CPU))
    right = installation.linear_logps
    monkeypatch.setattr(installation, "linear_logps", lambda *a, **k: right(*a, **k) * 1.0001)
    torch_backend = next(installation.head_verdicts(CPU))
    assert not torch_backend.sound
    assert str(torch_backend).startswith("WRONG: relative error")


def test_one_that_does_not_run_is_not_wrong() -> None:
    verdict = Verdict("varlen", "no such kernel")
    assert (verdict.sound, str(verdict)) == (True, "not here: no such kernel")


def test_costs_of_a_head() -> None:
    """A trained head of many tokens costs 4 matmuls, a frozen one 2, scoring 1."""
    head = Head(torch.nn.Linear(64, 1000, bias=False))
    costs = dict(installation.head_costs(head, CPU, 4096, 1))
    assert costs["scoring"].startswith("1 x 2NDV, schedule ")
    assert costs["frozen"].startswith("2 x 2NDV, schedule frozen")
    assert costs["trained"].startswith("4 x 2NDV, schedule recompute")
    assert costs["logits"] == "16 MiB in float32 if they were stored; 1 MiB are used"
