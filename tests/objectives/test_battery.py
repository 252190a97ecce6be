"""One battery of properties for every objective in the table, at every setting of its options."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import get_args

import numpy
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Per
from tests.numerics import assert_three_way

from .battery import (
    RECIPES,
    STATISTICS,
    Case,
    ReplayDetach,
    assert_rounded,
    by_divisor,
    cases,
    cast,
    condition,
    evaluate,
    gradients,
    leaves,
    make_scores,
    poison,
    slice_groups,
)
from .formulas import FORMULAS, LETTERS, hyper_numbers

CASES = pytest.mark.parametrize("case", cases(), ids=repr)
FULL = {"pair": [2] * 5, "point": [3] * 5, "list": [4] * 5}
RAGGED = {"pair": [2, 0, 2, 2], "point": [1, 4, 0, 2, 3], "list": [4, 2, 0, 3, 2]}


def scores_of(case: Case, sizes: dict[str, list[int]] = FULL, **options) -> dict[str, Tensor]:
    return make_scores(case.objective, sizes[case.objective.family], hyper=case.hyper, **options)


def by_hand(case: Case, scores: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The hand formula's sums {per: [G]} and rewards [G, K], as float64."""

    def exact(numbers):
        return [exact(x) for x in numbers] if isinstance(numbers, list) else mpf(numbers)

    hyper, sums, rewards = hyper_numbers(case.hyper), {}, []
    for i, live in enumerate(scores["mask"]):
        group = SimpleNamespace()
        for name, every in scores.items():
            value = every if name in STATISTICS else every[i]
            if name not in STATISTICS and every.dim() > 1:
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
    assert name in FORMULAS, f"write {name}'s formula by hand in formulas.py"
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


@CASES
@pytest.mark.parametrize("statistic", [1.0, 1e4])
def test_extreme_scores(case: Case, statistic: float) -> None:
    """From 1e-8 to 1e4, mixed: float32 is the exact value rounded, and no gradient is NaN."""
    sizes = {"pair": [2] * 64, "point": [3] * 32, "list": [3] * 32}
    scores = scores_of(case, sizes, seed=2, extreme=True)
    for name in case.objective.statistics:
        scores[name] = torch.full_like(scores[name], statistic)
    truth, _ = by_hand(case, scores)
    bound = condition(case, scores)
    for per, values in by_divisor(evaluate(case, cast(scores, torch.float32))).items():
        assert_rounded(values, truth[per], bound[per], per)
    exact = gradients(case, scores)
    for name, grad in gradients(case, cast(scores, torch.float32)).items():
        assert grad.dtype == torch.float32
        assert not grad.isnan().any(), f"{name}: {grad}"
        assert torch.equal(grad.isfinite(), exact[name].float().isfinite()), name


@CASES
def test_gradcheck(case: Case) -> None:
    scores = scores_of(case, seed=3)
    copy, roots = leaves(slice_groups(scores, slice(3)))
    tape: list[Tensor] = []

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with ReplayDetach(tape):
            outcome = evaluate(case, {**copy, **dict(zip(roots, inputs, strict=True))})
        return tuple(t.values for t in outcome.terms if t.values.requires_grad)

    assert run(*roots.values())
    assert torch.autograd.gradcheck(run, tuple(roots.values()), check_undefined_grad=False)


@CASES
def test_groups_permute(case: Case) -> None:
    scores = scores_of(case, RAGGED, seed=4)
    order = torch.randperm(len(scores["mask"]), generator=torch.Generator().manual_seed(0))
    single = cast(scores, torch.float32)
    moved = by_divisor(evaluate(case, slice_groups(single, order)))
    still, exact = by_divisor(evaluate(case, single)), by_divisor(evaluate(case, scores))
    for per, values in moved.items():
        assert_three_way(values, still[per][order], exact[per][order], per)


@CASES
def test_padding_equals_separate_lists(case: Case) -> None:
    """NaN in padded slots: each group has the value and gradient that it has alone, unpadded."""
    scores = scores_of(case, RAGGED, seed=5)
    mask = scores["mask"]
    single = cast(scores, torch.float32)
    outcome, padded = evaluate(case, poison(single)), gradients(case, poison(single))
    assert outcome.rewards.shape == mask.shape
    assert (outcome.rewards[~mask] == 0).all()
    for grad in padded.values():
        assert (grad[~mask if grad.dim() > 1 else ~mask.any(-1)] == 0).all()
    for i, live in enumerate(mask):
        size = int(live.sum())
        if size == 0:
            assert all(values[i] == 0 for values in by_divisor(outcome).values())
            continue

        def alone(of: dict[str, Tensor], i: int = i, size: int = size) -> dict[str, Tensor]:
            return slice_groups(of, slice(i, i + 1), slice(size))

        plain, exact = evaluate(case, alone(single)), evaluate(case, alone(scores))
        for per, values in by_divisor(outcome).items():
            assert_three_way(values[i : i + 1], by_divisor(plain)[per], by_divisor(exact)[per], per)
        assert_three_way(outcome.rewards[i, :size], plain.rewards[0], exact.rewards[0], "rewards")
        plain_grad, exact_grad = gradients(case, alone(single)), gradients(case, alone(scores))
        for name, grad in padded.items():
            mine = grad[i, :size] if grad.dim() > 1 else grad[i]
            assert_three_way(mine, plain_grad[name][0], exact_grad[name][0], name)


@CASES
def test_all_masked_is_zero(case: Case) -> None:
    scores = scores_of(case, seed=6)
    scores["mask"] = torch.zeros_like(scores["mask"])
    scores = poison(scores)
    outcome = evaluate(case, scores)
    assert all((values == 0).all() for values in by_divisor(outcome).values())
    assert (outcome.rewards == 0).all()
    assert all((grad == 0).all() for grad in gradients(case, scores).values())


@CASES
def test_nan_stays_nan_in_its_group(case: Case) -> None:
    """Where a score matters to the loss, NaN there gives NaN, in that group and no other.

    In the first group whose scores matter at all: a batch may set some of its groups aside.
    """
    scores = scores_of(case, seed=7)
    before = by_divisor(evaluate(case, scores))
    mattered = 0
    for group in range(len(scores["mask"])):
        others = torch.arange(len(scores["mask"])) != group
        for name in RECIPES.keys() & scores.keys():
            for place in numpy.ndindex(scores[name].shape[1:]):
                here = (group, *place)
                if "token_mask" in scores and len(place) == 2 and not scores["token_mask"][here]:
                    continue
                nudged, broken = scores[name].clone(), scores[name].clone()
                nudged[here] *= 1.5
                broken[here] = float("nan")
                after = by_divisor(evaluate(case, {**scores, name: nudged}))
                values = by_divisor(evaluate(case, {**scores, name: broken}))
                for per in before:
                    if after[per][group] != before[per][group]:
                        mattered += 1
                        assert values[per][group].isnan(), f"{name}{list(here)} is lost in {per}"
                    assert torch.equal(values[per][others], before[per][others])
        if mattered:
            break
    assert mattered


@CASES
def test_inputs_are_not_modified(case: Case) -> None:
    scores = scores_of(case, RAGGED, seed=8)
    kept = {k: v.clone() for k, v in scores.items()}
    evaluate(case, scores)
    assert all(torch.equal(kept[name], scores[name]) for name in kept)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiles_to_one_graph(name: str) -> None:
    case = Case(name, OBJECTIVES[name].hyper)
    scores = cast(scores_of(case, RAGGED, seed=9), torch.float32)
    compiled = torch.compile(case.objective.fn, fullgraph=True, backend="eager")
    eager, graph = by_divisor(evaluate(case, scores)), by_divisor(compiled(**scores))
    assert all(torch.equal(eager[per], graph[per]) for per in eager)
