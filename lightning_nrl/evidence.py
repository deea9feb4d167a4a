"""What a model does on data: one row a sample, the same table on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.batches import Source
from lightning_nrl.collective import Collective
from lightning_nrl.errors import EvidenceError, explain
from lightning_nrl.targets import Target
from lightning_nrl.tasks import Task

__all__ = ["Evidence", "collect", "non_finite"]

Forward = Callable[..., Any]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Evidence:
    """One row a sample, split by split, within a split in the order of the data set. On the CPU.

    Attributes:
        splits: names of the splits, `S` of them.
        sizes: samples in each split.
        index: `N` int64, each sample's position in its data set: the id that reports give.
        label: `N` int64, the true class, -1 where the task has none.
        prediction: `N` int64, the predicted class, -1 where the task has none.
        loss: `N` float, each sample's loss.
        passed: `N` bool.
        targeted: `N` bool, failed samples that the target selects (I_neg).
    """

    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Tensor
    label: Tensor
    prediction: Tensor
    loss: Tensor
    passed: Tensor
    targeted: Tensor

    def __len__(self) -> int:
        return len(self.passed)

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Rows of the samples at these positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        """The first row of a split."""
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """The rows of a split."""
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Data-set positions of the marked rows, by split."""
        return {split: self.index[self.of(split)][mask[self.of(split)]].tolist() for split in self.splits}


@torch.no_grad()
def collect(
    forward: Forward,
    sources: Sequence[Source],
    *,
    task: Task,
    target: Target | None = None,
    context: Context = nullcontext,
    collective: Collective | None = None,
) -> Evidence:
    """Runs the model once over all sources and writes down what it did on each sample.

    Every sample is counted exactly once, whatever the number of ranks, and every rank gets the same table.

    Args:
        forward: the model in evaluation mode, or a function that calls it.
        sources: the splits, this rank's share of each.
        task: what passed and loss mean.
        target: which failed samples are to be repaired; None marks none.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the work.

    Returns:
        The evidence, on the CPU.

    Raises:
        EvidenceError: a split's samples are not there exactly once.
    """
    collective = collective or Collective()
    tables = [_collect_split(forward, source, task, target, context, collective) for source in sources]
    columns = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
    return Evidence(tuple(s.split for s in sources), tuple(len(s.index) for s in sources), **columns)


def non_finite(evidence: Evidence) -> dict[str, list[int]]:
    """Data-set positions of the samples whose loss is NaN or infinite, by split; splits without any are left out."""
    return {split: ids for split, ids in evidence.ids(~evidence.loss.isfinite()).items() if ids}


def _collect_split(
    forward: Forward, source: Source, task: Task, target: Target | None, context: Context, collective: Collective
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {
        "position": [],
        "label": [],
        "prediction": [],
        "loss": [],
        "passed": [],
        "targeted": [],
    }
    for batch in source:
        with context():
            output = task.logits(forward(*batch.args, **batch.kwargs))
        passed = task.passed(output, batch.target)
        label, prediction = task.label(batch.target), task.prediction(output)
        if target is None or not source.failed:
            targeted = torch.zeros_like(passed)
        else:
            targeted = ~passed & target.select(batch, label, prediction).to(passed.device)
        unknown = torch.full_like(passed, -1, dtype=torch.int64)
        parts["position"].append(batch.position)
        parts["label"].append(unknown if label is None else label)
        parts["prediction"].append(unknown if prediction is None else prediction)
        parts["loss"].append(task.loss(output, batch.target))
        parts["passed"].append(passed)
        parts["targeted"].append(targeted)
    empty = {"loss": torch.float32, "passed": torch.bool, "targeted": torch.bool}
    mine = {
        name: torch.cat(rows).cpu() if rows else torch.zeros(0, dtype=empty.get(name, torch.int64))
        for name, rows in parts.items()
    }
    whole = {name: torch.cat(collective.gather(column)).cpu() for name, column in mine.items()}
    position = whole.pop("position")
    order = position.argsort()
    if not torch.equal(position[order], torch.arange(len(source.index))):
        raise EvidenceError(
            explain(
                f"`{source.split}` data: {len(position)} samples came for {len(source.index)} in the data set.",
                "the collate function must neither drop nor add samples.",
            )
        )
    table = {name: column[order] for name, column in whole.items()}
    return {"index": source.index, **table}
