"""Checkpoints: complete or invisible, and a killed run ends where an unkilled one does."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.run.checkpoint import MANIFEST, incomplete, latest_complete, publish, staging_dir
from fastpo.train.metrics import read_metrics
from tests.train import child


def run_child(mode: str, folder: Path, recipe: str = "bco") -> None:
    process = child.start(child.killed, mode, str(folder), recipe)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def weights(trainer: Any) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    moments = [v for entry in state.values() for v in entry.values()]
    return [*trainer.model.state_dict().values(), *moments, *trainer.loss.state_dict().values()]


@pytest.fixture(scope="module")
def unkilled_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(recipe: str) -> Any:
        made = child.make(str(tmp_path_factory.mktemp(recipe)), recipe=recipe)
        made.train()
        return made

    return make


@pytest.fixture
def unkilled(unkilled_of: Any) -> Any:
    return unkilled_of("bco")


# Moments and recipes do not know of each other: every one of both is met.
@pytest.mark.parametrize(
    ("recipe", "mode", "survivor"),
    [("bco", "step", 3), ("logo", "save", 3), ("longpo", "rename", 3), ("longpo", "store", None)],
)
def test_killed_run_ends_with_the_same_bits(
    recipe: str, mode: str, survivor: int | None, tmp_path: Path, unkilled_of: Any
) -> None:
    run_child(mode, tmp_path, recipe)
    if survivor is None:  # half of the reference's log-probs are on disk, and no step is done
        assert latest_complete(tmp_path) is None
        assert len(list((tmp_path / "reference").glob("shard-*"))) == 2
    else:
        assert latest_complete(tmp_path) == str(tmp_path / f"checkpoint-{survivor}")
        steps = [r["step"] for r in read_metrics(tmp_path)]
        assert max(steps) >= survivor

    unkilled = unkilled_of(recipe)
    resumed = child.make(str(tmp_path), recipe=recipe)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 7
    for value, expected in zip(weights(resumed), weights(unkilled), strict=True):
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    for ours, theirs in zip(
        read_metrics(tmp_path), read_metrics(unkilled.args.output_dir), strict=True
    ):
        for name in ("step", "loss", "rewards/margins", "bco/shift", "num_tokens"):
            assert ours.get(name) == theirs.get(name)
    left = sorted(p.name for p in tmp_path.iterdir() if "checkpoint" in p.name)
    # save_total_limit=2 holds over the kill, and no temporary folder is left.
    assert left == ["checkpoint-6", "checkpoint-7"]


def test_running_state_of_the_loss_is_saved(unkilled: Any) -> None:
    shift = unkilled.loss.get_buffer("bco_shift")
    assert shift[1] == 7 * 16  # every response of every step was counted once
    state = torch.load(Path(unkilled.args.output_dir) / "checkpoint-7" / "loss_state.pt")
    assert torch.equal(state["bco_shift"], shift)


@pytest.fixture
def checkpoint(unkilled: Any, tmp_path: Path) -> Path:
    for name in ("checkpoint-6", "checkpoint-7"):
        shutil.copytree(Path(unkilled.args.output_dir) / name, tmp_path / name)
    return tmp_path / "checkpoint-7"


def test_complete(checkpoint: Path) -> None:
    assert incomplete(checkpoint) is None
    sizes_alone(checkpoint)
    assert incomplete(checkpoint) is None
    (checkpoint / MANIFEST).unlink()  # as another program would have left it
    assert incomplete(checkpoint) is None


def damage_missing(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def damage_torn(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_garbage(folder: Path) -> None:
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(data)


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def damage_manifest_type(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": ["optimizer.pt"]}')


def damage_manifest_list(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["optimizer.pt"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def sizes_alone(folder: Path) -> None:
    """A manifest as releases before the hashes wrote it."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    sizes = {name: each["bytes"] for name, each in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": sizes}))


def damage_older_garbage(folder: Path) -> None:
    sizes_alone(folder)
    damage_garbage(folder)


def damage_foreign_garbage(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    size = (folder / "rng_state.pth").stat().st_size
    (folder / "rng_state.pth").write_bytes(b"x" * size)


def damage_foreign_header(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    damage_torn(folder)


def damage_foreign_state(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "trainer_state.json").write_text('{"global_step": 1')


def damage_foreign_weights(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors").unlink()


# What is wrong with a file by each way of noticing it: it is not there, its size, its hash, the
# list itself, and without hashes or a list what its own format says.
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "optimizer.pt is missing"),
        (damage_torn, "model.safetensors has .* bytes instead of"),
        (damage_garbage, "optimizer.pt is damaged: its bytes are not those that were saved"),
        (damage_manifest, "manifest.json is unreadable"),
        (damage_manifest_type, "manifest.json is unreadable"),
        (damage_manifest_list, "manifest.json is damaged: the files that it lists"),
        (damage_older_garbage, "optimizer.pt is damaged"),
        (damage_foreign_state, "trainer_state.json is damaged"),
        (damage_foreign_garbage, "rng_state.pth is damaged .*not a zip"),
        (damage_foreign_header, "model.safetensors is damaged"),
        (damage_foreign_weights, "no weights"),
    ],
)
def test_damaged_checkpoint_is_skipped(
    checkpoint: Path, damage: Any, reason: str, caplog: pytest.LogCaptureFixture, trainer: Any
) -> None:
    damage(checkpoint)
    with caplog.at_level(logging.WARNING, "fastpo.run.checkpoint"):
        assert latest_complete(checkpoint.parent) == str(checkpoint.parent / "checkpoint-6")
    assert len(caplog.records) == 1
    caplog.records[0].getMessage().index("checkpoint-7")
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-7: {reason}"):
        trainer().train(resume_from_checkpoint=str(checkpoint))


def published(folder: Path, text: str) -> Path:
    """A checkpoint of one file."""
    staging, final = staging_dir(folder, 1), folder / "checkpoint-1"
    staging.mkdir()
    (staging / "file").write_text(text)
    publish(staging, final)
    return final


def test_publish_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    final = published(tmp_path, "old")
    assert published(tmp_path, "new") == final
    assert (final / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert json.loads((final / MANIFEST).read_text())["files"] == {
        "file": {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}
    }


# Nothing, other types, no text, and a list that lists nothing.
@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b"\xff\xfe", b"3", b'{"files": 1}', b'{"files": []}']
)
def test_a_damaged_manifest_is_replaced_and_notes_stay(tmp_path: Path, damaged: bytes) -> None:
    final = published(tmp_path, "old")
    (final / MANIFEST).write_bytes(damaged)
    (final / "note.txt").write_text("mine")
    published(tmp_path, "new")
    assert (final / "file").read_text() == "new"
    assert (final / "note.txt").read_text() == "mine"
    assert incomplete(final) is None
