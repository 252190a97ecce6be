"""From data to batches: which groups, in which order, packed how."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from fastpo.batch import Batch
from fastpo.data.dataset import GroupDataset, build_groups
from fastpo.data.groups import Group
from fastpo.data.packing import collate, row_order
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from fastpo.data.token_budget import token_rows
from fastpo.model.limits import Positions, Vocabulary
from fastpo.reference.store import ReferenceStore
from fastpo.train.config import PreferenceConfig
from fastpo.train.preflight import Grades, check_grades

# Groups that a stream's next one is drawn from: a second of tokenising, and a few MB.
STREAM_BUFFER = 1000


@contextmanager
def of_workers() -> Iterator[None]:
    """Raise a bad row of a loader's process as one found here: torch hands on a traceback.

    Raises:
        ValueError: what was wrong with the row.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        last = r"(?sm).*^(?:fastpo\.data\.bad_rows\.BadRow|ValueError): (.+)\Z"
        reason = re.match(last, str(error))
        if "in DataLoader worker process" not in str(error) or reason is None:
            raise
        raise ValueError(reason[1].strip()) from error


class Filler:
    """Stand in where a rank has fewer groups than the others; its batch is run, not counted."""

    def __init__(self, group: Group) -> None:
        self.group = group


class Passes(torch.utils.data.IterableDataset):
    """Begin a stream again when it ends: a run is one pass over it, of `max_steps` steps.

    The Trainer counts steps, not passes, of data without a length. Were it to begin the passes, a
    resumed run would skip within the first one only, and the micro-batches at a pass's end would be
    left to a step of the next. Here a resumed run skips what it has seen, over all passes.

    Args:
        stream: the groups; told the number of every pass.
        seed: the run's seed.
        buffer: groups are drawn from this many, in an order that is a function of seed and pass;
            0 keeps the order of the rows.
    """

    def __init__(self, stream: GroupStream, seed: int, buffer: int = 0) -> None:
        self.stream, self.seed, self.buffer = stream, seed, buffer

    def __iter__(self) -> Iterator[Group]:
        for number in itertools.count():
            self.stream.set_epoch(number)
            empty = True
            for group in self._drawn(np.random.default_rng([self.seed, number])):
                empty = False
                yield group
            if empty:  # a worker whose share has no rows
                return

    def _drawn(self, rng: np.random.Generator) -> Iterator[Group]:
        waiting: list[Group] = []
        for group in self.stream:
            if len(waiting) < self.buffer:
                waiting.append(group)
                continue
            if waiting:
                slot = int(rng.integers(len(waiting)))
                waiting[slot], group = group, waiting[slot]
            yield group
        for slot in rng.permutation(len(waiting)):
            yield waiting[slot]


class PaddedGroups(torch.utils.data.Dataset):
    """Fill a dataset up to a multiple of the global batch, so that no group is counted twice."""

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Group | Filler:
        if index < len(self.dataset):
            return self.dataset[index]
        return Filler(self.dataset[0])


@dataclass
class Collator:
    """Pack groups, with stored log-probs or what a live reference reads beside them.

    Grades outside the domain of an objective raise ValueError with source and row.
    """

    pad_token_id: int
    share_prompt: bool = True
    # Tokens and lengths of a stream are checked as they come.
    vocabulary: Vocabulary | None = None
    positions: Positions | None = None
    store: ReferenceStore | None = None
    store2: ReferenceStore | None = None
    grades: Grades = ()

    def __call__(self, items: Sequence[Group | Filler]) -> Batch:
        groups = [item for item in items if isinstance(item, Group)]
        for group in groups:  # of a stream, whose rows nobody has looked at
            check_grades(self.grades, group)
        filler = [item.group for item in items[:1] if isinstance(item, Filler)]
        packed = groups or filler
        if self.vocabulary is not None:
            self.vocabulary.check_groups(packed)
        if self.positions is not None and not self.positions.warned:
            self.positions.check_groups(packed)
        pack = partial(collate, share_prompt=self.share_prompt, pad_token_id=self.pad_token_id)
        stored = self.store is not None or self.store2 is not None
        reference = None
        if not stored and any(group.short_prompt_ids is not None for group in packed):
            reference = pack([group.for_reference for group in packed])
        batch = pack(
            packed,
            ref_logps=None if self.store is None else [self.store[group] for group in packed],
            ref2_logps=None if self.store2 is None else [self.store2[group] for group in packed],
        )
        return replace(batch, reference=reference, counted=bool(groups))


class EpochSampler(torch.utils.data.Sampler[int]):
    """Visit the groups in an order that is a function of (seed, epoch) and of nothing else.

    Args:
        dataset: the groups.
        seed: the run's seed.
        epoch: called when an epoch begins; a resumed run asks the restored state.
        by_length: batches of this many groups are made of groups of similar length.
    """

    def __init__(
        self, dataset: Any, seed: int, epoch: Callable[[], int], by_length: int | None = None
    ) -> None:
        self.dataset, self.seed, self.epoch, self.by_length = dataset, seed, epoch, by_length

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        order = row_order(len(self.dataset), seed=self.seed, epoch=self.epoch())
        if self.by_length:
            # Sorted within chunks of 50 batches: similar lengths, still mixed over the epoch.
            size = 50 * self.by_length
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
            order = np.concatenate(
                [sorted(c, key=lambda i: len(self.dataset[int(i)]), reverse=True) for c in chunks]
            )
        yield from map(int, order)


def data_seed(args: PreferenceConfig) -> int:
    """Return the seed of the order in which data is visited."""
    return args.seed if args.data_seed is None else args.data_seed


def endless(stream: GroupStream, args: PreferenceConfig) -> Passes:
    """Return the passes over a stream that a run is configured to train on."""
    in_order = args.train_sampling_strategy == "sequential"
    return Passes(stream, data_seed(args), 0 if in_order else STREAM_BUFFER)


def packed_rows(
    batch: Any, collator: Collator, most: int | None, accelerator: Accelerator
) -> list[Batch]:
    """Return a batch of a loader as packed rows: one, or as many as a token budget asks for.

    Args:
        batch: packed already without a budget, else groups.
        collator: packs the groups of a row.
        most: tokens that a row may have, or None.
        accelerator: of the ranks, which all get as many rows.
    """
    if most is None:
        return [batch]
    shared = collator.share_prompt
    groups = [item if isinstance(item, Group) else item.group for item in batch]
    rows = token_rows(groups, most, share_prompt=shared)
    if accelerator.num_processes > 1:
        # Statistics over ranks and sharded weights meet in every forward.
        num = torch.tensor([len(rows)], device=accelerator.device)
        at_least = int(accelerator.gather(num).max())  # pyright: ignore
        rows = token_rows(groups, most, share_prompt=shared, at_least=at_least)
    return [collator([batch[i] for i in row]) for row in rows]


def as_groups(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    *,
    extras: Sequence[str],
    needs: Collection[str],
    source: str,
) -> Any:
    """Make a dataset of groups from rows, a file or a name; groups are returned as they are.

    Raises:
        ValueError: no groups or rows; names the source.
    """
    if not isinstance(data, str | Mapping) and isinstance(data, Sized) and not len(data):
        raise ValueError(f"{source} is empty ({data!r:.60}): give at least one group or row")
    if isinstance(data, GroupStream) or _holds_groups(data):
        return GroupDataset(data, [], len(data)) if isinstance(data, list) else data
    rows: Any = load_rows(data, origin=True)  # pyright: ignore[reportArgumentType]
    if isinstance(data, str | Path):
        source = str(data)
    streamed = isinstance(rows, torch.utils.data.IterableDataset)
    build = GroupStream if streamed else partial(build_groups, progress=not args.disable_tqdm)
    return build(rows, tokenizer, args.data_options(), extras=extras, needs=needs, source=source)


def _holds_groups(data: Any) -> bool:
    indexable = isinstance(data, Sized) and hasattr(data, "__getitem__")
    return indexable and not isinstance(data, str | dict) and isinstance(data[0], Group)  # pyright: ignore
