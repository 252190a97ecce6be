"""How rows become groups: one set of options for recipes, command lines and your own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

from fastpo.data.bad_rows import OnBadRow
from fastpo.data.columns import KNOWN
from fastpo.data.dialects import Columns
from fastpo.data.positions import PositionSynthesis
from fastpo.data.token_weights import check_schemes

Truncation = Literal["keep_end", "keep_start", "cut_middle", "cut_chunks", "error"]
ListToPairs = Literal["best_worst", "best_rest"]


@dataclass(frozen=True)
class DataOptions:
    """Say how rows become groups.

    Args:
        max_length: most tokens of the prompt plus any one of its responses; None: no limit.
        max_prompt_length: most tokens of a prompt.
        max_response_length: most tokens of a response, EOS included.
        truncation: what happens to a prompt that exceeds its budget, the lesser of
            `max_prompt_length` and what `max_length` leaves beside the longest response:
            "keep_end" and "keep_start" cut it (BOS stays), "cut_middle" keeps as much of its start
            as of its end, "cut_chunks" every chunk of the row's `chunk_spans` to the same length,
            "error" makes the row a bad row. A response is never cut: too long a response always
            makes a bad row.
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and lists them.
        chat_template_kwargs: passed to every `apply_chat_template`.
        list_to_pairs: None keeps ranked lists, "best_worst" makes one pair of each, "best_rest"
            pairs the best response with every lower ranked one.
        assistant_only: in a response of several messages score the assistant's alone.
        reference_prompt: column with the prompt after which the reference scores the responses,
            `prompt` itself or one whose name ends with `_prompt`.
        dialect: name of the reader of `fastpo.data.dialects` that every row is for; "auto" looks at
            each row's columns.
        columns: {name: the file's own name} renames columns before they are read, {name: None}
            drops them.
        text_as_messages: make messages of rows of text, for the tokenizer's chat template.
        append_eos: end responses with EOS, or the template's end of turn; a row's own column of
            that name wins.
        continue_final_message: responses go on with the assistant's message that ends the prompt;
            a row's own column of that name wins.
        bos: put the tokenizer's BOS before texts, also where the tokenizer itself puts none.
        token_weights: schemes that weigh single tokens, such as {"ld": 0.5}; the table is in
            `fastpo.data.token_weights`.
        position_synthesis: prompts of chunks (`chunk_spans`) get the positions of a longer context.
        seed: of the random scheme among the token weights, and of synthetic positions.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    truncation: Truncation = "keep_end"
    on_bad_row: OnBadRow = "error"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    list_to_pairs: ListToPairs | None = None
    assistant_only: bool = True
    reference_prompt: str = "prompt"
    dialect: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    text_as_messages: bool = False
    append_eos: bool = True
    continue_final_message: bool = False
    bos: bool = False
    token_weights: Mapping[str, Any] = field(default_factory=dict)
    position_synthesis: PositionSynthesis | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_schemes(self.token_weights)
        for name, choices in (
            ("truncation", get_args(Truncation)),
            ("on_bad_row", get_args(OnBadRow)),
            ("list_to_pairs", (None, *get_args(ListToPairs))),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {choices}")
        if self.reference_prompt != "prompt" and not self.reference_prompt.endswith("_prompt"):
            raise ValueError(
                f"reference_prompt={self.reference_prompt!r}: name a column that ends with "
                "'_prompt'"
            )
        self.reader()
        for name, own in self.columns.items():
            if own is not None and name not in KNOWN and not name.endswith("_prompt"):
                near = get_close_matches(name, KNOWN, n=1)
                raise ValueError(
                    f"columns={{{name}: {own}}}: nothing reads a column {name!r}"
                    + (f", is {near[0]!r} meant?" if near else "; docs/data.md lists the columns")
                )
        for name in ("max_length", "max_prompt_length", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1, or None for no limit")

    def reader(self) -> Columns:
        """Return what reads the columns of one data set."""
        return Columns(self.dialect, self.columns, text_as_messages=self.text_as_messages)
