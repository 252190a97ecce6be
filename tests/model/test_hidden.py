"""Shared against padded rows, for every family: log-probs, gradients, and what wraps models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fastpo.batch import Batch, GroupSpan, Layout
from fastpo.data.packing import collate
from fastpo.head.functional import linear_logps
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import (
    attach,
    balance_coefficient,
    causal_lm,
    detach,
    generation,
    target_hidden,
    target_hidden_and_balance,
)
from fastpo.model.load import add_lora
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import FAMILIES, PAD, UNSHARED, VOCAB, WIDTH, family, groups, tiny

LORA: dict[str, Any] = {"r": 4, "init_lora_weights": False}


@pytest.fixture(autouse=True)
def float64_means_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary tables and eager softmax go through float32; a float64 model is the truth."""
    softmax, to = nn.functional.softmax, Tensor.to

    def exact_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    def exact_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lowers = torch.float32 in args or kwargs.get("dtype") == torch.float32
        return self if lowers and self.dtype == torch.float64 else to(self, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "softmax", exact_softmax)
    monkeypatch.setattr(Tensor, "to", exact_to)
    monkeypatch.setattr(Tensor, "float", lambda self: self.to(torch.float32))


def batch(*, shared: bool, jump: bool = False) -> Batch:
    """`groups()` packed; with `jump`, positions skip ahead inside prompts and inside responses."""
    out = collate(groups(), share_prompt=shared, pad_token_id=PAD)
    if jump:
        positions = out.position_ids
        jumps = 40 * (positions >= 3) + 100 * (positions >= 10)
        out = replace(out, position_ids=positions + jumps)
    return out


def logps(model: nn.Module, inputs: Batch) -> Tensor:
    head = read_head(model)
    hidden = target_hidden(model, inputs)
    return linear_logps(hidden, head.weight, inputs.tokens.targets, bias=head.bias, **head.facts())


def run(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """Log-probs and the gradient of every trained parameter, for uneven weights of the tokens."""
    model.zero_grad()
    values = logps(model, inputs)
    torch.sin(torch.arange(len(values), dtype=values.dtype) + 1).mul(values).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logps": values.detach(), **grads}


def every(results: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """All of them in one vector, each in units of its own largest true magnitude."""
    return torch.cat([(v / truth[n].abs().max()).flatten().double() for n, v in results.items()])


def assert_shared_is_padded(model: nn.Module, *, jump: bool = False) -> None:
    shared, padded = batch(shared=True, jump=jump), batch(shared=False, jump=jump)
    exact = attach(copy.deepcopy(model).double())
    truth = run(exact, padded)
    ours, plain = run(model, shared), run(model, padded)
    assert ours.keys() == plain.keys() == truth.keys()
    assert all(value.isfinite().all() for value in truth.values())
    assert_three_way(ours["logps"], plain["logps"], truth["logps"], what="logps")
    # One rule over all gradients: of each single small matrix, plain's error is a matter of luck.
    units = [every(results, truth) for results in (ours, plain, truth)]
    assert_three_way(units[0].float(), units[1].float(), units[2], what="gradients")
    # In float64 rounding is 1e-16 times a few thousand sums: any wrong rule stands out.
    assert (every(run(exact, shared), truth) - units[2]).abs().max() < 1e-11


# Every family: windows, soft-caps, sinks, experts, other names of the decoder.
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_equals_padded(name: str) -> None:
    assert_shared_is_padded(attach(family(name)))


JUMPS = ["llama", "qwen2", "qwen3", "gpt2", "mistral-window", "gemma2"]


# Families that would take a jump for the border of a sequence.
@pytest.mark.parametrize("name", JUMPS)
def test_position_jumps_are_no_borders(name: str) -> None:
    model = attach(family(name))
    assert_shared_is_padded(model, jump=True)
    if name != "mistral-window":  # there, the window decides who sees whom and positions little
        moved = logps(model, batch(shared=True, jump=True)) - logps(model, batch(shared=True))
        assert moved.abs().max() > 0.1


def test_a_leak_between_responses_would_show() -> None:
    model = attach(family("llama"))
    inputs = batch(shared=True)
    joined = tuple(
        GroupSpan(g.prompt, ((g.responses[0][0], g.responses[-1][1]),))
        for g in inputs.layout.groups
    )
    leaky = replace(inputs, layout=Layout(joined, inputs.layout.length))
    assert (logps(model, leaky) - logps(model, inputs)).abs().max() > 0.1


# Both implementations, on layers with one mask, with two, and with other arguments.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = attach(family(name))
    expected = run(model, batch(shared=True))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # needs an input that wants a gradient
        model.enable_input_require_grads()
    found = run(model, batch(shared=True))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_recomputation_keeps_the_attention_of_its_forward() -> None:
    model = attach(family("llama"))
    shared, padded = batch(shared=True), batch(shared=False)
    expected = run(model, shared)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    values = logps(model, shared)
    logps(model, padded)  # another mode between forward and backward
    model(input_ids=padded.input_ids)
    torch.sin(torch.arange(len(values)) + 1.0).mul(values).sum().backward()
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_compiled() -> None:
    """Layouts are plain Python, so that graphs may break around attention; numbers stay."""
    torch._dynamo.reset()
    model = attach(family("llama", num_hidden_layers=1))
    expected = run(model, batch(shared=True))
    model.compile(backend="aot_eager")
    compiled = run(model, batch(shared=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    exact = run(attach(family("llama", num_hidden_layers=1).double()), batch(shared=False))
    ours, plain, truth = (every(results, exact) for results in (compiled, expected, exact))
    assert_three_way(ours.float(), plain.float(), truth, what="compiled")


def router_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """A loss and its gradient by the router of every layer."""
    routers = {
        n: p for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))
    }
    assert len(routers) == causal_lm(model).config.num_hidden_layers
    grads = torch.autograd.grad(loss, list(routers.values()))
    return {"loss": loss.detach(), **dict(zip(routers, grads, strict=True))}


# Routers with and without bias; recomputed layers count once.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_load_balance_counts_distinct_tokens(name: str, checkpointed: bool) -> None:
    """A shared row is the padded rows with each prompt seen by the loss in its first row alone."""
    padded, shared = batch(shared=False), batch(shared=True)
    distinct = padded.attention_mask.clone()
    row = 0
    for each in groups():
        for _ in each.responses[1:]:
            row += 1
            distinct[row, : len(each.prompt_ids)] = 0
        row += 1

    def by_hand(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
        kinds = ("input_ids", "attention_mask", "position_ids")
        decoder = model.get_decoder()
        out = decoder(
            **{k: getattr(padded, k) for k in kinds}, output_router_logits=True, use_cache=False
        )
        experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
        loss = load_balancing_loss_func(out.router_logits, experts, chosen, mask)
        return router_gradients(model, loss)

    model = family(name)
    found = {}
    for form, inputs, mask in (
        ("shared", shared, distinct),
        ("padded", padded, padded.attention_mask),
    ):
        truth, plain = by_hand(family(name).double(), mask), by_hand(model, mask)
        ours = family(name)
        if checkpointed:
            ours.activation_checkpointing_enable()
        _, loss = target_hidden_and_balance(attach(ours), inputs)
        found[form] = router_gradients(ours, loss)
        assert found[form].keys() == truth.keys()
        for key, value in found[form].items():
            assert_three_way(value, plain[key], truth[key], what=f"{form} {key}")
    # Prompts of several responses weigh more in padded rows: the loss differs, and is meant to.
    assert (found["shared"]["loss"] - found["padded"]["loss"]).abs() > 1e-3


def test_load_balance_coefficient() -> None:
    mixture, dense = family("mixtral", router_aux_loss_coef=0.02), family("llama")
    assert balance_coefficient(mixture, None) == 0.0
    mixture.config.output_router_logits = True
    assert balance_coefficient(mixture, None) == 0.02
    assert balance_coefficient(mixture, 0.5) == 0.5
    assert balance_coefficient(mixture, 0.0) == 0.0
    assert balance_coefficient(dense, None) == 0.0
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef=0\.1: llama gives no router logits"
    ):
        balance_coefficient(dense, 0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=-1 must be 0"):
        balance_coefficient(mixture, -1)


def test_hidden_is_the_input_of_the_head() -> None:
    for name in ("llama", "gpt2", "gemma2"):
        model = family(name).eval()
        padded = batch(shared=False)
        inputs = {k: getattr(padded, k) for k in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
            found = attach(model)(**inputs, fastpo_hidden=True)
        assert torch.equal(found, expected), name


def test_no_vocabulary_sized_tensor_is_made() -> None:
    model = attach(family("llama"))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    hidden = target_hidden(model, batch(shared=True))
    assert hidden.shape == (len(batch(shared=True).tokens.targets), WIDTH)


def test_attached_model_is_otherwise_the_same(tmp_path: Path) -> None:
    plain = family("llama").eval()
    padded = batch(shared=False)
    inputs = {k: getattr(padded, k) for k in ("input_ids", "attention_mask", "position_ids")}
    expected = plain(**inputs).logits
    model = attach(copy.deepcopy(plain))
    target_hidden(model, batch(shared=True))
    assert torch.equal(model(**inputs).logits, expected)
    assert model.state_dict().keys() == plain.state_dict().keys()

    twin = copy.deepcopy(attach(model))
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    for shared in (True, False):
        a, b = (target_hidden(m, batch(shared=shared)) for m in (model, twin))
        assert torch.allclose(2 * a, b)  # exact up to where the factor 2 is applied
    detach(twin)
    assert "forward" not in twin.__dict__
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())
    with pytest.raises(ValueError, match="attach"):
        target_hidden(twin, batch(shared=True))

    model.save_pretrained(tmp_path)
    assert "fastpo" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)


def test_an_earlier_forward_on_the_instance_is_kept() -> None:
    model = family("llama").eval()
    calls = []
    original = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    attach(model)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert calls == [1]
    detach(model)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert calls == [1, 1]


def test_lora_and_its_switch() -> None:
    base = family("llama")
    before = logps(attach(base), batch(shared=True)).detach()
    model = add_lora(base, {**LORA})
    assert_shared_is_padded(model)
    with model.disable_adapter():
        assert torch.equal(logps(model, batch(shared=True)), before)
    assert (logps(model, batch(shared=True)) - before).abs().max() > 0.1
    assert causal_lm(model) is base
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert not any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_trained_head_beside_the_adapter_is_read_at_every_call() -> None:
    model = add_lora(attach(family("llama")), {**LORA, "modules_to_save": ["lm_head"]})
    inputs = batch(shared=True)
    head = read_head(model)
    with torch.no_grad():
        head.weight.mul_(1.5)
    adapted = head.weight
    with model.disable_adapter():
        assert not torch.equal(head.weight, adapted)
        off = logps(model, inputs)
    reference = logps(attach(family("llama")), inputs)
    assert torch.equal(off, reference)
    assert adapted.requires_grad
    run(model, inputs)
    assert adapted.grad is not None


# Every family that cannot share a prompt.
@pytest.mark.parametrize("name", UNSHARED)
def test_families_without_sharing_run_padded(name: str) -> None:
    model_type, config, _ = UNSHARED[name]
    model = attach(tiny(model_type, **config)).eval()
    padded = batch(shared=False)
    found = run(model, padded)
    rows = []
    for group in groups():
        for response in group.responses:
            ids = torch.tensor([*group.prompt_ids, *response.input_ids])
            own = model(input_ids=ids[None].long()).logits[0].log_softmax(-1)
            p = len(group.prompt_ids)
            rows.append(own[p - 1 : -1].gather(1, ids[p:, None].long())[:, 0])
    # Unpadded rows of the same fp32 model: equal up to rounding of sums in another order.
    assert torch.allclose(found["logps"], torch.cat(rows), atol=1e-4)
    if name in ("mamba", "bloom"):
        with pytest.raises(ValueError, match="has no position_ids"):
            target_hidden(model, batch(shared=False, jump=True))


def test_generation_is_the_plain_models() -> None:
    prompts = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = family("llama").eval()
    expected = plain.generate(prompts, attention_mask=mask, pad_token_id=PAD, **options)
    model: PreTrainedModel = attach(family("llama")).train()
    model.model.layers[1].eval()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    target_hidden(model, batch(shared=True))
    with generation(model):
        assert not model.training
        assert model.config.use_cache
        found = model.generate(prompts, attention_mask=mask, pad_token_id=PAD, **options)
        with torch.no_grad():
            target_hidden(model, batch(shared=True))
    assert torch.equal(found, expected)
    assert model.training
    assert not model.model.layers[1].training
    assert model.is_activation_checkpointing
    assert model.config.use_cache is False
    target_hidden(model, batch(shared=True))


def test_refuses() -> None:
    model = attach(family("llama"))
    inputs = batch(shared=True)
    ids, positions, layout = inputs.input_ids, inputs.position_ids, inputs.layout
    with pytest.raises(ValueError, match="goes with fastpo_hidden"):
        model(input_ids=ids, position_ids=positions, fastpo_layout=layout)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones_like(ids),
            fastpo_layout=layout,
            fastpo_hidden=True,
        )
    with pytest.raises(ValueError, match="needs position_ids"):
        model(input_ids=ids, fastpo_layout=layout, fastpo_hidden=True)
    with pytest.raises(TypeError, match=r"holds no transformers\.PreTrainedModel"):
        attach(nn.Linear(2, 2))
    forced = family("llama")
    forced.set_attn_implementation("fastpo")
    with pytest.raises(ValueError, match="switch by themselves"):
        attach(forced)
    with pytest.raises(ValueError, match="got no segment table"):
        forced(input_ids=ids)


def test_a_layer_that_bypasses_the_function_is_caught() -> None:
    model = attach(family("llama"))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match="1 attention calls in a forward of 2 layers"):
        target_hidden(model, batch(shared=True))
    assert model.config._attn_implementation == "sdpa"
