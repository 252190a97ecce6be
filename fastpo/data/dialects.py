"""Whose columns a row has: a table of readers, one a dialect, which write fastpo's own columns.

A dialect is a small function and a line of `DIALECTS`: how a row is recognised, by its columns and
their types, and how its prompt and responses become the columns of `fastpo.data.formats`. A row
that two dialects would read differently is refused, and the option `dialect` decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

from fastpo.data.bad_rows import BadField
from fastpo.data.messages import (
    assistant,
    content_of,
    is_sequence,
    parsed,
    plain,
    speaks_as_hh,
    split_hh,
    user,
)

Row: TypeAlias = Mapping[str, Any]

SIDES = ("chosen", "rejected")
PAIRED = tuple(f"{side}_response" for side in SIDES)

# Columns that say what is asked. Whoever leaves one of them unread trains after another prompt.
PROMPTS = {
    *("question", "questions", "instruction", "instructions", "input", "inputs", "query"),
    *("messages", "conversation", "conversations", "context", "problem", "task", "user"),
    *("history", "text", "post", "article", "passage", "document"),
}

_ASKED = frozenset(("prompt", "question", "instruction", "input"))

# Columns with something to train on that no reader reads.
_UNREAD = re.compile(
    r"(.+_)?(image|video|audio)s?|objects|(chosen|rejected)_(tools|prompt)|system_prompt"
)


class Reading:
    """Hold a row on its way to fastpo's own columns.

    Attributes:
        columns: what the row says, in the columns of `fastpo.data.formats`.
        names: fastpo's column -> the row's own name, for messages.
        used: the row's columns that were read.
        inside: what stands in a column beside what was read there, under the place's name.
    """

    def __init__(self, row: Row):
        self.row = row
        self.columns: dict[str, object] = {}
        self.names: dict[str, str] = {}
        self.used: set[str] = set()
        self.inside: dict[str, object] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.row

    def get(self, name: str) -> Any:
        """Return a column of the row, and note that it was read."""
        self.used.add(name)
        return self.row.get(name)

    def put(self, column: str, value: Any, name: str) -> None:
        """Set one of fastpo's columns; `name` says where its value stands in the row."""
        self.names[column] = name
        if value is not None:
            self.columns[column] = value

    def take(self, column: str, *names: str) -> None:
        """Set one of fastpo's columns to the first of `names` that the row has."""
        for name in names or (column,):
            if name in self.row:
                self.put(column, self.get(name), name)
                return
        self.names[column] = (names or (column,))[0]


@dataclass(frozen=True)
class Dialect:
    """Say how the rows of some tools are recognised and read.

    Args:
        tools: who writes such rows.
        shape: the columns that are read; `?` follows those that may be missing, `/` parts names
            of one thing, `;` rows of another kind.
        claims: says whether a row looks like one of these.
        read: fills a `Reading`.
        turns: whether texts are turns of a conversation, which a chat template renders.
    """

    tools: str
    shape: str
    claims: Callable[[Row], bool]
    read: Callable[[Reading], None]
    turns: bool = True

    @cached_property
    def columns(self) -> frozenset[str]:
        """Return the names in the shape."""
        return frozenset(re.findall(r"\w+", self.shape))

    @cached_property
    def optional(self) -> frozenset[str]:
        """Return the names that may be missing."""
        return frozenset(re.findall(r"(\w+)\?", self.shape))


def _has(row: Row, *names: str) -> bool:
    return all(name in row for name in names)


def _pair(row: Row) -> bool:
    return _has(row, *SIDES) or _has(row, *PAIRED)


def _answers(row: Row) -> bool:
    """Return whether a row has responses: a pair, or without `prompt` a list or a single one."""
    return _pair(row) or ("prompt" not in row and ("responses" in row or "completion" in row))


def _asks(row: Row) -> bool:
    """Return whether `messages` are a prompt: with an answer at the end they are more."""
    try:
        content = content_of("messages", row.get("messages"))
    except BadField:
        return False
    return isinstance(content, str) or (len(content) > 0 and content[-1]["role"] != "assistant")


def _take_responses(reading: Reading) -> None:
    """Take responses from columns of fastpo's own names, or nearly."""
    for side in SIDES:
        reading.take(side, side, f"{side}_response")
    for column in ("responses", "scores", "completion"):
        reading.take(column)
    # Beside a pair these say something else, if anything.
    if "responses" in reading:
        reading.take("ranks")
    if "completion" in reading:
        reading.take("label")


def _split_answer(reading: Reading, name: str) -> tuple[Any, Any]:
    """Split a conversation into the messages before its last and that one, the answer."""
    messages = content_of(name, parsed(name, reading.get(name)))
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadField(name, "not messages that end with the assistant's answer", reading.row[name])
    return messages[:-1], messages[-1:]


# --- the readers ---------------------------------------------------------------------------------


def _trl(reading: Reading) -> None:
    reading.take("prompt")
    _take_responses(reading)


def _trl_claims(row: Row) -> bool:
    if not any(name in row for name in (*SIDES, "responses", "completion")):
        return False
    if "initial_reason_steps" in row:
        return False
    others = (dialect for name, dialect in DIALECTS.items() if name != "trl")
    return "prompt" in row or not any(dialect.claims(row) for dialect in others)


def _hh(reading: Reading) -> None:
    for side in SIDES:
        if not isinstance(reading.get(side), str):
            raise BadField(side, "missing or not text", reading.row.get(side))
    chosen, rejected = (reading.row[side] for side in SIDES)
    prompt, chosen, rejected = split_hh("rejected", chosen, rejected)
    reading.put("prompt", prompt, "chosen")
    reading.put("chosen", chosen, "chosen")
    reading.put("rejected", rejected, "rejected")


def _hh_claims(row: Row) -> bool:
    return "prompt" not in row and all(speaks_as_hh(row.get(side)) for side in SIDES)


def _openai(reading: Reading) -> None:
    asked = plain(parsed("input", reading.get("input")))
    if not isinstance(asked, Mapping):
        raise BadField("input", "not a dict of messages and tools", asked)
    reading.put("prompt", asked.get("messages"), "input.messages")
    if asked.get("tools"):
        if "tools" in reading:
            raise BadField("tools", "beside input.tools: give one of the two", reading.row["tools"])
        reading.put("tools", asked["tools"], "input.tools")
    known = ("messages", "tools")
    reading.inside = {f"input.{key}": value for key, value in asked.items() if key not in known}
    reading.take("chosen", "preferred_output")
    reading.take("rejected", "non_preferred_output")


def _alpaca(reading: Reading) -> None:
    history = reading.get("history") or []
    if isinstance(history, str):
        history = parsed("history", history) if history.strip() else []
    if not is_sequence(history):
        raise BadField("history", "not a list of [user, assistant] texts", history)
    asked = [reading.get(name) for name in ("instruction", "input")]
    for name, text in zip(("instruction", "input"), asked, strict=True):
        if text is not None and not isinstance(text, str):
            raise BadField(name, "not text", text)
    prompt = []
    for turn in history:
        if not is_sequence(turn) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise BadField("history", "not a list of [user, assistant] texts", turn)
        prompt += [user(turn[0]), assistant(turn[1])]
    prompt.append(user("\n".join(text for text in asked if text)))
    reading.put("prompt", prompt if "instruction" in reading else None, "instruction")
    _take_responses(reading)
    if "kto_tag" in reading:
        reading.take("completion", "output")
        reading.take("label", "kto_tag")


def _sharegpt(reading: Reading) -> None:
    name = "messages" if _has(reading.row, "messages", "kto_tag") else "conversations"
    if "kto_tag" in reading or not _pair(reading.row):
        _take_responses(reading)
        prompt, answer = _split_answer(reading, name)
        reading.put("prompt", prompt, name)
        reading.put("completion", answer, name)
        reading.take("label", "kto_tag", "label")
        return
    reading.take("prompt", name)
    _take_responses(reading)


def _ms_swift(reading: Reading) -> None:
    prompt, answer = _split_answer(reading, "messages")
    if "label" in reading and not any(name in reading for name in _SWIFT_REJECTED):
        reading.put("prompt", prompt, "messages")
        reading.put("completion", answer, "messages")
        reading.take("label")
        return
    if _has(reading.row, *_SWIFT_REJECTED):
        raise BadField("rejected_messages", "beside rejected_response: give one of the two")
    if "rejected_response" not in reading:
        reading.put("chosen", prompt + answer, "messages")
        reading.take("rejected", "rejected_messages")
        return
    # A text stands for what follows the last question or tool; messages for all that follows the
    # last question, calls and what tools say to them too.
    rejected = content_of("rejected_response", reading.row["rejected_response"])
    asking = ("user", "tool") if isinstance(rejected, str) else ("user",)
    last = max((i for i, m in enumerate(prompt) if m["role"] in asking), default=-1)
    reading.put("prompt", prompt[: last + 1], "messages")
    reading.put("chosen", prompt[last + 1 :] + answer, "messages")
    reading.take("rejected", "rejected_response")


_SWIFT_REJECTED = ("rejected_response", "rejected_messages")


def _nemo(reading: Reading) -> None:
    reading.take("prompt", "context")
    completions = reading.get("completions")
    _ranked(reading, "completions", completions, "completion")


def _step_dpo(reading: Reading) -> None:
    begun = reading.get("initial_reason_steps")
    if begun is not None and not isinstance(begun, str):
        raise BadField("initial_reason_steps", "not text", begun)
    asked = content_of("prompt", reading.get("prompt"))
    prompt = [user(asked)] if isinstance(asked, str) else asked
    if begun:
        prompt = [*prompt, assistant(begun)]
        reading.put("continue_final_message", True, "initial_reason_steps")
    reading.put("prompt", prompt, "prompt")
    for side in SIDES:
        reading.take(side)
    if "append_eos" not in reading:  # another step follows
        reading.put("append_eos", False, "append_eos")


def _nectar(reading: Reading) -> None:
    reading.take("prompt")
    _ranked(reading, "answers", reading.get("answers"), "answer")


def _ranked(reading: Reading, name: str, items: Any, answer: str) -> None:
    items = plain(parsed(name, items))
    if not is_sequence(items) or not all(isinstance(item, Mapping) for item in items):
        raise BadField(name, f"not a list of {{{answer}, rank}}", items)
    for i, item in enumerate(items):
        if item.get("rank") is None:
            raise BadField(f"{name}[{i}]", "has no rank: the lower, the better", dict(item))
    reading.put("responses", [item.get(answer) for item in items], name)
    reading.put("ranks", [item["rank"] for item in items], name)


def _axolotl(reading: Reading) -> None:
    reading.take("prompt", "messages", "prompt", "question", "input", "instruction")
    _take_responses(reading)


def _orca(reading: Reading) -> None:
    reading.take("prompt", "question")
    _take_responses(reading)


def _distilabel(reading: Reading) -> None:
    reading.take("prompt", "instruction", "input")
    reading.take("responses", "generations")
    reading.take("scores", "ratings")


def _logo(reading: Reading) -> None:
    for column in DIALECTS["logo"].columns:
        reading.take(column)
    reading.used |= {"all_ref_ids", "prefix_id", "suffix_id", "label"}  # of other steps of its code


def _longpo(reading: Reading) -> None:
    kinds = ("input_ids", "labels", "attention_mask")
    for column in (
        f"{ref}{side}_{kind}" for ref in ("", "ref_") for side in SIDES for kind in kinds
    ):
        reading.take(column)


def _openai_claims(row: Row) -> bool:
    return "preferred_output" in row or "non_preferred_output" in row


def _axolotl_claims(row: Row) -> bool:
    if _asks(row) and _pair(row):
        return True
    if _has(row, *PAIRED):
        return any(name in row for name in ("prompt", "instruction", "question", "input"))
    return isinstance(row.get("input"), str) and "instruction" not in row and _answers(row)


DIALECTS: dict[str, Dialect] = {
    "trl": Dialect(
        "TRL, OpenRLHF, ultrafeedback_binarized",
        "prompt?, system?, chosen, rejected; prompt, completion, label; prompt?, responses, "
        "scores?, ranks?",
        _trl_claims,
        _trl,
        turns=False,
    ),
    "openai": Dialect(
        "OpenAI, Fireworks, Together",
        "input: {messages, tools?}, preferred_output, non_preferred_output",
        _openai_claims,
        _openai,
    ),
    "alpaca": Dialect(
        "LLaMA-Factory",
        "instruction, input?, system?, history?, chosen, rejected; instruction, output, kto_tag",
        lambda row: "instruction" in row and (_has(row, *SIDES) or _has(row, "output", "kto_tag")),
        _alpaca,
    ),
    "sharegpt": Dialect(
        "LLaMA-Factory",
        "conversations, system?, tools?, chosen, rejected; conversations / messages, kto_tag",
        lambda row: (
            ("conversations" in row and (_pair(row) or "kto_tag" in row or "label" in row))
            or _has(row, "messages", "kto_tag")
        ),
        _sharegpt,
    ),
    "ms_swift": Dialect(
        "ms-swift",
        "messages, rejected_response / rejected_messages; messages, label",
        lambda row: (
            "messages" in row
            and (any(name in row for name in _SWIFT_REJECTED) or "label" in row)
            and not _answers(row)
        ),
        _ms_swift,
    ),
    "nemo": Dialect(
        "NeMo-RL",
        "context, completions: [{rank, completion}]",
        lambda row: _has(row, "context", "completions"),
        _nemo,
    ),
    "axolotl": Dialect(
        "axolotl, Argilla, older NeMo",
        "messages / prompt / question / input / instruction, system?, chosen / chosen_response, "
        "rejected / rejected_response",
        _axolotl_claims,
        _axolotl,
    ),
    "orca": Dialect(
        "Intel's orca_dpo_pairs",
        "system?, question, chosen, rejected",
        lambda row: "question" in row and _answers(row) and not _has(row, *PAIRED),
        _orca,
    ),
    "argilla": Dialect(
        "Argilla",
        "instruction, completion, label; instruction, responses",
        lambda row: "instruction" in row and _answers(row) and not _pair(row),
        _axolotl,
    ),
    "distilabel": Dialect(
        "distilabel",
        "instruction / input, generations, ratings",
        lambda row: (
            _has(row, "generations", "ratings") and ("instruction" in row or "input" in row)
        ),
        _distilabel,
    ),
    "nectar": Dialect(
        "Nectar",
        "prompt, answers: [{answer, rank}]",
        lambda row: _has(row, "prompt", "answers"),
        _nectar,
        turns=False,
    ),
    "step_dpo": Dialect(
        "Step-DPO's authors",
        "prompt, initial_reason_steps, chosen, rejected, full_chosen?, full_rejected?",
        lambda row: _has(row, "prompt", "initial_reason_steps"),
        _step_dpo,
    ),
    "hh": Dialect(
        "Anthropic's HH",
        "chosen, rejected",
        _hh_claims,
        _hh,
        turns=False,
    ),
    "logo": Dialect(
        "LOGO's authors",
        "all_ref_text, combined_question, final_answer, prefix_a, suffix_a / siffix_a",
        lambda row: "all_ref_text" in row,
        _logo,
    ),
    "longpo": Dialect(
        "LongPO's authors",
        "chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels",
        lambda row: any(f"{side}_input_ids" in row for side in SIDES) and not _answers(row),
        _longpo,
        turns=False,
    ),
}


# --- which one it is -----------------------------------------------------------------------------


@cache
def _near(name: str, known: frozenset[str]) -> str | None:
    """Return the known column that `name` misspells: within two edits, one for short names."""
    for column in sorted(known):
        if _edits(name, column) <= (2 if len(column) >= 6 else 1):
            return column
    return None


def _edits(a: str, b: str) -> int:
    """Count the letters to insert, delete or replace that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


class Columns:
    """Find out how the rows of a data set are read, and remember which columns are not.

    Args:
        dialect: a name in `DIALECTS`, or "auto".
        renamed: {name: the file's own name} renames columns, {name: None} drops them.
        text_as_messages: texts of rows are turns of a conversation.

    Attributes:
        ignored: columns that nobody read, in the order in which they were met.

    Raises:
        ValueError: an unknown dialect, or a column that nothing would read.
    """

    def __init__(
        self,
        dialect: str = "auto",
        renamed: Mapping[str, str | None] | None = None,
        *,
        text_as_messages: bool = False,
    ):
        if dialect not in ("auto", *DIALECTS):
            raise ValueError(f"dialect={dialect!r}: choose one of auto, {', '.join(DIALECTS)}")
        renamed = dict(renamed or {})
        for name, heading in renamed.items():
            if not isinstance(name, str) or not (
                heading is None or (isinstance(heading, str) and heading)
            ):
                raise ValueError(
                    f"columns={renamed}: give a column's own name, or null to drop it, not "
                    f"{heading!r}"
                )
        self.dialect, self.text_as_messages = dialect, text_as_messages
        self.taken = {name: heading for name, heading in renamed.items() if heading is not None}
        self.dropped = {name for name, heading in renamed.items() if heading is None}
        self.unseen = set(self.taken.values()) | self.dropped
        self.ignored: dict[str, None] = {}

    def readings(self, row: Row) -> list[tuple[str, Reading]]:
        """Return a `Reading` for every dialect that claims a row.

        Raises:
            BadField: no dialect claims it.
        """
        if self.dialect != "auto":
            return [(self.dialect, Reading(row))]
        names = [name for name, dialect in DIALECTS.items() if dialect.claims(row)]
        if not names:
            raise BadField(
                "columns",
                "no known format: need chosen + rejected, or prompt + completion + label, or "
                "prompt + responses, or a dialect of docs/data.md; `columns: {prompt: NAME, "
                f"chosen: NAME, ...}}` names them{self._hint(row)}",
                sorted(row),
            )
        return [(name, Reading(row)) for name in names]

    def renamed(self, row: Row) -> Row:
        """Return a row with the columns that the user named, without those dropped."""
        if not self.taken and not self.dropped:
            return row
        self.unseen -= row.keys()
        moved = self.dropped | set(self.taken.values())
        kept = {name: value for name, value in row.items() if name not in moved}
        taken = {
            name: row[heading]
            for name, heading in self.taken.items()
            if row.get(heading) is not None
        }
        for name in taken.keys() & kept.keys():
            if kept[name] is not None:  # the row has a column of that name already
                self.ignored[name] = None
        return kept | taken

    def told_of_ignored(self) -> str:
        """Say in one line which columns nobody read; "" where there are none."""
        if not self.ignored:
            return ""
        return f"ignored columns, which nothing here reads: {', '.join(self.ignored)}"

    def check_seen(self, source: str) -> None:
        """Refuse a column that the user named and no row had.

        Raises:
            ValueError: names the data set and the column.
        """
        for name, heading in self.taken.items():
            if heading in self.unseen:
                raise ValueError(
                    f"{source}: columns={{{name}: {heading}}}, but no row has a column "
                    f"{heading!r}: write its name there, or leave it out"
                )

    def _hint(self, row: Row) -> str:
        every = frozenset().union(*(dialect.columns for dialect in DIALECTS.values()))
        near = {name: _near(name, every) for name in row if name not in every}
        return "".join(
            f"; is {name!r} meant to be {known!r}?" for name, known in near.items() if known
        )

    def check_unread(
        self, name: str, reading: Reading, optional: Collection[str], prompts: Collection[str]
    ) -> None:
        """Look at what a dialect left unread.

        Args:
            name: the dialect.
            reading: the row.
            optional, prompts: columns that are read elsewhere, if they are needed.

        Raises:
            BadField: a column that looks like one that is read, or holds something to train on.
        """
        unread: Mapping[str, Any] = {
            column: value
            for column, value in (*reading.row.items(), *reading.inside.items())
            if column not in reading.used and column not in optional and column not in prompts
        }
        if not unread:
            return
        dialect, row = DIALECTS[name], reading.row
        # A row that was read has its prompt and responses: what else may be misspelled?
        missed = dialect.optional.union(optional).difference(row)
        if "responses" not in reading.columns:
            missed = missed - {"ranks"}
        for column, value in unread.items():
            drop = f"`columns: {{{column}: null}}` drops it"
            if _UNREAD.fullmatch(column):
                if not is_sequence(value) or len(value):
                    raise BadField(column, f"a column that nothing here reads: {drop}", value)
            elif column in dialect.columns & _ASKED and isinstance(value, str) and value.strip():
                read = [row[other] for other in reading.used & row.keys()]
                if not any(isinstance(v, str) and v == value for v in read):
                    reason = f"{reading.names['prompt']} is read as the prompt: {drop}"
                    raise BadField(column, reason, value)
            elif (near := _near(column, missed)) is not None:
                reason = f"is {near!r} meant? `columns: {{{near}: {column}}}` reads it, {drop}"
                raise BadField(column, reason, value)
            self.ignored[column] = None
