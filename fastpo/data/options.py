"""How rows become groups: one set of options for recipes, command lines and your own code."""

# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from functools import cache
from typing import Any, Literal, get_type_hints

from fastpo.data.bad_rows import OnBadRow
from fastpo.data.columns import KNOWN
from fastpo.data.dialects import Columns
from fastpo.data.positions import PositionSynthesis
from fastpo.data.token_weights import check_schemes
from fastpo.domain import Count, Natural, fit_fields
from fastpo.errors import similar
from fastpo.fields import documented

Truncation = Literal["keep_end", "keep_start", "cut_middle", "cut_chunks", "error"]
ListToPairs = Literal["best_worst", "best_rest"]


@documented
@dataclass
class DataSettings:
    """How rows become groups, as recipes and flags have it: a mapping may be text.

    Args:
        max_length: most tokens of the prompt plus any one of its responses; null: no limit.
        max_prompt_length: most tokens of a prompt.
        max_response_length: most tokens of a response, EOS included.
        truncation: what happens to a prompt that exceeds its budget, the lesser of
            `max_prompt_length` and what `max_length` leaves beside the longest response.
            "keep_end" and "keep_start" cut it (BOS stays), "cut_middle" keeps as much of its start
            as of its end, "cut_chunks" cuts every chunk of the row's `chunk_spans` to the same
            length, "error" makes the row a bad row. A response is never cut: too long a response
            always makes a bad row.
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and lists them.
        chat_template_kwargs: arguments of the chat template.
        list_to_pairs: null keeps ranked lists, "best_worst" makes one pair of each, "best_rest"
            pairs the best response with every lower ranked one.
        assistant_only: in a response of several messages score the assistant's alone.
        reference_prompt: column with the prompt that the reference reads.
        dialect: how rows are read (trl, openai, alpaca, ...); "auto" looks at each row's columns.
        columns: {prompt: question} reads that column as prompt, {old: null} drops one.
        text_as_messages: make messages of rows of text, for the tokenizer's chat template.
        append_eos: end responses with EOS, or the template's end of turn. A row's own column of
            that name wins.
        continue_final_message: responses go on with the assistant's message that ends the prompt.
            A row's own column of that name wins.
        bos: put the tokenizer's BOS before texts, also where the tokenizer itself puts none.
        token_weights: schemes that weigh single tokens, such as {ld: 0.5}; the table is in
            `fastpo.data.token_weights`.
        position_synthesis: prompts of chunks (`chunk_spans`) get the positions of a longer context
            (LOGO), such as {length: 65536, variants: 2}.
    """

    max_length: Count | None = None
    max_prompt_length: Count | None = None
    max_response_length: Count | None = None
    truncation: Truncation = "keep_end"
    on_bad_row: OnBadRow = "error"
    chat_template_kwargs: dict | str | None = None
    list_to_pairs: ListToPairs | None = None
    assistant_only: bool = True
    reference_prompt: Literal["prompt", "short_prompt"] = "prompt"
    dialect: str = "auto"
    columns: dict | str | None = None
    text_as_messages: bool = False
    append_eos: bool = True
    continue_final_message: bool = False
    bos: bool = False
    token_weights: dict | str | None = None
    position_synthesis: dict | str | None = None


@dataclass
class DataOptions(DataSettings):
    """Say how rows become groups; checked when made, and not changed afterwards.

    Args:
        reference_prompt: `prompt`, or a column whose name ends with `_prompt`.
        seed: of the random scheme among the token weights, and of synthetic positions.

    The other fields are those of `DataSettings`, with mappings for text.

    Raises:
        ValueError: a value that no field of that name can have; names both.
    """

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference_prompt: str = "prompt"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    token_weights: Mapping[str, Any] = field(default_factory=dict)
    position_synthesis: PositionSynthesis | None = None
    seed: Natural = 0

    def __setattr__(self, name: str, value: object) -> None:
        if "seed" in vars(self):  # the last field: all are set
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        if self.chat_template_kwargs is None:
            vars(self)["chat_template_kwargs"] = {}
        fit_fields(self, _annotations())
        check_schemes(self.token_weights)
        if self.reference_prompt != "prompt" and not self.reference_prompt.endswith("_prompt"):
            raise ValueError(
                f"reference_prompt={self.reference_prompt!r}: name a column that ends with "
                "'_prompt'"
            )
        self.reader()
        for name, column in self.columns.items():
            if column is not None and name not in KNOWN and not name.endswith("_prompt"):
                close = "".join(f", is {n!r} meant?" for n in similar(name, KNOWN))
                raise ValueError(
                    f"columns={{{name}: {column}}}: nothing reads a column {name!r}"
                    + (close or "; docs/data.md lists the columns")
                )

    def reader(self) -> Columns:
        """Return what reads the columns of one data set."""
        return Columns(self.dialect, self.columns, text_as_messages=self.text_as_messages)


@cache
def _annotations() -> dict[str, object]:
    return get_type_hints(DataOptions, include_extras=True)
