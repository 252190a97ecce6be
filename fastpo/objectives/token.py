r"""Objectives that use a per-token statistic beyond the label's log-probability.

Notation: $u$ = `ratio`, $F = \sum_t KL(\pi_{ref} \| \pi)_t$ (`kl`), $G = \sum_t KL(\pi \|
\pi_{ref})_t$ (`kl_reverse`), over a response's tokens. Token weights $a_t$ are inside all of
them; objectives that differ from another only by such weights (DDPO, Mask-DPO, LD-DPO, D2PO) are
that other one with weights in the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.domain import NonNegative, Positive

from .base import Objective, Outcome, catalogue
from .links import live, logistic
from .pairwise import dpo, margin_of, pair_outcome


def tdpo1(
    ratio: Tensor,  # [G, 2]
    kl: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Token-level DPO, first form: DPO on $u + F$.

    $$-\log\sigma(\beta[(u_w - u_l) - (F_l - F_w)])$$

    Gradient flows through both $F$. Reward $\beta(u + F)$.
    Paper: https://arxiv.org/abs/2404.11999

    >>> import torch
    >>> u, f = torch.tensor([[4.0, -2.0]]), torch.tensor([[1.0, 7.0]])
    >>> tdpo1(u, f, torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    return dpo(ratio + kl, mask, beta=beta)


def tdpo2(
    ratio: Tensor,  # [G, 2]
    kl: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
) -> Outcome:
    r"""Token-level DPO, second form: the divergence of the chosen response is a baseline.

    $$-\log\sigma(\beta[(u_w - u_l) - \alpha(F_l - \mathrm{sg}(F_w))])$$

    No gradient flows through the chosen response's $F_w$. Reward $\beta(u + F)$.
    Paper: https://arxiv.org/abs/2404.11999

    >>> import torch
    >>> u, f = torch.tensor([[4.0, -2.0]]), torch.tensor([[1.0, 13.0]])
    >>> tdpo2(u, f, torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    chosen_kl, rejected_kl = kl.unbind(-1)
    baseline = torch.stack((chosen_kl.detach(), rejected_kl), dim=-1)
    terms = dpo(ratio + alpha * baseline, mask, beta=beta).terms
    return Outcome(terms, live(beta * (ratio + kl), mask).detach())


def sparse_po(
    ratio: Tensor,  # [G, 2]
    kl: Tensor,  # [G, 2]
    token_weights: Tensor,  # [G, 2, T]
    token_kl_weights: Tensor,  # [G, 2, T]
    token_mask: Tensor,  # [G, 2, T] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    l1_weight: NonNegative = 1e-3,
    kl_l1_weight: NonNegative = 0.0,
) -> Outcome:
    r"""SparsePO: `tdpo1` under masks of tokens, and a price on the masks.

    $$-\log\sigma\Big(\beta\big[(u_w - u_l) - (F_l - F_w)\big]\Big) +
    \lambda_u\sum_t (|a_{w,t}| + |a_{l,t}|) + \lambda_d\sum_t (|d_{w,t}| + |d_{l,t}|)$$

    The masks are token weights that $u = \sum_t a_t \log(\pi/\pi_{ref})$ and $F = \sum_t d_t
    KL_t$ contain: learned ones (`fastpo.model.masks`) get gradient through both and through their
    price. Common masks are $a = d$, priced by `l1_weight` alone; fixed ones (the paper's MaPO, made
    from the reference's activations) go with `l1_weight=0`. The price is a sum over tokens, not a
    mean. Defaults of the helpful-and-harmless runs with common masks; `beta` 0.8 and prices of 0 on
    IMDB and TL;DR. Reward $\beta(u + F)$. Paper: https://arxiv.org/abs/2410.05102

    >>> import torch
    >>> u, f, both = torch.tensor([[4.0, -2.0]]), torch.tensor([[1.0, 7.0]]), torch.ones(1, 2) > 0
    >>> ones = torch.ones(1, 2, 3)
    >>> sparse_po(u, f, ones, ones, ones > 0, both).terms[0].values
    tensor([0.6991])
    """
    preference = tdpo1(ratio, kl, mask, beta=beta)
    tokens = token_mask & mask[..., None]
    price = l1_weight * live(token_weights, tokens).abs()
    price = (price + kl_l1_weight * live(token_kl_weights, tokens).abs()).sum((-2, -1))
    return pair_outcome(preference.terms[0].values + price, preference.rewards, mask)


def tis_dpo(
    ratio: Tensor,  # [G, 2]
    kl_reverse: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
) -> Outcome:
    r"""TIS-DPO: token-level importance sampling, with the sequence divergence in the margin.

    $$-\log\sigma\big(\beta[(u_w - u_l) - \alpha(G_w - G_l)]\big)$$

    The importance weights are the token weights, estimated beforehand by two contrastive models.
    Gradient flows through both $G$. The official code's sequence-level form is `dpo` with the same
    weights. Reward $\beta(u - \alpha G)$. Paper: https://arxiv.org/abs/2410.04350

    >>> import torch
    >>> u, g = torch.tensor([[4.0, -2.0]]), torch.tensor([[13.0, 1.0]])
    >>> tis_dpo(u, g, torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    return dpo(ratio - alpha * kl_reverse, mask, beta=beta)


def critical_dpo(
    ratio: Tensor,  # [G, 2]
    token_logps: Tensor,  # [G, 2, T]
    token_ref_logps: Tensor,  # [G, 2, T]
    token_weights: Tensor,  # [G, 2, T]
    token_mask: Tensor,  # [G, 2, T] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""cDPO of critical tokens, as its code has it: DPO's link at every position.

    $$\mathrm{mean}_t\;-\log\sigma\big(\beta[x_{w,t} - x_{l,t}]\big), \quad
    x_t = a_t(\log\pi(y_t) - \log\pi_{ref}(y_t))$$

    over the positions that either response reaches; past its end the shorter one counts 0. The
    official code also averages over prompt and padding, which scales the gradient by what else is
    in the batch. The paper's summed form is `dpo` with these token weights: the critical score
    $c_t$ on the chosen side, $1 - c_t$ on the rejected one. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2411.19943

    >>> import torch
    >>> logps, ref = torch.tensor([[[0.0, -2.0], [-10.0, -2.0]]]), torch.tensor(-2.0)
    >>> one, both = torch.ones(1, 2, 2), torch.tensor([[True, True]])
    >>> u = torch.tensor([[2.0, -8.0]])
    >>> critical_dpo(u, logps, ref, one, one > 0, both).terms[0].values  # of margins 10 and 0
    tensor([0.5032])
    """
    tokens = token_mask & mask[..., None]
    x = live(token_weights, tokens) * live(token_logps - token_ref_logps, tokens)
    positions = tokens.any(1)  # [G, T]
    links = live(logistic(beta * (x[:, 0] - x[:, 1])), positions)
    losses = links.sum(-1) / positions.sum(-1).clamp(min=1)
    return pair_outcome(losses, beta * ratio, mask)


def _token_regulariser(
    token_logps: Tensor, token_rewards: Tensor, tokens: Tensor, average: bool
) -> Tensor:
    r"""Return $-\sum_t \hat r_t \log\pi(y_t)$ [G] of both responses, or by their lengths."""
    sums = -(live(token_rewards, tokens) * live(token_logps, tokens)).sum(-1)
    return (sums / tokens.sum(-1).clamp(min=1) if average else sums).sum(-1)


def treg(
    ratio: Tensor,  # [G, 2]
    token_logps: Tensor,  # [G, 2, T]
    token_rewards: Tensor,  # [G, 2, T]
    token_mask: Tensor,  # [G, 2, T] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.25,
    average: bool = False,
) -> Outcome:
    r"""T-REG: DPO, and a policy gradient of token rewards where DPO is not yet satisfied.

    $$-\log\sigma(z) + \alpha\,\mathrm{sg}(\sigma(-z))\,(C_w + C_l), \quad z = \beta(u_w - u_l),
    \quad C = -\beta\sum_t \hat r_t \log\pi(y_t)$$

    $\hat r_t$ is `token_rewards`: in the paper $\sigma(d_t) - 1/2$, with $d_t$ the difference of
    the reference's log-probs of the token after a prompt for better and one for worse answers.
    `average=True` divides $C$ by the length. Reward $\beta u$. Not verified against official code.
    Paper: https://arxiv.org/abs/2412.02685

    >>> import torch
    >>> logps, both = torch.full((1, 2, 2), -10.0), torch.tensor([[True, True]])
    >>> rewards = torch.tensor([[[0.5, 0.5], [-0.5, 0.25]]])
    >>> treg(  # log 2 + 0.25 * 0.5 * 0.1 * (10 - 2.5)
    ...     torch.zeros(1, 2), logps, rewards, logps < 0, both
    ... ).terms[0].values
    tensor([0.7869])
    """
    z = beta * margin_of(ratio, mask)
    tokens = token_mask & mask[..., None]
    cost = beta * _token_regulariser(token_logps, token_rewards, tokens, average)
    losses = logistic(z) + alpha * torch.sigmoid(-z).detach() * cost
    return pair_outcome(losses, beta * ratio, mask)


def treg_simpo(
    mean_logps: Tensor,  # [G, 2]
    token_logps: Tensor,  # [G, 2, T]
    token_rewards: Tensor,  # [G, 2, T]
    token_mask: Tensor,  # [G, 2, T] bool
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    alpha: NonNegative = 0.25,
    average: bool = True,
) -> Outcome:
    r"""T-REG on SimPO: `treg` with SimPO's margin, and no reference but the one behind the rewards.

    $$-\log\sigma(z) + \alpha\,\mathrm{sg}(\sigma(-z))\,(C_w + C_l), \quad
    z = \beta(s_w - s_l) - \gamma, \quad C = -\frac{\beta}{L}\sum_t \hat r_t \log\pi(y_t)$$

    with $\gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$. `average=False` takes sums of tokens.
    Reward $\beta s$. Not verified against official code.
    Paper: https://arxiv.org/abs/2412.02685

    >>> import torch
    >>> logps, both = torch.full((1, 2, 2), -1.0), torch.tensor([[True, True]])
    >>> rewards = torch.tensor([[[0.5, 0.5], [-0.5, 0.0]]])
    >>> treg_simpo(  # log 2 + 0.25 * 0.5 * 2 * (0.5 - 0.25)
    ...     logps.mean(-1), logps, rewards, logps < 0, both, gamma_beta_ratio=0.0
    ... ).terms[0].values
    tensor([0.7556])
    """
    z = beta * (margin_of(mean_logps, mask) - gamma_beta_ratio)
    tokens = token_mask & mask[..., None]
    cost = beta * _token_regulariser(token_logps, token_rewards, tokens, average)
    losses = logistic(z) + alpha * torch.sigmoid(-z).detach() * cost
    return pair_outcome(losses, beta * mean_logps, mask)


TOKEN = catalogue(
    Objective(tdpo1, "pair", "2404.11999", "-logsig(beta (u_w - u_l - (F_l - F_w)))"),
    Objective(tdpo2, "pair", "2404.11999", "-logsig(beta (u_w - u_l - alpha (F_l - sg F_w)))"),
    Objective(
        sparse_po,
        "pair",
        "2410.05102",
        "-logsig(beta (u_w - u_l - (F_l - F_w))) + l1 sum_t |a_t| (+ |d_t|), a in u, d in F",
    ),
    Objective(tis_dpo, "pair", "2410.04350", "-logsig(beta (u_w - u_l - alpha (G_w - G_l)))"),
    Objective(
        critical_dpo,
        "pair",
        "2411.19943",
        "mean_t -logsig(beta (x_wt - x_lt)), x_t = a_t (logp_t - ref_t)",
    ),
    Objective(
        treg,
        "pair",
        "2412.02685",
        "-logsig(z) - alpha sg(sig(-z)) beta sum_t r_t logp_t, z = beta (u_w - u_l)",
    ),
    Objective(
        treg_simpo,
        "pair",
        "2412.02685",
        "-logsig(z) - alpha sg(sig(-z)) beta mean_t r_t logp_t, z = beta (s_w - s_l) - gamma",
    ),
)
