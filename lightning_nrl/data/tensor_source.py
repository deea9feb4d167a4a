"""Data for a repair without data loaders: a split whose samples are tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import ConfigurationError, check_whole

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A split of `n` samples that are tensors (a `lightning_nrl.data.Source`).

    Attributes:
        inputs: what the model is called with, first dimension `n`: a tensor, a tuple of them for several positional
            arguments, or a mapping for keyword arguments.
        targets: the truth, first dimension `n`; for `Multiclass` `n` whole numbers.
        split: the name that reports use.
        passed: whether `n_passed` passed samples are drawn from it. Passed samples of every known split are kept.
        failed: whether its failed samples are candidates for repair.
        extras: tensors of what else is known of the samples, first dimension `n`. A predicate of `Target.where` gets
            `(inputs, targets, *extras)`, a batch of each.
        batch_size: samples that the model runs on at once.
        device: where batches are moved to, the model's; None leaves them where they are.

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
            items = self.inputs.items() if isinstance(self.inputs, Mapping) else enumerate(self.inputs)
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
        """`n` int64: a sample's position in the tensors is its id in reports."""
        return torch.arange(len(self))

    @property
    def positions(self) -> Tensor:
        """All places: tensors in memory are not shared out."""
        return self.index

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            # A slice copies nothing.
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
        args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
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
