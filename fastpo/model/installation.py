"""Check what this installation can do: each backend against float64, and the cost of a head.

The backends of the head need no transformers, so that it is imported by the functions that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.head.functional import linear_logps
from fastpo.head.head import Head
from fastpo.head.schedule import Workload
from fastpo.head.select import choose_backend, most_kept_tokens, plan_head, workspace_in_mib
from fastpo.head.spec import BackendName, HeadOptions, Workspace
from fastpo.model.device import native_bf16

WIDTH = 32  # of the heads that attention is tried on


class Verdict(NamedTuple):
    """Say how one backend fared; `refusal` is why it does not run here, or None."""

    backend: str
    refusal: str | None
    error: float = 0.0  # relative, largest of log-probs and gradients
    bound: float = 0.0  # what rounding explains

    @property
    def sound(self) -> bool:
        """Return whether nothing is wrong with it; one that does not run is not wrong."""
        return self.refusal is not None or self.error <= self.bound

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"not here: {self.refusal}"
        verdict = "works" if self.sound else "WRONG"
        return f"{verdict}: relative error {self.error:.1e}, rounding explains {self.bound:.1e}"


def _step(
    hidden: Tensor, weight: Tensor, labels: Tensor, backend: BackendName | None
) -> tuple[Tensor, Tensor]:
    """Return log-probs and their gradient to the hidden states; None is plain PyTorch."""
    h = hidden.detach().requires_grad_()
    if backend is None:
        logps = (h @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    else:
        logps = linear_logps(h, weight, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), h)
    return logps.detach(), grad


def check_backend(backend: BackendName, device: torch.device) -> tuple[float, float]:
    """Return (error, bound) of a backend's log-probs and gradients against float64.

    The bound is twice the error of plain PyTorch in the same dtype plus one rounding.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 48, generator=generator)
    weight = torch.randn(96, 48, generator=generator) / 3
    labels = torch.randint(0, 96, (24,), generator=generator)
    truth = _step(hidden.double(), weight.double(), labels, None)
    inputs = (hidden.to(device), weight.to(device), labels.to(device))
    ours, plain = _step(*inputs, backend), _step(*inputs, None)
    return _worst(ours, plain, truth, torch.finfo(hidden.dtype).eps)


def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return (error, bound) of one attention backend, forward and backward, against float64.

    Two groups and five responses, in a layer of two key heads for four query heads; the bound is
    twice the error of separate calls in the same dtype plus one rounding.
    """
    from fastpo.batch import GroupSpan, Layout
    from fastpo.model.attention.dispatch import BACKENDS
    from fastpo.model.attention.shared_row import AttentionOptions, SharedRow

    layout = Layout(
        (
            GroupSpan((0, 40), ((40, 60), (60, 95), (95, 100))),
            GroupSpan((100, 130), ((130, 133), (133, 150))),
        ),
        150,
    )
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, 150, WIDTH, generator=generator).to(dtype) for h in (4, 2, 2)]

    def run(name: str, place: torch.device, precision: torch.dtype) -> list[Tensor]:
        leaves = [t.to(place, precision).requires_grad_() for t in inputs]
        out = BACKENDS[name](SharedRow(layout), *leaves, AttentionOptions())  # pyright: ignore
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return [t.detach().double().cpu() for t in (out, *grads)]

    truth = run("segments", torch.device("cpu"), torch.float64)
    ours, plain = run(backend, device, dtype), run("segments", device, dtype)
    return _worst(ours, plain, truth, torch.finfo(dtype).eps)


def _worst(
    ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], eps: float
) -> tuple[float, float]:
    """Return the largest error and bound of several results, each in units of its own scale."""
    error = bound = 0.0
    for value, same, exact in zip(ours, plain, truth, strict=True):
        scale = exact.abs().max().item()
        error = max(error, (value.double().cpu() - exact).abs().max().item() / scale)
        rounding = (same.double().cpu() - exact).abs().max().item()
        bound = max(bound, 2 * (rounding / scale + eps))
    return error, bound


def head_verdicts(device: torch.device) -> Iterator[Verdict]:
    """Yield how each backend of the head fares on a device."""
    backends: tuple[BackendName, ...] = ("torch", "triton")
    for backend in backends:
        try:
            choose_backend(backend, device)
        except ValueError as refusal:
            yield Verdict(backend, str(refusal))
            continue
        yield Verdict(backend, None, *check_backend(backend, device))


def attention_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which attention is tried on a device."""
    return torch.bfloat16 if device.type == "cuda" and native_bf16(device) else torch.float32


def attention_verdicts(device: torch.device) -> Iterator[Verdict]:
    """Yield how each attention backend of shared prompts fares on a device."""
    from fastpo.model.attention.dispatch import BACKENDS, choose_attention

    dtype = attention_dtype(device)
    for backend in BACKENDS:
        try:
            choose_attention(backend, device=device, dtype=dtype, width=WIDTH)
        except ValueError as refusal:
            yield Verdict(backend, str(refusal))
            continue
        yield Verdict(backend, None, *check_attention(backend, device, dtype))


def chosen_attention(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield (case, what `auto` chooses and why) with and without a soft-cap."""
    from fastpo.model.attention.dispatch import choose_attention

    dtype = attention_dtype(device)
    for case, capped in (("auto", False), ("auto, capped", True)):
        chosen = choose_attention("auto", device=device, dtype=dtype, width=WIDTH, softcap=capped)
        yield case, ": ".join(chosen)


# What the head is asked for: to score, to train with it frozen or trained, and beside a reference.
_CASES = {
    "scoring": Workload(0, 0, needs_hidden=False),
    "frozen": Workload(0, 0),
    "trained": Workload(0, 0, needs_head=True),
    "frozen + KL": Workload(
        0, 0, want=("logps", "kl_ref_policy"), num_grad_stats=2, with_reference=True
    ),
}


def head_costs(
    head: Head, device: torch.device, tokens: int, workspace_mib: Workspace
) -> Iterator[tuple[str, str]]:
    """Yield (case, matmuls, schedule and reason) of a head on so many target tokens."""
    vocabulary, width = head.weight.shape
    mib = workspace_in_mib(workspace_mib, device)
    dtype = head.weight.dtype if native_bf16(device) else torch.float32
    for name, case in _CASES.items():
        work = case._replace(num_tokens=tokens, vocab_size=vocabulary, width=width, dtype=dtype)
        backend, schedule, _ = plan_head(work, HeadOptions(workspace_mib=mib), device=device)
        matmuls = f"{schedule.matmuls:.3g} x 2NDV"
        yield name, f"{matmuls}, schedule {schedule.name}, {backend}: {schedule.reason}"
    most = most_kept_tokens(vocabulary, width, device=device, dtype=dtype, workspace_mib=mib)
    yield (
        "by groups",
        f"a loss on a trained head costs 3 x 2NDV for groups of up to {most} tokens",
    )
    full = tokens * vocabulary * 4 / 2**20
    yield (
        "logits",
        f"{full:,.0f} MiB in float32 if they were stored; {mib:g} MiB are used",
    )
