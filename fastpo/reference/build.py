"""Choose a run's reference and build it: which kind, live or stored, and where.

A live reference is chosen before the policy is touched and settled once the policy is on its
device. A store is filled by the policy, or by a `ref_model`, before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpo.data.groups import Group
from fastpo.head.head import Head
from fastpo.head.spec import HeadOptions
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.adapters import adapter_effect
from fastpo.model.self_check import few_tokens
from fastpo.reference.live import (
    AdapterReference,
    LiveReference,
    ModelReference,
    NoReference,
    Reference,
    SecondReference,
    adapter_parameters,
    fill_store,
    live_reference,
    starting_reference,
)
from fastpo.reference.store import ReferenceStore, key_digest, store_key

log = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


def resolve_kind(
    kind: str,
    *,
    needs_reference: bool,
    is_peft: bool,
    has_store: bool = False,
    has_ref_model: bool = False,
    moves: bool = False,
    storable: bool = False,
) -> str:
    """Return what `auto` means: none, store, copy or adapter, in the order of what there is.

    A policy without an adapter is its own reference: `storable`, it takes its log-probs before the
    first step, in the arithmetic of the steps, and needs no memory for a copy.

    Raises:
        ValueError: `adapter` beside a reference model.
    """
    if not needs_reference:
        return "none"
    if kind != "auto":
        if kind == "adapter" and has_ref_model:
            raise ValueError("reference='adapter' and a ref_model exclude each other: give one")
        return kind
    if moves:
        return "copy"
    if has_store:
        return "store"
    if has_ref_model:
        return "copy"
    return "adapter" if is_peft else "store" if storable else "copy"


class ReferenceBuilder:
    """Build a run's live reference in the order of its setup; of a stored one know the kind.

    Args:
        model, head: the policy before `attach`, which binds a forward that a copy must not have.
        loss: the objectives, which say whether they compare with a reference, or with two.
        ref_model, ref_model2: models of references, or None.
        objective: as messages name it.
        asked: the kind that is asked for.
        has_store, moves, storable: as `resolve_kind` takes them.

    Attributes:
        kind: none, store, copy or adapter; an adapter may become a copy in `settle`.
        live: what runs beside the policy, or None.

    Raises:
        ValueError: a reference is missing, or does not fit the model or the objective.
    """

    def __init__(
        self,
        model: Model,
        head: Head,
        loss: PreferenceLoss,
        ref_model: Model | None,
        ref_model2: Model | None,
        *,
        objective: Any,
        asked: str,
        has_store: bool,
        moves: bool,
        storable: bool,
    ) -> None:
        self.asked, self.ref_model2 = asked, ref_model2
        _check_second(objective, loss.needs_second_reference, ref_model2)
        self.kind = resolve_kind(
            asked,
            needs_reference=loss.needs_reference,
            is_peft=isinstance(model, PeftModel),
            has_store=has_store and not loss.needs_kl,
            has_ref_model=ref_model is not None,
            moves=moves,
            storable=storable and ref_model2 is None,
        )
        self.live: AdapterReference | ModelReference | None = None
        if self.kind not in ("none", "store"):
            self.live = live_reference(self.kind, model, head, ref_model)

    def settle(self, effect: Callable[[], float]) -> None:
        """Take a copy of the model where its adapter already does something at the start.

        Args:
            effect: measures what the adapter does, on a model that is on its device.

        Raises:
            ValueError: `adapter` is asked for, but its initialisation changed the base weights.
        """
        if isinstance(self.live, AdapterReference):
            self.live = starting_reference(self.asked, self.live, effect())
            self.kind = "adapter" if isinstance(self.live, AdapterReference) else "copy"

    @property
    def keeps_model(self) -> bool:
        """Return whether a whole model stays beside the policy: a copy, or an unstored second."""
        return self.kind == "copy" or (self.ref_model2 is not None and self.kind != "store")

    def running(self, options: HeadOptions, place: Callable[[Any], None]) -> Reference:
        """Return what runs beside the policy, on its device; nothing does where kind is `store`.

        Args:
            options: who computes the head, in how much memory.
            place: moves a model to the run's device.
        """
        if self.live is None:
            return NoReference()
        reference: Reference = self.live
        frozen = [self.live.model] if isinstance(self.live, ModelReference) else []
        if self.ref_model2 is not None:
            second = ModelReference.frozen(self.ref_model2)
            reference = SecondReference(self.live, second, options)
            frozen.append(second.model)
        for model in frozen:
            place(model)
        return reference


def _check_second(objective: Any, needed: bool, ref_model2: Model | None) -> None:
    if needed and ref_model2 is None:
        raise ValueError(
            f"objective={objective!r} compares with two references: give the second one "
            "as ref_model2"
        )
    if ref_model2 is not None and not needed:
        raise ValueError(
            f"ref_model2 is given, but objective={objective!r} does not compare with two "
            "references: drop it"
        )


def effect_at_start(
    model: nn.Module, head: Head, groups: Sequence[Group], pad_token_id: int
) -> float:
    """Return how far a PEFT model's adapter changes log-probs now; 0 where it does nothing yet.

    One process measures on a few tokens of the groups, and all return its number.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        log.warning("not checked that the model without its adapter is the model at the start")
        return 0.0
    effect = [0.0]
    if PartialState().process_index == 0:
        batch = few_tokens(groups, pad_token_id, model.device)  # pyright: ignore
        effect = [adapter_effect(model, head, batch)]
    return broadcast_object_list(effect)[0]


@dataclass(frozen=True, kw_only=True)
class StoreBuilder:
    """Open reference stores, and fill them with the log-probs of a run's data.

    Args:
        accelerator: of the run.
        main_first: a context that the main process enters before the others.
        place: moves a model to the run's device.
        tokenizer: the policy's.
        mixed_precision: the dtype of autocast.
        facts: what a store's key names beside all these, as `store_key` takes it.
        named_by_key: whether a store lies in a folder named by its key: nobody who asked for none
            should have to remove one of other weights or options.
        work: every data set of the run, with groups a batch; None for one that there is not.
        collate: groups to a batch on the device.
        rows: cuts a batch into what is run at a time.
        options: who computes the head, in how much memory.
        sharded: whether the policy's weights are.
        progress: whether to show a bar.
    """

    accelerator: Accelerator
    main_first: Callable[[], AbstractContextManager]
    place: Callable[[Any], None]
    tokenizer: PreTrainedTokenizerBase
    mixed_precision: str
    facts: Mapping[str, Any]
    named_by_key: bool
    work: Sequence[tuple[Any, int]]
    collate: Callable[[list[Group]], Any]
    rows: Callable[[list[Group]], list[list[Group]]]
    options: HeadOptions
    sharded: bool
    progress: bool

    def of_policy(self, folder: str, policy: Model, head: Head, effect: float) -> ReferenceStore:
        """Return the store of the policy as it is now.

        Args:
            folder: where it lies.
            policy, head: before the first step.
            effect: of its adapter; one without any is no part of the reference, and is drawn anew
                each time.

        Raises:
            ValueError: the store is of another key, or is to be filled by a sharded model.
        """
        skip = {} if effect else {"skip": adapter_parameters(policy)}
        return self._filled(folder, ModelReference(policy, head), **skip)

    def of_model(self, folder: str, model: Model) -> ReferenceStore:
        """Return the store of another model, which is on the device while it computes.

        Raises:
            ValueError: the store is of another key, or is to be filled in a sharded run.
        """
        home = model.device
        self.place(model)
        store = self._filled(folder, ModelReference.frozen(model))
        if model.device != home:
            model.to(home)  # its work is done; the policy needs the memory  # pyright: ignore
        return store

    def _filled(self, folder: str, reference: LiveReference, **skip: Any) -> ReferenceStore:
        model, state = reference.model, self.accelerator
        precision = f"{model.dtype}, autocast {self.mixed_precision}"
        key = store_key(model, self.tokenizer, precision=precision, **self.facts, **skip)
        info = {
            "name": model.config._name_or_path,
            "revision": getattr(model.config, "_commit_hash", None),
        }
        if self.named_by_key:
            folder = f"{folder}/{key_digest(key)}"
        # The folder and its key first, by one process; then everybody opens it.
        with self.main_first():
            store = ReferenceStore(folder, key, info=info, writer=state.process_index)
        for groups, batch_size in self.work:
            if groups is None:
                continue
            if self.sharded and store.missing(groups):
                raise ValueError(
                    f"the reference store {store.path} is not complete and the model of this run "
                    "is sharded: fill it first by starting the same run on one process, with "
                    "reference='store'"
                )
            with state.autocast():
                fill_store(
                    store,
                    groups,
                    reference,
                    self.collate,
                    batch_size=batch_size,
                    rows=self.rows,
                    options=self.options,
                    rank=state.process_index,
                    world_size=state.num_processes,
                    progress=self.progress,
                )
            state.wait_for_everyone()
            store.refresh()
        return store
