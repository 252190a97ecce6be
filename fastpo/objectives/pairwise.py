r"""Objectives on pairs and a reference: slot 0 is the chosen response w, slot 1 the rejected one l.

Notation of the formulas: $S = \sum_t \log\pi(y_t)$ (`logps`), $s = S/L$ (`mean_logps`),
$u = S - S_{ref}$ (`ratio`), $\bar u = u/L$ (`mean_ratio`). A pair with a padded slot contributes
0 and no gradient. Every loss is a mean over pairs; a likelihood term is averaged on its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.domain import Domain, FlipRate, NonNegative, Positive, PositiveFlipRate, Share

from .base import Objective, Outcome, Term, catalogue
from .links import (
    GPO_LINKS,
    GpoLink,
    Link,
    expm1_difference,
    kl_to_label,
    live,
    log_ratio_modulated,
    log_smoothed_logistic,
    log_twice_sigmoid,
    logistic,
    robust_logistic,
    sigmoid_or_hinge,
    smoothed_logistic,
)

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
"""Which divergence from the reference regularises the policy; see `divergence_margin`."""


def margin_of(score: Tensor, mask: Tensor) -> Tensor:
    """Return chosen minus rejected [G] of [G, 2]."""
    chosen, rejected = live(score, mask).unbind(-1)
    return chosen - rejected


def divergence_margin(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    scale: float,
    f_divergence: Divergence,
    alpha_divergence: float,
    divergence_clamp: float | None,
    *,
    mean_ratio: Tensor | None = None,  # [G, 2]
) -> Tensor:  # [G]
    r"""Return scale * (c_w - c_l), or scale * (c_w / L_w - c_l / L_l) with `mean_ratio`.

    $c = f'(e^u)$ with the f of an f-divergence. f-DPO, https://arxiv.org/abs/2309.16240:

    | `f_divergence` | c |
    |---|---|
    | `reverse_kl` | $u$ |
    | `forward_kl` | $1 - e^{-u}$ |
    | `js` | $\log 2 + \log\sigma(u)$ |
    | `alpha` | $(e^{(\alpha-1)u} - 1) / (\alpha - 1)$, $u$ at 1; $\alpha$ = `alpha_divergence` |

    The official code writes the last with $1 - \alpha$ for $\alpha$. $c(0) = 0$: the constants
    cancel in a plain margin, and do not where c is divided by lengths. Exponents are not clamped
    unless `divergence_clamp` is their maximum: TRL clamps those of `alpha` at 80. All but reverse
    KL are computed and returned in float64: $u$ of -100 is usual for sums of log-ratios, and
    $e^{100}$ is infinite in float32. Losses are rounded back.

    Raises:
        ValueError: an unknown `f_divergence`.
    """
    if f_divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
        raise ValueError(
            f"unknown f_divergence {f_divergence!r}; use 'reverse_kl', 'forward_kl', 'js' or "
            "'alpha'"
        )
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "js": 1.0, "alpha": alpha_divergence - 1}[
        f_divergence
    ]
    if power == 0:
        return scale * margin_of(ratio if mean_ratio is None else mean_ratio, mask)
    u = live(ratio, mask).double()
    inverse_length, at_zero = torch.ones_like(u), torch.zeros_like(u)
    if mean_ratio is not None:
        # 1 / L, a constant to autograd, is mean_ratio / ratio; at u = 0 the slope c'(0) has it.
        mean, zero = live(mean_ratio, mask).double(), u == 0
        inverse_length = (mean / u.where(~zero, 1)).where(~zero, 0).detach()
        at_zero = mean.where(zero, 0)
    if f_divergence == "js":
        chosen, rejected = (inverse_length * log_twice_sigmoid(u) + at_zero / 2).unbind(-1)
        return scale * (chosen - rejected)
    exponent = power * u
    if divergence_clamp is not None:
        exponent = exponent.clamp(max=divergence_clamp)
    weight = inverse_length * (scale / power)
    return scale * margin_of(at_zero, mask) + expm1_difference(
        *exponent.unbind(-1), *weight.unbind(-1)
    )


def pair_outcome(losses: Tensor, rewards: Tensor, mask: Tensor) -> Outcome:
    """Make one loss [G] per whole pair, mean over pairs, in the dtype of the rewards [G, 2]."""
    losses = live(losses, mask.all(-1)).to(rewards.dtype)
    return Outcome((Term(losses),), live(rewards, mask).detach())


def dpo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.0,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Direct preference optimisation; with `label_smoothing` $\epsilon$, cDPO.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad z = \beta(u_w - u_l)$$

    `f_divergence` other than `reverse_kl` makes it f-DPO: the u of the margin become the c of
    `divergence_margin`. Methods that are this loss on other data:

    - SPIN (https://arxiv.org/abs/2401.01335): chosen is the data's response, rejected the
      previous iterate's sample, and that iterate is the reference;
    - Online DPO (https://arxiv.org/abs/2402.04792): both are samples of the current policy,
      ordered by a judge or reward model; its IPO form is `ipo` with `average=False`;
    - DOVE, joint preferences (https://arxiv.org/abs/2404.00530): each side has its own prompt and
      u is of prompt and response together, so label the prompt's tokens as well;
    - Step-DPO (https://arxiv.org/abs/2406.18629): the prompt ends in correct steps and a response
      is one step, without an end-of-sequence token.

    Reward $\beta u$. Paper: https://arxiv.org/abs/2305.18290; conservative DPO is Mitchell's note
    https://ericmitchell.ai/cdpo.pdf.

    >>> import torch
    >>> dpo(torch.tensor([[5.0, -5.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.3133])
    """
    z = divergence_margin(ratio, mask, beta, f_divergence, alpha_divergence, divergence_clamp)
    return pair_outcome(smoothed_logistic(z, label_smoothing), beta * ratio, mask)


def robust(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Robust DPO: an unbiased estimate of the DPO loss when a rate $\epsilon$ of labels is wrong.

    $$\frac{-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)}{1-2\epsilon},
    \quad z = \beta(u_w - u_l)$$

    Not bounded below: confident pairs have negative loss. `f_divergence`: see
    `divergence_margin`. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2403.00409

    >>> import torch
    >>> robust(torch.tensor([[20.0, -20.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([-0.4819])
    """
    z = divergence_margin(ratio, mask, beta, f_divergence, alpha_divergence, divergence_clamp)
    return pair_outcome(robust_logistic(z, label_smoothing), beta * ratio, mask)


def ipo(
    ratio: Tensor,  # [G, 2]
    mean_ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    average: bool = True,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Identity preference optimisation: regress the margin to a target instead of maximising it.

    $$\left(\bar u_w - \bar u_l - \frac{1}{2\beta}\right)^2$$

    `beta` is the paper's $\tau$. `average=True` takes per-token means, the form its authors
    trained with; `average=False` takes sums, as the equation is printed and many codes have it.
    With another `f_divergence` $\bar u$ becomes $c / L$, see `divergence_margin`.
    Reward $\beta u$, of sums in both. Paper: https://arxiv.org/abs/2310.12036

    >>> import torch
    >>> u, both = torch.tensor([[8.0, -2.0]]), torch.tensor([[True, True]])
    >>> ipo(u, u / 4, both).terms[0].values
    tensor([6.2500])
    >>> ipo(u, u / 4, both, average=False).terms[0].values
    tensor([25.])
    """
    margin = divergence_margin(
        ratio,
        mask,
        1.0,
        f_divergence,
        alpha_divergence,
        divergence_clamp,
        mean_ratio=mean_ratio if average else None,
    )
    return pair_outcome((margin - 1 / (2 * beta)).square(), beta * ratio, mask)


def hinge(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Hinge loss on the normalised likelihood: SLiC-HF's link on DPO's margin, RSO hinge-norm.

    $$\max(0, 1 - \beta(u_w - u_l))$$

    `slic` is the loss without a reference. `f_divergence`: see `divergence_margin`.
    Reward $\beta u$. Papers: https://arxiv.org/abs/2309.06657 (there $\gamma$ = `beta` = 0.05),
    https://arxiv.org/abs/2305.10425

    >>> import torch
    >>> hinge(torch.tensor([[2.0, -1.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.7000])
    """
    z = divergence_margin(ratio, mask, beta, f_divergence, alpha_divergence, divergence_clamp)
    return pair_outcome((1 - z).relu(), beta * ratio, mask)


def sppo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.001,
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
    beta: Positive = 0.1,
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


def ln_dpo(
    ratio: Tensor,  # [G, 2]
    mean_ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 5.0,
    label_smoothing: FlipRate = 0.0,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Length-normalised DPO: the log-ratio of each side is a mean over its tokens.

    $$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z), \quad z = \beta(\bar u_w - \bar u_l)$$

    `sigmoid_norm` in TRL, `dpo_norm` in open-instruct. Means are some hundred times smaller than
    sums and want a larger `beta`: 5 in Tulu 3. With another `f_divergence` $\bar u$ becomes
    $c / L$, see `divergence_margin`. Reward $\beta \bar u$. Papers:
    https://arxiv.org/abs/2411.15124, https://arxiv.org/abs/2407.15229

    >>> import torch
    >>> u, both = torch.tensor([[1.0, -0.8]]), torch.tensor([[True, True]])
    >>> ln_dpo(u, u / torch.tensor([[10.0, 8.0]]), both).terms[0].values
    tensor([0.3133])
    """
    z = divergence_margin(
        ratio,
        mask,
        beta,
        f_divergence,
        alpha_divergence,
        divergence_clamp,
        mean_ratio=mean_ratio,
    )
    return pair_outcome(smoothed_logistic(z, label_smoothing), beta * mean_ratio, mask)


def exo_pair(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    label_smoothing: PositiveFlipRate = 1e-3,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""Efficient exact optimisation on pairs: reverse KL from the policy's to the label's odds.

    $$\sigma(z)\,[\log\sigma(z) - \log(1-\epsilon)] + \sigma(-z)\,[\log\sigma(-z) - \log\epsilon],
    \quad z = \beta(u_w - u_l)$$

    $\epsilon$ = `label_smoothing` must be positive. Gradient flows through the weights
    $\sigma(\pm z)$. `f_divergence`: see `divergence_margin`. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2402.00856

    >>> import torch
    >>> u, both = torch.zeros(1, 2), torch.tensor([[True, True]])
    >>> exo_pair(u, both, label_smoothing=0.25).terms[0].values  # log(4/3) / 2
    tensor([0.1438])
    """
    z = divergence_margin(ratio, mask, beta, f_divergence, alpha_divergence, divergence_clamp)
    return pair_outcome(kl_to_label(z, label_smoothing), beta * ratio, mask)


def discopop(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.05,
    tau: Positive = 0.05,
    f_divergence: Divergence = "reverse_kl",
    alpha_divergence: float = 0.5,
    divergence_clamp: Positive | None = None,
) -> Outcome:
    r"""DiscoPOP: logistic loss, which gives way to an exponential one on pairs already right.

    $$(1 - g)\log(1 + e^{-z}) + g\,e^{-z}, \quad g = \sigma(z/\tau), \quad z = \beta(u_w - u_l)$$

    Found by a search over programs. Gradient flows through g; the loss is not convex, and at
    z = 0 its slope $(1 - \log 2)/(4\tau) - 3/4$ is positive for the published $\tau$.
    `f_divergence`: see `divergence_margin`. Reward $\beta u$. Paper: https://arxiv.org/abs/2406.08414

    >>> import torch
    >>> u, both = torch.zeros(1, 2), torch.tensor([[True, True]])
    >>> discopop(u, both).terms[0].values  # (log 2 + 1) / 2
    tensor([0.8466])
    """
    z = divergence_margin(ratio, mask, beta, f_divergence, alpha_divergence, divergence_clamp)
    return pair_outcome(log_ratio_modulated(z, tau), beta * ratio, mask)


def nca_pair(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    biased: bool = False,
) -> Outcome:
    r"""Noise contrastive alignment on pairs: raises the chosen likelihood, not only the margin.

    $$-\log\sigma(\beta u_w) - \tfrac12\log\sigma(-\beta u_w) - \tfrac12\log\sigma(-\beta u_l)$$

    `biased=True` is the official code's biasedNCA, $-\log\sigma(\beta u_w) -
    \log\sigma(-\beta u_l)$, which is `bco_pair`. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2402.05369

    >>> import torch
    >>> u, both = torch.tensor([[0.0, 0.0]]), torch.tensor([[True, True]])
    >>> nca_pair(u, both).terms[0].values  # 2 log 2
    tensor([1.3863])
    """
    if biased:
        return bco_pair(ratio, mask, beta=beta)
    chosen, rejected = (beta * live(ratio, mask)).unbind(-1)
    losses = logistic(chosen) + (logistic(-chosen) + logistic(-rejected)) / 2
    return pair_outcome(losses, beta * ratio, mask)


def apo_zero(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Anchored preference optimisation, for chosen responses better than the model's own.

    $$1 - \sigma(\beta u_w) + \sigma(\beta u_l)$$

    Raises the chosen and lowers the rejected likelihood, each by itself. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2408.06266

    >>> import torch
    >>> apo_zero(torch.tensor([[10.0, -10.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.5379])
    """
    chosen, rejected = (beta * live(ratio, mask)).unbind(-1)
    # 1 - sigmoid(x) as sigmoid(-x), which keeps its digits when x is large
    return pair_outcome(torch.sigmoid(-chosen) + torch.sigmoid(rejected), beta * ratio, mask)


def apo_down(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
) -> Outcome:
    r"""Anchored preference optimisation, for chosen responses worse than the model's own.

    $$\sigma(\beta u_w) + 1 - \sigma(\beta(u_w - u_l))$$

    Lowers the chosen likelihood, and the rejected one by more. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2408.06266

    >>> import torch
    >>> apo_down(torch.tensor([[0.0, -10.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.7689])
    """
    chosen = beta * live(ratio, mask)[:, 0]
    losses = torch.sigmoid(chosen) + torch.sigmoid(-beta * margin_of(ratio, mask))
    return pair_outcome(losses, beta * ratio, mask)


def wpo(
    ratio: Tensor,  # [G, 2]
    mean_logps: Tensor,  # [G, 2]
    mean_log_p2: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
    clamp: bool = False,
) -> Outcome:
    r"""Weighted preference optimisation: DPO on pairs as if the current policy had drawn them.

    $$W_w W_l\,\big[-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)\big], \quad
    W = \exp\Big(\frac1L\sum_t \log\frac{\pi(y_t)}{\sum_v \pi(v)^2}\Big), \quad
    z = \beta(u_w - u_l)$$

    The weights carry no gradient. $\log\sum_v \pi(v)^2$ is `mean_log_p2`, the log-probability
    that two samples agree. `clamp=True` limits $W_w W_l$ to 1, as the official code does and TRL
    did. open-instruct's `wpo` has $W = e^s$ instead. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2406.11827

    >>> import torch
    >>> u, p2 = torch.zeros(1, 2), torch.tensor([[0.5, 0.4]]).log()
    >>> s = torch.tensor([[0.25, 0.2]]).log()  # W = 1/2 on both sides
    >>> wpo(u, s, p2, torch.tensor([[True, True]])).terms[0].values  # log(2) / 4
    tensor([0.1733])
    """
    z = beta * margin_of(ratio, mask)
    log_weight = (live(mean_logps, mask) - live(mean_log_p2, mask)).sum(-1).detach()
    if clamp:
        log_weight = log_weight.clamp(max=0)
    # The product is taken of logarithms: a small loss may underflow before a weight lifts it.
    losses = (log_weight + log_smoothed_logistic(z, label_smoothing)).exp()
    return pair_outcome(losses, beta * ratio, mask)


def dpop(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.3,
    lam: NonNegative = 50.0,
) -> Outcome:
    r"""DPO-Positive (Smaug): DPO that is penalised where the chosen likelihood falls.

    $$-\log\sigma\big(\beta[u_w - u_l - \lambda\max(0, -u_w)]\big)$$

    $\lambda$ = `lam`, 5 to 500 in the paper. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2402.13228

    >>> import torch
    >>> u, both = torch.tensor([[-0.1, -5.1]]), torch.tensor([[True, True]])
    >>> dpop(u, both).terms[0].values  # 5 - 50 * 0.1 = 0
    tensor([0.6931])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)
    z = beta * (chosen - rejected - lam * (-chosen).relu())
    return pair_outcome(logistic(z), beta * ratio, mask)


def rdpo(
    ratio: Tensor,  # [G, 2]
    length: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: float = 0.2,
) -> Outcome:
    r"""R-DPO: DPO with a penalty of $\alpha$ on every token of a response.

    $$-\log\sigma\big(\beta(u_w - u_l) + \alpha(L_w - L_l)\big)$$

    which follows from the reward $r - \alpha L$: a chosen response that is longer needs less
    margin. The alpha-DPO code's `rDPO` has the length term with the opposite sign. Reward
    $\beta u$. Paper: https://arxiv.org/abs/2403.19159. Not verified against official code.

    >>> import torch
    >>> u, lengths = torch.tensor([[5.0, 4.0]]), torch.tensor([[7.0, 2.0]])
    >>> rdpo(u, lengths, torch.tensor([[True, True]])).terms[0].values  # z = 0.1 + 1
    tensor([0.2873])
    """
    z = beta * margin_of(ratio, mask) + alpha * margin_of(length, mask)
    return pair_outcome(logistic(z), beta * ratio, mask)


def dpo_shift(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    lam: Share = 0.7,
) -> Outcome:
    r"""DPO-Shift: the rejected side counts less, so that the chosen likelihood falls less.

    $$-\log\sigma(\beta(u_w - \lambda u_l))$$

    $\lambda$ = `lam` in [0.5, 1]; 1 is DPO. The official code also moves it linearly with the step,
    from 0.75 to 1 or back: `lam: [0.75, 1.0]` in recipes and for `PreferenceLoss`.
    Reward $\beta u$. Paper: https://arxiv.org/abs/2502.07599

    >>> import torch
    >>> dpo_shift(torch.tensor([[7.0, 10.0]]), torch.tensor([[True, True]])).terms[0].values
    tensor([0.6931])
    """
    chosen, rejected = live(ratio, mask).unbind(-1)
    return pair_outcome(logistic(beta * (chosen - lam * rejected)), beta * ratio, mask)


def odpo(
    ratio: Tensor,  # [G, 2]
    score: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    offset: Literal["difference", "ratio"] = "difference",
) -> Outcome:
    r"""DPO with an offset: the margin must exceed what the two grades $q$ are apart.

    $$-\log\sigma\big(\beta(u_w - u_l) - \alpha\log(q_w - q_l)\big)$$

    `offset="ratio"` has $\log(q_w / q_l)$, for positive grades, as an option of the official code.
    A pair whose grades do not prefer the chosen response has no logarithm there; here it adds 0,
    the limit at $q_w - q_l \to 0$. Reward $\beta u$. Paper: https://arxiv.org/abs/2402.10571

    >>> import torch
    >>> u, both = torch.zeros(1, 2), torch.tensor([[True, True]])
    >>> odpo(u, torch.tensor([[4.0, 1.0]]), both).terms[0].values  # log(1 + 3)
    tensor([1.3863])
    """
    if offset == "difference":
        # alpha log of a tie is -inf, and the loss exactly 0 with no gradient.
        shift = torch.xlogy(alpha, margin_of(score, mask).clamp(min=0))
    elif offset == "ratio":
        shift = margin_of(torch.xlogy(alpha, score.where(mask, 1)), mask)
    else:
        raise ValueError(f"unknown offset {offset!r} of odpo; use 'difference' or 'ratio'")
    z = beta * margin_of(ratio, mask) - shift.to(ratio.dtype)
    return pair_outcome(logistic(z), beta * ratio, mask)


def gpo(
    ratio: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    link: GpoLink = "logistic",
) -> Outcome:
    r"""Generalised preference optimisation: any surrogate f of the 0-1 loss on DPO's margin.

    $$f(z), \quad z = \beta(u_w - u_l)$$

    | `link` | f(z) | |
    |---|---|---|
    | `logistic` | $\log(1 + e^{-z})$ | DPO |
    | `hinge` | $\max(0, 1 - z)$ | `hinge` |
    | `squared` | $(1 - z)^2$ | `ipo` of sums with $\beta / 2$, times $\beta^2$ |
    | `exponential` | $e^{-z}$ | |
    | `truncated_quadratic` | $\max(0, 1 - z)^2$ | |
    | `savage` | $1 / (1 + e^z)^2$ | not convex |

    Reward $\beta u$. Paper: https://arxiv.org/abs/2402.05749. Not verified against official code.

    >>> import torch
    >>> u, both = torch.tensor([[5.0, 0.0]]), torch.tensor([[True, True]])
    >>> gpo(u, both, link="squared").terms[0].values
    tensor([0.2500])
    """
    if link not in GPO_LINKS:
        raise ValueError(f"unknown link {link!r} of gpo; choose from {', '.join(GPO_LINKS)}")
    return pair_outcome(GPO_LINKS[link](beta * margin_of(ratio, mask)), beta * ratio, mask)


def modpo(
    ratio: Tensor,  # [G, 2]
    margin: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    w0: Positive = 0.5,
    margin_weight: float = 0.5,
    loss_type: Link = "sigmoid",
) -> Outcome:
    r"""Multi-objective DPO: the rewards of the other objectives are a margin, given beforehand.

    $$-\log\sigma\Big(\frac{1}{w_0}\big[\beta(u_w - u_l) - w\,m\big]\Big)$$

    $w_0$ is the weight of the objective whose preferences the data hold, $m$ = `margin` the other
    objective's reward of the chosen minus that of the rejected response, $w$ = `margin_weight` its
    weight, $1 - w_0$. With several others let the margin be their weighted sum and $w = 1$.
    `loss_type="hinge"` has $\max(0, 1 - z)$. Reward $\beta u$, in which the policy trades all
    objectives. Paper: https://arxiv.org/abs/2310.03708

    >>> import torch
    >>> u, both = torch.tensor([[20.0, 0.0]]), torch.tensor([[True, True]])
    >>> modpo(u, torch.tensor([3.0]), both).terms[0].values  # z = 2 (2 - 1.5)
    tensor([0.3133])
    """
    others = margin_weight * live(margin, mask.all(-1))
    z = (beta * margin_of(ratio, mask) - others) / w0
    return pair_outcome(sigmoid_or_hinge(z, loss_type), beta * ratio, mask)


def selm(
    ratio: Tensor,  # [G, 2]
    ref_response_ratio: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.01,
    alpha: NonNegative = 1e-3,
) -> Outcome:
    r"""Self-exploring language models: DPO, and less likelihood for what the reference would say.

    $$-\log\sigma(\beta(u_w - u_l)) + \alpha\beta\,u(y_{ref})$$

    $y_{ref}$ is a response to the same prompt that was sampled from the reference, the extra
    `ref_response`. Reward $\beta u$. Paper: https://arxiv.org/abs/2405.19332

    >>> import torch
    >>> u, both = torch.zeros(1, 2), torch.tensor([[True, True]])
    >>> selm(u, torch.tensor([10.0]), both, beta=0.5, alpha=0.02).terms[0].values
    tensor([0.7931])
    """
    preference = logistic(beta * margin_of(ratio, mask))
    losses = preference + alpha * beta * ref_response_ratio
    return pair_outcome(losses, beta * ratio, mask)


def xpo(
    ratio: Tensor,  # [G, 2]
    ref_response_logps: Tensor,  # [G]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1e-5,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
) -> Outcome:
    r"""Exploratory preference optimisation: online DPO with an optimism term.

    $$-\log\sigma(\beta(u_w - u_l)) + \alpha\,S(y_{ref})$$

    The pair is one sample of the policy and one of the reference, ordered by a judge; the latter
    is also the extra `ref_response`. `loss_type="ipo"` has IPO's square of sums,
    $(u_w - u_l - 1/(2\beta))^2$, as TRL's. Reward $\beta u$.
    Paper: https://arxiv.org/abs/2405.21046

    >>> import torch
    >>> u, both = torch.zeros(1, 2), torch.tensor([[True, True]])
    >>> xpo(u, torch.tensor([-20.0]), both, alpha=0.01).terms[0].values
    tensor([0.4931])
    """
    if loss_type == "sigmoid":
        preference = dpo(ratio, mask, beta=beta)
    elif loss_type == "ipo":
        preference = ipo(ratio, ratio, mask, beta=beta, average=False)
    else:
        raise ValueError(f"unknown loss_type {loss_type!r} of xpo; use 'sigmoid' or 'ipo'")
    losses = preference.terms[0].values + alpha * ref_response_logps
    return pair_outcome(losses, beta * ratio, mask)


PAIRWISE = catalogue(
    Objective(dpo, "pair", "2305.18290", "-logsig(beta (u_w - u_l))"),
    Objective(
        robust,
        "pair",
        "2403.00409",
        "(-(1-e) logsig(z) + e logsig(-z)) / (1 - 2e), z = beta (u_w - u_l)",
    ),
    Objective(ipo, "pair", "2310.12036", "(u_w/L_w - u_l/L_l - 1/(2 beta))^2"),
    Objective(hinge, "pair", "2309.06657", "max(0, 1 - beta (u_w - u_l))"),
    Objective(sppo, "pair", "2405.00675", "(u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2"),
    Objective(bco_pair, "pair", "2404.04656", "-logsig(beta u_w) - logsig(-beta u_l)"),
    Objective(ln_dpo, "pair", "2407.15229", "-logsig(beta (u_w/L_w - u_l/L_l))"),
    Objective(
        exo_pair,
        "pair",
        "2402.00856",
        "sig(z) log(sig(z) / (1-e)) + sig(-z) log(sig(-z) / e), z = beta (u_w - u_l)",
    ),
    Objective(
        discopop,
        "pair",
        "2406.08414",
        "(1-g) log(1 + e^-z) + g e^-z, g = sig(z / tau), z = beta (u_w - u_l)",
    ),
    Objective(
        nca_pair,
        "pair",
        "2402.05369",
        "-logsig(beta u_w) - logsig(-beta u_w)/2 - logsig(-beta u_l)/2",
    ),
    Objective(apo_zero, "pair", "2408.06266", "1 - sig(beta u_w) + sig(beta u_l)"),
    Objective(apo_down, "pair", "2408.06266", "sig(beta u_w) + 1 - sig(beta (u_w - u_l))"),
    Objective(
        wpo,
        "pair",
        "2406.11827",
        "-W_w W_l logsig(beta (u_w - u_l)), W = exp(mean_t log(p_t / sum_v p_v^2))",
    ),
    Objective(dpop, "pair", "2402.13228", "-logsig(beta (u_w - u_l - lam max(0, -u_w)))"),
    Objective(rdpo, "pair", "2403.19159", "-logsig(beta (u_w - u_l) + alpha (L_w - L_l))"),
    Objective(dpo_shift, "pair", "2502.07599", "-logsig(beta (u_w - lam u_l))"),
    Objective(
        odpo,
        "pair",
        "2402.10571",
        "-logsig(beta (u_w - u_l) - alpha log(q_w - q_l))",
        grades_if={("offset", "ratio"): Domain(0, open_low=True)},
    ),
    Objective(gpo, "pair", "2402.05749", "f(beta (u_w - u_l)), f = link"),
    Objective(modpo, "pair", "2310.03708", "-logsig((beta (u_w - u_l) - w margin) / w0)"),
    Objective(
        selm,
        "pair",
        "2405.19332",
        "-logsig(beta (u_w - u_l)) + alpha beta u_ref",
        extras=("ref_response",),
    ),
    Objective(
        xpo,
        "pair",
        "2405.21046",
        "-logsig(beta (u_w - u_l)) + alpha S_ref",
        extras=("ref_response",),
    ),
)
