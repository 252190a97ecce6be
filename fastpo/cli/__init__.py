"""The command line: `fastpo train | plan | score | sample | prepare | data | weigh | ...`.

This file dispatches; nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType

from fastpo.cli.commands import COMMANDS
from fastpo.cli.parser import INTERRUPTED, TRAIN_HELP, USAGE_ERROR, parse
from fastpo.optional import PackageError
from fastpo.redact import learn, redact

EXTRAS = {
    "train": (
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "pydantic",
        "safetensors",
        "yaml",
        "jinja2",
        "gguf",
        "sentencepiece",
    ),
    "quant": ("bitsandbytes",),
    "torchao": ("torchao",),
    "flash": ("flash_attn",),
}
"""Modules of each extra."""


def _extra_of(message: str) -> str | None:
    """The extra whose package a failed import is about; None where a fault of ours broke it."""
    for extra, modules in EXTRAS.items():
        if set(modules) & set(re.findall(r"\w+", message)):
            return extra
    return None


def _of_a_package(error: ImportError) -> bool:
    """Return whether a package is at fault, and not an import of this project."""
    if error.name is None:  # raised by hand: the import system gives a name
        return True
    return isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] != "fastpo"


def _run(words: Sequence[str]) -> int:
    if words and words[0] == "train":
        if {"-h", "--help"} & set(words):
            print(TRAIN_HELP, end="")
            return 0
        from fastpo.cli.train import train

        return train(words[1:])
    arguments = parse(words)
    command = COMMANDS[arguments.command]
    module, _, function = command.run.partition(":")
    # `module:function` imports a file of the user's, which may compute with torch.
    light = command.light and not any(":" in word for word in words)
    with _no_torch() if light else nullcontext():
        return getattr(importlib.import_module(module), function)(arguments)


@contextmanager
def _no_torch() -> Iterator[None]:
    """Stand in for torch while the catalogue is printed, unless it is loaded anyway.

    Its modules define functions that nobody calls here; importing torch takes two seconds. What was
    imported meanwhile is forgotten.
    """
    if "torch" in sys.modules:
        yield
        return
    from unittest.mock import MagicMock

    before = set(sys.modules)
    stood_for = dict.fromkeys(("torch", "torch.nn", "torch.nn.functional"), MagicMock())
    sys.modules |= stood_for
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name in stood_for or name.startswith("fastpo."):
                del sys.modules[name]


def _show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what Python prints of an error that nobody catches, without secrets."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the console entry point.

    Args:
        argv: the words after `fastpo`; by default those of this process.

    Returns:
        0: done. 1: `doctor` found a broken installation. 2: a wrong flag, value, file or row,
        told in a line on standard error, like a failed self-check, a loss that is not finite and
        an extra that is not installed; `--debug` shows the traceback instead. 130: interrupted.
    """
    if argv is None:  # this process is the command's
        sys.excepthook = _show_traceback
    words = list(sys.argv[1:] if argv is None else argv)
    learn(words)
    try:
        return _run(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\nfastpo: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # `fastpo objectives | head`
        sys.stderr.close()
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # transformers explains a missing model or package in a paragraph; its first line says it.
        text = str(error) if isinstance(error, ValueError) else str(error).strip().split("\n")[0]
        if isinstance(error, ImportError) and not isinstance(error, PackageError):
            if (extra := _extra_of(text)) is not None:
                text = f"{text}: pip install -U 'fastpo[{extra}]'"
            elif not _of_a_package(error):
                raise
            elif text.startswith("No module named"):
                text = f"{text}: pip install {str(error.name).partition('.')[0]}"
        if "--debug" in words:
            raise
        for line in redact(text or type(error).__name__).splitlines():
            sys.stderr.write(f"fastpo: {line}\n")
        return USAGE_ERROR
