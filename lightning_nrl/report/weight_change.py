"""How the weights changed: by how much, and proof of which weights are meant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightChange", "hash_tensors"]


@dataclass(frozen=True)
class WeightChange:
    """The difference between two versions of the same tensors.

    Attributes:
        changed: how many weights differ.
        total: how many weights there are.
        l2: Euclidean norm of the difference.
        relative: `l2` over the norm of the old weights; NaN if those are all 0.
        largest: the largest absolute difference.
    """

    changed: int
    total: int
    l2: float
    relative: float
    largest: float

    @classmethod
    def between(cls, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> WeightChange:
        """Compares tensors of the same names and shapes, in float64, on the CPU."""
        before = torch.cat([tensor.detach().flatten().cpu().double() for tensor in old.values()])
        after = torch.cat([new[name].detach().flatten().cpu().double() for name in old])
        change = after - before
        return cls(
            changed=int((change != 0).sum()),
            total=len(change),
            l2=float(change.norm()),
            relative=float(change.norm() / before.norm()),
            largest=float(change.abs().max()),
        )


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, the same on every device and in every order of the names.

    Args:
        tensors: such as a state dict; what is no tensor in it is left out. Strides do not matter.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not isinstance(tensors[name], Tensor):
            continue
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in _strided(tensor):
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a tensor of any layout consists of."""
    if tensor.layout == torch.strided:
        return (tensor,)
    entries = tensor.to_sparse_coo().coalesce()
    return entries.indices(), entries.values()
