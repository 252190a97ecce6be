"""Read the arguments of functional forms: which there are, and the scores that are made of them.

`functional` documents the rule. One piece of code follows it: `Reader` makes scores of a call's
arguments, and a dry run of it lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import DIVISORS, Family, Objective, Per, mean
from .lipo import tie_keys
from .listwise import logo
from .pairwise import ipo
from .reference_free import cpo, orpo
from .vocabulary import Score, scores_with

SHAPES: dict[Family, dict[str, str]] = {
    "pair": {"[G, K]": "[B]", "[G]": "[B]", "[G, K, T]": "[B, T]"},
    "point": {"[G, K]": "[B]", "[G]": "[B]", "[G, K, T]": "[B, T]"},
    "list": {"[G, K]": "[G, K]", "[G]": "[G]", "[G, K, T]": "[G, K, T]"},
}
"""A score's shape -> an argument's, by family."""

OF_MEANS = (orpo, logo)
"""Their forms take means, of which `length` makes the sums of their likelihood term."""
WITHOUT_LENGTH = (ipo, cpo, *OF_MEANS)
"""Forms that can do without lengths: see `Reader.mean`."""

# Those that may be left out have the shape of the others.
_LATE = ("tie_key", "label", "token_weights", "token_kl_weights", "token_mask", "mask")
_LOGPS = re.compile(r"(mean_)?(ref_|ref2_|old_)?logps")
_DIFFERENCES = {"ratio": "ref_", "ratio2": "ref2_"}


class Argument(NamedTuple):
    """Describe an argument of a form."""

    name: str
    score: str  # what it is, or what it is a side of
    shape: str
    required: bool


class Reader:
    """Make an objective's scores of a form's arguments.

    Args:
        objective: the objective.
        table: the scores that it may take, `scores_with(objective.extras)`.
        call: the arguments of a call by name; None for a dry run, which lists in `arguments` what
            is asked for.
    """

    def __init__(
        self,
        objective: Objective,
        table: Mapping[str, Score],
        call: Mapping[str, Any] | None = None,
    ) -> None:
        self.objective, self.table = objective, table
        self.family: Family = objective.family
        self.needs = frozenset(objective.needs)
        self.call = call
        self.arguments: dict[str, Argument] = {}
        self.sizes: dict[str, tuple[int, str]] = {}  # letter -> size, and the argument that has it
        self.made: dict[str, Tensor] = {}

    def scores(self) -> dict[str, Tensor]:
        """Return all that the objective needs; statistics come last.

        Raises:
            ValueError: an argument of another shape, or one that is needed after all.
        """
        names = [n for n in self.objective.needs if n not in self.objective.statistics]
        for name in sorted(names, key=_LATE.__contains__):
            self.score(name)
        self.score("mask")
        for name in self.objective.statistics:
            self.made[name] = self.statistic(name)
        return {name: self.made[name] for name in (*self.objective.needs, "mask")}

    def divisor(self, per: Per) -> Tensor:
        """Return the count that a term's sum is divided by."""
        names = {"length"} if per.endswith("_tokens") else set()
        names |= {"label"} if per in ("desirable", "undesirable", "chosen_tokens") else set()
        names = {"gold_length"} if per == "gold_tokens" else names
        return DIVISORS[per]({name: self.score(name) for name in (*names, "mask")})

    def score(self, name: str) -> Tensor:
        """Return a score of the vocabulary, [G, K], [G] or [G, K, T]."""
        if name not in self.made:
            self.made[name] = self._score(name)
        return self.made[name]

    def _score(self, name: str) -> Tensor:
        if name == "mask":
            return self._mask()
        if name == "label":
            return self._label()
        if name == "tie_key":
            return self._tie_key()
        if name == "token_mask":
            return self._token_mask()
        if name in ("token_weights", "token_kl_weights"):
            return self._token_weights(name)
        if name in _DIFFERENCES and (self.family != "list" or "token_logps" in self.needs):
            return self.sum("") - self.sum(_DIFFERENCES[name])
        if name == "mean_ratio" and self.family != "list":
            return self.mean("") - self.mean("ref_")
        if match := _LOGPS.fullmatch(name):
            return (self.mean if match[1] else self.sum)(match[2] or "")
        if name.startswith("mean_") and name.removeprefix("mean_") in self.needs:
            return self.score(name.removeprefix("mean_")) / self.score("length").clamp(min=1)
        role, _, quantity = name.rpartition("_mean_")
        if role and f"{role}_{quantity}" in self.needs:  # of an extra response
            return self.score(f"{role}_{quantity}") / self.score(f"{role}_length").clamp(min=1)
        if name == "length" and self._takes("token_"):
            first = next(n for n in self.objective.needs if n.startswith("token_"))
            return self.score("token_mask").sum(-1).to(self.score(first).dtype)
        return self.take(name)

    def sum(self, model: str) -> Tensor:
        """Return summed log-probs [G, K] under the policy (""), or under "ref_", "old_", ..."""
        name = f"{model}logps"
        if name not in self.made:
            if f"token_{name}" in self.needs:
                tokens = self.score("token_mask")
                values = torch.where(tokens, self.score(f"token_{name}"), 0)
                weights = torch.where(tokens, self.score("token_weights"), 0)
                self.made[name] = (values * weights).sum(-1)
            elif self.objective.fn in OF_MEANS:
                length, mean = self.length(), self.mean(model)
                self.made[name] = mean if length is None else mean * length
            else:
                self.made[name] = self.take(name)
        return self.made[name]

    def mean(self, model: str) -> Tensor:
        """Return mean log-probs [G, K]; made of the sums where those are there.

        Without lengths IPO takes what it is given for both.
        """
        name = f"mean_{model}logps"
        if name not in self.made:
            sums = {"logps", "ratio", "token_logps"} & self.needs
            if not sums or self.objective.fn in OF_MEANS:
                self.made[name] = self.take(name)
            else:
                total = self.sum(model)
                length = self.length()
                self.made[name] = total if length is None else total / length.clamp(min=1)
        return self.made[name]

    def length(self) -> Tensor | None:
        """Return the number of tokens [G, K]; None where none has to be passed and none is."""
        if self.objective.fn not in WITHOUT_LENGTH or "length" in self.made:
            return self.score("length")
        length = self.optional("length")
        if length is not None:
            self.made["length"] = length
        return length

    def _takes(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.needs)

    def _mask(self) -> Tensor:
        mask = self.optional("mask") if self.family == "list" else None
        return self._constant(True) if mask is None else _bool("mask", mask)

    def _label(self) -> Tensor:
        if self.family == "pair":
            return self._constant(True) & (torch.arange(2, device=self._like().device) == 0)
        required = self.family == "point" and len(self.objective.labels) != 1
        label = self.take("label") if required else self.optional("label")
        if label is not None:
            return _bool("label", label) & self.score("mask")
        if self.family == "list":
            columns = torch.arange(self._like().shape[1], device=self._like().device)
            return self.score("mask") & (columns == 0)
        return self._constant(self.objective.labels[0])

    def _tie_key(self) -> Tensor:
        key, like = self.optional("tie_key"), self._like()
        rows = torch.arange(like.shape[0], device=like.device)
        return tie_keys(rows, like.shape[1]) if key is None else key

    def _token_weights(self, name: str) -> Tensor:
        like = next((self.made[n] for n in self.made if n.startswith("token_")), None)
        if like is None:
            return self.take(name)
        weights = self.optional(name)
        if weights is not None:
            return weights
        return torch.ones_like(like) if name == "token_weights" else self.score("token_weights")

    def _token_mask(self) -> Tensor:
        """Return whether there is a token, of a weight that is not 0."""
        like = next(self.score(n) for n in self.objective.needs if n.startswith("token_"))
        mask = self.optional("token_mask")
        kinds = ["token_weights", *self.needs & {"token_kl_weights"}]
        weighted = torch.stack([self.score(kind) != 0 for kind in kinds]).any(0)
        return weighted.expand_as(like) if mask is None else _bool("token_mask", mask) & weighted

    def statistic(self, name: str) -> Tensor:
        """Return a number of the whole batch, handed in or made of this one."""
        statistic = self.objective.statistics[name]
        # A mean of all steps, or of responses to other prompts, is in no batch of a form.
        taken = tuple(role for role in self.objective.extras if self._takes(f"{role}_"))
        required = statistic.memory == "mean" or taken != self.objective.extras
        self.arguments[name] = Argument(name, name, "", required)
        if self.call is not None and self.call[name] is not None:
            return self._number(name, self.call[name])
        if required:
            return self._like().new_zeros(1)
        hyper = self.objective.hyper if self.call is None else self.call
        hyper = {key: hyper[key] for key in self.objective.hyper}
        values, where = statistic.of(_Scores(self), hyper)
        observed = values.detach()[where].double()
        return statistic.reduce(observed, hyper).to(values.dtype)

    def _number(self, name: str, value: Any) -> Tensor:
        """Return a statistic that was handed in, a plain number as a tensor []."""
        like, statistic = self._like(), self.objective.statistics[name]
        if isinstance(value, Real) and not isinstance(value, bool):
            value = torch.tensor(value, dtype=like.dtype, device=like.device)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: pass a number or a tensor")
        size = statistic.size if statistic.memory == "ema" else 1
        if statistic.memory == "none" and statistic.reduce is not mean:
            return value  # of any shape
        if value.numel() != size or (size > 1 and value.dim() > 1):
            count = "one number" if size == 1 else f"{size} numbers"
            raise ValueError(f"{name} has shape {list(value.shape)}: it is {count} of the batch")
        return value if size > 1 else value.reshape(())

    def take(self, score: str) -> Tensor:
        """Return an argument as a score."""
        value = self._read(score, required=True)
        assert value is not None
        return value

    def optional(self, score: str) -> Tensor | None:
        """Return an argument that may be left out as a score; None where it is."""
        return self._read(score, required=False)

    def _read(self, score: str, *, required: bool) -> Tensor | None:
        known = self.table.get(score)
        of = "[G, K]" if known is None else known.shape  # means of a reference are in no table
        sides = [score]
        if self.family == "pair" and of != "[G]":
            sides = [_side(score, side) for side in ("chosen", "rejected")]
        shape = SHAPES[self.family][of]
        for name in sides:
            self.arguments[name] = Argument(name, score, shape, required)
        if self.call is None:
            dtype = torch.bool if score in ("label", "mask", "token_mask") else torch.float32
            return torch.ones([2] * (of.count(",") + 1), dtype=dtype) if required else None
        passed = [name for name in sides if required or self.call[name] is not None]
        if not passed:
            return None
        if len(passed) < len(sides):
            raise ValueError(f"{' and '.join(sides)} go together: pass both, or neither")
        values = [self._checked(name, self.call[name], shape) for name in sides]
        if len(values) == 2:
            return torch.stack(values, dim=1)
        one = self.family == "point" and of != "[G]"
        return values[0][:, None] if one else values[0]

    def _checked(self, name: str, value: object, shape: str) -> Tensor:
        """Return a tensor of this shape, and keep the sizes of its letters for the next ones."""
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: pass a tensor {shape}")
        letters = shape.strip("[]").split(", ")
        sizes = [self.sizes.get(x, (n, name)) for x, n in zip(letters, value.shape, strict=False)]
        if value.dim() != len(letters) or [n for n, _ in sizes] != list(value.shape):
            others = ", ".join(f"{o} has {n}" for n, o in dict.fromkeys(sizes) if o != name)
            other = f", and {others} of them" if others else ""
            raise ValueError(f"{name} has shape {list(value.shape)}: it is {shape}{other}")
        self.sizes = {**dict(zip(letters, sizes, strict=True)), **self.sizes}
        return value

    def _like(self) -> Tensor:
        """Return a score [G, K] or [G, K, T] for its sizes and device."""
        for value in self.made.values():
            if value.dim() > 1:
                return value
        # Single responses without any score of their own: those of an extra response.
        value = next(iter(self.made.values()))
        return value[:, None].expand(-1, 2 if self.family == "pair" else 1)

    def _constant(self, value: bool) -> Tensor:
        like = self._like()
        return torch.full(like.shape[:2], value, dtype=torch.bool, device=like.device)


class _Scores(dict[str, Tensor]):
    """Hold an objective's scores, and make each further one that a statistic asks for."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader.made)
        self.reader = reader

    def __missing__(self, name: str) -> Tensor:
        return self.reader.score(name)


def _bool(name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}: pass a bool tensor")
    return value


def _side(score: str, side: str) -> str:
    """Return the name of one side of a score.

    >>> [_side(name, "chosen") for name in ("logps", "ref_logps", "mean_ref_logps", "kl")]
    ['chosen', 'ref_chosen', 'ref_chosen_mean', 'chosen_kl']
    """
    match = _LOGPS.fullmatch(score)
    if match is None:
        return f"{side}_{score}"
    return f"{match[2] or ''}{side}{'_mean' if match[1] else ''}"


def arguments_of(objective: Objective) -> list[Argument]:
    """Return the arguments of an objective's form, those that are required first."""
    reader = Reader(objective, scores_with(objective.extras))
    reader.scores()
    if any(name.startswith("gold_") for name in objective.needs):
        reader.score("gold_length")

    def place(argument: Argument) -> tuple[bool, bool, bool]:
        # kto_loss(logps, ref_logps, label, z0): what is of the whole batch last.
        return not argument.required, not argument.shape, argument.score == "length"

    return sorted(reader.arguments.values(), key=place)
