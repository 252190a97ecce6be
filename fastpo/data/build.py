"""Rows to groups: one row at a time, a whole data set, or a stream.

A malformed row raises BadRow, or with `on_bad_row="skip"` is left out, counted and listed; nothing
is repaired silently. Only prompts are ever truncated.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch.utils.data
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadField, BadRow, OnBadRow, naming, report
from fastpo.data.dialects import Columns
from fastpo.data.formats import (
    CONTEXTS,
    KNOWN,
    Example,
    Turn,
    check_distinct,
    read_row,
)
from fastpo.data.formats import EXTRAS as COLUMNS
from fastpo.data.groups import Group, Response
from fastpo.data.messages import message_text
from fastpo.data.positions import (
    PositionSynthesis,
    chunk_tokens,
    cut_chunks,
    synthetic_positions,
)
from fastpo.data.rows import FILE, ROW, TORN, exact_rows
from fastpo.data.templates import Encoded, Encoder
from fastpo.data.token_weights import check_schemes, span_weights, take_column, weighted

logger = logging.getLogger(__name__)

T = TypeVar("T")
Truncation = Literal["keep_end", "keep_start", "cut_middle", "cut_chunks", "error"]
ListToPairs = Literal["best_worst", "best_rest"]
EXTRAS = ("mismatched", *COLUMNS, *CONTEXTS)
# Prompts of a stream that a mismatched response is looked for in before its row is a bad one.
_REMEMBERED = 1000


@dataclass(frozen=True)
class DataOptions:
    """How rows become groups.

    Args:
        max_length: most tokens of the prompt plus any one of its responses; None: no limit.
        max_prompt_length: most tokens of a prompt.
        max_response_length: most tokens of a response, EOS included.
        truncation: what happens to a prompt that exceeds its budget, the lesser of
            `max_prompt_length` and what `max_length` leaves beside the longest response:
            "keep_end" and "keep_start" cut it (BOS stays), "cut_middle" keeps as much of its start
            as of its end, "cut_chunks" every chunk of the row's `chunk_spans` to the same length,
            "error" makes the row a bad row. A response is never cut: too long a response always
            makes a bad row.
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and lists them.
        chat_template_kwargs: passed to every `apply_chat_template`.
        list_to_pairs: None keeps ranked lists, "best_worst" makes one pair of each, "best_rest"
            pairs the best response with every lower ranked one.
        assistant_only: in a response of several messages score the assistant's alone.
        reference_prompt: column with the prompt after which the reference scores the responses,
            `prompt` itself or one whose name ends with `_prompt`.
        dialect: name of the reader of `fastpo.data.dialects` that every row is for; "auto" looks at
            each row's columns.
        columns: {name: the file's own name} renames columns before they are read, {name: None}
            drops them.
        text_as_messages: make messages of rows of text, for the tokenizer's chat template.
        append_eos: end responses with EOS, or the template's end of turn; a row's own column of
            that name wins.
        continue_final_message: responses go on with the assistant's message that ends the prompt;
            a row's own column of that name wins.
        bos: put the tokenizer's BOS before texts, also where the tokenizer itself puts none.
        token_weights: schemes that weigh single tokens, such as {"ld": 0.5}; the table is in
            `fastpo.data.token_weights`.
        position_synthesis: prompts of chunks (`chunk_spans`) get the positions of a longer context.
        seed: of the random scheme among the token weights, and of synthetic positions.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    truncation: Truncation = "keep_end"
    on_bad_row: OnBadRow = "error"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    list_to_pairs: ListToPairs | None = None
    assistant_only: bool = True
    reference_prompt: str = "prompt"
    dialect: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    text_as_messages: bool = False
    append_eos: bool = True
    continue_final_message: bool = False
    bos: bool = False
    token_weights: Mapping[str, Any] = field(default_factory=dict)
    position_synthesis: PositionSynthesis | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_schemes(self.token_weights)
        for name, choices in (
            ("truncation", get_args(Truncation)),
            ("on_bad_row", get_args(OnBadRow)),
            ("list_to_pairs", (None, *get_args(ListToPairs))),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {choices}")
        if self.reference_prompt != "prompt" and not self.reference_prompt.endswith("_prompt"):
            raise ValueError(
                f"reference_prompt={self.reference_prompt!r}: name a column that ends with "
                "'_prompt'"
            )
        self.reader()
        for name, own in self.columns.items():
            if own is not None and name not in KNOWN and not name.endswith("_prompt"):
                near = get_close_matches(name, KNOWN, n=1)
                raise ValueError(
                    f"columns={{{name}: {own}}}: nothing reads a column {name!r}"
                    + (f", is {near[0]!r} meant?" if near else "; docs/data.md lists the columns")
                )
        for name in ("max_length", "max_prompt_length", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1, or None for no limit")

    def reader(self) -> Columns:
        """Return what reads the columns of one data set."""
        return Columns(self.dialect, self.columns, text_as_messages=self.text_as_messages)


def _fit(
    prompt: np.ndarray,
    lengths: Sequence[int],
    names: Sequence[str],
    leading: int,
    options: DataOptions,
    chunks: np.ndarray | None = None,
    column: str = "prompt",
) -> np.ndarray:
    """The prompt, from `column`, within its budget; `chunks` [n, 2] are intervals of its tokens."""
    longest = max(range(len(lengths)), key=lambda k: lengths[k])
    name, length = names[longest], lengths[longest]
    if options.max_response_length is not None and length > options.max_response_length:
        raise BadField(
            name, f"{length} tokens, more than max_response_length={options.max_response_length}"
        )
    budget, least = len(prompt), min(len(prompt), leading + 1)
    if options.max_length is not None:
        budget = min(budget, options.max_length - length)
        if budget < least:
            raise BadField(
                name,
                f"{length} tokens leave no room for a prompt in max_length={options.max_length}",
            )
    if options.max_prompt_length is not None:
        budget = min(budget, options.max_prompt_length)
    if budget == len(prompt):
        return prompt
    if options.truncation == "error" or budget < least:
        raise BadField(
            column,
            f"{len(prompt)} tokens, but {budget} fit with max_length={options.max_length}, "
            f"max_prompt_length={options.max_prompt_length} and a response of {length}",
        )
    if options.truncation == "keep_start":
        return prompt[:budget]
    if options.truncation == "cut_chunks":
        if chunks is None:
            raise BadField(column, "truncation='cut_chunks' cuts the `prompt` column alone")
        return prompt[cut_chunks(chunks, len(prompt), budget)]
    start = max(leading, budget // 2) if options.truncation == "cut_middle" else leading
    return np.concatenate([prompt[:start], prompt[len(prompt) - budget + start :]])


def _other_prompt(
    name: str, example: Example, encoded: Encoded, encoder: Encoder, options: DataOptions
) -> np.ndarray:
    """The tokens of a further prompt of the row, which the same response tokens must follow."""
    moved = encoder.num_moved
    try:
        other = encoder.encode(replace(example, prompt=example.prompts[name], spans=None))
        names = [*example.names, *example.extras]
        lengths = [len(ids) for ids, _ in other.responses]
        prompt = _fit(other.prompt, lengths, names, other.leading, options)
    except BadField as bad:
        raise BadField(name if bad.field == "prompt" else bad.field, bad.reason, bad.value) from bad
    encoder.num_moved = moved  # counts rows
    for response, here, there in zip(names, encoded.responses, other.responses, strict=True):
        if not all(map(np.array_equal, here, there)):
            raise BadField(
                name,
                f"after it {response} is divided into other tokens than after the prompt: end both "
                "prompts alike, best without a blank",
            )
    return prompt


def _kept_chunks(kept: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """[n, 2] the chunks in a truncated prompt, whose tokens have the indices `kept`."""
    left = np.searchsorted(kept, chunks)
    left = left[left[:, 0] < left[:, 1]]
    if not len(left):
        raise BadField("prompt", f"no token of its {len(chunks)} chunks is left in its budget")
    return left


def _with_prompts(
    group: Group,
    prompts: Mapping[str, np.ndarray],
    extras: Sequence[str],
    reference_prompt: str,
) -> Group:
    """The group with those of its candidates that are scored again after other prompts."""
    again = {
        role: replace(group.responses[CONTEXTS[role][1]], prompt_ids=prompts[CONTEXTS[role][0]])
        for role in extras
        if role in CONTEXTS
    }
    return replace(
        group,
        extras={**group.extras, **again},
        short_prompt_ids=prompts.get(reference_prompt),
    )


def _with_turns(group: Group, turns: Sequence[Turn], leading: int, options: DataOptions) -> Group:
    """The group whose reference reads each turn after a prompt of its own."""
    fitted = []
    for name, prompt, answer in turns:
        prompt = _fit(prompt, [len(answer)], [name], leading, options, column=name)
        fitted.append(Response(answer, np.ones(len(answer), dtype=bool), prompt_ids=prompt))
    return replace(group, short_prompt_ids=fitted[0].prompt_ids, short_turns=fitted)


def origin(row: Any, source: str, index: int) -> tuple[str, int]:
    """The row's own file and number there, if it knows them; BadRow where it was a broken line."""
    if isinstance(row, Mapping) and row.get(FILE) is not None:
        source, index = row[FILE], row[ROW]
    if isinstance(row, Mapping) and row.get(TORN) is not None:
        raise BadRow(source, index, "line", row[TORN])
    return source, index


def own_columns(row: Any) -> Any:
    """Return a row without what `load_rows` adds."""
    if not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if name not in (FILE, ROW, TORN)}


class Builder:
    """Make groups of the rows of one data set, and say afterwards what was odd about them.

    Args:
        tokenizer, options, extras, needs, source: as of `build_groups`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        source: str,
        extras: Sequence[str] = (),
        needs: Collection[str] | None = None,
    ):
        self.options, self.source, self.extras, self.needs = options, source, extras, needs
        self.columns = options.reader()
        names = ("assistant_only", "append_eos", "continue_final_message", "bos")
        wanted = {name: getattr(options, name) for name in names}
        self.encoder = Encoder(tokenizer, options.chat_template_kwargs, **wanted)
        self.has_template = tokenizer.chat_template is not None
        self.specials = tokenizer.all_special_tokens  # a list that each request makes anew
        self.num_texts = self.num_glued = 0
        self._told: set[str] = set()

    def groups(self, row: Any, index: int) -> list[Group]:
        """The groups of one row: one, or several where a list becomes pairs.

        Raises:
            BadRow: names the row's own file and its number there, if it knows them.
        """
        source, index = origin(row, self.source, index)
        with naming(source, index):
            return self._groups(own_columns(row), source, index)

    def _groups(self, row: Any, source: str, index: int) -> list[Group]:
        options, extras = self.options, self.extras
        columns = dict.fromkeys(CONTEXTS[role][0] for role in extras if role in CONTEXTS)
        if options.reference_prompt != "prompt":
            columns[options.reference_prompt] = None
        in_chunks = options.position_synthesis is not None or options.truncation == "cut_chunks"
        example = read_row(row, extras, tuple(columns), self.needs, in_chunks, self.columns)
        self._look_at(example)
        try:
            return self._made(example, tuple(columns), in_chunks, source, index)
        except BadField as bad:
            raise bad.called(example.fields) from bad

    def _made(
        self, example: Example, columns: Sequence[str], in_chunks: bool, source: str, index: int
    ) -> list[Group]:
        options, extras, synthesis = self.options, self.extras, self.options.position_synthesis
        if in_chunks and (example.chunk_spans is None or example.prompt is None):
            raise BadField(
                "chunk_spans",
                "missing, or no `prompt`: position_synthesis and truncation='cut_chunks' need the "
                "characters of each passage of the prompt",
            )
        encoded = self.encoder.encode(example, prompt_offsets=in_chunks)
        chunks = None
        if in_chunks:
            chunks = chunk_tokens(encoded.prompt_offsets, example.chunk_spans)  # pyright: ignore
        candidates = encoded.responses[: len(example.names)]
        contents = [ids.tobytes() for ids, _ in candidates]
        check_distinct(example.names, example.ranks, contents)
        lengths = [len(ids) for ids, _ in encoded.responses]
        names = [*example.names, *example.extras]
        whole = np.arange(len(encoded.prompt))
        column = "prompt" if example.tokens is None else names[0]
        kept = _fit(whole, lengths, names, encoded.leading, options, chunks, column)
        prompt = encoded.prompt[kept]
        responses = [
            Response(ids, mask, label=label, score=score, rank=rank)
            for (ids, mask), label, score, rank in zip(
                candidates, example.labels, example.scores, example.ranks, strict=True
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
                    take_column(response, column, values, name)
                except BadField:
                    if self.needs is not None or column == "token_weights":
                        raise
        group = Group(
            prompt,
            responses,
            row=index,
            weight=example.weight,
            margin=example.margin,
            cohort=example.cohort,
            extras={
                role: Response(ids, mask)
                for role, (ids, mask) in zip(
                    example.extras, encoded.responses[len(example.names) :], strict=True
                )
            },
            source=source,
        )
        groups = [group]
        if options.list_to_pairs is not None and example.ranked:
            groups = _pairs_of(group, example, options.list_to_pairs)
        if options.token_weights:
            groups = [weighted(g, options.token_weights, options.seed) for g in groups]
        if synthesis is not None:
            chunks = _kept_chunks(kept, chunks)  # pyright: ignore[reportArgumentType]
            end = synthesis.length - max(lengths)
            seeds = ([options.seed, index, variant] for variant in range(synthesis.variants))
            drawn = [
                synthetic_positions(chunks, len(kept), end, np.random.default_rng(seed))
                for seed in seeds
            ]
            groups = [replace(g, prompt_positions=each) for each in drawn for g in groups]
        if example.turns is not None:
            turns, leading = example.turns, encoded.leading
            return [_with_turns(group, turns, leading, options) for group in groups]
        if not columns:
            return groups
        prompts = {
            name: _other_prompt(name, example, encoded, self.encoder, options) for name in columns
        }
        wanted = extras, options.reference_prompt
        # Last, so that a response scored again has its candidate's token weights.
        return [_with_prompts(group, prompts, *wanted) for group in groups]

    def _look_at(self, example: Example) -> None:
        """Count texts that a chat model would read without its template, and glued borders."""
        if not self.has_template or example.tokens is not None or example.conversational:
            return
        prompt = example.prompt
        if any(token in f"{prompt}{example.responses[0]}" for token in self.specials):
            return  # rendered beforehand
        self.num_texts += 1
        answers = [response for response in example.responses if isinstance(response, str)]
        if isinstance(prompt, str) and prompt and not prompt[-1].isspace():
            self.num_glued += any(not answer[:1].isspace() for answer in answers)

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
                logger.warning("%s: %s", self.source, text)
        self._told |= said.keys()


def _pairs_of(group: Group, example: Example, mode: ListToPairs) -> list[Group]:
    best = group.responses[0]
    worse = [r for r in group.responses if r.rank != best.rank]
    if not worse:
        raise BadField("scores", "all equal, so the list holds no pair", example.scores)
    if mode == "best_worst":
        worse = worse[-1:]
    return [
        replace(group, responses=[best, replace(response, label=False, rank=1)])
        for response in worse
    ]


def row_to_group(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    needs: Collection[str] | None = None,
    index: int = 0,
    source: str = "rows",
) -> list[Group]:
    """The groups of one row: one, or several where a list becomes pairs.

    Raises:
        BadRow: whatever `options.on_bad_row` says.
    """
    options = options or DataOptions()
    return Builder(tokenizer, options, source, needs=needs).groups(row, index)


def _check_extras(extras: Sequence[str]) -> None:
    unknown = [role for role in extras if role not in EXTRAS]
    if unknown:
        raise ValueError(f"extras={tuple(extras)}: cannot build {unknown[0]!r}, only {EXTRAS}")


def good_rows(
    rows: Iterable[Any],
    check: Callable[[dict[str, Any]], T],
    *,
    source: str,
    on_bad_row: OnBadRow,
) -> Iterator[tuple[dict[str, Any], T]]:
    """Rows, as the file has them, and what `check` makes of each: for work that needs no groups.

    Raises:
        BadRow: for a broken line or a BadField of `check`, unless `on_bad_row` is "skip".
        ValueError: no good row.
    """
    skipped: list[BadRow] = []
    num_rows = 0
    for row in exact_rows(rows, source):
        own = own_columns(row)
        try:
            with naming(*origin(row, source, num_rows)):
                checked = check(own)
        except BadRow as bad:
            if on_bad_row == "error":
                raise
            skipped.append(bad)
        else:
            yield own, checked
        num_rows += 1
    if len(skipped) == num_rows:
        raise ValueError(f"{source}: no usable row; {report(skipped, num_rows, 10)}")
    if skipped:
        logger.warning("%s: %s", source, report(skipped, num_rows, 10))


class Spread(NamedTuple):
    """Least, median and greatest of a count."""

    min: int
    median: float
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(min(values), float(np.median(values)), max(values))

    def __str__(self) -> str:
        return f"{self.min} / {self.median:g} / {self.max}"


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a data set, extra responses included."""

    groups: int
    prompt: Spread  # tokens of a prompt
    response: Spread  # tokens of a response
    shared: int  # with one copy of each prompt
    unshared: int  # with one prompt copy per response

    @classmethod
    def of(cls, groups: Sequence[Group]) -> TokenCounts:
        return cls(
            groups=len(groups),
            prompt=Spread.of([len(g.prompt_ids) for g in groups]),
            response=Spread.of([len(r.input_ids) for g in groups for r in g.every]),
            shared=sum(len(g) for g in groups),
            unshared=sum(g.unshared_tokens for g in groups),
        )

    def __str__(self) -> str:
        return (
            f"{self.groups} groups; tokens (min / median / max): prompt {self.prompt}, response "
            f"{self.response}; {self.shared} in all with one prompt copy per group, "
            f"{self.unshared} ({self.unshared / self.shared:.2f}x) with one per response"
        )


class GroupDataset(torch.utils.data.Dataset[Group]):
    """Groups in the order of their rows.

    Attributes:
        groups: the groups.
        skipped: the bad rows that were left out.
        num_rows: rows read.
        statistics: token counts.
    """

    def __init__(self, groups: list[Group], skipped: list[BadRow], num_rows: int):
        self.groups, self.skipped, self.num_rows = groups, skipped, num_rows
        self.statistics = TokenCounts.of(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]

    def skipped_report(self, shown: int = 10) -> str:
        """How many rows were skipped, for which reasons, and the first of them."""
        return report(self.skipped, self.num_rows, shown)


def _donor(group: Group, others: Iterable[Group], options: DataOptions) -> Group | None:
    """The first with another prompt whose first response fits beside the group's prompt."""
    most = float("inf") if options.max_length is None else options.max_length
    room = most - len(group.prompt_ids)
    fitting = (other for other in others if len(other.responses[0].input_ids) <= room)
    return next((other for other in fitting if not _same_prompt(group, other)), None)


def _borrow(group: Group, donor: Group | None, options: DataOptions) -> Group:
    """The group with the donor's first response as its mismatched one.

    The token ids are taken as they are: a response to any prompt is tokenised from the border on.
    """
    if donor is None:
        raise BadRow(
            group.source,
            group.row,
            "mismatched",
            f"no response to another prompt fits beside the {len(group.prompt_ids)} tokens of this "
            f"prompt in max_length={options.max_length}: raise it, or lower max_prompt_length",
        )
    response = donor.responses[0]
    mismatched = Response(response.input_ids, response.loss_mask, label=False)
    return replace(group, extras={**group.extras, "mismatched": mismatched})


def _same_prompt(a: Group, b: Group) -> bool:
    return np.array_equal(a.prompt_ids, b.prompt_ids)


ONE_PROMPT = (
    "{source}: extras=('mismatched',) pairs each prompt with the answer to another one, but all "
    "{n} groups have the same prompt; use rows with at least two prompts, or an objective that "
    "needs no mismatched responses"
)


def _mismatched(
    groups: list[Group], options: DataOptions, source: str, skipped: list[BadRow]
) -> list[Group]:
    """Rotation by one over the order of the data, on to the next group with another prompt.

    Further on where that group's response does not fit.
    """
    n = len(groups)
    donor = -1
    donors = [-1] * n
    # Twice backward round the circle: what follows i is i + 1, or what follows i + 1.
    for i in itertools.chain(reversed(range(n)), reversed(range(n))):
        following = (i + 1) % n
        if not _same_prompt(groups[i], groups[following]):
            donor = following
        donors[i] = donor
    if donor < 0:
        raise ValueError(ONE_PROMPT.format(source=source, n=n))
    found = []
    for group, first in zip(groups, donors, strict=True):
        others = (groups[(first + k) % n] for k in range(n))
        try:
            found.append(_borrow(group, _donor(group, others, options), options))
        except BadRow as bad:
            if options.on_bad_row == "error":
                raise
            skipped.append(bad)
    return found


def build_groups(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    extras: Sequence[str] = (),
    needs: Collection[str] | None = None,
    source: str = "rows",
    progress: bool = True,
) -> GroupDataset:
    """All rows as groups, in order, tokenised once.

    Args:
        rows: dicts, as from `load_rows`; `docs/data.md` lists the formats.
        tokenizer: the model's; its chat template is used for conversations.
        options: see DataOptions.
        extras: roles of further responses; "mismatched" (KTO) gives each group the first response
            of the next group with another prompt that fits into `max_length`, "gold" and
            "ref_response" come from columns, "context_chosen" and its kind are candidates after the
            prompt of another column.
        needs: what the objective takes, `PreferenceLoss.needs`: the columns that it reads are
            checked, and others not looked at; None takes of every column what can be used.
        source: name of the data for messages.
        progress: show a progress bar on a terminal.

    Raises:
        BadRow: at the first bad row, unless `options.on_bad_row` is "skip".
        ValueError: no rows, no good row, or "mismatched" with fewer than two prompts.
    """
    options = options or DataOptions()
    _check_extras(extras)
    builder = Builder(tokenizer, options, source, extras, needs)
    groups: list[Group] = []
    skipped: list[BadRow] = []
    num_rows = 0
    total = len(rows) if isinstance(rows, Sized) else None
    # disable=None: only where stderr is a terminal.
    hidden = None if progress else True
    bar = tqdm(exact_rows(rows, source), total=total, desc=f"Tokenising {source}", disable=hidden)
    for index, row in enumerate(bar):
        num_rows += 1
        try:
            groups += builder.groups(row, index)
        except BadRow as bad:
            if options.on_bad_row == "error":
                raise
            skipped.append(bad)
    builder.columns.check_seen(source)
    if groups and "mismatched" in extras:
        groups = _mismatched(groups, options, source, skipped)
    if not groups:
        raise ValueError(f"{source}: no usable row; {report(skipped, num_rows, 10)}")
    dataset = GroupDataset(groups, skipped, num_rows)
    builder.tell()
    if skipped:
        logger.warning("%s: %s", source, dataset.skipped_report())
    logger.info("%s: %s", source, dataset.statistics)
    return dataset


class GroupStream(torch.utils.data.IterableDataset[Group]):
    """Groups built as they are read, for rows that are streamed or do not fit memory.

    The same groups in the same order as `build_groups`, except that a mismatched response comes
    from the last group before that has another prompt and a response that fits (before there is
    one: from the first group after). `skipped` and `num_rows` tell of all that was read so far, a
    row of several passes once. With several DataLoader workers each builds its share and counts its
    own; a `datasets.IterableDataset` divides itself, other rows are dealt out in turn.

    Args and errors: as `build_groups`.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions | None = None,
        *,
        extras: Sequence[str] = (),
        needs: Collection[str] | None = None,
        source: str = "rows",
    ):
        _check_extras(extras)
        self.rows, self.tokenizer, self.source = rows, tokenizer, source
        self.options, self.extras, self.needs = options or DataOptions(), tuple(extras), needs
        self.num_rows = 0
        self._skipped: dict[tuple[str, int], BadRow] = {}
        self._head: list[Group] = []
        self._builder = Builder(tokenizer, self.options, source, self.extras, needs)

    @property
    def skipped(self) -> list[BadRow]:
        """The bad rows that were left out so far."""
        return list(self._skipped.values())

    def head(self, count: int) -> list[Group]:
        """The first groups of the first pass, the same however often they are asked for."""
        if len(self._head) < count:
            self.set_epoch(0)
            self._head = list(itertools.islice(self, count))
            self._builder.tell()
        return self._head[:count]

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to rows that are shuffled by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def skipped_report(self, shown: int = 10) -> str:
        """How many rows were skipped so far, for which reasons, and the first of them."""
        return report(self.skipped, self.num_rows, shown)

    def __iter__(self) -> Iterator[Group]:
        groups = self._groups()
        return self._with_mismatched(groups) if "mismatched" in self.extras else groups

    def _groups(self) -> Iterator[Group]:
        builder = self._builder
        num_rows = num_bad = 0
        rows = enumerate(exact_rows(self.rows, self.source))
        worker = torch.utils.data.get_worker_info()
        if worker is not None and not isinstance(self.rows, torch.utils.data.IterableDataset):
            rows = itertools.islice(rows, worker.id, None, worker.num_workers)
        for index, row in rows:
            num_rows += 1
            self.num_rows = max(self.num_rows, num_rows)
            try:
                yield from builder.groups(row, index)
            except BadRow as bad:
                if self.options.on_bad_row == "error":
                    raise
                num_bad += 1
                self._skipped[bad.source, bad.row] = bad
        if num_bad == num_rows and worker is None:
            raise ValueError(f"{self.source}: no usable row; {self.skipped_report()}")
        if worker is None:
            builder.columns.check_seen(self.source)
        builder.tell()
        if num_bad:
            logger.warning("%s: %s", self.source, self.skipped_report())

    def _with_mismatched(self, groups: Iterator[Group]) -> Iterator[Group]:
        waiting: list[Group] = []  # for a response that fits, in order
        latest: deque[Group] = deque(maxlen=_REMEMBERED)  # of each run of one prompt
        for group in groups:
            if latest and _same_prompt(group, latest[-1]):
                latest.pop()
            latest.append(group)
            waiting.append(group)
            while waiting:
                donor = _donor(waiting[0], reversed(latest), self.options)
                if donor is None and len(latest) < _REMEMBERED:
                    break
                yield from self._borrowing(waiting.pop(0), donor)
        if len(latest) == 1:
            raise ValueError(ONE_PROMPT.format(source=self.source, n=len(waiting)))
        for group in waiting:
            donor = _donor(group, reversed(latest), self.options)
            yield from self._borrowing(group, donor)

    def _borrowing(self, group: Group, donor: Group | None) -> Iterator[Group]:
        try:
            yield _borrow(group, donor, self.options)
        except BadRow as bad:
            if self.options.on_bad_row == "error":
                raise
            self._skipped[bad.source, bad.row] = bad
