"""What `fastpo doctor` says of attention back ends, and that it sees a wrong one."""

from __future__ import annotations

import pytest
import torch

from fastpo.cli import doctor
from fastpo.model.attention import merge as attention_merge
from fastpo.model.attention.merge import Band
from tests.cli.test_cli import run

CPU = torch.device("cpu")


def test_a_wrong_back_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    error, bound = doctor.check_attention("merge", CPU, torch.float32)
    assert 0 < error <= bound
    monkeypatch.setattr(attention_merge, "_band", lambda *_: Band(True, -1))
    error, bound = doctor.check_attention("merge", CPU, torch.float32)
    assert error > bound


def test_prints_every_back_end_and_fails_on_wrong_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_attention", lambda *_: (1.0, 1e-6))
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    for name in ("segments", "merge"):
        assert f"{name:<12} WRONG: relative error 1.0e+00" in out
    for name in ("varlen", "flex"):
        assert f"{name:<12} not here: attention_backend='{name}'" in out
