"""`fastpo prepare logo`: files in, rows out, and on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpo.cli import main
from fastpo.scoring import logo
from fastpo.scoring.logo import Progress
from tests.cli.test_cli import lines, run

FACTS = [
    ["The rare owl lives in Arden.", "The rare bee sings in Arden."],
    ["The tall fox jumps in Essex.", "The tall elk walks in Essex."],
]


def document(i: int) -> dict[str, str]:
    """Eight paragraphs of about 30 bytes, two of them with what is asked for."""
    parts = [f"Paragraph {n} of text {i} is dull." for n in range(6)]
    parts[1:1], parts[4:4] = [FACTS[i % 2][0]], [FACTS[i % 2][1]]
    question = ("Which rare ones are in Arden?", "Which tall ones are in Essex?")[i % 2]
    return {"text": "\n\n".join(parts), "question": question, "answer": f"Two of them, {i}."}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(document(i)) + "\n" for i in range(5)))
    return path


def words(tiny: Path, documents: Path, out: Path, **more: Any) -> list[str]:
    flags = {
        "model": tiny / "model",
        "chunk-tokens": 36,
        "context-chunks": 4,
        "critical-chunks": 2,
        "max-new-tokens": 4,
        "batch-size": 4,
        **more,
    }
    given = [str(w) for k, v in flags.items() for w in (f"--{k}", v)]
    return ["prepare", "logo", str(documents), str(out), *given]


class Killed(BaseException):
    """Stand for SIGKILL: nothing of the command handles it."""


def die_after_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the second block by half and die."""
    add = Progress.add

    def add_or_die(self: Progress, block: Any) -> None:
        if not self.blocks:
            return add(self, block)
        with self.path.open("a") as file:
            file.write('{"rows": [{"prompt": "tor')
        self._file.close()  # as the system closes it, and with it the lock
        raise Killed

    monkeypatch.setattr(Progress, "add", add_or_die)


def test_killed_run_writes_the_same_rows(
    capsys: Any, tiny: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    monkeypatch.setattr(logo, "BLOCK", 2)
    with monkeypatch.context() as patched:
        die_after_one(patched)
        with pytest.raises(Killed):
            main(words(tiny, documents, out))
    assert not out.exists()
    assert not (tmp_path / "out.jsonl.partial").read_text().endswith("\n")

    status, _, err = run(capsys, *words(tiny, documents, out, seed=1))
    assert status == 2
    assert "out.jsonl.partial was begun with another seed" in err

    asked: list[int] = []
    made = logo.logo_rows
    monkeypatch.setattr(
        logo, "logo_rows", lambda *a, **k: (asked.append(k["first"]), made(*a, **k))[1]
    )
    status, _, err = run(capsys, *words(tiny, documents, out))
    assert status == 0, err
    assert asked == [2, 4]
    assert not out.with_name("out.jsonl.partial").exists()
    assert run(capsys, *words(tiny, documents, whole))[0] == 0
    assert whole.read_bytes() == out.read_bytes()
    assert [row["document"] for row in lines(out)] == [0, 1, 2, 3, 4]
    assert "5 rows of 5" in err

    status, _, err = run(capsys, *words(tiny, documents, out))
    assert status == 2
    assert "is there already" in err

    train = ["train", "--model", tiny / "model", "--dataset", out, "--objective", "logo"]
    train += ["--position_synthesis.length", 600, "--max_steps", 1, "--num_samples", 0]
    train += ["--use_cpu", "true", "--output_dir", tmp_path / "run", "--logging_steps", 1]
    status, said, err = run(capsys, *train)
    assert status == 0, err
    assert "spread over 600 positions" in said
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert facts["context"] < facts["synthetic_context"] == 600


def test_text_files_are_documents_and_a_random_model_asks_nothing(
    capsys: Any, tiny: Path, tmp_path: Path
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(document(i)["text"])
    status, _, err = run(capsys, *words(tiny, tmp_path / "*.txt", tmp_path / "out", questions=2))
    assert status == 2
    assert "no document gave a row: 4 x no question and answer in the form" in err
    assert (tmp_path / "out.partial").exists()


# One row each: a count, the draw, the options of rows, what an engine does not read, an engine
# that is not installed.
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"questions": 0}, "--questions 0 must be at least 1"),
        ({"temperature": -1}, "--temperature -1.0 must be at least 0"),
        ({"critical-chunks": 4}, "context_chunks=4 must be more than critical_chunks=4"),
        ({"generator": "vllm", "gguf_file": "x"}, "--gguf_file is read by --generator transf"),
        ({"generator": "vllm"}, "--generator vllm: no module vllm; pip install vllm"),
    ],
)
def test_wrong_flags(
    capsys: Any, tiny: Path, documents: Path, tmp_path: Path, more: dict, message: str
) -> None:
    status, _, err = run(capsys, *words(tiny, documents, tmp_path / "out.jsonl", **more))
    assert status == 2
    assert message in err


def test_documents_without_text(capsys: Any, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n{"text": " "}\n')
    status, _, err = run(capsys, *words(tiny, path, tmp_path / "out.jsonl"))
    assert status == 2
    assert "documents.jsonl, row 1: `text` must be a document, got ' '" in err
