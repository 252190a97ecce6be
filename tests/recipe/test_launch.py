"""From a recipe to a run, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpo.recipe.launch import claimed
from fastpo.recipe.recipe import load_recipe
from tests.cli.conftest import recipe, tiny  # noqa: F401


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_run_is_written_step_by_step_and_nothing_is_said(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, folder = load_recipe(recipe, ["--max_steps", "1", "--report", "false"]), tmp_path / "run"
    with claimed(made, made.config(), path=str(recipe), command="it", fresh=False) as launch:
        assert (launch.start, facts(folder)["status"]) == ((None, False, False), "starting")
        launch.open()
        assert {p.name for p in folder.iterdir()} == {"run.json", ".fastpo.lock"}
        launch.begin()
        assert (facts(folder)["status"], facts(folder)["command"]) == ("running", "it")
        assert {"recipe.yaml", "skipped.jsonl"} <= {p.name for p in folder.iterdir()}
        assert capsys.readouterr().out == ""
        assert launch.train() is False  # the Trainer prints its log
        launch.write_card()
    assert facts(folder)["status"] == "finished"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "report.html").exists()
    assert "preference-optimization" not in (folder / "README.md").read_text()  # peft's card
    with claimed(made, made.config(), path=str(recipe), command="it", fresh=False) as launch:
        assert launch.start.finished


# What is raised while a run starts, and what its folder says of it.
@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no rows"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_never_began_says_why(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    error: BaseException,
    status: str,
) -> None:
    made = load_recipe(recipe)
    with (
        pytest.raises(type(error)),
        claimed(made, made.config(), path=None, command="it", fresh=False),
    ):
        raise error
    said = facts(tmp_path / "run")
    assert (said["status"], said["error"]) == (status, f"{type(error).__name__}: {error}")
