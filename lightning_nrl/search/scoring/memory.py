"""Finds the free memory of a device, and measures allocations."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def free_memory(device: torch.device) -> int:
    """Returns the free memory of a device in bytes.

    A container's limit bounds the free main memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        available = 1024 * _number_after("MemAvailable:", Path("/proc/meminfo"))
    except (OSError, IndexError, ValueError):
        available = _installed_memory() // 2
    limit = _container_limit()
    return available if limit is None else min(available, limit)


def _number_after(word: str, file: Path) -> int:
    return int(file.read_text().split(word)[1].split()[0])


def _installed_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def _container_limit() -> int | None:
    """Returns the bytes left below a container's limit (control groups, version 2), if any."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        # Cached files count as used, but are dropped when memory runs short.
        cached = _number_after("\ninactive_file ", folder / "memory.stat")
    except (OSError, IndexError, ValueError):
        return None
    return max(0, limit - used + cached)


def peak_allocation(work: Callable[[], object]) -> int:
    """Returns the peak number of bytes of the tensors that `work` creates."""
    meter = AllocationMeter()
    with meter:
        work()
    return meter.peak


class AllocationMeter(TorchDispatchMode):
    """Measures the bytes of all tensors that are created in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, int] = {}  # bytes of each live storage, by address
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            address, size = storage.data_ptr(), storage.nbytes()
            if address and address not in inputs and address not in self.held:
                self.held[address] = size
                weakref.finalize(storage, self.held.pop, address)
                self.peak = max(self.peak, sum(self.held.values()))
        return result


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    for x in pytree.tree_leaves(values):
        if isinstance(x, Tensor):
            with suppress(RuntimeError, NotImplementedError):  # tensors without storage
                yield x.untyped_storage()
