"""Check properties that every objective has; each check is a function of a `Case`.

Sizes of groups are such that pairs, lists and single responses are ragged, empty groups included.
Each raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from fastpo.objectives.base import Outcome

from .scores import (
    ROUNDINGS,
    Case,
    ReplayDetach,
    by_divisor,
    cast,
    condition,
    evaluate,
    gradients,
    leaves,
    make_scores,
    poison,
    slice_groups,
)
from .three_way import assert_three_way

FULL = {"pair": [2] * 5, "point": [3] * 5, "list": [4] * 5}
RAGGED = {"pair": [2, 0, 2, 2], "point": [1, 4, 0, 2, 3], "list": [4, 2, 0, 3, 2]}
MANY = {"pair": [2] * 64, "point": [3] * 32, "list": [3] * 32}


def scores_of(
    case: Case, sizes: Mapping[str, list[int]] = FULL, *, seed: int = 0, extreme: bool = False
) -> dict[str, Tensor]:
    """Return random scores for an objective at its setting, float64."""
    counts = sizes[case.objective.family]
    return make_scores(case.objective, counts, seed=seed, extreme=extreme, hyper=case.hyper)


def check_returns(case: Case) -> None:
    """Assert that losses and rewards have the scores' dtype, and that rewards are detached."""
    for dtype in (torch.float32, torch.float64):
        copy, _ = leaves(cast(scores_of(case, seed=1), dtype), case.objective.statistics)
        outcome = evaluate(case, copy)  # which refuses other shapes
        assert outcome.terms, f"{case} returns no terms"
        for term in outcome.terms:
            assert term.values.dtype == dtype, (
                f"{case} returns losses in {term.values.dtype} for scores in {dtype}"
            )
            assert term.values.isfinite().all(), f"{case} is not finite: {term.values.tolist()}"
        assert outcome.rewards.dtype == dtype, (
            f"{case} returns rewards in {outcome.rewards.dtype} for scores in {dtype}"
        )
        assert not outcome.rewards.requires_grad, f"{case} returns rewards with gradient: detach()"


def check_extremes(case: Case) -> None:
    """Assert that from 1e-8 to 1e4 float32 is float64 rounded, and that no gradient is NaN."""
    for statistic in extreme_statistics(case):
        scores = extreme_scores(case, statistic)
        assert_extremes(case, scores, by_divisor(evaluate(case, scores)))


def extreme_statistics(case: Case) -> tuple[float, ...]:
    """Return the values at which `extreme_scores` are worth a look: one where nothing takes it."""
    return (1.0, 1e4) if case.objective.statistics else (1.0,)


def extreme_scores(case: Case, statistic: float) -> dict[str, Tensor]:
    """Return scores from 1e-8 to 1e4, mixed, with every statistic of the batch at one value."""
    scores = scores_of(case, MANY, seed=2, extreme=True)
    for name in case.objective.statistics:
        scores[name] = torch.full_like(scores[name], statistic)
    return scores


def assert_extremes(case: Case, scores: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Assert that float32 is the truth rounded, and its gradients finite where float64's are."""
    bounds, info = condition(case, scores), torch.finfo(torch.float32)
    for per, values in by_divisor(evaluate(case, cast(scores, torch.float32))).items():
        exact = truth[per].detach()
        off = ~((values.double() - exact).abs() <= ROUNDINGS * info.eps * bounds[per] + info.tiny)
        off &= values.double() != exact.float().double()
        assert not off.any(), (
            f"{case} at scores up to 1e4: float32 gives {values[off][0].item():g} where the exact "
            f"value is {exact[off][0].item():g}"
        )
    exact = gradients(case, scores)
    for name, grad in gradients(case, cast(scores, torch.float32)).items():
        assert grad.dtype == torch.float32, f"{case}: the gradient to {name!r} is {grad.dtype}"
        assert not grad.isnan().any(), f"{case}: the gradient to {name!r} is NaN"
        assert torch.equal(grad.isfinite(), exact[name].float().isfinite()), (
            f"{case}: the gradient to {name!r} overflows in float32 and not in float64"
        )


def check_gradient(case: Case) -> None:
    """Assert that gradients are those of finite differences, in float64."""
    statistics = case.objective.statistics
    scores = slice_groups(scores_of(case, seed=3), slice(3), statistics=statistics)
    copy, roots = leaves(scores, statistics)
    tape: list[Tensor] = []

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with ReplayDetach(tape):
            outcome = evaluate(case, {**copy, **dict(zip(roots, inputs, strict=True))})
        return tuple(t.values for t in outcome.terms if t.values.requires_grad)

    run(*roots.values())  # which fills the tape
    try:
        torch.autograd.gradcheck(run, tuple(roots.values()), check_undefined_grad=False)
    except GradcheckError as error:
        raise AssertionError(f"{case}: gradients are not those of its losses: {error}") from error


def check_permutation(case: Case) -> None:
    """Assert that groups in another order have the same losses in that order."""
    statistics = case.objective.statistics
    scores = scores_of(case, RAGGED, seed=4)
    order = torch.randperm(len(scores["mask"]), generator=torch.Generator().manual_seed(0))
    single = cast(scores, torch.float32)
    moved = by_divisor(evaluate(case, slice_groups(single, order, statistics=statistics)))
    still, exact = by_divisor(evaluate(case, single)), by_divisor(evaluate(case, scores))
    for per, values in moved.items():
        what = f"{case}: a group's loss per {per} depends on its place in the batch"
        assert_three_way(values, still[per][order], exact[per][order], what)


def check_padding(case: Case) -> None:
    """Assert that with NaN in padded slots a group has the value and gradient it has alone."""
    statistics = case.objective.statistics
    scores = scores_of(case, RAGGED, seed=5)
    mask = scores["mask"]
    single = cast(scores, torch.float32)
    poisoned = poison(single, statistics)
    outcome = evaluate(case, poisoned)
    assert (outcome.rewards[~mask] == 0).all(), f"{case}: rewards are not 0 where `mask` is False"
    padded = gradients(case, poisoned)
    for name, grad in padded.items():
        empty = ~mask if grad.dim() > 1 else ~mask.any(-1)
        assert (grad[empty] == 0).all(), (
            f"{case}: the gradient to {name!r} is not 0 where `mask` is False"
        )
    for i, live in enumerate(mask):
        size = int(live.sum())
        if size == 0:
            assert all(values[i] == 0 for values in by_divisor(outcome).values()), (
                f"{case}: a group without responses has a loss that is not 0"
            )
            continue

        def alone(of: Mapping[str, Tensor], i: int = i, size: int = size) -> dict[str, Tensor]:
            return slice_groups(of, slice(i, i + 1), slice(size), statistics)

        _check_alone(case, outcome, padded, i, alone(single), alone(scores))


def _check_alone(
    case: Case,
    outcome: Outcome,
    padded: Mapping[str, Tensor],
    i: int,
    single: Mapping[str, Tensor],
    double: Mapping[str, Tensor],
) -> None:
    """Assert that group `i` of a padded batch has what it has alone, unpadded."""
    size, what = single["mask"].shape[1], f"{case}: what is padded changes the"
    plain, exact = evaluate(case, single), evaluate(case, double)
    one, one_exact = by_divisor(plain), by_divisor(exact)
    for per, values in by_divisor(outcome).items():
        assert_three_way(values[i : i + 1], one[per], one_exact[per], f"{what} loss per {per}")
    rewards = outcome.rewards[i, :size]
    assert_three_way(rewards, plain.rewards[0], exact.rewards[0], f"{what} rewards")
    alone, alone_exact = gradients(case, single), gradients(case, double)
    for name, grad in padded.items():
        ours = grad[i, :size] if grad.dim() > 1 else grad[i]
        what_grad = f"{what} gradient to {name!r}"
        assert_three_way(ours, alone[name][0], alone_exact[name][0], what_grad)


def check_all_masked(case: Case) -> None:
    """Assert that a batch without a response has losses, rewards and gradients of 0."""
    scores = scores_of(case, seed=6)
    scores["mask"] = torch.zeros_like(scores["mask"])
    scores = poison(scores, case.objective.statistics)
    outcome = evaluate(case, scores)
    for per, values in by_divisor(outcome).items():
        assert (values == 0).all(), f"{case}: without any response the loss per {per} is not 0"
    assert (outcome.rewards == 0).all(), f"{case}: without any response rewards are not 0"
    for name, grad in gradients(case, scores).items():
        assert (grad == 0).all(), f"{case}: without any response the gradient to {name!r} is not 0"


def check_nan(case: Case) -> None:
    """Assert that NaN in a score that matters gives NaN, in its group and in no other.

    In the first group whose scores matter at all: a batch may set some of its groups aside.
    """
    scores = scores_of(case, seed=7)
    names = leaves(scores, case.objective.statistics)[1]
    before = by_divisor(evaluate(case, scores))
    for group in range(len(scores["mask"])):
        if _nan_stays(case, scores, names, before, group):
            return
    raise AssertionError(f"{case}: no score matters to the loss")


def _nan_stays(
    case: Case,
    scores: Mapping[str, Tensor],
    names: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    group: int,
) -> bool:
    """Return whether a score of this group matters; assert what `check_nan` does of it."""
    others = torch.arange(len(scores["mask"])) != group
    mattered = False
    for name in names:
        for place in product(*map(range, scores[name].shape[1:])):
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
                    mattered = True
                    assert values[per][group].isnan(), (
                        f"{case}: NaN in {name}{list(here)} is lost: the loss is "
                        f"{values[per][group].item():g}"
                    )
                assert torch.equal(values[per][others], before[per][others]), (
                    f"{case}: {name}{list(here)} changes the loss of another group; numbers of "
                    "the whole batch are a Statistic's"
                )
    return mattered


def check_inputs(case: Case) -> None:
    """Assert that no score is written to."""
    scores = scores_of(case, RAGGED, seed=8)
    kept = {k: v.clone() for k, v in scores.items()}
    evaluate(case, scores)
    for name, value in scores.items():
        assert torch.equal(kept[name], value), f"{case} writes into {name!r}"


CHECKS = (
    check_returns,
    check_inputs,
    check_extremes,
    check_gradient,
    check_permutation,
    check_padding,
    check_all_masked,
    check_nan,
)
"""What `check_objective` runs."""
