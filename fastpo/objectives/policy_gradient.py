r"""Policy gradients on groups of graded responses, against the policy that drew them.

Notation, for K responses to one prompt: $q$ the row's own grade (`score`), $A$ the advantage that
each objective makes of the group's grades, without gradient; $\ell_t = \log\pi(y_t)$
(`token_logps`), $o_t$ under the policy that drew the responses (`token_old_logps`), $\rho_t =
e^{\ell_t - o_t}$, $L$ the number of tokens, $a_t$ the token weights. $S, O, R$ are sums of a
response's log-probs under the policy, the old policy and the reference.

A weight $a_t$ multiplies the loss of its token and enters no ratio: the place for corrections of
another sampler's probabilities, and for masks of tools, truncation or entropy (weight 0 drops the
token and its count). GRPO and its relatives have no KL term inside, and so need no reference: with
the paper's penalty it is the mixture {grpo: 1, kl_penalty: 0.04}. They share one record of their
scores, `Sampled`. The reward that is logged is $q$, unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.domain import Count, NonNegative, Positive

from .base import Objective, Outcome, Per, Term, catalogue
from .links import live
from .vocabulary import Probabilities

Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]
"""How token losses are averaged: means of responses' means; over all tokens of the optimiser step;
responses' sums divided by one fixed length."""
Importance = Literal["token", "sequence", "sequence_token"]
"""Ratios of single tokens; their geometric mean over the response; or that mean's value with the
gradient of the single token."""
ScaleRewards = Literal["group", "none"]
"""Whether advantages are divided by the standard deviation of the group's grades."""

STD_EPSILON = 1e-4
"""What is added to the standard deviation of a group's grades, which may be 0."""


def group_advantages(
    score: Tensor, mask: Tensor, *, scale_rewards: ScaleRewards = "group"
) -> Tensor:
    r"""Return $A = (q - \mathrm{mean}\,q) / (\mathrm{std}\,q + 10^{-4})$ over the group, detached.

    The standard deviation has Bessel's correction. A group of one has advantage 0.

    Raises:
        ValueError: an unknown `scale_rewards`.

    >>> import torch
    >>> group_advantages(torch.tensor([[3.0, 1.0]]), torch.ones(1, 2).bool(), scale_rewards="none")
    tensor([[ 1., -1.]])
    """
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"unknown scale_rewards {scale_rewards!r}; use 'group' or 'none'")
    grades, count = live(score, mask).detach(), mask.sum(-1, keepdim=True)
    centred = live(grades - grades.sum(-1, keepdim=True) / count.clamp(min=1), mask)
    if scale_rewards == "none":
        return centred
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPSILON)


def leave_one_out_advantages(reward: Tensor, mask: Tensor) -> Tensor:
    r"""Return $A_i = r_i - \mathrm{mean}_{j \ne i}\,r_j$ [G, K], detached; 0 in a group of one.

    >>> import torch
    >>> leave_one_out_advantages(torch.tensor([[4.0, 1.0, 1.0]]), torch.ones(1, 3).bool())
    tensor([[ 3.0000, -1.5000, -1.5000]])
    """
    count = mask.sum(-1, keepdim=True)
    centred = group_advantages(reward, mask, scale_rewards="none")
    return centred * count / (count - 1).clamp(min=1)


def _scaled_exp(x: Tensor, a: Tensor, b: Tensor | float = 1.0) -> Tensor:
    """Return a * b * e^x: infinite, like its derivatives, only where they are, not where e^x is."""
    # Two exps and not one used twice: backward would add its two gradients before halving them.
    return (a * (x / 2).exp()) * (b * (x / 2).exp())


def _clipped(
    log_ratio: Tensor, advantage: Tensor, lower: float, upper: float, ceiling: float = math.inf
) -> Tensor:
    r"""Return log-ratios x such that $\min(e^x A, \mathrm{clip}(e^x) A) = e^{clipped} A$.

    Clipped before exp and not after it: where the clip is active, backward would multiply the
    clip's 0 by an overflowed ratio. `ceiling` bounds the unclipped ratio (two-sided clipping).
    """
    return torch.where(
        advantage >= 0,
        log_ratio.clamp(max=min(upper, ceiling)),
        log_ratio.clamp(min=lower, max=max(upper, ceiling)),
    )


def _log_range(epsilon_low: float, epsilon_high: float) -> tuple[float, float]:
    """Return the logarithms of 1 - epsilon_low and 1 + epsilon_high."""
    return math.log(1 - epsilon_low) if epsilon_low < 1 else -math.inf, math.log1p(epsilon_high)


def _surrogate(
    log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """Return PPO's -min(ratio A, clip(ratio) A) of whole responses."""
    clipped = _clipped(log_ratio, advantage, *_log_range(epsilon_low, epsilon_high))
    return _scaled_exp(clipped, -advantage)


def _length(tokens: Tensor) -> Tensor:
    """Return the number of tokens [G, K, 1] of [G, K, T], 1 for none."""
    return tokens.sum(-1, keepdim=True).clamp(min=1)


def _divisor(
    tokens: Tensor, aggregation: Aggregation, max_length: int = 1
) -> tuple[Tensor | int, Per]:
    """Return the divisor of each response's token losses, and that of their sum over responses."""
    if aggregation == "sequence_mean":
        return _length(tokens), "responses"
    if aggregation == "token_mean":
        return 1, "response_tokens"
    if aggregation == "fixed_length":
        return max_length, "responses"
    raise ValueError(
        f"unknown aggregation {aggregation!r}; use 'sequence_mean', 'token_mean' or 'fixed_length'"
    )


def _live_tokens(token_mask: Tensor, mask: Tensor) -> Tensor:
    return token_mask & mask[..., None]


def _outcome(losses: Tensor, per: Per, score: Tensor, mask: Tensor) -> Outcome:
    """Make the outcome of losses [G, K] of responses or [G, K, T] of tokens, zero where none is."""
    sums = losses.sum(-1).sum(-1) if losses.dim() == 3 else losses.sum(-1)
    return Outcome((Term(sums, per),), live(score, mask).to(losses.dtype).detach())


class Sampled(NamedTuple):
    """Hold K graded responses to each of G prompts, with log-probs of the policy that drew them."""

    token_logps: Tensor  # [G, K, T]
    token_old_logps: Tensor  # [G, K, T]
    token_weights: Tensor  # [G, K, T]
    token_mask: Tensor  # [G, K, T] bool
    score: Tensor  # [G, K]
    mask: Tensor  # [G, K] bool

    @property
    def tokens(self) -> Tensor:
        """Return whether there is a token, [G, K, T]."""
        return _live_tokens(self.token_mask, self.mask)

    @property
    def logps(self) -> Tensor:
        """Return the policy's log-probs [G, K, T], 0 where there is no token."""
        return live(self.token_logps, self.tokens)

    @property
    def weights(self) -> Tensor:
        """Return the token weights [G, K, T], 0 where there is no token."""
        return live(self.token_weights, self.tokens)

    def advantages(self, scale_rewards: ScaleRewards) -> Tensor:
        """Return the advantages [G, K, 1] of `group_advantages`."""
        score = self.score.to(self.token_logps.dtype)
        return group_advantages(score, self.mask, scale_rewards=scale_rewards)[..., None]

    def log_ratio(self, importance: Importance = "token") -> Tensor:
        """Return log-ratios to the old policy, [G, K, T], 0 (e^0 is finite) where is no token.

        Raises:
            ValueError: an unknown `importance`.
        """
        tokens = self.tokens
        log_ratio = live(self.token_logps - self.token_old_logps, tokens)
        if importance == "token":
            return log_ratio
        mean = (log_ratio.sum(-1, keepdim=True) / _length(tokens)).expand_as(log_ratio)
        if importance == "sequence":
            return live(mean, tokens)
        if importance == "sequence_token":
            logps = self.token_logps
            return live(logps - logps.detach() + mean.detach(), tokens)
        raise ValueError(
            f"unknown importance {importance!r}; use 'token', 'sequence' or 'sequence_token'"
        )

    def outcome(self, losses: Tensor, per: Per) -> Outcome:
        """Return the outcome of losses [G, K] or [G, K, T], with the grades for rewards."""
        return _outcome(losses, per, self.score, self.mask)


def grpo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 0.2,
    epsilon_high: NonNegative = 0.2,
    delta: Positive | None = None,
    importance: Importance = "token",
    aggregation: Aggregation = "sequence_mean",
    scale_rewards: ScaleRewards = "group",
    max_length: Count = 3000,
) -> Outcome:
    r"""Group relative policy optimisation: PPO's clipped surrogate with the group as baseline.

    $$\frac{1}{L}\sum_t -a_t \min\big(\rho_t A,\ \mathrm{clip}(\rho_t, 1-\epsilon_{low},
    1+\epsilon_{high})\,A\big), \quad A = \frac{q - \mathrm{mean}\,q}{\mathrm{std}\,q + 10^{-4}}$$

    averaged over responses. The other names of this family are other settings of its options:
    `dr_grpo`, `bnpo`, `dapo`, `gspo`, `luspo`.

    - `delta` is an upper bound of the unclipped ratio, for negative advantages (INTELLECT-2,
      https://arxiv.org/abs/2505.07291); None is no bound.
    - `importance="sequence"` replaces $\rho_t$ by its geometric mean over the response.
    - `aggregation="token_mean"` divides by the tokens of the whole optimiser step,
      `"fixed_length"` a response's sum by `max_length`.

    The paper's KL term is `kl_penalty`. Paper: https://arxiv.org/abs/2402.03300

    >>> import torch
    >>> logps, old = torch.log(torch.tensor([[[0.9], [0.5]]])), torch.log(torch.tensor(0.5))
    >>> one, both = torch.ones(1, 2, 1), torch.ones(1, 2).bool()
    >>> q = torch.tensor([[1.0, -1.0]])
    >>> grpo(  # -(1.2 * 1) + 1.0 * 1
    ...     Sampled(logps, old, one, one.bool(), q, both), scale_rewards="none"
    ... ).terms[0].values
    tensor([-0.2000])
    """
    advantage = sampled.advantages(scale_rewards)
    ceiling = math.inf if delta is None else math.log(delta)
    bounds = _log_range(epsilon_low, epsilon_high)
    clipped = _clipped(sampled.log_ratio(importance), advantage, *bounds, ceiling)
    divisor, per = _divisor(sampled.tokens, aggregation, max_length)
    losses = _scaled_exp(clipped, -advantage / divisor, sampled.weights)
    return sampled.outcome(losses, per)


def dr_grpo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 0.2,
    epsilon_high: NonNegative = 0.2,
    max_length: Count = 3000,
    scale_rewards: ScaleRewards = "none",
) -> Outcome:
    r"""Dr. GRPO: `grpo` without the two normalisations that favour long wrong answers.

    $$\frac{1}{L_{max}}\sum_t -a_t \min\big(\rho_t A,\ \mathrm{clip}(\rho_t)\,A\big),
    \quad A = q - \mathrm{mean}\,q$$

    `max_length` $L_{max}$ is the limit of generation, 3000 in the official code. TRL keeps the
    division by the standard deviation unless told otherwise: `scale_rewards="group"`.
    Paper: https://arxiv.org/abs/2503.20783

    >>> import torch
    >>> logps, one = torch.log(torch.tensor([[[0.9], [0.5]]])), torch.ones(1, 2, 1)
    >>> q, both, old = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool(), torch.log(one / 2)
    >>> dr_grpo(Sampled(logps, old, one, one.bool(), q, both), max_length=4).terms[0].values
    tensor([-0.0500])
    """
    return grpo(
        sampled,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        aggregation="fixed_length",
        scale_rewards=scale_rewards,
        max_length=max_length,
    )


def dapo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 0.2,
    epsilon_high: NonNegative = 0.28,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""DAPO: `grpo` averaged over tokens, with more room above than below.

    $$\sum_t -a_t \min\big(\rho_t A,\ \mathrm{clip}(\rho_t, 1-\epsilon_{low},
    1+\epsilon_{high})\,A\big)$$

    divided by the number of tokens of the whole optimiser step. Dynamic sampling and the overlong
    punishment are matters of data and of $q$. Not Direct Advantage Policy Optimization, which is
    `step_dapo`. Paper: https://arxiv.org/abs/2503.14476

    >>> import torch
    >>> logps, one = torch.log(torch.tensor([[[0.9], [0.5]]])), torch.ones(1, 2, 1)
    >>> q, both, old = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool(), torch.log(one / 2)
    >>> dapo(Sampled(logps, old, one, one.bool(), q, both), scale_rewards="none").terms[0]
    Term(values=tensor([-0.2800]), per='response_tokens', weight=1.0)
    """
    return grpo(
        sampled,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        aggregation="token_mean",
        scale_rewards=scale_rewards,
    )


def bnpo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 0.2,
    epsilon_high: NonNegative = 0.2,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""TRL's `bnpo` loss: `dapo` with symmetric clipping.

    $$\sum_t -a_t \min\big(\rho_t A,\ \mathrm{clip}(\rho_t, 1-\epsilon_{low},
    1+\epsilon_{high})\,A\big)$$

    TRL divides by the tokens of the local micro-batch, so its value depends on how a step is cut;
    here, as everywhere, by those of the whole optimiser step. It is not the beta-normalised
    advantage of https://arxiv.org/abs/2506.02864, which has the same name.

    >>> import torch
    >>> logps, one = torch.log(torch.tensor([[[0.9], [0.5]]])), torch.ones(1, 2, 1)
    >>> q, both, old = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool(), torch.log(one / 2)
    >>> bnpo(Sampled(logps, old, one, one.bool(), q, both), scale_rewards="none").terms[0].values
    tensor([-0.2000])
    """
    return dapo(
        sampled,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        scale_rewards=scale_rewards,
    )


def gspo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 3e-4,
    epsilon_high: NonNegative = 4e-4,
    importance: Literal["sequence", "sequence_token"] = "sequence",
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""GSPO: `grpo` with one ratio a response, the geometric mean of its tokens' ratios.

    $$-\min\big(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\,A\big), \quad
    \rho = \left(\frac{\pi(y)}{\pi_{old}(y)}\right)^{1/L}$$

    `importance="sequence_token"` is GSPO-token: the same value and, at equal token weights, the
    same gradient; it differs where weights do. Paper: https://arxiv.org/abs/2507.18071

    >>> import torch
    >>> logps = torch.log(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> one, both, q = torch.ones(1, 2, 2), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> old = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.25]]]))
    >>> gspo(  # -1 + 2
    ...     Sampled(logps, old, one, one.bool(), q, both), scale_rewards="none"
    ... ).terms[0].values
    tensor([1.0000])
    """
    return grpo(
        sampled,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        importance=importance,
        scale_rewards=scale_rewards,
    )


def luspo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 2e-3,
    epsilon_high: NonNegative = 2.5e-3,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""LUSPO: `gspo` with every response's loss multiplied by its length.

    $$-L \min\big(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\,A\big)$$

    averaged over responses. Paper: https://arxiv.org/abs/2602.05261

    >>> import torch
    >>> logps = torch.log(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> one, both, q = torch.ones(1, 2, 2), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> old = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.25]]]))
    >>> luspo(Sampled(logps, old, one, one.bool(), q, both), scale_rewards="none").terms[0].values
    tensor([2.0000])
    """
    return grpo(
        sampled,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        importance="sequence",
        aggregation="fixed_length",
        scale_rewards=scale_rewards,
        max_length=1,
    )


def cispo(
    sampled: Sampled,
    *,
    epsilon_high: Positive = 5.0,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""CISPO: REINFORCE with clipped importance weights, so that no token loses its gradient.

    $$\sum_t -a_t\,\mathrm{sg}(\min(\rho_t, \epsilon_{high}))\,A\,\ell_t$$

    divided by the number of tokens of the whole optimiser step. `epsilon_high` bounds the ratio
    itself, not its distance from 1, as in TRL. Papers: https://arxiv.org/abs/2506.13585;
    https://arxiv.org/abs/2510.13786 for the default.

    >>> import torch
    >>> logps = torch.tensor([[[-1.0], [-2.0]]])
    >>> one, both, q = torch.ones(1, 2, 1), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> cispo(Sampled(logps, logps, one, one.bool(), q, both), scale_rewards="none").terms[0].values
    tensor([-1.])
    """
    advantage = sampled.advantages(scale_rewards)
    ratio = sampled.log_ratio().clamp(max=math.log(epsilon_high)).exp().detach()
    losses = -ratio * advantage * sampled.weights * sampled.logps
    return sampled.outcome(losses, "response_tokens")


def sapo(
    sampled: Sampled,
    *,
    temperature_pos: Positive = 1.0,
    temperature_neg: Positive = 1.05,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""SAPO: a sigmoid gate in place of the clip.

    $$\frac{1}{L}\sum_t -a_t \frac{4}{\tau}\,\sigma(\tau(\rho_t - 1))\,A$$

    averaged over responses; $\tau$ is `temperature_pos` where $A > 0$, else `temperature_neg`.
    Paper: https://arxiv.org/abs/2511.20347

    >>> import torch
    >>> logps = torch.tensor([[[-1.0], [-2.0]]])
    >>> one, both, q = torch.ones(1, 2, 1), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> sampled = Sampled(logps, logps, one, one.bool(), q, both)
    >>> sapo(  # -2 / 1 + 2 / 2
    ...     sampled, temperature_neg=2.0, scale_rewards="none"
    ... ).terms[0].values
    tensor([-1.])
    """
    advantage = sampled.advantages(scale_rewards)
    tau = torch.full_like(advantage, temperature_neg).masked_fill(advantage > 0, temperature_pos)
    # e^60 has saturated the sigmoid and has a finite product with its derivative of 0.
    gate = torch.sigmoid(tau * torch.expm1(sampled.log_ratio().clamp(max=60)))
    losses = -(4 / tau) * gate * advantage * sampled.weights
    return sampled.outcome(losses / _length(sampled.tokens), "responses")


def vespo(
    sampled: Sampled,
    *,
    k_pos: NonNegative = 2.0,
    lambda_pos: NonNegative = 3.0,
    k_neg: NonNegative = 3.0,
    lambda_neg: NonNegative = 2.0,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""VESPO: REINFORCE weighted by a gamma density of the whole response's ratio.

    $$\sum_t -a_t\,\mathrm{sg}(\varphi(\rho))\,A\,\ell_t, \quad
    \varphi(\rho) = \rho^k e^{\lambda(1 - \rho)}, \quad \rho = \frac{\pi(y)}{\pi_{old}(y)}$$

    divided by the number of tokens of the whole optimiser step; $(k, \lambda)$ is the first pair
    where $A \ge 0$, else the second. The official code bounds $\rho$ from below by $10^{-8}$, and
    a token's log-ratio by 20, which this one has no need of. Paper:
    https://arxiv.org/abs/2602.10693

    >>> import torch
    >>> logps = torch.tensor([[[-1.0], [-2.0]]])
    >>> one, both, q = torch.ones(1, 2, 1), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> vespo(Sampled(logps, logps, one, one.bool(), q, both), scale_rewards="none").terms[0].values
    tensor([-1.])
    """
    advantage = sampled.advantages(scale_rewards)
    gains = advantage >= 0
    k = torch.full_like(advantage, k_neg).masked_fill(gains, k_pos)
    rate = torch.full_like(advantage, lambda_neg).masked_fill(gains, lambda_pos)
    log_ratio = sampled.log_ratio().sum(-1, keepdim=True).detach()
    log_ratio = log_ratio.clamp(max=60)  # where the weight has long been 0
    density = torch.exp(k * log_ratio - rate * torch.expm1(log_ratio))
    losses = -density * advantage * sampled.weights * sampled.logps
    return sampled.outcome(losses, "response_tokens")


def gmpo(
    sampled: Sampled,
    *,
    epsilon_low: NonNegative = 0.4,
    epsilon_high: NonNegative = 0.4,
    scale_rewards: ScaleRewards = "group",
) -> Outcome:
    r"""GMPO: the geometric mean over tokens of GRPO's clipped terms, instead of their mean.

    $$-A\,\Big(\prod_t \rho'_t\Big)^{1/L}, \quad \rho'_t = \min(\rho_t, e^{\epsilon_{high}})
    \text{ if } A > 0, \text{ else } \max(\rho_t, e^{-\epsilon_{low}})$$

    averaged over responses; the range of the clip is that of log-ratios. Token weights other than
    0 play no part. Paper: https://arxiv.org/abs/2507.20673

    >>> import torch
    >>> logps = torch.log(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    >>> two, both, q = torch.ones(1, 2, 2), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> old = torch.log(torch.tensor([[[0.5, 0.5], [0.5, 0.125]]]))
    >>> gmpo(  # -1 + 4^(1/2)
    ...     Sampled(logps, old, two, two.bool(), q, both), scale_rewards="none"
    ... ).terms[0].values
    tensor([1.0000])
    """
    advantage = sampled.advantages(scale_rewards)
    clipped = _clipped(sampled.log_ratio(), advantage, -epsilon_low, epsilon_high)
    mean = clipped.sum(-1) / _length(sampled.tokens).squeeze(-1)
    losses = live(_scaled_exp(mean, -advantage.squeeze(-1)), sampled.tokens.any(-1))
    return sampled.outcome(losses, "responses")


def rloo(
    logps: Tensor,  # [G, K]
    old_logps: Tensor,  # [G, K]
    ref_logps: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: NonNegative = 0.05,
    epsilon_low: NonNegative = 0.2,
    epsilon_high: NonNegative = 0.2,
) -> Outcome:
    r"""RLOO: whole responses as actions, the others' mean reward as baseline.

    $$-\min\big(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\,A\big), \quad
    A_i = r_i - \mathrm{mean}_{j \ne i}\,r_j, \quad r = q - \beta(O - R)$$

    with $\rho = e^{S - O}$, averaged over responses. The paper has no clip: it takes one step per
    sample, where $\rho = 1$; the clip is TRL's. Reward $r$.
    Paper: https://arxiv.org/abs/2402.14740

    >>> import torch
    >>> logps, q = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> old, both = torch.log(torch.tensor([[0.5, 1.0]])), torch.ones(1, 2).bool()
    >>> rloo(logps, old, old, q, both).terms[0].values  # -1.2 * 2 + 1 * 2
    tensor([-0.4000])
    """
    old_logps = live(old_logps, mask)
    reward = live(score, mask).to(logps.dtype) - beta * (old_logps - live(ref_logps, mask))
    advantage = leave_one_out_advantages(reward, mask)
    log_ratio = live(logps, mask) - old_logps
    losses = _surrogate(log_ratio, advantage, epsilon_low, epsilon_high)
    return _outcome(losses, "responses", reward, mask)


def p3o(
    logps: Tensor,  # [G, 2]
    old_logps: Tensor,  # [G, 2]
    ref_logps: Tensor,  # [G, 2]
    score: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: NonNegative = 0.1,
    epsilon: NonNegative = 0.2,
    clipping: Literal["separate", "joint"] = "separate",
) -> Outcome:
    r"""Pairwise PPO: the policy gradient of a reward difference.

    $$-\frac{1}{2}\sum_{i \in \{1,2\}} \min\big(\rho_i A_i,\ \mathrm{clip}(\rho_i, 1-\epsilon,
    1+\epsilon)\,A_i\big), \quad A_1 = r_1 - r_2 = -A_2, \quad r = q - \beta(O - R)$$

    with $\rho_i = e^{S_i - O_i}$. `clipping`: "separate" is the paper's V1 as above, "joint" its
    V2, one ratio $\rho_1 / \rho_2$ for the pair and $A_1$. At $\pi = \pi_{old}$ both have the
    gradient $-(r_1 - r_2)\nabla(S_1 - S_2)/2$. Adding a function of the prompt to $q$ changes
    nothing. Reward $r$. Not verified against official code.
    Paper: https://arxiv.org/abs/2310.00212

    >>> import torch
    >>> logps, q = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> old, both = torch.log(torch.tensor([[0.5, 1.0]])), torch.ones(1, 2).bool()
    >>> p3o(logps, old, old, q, both).terms[0].values  # (-1.2 * 2 + 1 * 2) / 2
    tensor([-0.2000])
    """
    old_logps = live(old_logps, mask)
    reward = live(score, mask).to(logps.dtype) - beta * (old_logps - live(ref_logps, mask))
    advantage = (reward[:, 0] - reward[:, 1]).detach()
    log_ratio = live(logps, mask) - old_logps
    if clipping == "separate":
        first = _surrogate(log_ratio[:, 0], advantage, epsilon, epsilon)
        losses = first + _surrogate(log_ratio[:, 1], -advantage, epsilon, epsilon)
    elif clipping == "joint":
        losses = _surrogate(log_ratio[:, 0] - log_ratio[:, 1], advantage, epsilon, epsilon)
    else:
        raise ValueError(f"unknown clipping {clipping!r} of p3o; use 'separate' or 'joint'")
    return Outcome((Term(live(losses / 2, mask.all(-1))),), live(reward, mask).detach())


def nash_md(
    logps: Tensor,  # [G, K]
    token_logps: Tensor,  # [G, K, T]
    token_ref_logps: Tensor,  # [G, K, T]
    token_mask: Tensor,  # [G, K, T] bool
    score: Probabilities,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: NonNegative = 0.1,
) -> Outcome:
    r"""Nash-MD: REINFORCE towards the Nash equilibrium of a preference model.

    $$-(q - \tfrac{1}{2})\,S + \beta\sum_t \mathrm{sg}(\log\pi(y_t) - \log\pi_{ref}(y_t))\,\ell_t$$

    $q$ is the probability that the policy's response beats one of the mixture
    $\pi^{1-\alpha}\pi_{ref}^{\alpha}$ (a judge's, or the sigmoid of a difference of rewards): both
    responses are sampled by the caller. The value has no meaning; the gradient is the objective's.
    Paper: https://arxiv.org/abs/2312.00886

    >>> import torch
    >>> tokens, one = torch.tensor([[[-1.0, -2.0]]]), torch.ones(1, 1).bool()
    >>> nash_md(  # 0.5 * 3 + 0.1 * (-1 * -1 + 1 * -2)
    ...     tokens.sum(-1), tokens, torch.tensor([[[0.0, -3.0]]]), tokens < 0, one * 1.0, one
    ... ).terms[0].values
    tensor([1.4000])
    """
    tokens = _live_tokens(token_mask, mask)
    drift = live(token_logps - token_ref_logps, tokens).detach()
    penalty = (drift * live(token_logps, tokens)).sum(-1)
    quality = live(score, mask).to(logps.dtype) - 0.5
    losses = live(beta * penalty - quality * live(logps, mask), mask)
    return _outcome(losses, "responses", score, mask)


def dro(
    sampled: Sampled,
    *,
    beta: NonNegative = 1.0,
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean",
    scale_rewards: ScaleRewards = "none",
) -> Outcome:
    r"""Direct reward optimisation, token by token: a quadratic leash instead of ratios.

    $$\sum_t -a_t\left(A\,\ell_t - \tfrac{\beta}{2}(\ell_t - o_t)^2\right), \quad
    A = q - \mathrm{mean}\,q$$

    divided by the number of tokens of the whole optimiser step. The paper regresses whole
    responses, against the reference and with a learned value of the prompt for baseline; this is
    the form of RL libraries, with the group's mean. Paper: https://arxiv.org/abs/2405.19107

    >>> import torch
    >>> logps = torch.tensor([[[-1.0], [-2.0]]])
    >>> one, both, q = torch.ones(1, 2, 1), torch.ones(1, 2).bool(), torch.tensor([[1.0, -1.0]])
    >>> dro(Sampled(logps, logps - 2, one, one.bool(), q, both)).terms[0].values  # 1 + 2 - 2 + 2
    tensor([3.])
    """
    advantage = sampled.advantages(scale_rewards)
    gain = advantage * sampled.logps - beta / 2 * sampled.log_ratio().square()
    divisor, per = _divisor(sampled.tokens, aggregation)
    return sampled.outcome(-gain * sampled.weights / divisor, per)


def step_dapo(
    ratio: Tensor,  # [G, K]
    score: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Direct Advantage Policy Optimization: regression of a step's log-ratio on its advantage.

    $$\frac{1}{2}\Big(u - \frac{A}{\beta}\Big)^2, \quad u = S - R$$

    averaged over responses. A group is a state: its prompt is the question with the steps so far,
    its responses are next steps that the reference drew, and the grade of each is the advantage
    $A = V(s') - V(s)$ of a critic that was trained beforehand. Not the DAPO of ByteDance, which is
    `dapo`. The default of $\beta$ is DPO's: the paper's is not known to us. Not verified against
    official code. Reward $\beta u$. Paper: https://arxiv.org/abs/2412.18279

    >>> import torch
    >>> both = torch.ones(1, 2).bool()
    >>> step_dapo(torch.tensor([[4.0, 1.0]]), torch.tensor([[0.2, -0.3]]), both).terms[0].values
    tensor([10.])
    """
    gap = live(ratio - live(score, mask).to(ratio.dtype) / beta, mask)
    return _outcome(gap.square() / 2, "responses", beta * ratio, mask)


def kl_penalty(
    token_logps: Tensor,  # [G, K, T]
    token_ref_logps: Tensor,  # [G, K, T]
    token_mask: Tensor,  # [G, K, T] bool
    ratio: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    estimator: Literal["k3", "k2"] = "k3",
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean",
) -> Outcome:
    r"""Return an estimate of KL(policy || reference), which keeps a policy near it in mixtures.

    $$\frac{1}{L}\sum_t e^{d_t} - d_t - 1, \quad d_t = \log\pi_{ref}(y_t) - \log\pi(y_t)$$

    averaged over responses, from the sampled tokens alone: GRPO's penalty, with its beta for
    weight in {grpo: 1, kl_penalty: 0.04}. `estimator="k2"` is $d_t^2/2$, whose gradient is that
    of the divergence where the policy itself drew the responses. Reward $u = S - R$.
    Paper: https://arxiv.org/abs/2402.03300; estimators: http://joschu.net/blog/kl-approx.html

    >>> import torch
    >>> logps, ref = torch.log(torch.tensor([[[0.5]]])), torch.log(torch.tensor([[[1.0]]]))
    >>> one = torch.ones(1, 1).bool()
    >>> kl_penalty(logps, ref, ref == 0, one * 0.0, one).terms[0].values  # 2 - log(2) - 1
    tensor([0.3069])
    """
    tokens = _live_tokens(token_mask, mask)
    gap = live(token_ref_logps - token_logps, tokens)
    if estimator == "k3":
        losses = torch.expm1(gap) - gap
    elif estimator == "k2":
        losses = gap.square() / 2
    else:
        raise ValueError(f"unknown estimator {estimator!r} of kl_penalty; use 'k3' or 'k2'")
    divisor, per = _divisor(tokens, aggregation)
    return _outcome(losses / divisor, per, ratio, mask)


_CLIPPED = "-min(rho A, clip(rho, 1-el, 1+eh) A)"

POLICY_GRADIENT = catalogue(
    Objective(grpo, "list", "2402.03300", f"mean_t {_CLIPPED}, A = (q - mean q) / std q"),
    Objective(dr_grpo, "list", "2503.20783", f"sum_t {_CLIPPED} / L_max, A = q - mean q"),
    Objective(dapo, "list", "2503.14476", f"sum_t {_CLIPPED} / all tokens"),
    Objective(bnpo, "list", "TRL", f"sum_t {_CLIPPED} / all tokens, el = eh"),
    Objective(gspo, "list", "2507.18071", f"{_CLIPPED}, rho = exp(mean_t log rho_t)"),
    Objective(luspo, "list", "2602.05261", f"{_CLIPPED} L, rho = exp(mean_t log rho_t)"),
    Objective(cispo, "list", "2506.13585", "sum_t -sg(min(rho_t, eh)) A logp_t / all tokens"),
    Objective(sapo, "list", "2511.20347", "mean_t -(4/tau) sig(tau (rho_t - 1)) A"),
    Objective(
        vespo,
        "list",
        "2602.10693",
        "sum_t -sg(rho^k e^(lam (1 - rho))) A logp_t / all tokens, rho = e^(S - O)",
    ),
    Objective(gmpo, "list", "2507.20673", "-A exp(mean_t clip(log rho_t)), clipped by sign of A"),
    Objective(
        rloo, "list", "2402.14740", f"{_CLIPPED}, A_i = r_i - mean_(j!=i) r_j, r = q - beta (O - R)"
    ),
    Objective(
        p3o,
        "pair",
        "2310.00212",
        "-(1/2) sum_i min(rho_i A_i, clip(rho_i) A_i), A_1 = r_1 - r_2 = -A_2",
    ),
    Objective(
        nash_md, "point", "2312.00886", "-(q - 1/2) S + beta sum_t sg(logp_t - ref_t) logp_t"
    ),
    Objective(
        dro, "list", "2405.19107", "sum_t -(A logp_t - (beta/2) (logp_t - old_t)^2) / all tokens"
    ),
    Objective(step_dapo, "point", "2412.18279", "(1/2) (u - A / beta)^2, A of the step"),
    Objective(kl_penalty, "point", "2402.03300", "mean_t e^d - d - 1, d = ref_t - logp_t"),
)
