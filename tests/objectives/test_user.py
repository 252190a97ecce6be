"""Objectives of a user's own: where they are found, and what is said where they are not."""

from __future__ import annotations

import copy
import enum
import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NewType, Protocol, cast

import numpy as np
import pytest
import torch

import fastpo
from fastpo import OBJECTIVES, Objective, PreferenceLoss, register
from fastpo.domain import Domain
from fastpo.objectives import as_objective, get_objective
from fastpo.objectives.base import Outcome, Term
from fastpo.objectives.user import spelled

FILE = '''
from fastpo import Objective, Outcome, Term
from fastpo.domain import Positive

def mine(ratio, mask, *, beta=0.1):
    """beta (u_l - u_w)"""
    gap = beta * (ratio[:, 1] - ratio[:, 0])
    return Outcome((Term(gap),), (beta * ratio).detach())
mine.family = "pair"

described = Objective(mine, "list", "a paper", "a formula", name="listed")
number = 3.0
def unsaid(ratio, mask): ...
def misspelt(ratios, mask): ...
misspelt.family = "pair"
def swapped(ratio, mask, beta): ...
swapped.family = "pair"
def golden(ratio, gold_logps, mask): ...
golden.family = "pair"
def many(*scores): ...
many.family = "pair"
def unset(ratio, *, beta): ...
unset.family = "pair"
def dpo(ratio, mask): ...
dpo.family = "pair"
def unfit(ratio, mask, *, beta: Positive = -1.0): ...
unfit.family = "pair"
'''


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `own_losses.py`, which is the working directory."""
    (tmp_path / "own_losses.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_losses", "broken_losses", "leaving_losses"):
        sys.modules.pop(name, None)


def test_a_function_and_an_objective() -> None:
    objective = get_objective("own_losses:mine")
    assert (objective.name, objective.family, objective.paper) == ("mine", "pair", "own")
    assert objective.formula == "beta (u_l - u_w)"
    listed = get_objective("own_losses.py:described")
    assert (listed.name, listed.family, listed.formula) == ("listed", "list", "a formula")
    assert objective.fn is listed.fn  # one module, by either name
    assert "mine" not in OBJECTIVES


def test_it_is_an_objective_like_any_other() -> None:
    head = torch.nn.Linear(8, 16, bias=False)
    hidden, labels = torch.randn(4, 5, 8), torch.randint(0, 16, (4, 5))
    mixture = {"dpo": 1.0, "own_losses:mine": 0.5}
    loss = PreferenceLoss(mixture, head, **{"mine.beta": 0.3, "beta": [0.1, 0.2]})
    assert [c.objective.name for c in loss.components] == ["dpo", "mine"]
    assert loss.components[1].hyper == {"beta": 0.3}
    assert loss(hidden, labels, ref_logps=torch.zeros(4, 5)).loss.isfinite()
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again.components[1].objective.fn is loss.components[1].objective.fn
    with pytest.raises(ValueError, match="beta='a lot' must be a number"):
        PreferenceLoss("own_losses:mine", head, beta="a lot")


def test_beside_a_recipe_it_is_found_and_named_from_here(own: Path) -> None:
    folder = own / "runs"
    folder.mkdir()
    (folder / "own_losses.py").write_text(FILE.replace("mine", "theirs"))
    assert get_objective("own_losses:theirs", beside=folder).name == "theirs"
    assert spelled("own_losses:theirs", folder) == "runs/own_losses.py:theirs"
    assert spelled("own_losses:mine", own) == "own_losses:mine"
    assert spelled("own_losses:mine", None) == "own_losses:mine"


def test_an_objective_that_is_handed_over_is_the_one_that_is_used() -> None:
    """Whatever function it is of: one of the catalogue's may have another name or family."""
    again = Objective(OBJECTIVES["dpo"].fn, "pair", name="again")
    assert as_objective(again) is again
    assert as_objective(again.fn) is OBJECTIVES["dpo"]
    try:
        assert register(again) is OBJECTIVES["again"] is register(replace(again))
        with pytest.raises(ValueError, match="the name 'again' is taken"):
            register(replace(again, family="list"))
    finally:
        del OBJECTIVES["again"]


@pytest.mark.parametrize("family", ["list", "nonsense"])
def test_a_family_that_contradicts_is_refused(family: Any) -> None:
    def mine(ratio, mask): ...

    vars(mine)["family"] = "pair"
    for objective in (mine, OBJECTIVES["dpo"], OBJECTIVES["dpo"].fn):
        with pytest.raises(ValueError, match=f"family='{family}': .* compares 'pair': leave"):
            as_objective(objective, family=family)
        assert as_objective(objective, family="pair").family == "pair"


class Kind(enum.Enum):
    A = "a"


class Link(Protocol):
    def __call__(self, z: Any) -> Any: ...


# What stands for "not set", and what no annotation of ours describes.
DEFAULTS = {
    "no cap": (float, math.inf),
    "nothing": (float, None),
    "a member": (Kind, Kind.A),
    "a function": (Link, torch.tanh),
    "a union inside": (Annotated[float | None, Domain(0)], 0.1),
    "another name": (NewType("Rate", float), 0.1),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_default_may_be_what_it_was(kind: str) -> None:
    def mine(ratio, mask, *, option=DEFAULTS[kind][1]): ...

    mine.__annotations__["option"] = DEFAULTS[kind][0]
    objective = as_objective(mine, family="pair")  # pyright: ignore[reportArgumentType]
    assert objective.hyper == {"option": DEFAULTS[kind][1]}
    if kind not in ("no cap", "nothing"):
        assert objective.fitted("option", DEFAULTS[kind][1]) is DEFAULTS[kind][1]


def test_a_file_need_not_be_an_identifier(own: Path) -> None:
    for stem in ("my-losses", "2b"):
        (own / f"{stem}.py").write_text(FILE)
        assert get_objective(f"{stem}:mine").name == "mine"


@pytest.mark.parametrize("weight", [1, np.float32(0.5), np.int64(2), torch.tensor([0.5])], ids=repr)
def test_a_weight_is_any_one_number(weight: Any) -> None:
    def weighted(ratio, mask):
        return Outcome((Term(ratio.sum(-1), weight=weight),), ratio.detach())

    scores = {"ratio": torch.ones(2, 2), "mask": torch.ones(2, 2).bool()}
    (term,) = Objective(weighted, "pair")(scores).terms
    assert term.weight is weight


@pytest.mark.parametrize("text", ['{"dpo": 1, "sft": 0.1}', '{"dpo": 1', "{mine.py:mine: 1}"])
def test_a_mixture_that_is_text_is_no_reference(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a name nor a mapping"):
        get_objective(text)


REFUSED = {
    "own_losse:mine": "there is no own_losse, .*: did you mean 'own_losses'?",
    "other/own_losses.py:mine": "there is no other/own_losses.py, looked for in ",
    "own_losses:min": "own_losses.py has no 'min': did you mean 'mine'?",
    "own_losses:": "write module:function, such as my_module:my_loss",
    ":mine": "write module:function",
    "broken_losses:mine": r"broken_losses.py failed: ZeroDivisionError: division by zero",
    "own_losses:number": "is a float: name a function of scores",
    "own_losses:unsaid": "does not say what it compares: write unsaid.family = 'pair'",
    "own_losses:misspelt": "takes 'ratios', which is no score: did you mean 'ratio'?",
    "own_losses:swapped": "takes 'beta', which is no score: hyper-parameters come after a *",
    "own_losses:golden": r"no score of the prompt's own .*extras=\('gold',\)",
    "runs/other.py:mine": "no runs/other.py, .*: did you mean 'runs/others.py'?",
    "leaving_losses:mine": "leaving_losses.py failed: SystemExit: 3",
    "own_losses.mine": "one of your own is called module:function",
    "own_losses:many": r"takes \*scores: name every score",
    "own_losses:unset": "hyper-parameter 'beta' without a default",
    ".:mine": "write module:function",
    ".own.losses:mine": "write module:function",
    "runs/own_losses:mine": "write module:function, .*, or path/to/file.py:my_loss",
    "own_losses:unfit": "default that its own annotation refuses: beta=-1.0 must be above 0",
    "own_losses:dpo": "another is called 'dpo': rename the function",
}


@pytest.mark.parametrize("reference", REFUSED)
def test_what_is_not_there_is_said_in_one_line(own: Path, reference: str) -> None:
    (own / "broken_losses.py").write_text("1 / 0\n")
    (own / "leaving_losses.py").write_text("raise SystemExit(3)\n")
    (own / "runs").mkdir()
    (own / "runs" / "others.py").write_text("")
    with pytest.raises(ValueError, match=REFUSED[reference]) as error:
        get_objective(reference)
    assert reference in str(error.value)
    assert "\n" not in str(error.value)


outcome, term = cast(Any, Outcome), cast(Any, Term)
# Every field that is of another type, and sizes that are not the batch's.
RETURNS = {
    "a Tensor": lambda z, r: z,
    "a tuple": lambda z, r: ((term(z),), r),
    "a NoneType": lambda z, r: None,
    "terms None": lambda z, r: outcome(None, r),
    r"terms \(\)": lambda z, r: outcome((), r),
    "a Tensor among its terms": lambda z, r: outcome((z,), r),
    "losses that are a float": lambda z, r: outcome((term(1.0),), r),
    "losses that are a list": lambda z, r: outcome((term([1.0, 2.0]),), r),
    r"losses of shape \[\] for 2": lambda z, r: outcome((term(z.sum()),), r),
    "a term's weight None": lambda z, r: outcome((term(z, weight=None),), r),
    r"a term's weight tensor\(": lambda z, r: outcome((term(z, weight=z),), r),
    "a term per 'pairs'": lambda z, r: outcome((term(z, "pairs"),), r),
    "rewards that are a NoneType": lambda z, r: outcome((term(z),), None),
    r"rewards of shape \[2\]": lambda z, r: outcome((term(z),), z.detach()),
}


@pytest.mark.parametrize("said", RETURNS)
def test_another_return_type_is_refused(said: str) -> None:
    def returns(ratio, mask):
        return RETURNS[said](ratio.sum(-1), ratio.detach())

    with pytest.raises(ValueError, match=f"returns returned {said}.*: return Outcome"):
        Objective(returns, "pair")({"ratio": torch.zeros(2, 2), "mask": torch.ones(2, 2).bool()})


def test_a_function_itself_is_no_name() -> None:
    for objective in (test_register, {test_register: 1.0}):
        with pytest.raises(ValueError, match=r"is no name: write .* fastpo.register\(it\)"):
            PreferenceLoss(objective)  # pyright: ignore[reportArgumentType]


def test_register() -> None:
    def twice(ratio, mask, *, beta=0.1):
        return Outcome((Term(2 * beta * ratio.sum(-1)),), ratio.detach())

    try:
        objective = register(twice, family="pair")
        assert OBJECTIVES["twice"] is objective is get_objective("twice") is register(objective)
        assert PreferenceLoss("twice", beta=0.2).components[0].objective is objective
        with pytest.raises(ValueError, match=r"the name .twice. is taken: give .* another, or del"):
            register(Objective(lambda ratio: None, "pair", name="twice"))
    finally:
        del OBJECTIVES["twice"]
    assert as_objective(OBJECTIVES["kto"].fn) is OBJECTIVES["kto"]


def test_the_order_of_old_is_answered() -> None:
    with pytest.raises(TypeError, match="the function comes first and gives the name"):
        fastpo.Objective("square", as_objective, "pair", "own", "x")  # pyright: ignore
    with pytest.raises(ValueError, match="family='pairs' must be"):
        Objective(as_objective, "pairs")  # pyright: ignore


def test_two_of_one_name_do_not_mix() -> None:
    with pytest.raises(ValueError, match="two objectives of the mixture are called 'mine'"):
        PreferenceLoss({"own_losses:mine": 1, "own_losses.py:mine": 1})
