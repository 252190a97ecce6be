"""Replace a model's RMSNorm, RoPE and gated activations by liger-kernel's, on a GPU."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal

import torch
from torch import nn

from fastpo.model.hidden import causal_lm

logger = logging.getLogger(__name__)

LayerKernels = Literal["none", "auto", "liger"]


def use_layer_kernels(model: nn.Module, wanted: LayerKernels, device: torch.device) -> bool:
    """Patch `model` by liger-kernel's own function, all but its losses; returns whether it did.

    Some of liger's patches (RoPE) change the architecture's module, and so every model of that type
    in the process. Patch the policy and its reference alike, or they differ by rounding.

    Args:
        model: a transformers model, or a wrapper around one.
        wanted: "liger" must work; "auto" where it can; "none" leaves the model alone.
        device: where the model will run.

    Raises:
        ValueError: "liger" where the device, the package or the model's type does not allow it.
    """
    if wanted == "none":
        return False
    kind = causal_lm(model).config.model_type
    reason = None
    if device.type not in ("cuda", "xpu"):
        reason = f"they are Triton kernels, and this run is on {device.type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed: pip install liger-kernel"
    else:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            reason = f"liger-kernel has none for model type {kind!r}"
    if reason is not None:
        if wanted == "liger":
            raise ValueError(f"layer_kernels='liger': {reason}; use 'auto' or 'none'")
        logger.info("no layer kernels: %s", reason)
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Its losses replace the model's forward, and the head is ours.
    _apply_liger_kernel_to_instance(
        causal_lm(model), cross_entropy=False, fused_linear_cross_entropy=False
    )
    logger.info("layer kernels: liger-kernel's for %s", kind)
    return True
