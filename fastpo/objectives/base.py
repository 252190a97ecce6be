"""Define an objective: a pure function of named scores, and what it returns.

The names of a function's positional parameters are the scores it needs (`ratio`, `mean_logps`,
`kl`, `score`, ...: the table in `vocabulary`); its keyword-only parameters are its
hyper-parameters. Their annotations are their domains (`beta: Positive`, `score: Gains`; see
`domain`). Nothing else has to be declared: the engine reads the signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_type_hints

from torch import Tensor

from fastpo.segments import Where

from .domain import FINITE, Domain, Misfit, domain_of, moved
from .elsewhere import called_here
from .vocabulary import UNKNOWN, Score, scores_with

Family = Literal["pair", "point", "list"]
"""pair: exactly two candidates. point: each candidate alone. list: two or more, ragged."""

Per = Literal[
    "groups",
    "responses",
    "desirable",
    "undesirable",
    "chosen_tokens",
    "response_tokens",
    "gold_tokens",
]
"""What a term's sum is divided by, counted over the whole optimiser step and every rank.

`desirable` and `undesirable` count responses by label, `response_tokens` the scored tokens of all
responses, `chosen_tokens` those of the desirable ones, `gold_tokens` those of the extra `gold`. A
count of zero leaves a sum of zero: divide by max(count, 1).
"""


class Term(NamedTuple):
    """Hold one summand of a loss: weight * sum(values) / (global count of `per`)."""

    values: Tensor  # [G], summed over the group's responses
    per: Per = "groups"
    weight: float = 1.0


class Outcome(NamedTuple):
    """Hold what an objective returns for G groups of K candidates."""

    terms: tuple[Term, ...]
    rewards: Tensor  # [G, K], detached: the implicit rewards that are logged


def mean(observations: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """Return the mean [] of [n] observations, 0 where there is none."""
    return observations.sum() / max(len(observations), 1)


Memory = Literal["none", "mean", "ema"]
"""What a statistic remembers of earlier optimiser steps: nothing, the mean of all observations so
far, or an exponential moving average of its values, one a step; the current step is included."""


@dataclass(frozen=True)
class Statistic:
    """Define numbers that an objective takes from the whole batch and not from one group.

    The objective gets them under the statistic's name, float64 rounded to the scores' dtype,
    without gradient. What is remembered is saved with the checkpoint.

    Args:
        of: (scores, hyper-parameters) -> (values, mask): this batch's observations, those values
            where the mask is True. They are gathered over all ranks.
        reduce: ([n, ...] float64 observations, hyper-parameters) -> the statistic, of any shape
            without memory, [] under "mean", [size] under "ema".
        memory: see `Memory`.
        size: length of what `reduce` returns under "ema".
        decay: weight of the past under "ema", or the hyper-parameter that sets it.
        where: the name of the mask, if it is one of `fastpo.segments.Where`: packed data know those
            places on the host, and no device is waited for.
    """

    of: Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[Tensor, Tensor]]
    reduce: Callable[[Tensor, Mapping[str, Any]], Tensor] = mean
    memory: Memory = "none"
    size: int = 1
    decay: float | str = 0.9
    where: Where | None = None


@dataclass(frozen=True)
class Objective:
    """Describe a named objective of the catalogue.

    Args:
        name: its key in the table.
        fn: the pure function; see the module docstring for how its signature is read.
        family: how many candidates a group must have.
        paper: arXiv identifier or other source.
        formula: one line of plain text for tables.
        statistics: batch statistics that `fn` takes by name.
        extras: roles of the extra responses that every group must bring.
        labels: the labels that the data must have, or there is nothing to learn.
        grades_if: other domains of `score`, by a hyper-parameter and its value.
    """

    name: str
    fn: Callable[..., Outcome]
    family: Family
    paper: str
    formula: str
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    labels: tuple[bool, ...] = ()
    grades_if: Mapping[tuple[str, Any], Domain] = field(default_factory=dict)

    def takes(self, count: Any) -> Any:
        """Return whether groups of `count` candidates, a number or a tensor, can be compared."""
        return count == 2 if self.family == "pair" else count >= (2 if self.family == "list" else 0)

    def size_error(self, count: int, who: str) -> str:
        """Say to somebody that their group, called `who`, cannot be taken."""
        if self.family == "pair":
            return (
                f"{self.name} compares pairs, but {who} has {count} responses: use a list "
                "objective (lipo, plackett_luce) or turn lists into pairs (list_to_pairs)"
            )
        return (
            f"{self.name} compares lists, but {who} has a single response: use a point objective "
            "(kto, bco, npo)"
        )

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the scores and statistics that `fn` takes."""
        return tuple(
            p.name
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        )

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Return the scores among `needs`, by name; one that no table has is `UNKNOWN`."""
        table = scores_with(self.extras)
        return {n: table.get(n, UNKNOWN) for n in self.needs if n not in self.statistics}

    @property
    def needs_kl(self) -> bool:
        """Return whether the reference's whole distribution is needed."""
        return any(score.distribution for score in self.scores.values())

    @property
    def needs_reference(self) -> bool:
        """Return whether a reference model, or its log-probs, are needed."""
        return any(score.reference == 1 for score in self.scores.values())

    @property
    def needs_second_reference(self) -> bool:
        """Return whether log-probs of a second reference are needed too."""
        return any(score.reference == 2 for score in self.scores.values())

    @cached_property
    def hyper(self) -> dict[str, Any]:
        """Return the published defaults by hyper-parameter."""
        return {
            p.name: p.default
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @cached_property
    def annotations(self) -> dict[str, Any]:
        """Return the annotations by parameter, domains included."""
        return get_type_hints(self.fn, include_extras=True)

    def fitted(self, name: str, value: Any) -> Any:
        """Return `value` as the hyper-parameter `name` takes it; see `domain.moved`.

        Raises:
            Misfit: it does not.
        """
        try:
            return moved(value, self.annotations.get(name, Any))
        except Misfit as misfit:
            if name != "loss_type":
                raise
            # Other tools' CPO has SimPO for a loss_type.
            raise Misfit(
                f"{misfit}; other losses are objectives: objective: {called_here(value)}"
            ) from None

    def grades(self, hyper: Mapping[str, Any]) -> Domain:
        """Return what `score` must be under these hyper-parameters."""
        for (name, value), domain in self.grades_if.items():
            if hyper.get(name, self.hyper[name]) == value:
                return domain
        return domain_of(self.annotations.get("score")) or FINITE
