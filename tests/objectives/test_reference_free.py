"""What the papers of the reference-free objectives say, and how they reduce to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives.pairwise import hinge, ipo
from fastpo.objectives.reference_free import alpha_po, cpo, repo, simper, simpo, slic, tpo
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way

B = 6
BOTH = torch.ones(B, 2).bool()
CHOSEN = torch.tensor([[True, False]]).expand(B, 2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Log-probabilities"""
    rng = torch.Generator().manual_seed(seed)
    return -2 * torch.rand(shape, generator=rng, dtype=torch.float64)


S = rand(B, 2)


def value(outcome, term: int = 0) -> Tensor:
    return outcome.terms[term].values


def test_simpo_hinge() -> None:
    ours = value(simpo(S, BOTH, gamma_beta_ratio=0.0, loss_type="hinge"))
    assert torch.equal(ours, value(hinge(S, BOTH, beta=2.0)))


def test_cpo_links() -> None:
    logps = 7 * S
    losses = {t: value(cpo(logps, S, CHOSEN, BOTH, loss_type=t)) for t in ("hinge", "ipo")}
    assert torch.equal(losses["hinge"], value(hinge(logps, BOTH)))
    assert torch.equal(losses["ipo"], value(ipo(logps, S, BOTH)))


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_only_the_sigmoid_smooths_labels(loss_type) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1, but loss_type=.*'sigmoid'"):
        cpo(S, S, CHOSEN, BOTH, label_smoothing=0.1, loss_type=loss_type)


def test_alpha_po_at_zero_is_simpo() -> None:
    plain = value(simpo(S, BOTH))
    exact, near = (
        value(alpha_po(S, BOTH, alpha=alpha, beta=2.0, gamma_beta_ratio=0.25))
        for alpha in (0.0, 1e-12)
    )
    # z = beta (s_w - s_l) - gamma, and SimPO factors beta out
    assert_three_way(exact, plain, plain, "alpha = 0")
    # rho = s - alpha s^2 / 2 + ..., so |dz| <= beta alpha max s^2 = 8e-12
    assert (near - plain).abs().max() <= 1e-11
    assert (near - plain).abs().max() > 0


def test_alpha_po_of_an_unlikely_response() -> None:
    """s = -400 in float32: 1 / p overflows there and its power alpha does not."""
    s = torch.tensor([[-1.0, -400.0], [-400.0, -400.0]], requires_grad=True)
    outcome = alpha_po(s, BOTH[:2], gamma_beta_ratio=0.0)
    (grad,) = torch.autograd.grad(value(outcome).sum(), s)
    assert value(outcome).tolist() == [0.0, torch.tensor(2.0).log().item()]
    assert not grad.isnan().any()


def test_simper_keeps_the_digits_of_close_likelihoods() -> None:
    """e^-2e-8 - e^-1e-8 in float32, where both exponentials are 1."""
    s = torch.tensor([[-1e-8, -2e-8], [-2e-8, -1e-8]])
    exact = value(simper(s.double(), BOTH[:2]))
    assert (exact.abs() > 9e-9).all()
    assert_three_way(value(simper(s, BOTH[:2])), exact.float(), exact, "loss")
    assert (s.exp() == 1).all()


def test_simper_gradient_is_the_likelihood() -> None:
    """Also at equal likelihoods, where the two ways to write the difference meet."""
    s = torch.cat([S, S[:, :1].expand(B, 2)]).requires_grad_()
    (grad,) = torch.autograd.grad(value(simper(s, torch.ones(2 * B, 2).bool())).sum(), s)
    plain = s.exp() * torch.tensor([-1.0, 1.0])
    assert_three_way(grad, plain, plain, "gradient")


def test_slic_is_a_hinge_and_a_likelihood() -> None:
    logps = 7 * S
    ranking, likelihood = slic(logps, S, CHOSEN, BOTH, sft_weight=0.3).terms
    assert torch.equal(ranking.values, value(hinge(logps, BOTH, beta=1.0)))
    assert torch.equal(likelihood.values, -logps[:, 0])
    assert (likelihood.per, likelihood.weight) == ("chosen_tokens", 0.3)


def test_repo_is_the_limit_of_simpo() -> None:
    """-logsig(x) / beta is within log(2) / beta of max(0, -x / beta)."""
    limit = value(repo(S, BOTH, gamma=0.25))
    for beta in (1e2, 1e4, 1e6):
        scaled = value(simpo(S, BOTH, beta=beta, gamma_beta_ratio=0.25)) / beta
        assert (scaled - limit).abs().max() <= 0.7 / beta
    assert (limit > 0).any()
    assert (limit == 0).any()


def test_tpo_is_cpo_with_the_likelihood_of_another_response() -> None:
    logps, gold = 7 * S, rand(B, seed=1)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        ours = tpo(logps, S, 9 * gold, gold, BOTH, beta=0.1, tpo_alpha=0.5, loss_type=loss_type)
        assert torch.equal(value(ours), value(cpo(logps, S, CHOSEN, BOTH, loss_type=loss_type)))
        assert (ours.terms[1].per, ours.terms[1].weight) == ("gold_tokens", 0.5)
        assert torch.equal(value(ours, 1), -9 * gold)
    for reduction, score in (("sequence_mean", gold), ("sum", 9 * gold)):
        likelihood = tpo(logps, S, 9 * gold, gold, BOTH, nll_reduction=reduction).terms[1]
        assert likelihood.per == "groups"
        assert torch.equal(likelihood.values, -score)
    with pytest.raises(ValueError, match="unknown reduction 'mean'; use one of"):
        tpo(logps, S, gold, gold, BOTH, nll_reduction="mean")  # pyright: ignore


def test_tpo_l_is_simpo_with_the_likelihood_of_another_response() -> None:
    gold = rand(B, seed=1)
    ours = tpo(7 * S, S, 9 * gold, gold, BOTH, beta=2.0, gamma=0.5, loss_type="tpo_l")
    assert_three_way(value(ours), value(simpo(S, BOTH)), value(simpo(S, BOTH)), "loss")
    assert torch.equal(value(ours, 1), -9 * gold)


def test_tpo_loss_type_is_checked() -> None:
    with pytest.raises(ValueError, match="'tpo-l' of tpo; use 'sigmoid', 'hinge', 'ipo' or"):
        tpo(S, S, S[:, 0], S[:, 0], BOTH, loss_type="tpo-l")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'simpo'; use 'sigmoid', 'hinge' or 'ipo'"):
        cpo(S, S, CHOSEN, BOTH, loss_type="simpo")  # pyright: ignore[reportArgumentType]


def test_gold_responses_reach_the_loss() -> None:
    """A pair and its gold response of two tokens: each has half the gradient of the NLL."""
    head = torch.nn.Linear(4, 7, bias=False)
    hidden = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = Segments(
        response=torch.tensor([0, 1, 2, 2]),
        grid=torch.tensor([[0, 1]]),
        label=CHOSEN[:1],
        num_responses=3,
        extras={"gold": torch.tensor([2])},
    )
    labels = torch.tensor([1, 2, 3, 4])
    loss = PreferenceLoss("tpo", head, beta=1e-9)(hidden, labels, segments)
    (grad,) = torch.autograd.grad(loss.loss, hidden)
    gold = torch.nn.functional.cross_entropy(head(hidden)[2:], labels[2:])
    (plain,) = torch.autograd.grad(gold, hidden)
    assert_three_way(grad[2:], plain[2:], plain[2:], "gradient")
    assert_three_way(loss.loss, gold + torch.tensor(2.0).log(), gold + torch.tensor(2.0).log())
