"""Count what a batch has, and average its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.objectives.base import DIVISORS


class LossOutput(NamedTuple):
    """Hold what a preference loss returns for G groups of at most K candidates."""

    loss: Tensor  # scalar, to call backward on
    losses: Tensor  # [G], detached; their mean is `loss` unless totals were passed
    rewards: Tensor  # [G, K], detached implicit rewards
    metrics: dict[str, Tensor]  # name -> mean, NaN where there was nothing to average
    counts: dict[str, Tensor]  # name -> number of observations behind that mean


def batch_counts(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the terms of a loss are divided by, counted over one batch."""
    gold_length = scores.get("gold_length", scores["length"].new_zeros(()))
    scores = {**scores, "gold_length": gold_length}
    return {per: count(scores) for per, count in DIVISORS.items()}


def at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def weight_metrics(name: str, weights: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (sum, count) of the share of zeros and of |weight| in weights [N]; {} of None."""
    if weights is None:
        return {}
    weights = weights.detach().float()
    count = weights.new_full((), weights.numel())
    zeros, total = (weights == 0).sum(), weights.abs().sum()
    return {f"{name}/zeros": (zeros, count), f"{name}/mean_abs": (total, count)}


def reward_metrics(
    rewards: Tensor, scores: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (sum, count) by TRL's metric names; lists compare desirable with undesirable."""
    mask, good = scores["mask"], scores["label"]
    bad = mask & ~good
    better = good[:, :, None] & bad[:, None, :]  # [G, K, K]
    margin = rewards[:, :, None] - rewards[:, None, :]
    pairs = better.sum(dim=(1, 2))
    both = (pairs > 0).to(rewards.dtype)
    per_group = pairs.clamp(min=1)

    def mean_over_groups(values: Tensor) -> tuple[Tensor, Tensor]:
        per = torch.where(better, values, 0).sum(dim=(1, 2)) / per_group
        return per.sum(), both.sum()

    def over(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(where, values, 0).sum(), where.sum()

    logps = scores["logps"].detach()
    from_reference: dict[str, tuple[Tensor, Tensor]] = {}
    for name, score in (("drift", "ratio"), ("kl", "kl_estimate")):
        if score in scores:
            from_reference[f"{name}/chosen"] = over(scores[score].detach(), good)
            from_reference[f"{name}/rejected"] = over(scores[score].detach(), bad)
    return {
        "rewards/chosen": over(rewards, good),
        "rewards/rejected": over(rewards, bad),
        "rewards/margins": mean_over_groups(margin),
        "rewards/accuracies": mean_over_groups((margin > 0).to(rewards.dtype)),
        "logps/chosen": over(logps, good),
        "logps/rejected": over(logps, bad),
        **from_reference,
    }


def merged(outputs: list[LossOutput]) -> LossOutput:
    """Merge the outputs of several parts of a batch. Only `outputs[0].loss` carries gradients."""
    groups = sum(len(out.losses) for out in outputs)
    counts = {n: sum((o.counts[n] for o in outputs), torch.zeros(())) for n in outputs[0].counts}
    metrics = {
        # A mean of nothing is NaN.
        name: sum((o.metrics[name] * o.counts[name]).nan_to_num() for o in outputs) / count
        for name, count in counts.items()
    }
    return LossOutput(
        outputs[0].loss,
        torch.cat([out.losses * (groups / len(out.losses)) for out in outputs]),
        torch.cat([out.rewards for out in outputs]),
        metrics,
        counts,
    )
