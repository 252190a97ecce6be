"""Lists, by hand."""

from __future__ import annotations

from mpmath import exp, log, log1p, mpf

from .common import nll, nlsig, times
from .lipo import cross_entropy, graded_pairs, rest


def logo(g, h):
    gamma = h.beta * h.gamma_beta_ratio
    z = h.beta * (g.s[0] - sum(g.s[1:]) / len(g.s[1:])) - gamma
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": nlsig(z), per: h.sft_weight * likelihood}, times(h.beta, g.s)


def softmax(x):
    return [exp(a) / sum(exp(b) for b in x) for a in x]


def infonca(g, h):
    s, t = times(h.beta, g.u), softmax([q / h.alpha for q in g.q])
    return {"groups": cross_entropy(t, s)}, s


def nca(g, h):
    s, t = times(h.beta, g.u), softmax([q / h.alpha for q in g.q])
    losses = [nlsig(-x) / len(s) + p * nlsig(x) for x, p in zip(s, t, strict=True)]
    return {"groups": sum(losses, mpf(0))}, s


def reverse_kl(s, t):
    p = softmax(s)
    log_p = [-log1p(rest(s, i)) for i in range(len(s))]
    return sum((a * (b - log(c)) for a, b, c in zip(p, log_p, t, strict=True)), mpf(0))


def exo_rw(g, h):
    s = times(h.beta, g.u)
    return {"groups": reverse_kl(s, softmax([q / h.beta_r for q in g.q]))}, s


def exo_pref(g, h):
    s, e = times(h.beta, g.u), h.label_smoothing
    odds = [1 - e if good else e for good in g.label]
    return {"groups": reverse_kl(s, [x / sum(odds) for x in odds])}, s


def dpo_rw(g, h):
    s, t = times(h.beta, g.u), softmax([q / h.beta_r for q in g.q])
    return {"groups": cross_entropy(t, s)}, s


def pro(g, h):
    order, total = sorted(range(len(g.s)), key=lambda i: -g.q[i]), mpf(0)
    for place, k in enumerate(order[:-1]):
        worse = order[place + 1 :]
        steepest = max(g.q[k] - g.q[j] for j in worse)
        odds = sum(exp((g.q[k] - g.q[j]) * g.s[j] - steepest * g.s[k]) for j in worse)
        total += log1p(odds)
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": total, per: h.sft_weight * (len(g.s) - 1) ** 2 * likelihood}, list(g.s)


def rrhf(g, h):
    total = sum((max(mpf(0), g.s[j] - g.s[i]) for i, j in graded_pairs(g.q)), mpf(0))
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": h.rrhf_weight * total, per: likelihood}, list(g.s)


FORMULAS = {f.__name__: f for f in (logo, infonca, nca, exo_rw, exo_pref, dpo_rw, pro, rrhf)}
