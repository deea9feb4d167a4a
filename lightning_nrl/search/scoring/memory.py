"""Finds the free memory of a device, runs work in blocks that fit into it, and measures
allocations.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


def default_budget(device: torch.device) -> int:
    """Returns a quarter of the free memory of a device, in bytes."""
    return free_memory(device) // 4


def free_memory(device: torch.device) -> int:
    """Returns the free memory of a device in bytes. A container's limit bounds the free main
    memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        available = 1024 * int(
            Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        )
    except (OSError, IndexError, ValueError):
        available = _installed_memory() // 2
    return min([available, *_container_limit()])


def _installed_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def _container_limit() -> list[int]:
    """Returns the bytes left below a container's limit (control groups, version 2), or [] without a
    limit.
    """
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            int((folder / name).read_text()) for name in ("memory.max", "memory.current")
        )
        files = (folder / "memory.stat").read_text().split("\ninactive_file ")[1].split()[0]
    except (OSError, IndexError, ValueError):
        return []
    return [max(0, limit - used + int(files))]


def measure_allocations(work: Callable[[], Any]) -> tuple[int, int]:
    """Returns the peak and the total number of bytes of the tensors that `work` creates."""
    meter = AllocationMeter()
    with meter:
        work()
    return meter.peak, meter.total


class AllocationMeter(TorchDispatchMode):
    """Measures the bytes of all tensors that are created in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, int] = {}  # bytes of each live storage, by address
        self.peak = self.total = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key, size = storage.data_ptr(), storage.nbytes()
            if key and key not in given and key not in self.held:
                self.held[key] = size
                weakref.finalize(storage, self.held.pop, key)
                self.total += size
                self.peak = max(self.peak, sum(self.held.values()))
        return out


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for x in pytree.tree_leaves(values):
        if isinstance(x, Tensor):
            with suppress(RuntimeError, NotImplementedError):  # tensors without storage
                yield x.untyped_storage()
