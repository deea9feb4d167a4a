"""A sweep on disk: what was run is there again when the same is asked for.

A file is the SHA-256 of what follows, a line break, and some runs as `torch.save` writes them. One that cannot be read,
or does not fit its checksum, is not used: its runs are made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.checkpoint import reason
from lightning_nrl._utils.deserialize import from_plain
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.serialize import to_plain
from lightning_nrl.analysis.sweep.run import Run
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["RunStore", "StoredRun", "digest", "exchanged", "results_digest"]

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
