r"""Objectives that regress a margin to a number instead of maximising it.

Notation: $u = S - S_{ref}$ (`ratio`), $q$ the row's own grade of a response (`score`). Several of
these are on-policy methods: their reference is the policy that drew the responses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.domain import FLIP_RATE, Domain, FlipRate, Positive

from .base import Objective, Outcome, Term, catalogue
from .links import live
from .pairwise import dpo, margin_of, pair_outcome, sppo
from .vocabulary import Probabilities


def sppo_soft(
    ratio: Tensor,  # [G, 2]
    score: Probabilities,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.001,
    single: bool = False,
    half: bool = False,
) -> Outcome:
    r"""Self-play preference optimisation with estimated winning probabilities.

    $$\left(u_w - \frac{P_w - 1/2}{\beta}\right)^2 + \left(u_l - \frac{P_l - 1/2}{\beta}\right)^2$$

    `beta` is the paper's $1/\eta$. $P$ is `score`: how often each response beats the K that were
    sampled for the prompt. `single=True` compares the two with each other alone: $P_w$ is the
    chosen response's `score` and $P_l = 1 - P_w$. `half=True` multiplies by 1/2, as the official
    code does. Grades (1, 0) give `sppo`. The reference is the previous iteration's policy.
    Reward $\beta u$. Paper: https://arxiv.org/abs/2405.00675

    >>> import torch
    >>> u, p = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.75, 0.25]])
    >>> sppo_soft(u, p, torch.tensor([[True, True]]), beta=0.1).terms[0].values
    tensor([2.5000])
    """
    wins = live(score, mask).to(ratio.dtype)
    if single:
        wins = torch.stack((wins[:, 0], 1 - wins[:, 0]), dim=-1)
    squares = (live(ratio, mask) - (wins - 0.5) / beta).square().sum(-1)
    return pair_outcome(squares / 2 if half else squares, beta * ratio, mask)


def cal_dpo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.001,
) -> Outcome:
    r"""Calibrated DPO: DPO without beta, and both log-ratios drawn to the scale of the rewards.

    $$-\log\sigma(u_w - u_l) + \frac{1}{2}\left[\left(u_w - \frac{1}{2\beta}\right)^2 +
    \left(u_l + \frac{1}{2\beta}\right)^2\right]$$

    Reward $u$. Paper: https://arxiv.org/abs/2412.14516

    >>> import torch
    >>> u, both = torch.tensor([[4.0, -4.0]]), torch.tensor([[True, True]])
    >>> cal_dpo(u, both, beta=0.1).terms[0].values  # log(1 + e^-8) + (1 + 1) / 2
    tensor([1.0003])
    """
    contrast = dpo(ratio, mask, beta=1.0)
    calibration = sppo(ratio, mask, beta=beta, half=True)
    losses = contrast.terms[0].values + calibration.terms[0].values
    return Outcome((Term(losses),), contrast.rewards)


def rebel(
    ratio: Tensor,  # [G, 2]
    score: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    eta: Positive = 1.0,
) -> Outcome:
    r"""REBEL: the difference of log-ratios is regressed to the difference of rewards.

    $$\big((u_1 - u_2) - \eta(q_1 - q_2)\big)^2$$

    `score` holds the rewards; the order of the pair does not matter. The reference is the policy
    that drew the responses. This is the official code; the equation as printed has $1/\eta$ in
    front of the log-ratios instead, which divides the loss by $\eta^2$. Reward $u / \eta$.
    Paper: https://arxiv.org/abs/2404.16767

    >>> import torch
    >>> u, q = torch.tensor([[1.0, -1.0]]), torch.tensor([[5.0, 0.0]])
    >>> rebel(u, q, torch.tensor([[True, True]])).terms[0].values
    tensor([9.])
    """
    target = eta * margin_of(score, mask).to(ratio.dtype)
    return pair_outcome((margin_of(ratio, mask) - target).square(), ratio / eta, mask)


def irepo(
    ratio: Tensor,  # [G, 2]
    score: Probabilities,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    clip: FlipRate = 0.01,
) -> Outcome:
    r"""iREPO: the reward difference is regressed to the log-odds of an empirical preference.

    $$\left(\beta(u_1 - u_2) - \log\frac{h}{1-h}\right)^2, \quad
    h = \mathrm{clip}(q_1, \mathrm{clip}, 1 - \mathrm{clip})$$

    $h$ is the share of annotators, or the strength of a Bradley-Terry fit, that prefers slot 0
    over slot 1: the `score` of slot 0; that of slot 1 is not used. Unanimous annotators have
    infinite log-odds, hence `clip`; 0 switches it off. The reference is the previous iteration's
    policy. Reward $\beta u$. Not verified against official code.
    Paper: https://arxiv.org/abs/2405.15230

    Raises:
        ValueError: `clip` is outside [0, 0.5).

    >>> import torch
    >>> u, h = torch.tensor([[7.0, -3.0]]), torch.tensor([[0.5, 0.5]])
    >>> irepo(u, h, torch.tensor([[True, True]]), beta=0.2).terms[0].values
    tensor([4.])
    """
    FLIP_RATE.check("clip", clip)
    # A padded pair has h = 1/2, not 0, whose log-odds are infinite.
    h = score[:, 0].where(mask[:, 0], 0.5).to(ratio.dtype).clamp(clip, 1 - clip)
    odds = h.log() - torch.log1p(-h)
    return pair_outcome((beta * margin_of(ratio, mask) - odds).square(), beta * ratio, mask)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    r"""Return KL(Bernoulli(sigmoid(a)) || Bernoulli(sigmoid(b))), exact where either saturates.

    Near a = b the definition subtracts log-probabilities that agree. There, with $d = b - a$, it
    is $\log(1 + p(e^d - 1)) - pd$; both letters flip their sign so that $p = \sigma(a) \le 1/2$.
    """
    sign = torch.where(a > 0, -1.0, 1.0).to(a.dtype)
    p, d = torch.sigmoid(sign * a), (sign * (b - a)).clamp(-1, 1)
    near = torch.log1p(p * torch.expm1(d)) - p * d
    far = torch.sigmoid(a) * (logsigmoid(a) - logsigmoid(b))
    far = far + torch.sigmoid(-a) * (logsigmoid(-a) - logsigmoid(-b))
    return torch.where((b - a).abs() < 1, near, far)


def reward_aware(
    ratio: Tensor,  # [G, 2]
    score: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.2,
    eta: Positive = 1.0,
    distance: Literal["bwd", "fwd", "sq"] = "bwd",
) -> Outcome:
    r"""Reward-aware preference optimisation (Nemotron-4's RPO): match how much better, not which.

    $$KL(B(z_q) \| B(z)), \quad z = \beta(u_w - u_l), \quad z_q = \eta(q_w - q_l)$$

    $B(z)$ is a coin that lands heads with probability $\sigma(z)$; `score` holds the rewards and
    `eta` scales them. That is `distance="bwd"`; `"fwd"` is $KL(B(z) \| B(z_q))$ and `"sq"` is
    $(z - z_q)^2$. NeMo's `gt_reward_scale` is `eta`, its `ref_policy_kl_penalty` `beta`; for its
    SFT term use the mixture {reward_aware: 1, sft: ...}. As the rewards of a pair grow apart,
    `bwd` tends to `dpo`. Reward $\beta u$. Papers: https://arxiv.org/abs/2406.11704,
    https://arxiv.org/abs/2502.00203

    Raises:
        ValueError: an unknown distance.

    >>> import torch
    >>> u, q = torch.tensor([[5.0, -5.0]]), torch.tensor([[2.0, 0.0]])
    >>> both = torch.tensor([[True, True]])
    >>> reward_aware(u, q, both).terms[0].values  # 0.2 * 10 = 1 * 2
    tensor([0.])
    >>> reward_aware(u, q, both, beta=0.3, distance="sq").terms[0].values
    tensor([1.])
    """
    z = beta * margin_of(ratio, mask)
    target = eta * margin_of(score, mask).to(z.dtype)
    if distance == "bwd":
        losses = _bernoulli_kl(target, z)
    elif distance == "fwd":
        losses = _bernoulli_kl(z, target)
    elif distance == "sq":
        losses = (z - target).square()
    else:
        raise ValueError(f"unknown distance {distance!r} of reward_aware; use 'bwd', 'fwd' or 'sq'")
    return pair_outcome(losses, beta * ratio, mask)


def copg(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Contrastive policy gradient: regularised rewards of one prompt are made equal.

    $$\frac{1}{K-1}\sum_{i>j}(\rho_i - \rho_j)^2, \quad \rho_i = q_i - \beta u_i$$

    `score` holds the rewards. Its gradient is $-2\beta$ times the policy gradient of $\rho$ with
    the others' mean as baseline, without importance weights, from whatever policy the responses
    come. On a pair whose rewards differ by 1/2 it is $\beta^2$ times IPO's sum form. Reward
    $\beta u$. Not verified against official code. Paper: https://arxiv.org/abs/2406.19185

    >>> import torch
    >>> u, q = torch.tensor([[5.0, -5.0]]), torch.tensor([[3.0, 0.0]])
    >>> copg(u, q, torch.tensor([[True, True]])).terms[0].values  # ((3 - 0.5) - (0 + 0.5))^2
    tensor([4.])
    """
    regularised = live(score, mask).to(ratio.dtype) - beta * live(ratio, mask)
    both = mask[:, :, None] & mask[:, None, :]
    gaps = live(regularised[:, :, None] - regularised[:, None, :], both)
    others = (mask.sum(-1) - 1).clamp(min=1)
    # Every pair stands twice in the square of gaps.
    losses = gaps.square().sum((-2, -1)) / (2 * others)
    return Outcome((Term(losses),), live(beta * ratio, mask).detach())


def a2po(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta1: Positive = 0.5,
    beta2: Positive = 0.001,
) -> Outcome:
    r"""A*-PO: the log-ratio is regressed to the optimal advantage.

    $$\sum_i \big(\beta_2 u_i - (q_i - V^*)\big)^2, \quad
    V^* = \beta_1 \log \frac{1}{K}\sum_j e^{q_j / \beta_1}$$

    averaged over responses. `score` holds the rewards. $V^*$ is estimated from the rewards of the
    group itself, so the group should be drawn from the reference; the paper estimates it once
    from a separate group and then regresses a single response per prompt. Reward $\beta_2 u$.
    Paper: https://arxiv.org/abs/2505.20686

    >>> import torch
    >>> u, q = torch.tensor([[5.0, -5.0]]), torch.tensor([[3.0, 3.0]])  # V* = 3
    >>> a2po(u, q, torch.tensor([[True, True]]), beta2=0.2).terms[0]
    Term(values=tensor([2.]), per='responses', weight=1.0)
    """
    rewards = live(score, mask).to(ratio.dtype)
    scaled = (rewards / beta1).where(mask, torch.finfo(ratio.dtype).min)
    size = mask.sum(-1, keepdim=True).clamp(min=1)
    value = beta1 * (scaled.logsumexp(-1, keepdim=True) - size.to(ratio.dtype).log())
    residual = live(beta2 * ratio - (rewards - value), mask)
    terms = (Term(residual.square().sum(-1), "responses"),)
    return Outcome(terms, live(beta2 * ratio, mask).detach())


REGRESSION = catalogue(
    Objective(
        sppo_soft, "pair", "2405.00675", "(u_w - (P_w - 1/2)/beta)^2 + (u_l - (P_l - 1/2)/beta)^2"
    ),
    Objective(
        cal_dpo,
        "pair",
        "2412.14516",
        "-logsig(u_w - u_l) + ((u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2) / 2",
    ),
    Objective(rebel, "pair", "2404.16767", "((u_1 - u_2) - eta (q_1 - q_2))^2"),
    Objective(
        irepo,
        "pair",
        "2405.15230",
        "(beta (u_1 - u_2) - logit h)^2, h = P(y_1 > y_2)",
        grades_if={("clip", 0): Domain(0, 1, open_low=True, open_high=True)},
    ),
    Objective(
        reward_aware,
        "pair",
        "2406.11704",
        "KL(Bern(sig(eta (q_w - q_l))) || Bern(sig(beta (u_w - u_l))))",
    ),
    Objective(
        copg, "list", "2406.19185", "sum_{i>j} (rho_i - rho_j)^2 / (K - 1), rho = q - beta u"
    ),
    Objective(
        a2po,
        "list",
        "2505.20686",
        "sum_i (beta2 u_i - (q_i - V))^2, V = beta1 log mean_j e^(q_j / beta1)",
    ),
)
