"""Optimisers: what they are told and need installed, and which move weights stored in few bits.

Adam and sign methods move a weight by about the learning rate. Half the distance between two
neighbouring bfloat16 numbers is 1/512 of the number or more: a step of 1e-5 is rounded away from
every weight above 5e-3. Random rounding (torchao) moves such a weight now and then, by the right
amount on average; Kahan sums (torch-optimi) add small steps up until one shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import strtobool

from fastpo.domain import (
    Count,
    Misfit,
    NonNegative,
    Positive,
    ProperShare,
    Share,
    fitted,
)
from fastpo.errors import did_you_mean
from fastpo.optional import require

RANDOM_ROUNDING = "bf16_stochastic_round"
"""The option of torchao's optimisers; off by default, and on in a `PreferenceConfig`."""

TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
# A step of these is the gradient times the learning rate, whatever that comes to.
_BY_GRADIENT = ("sgd", "schedule_free_sgd", "lomo")
_MOVES = "take optim=adamw_torch_8bit (torchao), which rounds at random"
_SAMPLE = 4096  # weights of each tensor that are looked at

_GALORE = {"rank": Count, "update_proj_gap": Count, "scale": Positive, "proj_type": str}
# What the Trainer reads of `optim_args`, by a part of the optimiser's name, the first that fits. It
# drops other names without a word, and weight_decay is overruled by the key of that name.
_OPTIONS: dict[str, Mapping[str, Any]] = {
    "adamw_torch_8bit": {"block_size": Count, RANDOM_ROUNDING: bool},
    "adamw_torch_4bit": {"block_size": Count, RANDOM_ROUNDING: bool},
    "stable_adamw": {"max_lr": Positive, "kahan_sum": bool, "decouple_lr": bool},
    "ademamix": {
        **dict.fromkeys(("beta1", "beta2", "beta3"), ProperShare),
        "alpha": NonNegative,
        "eps": Positive,
        **dict.fromkeys(("t_alpha", "t_beta3"), Count),
    },
    "rmsprop_bnb": {
        "alpha": Positive,
        "eps": Positive,
        "momentum": NonNegative,
        "min_8bit_size": Count,
    },
    "rmsprop": {"alpha": Share, "eps": Positive, "momentum": NonNegative, "centered": bool},
    "adagrad": {"lr_decay": NonNegative, "eps": Positive},
    "schedule_free": {"weight_lr_power": float, "r": float},
    "sgd": {"momentum": NonNegative, "dampening": NonNegative, "nesterov": bool},
    "galore": _GALORE,
    "apollo": {**_GALORE, "proj": str, "scale_type": str},
    "grokadamw": dict.fromkeys(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), float
    ),
    "anyprecision": {
        "use_kahan_summation": bool,
        **dict.fromkeys(("momentum_dtype", "variance_dtype", "compensation_buffer_dtype"), str),
    },
}
# Optimiser, by a part of its name, the first that fits; module; package.
_PACKAGES = (
    *((name, "torchao", "torchao") for name in TORCHAO),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("grokadamw", "grokadamw", "grokadamw"),
    *(
        (part, "bitsandbytes", "bitsandbytes")
        for part in ("bnb", "8bit", "lion", "paged", "ademamix")
    ),
)


def optimizer_name(args: TrainingArguments) -> str:
    """Return the Trainer's name of the optimiser."""
    return str(getattr(args.optim, "value", args.optim))


def optimizer_options(args: TrainingArguments) -> dict[str, object]:
    """Return the arguments in `optim_args`, as the optimiser of `args` has them.

    Raises:
        ValueError: no `name=value`, a name that the optimiser has not, or a value outside its
            domain.
    """
    text, optim = args.optim_args, optimizer_name(args)
    if not text:
        return {}
    if not isinstance(text, str):
        raise ValueError(f"optim_args={text!r}: write text, such as 'eps=1e-8,momentum=0.9'")
    known = next((taken for part, taken in _OPTIONS.items() if part in optim), {})
    options: dict[str, object] = {}
    for pair in text.replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if not name or not equals or "=" in value:
            raise ValueError(
                f"optim_args={text!r}: {pair!r} is no name=value; several are parted by commas"
            )
        if name not in known:
            raise ValueError(
                f"optim_args: optim={optim} takes no {name!r}: {_instead(name, optim, known)}"
            )
        try:
            options[name] = fitted(_read(value, known[name]), known[name])
        except Misfit as misfit:
            raise ValueError(f"optim_args: {name}={value} {misfit}") from None
    return options


def as_told(args: TrainingArguments, keywords: Mapping[str, object]) -> dict[str, object]:
    """Return an optimiser's keywords with the types of `optim_args`, where they are no text.

    Args:
        args: the configuration.
        keywords: the Trainer's, which hands some numbers and truths on as text.
    """
    options = {k: v for k, v in optimizer_options(args).items() if not isinstance(v, str)}
    return {name: options.get(name, value) for name, value in keywords.items()}


@contextmanager
def schedule_told(args: TrainingArguments) -> Iterator[None]:
    """Say which keywords a schedule, created inside, does not take.

    Raises:
        ValueError: `lr_scheduler_kwargs` that this schedule does not take, or lacks.
    """
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    try:
        yield
    except TypeError as error:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} do not fit "
            f"lr_scheduler_type={kind!r}: {error}"
        ) from error


def _instead(name: str, optim: str, known: Mapping[str, Any]) -> str:
    key = name
    if "adam" in optim or "lion" in optim:
        key = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}.get(name, name)
    if key in {field.name for field in fields(TrainingArguments)}:
        return f"{key} is a key of its own"
    otherwise = f"it has {', '.join(known)}" if known else "it has none, so leave optim_args out"
    return did_you_mean(name, known, otherwise)


def _read(value: str, expected: Any) -> Any:
    """Return text as a truth or a number where such is expected, else as it is."""
    if expected is str:
        return value
    try:
        return bool(strtobool(value)) if expected is bool else float(value)
    except ValueError:
        return value


def require_optimizer(args: TrainingArguments) -> None:
    """Make sure, before anything is loaded, that the package of the optimiser is there.

    Raises:
        PackageError: it is not; names it.
        ValueError: it does not run on this device.
    """
    name = optimizer_name(args)
    for part, module, package in _PACKAGES:
        if part in name:
            require(module, f"optim={name}", package)
            break
    if name == "stable_adamw" and args.device.type == "cpu":
        raise ValueError(
            f"optim={name} runs torch-optimi's Triton kernels, which this CPU cannot: take "
            "optim=adamw_torch_8bit (torchao)"
        )


class LostSteps(NamedTuple):
    """Say how much of a model a step at the peak learning rate leaves as it is.

    Args:
        dtype: of the weights that stay.
        reason: one line with the remedies.
    """

    dtype: torch.dtype
    reason: str


def lost_steps(
    model: nn.Module, args: TrainingArguments, optimizer: torch.optim.Optimizer | None = None
) -> LostSteps | None:
    """Return what speaks against training these weights; None where half of each dtype can move.

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
    of: dict[torch.dtype, int] = {}
    for parameter in (p for p in trained if p.dtype not in kept):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLE)]
        stays = len(flat) * (some + rate == some).float().mean().item() if len(flat) else 0.0
        lost[parameter.dtype] = lost.get(parameter.dtype, 0.0) + stays
        of[parameter.dtype] = of.get(parameter.dtype, 0) + len(flat)
    # Of each dtype by itself: adapters in float32 must not hide what is trained beside them.
    shares = {each: lost[each] / max(1, of[each]) for each in lost}
    dtype = max(shares, key=lambda each: shares[each], default=torch.float32)
    if (share := shares.get(dtype, 0.0)) <= 0.5:
        return None
    ways, kind = "raise learning_rate", str(dtype).removeprefix("torch.")
    if dtype.itemsize < 4:
        ways = "load the model with dtype=float32 (bf16=true still computes in bfloat16)"
    if dtype is torch.bfloat16:
        rounds = name in TORCHAO if optimizer is None else hasattr(optimizer, RANDOM_ROUNDING)
        ways += f", or {f'set {RANDOM_ROUNDING}=True' if rounds else _MOVES}"
    return LostSteps(
        dtype,
        f"optim={name} at learning_rate={rate:g} leaves {share:.0%} of the trained {kind} weights "
        f"as they are, since {kind} rounds such steps away: {ways}",
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
    lost = lost_steps(model, args)
    if lost is not None and lost.dtype is torch.bfloat16:
        raise ValueError(lost.reason)


def _kept(args: TrainingArguments, optimizer: torch.optim.Optimizer | None) -> set[torch.dtype]:
    """Return the dtypes whose small steps the optimiser does not lose."""
    if optimizer is not None:
        random = bool(getattr(optimizer, RANDOM_ROUNDING, False))
        # torch-optimi's None means: where the weights have 16 bits.
        kahan = optimizer.defaults.get("kahan_sum", False) is not False
    else:
        options = optimizer_options(args)
        random = options.get(RANDOM_ROUNDING, False)
        kahan = optimizer_name(args) == "stable_adamw" and options.get("kahan_sum", True)
    if kahan:
        return {torch.bfloat16, torch.float16}
    return {torch.bfloat16} if random else set()
