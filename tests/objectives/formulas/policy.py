"""Policy-gradient objectives, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
