"""The data of a repair report without weights: `RepairRecord` and the records of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import Self

from lightning_nrl._utils.json_records import Record, to_plain
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report.provenance import Provenance, installed_versions
from lightning_nrl.report.splits import (
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool,
    pool_updates,
)
from lightning_nrl.report.stats import Bound


@dataclass(frozen=True)
class Judge:
    """The precision in which the model was evaluated.

    `rounding` is its estimated effect on a margin, None if the task has no margins. The model gets `n_borderline` known
    samples right by less: another device or batch size may get them wrong.
    """

    precision: DeployedPrecision
    rounding: float | None = None
    n_borderline: int = 0


@dataclass(frozen=True)
class Step:
    """A step of a method, such as `fit`, with counts of targets repaired and known passed samples broken so far."""

    name: str
    repaired: int
    broken: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Rung:
    """One rung of the default method's ladder, ordered from the smallest change to the largest.

    It is a `search` or an `exact` solution in the chosen layer, or further `training`. Counts are of all known samples,
    `held_out` of those that the rung had not used, None without any. The repair is the rung that is `taken`.
    """

    name: str
    repaired_in_target: int
    repaired: int
    broken: int
    weights_changed: int
    seconds: float
    held_out: TargetCounts | None = None
    taken: bool = False
    note: str = ""


@dataclass(frozen=True)
class PricePoint:
    """The best result if a share `allowed` of known passed samples may break, 1 for any; counts as in `Rung`."""

    allowed: float
    broken: int
    repaired_in_target: int
    repaired: int
    held_out: TargetCounts | None = None


@dataclass(frozen=True)
class LocalizationReport:
    """The searched weights, as in `Localization`; `requested` (#lw) is None if `n_g` was given."""

    requested: int | None
    n_g: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class SearchReport:
    """The course of a search.

    `fitness` is that of the best candidate, `history` has the curves of `SearchHistory`, one value per iteration.
    Candidates were scored on `n_failed` failed (|I_neg|) and `n_passed` passed samples (|I_pos|), None if unknown.
    """

    iterations: int
    stopped: str
    fitness: float
    original_fitness: float
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    n_failed: int | None = None
    n_passed: int | None = None

    @property
    def curves(self) -> dict[str, Sequence[float]]:
        """The history with a curve of `broken` samples, derived from `intact`."""
        intact = self.history.get("intact")
        if self.n_passed is None or intact is None:
            return dict(self.history)
        return {**self.history, "broken": [self.n_passed - value for value in intact]}


@dataclass(frozen=True)
class Hashes:
    """SHA-256 (`hash_tensors`) of the repaired layers and of the whole state dict, before and after."""

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None


@dataclass(frozen=True)
class StrengthPoint:
    """Counts of a patch at one strength, 0 for the original weights, 1 for the patch; after a polish if `polished`.

    `gain` is the value of the repaired targets, `harm` the gate's cost of the broken known samples, `calibration_harm`
    that of broken calibration samples; None stands for their number.
    """

    strength: float
    repaired_in_target: int
    known: FlipCounts
    calibration: FlipCounts | None = None
    polished: bool = False
    gain: float | None = None
    harm: float | None = None
    calibration_harm: float | None = None

    @property
    def worth(self) -> float:
        return self.repaired_in_target if self.gain is None else self.gain

    @property
    def cost(self) -> float:
        return self.known.broken if self.harm is None else self.harm

    @property
    def calibration_cost(self) -> float:
        if self.calibration_harm is not None:
            return self.calibration_harm
        return 0 if self.calibration is None else self.calibration.broken


@dataclass(frozen=True)
class WeightChange:
    """The difference between two versions of the same tensors: how many weights `changed`, and how far.

    `l2` is the Euclidean norm, `relative` its ratio to the norm of the old weights, `largest` the largest absolute
    change.
    """

    changed: int
    total: int
    l2: float
    relative: float
    largest: float


@dataclass(frozen=True)
class CalibrationBounds(Bound):
    """Broken calibration samples, and a limit on the rate for others like them.

    The data could have chosen among `states` sets of weights, 1 if they chose nothing. If strengths were accepted from
    weak to strong while at most `allowed` samples broke, the limit is that of this count.
    """

    states: int = 1
    allowed: int | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if self.allowed is not None:
            text += f" (the limit for {self.allowed:,} broken: strengths were accepted up to that, weakest first)"
        elif self.states > 1:
            text += f" (valid for each of the {self.states:,} sets of weights that these data could have chosen)"
        return text


CUT = "cut by `max_time`"
"""Note of a step that ran out of time."""
Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]
"""Outcome of a repair."""
SCHEMA = 1  # version of the file format; see docs/report_schema.md


@dataclass(frozen=True, repr=False)
class RepairRecord(Record):
    """The data of a `RepairReport`.

    Attributes:
        status: `repaired`, `refused` by the gate, `not repaired` or `nothing to repair`.
        reason: why, in a sentence or two, with figures.
        layers: dotted names of the layers to change.
        target: the failures to repair, in words; likewise `gate` and `task`.
        splits: outcome by split under the model's current weights.
        update: the new model against the replaced one by split; empty if none is replaced.
        slices: outcome by slice and role; for refused weights their effect on known data.
        set_aside: targeted failures that were set aside, with reasons.
        leaked: number of samples that are known or calibration data too, by unseen split.
        candidate: effect of refused weights on the known splits; empty if none were refused.
        localization: the searched weights; None, like the fields below, if the stage was not reached.
        search: the course of the search.
        steps: steps of the method, in order.
        rungs: the ladder of a method that tries several changes, from the smallest to the largest.
        choice: why that rung was taken, in a sentence; empty if there was no choice.
        price: best results by the share of known samples that may break.
        strength: counts of the patch by strength, from the original weights (0) to the patch (1) and beyond.
        chosen_strength: strength of the accepted patch.
        bounds: limit from calibration data; None without such data or if nothing was accepted.
        change: distance of the candidate's weights, accepted or not, from the old ones.
        hashes: hashes of the weights.
        judge: device and precision of the evaluation.
        seed: seed of the run.
        seconds: wall time by stage, in order.
        versions: versions of the software by name.
        provenance: when and from which model and data the report was made.
        files: paths of the written files by kind: `checkpoint`, `json`, `markdown`.
        settings: arguments of the repair by name, as plain values.
        class_names: names of the task's classes, in order; empty if unknown.
        schema: version of the file format (docs/report_schema.md).
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
    strength: tuple[StrengthPoint, ...] = ()
    chosen_strength: float | None = None
    bounds: CalibrationBounds | None = None
    change: WeightChange | None = None
    hashes: Hashes | None = None
    judge: Judge | None = None
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    provenance: Provenance = field(default_factory=Provenance)
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("leaked", "seconds", "files", "settings"):
            object.__setattr__(self, name, to_plain(getattr(self, name)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the output of `to_dict`.

        Raises:
            ConfigurationError: a value is missing, unknown, infinite or of the wrong type, or another version wrote it.
        """
        found = data.get("schema", SCHEMA) if isinstance(data, Mapping) else SCHEMA
        if type(found) is not int or found != SCHEMA:
            raise ConfigurationError(
                f"schema: expected {SCHEMA}, found {found!r}.",
                "read the report with the version of lightning_nrl that wrote it.",
            )
        return super().from_dict(data)

    @property
    def unseen_splits(self) -> tuple[SplitReport, ...]:
        """Splits of unseen data, in an update against the replaced model; empty if nothing changed."""
        if self.update:
            return tuple(split.now for split in by_role(self.update).get("unseen", ()))
        return tuple(by_role(self.splits).get("unseen", ())) if self.status == "repaired" else ()

    @property
    def unseen(self) -> SplitReport | None:
        return pool(self.unseen_splits) if self.unseen_splits else None

    @property
    def n_estimates(self) -> int:
        """Number of results that held-out samples chose among: rungs, and strengths of a taken exact solution."""
        rungs = [rung for rung in self.rungs if rung.held_out is not None]
        is_exact = any(rung.taken and rung.name == "exact" for rung in rungs)
        strengths = sum(step.name.startswith("convex ") for step in self.steps) if is_exact else 0
        return len(rungs) + max(0, strengths - 1)

    @property
    def held_out(self) -> TargetCounts | None:
        """Held-out counts of the taken rung; None without any, or if nothing was repaired."""
        return next((rung.held_out for rung in self.rungs if rung.taken and self.status == "repaired"), None)

    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if unknown; `-` for none."""
        if label < 0:
            return "-"
        return self.class_names[label] if label < len(self.class_names) else str(label)

    @property
    def path(self) -> list[StrengthPoint]:
        """Counts by ascending strength, from the original weights (0) on."""
        points = sorted(self.strength, key=lambda point: point.strength)
        if points and points[0].strength > 0:
            same = FlipCounts(0, 0, 0, 0)
            points.insert(0, StrengthPoint(0.0, 0, same, None if points[0].calibration is None else same))
        return points

    def pooled(self, role: Role) -> SplitReport | None:
        chosen = by_role(self.splits).get(role)
        return pool(chosen) if chosen else None

    def pooled_update(self, role: Role) -> UpdateSplit | None:
        chosen = by_role(self.update).get(role)
        return pool_updates(chosen) if chosen else None
