"""Read from a model's config what happens between its last hidden state and its logits."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fastpo.head.head import Head
from fastpo.head.lora import Lora
from fastpo.model.hidden import causal_lm

# The same attribute means different things in different families, so each is tied to its families
# (prefixes of `model_type`). MiniCPM3 divides the hidden states, which is the same without a bias.
_MULTIPLIED_BY = {
    "logit_scale": ("cohere",),
    "lm_head_multiplier": ("falcon_h1",),
    "logits_scaling": ("hyperclovax",),
}
_DIVIDED_BY = {"logits_scaling": ("granite", "minicpm3")}
_CAPPED_AT = {
    "final_logit_softcapping": ("",),
    "logits_soft_cap": ("recurrent_gemma",),
    "output_logit_soft_cap": ("xlstm",),
}
_KNOWN = (_MULTIPLIED_BY, _DIVIDED_BY, _CAPPED_AT)

# Another setting with such a name may change the logits too. Caps and scales of attention and of
# routers do not.
_SUSPECT = re.compile(r"logits?_.*(scal|cap|mult)|(lm_)?head_mult|output_mult|unpadded_vocab_size")
_ELSEWHERE = re.compile(r"attn|attention|router|moe|init_value")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_head(model: nn.Module) -> Head:
    """Return the Head of a causal language model: its output embedding, soft-cap and logit scale.

    Tied weights and `modules_to_save=["lm_head"]` work: tensors are read at every call.

    Args:
        model: perhaps inside peft, DDP, FSDP or torch.compile wrappers.

    Raises:
        TypeError: no transformers model inside.
        ValueError: an encoder-decoder; DoRA, trainable tokens or quantised weights on the head; a
            family whose logits are made in a way that Head does not model. Each is named with its
            remedy.
    """
    inner = causal_lm(model)
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder: heads of decoders only")
    config = inner.config.get_text_config(decoder=True)
    module = inner.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(inner).__name__} has no output embedding, so no language head")
    head = _AdaptedHead if _check_module(module) else Head
    scale = 1.0
    for name in _named(config, _MULTIPLIED_BY):
        scale *= float(getattr(config, name))
    for name in _named(config, _DIVIDED_BY):
        scale /= float(getattr(config, name))
    caps = [float(getattr(config, name)) for name in _named(config, _CAPPED_AT)]
    _check_unmodelled(config)
    return head(module, softcap=caps[0] if caps else None, logit_scale=scale)


class _AdaptedHead(Head):
    """Read a head inside peft's LoRA layer, whose `weight` and `bias` are the base layer's."""

    @property
    def lora(self) -> Lora | None:
        layer: Any = self.module
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged or not names:
            return None
        a = torch.cat([layer.lora_A[name].weight * layer.scaling[name] for name in names])
        return Lora(a, torch.cat([layer.lora_B[name].weight for name in names], dim=1))


def _named(config: PretrainedConfig, table: dict[str, tuple[str, ...]]) -> list[str]:
    """List the attributes of `table` that this family has and that its config sets."""
    return [
        name
        for name, families in table.items()
        if config.model_type.startswith(families) and getattr(config, name, None) is not None
    ]


def _check_unmodelled(config: PretrainedConfig) -> None:
    known = {name for table in _KNOWN for name in _named(config, table)}
    for name, value in vars(config).items():
        if name in known or not _SUSPECT.search(name) or _ELSEWHERE.search(name):
            continue
        if isinstance(value, (int, float, str)) and value not in (0, 1):
            raise ValueError(
                f"{config.model_type}: config.{name}={value!r} may change the logits in a way that "
                "fastpo does not know; build fastpo.Head yourself if it does not"
            )


def _check_module(module: nn.Module) -> bool:
    """Return whether the head is a LoRA layer; refuse with ValueError what Head does not model."""
    wrappers = {kind.__name__ for kind in type(module).__mro__}
    if "TrainableTokensWrapper" in wrappers or "TrainableTokensLayer" in wrappers:
        raise ValueError(
            "trainable tokens on the head (often through tied embeddings): drop "
            "trainable_token_indices, or train the whole head with modules_to_save=['lm_head']"
        )
    if "BaseTunerLayer" in wrappers and not _is_plain_lora(module):
        raise ValueError(
            f"an adapter on the head ({type(module).__name__}) that is more than LoRA (a variant, "
            "a bias or dropout): make it plain LoRA, take it out of target_modules, or "
            "train the whole head with modules_to_save=['lm_head']"
        )
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() == 0:
        raise ValueError(f"the head is a {type(module).__name__} without a weight matrix")
    kind = type(weight)
    if weight.dtype not in _FLOATS or kind.__module__.startswith(("bitsandbytes", "torchao")):
        raise ValueError(
            f"quantised head ({kind.__name__} of {weight.dtype}): leave it out of the "
            "quantisation, for instance with llm_int8_skip_modules=['lm_head']"
        )
    return "BaseTunerLayer" in wrappers


def _is_plain_lora(layer: Any) -> bool:
    """Return whether the layer is h W^T + scaling (h A^T) B^T and nothing else."""
    dropouts = getattr(layer, "lora_dropout", {}).values()
    return (
        isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
        and bool(layer.lora_A)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not any(getattr(dropout, "p", 0.0) for dropout in dropouts)
    )
