"""The account of one repair: what was asked, what was done, what it did to every split, and which weights are meant."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from platform import python_version
from typing import Any, Literal

from lightning_nrl._utils.serialize import dumps, plain
from lightning_nrl.evaluation.flips import FlipCounts
from lightning_nrl.report.calibration import CalibrationBounds, SliceLimit, calibration_words, slices_table
from lightning_nrl.report.document import Block, Facts, Heading, Page, Shown, Text, Tone
from lightning_nrl.report.slice_reports import SetAside, SliceReport, aside_facts, slice_table
from lightning_nrl.report.splits import Role, SplitReport, pool
from lightning_nrl.report.stages import Hashes, LocalizationReport, SearchReport, Step
from lightning_nrl.report.strength import StrengthPoint, strength_table
from lightning_nrl.report.tables import (
    change_words,
    from_here,
    hash_facts,
    id_facts,
    localization_words,
    outcome_table,
    rates_table,
    search_words,
    sentence,
    setting_facts,
    steps_table,
    unchanged_table,
)
from lightning_nrl.report.updates import UpdateSplit, pool_updates, update_table
from lightning_nrl.report.weight_change import WeightChange

__all__ = ["RepairReport", "Status", "installed_versions"]

Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]
TONES: dict[Status, Tone] = {"repaired": "good", "refused": "warn", "not repaired": "warn", "nothing to repair": "good"}
USUAL = "Multiclass"
FILES = {"json": "report (JSON)", "markdown": "report (Markdown)"}
PARTS = {"localization": LocalizationReport, "search": SearchReport, "change": WeightChange, "hashes": Hashes}


def installed_versions() -> dict[str, str]:
    """Versions of the software that a repair depends on, by name."""
    found = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@dataclass(frozen=True)
class RepairReport(Shown):
    """The account of one repair. `rich.print(report)` shows it as a table.

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
        candidate: what the refused weights would have done to the known splits; empty if none were refused.
        localization: which weights were searched; None if that stage was not reached.
        search: how the search went; None if that stage was not reached.
        steps: what the method did, in order.
        strength: what the patch that was found does on the way from the original weights (0) to it (1) and beyond.
        chosen_strength: how much of the patch was taken; None if that stage was not reached.
        bounds: what calibration data say of the accepted model; None without them, or if nothing was accepted.
        change: how far the candidate's weights, accepted or not, are from the old ones; None if there was no candidate.
        hashes: which weights are meant.
        seed: what reproduces the run.
        seconds: wall time by stage, in order.
        versions: versions of the software by name.
        files: paths of what was written, by kind: `checkpoint`, `json`, `markdown`.
        settings: the arguments of the repair by name; kept as plain values.
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
    localization: LocalizationReport | None = None
    search: SearchReport | None = None
    steps: tuple[Step, ...] = ()
    strength: tuple[StrengthPoint, ...] = ()
    chosen_strength: float | None = None
    bounds: CalibrationBounds | None = None
    change: WeightChange | None = None
    hashes: Hashes | None = None
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seconds", "files", "settings"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    def pooled(self, role: Role) -> SplitReport | None:
        """All splits of a role taken together; None if there is none."""
        chosen = [split for split in self.splits if split.role == role]
        return pool("all", chosen) if chosen else None

    def pooled_update(self, role: Role) -> UpdateSplit | None:
        """All splits of a role against the replaced model, taken together; None if there is none."""
        chosen = [split for split in self.update if split.role == role]
        return pool_updates(chosen) if chosen else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers; a split also gets the numbers that follow from its counts."""
        own = plain(self)
        for name in ("splits", "candidate"):
            for split, data in zip(getattr(self, name), own[name], strict=True):
                data.update(split.numbers)
        for split, data in zip(self.update, own["update"], strict=True):
            data["trained"].update(split.trained.numbers)
            data["now"].update(split.now.numbers)
        return own

    def to_json(self) -> str:
        """Strict JSON: a number that is not finite is null."""
        return dumps(self.to_dict()) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RepairReport:
        """Reads what `to_dict` gives. What it does not know is left out, so that later versions can be read."""
        own = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        own["layers"] = tuple(own["layers"])
        for name in ("splits", "candidate"):
            own[name] = tuple(_read(SplitReport, split) for split in own.get(name, ()))
        own["update"] = tuple(
            UpdateSplit(*(_read(SplitReport, split[name]) for name in ("trained", "now")))
            for split in own.get("update", ())
        )
        own["slices"] = tuple(_read(SliceReport, one) for one in own.get("slices", ()))
        own["set_aside"] = tuple(_read(SetAside, one) for one in own.get("set_aside", ()))
        own["steps"] = tuple(_read(Step, step) for step in own.get("steps", ()))
        own["strength"] = tuple(_read_point(point) for point in own.get("strength", ()))
        for name, kind in PARTS.items():
            own[name] = None if own.get(name) is None else _read(kind, own[name])
        if own.get("bounds") is not None:
            slices = tuple(_read(SliceLimit, part) for part in own["bounds"].get("slices", ()))
            own["bounds"] = replace(_read(CalibrationBounds, own["bounds"]), slices=slices)
        return cls(**own)

    @classmethod
    def from_json(cls, text: str) -> RepairReport:
        """Reads what `to_json` gives; a null in place of a number is NaN."""
        return cls.from_dict(json.loads(text))

    def to_markdown(self) -> str:
        """What a reviewer reads: the verdict, a table of the splits, then everything else."""
        return Page((*self._verdict(), *self._tables(), *self._details())).markdown()

    def to_table(self) -> Page:
        """The verdict, a table of the splits and the facts that one needs next, for rich's `print`."""
        facts = Facts((*self._facts(), *self._written(from_here)))
        return Page((*self._verdict(), *self._tables(), *self._calibrated(), *self._course(), facts))

    def _verdict(self) -> tuple[Block, ...]:
        changed = "" if self.status == "repaired" else " The model's weights are unchanged."
        return Heading(self.status.capitalize(), 1, TONES[self.status]), Text(sentence(self.reason) + changed)

    def _tables(self) -> tuple[Block, ...]:
        if not self.update:
            return (*self._outcome(), *self._slices())
        against = Heading("Against the model that it replaces"), update_table(self.update)
        return (*against, Heading("Against the new model as it was trained"), *self._outcome(), *self._slices())

    def _slices(self) -> tuple[Block, ...]:
        """A row a slice, where there are any."""
        return (Heading("By slice"), slice_table(self.slices)) if self.slices else ()

    def _calibrated(self) -> tuple[Block, ...]:
        """The limit of each slice of the calibration data."""
        if self.bounds is None or not self.bounds.slices:
            return ()
        return Heading("Calibration data, slice by slice"), slices_table(self.bounds)

    def _outcome(self) -> tuple[Block, ...]:
        if self.status == "repaired":
            return (outcome_table(self.splits),)
        unchanged = unchanged_table(self.splits)
        if not self.candidate:
            return (unchanged,)
        refused = Heading("What the refused weights would have done"), outcome_table(self.candidate)
        return (*refused, Heading("The model as it is"), unchanged)

    def _course(self) -> tuple[Block, ...]:
        """The steps of a method that makes several."""
        return (Heading("What the method did"), steps_table(self.steps)) if len(self.steps) > 1 else ()

    def _facts(self) -> tuple[tuple[str, str], ...]:
        facts = [("target", self.target), ("layer", ", ".join(self.layers)), ("gate", self.gate)]
        # Of classes everybody knows what right is.
        facts += [] if self.task == USUAL else [("right means", self.task)]
        if self.set_aside:
            facts.append(("set aside", f"{len(self.set_aside):,} failed samples, {self.set_aside[0].why}"))
        if self.localization is not None:
            facts.append(("weights searched", localization_words(self.localization)))
        if self.search is not None:
            facts.append(("search", search_words(self.search, self.seconds.get("search"))))
        if self.chosen_strength not in (None, 1.0):
            facts.append(("strength", f"{self.chosen_strength:g} of the change that was found"))
        if self.bounds is not None:
            facts += calibration_words(self.bounds)
        if self.change is not None:
            facts.append(
                ("weights changed" if self.status == "repaired" else "would change", change_words(self.change))
            )
        return tuple(facts)

    def _written(self, shown: Callable[[str], str] = str) -> tuple[tuple[str, str], ...]:
        return tuple((FILES.get(kind, kind), shown(path)) for kind, path in self.files.items())

    def _details(self) -> tuple[Block, ...]:
        shown = self.candidate or self.splits
        run = [("task", self.task)] if self.task == USUAL else []
        run.append(("seed", str(self.seed)))
        run += [(f"seconds to {stage}", f"{seconds:,.2f}") for stage, seconds in self.seconds.items()]
        run += self.versions.items()
        blocks: list[Block] = [*self._calibrated(), Heading("What was done"), Facts((*self._facts(), *self._written()))]
        if self.steps:
            blocks += [Heading("What the method did"), steps_table(self.steps)]
        if self.strength:
            path = strength_table(self.strength, self.chosen_strength)
            blocks += [Heading("From the original weights (0) to the change that was found (1)"), path]
        if self.status == "repaired" or self.candidate:
            blocks += [Heading("Samples, by position in their data set"), Facts(id_facts(shown, "report.json"))]
            blocks += [Heading("Rates"), rates_table(shown)]
        if self.set_aside:
            blocks += [Heading("Failures that were set aside"), Facts(aside_facts(self.set_aside))]
        if self.hashes is not None:
            blocks += [Heading("Weights"), Facts(hash_facts(self.hashes))]
        blocks += [Heading("Run"), Facts(tuple(run))]
        if self.settings:
            blocks += [Heading("Settings"), Facts(setting_facts(self.settings))]
        return tuple(blocks)


def _read_point(data: Mapping[str, Any]) -> StrengthPoint:
    aside = data.get("calibration")
    return StrengthPoint(
        data["strength"],
        data["repaired_in_target"],
        _read(FlipCounts, data["known"]),
        None if aside is None else _read(FlipCounts, aside),
        data.get("polished", False),
        *(data.get(name) for name in ("gain", "harm", "harm_aside")),
    )


def _read(kind: type[Any], data: Mapping[str, Any]) -> Any:
    own = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    for f in fields(kind):
        if f.type == "float" and own.get(f.name, 0.0) is None:
            own[f.name] = math.nan
        elif str(f.type).startswith("tuple"):
            own[f.name] = tuple(own.get(f.name, ()))
    if "history" in own:
        own["history"] = {name: [math.nan if x is None else x for x in curve] for name, curve in own["history"].items()}
    return kind(**own)
