"""Batches, data sources, and `TensorSource`, a split of tensors in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.errors import ConfigurationError, check_whole

Unpacked = tuple[tuple[Any, ...], Mapping[str, Any], Any]
"""`(args, kwargs, target)`: positional and keyword arguments of the model's forward, and the
target.
"""
Adapter = Callable[[Any], Unpacked]
"""Converts a raw batch into `(args, kwargs, target)`."""


@dataclass(frozen=True)
class Batch:
    """`n` samples on the model's device.

    Attributes:
        args: positional arguments of the model's forward.
        kwargs: keyword arguments of the model's forward.
        target: targets; the first dimension of each tensor is `n`.
        position: `n` int64 on the CPU, position of each sample in its split, from 0.
        raw: the batch as returned by the data loader, for predicates.
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
    """Data of one split of `n` samples. It can be iterated repeatedly, in the same order each time.

    Attributes:
        split: name in reports, such as `train` or `repair`.
        passed: True if the search draws passed samples to score (#pos in the paper) from this
            split. Known passed samples of all splits must stay right in any case.
        failed: True if failed samples of this split may be repaired.
        index: `n` int64, position of each sample in the data set, including the samples of other
            ranks.
        positions: int64, positions in the split, from 0, of this rank's samples.
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
        """Yields this rank's samples in batches, in the order of `positions`."""

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yields one batch for each tensor of positions in the split, which must be among this
        rank's `positions`.
        """


class RecordingSource:
    """Source that wraps another source and records values of each sample when it is iterated.

    `note` returns the values of a batch, a tensor with one row per sample; `empty` is such a tensor
    without rows.
    """

    def __init__(self, source: Source, note: Callable[[Batch], Tensor], empty: Tensor) -> None:
        self.source, self.note, self.empty = source, note, empty
        self.split, self.passed, self.failed = source.split, source.passed, source.failed
        self.index, self.positions = source.index, source.positions
        self.noted: list[
            tuple[Tensor, Tensor]
        ] = []  # of each batch in the last pass: positions and values

    def __iter__(self) -> Iterator[Batch]:
        self.noted = []
        for batch in self.source:
            self.noted.append((batch.position, self.note(batch)))
            yield batch

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        return self.source.draw(batches)

    def gathered(self, collective: Collective) -> Tensor:
        """Returns the values of the last pass from all ranks, sorted by position in the split, on
        the CPU.
        """
        positions, noted = (
            zip(*self.noted, strict=True) if self.noted else ((self.index[:0],), (self.empty,))
        )
        values, order = (
            torch.cat(collective.gather(torch.cat(x).cpu())) for x in (noted, positions)
        )
        return values[order.argsort()]


class ModelCall(ABC):
    """Callable that runs a model on a raw batch. A `Batch` holds it as `args = (call, raw)`;
    `run_model` calls it.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, raw: Any) -> Any:
        """Runs the model with gradients on a raw batch, or on a part of a raw batch."""


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs a model on the inputs of a batch."""
    if args and isinstance(args[0], ModelCall):
        return args[0](model, *args[1:])
    return model(*args, **kwargs)


def unpacked(
    batches: Source | Iterable[Any], adapter: Adapter, device: torch.device
) -> Iterator[Unpacked]:
    """Yields `(args, kwargs, target)` for each batch. Raw batches are moved to the device and split
    by the adapter.
    """
    for batch in batches:
        if isinstance(batch, Batch):
            yield batch.args, batch.kwargs, batch.target
        else:
            yield adapter(_move(batch, device))


def _move(x: Any, device: torch.device) -> Any:
    def can_move(part: Any) -> bool:
        return callable(getattr(part, "to", None))

    tree = dict(x) if isinstance(x, Mapping) and not can_move(x) else x
    moved = pytree.tree_map(
        lambda part: part.to(device) if can_move(part) else part, tree, is_leaf=can_move
    )
    return with_plain_tensors(moved)


def with_plain_tensors(tree: Any) -> Any:
    """Replaces tensor subclasses that only add metadata, such as MONAI's `MetaTensor`, by plain
    tensors.
    """

    def plain(x: Tensor) -> Tensor:
        values_inside = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
        return x if type(x) is Tensor or values_inside else x.as_subclass(Tensor)

    return pytree.tree_map_only(Tensor, plain, tree)


def is_sliceable(inputs: Any, n: int) -> bool:
    """True if indexing can select samples from the inputs, because the first dimension of each
    tensor
    is `n`.

    Samples of graphs, packed sequences and lists of numbers or texts cannot be selected;
    `Source.draw` reads them anew.
    """

    def is_whole(x: Any) -> bool:
        if isinstance(x, (list, tuple)) and len(x) == n:
            return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x))
        return isinstance(x, PackedSequence)

    leaves = pytree.tree_leaves(inputs, is_leaf=is_whole)
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.ndim]
    known = all(
        isinstance(x, (bool, int, float, str, Tensor, ModelCall, type(None))) for x in leaves
    )
    return known and bool(tensors) and all(not x.is_nested and len(x) == n for x in tensors)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested sequences and mappings. Mappings are read in the order of their
    sorted keys.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for name in sorted(tree, key=str):
            yield from tensors_in(tree[name])
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for item in tree:
            yield from tensors_in(item)


Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Split of `n` samples in memory (a `lightning_nrl.data.Source`).

    Attributes:
        inputs: model inputs, first dimension `n`: a tensor, a tuple of positional or a mapping of
            keyword arguments.
        targets: targets, first dimension `n`; for `Multiclass`, `n` whole numbers.
        split: name in reports.
        passed: True if the search draws passed samples to score (`n_passed` of them) from this
            split. Known passed samples of all splits must stay right in any case.
        failed: True if failed samples of this split may be repaired.
        extras: further tensors, first dimension `n`. A predicate of `Target.where` gets batches of
            `(inputs, targets, *extras)`.
        batch_size: samples per batch.
        device: the model's device, to which batches are moved; None: batches stay on the device of
            the tensors.

    Example:
        >>> x, y = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> [len(batch) for batch in TensorSource(x, y, split="train", passed=True, batch_size=2)]
        [2, 1]
    """

    inputs: Inputs
    targets: Tensor
    split: str
    passed: bool = False
    failed: bool = False
    extras: tuple[Tensor, ...] = ()
    batch_size: int = 256
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inputs, (Mapping, tuple)):
            items = (
                self.inputs.items() if isinstance(self.inputs, Mapping) else enumerate(self.inputs)
            )
            named = {f"inputs[{name!r}]": x for name, x in items}
        else:
            named = {"inputs": self.inputs}
        named |= {f"extras[{i}]": x for i, x in enumerate(self.extras)}
        _check_samples({"targets": self.targets, **named})
        check_whole("batch_size", self.batch_size, 1)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def index(self) -> Tensor:
        """The positions 0 to `n` - 1, int64. They are the sample ids in reports."""
        return torch.arange(len(self))

    @property
    def positions(self) -> Tensor:
        """All positions: every rank has all samples."""
        return self.index

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            # A slice does not copy the tensors.
            part = slice(start, min(start + self.batch_size, len(self)))
            yield self._batch(self.index[part], part)

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for position in batches:
            yield self._batch(position, position.to(self.targets.device))

    def _batch(self, position: Tensor, where: slice | Tensor) -> Batch:
        def take(x: Tensor) -> Tensor:
            return x[where].to(self.device)

        inputs: Any = _map(take, self.inputs)
        target, extras = take(self.targets), [take(extra) for extra in self.extras]
        kwargs = inputs if isinstance(inputs, dict) else {}
        args = (
            () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
        )
        return Batch(args, target, position, kwargs, raw=(inputs, target, *extras))


def _map(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: function(x) for name, x in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def _check_samples(named: Mapping[str, Any]) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.ndim == 0:
            found = "tensor without dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigurationError(
                f"`{name}` is a {found}, not a tensor of samples.",
                "give tensors whose first dimension counts samples; `torch.as_tensor` converts arrays and lists.",
            )
        if len(x) != len(named["targets"]):
            raise ConfigurationError(
                f"`{name}` has {len(x)} samples, `targets` has {len(named['targets'])}.",
                "the first dimension of each must count the same samples.",
            )
