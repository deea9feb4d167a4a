"""How exactly to compute, on devices and in dtypes that differ in what they can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_least_float32", "no_autocast", "widest"]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums and ranks: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Operations in the dtypes of their arguments, also where the model itself is deployed in mixed precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
