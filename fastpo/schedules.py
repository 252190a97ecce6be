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
finished by one product and rounded once, and no fp32 [V, D] buffer exists. The plain backend keeps
the logits of as many columns as the workspace holds and recomputes only the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.tiles import Heads, Kept, Link, Tiles, accumulator, blocks, matmul
from fastpo.torch_tiles import TorchTiles

# Slices of the vocabulary start where rows of kernels' blocks do: ragged ones cost registers.
_VOCAB_MULTIPLE = 128
# Narrower ones would spend their time on reading and writing the [N, D] gradient of the states.
_LEAST_COLUMNS = 1024


class Schedule(NamedTuple):
    """What `choose_schedule` decided, in the words of the module docstring."""

    name: str
    products: float
    row_block: int
    vocab_block: int
    kept: int  # columns whose logits wait for the backward pass
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
    largest_slab: int | None = None,
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
        largest_slab: see `Tiles`; where it is set, as many logits are kept as fit beside the slabs.
    """
    heads = 2 if with_reference else 1
    row_block = max(1, workspace_bytes // (vocab_size * itemsize * num_slabs))
    vocab_block = max(1, workspace_bytes // (max(1, num_tokens) * itemsize * num_slabs))
    if largest_slab is not None:
        vocab_block = min(vocab_block, max(largest_slab // max(1, num_tokens), _LEAST_COLUMNS))
    if vocab_block > _VOCAB_MULTIPLE:
        vocab_block -= vocab_block % _VOCAB_MULTIPLE
    row_block, vocab_block = min(row_block, max(1, num_tokens)), min(vocab_block, vocab_size)
    outputs = int(needs_hidden) + int(needs_weight)

    def schedule(name: str, products: float, reason: str, kept: int = 0) -> Schedule:
        return Schedule(name, products, row_block, vocab_block, kept, reason)

    if num_grad_stats == 0 or not (needs_hidden or needs_head):
        return schedule("forward", heads, "no gradient is needed")
    if not needs_head and num_grad_stats < heads + 1:
        return schedule("frozen", heads + num_grad_stats, "frozen head: gradient formed in forward")
    column = max(1, num_tokens) * itemsize
    # A reference's logits come in slabs of whole rows: with one, all are kept or none.
    slab = column * (vocab_size if with_reference or largest_slab is None else vocab_block)
    kept = max(0, workspace_bytes - num_slabs * slab) // (heads * column)
    if kept >= vocab_size:
        return schedule("kept", heads + outputs, "the logits fit the workspace", vocab_size)
    kept = 0 if with_reference or largest_slab is None else kept - kept % vocab_block
    return schedule(
        "recompute",
        ((2 * heads + outputs) * vocab_size - heads * kept) / vocab_size,
        f"{kept / vocab_size:.0%} of {heads * column * vocab_size >> 20} MiB of logits fit the "
        f"workspace of {workspace_bytes >> 20} MiB",
        kept,
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
        *tensors: Tensor | None,  # the fields of Heads
    ) -> tuple[Tensor, ...]:
        heads = Heads(*tensors)  # pyright: ignore[reportArgumentType]
        hidden, ref_hidden = heads.hidden, heads.ref_hidden
        ctx.plan = plan
        # Kept logits are already in memory: the plain backend reads them, whichever was chosen.
        tiles = TorchTiles() if plan.schedule.name == "kept" else plan.tiles
        needed = tuple(dict.fromkeys((*plan.want, *tiles.keeps)))
        if ref_hidden is not None:
            needed += ("ref_lse", "ref_lse_rest")
        if "jsd" in plan.grads:
            needed += ("kl_policy_mix",)
        ctx.tiles = tiles
        ctx.needed, ctx.dtype = needed, hidden.dtype
        grads = plan.grads if plan.schedule.name == "frozen" else ()
        keep = _to_keep(plan, heads) if plan.schedule.kept else None
        shape = plan.schedule.row_block, plan.schedule.vocab_block
        with torch.autocast(hidden.device.type, enabled=False):
            stats, buffers = tiles.forward(heads, plan.link, needed, grads, *shape, keep)
        if plan.schedule.name == "frozen":
            ctx.save_for_backward(*buffers)
        elif plan.schedule.name != "forward":
            ctx.save_for_backward(*heads, *(stats[name] for name in needed), *(keep or ()))
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
                return (None, grad_hidden, *[None] * (len(Heads._fields) - 1))
            count = len(Heads._fields)
            stats = dict(zip(ctx.needed, saved[count:], strict=False))
            kept = Kept(*saved[count + len(ctx.needed) :]) if plan.schedule.kept else None
            grads = _backward_by_vocabulary(
                Heads(*saved[:count]),
                plan,
                ctx.tiles,
                stats,
                given,
                kept,
                dict(zip(Heads._fields, ctx.needs_input_grad[1:], strict=True)),
            )
        return (None, *grads)


def _to_keep(plan: Plan, heads: Heads) -> Kept:
    """Room for what `plan.schedule` keeps."""
    acc = accumulator(heads.hidden.dtype)
    n, columns = heads.labels.numel(), plan.schedule.kept
    ref = None if heads.ref_hidden is None else heads.hidden.new_empty(n, columns, dtype=acc)
    shifts = None
    if ref is None and plan.link.softcap is None and set(plan.grads) <= {"logps", "lse"}:
        shifts = heads.hidden.new_empty(-(-columns // plan.schedule.vocab_block), n, dtype=acc)
    return Kept(heads.hidden.new_empty(n, columns, dtype=acc), ref, shifts)


def _backward_by_vocabulary(
    heads: Heads,
    plan: Plan,
    tiles: Tiles,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    kept: Kept | None,
    needs: Mapping[str, bool],
) -> Heads:
    """The gradient of every field that `needs` one, one vocabulary slice after the other."""
    acc, dtype = accumulator(heads.hidden.dtype), heads.hidden.dtype
    vocab_size = heads.weight.shape[0]
    of_columns = ("weight", "bias", "lora_b")
    grads = {n: torch.empty_like(getattr(heads, n)) for n in of_columns if needs[n]}
    grad_hidden = torch.zeros_like(heads.hidden, dtype=acc) if needs["hidden"] else None
    for i, (lo, hi) in enumerate(blocks(vocab_size, plan.schedule.vocab_block)):
        part = heads.columns(lo, hi)
        mine = None if kept is None or hi > plan.schedule.kept else kept.slice(i, lo, hi)
        c = tiles.coefficients(part, plan.link, stats, cotangents, lo, vocab_size, mine)
        if grad_hidden is not None:
            part.add_gradient_(grad_hidden, c)
        for name, states in (("weight", heads.states), ("lora_b", heads.low)):
            if name not in grads:
                continue
            if c.dtype == dtype:
                torch.mm(c.T, states, out=grads[name][lo:hi])
            else:
                c_half = c.to(dtype) if c.is_cuda else c
                grads[name][lo:hi] = matmul(c_half.T, states)
        if "bias" in grads:
            grads["bias"][lo:hi] = c.sum(dim=0, dtype=acc)
    if grad_hidden is not None:
        grads["hidden"] = grad_hidden.to(dtype)
    return Heads(*(grads.get(name) for name in Heads._fields))  # pyright: ignore[reportArgumentType]
