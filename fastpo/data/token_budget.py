"""A batch of groups cut into rows that fit a token budget: what is learnt stays, memory is bounded.

A row has no padding, so a half-filled one costs no more than its tokens: groups are cut within
their batch, never moved between batches, and an optimiser step is the same whatever the budget is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastpo.data.groups import Group


def row_size(group: Group, share_prompt: bool) -> tuple[int, int]:
    """Return (longest, entries): a batch costs its greatest `longest` times all `entries`.

    Shared rows have one entry a token, all of length 1; padded ones an entry a response.
    """
    if share_prompt:
        return 1, len(group)
    longest = max(
        len(context.prompt_ids) + len(response.input_ids)
        for context in group.contexts
        for response in context.responses
    )
    return longest, len(group.every)


def check_budget(groups: Iterable[Group], max_tokens: int, *, share_prompt: bool = True) -> None:
    """Refuse groups that fit no row.

    Raises:
        ValueError: how many, and source, row and tokens of the first five.
    """
    sizes = ((group, row_size(group, share_prompt)) for group in groups)
    large = [(g, width * count) for g, (width, count) in sizes if width * count > max_tokens]
    if large:
        first = "; ".join(f"{g.source or 'rows'}, row {g.row}: {n} tokens" for g, n in large[:5])
        raise ValueError(
            f"{len(large)} group(s) do not fit max_tokens_per_row={max_tokens} ({first}): raise it "
            f"to {max(n for _, n in large)}, shorten prompts with max_length, or drop these rows"
        )


def token_rows(
    groups: Sequence[Group], max_tokens: int, *, share_prompt: bool = True, at_least: int = 1
) -> list[list[int]]:
    """Return indices of each row's groups: first-fit decreasing, equally long ones in order.

    First-fit decreasing needs at most 11/9 of the fewest rows possible, plus 6/9 (Dosa, 2007).

    Args:
        groups: G groups.
        max_tokens: most tokens of a row, padding included where prompts are not shared.
        share_prompt: one copy of each prompt, or a padded row a response.
        at_least: rows wanted, at most G: over ranks, all need as many.

    Raises:
        ValueError: as `check_budget`.

    >>> from fastpo.data.groups import Response
    >>> import numpy as np
    >>> def group(prompt):
    ...     response = Response(np.ones(5, np.int32), np.ones(5, bool))
    ...     return Group(np.ones(prompt, np.int32), [response, response], row=0)
    >>> token_rows([group(n) for n in (10, 40, 20, 35)], 80)
    [[1, 2], [3, 0]]
    """
    check_budget(groups, max_tokens, share_prompt=share_prompt)
    sizes = [row_size(group, share_prompt) for group in groups]
    rows: list[list[int]] = []
    # The first group of a row is its longest, so that its padded width is known from then on.
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        for row in rows:
            entries = sum(sizes[i][1] for i in (*row, index))
            if entries * sizes[row[0]][0] <= max_tokens:
                row.append(index)
                break
        else:
            rows.append([index])
    while len(rows) < at_least:
        fullest = max(rows, key=len)
        half = len(fullest) // 2
        rows += [fullest[half:]]
        del fullest[half:]
    return rows
