"""Head, scores and objective as one `nn.Module`: hidden states in, preference loss out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo.head import Backend, Head, TokenStats, linear_stats
from fastpo.objectives import get_objective
from fastpo.objectives.base import Objective, Outcome
from fastpo.objectives.listwise import tie_keys
from fastpo.scores import Segments, score_responses

# How to obtain a score that an objective needs and the caller did not supply.
_REMEDY = {
    "ratio": "pass ref_logps (per label token) or ref_hidden",
    "mean_ratio": "pass ref_logps (per label token) or ref_hidden",
    "ref_logps": "pass ref_logps (per label token) or ref_hidden",
    "kl": "pass ref_hidden: the divergence needs the reference's whole distribution",
    "kl_reverse": "pass ref_hidden: the divergence needs the reference's whole distribution",
    "score": "give every response a grade: a `scores` column, or Segments(score=...)",
    "rank": "rank the responses: a `ranks` or `scores` column, or Segments(rank=...)",
}
_DIVERGENCE = {"kl": "kl_ref_policy", "kl_reverse": "kl_policy_ref"}


class LossOutput(NamedTuple):
    """What a preference loss returns for G groups of at most K candidates."""

    loss: Tensor  # scalar, to call backward on
    losses: Tensor  # [G], detached; their mean is `loss` unless global totals were given
    rewards: Tensor  # [G, K], detached implicit rewards
    metrics: dict[str, Tensor]  # name -> mean, NaN where there was nothing to average
    counts: dict[str, Tensor]  # name -> number of observations behind that mean


class Component(NamedTuple):
    """One objective of a mixture."""

    objective: Objective
    weight: float
    hyper: dict[str, Any]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(known))}"


def resolve(objective: str | Mapping[str, float], hyper: Mapping[str, Any]) -> list[Component]:
    """Name or mixture, and its hyper-parameters, as components.

    A hyper-parameter goes to every component that has one of that name; `"dpo.beta"` goes to one.

    Raises:
        ValueError: an unknown objective or hyper-parameter (with the nearest name), a weight that
            is not a finite number, an empty mixture.
    """
    mixture = {objective: 1.0} if isinstance(objective, str) else dict(objective)
    if not mixture:
        raise ValueError("the mixture of objectives is empty: name at least one")
    for name, weight in mixture.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight - weight != 0:
            raise ValueError(f"objective {name!r} has weight {weight!r}: give a finite number")
    components = [Component(get_objective(name), float(w), {}) for name, w in mixture.items()]
    known = {key for c in components for key in c.objective.hyper}
    known |= {f"{c.objective.name}.{key}" for c in components for key in c.objective.hyper}
    # "dpo.beta" after "beta", so that the particular overrides the general.
    for key in sorted(hyper, key=lambda k: "." in k):
        if key not in known:
            raise ValueError(
                f"{' + '.join(mixture)} has no hyper-parameter {key!r}: "
                f"{_nearest(key, sorted(known))}"
            )
        owner, _, name = key.rpartition(".")
        for component in components:
            if name in component.objective.hyper and owner in ("", component.objective.name):
                component.hyper[name] = hyper[key]
    return components


class PreferenceLoss(nn.Module):
    r"""Preference loss on hidden states; the logits are never built.

    Args:
        objective: a name of `fastpo.OBJECTIVES`, or a mixture `{"dpo": 0.8, "sft": 1.0}`.
        head: the language model's head (`Head`, or a plain `nn.Linear`); None if every call
            passes `weight`. It is not registered: its parameters stay the model's.
        **hyper: hyper-parameters of the objective; see `fastpo objectives NAME`.

    Attributes:
        seed, step: keys of the random order of tied candidates (LiPO); a training loop that wants
            a new draw each step sets `step`.

    Raises:
        ValueError: an unknown objective or hyper-parameter, with the nearest name.

    The padded layout, two pairs (rows 0-1 chosen, 2-3 rejected), as TRL and Liger users have it:

    >>> head = nn.Linear(8, 16, bias=False)
    >>> loss = PreferenceLoss("simpo", head, beta=2.0)
    >>> hidden, labels = torch.randn(4, 5, 8), torch.randint(0, 16, (4, 5))
    >>> labels[:, 0] = -100  # prompt positions
    >>> out = loss(hidden, labels)
    >>> out.loss.backward()
    >>> out.rewards.shape, sorted(out.metrics)[-1]
    (torch.Size([2, 2]), 'rewards/rejected')
    """

    def __init__(
        self,
        objective: str | Mapping[str, float],
        head: Head | nn.Linear | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.components = resolve(objective, hyper)
        self.seed = self.step = 0
        # In a tuple, so that nn.Module does not adopt the model's head as its own child.
        self._head = (Head(head) if isinstance(head, nn.Module) else head,)
        for name in self._running:
            self.register_buffer(name, torch.zeros(2, dtype=torch.float64))  # mean, count

    @property
    def head(self) -> Head | None:
        """The head given at construction."""
        return self._head[0]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores that the components take, statistics excluded."""
        return frozenset(
            name
            for c in self.components
            for name in c.objective.needs
            if name not in c.objective.statistics
        )

    @property
    def needs_kl(self) -> bool:
        """Whether the reference's whole distribution is needed."""
        return any(name in self.needs for name in _DIVERGENCE)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model, or its log-probs, are needed."""
        return self.needs_kl or any("ratio" in n or "ref_logps" in n for n in self.needs)

    @property
    def extras(self) -> tuple[str, ...]:
        """Roles of the extra responses that are needed, such as `mismatched` for KTO."""
        roles = {role for c in self.components for role in c.objective.extras}
        return tuple(sorted(roles))

    @property
    def _running(self) -> list[str]:
        """Buffer names of the statistics that are averaged over all training steps."""
        return [
            f"{c.objective.name}_{name}"
            for c in self.components
            for name, statistic in c.objective.statistics.items()
            if statistic.running
        ]

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Segments | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        token_weights: Tensor | None = None,
        totals: Mapping[str, float] | None = None,
        ignore_index: int = -100,
        backend: Backend = "auto",
        workspace_mib: float = 256,
    ) -> LossOutput:
        """Loss, per-group losses, implicit rewards and metrics of one batch.

        Args:
            hidden: [N, D] states of the label tokens, or [2B, T, D], B chosen rows then the B
                rejected ones. `hidden[i]` predicts `labels[i]`: labels are already shifted.
            labels: [N] or [2B, T]; `ignore_index` marks prompt and padding.
            segments: token -> response -> group table of the [N] form; None for the padded form.
            weight, bias: the head's tensors, by default the head's own.
            ref_hidden: the reference's hidden states, same shape as `hidden`; with `ref_weight`
                (and `ref_bias`) where the policy's head is trained.
            ref_logps: per-token reference log-probs, same shape as `labels`.
            token_weights: per-token weights, same shape as `labels`.
            totals: counts of the whole optimiser step over all ranks (`groups`, `responses`,
                `desirable`, `undesirable`, `chosen_tokens`) that sums are divided by; None for
                this batch's own.

        Raises:
            ValueError: a score that an objective needs is missing (says how to get it), or the
                groups do not have the number of candidates that it compares.
        """
        if segments is None:
            if hidden.dim() != 3 or hidden.shape[0] % 2 or labels.shape != hidden.shape[:2]:
                raise ValueError(
                    "without segments hidden must be [2B, T, D], chosen rows then rejected rows, "
                    f"and labels [2B, T]: got {tuple(hidden.shape)} and {tuple(labels.shape)}"
                )
            pairs, length = hidden.shape[0] // 2, hidden.shape[1]
            segments = Segments.pairs(pairs, length, device=labels.device)
        if weight is None:
            if self.head is None:
                raise ValueError("no head: pass weight=, or head= to PreferenceLoss")
            weight, bias = self.head.weight, self.head.bias

        # Everything per token is cut down to the scored tokens once, here.
        scored = (labels.flatten() != ignore_index).nonzero().squeeze(1)
        segments = replace(segments, response=segments.response[scored])
        hidden, labels = hidden.flatten(0, -2)[scored], labels.flatten()[scored]
        if ref_hidden is not None:
            ref_hidden = ref_hidden.flatten(0, -2)[scored]
        if ref_logps is not None:
            ref_logps = ref_logps.flatten()[scored]
        if token_weights is not None:
            token_weights = token_weights.flatten()[scored]
        self._check_groups(segments)

        options: dict[str, Any] = {"backend": backend, "workspace_mib": workspace_mib}
        options |= self.head.facts() if self.head is not None else {}
        reference = ref_hidden, ref_weight, ref_bias
        stats = self._token_stats(hidden, weight, bias, labels, reference, options)
        ref_logps = stats.pop("ref_logps", ref_logps)
        scores = score_responses(stats, segments, ref_logps=ref_logps, token_weights=token_weights)
        if "tie_key" in self.needs:
            number = segments.index
            if number is None:
                number = torch.arange(segments.grid.shape[0], device=segments.grid.device)
            candidates = segments.grid.shape[1]
            scores["tie_key"] = tie_keys(number, candidates, seed=self.seed, step=self.step)
        return self._reduce(scores, segments, totals)

    def _token_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        options: dict[str, Any],
    ) -> TokenStats:
        """The statistics that the objectives need; `ref_logps` too if hidden states are given."""
        ref_hidden, ref_weight, ref_bias = reference
        if ref_hidden is not None and ref_weight is None:
            if weight.requires_grad:
                raise ValueError(
                    "the policy's head is trained, so it is not the reference's: pass ref_weight"
                )
            ref_weight, ref_bias = weight, bias
        divergences = tuple(d for name, d in _DIVERGENCE.items() if name in self.needs)
        if divergences and ref_hidden is not None:
            return linear_stats(
                hidden,
                weight,
                labels,
                stats=("logps", "ref_logps", *divergences),
                bias=bias,
                ref_hidden=ref_hidden,
                ref_weight=ref_weight,
                ref_bias=ref_bias,
                **options,
            )
        stats = linear_stats(hidden, weight, labels, bias=bias, **options)
        if ref_hidden is not None and ref_weight is not None:
            with torch.no_grad():
                of_reference = linear_stats(
                    ref_hidden, ref_weight, labels, bias=ref_bias, **options
                )
            stats["ref_logps"] = of_reference["logps"]
        return stats

    def _check_groups(self, segments: Segments) -> None:
        sizes = segments.mask.sum(dim=1)
        for c in self.components:
            if c.objective.family == "pair" and not bool((sizes == 2).all()):
                wrong = int((sizes != 2).nonzero()[0])
                raise ValueError(
                    f"{c.objective.name} compares pairs, but group {wrong} has {int(sizes[wrong])} "
                    "responses: use a list objective (lipo, plackett_luce) or turn lists into "
                    "pairs (list_to_pairs)"
                )
            if c.objective.family == "list" and not bool((sizes >= 2).all()):
                wrong = int((sizes < 2).nonzero()[0])
                raise ValueError(
                    f"{c.objective.name} compares lists, but group {wrong} has a single response: "
                    "use a point objective (kto, bco, npo)"
                )
        missing = [role for role in self.extras if role not in segments.extras]
        if missing:
            raise ValueError(
                f"{self._named()} needs a response in the role {missing[0]!r} for every group: "
                f"put its index into Segments(extras={{{missing[0]!r}: ...}})"
            )

    def _named(self) -> str:
        return " + ".join(c.objective.name for c in self.components)

    def _reduce(
        self, scores: dict[str, Tensor], segments: Segments, totals: Mapping[str, float] | None
    ) -> LossOutput:
        """Objectives on scores, summed and divided; the only place where either happens."""
        own = batch_counts(scores)
        divisors: Mapping[str, Any] = own if totals is None else totals
        groups = segments.grid.shape[0]
        losses = scores["logps"].new_zeros(groups)
        loss = losses.sum()
        rewards: dict[str, Tensor] = {}
        metrics, counts = {}, {}
        for component in self.components:
            name = component.objective.name
            statistics = self._statistics(component, scores)
            outcome = self._evaluate(component, {**scores, **statistics})
            rewards[name] = outcome.rewards
            for term in outcome.terms:
                scale = component.weight * term.weight
                values = term.values if segments.weight is None else term.values * segments.weight
                loss = loss + scale * values.sum() / _at_least_one(divisors[term.per])
                losses += scale * values.detach() * (groups / _at_least_one(own[term.per]))
            for statistic, value in statistics.items():
                metrics[f"{name}/{statistic}"] = value
                counts[f"{name}/{statistic}"] = torch.ones_like(value)
        # The rewards that are logged are the first objective's; sft has none worth the name.
        logged = rewards[next((name for name in rewards if name != "sft"), "sft")]
        for name, (total, count) in _reward_metrics(logged, scores).items():
            metrics[name], counts[name] = total / count, count
        return LossOutput(loss, losses, logged, metrics, counts)

    @staticmethod
    def _evaluate(component: Component, named: Mapping[str, Tensor]) -> Outcome:
        objective = component.objective
        for name in objective.needs:
            if name not in named:
                base = next((n for n in _REMEDY if name.endswith(n)), None)
                remedy = _REMEDY[base] if base else "see the objective's documentation"
                raise ValueError(f"{objective.name} needs {name!r}: {remedy}")
        return objective.fn(*(named[name] for name in objective.needs), **component.hyper)

    def _statistics(self, component: Component, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch statistics of one component, over all ranks, without gradient."""
        found = {}
        hyper = {**component.objective.hyper, **component.hyper}
        for name, statistic in component.objective.statistics.items():
            values, mask = statistic.of(scores, hyper)
            total, count = global_sum(values.detach(), mask)
            value = total / count.clamp(min=1)
            if statistic.running:
                state = self.get_buffer(f"{component.objective.name}_{name}")
                if self.training and torch.is_grad_enabled():
                    state[1] += count
                    state[0] += (value - state[0]) * count / state[1].clamp(min=1)
                value = state[0].clone()
            found[name] = value.to(values.dtype)
        return found


def global_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(masked sum, number of entries) in float64 over all ranks, no gradient."""
    both = torch.stack([torch.where(mask, values, 0).double().sum(), mask.double().sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    return both[0], both[1]


def batch_counts(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the terms of a loss are divided by, counted over one batch."""
    mask, label = scores["mask"], scores["label"]
    return {
        "groups": mask.any(dim=1).sum(),
        "responses": mask.sum(),
        "desirable": label.sum(),
        "undesirable": (mask & ~label).sum(),
        "chosen_tokens": (scores["length"] * label).sum(),
    }


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _reward_metrics(
    rewards: Tensor, scores: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """TRL's metric names -> (sum, count). Lists: desirable against undesirable candidates."""
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
    return {
        "rewards/chosen": over(rewards, good),
        "rewards/rejected": over(rewards, bad),
        "rewards/margins": mean_over_groups(margin),
        "rewards/accuracies": mean_over_groups((margin > 0).to(rewards.dtype)),
        "logps/chosen": over(logps, good),
        "logps/rejected": over(logps, bad),
    }
