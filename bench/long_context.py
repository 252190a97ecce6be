"""How long a context trains, by memory lever, and whether the planner says so beforehand.

    python -m bench.long_context           # this device's grid; every case in a process of its own

On a CPU: the planner against the growth of resident memory, and a pair of 64K tokens. On a GPU:
Llama-3-8B's and 70B's shapes with random weights, contexts doubled until one does not fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from bench.harness import RESULTS, Record, device_slug, peak_extra_bytes
from fastpo import read_head
from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate, counts_of
from fastpo.head import op as ops
from fastpo.head.spec import HeadOptions
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.load import disable_dropout, load_model
from fastpo.model.offload import LayerInputOffload
from fastpo.model.random_init import model_config
from fastpo.model.tiled_mlp import tile_mlps
from fastpo.optional import require_transformers
from fastpo.planner.memory import CONTEXT, Job, Plan, Shape, plan

# More than 1 GiB a step, from wide MLPs on a narrow attention: two cores spend a minute on it.
_WIDE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 131072,
}
_ONE_HEAD = {
    **_WIDE,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
_PAIR: dict[str, Any] = {"objective": "simpo", "candidates": 2, "response": 512, "rank": 16}
_LEVERS: list[dict[str, Any]] = [
    {},
    {"mlp_tile": "auto"},
    {"offload": True},
    {"mlp_tile": "auto", "offload": True},
]
_CPU: dict[str, Any] = {"weights": "float32", "computed": "float32"}
_SLOW = "seconds on a shared machine; memory is exact"


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Return the grid of a device: plain values, so that they are keys of the record."""
    if device.type == "cpu":
        planned = [
            {"model": _WIDE, "context": 8192, "method": method, **_PAIR, **_CPU, **lever}
            for method, levers in (("lora", _LEVERS), ("full", [_LEVERS[0], _LEVERS[-1]]))
            for lever in levers
        ]
        # A reference-free loss of single responses, the same one for any number of them.
        one = {"objective": "simnpo", "response": 256, "rank": 16, "method": "lora", **_CPU}
        long = [
            {"model": _ONE_HEAD, "context": 65536, "candidates": k, "mlp_tile": "auto", **one}
            for k in (1, 8)
        ]
        return planned + long
    grid = []
    for model, method, contexts in (
        ("llama-3-8b", "lora", (65536, 131072, 262144)),
        ("llama-3-70b", "qlora", (16384, 32768, 65536)),
    ):
        for context in contexts:
            grid += [
                {"model": model, "context": context, "method": method, **_PAIR, **lever}
                for lever in _LEVERS
            ]
    return grid


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that are alive, on any device; `peak` is their most so far.

    What exists already has to be named: `held` is not counted.
    """

    def __init__(self, held: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: 0 for t in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "fastpo":
            with self:  # what the operator holds inside
                return getattr(ops, func.overloadpacket.__name__)(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += self._seen[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._seen.pop(key)


class Step:
    """Hold a model with random weights and one batch: a call is a forward and a backward.

    Args:
        case: of `cases`.
        device: where it runs.
    """

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(0)
        self.autocast = (
            nullcontext()
            if case.get("computed", "bfloat16") == case.get("weights", "bfloat16") == "float32"
            else torch.autocast(device.type, torch.bfloat16)
        )
        method = case["method"]
        with tempfile.TemporaryDirectory() as folder:
            model: Any = load_model(
                _name(case["model"], folder),
                random_init=True,
                dtype=case.get("weights", "bfloat16"),
                quantization="nf4" if method == "qlora" else None,
                lora=None if method == "full" else {"r": case["rank"]},
                device=device,
            )
        disable_dropout(model)
        attach(model.train())
        model.activation_checkpointing_enable()
        if (tile := case.get("mlp_tile")) is not None:
            tile_mlps(model, tile)
        self.model = model
        self.offload = LayerInputOffload() if case.get("offload") else nullcontext()
        self.loss = PreferenceLoss(case["objective"], read_head(model))
        group = _group(case, model.config.vocab_size)
        self.tokens = int(counts_of([group]).tokens)
        self.batch = collate([group], share_prompt=True, pad_token_id=0).to(device)
        self.workspace_mib = case.get("workspace_mib", 256)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return what is there before a step and after it, gradients included."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [p.grad for p in self.model.parameters() if p.grad is not None]
        if isinstance(self.offload, LayerInputOffload):
            kept += self.offload.buffers
        return kept + [
            t
            for t in (*vars(self.batch).values(), *vars(self.batch.tokens).values())
            if isinstance(t, torch.Tensor)
        ]

    def __call__(self) -> None:
        with self.autocast:
            with self.offload:
                hidden = target_hidden(self.model, self.batch)
            options = HeadOptions(workspace_mib=self.workspace_mib)
            loss = self.loss.of_tokens(hidden, self.batch.tokens, options=options).loss
        loss.backward()


def _name(model: str | dict[str, Any], folder: str) -> str:
    """Return a preset's name, or that of a file with the configuration."""
    if isinstance(model, str):
        return model
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(model), encoding="utf-8")
    return str(path)


def _group(case: dict[str, Any], vocabulary: int) -> Group:
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    length = case["response"]
    responses = [
        Response(ids(length), np.ones(length, dtype=bool), label=slot == 0, rank=slot)
        for slot in range(case["candidates"])
    ]
    return Group(ids(case["context"] - length), responses, row=0)


def planned(case: dict[str, Any]) -> Plan:
    """Return the planner's word on a case, without optimiser states, which a `Step` has not."""
    own = {k: v for k, v in case.items() if k not in ("model", "objective")}
    return plan(Job(_shape(case), **own, optim="sgd"))


def _shape(case: dict[str, Any]) -> Shape:
    with tempfile.TemporaryDirectory() as folder:
        return Shape.of(model_config(_name(case["model"], folder)))


def predicted_extra(case: dict[str, Any], device: torch.device) -> int:
    """Return the bytes of a second step: the first one left weights, gradients, host buffers."""
    shape, said = _shape(case), planned(case)
    absent = ["weights", "adapter", "gradients"]
    if device.type == "cpu" and not shape.scored_heads and not any(shape.windows):
        absent.append("key and value copies")  # as CPUs merge
    return said.peak - CONTEXT - sum(said.device[part] for part in absent)


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measure seconds and peak of a second step, in this process."""
    step = Step(case, device)
    begin = time.perf_counter()
    try:
        extra = peak_extra_bytes(step, device)
    except torch.OutOfMemoryError:
        return {"fits": False}
    torch.get_device_module(device).synchronize()
    facts: dict[str, Any] = {
        "fits": True,
        "tokens": step.tokens,
        "seconds": round((time.perf_counter() - begin) / 2, 2),
        "peak_extra_bytes": extra,
    }
    if device.type == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if isinstance(step.offload, LayerInputOffload):
        facts["host_bytes"] = step.offload.host_bytes
    del step
    gc.collect()
    resident = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    facts["peak_resident_bytes"] = int(resident.split()[0]) << 10
    return facts


def markdown(record: dict[str, Any]) -> str:
    """Return the record's cases as the table of the docs."""
    rows = [
        "| context | K | trained | levers | s | peak MiB of a step | predicted | process MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        case = row["key"]
        levers = [name for name in ("mlp_tile", "offload") if case.get(name)]
        sizes = ["does not fit", "", ""]
        if row["fits"]:
            over = row["predicted_extra_bytes"] / row["peak_extra_bytes"] - 1
            sizes = [
                f"{row['peak_extra_bytes'] / 2**20:.0f}",
                f"{over:+.1%}",
                f"{row['peak_resident_bytes'] / 2**20:.0f}",
            ]
        cells = [case["context"], case["candidates"], case["method"], ", ".join(levers) or "none"]
        rows.append("| " + " | ".join(map(str, [*cells, row.get("seconds", ""), *sizes])) + " |")
    return "\n".join(rows)


def _alone(case: dict[str, Any]) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.long_context", "--case", json.dumps(case)]
    # Else glibc keeps freed tensors of up to 32 MiB in its heap, and the process looks larger.
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError(f"{case} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_context", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget the record")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    require_transformers("bench.long_context")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.case:
        print(json.dumps(measure(json.loads(options.case), device)))
        return
    method = {"steps": "forward and backward of one group, the second of two", "note": _SLOW}
    path = RESULTS / device_slug(device) / "long_context.json"
    record = Record(path, device, method, options.fresh)
    for case in tqdm(record.missing(cases(device)), unit="case"):
        found = _alone(case)
        said = predicted_extra(case, device)
        record.add(case, predicted_extra_bytes=said, **found)
    print(markdown(record.data))


if __name__ == "__main__":
    main()
