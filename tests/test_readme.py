"""The README's claims that a program can check."""

from __future__ import annotations

import re
from pathlib import Path

from fastpo import OBJECTIVES, PreferenceLoss

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


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


def objective_table() -> str:
    rows = ["| name | loss | reference? | paper |", "|---|---|---|---|"]
    for name, o in OBJECTIVES.items():
        formula = o.formula.replace("|", "\\|")
        needs = "yes" if PreferenceLoss(name).needs_reference else "no"
        paper = o.paper
        if re.fullmatch(r"\d{4}\.\d{5}", paper):
            paper = f"[{paper}](https://arxiv.org/abs/{paper})"
        rows.append(f"| `{name}` | `{formula}` | {needs} | {paper} |")
    return "\n".join(rows)


def test_objective_table_is_the_catalogue():
    found = re.search(r"<!-- objectives -->\n(.*?)\n<!-- /objectives -->", README, flags=re.S)
    assert found is not None, "README has no objective table"
    assert found[1] == objective_table(), f"put this table into the README:\n{objective_table()}"


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (root / target).exists(), target
