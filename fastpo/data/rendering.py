"""A row of messages as its chat template writes it: what stands where in the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastpo.data.bad_rows import BadField
from fastpo.data.example import Example
from fastpo.data.kept import check_headers, check_typed
from fastpo.data.messages import (
    BESIDE_CONTENT,
    REASONING,
    Content,
    Message,
    Messages,
    common_messages,
    message_text,
)
from fastpo.data.template_facts import TemplateFacts, common_prefix, refusal, render


class Template(NamedTuple):
    """Hold the chat template for a row: its arguments, and what is known of it under them."""

    facts: TemplateFacts
    kwargs: Mapping[str, Any]

    def render(self, name: str, messages: Messages, generation_prompt: bool = False) -> str:
        try:
            return render(self.facts.tokenizer, messages, generation_prompt, self.kwargs)
        except MemoryError:
            raise
        except Exception as error:  # a template raises what it likes
            raise BadField(name, refusal(error), messages) from error


class Conversation(NamedTuple):
    """Hold a row of messages, rendered."""

    template: Template
    prompt: Messages  # without a message that the responses go on with
    responses: list[Messages]  # with that message, where there is one
    added: list[Messages]  # what the row's own responses say
    closed: list[bool]  # whether a response wrote its own end of turn
    opening: str  # the prompt's text, header of the answer included
    opens: bool  # whether the responses begin with an answer
    cut: bool  # whether the opening was cut out of the texts themselves
    rewritten: bool  # whether the template opens an answer otherwise once there is one
    texts: list[str]  # prompt and response

    def start_of_last(self, name: str, k: int) -> int:
        """Return where the row's characters of a response's last message begin in its text."""
        message, text = self.added[k][-1], self.texts[k]
        if self.cut and self.prompt and len(self.added[k]) == 1:
            return len(self.opening)
        end = len(text.removesuffix(self.template.facts.tail))
        return _start_of(name, message, text, common_prefix(self.opening, text), end)

    def start_of_question(self, name: str) -> int:
        """Return where those of the prompt's last message begin in the opening."""
        if not self.prompt:
            raise BadField(name, "no messages, so no passages of one")
        return _start_of(name, self.prompt[-1], self.opening, 0, len(self.opening))


def rendered(
    template: Template,
    where: str,
    prompt: Messages,
    every: Mapping[str, Messages],
    continues: bool,
) -> Conversation:
    """Render a row's prompt with each of its responses.

    Args:
        template: the chat template, with the row's arguments.
        where: the field that the prompt came from.
        prompt: may be empty.
        every: responses and extras by the field that each came from.
        continues: whether the responses go on with the prompt's last message.

    Raises:
        BadField: the template refuses the row, or a message cannot be told from what it writes.
    """
    facts = template.facts
    closed = [facts.without_end(text) != text for text in map(_last_text, every.values())]
    prompt = facts.adapted(where, prompt)
    added = {name: facts.adapted(name, response) for name, response in every.items()}
    for name, messages in ((where, prompt), *added.items()):
        check_typed(name, messages, facts)
    check_headers(added, facts)
    begun, whole = None, added
    if continues:
        *prompt, begun = prompt
        whole = {
            name: [_joined(name, begun, response[0], facts), *response[1:]]
            for name, response in added.items()
        }
    opens = all(response[0]["role"] == "assistant" for response in added.values())
    # After an assistant's turn in the prompt the user speaks, with no header for a model.
    if prompt:
        before = template.render(where, prompt, opens)
    else:
        before = "" if continues else _before_answer(where, template)
    texts = [template.render(name, prompt + response) for name, response in whole.items()]
    if begun is not None:
        opening = _opening_of(where, before, message_text(begun), whole, texts)
    elif prompt:
        opening = facts.kept(before, texts)
    else:
        opening = before[: min(common_prefix(before, text) for text in texts)]
    cut = begun is not None or not prompt
    return Conversation(
        template,
        prompt,
        list(whole.values()),
        list(added.values()),
        closed,
        opening,
        opens,
        cut,
        begun is None and bool(prompt) and opening != before,
        texts,
    )


def every_response(example: Example) -> dict[str, Content]:
    """Return responses and extras by the field that each came from."""
    return {**dict(zip(example.names, example.responses, strict=True)), **example.extras}


def cut_end(name: str, text: str, closed: bool, facts: TemplateFacts) -> str:
    """Return the text without the end of its last turn, unless the row wrote one itself."""
    if closed:
        return text
    if text.endswith(facts.tail):
        return text.removesuffix(facts.tail)
    if facts.end_of_turn and facts.end_of_turn in text:
        return text[: text.rindex(facts.end_of_turn)]
    raise BadField(
        name, "append_eos is false, but where the chat template ends this answer cannot be told"
    )


def split_prompt(
    prompt: Messages | None, responses: dict[str, Messages], continues: bool
) -> tuple[Messages, dict[str, Messages]]:
    """Return prompt and responses of a conversational row, the implicit prompt taken off."""
    if prompt is None:
        names = list(responses)
        border = common_messages(list(responses.values()))
        require_prompt(border, names)
        require_text(names, [len(r) - border for r in responses.values()], "messages")
        prompt = responses[names[0]][:border]
        responses = {name: response[border:] for name, response in responses.items()}
    answered = bool(prompt) and prompt[-1]["role"] == "assistant"
    if continues and not answered:
        raise BadField(
            "prompt",
            "continue_final_message goes on with the prompt's last message, which is not an "
            "assistant's: end the prompt with what the answer begins with",
            prompt[-1] if prompt else None,
        )
    for name, response in responses.items():
        last, first = response[-1], response[0]["role"]
        if last["role"] != "assistant":
            raise BadField(name, f"ends with a message of role {last['role']!r}", last)
        if answered and not continues and first == "assistant":
            raise BadField(
                name,
                "two assistant messages in a row: the prompt ends with one and the response begins "
                "with one; `continue_final_message: true` joins them",
                response[0],
            )
        if continues and first != "assistant":
            raise BadField(
                name,
                "begins with a message of role "
                f"{first!r}, which cannot go on with the prompt's (continue_final_message)",
                response[0],
            )
        if not prompt and first != "assistant":
            raise BadField("prompt", "no messages: a user message is needed")
        if not (message_text(last).strip() or any(last.get(key) for key in BESIDE_CONTENT)):
            raise BadField(name, "empty response", last)
    return prompt, responses


def require_prompt(border: int, names: Sequence[str]) -> None:
    if not border:
        raise BadField("prompt", f"missing, and {' and '.join(names)} begin with nothing in common")


def require_text(names: Sequence[str], lengths: Sequence[int], what: str) -> None:
    for name, length in zip(names, lengths, strict=True):
        if not length:
            raise BadField(
                name, f"empty response: no {what} left after the prefix shared with the others"
            )


def _opening_of(
    where: str, before: str, begun: str, whole: Mapping[str, Messages], texts: list[str]
) -> str:
    """Return the text up to where the responses go on with the message that the prompt `begun`."""
    for response, text in zip(whole.values(), texts, strict=True):
        start = text.find(message_text(response[0]).strip(), common_prefix(before, text))
        opening = text[: start + len(begun.lstrip())]
        if start < 0 or not texts[0].startswith(opening):
            raise BadField(
                where,
                "the chat template changes the text of the message that continue_final_message "
                "goes on with: end the prompt elsewhere",
                begun,
            )
    return texts[0][: len(opening)]  # pyright: ignore[reportPossiblyUnboundVariable]


def _before_answer(where: str, template: Template) -> str:
    """Return what the template writes before an answer to no question."""
    try:
        return template.facts.before_answer(template.kwargs)
    except MemoryError:
        raise
    except Exception as error:
        raise BadField(
            where, f"no messages, and {refusal(error)}; a user message is needed"
        ) from error


def _joined(name: str, begun: Message, message: Message, facts: TemplateFacts) -> Message:
    """Join the message that ends the prompt and how a response goes on with it."""
    if begun.get("tool_calls"):
        raise BadField(
            "prompt", "ends with tool calls, which continue_final_message cannot go on with", begun
        )
    key = next((key for key in REASONING if message.get(key)), None)
    if key is not None:
        raise BadField(name, f"{key} cannot go on with a message that has begun", message)
    content = facts.message("assistant", message_text(begun) + message_text(message))
    return {**begun, **message, **content}


def _start_of(name: str, message: Mapping[str, Any], text: str, start: int, end: int) -> int:
    """Return where a message's characters begin in part of a rendered text.

    The place is that of the row's first character, which a template may strip.
    """
    content = message_text(message)
    place = text.rfind(content.strip(), start, end)  # templates strip
    if place < 0:
        raise BadField(name, "the chat template changes the text of its last message", content)
    return place - (len(content) - len(content.lstrip()))


def _last_text(messages: Messages) -> str:
    return message_text(messages[-1])
