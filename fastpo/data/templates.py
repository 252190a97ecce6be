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
from fastpo.data.kept import check_context, check_repeated, check_said
from fastpo.data.messages import Messages
from fastpo.data.rendering import (
    Conversation,
    Template,
    cut_end,
    every_response,
    rendered,
    require_prompt,
    require_text,
    split_prompt,
)
from fastpo.data.template_facts import TemplateFacts, clashing, common_prefix
from fastpo.data.text_tokens import TextTokens, common_length
from fastpo.data.turns import Turns, scored_places

MOST_TEMPLATES = 256  # whose facts are kept


class Encoded(NamedTuple):
    """Hold a row as token ids; each response is (ids [R] int32, loss mask [R] bool)."""

    prompt: np.ndarray  # [P] int32
    responses: list[tuple[np.ndarray, np.ndarray]]
    leading: int  # tokens at the prompt's start that truncation must keep (BOS)
    offsets: list[np.ndarray]  # [R, 2] characters of each token in its text, empty if not asked for
    prompt_offsets: np.ndarray | None = None  # [P, 2], the same of the prompt


class Encoder:
    """Encode rows with one tokenizer; what it must know about it is found out once.

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
        self.tokens = TextTokens(tokenizer, bos)
        self.turns, self.assistant_only = Turns(self.tokens, assistant_only), assistant_only
        self.append_eos, self.continue_final_message = append_eos, continue_final_message
        self.num_moved = 0  # rows where the border moved into the prompt
        self._facts: dict[tuple[str, bool], TemplateFacts] = {}

    def encode(self, example: Example, *, prompt_offsets: bool = False) -> Encoded:
        """Return the token ids of a row, its extras behind its responses.

        `prompt_offsets` asks for the characters of the prompt's tokens, counted from the start of
        its text; of a conversation, of its last message.

        Raises:
            BadField: the row has no tokens that can be trained on.
            ValueError: no row of its kind has, since the tokenizer lacks a template or an EOS.
        """
        if example.tokens is not None:
            return self._take(example.tokens, example.names)
        wanted = example.append_eos
        ends = self.append_eos if wanted is None else wanted
        encode = self._encode_messages if example.conversational else self._encode_text
        return encode(example, ends, prompt_offsets)

    def _take(self, tokens: Tokens, names: Sequence[str]) -> Encoded:
        """Take ids as they are, once this tokenizer has them all."""
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

    def _template(self, kwargs: Mapping[str, Any]) -> Template:
        """Return the chat template for a row with these arguments of its own."""
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

    @cached_property
    def _text_facts(self) -> TemplateFacts | None:
        """Return what is known of the template that texts may have been rendered with, if any."""
        try:
            return TemplateFacts(self.tokenizer, self.template_kwargs)
        except ValueError:
            return None

    @cached_property
    def _ends(self) -> np.ndarray:
        """Return the tokens that end a text: EOS and the template's end of turn."""
        facts = self._text_facts
        eos = self.tokenizer.eos_token
        ends = facts.ends if facts is not None else (eos,) if eos else ()
        return np.array([self.tokenizer.convert_tokens_to_ids(end) for end in ends], np.int32)

    def _encode_text(self, example: Example, ends: bool, prompt_offsets: bool) -> Encoded:
        prompt = cast("str | None", example.prompt)
        every = cast("dict[str, str]", every_response(example))
        names, spans = list(every), example.spans
        if prompt is not None:
            facts = self._text_facts
            check_repeated(prompt, every, "" if facts is None else facts.header)
        texts = {name: (prompt or "") + response for name, response in every.items()}
        first = [] if prompt is None else [("prompt", prompt)]
        head, *sequences = self.tokens.ids_of([*first, *texts.items()])
        if prompt is None:
            sequences.insert(0, head)
        border = min(common_length(head, sequence) for sequence in sequences)
        if prompt is None:
            # A character of several byte tokens is not divided.
            while (
                border and self.tokenizer.decode(head[max(border - 4, 0) : border])[-1:] == "\ufffd"
            ):
                border -= 1
            require_prompt(border, names)
            require_text(names, [len(s) - border for s in sequences], "text")
        elif border < len(head):
            self.num_moved += 1
        opening = self.tokens.opening
        if common_length(opening, head[:border]) == len(opening):  # the text begins with BOS itself
            opening = opening[:0]
        closed = [
            self._close(name, sequence[border:], ends)
            for name, sequence in zip(names, sequences, strict=True)
        ]
        offsets = [
            self.tokens.offsets(text, border, len(closed[k][0]), len(prompt or ""))
            for k, text in enumerate(list(texts.values())[: len(spans or ())])
        ]
        asked = self.tokens.offsets(prompt or "", 0, border, 0) if prompt_offsets else None
        return self._encoded(np.concatenate([opening, head[:border]]), closed, offsets, asked)

    def _close(self, name: str, ids: np.ndarray, ends: bool) -> tuple[np.ndarray, np.ndarray]:
        """Put exactly one end at the end, whether the text, the tokenizer or nobody wrote it.

        A text that was rendered beforehand may end in several, or in blanks behind one.
        """
        places = np.flatnonzero((ids[:, None] == self._ends).any(1))
        length = stop = len(ids)
        if len(places):
            while length and (
                ids[length - 1] in self._ends or self.tokens.is_blank(int(ids[length - 1]))
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
            ids = np.append(ids, np.int32(self.tokens.eos))
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
        leading = max(leading, common_length(self.tokens.opening, prompt))
        if prompt_offsets is not None:
            opening = np.full((len(prompt) - len(prompt_offsets), 2), -1)
            prompt_offsets = np.concatenate([opening, prompt_offsets])
        return Encoded(prompt, responses, leading, offsets, prompt_offsets)

    def _encode_messages(self, example: Example, ends: bool, prompt_offsets: bool) -> Encoded:
        names = list(every_response(example))
        where = names[0] if example.prompt is None else "prompt"
        chat = self._conversation(example, where)
        facts = chat.template.facts
        check_context(
            where, chat.prompt, chat.opening, chat.template.kwargs.get("tools") or (), facts
        )
        texts = chat.texts
        if not ends:
            texts = [cut_end(*each, facts) for each in zip(names, texts, chat.closed, strict=True)]
        several = self.assistant_only and any(len(response) > 1 for response in chat.responses)
        encoding = self.tokens.tokenized(
            [(where, chat.opening), *zip(names, texts, strict=True)],
            return_offsets_mapping=several and self.tokenizer.is_fast,
        )
        head, *sequences = [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]
        offsets = encoding.get("offset_mapping")
        border = min(common_length(head, sequence) for sequence in sequences)
        moved = border < len(head)
        if moved and not chat.cut:
            least = self.turns.least_border(where, chat, chat.prompt, head)
            if border < least:
                _refuse_border(self.tokenizer, border, head, sequences)
        self.num_moved += moved or chat.rewritten
        encoded = []
        for k, name in enumerate(names):
            mask = self.turns.score_mask(name, chat, k, sequences[k], border)
            places = None if offsets is None or mask.all() else scored_places(mask, offsets[k + 1])
            start = common_prefix(chat.opening, texts[k])
            check_said(name, chat.added[k], texts[k], start, places, facts)
            ids, mask = sequences[k][border:], mask[border:]
            encoded.append(self.turns.close_turn(name, ids, mask, facts, ends or chat.closed[k]))
        spans = []
        for k in range(len(example.spans or ())):
            start = chat.start_of_last(names[k], k)
            spans.append(self.tokens.offsets(texts[k], border, len(encoded[k][0]), start))
        asked = None
        if prompt_offsets:
            asked = self.tokens.offsets(chat.opening, 0, border, chat.start_of_question(where))
        return self._encoded(head[:border], encoded, spans, asked)

    def _conversation(self, example: Example, where: str) -> Conversation:
        wanted = example.continue_final_message
        continues = self.continue_final_message if wanted is None else wanted
        prompt = cast("Messages | None", example.prompt)
        responses = cast("dict[str, Messages]", every_response(example))
        prompt, every = split_prompt(prompt, responses, continues)
        return rendered(self._template(example.template_kwargs), where, prompt, every, continues)


def _refuse_border(
    tokenizer: Any, border: int, head: np.ndarray, sequences: list[np.ndarray]
) -> NoReturn:
    other = min(sequences, key=lambda sequence: common_length(head, sequence))
    alone, followed = (tokenizer.decode(ids[border : border + 8]) for ids in (head, other))
    raise BadField(
        "prompt",
        f"the chat template writes the prompt differently once a response follows ({alone!r} "
        f"becomes {followed!r} at token {border}); use a template that renders a conversation the "
        "same way whatever follows",
    )
