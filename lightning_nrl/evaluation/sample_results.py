"""`SampleResults`, a table with one row per sample, and `Flips` between two such tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from lightning_nrl._utils.json_records import OPTIONAL
from lightning_nrl.errors import EvaluationError

NO_COLUMN = torch.empty(0)
"""Default of optional columns of `SampleResults`, which `__post_init__` replaces."""


@dataclass(frozen=True)
class SampleResults:
    """Results of a model on `N` samples, a row for each, by split and in data set order.

    Tensors are on the CPU.

    Attributes:
        splits: names of the splits.
        sizes: number of samples in each split.
        index: `N` int64, position of the sample in the data set, which is its id in reports.
        label: `N` int64, true class, -1 if the task has no classes.
        prediction: `N` int32, predicted class, -1 if the task has no classes.
        loss: `N` float, the task's loss.
        passed: `N` bool, True if the sample is right.
        targeted: `N` bool, True if the sample failed and the target selects it (on known data:
            I_neg in the paper).
        in_target: `N` bool, True for samples, right or wrong, in the target (`Target.covers`);
            default: `targeted`.
        margin: `N` float, the task's margin, NaN if the task has no margins.
        confidence: `N` float, probability of the predicted class; NaN, the default, if the task has
            none.
        weight: `N` float64, 1 by default. For a targeted sample, the value of its repair, 1 on
            average. For a passed sample, the cost of breaking it: a whole number from 1, or
            infinity if the sample is protected.
        slices: names of the slices.
        slice_number: `N` int64, index of the sample's slice in `slices`; -1, the default, if the
            sample is in no slice.
        group: `N` int64, number of the sample's group; None if the samples have no groups.
        leaked: `N` bool, True for unseen samples that are known too; `Flips` do not count them.
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
    confidence: Tensor = NO_COLUMN
    _: KW_ONLY
    weight: Tensor = NO_COLUMN
    slices: tuple[str, ...] = ()
    slice_number: Tensor = NO_COLUMN
    group: Tensor | None = None
    in_target: Tensor = NO_COLUMN
    leaked: Tensor = NO_COLUMN

    def __post_init__(self) -> None:
        n = len(self.passed)
        # Expanded, so that a default takes no memory.
        defaults = {
            "confidence": torch.full((1,), torch.nan).expand(n),
            "weight": torch.ones(1, dtype=torch.float64).expand(n),
            "slice_number": torch.full((1,), -1).expand(n),
            "in_target": self.targeted,
            "leaked": torch.zeros(1, dtype=torch.bool).expand(n),
        }
        for name, column in defaults.items():
            if vars(self)[name] is NO_COLUMN:
                object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.passed)

    @classmethod
    def concat(cls, tables: Sequence[SampleResults]) -> SampleResults:
        """Joins tables; those of one split must follow each other.

        Other columns get their defaults.
        """
        sizes = Counter[str]()
        for table in tables:
            sizes.update(dict(zip(table.splits, table.sizes, strict=True)))
        columns = zip(*(table._columns() for table in tables), strict=True)
        return cls(tuple(sizes), tuple(sizes.values()), *map(torch.cat, columns))

    def only(self, splits: Sequence[str]) -> SampleResults:
        """Selects the rows of some splits. Other columns get their defaults."""
        rows = [torch.arange(len(self))[self.of(split)] for split in splits]
        selected = torch.cat(rows)
        columns = [column[selected] for column in self._columns()]
        return SampleResults(tuple(splits), tuple(map(len, rows)), *columns)

    def _columns(self) -> tuple[Tensor, ...]:
        """Returns the columns that have no other default, in the order of the fields."""
        return (
            self.index,
            self.label,
            self.prediction,
            self.loss,
            self.passed,
            self.targeted,
            self.margin,
            self.confidence,
        )

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Returns the rows of the samples at some positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """Returns the rows of a split."""
        start = self.start(split)
        size = self.sizes[self.splits.index(split)]
        return slice(start, start + size)

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
        """Median finite margin of the passed samples, the unit for margins; NaN without any."""
        return float(self.margin[self.passed & self.has_margin].median())

    @property
    def has_margin(self) -> Tensor:
        """Mask of the samples with a finite margin, `N` bool. Steps push no others."""
        return self.margin.isfinite()

    @property
    def has_margins(self) -> bool:
        """True if the task has margins, as samples with a finite one show."""
        return bool(self.has_margin.any())

    @property
    def judged_margin(self) -> Tensor:
        return judged_margin(self.margin, self.passed, self.loss)

    @property
    def finite_weight(self) -> Tensor:
        """Weights, `N`; infinity becomes 1 plus the sum of passed samples' finite weights."""
        infinite = self.weight.isinf()
        total = self.weight[self.passed & ~infinite].sum()
        return torch.where(infinite, 1 + total, self.weight)

    def value(self, repaired: Tensor) -> float:
        """Sums the weights of the targets in the mask `repaired`, `N` bool."""
        return float(self.weight[repaired & self.targeted].sum())

    def cost(self, broken: Tensor) -> float:
        """Sums the weights of the samples in the mask `broken`, `N` bool."""
        return float(self.weight[broken].sum())

    @property
    def samples(self) -> list[tuple[str, int]]:
        """The split and the id of each sample."""
        samples = []
        for split in self.splits:
            samples += [(split, at) for at in self.index[self.of(split)].tolist()]
        return samples

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Returns, for each split, the ids of the samples in a mask, `N` bool."""
        ids = {}
        for split in self.splits:
            rows = self.of(split)
            ids[split] = self.index[rows][mask[rows]].tolist()
        return ids

    def non_finite(self) -> dict[str, list[int]]:
        """Returns the ids of samples with a NaN or infinite loss, for each split that has some."""
        ids = self.ids(~self.loss.isfinite())
        return {split: ids[split] for split in ids if ids[split]}


def judged_margin(margin: Tensor, passed: Tensor, loss: Tensor) -> Tensor:
    """Returns `margin`, `n`, with infinity for passed samples without a finite one.

    It is NaN for failed samples without one, and for samples without a finite loss.
    """
    of_others = torch.where(passed, torch.inf, torch.nan).to(margin)
    return margin.where(margin.isfinite(), of_others).where(loss.isfinite(), torch.nan)


def flip_masks(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns masks of kept, broken, repaired and failing samples from masks of right samples."""
    return before & after, before & ~after, ~before & after, ~before & ~after


@dataclass(frozen=True)
class GroupCounts:
    """Counts of groups of samples that resemble each other (`SampleOptions.groups`).

    Attributes:
        passed: groups with a sample that was right before a change.
        broken: groups with a broken sample.
        failed: groups with a sample that was wrong before.
        repaired: groups with a repaired sample.
        better: groups with more repaired than broken samples.
        worse: groups with more broken than repaired samples.
        squared_net: sum over all groups of (repaired - broken samples)^2, an estimate of the
            variance of the number of repaired minus broken samples.
    """

    passed: int
    broken: int
    failed: int
    repaired: int
    better: int
    worse: int
    squared_net: int


@dataclass(frozen=True)
class FlipCounts:
    """Counts of kept, broken, repaired and failing samples.

    Kept samples are right before and after a change, broken samples are right only before it,
    repaired samples are right only after it, and failing samples are never right. `groups` has the
    counts of groups, or None if the samples have no groups.
    """

    kept: int
    broken: int
    repaired: int
    failing: int
    groups: GroupCounts | None = field(default=None, kw_only=True, metadata=OPTIONAL)

    @property
    def units(self) -> GroupCounts:
        """Counts for confidence limits and tests: `groups` or, without these, each sample."""
        flips = self.repaired, self.broken
        failed = self.repaired + self.failing
        return self.groups or GroupCounts(
            self.passed, self.broken, failed, self.repaired, *flips, sum(flips)
        )

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
        return self._of_all(self.passed)

    @property
    def accuracy_after(self) -> float:
        return self._of_all(self.right)

    @property
    def points(self) -> float:
        """Change of accuracy in percentage points. NaN without samples."""
        return self._of_all(100 * (self.repaired - self.broken))

    def _of_all(self, count: int) -> float:
        return count / self.n if self.n else math.nan

    @staticmethod
    def of(before: Tensor, after: Tensor) -> FlipCounts:
        """Counts flips from masks, `N` bool, of the right samples before and after a change."""
        return Flips(*flip_masks(before, after)).counts()


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


NO_COUNTS = TargetCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class Flips:
    """Masks, `N` bool each, of kept, broken, repaired and failing samples (see `FlipCounts`).

    `group`, `N` int64, has the number of each sample's group. None: the samples have no groups.
    """

    kept: Tensor
    broken: Tensor
    repaired: Tensor
    failing: Tensor
    group: Tensor | None = None

    @classmethod
    def between(cls, before: SampleResults, after: SampleResults) -> Flips:
        """Compares two tables of the same samples; a NaN or infinite loss counts as wrong."""
        same_splits = (before.splits, before.sizes) == (after.splits, after.sizes)
        if not same_splits or not torch.equal(before.index, after.index):
            raise EvaluationError(
                f"results before ({_shape(before)}) and after ({_shape(after)}) are of different "
                "samples.",
                "collect both from the same data, without shuffling.",
            )
        counted = ~before.leaked
        kept, broken, repaired, failing = flip_masks(before.right, after.right)
        return cls(
            kept & counted, broken & counted, repaired & counted, failing & counted, before.group
        )

    def counts(self, rows: Tensor | slice = slice(None)) -> FlipCounts:
        masks = [mask[rows] for mask in (self.kept, self.broken, self.repaired, self.failing)]
        counts = FlipCounts(*(int(mask.sum()) for mask in masks))
        if self.group is None:
            return counts
        return replace(counts, groups=_count_groups(masks, self.group[rows]))

    def target_counts(
        self, before: SampleResults, rows: Tensor | slice = slice(None)
    ) -> TargetCounts:
        """Counts flips in the given rows, also within the target, which `before` tells."""

        def count(mask: Tensor) -> int:
            return int(mask[rows].sum())

        return TargetCounts(
            **vars(self.counts(rows)),
            targeted=count(before.targeted),
            repaired_in_target=count(self.repaired & before.targeted),
            passed_in_target=count((self.kept | self.broken) & before.in_target),
            broken_in_target=count(self.broken & before.in_target),
        )


def _count_groups(masks: Sequence[Tensor], group: Tensor) -> GroupCounts:
    numbers, place = group.unique(return_inverse=True)
    kept, broken, repaired, failing = (
        place[mask].bincount(minlength=len(numbers)) for mask in masks
    )
    net = repaired - broken
    # In the order of the fields.
    columns = (
        kept + broken > 0,
        broken > 0,
        repaired + failing > 0,
        repaired > 0,
        net > 0,
        net < 0,
    )
    return GroupCounts(*(int(column.sum()) for column in (*columns, net**2)))


def _shape(results: SampleResults) -> str:
    sizes = zip(results.splits, results.sizes, strict=True)
    return ", ".join(f"{split}: {size:,}" for split, size in sizes)
