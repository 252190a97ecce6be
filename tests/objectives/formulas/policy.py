"""Policy-gradient objectives on single tokens: ratios to the policy that drew the responses, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
