r"""Objectives that judge each response alone, by its label: desirable or undesirable.

They work on groups of any size, pairs included. Notation: $u = S - S_{ref}$ (`ratio`). Losses are
summed over a group's responses and averaged over responses, not groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Objective, Outcome, Per, Statistic, Term
from .links import live, logistic


def _outcome(losses: Tensor, rewards: Tensor, mask: Tensor, per: Per = "responses") -> Outcome:
    """Losses [G, K] of the live slots, and rewards [G, K] of the same."""
    return Outcome((Term(live(losses, mask).sum(-1), per),), live(rewards, mask).detach())


def kto(
    ratio: Tensor,  # [G, K]
    z0: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Outcome:
    r"""Kahneman-Tversky optimisation: gains and losses against a reference point.

    $$\lambda_D\,[1 - \sigma(\beta(u - z_0))] \text{ if desirable, else }
    \lambda_U\,[1 - \sigma(\beta(z_0 - u))]$$

    $z_0 = \max(0, \mathrm{mean}\,u(x, y'))$ estimates KL(policy || reference) from responses $y'$
    to other prompts, averaged over every rank, without gradient. Keep $\lambda_D n_D / \lambda_U
    n_U$ between 1 and 4/3. Reward $\beta u$. Paper: https://arxiv.org/abs/2402.01306

    >>> import torch
    >>> u, live = torch.tensor([[3.0], [3.0]]), torch.tensor([[True], [True]])
    >>> kto(u, torch.tensor(3.0), torch.tensor([[True], [False]]), live).terms[0].values
    tensor([0.5000, 0.5000])
    """
    gain = beta * (live(ratio, mask) - z0.clamp(min=0))
    # 1 - sigmoid(x) as sigmoid(-x), which keeps its digits when x is large
    losses = torch.where(
        label, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )
    return _outcome(losses, beta * ratio, mask)


def _mismatched(scores: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return scores["mismatched_ratio"], scores["mask"].any(-1)


def bco(
    ratio: Tensor,  # [G, K]
    shift: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Binary classifier optimisation: a classifier whose logit is the shifted implicit reward.

    $$-\log\sigma(\beta u - \delta) \text{ if desirable, else } -\log\sigma(\delta - \beta u)$$

    $\delta$ is the mean of $\beta u$ over every response seen so far in training, this step
    included, without gradient. The paper's underlying-distribution-matching weights of
    undesirable rows are sample weights: put them in the data. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2404.04656

    >>> import torch
    >>> u, both = torch.tensor([[10.0, -10.0]]), torch.tensor([[True, True]])
    >>> bco(u, torch.tensor(0.0), torch.tensor([[True, False]]), both).terms[0].values
    tensor([0.6265])
    """
    z = beta * live(ratio, mask) - shift
    return _outcome(logistic(torch.where(label, z, -z)), beta * ratio, mask)


def _rewards(scores: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return hyper["beta"] * scores["ratio"], scores["mask"]


def npo(
    ratio: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Negative preference optimisation: unlearn the undesirable responses.

    $$-\frac{2}{\beta}\log\sigma(-\beta u)$$

    averaged over undesirable (forget) responses; desirable ones are ignored here, so the mixture
    {npo: 1, sft: 1} on rows of both kinds is NPO with a retain term. Tends to gradient ascent on
    the likelihood as $\beta \to 0$. Reward $\beta u$. Paper: https://arxiv.org/abs/2404.05868

    >>> import torch
    >>> u, live = torch.tensor([[0.0], [7.0]]), torch.tensor([[True], [True]])
    >>> npo(u, torch.tensor([[False], [True]]), live, beta=2.0).terms[0].values
    tensor([0.6931, 0.0000])
    """
    forget = mask & ~label
    losses = (2 / beta) * logistic(-beta * live(ratio, forget))
    return Outcome(
        (Term(live(losses, forget).sum(-1), "undesirable"),), live(beta * ratio, mask).detach()
    )


POINTWISE: dict[str, Objective] = {
    "kto": Objective(
        "kto",
        kto,
        "point",
        "2402.01306",
        "lam_D sig(-beta (u - z0)) if desirable else lam_U sig(beta (u - z0))",
        {"z0": Statistic(_mismatched)},
        extras=("mismatched",),
    ),
    "bco": Objective(
        "bco",
        bco,
        "point",
        "2404.04656",
        "-logsig(beta u - shift) if desirable else -logsig(shift - beta u)",
        {"shift": Statistic(_rewards, memory="mean")},
    ),
    "npo": Objective(
        "npo", npo, "point", "2404.05868", "-(2/beta) logsig(-beta u), undesirable only"
    ),
}
