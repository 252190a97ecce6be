r"""Objectives that regress a margin to a number instead of maximising it."""

from __future__ import annotations

from .base import Objective

REGRESSION: dict[str, Objective] = {}
