"""What a head's spec and options refuse, and where: when they are built."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from fastpo import Head, PreferenceLoss, linear_logps
from fastpo.head.spec import HeadOptions, HeadSpec


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        (HeadSpec, {"softcap": 0.0}, "softcap must be positive or None: got 0.0"),
        (HeadSpec, {"temperature": -1.0}, "temperature must be positive: got -1.0"),
        (HeadOptions, {"backend": "cuda"}, "unknown backend 'cuda': choose 'auto', 'torch' or"),
        (HeadOptions, {"skip_below": 1.0}, r"skip_below must lie in \[0, 1\): got 1.0"),
        (HeadOptions, {"skip_below": -0.1}, r"skip_below must lie in \[0, 1\): got -0.1"),
        (HeadOptions, {"jsd_beta": 0.0}, "jsd_beta must lie between 0 and 1: got 0.0"),
        (HeadOptions, {"workspace_mib": 0}, "workspace_mib must be positive and finite, or"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_built(kind, facts, message):
    with pytest.raises(ValueError, match=message):
        kind(**facts)
    (name,) = facts
    with pytest.raises(FrozenInstanceError):
        setattr(kind(), name, None)


def test_a_head_has_its_facts_as_one_spec_and_its_tensors_at_each_access():
    linear = torch.nn.Linear(4, 8)
    head = Head(linear, softcap=30.0, vocab_size=7)
    assert head.spec == HeadSpec(**head.facts()) == HeadSpec(30.0, vocab_size=7)
    assert head == Head(linear, softcap=30.0, vocab_size=7)
    assert head.tensors.weight is linear.weight
    linear.weight = torch.nn.Parameter(torch.zeros(8, 4))
    assert head.tensors == (linear.weight, linear.bias, None)
    with pytest.raises(ValueError, match="softcap must be positive"):
        Head(linear, softcap=-1.0)


@pytest.mark.parametrize("mib", [0, -1, "256", "most", True, float("nan"), float("inf"), None])
def test_what_is_no_workspace_is_refused_by_name(mib):
    x, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    message = r"workspace_mib must be positive and finite, or 'auto': got"
    with pytest.raises(ValueError, match=message):
        linear_logps(x, torch.randn(16, 8), labels, workspace_mib=mib)
    # Before a loss is cut into groups by it.
    loss = PreferenceLoss("simpo", torch.nn.Linear(8, 16), beta=2.0)
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.long), workspace_mib=mib)


@pytest.mark.parametrize("mib", [np.float32(3), np.int64(3)], ids=repr)
def test_a_workspace_may_be_any_number(mib):
    x, w, labels = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.long)
    expected = linear_logps(x, w, labels, workspace_mib=3)
    torch.testing.assert_close(linear_logps(x, w, labels, workspace_mib=mib), expected)
