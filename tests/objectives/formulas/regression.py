"""Objectives that regress a margin to a number instead of maximising it, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
