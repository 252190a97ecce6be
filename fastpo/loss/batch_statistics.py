"""Take statistics of the whole batch for objectives, and remember those of earlier steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.distributed import gather_rows
from fastpo.loss.mixture import Component
from fastpo.objectives.base import Statistic
from fastpo.segments import Segments


class BatchStatistics(nn.Module):
    """Take numbers of the whole batch, over all ranks, for the components of a mixture.

    Memory is kept in buffers called OBJECTIVE_STATISTIC, which are saved with checkpoints: the
    value, then how many observations ("mean") or steps ("ema") are behind it.

    Args:
        components: the objectives.

    Attributes:
        step: number of the optimiser step; calls of one step count as one for what is remembered.
            While it is None every training call is a step.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        super().__init__()
        self.step: int | None = None
        self._observing: dict[str, list[Tensor]] | None = None
        self._whole_step: dict[str, Tensor] = {}
        self._step_of: dict[str, int | None] = {}
        self._before_step: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        for component in components:
            for name, statistic in component.objective.statistics.items():
                if statistic.memory != "none":
                    size = statistic.size if statistic.memory == "ema" else 1
                    empty = torch.zeros(size + 1, dtype=torch.float64)
                    self.register_buffer(f"{component.objective.name}_{name}", empty)

    def statistics(
        self, component: Component, scores: Mapping[str, Tensor], segments: Segments
    ) -> dict[str, Tensor]:
        """Return a component's statistics by name, without gradient.

        Several ranks tell one another how many observations each has, which costs a device sync;
        one process asks nobody where the mask has a name.
        """
        statistics = {}
        hyper = {**component.objective.hyper, **component.hyper}
        for name, statistic in component.objective.statistics.items():
            key = f"{component.objective.name}_{name}"
            values, mask = statistic.of(scores, hyper)
            observed = _observations(values.detach(), mask, statistic, segments).double()
            if self._observing is not None:
                self._observing.setdefault(key, []).append(observed)
            elif self.training and key in self._whole_step:
                observed = self._whole_step[key]
            else:
                observed = gather_rows(observed)
            if statistic.memory == "none":
                value = statistic.reduce(observed, hyper)
            else:
                value = self._remember(key, statistic, observed, hyper)
            statistics[name] = value.to(values.dtype)
        return statistics

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Collect observations from calls inside; every training call afterwards uses all of them.

        Use it for statistics over all micro-batches of a step: call the module on each of them
        without gradient inside, then train on each. They cost one more forward pass of the model.
        """
        self._observing = {}
        try:
            yield
            self._whole_step = {k: gather_rows(torch.cat(v)) for k, v in self._observing.items()}
        finally:
            self._observing = None

    def _remember(
        self, key: str, statistic: Statistic, observed: Tensor, hyper: Mapping[str, Any]
    ) -> Tensor:
        """Return the statistic after this step's observations so far; evaluation adds none.

        The state moves once a step, however many micro-batches it has: what was before the step is
        kept, and every micro-batch merges all observations of the step into that.
        """
        state = self.get_buffer(key)
        if self.training and torch.is_grad_enabled():
            if key not in self._observed or self.step is None or self._step_of[key] != self.step:
                self._before_step[key] = state.clone()
            elif key not in self._whole_step:
                observed = torch.cat([self._observed[key], observed])
            self._observed[key], self._step_of[key] = observed, self.step
            before, count = self._before_step[key][:-1], self._before_step[key][-1]
            new = 1 if statistic.memory == "ema" else len(observed)
            if statistic.memory == "mean":
                share = new / (count + new).clamp(min=1)
            else:
                decay = statistic.decay
                past = hyper[decay] if isinstance(decay, str) else decay
                share = torch.where(count > 0, torch.full_like(count, 1 - past), 1.0)
            state[:-1] = before + (statistic.reduce(observed, hyper) - before) * share
            state[-1] = count + new
        elif statistic.memory == "ema":  # perhaps evaluated before the first step
            return torch.where(state[-1] > 0, state[:-1], statistic.reduce(observed, hyper))
        value = state[:-1].clone()
        return value if statistic.memory == "ema" else value[0]


def _observations(values: Tensor, mask: Tensor, statistic: Statistic, segments: Segments) -> Tensor:
    """Return [n, ...] of the values [..., ...] where the mask is True, in order."""
    if statistic.where is None:
        return values[mask]
    flat = values.reshape(mask.numel(), *values.shape[mask.dim() :])
    return flat.index_select(0, segments.at(statistic.where))
