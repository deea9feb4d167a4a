"""A checkpoint is data: nothing that is in it runs, wherever it is read, unless that is asked for
by name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quick_repair, quiet_trainer, same
from lightning_package import AsyncCheckpointIO, ModelCheckpoint

from lightning_nrl import (
    ConfigurationError,
    OldModel,
    WeightInterpolation,
    compare,
    diagnose,
    repair,
    sweep,
)
from lightning_nrl.callbacks import PositiveCongruentTraining
from lightning_nrl.methods import Polish


class Payload:
    """Makes a file when it is read as a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class Custom:
    """An object that does nothing."""


def with_object(path: Path, to: Path, where: str, thing: object) -> Path:
    """A copy of a checkpoint with an object in one of its parts."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.setdefault(where, {})["thing"] = thing
    torch.save(checkpoint, to)
    return to


def fit(callback: Any, tmp_path: Path) -> None:
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), datamodule=Digits())


def call(function: Any, path: Path, folder: Path, plugins: Any = None, **arguments: Any) -> Any:
    trainer = quiet_trainer(folder, plugins=plugins)
    return function(trainer, Classifier(), datamodule=Digits(), ckpt_path=path, **arguments)


READERS = {
    "repair, asynchronous": lambda path, tmp: call(
        repair, path, tmp, plugins=[AsyncCheckpointIO()], **QUICK
    ),
    "diagnose": partial(call, diagnose),
    "compare": partial(call, compare),
    "sweep": partial(call, sweep, settings={"alpha": 6}, seeds=1),
    "reference": lambda path, tmp: fit(quick_repair(reference=path), tmp),
    "OldModel": lambda path, tmp: fit(quick_repair(reference=OldModel(path)), tmp),
    "congruent": lambda path, tmp: fit(PositiveCongruentTraining(path), tmp),
    "interpolation": lambda path, tmp: fit(WeightInterpolation(path, verbose=False), tmp),
    "Polish": lambda path, tmp: call(repair, None, tmp, method=Polish(path), verbose=False),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_a_checkpoint_holds_does_not_run(tmp_path, trained_path, reader):
    path, mark = tmp_path / "evil.ckpt", tmp_path / "it-ran"
    with_object(trained_path, path, "hyper_parameters", Payload(mark))
    with pytest.raises(ConfigurationError, match=r"cannot be read \(UnpicklingError: .*\nHINT: "):
        READERS[reader](path, tmp_path / "logs")
    assert not mark.exists()
    torch.load(path, weights_only=False)  # where it is let, it does run
    assert mark.exists()


def test_a_trusted_checkpoint_is_read_if_that_is_asked_for_by_name(tmp_path, trained_path):
    path = with_object(trained_path, tmp_path / "objects.ckpt", "extra", Custom())
    model, trainer = Classifier(), quiet_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match="`weights_only=False`"):
        diagnose(trainer, model, datamodule=Digits(), ckpt_path=path)
    diagnose(trainer, model, datamodule=Digits(), ckpt_path=path, weights_only=False)
    trained = torch.load(trained_path, weights_only=True)["state_dict"]
    assert same(model, trained)
    # The trainer reads as before afterwards.
    assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"


class SavesObjects(Classifier):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = Custom()


def test_the_best_checkpoint_is_data_too(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = quick_repair(start_from="best")
    with pytest.raises(ConfigurationError, match=r"`start_from=.*cannot be read[\s\S]*HINT: "):
        quiet_trainer(tmp_path, best, callback, max_epochs=1).fit(
            SavesObjects(), datamodule=Digits()
        )
