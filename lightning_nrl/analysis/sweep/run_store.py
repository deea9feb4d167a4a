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
from lightning_nrl.report.splits import ROLES, Role

NO_COUNTS = TargetCounts(0, 0, 0, 0)
DERIVED_COUNTS = ("n", "accuracy_before", "accuracy_after")
DIGESTED_RESULTS = ("index", "label", "prediction", "passed", "targeted", "in_target", "weight")


@dataclass(frozen=True)
class Run(Derives):
    """One search with one seed, and counts of its weights in the deployed model.

    Attributes:
        setting: label of the setting, described by the columns from `fitness` to `particles`; None there stands for no
            intact weight, a number of weights chosen by the localizer, or all known passed samples.
        n_localized: number of searched weights; 0 if localization left none.
        value: fitness of the best candidate; None without a search.
        patched: repaired samples of I_neg, as counted by the search.
        intact: samples of the sampled I_pos that stay right.
        known: counts of known samples, `known_broken` etc. in the table. None for roles without data.
        seconds: wall time, as a share of the runs that were searched and counted together.
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
        """True if a known sample is repaired and none is broken, in the target or not."""
        return self.known.broken == 0 and self.known.repaired > 0

    def has(self, role: Role) -> bool:
        return getattr(self, role) is not None

    def counts(self, role: Role) -> TargetCounts:
        """Returns the counts of a role; all 0 without samples."""
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
    *(f"{role}_{name}" for role in ROLES for name in (_first, *(f.name for f in fields(TargetCounts)), *_later)),
    "seconds",
)
"""Columns of the table."""


def run_of_text(row: Mapping[str, str]) -> Run:
    """Reads a row of `csv.DictReader`; raises `ConfigurationError` for an invalid one."""
    words = ("setting", "fitness", "layer")
    return from_plain(Run, {name: text if name in words else _value(text) for name, text in row.items()})


def _value(text: str) -> object:
    """Parses a cell as None, bool or number; returns other text unchanged."""
    for kind in ({"": None, "True": True, "False": False}.__getitem__, int, float):
        with suppress(KeyError, ValueError, TypeError):  # rows of the wrong length have cells that are not text
            return kind(text)
    return text


@dataclass(frozen=True)
class StoredRun:
    """A run and its weights, on the CPU."""

    run: Run
    where: Tensor  # `K` int64, flat positions of the searched weights
    values: Tensor  # `K`, their values


@dataclass(frozen=True)
class RunStore:
    """A folder with files of some runs each, created on demand; None stores nothing."""

    folder: Path | None

    def read(self, wanted: Iterable[str]) -> dict[str, StoredRun]:
        """Returns the stored runs by key. Skips unreadable and damaged files with a warning."""
        if self.folder is None:
            return {}
        if self.folder.is_file():
            raise ConfigurationError(
                f"`dirpath={str(self.folder)!r}` is a file.", "name a folder, which is made if need be."
            )
        found: dict[str, StoredRun] = {}
        for path in sorted(self.folder.glob("runs-*.pt")):
            try:
                checksum, _, data = path.read_bytes().partition(b"\n")
                if checksum.decode(errors="replace") != hashlib.sha256(data).hexdigest():
                    raise ConfigurationError("it does not fit its checksum")
                found |= _unpacked(data)
            except (OSError, ConfigurationError) as error:
                why = str(error).partition("\n")[0]
                problem = f"`dirpath`: {path} cannot be used ({why}); its runs are made again."
                hint = "delete the file; check the disk if this happens again."
                warnings.warn(DataWarning(problem, hint), stacklevel=2)
        keys = set(wanted)
        return {key: run for key, run in found.items() if key in keys}

    def write(self, runs: Mapping[str, StoredRun]) -> None:
        """Writes runs by key, atomically."""
        if self.folder is None or not runs:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        data = _packed(runs)
        content = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
        replacing(self.folder / f"runs-{digest(sorted(runs))[:16]}.pt", lambda part: part.write_bytes(content))


def digest(value: Any) -> str:
    """Computes SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()


def results_digest(results: SampleResults) -> str:
    """Computes SHA-256 of samples and results, with three digits of the loss."""
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
    return {key: run for rank in collective.gather(packed) for key, run in _unpacked(rank.numpy().tobytes()).items()}


def _packed(runs: Mapping[str, StoredRun]) -> bytes:
    out = io.BytesIO()
    torch.save({key: {**vars(stored), "run": to_plain(stored.run)} for key, stored in runs.items()}, out)
    return out.getvalue()


def _unpacked(data: bytes) -> dict[str, StoredRun]:
    """Reads runs as data, never as code; raises `ConfigurationError` for any other content."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return {str(key): _stored_run(**one) for key, one in found.items()}
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"it holds no runs ({reason(error)})") from error


def _stored_run(run: Any, where: Any, values: Any) -> StoredRun:
    if where.dtype != torch.int64 or where.ndim != 1 or where.shape != values.shape or not values.is_floating_point():
        raise ConfigurationError("its weights do not have their positions")
    return StoredRun(from_plain(Run, run), where, values)
