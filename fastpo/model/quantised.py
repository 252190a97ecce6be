"""Keep four-bit weights trainable: bitsandbytes may repack them for inference."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking four-bit weights at a forward in evaluation mode.

    On CPUs with AVX512-BF16 it does so for inference, and what it computes then has no backward:
    training goes on with the gradient of the residual stream alone.

    Raises:
        ValueError: a model with trained parameters whose weights are repacked already.
    """
    trained = any(p.requires_grad for p in model.parameters())
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
        state: Any = getattr(module.weight, "quant_state", None)
        if trained and getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: bitsandbytes repacked its weights for inference, in a forward in "
                "evaluation mode, and they have no backward: load the model again, and make no "
                "such forward before this"
            )
