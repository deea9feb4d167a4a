"""The data of a repair report, without weights: `RepairRecord` and the records of each stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from typing_extensions import Self

from lightning_nrl._utils.json_records import OPTIONAL, Record, to_plain
from lightning_nrl._utils.state import State
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import DeployedPrecision
from lightning_nrl.evaluation.sample_results import FlipCounts, GroupCounts, TargetCounts
from lightning_nrl.evaluation.stats import Bound, upper_limit
from lightning_nrl.records.provenance import Provenance, installed_versions
from lightning_nrl.records.splits import (
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool,
    pool_by_role,
    pool_updates,
)
from lightning_nrl.records.steps import CautionPoint, PricePoint, Rung, Step

COMPARED_AT_ONCE = 2**16  # values that are compared at once


@dataclass(frozen=True)
class Judge:
    """The precision in which the model was evaluated.

    `rounding` is the estimated effect of rounding on a margin, or None if the task has no margins.
    `n_borderline` right known samples have a smaller margin. On another device or with another
    batch size they may be wrong.
    """

    precision: DeployedPrecision
    rounding: float | None = None
    n_borderline: int = 0


@dataclass(frozen=True)
class LocalizationReport:
    """The numbers of weights in a `Localization`. `requested` (#lw) may be None."""

    requested: int | None
    n_g: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class SearchReport:
    """The course of a search for the best new values of the searched weights.

    `fitness` is the fitness of the best candidate. `history` has the curves of `SearchHistory`,
    with one value per iteration. `n_failed` and `n_passed` are the numbers of samples in I_neg and
    I_pos.
    """

    iterations: int
    stopped: str
    fitness: float
    original_fitness: float
    history: Mapping[str, Sequence[float]]
    n_failed: int
    n_passed: int

    @property
    def curves(self) -> dict[str, Sequence[float]]:
        """The curves of `history`, and `broken`: `n_passed` minus `intact`."""
        intact = self.history.get("intact", ())
        return {**self.history, "broken": [self.n_passed - value for value in intact]}


@dataclass(frozen=True)
class Hashes:
    """SHA-256 (`hash_tensors`) of the repaired layers and of the whole state dict."""

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None


@dataclass(frozen=True)
class StrengthPoint:
    """Counts of a patch at one strength: 0 stands for the original weights, 1 for the patch.

    If `polished`, small steps restored broken samples before the count. `value` is the value of all
    repaired targets, `cost` the gate's cost of the broken known samples, and `calibration_cost` the
    cost of broken calibration samples. Each is None if it is the number of these samples.
    """

    strength: float
    repaired_in_target: int
    known: FlipCounts
    calibration: FlipCounts | None = None
    polished: bool = False
    value: float | None = None
    cost: float | None = None
    calibration_cost: float | None = None

    @property
    def value_of_repairs(self) -> float:
        return _or_count(self.value, self.repaired_in_target)

    @property
    def cost_of_known(self) -> float:
        return _or_count(self.cost, self.known.broken)

    @property
    def cost_of_calibration(self) -> float:
        if self.calibration is None:
            return 0
        return _or_count(self.calibration_cost, self.calibration.broken)


def _or_count(weighted: float | None, number: int) -> float:
    return number if weighted is None else weighted


@dataclass(frozen=True)
class WeightChange:
    """The difference between two versions of the same tensors. `changed` of `total` weights differ.

    Integers, such as the count of batches in a batch norm, are no weights.

    `l2` is the Euclidean norm of the difference, `relative` the ratio of this norm to the norm of
    the old weights, and `largest` the largest absolute difference.
    """

    changed: int
    total: int
    l2: float
    relative: float
    largest: float

    @classmethod
    def between(cls, old: State, new: State) -> Self:
        """Measures the change between tensors of the same names, in float64 on the CPU."""
        changed = total = 0
        largest = 0.0
        squares = torch.zeros(2, dtype=torch.float64)  # of the change and of the old weights
        for name, value in old.items():
            if not value.is_floating_point() or not value.numel():
                continue
            parts = zip(
                value.flatten().split(COMPARED_AT_ONCE),
                new[name].flatten().split(COMPARED_AT_ONCE),
                strict=True,
            )
            for old_part, new_part in parts:
                before = old_part.cpu().double()
                change = new_part.cpu().double() - before
                changed += int((change != 0).sum())
                total += len(change)
                largest = max(largest, float(change.abs().max()))
                squares += torch.stack([change.square().sum(), before.square().sum()])
        length, length_before = squares.sqrt()
        return cls(changed, total, float(length), float(length / length_before), largest)


@dataclass(frozen=True)
class CalibrationBounds(Bound):
    """The number of broken calibration samples, and a limit on the rate for similar samples.

    The data could have chosen among `states` sets of weights; 1 means that they chose nothing. If
    `allowed` is given, strengths were accepted from weak to strong while at most `allowed` samples
    broke. Then the limit is computed for `allowed` instead of `broken` samples.
    """

    states: int = 1
    allowed: int | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if self.allowed is not None:
            return (
                f"{text} (the limit for {self.allowed:,} broken, "
                "since strengths that break more were not accepted)"
            )
        if self.states > 1:
            return (
                f"{text} (valid for each of the {self.states:,} sets of weights "
                "that these data could have chosen)"
            )
        return text


Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]
"""How a repair ended."""
UNSEEN_CONFIDENCE = 0.95  # of `RepairRecord.unseen_limit`
SCHEMA = 1  # version of the file format; see docs/tensorboard.md


@dataclass(frozen=True, repr=False)
class RepairRecord(Record):
    """The data of a `RepairReport`.

    Attributes:
        status: `repaired`, `refused` by the gate, `not repaired` or `nothing to repair`.
        reason: why the repair has this status, in a sentence or two with counts.
        layers: dotted names of the layers to change.
        target: the failures to repair, in words. `gate` and `task` are in words, too.
        splits: outcome by split under the weights that the model has after the repair.
        update: comparison of the new model with the replaced one by split. Empty if no model is
            replaced.
        slices: outcome by slice and role. For refused weights, the outcome that they would have on
            known data.
        set_aside: failures in the target that were not to be repaired, with reasons.
        leaked: by unseen split, the number of its samples that are also known or calibration data.
        candidate: outcome that refused weights would have on known splits. Empty if no weights were
            refused.
        localization: numbers of searched weights. None if the repair selected no weights.
        search: the course of the search. None if there was no search.
        steps: steps of the method, in order.
        rungs: changes that the default method tried, from the smallest to the largest.
        choice: for each rung, why it is kept or not; without margins, why only a search ran.
            Empty if no rung is kept.
        price: best results by the share of known samples that may break.
        strength: counts of the patch by strength, from the original weights (0) to the patch (1)
            and beyond.
        chosen_strength: the strength that was chosen. None if there was no choice.
        bounds: limit computed from calibration data. None if there are no such data, or the gate
            accepted nothing.
        change: difference between the old and the new weights, accepted or not. None if no new
            weights were found.
        hashes: hashes of the weights.
        judge: precision of the evaluation.
        seed: seed of the run.
        seconds: wall time by stage, in order.
        passes: samples that the model evaluated by stage, divided by the number of known samples.
            Training steps do not count.
        versions: versions of the software by name.
        provenance: when the report was made, and from which model and data.
        files: paths of the written files by kind, such as `checkpoint` or `json`.
        settings: arguments of the repair by name, as plain values.
        class_names: names of the task's classes, in order. Empty if unknown.
        unseen_groups: counts of groups or, if samples repeat, of distinct samples in all unseen
            splits. None if samples neither repeat nor have groups.
        near_copies: True if held-out samples look like copies of used samples beside them.
        schema: version of the file format (docs/tensorboard.md).
    """

    status: Status
    reason: str
    layers: tuple[str, ...]
    target: str
    gate: str
    task: str
    splits: tuple[SplitReport, ...]
    update: tuple[UpdateSplit, ...] = ()
    candidate: tuple[SplitReport, ...] = ()
    slices: tuple[SliceReport, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    leaked: Mapping[str, int] = field(default_factory=dict)
    localization: LocalizationReport | None = None
    search: SearchReport | None = None
    steps: tuple[Step, ...] = ()
    rungs: tuple[Rung, ...] = ()
    choice: str = ""
    price: tuple[PricePoint, ...] = ()
    caution: tuple[CautionPoint, ...] = ()
    strength: tuple[StrengthPoint, ...] = ()
    chosen_strength: float | None = None
    bounds: CalibrationBounds | None = None
    change: WeightChange | None = None
    hashes: Hashes | None = None
    judge: Judge | None = None
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    passes: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    provenance: Provenance = field(default_factory=Provenance)
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    unseen_groups: GroupCounts | None = field(default=None, metadata=OPTIONAL)
    near_copies: bool = field(default=False, metadata=OPTIONAL)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("leaked", "seconds", "passes", "files", "settings"):
            object.__setattr__(self, name, to_plain(getattr(self, name)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the result of `to_dict`.

        Raises a `ConfigurationError` if a value is missing, unknown or wrong.
        """
        if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:
            raise ConfigurationError(
                f"schema: expected {SCHEMA}, found {data['schema']!r}.",
                "read the report with the version of lightning_nrl that wrote it.",
            )
        return super().from_dict(data)

    @property
    def unseen_splits(self) -> tuple[SplitReport, ...]:
        """Reports of unseen splits.

        In an update, the reports compare with the replaced model. Otherwise the result is empty if
        no weights changed.
        """
        splits: Iterable[SplitReport] = ()
        if self.update:
            splits = (split.final for split in self.update)
        elif self.status == "repaired":
            splits = self.splits
        return tuple(split for split in splits if split.role == "unseen")

    @property
    def unseen(self) -> SplitReport | None:
        splits = self.unseen_splits
        if not splits:
            return None
        pooled = pool(splits)
        return replace(pooled, counts=replace(pooled.counts, groups=self.unseen_groups))

    @property
    def test_units(self) -> str:
        """Name of what tests count if unseen samples repeat or have groups."""
        if self.settings.get("groups", "") is None:
            return "distinct samples"
        return "groups"

    @property
    def unseen_limit(self) -> float | None:
        """Upper limit in (0, 1] on the rate at which samples like the unseen ones break.

        The rate is among samples that the model got right before the repair or, in an update, that
        the replaced model gets right. With groups, it is the rate of groups with such a sample in
        which one breaks. The confidence is `UNSEEN_CONFIDENCE`. None if `unseen` counts no such
        sample.
        """
        counted = self.unseen
        if counted is None or not counted.passed:
            return None
        units = counted.counts.units
        return upper_limit(units.broken, units.passed, UNSEEN_CONFIDENCE)

    @property
    def known_counts(self) -> TargetCounts:
        """Counts of all known data. All are 0 if there are none."""
        known = self.pooled("known")
        if known is None:
            return TargetCounts(0, 0, 0, 0)
        return known.counts

    @property
    def n_estimates(self) -> int:
        """Number of results among which held-out samples chose.

        A kept rung counts once per result among which it chose, such as its rounds or prices.
        """
        rungs = [rung for rung in self.rungs if rung.held_out is not None]
        return sum(rung.n_choices if rung.kept else 1 for rung in rungs)

    @property
    def held_out(self) -> TargetCounts | None:
        """Counts of the taken rung on known samples it did not use.

        None if it used all, no weights changed, or a weaker or sparse change was written.
        """
        is_sparse = any(step.kind == "sparse" for step in self.steps)
        if is_sparse or self.chosen_strength not in (None, 1.0):
            return None
        for rung in self.rungs:
            if rung.kept and self.status == "repaired":
                return rung.held_out
        return None

    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if the name is unknown.

        A label below 0 (no class) becomes `-`.
        """
        if label < 0:
            return "-"
        if label < len(self.class_names):
            return self.class_names[label]
        return str(label)

    @property
    def path(self) -> list[StrengthPoint]:
        """Counts by ascending strength. The first point is at strength 0, the original weights."""
        points = sorted(self.strength, key=lambda point: point.strength)
        if points and points[0].strength > 0:
            original = StrengthPoint(0.0, 0, FlipCounts(0, 0, 0, 0))
            if points[0].calibration is not None:
                original = replace(original, calibration=original.known)
            points.insert(0, original)
        return points

    def pooled(self, role: Role) -> SplitReport | None:
        return pool_by_role(self.splits).get(role)

    def pooled_update(self, role: Role) -> UpdateSplit | None:
        splits = by_role(self.update).get(role)
        return pool_updates(splits) if splits else None
