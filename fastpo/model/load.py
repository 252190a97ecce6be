"""Load models and tokenizers from the hub or disk through transformers and peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import yaml
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastpo.model.adapters import raise_saved_modules
from fastpo.model.attention.dispatch import NAME
from fastpo.model.device import default_device, native_bf16, seeded_draws
from fastpo.model.limits import embedding_rows
from fastpo.model.lora import lora_faults
from fastpo.model.random_init import model_config, random_model
from fastpo.optional import require
from fastpo.reading import check_json, opening, reading, told

log = logging.getLogger(__name__)


class Adapter(NamedTuple):
    """Hold the base model of an adapter in a folder.

    Args:
        base: name or folder of the base model.
        revision: revision of the base model.
        gguf_file: file inside `base` that holds the weights in GGUF form.
    """

    base: str
    revision: str | None
    gguf_file: str | None


def trained_adapter(name_or_path: str) -> Adapter | None:
    """Read the adapter that a folder holds, or None for a whole model or a name on the hub.

    Raises:
        ValueError: the folder holds the weights of a whole model too.
    """
    folder = Path(name_or_path)
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    if whole := sorted(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{folder} holds a whole model ({whole[0].name}) and an adapter ({path.name}): remove "
            "the files of the one that is not meant"
        )
    with reading(path, "save or download the adapter again"):
        config = dict(json.loads(path.read_bytes()))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(base, str) or not isinstance(revision, str | None):
            raise ValueError(f"base_model_name_or_path = {base!r} names no model")
    # peft's file has no place for it; a checkpoint's recipe lies one folder up.
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    recipe = run / "recipe.yaml"
    gguf_file = None
    if recipe.is_file():
        with reading(recipe):
            gguf_file = dict(yaml.safe_load(recipe.read_bytes()) or {}).get("gguf_file")
    return Adapter(base, revision, gguf_file)


def adapter_rows(name_or_path: str, model: Any) -> int | None:
    """Count the rows of the embedding or head in an adapter's file, or None if it holds neither.

    They say how large the vocabulary was when it was trained; peft would refuse another size.
    """
    path = Path(name_or_path) / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with reading(path, "save or download the adapter again"), safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118 - a file is no mapping
            parts = key.split(".")
            if parts[-1] == "weight" and "lora_" not in key and {*parts} & {*_ends(model)}:
                return file.get_slice(key).get_shape()[0]
    return None


def check_place(name: str) -> None:
    """Refuse a name that can only be a path and leads nowhere with ValueError.

    Libraries take it for a name on the hub and complain about its form.
    """
    path = Path(name)
    if not name.strip() or "\0" in name:
        raise ValueError(f"{name!r} names no model")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not path.exists():
        raise ValueError(f"no folder {name!r}, and a name on the hub looks like owner/name")
    for entry in path.iterdir() if path.is_dir() else ():
        if not entry.is_file() and not entry.is_dir():  # a pipe would be waited for
            raise ValueError(f"{entry} is no file: remove it or put the file in its place")


class _Source(TypedDict, total=False):
    revision: str | None
    trust_remote_code: bool
    gguf_file: str


def _source(revision: str | None, trust_remote_code: bool, gguf_file: str | None) -> _Source:
    """Return the arguments by which transformers finds files of a model or tokenizer."""
    source: _Source = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        require("gguf", f"gguf_file={gguf_file!r}")
        source["gguf_file"] = gguf_file
    return source


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | Mapping[str, object] | QuantizationConfigMixin | None = None,
    attn_implementation: str | None = None,
    lora: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    random_init: bool = False,
    vocabulary: int | None = None,
) -> nn.Module:
    """Load a causal language model, with a fresh LoRA adapter if asked for.

    Args:
        name_or_path: hub name or folder. Weights are read from safetensors, or from `gguf_file`.
        dtype: a torch dtype or its name; "auto" is the checkpoint's, but float32 on a CPU without
            native bfloat16, where emulated matmuls are many times slower.
        gguf_file: file name of a GGUF checkpoint in the repository; dequantised on load.
        quantization: "nf4" (4-bit NormalFloat, double quantisation), keyword arguments of
            BitsAndBytesConfig, or any quantisation config of transformers.
        attn_implementation: the model's own attention; shared prompts switch by themselves.
        lora: keyword arguments of peft.LoraConfig; `target_modules` is "all-linear" by default,
            which leaves the head out.
        device: where to put the model, by default where transformers does.
        random_init: draw the weights instead of reading them, to measure memory and speed;
            `name_or_path` may then be a preset or a config.json too, and `device` is the
            accelerator by default.
        vocabulary: rows that embedding and head are grown to; one with as many or more stays. An
            adapter then trains both whole, unless it names tokens or one of them itself.

    Raises:
        ValueError: an encoder-decoder or other model that is no causal language model, an unknown
            option, or a combination that cannot be.
        PackageError: a package that `gguf_file`, `quantization` or `lora` needs is not installed.
    """
    if gguf_file is not None and random_init:
        raise ValueError(f"random_init reads no weights: drop gguf_file={gguf_file!r}")
    source = _source(revision, trust_remote_code, gguf_file)
    if attn_implementation == NAME:
        raise ValueError(
            f"attn_implementation={NAME!r}: name the model's own attention; shared prompts switch "
            "by themselves"
        )
    with opening(name_or_path):
        config = (
            model_config(name_or_path, **source)
            if random_init
            else AutoConfig.from_pretrained(name_or_path, **source)
        )
    _check_causal(config, name_or_path)
    # transformers would go on without it.
    check_json(Path(name_or_path) / "generation_config.json")
    resolved = _resolve_dtype(dtype, device)
    options: dict[str, object] = {"dtype": resolved}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if random_init:
        log.warning("%s has random weights: for memory and speed alone", name_or_path)
        packed = None if quantization is None else _quantization(quantization, resolved)
        model = random_model(
            config,
            dtype=resolved if isinstance(resolved, torch.dtype) else torch.bfloat16,
            quantization=packed,
            attn_implementation=attn_implementation,
            device=default_device() if device is None else torch.device(device),
        )
        return _extended(model, vocabulary, lora)
    if gguf_file is not None:
        if quantization is not None:
            raise ValueError(f"gguf_file={gguf_file!r} is dequantised on load: no quantization")
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        if quantization is not None:
            options["quantization_config"] = _quantization(quantization, resolved)
    if device is not None:
        options["device_map"] = {"": device}
    try:
        with opening(name_or_path):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path, **source, **options, output_loading_info=True
            )
            model, report = loaded
            if missing := sorted(report["missing_keys"]):  # would be drawn at random
                raise ValueError(
                    f"{len(missing)} of its weights are missing, the first is {missing[0]}"
                )
    except ValueError as error:
        if attn_implementation is not None and "attn_implementation" in str(error):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is none of this model's: take eager, "
                "sdpa or flash_attention_2, or leave it out"
            ) from error
        raise
    return _extended(model, vocabulary, lora)


def _extended(model: Any, vocabulary: int | None, lora: Mapping[str, Any] | None) -> nn.Module:
    """Add rows for a larger vocabulary to the model, then an adapter."""
    if vocabulary is not None and vocabulary > embedding_rows(model):
        resize_embeddings(model, vocabulary)
        lora = None if lora is None else _with_embeddings(model, lora)
    if lora is None:
        return model
    try:
        return add_lora(model, lora)
    except AttributeError as error:
        if "modules_to_save" not in str(error):
            raise
        raise ValueError(  # peft 0.18 looks for the head's matrix under the embedding's name
            f"this peft cannot train the shared matrix of {' and '.join(_ends(model))} for new "
            "tokens: pip install -U 'peft>=0.19', or train without lora"
        ) from error


def resize_embeddings(model: Any, rows: int) -> None:
    """Resize embedding and head to `rows`; new ones are drawn around the mean of the others.

    The draw depends on the weights alone, so an adapter that is opened later meets the same rows.

    Raises:
        ValueError: a model that transformers cannot resize, as with a quantised embedding.
    """
    before, name = embedding_rows(model), model.config.model_type
    if not _tied(model):  # where the configuration said otherwise, one would be dropped
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    try:
        with seeded_draws(model.device):
            model.resize_token_embeddings(rows)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers cannot resize the embedding of {name} ({told(error)}): name the "
            "tokenizer that it was trained with, or save a resized model"
        ) from error
    head = model.get_output_embeddings()
    if embedding_rows(model) != rows or (head is not None and head.weight.shape[0] != rows):
        raise ValueError(
            f"the embedding of {name} was resized from {before} to {rows} rows, its head was not: "
            "name the tokenizer that it was trained with, or save a resized model"
        )
    log.info("%s: the embedding has %d rows instead of %d", name, rows, before)


# The names by which peft finds an embedding whose copies it should tie.
_TIED_BY_PEFT = ("embed_tokens", "lm_head")


def _ends(model: Any) -> tuple[str, str]:
    """Return the names of the embedding and of the head."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


def _tied(model: Any) -> bool:
    """Return whether embedding and head share one matrix."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _with_embeddings(model: Any, lora: Mapping[str, Any]) -> Mapping[str, Any]:
    """Extend an adapter's arguments so that new rows of embedding and head are trained.

    Raises:
        ValueError: embedding and head share a matrix of which peft would train two copies.
    """
    if lora.get("trainable_token_indices"):
        return lora
    ends, tied = _ends(model), _tied(model)
    wanted = [end for end in ends if end in _TIED_BY_PEFT][:1] if tied else ends
    if not wanted:
        raise ValueError(
            f"{' and '.join(ends)} share a matrix, which peft cannot train for new tokens: train "
            "without lora, or set lora: {trainable_token_indices: ...}"
        )
    asked = [*(lora.get("modules_to_save") or ())]
    missing = [end for end in wanted if end not in {*asked, *(lora.get("target_modules") or ())}]
    if not missing:
        return lora
    log.info(
        "beside the adapter %s is trained whole, for the rows of new tokens", " and ".join(missing)
    )
    return {"ensure_weight_tying": tied, **lora, "modules_to_save": [*asked, *missing]}


def load_tokenizer(
    name_or_path: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token.

    One that has none pads with its end-of-sequence token. No loss depends on that: target tokens
    are listed by position and never looked for by value.

    Raises:
        ValueError: neither a padding nor an end-of-sequence token.
    """
    source = _source(revision, trust_remote_code, gguf_file)
    with opening(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **source)
        tokenizer("a")  # a setting of another type fails at the first use
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{name_or_path}: neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
        log.info("%s has no padding token: padding with %r", name_or_path, tokenizer.eos_token)
    return tokenizer


def add_lora(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """Add a fresh LoRA adapter from keyword arguments of peft.LoraConfig to `model`.

    Trained weights, `modules_to_save` too, are float32; all others keep their dtype.

    Raises:
        ValueError: a name that LoraConfig does not have, or a number that makes no adapter.
    """
    require("peft", "a LoRA adapter")
    from peft import LoraConfig, get_peft_model

    for _, fault in lora_faults(lora):
        raise ValueError(fault)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora})
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    raise_saved_modules(adapted)
    return adapted


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout probability of the model to 0, adapters included; return how many.

    Policy and reference must be the same function, and a shared prompt cannot have other noise for
    each response. Dropout modules are set, and the rates that attention modules keep as numbers.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            changed += module.p > 0
            module.p = 0.0
            continue
        for name, value in vars(module).items():
            if isinstance(value, float) and value and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
                changed += 1
    return changed


def _check_causal(config: PretrainedConfig, name_or_path: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name_or_path} is an encoder-decoder ({config.model_type}): preference training here "
            "is for decoder-only language models"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ValueError(
            f"{name_or_path}: transformers knows no causal language model for model type "
            f"{config.model_type!r}"
        )


def _resolve_dtype(
    dtype: str | torch.dtype, device: str | torch.device | None
) -> str | torch.dtype:
    if dtype != "auto":
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(named, torch.dtype):
            raise ValueError(f"unknown dtype {dtype!r}: try 'auto', 'bfloat16' or 'float32'")
        return named
    where = default_device() if device is None else torch.device(device)
    if where.type == "cpu" and not native_bf16(where):
        log.info("float32: this CPU has no native bfloat16")
        return torch.float32
    return "auto"


def _quantization(wanted: Any, dtype: str | torch.dtype) -> Any:
    if wanted == "nf4":
        wanted = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else dtype,
        }
    if isinstance(wanted, str):
        raise ValueError(f"unknown quantization {wanted!r}: 'nf4', a dict, or a config object")
    return BitsAndBytesConfig(**wanted) if isinstance(wanted, dict) else wanted
