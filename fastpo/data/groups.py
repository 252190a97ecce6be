"""Define groups: a prompt and its K >= 1 responses, as token ids, which all that follows sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np


@dataclass
class Response:
    """Hold one response of a group.

    `input_ids` holds the tokens that follow the prompt, end-of-sequence included. `loss_mask` is
    False on tokens that are context and not scored: user turns inside a response, a template's
    tokens after the last turn. `token_weights` and the signed `token_rewards` have one number a
    token or are None. `prompt_ids` is the prompt that it follows where that is not the group's.
    """

    input_ids: np.ndarray  # [R] int32
    loss_mask: np.ndarray  # [R] bool
    label: bool | None = None  # desirable?
    score: float | None = None  # the row's own grade
    rank: int | None = None  # 0 is best
    token_weights: np.ndarray | None = None  # [R] float32
    token_rewards: np.ndarray | None = None  # [R] float32
    prompt_ids: np.ndarray | None = None  # [P'] int32, P' >= 1


class Context(NamedTuple):
    """Hold a prompt, and the responses that share one copy of it."""

    prompt_ids: np.ndarray  # [P] int32
    responses: list[Response]
    positions: np.ndarray | None = None  # [P] int32; None: 0, 1, ...

    @property
    def end(self) -> int:
        """Return the position of each response's first token."""
        return len(self.prompt_ids) if self.positions is None else int(self.positions[-1]) + 1


@dataclass
class Group:
    """Hold one prompt with its candidates, best first, and extra responses by role."""

    prompt_ids: np.ndarray  # [P] int32, P >= 1
    responses: list[Response]
    row: int  # index of the row in the user's file, for messages
    weight: float = 1.0
    margin: float | None = None  # how much better the first response is than the second
    population: int | None = None  # the population the row comes from
    extras: dict[str, Response] = field(default_factory=dict)
    source: str = ""  # file or dataset name, for messages
    short_prompt_ids: np.ndarray | None = None  # [P''] int32, what the reference sees as prompt
    short_turns: list[Response] | None = None  # candidates cut up, for prompts of each turn's own
    prompt_positions: np.ndarray | None = None  # [P] int32, increasing; None: 0, 1, ...

    def __len__(self) -> int:
        """Count the tokens of the group with one copy of each prompt."""
        return sum(
            len(context.prompt_ids) + sum(len(r.input_ids) for r in context.responses)
            for context in self.contexts
        )

    @property
    def unshared_tokens(self) -> int:
        """Count the tokens of the group with one prompt copy per response."""
        return sum(
            len(context.prompt_ids) + len(response.input_ids)
            for context in self.contexts
            for response in context.responses
        )

    @property
    def longest(self) -> int:
        """Return R, the tokens of the longest candidate."""
        return max(len(r.input_ids) for r in self.responses)

    @property
    def span(self) -> int:
        """Return how many positions prompt and longest candidate reach over: P + R, or more."""
        return self.contexts[0].end + self.longest

    @property
    def roles(self) -> list[str]:
        """Return the roles of extras, sorted by name; those that follow another prompt are last."""
        return sorted(self.extras, key=lambda r: (self.extras[r].prompt_ids is not None, r))

    @property
    def every(self) -> list[Response]:
        """Return candidates in order, then extras by role, as they are numbered everywhere."""
        return [*self.responses, *(self.extras[role] for role in self.roles)]

    @property
    def contexts(self) -> list[Context]:
        """Return the group's prompt and any others, with the responses of `every` after them."""
        contexts = [Context(self.prompt_ids, [], self.prompt_positions)]
        for response in self.every:
            prompt, positions = response.prompt_ids, None
            if prompt is None:
                prompt, positions = self.prompt_ids, self.prompt_positions
            last = contexts[-1].prompt_ids
            if prompt is not last and not np.array_equal(prompt, last):
                contexts.append(Context(prompt, [], positions))
            contexts[-1].responses.append(response)
        return contexts

    @property
    def token_ids(self) -> np.ndarray:
        """Return [n] int32, the ids of all prompts and responses."""
        contexts = [*self.contexts, *self.for_reference.contexts]
        ids = [
            part for c in contexts for part in (c.prompt_ids, *(r.input_ids for r in c.responses))
        ]
        return np.concatenate(ids)

    @property
    def for_reference(self) -> Group:
        """Return the same responses after the reference's prompt; target tokens stay alike.

        With `short_turns` those are its candidates, the turns of the first one in front.
        """
        if self.short_prompt_ids is None:
            return self
        return replace(
            self,
            prompt_ids=self.short_prompt_ids,
            responses=self.short_turns or self.responses,
            short_prompt_ids=None,
            short_turns=None,
            prompt_positions=None,
        )
