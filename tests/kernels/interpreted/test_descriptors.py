"""Matrices read through descriptors (TMA) and through pointers give the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpo.kernels.linear_coefficients import linear_coefficients
from fastpo.kernels.linear_stats import linear_stats
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import Config, acc_dtype, described, operands
from tests.kernels.cases import Inputs, make

POINTERS = Config(BN=32, BV=128, BD=64, group=2)
TMA = replace(POINTERS, tma=True)


def both(x: Inputs, lora: Tensor | None, config: Config) -> list[Tensor]:
    """Statistics, and the coefficients of a vocabulary slice that starts inside."""
    stats = linear_stats(*x, lora=lora, softcap=5.0, want=STATISTICS, config=config, blocks=2)
    rows = {name: stats[name] for name in ("lse", "lse_rest", "logps", "entropy")}
    first = 136
    c = linear_coefficients(
        x.hidden, x.weight[first:], x.labels, x.bias[first:], v_start=first,
        vocab_size=len(x.weight), lora_slice=None if lora is None else lora[first:], softcap=5.0,
        **rows, grad_logps=rows["logps"], grad_entropy=rows["lse"], config=config,
        out_dtype=acc_dtype(x.hidden.dtype),
    )  # fmt: skip
    return [*stats.values(), c]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 64, 160), (63, 136, 507)])
def test_same_bits(dtype, rank, n, d, v):
    """Widths that end inside a block too, and NaN past the ends of the rows."""
    x = make(n, d, v, dtype, bias=True)
    hidden = torch.full((n, d + rank + 24), math.nan).to(dtype)[:, : d + rank]
    hidden[:, :d] = x.hidden
    lora = None
    if rank:
        g = torch.Generator().manual_seed(2)
        hidden[:, d:] = torch.randn(n, rank, generator=g)
        lora = torch.randn(v, rank, generator=g).to(dtype)
    x = x._replace(hidden=hidden)
    for by_tma, by_pointers in zip(both(x, lora, TMA), both(x, lora, POINTERS), strict=True):
        assert torch.equal(by_tma, by_pointers)


DESCRIBED = {
    "contiguous": (lambda h: h, True),
    "rows apart": (lambda h: h[::2], True),
    "shifted by a row": (lambda h: h[1:], True),
    "shifted by an element": (lambda h: h[:, 1:], False),
    "expanded": (lambda h: h[:1].expand(4, -1), False),
    "odd width": (lambda h: h[:, :61].contiguous(), False),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_described(name):
    view, answer = DESCRIBED[name]
    h = torch.zeros(4, 64, dtype=torch.bfloat16)
    for hidden, weight in ((view(h), h), (h, view(h))):
        assert described(operands(hidden, weight, None)) == answer
    assert described(operands(h, h, view(h))) == answer
