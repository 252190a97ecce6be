"""Our objectives against the running code of TRL 1.16 and liger-kernel 0.8.5.

Both are imported and called, not retyped: a trainer's loss method is run on a stand-in for the
trainer that has only the attributes which the method reads, and a stand-in for the model that
returns given per-token log-probs. Where a peer means something else the test says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES, functional
from fastpo.objectives.base import Outcome
from fastpo.testing.three_way import assert_three_way

B, T = 6, 7
LENGTHS = torch.tensor([3, 7, 1, 5, 2, 6, 4, 2, 7, 1, 6, 3])  # B chosen rows, then B rejected
MASK = torch.arange(T) < LENGTHS[:, None]


def token_logps(seed: int, dtype: torch.dtype) -> Tensor:
    """[2B, T] log-probs of the response tokens, 0 elsewhere; float32 numbers in any dtype."""
    rng = torch.Generator().manual_seed(seed)
    return (-4 * torch.rand((2 * B, T), generator=rng)).masked_fill(~MASK, 0).to(dtype)


def scores(dtype: torch.dtype) -> dict[str, Tensor]:
    """Our named scores [B, 2] of the same tokens."""

    def pairs(x: Tensor) -> Tensor:
        return torch.stack(x.chunk(2), dim=-1)

    logps, ref = token_logps(0, dtype).sum(-1), token_logps(1, dtype).sum(-1)
    return {
        "logps": pairs(logps),
        "mean_logps": pairs(logps / LENGTHS),
        "ratio": pairs(logps - ref),
        "mean_ratio": pairs((logps - ref) / LENGTHS),
        "label": torch.tensor([[True, False]]).expand(B, 2),
        "mask": torch.ones(B, 2).bool(),
    }


def ours(name: str, dtype: torch.dtype, **hyper) -> Outcome:
    objective, named = OBJECTIVES[name], scores(dtype)
    return objective(named, **hyper)


def total(outcome: Outcome) -> Tensor:
    """The loss of a batch: every term's sum over its own count."""
    counts = {
        "groups": B,
        "responses": 2 * B,
        "desirable": B,
        "chosen_tokens": int(LENGTHS[:B].sum()),
    }
    return torch.stack([t.weight * t.values.sum() / counts[t.per] for t in outcome.terms]).sum()


def assert_agrees(theirs: Tensor, name: str, **options) -> None:
    """Our float32 loss is no further from our float64 loss than theirs, by the three-way rule."""
    mine, truth = (total(ours(name, d, **options)) for d in (torch.float32, torch.float64))
    assert_three_way(mine, theirs, truth, name)
    # The rule bounds our error by theirs: theirs must be small for it to mean anything.
    assert_three_way(theirs.float(), mine, truth, f"peer's {name}")


class Model:
    """Returns the policy's and the reference's log-probs in the form of TRL's fused head."""

    training = True

    def __init__(self, logps: Tensor) -> None:
        self.logps = logps

    def __call__(self, **inputs) -> SimpleNamespace:
        rest = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps, entropy=rest, mean_logits=rest, is_top1=rest.bool()
        )


def trainer(**attributes) -> SimpleNamespace:
    """What the loss methods of TRL's trainers read of `self`."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        model=Model(torch.empty(0)),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def trl_dpo(
    loss_type: str, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, list[float]]]:
    """DPOTrainer's loss and metrics on our tokens, each row with a prompt of one token."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    this = trainer(
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
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
    model = Model(token_logps(0, torch.float32))
    return module.DPOTrainer._compute_loss(this, model, inputs, False), this._metrics["train"]


@pytest.mark.parametrize(
    ("loss_type", "name", "hyper"),
    [
        ("sigmoid", "dpo", {}),
        ("robust", "robust", {"label_smoothing": 0.2}),
        ("ipo", "ipo", {}),
        ("hinge", "hinge", {}),
        ("sppo_hard", "sppo", {"beta": 0.05}),
        ("bco_pair", "bco_pair", {}),
        ("sft", "sft", {}),
    ],
)
def test_trl_dpo_trainer(loss_type: str, name: str, hyper: dict[str, float]) -> None:
    loss, metrics = trl_dpo(loss_type, **hyper)
    assert_agrees(loss, name, **hyper)
    if name == "sft":  # TRL logs a DPO reward beside its SFT loss; ours is the log-probability
        return
    mine, truth = (ours(name, d, **hyper).rewards for d in (torch.float32, torch.float64))
    for side, key in enumerate(("rewards/chosen", "rewards/rejected")):
        theirs = torch.tensor(metrics[key][0])
        assert_three_way(mine[:, side].mean(), theirs, truth[:, side].mean(), key)


def test_trl_has_no_conservative_dpo() -> None:
    """TRL dropped cDPO: its sigmoid ignores label_smoothing. Ours smooths, as its CPO does."""
    loss, _ = trl_dpo("sigmoid", label_smoothing=0.2)
    assert_agrees(loss, "dpo", label_smoothing=0.0)
    assert (total(ours("dpo", torch.float32, label_smoothing=0.2)) - loss).abs() > 0.01


# TRL's and Liger's functions are the preference part alone.
def without_nll(form: Callable, *arguments: Tensor, **options: float) -> functional.PairLoss:
    return form(*arguments, preference_only=True, **options)


def columns(x: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = x.unbind(-1)
    return chosen, rejected


@pytest.mark.parametrize(
    ("loss_type", "run"),
    [
        (
            "sigmoid",
            lambda s: without_nll(functional.cpo_loss, *columns(s["logps"]), label_smoothing=0.1),
        ),
        (
            "simpo",
            lambda s: functional.simpo_loss(
                *columns(s["mean_logps"]), beta=0.1, gamma_beta_ratio=5.0, label_smoothing=0.1
            ),
        ),
    ],
)
def test_trl_cpo_trainer(loss_type: str, run: Callable) -> None:
    """CPOTrainer.cpo_loss: its simpo_gamma is gamma, ours gamma / beta."""
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    this = trainer(loss_type=loss_type, beta=0.1, simpo_gamma=0.5, label_smoothing=0.1, alpha=0.0)
    single, double = scores(torch.float32), scores(torch.float64)
    key = "mean_logps" if loss_type == "simpo" else "logps"
    theirs = module.CPOTrainer.cpo_loss(this, *columns(single[key]))
    for mine, peer, truth in zip(run(single), theirs, run(double), strict=True):
        assert_three_way(mine, peer, truth)
        assert_three_way(peer, mine, truth)


def test_trl_orpo_trainer() -> None:
    """odds_ratio_loss returns the reward to maximise: beta * logsig, our loss negated.

    The NLL that its trainer adds runs over prompt and response; ours over the response.
    """
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    single, double = scores(torch.float32), scores(torch.float64)
    theirs = module.ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), *columns(single["mean_logps"]))
    peer = functional.PairLoss(-theirs[0], *theirs[1:3])
    mine = without_nll(functional.orpo_loss, *columns(single["mean_logps"]))
    truth = without_nll(functional.orpo_loss, *columns(double["mean_logps"]))
    for a, b, c in zip(mine, peer, truth, strict=True):
        assert_three_way(a, b, c)
        assert_three_way(b, a, c)


def test_orpo_gradient_of_a_confident_answer() -> None:
    """At a mean log-prob of -1e-8 exp rounds to 1 in float32.

    TRL's log1mexp then differentiates log1p(-1) in the branch that `where` drops: NaN. Liger has
    no branch: log1p(-1) = -inf in the value.
    """
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    liger = pytest.importorskip("liger_kernel.chunked_loss.orpo_loss")
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([-1e-8])

    def ours(chosen: Tensor, rejected: Tensor) -> Tensor:
        return without_nll(functional.orpo_loss, chosen, rejected).losses

    def trls(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -trl.ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), chosen, rejected)[0]

    def gradient(loss: Callable, *at: Tensor) -> Tensor:
        leaf = at[1].clone().requires_grad_()
        return torch.autograd.grad(loss(at[0], leaf).sum(), leaf)[0]

    exact = gradient(ours, chosen.double(), rejected.double())
    assert_three_way(gradient(ours, chosen, rejected), exact.float(), exact, "gradient")
    assert gradient(trls, chosen, rejected).isnan()
    function = liger.LigerFusedLinearORPOFunction.preference_loss_fn
    assert function(chosen, rejected, torch.empty(2, 1), beta=0.1)[0].isinf()


def trl_kto(labels: Tensor, mismatched: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
    """KTOTrainer's loss on the same 2B rows, each an example of its own."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    this = trainer(
        beta=0.1,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.25,
        undesirable_weight=0.75,
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2 * B, 1 + T, dtype=torch.long),
        "attention_mask": torch.cat([prompt + 1, MASK.long()], dim=1),
        "completion_mask": torch.cat([prompt, MASK.long()], dim=1),
        "label": labels,
        "ref_logps": token_logps(1, torch.float32).sum(-1),
        "ref_KL_logps": torch.zeros_like(mismatched),
    }
    model = Model(token_logps(0, torch.float32))
    return module.KTOTrainer._compute_loss(this, model, inputs, False), this._metrics["train"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_trl_kto_trainer(sign: float) -> None:
    """With positive and with negative (clamped) mean log-ratio of mismatched responses."""
    rng = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (2 * B,), generator=rng).bool()
    mismatched = sign * 4 * torch.rand(2 * B, generator=rng)
    loss, metrics = trl_kto(labels, mismatched)

    def by_us(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logps, ref = token_logps(0, dtype).sum(-1), token_logps(1, dtype).sum(-1)
        statistic = OBJECTIVES["kto"].statistics["z0"]
        live = torch.ones(2 * B, 1).bool()
        named = {"mismatched_ratio": mismatched.to(dtype), "mask": live}
        values, where = statistic.of(named, {"beta": 0.1})
        z0 = values[where].mean()
        out = functional.kto_loss(
            logps, ref, labels, z0, beta=0.1, desirable_weight=1.25, undesirable_weight=0.75
        )
        return out.losses.mean(), z0.clamp(min=0)

    (mine, z0), (truth, _) = by_us(torch.float32), by_us(torch.float64)
    assert_three_way(mine, loss, truth, "kto")
    assert_three_way(loss, mine, truth, "peer's kto")
    assert metrics["kl"][0] == z0.item()


def liger(module: str, cls: str) -> Callable:
    loaded = pytest.importorskip(f"liger_kernel.chunked_loss.{module}")
    return getattr(loaded, cls).preference_loss_fn


@pytest.mark.parametrize(
    ("loss_type", "name", "hyper"),
    [
        ("sigmoid", "dpo", {}),
        ("hinge", "hinge", {}),
        ("robust", "robust", {"label_smoothing": 0.2}),
        ("sppo_hard", "sppo", {"beta": 0.05}),
        ("bco_pair", "bco_pair", {}),
    ],
)
def test_liger_dpo(loss_type: str, name: str, hyper: dict[str, float]) -> None:
    """Liger refuses ipo, and like TRL has no label smoothing in `sigmoid`."""
    function = liger("dpo_loss", "LigerFusedLinearDPOFunction")
    logps, ref = (token_logps(seed, torch.float32).sum(-1).chunk(2) for seed in (0, 1))
    options = {"beta": 0.1, **hyper, "loss_type": loss_type}
    loss, *rewards = function(*logps, torch.empty(2 * B, T), *ref, **options)
    assert_agrees(loss, name, **hyper)
    mine, truth = (ours(name, d, **hyper).rewards for d in (torch.float32, torch.float64))
    for side in range(2):
        assert_three_way(mine[:, side], rewards[side], truth[:, side], "rewards")


def test_liger_cpo_simpo_orpo() -> None:
    """Preference parts; Liger's simpo gamma is gamma, ours gamma / beta."""
    target = torch.empty(2 * B, T)
    single, double = scores(torch.float32), scores(torch.float64)

    def check(theirs: tuple[Tensor, ...], run: Callable) -> None:
        mine, truth = run(single), run(double)
        peer = (theirs[0], *theirs[1:3])
        mine, truth = (x._replace(losses=x.losses.mean()) for x in (mine, truth))
        for a, b, c in zip(mine, peer, truth, strict=True):
            assert_three_way(a, b, c)
            assert_three_way(b, a, c)

    check(
        liger("cpo_loss", "LigerFusedLinearCPOFunction")(
            *columns(single["logps"]), target, beta=0.1, label_smoothing=0.1
        ),
        lambda s: without_nll(functional.cpo_loss, *columns(s["logps"]), label_smoothing=0.1),
    )
    check(
        liger("simpo_loss", "LigerFusedLinearSimPOFunction")(
            *columns(single["mean_logps"]), target, beta=2.0, gamma=0.5
        ),
        lambda s: functional.simpo_loss(*columns(s["mean_logps"])),
    )
    check(
        liger("orpo_loss", "LigerFusedLinearORPOFunction")(
            *columns(single["mean_logps"]), target, beta=0.1
        ),
        lambda s: without_nll(functional.orpo_loss, *columns(s["mean_logps"])),
    )


def test_liger_kto() -> None:
    """Liger has no weights and does not clamp its KL: give it a positive one."""
    function = liger("kto_loss", "LigerFusedLinearKTOFunction")
    labels = torch.arange(2 * B) % 3 == 0
    z0 = torch.tensor(1.5)

    def by_us(dtype: torch.dtype) -> Tensor:
        logps, ref = token_logps(0, dtype).sum(-1), token_logps(1, dtype).sum(-1)
        return functional.kto_loss(logps, ref, labels, z0.to(dtype)).losses.mean()

    logps, ref = token_logps(0, torch.float32).sum(-1), token_logps(1, torch.float32).sum(-1)
    theirs = function(logps, labels, torch.empty(2 * B, T), ref, beta=0.1, kl=z0)[0]
    assert_three_way(by_us(torch.float32), theirs, by_us(torch.float64))
    assert_three_way(theirs, by_us(torch.float32), by_us(torch.float64))
