"""What `fastpo doctor` says of a model's chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import run
from tests.data.conftest import CHATML


def test_says_what_the_chat_template_does(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tiny / "model").iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.jinja"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template, lines in (
        (None, ["template     none: rows must be text"]),
        (
            CHATML,
            ["content      text", "header       '<|im_start|>assistant'", "tools        none"],
        ),
    ):
        config.pop("chat_template", None)
        if template:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        status, out, _ = run(capsys, "doctor", "--model", folder, "--tokens", "128")
        assert status == 0
        section = out.partition("\nchat template\n")[2]
        for line in lines:
            assert f"  {line}" in section
