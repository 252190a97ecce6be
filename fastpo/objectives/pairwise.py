r"""Objectives on pairs and a reference: slot 0 is the chosen response w, slot 1 the rejected one l.

Notation of the formulas: $S = \sum_t \log\pi(y_t)$ (`logps`), $s = S/L$ (`mean_logps`),
$u = S - S_{ref}$ (`ratio`), $\bar u = u/L$ (`mean_ratio`). A pair with a padded slot contributes
0 and no gradient. Every loss is a mean over pairs; a likelihood term is averaged on its own.
"""

from __future__ import annotations

from torch import Tensor

from .base import Objective, Outcome, Term
from .links import live, logistic, robust_logistic, smoothed_logistic


def margin_of(score: Tensor, mask: Tensor) -> Tensor:
    """[G, 2] -> [G]: chosen minus rejected."""
    chosen, rejected = live(score, mask).unbind(-1)
    return chosen - rejected


def pair_outcome(losses: Tensor, rewards: Tensor, mask: Tensor) -> Outcome:
    """One loss [G] per whole pair, mean over pairs; rewards [G, 2]."""
    return Outcome((Term(live(losses, mask.all(-1))),), live(rewards, mask).detach())


def dpo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Outcome:
    r"""Direct preference optimisation; with `label_smoothing` $\epsilon$, cDPO.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad z = \beta(u_w - u_l)$$

    Reward $\beta u$. Paper: https://arxiv.org/abs/2305.18290; conservative DPO is Mitchell's note
    https://ericmitchell.ai/cdpo.pdf.

    >>> import torch
    >>> dpo(torch.tensor([[5.0, -5.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.3133])
    """
    z = beta * margin_of(ratio, mask)
    return pair_outcome(smoothed_logistic(z, label_smoothing), beta * ratio, mask)


def robust(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Outcome:
    r"""Robust DPO: an unbiased estimate of the DPO loss when a rate $\epsilon$ of labels is wrong.

    $$\frac{-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)}{1-2\epsilon},
    \quad z = \beta(u_w - u_l)$$

    Not bounded below: confident pairs have negative loss. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2403.00409

    >>> import torch
    >>> robust(torch.tensor([[20.0, -20.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([-0.4819])
    """
    z = beta * margin_of(ratio, mask)
    return pair_outcome(robust_logistic(z, label_smoothing), beta * ratio, mask)


def ipo(
    ratio: Tensor,  # [G, 2]
    mean_ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
    average: bool = True,
) -> Outcome:
    r"""Identity preference optimisation: regress the margin to a target instead of maximising it.

    $$\left(\bar u_w - \bar u_l - \frac{1}{2\beta}\right)^2$$

    `beta` is the paper's $\tau$. `average=True` takes per-token means, the form its authors
    trained with; `average=False` takes sums, as the equation is printed and many codes have it.
    Reward $\beta u$, of sums in both. Paper: https://arxiv.org/abs/2310.12036

    >>> import torch
    >>> u, both = torch.tensor([[8.0, -2.0]]), torch.tensor([[True, True]])
    >>> ipo(u, u / 4, both).terms[0].values
    tensor([6.2500])
    >>> ipo(u, u / 4, both, average=False).terms[0].values
    tensor([25.])
    """
    score = mean_ratio if average else ratio
    return pair_outcome((margin_of(score, mask) - 1 / (2 * beta)).square(), beta * ratio, mask)


def hinge(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Hinge loss on the normalised likelihood: SLiC-HF's link on DPO's margin, RSO hinge-norm.

    $$\max(0, 1 - \beta(u_w - u_l))$$

    Reward $\beta u$. Papers: https://arxiv.org/abs/2309.06657 (there $\gamma$ = `beta` = 0.05),
    https://arxiv.org/abs/2305.10425

    >>> import torch
    >>> hinge(torch.tensor([[2.0, -1.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.7000])
    """
    return pair_outcome((1 - beta * margin_of(ratio, mask)).relu(), beta * ratio, mask)


def sppo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.001,
    half: bool = False,
) -> Outcome:
    r"""Self-play preference optimisation with hard labels: the winner wins with probability 1.

    $$\left(u_w - \frac{1}{2\beta}\right)^2 + \left(u_l + \frac{1}{2\beta}\right)^2$$

    `beta` is the paper's $1/\eta$. `half=True` multiplies by 1/2, as the official code does.
    Reward $\beta u$. Paper: https://arxiv.org/abs/2405.00675

    >>> import torch
    >>> sppo(torch.tensor([[4.0, -4.0]]), torch.tensor([[True, True]]), beta=0.1).terms[0].values
    tensor([2.])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)
    target = 1 / (2 * beta)
    squares = (chosen - target).square() + (rejected + target).square()
    return pair_outcome(squares / 2 if half else squares, beta * ratio, mask)


def bco_pair(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: float = 0.1,
) -> Outcome:
    r"""Binary classifier optimisation of both sides of a pair, without the reward shift.

    $$-\log\sigma(\beta u_w) - \log\sigma(-\beta u_l)$$

    The quality term of MPO (https://arxiv.org/abs/2411.10442). `bco` is the paper's form, with
    the shift. Reward $\beta u$. Paper: https://arxiv.org/abs/2404.04656

    >>> import torch
    >>> bco_pair(torch.tensor([[10.0, -10.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.6265])
    """
    chosen, rejected = (beta * live(ratio, mask)).unbind(-1)
    return pair_outcome(logistic(chosen) + logistic(-rejected), beta * ratio, mask)


PAIRWISE: dict[str, Objective] = {
    "dpo": Objective("dpo", dpo, "pair", "2305.18290", "-logsig(beta (u_w - u_l))"),
    "robust": Objective(
        "robust",
        robust,
        "pair",
        "2403.00409",
        "(-(1-e) logsig(z) + e logsig(-z)) / (1 - 2e), z = beta (u_w - u_l)",
    ),
    "ipo": Objective("ipo", ipo, "pair", "2310.12036", "(u_w/L_w - u_l/L_l - 1/(2 beta))^2"),
    "hinge": Objective("hinge", hinge, "pair", "2309.06657", "max(0, 1 - beta (u_w - u_l))"),
    "sppo": Objective(
        "sppo", sppo, "pair", "2405.00675", "(u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2"
    ),
    "bco_pair": Objective(
        "bco_pair", bco_pair, "pair", "2404.04656", "-logsig(beta u_w) - logsig(-beta u_l)"
    ),
}
