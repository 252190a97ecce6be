"""Report rows that cannot be trained on: where they are, what is wrong, and what is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

OnBadRow = Literal["error", "skip"]


class BadField(ValueError):
    """Say which field of a row cannot be used; whoever knows the file makes a `BadRow` of it."""

    def __init__(self, field: str, reason: str, value: Any = None):
        super().__init__(field, reason, value)
        self.field, self.reason, self.value = field, reason, value

    def called(self, names: Mapping[str, str]) -> BadField:
        """Return the same fault in a column that the row calls by another name."""
        column, bracket, place = self.field.partition("[")
        return BadField(names.get(column, column) + bracket + place, self.reason, self.value)


class BadRow(ValueError):
    """Say which row cannot be trained on, where it is, and what is wrong with which field."""

    def __init__(self, source: str, row: int, field: str, reason: str, value: Any = None):
        super().__init__(source, row, field, reason, value)
        self.source, self.row, self.field = source, row, field
        self.reason, self.value = reason, value

    def __str__(self) -> str:
        text = f"{self.source}, row {self.row}, field {self.field!r}: {self.reason}"
        if self.value is None:
            return text
        shown = repr(self.value)
        return f"{text}; got {shown if len(shown) <= 200 else shown[:197] + '...'}"


@contextmanager
def naming(source: str, row: int) -> Iterator[None]:
    """Make a `BadRow` of whatever goes wrong with a row inside.

    A ValueError that is no `BadField` is a fault of the run, which other rows would have too.
    """
    try:
        yield
    except BadField as bad:
        raise BadRow(source, row, bad.field, bad.reason, bad.value) from bad
    except (UnicodeError, RecursionError) as error:
        raise BadRow(source, row, "row", f"{type(error).__name__}: {error}") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise BadRow(source, row, "row", f"{type(error).__name__}: {error}") from error


def report(skipped: Sequence[BadRow], num_rows: int, shown: int) -> str:
    """Say how many rows were skipped, for which reasons, and list the first of them."""
    if not skipped:
        return f"no row of {num_rows} was skipped"
    kinds = Counter((bad.field, bad.reason) for bad in skipped)
    lines = [f"{len(skipped)} of {num_rows} rows were skipped"]
    lines += [f"  {n} x {name}: {reason}" for (name, reason), n in kinds.most_common(shown)]
    lines += [f"the first {min(shown, len(skipped))}:", *(f"  {bad}" for bad in skipped[:shown])]
    return "\n".join(lines)
