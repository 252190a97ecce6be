"""Make random scores for any objective from its signature, and bound the rounding of its losses.

A score that is new to the vocabulary needs a recipe here: its sign, in `SIGNS` or `TOKENS`.
"""

from __future__ import annotations

import functools
import typing
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpo.data.columns import EXTRA_ROLES
from fastpo.domain import FINITE, domain_of, options
from fastpo.objectives.base import Hyper, Objective, Outcome

# Roundings on the longest path from a score to a loss, eps / 2 each: the link's own polynomial
# (torch's log1p, exp are good to 2-4 eps), the margin, products with beta and weights, and a sum
# over K = 4 candidates or their 12 ordered pairs. 32 half-eps bound them all.
ROUNDINGS = 16


class Case(typing.NamedTuple):
    """Hold an objective with one setting of its hyper-parameters."""

    objective: Objective
    hyper: Mapping[str, Hyper]  # all of them

    @property
    def name(self) -> str:
        """Return the objective's name."""
        return self.objective.name

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.hyper.items() if v != self.objective.hyper[k]}
        return self.name + "".join(f"-{k}={v}" for k, v in changed.items())


def cases_of(objective: Objective) -> list[Case]:
    """Return an objective at its defaults, with all numbers moved, and at every option.

    Numbers stay in their domains. Options are the bool and Literal hyper-parameters.
    """
    default = objective.hyper
    numbers = {k: v for k, v in default.items() if isinstance(v, int | float)}
    numbers = {k: v for k, v in numbers.items() if not isinstance(v, bool)}
    # Each by its own amount; 0 -> 0.02 and 0.1 -> 0.165 keep rates inside (0, 0.5).
    moved = {k: _moved(v, objective.expected(k), i + 1) for i, (k, v) in enumerate(numbers.items())}
    variants: list[Mapping[str, Hyper]] = [{}, moved] if moved else [{}]
    for key, value in default.items():
        others: list[Hyper] = []
        for option in options(objective.expected(key)):
            if option is bool:
                others += [False, True]
            elif option is type(None):
                others.append(None)
            elif typing.get_origin(option) is typing.Literal:
                others += typing.get_args(option)
        variants += [{key: other} for other in others if other != value]
    return [Case(objective, {**default, **variant}) for variant in variants]


def _moved(value: float, expected: object, place: int) -> float:
    """Return another number of a hyper-parameter's domain: greater, less, or halfway to an end."""
    domain = domain_of(expected) or FINITE
    if isinstance(value, int):
        steps = [value + place, value + 1, value - 1]
    else:
        step = 0.02 * place
        steps = [1.25 * value + step, 0.75 * value - step]
        steps += [(value + end) / 2 for end in (domain.low, domain.high)]
    return next((x for x in steps if domain.misfit(x) is None), value)


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
CONSTANT = {"length", "score", "margin", "kl_estimate"}
"""Scores that are numbers without gradient; so are statistics of a batch."""

NUM_TOKENS = 5  # T
# With beta = 0.1 also the middle of the range, where e^-z is small but not lost: z = 10, 30
EXTREMES = torch.tensor([1e4, 300.0, 100.0, 1.0, 1e-8])


def make_scores(
    objective: Objective,
    sizes: list[int],
    *,
    seed: int = 0,
    extreme: bool = False,
    hyper: Mapping[str, Hyper] | None = None,
) -> dict[str, Tensor]:
    """Return all that `objective` asks for, for groups of the given sizes, in float64.

    Floats hold float32 numbers, so that runs in both precisions get the same input. Magnitudes
    are in [0.2, 3.2], or with `extreme` drawn from `EXTREMES`.

    Raises:
        AssertionError: the objective takes a score that has no recipe.
    """
    point, roles = objective.family == "point", (*EXTRA_ROLES, *objective.extras)
    every = _every_score(point, tuple(sizes), tuple(dict.fromkeys(roles)), seed, extreme)
    scores = {name: value.clone() for name, value in every.items()}
    hyper = {**objective.hyper, **(hyper or {})}
    for name, statistic in objective.statistics.items():
        values, where = statistic.of(scores, hyper)
        scores[name] = statistic.reduce(values[where], hyper).float().double()
    unknown = [name for name in objective.needs if name not in scores]
    assert not unknown, f"{objective.name} takes {unknown}, of which no random ones can be made"
    return {name: scores[name] for name in dict.fromkeys((*objective.needs, "mask"))}


# A battery of one objective asks for ten of them, again at each of its settings: 120 draws each.
@functools.lru_cache(maxsize=64)
def _every_score(
    point: bool, sizes: tuple[int, ...], roles: tuple[str, ...], seed: int, extreme: bool
) -> dict[str, Tensor]:
    """Return every score that has a recipe, not to be written to; `point`: any label is good."""
    rng = torch.Generator().manual_seed(seed)
    g, k = len(sizes), max(max(sizes), 1 if point else 2)

    def magnitudes(*shape: int) -> Tensor:
        if extreme:
            return EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=rng)].double()
        return (0.2 + 3 * torch.rand(shape, generator=rng)).double()

    def signs(*shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=rng) - 1

    mask = torch.arange(k) < torch.tensor(sizes)[:, None]
    label = torch.zeros(g, k, dtype=torch.bool)
    label[:, 0] = True
    if point:
        label = torch.randint(0, 2, (g, k), generator=rng).bool()
    scores = {"mask": mask, "label": label & mask}
    for name, sign in SIGNS.items():
        for full, shape in ((name, (g, k)), *((f"{role}_{name}", (g,)) for role in roles)):
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
    # Those that no objective of the catalogue takes.
    scores["ref2_logps"] = -magnitudes(g, k)
    scores["kl_estimate"] = magnitudes(g, k)
    for name in ("token_log_p2", "token_ref2_logps"):
        scores[name] = -magnitudes(g, k, NUM_TOKENS).where(scores["token_mask"], 0)
    for role in roles:
        scores[f"{role}_length"] = torch.randint(1, 9, (g,), generator=rng).double()
        for name in ("ref2_logps", "kl_estimate"):
            scores[f"{role}_{name}"] = magnitudes(g) * (1 if name == "kl_estimate" else -1)
    return scores


def evaluate(case: Case, scores: Mapping[str, Tensor]) -> Outcome:
    """Return the outcome of an objective at its setting."""
    return case.objective(scores, **case.hyper)


def cast(scores: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return scores whose floats have this dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in scores.items()}


def leaves(
    scores: Mapping[str, Tensor], constant: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a copy of the scores, and those of it that carry gradient in training.

    Args:
        scores: named scores.
        constant: names of further scores without gradient, such as batch statistics.
    """
    copy = {k: v.clone() for k, v in scores.items()}
    without = CONSTANT | set(constant)
    return copy, {
        k: v.requires_grad_() for k, v in copy.items() if v.is_floating_point() and k not in without
    }


def gradients(case: Case, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of all weighted terms' sum; zeros for scores that only rewards use.

    Raises:
        AssertionError: no gradient at all, or a NaN anywhere in backward, even one that a `where`
            drops later.
    """
    copy, roots = leaves(scores, case.objective.statistics)
    sums = [t.weight * t.values.sum() for t in evaluate(case, copy).terms]
    assert any(value.requires_grad for value in sums), f"{case} has no gradient to any score"
    try:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
            warnings.simplefilter("ignore")
            total = torch.stack(sums).sum()
            grads = torch.autograd.grad(total, list(roots.values()), allow_unused=True)
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        raise AssertionError(
            f"{case}: backward makes NaN, even if a later `where` drops it ({error}): set scores "
            "to 0 where `mask` is False before anything else, with fastpo.objectives.links.live"
        ) from error
    return {
        name: torch.zeros_like(root) if grad is None else grad
        for (name, root), grad in zip(roots.items(), grads, strict=True)
    }


def by_divisor(outcome: Outcome) -> dict[str, Tensor]:
    """Return the weighted values [G] of each `per`."""
    sums: dict[str, Tensor] = {}
    for t in outcome.terms:
        values = t.weight * t.values
        sums[t.per] = sums[t.per] + values if t.per in sums else values
    return sums


def slice_groups(
    scores: Mapping[str, Tensor],
    index: Any,
    slots: slice = slice(None),
    statistics: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return the scores of some groups, and of some of their candidates; statistics stay."""

    def part(value: Tensor) -> Tensor:
        return value[index][:, slots] if value.dim() > 1 else value[index]

    return {k: v if k in statistics else part(v) for k, v in scores.items()}


def poison(scores: Mapping[str, Tensor], statistics: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the same groups with NaN, True and nonsense in their padded slots and tokens."""
    slots, poisoned = scores["mask"], {}
    for name, value in scores.items():
        live = slots
        if value.dim() == 3:
            live = scores.get("token_mask", slots[..., None]) & slots[..., None]
        elif value.dim() == 1:
            live = slots.any(-1)
        if name in ("mask", "token_mask") or name in statistics:
            poisoned[name] = value
        elif value.dtype == torch.bool:
            poisoned[name] = value | ~live
        else:
            poisoned[name] = value.where(live, float("nan") if value.is_floating_point() else -7)
    return poisoned


def condition(case: Case, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return $|f| + \sum_i |x_i\, \partial f / \partial x_i|$ of each sum [G], in float64.

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
                        bounds[per][i] += (
                            product if name in case.objective.statistics else product[i]
                        ).sum()
    return bounds


def assert_rounded(ours: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """Assert |ours - truth| <= 16 eps * bound + the smallest normal number, elementwise."""
    info, rounded = torch.finfo(ours.dtype), truth.to(ours.dtype)  # beyond its range: inf
    ours, allowed = ours.detach().double(), ROUNDINGS * info.eps * bound + info.tiny
    off = ~((ours - truth).abs() <= allowed) & ~(ours == rounded)
    assert not off.any(), f"{what}: {ours[off]} is not {truth[off]} within {allowed[off]}"


class PassDetach(TorchFunctionMode):
    """Make `detach` the identity: sensitivity to what carries no gradient counts too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach:
            return args[0]
        return func(*args, **(kwargs or {}))


class ReplayDetach(TorchFunctionMode):
    """Let every `detach` return what it returned in the first run.

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
