"""The keys of recipes, each with its help."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fastpo.data.options import DataOptions, DataSettings
from fastpo.recipe.keys import fields_of_recipe, show_keys
from fastpo.train.config import PreferenceConfig
from fastpo.train.sections import SECTIONS


@pytest.mark.parametrize("cls", [*SECTIONS, DataSettings, PreferenceConfig])
def test_every_key_of_ours_has_help(cls: type) -> None:
    theirs = {f.name for f in dataclasses.fields(PreferenceConfig.__mro__[2])}
    ours = [f for f in dataclasses.fields(cls) if f.name not in theirs]
    assert not [f.name for f in ours if not f.metadata.get("help")]


def test_options_of_data_are_the_settings_and_a_seed() -> None:
    shared = [f.name for f in dataclasses.fields(DataSettings)]
    assert [f.name for f in dataclasses.fields(DataOptions)] == [*shared, "seed"]
    assert set(shared) <= set(fields_of_recipe())
    with pytest.raises(dataclasses.FrozenInstanceError, match="'bos'"):
        DataOptions().bos = True


def test_keys_are_shown_with_type_default_and_help() -> None:
    shown = show_keys("max-length").splitlines()
    assert re.split(r"\s{2,}", shown[0]) == ["max_length", "null", "an integer at least 1 or null"]
    assert shown[1] == (
        "    most tokens of the prompt plus any one of its responses; null: no limit."
    )
    assert "max_prompt_length" in show_keys("")
    with pytest.raises(ValueError, match=r"no key has 'max_lenght' .* mean 'max_length'"):
        show_keys("max_lenght")
