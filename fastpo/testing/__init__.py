"""Test objectives, your own too: `check_objective(my_loss)` inside a test, or anywhere.

Needs PyTorch alone, no test runner. `battery` has the single checks, `scores` makes their inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from fastpo.objectives import as_objective
from fastpo.objectives.base import Family, Hyper, Objective, Outcome

from .battery import CHECKS
from .scores import Case, cases_of

__all__ = ["check_objective"]


def check_objective(
    objective: Objective | Callable[..., Outcome], *, family: Family | None = None, **hyper: Hyper
) -> None:
    """Check what every objective has to do, on random scores made from its signature.

    Losses and rewards have the scores' dtype and shapes; rewards are detached; float32 agrees with
    float64 from 1e-8 to 1e4; gradients are those of finite differences; a group's loss is its own,
    whatever is padded, in whichever order, and 0 without responses; NaN stays; inputs are kept.
    Once at the defaults, with all numbers moved, and with every other option; or at `hyper` alone.

    Args:
        objective: a function of scores, or an `Objective`.
        family: what a plain function compares, unless it says so itself.
        **hyper: one setting of hyper-parameters.

    Raises:
        AssertionError: says in a sentence what is wrong.
        ValueError: the signature cannot be read; an unknown or unfit hyper-parameter.

    >>> from fastpo.objectives.pairwise import dpo
    >>> check_objective(dpo, family="pair", beta=0.3)
    """
    checked = as_objective(objective, family=family)
    for name, value in hyper.items():
        if name not in checked.hyper:
            known = ", ".join(checked.hyper) or "none"
            raise ValueError(f"{checked.name} has no hyper-parameter {name!r}: it has {known}")
        hyper[name] = checked.option(name, value)
    cases = [Case(checked, {**checked.hyper, **hyper})] if hyper else cases_of(checked)
    for case in cases:
        for check in CHECKS:
            check(case)
