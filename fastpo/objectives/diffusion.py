r"""Objectives on the denoising errors of image pairs.

For diffusion models' own training loops: a language model has no such scores. $e$ (`error`) is the
mean squared error of the predicted noise of an image, $e_{ref}$ (`ref_error`) the reference's,
[G, 2] with the preferred image first, both images of a pair with the same noise and time step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.domain import Count, NonNegative, Positive

from .base import Objective, Outcome, catalogue
from .links import live, logistic
from .pairwise import dpo, pair_outcome


def diffusion_dpo(
    error: Tensor,  # [G, 2]
    ref_error: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: Positive = 5000.0,
) -> Outcome:
    r"""Diffusion-DPO: DPO with $u = -(e - e_{ref})/2$.

    $$-\log\sigma\left(-\tfrac{\beta}{2}\left[(e_w - e_l) - (e_{ref,w} - e_{ref,l})\right]\right)$$

    `beta` holds the paper's $T\omega(\lambda_t)$; 2000 suits Stable Diffusion 1.5. Reward
    $\beta u$. Paper: https://arxiv.org/abs/2311.12908

    >>> import torch
    >>> e, ref = torch.tensor([[0.1, 0.2]]), torch.tensor([[0.2, 0.2]])
    >>> diffusion_dpo(e, ref, torch.tensor([[True, True]]), beta=20.0).terms[0].values
    tensor([0.3133])
    """
    return dpo((ref_error - error) / 2, mask, beta=beta)


# Coefficients B_2n / (2n)! of x^2n in x / (e^x - 1) = 1 - x/2 + sum; the first that is left out
# adds less than 1e-17 at x = 1/2.
_BERNOULLI = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
)


def _shortfall(x: Tensor) -> Tensor:
    r"""Return $1 - x / (e^x - 1)$ for $x \ge 0$, with all digits of the small values near 0.

    A series below 1/2, where the closed form and, more so, its derivative are differences of large
    numbers. Above, $e^{-x}$ and not $e^x$, which overflows.
    """
    small = x < 0.5
    near, far = x.where(small, 0), x.where(~small, 1)
    square, series = near.square(), torch.zeros_like(near)
    for coefficient in reversed(_BERNOULLI):
        series = coefficient + square * series
    return torch.where(
        small, near / 2 - square * series, 1 + far * torch.exp(-far) / torch.expm1(-far)
    )


def mapo(
    error: Tensor,  # [G, 2]
    mask: Tensor,  # [G, 2] bool
    *,
    beta: NonNegative = 0.1,
    k: Positive = 0.5,
    num_train_timesteps: Count = 1000,
) -> Outcome:
    r"""MaPO: margin-aware preference optimisation, reference-free.

    $$e_w - \beta\log\sigma\left(T(\varphi(e_w) - \varphi(e_l))\right), \quad
    \varphi(e) = \frac{k e}{e^{k e} - 1}$$

    $T$ is `num_train_timesteps`; $\varphi(0) = 1$. Errors are not negative. Reward $T\varphi(e)$.
    Paper: https://arxiv.org/abs/2406.06424

    >>> import torch
    >>> both = torch.tensor([[True, True]])
    >>> mapo(torch.tensor([[0.25, 0.25]]), both).terms[0].values  # 0.25 + 0.1 log 2
    tensor([0.3193])
    """
    e = live(error, mask)
    shortfall = _shortfall(k * e)
    z = num_train_timesteps * (shortfall[:, 1] - shortfall[:, 0])
    return pair_outcome(e[:, 0] + beta * logistic(z), num_train_timesteps * (1 - shortfall), mask)


DIFFUSION = catalogue(
    Objective(
        diffusion_dpo, "pair", "2311.12908", "-logsig(-(beta/2) ((e_w - e_l) - (eref_w - eref_l)))"
    ),
    Objective(
        mapo,
        "pair",
        "2406.06424",
        "e_w - beta logsig(T (phi(e_w) - phi(e_l))), phi(e) = k e / (e^(k e) - 1)",
    ),
)
