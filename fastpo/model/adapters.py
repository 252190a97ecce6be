"""Switch adapters off, copy models that have them, and tell what an adapter changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastpo.batch import Batch
from fastpo.head.head import Head
from fastpo.model.hidden import mode, target_hidden

M = TypeVar("M", bound=nn.Module)

# Initialisations of LoRA that leave the base weights alone; of any other that is not certain.
_BASE_STAYS = ("gaussian", "eva", "orthogonal", "mica")


def altered_base(model: Any) -> str | None:
    """Name the setting by which an active adapter changed the weights under it, or None.

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


def raise_saved_modules(model: nn.Module) -> bool:
    """Hold trained copies of whole modules (`modules_to_save`) in float32, as adapters are.

    What goes into such a copy and what comes out is cast, so its neighbours stay as they are.

    Returns:
        whether there was one in half precision.
    """
    half = [(w, d) for w, d in _saved(model) if d in (torch.bfloat16, torch.float16)]
    for wrapper, dtype in half:
        for module in wrapper.modules_to_save.values():
            module.float()
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(partial(_cast_output, dtype))
    return bool(half)


def lower_saved_modules(model: nn.Module) -> None:
    """Give trained copies of whole modules the dtype of the modules that they stand for."""
    for wrapper, dtype in _saved(model):
        wrapper.modules_to_save.to(dtype)


def _saved(model: nn.Module) -> list[tuple[Any, torch.dtype]]:
    from peft.utils import ModulesToSaveWrapper

    saved: list[tuple[Any, torch.dtype]] = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            first = next(module.original_module.parameters(), None)
            if first is not None and first.is_floating_point():
                saved.append((module, first.dtype))
    return saved


def _cast_inputs(module: nn.Module, args: tuple, keywords: dict[str, object]) -> tuple[Any, Any]:
    return _cast((args, keywords), next(module.parameters()).dtype)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def copied(model: M, shared: Iterable[Tensor] = ()) -> M:
    """Copy a model; it shares these tensors with its copy.

    Beside a tied layer peft keeps views of the other's adapter, which torch refuses to copy.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        keywords: Any = getattr(module, "kwargs", None)
        views = keywords.get("tied_adapter") if isinstance(keywords, dict) else None
        memo |= {id(view): view.detach() for view in (views or {}).values()}
    return copy.deepcopy(model, memo)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Run without the adapter; afterwards freeze again what was frozen, which peft forgets."""
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def adapter_effect(model: nn.Module, head: Head, batch: Batch) -> float:
    """Return the largest difference in log-probs by the adapter; 0 if it does nothing yet."""
    with mode(model, training=False):
        on = head.logps(target_hidden(model, batch), batch.tokens.targets)
        with adapter_off(model):
            off = head.logps(target_hidden(model, batch), batch.tokens.targets)
    return (on - off).abs().max().item()
