"""Which launch configuration is the fastest? Rewrites this GPU's rows of the launch table.

    python -m bench.tune_head                          # every regime, the likeliest candidates
    python -m bench.tune_head --budget 50              # what 50 seconds suffice for
    python -m bench.tune_head --all                    # every candidate
    python -m bench.tune_head --kernel split_kernel --dry-run

Regimes come in the order of what they are worth. The candidates of one are compiled on all cores
(`bench.ahead`). Each must then be right (error against float64 as in `bench.harness`), then all run
interleaved; the best few run again for longer, next to the row that the table has now. A row
changes where its successor is faster by more than `MARGIN` of the median. Finished regimes are kept
in bench/results/DEVICE/tune_head.json, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.runtime import driver

from bench.ahead import Ahead, first_line, hash_in_order
from bench.harness import RESULTS, Outputs, Record, check, device_slug, interleaved
from bench.head import Inputs, make_inputs
from fastpo.kernels import launch_table
from fastpo.kernels.divergence import (
    divergence,
    divergence_coefficients,
    divergence_reference,
)
from fastpo.kernels.launch_table import MEASURED, NARROW, TABLE, launch
from fastpo.kernels.linear_coefficients import (
    linear_coefficients,
    linear_coefficients_reference,
)
from fastpo.kernels.linear_stats import (
    _programs_wanted,
    blocks_per_split,
    linear_stats,
    linear_stats_reference,
)
from fastpo.kernels.logits_epilogue import (
    logits_epilogue,
    logits_epilogue_reference,
    over,
)
from fastpo.kernels.tile import Config, chip_of

MARGIN = 0.02
FINALISTS = 4
MATRIX_KERNELS = ("split_kernel", "coefficients_kernel")
SHAPE, ROW_SHAPE = (8192, 4096, 32016), (512, 64, 128256)
"""(N, D, V) of matrix kernels and of the row kernels, which read raw logits and see no D.

32016 and 128256 are multiples of 16, which triton compiles for, and of no block that is tried. A
row kernel's chunk of 263 MB is beyond any cache, as that of a real vocabulary is.
"""
GATE_ROWS = 208
"""The gate's N: a multiple of 16 and of no block. All else being as it is timed, both run the same
binary."""

Run = Callable[[Config], Outputs]
Plain = Callable[[torch.dtype], Outputs]
Timer = Callable[[Mapping[Any, Callable[[], object]], int], Mapping[Any, list[float]]]


class Regime(NamedTuple):
    """Hold what names a row of the table to be."""

    kernel: str
    bits: int
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return the key as the table spells it."""
        return " ".join((str(self.bits), *self.words))


def has_tma(chip: str) -> bool:
    """Tell whether the chip is NVIDIA's Hopper or later."""
    return chip.startswith("sm_") and int(chip[3:]) >= 90


FIRST = ("epilogue_kernel 32", "coefficients_kernel 16", "split_kernel 16")
"""What every bf16 head runs: its rows, those of a trained head, those of few rows a chunk."""


def regimes(tma: bool) -> list[Regime]:
    """Return every row worth having, by its worth; row kernels read a chunk's fp32 logits."""
    found = [Regime(kernel, 32) for kernel in TABLE if kernel not in MATRIX_KERNELS]
    for kernel, rich in itertools.product(MATRIX_KERNELS, ((), ("rich",))):
        found.append(Regime(kernel, 32, rich))
        for pointers in ((), ("pointers",)) if tma else ((),):
            found += [Regime(kernel, 16, (*rich, *pointers, *n)) for n in ((), ("narrow",))]

    def worth(regime: Regime) -> tuple:
        name = f"{regime.kernel} {regime.key}"
        wide = regime.kernel in MATRIX_KERNELS and regime.bits == 32  # nobody trains in fp32
        return FIRST.index(name) if name in FIRST else len(FIRST), wide, len(regime.words), regime

    return sorted(found, key=worth)


def candidates(regime: Regime, tma: bool) -> list[Config]:
    """Return the configurations to try; an accumulator takes at most 128 registers a thread."""
    if regime.kernel not in MATRIX_KERNELS:
        return [
            Config(1, columns, warps=warps)
            for columns, warps in itertools.product((512, 1024, 2048, 4096, 8192), (4, 8, 16))
        ]
    sizes, depths = ((64, 128, 256), (32, 64)) if regime.bits == 16 else ((32, 64, 128), (16, 32))
    tma = tma and "pointers" not in regime.words
    return [
        Config(rows, columns, depth, 16, warps, stages, tma)
        for rows, columns, depth, warps, stages in itertools.product(
            sizes, sizes, depths, (4, 8), (3, 4)
        )
        if rows * columns <= 128 * 32 * warps and max(rows, columns) > sizes[0]
    ]


ROW_BLOCKS = ((4096, 8), (8192, 16), (2048, 8), (4096, 16))
"""(columns, warps)"""
TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),  # two blocks a multiprocessor
)
"""(rows, columns, depth, warps, stages) of 16-bit operands"""
RICH_TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4))
"""The same with entropy or a soft-cap, whose registers 128 x 256 does not leave"""


WIDE_TILES = ((64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3))
"""The same of fp32 operands, multiplied without tensor cores"""


def likeliest(regime: Regime, tma: bool) -> list[Config]:
    """Return those of `candidates` to try where time is short, best guess first."""
    if regime.kernel not in MATRIX_KERNELS:
        first = [Config(1, columns, warps=warps) for columns, warps in ROW_BLOCKS]
        of_two = (Config(1, 1024, warps=8), Config(1, 1024, warps=4))  # chunks, so fewer columns
        return [*first, *of_two] if regime.kernel != "epilogue_kernel" else first
    tiles = RICH_TILES if "rich" in regime.words else TILES
    tiles = WIDE_TILES if regime.bits == 32 else tiles
    if "narrow" in regime.words:
        tiles = (*tiles, (64, 128, 64, 4, 4), (128, 64, 64, 4, 3))
    tma = tma and regime.bits == 16 and "pointers" not in regime.words
    return [Config(bn, bv, bd, 16, warps, stages, tma) for bn, bv, bd, warps, stages in tiles]


class Found(NamedTuple):
    """Hold what a search gave."""

    chosen: Config
    seconds: dict[Config, float]  # of the finalists
    refused: dict[Config, str]  # why others were left out
    left: int  # how many were not started


def search(
    current: Config,
    tried: Iterable[Config],
    run: Run,
    wrong: Callable[[Config], str | None],
    timer: Timer,
    rounds: int,
    spent: Callable[[], bool] = lambda: False,
) -> Found:
    """Return the fastest right configuration.

    Args:
        current: kept unless another is faster by more than `MARGIN`; it has to be right.
        run: one timed call.
        wrong: why a configuration must not be used, None where it may; raises what compiling does.
        timer: (configuration -> call, rounds) -> seconds of each round.
        spent: whether no further configuration may be started.

    Raises:
        RuntimeError: the current configuration is wrong.
    """
    refused: dict[Config, str] = {}
    able: list[Config] = []
    every = list(dict.fromkeys((current, *tried)))
    for config in every:
        if config != current and spent():
            break
        try:
            reason = wrong(config)
        except Exception as error:  # ptxas, LLVM and the driver each raise their own
            reason = first_line(error)
        if reason is None:
            able.append(config)
        else:
            refused[config] = reason
    if current in refused:
        raise RuntimeError(f"the table's own {current} is wrong: {refused[current]}")

    def timed(configs: Sequence[Config], count: int) -> dict[Config, float]:
        found = timer({c: lambda c=c: run(c) for c in configs}, count)
        return {config: statistics.median(seconds) for config, seconds in found.items()}

    first = timed(able, 3)
    best = sorted((c for c in able if c != current), key=first.__getitem__)[:FINALISTS]
    last = timed([current, *best], rounds)
    fastest = min(last, key=last.__getitem__)
    chosen = fastest if last[fastest] < (1 - MARGIN) * last[current] else current
    return Found(chosen, last, refused, len(every) - len(able) - len(refused))


def updated(
    table: Mapping[str, Mapping], chip: str, found: Mapping[Regime, Config]
) -> dict[str, dict[tuple[str, str], Config]]:
    """Return the table with the rows of `chip` in `found`; rows of other chips as they are."""
    rows = {kernel: dict(old) for kernel, old in table.items()}
    for regime, config in found.items():
        rows[regime.kernel][chip, regime.key] = config
    return rows


def render(table: Mapping[str, Mapping], measured: Iterable[str]) -> str:
    """Return the text between the table's marks; equal tables give equal bytes."""
    chips = "".join(f'"{chip}", ' for chip in sorted(set(measured)))
    lines = [f"MEASURED: tuple[str, ...] = ({chips.strip()})", "TABLE: dict[str, Table] = {"]
    for kernel, rows in table.items():
        lines.append(f'    "{kernel}": {{')
        for (chip, regime), c in sorted(rows.items()):
            values = [c.BN, c.BV, c.BD, c.group, c.warps, c.stages, *[True] * c.tma]
            numbers = ", ".join(map(str, values))
            lines.append(f'        ("{chip}", "{regime}"): Config({numbers}),')
        lines.append("    },")
    return "\n".join([*lines, "}"])


def rewrite(path: Path, text: str) -> None:
    """Put `text` between the marks of the table's file.

    Raises:
        ValueError: the marks are not there.
    """
    old = path.read_text(encoding="utf-8")
    marked = re.compile(r"(?<=# <table>\n).*(?=\n# </table>\n)", re.DOTALL)
    if not marked.search(old):
        raise ValueError(f"{path} lacks the marks '# <table>' and '# </table>'")
    torn = path.with_suffix(".part")
    torn.write_text(marked.sub(lambda _: text, old), encoding="utf-8")
    torn.replace(path)


def changes(old: Mapping[str, Mapping], new: Mapping[str, Mapping]) -> list[str]:
    """Return a line for every row that differs."""
    return [
        f"{kernel} {' '.join(key)}: {old[kernel].get(key, 'no row')} -> {config}"
        for kernel, rows in new.items()
        for key, config in rows.items()
        if old[kernel].get(key) != config
    ]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Make peaked inputs; on `meta` their shapes alone."""
    if device.type != "meta":
        return make_inputs(shape, dtype, device)
    n, d, v = shape
    hidden, weight = (torch.empty(k, d, dtype=dtype, device=device) for k in (n, v))
    labels = torch.empty(n, dtype=torch.int64, device=device)
    return Inputs(hidden, weight, labels, hidden, torch.empty(n, device=device))


def bind(
    regime: Regime,
    shape: tuple[int, int, int],
    device: torch.device,
    programs: int,
    rows: int | None = None,
) -> tuple[Run, Plain]:
    """Return a call of the kernel, and `plain(dtype)`: its reference in plain PyTorch.

    Args:
        programs: how many `split_kernel` is cut for, at least.
        rows: N, the launch being cut as for the shape's own.
    """
    hash_in_order()
    n, d, v = shape
    d = NARROW if "narrow" in regime.words else d
    dtype = torch.bfloat16 if regime.bits == 16 else torch.float32
    x = _inputs((rows or n, d, v), dtype, device)
    if "pointers" in regime.words:
        odd = x.hidden.new_empty(len(x.hidden), d + 1)[:, :d].copy_(x.hidden)
        x = x._replace(hidden=odd)
    if regime.kernel == "split_kernel":
        return _bind_statistics(regime, x, (n, v), programs)
    if regime.kernel == "coefficients_kernel":
        return _bind_coefficients(regime, x)
    # What row kernels read: raw logits of the policy and of the reference, in fp32.
    products, ref_products = (h.float() @ x.weight.T.float() for h in (x.hidden, x.ref_hidden))
    if regime.kernel == "epilogue_kernel":
        return _bind_epilogue(products, x.labels, again=rows is not None)
    if regime.kernel == "divergence_kernel":
        return _bind_divergence(products, ref_products, x.labels)
    return _bind_divergence_coefficients(products, ref_products, x.labels)


def _facts(regime: Regime) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the statistics that a matrix kernel is asked for, and the soft-cap of a rich one."""
    rich = "rich" in regime.words
    return ("logps", "entropy") if rich else ("logps",), {"softcap": 30.0} if rich else {}


def _bind_statistics(
    regime: Regime, x: Inputs, size: tuple[int, int], programs: int
) -> tuple[Run, Plain]:
    """Return the calls of `split_kernel`, cut as for `size` (N, V)."""
    names, facts = _facts(regime)

    def stats(config: Config) -> Outputs:
        num_n, num_v = triton.cdiv(size[0], config.BN), triton.cdiv(size[1], config.BV)
        blocks = blocks_per_split(num_n, num_v, programs)
        return linear_stats(
            x.hidden, x.weight, x.labels, want=names, config=config, blocks=blocks, **facts
        )

    def plain(dtype: torch.dtype) -> Outputs:
        wide = x.hidden.to(dtype), x.weight.to(dtype), x.labels
        return linear_stats_reference(*wide, want=names, **facts)

    return stats, plain


def _bind_coefficients(regime: Regime, x: Inputs) -> tuple[Run, Plain]:
    """Return the calls of `coefficients_kernel`."""
    names, facts = _facts(regime)
    # By plain PyTorch, so that a regime compiles and trusts no kernel but its own.
    needed = ("lse", "lse_rest", *names)
    saved = linear_stats_reference(x.hidden, x.weight, x.labels, want=needed, **facts)
    cotangents: dict[str, Any] = {f"grad_{name}": x.cotangents for name in names}

    def coefficients(config: Config) -> Outputs:
        c = linear_coefficients(
            x.hidden, x.weight, x.labels, v_start=0, vocab_size=len(x.weight), config=config,
            **saved, **cotangents, **facts,
        )  # fmt: skip
        return {"c": c}

    def plain(dtype: torch.dtype) -> Outputs:
        g = x.cotangents.to(torch.promote_types(x.cotangents.dtype, dtype))
        wide = x.hidden.to(dtype), x.weight.to(dtype), x.labels
        same: dict[str, Any] = dict.fromkeys(names, g)
        c = linear_coefficients_reference(*wide, **facts, **same)
        return {"c": c.to(dtype)}

    return coefficients, plain


def _bind_epilogue(products: Tensor, labels: Tensor, *, again: bool) -> tuple[Run, Plain]:
    """Return the calls of `epilogue_kernel`; `again`: raw logits are needed after a call."""

    def epilogue(config: Config) -> Outputs:
        # As a bf16 head launches it, over its raw logits: the gate needs them again, a timer not.
        chunk = products.clone() if again else products
        stats, c = logits_epilogue(
            chunk, labels, want=("logps",), coefficient_of="logps", config=config,
            out=over(chunk, torch.bfloat16),
        )  # fmt: skip
        assert c is not None
        return {"logps": stats["logps"], "c": c}

    def plain(dtype: torch.dtype) -> Outputs:
        stats, c = logits_epilogue_reference(
            products.to(dtype), labels, want=("logps",), coefficient_of="logps"
        )
        assert c is not None
        return {"logps": stats["logps"], "c": c}

    return epilogue, plain


def _bind_divergence(products: Tensor, ref_products: Tensor, labels: Tensor) -> tuple[Run, Plain]:
    """Return the calls of `divergence_kernel`."""
    want = ("logps", "kl_ref_policy", "kl_policy_ref")

    def both(config: Config) -> Outputs:
        return divergence(products, ref_products, labels, want=want, config=config)

    def plain(dtype: torch.dtype) -> Outputs:
        return divergence_reference(products.to(dtype), ref_products.to(dtype), labels, want=want)

    return both, plain


def _bind_divergence_coefficients(
    products: Tensor, ref_products: Tensor, labels: Tensor
) -> tuple[Run, Plain]:
    """Return the calls of `divergence_coefficients_kernel`."""
    needed = ("lse", "lse_rest", "logps", "ref_lse", "ref_lse_rest", "ref_logps", "kl_policy_ref")
    stats = divergence_reference(products, ref_products, labels, want=needed)
    one = torch.ones(len(labels), device=products.device)

    def coefficients(config: Config) -> Outputs:
        c = divergence_coefficients(
            products, ref_products, labels, stats=stats, cotangents={"kl_policy_ref": one},
            config=config,
        )  # fmt: skip
        return {"c": c}

    def plain(dtype: torch.dtype) -> Outputs:
        leaf = products.to(dtype).requires_grad_()
        kl = divergence_reference(leaf, ref_products.to(dtype), labels, want=("kl_policy_ref",))
        return {"c": torch.autograd.grad(kl["kl_policy_ref"].sum(), leaf)[0]}

    return coefficients, plain


def shape_of(regime: Regime) -> tuple[int, int, int]:
    """Return (N, D, V) that a regime is timed at."""
    return SHAPE if regime.kernel in MATRIX_KERNELS else ROW_SHAPE


def gate(
    regime: Regime, shape: tuple[int, int, int], device: torch.device, programs: int
) -> Callable[[Config], str | None]:
    """Return `wrong` of `search`, on the first rows of a shape, with ragged ends."""
    run, plain = bind(regime, shape, device, programs, GATE_ROWS)
    truth, same = plain(torch.float64), plain(torch.float32)
    if "c" in same and (regime.bits == 16 or regime.kernel == "epilogue_kernel"):
        same["c"] = same["c"].bfloat16()  # rounded once, as the kernel does

    return lambda config: check(run(config), truth, same)[1]


def compile_candidate(job: tuple[Regime, Config], programs: int) -> None:
    """Make the launches of a candidate in a process that only compiles."""
    regime, config = job
    run, _ = bind(regime, shape_of(regime), torch.device("meta"), programs)
    run(config)


def tune(
    regime: Regime,
    chip: str,
    device: torch.device,
    rounds: int,
    tried: Sequence[Config],
    ahead: Ahead,
    deadline: float = math.inf,
) -> Found:
    """Run `search` of one regime on this device, until `time.monotonic()` is `deadline`."""
    dtype = torch.bfloat16 if regime.bits == 16 else torch.float32
    matrices: dict[str, Any] = {
        "rich": "rich" in regime.words,
        "width": NARROW if "narrow" in regime.words else SHAPE[1],
        "described": has_tma(chip) and regime.bits == 16 and "pointers" not in regime.words,
    }
    current = launch(
        regime.kernel, chip, dtype, **(matrices if regime.kernel in MATRIX_KERNELS else {})
    )
    programs = _programs_wanted(device)
    compiled = ahead.compile(
        functools.partial(compile_candidate, programs=programs),
        [(regime, config) for config in dict.fromkeys((current, *tried))],
        deadline - time.monotonic(),
    )
    ready = [config for config in tried if (regime, config) in compiled]
    shape = shape_of(regime)
    run, _ = bind(regime, shape, device, programs)
    right = gate(regime, shape, device, programs)
    found = search(
        current,
        ready,
        run,
        lambda config: compiled.get((regime, config)) or right(config),
        lambda runs, count: interleaved(runs, count, device),
        rounds,
        lambda: time.monotonic() >= deadline,
    )
    return found._replace(left=found.left + len(tried) - len(ready))


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune what is missing, print what changes, write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_head", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kernel", action="append", choices=TABLE, help="instead of all")
    parser.add_argument("--all", action="store_true", help="every candidate, not the likeliest")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS",
        help="start nothing after that; the table is written from what is finished",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="of the finalists")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument("--dry-run", action="store_true", help="print changes, leave the table")
    parser.add_argument("--out", type=Path, help="JSON; bench/results/DEVICE/tune_head.json if not")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not torch.cuda.is_available():
        parser.error("it times kernels on a GPU and there is none; `launch_table` stays as it is")
    device = torch.device("cuda")
    chip = chip_of(device)
    path = options.out or RESULTS / device_slug(device) / "tune_head.json"
    # Lists, as they come back from JSON when a run resumes.
    method = {"shape": [*SHAPE], "row_shape": [*ROW_SHAPE], "rounds": options.rounds}
    record = Record(path, device, method, options.fresh)
    # What an earlier run failed at or had no time for is tried again.
    record.data["cases"] = [case for case in record.data["cases"] if case.get("left") == 0]
    tma = has_tma(chip)
    target: Any = driver.active.get_current_target()
    grid = "all" if options.all else "likeliest"
    asked = {
        f"{r.kernel} {r.key}": r for r in regimes(tma) if r.kernel in (options.kernel or TABLE)
    }
    keys = [{"regime": name, "candidates": grid} for name in asked]
    with (
        Ahead(target) as ahead,
        tqdm(record.missing(keys), disable=None) as progress,
    ):
        for key in progress:
            if time.monotonic() >= deadline:
                break
            progress.set_postfix_str(key["regime"])
            regime = asked[key["regime"]]
            tried = (candidates if options.all else likeliest)(regime, tma and regime.bits == 16)
            try:
                found = tune(regime, chip, device, options.rounds, tried, ahead, deadline)
            except Exception as error:  # a regime that fails keeps its row
                record.add(key, failed=first_line(error))
                continue
            record.add(
                key,
                config=vars(found.chosen),
                finalists=[[*vars(c).values(), s] for c, s in found.seconds.items()],
                refused={str(c): why for c, why in found.refused.items()},
                left=found.left,
            )
    cases = [case for case in record.data["cases"] if case["key"] in keys]
    rows = {
        asked[case["key"]["regime"]]: Config(**case["config"]) for case in cases if "config" in case
    }
    new = updated(TABLE, chip, rows)
    print("\n".join(changes(TABLE, new)) or "no row changes")
    for case in cases:
        if "failed" in case:
            print(f"{case['key']['regime']} failed: {case['failed']}")
    print(f"{len(cases)} of {len(keys)} regimes were tried")
    if rows and not options.dry_run:
        rewrite(Path(launch_table.__file__), render(new, {*MEASURED, chip}))


if __name__ == "__main__":
    main()
