"""Objectives on the denoising errors of image pairs, by hand."""

from __future__ import annotations

FORMULAS: dict = {}
