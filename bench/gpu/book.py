"""What the parts of `bench.gpu` share: the book they write, and how a part is run.

A part writes every case as soon as it has it, then the lines that sum it up. It ends with a status
other than 0 if anything was wrong. What an earlier run finished is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import environment

BOOK = "gpu.json"


class Book:
    """Hold gpu.json: how every part ended, and the results that have no file of their own.

    Only one process writes at a time: the runner before and after a part, the part in between.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / BOOK
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """Return the whole file; an empty book where there is none.

        Raises:
            ValueError: the file is not such a book.
        """
        if not self.path.exists():
            return {"parts": {}}
        try:
            data = json.loads(self.path.read_text())
            if isinstance(data["parts"], dict):
                return data
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"{self.path} is torn, or no book of bench.gpu: remove it")

    def part(self, name: str) -> dict[str, Any]:
        """Return what is known of a part."""
        return self.read()["parts"].get(name, {})

    def put(self, name: str, **facts: Any) -> None:
        """Add facts to a part."""
        with self._change() as data:
            data["parts"].setdefault(name, {}).update(facts)

    def add(self, name: str, case: str, **result: Any) -> None:
        """Add the result of one case to a part."""
        with self._change() as data:
            data["parts"].setdefault(name, {}).setdefault("results", {})[case] = result

    def open(self, device: torch.device, forget: Sequence[str] = ()) -> None:
        """Stamp the environment and drop the parts named in `forget`.

        Raises:
            ValueError: the file holds results of another environment.
        """
        with self._change() as data:
            for name in forget:
                data["parts"].pop(name, None)
            here = environment(device)
            # One without a result belongs to nobody.
            if data["parts"] and data.get("environment") != here:
                raise ValueError(
                    f"{BOOK} holds results of another environment: pass --fresh with "
                    f"{', '.join(data['parts'])}, or another --out"
                )
            data["environment"] = here

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        """Yield the content, to be changed; a torn file is never left behind."""
        with self._lock:
            data = self.read()
            yield data
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.with_suffix(".part")
            torn.write_text(json.dumps(data, indent=1) + "\n")
            torn.replace(self.path)


class Options(NamedTuple):
    """Hold what the runner passes on."""

    out: Path
    device: torch.device
    seconds: float

    @property
    def toy(self) -> bool:
        """Say whether this is a CPU, which runs every part on shapes that test the part alone."""
        return self.device.type == "cpu"


def tidy(device: torch.device) -> None:
    """Leave nothing of one case to the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def each(cases: Iterable[Any], run: Callable[[Any], None], device: torch.device) -> int:
    """Run every case, whatever becomes of the others; return how many failed."""
    failed = 0
    for case in cases:
        try:
            run(case)
        except Exception:  # the next case may fit, or compile
            traceback.print_exc()
            failed += 1
        tidy(device)
    return failed


def find_packed_kernels() -> None:
    """Give kernels the keys that they had when `--pack` compiled them."""
    from bench.ahead import hash_in_order

    hash_in_order()


def run_part(
    parts: Mapping[str, Callable[[Book, Options], int]], arguments: Sequence[str] | None = None
) -> int:
    """Run a part from the command line of its module; return 1 if anything in it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="until it is ended")
    given = parser.parse_args(arguments)
    options = Options(given.out, torch.device(given.device), given.seconds)
    if options.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trainer takes a GPU where it sees one
    else:
        find_packed_kernels()
    return 1 if parts[given.part](Book(given.out), options) else 0
