"""What the papers say of single objectives, and how objectives reduce to each other."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import pkgutil

import pytest
import torch
from torch import Tensor

import fastpo.objectives
from fastpo.objectives import OBJECTIVES, get_objective
from fastpo.objectives.lipo import lipo, plackett_luce, tie_keys
from fastpo.objectives.listwise import logo
from fastpo.objectives.pairwise import bco_pair, dpo, ipo, robust, sppo
from fastpo.objectives.pointwise import bco, kto, npo
from fastpo.objectives.reference_free import cpo, simpo
from fastpo.objectives.regularisers import sft
from fastpo.objectives.token import tdpo1, tdpo2
from fastpo.testing.three_way import assert_three_way

PAIR = torch.tensor([[True, True]])
CHOSEN = torch.tensor([[True, False]])


def value(outcome, term: int = 0) -> Tensor:
    return outcome.terms[term].values


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.iter_modules(fastpo.objectives.__path__)]
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fastpo.objectives.{module}"))
    assert result.failed == 0


def test_get_objective() -> None:
    assert get_objective("dpo") is OBJECTIVES["dpo"]
    five = r"('\w+', ){3}'\w+' or '\w+'\? `fastpo objectives` lists all$"
    with pytest.raises(ValueError, match=rf"'simp0': did you mean (?='simpo'){five}"):
        get_objective("simp0")
    with pytest.raises(ValueError, match=rf"'zzz': did you mean {five}"):
        get_objective("zzz")
    with pytest.raises(ValueError, match=r"'sigmoid_norm': here it is ln_dpo$"):
        get_objective("sigmoid_norm")
    with pytest.raises(ValueError, match=r"'Beta-DPO': here it is beta_dpo$"):
        get_objective("Beta-DPO")


def test_needs_follow_the_signature() -> None:
    assert OBJECTIVES["simpo"].needs == ("mean_logps", "mask")
    assert OBJECTIVES["simpo"].hyper == {
        "beta": 2.0,
        "gamma_beta_ratio": 0.25,
        "label_smoothing": 0.0,
        "loss_type": "sigmoid",
    }
    assert OBJECTIVES["kto"].extras == ("mismatched",)
    assert OBJECTIVES["bco"].statistics["shift"].memory == "mean"
    assert OBJECTIVES["kto"].statistics["z0"].memory == "none"


def test_statistics_read_live_slots() -> None:
    scores = {
        "mismatched_ratio": torch.tensor([1.0, 5.0]),
        "ratio": torch.tensor([[2.0, 4.0], [math.nan, math.nan]]),
        "mask": torch.tensor([[True, True], [False, False]]),
    }
    values, where = OBJECTIVES["kto"].statistics["z0"].of(scores, {"beta": 0.5})
    assert values[where].tolist() == [1.0]
    values, where = OBJECTIVES["bco"].statistics["shift"].of(scores, {"beta": 0.5})
    assert values[where].tolist() == [1.0, 2.0]


def test_robust_is_unbiased_under_flips() -> None:
    """(1-e) l(z) + e l(-z), with l the robust loss, is the clean DPO loss: the paper's lemma."""
    u, both, e = randn(8, 2) * 10, PAIR.expand(8, 2), 0.2
    kept = value(robust(u, both, label_smoothing=e))
    flipped = value(robust(u.flip(-1), both, label_smoothing=e))
    assert_three_way(
        (1 - e) * kept + e * flipped, value(dpo(u, both)), value(dpo(u, both)), "expectation"
    )


def test_robust_is_not_bounded_below() -> None:
    assert value(robust(torch.tensor([[1e4, -1e4]]), PAIR)) < -200


def test_ipo_with_unit_lengths_ignores_the_average_option() -> None:
    u, both = randn(4, 2), PAIR.expand(4, 2)
    assert torch.equal(value(ipo(u, u, both)), value(ipo(u, u / 7, both, average=False)))


def test_simpo_gamma_is_a_ratio_of_beta() -> None:
    """At s_w - s_l = gamma / beta the link is at 0, whatever beta is."""
    s = torch.tensor([[-1.0, -1.75]])
    for beta in (0.5, 2.0, 10.0):
        loss = value(simpo(s, PAIR, beta=beta, gamma_beta_ratio=0.75))
        assert torch.equal(loss, torch.tensor([2.0]).log())


def test_cpo_is_dpo_without_reference() -> None:
    logps, both = -randn(4, 2).abs(), PAIR.expand(4, 2)
    outcome = cpo(logps, logps / 3, CHOSEN.expand(4, 2), both, cpo_alpha=0.5)
    assert torch.equal(value(outcome), value(dpo(logps, both)))
    assert torch.equal(value(outcome, 1), -logps[:, 0])
    assert outcome.terms[1].weight == 0.5


def test_sppo_half() -> None:
    u, both = randn(4, 2), PAIR.expand(4, 2)
    assert torch.equal(value(sppo(u, both, half=True)) * 2, value(sppo(u, both)))


def test_bco_on_pairs_without_shift_is_bco_pair() -> None:
    u, both = randn(4, 2), PAIR.expand(4, 2)
    assert torch.equal(
        value(bco(u, torch.zeros(()), CHOSEN.expand(4, 2), both)), value(bco_pair(u, both))
    )


def test_kto_reference_point_is_clamped_at_zero() -> None:
    u, both = randn(4, 2), PAIR.expand(4, 2)
    label = CHOSEN.expand(4, 2)
    at = [value(kto(u, torch.tensor(z0), label, both)) for z0 in (-3.0, 0.0, 3.0)]
    assert torch.equal(at[0], at[1])
    assert not torch.equal(at[1], at[2])


def test_kto_weights_go_to_their_labels() -> None:
    u, label = torch.zeros(2, 1), torch.tensor([[True], [False]])
    loss = value(
        kto(u, torch.tensor(0.0), label, label | True, desirable_weight=3, undesirable_weight=5)
    )
    assert loss.tolist() == [1.5, 2.5]


def test_npo_tends_to_gradient_ascent() -> None:
    """d/du of -(2/beta) logsig(-beta u) is 2 sigmoid(beta u): 1 at beta 0, as log-prob ascent."""
    u = randn(3, 1).requires_grad_()
    loss = value(npo(u, torch.zeros(3, 1).bool(), torch.ones(3, 1).bool(), beta=1e-9))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    # 2 sigmoid(x) = 1 + x / 2 + O(x^3), so beta |u| / 2 < 3e-9 is what remains
    assert ((grad - 1).abs() <= 1e-9 * u.abs()).all()


def test_npo_and_sft_share_no_response() -> None:
    """The mixture {npo, sft} forgets the undesirable rows and retains the desirable ones."""
    u = randn(4, 1).requires_grad_()
    label = torch.tensor([[True], [False], [True], [False]])
    live = torch.ones_like(label)
    for outcome, rows in ((npo(u, label, live), ~label), (sft(u, u, label, live), label)):
        (grad,) = torch.autograd.grad(value(outcome).sum(), u)
        assert torch.equal(grad != 0, rows)


def test_sft_reductions() -> None:
    logps, mean = torch.tensor([[-6.0, -9.0]]), torch.tensor([[-2.0, -3.0]])
    terms = {
        reduction: sft(logps, mean, CHOSEN, PAIR, reduction=reduction).terms[0]
        for reduction in ("token_mean", "sequence_mean", "sum")
    }
    assert {k: (t.values.item(), t.per) for k, t in terms.items()} == {
        "token_mean": (6.0, "chosen_tokens"),
        "sequence_mean": (2.0, "desirable"),
        "sum": (6.0, "desirable"),
    }
    with pytest.raises(ValueError, match="'mean'; use 'token_mean', 'sequence_mean' or 'sum'"):
        sft(logps, mean, CHOSEN, PAIR, reduction="mean")  # pyright: ignore[reportArgumentType]


def test_tdpo2_stops_the_gradient_of_the_chosen_divergence() -> None:
    u, kl, both = randn(4, 2), randn(4, 2).abs().requires_grad_(), PAIR.expand(4, 2)
    (first,) = torch.autograd.grad(value(tdpo1(u, kl, both)).sum(), kl)
    (second,) = torch.autograd.grad(value(tdpo2(u, kl, both, alpha=1.0)).sum(), kl)
    assert torch.equal(value(tdpo1(u, kl, both)), value(tdpo2(u, kl, both, alpha=1.0)))
    assert torch.equal(first[:, 1], second[:, 1])
    assert (first[:, 0] < 0).all()
    assert (second[:, 0] == 0).all()


def test_tdpo_without_divergence_is_dpo() -> None:
    u, both = randn(4, 2), PAIR.expand(4, 2)
    for objective in (tdpo1, tdpo2):
        assert torch.equal(value(objective(u, u * 0, both)), value(dpo(u, both)))


def test_plackett_luce_of_a_pair_is_dpo() -> None:
    u, both = randn(6, 2) * 100, PAIR.expand(6, 2)
    best_first, worst_first = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    assert torch.equal(value(plackett_luce(u, best_first.expand(6, 2), both)), value(dpo(u, both)))
    assert torch.equal(
        value(plackett_luce(u, worst_first.expand(6, 2), both)), value(dpo(u.flip(-1), both))
    )


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    """The likelihoods of all K! orders sum to one."""
    u, live = randn(1, 4) * 10, torch.ones(1, 4).bool()
    orders = torch.tensor(list(itertools.permutations(range(4))))
    losses = value(plackett_luce(u.expand(24, 4), orders, live.expand(24, 4)))
    total = (-losses).exp().sum()
    # 24 terms of condition number at most max loss = 4 * beta * max|u| + log 24 < 20
    assert (total - 1).abs() <= 20 * torch.finfo(torch.float64).eps


def test_plackett_luce_does_not_compare_ties() -> None:
    """Ranks (0, 1, 1): the two last each lose to the first, and not to each other."""
    u = randn(1, 3).requires_grad_()
    live = torch.ones(1, 3).bool()
    loss = value(plackett_luce(u, torch.tensor([[0, 1, 1]]), live, beta=1.0))
    by_hand = u[:, 0].neg() + u.logsumexp(-1)
    assert_three_way(loss, by_hand, by_hand, "loss")
    swapped = value(plackett_luce(u[:, [0, 2, 1]], torch.tensor([[0, 1, 1]]), live, beta=1.0))
    assert_three_way(swapped, loss, loss, "order of tied rows")


@pytest.mark.parametrize(("discount", "log"), [("log", math.log), ("log2", math.log2)])
def test_lipo_of_a_pair_is_dpo_times_a_constant(discount, log) -> None:
    """|2^1 - 2^0| = 1 and ranks 1, 2: the weight is 1/log 2 - 1/log 3, in either order."""
    u, both = randn(6, 2) * 10, PAIR.expand(6, 2)
    grades = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    keys = tie_keys(torch.arange(6), 2)
    ours = value(lipo(u, grades, keys, both, beta=0.1, discount=discount))
    constant = 1 / log(2) - 1 / log(3)
    plain = constant * value(dpo(u, both))
    assert_three_way(ours, plain, plain, "loss")


def test_lipo_ties_follow_the_key() -> None:
    """At step 0 every ratio is 0. The value is then the key's, whatever the order of the row."""
    u, grades = torch.zeros(1, 3).double(), torch.tensor([[1.0, 0.5, 0.0]]).double()
    live = torch.ones(1, 3).bool()
    found = set()
    for keys in itertools.permutations([10, 20, 30]):
        key = torch.tensor([keys])
        loss = value(lipo(u, grades, key, live)).item()
        # Breaking the tie by hand, with differences too small to move the links, is the same.
        by_hand = value(lipo(-1e-13 * key.double(), grades, 0 * key, live)).item()
        # d loss / d u <= beta * sum of weights < 0.1, times 3e-12
        assert abs(loss - by_hand) <= 3e-13 + 4 * torch.finfo(torch.float64).eps
        order = torch.tensor([2, 0, 1])
        permuted = value(lipo(u, grades[:, order], key[:, order], live)).item()
        assert abs(loss - permuted) <= 4 * torch.finfo(torch.float64).eps * loss
        found.add(round(loss, 9))
    assert len(found) > 1  # so a fixed rule, such as the row order, would bias the value
    equal = value(lipo(u, grades, torch.zeros(1, 3).long(), live))
    assert equal == 0  # shared ranks weigh nothing: the reason that ties must be broken


def test_lipo_weight_has_no_gradient() -> None:
    """With the weights held, the gradient is that of the weighted logistic losses alone."""
    u = randn(1, 3).requires_grad_()
    grades, live = torch.tensor([[1.0, 0.25, 0.0]]).double(), torch.ones(1, 3).bool()
    loss = value(lipo(u, grades, tie_keys(torch.tensor([0]), 3), live, beta=1.0))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert abs(grad.sum().item()) <= 8 * torch.finfo(torch.float64).eps  # shift invariance
    assert grad[0, 0] < 0 < grad[0, 2]


def test_lipo_discount_is_checked() -> None:
    u = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'ln' of lipo; use 'log' or 'log2'"):
        lipo(u, u, u.long(), PAIR, discount="ln")  # pyright: ignore[reportArgumentType]


def test_tie_keys_are_splitmix64() -> None:
    """The generator's published first output for seed 0, and its own arithmetic in Python."""

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert splitmix(0) == 0xE220A8397B1DCDAF
    keys = tie_keys(torch.tensor([7, 2**40]), 3, seed=11, step=5)
    for i, group in enumerate((7, 2**40)):
        for slot in range(3):
            key = 0
            for part in (11, 5, group, slot):
                key = splitmix(key ^ part)
            assert keys[i, slot].item() % 2**64 == key


def test_tie_keys_depend_on_seed_step_and_group_alone() -> None:
    groups = torch.arange(64)
    keys = tie_keys(groups, 8, seed=3, step=4)
    assert torch.equal(keys[10:20], tie_keys(groups[10:20], 8, seed=3, step=4))
    assert torch.equal(keys[:, :5], tie_keys(groups, 5, seed=3, step=4))
    assert keys.unique().numel() == keys.numel()
    for other in (tie_keys(groups, 8, seed=4, step=4), tie_keys(groups, 8, seed=3, step=5)):
        assert (keys != other).all()
    # Each of 8 slots comes first in 8 of 64 lists on average; 24 is six standard deviations off.
    assert keys.argmin(-1).bincount(minlength=8).max() < 24


def test_logo_of_a_pair_is_simpo() -> None:
    s, both = -randn(4, 2).abs(), PAIR.expand(4, 2)
    ours = logo(3 * s, s, CHOSEN.expand(4, 2), both, beta=2.0, gamma_beta_ratio=0.25)
    assert torch.equal(value(ours), value(simpo(s, both)))


def test_logo_needs_a_rejected_response() -> None:
    s = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="K >= 2 responses, but K is 1"):
        logo(s, s, s == 0, s == 0)
    # A list of one among longer lists has a likelihood and nothing to compare.
    s = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    outcome = logo(s, s, CHOSEN.expand(2, 2), mask)
    assert value(outcome)[1] == 0
    assert value(outcome, 1)[1] == 3
