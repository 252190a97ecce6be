r"""Objectives on lists of K >= 2 ranked or graded responses, ragged lists padded by `mask`.

LiPO's family is in `lipo`. Notation: $g_i = \beta u_i$ (`ratio`), $q_i$ the row's own grade
(`score`), $s$ = `mean_logps`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.domain import POSITIVE_FLIP_RATE, NonNegative, Positive, PositiveFlipRate

from .base import Objective, Outcome, Term, catalogue
from .links import live, logistic
from .lipo import differences, graded_above, log1p_sum_exp, neg_log_softmax
from .regularisers import Reduction, nll


def first_against_rest(
    mean_logps: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 10.0,
    gamma_beta_ratio: NonNegative = 0.3,
) -> Outcome:
    r"""Return $-\log\sigma(\beta(s_1 - \mathrm{mean}_{j>1}\,s_j) - \gamma)$, LOGO without its NLL.

    Raises:
        ValueError: K < 2, there is nothing to compare with.

    >>> import torch
    >>> s = torch.tensor([[-1.0, -1.2, -1.4]])
    >>> first_against_rest(s, torch.ones(1, 3).bool()).terms[0].values
    tensor([0.6931])
    """
    if mean_logps.shape[-1] < 2:
        raise ValueError(f"logo compares K >= 2 responses, but K is {mean_logps.shape[-1]}")
    s, others = live(mean_logps, mask), mask[:, 1:]
    negative = s[:, 1:].sum(-1) / others.sum(-1).clamp(min=1)
    z = beta * (s[:, 0] - negative - gamma_beta_ratio)
    losses = live(logistic(z), mask[:, 0] & others.any(-1))
    return Outcome((Term(losses),), (beta * s).detach())


def logo(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 10.0,
    gamma_beta_ratio: NonNegative = 0.3,
    sft_weight: NonNegative = 0.1,
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""LOGO: SimPO of the chosen response against the mean of all others, plus NLL on it.

    $$-\log\sigma\Big(\beta\big(s_1 - \tfrac{1}{K-1}\sum_{j>1} s_j\big) - \gamma\Big) +
    \lambda\,\mathrm{NLL}(y_1), \quad \gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$$

    The paper has K = 3. Its code averages a wrong row into the second negative and takes the
    NLL on unshifted labels; this is what both were meant to be. Reward $\beta s$.
    Paper: https://arxiv.org/abs/2410.18533

    >>> import torch
    >>> s, first = torch.tensor([[-1.0, -1.2, -1.4]]), torch.tensor([[True, False, False]])
    >>> preference, likelihood = logo(9 * s, s, first, torch.ones(1, 3).bool()).terms
    >>> preference.values, likelihood
    (tensor([0.6931]), Term(values=tensor([9.]), per='chosen_tokens', weight=0.1))
    """
    preference = first_against_rest(mean_logps, mask, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction, weight=sft_weight)
    return Outcome((*preference.terms, likelihood), preference.rewards)


def _soft_labels(score: Tensor, mask: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return the softmax [G, K] of the grades over live slots, 0 elsewhere."""
    q = score.to(dtype).where(mask, torch.finfo(dtype).min)
    # Subtracted first: 7.85 / 1e-4 is rounded by .004, which is as much of a label.
    best = q.sort(-1).values[:, -1:]  # `amax` refuses K = 0
    return live(((q - best) / temperature).softmax(-1), mask)


def infonca(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.01,
    alpha: Positive = 1e-4,
) -> Outcome:
    r"""InfoNCA: cross-entropy between a softmax of the grades and one of the implicit rewards.

    $$-\sum_i t_i \log \mathrm{softmax}(g)_i, \quad t = \mathrm{softmax}(q / \alpha)$$

    $\alpha$ is a temperature, the official code's `temperature_alpha`, whose recipe for grades
    from 1 to 10 makes t nearly one-hot; that code also adds 0.01 to the first grade, so that ties
    go to it. With a one-hot t on a pair this is `dpo`. Reward $g$.
    Paper: https://arxiv.org/abs/2402.05369

    >>> import torch
    >>> u, q = torch.zeros(1, 4), torch.tensor([[7.0, 7.0, 3.0, 1.0]])
    >>> infonca(u, q, torch.ones(1, 4).bool()).terms[0].values  # log 4
    tensor([1.3863])
    """
    g = beta * live(ratio, mask)
    targets = _soft_labels(score, mask, alpha, g.dtype)
    losses = live(targets * neg_log_softmax(g, mask), mask)
    return Outcome((Term(losses.sum(-1)),), g.detach())


def nca(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.01,
    alpha: Positive = 1e-4,
) -> Outcome:
    r"""Noise contrastive alignment: good responses gain likelihood, and not only over the others.

    $$-\frac{1}{K} \sum_i \log\sigma(-g_i) - \sum_i t_i \log\sigma(g_i), \quad
    t = \mathrm{softmax}(q / \alpha)$$

    $\alpha$ is as in `infonca`. With a one-hot t on a pair this is `nca_pair`. Reward $g$.
    Paper: https://arxiv.org/abs/2402.05369

    >>> import torch
    >>> u, q = torch.zeros(1, 4), torch.tensor([[7.0, 7.0, 3.0, 1.0]])
    >>> nca(u, q, torch.ones(1, 4).bool()).terms[0].values  # 2 log 2
    tensor([1.3863])
    """
    g = beta * live(ratio, mask)
    size = mask.sum(-1, keepdim=True).clamp(min=1)
    targets = _soft_labels(score, mask, alpha, g.dtype)
    losses = live(logistic(-g) / size + targets * logistic(g), mask)
    return Outcome((Term(losses.sum(-1)),), g.detach())


def _reverse_kl(ratio: Tensor, target: Tensor, mask: Tensor, beta: float) -> Outcome:
    """Return KL(softmax(g) || softmax(target)); gradient flows through both the policy's places."""
    g = beta * live(ratio, mask)
    log_p, log_t = -neg_log_softmax(g, mask), -neg_log_softmax(target, mask)
    losses = live(log_p.exp() * (log_p - log_t), mask)
    return Outcome((Term(losses.sum(-1)),), g.detach())


def exo_rw(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.5,
    beta_r: Positive = 0.5,
) -> Outcome:
    r"""Efficient exact optimisation of rewards: reverse KL from the policy to the grades.

    $$\sum_i p_i \log\frac{p_i}{t_i}, \quad p = \mathrm{softmax}(g), \quad
    t = \mathrm{softmax}(q / \beta_r)$$

    `beta` is the paper's $\beta_\pi$. Gradient flows through the weights p, which makes it mode
    seeking; `dpo_rw` is the forward divergence. Reward $g$.
    Paper: https://arxiv.org/abs/2402.00856

    >>> import torch
    >>> u, q = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()  # t = (3/4, 1/4)
    >>> exo_rw(u, q, torch.ones(1, 2).bool(), beta_r=1.0).terms[0].values  # log(4/3) / 2
    tensor([0.1438])
    """
    return _reverse_kl(ratio, live(score, mask).to(ratio.dtype) / beta_r, mask, beta)


def exo_pref(
    ratio: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.5,
    label_smoothing: PositiveFlipRate = 1e-3,
) -> Outcome:
    r"""Efficient exact optimisation of preferences: reverse KL from the policy to the labels.

    $$\sum_i p_i \log\frac{p_i}{t_i}, \quad p = \mathrm{softmax}(g), \quad
    t_i \propto 1 - \epsilon \text{ if desirable, else } \epsilon$$

    $\epsilon$ = `label_smoothing`. On a pair this is `exo_pair`; the official code has pairs only,
    and there $\log t = (0, -10)$, $\epsilon = 1 / (1 + e^{10})$ but for the normalisation. For more
    responses t is the extension of that form. Reward $g$. Not verified against official code.
    Paper: https://arxiv.org/abs/2402.00856

    Raises:
        ValueError: `label_smoothing` is outside (0, 0.5); at 0 the divergence is infinite.

    >>> import torch
    >>> u, best = torch.zeros(1, 2), torch.tensor([[True, False]])
    >>> exo_pref(u, best, torch.ones(1, 2).bool(), label_smoothing=0.25).terms[0].values
    tensor([0.1438])
    """
    POSITIVE_FLIP_RATE.check("label_smoothing", label_smoothing)
    log_odds = math.log(label_smoothing) - math.log1p(-label_smoothing)
    return _reverse_kl(ratio, log_odds * (~label).to(ratio.dtype), mask, beta)


def dpo_rw(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.5,
    beta_r: Positive = 0.5,
) -> Outcome:
    r"""DPO on rewards, as the EXO paper has it: cross-entropy from the grades to the policy.

    $$-\sum_i t_i \log \mathrm{softmax}(g)_i, \quad t = \mathrm{softmax}(q / \beta_r)$$

    `infonca` with the EXO paper's defaults. Reward $g$. Paper: https://arxiv.org/abs/2402.00856

    >>> import torch
    >>> u, q = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]])
    >>> dpo_rw(u, q, torch.ones(1, 2).bool()).terms[0].values  # log 2
    tensor([0.6931])
    """
    return infonca(ratio, score, mask, beta=beta, alpha=beta_r)


def pro(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    sft_weight: NonNegative = 0.05,
    nll_reduction: Reduction = "sum",
) -> Outcome:
    r"""Preference ranking optimisation: each response against all worse ones, plus NLL on the best.

    $$\sum_k \log\Big(1 + \sum_{j: q_j < q_k} e^{T_{kj} s_j - T_{kk} s_k}\Big) +
    \lambda (K - 1)^2\,\mathrm{NLL}(y_1), \quad T_{kj} = q_k - q_j, \quad
    T_{kk} = \max_j T_{kj}$$

    Contrasts are sharper the further two grades are apart; T is the reciprocal of the paper's
    temperature. Responses of one grade are not compared, where the official code has the first of
    them win with $T = 0$; that code also adds $10^{-10}$ inside the logarithm. The NLL is of the
    desirable response, $-S$ by default as there. No reference. Reward $s$.
    Paper: https://arxiv.org/abs/2306.17492

    >>> import torch
    >>> s, q = torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    >>> best, both = torch.tensor([[True, False]]), torch.ones(1, 2).bool()
    >>> ranking, likelihood = pro(9 * s, s, q, best, both).terms
    >>> ranking.values, likelihood  # T = 1: log 2
    (tensor([0.6931]), Term(values=tensor([9.]), per='desirable', weight=0.05))
    """
    s, q = live(mean_logps, mask), live(score, mask).to(mean_logps.dtype)
    worse = graded_above(score, mask)
    contrast = live(differences(q), worse)
    steepest = contrast.amax(-1, keepdim=True)
    ranking = log1p_sum_exp(contrast * s[:, None, :] - steepest * s[:, :, None], worse)
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction, weight=sft_weight)
    size = (mask.sum(-1) - 1).square()
    likelihood = Term(size * likelihood.values, likelihood.per, likelihood.weight)
    return Outcome((Term(ranking.sum(-1)), likelihood), s.detach())


def rrhf(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    rrhf_weight: NonNegative = 1.0,
    nll_reduction: Reduction = "token_mean",
) -> Outcome:
    r"""RRHF: likelihoods should be ordered like the grades, plus NLL on the best response.

    $$w \sum_{q_i < q_j} \max(0, s_i - s_j) + \mathrm{NLL}(y_1)$$

    $w$ = `rrhf_weight` is 1 in the paper and 100 by default in its code, which also sums the
    ranking part over a batch. The NLL is of the desirable response, for which rows have their best
    one. No reference. Reward $s$. Paper: https://arxiv.org/abs/2304.05302

    >>> import torch
    >>> s, q = torch.tensor([[-1.0, -0.5, -2.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    >>> best, every = torch.tensor([[True, False, False]]), torch.ones(1, 3).bool()
    >>> ranking, likelihood = rrhf(9 * s, s, q, best, every).terms
    >>> ranking.values, likelihood.values
    (tensor([0.5000]), tensor([9.]))
    """
    s, better = live(mean_logps, mask), graded_above(score, mask)
    ranking = live((-differences(s)).relu(), better).sum((-2, -1))
    likelihood = nll(logps, mean_logps, label, mask, reduction=nll_reduction)
    return Outcome((Term(ranking, weight=rrhf_weight), likelihood), s.detach())


LISTWISE = catalogue(
    Objective(
        logo, "list", "2410.18533", "-logsig(beta (s_1 - mean_{j>1} s_j) - gamma) + lambda NLL_1"
    ),
    Objective(
        infonca, "list", "2402.05369", "-sum_i t_i log softmax(beta u)_i, t = softmax(q / alpha)"
    ),
    Objective(
        nca,
        "list",
        "2402.05369",
        "-mean_i logsig(-g_i) - sum_i t_i logsig(g_i), t = softmax(q / alpha), g = beta u",
    ),
    Objective(
        exo_rw,
        "list",
        "2402.00856",
        "sum_i p_i log(p_i / t_i), p = softmax(beta u), t = softmax(q / beta_r)",
    ),
    Objective(
        exo_pref,
        "list",
        "2402.00856",
        "sum_i p_i log(p_i / t_i), p = softmax(beta u), t_i ~ 1 - e if desirable else e",
    ),
    Objective(
        dpo_rw, "list", "2402.00856", "-sum_i t_i log softmax(beta u)_i, t = softmax(q / beta_r)"
    ),
    Objective(
        pro,
        "list",
        "2306.17492",
        "sum_k log(1 + sum_{q_j<q_k} e^(T_kj s_j - T_kk s_k)) + lambda (K-1)^2 NLL_1",
    ),
    Objective(rrhf, "list", "2304.05302", "w sum_{q_i<q_j} max(0, s_i - s_j) + NLL_1"),
)
