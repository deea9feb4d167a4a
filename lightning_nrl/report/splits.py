"""What became of the samples of a split or a slice: records, as a report has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from lightning_nrl._utils.serialize import Derives, flat
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.metrics.rates import rates_of
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, Flip, FlippedSample, MarginHistogram

__all__ = ["ROLES", "Role", "SetAside", "SliceReport", "SplitReport", "UpdateSplit", "pool", "pool_updates"]

Role = Literal["known", "calibration", "unseen"]
"""Whether the search was allowed to look at a split (`known`), only the choice of a strength, or nothing at all."""
ROLES: tuple[Role, ...] = ("known", "calibration", "unseen")


COUNTS = tuple(field.name for field in fields(TargetCounts))


class _Counted(Derives):
    """Shortcuts to the counts of what is counted."""

    counts: TargetCounts

    @property
    def n(self) -> int:
        """All samples."""
        return self.counts.n

    @property
    def passed(self) -> int:
        """Samples right before."""
        return self.counts.passed

    @property
    def kept(self) -> int:
        """Samples right before and after."""
        return self.counts.kept

    @property
    def broken(self) -> int:
        """Samples right before and wrong after."""
        return self.counts.broken

    @property
    def repaired(self) -> int:
        """Samples wrong before and right after."""
        return self.counts.repaired

    @property
    def failing(self) -> int:
        """Samples wrong before and after."""
        return self.counts.failing

    @property
    def targeted(self) -> int:
        """Failed samples that were to be repaired (I_neg)."""
        return self.counts.targeted

    @property
    def repaired_in_target(self) -> int:
        """Those of them that are right after."""
        return self.counts.repaired_in_target

    @property
    def passed_in_target(self) -> int:
        """Right samples of the kind that was to be repaired (`Target.covers`)."""
        return self.counts.passed_in_target

    @property
    def broken_in_target(self) -> int:
        """Those of them that are wrong after."""
        return self.counts.broken_in_target

    @property
    def accuracy_before(self) -> float:
        """Share of samples right before, in [0, 1]; NaN without samples."""
        return self.counts.accuracy_before

    @property
    def accuracy_after(self) -> float:
        """Share of samples right after, in [0, 1]; NaN without samples."""
        return self.counts.accuracy_after


@dataclass(frozen=True)
class SplitReport(_Counted):
    """Counts and samples of one split, before a repair against after it. Ids are data-set positions.

    Attributes:
        split: its name, such as `train`.
        role: what was allowed to look at it.
        counts: what became of its samples.
        targeted_ids: the samples that were to be repaired.
        flipped: the repaired and the broken samples.
        confusion: what classes are taken for, without what is 0 before and after; empty where the task has no classes.
        classes: what became of each class, in ascending order; empty where the task has none.
        margins: before and after; None where the task has none.
    """

    split: str
    role: Role
    counts: TargetCounts = field(metadata=flat())
    targeted_ids: tuple[int, ...] = ()
    flipped: tuple[FlippedSample, ...] = ()
    confusion: tuple[ConfusionCell, ...] = ()
    classes: tuple[ClassCounts, ...] = ()
    margins: MarginHistogram | None = None

    @property
    def repaired_ids(self) -> tuple[int, ...]:
        """The repaired samples, targeted or not."""
        return self._ids("repaired")

    @property
    def broken_ids(self) -> tuple[int, ...]:
        """The broken samples."""
        return self._ids("broken")

    def _ids(self, flip: Flip) -> tuple[int, ...]:
        return tuple(sample.id for sample in self.flipped if sample.flip == flip)

    @property
    def rates(self) -> dict[str, float]:
        """The numbers of `lightning_nrl.metrics`, by the names of its functions; undefined ones are NaN.

        `repair_rate` is that of the target, repaired in I_neg / |I_neg|; all others are of the whole split.
        """
        repair_rate = self.repaired_in_target / self.targeted if self.targeted else float("nan")
        return {**rates_of(self.counts), "repair_rate": repair_rate}

    @property
    def numbers(self) -> dict[str, float]:
        """Every number of the split by name, as loggers take them: counts, accuracies, rates."""
        counts = ("n", *COUNTS, "accuracy_before", "accuracy_after")
        return {name: getattr(self, name) for name in counts} | self.rates

    @property
    def derived(self) -> Mapping[str, object]:
        return {name: value for name, value in self.numbers.items() if name not in COUNTS}


@dataclass(frozen=True)
class UpdateSplit:
    """One split from the replaced model to the new one: as training left it (`broken` are regressions), and now."""

    trained: SplitReport
    now: SplitReport

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.now.split

    @property
    def role(self) -> Role:
        """What was allowed to look at it."""
        return self.now.role


@dataclass(frozen=True)
class SliceReport(_Counted):
    """Counts of one slice of the data of one role, before a repair against after it.

    `quota` is how many targets had to be repaired; None: any number.
    """

    name: str
    role: Role
    counts: TargetCounts = field(metadata=flat())
    quota: int | None = None

    @property
    def derived(self) -> Mapping[str, object]:
        return {"n": self.n}


@dataclass(frozen=True)
class SetAside:
    """A failed sample that was in the target and was set aside, by its position in the data set, and why.

    The label is -1 where the task has none; the prediction is what the model says.
    """

    split: str
    id: int
    label: int
    prediction: int
    why: str


def pool(splits: Sequence[SplitReport]) -> SplitReport:
    """The sum of several splits of one role. It has no samples, since those of different data sets do not mix."""
    counts = TargetCounts(*(sum(getattr(s, count) for s in splits) for count in COUNTS))
    return SplitReport(
        "all",
        splits[0].role,
        counts,
        confusion=_pooled_confusion(splits),
        classes=_pooled_classes(splits),
        margins=_pooled_margins([s.margins for s in splits]),
    )


def _pooled_confusion(splits: Sequence[SplitReport]) -> tuple[ConfusionCell, ...]:
    before, after = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for cell in (cell for split in splits for cell in split.confusion):
        before[cell.label, cell.prediction] += cell.before
        after[cell.label, cell.prediction] += cell.after
    return tuple(ConfusionCell(*pair, before[pair], after[pair]) for pair in sorted(before.keys() | after.keys()))


def _pooled_classes(splits: Sequence[SplitReport]) -> tuple[ClassCounts, ...]:
    found: dict[int, list[FlipCounts]] = {}
    for one in (one for split in splits for one in split.classes):
        found.setdefault(one.label, []).append(one.counts)
    names = [f.name for f in fields(FlipCounts)]
    return tuple(
        ClassCounts(label, FlipCounts(*(sum(getattr(one, name) for one in counts) for name in names)))
        for label, counts in sorted(found.items())
    )


def _pooled_margins(histograms: Sequence[MarginHistogram | None]) -> MarginHistogram | None:
    found = [histogram for histogram in histograms if histogram is not None]
    if not found or any(histogram.edges != found[0].edges for histogram in found):
        return None
    sums = [
        tuple(map(sum, zip(*columns, strict=True)))
        for columns in zip(*((h.before, h.after) for h in found), strict=True)
    ]
    return MarginHistogram(found[0].edges, *sums)


def pool_updates(splits: Sequence[UpdateSplit]) -> UpdateSplit:
    """The sum of several splits of one role."""
    return UpdateSplit(pool([split.trained for split in splits]), pool([split.now for split in splits]))
