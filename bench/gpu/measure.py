"""How fast is this device? The later parts of `bench.gpu`, which runs each by itself."""

from __future__ import annotations

import importlib.util
import itertools
import json
from typing import Any
from unittest import mock

from bench.contenders import OURS
from bench.gpu.book import Book, Options, each, run_part
from bench.gpu.head import head
from bench.gpu.right import TOY
from bench.harness import Record


def tune(book: Book, options: Options) -> int:
    """Tune rows of the launch table, hottest first; the table itself stays as it is."""
    if options.toy:
        book.put("tune", digest=["not timed: a CPU runs no kernels"])
        return 0
    from bench import tune_head

    # Its record belongs beside the others.
    with (
        mock.patch.object(tune_head, "RESULTS", options.out.parent),
        mock.patch.object(tune_head, "device_slug", return_value=options.out.name),
    ):
        tune_head.main(["--dry-run", "--budget", str(max(5, round(options.seconds - 15)))])
    cases = json.loads((options.out / "tune_head.json").read_text())["cases"]
    book.put("tune", digest=[f"{len(cases)} rows: python -m bench.tune_head takes them over"])
    return 0


def numerics(book: Book, options: Options) -> int:
    """Run `bench.numerics` case by case; ten compilations would take most of a minute."""
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
    """Run `bench.losses` at four shapes; torch.compile at the first of them alone."""
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
    """Run `bench.step` at a pair and at a list of eight."""
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
    """Return prompts of 32K and 64K less a response on 8B, of 16K on 70B."""
    from bench import long_context as bench

    pair = dict(bench._PAIR)
    if toy:
        small = {**TOY.model, "num_hidden_layers": 3}
        pair |= {"response": 16, "rank": 4, "model": small, "method": "lora", **bench._CPU}
        lever: dict[str, Any] = {"mlp_tile": "auto"} if part == "8b" else {"offload": True}
        return [{**pair, "context": 80, **lever}]
    if part == "8b":
        pair |= {"model": "llama-3-8b", "method": "lora", "mlp_tile": "auto"}
        return [{**pair, "context": context} for context in (32768 + 512, 65536)]
    pair |= {"model": "llama-3-70b", "method": "qlora", "mlp_tile": "auto", "offload": True}
    return [{**pair, "context": 16384 + 512}]


def long_context(part: str, book: Book, options: Options) -> int:
    """Measure seconds and peak of a step, next to the planner's word on it."""
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
        # A toy step may fit what the process holds already.
        over = case["predicted_extra_bytes"] / max(1, case["peak_extra_bytes"]) - 1
        digest.append(
            f"{size}: {case['seconds']:.3g} s a step, {case['peak_extra_bytes'] / 2**30:.2f} GiB "
            f"beyond the model (planned {over:+.1%}), "
            f"host {case['peak_resident_bytes'] / 2**30:.1f} GiB"
        )
    book.put(part, digest=digest)
    return failed


RUN = {
    "tune": tune,
    "head_a": lambda book, options: head("head_a", book, options),
    "head_b": lambda book, options: head("head_b", book, options),
    "numerics": numerics,
    "losses": losses,
    "step": step,
    "8b": lambda book, options: long_context("8b", book, options),
    "70b": lambda book, options: long_context("70b", book, options),
}


if __name__ == "__main__":
    raise SystemExit(run_part(RUN))
