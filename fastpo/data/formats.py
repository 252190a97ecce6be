"""Read what a row says: prompt, responses best first, grades, weight, from whatever columns.

Nothing here knows a tokenizer. `docs/data.md` shows each format with an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.cells import (
    read_arrays,
    read_chunk_spans,
    read_grades,
    read_number,
    read_population,
    read_span_lists,
    read_spans,
    read_switch,
    read_template_kwargs,
    read_tools,
    read_weight,
    refuse_spans,
)
from fastpo.data.columns import (
    EXTRA_COLUMNS,
    NO_TEXT,
    OPTIONAL,
    OPTIONAL_OF_PAIRS,
    PAIR_GRADES,
    SPAN_COLUMNS,
)
from fastpo.data.conversations import converse, drop_prompt_of_extras
from fastpo.data.dialects import DIALECTS, PROMPTS, SIDES, Columns, Reading
from fastpo.data.example import Example, check_distinct
from fastpo.data.logo_columns import read_logo
from fastpo.data.messages import (
    BESIDE_CONTENT,
    Content,
    content_of,
    is_sequence,
    message_text,
    parsed,
)
from fastpo.data.tokenised import read_longpo, read_turns

T = TypeVar("T")


_LABEL = "true for a good completion, false for a bad one"


_WORDS = {
    **dict.fromkeys(("true", "yes", "good", "1", "1.0", "desirable", "up"), True),
    **dict.fromkeys(("false", "no", "bad", "0", "0.0", "undesirable", "down"), False),
}


_FOR_PAIRS = "of pairs: those of other rows are in `spans`", "chosen_spans", "rejected_spans"


def _ranked_list(row: Mapping[str, Any]) -> Example:
    values = parsed("responses", row["responses"])
    if not is_sequence(values):
        raise BadField("responses", "not a list of responses", values)
    refuse_spans(row, *_FOR_PAIRS)
    if len(values) < 2:
        raise BadField("responses", "a list needs at least two responses", values)
    names = [f"responses[{i}]" for i in range(len(values))]
    responses = [content_of(name, value) for name, value in zip(names, values, strict=True)]
    scores = read_grades(row, "scores", len(values))
    written = read_grades(row, "ranks", len(values))
    if scores is not None and written is not None:
        raise BadField("ranks", "give either scores or ranks, not both", written)
    if scores is not None:
        badness = -np.array(scores)
    elif written is not None:
        badness = np.array(written)
    else:
        badness = np.arange(len(values))
    order = np.argsort(badness, kind="stable")
    spans = read_span_lists(row, "spans", len(values))
    ranks = np.unique(badness, return_inverse=True)[1]  # dense, in the order of the row
    return Example(
        prompt=None,
        responses=[responses[i] for i in order],
        names=[names[i] for i in order],
        labels=[bool(ranks[i] == 0) for i in order],
        ranks=[int(ranks[i]) for i in order],
        scores=[None if scores is None else scores[i] for i in order],
        ranked=True,
        spans=None if spans is None else [spans[i] for i in order],
        order=order.tolist(),
    )


def _pair(row: Mapping[str, Any]) -> Example:
    names = ["chosen", "rejected"]
    responses = [content_of(name, row.get(name)) for name in names]
    spans = [read_spans(f"{name}_spans", row.get(f"{name}_spans")) for name in names]
    refuse_spans(
        row,
        "a pair has `chosen_spans` and `rejected_spans`; `columns: {spans: null}` drops it",
        "spans",
    )
    return Example(
        prompt=None,
        responses=responses,
        names=names,
        labels=[True, False],
        ranks=[0, 1],
        scores=[None, None],
        spans=spans if any(spans) else None,
    )


def _single(row: Mapping[str, Any]) -> Example:
    if "prompt" not in row:
        raise BadField("prompt", "missing: a single completion cannot imply it")
    completion, label = content_of("completion", row["completion"]), row.get("label")
    if label is None:
        raise BadField("label", f"missing: {_LABEL}")
    good = _WORDS.get(str(label).strip().lower())
    if good is None:
        raise BadField("label", f"neither true nor false: {_LABEL}", label)
    refuse_spans(row, *_FOR_PAIRS)
    spans = read_spans("spans", row.get("spans"))
    return Example(
        prompt=None,
        responses=[completion],
        names=["completion"],
        labels=[good],
        ranks=[0],
        scores=[None],
        spans=[spans] if spans else None,
    )


FORMATS = {
    "chosen": _pair,
    "rejected": _pair,
    "responses": _ranked_list,
    "completion": _single,
    "all_ref_text": read_logo,
}


TOKENISED = dict.fromkeys([f"{side}_input_ids" for side in SIDES], read_longpo)


def _whole(name: str, reading: Reading) -> Example:
    """Read the prompt and the responses of a row in fastpo's own columns."""
    row = reading.columns
    # Text wins: token ids beside it are what another trainer made of it.
    formats = FORMATS if FORMATS.keys() & row.keys() else TOKENISED
    named = [key for key in formats if key in row]
    if len({formats[key] for key in named}) != 1:
        sources = [reading.names.get(key, key) for key in named]
        reason = f"no row of the dialect {name}: need {DIALECTS[name].shape}"
        if named:
            drop = f"`columns: {{{sources[-1]}: null}}` drops some"
            reason = f"answers of more than one format: {drop}"
        raise BadField(", ".join(sources) or "columns", reason, sorted(reading.row))
    example = formats[named[0]](row)
    if "prompt" in row:
        example.prompt = content_of("prompt", row["prompt"])
    return example


def _read_as(
    name: str,
    reading: Reading,
    columns: Columns,
    extras: Sequence[str],
    prompts: Sequence[str],
) -> Example:
    """Read a row as one dialect, with further responses and prompts."""
    dialect, row = DIALECTS[name], reading.row
    dialect.read(reading)
    # What the dialect made of its own columns wins over an optional one of that name.
    reading.columns = {k: v for k, v in row.items() if k in OPTIONAL} | reading.columns
    try:
        example = _whole(name, reading)
        if example.tokens is not None:
            return example
        example.extras = {
            role: content_of(role, row.get(role)) for role in extras if role in EXTRA_COLUMNS
        }
        example.prompts = {column: content_of(column, row.get(column)) for column in prompts}
        text = isinstance(example.responses[0], str)
        implied = example.prompt is None and (text or not example.parts()[0])
        if implied and name == "trl":
            for column in sorted(PROMPTS & row.keys() - reading.used):
                raise BadField(
                    column,
                    f"the row has no `prompt`: `columns: {{prompt: {column}}}` reads this one as "
                    f"it, `columns: {{{column}: null}}` drops it",
                    row[column],
                )
        if implied and not text:
            both = " and ".join(reading.names.get(n, n) for n in example.names)
            raise BadField("prompt", f"missing, and {both} begin with nothing in common")
        if name == "hh":
            drop_prompt_of_extras(example)
        turns = dialect.turns or columns.text_as_messages
        converse(example, reading.columns.get("system"), turns)
        if name == "hh" and not example.conversational:
            every = zip(example.names, example.responses, strict=True)
            for side, response in (*every, *example.extras.items()):
                if "\n\nHuman:" in response:
                    reason = "goes on with the human's words: `text_as_messages: true` scores the "
                    raise BadField(side, reason + "assistant's alone", response)
    except BadField as bad:
        raise bad.called(reading.names) from bad
    return example


def _recognised(
    row: Mapping[str, Any], columns: Columns, extras: Sequence[str], prompts: Sequence[str]
) -> tuple[str, Reading, Example]:
    """Read a row as the dialect that claims it, or several that read the same."""
    readings = columns.readings(row)
    read: list[tuple[str, Reading, Example]] = []
    faults: list[BadField] = []
    for name, reading in readings:
        try:
            read.append((name, reading, _read_as(name, reading, columns, extras, prompts)))
        except BadField as bad:
            faults.append(bad)
    if not read:  # whichever reads it, something is wrong
        raise faults[0]
    names = [name for name, _ in readings]
    if len(readings) > 1:
        said = [(e.prompt, e.responses, e.labels, e.ranks, e.scores) for _, _, e in read]
        if len(said) < len(names) or any(other != said[0] for other in said):
            raise BadField(
                "columns",
                f"{' and '.join(names)} read this row differently: say which with `dialect: "
                f"{names[0]}` or `dialect: {names[1]}`, or drop a column with `columns: {{NAME: "
                "null}`",
                sorted(row),
            )
    return read[0]


def read_row(
    row: Any,
    extras: Sequence[str] = (),
    prompts: Sequence[str] = (),
    needs: Collection[str] | None = None,
    chunks: bool = False,
    columns: Columns | None = None,
) -> Example:
    """Read a row of any dialect as an Example; None values count as absent.

    Args:
        row: the columns.
        extras: names those columns of `EXTRA_COLUMNS` that are wanted; a row must then have them.
        prompts: columns with other prompts, likewise.
        needs: what an objective reads of `score`, `margin`, `population` (the column `group`) and
            `token_rewards`: there a column that says something else is an error, and the others
            are not looked at. None: they are taken where they can be.
        chunks: whether `chunk_spans` are read.
        columns: how columns are read, and where those that are not are noted.

    Raises:
        BadField: naming the field, the reason and the value.
    """
    if not isinstance(row, Mapping):
        raise BadField("row", "not a dict of columns", row)
    columns = columns or Columns()
    try:
        return _read_row(row, extras, prompts, needs, chunks, columns)
    except BadField as bad:
        raise bad.called(columns.taken) from bad


def _read_row(
    row: Mapping[str, Any],
    extras: Sequence[str],
    prompts: Sequence[str],
    needs: Collection[str] | None,
    chunks: bool,
    columns: Columns,
) -> Example:
    present = {
        key: value
        for key, value in columns.renamed(row).items()
        if value is not None
        and not (key in NO_TEXT and isinstance(value, str) and not value.strip())
    }

    name, reading, example = _recognised(present, columns, extras, prompts)
    example.dialect = name
    optional = OPTIONAL_OF_PAIRS if example.is_pair else OPTIONAL
    columns.check_unread(name, reading, optional, prompts)
    names = {column: columns.taken.get(source, source) for column, source in reading.names.items()}
    example.fields = {**columns.taken, **names}
    try:
        _take_optional(example, reading, extras, prompts, needs, chunks)
    except BadField as bad:
        raise bad.called(reading.names) from bad
    return example


def _take_optional(
    example: Example,
    reading: Reading,
    extras: Sequence[str],
    prompts: Sequence[str],
    needs: Collection[str] | None,
    chunks: bool,
) -> None:
    """Add to an example what the row's optional columns say, and check the whole of it."""

    def taken(need: str, read: Callable[..., T], *args: Any) -> T | None:
        if needs is not None:
            return read(*args) if need in needs else None
        try:
            return read(*args)
        except BadField:
            return None

    present = reading.columns
    grades = _pair_scores if example.is_pair else None
    if len(example.names) == 1:
        grades = _single_score
    if grades is not None:
        example.scores = taken("score", grades, {**reading.row, **present}) or example.scores
    if chunks and "chunk_spans" in present:
        example.chunk_spans = read_chunk_spans(present["chunk_spans"])
    for switch in ("append_eos", "continue_final_message"):
        if switch in present:
            setattr(example, switch, read_switch(switch, present[switch]))
    if "weight" in present:
        example.weight = read_weight(present["weight"])
    if "margin" in present:
        example.margin = taken("margin", read_number, "margin", present["margin"])
    if "group" in present:
        example.population = taken("population", read_population, present["group"])
    order = example.order or range(len(example.names))
    if "token_weights" in present:
        example.per_token["token_weights"] = read_arrays(present, "token_weights", order)
    if "token_rewards" in present:
        rewards = taken("token_rewards", read_arrays, present, "token_rewards", order)
        if rewards is not None:
            example.per_token["token_rewards"] = rewards
    if example.tokens is not None:
        unfit = [column for column in SPAN_COLUMNS if column in present]
        unfit += [column for column in (*EXTRA_COLUMNS, *prompts) if column in (*extras, *prompts)]
        for column in unfit:
            if column != "short_prompt":
                raise BadField(column, "not for rows of token ids: give the row as text")
        if "short_prompt" in prompts:
            example.turns = read_turns(reading.row, example.tokens)
        return
    if example.conversational:
        example.template_kwargs = read_template_kwargs(present)
    elif tools := read_tools(present.get("tools")):
        reason = "a row of text has no chat template to write it: `text_as_messages: true` makes "
        reason += "messages of it, `columns: {tools: null}` drops the column"
        raise BadField("tools", reason, tools)
    _check(example)


def _pair_scores(row: Mapping[str, Any]) -> list[float | None]:
    scores = read_grades(row, "scores", 2) or [None, None]
    for i, side in enumerate(SIDES):
        for name in PAIR_GRADES[side]:
            if name in row:
                scores[i] = read_number(name, row[name])
                break
    return scores


def _single_score(row: Mapping[str, Any]) -> list[float | None]:
    return [read_number("score", row["score"]) if "score" in row else None]


def _is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(
        message_text(m).strip() or any(m.get(key) for key in BESIDE_CONTENT)
        for m in content
        if m["role"] == "assistant"
    )


def _check(example: Example) -> None:
    """Check what holds for every format: one kind of content, nothing empty, no contradiction."""
    every = zip(
        [*example.names, *example.extras],
        [*example.responses, *example.extras.values()],
        strict=True,
    )
    for name, response in every:
        if isinstance(response, str) == example.conversational:
            raise BadField(name, "text and messages are mixed in one row", response)
        if _is_empty(response):
            raise BadField(name, "empty response", response)
    check_distinct(example.names, example.ranks, example.responses)
    for name, other in example.prompts.items():
        if example.prompt is None:
            raise BadField(name, "stands in for a `prompt` column, which is missing", other)
        _check_prompt(name, other, example.conversational)
    if example.prompt is not None:
        _check_prompt("prompt", example.prompt, example.conversational)


def _check_prompt(name: str, prompt: Content, conversational: bool) -> None:
    if isinstance(prompt, str) == conversational:
        kinds = ("messages", "text") if isinstance(prompt, str) else ("text", "messages")
        raise BadField(name, f"{kinds[1]}, but the responses are {kinds[0]}", prompt)
