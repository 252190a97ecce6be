"""Hidden states to token statistics without ever building the logits; see `functional`."""

from fastpo.head.functional import (
    linear_cross_entropy,
    linear_logps,
    linear_stats,
    logps_from_logits,
)
from fastpo.head.head import Head
from fastpo.head.lora import Lora
from fastpo.head.select import choose_backend, most_kept_tokens, plan_head, workspace_in_mib
from fastpo.head.spec import BackendName, HeadOptions, HeadSpec, Workspace, check_workspace
from fastpo.head.statistics import TokenStats, token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates

Backend = BackendName

__all__ = [
    "Backend",
    "BackendName",
    "Head",
    "HeadOptions",
    "HeadSpec",
    "HeadTensors",
    "Lora",
    "ReferenceStates",
    "TokenStats",
    "Workspace",
    "check_workspace",
    "choose_backend",
    "linear_cross_entropy",
    "linear_logps",
    "linear_stats",
    "logps_from_logits",
    "most_kept_tokens",
    "plan_head",
    "token_statistics",
    "workspace_in_mib",
]
