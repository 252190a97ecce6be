"""Masks of tokens: their formula, their gradient, and what they are fed."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpo.model.masks as module
from fastpo.data.packing import collate
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.load import add_lora
from fastpo.model.masks import LearnedMask, TokenMasks, activation_mask, layer_states, layers_of
from fastpo.testing.three_way import assert_three_way
from tests.model import tiny as families
from tests.train import tiny


def states(count: int = 3, tokens: int = 7, size: int = 5) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, size, generator=rng).double() for _ in range(count)]


def test_docstring_examples() -> None:
    assert doctest.testmod(module).failed == 0


def test_learned_mask_is_its_formula() -> None:
    torch.manual_seed(0)
    mask = LearnedMask(3, 5).double().eval()
    mask.norm.weight.data.uniform_(0.5, 2)
    mask.norm.bias.data.uniform_(-1, 1)
    mask.mixer.weight.data = torch.tensor([[1.0, -0.7, 0.4]]).double()
    found = mask(states())
    plain = torch.zeros(7).double()
    for i, h in enumerate(states()):
        h = F.layer_norm(h, (5,), mask.norm.weight, mask.norm.bias)
        layer = mask.layers[i]
        plain += mask.mixer.weight[0, i] * (h @ layer.weight[0] + layer.bias).clamp(min=0)
    assert_three_way(found, plain.clamp(min=0), plain.clamp(min=0), "mask")
    assert (found == 0).any()
    assert (found > 0).any()


def test_a_new_mask_is_alive() -> None:
    """With a mixer of negative numbers no parameter would ever move."""
    for seed in range(50):
        torch.manual_seed(seed)
        mask = LearnedMask(2, 5).double().eval()
        mask(states(2)).sum().backward()
        assert mask.mixer.weight.grad is not None
        assert mask.mixer.weight.grad.any()


def test_masks_stay_float32_under_autocast() -> None:
    segments = collate(tiny.pairs(2), pad_token_id=0).tokens.segments
    seen = [h.bfloat16() for h in states(2, len(segments.response))]
    masks = TokenMasks("common", 2, 5).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = masks(seen, segments)["token_weights"]
    assert torch.equal(inside, masks(seen, segments)["token_weights"])
    assert inside.dtype == torch.float32


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    mask = LearnedMask(3, 5, dropout=0.5).double()
    assert not torch.equal(mask(states()), mask(states()))
    mask.eval()
    assert torch.equal(mask(states()), mask(states()))


# One mask for both terms, and one for each.
@pytest.mark.parametrize("kind", ["common", "independent"])
def test_gradients_through_the_loss(kind: str) -> None:
    """gradcheck of every mask parameter and of the policy's states through SparsePO."""
    groups = tiny.pairs(2)
    batch = collate(groups, pad_token_id=0)
    n = len(batch.tokens.targets)
    rng = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(n, 4, generator=rng).double() for _ in range(2))
    head = nn.Linear(4, tiny.VOCAB, bias=False).double().requires_grad_(False)
    loss = PreferenceLoss("sparse_po", head, l1_weight=0.01, kl_l1_weight=0.02)
    torch.manual_seed(0)
    masks = TokenMasks(kind, 2, 5).double().eval()  # pyright: ignore[reportArgumentType]
    names, values = zip(*masks.named_parameters(), strict=True)
    seen = states(2, n)

    def of(hidden: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        weights = torch.func.functional_call(masks, given, (seen, batch.tokens.segments))
        assert ("kl_weights" in weights) == (kind == "independent")
        options = {"backend": "torch", "ref_hidden": ref_hidden, **weights}
        return loss(hidden, batch.tokens.targets, batch.tokens.segments, **options).loss

    assert torch.autograd.gradcheck(of, (hidden.requires_grad_(), *values))


def test_independent_masks_weigh_each_their_own() -> None:
    """Log-ratios by one mask, divergences by the other: TDPO1 on sums made by hand."""
    batch = collate(tiny.pairs(3), pad_token_id=0)
    segments, n = batch.tokens.segments, len(batch.tokens.targets)
    rng = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(n, 4, generator=rng).double() for _ in range(2))
    head = nn.Linear(4, tiny.VOCAB, bias=False).double()
    a, d = (torch.rand(n, generator=rng).double() for _ in range(2))
    loss = PreferenceLoss("sparse_po", head, l1_weight=0.1, kl_l1_weight=0.2)
    options = {"ref_hidden": ref_hidden, "ref_weight": head.weight}
    found = loss(hidden, batch.tokens.targets, segments, token_weights=a, kl_weights=d, **options)
    logp, ref = (F.linear(h, head.weight).log_softmax(-1) for h in (hidden, ref_hidden))
    at = batch.tokens.targets[:, None]
    ratio = a * (logp - ref).gather(1, at)[:, 0]
    kl = d * (ref.exp() * (ref - logp)).sum(-1)

    def side(values: Tensor, k: int) -> Tensor:
        sums = torch.zeros(6).double().index_add(0, segments.response, values)
        return sums[segments.grid[:, k]]

    z = 0.1 * (side(ratio + kl, 0) - side(ratio + kl, 1))
    price = 0.1 * a.sum() + 0.2 * d.sum()
    plain = (F.softplus(-z).sum() + price) / 3
    assert_three_way(found.loss, plain, plain, "loss")


def test_activation_mask_is_rescaled_in_each_response() -> None:
    batch = collate(tiny.pairs(3), pad_token_id=0)
    segments, seen = batch.tokens.segments, states(2, len(batch.tokens.targets))
    found = activation_mask(seen, segments)
    plain = torch.zeros_like(found)
    for r in range(6):
        here = segments.response == r
        for h in seen:
            x = h[here].mean(-1)
            z = (x - x.mean()) / x.std()  # the paper's z-norm, which rescaling undoes
            plain[here] += (z - z.min()) / (z.max() - z.min()) / 2
    assert_three_way(found, plain, plain, "mask")
    single = [h[:1] for h in seen]
    alone = collate(tiny.pairs(1), pad_token_id=0).tokens.segments
    one = type(alone)(alone.response[:1], alone.grid, alone.label, 2)
    assert activation_mask(single, one).tolist() == [1.0]


def test_given_weights_multiply() -> None:
    batch = collate(tiny.pairs(2), pad_token_id=0)
    seen, segments = states(2, len(batch.tokens.targets)), batch.tokens.segments
    weights = torch.arange(len(batch.tokens.targets)).double()
    masks = TokenMasks("independent", 2, 5).double().eval()
    plain, weighted = masks(seen, segments), masks(seen, segments, weights)
    for name in ("token_weights", "kl_weights"):
        assert torch.equal(weighted[name], plain[name] * weights)


# Under peft the layers lie deeper; padded rows index them otherwise.
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("share_prompt", [False, True])
def test_states_of_every_layer_at_the_label_tokens(wrapped: bool, share_prompt: bool) -> None:
    batch, padded = (
        collate(tiny.pairs(2), share_prompt=shared, pad_token_id=0)
        for shared in (share_prompt, False)
    )

    def model_of(dtype: torch.dtype) -> nn.Module:
        model = tiny.model(num_hidden_layers=3).to(dtype)
        return attach(add_lora(model, {"r": 2}) if wrapped else model)

    @torch.no_grad()
    def plain(dtype: torch.dtype) -> list[Tensor]:
        inputs = {k: getattr(padded, k) for k in ("input_ids", "attention_mask", "position_ids")}
        every = model_of(dtype)(**inputs, output_hidden_states=True).hidden_states
        return [state.flatten(0, 1)[padded.head_positions] for state in every]

    model = model_of(torch.float32)
    with layer_states(model, batch.head_positions) as seen:
        target_hidden(model, batch)
    assert len(seen) == 3
    theirs, truth = plain(torch.float32), plain(torch.float64)
    for i in range(2):  # the third one transformers shows behind the final norm alone
        assert_three_way(seen[i], theirs[i + 1], truth[i + 1], f"layer {i}")
    target_hidden(model, batch)
    assert len(seen) == 3  # nothing is collected outside


# Every family names its layers itself.
@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_layers_are_found(name: str) -> None:
    assert len(layers_of(families.family(name))) == families.LAYERS


def test_a_model_without_a_list_of_layers_is_named() -> None:
    model = tiny.model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="LlamaModel has no list of its 5 layers"):
        layers_of(model)
