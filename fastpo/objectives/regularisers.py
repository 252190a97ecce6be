"""Terms that keep a policy close to good text, or random, while preferences pull it elsewhere.

They are made to be mixed in, `{"dpo": 1.0, "sft": 0.1}`, and are objectives like any other.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .base import Objective, Outcome, Term, catalogue
from .links import live

Reduction = Literal["token_mean", "sequence_mean", "sum"]
"""How an NLL is averaged: over tokens, over per-response means, or over per-response sums."""


def _average(
    sums: Tensor,  # [G, K]
    means: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    reduction: Reduction,
    weight: float = 1.0,
) -> Term:
    """Return one term of the desirable responses, each with a sum and a mean over its tokens."""
    good = label & mask
    if reduction == "token_mean":
        return Term(live(sums, good).sum(-1), "chosen_tokens", weight)
    if reduction == "sequence_mean":
        return Term(live(means, good).sum(-1), "desirable", weight)
    if reduction == "sum":
        return Term(live(sums, good).sum(-1), "desirable", weight)
    raise ValueError(f"unknown reduction {reduction!r}; use 'token_mean', 'sequence_mean' or 'sum'")


def nll(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Reduction = "token_mean",
    weight: float = 1.0,
) -> Term:
    """Return the negative log-likelihood of the desirable responses as one term of a loss.

    Raises:
        ValueError: an unknown `reduction`.
    """
    return _average(-logps, -mean_logps, label, mask, reduction, weight)


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

    Conditional SFT (csft; MEET, https://arxiv.org/abs/2310.00819) is this loss on rows whose
    prompts name the quality of the response, all of them labelled desirable. The logged reward is
    the log-probability $S$ itself.

    >>> import torch
    >>> logps = torch.tensor([[-6.0, -9.0]])
    >>> sides = torch.tensor([[True, False]])
    >>> sft(logps, logps / 3, sides, torch.tensor([[True, True]])).terms[0]
    Term(values=tensor([6.]), per='chosen_tokens', weight=1.0)
    """
    term = nll(logps, mean_logps, label, mask, reduction=reduction)
    return Outcome((term,), live(logps, mask).detach())


def gold_nll(
    gold_logps: Tensor,  # [G]
    gold_mean_logps: Tensor,  # [G]
    mask: Tensor,  # [G, K] bool
    reduction: Reduction,
    weight: float = 1.0,
) -> Term:
    """Return the negative log-likelihood of the extra response `gold` as one term of a loss.

    Raises:
        ValueError: an unknown `reduction`.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; use one of {get_args(Reduction)}")
    scores = gold_mean_logps if reduction == "sequence_mean" else gold_logps
    per = "gold_tokens" if reduction == "token_mean" else "groups"
    return Term(live(-scores, mask.any(-1)), per, weight)


def gold_sft(
    gold_logps: Tensor,  # [G]
    gold_mean_logps: Tensor,  # [G]
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Reduction = "token_mean",
) -> Outcome:
    r"""Supervised fine-tuning on the extra response `gold`, which is none of the candidates.

    $$-\sum_t \log\pi(y^{gold}_t)$$

    reduced as in `sft`, with groups in place of desirable responses. `tpo` has it built in. It
    gives candidates no reward: 0 is logged.

    Raises:
        ValueError: an unknown `reduction`.

    >>> import torch
    >>> logps = torch.tensor([-6.0])
    >>> gold_sft(logps, logps / 3, torch.tensor([[True, True]])).terms[0]
    Term(values=tensor([6.]), per='gold_tokens', weight=1.0)
    """
    rewards = torch.zeros_like(mask, dtype=gold_logps.dtype)
    return Outcome((gold_nll(gold_logps, gold_mean_logps, mask, reduction),), rewards)


def kl_retain(
    kl: Tensor,  # [G, K]
    length: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Reduction = "token_mean",
) -> Outcome:
    r"""Divergence from the reference on the desirable responses: what unlearning should not change.

    $$F_w = \sum_t KL(\pi_{ref} \| \pi)_t$$

    over response tokens, averaged like the NLL of `sft`: `token_mean` is $\sum F_w / \sum L_w$,
    `sequence_mean` the mean of $F_w / L_w$, `sum` the mean of $F_w$. Mix it with `npo` or `ga`. The
    NPO paper's code also counts prompt and padding positions. Needs the reference's whole
    distribution. The logged reward is $-F$. Paper: https://arxiv.org/abs/2404.05868

    Raises:
        ValueError: an unknown `reduction`.

    >>> import torch
    >>> kl, lengths = torch.tensor([[6.0, 9.0]]), torch.tensor([[3.0, 3.0]])
    >>> both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    >>> kl_retain(kl, lengths, first, both).terms[0]
    Term(values=tensor([6.]), per='chosen_tokens', weight=1.0)
    """
    mean = live(kl, mask) / live(length, mask).clamp(min=1)
    return Outcome((_average(kl, mean, label, mask, reduction),), live(-kl, mask).detach())


def entropy(
    entropy: Tensor,  # [G, K]
    mean_entropy: Tensor,  # [G, K]
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
) -> Outcome:
    r"""Entropy bonus: a positive weight in a mixture raises the entropy of the policy's tokens.

    $$-\sum_t H_t, \quad H_t = -\sum_v \pi_t(v) \log \pi_t(v)$$

    of all candidates, averaged over all their tokens (`token_mean`, PPO's and GRPO's bonus), or
    first over each response's (`sequence_mean`). The logged reward is the mean entropy of a
    response. Paper: https://arxiv.org/abs/1602.01783

    Raises:
        ValueError: an unknown `reduction`.

    >>> import torch
    >>> total, both = torch.tensor([[6.0, 3.0]]), torch.tensor([[True, True]])
    >>> entropy(total, total / 3, both).terms[0]
    Term(values=tensor([-9.]), per='response_tokens', weight=1.0)
    """
    if reduction == "token_mean":
        term = Term(-live(entropy, mask).sum(-1), "response_tokens")
    elif reduction == "sequence_mean":
        term = Term(-live(mean_entropy, mask).sum(-1), "responses")
    else:
        raise ValueError(
            f"unknown reduction {reduction!r} of entropy; use 'token_mean' or 'sequence_mean'"
        )
    return Outcome((term,), live(mean_entropy, mask).detach())


REGULARISERS = catalogue(
    Objective(sft, "point", "maximum likelihood", "-S_w, averaged over tokens", labels=(True,)),
    Objective(
        gold_sft, "point", "maximum likelihood", "-S_gold, averaged over tokens", extras=("gold",)
    ),
    Objective(
        kl_retain,
        "point",
        "2404.05868",
        "sum_t KL(ref || policy)_t, desirable only",
        labels=(True,),
    ),
    Objective(entropy, "point", "1602.01783", "-sum_t H_t, averaged over tokens"),
)
