"""Policy gradients against the running code of TRL 1.16 and liger-kernel 0.8.5.

As in `test_peers`: the trainers' loss methods run on stand-ins, on given per-token log-probs.
Advantages reach them ready-made, so they are ours in the precision of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES
from fastpo.objectives.policy_gradient import group_advantages, leave_one_out_advantages
from fastpo.testing.three_way import assert_three_way

from .test_peers import LENGTHS, MASK, T, token_logps

G, K = 4, 3
R = G * K  # rows, as in `test_peers`
ALL = torch.ones(G, K).bool()
REFERENCE_WEIGHT = 0.04
# As TRL's config names them; the ranges are narrow enough that both sides of each are reached.
EPSILONS = {"epsilon_low": 0.2, "epsilon_high": 0.3}
TIGHT = {"epsilon_low": 0.02, "epsilon_high": 0.03}


def old_logps(dtype: torch.dtype) -> Tensor:
    """[R, T], within 0.5 of the policy's: ratios from 0.6 to 1.6."""
    rng = torch.Generator().manual_seed(3)
    noise = (torch.rand((R, T), generator=rng) - 0.5).masked_fill(~MASK, 0)
    return (token_logps(0, torch.float32) + noise).to(dtype)


def ref_logps(dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(4)
    noise = (torch.rand((R, T), generator=rng) - 0.5).masked_fill(~MASK, 0)
    return (token_logps(0, torch.float32) + noise).to(dtype)


def grades(dtype: torch.dtype) -> Tensor:
    return torch.rand((G, K), generator=torch.Generator().manual_seed(5)).to(dtype)


def scores(dtype: torch.dtype) -> dict[str, Tensor]:
    """Our named scores [G, K] and [G, K, T] of the same tokens."""
    tokens = {
        "logps": token_logps(0, dtype),
        "old_logps": old_logps(dtype),
        "ref_logps": ref_logps(dtype),
    }
    sums = {name: value.sum(-1).view(G, K) for name, value in tokens.items()}
    return {
        **sums,
        **{f"token_{name}": value.view(G, K, T) for name, value in tokens.items()},
        "ratio": sums["logps"] - sums["ref_logps"],
        "token_mask": MASK.view(G, K, T),
        "token_weights": MASK.view(G, K, T).to(dtype),
        "score": grades(dtype),
        "mask": ALL,
    }


def ours(mixture: dict[str, float], dtype: torch.dtype, **hyper) -> Tensor:
    """A mixture's loss: every term's sum over its own count."""
    named, counts = scores(dtype), {"responses": R, "response_tokens": int(LENGTHS.sum())}
    loss = torch.zeros((), dtype=dtype)
    for name, weight in mixture.items():
        objective = OBJECTIVES[name]
        options = {key: value for key, value in hyper.items() if key in objective.hyper}
        outcome = objective(named, **options)
        loss = loss + weight * sum(t.values.sum() / counts[t.per] for t in outcome.terms)
    return loss


def assert_agrees(theirs: Tensor, mixture: dict[str, float], **hyper) -> None:
    mine, truth = (ours(mixture, d, **hyper) for d in (torch.float32, torch.float64))
    # Losses of single responses are near 1 and cancel in the sum, advantages adding up to 0.
    assert_three_way(mine, theirs, truth, str(mixture), terms=1.0)
    assert_three_way(theirs.float(), mine, truth, f"peer's {mixture}", terms=1.0)


def trainer(**attributes) -> SimpleNamespace:
    """What TRL's online trainers read of `self` for their loss."""
    rest = torch.zeros(R, T)
    args = SimpleNamespace(
        delta=attributes.pop("delta", None),
        use_bias_correction_kl=False,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    defaults = {
        "beta": 0.0,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 9,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    }
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=args,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            token_logps(0, torch.float32),
            rest,
            None,
        ),
        **{**defaults, **attributes},
    )


def batch(advantages: Tensor) -> dict[str, Tensor]:
    prompt = torch.zeros(R, 1, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros(R, T, dtype=torch.long),
        "completion_mask": MASK.long(),
        "advantages": advantages.flatten(),
        "old_per_token_logps": old_logps(torch.float32),
        "ref_per_token_logps": ref_logps(torch.float32),
        "old_logps": old_logps(torch.float32).sum(-1),
        "num_items_in_batch": LENGTHS.sum(),
    }


def advantages() -> Tensor:
    return group_advantages(grades(torch.float32), ALL)


def trl_grpo(**attributes) -> Tensor:
    cls = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    this = trainer(**attributes)
    this.get_gamma_weights = cls.get_gamma_weights
    return cls._compute_loss(this, None, batch(advantages()))


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("grpo", EPSILONS),
        ("grpo", {**EPSILONS, "delta": 1.4}),
        ("bnpo", EPSILONS),
        ("dapo", EPSILONS),
        ("sapo", {}),
        ("cispo", {"epsilon_high": 1.2}),
        ("vespo", {}),
    ],
)
def test_trl_grpo_trainer(loss_type: str, options: dict[str, float]) -> None:
    assert_agrees(trl_grpo(loss_type=loss_type, **options), {loss_type: 1.0}, **options)


def test_trl_dr_grpo() -> None:
    """TRL's dr_grpo still divides advantages by the deviation; the paper's does not."""
    theirs = trl_grpo(loss_type="dr_grpo", **EPSILONS)
    options = {**EPSILONS, "max_length": 9}
    assert_agrees(theirs, {"dr_grpo": 1.0}, scale_rewards="group", **options)
    assert (ours({"dr_grpo": 1.0}, torch.float32, **options) - theirs).abs() > 1e-3


def test_trl_sequence_ratios() -> None:
    """GSPO is TRL's loss_type grpo with sequence-level ratios, luspo needs them too."""
    theirs = trl_grpo(loss_type="grpo", importance_sampling_level="sequence", **TIGHT)
    assert_agrees(theirs, {"gspo": 1.0}, **TIGHT)
    assert_agrees(theirs, {"gspo": 1.0}, importance="sequence_token", **TIGHT)
    theirs = trl_grpo(loss_type="luspo", importance_sampling_level="sequence", **TIGHT)
    assert_agrees(theirs, {"luspo": 1.0}, **TIGHT)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean")]
)
def test_trl_kl_is_a_mixture(loss_type: str, aggregation: str) -> None:
    theirs = trl_grpo(loss_type=loss_type, beta=REFERENCE_WEIGHT, **EPSILONS)
    mixture = {loss_type: 1.0, "kl_penalty": REFERENCE_WEIGHT}
    options = {"aggregation": aggregation} if loss_type == "dapo" else {}
    assert_agrees(theirs, mixture, **EPSILONS, **options)


@pytest.mark.parametrize("beta", [0.0, REFERENCE_WEIGHT])
def test_trl_gmpo(beta: float) -> None:
    cls = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    theirs = cls._compute_loss(trainer(beta=beta, **EPSILONS), None, batch(advantages()))
    assert_agrees(theirs, {"gmpo": 1.0, "kl_penalty": beta}, **EPSILONS)


def test_trl_rloo() -> None:
    """Its advantages are made of rewards less beta times the old policy's sampled divergence."""
    cls = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    named = scores(torch.float32)
    reward = named["score"] - 0.05 * (named["old_logps"] - named["ref_logps"])
    made = leave_one_out_advantages(reward, ALL)
    theirs = cls._compute_loss(trainer(**EPSILONS), None, batch(made))
    assert_agrees(theirs, {"rloo": 1.0}, **EPSILONS)


def liger(loss_type: str, **options) -> Tensor:
    function: Callable = pytest.importorskip(
        "liger_kernel.chunked_loss.grpo_loss"
    ).LigerFusedLinearGRPOFunction.ppo_loss_fn
    mask = MASK.long()
    loss, _ = function(
        token_logps(0, torch.float32),
        mask,
        advantages().flatten(),
        mask,
        ref_per_token_logps=ref_logps(torch.float32),
        old_per_token_logps=old_logps(torch.float32),
        loss_type=loss_type,
        **{"beta": 0.0, **options},
    )
    return loss


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("grpo", EPSILONS),
        ("bnpo", EPSILONS),
        ("dapo", EPSILONS),
        ("sapo", {}),
        ("cispo", {"epsilon_high": 1.2}),
        ("vespo", {}),
    ],
)
def test_liger_grpo(loss_type: str, options: dict[str, float]) -> None:
    assert_agrees(liger(loss_type, **options), {loss_type: 1.0}, **options)


def test_liger_kl_is_a_mixture() -> None:
    theirs = liger("grpo", beta=REFERENCE_WEIGHT, **EPSILONS)
    assert_agrees(theirs, {"grpo": 1.0, "kl_penalty": REFERENCE_WEIGHT}, **EPSILONS)


def test_liger_sequence_ratios() -> None:
    """Its sequence-level grpo multiplies one loss per response by the mask: GSPO's mean again."""
    theirs = liger("grpo", importance_sampling_level="sequence", **TIGHT)
    assert_agrees(theirs, {"gspo": 1.0}, **TIGHT)
    theirs = liger("luspo", importance_sampling_level="sequence", **TIGHT)
    assert_agrees(theirs, {"luspo": 1.0}, **TIGHT)


def test_overflowing_ratio_of_a_clipped_token() -> None:
    """Where the clip is active and the ratio overflows, TRL's gradient is 0 * inf = NaN."""
    cls = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logps = token_logps(0, torch.float32).requires_grad_()
    far = logps.detach() - 100
    this = trainer(loss_type="grpo")
    this._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros(R, T), None)
    inputs = {**batch(advantages().abs()), "old_per_token_logps": far}
    (theirs,) = torch.autograd.grad(cls._compute_loss(this, None, inputs), logps)
    assert theirs[MASK].isnan().all()
    named = {**scores(torch.float32), "token_old_logps": far.view(G, K, T)}
    named["token_logps"] = logps.view(G, K, T)
    named["score"] = torch.tensor([[1.0, 1.0, -1.0]]).expand(G, K)
    grpo = OBJECTIVES["grpo"]
    outcome = grpo(named)
    (mine,) = torch.autograd.grad(outcome.terms[0].values.sum(), logps)
    mine = mine.view(G, K, T)
    assert (mine[:, :2] == 0).all()
    assert not mine.isnan().any()
