r"""Objectives on lists of K >= 2 ranked or graded responses, ragged lists padded by `mask`.

Notation: $g_i = \beta u_i$ (`ratio`), $q_i$ the row's own grade (`score`), $s$ = `mean_logps`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .base import Objective, Outcome, Term
from .links import live, logistic
from .regularisers import Reduction, nll


def tie_keys(group: Tensor, num_candidates: int, *, seed: int = 0, step: int = 0) -> Tensor:
    """Random numbers [G, K] int64 that order tied candidates: a pure function of its arguments.

    The key of a slot is a hash (splitmix64) of (seed, step, group, slot), so it does not change
    with the device, the number of ranks or the way a step is cut into micro-batches.

    Args:
        group: [G] int64, the number of each group in the data set.
        num_candidates: K.
        seed: the run's seed.
        step: the optimiser step, so that a list's ties fall differently every time it is seen.

    >>> import torch
    >>> keys = tie_keys(torch.tensor([3, 5]), 4, seed=1)
    >>> bool((keys == tie_keys(torch.tensor([5, 3]), 4, seed=1).flip(0)).all())
    True
    """
    slot = torch.arange(num_candidates, device=group.device)
    key = torch.zeros_like(group)[:, None]
    for part in (seed, step, group[:, None], slot):
        key = _splitmix64(key ^ part)
    return key


def _splitmix64(x: Tensor) -> Tensor:
    """One step of Steele, Lea and Flood's generator; int64 products wrap, shifts are logical."""
    x = x - 0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _ranks(score: Tensor, tie_key: Tensor, mask: Tensor) -> Tensor:
    """[G, K] rank of each candidate by descending score, 1 is best; the smaller key wins a tie."""
    ahead = score[:, None, :] > score[:, :, None]  # [G, i, j]: j ahead of i
    tied = score[:, None, :] == score[:, :, None]
    ahead = ahead | (tied & (tie_key[:, None, :] < tie_key[:, :, None]))
    return 1 + (ahead & mask[:, None, :]).sum(-1)


def lipo(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    tie_key: Tensor,  # [G, K] int64
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 0.05,
    discount: Literal["log", "log2"] = "log",
) -> Outcome:
    r"""LiPO-lambda: pairs of a list, weighted by what swapping them would change in DCG.

    $$\sum_{q_i > q_j} \left|2^{q_i} - 2^{q_j}\right| \cdot
    \left|\frac{1}{D(\tau_i)} - \frac{1}{D(\tau_j)}\right| \log(1 + e^{-(g_i - g_j)}), \quad
    D(k) = \log(1 + k)$$

    $\tau$ is the rank, from 1, by the current $g$; the weight carries no gradient. `discount`:
    the paper's natural logarithm or Rax's base 2. Grades $q$ are expected in [0, 1]. At K = 2
    with grades (1, 0) this is DPO times $1/D(1) - 1/D(2)$. Reward $g$.

    A policy that equals its reference gives every $g_i = 0$: all ranks tie, and the value would
    depend on the order of the row. Ties are broken by `tie_key`, the smaller number first;
    `tie_keys` makes reproducible random ones. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    >>> lipo(u, q, tie_keys(torch.tensor([0]), 3), torch.ones(1, 3).bool()).terms[0].values
    tensor([0.5977])
    """
    if discount not in ("log", "log2"):
        raise ValueError(f"unknown discount {discount!r} of lipo; use 'log' or 'log2'")
    u = live(ratio, mask)
    ranks = 1.0 + _ranks(u, tie_key, mask).to(u.dtype)
    inverse = 1 / (ranks.log() if discount == "log" else ranks.log2())
    gain = torch.exp2(live(score, mask).to(u.dtype))
    better = (score[:, :, None] > score[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    weight = live(_differences(gain) * _differences(inverse), better).abs()
    losses = live(weight * logistic(beta * live(_differences(u), better)), better)
    return Outcome((Term(losses.sum((-2, -1))),), (beta * u).detach())


def _differences(x: Tensor) -> Tensor:
    """[G, K] -> [G, i, j]: x_i - x_j."""
    return x[:, :, None] - x[:, None, :]


def plackett_luce(
    ratio: Tensor,  # [G, K]
    rank: Tensor,  # [G, K] int64
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""DPO for rankings: the Plackett-Luce likelihood of the row's order (ListMLE).

    $$\sum_i \log\Big(1 + \sum_{j \text{ ranked below } i} e^{g_j - g_i}\Big)$$

    which is $-\sum_k [g_{(k)} - \log\sum_{j \ge k} e^{g_{(j)}}]$, and DPO at K = 2. Candidates of
    one `rank` are not compared with each other. Reward $g$.
    Paper: https://arxiv.org/abs/2305.18290, appendix A.3

    >>> import torch
    >>> u, rank = torch.zeros(1, 3), torch.tensor([[0, 1, 2]])
    >>> plackett_luce(u, rank, torch.ones(1, 3).bool()).terms[0].values  # log(3!)
    tensor([1.7918])
    """
    u = live(ratio, mask)
    below = (rank[:, None, :] > rank[:, :, None]) & mask[:, None, :] & mask[:, :, None]
    # log(1 + sum e^x) as -logsig(-logsumexp(x)): exact when the sum is tiny. An empty sum is of
    # the most negative float, not -inf: no NaN in backward, for users of anomaly detection.
    gaps = (-beta * _differences(u)).where(below, torch.finfo(u.dtype).min)
    return Outcome((Term(logistic(-gaps.logsumexp(-1)).sum(-1)),), (beta * u).detach())


def first_against_rest(
    mean_logps: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.3,
) -> Outcome:
    r"""The preference part of LOGO: $-\log\sigma(\beta(s_1 - \mathrm{mean}_{j>1}\,s_j) - \gamma)$.

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
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.3,
    sft_weight: float = 0.1,
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


LISTWISE: dict[str, Objective] = {
    "lipo": Objective(
        "lipo",
        lipo,
        "list",
        "2402.01878",
        "sum_{q_i>q_j} |2^q_i - 2^q_j| |1/D(rank_i) - 1/D(rank_j)| log(1 + e^(g_j - g_i))",
    ),
    "plackett_luce": Objective(
        "plackett_luce",
        plackett_luce,
        "list",
        "2305.18290",
        "sum_i log(1 + sum_{j below i} e^(g_j - g_i)), g = beta u",
    ),
    "logo": Objective(
        "logo",
        logo,
        "list",
        "2410.18533",
        "-logsig(beta (s_1 - mean_{j>1} s_j) - gamma) + lambda NLL_1",
    ),
}
