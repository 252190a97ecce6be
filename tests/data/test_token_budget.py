"""Cutting a batch into rows: nothing lost, nothing over budget, and as few rows as theory says."""

from __future__ import annotations

import numpy as np
import pytest

from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate
from fastpo.data.token_budget import check_budget, token_rows


def groups(seed: int, count: int) -> list[Group]:
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(3, 99, int(rng.integers(1, longest))).astype(np.int32)

    made = []
    for row in range(count):
        responses = [ids(20) for _ in range(int(rng.integers(1, 4)))]
        made.append(
            Group(ids(60), [Response(r, np.ones(len(r), bool)) for r in responses], row=row)
        )
    return made


def cost(batch: list[Group], shared: bool) -> int:
    return collate(batch, share_prompt=shared, pad_token_id=0).input_ids.numel()


# Shared and padded rows cost differently; ten draws of lengths.
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_rows_fit_and_lose_nothing(seed: int, shared: bool) -> None:
    batch, most = groups(seed, 30), 250
    rows = token_rows(batch, most, share_prompt=shared)
    assert sorted(i for row in rows for i in row) == list(range(30))
    costs = [cost([batch[i] for i in row], shared) for row in rows]
    assert max(costs) <= most
    if shared:
        assert len(rows) <= 11 / 9 * -(-sum(costs) // most) + 6 / 9
    assert rows == token_rows(batch, most, share_prompt=shared)


def test_at_least_so_many_rows() -> None:
    batch = groups(0, 7)
    for wanted in range(1, 8):
        rows = token_rows(batch, 10_000, at_least=wanted)
        assert len(rows) == wanted
        assert all(rows)
        assert sorted(i for row in rows for i in row) == list(range(7))


def test_groups_that_fit_no_row_are_all_named() -> None:
    batch = groups(1, 8)
    sizes = sorted(len(group) for group in batch)
    check_budget(batch, sizes[-1])
    most = sizes[-2] - 1
    large = [f"row {g.row}: {len(g)} tokens" for g in batch if len(g) > most]
    assert 2 <= len(large) <= 5
    message = f"{len(large)} group.s. do not fit .* raise it to {sizes[-1]}"
    with pytest.raises(ValueError, match=message) as e:
        token_rows(batch, most)
    assert all(name in str(e.value) for name in large)
