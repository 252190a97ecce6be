"""Name what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def similar(name: object, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the `count` most similar of `names`, best first; case, `-` and `_` count for nothing.

    >>> similar("adamw", ["grokadamw", "adamw_torch"])
    ['adamw_torch']
    """
    by_plain = {_plain(n): n for n in names}
    plain = _plain(name)
    # `adamw` is adamw_torch cut short and no misspelt grokadamw.
    longer = [n for n in by_plain if len(plain) > 2 and n.startswith(plain)]
    close = difflib.get_close_matches(plain, by_plain, n=count, cutoff=cutoff)
    ranked = [*close, *longer] if set(close[:1]) & set(longer) else [*longer, *close]
    return [by_plain[n] for n in dict.fromkeys(ranked)][:count]


def _plain(name: object) -> str:
    return str(name).lower().replace("-", "_")


def did_you_mean(
    name: object, names: Iterable[str], otherwise: str = "", cutoff: float = 0.6
) -> str:
    """Return `did you mean 'x'?` with the most similar name, or `otherwise` if none is similar."""
    return next((f"did you mean {n!r}?" for n in similar(name, names, cutoff=cutoff)), otherwise)


def nearest(name: object, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ` Did you mean 'x'?`, a sentence after another one, or nothing if none is similar."""
    question = did_you_mean(name, names, cutoff=cutoff)
    return f" {question[0].upper()}{question[1:]}" if question else ""
