"""Text and conversations to token ids: chat templates, BOS, EOS, and which tokens are scored.

One rule for the border between prompt and response: a sequence is the tokenisation of the whole
text, as the model would see it, and the prompt is the longest run of tokens that all sequences of
the row begin with, at most the prompt's own tokens. Usually that is the prompt exactly; where a
token spans the border ("Answer: " + "yes" holds " yes"), the piece before it goes to the responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadField
from fastpo.data.example import Example, Tokens
from fastpo.data.kept import check_context, check_headers, check_repeated, check_said, check_typed
from fastpo.data.messages import BESIDE_CONTENT, REASONING, Messages, common_messages, message_text
from fastpo.data.template_facts import (
    TemplateFacts,
    clashing,
    common_prefix,
    refusal,
    render,
    squeezed,
)

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


MOST_TEMPLATES = 256  # whose facts are kept


class Template(NamedTuple):
    """The chat template for a row: its keyword arguments, and what is known of it under them."""

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
    """A row of messages, rendered."""

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
        """Where the row's characters of a response's last message begin in its text."""
        message, text = self.added[k][-1], self.texts[k]
        if self.cut and self.prompt and len(self.added[k]) == 1:
            return len(self.opening)
        end = len(text.removesuffix(self.template.facts.tail))
        return _start_of(name, message, text, common_prefix(self.opening, text), end)

    def start_of_question(self, name: str) -> int:
        """The same of the prompt's last message, in the opening."""
        if not self.prompt:
            raise BadField(name, "no messages, so no passages of one")
        return _start_of(name, self.prompt[-1], self.opening, 0, len(self.opening))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def _array(offsets: Any) -> np.ndarray:
    """[T, 2] characters of tokens, from a list of pairs."""
    return np.asarray(offsets, dtype=np.int64).reshape(-1, 2)


def _scored_places(mask: np.ndarray, offsets: Any) -> list[tuple[int, int]]:
    """Where the scored tokens stand in the text, each run from its first character to its last."""
    found = _array(offsets)
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [(int(found[i, 0]), int(found[j - 1, 1])) for i, j in edges]


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

    Raises:
        ValueError: `bos` with a tokenizer that has none, or an argument of `apply_chat_template`
            that is not the template's.
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
        if clash := clashing(self.template_kwargs):
            raise ValueError(f"chat_template_kwargs: {clash}")
        if bos and tokenizer.bos_token_id is None:
            raise ValueError(
                f"bos: the tokenizer {tokenizer.name_or_path!r} has no bos_token: drop bos, or set "
                "bos_token in tokenizer_config.json"
            )
        self.assistant_only = assistant_only
        self.append_eos, self.continue_final_message = append_eos, continue_final_message
        self.bos = bos
        self.num_moved = 0  # rows where the border moved into the prompt
        self._facts: dict[tuple[str, bool], TemplateFacts] = {}

    def encode(self, example: Example, *, prompt_offsets: bool = False) -> Encoded:
        """Token ids of a row, its extras behind its responses.

        `prompt_offsets` asks for the characters of the prompt's tokens, counted from the start of
        its text; of a conversation, of its last message.

        Raises:
            BadField: the row has no tokens that can be trained on.
            ValueError: no row of its kind has, since the tokenizer lacks a template or an EOS.
        """
        if example.tokens is not None:
            return self._given(example.tokens, example.names)
        own = example.append_eos
        ends = self.append_eos if own is None else own
        encode = self._encode_messages if example.conversational else self._encode_text
        return encode(example, ends, prompt_offsets)

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
        """The special tokens (BOS, none, or several) that are put before a text.

        Found by asking, since post-processors, `add_bos_token` flags and plain classes all do it
        their own way. What the tokenizer puts after a text (EOS) is not used: see `_close`.
        """
        text = "a"
        plain, wrapped = self._ids(text), self._ids(text, add_special_tokens=True)
        starts = range(len(wrapped) - len(plain) + 1)
        same = (i for i in starts if np.array_equal(wrapped[i : i + len(plain)], plain))
        opening, bos = wrapped[: next(same, 0)], self.tokenizer.bos_token_id
        if self.bos and bos not in opening:
            opening = np.concatenate([np.array([bos], dtype=np.int32), opening])
        return opening

    @cached_property
    def special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        marked = {index for index, token in added if token.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    @cached_property
    def _ends(self) -> np.ndarray:
        """The tokens that end a text: EOS and the template's end of turn."""
        facts = self._text_facts
        eos = self.tokenizer.eos_token
        ends = facts.ends if facts is not None else (eos,) if eos else ()
        return np.array([self.tokenizer.convert_tokens_to_ids(end) for end in ends], np.int32)

    @cached_property
    def _text_facts(self) -> TemplateFacts | None:
        """Of the chat template that texts may have been rendered with, if there is one."""
        try:
            return TemplateFacts(self.tokenizer, self.template_kwargs)
        except ValueError:
            return None

    def _template(self, kwargs: Mapping[str, Any]) -> Template:
        """The chat template for a row with these arguments of its own."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the rows are conversations, but the tokenizer has no chat template: set "
                "tokenizer.chat_template (chat_template in a recipe), or give the rows as text"
            )
        if clash := clashing(kwargs):
            raise BadField("chat_template_kwargs", clash, dict(kwargs))
        kwargs = {**self.template_kwargs, **kwargs}
        known = {key: value for key, value in kwargs.items() if key != "tools"}
        key = (repr(known), bool(kwargs.get("tools")))
        if key not in self._facts:
            if len(self._facts) >= MOST_TEMPLATES:
                self._facts.clear()
            self._facts[key] = TemplateFacts(self.tokenizer, kwargs)
        return Template(self._facts[key], kwargs)

    def _tokenized(self, texts: Sequence[tuple[str, str]], **options: Any) -> Any:
        """What the tokenizer makes of several (field, text), of which each refusal names one."""
        options = {"add_special_tokens": False, **options}
        # verbose=False: lengths are checked against the user's budget, not against a warning.
        try:
            return self.tokenizer([text for _, text in texts], verbose=False, **options)
        except MemoryError:
            raise
        except Exception as error:  # a lone surrogate, as a rule
            if len(texts) > 1:
                for each in texts:
                    self._tokenized([each], **options)
            name, text = texts[0]
            reason = f"the tokenizer fails on it: {type(error).__name__}: {error}"
            raise BadField(name, reason, text) from error

    def _ids_of(self, texts: Sequence[tuple[str, str]], **options: Any) -> list[np.ndarray]:
        """Ids of each text [T]; one call for several costs less than several calls."""
        encoding = self._tokenized(texts, **options)
        return [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]

    def _ids(self, text: str, name: str = "text", **options: Any) -> np.ndarray:
        return self._ids_of([(name, text)], **options)[0]

    def _is_blank(self, token: int) -> bool:
        return token not in self.special and not self.tokenizer.decode([token]).strip()

    # Plain text

    def _encode_text(self, example: Example, ends: bool, prompt_offsets: bool) -> Encoded:
        prompt = cast("str | None", example.prompt)
        every = cast("dict[str, str]", _every(example))
        names, spans = list(every), example.spans
        if prompt is not None:
            facts = self._text_facts
            check_repeated(prompt, every, "" if facts is None else facts.header)
        texts = {name: (prompt or "") + response for name, response in every.items()}
        given = [] if prompt is None else [("prompt", prompt)]
        head, *sequences = self._ids_of([*given, *texts.items()])
        if prompt is None:
            sequences.insert(0, head)
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
            self._close(name, sequence[border:], ends)
            for name, sequence in zip(names, sequences, strict=True)
        ]
        offsets = [
            self._offsets(text, border, len(closed[k][0]), len(prompt or ""))
            for k, text in enumerate(list(texts.values())[: len(spans or ())])
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
        encoding = self._tokenized([("spans", text)], return_offsets_mapping=True)
        found = _array(encoding["offset_mapping"][0])[border:][:length] - start
        padded = np.full((length, 2), -1, dtype=np.int64)
        padded[: len(found)] = found
        return padded

    def _close(self, name: str, ids: np.ndarray, ends: bool) -> tuple[np.ndarray, np.ndarray]:
        """Exactly one end at the end, whether the text, the tokenizer or nobody wrote it.

        A text that was rendered beforehand may end in several, or in blanks behind one.
        """
        places = np.flatnonzero((ids[:, None] == self._ends).any(1))
        length = stop = len(ids)
        if len(places):
            while length and (
                ids[length - 1] in self._ends or self._is_blank(int(ids[length - 1]))
            ):
                length -= 1
            if places[0] < length:
                token = self.tokenizer.convert_ids_to_tokens(int(ids[places[0]]))
                raise BadField(
                    name,
                    f"{token!r} ends it before its last word: remove the token, or write the row "
                    "as messages if several turns follow each other",
                )
            stop = int(places[0]) + 1
        if not length:
            raise BadField(name, "empty response: no token between the prompt and EOS")
        ids = ids[:stop]
        if ends and not len(places):
            ids = np.append(ids, np.int32(self.eos))
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
                "prompt",
                "no tokens: the first token of a response needs one to be predicted from; "
                "`bos: true` puts the tokenizer's BOS before texts",
            )
        bos = self.tokenizer.bos_token_id
        leading = int(bos is not None and prompt[0] == bos)
        leading = max(leading, _common(self.opening, prompt))
        if prompt_offsets is not None:
            opening = np.full((len(prompt) - len(prompt_offsets), 2), -1)
            prompt_offsets = np.concatenate([opening, prompt_offsets])
        return Encoded(prompt, responses, leading, offsets, prompt_offsets)

    # Conversations

    def _encode_messages(self, example: Example, ends: bool, prompt_offsets: bool) -> Encoded:
        names = list(_every(example))
        where = names[0] if example.prompt is None else "prompt"
        chat = self._conversation(example, where)
        facts = chat.template.facts
        check_context(
            where, chat.prompt, chat.opening, chat.template.kwargs.get("tools") or (), facts
        )
        texts = chat.texts
        if not ends:
            texts = [_cut_end(*each, facts) for each in zip(names, texts, chat.closed, strict=True)]
        several = self.assistant_only and any(len(response) > 1 for response in chat.responses)
        encoding = self._tokenized(
            [(where, chat.opening), *zip(names, texts, strict=True)],
            return_offsets_mapping=several and self.tokenizer.is_fast,
        )
        head, *sequences = [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]
        offsets = encoding.get("offset_mapping")
        border = min(_common(head, sequence) for sequence in sequences)
        moved = border < len(head)
        if moved and not chat.cut and border < self._least_border(where, chat, chat.prompt, head):
            _refuse_border(self.tokenizer, border, head, sequences)
        self.num_moved += moved or chat.rewritten
        encoded = []
        for k, name in enumerate(names):
            mask = self._score_mask(name, chat, k, sequences[k], border)
            places = None if offsets is None or mask.all() else _scored_places(mask, offsets[k + 1])
            start = common_prefix(chat.opening, texts[k])
            check_said(name, chat.added[k], texts[k], start, places, facts)
            ids, mask = sequences[k][border:], mask[border:]
            encoded.append(self._close_turn(name, ids, mask, facts, ends or chat.closed[k]))
        spans = [
            self._offsets(texts[k], border, len(encoded[k][0]), chat.start_of_last(names[k], k))
            for k in range(len(example.spans or ()))
        ]
        found = None
        if prompt_offsets:
            found = self._offsets(chat.opening, 0, border, chat.start_of_question(where))
        return self._encoded(head[:border], encoded, spans, found)

    def _conversation(self, example: Example, where: str) -> Conversation:
        every = cast("dict[str, Messages]", _every(example))
        own = example.continue_final_message
        continues = self.continue_final_message if own is None else own
        prompt, every = _split_prompt(cast("Messages | None", example.prompt), every, continues)
        template = self._template(example.template_kwargs)
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

    def _least_border(
        self,
        name: str,
        chat: Conversation,
        before: Messages,
        head: np.ndarray,
        opens: bool | None = None,
    ) -> int:
        """How much of `head`, the tokens of the messages `before`, must stand in every sequence.

        The conversation must, or the model would be trained after a prompt that it never sees. What
        a template writes behind it need not: the header that opens an answer (DeepSeek-R1's ends
        with `<think>`, which it leaves out of a finished answer), or Phi-3's EOS.
        """
        if not (chat.opens if opens is None else opens):
            return self._turn_length(head, chat.template.facts)[0]
        return _common(self._ids(chat.template.render(name, before), name), head)

    def _score_mask(
        self, name: str, chat: Conversation, k: int, sequence: np.ndarray, border: int
    ) -> np.ndarray:
        """[T] bool over the whole sequence: True on what the assistant says, ends of turn too."""
        mask = np.ones(len(sequence), dtype=bool)
        if len(chat.responses[k]) == 1 or not self.assistant_only:
            return mask
        facts = chat.template.facts
        if facts.generation and self.tokenizer.is_fast:
            marked = self._marked(name, chat.template, chat.prompt + chat.responses[k])
            # An answer that was cut before its end of turn has fewer tokens.
            mask[: len(marked)] = marked[: len(mask)]
        else:
            mask = self._incremental_mask(name, chat, k, sequence, border)
        mask[:border] = False
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):
            length, ended = self._turn_length(sequence[start:stop], facts)
            if ended:
                mask[start + length : stop] = False
            elif stop < len(sequence):
                # Markers around the text alone leave the end of turn out; the model must learn it.
                mask[stop] = sequence[stop] == facts.end_id
        return mask

    def _marked(self, name: str, template: Template, messages: Messages) -> np.ndarray:
        """[T] bool: what the template marks as the assistant's."""
        try:
            encoding = self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **template.kwargs
            )
        except MemoryError:
            raise
        except Exception as error:
            raise BadField(name, refusal(error), messages) from error
        return np.asarray(encoding["assistant_masks"], dtype=bool)

    def _incremental_mask(
        self, name: str, chat: Conversation, k: int, sequence: np.ndarray, border: int
    ) -> np.ndarray:
        """The assistant's spans from rendering ever longer parts of the conversation."""
        mask = np.zeros(len(sequence), dtype=bool)
        response, template, facts = chat.responses[k], chat.template, chat.template.facts
        for i, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            before, after = chat.prompt + response[:i], chat.prompt + response[: i + 1]
            start, stop = border, len(sequence)
            if i > 0:
                opening = facts.kept(template.render(name, before, True), [chat.texts[k]])
                head = self._ids(opening, name)
                start = _common(head, sequence)
                if start < self._least_border(name, chat, before, head, True):
                    self._refuse_spans(name, i)
            if i + 1 < len(response):
                text = template.render(name, after)
                stop = _common(self._ids(text, name), sequence)
                span = sequence[start:stop]
                known = facts.end_of_turn is not None
                ended = self._turn_length(span, facts)[1] if known else len(span)
                if not ended:
                    stop = self._shortened(text, sequence, start, facts)
                if stop is None:
                    self._refuse_spans(name, i)
            mask[start:stop] = True
        return mask

    def _shortened(
        self, text: str, sequence: np.ndarray, start: int, facts: TemplateFacts
    ) -> int | None:
        """Where an answer ends of which the template writes less once another message follows.

        Qwen3 begins the last answer with an empty thought, and leaves that out of earlier ones.
        `text` ends with the answer as the last one; None where its end is not what stands there.
        """
        ends = np.flatnonzero(sequence[start:] == facts.end_id)
        if facts.end_of_turn is None or not len(ends):
            return None
        stop = start + int(ends[0]) + 1
        last = text[: text.rfind(facts.end_of_turn) + len(facts.end_of_turn)]
        here = self.tokenizer.decode(sequence[start:stop])
        return stop if squeezed(last).endswith(squeezed(here)) else None

    def _refuse_spans(self, name: str, turn: int) -> NoReturn:
        raise BadField(
            name,
            f"cannot tell which tokens are message {turn}'s, since the chat template renders it "
            f"differently when another message follows; {NO_SPANS}",
        )

    def _turn_length(self, ids: np.ndarray, facts: TemplateFacts) -> tuple[int, bool]:
        """Tokens up to and including the end of turn, and whether there is one.

        After the text come special tokens and blanks only: `<|im_end|>\\n`, or Phi-3's
        `<|end|>\\n<|endoftext|>`. The turn ends with the first end of turn in that tail; a turn
        that ends otherwise (`<|eom_id|>` after a tool call) with the tail's last special token.
        Where a template ends no turn, special tokens (`<unk>`) are part of what is said.
        """
        end = facts.end_id
        ending = frozenset() if end is None else self.special | {end}
        text = len(ids)
        while text and (ids[text - 1] in ending or self._is_blank(int(ids[text - 1]))):
            text -= 1
        tail = [int(token) for token in ids[text:]]
        if end in tail:
            return text + tail.index(end) + 1, True
        special = [i for i, token in enumerate(tail) if token in self.special]
        return (text + special[-1] + 1, True) if special else (text, False)

    def _close_turn(
        self, name: str, ids: np.ndarray, mask: np.ndarray, facts: TemplateFacts, ends: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drops what the template writes after the last end of turn; adds EOS if it has none."""
        if ends:
            length, ended = self._turn_length(ids, facts)
            ids, mask = ids[:length], mask[:length]
            if not ended:
                ids, mask = np.append(ids, np.int32(self.eos)), np.append(mask, True)
        if not mask.any():
            raise BadField(name, "no token of the response is the assistant's")
        return ids, mask


def _every(example: Example) -> dict[str, Any]:
    """Responses and extras by the field that each came from."""
    return {**dict(zip(example.names, example.responses, strict=True)), **example.extras}


def _last_text(messages: Messages) -> str:
    return message_text(messages[-1])


# Conversations: what stands where


def _opening_of(
    where: str, before: str, begun: str, whole: Mapping[str, Messages], texts: list[str]
) -> str:
    """The text up to where the responses go on with the message that the prompt `begun`."""
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
    """What the template writes before an answer to no question."""
    try:
        return template.facts.before_answer(template.kwargs)
    except MemoryError:
        raise
    except Exception as error:
        raise BadField(
            where, f"no messages, and {refusal(error)}; a user message is needed"
        ) from error


def _joined(
    name: str, begun: dict[str, Any], message: dict[str, Any], facts: TemplateFacts
) -> dict[str, Any]:
    """The message that ends the prompt, and how a response goes on with it, as one."""
    if begun.get("tool_calls"):
        raise BadField(
            "prompt", "ends with tool calls, which continue_final_message cannot go on with", begun
        )
    key = next((key for key in REASONING if message.get(key)), None)
    if key is not None:
        raise BadField(name, f"{key} cannot go on with a message that has begun", message)
    content = facts.message("assistant", message_text(begun) + message_text(message))
    return {**begun, **message, **content}


def _cut_end(name: str, text: str, closed: bool, facts: TemplateFacts) -> str:
    """The text without the end of its last turn, unless the row wrote one itself."""
    if closed:
        return text
    if text.endswith(facts.tail):
        return text.removesuffix(facts.tail)
    if facts.end_of_turn and facts.end_of_turn in text:
        return text[: text.rindex(facts.end_of_turn)]
    raise BadField(
        name, "append_eos is false, but where the chat template ends this answer cannot be told"
    )


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


def _start_of(name: str, message: Mapping[str, Any], text: str, start: int, end: int) -> int:
    """Where a message's characters begin in part of a rendered text, as the row counts them."""
    content = message_text(message)
    place = text.rfind(content.strip(), start, end)  # templates strip
    if place < 0:
        raise BadField(name, "the chat template changes the text of its last message", content)
    return place - (len(content) - len(content.lstrip()))


def _split_prompt(
    prompt: Messages | None, responses: dict[str, Messages], continues: bool
) -> tuple[Messages, dict[str, Messages]]:
    """Prompt and responses of a conversational row, the implicit prompt taken off."""
    if prompt is None:
        names = list(responses)
        border = common_messages(list(responses.values()))
        _require_prompt(border, names)
        _require_rest(names, [len(r) - border for r in responses.values()], "messages")
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


def _require_prompt(border: int, names: Sequence[str]) -> None:
    if not border:
        raise BadField("prompt", f"missing, and {' and '.join(names)} begin with nothing in common")


def _require_rest(names: Sequence[str], lengths: Sequence[int], what: str) -> None:
    for name, length in zip(names, lengths, strict=True):
        if not length:
            raise BadField(
                name, f"empty response: no {what} left after the prefix shared with the others"
            )
