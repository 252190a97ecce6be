"""A row that has been read, before tokenisation: the same form for every dialect and format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.messages import Content, common_messages


class Turn(NamedTuple):
    """Hold a response after the prompt that the reference reads before it."""

    name: str  # the cell it came from, for messages
    prompt: np.ndarray  # [P] int32
    answer: np.ndarray  # [R] int32


class Tokens(NamedTuple):
    """Hold a row tokenised elsewhere; each response is (ids [R] int32, loss mask [R] bool)."""

    prompt: np.ndarray  # [P] int32
    responses: list[tuple[np.ndarray, np.ndarray]]


class Span(NamedTuple):
    """Weigh the tokens that touch the characters [start, stop) of a response's text."""

    start: int
    stop: int
    weight: float


@dataclass
class Example:
    """Hold a row before tokenisation, or with `tokens`.

    Lists run over the K responses, best first.
    """

    prompt: Content | None  # None: implicit, what the responses begin with in common
    responses: list[Content]
    names: list[str]  # the field each response came from, for messages
    labels: list[bool]
    ranks: list[int]  # dense: 0 is best, ties share a rank
    scores: list[float | None]
    dialect: str = "trl"  # which reader of `fastpo.data.dialects` read the row
    weight: float = 1.0
    ranked: bool = False  # a list, which options may turn into pairs
    margin: float | None = None
    population: int | None = None  # the one that the row comes from, column `group`
    extras: dict[str, Content] = field(default_factory=dict)  # role -> a response, no candidate
    prompts: dict[str, Content] = field(default_factory=dict)  # column -> another prompt
    spans: list[list[Span]] | None = None  # of each response
    chunk_spans: list[tuple[int, int]] | None = None  # characters of the prompt's (last) text
    per_token: dict[str, list[np.ndarray]] = field(default_factory=dict)  # column -> [R] each
    order: list[int] = field(default_factory=list)  # a list's responses as the row has them
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    append_eos: bool | None = None  # None: as the run says, here and below
    continue_final_message: bool | None = None
    fields: dict[str, str] = field(default_factory=dict)  # column -> its name in the file
    tokens: Tokens | None = None  # then there is no text: no prompt and no responses
    turns: list[Turn] | None = None  # of `tokens`, the scored tokens in order, for the reference

    @property
    def conversational(self) -> bool:
        """Return whether the row is of messages."""
        return not isinstance(self.responses[0], str)

    @property
    def is_pair(self) -> bool:
        """Return whether there are a chosen and a rejected response, and no list."""
        return self.labels == [True, False] and not self.ranked

    def parts(self) -> tuple[Content | None, list[Content]]:
        """Return prompt and responses; None where a text's tokens imply the prompt."""
        if self.prompt is None and self.tokens is None and self.conversational:
            responses: Any = self.responses
            border = common_messages(responses)
            return responses[0][:border], [response[border:] for response in responses]
        return self.prompt, self.responses


def check_distinct(names: Sequence[str], ranks: Sequence[int], contents: Sequence[Any]) -> None:
    """Refuse equal responses with different ranks: they contradict each other."""
    for i, content in enumerate(contents):
        for j in range(i):
            if contents[j] == content and ranks[i] != ranks[j]:
                raise BadField(names[i], f"identical to {names[j]}, which is ranked higher")
