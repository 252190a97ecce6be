"""What commands write: no secret, and over nothing that is not theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpo.cli import main
from fastpo.cli.output import check_outputs, json_lines, partial_of
from fastpo.cli.prepare import Progress
from fastpo.cli.train import introduction, refuse_mixture, step_words
from fastpo.recipe.recipe import load_recipe
from fastpo.run.folder import claim
from fastpo.run.record import Run
from fastpo.train.trainer import PreferenceTrainer
from tests.cli.test_cli import lines, run
from tests.run.test_folder import content

SECRET = "xyzzy-Plugh-1234"


def test_secrets_are_used_and_never_written_or_printed(capsys: Any, recipe: Path) -> None:
    folder = recipe.parent / "run"
    text = recipe.read_text() + f"hub_token: {SECRET}\nrun_name: named {SECRET}\n"
    recipe.write_text(text)
    words = ["--chat_template_kwargs.my_api_key", "Other-9876", "--disable_dropout", "true"]
    status, out, err = run(capsys, "train", recipe, *words)
    assert status == 0, err
    for secret in (SECRET, "Other-9876"):
        assert secret not in out + err
        assert not [name for name, text in content(folder).items() if secret.encode() in text]
    assert recipe.read_text() == text
    # Another token is no other run; a token that was left out is not taken for one.
    more = ["--max_steps", 3, "--hub_token", "third-Token-55"]
    status, out, err = run(capsys, "train", recipe, *words, *more)
    assert (status, "checkpoint-2" in out) == (0, True), err
    assert "third-Token-55" not in "".join(map(str, content(folder).values())) + out + err
    status, _, err = run(capsys, "train", folder / "recipe.yaml")
    assert status == 2
    assert "run_name has a secret that was left out" in err
    # An error that quotes the value does not.
    status, _, err = run(capsys, "train", recipe, "--hub_token", f"[{SECRET}, 1]")
    assert (status, SECRET in err) == (2, False)
    # Nor does a report of an earlier version's run.
    facts = json.loads((folder / "run.json").read_text())
    facts["recipe"]["hub_token"] = facts["error"] = SECRET
    (folder / "run.json").write_text(json.dumps(facts))
    assert run(capsys, "report", folder)[0] == 0
    assert SECRET not in (folder / "report.html").read_text() + (folder / "README.md").read_text()


def test_a_secret_in_the_name_of_the_data(capsys: Any, recipe: Path, tiny: Path) -> None:
    status, _, err = run(capsys, "train", recipe, "--dataset", f"https://me:{SECRET}@h/x.jsonl")
    assert (status, SECRET in err) == (2, False), err
    assert SECRET.encode() not in (recipe.parent / "run" / "run.json").read_bytes()


def test_a_secret_with_quotes_in_the_command(capsys: Any, recipe: Path) -> None:
    status, _, err = run(
        capsys, "train", recipe, "--hub_token", "one'two plugh", "--report", "false"
    )
    assert status == 0, err
    files = content(recipe.parent / "run")
    assert not [name for name, text in files.items() if b"plugh" in text]


@pytest.mark.parametrize(
    "line", ["hub_token: *plugh", "hub_token: !plugh x", "hub_token: {a: {b: plugh}, c: [plugh]}"]
)
def test_a_secret_that_is_no_text(capsys: Any, recipe: Path, line: str) -> None:
    recipe.write_text(f"{recipe.read_text()}{line}\n")
    status, _, err = run(capsys, "train", recipe)
    assert (status, "plugh" in err, f"{recipe}:14: " in err) == (2, False, True), err


def test_a_traceback_has_no_secret(recipe: Path) -> None:
    command = [sys.executable, "-c", "from fastpo.cli import main; main()", "train", str(recipe)]
    told = subprocess.run(
        [*command, "--dataset", f"https://me:{SECRET}@h/x.jsonl", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback (most recent call last)" in told.stderr
    assert SECRET not in told.stderr + told.stdout


def test_a_run_is_removed_once_the_next_one_has_all_it_reads(capsys: Any, recipe: Path) -> None:
    folder = recipe.parent / "run"
    assert run(capsys, "train", recipe)[0] == 0
    before = content(folder)
    for words, reason in (
        (["--dataset", "nowhere.jsonl"], "no rows at 'nowhere.jsonl'"),
        (["--model", recipe.parent], "cannot read"),
        (
            ["--per_device_train_batch_size", 99, "--dataloader_drop_last", "true"],
            "leaves no batch",
        ),
        (["--resume_from_checkpoint", folder / "checkpoint-2"], "would remove"),
    ):
        status, _, err = run(capsys, "train", recipe, *words, "--overwrite")
        assert (status, reason in err) == (2, True), err
        assert content(folder) == before
    assert run(capsys, "train", recipe, "--max_steps", 1, "--overwrite")[0] == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert not (folder / "checkpoint-2").exists()


def test_the_checkpoint_that_is_named_is_taken(capsys: Any, recipe: Path) -> None:
    folder, elsewhere = recipe.parent / "run", recipe.parent / "other"
    assert run(capsys, "train", recipe, "--save_steps", 1)[0] == 0
    first = folder / "checkpoint-1"
    for words, told in (
        (["--resume_from_checkpoint", folder / "checkpoint-7"], (2, "no such folder")),
        (["--resume_from_checkpoint", "true", "--overwrite"], (2, "no such folder")),
        (["--resume_from_checkpoint", first], (0, "is finished")),
        (["--resume_from_checkpoint", first, "--max_steps", 3], (0, f"resumes    {first}")),
        (["--resume_from_checkpoint", first, "--output_dir", elsewhere], (0, f"{first}\n")),
        (["--resume_from_checkpoint", first, "--output_dir", elsewhere], (0, "is finished")),
    ):
        status, out, err = run(capsys, "train", recipe, "--save_steps", 1, *words)
        assert (status, told[1] in out + err) == (told[0], True), (words, out, err)
        assert list(folder.glob("*model.safetensors"))


def test_a_run_that_never_began_says_so(capsys: Any, recipe: Path, monkeypatch: Any) -> None:
    facts = recipe.parent / "run" / "run.json"
    for words in (["--dataset", "nowhere.jsonl"], ["--dataset", "neither.jsonl"]):
        assert run(capsys, "train", recipe, *words)[0] == 2
        held = json.loads(facts.read_text())
        assert held["status"] == "failed"
        assert words[1] in held["error"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "save_model", full)
        assert run(capsys, "train", recipe, "--save_strategy", "no")[0] == 2
    held = json.loads(facts.read_text())
    assert (held["status"], "No space left" in held["error"]) == ("failed", True)


def test_the_recipe_that_was_given_stays_as_it_is(capsys: Any, recipe: Path) -> None:
    folder = recipe.parent / "run"
    folder.mkdir()
    mine = folder / "recipe.yaml"
    mine.write_text("# my thoughts\n" + recipe.read_text())
    text = mine.read_text()
    for words in ([], ["--overwrite"], ["--max_steps", 3]):
        status, _, err = run(capsys, "train", mine, *words)
        assert status == 0, err
        assert mine.read_text() == text
    assert Run.read(folder).recipe["max_steps"] == 3
    status, _, err = run(capsys, "train", recipe)
    assert status == 2
    assert "holds recipe.yaml, which was not written by fastpo" in err


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_models_folder_is_refused_before_anything_is_loaded(
    capsys: Any, recipe: Path, tiny: Path, tmp_path: Path, overwrite: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    (tmp_path / "link").symlink_to(model)
    before = content(model)
    for folder in (model, tmp_path / "link"):
        words = ["--model", model, "--dataset", "/nowhere.jsonl", "--output_dir", folder]
        status, out, err = run(capsys, "train", recipe, *words, *overwrite)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "holds config.json (and 4 more), which was not written by fastpo" in err
    assert content(model) == before


def test_output_among_the_rows_is_refused(capsys: Any, recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for dataset, folder in ((rows, rows / "run"), (rows, rows), (f"{rows}/*.jsonl", rows)):
        status, _, err = run(capsys, "train", recipe, "--dataset", dataset, "--output_dir", folder)
        assert status == 2
        assert "its files would be read as rows of" in err
    assert not content(rows)


def test_the_first_lines_say_the_step() -> None:
    batch = {"groups": 3, "accumulated": 2, "ranks": 2}
    said = "3 groups a device x 2 accumulated x 2 ranks = 12 groups a step; drop_last is "
    assert step_words(batch, False, 25) == said + "off, an epoch's last 1 are a smaller step"
    assert step_words(batch, True, 29) == said + "on, an epoch's last 5 are left out"
    assert step_words(batch, True, None) == said + "on"
    facts: dict[str, Any] = {
        "model": {"name": "m", "class": "c", "parameters": 1, "trainable": 1, "dtype": "float32"},
        "data": {"name": "d"},
        "objective": {"name": "dpo", "hyper": {}},
        "sharing": {"on": True, "reason": ""},
        "reference": "r",
        "schedule": "s",
        "step": said,
    }
    assert f"step       {said}" in introduction(facts, None, "out")


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
    earlier = load_recipe(recipe, common).given
    before = Run(recipe.parent, recipe={**earlier, "hub_token": "<redacted>"})
    before.facts["batch"] = {"groups": 3, "accumulated": 2, "ranks": 2}
    now = load_recipe(recipe, [*common[:2], *(flags or common[2:4]), *common[4:]])
    if refused:
        with pytest.raises(ValueError, match=r"2 ranks|gradient_accumulation_steps = 2"):
            refuse_mixture(now, now.config(), before)
    else:
        refuse_mixture(now, now.config(), before)


# --- plain files ----------------------------------------------------------------------------------


def commands(tiny: Path, folder: Path) -> dict[str, tuple[list[Any], Path]]:
    """Commands with the file that each writes."""
    model, data, out = tiny / "model", folder / "rows.jsonl", folder / "out.jsonl"
    lists = folder / "lists.jsonl"
    rewards = ["--ref-model", model, "--token-rewards", folder / "t.jsonl"]
    return {
        "score": (["score", "--model", model, "--dataset", data, "--out", out], out),
        "rewards": (["score", "--model", model, "--dataset", data, *rewards], folder / "t.jsonl"),
        "page": (["score", "--model", model, "--dataset", data, *rewards], folder / "t.html"),
        "sample": (
            ["sample", "--model", model, "--prompts", data, "--out", out, "--max-new-tokens", 1],
            out,
        ),
        "rso": (["data", "rso", lists, out, "--count", 2], out),
        "curriculum": (["data", "curriculum", lists, folder / "s"], folder / "s" / "stage-1.jsonl"),
    }


@pytest.mark.parametrize("name", ["score", "rewards", "page", "sample", "rso", "curriculum"])
def test_files_are_written_over_only_where_asked(
    capsys: Any, tiny: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join((tiny / "prefs.jsonl").open().readlines()[:2]))
    ranked = {"prompt": "p", "responses": ["a", "b"], "scores": [0.1, 0.9]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(ranked) + "\n")
    words, out = commands(tiny, tmp_path)[name]
    out.parent.mkdir(exist_ok=True)
    out.write_text("mine")
    before = content(tmp_path)
    status, said, err = run(capsys, *words)
    assert (status, said, err.count("\n")) == (2, "", 1)
    assert f"{out} is there already: name another file" in err
    assert content(tmp_path) == before
    status, _, err = run(capsys, *words, "--overwrite")
    assert status == 0, err
    assert out.read_text() != "mine"
    assert not [*tmp_path.rglob("*.partial")]


def test_stages_of_two_curricula_do_not_mix(capsys: Any, tmp_path: Path) -> None:
    ranked = {"prompt": "p", "responses": ["a", "b"], "scores": [0.1, 0.9]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(ranked) + "\n")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "stage-2.jsonl").write_text("mine")
    words = ["data", "curriculum", tmp_path / "lists.jsonl", tmp_path / "s", "--overwrite"]
    status, _, err = run(capsys, *words)
    assert (status, "stage-2.jsonl would be left" in err) == (2, True)
    assert content(tmp_path / "s") == {"stage-2.jsonl": b"mine"}


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    os.link(data, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(data)
    for out in ("data.jsonl", "hard.jsonl", "soft.jsonl"):
        for source in (data, tmp_path / "*.jsonl"):
            with pytest.raises(ValueError, match="is read itself: name another"):
                check_outputs(tmp_path / out, inputs=[str(source)], overwrite=True)
    with pytest.raises(ValueError, match=r"lies in .* which is read"):
        check_outputs(tmp_path / "new", inputs=[str(tmp_path)])
    with pytest.raises(ValueError, match="is a folder"):
        check_outputs(tmp_path)
    with pytest.raises(ValueError, match="would be written twice"):
        check_outputs(tmp_path / "a", tmp_path / "b" / ".." / "a")
    check_outputs(None, "/dev/null", inputs=[None, str(data), "owner/name"])


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path, capsys: Any) -> None:
    out, partial = tmp_path / "deep" / "out", tmp_path / "deep" / "out.partial"
    with pytest.raises(KeyboardInterrupt), json_lines(out):
        raise KeyboardInterrupt
    assert not content(tmp_path)

    def stopped() -> None:
        with json_lines(out) as write:
            write({"a": 1})
            assert not out.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert f"the rows so far are in {partial}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"out\.partial is there already"):
        check_outputs(out)
    with json_lines(out, over=True) as write:
        write({"a": 2})
    assert (lines(out), partial.exists()) == ([{"a": 2}], False)
    with json_lines("/dev/null") as write:
        write({})


def test_no_output_lands_on_a_model_or_a_run(tiny: Path, tmp_path: Path) -> None:
    run_dir, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    claim(run_dir)
    (run_dir / "checkpoint-1").mkdir()
    for name in ("manifest.json", "trainer_state.json"):
        (run_dir / "checkpoint-1" / name).write_text('{"files": {}}')
    for path in (
        *(model / "config.json", model / "tokenizer.json", model / "adapter_config.json"),
        *(run_dir / "samples.jsonl", run_dir / "README.md", run_dir / "run.json"),
        run_dir / "checkpoint-1" / "trainer_state.json",
    ):
        with pytest.raises(ValueError, match=f"{path} would be a file of the run or model"):
            check_outputs(path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written: .*file is no folder to write to"):
        check_outputs(tmp_path / "file" / "deep" / "rows.jsonl")
    for path in (model / "scores.jsonl", run_dir / "scores.jsonl", tmp_path / "samples.jsonl"):
        path.write_text("")
        check_outputs(path, overwrite=True)


def test_two_commands_write_no_file_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    refused = pytest.raises(ValueError, match=r"rows\.jsonl\.partial is being written by another")
    with json_lines(path) as write:
        write(1)
        with refused, json_lines(path, over=True):
            pass
        with refused:
            Progress(partial_of(path), {})
        write(2)
    assert path.read_text() == "1\n2\n"
    path.unlink()
    first = Progress(path, {"a": 1})
    first.add({"rows": [3], "dropped": []})
    with pytest.raises(ValueError, match="is being written by another"):
        Progress(path, {"a": 1})


def test_there_is_no_report_of_no_run(capsys: Any, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    before = content(folder)
    status, _, err = run(capsys, "report", folder)
    assert (status, content(folder)) == (2, before)
    assert f"{folder} holds no run: name the output_dir of one" in err


def test_prepare_takes_no_other_file_for_its_own(capsys: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("A text.")
    for text in ("mine", '["a"]\n'):
        (tmp_path / "out.partial").write_text(text)
        words = ["prepare", "logo", tmp_path / "d.txt", tmp_path / "out", "--model", tiny / "model"]
        status, _, err = run(capsys, *words)
        assert (status, "out.partial is no file of this command" in err) == (2, True), err
        assert (tmp_path / "out.partial").read_text() == text


def test_merge_leaves_nothing_torn(
    capsys: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "train", recipe)[0] == 0
    from fastpo.cli import merge

    monkeypatch.setattr(merge, "open_tokenizer", lambda *_, **__: sys.exit(3))
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 3
    assert not (tmp_path / "merged").exists()
