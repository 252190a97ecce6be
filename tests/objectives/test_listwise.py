"""What the papers of the list objectives say, and how they reduce to each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Outcome
from fastpo.objectives.lipo import (
    approx_ndcg,
    list_mle,
    listnet,
    pair_mse,
    plackett_luce,
    point_mse,
    point_sigmoid,
    tie_keys,
)
from fastpo.objectives.listwise import dpo_rw, exo_pref, exo_rw, infonca, logo, nca, pro, rrhf
from fastpo.objectives.pairwise import bco_pair, dpo, exo_pair, hinge, nca_pair
from fastpo.objectives.reference_free import simpo
from fastpo.objectives.regression import rebel
from fastpo.objectives.regularisers import sft
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way

B, K = 6, 4
BOTH, EVERY = torch.ones(B, 2).bool(), torch.ones(B, K).bool()
CHOSEN, BEST = torch.arange(2).expand(B, 2) == 0, torch.arange(K).expand(B, K) == 0
HARD = torch.tensor([[1.0, 0.0]]).double().expand(B, 2)
EPS = torch.finfo(torch.float64).eps


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS, LISTS = 10 * randn(B, 2), 10 * randn(B, K)
GRADES = torch.rand((B, K), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def value(outcome: Outcome, term: int = 0) -> Tensor:
    return outcome.terms[term].values


def run(name: str, u: Tensor, q: Tensor, mask: Tensor | None = None, **hyper) -> Outcome:
    """An objective of the table on log-ratios (or mean log-probs) and grades; the first is best."""
    named = {
        "ratio": u,
        "mean_logps": u,
        "logps": u,
        "score": q,
        "label": torch.arange(u.shape[1]).expand(u.shape) == 0,
        "tie_key": tie_keys(torch.arange(len(u)), u.shape[1]),
        "mask": torch.ones_like(u, dtype=torch.bool) if mask is None else mask,
    }
    objective = OBJECTIVES[name]
    return objective(named, **hyper)


REDUCTIONS = [
    ("list_mle", {}, dpo),
    ("pair_logistic", {}, dpo),
    ("listnet", {}, dpo),
    ("infonca", {}, dpo),
    ("dpo_rw", {"beta_r": 1e-4}, dpo),
    ("pair_hinge", {}, hinge),
    ("point_sigmoid", {}, bco_pair),
    ("nca", {}, nca_pair),
    ("exo_pref", {"label_smoothing": 0.1}, exo_pair),
]


@pytest.mark.parametrize(("name", "hyper", "pairwise"), REDUCTIONS, ids=[r[0] for r in REDUCTIONS])
def test_pair_with_hard_grades(name: str, hyper: dict, pairwise) -> None:
    options = {k: v for k, v in hyper.items() if k == "label_smoothing"}
    plain = pairwise(PAIRS, BOTH, beta=0.2, **options)
    ours = run(name, PAIRS, HARD, beta=0.2, **hyper)
    assert_three_way(value(ours), value(plain), value(plain), name)
    assert torch.equal(ours.rewards, plain.rewards)
    other = run(name, PAIRS, HARD, beta=0.3, **hyper)
    assert not torch.allclose(value(other), value(plain))


def test_pair_mse_of_a_pair_is_rebel() -> None:
    q = GRADES[:, :2]
    plain = 0.2**2 * value(rebel(PAIRS, q, BOTH, eta=5.0))
    assert_three_way(value(pair_mse(PAIRS, q, BOTH, beta=0.2)), plain, plain)


# Scores, grades and losses in the documentation and tests of Rax, in its digits. Its losses are
# sums here but for the last, a mean over 3 pairs, of a version that did not scale by the size.
RAX = [
    ("listnet", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 1.0, 1.4076059),
    ("pair_hinge", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 1.0, 2.0),
    ("pair_logistic", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 1.0, 1.6265235),
    ("point_sigmoid", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 1.0, 4.488777),
    ("point_mse", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 1.0, 11.0),
    ("pair_mse", [2.0, 1.0, 3.0], [1.0, 0.0, 0.0], 2.0, 16.0),  # both orders of a pair
    ("approx_ndcg", [0.0, 1.0, 3.0, 2.0], [0.0, 0.0, 1.0, 2.0], 1.0, -0.71789175),
    ("lipo", [0.3, 1.9, 1.2], [0.0, 1.0, 2.0], 1 / 3, 0.34675273),
]


@pytest.mark.parametrize(("name", "g", "q", "factor", "expected"), RAX, ids=[r[0] for r in RAX])
def test_values_of_rax(name: str, g: list, q: list, factor: float, expected: float) -> None:
    hyper = {"discount": "log2"} if name == "lipo" else {}
    single, double = (
        factor * value(run(name, *(torch.tensor([x]).to(d) for x in (g, q)), beta=1.0, **hyper))
        for d in (torch.float32, torch.float64)
    )
    peer = torch.tensor([expected])
    assert_three_way(single, peer, double, name)
    assert_three_way(peer, single, double, "Rax's")


@pytest.mark.parametrize(("name", "pairwise"), [("pair_logistic", dpo), ("pair_hinge", hinge)])
def test_list_is_the_sum_of_its_pairs(name: str, pairwise) -> None:
    """Of those with different grades: the last two of every list tie."""
    grades = GRADES.clone()
    grades[:, 3] = grades[:, 2]
    total = torch.zeros(B, dtype=torch.float64)
    for i in range(K):
        for j in range(K):
            losses = value(pairwise(LISTS[:, [i, j]], BOTH, beta=0.05))
            total += losses * (grades[:, i] > grades[:, j])
    assert_three_way(value(run(name, LISTS, grades)), total, total)


TIED = ["lipo", "list_mle", "pair_hinge", "pair_logistic", "rrhf", "pro"]


@pytest.mark.parametrize("name", TIED)
def test_tied_grades_are_not_compared(name: str) -> None:
    u = LISTS.clone().requires_grad_()
    loss = value(run(name, u, torch.full_like(u, 0.3).detach()))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert (loss == 0).all()
    assert (grad == 0).all()
    assert (value(run(name, u, GRADES)) != 0).any()


def test_list_mle_is_plackett_luce() -> None:
    """By the ranks of the grades; of the two that tie either may come first in the row."""
    grades = GRADES.clone()
    grades[:, 3] = grades[:, 1]
    ranks = (grades[:, None, :] > grades[:, :, None]).sum(-1)
    ours = value(list_mle(LISTS, grades, EVERY, beta=0.1))
    assert torch.equal(ours, value(plackett_luce(LISTS, ranks, EVERY)))
    order = [0, 3, 2, 1]
    swapped = value(list_mle(LISTS[:, order], grades[:, order], EVERY, beta=0.1))
    assert_three_way(swapped, ours, ours, "row order")


@pytest.mark.parametrize("discount", ["log", "log2"])
def test_lipo_normalised_by_the_ideal_order(discount) -> None:
    """Grades 2^q - 1 = 1, 3, 0: the ideal DCG is 3 / D(1) + 1 / D(2)."""
    u, q = randn(3, 3), torch.tensor([[1.0, 2.0, 0.0]]).double().expand(3, 3)
    plain = value(run("lipo", u, q, discount=discount))
    log = getattr(math, discount)
    by_hand = plain / (3 / log(2) + 1 / log(3))
    ours = value(run("lipo", u, q, discount=discount, normalise=True))
    assert_three_way(ours, by_hand, by_hand)


@pytest.mark.parametrize(("name", "hyper"), [("lipo", {"normalise": True}), ("approx_ndcg", {})])
def test_grades_below_zero_are_not_outranked_by_padding(name: str, hyper: dict) -> None:
    def alone(dtype: torch.dtype) -> Tensor:
        return value(run(name, LISTS[:, :2].to(dtype), GRADES[:, :2].to(dtype) - 1, **hyper))

    live = torch.arange(K).expand(B, K) < 2
    padded = value(run(name, LISTS.float(), GRADES.float() - 1, live, **hyper))
    assert_three_way(padded, alone(torch.float32), alone(torch.float64))


def test_lipo_of_zero_grades_is_zero() -> None:
    """Their ideal DCG is 0."""
    assert (value(run("lipo", LISTS, 0 * GRADES, normalise=True)) == 0).all()


@pytest.mark.parametrize("name", ["lipo", "infonca", "nca"])
def test_near_grades_keep_their_digits(name: str) -> None:
    """Grades 1e-6 apart: single precision has one digit of 2^q's difference, two of q / 1e-4's."""
    q = 0.5 + torch.arange(K).double().expand(B, K) * 2**-20
    single = value(run(name, LISTS.float(), q.float()))
    exact = value(run(name, LISTS.float().double(), q))
    assert_three_way(single, exact.float(), exact)


def test_lipo_size_is_that_of_the_live_list() -> None:
    mask = torch.arange(K) < torch.tensor([2, 3, 4, 2, 3, 4])[:, None]
    plain = value(run("lipo", LISTS, GRADES, mask))
    scaled = value(run("lipo", LISTS, GRADES, mask, scale_by_size=True))
    assert torch.equal(scaled, plain * torch.tensor([2, 3, 4, 2, 3, 4]))


def test_listnet_of_zero_grades_is_uniform() -> None:
    """As in Rax, and as the softmax of equal grades."""
    zero = value(listnet(LISTS, 0 * GRADES, EVERY, beta=0.1))
    uniform = value(infonca(LISTS, 0 * GRADES, EVERY, beta=0.1))
    assert_three_way(zero, uniform, uniform)
    assert not torch.allclose(zero, value(listnet(LISTS, GRADES, EVERY, beta=0.1)))


def test_approx_ndcg_tends_to_ndcg() -> None:
    """With a step for the sigmoid the ranks are the true ones: order 3, 1, 2 of gains 1, 3, 0."""
    u, q = torch.tensor([[1.0, 3.0, 2.0]]).double(), torch.tensor([[2.0, 1.0, 0.0]]).double()
    every = torch.ones(1, 3).bool()
    ours = value(approx_ndcg(u, q, every, beta=1.0, temperature=1e-3))
    ndcg = (3 / math.log2(4) + 1) / (3 + 1 / math.log2(3))
    expected = torch.tensor([-ndcg], dtype=torch.float64)
    assert_three_way(ours, expected, expected)
    perfect = value(approx_ndcg(q, q, every, beta=1.0, temperature=1e-3))
    assert_three_way(perfect, torch.tensor([-1.0]).double(), torch.tensor([-1.0]).double())


def test_approx_ndcg_of_zero_grades_has_no_gradient() -> None:
    u = LISTS.clone().requires_grad_()
    loss = value(approx_ndcg(u, 0 * GRADES, EVERY))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_point_losses_are_least_at_the_grades() -> None:
    """At g = q, and where sigmoid(g) = q."""
    for objective, u in ((point_mse, GRADES), (point_sigmoid, GRADES.logit())):
        leaf = (2 * u).requires_grad_()
        loss = value(objective(leaf, GRADES, EVERY, beta=0.5))
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        # sigmoid(logit(q)) is q to 4 roundings, and |g| < 10 here
        assert (grad.abs() <= 40 * EPS).all()
        for shift in (-0.1, 0.1):
            assert (value(objective(leaf + shift, GRADES, EVERY, beta=0.5)) > loss).all()


def categorical(logits: Tensor) -> torch.distributions.Categorical:
    return torch.distributions.Categorical(logits=logits)


def test_exo_and_dpo_are_the_two_kls() -> None:
    """KL(p || t), and KL(t || p) + H(t)."""
    p, t = categorical(0.5 * LISTS), categorical(GRADES / 0.5)
    kl = torch.distributions.kl_divergence
    reverse, forward = value(exo_rw(LISTS, GRADES, EVERY)), value(dpo_rw(LISTS, GRADES, EVERY))
    # Each is a sum of products with log-probabilities, none larger than the largest of them.
    terms = max(-x.logits.min().item() for x in (p, t))
    assert_three_way(reverse, kl(p, t), kl(p, t), "exo", terms=terms)
    cross = kl(t, p) + t.entropy()
    assert_three_way(forward, cross, cross, "dpo", terms=terms)


@pytest.mark.parametrize("name", ["exo_rw", "dpo_rw"])
def test_solved_by_the_tilted_policy(name: str) -> None:
    """beta u = q / beta_r + constant: gradient 0, and for the reverse KL loss 0."""
    u = (GRADES / 0.2 / 0.5 + 7).requires_grad_()
    loss = value(run(name, u, GRADES, beta_r=0.2))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    # Both softmaxes are good to some roundings of exponents below 10
    assert (grad.abs() <= 40 * EPS).all()
    if name == "exo_rw":
        assert (loss.abs() <= 40 * EPS).all()


def test_exo_pref_labels_need_not_be_one() -> None:
    """Two of four are desirable: t is (1-e, 1-e, e, e) / 2, and all or none are uniform."""
    label = (torch.arange(K) < 2).expand(B, K)
    target = torch.tensor([0.9, 0.9, 0.1, 0.1], dtype=torch.float64).log().expand(B, K)
    ours = value(exo_pref(LISTS, label, EVERY, label_smoothing=0.1))
    rewards = value(exo_rw(LISTS, target, EVERY, beta_r=1.0))
    assert_three_way(ours, rewards, rewards)
    uniform = value(exo_rw(LISTS, 0 * GRADES, EVERY))
    for every in (EVERY, ~EVERY):
        same = value(exo_pref(LISTS, every, EVERY))
        assert_three_way(same, uniform, uniform)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_exo_pref_needs_smoothing(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"label_smoothing={rate} must be in \(0, 0.5\)"):
        exo_pref(PAIRS, CHOSEN, BOTH, label_smoothing=rate)


def test_infonca_gradient() -> None:
    """beta (softmax(g) - t)"""
    u = LISTS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(infonca(u, GRADES, EVERY, beta=0.1, alpha=0.5)).sum(), u)
    by_hand = 0.1 * ((0.1 * LISTS).softmax(-1) - (GRADES / 0.5).softmax(-1))
    assert_three_way(grad, by_hand, by_hand)


def test_nca_gradient_is_of_each_response_alone() -> None:
    """beta (sigmoid(g_i) / K - t_i sigmoid(-g_i)): the best gains likelihood in any company."""
    u = LISTS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(nca(u, GRADES, EVERY, beta=0.1, alpha=0.5)).sum(), u)
    g, t = 0.1 * LISTS, (GRADES / 0.5).softmax(-1)
    by_hand = 0.1 * (torch.sigmoid(g) / K - t * torch.sigmoid(-g))
    assert_three_way(grad, by_hand, by_hand)


def test_pro_of_a_pair_is_simpo() -> None:
    """Without its margin, and with the difference of the grades for beta."""
    s = -PAIRS.abs()
    ours = pro(7 * s, s, 3 * HARD, CHOSEN, BOTH)
    plain = value(simpo(s, BOTH, beta=3.0, gamma_beta_ratio=0.0))
    assert_three_way(value(ours), plain, plain)
    assert torch.equal(value(ours, 1), -7 * s[:, 0])  # (K - 1)^2 = 1


def test_pro_ranks_each_response_against_the_worse() -> None:
    """Grades 2, 1, 0 by the equation as printed, T the temperature: r is divided by it."""
    s, q = -LISTS[:, :3].abs(), torch.tensor([[2.0, 1.0, 0.0]]).double().expand(B, 3)
    a, b, c = s.unbind(-1)
    first = (2 * a).exp() / ((2 * a).exp() + b.exp() + (2 * c).exp())
    by_hand = -first.log() - (b.exp() / (b.exp() + c.exp())).log()
    ours = pro(s, s, q, BEST[:, :3], EVERY[:, :3])
    assert_three_way(value(ours), by_hand, by_hand)
    assert torch.equal(value(ours, 1), -4 * a)  # (K - 1)^2 times the NLL


def test_rrhf() -> None:
    """Nothing to gain where likelihoods are in order; else what they are apart, plus SFT."""
    s = -LISTS.abs()
    order = s.argsort(descending=True)
    q = torch.zeros_like(s).scatter(1, order, torch.tensor([3.0, 2, 1, 0]).double().expand(B, K))
    ordered = rrhf(5 * s, s, q, BEST, EVERY)
    assert (value(ordered) == 0).all()
    assert torch.equal(value(ordered, 1), value(sft(5 * s, s, BEST, EVERY)))
    wrong = value(rrhf(5 * s, s, -q, BEST, EVERY, rrhf_weight=100.0))
    gaps = [(s[:, i] - s[:, j]).abs() for i in range(K) for j in range(i)]
    by_hand = torch.stack(gaps).sum(0)
    assert_three_way(wrong, by_hand, by_hand)
    assert rrhf(s, s, q, BEST, EVERY, rrhf_weight=100.0).terms[0].weight == 100


@pytest.mark.parametrize("name", ["point_mse", "point_sigmoid"])
def test_point_losses_take_a_list_of_one(name: str) -> None:
    """Which the losses that compare refuse."""
    single = Segments(
        response=torch.tensor([0, 0]),
        grid=torch.tensor([[0]]),
        label=torch.tensor([[True]]),
        num_responses=1,
        score=torch.tensor([[0.5]]),
    )
    hidden, weight = torch.randn(2, 4), torch.randn(8, 4)
    arguments = (hidden, torch.tensor([1, 2]), single)
    options = {"weight": weight, "ref_logps": torch.zeros(2)}
    assert PreferenceLoss(name)(*arguments, **options).loss.isfinite()
    with pytest.raises(ValueError, match="list_mle compares lists"):
        PreferenceLoss("list_mle")(*arguments, **options)


def test_lists_from_hidden_states() -> None:
    """Every list objective of these files on a packed batch with a shorter list."""
    torch.manual_seed(0)
    segments = Segments(
        response=torch.arange(5).repeat_interleave(3),
        grid=torch.tensor([[0, 1, 2], [3, 4, -1]]),
        label=torch.tensor([[True, False, False], [True, False, False]]),
        num_responses=5,
        score=torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        rank=torch.tensor([[0, 1, 2], [0, 1, 0]]),
    )
    labels, weight = torch.randint(0, 8, (15,)), torch.randn(8, 4)
    names = [n for n, o in OBJECTIVES.items() if o.fn.__module__.endswith(("lipo", "listwise"))]
    assert names
    for name in names:
        hidden = torch.randn(15, 4, requires_grad=True)
        options = {"weight": weight, "ref_logps": -torch.ones(15)}
        loss = PreferenceLoss(name)(hidden, labels, segments, **options)
        (grad,) = torch.autograd.grad(loss.loss, hidden)
        assert loss.rewards[1, 2] == 0
        assert grad.isfinite().all(), name
        assert (grad != 0).any(), name


@pytest.mark.parametrize("rejected", [1, 2, 3])
def test_logo_divides_by_the_responses_beside_the_chosen_one(rejected: int) -> None:
    """In Python's numbers, with K - 1 live slots of three."""
    beta, ratio = 2.0, 0.3
    mask = torch.arange(K) <= rejected
    preference = value(
        logo(LISTS, LISTS, BEST, mask.expand(B, K), beta=beta, gamma_beta_ratio=ratio)
    )
    for loss, (chosen, *others) in zip(preference.tolist(), LISTS.tolist(), strict=True):
        mean = math.fsum(others[:rejected]) / rejected
        expected = math.log1p(math.exp(-beta * (chosen - mean - ratio)))
        assert loss == pytest.approx(expected, rel=64 * EPS, abs=0)
