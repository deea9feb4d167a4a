"""`SampleLayout`: which entries of a tensor belong to a sample, and how to select and repeat
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class SampleLayout:
    """Position of the samples in a tensor: sample i has the entries i * m to i * m + m - 1 of
    dimension `dim`.
    """

    dim: int
    m: int = (
        1  # above 1 if the model folds, for example, the frames of a video into the batch dimension
    )

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
        """Repeats all samples `n` times in the order 0, 1, ..., 0, 1, ... With `m = 1` one sample
        gives a view.
        """
        x = x.unsqueeze(self.dim)
        return x.expand(*x.shape[: self.dim], n, *x.shape[self.dim + 1 :]).flatten(
            self.dim, self.dim + 1
        )

    def matches(self, shape: Sequence[int], other: Sequence[int], n: int) -> bool:
        expected = list(other)
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
    differing = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not differing:
        return None
    dim = differing[0]
    m, rest = divmod(small[dim], n_small)
    if len(differing) > 1 or rest or m == 0 or large[dim] != m * n_large:
        raise ValueError(
            f"the shape {list(small)} for {n_small} samples became {list(large)} for {n_large}"
        )
    return SampleLayout(dim, m)


def index_batch(tree: Any, index: Tensor, n: int) -> Any:
    """Selects samples from those tensors of a batch that have `n` rows. Other values stay as they
    are.
    """

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, index.to(x.device)) if x.ndim and len(x) == n else x

    return pytree.tree_map_only(Tensor, take, tree)


def index_all(tree: Any, samples: Tensor | slice) -> Any:
    """Selects rows (samples) from every tensor in a tree. The results for a slice are views."""
    return pytree.tree_map_only(Tensor, lambda x: SampleLayout(0).take(x, samples), tree)


def repeat_all(tree: Any, copies: int) -> Any:
    """Repeats the rows of every tensor in a tree, copy by copy."""
    return pytree.tree_map_only(Tensor, lambda x: x.repeat(copies, *[1] * (x.ndim - 1)), tree)


def to_device(tree: Any, device: torch.device) -> Any:
    """Moves every tensor in a tree to a device."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)
