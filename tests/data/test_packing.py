"""The packed and the padded batch hold the same tokens, and every target token its predecessor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.data

from fastpo.batch import Counts
from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate, counts_of, group_key, row_order

PAD = 2  # also a token of the responses: padding must go by length


def response(rng, length, masked=0.0, **more):
    mask = rng.random(length) >= masked
    return Response(rng.integers(0, 50, length).astype(np.int32), mask, **more)


def make_groups(seed=0, num=7, *, extras=False, masked=0.3, weights=False):
    """Random groups of 1 to 4 candidates; token ids 0..49, the pad id included."""
    rng = np.random.default_rng(seed)
    groups = []
    for row in range(num):
        responses = [
            response(
                rng, rng.integers(1, 6), masked, label=slot == 0, rank=slot, score=-float(slot)
            )
            for slot in range(rng.integers(1, 5))
        ]
        if weights:
            responses[0].token_weights = rng.integers(0, 3, len(responses[0].input_ids)).astype(
                np.float32
            )
        roles = {"mismatched": response(rng, 3), "gold": response(rng, 2)} if extras else {}
        prompt = rng.integers(0, 50, rng.integers(1, 7)).astype(np.int32)
        groups.append(Group(prompt, responses, row=10 * row, weight=1.0 + row, extras=roles))
    return groups


def in_order(group):
    return [*group.responses, *(group.extras[role] for role in sorted(group.extras))]


CASES = {
    "masked": {},
    "extras": {"extras": True},
    "all scored": {"masked": 0.0},
    "weights": {"weights": True, "extras": True},
    "one group": {"num": 1},
    "nothing scored": {"masked": 1.0},
}


# Both forms of a batch, over groups that are ragged, weighted, nested or of one token.
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_label_token(case, share_prompt):
    """Against a plain loop over tokens: value, place, predecessor, response, weight."""
    groups = make_groups(**CASES[case])
    batch = collate(groups, share_prompt=share_prompt, pad_token_id=PAD)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    segments = batch.tokens.segments
    n = number = start = 0
    width = batch.input_ids.shape[1]
    for group in groups:
        prompt = group.prompt_ids.tolist()
        if share_prompt:
            first = start + len(prompt)
            assert ids[start:first].tolist() == prompt
            assert positions[start:first].tolist() == list(range(len(prompt)))
            last = first - 1
        for r in in_order(group):
            if not share_prompt:
                start = number * width
                first, last = start + len(prompt), start + len(prompt) - 1
                assert ids[start:first].tolist() == prompt
                end = first + len(r.input_ids)
                mask = batch.attention_mask[number].tolist()
                assert mask == [1] * (end - start) + [0] * (width - end + start)
                assert ids[end : start + width].tolist() == [PAD] * (start + width - end)
            for j, token in enumerate(r.input_ids):
                assert ids[first + j] == token
                assert positions[first + j] == len(prompt) + j
                if r.loss_mask[j]:
                    assert batch.tokens.targets[n] == token
                    assert batch.head_positions[n] == (last if j == 0 else first + j - 1)
                    assert segments.response[n] == number
                    if batch.tokens.token_weights is not None:
                        expected = 1.0 if r.token_weights is None else r.token_weights[j]
                        assert batch.tokens.token_weights[n] == expected
                    n += 1
            number += 1
            if share_prompt:
                first += len(r.input_ids)
        start = first
    assert n == len(batch.tokens.targets) == len(batch.head_positions)
    assert segments.num_responses == number
    if share_prompt:
        assert batch.input_ids.shape == (1, start)
    for name in ("input_ids", "position_ids", "head_positions"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.tokens.targets.dtype == torch.int64
    if batch.tokens.token_weights is not None:
        assert batch.tokens.token_weights.dtype == torch.float32


# The same groups: whatever is scored must not depend on the form.
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded(case):
    groups = make_groups(**CASES[case])
    packed = collate(groups, pad_token_id=PAD)
    padded = collate(groups, share_prompt=False, pad_token_id=PAD)
    predictors = []
    for batch in (packed, padded):
        ids = batch.input_ids.flatten()
        predictors.append(torch.stack([ids, batch.position_ids.flatten()])[:, batch.head_positions])
    assert torch.equal(*predictors)  # the predicting token and its position
    assert torch.equal(packed.tokens.targets, padded.tokens.targets)
    assert torch.equal(packed.tokens.segments.response, padded.tokens.segments.response)
    assert torch.equal(packed.tokens.segments.grid, padded.tokens.segments.grid)
    assert packed.counts == padded.counts == counts_of(groups)
    assert packed.row_numbers == padded.row_numbers == tuple(group.row for group in groups)
    assert packed.input_ids.numel() == packed.counts.tokens
    assert padded.attention_mask.sum() == packed.counts.unshared_tokens
    assert len(packed.tokens.targets) == packed.counts.target_tokens


# Further responses share the prompt's copy too.
@pytest.mark.parametrize("extras", [False, True])
def test_layout_tiles_the_row(extras):
    groups = make_groups(extras=extras)
    batch = collate(groups, pad_token_id=PAD)
    layout = batch.layout
    end = 0
    for group, span in zip(groups, layout.groups, strict=True):
        every = in_order(group)
        assert len(span.responses) == len(every)
        for (start, stop), ids in zip(
            [span.prompt, *span.responses],
            [group.prompt_ids, *(r.input_ids for r in every)],
            strict=True,
        ):
            assert start == end
            assert type(start) is type(stop) is int
            assert batch.input_ids[0, start:stop].tolist() == ids.tolist()
            end = stop
    assert end == layout.length == batch.input_ids.shape[1]


def test_segments():
    groups = make_groups(extras=True)
    segments = collate(groups, pad_token_id=PAD).tokens.segments
    k = max(len(g.responses) for g in groups)
    number = 0
    for i, group in enumerate(groups):
        count = len(group.responses)
        assert segments.grid[i].tolist() == [*range(number, number + count), *[-1] * (k - count)]
        assert segments.mask[i].tolist() == [True] * count + [False] * (k - count)
        assert segments.label[i].tolist() == [True] + [False] * (k - 1)
        assert segments.rank[i].tolist() == list(range(k))
        assert segments.score[i, :count].tolist() == [-float(slot) for slot in range(count)]
        assert segments.weight[i] == group.weight
        assert segments.extras["gold"][i] == number + count  # roles in order of their names
        assert segments.extras["mismatched"][i] == number + count + 1
        number += count + 2


def test_segments_of_groups_built_by_hand():
    rng = np.random.default_rng(0)
    groups = [
        Group(np.array([1], dtype=np.int32), [response(rng, 2) for _ in range(k)], row=0)
        for k in (2, 1)
    ]
    segments = collate(groups, pad_token_id=PAD).tokens.segments
    assert segments.label.tolist() == [[True, False], [True, False]]
    assert segments.rank.tolist() == [[0, 1], [0, 1]]
    assert segments.score is None
    assert segments.weight is None
    groups[0].responses[1].score = 0.5
    score = collate(groups, pad_token_id=PAD).tokens.segments.score
    assert torch.equal(score.isnan(), torch.tensor([[True, False], [True, False]]))


def test_counts():
    group = make_groups(num=1, masked=0.0)[0]
    a = Response(np.arange(3, dtype=np.int32), np.array([True, True, False]), label=True)
    b = Response(np.arange(4, dtype=np.int32), np.ones(4, dtype=bool), label=False)
    extra = Response(np.arange(2, dtype=np.int32), np.ones(2, dtype=bool))
    group = replace(
        group, prompt_ids=np.arange(5, dtype=np.int32), responses=[a, b, b], extras={"gold": extra}
    )
    expected = {
        "groups": 1,
        "responses": 3,
        "desirable": 1,
        "undesirable": 2,
        "chosen_tokens": 2,
        "response_tokens": 2 + 4 + 4,
        "gold_tokens": 2,
        "tokens": 5 + 3 + 4 + 4 + 2,
        "target_tokens": 2 + 4 + 4 + 2,
        "unshared_tokens": 4 * 5 + 3 + 4 + 4 + 2,
    }
    assert counts_of([group])._asdict() == expected
    twice = {name: 2 * value for name, value in expected.items()}
    assert counts_of([group, group])._asdict() == twice
    assert Counts.total([counts_of([group])] * 2)._asdict() == twice
    a.token_weights = np.array([0.0, 2.0, 1.0], dtype=np.float32)
    counts = counts_of([group])
    assert (counts.chosen_tokens, counts.response_tokens) == (1, 1 + 4 + 4)


def test_reference_logps():
    groups = make_groups(extras=True)
    stored = {
        group_key(g): np.arange(sum(r.loss_mask.sum() for r in in_order(g))) + 100.0 * g.row
        for g in groups
    }
    for share_prompt in (True, False):
        values = [stored[group_key(g)] for g in groups]
        batch = collate(groups, share_prompt=share_prompt, pad_token_id=PAD, ref_logps=values)
        assert batch.tokens.ref_logps.dtype == torch.float32
        assert batch.tokens.ref_logps.tolist() == np.concatenate(values).tolist()
    assert collate(groups, pad_token_id=PAD).tokens.ref_logps is None
    with pytest.raises(ValueError, match="ref_logps of 6 groups for a batch of 7"):
        collate(groups, pad_token_id=PAD, ref_logps=values[1:])
    with pytest.raises(ValueError, match="row 10: ref_logps of shape"):
        collate(groups, pad_token_id=PAD, ref_logps=[values[0], values[1][1:], *values[2:]])


def test_group_key_sees_ids_and_masks_only():
    group = make_groups(num=1, extras=True, masked=0.0)[0]
    key = group_key(group)
    assert key == group_key(replace(group, row=99, weight=5.0, source="elsewhere"))
    first = group.responses[0]
    flipped = replace(first, loss_mask=~first.loss_mask)
    longer = replace(group, prompt_ids=np.append(group.prompt_ids, first.input_ids[:1]))
    changed = [
        replace(group, prompt_ids=group.prompt_ids + 1),
        replace(group, responses=[flipped, *group.responses[1:]]),
        replace(group, responses=[*group.responses, first]),
        replace(group, extras={"mismatched": group.extras["gold"]}),
        replace(group, extras={"gold": group.extras["mismatched"], "mismatched": first}),
        # The same run of tokens, divided elsewhere.
        replace(
            longer, responses=[replace(first, input_ids=first.input_ids[1:]), *group.responses[1:]]
        ),
    ]
    keys = {key, *(group_key(other) for other in changed)}
    assert len(keys) == 1 + len(changed)


def test_refusals():
    groups = make_groups(extras=True)
    with pytest.raises(ValueError, match="no groups"):
        collate([], pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"row 10: extras \[\] where the batch has \['gold'"):
        collate([groups[0], replace(groups[1], extras={})], pad_token_id=PAD)
    with pytest.raises(ValueError, match="row 0: the prompt has no tokens"):
        collate([replace(groups[0], prompt_ids=np.array([], dtype=np.int32))], pad_token_id=PAD)
    groups[0].responses[0].token_weights = np.ones(99, dtype=np.float32)
    with pytest.raises(ValueError, match="row 0: token_weights of length 99 for"):
        collate(groups, pad_token_id=PAD)


def test_row_order_is_a_function_of_seed_and_epoch():
    order = row_order(100, seed=3, epoch=2)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, row_order(100, seed=3, epoch=2))
    for seed, epoch in ((3, 3), (2, 2), (2, 3)):
        assert not np.array_equal(order, row_order(100, seed=seed, epoch=epoch))


def test_in_a_loader_with_workers():
    """Batches travel between processes and are the same as those made at home."""
    groups = make_groups(extras=True)
    loader = torch.utils.data.DataLoader(
        groups, batch_size=3, num_workers=1, collate_fn=partial(collate, pad_token_id=PAD)
    )
    for i, batch in enumerate(loader):
        home = collate(groups[3 * i : 3 * i + 3], pad_token_id=PAD)
        assert torch.equal(batch.tokens.targets, home.tokens.targets)
        assert batch.layout == home.layout
