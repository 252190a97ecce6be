"""Synthetic positions: a prompt of a few passages, read as if it were a long document (LOGO).

A prompt is a head, n passages (chunks) and a tail, the question. The positions of a long context
are divided among them: the head begins at 0, the tail ends where the responses begin, and what lies
between falls into n equal slots. A chunk lies in its slot as one piece, in a window drawn from
evenly spaced ones that cover the slot, so that over the rows every position is seen. Distances are
those of the long context, tokens and memory those of the short one (arXiv 2410.18533).

The authors' code reserves a slot's last position for a beacon token, draws two windows a chunk and
crosses them to up to 2^n variants of a row; here each variant draws each of its windows anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.domain import Count, fit_fields


@dataclass(frozen=True)
class PositionSynthesis:
    """Say how prompts of passages get their positions.

    Args:
        length: positions of the prompt and the longest response.
        variants: groups that are made of a row, each with windows of its own.

    Raises:
        ValueError: a value out of range, with the field's name.
    """

    length: Count
    variants: Count = 1

    def __post_init__(self) -> None:
        fit_fields(self, {"length": Count, "variants": Count}, "position_synthesis: ")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> PositionSynthesis:
        """Make one of a mapping; an unknown or missing field raises ValueError."""
        known = [f.name for f in fields(cls)]
        if "length" not in values or set(values) - set(known):
            raise ValueError(
                f"position_synthesis={dict(values)}: needs length, as in {{length: 65536}}, and "
                f"has no fields but {', '.join(known)}"
            )
        return cls(**values)


def chunk_tokens(
    offsets: np.ndarray,  # [P, 2]
    spans: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Return [n, 2] half-open intervals of the prompt's tokens that touch each chunk.

    Args:
        offsets: characters of each token, from the start of the text that `spans` count in.
        spans: [start, stop) of every chunk in characters, in order.

    Raises:
        BadField: a chunk without a token of its own.

    >>> offsets = np.array([[0, 2], [2, 5], [5, 9], [9, 10]])
    >>> chunk_tokens(offsets, [(2, 5), (5, 9)]).tolist()
    [[1, 2], [2, 3]]
    """
    intervals = np.empty((len(spans), 2), dtype=np.int64)
    end = 0
    for i, (start, stop) in enumerate(spans):
        touched = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        touched = touched[touched >= end]
        if not len(touched):
            raise BadField(f"chunk_spans[{i}]", "no token of the prompt is its own", (start, stop))
        intervals[i] = touched[0], (end := int(touched[-1]) + 1)
    return intervals


def synthetic_positions(
    chunks: np.ndarray,  # [n, 2]
    length: int,
    end: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return positions [P] int32, strictly increasing; the last is `end` - 1, a head's first 0.

    What lies between two chunks goes with the first of them.

    Args:
        chunks: intervals of tokens, from `chunk_tokens`.
        length: P, tokens of the prompt.
        end: position of the first token after the prompt.
        rng: draws a window for each chunk.

    Raises:
        BadField: a chunk is longer than its slot.

    >>> synthetic_positions(np.array([[1, 3], [3, 5]]), 6, 14, np.random.default_rng(0)).tolist()
    [0, 5, 6, 9, 10, 13]
    """
    borders = [*chunks[:, 0].tolist(), int(chunks[-1, 1])]
    slot = (end - borders[0] - (length - borders[-1])) // len(chunks)
    positions = np.arange(length, dtype=np.int32)
    for i, (start, stop) in enumerate(itertools.pairwise(borders)):
        size = stop - start
        if size > slot:
            raise BadField(
                f"chunk_spans[{i}]",
                f"{size} tokens, but {end} positions for {len(chunks)} chunks give each {slot}: "
                "raise position_synthesis.length, or cut chunks with max_length and "
                "truncation='cut_chunks'",
            )
        windows = -(-slot // size)
        window = int(rng.integers(windows))
        at = borders[0] + i * slot + round(window * (slot - size) / max(windows - 1, 1))
        positions[start:stop] = np.arange(at, at + size)
    positions[borders[-1] :] += end - length
    return positions
