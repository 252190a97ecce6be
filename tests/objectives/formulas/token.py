"""Objectives on token statistics, by hand."""

from __future__ import annotations

from .common import nlsig


def tdpo1(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


def tdpo2(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - h.alpha * (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


FORMULAS = {f.__name__: f for f in (tdpo1, tdpo2)}
