"""What the papers of the pointwise objectives and of the regularisers say, and how they reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Outcome
from fastpo.objectives.pairwise import apo_zero
from fastpo.objectives.pointwise import (
    apo_zero_unpaired,
    ga,
    kto,
    kto_humanline,
    kto_pair,
    kto_unlearn,
    npo,
    simnpo,
)
from fastpo.objectives.reference_free import tpo
from fastpo.objectives.regularisers import entropy, gold_sft, kl_retain, sft
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way

B = 6
BOTH = torch.ones(B, 2).bool()
CHOSEN = torch.arange(2).expand(B, 2) == 0
NONE = torch.zeros(B, 2).bool()
LENGTHS = torch.tensor([[3.0, 5.0], [4.0, 4.0], [1.0, 2.0]]).double().repeat(2, 1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


U = 10 * randn(B, 2)
S = -U.abs()


def value(outcome: Outcome, term: int = 0) -> Tensor:
    return outcome.terms[term].values


def statistic(objective: str, name: str, ratio: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """What the engine computes for an objective."""
    found = OBJECTIVES[objective].statistics[name]
    values, where = found.of({"ratio": ratio, "label": label, "mask": mask}, {})
    return found.reduce(values[where], {})


def test_apo_zero_unpaired_of_a_pair_is_apo_zero() -> None:
    ours, plain = value(apo_zero_unpaired(U, CHOSEN, BOTH)), value(apo_zero(U, BOTH))
    assert_three_way(ours, plain, plain)


def test_apo_zero_unpaired_weights() -> None:
    chosen, rejected = torch.sigmoid(-0.1 * U[:, 0]), torch.sigmoid(0.1 * U[:, 1])
    options = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    ours, by_hand = value(apo_zero_unpaired(U, CHOSEN, BOTH, **options)), 2 * chosen + 3 * rejected
    assert_three_way(ours, by_hand, by_hand)


def humanline(log_ratio: Tensor, **bounds: float) -> Outcome:
    """On six responses of four tokens, the last of which is padding."""
    tokens = torch.arange(4).expand(B, 1, 4) < 3
    one, label = BOTH[:, :1], CHOSEN.roll(1, 0)[:, :1]
    weights = torch.full((B, 1, 4), 0.5).double()
    reference = log_ratio.detach().clamp(max=0) - 1
    policy = reference + log_ratio
    return kto_humanline(
        policy, reference, weights, tokens, torch.tensor(0.25).double(), label, one, **bounds
    )


def test_humanline_within_its_bounds_is_kto() -> None:
    x = randn(B, 1, 4, seed=5)
    ratio = 0.5 * x[..., :3].sum(-1)
    plain = value(kto(ratio, torch.tensor(0.25).double(), CHOSEN.roll(1, 0)[:, :1], BOTH[:, :1]))
    ours = value(humanline(x, log_epsilon_p=-9.0, log_epsilon_r=9.0))
    assert_three_way(ours, plain, plain, terms=9.0)


def test_humanline_stops_the_gradient_of_tokens_outside() -> None:
    x = (3 * randn(B, 1, 4, seed=6)).requires_grad_()
    (grad,) = torch.autograd.grad(value(humanline(x)).sum(), x)
    inside = (x.abs() < 1.5) & (torch.arange(4) < 3)
    assert 0 < inside.sum() < 3 * B
    assert torch.equal(grad != 0, inside)


def test_kto_pair_takes_the_other_side() -> None:
    """Two runs of KTO, each with the reference point of the other side."""
    mask = BOTH.clone()
    mask[-1] = False
    u = U + torch.tensor([5.0, 3.0])
    z_chosen = statistic("kto_pair", "z_chosen", u, CHOSEN, mask)
    z_rejected = statistic("kto_pair", "z_rejected", u, CHOSEN, mask)
    assert_three_way(z_chosen, u[:-1, 0].mean(), u[:-1, 0].mean())
    assert_three_way(z_rejected, u[:-1, 1].mean(), u[:-1, 1].mean())
    ours = kto_pair(u, z_chosen, z_rejected, mask)
    chosen = kto(u, z_rejected, CHOSEN, mask & CHOSEN)
    rejected = kto(u, z_chosen, CHOSEN, mask & ~CHOSEN)
    both = value(chosen) + value(rejected)
    assert_three_way(value(ours), both, both)
    assert ours.terms[0].per == "responses"
    assert value(ours)[-1] == 0


def test_kto_pair_clamps_its_means() -> None:
    below, zero, above = (torch.tensor(x) for x in (-3.0, 0.0, 3.0))
    at_zero = value(kto_pair(U, zero, zero, BOTH))
    assert torch.equal(value(kto_pair(U, below, below, BOTH)), at_zero)
    assert torch.equal(at_zero, value(apo_zero_unpaired(U, CHOSEN, BOTH)))
    assert (value(kto_pair(U, zero, above, BOTH)) > at_zero).all()  # the chosen must gain more
    assert (value(kto_pair(U, above, zero, BOTH)) < at_zero).all()  # the rejected may


def test_simnpo_is_npo_of_means() -> None:
    ours = simnpo(S, CHOSEN, BOTH, beta=0.5, delta=0.0)
    plain = npo(S, CHOSEN, BOTH, beta=0.5)
    assert torch.equal(value(ours), value(plain))
    assert torch.equal(ours.rewards, plain.rewards)


def test_simnpo_delta() -> None:
    """open-unlearning subtracts it from the NLL: the mean log-prob at which the link is at 0."""
    at = value(simnpo(torch.tensor([[-0.75]]), NONE[:1, :1], BOTH[:1, :1], beta=2.0, delta=0.75))
    assert torch.equal(at, torch.tensor([2.0]).log())


def test_ga_is_the_limit_of_npo() -> None:
    """d npo / du is 2 sigmoid(beta u), 1 at beta = 0: that of the log-probability itself."""
    u = U.clone().requires_grad_()
    (ascent,) = torch.autograd.grad(value(ga(u, u / 3, CHOSEN, BOTH)).sum(), u)
    (limit,) = torch.autograd.grad(value(npo(u, CHOSEN, BOTH, beta=1e-9)).sum(), u)
    assert torch.equal(ascent, (~CHOSEN).double())
    # 2 sigmoid(x) = 1 + x / 2 + O(x^3)
    assert ((limit - ascent).abs() <= 1e-9 * U.abs()).all()


def test_ga_negates_sft() -> None:
    """On the responses of the other label."""
    for reduction in ("sum", "sequence_mean"):
        ours = ga(S, S / LENGTHS, CHOSEN, BOTH, reduction=reduction)
        likelihood = sft(S, S / LENGTHS, ~CHOSEN, BOTH, reduction=reduction)
        assert torch.equal(value(ours), -value(likelihood))
        assert ours.terms[0].per == "undesirable"
        assert likelihood.terms[0].per == "desirable"


def test_kto_unlearn_has_the_gradient_of_kto() -> None:
    """Where z0 is in units of the reward and undesirable responses weigh 2 / beta."""

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        u, z0 = U.float().to(dtype).requires_grad_(), torch.tensor(2.0, dtype=dtype)
        ours = kto_unlearn(u, z0, CHOSEN, BOTH, beta=0.5)
        plain = kto(u, z0 / 0.5, NONE, BOTH & ~CHOSEN, beta=0.5, undesirable_weight=4.0)
        ours, plain = (torch.autograd.grad(value(x).sum(), u)[0] for x in (ours, plain))
        return ours, plain

    (ours, plain), (_, truth) = gradients(torch.float32), gradients(torch.float64)
    assert_three_way(ours, plain, truth)


def test_kto_unlearn_takes_the_desirable_mean() -> None:
    z0 = statistic("kto_unlearn", "z0", U, CHOSEN, BOTH)
    assert_three_way(z0, U[:, 0].mean(), U[:, 0].mean())
    assert statistic("kto_unlearn", "z0", U, NONE, BOTH) == 0


def test_kto_unlearn_logsigmoid_is_shifted_npo() -> None:
    """1 - (2/beta) logsig(-beta (u - z0 / beta))"""
    z0 = torch.tensor(2.0).double()
    ours = value(kto_unlearn(U, z0, CHOSEN, BOTH, beta=0.5, link="logsigmoid"))
    shifted = 1 + value(npo(U - z0 / 0.5, CHOSEN, BOTH, beta=0.5))
    assert_three_way(ours, shifted, shifted)


UNKNOWN = [
    (lambda: ga(S, S, CHOSEN, BOTH, reduction="mean"), "'mean' of ga; use 'sum' or"),  # pyright: ignore
    (lambda: kto_unlearn(U, U[0, 0], CHOSEN, BOTH, link="log"), "'log' of kto_unlearn; use 'sig"),  # pyright: ignore
    (lambda: gold_sft(S[:, 0], S[:, 0], BOTH, reduction="mean"), "'mean'; use one of ..token_mean"),  # pyright: ignore
    (lambda: entropy(S, S, BOTH, reduction="sum"), "'sum' of entropy; use 'token_mean' or"),  # pyright: ignore
    (lambda: kl_retain(S, S, CHOSEN, BOTH, reduction="mean"), "'mean'; use 'token_mean', 'seq"),  # pyright: ignore
]


@pytest.mark.parametrize(("call", "message"), UNKNOWN, ids=["ga", "kto", "gold", "entropy", "kl"])
def test_unknown_options_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_gold_sft_is_what_tpo_adds(reduction) -> None:
    gold, mean = 4 * S[:, 0], S[:, 0]
    ranking, likelihood = tpo(
        S, S / 2, gold, mean, BOTH, tpo_alpha=0.5, nll_reduction=reduction
    ).terms
    assert torch.equal(ranking.values, value(tpo(S, S / 2, 0 * gold, 0 * mean, BOTH)))
    (ours,) = gold_sft(gold, mean, BOTH, reduction=reduction).terms
    assert torch.equal(likelihood.values, ours.values)
    assert likelihood.per == ours.per
    assert likelihood.weight == 0.5 * ours.weight
    assert torch.equal(ours.values, -mean if reduction == "sequence_mean" else -gold)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_kl_retain_averages_like_sft(reduction) -> None:
    """A divergence per response is averaged as the NLL is; that of forgotten ones is not used."""
    kl = U.abs()
    ours = kl_retain(kl, LENGTHS, CHOSEN, BOTH, reduction=reduction)
    likelihood = sft(-kl, -kl / LENGTHS, CHOSEN, BOTH, reduction=reduction)
    assert torch.equal(value(ours), value(likelihood))
    assert ours.terms[0].per == likelihood.terms[0].per


SEGMENTS = Segments(
    response=torch.arange(6).repeat_interleave(torch.tensor([3, 2, 4, 1, 2, 5])),
    grid=torch.tensor([[0, 1], [2, 3]]),
    label=torch.tensor([[True, False], [True, False]]),
    num_responses=6,
    extras={"gold": torch.tensor([4, 5])},
)


class Run(NamedTuple):
    """An objective on the hidden states of a batch of 17 tokens."""

    loss: Tensor  # []
    grad: Tensor  # [17, D]
    logps: Tensor  # [17, V] of the policy
    ref_logps: Tensor  # [17, V]
    labels: Tensor  # [17]


def run(objective: str | dict[str, float], dtype: torch.dtype = torch.float64, **hyper: Any) -> Run:
    rng = torch.Generator().manual_seed(3)
    hidden, reference, weight = (
        torch.randn(shape, generator=rng).to(dtype) for shape in ((17, 4), (17, 4), (8, 4))
    )
    labels = torch.randint(0, 8, (17,), generator=rng)
    hidden.requires_grad_()
    options = {"weight": weight, "ref_hidden": reference}
    out = PreferenceLoss(objective, **hyper)(hidden, labels, SEGMENTS, **options)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    logps, ref_logps = ((x @ weight.T).log_softmax(-1).detach() for x in (hidden, reference))
    return Run(out.loss.detach(), grad, logps, ref_logps, labels)


def tokens_of(*responses: int) -> Tensor:
    return torch.isin(SEGMENTS.response, torch.tensor(responses))


def assert_loss(
    objective: str, by_hand: Callable[[Run], Tensor], tokens: Tensor, **hyper: Any
) -> None:
    """The loss in plain PyTorch, and gradient on these tokens alone."""
    single, double = (run(objective, dtype, **hyper) for dtype in (torch.float32, torch.float64))
    assert_three_way(single.loss, by_hand(single), by_hand(double), objective)
    assert_three_way(by_hand(single), single.loss, double.loss, objective)
    assert (double.grad[tokens] != 0).any(-1).all()
    assert (double.grad[~tokens] == 0).all()


def test_entropy_bonus_of_a_model() -> None:
    """Minus the mean entropy of the candidates' tokens; gold answers are no candidates."""
    candidates = tokens_of(0, 1, 2, 3)

    def per_token(run: Run) -> Tensor:
        return -(run.logps.exp() * run.logps).sum(-1)

    def by_response(run: Run) -> Tensor:
        means = [per_token(run)[tokens_of(i)].mean() for i in range(4)]
        return -torch.stack(means).mean()

    assert_loss("entropy", lambda run: -per_token(run)[candidates].mean(), candidates)
    assert_loss("entropy", by_response, candidates, reduction="sequence_mean")


def test_kl_retain_of_a_model() -> None:
    """KL(reference || policy) over the tokens of the desirable responses, and no others."""
    retained = tokens_of(0, 2)

    def by_hand(run: Run) -> Tensor:
        return (run.ref_logps.exp() * (run.ref_logps - run.logps)).sum(-1)[retained].mean()

    assert_loss("kl_retain", by_hand, retained)


def test_gold_sft_of_a_model() -> None:
    gold = tokens_of(4, 5)

    def by_hand(run: Run) -> Tensor:
        return -run.logps[torch.arange(17), run.labels][gold].sum() / 2

    assert_loss("gold_sft", by_hand, gold, reduction="sum")


@pytest.mark.parametrize("forget", ["npo", "ga", "simnpo", "kto_unlearn"])
@pytest.mark.parametrize("retain", ["sft", "kl_retain"])
def test_unlearning_mixtures(forget: str, retain: str) -> None:
    """Each part has its own tokens; the mixture is their weighted sum."""
    forgotten, retained = tokens_of(1, 3), tokens_of(0, 2)
    parts = [run({name: 1.0}).grad for name in (forget, retain)]
    assert (parts[0][~forgotten] == 0).all()
    assert (parts[1][~retained] == 0).all()
    mixed = run({forget: 0.5, retain: 2.0}).grad
    by_hand = 0.5 * parts[0] + 2 * parts[1]
    assert_three_way(mixed, by_hand, by_hand)
    assert (mixed[forgotten | retained] != 0).any(-1).all()
