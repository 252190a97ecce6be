"""A batch on its way: moved whole, and the head's positions apart from the scores' tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory

from fastpo.batch import Batch, Counts, TargetTokens
from fastpo.data.packing import collate
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives.base import Per
from fastpo.segments import Segments, Where, places_of
from tests.train import tiny


def packed(**options: Any) -> Batch:
    groups = tiny.groups(4, 3, extras=("mismatched", "gold"), short_prompt=True)
    logps = [torch.zeros(sum(int(r.loss_mask.sum()) for r in g.every)).numpy() for g in groups]
    batch = collate(groups, pad_token_id=0, ref_logps=logps, **options)
    return replace(batch, reference=collate([g.for_reference for g in groups], pad_token_id=0))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a record, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif is_dataclass(value):
        for f in fields(value):
            yield from tensors(getattr(value, f.name))


def test_every_tensor_moves_and_nothing_else_changes() -> None:
    batch = packed()
    moved = batch.to("meta", non_blocking=True)
    assert len(list(tensors(moved))) == len(list(tensors(batch))) > 30
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert {t.device.type for t in tensors(batch)} == {"cpu"}
    plain = ("layout", "counts", "row_numbers", "sources", "counted")
    assert all(getattr(moved, name) is getattr(batch, name) for name in plain)
    assert moved.tokens.segments.bounds == batch.tokens.segments.bounds


def test_pinned_memory_is_asked_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader asks a batch that has the method; without an accelerator nothing can be pinned."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 0)
    batch = packed()
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    for ours, theirs in zip(tensors(pinned), tensors(batch), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs


def test_the_reference_reads_its_own_batch_or_this_one() -> None:
    batch = packed()
    assert batch.for_reference is batch.reference
    assert replace(batch, reference=None).for_reference.input_ids is batch.input_ids


def test_losses_are_divided_by_counts() -> None:
    assert set(get_args(Per)) < set(Counts._fields)
    assert Counts.total([Counts(groups=2), Counts(groups=3, tokens=7)]) == Counts(5, tokens=7)
    assert Counts.total([]) == Counts()


@pytest.mark.parametrize("share_prompt", [True, False])
def test_places_known_on_the_host_are_those_of_the_masks(share_prompt: bool) -> None:
    groups = [*tiny.groups(2, 3), *tiny.groups(2, 2, seed=1), *tiny.groups(2, 1, seed=2)]
    groups[3].responses[1].label = True
    segments = collate(groups, share_prompt=share_prompt, pad_token_id=0).tokens.segments
    slots = [(g, k, k < len(group.responses)) for g, group in enumerate(groups) for k in range(3)]
    good = [[bool(r.label) for r in group.responses] + [False] * 3 for group in groups]
    expected = {
        "groups": [0, 1, 2, 3, 4, 5],
        "full groups": [0, 1],
        "candidates": [3 * g + k for g, k, there in slots if there],
        "desirable": [3 * g + k for g, k, there in slots if there and good[g][k]],
    }
    asked = replace(segments, places={})
    for where in get_args(Where):
        assert segments.places[where].tolist() == expected[where], where
        assert asked.at(where).tolist() == expected[where], where
        assert 0 < len(segments.at(where)) < segments.grid.numel() or where == "groups"
    with pytest.raises(ValueError, match="where='all': choose one of"):
        places_of("all", segments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("cut", [(0, 1), (1, 3), (2, 4)])
def test_groups_are_cut_alike_with_bounds_and_without(cut: tuple[int, int]) -> None:
    known = packed().tokens.segments
    asked = replace(known, bounds=None)
    assert known.tokens_of_groups() == asked.tokens_of_groups()
    assert known.longest == asked.longest
    (ours, index), (theirs, other) = known.select(*cut), asked.select(*cut)
    every = torch.arange(len(known.response))
    assert torch.equal(every[index], every[other])
    for f in fields(Segments):
        if f.name not in ("bounds", "places", "extras"):
            a, b = getattr(ours, f.name), getattr(theirs, f.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f.name
    assert {r: t.tolist() for r, t in ours.extras.items()} == {
        r: t.tolist() for r, t in theirs.extras.items()
    }
    assert ours.tokens_of_groups() == theirs.tokens_of_groups()


@pytest.mark.parametrize("objective", ["dpo", "simpo", "tdpo2", "grpo"])
def test_positions_are_read_by_several_tokens(objective: str) -> None:
    """As if each token had a position of its own, gradients included; weights are the token's."""
    torch.manual_seed(0)
    table = Segments(
        torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]),
        torch.tensor([[0, 1], [2, 3]]),
        torch.tensor([[True, False], [True, False]]),
        4,
        score=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
    )
    index = torch.tensor([0, 1, 2, 0, 3, 4, 5, 4])  # the first tokens of both responses are shared
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    head = HeadTensors(torch.randn(16, 8, dtype=torch.float64))
    states = torch.randn(6, 8, dtype=torch.float64)
    targets = torch.randint(0, 16, (6,))
    facts = {
        "token_weights": torch.rand(8, dtype=torch.float64),
        "old_logps": -torch.rand(8, dtype=torch.float64),
    }
    loss = PreferenceLoss(objective)
    shared = loss.of_tokens(
        hidden,
        TargetTokens(targets, table, index, **facts),
        head=head,
        reference=ReferenceStates(states, head) if loss.needs_reference else None,
    ).loss
    apart = loss.of_tokens(
        hidden[index],
        TargetTokens(targets[index], table, **facts),
        head=head,
        reference=ReferenceStates(states[index], head) if loss.needs_reference else None,
    ).loss
    torch.testing.assert_close(shared, apart)
    (ours,), (theirs,) = (torch.autograd.grad(each, [hidden]) for each in (shared, apart))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto_pair", "tdpo1"])
@pytest.mark.parametrize("trained", [False, True])
def test_packed_tokens_and_checked_ones_give_the_same_bits(objective: str, trained: bool) -> None:
    torch.manual_seed(0)
    batch = collate(tiny.pairs(6), pad_token_id=0)
    tokens = batch.tokens
    module = nn.Linear(8, tiny.VOCAB, bias=False).requires_grad_(trained)
    loss = PreferenceLoss(objective, module)
    hidden, states = torch.randn(2, len(tokens.targets), 8)
    weight = module.weight.detach()
    live = ReferenceStates(states, HeadTensors(weight)) if loss.needs_reference else None
    packed_ones = loss.of_tokens(hidden, tokens, reference=live)
    given = {} if live is None else {"ref_hidden": states, "ref_weight": weight}
    checked = loss(hidden, tokens.targets, tokens.segments, **given)
    assert torch.equal(packed_ones.losses, checked.losses)
    assert torch.equal(packed_ones.loss, checked.loss)
