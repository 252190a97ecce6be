"""Makers of tiny things, importable from child processes too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo.data.columns import CONTEXT_ROLES
from fastpo.data.groups import Group, Response
from fastpo.data.positions import synthetic_positions
from fastpo.train.config import PreferenceConfig

VOCAB = 128


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from uniform, so that losses and gradients are not tiny
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def _response(rng: np.random.Generator, length: int, **facts: Any) -> Response:
    ids = rng.integers(4, VOCAB, length).astype(np.int32)
    ids[-1] = 2
    rewards = (ids % 5 - 2).astype(np.float32)  # no draw, so that older data stays as it is
    return Response(ids, np.ones(length, bool), token_rewards=rewards, **facts)


def groups(
    count: int,
    candidates: int = 2,
    *,
    extras: tuple[str, ...] = (),
    seed: int = 0,
    short_prompt: bool = False,
) -> list[Group]:
    """Ragged groups: prompts of 3-9 tokens, responses of 2-12, graded and ranked."""
    rng = np.random.default_rng(seed)

    def prompt_ids() -> np.ndarray:
        return rng.integers(4, VOCAB, int(rng.integers(3, 10))).astype(np.int32)

    made = []
    for row in range(count):
        responses = [
            _response(
                rng,
                int(rng.integers(2, 13)),
                label=slot == 0,
                rank=slot,
                score=float(candidates - slot),
            )
            for slot in range(candidates)
        ]
        prompt = prompt_ids()
        roles = {
            role: _response(rng, int(rng.integers(2, 13)), label=False)
            for role in extras
            if role not in CONTEXT_ROLES
        }
        others: dict[str, np.ndarray] = {}
        for role in extras:
            if role in CONTEXT_ROLES:
                column, slot = CONTEXT_ROLES[role]
                other = others.setdefault(column, prompt_ids())
                roles[role] = replace(responses[slot], prompt_ids=other)
        made.append(
            Group(
                prompt,
                responses,
                row=row,
                margin=0.5 - row % 3,
                population=row % 2,
                extras=roles,
                source="tiny.jsonl",
                short_prompt_ids=prompt_ids() if short_prompt else None,
            )
        )
    return made


def logo_groups(count: int, length: int = 250) -> list[Group]:
    """Triples of `groups` whose prompts are a head, two chunks and a tail, at drawn positions."""
    made = []
    for group in groups(count, 3):
        size = len(group.prompt_ids)
        middle = 1 + (size - 1) // 2
        chunks = np.array([[1, middle], [middle, size - 1]]) if size > 3 else np.array([[1, 2]])
        positions = synthetic_positions(
            chunks, size, length - group.longest, np.random.default_rng(group.row)
        )
        made.append(replace(group, prompt_positions=positions))
    return made


def pairs(count: int, **options: Any) -> list[Group]:
    return groups(count, 2, **options)


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The same kind of data as text."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, VOCAB, int(rng.integers(low, high))))

    return [
        {"prompt": text(3, 9), "chosen": text(2, 12), "rejected": text(2, 12)} for _ in range(count)
    ]


def config(output_dir: str | Path, **options: Any) -> PreferenceConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "self_check": False,
        "seed": 3,
    }
    return PreferenceConfig(output_dir=str(output_dir), **{**defaults, **options})
