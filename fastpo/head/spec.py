"""What a call of the head may ask for: who computes, in how much memory."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

Backend = Literal["auto", "torch", "triton"]


Workspace = float | Literal["auto"]


def check_workspace(workspace_mib: Workspace) -> None:
    """Raise ValueError for what is neither a positive finite number of MiB nor `auto`."""
    number: Any = None
    # NumPy's are numbers too; torch.compile knows a float it traces by its class alone.
    if isinstance(workspace_mib, int | float | numbers.Real):
        number = None if isinstance(workspace_mib, bool) else workspace_mib
    if not (workspace_mib == "auto" if number is None else 0 < number < math.inf):
        raise ValueError(
            f"workspace_mib must be positive and finite, or 'auto': got {workspace_mib!r}"
        )
