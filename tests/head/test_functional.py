"""Statistics and gradients of the head, every schedule, against float64 and plain PyTorch."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from fastpo import linear_cross_entropy, linear_logps, linear_stats, logps_from_logits
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.head.torch_backend import TorchBackend
from fastpo.head.types import DIFFERENTIABLE
from fastpo.testing.three_way import assert_three_way

N, D, V = 63, 31, 507
# MiB. The first gives blocks of 6 to 25 rows and slices of 50 to 200 columns. At half of it a block
# has three rows, MKL takes another path for the forward's products than for the backward's, and
# recomputed probabilities no longer sum to one exactly: entropy and KL gradients lose a factor 2.
SMALL, LARGE = 0.1, 256


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ref_hidden: Tensor | None = None,
) -> dict[str, Tensor]:
    """The definitions, on full logits, in the dtype of the inputs."""

    def log_softmax(h: Tensor) -> tuple[Tensor, Tensor]:
        z = h @ weight.T
        z = (z if bias is None else z + bias) * logit_scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        return z, z.log_softmax(-1)

    z, log_p = log_softmax(hidden)
    p, label = log_p.exp(), labels[:, None]
    stats = {
        "logps": log_p.gather(1, label)[:, 0],
        "lse": z.logsumexp(-1),
        "entropy": -(p * log_p).sum(-1),
        "mean_logit": z.mean(-1),
        "log_p2": p.square().sum(-1).log(),
        "top1": (z.argmax(-1) == labels).to(z.dtype),
    }
    if ref_hidden is not None:
        log_q = log_softmax(ref_hidden)[1].detach()
        stats["ref_logps"] = log_q.gather(1, label)[:, 0]
        stats["kl_ref_policy"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        stats["kl_policy_ref"] = (p * (log_p - log_q)).sum(-1)
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        both = (log_q.exp() * (log_q - log_m)).sum(-1), (p * (log_p - log_m)).sum(-1)
        stats["jsd"] = (both[0] + both[1]) / 2
    return stats


def plain_in_order(seed, hidden, weight, labels, bias=None, ref_hidden=None, **facts):
    """`plain` with vocabulary and width in another order."""
    g = torch.Generator().manual_seed(seed)
    v, d = torch.randperm(weight.shape[0], generator=g), torch.randperm(D, generator=g)
    return plain(
        hidden[:, d],
        weight[v][:, d],
        v.argsort()[labels],
        bias=None if bias is None else bias[v],
        ref_hidden=None if ref_hidden is None else ref_hidden[:, d],
        **facts,
    )


def unpadded(hidden, weight, labels, bias, vocab_size):
    return plain(hidden, weight[:vocab_size], labels, bias[:vocab_size])


def inputs(dtype: torch.dtype, seed: int = 0, n: int = N, d: int = D, v: int = V) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(n, d, generator=g).to(dtype),
        "weight": (torch.randn(v, d, generator=g) / 2).to(dtype),
        "bias": torch.randn(v, generator=g).to(dtype),
        "ref_hidden": torch.randn(n, d, generator=g).to(dtype),
        "labels": torch.randint(0, v, (n,), generator=g),
    }


def gradients(fn, x: dict, leaves: tuple[str, ...], names: tuple[str, ...], **facts):
    """(statistics, gradients of a random combination of `names` to `leaves`)."""
    tensors = {k: t.clone().requires_grad_(k in leaves) for k, t in x.items() if k != "labels"}
    labels = x["labels"]
    hidden, weight = tensors.pop("hidden"), tensors.pop("weight")
    stats = fn(hidden, weight, labels, **tensors, **facts)
    g = torch.Generator().manual_seed(1)
    cotangents = {n: torch.randn(labels.numel(), generator=g, dtype=torch.float64) for n in names}
    loss = sum((stats[n].double() * cotangents[n]).sum() for n in names)
    all_leaves = {"hidden": hidden, "weight": weight, **tensors}
    grads = torch.autograd.grad(loss, [all_leaves[k] for k in leaves])
    return stats, dict(zip(leaves, grads, strict=True))


CASES = [
    # (leaves, workspace): frozen, kept, recompute, head only, frozen weight with trained bias
    (("hidden",), SMALL),
    (("hidden",), LARGE),
    (("hidden", "weight", "bias"), LARGE),
    (("hidden", "weight", "bias"), SMALL),
    (("weight",), SMALL),
    (("hidden", "bias"), SMALL),
]
FACTS = [
    {},
    {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
    {"logit_scale": 2.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("leaves", "workspace"), CASES)
@pytest.mark.parametrize("facts", FACTS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("names", [("logps",), DIFFERENTIABLE], ids=["logps", "all"])
def test_three_way(dtype, leaves, workspace, facts, names):
    x = inputs(dtype)
    if names == ("logps",):
        del x["ref_hidden"]
    wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
    every = (*names, "log_p2", "top1") if "ref_hidden" in x else names
    ours, our_grads = gradients(
        linear_stats, x, leaves, names, **facts, stats=every, workspace_mib=workspace
    )
    # In float64 the truth is rounded like everybody; other orders of its sums show how much.
    in_order = [partial(plain_in_order, seed) for seed in range(8)]
    references = in_order if dtype == torch.float64 else [plain]
    plains = [gradients(reference, x, leaves, names, **facts) for reference in references]
    truth, true_grads = gradients(plain, wide, leaves, names, **facts)
    for name in every:
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert ours[name].dtype == expected
        if name != "top1":  # half-precision logits tie where the true ones do not
            same = [stats[name].to(expected) for stats, _ in plains]
            assert_three_way(ours[name], same, truth[name], name)
        elif dtype in (torch.float32, torch.float64):
            assert torch.equal(ours[name].double(), truth[name])
    for leaf in leaves:
        assert our_grads[leaf].dtype == dtype
        same = [grads[leaf] for _, grads in plains]
        assert_three_way(our_grads[leaf], same, true_grads[leaf], f"d{leaf}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("logps",), ("logps", "lse")], ids="+".join)
@pytest.mark.parametrize("workspace_columns", [V + 2 * 50, 300])
def test_kept_slices_under_a_rising_maximum(dtype, names, workspace_columns, monkeypatch):
    """Every slice has a shift of its own; the first two have no finite logit at all."""
    monkeypatch.setattr("fastpo.head.schedule._LEAST_COLUMNS", 50)
    monkeypatch.setattr(TorchBackend, "largest_chunk", 50 * N)
    workspace = workspace_columns * N * 4 / 2**20
    work, options = Workload(N, V, D, needs_head=True), HeadOptions(workspace_mib=workspace)
    schedule = plan_head(work, options, device="cpu")[1]
    assert (schedule.chunk_columns, schedule.kept) == (50, V if workspace_columns > V else 200)
    x = inputs(dtype)
    del x["ref_hidden"]
    # Below -88, where exp(0 - lse) is infinite in float32.
    x["bias"] = torch.linspace(-300, -200, V).to(dtype)
    x["bias"][:100] = -torch.inf
    x["labels"] = x["labels"].clamp(min=100)
    leaves = ("hidden", "weight", "bias")
    wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
    ours, our_grads = gradients(
        linear_stats, x, leaves, names, stats=names, workspace_mib=workspace
    )
    same, same_grads = gradients(plain, x, leaves, names)
    truth, true_grads = gradients(plain, wide, leaves, names)
    for name in names:
        assert_three_way(ours[name], same[name].float(), truth[name], name)
    for leaf in leaves:
        assert_three_way(our_grads[leaf], same_grads[leaf], true_grads[leaf], f"d{leaf}")


@pytest.mark.parametrize("p_label", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("trained", [False, True])
def test_confident_tokens_keep_their_gradient(p_label, trained):
    """Per-row relative error: a coefficient rounded before the one-hot is folded in is off by 1."""
    x = inputs(torch.bfloat16)
    del x["ref_hidden"]
    logits = x["hidden"].double() @ x["weight"].double().T + x["bias"].double()
    # One direction of the hidden space raises the label's logit until p_y is what is wanted.
    extra = torch.zeros(N, V, dtype=torch.float64)
    rest = logits.scatter(1, x["labels"][:, None], float("-inf")).logsumexp(-1)
    wanted = torch.logit(torch.tensor(p_label, dtype=torch.float64)) + rest
    extra[torch.arange(N), x["labels"]] = wanted - logits.gather(1, x["labels"][:, None])[:, 0]
    # Rows of one label each, so that the boost is a bias.
    for row in (0, 7, 40):
        bias = (x["bias"].double() + extra[row]).to(torch.float32)
        one = {
            "hidden": x["hidden"][row : row + 1],
            "weight": x["weight"],
            "bias": bias.to(torch.bfloat16),
            "labels": x["labels"][row : row + 1],
        }
        leaves = ("hidden", "weight") if trained else ("hidden",)
        wide = {k: t if k == "labels" else t.double() for k, t in one.items()}
        _, ours = gradients(linear_stats, one, leaves, ("logps",), workspace_mib=SMALL)
        _, truth = gradients(plain, wide, leaves, ("logps",))
        for leaf in leaves:
            scale = truth[leaf].abs().max()
            # One rounding to bfloat16 (2^-9) of the result; the CPU forms it in float32.
            error = ((ours[leaf].double() - truth[leaf]).abs().max() / scale).item()
            assert error <= 2**-8, (leaf, row, error)


def test_certain_label_keeps_log_prob_digits():
    """log p_y = -1e-8 is far below float32's resolution at 1, and must not become 0."""
    weight = torch.tensor([[0.0], [18.420680743952367]])  # e^-18.42 = 1e-8
    logps = linear_logps(torch.ones(1, 1), weight, torch.tensor([1]))
    truth = -torch.log1p(torch.exp(-weight[1].double()))
    assert ((logps.double() - truth) / truth).abs().item() < 1e-6


@pytest.mark.parametrize("workspace", [SMALL, LARGE])
@pytest.mark.parametrize("leaves", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(workspace, leaves, softcap):
    x = inputs(torch.float64, n=5, d=4, v=7)

    def fn(*tensors):
        t = {**x, **dict(zip(leaves, tensors, strict=True))}
        out = linear_stats(
            t["hidden"], t["weight"], t["labels"], stats=DIFFERENTIABLE, bias=t["bias"],
            ref_hidden=x["ref_hidden"], ref_weight=x["weight"], ref_bias=x["bias"],
            softcap=softcap, workspace_mib=workspace / 1000,
        )  # fmt: skip
        return tuple(out[n] for n in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(fn, [x[k].clone().requires_grad_() for k in leaves])


@pytest.mark.parametrize("trained", [False, True])
def test_ignored_rows_are_zero_and_cost_nothing(trained):
    x = inputs(torch.float32)
    labels = x["labels"].clone()
    labels[::3] = -100
    keep = labels != -100
    hidden = x["hidden"].clone()
    hidden[::3] = float("nan")  # a product that touched these rows would show
    hidden.requires_grad_()
    weight = x["weight"].clone().requires_grad_(trained)
    out = linear_logps(hidden, weight, labels)
    out.sum().backward()
    h2 = x["hidden"][keep].clone().requires_grad_()
    w2 = x["weight"].clone().requires_grad_(trained)
    expected = linear_logps(h2, w2, labels[keep])
    expected.sum().backward()
    assert torch.equal(out[keep], expected)
    assert (out[~keep] == 0).all()
    assert torch.equal(hidden.grad[keep], h2.grad)
    assert (hidden.grad[~keep] == 0).all()
    if trained:
        assert torch.equal(weight.grad, w2.grad)


@pytest.mark.parametrize("n", [0, 5])
def test_no_valid_label_gives_zeros_with_zero_gradient(n):
    hidden = torch.randn(n, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    out = linear_stats(hidden, weight, torch.full((n,), -100), stats=("logps", "entropy", "top1"))
    assert all((t == 0).all() and t.shape == (n,) for t in out.values())
    (out["logps"].sum() + out["entropy"].sum()).backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_strided_inputs():
    x = inputs(torch.float32)
    wide = torch.randn(N, 2 * D)
    wide[:, ::2] = x["hidden"]
    hidden, weight = wide[:, ::2], x["weight"].T.contiguous().T
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    ours = linear_logps(hidden, weight, x["labels"], workspace_mib=SMALL)
    truth = plain(x["hidden"].double(), x["weight"].double(), x["labels"])["logps"]
    assert_three_way(ours, plain(x["hidden"], x["weight"], x["labels"])["logps"], truth)


def test_same_bits_twice_and_with_or_without_gradient():
    """Policy and reference agree exactly at step 0 because the row blocks do not change."""
    x = inputs(torch.float32)
    runs = []
    for requires_grad, _ in itertools.product((True, False), range(2)):
        hidden = x["hidden"].clone().requires_grad_(requires_grad)
        runs.append(linear_logps(hidden, x["weight"], x["labels"], workspace_mib=SMALL).detach())
    trained = x["weight"].clone().requires_grad_()
    runs.append(linear_logps(x["hidden"], trained, x["labels"], workspace_mib=SMALL).detach())
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize(("leaves", "workspace"), CASES)
@pytest.mark.parametrize("names", [("logps",), DIFFERENTIABLE], ids=["logps", "all"])
def test_a_row_does_not_depend_on_the_others(leaves, workspace, names):
    """Same bits whatever stands in the other rows. Their number is another matter: it chooses the
    BLAS kernel, and a row alone (a matrix-vector product) differs in the last digits.
    """
    x = inputs(torch.float32)
    if names == ("logps",):
        del x["ref_hidden"]
    others = torch.arange(N) != 40
    y = {k: t.clone() for k, t in x.items()}
    y["hidden"][others] = float("nan")
    y["labels"][others] = 3
    found = []
    for each in (x, y):
        stats, grads = gradients(
            linear_stats, each, leaves, names, stats=names, workspace_mib=workspace
        )
        kept = {name: value[40] for name, value in stats.items()}
        found.append(kept | ({"dh": grads["hidden"][40]} if "hidden" in leaves else {}))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    alone = linear_stats(x["hidden"][40:41], x["weight"], x["labels"][40:41], bias=x["bias"])
    whole = plain(x["hidden"], x["weight"], x["labels"], x["bias"])["logps"][40:41]
    wide = (
        x[k].double() if k != "labels" else x[k] for k in ("hidden", "weight", "labels", "bias")
    )
    assert_three_way(alone["logps"], whole, plain(*wide)["logps"][40:41])


def test_graph_may_be_walked_twice():
    for workspace in (SMALL, LARGE):
        x = inputs(torch.float32)
        hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
        loss = linear_logps(hidden, weight, x["labels"], workspace_mib=workspace).sum()
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(loss, [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    x = inputs(torch.float32)
    hidden = x["hidden"].requires_grad_()
    loss = linear_logps(hidden, x["weight"], x["labels"]).square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("rows", "vocab_size"), [(50257, 50257), (151936, 151665)])
def test_large_vocabulary(rows, vocab_size):
    """GPT-2's, and Qwen's with its padding.

    Of 16 tokens, since the worst error of 3 is chance: the BLAS sums 151665 products in an order
    that depends on the number of threads.
    """
    x = inputs(torch.float32, n=16, d=16, v=rows)
    del x["ref_hidden"]
    x["labels"] %= vocab_size
    wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
    for leaves in (("hidden",), ("hidden", "weight")):
        facts = {"workspace_mib": 1, "vocab_size": vocab_size}
        ours, grads = gradients(linear_stats, x, leaves, ("logps",), **facts)
        same, same_grads = gradients(unpadded, x, leaves, ("logps",), vocab_size=vocab_size)
        truth, true_grads = gradients(unpadded, wide, leaves, ("logps",), vocab_size=vocab_size)
        assert_three_way(ours["logps"], same["logps"], truth["logps"])
        for leaf in leaves:
            assert_three_way(grads[leaf], same_grads[leaf], true_grads[leaf], leaf)


def test_autocast_computes_in_its_dtype():
    x = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logps(x["hidden"], x["weight"], x["labels"])
    half = linear_logps(x["hidden"].bfloat16(), x["weight"].bfloat16(), x["labels"])
    assert ours.dtype == torch.float32
    assert torch.equal(ours, half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((N,), V)}, f"label {V} at position 0 is outside"),
        ({"labels": torch.full((N,), -1)}, "label -1 at position 0 is outside"),
        ({"labels": torch.zeros(N + 1, dtype=torch.long)}, r"labels must be \[63\]"),
        ({"labels": torch.zeros(N)}, "labels must be integers"),
        ({"hidden": torch.zeros(N, D + 1)}, r"hidden must be \[N, D\]"),
        ({"hidden": torch.zeros(N, D, dtype=torch.bfloat16)}, "cast one of them"),
        ({"bias": torch.zeros(V + 1)}, r"bias must be \[507\]"),
        ({"stats": ("logp",)}, "unknown statistic 'logp'"),
        ({"stats": ("top1",), "grad": ("top1",)}, "not a differentiable one"),
        ({"stats": ("kl_ref_policy",)}, "pass ref_hidden"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"workspace_mib": 0}, "workspace_mib must be positive"),
        ({"accumulate_grad": torch.zeros(V, D + 1)}, r"accumulate_grad must be \[507, \d+\]"),
        ({"accumulate_grad": torch.zeros(V - 1, D)}, r"got \[506, \d+\] of torch.float32"),
        ({"accumulate_grad": torch.zeros(V, D).long()}, "of torch.int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = inputs(torch.float32)
    args = {"hidden": x["hidden"], "weight": x["weight"], "labels": x["labels"]} | change
    with pytest.raises(ValueError, match=message):
        linear_stats(args.pop("hidden"), args.pop("weight"), args.pop("labels"), **args)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(reduction, label_smoothing):
    x = inputs(torch.float64)
    labels = x["labels"].clone()
    labels[5] = -100
    leaves = [x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()]
    ours = linear_cross_entropy(
        *leaves, labels, reduction=reduction, label_smoothing=label_smoothing
    )
    theirs = torch.nn.functional.cross_entropy(
        leaves[0] @ leaves[1].T, labels, reduction=reduction, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_cross_entropy_z_loss_and_errors():
    x = inputs(torch.float64)
    args = x["hidden"], x["weight"], x["labels"]
    lse = (x["hidden"] @ x["weight"].T).logsumexp(-1)
    with_z = linear_cross_entropy(*args, z_loss=1e-2)
    torch.testing.assert_close(with_z, linear_cross_entropy(*args) + 1e-2 * lse.square().mean())
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        linear_cross_entropy(*args, reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        linear_cross_entropy(*args, label_smoothing=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_from_logits(dtype):
    logits = torch.randn(2, 7, 33).to(dtype)
    labels = torch.randint(0, 33, (2, 7))
    labels[0, 0] = -100
    ours = logps_from_logits(logits, labels, temperature=2.0)
    truth = (logits.double() / 2).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    same = (logits / 2).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].float()
    ignored = labels == -100
    assert ours[0, 0] == 0
    assert_three_way(ours, same.masked_fill(ignored, 0), truth.masked_fill(ignored, 0))
    with pytest.raises(ValueError, match="label 33 at position"):
        logps_from_logits(logits, torch.full((2, 7), 33))
