r"""Objectives that judge each response alone, by its label: desirable or undesirable.

They work on groups of any size, pairs included. Notation: $u = S - S_{ref}$ (`ratio`), $S$ =
`logps`, $s = S/L$ (`mean_logps`). Losses are summed over a group's responses and averaged over
responses, not groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.domain import Negative, NonNegative, Positive

from .base import Objective, Outcome, Per, Statistic, Term, catalogue
from .links import live, logistic


def _outcome(losses: Tensor, rewards: Tensor, mask: Tensor, per: Per = "responses") -> Outcome:
    """Make the outcome of losses [G, K] of the live slots, and rewards [G, K] of the same."""
    return Outcome((Term(live(losses, mask).sum(-1), per),), live(rewards, mask).detach())


def kto(
    ratio: Tensor,  # [G, K]
    z0: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Outcome:
    r"""Kahneman-Tversky optimisation: gains and losses against a reference point.

    $$\lambda_D\,[1 - \sigma(\beta(u - z_0))] \text{ if desirable, else }
    \lambda_U\,[1 - \sigma(\beta(z_0 - u))]$$

    $z_0 = \max(0, \mathrm{mean}\,u(x, y'))$ estimates KL(policy || reference) from responses $y'$
    to other prompts, averaged over every rank, without gradient. Keep $\lambda_D n_D / \lambda_U
    n_U$ between 1 and 4/3. `kto_pair` takes $z_0$ from the other sides of the pairs,
    `apo_zero_unpaired` has none; `kto_humanline` clamps every token's log-ratio. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2402.01306

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


def kto_humanline(
    token_logps: Tensor,  # [G, K, T]
    token_ref_logps: Tensor,  # [G, K, T]
    token_weights: Tensor,  # [G, K, T]
    token_mask: Tensor,  # [G, K, T] bool
    z0: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    log_epsilon_p: Negative = -1.5,
    log_epsilon_r: Positive = 1.5,
) -> Outcome:
    r"""KTO under HALOs' `humanline=true`: `kto` with the log-ratio of every token clamped.

    $$u = \sum_t a_t\,\mathrm{clip}\big(\log\pi(y_t) - \log\pi_{ref}(y_t),\
    \epsilon_P,\ \epsilon_R\big)$$

    A token outside the bounds has no gradient. HALOs' launch scripts take `log_epsilon_P` and
    `log_epsilon_R` from outside; these defaults are ours. Its earlier form rejected tokens at
    random instead of clamping. $z_0$ is that of `kto`, while HALOs clamps its tokens too. Reward
    $\beta u$. Paper: https://arxiv.org/abs/2509.24207

    >>> import torch
    >>> logps, one = torch.tensor([[[-1.0, -9.0]]]), torch.ones(1, 1, 2)
    >>> kto_humanline(  # u = 1 - 1.5
    ...     logps, -2 * one, one, one.bool(), torch.tensor(0.0), *2 * [one[..., 0].bool()]
    ... ).rewards
    tensor([[-0.0500]])
    """
    tokens = token_mask & mask[..., None]
    log_ratio = live(token_logps - token_ref_logps, tokens).clamp(log_epsilon_p, log_epsilon_r)
    ratio = (live(token_weights, tokens) * log_ratio).sum(-1)
    return kto(
        ratio,
        z0,
        label,
        mask,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def _mismatched(scores: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return scores["mismatched_ratio"], scores["mask"].any(-1)


def _side(column: int) -> Statistic:
    """Return the mean log-ratio of one side of all pairs."""
    return Statistic(
        lambda scores, hyper: (scores["ratio"][:, column], scores["mask"].all(-1)),
        where="full groups",
    )


def kto_pair(
    ratio: Tensor,  # [G, 2]
    z_chosen: Tensor,  # []
    z_rejected: Tensor,  # []
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""KTO on pairs in its first form: each side's reference point is the mean of the other side.

    $$1 - \sigma(\beta(u_w - z_l)) + 1 - \sigma(\beta(z_w - u_l)), \quad
    z = \max(0, \mathrm{mean}\,u)$$

    averaged over responses, so it is half of this per pair. The means are over the pairs of every
    rank and carry no gradient; TRL's former `kto_pair` let it through. It needs no mismatched
    responses; `kto` is the paper's form. Reward $\beta u$. Not verified against official code.
    Paper: https://arxiv.org/abs/2402.01306

    >>> import torch
    >>> u, both = torch.tensor([[3.0, 2.0]]), torch.tensor([[True, True]])
    >>> kto_pair(u, torch.tensor(2.0), torch.tensor(3.0), both).terms[0]
    Term(values=tensor([1.]), per='responses', weight=1.0)
    """
    z0 = torch.stack((z_rejected, z_chosen))
    label = torch.tensor([True, False], device=mask.device)
    return kto(ratio, z0, label, mask, beta=beta)


def apo_zero_unpaired(
    ratio: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Outcome:
    r"""Anchored preference optimisation of single responses: `kto` with a reference point of 0.

    $$\lambda_D\,[1 - \sigma(\beta u)] \text{ if desirable, else } \lambda_U\,\sigma(\beta u)$$

    For desirable responses better than the model's own. `apo_zero` is its sum on a pair. Reward
    $\beta u$. Paper: https://arxiv.org/abs/2408.06266

    >>> import torch
    >>> u, both = torch.tensor([[10.0, -10.0]]), torch.tensor([[True, True]])
    >>> apo_zero_unpaired(u, torch.tensor([[True, False]]), both).terms[0].values
    tensor([0.5379])
    """
    return kto(
        ratio,
        ratio.new_zeros(()),
        label,
        mask,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco(
    ratio: Tensor,  # [G, K]
    shift: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
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


def _forget(losses: Tensor, rewards: Tensor, label: Tensor, mask: Tensor) -> Outcome:
    """Return the losses [G, K] of the undesirable responses, averaged over them."""
    values = live(losses, mask & ~label).sum(-1)
    return Outcome((Term(values, "undesirable"),), live(rewards, mask).detach())


def npo(
    ratio: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Negative preference optimisation: unlearn the undesirable responses.

    $$-\frac{2}{\beta}\log\sigma(-\beta u)$$

    averaged over undesirable (forget) responses; desirable (retain) ones are ignored here. Tends
    to `ga` on the likelihood as $\beta \to 0$. The paper's other losses, on rows of both labels:

    | method | objective |
    |---|---|
    | NPO with retain, with KL | `{npo: 1, sft: 1}`, `{npo: 1, kl_retain: 1}` |
    | GA, GradDiff, GA + KL | `ga`, `{ga: 1, sft: 1}`, `{ga: 1, kl_retain: 1}` |
    | KTO | `kto_unlearn`, `{kto_unlearn: 1, sft: 1}` |
    | IDK | `sft` on refusals |
    | DPO, IDK | `{dpo: 2 / beta}` on pairs of a refusal over the response to forget |

    Reward $\beta u$. Paper: https://arxiv.org/abs/2404.05868

    >>> import torch
    >>> u, live = torch.tensor([[0.0], [7.0]]), torch.tensor([[True], [True]])
    >>> npo(u, torch.tensor([[False], [True]]), live, beta=2.0).terms[0].values
    tensor([0.6931, 0.0000])
    """
    losses = (2 / beta) * logistic(-beta * live(ratio, mask & ~label))
    return _forget(losses, beta * ratio, label, mask)


def simnpo(
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 4.5,
    delta: float = 0.0,
) -> Outcome:
    r"""SimNPO: `npo` without a reference, on the mean log-probability.

    $$-\frac{2}{\beta}\log\sigma\big(-\beta(s + \delta)\big)$$

    averaged over undesirable responses. $\delta$ is open-unlearning's `delta` and the official
    code's `gamma`; the paper's equation has $\gamma = \beta\delta$. It has tuned $\beta$ for every
    benchmark, 1 to 15; open-unlearning's class has 1. For the retain term mix in `sft`. Reward
    $\beta s$. Paper: https://arxiv.org/abs/2410.07163

    >>> import torch
    >>> s, live = torch.tensor([[-0.5], [-3.0]]), torch.tensor([[True], [True]])
    >>> simnpo(s, torch.tensor([[False], [True]]), live, beta=2.0, delta=0.5).terms[0].values
    tensor([0.6931, 0.0000])
    """
    terms = npo(mean_logps + delta, label, mask, beta=beta).terms
    return Outcome(terms, live(beta * mean_logps, mask).detach())


def ga(
    logps: Tensor,  # [G, K]
    mean_logps: Tensor,  # [G, K]
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    reduction: Literal["sum", "sequence_mean"] = "sum",
) -> Outcome:
    r"""Gradient ascent: the likelihood of the undesirable responses itself is minimised.

    $$S \quad\text{or}\quad s = S / L$$

    averaged over undesirable responses; not bounded below. `sum` is the NPO paper's $\log\pi$,
    `sequence_mean` divides by the length. Official code averages over the tokens of a micro-batch,
    which is `sequence_mean` at one response each. Mixtures: see `npo`. Reward $S$, or $s$.
    Paper: https://arxiv.org/abs/2404.05868

    Raises:
        ValueError: an unknown `reduction`.

    >>> import torch
    >>> logps, sides = torch.tensor([[-6.0, -9.0]]), torch.tensor([[True, False]])
    >>> ga(logps, logps / 3, sides, torch.tensor([[True, True]])).terms[0]
    Term(values=tensor([-9.]), per='undesirable', weight=1.0)
    """
    if reduction not in ("sum", "sequence_mean"):
        raise ValueError(f"unknown reduction {reduction!r} of ga; use 'sum' or 'sequence_mean'")
    score = logps if reduction == "sum" else mean_logps
    return _forget(score, score, label, mask)


def _desirable(scores: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return scores["ratio"], scores["mask"] & scores["label"]


def kto_unlearn(
    ratio: Tensor,  # [G, K]
    z0: Tensor,  # []
    label: Tensor,  # [G, K] bool
    mask: Tensor,  # [G, K] bool
    *,
    beta: Positive = 0.1,
    link: Literal["sigmoid", "logsigmoid"] = "sigmoid",
) -> Outcome:
    r"""KTO for unlearning: undesirable responses against the desirable ones' mean log-ratio.

    $$1 - \frac{2}{\beta}\,\sigma(z_0 - \beta u)$$

    averaged over undesirable responses. $z_0$ is the mean of $u$ over the desirable responses,
    which are refusals, of every rank; as in the NPO paper's code it is not multiplied by $\beta$,
    not clamped and carries no gradient. `link="logsigmoid"` is that code's `kto_logsigmoid`,
    with $\log\sigma$ for $\sigma$. Reward $\beta u$. Paper: https://arxiv.org/abs/2404.05868

    Raises:
        ValueError: an unknown `link`.

    >>> import torch
    >>> u, live = torch.tensor([[5.0]]), torch.tensor([[True]])
    >>> kto_unlearn(u, torch.tensor(0.5), ~live, live).terms[0].values  # 1 - 20 / 2
    tensor([-9.])
    """
    z = z0 - beta * live(ratio, mask & ~label)
    if link == "sigmoid":
        losses = 1 - (2 / beta) * torch.sigmoid(z)
    elif link == "logsigmoid":
        losses = 1 + (2 / beta) * logistic(z)
    else:
        raise ValueError(f"unknown link {link!r} of kto_unlearn; use 'sigmoid' or 'logsigmoid'")
    return _forget(losses, beta * ratio, label, mask)


POINTWISE = catalogue(
    Objective(
        kto,
        "point",
        "2402.01306",
        "lam_D sig(-beta (u - z0)) if desirable else lam_U sig(beta (u - z0))",
        statistics={"z0": Statistic(_mismatched, where="groups")},
        extras=("mismatched",),
        labels=(True, False),
    ),
    Objective(
        kto_humanline,
        "point",
        "2509.24207",
        "kto, u = sum_t clip(logp_t - ref_t, eP, eR)",
        statistics={"z0": Statistic(_mismatched, where="groups")},
        extras=("mismatched",),
        labels=(True, False),
    ),
    Objective(
        kto_pair,
        "pair",
        "2402.01306",
        "sig(-beta (u_w - z_l)) + sig(beta (u_l - z_w)), z = max(0, mean u)",
        statistics={"z_chosen": _side(0), "z_rejected": _side(1)},
    ),
    Objective(
        apo_zero_unpaired,
        "point",
        "2408.06266",
        "lam_D sig(-beta u) if desirable else lam_U sig(beta u)",
        labels=(True, False),
    ),
    Objective(
        bco,
        "point",
        "2404.04656",
        "-logsig(beta u - shift) if desirable else -logsig(shift - beta u)",
        statistics={"shift": Statistic(_rewards, memory="mean", where="candidates")},
        labels=(True, False),
    ),
    Objective(
        npo, "point", "2404.05868", "-(2/beta) logsig(-beta u), undesirable only", labels=(False,)
    ),
    Objective(
        simnpo,
        "point",
        "2410.07163",
        "-(2/beta) logsig(-beta (s + delta)), undesirable only",
        labels=(False,),
    ),
    Objective(ga, "point", "2404.05868", "S, undesirable only", labels=(False,)),
    Objective(
        kto_unlearn,
        "point",
        "2404.05868",
        "1 - (2/beta) sig(z0 - beta u), undesirable only, z0 = mean u of desirable",
        statistics={"z0": Statistic(_desirable, where="desirable")},
        labels=(True, False),
    ),
)
