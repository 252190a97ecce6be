"""The rules that make numbers of single tokens from two scorers."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

import fastpo.scoring.rules as module
from fastpo.scoring.rules import RULES, get_rule
from fastpo.testing.three_way import assert_three_way

rng = np.random.default_rng(0)
POSITIVE, NEGATIVE = -3 * rng.random(64), -3 * rng.random(64)
DIFFERENCE = torch.from_numpy(POSITIVE - NEGATIVE)


def test_docstring_examples() -> None:
    assert doctest.testmod(module).failed == 0


# The sign of the exponent is the label's.
@pytest.mark.parametrize("label", [True, False])
def test_tis_is_exponential_within_its_bounds(label: bool) -> None:
    args = {"k": 2.0, "mu": 0.5, "low": -0.5, "high": 1.0}
    found = torch.from_numpy(get_rule("tis", args).fn(POSITIVE, NEGATIVE, label))
    sign = 1 if label else -1
    plain = 2.0 * torch.exp(sign * 0.5 * DIFFERENCE.clamp(-0.5, 1.0))
    assert_three_way(found, plain, plain, "tis")
    assert (DIFFERENCE < -0.5).any()
    assert (DIFFERENCE > 1.0).any()


def test_critical_scores_and_their_complement() -> None:
    chosen, rejected = (get_rule("critical", {}).fn(NEGATIVE, label) for label in (True, False))
    plain = torch.from_numpy(NEGATIVE).exp()
    assert_three_way(torch.from_numpy(chosen), plain, plain, "chosen")
    assert_three_way(torch.from_numpy(rejected), 1 - plain, 1 - plain, "rejected")
    alone = get_rule("critical", {"only_rejected": True}).fn
    assert alone(NEGATIVE, True).tolist() == [1.0] * 64
    assert alone(NEGATIVE, False).tolist() == rejected.tolist()


def test_treg_is_a_centred_sigmoid() -> None:
    found = torch.from_numpy(get_rule("treg", {}).fn(POSITIVE, NEGATIVE, False))
    plain = torch.sigmoid(DIFFERENCE) - 0.5
    assert_three_way(found, plain, plain, "treg", terms=0.5)
    assert RULES["treg"].column == "token_rewards"


# Names first, then arguments, then their types.
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("tiss", {}, "unknown rule 'tiss': did you mean 'tis'"),
        ("tis", {"beta": 1.0}, "rule 'tis' has no 'beta': it has k, mu, low, high"),
        ("treg", {"mu": 1.0}, "rule 'treg' has no 'mu': it has none"),
        ("tis", {"mu": True}, "rule 'tis': mu=True is not like 1.0"),
        ("tis", {"mu": "1"}, "rule 'tis': mu='1' is not like 1.0"),
        ("critical", {"only_rejected": 1}, "only_rejected=1 is not like False"),
    ],
)
def test_wrong_rules_are_refused(name: str, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_rule(name, args)
