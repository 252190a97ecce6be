"""fastpo: preference training of language models that does not run out of memory or time.

Names are loaded on first use, so that `import fastpo` needs neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastpo import moved

if TYPE_CHECKING:
    from fastpo.head.functional import (
        linear_cross_entropy,
        linear_logps,
        linear_stats,
        logps_from_logits,
    )
    from fastpo.head.head import Head
    from fastpo.loss.metrics import LossOutput
    from fastpo.loss.preference_loss import PreferenceLoss
    from fastpo.model.head_facts import read_head
    from fastpo.objectives import OBJECTIVES
    from fastpo.objectives.functional import (
        dpo_loss,
        ipo_loss,
        kto_loss,
        lipo_loss,
        orpo_loss,
        simpo_loss,
    )
    from fastpo.segments import Segments
    from fastpo.train.config import PreferenceConfig
    from fastpo.train.trainer import PreferenceTrainer

__version__ = "0.1.0"

_HOME = {
    "Head": "fastpo.head.head",
    "linear_cross_entropy": "fastpo.head.functional",
    "linear_logps": "fastpo.head.functional",
    "linear_stats": "fastpo.head.functional",
    "logps_from_logits": "fastpo.head.functional",
    "LossOutput": "fastpo.loss.metrics",
    "PreferenceLoss": "fastpo.loss.preference_loss",
    "read_head": "fastpo.model.head_facts",
    "OBJECTIVES": "fastpo.objectives",
    "dpo_loss": "fastpo.objectives.functional",
    "ipo_loss": "fastpo.objectives.functional",
    "kto_loss": "fastpo.objectives.functional",
    "lipo_loss": "fastpo.objectives.functional",
    "orpo_loss": "fastpo.objectives.functional",
    "simpo_loss": "fastpo.objectives.functional",
    "Segments": "fastpo.segments",
    "PreferenceConfig": "fastpo.train.config",
    "PreferenceTrainer": "fastpo.train.trainer",
}

__all__ = [
    "OBJECTIVES",
    "Head",
    "LossOutput",
    "PreferenceConfig",
    "PreferenceLoss",
    "PreferenceTrainer",
    "Segments",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "linear_cross_entropy",
    "linear_logps",
    "linear_stats",
    "lipo_loss",
    "logps_from_logits",
    "orpo_loss",
    "read_head",
    "simpo_loss",
]


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
