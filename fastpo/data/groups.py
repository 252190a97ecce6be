"""Groups: one prompt and its K >= 1 responses, as token ids. Everything after rows sees these."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Response:
    """One response of a group.

    `input_ids` holds the tokens that follow the prompt, end-of-sequence included; `loss_mask` is
    False on tokens that are context and not scored (user turns inside a response, a template's
    tokens after the end of the answer); `token_weights` has one weight a token or is None.
    """

    input_ids: np.ndarray  # [R] int32
    loss_mask: np.ndarray  # [R] bool
    label: bool | None = None  # desirable?
    score: float | None = None  # the row's own grade
    rank: int | None = None  # 0 is best
    token_weights: np.ndarray | None = None  # [R] float32


@dataclass
class Group:
    """One prompt with its candidates, best first, and extra responses by role."""

    prompt_ids: np.ndarray  # [P] int32, P >= 1
    responses: list[Response]
    row: int  # index of the row in the user's file, for messages
    weight: float = 1.0
    margin: float | None = None  # how much better the first response is than the second
    cohort: int | None = None  # the population the row comes from
    extras: dict[str, Response] = field(default_factory=dict)
    source: str = ""  # file or dataset name, for messages

    def __len__(self) -> int:
        """Tokens of the group with one prompt copy."""
        every = [*self.responses, *self.extras.values()]
        return len(self.prompt_ids) + sum(len(r.input_ids) for r in every)
