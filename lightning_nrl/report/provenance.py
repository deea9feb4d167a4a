"""Where a result comes from: software, model, checkpoint and data."""

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
from lightning_nrl.evaluation.sample_results import SampleResults


def installed_versions() -> dict[str, str]:
    """Returns the versions of the software that a repair depends on, by name."""
    found = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found | ({"lightning_nrl commit": commit} if (commit := _commit()) else {})


@lru_cache(maxsize=1)
def _commit() -> str:
    """Returns the commit of a source checkout, with `-dirty` if files were changed; else an empty string."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""


@dataclass(frozen=True)
class DataIdentity:
    """The size of a split, and SHA-256 of its ids and labels, in order."""

    n: int
    sha256: str

    @classmethod
    def of(cls, results: SampleResults, split: str) -> Self:
        rows = results.of(split)
        table = torch.stack([results.index[rows], results.label[rows]], 1).cpu()
        return cls(len(table), hashlib.sha256(table.contiguous().numpy().astype("<i8").tobytes()).hexdigest())


@dataclass(frozen=True)
class Provenance:
    """When, from which model and from which data a result was made.

    `made` is in UTC, or from the variable SOURCE_DATE_EPOCH, and ignored by comparisons. `n_layers` counts modules with
    parameters or buffers of their own. `checkpoint` is the file that the weights were loaded from, if any.
    """

    made: str = field(default="", compare=False)
    module: str = ""
    n_layers: int = 0
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    data: Mapping[str, DataIdentity] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *results: SampleResults) -> Self:
        """Identifies a model and its evaluation data, at the current time."""
        when = datetime.fromtimestamp(float(os.environ.get("SOURCE_DATE_EPOCH", time.time())), timezone.utc)
        kind, layers = type(model), {name.rpartition(".")[0] or name for name in current_state(model)}
        data = {split: DataIdentity.of(one, split) for one in results for split in one.splits}
        made = when.isoformat(sep=" ", timespec="seconds")
        return cls(made, f"{kind.__module__}.{kind.__qualname__}", len(layers), data=data)

    def loaded_from(self, path: str | Path | None) -> Self:
        """Adds the checkpoint that the weights were loaded from, if any."""
        digest = hash_file(Path(path)) if path and Path(path).is_file() else ""
        return replace(self, checkpoint=str(path or ""), checkpoint_sha256=digest)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        checkpoint = f"{self.checkpoint} {self.checkpoint_sha256 and f'(sha256 {self.checkpoint_sha256})'}".strip()
        facts = [("made", self.made), ("class of the model", self.module), ("weights loaded from", checkpoint)]
        facts += [(f"data: {split}", f"{one.n:,} samples, sha256 {one.sha256}") for split, one in self.data.items()]
        return tuple((name, value) for name, value in facts if value)
