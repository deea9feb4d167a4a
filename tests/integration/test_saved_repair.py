"""A repair in a Trainer that was killed while the training goes on: the next run of the logger ends as it would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer
from distributed_fit import Continued
from lightning_package import loggers
from options import with_options
from test_faults import assert_same

import lightning_nrl._utils.timing
from lightning_nrl import repair


class Death(BaseException):
    pass


class Randomised(Classifier):
    """Trains by a schedule on augmented images; the ends of epochs change weights at random."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images = batch[0] + 0.1 * torch.randn_like(batch[0])
        return super().training_step((images, *batch[1:]), batch_idx)

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1 + 0.01 * torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


def repaired(folder: Path, trained_path: Path) -> tuple[Classifier, Any]:
    model = Randomised.load_from_checkpoint(trained_path)
    given = {**QUICK, "method": Continued(), "gate": "accuracy", "save_every": 0}
    trainer = quiet_trainer(folder, logger=loggers.CSVLogger(folder))
    return model, repair(trainer, model, datamodule=Digits(), **with_options(given))


def test_a_training_that_goes_on_goes_on_once_more(
    tmp_path: Path, trained_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, tell, dies_at = [0], lightning_nrl._utils.timing.StageTimer.tell, [0]

    def telling(*args: Any, **kwargs: Any) -> None:
        told[0] += 1
        tell(*args, **kwargs)
        if told[0] == dies_at[0]:
            raise Death

    monkeypatch.setattr(lightning_nrl._utils.timing.StageTimer, "tell", telling)
    whole, report = repaired(tmp_path / "whole", trained_path)
    assert report.status == "repaired"
    n_all, told[0], dies_at[0] = told[0], 0, 4 * told[0] // 5
    with pytest.raises(Death):
        repaired(tmp_path / "killed", trained_path)
    (left,) = tmp_path.glob("killed/lightning_logs/version_0/repair/.resume-*")
    assert (left / "under-way").exists()
    told[0] = dies_at[0] = 0
    again, report = repaired(tmp_path / "killed", trained_path)
    assert 0 < told[0] < n_all / 2
    assert "version_1" in report.files["checkpoint"]
    assert_same(dict(whole.state_dict()), dict(again.state_dict()))
    assert not list(tmp_path.rglob(".resume-*"))
