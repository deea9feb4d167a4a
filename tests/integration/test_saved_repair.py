"""A repair in a Trainer that was killed after the continued training: the next run of the logger
does not repeat it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from digit_models import QUICK, Classifier, Few, quiet_trainer, same
from lightning_package import loggers
from options import with_options
from torch import Tensor

from lightning_nrl import RepairReport, repair
from lightning_nrl.methods import Auto


class Death(BaseException):
    pass


class Mortal(Classifier):
    """Counts its training steps; may die when it is run after them."""

    steps: ClassVar[int] = 0
    passes_since: ClassVar[int] = 0
    dies: ClassVar[bool] = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.training:  # not in the check before the repair
            Mortal.steps += 1
            Mortal.passes_since = 0
        return super().training_step(batch, batch_idx)

    def forward(self, images: Tensor) -> Tensor:
        Mortal.passes_since += 1
        # Known data have 7 batches: after a round, all of them are evaluated once. The rung after
        # the training makes steps of its own.
        if Mortal.dies and Mortal.steps and Mortal.passes_since > 12:
            raise Death
        return super().forward(images)


def repaired(folder: Path, trained_path: Path) -> tuple[Classifier, RepairReport]:
    model = Mortal.load_from_checkpoint(trained_path)
    settings = {**QUICK, "method": Auto(QUICK["method"]), "save_every": 0}
    trainer = quiet_trainer(folder, logger=loggers.CSVLogger(folder))
    return model, repair(trainer, model, datamodule=Few(), **with_options(settings))


def test_a_finished_training_is_not_repeated(tmp_path, trained_path):
    uninterrupted, report = repaired(tmp_path / "uninterrupted", trained_path)
    assert report.status == "repaired"
    steps, Mortal.steps, Mortal.dies = Mortal.steps, 0, True
    with pytest.raises(Death):
        repaired(tmp_path / "killed", trained_path)
    Mortal.dies = False
    (saved,) = tmp_path.glob("killed/lightning_logs/version_0/repair/.resume-*")
    assert list(saved.glob("*.finished"))
    assert Mortal.steps == steps > 0
    resumed, report = repaired(tmp_path / "killed", trained_path)
    assert Mortal.steps == steps
    assert "version_1" in report.files["checkpoint"]
    assert same(uninterrupted, resumed)
    assert not list(tmp_path.rglob(".resume-*"))
