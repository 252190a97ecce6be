"""Write rows of any dialect as TRL takes them: pairs, or single completions with a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastpo.data.bad_rows import BadField
from fastpo.data.columns import EXTRA_COLUMNS, KNOWN, PROMPT_COLUMNS
from fastpo.data.example import Example
from fastpo.data.formats import read_row
from fastpo.data.options import DataOptions

# They say the same of the written row as of the read one.
_AS_THEY_ARE = frozenset(
    ("weight", "margin", "group", "append_eos", "continue_final_message", "chunk_spans")
)


def to_trl(
    example: Example, row: Mapping[str, Any], lists: str | None
) -> Iterator[dict[str, object]]:
    """Write a row as TRL's trainers read it, with fastpo's optional columns and unknown ones.

    Args:
        example: the row as it was read, with all of its further responses and prompts.
        row: the row, its columns renamed.
        lists: `best_worst` or `best_rest`, the pairs that a list becomes; None takes no lists.

    Raises:
        BadField: token ids, or a list of more than two without `lists`.
    """
    if example.tokens is not None:
        raise BadField(example.names[0], "TRL takes no rows of token ids")
    prompt, responses = example.parts()
    # What a reader of another dialect would take for a prompt or an answer stays behind.
    begin = {
        name: value
        for name, value in row.items()
        if value is not None and (name in _AS_THEY_ARE or name not in KNOWN)
    }
    begin |= _kwargs(example.template_kwargs) | example.extras | example.prompts
    if prompt is not None:
        begin["prompt"] = prompt
    if len(responses) == 1:
        single = {"completion": responses[0], "label": example.labels[0]}
        single |= {"score": example.scores[0]} if example.scores[0] is not None else {}
        yield begin | single | _of_tokens(example, [0], "spans")
        return
    worse = [k for k in range(1, len(responses)) if example.ranks[k] > 0]
    if not worse:
        reason = "all equal, so the list holds no pair"
        raise BadField("scores", reason, example.scores).called(example.fields)
    if len(responses) > 2 and lists is None:
        raise BadField(
            example.names[0].partition("[")[0],
            f"a list of {len(responses)}, and TRL takes pairs: list_to_pairs: best_worst or "
            "best_rest makes them",
        ).called(example.fields)
    for k in worse[-1:] if lists == "best_worst" else worse:
        pair = begin | {"chosen": responses[0], "rejected": responses[k]}
        grades = example.scores[0], example.scores[k]
        if None not in grades:
            pair |= {"score_chosen": grades[0], "score_rejected": grades[1]}
        yield pair | _of_tokens(example, [0, k], "chosen_spans", "rejected_spans")


def _of_tokens(example: Example, places: Sequence[int], *spans: str) -> dict[str, object]:
    """Return the token weights of some responses; `spans` name the columns for theirs."""
    columns: dict[str, object] = {
        name: [arrays[k].tolist() for k in places] for name, arrays in example.per_token.items()
    }
    if example.spans is not None:
        columns |= {name: example.spans[k] for name, k in zip(spans, places, strict=True)}
    return columns


def _kwargs(kwargs: Mapping[str, Any]) -> dict[str, object]:
    tools, others = kwargs.get("tools"), {k: v for k, v in kwargs.items() if k != "tools"}
    columns = {"tools": tools, "chat_template_kwargs": others}
    return {name: value for name, value in columns.items() if value}


class TrlWriter:
    """Read rows and write each in TRL's form.

    Args:
        options: how rows are read, and which pairs a list becomes.
    """

    def __init__(self, options: DataOptions) -> None:
        self.columns, self.lists = options.reader(), options.list_to_pairs

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, object]]:
        """Return the rows that one row becomes; errors as those of `to_trl`."""
        named = self.columns.renamed(row)
        extras = [column for column in EXTRA_COLUMNS if named.get(column) is not None]
        prompts = [column for column in PROMPT_COLUMNS if named.get(column) is not None]
        example = read_row(row, extras, prompts, columns=self.columns)
        return list(to_trl(example, named, self.lists))
