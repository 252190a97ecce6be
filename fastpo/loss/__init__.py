"""Hidden states in, preference loss out; see `preference_loss`."""

from fastpo.loss.metrics import LossOutput
from fastpo.loss.mixture import Component, resolve
from fastpo.loss.preference_loss import PreferenceLoss

__all__ = ["Component", "LossOutput", "PreferenceLoss", "resolve"]
