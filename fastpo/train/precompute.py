"""Log-probs of the reference, taken before the first step in the batches of the steps."""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastpo.data.groups import Group
from fastpo.data.token_budget import token_rows
from fastpo.reference.build import Model, StoreBuilder
from fastpo.reference.live import StoredReference
from fastpo.train.preflight import is_sharded

if TYPE_CHECKING:
    from fastpo.train.trainer import PreferenceTrainer

_CUTS = ("max_length", "max_prompt_length", "max_response_length", "truncation")


def stored_reference(
    trainer: PreferenceTrainer, ref_model: Model | None, ref_model2: Model | None
) -> StoredReference:
    """Return the reference that the trainer's collator reads from stores, which are filled here.

    Args:
        trainer: the run, whose packing has been decided.
        ref_model: the reference, where it is not the model as it is now.
        ref_model2: the second one, or None.

    Raises:
        ValueError: a store is of another key, or is to be filled in a sharded run.
    """
    args, collator = trainer.args, trainer.collator
    stores = _builder(trainer)
    if ref_model is not None:
        store = stores.of_model(args.store_dir, ref_model)
    else:
        policy: Any = trainer.model
        effect = trainer._adapter_effect()
        store = stores.of_policy(args.store_dir, policy, trainer.loss.head, effect)  # pyright: ignore
    second = None
    if ref_model2 is not None:
        second = stores.of_model(f"{args.store_dir}-2", ref_model2)
    # Set last: a collator with a store leaves out what a live reference runs on.
    collator.store, collator.store2 = store, second
    return StoredReference(store)


def _builder(trainer: PreferenceTrainer) -> StoreBuilder:
    args, collator = trainer.args, trainer.collator
    own = args.reference == "auto" and args.reference_store is None
    options = args.data_options()
    evals = trainer.eval_dataset
    evals = list(evals.values()) if isinstance(evals, dict) else [evals]
    return StoreBuilder(
        accelerator=trainer.accelerator,
        main_first=partial(args.main_process_first, local=False),
        place=trainer._place,
        tokenizer=trainer.processing_class,  # pyright: ignore[reportArgumentType]
        mixed_precision=args.mixed_precision,
        facts={
            "truncation": {name: getattr(options, name) for name in _CUTS},
            "chat_template_kwargs": options.chat_template_kwargs,
            "share_prompt": collator.share_prompt,
        },
        named_by_key=own,
        work=[
            (_reached(trainer) if own else trainer.train_dataset, trainer._train_batch_size),
            *((each, args.per_device_eval_batch_size) for each in evals),
        ],
        collate=lambda groups: trainer._prepare_inputs(collator(groups)),
        rows=partial(
            _within_budget, most=args.max_tokens_per_row, share_prompt=collator.share_prompt
        ),
        options=trainer._head_options,
        sharded=is_sharded(trainer),
        progress=not args.disable_tqdm,
    )


def _reached(trainer: PreferenceTrainer) -> list[Group] | None:
    """Return the groups that the steps come to, in the order of the first pass.

    Batches of them are those of the steps, so that policy and reference agree to the bit.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None:
        return None
    groups: Any = dataset
    batch = trainer._train_batch_size * args.world_size
    step, steps = batch * args.gradient_accumulation_steps, args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(groups) / step))
    sampler: Any = trainer._get_train_sampler(groups)
    # accelerate's loader is one batch ahead.
    return [groups[i] for i in islice(sampler, steps * step + batch)]


def _within_budget(
    groups: list[Group], *, most: int | None, share_prompt: bool
) -> list[list[Group]]:
    """Return the groups of each row of a batch; without a budget it is one row."""
    if most is None:
        return [groups]
    rows = token_rows(groups, most, share_prompt=share_prompt)
    return [[groups[i] for i in row] for row in rows]
