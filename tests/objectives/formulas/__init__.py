"""Every objective once more, by hand: one group, Python numbers, 60 digits, no torch.

A formula gets the live candidates of one group as lists under the papers' letters (`LETTERS`) and
the hyper-parameters; it returns what the group adds to each sum, and the rewards. It is the
equation as printed, with none of the care that floats need.
"""

from __future__ import annotations

from . import (
    batchwise,
    contexts,
    diffusion,
    lipo,
    listwise,
    pairwise,
    pointwise,
    policy_gradient,
    reference_free,
    regression,
    regularisers,
    token,
)
from .common import LETTERS, hyper_numbers

FAMILIES = (
    pairwise,
    reference_free,
    regression,
    batchwise,
    contexts,
    pointwise,
    lipo,
    listwise,
    token,
    policy_gradient,
    diffusion,
    regularisers,
)
FORMULAS = {name: formula for family in FAMILIES for name, formula in family.FORMULAS.items()}

__all__ = ["FORMULAS", "LETTERS", "hyper_numbers"]
