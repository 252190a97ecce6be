"""Choose the default device, tell whether it has native bfloat16, and seed draws on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def default_device() -> torch.device:
    """Return the accelerator of this machine, else the CPU."""
    # Unchecked, a build for CUDA names CUDA on machines without a GPU too.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def native_bf16(device: torch.device) -> bool:
    """Return whether this device multiplies bfloat16 itself; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM
    return device.type in ("xpu", "mps")


@contextmanager
def seeded_draws(device: torch.device) -> Iterator[None]:
    """Seed random numbers with 0 on the CPU and on `device`; restore their state afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(0)
        yield
