"""The parts of `bench.gpu`, each run by it as `python -m bench.gpu_parts PART`.

A part writes every case as soon as it has it, then the lines that sum it up, and ends with a status
other than 0 if anything was wrong. What an earlier run finished is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import torch
from torch import Tensor
from tqdm import tqdm

from bench import gpu_right
from bench.contenders import OURS, STEPS, TOKEN_OPS, Unavailable, fastpo_step
from bench.gpu import ROOT, Book
from bench.harness import (
    GATE,
    Outputs,
    Record,
    check,
    count_flop,
    interleaved,
    peak_extra_bytes,
    summary,
)
from bench.head import Inputs, called, dpo, make_inputs, matmul_limit


class Options(NamedTuple):
    """What the runner passes on."""

    out: Path
    device: torch.device
    seconds: float

    @property
    def toy(self) -> bool:
        """A CPU runs every part, on shapes that test the part and nothing else."""
        return self.device.type == "cpu"


def tidy(device: torch.device) -> None:
    """Leave nothing of one case to the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def each(cases: Iterable[Any], run: Callable[[Any], None], device: torch.device) -> int:
    """Run every case, whatever becomes of the others; how many failed."""
    failed = 0
    for case in cases:
        try:
            run(case)
        except Exception:  # the next case may fit, or compile
            traceback.print_exc()
            failed += 1
        tidy(device)
    return failed


# ---- smoke -------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Median time of a call; on a GPU by events, without the host's share."""
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
    """What kernels and their cache depend on."""
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


def products(
    m: int, d: int, v: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The head's three products of M tokens, as bare calls into their place."""
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
    """Versions, copy speed and products; each product once if it is not there."""
    device, toy = options.device, options.toy
    book.add("env", "versions", **versions(device))
    size = 1 << (22 if toy else 32)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    took = seconds_of(lambda: target.copy_(source), device)
    copied = round(2 * size / took / 1e9, 1)
    book.add("env", "copy", gb_per_second=copied, bytes=size)
    digest = [f"copy {copied} GB/s"]
    del source, target
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
    a, b = (torch.randn(square, square, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    speed = rate(f"mm {square}", 2 * square**3, lambda: torch.mm(a, b, out=out))
    digest.append(f"mm {square}^3 {speed} TFLOP/s")
    del a, b, out
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


def _chunk_alone(name: str, device: torch.device) -> Iterator[gpu_right.Verdict]:
    """A chunk in a process of its own: a crash there is the chunk's last case."""
    command = [sys.executable, "-m", "bench.gpu_right", name, "--device", str(device)]
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
    """Every chunk of `gpu_right`, six at a time on a GPU; how many cases were not right."""
    device = options.device
    done = set(book.part("right").get("chunks", []))
    names = [n for n in gpu_right.chunks(gpu_right.FULL) if n not in done]
    if options.toy:
        names = [n for n in gpu_right.chunks(gpu_right.TOY) if n not in done]

    def chunk(name: str) -> None:
        alone = gpu_right.run_chunk if options.toy else _chunk_alone
        fine = True
        for case, found in alone(name, device):
            book.add("right", case, **found)
            fine &= found["status"] in ("ok", "skipped")
            print(case, found["status"], found.get("why", ""), flush=True)
        if fine:
            done.add(name)
            book.put("right", chunks=sorted(done))

    for name in names:  # what an earlier run found wrong is found again, or not
        stale = [f"{name}: stopped", f"{name}: ended"]
        results = {k: v for k, v in book.part("right").get("results", {}).items() if k not in stale}
        book.put("right", results=results)
    with ThreadPoolExecutor(1 if options.toy else 6) as pool:
        list(pool.map(chunk, names))
    results = book.part("right")["results"]
    count = Counter(found["status"] for found in results.values())
    bad = {k: v for k, v in results.items() if v["status"] in ("wrong", "failed")}
    noted = [f"{k}: {v['note']}" for k, v in results.items() if "note" in v]
    said = ", ".join(f"{n} {status}" for status, n in count.most_common())
    wrong = [f"{k}: {v['status']}: {v.get('why')}" for k, v in bad.items()]
    skipped = [f"{k}: {v['why']}" for k, v in results.items() if v["status"] == "skipped"]
    book.put("right", digest=[said, *wrong, *noted, *skipped])
    return len(bad)


def suite(device: torch.device, report: Path) -> list[str]:
    """The arguments of pytest; on a CPU the file whose tests need no GPU stands for the rest."""
    has = importlib.util.find_spec
    # Never without paths: other files import what a bare machine lacks.
    paths = [
        "tests/kernels",
        "tests/model/test_attention_gpu.py",
        "tests/model/test_diagnostics.py",
    ]
    command = ["-q", "-m", "gpu", "--junitxml", str(report), "-p", "no:cacheprovider"]
    if device.type == "cpu":
        return [*command[:1], *command[3:], "-m", "not gpu", *paths[2:]]
    command += ["-n", "6"] if has("xdist") else []
    command += ["--timeout", "60"] if has("pytest_timeout") else []
    return command + paths


def counted(report: Path) -> tuple[dict[str, int], list[str]]:
    """(number of tests by outcome, names and first lines of those that failed) of a JUnit file."""
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
    """Run pytest and interrupt it in time for its report; its failures."""
    report = options.out / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    begin = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", *suite(options.device, report)], cwd=ROOT
    )
    # Six workers take a few seconds to say what they have.
    spare = 10 if options.seconds > 40 else 2
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


def _ours(stack: Iterable[traceback.FrameSummary]) -> str:
    """file:line of the innermost frame that is fastpo's, else of the innermost one."""
    frames = [f for f in stack if "gpu_parts" not in f.filename]
    inner = [f for f in frames if "/fastpo/" in f.filename] or frames
    place = Path(inner[-1].filename)
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
                    found[_ours(traceback.extract_stack())] += 1

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
            found[_ours(traceback.extract_stack())] += 1
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
    """Host waits of a loss, frozen and by groups, and of a trainer's step."""
    device, sizes = options.device, gpu_right.TOY if options.toy else gpu_right.FULL
    kind, shape = sizes.dtypes[0], (sizes.widths[0], sizes.vocabularies[0])
    dtype = getattr(torch, kind)
    digest: list[str] = []

    def note(case: str, found: Counter[str]) -> None:
        book.add("syncs", case, count=found.total(), at=dict(found.most_common()))
        places = ", ".join(f"{place} {n}" for place, n in found.most_common(4))
        digest.append(f"{case}: {found.total()} waits" + (f" ({places})" if places else ""))

    def loss(schedule: str) -> None:
        batch = gpu_right.make_batch("dpo", kind, sizes, device, shape)
        held = gpu_right.SCHEDULES[schedule] * 2 * sizes.response
        mib = held * shape[1] * 4 / 2**20
        backend = "torch" if options.toy else "triton"

        def run() -> None:
            gpu_right.run_loss("dpo", batch, backend, schedule != "frozen", mib, dtype)

        run()  # compiles
        with waits(device) as found:
            run()
        note(f"dpo {schedule}, loss and backward", found)

    def step(_: str) -> None:
        from transformers import TrainerCallback

        found: Counter[str] = Counter()

        class Counting(TrainerCallback):
            """From the end of the first step to the end of the second one's backward."""

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
            trainer = gpu_right.make_trainer(
                sizes.model, device, wide, folder, callbacks=[Counting()], steps=2
            )
            trainer.train()
        note("trainer's second step, forward and backward", found)

    failed = each(("frozen", "by groups"), loss, device) + each(("step",), step, device)
    book.put("syncs", digest=digest)
    return failed


# ---- measure -----------------------------------------------------------------------------------


def tune(book: Book, options: Options) -> int:
    """Rows of the launch table, hottest first; the table itself stays as it is."""
    if options.toy:
        book.put("tune", digest=["not timed: a CPU runs no kernels"])
        return 0
    from bench import tune_head

    # Its record belongs beside the others.
    with (
        mock.patch.object(tune_head, "RESULTS", options.out.parent),
        mock.patch.object(tune_head, "device_slug", lambda device: options.out.name),
    ):
        tune_head.main(["--dry-run", "--budget", str(max(5, round(options.seconds - 15)))])
    cases = json.loads((options.out / "tune_head.json").read_text())["cases"]
    book.put("tune", digest=[f"{len(cases)} rows: python -m bench.tune_head takes them over"])
    return 0


MIB = {"256 MiB": 256, "1 GiB": 1024, "4 GiB": 4096}
SMALLEST = "256 MiB"
NUM_PAIRS = 16  # of 512 tokens at N = 8192, so that a group fits the smallest workspace
GIVEN = "dpo, reference given"
TRUTH_ROWS, TRUTH_BLOCK = 512, 512


class Case(NamedTuple):
    """One task of the head at one shape, and who is measured beside fastpo."""

    task: str
    mode: str
    shape: tuple[int, int, int]
    peers: tuple[str, ...] = ()
    sizes: tuple[str, ...] = (SMALLEST,)

    def key(self, dtype: str) -> dict[str, Any]:
        """Of the record."""
        return {"task": self.task, "mode": self.mode, "shape": list(self.shape), "dtype": dtype}


def head_cases(part: str, toy: bool) -> list[Case]:
    """In order of value."""
    if part == "head_a":
        shape = (128, 32, 512) if toy else (8192, 4096, 131072)
        # Elsewhere than on CUDA CCE is a torch.compile of seconds.
        tokens = ("TRL", "eager") if toy else ("TRL", "CCE", "torch.compile")
        steps = ("Liger", "TRL", "CCE")[: 2 if toy else 3]
        return [
            Case("logps", "frozen", shape, tokens),
            Case(GIVEN, "trained", shape, sizes=tuple(MIB)),
            Case("logps", "forward", shape, tokens),
            Case("dpo", "trained", shape, steps, tuple(MIB)),
            Case("logps", "trained", shape, tokens),
        ]
    shapes = [(64, 32, 512)] if toy else [(2048, 4096, 128256), (32768, 4096, 128256)]
    return [
        Case("logps", mode, shape, () if toy else ("CCE",))
        for shape in shapes
        for mode in ("frozen", "trained", "forward")
    ]


def sampled(
    inputs: Inputs, task: str, mode: str, dtype: torch.dtype, rows: Tensor, columns: list[int]
) -> Outputs:
    """`bench.head.by_hand` for some rows of the values and of dH, and some columns of dW."""
    weight = inputs.weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def log_probs(hidden: Tensor) -> Tensor:
        return (hidden.to(dtype) @ weight.T).to(wide).log_softmax(1)

    def coefficients(pick: Tensor) -> Tensor:
        label = inputs.labels[pick, None]
        log_p = log_probs(inputs.hidden[pick])
        c = log_p.exp()
        c.scatter_(1, label, log_p.gather(1, label).expm1())
        return (c * -cotangents[pick, None]).to(dtype)

    everyone = torch.arange(len(inputs.labels), device=rows.device).split(TRUTH_BLOCK)

    def label_logps(hidden: Tensor, picks: Sequence[Tensor]) -> Tensor:
        parts = [log_probs(hidden[p]).gather(1, inputs.labels[p, None]) for p in picks]
        return torch.cat(parts).squeeze(1)

    cotangents = inputs.cotangents.to(wide)
    if task == "logps":
        outputs = {"value": label_logps(inputs.hidden, rows.split(TRUTH_BLOCK))}
    else:
        leaf = label_logps(inputs.hidden, everyone).requires_grad_()
        loss = dpo(leaf, label_logps(inputs.ref_hidden, everyone), NUM_PAIRS)
        (cotangents,) = torch.autograd.grad(loss, leaf)
        outputs = {"value": loss.detach()}
    if mode == "forward":
        return outputs
    outputs["grad_hidden"] = torch.cat([coefficients(p) @ weight for p in rows.split(TRUTH_BLOCK)])
    if mode == "trained":
        narrow = inputs.hidden[:, columns].to(dtype)
        dw = torch.zeros(len(weight), len(columns), dtype=wide, device=rows.device)
        for pick in everyone:
            dw += coefficients(pick).T @ narrow[pick]
        outputs["grad_weight"] = dw
    return outputs


def picked(outputs: Outputs, task: str, rows: Tensor, columns: list[int]) -> Outputs:
    """What `sampled` has of a contender's outputs."""
    found = dict(outputs)
    if task == "logps":
        found["value"] = found["value"][rows]
    if "grad_hidden" in found:
        found["grad_hidden"] = found["grad_hidden"][rows]
    if "grad_weight" in found:
        found["grad_weight"] = found["grad_weight"][:, columns]
    return found


def head_contenders(
    case: Case, inputs: Inputs, device: torch.device
) -> dict[str, Callable[[], Callable[[], Outputs]]]:
    """name -> maker of the timed call; `fastpo` is the one with the smallest workspace."""
    import fastpo

    def ours(mib: int) -> Callable[[], Outputs]:
        if case.task == "logps":
            return called(
                lambda h, w, y: fastpo.linear_logps(h, w, y, workspace_mib=mib),
                case.task, case.mode, inputs,
            )  # fmt: skip
        if case.task == "dpo":
            step = fastpo_step(device, workspace_mib=mib)
            return called(step, case.task, case.mode, inputs, NUM_PAIRS)
        loss = fastpo.PreferenceLoss("dpo", beta=0.1)
        rows = 2 * NUM_PAIRS
        with torch.no_grad():
            ref = fastpo.linear_logps(inputs.ref_hidden, inputs.weight, inputs.labels)

        def given(h: Tensor, w: Tensor, y: Tensor, *more: Any) -> Tensor:
            return loss(
                h.view(rows, -1, h.shape[-1]),
                y.view(rows, -1),
                weight=w,
                ref_logps=ref.view(rows, -1),
                workspace_mib=mib,
            ).loss

        return called(given, "dpo", case.mode, inputs, NUM_PAIRS)

    def theirs(name: str) -> Callable[[], Outputs]:
        op = (TOKEN_OPS if case.task == "logps" else STEPS)[name](device)
        return called(op, case.task, case.mode, inputs, NUM_PAIRS)

    found: dict[str, Callable[[], Callable[[], Outputs]]] = {}
    for size in case.sizes:
        name = OURS if size == SMALLEST else f"{OURS}, {size}"
        found[name] = lambda size=size: ours(MIB[size])
    return found | {name: lambda name=name: theirs(name) for name in case.peers}


def measure_head(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Gate, time and memory of everyone; who cannot run is recorded with the reason."""
    inputs = make_inputs(case.shape, dtype, device)
    n, d, v = case.shape
    rows = torch.linspace(0, n - 1, min(n, TRUTH_ROWS), device=device).long()
    columns = [0, d // 2 + 1]
    truth = sampled(inputs, case.task, case.mode, torch.float64, rows, columns)
    plain = sampled(inputs, case.task, case.mode, dtype, rows, columns)
    forwards = "dpo" if case.task == "dpo" else "logps"
    limit_products, limit = matmul_limit(inputs, forwards, case.mode)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {"limit": limit}
    for name, make in head_contenders(case, inputs, device).items():
        print(f"{case.task} {case.mode} {case.shape}: {name}", flush=True)
        tidy(device)
        try:
            run = make()
            run()  # compiles, packs, allocates: neither counted nor timed
            outputs, flop = count_flop(run)
            mine = picked(outputs, case.task, rows, columns)
            del outputs
            errors, rejected = check(mine, truth, plain)
        except Unavailable as why:
            found[name] = {"status": "skipped", "reason": str(why)}
            continue
        except Exception as why:  # a peer's compiler may raise anything
            traceback.print_exc()
            reason = f"{type(why).__name__}: {(str(why).strip() or '?').splitlines()[0]}"
            found[name] = {"status": "failed", "reason": reason}
            continue
        found[name] = {"status": "rejected" if rejected else "ok", "errors": errors}
        if rejected:
            found[name]["reason"] = rejected
            continue
        # Products inside a kernel are not counted: a fused recompute shows one fewer.
        found[name]["products"] = round(flop / (2 * n * d * v), 2)
        runs[name] = run
    del truth, plain
    tidy(device)
    times = interleaved(runs, 5, device, cold=device.type == "cuda", warmup=0)
    bare = summary(times.pop("limit"))
    for name, seconds in times.items():
        median = summary(seconds)
        found[name] |= {
            "seconds": median,
            "rounds": [round(t, 5) for t in seconds],
            "of_limit": round(bare["median"] / median["median"], 3),
        }
        if OURS in times:
            ratios = [t / ours for t, ours in zip(seconds, times[OURS], strict=True)]
            found[name]["times_ours"] = summary(ratios)
        if device.type == "cuda":
            tidy(device)
            found[name]["peak_extra_bytes"] = peak_extra_bytes(runs[name], device)
    speed = round(limit_products * 2 * n * d * v / bare["median"])
    limits = {"products": limit_products, "seconds": bare, "flop_per_second": speed}
    return {"limit": limits, "contenders": found}


def head_lines(cases: Iterable[dict[str, Any]]) -> list[str]:
    """A line a case: milliseconds of everyone, fastest first."""
    lines = []
    for case in cases:
        key, every = case["key"], case["contenders"]
        timed = {n: c["seconds"]["median"] for n, c in every.items() if "seconds" in c}
        timed["limit"] = case["limit"]["seconds"]["median"]
        said = [f"{n} {1e3 * t:.3g}" for n, t in sorted(timed.items(), key=lambda item: item[1])]
        said += [f"{n} {c['status']}" for n, c in every.items() if "seconds" not in c]
        size = "x".join(map(str, key["shape"]))
        lines.append(f"{key['task']} {key['mode']} {size}, ms: {', '.join(said)}")
    return lines


def head(part: str, book: Book, options: Options) -> int:
    """Measure what head.json lacks; fastpo's own failures count, a peer's do not."""
    dtype = "float32" if options.toy else "bfloat16"
    method = {
        "inputs": " ".join((make_inputs.__doc__ or "").split()),
        "layout": f"label tokens compacted for everyone; dpo: {NUM_PAIRS} pairs of equal length",
        "gate": f"error <= {GATE} * (error of plain PyTorch in the same dtype + eps * scale), at "
        f"{TRUTH_ROWS} rows of the values and of dH and at two columns of dW",
        "workspace": f"of {OURS!r}: {SMALLEST}; others by name",
        "rounds": 5,
        "cold_cache": not options.toy,
    }
    record = Record(options.out / "head.json", options.device, method)
    cases = head_cases(part, options.toy)
    keys = [case.key(dtype) for case in cases]
    missing = record.missing(keys)

    def lines() -> list[str]:
        return head_lines(c for c in record.data["cases"] if c["key"] in keys)

    def one(case: Case) -> None:
        found = measure_head(case, getattr(torch, dtype), options.device)
        record.add(case.key(dtype), **found)
        book.put(part, digest=lines())

    todo = [case for case in cases if case.key(dtype) in missing]
    failed = each(todo, one, options.device)
    print("\n".join(lines()))
    mine = [
        f"{key['task']} {key['mode']}: {name}: {c['status']}: {c['reason']}"
        for key, every in ((c["key"], c["contenders"]) for c in record.data["cases"])
        for name, c in every.items()
        if key in keys and name.startswith(OURS) and c["status"] != "ok"
    ]
    book.put(part, digest=[*mine, *lines()])
    return failed + len(mine)


def numerics(book: Book, options: Options) -> int:
    """`bench.numerics` case by case; ten compilations would take most of a minute."""
    from bench import numerics as bench

    without = ["torch.compile", *(["CCE"] if options.toy else [])]
    shape = list(bench.QUICK if options.toy else bench.SHAPE)
    keys = [
        {"task": task, "dtype": dtype, "p": p, "shape": shape}
        for task in bench.TASKS
        for dtype in bench.DTYPES
        for p in bench.P_LABEL
    ]
    done = book.part("numerics").get("results", {})

    def one(key: dict[str, Any]) -> None:
        book.add(
            "numerics", json.dumps(key), key=key, **bench.measure(key, options.device, without)
        )

    failed = each([key for key in keys if json.dumps(key) not in done], one, options.device)
    results = list(book.part("numerics").get("results", {}).values())
    digest = []
    for task, dtype in itertools.product(bench.TASKS, bench.DTYPES):
        mine = [
            r["errors"] for r in results if (r["key"]["task"], r["key"]["dtype"]) == (task, dtype)
        ]
        worst = {
            name: max(max(e[name].values()) for e in mine)
            for name in (mine[0] if mine else {})
            if all(isinstance(e[name], dict) for e in mine)
        }
        said = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
        digest.append(f"{task} {dtype}, worst relative error: {said}")
        if mine and OURS not in worst:
            failed += 1
    book.put("numerics", digest=digest)
    return failed


def losses(book: Book, options: Options) -> int:
    """`bench.losses` at four shapes; torch.compile at the first of them alone."""
    from bench import losses as bench

    cases = ["dpo,512,2", "dpo,16384,2", "lipo,4096,8", "plackett_luce,4096,8"]
    grid = "gpu"
    if options.toy:
        cases, grid = ["dpo,8,2", "lipo,8,4"], "quick"
    path = options.out / "losses.json"

    def one(case: str) -> None:
        compiles = case == cases[0] and not options.toy
        arguments = ["--grid", grid, "--case", case, "--out", str(path), "--rounds", "10"]
        arguments += ["--device", str(options.device)]
        bench.main([*arguments, *([] if compiles else ["--without", bench.COMPILED])])

    failed = each(cases, one, options.device)
    digest = []
    for case in json.loads(path.read_text())["cases"] if path.exists() else []:
        key, every = case["key"], case["contenders"]
        said = [
            f"{n} {1e6 * c['seconds']['median']:.0f}" for n, c in every.items() if "seconds" in c
        ]
        said += [f"{n} {c['status']}" for n, c in every.items() if c["status"] == "rejected"]
        failed += every.get(bench.OURS, {"status": "ok"})["status"] != "ok"
        shape = f"{key['objective']} {key['groups']}x{key['candidates']}"
        digest.append(f"{shape}, us: {', '.join(said)}")
    book.put("losses", digest=digest)
    return failed


def step(book: Book, options: Options) -> int:
    """`bench.step` at a pair and at a list of eight."""
    from bench import step as bench

    cases, grid = ["2048,128,2", "2048,256,8"], "gpu"
    if options.toy:
        cases, grid = ["48,8,2"], "quick"
    path = options.out / "step.json"
    missing = [] if importlib.util.find_spec("trl") else ["TRL", bench.COMPACTED]

    def one(case: str) -> None:
        arguments = ["--grid", grid, "--case", case, "--out", str(path), "--rounds", "3"]
        arguments += ["--device", str(options.device), "--without", *missing]
        bench.main([*arguments, *(["--no-memory"] if options.toy else [])])

    failed = each(cases, one, options.device)
    digest = [f"{name} skipped: trl is not installed" for name in missing[:1]]
    for case in json.loads(path.read_text())["cases"] if path.exists() else []:
        key, every = case["key"], case["contenders"]
        said = [f"{n} {c['seconds']['median']:.3g}" for n, c in every.items() if "seconds" in c]
        said += [f"{n} {c['status']}: {c['reason']}" for n, c in every.items() if "reason" in c]
        failed += every[OURS]["status"] != "ok"
        shape = f"{key['prompt']} + {key['candidates']} x {key['response']}"
        digest.append(f"{shape}, s: {', '.join(said)}")
    book.put("step", digest=digest)
    return failed


def long_cases(part: str, toy: bool) -> list[dict[str, Any]]:
    """Prompts of 32K and 64K less a response on 8B, of 16K on 70B."""
    from bench import long_context as bench

    pair = dict(bench._PAIR)
    if toy:
        small = {**gpu_right.TOY.model, "num_hidden_layers": 3}
        pair |= {"response": 16, "rank": 4, "model": small, "method": "lora", **bench._CPU}
        lever: dict[str, Any] = {"mlp_tile": "auto"} if part == "8b" else {"offload": True}
        return [{**pair, "context": 80, **lever}]
    if part == "8b":
        pair |= {"model": "llama-3-8b", "method": "lora", "mlp_tile": "auto"}
        return [{**pair, "context": context} for context in (32768 + 512, 65536)]
    pair |= {"model": "llama-3-70b", "method": "qlora", "mlp_tile": "auto", "offload": True}
    return [{**pair, "context": 16384 + 512}]


def long_context(part: str, book: Book, options: Options) -> int:
    """Seconds and peak of a step, next to the planner's word on it."""
    from bench import long_context as bench

    method = {"steps": "forward and backward of one group, the second of two", "note": bench._SLOW}
    record = Record(options.out / "long_context.json", options.device, method)
    cases = long_cases(part, options.toy)

    def one(case: dict[str, Any]) -> None:
        said = bench.predicted_extra(case, options.device)
        found = bench.measure(case, options.device)
        record.add(case, predicted_extra_bytes=said, **found)

    failed = each(record.missing(cases), one, options.device)
    digest = []
    for case in record.data["cases"]:
        if case["key"] not in cases:
            continue
        size = f"context {case['key']['context']}"
        if not case["fits"]:
            digest.append(f"{size}: does not fit")
            continue
        over = case["predicted_extra_bytes"] / case["peak_extra_bytes"] - 1
        digest.append(
            f"{size}: {case['seconds']:.3g} s a step, peak {case['peak_extra_bytes'] / 2**30:.2f} "
            f"GiB beyond the model (planned {over:+.1%}), host {case['peak_resident_bytes'] / 2**30:.1f} GiB"
        )
    book.put(part, digest=digest)
    return failed


RUN: dict[str, Callable[[Book, Options], int]] = {
    "env": env,
    "right": right,
    "tests": tests,
    "syncs": syncs,
    "tune": tune,
    "head_a": lambda book, options: head("head_a", book, options),
    "head_b": lambda book, options: head("head_b", book, options),
    "numerics": numerics,
    "losses": losses,
    "step": step,
    "8b": lambda book, options: long_context("8b", book, options),
    "70b": lambda book, options: long_context("70b", book, options),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("part", choices=RUN)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="until it is ended")
    given = parser.parse_args(arguments)
    options = Options(given.out, torch.device(given.device), given.seconds)
    if options.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trainer takes a GPU where it sees one
    failed = RUN[given.part](Book(given.out), options)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
