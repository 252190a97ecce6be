"""What runs where only some packages are installed, and the line that a missing one gets."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.cli.doctor import _extras
from fastpo.optional import OLDEST_TRANSFORMERS, PackageError, require, require_transformers
from tests.oldest import requirements

ROOT = Path(__file__).resolve().parent.parent

# Paths are searched as ever, except that these are not found there.
ABSENT = """
import sys
from importlib.machinery import PathFinder

NAMES = {"datasets", "dill", "multiprocess", "bitsandbytes", "gguf", "trl", "liger_kernel",
         "cut_cross_entropy", "wandb"}

class Poorer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in NAMES else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Poorer
sys.path.insert(0, ".")  # the root's own kernels/ would hide the package of that name
"""

IMPORTS = """
import importlib, pkgutil
import bench, fastpo

for package in (fastpo, bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""

LINES = """
from fastpo.cli import main
from fastpo.model.load import load_tokenizer
from fastpo.optional import PackageError

for call in (
    lambda: fastpo.data.rows.load_rows([{"prompt": "a"}]),
    lambda: load_tokenizer("somewhere", gguf_file="q4.gguf"),
    lambda: fastpo.model.load.load_model(
        "smollm2-135m", random_init=True, quantization="nf4", dtype="float32", device="cpu"
    ),
    lambda: fastpo.train.metrics.refuse_missing_trackers(["wandb"]),
):
    try:
        call()
    except PackageError as error:
        print(error)
print(main(["data", "rso", "rows.jsonl", "out.jsonl"]))
"""

TRAINING = """
import tempfile
from bench.step import make_group, _TINY, fastpo_step
import torch

key = {"model": _TINY, "dtype": "float32", "prompt": 9, "response": 4, "candidates": 2}
step = fastpo_step(key, torch.device("cpu"))
step()
print("stepped", "datasets" in sys.modules)
"""


def run(*code: str) -> tuple[str, str]:
    """(standard output, standard error) of a process that lacks the packages."""
    command = [sys.executable, "-c", ABSENT + "".join(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_everything_imports_and_a_missing_package_gets_one_line() -> None:
    pytest.importorskip("matplotlib")
    out, err = run(IMPORTS, LINES)
    rows, gguf, nf4, tracker, status = out.splitlines()
    assert rows == "reading rows needs datasets (No module named 'datasets'): pip install datasets"
    assert gguf.startswith("gguf_file='q4.gguf' needs gguf (")
    assert gguf.endswith("): pip install gguf")
    assert nf4.startswith("quantization='nf4' needs bitsandbytes (")
    assert nf4.endswith("): pip install bitsandbytes")
    assert tracker == "report_to='wandb' needs wandb (not installed): pip install wandb"
    assert status == "2"
    assert f"fastpo: {rows}\n" == err[err.index("fastpo: ") :]


def test_groups_are_trained_on_without_the_library_that_reads_rows() -> None:
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    assert run(TRAINING)[0].splitlines()[-1] == "stepped False"


def test_a_package_without_its_own_needs_is_missing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PackageError, match=r"a test needs half-there .*nowhere_to_be_found"):
        require("half_there", "a test", "half-there")
    assert require("json", "a test").loads("1") == 1


@pytest.mark.parametrize(("found", "enough"), [("5.17.0", False), ("5.23.0", True), ("6.0", True)])
def test_training_needs_a_new_transformers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: str,
    enough: bool,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    if enough:
        require_transformers("fastpo.train")
        return
    with pytest.raises(PackageError) as refused:
        require_transformers("fastpo.train")
    line = 'needs transformers>=5.23, 5.17.0 is installed: pip install "transformers>=5.23"'
    assert str(refused.value) == f"fastpo.train {line}"
    _extras()
    assert f"  train        train {line}\n" in capsys.readouterr().out


def test_packaging_asks_for_what_training_does() -> None:
    assert requirements()["transformers"] == OLDEST_TRANSFORMERS


def test_head_starts_without_the_compiler() -> None:
    """It takes a second to import, as long as PyTorch itself."""
    code = "import sys, fastpo; fastpo.PreferenceLoss; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
