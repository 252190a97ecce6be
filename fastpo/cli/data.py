"""`fastpo data`: pairs and samples from scored lists, written to files before training."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.terminal import show_log
from fastpo.data.curation import curriculum, sampled, scored_lists
from fastpo.data.rows import load_rows


def _scored_lists(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    rows = load_rows(
        arguments.dataset, split=arguments.split, name=arguments.dataset_name, origin=True
    )
    on_bad_row = "skip" if arguments.skip_bad_rows else "error"
    return scored_lists(rows, arguments.dataset, on_bad_row)


def _write(path: Path, rows: Sequence[Mapping[str, object]], over: bool) -> None:
    with json_lines(path, over=over) as write:
        for row in rows:
            write(dict(row))
    sys.stderr.write(f"{path}: {len(rows)} rows\n")


def data(arguments: argparse.Namespace) -> int:
    """Show how rows are read, or make samples (`rso`) or stages (`curriculum`) of scored lists."""
    if arguments.action == "show":
        from fastpo.cli.show import show

        return show(arguments)
    show_log(logging.WARNING)
    if arguments.out is None:
        raise ValueError(f"name what to write: fastpo data {arguments.action} DATASET OUT")
    out = Path(arguments.out)
    over, staged = arguments.overwrite, arguments.action == "curriculum"
    there = sorted(out.glob("stage-*.jsonl"))
    first = out / "stage-1.jsonl" if staged else out
    check_outputs(
        *dict.fromkeys([first, *there] if staged else [first]),
        inputs=[arguments.dataset],
        overwrite=over,
    )
    if staged:
        stages = curriculum(_scored_lists(arguments))
        if not stages:
            raise ValueError(f"{arguments.dataset}: no list has two answers of different score")
        paths = [out / f"stage-{number}.jsonl" for number in range(1, len(stages) + 1)]
        if stale := [path for path in there if path not in paths]:
            raise ValueError(
                f"{stale[0]} would be left from another curriculum of more than {len(paths)} "
                "stages: remove it, or name another folder"
            )
        for path, rows in zip(paths, stages, strict=True):
            _write(path, rows, over)
        return 0
    # A seed a row: with one for all, every list would meet the same draws.
    kept = [
        sampled(row, arguments.count, beta=arguments.beta, seed=[arguments.seed, i])
        for i, row in enumerate(_scored_lists(arguments))
    ]
    _write(out, kept, over)
    return 0
