"""Updates through a Trainer: the model that `fit` has trained against the one it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, Untrainable, quiet_trainer, right
from options import with_options
from torch import nn

from lightning_nrl import ConfigurationError, RegressionFreeRepair, RepairReport


class OnNewData(Digits):
    """Trains on what came in since, so that the network forgets."""

    def train_dataloader(self) -> Any:
        return self.repair_dataloader()


def updating(reference: Any, folder: Path, **arguments: Any) -> RegressionFreeRepair:
    given = {"passed": Digits().val_dataloader(), "unseen": "test", "verbose": False, **arguments}
    return RegressionFreeRepair(
        reference=reference, dirpath=folder / "repair", **with_options(given)
    )


def test_what_fit_has_broken_is_brought_back(trained_path, tmp_path):
    old = Classifier.load_from_checkpoint(trained_path)
    model, data = Classifier.load_from_checkpoint(trained_path), OnNewData()
    updated = updating(str(trained_path), tmp_path)
    quiet_trainer(tmp_path, updated, max_epochs=4).fit(model, datamodule=data)
    report = updated.report
    assert report.status == "repaired"
    both = [(right(old, part), right(model, part)) for part in (data.val, data.repair)]
    lost = sum(int((was & ~now).sum()) for was, now in both)
    update = report.pooled_update("known")
    assert update.final.broken == lost < update.trained.broken
    assert report.pooled("known").broken == 0
    again = Classifier.load_from_checkpoint(updated.repaired_model_path)
    assert torch.equal(right(again, data.test), right(model, data.test))
    assert (
        RepairReport.from_json((tmp_path / "repair" / "report.json").read_text()).update
        == report.update
    )


def test_a_reference_that_does_not_fit_is_refused_before_training(tmp_path):
    torch.save({"state_dict": nn.Linear(3, 2).state_dict()}, tmp_path / "old.ckpt")
    (tmp_path / "old.csv").write_text("split,id,prediction\nrepair,0,1\n")
    refused = {"old.ckpt": "`reference` lacks", "old.csv": r"samples of `\w+` have no prediction"}
    for name, message in refused.items():
        with pytest.raises(ConfigurationError, match=message):
            quiet_trainer(tmp_path, updating(tmp_path / name, tmp_path)).fit(
                Untrainable(), datamodule=Digits()
            )
