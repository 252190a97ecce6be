"""Open a model and its tokenizer by name: a folder, an adapter, random weights or the hub's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.model.adapters import altered_base, raise_saved_modules
from fastpo.model.limits import embedding_rows
from fastpo.model.load import (
    adapter_rows,
    check_place,
    load_model,
    load_tokenizer,
    resize_embeddings,
    trained_adapter,
)
from fastpo.model.random_init import byte_tokenizer, model_config
from fastpo.reading import opening, read_text


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Replace the chat template by a file's or by the text itself.

    Raises:
        ValueError: it looks like a file's name and there is no such file.
    """
    if template is None:
        return
    if "{" not in template:  # a template without a brace would say nothing
        if not Path(template).is_file():
            raise ValueError(
                f"chat_template = {template!r} is neither a file nor a template: leave it out for "
                "the checkpoint's own"
            )
        template = read_text(template)
    tokenizer.chat_template = template


def open_tokenizer(
    name: str, tokenizer: str | None, template: str | None, **source: Any
) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model, or the one that is named instead.

    Random weights know no tokens: without a tokenizer's name, one token is one byte.
    """
    check_place(tokenizer or name)
    random_init = source.pop("random_init", False)
    if tokenizer is not None:
        source = {"trust_remote_code": source.get("trust_remote_code", False)}
    elif trained_adapter(name) is not None:  # has its own; these say where the base model lies
        source = {**source, "revision": None, "gguf_file": None}
    if random_init and tokenizer is None:
        opened = byte_tokenizer(model_config(name, **source))
    else:
        opened = load_tokenizer(tokenizer or name, **source)
    set_chat_template(opened, template)
    return opened


def open_model(
    name: str,
    *,
    lora: dict[str, Any] | None = None,
    gguf_file: str | None = None,
    trainable: bool = False,
    vocabulary: int | None = None,
    **options: Any,
) -> nn.Module:
    """Open a model, or the adapter that a LoRA run left in a folder on top of its base model.

    Args:
        name: on the hub, or a folder.
        lora: arguments of a fresh adapter.
        gguf_file: file with the weights of the model, or of the adapter's base model.
        trainable: whether an adapter in the folder is to be trained on.
        vocabulary: rows that the embedding of a model is grown to, as `load_model` does.
        options: of `load_model`.

    Raises:
        ValueError: an adapter whose embedding has fewer rows than `vocabulary`.
    """
    check_place(name)
    adapter = trained_adapter(name)
    if adapter is None:
        return load_model(name, lora=lora, gguf_file=gguf_file, vocabulary=vocabulary, **options)
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    base = {"gguf_file": gguf_file or adapter.gguf_file, "revision": adapter.revision}
    model: Any = load_model(adapter.base, **{**options, **base})
    rows = adapter_rows(name, model) or embedding_rows(model)
    if vocabulary is not None and rows < vocabulary:
        raise ValueError(
            f"{name} is an adapter of an embedding with {rows} rows, which cannot be resized to "
            f"{vocabulary} under it: merge it first with `fastpo merge`"
        )
    if rows != embedding_rows(model):
        resize_embeddings(model, rows)
    with opening(name), warnings.catch_warnings():
        # peft would draw a missing weight at random, and warn.
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, name, is_trainable=trainable)
    if trainable and raise_saved_modules(adapted):  # and what the dtype of the base rounded
        set_peft_model_state_dict(adapted, load_peft_weights(name, device="cpu"))
    return adapted


def check_adapter(model: nn.Module, flag: str, name: str) -> None:
    """Raise ValueError unless the model `name` has an adapter that `base` can switch off."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"{flag} base: {name} has no adapter to switch off; name a model")
    if (altered := altered_base(model)) is not None:
        base = model.peft_config[model.active_adapters[0]].base_model_name_or_path
        raise ValueError(
            f"{flag} base: {altered} changed the weights under the adapter of {name}, which is not "
            f"its base model when switched off; name that: {flag} {base}"
        )
