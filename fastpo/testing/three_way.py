"""Judge numbers by one rule, three ways: no test has a tolerance of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def error(value: Tensor, truth: Tensor) -> float:
    """Return the largest difference from the float64 truth; NaN or misplaced inf counts as inf."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    same = (value == truth) | (value.isnan() & truth.isnan())
    difference = torch.where(same, torch.zeros_like(truth), (value - truth).abs())
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def assert_three_way(
    ours: Tensor,
    plain: Tensor | Sequence[Tensor],
    truth: Tensor,
    what: str = "value",
    *,
    terms: float = 0.0,
) -> None:
    """Assert error(ours, float64) <= 2 (error(same-dtype PyTorch, float64) + eps * scale).

    Args:
        ours: what is judged; eps is the machine epsilon of its dtype.
        plain: plain PyTorch's result, or several whose worst counts: where `ours` is float64 too,
            plain PyTorch with its sums in other orders shows how far the truth itself is rounded.
        truth: the float64 result; scale is its largest magnitude, at least `terms`.
        what: named in the message.
        terms: magnitude of the terms whose difference the value is, where they cancel.
    """
    finite = truth.detach().double()[truth.isfinite()]
    scale = max(terms, finite.abs().max().item() if finite.numel() else 0.0)
    eps = torch.finfo(ours.dtype).eps
    several = [plain] if isinstance(plain, Tensor) else plain
    measured, theirs = error(ours, truth), max(error(each, truth) for each in several)
    bound = 2 * (theirs + eps * scale)
    assert measured <= bound, (
        f"{what}: error {measured:.3e} against float64, bound {bound:.3e} "
        f"(plain {theirs:.3e}, eps*scale {eps * scale:.3e})"
    )
