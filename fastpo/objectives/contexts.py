r"""Objectives that score a response after several prompts, or against two references.

$u = S - S_{ref}$ (`ratio`) and $s = S/L$ (`mean_logps`) are those after the row's `prompt`; a
letter with a prime, $u'$, is the same response after the `context_prompt`, $u^0$ after the
`bare_prompt`. The papers' contexts are images: another, corrupted or missing one. Here a context
is text, such as a retrieved document. In a padded group nothing is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.domain import NonNegative, Positive

from .base import Objective, Outcome, Term, catalogue
from .links import live, logistic
from .pairwise import dpo, pair_outcome
from .reference_free import simpo


def chosen_gap(score: Tensor, context_chosen: Tensor, mask: Tensor) -> Tensor:
    """Return [G]: the chosen response's score after its prompt less that after another."""
    return live(score, mask)[:, 0] - live(context_chosen, mask[:, 0])


def re_align(
    ratio: Tensor,  # [G, 2]
    context_chosen_ratio: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Re-Align's rDPO: DPO, and the chosen response is worth more after its own prompt.

    $$-\log\sigma(\beta(u_w - u_l)) - \log\sigma(\beta(u_w - u'_w))$$

    The paper's other context is a retrieved image. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2502.13146

    >>> import torch
    >>> u, other = torch.tensor([[5.0, -5.0]]), torch.tensor([-5.0])
    >>> re_align(u, other, torch.tensor([[True, True]])).terms[0].values
    tensor([0.6265])
    """
    preference = dpo(ratio, mask, beta=beta).terms[0].values
    conditional = logistic(beta * chosen_gap(ratio, context_chosen_ratio, mask))
    return pair_outcome(preference + conditional, beta * ratio, mask)


def mdpo(
    ratio: Tensor,  # [G, 2]
    context_chosen_ratio: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    anchor: float = 0.0,
) -> Outcome:
    r"""Conditional DPO with an anchor: the chosen response must also gain likelihood by itself.

    $$-\log\sigma(\beta(u_w - u_l)) - \log\sigma(\beta(u_w - u'_w))
    - \log\sigma(\beta u_w - \delta)$$

    $\delta$ = `anchor`. The paper's other context is the image with a part masked. Reward
    $\beta u$. Paper: https://arxiv.org/abs/2406.11839

    >>> import torch
    >>> u, other = torch.tensor([[10.0, 0.0]]), torch.tensor([0.0])
    >>> mdpo(u, other, torch.tensor([[True, True]])).terms[0].values  # three times z = 1
    tensor([0.9398])
    """
    conditional = re_align(ratio, context_chosen_ratio, mask, beta=beta).terms[0].values
    anchored = logistic(beta * live(ratio, mask)[:, 0] - anchor)
    return pair_outcome(conditional + anchored, beta * ratio, mask)


def svco(
    ratio: Tensor,  # [G, 2]
    context_chosen_ratio: Tensor,  # [G]
    context_rejected_ratio: Tensor,  # [G]
    bare_chosen_ratio: Tensor,  # [G]
    bare_rejected_ratio: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta_match: NonNegative = 0.1,
    beta_mismatch: NonNegative = 0.1,
    beta_other_match: NonNegative = 0.1,
    beta_other_mismatch: NonNegative = 0.1,
) -> Outcome:
    r"""Symmetric contrastive optimisation: each response fits its own context and not the other's.

    $$-\log\sigma(\beta_1(u_w - u^0_w)) - \log\sigma(\beta_2(u^0_w - u'_w))
    - \log\sigma(\beta_3(u'_l - u^0_l)) - \log\sigma(\beta_4(u^0_l - u_l))$$

    $\beta_1$ to $\beta_4$ are `beta_match`, `beta_mismatch`, `beta_other_match` and
    `beta_other_mismatch`. The rejected response is the right one after the `context_prompt`, and
    the `bare_prompt` has neither context; no two responses are compared. Rewards $\beta_1 u_w$,
    $\beta_4 u_l$. Paper (S-VCO): https://arxiv.org/abs/2502.13928

    >>> import torch
    >>> u, zero = torch.tensor([[10.0, -10.0]]), torch.tensor([0.0])
    >>> svco(u, zero - 10, zero + 10, zero, zero, torch.tensor([[True, True]])).terms[0].values
    tensor([1.2530])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)
    other_chosen, other_rejected, bare_chosen, bare_rejected = (
        live(score, mask.all(-1))
        for score in (
            context_chosen_ratio,
            context_rejected_ratio,
            bare_chosen_ratio,
            bare_rejected_ratio,
        )
    )
    losses = (
        logistic(beta_match * (chosen - bare_chosen))
        + logistic(beta_mismatch * (bare_chosen - other_chosen))
        + logistic(beta_other_match * (other_rejected - bare_rejected))
        + logistic(beta_other_mismatch * (bare_rejected - rejected))
    )
    rewards = torch.stack((beta_match * ratio[:, 0], beta_other_mismatch * ratio[:, 1]), dim=-1)
    return pair_outcome(losses, rewards, mask)


def solopo(
    ratio: Tensor,  # [G, 2]
    context_chosen_ratio: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
) -> Outcome:
    r"""Short-to-long preference optimisation: DPO on a short prompt, its reward on a long one.

    $$-\log\sigma(\beta(u_w - u_l)) + \alpha\beta\,|u_w - u'_w|$$

    `prompt` is the short one and `context_prompt` the long one, so that one response of a pair is
    read after the long prompt and not two. The paper tunes $\alpha$. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2505.11166. Not verified against official code.

    >>> import torch
    >>> u, long = torch.tensor([[5.0, -5.0]]), torch.tensor([3.0])
    >>> solopo(u, long, torch.tensor([[True, True]])).terms[0].values  # log(1 + 1/e) + 0.2
    tensor([0.5133])
    """
    preference = dpo(ratio, mask, beta=beta).terms[0].values
    alignment = alpha * beta * chosen_gap(ratio, context_chosen_ratio, mask).abs()
    return pair_outcome(preference + alignment, beta * ratio, mask)


def solopo_simpo(
    mean_logps: Tensor,  # [G, 2]
    context_chosen_mean_logps: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    alpha: NonNegative = 1.0,
) -> Outcome:
    r"""Short-to-long preference optimisation with SimPO's reward: `solopo` without a reference.

    $$-\log\sigma(\beta(s_w - s_l) - \gamma) + \alpha\beta\,|s_w - s'_w|,
    \quad \gamma = \beta \cdot \mathrm{gamma\_beta\_ratio}$$

    Reward $\beta s$. Paper: https://arxiv.org/abs/2505.11166. Not verified against official code.

    >>> import torch
    >>> s, long = torch.tensor([[-1.0, -1.25]]), torch.tensor([-1.5])
    >>> solopo_simpo(s, long, torch.tensor([[True, True]])).terms[0].values  # log(2) + 1
    tensor([1.6931])
    """
    preference = simpo(mean_logps, mask, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    alignment = alpha * beta * chosen_gap(mean_logps, context_chosen_mean_logps, mask).abs()
    return pair_outcome(preference.terms[0].values + alignment, beta * mean_logps, mask)


def d2o(
    ratio: Tensor,  # [G, K]
    ratio2: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.1,
) -> Outcome:
    r"""Distributional dispreference optimisation: human negatives against the model's own samples.

    $$-\log\sigma\Big(\frac{\beta}{K}\sum_{i=1}^K (S(y_i) - R^-(y_i)) -
    \alpha\,(S(y_l) - R^+(y_l))\Big)$$

    The desirable responses $y_i$ are samples of the policy or its start, of equal rank; the
    undesirable one $y_l$ is a human's (several are averaged). $R^-$, the more harmful reference, is
    `ratio`'s, and $R^+$, the more helpful one, `ratio2`'s. The paper draws K = 11 samples. Rewards
    $\beta(S - R^-)$ and $\alpha(S - R^+)$. Paper: https://arxiv.org/abs/2403.03419. Not verified
    against official code.

    >>> import torch
    >>> u, good = torch.tensor([[4.0, 6.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> d2o(u, u - 14, good, torch.ones(1, 3).bool()).terms[0].values  # z = 0.5 + 0.5
    tensor([0.3133])
    """
    good, bad = label & mask, ~label & mask
    z = beta * _mean(ratio, good) - alpha * _mean(ratio2, bad)
    losses = live(logistic(z), good.any(-1) & bad.any(-1))
    rewards = live(beta * ratio, good) + live(alpha * ratio2, bad)
    return Outcome((Term(losses),), rewards.detach())


def _mean(score: Tensor, where: Tensor) -> Tensor:
    """Return the mean [G] of [G, K] over the responses that are meant, 0 where there is none."""
    return live(score, where).sum(-1) / where.sum(-1).clamp(min=1)


CONTEXTS = catalogue(
    Objective(
        re_align,
        "pair",
        "2502.13146",
        "-logsig(beta (u_w - u_l)) - logsig(beta (u_w - u'_w))",
        extras=("context_chosen",),
    ),
    Objective(
        mdpo,
        "pair",
        "2406.11839",
        "-logsig(beta (u_w - u_l)) - logsig(beta (u_w - u'_w)) - logsig(beta u_w - anchor)",
        extras=("context_chosen",),
    ),
    Objective(
        svco,
        "pair",
        "2502.13928",
        "-logsig(b1 (u_w - u0_w)) - logsig(b2 (u0_w - u'_w)) - logsig(b3 (u'_l - u0_l)) - "
        "logsig(b4 (u0_l - u_l))",
        extras=("context_chosen", "context_rejected", "bare_chosen", "bare_rejected"),
    ),
    Objective(
        solopo,
        "pair",
        "2505.11166",
        "-logsig(beta (u_w - u_l)) + alpha beta |u_w - u'_w|",
        extras=("context_chosen",),
    ),
    Objective(
        solopo_simpo,
        "pair",
        "2505.11166",
        "-logsig(beta (s_w - s_l) - gamma) + alpha beta |s_w - s'_w|",
        extras=("context_chosen",),
    ),
    Objective(d2o, "list", "2403.03419", "-logsig(beta mean_i (S_i - R-_i) - alpha (S_l - R+_l))"),
)
