"""The README's claims that a program can check."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path

from fastpo.cli.objectives import markdown, markdown_scores
from fastpo.objectives import SECTIONS
from fastpo.objectives.vocabulary import SCORES
from fastpo.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 15
    namespace: dict = {}
    exec(example, namespace)
    loss, margin = (float(x) for x in capsys.readouterr().out.split())
    assert loss > 0
    assert margin == margin
    assert all(p.grad is not None for p in namespace["model"].parameters())


def test_own_objective_of_the_docs_runs(capsys, monkeypatch, tmp_path):
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    own = {
        n: re.sub(r"```\w*\n?", "", between(text, f"own {n}")) for n in ("file", "recipe", "loop")
    }
    (tmp_path / "my_module.py").write_text(own["file"])
    (tmp_path / "r.yaml").write_text(f"model: m\ndataset: d.jsonl\n{own['recipe']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(own["loop"], {})
    assert float(capsys.readouterr().out) > 0
    recipe = load_recipe("r.yaml")
    assert recipe.settings["objective"] == "my_module:my_loss"
    assert recipe.hyper == {"my_loss": {"beta": 0.3}}
    del sys.modules["my_module"]


def test_examples_of_style_are_in_the_code():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = [*(ROOT / "fastpo").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    code = "\n".join(re.sub(r"^ +", "", f.read_text("utf-8"), flags=re.M) for f in files)
    examples = re.findall(r"```python\n(.*?) *```", page, flags=re.S)
    assert len(examples) == 2
    for example in examples:
        assert re.sub(r"^ +", "", example, flags=re.M) in code, example


def between(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, flags=re.S)
    assert found is not None, f"no part called {name}"
    return found[1]


def objective_table() -> str:
    rows = ["| | objectives |", "|---|---|"]
    for title, section in SECTIONS.items():
        rows.append(f"| {title} | {', '.join(f'`{name}`' for name in section)} |")
    return "\n".join(rows)


def test_objective_table_is_the_catalogue():
    table = objective_table()
    assert between(README, "objectives") == table, f"put this table into the README:\n{table}"


def test_docs_of_the_objectives_are_generated():
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert between(text, "catalogue") == markdown(), "fastpo objectives --markdown makes this part"
    scores = markdown_scores()
    assert between(text, "scores") == scores, f"put this table into the page:\n{scores}"
    assert "|" not in "".join(score.definition.replace(r"\|", "") for score in SCORES.values())


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_modules_that_the_docs_name_exist(recwarn):
    """No page names a module that has moved."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`(fastpo(?:\.\w+)+)", text):
            assert pkgutil.resolve_name(name), (page.name, name)
        for path in re.findall(r"`((?:fastpo|kernels|tests|bench)/[\w/]+\.py)`", text):
            assert (ROOT / path).exists(), (page.name, path)
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_recipe_is_a_recipe(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path)
    assert list(recipe.hyper) == ["dpo"]
    assert recipe.config().per_device_train_batch_size == 4
