"""The record of a training on disk: results of each sample and weights of layers at some points.

The folder has one file per point, named by step (`point-00000120.pt`), and the samples of each
split (`samples.pt`). All files load with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.checkpoint import load_mapping, reason
from lightning_nrl._utils.state import State
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.localization import KnownData
from lightning_nrl.published.history import HistoryPoint

SAMPLES_FILE = "samples.pt"
POINT_FILE = re.compile(r"point-(\d+)\.pt")
RECORD_HINT = "give the folder written by `TrainingHistory`, by default `<log_dir>/history`."


@dataclass(frozen=True)
class RecordedSplit:
    """Results on one split of `n` samples at `T` points of a training, oldest first."""

    index: Tensor  # n int64, positions in the data set
    label: Tensor  # n int64, true classes, -1 if the task has no classes
    passed: Tensor  # T x n bool
    loss: Tensor  # T x n float16

    @property
    def never_learned(self) -> Tensor:
        """Mask of the samples that are wrong at every point, `n` bool."""
        return ~self.passed.any(0)

    @property
    def forgotten(self) -> Tensor:
        """Number of flips of each sample from right to wrong, `n` int64 (Toneva et al. 2019)."""
        return (self.passed[:-1] & ~self.passed[1:]).sum(0)


@dataclass(frozen=True)
class RecordedPoint:
    """One point of a training: step, epoch and the recorded weights."""

    step: int
    epoch: int
    weights: State


@dataclass(frozen=True)
class TrainingRecord:
    """Record of a training, written by `TrainingHistory`."""

    points: tuple[RecordedPoint, ...]  # oldest first
    splits: Mapping[str, RecordedSplit]  # results by split name

    @classmethod
    def read(cls, folder: str | Path) -> TrainingRecord:
        """Reads a folder; refuses a folder without a record, or with a damaged record."""
        files = _point_files(Path(folder))
        if not files:
            raise ConfigurationError(
                f"`history`: {str(folder)!r} contains no training record.", RECORD_HINT
            )
        samples = load_mapping("history", Path(folder) / SAMPLES_FILE, RECORD_HINT)
        contents = [load_mapping("history", file, RECORD_HINT) for file in files.values()]
        try:
            splits = {}
            for split, columns in samples.items():
                results = [content["splits"][split] for content in contents]
                passed = torch.stack([result["passed"] for result in results])
                loss = torch.stack([result["loss"] for result in results])
                splits[split] = RecordedSplit(columns["index"], columns["label"], passed, loss)
            points = []
            for content in contents:
                points.append(RecordedPoint(content["step"], content["epoch"], content["weights"]))
            return cls(tuple(points), splits)
        except Exception as error:  # files with other contents can raise anything
            raise ConfigurationError(
                f"`history`: {str(folder)!r} is damaged ({reason(error)}).",
                "record it again with `TrainingHistory`.",
            ) from error

    def history(self, known: KnownData) -> list[HistoryPoint]:
        """Converts the record to history points; known samples not recorded have the result -1.

        Raises a `ConfigurationError` if the weights of a layer to repair were not recorded, or if
        targets (I_neg) exist but none of their splits was recorded.
        """
        before = known.before
        failing = [split for split in before.splits if before.targeted[before.of(split)].any()]
        if failing and not set(failing) & set(self.splits):
            raise ConfigurationError(
                f"`history` records {list(self.splits)}, but the targets are in {failing}.",
                f"record these: `TrainingHistory(splits={[*self.splits, *failing]})`.",
            )
        passed = torch.full((len(self.points), len(before)), -1, dtype=torch.int8)
        for split in before.splits:
            if split in self.splits:
                recorded, index = self.splits[split], before.index[before.of(split)]
                _, rows, positions = np.intersect1d(index, recorded.index, return_indices=True)
                passed[:, rows + before.start(split)] = recorded.passed[:, positions].to(torch.int8)
        points = []
        for point, results in zip(self.points, passed, strict=True):
            points.append(HistoryPoint(results, _flat_weights(point, known)))
        return points


@dataclass(frozen=True)
class FolderHistory:
    """History that is read from a folder when its points are needed."""

    folder: Path

    def points(self, known: KnownData) -> list[HistoryPoint]:
        return TrainingRecord.read(self.folder).history(known)


def write_point(
    folder: Path, step: int, epoch: int, results: SampleResults, weights: State
) -> None:
    """Writes one point of a training to the folder: the results of all samples, and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = {}
    points = {}
    for split in results.splits:
        rows = results.of(split)
        # Copies, since saving a slice would save the whole table.
        index = results.index[rows].clone()
        label = results.label[rows].clone()
        passed = results.passed[rows].clone()
        samples[split] = {"index": index, "label": label}
        points[split] = {"passed": passed, "loss": results.loss[rows].to(torch.float16)}
    if not (folder / SAMPLES_FILE).exists():
        _replace(samples, folder / SAMPLES_FILE)
    kept = {name: value.detach().cpu().clone() for name, value in weights.items()}
    content = {"step": step, "epoch": epoch, "splits": points, "weights": kept}
    _replace(content, folder / f"point-{step:08d}.pt")


def forget_after(folder: Path, step: int) -> None:
    """Removes points after `step`, left by a training that resumes from an earlier checkpoint."""
    for recorded_step, file in _point_files(folder).items():
        if recorded_step > step:
            file.unlink()
    if not _point_files(folder):
        (folder / SAMPLES_FILE).unlink(missing_ok=True)


def _flat_weights(point: RecordedPoint, known: KnownData) -> Tensor:
    for name in known.space.parameters:
        if name not in point.weights:
            raise ConfigurationError(
                f"`history` has no weights of {name!r}.",
                "record that layer: `TrainingHistory(layers=[...])`, or `layers='all'`.",
            )
    return known.space.flat(point.weights)


def _point_files(folder: Path) -> dict[int, Path]:
    files = {}
    for file in folder.glob("point-*.pt"):
        if match := POINT_FILE.fullmatch(file.name):
            files[int(match[1])] = file
    return dict(sorted(files.items()))


def _replace(value: Mapping[str, Any], file: Path) -> None:
    # On a full disk, saving to a file would raise a RuntimeError, not an OSError.
    stream = BytesIO()
    torch.save(value, stream)
    replacing(file, lambda path: path.write_bytes(stream.getvalue()))
