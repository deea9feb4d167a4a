"""The origin of a result: software, model, checkpoint and data."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from platform import python_version

import torch
from torch import nn
from typing_extensions import Self

from lightning_nrl._utils.state import current_state, hash_file
from lightning_nrl.evaluation import SampleResults


def installed_versions() -> dict[str, str]:
    """Returns the versions of the software that a repair depends on, by name."""
    versions = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    commit = _commit()
    if commit:
        versions["lightning_nrl commit"] = commit
    return versions


@lru_cache(maxsize=1)
def _commit() -> str:
    """Returns the commit of a source checkout, or an empty string.

    It ends in `-dirty` if files were changed.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        return git.stdout.strip()
    return ""


@dataclass(frozen=True)
class DataIdentity:
    """The number of samples in a split, and the SHA-256 of their ids and labels in order."""

    n: int
    sha256: str

    @classmethod
    def of(cls, results: SampleResults, split: str) -> Self:
        rows = results.of(split)
        table = torch.stack([results.index[rows], results.label[rows]], 1).cpu().contiguous()
        # Little-endian on every machine.
        data = table.numpy().astype("<i8").tobytes()
        return cls(len(table), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Provenance:
    """The time at which a result was made, and the model and the data from which it was made.

    `created` is a time in UTC (see `of`); comparisons ignore it. `module` is the class of the
    model. `n_layers` counts the modules that have own parameters or buffers. `checkpoint` is the
    file from which the weights were loaded.
    """

    created: str = field(default="", compare=False)
    module: str = ""
    n_layers: int = 0
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    data: Mapping[str, DataIdentity] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *results: SampleResults) -> Self:
        """Records the time, the class of a model, and the data of its results.

        The time is SOURCE_DATE_EPOCH, if that is set.
        """
        kind = type(model)
        data = {}
        for of_sources in results:
            for split in of_sources.splits:
                data[split] = DataIdentity.of(of_sources, split)
        return cls(
            _now().isoformat(sep=" ", timespec="seconds"),
            f"{kind.__module__}.{kind.__qualname__}",
            len({name.rpartition(".")[0] or name for name in current_state(model)}),
            data=data,
        )

    def loaded_from(self, path: str | Path | None) -> Self:
        """Returns a copy that names the checkpoint from which the weights were loaded, if any."""
        digest = hash_file(Path(path)) if path and Path(path).is_file() else ""
        return replace(self, checkpoint=str(path or ""), checkpoint_sha256=digest)

    @property
    def facts(self) -> list[tuple[str, str]]:
        checkpoint = self.checkpoint
        if self.checkpoint_sha256:
            checkpoint += f" (sha256 {self.checkpoint_sha256})"
        facts = [
            ("made", self.created),
            ("class of the model", self.module),
            ("weights loaded from", checkpoint),
        ]
        for split, identity in self.data.items():
            facts.append((f"data: {split}", f"{identity.n:,} samples, sha256 {identity.sha256}"))
        return [(name, value) for name, value in facts if value]


def today() -> str:
    """Returns the day of `Provenance.created`, in UTC."""
    return _now().date().isoformat()


def _now() -> datetime:
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return datetime.fromtimestamp(seconds, timezone.utc)
