"""What a command imports, and what it says and returns where something is wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fastpo import __version__
from fastpo.cli import EXTRAS, main

DOCTOR = ["doctor", "--model", "m"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "banned"),
    [
        (["--help"], ["torch", "transformers", "triton"]),
        (["--version"], ["torch", "transformers", "triton"]),
        (["train", "--help"], ["torch", "transformers", "triton"]),
        (["objectives"], ["torch", "torch._C", "transformers", "triton"]),
        (["objectives", "dpo"], ["torch", "torch._C", "transformers", "triton"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_what_is_not_imported(words: list[str], banned: list[str]) -> None:
    code = (
        "import sys; from fastpo.cli import main; status = main(sys.argv[1:]);"
        f"loaded = [m for m in {banned} if m in sys.modules];"
        "sys.exit(f'imported {loaded}' if loaded else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fastpo" in done.stdout or "objective: dpo" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"fastpo {__version__}\n")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["score", "--modle", "m"], "did you mean --model?"),
        (["score", "--model", "m"], "--dataset"),
        (["objectives", "dppo"], "did you mean 'dpo', "),
        (["doctor", "--tokens", "0"], "--tokens 0"),
        ([*DOCTOR, "--workspace-mib", "0"], "positive and finite, or 'auto': got 0"),
        ([*DOCTOR, "--workspace-mib", "inf"], "positive and finite, or 'auto': got inf"),
        ([*DOCTOR, "--workspace-mib", "1G"], "positive and finite, or 'auto': got '1G'"),
        (["doctor", "--model", "/nowhere/at/all"], "no folder '/nowhere/at/all'"),
        (["report", "/nowhere/at/all"], "not a folder"),
        (["train", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["train", "--overwrite", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["train", "--lora", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["train", "--model", "m", "--dataset", "d", "--bta", "1"], "Did you mean 'beta'?"),
        (["sample", "--model", "m", "--prompts", "p", "--num-samples", "0"], "samples 0 must be"),
        (["train", "--keys", "zzzz"], "no key has 'zzzz' in its name."),
        (["train", "--keys", "lora", "extra", "words"], "keys and stops: drop extra words"),
        (["train", "r.yaml", "--keys", "lora"], "keys and stops: drop r.yaml"),
        (["objectives", "dpo", "--markdown"], "--markdown prints the whole table: drop it, or"),
        (["objectives", "--json", "--markdown"], "--markdown prints the whole table: drop it, or"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_usage_errors_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    status, out, err = run(capsys, *words)
    assert status == 2
    assert part in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


def test_debug_raises(recipe: Path) -> None:
    with pytest.raises(ValueError, match="unknown objective"):
        main(["train", str(recipe), "--objective", "dppo", "--debug"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module named 'nowhere'", name="nowhere"), "pip install nowhere"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "pip install -U 'fastpo[train]'",
        ),
        (ImportError("GaLore needs `galore_torch`\nInstall it"), "GaLore needs `galore_torch`"),
        (PackageNotFoundError("deepspeed>=0.9"), "deepspeed>=0.9"),
        (ModuleNotFoundError("No module named 'fastpo.x'", name="fastpo.x"), None),
        (ImportError("cannot import name 'x' from 'fastpo.y'", name="fastpo.y"), None),
    ],
    ids=str,
)
def test_a_missing_package_is_one_line_and_a_fault_of_ours_is_not(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: ImportError,
    told: str | None,
) -> None:
    def fails(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("fastpo.cli._run", fails)
    if told is None:
        with pytest.raises(ImportError):
            main(["train"])
        return
    status, _, err = run(capsys, "train")
    assert (status, err.count("\n")) == (2, 1)
    assert told in err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 2
    assert "score" in out


def test_every_extra_for_users_is_known() -> None:
    tree = ast.parse((Path(__file__).parents[2] / "setup.py").read_text())
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    (extras,) = (node.value for node in keywords if node.arg == "extras_require")
    assert isinstance(extras, ast.Dict)
    names = [ast.literal_eval(key) for key in extras.keys if key is not None]
    assert {*names} == {*EXTRAS, "bench", "dev"}
