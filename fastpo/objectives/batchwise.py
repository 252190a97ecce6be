r"""Objectives on pairs that see the whole batch: sorted, averaged or remembered over steps.

Notation as in `pairwise`; $D = u_w - u_l$. "The batch" is a micro-batch of all ranks together, so
these losses depend on how a step is cut; with `batch_statistics: exact` it is the whole step.
What comes from other pairs (statistics) is constant to autograd. Unless its documentation says
otherwise, the mean of a loss over the batch still has the value and the gradient of its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.domain import FlipRate, NonNegative, Positive, ProperShare

from .base import Objective, Outcome, Statistic, catalogue, mean
from .links import live, logistic, smoothed_logistic
from .pairwise import margin_of, pair_outcome

Scores = Mapping[str, Tensor]
Hyper = Mapping[str, Any]


def _column(name: str, slot: int) -> Callable[[Scores, Hyper], tuple[Tensor, Tensor]]:
    """Return the observations of one score of one slot of every pair."""
    return lambda scores, hyper: (scores[name][:, slot], scores["mask"].all(-1))


def _margins(name: str) -> Callable[[Scores, Hyper], tuple[Tensor, Tensor]]:
    """Return the observations of one score's margin."""

    def of(scores: Scores, hyper: Hyper) -> tuple[Tensor, Tensor]:
        return margin_of(scores[name], scores["mask"]), scores["mask"].all(-1)

    return of


def _dpo_losses(ratio: Tensor, mask: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return smoothed_logistic(beta * margin_of(ratio, mask), label_smoothing)


def _mean(observations: Tensor, hyper: Hyper) -> Tensor:
    return mean(observations, hyper).reshape(1)


def _deviation(observations: Tensor, hyper: Hyper) -> Tensor:
    """Return the standard deviation [1] of [n] with n - 1; 0 of fewer than two."""
    if len(observations) < 2:
        return observations.new_zeros(1)
    return observations.std().reshape(1)


def _standardised(x: Tensor, average: Tensor, deviation: Tensor) -> Tensor:
    """Return (x - average) / deviation, 0 while the deviation is 0: a single pair has no scale."""
    flat = deviation == 0
    return torch.where(flat, 0, (x - average) / torch.where(flat, 1, deviation))


def _sorted(observations: Tensor, hyper: Hyper) -> Tensor:
    return observations.sort().values if len(observations) else observations.new_zeros(1)


def _against_same_rank(
    own: Tensor,  # [G]
    batch: Tensor,  # [n] sorted, `own` among them
    partners: Tensor,  # [n] sorted
    link: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return [G]: link(own, the partner that stands where `own` stands in the sorted batch).

    Equal values share their places: each gets the mean over them, so that their sum is that of
    any assignment and no pair's loss depends on the order of the batch.
    """
    distance = (own[:, None] - batch).abs()
    here = distance == distance.amin(-1, keepdim=True)  # [G, n]
    losses = link(own[:, None], partners)
    return (losses * here).sum(-1) / here.sum(-1).clamp(min=1)


def aot(
    logps: Tensor,  # [G, 2]
    ref_logps: Tensor,  # [G, 2]
    sorted_margin: Tensor,  # [n]
    sorted_ref_margin: Tensor,  # [n]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
) -> Outcome:
    r"""Alignment via optimal transport, paired: the policy's margins dominate the reference's.

    $$-(1-\epsilon)\log\sigma(\beta d_k) - \epsilon\log\sigma(-\beta d_k), \quad
    d_k = (S_w - S_l)_{(k)} - (R_w - R_l)_{(k)}$$

    $x_{(k)}$ is the k-th smallest of the batch: both margins are sorted, each by itself, over all
    ranks (TRL sorts each rank's own). The order carries no gradient; it flows through each pair's
    own margin. Equal margins share their places. A batch of one pair gives `dpo`. Sample weights
    act on a pair's own margin, whatever its partner. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2406.05882

    >>> import torch
    >>> S, both = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2).bool()
    >>> R = torch.zeros(2, 2)
    >>> aot(S, R, torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 2.0]), both).terms[0].values
    tensor([0.6931, 0.6931])
    """
    losses = _against_same_rank(
        margin_of(logps, mask),
        sorted_margin,
        sorted_ref_margin,
        lambda own, partner: smoothed_logistic(beta * (own - partner), label_smoothing),
    )
    return pair_outcome(losses, beta * (logps - ref_logps), mask)


def aot_unpaired(
    ratio: Tensor,  # [G, 2]
    sorted_chosen: Tensor,  # [n]
    sorted_rejected: Tensor,  # [n]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
) -> Outcome:
    r"""Alignment via optimal transport, unpaired: chosen log-ratios dominate rejected ones.

    $$-(1-\epsilon)\log\sigma(\beta d_k) - \epsilon\log\sigma(-\beta d_k), \quad
    d_k = (u_w)_{(k)} - (u_l)_{(k)}$$

    $x_{(k)}$ is the k-th smallest of the batch, as in `aot`. A pair's two responses stand in two
    of these losses, against partners from other pairs and ranks: the pair's value is half of
    both, its gradient the whole of both with respect to its own responses. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2406.05882

    >>> import torch
    >>> u, both = torch.tensor([[3.0, 4.0], [5.0, 2.0]]), torch.ones(2, 2).bool()
    >>> u_w, u_l = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0])
    >>> aot_unpaired(u, u_w, u_l, both, beta=1.0).terms[0].values  # both gaps are 1
    tensor([0.3133, 0.3133])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)

    def link(above: Tensor, below: Tensor) -> Tensor:
        return smoothed_logistic(beta * (above - below), label_smoothing)

    both = _against_same_rank(chosen, sorted_chosen, sorted_rejected, link)
    both = both + _against_same_rank(
        rejected, sorted_rejected, sorted_chosen, lambda own, partner: link(partner, own)
    )
    return pair_outcome(both - (both / 2).detach(), beta * ratio, mask)


def _gumbel(key: Tensor) -> Tensor:
    """Return a standard Gumbel number, float64, of each random int64: 52 bits are a uniform."""
    uniform = ((key >> 12 & 0xFFFFFFFFFFFFF).double() + 0.5) / 2**52
    return -(-uniform.log()).log()


def _draws(scores: Scores, hyper: Hyper) -> tuple[Tensor, Tensor]:
    margin = margin_of(scores["ratio"], scores["mask"])
    noise = _gumbel(scores["tie_key"][:, 0]).to(margin.dtype)
    return torch.stack((margin, noise), dim=-1), scores["mask"].all(-1)


def _rows(observations: Tensor, hyper: Hyper) -> Tensor:
    return observations if len(observations) else observations.new_zeros(1, 2)


def beta_dpo(
    ratio: Tensor,  # [G, 2]
    tie_key: Tensor,  # [G, 2] int64
    draws: Tensor,  # [n, 2] the batch's margins and Gumbel numbers
    margin_mean: Tensor,  # [1]
    margin_std: Tensor,  # [1]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    rho: ProperShare = 0.2,
    beta_min: NonNegative = 0.001,
    momentum: ProperShare = 0.9,
) -> Outcome:
    r"""DPO with dynamic beta: outlying pairs are dropped, and beta follows the batch's margin.

    $$-\log\sigma(\beta' D), \quad
    \beta' = \max\big(\beta_{min},\; \beta\,[1 + \alpha(\bar D - M)]\big)$$

    averaged over the selected $\lfloor(1-\rho)n\rfloor \ge 1$ of the batch's n pairs, whose mean
    margin is $\bar D$. They are drawn without replacement with weights
    $\exp(-\frac{1}{2}((D - M)/s)^2)$; $M$ and $s$ are the mean and standard deviation of $D$,
    moving averages over steps with weight `momentum` on the past. Everything but $D$ itself is
    without gradient.

    The averages start at the first step's values (the official code's start at 0), move once a
    step, and a step counts as one however it is cut. Official code divides by the selected pairs
    of each rank; this by those of all ranks. The draw is a function of `tie_key`, that is of
    seed, step and row (Gumbel top-k), and so the same on every rank. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2407.08639

    >>> import torch
    >>> u, keys = torch.tensor([[5.0, -5.0]]), torch.tensor([[7, 7]])
    >>> draws, M, s = torch.tensor([[10.0, 0.0]]), torch.tensor([5.0]), torch.tensor([1.0])
    >>> beta_dpo(u, keys, draws, M, s, torch.ones(1, 2).bool()).terms[0].values  # 0.1 * (1 + 3)
    tensor([0.0181])
    """
    size = len(draws)
    kept = max(1, int((1 - rho) * size))

    def order(margin: Tensor, noise: Tensor) -> Tensor:
        return noise - _standardised(margin, margin_mean, margin_std).square() / 2

    margins, noise = draws.unbind(-1)
    top = order(margins, noise).topk(min(kept + 1, size))
    scale = beta * (1 + alpha * (margins[top.indices[:kept]].mean() - margin_mean))
    margin = margin_of(ratio, mask)
    losses = logistic(scale.clamp(min=beta_min) * margin) * (size / kept)
    if kept < size:
        # Half-way to the first pair that is left out, so that rounding cannot move a pair across.
        threshold = top.values[kept - 1 :].mean()
        own = order(margin, _gumbel(tie_key[:, 0]).to(margin.dtype))
        losses = torch.where(own < threshold, 0, losses)
    return pair_outcome(losses, beta * ratio, mask)


def alpha_dpo(
    mean_logps: Tensor,  # [G, 2]
    mean_ratio: Tensor,  # [G, 2]
    margin_mean: Tensor,  # [1]
    margin_std: Tensor,  # [1]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 2.5,
    gamma_beta_ratio: NonNegative = 0.15,
    alpha: NonNegative = 0.05,
    label_smoothing: FlipRate = 0.0,
    momentum: ProperShare = 0.9,
) -> Outcome:
    r"""AlphaDPO: SimPO whose target margin follows how far the pair is from the reference.

    $$-\log\sigma\Big(\beta\Big[s_w - s_l - \gamma/\beta -
    \alpha\,\mathrm{sg}\frac{\bar u_w - \bar u_l - \mu}{\mathrm{sd}}\Big]\Big)$$

    $\mu$ and sd are the mean and standard deviation of $\bar u_w - \bar u_l$, moving averages over
    steps with weight `momentum` on the past; they start at the first step's values (the official
    code's start at 0). `gamma_beta_ratio` is $\gamma/\beta$. The paper tunes it in 0.15 - 0.6,
    `alpha` in 0.05 - 0.2 and `beta` in {2.5, 10} per model. `alpha=0` is SimPO. Reward
    $\beta(s - \alpha\bar u)$. Paper: https://arxiv.org/abs/2410.10148

    >>> import torch
    >>> s, ub, both = torch.tensor([[-1.0, -1.4]]), torch.tensor([[3.0, 0.0]]), torch.ones(1, 2)
    >>> mean, std = torch.tensor([1.0]), torch.tensor([2.0])  # z-score 1
    >>> alpha_dpo(s, ub, mean, std, both.bool(), gamma_beta_ratio=0.2, alpha=0.2).terms[0].values
    tensor([0.6931])
    """
    distance = _standardised(margin_of(mean_ratio, mask), margin_mean, margin_std).detach()
    z = beta * (margin_of(mean_logps, mask) - (gamma_beta_ratio + alpha * distance))
    rewards = beta * (mean_logps - alpha * mean_ratio)
    return pair_outcome(smoothed_logistic(z, label_smoothing), rewards, mask)


def _losses(scores: Scores, hyper: Hyper) -> tuple[Tensor, Tensor]:
    mask = scores["mask"]
    losses = _dpo_losses(scores["ratio"], mask, hyper["beta"], hyper["label_smoothing"])
    return losses, mask.all(-1)


def _log_mean_exp(observations: Tensor, hyper: Hyper) -> Tensor:
    """Return log mean exp(-l / b) [] of [n], 0 of none."""
    if not len(observations):
        return observations.new_zeros(())
    total = (-observations / hyper["beta_prime"]).logsumexp(0)
    return total - observations.new_full((), len(observations)).log()


def dr_dpo(
    ratio: Tensor,  # [G, 2]
    log_mean_exp: Tensor,  # []
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    beta_prime: Positive = 1.0,
    label_smoothing: FlipRate = 0.0,
) -> Outcome:
    r"""Distributionally robust DPO: pairs that the policy contradicts weigh less.

    $$-\beta' \log \frac{1}{n}\sum_i e^{-l_i/\beta'}, \quad l_i = -\log\sigma(\beta D_i)$$

    over the batch's n pairs. With $c$ the logarithm (`log_mean_exp`, of all ranks, constant) a
    pair's loss is $-\beta'(e^{-l_i/\beta' - c} - 1 + c)$, which has the same mean and gradient.
    Tends to `dpo` as $\beta' \to \infty$. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2407.07880

    >>> import torch
    >>> u, both = torch.tensor([[5.0, -5.0]]), torch.tensor([[True, True]])
    >>> c = torch.tensor(1.0).sigmoid().log()  # of a single pair: -l
    >>> dr_dpo(u, c, both).terms[0].values  # as dpo
    tensor([0.3133])
    """
    excess = -_dpo_losses(ratio, mask, beta, label_smoothing) / beta_prime - log_mean_exp
    losses = -beta_prime * (torch.expm1(excess) + log_mean_exp)
    return pair_outcome(losses, beta * ratio, mask)


def _population_losses(scores: Scores, hyper: Hyper) -> tuple[Tensor, Tensor]:
    # In float64, where a population's number survives: it may be a hash.
    losses, whole = _losses(scores, hyper)
    return torch.stack((scores["population"].double(), losses.double()), dim=-1), whole


def _by_population(observations: Tensor, hyper: Hyper) -> Tensor:
    """Reduce [n, 2] of (population, loss) to [C, 3] of (population, mean loss, share of pairs)."""
    if not len(observations):
        return observations.new_ones(1, 3)
    populations, index = observations[:, 0].unique(return_inverse=True)
    sizes = torch.zeros_like(populations).index_add(0, index, torch.ones_like(observations[:, 0]))
    sums = torch.zeros_like(populations).index_add(0, index, observations[:, 1])
    return torch.stack((populations, sums / sizes, sizes / len(observations)), dim=-1)


def maxmin(
    ratio: Tensor,  # [G, 2]
    population: Tensor,  # [G] int64
    populations: Tensor,  # [C, 3] population, mean loss, share of the pairs
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    reduction: Literal["max", "softmax"] = "max",
    temperature: Positive = 1.0,
    label_smoothing: FlipRate = 0.0,
) -> Outcome:
    r"""MaxMin alignment on DPO: the population that is served worst decides.

    $$\max_c L_c \quad\text{or}\quad \tau\log\frac{1}{C}\sum_c e^{L_c/\tau}, \quad
    L_c = \operatorname{mean}_{i \in c} -\log\sigma(\beta D_i)$$

    over the C populations (`population`, the row's `group` column) that occur in the batch. The
    paper maximises the smallest expected reward of several reward models; this is the same
    egalitarian objective for direct alignment, with the populations given instead of found by
    expectation maximisation. `"softmax"` is the smooth maximum, the plain mean over populations
    as `temperature` $\tau \to \infty$: its gradient weighs each $L_c$ by the softmax of
    $L/\tau$. Keep batches large enough for every population to occur. With one population this
    is `dpo`. Reward $\beta u$. Not verified against official code.
    Paper: https://arxiv.org/abs/2402.08925

    Raises:
        ValueError: an unknown reduction.

    >>> import torch
    >>> u, both = torch.tensor([[5.0, -5.0], [0.0, 0.0]]), torch.ones(2, 2).bool()
    >>> populations = torch.tensor([[0.0, 0.3133, 0.5], [1.0, 0.6931, 0.5]])
    >>> maxmin(u, torch.tensor([0, 1]), populations, both).terms[0].values
    tensor([0.6931, 0.6932])
    """
    losses = _dpo_losses(ratio, mask, beta, label_smoothing)
    level, share = populations[:, 1:].to(losses.dtype).unbind(-1)
    if reduction == "max":
        total = level.max()
        worst = (level == total).to(losses.dtype)
        weight = worst / worst.sum()
    elif reduction == "softmax":
        count = level.new_full((), len(level))
        total = temperature * ((level / temperature).logsumexp(0) - count.log())
        weight = (level / temperature).softmax(0)
    else:
        raise ValueError(f"unknown reduction {reduction!r} of maxmin; use 'max' or 'softmax'")
    here = population[:, None].to(populations.dtype) == populations[:, 0]  # [G, C]
    # total is the value; the rest has mean 0 over the batch and carries the gradient.
    own = here * (weight / share) * (losses[:, None] - level)
    return pair_outcome(total + own.sum(-1), beta * ratio, mask)


BATCHWISE = catalogue(
    Objective(
        aot,
        "pair",
        "2406.05882",
        "-logsig(beta (sort(S_w - S_l)_k - sort(R_w - R_l)_k))",
        statistics={
            "sorted_margin": Statistic(_margins("logps"), _sorted, where="full groups"),
            "sorted_ref_margin": Statistic(_margins("ref_logps"), _sorted, where="full groups"),
        },
    ),
    Objective(
        aot_unpaired,
        "pair",
        "2406.05882",
        "-logsig(beta (sort(u_w)_k - sort(u_l)_k))",
        statistics={
            "sorted_chosen": Statistic(_column("ratio", 0), _sorted, where="full groups"),
            "sorted_rejected": Statistic(_column("ratio", 1), _sorted, where="full groups"),
        },
    ),
    Objective(
        beta_dpo,
        "pair",
        "2407.08639",
        "-logsig(beta (1 + alpha (mean D - M)) D), D = u_w - u_l, of pairs drawn near M",
        statistics={
            "draws": Statistic(_draws, _rows, where="full groups"),
            "margin_mean": Statistic(
                _margins("ratio"), _mean, "ema", decay="momentum", where="full groups"
            ),
            "margin_std": Statistic(
                _margins("ratio"), _deviation, "ema", decay="momentum", where="full groups"
            ),
        },
    ),
    Objective(
        alpha_dpo,
        "pair",
        "2410.10148",
        "-logsig(beta (s_w - s_l - alpha zscore(ub_w - ub_l)) - gamma)",
        statistics={
            "margin_mean": Statistic(
                _margins("mean_ratio"), _mean, "ema", decay="momentum", where="full groups"
            ),
            "margin_std": Statistic(
                _margins("mean_ratio"), _deviation, "ema", decay="momentum", where="full groups"
            ),
        },
    ),
    Objective(
        dr_dpo,
        "pair",
        "2407.07880",
        "-b log mean e^(-l/b) over the batch, l = -logsig(beta (u_w - u_l))",
        statistics={"log_mean_exp": Statistic(_losses, _log_mean_exp, where="full groups")},
    ),
    Objective(
        maxmin,
        "pair",
        "2402.08925",
        "max over populations of mean -logsig(beta (u_w - u_l))",
        statistics={
            "populations": Statistic(_population_losses, _by_population, where="full groups")
        },
    ),
)
