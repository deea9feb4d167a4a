"""SHA-256 of tensors and files, which says which weights are meant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["hash_file", "hash_tensors"]

PART_BYTES = 2**22


def hash_file(path: Path) -> str:
    """SHA-256 in hexadecimal digits of what is in a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal digits over names, dtypes, shapes and bytes of the tensors of a state dict.

    It is the same on every device, in every order of the names and with any strides; what is no tensor is left out.
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
