"""What a batch is made of."""

from __future__ import annotations

from typing import NamedTuple

# What losses are divided by (`fastpo.objectives.base.Per`), then what is only reported.
COUNTS = (
    "groups",
    "responses",
    "desirable",
    "undesirable",
    "chosen_tokens",
    "response_tokens",
    "gold_tokens",
    "tokens",
    "label_tokens",
    "unshared_tokens",
)


class GroupSpan(NamedTuple):
    """Where a prompt and its responses lie in the packed row: half-open intervals of positions."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """The segment table of a packed row, plain Python integers so that attention never syncs.

    Each token of a response attends to the prompt before it and to its own response, causally.
    """

    groups: tuple[GroupSpan, ...]
    length: int
