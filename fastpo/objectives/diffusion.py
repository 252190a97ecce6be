r"""Objectives on the denoising errors of image pairs."""

from __future__ import annotations

from .base import Objective

DIFFUSION: dict[str, Objective] = {}
