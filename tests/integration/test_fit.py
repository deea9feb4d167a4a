"""A repair after a `fit` on real data, judged in the precision in which the model is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Remember,
    assert_counted,
    quick_repair,
    quiet_trainer,
    right,
)
from lightning_package import Callback, Trainer
from torch import Tensor

LAYERS = {"mlp": "network.1", "cnn": "network.3"}
REPAIRS = [
    (network, arguments)
    for network, layer in LAYERS.items()
    for arguments in ({}, {"layer": layer, "method": "finetune-polish"})
]


def by_split(model: Any) -> dict[str, Tensor]:
    data = Digits()
    return {name: right(model, getattr(data, name)) for name in ("train", "repair", "test")}


class Before(Callback):
    """Notes what training got right; to stand before the repair."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.right = by_split(pl_module)


@pytest.mark.parametrize(("network", "arguments"), REPAIRS)
def test_a_repaired_model_breaks_nothing_that_is_known(tmp_path, network, arguments):
    data, model, before = Digits(), Classifier(network), Before()
    repair = quick_repair(unseen="test", **arguments)
    quiet_trainer(tmp_path, before, repair).fit(model, datamodule=Digits())
    report, after = repair.report, by_split(model)
    assert_counted(report, before.right, after)
    if "method" in arguments:
        assert report.pooled("known").repaired_in_target >= 0.3 * report.pooled("known").targeted
        assert report.status == "repaired"
    if report.status == "repaired":
        flipped = (~before.right["repair"] & after["repair"]).nonzero().flatten().tolist()
        assert list(report.splits[1].repaired_ids) == flipped
        loaded = Classifier.load_from_checkpoint(repair.repaired_model_path)
        assert torch.equal(right(loaded, data.repair), after["repair"])


class Recorded(Classifier):
    """Notes what the trainer's own validation loop says about each sample."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=0.05, momentum=0.9
        )  # Adam's squares underflow in float16

    def on_validation_epoch_start(self) -> None:
        self.answers = []

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.answers.append(self(batch[0]).argmax(1) == batch[1])


def answers(model: Recorded, precision: Any, path: Path) -> Tensor:
    quiet_trainer(path, precision=precision).validate(
        model, [Digits().repair_dataloader()], verbose=False
    )
    return torch.cat(model.answers)


@pytest.mark.parametrize(
    ("precision", "layer"),
    [
        ("64-true", "network.3"),
        ("16-true", "network.3"),
        ("bf16-true", "network.1"),
        ("bf16-mixed", "network.1"),
    ],
)
def test_nothing_breaks_in_the_precision_of_training(tmp_path, precision, layer):
    model, start = Recorded(), Recorded()
    repair = quick_repair(layer=layer)
    trainer = quiet_trainer(
        tmp_path, before_it := Remember(), repair, max_epochs=2, precision=precision
    )
    trainer.fit(model, datamodule=Digits())
    start.load_state_dict(before_it.state)
    before, after = (answers(m, precision, tmp_path) for m in (start, model))
    (split,) = (split for split in repair.report.splits if split.split == "repair")
    assert split.broken == int((before & ~after).sum()) == 0
    assert split.repaired_ids == tuple((~before & after).nonzero().flatten().tolist())
    assert repair.report.status == "repaired"
    saved = torch.load(repair.repaired_model_path, weights_only=True)["state_dict"][
        f"{layer}.weight"
    ]
    assert saved.dtype == model.network[1].weight.dtype
