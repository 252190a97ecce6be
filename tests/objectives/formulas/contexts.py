"""Responses after several prompts, and two references, by hand."""

from __future__ import annotations

from .common import nlsig, times


def re_align(g, h):
    conditional = nlsig(h.beta * (g.u[0] - g.context_chosen_ratio))
    return {"groups": nlsig(h.beta * (g.u[0] - g.u[1])) + conditional}, times(h.beta, g.u)


def mdpo(g, h):
    preference = nlsig(h.beta * (g.u[0] - g.u[1]))
    conditional = nlsig(h.beta * (g.u[0] - g.context_chosen_ratio))
    anchored = nlsig(h.beta * g.u[0] - h.anchor)
    return {"groups": preference + conditional + anchored}, times(h.beta, g.u)


def svco(g, h):
    """Steps from the right context over none to the wrong one, for both responses."""
    own = (
        nlsig(h.beta_match * (g.u[0] - g.bare_chosen_ratio)),
        nlsig(h.beta_mismatch * (g.bare_chosen_ratio - g.context_chosen_ratio)),
    )
    other = (
        nlsig(h.beta_other_match * (g.context_rejected_ratio - g.bare_rejected_ratio)),
        nlsig(h.beta_other_mismatch * (g.bare_rejected_ratio - g.u[1])),
    )
    rewards = [h.beta_match * g.u[0], h.beta_other_mismatch * g.u[1]]
    return {"groups": sum(own) + sum(other)}, rewards


def solopo(g, h):
    gap = h.beta * g.u[0] - h.beta * g.context_chosen_ratio
    return {"groups": nlsig(h.beta * (g.u[0] - g.u[1])) + h.alpha * abs(gap)}, times(h.beta, g.u)


def solopo_simpo(g, h):
    gap = h.beta * g.s[0] - h.beta * g.context_chosen_mean_logps
    z = h.beta * (g.s[0] - g.s[1]) - h.beta * h.gamma_beta_ratio
    return {"groups": nlsig(z) + h.alpha * abs(gap)}, times(h.beta, g.s)


def d2o(g, h):
    samples = [u for u, good in zip(g.u, g.label, strict=True) if good]
    negatives = [u for u, good in zip(g.ratio2, g.label, strict=True) if not good]
    z = h.beta * sum(samples) / len(samples) - h.alpha * sum(negatives) / len(negatives)
    rewards = [
        h.beta * u if good else h.alpha * u2
        for u, u2, good in zip(g.u, g.ratio2, g.label, strict=True)
    ]
    return {"groups": nlsig(z)}, rewards


FORMULAS = {f.__name__: f for f in (re_align, mdpo, svco, solopo, solopo_simpo, d2o)}
