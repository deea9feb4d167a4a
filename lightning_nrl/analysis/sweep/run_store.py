"""One run of a sweep as one row of its table."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_nrl._utils.checkpoint import reason
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.json_records import Derives, flat, from_plain, hints_of, to_plain
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.report.splits import ROLES, Role

DERIVED_COUNTS = {"n": int, "accuracy_before": float, "accuracy_after": float}
NO_COUNTS = TargetCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class Run(Derives):
    """One search with one seed, and what its weights do; the counts are those of the deployed model.

    Attributes:
        setting: its label.
        fitness: the kind of fitness.
        alpha: its intact weight; None where it has none.
        perfect_intact: whether one regression makes a candidate infeasible (pi).
        n_weights: localised weights that were asked for (#lw); None: as many as the localizer thinks fit.
        n_passed: passed samples that were scored (#pos) as asked for; None: all that are known.
        particles: of the swarm (#p).
        seed: of the sample of passed data and of the search.
        layer: the layers that were searched.
        n_localized: weights that were searched; 0 where localisation left none.
        iterations: steps that the swarm made.
        value: the fitness of the best candidate; None where nothing was searched.
        patched: samples of I_neg that it repairs, as the search counts them.
        intact: samples of the sampled I_pos that it keeps.
        changed: whether it differs from the original weights.
        known: what becomes of known samples; in the table `known_broken` and so on.
        calibration: what becomes of calibration samples; None where there are none.
        unseen: what becomes of unseen samples; None where there are none.
        seconds: wall time, its share of what was searched and counted together.
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
        """Whether something known is repaired and nothing known broken, in the target or not."""
        return self.known.broken == 0 and self.known.repaired > 0

    def has(self, role: Role) -> bool:
        """Whether there were data of this role."""
        return self._of(role) is not None

    def counts(self, role: Role) -> TargetCounts:
        """What became of the samples of a role; all 0 where there are none."""
        return self._of(role) or NO_COUNTS

    @property
    def derived(self) -> Mapping[str, object]:
        return {
            f"{role}_{name}": getattr(self.counts(role), name) if self.has(role) else None
            for role in ROLES
            for name in DERIVED_COUNTS
        }

    def _of(self, role: Role) -> TargetCounts | None:
        return {"known": self.known, "calibration": self.calibration, "unseen": self.unseen}[role]


def _kinds() -> dict[str, tuple[Any, ...]]:
    """Which types each column may have, in the order of the table."""
    own = {name: get_args(hint) or (hint,) for name, hint in hints_of(Run).items()}
    seconds = own.pop("seconds")
    counted = {"n": int} | dict.fromkeys((f.name for f in fields(TargetCounts)), int) | DERIVED_COUNTS
    roles = {f"{role}_{name}": (kind, NoneType) for role in ROLES for name, kind in counted.items()}
    return {name: own[name] for name in own if name not in ROLES} | roles | {"seconds": seconds}


_KINDS = _kinds()
RUN_COLUMNS = tuple(_KINDS)
"""The columns of the table."""


def run_of_text(row: Mapping[str, str]) -> Run:
    """Reads a line of the table, as `csv.DictReader` gives it; a `ConfigurationError` names what is wrong."""
    return from_plain(Run, {name: _value(text, _KINDS.get(name, ())) for name, text in row.items()})


def _value(text: str, kinds: tuple[Any, ...]) -> object:
    """A cell as one of some types; as it is if it is none of them."""
    if not text and NoneType in kinds:
        return None
    if bool in kinds:
        return {"True": True, "False": False}.get(text, text)
    for kind in (int, float):
        with suppress(ValueError):
            if kind in kinds:
                return kind(text)
    return text


DIGESTED_RESULTS = ("index", "label", "prediction", "passed", "targeted", "in_target", "weight")


@dataclass(frozen=True)
class StoredRun:
    """A run and its weights, on the CPU."""

    run: Run
    where: Tensor  # `K` int64, flat positions of the weights that were searched
    values: Tensor  # `K`, what they are


@dataclass(frozen=True)
class RunStore:
    """A folder with a file for each few runs, made when something is kept; None keeps nothing."""

    folder: Path | None

    def read(self, wanted: Iterable[str]) -> dict[str, StoredRun]:
        """Runs that are there, by key. A file that cannot be read, or is damaged, is warned of and left out.

        Raises:
            ConfigurationError: the folder is a file.
        """
        if self.folder is None:
            return {}
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(
                f"`dirpath={str(self.folder)!r}` is a file.", "name a folder, which is made if need be."
            )
        keys = set(wanted)
        found: dict[str, StoredRun] = {}
        for path in sorted(self.folder.glob("runs-*.pt")):
            try:
                runs = _unpacked(_checked(path.read_bytes()))
            except (OSError, ConfigurationError) as error:
                why = str(error).partition("\n")[0]
                problem = f"`dirpath`: {path} cannot be used ({why}); its runs are made again."
                hint = "delete the file, and look at the disk if this comes again."
                warnings.warn(DataWarning(problem, hint), stacklevel=2)
                continue
            found.update({key: run for key, run in runs.items() if key in keys})
        return found

    def write(self, runs: Mapping[str, StoredRun]) -> None:
        """Keeps runs by their keys, all or, if the process is killed meanwhile, none."""
        if self.folder is None or not runs:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"runs-{digest(sorted(runs))[:16]}.pt"
        part = path.with_suffix(f".{os.getpid()}.part")
        data = _packed(runs)
        part.write_bytes(_checksum(data) + b"\n" + data)
        part.replace(path)


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()


def results_digest(results: SampleResults) -> str:
    """SHA-256 of which samples there are and what the model does on them, to three digits of the loss."""
    found = hashlib.sha256(repr((results.splits, results.sizes)).encode())
    for name in DIGESTED_RESULTS:
        found.update(getattr(results, name).numpy().tobytes())
    found.update(results.loss.half().numpy().tobytes())
    return found.hexdigest()


def exchanged(mine: Mapping[str, StoredRun], collective: Collective) -> dict[str, StoredRun]:
    """The runs of all ranks on each."""
    if collective.world_size == 1:
        return dict(mine)
    packed = torch.frombuffer(bytearray(_packed(mine)), dtype=torch.uint8)
    return {key: run for rank in collective.gather(packed) for key, run in _unpacked(rank.numpy().tobytes()).items()}


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _checked(data: bytes) -> bytes:
    """What follows the checksum, which it must fit."""
    checksum, _, rest = data.partition(b"\n")
    if checksum != _checksum(rest):
        raise ConfigurationError("it does not fit its checksum")
    return rest


def _packed(runs: Mapping[str, StoredRun]) -> bytes:
    out = io.BytesIO()
    torch.save({key: {**vars(stored), "run": to_plain(stored.run)} for key, stored in runs.items()}, out)
    return out.getvalue()


def _unpacked(data: bytes) -> dict[str, StoredRun]:
    """The runs; a `ConfigurationError` for whatever else is in a file, which is read as data."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return {str(key): _stored(one) for key, one in found.items()}
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"it holds no runs ({reason(error)})") from error


def _stored(one: Any) -> StoredRun:
    run, where, values = from_plain(Run, one["run"]), one["where"], one["values"]
    if where.dtype != torch.int64 or where.ndim != 1 or where.shape != values.shape or not values.is_floating_point():
        raise ConfigurationError("its weights do not have their positions")
    return StoredRun(run, where, values)
