"""Layer inputs in host memory: the same bits, exact sizes, buffers used again, streams in order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.data.packing import collate
from fastpo.model import offload as module
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.load import add_lora
from fastpo.model.offload import LayerInputOffload
from tests.model.tiny import LAYERS, PAD, WIDTH, family, group, groups


def gradients(model: Any, batch: dict, around: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with around:
        hidden = target_hidden(model, batch)
    hidden.cumsum(-1).tanh().sum().backward()
    return hidden, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpointed(name: str, lora: bool = False) -> Any:
    model: Any = attach(family(name))
    model.activation_checkpointing_enable()
    return add_lora(model, {"r": 2, "init_lora_weights": False}) if lora else model


# Layers that differ in arguments, trained whole or by adapters, shared rows or padded.
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("share", [True, False], ids=["packed", "padded"])
def test_gradients_keep_every_bit(name: str, lora: bool, share: bool) -> None:
    model = checkpointed(name, lora)
    batch = collate(groups(), share_prompt=share, pad_token_id=PAD)
    arena = LayerInputOffload()
    hidden, ours = gradients(model, batch, arena)
    plain_hidden, plain = gradients(model, batch, nullcontext())
    assert arena.host_bytes
    assert torch.equal(hidden, plain_hidden)
    assert ours.keys() == plain.keys()
    for parameter, gradient in plain.items():
        assert torch.equal(ours[parameter], gradient), parameter


def test_the_host_holds_layer_inputs_and_nothing_twice() -> None:
    """Exact bytes: one [T, D] a layer; the final norm's x, x again, x normed, and two [T, 1]."""
    model = checkpointed("llama")
    batch = collate(groups(), share_prompt=True, pad_token_id=PAD)
    tokens = batch.input_ids.numel()
    arena = LayerInputOffload()
    _, first = gradients(model, batch, arena)
    row = tokens * WIDTH * 4
    assert arena.host_bytes == (LAYERS + 3) * row + 2 * tokens * 4
    held = arena.host_bytes
    _, again = gradients(model, batch, arena)
    assert arena.host_bytes == held
    assert all(torch.equal(first[n], g) for n, g in again.items())
    longer = collate([group(40, [30, 20])], share_prompt=True, pad_token_id=PAD)
    gradients(model, longer, arena)
    assert arena.host_bytes * tokens == held * longer.input_ids.numel()
    gradients(model, batch, arena)
    assert arena.host_bytes * tokens == held * longer.input_ids.numel()


def test_two_forwards_before_a_backward() -> None:
    model = checkpointed("llama")
    batches = [collate([g], share_prompt=True, pad_token_id=PAD) for g in groups()]
    losses = []
    arena = LayerInputOffload()
    for around in (arena, arena, nullcontext(), nullcontext()):
        with around:
            losses.append(target_hidden(model, batches[len(losses) % 2]).cumsum(-1).tanh().sum())
    weights = list(model.model.parameters())
    ours = torch.autograd.grad(losses[0] + losses[1], weights)
    plain = torch.autograd.grad(losses[2] + losses[3], weights)
    assert all(map(torch.equal, ours, plain))


def test_a_graph_may_be_walked_twice() -> None:
    model = checkpointed("llama")
    batch = collate(groups(), share_prompt=True, pad_token_id=PAD)
    with LayerInputOffload():
        loss = target_hidden(model, batch).cumsum(-1).tanh().sum()
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.lm_head.weight]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, first, second))


class Stream:
    """A stream that only writes down what it is told, in one log with the others."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name, self.log, self.count = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for stream", other.name))

    def record_event(self) -> int:
        self.count += 1
        self.log.append((self.name, "records", self.count))
        return self.count

    def wait_event(self, event: int) -> None:
        self.log.append((self.name, "waits for event", event))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy starts after its source is computed; no memory is reused or read before its end.

    The order of the waits is what a GPU depends on; here it is read from a log.
    """
    log: list[tuple] = []

    class Device:
        synchronize = staticmethod(lambda: None)
        compute = Stream("compute", log)

        @staticmethod
        def Stream() -> Stream:
            return Stream("copies", log)

        @classmethod
        def current_stream(cls) -> Stream:
            return cls.compute

        @staticmethod
        def stream(stream: Stream) -> Stream:
            return stream

    monkeypatch.setattr(module.torch, "get_device_module", lambda device: Device)
    x = [torch.randn(1, 2, 3, requires_grad=True).clone() for _ in range(4)]
    arena = LayerInputOffload()
    with arena:
        saved = [arena._save(t) for t in x]
    outward = [("copies", "waits for stream", "compute"), ("copies", "records")]
    assert [entry[: len(o)] for entry, o in zip(log[:2], outward, strict=True)] == outward
    waited = [entry[2] for entry in log if entry[:2] == ("compute", "waits for event")]
    assert waited == [1, 2, 3, 4]  # the memory of every input is let go behind its own copy
    assert log.index(("compute", "waits for event", 1)) == 6  # right after the third copy
    del log[:]
    for i in (3, 2, 1, 0):
        assert torch.equal(arena._load(saved[i]), x[i])
        assert log[-1 if i == 0 else -3] == ("compute", "waits for event", 8 - i)
        if i:  # the next one's copy is under way before this one is computed with
            assert log[-2] == ("copies", "waits for stream", "compute")
            assert log[-1] == ("copies", "records", 9 - i)
