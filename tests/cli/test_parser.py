"""One parser for all commands: both spellings of every flag, and the nearest of an unknown one."""

from __future__ import annotations

import re

import pytest

from fastpo.cli.commands import COMMANDS, Flag
from fastpo.cli.parser import parse, parse_train, parser_of

PARSED = [name for name in COMMANDS if name != "train"]


def flags_of(name: str) -> list[Flag]:
    return [flag for group in COMMANDS[name].groups().values() for flag in group]


def words_of(flag: Flag, dash: str) -> list[str]:
    """A flag with a value that it takes."""
    value = flag.choices[-1] if flag.choices else {int: "5", float: "0.25"}.get(flag.kind, "x")
    if flag.place:
        return [value]
    name = "--" + flag.name.replace("_", dash)
    return [name] if flag.kind is bool else [name, value]


@pytest.mark.parametrize("name", PARSED)
def test_underscores_and_hyphens_are_one(name: str) -> None:
    both = [
        parse([name, *(word for flag in flags_of(name) for word in words_of(flag, dash))])
        for dash in "_-"
    ]
    assert both[0] == both[1]
    needed = [flag for flag in flags_of(name) if flag.required or flag.place]
    unset = parse([name, *(word for flag in needed for word in words_of(flag, "_"))])
    for flag in flags_of(name):
        attribute = flag.into or flag.name
        if flag not in needed:
            assert getattr(both[0], attribute) != getattr(unset, attribute), flag.name


@pytest.mark.parametrize("name", PARSED)
def test_an_unknown_flag_gets_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in flags_of(name):
        if not flag.place and len(flag.name) > 2:
            with pytest.raises(SystemExit):
                parse([name, f"--{flag.name}x"])
            line = capsys.readouterr().err
            assert f"unknown flag --{flag.name}x, did you mean --{flag.name}?" in line
            assert line.count("\n") == 1


@pytest.mark.parametrize("name", PARSED)
def test_help_shows_underscores_and_defaults(name: str) -> None:
    shown = parser_of(COMMANDS[name]).format_help()
    assert not re.findall(r"--[a-z]+-[a-z]", shown)
    for flag in flags_of(name):
        assert flag.name in shown
        if flag.kind is not bool and flag.default not in (None, ""):
            assert f"({flag.default})" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("words", "recipe", "flags", "overwrite"),
    [
        (["r.yaml", "--beta", "0.1"], "r.yaml", ["--beta", "0.1"], False),
        (["--lora", "r.yml", "--overwrite"], "r.yml", ["--lora"], True),
        (["--overwrite", "no", "--debug", "x"], None, ["--overwrite", "no", "--debug", "x"], False),
        (["--debug", "--overwrite"], None, [], True),
    ],
)
def test_words_of_train(
    words: list[str], recipe: str | None, flags: list[str], overwrite: bool
) -> None:
    split = parse_train(words)
    assert (split.recipe, split.flags, split.overwrite) == (recipe, flags, overwrite)
    assert split.keys is None
    assert parse_train([*words, "--keys", "eval"]).keys == "eval"
    assert parse_train(["--keys"]).keys == ""
