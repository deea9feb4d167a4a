"""Whatever is raised in a repair, the model, the trainer and the random state are as training left them."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quick_repair, quiet_trainer
from distributed_fit import Continued
from lightning_package import Callback, CSVLogger, ModelCheckpoint, Trainer

import lightning_nrl._utils.timing
import lightning_nrl.methods._known_activations
from lightning_nrl import RegressionFreeRepair


class Broken(Exception):
    pass


def picture(trainer: Trainer, model: Any) -> dict[str, Any]:
    """All that a repair must leave as it found it."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "methods": [sorted(vars(module)) for module in model.modules()],
        "stage": trainer.state.stage,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


class Witness(RegressionFreeRepair):
    """A repair that looks at everything before and after, also when it fails."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = picture(trainer, pl_module)
        try:
            super().on_train_end(trainer, pl_module)
        finally:
            self.after = picture(trainer, pl_module)


def witness(**arguments: Any) -> Witness:
    repair = quick_repair(**arguments)
    repair.__class__ = Witness
    return repair  # type: ignore[return-value]


class Frozen(Classifier):
    """Its batch norm is frozen: evaluation mode and no gradient, as fine-tuning does it."""

    def on_train_epoch_start(self) -> None:
        self.network[1].eval().requires_grad_(False)


# A function has the name of its module, so that the module is found by its path.
CORE = import_module("lightning_nrl.pipeline.repair_module")
STAGES = {
    "collect": (CORE, "evaluate_baseline"),
    "record": (lightning_nrl.methods._known_activations, "record"),
    "judge": (CORE, "judge"),
}


def fit(path: Path, repair: RegressionFreeRepair, *callbacks: Any, **arguments: Any) -> None:
    trainer = quiet_trainer(path, *callbacks, repair, max_epochs=1, **arguments)
    trainer.fit(Frozen("cnn"), datamodule=Digits())


def raise_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type[BaseException]) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error("on purpose")

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("start_from", ["last", "best"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, start_from: str
) -> None:
    raise_in(monkeypatch, *STAGES[stage], Broken)
    repair = witness(start_from=start_from, layer="network.3")
    checkpoint = ModelCheckpoint(monitor="val_loss")
    with pytest.raises(Broken):
        fit(tmp_path, repair, Shift(), checkpoint)
    assert checkpoint.best_model_path
    assert_same(repair.before, repair.after)
    assert repair.repaired_model_path == ""


class Shift(Callback):
    """Moves the weights after the best checkpoint was saved."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1.01)


METHODS = [QUICK["method"], Continued()]


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_on_the_way_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    raise_in(monkeypatch, lightning_nrl._utils.timing.StageTimer, "tell", Broken)
    repair = witness(method=method)
    with pytest.raises(Broken):
        fit(tmp_path, repair)
    assert_same(repair.before, repair.after)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_on_the_way_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    raise_in(monkeypatch, lightning_nrl._utils.timing.StageTimer, "tell", KeyboardInterrupt)
    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning would ignore Ctrl-C from here on
    repair = witness(method=method)
    with pytest.raises(SystemExit):
        fit(tmp_path, repair)
    assert_same(repair.before, repair.after)


@pytest.mark.parametrize("start_from", ["last", "best"])
def test_a_failure_to_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_from: str
) -> None:
    repair = witness(start_from=start_from)

    class Full(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if repair._pending:
                raise Broken("no space left on device")

    with pytest.raises(Broken):
        fit(tmp_path, repair, Full(), ModelCheckpoint(monitor="val_loss"))
    assert_same(repair.before, repair.after)
    assert repair.report is None
    assert repair.state_dict() == {}


class Offline(CSVLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("repair/") for name in metrics):
            raise Broken("no network")


def test_a_logger_that_raises_does_not_cost_the_repair(tmp_path: Path) -> None:
    repair = witness()
    with pytest.warns(UserWarning, match="was not logged to Offline, which raised Broken: no network"):
        fit(tmp_path, repair, logger=Offline(tmp_path))
    assert repair.report.status == "repaired"


@pytest.mark.parametrize("layer", ["auto", "network.3"])
def test_a_repair_changes_nothing_but_the_layer(tmp_path: Path, layer: str) -> None:
    repair = witness(layer=layer)
    fit(tmp_path, repair)
    assert repair.report.status == "repaired"
    name = f"{repair.report.layers[0]}.weight"
    before, after = repair.before["state"].pop(name), repair.after["state"].pop(name)
    assert not torch.equal(before, after)
    assert int((before != after).sum()) <= 30
    assert_same(repair.before, repair.after)
