"""Read messages, and make some of what is not written as messages.

A message is a dict of `role` and `content`, text or a list of text parts, and whatever else a chat
template reads. ShareGPT's `from` and `value` are read as the same thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypeAlias, TypedDict

import numpy as np

from fastpo.data.bad_rows import BadField


class TextPart(TypedDict):
    """Hold a part of a message's content; its type is `text`."""

    type: str
    text: str


class Message(TypedDict, total=False):
    """Hold what somebody says in a conversation; templates may read further keys."""

    role: Required[str]
    content: str | list[TextPart] | None
    tool_calls: Sequence[Any]
    reasoning_content: str
    reasoning: str
    thinking: str


Messages: TypeAlias = list[Message]
Content: TypeAlias = str | Messages

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages keep what an assistant thought."""

# Where chat templates look for what an assistant says or does, besides `content`.
BESIDE_CONTENT = ("tool_calls", *REASONING)

# A text like this is a conversation, written as JSON or (then it is refused) as Python writes it.
MESSAGES = re.compile(
    r"""\s*\[\s*\{.*['"](role|from)['"]\s*:\s*['"](system|developer|user|assistant|tool|human|gpt)"""
    r"""['"]""",
    re.DOTALL,
)

# So is one message alone, which says what it is before all else.
_MESSAGE = re.compile(
    r"""\s*\{\s*['"](role|from)['"]\s*:\s*['"](system|developer|user|assistant|tool|human|gpt|"""
    r"""function_call)['"]\s*,\s*['"](content|value|tool_calls)['"]\s*:\s*['"\[n]"""
)

# Names that ShareGPT's and vendors' files have for the roles of chat templates.
_ROLES = {
    **{"human": "user", "gpt": "assistant"},
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
_CALL = ("function_call", "tool_call")
_TEXTS = (None, "text", "input_text", "output_text")  # what vendors call a part of text

# Anthropic's HH and its kin write conversations as one text.
_SPEAKER = re.compile(r"(?:\n\n|^)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list of any kind, and no text."""
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))


def parsed(name: str, value: Any) -> Any:
    """Return a list or dict, read from JSON where a format has text only (CSV)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadField(name, f"neither a list or dict nor JSON of one: {error}", value) from error


def plain(value: Any) -> Any:
    """Turn arrays and numbers of NumPy into Python's, which can be compared and rendered."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def user(text: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": text}


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whichever of the two forms its content has."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _call(name: str, text: Any) -> Message:
    """Make an assistant's message of ShareGPT's `function_call`, JSON of one call or several."""
    calls = parsed(name, text)
    calls = calls if is_sequence(calls) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise BadField(name, "a function_call is no JSON of a name and its arguments", text)
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }


def _message(name: str, value: Mapping[str, Any]) -> Message:
    # Columnar storage gives every message the union of all keys and fills the rest with None.
    message: Any = {
        key: item if isinstance(item, str) else plain(item)
        for key, item in value.items()
        if item is not None
    }
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value", None)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadField(name, "a message has no role", dict(value))
    if role in _CALL:
        return _call(name, content)
    message["role"] = _ROLES.get(role, role)
    if content is not None and is_sequence(content):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else part
            if kind not in _TEXTS or not isinstance(part.get("text"), str):
                raise BadField(name, "only text is supported in a message's content", part)
        # As above: a part has its kind and its text, whatever other parts of the file have.
        message["content"] = [{"type": "text", "text": part["text"]} for part in content]
    elif not isinstance(content, str) and not ("tool_calls" in message and content is None):
        raise BadField(name, "a message's content is not text", content)
    return message


def content_of(name: str, value: Any) -> Content:
    """Return text or messages, checked; one message alone becomes a list of one."""
    if value is None:
        raise BadField(name, "missing")
    if isinstance(value, str):
        if not (MESSAGES.match(value) or _MESSAGE.match(value)):
            return value
        value = parsed(name, value)
    if isinstance(value, Mapping):
        value = [value]
    if is_sequence(value) and all(isinstance(item, Mapping) for item in value):
        return [_message(name, item) for item in value]
    raise BadField(name, "neither text nor a list of messages", value)


def common_messages(conversations: Sequence[Messages]) -> int:
    """Count the messages that all conversations begin with."""
    shortest = min(len(c) for c in conversations)
    for i in range(shortest):
        if any(c[i] != conversations[0][i] for c in conversations):
            return i
    return shortest


def speaks_as_hh(text: Any) -> bool:
    """Return whether a text is a conversation of Human and Assistant, as Anthropic's HH has it."""
    return isinstance(text, str) and {"Human", "Assistant"} <= set(_SPEAKER.findall(text))


def split_hh(name: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two HH conversations into what both begin with and the answer of each."""
    ends = [
        [match.end() for match in _SPEAKER.finditer(text) if match[1] == "Assistant"]
        for text in (chosen, rejected)
    ]
    borders = [end for end in ends[0] if end in ends[1] and chosen[:end] == rejected[:end]]
    if not borders:
        raise BadField(name, "the two conversations begin with no question in common", rejected)
    border = borders[-1]
    return chosen[:border], chosen[border:], rejected[border:]


def turns_of(text: str) -> Messages | None:
    """Divide a text in HH's form into messages; return None for any other text."""
    parts = _SPEAKER.split(text)
    if len(parts) == 1 or parts[0].strip():
        return None
    turns = zip(parts[1::2], parts[2::2], strict=True)
    # The answer that a prompt ends with is still to come.
    return [
        {"role": _SPEAKERS[who], "content": said.removeprefix(" ")}
        for i, (who, said) in enumerate(turns)
        if said.strip() or 2 * i + 3 < len(parts)
    ]
