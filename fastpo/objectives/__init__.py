"""The catalogue of objectives: one table of names, one small pure function behind each."""

from __future__ import annotations

from difflib import get_close_matches

from .base import Objective
from .batchwise import BATCHWISE
from .diffusion import DIFFUSION
from .listwise import LISTWISE
from .pairwise import PAIRWISE
from .pointwise import POINTWISE
from .policy import POLICY
from .reference_free import REFERENCE_FREE
from .regression import REGRESSION
from .regularisers import REGULARISERS
from .token import TOKEN

OBJECTIVES: dict[str, Objective] = {
    **PAIRWISE,
    **REFERENCE_FREE,
    **REGRESSION,
    **BATCHWISE,
    **POINTWISE,
    **LISTWISE,
    **TOKEN,
    **POLICY,
    **DIFFUSION,
    **REGULARISERS,
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


__all__ = ["OBJECTIVES", "get_objective"]
