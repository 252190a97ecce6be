r"""Move references after the policy: TR-DPO's mixing and BEMA's corrected average.

After every `every` steps, with t the optimiser step:

- `mix` (TR-DPO, arXiv 2404.09656): $\theta_{ref} \leftarrow a\,\theta_t + (1-a)\,\theta_{ref}$;
  a = 1 copies the policy.
- `bema` (arXiv 2508.00180): $E \leftarrow (1-b_t) E + b_t \theta_t$, then $\theta_{ref} \leftarrow
  \alpha_t(\theta_t - \theta_0) + E$; there $b_t = (\rho + \gamma t)^{-\kappa}$ and
  $\alpha_t = (\rho + \gamma t)^{-\eta}$.

Only parameters that the policy trains move, so a LoRA run pays for the adapter alone. What a rule
remembers is saved with every checkpoint: a resumed run has the reference of an unkilled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from fastpo.domain import Count, Domain, Positive, fit_fields

FILE = "reference.safetensors"


@dataclass(frozen=True)
class UpdateRule:
    """Say how the reference moves.

    Args:
        every: optimiser steps between updates.
        rule: `mix` or `bema`, see the module.
        mixup: a of `mix`.
        rho, gamma, eta, kappa: of `bema`.

    Raises:
        ValueError: a value out of range, with the field's name.
    """

    every: Count = 512
    rule: Literal["mix", "bema"] = "mix"
    mixup: Annotated[float, Domain(0, 1, open_low=True)] = 0.6
    rho: Positive = 10.0
    gamma: Positive = 1.0
    eta: Positive = 0.2
    kappa: Positive = 0.5

    def __post_init__(self) -> None:
        annotations = get_type_hints(type(self), include_extras=True)
        fit_fields(self, annotations, "reference_update: ")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> UpdateRule:
        """Make the rule with these fields; an unknown one raises ValueError."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"reference_update has no {name!r}: it has {', '.join(known)}")
        return cls(**values)


class ReferenceUpdate(TrainerCallback):
    """Move a frozen reference model towards the policy as it trains.

    Args:
        rule: when and how.
        policy: the model in training, unwrapped.
        reference: the frozen model; its parameters have the policy's names.

    Raises:
        ValueError: a trained parameter that the reference has not, or in another shape.
    """

    def __init__(self, rule: UpdateRule, policy: nn.Module, reference: nn.Module) -> None:
        self.rule = rule
        ref_parameters = dict(reference.named_parameters())
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in policy.named_parameters():
            if not parameter.requires_grad:
                continue
            target = ref_parameters.get(name)
            if target is None or target.shape != parameter.shape:
                raise ValueError(
                    f"reference_update moves the reference to the policy, but the reference has no "
                    f"{name} of shape {tuple(parameter.shape)}: use the policy's own architecture"
                )
            self.pairs[name] = parameter, target
        self.start: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        if rule.rule == "bema":
            for name, (parameter, _) in self.pairs.items():
                self.start[name] = parameter.detach().clone()
                self.average[name] = parameter.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update where a multiple of `every` steps is done."""
        step = state.global_step
        if step % self.rule.every:
            return
        pace = self.rule.rho + self.rule.gamma * step
        for name, (policy, reference) in self.pairs.items():
            if self.rule.rule == "mix":
                reference.lerp_(policy.to(reference.dtype), self.rule.mixup)
                continue
            average = self.average[name].lerp_(policy.float(), pace**-self.rule.kappa)
            drift = (policy.float() - self.start[name].float()) * pace**-self.rule.eta
            reference.copy_(drift + average)

    def save(self, folder: Path) -> None:
        """Write the reference's moving part, and what the rule remembers, into a checkpoint."""
        tensors = {f"reference.{n}": r.detach().contiguous() for n, (_, r) in self.pairs.items()}
        for kind, values in (("start", self.start), ("average", self.average)):
            tensors |= {f"{kind}.{name}": value.contiguous() for name, value in values.items()}
        save_file(tensors, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the checkpoint has no such file, so its reference is unknown.
        """
        if not (folder / FILE).is_file():
            raise ValueError(
                f"{folder} holds no {FILE}: it was saved without reference_update and cannot be "
                "resumed with it"
            )
        tensors = load_file(folder / FILE)
        for name, (_, reference) in self.pairs.items():
            reference.copy_(tensors[f"reference.{name}"])
        for kind, values in (("start", self.start), ("average", self.average)):
            for name, value in values.items():
                value.copy_(tensors[f"{kind}.{name}"])
