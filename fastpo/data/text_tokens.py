"""A tokenizer asked for ids and offsets of texts, and what must be known of it, found out once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadField


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of what two sequences of ids begin with in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def as_offsets(offsets: Any) -> np.ndarray:
    """Return characters of tokens [T, 2] from a list of pairs."""
    return np.asarray(offsets, dtype=np.int64).reshape(-1, 2)


class TextTokens:
    """Ask a tokenizer for the ids of texts.

    Args:
        tokenizer: any Hugging Face tokenizer.
        bos: put BOS before texts, also where the tokenizer itself puts none.

    Raises:
        ValueError: `bos` with a tokenizer that has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: bool = False):
        self.tokenizer: Any = tokenizer  # its methods are typed as unions of all their modes
        if bos and tokenizer.bos_token_id is None:
            raise ValueError(
                f"bos: the tokenizer {tokenizer.name_or_path!r} has no bos_token: drop bos, or set "
                "bos_token in tokenizer_config.json"
            )
        self.bos = bos

    @cached_property
    def eos(self) -> int:
        """Return the token that ends a response; ValueError where the tokenizer has none."""
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
        """Return the special tokens (BOS, none, or several) that are put before a text.

        Found by asking, since post-processors, `add_bos_token` flags and plain classes all do it
        their own way. What the tokenizer puts after a text (EOS) is not used.
        """
        text = "a"
        plain, wrapped = self.ids(text), self.ids(text, add_special_tokens=True)
        starts = range(len(wrapped) - len(plain) + 1)
        same = (i for i in starts if np.array_equal(wrapped[i : i + len(plain)], plain))
        opening, bos = wrapped[: next(same, 0)], self.tokenizer.bos_token_id
        if self.bos and bos not in opening:
            opening = np.concatenate([np.array([bos], dtype=np.int32), opening])
        return opening

    @cached_property
    def special(self) -> frozenset[int]:
        """Return the tokens that are no text."""
        added = self.tokenizer.added_tokens_decoder.items()
        marked = {index for index, token in added if token.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    def tokenized(self, texts: Sequence[tuple[str, str]], **options: Any) -> Any:
        """Return what the tokenizer makes of several (field, text); a refusal names one of them."""
        options = {"add_special_tokens": False, **options}
        # verbose=False: lengths are checked against the user's budget, not against a warning.
        try:
            return self.tokenizer([text for _, text in texts], verbose=False, **options)
        except MemoryError:
            raise
        except Exception as error:  # a lone surrogate, as a rule
            if len(texts) > 1:
                for each in texts:
                    self.tokenized([each], **options)
            name, text = texts[0]
            reason = f"the tokenizer fails on it: {type(error).__name__}: {error}"
            raise BadField(name, reason, text) from error

    def ids_of(self, texts: Sequence[tuple[str, str]], **options: Any) -> list[np.ndarray]:
        """Return the ids [T] of each text; one call for several costs less than several calls."""
        encoding = self.tokenized(texts, **options)
        return [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]

    def ids(self, text: str, name: str = "text", **options: Any) -> np.ndarray:
        return self.ids_of([(name, text)], **options)[0]

    def is_blank(self, token: int) -> bool:
        return token not in self.special and not self.tokenizer.decode([token]).strip()

    def offsets(self, text: str, border: int, length: int, start: int) -> np.ndarray:
        """Return the characters [length, 2] of the tokens from `border` on.

        They are counted from `start` in the text. Tokens that stand for no character (EOS) get the
        empty interval [-1, -1).
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"spans need a tokenizer that knows its offsets, and "
                f"{type(self.tokenizer).__name__} is not a fast one: drop the spans"
            )
        encoding = self.tokenized([("spans", text)], return_offsets_mapping=True)
        characters = as_offsets(encoding["offset_mapping"][0])[border:][:length] - start
        padded = np.full((length, 2), -1, dtype=np.int64)
        padded[: len(characters)] = characters
        return padded
