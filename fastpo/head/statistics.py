"""Token statistics of one head from typed arguments: what is asked, checked, cut and computed."""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.head.op import LinearStats
from fastpo.head.schedule import Workload
from fastpo.head.scored import ScoredTokens, scored_tokens
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions, HeadSpec
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.head.types import (
    DIFFERENTIABLE,
    STATISTICS,
    PassOptions,
    PassTensors,
    accumulator,
    needs_reference,
)
from fastpo.head.vocab_parallel import Shard, is_cut, own_rows, whole

log = logging.getLogger(__name__)

TokenStats: TypeAlias = dict[str, Tensor]

_logged: set[str] = set()


def token_statistics(
    hidden: Tensor,
    head: HeadTensors,
    targets: Tensor,
    *,
    want: tuple[str, ...],
    grad: tuple[str, ...] | None = None,
    reference: ReferenceStates | None = None,
    spec: HeadSpec = HeadSpec(),
    options: HeadOptions = HeadOptions(),
    accumulate_grad: bool | Tensor = False,
    all_scored: bool = False,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    same_tokens: bool | None = None,
    temperatures: Tensor | None = None,
) -> TokenStats:
    """Return the statistics `want` of N tokens; `linear_stats` explains what is not below.

    Args:
        hidden, targets: [N, D], and [N] integers.
        head: a policy's head, or this rank's vocabulary rows of it.
        reference: read only where a statistic compares with it.
        all_scored: promise that every target lies in the vocabulary: nothing is looked for or
            copied, and the host does not wait for the device.
        temperatures: [N] divisors of the tokens' logits, instead of `spec.temperature`.

    Returns:
        name -> [N] in the accumulator's dtype, 0 where the target is `ignore_index`.

    Raises:
        ValueError: as `linear_stats`.
    """
    asked = _Asked.of(want, grad, reference is not None, spec, options)
    _check_tokens(hidden, head, targets, temperatures)
    if not asked.with_reference:
        reference = None
    own = own_rows(
        head,
        None if reference is None else reference.head,
        group=group,
        same_tokens=same_tokens,
        vocab_size=spec.vocab_size,
    )
    leaf, into = _where_to_add(accumulate_grad, head.weight, own.shard)
    scored = ScoredTokens()
    if not all_scored:
        scored = scored_tokens(targets, ignore_index, own.shard.vocab_size)

    # From here on all tensors are those that the pass takes: scored tokens, this rank's rows.
    dtype = _dtype_of_products(hidden, own.head.weight)
    (weight, bias, lora), shard, total = own.head, own.shard, len(targets)
    hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.long()
    ref_hidden = ref_weight = ref_bias = lora_b = None
    if reference is not None:
        ref_weight, ref_bias = (weight, bias) if own.reference is None else own.reference[:2]
        _check_reference(reference.hidden, ref_weight, hidden, weight)
        ref_hidden, ref_weight = (t.detach().to(dtype) for t in (reference.hidden, ref_weight))
        ref_bias = None if ref_bias is None else ref_bias.detach()
    if temperatures is not None:
        temperatures = temperatures.detach().to(accumulator(dtype))
    if scored.ignored is not None:
        targets = targets.masked_fill(scored.ignored, 0)
    if (index := scored.positions) is not None:
        hidden, targets = hidden[index], targets[index]
        ref_hidden = None if ref_hidden is None else ref_hidden[index]
        temperatures = None if temperatures is None else temperatures[index]
    if lora is not None:
        # The delta's factor rides beside the states, so that one backward serves both.
        low = (hidden @ whole(lora.a).to(dtype).T) * lora.scaling
        hidden, lora_b = torch.cat([hidden, low], dim=1), lora.b.to(dtype)
    if shard.group is not None and not own.same_tokens:
        shard = shard.of_tokens(len(targets), hidden.device)
    tensors = PassTensors(
        hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, temperatures, lora_b
    )
    values = _compute(asked, tensors, shard, leaf, into)
    return {n: scored.spread(v, total) for n, v in zip(asked.want, values, strict=True)}


class _Asked(NamedTuple):
    """Hold what a call asks for."""

    want: tuple[str, ...]
    grad: tuple[str, ...]
    spec: HeadSpec
    options: HeadOptions

    @classmethod
    def of(
        cls,
        want: tuple[str, ...],
        grad: tuple[str, ...] | None,
        has_reference: bool,
        spec: HeadSpec,
        options: HeadOptions,
    ) -> _Asked:
        """Return the request; ValueError for statistics that cannot be meant."""
        want = tuple(want)
        grad = tuple(n for n in want if n in DIFFERENTIABLE) if grad is None else tuple(grad)
        for name in (*want, *grad):
            if name not in STATISTICS:
                raise ValueError(f"unknown statistic {name!r}: choose from {', '.join(STATISTICS)}")
        for name in grad:
            if name not in want or name not in DIFFERENTIABLE:
                raise ValueError(
                    f"grad names {name!r}, which is not a differentiable one of {want}"
                )
        asked = cls(want, grad, spec, options)
        skipping = options.skip_below > 0
        if skipping and (grad != ("logps",) or asked.with_reference):
            raise ValueError(
                f"skip_below is for the gradient of logps alone: got grad={grad} of stats={want}"
            )
        if "skipped" in want and not skipping:
            raise ValueError("nothing is skipped without skip_below")
        if asked.with_reference and not has_reference:
            raise ValueError(f"{want} needs the reference's hidden states: pass ref_hidden")
        return asked

    @property
    def with_reference(self) -> bool:
        """Return whether a statistic compares with a reference."""
        return needs_reference(self.want)


def _check_tokens(
    hidden: Tensor, head: HeadTensors, targets: Tensor, temperatures: Tensor | None
) -> None:
    """Raise ValueError for tensors that do not fit together; the host does not wait."""
    head.check()
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D]: got {tuple(hidden.shape)} and "
            f"{tuple(head.weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [{hidden.shape[0]}]: got {tuple(targets.shape)}")
    if targets.is_floating_point():
        raise ValueError(f"labels must be integers: got {targets.dtype}")
    if temperatures is not None and temperatures.shape != targets.shape:
        raise ValueError(
            f"temperature must be a number or [{targets.numel()}]: got {tuple(temperatures.shape)}"
        )


def _check_reference(
    ref_hidden: Tensor, ref_weight: Tensor, hidden: Tensor, weight: Tensor
) -> None:
    """Raise ValueError where the reference has other tokens or another vocabulary."""
    if len(ref_hidden) != len(hidden) or len(ref_weight) != len(weight):
        raise ValueError(
            f"the reference has {len(ref_hidden)} tokens and {len(ref_weight)} vocabulary rows, "
            f"the policy {len(hidden)} and {len(weight)}"
        )


def _where_to_add(
    accumulate_grad: bool | Tensor, weight: Tensor, shard: Shard
) -> tuple[Tensor | None, Tensor | None]:
    """Return (the leaf whose `grad` takes the weight's gradient in, or the tensor that does)."""
    if isinstance(accumulate_grad, Tensor):
        into = accumulate_grad
        fits = is_cut(weight) or into.shape == weight.shape
        if not (fits and into.is_floating_point()):
            raise ValueError(
                f"accumulate_grad must be {list(weight.shape)} of floating point: got "
                f"{list(into.shape)} of {into.dtype}"
            )
        return None, into
    if not accumulate_grad or torch.compiler.is_compiling():
        return None, None
    if shard.group is not None or not weight.is_leaf:
        raise ValueError("accumulate_grad needs a weight that is whole and a leaf")
    return weight, None


def _dtype_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of both factors: their own, or that of autocast."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or call under "
            "torch.autocast"
        )
    return weight.dtype


def _compute(
    asked: _Asked, tensors: PassTensors, shard: Shard, leaf: Tensor | None, into: Tensor | None
) -> list[Tensor]:
    """Return the statistics in the order of `asked.want`, by the schedule that costs least."""
    spec, options = asked.spec, asked.options
    trained = tensors.hidden, tensors.weight, tensors.bias, tensors.lora_b
    num_tokens = sum(shard.tokens) or len(tensors.targets)
    if num_tokens == 0:
        # No token is left, but the graph is: leaves get zero gradients, not None.
        anchor = torch.stack([t[:0].sum() for t in trained if t is not None]).sum()
        zeros = tensors.hidden.new_zeros(0, dtype=accumulator(tensors.hidden.dtype))
        return [zeros + anchor if n in asked.grad else zeros.clone() for n in asked.want]
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained]
    # A token's own temperature takes the place of the common one.
    temperature = spec.temperature if tensors.temperatures is None else 1.0
    work = Workload(
        num_tokens,
        max(shard.rows),
        tensors.weight.shape[1],
        tensors.hidden.dtype,
        want=asked.want,
        num_grad_stats=len(asked.grad),
        needs_hidden=needs[0],
        needs_head=any(needs[1:]),
        needs_weight=needs[1],
        with_reference=asked.with_reference,
        softcap=spec.softcap,
    )
    plain_only = "head cut over ranks" if shard.group else ""
    if options.skip_below and not plain_only:
        plain_only = "skip_below"
    device = tensors.hidden.device
    backend, schedule, why = plan_head(work, options, device=device, plain_only=plain_only)
    if options.backend == "auto" and not torch.compiler.is_compiling():
        _log_once(f"head backend {why}")
    of_pass = PassOptions(
        want=asked.want,
        grads=asked.grad,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        temperature=temperature,
        jsd_beta=options.jsd_beta,
        skip_below=options.skip_below,
        backend=backend,
        schedule=schedule.name,
        chunk_tokens=schedule.chunk_tokens,
        chunk_columns=schedule.chunk_columns,
        late_tokens=schedule.late_tokens,
        kept=schedule.kept,
        **shard._asdict(),
    )
    return LinearStats.apply(of_pass, leaf, into, *tensors)


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)
