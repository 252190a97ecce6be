"""Keep layer inputs in host memory, which gradient checkpointing would keep on the device.

With every layer checkpointed, a forward keeps one [B, T, D] tensor a layer, L T D itemsize bytes in
all: 16 GiB for an 8B Llama at 64K tokens, 80 GiB for a 70B one. Under `LayerInputOffload` they lie
in pinned host memory and three of them are on the device: one in use, two on their way.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Inputs on their way to the host at once; two let one copy run while the next layer starts.
_IN_FLIGHT = 2


@dataclass(eq=False)
class _Saved:
    """Hold a tensor in host memory, and its copy on the device when backward is about to use it."""

    offload: LayerInputOffload
    host: Tensor  # uint8, at least as long as the tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    before: weakref.ref[_Saved] | None  # saved just earlier, so wanted next in backward
    fetched: tuple[Tensor, Any] | None = None

    def view(self) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return self.host[:size].view(self.dtype).view(self.shape)

    def __del__(self) -> None:
        self.offload.release()


class LayerInputOffload(saved_tensors_hooks):
    """Surround a forward of checkpointed layers: their inputs wait in host memory.

    Gradients keep every bit, because values are only copied. What the layers save inside a
    checkpoint never comes here: its own hooks are the inner ones, and only the innermost apply.
    Outside, every floating [B, T, ...] tensor is moved, so those of the final norm too.

    transformers' `offload=True` (torch's `save_on_cpu`) waits for no copy's memory and rounds each
    buffer up to a power of two, 128 GiB of pinned memory for 80 GiB of inputs; TRL's
    `OffloadActivations` allocates anew in every step through the same allocator. Here buffers have
    the size of what they hold, are registered with the driver once, and are used again.

    Attributes:
        buffers: the host memory, one piece a saved tensor.

    Examples:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = torch.nn.Linear(4, 4), torch.ones(1, 3, 4, requires_grad=True)
        >>> with (offload := LayerInputOffload()):
        ...     y = checkpoint(layer, x, use_reentrant=False)
        >>> y.sum().backward()
        >>> offload.host_bytes
        48
    """

    def __init__(self) -> None:
        super().__init__(self._save, self._load)
        self.buffers: list[Tensor] = []
        self._next = self._alive = 0
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._last: weakref.ref[_Saved] | None = None
        self._stream: Any = None

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory in use: the most that a step has needed so far."""
        return sum(map(len, self.buffers))

    def __enter__(self) -> LayerInputOffload:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._last = None
        super().__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        while self._leaving:  # the last layers' inputs: backward starts with them anyway
            self._let_go()

    def _let_go(self) -> None:
        """Let the computing stream wait for the oldest copy, so that its memory may be used again.

        `Tensor.record_stream` would not do: the host runs many layers ahead of the device, and
        until the device gets there every one of those layers' inputs counts as in use.
        """
        tensor, copied = self._leaving.popleft()
        torch.get_device_module(tensor.device).current_stream().wait_event(copied)

    def _save(self, tensor: Tensor) -> Tensor | _Saved:
        # Parameters stay, and so do sharded tensors, which have no plain bytes to copy.
        if type(tensor) is not Tensor or tensor.dim() < 3 or not tensor.is_floating_point():
            return tensor.detach()
        module = torch.get_device_module(tensor.device)
        if self._stream is None:
            self._stream = module.Stream()
        size = tensor.numel() * tensor.element_size()
        host = self._buffer(size, tensor.device)
        saved = _Saved(self, host, tensor.shape, tensor.dtype, tensor.device, self._last)
        self._last = weakref.ref(saved)
        self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream), torch.no_grad():
            saved.view().copy_(tensor, non_blocking=True)
            copied = self._stream.record_event()
        self._leaving.append((tensor.detach(), copied))
        if len(self._leaving) > _IN_FLIGHT:
            self._let_go()
        return saved

    def _load(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        assert saved.fetched is not None
        tensor, copied = saved.fetched
        saved.fetched = None
        torch.get_device_module(saved.device).current_stream().wait_event(copied)
        if saved.before is not None and (before := saved.before()) is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, saved: _Saved) -> None:
        """Start the copy to the device, unless it has been started already."""
        if saved.fetched is not None:
            return
        module = torch.get_device_module(saved.device)
        tensor = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        # The allocator hands out memory whose last use on the computing stream may lie ahead.
        self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream):
            tensor.copy_(saved.view(), non_blocking=True)
            saved.fetched = tensor, self._stream.record_event()

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        """Return the next buffer; the n-th save of every forward belongs to the same layer."""
        if not self._alive:
            self._next = 0
        turn, self._next, self._alive = self._next, self._next + 1, self._alive + 1
        if turn < len(self.buffers) and len(self.buffers[turn]) >= size:
            return self.buffers[turn]
        # A copy of a graph that was dropped without a backward may still be on its way.
        torch.get_device_module(device).synchronize()
        self.buffers[turn : turn + 1] = [torch.empty(0)]  # first free, then allocate
        self.buffers[turn] = _host_memory(size, pinned=device.type == "cuda")
        return self.buffers[turn]

    def release(self) -> None:
        """Note that one saved tensor fewer is alive."""
        self._alive -= 1


def _host_memory(size: int, pinned: bool) -> Tensor:
    """Allocate [size] uint8 in pages of its own: the driver registers whole pages, none twice.

    Raises:
        RuntimeError: the driver cannot pin so much.
    """
    host = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    if pinned:
        runtime: Any = torch.cuda.cudart()
        address = host.data_ptr()
        failed = int(runtime.cudaHostRegister(address, size, 0))
        if failed:
            raise RuntimeError(
                f"the driver cannot pin another {size / 2**20:.0f} MiB of host memory for layer "
                f"inputs (error {failed}): shorten max_length or free host memory"
            )
        weakref.finalize(host, runtime.cudaHostUnregister, address).atexit = False
    return host
