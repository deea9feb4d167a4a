"""The record of a training on disk: which samples were right at which step, their losses, and weights of some layers.

A folder with one file a point, named by the step (`point-00000120.pt`), and the samples of each split (`samples.pt`). A
sample takes 17 bits at each point: a bit for right or wrong, and its loss in half precision; 18 where a point does not
know all samples. All of it loads with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.checkpoint import load_mapping, reason
from lightning_nrl._utils.state import State
from lightning_nrl._utils.whole_files import replacing
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization.history import HistoryPoint, Known

SAMPLES_FILE = "samples.pt"
POINT_FILE = re.compile(r"point-(\d+)\.pt")
RECORD_HINT = "give the folder that `TrainingHistory` has written, `<log_dir>/history` by default."


@dataclass(frozen=True)
class SplitPoint:
    """One split at one point of a training, `n` samples, on the CPU.

    Attributes:
        index: `n` int64, positions in the data set, ascending.
        label: `n` int64, the true class, -1 where the task has none or the point does not know the sample.
        passed: `n` bool.
        loss: `n` float16.
        known: `n` bool, false for samples that nothing was recorded of.
        taken: from which passes: `training`, `validation`, or `own`.
    """

    index: Tensor
    label: Tensor
    passed: Tensor
    loss: Tensor
    known: Tensor
    taken: str = "own"


@dataclass(frozen=True)
class RecordedSplit:
    """One split at all points of a training, the oldest first; `T` points, `n` samples.

    Attributes:
        index: `n` int64, positions in the data set.
        label: `n` int64, the true class, -1 where the task has none.
        passed: `T x n` bool.
        loss: `T x n` float16, NaN where a point does not know a sample.
        known: `T x n` bool, false where nothing was recorded, as of samples that an epoch leaves out.
        taken: from which passes each point is: `training` (in training mode, each batch before its step), `validation`
            or `own` (both in evaluation mode, with the weights of the point).
    """

    index: Tensor
    label: Tensor
    passed: Tensor
    loss: Tensor
    known: Tensor
    taken: tuple[str, ...] = ()

    @property
    def right(self) -> Tensor:
        """`T x n` bool, right when it was last known, at this point or before it."""
        right = torch.zeros_like(self.passed)
        last = torch.zeros_like(self.passed[0])
        for i, (passed, known) in enumerate(zip(self.passed, self.known, strict=True)):
            last = right[i] = torch.where(known, passed, last)
        return right

    @property
    def never_learned(self) -> Tensor:
        """`n` bool, known at some point, and wrong at every one."""
        return self.known.any(0) & ~(self.passed & self.known).any(0)

    @property
    def forgotten(self) -> Tensor:
        """`n` int64, how often each turned from right to wrong between two points (Toneva et al. 2019)."""
        right = self.right
        return (right[:-1] & ~right[1:]).sum(0)

    @property
    def first_right(self) -> Tensor:
        """`n` int64, the first point at which each was right; `T` where it never was."""
        right = self.passed & self.known
        return right.int().argmax(0).masked_fill(~right.any(0), len(right))


@dataclass(frozen=True)
class RecordedPoint:
    """One point of a training: the step, the epoch, and the weights that were kept."""

    step: int
    epoch: int
    weights: State


@dataclass(frozen=True)
class TrainingRecord:
    """What `TrainingHistory` has written: its points, and the samples of its splits.

    Attributes:
        points: the oldest first.
        splits: by name.
    """

    points: tuple[RecordedPoint, ...]
    splits: Mapping[str, RecordedSplit]

    @classmethod
    def read(cls, folder: str | Path) -> TrainingRecord:
        """Reads a folder.

        Raises:
            ConfigurationError: there is no record, or it cannot be read.
        """
        files = _point_files(Path(folder))
        if not files or not (Path(folder) / SAMPLES_FILE).exists():
            raise ConfigurationError(f"`history`: {str(folder)!r} holds no record of a training.", RECORD_HINT)
        samples = load_mapping("history", Path(folder) / SAMPLES_FILE, RECORD_HINT)
        found = [load_mapping("history", file, RECORD_HINT) for file in files.values()]
        try:
            splits = {split: _recorded_split(split, known, found) for split, known in samples.items()}
            return cls(tuple(_recorded_point(point) for point in found), splits)
        except Exception as error:  # whatever comes of reading files that hold something else
            problem = f"`history`: {str(folder)!r} is damaged ({reason(error)})."
            raise ConfigurationError(problem, "record it anew with `TrainingHistory`.") from error

    def history(self, known: Known) -> list[HistoryPoint]:
        """The points as NeuRecover takes them; a sample of which there is no record is not known.

        Raises:
            ConfigurationError: the weights of a layer to be repaired were not kept, or nothing of the targets' data.
        """
        before = known.before
        failing = [split for split in before.splits if bool(before.targeted[before.of(split)].any())]
        if failing and not set(failing) & set(self.splits):
            raise ConfigurationError(
                f"`history` records {list(self.splits)}, the targets are in {failing}.",
                f"record these: `TrainingHistory(splits={[*self.splits, *failing]})`.",
            )
        rows = {split: self._rows(known.before, split) for split in known.before.splits if split in self.splits}
        return [self._point(i, point, known, rows) for i, point in enumerate(self.points)]

    def _rows(self, before: SampleResults, split: str) -> tuple[Tensor, Tensor]:
        """Rows of known samples of a split, and their places in the record."""
        recorded = self.splits[split].index
        place = torch.full((int(max(recorded.max(), before.index[before.of(split)].max())) + 1,), -1)
        place[recorded] = torch.arange(len(recorded))
        found = place[before.index[before.of(split)]]
        there = (found >= 0).nonzero().squeeze(1)
        return there + before.start(split), found[there]

    def _point(
        self, i: int, point: RecordedPoint, known: Known, rows: Mapping[str, tuple[Tensor, Tensor]]
    ) -> HistoryPoint:
        names = list(known.space.parameters)
        lacking = [name for name in names if name not in point.weights]
        if lacking:
            raise ConfigurationError(
                f"`history` has no weights of {lacking[0]!r}.",
                "record that layer: `TrainingHistory(layers=[...])`, or `layers='all'`.",
            )
        passed = torch.full((len(known.before),), -1, dtype=torch.int8)
        for split, (row, place) in rows.items():
            found = self.splits[split]
            passed[row] = torch.where(found.known[i, place], found.passed[i, place].to(torch.int8), -1)
        return HistoryPoint(passed, torch.cat([point.weights[name].flatten() for name in names]))


@dataclass(frozen=True)
class FolderHistory:
    """The history in a folder, read when it is asked for."""

    folder: Path

    def points(self, known: Known) -> list[HistoryPoint]:
        """See `TrainingRecord.history`."""
        return TrainingRecord.read(self.folder).history(known)


def split_points(results: SampleResults) -> dict[str, SplitPoint]:
    """What a pass of its own found, by split."""
    found = {}
    for split in results.splits:
        own = results.of(split)
        index, label, passed = results.index[own], results.label[own], results.passed[own]
        found[split] = SplitPoint(index, label, passed, results.loss[own].to(torch.float16), torch.ones_like(passed))
    return found


def write_point(folder: Path, step: int, epoch: int, splits: Mapping[str, SplitPoint], weights: State) -> Path:
    """Writes what the model does on some splits at a step, with the weights that are to be kept.

    Of a sample that is not known the label is that of an earlier point.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = load_mapping("history", folder / SAMPLES_FILE, RECORD_HINT) if _point_files(folder) else {}
    samples: dict[str, dict[str, Tensor]] = {}
    points: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        label, before = split.label, known.get(name)
        if before is not None and torch.equal(before["index"], split.index):
            label = torch.where(split.known, label, before["label"])
        samples[name] = {"index": split.index, "label": label}
        points[name] = {"passed": _packed(split.passed), "loss": split.loss, "taken": split.taken}
        if not bool(split.known.all()):
            points[name]["known"] = _packed(split.known)
    if not _are_same(samples, known):
        _replace(samples, folder / SAMPLES_FILE)
    kept = {name: value.detach().cpu().clone() for name, value in weights.items()}
    file = folder / f"point-{step:08d}.pt"
    _replace({"step": step, "epoch": epoch, "splits": points, "weights": kept}, file)
    return file


def _are_same(samples: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Any]) -> bool:
    return samples.keys() == known.keys() and all(
        torch.equal(own[column], known[split][column]) for split, own in samples.items() for column in own
    )


def forget_after(folder: Path, step: int) -> None:
    """Removes points after a step: those of a training that went on from an earlier checkpoint, or began anew."""
    for at, file in _point_files(folder).items():
        if at > step:
            file.unlink()
    if not _point_files(folder):
        (folder / SAMPLES_FILE).unlink(missing_ok=True)


def _recorded_split(split: str, known: Mapping[str, Tensor], points: Sequence[Mapping[str, Any]]) -> RecordedSplit:
    index, label = known["index"], known["label"]
    loss = torch.stack([point["splits"][split]["loss"] for point in points])
    packed = torch.stack([point["splits"][split]["passed"] for point in points])
    whole_byte = torch.full_like(packed[0], 255)
    known_bits = torch.stack([point["splits"][split].get("known", whole_byte) for point in points])
    n = len(index)
    whole = index.dtype == label.dtype == torch.int64 and packed.dtype == torch.uint8 and loss.is_floating_point()
    shapes = (tuple(index.shape), tuple(label.shape), tuple(loss.shape[1:]), tuple(packed.shape[1:]))
    fit = shapes == ((n,), (n,), (n,), (-(-n // 8),)) and known_bits.shape == packed.shape
    if not whole or not fit or known_bits.dtype != torch.uint8 or bool((index < 0).any()):
        raise ValueError(f"the columns of `{split}` do not fit each other")
    passed, seen = (torch.stack([_unpacked(one, n) for one in bits]) for bits in (packed, known_bits))
    return RecordedSplit(index, label, passed, loss, seen, tuple(str(p["splits"][split]["taken"]) for p in points))


def _recorded_point(point: Mapping[str, Any]) -> RecordedPoint:
    weights = dict(point["weights"])
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("its weights are no tensors")
    return RecordedPoint(int(point["step"]), int(point["epoch"]), weights)


def _point_files(folder: Path) -> dict[int, Path]:
    """The files by step, ascending."""
    found = {int(match[1]): file for file in folder.glob("point-*.pt") if (match := POINT_FILE.fullmatch(file.name))}
    return dict(sorted(found.items()))


def _replace(value: Mapping[str, Any], file: Path) -> None:
    """Writes a file whole or not at all."""
    held = BytesIO()
    torch.save(value, held)  # to a file, a full disk is a RuntimeError
    replacing(file, lambda path: path.write_bytes(held.getvalue()))


BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def _packed(bits: Tensor) -> Tensor:
    """`n` bool as bytes."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) * BITS).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    return ((packed[:, None] & BITS) > 0).flatten()[:n]
