"""Likelihood terms: what keeps a policy close to good text while preferences pull it elsewhere."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .base import Objective, Outcome, Term
from .links import live

Reduction = Literal["token_mean", "sequence_mean", "sum"]
"""How an NLL is averaged: over tokens, over per-response means, or over per-response sums."""


def nll(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Reduction = "token_mean",
    weight: float = 1.0,
) -> Term:
    """Negative log-likelihood of the desirable responses as one term of a loss.

    Raises:
        ValueError: an unknown `reduction`.
    """
    good = label & mask
    if reduction == "token_mean":
        return Term(-live(logps, good).sum(-1), "chosen_tokens", weight)
    if reduction == "sequence_mean":
        return Term(-live(mean_logps, good).sum(-1), "desirable", weight)
    if reduction == "sum":
        return Term(-live(logps, good).sum(-1), "desirable", weight)
    raise ValueError(
        f"unknown NLL reduction {reduction!r}; use 'token_mean', 'sequence_mean' or 'sum'"
    )


def sft(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Reduction = "token_mean",
) -> Outcome:
    r"""Supervised fine-tuning on the desirable responses $y_w$; undesirable ones are ignored.

    With $S = \sum_t \log\pi(y_t)$ and $L$ tokens, one of

    - `token_mean`: $-\sum S_w / \sum L_w$, both sums over the whole optimiser step, so the value
      does not depend on how a step is cut into micro-batches and ranks;
    - `sequence_mean`: the mean of $-S_w / L_w$ (Iterative RPO, https://arxiv.org/abs/2404.19733);
    - `sum`: the mean of $-S_w$ (the NLL of the CPO and RPO papers as they are printed).

    The logged reward is the log-probability $S$ itself.

    >>> import torch
    >>> logps = torch.tensor([[-6.0, -9.0]])
    >>> sides = torch.tensor([[True, False]])
    >>> sft(logps, logps / 3, sides, torch.tensor([[True, True]])).terms[0]
    Term(values=tensor([6.]), per='chosen_tokens', weight=1.0)
    """
    term = nll(logps, mean_logps, label, mask, reduction=reduction)
    return Outcome((term,), live(logps, mask).detach())


REGULARISERS: dict[str, Objective] = {
    "sft": Objective("sft", sft, "point", "maximum likelihood", "-S_w, averaged over tokens"),
}
