"""How much memory scoring may take, and how much a piece of work takes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["default_budget", "is_out_of_memory", "measured"]

SHARE = 4
"""One part in so many of the free memory is the default budget."""


def default_budget(device: torch.device) -> int:
    """A share of the memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // SHARE
    if device.type == "mps":
        return torch.mps.recommended_max_memory() // SHARE
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE
    except (AttributeError, OSError, ValueError):
        return 1 << 30


def measured(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the tensors that `work` makes: the most that were held at any one time, and all together."""
    with _Meter() as meter:
        work()
    return meter.peak, meter.total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    kinds = (MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))
    text = str(error)
    return isinstance(error, kinds) or ("out of memory" in text or "can't allocate memory" in text)


class _Meter(TorchDispatchMode):
    """Follows the storages of all tensors that operations return until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.held = 0
        self.peak = 0
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and not any(x is a for a in args):
                self._follow(x)
        return out

    def _follow(self, x: Tensor) -> None:
        try:
            storage = x.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):
            return
        if not key:
            return
        if key not in self.users:
            self.users[key] = 0
            self.held += size
            self.total += size
            self.peak = max(self.peak, self.held)
        self.users[key] += 1
        weakref.finalize(x, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.held -= size
