"""What `fastpo doctor` says of attention backends."""

from __future__ import annotations

import pytest

from fastpo.model import installation
from tests.cli.test_cli import run


def test_prints_every_back_end_and_fails_on_wrong_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "check_attention", lambda *_: (1.0, 1e-6))
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    for name in ("segments", "merge"):
        assert f"{name:<12} WRONG: relative error 1.0e+00" in out
    for name in ("varlen", "flex"):
        assert f"{name:<12} not here: attention_backend='{name}'" in out
