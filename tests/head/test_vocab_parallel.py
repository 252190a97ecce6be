"""A head cut by vocabulary over 2 and 4 processes: the numbers of the whole head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpo import Head, PreferenceLoss, linear_logps, linear_stats
from fastpo.head.lora import Lora
from fastpo.head.torch_backend import TorchBackend
from fastpo.head.types import DIFFERENTIABLE
from fastpo.testing.three_way import assert_three_way
from tests.head.test_functional import LARGE, SMALL, D, N, V, inputs, plain

pytestmark = pytest.mark.slow  # processes of their own

ALL = (*DIFFERENTIABLE, "log_p2", "top1", "ref_logps")
# name -> (statistics, leaves, workspace, facts)
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], float, dict[str, Any]]] = {
    "frozen": (("logps", "lse", "entropy", "top1", "log_p2"), ("hidden",), SMALL, {}),
    "frozen logps": (("logps",), ("hidden",), LARGE, {"softcap": 5.0, "temperature": 1.3}),
    "kept": (("logps", "entropy"), ("hidden", "weight", "bias"), LARGE, {"logit_scale": 0.7}),
    "recompute": (("logps", "mean_logit"), ("hidden", "weight"), SMALL, {"softcap": 5.0}),
    "reference": (ALL, ("hidden",), SMALL, {}),
    "trained reference": (ALL, ("hidden", "weight", "bias"), SMALL, {"softcap": 5.0}),
    "padded": (("logps",), ("hidden", "weight"), SMALL, {"vocab_size": 490}),
    # So little that nothing is left out.
    "skipping": (("logps",), ("hidden",), SMALL, {"skip_below": 1e-12}),
    "trained skipping": (("logps",), ("hidden", "weight"), SMALL, {"skip_below": 1e-12}),
}
LORA = "a", "b"
TOKENS = {2: (40, 23), 4: (20, 0, 30, 13)}


def parts(size: int, ranks: int) -> list[slice]:
    """What `torch.chunk`, and so FSDP2, gives each rank."""
    step = -(-size // ranks)
    return [slice(lo, min(lo + step, size)) for lo in range(0, size, step)]


def cotangents(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(N, generator=g, dtype=torch.float64).to(dtype) for n in names}


def case_inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    stats, _, _, facts = CASES[name]
    x = inputs(torch.float32)
    if stats != ALL:
        del x["ref_hidden"]
    x["labels"] %= facts.get("vocab_size", V)
    best = (x["hidden"] @ x["weight"].T + x["bias"])[:, : facts.get("vocab_size")].argmax(1)
    x["labels"][::3] = best[::3]  # top1 is 1 somewhere
    return {k: t if k == "labels" else t.to(dtype) for k, t in x.items()}


def outcome(name: str, x: dict[str, Tensor], fn: Any, **options: Any) -> dict[str, Tensor]:
    """Statistics and gradients of one case."""
    stats, leaves, _, facts = CASES[name]
    x = {k: t.clone().requires_grad_(k in leaves) for k, t in x.items()}
    arguments = [x[n] for n in ("hidden", "weight", "labels")]
    rest = {k: t for k, t in x.items() if k not in ("hidden", "weight", "labels")}
    found = fn(*arguments, **rest, **facts, **options)
    names = tuple(n for n in stats if n in DIFFERENTIABLE)
    dtype = x["hidden"].dtype
    loss = sum((found[n] * c).sum() for n, c in cotangents(names, dtype).items())
    grads = torch.autograd.grad(loss, [x[k] for k in leaves])
    found = {n: found[n].detach() for n in stats}
    return found | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def definition(
    hidden, weight, labels, bias=None, ref_hidden=None, vocab_size=None, skip_below=0, **facts
):
    bias = None if bias is None else bias[:vocab_size]
    return plain(hidden, weight[:vocab_size], labels, bias, ref_hidden=ref_hidden, **facts)


def one_rank(rank: int, ranks: int, port: int, folder: str) -> None:
    """One of several processes; leaves what it found in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    group, found = dist.group.WORLD, {}
    rows = parts(V, ranks)[rank]
    for name, (stats, _, workspace, _) in CASES.items():
        x = case_inputs(name)
        x |= {k: x[k][rows] for k in ("weight", "bias") if k in x}
        found[name] = outcome(
            name, x, linear_stats, stats=stats, workspace_mib=workspace, group=group
        )
    found["lora"] = with_lora(rows, group=group)
    found["fsdp"] = fsdp(rank, ranks)
    found["loss"] = preference_loss(rank, ranks)
    torch.save(found, f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="backend='triton' has no head cut over ranks"):
        linear_logps(x["hidden"], x["weight"], x["labels"], group=group, backend="triton")
    with pytest.raises(ValueError, match="a rank holds no rows of the head"):
        linear_logps(x["hidden"], x["weight"], x["labels"], group=group, vocab_size=3)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    everywhere = [dist.tensor.Replicate()]
    whole = dist.tensor.distribute_tensor(inputs(torch.float32)["weight"], mesh, everywhere)
    with pytest.raises(ValueError, match=r"weight is placed.*pass full_tensor"):
        linear_logps(x["hidden"], whole, x["labels"])
    dist.destroy_process_group()


def with_lora(rows: slice = slice(None), dtype=torch.float32, merged=False, **options) -> Any:
    x, g = inputs(dtype), torch.Generator().manual_seed(7)
    a = torch.randn(4, D, generator=g).to(dtype).requires_grad_()
    b = torch.randn(V, 4, generator=g).to(dtype)[rows].clone().requires_grad_()
    temperature = torch.rand(N, generator=g).to(dtype) + 0.5
    weight, hidden = x["weight"][rows], x["hidden"].clone().requires_grad_()
    if merged:
        z = (hidden @ (weight + 0.5 * b @ a).T) / temperature[:, None]
        logps = z.log_softmax(-1).gather(1, x["labels"][:, None])[:, 0]
    else:
        logps = linear_logps(
            hidden, weight, x["labels"], lora=Lora(a, b, 0.5), temperature=temperature,
            workspace_mib=SMALL, **options,
        )  # fmt: skip
    grads = torch.autograd.grad(
        (logps * cotangents(("logps",), dtype)["logps"]).sum(), [hidden, a, b]
    )
    return dict(zip(("logps", "dhidden", "da", "db"), (logps.detach(), *grads), strict=True))


def fsdp(rank: int, ranks: int) -> dict[str, Tensor]:
    """Every rank its own tokens, the head's weight a DTensor that FSDP2 made."""
    from torch.distributed.fsdp import fully_shard

    x = inputs(torch.float32)
    head = nn.Linear(D, V)
    head.load_state_dict({"weight": x["weight"], "bias": x["bias"]})
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (ranks,)))
    lo = sum(TOKENS[ranks][:rank])
    mine = slice(lo, lo + TOKENS[ranks][rank])
    hidden = x["hidden"][mine].clone().requires_grad_()
    out = linear_stats(
        hidden, head.weight, x["labels"][mine], bias=head.bias, stats=("logps", "entropy"),
        workspace_mib=SMALL,
    )  # fmt: skip
    g = cotangents(("logps", "entropy"), torch.float32)
    sum((out[n] * g[n][mine]).sum() for n in out).backward()
    return {
        **{n: t.detach() for n, t in out.items()},
        "dhidden": hidden.grad,
        "dweight": head.weight.grad.full_tensor(),
        "dbias": head.bias.grad.full_tensor(),
    }


def preference_loss(rank: int, ranks: int, cut: bool = True, dtype=torch.float32) -> Any:
    """A padded pair on each rank through the loss."""
    x = inputs(dtype)
    head = nn.Linear(D, V, dtype=dtype)
    head.load_state_dict({"weight": x["weight"], "bias": x["bias"]})
    if cut:
        from torch.distributed.fsdp import fully_shard

        fully_shard(head, mesh=dist.init_device_mesh("cpu", (ranks,)))
    states = x["hidden"][rank * 8 : rank * 8 + 8].reshape(2, 4, D).clone().requires_grad_()
    labels = x["labels"][rank * 8 : rank * 8 + 8].reshape(2, 4)
    loss = PreferenceLoss("simpo", Head(head, logit_scale=0.1))(states, labels).loss
    loss.backward()
    weight = head.weight.grad.full_tensor() if cut else head.weight.grad
    return {"loss": loss.detach(), "dhidden": states.grad, "dweight": weight}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    from tests.train import child  # imports the trainer

    port = child.free_port()
    processes = [
        child.start(one_rank, rank, request.param, port, str(folder))
        for rank in range(request.param)
    ]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_same_tokens(ranks, name):
    stats, leaves, *_ = CASES[name]
    whole = outcome(name, case_inputs(name), definition)
    truth = outcome(name, case_inputs(name, torch.float64), definition)
    for n in (*stats, "dhidden"):
        for rank in ranks:
            assert torch.equal(rank[name][n], ranks[0][name][n])
        assert_three_way(ranks[0][name][n], whole[n], truth[n], n)
    for leaf in set(leaves) - {"hidden"}:
        together = torch.cat([rank[name][f"d{leaf}"] for rank in ranks])
        assert_three_way(together, whole[f"d{leaf}"], truth[f"d{leaf}"], leaf)


@pytest.fixture
def one_rank_alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("same_tokens", [True, False])
def test_one_rank_has_the_numbers_of_the_whole_head(monkeypatch, one_rank_alone, name, same_tokens):
    monkeypatch.setattr("fastpo.head.schedule._LEAST_COLUMNS", 50)
    monkeypatch.setattr(TorchBackend, "largest_chunk", 50 * N)
    stats, leaves, workspace, _ = CASES[name]
    alone = outcome(
        name, case_inputs(name), linear_stats, stats=stats, workspace_mib=workspace,
        group=one_rank_alone, same_tokens=same_tokens,
    )  # fmt: skip
    same, truth = (
        outcome(name, case_inputs(name, t), definition) for t in (torch.float32, torch.float64)
    )
    for n in (*stats, *(f"d{leaf}" for leaf in leaves)):
        assert_three_way(alone[n], same[n], truth[n], n)


def test_low_rank_delta(ranks):
    whole, truth = with_lora(merged=True), with_lora(dtype=torch.float64, merged=True)
    for n in ("logps", "dhidden", "da"):
        assert torch.equal(ranks[0]["lora"][n], ranks[1]["lora"][n])
        assert_three_way(ranks[0]["lora"][n], whole[n], truth[n], n)
    together = torch.cat([rank["lora"]["db"] for rank in ranks])
    assert_three_way(together, whole["db"], truth["db"])


def test_own_tokens(ranks):
    """The mean of the ranks' losses reaches the weight, each rank's own loss its states."""
    names = ("logps", "entropy")
    plains = {}
    for dtype in (torch.float32, torch.float64):
        x = {k: t if k == "labels" else t.to(dtype) for k, t in inputs(torch.float32).items()}
        leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]
        found = plain(leaves[0], leaves[1], x["labels"], leaves[2])
        loss = sum((found[n] * c).sum() for n, c in cotangents(names, dtype).items())
        grads = torch.autograd.grad(loss, leaves)
        plains[dtype] = {n: found[n].detach() for n in names} | {
            "dhidden": grads[0],
            "dweight": grads[1] / len(ranks),
            "dbias": grads[2] / len(ranks),
        }
    for n, same in plains[torch.float32].items():
        of_ranks = [rank["fsdp"][n] for rank in ranks]
        if n in ("dweight", "dbias"):
            assert all(torch.equal(of_ranks[0], other) for other in of_ranks)
            ours = of_ranks[0]
        else:
            assert [len(t) for t in of_ranks] == list(TOKENS[len(ranks)])
            ours = torch.cat(of_ranks)
        assert_three_way(ours, same, plains[torch.float64][n], n)


def test_preference_loss(ranks):
    each = range(len(ranks))
    plains = [preference_loss(r, len(ranks), cut=False) for r in each]
    truths = [preference_loss(r, len(ranks), cut=False, dtype=torch.float64) for r in each]
    for rank, same, truth in zip(ranks, plains, truths, strict=True):
        for n in ("loss", "dhidden"):
            assert_three_way(rank["loss"][n], same[n], truth[n], n)
    mean = [torch.stack([r["dweight"] for r in of]).mean(0) for of in (plains, truths)]
    assert_three_way(ranks[0]["loss"]["dweight"], *mean)
