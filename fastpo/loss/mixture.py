"""Resolve names and weights of objectives, and their hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastpo.domain import Misfit, Positive, fitted
from fastpo.errors import did_you_mean
from fastpo.objectives import get_objective, unknown_objective
from fastpo.objectives.base import Objective
from fastpo.objectives.elsewhere import answer
from fastpo.objectives.links import check_smoothing


class Component(NamedTuple):
    """Hold one objective of a mixture."""

    objective: Objective
    weight: float
    hyper: dict[str, Any]


def resolve(objective: str | Mapping[str, float], hyper: Mapping[str, Any]) -> list[Component]:
    """Return the components of a name or mixture, with their hyper-parameters.

    A hyper-parameter goes to every component that has one of that name; `"dpo.beta"` goes to one.
    A number may be two, [first, last], between which it moves linearly as training goes on.

    Raises:
        ValueError: an unknown objective or hyper-parameter (with its name here, or the nearest), a
            value outside its domain, a weight that is not above 0, an empty mixture.
    """
    if not isinstance(objective, str | Mapping):
        raise ValueError(
            unknown_objective(objective)
            if callable(objective)
            else f"objective={objective!r} is neither a name nor a mapping of names to weights"
        )
    mixture = {objective: 1.0} if isinstance(objective, str) else dict(objective)
    if not mixture:
        raise ValueError("the mixture of objectives is empty: name at least one")
    components = []
    for name, weight in mixture.items():
        try:
            components.append(Component(get_objective(name), float(fitted(weight, Positive)), {}))
        except Misfit as misfit:
            raise ValueError(
                f"objective {name!r} has weight {weight!r}: it {misfit}; leave out what has none"
            ) from None
    names = [component.objective.name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two objectives of the mixture are called {name!r}: rename one")
    owners: dict[str, list[Component]] = {}
    for component in components:
        for key in component.objective.hyper:
            owners.setdefault(key, []).append(component)
            owners[f"{component.objective.name}.{key}"] = [component]
    # "dpo.beta" after "beta", so that the particular overrides the general.
    for key in sorted(hyper, key=lambda k: "." in k):
        if key not in owners:
            raise ValueError(
                f"{' + '.join(mixture)} has no hyper-parameter {key!r}: "
                + _hint(key, hyper[key], components, owners)
            )
        name = key.rpartition(".")[2]
        for component in owners[key]:
            try:
                component.hyper[name] = component.objective.fitted(name, hyper[key])
            except Misfit as misfit:
                raise ValueError(f"{key}={hyper[key]!r} {misfit}") from None
    for component in components:
        in_force = {**component.objective.hyper, **component.hyper}
        check_smoothing(in_force.get("loss_type", ""), in_force.get("label_smoothing", 0))
    return components


def _hint(key: str, value: Any, components: list[Component], owners: Iterable[str]) -> str:
    """Say what an unknown hyper-parameter is called here, or the nearest name, or all names."""
    known = sorted(owners)
    hint = answer(key, value, [c.objective.name for c in components], known)
    return hint or did_you_mean(key, known, f"it has {', '.join(known)}")
