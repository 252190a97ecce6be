"""Read a command line: one table of flags, `-` and `_` alike, the nearest name for an unknown one.

Flags of `fastpo train` are keys of recipes, which `fastpo.recipe.reading.read_flags` reads; what is
its own (`--overwrite`, `--debug`, `--keys`) and the recipe's path are told apart here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from fastpo.cli.commands import COMMANDS, DEBUG, Command, Flag
from fastpo.errors import did_you_mean, nearest

USAGE_ERROR = 2
INTERRUPTED = 130

TRAIN_HELP = """\
usage: fastpo train [RECIPE.yaml] [--key value ...] [--overwrite] [--keys [WORD]] [--debug]

Train a model on preferences. The recipe is a flat YAML mapping; flags win over it.

  fastpo train recipe.yaml
  fastpo train recipe.yaml --learning_rate 5e-7 --beta 0.05 --lora.r 32
  fastpo train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset prefs.jsonl --lora

needed     model, dataset
often      output_dir, objective, beta (any hyper-parameter of the objective), lora,
           max_length, learning_rate, num_train_epochs or max_steps,
           per_device_train_batch_size (in groups), eval_fraction or eval_dataset

  --keys [WORD]  list every key with its default and what it does (or those with WORD in the name,
                 in full) and stop
  --overwrite    remove what an earlier run wrote to output_dir, nothing else; without it, train
                 goes on from the newest complete checkpoint there
  --debug        show the traceback of an error

Ctrl-C or SIGTERM: the step is finished, a checkpoint is saved, and the command that goes on is
printed. A second Ctrl-C stops at once.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with status 2."""
        end = "" if message.endswith("?") else "."
        sys.stderr.write(f"{self.prog}: {message}{end} See {self.prog} --help.\n")
        raise SystemExit(USAGE_ERROR)


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32, width=100)


def _top() -> _Parser:
    top = _Parser(
        prog="fastpo",
        formatter_class=_wide,
        description="Preference training of language models.",
        epilog="fastpo COMMAND --help explains a command.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        commands.add_parser(command.name, help=command.line)
    return top


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    shown = flag.default is not None and flag.kind is not bool and flag.default != ""
    text = f"{flag.help} ({flag.default})" if shown else flag.help
    options: dict[str, object] = {"help": text.strip().replace("%", "%%") or None}
    if flag.place:
        optional = flag.default == ""
        group.add_argument(
            flag.name, nargs="?" if optional else None, choices=flag.choices, help=text or None
        )
        return
    if flag.kind is bool:
        default = False if flag.into is None else flag.default
        options |= {"action": "store_const", "const": flag.sets, "default": default}
    else:
        options |= {"type": flag.kind, "default": flag.default, "choices": flag.choices}
        options |= {"required": flag.required, "metavar": flag.metavar}
        if flag.alone is not None:
            options |= {"nargs": "?", "const": flag.alone}
    if flag.into is not None:
        options["dest"] = flag.into
    group.add_argument(f"--{flag.name}", **options)  # pyright: ignore[reportArgumentType]


def parser_of(command: Command) -> argparse.ArgumentParser:
    """Return the parser of a command, with the groups of its flags."""
    groups = command.groups()
    flags = [flag for group in groups.values() for flag in group]
    needed = [f"--{f.name} {f.metavar or f.name.upper()}" for f in flags if f.required]
    words = [f"[{f.name}]" if f.default == "" else f.name for f in flags if f.place]
    parser = _Parser(
        prog=f"fastpo {command.name}",
        usage=" ".join([f"fastpo {command.name}", *words, *needed, "[--flag value ...]"]),
        description=command.description,
        formatter_class=_wide,
        allow_abbrev=False,
    )
    for title, group in groups.items():
        added = parser.add_argument_group(title)
        for flag in group:
            _add(added, flag)
    _add(parser.add_argument_group("errors"), DEBUG)
    return parser


def plain_flag(word: str) -> str:
    """Return a word as it is shown: a flag with underscores.

    >>> plain_flag("--max-length=3-4")
    '--max_length=3-4'
    """
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word[:2] == "--" else word


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a command as attributes, and `command`.

    Raises:
        SystemExit: help or the version was asked for, or something is wrong, which is said in one
            line on standard error.
        ValueError: a number outside its domain, or a flag that would do nothing.
    """
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        hint = nearest(words[0], COMMANDS) or f" Choose from {', '.join(COMMANDS)}."
        sys.stderr.write(f"fastpo: unknown command {words[0]!r}.{hint}\n")
        raise SystemExit(USAGE_ERROR)
    command = COMMANDS.get(words[0]) if words else None
    parser = _top() if command is None else parser_of(command)
    known = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag = plain_flag(word).partition("=")[0]
        if flag.startswith("--") and flag not in known:
            question = did_you_mean(flag, known).replace("'", "")
            shown = word.partition("=")[0]
            parser.error(f"unknown flag {shown}{', ' if question else ''}{question}")
    if command is not None:
        arguments = parser.parse_args([plain_flag(word) for word in words[1:]])
        arguments.command = command.name
        _check(command, arguments, {plain_flag(word).partition("=")[0] for word in words})
        return arguments
    if parser.parse_args(words).version:
        from fastpo import __version__

        print(f"fastpo {__version__}")
        raise SystemExit(0)
    parser.print_help()
    raise SystemExit(USAGE_ERROR)


def _check(command: Command, arguments: argparse.Namespace, words: set[str]) -> None:
    """Refuse a number outside its domain, and a flag among the words that would do nothing."""
    groups = command.groups()
    flags = {flag.name: flag for group in groups.values() for flag in group}
    actions = (flags["action"].choices or ()) if "action" in flags else ()
    for title, group in groups.items():
        for flag in group:
            name = f"--{flag.name}"
            if name not in words:
                continue
            if flag.domain:
                value = getattr(arguments, flag.into or flag.name)
                if misfit := flag.domain.misfit(value):
                    raise ValueError(f"{name} {value} {misfit}")
            if title in actions and title != arguments.action:
                raise ValueError(f"{name} is of `fastpo {command.name} {title}`: drop it")
            needs = [flags[each] for each in flag.needs if each in flags]
            if needs and not any(getattr(arguments, each.name) for each in needs):
                shown = " or ".join(n.name.upper() if n.place else f"--{n.name}" for n in needs)
                raise ValueError(f"{name} does nothing without {shown}: drop it")


@dataclass(frozen=True)
class TrainWords:
    """The words after `fastpo train`.

    Args:
        recipe: path of the recipe, if there is one.
        flags: the recipe's flags.
        overwrite: whether an earlier run is removed.
        keys: the word of `--keys WORD`, "" without one; None: no keys are asked for.
    """

    recipe: str | None
    flags: list[str]
    overwrite: bool = False
    keys: str | None = None


def parse_train(words: Sequence[str]) -> TrainWords:
    """Tell the recipe, its flags and the flags of `fastpo train` itself apart.

    Raises:
        ValueError: further words beside `--keys`.
    """
    if any(word.partition("=")[0] == "--keys" for word in words):
        return TrainWords(None, [], keys=_word_of_keys(words))
    flags = list(words)
    recipes = [w for w in flags if w.endswith((".yaml", ".yml")) and not w.startswith("--")]
    path = flags[0] if flags and not flags[0].startswith("--") else next(iter(recipes), None)
    if path is not None:
        flags.remove(path)
    # `debug` is also a key of the Trainer's: with a value it is the key, bare it is the command's.
    bare = {
        word
        for i, word in enumerate(flags)
        if word in ("--overwrite", "--debug")
        and (i + 1 == len(flags) or flags[i + 1].startswith("--"))
    }
    return TrainWords(path, [w for w in flags if w not in bare], "--overwrite" in bare)


def _word_of_keys(words: Sequence[str]) -> str:
    """Return the word of `--keys WORD` or `--keys=WORD`, "" without one."""
    parts: list[str] = []
    for word in words:
        if word != "--debug":
            parts += word.split("=", 1) if word.startswith("--keys=") else [word]
    at = parts.index("--keys")
    if further := parts[:at] + parts[at + 2 :]:
        raise ValueError(f"--keys [WORD] lists keys and stops: drop {' '.join(further)}")
    return "".join(parts[at + 1 :])
