"""Measure a card: is everything right on it, and how fast is it?

    python -m bench.gpu --smoke                 # three minutes: what breaks here
    python -m bench.gpu --measure --budget 480  # eight minutes: the numbers, by value
    python -m bench.gpu --measure --only head_a step
    python -m bench.gpu --pack .pack            # for a machine without a network
    python -m bench.gpu --list

Every part runs in a process of its own with a limit of its own. One that fails or overruns is
reported and the next one starts. Results are written after every case: a rerun does what is
missing. On a CPU the same parts run on toy shapes, which tests the command and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from bench.gpu.book import BOOK, Book
from bench.harness import RESULTS, device_slug

ROOT = Path(__file__).resolve().parents[2]
LOG = "log.txt"
TAIL_LINES = 20
TABLE_LINES = 58
LEAST_LINES = 4  # of a part, whatever those before it say
# A part of which less than half could run would end without its answer: others get the time.
LEAST = 0.5
# Toy shapes take seconds, imports on a busy machine take more.
SECONDS_ON_CPU = 120


class Part(NamedTuple):
    """Hold one question, asked in a process of its own.

    Args:
        seconds: what it is expected to take on a GPU, imports and compilation included.
        files: of the results, beside `gpu.json`.
    """

    phase: str
    name: str
    seconds: int
    question: str
    files: tuple[str, ...] = ()


PARTS = (
    Part("smoke", "env", 20, "versions; speed of copies and of the head's bare products"),
    Part("smoke", "right", 55, "kernels, losses, attention against float64; equal bits twice"),
    Part("smoke", "tests", 95, "the test suite's GPU tests", ("gpu_tests.xml",)),
    Part("smoke", "syncs", 20, "how often the host waits for the device, and where"),
    Part("measure", "tune", 50, "launch rows of the kernels that are hot", ("tune_head.json",)),
    Part("measure", "head_a", 80, "the head at 8192 x 4096 x 131072 beside peers", ("head.json",)),
    Part("measure", "head_b", 50, "the head at 2048 and 32768 tokens", ("head.json",)),
    Part("measure", "numerics", 15, "errors where the model is sure of its answer"),
    Part("measure", "losses", 25, "objectives once the scores are there", ("losses.json",)),
    Part("measure", "step", 80, "a training step of a 1B model beside TRL", ("step.json",)),
    Part("measure", "8b", 70, "a pair of 32K and 64K tokens on 8B", ("long_context.json",)),
    Part("measure", "70b", 110, "a pair of 16K tokens on 70B in 4 bits", ("long_context.json",)),
)
"""In order of value: what the budget does not reach is last."""
FILES = tuple(dict.fromkeys((BOOK, LOG, *(file for part in PARTS for file in part.files))))


class Ended(NamedTuple):
    """Say how a child ended: its exit status, None where it ran past its limit."""

    code: int | None
    seconds: float
    tail: list[str]


def run_child(command: Sequence[str], limit: float, log: Path, title: str, **env: str) -> Ended:
    """Run a command whose output goes to the log; past `limit` it ends with all that it started."""
    begin = time.monotonic()
    with log.open("ab") as sink:
        sink.write(f"\n==== {title}, limit {limit:.0f} s\n".encode())
        sink.flush()
        start = sink.tell()
        # A group of its own, so that all of it can be ended; not detached from this command's.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            preexec_fn=os.setpgrp,
        )
        code = None
        try:
            with tqdm(total=round(limit), desc=title, unit="s", leave=False, disable=None) as bar:
                while (spent := time.monotonic() - begin) < limit and code is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = child.wait(min(0.5, limit - spent))
                    bar.update(round(spent) - bar.n)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with log.open("rb") as source:
        source.seek(start)
        lines = source.read().decode(errors="replace").splitlines()
    tail = [line.rstrip() for line in lines if line.strip()][-TAIL_LINES:]
    return Ended(code, round(time.monotonic() - begin, 1), tail)


def child_of(part: Part, out: Path, device: torch.device, limit: float) -> Ended:
    """Run a part in a process of its own."""
    command = [sys.executable, "-m", f"bench.gpu.{part.phase}", part.name, "--out", str(out)]
    command += ["--device", str(device), "--seconds", f"{limit:.0f}"]
    env = {}
    if device.type == "cpu":
        # Barriers of several threads cost more than toy tensors do.
        env["OMP_NUM_THREADS"] = "1"
        # Read once, when a kernel is defined: one process compiles kernels or interprets them.
        env |= {"TRITON_INTERPRET": "1"} if part.name in ("right", "head_a") else {}
    return run_child(command, limit, out / LOG, part.name, **env)


def run(parts: Sequence[Part], out: Path, device: torch.device, budget: float) -> bool:
    """Run every part that has not finished, in order, within the budget; say whether none failed.

    A part's limit is its own seconds, scaled to the budget, and what earlier parts left over.
    """
    book = Book(out)
    done = [part for part in parts if book.part(part.name).get("status") == "ok"]
    todo = [part for part in parts if part not in done]
    for part in done:
        print(f"{part.name}: done before", flush=True)
    own = {p.name: SECONDS_ON_CPU if device.type == "cpu" else p.seconds for p in todo}
    scale = max(LEAST, budget / max(1, sum(own.values())))
    own = {name: scale * seconds for name, seconds in own.items()}
    begin = time.monotonic()
    for number, part in enumerate(todo):
        left = budget - (time.monotonic() - begin)
        later = sum(own[p.name] for p in todo[number + 1 :])
        limit = min(left, max(own[part.name], left - later))
        stamp: dict[str, Any] = {"date": date.today().isoformat(), "limit": round(limit, 1)}
        if limit < LEAST * own[part.name]:
            book.put(part.name, status="not reached", **stamp)
            print(f"{part.name}: not reached, {left:.0f} s left", flush=True)
            continue
        print(f"{part.name}: {part.question}, at most {limit:.0f} s", flush=True)
        book.put(part.name, status="interrupted", **stamp)
        ended = child_of(part, out, device, limit)
        for torn in out.glob("*.part"):
            torn.unlink()
        status = {0: "ok", None: "over its limit"}.get(ended.code, "failed")
        tail = [] if status == "ok" else ended.tail
        book.put(part.name, status=status, seconds=ended.seconds, tail=tail)
        if status != "ok":
            print("\n".join(f"  | {line}" for line in ended.tail))
        print(f"{part.name}: {status} after {ended.seconds:.1f} s", flush=True)
    bad = ("failed", "over its limit")
    return not any(book.part(part.name).get("status") in bad for part in parts)


def table(book: Book, parts: Sequence[Part]) -> str:
    """Return a line for every part and the lines in which it says what it found."""
    found = {part.name: book.part(part.name) for part in parts}
    lines = [f"{'part':9} {'status':15} {'s':>6} {'limit':>6}"]
    room = TABLE_LINES - len(lines) - len(parts)
    for number, (name, facts) in enumerate(found.items()):
        seconds, limit = facts.get("seconds", ""), facts.get("limit", "")
        lines.append(f"{name:9} {facts.get('status', 'not run'):15} {seconds:>6} {limit:>6}")
        said = [
            line
            for text in facts.get("digest", []) + facts.get("tail", [])[-1:]
            for line in textwrap.wrap(text, 110, subsequent_indent="    ")
        ]
        after = len(parts) - number - 1
        share = max(room // (after + 1), room - LEAST_LINES * after)
        if len(said) > share:
            said = [*said[: max(0, share - 1)], f"... {len(said) - share + 1} more: {BOOK}, {LOG}"]
        lines += [f"  {line}" for line in said]
        room -= len(said)
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[Part]:
    """Return the parts that the command line asks for, in order of value."""
    named = [part for part in PARTS if part.name in (options.only or [])]
    if options.smoke or options.measure:
        phases = {"smoke": options.smoke, "measure": options.measure}
        asked = [part for part in PARTS if phases[part.phase]]
        return [part for part in asked if not options.only or part in named]
    return named


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [part.name for part in PARTS]
    parser.add_argument("--smoke", action="store_true", help="what breaks on this device")
    parser.add_argument("--measure", action="store_true", help="the numbers")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="these parts")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--fresh", action="store_true", help="forget these parts and their files")
    parser.add_argument("--out", type=Path, help="folder; bench/results/DEVICE by default")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="prepare a folder for offline use")
    parser.add_argument("--no-cache", action="store_true", help="--pack: leave the kernels out")
    options = parser.parse_args(arguments)
    if not (options.smoke or options.measure or options.only or options.list or options.pack):
        parser.error("say what to do: --smoke, --measure, --only PART, --pack DIR or --list")
    if options.only and not chosen(options):
        parser.error(f"--only {' '.join(options.only)}: of the other phase; leave its flag out")
    if options.budget is not None and not 0 < options.budget < math.inf:
        parser.error(f"--budget {options.budget:g} must be a positive number of seconds")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    return options


def lock(out: Path) -> BinaryIO:
    """Open the log, held by one run at a time.

    Raises:
        ValueError: another run holds it.
    """
    held = (out / LOG).open("ab")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise ValueError(f"another run writes to {out}: pass another --out") from None
    except OSError:
        pass  # a file system without locks
    return held


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # so that `finally` ends the child


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table last; return 0 where none failed, 2 where none could start."""
    options = parse(arguments)
    if options.list:
        for part in PARTS:
            print(f"{part.phase:8} {part.name:9} {part.seconds:4} s  {part.question}")
        return 0
    if options.pack:
        from bench.gpu.pack import pack

        return pack(options.pack, ROOT, cache=not options.no_cache)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parts = chosen(options)
    # Toy results must not take the place of a CPU's own records.
    default = Path("runs/gpu-cpu") if device.type == "cpu" else RESULTS / device_slug(device)
    out = (options.out or default).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
        book = Book(out)
        book.open(device, [part.name for part in parts] if options.fresh else ())
        if options.fresh:
            for file in (file for part in parts for file in part.files):
                (out / file).unlink(missing_ok=True)
    except (OSError, ValueError) as why:
        print(f"bench.gpu: {why}", file=sys.stderr)
        return 2
    on_cpu = device.type == "cpu"
    expected = sum(SECONDS_ON_CPU if on_cpu else part.seconds for part in parts)
    signal.signal(signal.SIGTERM, _stop)
    with held:
        fine = run(parts, out, device, options.budget or expected)
    print(f"\n{table(book, parts)}")
    if on_cpu:
        print("toy shapes on a CPU: the command ran, nothing was measured")
    status = [book.part(part.name).get("status") for part in parts]
    unreached = status.count("not reached")
    print(f"{out}: {'nothing failed' if fine else 'something FAILED'}, {unreached} not reached")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
