"""Random scores for any objective of the table, made from its signature, and rounding bounds.

An objective that is added to the table is covered by `test_battery.py` without a line here,
unless it takes a score that no objective took before: then `RECIPES` needs its recipe.
"""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpo.data.columns import CONTEXT_ROLES
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Objective, Outcome

# Roundings on the longest path from a score to a loss, eps / 2 each: the link's own polynomial
# (torch's log1p, exp are good to 2-4 eps), the margin, products with beta and weights, and a sum
# over K = 4 candidates or their 12 ordered pairs. 32 half-eps bound them all.
ROUNDINGS = 16


class Case(typing.NamedTuple):
    """An objective with one setting of its hyper-parameters."""

    name: str
    hyper: dict[str, Any]  # all of them

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name]

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.hyper.items() if v != self.objective.hyper[k]}
        return self.name + "".join(f"-{k}={v}" for k, v in changed.items())


def cases() -> list[Case]:
    """Every objective at its defaults, with all numbers moved, and at every value of its options.

    Options are the bool and Literal hyper-parameters.
    """
    found = []
    for name, objective in OBJECTIVES.items():
        default = objective.hyper
        hints = typing.get_type_hints(objective.fn)
        # Each by its own amount; 0 -> 0.02 and 0.1 -> 0.165 keep rates inside (0, 0.5).
        floats = [k for k, v in default.items() if type(v) is float]
        moved = {k: 1.25 * default[k] + 0.02 * (i + 1) for i, k in enumerate(floats)}
        variants = [{}, moved] if moved else [{}]
        for key, value in default.items():
            if isinstance(value, bool):
                variants.append({key: not value})
            elif typing.get_origin(hints[key]) is typing.Literal:
                variants += [{key: v} for v in typing.get_args(hints[key]) if v != value]
        found += [Case(name, {**default, **variant}) for variant in variants]
    return found


# Scores [G, K] and sign of their values: -1 for log-probs, 1 for divergences, 0 for either. An
# extra response has them too, [G], under its role; a name that starts with `token_` is [G, K, T].
SIGNS = {
    "logps": -1,
    "mean_logps": -1,
    "ref_logps": -1,
    "old_logps": -1,
    "ratio": 0,
    "mean_ratio": 0,
    "kl": 1,
    "kl_reverse": 1,
    "log_p2": -1,
    "mean_log_p2": -1,
    "entropy": 1,
    "mean_entropy": 1,
    "error": 1,
    "ref_error": 1,
    "ratio2": 0,
}
TOKENS = {
    "token_logps": -1,
    "token_ref_logps": -1,
    "token_old_logps": -1,
    "token_kl": 1,
    "token_kl_reverse": 1,
    "token_entropy": 1,
    "token_weights": 1,
    "token_kl_weights": 1,
    "token_rewards": 0,
}
ROLES = ("mismatched", "gold", "ref_response", *CONTEXT_ROLES)
BARE = {f"{role}_{name}": sign for role in ROLES for name, sign in SIGNS.items()}
RECIPES = {**SIGNS, **TOKENS, **BARE}
"""Scores that carry gradient in training, or could."""

STATISTICS = {name for objective in OBJECTIVES.values() for name in objective.statistics}
NUM_TOKENS = 5  # T
# With beta = 0.1 also the middle of the range, where e^-z is small but not lost: z = 10, 30
EXTREMES = torch.tensor([1e4, 300.0, 100.0, 1.0, 1e-8])


def make_scores(
    objective: Objective,
    sizes: list[int],
    *,
    seed: int = 0,
    extreme: bool = False,
    hyper: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Everything that `objective` can ask for, for groups of the given sizes, in float64.

    Floats hold float32 numbers, so that runs in both precisions get the same input. Magnitudes
    are in [0.2, 3.2], or with `extreme` drawn from `EXTREMES`.
    """
    rng = torch.Generator().manual_seed(seed)
    g, k = len(sizes), max(max(sizes), 2 if objective.family != "point" else 1)

    def magnitudes(*shape: int) -> Tensor:
        if extreme:
            return EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=rng)].double()
        return (0.2 + 3 * torch.rand(shape, generator=rng)).double()

    def signs(*shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=rng) - 1

    mask = torch.arange(k) < torch.tensor(sizes)[:, None]
    label = torch.zeros(g, k, dtype=torch.bool)
    label[:, 0] = True
    if objective.family == "point":
        label = torch.randint(0, 2, (g, k), generator=rng).bool()
    scores = {"mask": mask, "label": label & mask}
    for name, sign in SIGNS.items():
        for full, shape in ((name, (g, k)), *((f"{role}_{name}", (g,)) for role in ROLES)):
            scores[full] = magnitudes(*shape) * (sign or signs(*shape))
    scores["mean_log_p2"].clamp_(min=-12)  # at least -log V, the uniform distribution's
    scores["length"] = torch.randint(1, 9, (g, k), generator=rng).double()
    lengths = torch.randint(1, NUM_TOKENS + 1, (g, k, 1), generator=rng)
    scores["token_mask"] = (torch.arange(NUM_TOKENS) < lengths) & mask[..., None]
    for name, sign in TOKENS.items():
        values = magnitudes(g, k, NUM_TOKENS) * (sign or signs(g, k, NUM_TOKENS))
        scores[name] = values.where(scores["token_mask"], 0)
    scores["margin"] = magnitudes(g) * signs(g)
    scores["population"] = torch.randint(0, 3, (g,), generator=rng)
    scores["score"] = torch.rand((g, k), generator=rng).double()
    scores["rank"] = torch.rand((g, k), generator=rng).argsort(-1)
    scores["tie_key"] = torch.randint(0, 2**62, (g, k), generator=rng)
    hyper = {**objective.hyper, **(hyper or {})}
    for name, statistic in objective.statistics.items():
        values, where = statistic.of(scores, hyper)
        scores[name] = statistic.reduce(values[where], hyper).float().double()
    unknown = [name for name in objective.needs if name not in scores]
    assert not unknown, f"{objective.name} takes {unknown}: give the battery a recipe"
    return {name: scores[name] for name in objective.needs}


def evaluate(case: Case, scores: dict[str, Tensor]) -> Outcome:
    return case.objective.fn(**scores, **case.hyper)


def cast(scores: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in scores.items()}


def leaves(scores: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A copy of the scores, and those that carry gradient in training: the recipes'."""
    copy = {k: v.clone() for k, v in scores.items()}
    return copy, {k: v.requires_grad_() for k, v in copy.items() if k in RECIPES}


def gradients(case: Case, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the sum of all weighted terms; zeros for scores that only rewards use.

    Anomaly detection raises on a NaN anywhere in backward, even one that a `where` drops later.
    """
    copy, roots = leaves(scores)
    with torch.autograd.set_detect_anomaly(True):
        sums = [t.weight * t.values.sum() for t in evaluate(case, copy).terms]
        grads = torch.autograd.grad(
            torch.stack(sums).sum(), list(roots.values()), allow_unused=True
        )
    return {
        name: torch.zeros_like(root) if grad is None else grad
        for (name, root), grad in zip(roots.items(), grads, strict=True)
    }


def by_divisor(outcome: Outcome) -> dict[str, Tensor]:
    """Weighted values [G] of each `per`."""
    sums: dict[str, Tensor] = {}
    for t in outcome.terms:
        values = t.weight * t.values
        sums[t.per] = sums[t.per] + values if t.per in sums else values
    return sums


def slice_groups(
    scores: dict[str, Tensor], index: Any, slots: slice = slice(None)
) -> dict[str, Tensor]:
    """The scores of some groups, and of some of their candidates; batch statistics stay."""

    def part(value: Tensor) -> Tensor:
        return value[index][:, slots] if value.dim() > 1 else value[index]

    return {k: v if k in STATISTICS else part(v) for k, v in scores.items()}


def poison(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same groups with NaN, True and nonsense in their padded slots and tokens."""
    slots, poisoned = scores["mask"], {}
    for name, value in scores.items():
        live = slots
        if value.dim() == 3:
            live = scores.get("token_mask", slots[..., None]) & slots[..., None]
        elif value.dim() == 1:
            live = slots.any(-1)
        if name in ("mask", "token_mask") or name in STATISTICS:
            poisoned[name] = value
        elif value.dtype == torch.bool:
            poisoned[name] = value | ~live
        else:
            poisoned[name] = value.where(live, float("nan") if value.is_floating_point() else -7)
    return poisoned


def condition(case: Case, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    r"""$|f| + \sum_i |x_i\, \partial f / \partial x_i|$ of each sum [G], in float64.

    Rounding every input and the result once, by eps relative, changes f by at most eps times
    this. An algorithm that is as good as its inputs allow stays within a few times that.
    """
    copy = {k: v.double() if v.is_floating_point() else v for k, v in scores.items()}
    roots = {k: v.clone().requires_grad_() for k, v in copy.items() if v.is_floating_point()}
    with PassDetach():
        terms = by_divisor(evaluate(case, {**copy, **roots}))
    bounds = {}
    for per, values in terms.items():
        bounds[per] = values.detach().abs()
        for i in range(len(values)):
            if values.requires_grad:
                grads = torch.autograd.grad(
                    values[i], list(roots.values()), retain_graph=True, allow_unused=True
                )
                for (name, root), grad in zip(roots.items(), grads, strict=True):
                    if grad is not None:  # of its own group: 0 * inf is NaN in another one's
                        product = (root * grad).abs().detach()
                        bounds[per][i] += (product if name in STATISTICS else product[i]).sum()
    return bounds


def assert_rounded(ours: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """|ours - truth| <= 16 eps * condition + the smallest normal number, elementwise."""
    info, rounded = torch.finfo(ours.dtype), truth.to(ours.dtype)  # beyond its range: inf
    ours, allowed = ours.detach().double(), ROUNDINGS * info.eps * bound + info.tiny
    off = ~((ours - truth).abs() <= allowed) & ~(ours == rounded)
    assert not off.any(), f"{what}: {ours[off]} is not {truth[off]} within {allowed[off]}"


class PassDetach(TorchFunctionMode):
    """Makes `detach` the identity: sensitivity to what carries no gradient counts too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach:
            return args[0]
        return func(*args, **(kwargs or {}))


class ReplayDetach(TorchFunctionMode):
    """Every `detach` returns what it returned in the first run.

    Finite differences then see a stop-gradient as the constant that it is to autograd.
    """

    def __init__(self, tape: list[Tensor]) -> None:
        super().__init__()
        self.tape, self.replay, self.at = tape, bool(tape), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:
            if self.replay:
                result = self.tape[self.at]
                self.at += 1
            else:
                self.tape.append(result.clone())
        return result
