"""What changed in one tensor: positions with old and new values, or both tensors; compared and restored bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.errors import ConfigurationError

WHOLE_TENSOR_SHARE = 1 / 3
"""Where more than this share of a tensor changed, all of it is kept."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their size in bytes: values are compared and copied as such, so that each NaN and -0.0 is itself."""


@dataclass(frozen=True, eq=False)
class TensorChange:
    """The change of one tensor of this shape, on the CPU.

    `index` has `n` ascending flat positions, int32, or int64 for a tensor that needs it, and `old` and `new` the values
    there; None: they are the whole tensors. Both hashes are of the whole tensor, see `hash_tensors`.
    """

    shape: tuple[int, ...]
    index: Tensor | None
    old: Tensor
    new: Tensor
    sha256_old: str
    sha256_new: str

    @classmethod
    def between(cls, name: str, old: Tensor, new: Tensor) -> TensorChange | None:
        """The change from one tensor to another; None if they are the same to the bit.

        Raises:
            ConfigurationError: they differ in shape or dtype, or are not plain dense tensors.
        """
        if old is new:
            return None
        for value in (old, new):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                found = f"{value.layout}, {value.dtype} on {value.device.type}"
                raise ConfigurationError(f"`{name}` is no plain tensor ({found}).", "give dense tensors with values.")
        if old.shape != new.shape or old.dtype != new.dtype:
            pair = " and ".join(f"{value.dtype} {list(value.shape)}" for value in (old, new))
            raise ConfigurationError(f"`{name}` is {pair}.", "give two states of the same model.")
        old, new = (value.detach().resolve_conj().cpu().contiguous() for value in (old, new))
        differs = _words(old) != _words(new)
        at = differs.reshape(old.numel(), -1).any(1).nonzero().flatten()
        if not len(at):
            return None
        hashes = hash_tensor(old), hash_tensor(new)
        if len(at) > WHOLE_TENSOR_SHARE * old.numel():
            return cls(tuple(old.shape), None, old.clone(), new.clone(), *hashes)
        index = at.int() if old.numel() < 2**31 else at
        return cls(tuple(old.shape), index, _values(old, at), _values(new, at), *hashes)

    @property
    def n_changed(self) -> int:
        return self.old.numel()

    def applied(self, tensor: Tensor, undo: bool) -> Tensor:
        """A copy of the tensor with the new values in it, or with the old ones; on the tensor's device."""
        values = self.old if undo else self.new
        if self.index is None:
            return values.clone().to(tensor.device)
        found = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        _words(found)[self.index.long()] = _words(values)
        return found.to(tensor.device)


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of one tensor."""
    return hash_tensors({"": tensor})


def _values(tensor: Tensor, index: Tensor) -> Tensor:
    """The values of a contiguous tensor at these places; by their bytes, since not every torch can index float8."""
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())[index].view(tensor.dtype).flatten()


def _words(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor's values as whole numbers, a view: one a value, two in a row a complex one."""
    flat = tensor.reshape(-1)
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    return flat.view(WORDS[flat.element_size()])
