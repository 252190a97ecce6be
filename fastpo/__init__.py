"""fastpo: preference training of language models that does not run out of memory or time.

Names are loaded on first use, so that `import fastpo` needs neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastpo import moved

if TYPE_CHECKING:  # the same names as below, for type checkers
    from fastpo.head.functional import linear_cross_entropy as linear_cross_entropy
    from fastpo.head.functional import linear_logps as linear_logps
    from fastpo.head.functional import linear_stats as linear_stats
    from fastpo.head.functional import logps_from_logits as logps_from_logits
    from fastpo.head.head import Head as Head
    from fastpo.loss.metrics import LossOutput as LossOutput
    from fastpo.loss.preference_loss import PreferenceLoss as PreferenceLoss
    from fastpo.model.head_facts import read_head as read_head
    from fastpo.objectives import OBJECTIVES as OBJECTIVES
    from fastpo.objectives import register as register
    from fastpo.objectives.base import Objective as Objective
    from fastpo.objectives.base import Outcome as Outcome
    from fastpo.objectives.base import Statistic as Statistic
    from fastpo.objectives.base import Term as Term
    from fastpo.objectives.functional import dpo_loss as dpo_loss
    from fastpo.objectives.functional import ipo_loss as ipo_loss
    from fastpo.objectives.functional import kto_loss as kto_loss
    from fastpo.objectives.functional import lipo_loss as lipo_loss
    from fastpo.objectives.functional import orpo_loss as orpo_loss
    from fastpo.objectives.functional import simpo_loss as simpo_loss
    from fastpo.segments import Segments as Segments
    from fastpo.train.config import PreferenceConfig as PreferenceConfig
    from fastpo.train.trainer import PreferenceTrainer as PreferenceTrainer

__version__ = "0.1.0"

_NAMES = {
    "head.functional": "linear_cross_entropy linear_logps linear_stats logps_from_logits",
    "head.head": "Head",
    "loss.metrics": "LossOutput",
    "loss.preference_loss": "PreferenceLoss",
    "model.head_facts": "read_head",
    "objectives": "OBJECTIVES register",
    "objectives.base": "Objective Outcome Statistic Term",
    "objectives.functional": "dpo_loss ipo_loss kto_loss lipo_loss orpo_loss simpo_loss",
    "segments": "Segments",
    "train.config": "PreferenceConfig",
    "train.trainer": "PreferenceTrainer",
}
_HOME = {name: f"fastpo.{home}" for home, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
