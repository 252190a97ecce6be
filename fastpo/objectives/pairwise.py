r"""Objectives on pairs: slot 0 is the chosen response w, slot 1 the rejected response l.

Notation of the formulas: $S = \sum_t \log\pi(y_t)$ (`logps`), $s = S/L$ (`mean_logps`),
$u = S - S_{ref}$ (`ratio`), $\bar u = u/L$ (`mean_ratio`). A pair with a padded slot contributes
0 and no gradient. Every loss is a mean over pairs; a likelihood term is averaged on its own.
"""

from __future__ import annotations

from torch import Tensor

from .base import Objective, Outcome, Term
from .links import live, log_odds, logistic, robust_logistic, smoothed_logistic
from .regularisers import Reduction, nll


def _margin(score: Tensor, mask: Tensor) -> Tensor:
    """[G, 2] -> [G]: chosen minus rejected."""
    chosen, rejected = live(score, mask).unbind(-1)
    return chosen - rejected


def _outcome(losses: Tensor, rewards: Tensor, mask: Tensor) -> Outcome:
    """One loss [G] per whole pair, mean over pairs; rewards [G, 2]."""
    return Outcome((Term(live(losses, mask.all(-1))),), live(rewards, mask).detach())


def dpo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Outcome:
    r"""Direct preference optimisation; with `label_smoothing` $\epsilon$, cDPO.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad z = \beta(u_w - u_l)$$

    Reward $\beta u$. Paper: https://arxiv.org/abs/2305.18290; conservative DPO is Mitchell's note
    https://ericmitchell.ai/cdpo.pdf.

    >>> import torch
    >>> dpo(torch.tensor([[5.0, -5.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.3133])
    """
    z = beta * _margin(ratio, mask)
    return _outcome(smoothed_logistic(z, label_smoothing), beta * ratio, mask)


def robust(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Outcome:
    r"""Robust DPO: an unbiased estimate of the DPO loss when a rate $\epsilon$ of labels is wrong.

    $$\frac{-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)}{1-2\epsilon},
    \quad z = \beta(u_w - u_l)$$

    Not bounded below: confident pairs have negative loss. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2403.00409

    >>> import torch
    >>> robust(torch.tensor([[20.0, -20.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([-0.4819])
    """
    z = beta * _margin(ratio, mask)
    return _outcome(robust_logistic(z, label_smoothing), beta * ratio, mask)


def ipo(
    ratio: Tensor,  # [G, 2]
    mean_ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    average: bool = True,
) -> Outcome:
    r"""Identity preference optimisation: regress the margin to a target instead of maximising it.

    $$\left(\bar u_w - \bar u_l - \frac{1}{2\beta}\right)^2$$

    `beta` is the paper's $\tau$. `average=True` takes per-token means, the form its authors
    trained with; `average=False` takes sums, as the equation is printed and many codes have it.
    Reward $\beta u$, of sums in both. Paper: https://arxiv.org/abs/2310.12036

    >>> import torch
    >>> u, both = torch.tensor([[8.0, -2.0]]), torch.tensor([[True, True]])
    >>> ipo(u, u / 4, both).terms[0].values
    tensor([6.2500])
    >>> ipo(u, u / 4, both, average=False).terms[0].values
    tensor([25.])
    """
    score = mean_ratio if average else ratio
    return _outcome((_margin(score, mask) - 1 / (2 * beta)).square(), beta * ratio, mask)


def hinge(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Hinge loss on the normalised likelihood: SLiC-HF's link on DPO's margin, RSO hinge-norm.

    $$\max(0, 1 - \beta(u_w - u_l))$$

    Reward $\beta u$. Papers: https://arxiv.org/abs/2309.06657 (there $\gamma$ = `beta` = 0.05),
    https://arxiv.org/abs/2305.10425

    >>> import torch
    >>> hinge(torch.tensor([[2.0, -1.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.7000])
    """
    return _outcome((1 - beta * _margin(ratio, mask)).relu(), beta * ratio, mask)


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
    z = beta * (_margin(mean_logps, mask) - gamma_beta_ratio)
    return _outcome(smoothed_logistic(z, label_smoothing), beta * mean_logps, mask)


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
    z = _margin(log_odds(live(mean_logps, mask)), mask)
    return _outcome(beta * logistic(z), beta * mean_logps, mask)


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


def sppo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.001,
    half: bool = False,
) -> Outcome:
    r"""Self-play preference optimisation with hard labels: the winner wins with probability 1.

    $$\left(u_w - \frac{1}{2\beta}\right)^2 + \left(u_l + \frac{1}{2\beta}\right)^2$$

    `beta` is the paper's $1/\eta$. `half=True` multiplies by 1/2, as the official code does.
    Reward $\beta u$. Paper: https://arxiv.org/abs/2405.00675

    >>> import torch
    >>> sppo(torch.tensor([[4.0, -4.0]]), torch.tensor([[True, True]]), beta=0.1).terms[0].values
    tensor([2.])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)
    target = 1 / (2 * beta)
    squares = (chosen - target).square() + (rejected + target).square()
    return _outcome(squares / 2 if half else squares, beta * ratio, mask)


def bco_pair(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Binary classifier optimisation of both sides of a pair, without the reward shift.

    $$-\log\sigma(\beta u_w) - \log\sigma(-\beta u_l)$$

    The quality term of MPO (https://arxiv.org/abs/2411.10442). `bco` is the paper's form, with
    the shift. Reward $\beta u$. Paper: https://arxiv.org/abs/2404.04656

    >>> import torch
    >>> bco_pair(torch.tensor([[10.0, -10.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.6265])
    """
    chosen, rejected = (beta * live(ratio, mask)).unbind(-1)
    return _outcome(logistic(chosen) + logistic(-rejected), beta * ratio, mask)


PAIRWISE: dict[str, Objective] = {
    "dpo": Objective("dpo", dpo, "pair", "2305.18290", "-logsig(beta (u_w - u_l))"),
    "robust": Objective(
        "robust",
        robust,
        "pair",
        "2403.00409",
        "(-(1-e) logsig(z) + e logsig(-z)) / (1 - 2e), z = beta (u_w - u_l)",
    ),
    "ipo": Objective("ipo", ipo, "pair", "2310.12036", "(u_w/L_w - u_l/L_l - 1/(2 beta))^2"),
    "hinge": Objective("hinge", hinge, "pair", "2309.06657", "max(0, 1 - beta (u_w - u_l))"),
    "simpo": Objective("simpo", simpo, "pair", "2405.14734", "-logsig(beta (s_w - s_l) - gamma)"),
    "cpo": Objective("cpo", cpo, "pair", "2401.08417", "-logsig(beta (S_w - S_l)) + alpha NLL_w"),
    "orpo": Objective(
        "orpo", orpo, "pair", "2403.07691", "NLL_w - beta logsig(logodds_w - logodds_l), p = e^s"
    ),
    "sppo": Objective(
        "sppo", sppo, "pair", "2405.00675", "(u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2"
    ),
    "bco_pair": Objective(
        "bco_pair", bco_pair, "pair", "2404.04656", "-logsig(beta u_w) - logsig(-beta u_l)"
    ),
}
