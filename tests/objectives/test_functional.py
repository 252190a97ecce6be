"""The functional forms: the numbers of `PreferenceLoss`, under arguments that have a rule."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastpo
from fastpo import OBJECTIVES, Objective, Outcome, PreferenceLoss, Segments, Statistic, Term
from fastpo.objectives import functional
from fastpo.objectives.base import Family

SIZES: dict[Family, list[int]] = {"pair": [2, 2, 2], "point": [1, 1, 1, 1], "list": [3, 2, 4]}
TOKENS, WIDTH, VOCAB = [2, 3, 1, 4, 2, 3, 5, 1, 2, 3, 2, 4, 2], 6, 11


def segments_of(family: Family, roles: tuple[str, ...]) -> Segments:
    """Ragged groups, graded; every role is some response of another group."""
    sizes = SIZES[family]
    groups, candidates = len(sizes), max(sizes)
    grid = torch.full((groups, candidates), -1)
    for i, size in enumerate(sizes):
        grid[i, :size] = torch.arange(size) + sum(sizes[:i])
    responses = sum(sizes) + groups * bool(roles)
    spoken = torch.repeat_interleave(torch.arange(responses), torch.tensor(TOKENS[:responses]))
    label = torch.zeros_like(grid, dtype=torch.bool)
    label[:, 0] = torch.tensor([family != "point" or i % 2 == 0 for i in range(groups)])
    return Segments(
        spoken,
        grid,
        label,
        responses,
        score=0.1 * torch.tensor([[7.0, 2.0, 3.0, 1.0]])[:, :candidates].expand(groups, -1),
        rank=torch.arange(candidates).expand(groups, -1),
        margin=torch.tensor([0.5, -0.2, 1.0, 0.3])[:groups],
        population=torch.tensor([0, 1, 0, 1])[:groups],
        extras={role: sum(sizes) + torch.arange(groups) for role in roles},
    )


def engine(objective: Objective, **hyper: Any) -> tuple[fastpo.LossOutput, dict[str, Tensor]]:
    """What `PreferenceLoss` makes of random states, and the scores that it had, float64."""
    g = torch.Generator().manual_seed(0)
    segments = segments_of(objective.family, objective.extras)
    n = len(segments.response)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight.data = random(VOCAB, WIDTH)
    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    weights[1::5] = 0  # such a token is no part of a length
    loss = PreferenceLoss(objective.name, head, **hyper)
    seen: dict[str, Tensor] = {}
    reduce = loss._reduce
    loss._reduce = lambda scores, *rest: (seen.update(scores), reduce(scores, *rest))[1]
    with torch.no_grad():
        out = loss(
            random(n, WIDTH),
            torch.randint(0, VOCAB, (n,), generator=g),
            segments,
            ref_hidden=random(n, WIDTH),
            ref_weight=random(VOCAB, WIDTH),
            ref2_logps=-random(n).abs(),
            old_logps=-random(n).abs(),
            token_weights=weights,
            token_rewards=random(n),
        )
    return out, seen


def arguments_of(family: Family, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every argument that a form can have, of scores as the engine has them."""
    if family != "pair":
        single = family == "point"
        return {k: v.squeeze(1) if single and v.dim() > 1 else v for k, v in scores.items()}
    named = dict(scores)
    ref_mean = scores["mean_logps"] - scores["mean_ratio"]
    for slot, side in enumerate(("chosen", "rejected")):
        named |= {f"{side}_{k}": v[:, slot] for k, v in scores.items() if v.dim() > 1}
        named |= {
            f"{model}{side}": scores[f"{model}logps"][:, slot] for model in ("", "ref_", "old_")
        }
        named[f"{side}_mean"], named[f"ref_{side}_mean"] = (
            scores["mean_logps"][:, slot],
            ref_mean[:, slot],
        )
    return named


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if "error" not in o.needs])
def test_a_form_has_the_number_of_the_engine(name: str) -> None:
    objective = OBJECTIVES[name]
    out, scores = engine(objective)
    form = getattr(functional, f"{name}_loss")
    parameters = inspect.signature(form).parameters
    keywords, named = {}, arguments_of(objective.family, scores)
    for parameter in parameters.values():
        statistic = parameter.name in objective.statistics
        if parameter.name in objective.hyper or parameter.name == "preference_only":
            continue
        if statistic and parameter.default is parameter.empty:
            keywords[parameter.name] = out.metrics[f"{name}/{parameter.name}"]
        elif not statistic and not parameter.name.endswith("tie_key"):
            keywords[parameter.name] = named[parameter.name]
    loss = form(**keywords)
    torch.testing.assert_close(loss.losses.mean(), out.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.losses, out.losses, rtol=1e-7, atol=1e-12)
    rewards = torch.stack(loss[1:], -1) if objective.family != "list" else loss.rewards
    torch.testing.assert_close(rewards, out.rewards, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["diffusion_dpo", "mapo"])
def test_forms_of_what_no_language_model_has(name: str) -> None:
    errors = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    arguments = errors if name == "diffusion_dpo" else errors[:2]
    stacked = {"error": errors[:2].T, "ref_error": errors[2:].T, "mask": torch.ones(5, 2).bool()}
    outcome = OBJECTIVES[name](stacked)
    loss = getattr(functional, f"{name}_loss")(*arguments)
    assert torch.equal(loss.losses, sum(t.weight * t.values for t in outcome.terms))
    assert torch.equal(loss.chosen_rewards, outcome.rewards[:, 0])


POLICY, REFERENCE = ["chosen", "rejected"], ["ref_chosen", "ref_rejected"]
SIGNATURES = {
    **dict.fromkeys(["dpo", "robust", "ipo", "hinge", "sppo", "bco_pair"], POLICY + REFERENCE),
    "simpo": ["chosen_mean", "rejected_mean"],
    "orpo": ["chosen_mean", "rejected_mean"],
    "cpo": POLICY,
    "tdpo1": [*POLICY, *REFERENCE, "chosen_kl", "rejected_kl"],
    "tdpo2": [*POLICY, *REFERENCE, "chosen_kl", "rejected_kl"],
    "kto": ["logps", "ref_logps", "label", "z0"],
    "bco": ["logps", "ref_logps", "label", "shift"],
    "npo": ["logps", "ref_logps"],
    "lipo": ["ratio", "score"],
    "plackett_luce": ["ratio", "rank"],
    "logo": ["mean_logps"],
}
"""Forms whose arguments stood by themselves before they were made by the rule."""


def test_signatures_that_stay() -> None:
    for name, expected in SIGNATURES.items():
        form = getattr(functional, f"{name}_loss")
        parameters = inspect.signature(form).parameters.values()
        assert [p.name for p in parameters if p.default is p.empty] == expected
        table = OBJECTIVES[name].hyper
        assert table == {p.name: p.default for p in parameters if p.name in table}
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.default is not p.empty)


@pytest.mark.parametrize("name", ["cpo", "orpo", "logo"])
def test_the_preference_part_alone(name: str) -> None:
    """What these three returned before they had a likelihood term; it needs no lengths."""
    logps = -10 * torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([[True, False]]).expand(5, 2)
    named = {"logps": logps, "mean_logps": logps, "label": label, "mask": torch.ones(5, 2).bool()}
    preference, likelihood = OBJECTIVES[name](named).terms
    form = getattr(functional, f"{name}_loss")
    arguments = (logps,) if name == "logo" else logps.unbind(1)
    assert torch.equal(form(*arguments, preference_only=True).losses, preference.values)
    with pytest.raises(ValueError, match=r"pass (chosen_length and rejected_)?length, .*=True"):
        form(*arguments)
    lengths = torch.ones(5, 2) if name == "logo" else torch.ones(2, 5)
    keywords = {"length": lengths} if name == "logo" else {"chosen_length": lengths[0]}
    keywords |= {} if name == "logo" else {"rejected_length": lengths[1]}
    both = preference.values + likelihood.weight * likelihood.values
    assert torch.equal(form(*arguments, **keywords).losses, both)


def test_a_mean_of_ipo_is_what_was_passed_or_by_lengths() -> None:
    sums, lengths = torch.tensor([[-6.0], [-8.0], [-4.0], [-2.0]]), torch.tensor([[2.0], [4.0]])
    means = sums / torch.cat([lengths, lengths])
    as_passed = functional.ipo_loss(*means)
    by_length = functional.ipo_loss(*sums, chosen_length=lengths[0], rejected_length=lengths[1])
    assert torch.equal(as_passed.losses, by_length.losses)
    assert torch.equal(by_length.chosen_rewards, 0.1 * (sums[0] - sums[2]))


def test_lipo_form_takes_a_tie_key() -> None:
    zeros, grades = torch.zeros(1, 3), torch.tensor([[1.0, 0.5, 0.0]])
    forward, backward = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    losses = [
        functional.lipo_loss(zeros, grades, tie_key=key).losses for key in (forward, backward)
    ]
    assert losses[0] != losses[1]


ONE = torch.zeros(3)


def grpo(**options: Any) -> functional.Loss:
    tokens, grades = torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]])
    return functional.grpo_loss(tokens, tokens, grades, **options)


REFUSED = {
    "another size": (
        lambda: functional.dpo_loss(ONE, ONE[:2], ONE, ONE),
        "rejected has shape .2.*",
    ),
    "another rank": (lambda: functional.simpo_loss(ONE[:, None], ONE), r"chosen_mean .* is \[B\]"),
    "no tensor": (lambda: functional.simpo_loss(1.0, ONE), "chosen_mean is a float"),
    "no bool": (lambda: functional.bco_loss(ONE, ONE, ONE, ONE[0]), "label has dtype torch.float"),
    "one length": (lambda: functional.ipo_loss(*[ONE] * 4, chosen_length=ONE), "go together"),
    "no bool option": (lambda: functional.sppo_loss(*[ONE] * 4, half="no"), "half='no' must be t"),
    "no choice": (lambda: functional.gpo_loss(*[ONE] * 4, link="x"), "link='x' must be one of log"),
    "two numbers": (lambda: functional.mdpo_loss(*[ONE] * 5, anchor=[0, 1]), "anchor=.0, 1. must"),
    "no integer": (lambda: grpo(max_length=2.5), "max_length=2.5 must be an integer"),
    "no bool of ours": (
        lambda: functional.cpo_loss(ONE, ONE, preference_only="no"),
        "preference_only='no' must be true or false",
    ),
    "numbers of the batch": (
        lambda: functional.kto_loss(ONE, ONE, ONE > 0, ONE),
        r"z0 has shape \[3\]: it is one number",
    ),
    "no number": (lambda: functional.kto_loss(ONE, ONE, ONE > 0, "0"), "z0 is a str: pass a num"),
    "an option": (lambda: functional.dpo_loss(*[ONE] * 4, beta=-1), r"beta=-1 must be above 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_are_one_line(kind: str) -> None:
    call, said = REFUSED[kind]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("diffusion_dpo", "mapo")])
def test_a_default_may_be_passed(name: str) -> None:
    form = getattr(functional, f"{name}_loss")
    defaults = {n: p.default for n, p in inspect.signature(form).parameters.items()}
    hyper = OBJECTIVES[name].hyper
    assert hyper == {n: OBJECTIVES[name].option(n, defaults[n]) for n in hyper}


def test_numbers_may_be_tensors_or_whole() -> None:
    pairs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = functional.dpo_loss(*pairs, beta=0.5).losses
    assert torch.equal(functional.dpo_loss(*pairs, beta=torch.tensor(0.5)).losses, plain)
    assert torch.equal(grpo(delta=None).losses, grpo().losses)
    fixed = grpo(aggregation="fixed_length", max_length=20)
    assert torch.equal(grpo(aggregation="fixed_length", max_length=20.0).losses, fixed.losses)
    one = functional.kto_loss(*pairs[:2], ONE == 0, 0.25).losses
    for z0 in (torch.tensor([0.25]), torch.tensor([[0.25]])):
        assert torch.equal(functional.kto_loss(*pairs[:2], ONE == 0, z0).losses, one)
    lengths = {"chosen_length": ONE + 2, "rejected_length": ONE + 2}
    weighted = functional.slic_loss(*pairs[:2], sft_weight=0.5, **lengths).losses
    by_numpy = functional.slic_loss(*pairs[:2], sft_weight=np.float32(0.5), **lengths).losses
    assert torch.equal(by_numpy, weighted)


def test_wrong_calls_name_the_form() -> None:
    for call in (
        lambda: functional.dpo_loss(ONE, ONE, ONE),
        lambda: functional.dpo_loss(*[ONE] * 5),
        lambda: functional.dpo_loss(*[ONE] * 4, chosen=ONE),
        lambda: functional.dpo_loss(*[ONE] * 4, bet=0.1),
    ):
        with pytest.raises(TypeError, match=r"dpo_loss\(\) (missing|too many|multiple|got an)"):
            call()


def test_help_says_what_arguments_are() -> None:
    form = functional.grpo_loss
    text = inspect.getdoc(form) or ""
    assert (form.__name__, form.__module__) == ("grpo_loss", functional.__name__)
    assert set(re.findall(r"^    (\w+):", text, re.M)) == set(inspect.signature(form).parameters)
    assert "[G, K, T]" in text
    assert "arxiv.org/abs/2402.03300" in text


def test_forms_compile_and_carry_gradient() -> None:
    chosen, rejected, ref_chosen, ref_rejected = -torch.rand(4, 5).requires_grad_()
    arguments = (chosen, rejected, ref_chosen, ref_rejected)
    compiled = torch.compile(functional.dpo_loss, fullgraph=True, backend="eager")
    for beta in (0.3, 1, 0.5):  # the second float is one that the graph takes
        plain = functional.dpo_loss(*arguments, beta=beta)
        assert torch.equal(compiled(*arguments, beta=beta).losses, plain.losses)
    assert plain.losses.requires_grad
    assert not plain.chosen_rewards.requires_grad


def test_a_form_of_ones_own() -> None:
    def gap(logps: Tensor, mask: Tensor, *, beta: float = 0.5) -> Outcome:
        """The gap."""
        return Outcome((Term(beta * (logps[:, 1] - logps[:, 0])),), logps.detach())

    form = functional.functional_form(Objective(gap, "pair"))
    assert form(torch.tensor([-1.0]), torch.tensor([-3.0])).losses.tolist() == [-1.0]
    assert list(inspect.signature(form).parameters) == ["chosen", "rejected", "beta"]
    gap.family = "pair"  # pyright: ignore[reportFunctionMemberAccess]
    assert functional.functional_form(gap)(ONE, ONE).losses.tolist() == [0.0] * 3
    # Another function's name gives it none of that one's arguments.
    called_orpo = functional.functional_form(Objective(gap, "pair", name="orpo"))
    assert inspect.signature(called_orpo) == inspect.signature(form)


def test_a_statistic_may_ask_for_what_the_function_does_not_take() -> None:
    def longer(logps: Tensor, typical: Tensor, mask: Tensor) -> Outcome:
        return Outcome((Term(logps[:, 0] - typical),), logps.detach())

    typical = Statistic(lambda scores, hyper: (scores["length"], scores["mask"]))
    form = functional.functional_form(Objective(longer, "pair", statistics={"typical": typical}))
    lengths = {"chosen_length": torch.full((3,), 2.0), "rejected_length": torch.full((3,), 4.0)}
    assert form(ONE, ONE, **lengths).losses.tolist() == [-3.0] * 3
    with pytest.raises(TypeError, match=r"longer_loss\(\) missing .*chosen_length"):
        form(ONE, ONE)
