"""Learn what a chat template does with a conversation by rendering small ones.

A template says nowhere which keys of a message it reads, or in which form. So each fact is asked
for once, with words that stand in no template, and kept for all rows with the same arguments.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadField
from fastpo.data.messages import REASONING, Message, Messages, assistant, message_text, user

Form = Literal["text", "parts", "dict", "wrapped", "flat", "either"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_SYSTEM, _USER, _ANSWER, _THOUGHT = "Qsystemq", "Quserq", "Qanswerq", "Qthoughtq"
_NAME, _KEY, _VALUE, _USE = "qnameq", "qkeyq", "Qvalueq", "Quseq"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _USE,
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": _USE}},
            "required": [_KEY],
        },
    },
}
_PART = re.compile(rf"""['"]text['"]\s*:\s*['"]({_USER}|{_ANSWER})""")
_MARKER = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)
_THINK = re.compile(r"[<\[][^<\[]*(?:think|thought|reason)\w*[^\w\s<\[]*", re.IGNORECASE)


def squeezed(text: str) -> str:
    """Return the text without blanks, which templates strip and add."""
    return "".join(text.split())


def common_prefix(a: str, b: str) -> int:
    """Count the characters that both texts begin with."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


@cache
def own_arguments() -> frozenset[str]:
    """Return names that `apply_chat_template` or its renderer take for themselves."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    theirs = {"self", "kwargs", "tools", "documents", "chat_template"}
    return frozenset({*names, "messages", "conversations"} - theirs)


def clashing(kwargs: Mapping[str, Any]) -> str | None:
    """Say why these keyword arguments cannot go to a template, or None where they can."""
    wrong = sorted(own_arguments() & kwargs.keys())
    if not wrong:
        return None
    return f"{', '.join(wrong)}: arguments of apply_chat_template that are not yours to set here"


def render(
    tokenizer: Any, messages: Messages, generation_prompt: bool, kwargs: Mapping[str, Any]
) -> str:
    """Render a conversation by its template; raise whatever the template does."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, **kwargs
    )


def refusal(error: Exception) -> str:
    """Say in words what a template's exception says of a row."""
    if isinstance(error, TemplateError):
        return f"the chat template refuses it: {error}"
    return f"the chat template fails on it: {type(error).__name__}: {error}"


class TemplateFacts:
    """Learn what a tokenizer's chat template does under given keyword arguments.

    Args:
        tokenizer: with a chat template.
        kwargs: for the template. A row's `tools` may be others than these, if it has any at all.

    Raises:
        ValueError: the tokenizer has several templates and none of them is meant.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]):
        self.tokenizer: Any = tokenizer
        self.kwargs = dict(kwargs)
        meant, named = kwargs.get("chat_template"), self.tokenizer.chat_template
        if isinstance(named, dict) and meant is None and "default" not in named:
            raise ValueError(
                f"the tokenizer has the chat templates {', '.join(named)}, and no default: "
                f"choose one, as with chat_template_kwargs: {{chat_template: {next(iter(named))}}}"
            )
        self.source: str = self.tokenizer.get_chat_template(meant, kwargs.get("tools"))

    def _rendered(self, messages: Messages, generation_prompt: bool = False, **kwargs: Any) -> str:
        """Render a conversation, or nothing where the template refuses it."""
        try:
            return render(self.tokenizer, messages, generation_prompt, {**self.kwargs, **kwargs})
        except MemoryError:
            raise
        except Exception:  # a template raises what it likes
            return ""

    def message(self, role: str, text: str, **keys: Any) -> Message:
        """Make a message with its content in the form that the template takes."""
        content = [{"type": "text", "text": text}] if self.content == "parts" else text
        message: Any = {"role": role, "content": content, **keys}
        return message

    # Messages

    @cached_property
    def content(self) -> Form | None:
        """Return the form of a message's content: a string, a list of parts, or either."""

        def taken(user: Any, answer: Any) -> bool:
            text = self._rendered(
                [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            )
            return _USER in text and _ANSWER in text and not _PART.search(text)

        text = taken(_USER, _ANSWER)
        parts = taken(*([{"type": "text", "text": word}] for word in (_USER, _ANSWER)))
        return _form(text, "text", parts, "parts")

    @cached_property
    def _question(self) -> Message:
        return self.message("user", _USER)

    @cached_property
    def _plain(self) -> str:
        return self._rendered([self._question, self.message("assistant", _ANSWER)])

    @cached_property
    def _conversation(self) -> str:
        """Render two questions and two answers."""
        return self._rendered(2 * [self._question, self.message("assistant", _ANSWER)])

    @cached_property
    def system(self) -> bool:
        """Return whether it writes a system message."""
        return _SYSTEM in self._rendered([self.message("system", _SYSTEM), self._question])

    @cached_property
    def tools(self) -> bool:
        """Return whether it writes the tools that a row offers."""
        return _NAME in self._rendered([self._question], tools=[_TOOL])

    @cached_property
    def reasoning(self) -> tuple[str, ...]:
        """Return the keys whose text it writes as the reasoning of an answer."""
        return tuple(
            key
            for key in REASONING
            if _THOUGHT
            in self._rendered(
                [self._question, self.message("assistant", _ANSWER, **{key: _THOUGHT})]
            )
        )

    # Tool calls

    def _call(self, arguments: Any, wrapped: bool) -> str:
        # Mistral's ids have nine characters.
        function = {"name": _NAME, "arguments": arguments}
        identity = {"type": "function", "id": "call00001"}
        call = {**identity, "function": function} if wrapped else {**identity, **function}
        answer = self.message("assistant", "", tool_calls=[call])
        return self._rendered([self._question, answer])

    def _arguments(self, wrapped: bool) -> Form | None:
        arguments = {_KEY: _VALUE}
        written = self._call(arguments, wrapped)
        mapping = (
            all(w in written for w in (_NAME, _KEY, _VALUE)) and repr(arguments) not in written
        )
        text = json.dumps(arguments)
        written = self._call(text, wrapped)
        return _form(mapping, "dict", _NAME in written and text in written, "text")

    @cached_property
    def calls(self) -> Form | None:
        """Return the form of tool calls, {"function": {...}}, flat or either; None: not written."""
        wrapped, flat = self._arguments(True), self._arguments(False)
        return _form(wrapped is not None, "wrapped", flat is not None, "flat")

    @cached_property
    def arguments(self) -> Form | None:
        """Return the form of a call's arguments: a dict, JSON text or either; None: not written."""
        return None if self.calls is None else self._arguments(self.calls != "flat")

    @cached_property
    def needs_content(self) -> bool:
        """Return whether it fails on a call without content, but takes an empty one."""
        arguments: Any = json.dumps({_KEY: _VALUE}) if self.arguments == "text" else {_KEY: _VALUE}
        function = {"name": _NAME, "arguments": arguments}
        call = {"type": "function", "id": "call00001"}
        call |= function if self.calls == "flat" else {"function": function}
        bare: Message = {"role": "assistant", "tool_calls": [call]}
        return (
            not self._rendered([self._question, bare])
            and self._rendered([self._question, {**bare, "content": ""}]) != ""
        )

    # Turns

    @cached_property
    def generation(self) -> bool:
        """Return whether it marks what the assistant says."""
        return GENERATION.search(self.source) is not None

    @cached_property
    def stable(self) -> bool:
        """Return whether it writes earlier turns alike whatever follows."""
        kept = self._plain.removesuffix(self.tail) + (self.end_of_turn or "")
        return bool(self._plain) and self._conversation.startswith(kept)

    @cached_property
    def _awaiting(self) -> str:
        return self._rendered([self._question], generation_prompt=True)

    @cached_property
    def _opened(self) -> str:
        before = self._rendered([self._question])
        return self._awaiting[common_prefix(before, self._awaiting) :]

    @cached_property
    def _withdrawn(self) -> str:
        """Return the end of that header that is written otherwise once an answer follows."""
        changed = self._awaiting[common_prefix(self._awaiting, self._plain) :]
        return changed if self._opened.endswith(changed) else ""

    def kept(self, opening: str, texts: Sequence[str]) -> str:
        """Return what finished texts keep of the opening that awaits an answer.

        An answer that begins as the header ends (`<b>` where `<think>` stood) is none of it.
        """
        whole = all(text.startswith(opening) for text in texts)
        return opening if whole else opening.removesuffix(self._withdrawn)

    @cached_property
    def header(self) -> str:
        """Return what opens an answer, without a thought's beginning; empty where nothing does."""
        return self._opened.removesuffix(self._thought).strip()

    @cached_property
    def _thought(self) -> str:
        match = _THINK.search(self._opened)
        return self._opened[match.start() :] if match else ""

    @cached_property
    def thought(self) -> str:
        """Return a thought that this header opens (DeepSeek-R1's `<think>`), or nothing."""
        return self._thought.strip()

    def before_thought(self, text: str, place: int) -> int:
        """Return the place in a rendered text, or where its header's thought begins before it."""
        if match := _THINK.match(self.thought):
            start = text.rfind(match[0], 0, place)
            if start >= 0 and squeezed(self.thought).startswith(squeezed(text[start:place])):
                return start
        return place

    def before_answer(self, kwargs: Mapping[str, Any]) -> str:
        """Return what it writes before an answer to no question; raise what the template does."""
        answer = [self.message("assistant", _ANSWER)]
        return render(self.tokenizer, answer, False, kwargs).partition(_ANSWER)[0]

    @cached_property
    def tail(self) -> str:
        """Return all that it writes after the text of a last answer."""
        return self._plain.rpartition(_ANSWER)[2]

    @cached_property
    def special(self) -> list[str]:
        """Return the tokens that a template may mark turns with, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        # Some are not flagged as special; but a word or a blank (Gemma adds those) marks nothing.
        marking = {t.content for t in added if t.special or _MARKER.fullmatch(t.content)}
        return sorted(marking | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def _tokens_in(self, text: str) -> dict[str, int]:
        """Find those tokens that stand in a text, and where."""
        places = {}
        for token in self.special:
            if token in text:
                places[token] = text.index(token)
                text = text.replace(token, " " * len(token))
        return places

    @cached_property
    def end_of_turn(self) -> str | None:
        """Return the token with which it ends an answer, None if it has none.

        It need not be the tokenizer's EOS (ChatML on a base model), and a template may write more
        after the last answer (Phi-3 an EOS) than after an earlier one.
        """
        after = self._conversation.partition(_ANSWER)[2]
        shared = self._tokens_in(self.tail[: common_prefix(self.tail, after)])
        if shared:
            return max(shared, key=lambda token: shared[token])
        places = self._tokens_in(self.tail)
        return min(places, key=lambda token: places[token], default=None)

    @cached_property
    def end_id(self) -> int | None:
        if self.end_of_turn is None:
            return None
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Return the end of turn and EOS, as far as there are any."""
        ends = (self.end_of_turn, self.tokenizer.eos_token)
        return tuple(dict.fromkeys(end for end in ends if end))

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """Return a pattern of tokens that set messages apart; typed inside one they divide it."""
        framing = self._conversation or self._plain
        # What stands before the first turn alone (BOS) sets nothing apart.
        framing = framing.partition(_USER)[2]
        if self.system:
            text = self._rendered([self.message("system", _SYSTEM), self._question])
            framing += text.replace(self.tokenizer.bos_token or "\0", "", 1)
        tokens = {token for token in self._tokens_in(framing) if not _THINK.search(token)}
        ordered = sorted(tokens | set(self.ends), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    # Rows

    def adapted(self, name: str, messages: Messages) -> Messages:
        """Return messages in the forms that the template takes; what they say stays the same.

        An end of turn that ends an assistant's content is left to the template.

        Raises:
            BadField: arguments that cannot be had in that form.
        """
        return [self._adapted(name, message) for message in messages]

    def _adapted(self, name: str, message: Message) -> Message:
        changed: Any = dict(message)
        if message.get("content") is not None:
            text = message_text(message)
            if message["role"] == "assistant":
                text = self.without_end(text)
            changed["content"] = text
            if self.content == "parts":
                changed["content"] = [{"type": "text", "text": text}]
        elif self.needs_content:
            changed["content"] = ""
        for key in REASONING:
            others = [k for k in self.reasoning if k not in message] if key in message else []
            if others and key not in self.reasoning:
                changed[others[0]] = changed.pop(key)
                break
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = self._adapted_calls(name, calls)
        return changed

    def without_end(self, text: str) -> str:
        """Return the text without one end of turn, or EOS, and blanks after it."""
        bare = text.rstrip()
        end = next((end for end in self.ends if bare.endswith(end)), None)
        return text if end is None else bare.removesuffix(end)

    def _adapted_calls(self, name: str, calls: Any) -> list[Any]:
        if isinstance(calls, str) or not isinstance(calls, Sequence):
            raise BadField(name, "tool_calls is no list", calls)
        adapted = []
        for i, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise BadField(name, f"tool_calls[{i}] names no function", call)
            if "arguments" in function:
                where = f"tool_calls[{i}].function.arguments"
                arguments = self._adapted_arguments(name, where, function["arguments"])
                function = {**function, "arguments": arguments}
            flat = "function" not in call
            if flat and self.calls == "wrapped":
                identity = {key: call[key] for key in ("id", "index") if key in call}
                inner = {key: function[key] for key in function if key not in (*identity, "type")}
                adapted.append({"type": "function", **identity, "function": inner})
            elif not flat and self.calls == "flat":
                adapted.append({k: v for k, v in call.items() if k != "function"} | dict(function))
            else:
                adapted.append(function if flat else {**call, "function": function})
        return adapted

    def _adapted_arguments(self, name: str, where: str, arguments: Any) -> Any:
        if self.arguments == "dict" and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise BadField(name, f"{where} is no JSON: {error}", arguments) from error
            if not isinstance(parsed, Mapping):
                raise BadField(name, f"{where} is JSON of no object", arguments)
            return parsed
        if self.arguments == "text" and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        return arguments

    def describe(self) -> dict[str, str]:
        """Return the facts in words, by name."""
        if self.content is None:
            messages: Messages = [user(_USER), assistant(_ANSWER)]
            try:
                render(self.tokenizer, messages, False, self.kwargs)
                reason = "it leaves out the question or the answer"
            except Exception as error:  # a template raises what it likes
                reason = refusal(error)
            return {"template": f"no conversation can be read with it: {reason}"}
        words = {"dict": "dicts", "parts": "lists of parts", "either": "either form", None: "none"}
        contents = {**words, "text": "text", "either": "text or lists of parts"}
        arguments = {**words, "text": "JSON text", "either": "dicts or JSON text"}
        calls = {"wrapped": 'as {"function": ...}', "flat": "flat", "either": "in either form"}
        written = f"{calls.get(self.calls or '')}, arguments as {arguments[self.arguments]}"
        return {
            "content": contents[self.content],
            "system": "written" if self.system else "none",
            "tools": "written" if self.tools else "none",
            "tool calls": written if self.calls else "none",
            "reasoning": ", ".join(self.reasoning) or "none",
            "header": repr(self.header) if self.header else "none",
            "thought": f"{self.thought!r} opens an answer" if self.thought else "none",
            "end of turn": repr(self.end_of_turn) if self.end_of_turn else "none: EOS is added",
            "past turns": "alike whatever follows" if self.stable else "change when more follows",
            "generation": "marks the assistant's text" if self.generation else "none",
        }


def _form(first: bool, one: Form, second: bool, other: Form) -> Form | None:
    if first and second:
        return "either"
    return one if first else other if second else None
