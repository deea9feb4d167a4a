"""`SampleLayout`: where samples lie in a tensor, and how to select and repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any  # tensors and other values in nested lists, tuples and dicts


@dataclass(frozen=True)
class SampleLayout:
    """Position of the samples in a tensor.

    Sample i has the entries i * m to i * m + m - 1 of dimension `dim`. `m` is above 1 if the model
    folds, for example, the frames of a video into the batch dimension.
    """

    dim: int
    m: int = 1

    def take(self, x: Tensor, samples: Tensor | slice) -> Tensor:
        """Selects samples. The result for a slice is a view."""
        x = x.unflatten(self.dim, (-1, self.m))
        if isinstance(samples, slice):
            start, stop, _ = samples.indices(x.shape[self.dim])
            x = x.narrow(self.dim, start, stop - start)
        else:
            x = x.index_select(self.dim, samples.to(x.device))
        return x.flatten(self.dim, self.dim + 1)

    def expand(self, x: Tensor, n: int) -> Tensor:
        """Repeats all samples `n` times in the order 0, 1, ..., 0, 1, ...

        With `m = 1` one sample gives a view.
        """
        before, after = x.shape[: self.dim], x.shape[self.dim :]
        return x.unsqueeze(self.dim).expand(*before, n, *after).flatten(self.dim, self.dim + 1)

    def matches(self, shape: Sequence[int], shape_of_one: Sequence[int], n: int) -> bool:
        """True if a tensor of this shape has `n` samples of the shape `shape_of_one`."""
        expected = list(shape_of_one)
        if self.dim < len(expected):
            expected[self.dim] = n * self.m
        return list(shape) == expected


def infer_layout(
    small: Sequence[int], large: Sequence[int], n_small: int, n_large: int
) -> SampleLayout | None:
    """Infers the layout of a tensor from its shapes for `n_small` and for `n_large` samples.

    Returns None if the shapes are equal. Raises a `ValueError` if no layout explains the shapes.
    """
    if len(small) != len(large):
        raise ValueError(f"the shape {list(small)} became {list(large)} for more samples")
    dims = [dim for dim in range(len(small)) if small[dim] != large[dim]]
    if not dims:
        return None
    dim = dims[0]
    m, remainder = divmod(small[dim], n_small)
    if len(dims) > 1 or remainder or m == 0 or large[dim] != m * n_large:
        raise ValueError(
            f"the shape {list(small)} for {n_small} samples became {list(large)} for {n_large}"
        )
    return SampleLayout(dim, m)


def index_batch(batch: Tree, index: Tensor, n: int) -> Tree:
    """Selects samples from those tensors of a batch that have `n` rows."""

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, index.to(x.device)) if x.ndim and len(x) == n else x

    return pytree.tree_map_only(Tensor, take, batch)


def index_all(tree: Tree, samples: Tensor | slice) -> Tree:
    """Selects rows (samples) from every tensor. The results for a slice are views."""
    return pytree.tree_map_only(Tensor, lambda x: SampleLayout(0).take(x, samples), tree)


def repeat_all(tree: Tree, copies: int) -> Tree:
    """Repeats the rows of every tensor, copy by copy."""
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x] * copies), tree)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Moves every tensor to a device."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)
