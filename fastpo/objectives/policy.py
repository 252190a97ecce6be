r"""Policy-gradient objectives on single tokens: ratios to the policy that drew the responses."""

from __future__ import annotations

from .base import Objective

POLICY: dict[str, Objective] = {}
