"""Tests that need TRITON_INTERPRET=1, run by a process that has it; their outcomes come back.

Triton reads the variable once, when a kernel is defined, so one process either compiles kernels or
interprets them. `Child` starts `python -m tests.kernels.interpreted.child NODEID...`, which writes
one JSON line when a test starts and one per phase that ends; what pytest prints goes to a log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Child:
    """The process, and the outcomes it has reported so far."""

    def __init__(self, nodeids: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives until close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *nodeids],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._started: set[str] = set()
        self._failures: dict[str, list[str]] = {}
        self._skips: dict[str, str] = {}
        self._finished: set[str] = set()

    def replay(self, nodeid: str) -> None:
        """Wait for the test's end, then pass, fail or skip here as it did there."""
        assert self._process.stdout is not None
        while nodeid not in self._finished:
            line = self._process.stdout.readline()
            if not line:
                pytest.fail(self._death(nodeid), pytrace=False)
            self._note(**json.loads(line))
        if nodeid in self._failures:
            pytest.fail("\n".join(self._failures[nodeid]), pytrace=False)
        if nodeid in self._skips:
            pytest.skip(self._skips[nodeid])

    def _note(self, nodeid: str, when: str, outcome: str = "", text: str = "") -> None:
        if when == "start":
            self._started.add(nodeid)
        if outcome == "failed":
            self._failures.setdefault(nodeid, []).append(text)
        if outcome == "skipped":
            self._skips[nodeid] = text
        if when == "teardown":
            self._finished.add(nodeid)

    def _death(self, nodeid: str) -> str:
        code = self._process.wait()
        self._log.seek(0)
        where = "during" if nodeid in self._started else "before"
        return f"the interpreting process ended with {code} {where} this test\n{self._log.read()}"

    def close(self) -> None:
        """End the process, also one that is still at work."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


class _Reporter:
    """The child's side: a pytest plugin that writes the lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _write(self, **line: str) -> None:
        print(json.dumps(line), file=self._stream, flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid=nodeid, when="start")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
        self._write(nodeid=report.nodeid, when=report.when, outcome=report.outcome, text=text)


if __name__ == "__main__":
    # Lines leave by what was stdout; anything a test or pytest prints joins stderr.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = ["-q", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[_Reporter(lines)]))
