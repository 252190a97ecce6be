"""Make models with random weights of the true shape, to measure memory and speed offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.quantizers import AutoHfQuantizer

from fastpo.optional import require
from fastpo.reading import opening, reading

_LLAMA3: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
_SMOLLM2: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def _llama(
    base: Mapping[str, Any], width: int, inner: int, layers: int, heads: int, **more: int
) -> Mapping[str, Any]:
    return {
        **base,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


# The published config.json of each, as far as it decides shapes; context lengths are Llama-3.1's.
PRESETS: dict[str, Mapping[str, Any]] = {
    "llama-3-8b": _llama(_LLAMA3, 4096, 14336, 32, 32),
    "llama-3-70b": _llama(_LLAMA3, 8192, 28672, 80, 64),
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": _llama(_SMOLLM2, 576, 1536, 30, 9, num_key_value_heads=3),
    "smollm2-360m": _llama(_SMOLLM2, 960, 2560, 32, 15, num_key_value_heads=5),
    "smollm2-1.7b": _llama(_SMOLLM2, 2048, 8192, 24, 32, num_key_value_heads=32),
}


def model_config(name: str, **source: Any) -> PretrainedConfig:
    """Read the configuration of a preset, a config.json, a folder or a name on the hub.

    Raises:
        ValueError: a file that is no model's configuration.
    """
    if name.lower() in PRESETS:
        return AutoConfig.for_model(**PRESETS[name.lower()])
    if Path(name).is_file():
        with reading(name, "name a config.json of a model"):
            values = dict(json.loads(Path(name).read_bytes()))
            if "model_type" not in values:
                raise ValueError("it has no model_type")
            return AutoConfig.for_model(**values)
    with opening(name):
        return AutoConfig.from_pretrained(name, **source)


def byte_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a byte with begin, end and padding tokens, for random weights.

    Raises:
        ValueError: a vocabulary with fewer than 259 tokens.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]
    if config.vocab_size < len(words):
        raise ValueError(
            f"a byte tokenizer has {len(words)} tokens, the model {config.vocab_size}: name a "
            "tokenizer"
        )
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    raw.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def random_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    attn_implementation: str | None = None,
    device: torch.device,
) -> nn.Module:
    """Make a causal language model with random weights, never larger on the way than at the end.

    Quantised weights are drawn, rounded and packed one matrix at a time: a 70B model in NF4 takes
    37 GiB, not the 131 GiB of its weights in bfloat16.

    Raises:
        ValueError: a quantisation other than bitsandbytes' four bits.
        PackageError: bitsandbytes is not installed.
    """
    build = partial(
        AutoModelForCausalLM.from_config,
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    if quantization is None:
        with device:
            return build()
    if not quantization.load_in_4bit:
        raise ValueError("random weights are quantised to four bits only: quantization: nf4")
    require("bitsandbytes", "quantization='nf4'")
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        model: Any = build()
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device})
    for module in tqdm(list(model.modules()), desc="random weights", unit="module", leave=False):
        packed = module.weight if isinstance(module, Linear4bit) else None
        if packed is not None:
            drawn = torch.empty(packed.shape, dtype=dtype, device=device)
            drawn.normal_(std=getattr(config, "initializer_range", 0.02))
            whole: Any = Params4bit(drawn, requires_grad=False, **packed.__dict__)
            module.weight = whole.to(device)
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros_like(module.bias, device=device))
        else:
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                model._init_weights(module)
    model.tie_weights()
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model
