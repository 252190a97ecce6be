"""Objectives on pairs that see the whole batch: sorted, averaged or remembered over steps, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
