"""Map each target token to its response, and each response to its group."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The table of target tokens by response and of responses by group.

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
        cohort: [G] int64, the population that each group comes from (MaxMin), or None.
        index: [G] int64, the number of each group in its data set, or None for 0, 1, ...: what
            seeded draws are keyed by, so that they do not depend on how a step is cut.
        extras: role -> [G] int64, a further response of each group that is no candidate:
            `mismatched` (KTO: the response to another prompt), `gold`, `ref_response`,
            `context_chosen` and its kind (a candidate again, after another prompt).

    Raises:
        ValueError: `response` decreases. On a GPU the tokens are only looked at where sums rely on
            it, by an assertion of the device, for which the host does not wait.
    """

    response: Tensor
    grid: Tensor
    label: Tensor
    num_responses: int
    score: Tensor | None = None
    rank: Tensor | None = None
    weight: Tensor | None = None
    margin: Tensor | None = None
    cohort: Tensor | None = None
    index: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.response.device.type != "cpu":
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
        every = torch.arange(self.num_responses + 1, device=self.response.device)
        return torch.searchsorted(self.response, every)

    @property
    def mask(self) -> Tensor:
        """Return [G, K] bool, True where a group has a candidate."""
        return self.grid >= 0

    def select(self, lo: int, hi: int) -> tuple[Segments, Tensor]:
        """Return (the segments of groups lo:hi alone, [M] the indices of their tokens)."""
        grid = self.grid[lo:hi]
        extras = {role: index[lo:hi] for role, index in self.extras.items()}
        taken = torch.zeros(self.num_responses, dtype=torch.bool, device=grid.device)
        for index in (grid[grid >= 0], *extras.values()):
            taken[index] = True
        tokens = taken[self.response].nonzero().squeeze(1)
        number = taken.cumsum(0) - 1
        facts = {n: getattr(self, n) for n in ("score", "rank", "weight", "margin", "cohort")}
        part = Segments(
            response=number[self.response[tokens]],
            grid=torch.where(grid >= 0, number[grid.clamp(min=0)], -1),
            label=self.label[lo:hi],
            num_responses=int(taken.sum()),
            index=torch.arange(lo, hi, device=grid.device)
            if self.index is None
            else self.index[lo:hi],
            extras={role: number[index] for role, index in extras.items()},
            **{name: None if value is None else value[lo:hi] for name, value in facts.items()},
        )
        return part, tokens

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
        """Copy the segments with every tensor on `device`."""
        moved: dict = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, non_blocking=non_blocking)
            elif isinstance(value, dict):
                moved[f.name] = {
                    k: v.to(device, non_blocking=non_blocking) for k, v in value.items()
                }
        return replace(self, **moved)
