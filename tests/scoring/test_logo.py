"""What asks a model for LOGO's rows, and the blocks that are kept of a run that was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastpo.data.logo import Dropped
from fastpo.model.load import load_tokenizer
from fastpo.scoring.logo import Progress, chunk, read_documents, vllm_generator


def test_a_torn_block_is_written_again_and_another_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    first = Progress(path, {"seed": 1})
    block: Any = {"rows": [{"document": 0}], "dropped": [Dropped(1, "short"), Dropped(2, "short")]}
    first.add(block)
    first._file.close()
    with path.open("a") as file:
        file.write('{"rows": [{"pro')
    with pytest.raises(ValueError, match="begun with another seed: give the same"):
        Progress(path, {"seed": 2})
    again = Progress(path, {"seed": 1})
    assert [len(each["rows"]) for each in again.blocks] == [1]
    assert again.reasons() == [("short", 2)]
    again.add({"rows": [], "dropped": [Dropped(3, "long")]})
    again._file.close()
    again = Progress(path, {"seed": 1})
    assert len(again.blocks) == 2  # nothing torn is left between them
    assert again.finish(tmp_path / "out") == [{"document": 0}]
    assert json.loads((tmp_path / "out").read_text()) == {"document": 0}
    assert not path.exists()


def test_chunks_have_as_many_tokens_as_asked_for(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))  # a byte a token
    assert chunk("One two. Three fo", tokenizer, 10) == ["One two.", "Three fo"]


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    for i, text in enumerate(("one", "two")):
        (tmp_path / f"{i}.md").write_text(text)
    rows = read_documents(str(tmp_path / "*.md"), None, "train", None)
    assert rows == [{"text": "one"}, {"text": "two"}]
    assert len(read_documents(str(tmp_path / "*.md"), None, "train", 1)) == 1
    (tmp_path / "1.md").write_text(" ")
    with pytest.raises(ValueError, match=r"row 1: `text` must be a document, got ' '"):
        read_documents(str(tmp_path / "*.md"), None, "train", None)


def test_vllm_is_called_as_it_is_documented(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as token ids, a seed for each; the engine itself has not been run."""
    calls: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **engine: Any) -> None:
            calls["engine"] = {"model": model, **engine}

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list:
            calls["prompts"] = prompts
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=f"seed {p.seed}")]) for p in params
            ]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", module)
    tokenizer = load_tokenizer(str(tiny / "model"))
    generate = vllm_generator("name", tokenizer, max_new_tokens=5, temperature=0.7, dtype="auto")
    assert generate(["a b", "c"], 7) == ["seed 7", "seed 8"]
    assert calls["engine"] == {"model": "name", "dtype": "auto"}
    assert calls["prompts"] == [
        {"prompt_token_ids": tokenizer(t)["input_ids"]} for t in ("a b", "c")
    ]
