"""Share among benchmarks the gate, interleaved timing, memory, counted matmuls and the record.

A benchmark builds callables that return named tensors; nothing here knows what they compute.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import profiler_legacy

Outputs = dict[str, Tensor]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
# An output is wrong where its error is ten times that of plain PyTorch in the same dtype. Smaller
# differences are reported, not judged: a peer may round differently and still be right.
GATE = 10


def device_slug(device: torch.device) -> str:
    """Return `cpu-2-cores`, or the name of the GPU: where results are kept."""
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware; no host name, no path."""
    cpu = device.type == "cpu"
    name = torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name(device)
    stamp = {"device": name, "slug": device_slug(device), "threads": torch.get_num_threads()}
    present = {
        d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    versions = {package: present.get(package) for package in PACKAGES}
    return {**stamp, **versions, "torch": torch.__version__}  # it alone names the build: +cu130


def check(
    outputs: Outputs, truth: Outputs, plain: Outputs, terms: Mapping[str, float] | None = None
) -> tuple[dict[str, dict], str | None]:
    """Return every output's error against float64, and why the contender is rejected or None.

    Bound: `GATE` * (error of `plain` + eps * largest magnitude of the truth). `terms`, by output,
    is the magnitude of what cancels in it, where that is larger.
    """
    errors: dict[str, dict] = {}
    rejected = None
    for name, true in truth.items():
        value, scale = outputs[name], true.abs().max().item()
        difference = (value.to(true) - true).abs().nan_to_num(nan=float("inf")).max().item()
        by_plain = (plain[name].to(true) - true).abs().max().item()
        rounded = max(scale, (terms or {}).get(name, 0.0))
        bound = GATE * (by_plain + torch.finfo(value.dtype).eps * rounded)
        errors[name] = {"max_error": difference, "bound": bound}
        errors[name]["relative"] = difference / (scale or 1.0)  # of a truth of zeros: as it is
        if not difference <= bound:
            rejected = rejected or f"{name} is off by {difference:.3g}, bound {bound:.3g}"
    return errors, rejected


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    cold: bool = True,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Return name -> seconds of each round. Everyone runs once a round, in an order that rotates.

    `cold` overwrites 256 MiB, more than a last-level cache holds, before each run.
    """
    names, seconds = list(runs), {name: [] for name in runs}
    flush = torch.empty(256 << 20 if cold else 0, dtype=torch.uint8, device=device)
    synchronize = torch.get_device_module(device).synchronize  # does nothing on CPU
    for round_number in range(-warmup, rounds):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            flush.zero_()
            synchronize()
            start = time.perf_counter()
            result = runs[name]()
            synchronize()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
            del result
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Return median and quantiles."""
    wanted = {"min": 0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1}
    return {name: round(float(np.quantile(values, q)), 6) for name, q in wanted.items()}


def count_flop(run: Callable[[], Outputs]) -> tuple[Outputs, int]:
    """Return what a call returns, and the FLOP of the matmuls that it sends to the BLAS."""
    # The legacy profiler sees what the new one sees and does not write to stderr.
    with profiler_legacy.profile(record_shapes=True) as profile:
        outputs = run()
    flop = 0
    for event in getattr(profile, "function_events", None) or ():
        if event.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes["addmm" in event.name :][:2]
            flop += 2 * torch.Size(a).numel() * b[-1]
    return outputs, flop


def _status_bytes(field: str) -> int:
    _, _, after = Path("/proc/self/status").read_text().partition(f"{field}:")
    return int(after.split()[0]) << 10


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most memory alive in a second call beyond what was there before, outputs included.

    CPU: the process' resident high-water mark, so give every contender a fresh process.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def memory_in_fresh_process(module: str, name: str, key: dict[str, Any], threads: int) -> int:
    """Return `peak_extra_bytes` of a contender in its own interpreter: `module`'s --memory-of."""
    command = [sys.executable, "-m", module, "--memory-of", json.dumps({**key, "name": name})]
    # glibc keeps freed blocks of up to 32 MiB, and a second call that reuses them looks free.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env=settings,
    )
    return int(done.stdout.split()[-1])


def write_section(path: Path, name: str, text: str) -> None:
    """Replace the section of a Markdown page that stands between marks of its name, or append."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    marked = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->\n"
    before, found, after = page.partition(f"<!-- {name} -->\n")
    if found:
        after = after.partition(f"<!-- /{name} -->\n")[2]
        path.write_text(before + marked + after, encoding="utf-8")
    else:
        path.write_text(f"{page.rstrip()}\n\n{marked}".lstrip(), encoding="utf-8")


def write_opening(path: Path, text: str) -> None:
    """Replace what stands before the first marked section of a Markdown page."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = page[page.index("<!-- ") :] if "<!-- " in page else ""
    path.write_text(f"{text.strip()}\n\n{sections}".rstrip() + "\n", encoding="utf-8")


class Record:
    """Keep the JSON of one benchmark on one device, written after every case: a run resumes."""

    def __init__(self, path: Path, device: torch.device, method: dict, fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": environment(device), "method": method}
        self.data["cases"] = []
        if path.exists() and not fresh:
            old = json.loads(path.read_text())
            for part in ("environment", "method"):
                if old[part] != self.data[part]:
                    raise ValueError(f"{path.name} holds results of another {part}: pass --fresh")
            self.data = old

    def missing(self, keys: list[dict]) -> list[dict]:
        """Return those of `keys` that no finished case has."""
        have = [case["key"] for case in self.data["cases"]]
        return [key for key in keys if key not in have]

    def add(self, key: dict, **case: Any) -> None:
        """Append a case and rewrite the file; a torn file is never left behind."""
        stamp = {"date": date.today().isoformat(), "load_average": round(os.getloadavg()[0], 1)}
        self.data["cases"].append({"key": key, **stamp, **case})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.with_suffix(".part")
        torn.write_text(json.dumps(self.data, indent=1) + "\n")
        torn.replace(self.path)
