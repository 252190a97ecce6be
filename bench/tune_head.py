"""Which launch configuration is the fastest? Rewrites this GPU's rows of the launch table.

    python -m bench.tune_head                          # every kernel and regime
    python -m bench.tune_head --kernel split_kernel --dry-run

Every candidate of a regime must first be right (error against float64 as in `bench.harness`), then
all run interleaved; the best few run again for longer, next to the row that the table has now. A
row changes where its successor is faster by more than `MARGIN` of the median. Finished regimes are
kept in bench/results/DEVICE/tune_head.json, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from bench.harness import RESULTS, Outputs, Record, check, device_slug, interleaved
from bench.head import make_inputs
from fastpo.kernels import launch_table
from fastpo.kernels.divergence import (
    divergence,
    divergence_coefficients,
    divergence_reference,
)
from fastpo.kernels.launch_table import MEASURED, NARROW, TABLE, launch
from fastpo.kernels.linear_coefficients import linear_coefficients, linear_coefficients_reference
from fastpo.kernels.linear_stats import linear_stats, linear_stats_reference
from fastpo.kernels.logits_epilogue import logits_epilogue, logits_epilogue_reference
from fastpo.kernels.tile import Config, chip_of

MARGIN = 0.02
FINALISTS = 4
MATRIX_KERNELS = ("split_kernel", "coefficients_kernel")
SHAPE, GATE_SHAPE = (8192, 4096, 32000), (192, 4096, 2085)

Run = Callable[[Config], Outputs]
Plain = Callable[[torch.dtype], Outputs]
Timer = Callable[[Mapping[Any, Callable[[], object]], int], Mapping[Any, list[float]]]


class Regime(NamedTuple):
    """A row of the table to be."""

    kernel: str
    bits: int
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """As the table spells it."""
        return " ".join((str(self.bits), *self.words))


def has_tma(chip: str) -> bool:
    """NVIDIA's Hopper and later."""
    return chip.startswith("sm_") and int(chip[3:]) >= 90


def regimes(tma: bool) -> list[Regime]:
    """Every row worth having. Row kernels read the fp32 products of a slab."""
    found = [Regime(kernel, 32) for kernel in TABLE if kernel not in MATRIX_KERNELS]
    for kernel, rich in itertools.product(MATRIX_KERNELS, ((), ("rich",))):
        found.append(Regime(kernel, 32, rich))
        for pointers in ((), ("pointers",)) if tma else ((),):
            found += [Regime(kernel, 16, (*rich, *pointers, *n)) for n in ((), ("narrow",))]
    return sorted(found)


def candidates(regime: Regime, tma: bool) -> list[Config]:
    """Configurations to try; an accumulator takes at most 128 registers of a thread."""
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


def search(
    current: Config,
    tried: Iterable[Config],
    run: Run,
    wrong: Callable[[Config], str | None],
    timer: Timer,
    rounds: int,
) -> tuple[Config, dict[Config, float], dict[Config, str]]:
    """(the fastest right one, seconds of the finalists, why others were left out).

    Args:
        current: kept unless another is faster by more than `MARGIN`; it has to be right.
        run: one timed call.
        wrong: why a configuration must not be used, None where it may; raises what compiling does.
        timer: (configuration -> call, rounds) -> seconds of each round.

    Raises:
        RuntimeError: the current configuration is wrong.
    """
    refused: dict[Config, str] = {}
    able: list[Config] = []
    for config in dict.fromkeys((current, *tried)):
        try:
            reason = wrong(config)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
            reason = str(error).splitlines()[0]
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
    return chosen, last, refused


def updated(
    table: Mapping[str, Mapping], chip: str, found: Mapping[Regime, Config]
) -> dict[str, dict[tuple[str, str], Config]]:
    """The table with the rows of `chip` in `found`; rows of other chips as they are."""
    rows = {kernel: dict(old) for kernel, old in table.items()}
    for regime, config in found.items():
        rows[regime.kernel][chip, regime.key] = config
    return rows


def render(table: Mapping[str, Mapping], measured: Iterable[str]) -> str:
    """The text between the table's marks: rows in order, so that equal tables give equal bytes."""
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
    """A line for every row that differs."""
    return [
        f"{kernel} {' '.join(key)}: {old[kernel].get(key, 'no row')} -> {config}"
        for kernel, rows in new.items()
        for key, config in rows.items()
        if old[kernel].get(key) != config
    ]


def bind(regime: Regime, shape: tuple[int, int, int], device: torch.device) -> tuple[Run, Plain]:
    """(a call of the kernel, `plain(dtype)`: its reference in plain PyTorch) on peaked inputs."""
    n, d, v = shape
    d = NARROW if "narrow" in regime.words else d
    rich = "rich" in regime.words
    x = make_inputs((n, d, v), torch.bfloat16 if regime.bits == 16 else torch.float32, device)
    hidden, weight = x.hidden, x.weight
    if "pointers" in regime.words:
        hidden = hidden.new_empty(n, d + 1)[:, :d].copy_(hidden)
    facts: dict[str, Any] = {"softcap": 30.0} if rich else {}
    names = ("logps", "entropy") if rich else ("logps",)
    grads = {name: x.cotangents for name in names}
    saved: dict[str, Any] = linear_stats(
        hidden, weight, x.labels, want=("lse", "lse_rest", *names), **facts
    )

    def stats(config: Config) -> Outputs:
        return linear_stats(hidden, weight, x.labels, want=names, config=config, **facts)

    def plain_stats(dtype: torch.dtype) -> Outputs:
        wide = hidden.to(dtype), weight.to(dtype), x.labels
        return linear_stats_reference(*wide, want=names, **facts)

    def coefficients(config: Config) -> Outputs:
        given: dict[str, Any] = {f"grad_{name}": value for name, value in grads.items()}
        c = linear_coefficients(
            hidden, weight, x.labels, v_start=0, vocab_size=v, config=config, **saved, **given,
            **facts,
        )  # fmt: skip
        return {"c": c}

    def plain_coefficients(dtype: torch.dtype) -> Outputs:
        same: dict[str, Any] = {
            k: g.to(torch.promote_types(g.dtype, dtype)) for k, g in grads.items()
        }
        wide = hidden.to(dtype), weight.to(dtype), x.labels
        return {"c": linear_coefficients_reference(*wide, **facts, **same).to(dtype)}

    if regime.kernel in MATRIX_KERNELS:
        whole = {"split_kernel": (stats, plain_stats)}
        return whole.get(regime.kernel, (coefficients, plain_coefficients))

    rows = min(n, 512)  # a workspace's worth
    products = hidden[:rows].float() @ weight.T.float()
    ref_products = x.ref_hidden[:rows].float() @ weight.T.float()
    slabs, labels = (products, ref_products), x.labels[:rows]
    want = ("logps", "kl_ref_policy", "kl_policy_ref")
    one = torch.ones(rows, device=device)

    def epilogue(config: Config) -> Outputs:
        found, c = logits_epilogue(
            products, labels, want=("logps",), coefficient_of="logps", config=config
        )
        assert c is not None
        return {"logps": found["logps"], "c": c}

    def plain_epilogue(dtype: torch.dtype) -> Outputs:
        found, c = logits_epilogue_reference(
            products.to(dtype), labels, want=("logps",), coefficient_of="logps"
        )
        assert c is not None
        return {"logps": found["logps"], "c": c}

    def both(config: Config) -> Outputs:
        return divergence(*slabs, labels, want=want, config=config)

    def plain_both(dtype: torch.dtype) -> Outputs:
        return divergence_reference(products.to(dtype), ref_products.to(dtype), labels, want=want)

    needed = ("lse", "lse_rest", "logps", "ref_lse", "ref_lse_rest", "ref_logps", "kl_policy_ref")

    def both_coefficients(config: Config) -> Outputs:
        c = divergence_coefficients(
            *slabs, labels, stats=of_both, cotangents={"kl_policy_ref": one}, config=config
        )
        return {"c": c}

    def plain_both_coefficients(dtype: torch.dtype) -> Outputs:
        leaf = products.to(dtype).requires_grad_()
        kl = divergence_reference(leaf, ref_products.to(dtype), labels, want=("kl_policy_ref",))
        return {"c": torch.autograd.grad(kl["kl_policy_ref"].sum(), leaf)[0]}

    of_both: dict[str, Tensor] = divergence(*slabs, labels, want=needed)
    return {
        "epilogue_kernel": (epilogue, plain_epilogue),
        "divergence_kernel": (both, plain_both),
        "divergence_coefficients_kernel": (both_coefficients, plain_both_coefficients),
    }[regime.kernel]


def gate(
    regime: Regime, device: torch.device, shape: tuple[int, int, int]
) -> Callable[[Config], str | None]:
    """`wrong` of `search`, on a small shape with ragged ends."""
    run, plain = bind(regime, shape, device)
    truth, same = plain(torch.float64), plain(torch.float32)
    if regime.bits == 16 and "c" in same:
        same["c"] = same["c"].bfloat16()  # rounded once, as the kernel does

    return lambda config: check(run(config), truth, same)[1]


def tune(regime: Regime, chip: str, device: torch.device, rounds: int) -> tuple[Config, dict, dict]:
    """`search` of one regime on this device."""
    tma = has_tma(chip)
    dtype = torch.bfloat16 if regime.bits == 16 else torch.float32
    matrices: dict[str, Any] = {
        "rich": "rich" in regime.words,
        "width": NARROW if "narrow" in regime.words else SHAPE[1],
        "described": tma and regime.bits == 16 and "pointers" not in regime.words,
    }
    current = launch(
        regime.kernel, chip, dtype, **(matrices if regime.kernel in MATRIX_KERNELS else {})
    )
    run, _ = bind(regime, SHAPE, device)
    return search(
        current,
        candidates(regime, tma and regime.bits == 16),
        run,
        gate(regime, device, GATE_SHAPE),
        lambda runs, count: interleaved(runs, count, device),
        rounds,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune what is missing, print what changes, write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_head", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kernel", action="append", choices=TABLE, help="instead of all")
    parser.add_argument("--rounds", type=int, default=15, help="of the finalists")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument("--dry-run", action="store_true", help="print changes, leave the table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("it times kernels on a GPU and there is none; `launch_table` stays as it is")
    device = torch.device("cuda")
    chip = chip_of(device)
    path = RESULTS / device_slug(device) / "tune_head.json"
    record = Record(path, device, {"shape": SHAPE, "rounds": options.rounds}, options.fresh)
    tma = has_tma(chip)
    asked = {
        f"{r.kernel} {r.key}": r for r in regimes(tma) if r.kernel in (options.kernel or TABLE)
    }
    with tqdm(record.missing([{"regime": name} for name in asked]), disable=None) as progress:
        for key in progress:
            progress.set_postfix_str(key["regime"])
            chosen, seconds, refused = tune(asked[key["regime"]], chip, device, options.rounds)
            finalists = [[*vars(c).values(), s] for c, s in seconds.items()]
            reasons = {str(c): why for c, why in refused.items()}
            record.add(key, config=vars(chosen), finalists=finalists, refused=reasons)
    found = {
        asked[case["key"]["regime"]]: Config(**case["config"])
        for case in record.data["cases"]
        if case["key"]["regime"] in asked
    }
    new = updated(TABLE, chip, found)
    print("\n".join(changes(TABLE, new)) or "no row changes")
    if not options.dry_run:
        rewrite(Path(launch_table.__file__), render(new, {*MEASURED, chip}))


if __name__ == "__main__":
    main()
