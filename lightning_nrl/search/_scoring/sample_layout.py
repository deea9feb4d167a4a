"""Tensors of many samples: where in a tensor the samples are, how to take some of them and how to repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class SampleLayout:
    """Positions of samples in a tensor; `m` is above 1 where the model folds, say, frames into the batch."""

    dim: int  # the dimension that counts samples
    m: int = 1  # entries a sample, one after the other

    def take(self, x: Tensor, samples: Tensor | slice) -> Tensor:
        """The chosen samples; a view if a slice chooses them."""
        x = x.unflatten(self.dim, (-1, self.m))
        if isinstance(samples, slice):
            start, stop, _ = samples.indices(x.shape[self.dim])
            x = x.narrow(self.dim, start, stop - start)
        else:
            x = x.index_select(self.dim, samples.to(x.device))
        return x.flatten(self.dim, self.dim + 1)

    def expand(self, x: Tensor, n: int) -> Tensor:
        """All samples `n` times, one after the other; one sample is only shown `n` times where `m` is 1."""
        x = x.unsqueeze(self.dim)
        return x.expand(*x.shape[: self.dim], n, *x.shape[self.dim + 1 :]).flatten(self.dim, self.dim + 1)

    def matches(self, shape: Sequence[int], other: Sequence[int], n: int) -> bool:
        expected = list(other)
        if self.dim < len(expected):
            expected[self.dim] = n * self.m
        return list(shape) == expected


def infer_layout(small: Sequence[int], large: Sequence[int], n_small: int, n_large: int) -> SampleLayout | None:
    """Infers sample positions from shapes for two numbers of samples; None if the shape does not depend on them.

    A `ValueError` if it depends on them in a way that no layout describes.
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
    """The chosen samples of every tensor in a batch of `n` whose first dimension counts them; all else as it is."""

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, index.to(x.device)) if x.ndim and len(x) == n else x

    return pytree.tree_map_only(Tensor, take, tree)


def index_all(tree: Any, samples: Tensor | slice) -> Any:
    """The chosen samples of every tensor; views if a slice chooses them."""
    return pytree.tree_map_only(Tensor, lambda x: SampleLayout(0).take(x, samples), tree)


def repeat_all(tree: Any, copies: int) -> Any:
    """Every tensor's samples `copies` times, copy by copy."""
    return pytree.tree_map_only(Tensor, lambda x: x.repeat(copies, *[1] * (x.ndim - 1)), tree)


def to_device(tree: Any, device: torch.device) -> Any:
    """Every tensor of a tree on a device."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)
