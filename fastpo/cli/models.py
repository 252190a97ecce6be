"""What the commands share: a table, a log; a model and its tokenizer are opened by fastpo.model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastpo.model.opening import check_adapter, open_model, open_tokenizer
from fastpo.redact import redact

__all__ = ["check_adapter", "open_model", "open_tokenizer", "show_log", "table"]


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def show_log(level: int) -> None:
    """Send fastpo's own log to standard error, one plain line a message, without secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("fastpo: %(message)s"))
    logger = logging.getLogger("fastpo")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
