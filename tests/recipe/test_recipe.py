from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from fastpo.recipe.recipe import RecipeError, load_recipe

BASE = "model: m\ndataset: d.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(BASE + text)
    return path


def load(folder: Path, text: str = "", *flags: str):
    return load_recipe(write(folder, text), flags)


def refused(folder: Path, text: str = "", *flags: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(folder, text, *flags)
    return str(error.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "learning_rate: 1e-5\nbeta: 0.2\nlora: {r: 8, lora_alpha: 4}\n"
    recipe = load(tmp_path, text, "--learning-rate", "2e-5", "--beta=0.3", "--lora.r", "16")
    assert recipe.settings["learning_rate"] == 2e-5
    assert recipe.hyper["dpo"]["beta"] == 0.3
    assert recipe.hyper["dpo"]["label_smoothing"] == 0.0
    assert recipe.model.lora == {"r": 16, "lora_alpha": 4}
    assert load(tmp_path, text).settings["learning_rate"] == 1e-5


def test_a_hyper_parameter_may_move(tmp_path: Path) -> None:
    text = "objective: dpo_shift\nlam: [0.75, 1.0]\n"
    assert load(tmp_path, text).hyper["dpo_shift"]["lam"] == [0.75, 1.0]
    assert load(tmp_path, text, "--lam", "[1, 0.5]").hyper["dpo_shift"]["lam"] == [1, 0.5]
    assert "beta = ['high', 'low'] must be a number above 0" in refused(
        tmp_path, "beta: [high, low]\n"
    )


def test_a_general_flag_wins_over_a_particular_key_of_the_file(tmp_path: Path) -> None:
    text = "objective: {dpo: 1, sft: 0.1}\nobjective_args: {dpo.beta: 0.2}\n"
    assert load(tmp_path, text).hyper["dpo"]["beta"] == 0.2
    assert load(tmp_path, text, "--beta", "0.3").hyper["dpo"]["beta"] == 0.3
    both = load(tmp_path, text, "--dpo.beta", "0.4", "--objective_args.beta", "0.3")
    assert both.hyper["dpo"]["beta"] == 0.4


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--report_to", "[wandb, tensorboard]"], "report_to", ["wandb", "tensorboard"]),
        (["--streaming", "--max_steps", "3"], "streaming", True),
        (["--trust_remote_code", "false"], "trust_remote_code", False),
        (["--bf16", "null"], "bf16", None),
        (["--learning_rate", "5e-7"], "learning_rate", 5e-7),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--dataset_name", "2024"], "dataset_name", "2024"),
        (["--warmup_steps", "10"], "warmup_steps", 10),
        (["--chat_template_kwargs", "{enable_thinking: false}"], "chat_template_kwargs",
         {"enable_thinking": False}),
        (["--max_steps", "-1"], "max_steps", -1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_scalars(tmp_path: Path, words: list[str], key: str, value: object) -> None:
    assert load(tmp_path, "", *words).settings[key] == value


def test_numbers_and_words_in_a_file_follow_yaml_1_2(tmp_path: Path) -> None:
    given = load(tmp_path, "learning_rate: 1e-6\neval_strategy: no\nlora: true\n").settings
    assert given["learning_rate"] == 1e-6
    assert given["eval_strategy"] == "no"
    assert given["lora"] is True
    assert "lora" in refused(tmp_path, "lora: yes\n")


@pytest.mark.parametrize(
    ("text", "flags", "parts"),
    [
        ("leraning_rate: 1\n", [], ["r.yaml:3", "'leraning_rate'", "'learning_rate'"]),
        ("", ["--leraning_rate", "1"], ["--leraning_rate", "'learning_rate'"]),
        ("model_name_or_path: x\n", [], ["Here it is model."]),
        ("gamma_beta_ratio: 1\n", [], ["hyper-parameter of simpo", "dpo has beta"]),
        ("objective: simpoo\n", [], ["r.yaml:3", "'simpo'"]),
        ("objective: {dpo: much}\n", [], ["objective.dpo = 'much'", "a number"]),
        ("objective_args: {bta: 1}\n", [], ["r.yaml:3", "'bta'", "'beta'"]),
        ("beta: high\n", [], ["r.yaml:3", "beta = 'high' must be a number above 0"]),
        ("beta: 1\nobjective_args: {beta: 2}\n", [], ["r.yaml:3", "r.yaml:4"]),
        ("learning_rate: fast\n", [], ["learning_rate = 'fast' (str)", "a number"]),
        ("max_steps: 1.5\n", [], ["max_steps = 1.5 (float)", "an integer"]),
        ("max_steps: true\n", [], ["max_steps = True (bool)", "an integer"]),
        ("trust_remote_code: 1\n", [], ["true or false"]),
        ("truncation: keepend\n", [], ["'keep_end'"]),
        ("optim: adamw\n", [], ["'adamw_torch'"]),
        ("lora: {rank: 3}\n", [], ["r.yaml:3", "'rank'"]),
        ("lora: {rank: 3}\n", ["--lora.r", "3"], ["r.yaml:3", "'rank'"]),
        ("", ["--model.x", "1"], ["model takes text"]),
        ("overwrite: true\n", [], ["Here it is the flag --overwrite, without a value."]),
        ("ref_model: /no/such/folder\n", [], ["r.yaml:3: ref_model", "no folder '/no/such"]),
        ("ref_model: {a/b: 0.5, ./c: 0.5}\n", [], ["r.yaml:3: ref_model", "no folder './c'"]),
        ("reference: adapter\n", [], ["r.yaml:3: reference = 'adapter'", "lora: true"]),
        ("load_best_model_at_end: true\n", [], ["r.yaml:3: load_best", "eval_fraction"]),
        ("early_stopping_patience: 2\n", [], ["r.yaml:3: early_stopping", "eval_fraction"]),
        ("", ["stray"], ["'stray' follows no flag"]),
        ("objective_args: x\n", [], ["r.yaml:3: objective_args = 'x' is no mapping"]),
        ("", ["--max-steps", "1", "--max_steps=2"], ["--max_steps is given twice"]),
        ("model: n\n", [], ["r.yaml:3", "'model' was already set in line 1"]),
        ("a: [\n", [], ["not YAML"]),
        ("eval_fraction: 2\n", [], ["r.yaml:3: eval_fraction = 2 must be in [0, 1)"]),
        ("quantization: nf4\n", [], ["lora"]),
        ("eval_strategy: epoch\n", [], ["r.yaml:3", "eval_fraction"]),
        ("streaming: true\n", [], ["max_steps"]),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_the_remedy(
    tmp_path: Path, text: str, flags: list[str], parts: list[str]
) -> None:
    message = refused(tmp_path, text, *flags)
    for part in parts:
        assert part in message


def test_every_unknown_key_is_named_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, "leraning_rate: 1\n", "--max-stepz", "3")
    assert [line.split(" unknown")[0].split("/")[-1] for line in message.splitlines()] == [
        "r.yaml:3:",
        "--max-stepz:",
    ]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcd", "bcde", strict=True)
)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"seed: 3\xe9\n", r"not UTF-8 text \(byte 0xe9 at 7\)"),
        ("seed: 3\n".encode("utf-16"), "not UTF-8 text"),
        (b"seed: 3\x00\n", "not YAML: unacceptable character"),
        (b"seed:\n\t3: 1", "not YAML: found character"),
        (b"seed: !!int x", "not YAML: invalid literal for int"),
        (b"seed: " + b"9" * 5000, "not YAML: Exceeds the limit"),
        (b"seed: " + b"[" * 3000, "not YAML"),
        (b"lora: &a {r: *a}", "not YAML: aliases that stand inside themselves"),
        (BOMB.encode(), "not YAML: .*or for too much"),
        (b"a: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        (b"--- {}\n--- {}\n", "not YAML: but found another document"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, data: bytes, part: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=rf"r\.yaml.*: .*{part}") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_shares_of_a_reference_are_judged_first(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{BASE}ref_model: {{a: 0.5, b: 0.6}}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: ref_model: .* must add up to 1"):
        load_recipe(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would wait for ever
    for path, told in ((tmp_path, "Is a directory"), (tmp_path / "pipe.yaml", "not a file")):
        with pytest.raises(RecipeError, match=f"{told}; a recipe is a UTF-8 text file"):
            load_recipe(path)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{BASE}seed: 3\n", encoding="utf-8-sig")
    assert load_recipe(path).settings["seed"] == 3


def test_required_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="dataset is missing"):
        load_recipe(None, ["--model", "m"])
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_mixtures(tmp_path: Path) -> None:
    recipe = load(tmp_path, "objective: dpo\nbeta: 0.2\n", "--objective.sft", "0.1")
    assert recipe.settings["objective"] == {"dpo": 1.0, "sft": 0.1}
    assert recipe.hyper["dpo"]["beta"] == 0.2
    assert recipe.settings["objective_args"]["dpo.beta"] == 0.2
    assert recipe.config().build_loss().components[1].weight == 0.1


def test_values_that_only_the_trainer_can_judge_are_recipe_errors(tmp_path: Path) -> None:
    head = f"output_dir: {tmp_path}\nuse_cpu: true\n"
    for text, message in (
        ("logging_steps: 1.5\n", "r.yaml:5: --logging_steps must be an integer"),
        ("reference_update: {every: 0}\n", "r.yaml:5: reference_update: every=0 must be"),
        ("objective: cpo\nloss_type: ipo\nlabel_smoothing: 0.1\n", "r.yaml:7: label_smoothing=0.1"),
    ):
        recipe = load(tmp_path, head + text)
        with pytest.raises(RecipeError, match=message):
            recipe.config()


def test_the_workspace_is_a_number_or_auto(tmp_path: Path) -> None:
    given = ("", "workspace_mib: auto\n", "workspace_mib: 512\n")
    sizes = [load(tmp_path, f"use_cpu: true\n{line}").config().workspace_mib for line in given]
    assert sizes == ["auto", "auto", 512]
    assert load(tmp_path, "", "--workspace_mib", "512").config().workspace_mib == 512


def test_what_follows_from_other_keys(tmp_path: Path) -> None:
    plain, held = load(tmp_path), load(tmp_path, "eval_fraction: 0.1\n")
    assert plain.settings["output_dir"] == "runs/r"
    assert "eval_strategy" not in plain.settings
    assert held.settings["eval_strategy"] == "steps"
    assert held.settings["eval_steps"] == 0.2


def test_only_keys_of_a_recipe_are_suggested(tmp_path: Path) -> None:
    assert "lora_rank'" not in refused(tmp_path, "lora_ranks: 8\n").split("unknown key")[1][15:]


@pytest.mark.parametrize(
    ("text", "eval_steps", "save_steps"),
    [
        ("load_best_model_at_end: true\n", 0.2, 0.2),
        ("early_stopping_patience: 2\n", 0.2, 0.2),
        ("early_stopping_patience: 2\neval_steps: 5\n", 5, 5),
        ("early_stopping_patience: 2\nsave_steps: 20\n", 20, 20),
    ],
)
def test_the_best_evaluation_has_a_checkpoint(
    tmp_path: Path, text: str, eval_steps: float, save_steps: float
) -> None:
    config = load(
        tmp_path, f"output_dir: {tmp_path}\nuse_cpu: true\neval_fraction: 0.1\n{text}"
    ).config()
    assert config.load_best_model_at_end
    assert (config.eval_steps, config.save_steps) == (eval_steps, save_steps)
    by_epoch = load(tmp_path, f"eval_fraction: 0.1\n{text}eval_strategy: epoch\n").settings
    assert by_epoch["save_strategy"] == "epoch"


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    text = (
        "objective: {dpo: 1, sft: 0.1}\nlora: {r: 4.0}\nlearning_rate: 3e-6\nbf16: null\n"
        "revision: '1e10'\nrun_name: 1:30\nsplit: '0o17'\nseed: 010\n"
    )
    recipe = load(tmp_path, text, "--beta", "0.05", "--report_to", "none")
    path = recipe.save(tmp_path / "out")
    again = load_recipe(path)
    assert again.settings == recipe.settings
    assert again.hyper == recipe.hyper
    assert (again.model.revision, again.data.split) == ("1e10", "0o17")
    assert (again.settings["run_name"], again.settings["seed"]) == ("1:30", 10)
    assert repr(again.settings["lora"]["r"]) == "4"
    assert yaml.safe_load(path.read_text())["objective_args"]["dpo.beta"] == 0.05
