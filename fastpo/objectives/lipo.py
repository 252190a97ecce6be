r"""LiPO: the losses of learning to rank, on lists of responses and their grades.

Notation: $g_i = \beta u_i$ (`ratio`), $q_i$ the row's own grade (`score`), expected in [0, 1]. Each
is a sum over a list, and a mean over lists; Rax averages over the items or pairs of a batch
instead. But for `lipo` and `plackett_luce` the forms are Rax's, since the paper has no code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.domain import Domain, Positive

from .base import Objective, Outcome, Term, catalogue
from .links import LN2, live, logistic
from .regression import copg
from .vocabulary import Exponents, Gains, NonNegatives, Probabilities


def tie_keys(group: Tensor, num_candidates: int, *, seed: int = 0, step: int = 0) -> Tensor:
    """Draw numbers [G, K] int64 that order tied candidates: a pure function of its arguments.

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
    """Take one step of Steele, Lea and Flood's generator; products wrap, shifts are logical."""
    x = x - 0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _ranks(score: Tensor, tie_key: Tensor, mask: Tensor) -> Tensor:
    """Return the rank [G, K] of each candidate by descending score; the smaller key wins a tie."""
    ahead = score[:, None, :] > score[:, :, None]  # [G, i, j]: j ahead of i
    tied = score[:, None, :] == score[:, :, None]
    ahead = ahead | (tied & (tie_key[:, None, :] < tie_key[:, :, None]))
    return 1 + (ahead & mask[:, None, :]).sum(-1)


def differences(x: Tensor) -> Tensor:
    """Return the differences x_i - x_j [G, i, j] of [G, K]."""
    return x[:, :, None] - x[:, None, :]


def graded_above(score: Tensor, mask: Tensor) -> Tensor:
    """Return [G, i, j] bool: both are live and i has the better grade."""
    return (score[:, :, None] > score[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def log1p_sum_exp(x: Tensor, where: Tensor) -> Tensor:
    r"""Return $\log(1 + \sum_j e^{x_{ij}})$ [G, i] over the j of `where` [G, i, j]; 0 of none.

    Exact where the sum is tiny, and 0 where that underflows.
    """
    # log(1 + e^x) of a logsumexp. An empty sum is of the most negative float, not -inf: no NaN in
    # backward, for users of anomaly detection.
    return logistic(-x.where(where, torch.finfo(x.dtype).min).logsumexp(-1))


def neg_log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    r"""Return $-\log \mathrm{softmax}(x)$ [G, K] over live slots, exact where it is near 0."""
    x = live(x, mask)
    itself = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    others = mask[:, :, None] & mask[:, None, :] & ~itself
    return log1p_sum_exp(-differences(x), others)


def _list_outcome(losses: Tensor, g: Tensor, mask: Tensor) -> Outcome:
    """Make the outcome of losses [G] of whole lists; the rewards are g."""
    return Outcome((Term(losses),), live(g, mask).detach())


def _ideal_dcg(gain: Tensor, mask: Tensor, log: Literal["log", "log2"]) -> Tensor:
    """Return the DCG [G, 1] of the order by gain, padded slots last."""
    ideal = gain.where(mask, -torch.inf).sort(dim=-1, descending=True).values
    place = torch.arange(gain.shape[-1], device=gain.device)
    ideal = live(ideal, place < mask.sum(-1, keepdim=True))
    rank = 2.0 + place.to(gain.dtype)
    return (ideal / (rank.log() if log == "log" else rank.log2())).sum(-1, keepdim=True)


def lipo(
    ratio: Tensor,  # [G, K]
    score: Exponents,  # [G, K]
    tie_key: Tensor,  # [G, K] int64
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
    discount: Literal["log", "log2"] = "log",
    normalise: bool = False,
    scale_by_size: bool = False,
) -> Outcome:
    r"""LiPO-lambda: pairs of a list, weighted by what swapping them would change in DCG.

    $$\sum_{q_i > q_j} \left|2^{q_i} - 2^{q_j}\right| \cdot
    \left|\frac{1}{D(\tau_i)} - \frac{1}{D(\tau_j)}\right| \log(1 + e^{-(g_i - g_j)}), \quad
    D(k) = \log(1 + k)$$

    $\tau$ is the rank, from 1, by the current $g$; the weight carries no gradient. Rax's lambda
    weights differ in three ways, each an option: `discount="log2"` has the logarithm to base 2;
    `normalise` divides by the DCG of the ideal order (of gains $2^q - 1$), so that weights are
    changes in NDCG; `scale_by_size` multiplies by K. Grades $q$ are expected in [0, 1]; they may be
    up to 100 and, but for `normalise`, negative. At K = 2 with grades (1, 0) this is DPO times
    $1/D(1) - 1/D(2)$. Reward $g$.

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
    u, q = live(ratio, mask), live(score, mask).to(ratio.dtype)
    # Both differences cancel between near grades and between far ranks: in float64, as the kernel.
    ranks = 1.0 + _ranks(u, tie_key, mask).double()
    inverse = 1 / (ranks.log() if discount == "log" else ranks.log2())
    better = graded_above(score, mask)
    changes = differences(torch.exp2(q.double())) * differences(inverse)
    weight = live(changes, better).abs().to(u.dtype)
    losses = live(weight * logistic(beta * live(differences(u), better)), better).sum((-2, -1))
    if normalise:
        ideal = _ideal_dcg(torch.expm1(LN2 * q), mask, discount).squeeze(-1)
        losses = losses / ideal.where(ideal != 0, 1)
    if scale_by_size:
        losses = losses * mask.sum(-1)
    return _list_outcome(losses, beta * u, mask)


def plackett_luce(
    ratio: Tensor,  # [G, K]
    rank: Tensor,  # [G, K] int64
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
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
    return _list_outcome(log1p_sum_exp(-beta * differences(u), below).sum(-1), beta * u, mask)


def list_mle(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's list-MLE: `plackett_luce` with the order of the grades.

    $$\sum_i \log\Big(1 + \sum_{j: q_j < q_i} e^{g_j - g_i}\Big)$$

    Candidates of one grade are not compared with each other, where an implementation that sorts
    lets the order of the row decide. Reward $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.zeros(1, 3), torch.tensor([[0.5, 1.0, 0.5]])
    >>> list_mle(u, q, torch.ones(1, 3).bool()).terms[0].values  # log 3: the two others tie
    tensor([1.0986])
    """
    rank = graded_above(score, mask).sum(-2)  # how many are better
    return plackett_luce(ratio, rank, mask, beta=beta)


def point_mse(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's pointwise squared error: the implicit reward is regressed to the grade.

    $$\sum_i (g_i - q_i)^2$$

    Reward $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.5, 1.0]])
    >>> point_mse(u, q, torch.ones(1, 2).bool()).terms[0].values  # (1 - 1/2)^2 + (0 - 1)^2
    tensor([1.2500])
    """
    g = beta * live(ratio, mask)
    return _list_outcome((g - live(score, mask).to(g.dtype)).square().sum(-1), g, mask)


def point_sigmoid(
    ratio: Tensor,  # [G, K]
    score: Probabilities,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's pointwise cross-entropy: the grade is the probability of being a good response.

    $$\sum_i -q_i\log\sigma(g_i) - (1 - q_i)\log\sigma(-g_i)$$

    Rax rounds grades below 1 down to 0. With grades 1 and 0 on a pair this is `bco_pair`. Reward
    $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.3]])
    >>> point_sigmoid(u, q, torch.ones(1, 2).bool()).terms[0].values  # log(1 + e) + log 2
    tensor([2.0064])
    """
    g, q = beta * live(ratio, mask), live(score, mask).to(ratio.dtype)
    losses = live(q * logistic(g) + (1 - q) * logistic(-g), mask)
    return _list_outcome(losses.sum(-1), g, mask)


def pair_hinge(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's pairwise hinge: `hinge` on every pair of a list whose grades differ.

    $$\sum_{q_i > q_j} \max(0, 1 - (g_i - g_j))$$

    Reward $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.tensor([[20.0, 5.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> pair_hinge(u, q, torch.ones(1, 3).bool()).terms[0].values  # 1 - 3/4, and 1 - 1
    tensor([0.2500])
    """
    u, better = live(ratio, mask), graded_above(score, mask)
    losses = live((1 - beta * differences(u)).relu(), better)
    return _list_outcome(losses.sum((-2, -1)), beta * u, mask)


def pair_logistic(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's pairwise logistic loss, DPO-BT: `dpo` on every pair of a list whose grades differ.

    $$\sum_{q_i > q_j} \log(1 + e^{-(g_i - g_j)})$$

    Reward $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    >>> pair_logistic(u, q, torch.ones(1, 3).bool()).terms[0].values  # 2 log 2
    tensor([1.3863])
    """
    u, better = live(ratio, mask), graded_above(score, mask)
    losses = live(logistic(beta * differences(u)), better)
    return _list_outcome(losses.sum((-2, -1)), beta * u, mask)


def pair_mse(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""Pairwise squared error: differences of rewards are regressed to differences of grades.

    $$\sum_{i > j} \big((g_i - g_j) - (q_i - q_j)\big)^2$$

    Every pair counts once, ties included; Rax counts it in both orders. This is `copg` times
    $K - 1$. Reward $g$. After Rax, https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    >>> pair_mse(u, q, torch.ones(1, 2).bool()).terms[0].values  # (1 - 1/2)^2
    tensor([0.2500])
    """
    outcome = copg(ratio, score, mask, beta=beta)
    others = (mask.sum(-1) - 1).clamp(min=0)
    return Outcome((Term(others * outcome.terms[0].values),), outcome.rewards)


def listnet(
    ratio: Tensor,  # [G, K]
    score: NonNegatives,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
) -> Outcome:
    r"""LiPO's softmax loss (ListNet): cross-entropy from the grades' shares to the policy's.

    $$-\sum_i \frac{q_i}{\sum_j q_j} \log \mathrm{softmax}(g)_i$$

    Where all grades of a list are 0 its shares are equal, as in Rax. `infonca` has a softmax of the
    grades for shares. Reward $g$. Paper: https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.zeros(1, 3), torch.tensor([[0.9, 0.4, 0.1]])
    >>> listnet(u, q, torch.ones(1, 3).bool()).terms[0].values  # log 3
    tensor([1.0986])
    """
    u, q = live(ratio, mask), live(score, mask).to(ratio.dtype)
    total, size = q.sum(-1, keepdim=True), mask.sum(-1, keepdim=True).clamp(min=1)
    share = torch.where(total != 0, q / total.where(total != 0, 1), 1 / size.to(q.dtype))
    losses = live(share * neg_log_softmax(beta * u, mask), mask)
    return _list_outcome(losses.sum(-1), beta * u, mask)


def approx_ndcg(
    ratio: Tensor,  # [G, K]
    score: Gains,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.05,
    temperature: Positive = 1.0,
) -> Outcome:
    r"""ApproxNDCG: the ranking metric itself, with ranks made smooth.

    $$-\frac{\sum_i (2^{q_i} - 1) / \log_2(1 + a_i)}{\max_\tau \sum_i (2^{q_i} - 1) / \log_2(1 +
    \tau_i)}, \quad a_i = 1 + \sum_{j \ne i} \sigma\Big(\frac{g_j - g_i}{T}\Big)$$

    T = `temperature` is Rax's; lower is closer to the metric. In [-1, 0], and 0 where all grades
    are 0. Reward $g$. Papers: https://doi.org/10.1007/s10791-009-9124-x,
    https://arxiv.org/abs/2402.01878

    >>> import torch
    >>> u, q = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    >>> approx_ndcg(u, q, torch.ones(1, 3).bool()).terms[0].values  # -1 / log2(1 + 2)
    tensor([-0.6309])
    """
    u, q = live(ratio, mask), live(score, mask).to(ratio.dtype)
    itself = torch.eye(u.shape[-1], dtype=torch.bool, device=u.device)
    others = mask[:, :, None] & mask[:, None, :] & ~itself
    ranks = 1 + live(torch.sigmoid(differences(u) * (-beta / temperature)), others).sum(-1)
    gain = torch.expm1(LN2 * q)
    ideal = _ideal_dcg(gain, mask, "log2")
    share = gain / ideal.where(ideal != 0, 1)
    return _list_outcome(-(share / (1 + ranks).log2()).sum(-1), beta * u, mask)


LIPO = catalogue(
    Objective(
        lipo,
        "list",
        "2402.01878",
        "sum_{q_i>q_j} |2^q_i - 2^q_j| |1/D(rank_i) - 1/D(rank_j)| log(1 + e^(g_j - g_i))",
        grades_if={("normalise", True): Domain(0, 100)},
    ),
    Objective(
        plackett_luce,
        "list",
        "2305.18290",
        "sum_i log(1 + sum_{j below i} e^(g_j - g_i)), g = beta u",
    ),
    Objective(
        list_mle, "list", "2402.01878", "sum_i log(1 + sum_{q_j<q_i} e^(g_j - g_i)), g = beta u"
    ),
    Objective(point_mse, "point", "2402.01878", "sum_i (g_i - q_i)^2, g = beta u"),
    Objective(
        point_sigmoid,
        "point",
        "2402.01878",
        "-sum_i q_i logsig(g_i) + (1 - q_i) logsig(-g_i), g = beta u",
    ),
    Objective(pair_hinge, "list", "2402.01878", "sum_{q_i>q_j} max(0, 1 - (g_i - g_j))"),
    Objective(pair_logistic, "list", "2402.01878", "-sum_{q_i>q_j} logsig(g_i - g_j)"),
    Objective(pair_mse, "list", "2402.01878", "sum_{i>j} ((g_i - g_j) - (q_i - q_j))^2"),
    Objective(
        listnet, "list", "2402.01878", "-sum_i (q_i / sum_j q_j) log softmax(g)_i, g = beta u"
    ),
    Objective(
        approx_ndcg,
        "list",
        "doi:10.1007/s10791-009-9124-x",
        "-DCG(a) / max DCG, a_i = 1 + sum_{j!=i} sig((g_j - g_i) / T)",
    ),
)
