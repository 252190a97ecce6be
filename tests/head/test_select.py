"""Which backend runs, and that a named one is never replaced."""

from __future__ import annotations

import pytest
import torch

from fastpo import linear_logps
from fastpo.head.schedule import Workload
from fastpo.head.select import (
    BACKENDS,
    choose_backend,
    most_kept_tokens,
    plan_head,
    runs_kernels,
)
from fastpo.head.spec import HeadOptions


def test_backend_choice():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    name, why = choose_backend("auto", cpu)
    assert name == "torch"
    assert "cpu" in why
    assert choose_backend("auto", cuda)[0] == "triton"
    assert [runs_kernels("auto", cpu), runs_kernels("auto", cuda)] == [False, True]
    assert {"torch", "triton"} == BACKENDS.keys()


def test_named_triton_never_falls_back(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="cannot run on 'cpu'"):
        linear_logps(x, torch.randn(16, 8), torch.zeros(4, dtype=torch.long), backend="triton")


def test_most_kept_tokens_is_the_last_that_are_kept():
    facts = {"device": "cpu", "workspace_mib": 3}
    most = most_kept_tokens(1000, 16, **facts)
    for count, name in ((most, "kept"), (most + 1, "recompute")):
        work = Workload(count, 1000, 16, needs_head=True)
        assert plan_head(work, HeadOptions(workspace_mib=3), device="cpu")[1].name == name
