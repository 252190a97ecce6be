"""What breaks on this device? The first parts of `bench.gpu`, which runs each by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import torch
from torch import Tensor

from bench.gpu import right as checks
from bench.gpu.book import Book, Options, each, run_part, tidy

ROOT = Path(__file__).resolve().parents[2]


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Return the median time of a call; on a GPU by events, without the host's share."""
    for _ in range(3):
        run()
    if device.type == "cpu":
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def versions(device: torch.device) -> dict[str, Any]:
    """Return what kernels and their cache depend on."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch_cuda": torch.version.cuda}
    if importlib.util.find_spec("triton") is not None:
        import hashlib

        from triton.runtime.cache import triton_key

        facts["triton_key"] = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
        }
    return facts


def copying(size: int, device: torch.device) -> Callable[[], object]:
    """Return a copy of so many bytes, random ones."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def squaring(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Return a square product; on zeros it would run faster than on numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def products(
    m: int, d: int, v: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return the head's three products of M tokens, as bare calls into their place."""
    hidden, weight = (torch.randn(k, d, device=device).to(dtype) for k in (m, v))
    slab = torch.randn(m, v, device=device)
    c, grad = slab.to(dtype), torch.randn(m, d, device=device)
    into = torch.randn(v, d, device=device)
    f32 = torch.float32
    return {
        "logits": lambda: torch.mm(hidden, weight.T, out_dtype=f32, out=slab),
        "dH": lambda: torch.mm(c, weight, out_dtype=f32, out=grad),
        "dW added": lambda: torch.addmm(into, c.T, hidden, out_dtype=f32, out=into),
        "dW narrow": lambda: torch.mm(c.T, hidden),
    }


def env(book: Book, options: Options) -> int:
    """Record versions, copy speed and products; each product once if it is not there."""
    device, toy = options.device, options.toy
    book.add("env", "versions", **versions(device))
    size = 1 << (22 if toy else 32)
    took = seconds_of(copying(size, device), device)
    copied = round(2 * size / took / 1e9, 1)
    book.add("env", "copy", gb_per_second=copied, bytes=size)
    digest = [f"copy {copied} GB/s"]
    tidy(device)
    dtype = torch.float32 if toy else torch.bfloat16

    def rate(name: str, flop: float, run: Callable[[], object]) -> str:
        try:
            tflops = round(flop / seconds_of(run, device) / 1e12, 3 if toy else 1)
        except (RuntimeError, TypeError) as why:  # no such signature in this torch
            book.add("env", name, refused=str(why).splitlines()[0])
            return "refused"
        book.add("env", name, tflop_per_second=tflops)
        return f"{tflops:g}"

    square = 256 if toy else 8192
    speed = rate(f"mm {square}", 2 * square**3, squaring(square, dtype, device))
    digest.append(f"mm {square}^3 {speed} TFLOP/s")
    tidy(device)
    width, vocabulary = (64, 512) if toy else (4096, 131072)
    for m in (16, 17) if toy else (256, 261, 512, 1024):
        found = {
            name: rate(f"{name} {m}x{width}x{vocabulary}", 2 * m * width * vocabulary, run)
            for name, run in products(m, width, vocabulary, dtype, device).items()
        }
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        digest.append(f"M {m}: {said} TFLOP/s")
        tidy(device)
    book.put("env", digest=digest)
    return 0


def _chunk_alone(name: str, device: torch.device) -> Iterator[checks.Verdict]:
    """Run a chunk in a process of its own: a crash there is the chunk's last case."""
    command = [sys.executable, "-m", "bench.gpu.right", name, "--device", str(device)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('["'):
                case, found = json.loads(line)
                yield case, found
        if code := child.wait():
            errors.seek(0)
            print(last := errors.read()[-4000:], file=sys.stderr)
            why = f"ended with {code}: {(last.splitlines() or ['?'])[-1]}"
            yield f"{name}: ended", {"status": "failed", "why": why}


def right(book: Book, options: Options) -> int:
    """Run all chunks of `bench.gpu.right`, ten at a time on a GPU; count cases that are wrong."""
    device = options.device
    done = set(book.part("right").get("chunks", []))
    names = [n for n in checks.chunks(checks.FULL) if n not in done]
    if options.toy:
        names = [n for n in checks.chunks(checks.TOY) if n not in done]

    def chunk(name: str) -> None:
        alone = checks.run_chunk if options.toy else _chunk_alone
        fine = True
        for case, found in alone(name, device):
            book.add("right", case, **found)
            fine &= found["status"] in ("ok", "skipped")
            print(case, found["status"], found.get("why", ""), flush=True)
        if fine:
            done.add(name)
            book.put("right", chunks=sorted(done))
        results = book.part("right").get("results", {})
        book.put("right", digest=right_lines(results))

    for name in names:  # what an earlier run found wrong is found again, or not
        stale = [f"{name}: stopped", f"{name}: ended"]
        results = {k: v for k, v in book.part("right").get("results", {}).items() if k not in stale}
        book.put("right", results=results)
    with ThreadPoolExecutor(1 if options.toy else 10) as pool:
        list(pool.map(chunk, names))
    results = book.part("right").get("results", {})
    book.put("right", digest=right_lines(results))
    return sum(found["status"] in ("wrong", "failed") for found in results.values())


def right_lines(results: dict[str, Any]) -> list[str]:
    """Say how many cases ended how, then what is wrong, noted or skipped."""
    count = Counter(found["status"] for found in results.values())
    said = ", ".join(f"{n} {status}" for status, n in count.most_common())
    why = {
        status: [
            f"{k}: {v['status']}: {v.get('why')}"
            for k, v in results.items()
            if v["status"] == status
        ]
        for status in ("wrong", "failed", "skipped")
    }
    noted = [f"{k}: {v['note']}" for k, v in results.items() if "note" in v]
    return [said, *why["wrong"], *why["failed"], *noted, *why["skipped"]]


def suite(device: torch.device, report: Path) -> list[str]:
    """Return the arguments of pytest; on a CPU a file whose tests need no GPU stands for all."""
    has = importlib.util.find_spec
    # Never without paths: other files import what a bare machine lacks.
    paths = [
        "tests/kernels",
        "tests/model/attention/test_gpu.py",
        "tests/model/test_diagnostics.py",
    ]
    command = ["-q", "-m", "gpu", "--junitxml", str(report), "-p", "no:cacheprovider"]
    if device.type == "cpu":
        return [*command[:1], *command[3:], "-m", "not gpu", *paths[2:]]
    command += ["-n", "6"] if has("xdist") else []
    command += ["--timeout", "60"] if has("pytest_timeout") else []
    return command + paths


def counted(report: Path) -> tuple[dict[str, int], list[str]]:
    """Return (tests by outcome, names and first lines of the failed) of a JUnit file."""
    count, failed = Counter(), []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kind = next((c.tag for c in case if c.tag in ("failure", "error", "skipped")), "passed")
        count[kind] += 1
        if kind in ("failure", "error"):
            why = next(c.get("message") or "" for c in case if c.tag == kind)
            first = (why.splitlines() or [""])[0]
            failed.append(
                f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}: {first}"
            )
    return dict(count), failed


def tests(book: Book, options: Options) -> int:
    """Run pytest and interrupt it in time for its report; return its failures."""
    report = options.out / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    begin = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", *suite(options.device, report)], cwd=ROOT
    )
    # An interrupted run of several workers writes its report 9 s later.
    spare = 15 if options.seconds > 60 else 2
    cut = False
    try:
        code = child.wait(options.seconds - spare - (time.monotonic() - begin))
    except subprocess.TimeoutExpired:
        cut = True
        child.send_signal(signal.SIGINT)
        code = child.wait()
    if not report.exists():
        book.put("tests", digest=[f"pytest ended with {code} and left no report"])
        return 1
    count, failed = counted(report)
    said = ", ".join(f"{n} {kind}" for kind, n in count.items()) or "no test ran"
    said += "; cut short at the limit" if cut else ""
    book.add("tests", "count", **count, cut_short=cut)
    book.put("tests", failed=failed, digest=[said, *failed])
    return code


WAITS = (
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "numpy",
    "cpu",
    "masked_select",
    "unique",
    "equal",
)
"""Methods of a tensor whose result the host waits for, on any device."""


def _ours(stack: Iterable[traceback.FrameSummary]) -> str | None:
    """Return file:line of the innermost frame that is fastpo's, else of the innermost one.

    None for checks of a CPU's tensors alone: on a GPU those return at once.
    """
    frames = [f for f in stack if f.filename != __file__]
    inner = [f for f in frames if "/fastpo/" in f.filename] or frames
    place = Path(inner[-1].filename)
    if place.name == "scores.py" and inner[-1].name == "__post_init__":
        return None
    return f"{'/'.join(place.parts[-2:])}:{inner[-1].lineno}"


@contextlib.contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count where the host waits: the driver's own warnings, on a CPU calls that would wait."""
    found: Counter[str] = Counter()
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")

            def show(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
                if "synchroniz" in str(message):
                    found[_ours(traceback.extract_stack()) or "?"] += 1

            with mock.patch.object(warnings, "showwarning", show):
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    yield found
                finally:
                    torch.cuda.set_sync_debug_mode(before)
        return
    inside = False

    def counting(old: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return old(*args, **kwargs)
            inside = True
            if (place := _ours(traceback.extract_stack())) is not None:
                found[place] += 1
            try:
                return old(*args, **kwargs)
            finally:
                inside = False

        return call

    def by_mask(old: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, index: Any, *more: Any) -> Any:
            several = index if isinstance(index, tuple) else (index,)
            masks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in several)
            return (counting(old) if masks else old)(self, index, *more)

        return call

    with contextlib.ExitStack() as stack:
        for name in WAITS:
            patched = counting(getattr(Tensor, name))
            stack.enter_context(mock.patch.object(Tensor, name, patched))
        patched = by_mask(Tensor.__getitem__)
        stack.enter_context(mock.patch.object(Tensor, "__getitem__", patched))
        yield found


def syncs(book: Book, options: Options) -> int:
    """Count host waits of a loss, frozen and by groups, and of a trainer's step."""
    device, sizes = options.device, checks.TOY if options.toy else checks.FULL
    kind, shape = sizes.dtypes[0], (sizes.widths[0], sizes.vocabularies[0])
    dtype = getattr(torch, kind)
    digest: list[str] = []

    def note(case: str, found: Counter[str]) -> None:
        book.add("syncs", case, count=found.total(), at=dict(found.most_common()))
        places = ", ".join(f"{place} {n}" for place, n in found.most_common(4))
        digest.append(f"{case}: {found.total()} waits" + (f" ({places})" if places else ""))

    def loss(schedule: str) -> None:
        batch = checks.make_batch("dpo", kind, sizes, device, shape)
        mib = checks.schedule_mib(schedule, "dpo", batch, sizes)
        backend = "torch" if options.toy else "triton"

        def run() -> None:
            checks.run_loss("dpo", batch, backend, schedule != "frozen", mib, dtype)

        run()  # compiles
        with waits(device) as found:
            run()
        note(f"dpo {schedule}, loss and backward", found)

    def step(_: str) -> None:
        from transformers import TrainerCallback

        found: Counter[str] = Counter()

        class Counting(TrainerCallback):
            """Count from the end of the first step to the end of the second one's backward."""

            def on_step_begin(self, args, state, control, **more: Any) -> None:
                if state.global_step == 1:
                    self.context = waits(device)
                    nonlocal found
                    found = self.context.__enter__()

            def on_pre_optimizer_step(self, args, state, control, **more: Any) -> None:
                if state.global_step == 1:
                    self.context.__exit__(None, None, None)

        with tempfile.TemporaryDirectory() as folder:
            wide = torch.float32 if options.toy else torch.bfloat16
            trainer = checks.make_trainer(
                sizes.model, device, wide, folder, callbacks=[Counting()], steps=2
            )
            trainer.train()
        note("trainer's second step, forward and backward", found)

    failed = each(("frozen", "by groups"), loss, device) + each(("step",), step, device)
    book.put("syncs", digest=digest)
    return failed


RUN = {"env": env, "right": right, "tests": tests, "syncs": syncs}


if __name__ == "__main__":
    raise SystemExit(run_part(RUN))
