r"""Objectives that use a per-token statistic beyond the label's log-probability.

Notation: $u$ = `ratio`, $F = \sum_t KL(\pi_{ref} \| \pi)_t$ (`kl`), over a response's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Objective, Outcome
from .links import live
from .pairwise import dpo


def tdpo1(
    ratio: Tensor,  # [G, 2]
    kl: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
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
    beta: float = 0.1,
    alpha: float = 0.5,
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


TOKEN: dict[str, Objective] = {
    "tdpo1": Objective(
        "tdpo1", tdpo1, "pair", "2404.11999", "-logsig(beta (u_w - u_l - (F_l - F_w)))"
    ),
    "tdpo2": Objective(
        "tdpo2", tdpo2, "pair", "2404.11999", "-logsig(beta (u_w - u_l - alpha (F_l - sg F_w)))"
    ),
}
