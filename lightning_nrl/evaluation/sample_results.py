"""`SampleResults` of a model, one row a sample, and the flips between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.errors import EvaluationError

NO_COLUMN = torch.empty(0)
"""Stands for a column that is not given."""
COLUMNS = ("index", "label", "prediction", "loss", "passed", "targeted", "margin")  # columns that are always given


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
        in_target: `N` bool, samples of the targeted kind, right or wrong (`Target.covers`); the targeted
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
            # One number, expanded.
            object.__setattr__(self, "weight", torch.ones(1, dtype=torch.float64).expand(len(self.passed)))
        if self.group is NO_COLUMN:
            object.__setattr__(self, "group", torch.full((1,), -1).expand(len(self.passed)))
        if self.in_target is NO_COLUMN:
            object.__setattr__(self, "in_target", self.targeted)

    def __len__(self) -> int:
        return len(self.passed)

    @classmethod
    def concat(cls, tables: Sequence[SampleResults]) -> SampleResults:
        """Joins tables of different splits; weights, slices and what is in the target are left out."""
        columns: dict[str, Any] = {name: torch.cat([getattr(table, name) for table in tables]) for name in COLUMNS}
        splits, sizes = (sum((getattr(table, name) for table in tables), ()) for name in ("splits", "sizes"))
        return cls(splits, sizes, **columns)

    def only(self, splits: Sequence[str]) -> SampleResults:
        """The rows of some splits, without weights, slices and what is in the target."""
        rows = [self.of(split) for split in splits]
        columns: dict[str, Any] = {name: torch.cat([getattr(self, name)[part] for part in rows]) for name in COLUMNS}
        return SampleResults(tuple(splits), tuple(part.stop - part.start for part in rows), **columns)

    def sharing(self, other: SampleResults) -> SampleResults:
        """Returns a copy that shares equal samples and true classes with `other`."""
        names = [name for name in ("index", "label") if torch.equal(getattr(self, name), getattr(other, name))]
        return replace(self, **{name: getattr(other, name) for name in names})

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Rows of the samples at these positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    @property
    def right(self) -> Tensor:
        """`N` bool, samples that passed with a finite loss; all others count as wrong."""
        return self.passed & self.loss.isfinite()

    @property
    def weighted(self) -> bool:
        """True if samples do not count alike."""
        return bool((self.weight != 1).any())

    @property
    def protected(self) -> Tensor:
        return self.passed & self.weight.isinf()

    @property
    def margin_unit(self) -> float:
        """Median margin of the passed samples, the unit of all margins; NaN without any."""
        return float(self.margin[self.passed].median())

    @property
    def finite_weight(self) -> Tensor:
        """`N`, the weights, those of protected samples as large as all others of passed samples together and 1 more."""
        infinite = self.weight.isinf()
        return torch.where(infinite, 1 + self.weight[self.passed & ~infinite].sum(), self.weight)

    def gain(self, repaired: Tensor) -> float:
        """Returns the value of repairs, `N` bool: the number of targets among them if all weigh 1."""
        return float(self.weight[repaired & self.targeted].sum())

    def harm(self, broken: Tensor) -> float:
        """Returns the cost of broken samples, `N` bool: their number if all weigh 1."""
        return float(self.weight[broken].sum())

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Data-set positions of the marked rows, by split."""
        return {split: self.index[self.of(split)][mask[self.of(split)]].tolist() for split in self.splits}

    def non_finite(self) -> dict[str, list[int]]:
        """Data-set positions of the samples whose loss is NaN or infinite, by split, without empty splits."""
        return {split: ids for split, ids in self.ids(~self.loss.isfinite()).items() if ids}


def flip_masks(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns masks of the kept, broken, repaired and failing samples, from which are right before and after."""
    return before & after, before & ~after, ~before & after, ~before & ~after


@dataclass(frozen=True)
class FlipCounts:
    """Counts of kept, broken, repaired and failing samples.

    Attributes:
        kept: right before and after.
        broken: right before, wrong after: the regressions.
        repaired: wrong before, right after.
        failing: wrong before and after.
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
        """Right before."""
        return self.kept + self.broken

    @property
    def right(self) -> int:
        """Right after."""
        return self.kept + self.repaired

    @property
    def accuracy_before(self) -> float:
        return self.passed / self.n if self.n else float("nan")

    @property
    def accuracy_after(self) -> float:
        return self.right / self.n if self.n else float("nan")

    @staticmethod
    def of(before: Tensor, after: Tensor) -> FlipCounts:
        """Counts samples, `N` bool each: which were right before, and which are after."""
        return FlipCounts(*(int(mask.sum()) for mask in flip_masks(before, after)))


@dataclass(frozen=True)
class TargetCounts(FlipCounts):
    """Counts of samples, some of whose failures were to be repaired.

    Attributes:
        targeted: failed samples that were to be repaired (I_neg).
        repaired_in_target: those of them that are right after.
        passed_in_target: right samples of the kind that was to be repaired (`Target.covers`).
        broken_in_target: those of them that are wrong after: 0 is the paper's instance level (section III).
    """

    targeted: int = 0
    repaired_in_target: int = 0
    passed_in_target: int = 0
    broken_in_target: int = 0


@dataclass(frozen=True)
class Flips:
    """Flips of `N` samples: every sample is in exactly one of four masks, `N` bool (see `FlipCounts`)."""

    kept: Tensor
    broken: Tensor
    repaired: Tensor
    failing: Tensor

    @classmethod
    def between(cls, before: SampleResults, after: SampleResults) -> Flips:
        """Compares two tables of the same rows. A sample whose loss is NaN or infinite counts as wrong."""
        if before.splits != after.splits or before.sizes != after.sizes or not torch.equal(before.index, after.index):
            raise EvaluationError(
                f"results before ({_shape(before)}) and after ({_shape(after)}) is not about the same samples.",
                "collect both from the same data, without shuffling.",
            )
        return cls(*flip_masks(before.right, after.right))

    def counts(self, rows: Tensor | slice = slice(None)) -> FlipCounts:
        """Counts flips in the chosen rows (a mask or a slice; all by default)."""
        return FlipCounts(*(int(mask[rows].sum()) for mask in (self.kept, self.broken, self.repaired, self.failing)))

    def target_counts(self, before: SampleResults, rows: Tensor | slice = slice(None)) -> TargetCounts:
        """Counts flips, also of samples in the target by the results before."""
        targeted, broken = before.targeted, self.broken & before.in_target
        own = (targeted, self.repaired & targeted, (self.kept & before.in_target) | broken, broken)
        masks = (self.kept, self.broken, self.repaired, self.failing, *own)
        return TargetCounts(*(int(mask[rows].sum()) for mask in masks))


def _shape(results: SampleResults) -> str:
    return ", ".join(f"{split}: {size:,}" for split, size in zip(results.splits, results.sizes, strict=True))
