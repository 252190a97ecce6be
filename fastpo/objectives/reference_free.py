r"""Objectives on pairs that need no reference model, in the notation of `pairwise`."""

from __future__ import annotations

from torch import Tensor

from .base import Objective, Outcome
from .links import live, log_odds, logistic, smoothed_logistic
from .pairwise import dpo, margin_of, pair_outcome
from .regularisers import Reduction, nll


def simpo(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    label_smoothing: float = 0.0,
) -> Outcome:
    r"""SimPO: length-normalised, reference-free, with a target margin $\gamma$.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad
    z = \beta(s_w - s_l) - \gamma, \quad \gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$$

    The official code's optional SFT term and CPO-SimPO are the mixture {simpo: 1, sft: weight}.
    Reward $\beta s$. Paper: https://arxiv.org/abs/2405.14734

    >>> import torch
    >>> simpo(torch.tensor([[-1.0, -1.25]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    z = beta * (margin_of(mean_logps, mask) - gamma_beta_ratio)
    return pair_outcome(smoothed_logistic(z, label_smoothing), beta * mean_logps, mask)


def cpo(
    logps: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    label: Tensor,  # [G, 2] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""Contrastive preference optimisation: DPO with a uniform reference, plus NLL on the chosen.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z) + \alpha\,\mathrm{NLL}(y_w), \quad
    z = \beta(S_w - S_l)$$

    The NLL runs over response tokens only. Reward $\beta S$.
    Paper: https://arxiv.org/abs/2401.08417

    >>> import torch
    >>> logps = torch.tensor([[-10.0, -20.0]])
    >>> preference, likelihood = cpo(
    ...     logps, logps / 5, torch.tensor([[True, False]]), torch.tensor([[True, True]])
    ... ).terms
    >>> preference.values, likelihood.values, likelihood.per
    (tensor([0.3133]), tensor([10.]), 'chosen_tokens')
    """
    preference = dpo(logps, mask, beta=beta, label_smoothing=label_smoothing)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction, weight=cpo_alpha)
    return Outcome((*preference.terms, likelihood), preference.rewards)


def odds_ratio(
    mean_logps: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""The preference part of ORPO: $-\beta\log\sigma(\mathrm{logodds}_w - \mathrm{logodds}_l)$.

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
    beta: float = 0.1,
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


REFERENCE_FREE: dict[str, Objective] = {
    "simpo": Objective("simpo", simpo, "pair", "2405.14734", "-logsig(beta (s_w - s_l) - gamma)"),
    "cpo": Objective("cpo", cpo, "pair", "2401.08417", "-logsig(beta (S_w - S_l)) + alpha NLL_w"),
    "orpo": Objective(
        "orpo", orpo, "pair", "2403.07691", "NLL_w - beta logsig(logodds_w - logodds_l), p = e^s"
    ),
}
