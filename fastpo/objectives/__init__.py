"""The catalogue of objectives: one table of names, one small pure function behind each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpo.errors import similar

from . import user
from .base import Family, Objective, Outcome, catalogue
from .batchwise import BATCHWISE
from .contexts import CONTEXTS
from .diffusion import DIFFUSION
from .elsewhere import NOTHING, called_here, plain
from .lipo import LIPO
from .listwise import LISTWISE
from .pairwise import PAIRWISE
from .pointwise import POINTWISE
from .policy_gradient import POLICY_GRADIENT
from .reference_free import REFERENCE_FREE
from .regression import REGRESSION
from .regularisers import REGULARISERS
from .token import TOKEN

SECTIONS: dict[str, dict[str, Objective]] = {
    "Pairs with a reference": PAIRWISE,
    "Pairs without a reference": REFERENCE_FREE,
    "Regressions of margins and rewards": REGRESSION,
    "Pairs that see the whole batch": BATCHWISE,
    "Other prompts, other references": CONTEXTS,
    "Single responses": POINTWISE,
    "Lists": LIPO | LISTWISE,
    "Token statistics": TOKEN,
    "Policy gradients on sampled responses": POLICY_GRADIENT,
    "Diffusion models": DIFFUSION,
    "Likelihood and other regularisers": REGULARISERS,
}
"""Headings of the catalogue, in order."""

OBJECTIVES: dict[str, Objective] = catalogue(
    *(objective for section in SECTIONS.values() for objective in section.values())
)
"""Name -> objective."""


def unknown_objective(name: object) -> str:
    """Return the answer to an unknown objective: its name here, or the nearest ones.

    >>> unknown_objective("sigmoid")
    "unknown objective 'sigmoid': here it is dpo"
    """
    if not isinstance(name, str):
        return (
            f"objective {name!r} is no name: write where it is, 'my_module:my_loss', or the name "
            "that fastpo.register(it) gives it"
        )
    if "{" in name:
        return f"objective {name!r} is neither a name nor a mapping {{dpo: 1, sft: 0.1}}"
    if "." in name:
        return f"unknown objective {name!r}: one of your own is called module:function"
    here = plain(name) if plain(name) in OBJECTIVES else called_here(name)
    if here != name:
        said = here.removeprefix(NOTHING) if here.startswith(NOTHING) else f"here it is {here}"
        return f"unknown objective {name!r}: {said}"
    near = similar(plain(name), OBJECTIVES, count=5, cutoff=0)
    listed = ", ".join(map(repr, near[:-1]))
    return (
        f"unknown objective {name!r}: did you mean {listed} or {near[-1]!r}? `fastpo objectives` "
        "lists all"
    )


def get_objective(name: str, *, beside: Path | None = None) -> Objective:
    """Return an objective by its name, or by where it is: `my_module:my_loss`.

    Args:
        name: a name of `OBJECTIVES`; or `module:function` or `path/to/file.py:function` of a
            user's own, whose module is imported.
        beside: a folder to look for it in before the working directory.

    Raises:
        ValueError: no such name, with what it is called here, or the nearest five; no such module
            or function; a function that cannot be an objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not user.is_reference(name):
        raise ValueError(unknown_objective(name))
    return _of(user.load(name, beside), name)


def as_objective(
    objective: Objective | Callable[..., Outcome], *, family: Family | None = None
) -> Objective:
    """Return the objective that a function is, by the table or by `family`.

    Raises:
        ValueError: neither a function nor an objective, a family that is unknown or another than
            it says itself, or a signature that cannot be read.
    """
    return _of(objective, getattr(objective, "__name__", str(objective)), family)


def register(
    objective: Objective | Callable[..., Outcome], *, family: Family | None = None
) -> Objective:
    """Add an objective to `OBJECTIVES`; its name then works wherever one does.

    Args:
        objective: the objective, or its function.
        family: what a plain function compares, unless it says so itself.

    Raises:
        ValueError: the name is taken, or what `as_objective` refuses.

    >>> def twice(ratio, mask, *, beta=0.1): ...
    >>> register(twice, family="pair").name, "twice" in OBJECTIVES
    ('twice', True)
    >>> del OBJECTIVES["twice"]
    """
    made = as_objective(objective, family=family)
    known = OBJECTIVES.setdefault(made.name, made)
    if known != made:
        raise ValueError(
            f"the name {made.name!r} is taken: give Objective(..., name=...) another, or del "
            f"fastpo.OBJECTIVES[{made.name!r}] first"
        )
    return known


def _of(value: object, reference: str, family: Family | None = None) -> Objective:
    """Return an objective; a plain function of the table is that one."""
    known = next((objective for objective in OBJECTIVES.values() if objective.fn is value), value)
    made = user.described(known, reference, family)
    if user.is_reference(reference) and OBJECTIVES.get(made.name, made) != made:
        raise ValueError(
            f"objective {reference!r}: another is called {made.name!r}: rename the function, or "
            "give Objective(..., name=...)"
        )
    return made


__all__ = [
    "OBJECTIVES",
    "SECTIONS",
    "as_objective",
    "get_objective",
    "register",
    "unknown_objective",
]
