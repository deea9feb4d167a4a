"""Modules as they are: optimized by hand, with schedules, locks, lambdas, adapters, or layers
outside the tree.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Scheduled,
    Untrainable,
    quick_repair,
    quiet_trainer,
    right,
)
from distributed_fit import continued
from self_writing import LowRank
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import ConfigurationError, RepairReport
from lightning_nrl.errors import TrainingWarning


def report_of_continued(path: Path, model: Classifier, **arguments: Any) -> RepairReport:
    """The report of a fit after which the training goes on."""
    callback = continued()
    defaults = {"max_epochs": 2, "enable_checkpointing": False}
    quiet_trainer(path, callback, **{**defaults, **arguments}).fit(model, datamodule=Digits())
    return callback.report


def assert_loads(report: RepairReport, fresh: Classifier) -> None:
    """What is loaded from the repaired checkpoint is what was counted."""
    fresh.load_state_dict(torch.load(report.files["checkpoint"], weights_only=True)["state_dict"])
    data = Digits()
    for split in report.splits:
        now = right(fresh, getattr(data, split.split))
        assert split.kept + split.repaired == int(now.sum())


class ByHand(Classifier):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        weights = list(self.network.parameters())
        return torch.optim.Adam(weights[:2], 3e-3), torch.optim.SGD(weights[2:], 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class ScheduledBySteps(Scheduled):
    def steps(self) -> int:
        return self.trainer.max_steps


class Uncopyable(Classifier):
    """Holds what no copy can hold: locks, a file, a generator, a result with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.numbers = threading.Lock(), iter(int, 1)
        self.kept = {"locks": [threading.RLock()], "losses": []}
        self.loss_function = partial(F.cross_entropy, label_smoothing=0.1)
        self.batches = (i for i in range(10**9))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.lock, self.kept["locks"][0]:
            next(self.batches)
            loss = self.loss_function(self(batch[0]), batch[1])
            self.kept["losses"] = [loss]
            return loss


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ByHand, {"max_steps": 40, "max_epochs": -1}),
        (Scheduled, {}),
        (ScheduledBySteps, {"max_steps": 24, "max_epochs": -1}),
        (Uncopyable, {}),
    ],
)
def test_the_training_goes_on(tmp_path, kind, arguments):
    report = report_of_continued(tmp_path, kind(), **arguments)
    assert report.status == "repaired"
    assert report.splits[1].repaired > 20
    assert_loads(report, kind())


class Closed(Classifier):
    """A lambda that holds the module itself, whatever copy calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_function = lambda x, y: F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_function(batch[0], batch[1])


def test_a_training_that_does_not_go_on_is_warned_of(tmp_path):
    with pytest.warns(TrainingWarning, match="changed nothing"):
        assert report_of_continued(tmp_path, Closed()).status == "not repaired"


class Merged(Classifier):
    """Adapters in both layers, merged by `eval()` (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), LowRank(64, 32), nn.ReLU(), LowRank(32, 10))
        with torch.no_grad():
            self.network[1].b.mul_(0.3)
            self.network[3].b.mul_(0.3)


def test_merged_adapters_are_judged_as_they_are_loaded(tmp_path):
    """Lightning ends a validation by flags alone: what `eval()` merged stays merged, and would be
    merged again.
    """
    assert_loads(report_of_continued(tmp_path / "continued", Merged()), Merged())
    searched, model = quick_repair(), Merged()
    trainer = quiet_trainer(tmp_path / "fit", searched, max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=Digits())
    assert searched.report.status == "repaired"
    assert_loads(searched.report, Merged())
    assert_loads(searched.report, model)


class Outside(Untrainable):
    """Its layers are in a list, not in the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.network = nn.Flatten(), None
        self.layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return x

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([weight for layer in self.layers for weight in layer.parameters()])


def test_layers_outside_of_the_module_tree_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"`layers`(.|\n)*HINT(.|\n)*nn.ModuleList"):
        quiet_trainer(tmp_path, quick_repair()).fit(Outside(), datamodule=Digits())
