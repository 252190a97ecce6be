"""Rows of any dialect as TRL takes them: pairs, or single completions with a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastpo.data.bad_rows import BadField
from fastpo.data.dialects import DIALECTS
from fastpo.data.formats import Example


def to_trl(example: Example, row: Mapping[str, Any], lists: str | None) -> Iterator[dict[str, Any]]:
    """Write a row as TRL's trainers read it, columns that no dialect reads along.

    Args:
        example: the row as it was read.
        row: the row, its columns renamed.
        lists: `best_worst` or `best_rest`, the pairs that a list becomes; None takes no lists.

    Raises:
        BadField: token ids, or a list of more than two without `lists`.
    """
    if example.tokens is not None:
        raise BadField(example.names[0], "TRL takes no rows of token ids")
    prompt, responses = example.parts()
    read = DIALECTS[example.dialect].columns
    begin = {name: value for name, value in row.items() if name not in read and value is not None}
    begin |= example.template_kwargs and _kwargs(example.template_kwargs)
    if prompt is not None:
        begin["prompt"] = prompt
    if len(responses) == 1:
        yield begin | {"completion": responses[0], "label": example.labels[0]}
        return
    worse = [k for k in range(1, len(responses)) if example.ranks[k] > 0]
    if not worse:
        raise BadField("scores", "all equal, so the list holds no pair", example.scores)
    if len(responses) > 2 and lists is None:
        raise BadField(
            example.names[0].partition("[")[0],
            f"a list of {len(responses)}, and TRL takes pairs: --list-to-pairs best_worst or "
            "best_rest makes them",
        )
    for k in worse[-1:] if lists == "best_worst" else worse:
        pair = begin | {"chosen": responses[0], "rejected": responses[k]}
        grades = example.scores[0], example.scores[k]
        if None not in grades:
            pair |= {"score_chosen": grades[0], "score_rejected": grades[1]}
        yield pair


def _kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    tools, others = given.get("tools"), {k: v for k, v in given.items() if k != "tools"}
    columns = {"tools": tools, "chat_template_kwargs": others}
    return {name: value for name, value in columns.items() if value}
