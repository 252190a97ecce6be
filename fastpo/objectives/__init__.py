"""The catalogue of objectives: one table of names, one small pure function behind each."""

from __future__ import annotations

from fastpo.errors import similar

from .base import Objective
from .batchwise import BATCHWISE
from .contexts import CONTEXTS
from .diffusion import DIFFUSION
from .elsewhere import NOTHING, called_here, plain
from .lipo import LIPO
from .listwise import LISTWISE
from .pairwise import PAIRWISE
from .pointwise import POINTWISE
from .policy import POLICY
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
    "Policy gradients on sampled responses": POLICY,
    "Diffusion models": DIFFUSION,
    "Likelihood and other regularisers": REGULARISERS,
}
"""Headings of the catalogue, in order."""

OBJECTIVES: dict[str, Objective] = {
    name: objective for section in SECTIONS.values() for name, objective in section.items()
}


def unknown_objective(name: object) -> str:
    """What to tell somebody who asks for an objective that there is not: its name, or the nearest.

    >>> unknown_objective("sigmoid")
    "unknown objective 'sigmoid': here it is dpo"
    """
    here = plain(name) if plain(name) in OBJECTIVES else called_here(name)
    if here != str(name):
        said = here.removeprefix(NOTHING) if here.startswith(NOTHING) else f"here it is {here}"
        return f"unknown objective {name!r}: {said}"
    near = similar(plain(name), OBJECTIVES, count=5, cutoff=0)
    listed = ", ".join(map(repr, near[:-1]))
    return (
        f"unknown objective {name!r}: did you mean {listed} or {near[-1]!r}? `fastpo objectives` "
        "lists all"
    )


def get_objective(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        ValueError: no such name; the message has what it is called here, or the nearest five.
    """
    if name not in OBJECTIVES:
        raise ValueError(unknown_objective(name))
    return OBJECTIVES[name]


__all__ = ["OBJECTIVES", "SECTIONS", "get_objective", "unknown_objective"]
