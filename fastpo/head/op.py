r"""The head as two registered operators, and the differentiable function on top of them.

`fastpo::linear_stats` walks the vocabulary forward, `fastpo::linear_stats_backward` walks it again
where the schedule has something left to do. Both are opaque to `torch.compile`, which sees their
shapes, and tell `torch.utils.flop_counter` how many FLOP their products take. Their arguments are
tensors, numbers and words: the fields of `fastpo.head.types.Heads`, then those of `Plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastpo.head.backend import Tiles
from fastpo.head.torch_backend import TorchTiles, p_alone
from fastpo.head.triton_backend import TritonTiles
from fastpo.head.types import NOTHING_KEPT, OF_REFERENCE, Heads, Kept, Link, accumulator, blocks
from fastpo.head.vocab_parallel import Shard

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
    late_rows: int
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

    def tiles(self, device: torch.device) -> Tiles:
        if self.backend == "torch":
            return TorchTiles(self.shard, self.skip_below, device.type)
        return TritonTiles()

    @property
    def late(self) -> bool:
        """Whether the backward pass walks the vocabulary."""
        return self.schedule in ("kept", "recompute")

    @property
    def of_reference(self) -> bool:
        """Whether a second head's logits are formed too."""
        return any(name in OF_REFERENCE for name in self.want)

    @property
    def spends(self) -> bool:
        """Whether coefficients can take the place of the products that were kept for them."""
        return self.backend == "triton" and self.schedule == "kept" and not self.of_reference

    @property
    def found(self) -> tuple[str, ...]:
        """The statistics of the forward operator: those wanted, and what `coefficients` takes."""
        if not self.late:
            return tuple(self.want)
        needed = (*self.want, "lse", "lse_rest", "logps")
        if self.of_reference:
            needed += ("ref_lse", "ref_lse_rest", "ref_logps")
        if "jsd" in self.grads:
            needed += ("kl_policy_mix",)
        return tuple(dict.fromkeys(needed))


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias, Tensor? temperatures, Tensor? lora_b, "
    "str[] want, str[] grads, float? softcap, float logit_scale, float temperature, "
    "float jsd_beta, float skip_below, str backend, str schedule, SymInt row_block, "
    "SymInt vocab_block, SymInt late_rows, SymInt kept, str? group, SymInt rank, SymInt[] rows, "
    "SymInt[] tokens"
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
        stats, buffers = plan.tiles(heads.hidden.device).forward(
            heads, plan.link, plan.found, grads, plan.row_block, plan.vocab_block, keep
        )
    waiting = _flat(keep, heads.hidden) if plan.late else []
    return [stats[n] for n in plan.found] + buffers + waiting


torch.library.impl("fastpo::linear_stats", "CompositeExplicitAutograd", linear_stats)


@torch.library.register_fake("fastpo::linear_stats")
def _(*args: Any) -> list[Tensor]:
    heads, plan = Heads(*args[:_TENSORS]), Plan(*args[_TENSORS:])
    acc = accumulator(heads.hidden.dtype)
    stats = [heads.labels.new_empty(heads.labels.shape, dtype=acc) for _ in plan.found]
    frozen = plan.schedule == "frozen"
    buffers = [torch.empty_like(heads.hidden, dtype=acc) for _ in plan.grads if frozen]
    waiting = _flat(_to_keep(heads, plan), heads.hidden) if plan.late else []
    return stats + buffers + waiting


def _to_keep(heads: Heads, plan: Plan) -> Kept:
    """Room for what waits for the backward pass."""
    if not plan.late:
        return NOTHING_KEPT
    n, vocab_size = heads.labels.shape[0], heads.weight.shape[0]
    # The plan is one for all ranks, whose rows may be fewer.
    columns = min(plan.kept, vocab_size)

    def room(*shape: int) -> Tensor:
        return heads.hidden.new_empty(shape, dtype=accumulator(heads.hidden.dtype))

    shares = room(-(-vocab_size // plan.vocab_block), n) if plan.skip_below else None
    if not columns:
        return Kept(shares=shares)
    if plan.backend == "torch" and p_alone(heads, plan.link, plan.grads):
        slices = tuple(room(n, hi - lo) for lo, hi in blocks(columns, plan.vocab_block))
        return Kept(shifts=room(len(slices), n), shares=shares, exponentials=slices)
    ref_logits = None if heads.ref_hidden is None else room(n, columns)
    return Kept(room(n, columns), ref_logits, shares=shares)


def _flat(kept: Kept, like: Tensor) -> list[Tensor]:
    """`kept` as an operator's list, which has no None: an empty vector stands for it."""
    return [like.new_empty(0) if t is None else t for t in kept[:-1]] + list(kept.exponentials)


def _from_flat(tensors: list[Tensor]) -> Kept:
    """The inverse of `_flat`."""
    fixed = len(Kept._fields) - 1
    logits, ref_logits, shifts, shares = (t if t.dim() > 1 else None for t in tensors[:fixed])
    return Kept(logits, ref_logits, shifts, shares, tuple(tensors[fixed:]))


def linear_stats_backward(
    *args: Any, into: Tensor | None = None, spend: bool = False
) -> list[Tensor]:
    """The gradients of the fields of `Heads` that are needed, one vocabulary slice after another.

    That of the hidden states stays in the accumulator. Two things are more than an operator may
    do: that of the weight is added to `into` and not returned if there is one, and where `spend`
    is set coefficients are written over the products that were kept.
    """
    saved, cotangents, needs = args[-3:]
    heads, plan = Heads(*args[:_TENSORS]), Plan(*args[_TENSORS:-3])
    stats = dict(zip(plan.found, saved, strict=False))
    with torch.autocast(heads.hidden.device.type, enabled=False):
        return _backward_by_vocabulary(
            heads,
            plan,
            stats,
            dict(zip(plan.grads, cotangents, strict=True)),
            _from_flat(saved[len(plan.found) :]),
            dict(zip(Heads._fields, needs, strict=True)),
            into,
            spend,
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
    kept: Kept,
    needs: Mapping[str, bool],
    into: Tensor | None,
    spend: bool,
) -> list[Tensor]:
    """`linear_stats_backward` with its arguments sorted."""
    tiles, shard, fields = plan.tiles(heads.hidden.device), plan.shard, heads._asdict()
    acc = accumulator(heads.hidden.dtype)
    adds = {n: n == "weight" and into is not None for n in ("weight", "bias", "lora_b") if needs[n]}
    grads = {n: torch.empty_like(fields[n]) for n, add in adds.items() if not add}
    targets = grads if into is None else {**grads, "weight": into}
    targets = {n: targets[n] for n in adds}
    if needs["hidden"]:
        # Rows of skipped slices are added to; all others are first put.
        room = torch.empty_like if kept.shares is None else torch.zeros_like
        grads["hidden"] = room(heads.hidden, dtype=acc)
    whole = None
    if spend:
        given = stats, cotangents, shard.first, shard.vocab_size
        whole = tiles.coefficients(heads, plan.link, *given, kept.whole(), spend=True)
        if needs["hidden"]:
            whole.put_hidden_(grads["hidden"], heads, add=False)
    for i, (lo, hi) in enumerate(blocks(heads.weight.shape[0], plan.vocab_block)):
        columns, mine = heads.columns(lo, hi), kept.slice(i, lo, hi)
        # Summed over the row blocks, and rounded once.
        sums = {
            n: t[lo:hi] if t.dtype == acc else torch.empty_like(t[lo:hi], dtype=acc)
            for n, t in targets.items()
        }
        for first, last in blocks(heads.labels.shape[0], plan.late_rows):
            index, rows = slice(first, last), None
            if kept.shares is not None:
                index = rows = (kept.shares[i] > plan.skip_below).nonzero().squeeze(1)
            part = columns.pick(index)
            if whole is None:
                g, s = ({n: t[index] for n, t in of.items()} for of in (cotangents, stats))
                of_part = None if mine is None else mine.rows(index)
                at = shard.first + lo, shard.vocab_size
                c = tiles.coefficients(part, plan.link, s, g, *at, of_part)
                if needs["hidden"]:
                    add = lo > 0 or rows is not None
                    c.put_hidden_(grads["hidden"][first:last], part, rows, add=add)
            else:
                c = whole.columns(lo, hi)
            for name, states in (("weight", part.states), ("lora_b", part.low)):
                if needs[name]:
                    in_place = adds[name] and sums[name].dtype == targets[name].dtype
                    c.put_columns_(sums[name], states, add=in_place or first > 0)
            if needs["bias"]:
                c.put_sums_(sums["bias"], add=first > 0)
        for name, total in sums.items():
            if total.dtype != targets[name].dtype:
                target = targets[name][lo:hi]
                target.copy_(total.add_(target) if adds[name] else total)
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
        ctx.leaf, ctx.into, ctx.spent = leaf, into, False
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
            waiting = list(saved[_TENSORS:])
            spend = plan.spends and not torch.compiler.is_compiling()
            if ctx.spent:
                # A graph that is walked again: the kept products are gone, and are recomputed.
                waiting[len(plan.found)], spend = saved[0].new_empty(0), False
            ctx.spent = ctx.spent or spend
            arguments = (*saved[:_TENSORS], *plan, waiting, g, list(needed))
            names = [n for n, needs in zip(Heads._fields, needed, strict=True) if needs]
            into = ctx.into if ctx.leaf is None else ctx.leaf.grad
            if into is None and not spend:
                grads = torch.ops.fastpo.linear_stats_backward(*arguments)
            else:
                real = None if into is None else into[: sum(plan.rows)]
                grads = linear_stats_backward(*arguments, into=real, spend=spend)
                names = names if into is None else [n for n in names if n != "weight"]
            found = dict(zip(names, grads, strict=True))
        else:
            rows = [g_t[:, None] * r for g_t, r in zip(g, saved, strict=True)]
            found["hidden"] = functools.reduce(torch.add, rows)
        if "hidden" in found:
            found["hidden"] = plan.shard.sum_gradient(found["hidden"]).to(ctx.dtype)
        return (None, None, None, *(found.get(name) for name in Heads._fields))
