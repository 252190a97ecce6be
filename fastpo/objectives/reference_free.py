r"""Objectives on pairs that need no reference model, in the notation of `pairwise`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.domain import FlipRate, NonNegative, Positive

from .base import Objective, Outcome, catalogue
from .links import (
    Link,
    check_smoothing,
    live,
    log_odds,
    logistic,
    sigmoid_or_hinge,
    smoothed_logistic,
)
from .pairwise import divergence_margin, margin_of, pair_outcome
from .regularisers import Reduction, gold_nll, nll


def simpo(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    label_smoothing: FlipRate = 0.0,
    loss_type: Link = "sigmoid",
) -> Outcome:
    r"""SimPO: length-normalised, reference-free, with a target margin $\gamma$.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad
    z = \beta(s_w - s_l) - \gamma, \quad \gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$$

    `loss_type="hinge"` has $\max(0, 1 - z)$. The official code's optional SFT term and CPO-SimPO
    are the mixture {simpo: 1, sft: weight}.
    Reward $\beta s$. Paper: https://arxiv.org/abs/2405.14734

    >>> import torch
    >>> simpo(torch.tensor([[-1.0, -1.25]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    z = beta * (margin_of(mean_logps, mask) - gamma_beta_ratio)
    losses = sigmoid_or_hinge(z, loss_type, label_smoothing)
    return pair_outcome(losses, beta * mean_logps, mask)


def _link_losses(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    beta: float,
    label_smoothing: float,
    loss_type: Literal["sigmoid", "hinge", "ipo"],
) -> Tensor:
    """Return the losses [G] of CPO and TPO: a link on sums, or IPO's square on means."""
    if loss_type in ("sigmoid", "hinge"):
        return sigmoid_or_hinge(beta * margin_of(logps, mask), loss_type, label_smoothing)
    if loss_type != "ipo":
        raise ValueError(f"unknown loss_type {loss_type!r}; use 'sigmoid', 'hinge' or 'ipo'")
    check_smoothing(loss_type, label_smoothing)
    return (margin_of(mean_logps, mask) - 1 / (2 * beta)).square()


def cpo(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    label: Tensor,  # [G, 2] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.0,
    cpo_alpha: NonNegative = 1.0,
    nll_reduction: Reduction = "token_mean",
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
) -> Outcome:
    r"""Contrastive preference optimisation: DPO with a uniform reference, plus NLL on the chosen.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z) + \alpha\,\mathrm{NLL}(y_w), \quad
    z = \beta(S_w - S_l)$$

    The NLL runs over response tokens only. Other `loss_type`s are TRL's: `hinge` is
    $\max(0, 1 - z)$, `ipo` is $(s_w - s_l - 1/(2\beta))^2$ of means. Reward $\beta S$.
    Paper: https://arxiv.org/abs/2401.08417

    >>> import torch
    >>> logps = torch.tensor([[-10.0, -20.0]])
    >>> preference, likelihood = cpo(
    ...     logps, logps / 5, torch.tensor([[True, False]]), torch.tensor([[True, True]])
    ... ).terms
    >>> preference.values, likelihood.values, likelihood.per
    (tensor([0.3133]), tensor([10.]), 'chosen_tokens')
    """
    losses = _link_losses(logps, mean_logps, mask, beta, label_smoothing, loss_type)
    preference = pair_outcome(losses, beta * logps, mask)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction, weight=cpo_alpha)
    return Outcome((*preference.terms, likelihood), preference.rewards)


def odds_ratio(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: NonNegative = 0.1,
) -> Outcome:
    r"""Return ORPO's preference part, $-\beta\log\sigma(\mathrm{logodds}_w - \mathrm{logodds}_l)$.

    >>> import torch
    >>> s = torch.tensor([[0.8, 0.5]]).log()
    >>> odds_ratio(s, torch.tensor([[True, True]]), beta=1.0).terms[0].values  # log(1 + 1/4)
    tensor([0.2231])
    """
    # A padded slot is 0, a probability of 1, whose log-odds are large but finite.
    z = margin_of(log_odds(live(mean_logps, mask)), mask)
    return pair_outcome(beta * logistic(z), beta * mean_logps, mask)


def orpo(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    label: Tensor,  # [G, 2] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: NonNegative = 0.1,
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""ORPO: NLL on the chosen response plus a penalty on its odds ratio to the rejected one.

    $$\mathrm{NLL}(y_w) - \beta\log\sigma\left(\log\frac{p_w}{1-p_w} - \log\frac{p_l}{1-p_l}\right),
    \quad p = e^s$$

    `beta` is the paper's $\lambda$. The NLL runs over response tokens, as in the paper; TRL also
    trains on the prompt. Reward $\beta s$. Paper: https://arxiv.org/abs/2403.07691

    >>> import torch
    >>> s = torch.tensor([[0.8, 0.5]]).log()
    >>> both = torch.tensor([[True, True]])
    >>> odds, likelihood = orpo(3 * s, s, torch.tensor([[True, False]]), both).terms
    >>> odds.values, likelihood.values
    (tensor([0.0223]), tensor([0.6694]))
    """
    preference = odds_ratio(mean_logps, mask, beta=beta)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction)
    return Outcome((*preference.terms, likelihood), preference.rewards)


def alpha_po(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    alpha: float = 0.25,
    beta: Positive = 2.5,
    gamma_beta_ratio: NonNegative = 0.04,
    label_smoothing: FlipRate = 0.0,
) -> Outcome:
    r"""AlphaPO: SimPO with another shape of reward, a power of the likelihood for its logarithm.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad
    z = \beta(\rho_w - \rho_l) - \gamma, \quad \rho = \frac{1 - e^{-\alpha s}}{\alpha}, \quad
    \gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$$

    $\alpha \to 0$ is SimPO. Defaults are the paper's for Mistral, $\gamma = 0.1$. Reward
    $\beta\rho$. Paper: https://arxiv.org/abs/2501.03884. Not verified against official code.

    >>> import torch
    >>> s = torch.tensor([[0.5, 0.25]]).log()  # rho = 1 - 1/p at alpha = 1
    >>> both = torch.tensor([[True, True]])
    >>> alpha_po(s, both, alpha=1.0, beta=0.5, gamma_beta_ratio=2.0).terms[0].values
    tensor([0.6931])
    """
    z = divergence_margin(mean_logps, mask, beta, "alpha", 1 - alpha, None)
    losses = smoothed_logistic(z - beta * gamma_beta_ratio, label_smoothing)
    rho = mean_logps if alpha == 0 else torch.expm1(-alpha * mean_logps) / -alpha
    return pair_outcome(losses, beta * rho, mask)


def simper(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
) -> Outcome:
    r"""SimPER: raises the chosen and lowers the rejected response's inverse perplexity.

    $$-e^{s_w} + e^{s_l}$$

    No hyper-parameters. Reward $e^s$. Paper: https://arxiv.org/abs/2502.00883

    >>> import torch
    >>> s = torch.tensor([[0.75, 0.5]]).log()
    >>> simper(s, torch.tensor([[True, True]])).terms[0].values
    tensor([-0.2500])
    """
    chosen, rejected = live(mean_logps, mask).unbind(-1)
    # e^a - e^b as e^b (e^(a-b) - 1) for the smaller b: the digits of close ones are kept.
    gap = chosen - rejected
    above = chosen.exp() * torch.expm1(-gap.clamp(min=0))
    below = rejected.exp() * torch.expm1(gap.clamp(max=0))
    return pair_outcome(torch.where(gap > 0, above, -below), mean_logps.exp(), mask)


def slic(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    label: Tensor,  # [G, 2] bool
    mask: Tensor,  # [G, 2] bool
    *,
    delta: NonNegative = 1.0,
    sft_weight: NonNegative = 0.1,
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""SLiC-HF: a hinge on the difference of log-probabilities, plus NLL on the chosen response.

    $$\max(0, \delta - S_w + S_l) + \lambda\,\mathrm{NLL}(y_w)$$

    Defaults are those of HALOs. The paper's NLL may also be of the SFT data's own responses: then
    mix in `sft` rows. `hinge` is the same link on log-ratios. Reward $S$.
    Paper: https://arxiv.org/abs/2305.10425. Not verified against official code.

    >>> import torch
    >>> logps = torch.tensor([[-10.0, -10.5]])
    >>> ranking, likelihood = slic(
    ...     logps, logps / 5, torch.tensor([[True, False]]), torch.tensor([[True, True]])
    ... ).terms
    >>> ranking.values, likelihood.values, likelihood.weight
    (tensor([0.5000]), tensor([10.]), 0.1)
    """
    ranking = pair_outcome((delta - margin_of(logps, mask)).relu(), logps, mask)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction, weight=sft_weight)
    return Outcome((*ranking.terms, likelihood), ranking.rewards)


def repo(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    gamma: NonNegative = 0.4,
) -> Outcome:
    r"""RePO: SimPO's limit of large $\beta$, a hinge that ignores pairs with enough margin.

    $$\max(0, \gamma - (s_w - s_l))$$

    $\gamma$ in [0, 1] is SimPO's `gamma_beta_ratio`. Reward $s$.
    Paper: https://arxiv.org/abs/2503.07426

    >>> import torch
    >>> repo(torch.tensor([[-1.0, -1.25]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.1500])
    """
    return pair_outcome((gamma - margin_of(mean_logps, mask)).relu(), mean_logps, mask)


def tpo(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    gold_logps: Tensor,  # [G]
    gold_mean_logps: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    tpo_alpha: NonNegative = 1.0,
    gamma: NonNegative = 0.5,
    label_smoothing: FlipRate = 0.0,
    loss_type: Literal["sigmoid", "hinge", "ipo", "tpo_l"] = "sigmoid",
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""Triple preference optimisation: CPO with the NLL on a third, gold response.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z) + \alpha\,\mathrm{NLL}(y_{gold}),
    \quad z = \beta(S_w - S_l)$$

    `loss_type`: `tpo_l` is the paper's length-normalised TPO-L, $z = \beta(s_w - s_l) - \gamma$;
    `hinge` and `ipo` are as in `cpo`. The gold response is the extra `gold`; its NLL is reduced as
    in `sft`, by default over the gold tokens of the whole optimiser step (TRL and the official
    code: of a micro-batch). Reward $\beta S$, or $\beta s$ where means are compared.
    Paper: https://arxiv.org/abs/2405.16681

    >>> import torch
    >>> logps, both = torch.tensor([[-10.0, -10.0]]), torch.tensor([[True, True]])
    >>> gold = torch.tensor([-6.0])
    >>> preference, likelihood = tpo(logps, logps / 5, gold, gold / 3, both).terms
    >>> preference.values, likelihood
    (tensor([0.6931]), Term(values=tensor([6.]), per='gold_tokens', weight=1.0))
    """
    if loss_type == "tpo_l":
        preference = smoothed_logistic(beta * margin_of(mean_logps, mask) - gamma, label_smoothing)
    elif loss_type in ("sigmoid", "hinge", "ipo"):
        preference = _link_losses(logps, mean_logps, mask, beta, label_smoothing, loss_type)
    else:
        raise ValueError(
            f"unknown loss_type {loss_type!r} of tpo; use 'sigmoid', 'hinge', 'ipo' or 'tpo_l'"
        )
    compared = mean_logps if loss_type in ("ipo", "tpo_l") else logps
    ranking = pair_outcome(preference, beta * compared, mask)
    likelihood = gold_nll(gold_logps, gold_mean_logps, mask, nll_reduction, tpo_alpha)
    return Outcome((*ranking.terms, likelihood), ranking.rewards)


REFERENCE_FREE = catalogue(
    Objective(simpo, "pair", "2405.14734", "-logsig(beta (s_w - s_l) - gamma)"),
    Objective(cpo, "pair", "2401.08417", "-logsig(beta (S_w - S_l)) + alpha NLL_w"),
    Objective(orpo, "pair", "2403.07691", "NLL_w - beta logsig(logodds_w - logodds_l), p = e^s"),
    Objective(
        alpha_po,
        "pair",
        "2501.03884",
        "-logsig(beta (rho_w - rho_l) - gamma), rho = (1 - e^(-alpha s)) / alpha",
    ),
    Objective(simper, "pair", "2502.00883", "-e^s_w + e^s_l"),
    Objective(slic, "pair", "2305.10425", "max(0, delta - S_w + S_l) + lambda NLL_w"),
    Objective(repo, "pair", "2503.07426", "max(0, gamma - (s_w - s_l))"),
    Objective(
        tpo, "pair", "2405.16681", "-logsig(beta (S_w - S_l)) + alpha NLL_gold", extras=("gold",)
    ),
)
