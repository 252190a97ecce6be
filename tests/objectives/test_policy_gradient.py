"""Policy gradients: what they are on policy, and how the names reduce to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.objectives.policy_gradient import group_advantages, leave_one_out_advantages
from fastpo.testing.three_way import assert_three_way

from .test_families import randn, value

G, K, T = 3, 4, 5
ALL = torch.ones(G, K).bool()
LENGTHS = torch.tensor([[5, 3, 1, 2], [4, 4, 2, 5], [1, 2, 3, 4]])
TOKENS = torch.arange(T) < LENGTHS[..., None]
LOGPS = -randn(G, K, T, seed=1).abs() * TOKENS
OLD = LOGPS + randn(G, K, T, seed=2) * 0.3 * TOKENS
WEIGHTS = TOKENS.double()
Q = randn(G, K, seed=3)


def scores(**changed: Tensor) -> dict[str, Tensor]:
    named = {
        "token_logps": LOGPS,
        "token_old_logps": OLD,
        "token_ref_logps": OLD - 0.1 * TOKENS,
        "token_weights": WEIGHTS,
        "token_mask": TOKENS,
        "score": Q,
        "mask": ALL,
        **changed,
    }
    for name in ("logps", "old_logps", "ref_logps"):
        named.setdefault(name, (named[f"token_{name}"] * named["token_weights"]).sum(-1))
    named["ratio"] = named["logps"] - named["ref_logps"]
    return named


def run(name: str, named: dict[str, Tensor], **hyper):
    objective = OBJECTIVES[name]
    return objective(named, **hyper)


def policy_gradient(name: str, named: dict[str, Tensor], **hyper) -> Tensor:
    logps = named["token_logps"].clone().requires_grad_()
    changed = {**named, "token_logps": logps, "logps": (logps * named["token_weights"]).sum(-1)}
    return torch.autograd.grad(value(run(name, changed, **hyper)).sum(), logps)[0]


ON_POLICY = scores(token_old_logps=LOGPS)


@pytest.mark.parametrize("name", ["bnpo", "dapo", "cispo", "vespo"])
def test_on_policy_gradients_are_reinforce_over_tokens(name: str) -> None:
    exact = -group_advantages(Q, ALL)[..., None] * TOKENS
    assert_three_way(policy_gradient(name, ON_POLICY), exact, exact, name)


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "sapo"])
def test_on_policy_gradients_are_reinforce_over_responses(name: str) -> None:
    exact = -group_advantages(Q, ALL)[..., None] * TOKENS / LENGTHS[..., None]
    assert_three_way(policy_gradient(name, ON_POLICY), exact, exact, name)


def test_on_policy_gradients_of_the_rest() -> None:
    centred = group_advantages(Q, ALL, scale_rewards="none")[..., None]
    dr = -centred * TOKENS / 7
    assert_three_way(policy_gradient("dr_grpo", ON_POLICY, max_length=7), dr, dr, "dr_grpo")
    dro = -centred * TOKENS
    assert_three_way(policy_gradient("dro", ON_POLICY), dro, dro, "dro")
    luspo = -group_advantages(Q, ALL)[..., None] * TOKENS
    assert_three_way(policy_gradient("luspo", ON_POLICY), luspo, luspo, "luspo")
    # With q alone for reward RLOO's advantage is K/(K-1) times the centred one.
    rloo = -centred * K / (K - 1) * TOKENS
    assert_three_way(policy_gradient("rloo", ON_POLICY, beta=0.0), rloo, rloo, "rloo")


def test_names_are_settings_of_grpo() -> None:
    named, clip = scores(), {"epsilon_low": 0.1, "epsilon_high": 0.3}
    settings = {
        "dr_grpo": {"aggregation": "fixed_length", "scale_rewards": "none"},
        "bnpo": {"aggregation": "token_mean"},
        "dapo": {"aggregation": "token_mean"},
        "gspo": {"importance": "sequence"},
        "luspo": {"importance": "sequence", "aggregation": "fixed_length", "max_length": 1},
    }
    for name, options in settings.items():
        mine, general = run(name, named, **clip), run("grpo", named, **clip, **options)
        assert torch.equal(value(mine), value(general)), name
        assert mine.terms[0].per == general.terms[0].per
    assert run("dapo", named).terms[0].per == "response_tokens"


def test_gspo_of_a_response_has_one_ratio_for_all_its_tokens() -> None:
    ratios = ((LOGPS - OLD).sum(-1) / LENGTHS).exp()
    a = group_advantages(Q, ALL)
    exact = -torch.minimum(ratios * a, ratios.clamp(0.9, 1.2) * a).sum(-1)
    found = value(run("gspo", scores(), epsilon_low=0.1, epsilon_high=0.2))
    assert_three_way(found, exact, exact, "gspo", terms=a.abs().sum(-1).max().item())


def test_gspo_token_differs_where_weights_do() -> None:
    clip = {"epsilon_low": 0.5, "epsilon_high": 0.5}
    for weights, same in ((WEIGHTS, True), (WEIGHTS * torch.arange(1, T + 1), False)):
        named = scores(token_weights=weights)
        whole = policy_gradient("gspo", named, **clip)
        single = policy_gradient("gspo", named, importance="sequence_token", **clip)
        assert torch.allclose(whole, single) == same


@pytest.mark.parametrize("delta", [1.1, 1.5, 4.0])
def test_delta_bounds_the_unclipped_ratio(delta: float) -> None:
    """As -min(min(r, delta) A, clip(r) A), below and above the clip's own bound."""
    old = LOGPS - 2 * randn(G, K, T, seed=6) * TOKENS
    ratio, a = (LOGPS - old).exp(), group_advantages(Q, ALL)[..., None]
    losses = -torch.minimum(ratio.clamp(max=delta) * a, ratio.clamp(0.8, 1.2) * a)
    exact = (losses * TOKENS).sum((-2, -1))
    found = value(run("grpo", scores(token_old_logps=old), delta=delta, aggregation="token_mean"))
    terms = (losses * TOKENS).abs().sum((-2, -1)).max().item()
    assert_three_way(found, exact, exact, "delta", terms=terms)
    free = value(run("grpo", scores(token_old_logps=old), aggregation="token_mean"))
    assert not torch.equal(free, found)


def test_token_weights_multiply_losses_and_not_ratios() -> None:
    heavy = scores(token_weights=3 * WEIGHTS)
    for name in (
        "grpo",
        "dr_grpo",
        "dapo",
        "bnpo",
        "gspo",
        "luspo",
        "cispo",
        "sapo",
        "vespo",
        "dro",
    ):
        plain = 3 * value(run(name, scores()))
        assert_three_way(value(run(name, heavy)), plain, plain, name, terms=30.0)
    assert torch.equal(value(run("gmpo", heavy)), value(run("gmpo", scores())))


def test_equal_grades_teach_nothing() -> None:
    """Even where the ratio overflows."""
    named = scores(score=torch.ones(G, K).double(), token_old_logps=LOGPS - 1e4 * TOKENS)
    for name in ("grpo", "dapo", "gspo", "gmpo", "sapo", "cispo", "vespo"):
        assert (value(run(name, named)) == 0).all(), name
        assert (policy_gradient(name, named) == 0).all(), name


def test_advantages() -> None:
    q = torch.tensor([[1.0, 2.0, 3.0, float("nan")]]).double()
    mask = torch.tensor([[True, True, True, False]])
    exact = torch.tensor([[-1.0, 0.0, 1.0, 0.0]]).double()
    assert torch.equal(group_advantages(q, mask, scale_rewards="none"), exact)
    scaled = exact / (1 + 1e-4)  # Bessel: the deviation is 1
    assert torch.equal(group_advantages(q, mask), scaled)
    assert torch.equal(leave_one_out_advantages(q, mask), 1.5 * exact)
    alone = torch.tensor([[True, False, False, False]])
    assert (group_advantages(q, alone) == 0).all()
    assert (leave_one_out_advantages(q, alone) == 0).all()


def test_p3o_is_invariant_to_shifts_of_the_reward_and_half_of_rloo() -> None:
    """On policy both forms have the gradient -(r_1 - r_2) grad(S_1 - S_2) / 2.

    RLOO's advantages of a pair are r_1 - r_2 and its negative: twice P3O's loss.
    """
    pair = {name: x[:, :2] for name, x in scores(token_old_logps=LOGPS).items()}
    shifted = {**pair, "score": pair["score"] + randn(G, 1, seed=7)}
    gap = pair["score"][:, 0] - pair["score"][:, 1]
    exact = torch.stack([-gap, gap], 1)[..., None] / 2 * pair["token_mask"]
    for clipping in ("separate", "joint"):
        for named in (pair, shifted):
            grad = policy_gradient("p3o", named, beta=0.0, clipping=clipping)
            assert_three_way(grad, exact, exact, clipping, terms=8.0)
    off = {name: x[:, :2] for name, x in scores().items()}
    twice = 2 * value(run("p3o", off, beta=0.05))
    rloo = value(run("rloo", off))
    assert_three_way(twice, rloo, rloo, "rloo", terms=8.0)


def test_nash_md_gradient_is_reinforce_with_a_penalised_reward() -> None:
    drift = LOGPS - scores()["token_ref_logps"]
    exact = (0.2 * drift - (Q - 0.5)[..., None]) * TOKENS
    assert_three_way(policy_gradient("nash_md", scores(), beta=0.2), exact, exact, "nash_md")


def test_kl_penalty_estimates_have_the_divergence_for_mean() -> None:
    """Over a small vocabulary, sampled exactly: E[k3] = KL, and the gradient of E[k2] is KL's."""
    logits = randn(6, seed=8).requires_grad_()
    logp, ref = logits.log_softmax(-1), randn(6, seed=9).log_softmax(-1)
    kl = (logp.exp() * (logp - ref)).sum()
    named = {
        "token_logps": logp.view(6, 1, 1),
        "token_ref_logps": ref.view(6, 1, 1),
        "token_mask": torch.ones(6, 1, 1).bool(),
        "ratio": (logp - ref).view(6, 1),
        "mask": torch.ones(6, 1).bool(),
    }
    p = logp.exp().detach()
    mean = (p * value(run("kl_penalty", named))).sum()
    assert_three_way(mean, kl, kl, "k3", terms=2.0)
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    estimate = (p * value(run("kl_penalty", named, estimator="k2"))).sum()
    (found,) = torch.autograd.grad(estimate, logits)
    assert_three_way(found, exact, exact, "gradient of k2", terms=2.0)


def test_unknown_options_are_named() -> None:
    cases = [
        ("grpo", {"scale_rewards": "batch"}, "'batch'; use 'group' or 'none'"),
        ("grpo", {"importance": "word"}, "'word'; use 'token', 'sequence' or 'sequence_token'"),
        ("grpo", {"aggregation": "mean"}, "'mean'; use 'sequence_mean', 'token_mean'"),
        ("kl_penalty", {"estimator": "k1"}, "'k1' of kl_penalty; use 'k3' or 'k2'"),
        ("p3o", {"clipping": "v1"}, "'v1' of p3o; use 'separate' or 'joint'"),
    ]
    for name, hyper, message in cases:
        named = scores()
        if name == "p3o":
            named = {key: x[:, :2] for key, x in named.items()}
        with pytest.raises(ValueError, match=message):
            run(name, named, **hyper)


def test_step_dapo_is_at_rest_where_the_policy_is_the_optimum() -> None:
    """pi = pi_ref exp(A / beta): log-ratios at A / beta, where neither value nor gradient is left;
    at pi = pi_ref the gradient is that of REINFORCE with A / beta, the reference its sampler."""
    u = (Q / 0.5).requires_grad_()
    outcome = OBJECTIVES["step_dapo"].fn(u, Q, ALL, beta=0.5)
    assert torch.equal(value(outcome), torch.zeros(G).double())
    assert torch.equal(torch.autograd.grad(value(outcome).sum(), u)[0], torch.zeros(G, K).double())
    start = torch.zeros(G, K).double().requires_grad_()
    losses = value(OBJECTIVES["step_dapo"].fn(start, Q, ALL, beta=0.5))
    (grad,) = torch.autograd.grad(losses.sum(), start)
    assert_three_way(grad, -Q / 0.5, -Q / 0.5)
