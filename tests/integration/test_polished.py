"""A retrained network of real digits, polished until it breaks nothing that the deployed one gets
right.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer, right, same
from torch.utils.data import ConcatDataset, DataLoader

from lightning_nrl import BoundOptions, repair
from lightning_nrl.methods import Polish


class All(Digits):
    """Training on the new data too."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(ConcatDataset([self.train, self.repair]), self.batch_size, shuffle=True)


def retrained(folder: Path, network: str = "mlp", epochs: int = 6) -> tuple[Classifier, Path]:
    model = Classifier(network, lr=0.01)
    trainer = quiet_trainer(
        folder, enable_checkpointing=False, max_epochs=epochs, limit_val_batches=0
    )
    trainer.fit(model, datamodule=All())
    trainer.save_checkpoint(folder / "new.ckpt")
    return model, folder / "new.ckpt"


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_a_retrained_checkpoint_is_polished(
    tmp_path: Path, trained_path: Path, network: str
) -> None:
    """The report says what plain forward passes of the old and of the repaired model say."""
    new, path = retrained(tmp_path, network)
    old = Classifier.load_from_checkpoint(trained_path) if network == "mlp" else Classifier("cnn")
    if network == "cnn":
        quiet_trainer(tmp_path, enable_checkpointing=False, max_epochs=2).fit(
            old, datamodule=Digits()
        )
    data, model, bounds = Digits(), copy.deepcopy(old), BoundOptions(strength=1.0)
    parts = (data.train, data.repair)
    breaks = sum(int((right(old, part) & ~right(new, part)).sum()) for part in parts)
    report = repair(
        quiet_trainer(tmp_path),
        model,
        method=Polish(path),
        datamodule=data,
        bounds=bounds,
        verbose=False,
    )
    assert report.status == "repaired"
    assert [step.name for step in report.steps] == ["given", "polish"]
    assert [step.broken for step in report.steps] == [breaks, 0]
    for split, part in zip(report.splits, parts, strict=True):
        before, after = right(old, part), right(model, part)
        assert split.broken == int((before & ~after).sum()) == 0
        assert split.repaired == int((~before & after).sum())
    assert report.splits[1].repaired > 0.5 * report.steps[0].repaired > 10
    assert same(report.files["checkpoint"], model)
    assert breaks > 0
    if network == "cnn":  # statistics included
        assert not torch.equal(model.network[1].running_var, old.network[1].running_var)
