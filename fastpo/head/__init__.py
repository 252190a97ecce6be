"""Hidden states to token statistics without ever building the logits; see `functional`."""

from fastpo.head.functional import (
    TokenStats,
    linear_cross_entropy,
    linear_logps,
    linear_stats,
    logps_from_logits,
)
from fastpo.head.head import Head
from fastpo.head.lora import Lora
from fastpo.head.select import choose_backend, most_kept_tokens, plan_head, workspace_in_mib
from fastpo.head.spec import Backend, Workspace, check_workspace

__all__ = [
    "Backend",
    "Head",
    "Lora",
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
    "workspace_in_mib",
]
