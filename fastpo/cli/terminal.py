"""What commands print: the log in plain lines, and tables."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastpo.redact import redact


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
    """Return columns in plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
