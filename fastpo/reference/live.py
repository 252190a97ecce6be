"""Where the reference comes from: the model with its adapter off, a frozen copy, disk, or nowhere.

A reference is called with the (possibly wrapped) policy and a batch, and returns what
`PreferenceLoss` takes: `ref_hidden` with the head's tensors, `ref_logps`, or nothing. Where it sees
another prompt than the policy, its own batch lies in the batch under "reference".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fastpo.data.groups import Group
from fastpo.head.functional import linear_logps
from fastpo.head.head import Head
from fastpo.model.adapters import adapter_off, altered_base, copied
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach, label_hidden, mode
from fastpo.reference.store import ReferenceStore, ShardWriter

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class Reference(Protocol):
    """Reference of one batch, as keyword arguments of `PreferenceLoss.forward`."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]: ...


class LiveReference(Reference, Protocol):
    """One that runs a model: returns `ref_hidden` with the head's tensors."""

    model: Any
    head: Head


def adapter_parameters(model: nn.Module) -> Callable[[str], bool]:
    """A test of parameter names: is it one that `disable_adapter` takes out of the model?"""
    layers = {n for m in model.modules() if isinstance(m, BaseTunerLayer) for n in _names_of(m)}
    layers |= {"modules_to_save", "token_adapter"}
    return lambda name: not layers.isdisjoint(name.split("."))


def _names_of(layer: BaseTunerLayer) -> tuple[str, ...]:
    return (*layer.adapter_layer_names, *layer.other_param_names)


def _reference_tensors(head: Head, hidden: Tensor) -> dict[str, Tensor | None]:
    """States and head as `PreferenceLoss` takes them, read now: an adapter may have switched it.

    An active low-rank delta rides beside the states: (h, h A^T) on (W, B), with zeros up to a
    multiple of 16 columns, which kernels want.
    """
    weight, bias, lora = head.weight.detach(), head.bias, head.lora
    if lora is not None:
        low = (hidden @ lora.a.to(hidden.dtype).T) * lora.scaling
        spare = -lora.a.shape[0] % 16
        hidden = torch.cat([hidden, low, hidden.new_zeros(len(hidden), spare)], 1)
        beside = lora.b.detach().to(weight.dtype)
        weight = torch.cat([weight, beside, weight.new_zeros(len(weight), spare)], 1)
    bias = None if bias is None else bias.detach()
    return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    """[N, D] of the prompt that the reference sees; label tokens are numbered as the policy's."""
    return label_hidden(model, batch.get("reference", batch))


def _logps(
    found: dict[str, Tensor | None], targets: Tensor, head: Head, options: dict[str, Any]
) -> Tensor:
    """[N] log-probs of the targets from what a live reference returned."""
    return linear_logps(
        found["ref_hidden"],  # pyright: ignore[reportArgumentType]
        found["ref_weight"],  # pyright: ignore[reportArgumentType]
        targets,
        bias=found["ref_bias"],
        **head.facts(),
        **options,
    )


class NoReference:
    """Of objectives that compare with nothing."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
        return {}


class AdapterReference:
    """The policy's base model: adapters off, saved modules switched back to their originals.

    Raises:
        ValueError: a parameter outside the adapter is trained, so that the base is no reference.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"reference='adapter' needs a PEFT model, got {type(model).__name__}: use 'copy', "
                "'store' or 'auto'"
            )
        is_adapter = adapter_parameters(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_adapter(name):
                raise ValueError(
                    f"reference='adapter', but {name} is trained too and stays changed when the "
                    "adapter is off: use reference='copy' or 'store'"
                )
        self.model, self.head = model, head

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
        with adapter_off(self.model):
            return _reference_tensors(self.head, _hidden(model, batch))


class ModelReference:
    """A whole model: a frozen one beside the policy, or the policy before its first step."""

    def __init__(self, reference: PreTrainedModel | PeftModel, head: Head) -> None:
        self.model, self.head = reference, head

    @classmethod
    def frozen(cls, reference: PreTrainedModel | PeftModel) -> ModelReference:
        """This model, never trained and in evaluation mode."""
        reference.requires_grad_(False).eval()
        attach(reference)
        return cls(reference, read_head(reference))

    @classmethod
    def copy_of(cls, policy: PreTrainedModel | PeftModel) -> ModelReference:
        """The policy as it is now; weights that are not trained are shared with it."""
        return cls.frozen(copied(policy, (p for p in policy.parameters() if not p.requires_grad)))

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
        return _reference_tensors(self.head, _hidden(self.model, batch))


class SecondReference:
    """A reference, and the log-probs of a second one: any frozen model with the same tokens."""

    def __init__(self, first: Reference, second: ModelReference, options: dict[str, Any]) -> None:
        self.first, self.second, self.options = first, second, options

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
        found = self.second(model, batch)
        logps = _logps(found, batch["targets"], self.second.head, self.options)
        return {**self.first(model, batch), "ref2_logps": logps}


class StoredReference:
    """Log-probs that the collator read from a `ReferenceStore`, or from two."""

    def __init__(self, store: ReferenceStore) -> None:
        self.store = store

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
        return {name: batch[name] for name in ("ref_logps", "ref2_logps")}


def live_reference(
    kind: str,
    model: PreTrainedModel | PeftModel,
    head: Head,
    ref_model: PreTrainedModel | PeftModel | None = None,
) -> AdapterReference | ModelReference:
    """The reference of kind `adapter` or `copy`; a given `ref_model` is the frozen one.

    Raises:
        ValueError: the reference's head has other facts (soft-cap, scale) than the policy's.
    """
    if kind == "adapter":
        return AdapterReference(model, head)
    if ref_model is None:
        return ModelReference.copy_of(model)
    reference = ModelReference.frozen(ref_model)
    if reference.head.facts() != head.facts():
        raise ValueError(
            f"the ref_model's head has {reference.head.facts()}, the policy's {head.facts()}: both "
            "must share them; use reference='store' with log-probs of that model instead"
        )
    return reference


def starting_reference(
    asked: str, live: AdapterReference, effect: float
) -> AdapterReference | ModelReference:
    """The model at the start: its adapter off where it does nothing yet, else a copy.

    Args:
        asked: what the configuration says; `adapter` means the base model whatever the adapter is.
        live: the model with its adapter off.
        effect: of the adapter at the start, from `adapter_effect`.

    Raises:
        ValueError: `adapter` is asked for, but its initialisation changed the base weights.
    """
    if not effect:
        return live
    told = f"log-probs change by up to {effect:.2g} with the adapter switched off"
    if asked != "adapter":
        log.info("the reference is a copy of the model at the start: %s", told)
        return ModelReference.copy_of(live.model)
    if (altered := altered_base(live.model)) is not None:
        raise ValueError(
            f"reference='adapter', but {altered} changed the weights under the adapter ({told}): "
            "use reference='auto' or 'copy', which take the model as it is at the start"
        )
    log.info("the reference is the base model, not the model at the start: %s", told)
    return live


def label_tokens(group: Group) -> int:
    """How many log-probs a group has: scored tokens of its candidates and extras."""
    return sum(int(r.loss_mask.sum()) for r in group.every)


def fill_store(
    store: ReferenceStore,
    groups: Sequence[Group],
    source: LiveReference,
    collate: Callable[[list[Group]], Batch],
    *,
    batch_size: int = 8,
    rows: Callable[[list[Group]], list[list[Group]]] = lambda batch: [batch],
    options: dict[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    what: str = "reference log-probs",
    progress: bool = True,
) -> int:
    """Compute the log-probs of the groups that the store does not hold yet.

    Args:
        store: where they go, shard by shard; a killed run goes on where it stopped.
        groups: all groups of the run.
        source: whose log-probs.
        collate: groups to a batch on the model's device.
        batch_size: groups a batch.
        rows: cuts a batch into what is run at a time.
        options: `backend` and `workspace_mib` of the head.
        rank, world_size: this process takes every world_size-th batch, as in training.
        what: the progress bar's title.

    Returns:
        how many groups this process computed.
    """
    todo = store.missing(groups)
    starts = range(0, len(todo), batch_size)[rank::world_size]
    batches = [[groups[i] for i in todo[start : start + batch_size]] for start in starts]
    count = sum(map(len, batches))
    if not count:
        return 0
    writer = ShardWriter(store)
    bar = tqdm(total=count, desc=what, unit="group", disable=not progress or rank > 0)
    with bar, mode(source.model, training=False):
        for part in (row for batch in batches for row in rows(batch)):
            batch = collate(part)
            found = source(source.model, batch)
            with torch.no_grad():
                logps = _logps(found, batch["targets"], source.head, options or {})
            sizes = [label_tokens(g) for g in part]
            writer.add(part, [v.numpy() for v in logps.float().cpu().split(sizes)])
            bar.update(len(part))
        writer.flush()
    return count
