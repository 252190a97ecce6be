"""What the papers say of the regression objectives, and how they reduce to each other."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.objectives.pairwise import dpo, ipo, sppo
from fastpo.objectives.regression import (
    a2po,
    cal_dpo,
    copg,
    irepo,
    rebel,
    reward_aware,
    sppo_soft,
)
from fastpo.testing.three_way import assert_three_way

PAIR = torch.tensor([[True, True]])


def value(outcome) -> Tensor:
    return outcome.terms[0].values


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_sppo_soft_with_hard_probabilities_is_sppo(single: bool, half: bool) -> None:
    u, both = 9 * randn(6, 2), PAIR.expand(6, 2)
    hard = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    soft = value(sppo_soft(u, hard, both, beta=0.1, single=single, half=half))
    plain = value(sppo(u, both, beta=0.1, half=half))
    assert_three_way(soft, plain, plain)


def test_sppo_soft_single_ignores_the_rejected_score() -> None:
    u, both, p = randn(4, 2), PAIR.expand(4, 2), torch.rand(4, 2).double()
    complement = torch.stack((p[:, 0], 1 - p[:, 0]), -1)
    single = value(sppo_soft(u, p, both, single=True))
    assert torch.equal(single, value(sppo_soft(u, complement, both)))
    assert not torch.equal(single, value(sppo_soft(u, p, both)))


def test_cal_dpo_is_a_sum() -> None:
    u, both = 9 * randn(6, 2), PAIR.expand(6, 2)
    parts = value(dpo(u, both, beta=1.0)) + value(sppo(u, both, beta=0.01, half=True))
    assert torch.equal(value(cal_dpo(u, both, beta=0.01)), parts)


def test_rebel_is_solved_by_the_tilted_policy() -> None:
    """u = eta * reward + constant: loss and gradient are 0, whatever the constant."""
    q, both = randn(5, 2), PAIR.expand(5, 2)
    u = (4.0 * q + 8.0).requires_grad_()
    loss = value(rebel(u, q, both, eta=4.0))
    # |u| < 24: both differences are exact to 4 roundings of numbers below it
    assert (loss <= (4 * 24 * torch.finfo(torch.float64).eps) ** 2).all()
    swapped = value(rebel(u.flip(-1) + 1, q, both, eta=4.0))
    assert torch.equal(swapped, value(rebel(u + 1, q.flip(-1), both, eta=4.0)))


def test_rebel_with_constant_rewards_of_labels_is_ipo() -> None:
    u, both = randn(5, 2), PAIR.expand(5, 2)
    won = torch.tensor([[1.0, 0.0]]).double().expand(5, 2)
    ours = value(rebel(u, won, both, eta=5.0))
    assert torch.equal(ours, value(ipo(u, u, both, beta=0.1, average=False)))


def test_irepo_clips_unanimous_annotators() -> None:
    u, both = torch.zeros(1, 2).double(), PAIR
    sure = torch.tensor([[1.0, 0.0]]).double()
    logit = torch.tensor([0.75 / 0.25]).double().log()
    clipped = value(irepo(u, sure, both, clip=0.25))
    assert_three_way(clipped, logit**2, logit**2)
    assert value(irepo(u, sure, both, clip=0.0)).isinf()
    half = value(irepo(randn(1, 2), torch.full((1, 2), 0.5), both, beta=0.5))
    assert_three_way(half, (0.5 * (randn(1, 2)[:, 0] - randn(1, 2)[:, 1])) ** 2, half)
    with pytest.raises(ValueError, match=r"clip=0\.5 must be in"):
        irepo(u, sure, both, clip=0.5)


def test_reward_aware_tends_to_dpo() -> None:
    """Rewards 1000 apart: the target coin always lands heads, and KL is -log sigmoid(z)."""
    u, both = 9 * randn(6, 2), PAIR.expand(6, 2)
    far = torch.tensor([[500.0, -500.0]]).double().expand(6, 2)
    ours, plain = value(reward_aware(u, far, both)), value(dpo(u, both, beta=0.2))
    assert_three_way(ours, plain, plain)


@pytest.mark.parametrize("distance", ["bwd", "fwd", "sq"])
def test_reward_aware_is_zero_where_the_policy_agrees(distance: Any) -> None:
    u, both = 9 * randn(6, 2), PAIR.expand(6, 2)
    leaf = u.clone().requires_grad_()
    loss = value(reward_aware(leaf, u, both, beta=0.5, eta=0.5, distance=distance))
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert (loss == 0).all()
    assert (grad.abs() <= torch.finfo(torch.float64).eps).all()
    off = value(reward_aware(u + torch.tensor([1.0, 0.0]), u, both, beta=0.5, eta=0.5))
    assert (off > 0).all()


def test_reward_aware_distances_are_the_kls() -> None:
    u, q, both = 3 * randn(6, 2), randn(6, 2, seed=1), PAIR.expand(6, 2)
    p, r = (torch.distributions.Bernoulli(logits=x[:, 0] - x[:, 1]) for x in (u, q))
    kl = torch.distributions.kl_divergence
    bwd = value(reward_aware(u, q, both, beta=1.0, distance="bwd"))
    fwd = value(reward_aware(u, q, both, beta=1.0, distance="fwd"))
    # Each is a difference of log-probabilities no larger than the largest logit.
    terms = max(p.logits.abs().max().item(), r.logits.abs().max().item())
    assert_three_way(bwd, kl(r, p), kl(r, p), "bwd", terms=terms)
    assert_three_way(fwd, kl(p, r), kl(p, r), "fwd", terms=terms)
    assert not torch.allclose(kl(r, p), kl(p, r))
    with pytest.raises(ValueError, match="'kl' of reward_aware; use 'bwd', 'fwd' or 'sq'"):
        reward_aware(u, q, both, distance="kl")  # pyright: ignore[reportArgumentType]


def test_copg_of_half_a_reward_is_ipo() -> None:
    u, both = randn(5, 2), PAIR.expand(5, 2)
    q = torch.tensor([[0.25, -0.25]]).double().expand(5, 2)
    plain = 0.2**2 * value(ipo(u, u, both, beta=0.2, average=False))
    assert_three_way(value(copg(u, q, both, beta=0.2)), plain, plain)


def test_copg_gradient_is_the_leave_one_out_policy_gradient() -> None:
    u, q, live = randn(3, 5).requires_grad_(), randn(3, 5, seed=1), torch.ones(3, 5).bool()
    (grad,) = torch.autograd.grad(value(copg(u, q, live, beta=0.3)).sum(), u)
    rho = (q - 0.3 * u).detach()
    advantage = rho - (rho.sum(-1, keepdim=True) - rho) / 4
    assert_three_way(grad, -2 * 0.3 * advantage, -2 * 0.3 * advantage)


def test_a2po_value_lies_between_mean_and_best() -> None:
    """V* tends to the best reward as beta1 -> 0 and to the mean as it grows."""
    q, live = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double(), torch.ones(1, 4).bool()
    u = torch.zeros(1, 4).double()
    best, average = (value(a2po(u, q, live, beta1=b)).item() for b in (1e-4, 1e6))
    # (q - 1)^2 sums to 2 and (q - 1/2)^2 to 1; V* is off by beta1 log 2 and 1 / (8 beta1)
    assert abs(best - 2) <= 4 * 1e-4
    assert abs(average - 1) <= 1e-6


def test_trl_a2po() -> None:
    """A2POTrainer's loss, given V* of the same rewards; it takes one response per prompt."""
    module = pytest.importorskip("trl.experimental.a2po.a2po_trainer")
    u, q, live = 50 * randn(4, 3), torch.rand(4, 3).double(), torch.ones(4, 3).bool()
    u, q = u.float(), q.float()

    def ours(dtype: torch.dtype) -> Tensor:
        return value(a2po(u.to(dtype), q.to(dtype), live)).sum() / 12

    best = 0.5 * ((q / 0.5).logsumexp(-1) - torch.tensor(3.0).log())
    this = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(beta2=1e-3),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_sequence_logps=lambda *inputs: u.flatten(),
    )
    inputs = {
        **dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep")),
        "ref_logps": torch.zeros(12),
        "rewards": q.flatten(),
        "v_star": best.repeat_interleave(3),
    }
    theirs = module.A2POTrainer.compute_loss(this, None, inputs)
    assert_three_way(ours(torch.float32), theirs, ours(torch.float64), "a2po")
    assert_three_way(theirs, ours(torch.float32), ours(torch.float64), "peer's a2po")
