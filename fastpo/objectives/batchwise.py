r"""Objectives on pairs that see the whole batch: sorted, averaged or remembered over steps."""

from __future__ import annotations

from .base import Objective

BATCHWISE: dict[str, Objective] = {}
