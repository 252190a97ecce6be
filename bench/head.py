"""How fast, how lean and how exact is the head, next to its peers?

    python -m bench.head                      # the CPU grid, all threads
    python -m bench.head --grid gpu           # bfloat16 shapes of real models
    python -m bench.head --shape 4096,2048,128256 --dtype bfloat16
    python -m bench.head --quick              # seconds; nothing is kept
    python -m bench.head --page docs/benchmarks.md   # measure what is missing, rewrite the page

Tasks: `logps` (per-token log-probs with an arbitrary cotangent per token) and `dpo` (a whole DPO
step over the head, reference included). Modes: `forward`, `frozen` (gradient to the hidden states)
and `trained` (to the head too). Label tokens are compacted beforehand for everyone: TRL on CPU and
Liger would otherwise also pay for prompt and padding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.contenders import BETA, OURS, STEPS, TOKEN_OPS, Unavailable
from bench.harness import (
    GATE,
    PACKAGES,
    RESULTS,
    Outputs,
    Record,
    check,
    count_flop,
    device_slug,
    interleaved,
    memory_in_fresh_process,
    peak_extra_bytes,
    summary,
    write_opening,
)
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head

CASES = (
    ("logps", "forward"),
    ("logps", "frozen"),
    ("logps", "trained"),
    ("dpo", "frozen"),
    ("dpo", "trained"),
)
GRIDS = {
    "cpu": [(1024, 1024, 49152), (1024, 576, 49152), (256, 1024, 49152)],
    "gpu": [
        (1024, 4096, 128256),
        (8192, 2048, 128256),
        (8192, 4096, 32000),
        (8192, 4096, 128256),
        (8192, 3584, 256000),
        (16384, 8192, 128256),
        (65536, 4096, 151936),
    ],
    "quick": [(64, 32, 512)],
}
NUM_PAIRS = 4
# Rows of a block of the float64 truth: 49152 columns of them are 200 MB.
_TRUTH_ROWS = 512


class Inputs(NamedTuple):
    """Hold compacted label tokens whose softmax is as peaked as a language model's."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    ref_hidden: Tensor  # [N, D]
    cotangents: Tensor  # [N] fp32


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    r"""Hidden states aligned with their label's row, as training aligns them.

    Rows of W have unit length in expectation and h = m W_y + 2 noise, so that the other logits are
    normal with variance 4 and $\log\sum_{v \ne y} e^{z_v} \approx \log V + 2$. The margin over that
    has mean 0 and deviation 3: median p_y 0.5, deciles near 0.02 and 0.98.
    """
    n, d, v = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = normal(v, d).mul_(d**-0.5)
    labels = torch.randint(v, (n,), generator=generator, device=device)
    rows = weight[labels]
    rows /= rows.square().sum(1, keepdim=True)
    noise = normal(n, d).mul_(2)
    # The noise's own share of the label's logit is taken out, so that m alone decides p_y.
    noise -= (noise * weight[labels]).sum(1, keepdim=True) * rows
    margin = torch.tensor(float(v)).log() + 2 + 3 * normal(n, 1)
    hidden = margin * rows + noise
    ref_hidden = hidden + 0.2 * normal(n, d)
    return Inputs(hidden.to(dtype), weight.to(dtype), labels, ref_hidden.to(dtype), normal(n))


def dpo(logps: Tensor, ref_logps: Tensor, num_pairs: int = NUM_PAIRS) -> Tensor:
    """Return the loss of `contenders.STEPS`, for the truth."""
    chosen, rejected = (logps - ref_logps).view(2, num_pairs, -1).sum(-1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def less_label(log_p: Tensor, labels: Tensor) -> Tensor:
    """Return p - onehot [B, V] from log p, without cancellation at the label [B]."""
    label = labels[:, None]
    return log_p.exp().scatter_(1, label, log_p.gather(1, label).expm1())


def by_hand(inputs: Inputs, task: str, mode: str, dtype: torch.dtype) -> tuple[Outputs, Tensor]:
    """Return (outputs, p_y) by the closed form in `dtype`, a block of rows at a time.

    In float64 it is the truth, in the inputs' dtype the error that plain PyTorch makes.
    """
    weight = inputs.weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = range(0, len(inputs.labels), _TRUTH_ROWS)

    def log_probs(hidden: Tensor) -> Tensor:
        return (hidden.to(dtype) @ weight.T).to(wide).log_softmax(1)

    def label_logps(hidden: Tensor) -> Tensor:
        parts = [
            log_probs(hidden[lo : lo + _TRUTH_ROWS]).gather(
                1, inputs.labels[lo : lo + _TRUTH_ROWS, None]
            )
            for lo in blocks
        ]
        return torch.cat(parts).squeeze(1)

    logps = label_logps(inputs.hidden)
    p_label = logps.exp()
    cotangents = inputs.cotangents.to(wide)
    outputs = {"value": logps}
    if task == "dpo":
        leaf = logps.requires_grad_()
        loss = dpo(leaf, label_logps(inputs.ref_hidden))
        (cotangents,) = torch.autograd.grad(loss, leaf)
        outputs = {"value": loss.detach()}
    if mode == "forward":
        return outputs, p_label
    grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=wide)
    for lo in blocks:
        rows = slice(lo, lo + _TRUTH_ROWS)
        hidden = inputs.hidden[rows].to(dtype)
        c = less_label(log_probs(hidden), inputs.labels[rows])
        c = (c * -cotangents[rows, None]).to(dtype)
        grad_hidden.append(c @ weight)
        if mode == "trained":
            grad_weight += c.T @ hidden
    outputs["grad_hidden"] = torch.cat(grad_hidden)
    if mode == "trained":
        outputs["grad_weight"] = grad_weight
    return outputs, p_label


def bind(name: str, task: str, mode: str, inputs: Inputs) -> Callable[[], Outputs]:
    """Return the timed call of one contender: fresh leaves in, value and gradients out.

    Raises:
        Unavailable: the contender cannot run here.
    """
    device = inputs.hidden.device
    return called((TOKEN_OPS if task == "logps" else STEPS)[name](device), task, mode, inputs)


def called(
    op: Callable[..., Tensor], task: str, mode: str, inputs: Inputs, num_pairs: int = NUM_PAIRS
) -> Callable[[], Outputs]:
    """Return what `bind` does, of a token op or step that is there already."""
    more = () if task == "logps" else (inputs.ref_hidden, num_pairs)

    def run() -> Outputs:
        hidden = inputs.hidden.detach().requires_grad_(mode != "forward")
        weight = inputs.weight.detach().requires_grad_(mode == "trained")
        value = op(hidden, weight, inputs.labels, *more)
        outputs = {"value": value.detach()}
        if mode != "forward":
            value.backward(inputs.cotangents.to(value) if task == "logps" else None)
            outputs["grad_hidden"] = _grad(hidden)
        if mode == "trained":
            outputs["grad_weight"] = _grad(weight)
        return outputs

    return run


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def matmul_limit(inputs: Inputs, task: str, mode: str) -> tuple[int, Callable[[], None]]:
    """Return the matmuls that no method can do without: their count, and bare `torch.mm`s."""
    hidden, weight = inputs.hidden, inputs.weight
    # One chunk at a time where all logits would not fit: matmuls over V columns do not get slower.
    rows = min(len(hidden), max(1, (2 << 30) // (weight.shape[0] * hidden.element_size())))
    logits = hidden.new_empty(rows, weight.shape[0]).normal_()
    grad_hidden, grad_weight = torch.empty_like(hidden[:rows]), torch.empty_like(weight)
    forwards = 2 if task == "dpo" else 1

    def run() -> None:
        for lo in range(0, len(hidden), rows):
            part = hidden[lo : lo + rows]
            chunk = logits[: len(part)]
            for _ in range(forwards):
                torch.mm(part, weight.T, out=chunk)
            if mode != "forward":
                torch.mm(chunk, weight, out=grad_hidden[: len(part)])
            if mode == "trained":
                torch.mm(chunk.T, part, out=grad_weight)

    return forwards + ("forward", "frozen", "trained").index(mode), run


def planned_products(inputs: Inputs, task: str, mode: str) -> float:
    """Count the matmuls of fastpo's plan; its GPU kernels do some that no BLAS call shows."""
    work = Workload(
        len(inputs.labels),
        *inputs.weight.shape,
        dtype=inputs.hidden.dtype,
        needs_hidden=mode != "forward",
        needs_head=mode == "trained",
    )
    _, schedule, _ = plan_head(work, device=inputs.hidden.device)
    return schedule.matmuls + (task == "dpo")


def measure(
    key: dict, device: torch.device, options: argparse.Namespace, progress: tqdm
) -> dict[str, Any]:
    """Measure one case: gate, count, time, memory of everyone who can run it."""
    task, mode, shape = key["task"], key["mode"], tuple(key["shape"])
    dtype = getattr(torch, key["dtype"])
    inputs = make_inputs(shape, dtype, device)
    truth, p_label = by_hand(inputs, task, mode, torch.float64)
    plain, _ = by_hand(inputs, task, mode, dtype)
    product = 2 * shape[0] * shape[1] * shape[2]
    limit_products, limit = matmul_limit(inputs, task, mode)

    contenders: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {"limit": limit}
    for name in TOKEN_OPS if task == "logps" else STEPS:
        progress.set_postfix_str(f"{task} {mode} {name}: gate")
        if name in options.without:
            contenders[name] = {"status": "skipped", "reason": "--without"}
            continue
        try:
            run = bind(name, task, mode, inputs)
            run()  # compiles, packs, allocates: neither counted nor timed
            outputs, flop = count_flop(run)
            errors, rejected = check(outputs, truth, plain)
            del outputs
        except (Unavailable, torch.OutOfMemoryError) as why:
            contenders[name] = {"status": "skipped", "reason": str(why).splitlines()[0]}
            continue
        contenders[name] = {"status": "rejected" if rejected else "ok", "errors": errors}
        if rejected:
            contenders[name]["reason"] = rejected
            continue
        products = flop / product
        if name == OURS and device.type == "cuda":
            products = planned_products(inputs, task, mode)
        contenders[name] |= {
            "products": round(products, 2),
            "flop": round(products * product),
        }
        runs[name] = run
    del truth, plain

    progress.set_postfix_str(f"{task} {mode}: timing")
    seconds = interleaved(runs, options.rounds, device, options.cold, warmup=0)
    limit_seconds = summary(seconds.pop("limit"))
    for name, times in seconds.items():
        found = summary(times)
        # Paired within a round: what slows the whole machine down slows both.
        ratios = [t / ours for t, ours in zip(times, seconds[OURS], strict=True)]
        contenders[name] |= {
            "seconds": found,
            "times_ours": summary(ratios),
            "rounds": [round(t, 5) for t in times],
            "of_limit": round(limit_seconds["median"] / found["median"], 3),
        }
        if options.memory:
            progress.set_postfix_str(f"{task} {mode} {name}: memory")
            contenders[name]["peak_extra_bytes"] = (
                memory_in_fresh_process("bench.head", name, key, options.threads)
                if device.type == "cpu"
                else peak_extra_bytes(runs[name], device)
            )
    deciles = p_label.double().quantile(torch.tensor([0.1, 0.5, 0.9], device=device).double())
    return {
        "p_label": {"q10": deciles[0].item(), "q50": deciles[1].item(), "q90": deciles[2].item()},
        "limit": {
            "products": limit_products,
            "seconds": limit_seconds,
            "flop_per_second": round(limit_products * product / limit_seconds["median"]),
        },
        "contenders": contenders,
    }


def strongest_peer(contenders: dict[str, dict]) -> str | None:
    """Return the fastest contender that is not ours and is right."""
    peers = {n: c["seconds"]["median"] for n, c in contenders.items() if "seconds" in c}
    peers.pop(OURS, None)
    return min(peers, key=peers.__getitem__) if peers else None


def table(cases: Sequence[dict]) -> str:
    """Return all cases as Markdown; `x ours` is the rounds' median of the time next to fastpo's."""
    lines = []
    for case in cases:
        key, contenders = case["key"], case["contenders"]
        n, d, v = key["shape"]
        best = strongest_peer(contenders)
        lines += [
            f"\n{key['task']}, {key['mode']}: N {n}, D {d}, V {v}, {key['dtype']}"
            f" ({case['date']}, load {case['load_average']})\n",
            "| contender | median ms | quartiles | x ours | products | of limit | peak MiB "
            "| relative error: value, dH, dW |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, c in contenders.items():
            if "seconds" not in c:
                lines.append(f"| {name} | {c['status']}: {c['reason']} | | | | | | |")
                continue
            t = {k: 1000 * value for k, value in c["seconds"].items()}
            ratio = f"{c['times_ours']['median']:.2f}"
            memory = f"{c['peak_extra_bytes'] / 2**20:.0f}" if "peak_extra_bytes" in c else ""
            errors = ", ".join(f"{e['relative']:.1e}" for e in c["errors"].values())
            title = (
                f"**{name}**" if name == OURS else f"{name} (strongest)" * (name == best) or name
            )
            lines.append(
                f"| {title} | {t['median']:.4g} | {t['q25']:.4g}-{t['q75']:.4g} | {ratio} "
                f"| {c['products']:g} | {c['of_limit']:.2f} | {memory} | {errors} |"
            )
    return "\n".join(lines)


def page(data: dict, cases: Sequence[dict]) -> str:
    """Return a Markdown page with the method and the table of a record."""
    stamp, method = data["environment"], data["method"]
    versions = ", ".join(f"{name} {stamp[name] or 'absent'}" for name in PACKAGES)
    return f"""# Benchmarks of the head

`python -m bench.head --page FILE.md` measures what `bench/{RESULTS.name}/{stamp["slug"]}/head.json`
lacks and rewrites this page from that file; `--fresh` measures everything again, `--shape N,D,V`
one shape only.

Device: {stamp["device"]}, {stamp["threads"]} threads. Versions: {versions}.

- Inputs: {method["inputs"]}
- Layout: {method["layout"]}.
- Gate: {method["gate"]}; who fails it gets no speed.
- Time: {method["rounds"]} rounds, everyone once a round in rotating order, caches flushed before
  every call. `x ours` is the median over rounds of the time next to fastpo's in the same round.
- `products` counts matrix products of 2NDV FLOP. `of limit` is the time of the products that no
  method can do without, as bare `torch.mm`, over the contender's. `peak MiB` is the most memory
  alive beyond the inputs, gradients included, each contender in a process of its own.
{table(cases)}
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flag = argparse.BooleanOptionalAction
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--grid", choices=GRIDS, default="gpu" if on_gpu else "cpu")
    parser.add_argument("--shape", action="append", metavar="N,D,V", help="instead of a grid")
    parser.add_argument("--dtype", help="float32 on CPU, bfloat16 on GPU by default")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders")
    parser.add_argument("--cold", action=flag, default=True, help="flush caches before each run")
    parser.add_argument("--memory", action=flag, default=True, help="measure peak memory")
    parser.add_argument("--quick", action="store_true", help="tiny shape, no compile, no memory")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument("--out", type=Path, help="JSON; bench/results/DEVICE/head.json by default")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also write the table there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.grid, options.rounds, options.fresh = "quick", 3, True
        options.cold = options.memory = False
        options.without = [*options.without, "torch.compile", "CCE"]
        options.out = options.out or Path("runs/head-quick.json")
    if options.dtype is None:
        options.dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory_of:
        key = json.loads(options.memory_of)
        inputs = make_inputs(tuple(key["shape"]), getattr(torch, key["dtype"]), device)
        print(peak_extra_bytes(bind(key["name"], key["task"], key["mode"], inputs), device))
        return
    shapes = [tuple(map(int, s.split(","))) for s in options.shape or []] or GRIDS[options.grid]
    keys = [
        {"task": task, "mode": mode, "shape": list(shape), "dtype": options.dtype}
        for shape in shapes
        for task, mode in CASES
    ]
    method = {
        "inputs": " ".join((make_inputs.__doc__ or "").split()),
        "layout": f"label tokens compacted for everyone; dpo: {NUM_PAIRS} pairs of equal length",
        "gate": f"error <= {GATE} * (error of plain PyTorch in the same dtype + eps * scale)",
        "rounds": options.rounds,
        "cold_cache": options.cold,
    }
    path = options.out or RESULTS / device_slug(device) / "head.json"
    record = Record(path, device, method, options.fresh)
    with tqdm(record.missing(keys), disable=None) as progress:
        for key in progress:
            record.add(key, **measure(key, device, options, progress))
    cases = [case for case in record.data["cases"] if case["key"] in keys]
    print(table(cases))
    print(f"\n{path}")
    if options.page is not None:
        write_opening(options.page, page(record.data, cases))


if __name__ == "__main__":
    main()
