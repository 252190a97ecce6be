"""Which tokens of a rendered conversation are the assistant's, and where its turns end."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.messages import Messages
from fastpo.data.rendering import Conversation, Template
from fastpo.data.template_facts import TemplateFacts, refusal, squeezed
from fastpo.data.text_tokens import TextTokens, as_offsets, common_length

NO_SPANS = (
    "use a template that renders a conversation the same way whatever follows, or one that marks "
    "the assistant's text with {% generation %}"
)


def scored_places(mask: np.ndarray, offsets: Any) -> list[tuple[int, int]]:
    """Return the first and last character of each run of scored tokens in the text."""
    characters = as_offsets(offsets)
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [(int(characters[i, 0]), int(characters[j - 1, 1])) for i, j in edges]


class Turns:
    """Tell the turns of rendered conversations apart.

    Args:
        tokens: the tokenizer.
        assistant_only: in a response of several messages score the assistant's alone.
    """

    def __init__(self, tokens: TextTokens, assistant_only: bool):
        self.tokens, self.assistant_only = tokens, assistant_only

    def least_border(
        self,
        name: str,
        chat: Conversation,
        before: Messages,
        head: np.ndarray,
        opens: bool | None = None,
    ) -> int:
        """Count the tokens of `head` that every sequence must begin with.

        `head` are the tokens of the messages `before`.

        The conversation must, or the model would be trained after a prompt that it never sees. What
        a template writes behind it need not: the header that opens an answer (DeepSeek-R1's ends
        with `<think>`, which it leaves out of a finished answer), or Phi-3's EOS.
        """
        if not (chat.opens if opens is None else opens):
            return self._turn_length(head, chat.template.facts)[0]
        return common_length(self.tokens.ids(chat.template.render(name, before), name), head)

    def score_mask(
        self, name: str, chat: Conversation, k: int, sequence: np.ndarray, border: int
    ) -> np.ndarray:
        """Return [T] bool over a sequence: True on what the assistant says, ends of turn too."""
        mask = np.ones(len(sequence), dtype=bool)
        if len(chat.responses[k]) == 1 or not self.assistant_only:
            return mask
        facts = chat.template.facts
        if facts.generation and self.tokens.tokenizer.is_fast:
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

    def close_turn(
        self, name: str, ids: np.ndarray, mask: np.ndarray, facts: TemplateFacts, ends: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drop what the template writes after the last end of turn; add EOS if it has none."""
        if ends:
            length, ended = self._turn_length(ids, facts)
            ids, mask = ids[:length], mask[:length]
            if not ended:
                ids, mask = np.append(ids, np.int32(self.tokens.eos)), np.append(mask, True)
        if not mask.any():
            raise BadField(name, "no token of the response is the assistant's")
        return ids, mask

    def _turn_length(self, ids: np.ndarray, facts: TemplateFacts) -> tuple[int, bool]:
        """Count tokens up to and including the end of turn, and tell whether there is one.

        After the text come special tokens and blanks only: `<|im_end|>\\n`, or Phi-3's
        `<|end|>\\n<|endoftext|>`. The turn ends with the first end of turn in that tail; a turn
        that ends otherwise (`<|eom_id|>` after a tool call) with the tail's last special token.
        Where a template ends no turn, special tokens (`<unk>`) are part of what is said.
        """
        end = facts.end_id
        ending = frozenset() if end is None else self.tokens.special | {end}
        text = len(ids)
        while text and (ids[text - 1] in ending or self.tokens.is_blank(int(ids[text - 1]))):
            text -= 1
        tail = [int(token) for token in ids[text:]]
        if end in tail:
            return text + tail.index(end) + 1, True
        special = [i for i, token in enumerate(tail) if token in self.tokens.special]
        return (text + special[-1] + 1, True) if special else (text, False)

    def _marked(self, name: str, template: Template, messages: Messages) -> np.ndarray:
        """Return [T] bool: what the template marks as the assistant's."""
        try:
            encoding = self.tokens.tokenizer.apply_chat_template(
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
        """Find the assistant's spans by rendering ever longer parts of the conversation."""
        mask = np.zeros(len(sequence), dtype=bool)
        response, template, facts = chat.responses[k], chat.template, chat.template.facts
        for i, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            before, after = chat.prompt + response[:i], chat.prompt + response[: i + 1]
            start, stop = border, len(sequence)
            if i > 0:
                opening = facts.kept(template.render(name, before, True), [chat.texts[k]])
                head = self.tokens.ids(opening, name)
                start = common_length(head, sequence)
                if start < self.least_border(name, chat, before, head, True):
                    self._refuse_spans(name, i)
            if i + 1 < len(response):
                text = template.render(name, after)
                stop = common_length(self.tokens.ids(text, name), sequence)
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
        """Return where an answer ends of which a template writes less once another message follows.

        Qwen3 begins the last answer with an empty thought, and leaves that out of earlier ones.
        `text` ends with the answer as the last one; None where its end is not what stands there.
        """
        ends = np.flatnonzero(sequence[start:] == facts.end_id)
        if facts.end_of_turn is None or not len(ends):
            return None
        stop = start + int(ends[0]) + 1
        last = text[: text.rfind(facts.end_of_turn) + len(facts.end_of_turn)]
        here = self.tokens.tokenizer.decode(sequence[start:stop])
        return stop if squeezed(last).endswith(squeezed(here)) else None

    def _refuse_spans(self, name: str, turn: int) -> NoReturn:
        raise BadField(
            name,
            f"cannot tell which tokens are message {turn}'s, since the chat template renders it "
            f"differently when another message follows; {NO_SPANS}",
        )
