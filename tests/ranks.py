"""Ranks of one run as threads of one process: what a process group does, without starting one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective

Result = TypeVar("Result")


class _Group:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class ThreadRank(Collective):
    group: _Group = field(default_factory=lambda: _Group(1))

    def gather_objects(self, value: Any) -> list[Any]:
        # A copy, since this rank may go on and change its own tensor while others still read.
        return self.group.exchange(self.rank, copy.deepcopy(value))

    def of_first(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack([y.long() if y.dtype == torch.bool else y for y in self.gather(x)]).sum(
            0
        )


def on_ranks(world_size: int, function: Callable[[Collective], Result]) -> list[Result]:
    """What `function(collective)` returns on each of some ranks that run at the same time."""
    group = _Group(world_size)
    ranks = [ThreadRank(rank, world_size, group=group) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(function, ranks))
