"""The reference store: the numbers, resuming, staleness."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from fastpo.reference.live import adapter_parameters, num_targets
from fastpo.reference.store import META, ReferenceStore, fingerprint
from tests.run.test_checkpoint import run_child
from tests.train import tiny
from tests.train.test_preflight import failing

KEY = {
    "model": "m",
    "dtype": "float32",
    "tokenizer": "t",
    "template": "-",
    "truncation": "-",
    "sharing": "-",
}


def logps_of(groups: list) -> list[np.ndarray]:
    return [np.arange(num_targets(g), dtype=np.float32) - 10 * g.row for g in groups]


def test_reads_back_in_any_order(tmp_path: Path) -> None:
    groups = tiny.groups(6, 3, extras=("mismatched",))
    values = logps_of(groups)
    writing = ReferenceStore(tmp_path, KEY)
    writing.add(groups[:2], values[:2])
    writing.add(groups[2:5], values[2:5])
    for store in (writing, ReferenceStore(tmp_path, KEY)):
        assert len(store) == 5
        for i in (4, 0, 3, 1, 2):
            np.testing.assert_array_equal(store[groups[i]], values[i])
        assert store.missing(groups) == [5]
        with pytest.raises(ValueError, match=r"tiny.jsonl row 5 is not in the reference store"):
            store[groups[5]]


def test_two_runs_fill_one_folder(tmp_path: Path) -> None:
    """Neither knows of the other's shards; neither loses a group."""
    groups = tiny.pairs(4)
    values = logps_of(groups)
    first, second = ReferenceStore(tmp_path, KEY), ReferenceStore(tmp_path, KEY)
    count = len(list(tmp_path.iterdir()))
    for glob_sees in (True, False):  # also where a listing is older than the other's shard
        for store, i in ((first, 0), (second, 1)):
            k = i if glob_sees else i + 2
            store.path = tmp_path if glob_sees else Stale(tmp_path)
            store.add(groups[k : k + 1], values[k : k + 1])
    assert len(list(tmp_path.iterdir())) == count + 4
    store = ReferenceStore(tmp_path, KEY)
    for group, expected in zip(groups, values, strict=True):
        np.testing.assert_array_equal(store[group], expected)


class Stale(type(Path())):
    """A folder whose listing lags behind."""

    def glob(self, *_: Any, **__: Any) -> Any:
        return iter(())


def test_another_token_or_mask_is_another_group(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, KEY)
    store.add(tiny.pairs(1), logps_of(tiny.pairs(1)))
    assert tiny.pairs(1)[0] in store
    token, mask = tiny.pairs(1)[0], tiny.pairs(1)[0]
    token.responses[1].input_ids[0] += 1
    mask.responses[0].loss_mask[0] = False
    assert store.missing([token, mask]) == [0, 1]


@pytest.mark.parametrize("part", sorted(KEY))
def test_stale_store_is_refused_by_part(tmp_path: Path, part: str) -> None:
    ReferenceStore(tmp_path, KEY)
    with pytest.raises(ValueError, match=f"is stale: {part} changed since.*--overwrite keeps"):
        ReferenceStore(tmp_path, {**KEY, part: "other"})


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def without_a_key(path: Path) -> None:
    shard = load_file(path)
    save_file({name: shard[name] for name in ("keys", "logps")}, path)


def of_wrong_shape(path: Path) -> None:
    """As an older release would have written it, without a hash."""
    save_file({**load_file(path), "ends": np.array([3, 99])}, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -3),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), os.mkfifo(path)),
        without_a_key,
        of_wrong_shape,
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Any) -> None:
    store = ReferenceStore(tmp_path, KEY)
    store.add(tiny.pairs(2), logps_of(tiny.pairs(2)))
    shard = next(tmp_path.glob("shard-*"))
    damage(shard)
    with pytest.raises(ValueError, match=f"cannot read .*{shard.name}: .*delete this file"):
        ReferenceStore(tmp_path, KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 3}', "{}", "\xff"])
def test_a_damaged_store_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / META).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cannot read .*store.json: .*another reference_store"):
        ReferenceStore(tmp_path, KEY)


def test_fingerprint_sees_every_weight_and_no_adapter() -> None:
    base = fingerprint(tiny.model())
    assert base == fingerprint(tiny.model()) != fingerprint(tiny.model(seed=1))
    changed = tiny.model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[7, 3] += 1e-6
    assert fingerprint(changed) != base
    assert fingerprint(tiny.model().bfloat16()) != base
    peft = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]))
    assert fingerprint(peft, adapter_parameters(peft)) == base


def stored(trainer: Any, folder: Path, **options: Any) -> Any:
    return trainer(reference="store", reference_store=str(folder), **options)


def test_first_loss_is_ln_2(trainer: Any, tmp_path: Path) -> None:
    """Batches of the store are not those of training, hence 1e-6 and not bit for bit."""
    made = stored(trainer, tmp_path / "store", eval_dataset=tiny.pairs(5, seed=1), max_steps=1)
    assert made.reference_kind == "store"
    assert made.evaluate()["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    made.train()
    assert made.state.log_history[-2]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_store_is_used_again_and_shared_with_an_adapter(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored(trainer, tmp_path / "store")
    monkeypatch.setattr("fastpo.reference.live.target_hidden", None)  # nothing may be computed
    again = stored(trainer, tmp_path / "store", train_dataset=tiny.pairs(16)[::-1])
    lora = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]))
    adapted = stored(trainer, tmp_path / "store", model=lora)
    for made in (again, adapted):
        for group in tiny.pairs(16):
            np.testing.assert_array_equal(
                made.data_collator.store[group], first.data_collator.store[group]
            )


def test_another_model_is_refused(trainer: Any, tmp_path: Path) -> None:
    stored(trainer, tmp_path / "store")
    with pytest.raises(ValueError, match="is stale: model changed"):
        stored(trainer, tmp_path / "store", model=tiny.model(seed=1))
    with pytest.raises(ValueError, match="is stale: truncation changed"):
        stored(trainer, tmp_path / "store", max_length=500)


def test_another_packing_is_refused(trainer: Any, tmp_path: Path) -> None:
    stored(trainer, tmp_path / "store")
    with pytest.raises(ValueError, match="is stale: sharing changed"):
        stored(trainer, tmp_path / "store", share_prompt=False)


def test_check_comes_before_the_first_number(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot share is run padded from the start; wrong numbers never reach a disk."""
    plain = stored(trainer, tmp_path / "plain", share_prompt=False)
    monkeypatch.setattr("fastpo.train.preflight.self_check", failing("they differ by 1"))
    made = stored(trainer, tmp_path / "store", self_check=True)
    assert made.sharing_reason == "they differ by 1"
    for group in tiny.pairs(16):
        np.testing.assert_array_equal(
            made.data_collator.store[group], plain.data_collator.store[group]
        )
    with pytest.raises(ValueError, match=r"share_prompt=true.*they differ by 1"):
        stored(trainer, tmp_path / "none", self_check=True, share_prompt=True)
    assert not (tmp_path / "none").exists()
    calls: list[Any] = []
    monkeypatch.setattr("fastpo.train.preflight.self_check", lambda *a, **k: calls.append(a))
    made.train()
    assert not calls  # once is enough


def test_killed_computation_goes_on(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_child("store", tmp_path / "killed")
    folder = tmp_path / "killed" / "reference"
    assert len(list(folder.glob("shard-*.safetensors"))) == 2
    computed: list[int] = []
    collate = "fastpo.train.trainer.Collator.__call__"
    from fastpo.train.trainer import Collator

    pack = Collator.__call__
    monkeypatch.setattr(
        collate,
        lambda self, groups: (computed.extend(g.row for g in groups), pack(self, groups))[1],
    )
    made = stored(trainer, folder)
    assert computed == list(range(8, 16))  # the first eight were on disk
    fresh = stored(trainer, tmp_path / "fresh").data_collator.store
    for group in tiny.pairs(16):
        np.testing.assert_array_equal(made.data_collator.store[group], fresh[group])


def test_stream_is_refused(trainer: Any, tmp_path: Path) -> None:
    from fastpo.data.rows import load_rows

    with pytest.raises(ValueError, match="reference='store' needs all training data"):
        stored(trainer, tmp_path, train_dataset=load_rows(tiny.rows(4), streaming=True))


def test_divergences_take_a_live_reference(trainer: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        made = trainer(objective="tdpo2", max_steps=1)
    assert made.reference_kind == "copy"
    made.train()
