"""The account of one repair as data: what was asked, what was done, what it did to every split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import Self

from lightning_nrl._utils.json_records import Record, to_plain
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.report.page import Tone
from lightning_nrl.report.run_records import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    PricePoint,
    Rung,
    SearchReport,
    Step,
    StrengthPoint,
    WeightChange,
    installed_versions,
)
from lightning_nrl.report.splits import ROLES, Role, SetAside, SliceReport, SplitReport, UpdateSplit, pool, pool_updates

Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]
"""How a repair ended."""
SCHEMA = 1
"""The version of the form in which reports are written; docs/report_schema.md describes it."""


@dataclass(frozen=True, repr=False)
class RepairRecord(Record):
    """The data of a `RepairReport`.

    Attributes:
        status: `repaired`, `refused` by the gate, `not repaired` or `nothing to repair`; the first alone changes
            weights.
        reason: why, in a sentence or two, with figures.
        layers: dotted names of the layers that were to be changed.
        target: which failures were to be repaired, in words.
        gate: what a repair must satisfy, as text.
        task: what right and wrong mean, in words.
        splits: what became of the samples of each split under the weights that the model has now.
        update: the new model against the one that it replaces, by split; empty if it replaces none.
        slices: what became of the samples of each slice and role; of refused weights what they would have done to known
            data. Empty where no slices were asked for.
        set_aside: failed samples in the target that were set aside, and why.
        leaked: by unseen split, how many of its samples are known or calibration data too; splits without any are left
            out.
        candidate: what the refused weights would have done to the known splits; empty if none were refused.
        localization: which weights were searched; None if that stage was not reached.
        search: how the search went; None if that stage was not reached.
        steps: what the method did, in order.
        rungs: of a method that tries several, from the least change to the most; the taken one is marked.
        choice: why that one, in a sentence; empty where there was no choice.
        price: what was found where some known samples may break, from none to any number.
        strength: what the patch that was found does on the way from the original weights (0) to it (1) and beyond.
        chosen_strength: how much of the patch was taken; None if that stage was not reached.
        bounds: what calibration data say of the accepted model; None without them, or if nothing was accepted.
        change: how far the candidate's weights, accepted or not, are from the old ones; None if there was no candidate.
        hashes: which weights are meant.
        judge: the device and the precision in which the model was judged; None if that is not known.
        seed: what reproduces the run.
        seconds: wall time by stage, in order.
        versions: versions of the software by name.
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
        counts = []
        for role in ROLES:
            split = self.pooled(role)
            if split is not None:
                counts.append(f"{role} {split.repaired} repaired, {split.broken} broken of {split.n}")
        return f"<RepairReport: {'; '.join((self.status, *counts))}>"

    @property
    def tone(self) -> Tone:
        """The colour of the verdict: `good` or `warn`."""
        return "good" if self.status in ("repaired", "nothing to repair") else "warn"

    def class_name(self, label: int) -> str:
        """What a class is called: its name where that is known, else its number; `-` for none."""
        if label < 0:
            return "-"
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def pooled(self, role: Role) -> SplitReport | None:
        """All splits of a role taken together; None if there is none."""
        chosen = [split for split in self.splits if split.role == role]
        return pool(chosen) if chosen else None

    def pooled_update(self, role: Role) -> UpdateSplit | None:
        """All splits of a role against the replaced model, taken together; None if there is none."""
        chosen = [split for split in self.update if split.role == role]
        return pool_updates(chosen) if chosen else None
