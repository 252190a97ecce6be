"""Open what a recipe names: its model and tokenizer, its references, its rows."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from fastpo.data.dataset import GroupDataset, build_groups
from fastpo.data.hold_out import hold_out
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from fastpo.model.limits import vocabulary_size
from fastpo.model.merge import blend
from fastpo.model.opening import open_model, open_tokenizer
from fastpo.recipe.recipe import Recipe
from fastpo.train.config import PreferenceConfig


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a recipe's model, or the one that it names instead."""
    model = recipe.model
    return open_tokenizer(
        model.model,
        model.tokenizer,
        model.chat_template,
        random_init=model.random_init,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        gguf_file=model.gguf_file,
    )


def _vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the rows that embeddings are grown to, if they are."""
    return vocabulary_size(tokenizer) if recipe.model.resize_embeddings else None


def recipe_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """Open the model that a recipe trains; `seed` draws a fresh adapter."""
    model = recipe.model
    set_seed(seed)  # an adapter is drawn here, before the Trainer sets its seed
    return open_model(
        model.model,
        dtype=model.dtype,
        quantization=model.quantization,
        random_init=model.random_init,
        attn_implementation=model.attn_implementation,
        lora={} if model.lora is True else (model.lora or None),
        trainable=True,
        vocabulary=_vocabulary(recipe, tokenizer),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        gguf_file=model.gguf_file,
    )


def recipe_references(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module | None, nn.Module | None]:
    """Open both references that a recipe may name; a mapping of shares is blended."""
    model = recipe.model
    open_reference = partial(
        open_model,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        vocabulary=_vocabulary(recipe, tokenizer),
    )

    def opened(named: str | dict[str, float] | None) -> nn.Module | None:
        if named is None:
            return None
        return open_reference(named) if isinstance(named, str) else blend(named, open_reference)

    return opened(model.ref_model), opened(model.ref_model2)


def recipe_groups(
    recipe: Recipe, config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[GroupDataset | GroupStream, GroupDataset | GroupStream | None]:
    """Return the groups to train on and to evaluate on."""
    data = recipe.data
    options = config.data_options()
    loss = config.build_loss()

    def groups(source: str, split: str, limit: int | None) -> GroupDataset | GroupStream:
        rows = load_rows(
            source, split=split, name=data.dataset_name, streaming=data.streaming, origin=True
        )
        if limit is not None:
            rows = rows.take(limit)
        make = (
            GroupStream
            if data.streaming
            else partial(build_groups, progress=config.process_index == 0)
        )
        return make(rows, tokenizer, options, extras=loss.extras, needs=loss.needs, source=source)

    train = groups(data.dataset, data.split, data.max_rows)
    if data.eval_fraction:
        assert isinstance(train, GroupDataset)
        return hold_out(train, data.eval_fraction, config.seed)
    if data.evaluates:
        return train, groups(data.eval_dataset or data.dataset, data.eval_split or "train", None)
    return train, None
