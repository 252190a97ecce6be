"""What a row says: prompt, responses best first, grades and weight, whatever columns it came in.

Nothing here knows a tokenizer. `docs/data.md` shows each format with an example.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

Messages: TypeAlias = list[dict[str, Any]]
Content: TypeAlias = str | Messages
T = TypeVar("T")

# Where chat templates look for what an assistant says or does, besides `content`.
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


EXTRAS = ("gold", "ref_response")
"""Columns with a further response that is no candidate."""

CONTEXTS = {
    "context_chosen": ("context_prompt", 0),
    "context_rejected": ("context_prompt", -1),
    "bare_chosen": ("bare_prompt", 0),
    "bare_rejected": ("bare_prompt", -1),
}
"""Role -> the column with the other prompt, and the candidate that is scored after it."""

PER_TOKEN = ("token_weights", "token_rewards")
"""Columns with a list a response of one number a token."""

SPANS = ("spans", "chosen_spans", "rejected_spans", "chunk_spans")

_LABEL = "true for a good completion, false for a bad one"
# An empty cell, or an empty text in a column of lists and numbers, is how files write "absent".
_NO_TEXT = {
    *("weight", "margin", "group", "label", "tools", "chat_template_kwargs"),
    *("append_eos", "continue_final_message"),
    *("scores", "score", "score_chosen", "score_rejected", "ranks", *PER_TOKEN, *SPANS),
}

# Columns of LOGO's official code, after its post-processing (arXiv 2410.18533).
LOGO = {
    "chunks": ("all_ref_text",),
    "question": ("combined_question",),
    "chosen": ("final_answer",),
    "partial": ("prefix_a",),  # the answer to half of the critical chunks
    "wrong": ("suffix_a", "siffix_a"),  # to none of them; one of its scripts misspells it
}


SIDES = ("chosen", "rejected")
UNSCORED = -100
"""The label of a token that is context, in rows of token ids."""


class Turn(NamedTuple):
    """An answer after the prompt that the reference reads before it."""

    name: str  # the cell it came from, for messages
    prompt: np.ndarray  # [P] int32
    answer: np.ndarray  # [R] int32


class Tokens(NamedTuple):
    """A row that was tokenised elsewhere; each response is (ids [R] int32, loss mask [R] bool)."""

    prompt: np.ndarray  # [P] int32
    responses: list[tuple[np.ndarray, np.ndarray]]


class Span(NamedTuple):
    """Characters [start, stop) of a response's text, and the weight of tokens that touch them."""

    start: int
    stop: int
    weight: float


class BadField(ValueError):
    """A field of a row that cannot be used; `fastpo.data.build` adds the file and the row."""

    def __init__(self, field: str, reason: str, value: Any = None):
        super().__init__(field, reason, value)
        self.field, self.reason, self.value = field, reason, value


@dataclass
class Example:
    """A row before tokenisation, or with `tokens`. Lists run over the K responses, best first."""

    prompt: Content | None  # None: implicit, what the responses begin with in common
    responses: list[Content]
    names: list[str]  # the field each response came from, for messages
    labels: list[bool]
    ranks: list[int]  # dense: 0 is best, ties share a rank
    scores: list[float | None]
    weight: float = 1.0
    ranked: bool = False  # a list, which options may turn into pairs
    margin: float | None = None
    cohort: int | None = None
    extras: dict[str, Content] = field(default_factory=dict)  # role -> a response, no candidate
    prompts: dict[str, Content] = field(default_factory=dict)  # column -> another prompt
    spans: list[list[Span]] | None = None  # of each response
    chunk_spans: list[tuple[int, int]] | None = None  # characters of the prompt's (last) text
    per_token: dict[str, list[np.ndarray]] = field(default_factory=dict)  # column -> [R] each
    order: list[int] = field(default_factory=list)  # a list's responses as the row has them
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    append_eos: bool | None = None  # None: as the run says, here and below
    continue_final_message: bool | None = None
    tokens: Tokens | None = None  # then there is no text: no prompt and no responses
    turns: list[Turn] | None = None  # of `tokens`, the scored tokens in order, for the reference

    @property
    def conversational(self) -> bool:
        return not isinstance(self.responses[0], str)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))


def _message(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    # Columnar storage gives every message the union of all keys and fills the rest with None.
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise BadField(name, "a message has no role", dict(value))
    content = message.get("content")
    if content is not None and _is_sequence(content):
        for part in content:
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                raise BadField(name, "only text is supported in a message's content", part)
    elif not isinstance(content, str) and not ("tool_calls" in message and content is None):
        raise BadField(name, "a message's content is not text", content)
    return message


# A text like this is a conversation, written as JSON or (then it is refused) as Python writes it.
MESSAGES = re.compile(
    r"""\s*\[\s*\{.*['"]role['"]\s*:\s*['"](system|developer|user|assistant|tool)['"]""", re.DOTALL
)


def _parsed(name: str, value: Any) -> Any:
    """A list or dict; where a format has text only (CSV), what its JSON says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadField(name, f"neither a list or dict nor JSON of one: {error}", value) from error


def _content(name: str, value: Any) -> Content:
    """Text or messages, checked."""
    if value is None:
        raise BadField(name, "missing")
    if isinstance(value, str):
        if not MESSAGES.match(value):
            return value
        value = _parsed(name, value)
    if _is_sequence(value) and all(isinstance(item, Mapping) for item in value):
        return [_message(name, item) for item in value]
    raise BadField(name, "neither text nor a list of messages", value)


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, whichever of the two forms its content has."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(
        message_text(m).strip() or any(m.get(key) for key in BESIDE_CONTENT)
        for m in content
        if m["role"] == "assistant"
    )


def _number(name: str, value: Any) -> float:
    kinds = (int, float, np.integer, np.floating, str)  # CSV has no numbers
    try:
        number = float(value) if isinstance(value, kinds) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise BadField(name, "not a finite number", value)
    return number


def _weight(value: Any) -> float:
    try:
        weight = _number("weight", value)
    except BadField as bad:
        reason = f"{bad.reason}, and every objective weighs rows by it: rename the column if it "
        raise BadField("weight", reason + "means something else", value) from None
    if weight < 0:
        raise BadField("weight", "negative", weight)
    return weight


def _spans_of(name: str, value: Any) -> list[Span]:
    """Spans written as [start, stop, weight]."""
    spans = []
    value = [] if value is None else _parsed(name, value)
    if not _is_sequence(value):
        raise BadField(name, "not a list of [start, stop, weight]", value)
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        if not _is_sequence(item) or len(item) != 3:
            raise BadField(where, "not [start, stop, weight]", item)
        start, stop, weight = (_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not 0 <= start < stop:
            raise BadField(where, "start and stop are no characters of a text", item)
        spans.append(Span(int(start), int(stop), weight))
    return spans


def _one_each(row: Mapping[str, Any], name: str, count: int, what: str) -> Sequence[Any] | None:
    """A column with one item a response, or None where the row has none."""
    values = _parsed(name, row.get(name))
    if values is None:
        return None
    if not _is_sequence(values) or len(values) != count:
        found = len(values) if _is_sequence(values) else 1
        raise BadField(name, f"{found} {what} for {count} responses", values)
    return values


def _spans(row: Mapping[str, Any], name: str, count: int) -> list[list[Span]] | None:
    values = _one_each(row, name, count, "lists of spans")
    if values is None:
        return None
    return [_spans_of(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _numbers(row: Mapping[str, Any], name: str, order: Sequence[int]) -> list[np.ndarray]:
    """Finite numbers, an array a response, best first."""
    values = _one_each(row, name, len(order), "lists of numbers") or ()
    arrays = []
    for i in order:
        where = f"{name}[{i}]"
        if not _is_sequence(values[i]):
            raise BadField(where, "not a list of numbers", values[i])
        try:
            array = np.asarray(values[i], dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadField(where, f"not a list of numbers: {error}") from error
        if array.ndim != 1 or not np.isfinite(array).all():
            raise BadField(where, "not a list of finite numbers", values[i])
        arrays.append(array)
    return arrays


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, str):  # CSV has no bools
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if not isinstance(value, (bool, np.bool_)):
        raise BadField(name, "neither true nor false", value)
    return bool(value)


def _cohort(value: Any) -> int:
    """A number for a population's name, the same in every process; 3.0 is 3."""
    if isinstance(value, (float, np.floating)) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise BadField("group", "a number of more than 64 bits", value)
        return int(value)
    if not isinstance(value, str):
        raise BadField("group", "neither a name nor a whole number", value)
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")


def _grades(row: Mapping[str, Any], name: str, count: int) -> list[Any] | None:
    values = _one_each(row, name, count, name)
    if values is None:
        return None
    return [_number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _ranked_list(row: Mapping[str, Any]) -> Example:
    values = _parsed("responses", row["responses"])
    if not _is_sequence(values):
        raise BadField("responses", "not a list of responses", values)
    if len(values) < 2:
        raise BadField("responses", "a list needs at least two responses", values)
    names = [f"responses[{i}]" for i in range(len(values))]
    responses = [_content(name, value) for name, value in zip(names, values, strict=True)]
    scores = _grades(row, "scores", len(values))
    given = _grades(row, "ranks", len(values))
    if scores is not None and given is not None:
        raise BadField("ranks", "give either scores or ranks, not both", given)
    if scores is not None:
        badness = -np.array(scores)
    elif given is not None:
        badness = np.array(given)
    else:
        badness = np.arange(len(values))
    order = np.argsort(badness, kind="stable")
    spans = _spans(row, "spans", len(values))
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


def _pair_scores(row: Mapping[str, Any]) -> list[float | None]:
    scores = _grades(row, "scores", 2) or [None, None]
    for i, name in enumerate(("score_chosen", "score_rejected")):
        if name in row:
            scores[i] = _number(name, row[name])
    return scores


def _pair(row: Mapping[str, Any]) -> Example:
    names = ["chosen", "rejected"]
    responses = [_content(name, row.get(name)) for name in names]
    spans = [_spans_of(f"{name}_spans", row.get(f"{name}_spans")) for name in names]
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
    completion, label = _content("completion", row["completion"]), row.get("label")
    if label is None:
        raise BadField("label", f"missing: {_LABEL}")
    if isinstance(label, str):  # CSV has no bools
        label = {"true": True, "false": False}.get(label.lower(), label)
    if not isinstance(label, (bool, np.bool_)):
        raise BadField("label", f"not a bool: {_LABEL}", label)
    spans = _spans_of("spans", row.get("spans"))
    return Example(
        prompt=None,
        responses=[completion],
        names=["completion"],
        labels=[bool(label)],
        ranks=[0],
        scores=[None],
        spans=[spans] if spans else None,
    )


def joined_chunks(chunks: Sequence[str], question: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a prompt: chunks, then the question; and the characters of each chunk."""
    text, spans = "", []
    for chunk in chunks:
        spans.append((len(text), len(text) + len(chunk)))
        text += f"{chunk}\n\n"
    return text + question, spans


def _logo(row: Mapping[str, Any]) -> Example:
    def text(part: str) -> str:
        name = next((name for name in LOGO[part] if name in row), LOGO[part][0])
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadField(name, "missing or not text", value)
        return value

    chunks = _parsed("all_ref_text", row["all_ref_text"])
    if not _is_sequence(chunks) or not all(isinstance(c, str) and c.strip() for c in chunks):
        raise BadField("all_ref_text", "not a list of texts", chunks)
    prompt, spans = joined_chunks(chunks, text("question"))
    return Example(
        prompt=[{"role": "user", "content": prompt}],
        responses=[
            [{"role": "assistant", "content": text(part)}]
            for part in ("chosen", "partial", "wrong")
        ],
        names=["final_answer", "prefix_a", "suffix_a"],
        labels=[True, False, False],
        ranks=[0, 1, 1],  # the two may be alike
        scores=[None, None, None],
        ranked=True,
        chunk_spans=spans,
    )


def _token_rows(row: Mapping[str, Any], side: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each sequence in a side's columns: ids [T] int32, and which of them are scored [T] bool.

    A column holds one sequence or a list of them; what `attention_mask` hides is left out.
    """

    def column(kind: str) -> list[np.ndarray]:
        name = f"{side}_{kind}"
        value = _parsed(name, row.get(name))
        if value is None:
            raise BadField(name, "missing")
        nested = _is_sequence(value) and len(value) and _is_sequence(value[0])
        arrays = []
        for i, item in enumerate(value if nested else [value]):
            try:
                array = np.asarray(item)
            except ValueError:  # lists of several lengths
                array = np.zeros(())
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise BadField(f"{name}[{i}]" if nested else name, "no list of integers", item)
            arrays.append(array)
        return arrays

    ids, labels = column("input_ids"), column("labels")
    masks = column("attention_mask") if f"{side}_attention_mask" in row else map(np.ones_like, ids)
    found = []
    for i, (own, label, mask) in enumerate(itertools.zip_longest(ids, labels, masks)):
        where = f"[{i}]" if len(ids) > 1 else ""
        sizes = [0 if each is None else len(each) for each in (own, label, mask)]
        if len(set(sizes)) != 1:
            reason = "{} tokens, {} labels and a mask of {}".format(*sizes)
            raise BadField(f"{side}_input_ids{where}", reason)
        own, label = own[mask != 0], label[mask != 0]
        scored = label != UNSCORED
        wrong = np.flatnonzero(scored & (label != own))
        if len(wrong):
            reason = f"label {wrong[0]} is neither the token in its place nor {UNSCORED}"
            raise BadField(f"{side}_labels{where}", reason, int(label[wrong[0]]))
        if len(own) and not 0 <= own.min() <= own.max() < 2**31:
            raise BadField(f"{side}_input_ids{where}", "not all are token ids")
        found.append((own.astype(np.int32), scored))
    return found


def _longpo(row: Mapping[str, Any]) -> Example:
    prompts, responses = [], []
    for side in SIDES:
        found = _token_rows(row, side)
        if len(found) != 1:
            raise BadField(f"{side}_input_ids", f"{len(found)} sequences where a row has one")
        ids, scored = found[0]
        places = np.flatnonzero(scored)
        if not len(places) or not places[0]:
            reason = "no token is scored" if not len(places) else "no token before the first answer"
            raise BadField(f"{side}_labels", reason)
        start, stop = places[0], places[-1] + 1
        prompts.append(ids[:start])
        # Copies: a view would keep the rejected side's document in memory.
        responses.append((ids[start:stop].copy(), scored[start:stop].copy()))
    if not np.array_equal(*prompts):
        raise BadField(
            "rejected_input_ids", "not those of chosen_input_ids before the first answer"
        )
    return Example(
        prompt=None,
        responses=[],
        names=[f"{side}_input_ids" for side in SIDES],
        labels=[True, False],
        ranks=[0, 1],
        scores=[None, None],
        tokens=Tokens(prompts[0], responses),
    )


def _turns(row: Mapping[str, Any], tokens: Tokens) -> list[Turn]:
    """The answers of both responses in order, each after the prompt of its short row."""
    turns = []
    for side, (ids, scored) in zip(SIDES, tokens.responses, strict=True):
        answers = np.split(ids, np.flatnonzero(np.diff(scored)) + 1)[::2]  # every other is context
        short, name = _token_rows(row, f"ref_{side}"), f"ref_{side}_input_ids"
        if len(short) != len(answers):
            reason = f"{len(short)} short rows for the {len(answers)} answers in {side}_labels"
            raise BadField(name, reason)
        for i, (answer, (own, marked)) in enumerate(zip(answers, short, strict=True)):
            # The row may end with more: its tokenizer was asked for the header of a next answer.
            start = int(marked.argmax())
            if not start or not np.array_equal(own[start : start + len(answer)], answer):
                reason = f"its labels do not begin with answer {i} of {side}_input_ids"
                raise BadField(f"{name}[{i}]", reason)
            # The rejected answer's page is as a rule the chosen one's, and kept once.
            page = twin = own[:start]
            if i < len(turns):
                twin = turns[i].prompt
            turns.append(Turn(f"{name}[{i}]", twin if np.array_equal(page, twin) else page, answer))
    return turns


def _chunk_spans(value: Any) -> list[tuple[int, int]]:
    """Intervals in order, written as [start, stop]."""
    value = _parsed("chunk_spans", value)
    if not _is_sequence(value) or not len(value):
        raise BadField("chunk_spans", "not a list of [start, stop]", value)
    spans, end = [], 0
    for i, item in enumerate(value):
        where = f"chunk_spans[{i}]"
        if not _is_sequence(item) or len(item) != 2:
            raise BadField(where, "not [start, stop]", item)
        start, stop = (_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not end <= start < stop:
            raise BadField(where, "empty, or begins before the one in front of it ends", item)
        spans.append((int(start), end := int(stop)))
    return spans


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = _parsed("chat_template_kwargs", row.get("chat_template_kwargs", {}))
    if not isinstance(kwargs, Mapping):
        raise BadField("chat_template_kwargs", "not a dict", kwargs)
    tools = _parsed("tools", row.get("tools"))
    # An empty list makes some templates write an empty tool section.
    return {**kwargs, **({"tools": tools} if tools else {})}


def _check(example: Example) -> None:
    """What holds for every format: one kind of content, nothing empty, no contradiction."""
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
    prompt = example.prompt
    if prompt is None:
        return
    _check_prompt("prompt", prompt, example.conversational)
    repeated = [r[: len(prompt)] == prompt for r in example.responses]
    if example.conversational and all(repeated):
        raise BadField(
            example.names[0],
            "repeats the prompt's messages: keep only the answer, or drop the prompt column",
            example.responses[0],
        )


def _check_prompt(name: str, prompt: Content, conversational: bool) -> None:
    if isinstance(prompt, str) == conversational:
        reason = (
            "text, but the responses are messages: write it as messages, or drop the column if the "
            "responses begin with it"
            if isinstance(prompt, str)
            else "messages, but the responses are text"
        )
        raise BadField(name, reason, prompt)
    if conversational and not prompt:
        raise BadField(name, "no messages", prompt)


def check_distinct(names: Sequence[str], ranks: Sequence[int], contents: Sequence[Any]) -> None:
    """Equal responses with different ranks contradict each other, so they raise BadField."""
    for i, content in enumerate(contents):
        for j in range(i):
            if contents[j] == content and ranks[i] != ranks[j]:
                raise BadField(names[i], f"identical to {names[j]}, which is ranked higher")


def _single_score(row: Mapping[str, Any]) -> list[float | None]:
    return [_number("score", row["score"]) if "score" in row else None]


# A list's grades order it; here nothing but an objective reads them.
_GRADES_OF = {_pair: _pair_scores, _longpo: _pair_scores, _single: _single_score}
FORMATS = {
    "chosen": _pair,
    "rejected": _pair,
    "responses": _ranked_list,
    "completion": _single,
    "all_ref_text": _logo,
}
TOKENISED = dict.fromkeys([f"{side}_input_ids" for side in SIDES], _longpo)


def read_row(
    row: Any,
    extras: Sequence[str] = (),
    prompts: Sequence[str] = (),
    needs: Collection[str] | None = None,
    chunks: bool = False,
) -> Example:
    """A row of any format as an Example; unknown columns and None values are ignored.

    Args:
        row: the columns.
        extras: names those columns of `EXTRAS` that are wanted; a row must then have them.
        prompts: columns with other prompts, likewise.
        needs: what an objective reads of `score`, `margin`, `cohort` (the column `group`) and
            `token_rewards`: there a column that says something else is an error, and the others
            are not looked at. None: they are taken where they can be.
        chunks: whether `chunk_spans` are read.

    Raises:
        BadField: naming the field, the reason and the value.
    """
    if not isinstance(row, Mapping):
        raise BadField("row", "not a dict of columns", row)
    present = {
        key: value
        for key, value in row.items()
        if value is not None
        and not (key in _NO_TEXT and isinstance(value, str) and not value.strip())
    }

    def taken(need: str, read: Callable[..., T], *args: Any) -> T | None:
        if needs is not None:
            return read(*args) if need in needs else None
        try:
            return read(*args)
        except BadField:
            return None

    # Text wins: token ids beside it are what another trainer made of it.
    formats = FORMATS if FORMATS.keys() & present.keys() else TOKENISED
    found = [key for key in formats if key in present]
    if len({formats[key] for key in found}) != 1:
        reason = "more than one format" if found else "no known format"
        raise BadField(
            ", ".join(found) or "columns",
            f"{reason}: need chosen + rejected, or prompt + completion + label, or prompt + "
            "responses",
            sorted(present),
        )
    example = formats[found[0]](present)
    if (grades := _GRADES_OF.get(formats[found[0]])) is not None:
        example.scores = taken("score", grades, present) or example.scores
    if "prompt" in present:
        example.prompt = _content("prompt", present["prompt"])
    if chunks and "chunk_spans" in present:
        example.chunk_spans = _chunk_spans(present["chunk_spans"])
    for name in ("append_eos", "continue_final_message"):
        if name in present:
            setattr(example, name, _switch(name, present[name]))
    if "weight" in present:
        example.weight = _weight(present["weight"])
    if "margin" in present:
        example.margin = taken("margin", _number, "margin", present["margin"])
    if "group" in present:
        example.cohort = taken("cohort", _cohort, present["group"])
    order = example.order or range(len(example.names))
    if "token_weights" in present:
        example.per_token["token_weights"] = _numbers(present, "token_weights", order)
    if "token_rewards" in present:
        rewards = taken("token_rewards", _numbers, present, "token_rewards", order)
        if rewards is not None:
            example.per_token["token_rewards"] = rewards
    if example.tokens is not None:
        columns = [name for name in SPANS if name in present]
        columns += [name for name in (*EXTRAS, *prompts) if name in (*extras, *prompts)]
        for name in columns:
            if name != "short_prompt":
                raise BadField(name, "not for rows of token ids: give the row as text")
        if "short_prompt" in prompts:
            example.turns = _turns(present, example.tokens)
        return example
    for role in extras:
        if role in EXTRAS:
            example.extras[role] = _content(role, present.get(role))
    for name in prompts:
        example.prompts[name] = _content(name, present.get(name))
    if example.conversational:
        example.template_kwargs = _template_kwargs(present)
    _check(example)
    return example
