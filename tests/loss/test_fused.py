"""Objectives that have a kernel; `tests/kernels/interpreted/test_fused.py` runs them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from fastpo.loss.fused import FUSED
from fastpo.objectives import OBJECTIVES

DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_docs_name_every_objective_with_a_kernel():
    (part,) = re.findall(
        r"<!-- fused -->(.*)<!-- /fused -->", DOCS.read_text(encoding="utf-8"), flags=re.S
    )
    names = [name for name, objective in OBJECTIVES.items() if objective.fn in FUSED]
    assert re.findall(r"`(\w+)`", part) == names
    assert len(names) == len(FUSED)


def test_a_kernel_reads_only_what_the_objective_needs():
    for objective in OBJECTIVES.values():
        if objective.fn in FUSED:
            call = FUSED[objective.fn](SimpleNamespace(**objective.hyper))
            if call is not None:
                read = {call.score, call.beside, call.reward_of} - {None}
                assert read <= set(objective.needs), objective.name
