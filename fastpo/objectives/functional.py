r"""The objectives as plain functions on log-probabilities, for use in any training code.

`<name>_loss` exists for every objective, with its formula, defaults and options; the signature is
made from the objective's own. The mean of the losses is the value of the objective: the number
that `PreferenceLoss` gives for the same responses. Rewards carry no gradient.

>>> import torch
>>> chosen, rejected, reference = torch.tensor([[-10.0], [-20.0], [-15.0]])
>>> loss = dpo_loss(chosen, rejected, reference, reference)
>>> loss.losses, loss.chosen_rewards, loss.rejected_rewards
(tensor([0.3133]), tensor([0.5000]), tensor([-0.5000]))

The rule of the arguments, for B pairs or single responses, or G lists of K candidates; T tokens:

- Pairs: log-probs are `chosen`, `rejected`, with `ref_`, `ref2_` or `old_` in front for another
  model's and `_mean` behind where an objective takes means over tokens; any other score x is
  `chosen_x`, `rejected_x`. All [B].
- Single responses: scores by their names, [B]; `ratio` is made of `logps` and `ref_logps`.
- Lists: scores by their names, [G, K]; `mask` is False in padded slots.
- A mean that is needed beside its sum is made of it and of `length`.
- Tokens are [B, T] or [G, K, T], and sums that are needed beside them are made of them.
  `token_weights` are 1 by default, `token_mask` is True.
- `margin`, `population` and scores of extra responses (`gold_logps`) are [B] by their names.
- `label` [B] is True for desirable responses. Where all have to be of one kind it is None by
  default, and None in lists is the first candidate.
- Numbers of the whole batch (`margin_mean`) are made of this batch by default. What a training run
  remembers of earlier ones, or takes from other prompts, is handed in by name.
- `preference_only=True` leaves the likelihood term of CPO, ORPO, SLiC, TPO, LOGO, PRO and RRHF out.

`functional_form` makes the same of an objective of your own.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastpo.domain import FINITE, domain_of, in_words, number_types

from . import OBJECTIVES, as_objective
from .arguments import WITHOUT_LENGTH, Argument, Reader, arguments_of
from .base import Objective, Outcome
from .pairwise import ipo
from .vocabulary import scores_with


class PairLoss(NamedTuple):
    """Hold losses of B pairs and the implicit rewards of both sides."""

    losses: Tensor  # [B]
    chosen_rewards: Tensor  # [B], detached
    rejected_rewards: Tensor  # [B], detached


class PointLoss(NamedTuple):
    """Hold losses of B single responses and their implicit rewards."""

    losses: Tensor  # [B]
    rewards: Tensor  # [B], detached


class ListLoss(NamedTuple):
    """Hold losses of G lists and the implicit rewards of their candidates."""

    losses: Tensor  # [G]
    rewards: Tensor  # [G, K], detached


Loss = PairLoss | PointLoss | ListLoss


def _has_likelihood(objective: Objective) -> bool:
    return "nll_reduction" in objective.hyper


def functional_form(objective: Objective | Callable[..., Outcome]) -> Callable[..., Loss]:
    """Return `<name>_loss` of an objective, or of its function: a function of plain tensors.

    >>> inspect.signature(functional_form(OBJECTIVES["hinge"])).parameters["ref_chosen"].default
    <class 'inspect._empty'>
    """
    return _form(as_objective(objective))


def _form(objective: Objective) -> Callable[..., Loss]:
    arguments = arguments_of(objective)
    signature = _signature(objective, arguments)
    positional = [argument.name for argument in arguments if argument.required]
    defaults = {
        p.name: p.default for p in signature.parameters.values() if p.default is not p.empty
    }
    hyper = {name: objective.expected(name) for name in objective.hyper}
    numbers = {name: kinds for name in hyper if (kinds := number_types(hyper[name]))}
    domains = {name: domain_of(hyper[name]) or FINITE for name in numbers}
    whole = {name for name, kinds in numbers.items() if float not in kinds}
    label, table = f"{objective.name}_loss", scores_with(objective.extras)

    def loss(*args: Any, **keywords: Any) -> Loss:
        call = {**defaults, **dict(zip(positional, args, strict=False)), **keywords}
        # Comprehensions, because torch 2.11's compiler cannot intersect keys with a list.
        twice = [name for name in positional[: len(args)] if name in keywords]
        if twice or len(args) > len(positional) or call.keys() != signature.parameters.keys():
            try:
                signature.bind(*args, **keywords)
            except TypeError as error:
                raise TypeError(f"{label}() {error}") from None
        for name, value in keywords.items():
            if name not in hyper:
                continue
            half = name in whole and isinstance(value, float)
            if name in domains and isinstance(value, float | int | Tensor) and not half:
                domains[name].check(name, value)  # which a compiler can trace
            else:
                call[name] = objective.option(name, value)
        only = call.get("preference_only", False)
        if not isinstance(only, bool):
            raise ValueError(f"preference_only={only!r} must be true or false")
        try:
            return _evaluate(objective, Reader(objective, table, call), call)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error

    loss.__name__ = loss.__qualname__ = label
    loss.__doc__ = _document(objective, arguments)
    loss.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    loss.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return loss


def _evaluate(objective: Objective, reader: Reader, call: Mapping[str, Any]) -> Loss:
    """Return the losses of one call, whose mean is the objective's value."""
    scores = reader.scores()
    only = call.get("preference_only", False)
    lengthless = objective.fn is ipo or (only and call.get("loss_type") != "ipo")
    if objective.fn in WITHOUT_LENGTH and not lengthless and reader.length() is None:
        names = [a.name for a in reader.arguments.values() if a.score == "length"]
        raise ValueError(
            f"pass {' and '.join(names)}, of which the likelihood term is made, or "
            "preference_only=True to leave it out"
        )
    outcome: Outcome = objective(scores, **{name: call[name] for name in objective.hyper})
    terms = outcome.terms[:1] if only else outcome.terms
    losses = None
    for term in terms:
        values = term.values
        if term.weight != 1:
            values = term.weight * values
        if objective.family == "list" or term.per != "groups":
            count = reader.divisor(term.per).clamp(min=1).to(values.dtype)
            values = values * (len(values) / count)
        losses = values if losses is None else losses + values
    assert losses is not None
    if objective.family == "pair":
        return PairLoss(losses, *outcome.rewards.unbind(-1))
    if objective.family == "point":
        return PointLoss(losses, outcome.rewards.squeeze(-1))
    return ListLoss(losses, outcome.rewards)


def _signature(objective: Objective, arguments: list[Argument]) -> inspect.Signature:
    """Return the signature of a form: tensors, then options."""
    parameter, empty = inspect.Parameter, inspect.Parameter.empty
    parameters = [
        parameter(
            a.name,
            parameter.POSITIONAL_OR_KEYWORD if a.required else parameter.KEYWORD_ONLY,
            default=empty if a.required else None,
            annotation=Tensor if a.required else Tensor | None,
        )
        for a in arguments
    ]
    options = {"preference_only": (False, bool)} if _has_likelihood(objective) else {}
    hyper = {name: (value, objective.expected(name)) for name, value in objective.hyper.items()}
    parameters += [
        parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in {**options, **hyper}.items()
    ]
    returned = {"pair": PairLoss, "point": PointLoss, "list": ListLoss}[objective.family]
    return inspect.Signature(parameters, return_annotation=returned)


def _document(objective: Objective, arguments: list[Argument]) -> str:
    """Return the docstring of a form: the objective's own, with what the arguments are."""
    document = inspect.getdoc(objective.fn) or objective.name
    summary, _, details = document.partition("\n")
    details = details.partition("\n>>>")[0].strip()  # the example calls the objective itself
    table = scores_with(objective.extras)
    described: dict[str, str] = {}
    for a in arguments:
        side = "" if a.name == a.score else f", {'rejected' if 'rejected' in a.name else 'chosen'}"
        if not a.shape:
            made = "" if a.required else "; by default of this batch"
            described[a.name] = f"number of the whole batch{made}."
        else:
            described[a.name] = f"{a.shape} {_definition(a.score, table)}{side}."
    if _has_likelihood(objective):
        described["preference_only"] = "leave the likelihood term out."
    for name in objective.hyper:
        described[name] = f"{in_words(objective.expected(name))}."
    lines = [
        textwrap.fill(f"{n}: {text}", 96, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for n, text in described.items()
    ]
    body = [summary, "", f"The mean of the losses is the value of objective `{objective.name}`."]
    return "\n".join([*body, "", "Args:", *lines, "", details]).rstrip() + "\n"


def _definition(score: str, table: Mapping[str, Any]) -> str:
    if score in table:
        return table[score].definition
    match = re.fullmatch(r"mean_(.+)", score)
    return f"`{match[1]}` / L" if match else score


FORMS: dict[str, Callable[..., Loss]] = {
    f"{name}_loss": _form(objective) for name, objective in OBJECTIVES.items()
}
"""`<name>_loss` -> the form."""

if TYPE_CHECKING:
    cpo_loss: Callable[..., PairLoss]
    dpo_loss: Callable[..., PairLoss]
    ipo_loss: Callable[..., PairLoss]
    orpo_loss: Callable[..., PairLoss]
    simpo_loss: Callable[..., PairLoss]
    kto_loss: Callable[..., PointLoss]
    lipo_loss: Callable[..., ListLoss]

    def __getattr__(name: str) -> Callable[..., Any]: ...


globals().update(FORMS)
for _made in FORMS.values():
    _made.__module__ = __name__
del _made
