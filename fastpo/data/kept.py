"""Check that nothing of a row is lost, said twice, or read as something else.

Checked is the text that a template wrote, since it says nowhere what it leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastpo.data.bad_rows import BadField
from fastpo.data.messages import REASONING, Messages, message_text
from fastpo.data.template_facts import TemplateFacts, squeezed

LONGEST_LABEL = 40  # characters of a line such as "Assistant:", which says who speaks next

# What a message says about itself, and what nobody says: a template may leave these out.
BOOKKEEPING = frozenset(
    {
        *("role", "content", "name", "type", "id", "index", "idx", "tool_call_id", "message_id"),
        *("parent_id", "uuid", "turn", "turn_id", "turn_identifier", "hash", "hashed_ip"),
        *("weight", "train", "trainable", "loss", "mask", "score", "rank", "rating", "label"),
        *("tags", "metadata", "meta", "source", "model", "language", "lang", "country", "state"),
        *("timestamp", "time", "date", "created", "created_at", "header", "toxic", "redacted"),
        *("finish_reason", "stop_reason", "usage", "logprobs", "end_turn"),
    }
)


# What a message says


class Piece(NamedTuple):
    """Hold what a message says, without blanks, in every way that a template may write it."""

    key: str  # where it stands in the message
    spellings: tuple[str, ...]


def _pieces(message: Mapping[str, Any], written: str) -> Iterator[Piece]:
    """Yield all that a message says: content, reasoning, calls, and further text."""
    if content := squeezed(message_text(message)):
        yield Piece("content", (content,))
    for key, value in message.items():
        if key == "tool_calls":
            for i, call in enumerate(value or ()):
                yield from _call_pieces(f"tool_calls[{i}]", call, written)
        elif key not in BOOKKEEPING:
            yield from _leaves(key, value, keys=False)


def _call_pieces(where: str, call: Mapping[str, Any], written: str) -> Iterator[Piece]:
    function = call.get("function", call)
    yield Piece(f"{where}.function.name", spellings(function["name"]))
    where, arguments = f"{where}.function.arguments", function.get("arguments")
    if isinstance(arguments, str):
        whole = squeezed(arguments)
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
        if arguments is None or whole in written:  # as it is, with its own escapes
            yield Piece(where, (whole,))
            return
    yield from _leaves(where, arguments, keys=True)


def _leaves(where: str, value: Any, keys: bool) -> Iterator[Piece]:
    """Yield texts and numbers of a nested value; of a message's own keys the texts alone."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if keys:
                yield Piece(f"{where}, key {key!r}", spellings(str(key)))
            if keys or key not in BOOKKEEPING:
                yield from _leaves(f"{where}.{key}", item, keys)
    elif isinstance(value, str):
        if value.strip():
            yield Piece(where, spellings(value))
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            yield from _leaves(f"{where}[{i}]", item, keys)
    elif keys and value is not None:
        yield Piece(where, tuple({squeezed(json.dumps(value)), squeezed(str(value))}))


def spellings(text: str) -> tuple[str, ...]:
    """Return a text as it is, and escaped as JSON and as Python do it."""
    escaped = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return tuple(dict.fromkeys([squeezed(text), *(squeezed(each[1:-1]) for each in escaped)]))


def left_out(message: Mapping[str, Any], text: str) -> str | None:
    """Return the key of what a message says and a text does not, or None.

    Each piece needs a place of its own: reasoning that repeats the answer stands there twice.
    """
    text = squeezed(text)
    said = list(_pieces(message, text))
    # The longest first, so that no piece takes its place inside another.
    said.sort(key=lambda piece: len(piece.spellings[0]), reverse=True)
    for piece in said:
        spelt = next((each for each in piece.spellings if each in text), None)
        if spelt is None:
            return piece.key
        if len(said) > 1:
            text = text.replace(spelt, "\0", 1)
    return None


# What is checked


def check_repeated(prompt: str, responses: Mapping[str, str], header: str) -> None:
    """Refuse responses that begin with the prompt's end, or all with the whole prompt."""
    bare = prompt.rstrip()
    headers = [header] if header and bare.endswith(header) else []
    label = bare.rpartition("\n")[2].strip()
    if label.endswith(":") and len(label) <= LONGEST_LABEL:
        headers.append(label)
    for name, response in responses.items():
        for known in headers:
            if response.lstrip().startswith(known):
                raise BadField(
                    name,
                    f"begins with {known!r}, with which the prompt ends already: remove it "
                    "from one of them",
                    response,
                )
    if prompt.strip() and all(text.startswith(prompt) for text in responses.values()):
        name, response = next(iter(responses.items()))
        raise BadField(
            name,
            "repeats the prompt: keep only the answer, or drop the prompt column (columns: "
            "{prompt: null})",
            response,
        )


def check_typed(name: str, messages: Messages, facts: TemplateFacts) -> None:
    """Refuse what is typed in a message but would be read as its end, or the next one's start."""
    for i, message in enumerate(messages):
        for key, value in message.items():
            text = message_text(message) if key == "content" else str(value)
            if typed := facts.markers.search(text):
                raise BadField(
                    name,
                    f"{key} of message {i} ({message['role']}) holds {typed[0]!r}, with which the "
                    "chat template marks turns: remove it, or make several messages of it",
                    message,
                )


def check_headers(responses: Mapping[str, Messages], facts: TemplateFacts) -> None:
    """Refuse answers that begin with the header that the template writes itself."""
    for name, response in responses.items():
        for message in response:
            text = message_text(message).lstrip()
            if facts.header and message["role"] == "assistant" and text.startswith(facts.header):
                raise BadField(
                    name,
                    f"content begins with {facts.header!r}, which the chat template writes itself: "
                    "remove it",
                    message,
                )


def _writes(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether a text has the content of a message of context."""
    said, text = message_text(message), squeezed(text)
    if message["role"] == "assistant":  # templates drop earlier thoughts, as models never see them
        said = said.rpartition("</think>")[2]
    return squeezed(said) in text or any(spelt in text for spelt in spellings(said))


def _leaves_out(key: str, i: int, message: Mapping[str, Any], facts: TemplateFacts) -> str:
    reason = f"the chat template leaves out {key} of message {i} ({message['role']})"
    others = [other for other in facts.reasoning if other not in message]
    if key == "content" and "</think>" in message_text(message):
        reason = f"{reason}: its reasoning before </think>"
    elif key in REASONING and others:
        reason = f"{reason}, and reads {' or '.join(others)}"
    return f"{reason}; remove it from the data or change the template"


def check_context(
    where: str, prompt: Messages, opening: str, tools: Sequence[Any], facts: TemplateFacts
) -> None:
    """Refuse a prompt of which the template leaves out a message or the tools."""
    text = squeezed(opening)
    for i, message in enumerate(prompt):
        if not _writes(text, message):
            raise BadField(where, _leaves_out("content", i, message, facts), message)
        if message.get("tool_calls") and facts.calls is None:
            raise BadField(where, _leaves_out("tool_calls", i, message, facts), message)
    for tool in tools:
        name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
        if isinstance(name, str) and squeezed(name) not in text:
            raise BadField("tools", f"the chat template leaves out the tool {name!r}", tool)


def check_said(
    name: str,
    said: Messages,
    text: str,
    start: int,
    places: Sequence[tuple[int, int]] | None,
    facts: TemplateFacts,
) -> None:
    """Refuse an answer of which the template leaves something out, or outside what is scored.

    It is looked for from `start` on, since the prompt may say the same, and in the scored `places`.
    """
    region = scored = text[facts.before_thought(text, start) :]
    if places is not None:
        scored = "".join(text[facts.before_thought(text, i) : j] for i, j in places)
    for i, message in enumerate(said):
        if message["role"] == "assistant":
            key = left_out(message, scored)
        else:
            key = None if _writes(region, message) else "content"
        if key is not None:
            raise BadField(name, _leaves_out(key, i, message, facts), message)
