r"""The scalar functions that turn margins into losses. Each piece of mathematics lives here once.

All are elementwise, keep shape and dtype, and are exact to rounding over the whole range of
floats: no intermediate overflows, and the branch of a `where` that is not taken has a finite
gradient (0 * inf would be NaN).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.domain import FLIP_RATE, POSITIVE_FLIP_RATE

LN2 = math.log(2.0)

Link = Literal["sigmoid", "hinge"]
"""The two links that most pairwise papers offer: logistic loss, or max(0, 1 - z)."""

GpoLink = Literal["logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage"]


def live(x: Tensor, mask: Tensor) -> Tensor:
    """Put 0 where `mask` is False: padding, NaN included, reaches no value or gradient."""
    return x.where(mask, 0)


def logistic(z: Tensor) -> Tensor:
    r"""Return $-\log\sigma(z) = \log(1 + e^{-z})$."""
    return -logsigmoid(z)


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    r"""Return $-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$, with labels flipped at a rate.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5), where it would reverse the preference.
    """
    return _flipped_logistic(z, FLIP_RATE.check("label_smoothing", label_smoothing))


def robust_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    r"""Return $[-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)] / (1-2\epsilon)$.

    The unbiased estimate of the clean loss under labels flipped at rate $\epsilon$, which is
    smoothing by the negative rate $-\epsilon/(1-2\epsilon)$. Not bounded below.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5).
    """
    rate = FLIP_RATE.check("label_smoothing", label_smoothing)
    return _flipped_logistic(z, -rate / (1 - 2 * rate))


def _flipped_logistic(z: Tensor, rate: float) -> Tensor:
    if rate == 0:  # 0 * log(sigmoid(-inf)) would be NaN
        return logistic(z)
    return (1 - rate) * logistic(z) + rate * logistic(-z)


def log_smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    r"""Return $\log$ of `smoothed_logistic`, right where that underflows: $-z$ for large $z$."""
    if FLIP_RATE.check("label_smoothing", label_smoothing) > 0:
        return _flipped_logistic(z, label_smoothing).log()
    # log(log1p(x)) = log(x) - x / 2 + O(x^2), and x = e^-37 is below float64's rounding of 1.
    return torch.where(z > 37, -z, logistic(z.clamp(max=37)).log())


def sigmoid_or_hinge(z: Tensor, loss_type: Link, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the smoothed logistic loss, or $\max(0, 1 - z)$.

    Raises:
        ValueError: an unknown `loss_type`, or label smoothing of the hinge, which has none.
    """
    check_smoothing(loss_type, label_smoothing)
    if loss_type == "sigmoid":
        return smoothed_logistic(z, label_smoothing)
    if loss_type != "hinge":
        raise ValueError(f"unknown loss_type {loss_type!r}; use 'sigmoid' or 'hinge'")
    return (1 - z).relu()


def check_smoothing(loss_type: str, label_smoothing: float) -> None:
    """Raise ValueError for label smoothing of a link that has none: a hinge, IPO's square."""
    if label_smoothing and loss_type in ("hinge", "ipo"):
        raise ValueError(
            f"label_smoothing={label_smoothing}, but loss_type={loss_type!r} smooths no labels: "
            "use loss_type='sigmoid' or label_smoothing=0"
        )


def kl_to_label(z: Tensor, label_smoothing: float) -> Tensor:
    r"""Return KL of Bernoulli($\sigma(z)$) from Bernoulli($1-\epsilon$), EXO's link for pairs.

    $$\sigma(z)\,[\log\sigma(z) - \log(1-\epsilon)] + \sigma(-z)\,[\log\sigma(-z) - \log\epsilon]$$

    Raises:
        ValueError: `label_smoothing` is outside (0, 0.5); at 0 every z has infinite divergence.
    """
    POSITIVE_FLIP_RATE.check("label_smoothing", label_smoothing)
    # Flat beyond |z| = 1000, where sigmoid is 0 in float64; there 0 * inf would be NaN.
    z = z.clamp(-1000, 1000)
    chosen = torch.sigmoid(z) * (logistic(z) + math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-z) * (logistic(-z) + math.log(label_smoothing))
    return -chosen - rejected


def log_ratio_modulated(z: Tensor, tau: float) -> Tensor:
    r"""Return $(1 - g)\log(1 + e^{-z}) + g\,e^{-z}$, $g = \sigma(z / \tau)$: DiscoPOP's link."""
    # An infinite z would meet g's zero slope: the last, linear part has it instead.
    inner = z.clamp(min=-1e30)
    modulated = torch.exp(-logistic(inner / tau) - inner)  # g e^-z, where e^-z alone overflows
    blend = torch.sigmoid(-inner / tau) * logistic(inner) + modulated
    return blend + (-1e30 - z).relu()


GPO_LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": logistic,
    "hinge": lambda z: (1 - z).relu(),
    "squared": lambda z: (1 - z).square(),
    "exponential": lambda z: torch.exp(-z),
    "truncated_quadratic": lambda z: (1 - z).relu().square(),
    "savage": lambda z: torch.sigmoid(-z).square(),
}
"""Convex (and Savage's non-convex) surrogates of the 0-1 loss, by the names of the GPO paper."""


def log_twice_sigmoid(u: Tensor) -> Tensor:
    r"""Return $\log(2\sigma(u))$, exact near its zero at $u = 0$."""
    above, below = u.clamp(min=0), u.clamp(max=0)
    return torch.where(
        u > 0, -torch.log1p(torch.expm1(-above) / 2), below - torch.log1p(torch.expm1(below) / 2)
    )


def expm1_difference(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    r"""Return $x(e^a - 1) - y(e^b - 1)$: infinite only where the difference itself is.

    Its gradient counts 0 * inf as 0: a loss that is flat where the difference overflows has
    gradient 0 there, not NaN.
    """
    return _Expm1Difference.apply(a, b, x, y)  # pyright: ignore[reportReturnType]


class _Expm1Difference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, x, y)
        top = torch.maximum(a, b).clamp(min=0)

        def scaled(t: Tensor) -> Tensor:
            """Return e^-top (e^t - 1)."""
            return torch.where(
                t > 0, -torch.expm1(-t) * torch.exp(t - top), torch.expm1(t) * torch.exp(-top)
            )

        # e^top in two halves, kept finite: a difference of 0 stays 0, any other one overflows.
        half = (top / 2).clamp(max=0.9 * math.log(torch.finfo(a.dtype).max)).exp()
        return (x * scaled(a) - y * scaled(b)) * half * half

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore
        (grad,), (a, b, x, y) = grads, ctx.saved_tensors

        def times(slope: Tensor) -> Tensor:
            product = grad * slope
            return product.where(~product.isnan() | grad.isnan() | slope.isnan(), 0)

        return times(x * a.exp()), times(-y * b.exp()), times(a.expm1()), times(-b.expm1())


def log1mexp(x: Tensor) -> Tensor:
    r"""Return $\log(1 - e^x)$ for $x < 0$, -inf at 0.

    `log(-expm1(x))` above $-\ln 2$ and `log1p(-exp(x))` below: each loses its digits where the
    other keeps them (Maechler 2012). The clamp keeps the idle branch away from log1p(-1), whose
    infinite derivative times 0 would be NaN.
    """
    near = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x.clamp(max=-LN2)))
    return torch.where(x > -LN2, near, far)


def log_odds(logp: Tensor) -> Tensor:
    r"""Return $\log\frac{p}{1-p} = x - \log(1-e^x)$ of a log-probability $x = \log p \le 0$.

    A confident model's log-probability rounds to 0, or a little above where log-sum-exp rounds
    down, and the odds of p = 1 are infinite. Such x count as the largest negative normal number
    of the dtype, with zero gradient: log-odds 87.3 in float32, 708.4 in float64.
    """
    x = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return x - log1mexp(x)
