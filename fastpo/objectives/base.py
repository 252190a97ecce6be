"""Define an objective: a pure function of named scores, and what it returns.

The names of a function's positional parameters are the scores it needs (`ratio`, `mean_logps`,
`kl`, `score`, ...: the table in `vocabulary`). A parameter annotated with a NamedTuple stands for
the scores that are its fields. Keyword-only parameters are hyper-parameters. Annotations are
domains (`beta: Positive` of `fastpo.domain`, `score: Gains` of `vocabulary`). Nothing else has to
be declared: the engine reads the signature.

>>> import torch
>>> def square(ratio, *, beta=0.1):
...     gap = beta * (ratio[:, 0] - ratio[:, 1])
...     return Outcome((Term((1 - gap).square()),), (beta * ratio).detach())
>>> objective = Objective(square, "pair")
>>> objective.name, objective.needs, objective.hyper
('square', ('ratio',), {'beta': 0.1})
>>> objective({"ratio": torch.tensor([[10.0, 0.0]])}, beta=0.2).terms[0].values
tensor([1.])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from torch import Tensor

from fastpo.domain import FINITE, Domain, Misfit, domain_of, fitted_as, moved
from fastpo.segments import Where

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


DIVISORS: dict[Per, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "groups": lambda scores: scores["mask"].any(dim=1).sum(),
    "responses": lambda scores: scores["mask"].sum(),
    "desirable": lambda scores: scores["label"].sum(),
    "undesirable": lambda scores: (scores["mask"] & ~scores["label"]).sum(),
    "chosen_tokens": lambda scores: (scores["length"] * scores["label"]).sum(),
    "response_tokens": lambda scores: (scores["length"] * scores["mask"]).sum(),
    "gold_tokens": lambda scores: scores["gold_length"].sum(),
}
"""Counts of one batch, from its scores."""


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


Hyper = float | str | bool | None | tuple[float, float] | list[float]
"""A value of a hyper-parameter; two numbers are those between which it moves over training."""


@dataclass(frozen=True)
class Objective:
    """Describe a named objective.

    Args:
        fn: the pure function; see the module docstring for how its signature is read.
        family: how many candidates a group must have.
        paper: arXiv identifier or other source.
        formula: one line of plain text for tables; by default the first line of `fn`'s docstring.
        statistics: batch statistics that `fn` takes by name.
        extras: roles of the extra responses that every group must bring.
        labels: the labels that the data must have, or there is nothing to learn.
        grades_if: other domains of `score`, by a hyper-parameter and its value.
        name: its key in the table; by default `fn`'s own name.

    Raises:
        TypeError: the first argument is no function.
        ValueError: an unknown family.
    """

    fn: Callable[..., Outcome]
    family: Family
    paper: str = "own"
    formula: str = ""
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    labels: tuple[bool, ...] = ()
    grades_if: Mapping[tuple[str, Hyper], Domain] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(
                f"Objective({self.fn!r}, ...): the function comes first and gives the name, as in "
                f"Objective(my_loss, 'pair'); another name is name={self.fn!r}"
            )
        if self.family not in get_args(Family):
            raise ValueError(f"family={self.family!r} must be 'pair', 'point' or 'list'")
        name = self.name or self.fn.__name__
        first_line = (inspect.getdoc(self.fn) or name).partition("\n")[0]
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "formula", self.formula or first_line)

    def __call__(self, scores: Mapping[str, Tensor], **hyper: Any) -> Outcome:
        """Return the outcome of named scores, of which there may be more than `needs`.

        Raises:
            ValueError: the function returns something else than losses [G] and rewards [G, K].
        """
        arguments = (
            scores[name] if record is None else record(*(scores[n] for n in record._fields))
            for name, record in self._parameters.items()
        )
        outcome = self.fn(*arguments, **hyper)
        if fault := _fault(outcome, scores):
            raise ValueError(
                f"{self.name} returned {fault}: return Outcome((Term(losses),), rewards) with "
                "losses [G] and rewards [G, K]"
            )
        return outcome

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
    def _parameters(self) -> dict[str, type[Any] | None]:
        """Return the positional parameters of `fn`, and the NamedTuples that some of them are."""
        return {
            p.name: kind if _is_record(kind := self._hints.get(p.name)) else None
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        }

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the scores and statistics that `fn` takes."""
        return tuple(
            name
            for parameter, record in self._parameters.items()
            for name in ((parameter,) if record is None else record._fields)
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
    def hyper(self) -> dict[str, Hyper]:
        """Return the published defaults by hyper-parameter."""
        return {
            p.name: p.default
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @cached_property
    def _hints(self) -> Mapping[str, Any]:
        return get_type_hints(self.fn, include_extras=True)

    @cached_property
    def annotations(self) -> Mapping[str, Any]:
        """Return the annotations by hyper-parameter and score, domains included."""
        records = [record for record in self._parameters.values() if record is not None]
        fields = [get_type_hints(record, include_extras=True) for record in records]
        return {name: hint for hints in (self._hints, *fields) for name, hint in hints.items()}

    def expected(self, name: str) -> Any:
        """Return the annotation of a hyper-parameter, by default the type of its default."""
        default = self.hyper.get(name)
        return self.annotations.get(name, Any if default is None else type(default))

    def fitted(self, name: str, value: Any) -> Any:
        """Return `value` as the hyper-parameter `name` takes it; see `fastpo.domain.moved`.

        Raises:
            Misfit: it does not.
        """
        try:
            return moved(value, self.expected(name))
        except Misfit as misfit:
            if name != "loss_type":
                raise
            # Other tools' CPO has SimPO for a loss_type.
            raise Misfit(
                f"{misfit}; other losses are objectives: objective: {called_here(value)}"
            ) from None

    def option(self, name: str, value: Any) -> Any:
        """Return `value` as the hyper-parameter `name` has it in one call, where nothing moves.

        Raises:
            ValueError: names it and says what it must be.
        """
        return fitted_as(name, value, self.expected(name))

    def grades(self, hyper: Mapping[str, Any]) -> Domain:
        """Return what `score` must be under these hyper-parameters."""
        for (name, value), domain in self.grades_if.items():
            if hyper.get(name, self.hyper[name]) == value:
                return domain
        return domain_of(self.annotations.get("score")) or FINITE


def _is_record(kind: Any) -> bool:
    """Return whether a type is a NamedTuple."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fault(outcome: object, scores: Mapping[str, Tensor]) -> str | None:
    """Say what is wrong with what a function returned, or nothing."""
    if not isinstance(outcome, Outcome):
        return f"a {type(outcome).__name__}"
    mask = scores.get("mask")
    if not isinstance(outcome.terms, tuple | list) or not outcome.terms:
        return f"terms {outcome.terms!r}"
    for term in outcome.terms:
        if not isinstance(term, Term):
            return f"a {type(term).__name__} among its terms"
        if not isinstance(term.values, Tensor):
            return f"losses that are a {type(term.values).__name__}"
        weight = term.weight
        if not (isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.numel() == 1)):
            return f"a term's weight {weight!r}, which is not one number"
        if term.per not in DIVISORS:
            return f"a term per {term.per!r}, which nothing counts ({', '.join(DIVISORS)})"
        if mask is not None and term.values.shape != mask.shape[:1]:
            return f"losses of shape {list(term.values.shape)} for {len(mask)} groups"
    if not isinstance(outcome.rewards, Tensor):
        return f"rewards that are a {type(outcome.rewards).__name__}"
    if mask is not None and outcome.rewards.shape != mask.shape:
        return f"rewards of shape {list(outcome.rewards.shape)} for a mask {list(mask.shape)}"
    return None


def catalogue(*objectives: Objective) -> dict[str, Objective]:
    """Return objectives by their names.

    Raises:
        ValueError: two of one name.
    """
    table: dict[str, Objective] = {}
    for objective in objectives:
        if objective.name in table:
            raise ValueError(f"two objectives are called {objective.name!r}: rename one")
        table[objective.name] = objective
    return table
