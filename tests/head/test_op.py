"""The operators as `torch.compile`, `opcheck` and gradient accumulation see them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from fastpo import linear_cross_entropy, linear_logps, linear_stats
from fastpo.head.op import BackwardInputs, LinearStats, schema_of, take
from fastpo.head.types import DIFFERENTIABLE, PassOptions, PassTensors
from fastpo.testing.three_way import assert_three_way
from tests.head.test_functional import LARGE, SMALL, gradients, inputs

KINDS = {
    "frozen": (("hidden",), LARGE),
    "kept": (("hidden", "weight", "bias"), LARGE),
    "recompute": (("hidden", "weight", "bias"), SMALL),
    "head only": (("weight",), SMALL),
}
kinds = pytest.mark.parametrize(("leaves", "workspace"), KINDS.values(), ids=KINDS)


FORWARD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias, Tensor? temperatures, Tensor? lora_b, "
    "str[] want, str[] grads, float? softcap, float logit_scale, float temperature, "
    "float jsd_beta, float skip_below, str backend, str schedule, SymInt row_block, "
    "SymInt vocab_block, SymInt late_rows, SymInt kept, str? group, SymInt rank, SymInt[] rows, "
    "SymInt[] tokens"
)
BACKWARD = f"{FORWARD}, Tensor[] saved, Tensor[] cotangents, bool[] needs"


def test_schemas_follow_from_the_types_and_stay_what_exported_programs_hold():
    assert schema_of(PassTensors, PassOptions) == FORWARD
    assert schema_of(PassTensors, PassOptions, BackwardInputs) == BACKWARD
    for name, schema in (("linear_stats", FORWARD), ("linear_stats_backward", BACKWARD)):
        registered = str(getattr(torch.ops.fastpo, name).default._schema)
        assert registered == f"fastpo::{name}({schema}) -> Tensor[]"


def test_arguments_become_the_objects_whose_fields_they_are():
    count = len(PassTensors._fields), len(PassOptions._fields), len(BackwardInputs._fields)
    tensors, options, inputs = take(range(sum(count)), PassTensors, PassOptions, BackwardInputs)
    assert (tensors.hidden, options.want, inputs.saved) == (0, count[0], count[0] + count[1])


@pytest.mark.parametrize("name", ["linear_stats", "linear_stats_backward"])
@pytest.mark.parametrize("stats", [("logps", "entropy"), DIFFERENTIABLE], ids=["own", "reference"])
@kinds
def test_opcheck(monkeypatch, name, stats, leaves, workspace):
    x = inputs(torch.float32, n=7, v=300)
    if stats != DIFFERENTIABLE:
        del x["ref_hidden"]
    calls = {}
    # What the function hands the operator.
    real = getattr(torch.ops.fastpo, name)
    monkeypatch.setattr(torch.ops.fastpo, name, partial(_remember, real, calls))
    gradients(linear_stats, x, leaves, stats, stats=stats, workspace_mib=workspace / 10)
    monkeypatch.undo()
    if not calls:
        assert (name, leaves) == ("linear_stats_backward", ("hidden",))
    else:
        opcheck(real.default, calls["args"])


def _remember(operator, calls, *args):
    calls["args"] = tree_map_only(Tensor, Tensor.detach, args)
    return operator(*args)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
@kinds
def test_compiles_to_one_graph(leaves, workspace, ignored):
    """Forward and backward in one graph, the same numbers; a second shape too."""
    torch._dynamo.reset()
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    for n in (20, 33):
        x = inputs(torch.float32, n=n)
        del x["ref_hidden"]
        if ignored:
            x["labels"][::3] = -100

        def stats(fn, *args, **kwargs):
            return {"logps": fn(*args, **kwargs)}

        ours, grads = gradients(
            partial(stats, compiled), x, leaves, ("logps",), workspace_mib=workspace
        )
        expected, same = gradients(
            partial(stats, linear_logps), x, leaves, ("logps",), workspace_mib=workspace
        )
        wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
        truth, true_grads = gradients(partial(stats, linear_logps), wide, leaves, ("logps",))
        assert_three_way(ours["logps"], expected["logps"], truth["logps"])
        for leaf in leaves:
            assert_three_way(grads[leaf], same[leaf], true_grads[leaf], leaf)


def test_compiled_label_outside_the_vocabulary_fails():
    x = inputs(torch.float32)
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"a label is outside \[0, 507\)"):
        compiled(x["hidden"], x["weight"], x["labels"] + 507)


def test_compiled_double_backward_is_refused():
    x = inputs(torch.float32)
    hidden = x["hidden"].requires_grad_()
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, x["weight"], x["labels"]).square().sum()
    # By this project's words after other compiled tests, by PyTorch's in a fresh process.
    refusal = r"create_graph=False|not currently support double backward"
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(loss, hidden, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [None, 480])
@pytest.mark.parametrize("workspace", [SMALL, LARGE])
def test_gradient_is_added_to_grad(dtype, vocab_size, workspace):
    """The existing gradient is rounded once with the new one, in its own memory."""
    x = inputs(dtype)
    labels = x["labels"] % 480
    before = torch.randn(x["weight"].shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(accumulate: bool, wide: bool = False) -> tuple[Tensor, Tensor]:
        to = torch.float64 if wide else dtype
        hidden = x["hidden"].to(to, copy=True).requires_grad_()
        weight = x["weight"].to(to, copy=True).requires_grad_()
        weight.grad = before.to(to).clone()
        memory = weight.grad.data_ptr()
        linear_cross_entropy(
            hidden, weight, labels, vocab_size=vocab_size, workspace_mib=workspace,
            accumulate_grad=accumulate,
        ).backward()  # fmt: skip
        assert weight.grad.data_ptr() == memory
        assert hidden.grad is not None
        return hidden.grad, weight.grad

    ours, plain, truth = run(True), run(False), run(False, wide=True)
    assert torch.equal(ours[0], plain[0])
    assert_three_way(ours[1], plain[1], truth[1])


def test_accumulating_without_a_grad_makes_one():
    x = inputs(torch.float32)
    weight = x["weight"].requires_grad_()
    linear_logps(x["hidden"], weight, x["labels"], accumulate_grad=True).sum().backward()
    assert weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="whole and a leaf"):
        linear_logps(x["hidden"], weight * 1, x["labels"], accumulate_grad=True)


def test_no_gradient_of_the_head_is_made_when_it_accumulates(monkeypatch):
    x = inputs(torch.float32)
    weight = x["weight"].requires_grad_()
    weight.grad = torch.zeros_like(weight)
    made = []
    backward = LinearStats.backward
    monkeypatch.setattr(
        LinearStats, "backward", staticmethod(lambda *a: made.append(backward(*a)) or made[-1])
    )
    linear_logps(x["hidden"], weight, x["labels"], accumulate_grad=True).sum().backward()
    assert [grads[4] for grads in made] == [None]
