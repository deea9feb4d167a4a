"""Sums and tables over ranks. One process needs none of it and pays nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Collective"]


@dataclass(frozen=True)
class Collective:
    """The ranks that work on one repair.

    Attributes:
        rank: this process.
        world_size: how many there are. 1 makes every method the identity.
        device: where tensors have to lie to be exchanged.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def current(cls, device: torch.device) -> Collective:
        """The default process group if there is one, else a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same on each."""
        if self.world_size == 1:
            return x
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; first dimensions may differ, also be 0."""
        if self.world_size == 1:
            return [x]
        x = x.to(self.device)
        length = torch.tensor([len(x)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        rows = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(rows, padded)
        return [row[: int(n)].cpu() for row, n in zip(rows, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor([float(flag)])).item())
