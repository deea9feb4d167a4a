"""Records of a report for each split and slice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, TypeVar

from lightning_nrl._utils.json_records import OPTIONAL, Derives, flat, required_fields
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.rates import rates_of
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts

Role = Literal["known", "calibration", "unseen"]
"""Use of a split: `known` to search, `calibration` to choose a strength, `unseen` to count."""
ROLES: tuple[Role, ...] = ("known", "calibration", "unseen")

Flip = Literal["repaired", "broken"]
Pairs = Counter[tuple[int, int]]  # number of samples by label and prediction
Counts = TypeVar("Counts", bound=FlipCounts)
AnySplit = TypeVar("AnySplit", "SplitReport", "UpdateSplit")


def _from_counts(name: str) -> Any:
    return property(attrgetter(f"counts.{name}"))


class _Counted(Derives):
    """Base class of records that have the attributes of their `counts`."""

    counts: TargetCounts
    n: int = _from_counts("n")
    passed: int = _from_counts("passed")
    kept: int = _from_counts("kept")
    broken: int = _from_counts("broken")
    repaired: int = _from_counts("repaired")
    failing: int = _from_counts("failing")
    targeted: int = _from_counts("targeted")
    repaired_in_target: int = _from_counts("repaired_in_target")
    passed_in_target: int = _from_counts("passed_in_target")
    broken_in_target: int = _from_counts("broken_in_target")
    accuracy_before: float = _from_counts("accuracy_before")
    accuracy_after: float = _from_counts("accuracy_after")


@dataclass(frozen=True)
class FlippedSample:
    """A sample that was repaired or broken. `id` is its position in its data set.

    `name` is its name by `SampleOptions.sample_id`. Classes are -1 if the task has no classes.
    Margins of wrong predictions are negative. Without margins they are NaN.
    """

    id: int
    flip: Flip
    in_target: bool
    label: int
    predicted_before: int
    predicted_after: int
    margin_before: float
    margin_after: float
    slice: str = ""
    name: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True)
class ConfusionCell:
    """Number of samples with a label and a prediction, before and after a repair."""

    label: int
    prediction: int
    before: int
    after: int

    @property
    def change(self) -> int:
        return self.after - self.before


@dataclass(frozen=True)
class ClassCounts:
    """Flip counts of the samples of one class."""

    label: int
    counts: FlipCounts = field(metadata=flat())


@dataclass(frozen=True)
class MarginHistogram:
    """Counts of margins before and after, in B bins with B + 1 ascending edges.

    The outer bins are open-ended.
    """

    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.before) == len(self.after) == len(self.edges) - 1:
            raise ConfigurationError(
                "`margins`: edges and counts do not fit.", "give one more edge than counts."
            )


@dataclass(frozen=True)
class SplitReport(_Counted):
    """Counts and samples of one split, before and after a repair.

    `targeted_ids` are the failures to repair, and `failed_ids` all failures before the repair.
    `confusion` has the cells that are not 0. `confusion` and `classes` are empty if the task has no
    classes, and `margins` is None if the task has no margins.
    """

    split: str
    role: Role
    counts: TargetCounts = field(metadata=flat())
    targeted_ids: tuple[int, ...] = ()
    flipped: tuple[FlippedSample, ...] = ()
    confusion: tuple[ConfusionCell, ...] = ()
    classes: tuple[ClassCounts, ...] = ()
    margins: MarginHistogram | None = None
    failed_ids: tuple[int, ...] = ()

    def flipped_as(self, flip: Flip) -> tuple[FlippedSample, ...]:
        """Returns the samples that were repaired or that were broken."""
        return tuple(sample for sample in self.flipped if sample.flip == flip)

    @property
    def repaired_ids(self) -> tuple[int, ...]:
        return tuple(sample.id for sample in self.flipped_as("repaired"))

    @property
    def broken_ids(self) -> tuple[int, ...]:
        return tuple(sample.id for sample in self.flipped_as("broken"))

    @property
    def rates(self) -> dict[str, float]:
        """Rates of `lightning_nrl.evaluation.metrics` by name, NaN if undefined.

        `repair_rate` counts only targets.
        """
        rates = rates_of(self.counts)
        rates["repair_rate"] = math.nan
        if self.targeted:
            rates["repair_rate"] = self.repaired_in_target / self.targeted
        return rates

    @property
    def numbers(self) -> dict[str, float]:
        """Counts, accuracies and rates by name, for loggers."""
        return {**_numbers(self.counts), **self.derived}

    @property
    def derived(self) -> Mapping[str, float]:
        return {
            "n": self.n,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            **self.rates,
        }


@dataclass(frozen=True)
class UpdateSplit:
    """One split in an update.

    The new model, as `trained` or repaired (`final`), is compared with the replaced model.
    """

    trained: SplitReport
    final: SplitReport

    @property
    def split(self) -> str:
        return self.final.split

    @property
    def role(self) -> Role:
        return self.final.role


@dataclass(frozen=True)
class SliceReport(_Counted):
    """Counts of one slice in the data of one role.

    `quota` is the number of targets to repair, or None for no quota.
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
    """A failure not to be repaired.

    `id` is its position in its data set. Classes are -1 if the task has no classes.
    """

    split: str
    id: int
    label: int
    prediction: int
    why: str


def by_role(splits: Sequence[AnySplit]) -> dict[Role, list[AnySplit]]:
    """Groups splits by role, in the order of `ROLES`. Leaves out roles without splits."""
    groups: dict[Role, list[AnySplit]] = {}
    for split in sorted(splits, key=lambda split: ROLES.index(split.role)):
        groups.setdefault(split.role, []).append(split)
    return groups


def pool_by_role(splits: Sequence[SplitReport]) -> dict[Role, SplitReport]:
    """Adds up the splits of each role, in the order of `ROLES`."""
    return {role: pool(of_role) for role, of_role in by_role(splits).items()}


def pool(splits: Sequence[SplitReport]) -> SplitReport:
    """Adds up several splits of one role.

    Leaves out samples, whose ids are valid in their own data set only.
    """
    return SplitReport(
        "all",
        splits[0].role,
        _sum([split.counts for split in splits]),
        confusion=_pooled_confusion(splits),
        classes=_pooled_classes(splits),
        margins=_pooled_margins(splits),
    )


def _sum(counts: Sequence[Counts]) -> Counts:
    return type(counts[0])(*_column_sums([tuple(_numbers(part).values()) for part in counts]))


def _numbers(counts: FlipCounts) -> dict[str, int]:
    """Returns the counts of samples. Counts of groups cannot be added: splits may share groups."""
    return {name: vars(counts)[name] for name in required_fields(type(counts))}


def _column_sums(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def confusion_cells(before: Pairs, after: Pairs) -> tuple[ConfusionCell, ...]:
    """Builds the cells from the number of samples by label and prediction."""
    pairs = sorted(before.keys() | after.keys())
    return tuple(ConfusionCell(*pair, before[pair], after[pair]) for pair in pairs)


def _pooled_confusion(splits: Sequence[SplitReport]) -> tuple[ConfusionCell, ...]:
    before, after = Pairs(), Pairs()
    for split in splits:
        for cell in split.confusion:
            before[cell.label, cell.prediction] += cell.before
            after[cell.label, cell.prediction] += cell.after
    return confusion_cells(before, after)


def _pooled_classes(splits: Sequence[SplitReport]) -> tuple[ClassCounts, ...]:
    by_label: dict[int, list[FlipCounts]] = {}
    for split in splits:
        for of_class in split.classes:
            by_label.setdefault(of_class.label, []).append(of_class.counts)
    return tuple(ClassCounts(label, _sum(counts)) for label, counts in sorted(by_label.items()))


def _pooled_margins(splits: Sequence[SplitReport]) -> MarginHistogram | None:
    histograms = [split.margins for split in splits if split.margins is not None]
    if len({histogram.edges for histogram in histograms}) != 1:
        return None
    before = _column_sums(histogram.before for histogram in histograms)
    after = _column_sums(histogram.after for histogram in histograms)
    return MarginHistogram(histograms[0].edges, before, after)


def pool_updates(splits: Sequence[UpdateSplit]) -> UpdateSplit:
    """Adds up several splits of one role, like `pool`."""
    trained = pool([split.trained for split in splits])
    return UpdateSplit(trained, pool([split.final for split in splits]))
