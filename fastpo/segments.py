"""Map each target token to its response, and each response to its group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Where = Literal["groups", "full groups", "candidates", "desirable"]
"""Places of a batch that are known before any number is: groups [G] with a candidate, groups with
one in every slot, candidates [G, K], desirable candidates."""


class Bounds(NamedTuple):
    """Say where groups lie among tokens and responses, in integers of the host: nobody waits.

    Groups follow each other: group g has the responses numbered responses[g] to responses[g + 1].
    """

    responses: tuple[int, ...]  # [G + 1]
    lengths: tuple[int, ...]  # [R] target tokens

    @property
    def tokens(self) -> list[int]:
        """Return [G + 1]: group g has the target tokens from tokens[g] up to tokens[g + 1]."""
        ends = [0, *itertools.accumulate(self.lengths)]
        return [ends[n] for n in self.responses]

    def select(self, lo: int, hi: int) -> Bounds:
        """Return the bounds of the groups lo:hi alone."""
        first, last = self.responses[lo], self.responses[hi]
        return Bounds(
            tuple(n - first for n in self.responses[lo : hi + 1]), self.lengths[first:last]
        )


@dataclass(frozen=True)
class Segments:
    """Say which response a target token belongs to, and which group a response belongs to.

    Args:
        response: [N] int64, the response in [0, R) that each target token belongs to; never
            decreasing, so that the tokens of a response follow each other.
        grid: [G, K] int64, the response in each slot of each group, -1 where a group is shorter.
        label: [G, K] bool, True for desirable responses (chosen, thumbs-up, best rank).
        num_responses: R, a Python integer so that no device sync is needed.
        score: [G, K] float, the grade that the data give each response, or None.
        rank: [G, K] int64, 0 is best, ties share a rank, or None.
        weight: [G] float, sample weight of each group, or None for ones.
        margin: [G] float, an outside judgement of how much better slot 0 is than slot 1, or None.
        population: [G] int64, the population each group comes from (MaxMin), or None.
        index: [G] int64, the number of each group in its data set, or None for 0, 1, ...: what
            seeded draws are keyed by, so that they do not depend on how a step is cut.
        extras: role -> [G] int64, a further response of each group that is no candidate:
            `mismatched` (KTO: the response to another prompt), `gold`, `ref_response`,
            `context_chosen` and its kind (a candidate again, after another prompt).
        bounds: where groups lie, for tables that were made on the host; None asks the device.
        places: where -> [n] int64, the flat places that `Where` names; asked of the device without.

    Raises:
        ValueError: `response` decreases. A table with `bounds` is trusted. On a GPU the tokens are
            only looked at where sums rely on it, by an assertion of the device, for which nobody
            waits.
    """

    response: Tensor
    grid: Tensor
    label: Tensor
    num_responses: int
    score: Tensor | None = None
    rank: Tensor | None = None
    weight: Tensor | None = None
    margin: Tensor | None = None
    population: Tensor | None = None
    index: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    bounds: Bounds | None = None
    places: Mapping[Where, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bounds is not None or self.response.device.type != "cpu":
            return
        back = (self.response.diff() < 0).nonzero()
        if len(back):
            i = int(back[0])
            raise ValueError(
                f"segments.response falls from {int(self.response[i])} to "
                f"{int(self.response[i + 1])} at token {i + 1}: sort the tokens by response "
                "(order = response.argsort(stable=True))"
            )

    @property
    def starts(self) -> Tensor:
        """Return [R + 1] int64: response r has the target tokens starts[r] up to starts[r + 1]."""
        if self.response.is_cuda:
            torch._assert_async((self.response.diff() >= 0).all(), "segments.response decreases")
        numbers = torch.arange(self.num_responses + 1, device=self.response.device)
        return torch.searchsorted(self.response, numbers)

    @property
    def mask(self) -> Tensor:
        """Return [G, K] bool, True where a group has a candidate."""
        return self.grid >= 0

    @property
    def longest(self) -> int:
        """Count the tokens of the longest response; costs a device sync without `bounds`."""
        if self.bounds is not None:
            return max(self.bounds.lengths, default=0)
        lengths = self.starts.diff()
        return int(lengths.max()) if len(lengths) else 0

    def tokens_of_groups(self) -> list[int]:
        """Count each group's target tokens, extras included; a device sync without `bounds`."""
        if self.bounds is not None:
            return [hi - lo for lo, hi in itertools.pairwise(self.bounds.tokens)]
        lengths = self.starts.diff()
        tokens = torch.where(self.mask, lengths[self.grid.clamp(min=0)], 0).sum(dim=1)
        for index in self.extras.values():
            tokens = tokens + lengths[index]
        return tokens.tolist()

    def with_places(self) -> Segments:
        """Return the same segments with all places at hand; made on the host, nobody waits."""
        return replace(self, places={where: places_of(where, self) for where in get_args(Where)})

    def at(self, where: Where) -> Tensor:
        """Return [n] int64, the flat places that `where` names; a device sync without `places`."""
        return self.places[where] if where in self.places else places_of(where, self)

    def select(self, lo: int, hi: int) -> tuple[Segments, Tensor | slice]:
        """Return the segments of groups lo:hi alone, and the indices or slice of their tokens."""
        grid = self.grid[lo:hi]
        extras = {role: index[lo:hi] for role, index in self.extras.items()}
        names = ("score", "rank", "weight", "margin", "population")
        of_groups: dict[str, Any] = {
            n: None if (v := getattr(self, n)) is None else v[lo:hi] for n in names
        }
        number = torch.arange(lo, hi, device=grid.device)
        number = number if self.index is None else self.index[lo:hi]
        of_groups |= {"label": self.label[lo:hi], "index": number}
        if self.bounds is not None:
            tokens, first = self.bounds.tokens, self.bounds.responses[lo]
            taken = slice(tokens[lo], tokens[hi])
            part = Segments(
                response=self.response[taken] - first,
                grid=torch.where(grid >= 0, grid - first, -1),
                num_responses=self.bounds.responses[hi] - first,
                extras={role: index - first for role, index in extras.items()},
                bounds=self.bounds.select(lo, hi),
                **of_groups,
            )
            return part, taken
        taken = torch.zeros(self.num_responses, dtype=torch.bool, device=grid.device)
        for index in (grid[grid >= 0], *extras.values()):
            taken[index] = True
        index = taken[self.response].nonzero().squeeze(1)
        new = taken.cumsum(0) - 1
        part = Segments(
            response=new[self.response[index]],
            grid=torch.where(grid >= 0, new[grid.clamp(min=0)], -1),
            num_responses=int(taken.sum()),
            extras={role: new[index] for role, index in extras.items()},
            **of_groups,
        )
        return part, index

    @classmethod
    def pairs(cls, num_pairs: int, length: int, *, device: torch.device | None = None) -> Segments:
        """Make segments of the padded chosen-then-rejected layout: 2B rows of `length` tokens."""
        rows = torch.arange(2 * num_pairs, device=device)
        return cls(
            response=rows.repeat_interleave(length),
            grid=torch.stack([rows[:num_pairs], rows[num_pairs:]], dim=1),
            label=torch.tensor([True, False], device=device).expand(num_pairs, 2),
            num_responses=2 * num_pairs,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """Return the same segments with every tensor on `device`."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Segments:
        """Return the same segments with every tensor changed."""
        return replace(self, **changed_tensors(self, change))


def changed_tensors(record: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a dataclass's tensors, and dicts of tensors, by field name, each of them changed."""
    changed: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor):
            changed[f.name] = change(value)
        elif isinstance(value, Mapping):
            changed[f.name] = {name: change(tensor) for name, tensor in value.items()}
    return changed


def places_of(where: Where, table: Segments) -> Tensor:
    """Return [n] int64 from the table's own masks.

    Raises:
        ValueError: a `where` that is none of `Where`.
    """
    if where == "groups":
        mask = table.mask.any(-1)
    elif where == "full groups":
        mask = table.mask.all(-1)
    elif where == "candidates":
        mask = table.mask
    elif where == "desirable":
        mask = table.label & table.mask
    else:
        raise ValueError(f"where={where!r}: choose one of {get_args(Where)}")
    return mask.flatten().nonzero().squeeze(1)
