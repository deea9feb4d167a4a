"""What a model did on data: one row a sample, the same table on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["SampleResults"]

NO_COLUMN = torch.empty(0)
"""Stands for a column that is not given."""


@dataclass(frozen=True)
class SampleResults:
    """One row a sample, split by split, within a split in the order of the data set. On the CPU.

    Attributes:
        splits: names of the splits, `S` of them.
        sizes: samples in each split.
        index: `N` int64, each sample's position in its data set: the id that reports give.
        label: `N` int64, the true class, -1 where the task has none.
        prediction: `N` int64, the predicted class, -1 where the task has none.
        loss: `N` float, each sample's loss.
        passed: `N` bool.
        targeted: `N` bool, failed samples that the target selects; on known data I_neg.
        in_target: `N` bool, samples of the kind that is to be repaired, right or wrong (`Target.covers`); the targeted
            ones by default.
        margin: `N` float, how far each sample is from being wrong, NaN where the task has no such number.
        weight: `N` float64, what each sample counts: of a targeted one its repair, 1 on average; of a passed one its
            breaking, a whole number from 1, infinite where it may not break at all. 1 for all others, and by default.
        names: names of the slices, `G` of them.
        group: `N` int64, the number of each sample's slice, -1 where it is in none, and by default.
    """

    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Tensor
    label: Tensor
    prediction: Tensor
    loss: Tensor
    passed: Tensor
    targeted: Tensor
    margin: Tensor
    weight: Tensor = NO_COLUMN
    names: tuple[str, ...] = ()
    group: Tensor = NO_COLUMN
    in_target: Tensor = NO_COLUMN

    def __post_init__(self) -> None:
        if self.weight is NO_COLUMN:
            # One number, shown so many times.
            object.__setattr__(self, "weight", torch.ones(1, dtype=torch.float64).expand(len(self.passed)))
        if self.group is NO_COLUMN:
            object.__setattr__(self, "group", torch.full((1,), -1).expand(len(self.passed)))
        if self.in_target is NO_COLUMN:
            object.__setattr__(self, "in_target", self.targeted)

    def __len__(self) -> int:
        return len(self.passed)

    def sharing(self, other: SampleResults) -> SampleResults:
        """The same, with samples and true classes held once for both where they are equal."""
        names = [name for name in ("index", "label") if torch.equal(getattr(self, name), getattr(other, name))]
        return replace(self, **{name: getattr(other, name) for name in names})

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Rows of the samples at these positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        """The first row of a split."""
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """The rows of a split."""
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    @property
    def right(self) -> Tensor:
        """`N` bool, samples that passed with a finite loss; all others count as wrong."""
        return self.passed & self.loss.isfinite()

    @property
    def weighted(self) -> bool:
        """Whether not all samples count alike."""
        return bool((self.weight != 1).any())

    @property
    def protected(self) -> Tensor:
        """`N` bool, passed samples that may not break at all."""
        return self.passed & self.weight.isinf()

    @property
    def finite_weight(self) -> Tensor:
        """`N`, the weights, those of protected samples as large as all others of passed samples together and 1 more."""
        infinite = self.weight.isinf()
        return torch.where(infinite, 1 + self.weight[self.passed & ~infinite].sum(), self.weight)

    def gain(self, repaired: Tensor) -> float:
        """What repairs, `N` bool, are worth: how many targets are among them where all count alike."""
        return float(self.weight[repaired & self.targeted].sum())

    def harm(self, broken: Tensor) -> float:
        """What broken samples, `N` bool, cost: how many they are where all count alike."""
        return float(self.weight[broken].sum())

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Data-set positions of the marked rows, by split."""
        return {split: self.index[self.of(split)][mask[self.of(split)]].tolist() for split in self.splits}

    def non_finite(self) -> dict[str, list[int]]:
        """Data-set positions of the samples whose loss is NaN or infinite, by split, without splits that have none."""
        return {split: ids for split, ids in self.ids(~self.loss.isfinite()).items() if ids}
