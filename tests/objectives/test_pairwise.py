"""What the papers of the pairwise objectives say, and how they reduce to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.pairwise import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo_pair,
    gpo,
    hinge,
    ipo,
    ln_dpo,
    modpo,
    nca_pair,
    odpo,
    rdpo,
    robust,
    selm,
    wpo,
    xpo,
)
from fastpo.objectives.pointwise import kto
from fastpo.segments import Segments
from fastpo.testing.scores import Case, assert_rounded, by_divisor, condition, evaluate, leaves
from fastpo.testing.three_way import assert_three_way

from .test_battery import by_hand, scores_of

B = 6
BOTH = torch.ones(B, 2).bool()
PLAIN = {"dpo": dpo, "robust": robust, "hinge": hinge, "exo_pair": exo_pair, "discopop": discopop}
MEANS = {"ipo": ipo, "ln_dpo": ln_dpo}
MARGINS = pytest.mark.parametrize("name", [*PLAIN, *MEANS])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


U = 10 * randn(B, 2)


def value(outcome) -> Tensor:
    return outcome.terms[0].values


def run(name: str, u: Tensor, lengths: Tensor | float = 1.0, **hyper) -> Tensor:
    """The losses of log-ratios and lengths, whichever of them an objective takes."""
    if name in MEANS:
        return value(MEANS[name](u, u / lengths, BOTH[: len(u)], **hyper))
    return value(PLAIN[name](u, BOTH[: len(u)], **hyper))


@MARGINS
def test_reverse_kl_is_alpha_at_one(name: str) -> None:
    assert torch.equal(run(name, U, f_divergence="alpha", alpha_divergence=1.0), run(name, U))


@MARGINS
def test_forward_kl_is_alpha_at_zero(name: str) -> None:
    of_alpha = run(name, U / 4, f_divergence="alpha", alpha_divergence=0.0)
    assert torch.equal(of_alpha, run(name, U / 4, f_divergence="forward_kl"))
    assert not torch.equal(of_alpha, run(name, U / 4))


@MARGINS
@pytest.mark.parametrize("alpha", [0.25, 1.75])
@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_and_clamp_closed_form(
    name: str, alpha: float, clamp: float | None, dtype: torch.dtype
) -> None:
    """The battery has one alpha and no clamp; 0.5 cuts some exponents of its scores."""
    options = {"f_divergence": "alpha", "alpha_divergence": alpha, "divergence_clamp": clamp}
    case = Case(OBJECTIVES[name], {**OBJECTIVES[name].hyper, **options})
    scores = scores_of(case, seed=1)
    truth, _ = by_hand(case, scores)
    single = {k: v.to(dtype) if v.is_floating_point() else v for k, v in scores.items()}
    ours = by_divisor(evaluate(case, single))["groups"]
    assert ours.dtype == dtype
    assert_rounded(ours, truth["groups"], condition(case, scores)["groups"], "loss")


@MARGINS
def test_clamp_stops_the_gradient(name: str) -> None:
    """Beyond the clamp c no longer depends on u."""
    u = torch.tensor([[-30.0, 1.0]], dtype=torch.float64, requires_grad=True)
    options = {"f_divergence": "forward_kl", "beta": 0.01, "divergence_clamp": 2.0}
    (grad,) = torch.autograd.grad(run(name, u, **options).sum(), u)
    assert grad[0, 0] == 0
    assert grad[0, 1] != 0


@MARGINS
@pytest.mark.parametrize(("f_divergence", "slope"), [("forward_kl", 1), ("alpha", 1), ("js", 0.5)])
def test_gradient_where_policy_is_reference(name: str, f_divergence: str, slope: float) -> None:
    """Training starts at u = 0. There c' is f''(1), of the JS divergence half of KL's."""
    lengths = torch.tensor([[4.0, 10.0]], dtype=torch.float64)
    u = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(run(name, u, lengths).sum(), u)
    (ours,) = torch.autograd.grad(run(name, u, lengths, f_divergence=f_divergence).sum(), u)
    assert (plain[:, 0] != 0).all()
    assert_three_way(ours, slope * plain, slope * plain, "gradient")


@pytest.mark.parametrize("f_divergence", ["reverse_kl", "forward_kl", "alpha", "js"])
@pytest.mark.parametrize("name", MEANS)
def test_gradient_of_c_over_length(name: str, f_divergence: str) -> None:
    """c / L is made of the sum and the mean: together their gradients are that of c(u) / L."""
    lengths = torch.tensor([[4.0, 10.0]], dtype=torch.float64)
    u = torch.tensor([[1.5, -0.7]], dtype=torch.float64, requires_grad=True)
    c = {
        "reverse_kl": u,
        "forward_kl": 1 - (-u).exp(),
        "alpha": 2 * (1 - (-u / 2).exp()),
        "js": (2 * u.sigmoid()).log(),
    }[f_divergence]
    plain_loss = run(name, c, lengths, beta=0.5)
    ours_loss = run(name, u, lengths, beta=0.5, f_divergence=f_divergence)
    assert_three_way(ours_loss, plain_loss, plain_loss, "loss")
    (plain,) = torch.autograd.grad(plain_loss.sum(), u)
    (ours,) = torch.autograd.grad(ours_loss.sum(), u)
    assert_three_way(ours, plain, plain, "gradient")


def test_forward_kl_beyond_float32() -> None:
    """e^100 is a float64 number: the margin, its sign and a tie are not lost on the way."""
    u = torch.tensor([[0.0, -100.0], [-100.0, -100.0], [-100.0, 0.0]], requires_grad=True)
    loss = run("dpo", u, f_divergence="forward_kl")
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert loss.tolist() == [0.0, torch.tensor(2.0).log().item(), torch.inf]
    assert grad.tolist() == [[0.0, 0.0], [-torch.inf, torch.inf], [-torch.inf, torch.tensor(0.1)]]


# One function makes the ratios of all: every divergence once, and every objective's call of it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "f_divergence"),
    [("dpo", "forward_kl"), ("dpo", "alpha"), *((name, "js") for name in [*PLAIN, *MEANS])],
)
def test_divergences_compile(name: str, f_divergence: str) -> None:
    objective = OBJECTIVES[name]
    case = Case(objective, {**objective.hyper, "f_divergence": f_divergence})
    scores, roots = leaves(scores_of(case, seed=9))
    compiled = torch.compile(case.objective.fn, fullgraph=True, backend="aot_eager")
    eager, graph = (
        value(evaluate(case, scores)),
        value(compiled(*(scores[n] for n in objective.needs), **case.hyper)),
    )
    assert torch.equal(eager, graph)
    of = [root for name, root in roots.items() if name != "mean_ratio"]
    plain = torch.autograd.grad(eager.sum(), of)
    for a, b in zip(torch.autograd.grad(graph.sum(), of), plain, strict=True):
        assert_three_way(a, b, b, "gradient")


@MARGINS
def test_divergence_is_checked(name: str) -> None:
    with pytest.raises(ValueError, match="'kl'; use 'reverse_kl', 'forward_kl', 'js' or 'alpha'"):
        run(name, U, f_divergence="kl")


def test_ln_dpo_of_unit_lengths_is_dpo() -> None:
    assert torch.equal(value(ln_dpo(U, U, BOTH)), value(dpo(U, BOTH, beta=5.0)))


def test_exo_is_least_at_the_odds_of_the_label() -> None:
    """At beta (u_w - u_l) = log((1 - e) / e) the policy's preference is the label's."""
    best = torch.tensor([[0.75 / 0.25, 1.0]]).double().log()
    eps = torch.finfo(torch.float64).eps

    def at(shift: float) -> float:
        u = best + torch.tensor([[shift, 0.0]])
        return value(exo_pair(u, BOTH[:1], beta=1.0, label_smoothing=0.25)).item()

    assert abs(at(0.0)) <= 4 * eps  # terms below log 4, which cancel
    assert at(0.1) > 1e-4 < at(-0.1)


def test_exo_gradient_flows_through_its_weights() -> None:
    """d/dz of the KL is sig(z) sig(-z) [z - log((1-e)/e)], which vanishes in the tails."""
    u = U.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(exo_pair(u, BOTH, label_smoothing=0.1)).sum(), u)
    z = 0.1 * (U[:, 0] - U[:, 1])
    slope = 0.1 * z.sigmoid() * (-z).sigmoid() * (z - torch.tensor(9.0).double().log())
    # of two terms, each at most beta log 9
    assert_three_way(grad[:, 0], slope, slope, "gradient", terms=0.22)


def test_discopop_of_a_small_tau_is_piecewise() -> None:
    """Where g is 0 or 1 to rounding: logistic on wrong pairs, exponential on right ones."""
    loss = value(discopop(U, BOTH, tau=1e-6))
    z = 0.05 * (U[:, 0] - U[:, 1])
    assert (z < 0).any()
    assert (z > 0).any()
    by_hand = torch.where(z > 0, (-z).exp(), value(dpo(U, BOTH, beta=0.05)))
    assert_three_way(loss, by_hand, by_hand, "loss")


def test_discopop_slope_at_a_tie() -> None:
    """(1 - log 2) / (4 tau) - 3/4: the published tau pushes pairs down where training starts."""
    u = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(discopop(u, BOTH[:1], beta=1.0)).sum(), u)
    slope = (1 - torch.tensor([2.0]).double().log()) / 0.2 - 0.75
    assert slope > 0.7
    assert_three_way(grad[:, 0], slope, slope, "slope", terms=5.0)


def test_biased_nca_is_bco_pair() -> None:
    assert torch.equal(value(nca_pair(U, BOTH, biased=True)), value(bco_pair(U, BOTH, beta=0.01)))


def test_nca_raises_the_chosen_likelihood() -> None:
    """At u = 0 the gradient on the chosen side is -beta / 4, on the rejected side beta / 4."""
    u = torch.zeros(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(value(nca_pair(u, BOTH[:1], beta=1.0)).sum(), u)
    assert grad.tolist() == [[-0.25, 0.25]]


def test_apo_zero_is_kto_without_a_reference_point() -> None:
    label = torch.tensor([[True, False]]).expand(B, 2)
    assert torch.equal(value(apo_zero(U, BOTH)), value(kto(U, torch.zeros(()), label, BOTH)))


@pytest.mark.parametrize(("objective", "sign"), [(apo_zero, -1), (apo_down, 1)])
def test_apo_moves_the_chosen_likelihood(objective, sign: int) -> None:
    """zero raises it; down lowers it once the pair is told apart. Both lower the rejected one."""
    u = torch.tensor([[0.0, -60.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(value(objective(u, BOTH[:1])).sum(), u)
    assert sign * grad[0, 0] > 0
    assert grad[0, 1] > 0


def test_wpo_of_agreeing_samples_is_dpo() -> None:
    """A response as likely as two samples agree weighs 1: log p = log sum p^2 on average."""
    s = -randn(B, 2).abs()
    ours, plain = value(wpo(U, s, s, BOTH)), value(dpo(U, BOTH, beta=0.01))
    assert_three_way(ours, plain, plain, "loss")


def test_wpo_weights_are_constants() -> None:
    s, p2, u = -randn(B, 2).abs(), -randn(B, 2, seed=1).abs(), U.clone().requires_grad_()
    leaves = s.requires_grad_(), p2.requires_grad_()
    loss = value(wpo(u, *leaves, BOTH))
    grads = torch.autograd.grad(loss.sum(), (u, *leaves), allow_unused=True)
    assert grads[1:] == (None, None)
    weight = (s - p2).sum(-1).exp().detach()
    (plain,) = torch.autograd.grad((weight * value(dpo(u, BOTH, beta=0.01))).sum(), u)
    assert_three_way(grads[0], plain, plain, "gradient")
    clamped = value(wpo(u, *leaves, BOTH, clamp=True))
    assert (weight > 1).any()
    assert (weight < 1).any()
    by_hand = weight.clamp(max=1) * value(dpo(u, BOTH, beta=0.01))
    assert_three_way(clamped, by_hand, by_hand, "clamped")


def test_dpop_of_a_chosen_response_that_rose_is_dpo() -> None:
    u = U.clone()
    u[:, 0].abs_()
    assert torch.equal(value(dpop(u, BOTH)), value(dpo(u, BOTH, beta=0.3)))
    u[:, 0].neg_()
    assert (value(dpop(u, BOTH)) > value(dpo(u, BOTH, beta=0.3))).all()


def test_rdpo_asks_less_of_a_longer_chosen_response() -> None:
    lengths = torch.tensor([[7.0, 3.0]]).expand(B, 2)
    assert torch.equal(value(rdpo(U, torch.ones(B, 2), BOTH)), value(dpo(U, BOTH)))
    assert (value(rdpo(U, lengths, BOTH)) < value(dpo(U, BOTH))).all()
    assert (value(rdpo(U, lengths.flip(-1), BOTH)) > value(dpo(U, BOTH))).all()


def test_dpo_shift_at_one_is_dpo() -> None:
    assert torch.equal(value(dpo_shift(U, BOTH, lam=1.0)), value(dpo(U, BOTH, beta=0.01)))


@pytest.mark.parametrize(("offset", "grades"), [("difference", [5.0, 4.0]), ("ratio", [4.0, 4.0])])
def test_odpo_of_no_offset_is_dpo(offset, grades: list[float]) -> None:
    ours = value(odpo(U, torch.tensor([grades]).expand(B, 2), BOTH, offset=offset))
    assert torch.equal(ours, value(dpo(U, BOTH)))


def test_odpo_of_a_tie() -> None:
    """No preference, no loss; the official code has NaN. At alpha = 0 grades do not matter."""
    u = U.clone().requires_grad_()
    grades = torch.tensor([[4.0, 4.0], [1.0, 4.0]]).repeat(B // 2, 1)
    loss = value(odpo(u, grades, BOTH))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert (loss == 0).all()
    assert (grad == 0).all()
    assert torch.equal(value(odpo(u, grades, BOTH, alpha=0.0)), value(dpo(u, BOTH)))


def test_odpo_offset_is_checked() -> None:
    with pytest.raises(ValueError, match="'log' of odpo; use 'difference' or 'ratio'"):
        odpo(U, U, BOTH, offset="log")  # pyright: ignore[reportArgumentType]


def test_gpo_has_dpo_ipo_and_hinge() -> None:
    """squared is (1 - beta D)^2 = beta^2 (D - 1 / beta)^2, and IPO's target is 1 / (2 tau)."""
    assert torch.equal(value(gpo(U, BOTH)), value(dpo(U, BOTH)))
    assert torch.equal(value(gpo(U, BOTH, link="hinge")), value(hinge(U, BOTH)))
    squared = value(gpo(U, BOTH, beta=0.25, link="squared"))
    plain = 0.25**2 * value(ipo(U, U, BOTH, beta=0.125, average=False))
    assert_three_way(squared, plain, plain, "squared")


def test_gpo_link_is_checked() -> None:
    with pytest.raises(ValueError, match="'cubic' of gpo; choose from logistic, hinge, squared"):
        gpo(U, BOTH, link="cubic")  # pyright: ignore[reportArgumentType]


def test_modpo_of_one_objective_is_dpo() -> None:
    margin = randn(B)
    of_hinge = modpo(U, margin, BOTH, w0=1.0, margin_weight=0.0, loss_type="hinge")
    assert torch.equal(
        value(modpo(U, margin, BOTH, w0=1.0, margin_weight=0.0)), value(dpo(U, BOTH))
    )
    assert torch.equal(value(of_hinge), value(hinge(U, BOTH)))


def test_modpo_asks_less_where_other_objectives_object() -> None:
    """The chosen response is worse by the other rewards: less margin is asked of the policy."""
    harmful = value(modpo(U, -torch.ones(B), BOTH))
    assert (harmful < value(modpo(U, torch.ones(B), BOTH))).all()


def test_selm_and_xpo_without_optimism_are_dpo_and_ipo() -> None:
    y = randn(B)
    assert torch.equal(value(selm(U, y, BOTH, alpha=0.0)), value(dpo(U, BOTH, beta=0.01)))
    assert torch.equal(value(xpo(U, y, BOTH, alpha=0.0)), value(dpo(U, BOTH)))
    square = value(xpo(U, y, BOTH, alpha=0.0, loss_type="ipo"))
    assert torch.equal(square, value(ipo(U, U, BOTH, average=False)))


@pytest.mark.parametrize(("objective", "slope"), [(selm, 0.5 * 0.25), (xpo, 0.25)])
def test_optimism_lowers_the_reference_response(objective, slope: float) -> None:
    """By alpha * beta in SELM and by alpha in XPO, whatever the pair is."""
    y = randn(B).requires_grad_()
    (grad,) = torch.autograd.grad(value(objective(U, y, BOTH, beta=0.5, alpha=0.25)).sum(), y)
    assert (grad == slope).all()


def test_xpo_loss_type_is_checked() -> None:
    with pytest.raises(ValueError, match="'hinge' of xpo; use 'sigmoid' or 'ipo'"):
        xpo(U, U[:, 0], BOTH, loss_type="hinge")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_reference_responses_reach_the_loss(name: str) -> None:
    """Two pairs and a third response of each, through the head: the third has a gradient."""
    head = torch.nn.Linear(4, 7, bias=False)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = Segments(
        response=torch.arange(6),
        grid=torch.tensor([[0, 1], [3, 4]]),
        label=torch.tensor([[True, False]]).expand(2, 2),
        num_responses=6,
        extras={"ref_response": torch.tensor([2, 5])},
    )
    labels, reference = torch.tensor([1, 2, 3, 4, 5, 6]), -torch.ones(6)
    loss = PreferenceLoss(name, head, alpha=0.1)(hidden, labels, segments, ref_logps=reference)
    (grad,) = torch.autograd.grad(loss.loss, hidden)
    assert (grad.abs().sum(-1) > 0).all()
