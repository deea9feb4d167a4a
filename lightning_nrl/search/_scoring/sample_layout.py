"""Layout of samples in tensors: index and repeat samples in any dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class SampleLayout:
    """Sample dimension of a tensor; `m` is above 1 where the model folds, for example, frames into the batch."""

    dim: int
    m: int = 1  # consecutive entries per sample

    def take(self, x: Tensor, samples: Tensor | slice) -> Tensor:
        """Selects samples; returns a view for a slice."""
        x = x.unflatten(self.dim, (-1, self.m))
        if isinstance(samples, slice):
            start, stop, _ = samples.indices(x.shape[self.dim])
            x = x.narrow(self.dim, start, stop - start)
        else:
            x = x.index_select(self.dim, samples.to(x.device))
        return x.flatten(self.dim, self.dim + 1)

    def expand(self, x: Tensor, n: int) -> Tensor:
        """Repeats all samples `n` times; a view for one sample with `m` of 1."""
        x = x.unsqueeze(self.dim)
        return x.expand(*x.shape[: self.dim], n, *x.shape[self.dim + 1 :]).flatten(self.dim, self.dim + 1)

    def matches(self, shape: Sequence[int], other: Sequence[int], n: int) -> bool:
        expected = list(other)
        if self.dim < len(expected):
            expected[self.dim] = n * self.m
        return list(shape) == expected


def infer_layout(small: Sequence[int], large: Sequence[int], n_small: int, n_large: int) -> SampleLayout | None:
    """Infers a layout from the shapes for two numbers of samples; None if the shapes are equal.

    Raises:
        ValueError: no layout explains the shapes.
    """
    if len(small) != len(large):
        raise ValueError(f"{list(small)} became {list(large)}")
    differing = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not differing:
        return None
    dim = differing[0]
    m, rest = divmod(small[dim], n_small)
    if len(differing) > 1 or rest or m == 0 or large[dim] != m * n_large:
        raise ValueError(f"{list(small)} for {n_small} samples became {list(large)} for {n_large}")
    return SampleLayout(dim, m)


def index_batch(tree: Any, index: Tensor, n: int) -> Any:
    """Selects samples from the tensors of a batch whose first dimension is `n`; leaves the rest unchanged."""

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, index.to(x.device)) if x.ndim and len(x) == n else x

    return pytree.tree_map_only(Tensor, take, tree)


def index_all(tree: Any, samples: Tensor | slice) -> Any:
    """Selects samples from every tensor; returns views for a slice."""
    return pytree.tree_map_only(Tensor, lambda x: SampleLayout(0).take(x, samples), tree)


def repeat_all(tree: Any, copies: int) -> Any:
    """Repeats the samples of every tensor, copy by copy."""
    return pytree.tree_map_only(Tensor, lambda x: x.repeat(copies, *[1] * (x.ndim - 1)), tree)


def to_device(tree: Any, device: torch.device) -> Any:
    """Moves every tensor of a tree to a device."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)
