"""One row to its groups: read, tokenised, cut to its budget, with the weights of its tokens.

A malformed row raises BadRow; nothing is repaired silently. Only prompts are ever truncated.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadField
from fastpo.data.columns import CONTEXT_ROLES, EXTRA_ROLES
from fastpo.data.example import Example, check_distinct
from fastpo.data.formats import read_row
from fastpo.data.groups import Group, Response
from fastpo.data.messages import message_text
from fastpo.data.options import DataOptions, ListToPairs
from fastpo.data.positions import chunk_tokens, synthetic_positions
from fastpo.data.source_rows import SourceRow
from fastpo.data.templates import Encoded, Encoder
from fastpo.data.token_weights import check_length, multiplied, span_weights, weighted
from fastpo.data.truncation import fit_prompt, kept_chunks

log = logging.getLogger(__name__)


class Builder:
    """Make groups of the rows of one data set, and say afterwards what was odd about them.

    Args:
        tokenizer, options, extras, needs, source: as of `build_groups`.

    Raises:
        ValueError: a role among the extras that cannot be built.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        source: str,
        extras: Sequence[str] = (),
        needs: Collection[str] | None = None,
    ):
        unknown = [role for role in extras if role not in EXTRA_ROLES]
        if unknown:
            raise ValueError(
                f"extras={tuple(extras)}: cannot build {unknown[0]!r}, only {EXTRA_ROLES}"
            )
        self.options, self.source, self.extras, self.needs = options, source, extras, needs
        self.columns = options.reader()
        prompts = dict.fromkeys(CONTEXT_ROLES[role][0] for role in extras if role in CONTEXT_ROLES)
        if options.reference_prompt != "prompt":
            prompts[options.reference_prompt] = None
        self.prompts = tuple(prompts)  # columns with a further prompt
        self.in_chunks = (
            options.position_synthesis is not None or options.truncation == "cut_chunks"
        )
        names = ("assistant_only", "append_eos", "continue_final_message", "bos")
        wanted = {name: getattr(options, name) for name in names}
        self.encoder = Encoder(tokenizer, options.chat_template_kwargs, **wanted)
        self.has_template = tokenizer.chat_template is not None
        self.specials = tokenizer.all_special_tokens  # a list that each request makes anew
        self.num_texts = self.num_glued = 0
        self._told: set[str] = set()

    def groups(self, row: SourceRow) -> list[Group]:
        """Return the groups of one row: one, or several where a list becomes pairs.

        Raises:
            BadRow: names the row's own file and its number there, if it knows them.
        """
        with row.naming():
            how = self.extras, self.prompts, self.needs, self.in_chunks, self.columns
            example = read_row(row.columns, *how)
            self._look_at(example)
            try:
                return self._groups(example, row)
            except BadField as bad:
                raise bad.called(example.fields) from bad

    def _groups(self, example: Example, row: SourceRow) -> list[Group]:
        options = self.options
        if self.in_chunks and (example.chunk_spans is None or example.prompt is None):
            raise BadField(
                "chunk_spans",
                "missing, or no `prompt`: position_synthesis and truncation='cut_chunks' need the "
                "characters of each passage of the prompt",
            )
        encoded = self.encoder.encode(example, prompt_offsets=self.in_chunks)
        chunks = None
        if encoded.prompt_offsets is not None and example.chunk_spans is not None:
            chunks = chunk_tokens(encoded.prompt_offsets, example.chunk_spans)
        contents = [ids.tobytes() for ids, _ in encoded.responses[: len(example.names)]]
        check_distinct(example.names, example.ranks, contents)
        kept = self._kept(example, encoded, chunks)
        prompt = encoded.prompt[kept]
        candidates = self._candidates(example, encoded)
        lists = [candidates]
        if options.list_to_pairs is not None and example.ranked:
            lists = _pairs_of(candidates, example, options.list_to_pairs)
        if options.token_weights:
            how = options.token_weights, options.seed, row.index
            lists = [weighted(responses, *how) for responses in lists]
        positions = [None]
        if options.position_synthesis is not None and chunks is not None:
            longest = max(len(ids) for ids, _ in encoded.responses)
            positions = self._positions(kept, chunks, longest, row.index)
        turns, prompts = None, {}
        if example.turns is not None:
            turns = [self._turn(*turn, encoded.leading) for turn in example.turns]
        else:
            prompts = {name: self._other_prompt(name, example, encoded) for name in self.prompts}
        short = prompts.get(options.reference_prompt) if turns is None else turns[0].prompt_ids
        others = encoded.responses[len(example.names) :]
        extras = {
            role: Response(*tokens) for role, tokens in zip(example.extras, others, strict=True)
        }
        return [
            Group(
                prompt_ids=prompt,
                responses=responses,
                row=row.index,
                weight=example.weight,
                margin=example.margin,
                population=example.population,
                extras=extras | self._scored_again(responses, prompts),
                source=row.source,
                short_prompt_ids=short,
                short_turns=turns,
                prompt_positions=each,
            )
            for each in positions
            for responses in lists
        ]

    def _kept(self, example: Example, encoded: Encoded, chunks: np.ndarray | None) -> np.ndarray:
        """Return the indices of the prompt's tokens that its budget leaves."""
        names = [*example.names, *example.extras]
        return fit_prompt(
            np.arange(len(encoded.prompt)),
            [len(ids) for ids, _ in encoded.responses],
            names,
            encoded.leading,
            self.options,
            chunks,
            "prompt" if example.tokens is None else names[0],
        )

    def _candidates(self, example: Example, encoded: Encoded) -> list[Response]:
        """Return the row's candidates, with the numbers of their tokens."""
        responses = [
            Response(*tokens, label=label, score=score, rank=rank)
            for tokens, label, score, rank in zip(
                encoded.responses[: len(example.names)],
                example.labels,
                example.scores,
                example.ranks,
                strict=True,
            )
        ]
        for k, spans in enumerate(example.spans or ()):
            content = example.responses[k]
            text = content if isinstance(content, str) else message_text(content[-1])
            responses[k].token_weights = span_weights(
                encoded.offsets[k], spans, len(text), example.names[k]
            )
        for column, arrays in example.per_token.items():
            for response, values, name in zip(responses, arrays, example.names, strict=True):
                try:
                    check_length(values, response, column, name)
                except BadField:
                    if self.needs is not None or column == "token_weights":
                        raise
                    continue
                if column == "token_weights":
                    response.token_weights = multiplied(response.token_weights, values)
                else:
                    response.token_rewards = values
        return responses

    def _positions(
        self, kept: np.ndarray, chunks: np.ndarray, longest: int, index: int
    ) -> list[np.ndarray]:
        """Return positions [P] of the prompt's tokens that are left, one array a variant.

        Args:
            kept: [P] indices of those tokens in the whole prompt.
            chunks: [n, 2] intervals of the whole prompt's tokens.
            longest: tokens of the longest response.
            index: the row's number, which with the seed decides the draws.
        """
        synthesis: Any = self.options.position_synthesis
        chunks = kept_chunks(kept, chunks)
        seeds = ([self.options.seed, index, variant] for variant in range(synthesis.variants))
        return [
            synthetic_positions(
                chunks, len(kept), synthesis.length - longest, np.random.default_rng(seed)
            )
            for seed in seeds
        ]

    def _turn(self, name: str, prompt: np.ndarray, answer: np.ndarray, leading: int) -> Response:
        """Return a turn that the reference reads after a prompt of its own."""
        prompt = fit_prompt(prompt, [len(answer)], [name], leading, self.options, column=name)
        return Response(answer, np.ones(len(answer), dtype=bool), prompt_ids=prompt)

    def _other_prompt(self, name: str, example: Example, encoded: Encoded) -> np.ndarray:
        """Return the tokens of a further prompt, which the same response tokens must follow."""
        encoder, moved = self.encoder, self.encoder.num_moved
        try:
            other = encoder.encode(replace(example, prompt=example.prompts[name], spans=None))
            names = [*example.names, *example.extras]
            lengths = [len(ids) for ids, _ in other.responses]
            prompt = fit_prompt(other.prompt, lengths, names, other.leading, self.options)
        except BadField as bad:
            field = name if bad.field == "prompt" else bad.field
            raise BadField(field, bad.reason, bad.value) from bad
        encoder.num_moved = moved  # counts rows
        for response, here, there in zip(names, encoded.responses, other.responses, strict=True):
            if not all(map(np.array_equal, here, there)):
                raise BadField(
                    name,
                    f"after it {response} is divided into other tokens than after the prompt: end "
                    "both prompts alike, best without a blank",
                )
        return prompt

    def _scored_again(
        self, responses: Sequence[Response], prompts: Mapping[str, np.ndarray]
    ) -> dict[str, Response]:
        """Return candidates, token weights included, that follow other prompts, by role."""
        again = {}
        for role in self.extras:
            if role in CONTEXT_ROLES:
                column, place = CONTEXT_ROLES[role]
                again[role] = replace(responses[place], prompt_ids=prompts[column])
        return again

    def _look_at(self, example: Example) -> None:
        """Count texts that a chat model would read without its template, and glued borders."""
        if not self.has_template or example.tokens is not None or example.conversational:
            return
        prompt = example.prompt
        if any(token in f"{prompt}{example.responses[0]}" for token in self.specials):
            return  # rendered beforehand
        self.num_texts += 1
        texts = [response for response in example.responses if isinstance(response, str)]
        if isinstance(prompt, str) and prompt and not prompt[-1].isspace():
            self.num_glued += any(not text[:1].isspace() for text in texts)

    def tell(self) -> None:
        """Log what was odd about the rows so far, each thing once."""
        said = {}
        if ignored := self.columns.told_of_ignored():
            said["ignored"] = ignored
        if self.num_texts:
            said["text"] = (
                f"{self.num_texts} rows are text, so the tokenizer's chat template is not used; in "
                f"{self.num_glued / self.num_texts:.0%} of them no blank parts prompt and response "
                "(`text_as_messages: true` makes messages of them)"
            )
        if self.encoder.num_moved:
            said["moved"] = (
                f"in {self.encoder.num_moved} rows a token spans the border of prompt and "
                "response, or the chat template writes the answer's header differently; there the "
                "response begins a little earlier"
            )
        for what, text in said.items():
            if what not in self._told:
                log.warning("%s: %s", self.source, text)
        self._told |= said.keys()


def _pairs_of(
    responses: Sequence[Response], example: Example, mode: ListToPairs
) -> list[list[Response]]:
    best = responses[0]
    worse = [r for r in responses if r.rank != best.rank]
    if not worse:
        raise BadField("scores", "all equal, so the list holds no pair", example.scores)
    if mode == "best_worst":
        worse = worse[-1:]
    return [[best, replace(response, label=False, rank=1)] for response in worse]


def row_to_group(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    needs: Collection[str] | None = None,
    index: int = 0,
    source: str = "rows",
) -> list[Group]:
    """Return the groups of one row: one, or several where a list becomes pairs.

    Raises:
        BadRow: whatever `options.on_bad_row` says.
    """
    builder = Builder(tokenizer, options or DataOptions(), source, needs=needs)
    return builder.groups(SourceRow.of(row, source, index))
