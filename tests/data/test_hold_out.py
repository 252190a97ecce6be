"""Prompts that are kept back for evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from fastpo.data.dataset import GroupDataset
from fastpo.data.groups import Group, Response
from fastpo.data.hold_out import hold_out


def test_hold_out_keeps_a_prompt_on_one_side() -> None:
    answer = Response(np.array([1], np.int32), np.array([True]))
    groups = [Group(np.array([i // 3 + 1], np.int32), [answer, answer], row=i) for i in range(30)]
    train, held_out = hold_out(GroupDataset(groups, [], 30), 0.3, seed=0)
    sides = [{g.prompt_ids.tobytes() for g in side.groups} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert (len(train), len(held_out)) == (21, 9)
    again = hold_out(GroupDataset(groups, [], 30), 0.3, seed=0)[1]
    assert [g.row for g in again.groups] == [g.row for g in held_out.groups]
    with pytest.raises(ValueError, match="distinct prompts"):
        hold_out(GroupDataset(groups[:3], [], 3), 0.3, seed=0)
