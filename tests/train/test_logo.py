"""LOGO: triples on one prompt copy at synthetic positions, against separate rows and logits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2LMHeadModel

from fastpo.data.groups import Group, Response
from fastpo.model.limits import Positions
from fastpo.testing.three_way import assert_three_way
from tests.train import tiny


def row_logps(model: Any, group: Group, response: Response, *, masked: bool = True) -> Tensor:
    """[R] log-probs of a response from its own row, causal by a mask that says so."""
    ids = torch.tensor([*group.prompt_ids, *response.input_ids])
    end = int(group.prompt_positions[-1]) + 1
    own = range(end, end + len(response.input_ids))
    positions = torch.tensor([*group.prompt_positions.tolist(), *own])
    causal = torch.full((len(ids), len(ids)), float("-inf"), dtype=model.dtype).triu(1)
    mask = causal[None, None] if masked else None
    logits = model(ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False)
    logps = logits.logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0]


def by_hand(groups: list[Group], dtype: torch.dtype) -> tuple[Tensor, float]:
    """SimPO against the mean of the two rejected, and the likelihood of the chosen tokens.

    Also the largest of the terms that SimPO's margin is the difference of.
    """
    model = tiny.model().to(dtype)
    each = [[row_logps(model, g, r) for r in g.responses] for g in groups]
    means = torch.stack([torch.stack([r.mean() for r in g]) for g in each])
    preference = -logsigmoid(10 * (means[:, 0] - means[:, 1:].mean(-1)) - 3)
    loss = preference.mean() - 0.1 * torch.cat([g[0] for g in each]).mean()
    return loss.detach(), 10 * means.abs().max().item()


@pytest.mark.parametrize("share_prompt", ["true", "false"])
def test_loss_by_hand(trainer: Any, share_prompt: str) -> None:
    groups = tiny.logo_groups(4)
    made = trainer(objective="logo", train_dataset=groups, share_prompt=share_prompt, max_steps=1)
    made.train()
    loss = torch.tensor(next(r["loss"] for r in made.state.log_history if "loss" in r))
    (plain, _), (truth, terms) = by_hand(groups, torch.float32), by_hand(groups, torch.float64)
    assert_three_way(loss, plain, truth, "loss", terms=terms)


def test_without_a_mask_transformers_cuts_rows_at_jumps() -> None:
    """The trap: such a row is read as several documents. If this fails, it is gone."""
    model, group = tiny.model(), tiny.logo_groups(4)[3]
    with torch.no_grad():
        ours, trapped = (
            row_logps(model, group, group.responses[0], masked=masked) for masked in (True, False)
        )
    assert (ours - trapped).abs().max() > 0.1


def test_one_prompt_copy_a_triple(trainer: Any) -> None:
    groups = tiny.logo_groups(4)
    made = trainer(objective="logo", train_dataset=groups, max_steps=1, self_check=True)
    batch = made.data_collator(groups)
    assert batch.input_ids.shape == (1, sum(len(g) for g in groups))
    made.train()  # with a self-check at synthetic positions
    assert made.data_collator.share_prompt


def test_positions_beyond_the_model(caplog: pytest.LogCaptureFixture) -> None:
    groups = tiny.logo_groups(2, length=300)
    with caplog.at_level(logging.WARNING):
        positions = Positions.of(tiny.model())
        positions.check_groups(tiny.logo_groups(2))
        positions.check_groups(tiny.groups(2, 3))
        assert not caplog.records
        positions.check_groups(groups)
    assert "reach over 300, llama was made for 256" in caplog.text
    table = GPT2LMHeadModel(
        GPT2Config(vocab_size=tiny.VOCAB, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    )
    with pytest.raises(ValueError, match=r"gpt2 was made for 256: lower position_synthesis"):
        Positions.of(table).check_groups(groups)


def test_settings_reach_the_rows(config: Any) -> None:
    made = config(objective="logo", position_synthesis={"length": 4096, "variants": 2})
    options = made.data_options()
    assert (options.position_synthesis.length, options.position_synthesis.variants) == (4096, 2)
    assert type(made).from_dict(made.to_dict()).data_options() == options
    with pytest.raises(ValueError, match=r"position_synthesis=.*needs length"):
        config(position_synthesis={"len": 4096})


def test_the_report_tells_real_from_synthetic(tmp_path: Path) -> None:
    from fastpo.data.dataset import GroupDataset
    from fastpo.recipe.facts import data_facts
    from fastpo.report.card import write_model_card
    from fastpo.report.page import write_report

    groups = tiny.logo_groups(4)
    facts = data_facts("rows.jsonl", GroupDataset(groups, [], 4), None)
    real = max(len(g.prompt_ids) + len(r.input_ids) for g in groups for r in g.responses)
    assert (facts["context"], facts["synthetic_context"]) == (real, 250)
    plain = data_facts("rows.jsonl", GroupDataset(tiny.groups(4), [], 4), None)
    assert "synthetic_context" not in plain
    (tmp_path / "run.json").write_text(json.dumps({"data": facts}))
    page = write_report(tmp_path).read_text()
    assert 'the same in synthetic positions</td><td class="mono">250<' in page
    assert f"more than {real} tokens; synthetic positions spread them over 250" in " ".join(
        write_model_card(tmp_path).read_text().split()
    )
