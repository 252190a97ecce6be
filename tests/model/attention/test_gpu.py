"""Every back end with its real kernel, forward and backward, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.model.attention.dispatch import BACKENDS
from fastpo.model.attention.shared_row import AttentionOptions, SharedRow
from fastpo.testing.three_way import assert_three_way
from tests.model.attention.cases import LAYOUT, dense, inputs

pytestmark = pytest.mark.gpu


# Windows of one key, within a response, of a response and beyond; every backend and what it alone
# does.
@pytest.mark.parametrize("window", [None, 1, 3, 9, 12])
@pytest.mark.parametrize(
    ("backend", "extra"),
    [*((name, "plain") for name in BACKENDS), ("flex", "softcap"), ("flex", "sinks")],
)
def test_equals_the_dense_mask(backend: str, window: int | None, extra: str) -> None:
    def results(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, sinks = inputs(dtype, width=64, value_width=64, device="cuda")
        softcap = 1.5 if extra == "softcap" else None
        s_aux = sinks if extra == "sinks" else None
        if ours:
            options = AttentionOptions(0.3, window, softcap, s_aux)
            out = BACKENDS[backend](SharedRow(LAYOUT), q, k, v, options)
        else:
            out = dense(q, k, v, window=window, softcap=softcap, s_aux=s_aux)
        out.float().square().sum().backward()
        grads: list[Any] = [t.grad for t in (q, k, v)]
        return [out, *grads]

    truth = results(False, torch.float64)
    plain, ours = results(False, torch.bfloat16), results(True, torch.bfloat16)
    rows = truth[0].square().sum(-1).max().item() * 2
    terms = 0.3 * rows * max(t.abs().max().item() for t in inputs(torch.float64, width=64)[:2])
    for name, *three in zip(("out", "dq", "dk", "dv"), ours, plain, truth, strict=True):
        assert_three_way(*three, what=name, terms=terms if name in ("dq", "dk") else 0.0)
