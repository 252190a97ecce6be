"""Batch objectives: what the mean over a whole batch is, however ranks share it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastpo import PreferenceLoss, Segments
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Outcome
from fastpo.objectives.batchwise import alpha_dpo, beta_dpo, maxmin
from fastpo.objectives.lipo import tie_keys
from fastpo.objectives.pairwise import dpo
from fastpo.objectives.reference_free import simpo
from fastpo.testing.three_way import assert_three_way

N = 7
Scores = dict[str, Tensor]


def batch(dtype: torch.dtype = torch.float64, n: int = N, seed: int = 0) -> Scores:
    """Named scores of n pairs; every float is a float32 number."""
    rng = torch.Generator().manual_seed(seed)
    logps, ref = (-40 * torch.rand((n, 2), generator=rng) for _ in range(2))
    length = torch.randint(2, 9, (n, 2), generator=rng)
    floats = {
        "logps": logps,
        "ref_logps": ref,
        "ratio": logps - ref,
        "mean_logps": logps / length,
        "mean_ratio": (logps - ref) / length,
    }
    return {
        **{name: value.to(dtype) for name, value in floats.items()},
        "tie_key": tie_keys(torch.arange(n), 2),
        "population": torch.tensor([4, 9, 4, 4, 9, 2, 9] * n)[:n],
        "mask": torch.ones(n, 2).bool(),
    }


def statistics(name: str, scores: Scores, **hyper) -> Scores:
    """What the engine hands over in its first step: observations of all ranks, reduced."""
    hyper, found = {**OBJECTIVES[name].hyper, **hyper}, {}
    for key, statistic in OBJECTIVES[name].statistics.items():
        values, where = statistic.of(scores, hyper)
        found[key] = statistic.reduce(values.detach()[where].double(), hyper).to(values.dtype)
    return found


def evaluate(name: str, scores: Scores, shared: Scores, **hyper) -> Outcome:
    named = {**scores, **shared}
    return OBJECTIVES[name](named, **hyper)


def loss_and_gradient(name: str, by: str, dtype: torch.dtype, ranks: int = 1, **hyper):
    """Mean over the batch and its gradient with respect to `by`, computed rank by rank."""
    scores = batch(dtype)
    shared, losses = statistics(name, scores, **hyper), []
    scores[by] = scores[by].clone().requires_grad_()
    for part in torch.arange(N).chunk(ranks):
        own = {key: value[part] for key, value in scores.items()}
        losses.append(evaluate(name, own, shared, **hyper).terms[0].values.sum() / N)
    loss = torch.stack(losses).sum()
    return loss.detach(), torch.autograd.grad(loss, scores[by])[0]


def plain_loss_and_gradient(formula: Callable[[Scores], Tensor], by: str, dtype: torch.dtype):
    scores = batch(dtype)
    scores[by] = scores[by].clone().requires_grad_()
    loss = formula(scores)
    return loss.detach(), torch.autograd.grad(loss, scores[by])[0]


def gap(x: Tensor) -> Tensor:
    return x[:, 0] - x[:, 1]


def sorted_link(above: Tensor, below: Tensor) -> Tensor:
    return -logsigmoid(0.3 * (above.sort().values - below.sort().values)).mean()


def dpo_losses(s: Scores) -> Tensor:
    return -logsigmoid(0.1 * gap(s["ratio"]))


def population_means(s: Scores) -> Tensor:
    losses = dpo_losses(s)
    return torch.stack([losses[s["population"] == c].mean() for c in (2, 4, 9)])


@pytest.mark.parametrize("ranks", [1, 2, N])
@pytest.mark.parametrize(
    ("name", "hyper", "by", "formula"),
    [
        (
            "aot",
            {"beta": 0.3},
            "logps",
            lambda s: sorted_link(gap(s["logps"]), gap(s["ref_logps"])),
        ),
        (
            "aot_unpaired",
            {"beta": 0.3},
            "ratio",
            lambda s: sorted_link(*s["ratio"].unbind(-1)),
        ),
        (
            "dr_dpo",
            {"beta_prime": 0.5},
            "ratio",
            lambda s: -0.5 * (-dpo_losses(s) / 0.5).exp().mean().log(),
        ),
        ("maxmin", {}, "ratio", lambda s: population_means(s).max()),
        (
            "maxmin",
            {"reduction": "softmax", "temperature": 0.5},
            "ratio",
            lambda s: 0.5 * (population_means(s) / 0.5).exp().mean().log(),
        ),
    ],
)
def test_batch_mean_is_the_formula(name, hyper, by, formula, ranks) -> None:
    """Value and gradient of the batch's own formula, whatever share of the batch a rank has."""
    for mine, plain, truth in zip(
        loss_and_gradient(name, by, torch.float32, ranks, **hyper),
        plain_loss_and_gradient(formula, by, torch.float32),
        plain_loss_and_gradient(formula, by, torch.float64),
        strict=True,
    ):
        assert_three_way(mine, plain, truth, name)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo", "dr_dpo", "maxmin"])
def test_a_single_pair_is_dpo(name: str) -> None:
    hyper = {"alpha": 0.0} if name == "beta_dpo" else {}
    for seed in range(4):
        single, double = batch(torch.float32, 1, seed), batch(torch.float64, 1, seed)
        mine = evaluate(name, single, statistics(name, single), beta=0.1, **hyper)
        plain, truth = (dpo(s["ratio"], s["mask"]) for s in (single, double))
        assert_three_way(mine.terms[0].values, plain.terms[0].values, truth.terms[0].values)
        assert_three_way(mine.rewards, plain.rewards, truth.rewards)


def test_equal_values_share_their_places() -> None:
    """All chosen log-ratios are 0, as before the first step: no pair is preferred to another."""
    scores = batch()
    scores["ratio"][:, 0] = 0
    shared = statistics("aot_unpaired", scores)
    ratio = scores["ratio"].requires_grad_()
    values = evaluate("aot_unpaired", scores, shared, beta=0.3).terms[0].values
    plain = -logsigmoid(0.3 * (0 - ratio[:, 1]))
    assert_three_way(values.mean(), plain.mean(), plain.mean(), "value")
    (grad,) = torch.autograd.grad(values.sum(), ratio)
    assert (grad[:, 0] == grad[0, 0]).all()
    (expected,) = torch.autograd.grad(plain.sum(), ratio)
    # The sum of all weights is that of any assignment of the equal ones.
    assert_three_way(grad[:, 0].sum(), -expected[:, 1].sum(), -expected[:, 1].sum(), "chosen")
    assert_three_way(grad[:, 1], expected[:, 1], expected[:, 1], "rejected")


def selected(scores: Scores, **hyper) -> Tensor:
    values = evaluate("beta_dpo", scores, statistics("beta_dpo", scores, **hyper), **hyper)
    return values.terms[0].values != 0


def test_beta_dpo_averages_the_selected_pairs() -> None:
    scores = batch(n=10)
    shared = statistics("beta_dpo", scores)
    values = evaluate("beta_dpo", scores, shared, rho=0.3).terms[0].values
    kept = values != 0
    assert kept.sum() == 7
    margin = gap(scores["ratio"])
    scale = 0.1 * (1 + 0.6 * (margin[kept].mean() - margin.mean()))
    expected = -logsigmoid(scale.clamp(min=1e-3) * margin[kept]).mean()
    assert_three_way(values.mean(), expected, expected, "mean of the selected")


def test_beta_dpo_without_its_additions_is_dpo() -> None:
    scores = batch()
    shared = statistics("beta_dpo", scores)
    values = evaluate("beta_dpo", scores, shared, rho=0.0, alpha=0.0).terms[0].values
    assert torch.equal(values, dpo(scores["ratio"], scores["mask"]).terms[0].values)


def test_beta_dpo_keeps_beta_above_its_minimum() -> None:
    u, keys, both = torch.tensor([[20.0, -20.0]]), torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
    draws, far, std = torch.tensor([[40.0, 0.0]]), torch.tensor([1e3]), torch.tensor([1.0])
    values = beta_dpo(u, keys, draws, far, std, both, beta_min=0.05).terms[0].values
    assert torch.equal(values, dpo(u, both, beta=0.05).terms[0].values)


def test_beta_dpo_draws_do_not_depend_on_order_or_ranks() -> None:
    scores, order = batch(n=20), torch.arange(20).flip(0)
    whole = selected(scores, rho=0.5)
    assert whole.sum() == 10
    assert torch.equal(selected({k: v[order] for k, v in scores.items()}, rho=0.5), whole[order])
    shared = statistics("beta_dpo", scores, rho=0.5)
    for part in torch.arange(20).chunk(3):
        own = {k: v[part] for k, v in scores.items()}
        values = evaluate("beta_dpo", own, shared, rho=0.5).terms[0].values
        assert torch.equal(values != 0, whole[part])
    other = selected({**scores, "tie_key": tie_keys(torch.arange(20), 2, step=1)}, rho=0.5)
    assert not torch.equal(other, whole)


@pytest.mark.slow
def test_beta_dpo_draws_by_gaussian_weight() -> None:
    """One pair of three is kept, 3000 times: frequencies within 5 standard deviations."""
    ratio = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]).double()
    weights = (-(((gap(ratio) - 2) / 2) ** 2) / 2).exp()  # mean 2, standard deviation 2
    chance = weights / weights.sum()
    counts, draws = torch.zeros(3).double(), 3000
    for seed in range(draws):
        keys = tie_keys(torch.arange(3), 2, seed=seed)
        scores = {"ratio": ratio, "tie_key": keys, "mask": torch.ones(3, 2).bool()}
        counts += selected(scores, rho=0.6)
    assert counts.sum() == draws
    deviation = (draws * chance * (1 - chance)).sqrt()
    assert ((counts - draws * chance).abs() < 5 * deviation).all()


def test_alpha_dpo_without_alpha_is_simpo() -> None:
    scores = batch()
    shared = statistics("alpha_dpo", scores)
    ours = evaluate("alpha_dpo", scores, shared, beta=2.0, gamma_beta_ratio=0.25, alpha=0.0)
    theirs = simpo(scores["mean_logps"], scores["mask"])
    assert torch.equal(ours.terms[0].values, theirs.terms[0].values)
    assert torch.equal(ours.rewards, theirs.rewards)


def test_alpha_dpo_stops_the_gradient_of_its_margin() -> None:
    scores = batch()
    leaves = {name: scores[name].requires_grad_() for name in ("mean_logps", "mean_ratio")}
    loss = evaluate("alpha_dpo", scores, statistics("alpha_dpo", scores)).terms[0].values.sum()
    logps, ratio = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert (logps != 0).all()
    assert ratio is None


def test_a_deviation_of_zero_leaves_the_margin_alone() -> None:
    s, both = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
    mean, std = torch.tensor([3.0]), torch.tensor([0.0])
    ours = alpha_dpo(s, s, mean, std, both, beta=2.0, gamma_beta_ratio=0.25)
    assert torch.equal(ours.terms[0].values, simpo(s, both).terms[0].values)


def test_dr_dpo_tends_to_dpo() -> None:
    """The cumulant expansion: mean l - var l / (2 b) + O(1 / b^2)."""
    scores, b = batch(), 1e5
    shared = statistics("dr_dpo", scores, beta_prime=b)
    ours = evaluate("dr_dpo", scores, shared, beta_prime=b).terms[0].values.mean()
    losses = dpo(scores["ratio"], scores["mask"]).terms[0].values
    off = losses.mean() - ours - losses.var(correction=0) / (2 * b)
    # |third central moment| / (6 b^2) <= range^3 / (6 b^2), and rounding of b * c
    spread = (losses.max() - losses.min()).item()
    assert abs(off) <= spread**3 / b**2 + 8 * b * torch.finfo(torch.float64).eps


def test_maxmin_of_one_population_is_dpo() -> None:
    scores = {**batch(), "population": torch.full((N,), 3)}
    shared = statistics("maxmin", scores)
    losses = dpo(scores["ratio"], scores["mask"]).terms[0].values
    for reduction in ("max", "softmax"):
        ours = evaluate("maxmin", scores, shared, reduction=reduction).terms[0].values
        assert_three_way(ours, losses, losses, reduction)


def test_maxmin_trains_the_worst_population_only() -> None:
    scores = batch()
    shared = statistics("maxmin", scores)
    worst = shared["populations"][shared["populations"][:, 1].argmax(), 0]
    ratio = scores["ratio"].requires_grad_()
    values = evaluate("maxmin", scores, shared).terms[0].values
    (grad,) = torch.autograd.grad(values.sum(), ratio)
    assert torch.equal(grad[:, 0] != 0, scores["population"] == worst)
    with pytest.raises(ValueError, match="'mean' of maxmin; use 'max' or 'softmax'"):
        evaluate("maxmin", scores, shared, reduction="mean")


def test_maxmin_tells_hashed_names_apart() -> None:
    """Numbers of 50 bits that differ in the last: single precision would merge them."""
    scores = batch(torch.float32)
    small = scores["population"]
    shared = statistics("maxmin", scores)
    expected = evaluate("maxmin", scores, shared).terms[0].values
    scores["population"] = 2**50 + small
    large = statistics("maxmin", scores)
    assert large["populations"].dtype == torch.float64
    assert torch.equal(evaluate("maxmin", scores, large).terms[0].values, expected)


def test_nothing_observed_is_finite() -> None:
    """A micro-batch of padding alone: every statistic of no observation still gives 0."""
    for name in ("aot", "aot_unpaired", "beta_dpo", "alpha_dpo", "dr_dpo", "maxmin"):
        scores = batch()
        scores["mask"] = torch.zeros_like(scores["mask"])
        outcome = evaluate(name, scores, statistics(name, scores))
        assert (outcome.terms[0].values == 0).all(), name


def test_engine_remembers_and_logs_scalars() -> None:
    """`momentum` weighs the past; a step's micro-batches count once; vectors are not logged."""
    torch.manual_seed(0)
    head = nn.Linear(8, 16, bias=False)
    labels = torch.randint(0, 16, (6, 5))
    steps = [(torch.randn(6, 5, 8), torch.randn(6, 5, 8)) for _ in range(2)]
    loss = PreferenceLoss("beta_dpo", head, momentum=0.75)
    means = []
    for hidden, ref in steps:
        with torch.no_grad():
            ref_logps = head(ref).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        out = loss(hidden, labels, ref_logps=ref_logps)
        margin = out.rewards[:, 0] - out.rewards[:, 1]
        means.append(margin.double().mean() / 0.1)
        logged = {name for name in out.metrics if name.startswith("beta_dpo/")}
        assert logged == {"beta_dpo/margin_mean", "beta_dpo/margin_std"}
        assert all(out.metrics[name].dim() == out.counts[name].dim() == 0 for name in logged)
    moving = 0.75 * means[0] + 0.25 * means[1]
    torch.testing.assert_close(out.metrics["beta_dpo/margin_mean"].double(), moving)


def test_engine_needs_populations() -> None:
    head = nn.Linear(8, 16, bias=False)
    hidden, labels = torch.randn(4, 3, 8), torch.randint(0, 16, (4, 3))
    with pytest.raises(ValueError, match="maxmin needs 'population': name each row's population"):
        PreferenceLoss("maxmin", head)(hidden, labels, ref_logps=torch.zeros(4, 3))
    table = Segments.pairs(2, 3)
    population = torch.tensor([1, 2])
    table = Segments(table.response, table.grid, table.label, 4, population=population)
    out = PreferenceLoss("maxmin", head)(
        hidden.flatten(0, 1), labels.flatten(), table, ref_logps=torch.zeros(12)
    )
    u = out.rewards / 0.1
    losses = dpo(u, torch.ones(2, 2).bool()).terms[0].values
    torch.testing.assert_close(out.loss.detach(), losses.max())
    assert maxmin is OBJECTIVES["maxmin"].fn


@pytest.mark.parametrize(
    "name", ["aot", "aot_unpaired", "beta_dpo", "alpha_dpo", "dr_dpo", "maxmin"]
)
def test_engine_joins_micro_batches(name: str) -> None:
    """With a step's observations taken beforehand, three micro-batches are one."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 10, 8, generator=rng), torch.randn(16, 8, generator=rng)
    labels = torch.randint(0, 16, (6, 10), generator=rng)
    ref = -3 * torch.rand(6, 10, generator=rng)
    population = torch.tensor([3, 5, 3, 3, 5, 5])

    def step(parts: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        loss, leaf = PreferenceLoss(name), hidden.to(dtype).requires_grad_()
        loss.step = 0

        def part(rows: list[int]) -> Tensor:
            table = Segments(
                torch.arange(2 * len(rows)).repeat_interleave(5),
                torch.arange(2 * len(rows)).view(-1, 2),
                torch.tensor([[True, False]] * len(rows)),
                2 * len(rows),
                population=population[rows],
                index=torch.tensor(rows),
            )
            return loss(
                leaf[rows].flatten(0, 1), labels[rows].flatten(), table,
                weight=weight.to(dtype), ref_logps=ref[rows].flatten().to(dtype),
                totals={"groups": 6},
            ).loss  # fmt: skip

        with loss.observing(), torch.no_grad():
            for rows in parts:
                part(rows)
        total = torch.stack([part(rows) for rows in parts]).sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    whole, cut = [[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4], [5]]
    for mine, plain, truth in zip(
        step(cut, torch.float32),
        step(whole, torch.float32),
        step(whole, torch.float64),
        strict=True,
    ):
        assert_three_way(mine, plain, truth, name)
