"""Where a recording is kept, batch by batch: decided by its bytes alone, so that a run can be repeated."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_nrl._scoring.recorded_tensors import StorageKind

__all__ = ["StorageChoice", "free_disk"]

USED_DISK_SHARE = 0.9
"""Of what is free in the temporary folder."""


def free_disk() -> int:
    """Bytes that a recording may take in the temporary folder."""
    return int(USED_DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free)


@dataclass
class StorageChoice:
    """What is left of each kind of storage.

    All is kept in full precision where that fits; else in half, where that fits; else as much as fits in full. What
    does not fit goes to a file, and is made again where the disk has no space for it either: to read takes less time
    than to run a network up to its last block.
    """

    memory: dict[torch.device, int]  # bytes left, of the model's device first
    disk: int  # bytes left
    can_recompute: bool = False
    half: bool | None = None  # whether batches are kept in half the precision; not known before the first

    def next(
        self, full: int, half: int, n_batches: float, half_is_alike: Callable[[], bool]
    ) -> tuple[StorageKind, torch.device]:
        """Kind and device for the next batch.

        Args:
            full: its bytes.
            half: its bytes in half the precision.
            n_batches: how many of its size there are in all, about.
            half_is_alike: whether in half the precision the same samples of it pass; else it is not kept so.
        """
        if self.half is None:
            capacity = sum(self.memory.values())
            self.half = n_batches * full > capacity >= n_batches * half
        if self.half and half < full:
            device = self._device_with(half)
            if device is not None and half_is_alike():
                self.memory[device] -= half
                return "half", device
        device = self._device_with(full)
        main = list(self.memory)[-1]
        if device is None and full <= self.disk:
            self.disk -= full
            return "mapped", main
        if device is None and self.can_recompute:
            return "recomputed", main
        self.memory[device or main] -= full
        return "memory", device or main

    def _device_with(self, nbytes: int) -> torch.device | None:
        """The first device that has so much left."""
        return next((device for device, left in self.memory.items() if nbytes <= left), None)
