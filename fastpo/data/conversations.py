"""Messages of a row's texts, where it is a conversation or should be one."""

from __future__ import annotations

from typing import Any

from fastpo.data.bad_rows import BadField
from fastpo.data.dialects import SIDES
from fastpo.data.example import Example
from fastpo.data.messages import (
    Content,
    Messages,
    assistant,
    common_messages,
    message_text,
    turns_of,
    user,
)


def converse(example: Example, system: Any, turns: bool) -> None:
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
    """Return the messages of a prompt given as text; None where nothing is left behind them."""
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


def drop_prompt_of_extras(example: Example) -> None:
    """Drop the prompt from further responses, which are whole conversations as the others."""
    _no_spans(example)
    prompt: Any = example.prompt
    for role, content in example.extras.items():
        if not isinstance(content, str) or not content.startswith(prompt):
            reason = "does not begin with what chosen and rejected begin with"
            raise BadField(role, reason, content)
        example.extras[role] = content[len(prompt) :]
