r"""Compute a trained head's loss a few groups at a time, so that no matmul runs twice.

While the logits of a few groups are alive, their scores, losses and coefficients are known too.
Only statistics of the whole batch forbid that. So dH and dW are formed before the next
groups' logits take their place: 3 matmuls instead of the 4 of a pass that has to come back
(`fastpo.head.schedule`). dW is summed in the accumulator's dtype, [V, D] of it, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.batch import TargetTokens
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.head.types import accumulator
from fastpo.loss.metrics import LossOutput
from fastpo.segments import Segments


class LossInputs(NamedTuple):
    """Hold what a loss is computed from."""

    hidden: Tensor  # [M, D]
    head: HeadTensors
    tokens: TargetTokens
    reference: ReferenceStates | None = None

    def learned_tokens(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the per-token tensors that require a gradient: states, and perhaps weights."""
        named = {f.name: getattr(self.tokens, f.name) for f in fields(self.tokens)}
        for name, value in {"hidden": self.hidden, **named}.items():
            if isinstance(value, Tensor) and value.requires_grad:
                yield name, value

    def select(self, lo: int, hi: int) -> tuple[LossInputs, Tensor | slice]:
        """Return the groups lo:hi alone as leaves of a graph of their own, and their tokens."""
        segments, index = self.tokens.segments.select(lo, hi)
        learned = {name for name, _ in self.learned_tokens()}

        def taken(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach()[index].requires_grad_(name in learned)

        tokens = {f.name: taken(f.name, getattr(self.tokens, f.name)) for f in fields(self.tokens)}
        reference = self.reference
        if reference is not None:
            reference = reference._replace(hidden=taken("reference", reference.hidden))
        return self._replace(
            hidden=taken("hidden", self.hidden),
            tokens=TargetTokens(**{**tokens, "segments": segments}),
            reference=reference,
        ), index


def cut_groups(segments: Segments, most: int) -> list[tuple[int, int]]:
    """Return intervals of groups with at most `most` tokens each, or a single larger group."""
    cuts, start, taken = [], 0, 0
    counts = segments.tokens_of_groups()
    for group, count in enumerate(counts):
        if group > start and taken + count > most:
            cuts.append((start, group))
            start, taken = group, 0
        taken += count
    return [*cuts, (start, len(counts))]


def by_groups(
    loss_of: Callable[[LossInputs, Tensor | None], LossOutput],
    inputs: LossInputs,
    cuts: list[tuple[int, int]],
) -> list[LossOutput]:
    """Return the outputs of every interval of groups; gradients flow from the first one's loss.

    Args:
        loss_of: (inputs, where the weight's gradient is to be added) -> an output; the losses sum
            up to the loss of all groups.
        inputs: of all groups.
        cuts: of `cut_groups`.
    """
    weight = inputs.head.weight
    wide, kind = accumulator(weight.dtype), weight.device.type
    # Cast here, once: the head would for every interval, 3 GB at V 128256, D 4096.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    weight_grad = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
    # Small ones are summed over the intervals in the accumulator too.
    head_leaves = inputs.head.leaves()
    copies = {
        name: t.detach().to(dtype if name == "weight" else wide).requires_grad_(t.requires_grad)
        for name, t in head_leaves.items()
    }
    trained_copies = {name: t for name, t in copies.items() if t.requires_grad}
    token_leaves = dict(inputs.learned_tokens())
    head_grads = {n: torch.zeros_like(t) for n, t in trained_copies.items() if n != "weight"}
    token_grads = {name: torch.zeros_like(t) for name, t in token_leaves.items()}
    outputs = []
    for lo, hi in cuts:
        part, index = inputs.select(lo, hi)
        part = part._replace(head=inputs.head.with_leaves(copies))
        with torch.enable_grad():
            out = loss_of(part, weight_grad)
            leaves = trained_copies | dict(part.learned_tokens())
            grads = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None and name in head_grads:
                head_grads[name] += grad
            elif grad is not None and name in token_grads:
                token_grads[name][index] = grad
        outputs.append(out._replace(loss=out.loss.detach()))
    gradients = {**head_grads, **token_grads}
    if weight_grad is not None:
        gradients["weight"] = weight_grad
    leaves = {**head_leaves, **token_leaves}
    pairs = [(leaves[name], grad.to(leaves[name].dtype)) for name, grad in gradients.items()]
    total = torch.stack([out.loss for out in outputs]).sum()
    loss = _KnownGradients.apply(total, [grad for _, grad in pairs], *(leaf for leaf, _ in pairs))
    return [outputs[0]._replace(loss=loss), *outputs[1:]]


class _KnownGradients(torch.autograd.Function):
    """Make a number whose gradients are known already."""

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
