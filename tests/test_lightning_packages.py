"""`lightning.pytorch` and `pytorch_lightning`: each works, without the other too, and they are not
mixed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_package import NAME, OTHER
from packaging.version import Version
from repository import ROOT
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy_repairs import QUICK, blobs, mlp

from lightning_nrl import (
    ConfigurationError,
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RegressionMetrics,
    ReleaseGate,
    WeightInterpolation,
    compare,
    diagnose,
    repair,
    sweep,
)

PACKAGES = sorted([NAME, OTHER])
PAIRS = [(NAME, OTHER), (OTHER, NAME)]
FABRIC = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning"}

TELLING = (
    "test_trained_checkpoint.py::test_the_report_is_that_of_the_callback_after_training",
    "test_cli.py::test_words_in_a_file_make_a_repair",
)
"""Integration tests that run under the other package too: on a checkpoint, in a fit by CLI."""


@cache
def net(package: str) -> Any:
    """A class of modules of a package."""

    class Net(import_module(package).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    return Net


def loader(n: int, shift: float = 0.0, **how: Any) -> DataLoader:
    return DataLoader(TensorDataset(*blobs(n, shift)), 32, **how)


DATA = {"train_dataloaders": loader(120, shuffle=True), "val_dataloaders": loader(60, 1.5)}


def trainer_of(package: str, folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    settings = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": folder,
    } | arguments
    return import_module(package).Trainer(
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **settings
    )


def fitted(package: str, folder: Path) -> RegressionFreeRepair:
    """The callback that repaired a module in a fit: training goes on in an inner trainer."""
    callback = RegressionFreeRepair(verbose=False)
    trainer_of(package, folder, callback).fit(net(package)(), **DATA)
    return callback


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that a trainer of one package saved; both read it."""
    folder = tmp_path_factory.mktemp("old")
    trainer = trainer_of(OTHER, folder, max_epochs=2)
    trainer.fit(net(OTHER)(), **DATA)
    trainer.save_checkpoint(folder / "old.ckpt")
    return str(folder / "old.ckpt")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_checkpoint_is_read_whichever_package_saved_it(package, old, tmp_path):
    model = net(package).load_from_checkpoint(old)
    trainer, quick = trainer_of(package, tmp_path), {**DATA, "ckpt_path": old}
    assert diagnose(trainer, model, **quick).known["failed"] > 0
    assert compare(
        trainer, model, **quick, methods=["swarm"], unseen=None, search=QUICK["search"]
    ).entries
    report = repair(trainer, model, **quick, **QUICK, verbose=False)
    assert report.status == "repaired"
    saved = torch.load(report.files["checkpoint"], weights_only=True)
    assert saved["state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_an_update_is_trained_counted_interpolated_and_released(package, old, tmp_path):
    gate = ReleaseGate(reference=old, rules=["nfr:50%"], verbose=False)
    training, metrics = PositiveCongruentTraining(old), RegressionMetrics(old)
    interpolation = WeightInterpolation(old, verbose=False)
    trainer = trainer_of(package, tmp_path, training, metrics, interpolation, gate)
    model = net(package)()
    trainer.fit(model, **DATA)
    assert "regression/nfr" in trainer.callback_metrics
    trainer.test(model, loader(60, 0.5), verbose=False)
    assert gate.report is not None


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_what_is_of_the_other_package_is_refused_before_anything_runs(own, other, tmp_path):
    theirs, model = import_module(other), net(own)()
    logger = theirs.loggers.CSVLogger(tmp_path)
    with pytest.raises(
        ConfigurationError, match=f"`logger`: CSVLogger is of `{other}`, the Trainer of `{own}`"
    ):
        trainer_of(own, tmp_path, RegressionFreeRepair(), logger=logger).fit(model, **DATA)
    kind, refusal = ConfigurationError, f"`callbacks`: Timer is of `{other}`"
    if Version(import_module(own).__version__) < Version("2.6"):
        kind, refusal = TypeError, "single import style"  # Lightning's own
    with pytest.raises(kind, match=refusal):
        trainer_of(own, tmp_path, RegressionFreeRepair(), theirs.callbacks.Timer()).fit(
            model, **DATA
        )
    trainer = trainer_of(own, tmp_path)
    for work in (repair, diagnose, compare, partial(sweep, settings=[{}])):
        with pytest.raises(
            ConfigurationError, match=f"`model`: Net is of `{other}`, the Trainer of `{own}`"
        ):
            work(trainer, net(other)(), **DATA)
        with pytest.raises(
            ConfigurationError, match=f"`datamodule`: LightningDataModule is of `{other}`"
        ):
            work(trainer, model, datamodule=theirs.LightningDataModule())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_neither_package_needs_the_other(name, other, tmp_path):
    tests = [str(ROOT / "tests" / "integration" / test) for test in TELLING if name == OTHER]
    script = f"""
import sys
from pathlib import Path
import pytest
sys.modules[{other!r}] = sys.modules[{FABRIC[other]!r}] = None
from test_lightning_packages import fitted
report = fitted({name!r}, Path({str(tmp_path)!r})).report
assert report.status == "repaired"
assert [rung.name for rung in report.rungs][:2] == ["search", "training"]
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
assert not {tests} or pytest.main([*options, *{tests}]) == 0
assert sys.modules[{other!r}] is None
"""
    run(["-c", script], name)


def run(arguments: list[str], package: str) -> str:
    """What a new Python process prints, in which tests use a package."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "NRL_LIGHTNING": package, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
