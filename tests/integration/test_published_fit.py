"""The methods of docs/published_methods.md in a Trainer."""

from __future__ import annotations

import pytest
from digit_models import Classifier, Digits, quiet_trainer
from lightning_package import ModelCheckpoint

from lightning_nrl import RegressionFreeRepair, SearchOptions, TrainingHistory, repair
from lightning_nrl.methods import METHODS
from lightning_nrl.published import Apricot, NeuRecover


@pytest.mark.parametrize("method", METHODS.on_demand)
def test_every_published_method_runs_after_a_fit_and_on_a_checkpoint(method, tmp_path):
    arguments = {
        "method": method,
        "gate": "accuracy",
        "layer": "network.3",
        "verbose": False,
    }
    history = TrainingHistory(["train", "repair"], dirpath=tmp_path / "history")
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=3)
    callback = RegressionFreeRepair(**arguments)
    trainer = quiet_trainer(tmp_path, history, keep, callback)
    trainer.fit(Classifier(), datamodule=Digits())
    if method == "neurecover":
        localizer = NeuRecover(history=str(tmp_path / "history"))
        arguments["search"] = SearchOptions(localizer=localizer)
    if method == "apricot":
        arguments["method"] = Apricot(tmp_path / "kept")
    report = repair(
        quiet_trainer(tmp_path),
        Classifier(),
        datamodule=Digits(),
        ckpt_path=keep.best_model_path,
        **arguments,
    )
    for made in (callback.report, report):
        assert made.steps or made.search is not None
