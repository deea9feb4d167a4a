"""`Run`, a row of a sweep's table, and the store of rows and weights on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.json_records import Derives, flat, from_plain, required_fields
from lightning_nrl._utils.resume import from_bytes, to_bytes
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import NO_COUNTS, SampleResults, TargetCounts
from lightning_nrl.pipeline.plain_values import text_hash
from lightning_nrl.records.splits import ROLES, Role

ACCURACIES = ("accuracy_before", "accuracy_after")


@dataclass(frozen=True)
class Run(Derives):
    """One search with one setting and one seed, and counts of what its weights repair and break.

    Attributes:
        setting: name of the setting. Its values are the fields from `fitness` to `particles`. A
            value is None if the fitness has no `alpha`, the localizer chooses `n_weights`, or all
            passed samples are scored (`n_passed`).
        n_localized: number of searched weights; 0 if the localizer found none.
        value: fitness of the weights found; None if nothing was searched.
        patched: number of repaired targets, as counted by the search.
        intact: number of passed samples scored by the search that stay right.
        known: counts of known samples: columns such as `known_broken` in the table.
        calibration: the same counts of calibration samples; None without calibration data.
        unseen: the same counts of unseen samples; None without unseen data.
        seconds: wall time of search and counts.
    """

    setting: str
    fitness: str
    alpha: float | None
    perfect_intact: bool
    n_weights: int | None
    n_passed: int | None
    particles: int
    seed: int
    layer: str
    n_localized: int
    iterations: int
    value: float | None
    patched: int
    intact: int
    changed: bool
    known: TargetCounts = field(metadata=flat("known_"))
    calibration: TargetCounts | None = field(default=None, metadata=flat("calibration_"))
    unseen: TargetCounts | None = field(default=None, metadata=flat("unseen_"))
    seconds: float = 0.0

    @property
    def regression_free(self) -> bool:
        """True if at least one known sample is repaired and none broken, in the target or not."""
        return self.known.broken == 0 and self.known.repaired > 0

    @property
    def counts_by_role(self) -> dict[Role, TargetCounts | None]:
        return {"known": self.known, "calibration": self.calibration, "unseen": self.unseen}

    def has(self, role: Role) -> bool:
        return self.counts_by_role[role] is not None

    def counts(self, role: Role) -> TargetCounts:
        """Returns the counts for a role; all 0 without such data."""
        return self.counts_by_role[role] or NO_COUNTS

    @property
    def derived(self) -> Mapping[str, object]:
        derived = {}
        for role in ROLES:
            counts = self.counts(role)
            for name, number in (
                ("n", counts.n),
                ("accuracy_before", counts.accuracy_before),
                ("accuracy_after", counts.accuracy_after),
            ):
                derived[f"{role}_{name}"] = number if self.has(role) else None
        return derived


def _columns() -> Iterator[str]:
    for f in fields(Run):
        if f.name in ROLES:
            yield from (
                f"{f.name}_{name}" for name in ("n", *required_fields(TargetCounts), *ACCURACIES)
            )
        elif f.name != "seconds":
            yield f.name
    yield "seconds"


RUN_COLUMNS = tuple(_columns())
"""Columns of the table of a sweep."""


def run_of_text(row: Mapping[str, str]) -> Run:
    """Reads a run from a row of `csv.DictReader`.

    Raises:
        ConfigurationError: the row is invalid.
    """
    values = {}
    for name, text in row.items():
        values[name] = text if name in ("setting", "fitness", "layer") else _value(text)
    return from_plain(Run, values)


def _value(text: str) -> object:
    constants = {"": None, "True": True, "False": False}
    for parse in (constants.__getitem__, int, float):
        # Rows of the wrong length have cells that are no text.
        with suppress(KeyError, ValueError, TypeError):
            return parse(text)
    return text


@dataclass(frozen=True)
class StoredRun:
    """A run and the weights that it found, on the CPU."""

    run: Run
    where: Tensor  # int64, positions of the searched weights in the layers' flattened parameters
    values: Tensor  # new values of these weights


@dataclass(frozen=True)
class RunStore:
    """Folder with files of runs, created before the first run.

    If `folder` is None, nothing is stored.
    """

    folder: Path | None

    def read(self, wanted: Iterable[str]) -> dict[str, StoredRun]:
        """Returns the wanted runs that are stored, by key. Skips damaged files with a warning."""
        if self.folder is None:
            return {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"`dirpath={str(self.folder)!r}` is no folder and cannot be made one ({error}).",
                "name a folder; it is created if necessary.",
            ) from error
        stored: dict[str, StoredRun] = {}
        for path in sorted(self.folder.glob("runs-*.pt")):
            try:
                stored |= from_bytes(path.read_bytes(), dict[str, StoredRun])
            except (OSError, ValueError) as error:
                warnings.warn(
                    DataWarning(
                        f"`dirpath`: {path} cannot be used ({error}); its runs are made again.",
                        "delete the file; check the disk if this happens again.",
                    ),
                    stacklevel=2,
                )
        return {key: stored[key] for key in wanted if key in stored}

    def write(self, runs: Mapping[str, StoredRun]) -> None:
        if self.folder is None or not runs:
            return
        content = to_bytes(dict(runs))
        path = self.folder / f"runs-{text_hash(sorted(runs))[:16]}.pt"
        replacing(path, lambda part: part.write_bytes(content))


def results_digest(results: SampleResults) -> str:
    """Returns the SHA-256 of samples and results, with losses rounded to about three digits."""
    sha = hashlib.sha256(repr((results.splits, results.sizes)).encode())
    for column in (
        results.index,
        results.label,
        results.prediction,
        results.passed,
        results.targeted,
        results.in_target,
        results.weight,
        results.loss.half(),
    ):
        sha.update(column.numpy().tobytes())
    return sha.hexdigest()
