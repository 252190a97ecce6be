"""Random models of a few thousand parameters, one of each family, and groups to feed them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastpo.data.groups import Group, Response
from fastpo.model.load import disable_dropout

VOCAB, WIDTH, LAYERS, PAD = 128, 32, 2, 0

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {**_BASE, "head_dim": 8, "sliding_window": 5}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention"]

# family -> (model_type, configuration); windows are shorter than the prompts of `groups`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _BASE),
    "mistral-window": ("mistral", {**_BASE, "sliding_window": 5}),
    "qwen2": ("qwen2", {**_BASE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_BASE, "head_dim": 8}),
    "gemma2": ("gemma2", {**_GEMMA, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_GEMMA, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", _BASE),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 4096},
    ),
    "cohere": ("cohere", {**_BASE, "logit_scale": 0.25}),
    "granite": ("granite", {**_BASE, "logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "mixtral": ("mixtral", {**_BASE, "num_local_experts": 4, "sliding_window": None}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_BASE,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}

# Families that cannot share a prompt, with a word of the reason.
UNSHARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4},
        "recurrent",
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4},
        "AttentionInterface",
    ),
    "falcon": (
        "falcon",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        },
        "AttentionInterface",
    ),
    "stablelm": ("stablelm", _BASE, "AttentionInterface"),
}


def tiny(model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in float32, spread wide enough that every rule of it shows in its output.

    Without dropout; experts in plain PyTorch, since the grouped product knows no float64.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type, dtype="float32", experts_implementation="eager", **options
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sink" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    disable_dropout(model)
    return model.train()


def family(name: str, **options: Any) -> PreTrainedModel:
    """A tiny model of FAMILIES."""
    model_type, config = FAMILIES[name]
    return tiny(model_type, **{**config, **options})


def group(prompt: int, responses: list[int], row: int = 0) -> Group:
    """A group with `prompt` random tokens and random responses of the given lengths."""
    rng = np.random.default_rng(100 + row)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, VOCAB, length).astype(np.int32)

    return Group(
        prompt_ids=ids(prompt),
        responses=[
            Response(ids(n), np.ones(n, dtype=bool), label=i == 0, rank=i)
            for i, n in enumerate(responses)
        ],
        row=row,
    )


def groups() -> list[Group]:
    """K = 1, 2 and 3, a prompt of one token, prompts and responses longer than a window of 5."""
    return [group(9, [4, 7], 0), group(1, [3], 1), group(7, [6, 1, 3], 2)]
