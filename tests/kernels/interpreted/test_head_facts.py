"""The facts of `tests.head.test_statistics` by the kernels, every schedule that they have."""

from __future__ import annotations

import pytest
import torch

from fastpo.head.types import DIFFERENTIABLE
from tests.head.test_statistics import LEAVES, OWN, assert_facts

EVERY = (*DIFFERENTIABLE, "ref_logps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mib", [0.05, 0.2], ids=["thin", "whole"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("leaves", "names"),
    [(("hidden",), ("logps",)), (("hidden", "a"), EVERY), (LEAVES, OWN), (LEAVES, EVERY)],
    ids=["frozen", "frozen-every", "trained", "trained-every"],
)
def test_three_way(dtype, mib, softcap, leaves, names):
    assert_facts(dtype, leaves, names, softcap=softcap, backend="triton", workspace_mib=mib)
