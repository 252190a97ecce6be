"""One parser for all commands: both spellings of every flag, and the nearest of an unknown one."""

from __future__ import annotations

import re

import pytest

from fastpo.cli.commands import COMMANDS, Flag
from fastpo.cli.parser import TrainWords, parse, parse_train, parser_of
from fastpo.scoring.rules import RULES

PARSED = [name for name in COMMANDS if name != "train"]


SCORE = ["score", "--model", "m", "--dataset", "d"]
SAMPLE = ["sample", "--model", "m", "--prompts", "p"]


def flags_of(name: str, action: str | None = None) -> list[Flag]:
    """The flags of a command, or of one action of it."""
    groups = COMMANDS[name].groups()
    flags = [flag for group in groups.values() for flag in group]
    actions = {each for flag in flags if flag.name == "action" for each in flag.choices or ()}
    others = actions - {action} if action else set()
    return [flag for title, group in groups.items() if title not in others for flag in group]


def actions_of(name: str) -> list[str | None]:
    return [each for flag in flags_of(name) if flag.name == "action" for each in flag.choices or ()]


def words_of(flag: Flag, dash: str, action: str | None) -> list[str]:
    """A flag with a value that it takes."""
    value = flag.choices[-1] if flag.choices else {int: "5", float: "0.25"}.get(flag.kind, "x")
    if flag.place:
        return [action or value] if flag.name == "action" else [value]
    name = "--" + flag.name.replace("_", dash)
    return [name] if flag.kind is bool else [name, value]


@pytest.mark.parametrize(
    ("name", "action"), [(name, each) for name in PARSED for each in actions_of(name) or [None]]
)
def test_underscores_and_hyphens_are_one(name: str, action: str | None) -> None:
    flags = flags_of(name, action)
    both = [
        parse([name, *(word for flag in flags for word in words_of(flag, dash, action))])
        for dash in "_-"
    ]
    assert both[0] == both[1]
    needed = [flag for flag in flags if flag.required or flag.place]
    unset = parse([name, *(word for flag in needed for word in words_of(flag, "_", action))])
    for flag in flags:
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


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["--keys"], ""),
        (["--keys", "--debug"], ""),
        (["--debug", "--keys", "lora"], "lora"),
        (["--keys=lora"], "lora"),
    ],
)
def test_keys_are_asked_for(words: list[str], keys: str) -> None:
    assert parse_train(words) == TrainWords(None, [], keys=keys)


# Numbers of each domain, and of each command that has some.
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SCORE, "--max_rows", "-1"], "--max_rows -1 must be at least 1"),
        ([*SCORE, "--ref_model", "r", "--beta", "nan"], "--beta nan must be at least 0"),
        ([*SAMPLE, "--top_p", "0"], r"--top_p 0.0 must be in \(0, 1\]"),
        ([*SAMPLE, "--seed", "-1"], r"--seed -1 must be in \[0, 4294967295\]"),
        (["data", "rso", "d", "o", "--count", "1"], "--count 1 must be at least 2"),
        (["doctor", "--tokens", "0"], "--tokens 0 must be at least 1"),
    ],
)
def test_a_number_outside_its_domain_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "show", "d", "--count", "3"], "--count is of `fastpo data rso`: drop it"),
        (["data", "curriculum", "d", "o", "--count", "3"], "--count is of `fastpo data rso`"),
        (["data", "rso", "d", "o", "--dialect=auto"], "--dialect is of `fastpo data show`"),
        (["data", "show", "d", "--overwrite"], "--overwrite does nothing without OUT: drop it"),
        (["data", "show", "d", "--trust_remote_code"], "without --model or --tokenizer"),
        ([*SCORE, "--overwrite"], "--overwrite does nothing without --out or --token_rewards"),
        ([*SCORE, "--beta", "1"], "--beta does nothing without --ref_model"),
        (["doctor", "--revision", "abc"], "--revision does nothing without --model"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(words)


def test_rules_are_those_there_are() -> None:
    """The table of commands says them once more, because it is read before anything is imported."""
    flags = [flag for group in COMMANDS["weigh"].groups().values() for flag in group]
    (rule,) = (flag for flag in flags if flag.name == "rule")
    assert rule.choices == tuple(RULES)
