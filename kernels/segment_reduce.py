r"""Weighted reduction of tokens to responses, with gradients to values and weights.

    x [N], a [N], starts [R + 1]  ->  S_r = sum over r's tokens of a_t x_t, divided by
        sum         1
        mean        the number of tokens whose weight is not 0, at least 1
        normalised  the sum of the weights; where that is 0, value and gradients are 0

Tokens lie in packed order: those of response r are starts[r] to starts[r + 1]. One program reads
one response, however long (100K tokens are 25 steps), so every sum has one owner and a fixed order:
equal inputs give equal bits, where adding by index races on a device. An empty response is 0.

Sums are float64, which a kernel bound by memory has for nothing. Traffic: forward 8N + 8R bytes,
backward 8N read and 8N written, in float32.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .tile import Config, Table, chip_of, on_device_of, pick, precision

Reduction = Literal["sum", "mean", "normalised"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@triton.jit
def reduce_kernel(
    values_ptr,
    weights_ptr,
    starts_ptr,
    out_ptr,
    inverse_ptr,
    REDUCTION: tl.constexpr,
    BN: tl.constexpr,
):
    """Write one response's reduced value, and 1 / divisor."""
    i_r = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts_ptr + i_r), tl.load(starts_ptr + i_r + 1)
    # BN sums side by side, folded once at the end: one reduction a response instead of one a step.
    total, count = tl.zeros([BN], dtype=tl.float64), tl.zeros([BN], dtype=tl.float64)
    # while: the interpreter of triton 3.6 cannot range over a runtime value with numpy >= 2.4.
    while first < end:
        o_n = first + tl.arange(0, BN)
        m_n = o_n < end
        x = tl.load(values_ptr + o_n, mask=m_n, other=0.0).to(tl.float64)
        a = m_n.to(tl.float64)
        if weights_ptr is not None:
            a = tl.load(weights_ptr + o_n, mask=m_n, other=0.0).to(tl.float64)
        total += a * x
        if REDUCTION == "mean":
            count += (a != 0.0).to(tl.float64)
        if REDUCTION == "normalised":
            count += a
        first += BN
    total, divisor = tl.sum(total), tl.sum(count)
    inverse = 1.0 / tl.where(divisor == 0.0, 1.0, divisor)
    if REDUCTION == "normalised":
        inverse = tl.where(divisor == 0.0, 0.0, inverse)
    tl.store(out_ptr + i_r, total * inverse)
    tl.store(inverse_ptr + i_r, inverse)


@triton.jit
def spread_kernel(
    values_ptr,
    weights_ptr,
    starts_ptr,
    out_ptr,
    inverse_ptr,
    cotangents_ptr,
    grad_values_ptr,
    grad_weights_ptr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
):
    """Write one response's g a / divisor to its values and g (x - S) / divisor to its weights.

    S, the value itself, is there only where the weights are the divisor too.
    """
    i_r = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts_ptr + i_r), tl.load(starts_ptr + i_r + 1)
    g = tl.load(cotangents_ptr + i_r) * tl.load(inverse_ptr + i_r)
    while first < end:
        o_n = first + tl.arange(0, BN)
        m_n = o_n < end
        a = m_n.to(ACC)
        if weights_ptr is not None:
            a = tl.load(weights_ptr + o_n, mask=m_n, other=0.0).to(ACC)
            x = tl.load(values_ptr + o_n, mask=m_n, other=0.0).to(ACC)
            if REDUCTION == "normalised":
                x -= tl.load(out_ptr + i_r)
            tl.store(grad_weights_ptr + o_n, g * x, mask=m_n)
        tl.store(grad_values_ptr + o_n, g * a, mask=m_n)
        first += BN


# 4096 tokens a step: four 16-byte loads a thread in flight, and 100K tokens take 25 steps.
CONFIGS: Table = {
    ("any", "16"): Config(BN=4096, BV=0, warps=8),
    ("any", "32"): Config(BN=4096, BV=0, warps=8),
    ("any", "64"): Config(BN=2048, BV=0, warps=8),
}


class _SegmentReduce(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weights: Tensor | None, starts: Tensor, reduction: Reduction
    ) -> Tensor:
        values, starts = values.contiguous(), starts.contiguous()
        weights = None if weights is None else weights.contiguous()
        config = pick(CONFIGS, chip_of(values.device), values.dtype)
        kinds = {"REDUCTION": reduction, "BN": config.BN, "num_warps": config.warps}
        R = starts.numel() - 1
        out = values.new_empty(R)
        inverse = torch.empty_like(out)
        if R:
            with on_device_of(values):
                reduce_kernel[(R,)](values, weights, starts, out, inverse, **kinds)
        ctx.save_for_backward(values, weights, starts, out, inverse)
        ctx.kinds = kinds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        values, weights, starts, out, inverse = ctx.saved_tensors
        grad_values = torch.zeros_like(values)  # also of what no response has
        grad_weights = None if weights is None else torch.zeros_like(weights)
        if out.numel():
            with on_device_of(values):
                spread_kernel[(out.numel(),)](
                    values,
                    weights,
                    starts,
                    out,
                    inverse,
                    cotangents[0].contiguous(),
                    grad_values,
                    grad_weights,
                    **ctx.kinds,
                    ACC=precision(values.dtype)["ACC"],
                )
        return grad_values, grad_weights, None, None


def segment_reduce(
    values: Tensor,  # [N]
    starts: Tensor,  # [R + 1] int64
    weights: Tensor | None = None,  # [N]
    reduction: Reduction = "sum",
) -> Tensor:  # [R]
    """Reduce the tokens of each response by weights; differentiable in values and weights.

    Args:
        values: [N] fp32 or fp64, such as log-probs, in packed order.
        starts: response r has the tokens from starts[r] up to starts[r + 1].
        weights: [N] of the same dtype, any sign; None for ones.
        reduction: `sum`, `mean` over tokens of nonzero weight, or `normalised` by the weights' sum.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        names = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"unknown reduction {reduction!r}; use {names}")
    assert starts.dtype == torch.int64
    assert weights is None or (weights.shape == values.shape and weights.dtype == values.dtype)
    return _SegmentReduce.apply(values, weights, starts, reduction)


def segment_reduce_reference(
    values: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """Return `segment_reduce` in plain torch, with its gradients."""
    weights = torch.ones_like(values) if weights is None else weights
    R = starts.numel() - 1
    response = torch.repeat_interleave(torch.arange(R, device=starts.device), starts.diff())
    first, last = int(starts[0]), int(starts[-1])

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(R).index_add(0, response, x[first:last])

    total = sums(values * weights)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / sums((weights != 0).to(values.dtype)).clamp(min=1)
    divisor = sums(weights)
    return torch.where(divisor == 0, 0.0, total / divisor.where(divisor != 0, 1))
