r"""The head as two registered operators, and the differentiable function on top of them.

`fastpo::linear_stats` walks the vocabulary forward, `fastpo::linear_stats_backward` walks it again
where the schedule has something left to do. Both are opaque to `torch.compile`, which sees their
shapes, and tell `torch.utils.flop_counter` how many FLOP their products take. Their arguments are
tensors, numbers and words: the fields of `fastpo.tiles.Heads`, then those of `Plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastpo.sharding import Shard
from fastpo.tiles import (
    Heads,
    Kept,
    Link,
    Tiles,
    accumulator,
    add_matmul_,
    blocks,
    matmul,
)
from fastpo.torch_tiles import TorchTiles
from fastpo.triton_tiles import TritonTiles

_TENSORS = len(Heads._fields)


class Plan(NamedTuple):
    """Everything about a pass that is not a tensor; lists where an operator has them."""

    want: Sequence[str]  # statistics to return
    grads: Sequence[str]  # those of them that carry a gradient
    softcap: float | None
    logit_scale: float
    temperature: float
    jsd_beta: float
    skip_below: float  # a slice of smaller probability is left out of a token's gradient
    backend: str  # torch or triton
    schedule: str
    row_block: int
    vocab_block: int
    kept: int
    group: str | None  # from here on the fields of Shard
    rank: int
    rows: Sequence[int]
    tokens: Sequence[int]

    @property
    def link(self) -> Link:
        return Link(self.softcap, self.logit_scale, self.temperature, self.jsd_beta)

    @property
    def shard(self) -> Shard:
        return Shard(self.group, self.rank, tuple(self.rows), tuple(self.tokens))

    @property
    def tiles(self) -> Tiles:
        if self.backend == "torch":
            return TorchTiles(self.shard, self.skip_below)
        return TritonTiles()

    @property
    def late(self) -> bool:
        """Whether the backward pass walks the vocabulary."""
        return self.schedule in ("kept", "recompute")

    @property
    def found(self) -> tuple[str, ...]:
        """The statistics of the forward operator: those wanted, and what `coefficients` takes."""
        if not self.late:
            return tuple(self.want)
        needed = (*self.want, "lse", "lse_rest", "logps")
        if any(name.startswith(("ref_", "kl_", "jsd")) for name in self.want):
            needed += ("ref_lse", "ref_lse_rest")
        if "jsd" in self.grads:
            needed += ("kl_policy_mix",)
        return tuple(dict.fromkeys(needed))


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias, Tensor? temperatures, Tensor? lora_b, "
    "str[] want, str[] grads, float? softcap, float logit_scale, float temperature, "
    "float jsd_beta, float skip_below, str backend, str schedule, SymInt row_block, "
    "SymInt vocab_block, SymInt kept, str? group, SymInt rank, SymInt[] rows, SymInt[] tokens"
)
torch.library.define("fastpo::linear_stats", f"({_SCHEMA}) -> Tensor[]")
torch.library.define(
    "fastpo::linear_stats_backward",
    f"({_SCHEMA}, Tensor[] saved, Tensor[] cotangents, bool[] needs) -> Tensor[]",
)


def linear_stats(*args: Any) -> list[Tensor]:
    """`Plan.found`, then what waits for the backward pass: gradients, or the fields of `Kept`."""
    heads, plan = Heads(*args[:_TENSORS]), Plan(*args[_TENSORS:])
    grads = tuple(plan.grads) if plan.schedule == "frozen" else ()
    keep = _to_keep(heads, plan)
    with torch.autocast(heads.hidden.device.type, enabled=False):
        stats, buffers = plan.tiles.forward(
            heads, plan.link, plan.found, grads, plan.row_block, plan.vocab_block, keep
        )
    waiting = () if keep is None else keep
    return [stats[n] for n in plan.found] + buffers + [t for t in waiting if t is not None]


torch.library.impl("fastpo::linear_stats", "CompositeExplicitAutograd", linear_stats)


@torch.library.register_fake("fastpo::linear_stats")
def _(*args: Any) -> list[Tensor]:
    heads, plan = Heads(*args[:_TENSORS]), Plan(*args[_TENSORS:])
    acc = accumulator(heads.hidden.dtype)
    stats = [heads.labels.new_empty(heads.labels.shape, dtype=acc) for _ in plan.found]
    frozen = plan.schedule == "frozen"
    buffers = [torch.empty_like(heads.hidden, dtype=acc) for _ in plan.grads if frozen]
    return stats + buffers + [t for t in _to_keep(heads, plan) or () if t is not None]


def _kept_shapes(heads: Heads, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Of the fields of `Kept` that this pass has."""
    if not plan.late or not (plan.kept or plan.skip_below):
        return {}
    n, slices = heads.labels.shape[0], -(-heads.weight.shape[0] // plan.vocab_block)
    shapes: dict[str, tuple[int, ...]] = {"logits": (n, plan.kept)}
    if heads.ref_hidden is not None:
        shapes["ref_logits"] = n, plan.kept
    elif plan.backend == "torch" and plan.softcap is None and set(plan.grads) <= {"logps", "lse"}:
        shapes["shifts"] = -(-plan.kept // plan.vocab_block), n
    if plan.skip_below:
        shapes["shares"] = slices, n
    return shapes


def _to_keep(heads: Heads, plan: Plan) -> Kept | None:
    """Room for what waits for the backward pass, or None where that is nothing."""
    acc = accumulator(heads.hidden.dtype)
    shapes = _kept_shapes(heads, plan)
    if not shapes:
        return None
    return Kept(**{name: heads.hidden.new_empty(s, dtype=acc) for name, s in shapes.items()})


def linear_stats_backward(*args: Any, into: Tensor | None = None) -> list[Tensor]:
    """The gradients of the fields of `Heads` that are needed, one vocabulary slice after another.

    That of the hidden states stays in the accumulator; that of the weight is added to `into` and
    not returned if there is one, which is more than an operator may do.
    """
    saved, cotangents, needs = args[-3:]
    heads, plan = Heads(*args[:_TENSORS]), Plan(*args[_TENSORS:-3])
    stats = dict(zip(plan.found, saved, strict=False))
    waiting = dict(zip(_kept_shapes(heads, plan), saved[len(plan.found) :], strict=True))
    with torch.autocast(heads.hidden.device.type, enabled=False):
        return _backward_by_vocabulary(
            heads,
            plan,
            stats,
            dict(zip(plan.grads, cotangents, strict=True)),
            Kept(**waiting) if waiting else None,
            dict(zip(Heads._fields, needs, strict=True)),
            into,
        )


torch.library.impl(
    "fastpo::linear_stats_backward", "CompositeExplicitAutograd", linear_stats_backward
)


@torch.library.register_fake("fastpo::linear_stats_backward")
def _(*args: Any) -> list[Tensor]:
    heads, needs = Heads(*args[:_TENSORS]), args[-1]
    wide = accumulator(heads.hidden.dtype)
    return [
        torch.empty_like(t, dtype=wide if name == "hidden" else None)
        for name, t, needed in zip(Heads._fields, heads, needs, strict=True)
        if needed and t is not None
    ]


def _backward_by_vocabulary(
    heads: Heads,
    plan: Plan,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    kept: Kept | None,
    needs: Mapping[str, bool],
    into: Tensor | None,
) -> list[Tensor]:
    acc, dtype = accumulator(heads.hidden.dtype), heads.hidden.dtype
    tiles, fields = plan.tiles, heads._asdict()
    of_columns = [n for n in ("weight", "bias", "lora_b") if needs[n]]
    grads = {n: torch.empty_like(fields[n]) for n in of_columns if n != "weight" or into is None}
    grad_hidden = torch.zeros_like(heads.hidden, dtype=acc) if needs["hidden"] else None
    for i, (lo, hi) in enumerate(blocks(heads.weight.shape[0], plan.vocab_block)):
        part, first = heads.columns(lo, hi), plan.shard.first + lo
        mine = None if kept is None or hi > plan.kept else kept.slice(i, lo, hi)
        g, s, rows = cotangents, stats, None
        if kept is not None and kept.shares is not None:
            rows = (kept.shares[i] > plan.skip_below).nonzero().squeeze(1)
            part, mine = part.pick(rows), None if mine is None else mine.pick(rows)
            g, s = ({n: t[rows] for n, t in of.items()} for of in (g, s))
        c = tiles.coefficients(part, plan.link, s, g, first, plan.shard.vocab_size, mine)
        if grad_hidden is not None:
            part.add_gradient_(grad_hidden, c, rows)
        for name, states in (("weight", part.states), ("lora_b", part.low)):
            if not needs[name]:
                continue
            c_half = c.to(dtype) if c.is_cuda else c
            if name == "weight" and into is not None:
                if into.dtype == acc:
                    add_matmul_(into[lo:hi], c.T, states)
                else:
                    into[lo:hi] = matmul(c_half.T, states).add_(into[lo:hi])
            elif c.dtype == dtype:
                torch.mm(c.T, states, out=grads[name][lo:hi])
            else:
                grads[name][lo:hi] = matmul(c_half.T, states)
        if "bias" in grads:
            grads["bias"][lo:hi] = c.sum(dim=0, dtype=acc)
    if grad_hidden is not None:
        grads["hidden"] = grad_hidden
    return [grads[name] for name in Heads._fields if name in grads]


@register_flop_formula(torch.ops.fastpo.linear_stats)
def forward_flop(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOP of the forward operator's products; what `skip_below` saves is not known."""
    plan = Plan(*shapes[_TENSORS:])
    grads = len(plan.grads) if plan.schedule == "frozen" else 0
    return _flop(shapes, policy=1 + grads, reference=1)


@register_flop_formula(torch.ops.fastpo.linear_stats_backward)
def backward_flop(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOP of the backward operator's products."""
    plan, needs = Plan(*shapes[_TENSORS:-3]), dict(zip(Heads._fields, shapes[-1], strict=True))
    vocab_size = shapes[1][0]
    again = 1 - plan.kept / vocab_size
    return _flop(shapes, policy=again + needs["hidden"] + needs["weight"], reference=again)


def _flop(shapes: Any, *, policy: float, reference: float) -> int:
    """2 N V D for each product of either head; `shapes` are those of the fields of `Heads`."""
    (n, width), (vocab_size, _), ref_hidden = shapes[0], shapes[1], shapes[4]
    total = policy * width + (0 if ref_hidden is None else reference * ref_hidden[1])
    return round(2 * n * vocab_size * total)


class LinearStats(torch.autograd.Function):
    """Token statistics of a head as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        leaf: Tensor | None,  # whose `grad` takes the weight's gradient in, if it has one
        into: Tensor | None,  # or this does
        *tensors: Tensor | None,  # the fields of Heads
    ) -> tuple[Tensor, ...]:
        heads = Heads(*tensors)  # pyright: ignore[reportArgumentType]
        ctx.plan, ctx.dtype = plan, heads.hidden.dtype
        ctx.leaf, ctx.into = leaf, into
        if plan.tokens:
            heads = heads.gathered(plan.shard)
        outputs = torch.ops.fastpo.linear_stats(*heads, *plan)
        found = dict(zip(plan.found, outputs, strict=False))
        if plan.late:
            ctx.save_for_backward(*heads, *outputs)
        elif plan.schedule == "frozen":
            ctx.save_for_backward(*outputs[len(found) :])
        stats = {name: plan.shard.own(found[name]) for name in plan.want}
        ctx.mark_non_differentiable(*(stats[n] for n in plan.want if n not in plan.grads))
        return tuple(stats[name] for name in plan.want)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        given = dict(zip(plan.want, cotangents, strict=True))
        g = [plan.shard.gather(given[name]) for name in plan.grads]
        saved, found = ctx.saved_tensors, {}
        if plan.late:
            needed = ctx.needs_input_grad[3:]
            arguments = (*saved[:_TENSORS], *plan, list(saved[_TENSORS:]), g, list(needed))
            names = [n for n, needs in zip(Heads._fields, needed, strict=True) if needs]
            into = ctx.into if ctx.leaf is None else ctx.leaf.grad
            if into is None:
                grads = torch.ops.fastpo.linear_stats_backward(*arguments)
            else:
                grads = linear_stats_backward(*arguments, into=into[: sum(plan.rows)])
                names = [n for n in names if n != "weight"]
            found = dict(zip(names, grads, strict=True))
        else:
            rows = [g_t[:, None] * r for g_t, r in zip(g, saved, strict=True)]
            found["hidden"] = functools.reduce(torch.add, rows)
        if "hidden" in found:
            found["hidden"] = plan.shard.sum_gradient(found["hidden"]).to(ctx.dtype)
        return (None, None, None, *(found.get(name) for name in Heads._fields))
