"""The account of a repair as data, without the weights themselves: `RepairRecord` and what it holds, stage by stage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import Self

from lightning_nrl._utils.json_records import Record, to_plain
from lightning_nrl._utils.state import current_state, hash_file
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import FlipCounts, SampleResults, TargetCounts
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


def installed_versions() -> dict[str, str]:
    """Versions of the software that a repair depends on, by name."""
    found = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found | ({"lightning_nrl commit": commit} if (commit := _commit()) else {})


@lru_cache(maxsize=1)
def _commit() -> str:
    """The commit of lightning_nrl where it runs from a checkout, with `-dirty` if files were changed; else empty."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""


@dataclass(frozen=True)
class DataIdentity:
    """How many samples a split has, and the SHA-256 of their ids and labels, in order."""

    n: int
    sha256: str

    @classmethod
    def of(cls, results: SampleResults, split: str) -> Self:
        rows = results.of(split)
        table = torch.stack([results.index[rows], results.label[rows]], 1).cpu()
        return cls(len(table), hashlib.sha256(table.contiguous().numpy().astype("<i8").tobytes()).hexdigest())


@dataclass(frozen=True)
class Provenance:
    """When a result was made, of which model and which data, by split.

    `made` is in UTC, or what the variable SOURCE_DATE_EPOCH says, and is not compared. `checkpoint` is the path of the
    file that the weights were loaded from, empty if they were trained or in memory. `n_layers` is the number of modules
    with parameters or buffers of their own.
    """

    made: str = field(default="", compare=False)
    module: str = ""
    n_layers: int = 0
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    data: Mapping[str, DataIdentity] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *results: SampleResults) -> Self:
        """Identifies a model, and the data that it was evaluated on, now."""
        when = datetime.fromtimestamp(float(os.environ.get("SOURCE_DATE_EPOCH", time.time())), timezone.utc)
        kind, layers = type(model), {name.rpartition(".")[0] or name for name in current_state(model)}
        data = {split: DataIdentity.of(one, split) for one in results for split in one.splits}
        made = when.isoformat(sep=" ", timespec="seconds")
        return cls(made, f"{kind.__module__}.{kind.__qualname__}", len(layers), data=data)

    def loaded_from(self, path: str | Path | None) -> Self:
        """Adds the checkpoint that the weights were loaded from, if there is one."""
        digest = hash_file(Path(path)) if path and Path(path).is_file() else ""
        return replace(self, checkpoint=str(path or ""), checkpoint_sha256=digest)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What is known, each under its name."""
        checkpoint = f"{self.checkpoint} {self.checkpoint_sha256 and f'(sha256 {self.checkpoint_sha256})'}".strip()
        facts = [("made", self.made), ("class of the model", self.module), ("weights loaded from", checkpoint)]
        facts += [(f"data: {split}", f"{one.n:,} samples, sha256 {one.sha256}") for split, one in self.data.items()]
        return tuple((name, value) for name, value in facts if value)


@dataclass(frozen=True)
class Judge:
    """In what the model was computed that was judged, and how many verdicts hang on it.

    `rounding` is an estimate of how far rounding may move a margin there, None where the task has no margins. The model
    of now gets `n_borderline` known samples right by less: another device or batch size may see them wrong.
    """

    precision: DeployedPrecision
    rounding: float | None = None
    n_borderline: int = 0


@dataclass(frozen=True)
class Step:
    """One step of a method, such as `fit`: targeted samples that pass after it, known passed ones that do not."""

    name: str
    repaired: int
    broken: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Rung:
    """One rung of the default's ladder, from the least change to the most; `taken` if the repair is this one.

    It is the `search` of localised weights of the chosen layer, its `exact` programmes, or `training` that goes on.
    `repaired` and `broken` are of all known samples; `held_out` counts known samples that it had not used by then,
    None where there are none.
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
    """The best result within a number of broken known samples: the price of the guarantee.

    `allowed` is the share of the known passed samples that may, from 0; 1: any number. The counts are those of `Rung`.
    """

    allowed: float
    broken: int
    repaired_in_target: int
    repaired: int
    held_out: TargetCounts | None = None


@dataclass(frozen=True)
class LocalizationReport:
    """Which weights were searched; the attributes are those of `Localization`.

    `requested` is the number that was asked for (#lw), None if `n_g`, that of the top weights of each set, was given.
    """

    requested: int | None
    n_g: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class SearchReport:
    """Course of a search: the steps made, why it `stopped`, and the fitness of the best candidate.

    `history` has the curves of `SearchHistory` by name, one number an iteration. Every candidate was scored on
    `n_failed` failed samples, |I_neg|, and `n_passed` passed ones, |I_pos|; None if not noted.
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
        """The history, with the broken samples that follow from the `intact` ones."""
        intact = self.history.get("intact")
        if self.n_passed is None or intact is None:
            return dict(self.history)
        return {**self.history, "broken": [self.n_passed - value for value in intact]}


@dataclass(frozen=True)
class Hashes:
    """SHA-256 (`hash_tensors`) of the repaired layers, and of the whole state dict, as training left them and now."""

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None


@dataclass(frozen=True)
class StrengthPoint:
    """Counts of a patch on known and calibration data at one strength: 0 for the original weights and 1 for the patch.

    The counts of a `polished` point are those after its polish. `gain` is what the repaired targets are worth, and
    `harm` what the broken known samples cost by the gate, None: as many as they are; `calibration_harm` likewise.
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
    """The difference between two versions of the same tensors: how many of all weights `changed`, and how far.

    `l2` is the Euclidean norm, `relative` that over the norm of the old weights, `largest` the largest absolute change.
    """

    changed: int
    total: int
    l2: float
    relative: float
    largest: float


@dataclass(frozen=True)
class CalibrationBounds(Bound):
    """Broken calibration samples, and a limit for others like them.

    The data might have chosen one of `states` sets of weights, 1 if they had no say. If strengths were accepted from
    weak to strong while at most `allowed` samples broke, the limit is that of this count.
    """

    states: int = 1
    allowed: int | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if self.allowed is not None:
            text += (
                f" (the limit of {self.allowed:,} broken, up to which each strength was accepted, the weakest first)"
            )
        elif self.states > 1:
            text += f" (it holds for each of {self.states:,} sets of weights that these data might have chosen)"
        return text


CUT = "cut by `max_time`"
"""Note of a step that had no time to finish."""
Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]
"""How a repair ended."""
SCHEMA = 1  # the version of the form in which reports are written; docs/report_schema.md describes it


@dataclass(frozen=True, repr=False)
class RepairRecord(Record):
    """The data of a `RepairReport`.

    Attributes:
        status: `repaired`, `refused` by the gate, `not repaired` or `nothing to repair`.
        reason: why, in a sentence or two, with figures.
        layers: dotted names of the layers that were to be changed.
        target: which failures were to be repaired, in words; likewise `gate` and `task`.
        splits: what became of the samples of each split under the weights that the model has now.
        update: the new model against the one that it replaces, by split; empty if it replaces none.
        slices: what became of each slice and role; of refused weights what they would have done to known data.
        set_aside: failed samples in the target that were set aside, and why.
        leaked: by unseen split with any, how many of its samples are known or calibration data too.
        candidate: what the refused weights would have done to the known splits; empty if none were refused.
        localization: which weights were searched; None if that stage was not reached, as of all that follow.
        search: how the search went.
        steps: what the method did, in order.
        rungs: of a method that tries several, from the least change to the most; the taken one is marked.
        choice: why that one, in a sentence; empty where there was no choice.
        price: what was found where some known samples may break, from none to any number.
        strength: what the patch that was found does on the way from the original weights (0) to it (1) and beyond.
        chosen_strength: how much of the patch was taken.
        bounds: what calibration data say of the accepted model; None without them, or if nothing was accepted.
        change: how far the candidate's weights, accepted or not, are from the old ones.
        hashes: which weights are meant.
        judge: the device and the precision in which the model was judged.
        seed: what reproduces the run.
        seconds: wall time by stage, in order; `versions` of the software by name.
        provenance: when it was made, of which model and data.
        files: paths of what was written, by kind: `checkpoint`, `json`, `markdown`.
        settings: the arguments of the repair by name; kept as plain values.
        class_names: of the task's classes, in their order; empty where they are not known.
        schema: the version of the form in which it is written (docs/report_schema.md).
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
        """Reads what `to_dict` gives.

        Raises:
            ConfigurationError: something is missing, unknown, of another type or infinite; the message names the place.
                Another version wrote it.
        """
        found = data.get("schema", SCHEMA) if isinstance(data, Mapping) else SCHEMA
        if type(found) is not int or found != SCHEMA:
            raise ConfigurationError(
                f"schema: expected {SCHEMA}, found {found!r}.",
                "read the report with the version of lightning_nrl that wrote it.",
            )
        return super().from_dict(data)

    def __repr__(self) -> str:
        """One line: how it ended, and the counts of known and unseen data."""
        pooled = [(role, pool(splits)) for role, splits in by_role(self.splits).items()]
        counts = [f"{role} {split.repaired} repaired, {split.broken} broken of {split.n}" for role, split in pooled]
        return f"<RepairReport: {'; '.join((self.status, *counts))}>"

    @property
    def unseen_splits(self) -> tuple[SplitReport, ...]:
        """Splits of unseen data, in an update against the replaced model; empty where there is no change."""
        if self.update:
            return tuple(split.now for split in by_role(self.update).get("unseen", ()))
        return tuple(by_role(self.splits).get("unseen", ())) if self.status == "repaired" else ()

    @property
    def unseen(self) -> SplitReport | None:
        """All unseen data taken together; None without any."""
        return pool(self.unseen_splits) if self.unseen_splits else None

    @property
    def n_estimates(self) -> int:
        """Results that held-out samples chose among: rungs, and strengths of the exact solution if that is taken."""
        rungs = [rung for rung in self.rungs if rung.held_out is not None]
        is_exact = any(rung.taken and rung.name == "exact" for rung in rungs)
        strengths = sum(step.name.startswith("convex ") for step in self.steps) if is_exact else 0
        return len(rungs) + max(0, strengths - 1)

    @property
    def held_out(self) -> TargetCounts | None:
        """Held-out counts of the taken rung; None if that was not tried, or nothing was repaired."""
        return next((rung.held_out for rung in self.rungs if rung.taken and self.status == "repaired"), None)

    def class_name(self, label: int) -> str:
        """Returns the name of a class, else its number; `-` for none."""
        if label < 0:
            return "-"
        return self.class_names[label] if label < len(self.class_names) else str(label)

    @property
    def path(self) -> list[StrengthPoint]:
        """The counted strengths, ascending, from the original weights (0) on, under which nothing flips."""
        points = sorted(self.strength, key=lambda point: point.strength)
        if points and points[0].strength > 0:
            same = FlipCounts(0, 0, 0, 0)
            points.insert(0, StrengthPoint(0.0, 0, same, None if points[0].calibration is None else same))
        return points

    def pooled(self, role: Role) -> SplitReport | None:
        """All splits of a role taken together; None if there is none."""
        chosen = by_role(self.splits).get(role)
        return pool(chosen) if chosen else None

    def pooled_update(self, role: Role) -> UpdateSplit | None:
        """Returns the pooled counts against the replaced model."""
        chosen = by_role(self.update).get(role)
        return pool_updates(chosen) if chosen else None
