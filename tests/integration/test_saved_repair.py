"""A repair in a Trainer that was killed after the continued training: the next run of the logger
does not repeat it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from digit_models import QUICK, Classifier, Digits, quiet_trainer
from lightning_package import loggers
from options import with_options
from test_faults import assert_same

from lightning_nrl import repair
from lightning_nrl._trainer.continue_training import ContinuedTraining
from lightning_nrl.methods import finetune_polish


class Death(BaseException):
    pass


def repaired(folder: Path, trained_path: Path) -> tuple[Classifier, Any]:
    model = Classifier.load_from_checkpoint(trained_path)
    given = {**QUICK, "method": "finetune-polish", "save_every": 0}
    trainer = quiet_trainer(folder, logger=loggers.CSVLogger(folder))
    return model, repair(trainer, model, datamodule=Digits(), **with_options(given))


def test_a_finished_training_is_not_repeated(
    tmp_path: Path, trained_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = create_autospec(ContinuedTraining.__call__, side_effect=ContinuedTraining.__call__)
    monkeypatch.setattr(ContinuedTraining, "__call__", training)
    whole, report = repaired(tmp_path / "whole", trained_path)
    assert report.status == "repaired"
    with monkeypatch.context() as patch:
        patch.setattr(
            finetune_polish,
            "polished",
            create_autospec(finetune_polish.polished, side_effect=Death),
        )
        with pytest.raises(Death):
            repaired(tmp_path / "killed", trained_path)
    (left,) = tmp_path.glob("killed/lightning_logs/version_0/repair/.resume-*")
    assert list(left.glob("*.finished"))
    assert training.call_count == 2
    again, report = repaired(tmp_path / "killed", trained_path)
    assert training.call_count == 2
    assert "version_1" in report.files["checkpoint"]
    assert_same(dict(whole.state_dict()), dict(again.state_dict()))
    assert not list(tmp_path.rglob(".resume-*"))
