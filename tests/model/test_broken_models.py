"""Damaged folders of models, tokenizers and adapters: a line with the name, and no guess."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastpo.model.load import add_lora, check_place, load_model, trained_adapter
from fastpo.model.opening import open_model, open_tokenizer
from tests.cli.conftest import make
from tests.model.tiny import family


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    model: Any = add_lora(load_model(str(folder / "model")), {"r": 2})
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "w")
    config = tmp_path / "w" / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    values["base_model_name_or_path"] = str(tmp_path / "w" / "model")
    config.write_text(json.dumps(values))
    return tmp_path / "w"


def without(key: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        held = load_file(path)
        save_file({k: v for k, v in held.items() if key not in k}, path, {"format": "pt"})

    return remove


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


# Every file of a model, emptied, torn, of another type or removed.
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("config.json", text(""), ""),
        ("config.json", text("3"), ""),
        ("config.json", text("{}"), "[Uu]nrecognized model"),
        ("config.json", text('{"model_type": "llamma"}'), "llamma"),
        ("config.json", Path.unlink, ""),
        ("model.safetensors", cut, "SafetensorError|incomplete"),
        ("model.safetensors", text("x" * 2000), ""),
        ("model.safetensors", Path.unlink, "no file named"),
        ("model.safetensors", without("layers.1"), "9 of its weights are missing, the first is"),
        ("model.safetensors", without("lm_head"), "lm_head.weight"),
        ("tokenizer.json", cut, ""),
        ("tokenizer.json", text("{}"), ""),
        ("tokenizer_config.json", text("[]"), ""),
        ("tokenizer_config.json", text('{"model_max_length": "x"}'), ""),
        ("tokenizer_config.json", cut, ""),
        ("generation_config.json", cut, ""),
        ("config.json", cut, ""),
    ],
)
def test_a_damaged_model_is_named(folder: Path, name: str, damage: Any, reason: str) -> None:
    damage(folder / "model" / name)
    of = str(folder / "model")
    file = rf"/{re.escape(name)}" if damage is cut else ""
    told = rf"cannot read .*model{file}.*: .*({reason}).*; save or"
    with pytest.raises(ValueError, match=told) as caught:
        open_tokenizer(of, None, None) if "tokenizer" in name else open_model(of)
    assert "\n" not in str(caught.value)


def test_an_attention_that_is_none(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^attn_implementation='fa2' is none of this model's"):
        load_model(str(folder / "model"), attn_implementation="fa2")


# Every file of an adapter, likewise.
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("adapter_config.json", text(""), "adapter_config.json: Expecting value"),
        ("adapter_config.json", text("[]"), "names no model"),
        ("adapter_config.json", text('{"base_model_name_or_path": null}'), "= None names no model"),
        ("adapter_config.json", text('{"base_model_name_or_path": "BASE"}'), "adapter: "),
        (
            "adapter_config.json",
            text('{"base_model_name_or_path": "BASE", "peft_type": "LOWRA"}'),
            "LOWRA",
        ),
        ("adapter_model.safetensors", cut, "SafetensorError|incomplete"),
        ("adapter_model.safetensors", Path.unlink, "adapter: "),
        ("adapter_model.safetensors", without("layers.1"), "missing adapter keys"),
    ],
)
def test_a_damaged_adapter_is_named(folder: Path, name: str, damage: Any, reason: str) -> None:
    path = folder / "adapter" / name
    damage(path)
    if path.suffix == ".json":
        path.write_text(path.read_text().replace("BASE", str(folder / "model")))
    with pytest.raises(ValueError, match=f"cannot read .*adapter.*{reason}.*again") as caught:
        open_model(str(folder / "adapter"))
    assert "\n" not in str(caught.value)


def test_a_run_with_a_damaged_recipe(folder: Path) -> None:
    (folder / "adapter" / "recipe.yaml").write_text("[")
    with pytest.raises(ValueError, match=r"cannot read .*recipe\.yaml: "):
        trained_adapter(str(folder / "adapter"))


def test_what_is_no_file_is_not_waited_for(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    os.mkfifo(folder / "model" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no file"):
        check_place(str(folder / "model"))


# Names that can only be a path, and names that are none.
@pytest.mark.parametrize("name", ["", "  ", "a\0b", "/dev/nowhere", "~/nowhere", "a/b/c"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"names no model|no folder"):
        check_place(name)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = family("qwen2")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(str(tmp_path), dtype="float32") is not None
