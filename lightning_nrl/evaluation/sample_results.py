"""`SampleResults`, a table with one row per sample, and `Flips` between two such tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.errors import EvaluationError

NO_COLUMN = torch.empty(0)
"""Default of optional columns of `SampleResults`, which `__post_init__` replaces."""
COLUMNS = (
    "index",
    "label",
    "prediction",
    "loss",
    "passed",
    "targeted",
    "margin",
)  # columns without a default


@dataclass(frozen=True)
class SampleResults:
    """Results of a model: one row for each of `N` samples, by split and in data set order. Tensors
    are
    on the CPU.

    Attributes:
        splits: names of the splits.
        sizes: number of samples in each split.
        index: `N` int64, position of the sample in the data set, which is its id in reports.
        label: `N` int64, true class, -1 if the task has no classes.
        prediction: `N` int64, predicted class, -1 if the task has no classes.
        loss: `N` float, the task's loss.
        passed: `N` bool, True if the sample is right.
        targeted: `N` bool, True if the sample failed and the target selects it (on known data:
            I_neg in the paper).
        in_target: `N` bool, True for samples, right or wrong, in the target (`Target.covers`);
            default: `targeted`.
        margin: `N` float, the task's margin, NaN if the task has no margins.
        weight: `N` float64, 1 by default. For a targeted sample, the value of its repair, 1 on
            average. For a passed sample, the cost of breaking it: a whole number from 1, or
            infinity if the sample is protected.
        names: names of the slices.
        group: `N` int64, index of the sample's slice in `names`; -1, the default, if the sample is
            in no slice.
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
            object.__setattr__(
                self, "weight", torch.ones(1, dtype=torch.float64).expand(len(self.passed))
            )
        if self.group is NO_COLUMN:
            object.__setattr__(self, "group", torch.full((1,), -1).expand(len(self.passed)))
        if self.in_target is NO_COLUMN:
            object.__setattr__(self, "in_target", self.targeted)

    def __len__(self) -> int:
        return len(self.passed)

    @classmethod
    def concat(cls, tables: Sequence[SampleResults]) -> SampleResults:
        """Joins tables of different splits. Weights, slices and `in_target` get their defaults."""
        columns: dict[str, Any] = {
            name: torch.cat([getattr(table, name) for table in tables]) for name in COLUMNS
        }
        splits, sizes = (
            sum((getattr(table, name) for table in tables), ()) for name in ("splits", "sizes")
        )
        return cls(splits, sizes, **columns)

    def only(self, splits: Sequence[str]) -> SampleResults:
        """Selects the rows of some splits. Weights, slices and `in_target` get their defaults."""
        rows = [self.of(split) for split in splits]
        columns: dict[str, Any] = {
            name: torch.cat([getattr(self, name)[part] for part in rows]) for name in COLUMNS
        }
        return SampleResults(
            tuple(splits), tuple(part.stop - part.start for part in rows), **columns
        )

    def sharing(self, other: SampleResults) -> SampleResults:
        """Returns a copy that saves memory: it has the `index` and `label` tensors of `other` where
        they are equal.
        """
        names = [
            name
            for name in ("index", "label")
            if torch.equal(getattr(self, name), getattr(other, name))
        ]
        return replace(self, **{name: getattr(other, name) for name in names})

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Returns the rows of the samples at some positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """Returns the rows of a split."""
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    @property
    def right(self) -> Tensor:
        """Mask of the samples that passed and have a finite loss, `N` bool."""
        return self.passed & self.loss.isfinite()

    @property
    def weighted(self) -> bool:
        return bool((self.weight != 1).any())

    @property
    def protected(self) -> Tensor:
        return self.passed & self.weight.isinf()

    @property
    def margin_unit(self) -> float:
        """Median margin of the passed samples, the unit for margins. It is NaN if no sample passed."""
        return float(self.margin[self.passed].median())

    @property
    def finite_weight(self) -> Tensor:
        """Weights, `N`. Infinity is replaced by 1 plus the sum of the finite weights of passed
        samples.
        """
        infinite = self.weight.isinf()
        return torch.where(infinite, 1 + self.weight[self.passed & ~infinite].sum(), self.weight)

    def value(self, repaired: Tensor) -> float:
        """Sums the weights of the targets in the mask `repaired`, `N` bool."""
        return float(self.weight[repaired & self.targeted].sum())

    def cost(self, broken: Tensor) -> float:
        """Sums the weights of the samples in the mask `broken`, `N` bool."""
        return float(self.weight[broken].sum())

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Returns, for each split, the ids of the samples in a mask, `N` bool."""
        return {
            split: self.index[self.of(split)][mask[self.of(split)]].tolist()
            for split in self.splits
        }

    def non_finite(self) -> dict[str, list[int]]:
        """Returns the ids of the samples with a NaN or infinite loss, for each split that has such
        samples.
        """
        return {split: ids for split, ids in self.ids(~self.loss.isfinite()).items() if ids}


def flip_masks(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Converts masks of right samples before and after a change to masks of kept, broken, repaired
    and failing ones.
    """
    return before & after, before & ~after, ~before & after, ~before & ~after


@dataclass(frozen=True)
class FlipCounts:
    """Counts of kept, broken, repaired and failing samples.

    Kept samples are right before and after a change, broken samples are right only before it,
    repaired samples are right only after it, and failing samples are never right.
    """

    kept: int
    broken: int
    repaired: int
    failing: int

    @property
    def n(self) -> int:
        return self.kept + self.broken + self.repaired + self.failing

    @property
    def passed(self) -> int:
        """Number of samples that were right before the change."""
        return self.kept + self.broken

    @property
    def right(self) -> int:
        """Number of samples that are right after the change."""
        return self.kept + self.repaired

    @property
    def accuracy_before(self) -> float:
        return self.passed / self.n if self.n else float("nan")

    @property
    def accuracy_after(self) -> float:
        return self.right / self.n if self.n else float("nan")

    @staticmethod
    def of(before: Tensor, after: Tensor) -> FlipCounts:
        """Counts flips from two masks, `N` bool each, of the samples that are right before and
        after a change.
        """
        return FlipCounts(*(int(mask.sum()) for mask in flip_masks(before, after)))


@dataclass(frozen=True)
class TargetCounts(FlipCounts):
    """Counts of kept, broken, repaired and failing samples, and counts within the target.

    Attributes:
        targeted: failed samples to repair (I_neg in the paper).
        repaired_in_target: targeted samples that are right after the change.
        passed_in_target: samples in the target (`Target.covers`) that were right before.
        broken_in_target: broken samples in the target; 0 is the paper's instance-level suppression
            (section III).
    """

    targeted: int = 0
    repaired_in_target: int = 0
    passed_in_target: int = 0
    broken_in_target: int = 0


@dataclass(frozen=True)
class Flips:
    """Masks, `N` bool each, of kept, broken, repaired and failing samples (see `FlipCounts`)."""

    kept: Tensor
    broken: Tensor
    repaired: Tensor
    failing: Tensor

    @classmethod
    def between(cls, before: SampleResults, after: SampleResults) -> Flips:
        """Compares two tables of the same samples. A sample with a NaN or infinite loss counts as
        wrong.
        """
        if (
            before.splits != after.splits
            or before.sizes != after.sizes
            or not torch.equal(before.index, after.index)
        ):
            raise EvaluationError(
                f"results before ({_shape(before)}) and after ({_shape(after)}) are of different samples.",
                "collect both from the same data, without shuffling.",
            )
        return cls(*flip_masks(before.right, after.right))

    def counts(self, rows: Tensor | slice = slice(None)) -> FlipCounts:
        return FlipCounts(
            *(
                int(mask[rows].sum())
                for mask in (self.kept, self.broken, self.repaired, self.failing)
            )
        )

    def target_counts(
        self, before: SampleResults, rows: Tensor | slice = slice(None)
    ) -> TargetCounts:
        """Counts flips in the given rows, also within the target. `before` tells which samples are
        in the target.
        """
        targeted, broken = before.targeted, self.broken & before.in_target
        own = (targeted, self.repaired & targeted, (self.kept & before.in_target) | broken, broken)
        masks = (self.kept, self.broken, self.repaired, self.failing, *own)
        return TargetCounts(*(int(mask[rows].sum()) for mask in masks))


def _shape(results: SampleResults) -> str:
    return ", ".join(
        f"{split}: {size:,}" for split, size in zip(results.splits, results.sizes, strict=True)
    )
