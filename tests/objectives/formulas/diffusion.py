"""Objectives on the denoising errors of image pairs, by hand."""

from __future__ import annotations

from mpmath import exp, mpf

from .common import nlsig


def diffusion_dpo(g, h):
    z = -h.beta / 2 * ((g.error[0] - g.error[1]) - (g.ref_error[0] - g.ref_error[1]))
    rewards = [-h.beta / 2 * (e - ref) for e, ref in zip(g.error, g.ref_error, strict=True)]
    return {"groups": nlsig(z)}, rewards


def mapo(g, h):
    phi = [h.k * e / (exp(h.k * e) - 1) if e else mpf(1) for e in g.error]
    z = h.num_train_timesteps * (phi[0] - phi[1])
    loss = g.error[0] + h.beta * nlsig(z)
    return {"groups": loss}, [h.num_train_timesteps * p for p in phi]


FORMULAS = {f.__name__: f for f in (diffusion_dpo, mapo)}
