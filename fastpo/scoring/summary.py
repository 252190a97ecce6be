"""Sum scored rows up: means by kind of response, and how many pairs are ranked right."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

from fastpo.scoring.preferences import ScoredGroup, ScoredResponse

_SCORES = ("logps", "mean_logps", "reward", "follow_up")


def _worse(a: ScoredResponse, b: ScoredResponse) -> bool:
    """Return whether b, which stands after a, is worse by the data's own judgement."""
    if a.rank is not None and b.rank is not None:
        return a.rank < b.rank
    return bool(a.label) and not (True if b.label is None else b.label)


def _mean(values: list[float]) -> str:
    return f"{math.fsum(values) / len(values):.4f}" if values else "-"


class Summary:
    """Collect the numbers of all rows, one row at a time."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.right: dict[str, list[float]] = defaultdict(list)
        self.of_pairs: dict[str, list[float]] = defaultdict(list)

    def add(self, row: ScoredGroup) -> None:
        """Count one output row."""
        for name, value in row.pair.items():
            self.of_pairs[name].append(float(value))
        for i, response in enumerate(row.responses):
            good = i == 0 if response.label is None else response.label
            for name in (*_SCORES, "tokens"):
                if (number := getattr(response, name)) is not None:
                    self.values[name, "chosen" if good else "rejected"].append(number)
        for a, b in itertools.combinations(row.responses, 2):
            if _worse(a, b):
                for name in _SCORES:
                    if getattr(a, name) is not None:
                        self.right[name].append(float(getattr(a, name) > getattr(b, name)))

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Return the table of responses and, where pairs were compared, that of pairs."""
        of_responses: list[tuple[str, ...]] = [("", "chosen", "rejected", "pairs right")]
        for name in (*_SCORES, "tokens"):
            kinds = self.values[name, "chosen"], self.values[name, "rejected"]
            if any(kinds):
                of_responses.append((name, *map(_mean, kinds), _mean(self.right[name])))
        of_pairs = [(name, _mean(values)) for name, values in self.of_pairs.items()]
        return [of_responses, of_pairs] if of_pairs else [of_responses]
