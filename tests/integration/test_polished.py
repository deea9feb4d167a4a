"""A retrained network of real digits, polished until it breaks nothing that the deployed one gets
right.
"""

from __future__ import annotations

import copy

import torch
from digit_models import Classifier, Digits, quiet_trainer, right, same
from torch.utils.data import ConcatDataset, DataLoader

from lightning_nrl import BoundOptions, repair
from lightning_nrl.methods import Polish


class All(Digits):
    """Training on the new data too."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(ConcatDataset([self.train, self.repair]), self.batch_size, shuffle=True)


def test_a_retrained_checkpoint_is_polished(tmp_path):
    """The report says what plain forward passes of the old and of the repaired model say."""
    old, new = Classifier("cnn"), Classifier("cnn", lr=0.01)
    for model, data, epochs in ((old, Digits(), 2), (new, All(), 4)):
        trainer = quiet_trainer(tmp_path, enable_checkpointing=False, max_epochs=epochs)
        trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    data, model = Digits(), copy.deepcopy(old)
    parts = (data.train, data.repair)
    broken = sum(int((right(old, part) & ~right(new, part)).sum()) for part in parts)
    report = repair(
        quiet_trainer(tmp_path),
        model,
        method=Polish(tmp_path / "new.ckpt"),
        datamodule=data,
        bounds=BoundOptions(strength=1.0),
        verbose=False,
    )
    assert report.status == "repaired"
    assert [step.name for step in report.steps] == ["given", "polish"]
    assert [step.broken for step in report.steps] == [broken, 0]
    assert broken > 0
    for split, part in zip(report.splits, parts, strict=True):
        before, after = right(old, part), right(model, part)
        assert split.broken == int((before & ~after).sum()) == 0
        assert split.repaired == int((~before & after).sum())
    assert report.splits[1].repaired > 0.5 * report.steps[0].repaired > 10
    assert same(report.files["checkpoint"], model)
    assert not torch.equal(model.network[1].running_var, old.network[1].running_var)
