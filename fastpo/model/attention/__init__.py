"""Compute attention over packed rows with one prompt copy per group; see `dispatch`."""

from fastpo.model.attention.dispatch import (
    BACKENDS,
    NAME,
    choose_attention,
    shared_prompt_attention,
)
from fastpo.model.attention.shared_row import SharingError

__all__ = ["BACKENDS", "NAME", "SharingError", "choose_attention", "shared_prompt_attention"]
