"""Keep a share of the prompts back for evaluation."""

from __future__ import annotations

import numpy as np

from fastpo.data.dataset import GroupDataset


def hold_out(data: GroupDataset, fraction: float, seed: int) -> tuple[GroupDataset, GroupDataset]:
    """Return (training, held out) groups: whole prompts, so that none is on both sides.

    Args:
        data: all groups.
        fraction: the share of distinct prompts to hold out.
        seed: of the choice.

    Raises:
        ValueError: one of the sides would be empty.
    """
    prompts = [group.prompt_ids.tobytes() for group in data.groups]
    distinct = sorted(set(prompts))
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[i] for i in order[: round(fraction * len(distinct))]}
    sides = [
        [group for group, p in zip(data.groups, prompts, strict=True) if (p in chosen) is side]
        for side in (False, True)
    ]
    if not all(sides):
        raise ValueError(
            f"eval_fraction={fraction} of {len(distinct)} distinct prompts leaves "
            f"{len(sides[0])} groups to train on and {len(sides[1])} to evaluate on"
        )
    return (
        GroupDataset(sides[0], data.skipped, data.num_rows),
        GroupDataset(sides[1], [], data.num_rows),
    )
