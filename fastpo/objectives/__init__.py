"""The catalogue of objectives: one table of names, one small pure function behind each."""

from __future__ import annotations

from difflib import get_close_matches

from .base import Objective
from .batchwise import BATCHWISE
from .contexts import CONTEXTS
from .diffusion import DIFFUSION
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


def get_objective(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        ValueError: no such name; the message has the nearest one and the whole list.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    near = get_close_matches(name, OBJECTIVES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown objective {name!r}: {hint}choose from {', '.join(OBJECTIVES)}")


__all__ = ["OBJECTIVES", "SECTIONS", "get_objective"]
