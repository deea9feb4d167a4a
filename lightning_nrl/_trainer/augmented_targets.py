"""Targets changed by a function of the user's own wherever training goes on with them, such as restyled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from lightning_nrl.errors import ConfigurationError

Augment = Callable[[Any], Any]
"""Takes a batch of targets as the data loader gives it, and gives another one."""


class MarkedSamples(Dataset[tuple[Any, bool]]):
    """Samples of a data set, each with whether it is marked; `marked` is `n` bool."""

    def __init__(self, data: Dataset[Any], marked: Tensor) -> None:
        self.data, self.marked = data, marked

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.data[index], bool(self.marked[index])

    def __len__(self) -> int:
        return len(self.marked)


@dataclass(frozen=True)
class AugmentingCollate:
    """Puts marked samples together, changes that batch, and joins it with the batch of the others, which come first."""

    collate: Callable[[list[Any]], Any]
    augment: Augment

    def __call__(self, samples: Sequence[tuple[Any, bool]]) -> Any:
        targets = [sample for sample, is_marked in samples if is_marked]
        others = [sample for sample, is_marked in samples if not is_marked]
        if not targets:
            return self.collate(others)
        given = self.collate(targets)
        try:
            changed = self.augment(given)
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"`augment` raised {type(error).__name__}: {text}.",
                "it is called with a batch of targets as the data loader gives it.",
            ) from error
        return changed if not others else _joined(self.collate(others), changed)


def _joined(one: Any, other: Any) -> Any:
    """Two batches as one: tensors and lists behind each other, all else as in the first."""

    def is_list(x: Any) -> bool:
        return isinstance(x, list) and not any(isinstance(leaf, Tensor) for leaf in x)

    first, spec = pytree.tree_flatten(one, is_leaf=is_list)
    second, other_spec = pytree.tree_flatten(other, is_leaf=is_list)
    if spec != other_spec:
        raise _does_not_fit(f"the batch that it gives has {len(second)} parts, the others have {len(first)}")
    joined: list[Any] = []
    for a, b in zip(first, second, strict=True):
        try:
            joined.append(torch.cat([a, b.to(a)]) if isinstance(a, Tensor) else a + b if isinstance(a, list) else a)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise _does_not_fit(str(error).partition("\n")[0]) from error
    return pytree.tree_unflatten(joined, spec)


def _does_not_fit(problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"`augment`: {problem}.",
        "give a batch of the same form, with tensors of the same sizes but for the number of samples.",
    )
