"""How the token-level objectives reduce to others, and what a token's own numbers do."""

from __future__ import annotations

import torch

from fastpo.objectives.pairwise import dpo
from fastpo.objectives.reference_free import simpo
from fastpo.objectives.token import critical_dpo, sparse_po, tdpo1, tis_dpo, treg, treg_simpo
from fastpo.testing.three_way import assert_three_way

from .test_families import PAIR, randn, value

B, T = 4, 5
BOTH = PAIR.expand(B, 2)
TOKENS = torch.arange(T) < torch.tensor([[5, 3], [1, 4], [2, 2], [3, 5]])[..., None]
LOGPS, REF = (randn(B, 2, T, seed=s) * TOKENS for s in (1, 2))
U = (LOGPS - REF).sum(-1)


def test_sparse_po_with_unit_masks_is_tdpo1_and_a_count() -> None:
    kl, one = randn(B, 2).abs(), torch.ones(B, 2, T).double()
    free = sparse_po(U, kl, one, one, TOKENS, BOTH, l1_weight=0.0)
    assert torch.equal(value(free), value(tdpo1(U, kl, BOTH)))
    exact = value(free) + TOKENS.sum((-2, -1))
    for prices in ({"l1_weight": 1.0}, {"l1_weight": 0.0, "kl_l1_weight": 1.0}):
        priced = value(sparse_po(U, kl, one, one, TOKENS, BOTH, **prices))
        assert_three_way(priced, exact, exact, "l1")


def test_sparse_po_gives_gradient_to_learned_masks() -> None:
    """d/da_t is beta * -sig(-z) * (log-ratio + divergence of the token) + l1, signed by side."""
    weights = randn(B, 2, T, seed=3).abs().requires_grad_()
    token_kl = randn(B, 2, T, seed=4).abs() * TOKENS
    ratio = (weights * (LOGPS - REF)).sum(-1)
    kl = (weights * token_kl).sum(-1)
    loss = value(sparse_po(ratio, kl, weights, weights, TOKENS, BOTH, beta=0.5, l1_weight=0.25))
    (grad,) = torch.autograd.grad(loss.sum(), weights)
    score = (ratio + kl).detach()
    slope = -0.5 * torch.sigmoid(-0.5 * (score[:, 0] - score[:, 1]))
    sides = torch.tensor([1.0, -1.0]).double()[None, :, None]
    exact = (slope[:, None, None] * sides * (LOGPS - REF + token_kl) + 0.25) * TOKENS
    assert_three_way(grad, exact, exact, "gradient")


def test_tis_dpo_without_divergence_is_dpo() -> None:
    kl = randn(B, 2).abs()
    assert torch.equal(value(tis_dpo(U, kl, BOTH, alpha=0.0)), value(dpo(U, BOTH)))
    # A divergence of the chosen response lowers its side, unlike TDPO's.
    assert (value(tis_dpo(U, kl * torch.tensor([1, 0]), BOTH)) > value(dpo(U, BOTH))).all()


def test_critical_dpo_of_single_tokens_is_dpo() -> None:
    first = TOKENS & (torch.arange(T) == 0)
    ones, u = torch.ones(B, 2, T).double(), (LOGPS - REF)[..., 0]
    loss = value(critical_dpo(u, LOGPS, REF, ones, first, BOTH))
    assert torch.equal(loss, value(dpo(u, BOTH)))


def test_critical_dpo_averages_over_the_longer_response() -> None:
    """Positions past both ends count in neither the sum nor the mean: more padding, same loss."""
    ones = torch.ones(B, 2, T).double()
    loss = value(critical_dpo(U, LOGPS, REF, ones, TOKENS, BOTH))
    logps, ref, weights, tokens = (
        torch.nn.functional.pad(x, (0, 3)) for x in (LOGPS, REF, ones, TOKENS)
    )
    padded = value(critical_dpo(U, logps, ref, weights, tokens, BOTH))
    assert_three_way(padded, loss, loss, "padding")
    x = 0.1 * (LOGPS - REF)
    links = torch.nn.functional.softplus(x[:, 1] - x[:, 0])
    exact = torch.stack([links[i, :n].mean() for i, n in enumerate((5, 4, 2, 5))])
    assert_three_way(loss, exact, exact, "loss")


def test_treg_without_rewards_is_its_base() -> None:
    none = torch.zeros(B, 2, T).double()
    assert torch.equal(value(treg(U, LOGPS, none, TOKENS, BOTH)), value(dpo(U, BOTH)))
    s = LOGPS.sum(-1) / TOKENS.sum(-1)
    assert torch.equal(value(treg_simpo(s, LOGPS, none, TOKENS, BOTH)), value(simpo(s, BOTH)))


def test_treg_moves_tokens_by_their_rewards() -> None:
    """Beside DPO's own gradient a token gets -alpha beta sig(-z) r: no gradient of the weight."""
    rewards = randn(B, 2, T, seed=5) * TOKENS
    for average in (False, True):
        logps = LOGPS.clone().requires_grad_()
        loss = value(treg(U, logps, rewards, TOKENS, BOTH, alpha=0.5, average=average))
        (grad,) = torch.autograd.grad(loss.sum(), logps)
        weight = 0.5 * 0.1 * torch.sigmoid(-0.1 * (U[:, 0] - U[:, 1]))
        exact = -weight[:, None, None] * rewards
        exact = exact / TOKENS.sum(-1, keepdim=True) if average else exact
        assert_three_way(grad, exact, exact, "gradient")
