"""Batches, data sources, and `TensorSource`, a split of tensors in memory."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.state import plain_tensor
from lightning_nrl.errors import ConfigurationError, check_whole

RawBatch = Any
"""Batch as the data loader returns it."""
BatchTarget = Any
"""Targets of a batch: for most tasks a tensor, for several heads a mapping or tuple of tensors."""
ModelOutput = Any
"""Output of a model's forward: a tensor, or an object with tensors inside."""
Args = tuple[Any, ...]
"""Positional arguments of the model's forward."""
Kwargs = Mapping[str, Any]
"""Keyword arguments of the model's forward."""
Unpacked = tuple[Args, Kwargs, BatchTarget]
"""`(args, kwargs, target)`: positional and keyword arguments of the model's forward, and target."""
Adapter = Callable[[RawBatch], Unpacked]
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

    args: Args
    target: BatchTarget
    position: Tensor
    kwargs: Kwargs = field(default_factory=dict)
    raw: RawBatch = None

    def __len__(self) -> int:
        return len(self.position)


@runtime_checkable
class Source(Protocol):
    """Data of one split of `n` samples. It can be iterated repeatedly, each time in the same order.

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
        """Yields a batch for each tensor of positions, all among this rank's `positions`."""


class WrappedSource:
    """Source of the samples of another source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.split = source.split
        self.passed = source.passed
        self.failed = source.failed
        self.index = source.index
        self.positions = source.positions

    def __iter__(self) -> Iterator[Batch]:
        yield from self.source

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        return self.source.draw(batches)


class RecordingSource(WrappedSource):
    """Source that wraps another source and records values of each sample when it is iterated.

    `note` returns the values of a batch, a tensor with one row per sample; `empty` is such a tensor
    without rows.
    """

    def __init__(self, source: Source, note: Callable[[Batch], Tensor], empty: Tensor) -> None:
        super().__init__(source)
        self.note = note
        self.empty = empty
        self.read: list[Tensor] = []  # positions in each batch of the last pass
        self.noted: list[Tensor] = []  # values of each batch of the last pass

    def __iter__(self) -> Iterator[Batch]:
        self.read = []
        self.noted = []
        for batch in self.source:
            self.read.append(batch.position)
            self.noted.append(self.note(batch))
            yield batch

    def gathered(self, collective: Collective) -> Tensor:
        """Returns the values of the last pass from all ranks, in order of position, on the CPU."""
        noted = torch.cat(self.noted or [self.empty]).cpu()
        read = torch.cat(self.read or [self.index[:0]]).cpu()
        order = torch.cat(collective.gather(read)).argsort()
        return torch.cat(collective.gather(noted))[order]


class SourcePart(WrappedSource):
    """Some samples of another source, as a source with positions of its own.

    `chosen` has the positions of the samples in `source`, ascending.
    """

    def __init__(self, source: Source, chosen: Tensor) -> None:
        super().__init__(source)
        self.chosen = chosen
        self.index = source.index[chosen]
        self.positions = torch.isin(chosen, source.positions).nonzero().flatten()

    def __iter__(self) -> Iterator[Batch]:
        if len(self.positions):
            yield from self.draw(self.positions.split(256))

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for batch in self.source.draw([self.chosen[positions] for positions in batches]):
            yield replace(batch, position=torch.searchsorted(self.chosen, batch.position))


class ModelCall(ABC):
    """Callable that runs a model on a raw batch.

    A `Batch` holds it as `args = (call, raw)`; `run_model` calls it.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, raw: RawBatch) -> ModelOutput:
        """Runs the model with gradients on a raw batch, or on a part of a raw batch."""


def run_model(model: nn.Module, args: Args, kwargs: Kwargs) -> ModelOutput:
    """Runs a model on the inputs of a batch; the output has plain tensors.

    What the model writes into a mapping is lost.
    """
    args = tuple(map(_own_copy, args))
    if args and isinstance(args[0], ModelCall):
        return with_plain_tensors(args[0](model, *args[1:]))
    return with_plain_tensors(model(*args, **kwargs))


def _own_copy(part: object) -> object:
    if isinstance(part, Mapping):
        return copy.copy(part)
    if type(part) is list:
        return list(map(_own_copy, part))
    return tuple(map(_own_copy, part)) if type(part) is tuple else part


def unpacked(
    batches: Iterable[RawBatch], adapter: Adapter, device: torch.device
) -> Iterator[Unpacked]:
    """Yields `(args, kwargs, target)` for each `Batch` or raw batch.

    Raw batches are moved to the device and split by the adapter.
    """
    for batch in batches:
        if isinstance(batch, Batch):
            yield batch.args, batch.kwargs, batch.target
        else:
            yield adapter(_move(batch, device))


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: torch.device, /) -> object: ...


def _move(raw: RawBatch, device: torch.device) -> RawBatch:
    if isinstance(raw, Mapping) and not isinstance(raw, _Movable):
        raw = dict(raw)  # pytree does not look into other mappings
    moved = pytree.tree_map_only(
        _Movable,
        lambda part: part.to(device),
        raw,
        is_leaf=lambda part: isinstance(part, _Movable),
    )
    return with_plain_tensors(moved)


def with_plain_tensors(tree: RawBatch) -> RawBatch:
    """Replaces tensor subclasses that only add metadata, such as MONAI's `MetaTensor`."""
    return pytree.tree_map_only(Tensor, plain_tensor, tree)


def is_sliceable(inputs: object, n: int) -> bool:
    """True if indexing selects samples: the first dimension of each tensor in the inputs is `n`.

    Samples of graphs, packed sequences and lists of numbers or texts cannot be selected;
    `Source.draw` reads them anew.
    """

    def is_leaf(part: object) -> bool:
        if isinstance(part, (list, tuple)) and len(part) == n:
            return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part))
        return isinstance(part, PackedSequence)

    has_samples = False
    for leaf in pytree.tree_leaves(inputs, is_leaf=is_leaf):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if leaf.is_nested or len(leaf) != n:
                return False
            has_samples = True
        elif not isinstance(leaf, (int, float, str, Tensor, ModelCall, NoneType)):
            return False
    return has_samples


def tensors_in(tree: object) -> Iterator[Tensor]:
    """Yields the tensors in nested sequences and mappings, which are read by sorted keys."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for name in sorted(tree, key=str):
            yield from tensors_in(tree[name])
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for item in tree:
            yield from tensors_in(item)


Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def _arguments(inputs: Inputs) -> tuple[Args, Kwargs]:
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


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
        samples: dict[str, object] = {"targets": self.targets}
        if isinstance(self.inputs, (Mapping, tuple)):
            args, kwargs = _arguments(self.inputs)
            samples |= {f"inputs[{key!r}]": x for key, x in (*enumerate(args), *kwargs.items())}
        else:
            samples["inputs"] = self.inputs
        samples |= {f"extras[{i}]": x for i, x in enumerate(self.extras)}
        for argument, x in samples.items():
            self._check(argument, x)
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
        yield from self.draw(self.index.split(self.batch_size) if len(self) else ())

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        yield from map(self._batch, batches)

    def _batch(self, position: Tensor) -> Batch:
        rows = position.to(self.targets.device)

        def take(x: Tensor) -> Tensor:
            return x[rows].to(self.device)  # a copy, into which a forward may write

        inputs, target, extras = pytree.tree_map(take, (self.inputs, self.targets, self.extras))
        args, kwargs = _arguments(inputs)
        return Batch(args, target, position, kwargs, (inputs, target, *extras))

    def _check(self, argument: str, x: object) -> None:
        if not isinstance(x, Tensor) or x.ndim == 0:
            kind = "tensor without dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigurationError(
                f"`{argument}` is a {kind}, not a tensor of samples.",
                "give tensors whose first dimension counts samples; `torch.as_tensor` converts "
                "arrays and lists.",
            )
        if len(x) != len(self):
            raise ConfigurationError(
                f"`{argument}` has {len(x)} samples, `targets` has {len(self)}.",
                "the first dimension of each must count the same samples.",
            )
