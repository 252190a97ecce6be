"""The package as a whole: light imports, no shadowing, docstring examples, dependency direction."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastpo

ROOT = Path(__file__).resolve().parent.parent

BLOCKED = """
import sys

for name in ("triton", "transformers", "datasets", "accelerate", "peft"):
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
import torch, fastpo
loss = fastpo.PreferenceLoss("simpo", torch.nn.Linear(4, 9))
loss(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)).loss.backward()
fastpo.dpo_loss(*torch.zeros(4, 2), beta=0.1)
print("ok")
"""


def run(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_with_neither_triton_nor_transformers():
    assert run(BLOCKED) == "ok"


def test_import_loads_nothing_heavy():
    code = (
        "import fastpo, fastpo.data.options, sys; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(code) == "False False"


def test_kernels_folder_does_not_shadow_hugging_faces_package():
    """From the root, where `python -m` puts the folder `kernels/` on sys.path first."""
    if not any(found.name == "kernels" for found in importlib.metadata.distributions()):
        pytest.skip("could not import 'kernels'")
    code = (
        "import sys; sys.path.insert(0, '.'); import transformers, kernels;"
        "from kernels import get_kernel; from fastpo.kernels import linear_stats;"
        "print('site-packages' in kernels.__file__, linear_stats.__name__)"
    )
    assert run(code) == "True fastpo.kernels.linear_stats"


def test_all_names_load():
    for name in fastpo.__all__:
        assert getattr(fastpo, name) is not None
    assert sorted(fastpo._HOME) == sorted(fastpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'dpo_los'"):
        _ = fastpo.dpo_los


def modules() -> list[str]:
    skipped = "fastpo.kernels"  # compiled by triton, not run by Python
    found = pkgutil.walk_packages(fastpo.__path__, "fastpo.")
    return [m.name for m in found if not m.name.startswith(skipped)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    import torch

    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_wheel_holds_the_kernels_and_the_templates(tmp_path):
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*argv, "-w", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    names = zipfile.ZipFile(next(tmp_path.glob("fastpo-*.whl"))).namelist()
    assert "fastpo/kernels/linear_stats.py" in names
    assert "fastpo/py.typed" in names
    beside = [path for path in (ROOT / "fastpo" / "report").iterdir() if path.is_file()]
    assert {f"fastpo/report/{path.name}" for path in beside} <= set(names)
    assert {".css", ".j2"} <= {path.suffix for path in beside}
    assert not any(n.startswith(("kernels/", "tests/", "bench/")) for n in names)
