"""A sweep on disk: what was run is there again when the same is asked for."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.serialize import plain
from lightning_nrl.analysis.sweep.run import Run
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["Kept", "Store", "digest", "evidence_digest", "exchanged"]

COLUMNS = ("index", "label", "prediction", "passed", "targeted", "weight")


@dataclass(frozen=True)
class Kept:
    """A run and its weights.

    Attributes:
        run: its row.
        where: `K` int64, flat positions of the weights that were searched, on the CPU.
        values: `K`, what they are.
    """

    run: Run
    where: Tensor
    values: Tensor


@dataclass(frozen=True)
class Store:
    """A folder with a file for each few runs.

    Attributes:
        folder: is made when something is kept; None keeps nothing.
    """

    folder: Path | None

    def read(self, wanted: Iterable[str]) -> dict[str, Kept]:
        """Runs that are there, by key. A file that was cut short counts as not there."""
        if self.folder is None:
            return {}
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(
                explain(f"`dirpath={str(self.folder)!r}` is a file.", "name a folder, which is made if need be.")
            )
        keys, found = set(wanted), {}
        for path in sorted(self.folder.glob("runs-*.pt")):
            with suppress(Exception):
                found.update({key: kept for key, kept in _loaded(path.read_bytes()).items() if key in keys})
        return found

    def write(self, runs: Mapping[str, Kept]) -> None:
        """Keeps runs by their keys, all or, if the process is killed meanwhile, none."""
        if self.folder is None or not runs:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"runs-{digest(sorted(runs))[:16]}.pt"
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(_saved(runs))
        part.replace(path)


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def evidence_digest(evidence: SampleResults) -> str:
    """SHA-256 of which samples there are and what the model does on them, to three digits of the loss."""
    found = hashlib.sha256(repr((evidence.splits, evidence.sizes)).encode())
    for name in COLUMNS:
        found.update(getattr(evidence, name).numpy().tobytes())
    found.update(evidence.loss.half().numpy().tobytes())
    return found.hexdigest()


def exchanged(mine: Mapping[str, Kept], collective: Collective) -> dict[str, Kept]:
    """The runs of all ranks on each."""
    if collective.world_size == 1:
        return dict(mine)
    packed = torch.frombuffer(bytearray(_saved(mine)), dtype=torch.uint8)
    together: dict[str, Kept] = {}
    for rank in collective.gather(packed):
        together.update(_loaded(rank.numpy().tobytes()))
    return together


def _saved(runs: Mapping[str, Kept]) -> bytes:
    data = {
        key: {"run": plain(asdict(kept.run)), "where": kept.where, "values": kept.values} for key, kept in runs.items()
    }
    out = io.BytesIO()
    torch.save(data, out)
    return out.getvalue()


def _loaded(data: bytes) -> dict[str, Kept]:
    found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return {key: Kept(Run(**kept["run"]), kept["where"], kept["values"]) for key, kept in found.items()}
