"""One batch of known data, whatever shape the user's data loader gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_nrl.data.model_call import ModelCall

__all__ = ["Adapter", "Batch", "Source", "is_sliceable", "tensors_in", "unpacked"]

Adapter = Callable[[Any], tuple[tuple[Any, ...], Mapping[str, Any], Any]]
"""Turns a raw batch into `(args, kwargs, target)`: what the model is called with, and the truth."""


@dataclass(frozen=True)
class Batch:
    """Samples on the model's device.

    Attributes:
        args: positional arguments of the model's forward.
        kwargs: its keyword arguments.
        target: the truth, first dimension `n`.
        position: `n` int64 on the CPU, each sample's place in the order of its split, from 0.
        raw: the batch as the data loader gave it, extras included, for a target's predicate.
    """

    args: tuple[Any, ...]
    target: Any
    position: Tensor
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    raw: Any = None

    def __len__(self) -> int:
        return len(self.position)


@runtime_checkable
class Source(Protocol):
    """Known or unseen data of one split, readable again and again in the same order.

    Attributes:
        split: the name that reports use, such as `train` or `repair`.
        passed: whether a sample of passed data (#pos) is drawn from it. Passed samples of every known split are kept.
        failed: whether its failed samples are candidates for repair.
        index: `n` int64, each sample's position in its data set, in the order of the split and over all ranks.
        positions: int64, the places in that order that are this rank's share.
    """

    @property
    def split(self) -> str: ...

    @property
    def passed(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    @property
    def index(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    def __iter__(self) -> Iterator[Batch]:
        """This rank's share, in evaluation order."""
        ...

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Chosen samples of this rank's share, one batch for each tensor of places (`Batch.position`)."""
        ...


def unpacked(
    batches: Source | Iterable[Any], adapter: Adapter, device: torch.device
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any], Any]]:
    """Batches as `(args, kwargs, target)`, whether they are those of a source or raw ones.

    Args:
        batches: a source, `Batch` objects, or batches as a data loader gives them.
        adapter: for raw batches; those of a source are unpacked already.
        device: where raw batches are moved to.
    """
    for batch in batches:
        if isinstance(batch, Batch):
            yield batch.args, batch.kwargs, batch.target
        else:
            yield adapter(_moved(batch, device))


def is_sliceable(inputs: Any, n: int) -> bool:
    """Whether some of `n` samples can be taken from a batch's inputs by taking entries of each of their tensors.

    So it is where every tensor counts the samples in its first dimension. Graphs in one object, packed sequences and
    lists of numbers or texts can only be read again, by `Source.draw`.
    """

    def is_whole(x: Any) -> bool:
        if isinstance(x, (list, tuple)) and len(x) == n:
            return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x))
        return isinstance(x, PackedSequence)

    leaves = pytree.tree_leaves(inputs, is_leaf=is_whole)
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.ndim]
    constants = sum(isinstance(x, (bool, int, float, str, Tensor, ModelCall, type(None))) for x in leaves) - len(
        tensors
    )
    return (
        bool(tensors)
        and len(tensors) + constants == len(leaves)
        and all(not x.is_nested and len(x) == n for x in tensors)
    )


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences and mappings, the latter in the order of their keys."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for name in sorted(tree, key=str):
            yield from tensors_in(tree[name])
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for item in tree:
            yield from tensors_in(item)


def _moved(x: Any, device: torch.device) -> Any:
    if callable(getattr(x, "to", None)):
        return x.to(device)
    if isinstance(x, Mapping):
        return {name: _moved(value, device) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        moved = [_moved(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved) if isinstance(x, tuple) else moved
    return x
