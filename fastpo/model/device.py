"""The device that work goes to by default, and whether bfloat16 is worth using there."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The accelerator of this machine, else the CPU."""
    # Unchecked, a build for CUDA names CUDA on machines without a GPU too.
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def native_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 itself; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM
    return device.type in ("xpu", "mps")
