"""Bytes: what a forward pass keeps for its backward pass, and the most that a step holds at a time."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """What one forward pass keeps for its backward pass, in bytes.

    Counted are the storages that autograd saves, each once, without those that stand in the model anyway: parameters,
    buffers and whatever else its modules hold. The backward pass is run too, and gradients are left behind.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in resident_tensors(model)}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}  # the storage itself too, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        dense = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (t.untyped_storage() for t in dense):
            if storage.data_ptr() not in resident:
                kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    total = sum(size for size, _ in kept.values())
    kept.clear()
    value.backward()
    return total


def resident_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the modules of a model hold, as parameter, buffer or plain attribute."""
    for module in model.modules():
        for value in vars(module).values():
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        dense = [value._indices(), value._values()] if value.is_sparse else [value]
        yield from dense
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind some tensors, every storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Peak:
    """The most memory held within a block, beyond what was held before it.

    On CUDA the allocator counts. On Linux the kernel does, as the highest resident size of the process since a mark, so
    it is right to a few megabytes only. Elsewhere ``bytes`` stays None: not measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None
        self._before: int | None = None

    bytes: int | None

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _mark()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif (most := _resident("VmHWM")) is not None:
            self.bytes = max(0, most - self._before)


def _mark() -> int | None:
    """Give freed pages back, forget the highest resident size so far. -> the size now, or None where that cannot be done."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
