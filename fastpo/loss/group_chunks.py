r"""A trained head's loss a few groups at a time, so that no product runs twice.

While the logits of some groups are alive, their scores, losses and coefficients are known too,
unless the objective takes statistics of the whole batch. So dH and dW are formed before the next
groups' logits take their place: 3 products instead of the 4 of a pass that has to come back
(`fastpo.head.schedule`). dW is summed in the accumulator's dtype, [V, D] of it, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.head.types import accumulator
from fastpo.segments import Segments

Tensors = Mapping[str, Tensor | None]


def cut_groups(segments: Segments, most: int) -> list[tuple[int, int]]:
    """Half-open intervals of groups with at most `most` tokens each, or a single larger group."""
    lengths = segments.starts.diff()
    tokens = torch.where(segments.mask, lengths[segments.grid.clamp(min=0)], 0).sum(dim=1)
    for index in segments.extras.values():
        tokens = tokens + lengths[index]
    cuts, start, taken = [], 0, 0
    for group, count in enumerate(tokens.tolist()):
        if group > start and taken + count > most:
            cuts.append((start, group))
            start, taken = group, 0
        taken += count
    return [*cuts, (start, len(tokens))]


def by_groups(
    loss_of: Callable[[Tensors, Tensors, Segments, Tensor | None], Any],
    head: Tensors,
    tokens: Tensors,
    segments: Segments,
    cuts: list[tuple[int, int]],
) -> list[Any]:
    """The outputs of `loss_of` for every interval of groups; gradients flow from the first's loss.

    Args:
        loss_of: (head, tokens, segments, where the weight's gradient is to be added) -> an output
            with a `loss`; these sum up to the loss of all groups.
        head: name -> tensor; `weight` among them.
        tokens: name -> [N, ...] tensors of the label tokens.
        segments: of these tokens.
        cuts: of `cut_groups`.
    """
    weight = head["weight"]
    assert weight is not None
    acc, kind = accumulator(weight.dtype), weight.device.type
    # Cast here, once: `linear_stats` would for every interval, 3 GB at V 128256, D 4096.
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    into = torch.zeros_like(weight, dtype=acc) if weight.requires_grad else None
    # Small ones are summed over the intervals in the accumulator too.
    shared = {
        name: t.detach().to(computed if name == "weight" else acc).requires_grad_(t.requires_grad)
        for name, t in head.items()
        if t is not None
    }
    sums = {n: torch.zeros_like(t) for n, t in shared.items() if t.requires_grad and n != "weight"}
    of_tokens = {
        name: torch.zeros_like(t) for name, t in tokens.items() if t is not None and t.requires_grad
    }
    outputs = []
    for lo, hi in cuts:
        part, index = segments.select(lo, hi)
        mine = {
            name: None if t is None else t.detach()[index].requires_grad_(name in of_tokens)
            for name, t in tokens.items()
        }
        with torch.enable_grad():
            out = loss_of({**head, **shared}, mine, part, into)
            leaves = {n: t for n, t in {**shared, **mine}.items() if t is not None}
            leaves = {n: t for n, t in leaves.items() if t.requires_grad}
            found = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, found, strict=True):
            if grad is not None and name in sums:
                sums[name] += grad
            elif grad is not None and name in of_tokens:
                of_tokens[name][index] = grad
        outputs.append(out._replace(loss=out.loss.detach()))
    grads = {**sums, **of_tokens} | ({} if into is None else {"weight": into})
    sources = {**head, **tokens}
    leaves = [(sources[name], grad.to(sources[name].dtype)) for name, grad in grads.items()]  # pyright: ignore[reportOptionalMemberAccess]
    total = torch.stack([out.loss for out in outputs]).sum()
    loss = _Known.apply(total, [grad for _, grad in leaves], *(t for t, _ in leaves))
    return [outputs[0]._replace(loss=loss), *outputs[1:]]


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of this loss were taken already: call backward on it once, or pass "
                "a workspace_mib that holds the logits of all tokens"
            )
        # In place: the weight's is as large as the weight.
        grads, ctx.grads = [g.mul_(cotangent) for g in ctx.grads], None
        return None, None, *grads
