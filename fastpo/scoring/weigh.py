"""Add to rows a column of numbers for single tokens, from two scorers.

Both scorers run packed, as references do, and their log-probs go to a `ReferenceStore`: a run that
was killed goes on, and other arguments of a rule cost no forward pass. The rules themselves are
pure functions in `fastpo.scoring.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.batch import Batch
from fastpo.data.dataset import build_groups
from fastpo.data.formats import read_row
from fastpo.data.groups import Group
from fastpo.data.options import DataOptions
from fastpo.data.source_rows import source_rows
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.reference.live import (
    AdapterReference,
    LiveReference,
    adapter_parameters,
    fill_store,
)
from fastpo.reference.store import ReferenceStore, store_key
from fastpo.scoring.rules import Rule
from fastpo.scoring.scorer import Packer


class Contrast:
    r"""Run two scorers as one of twice the width: logits $2 z^+ - z^-$, a head on $(2h^+, -h^-)$.

    Raises:
        ValueError: heads of other facts or vocabularies, or a soft-cap, which is not linear.
    """

    def __init__(self, positive: LiveReference, negative: LiveReference) -> None:
        self.positive, self.negative = positive, negative
        self.model, self.head = positive.model, positive.head
        facts = self.head.facts()
        if facts != negative.head.facts() or facts.get("softcap"):
            raise ValueError(
                "the contrast of two scorers needs heads alike and without a soft-cap, not "
                f"{facts} and {negative.head.facts()}: use the rule 'tis'"
            )
        vocabularies = len(positive.head.weight), len(negative.head.weight)
        if vocabularies[0] != vocabularies[1]:
            raise ValueError(f"two scorers with vocabularies of {vocabularies} have no contrast")

    def states(self, model: nn.Module, batch: Batch) -> ReferenceStates:
        """Return (2 h+, -h-) and the head (W+, W-)."""
        better, worse = self.positive.states(model, batch), self.negative.states(model, batch)
        assert better.head is not None and worse.head is not None  # noqa: PT018
        bias, other = better.head.bias, worse.head.bias
        return ReferenceStates(
            torch.cat([2 * better.hidden, -worse.hidden], -1),
            HeadTensors(
                torch.cat([better.head.weight, worse.head.weight], -1),
                None if bias is None or other is None else 2 * bias - other,
            ),
        )


def _filled(
    folder: Path,
    groups: Sequence[Group],
    scorers: Sequence[LiveReference],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    batch_size: int,
    progress: bool,
) -> ReferenceStore:
    """Return the log-probs of all groups under one scorer, or under the contrast of two."""
    pack = Packer(scorers, groups, tokenizer)

    def key_of(scorer: LiveReference) -> dict[str, str]:
        base = isinstance(scorer, AdapterReference)  # runs without what the adapter adds
        return store_key(
            scorer.model,
            tokenizer,
            precision=str(scorer.model.dtype),
            truncation={"max_length": options.max_length},
            chat_template_kwargs=options.chat_template_kwargs,
            share_prompt=pack.share_prompt,
            **({"skip": adapter_parameters(scorer.model)} if base else {}),
        )

    key = key_of(scorers[0])
    if len(scorers) == 2:
        key["contrasted model"] = key_of(scorers[1])["model"]

    def packed(part: list[Group]) -> Batch:
        return pack([group.for_reference for group in part])

    store = ReferenceStore(folder, key)
    source = scorers[0] if len(scorers) == 1 else Contrast(*scorers)
    what = f"log-probs, {folder.name}"
    fill_store(store, groups, source, packed, batch_size=batch_size, what=what, progress=progress)
    return store


def weigh(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rule: Rule,
    positive: Callable[[], LiveReference],
    negative: Callable[[], LiveReference],
    folder: str | Path,
    *,
    prompts: tuple[str, str] = ("prompt", "prompt"),
    options: DataOptions | None = None,
    batch_size: int = 4,
    source: str = "rows",
    progress: bool = True,
) -> Iterator[dict[str, object]]:
    """Return the rows with a list of numbers a response in the rule's column; score all first.

    Args:
        rows: of any format; read more than once, so no generator.
        tokenizer: of the model that will be trained: there is a number for each of its tokens.
        rule: from `get_rule`.
        positive, negative: open a scorer (`ModelReference.frozen(model)`); one is in memory at a
            time, unless the rule contrasts them or both are the same object.
        folder: where log-probs are kept, for a run that goes on or another rule.
        prompts: the column that each scorer reads as its prompt.
        options: how rows are read, and how long they may be; prompts are cut to it.
        batch_size: groups a batch.
        source: name of the data for messages.
        progress: whether to show bars.

    Raises:
        BadRow: the first bad row.
        ValueError: a row that has the column, or two scorers that the rule cannot combine.
    """
    first = next(iter(rows), None)
    if first is not None and first.get(rule.column) is not None:
        raise ValueError(f"{source}: the rows have a column {rule.column!r} already: drop it first")
    if rule.contrasts and len(set(prompts)) > 1:
        raise ValueError(f"prompts={prompts}: this rule contrasts two models after one prompt")
    read = options or DataOptions()
    options_of = {p: replace(read, reference_prompt=p) for p in set(prompts)}
    groups = {
        p: build_groups(rows, tokenizer, o, source=source, progress=progress).groups
        for p, o in options_of.items()
    }
    columns_of = read.reader()

    def filled(name: str, prompt: str, *scorers: LiveReference) -> ReferenceStore:
        at = Path(folder) / name
        data = groups[prompt], scorers, tokenizer, options_of[prompt]
        return _filled(at, *data, batch_size, progress)

    if rule.contrasts:
        stores = [(filled("contrast", prompts[0], positive(), negative()), prompts[0])]
    else:
        stores = [
            (filled("positive", prompts[0], positive()), prompts[0]),
            (filled("negative", prompts[1], negative()), prompts[1]),
        ]

    def columns() -> Iterator[dict[str, object]]:
        for i, row in enumerate(source_rows(rows, source)):
            responses = groups[prompts[0]][i].responses
            ends = np.cumsum([r.loss_mask.sum() for r in responses])[:-1]
            scores = [np.split(store[groups[prompt][i]], ends) for store, prompt in stores]
            order = read_row(row.columns, columns=columns_of).order  # best first, as here
            column: list[list[float]] = [[]] * len(responses)
            for place, response, *scored in zip(
                order or range(len(responses)), responses, *scores, strict=True
            ):
                numbers = np.full(len(response.input_ids), rule.absent)
                per_token = [each.astype(np.float64) for each in scored]
                numbers[response.loss_mask] = rule.fn(*per_token, response.label)
                column[place] = numbers.round(6).tolist()
            yield {**row.columns, rule.column: column}

    return columns()
