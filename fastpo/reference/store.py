"""Store reference log-probabilities on disk: computed once, resumable, refused when stale.

A store is a folder: `store.json` says what it was computed with, `shard-*.safetensors` hold the
numbers. A hash of its tokens finds every group, so the order of the data is free and rows may be
added later. A group whose tokens changed is computed again instead of being misread. What no token
shows (the model, its dtype) is in the key; a store with another key is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from fastpo.data.groups import Group
from fastpo.data.packing import group_key
from fastpo.reading import reading

log = logging.getLogger(__name__)

META = "store.json"
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(model: nn.Module, skip: Callable[[str], bool] = lambda name: False) -> str:
    """Return a hash of a model's configuration and weights.

    Every byte of every parameter and buffer enters through an integer sum, taken on its device in
    one pass over memory; 4096 strided elements enter in order as well, so permuted weights differ.

    Args:
        model: the model; its `config`, if any, enters without names, versions and dtype.
        skip: parameters to leave out, such as an adapter that the reference runs without.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None:
        values = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
        digest.update(_hash(values).encode())
    # An adapter's wrappers rename the weights they wrap: the base is the same with and without.
    wrapped = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module")
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in sorted(model.state_dict().items()):
        if skip(name) or not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        bits = flat.view(words[flat.element_size()])
        sample = bits[:: max(1, bits.numel() // 4096)].cpu().numpy()
        digest.update(f"{wrapped.sub('', name)}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def store_key(
    model: nn.Module,
    tokenizer: Any,
    *,
    precision: str,
    truncation: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any],
    share_prompt: bool,
    skip: Callable[[str], bool] = lambda name: False,
) -> dict[str, str]:
    """Return what a store depends on, by parts, so that a refusal can name what changed."""
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    special = getattr(tokenizer, "special_tokens_map", {})
    return {
        "model": fingerprint(model, skip),
        "dtype": precision,
        "tokenizer": _hash([vocabulary, special]),
        "template": _hash(
            [getattr(tokenizer, "chat_template", None), dict(chat_template_kwargs)],
        ),
        "truncation": _hash(dict(truncation)),
        "sharing": "one prompt copy a group" if share_prompt else "one prompt copy a response",
    }


def key_digest(key: Mapping[str, str]) -> str:
    """Return a short name of what a store depends on."""
    return _hash(dict(key))[:12]


def _digest(shard: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("keys", "ends", "logps"):
        digest.update(np.ascontiguousarray(shard[name]).data)
    return digest.hexdigest()


def _index_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys [G, 16] uint8 of a shard's groups, and the ends [G] of their log-probs.

    Raises:
        ValueError: its bytes are not those that were written, or its arrays do not fit together.
    """
    with safe_open(path, framework="np") as file:
        shard = {name: file.get_tensor(name) for name in ("keys", "ends", "logps")}
        written = (file.metadata() or {}).get("sha256")  # older releases wrote none
    if written is not None and written != _digest(shard):
        raise ValueError("its bytes are not those that were written")
    keys, ends, logps = shard["keys"], shard["ends"], shard["logps"]
    fits = (keys.ndim, ends.ndim, logps.ndim) == (2, 1, 1) and len(keys) == len(ends)
    if (
        not fits
        or not np.array_equal(np.sort(ends), ends)
        or not len(ends)
        or ends[-1] != len(logps)
    ):
        raise ValueError("its arrays do not fit together")
    return keys, ends


class ReferenceStore:
    """Keep per-token reference log-probs of groups, one float32 a target token.

    Args:
        path: the folder; created when missing.
        key: what the numbers depend on, from `store_key`.
        info: readable facts for `store.json` (model name, revision); not compared.
        writer: rank of this process, part of its shards' names.

    Raises:
        ValueError: the folder holds numbers computed with another key; names the parts that differ.
            Or a file in it is damaged, or it is no folder; names it.
    """

    def __init__(
        self,
        path: str | Path,
        key: Mapping[str, str],
        *,
        info: Mapping[str, Any] | None = None,
        writer: int = 0,
    ) -> None:
        self.path = Path(path)
        self.writer = writer
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the reference store {self.path} cannot be made ({error.strerror}): give another "
                "reference_store"
            ) from error
        self._index: dict[str, tuple[str, int, int]] = {}  # key -> shard, from, to
        self._open: dict[str, safe_open] = {}
        meta = self.path / META
        if not meta.is_file():
            text = json.dumps({"kind": "logps", "key": dict(key), **(info or {})}, indent=1)
            self._write(meta, lambda partial: partial.write_text(text, encoding="utf-8"))
        # Read back also where it was just written: another run may have been faster.
        with reading(meta, "delete the folder, or give another reference_store"):
            stored = dict(json.loads(meta.read_bytes())["key"])
        changed = [part for part in key if stored.get(part) != key[part]]
        if changed:
            raise ValueError(
                f"the reference store {self.path} is stale: {', '.join(changed)} changed since it "
                "was computed; give another reference_store or delete this folder, which "
                "--overwrite keeps"
            )
        self.refresh()

    def refresh(self) -> None:
        """Read the index of shards that were written since, by this or another process."""
        known = {name for name, _, _ in self._index.values()}
        for shard in sorted(self.path.glob("shard-*.safetensors")):
            if shard.name in known:
                continue
            with reading(shard, "delete this file, and its groups are computed again"):
                keys, ends = _index_of(shard)
            start = 0
            for row, end in zip(keys, ends.tolist(), strict=True):
                self._index[row.tobytes().hex()] = (shard.name, start, end)
                start = end

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, group: Group) -> bool:
        return group_key(group) in self._index

    def __getitem__(self, group: Group) -> np.ndarray:
        """Return [n] float32, in the order of the group's target tokens."""
        key = group_key(group)
        if key not in self._index:
            raise ValueError(
                f"{group.source or 'data'} row {group.row} is not in the reference store "
                f"{self.path}, which has the data that the trainer was made with: give these rows "
                "as its eval_dataset too, or set reference='copy'"
            )
        name, start, end = self._index[key]
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="np")
        return self._open[name].get_slice("logps")[start:end]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # mapped files do not cross to loader processes

    def missing(self, groups: Iterable[Group]) -> list[int]:
        """Return the indices of groups that are not stored, one of each distinct group."""
        seen = set(self._index)
        missing = []
        for index, group in enumerate(groups):
            key = group_key(group)
            if key not in seen:
                seen.add(key)
                missing.append(index)
        return missing

    def add(self, groups: Sequence[Group], logps: Sequence[np.ndarray]) -> None:
        """Write one shard; it is complete on disk before its name exists."""
        digests = bytes.fromhex("".join(group_key(g) for g in groups))
        keys = np.frombuffer(digests, np.uint8).reshape(len(groups), -1)
        ends = np.cumsum([len(values) for values in logps]).astype(np.int64)
        shard = {"keys": keys, "ends": ends, "logps": np.concatenate(logps).astype(np.float32)}
        # No counter: another run that fills this folder would count to the same number.
        path = self.path / f"shard-{self.writer}-{uuid.uuid4().hex}.safetensors"
        self._write(path, lambda partial: save_file(shard, partial, {"sha256": _digest(shard)}))
        start = 0
        for group, end in zip(groups, ends.tolist(), strict=True):
            self._index[group_key(group)] = (path.name, start, end)
            start = end

    @staticmethod
    def _write(path: Path, write: Callable[[Path], Any]) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)


class ShardWriter:
    """Collect results and write a shard every `groups` groups or `seconds`."""

    def __init__(self, store: ReferenceStore, groups: int = 512, seconds: float = 30.0) -> None:
        self.store, self.groups, self.seconds = store, groups, seconds
        self._groups: list[Group] = []
        self._logps: list[np.ndarray] = []
        self._since = time.monotonic()

    def add(self, groups: Sequence[Group], logps: Sequence[np.ndarray]) -> None:
        """Keep these until a shard is due."""
        self._groups += groups
        self._logps += logps
        if len(self._groups) >= self.groups or time.monotonic() - self._since > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard."""
        if self._groups:
            self.store.add(self._groups, self._logps)
        self._groups, self._logps, self._since = [], [], time.monotonic()
