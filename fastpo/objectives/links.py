r"""The scalar functions that turn margins into losses. Each piece of mathematics lives here once.

All are elementwise, keep shape and dtype, and are exact to rounding over the whole range of
floats: no intermediate overflows, and the branch of a `where` that is not taken has a finite
gradient (0 * inf would be NaN).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LN2 = math.log(2.0)


def live(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 where `mask` is False: padding, NaN included, reaches no value or gradient."""
    return x.where(mask, 0)


def logistic(z: Tensor) -> Tensor:
    r"""$-\log\sigma(z) = \log(1 + e^{-z})$."""
    return -logsigmoid(z)


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    r"""$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$: labels flipped at rate $\epsilon$.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5), where it would reverse the preference.
    """
    return _flipped_logistic(z, _flip_rate(label_smoothing))


def robust_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    r"""$[-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)] / (1-2\epsilon)$.

    The unbiased estimate of the clean loss under labels flipped at rate $\epsilon$, which is
    smoothing by the negative rate $-\epsilon/(1-2\epsilon)$. Not bounded below.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5).
    """
    rate = _flip_rate(label_smoothing)
    return _flipped_logistic(z, -rate / (1 - 2 * rate))


def _flip_rate(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}; it is the rate of flipped labels and must be "
            "in [0, 0.5)"
        )
    return label_smoothing


def _flipped_logistic(z: Tensor, rate: float) -> Tensor:
    if rate == 0:  # 0 * log(sigmoid(-inf)) would be NaN
        return logistic(z)
    return (1 - rate) * logistic(z) + rate * logistic(-z)


def log1mexp(x: Tensor) -> Tensor:
    r"""$\log(1 - e^x)$ for $x < 0$, -inf at 0.

    `log(-expm1(x))` above $-\ln 2$ and `log1p(-exp(x))` below: each loses its digits where the
    other keeps them (Maechler 2012). The clamp keeps the idle branch away from log1p(-1), whose
    infinite derivative times 0 would be NaN.
    """
    near = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x.clamp(max=-LN2)))
    return torch.where(x > -LN2, near, far)


def log_odds(logp: Tensor) -> Tensor:
    r"""$\log\frac{p}{1-p} = x - \log(1-e^x)$ of a log-probability $x = \log p \le 0$.

    A confident model's log-probability rounds to 0, or a little above where log-sum-exp rounds
    down, and the odds of p = 1 are infinite. Such x count as the largest negative normal number
    of the dtype, with zero gradient: log-odds 87.3 in float32, 708.4 in float64.
    """
    x = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return x - log1mexp(x)
