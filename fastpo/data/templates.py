"""Text and conversations to token ids: chat templates, BOS, EOS, and which tokens are scored.

One rule for the border between prompt and response: a sequence is the tokenisation of the whole
text, as the model would see it, and the prompt is the longest run of tokens that all sequences of
the row begin with, at most the prompt's own tokens. Usually that is the prompt exactly; where a
token spans the border ("Answer: " + "yes" holds " yes"), the piece before it goes to the responses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpo.data.formats import (
    BESIDE_CONTENT,
    BadField,
    Example,
    Messages,
    Span,
    Tokens,
    message_text,
)

logger = logging.getLogger(__name__)

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_SPANS = (
    "use a template that renders a conversation the same way whatever follows, or one that marks "
    "the assistant's text with {% generation %}"
)


class Encoded(NamedTuple):
    """A row as token ids; each response is (ids [R] int32, loss mask [R] bool)."""

    prompt: np.ndarray  # [P] int32
    responses: list[tuple[np.ndarray, np.ndarray]]
    leading: int  # tokens at the prompt's start that truncation must keep (BOS)
    offsets: list[np.ndarray]  # [R, 2] characters of each token in its text, empty if not asked for
    prompt_offsets: np.ndarray | None = None  # [P, 2], the same of the prompt


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def _start_of(content: str, text: str) -> int:
    """Where a message's characters begin in a rendered text, counted as the row has them."""
    # Templates strip.
    return text.rindex(content.strip()) - (len(content) - len(content.lstrip()))


def _common_messages(conversations: Sequence[Messages]) -> int:
    shortest = min(len(c) for c in conversations)
    for i in range(shortest):
        if any(c[i] != conversations[0][i] for c in conversations):
            return i
    return shortest


class Encoder:
    """Encodes rows with one tokenizer; what it must know about it is found out once.

    Args:
        tokenizer: any Hugging Face tokenizer; conversations need its chat template.
        template_kwargs: passed to every `apply_chat_template` (`enable_thinking`, `tools`, ...); a
            row's own `chat_template_kwargs` and `tools` win.
        assistant_only: in a response of several messages score the assistant's alone.
        append_eos: end responses with EOS or the template's end of turn; an Example's own wins.
        continue_final_message: responses go on with the message that ends the prompt; likewise.
        bos: put BOS before texts, also where the tokenizer itself puts none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        assistant_only: bool = True,
        append_eos: bool = True,
        continue_final_message: bool = False,
        bos: bool = False,
    ):
        self.tokenizer: Any = tokenizer  # its methods are typed as unions of all their modes
        self.template_kwargs = dict(template_kwargs or {})
        self.assistant_only = assistant_only
        self.append_eos, self.continue_final_message = append_eos, continue_final_message
        self.bos = bos
        self.num_moved = 0  # rows where the border moved into the prompt

    def encode(self, example: Example, *, prompt_offsets: bool = False) -> Encoded:
        """Token ids of a row, its extras behind its responses.

        `prompt_offsets` asks for the characters of the prompt's tokens, counted from the start of
        its text; of a conversation, of its last message.

        Raises:
            BadField: the row has no tokens that can be trained on.
        """
        if example.tokens is not None:
            return self._given(example.tokens, example.names)
        prompt = example.prompt
        responses = [*example.responses, *example.extras.values()]
        names = [*example.names, *example.extras]
        if not example.conversational:
            return self._encode_text(
                cast("str | None", prompt),
                cast("list[str]", responses),
                names,
                example.spans,
                prompt_offsets,
            )
        return self._encode_messages(
            cast("Messages | None", prompt),
            cast("list[Messages]", responses),
            names,
            {**self.template_kwargs, **example.template_kwargs},
            example.spans,
            prompt_offsets,
        )

    def _given(self, tokens: Tokens, names: Sequence[str]) -> Encoded:
        """Ids as they are, once this tokenizer has them all."""
        prompt, responses = tokens
        for name, (ids, _) in zip(names, responses, strict=True):
            every, size = np.concatenate([prompt, ids]), len(self.tokenizer)
            if every.min() < 0 or every.max() >= size:
                bad = int(every.min() if every.min() < 0 else every.max())
                raise BadField(
                    name,
                    f"token {bad} is none of the tokenizer's {size}: the row was made with another "
                    "model's tokenizer",
                )
        return self._encoded(prompt, responses, [], None)

    # Facts about the tokenizer

    @cached_property
    def eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token, so "
                "no response could end: set tokenizer.eos_token, or eos_token in "
                "tokenizer_config.json"
            )
        return eos

    @cached_property
    def opening(self) -> np.ndarray:
        """The special tokens (BOS, none, or several) that the tokenizer puts before a text.

        Found by asking, since post-processors, `add_bos_token` flags and plain classes all do it
        their own way. What it puts after a text (EOS) is not used: see `_close`.
        """
        text = "a"
        plain, wrapped = self._ids(text), self._ids(text, add_special_tokens=True)
        for start in range(len(wrapped) - len(plain) + 1):
            if np.array_equal(wrapped[start : start + len(plain)], plain):
                return wrapped[:start]
        return wrapped[:0]

    @cached_property
    def special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        marked = {index for index, token in added if token.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token with which the chat template ends an answer, None if it has none.

        It need not be the tokenizer's EOS (ChatML on a base model), and a template may write more
        after it (a newline; Phi-3 an EOS), so it is read off a rendered example.
        """
        probe = "probe"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}]
        text = self._render(turns, "chat template", False, self.template_kwargs)
        after = self._ids(text.rpartition(probe)[2])
        return next((int(token) for token in after if token in self.special), None)

    def _ids(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        # verbose=False: lengths are checked against the user's budget, not against a warning.
        encoding = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return np.asarray(encoding["input_ids"], dtype=np.int32)

    def _is_blank(self, token: int) -> bool:
        return token not in self.special and not self.tokenizer.decode([token]).strip()

    # Plain text

    def _encode_text(
        self,
        prompt: str | None,
        responses: list[str],
        names: list[str],
        spans: list[list[Span]] | None,
        prompt_offsets: bool,
    ) -> Encoded:
        texts = [(prompt or "") + response for response in responses]
        sequences = [self._ids(text) for text in texts]
        head = sequences[0] if prompt is None else self._ids(prompt)
        border = min(_common(head, sequence) for sequence in sequences)
        if prompt is None:
            # A character of several byte tokens is not divided.
            while (
                border and self.tokenizer.decode(head[max(border - 4, 0) : border])[-1:] == "\ufffd"
            ):
                border -= 1
            _require_prompt(border, names)
            _require_rest(names, [len(s) - border for s in sequences], "text")
        elif border < len(head):
            self.num_moved += 1
        opening = self.opening
        if _common(opening, head[:border]) == len(opening):  # the text begins with BOS itself
            opening = opening[:0]
        closed = [
            self._close(name, sequence[border:])
            for name, sequence in zip(names, sequences, strict=True)
        ]
        offsets = [
            self._offsets(text, border, len(closed[k][0]), len(prompt or ""))
            for k, text in enumerate(texts[: len(spans or ())])
        ]
        found = self._offsets(prompt or "", 0, border, 0) if prompt_offsets else None
        return self._encoded(np.concatenate([opening, head[:border]]), closed, offsets, found)

    def _offsets(self, text: str, border: int, length: int, start: int) -> np.ndarray:
        """[length, 2] characters of the tokens from `border` on, counted from `start` in the text.

        Tokens that stand for no character (EOS) get the empty interval [-1, -1).
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"spans need a tokenizer that knows its offsets, and "
                f"{type(self.tokenizer).__name__} is not a fast one: drop the spans"
            )
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = np.asarray(encoding["offset_mapping"], dtype=np.int64)[border:][:length] - start
        padded = np.full((length, 2), -1, dtype=np.int64)
        padded[: len(found)] = found
        return padded

    def _close(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exactly one EOS at the end, whether the text, the tokenizer or nobody wrote it."""
        end = len(ids)
        while end and ids[end - 1] == self.eos:
            end -= 1
        if not end:
            raise BadField(name, "empty response: no token between the prompt and EOS")
        ids = np.append(ids[:end], np.int32(self.eos))
        return ids, np.ones(len(ids), dtype=bool)

    def _encoded(
        self,
        prompt: np.ndarray,
        responses: list[tuple[np.ndarray, np.ndarray]],
        offsets: list[np.ndarray],
        prompt_offsets: np.ndarray | None,  # [P or less, 2], of the prompt's last tokens
    ) -> Encoded:
        if not len(prompt):
            raise BadField(
                "prompt", "no tokens: the first token of a response needs one to be predicted from"
            )
        bos = self.tokenizer.bos_token_id
        leading = int(bos is not None and prompt[0] == bos)
        leading = max(leading, _common(self.opening, prompt))
        if prompt_offsets is not None:
            opening = np.full((len(prompt) - len(prompt_offsets), 2), -1)
            prompt_offsets = np.concatenate([opening, prompt_offsets])
        return Encoded(prompt, responses, leading, offsets, prompt_offsets)

    # Conversations

    def _render(
        self, messages: Messages, name: str, generation_prompt: bool, kwargs: Mapping[str, Any]
    ) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the rows are conversations, but the tokenizer has no chat template: set "
                "tokenizer.chat_template"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **kwargs
            )
        except TemplateError as error:
            raise BadField(name, f"the chat template refuses it: {error}", messages) from error
        return text

    def _encode_messages(
        self,
        prompt: Messages | None,
        responses: list[Messages],
        names: list[str],
        kwargs: Mapping[str, Any],
        spans: list[list[Span]] | None,
        prompt_offsets: bool,
    ) -> Encoded:
        where = names[0] if prompt is None else "prompt"
        prompt, responses = _split_prompt(prompt, responses, names)
        # After an assistant's turn in the prompt the user speaks next, with no header for a model.
        opens = all(response[0]["role"] == "assistant" for response in responses)
        opening = self._render(prompt, where, opens, kwargs)
        head = self._ids(opening)
        texts = [
            self._render(prompt + response, name, False, kwargs)
            for name, response in zip(names, responses, strict=True)
        ]
        sequences = [self._ids(text) for text in texts]
        border = min(_common(head, sequence) for sequence in sequences)
        if border < len(head):
            if border < self._least_border(prompt, head, where, opens, kwargs):
                _refuse_border(self.tokenizer, border, head, sequences)
            self.num_moved += 1
        encoded = []
        for k, name in enumerate(names):
            self._check_rendered(name, responses[k], texts[k])
            mask = self._score_mask(name, prompt, responses[k], sequences[k], border, kwargs)
            encoded.append(self._close_turn(name, sequences[k][border:], mask[border:]))
        offsets = []
        for k in range(len(spans or ())):
            start = _start_of(message_text(responses[k][-1]), texts[k])
            offsets.append(self._offsets(texts[k], border, len(encoded[k][0]), start))
        found = None
        if prompt_offsets:
            content = message_text(prompt[-1])
            if content.strip() not in opening:
                raise BadField(where, "the chat template changes the text of its last message")
            found = self._offsets(opening, 0, border, _start_of(content, opening))
        return self._encoded(head[:border], encoded, offsets, found)

    def _least_border(
        self, before: Messages, head: np.ndarray, name: str, opens: bool, kwargs: Mapping[str, Any]
    ) -> int:
        """How much of `head`, the tokens of the messages `before`, must stand in every sequence.

        The conversation must, or the model would be trained after a prompt that it never sees. What
        a template writes behind it need not: the header that opens an answer (DeepSeek-R1's ends
        with `<think>`, which it leaves out of a finished answer), or Phi-3's EOS.
        """
        if not opens:
            return self._turn_length(head)[0]
        return _common(self._ids(self._render(before, name, False, kwargs)), head)

    def _check_rendered(self, name: str, response: Messages, text: str) -> None:
        """Templates may drop text (reasoning, as a rule): then the answer is not what was rated."""
        rendered = "".join(text.split())
        for message in response:
            if message["role"] != "assistant":
                continue
            if "".join(message_text(message).split()) not in rendered:
                raise BadField(
                    name,
                    "the chat template leaves out part of the answer (reasoning before </think>?): "
                    "remove it from the data or change the template",
                    message_text(message),
                )

    def _score_mask(
        self,
        name: str,
        prompt: Messages,
        response: Messages,
        sequence: np.ndarray,
        border: int,
        kwargs: Mapping[str, Any],
    ) -> np.ndarray:
        """[T] bool over the whole sequence: True on what the assistant says, ends of turn too."""
        mask = np.ones(len(sequence), dtype=bool)
        if len(response) == 1 or not self.assistant_only:
            return mask
        template = self.tokenizer.get_chat_template(tools=kwargs.get("tools"))
        if GENERATION.search(template) and self.tokenizer.is_fast:
            encoding = self.tokenizer.apply_chat_template(
                prompt + response, return_dict=True, return_assistant_tokens_mask=True, **kwargs
            )
            mask = np.asarray(encoding["assistant_masks"], dtype=bool)
        else:
            mask = self._incremental_mask(name, prompt, response, sequence, border, kwargs)
        mask[:border] = False
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):
            length, ended = self._turn_length(sequence[start:stop])
            if ended:
                mask[start + length : stop] = False
            elif stop < len(sequence):
                # Markers around the text alone leave the end of turn out; the model must learn it.
                mask[stop] = sequence[stop] == self.end_of_turn
        return mask

    def _incremental_mask(
        self,
        name: str,
        prompt: Messages,
        response: Messages,
        sequence: np.ndarray,
        border: int,
        kwargs: Mapping[str, Any],
    ) -> np.ndarray:
        """The assistant's spans from rendering ever longer parts of the conversation."""
        mask = np.zeros(len(sequence), dtype=bool)
        for i, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            before, after = prompt + response[:i], prompt + response[: i + 1]
            start, stop = border, len(sequence)
            if i > 0:
                head = self._ids(self._render(before, name, True, kwargs))
                start = _common(head, sequence)
                if start < self._least_border(before, head, name, True, kwargs):
                    self._refuse_spans(name, i)
            if i + 1 < len(response):
                stop = _common(self._ids(self._render(after, name, False, kwargs)), sequence)
                span = sequence[start:stop]
                ended = self._turn_length(span)[1] if self.end_of_turn is not None else len(span)
                if not ended:
                    self._refuse_spans(name, i)
            mask[start:stop] = True
        return mask

    def _refuse_spans(self, name: str, turn: int) -> NoReturn:
        raise BadField(
            name,
            f"cannot tell which tokens are message {turn}'s, since the chat template renders it "
            f"differently when another message follows; {NO_SPANS}",
        )

    def _turn_length(self, ids: np.ndarray) -> tuple[int, bool]:
        """Tokens up to and including the end of turn, and whether there is one.

        After the text come special tokens and blanks only: `<|im_end|>\\n`, or Phi-3's
        `<|end|>\\n<|endoftext|>`. The turn ends with the first end of turn in that tail; a turn
        that ends otherwise (`<|eom_id|>` after a tool call) with the tail's last special token.
        """
        text = len(ids)
        while text and (ids[text - 1] in self.special or self._is_blank(int(ids[text - 1]))):
            text -= 1
        tail = [int(token) for token in ids[text:]]
        if self.end_of_turn in tail:
            return text + tail.index(self.end_of_turn) + 1, True
        special = [i for i, token in enumerate(tail) if token in self.special]
        return (text + special[-1] + 1, True) if special else (text, False)

    def _close_turn(
        self, name: str, ids: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drops what the template writes after the last end of turn; adds EOS if it has none."""
        length, ended = self._turn_length(ids)
        ids, mask = ids[:length], mask[:length]
        if not ended:
            ids, mask = np.append(ids, np.int32(self.eos)), np.append(mask, True)
        if not mask.any():
            raise BadField(name, "no token of the response is the assistant's")
        return ids, mask


def _refuse_border(
    tokenizer: Any, border: int, head: np.ndarray, sequences: list[np.ndarray]
) -> NoReturn:
    other = min(sequences, key=lambda sequence: _common(head, sequence))
    alone, followed = (tokenizer.decode(ids[border : border + 8]) for ids in (head, other))
    raise BadField(
        "prompt",
        f"the chat template writes the prompt differently once a response follows ({alone!r} "
        f"becomes {followed!r} at token {border}); use a template that renders a conversation the "
        "same way whatever follows",
    )


def _split_prompt(
    prompt: Messages | None, responses: list[Messages], names: list[str]
) -> tuple[Messages, list[Messages]]:
    """Prompt and responses of a conversational row, the implicit prompt taken off."""
    if prompt is None:
        border = _common_messages(responses)
        _require_prompt(border, names)
        _require_rest(names, [len(response) - border for response in responses], "messages")
        prompt = responses[0][:border]
        responses = [response[border:] for response in responses]
    for name, response in zip(names, responses, strict=True):
        last = response[-1]
        if last["role"] != "assistant":
            raise BadField(name, f"ends with a message of role {last['role']!r}", last)
        if prompt[-1]["role"] == "assistant" and response[0]["role"] == "assistant":
            raise BadField(
                name,
                "two assistant messages in a row: the prompt ends with one and the response begins "
                "with one; join them",
                response[0],
            )
        if not (message_text(last).strip() or any(last.get(key) for key in BESIDE_CONTENT)):
            raise BadField(name, "empty response", last)
    return prompt, responses


def _require_prompt(border: int, names: Sequence[str]) -> None:
    if not border:
        raise BadField("prompt", f"missing, and {' and '.join(names)} begin with nothing in common")


def _require_rest(names: Sequence[str], lengths: Sequence[int], what: str) -> None:
    for name, length in zip(names, lengths, strict=True):
        if not length:
            raise BadField(
                name, f"empty response: no {what} left after the prefix shared with the others"
            )
