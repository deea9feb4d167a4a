"""`Run`, a row of a sweep's table, and the store of rows and weights on disk."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.checkpoint import reason
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.json_records import Derives, flat, from_plain, to_plain
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.records.splits import ROLES, Role

NO_COUNTS = TargetCounts(0, 0, 0, 0)
DERIVED_COUNTS = ("n", "accuracy_before", "accuracy_after")
DIGESTED_RESULTS = ("index", "label", "prediction", "passed", "targeted", "in_target", "weight")


@dataclass(frozen=True)
class Run(Derives):
    """One search with one setting and one seed, and counts of what the found weights repair and
    break.

    Attributes:
        setting: name of the setting. Its values are the fields from `fitness` to `particles`. A
            value is None if the fitness has no `alpha`, the localizer chooses `n_weights`, or all
            passed samples are scored (`n_passed`).
        n_localized: number of searched weights; 0 if the localizer found none.
        value: fitness of the weights found; None if nothing was searched.
        patched: number of repaired targets, as counted by the search.
        intact: number of passed samples scored by the search that stay right.
        known: counts of known samples: columns such as `known_broken` in the table. calibration,
        unseen: the same counts of calibration and unseen samples; None without such data.
        seconds: wall time; runs that were searched and counted together share it equally.
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
        """True if at least one known sample is repaired and none is broken, whether in the target
        or not.
        """
        return self.known.broken == 0 and self.known.repaired > 0

    def has(self, role: Role) -> bool:
        return getattr(self, role) is not None

    def counts(self, role: Role) -> TargetCounts:
        """Returns the counts for `known`, `calibration` or `unseen` data. Without such data, the
        counts are all 0.
        """
        counts: TargetCounts | None = getattr(self, role)
        return counts or NO_COUNTS

    @property
    def derived(self) -> Mapping[str, object]:
        return {
            f"{role}_{name}": getattr(self.counts(role), name) if self.has(role) else None
            for role in ROLES
            for name in DERIVED_COUNTS
        }


_first, *_later = DERIVED_COUNTS
RUN_COLUMNS = (
    *(f.name for f in fields(Run) if f.name not in (*ROLES, "seconds")),
    *(
        f"{role}_{name}"
        for role in ROLES
        for name in (_first, *(f.name for f in fields(TargetCounts)), *_later)
    ),
    "seconds",
)
"""Columns of the table of a sweep."""


def run_of_text(row: Mapping[str, str]) -> Run:
    """Reads a run from a row of `csv.DictReader`. Raises `ConfigurationError` for an invalid row."""
    words = ("setting", "fitness", "layer")
    return from_plain(
        Run, {name: text if name in words else _value(text) for name, text in row.items()}
    )


def _value(text: str) -> object:
    for kind in ({"": None, "True": True, "False": False}.__getitem__, int, float):
        with suppress(
            KeyError, ValueError, TypeError
        ):  # rows of the wrong length have cells that are not text
            return kind(text)
    return text


@dataclass(frozen=True)
class StoredRun:
    """A run and the weights that it found, on the CPU."""

    run: Run
    where: (
        Tensor  # int64, positions of the searched weights in the flattened parameters of the layers
    )
    values: Tensor  # new values of these weights


@dataclass(frozen=True)
class RunStore:
    """Folder with files of runs, created with the first file. If `folder` is None, nothing is
    stored.
    """

    folder: Path | None

    def read(self, wanted: Iterable[str]) -> dict[str, StoredRun]:
        """Returns the wanted runs that are stored, by key. Skips damaged files with a warning."""
        if self.folder is None:
            return {}
        if self.folder.is_file():
            raise ConfigurationError(
                f"`dirpath={str(self.folder)!r}` is a file.",
                "name a folder; it is created if necessary.",
            )
        found: dict[str, StoredRun] = {}
        for path in sorted(self.folder.glob("runs-*.pt")):
            try:
                checksum, _, data = path.read_bytes().partition(b"\n")
                if checksum.decode(errors="replace") != hashlib.sha256(data).hexdigest():
                    raise ConfigurationError("its checksum does not match")
                found |= _unpacked(data)
            except (OSError, ConfigurationError) as error:
                why = str(error).partition("\n")[0]
                problem = f"`dirpath`: {path} cannot be used ({why}); its runs are made again."
                hint = "delete the file; check the disk if this happens again."
                warnings.warn(DataWarning(problem, hint), stacklevel=2)
        keys = set(wanted)
        return {key: run for key, run in found.items() if key in keys}

    def write(self, runs: Mapping[str, StoredRun]) -> None:
        if self.folder is None or not runs:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        data = _packed(runs)
        content = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
        replacing(
            self.folder / f"runs-{digest(sorted(runs))[:16]}.pt",
            lambda part: part.write_bytes(content),
        )


def digest(value: Any) -> str:
    """Returns the SHA-256 of a value made of dicts, lists, text and numbers."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()


def results_digest(results: SampleResults) -> str:
    """Returns the SHA-256 of samples and results. Losses are first rounded to about three digits."""
    found = hashlib.sha256(repr((results.splits, results.sizes)).encode())
    for name in DIGESTED_RESULTS:
        found.update(getattr(results, name).numpy().tobytes())
    found.update(results.loss.half().numpy().tobytes())
    return found.hexdigest()


def gather_runs(mine: Mapping[str, StoredRun], collective: Collective) -> dict[str, StoredRun]:
    """Gathers the runs of all ranks."""
    if collective.world_size == 1:
        return dict(mine)
    packed = torch.frombuffer(bytearray(_packed(mine)), dtype=torch.uint8)
    return {
        key: run
        for rank in collective.gather(packed)
        for key, run in _unpacked(rank.numpy().tobytes()).items()
    }


def _packed(runs: Mapping[str, StoredRun]) -> bytes:
    out = io.BytesIO()
    torch.save(
        {key: {**vars(stored), "run": to_plain(stored.run)} for key, stored in runs.items()}, out
    )
    return out.getvalue()


def _unpacked(data: bytes) -> dict[str, StoredRun]:
    """Reads runs as data, never as code. Raises `ConfigurationError` for any other content."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return {str(key): _stored_run(**one) for key, one in found.items()}
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"it holds no runs ({reason(error)})") from error


def _stored_run(run: Any, where: Any, values: Any) -> StoredRun:
    if (
        where.dtype != torch.int64
        or where.ndim != 1
        or where.shape != values.shape
        or not values.is_floating_point()
    ):
        raise ConfigurationError("its weights and their positions do not match")
    return StoredRun(from_plain(Run, run), where, values)
