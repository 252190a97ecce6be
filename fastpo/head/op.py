r"""The head as two registered operators, and the differentiable function on top of them.

`fastpo::linear_stats` goes through the vocabulary forward, `fastpo::linear_stats_backward` again
where the schedule has something left to do. Both are opaque to `torch.compile`, which sees their
shapes, and tell `torch.utils.flop_counter` how many FLOP their matmuls take. Their arguments are
the fields of `PassTensors`, then those of `PassOptions`, then those of `BackwardInputs`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastpo.head.select import BACKENDS
from fastpo.head.types import Kept, PassOptions, PassTensors, accumulator, chunks

_WORDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    Sequence[str]: "str[]",
    Sequence[int]: "SymInt[]",
    Sequence[bool]: "bool[]",
    str: "str",
    str | None: "str?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
}
# Exported programs hold the operators' arguments by name: fields that have better ones today.
_EXPORTED_AS = {
    "targets": "labels",
    "chunk_tokens": "row_block",
    "chunk_columns": "vocab_block",
    "late_tokens": "late_rows",
}


class BackwardInputs(NamedTuple):
    """Hold what the backward operator takes beside the forward operator's arguments."""

    saved: Sequence[Tensor]  # the forward operator's results
    cotangents: Sequence[Tensor]  # of `PassOptions.grads`
    needs: Sequence[bool]  # which fields of `PassTensors` require a gradient


def schema_of(*kinds: Any) -> str:
    """Return an operator's arguments: the fields of the types, by their hints."""
    hints = [hint for kind in kinds for hint in get_type_hints(kind).items()]
    return ", ".join(f"{_WORDS[hint]} {_EXPORTED_AS.get(name, name)}" for name, hint in hints)


def take(arguments: Iterable[Any], *kinds: Any) -> tuple[Any, ...]:
    """Return an operator's arguments as the objects whose fields they are."""
    values = iter(arguments)
    return tuple(kind(*islice(values, len(kind._fields))) for kind in kinds)


_FORWARD = PassTensors, PassOptions
_BACKWARD = PassTensors, PassOptions, BackwardInputs
torch.library.define("fastpo::linear_stats", f"({schema_of(*_FORWARD)}) -> Tensor[]")
torch.library.define("fastpo::linear_stats_backward", f"({schema_of(*_BACKWARD)}) -> Tensor[]")


def linear_stats(*args: Any) -> list[Tensor]:
    """Return `PassOptions.statistics`, then early gradients or the fields of `Kept`."""
    tensors, options = take(args, *_FORWARD)
    keep = _room(tensors, options)
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        stats, gradients = BACKENDS[options.backend].forward(tensors, options, keep)
    waiting = keep.flat(tensors.hidden) if options.late else []
    return [stats[name] for name in options.statistics] + gradients + waiting


torch.library.impl("fastpo::linear_stats", "CompositeExplicitAutograd", linear_stats)


@torch.library.register_fake("fastpo::linear_stats")
def _(*args: Any) -> list[Tensor]:
    tensors, options = take(args, *_FORWARD)
    acc = accumulator(tensors.hidden.dtype)
    stats = [
        tensors.targets.new_empty(tensors.targets.shape, dtype=acc) for _ in options.statistics
    ]
    gradients = [torch.empty_like(tensors.hidden, dtype=acc) for _ in options.early_grads]
    waiting = _room(tensors, options).flat(tensors.hidden) if options.late else []
    return stats + gradients + waiting


def _room(tensors: PassTensors, options: PassOptions) -> Kept:
    """Return room for what waits for the backward pass."""
    exponentials = BACKENDS[options.backend].keeps_exponentials(tensors, options)
    return Kept.room(tensors, options, exponentials=exponentials)


def linear_stats_backward(
    *args: Any, into: Tensor | None = None, spend: bool = False
) -> list[Tensor]:
    """Return the gradients of the fields of `PassTensors` that are needed.

    That of the hidden states stays in the accumulator's dtype. Two things are more than an operator
    may do. The weight's is added to `into` and not returned if there is one. Where `spend` is set
    coefficients are written over the products that were kept.
    """
    tensors, options, inputs = take(args, *_BACKWARD)
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        return _backward_by_vocabulary(tensors, options, inputs, into, spend)


torch.library.impl(
    "fastpo::linear_stats_backward", "CompositeExplicitAutograd", linear_stats_backward
)


@torch.library.register_fake("fastpo::linear_stats_backward")
def _(*args: Any) -> list[Tensor]:
    tensors, _, inputs = take(args, *_BACKWARD)
    wide = accumulator(tensors.hidden.dtype)
    return [
        torch.empty_like(t, dtype=wide if name == "hidden" else None)
        for name, t, needed in zip(PassTensors._fields, tensors, inputs.needs, strict=True)
        if needed and t is not None
    ]


def _backward_by_vocabulary(
    tensors: PassTensors,
    options: PassOptions,
    inputs: BackwardInputs,
    into: Tensor | None,
    spend: bool,
) -> list[Tensor]:
    """Go through the vocabulary; each chunk of the head's gradients is rounded once."""
    backend, first_column = BACKENDS[options.backend], options.shard.first
    stats = dict(zip(options.statistics, inputs.saved, strict=False))
    cotangents = dict(zip(options.grads, inputs.cotangents, strict=True))
    kept = Kept.from_flat(inputs.saved[len(stats) :])
    needs = dict(zip(PassTensors._fields, inputs.needs, strict=True))
    acc, fields = accumulator(tensors.hidden.dtype), tensors._asdict()
    adds = {n: n == "weight" and into is not None for n in ("weight", "bias", "lora_b") if needs[n]}
    grads = {n: torch.empty_like(fields[n]) for n, add in adds.items() if not add}
    outputs = grads if into is None else {**grads, "weight": into}
    outputs = {n: outputs[n] for n in adds}
    if needs["hidden"]:
        # Tokens of skipped chunks are added to; all others are first put.
        empty = torch.empty_like if kept.shares is None else torch.zeros_like
        grads["hidden"] = empty(tensors.hidden, dtype=acc)
    whole = None
    if spend:
        whole = backend.coefficients(
            tensors, options, stats, cotangents, first_column, kept.whole(), spend=True
        )
        if needs["hidden"]:
            whole.put_hidden_(grads["hidden"], tensors, add=False)
    for i, (lo, hi) in enumerate(chunks(tensors.weight.shape[0], options.chunk_columns)):
        columns, kept_columns = tensors.columns(lo, hi), kept.chunk(i, lo, hi)
        # Summed over the chunks of tokens, and rounded once.
        sums = {
            n: t[lo:hi] if t.dtype == acc else torch.empty_like(t[lo:hi], dtype=acc)
            for n, t in outputs.items()
        }
        for first, last in chunks(tensors.targets.shape[0], options.late_tokens):
            index, picked = slice(first, last), None
            if kept.shares is not None:
                index = picked = (kept.shares[i] > options.skip_below).nonzero().squeeze(1)
            part = columns.pick(index)
            if whole is None:
                c = backend.coefficients(
                    part,
                    options,
                    {n: t[index] for n, t in stats.items()},
                    {n: t[index] for n, t in cotangents.items()},
                    first_column + lo,
                    None if kept_columns is None else kept_columns.pick(index),
                )
                if needs["hidden"]:
                    add = lo > 0 or picked is not None
                    c.put_hidden_(grads["hidden"][first:last], part, picked, add=add)
            else:
                c = whole.columns(lo, hi)
            for name, states in (("weight", part.states), ("lora_b", part.low)):
                if needs[name]:
                    in_place = adds[name] and sums[name].dtype == outputs[name].dtype
                    c.put_columns_(sums[name], states, add=in_place or first > 0)
            if needs["bias"]:
                c.put_sums_(sums["bias"], add=first > 0)
        for name, total in sums.items():
            if total.dtype != outputs[name].dtype:
                out = outputs[name][lo:hi]
                out.copy_(total.add_(out) if adds[name] else total)
    return [grads[name] for name in PassTensors._fields if name in grads]


@register_flop_formula(torch.ops.fastpo.linear_stats)
def forward_flop(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Return the FLOP of the forward operator's matmuls; what `skip_below` saves is not known."""
    tensors, options = take(shapes, *_FORWARD)
    return _flop(tensors, policy=1 + len(options.early_grads), reference=1)


@register_flop_formula(torch.ops.fastpo.linear_stats_backward)
def backward_flop(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Return the FLOP of the backward operator's matmuls."""
    tensors, options, inputs = take(shapes, *_BACKWARD)
    needs = dict(zip(PassTensors._fields, inputs.needs, strict=True))
    again = 1 - options.kept / tensors.weight[0]
    return _flop(tensors, policy=again + needs["hidden"] + needs["weight"], reference=again)


def _flop(shapes: Any, *, policy: float, reference: float) -> int:
    """Return 2 N V D for each matmul of either head; the fields of `shapes` are shapes."""
    (n, width), (vocab_size, _), ref_hidden = shapes.hidden, shapes.weight, shapes.ref_hidden
    total = policy * width + (0 if ref_hidden is None else reference * ref_hidden[1])
    return round(2 * n * vocab_size * total)


class LinearStats(torch.autograd.Function):
    """Compute token statistics of a head as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        options: PassOptions,
        leaf: Tensor | None,  # whose `grad` takes the weight's gradient in, if it has one
        into: Tensor | None,  # or this does
        *fields: Tensor | None,  # of PassTensors
    ) -> tuple[Tensor, ...]:
        tensors = PassTensors(*fields)  # pyright: ignore[reportArgumentType]
        ctx.options, ctx.dtype = options, tensors.hidden.dtype
        ctx.leaf, ctx.into, ctx.spent = leaf, into, False
        if options.tokens:
            tensors = tensors.gathered(options.shard)
        outputs = torch.ops.fastpo.linear_stats(*tensors, *options)
        stats = dict(zip(options.statistics, outputs, strict=False))
        if options.late:
            ctx.save_for_backward(*tensors, *outputs)
        elif options.schedule == "frozen":
            ctx.save_for_backward(*outputs[len(stats) :])
        wanted = {name: options.shard.own(stats[name]) for name in options.want}
        ctx.mark_non_differentiable(*(t for n, t in wanted.items() if n not in options.grads))
        return tuple(wanted[name] for name in options.want)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        options: PassOptions = ctx.options
        of_wanted = dict(zip(options.want, cotangents, strict=True))
        g = [options.shard.gather(of_wanted[name]) for name in options.grads]
        if options.late:
            grads = _late_gradients(ctx, g)
        else:
            terms = [g_t[:, None] * r for g_t, r in zip(g, ctx.saved_tensors, strict=True)]
            grads = {"hidden": functools.reduce(torch.add, terms)}
        if "hidden" in grads:
            grads["hidden"] = options.shard.sum_gradient(grads["hidden"]).to(ctx.dtype)
        return (None, None, None, *(grads.get(name) for name in PassTensors._fields))


def _late_gradients(ctx: Any, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the fields of `PassTensors` by the backward operator."""
    options: PassOptions = ctx.options
    needs = list(ctx.needs_input_grad[3:])
    saved = list(ctx.saved_tensors[len(needs) :])
    spend = options.spends and not torch.compiler.is_compiling()
    if ctx.spent:
        # A graph that is gone through again: the kept products are gone, and are recomputed.
        saved[len(options.statistics)], spend = saved[0].new_empty(0), False
    ctx.spent = ctx.spent or spend
    inputs = BackwardInputs(saved, cotangents, needs)
    arguments = (*ctx.saved_tensors[: len(needs)], *options, *inputs)
    names = [n for n, needed in zip(PassTensors._fields, needs, strict=True) if needed]
    into = ctx.into if ctx.leaf is None else ctx.leaf.grad
    if into is None and not spend:
        grads = torch.ops.fastpo.linear_stats_backward(*arguments)
    else:
        real = None if into is None else into[: sum(options.rows)]
        grads = linear_stats_backward(*arguments, into=real, spend=spend)
        names = names if into is None else [n for n in names if n != "weight"]
    return dict(zip(names, grads, strict=True))
