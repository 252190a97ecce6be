"""How fast is a loss, once the scores of the responses are there?

    python -m bench.losses                    # the CPU grid
    python -m bench.losses --grid gpu
    python -m bench.losses --quick            # seconds; nothing is kept
    python -m bench.losses --page docs/benchmarks.md   # measure what is missing, write the section

The loss of B groups of K responses and its gradient to the scores, in float32.

`eager`, the pure function that specifies the objective; `torch.compile` of it; and,
where kernels run, `fused`, its kernel. On a CPU fastpo itself runs the pure function: there is no
fused contender, and the comparison is eager against compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.harness import (
    GATE,
    PACKAGES,
    RESULTS,
    Outputs,
    Record,
    check,
    device_slug,
    interleaved,
    summary,
    write_section,
)
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.lipo import tie_keys

Loss = Callable[[dict[str, Tensor]], Tensor]

OURS, EAGER, COMPILED = "fused", "eager", "torch.compile"
PAIRS, LISTS = ("dpo", "orpo"), ("plackett_luce", "lipo", "infonca")
SCORE_OF = {"orpo": "mean_logps"}
"""The score that carries the gradient; the log-ratio of sums for all others."""

GRIDS = {
    "cpu": [
        (PAIRS, [(16, 2), (512, 2), (16384, 2)]),
        (LISTS, [(16, 8), (4096, 8), (256, 64)]),
    ],
    "gpu": [
        (PAIRS, [(16, 2), (512, 2), (4096, 2), (16384, 2)]),
        (LISTS, [(16, 8), (512, 8), (4096, 8), (16384, 8), (4096, 2), (4096, 64)]),
    ],
    "quick": [(("dpo",), [(8, 2)]), (("lipo",), [(8, 4)])],
}
"""name -> (objectives, their shapes (B, K))"""


def make_scores(shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Sums of log-ratios of deviation 20, means of log-probs around -1, grades in [0, 1].

    Half of the lists of more than two are shorter, down to two candidates.
    """
    b, k = shape
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    length = (50 + 400 * uniform(b, k)).round()
    mean_logps = -0.2 - 1.6 * uniform(b, k)
    sizes = (2 + (k - 1) * uniform(b)).clamp(max=k).where(uniform(b) < 0.5, float(k))
    column = torch.arange(k, device=device)
    score = uniform(b, k)
    return {
        "ratio": 20 * torch.randn(b, k, generator=generator, device=device),
        "logps": length * mean_logps,
        "mean_logps": mean_logps,
        "score": score,
        "rank": (-score).argsort(-1).argsort(-1),
        "label": (column == 0).expand(b, k),
        "mask": column < sizes.floor()[:, None],
        "tie_key": tie_keys(torch.arange(b, device=device), k),
    }


def contenders(name: str, device: torch.device) -> dict[str, Loss]:
    """Return named functions from scores to the losses [B] of the preference term."""
    objective = OBJECTIVES[name]

    def eager(scores: dict[str, Tensor]) -> Tensor:
        return objective.fn(*(scores[need] for need in objective.needs)).terms[0].values

    torch._dynamo.reset()  # every shape is its own specialisation, and there is a limit of eight
    found: dict[str, Loss] = {EAGER: eager, COMPILED: torch.compile(eager, dynamic=False)}
    if device.type == "cuda":
        from fastpo.loss import fused

        def kernel(scores: dict[str, Tensor]) -> Tensor:
            outcome = fused.evaluate(objective, {}, scores)
            assert outcome is not None
            return outcome.terms[0].values

        found = {OURS: kernel, **found}
    return found


def bind(name: str, loss: Loss, scores: dict[str, Tensor]) -> Callable[[], Outputs]:
    """Return one call: losses, and the gradient of their sum."""
    key = SCORE_OF.get(name, "ratio")

    def run() -> Outputs:
        leaf = scores[key].detach().requires_grad_()
        losses = loss({**scores, key: leaf})
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return {"losses": losses.detach(), "gradient": grad}

    return run


def count_launches(run: Callable[[], object]) -> int:
    """Count kernels, copies and fills that one call starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events() or ())


def measure(
    key: dict, device: torch.device, options: argparse.Namespace, progress: tqdm
) -> dict[str, Any]:
    """Measure one case: gate, count, time."""
    name = key["objective"]
    scores = make_scores((key["groups"], key["candidates"]), device)
    every = contenders(name, device)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in scores.items()}
    truth, plain = bind(name, every[EAGER], wide)(), bind(name, every[EAGER], scores)()
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Outputs]] = {}
    for who, loss in every.items():
        progress.set_postfix_str(f"{name} {who}: gate")
        if who in options.without:
            found[who] = {"status": "skipped", "reason": "--without"}
            continue
        run = bind(name, loss, scores)
        run()  # compiles
        errors, rejected = check(run(), truth, plain)
        found[who] = {"status": "rejected" if rejected else "ok", "errors": errors}
        if rejected:
            found[who]["reason"] = rejected
            continue
        if device.type == "cuda":
            found[who]["launches"] = count_launches(run)
        runs[who] = run
    progress.set_postfix_str(f"{name}: timing")
    seconds = interleaved(runs, options.rounds, device, cold=False, warmup=3)
    for who, times in seconds.items():
        ratios = [t / eager for t, eager in zip(times, seconds[EAGER], strict=True)]
        found[who] |= {"seconds": summary(times), "of_eager": summary(ratios)}
    return {"contenders": found}


def table(cases: Sequence[dict]) -> str:
    """Return all cases as rows of Markdown: median microseconds, and the speed in eager's."""
    lines = [
        "| objective | B | K | contender | median us | quartiles | x eager's speed | launches "
        "| relative error: losses, gradient |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        key = case["key"]
        row = f"| {key['objective']} | {key['groups']} | {key['candidates']} |"
        for who, c in case["contenders"].items():
            if "seconds" not in c:
                lines.append(f"{row} {who} | {c['status']}: {c['reason']} | | | | |")
                continue
            t = {k: 1e6 * value for k, value in c["seconds"].items()}
            errors = ", ".join(f"{e['relative']:.1e}" for e in c["errors"].values())
            lines.append(
                f"{row} {who} | {t['median']:.0f} | {t['q25']:.0f}-{t['q75']:.0f} "
                f"| {1 / c['of_eager']['median']:.2f} | {c.get('launches', '')} | {errors} |"
            )
    return "\n".join(lines)


def section(data: dict, cases: Sequence[dict]) -> str:
    """Return the part of a Markdown page with the method and the table of a record."""
    stamp, method = data["environment"], data["method"]
    versions = ", ".join(f"{name} {stamp[name] or 'absent'}" for name in PACKAGES[:2])
    return f"""## Losses

`python -m bench.losses --page FILE.md` rewrites this section from
`bench/{RESULTS.name}/{stamp["slug"]}/losses.json`. Device: {stamp["device"]}, {stamp["threads"]} \
threads; {versions}.

- One call: {method["call"]}
- Inputs: {method["inputs"]}
- Contenders: {method["contenders"]}
- Gate: {method["gate"]}; who fails it gets no speed.
- Time: {method["rounds"]} rounds, everyone once a round in rotating order; speeds are
  compared within a round.

{table(cases)}
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.losses", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--grid", choices=GRIDS, default="gpu" if on_gpu else "cpu")
    parser.add_argument(
        "--case", action="append", metavar="NAME,B,K", help="these of the grid only"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument(
        "--out", type=Path, help="JSON; bench/results/DEVICE/losses.json by default"
    )
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also write the section there")
    options = parser.parse_args(arguments)
    if EAGER in options.without:
        parser.error(f"{EAGER!r} is what everyone is compared with: it cannot be left out")
    if options.quick:
        options.grid, options.rounds, options.fresh = "quick", 3, True
        options.without = [*options.without, COMPILED]
        options.out = options.out or Path("runs/losses-quick.json")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    keys = [
        {"objective": name, "groups": b, "candidates": k}
        for names, shapes in GRIDS[options.grid]
        for name in names
        for b, k in shapes
        if not options.case or f"{name},{b},{k}" in options.case
    ]
    call, who = (" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[-2:])
    method = {
        "call": call,
        "contenders": who,
        "inputs": " ".join((make_scores.__doc__ or "").split()),
        "gate": f"error <= {GATE} * (error of eager in float32 + eps * scale)",
        "rounds": options.rounds,
    }
    path = options.out or RESULTS / device_slug(device) / "losses.json"
    record = Record(path, device, method, options.fresh)
    with tqdm(record.missing(keys), disable=None) as progress:
        for key in progress:
            record.add(key, **measure(key, device, options, progress))
    cases = [case for case in record.data["cases"] if case["key"] in keys]
    print(table(cases))
    if device.type == "cpu":
        print("\nNo kernels on a CPU: fastpo runs the pure function, which is `eager`.")
    print(f"\n{path}")
    if options.page is not None:
        write_section(options.page, "losses", section(record.data, cases))


if __name__ == "__main__":
    main()
