"""An objective in a file of one's own, from a recipe to the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fastpo.cli import main
from fastpo.recipe.recipe import load_recipe
from fastpo.recipe.values import RecipeError

FILE = '''
from fastpo.objectives.pairwise import margin_of, pair_outcome

def my_loss(ratio, length, mask, *, beta: float = 0.1):
    """(1 - beta (u_w - u_l))^2"""
    return pair_outcome((1 - beta * margin_of(ratio, mask)).square(), beta * ratio, mask)

my_loss.family = "pair"
'''


@pytest.fixture
def folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, whose subfolder has the recipe and the file."""
    home = tmp_path / "experiments"
    home.mkdir()
    (home / "my_module.py").write_text(FILE)
    (home / "r.yaml").write_text(
        f"{recipe.read_text()}objective: {{my_module:my_loss: 1, sft: 0.5}}\nmy_loss.beta: 0.3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_module", None)


def test_it_trains_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiments/r.yaml", "--save_steps", "1"]) == 0
    saved = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert saved["objective"] == {"experiments/my_module.py:my_loss": 1.0, "sft": 0.5}
    assert saved["objective_args"]["my_loss.beta"] == 0.3
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] > 1  # of a margin of 0: 1, and the likelihood
    assert "my_loss: (1 - beta (u_w - u_l))^2" in (folder / "run" / "report.html").read_text()
    # From the recipe that the run wrote, with what it left.
    assert main(["train", "run/recipe.yaml", "--max_steps", "3"]) == 0
    assert "resumes " in capsys.readouterr().out
    steps = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in steps) == 3
    assert main(["plan", "--recipe", "run/recipe.yaml", "--context", "1024"]) == 0
    assert main(["objectives", "experiments/my_module.py:my_loss"]) == 0
    shown = capsys.readouterr().out
    assert "(1 - beta (u_w - u_l))^2" in shown
    assert "  recipe    objective: experiments/my_module.py:my_loss\n" in shown


def test_flags_and_refusals(folder: Path) -> None:
    path = folder / "experiments" / "r.yaml"
    path.write_text("model: m\ndataset: d.jsonl\nobjective: my_module:my_loss\nbeta: 0.3\n")
    recipe = load_recipe(path, ["--objective.sft", "0.1"])
    assert recipe.settings["objective"] == {"experiments/my_module.py:my_loss": 1.0, "sft": 0.1}
    recipe = load_recipe(None, ["--model", "m", "--dataset", "d.jsonl", "--objective", "simpo"])
    assert recipe.settings["objective"] == "simpo"
    for text, said in (
        ("objective: my_modul:my_loss", r"r.yaml:3: .*no my_modul, .*did you mean 'my_module'"),
        ("objective: my_module:my_los", r"r.yaml:3: .*has no 'my_los': did you mean 'my_loss'"),
        ("objective: my_module:my_loss\nbete: 1", "r.yaml:4: unknown key 'bete'.*beta"),
        ("objective: my_module:my_loss\nbeta: a", r"r.yaml:4: .*beta = 'a'.*must be a number"),
    ):
        path.write_text(f"model: m\ndataset: d.jsonl\n{text}\n")
        with pytest.raises(RecipeError, match=said) as error:
            load_recipe(path)
        assert "\n" not in str(error.value)


def test_the_catalogue_shows_a_file_that_computes_when_it_is_imported(tmp_path: Path) -> None:
    """In a process that has not loaded torch, whose place a stand-in takes for the catalogue's."""
    text = FILE.replace("float = 0.1", "float = BETA")
    text = f"import torch\nfrom torch.special import expit\nBETA = torch.tensor(0.5).item()\n{text}"
    (tmp_path / "my_module.py").write_text(text)
    code = "import sys; from fastpo.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["objectives", "my_module:my_loss"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert "beta: 0.5" in done.stdout, done.stderr
