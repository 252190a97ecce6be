r"""The head's schedules: which matrix products run, in what order, in how much workspace.

| name        | when                                        | products    | kept for backward     |
|-------------|---------------------------------------------|-------------|-----------------------|
| `forward`   | nothing requires a gradient                 | h           | nothing               |
| `frozen`    | only the hidden states do                   | h + k       | k buffers [N, D] fp32 |
| `kept`      | the head does too, logits fit the workspace | h + outputs | the logits            |
| `recompute` | the head does too, they do not fit          | 2h + outputs| [N] per statistic     |

One product is 2NDV FLOP; h is 2 with a reference head in the same pass, else 1; k is the number of
statistics that carry a gradient; `outputs` counts dH and dW. `frozen` forms
$r_t = \partial stat_t / \partial h_t$ while a slab is alive, so its backward is an elementwise row
scale, exact for any loss. `recompute` walks the vocabulary in the outer loop: each slice of dW is
finished by one product and rounded once, and no fp32 [V, D] buffer exists.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.tiles import (
    Heads,
    Link,
    Tiles,
    TorchTiles,
    accumulator,
    add_matmul_,
    blocks,
    concatenate,
    logit_slab,
    matmul,
)

# Slices of the vocabulary start where rows of kernels' blocks do: ragged ones cost registers.
_VOCAB_MULTIPLE = 128


class Schedule(NamedTuple):
    """What `choose_schedule` decided, in the words of the module docstring."""

    name: str
    products: int
    row_block: int
    vocab_block: int
    reason: str


def choose_schedule(
    num_tokens: int,
    vocab_size: int,
    *,
    needs_hidden: bool,
    needs_head: bool = False,
    needs_weight: bool = False,
    num_grad_stats: int = 1,
    with_reference: bool = False,
    num_slabs: int = 2,
    workspace_bytes: int = 256 << 20,
    itemsize: int = 4,
) -> Schedule:
    """The cheapest schedule by matrix products; among equals the one that keeps less.

    Args:
        num_tokens, vocab_size: N and V.
        needs_hidden: the hidden states require a gradient.
        needs_head: the weight or the bias does; `needs_weight`: the weight does.
        num_grad_stats: statistics that carry a gradient.
        with_reference: a second head's logits are formed in the same pass.
        num_slabs: slabs alive at once, of `itemsize` bytes an element (see `Tiles.num_slabs`).
        workspace_bytes: the most that they may take together.
        itemsize: bytes of an accumulator, 8 for float64.
    """
    heads = 2 if with_reference else 1
    row_block = max(1, workspace_bytes // (vocab_size * itemsize * num_slabs))
    vocab_block = max(1, workspace_bytes // (max(1, num_tokens) * itemsize * num_slabs))
    if vocab_block > _VOCAB_MULTIPLE:
        vocab_block -= vocab_block % _VOCAB_MULTIPLE
    row_block, vocab_block = min(row_block, max(1, num_tokens)), min(vocab_block, vocab_size)
    outputs = int(needs_hidden) + int(needs_weight)

    def schedule(name: str, products: int, reason: str) -> Schedule:
        return Schedule(name, products, row_block, vocab_block, reason)

    if num_grad_stats == 0 or not (needs_hidden or needs_head):
        return schedule("forward", heads, "no gradient is needed")
    if not needs_head and num_grad_stats < heads + 1:
        return schedule("frozen", heads + num_grad_stats, "frozen head: gradient formed in forward")
    slab_bytes = num_tokens * vocab_size * itemsize
    if slab_bytes * (num_slabs + heads) <= workspace_bytes:
        return schedule("kept", heads + outputs, "the logits fit the workspace")
    return schedule(
        "recompute",
        2 * heads + outputs,
        f"logits of {slab_bytes >> 20} MiB exceed the workspace of {workspace_bytes >> 20} MiB",
    )


class Plan(NamedTuple):
    """Everything about a pass that is not a tensor."""

    link: Link
    want: tuple[str, ...]  # statistics to return
    grads: tuple[str, ...]  # those of them that carry a gradient
    tiles: Tiles
    schedule: Schedule


class LinearStats(torch.autograd.Function):
    """Token statistics of a head as one differentiable operation; see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        heads = Heads(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias)
        ctx.plan = plan
        # Kept logits are already in memory: the plain backend reads them, whichever was chosen.
        tiles = TorchTiles() if plan.schedule.name == "kept" else plan.tiles
        needed = tuple(dict.fromkeys((*plan.want, *tiles.keeps)))
        if ref_hidden is not None:
            needed += ("ref_lse", "ref_lse_rest")
        ctx.tiles = tiles
        ctx.needed, ctx.dtype = needed, hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            if plan.schedule.name == "frozen":
                stats, kept = _forward_frozen(heads, plan, needed)
                ctx.save_for_backward(*kept)
            elif plan.schedule.name == "kept":
                z, z_ref = (
                    logit_slab(hidden, weight, bias, plan.link),
                    TorchTiles.reference_logits(heads, plan.link),
                )
                kept = [slab.clone() for slab in (z, z_ref) if slab is not None]
                stats, _ = TorchTiles.from_logits(z, z_ref, labels, plan.link, needed, ())
                ctx.save_for_backward(*heads, *(stats[name] for name in needed), *kept)
            else:
                stats = tiles.statistics(heads, plan.link, needed, plan.schedule.row_block)
                if plan.schedule.name == "recompute":
                    ctx.save_for_backward(*heads, *(stats[name] for name in needed))
        ctx.mark_non_differentiable(*(stats[n] for n in plan.want if n not in plan.grads))
        return tuple(stats[name] for name in plan.want)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        given = dict(zip(plan.want, cotangents, strict=True))
        given = {name: given[name] for name in plan.grads}
        saved = ctx.saved_tensors
        with torch.autocast(cotangents[0].device.type, enabled=False):
            if plan.schedule.name == "frozen":
                rows = (given[n][:, None] * r for n, r in zip(plan.grads, saved, strict=True))
                grad_hidden = functools.reduce(torch.add, rows).to(ctx.dtype)
                return (None, grad_hidden, *[None] * 6)
            count = len(Heads._fields)
            stats = dict(zip(ctx.needed, saved[count:], strict=False))
            kept = saved[count + len(ctx.needed) :] or None
            grads = _backward_by_vocabulary(
                Heads(*saved[:count]),
                plan,
                ctx.tiles,
                stats,
                given,
                kept,
                ctx.needs_input_grad[1:4],
            )
        return (None, *grads, *[None] * 4)


def _forward_frozen(
    heads: Heads, plan: Plan, needed: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Statistics, and r_t = d stat_t / d h_t [N, D] of every statistic in `plan.grads`."""
    acc = accumulator(heads.hidden.dtype)
    buffers = [torch.zeros_like(heads.hidden, dtype=acc) for _ in plan.grads]
    parts = []
    for lo, hi in blocks(heads.labels.numel(), plan.schedule.row_block):
        stats, coefficients = plan.tiles.statistics_and_coefficients(
            heads.rows(lo, hi), plan.link, needed, plan.grads
        )
        for buffer, coefficient in zip(buffers, coefficients, strict=True):
            add_matmul_(buffer[lo:hi], coefficient, heads.weight)
        parts.append(stats)
    return concatenate(parts, needed), buffers


def _backward_by_vocabulary(
    heads: Heads,
    plan: Plan,
    tiles: Tiles,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    kept: tuple[Tensor, ...] | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias), one vocabulary slice after the other."""
    acc = accumulator(heads.hidden.dtype)
    vocab_size = heads.weight.shape[0]
    grad_hidden = torch.zeros_like(heads.hidden, dtype=acc) if needs[0] else None
    grad_weight = torch.empty_like(heads.weight) if needs[1] else None
    grad_bias = torch.empty_like(heads.bias) if needs[2] and heads.bias is not None else None
    for lo, hi in blocks(vocab_size, plan.schedule.vocab_block):
        part = heads.columns(lo, hi)
        logits = None if kept is None else tuple(slab[:, lo:hi] for slab in kept)
        c = tiles.coefficients(part, plan.link, stats, cotangents, lo, vocab_size, logits)
        if grad_hidden is not None:
            add_matmul_(grad_hidden, c, part.weight)
        if grad_weight is not None:
            c_half = c.to(heads.hidden.dtype) if c.is_cuda else c
            grad_weight[lo:hi] = matmul(c_half.T, heads.hidden)
        if grad_bias is not None:
            grad_bias[lo:hi] = c.sum(dim=0, dtype=acc)
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(heads.hidden.dtype)
    return grad_hidden, grad_weight, grad_bias
