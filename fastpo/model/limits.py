"""Check token ids against a model's embedding, and lengths against its positions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastpo.data.groups import Group
from fastpo.model.hidden import causal_lm, decoder_of

log = logging.getLogger(__name__)

# GPT-J and CodeGen look their rotations up, CTRL its waves, in a buffer of so many rows.
_TABLES = ("embed_positions", "pos_encoding")
_LEARNED = re.compile(r"wpe|pos")
_MADE_FOR_A_LENGTH = re.compile(r"rotary|rope|embed_positions")


def embedding_rows(model: nn.Module) -> int:
    """Count the token ids that a model takes, and whose logits its head forms."""
    inner = causal_lm(model)
    rows = _rows(next(inner.get_input_embeddings().parameters()))
    head: Any = getattr(inner.get_output_embeddings(), "weight", None)
    # A quantised weight has another shape.
    return rows if head is None or not head.is_floating_point() else min(rows, _rows(head))


def _rows(weight: Any) -> int:
    # ZeRO-3 leaves an empty tensor and keeps its shape beside it.
    return getattr(weight, "ds_shape", weight.shape)[0]


def vocabulary_size(tokenizer: Any) -> int:
    """Count the rows that an embedding needs for every token; `len` skips gaps in the ids."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


@dataclass(frozen=True)
class Vocabulary:
    """Hold the token ids that all of several models take.

    Args:
        rows: number of rows of the smallest embedding.
        owner: the model that has it, for messages.
        tokenizer: the tokenizer that made the ids, for messages.
    """

    rows: int
    owner: str
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any, model: nn.Module, *others: nn.Module | None) -> Vocabulary:
        """Read the vocabulary that a model and those beside it share; None stands for no model."""
        owner, rows = "the model", embedding_rows(model)
        for other in others:
            if other is not None and (fewer := embedding_rows(other)) < rows:
                owner, rows = (
                    getattr(causal_lm(other), "name_or_path", "") or "the reference",
                    fewer,
                )
        return cls(rows, owner, tokenizer)

    @property
    def padding(self) -> int:
        """Return a token to pad with: it is masked and never scored, so any known one will do."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and pad < self.rows else 0

    def check(self, ids: Sequence[int] | np.ndarray, where: str) -> None:
        """Refuse a token beyond the embedding with ValueError: a GPU would only abort."""
        beyond = np.asarray(ids)[np.asarray(ids) >= self.rows]
        if not len(beyond):
            return
        token = int(beyond[0])
        raise ValueError(
            f"{where}: token {token} of the rows is beyond {self.owner}'s embedding of {self.rows} "
            f"rows (it is {self.tokenizer.convert_ids_to_tokens(token)!r}, of a tokenizer with "
            f"{vocabulary_size(self.tokenizer)} tokens): name the tokenizer that the model was "
            "trained with, or resize the embedding: train with resize_embeddings: true (in Python, "
            "model.resize_token_embeddings)"
        )

    def check_groups(self, groups: Iterable[Group]) -> None:
        """Refuse the first group with a token beyond the embedding with ValueError.

        A larger vocabulary whose tokens do not occur in the groups does no harm.
        """
        for group in groups:
            self.check(group.token_ids, f"{group.source or 'data'}, row {group.row}")


@dataclass
class Positions:
    """Hold the reach of a model's positions.

    Args:
        limit: tokens in a row that the model was made for, or None where any length will do, as
            without positions or with ALiBi.
        name: name of the model's type.
        table: whether it looks positions up in a table, so that nothing runs beyond the limit.
        warned: whether a warning was given.
    """

    limit: int | None
    name: str
    table: bool = False
    warned: bool = False

    @classmethod
    def of(cls, *models: nn.Module | None) -> Positions:
        """Return the shortest reach of several models, which may lie on the meta device."""
        reaches = [cls._of(model) for model in models if model is not None]
        return min(reaches, key=lambda reach: math.inf if reach.limit is None else reach.limit)

    @classmethod
    def _of(cls, model: nn.Module) -> Positions:
        try:
            decoder = decoder_of(model)
        except ValueError:
            decoder = causal_lm(model)
        config = decoder.config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            return cls(None, config.model_type)
        modules = [(name.rpartition(".")[2], module) for name, module in decoder.named_modules()]
        if any(
            isinstance(module, nn.Embedding)
            and _LEARNED.search(name)
            and module.num_embeddings >= limit
            for name, module in modules
        ) or any(name.rpartition(".")[2] in _TABLES for name, _ in decoder.named_buffers()):
            return cls(limit, config.model_type, table=True)
        rope = getattr(config, "rope_parameters", None)
        if not rope and not any(_MADE_FOR_A_LENGTH.search(name) for name, _ in modules):
            return cls(None, config.model_type)
        return cls(_scaled(rope or {}, limit), config.model_type)

    def beyond(self, tokens: int) -> bool:
        """Return whether so many tokens in a row are too many."""
        return self.limit is not None and tokens > self.limit

    def told_of(self, what: str, remedy: str = "lower max_length") -> str:
        """Write the line that says what reaches beyond the limit."""
        made = f"{what}, {self.name} was made for {self.limit}: {remedy}"
        if self.table:
            return f"{made}; its table of positions ends there (max_position_embeddings)"
        return (
            f"{made}, or scale its rotary embedding (rope_parameters, or max_position_embeddings, "
            "in the model's config)"
        )

    def check(self, what: str, tokens: int, remedy: str = "lower max_length") -> None:
        """Warn where `tokens` in a row reach beyond the limit.

        Raises:
            ValueError: they do, and the model looks positions up in a table.
        """
        if not self.beyond(tokens):
            return
        self.warned = True
        if self.table:
            raise ValueError(self.told_of(what, remedy))
        log.warning("%s", self.told_of(what, remedy))

    def check_groups(self, groups: Iterable[Group]) -> None:
        """Run `check` on the group that reaches furthest."""
        if self.limit is None:
            return
        furthest = max(groups, key=_reach, default=None)
        if furthest is None or not self.beyond(tokens := _reach(furthest)):
            return
        where = f"{furthest.source or 'data'}, row {furthest.row}"
        if furthest.prompt_positions is not None and tokens == furthest.span:
            remedy = "lower position_synthesis.length"
            self.check(f"{where}: synthetic positions reach over {tokens}", tokens, remedy)
        else:
            self.check(f"{where}: {tokens} tokens of prompt and response", tokens)


def _reach(group: Group) -> int:
    """Count the positions of the longest prompt with a response, the reference's prompts too."""
    contexts = [*group.contexts, *group.for_reference.contexts]
    return max(
        context.end + max((len(r.input_ids) for r in context.responses), default=0)
        for context in contexts
    )


def _scaled(parameters: Mapping[str, Any], limit: int) -> int:
    """Return the limit under rope parameters; some configurations give the one before scaling."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    reaches = [limit]
    for rope in nested or [parameters]:
        factor, before = rope.get("factor"), rope.get("original_max_position_embeddings")
        if before is None and not nested:  # Gemma 3, with parameters by kind of layer, counts it in
            before = limit
        if rope.get("rope_type", "default") != "default" and factor and before:
            reaches.append(int(factor * before))
    return max(reaches)
