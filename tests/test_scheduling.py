"""How the tests are shared out over several processes (`-n 6`)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.test_package import ROOT

pytest.importorskip("xdist")

from xdist.remote import Producer

WORKERS = 6


@pytest.fixture(scope="module")
def gpu_tests() -> list[str]:
    """What `pytest -m gpu` collects of the kernels and of attention."""
    where = ("tests/kernels", "tests/model/attention/test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run(
        [*command, "-m", "gpu", *where], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


class Worker:
    """A process that notes what it is sent."""

    shutting_down = False

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.gateway = SimpleNamespace(id="gw")

    def send_runtest_some(self, indices: list[int]) -> None:
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def shares(tests: list[str]) -> list[list[str]]:
    """Each worker's tests, if every test takes as long as any other."""
    option = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(option=option, getvalue={"tx": [f"{WORKERS}*popen"]}.get)
    scheduler = conftest.pytest_xdist_make_scheduler(config, Producer("test", enabled=False))
    workers = {Worker(): [] for _ in range(WORKERS)}
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    while any(worker.waiting for worker in workers):
        for worker, done in workers.items():
            if worker.waiting:
                index = worker.waiting.pop(0)
                done.append(tests[index])
                scheduler.mark_test_complete(worker, index)
    assert sorted(test for share in workers.values() for test in share) == sorted(tests)
    return list(workers.values())


def test_gpu_tests_are_spread_over_the_processes(gpu_tests):
    assert len(gpu_tests) > 300
    found = [len(share) for share in shares(gpu_tests)]
    assert max(found) - min(found) <= 2, found


def test_no_long_file_of_gpu_tests_is_left_whole(gpu_tests):
    counts = Counter(test.partition("::")[0] for test in gpu_tests)
    whole = {file: n for file, n in counts.items() if file not in conftest.SCATTERED}
    assert all(n <= 10 for n in whole.values()), whole


def test_other_files_and_the_interpreter_stay_in_one_process():
    tests = [f"tests/head/test_{file}.py::test[{i}]" for file in "abcdefgh" for i in range(9)]
    tests += [
        f"{conftest.INTERPRETED}/test_{file}.py::test[{i}]" for file in "ab" for i in range(9)
    ]
    homes: dict[str, set[int]] = {}
    for worker, share in enumerate(shares(tests)):
        for test in share:
            file = test.partition("::")[0]
            scope = conftest.INTERPRETED if file.startswith(conftest.INTERPRETED) else file
            homes.setdefault(scope, set()).add(worker)
    assert all(len(workers) == 1 for workers in homes.values()), homes
