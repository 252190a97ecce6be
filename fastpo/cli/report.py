"""`fastpo report`: the report and the model card of a run, drawn again."""

from __future__ import annotations

import argparse

from fastpo.report.card import write_model_card
from fastpo.report.page import write_report
from fastpo.run.record import Run


def report(arguments: argparse.Namespace) -> int:
    """Write report.html and the model card from the files of a run.

    Raises:
        ValueError: no run in the folder.
    """
    run = Run.read(arguments.run)
    if not (run.facts or run.log or run.state or run.recipe):
        raise ValueError(
            f"{arguments.run} holds no run: name the output_dir of one, where run.json lies"
        )
    print(write_report(arguments.run))
    print(write_model_card(arguments.run))
    return 0
