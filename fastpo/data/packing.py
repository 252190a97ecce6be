"""Pack groups into one batch: one row, one copy of each prompt, and the tables that go with it.

The padded form, one row per response with its own prompt copy, comes from the same tables. Target
tokens, responses and groups are numbered alike, so both can be compared value by value. In both
a response's first token is predicted by the hidden state of the prompt's last token. A response
that follows another prompt than its group's is packed behind that prompt, as if in a further group.

Shapes: G groups, K candidates, R responses (candidates and extras), N target tokens, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpo.batch import Batch, Counts, GroupSpan, Layout, TargetTokens
from fastpo.data.groups import Context, Group, Response
from fastpo.segments import Bounds, Segments


class ModelInputs(NamedTuple):
    """Hold the fields of `Batch` that a model reads."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    layout: Layout | None


def _labels(group: Group) -> list[bool]:
    """Return candidates' labels; where a group built by hand has none, only the best is True."""
    return [slot == 0 if r.label is None else r.label for slot, r in enumerate(group.responses)]


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """Return [0, 1, 0, 1, 2] for [2, 3]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def group_key(group: Group) -> str:
    """Return a hash of what reference log-probs depend on: tokens, positions and loss masks."""
    digest = hashlib.sha256()
    parts, sizes = [], []
    for prompt, responses, positions in group.for_reference.contexts:
        parts.append(prompt.astype("<i4"))
        for response in responses:
            parts += [response.input_ids.astype("<i4"), response.loss_mask.astype("u1")]
        sizes.append([len(prompt), *(len(response.input_ids) for response in responses)])
        if positions is not None:
            parts.append(positions.astype("<i4"))
            sizes.append(["positions"])
    digest.update(f"{len(group.responses)};{','.join(group.roles)};{sizes};".encode())
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()


def row_order(num_groups: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return [G] int64, the order in which an epoch of this seed visits the groups."""
    return np.random.default_rng([seed, epoch]).permutation(num_groups)


def _num_weighted(response: Response) -> int:
    """Count the scored tokens of a response, less those of weight zero."""
    if response.token_weights is None:
        return int(response.loss_mask.sum())
    return int((response.loss_mask & (response.token_weights != 0)).sum())


def counts_of(groups: Iterable[Group]) -> Counts:
    """Return the counts of groups without packing them."""
    counts = dict.fromkeys(Counts._fields, 0)
    for group in groups:
        labels = _labels(group)
        desirable = sum(labels)
        counts["groups"] += 1
        counts["responses"] += len(group.responses)
        counts["desirable"] += desirable
        counts["undesirable"] += len(group.responses) - desirable
        weighted = [_num_weighted(r) for r in group.responses]
        counts["chosen_tokens"] += sum(n for n, good in zip(weighted, labels, strict=True) if good)
        counts["response_tokens"] += sum(weighted)
        if "gold" in group.extras:
            counts["gold_tokens"] += _num_weighted(group.extras["gold"])
        counts["tokens"] += len(group)
        counts["target_tokens"] += sum(int(r.loss_mask.sum()) for r in group.every)
        counts["unshared_tokens"] += group.unshared_tokens
    return Counts(**counts)


def collate(
    groups: list[Group],
    *,
    share_prompt: bool = True,
    pad_token_id: int,
    ref_logps: Sequence[np.ndarray] | None = None,
    ref2_logps: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Pack groups into a batch.

    Segments have the row's slots where there are no ranks. They have NaN for a response without a
    grade where others have one, and no weights where all are 1. Responses without token weights
    have ones, without rewards zeros.

    Args:
        groups: G >= 1 groups with the same extra roles.
        share_prompt: one packed row with one copy of each prompt; False: a padded row a response.
        pad_token_id: fills the padded form.
        ref_logps: reference log-probs of every group's target tokens (candidates in order, then
            extras by role), one array a group.
        ref2_logps: the same of a second reference.

    Raises:
        ValueError: no groups, groups with different extra roles, or arrays of the wrong length.
    """
    _check(groups)
    contexts = [context for group in groups for context in group.contexts]
    responses = [r for context in contexts for r in context.responses]
    length = np.array([len(r.input_ids) for r in responses])  # [R]

    if share_prompt:
        inputs, first, before = _packed(contexts, length)
    else:
        inputs, first, before = _padded(contexts, length, pad_token_id)

    # Token t of a response follows token t - 1, its first one the last token of the prompt.
    response_of = np.repeat(np.arange(len(responses)), length)  # [all response tokens]
    step = _ramp(length)
    predictor = np.where(step == 0, before[response_of], first[response_of] + step - 1)
    scored = np.concatenate([r.loss_mask for r in responses]).astype(bool)
    tokens = np.concatenate([r.input_ids for r in responses])
    columns = {
        "token_weights": _per_token([r.token_weights for r in responses], scored, length, 1.0),
        "token_rewards": _per_token([r.token_rewards for r in responses], scored, length, 0.0),
        "ref_logps": _ref_logps(groups, ref_logps, "ref_logps"),
        "ref2_logps": _ref_logps(groups, ref2_logps, "ref2_logps"),
    }
    return Batch(
        *inputs,
        head_positions=torch.from_numpy(predictor[scored]),
        tokens=TargetTokens(
            torch.from_numpy(tokens[scored].astype(np.int64)),
            _segments(groups, response_of[scored]),
            **columns,
        ),
        counts=counts_of(groups),
        row_numbers=tuple(group.row for group in groups),
        sources=tuple(group.source for group in groups),
    )


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise ValueError("cannot pack a batch of no groups")
    for group in groups:
        where = f"{group.source or 'rows'}, row {group.row}"
        if group.roles != groups[0].roles:
            raise ValueError(f"{where}: extras {group.roles} where the batch has {groups[0].roles}")
        if not all(len(context.prompt_ids) for context in group.contexts):
            raise ValueError(f"{where}: the prompt has no tokens")
        if group.prompt_positions is not None and len(group.prompt_positions) != len(
            group.prompt_ids
        ):
            raise ValueError(
                f"{where}: {len(group.prompt_positions)} prompt_positions for "
                f"{len(group.prompt_ids)} tokens"
            )
        for response in group.every:
            for name in ("loss_mask", "token_weights", "token_rewards"):
                value = getattr(response, name)
                if value is not None and len(value) != len(response.input_ids):
                    raise ValueError(
                        f"{where}: {name} of length {len(value)} for "
                        f"{len(response.input_ids)} tokens"
                    )


def _packed(
    contexts: list[Context], length: np.ndarray
) -> tuple[ModelInputs, np.ndarray, np.ndarray]:
    """Return the packed row, and [R] positions: of responses' first tokens, their prompts' last."""
    blocks = [
        block
        for context in contexts
        for block in (context.prompt_ids, *(r.input_ids for r in context.responses))
    ]
    sizes = np.array([len(block) for block in blocks])  # prompts and responses in turn
    num = np.array([len(context.responses) for context in contexts])
    prompt_length = np.array([len(context.prompt_ids) for context in contexts])
    prompt_block = np.cumsum(num + 1) - (num + 1)  # of each context
    is_response = np.ones(len(blocks), dtype=bool)
    is_response[prompt_block] = False
    start = np.cumsum(sizes) - sizes
    first = start[is_response]
    before = np.repeat(start[prompt_block] + prompt_length - 1, num)
    # Positions run from 0 in a prompt, unless it has its own, and from its end in each response.
    offset = np.zeros_like(sizes)
    offset[is_response] = np.repeat([context.end for context in contexts], num)
    positions = _ramp(sizes) + np.repeat(offset, sizes)
    for context, at, n in zip(contexts, start[prompt_block], prompt_length, strict=True):
        if context.positions is not None:
            positions[at : at + n] = context.positions
    spans = iter(zip(first.tolist(), (first + length).tolist(), strict=True))
    layout = Layout(
        groups=tuple(
            GroupSpan((p, p + n), tuple(next(spans) for _ in range(k)))
            for p, n, k in zip(
                start[prompt_block].tolist(), prompt_length.tolist(), num.tolist(), strict=True
            )
        ),
        length=int(sizes.sum()),
    )
    ids = torch.from_numpy(np.concatenate(blocks).astype(np.int64))[None]
    return ModelInputs(ids, torch.from_numpy(positions)[None], None, layout), first, before


def _padded(
    contexts: list[Context], length: np.ndarray, pad_token_id: int
) -> tuple[ModelInputs, np.ndarray, np.ndarray]:
    """Return the padded rows, and [R] flat positions as `_packed` does."""
    pairs = [(context, r.input_ids) for context in contexts for r in context.responses]
    prompt_length = np.array([len(context.prompt_ids) for context, _ in pairs])  # [R]
    width = int((prompt_length + length).max())
    input_ids = np.full((len(pairs), width), pad_token_id, dtype=np.int64)
    column = np.arange(width)
    # Pad by length and never by token: pad may be EOS, which is a token like any other.
    attended = column < (prompt_length + length)[:, None]
    positions = np.where(attended, column, 0)
    for i, ((context, response), p, n) in enumerate(zip(pairs, prompt_length, length, strict=True)):
        input_ids[i, :p], input_ids[i, p : p + n] = context.prompt_ids, response
        if context.positions is not None:
            positions[i, :p] = context.positions
            positions[i, p : p + n] += context.end - p
    first = np.arange(len(pairs)) * width + prompt_length
    mask = torch.from_numpy(attended.astype(np.int64))
    inputs = ModelInputs(torch.from_numpy(input_ids), torch.from_numpy(positions), mask, None)
    return inputs, first, first - 1


def _segments(groups: list[Group], response: np.ndarray) -> Segments:
    """Return the segments of the target tokens, of which `response` [N] has the responses."""
    num = np.array([len(group.every) for group in groups])  # [G]
    base = np.cumsum(num) - num  # [G], the number of each group's first response
    candidates = np.array([len(group.responses) for group in groups])
    k = int(candidates.max())
    slot = np.arange(k)
    filled = slot < candidates[:, None]  # [G, K]

    def table(values: list[list], empty: Any, dtype: type) -> torch.Tensor:
        """Return [G, K]: ragged rows, filled up with `empty`."""
        result = np.broadcast_to(np.asarray(empty, dtype=dtype), filled.shape).copy()
        result[filled] = np.concatenate([np.asarray(row, dtype=dtype) for row in values])
        return torch.from_numpy(result)

    scores = [[np.nan if r.score is None else r.score for r in g.responses] for g in groups]
    ranks = [[i if r.rank is None else r.rank for i, r in enumerate(g.responses)] for g in groups]
    weights = [group.weight for group in groups]
    roles = groups[0].roles
    label = table([_labels(group) for group in groups], False, bool)
    lengths = np.bincount(response, minlength=int(num.sum()))  # [R]
    ends = [0, *np.cumsum(num).tolist()]
    segments = Segments(
        response=torch.from_numpy(response),
        grid=torch.from_numpy(np.where(filled, base[:, None] + slot, -1)),
        label=label,
        bounds=Bounds(responses=tuple(ends), lengths=tuple(lengths.tolist())),
        num_responses=int(num.sum()),
        score=None if np.isnan(np.concatenate(scores)).all() else table(scores, 0, np.float32),
        rank=table(ranks, slot, np.int64),
        weight=None if all(w == 1 for w in weights) else torch.tensor(weights),
        margin=_column([group.margin for group in groups], "margin", groups),
        population=_column([group.population for group in groups], "group", groups),
        index=torch.tensor([group.row for group in groups]),
        extras={role: torch.from_numpy(base + candidates + i) for i, role in enumerate(roles)},
    )
    return segments.with_places()


def _column(values: list, name: str, groups: list[Group]) -> torch.Tensor | None:
    """Return [G], or None where no group has the value."""
    if all(value is None for value in values):
        return None
    for value, group in zip(values, groups, strict=True):
        if value is None:
            raise ValueError(
                f"{group.source or 'rows'}, row {group.row}: no {name}, which other rows have"
            )
    return torch.tensor(values)


def _per_token(
    values: list[np.ndarray | None], scored: np.ndarray, length: np.ndarray, absent: float
) -> torch.Tensor | None:
    """Return [N], or None where no response has any."""
    if all(value is None for value in values):
        return None
    filled = [
        np.full(n, absent) if value is None else value
        for value, n in zip(values, length, strict=True)
    ]
    return torch.from_numpy(np.concatenate(filled)[scored].astype(np.float32))


def _ref_logps(
    groups: list[Group], logps: Sequence[np.ndarray] | None, name: str
) -> torch.Tensor | None:
    if logps is None:
        return None
    if len(logps) != len(groups):
        raise ValueError(f"{name} of {len(logps)} groups for a batch of {len(groups)}")
    for group, values in zip(groups, logps, strict=True):
        expected = sum(int(r.loss_mask.sum()) for r in group.every)
        if np.shape(values) != (expected,):
            raise ValueError(
                f"{group.source or 'rows'}, row {group.row}: {name} of shape "
                f"{np.shape(values)} for {expected} target tokens"
            )
    return torch.from_numpy(np.concatenate(logps).astype(np.float32))
