"""The pairwise catalogue against the running code of TRL 1.16 and liger-kernel 0.8.5.

As `test_peers`: the peers are imported and called. What is compared is the loss of a batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.objectives.pairwise import discopop, hinge, wpo
from fastpo.objectives.reference_free import alpha_po, cpo, simpo, tpo
from fastpo.testing.scores import Case, assert_rounded, condition
from fastpo.testing.three_way import assert_three_way

from .test_peers import (
    LENGTHS,
    MASK,
    B,
    Model,
    T,
    assert_agrees,
    columns,
    liger,
    ours,
    scores,
    token_logps,
    total,
    trainer,
)

EVERY = [
    ("exo_pair", "exo_pair", {"label_smoothing": 1e-3}),
    ("nca_pair", "nca_pair", {"beta": 0.01}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("discopop", "discopop", {"beta": 0.05}),
]


class Weighted(Model):
    """Also returns log sum_v p_v^2 of every position, as TRL's fused head does."""

    def __call__(self, **inputs) -> SimpleNamespace:
        outputs = super().__call__(**inputs)
        outputs.log_sum_sq_probs = token_logps(2, self.logps.dtype)
        return outputs


def trl_dpo(
    loss_type: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    logps: Tensor | None = None,
    **options,
) -> tuple[Tensor, dict[str, list[float]]]:
    """DPOTrainer's loss and metrics on the tokens of `test_peers`, with any of its options."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    settings = {"f_divergence_type": "reverse_kl", "use_weighting": False, **options}
    this = trainer(
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        args=SimpleNamespace(discopop_tau=0.05),
        **settings,
    )
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    ref_chosen, ref_rejected = token_logps(1, torch.float32).sum(-1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(2 * B, 1 + T, dtype=torch.long),
        "attention_mask": torch.cat([prompt + 1, MASK.long()], dim=1),
        "completion_mask": torch.cat([prompt, MASK.long()], dim=1),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    model = Weighted(token_logps(0, torch.float32) if logps is None else logps)
    return module.DPOTrainer._compute_loss(this, model, inputs, False), this._metrics["train"]


@pytest.mark.parametrize(
    ("loss_type", "name", "hyper"), [*EVERY, ("sigmoid_norm", "ln_dpo", {"beta": 5.0})]
)
def test_trl_dpo_trainer(loss_type: str, name: str, hyper: dict) -> None:
    loss, metrics = trl_dpo(loss_type, **hyper)
    assert_agrees(loss, name, **hyper)
    if name == "ln_dpo":  # TRL logs sums, which the loss does not compare; ours logs the means
        return
    mine, truth = (ours(name, d, **hyper).rewards for d in (torch.float32, torch.float64))
    for side, key in enumerate(("rewards/chosen", "rewards/rejected")):
        theirs = torch.tensor(metrics[key][0])
        assert_three_way(mine[:, side].mean(), theirs, truth[:, side].mean(), key)


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("forward_kl", {"f_divergence": "forward_kl"}),
        ("js_divergence", {"f_divergence": "js"}),
        ("alpha_divergence", {"f_divergence": "alpha", "divergence_clamp": 80.0}),
    ],
)
@pytest.mark.parametrize(
    ("loss_type", "name", "hyper"),
    [
        ("sigmoid", "dpo", {}),
        ("sigmoid_norm", "ln_dpo", {"beta": 5.0}),
        ("hinge", "hinge", {}),
        ("ipo", "ipo", {}),
        ("exo_pair", "exo_pair", {"label_smoothing": 1e-3}),
        ("robust", "robust", {"label_smoothing": 0.2}),
        ("discopop", "discopop", {"beta": 0.05}),
    ],
)
def test_trl_f_divergences(
    loss_type: str, name: str, hyper: dict, divergence: str, options: dict
) -> None:
    """On every loss type that TRL's constructor lets have one."""
    loss, _ = trl_dpo(loss_type, f_divergence_type=divergence, f_alpha_divergence_coef=0.5, **hyper)
    settings = {**hyper, **options}
    mine, truth = (total(ours(name, d, **settings)) for d in (torch.float32, torch.float64))
    assert_three_way(mine, loss, truth, name)
    # Theirs is in float32 all the way: as good as that allows, by the rule of the battery.
    case = Case(OBJECTIVES[name], {**OBJECTIVES[name].hyper, **settings})
    double = {key: scores(torch.float64)[key] for key in case.objective.needs}
    bound = condition(case, double)["groups"].mean()
    assert_rounded(loss, truth, bound, f"peer's {name}")
    plain = total(ours(name, torch.float64, **hyper))
    assert (plain - truth).abs() > 1e-3 * truth.abs()  # the divergence matters here


def test_trl_clamps_the_exponents_of_alpha() -> None:
    """A chosen response at u = -280 with alpha = 0.5: TRL has e^80 for the paper's e^140."""
    logps, ref = (token_logps(seed, torch.float32) for seed in (0, 1))
    logps[1] -= 40
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}
    loss, _ = trl_dpo("hinge", logps=logps, **options)
    u = torch.stack((logps - ref).sum(-1).chunk(2), dim=-1)
    both = torch.ones(B, 2).bool()

    def run(dtype: torch.dtype, clamp: float | None) -> Tensor:
        outcome = hinge(u.to(dtype), both, f_divergence="alpha", divergence_clamp=clamp)
        return total(outcome)

    assert_three_way(run(torch.float32, 80.0), loss, run(torch.float64, 80.0), "clamped")
    assert_three_way(loss, run(torch.float32, 80.0), run(torch.float64, 80.0), "peer's")
    assert run(torch.float32, None).isinf()
    assert run(torch.float64, None) > 1e58


def weighted(dtype: torch.dtype) -> dict[str, Tensor]:
    p2 = torch.stack((token_logps(2, dtype).sum(-1) / LENGTHS).chunk(2), dim=-1)
    return {**scores(dtype), "mean_log_p2": p2}


@pytest.mark.parametrize("clamp", [False, True])
def test_trl_wpo(clamp: bool) -> None:
    """TRL dropped the official code's clamp of the weight at 1, which is our option."""
    loss, _ = trl_dpo("sigmoid", beta=0.01, use_weighting=True)

    def run(dtype: torch.dtype) -> Tensor:
        s = weighted(dtype)
        named = (s[key] for key in ("ratio", "mean_logps", "mean_log_p2", "mask"))
        return total(wpo(*named, clamp=clamp))

    mine, truth = run(torch.float32), run(torch.float64)
    if clamp:
        assert mine < 0.9 * loss
        return
    assert_three_way(mine, loss, truth, "wpo")
    assert_three_way(loss, mine, truth, "peer's wpo")


@pytest.mark.parametrize(("loss_type", "name", "hyper"), EVERY)
def test_liger_dpo(loss_type: str, name: str, hyper: dict[str, float]) -> None:
    function = liger("dpo_loss", "LigerFusedLinearDPOFunction")
    logps, ref = (token_logps(seed, torch.float32).sum(-1).chunk(2) for seed in (0, 1))
    options = {"beta": 0.1, **hyper, "loss_type": loss_type}
    loss, *rewards = function(*logps, torch.empty(2 * B, T), *ref, **options)
    assert_agrees(loss, name, **hyper)
    mine, truth = (ours(name, d, **hyper).rewards for d in (torch.float32, torch.float64))
    for side in range(2):
        assert_three_way(mine[:, side], rewards[side], truth[:, side], "rewards")


def test_peers_discopop_of_a_wrong_pair() -> None:
    """At z = -100 e^-z overflows in float32 while its weight is 0: both peers return NaN."""
    function = liger("dpo_loss", "LigerFusedLinearDPOFunction")
    u = torch.tensor([[-2000.0, 0.0]])
    both = torch.tensor([[True, True]])
    theirs = function(*u.unbind(-1), torch.empty(2, T), beta=0.05, loss_type="discopop")[0]
    assert theirs.isnan()
    assert discopop(u, both).terms[0].values == 100


def trl_cpo(loss_type: str, s: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    settings = {"beta": 0.1, "simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0, **options}
    return module.CPOTrainer.cpo_loss(trainer(loss_type=loss_type, **settings), *columns(s))


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_trl_cpo_links(loss_type) -> None:
    single, double = scores(torch.float32), scores(torch.float64)
    key = "mean_logps" if loss_type == "ipo" else "logps"
    theirs = trl_cpo(loss_type, single[key])[0]

    def run(s: dict[str, Tensor]) -> Tensor:
        named = (s[key] for key in ("logps", "mean_logps", "label", "mask"))
        return cpo(*named, loss_type=loss_type).terms[0].values

    assert_three_way(run(single), theirs, run(double))
    assert_three_way(theirs, run(single), run(double))


def test_trl_simpo_hinge() -> None:
    """SimPO's own hinge has gamma inside, as TRL's has if the margin is given to it so."""
    single, double = scores(torch.float32), scores(torch.float64)
    shifted = single["mean_logps"] - torch.tensor([0.25, 0.0])
    theirs = trl_cpo("hinge", shifted, beta=2.0)[0]

    def run(s: dict[str, Tensor]) -> Tensor:
        return simpo(s["mean_logps"], s["mask"], loss_type="hinge").terms[0].values

    assert_three_way(run(single), theirs, run(double))
    assert_three_way(theirs, run(single), run(double))


def test_trl_alpha_po() -> None:
    single, double = scores(torch.float32), scores(torch.float64)
    theirs = trl_cpo("simpo", single["mean_logps"], alpha=0.25, beta=2.5, simpo_gamma=0.1)

    def run(s: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        outcome = alpha_po(s["mean_logps"], s["mask"])
        chosen, rejected = columns(outcome.rewards)
        return outcome.terms[0].values, chosen, rejected

    for mine, peer, truth in zip(run(single), theirs, run(double), strict=True):
        assert_three_way(mine, peer, truth)
        assert_three_way(peer, mine, truth)


def test_trl_alpha_po_of_an_unlikely_response() -> None:
    """exp(-400) is 0 in float32 and 0 to a negative power inf: TRL has inf - inf."""
    s, both = torch.tensor([[-400.0, -400.0]]), torch.tensor([[True, True]])
    assert trl_cpo("simpo", s, alpha=0.25)[0].isnan()
    assert alpha_po(s, both, gamma_beta_ratio=0.0).terms[0].values == torch.tensor(2.0).log()


V = 11


class Logits:
    """Returns logits of 3B rows, the last B the gold responses."""

    training = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **inputs) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
@pytest.mark.parametrize("gold_lengths", ["equal", "ragged"])
def test_trl_tpo(loss_type: str, gold_lengths: str) -> None:
    """The gold NLL is a mean of means; TRL's of all tokens is the same for equal lengths."""
    module = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    rng = torch.Generator().manual_seed(0)
    exact = torch.randn((3 * B, 1 + T, V), generator=rng).double()
    ids = torch.randint(0, V, (3 * B, 1 + T), generator=rng)
    gold = torch.full((B,), 4) if gold_lengths == "equal" else LENGTHS[:B]
    lengths = torch.cat([LENGTHS, gold])
    mask = torch.arange(1 + T) - 1 < lengths[:, None]
    mask[:, 0] = False
    hyper = {"beta": 0.2, "tpo_alpha": 0.5, "label_smoothing": 0.0}
    this = trainer(loss_type=loss_type, tpo_l_gamma=0.5, **hyper)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "completion_mask": mask.long()}
    loss = module.TPOTrainer._compute_loss(this, Logits(exact.float()), inputs, False)

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logp = exact.to(dtype).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums = (logp * mask[:, 1:]).sum(-1)
        pairs = [torch.stack(x[: 2 * B].chunk(2), dim=-1) for x in (sums, sums / lengths)]
        golden = sums[2 * B :] / gold
        both = torch.ones(B, 2).bool()
        name = loss_type.replace("-", "_")
        options = {"gamma": 0.5, "loss_type": name, "nll_reduction": "sequence_mean", **hyper}
        outcome = tpo(*pairs, sums[2 * B :], golden, both, **options)  # pyright: ignore
        return total(outcome), golden.mean() - sums[2 * B :].sum() / gold.sum()

    (mine, _), (truth, apart) = run(torch.float32), run(torch.float64)
    if gold_lengths == "ragged":
        assert apart.abs() > 0.01
        mine, truth = mine + 0.5 * apart.float(), truth + 0.5 * apart
    assert_three_way(mine, loss, truth, loss_type)
    assert_three_way(loss, mine, truth, f"peer's {loss_type}")
