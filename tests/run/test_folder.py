"""Only what this tool wrote is written over or removed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastpo.report.card import write_model_card
from fastpo.report.page import write_report
from fastpo.run import folder as folders
from fastpo.run.folder import RUN, RunFolder, claim, rotate, write_sealed, write_text
from fastpo.train.config import PreferenceConfig
from tests.train import tiny
from tests.train.child import start

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "reference": "copy"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where the trainers of `trainer` write to."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


OTHERS = [
    "README.md",
    "metrics.jsonl",
    "report.html",
    "recipe.yaml",
    "run.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "adapter_config.json",
    "samples.jsonl",
    "skipped.jsonl",
    "trainer_state.json",
    "training_args.bin",
    "chat_template.jinja",
    "consolidated.pth",
    "llama.gguf",
    "checkpoint-500/model.safetensors",
    "checkpoint-7/manifest.json",
]


# Every kind of file that a run writes, or that a reader would take for the run's model.
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_in_the_way_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": true}')
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"{name.split('/')[0]}.*not written by fastpo.*run-2"):
        claim(tmp_path / "run")
    assert content(tmp_path) == before


# The files that are read before anything is written: as facts, for their form, for their seal.
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "README.md"])
def test_a_pipe_in_the_way_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*not written by fastpo"):
        claim(tmp_path)


def test_other_files_stay_through_runs_and_their_removal(trainer: Any, run_dir: Path) -> None:
    others = {"notes.txt": b"n", "log/1.log": b"l", "plot.png": b"p", ".git/HEAD": b"h"}
    for name, text in others.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_bytes(text)
    made = trainer(**SAVED, num_samples=1, sample_tokens=2)
    made.train()
    made.save_model()
    write_report(run_dir)
    for number in (1, 2):
        (run_dir / f"checkpoint-{number}" / "best.txt").write_bytes(b"b")
    trainer(**SAVED).train(resume_from_checkpoint=str(run_dir / "checkpoint-1"))
    RunFolder.at(run_dir).forget()
    left = content(run_dir)
    assert left.pop(".fastpo.lock")
    assert left == {**others, **{f"checkpoint-{number}/best.txt": b"b" for number in (1, 2)}}


def test_run_json_is_first_and_lists_the_rest(
    trainer: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write = folders.write_text
    monkeypatch.setattr(
        folders, "write_text", lambda path, text: (order.append(path.name), write(path, text))
    )
    made = trainer(**SAVED)
    made.train()
    made.save_model()
    assert order[0] == RUN
    listed = set(json.loads((run_dir / RUN).read_text())["files"])
    names = {p.name for p in run_dir.iterdir() if p.is_file()}
    assert names - listed == {".fastpo.lock"}
    assert {"model.safetensors", "config.json", "metrics.jsonl"} <= listed


def kill_in_write(folder: str) -> None:
    write = Path.write_text

    def torn(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    Path.write_text = torn  # type: ignore[method-assign]
    claim(folder)


def test_a_kill_in_the_first_write_leaves_nothing_torn(tmp_path: Path) -> None:
    process = start(kill_in_write, str(tmp_path / "run"))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / RUN).exists()
    claim(tmp_path / "run").forget()  # neither its lock nor its torn file is in the way
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".fastpo.lock"]


def hold(folder: str, pipe: Any) -> None:
    claim(folder)
    child = os.fork()  # as a loader's process, which may outlive the run for seconds
    if child == 0:
        pipe.recv()
        os._exit(0)
    pipe.send(os.getpid())
    signal.pause()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    near, far = multiprocessing.Pipe()
    process = start(hold, str(tmp_path / "run"), far)
    holder = near.recv()
    with pytest.raises(ValueError, match=rf"is in use by process {holder} on "):
        claim(tmp_path / "run")
    os.kill(holder, signal.SIGKILL)
    process.join(60)
    claim(tmp_path / "run")
    claim(tmp_path / "run")  # the same process may, again and again
    shutil.rmtree(tmp_path / "run")
    claim(tmp_path / "run")  # also after the folder was removed
    assert (tmp_path / "run" / RUN).is_file()
    near.send("end")


def test_rotation_keeps_the_checkpoints_of_others(trainer: Any, run_dir: Path) -> None:
    trainer(**SAVED).train()
    other = run_dir / "checkpoint-0"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"mine")
    rotate(run_dir, 1, None)
    assert sorted(p.name for p in run_dir.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]
    with pytest.raises(ValueError, match="checkpoint-0, which was not written by fastpo"):
        trainer(**SAVED).train(resume_from_checkpoint=True)
    assert (other / "model.safetensors").read_bytes() == b"mine"


# Either file that an earlier version's run is known by.
@pytest.mark.parametrize("kept", [RUN, "preference_config.yaml"])
def test_runs_of_earlier_versions_are_known(trainer: Any, run_dir: Path, kept: str) -> None:
    """Without a list, or without run.json at all; cards and reports had no seal."""
    made = trainer(**SAVED)
    made.train()
    made.save_model()
    for write in (write_report, write_model_card):
        path = write(run_dir)
        text = "\n".join(path.read_text().splitlines()[:-1])
        path.write_text(text.replace('<span class="mono">', "<span class=mono>"))
    (run_dir / "recipe.yaml").write_text("# fastpo 0.1.0, torch 2.13.0\nmodel: m\n")
    if kept == RUN:
        (run_dir / RUN).write_text('{"status": "finished", "command": "fastpo train"}')
    else:
        (run_dir / RUN).unlink()
    folders._CLAIMED.clear()
    trainer(**{**SAVED, "max_steps": 3}).train(resume_from_checkpoint=True)
    assert (run_dir / "checkpoint-3").is_dir()
    write_report(run_dir)
    RunFolder.at(run_dir).forget()
    assert [p.name for p in run_dir.iterdir()] == [".fastpo.lock"]


def test_a_readme_that_names_the_tool_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Needs\n- torch\n- fastpo\n")
    (tmp_path / "recipe.yaml").write_text("# fastpo recipe of mine\nmodel: m\n")
    for name in ("README.md", "recipe.yaml"):
        with pytest.raises(ValueError, match=f"{name}.*was not written by fastpo"):
            claim(tmp_path)
        (tmp_path / name).unlink()


def test_edited_cards_are_not_written_over(trainer: Any, run_dir: Path) -> None:
    trainer(**SAVED).train()
    path = write_model_card(run_dir)
    assert write_model_card(run_dir) == path
    for text in (path.read_text() + "mine\n", path.read_text().replace("Trained", "Mine"), "mine"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"README.md was (edited|not written).*rename it"):
            write_model_card(run_dir)
        assert path.read_text() == text
    path.unlink()
    write_model_card(run_dir)


def test_lists_from_elsewhere_reach_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint-1").mkdir(parents=True)
    names = ["../precious", str(tmp_path / "precious"), "../../precious"]
    (run_dir / RUN).write_text(json.dumps({"files": [RUN, *names]}))
    (run_dir / "checkpoint-1" / "manifest.json").write_text(
        json.dumps({"files": dict.fromkeys(names, 4)})
    )
    claim(run_dir).forget()
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (run_dir / "checkpoint-1").exists()


def test_what_the_next_run_reads_is_not_removed(trainer: Any, run_dir: Path) -> None:
    made = trainer(**SAVED)
    made.train()
    made.save_model()
    before = content(run_dir)
    for name in (run_dir, run_dir / "checkpoint-1", run_dir / "samples.jsonl"):
        with pytest.raises(ValueError, match=f"would remove {name}, which this run reads"):
            RunFolder.at(run_dir).refuse_removal(["hub/name", str(name)])
    assert content(run_dir) == before


# No folder, nowhere, everybody's, one's own whole home, and where nothing can be made.
@pytest.mark.parametrize("place", ["file", "dangling", "/", "~", "/proc/nowhere"])
def test_places_that_are_no_folder_for_a_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"is no folder|not only for a run|cannot be written to"):
        claim(Path(place).expanduser() if place in "/~" else tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_published_holds_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KEY=1")
    with pytest.raises(ValueError, match=r"push_to_hub would publish .*\.env"):
        claim(tmp_path, alone=True)


# One writes before the first step, the other copies the model.
@pytest.mark.parametrize("reference", ["store", "copy"])
def test_nothing_is_written_to_a_folder_that_training_refuses(
    trainer: Any, run_dir: Path, reference: str
) -> None:
    (run_dir / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"config\.json, which was not written by fastpo"):
        trainer(reference=reference)
    assert content(run_dir) == {"config.json": b"mine"}


def test_run_json_comes_before_the_store(trainer: Any, run_dir: Path) -> None:
    near, far = multiprocessing.Pipe()
    process = start(hold, str(run_dir), far)
    holder = near.recv()
    with pytest.raises(ValueError, match=f"is in use by process {holder}"):
        trainer(reference="store")
    assert not (run_dir / "reference").exists()
    os.kill(holder, signal.SIGKILL)
    process.join(60)
    near.send("end")
    (run_dir / "reference").write_text("mine")
    with pytest.raises(ValueError, match=r"reference cannot be made .* another reference_store"):
        trainer(reference="store")
    assert content(run_dir)["reference"] == b"mine"
    assert (run_dir / RUN).is_file()


# --- models ---------------------------------------------------------------------------------------


def test_models_are_saved_over_nobody_elses(trainer: Any, tmp_path: Path) -> None:
    made = trainer(max_steps=1)
    for save in (made.save_model, made.save_merged):
        other = tmp_path / save.__name__
        save(str(other))
        save(str(other))
        (other / "notes.txt").write_text("mine")
        save(str(other))
        assert tiny.LlamaForCausalLM.from_pretrained(other)
    tiny.model().save_pretrained(tmp_path / "base")
    before = content(tmp_path / "base")
    for save in (made.save_model, made.save_merged):
        with pytest.raises(ValueError, match=r"base holds .*not written by fastpo"):
            save(str(tmp_path / "base"))
    assert content(tmp_path / "base") == before


def test_weights_of_an_earlier_form_do_not_stay(trainer: Any, run_dir: Path) -> None:
    trainer(max_steps=1).save_model()
    adapted = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer(max_steps=1, model=adapted).save_model()
    assert (run_dir / "adapter_model.safetensors").exists()
    assert not (run_dir / "model.safetensors").exists()


def test_a_save_that_fails_leaves_the_model_that_was_there(
    trainer: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(max_steps=1)
    made.save_model()
    before = content(run_dir)
    monkeypatch.setattr(made.processing_class, "save_pretrained", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save_model()
    assert content(run_dir) == before


# --- from Python ----------------------------------------------------------------------------------


def test_evaluation_alone_adds_to_nobody_elses_metrics(trainer: Any, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"metrics.jsonl, which was not written"):
        trainer(eval_dataset=tiny.pairs(2), reference="copy").evaluate()
    assert content(run_dir) == {"metrics.jsonl": b"mine"}


def test_results_are_saved_over_nobody_elses(trainer: Any, run_dir: Path) -> None:
    made = trainer(max_steps=1)
    made.save_metrics("train", {"a": 1.0})
    made.save_metrics("train", {"a": 2.0})
    (run_dir / "test_results.json").write_text("mine")
    with pytest.raises(ValueError, match=r"test_results.json, which was not written"):
        made.save_metrics("test", {"a": 1.0})


def test_another_number_of_ranks_is_noticed(
    trainer: Any, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(**SAVED).train()
    RunFolder.at(run_dir).save(batch={"groups": 4, "accumulated": 1, "ranks": 2})
    trainer(**{**SAVED, "max_steps": 3}).train(resume_from_checkpoint=True)
    assert "4 groups a device x 1 accumulated x 1 rank = 4 groups a step" in caplog.text
    assert "x 2 ranks = 8 groups a step" in caplog.text


SECRET = "xyzzy-Plugh-1234"


def test_a_hub_token_works_and_is_not_written(
    trainer: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(
        **SAVED, hub_token=SECRET, chat_template_kwargs={"api_key": SECRET}, run_name=f"a {SECRET}"
    )
    made.train()
    made.save_model()
    write_report(run_dir)
    write_model_card(run_dir)
    assert made.args.hub_token == SECRET
    files = content(run_dir)
    assert {"training_args.bin", "checkpoint-1/training_args.bin"} <= files.keys()
    assert not [name for name, text in files.items() if SECRET.encode() in text]
    assert SECRET not in repr(made.args) + str(made.args) + made.args.to_json_string()
    # Copies and child processes go on with it.
    for again in (copy.deepcopy(made.args), pickle.loads(pickle.dumps(made.args))):
        assert again.hub_token == SECRET
    saved = torch.load(run_dir / "training_args.bin", weights_only=False)
    assert isinstance(saved, PreferenceConfig)
    assert (saved.hub_token, saved.save_strategy) == (None, made.args.save_strategy)
    with pytest.raises(ValueError, match="run_name has a secret that was left out"):
        PreferenceConfig.from_dict(made.args.to_dict())

    pushed: list[bytes] = []

    class Hub:
        def upload_folder(self, folder_path: str, token: str, **_: Any) -> Any:
            assert token == SECRET
            pushed.extend(content(Path(folder_path)).values())

    import transformers.trainer

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: None)
    made.push_in_progress = None
    made._push_from_checkpoint(str(run_dir / "checkpoint-2"))
    assert pushed
    assert not [text for text in pushed if SECRET.encode() in text]


def test_a_sealed_text_may_have_any_characters(tmp_path: Path) -> None:
    for text in ("a\r\nb\r", "\ud800 x\n\n", ""):
        write_sealed(tmp_path / "report.html", text)
    write_text(tmp_path / "report.html", "mine")
    with pytest.raises(ValueError, match="was not written by fastpo"):
        write_sealed(tmp_path / "report.html", "")
