"""Name what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'x'?` with the most similar of `names`, or nothing if none is similar."""
    by_plain = {n.lower().replace("-", "_"): n for n in names}
    plain = name.lower().replace("-", "_")
    # `adamw` is adamw_torch cut short and no misspelt grokadamw.
    close = [n for n in by_plain if len(plain) > 2 and n.startswith(plain)]
    close = close or difflib.get_close_matches(plain, by_plain, n=1, cutoff=cutoff)
    return f" Did you mean {by_plain[close[0]]!r}?" if close else ""
