"""Objectives by their kernels: what the pure functions say, in one launch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastpo import PreferenceLoss, Segments
from fastpo.kernels import listwise, pairwise
from fastpo.kernels.listwise import MAX_CANDIDATES, blocks
from fastpo.loss import fused
from fastpo.loss.fused import FUSED
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Objective, Outcome, Term
from fastpo.testing.scores import (
    Case,
    assert_rounded,
    by_divisor,
    cases_of,
    cast,
    condition,
    evaluate,
    leaves,
    make_scores,
    poison,
)
from fastpo.testing.three_way import assert_three_way

SIZES = {"pair": [2] * 7 + [0, 2], "point": [3, 1, 4, 0, 2], "list": [4, 2, 0, 3, 2, 4]}


def call_of(case: Case) -> fused.Fused | None:
    build = FUSED.get(case.objective.fn)
    return build and build(SimpleNamespace(**case.hyper))


CLAMPED = [
    Case(OBJECTIVES["dpo"], {**OBJECTIVES["dpo"].hyper, "f_divergence": f, "divergence_clamp": 2.0})
    for f in ("forward_kl", "alpha")
]
COVERED = [
    case
    for case in (*(case for o in OBJECTIVES.values() for case in cases_of(o)), *CLAMPED)
    if call_of(case)
]
LISTS = [case for case in COVERED if case.objective.family == "list"]


def with_gradients(
    run: Callable[[Case, dict[str, Tensor]], Outcome], case: Case, scores: dict[str, Tensor]
) -> tuple[Outcome, dict[str, Tensor]]:
    """Return an outcome and the gradient of the sum of all its weighted terms.

    Without the battery's anomaly detection, a fifth of this file's time: the pure functions' own
    tests have it, and a kernel's backward is one product.
    """
    copy, roots = leaves(scores)
    outcome = run(case, copy)
    total = sum(t.weight * t.values.sum() for t in outcome.terms)
    grads = torch.autograd.grad(total, list(roots.values()), allow_unused=True)
    pairs = zip(roots.items(), grads, strict=True)
    return outcome, {k: torch.zeros_like(r) if g is None else g for (k, r), g in pairs}


def by_kernel(case: Case, scores: dict[str, Tensor]) -> tuple[Outcome, dict[str, Tensor]]:
    """Return the outcome and its gradients by the kernel."""

    def run(case: Case, scores: dict[str, Tensor]) -> Outcome:
        outcome = fused.evaluate(case.objective, case.hyper, scores)
        assert outcome is not None
        return outcome

    return with_gradients(run, case, scores)


def assert_is_the_pure_function(case: Case, scores: dict[str, Tensor]) -> None:
    """Terms, rewards and gradients by the three-way rule in float32; NaN in every padded slot."""
    single, double = cast(scores, torch.float32), cast(scores, torch.float64)
    ours, grads = by_kernel(case, poison(single))
    plain, plain_grads = with_gradients(evaluate, case, single)
    truth, true_grads = with_gradients(evaluate, case, double)
    assert [t[1:] for t in ours.terms] == [t[1:] for t in plain.terms]
    for mine, same, true in zip(ours.terms, plain.terms, truth.terms, strict=True):
        assert_three_way(mine.values, same.values, true.values, f"term per {mine.per}")
    assert_three_way(ours.rewards, plain.rewards, truth.rewards, "rewards")
    assert not ours.rewards.requires_grad
    for name, grad in grads.items():
        assert_three_way(grad, plain_grads[name], true_grads[name], f"d{name}")


def scores_of(case: Case, sizes: list[int] | None = None, **options) -> dict[str, Tensor]:
    sizes = sizes or SIZES[case.objective.family]
    return make_scores(case.objective, sizes, hyper=case.hyper, **options)


# Every objective that has a kernel, with every hyper-parameter that chooses other code: the forms
# share links and transforms, so one of them alone would leave constants untried.
@pytest.mark.parametrize("case", COVERED, ids=repr)
def test_three_way(case):
    assert_is_the_pure_function(case, scores_of(case))
    assert_is_the_pure_function(case, scores_of(case, extreme=True, seed=1))


@pytest.mark.parametrize("case", COVERED, ids=repr)
def test_float64_values_keep_every_digit(case):
    scores = scores_of(case, seed=2)
    ours, _ = by_kernel(case, scores)
    bounds = condition(case, scores)
    truth = by_divisor(evaluate(case, scores))
    for per, values in by_divisor(ours).items():
        assert_rounded(values, truth[per], bounds[per], per)


@pytest.mark.parametrize("name", sorted({case.name for case in COVERED}))
def test_gradcheck(name):
    """In float64, against differences of the kernel's own losses."""
    case = next(case for case in COVERED if case.name == name)
    scores = {k: v[:1] for k, v in scores_of(case, seed=3).items()}
    call = call_of(case)

    def losses(score: Tensor) -> Tensor:
        outcome = fused.evaluate(case.objective, case.hyper, {**scores, call.score: score})
        return outcome.terms[0].values

    assert torch.autograd.gradcheck(losses, scores[call.score].clone().requires_grad_())


@pytest.mark.parametrize("case", LISTS, ids=repr)
def test_ties(case):
    """Grades and ranks that tie, by scores that do; a policy that equals its reference."""
    scores = scores_of(case, seed=4)
    for name in ("score", "rank"):
        if name in scores:
            scores[name] = (scores[name] * 2).round() / 2 if name == "score" else scores[name] // 2
    assert_is_the_pure_function(case, scores)
    scores = {k: torch.zeros_like(v) if k == "ratio" else v for k, v in scores.items()}
    assert_is_the_pure_function(case, scores)


@pytest.mark.parametrize(
    "case", [case for case in LISTS if "score" in case.objective.needs], ids=repr
)
def test_grades_below_zero(case):
    scores = scores_of(case, seed=5)
    assert_is_the_pure_function(case, {**scores, "score": scores["score"] - 1})


@pytest.mark.parametrize("case", LISTS, ids=repr)
def test_lists_of_several_blocks_of_rows(case, monkeypatch):
    """Blocks of two rows, and of one, as 1024 candidates have them."""
    for tile in (16, 8):
        monkeypatch.setattr(listwise, "TILE", tile)
        assert blocks(5) == {"BG": 1, "BI": tile // 8, "BK": 8}
        assert_is_the_pure_function(case, scores_of(case, [5, 2]))


def test_lists_beyond_the_kernel_are_the_functions_business():
    case = Case(OBJECTIVES["list_mle"], OBJECTIVES["list_mle"].hyper)
    assert blocks(MAX_CANDIDATES) == {"BG": 1, "BI": 1, "BK": MAX_CANDIDATES}
    scores = cast(scores_of(case, [MAX_CANDIDATES + 1]), torch.float32)
    assert fused.evaluate(case.objective, case.hyper, scores) is None


def test_log_probability_of_zero_has_finite_odds():
    """orpo: p = 1 to the last bit; the largest odds of the dtype, without gradient."""
    case = Case(OBJECTIVES["orpo"], OBJECTIVES["orpo"].hyper)
    for dtype in (torch.float32, torch.float64):
        scores = cast(scores_of(case), dtype)
        scores["mean_logps"][:3] = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [-1e-9, 1e-9]])
        ours, grads = by_kernel(case, scores)
        plain, same = with_gradients(evaluate, case, scores)
        eps = torch.finfo(dtype).eps
        for a, b in (
            (ours.terms[0].values, plain.terms[0].values),
            *zip(grads.values(), same.values(), strict=True),
        ):
            assert ((a - b).abs() <= 16 * eps * b.abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", ["dpo", "simpo", "lipo", "exo_rw", "pro"])
def test_nan_stays_in_its_group(name):
    case = Case(OBJECTIVES[name], OBJECTIVES[name].hyper)
    scores = cast(scores_of(case), torch.float32)
    expected, _ = by_kernel(case, scores)
    scores[call_of(case).score][0, 1] = float("nan")
    ours, grads = by_kernel(case, scores)
    assert ours.terms[0].values[0].isnan()
    assert torch.equal(ours.terms[0].values[1:], expected.terms[0].values[1:])
    assert not grads[call_of(case).score][1:].isnan().any()


@pytest.mark.parametrize("name", sorted({case.name for case in COVERED}))
def test_infinite_scores(name):
    """A probability of 0, the policy's or the reference's: what the function has, where it has."""
    case = next(case for case in COVERED if case.name == name)
    sizes = [2] if case.objective.family == "pair" else [3]
    scores, score = scores_of(case, sizes), call_of(case).score
    for slot, value in ((0, float("inf")), (1, -float("inf"))):
        scores[score] = scores[score].clone()
        scores[score][0, slot] = value
        single = cast(scores, torch.float32)
        ours, plain = by_kernel(case, single)[0], evaluate(case, single)
        truth = evaluate(case, scores)
        for mine, same, true in zip(ours.terms, plain.terms, truth.terms, strict=True):
            known = ~true.values.isnan()
            assert_three_way(mine.values[known], same.values[known], true.values[known])


class Counted:
    """A kernel, and how often it was launched."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("case", COVERED, ids=repr)
def test_one_launch_forward_and_backward(case, monkeypatch):
    counted = [Counted(pairwise.pair_kernel), Counted(listwise.list_kernel)]
    monkeypatch.setattr(pairwise, "pair_kernel", counted[0])
    monkeypatch.setattr(listwise, "list_kernel", counted[1])
    by_kernel(case, cast(scores_of(case), torch.float32))
    assert sum(kernel.launches for kernel in counted) == 1


@pytest.mark.parametrize("name", ["dpo", "plackett_luce"])
def test_same_bits_twice(name):
    case = Case(OBJECTIVES[name], OBJECTIVES[name].hyper)
    scores = cast(scores_of(case), torch.float32)
    (first, d), (second, e) = (by_kernel(case, scores) for _ in range(2))
    assert torch.equal(first.terms[0].values, second.terms[0].values)
    assert torch.equal(d["ratio"], e["ratio"])


def test_no_groups():
    for name in ("dpo", "lipo"):
        case = Case(OBJECTIVES[name], OBJECTIVES[name].hyper)
        scores = {k: v[:0] for k, v in scores_of(case).items()}
        outcome, _ = by_kernel(case, scores)
        assert outcome.terms[0].values.shape == (0,)


def test_bad_hyper_parameters_are_told_as_ever():
    scores = scores_of(Case(OBJECTIVES["dpo"], {}))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.7"):
        fused.evaluate(OBJECTIVES["dpo"], {"label_smoothing": 0.7}, scores)
    with pytest.raises(ValueError, match="unknown link 'cubic' of gpo"):
        fused.evaluate(OBJECTIVES["gpo"], {"link": "cubic"}, scores)


def test_a_moving_hyper_parameter_compiles_no_kernel(monkeypatch):
    monkeypatch.setattr(fused, "evaluate", lambda *_: pytest.fail("a kernel was asked for"))
    loss = PreferenceLoss("dpo_shift", nn.Linear(D, V, bias=False), lam=[0.75, 1.0])
    labels = torch.arange(6).view(2, 3)
    loss(torch.ones(2, 3, D), labels, ref_logps=torch.zeros(2, 3), backend="triton")


def test_an_objective_of_ones_own_is_never_taken_for_another():
    def dpo(ratio, mask):
        return Outcome((Term(ratio.sum(-1)),), ratio.detach())

    mine = Objective(dpo, "pair")
    assert fused.evaluate(mine, {}, scores_of(Case(OBJECTIVES["dpo"], {}))) is None


V, D = 20, 8
STEP = {
    "pairs": ({"dpo": 0.8, "cpo": 0.2}, 2),
    "lists": ({"lipo": 1.0, "sft": 0.5}, 3),
}


@pytest.mark.parametrize("kind", STEP)
def test_loss_module_runs_it(kind, monkeypatch):
    """Weighted groups, a mixture, metrics; twice through one graph; without gradient."""
    mixture, size = STEP[kind]
    g = torch.Generator().manual_seed(0)
    tokens = 2 * size * 3
    segments = Segments(
        response=torch.arange(2 * size).repeat_interleave(3),
        grid=torch.arange(2 * size).view(2, size),
        label=(torch.arange(size) == 0).expand(2, size),
        num_responses=2 * size,
        score=torch.rand(2, size, generator=g),
        weight=torch.tensor([0.25, 2.0]),
    )
    labels = torch.randint(V, (tokens,), generator=g)
    head = nn.Linear(D, V, bias=False).requires_grad_(False)
    loss = PreferenceLoss(mixture, head)
    ref_logps = -torch.rand(tokens, generator=g)
    hidden = torch.randn(tokens, D, generator=g)

    def step(dtype: torch.dtype, backend: str):
        head.to(dtype)
        states = hidden.to(dtype).requires_grad_()
        out = loss(states, labels, segments, ref_logps=ref_logps.to(dtype), backend=backend)
        (first,) = torch.autograd.grad(out.loss, states, retain_graph=True)
        (second,) = torch.autograd.grad(out.loss, states)
        assert torch.equal(first, second)
        return out, first

    counted = {}
    for module, name in ((pairwise, "pair_kernel"), (listwise, "list_kernel")):
        counted[name] = Counted(getattr(module, name))
        monkeypatch.setattr(module, name, counted[name])
    ours, grad = step(torch.float32, "triton")
    assert sum(kernel.launches for kernel in counted.values()) == (2 if kind == "pairs" else 1)
    plain, same = step(torch.float32, "torch")
    truth, true = step(torch.float64, "torch")
    assert_three_way(ours.loss, plain.loss, truth.loss, "loss")
    assert_three_way(ours.losses, plain.losses, truth.losses, "losses")
    assert_three_way(ours.rewards, plain.rewards, truth.rewards, "rewards")
    assert_three_way(grad, same, true, "dhidden")
    assert ours.metrics.keys() == plain.metrics.keys()
    for name, value in ours.metrics.items():
        terms = truth.rewards.abs().max().item()  # margins are differences of rewards
        assert_three_way(value, plain.metrics[name], truth.metrics[name], name, terms=terms)
    head.to(torch.float32)
    with torch.no_grad():
        again = loss(hidden, labels, segments, ref_logps=ref_logps, backend="triton")
    assert torch.equal(again.loss, ours.loss.detach())
