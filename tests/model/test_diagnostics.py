"""CHES and gradient entanglement against their definitions, one pair at a time."""

from __future__ import annotations

import pytest
import torch

from fastpo.data.packing import collate
from fastpo.head.head import Head
from fastpo.model.diagnostics import ches, entanglement
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach, target_hidden
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import PAD, family, group

GROUPS = [group(5, [4, 7], 0), group(3, [6, 2, 5], 1)]


def batch_and_hidden(name: str = "gemma2", dtype: torch.dtype = torch.float32):
    model = attach(family(name).to(dtype))
    batch = collate(GROUPS, pad_token_id=PAD)
    with torch.no_grad():
        return model, batch, target_hidden(model, batch)


def test_ches() -> None:
    _, batch, hidden = batch_and_hidden()
    segments = batch.tokens.segments
    found = ches(hidden, segments)

    def by_hand(h: torch.Tensor, mean: bool) -> torch.Tensor:
        scores = []
        for row in segments.grid:
            w, l = (h[segments.response == r] for r in row[:2])
            w, l = (x.mean(0) if mean else x.sum(0) for x in (w, l))
            scores.append(w @ l - w @ w)
        return torch.stack(scores)

    for name, mean in (("ches", False), ("mean_ches", True)):
        assert_three_way(found[name], by_hand(hidden, mean), by_hand(hidden.double(), mean), name)


def test_entanglement_is_that_of_the_models_own_log_softmax() -> None:
    """A soft-capped, scaled head: gradients by autograd through whole logits."""
    model, batch, hidden = batch_and_hidden()
    head, segments, labels = read_head(model), batch.tokens.segments, batch.tokens.targets
    assert head.softcap
    found = entanglement(hidden, head, labels, segments)

    def by_hand(h: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = []
        for row in segments.grid:
            g = []
            for response in row[:2]:
                shift = torch.zeros(h.shape[1], dtype=h.dtype, requires_grad=True)
                mine = segments.response == response
                z = (h[mine] + shift) @ weight.T
                z = head.softcap * torch.tanh(z / head.softcap)
                logps = z.log_softmax(-1).gather(1, labels[mine, None]).sum()
                g.append(torch.autograd.grad(logps, shift)[0])
            rows.append(torch.stack([g[0] @ g[1], g[0].norm(), g[1].norm()]))
        inner, chosen, rejected = torch.stack(rows, 1)
        return {
            "inner": inner,
            "chosen_norm": chosen,
            "rejected_norm": rejected,
            "cosine": inner / (chosen * rejected),
        }

    weight = head.weight.detach()
    plain, truth = by_hand(hidden, weight), by_hand(hidden.double(), weight.double())
    for name in truth:
        assert_three_way(found[name], plain[name], truth[name], name)
    assert torch.equal(found["chosen_rises"], truth["inner"] <= truth["chosen_norm"] ** 2)
    assert torch.equal(found["rejected_falls"], truth["inner"] <= truth["rejected_norm"] ** 2)


def test_equal_responses_rise_and_fall_together() -> None:
    head = Head(torch.nn.Linear(4, 9, bias=False))
    hidden, labels = torch.randn(2, 4), torch.tensor([3, 3])
    hidden[1] = hidden[0]
    segments = collate([group(2, [1, 1])], pad_token_id=PAD).tokens.segments
    found = entanglement(hidden, head, labels, segments)
    assert found["chosen_norm"] == found["rejected_norm"]
    assert found["chosen_rises"]
    assert found["rejected_falls"]
    assert ches(hidden, segments)["ches"] == 0


def test_single_responses_are_refused() -> None:
    segments = collate([group(3, [2, 4]), group(3, [2])], pad_token_id=PAD).tokens.segments
    with pytest.raises(ValueError, match="group 1 has 1"):
        ches(torch.zeros(8, 4), segments)


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits() -> None:
    segments = collate([group(4, [900, 1100])] * 4, pad_token_id=PAD).tokens.segments.to("cuda")
    hidden = torch.randn(len(segments.response), 512, device="cuda")
    first = ches(hidden, segments)["ches"]
    assert all(torch.equal(ches(hidden, segments)["ches"], first) for _ in range(8))
