"""Make pairs of scored lists: which responses are kept and compared, and in which order.

Functions of rows (dicts with `prompt`, `responses`, `scores`), to be written to a file before
training, as `fastpo data` does: what a run then sees is on disk and can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fastpo.data.bad_rows import BadField, OnBadRow
from fastpo.data.source_rows import good_rows


def rejection_sample(
    rewards: Sequence[float], count: int, *, beta: float = 0.5, seed: int | Sequence[int] = 0
) -> list[int]:
    """Choose the candidates of a prompt that statistical rejection sampling accepts, in order.

    Passes over what is left: a candidate of reward r is accepted with probability
    exp((r - M) / beta), M the greatest reward left, until `count` are accepted. beta = 0 takes the
    best, beta = infinity draws uniformly. RSO, https://arxiv.org/abs/2309.06657, algorithm 1.

    Args:
        rewards: one a candidate, finite.
        count: how many to accept; all, where there are fewer candidates.
        beta: temperature, >= 0.
        seed: of the draws.

    Raises:
        ValueError: a reward that is not finite, or a negative count or beta.

    >>> rejection_sample([0.1, 3.0, 2.0], 2, beta=0.0)
    [1, 2]
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    if count < 0 or not beta >= 0:
        raise ValueError(f"count={count} and beta={beta} must not be negative")
    rng = np.random.default_rng(seed)
    left, accepted = list(range(len(values))), []
    while left and len(accepted) < count:
        best = values[left].max()
        for i in list(left):
            chance = float(values[i] == best) if beta == 0 else np.exp((values[i] - best) / beta)
            if rng.random() < chance:
                accepted.append(i)
                left.remove(i)
                if len(accepted) == count:
                    break
    return accepted


def sampled(
    row: Mapping[str, Any], count: int, *, beta: float = 0.5, seed: int | Sequence[int] = 0
) -> dict[str, object]:
    """Return the row with `count` of its responses, chosen by `rejection_sample`."""
    kept = rejection_sample(row["scores"], count, beta=beta, seed=seed)
    return {
        **row,
        "responses": [row["responses"][i] for i in kept],
        "scores": [row["scores"][i] for i in kept],
    }


def curriculum(rows: Iterable[Mapping[str, Any]]) -> list[list[dict[str, object]]]:
    """Make stages of pairs, easy to hard: the best response against the worst, and so on.

    Stage i pairs every list's best with its i-th worst, so the grades' gap shrinks from stage to
    stage; a list that is too short for a stage is not in it, nor are ties with the best. Train on
    one stage after the other, the reference of each being the model after the one before.
    Curri-DPO, https://arxiv.org/abs/2403.07230.

    >>> row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.2, 0.9, 0.5]}
    >>> [(r["chosen"], r["rejected"]) for stage in curriculum([row]) for r in stage]
    [('b', 'a'), ('b', 'c')]
    """
    stages: list[list[dict[str, object]]] = []
    for row in rows:
        order = np.argsort(row["scores"], kind="stable")
        best = int(order[-1])
        worse = [int(i) for i in order if row["scores"][i] < row["scores"][best]]
        others = {k: v for k, v in row.items() if k not in ("responses", "scores")}
        for place, i in enumerate(worse):
            if place == len(stages):
                stages.append([])
            stages[place].append(
                {
                    **others,
                    "chosen": row["responses"][best],
                    "rejected": row["responses"][i],
                    "score_chosen": row["scores"][best],
                    "score_rejected": row["scores"][i],
                }
            )
    return stages


def scored_lists(rows: Any, source: str, on_bad_row: OnBadRow) -> Iterator[dict[str, object]]:
    """Yield rows without null columns, each with `responses` and as many `scores`.

    Args:
        rows: of `load_rows`; sized.
        source: name of the data for messages.
        on_bad_row: whether a row without such lists is an error or left out.

    Raises:
        BadRow: the first bad row, unless they are left out.
    """
    good = good_rows(rows, _check, source=source, on_bad_row=on_bad_row)
    for row, _ in tqdm(good, total=len(rows), desc="lists", unit="row", disable=None):
        yield {name: value for name, value in row.items() if value is not None}


def _check(row: Mapping[str, Any]) -> None:
    responses, scores = row.get("responses"), row.get("scores")
    if not responses or not scores or len(responses) != len(scores):
        raise BadField(
            "responses, scores",
            "no lists of one length; grade the answers of `fastpo sample` first",
        )
