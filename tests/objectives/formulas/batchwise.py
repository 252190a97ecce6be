"""Objectives that see the whole batch, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
