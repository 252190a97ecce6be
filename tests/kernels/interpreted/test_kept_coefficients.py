"""`kept_coefficients`, C from products that were kept, apart from them and in their place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.kernels.kept_coefficients import kept_coefficients
from fastpo.kernels.linear_stats import linear_stats
from fastpo.kernels.logits_epilogue import over
from fastpo.kernels.tile import Config, acc_dtype
from tests.kernels.cases import DTYPES, FACTS, Inputs, make
from tests.kernels.interpreted.test_linear_coefficients import (
    GRADS,
    NEEDED,
    assert_coefficients,
    cotangents,
)

V = 507
SMALL = Config(BN=4, BV=128)


def given(x: Inputs, grads: dict[str, Tensor], **facts: Any) -> tuple[Tensor, dict[str, Any]]:
    """(products [N, V], the other arguments)."""
    acc = acc_dtype(x.hidden.dtype)
    stats = linear_stats(*x, **facts, want=NEEDED)
    more = {f"grad_{name}": value for name, value in grads.items()}
    return x.hidden.to(acc) @ x.weight.to(acc).T, {"vocab_size": V, **stats, **more, **facts}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("names", GRADS)
def test_three_way(dtype, facts, names):
    """In slices of a wider slab, before any rounding to half precision."""
    x = make(63, 31, V, dtype, bias=True)
    grads = cotangents(x, GRADS[names])
    products, rest = given(x, grads, **FACTS[facts])
    out = torch.full_like(products, math.nan)
    for lo, hi in ((0, 200), (200, V)):
        kept_coefficients(
            products[:, lo:hi], x.labels, x.bias[lo:hi], v_start=lo, out=out[:, lo:hi], **rest
        )
    assert_coefficients(out, x, grads, **FACTS[facts])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 127, 128, 129, V])
def test_in_place_of_the_products(dtype, v):
    """The same bits as elsewhere: nothing is overwritten before it was read, in any block."""
    x = make(9, 31, V, dtype, bias=True)
    x.labels[:] %= v
    products, rest = given(x, cotangents(x))
    rest |= {"v_start": 0, "config": SMALL}
    slab = products[:, :v].contiguous()
    apart = torch.empty_like(slab, dtype=dtype)
    kept_coefficients(slab.clone(), x.labels, x.bias[:v], out=apart, **rest)
    place = over(slab, dtype)
    assert kept_coefficients(slab, x.labels, x.bias[:v], out=place, **rest) is place
    assert place.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
    assert torch.equal(place, apart)


def test_rows_of_a_larger_slab_in_place():
    """Rows around them keep their products."""
    x = make(9, 31, V, torch.float16)
    products, rest = given(x, cotangents(x))
    wide = torch.full((11, V), 7.0)
    wide[1:10] = products
    apart = kept_coefficients(
        products, x.labels, v_start=0, out=torch.empty(9, V, dtype=torch.float16), **rest
    )
    slab = wide[1:10]
    kept_coefficients(slab, x.labels, v_start=0, out=over(slab, torch.float16), **rest)
    assert torch.equal(over(slab, torch.float16), apart)
    assert (wide[0] == 7).all()
    assert (wide[10] == 7).all()


def test_elsewhere_in_the_products_is_refused():
    x = make(9, 31, V, torch.float16)
    products, rest = given(x, cotangents(x))
    first_half = products.view(torch.float16)[:, :V]
    with pytest.raises(AssertionError, match="over"):
        kept_coefficients(products, x.labels, v_start=0, out=first_half, **rest)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_do(n):
    out = torch.empty(n, 0)
    rows = {name: torch.zeros(n) for name in ("lse", "logps")}
    labels = torch.zeros(n, dtype=torch.long)
    assert kept_coefficients(out, labels, v_start=0, vocab_size=5, out=out, **rows) is out
