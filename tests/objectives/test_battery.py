"""One battery of properties for every objective in the table, at every setting of its options."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from mpmath import mpf
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Per
from fastpo.testing.battery import (
    CHECKS,
    RAGGED,
    assert_extremes,
    check_extremes,
    extreme_scores,
    extreme_statistics,
    scores_of,
)
from fastpo.testing.scores import (
    Case,
    assert_rounded,
    by_divisor,
    cases_of,
    cast,
    condition,
    evaluate,
)

from .formulas import FORMULAS, LETTERS, hyper_numbers

# Every objective at its published defaults, with all its numbers moved, since a default of 0 or 1
# hides a factor, and at each value of each option.
CASES = pytest.mark.parametrize(
    "case", [case for objective in OBJECTIVES.values() for case in cases_of(objective)], ids=repr
)
PROPERTIES = [check for check in CHECKS if check is not check_extremes]


def by_hand(case: Case, scores: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The hand formula's sums {per: [G]} and rewards [G, K], as float64."""

    def exact(numbers):
        return [exact(x) for x in numbers] if isinstance(numbers, list) else mpf(numbers)

    hyper, sums, rewards = hyper_numbers(case.hyper), {}, []
    for i, live in enumerate(scores["mask"]):
        group = SimpleNamespace()
        for name, every in scores.items():
            value = every if name in case.objective.statistics else every[i]
            if name not in case.objective.statistics and every.dim() > 1:
                value = value[live]
            numbers = exact(value.tolist()) if value.is_floating_point() else value.tolist()
            setattr(group, LETTERS.get(name, name), numbers)
        terms, reward = FORMULAS[case.name](group, hyper)
        for per, value in terms.items():
            sums.setdefault(per, []).append(float(value))
        pads = live.numel() - len(reward)
        rewards.append([float(r) for r in reward] + [0.0] * pads)
    truth = {per: torch.tensor(v, dtype=torch.float64) for per, v in sums.items()}
    return truth, torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_table_entry(name: str) -> None:
    objective = OBJECTIVES[name]
    assert objective.name == name
    assert objective.paper
    assert objective.formula
    assert objective.formula.isascii()
    assert name in FORMULAS, f"write {name}'s formula by hand in tests/objectives/formulas"
    doc = inspect.getdoc(objective.fn) or ""
    assert "$" in doc, "no formula in the docstring"
    assert ">>>" in doc, "no example in the docstring"
    assert all(value is not inspect.Parameter.empty for value in objective.hyper.values())
    assert "mask" in objective.needs


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form(case: Case, dtype: torch.dtype) -> None:
    scores = scores_of(case, seed=1)
    truth, rewards = by_hand(case, scores)
    outcome, bound = evaluate(case, cast(scores, dtype)), condition(case, scores)
    ours = by_divisor(outcome)
    assert ours.keys() == truth.keys() <= set(get_args(Per))
    for per, values in ours.items():
        assert values.dtype == dtype
        assert_rounded(values, truth[per], bound[per], per)
    assert outcome.rewards.dtype == dtype
    assert not outcome.rewards.requires_grad
    # Two roundings; u + F of opposite signs cancels against inputs below 4.
    assert_rounded(outcome.rewards, rewards, rewards.abs() + case.hyper.get("beta", 1), "rewards")


@pytest.mark.slow
@CASES
def test_extreme_scores(case: Case) -> None:
    """What `check_extremes` says, with the exact value for truth."""
    for statistic in extreme_statistics(case):
        scores = extreme_scores(case, statistic)
        assert_extremes(case, scores, by_hand(case, scores)[0])


# All seven in one test: 293 cases times seven are two thousand, and pytest takes 10 ms for each.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=repr(case), marks=() if i == 0 else pytest.mark.slow)
        for objective in OBJECTIVES.values()
        for i, case in enumerate(cases_of(objective))
    ],
)
def test_properties(case: Case) -> None:
    for check in PROPERTIES:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiles_to_one_graph(name: str) -> None:
    case = Case(OBJECTIVES[name], OBJECTIVES[name].hyper)
    scores = cast(scores_of(case, RAGGED, seed=9), torch.float32)
    torch._dynamo.reset()  # all objectives are one piece of code, which has eight forms at most
    compiled = torch.compile(case.objective, fullgraph=True, backend="eager")
    eager, graph = by_divisor(evaluate(case, scores)), by_divisor(compiled(scores))
    assert all(torch.equal(eager[per], graph[per]) for per in eager)
