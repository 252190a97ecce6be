"""The jit functions that kernels are built of, one at a time: tanh, log1p, block_order."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels import online, tile
from fastpo.testing.three_way import assert_three_way

WIDE = (torch.float32, torch.float64)


@triton.jit
def tanh_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    tl.store(out_ptr + o, tile.tanh(x), mask=o < n)


@triton.jit
def log1p_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    tl.store(out_ptr + o, online.log1p(x), mask=o < n)


@triton.jit
def order_kernel(out_ptr, num_n, num_v, GROUP: tl.constexpr):
    pid = tl.program_id(0)
    i_n, i_v = tile.block_order(pid, num_n, num_v, GROUP)
    tl.store(out_ptr + 2 * pid, i_n)
    tl.store(out_ptr + 2 * pid + 1, i_v)


def applied(kernel, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    kernel[(1,)](x, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return out


def binade(exponent: int, dtype: torch.dtype) -> Tensor:
    """20 values in [2^exponent, 2^(exponent + 1)), both signs of the rounding included."""
    g = torch.Generator().manual_seed(exponent + 1000)
    x = (1 + torch.rand(20, generator=g, dtype=torch.float64)) * 2.0**exponent
    return x.to(dtype)


def mpmath_of(fn, x: Tensor) -> Tensor:
    with mpmath.workdps(40):
        return torch.tensor([float(fn(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tanh_is_mpmaths(dtype):
    """Binade by binade, so that the scale of the rule is the value's own size: relative error."""
    for exponent in (-126, -80, -40, *range(-30, 5)):
        x = binade(exponent, dtype)
        x = torch.cat([x, -x, torch.tensor([2.0**exponent], dtype=dtype)])
        ours = applied(tanh_kernel, x)
        assert_three_way(ours, torch.tanh(x), mpmath_of(mpmath.tanh, x), f"tanh near 2^{exponent}")


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tanh_at_its_ends(dtype):
    x = torch.tensor([0.0, math.inf, -math.inf, math.nan, 100.0, -1e30], dtype=dtype)
    assert applied(tanh_kernel, x).tolist()[:3] == [0.0, 1.0, -1.0]
    assert applied(tanh_kernel, x).isnan().tolist() == [False, False, False, True, False, False]
    assert applied(tanh_kernel, x).tolist()[4:] == [1.0, -1.0]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tanh_has_no_step_where_its_formulas_meet(dtype):
    x = 0.5 + torch.arange(-20, 20, dtype=torch.float64) * torch.finfo(dtype).eps
    x = x.to(dtype)
    assert_three_way(applied(tanh_kernel, x), torch.tanh(x), mpmath_of(mpmath.tanh, x))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_log1p_is_mpmaths(dtype):
    """Its domain is [0, 1]: it only ever meets exp of something negative."""
    for exponent in (-126, -80, *range(-60, 0)):
        x = binade(exponent, dtype)
        ours = applied(log1p_kernel, x)
        truth = mpmath_of(mpmath.log1p, x)
        assert_three_way(ours, torch.log1p(x), truth, f"log1p near 2^{exponent}")
    ends = applied(log1p_kernel, torch.tensor([0.0, 1.0, math.nan], dtype=dtype))
    assert ends[0] == 0
    assert_three_way(ends[1:2], ends.new_tensor([2.0]).log(), ends.new_tensor([2.0]).double().log())
    assert ends[2].isnan()


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("num_n", "num_v"), [(1, 1), (1, 7), (7, 1), (5, 4), (8, 3), (9, 5)])
def test_block_order_covers_every_pair_once(num_n, num_v, group):
    out = torch.full((num_n * num_v, 2), -1, dtype=torch.int32)
    order_kernel[(num_n * num_v,)](out, num_n, num_v, GROUP=group)
    pairs = [tuple(pair) for pair in out.tolist()]
    assert sorted(pairs) == list(itertools.product(range(num_n), range(num_v)))
    # The rows of a group walk the vocabulary together, each column block in turn.
    rows = min(group, num_n)
    assert pairs[:rows] == [(i, 0) for i in range(rows)]
