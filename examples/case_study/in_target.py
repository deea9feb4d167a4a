"""What becomes of the unseen samples of the target: the paper's instance level is about "the class to be repaired".

The table of a sweep counts all samples. Only the last layer differs between runs, so what it receives is computed once.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from network import Scenes, VehicleNet
from torch import Tensor

from lightning_nrl.analysis.sweep import SweepResult
from lightning_nrl.evaluation.flips import FlipCounts


@dataclass(frozen=True)
class InTarget:
    """A run's unseen samples in the target.

    Attributes:
        setting: of the run.
        seed: of the run.
        passed: samples that were right before.
        broken: of these, samples that are wrong.
        repaired: samples that were wrong and are right.
    """

    setting: str
    seed: int
    passed: int
    broken: int
    repaired: int


@torch.no_grad()
def count(
    result: SweepResult, data: Scenes, model: VehicleNet, predicate: Callable[[tuple[Tensor, ...]], Tensor]
) -> list[InTarget]:
    """Counts every run of a sweep of `classifier`; the model has the weights from before."""
    model.eval()
    inputs, labels, wanted = [], [], []
    for batch in data.test_dataloader():
        inputs.append(model.features(batch[0]).mean((2, 3)))
        labels.append(batch[1])
        wanted.append(predicate(batch))
    x, y, mask = map(torch.cat, (inputs, labels, wanted))
    x, y = x[mask], y[mask]
    before = _right(x, y, dict(model.named_parameters()))
    found = []
    for run in result.runs:
        counts = FlipCounts.of(before, _right(x, y, dict(model.named_parameters()) | result.state(run)))
        found.append(InTarget(run.setting, run.seed, counts.passed, counts.broken, counts.repaired))
    return found


def write(found: list[InTarget], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(field.name for field in fields(InTarget))
        table.writerows(map(astuple, found))


def read(path: Path) -> list[InTarget]:
    with path.open() as file:
        return [
            InTarget(row["setting"], *(int(row[f.name]) for f in fields(InTarget)[1:])) for row in csv.DictReader(file)
        ]


def _right(x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return (x @ parameters["classifier.weight"].T + parameters["classifier.bias"]).argmax(1) == y
