"""What the model writes to the first prompts, before training and after: a run's samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.data.groups import Group
from fastpo.model.hidden import generation
from fastpo.redact import redact
from fastpo.train.preflight import first_groups

if TYPE_CHECKING:
    from fastpo.train.trainer import PreferenceTrainer

SAMPLES_FILE = "samples.jsonl"


class Written(TypedDict):
    """Hold what the model wrote to a prompt, beside the response that the data prefers."""

    row: int
    source: str
    prompt: str
    response: str
    chosen: str


@torch.no_grad()
def greedy_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    device: torch.device,
) -> list[Written]:
    """Return row, source, prompt, greedy response and chosen response of each group, as text."""
    policy, decoder = cast(Any, model), cast(Any, tokenizer)
    records: list[Written] = []
    with generation(model):
        for group in groups:
            prompt = torch.from_numpy(group.prompt_ids).long()[None].to(device)
            tokens = policy.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad_token_id,
            )
            response, chosen = tokens[0, prompt.shape[1] :], group.responses[0].input_ids
            records.append(
                {
                    "row": group.row,
                    "source": redact(group.source),
                    "prompt": decoder.decode(group.prompt_ids),
                    "response": decoder.decode(response, skip_special_tokens=True),
                    "chosen": decoder.decode(chosen, skip_special_tokens=True),
                }
            )
    return records


def write_samples(folder: Path, records: Iterable[Written], *, when: str, step: int) -> None:
    """Write records to the run's file: those of "before" begin it, later ones are appended."""
    mode = "w" if when == "before" else "a"
    with (folder / SAMPLES_FILE).open(mode, encoding="utf-8") as file:
        for record in records:
            line = {"when": when, "step": step, **record}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def sample(trainer: PreferenceTrainer, folder: Path, when: str) -> None:
    """Write greedy responses to the first prompts of a run, if it is to have any.

    Args:
        trainer: the run.
        folder: the run's.
        when: `before` training, or `after`.
    """
    args = trainer.args
    if not args.num_samples:
        return
    data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    records = greedy_responses(
        trainer.model,  # pyright: ignore[reportArgumentType]
        trainer.processing_class,  # pyright: ignore[reportArgumentType]
        first_groups(data, args.num_samples),
        max_new_tokens=args.sample_tokens,
        pad_token_id=trainer.collator.pad_token_id,
        device=args.device,
    )
    if trainer.is_world_process_zero():
        write_samples(folder, records, when=when, step=trainer.state.global_step)
