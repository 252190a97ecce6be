"""What numbers the settings of `TrainingArguments` may be, which has types alone."""

from __future__ import annotations

from typing import Annotated, get_type_hints

from fastpo.domain import (
    Count,
    Domain,
    Natural,
    NonNegative,
    Positive,
    ProperShare,
)

# numpy's generators take no more bits.
Seed = Annotated[int, Domain(0, 2**32 - 1)]


class Ranges:
    """Declare the domains of numbers in `TrainingArguments`."""

    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    eval_accumulation_steps: Count | None
    num_train_epochs: Positive
    max_steps: Annotated[int, Domain(1, besides=-1)]
    learning_rate: NonNegative
    warmup_steps: NonNegative
    weight_decay: NonNegative
    adam_beta1: ProperShare
    adam_beta2: ProperShare
    # At 0 a weight that has had no gradient becomes 0 / 0.
    adam_epsilon: Positive
    max_grad_norm: NonNegative
    neftune_noise_alpha: NonNegative | None
    logging_steps: Positive
    eval_steps: Positive | None
    eval_delay: NonNegative
    save_steps: Positive
    save_total_limit: Count | None
    torch_empty_cache_steps: Count | None
    seed: Seed
    data_seed: Seed | None
    dataloader_num_workers: Natural
    dataloader_prefetch_factor: Count | None
    ddp_bucket_cap_mb: Count | None
    ddp_timeout: Count


RANGES = get_type_hints(Ranges, include_extras=True)
"""Those fields and their types."""
