"""Prompts cut to their budget. A response is never cut: too long a one makes a bad row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.options import DataOptions


def fit_prompt(
    prompt: np.ndarray,
    lengths: Sequence[int],
    names: Sequence[str],
    leading: int,
    options: DataOptions,
    chunks: np.ndarray | None = None,
    column: str = "prompt",
) -> np.ndarray:
    """Return what is left of a prompt [P] within its budget.

    Args:
        prompt: its tokens, or their indices.
        lengths, names: tokens of each response behind it, and the field it came from.
        leading: tokens at its start that stay (BOS).
        options: limits, and how a prompt is cut.
        chunks: [n, 2] intervals of its tokens, for "cut_chunks".
        column: where it stands in the row, for messages.

    Raises:
        BadField: a response is too long, or a prompt that may not be cut.
    """
    longest = max(range(len(lengths)), key=lambda k: lengths[k])
    name, length = names[longest], lengths[longest]
    if options.max_response_length is not None and length > options.max_response_length:
        raise BadField(
            name, f"{length} tokens, more than max_response_length={options.max_response_length}"
        )
    budget, least = len(prompt), min(len(prompt), leading + 1)
    if options.max_length is not None:
        budget = min(budget, options.max_length - length)
        if budget < least:
            raise BadField(
                name,
                f"{length} tokens leave no room for a prompt in max_length={options.max_length}",
            )
    if options.max_prompt_length is not None:
        budget = min(budget, options.max_prompt_length)
    if budget == len(prompt):
        return prompt
    if options.truncation == "error" or budget < least:
        raise BadField(
            column,
            f"{len(prompt)} tokens, but {budget} fit with max_length={options.max_length}, "
            f"max_prompt_length={options.max_prompt_length} and a response of {length}",
        )
    if options.truncation == "keep_start":
        return prompt[:budget]
    if options.truncation == "cut_chunks":
        if chunks is None:
            raise BadField(column, "truncation='cut_chunks' cuts the `prompt` column alone")
        return prompt[cut_chunks(chunks, len(prompt), budget)]
    start = max(leading, budget // 2) if options.truncation == "cut_middle" else leading
    return np.concatenate([prompt[:start], prompt[len(prompt) - budget + start :]])


def cut_chunks(chunks: np.ndarray, length: int, budget: int) -> np.ndarray:
    """Return [budget or less] indices of a prompt's tokens, each chunk cut to the same length.

    Raises:
        BadField: no token of a chunk would be left.

    >>> cut_chunks(np.array([[1, 4], [4, 9]]), 10, 6).tolist()
    [0, 1, 2, 4, 5, 9]
    """
    outside = length - int((chunks[:, 1] - chunks[:, 0]).sum())
    most = (budget - outside) // len(chunks)
    if most < 1:
        raise BadField(
            "prompt",
            f"{outside} tokens beside its {len(chunks)} chunks leave nothing of them in a budget "
            f"of {budget}",
        )
    kept = np.ones(length, dtype=bool)
    for start, stop in chunks:
        kept[start + most : stop] = False
    return np.flatnonzero(kept)


def kept_chunks(kept: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Return the intervals [n, 2] of chunks in a truncated prompt.

    Args:
        kept: indices of the tokens that are left of the whole prompt.
        chunks: [n, 2] intervals of the whole prompt's tokens.

    Raises:
        BadField: no token of any chunk is left.
    """
    left = np.searchsorted(kept, chunks)
    left = left[left[:, 0] < left[:, 1]]
    if not len(left):
        raise BadField("prompt", f"no token of its {len(chunks)} chunks is left in its budget")
    return left
