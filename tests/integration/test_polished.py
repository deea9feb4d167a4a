"""A retrained network of real digits, polished until it breaks nothing that the deployed one gets right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer, right
from torch.utils.data import ConcatDataset, DataLoader

from lightning_nrl import BoundOptions, ConfigurationError, RegressionFreeRepair, RepairReport, repair
from lightning_nrl.methods.polish_weights import Polish


class All(Digits):
    """Training on the new data too."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(ConcatDataset([self.train, self.repair]), self.batch_size, shuffle=True)


def retrained(folder: Path, network: str = "mlp", epochs: int = 6) -> tuple[Classifier, Path]:
    model = Classifier(network, lr=0.01)
    trainer = quiet_trainer(folder, enable_checkpointing=False, max_epochs=epochs, limit_val_batches=0)
    trainer.fit(model, datamodule=All())
    trainer.save_checkpoint(folder / "new.ckpt")
    return model, folder / "new.ckpt"


def assert_nothing_broke(report: RepairReport, old: Classifier, model: Classifier, given_breaks: int) -> None:
    """The report says what plain forward passes of the old and of the repaired model say."""
    assert report.status == "repaired"
    assert [step.name for step in report.steps] == ["given", "polish"]
    assert report.steps[0].broken == given_breaks
    assert report.steps[1].broken == 0
    data = Digits()
    for split, part in zip(report.splits, (data.train, data.repair), strict=True):
        before, after = right(old, part), right(model, part)
        assert split.broken == int((before & ~after).sum()) == 0
        assert split.repaired == int((~before & after).sum())
    assert report.splits[1].repaired > 0.5 * report.steps[0].repaired > 10


def test_a_retrained_checkpoint_is_polished(tmp_path: Path, trained_path: Path, trained: Classifier) -> None:
    new, path = retrained(tmp_path)
    data = Digits()
    breaks = sum(int((right(trained, part) & ~right(new, part)).sum()) for part in (data.train, data.repair))
    assert breaks > 0
    model = Classifier()
    arguments = {"datamodule": data, "ckpt_path": trained_path, "verbose": False, "bounds": BoundOptions(strength=1.0)}
    report = repair(quiet_trainer(tmp_path), model, method=Polish(path), **arguments)
    assert_nothing_broke(report, trained, model, breaks)
    saved = Classifier.load_from_checkpoint(report.files["checkpoint"])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())


def test_a_fit_is_replaced_by_a_polished_model_statistics_included(tmp_path: Path) -> None:
    new, _ = retrained(tmp_path, "cnn")
    model, old = Classifier("cnn"), Classifier("cnn")
    callback = RegressionFreeRepair(method=Polish(new), verbose=False, bounds=BoundOptions(strength=1.0))
    quiet_trainer(tmp_path, callback).fit(model, datamodule=Digits())
    report = callback.report
    assert report.status == "repaired"
    assert [step.broken for step in report.steps][1] == 0
    assert [split.broken for split in report.splits] == [0, 0]
    if "back to" not in report.steps[1].note:
        assert torch.equal(model.network[1].running_var, new.network[1].running_var)
    assert not torch.equal(model.network[1].running_var, old.network[1].running_var)
    data = Digits()
    for split, part in zip(report.splits, (data.train, data.repair), strict=True):
        assert split.kept + split.repaired == int(right(model, part).sum())


@pytest.mark.parametrize(
    ("path", "message"), [("none.ckpt", "cannot be read"), ("cnn", "has 'network.1.weight' in the shape")]
)
def test_a_model_that_does_not_fit_is_refused(path: str, message: str, tmp_path: Path, trained: Classifier) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    new = Classifier("cnn") if path == "cnn" else tmp_path / path
    with pytest.raises(ConfigurationError, match=rf"`Polish.new`.*{message}[\s\S]*\nHINT: "):
        repair(quiet_trainer(tmp_path), trained, datamodule=Digits(), method=Polish(new), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
