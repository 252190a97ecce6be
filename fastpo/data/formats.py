"""What a row says: prompt, responses best first, grades and weight, whatever columns it came in.

Nothing here knows a tokenizer. `docs/data.md` shows each format with an example.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.dialects import DIALECTS, PROMPTS, SIDES, Columns, Reading
from fastpo.data.messages import (
    BESIDE_CONTENT,
    Content,
    Messages,
    assistant,
    common_messages,
    content_of,
    is_sequence,
    message_text,
    parsed,
    plain,
    turns_of,
    user,
)

T = TypeVar("T")

EXTRAS = ("gold", "ref_response")
"""Columns with a further response that is no candidate."""

CONTEXTS = {
    "context_chosen": ("context_prompt", 0),
    "context_rejected": ("context_prompt", -1),
    "bare_chosen": ("bare_prompt", 0),
    "bare_rejected": ("bare_prompt", -1),
}
"""Role -> the column with the other prompt, and the candidate that is scored after it."""

PROMPT_COLUMNS = ("short_prompt", *dict.fromkeys(column for column, _ in CONTEXTS.values()))
"""Columns with a further prompt."""

PER_TOKEN = ("token_weights", "token_rewards")
"""Columns with a list a response of one number a token."""

SPANS = ("spans", "chosen_spans", "rejected_spans", "chunk_spans")

_LABEL = "true for a good completion, false for a bad one"
_WORDS = {
    **dict.fromkeys(("true", "yes", "good", "1", "1.0", "desirable", "up"), True),
    **dict.fromkeys(("false", "no", "bad", "0", "0.0", "undesirable", "down"), False),
}
# An empty cell, or an empty text in a column of lists and numbers, is how files write "absent".
_NO_TEXT = {
    *("system", "weight", "margin", "group", "label", "tools", "chat_template_kwargs"),
    *("append_eos", "continue_final_message"),
    *("scores", "score", "score_chosen", "score_rejected", "ranks", *PER_TOKEN, *SPANS),
}

# Columns that every dialect may have; an objective or option that needs one reads it.
_OPTIONAL = {*_NO_TEXT, *EXTRAS, *PROMPT_COLUMNS}
_OPTIONAL -= {"label", "ranks"}
KNOWN = _OPTIONAL.union(*(dialect.columns for dialect in DIALECTS.values()))
"""Every column that something reads."""

# What files call the grades of a pair's responses, beside `scores`.
_FORMS = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "{}_avg_rating")
_PAIR_SCORES = {side: [form.format(side) for form in _FORMS] for side in SIDES}

_OPTIONAL_OF_PAIRS = _OPTIONAL.union(*_PAIR_SCORES.values())

# Columns of LOGO's official code, after its post-processing (arXiv 2410.18533).
LOGO = {
    "chunks": ("all_ref_text",),
    "question": ("combined_question",),
    "chosen": ("final_answer",),
    "partial": ("prefix_a",),  # the answer to half of the critical chunks
    "wrong": ("suffix_a", "siffix_a"),  # to none of them; one of its scripts misspells it
}


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


@dataclass
class Example:
    """A row before tokenisation, or with `tokens`. Lists run over the K responses, best first."""

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
    fields: dict[str, str] = field(default_factory=dict)  # column -> its name in the file
    tokens: Tokens | None = None  # then there is no text: no prompt and no responses
    turns: list[Turn] | None = None  # of `tokens`, the scored tokens in order, for the reference

    @property
    def conversational(self) -> bool:
        return not isinstance(self.responses[0], str)

    @property
    def is_pair(self) -> bool:
        """Whether there are a chosen and a rejected response, and no list."""
        return self.labels == [True, False] and not self.ranked

    def parts(self) -> tuple[Content | None, list[Content]]:
        """The prompt and the responses behind it; None where a text's tokens imply the prompt."""
        if self.prompt is None and self.tokens is None and self.conversational:
            responses: Any = self.responses
            border = common_messages(responses)
            return responses[0][:border], [response[border:] for response in responses]
        return self.prompt, self.responses


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
    value = [] if value is None else parsed(name, value)
    if not is_sequence(value):
        raise BadField(name, "not a list of [start, stop, weight]", value)
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        if not is_sequence(item) or len(item) != 3:
            raise BadField(where, "not [start, stop, weight]", item)
        start, stop, weight = (_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not 0 <= start < stop:
            raise BadField(where, "start and stop are no characters of a text", item)
        spans.append(Span(int(start), int(stop), weight))
    return spans


def _one_each(row: Mapping[str, Any], name: str, count: int, what: str) -> Sequence[Any] | None:
    """A column with one item a response, or None where the row has none."""
    values = parsed(name, row.get(name))
    if values is None:
        return None
    if not is_sequence(values) or len(values) != count:
        found = len(values) if is_sequence(values) else 1
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
        if not is_sequence(values[i]):
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
    said = {"true": True, "false": False}.get(str(value).strip().lower())  # CSV has no bools
    if said is None:
        raise BadField(name, "neither true nor false", value)
    return said


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


_FOR_PAIRS = "of pairs: those of other rows are in `spans`", "chosen_spans", "rejected_spans"


def _unfit_spans(row: Mapping[str, Any], reason: str, *names: str) -> None:
    for name in names:
        value = parsed(name, row.get(name))
        if value is not None and not (is_sequence(value) and not len(value)):
            raise BadField(name, reason, value)


def _ranked_list(row: Mapping[str, Any]) -> Example:
    values = parsed("responses", row["responses"])
    if not is_sequence(values):
        raise BadField("responses", "not a list of responses", values)
    _unfit_spans(row, *_FOR_PAIRS)
    if len(values) < 2:
        raise BadField("responses", "a list needs at least two responses", values)
    names = [f"responses[{i}]" for i in range(len(values))]
    responses = [content_of(name, value) for name, value in zip(names, values, strict=True)]
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
    for i, side in enumerate(SIDES):
        for name in _PAIR_SCORES[side]:
            if name in row:
                scores[i] = _number(name, row[name])
                break
    return scores


def _pair(row: Mapping[str, Any]) -> Example:
    names = ["chosen", "rejected"]
    responses = [content_of(name, row.get(name)) for name in names]
    spans = [_spans_of(f"{name}_spans", row.get(f"{name}_spans")) for name in names]
    _unfit_spans(
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
    _unfit_spans(row, *_FOR_PAIRS)
    spans = _spans_of("spans", row.get("spans"))
    return Example(
        prompt=None,
        responses=[completion],
        names=["completion"],
        labels=[good],
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

    chunks = parsed("all_ref_text", row["all_ref_text"])
    if not is_sequence(chunks) or not all(isinstance(c, str) and c.strip() for c in chunks):
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
        value = parsed(name, row.get(name))
        if value is None:
            raise BadField(name, "missing")
        nested = is_sequence(value) and len(value) and is_sequence(value[0])
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
    value = parsed("chunk_spans", value)
    if not is_sequence(value) or not len(value):
        raise BadField("chunk_spans", "not a list of [start, stop]", value)
    spans, end = [], 0
    for i, item in enumerate(value):
        where = f"chunk_spans[{i}]"
        if not is_sequence(item) or len(item) != 2:
            raise BadField(where, "not [start, stop]", item)
        start, stop = (_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not end <= start < stop:
            raise BadField(where, "empty, or begins before the one in front of it ends", item)
        spans.append((int(start), end := int(stop)))
    return spans


def _tools_of(value: Any) -> list[Any]:
    """Tools beside text; a word in a column of that name is none of ours."""
    try:
        value = plain(parsed("tools", value))
    except BadField:
        return []
    return value if isinstance(value, list) else []


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = parsed("chat_template_kwargs", row.get("chat_template_kwargs", {}))
    if not isinstance(kwargs, Mapping):
        raise BadField("chat_template_kwargs", "not a dict", kwargs)
    tools = parsed("tools", row.get("tools"))
    # An empty list makes some templates write an empty tool section.
    tools = plain(tools)
    return {**plain(kwargs), **({"tools": tools} if tools else {})}


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
    if example.prompt is not None:
        _check_prompt("prompt", example.prompt, example.conversational)


def _check_prompt(name: str, prompt: Content, conversational: bool) -> None:
    if isinstance(prompt, str) == conversational:
        kinds = ("messages", "text") if isinstance(prompt, str) else ("text", "messages")
        raise BadField(name, f"{kinds[1]}, but the responses are {kinds[0]}", prompt)


def check_distinct(names: Sequence[str], ranks: Sequence[int], contents: Sequence[Any]) -> None:
    """Equal responses with different ranks contradict each other, so they raise BadField."""
    for i, content in enumerate(contents):
        for j in range(i):
            if contents[j] == content and ranks[i] != ranks[j]:
                raise BadField(names[i], f"identical to {names[j]}, which is ranked higher")


def _single_score(row: Mapping[str, Any]) -> list[float | None]:
    return [_number("score", row["score"]) if "score" in row else None]


FORMATS = {
    "chosen": _pair,
    "rejected": _pair,
    "responses": _ranked_list,
    "completion": _single,
    "all_ref_text": _logo,
}
TOKENISED = dict.fromkeys([f"{side}_input_ids" for side in SIDES], _longpo)


def _whole(name: str, reading: Reading) -> Example:
    """The prompt and the responses of a row in fastpo's own columns."""
    row = reading.columns
    # Text wins: token ids beside it are what another trainer made of it.
    formats = FORMATS if FORMATS.keys() & row.keys() else TOKENISED
    named = [key for key in formats if key in row]
    if len({formats[key] for key in named}) != 1:
        found = [reading.names.get(key, key) for key in named]
        reason = f"no row of the dialect {name}: need {DIALECTS[name].shape}"
        if named:
            reason = f"answers of more than one format: `columns: {{{found[-1]}: null}}` drops some"
        raise BadField(", ".join(found) or "columns", reason, sorted(reading.row))
    example = formats[named[0]](row)
    if "prompt" in row:
        example.prompt = content_of("prompt", row["prompt"])
    return example


def _converse(example: Example, system: Any, turns: bool) -> None:
    """Make messages of texts where a row is, or should be, a conversation.

    Args:
        example: changed in place.
        system: the system message, or None.
        turns: texts are turns of a conversation.
    """
    contents = [example.prompt, *example.responses, *example.extras.values()]
    contents += example.prompts.values()
    texts = all(isinstance(content, (str, type(None))) for content in contents)
    if texts and not turns and system is None:
        return
    if texts and example.prompt is None:
        reason = "missing: a conversation is not divided by the words that its texts have in common"
        raise BadField("prompt", f"{reason}; `columns: {{prompt: NAME}}` names its column")
    # In HH's form the prompt ends with `Assistant:`, and a response may go on with further turns.
    hh = isinstance(example.prompt, str) and turns_of(example.prompt) is not None
    if hh:
        _no_spans(example)

    def spoken(content: Content) -> Messages:
        if not isinstance(content, str):
            return content
        return (turns_of(f"\n\nAssistant:{content}") or []) if hh else [assistant(content)]

    example.responses = [spoken(response) for response in example.responses]
    example.extras = {role: spoken(response) for role, response in example.extras.items()}
    for name, response in zip(example.names, example.responses, strict=True):
        if not response:
            raise BadField(name, "empty response")
    if isinstance(example.prompt, str):
        example.prompt = _asked(example, example.prompt)
    example.prompts = {
        name: (turns_of(text) or [user(text)]) if isinstance(text, str) else text
        for name, text in example.prompts.items()
    }
    if example.prompt:
        _answers_alone(example, example.prompt)
    if system is not None:
        _begin_with(example, system)


def _no_spans(example: Example) -> None:
    for name, spans in zip(example.names, example.spans or (), strict=False):
        if spans:
            column = f"{name}_spans" if name in SIDES else "spans"
            reason = "count characters of a text that is divided here: give the row as messages"
            raise BadField(column, reason)


def _asked(example: Example, text: str) -> Messages | None:
    """The messages of a prompt given as text; None where nothing is left behind them."""
    responses: Any = example.responses
    if any(response[0]["role"] == "assistant" for response in responses):
        return turns_of(text) or [user(text)]
    single = len(responses) == 1
    begin = responses[0][: -1 if single else common_messages(responses)]
    if not any(m["role"] == "user" and message_text(m).strip() == text.strip() for m in begin):
        raise BadField(
            "prompt",
            "no user message that the responses begin with says this: `columns: {prompt: null}` "
            "drops the column",
            text,
        )
    return begin if all(len(response) > len(begin) for response in responses) else None


def _answers_alone(example: Example, prompt: Messages) -> None:
    """Drop the prompt from responses that are whole conversations."""
    size = len(prompt)

    def alone(name: str, response: Any) -> Any:
        if response[:size] == prompt:
            response = response[size:]
        first = response[0]["role"] if response else None
        if prompt[-1]["role"] == "user" and first in ("user", "system", "developer"):
            raise BadField(
                name, f"begins with the {first}'s message, not with the prompt's", response
            )
        return response

    pairs = zip(example.names, example.responses, strict=True)
    example.responses = [alone(name, response) for name, response in pairs]
    example.extras = {role: alone(role, response) for role, response in example.extras.items()}


def _begin_with(example: Example, system: Any) -> None:
    """Put a system message before every conversation of the row."""
    if not isinstance(system, str):
        raise BadField("system", "not text: `columns: {system: null}` drops it", system)

    def begun(messages: Any) -> Any:
        if messages and messages[0]["role"] in ("system", "developer"):
            if message_text(messages[0]).strip() == system.strip():
                return messages
            reason = "the messages begin with another system message: `columns: {system: null}` "
            raise BadField("system", reason + "drops this one", system)
        return [{"role": "system", "content": system}, *messages]

    if example.prompt is None:
        example.responses = [begun(response) for response in example.responses]
        example.extras = {role: begun(response) for role, response in example.extras.items()}
    else:
        example.prompt = begun(example.prompt)
    example.prompts = {name: begun(prompt) for name, prompt in example.prompts.items()}


def _end_of_hh(example: Example) -> None:
    """Drop the prompt from further responses, which are whole conversations as the others."""
    _no_spans(example)
    prompt: Any = example.prompt
    for role, content in example.extras.items():
        if not isinstance(content, str) or not content.startswith(prompt):
            reason = "does not begin with what chosen and rejected begin with"
            raise BadField(role, reason, content)
        example.extras[role] = content[len(prompt) :]


def _read_as(
    name: str,
    reading: Reading,
    columns: Columns,
    extras: Sequence[str],
    prompts: Sequence[str],
) -> Example:
    """A row as one dialect reads it, with further responses and prompts."""
    dialect, row = DIALECTS[name], reading.row
    dialect.read(reading)
    # What the dialect made of its own columns wins over an optional one of that name.
    reading.columns = {k: v for k, v in row.items() if k in _OPTIONAL} | reading.columns
    try:
        example = _whole(name, reading)
        if example.tokens is not None:
            return example
        example.extras = {
            role: content_of(role, row.get(role)) for role in extras if role in EXTRAS
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
            _end_of_hh(example)
        turns = dialect.turns or columns.text_as_messages
        _converse(example, reading.columns.get("system"), turns)
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
    """The dialect that reads a row: several may claim it who read the same."""
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
    """A row of any dialect as an Example; None values count as absent.

    Args:
        row: the columns.
        extras: names those columns of `EXTRAS` that are wanted; a row must then have them.
        prompts: columns with other prompts, likewise.
        needs: what an objective reads of `score`, `margin`, `cohort` (the column `group`) and
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
        and not (key in _NO_TEXT and isinstance(value, str) and not value.strip())
    }

    name, reading, example = _recognised(present, columns, extras, prompts)
    example.dialect = name
    optional = _OPTIONAL_OF_PAIRS if example.is_pair else _OPTIONAL
    columns.check_unread(name, reading, optional, prompts)
    names = {column: columns.taken.get(own, own) for column, own in reading.names.items()}
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
        example.chunk_spans = _chunk_spans(present["chunk_spans"])
    for switch in ("append_eos", "continue_final_message"):
        if switch in present:
            setattr(example, switch, _switch(switch, present[switch]))
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
        unfit = [column for column in SPANS if column in present]
        unfit += [column for column in (*EXTRAS, *prompts) if column in (*extras, *prompts)]
        for column in unfit:
            if column != "short_prompt":
                raise BadField(column, "not for rows of token ids: give the row as text")
        if "short_prompt" in prompts:
            example.turns = _turns(reading.row, example.tokens)
        return
    if example.conversational:
        example.template_kwargs = _template_kwargs(present)
    elif tools := _tools_of(present.get("tools")):
        reason = "a row of text has no chat template to write it: `text_as_messages: true` makes "
        reason += "messages of it, `columns: {tools: null}` drops the column"
        raise BadField("tools", reason, tools)
    _check(example)
