"""Score the responses of preference groups: log-probs, implicit rewards, and what a pair shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpo.data.groups import Group, Response
from fastpo.loss.scores import score_responses
from fastpo.model.diagnostics import ches, entanglement
from fastpo.redact import redact
from fastpo.scoring.follow_ups import FollowUps, followed_up, next_turns
from fastpo.scoring.scorer import Packer, Scorer


@dataclass
class ScoredResponse:
    """Hold what is printed of a response; None stays out of the row."""

    tokens: int
    logps: float
    mean_logps: float
    ref_logps: float | None = None
    reward: float | None = None  # beta (logps - ref_logps)
    label: bool | None = None
    rank: int | None = None
    score: float | None = None
    follow_up: float | None = None  # likelihood of praise over complaint as the next turn

    def columns(self) -> dict[str, object]:
        """Return the numbers by name, in the order of the output."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class ScoredGroup:
    """Hold one row of the output."""

    source: str
    row: int
    responses: list[ScoredResponse]
    pair: dict[str, float] = field(default_factory=dict)  # CHES and entanglement

    def columns(self) -> dict[str, object]:
        """Return the row as it is written."""
        responses = [response.columns() for response in self.responses]
        columns = {"source": self.source, "row": self.row, "responses": responses}
        return {**columns, "pair": self.pair} if self.pair else columns


class ScoredBatch(NamedTuple):
    """Hold some groups, their output rows and the scores [G, K] that both come from."""

    groups: list[Group]
    rows: list[ScoredGroup]
    scores: Mapping[str, Tensor]


@dataclass(frozen=True)
class ScoringOptions:
    """Say what is scored beside log-probs.

    Args:
        beta: scale of the rewards.
        batch_size: groups at a time.
        ches: CHES scores of pairs.
        entanglement: how the gradients of pairs meet at the head.
        per_token: keep log-probs of single tokens among the scores.
        follow_ups: utterances of the next turn whose likelihood grades a response.
    """

    beta: float = 0.1
    batch_size: int = 4
    ches: bool = False
    entanglement: bool = False
    per_token: bool = False
    follow_ups: FollowUps | None = None


def score_preferences(
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    scorers: Callable[[], tuple[Scorer, Scorer | None]],
    options: ScoringOptions,
) -> Iterator[ScoredBatch]:
    """Score groups batch by batch; whatever is refused is refused before the first of them.

    Args:
        groups: G groups of K responses; ragged ones too.
        tokenizer: of the groups.
        scorers: opens the policy and its reference, or None; called once the groups are checked.
        options: what is scored.

    Raises:
        ValueError: a group of one response where pairs are compared, or a token beyond a scorer's
            embedding.
        SelfCheckError: as `fastpo.model.self_check.self_check`.
    """
    if options.ches or options.entanglement:
        _require_pairs(groups)
    turns = options.follow_ups and [next_turns(tokenizer, each) for each in options.follow_ups]
    policy, reference = scorers()
    # A reference that is the policy without its adapter has the same head and positions.
    distinct = [policy]
    if reference is not None and reference.model is not policy.model:
        distinct.append(reference)
    packed = Packer(distinct, groups, tokenizer)
    for turn in itertools.chain(*(turns or ())):
        packed.vocabulary.check(turn.input_ids, "follow_ups")
    eos: Any = tokenizer.eos_token_id

    def batches() -> Iterator[ScoredBatch]:
        for start in range(0, len(groups), options.batch_size):
            batch_groups = list(groups[start : start + options.batch_size])
            batch = packed(batch_groups)
            hidden, segments = policy.hidden(batch), batch.tokens.segments
            ref_logps = None
            if reference is not None:
                ref_logps = reference(packed([group.for_reference for group in batch_groups]))
            scores = score_responses(
                {"logps": policy.logps(hidden, batch)},
                segments,
                ref_logps=ref_logps,
                per_token=options.per_token,
            )
            rows = _rows(batch_groups, scores, options.beta)
            of_pairs = ches(hidden, segments) if options.ches else {}
            if options.entanglement:
                of_pairs |= entanglement(hidden, policy.head, batch.tokens.targets, segments)
            for name, values in of_pairs.items():
                for row, value in zip(rows, values.tolist(), strict=True):
                    row.pair[name] = value
            if turns is not None:
                rewards = _follow_up_rewards(batch_groups, turns, eos, packed, policy)
                responses = (response for row in rows for response in row.responses)
                for response, reward in zip(responses, rewards, strict=True):
                    response.follow_up = reward
            yield ScoredBatch(batch_groups, rows, scores)

    return batches()


def _require_pairs(groups: Sequence[Group]) -> None:
    for group in groups:
        if len(group.responses) < 2:
            raise ValueError(
                "ches and entanglement compare a chosen with a rejected response, but "
                f"{group.source}, row {group.row} has one response: drop the flag"
            )


def _rows(groups: Sequence[Group], scores: Mapping[str, Tensor], beta: float) -> list[ScoredGroup]:
    """Return one output row a group, log-probs and rewards to six decimals."""
    lists = {n: scores[n].tolist() for n in ("logps", "mean_logps", "ref_logps") if n in scores}
    if "ratio" in scores:
        lists["reward"] = (beta * scores["ratio"]).tolist()
    length = scores["length"].tolist()
    return [
        ScoredGroup(
            redact(group.source),
            group.row,
            [
                ScoredResponse(
                    int(length[g][k]),
                    **{name: round(values[g][k], 6) for name, values in lists.items()},
                    label=response.label,
                    rank=response.rank,
                    score=response.score,
                )
                for k, response in enumerate(group.responses)
            ],
        )
        for g, group in enumerate(groups)
    ]


def _follow_up_rewards(
    groups: Sequence[Group],
    turns: Sequence[Sequence[Response]],
    eos: int | None,
    packed: Packer,
    policy: Scorer,
) -> list[float]:
    """Return a reward for every response in order; see `fastpo.scoring.follow_ups`."""
    positive, negative = turns
    batch = packed(
        [each for group in groups for each in followed_up(group, [*positive, *negative], eos)]
    )
    scores = score_responses({"logps": policy(batch)}, batch.tokens.segments)
    likelihood = scores["mean_logps"]  # [responses, follow-ups]
    praise, complaint = likelihood.split([len(positive), len(negative)], dim=1)
    return (praise.mean(1) - complaint.mean(1)).tolist()
