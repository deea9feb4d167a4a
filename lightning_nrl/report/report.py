"""The account of one repair: what was asked, what was done, what it did to every split, and which weights are meant."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import metadata
from platform import python_version
from typing import Any, Literal

from lightning_nrl.localization.localization import Localization
from lightning_nrl.report.split import SplitReport, pool
from lightning_nrl.report.weights import WeightChange
from lightning_nrl.search.result import SearchResult

__all__ = ["Hashes", "LocalizationReport", "RepairReport", "SearchReport", "Status", "versions"]

Status = Literal["repaired", "refused", "not repaired", "nothing to repair"]


@dataclass(frozen=True)
class LocalizationReport:
    """Which weights were searched.

    Attributes:
        requested: the number of weights that was asked for (#lw); None if `n_g` was given.
        n_g: how many top weights each of the four sets had.
        sizes: sizes of the sets on the way, as in `Localization.sizes`.
    """

    requested: int | None
    n_g: int
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, localization: Localization) -> LocalizationReport:
        """Everything but the positions of the weights."""
        return cls(localization.requested, localization.n_g, dict(localization.sizes))


@dataclass(frozen=True)
class SearchReport:
    """How the search went.

    Attributes:
        iterations: how many steps were made.
        stopped: why the search ended, in words.
        fitness: that of the best candidate.
        original_fitness: that of the unchanged weights.
        history: the curves of `SearchHistory` by name, one number an iteration.
        n_failed: failed samples that every candidate was scored on, |I_neg|; None if that was not noted.
        n_passed: passed samples that every candidate was scored on, |I_pos|; None if that was not noted.
    """

    iterations: int
    stopped: str
    fitness: float
    original_fitness: float
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    n_failed: int | None = None
    n_passed: int | None = None

    @classmethod
    def of(cls, result: SearchResult, n_failed: int | None = None, n_passed: int | None = None) -> SearchReport:
        """Everything but the candidate itself."""
        curves = {curve.name: getattr(result.history, curve.name).tolist() for curve in fields(result.history)}
        return cls(
            result.iterations, result.stopped, result.fitness, result.original_fitness, curves, n_failed, n_passed
        )


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of weights, see `hash_tensors`.

    Attributes:
        layers_before: the repaired layers as training left them.
        layers_after: the repaired layers as they are now; the same if the weights stay.
        model_before: the whole state dict as training left it, if it was hashed.
        model_after: the whole state dict as it is now, if it was hashed.
    """

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None


@dataclass(frozen=True)
class RepairReport:
    """The account of one repair.

    Attributes:
        status: `repaired`, `refused` by the gate, `not repaired` or `nothing to repair`; the weights changed in the first
            case alone.
        reason: why, in a sentence or two, with figures.
        layers: dotted names of the layers that were to be changed.
        target: which failures were to be repaired, in words.
        gate: what a repair must satisfy, as text.
        task: what right and wrong mean, in words.
        splits: what became of the samples of each split under the weights that the model has now.
        candidate: what the refused weights would have done to the known splits; empty if none were refused.
        localization: which weights were searched; None if that stage was not reached.
        search: how the search went; None if that stage was not reached.
        change: how far the candidate's weights, accepted or not, are from the old ones; None if there was no candidate.
        hashes: which weights are meant.
        seed: what reproduces the run.
        seconds: wall time by stage, in order.
        versions: versions of the software by name.
        files: paths of what was written, by kind.
        settings: the arguments of the repair by name, as plain values.
    """

    status: Status
    reason: str
    layers: tuple[str, ...]
    target: str
    gate: str
    task: str
    splits: tuple[SplitReport, ...]
    candidate: tuple[SplitReport, ...] = ()
    localization: LocalizationReport | None = None
    search: SearchReport | None = None
    change: WeightChange | None = None
    hashes: Hashes | None = None
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def pooled(self, role: Literal["known", "unseen"]) -> SplitReport | None:
        """All splits of a role taken together; None if there is none."""
        chosen = [split for split in self.splits if split.role == role]
        return pool(f"all {role}", chosen) if chosen else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a split also gets what follows from its counts."""
        return _plain(self)

    def to_json(self) -> str:
        """Strict JSON: what is not finite is null."""
        return json.dumps(_strict(self.to_dict()), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RepairReport:
        """Reads what `to_dict` gives."""
        own = {key: value for key, value in data.items() if key in {f.name for f in fields(cls)}}
        own["layers"] = tuple(own["layers"])
        for name in ("splits", "candidate"):
            own[name] = tuple(_read(SplitReport, split) for split in own.get(name, ()))
        parts = {
            "localization": LocalizationReport,
            "search": SearchReport,
            "change": WeightChange,
            "hashes": Hashes,
        }
        for name, part in parts.items():
            own[name] = None if own.get(name) is None else _read(part, own[name])
        return cls(**own)

    @classmethod
    def from_json(cls, text: str) -> RepairReport:
        """Reads what `to_json` gives; a null where a number belongs becomes NaN."""
        return cls.from_dict(json.loads(text))


def versions() -> dict[str, str]:
    """Versions of the software that repairs depend on."""
    found = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, SplitReport):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return (
            own
            | {"n": value.n, "accuracy_before": value.accuracy_before, "accuracy_after": value.accuracy_after}
            | {"rates": value.rates}
        )
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: type, data: Mapping[str, Any]) -> Any:
    own = {}
    for f in fields(kind):
        if f.name not in data:
            continue
        value = data[f.name]
        if value is None and f.type == "float":
            value = math.nan
        elif isinstance(value, list):
            value = tuple(value)
        own[f.name] = value
    return kind(**own)
