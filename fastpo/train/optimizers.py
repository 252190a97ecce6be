"""Which optimisers move weights that are stored in few bits, and what they need to be installed.

Adam and sign methods move a weight by about the learning rate. Half the distance between two
neighbouring bfloat16 numbers is 1/512 of the number or more: a step of 1e-5 is rounded away from
every weight above 5e-3. Random rounding (torchao) moves such a weight now and then, by the right
amount on average; Kahan sums (torch-optimi) add small steps up until one shows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import strtobool

from fastpo.optional import require

RANDOM_ROUNDING = "bf16_stochastic_round"
"""The option of torchao's optimisers; off by default, and on in a `PreferenceConfig`."""

TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
# A step of these is the gradient times the learning rate, whatever that comes to.
_BY_GRADIENT = ("sgd", "schedule_free_sgd", "lomo")
_MOVES = "take optim=adamw_torch_8bit (torchao), which rounds at random"
_SAMPLE = 4096  # weights of each tensor that are looked at


def optimizer_name(args: TrainingArguments) -> str:
    """The Trainer's name of the optimiser."""
    return str(getattr(args.optim, "value", args.optim))


def optimizer_option(args: TrainingArguments, option: str) -> str:
    """The value of an option in `optim_args`; "" where it is not given."""
    pairs = (pair.partition("=") for pair in (args.optim_args or "").replace(" ", "").split(","))
    return {name: value for name, _, value in pairs}.get(option, "")


def require_optimizer(args: TrainingArguments) -> None:
    """Make sure, before anything is loaded, that the package of the optimiser is there.

    Raises:
        PackageError: it is not; names it.
        ValueError: it does not run on this device.
    """
    name = optimizer_name(args)
    if name in TORCHAO:
        require("torchao", f"optim={name}")
    elif name == "stable_adamw":
        require("optimi", f"optim={name}", "torch-optimi")
        if args.device.type == "cpu":
            raise ValueError(
                f"optim={name} runs torch-optimi's Triton kernels, which this CPU cannot: take "
                "optim=adamw_torch_8bit (torchao)"
            )


class LostSteps(NamedTuple):
    """How much of a model a step at the peak learning rate leaves as it is.

    Args:
        dtype: the one that most of the weights have which stay.
        reason: one line with the remedies.
    """

    dtype: torch.dtype
    reason: str


def lost_steps(
    model: nn.Module, args: TrainingArguments, optimizer: torch.optim.Optimizer | None = None
) -> LostSteps | None:
    """What speaks against training these weights; None where more than half of them can move.

    Args:
        model: on any device; the weights that require a gradient are looked at.
        args: the optimiser, and the learning rate at its peak.
        optimizer: the one that is used in place of that of `args`.

    Raises:
        ValueError: no weight requires a gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not trained:
        raise ValueError(
            "no parameter of the model requires a gradient: unfreeze some, or train an adapter"
        )
    rate, name = args.learning_rate, optimizer_name(args)
    if optimizer is not None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        name = type(optimizer).__name__
    if not rate:
        return None
    kept = _kept(args, optimizer)
    lost: dict[torch.dtype, float] = {}
    for parameter in (p for p in trained if p.dtype not in kept):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLE)]
        stays = len(flat) * (some + rate == some).float().mean().item() if len(flat) else 0.0
        lost[parameter.dtype] = lost.get(parameter.dtype, 0.0) + stays
    share = sum(lost.values()) / max(1, sum(p.numel() for p in trained))
    if share <= 0.5:
        return None
    dtype = max(lost, key=lambda each: lost[each])
    ways = "raise learning_rate"
    if dtype.itemsize < 4:
        ways = "load the model with dtype=float32 (bf16=true still computes in bfloat16)"
    if dtype is torch.bfloat16:
        rounds = name in TORCHAO if optimizer is None else hasattr(optimizer, RANDOM_ROUNDING)
        ways += f", or {f'set {RANDOM_ROUNDING}=True' if rounds else _MOVES}"
    return LostSteps(
        dtype,
        f"optim={name} at learning_rate={rate:g} leaves {share:.0%} of the trained weights as they "
        f"are, since {str(dtype).removeprefix('torch.')} rounds such steps away: {ways}",
    )


def refuse_lost_steps(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a run whose steps would leave a bfloat16 model as it is.

    What is trained beside frozen weights, and steps of another size than the rate, are let pass.

    Raises:
        ValueError: the run would learn nothing; names the optimiser and the ways out.
    """
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    if frozen or optimizer_name(args) in _BY_GRADIENT:
        return
    found = lost_steps(model, args)
    if found is not None and found.dtype is torch.bfloat16:
        raise ValueError(found.reason)


def _kept(args: TrainingArguments, optimizer: torch.optim.Optimizer | None) -> set[torch.dtype]:
    """The dtypes whose small steps the optimiser does not lose."""
    if optimizer is not None:
        random = bool(getattr(optimizer, RANDOM_ROUNDING, False))
        # torch-optimi's None means: where the weights have 16 bits.
        kahan = optimizer.defaults.get("kahan_sum", False) is not False
    else:
        name, given = optimizer_name(args), optimizer_option(args, RANDOM_ROUNDING)
        random = name in TORCHAO and bool(strtobool(given or "False"))
        kahan = name == "stable_adamw"
    if kahan:
        return {torch.bfloat16, torch.float16}
    return {torch.bfloat16} if random else set()
