"""Adapters off and copies of them: what changes, and when a model without them is its base."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastpo.head import Head
from fastpo.model.hidden import label_hidden, mode

M = TypeVar("M", bound=nn.Module)

# Initialisations of LoRA that leave the base weights alone; of any other that is not certain.
_BASE_STAYS = ("gaussian", "eva", "orthogonal", "mica")


def altered_base(model: Any) -> str | None:
    """What in the active adapters' configuration changed the weights they stand on, or None.

    With such an adapter off, the model is neither its base nor the model at the start.
    """
    for name in model.active_adapters:
        config = model.peft_config[name]
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in _BASE_STAYS:
            return f"init_lora_weights={init!r}"
        if getattr(config, "kasa_config", None) is not None:
            return "kasa_config"
    return None


def copied(model: M, shared: Iterable[Tensor] = ()) -> M:
    """Copy a model; it shares these tensors with its copy.

    Beside a tied layer peft keeps views of the other's adapter, which torch refuses to copy.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        beside: Any = getattr(module, "kwargs", None)
        views = beside.get("tied_adapter") if isinstance(beside, dict) else None
        memo |= {id(view): view.detach() for view in (views or {}).values()}
    return copy.deepcopy(model, memo)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Without the adapter; afterwards what was frozen is frozen, which peft forgets."""
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def adapter_effect(model: nn.Module, head: Head, batch: Mapping[str, Any]) -> float:
    """Largest difference in log-probs that the adapter makes; 0 for one that does nothing yet."""
    with mode(model, training=False):
        own = head.logps(label_hidden(model, batch), batch["targets"])
        with adapter_off(model):
            off = head.logps(label_hidden(model, batch), batch["targets"])
    return (own - off).abs().max().item()
