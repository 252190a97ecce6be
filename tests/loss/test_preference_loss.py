"""PreferenceLoss: layouts, mixtures, statistics, counts and what it says when data is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastpo import OBJECTIVES, Head, PreferenceLoss, Segments, linear_logps
from fastpo.loss.mixture import resolve

B, T, D, V = 3, 6, 8, 33


@pytest.fixture
def padded():
    """[2B, T] chosen-then-rejected rows of unequal lengths behind ignored prompt positions."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (2 * B, T), generator=g)
    for row in range(2 * B):
        labels[row, : 1 + row % 2] = -100
        labels[row, T - row // 2 :] = -100
    return {
        "hidden": torch.randn(2 * B, T, D, generator=g),
        "labels": labels,
        "ref_hidden": torch.randn(2 * B, T, D, generator=g),
        "token_weights": torch.rand(2 * B, T, generator=g) + 0.5,
    }


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(D, V)


def by_hand(padded, head, name):
    """Sums, means and lengths per row, straight from full logits."""
    logps = head(padded[name]).log_softmax(-1)
    mask = padded["labels"] != -100
    picked = logps.gather(-1, padded["labels"].clamp(min=0)[..., None])[..., 0] * mask
    return picked.sum(-1), mask.sum(-1), picked


def packed(padded):
    """The same batch as target tokens with a segment table, responses in another order."""
    order = torch.tensor([4, 1, 0, 3, 5, 2])  # response r of the table is padded row order[r]
    rows = [padded["labels"][i] != -100 for i in order]
    response = torch.cat([torch.full((int(m.sum()),), r) for r, m in enumerate(rows)])

    def take(name):
        return torch.cat([padded[name][i][m] for i, m in zip(order, rows, strict=True)])

    place = torch.empty(6, dtype=torch.long)
    place[order] = torch.arange(6)
    grid = torch.stack([place[:B], place[B:]], dim=1)
    label = torch.tensor([[True, False]] * B)
    segments = Segments(response, grid, label, num_responses=6)
    return {n: take(n) for n in padded}, segments


def test_dpo_is_the_formula(padded, head):
    policy, _, _ = by_hand(padded, head, "hidden")
    reference, _, ref_tokens = by_hand(padded, head, "ref_hidden")
    u = (policy - reference).view(2, B)
    expected = -torch.nn.functional.logsigmoid(0.3 * (u[0] - u[1]))
    loss = PreferenceLoss("dpo", head, beta=0.3)
    args = {"ref_weight": head.weight.detach(), "ref_bias": head.bias.detach()}
    for reference_given in (
        {"ref_hidden": padded["ref_hidden"], **args},
        {"ref_logps": ref_tokens.detach()},
    ):
        out = loss(padded["hidden"], padded["labels"], **reference_given)
        torch.testing.assert_close(out.losses, expected.detach())
        torch.testing.assert_close(out.loss, expected.mean())
        torch.testing.assert_close(out.rewards, 0.3 * u.T.detach())
        margins = out.metrics["rewards/margins"]
        torch.testing.assert_close(margins, (0.3 * (u[0] - u[1])).mean().detach())
        accuracy = out.metrics["rewards/accuracies"]
        assert accuracy == (u[0] > u[1]).float().mean()
        assert out.counts["rewards/accuracies"] == B


@pytest.mark.parametrize("objective", ["dpo", "simpo", "cpo", {"ipo": 1.0, "sft": 0.5}, "tdpo2"])
def test_padded_and_segments_agree(padded, head, objective):
    loss = PreferenceLoss(objective, head)
    tokens, segments = packed(padded)
    results = []
    for batch, table in ((padded, None), (tokens, segments)):
        hidden = batch["hidden"].clone().requires_grad_()
        out = loss(
            hidden, batch["labels"], table,
            ref_hidden=batch["ref_hidden"], ref_weight=head.weight.detach(),
            ref_bias=head.bias.detach(), token_weights=batch["token_weights"],
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, hidden)
        results.append((out, grad))
    (a, grad_a), (b, grad_b) = results
    torch.testing.assert_close(a.losses, b.losses)
    torch.testing.assert_close(a.rewards, b.rewards)
    again, _ = packed({**padded, "hidden": grad_a})
    torch.testing.assert_close(again["hidden"], grad_b)
    torch.testing.assert_close(a.losses.mean(), a.loss.detach())


def test_step_zero_is_exactly_ln_2(padded, head):
    for p in head.parameters():
        p.requires_grad_(False)
    hidden = padded["hidden"].requires_grad_()
    out = PreferenceLoss("dpo", head)(hidden, padded["labels"], ref_hidden=padded["hidden"])
    assert (out.losses == torch.tensor(math.log(2.0))).all()
    assert (out.rewards == 0).all()


def test_mixture_is_the_sum_of_its_parts(padded, head):
    args = {"ref_hidden": padded["ref_hidden"], "ref_weight": head.weight.detach()}
    x = padded["hidden"], padded["labels"]
    whole = PreferenceLoss({"dpo": 0.8, "sft": 0.25}, head, beta=0.3)(*x, **args)
    dpo = PreferenceLoss("dpo", head, beta=0.3)(*x, **args)
    sft = PreferenceLoss("sft", head)(*x)
    torch.testing.assert_close(whole.loss, 0.8 * dpo.loss + 0.25 * sft.loss)
    assert torch.equal(whole.rewards, dpo.rewards)
    assert torch.equal(PreferenceLoss({"sft": 1.0, "dpo": 1.0}, head)(*x, **args).rewards,
                       PreferenceLoss("dpo", head)(*x, **args).rewards)  # fmt: skip


def test_hyper_parameters_reach_the_component_that_is_named():
    general, particular = resolve({"dpo": 1, "ipo": 1}, {"ipo.beta": 0.5, "beta": 0.2})
    assert general.hyper == {"beta": 0.2}
    assert particular.hyper == {"beta": 0.5}


@pytest.mark.parametrize(
    ("objective", "hyper", "message"),
    [
        ("dpoo", {}, "unknown objective 'dpoo'.*'dpo'"),
        ("dpo", {"betta": 0.1}, "no hyper-parameter 'betta': did you mean 'beta'"),
        ({"dpo": 1, "sft": 1}, {"sft.beta": 1}, "no hyper-parameter 'sft.beta'"),
        ({}, {}, "the mixture of objectives is empty"),
        ({"dpo": float("nan")}, {}, "weight nan"),
        ({"dpo": True}, {}, "weight True"),
    ],
)
def test_bad_objectives_are_named(objective, hyper, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(objective, **hyper)


def test_global_totals_make_micro_batches_add_up(padded, head):
    """Two micro-batches of 2 and 1 pairs, divided by the step's totals, give the step's loss."""
    loss = PreferenceLoss({"simpo": 1.0, "sft": 1.0}, head)
    full = loss(padded["hidden"], padded["labels"])
    chosen_tokens = int((padded["labels"][:B] != -100).sum())
    totals = {"groups": B, "responses": 2 * B, "desirable": B, "undesirable": B}
    totals["chosen_tokens"] = chosen_tokens
    parts = []
    for pairs in ([0, 1], [2]):
        rows = [*pairs, *(B + i for i in pairs)]
        parts.append(loss(padded["hidden"][rows], padded["labels"][rows], totals=totals).loss)
    torch.testing.assert_close(parts[0] + parts[1], full.loss)
    own = loss(padded["hidden"][[2, 5]], padded["labels"][[2, 5]])
    assert not torch.isclose(own.loss, parts[1])


def test_sample_weight_scales_a_groups_loss(padded, head):
    tokens, segments = packed(padded)
    loss = PreferenceLoss("simpo", head)
    plain = loss(tokens["hidden"], tokens["labels"], segments)
    from dataclasses import replace

    weights = torch.tensor([2.0, 0.0, 1.0])
    weighted = loss(tokens["hidden"], tokens["labels"], replace(segments, weight=weights))
    torch.testing.assert_close(weighted.losses, plain.losses * weights)


def test_extra_response_reaches_kto(padded, head):
    tokens, segments = packed(padded)
    # Pairs turned round: the chosen are candidates on their own, the rejected are mismatched.
    single = Segments(
        segments.response,
        segments.grid[:, :1],
        torch.tensor([[True], [False], [True]]),
        num_responses=6,
        extras={"mismatched": segments.grid[:, 1]},
    )
    policy, _, _ = by_hand(padded, head, "hidden")
    reference, _, _ = by_hand(padded, head, "ref_hidden")
    u = (policy - reference).detach()
    z0 = u[B:].mean().clamp(min=0)
    sign = torch.tensor([1.0, -1.0, 1.0])
    expected = 1 - torch.sigmoid(0.2 * sign * (u[:B] - z0))
    loss = PreferenceLoss("kto", head, beta=0.2)
    assert loss.extras == ("mismatched",)
    reference_args = {"ref_weight": head.weight.detach(), "ref_bias": head.bias.detach()}
    out = loss(
        tokens["hidden"], tokens["labels"], single, ref_hidden=tokens["ref_hidden"],
        **reference_args,
    )  # fmt: skip
    torch.testing.assert_close(out.losses, expected)
    with pytest.raises(ValueError, match="needs a response in the role 'mismatched'"):
        loss(tokens["hidden"], tokens["labels"], segments, ref_logps=tokens["token_weights"])


def test_bco_shift_is_a_running_mean_that_is_saved(padded, head):
    loss = PreferenceLoss("bco", head, beta=0.2)
    x = padded["hidden"], padded["labels"]
    args = {"ref_hidden": padded["ref_hidden"], "ref_weight": head.weight.detach()}
    first = loss(*x, **args)
    shift = first.rewards.mean()
    torch.testing.assert_close(first.metrics["bco/shift"], shift)
    other = {**args, "ref_hidden": -padded["ref_hidden"]}
    second = loss(*x, **other)
    torch.testing.assert_close(second.metrics["bco/shift"], (shift + second.rewards.mean()) / 2)
    with torch.no_grad():
        unchanged = loss(*x, **args)
    assert unchanged.metrics["bco/shift"] == second.metrics["bco/shift"]
    restored = PreferenceLoss("bco", head, beta=0.2)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.eval()(*x, **args).losses, loss.eval()(*x, **args).losses)
    assert not any("weight" in name for name in loss.state_dict())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("dpo", "dpo needs 'ratio': pass ref_logps"),
        ("tdpo1", "tdpo1 needs 'ratio': pass ref_logps"),
        ("lipo", "lipo needs 'ratio'"),
    ],
)
def test_missing_reference_says_how_to_get_it(padded, head, objective, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(objective, head)(padded["hidden"], padded["labels"])


def test_divergence_refuses_stored_log_probs(padded, head):
    _, _, tokens = by_hand(padded, head, "ref_hidden")
    with pytest.raises(ValueError, match="tdpo1 needs 'kl': pass ref_hidden"):
        PreferenceLoss("tdpo1", head)(padded["hidden"], padded["labels"], ref_logps=tokens.detach())


def test_trained_head_wants_the_references_own(padded, head):
    with pytest.raises(ValueError, match="pass ref_weight"):
        PreferenceLoss("dpo", head)(
            padded["hidden"], padded["labels"], ref_hidden=padded["ref_hidden"]
        )


def test_group_sizes_are_checked(padded, head):
    tokens, segments = packed(padded)
    lists = Segments(
        segments.response, torch.tensor([[0, 1, 2], [3, 4, -1]]),
        torch.tensor([[True, False, False]] * 2), num_responses=6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dpo compares pairs, but group 0 has 3"):
        PreferenceLoss("dpo", head)(tokens["hidden"], tokens["labels"], lists)
    singles = Segments(
        segments.response, torch.arange(6)[:, None], torch.ones(6, 1).bool(), num_responses=6
    )
    with pytest.raises(ValueError, match="logo compares lists, but group 0 has a single"):
        PreferenceLoss("logo", head)(tokens["hidden"], tokens["labels"], singles)
    with pytest.raises(ValueError, match=r"\[2B, T, D\]"):
        PreferenceLoss("simpo", head)(tokens["hidden"], tokens["labels"])
    with pytest.raises(ValueError, match="no head"):
        PreferenceLoss("simpo")(padded["hidden"], padded["labels"])


def test_head_facts_are_honoured_and_read_at_every_call(padded, head):
    facts = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.9}
    loss = PreferenceLoss("simpo", Head(head, **facts))
    valid = padded["labels"] != -100
    logps = torch.zeros(2 * B, T)
    logps[valid] = linear_logps(
        padded["hidden"][valid], head.weight, padded["labels"][valid], bias=head.bias, **facts
    )
    means = (logps.sum(-1) / valid.sum(-1)).view(2, B)
    expected = -torch.nn.functional.logsigmoid(2 * (means[0] - means[1]) - 0.5)
    out = loss(padded["hidden"], padded["labels"])
    torch.testing.assert_close(out.loss, expected.mean())
    with torch.no_grad():
        head.weight.zero_()
    assert not torch.isclose(loss(padded["hidden"], padded["labels"]).loss, out.loss)
    assert not list(loss.parameters())


def test_tied_lists_depend_on_seed_and_step_only(head):
    g = torch.Generator().manual_seed(3)
    hidden, labels = torch.randn(12, D, generator=g), torch.randint(0, V, (12,), generator=g)
    grid = torch.arange(12).view(3, 4)
    score = torch.tensor([[1.0, 0.7, 0.2, 0.0]] * 3)

    def run(order, **keys):
        loss = PreferenceLoss("lipo", head)
        for name, value in keys.items():
            setattr(loss, name, value)
        segments = Segments(
            torch.arange(12), grid[order], torch.tensor([[True] + [False] * 3] * 3), 12,
            score=score, index=torch.tensor([10, 20, 30])[order],
        )  # fmt: skip
        ref = linear_logps(hidden, head.weight, labels, bias=head.bias).detach()
        return loss(hidden, labels, segments, ref_logps=ref).losses  # every score ties at 0

    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(run(order), run(torch.arange(3))[order])
    assert not torch.equal(run(order, step=1), run(order))
    assert not torch.equal(run(order, seed=1), run(order))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logps": torch.zeros(2 * B, T + 1)}, r"ref_logps is \(6, 7\) for labels of \(6, 6\)"),
        ({"ref_logps": torch.zeros(2 * B)}, "sums over a response will not do"),
        ({"ref_hidden": torch.zeros(2 * B, T + 1, D)}, "ref_hidden is .*drop the last position"),
        ({"token_weights": torch.ones(2 * B, T + 1)}, "token_weights is"),
        ({"old_logps": torch.zeros(1)}, "old_logps is"),
        ({"token_rewards": torch.zeros(2 * B, 1)}, "token_rewards is"),
    ],
)
def test_tensors_that_do_not_line_up_are_named(padded, head, change, message):
    arguments = {"ref_logps": torch.zeros(2 * B, T), **change}
    with pytest.raises(ValueError, match=message):
        PreferenceLoss("dpo", head)(padded["hidden"], padded["labels"], **arguments)


def test_segments_that_do_not_line_up_are_named(padded, head):
    tokens, segments = packed(padded)
    loss = PreferenceLoss("simpo", head)
    with pytest.raises(ValueError, match=r"hidden is .* one state a label"):
        loss(tokens["hidden"], tokens["labels"][1:], segments)
    with pytest.raises(ValueError, match=r"segments.response is .* the response of every label"):
        loss(tokens["hidden"][1:], tokens["labels"][1:], segments)


def test_a_missing_grade_is_named(padded, head):
    tokens, segments = packed(padded)
    segments = replace(segments, score=torch.tensor([[1.0, 0.0], [1.0, float("nan")], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="response 1 of group 1 has none"):
        PreferenceLoss("lipo", head)(
            tokens["hidden"],
            tokens["labels"],
            segments,
            ref_logps=torch.zeros_like(tokens["labels"]),
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_a_step(padded, head, name):
    """Whatever a table entry needs, the module supplies it or names it."""
    tokens, segments = packed(padded)
    table = Segments(
        segments.response, segments.grid[:, :1] if name == "kto" else segments.grid,
        segments.label[:, :1] if name == "kto" else segments.label, 6,
        score=torch.tensor([[1.0, 0.0]] * B), rank=torch.tensor([[0, 1]] * B),
        margin=torch.tensor([0.5, -0.2, 1.0]), population=torch.tensor([0, 1, 0]),
        extras={role: segments.grid[:, 1] for role in OBJECTIVES[name].extras},
    )  # fmt: skip
    hidden = tokens["hidden"].clone().requires_grad_()
    loss = PreferenceLoss(name, head)
    arguments = {}
    if loss.needs_reference:
        arguments |= {"ref_hidden": tokens["ref_hidden"], "ref_weight": head.weight.detach()}
    if any("old_logps" in need for need in loss.needs):
        drawn_by = torch.randn(len(tokens["hidden"]), D, generator=torch.Generator().manual_seed(5))
        logps = linear_logps(tokens["hidden"] + 0.3 * drawn_by, head.weight, tokens["labels"])
        arguments["old_logps"] = logps.detach()
    if loss.needs_second_reference:
        with pytest.raises(ValueError, match="needs 'ratio2': pass ref2_logps"):
            loss(hidden, tokens["labels"], table, **arguments)
        arguments["ref2_logps"] = torch.linspace(-3, -2, len(tokens["labels"]))
    if "token_rewards" in loss.needs:
        arguments["token_rewards"] = torch.linspace(-0.5, 0.5, len(tokens["labels"]))
    if any("error" in need for need in loss.needs):
        with pytest.raises(ValueError, match="denoising errors"):
            loss(hidden, tokens["labels"], table, **arguments)
        return
    out = loss(hidden, tokens["labels"], table, **arguments)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert torch.isfinite(grad).all()
    assert grad.any()


def test_a_hyper_parameter_moves_with_training(padded, head):
    """DPO-Shift's lambda, from 0.75 to 1: a quarter of the way it is 0.8125."""
    args = {"ref_logps": torch.zeros(2 * B, T)}
    moving = PreferenceLoss({"dpo_shift": 1.0, "dpo": 0.5}, head, lam=[0.75, 1.0], beta=0.2)
    for progress, lam in ((0.0, 0.75), (0.25, 0.8125), (1.0, 1.0)):
        moving.progress = progress
        still = PreferenceLoss({"dpo_shift": 1.0, "dpo": 0.5}, head, lam=lam, beta=0.2)
        ours, plain = (loss(padded["hidden"], padded["labels"], **args) for loss in (moving, still))
        assert torch.equal(ours.loss, plain.loss)
    for bad in ([0.5], [0.5, "1"], [0.5, 0.7, 1.0]):
        with pytest.raises(ValueError, match=r"lam=\[0\.5.* must be "):
            PreferenceLoss("dpo_shift", head, lam=bad)


def test_sparsity_of_weights_is_logged(padded, head):
    tokens, segments = packed(padded)
    n = len(tokens["labels"])
    weights = torch.tensor([0.0, -2.0] * n)[:n]
    given = {"ref_logps": torch.zeros(n), "token_weights": weights}
    out = PreferenceLoss("dpo", head)(tokens["hidden"], tokens["labels"], segments, **given)
    zeros = (weights == 0).sum()
    torch.testing.assert_close(out.metrics["token_weights/zeros"], zeros / n)
    torch.testing.assert_close(out.metrics["token_weights/mean_abs"], 2 * (n - zeros) / n)
    assert out.counts["token_weights/zeros"] == n
    assert not any("kl_weights" in name for name in out.metrics)


def test_tokens_of_a_response_follow_each_other():
    grid, label = torch.tensor([[0, 1]]), torch.tensor([[True, False]])
    table = Segments(torch.tensor([0, 0, 2, 2, 2]), grid, label, num_responses=4)
    assert table.starts.tolist() == [0, 2, 2, 5, 5]
    with pytest.raises(ValueError, match=r"falls from 1 to 0 at token 3: sort the tokens"):
        replace(table, response=torch.tensor([0, 1, 1, 0]))
