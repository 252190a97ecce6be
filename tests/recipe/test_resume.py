"""Which run a recipe goes on with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastpo.recipe.recipe import load_recipe
from fastpo.recipe.resume import judge_start, refuse_mixture
from fastpo.run.record import Run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "first.yaml"
    path.write_text(
        "model: m\ndataset: d.jsonl\nlora: {r: 2}\nper_device_train_batch_size: 3\n"
        f"max_steps: 2\nuse_cpu: true\noutput_dir: {tmp_path / 'run'}\n"
    )
    return path


# Of an objective without and with statistics of a batch, whether the steps stay what they were.
@pytest.mark.parametrize(
    ("objective", "given", "refused"),
    [
        ("dpo", {}, True),  # a step of half as many groups
        ("dpo", {"gradient_accumulation_steps": 4}, False),
        ("kto", {"gradient_accumulation_steps": 4}, True),  # z0 is a micro-batch's
        ("kto", {"gradient_accumulation_steps": 4, "batch_statistics": "exact"}, False),
    ],
)
def test_a_run_goes_on_with_other_ranks_where_its_steps_stay(
    recipe: Path, objective: str, given: dict, refused: bool
) -> None:
    statistics = given.pop("batch_statistics", "micro")
    common = ["--objective", objective, "--gradient_accumulation_steps", "2"]
    if statistics == "exact":
        common += ["--batch_statistics", "exact"]
    flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    earlier = load_recipe(recipe, common).settings
    before = Run(recipe.parent, recipe={**earlier, "hub_token": "<redacted>"})
    before.facts["batch"] = {"groups": 3, "accumulated": 2, "ranks": 2}
    now = load_recipe(recipe, [*common[:2], *(flags or common[2:4]), *common[4:]])
    if refused:
        with pytest.raises(ValueError, match=r"2 ranks|gradient_accumulation_steps = 2"):
            refuse_mixture(now, now.config(), before)
    else:
        refuse_mixture(now, now.config(), before)


def test_a_finished_run_is_longer_done_or_refused(recipe: Path, tmp_path: Path) -> None:
    """Done at the same length; longer it needs a checkpoint."""
    now, longer = load_recipe(recipe), load_recipe(recipe, ["--max_steps", "3"])
    before = Run(tmp_path, recipe=now.settings, facts={"status": "finished"})
    assert judge_start(now, now.config(), before, fresh=False) == (None, False, True)
    with pytest.raises(ValueError, match="is finished and has no checkpoint to go on from"):
        judge_start(longer, longer.config(), before, fresh=False)
    assert judge_start(now, now.config(), Run(tmp_path), fresh=True) == (None, False, False)


def test_an_objective_of_ones_own_is_the_same_from_any_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def {0}(ratio, mask): ...\n{0}.family = 'pair'\n"
    (recipe.parent / "of_resume.py").write_text(source.format("one") + source.format("two"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    named = ["--objective", "of_resume:one"]
    monkeypatch.chdir(recipe.parent)
    before = Run(recipe.parent, recipe=load_recipe(recipe, named).settings)
    monkeypatch.chdir(recipe.parent.parent)
    elsewhere = load_recipe(recipe, named)
    assert elsewhere.settings["objective"] != before.recipe["objective"]
    refuse_mixture(elsewhere, elsewhere.config(), before)
    two = load_recipe(recipe, ["--objective", "{dpo: 0.5, of_resume:one: 1.0}"])
    mixed = [
        Run(recipe.parent, recipe={**two.settings, "objective": {name: 1.0, "dpo": 0.5}})
        for name in ("of_resume:one", "x/of_resume.py:one", "x/of_resume.py:two")
    ]
    refuse_mixture(two, two.config(), mixed[0])
    for run in mixed[1:]:
        with pytest.raises(ValueError, match="holds a run with objective"):
            refuse_mixture(two, two.config(), run)
    for other in ("of_resume:two", "dpo"):
        now = load_recipe(recipe, ["--objective", other])
        with pytest.raises(ValueError, match=f"objective = .*:one', now it is .*{other[-3:]}'"):
            refuse_mixture(now, now.config(), before)
