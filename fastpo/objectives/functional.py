"""The objectives as plain functions on log-probabilities, for use in any training code.

Each stacks its arguments into the [G, K] scores that its objective takes and calls it: the
formulas, papers and defaults are documented there, and there is no second copy of them. B pairs
or responses, G lists of K candidates. Losses are per row and in the inputs' dtype; take their
mean. Rewards carry no gradient. Objectives with a likelihood term (CPO, ORPO, LOGO) return their
preference part only, as TRL's and Liger's loss functions do: add the NLL of the chosen responses.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import lipo, listwise, pairwise, pointwise, reference_free, token
from .base import Outcome
from .domain import FlipRate, NonNegative, Positive, in_domain


class PairLoss(NamedTuple):
    """Losses of B pairs and the implicit rewards of both sides."""

    losses: Tensor  # [B]
    chosen_rewards: Tensor  # [B], detached
    rejected_rewards: Tensor  # [B], detached


class PointLoss(NamedTuple):
    """Losses of B single responses and their implicit rewards."""

    losses: Tensor  # [B]
    rewards: Tensor  # [B], detached


class ListLoss(NamedTuple):
    """Losses of G lists and the implicit rewards of their candidates."""

    losses: Tensor  # [G]
    rewards: Tensor  # [G, K], detached


def _all(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """[B], [B] -> scores [B, 2] and their mask."""
    scores = torch.stack((chosen, rejected), dim=-1)
    return scores, _all(scores)


@in_domain
def _pair_loss(outcome: Outcome) -> PairLoss:
    return PairLoss(outcome.terms[0].values, *outcome.rewards.unbind(-1))


@in_domain
def _point_loss(outcome: Outcome) -> PointLoss:
    return PointLoss(outcome.terms[0].values, outcome.rewards.squeeze(-1))


@in_domain
def _list_loss(outcome: Outcome) -> ListLoss:
    return ListLoss(outcome.terms[0].values, outcome.rewards)


@in_domain
def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.0,
) -> PairLoss:
    """DPO, or cDPO with `label_smoothing`, on summed log-probs [B]: `pairwise.dpo`.

    >>> chosen, rejected, reference = torch.tensor([[-10.0], [-20.0], [-15.0]])
    >>> loss = dpo_loss(chosen, rejected, reference, reference)
    >>> loss.losses, loss.chosen_rewards, loss.rejected_rewards
    (tensor([0.3133]), tensor([0.5000]), tensor([-0.5000]))
    """
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.dpo(ratio, mask, beta=beta, label_smoothing=label_smoothing))


@in_domain
def robust_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.1,
) -> PairLoss:
    """Robust DPO on summed log-probs [B]: `pairwise.robust`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.robust(ratio, mask, beta=beta, label_smoothing=label_smoothing))


@in_domain
def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.1,
) -> PairLoss:
    """IPO on log-probs [B]: `pairwise.ipo`.

    Pass per-token means for the form its authors trained with, sums for the printed equation.
    Rewards are of what was passed.
    """
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.ipo(ratio, ratio, mask, beta=beta))


@in_domain
def hinge_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.1,
) -> PairLoss:
    """Hinge loss on summed log-probs [B]: `pairwise.hinge`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.hinge(ratio, mask, beta=beta))


@in_domain
def sppo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.001,
    half: bool = False,
) -> PairLoss:
    """SPPO with hard labels on summed log-probs [B]: `pairwise.sppo`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.sppo(ratio, mask, beta=beta, half=half))


@in_domain
def bco_pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Positive = 0.1,
) -> PairLoss:
    """BCO of both sides without shift, on summed log-probs [B]: `pairwise.bco_pair`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    return _pair_loss(pairwise.bco_pair(ratio, mask, beta=beta))


@in_domain
def simpo_loss(
    chosen_mean: Tensor,
    rejected_mean: Tensor,
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    label_smoothing: FlipRate = 0.0,
) -> PairLoss:
    """SimPO on per-token mean log-probs [B]: `reference_free.simpo`."""
    mean_logps, mask = _pairs(chosen_mean, rejected_mean)
    return _pair_loss(
        reference_free.simpo(
            mean_logps,
            mask,
            beta=beta,
            gamma_beta_ratio=gamma_beta_ratio,
            label_smoothing=label_smoothing,
        )
    )


@in_domain
def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.0,
) -> PairLoss:
    """The preference part of CPO on summed log-probs [B], which is DPO's without a reference."""
    logps, mask = _pairs(chosen, rejected)
    return _pair_loss(pairwise.dpo(logps, mask, beta=beta, label_smoothing=label_smoothing))


@in_domain
def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: NonNegative = 0.1) -> PairLoss:
    """The odds-ratio part of ORPO on per-token mean log-probs [B]: `reference_free.odds_ratio`."""
    return _pair_loss(reference_free.odds_ratio(*_pairs(chosen_mean, rejected_mean), beta=beta))


@in_domain
def tdpo1_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: Positive = 0.1,
) -> PairLoss:
    """TDPO1 on summed log-probs and summed KL(reference || policy) [B]: `token.tdpo1`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    kl, _ = _pairs(chosen_kl, rejected_kl)
    return _pair_loss(token.tdpo1(ratio, kl, mask, beta=beta))


@in_domain
def tdpo2_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
) -> PairLoss:
    """TDPO2 on summed log-probs and summed KL(reference || policy) [B]: `token.tdpo2`."""
    ratio, mask = _pairs(chosen - ref_chosen, rejected - ref_rejected)
    kl, _ = _pairs(chosen_kl, rejected_kl)
    return _pair_loss(token.tdpo2(ratio, kl, mask, beta=beta, alpha=alpha))


@in_domain
def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    label: Tensor,
    z0: Tensor,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> PointLoss:
    """KTO on summed log-probs [B] with labels [B] bool: `pointwise.kto`.

    `z0` [] is the mean log-ratio of mismatched responses over all ranks, detached; it is clamped
    at 0 here.
    """
    ratio = (logps - ref_logps)[:, None]
    return _point_loss(
        pointwise.kto(
            ratio,
            z0,
            label[:, None],
            _all(ratio),
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
    )


@in_domain
def bco_loss(
    logps: Tensor, ref_logps: Tensor, label: Tensor, shift: Tensor, *, beta: Positive = 0.1
) -> PointLoss:
    """BCO on summed log-probs [B] with labels [B] bool: `pointwise.bco`.

    `shift` [] is the running mean of beta * (logps - ref_logps), detached.
    """
    ratio = (logps - ref_logps)[:, None]
    return _point_loss(pointwise.bco(ratio, shift, label[:, None], _all(ratio), beta=beta))


@in_domain
def npo_loss(logps: Tensor, ref_logps: Tensor, *, beta: Positive = 0.1) -> PointLoss:
    """NPO on summed log-probs [B] of responses to forget: `pointwise.npo`."""
    ratio = (logps - ref_logps)[:, None]
    forget = torch.zeros_like(ratio, dtype=torch.bool)
    return _point_loss(pointwise.npo(ratio, forget, _all(ratio), beta=beta))


@in_domain
def lipo_loss(
    ratio: Tensor,
    score: Tensor,
    *,
    mask: Tensor | None = None,
    tie_key: Tensor | None = None,
    beta: Positive = 0.05,
    discount: Literal["log", "log2"] = "log",
) -> ListLoss:
    """LiPO-lambda on summed log-ratios and grades [G, K]: `lipo.lipo`.

    `mask` is False in padded slots, None where all lists have K candidates. `tie_key` [G, K]
    orders candidates of equal log-ratio; None draws it by row and slot with seed 0 and step 0.
    """
    if tie_key is None:
        rows = torch.arange(ratio.shape[0], device=ratio.device)
        tie_key = lipo.tie_keys(rows, ratio.shape[1])
    mask = _all(ratio) if mask is None else mask
    return _list_loss(lipo.lipo(ratio, score, tie_key, mask, beta=beta, discount=discount))


@in_domain
def plackett_luce_loss(
    ratio: Tensor, rank: Tensor, *, mask: Tensor | None = None, beta: Positive = 0.1
) -> ListLoss:
    """Plackett-Luce DPO on summed log-ratios and ranks [G, K], 0 best: `lipo.plackett_luce`.

    `mask` is False in padded slots, None where all lists have K candidates.
    """
    mask = _all(ratio) if mask is None else mask
    return _list_loss(lipo.plackett_luce(ratio, rank, mask, beta=beta))


@in_domain
def logo_loss(
    mean_logps: Tensor,
    *,
    mask: Tensor | None = None,
    beta: Positive = 10.0,
    gamma_beta_ratio: NonNegative = 0.3,
) -> ListLoss:
    """The preference part of LOGO on per-token mean log-probs [G, K], chosen first.

    `mask` is False in padded slots, None where all lists have K candidates.
    """
    mask = _all(mean_logps) if mask is None else mask
    return _list_loss(
        listwise.first_against_rest(mean_logps, mask, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    )
