"""Read the reference from the model with its adapter off, a frozen copy, disk, or nowhere.

A reference is called with the (possibly wrapped) policy and a batch, and returns what
`PreferenceLoss.of_tokens` takes: target tokens with log-probs beside them, and states of the
reference's own. Where it sees another prompt than the policy, it reads `Batch.for_reference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fastpo.batch import Batch, TargetTokens
from fastpo.data.groups import Group
from fastpo.head.head import Head
from fastpo.head.spec import HeadOptions
from fastpo.head.statistics import token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.model.adapters import adapter_off, altered_base, copied
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach, mode, target_hidden
from fastpo.reference.store import ReferenceStore, ShardWriter

log = logging.getLogger(__name__)


class Compared(NamedTuple):
    """Hold a batch's target tokens beside what references say of them."""

    tokens: TargetTokens  # with the log-probs that are known
    states: ReferenceStates | None = None  # of a reference that was run


class Reference(Protocol):
    """Say what a policy is compared with, or nothing."""

    def __call__(self, model: nn.Module, batch: Batch) -> Compared: ...


class LiveReference(Protocol):
    """Run a model as the reference."""

    model: Any
    head: Head

    def states(self, model: nn.Module, batch: Batch) -> ReferenceStates: ...


def adapter_parameters(model: nn.Module) -> Callable[[str], bool]:
    """Return a test of names: does `disable_adapter` take that parameter out of the model?"""
    layers = {n for m in model.modules() if isinstance(m, BaseTunerLayer) for n in _names_of(m)}
    layers |= {"modules_to_save", "token_adapter"}
    return lambda name: not layers.isdisjoint(name.split("."))


def _names_of(layer: BaseTunerLayer) -> tuple[str, ...]:
    return (*layer.adapter_layer_names, *layer.other_param_names)


def _states(head: Head, hidden: Tensor) -> ReferenceStates:
    """Return states with the head as it is now: an adapter may have switched it.

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
    return ReferenceStates(hidden, HeadTensors(weight, bias))


def logps_of(source: LiveReference, model: nn.Module, batch: Batch, options: HeadOptions) -> Tensor:
    """Return [N] log-probs of the batch's target tokens under a live reference."""
    with torch.no_grad():
        hidden, head = source.states(model, batch)
        assert head is not None
        targets, spec = batch.tokens.targets, source.head.spec
        stats = token_statistics(
            hidden, head, targets, want=("logps",), spec=spec, options=options, all_scored=True
        )
        return batch.tokens.read(stats["logps"])


class NoReference:
    """Leave the batch as it is, for objectives that need no reference."""

    def __call__(self, model: nn.Module, batch: Batch) -> Compared:
        return Compared(batch.tokens)


class AdapterReference:
    """Run the policy's base model: adapters off, saved modules switched back to the originals.

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
    def states(self, model: nn.Module, batch: Batch) -> ReferenceStates:
        """Return the base model's states, through the policy's own wrappers."""
        with adapter_off(self.model):
            return _states(self.head, target_hidden(model, batch.for_reference))

    def __call__(self, model: nn.Module, batch: Batch) -> Compared:
        return Compared(batch.tokens, self.states(model, batch))


class ModelReference:
    """Run a whole model: a frozen one beside the policy, or the policy before its first step."""

    def __init__(self, reference: PreTrainedModel | PeftModel, head: Head) -> None:
        self.model, self.head = reference, head

    @classmethod
    def frozen(cls, reference: PreTrainedModel | PeftModel) -> ModelReference:
        """Make a reference of this model, never trained and in evaluation mode."""
        reference.requires_grad_(False).eval()
        attach(reference)
        return cls(reference, read_head(reference))

    @classmethod
    def copy_of(cls, policy: PreTrainedModel | PeftModel) -> ModelReference:
        """Copy the policy as it is now; weights that are not trained are shared with it."""
        return cls.frozen(copied(policy, (p for p in policy.parameters() if not p.requires_grad)))

    @torch.no_grad()
    def states(self, model: nn.Module, batch: Batch) -> ReferenceStates:
        """Return this model's states, whatever the policy is."""
        return _states(self.head, target_hidden(self.model, batch.for_reference))

    def __call__(self, model: nn.Module, batch: Batch) -> Compared:
        return Compared(batch.tokens, self.states(model, batch))


class SecondReference:
    """Add the log-probs of a second reference: any frozen model with the same tokens."""

    def __init__(self, first: Reference, second: ModelReference, options: HeadOptions) -> None:
        self.first, self.second, self.options = first, second, options

    def __call__(self, model: nn.Module, batch: Batch) -> Compared:
        logps = logps_of(self.second, model, batch, self.options)
        tokens, states = self.first(model, batch)
        return Compared(replace(tokens, ref2_logps=logps), states)


class StoredReference:
    """Use log-probs that the collator read from a `ReferenceStore`, or from two."""

    def __init__(self, store: ReferenceStore) -> None:
        self.store = store

    def __call__(self, model: nn.Module, batch: Batch) -> Compared:
        return Compared(batch.tokens)


def live_reference(
    kind: str,
    model: PreTrainedModel | PeftModel,
    head: Head,
    ref_model: PreTrainedModel | PeftModel | None = None,
) -> AdapterReference | ModelReference:
    """Return the reference of kind `adapter` or `copy`, which is of `ref_model` if there is one.

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
    """Return the model at the start: its adapter off where it does nothing yet, else a copy.

    Args:
        asked: what the configuration says; `adapter` means the base model whatever the adapter is.
        live: the model with its adapter off.
        effect: of the adapter at the start, from `adapter_effect`.

    Raises:
        ValueError: `adapter` is asked for, but its initialisation changed the base weights.
    """
    if not effect:
        return live
    change = f"log-probs change by up to {effect:.2g} with the adapter switched off"
    if asked != "adapter":
        log.info("the reference is a copy of the model at the start: %s", change)
        return ModelReference.copy_of(live.model)
    if (altered := altered_base(live.model)) is not None:
        raise ValueError(
            f"reference='adapter', but {altered} changed the weights under the adapter ({change}): "
            "use reference='auto' or 'copy', which take the model as it is at the start"
        )
    log.info("the reference is the base model, not the model at the start: %s", change)
    return live


def num_targets(group: Group) -> int:
    """Count the log-probs of a group: scored tokens of its candidates and extras."""
    return sum(int(r.loss_mask.sum()) for r in group.every)


def fill_store(
    store: ReferenceStore,
    groups: Sequence[Group],
    source: LiveReference,
    collate: Callable[[list[Group]], Batch],
    *,
    batch_size: int = 8,
    rows: Callable[[list[Group]], list[list[Group]]] = lambda batch: [batch],
    options: HeadOptions = HeadOptions(),
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
        options: who computes, in how much memory.
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
            logps = logps_of(source, source.model, collate(part), options)
            sizes = [num_targets(g) for g in part]
            writer.add(part, [v.numpy() for v in logps.float().cpu().split(sizes)])
            bar.update(len(part))
        writer.flush()
    return count
