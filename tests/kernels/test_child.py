"""The process that runs the interpreted tests hides nothing: no failure, and not its own end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.interpreted.child import Child

TESTS = """
import os, sys
import pytest

def test_right():
    assert os.environ["TRITON_INTERPRET"] == "1"

def test_wrong():
    assert 1 + 1 == 3

@pytest.fixture
def broken():
    yield
    raise OSError("no more room")

def test_torn_down_badly(broken):
    pass

def test_skipped():
    pytest.skip("no such device")

def test_gone():
    print("last words", file=sys.stderr)
    os._exit(3)

def test_never_run():
    pass
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder: Path = tmp_path_factory.mktemp("child")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_some.py").write_text(TESTS)
    child = Child([str(folder / "test_some.py")])
    yield child
    child.close()


def outcome(child: Child, name: str) -> str:
    try:
        child.replay(f"test_some.py::{name}")
    except (pytest.fail.Exception, pytest.skip.Exception) as end:
        return f"{type(end).__name__}: {end.msg}"
    return "Passed"


def test_outcomes_come_back_with_their_reasons(child):
    assert outcome(child, "test_right") == "Passed"
    wrong = outcome(child, "test_wrong")
    assert wrong.startswith("Failed")
    assert "assert (1 + 1) == 3" in wrong
    torn = outcome(child, "test_torn_down_badly")
    assert torn.startswith("Failed")
    assert "no more room" in torn
    assert outcome(child, "test_skipped") == "Skipped: no such device"


def test_end_of_the_process_is_the_failure_of_what_was_running(child):
    assert "ended with 3 during this test" in outcome(child, "test_gone")
    assert "ended with 3 before this test" in outcome(child, "test_never_run")


def test_outcomes_do_not_depend_on_the_order_of_asking(child):
    assert outcome(child, "test_right") == "Passed"
    assert outcome(child, "test_wrong").startswith("Failed")
