"""The head beside its peers on a GPU, with a truth that takes a second instead of minutes.

`bench.head` compares every number with float64; this looks at 512 rows and two columns of dW.
What fastpo takes stands beside what `bench.predict` says.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import predict
from bench.contenders import OURS, STEPS, TOKEN_OPS, Unavailable, fastpo_step
from bench.gpu.book import Book, Options, each, tidy
from bench.gpu.pieces import measure_piece, missing_pieces, piece_lines
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
from bench.head import Inputs, called, dpo, less_label, make_inputs, matmul_limit

MIB = {"256 MiB": 256, "1 GiB": 1024, "4 GiB": 4096}
SMALLEST = "256 MiB"
NUM_PAIRS = 16  # of 512 tokens at N = 8192, so that a group fits the smallest workspace
GIVEN = "dpo, reference given"
PIECES_AFTER = 4  # cases of fastpo's own schedules, which come first
TRUTH_ROWS, TRUTH_BLOCK = 512, 512


class Case(NamedTuple):
    """Hold one task of the head at one shape, and who is measured beside fastpo."""

    task: str
    mode: str
    shape: tuple[int, int, int]
    peers: tuple[str, ...] = ()
    sizes: tuple[str, ...] = (SMALLEST,)

    def key(self, dtype: str) -> dict[str, Any]:
        """Return the key of the record."""
        return {"task": self.task, "mode": self.mode, "shape": list(self.shape), "dtype": dtype}


def head_cases(part: str, toy: bool) -> list[Case]:
    """Return the cases in order of value."""
    if part == "head_a":
        shape = (128, 32, 512) if toy else (8192, 4096, 131072)
        # Elsewhere than on CUDA CCE is a torch.compile of seconds.
        tokens = ("TRL", "eager") if toy else ("TRL", "CCE", "torch.compile")
        steps = ("Liger", "TRL", "CCE")[: 2 if toy else 3]
        return [
            Case("logps", "frozen", shape, tokens),
            Case(GIVEN, "trained", shape, sizes=tuple(MIB)),
            Case("logps", "trained", shape, tokens),
            Case("logps", "forward", shape, tokens),
            Case("dpo", "trained", shape, steps, tuple(MIB)),
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
    """Return `bench.head.by_hand` for some rows of the values and of dH, and some columns of dW."""
    weight = inputs.weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def log_probs(hidden: Tensor) -> Tensor:
        return (hidden.to(dtype) @ weight.T).to(wide).log_softmax(1)

    def coefficients(pick: Tensor) -> Tensor:
        c = less_label(log_probs(inputs.hidden[pick]), inputs.labels[pick])
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
    """Return what `sampled` has of a contender's outputs."""
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
    """Return name -> maker of the timed call; `fastpo` has the smallest workspace."""
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
        found[own_name(size)] = lambda size=size: ours(MIB[size])
    return found | {name: lambda name=name: theirs(name) for name in case.peers}


def predicted(case: Case, mib: int) -> float:
    """Return the seconds that fastpo should take on an H200."""
    n, d, v = case.shape
    if case.task == "logps":
        of_mode = {"forward": predict.forward, "frozen": predict.frozen, "trained": predict.late}
        return of_mode[case.mode](n, d, v, mib).seconds
    reference = predict.forward(n, d, v, mib).seconds if case.task == "dpo" else 0.0
    return predict.groups(n, d, v, mib).seconds + reference


def own_name(size: str) -> str:
    """Return the name of fastpo with a workspace."""
    return OURS if size == SMALLEST else f"{OURS}, {size}"


def measure_head(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Gate, time and weigh everyone; who cannot run is recorded with the reason."""
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
    if predict.holds_for(device):
        for size in case.sizes:
            found[own_name(size)]["predicted_seconds"] = round(predicted(case, MIB[size]), 6)
    speed = round(limit_products * 2 * n * d * v / bare["median"])
    limits = {"products": limit_products, "seconds": bare, "flop_per_second": speed}
    return {"limit": limits, "contenders": found}


def head_lines(cases: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line a case: milliseconds of everyone, fastest first.

    Beside fastpo's stand those predicted, and the share of it that its bare products take.
    """
    lines = []
    for case in cases:
        key, every = case["key"], case["contenders"]
        timed = {n: c["seconds"]["median"] for n, c in every.items() if "seconds" in c}
        timed["limit"] = case["limit"]["seconds"]["median"]
        said = [
            f"{n} {1e3 * t:.3g}{_beside(every.get(n, {}))}"
            for n, t in sorted(timed.items(), key=lambda item: item[1])
        ]
        said += [f"{n} {c['status']}" for n, c in every.items() if "seconds" not in c]
        size = "x".join(map(str, key["shape"]))
        lines.append(f"{key['task']} {key['mode']} {size}, ms: {', '.join(said)}")
    return lines


def _beside(found: dict[str, Any]) -> str:
    if "predicted_seconds" not in found:
        return ""
    return f" (predicted {1e3 * found['predicted_seconds']:.3g}; {found['of_limit']:.2f} of bare)"


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
        of_cases = head_lines(c for c in record.data["cases"] if c["key"] in keys)
        return [*of_cases, *piece_lines(part, book)]

    def one(case: Case | str) -> None:
        if isinstance(case, str):
            measure_piece(case, part, book, options)
            return
        found = measure_head(case, getattr(torch, dtype), options.device)
        record.add(case.key(dtype), **found)
        book.put(part, digest=lines())

    todo: list[Case | str] = [case for case in cases if case.key(dtype) in missing]
    if part == "head_a":
        todo[PIECES_AFTER:PIECES_AFTER] = missing_pieces(part, book, options.toy)
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
