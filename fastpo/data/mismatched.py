"""Responses to another row's prompt, which KTO estimates its KL divergence with.

The token ids are taken as they are: a response to any prompt is tokenised from the border on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fastpo.data.bad_rows import BadRow
from fastpo.data.groups import Group, Response
from fastpo.data.options import DataOptions

# Prompts of a stream that a mismatched response is looked for in before its row is a bad one.
_REMEMBERED = 1000


def with_mismatched(
    groups: Sequence[Group],
    options: DataOptions,
    source: str,
    skip: Callable[[BadRow], None],
) -> Iterator[Group]:
    """Yield groups with the first response of the next one that has another prompt.

    The last group goes on at the first one. A response that does not fit is passed over.

    Args:
        groups: in the order of the data.
        options: `max_length`, and what happens to bad rows.
        source: name of the data for messages.
        skip: takes the groups for which no response fits.

    Raises:
        BadRow: such a group, unless `options.on_bad_row` is "skip".
        ValueError: all groups have the same prompt.
    """
    n = len(groups)
    donor = -1
    donors = [-1] * n
    # Twice backward round the circle: what follows i is i + 1, or what follows i + 1.
    for i in itertools.chain(reversed(range(n)), reversed(range(n))):
        following = (i + 1) % n
        if not _same_prompt(groups[i], groups[following]):
            donor = following
        donors[i] = donor
    if donor < 0:
        raise _one_prompt(source, n)
    for group, first in zip(groups, donors, strict=True):
        others = (groups[(first + k) % n] for k in range(n))
        yield from _borrowing(group, _donor(group, others, options), options, skip)


def stream_mismatched(
    groups: Iterable[Group],
    options: DataOptions,
    source: str,
    skip: Callable[[BadRow], None],
) -> Iterator[Group]:
    """Yield groups with the first response of the last one before that has another prompt.

    Before there is one, the first one after gives it. Args and errors: as of `with_mismatched`.
    """
    waiting: list[Group] = []  # for a response that fits, in order
    latest: deque[Group] = deque(maxlen=_REMEMBERED)  # of each run of one prompt
    for group in groups:
        if latest and _same_prompt(group, latest[-1]):
            latest.pop()
        latest.append(group)
        waiting.append(group)
        while waiting:
            donor = _donor(waiting[0], reversed(latest), options)
            if donor is None and len(latest) < _REMEMBERED:
                break
            yield from _borrowing(waiting.pop(0), donor, options, skip)
    if len(latest) == 1:
        raise _one_prompt(source, len(waiting))
    for group in waiting:
        donor = _donor(group, reversed(latest), options)
        yield from _borrowing(group, donor, options, skip)


def _same_prompt(a: Group, b: Group) -> bool:
    return np.array_equal(a.prompt_ids, b.prompt_ids)


def _one_prompt(source: str, count: int) -> ValueError:
    return ValueError(
        f"{source}: extras=('mismatched',) pairs each prompt with the answer to another one, but "
        f"all {count} groups have the same prompt; use rows with at least two prompts, or an "
        "objective that needs no mismatched responses"
    )


def _donor(group: Group, others: Iterable[Group], options: DataOptions) -> Group | None:
    """Return the first with another prompt whose first response fits beside the group's prompt."""
    most = float("inf") if options.max_length is None else options.max_length
    room = most - len(group.prompt_ids)
    fitting = (other for other in others if len(other.responses[0].input_ids) <= room)
    return next((other for other in fitting if not _same_prompt(group, other)), None)


def _borrowing(
    group: Group, donor: Group | None, options: DataOptions, skip: Callable[[BadRow], None]
) -> Iterator[Group]:
    """Yield the group with the donor's first response as its mismatched one, or skip it."""
    if donor is not None:
        response = donor.responses[0]
        mismatched = Response(response.input_ids, response.loss_mask, label=False)
        yield replace(group, extras={**group.extras, "mismatched": mismatched})
        return
    bad = BadRow(
        group.source,
        group.row,
        "mismatched",
        f"no response to another prompt fits beside the {len(group.prompt_ids)} tokens of this "
        f"prompt in max_length={options.max_length}: raise it, or lower max_prompt_length",
    )
    if options.on_bad_row == "error":
        raise bad
    skip(bad)
