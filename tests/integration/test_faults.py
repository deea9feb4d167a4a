"""Whatever is raised in a repair, the model, the trainer and the random state are as training left
them.
"""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from digit_models import (
    QUICK,
    Classifier,
    Digits,
    Untrainable,
    quick_repair,
    quiet_trainer,
    right,
    same,
    state_of,
)
from distributed_fit import Continued
from lightning_package import Callback, Logger, ModelCheckpoint, Trainer
from options import with_options

from lightning_nrl import ConfigurationError, RegressionFreeRepair, WeightInterpolation, repair
from lightning_nrl.errors import DataWarning, EvaluationError, LoggingWarning, ModelError
from lightning_nrl.methods import Polish


class Broken(Exception):
    pass


def picture(trainer: Trainer, model: Any) -> dict[str, Any]:
    """All that a repair must leave as it found it."""
    return {
        "state": state_of(model),
        "gradients": {
            name: p.grad if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        },
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
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


class Fragile(Classifier):
    """Raises in one of its forward passes; the batch norm is frozen, as in fine-tuning."""

    passes_left: ClassVar[float] = math.inf  # of all copies
    error: ClassVar[type[BaseException]] = ArithmeticError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Fragile.passes_left -= 1
        if Fragile.passes_left == 0:
            raise self.error("on purpose")
        return super().forward(images)

    def on_train_epoch_start(self) -> None:
        self.network[1].eval().requires_grad_(False)


class Witness(RegressionFreeRepair):
    """A repair that looks at everything before and after; the model may fail within."""

    fails_after: float = math.inf
    error: type[BaseException] = ArithmeticError

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = picture(trainer, pl_module)
        Fragile.passes_left, Fragile.error = self.fails_after, self.error
        try:
            super().on_train_end(trainer, pl_module)
        finally:
            Fragile.passes_left = math.inf
            self.after = picture(trainer, pl_module)


def witness(**arguments: Any) -> Witness:
    repair = quick_repair(**arguments)
    repair.__class__ = Witness
    return repair


def fit(path: Path, repair: RegressionFreeRepair, *callbacks: Any, **arguments: Any) -> None:
    trainer = quiet_trainer(path, *callbacks, repair, max_epochs=1, **arguments)
    trainer.fit(Fragile("cnn"), datamodule=Digits())


class Shift(Callback):
    """Moves the weights after the best checkpoint was saved."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1.01)


@pytest.mark.parametrize("start_from", ["last", "best"])
@pytest.mark.parametrize("fails_after", [16, 20, 35])
def test_an_exception_leaves_no_trace(tmp_path, start_from, fails_after):
    """While the known samples are counted, recorded, and counted again."""
    repair = witness(start_from=start_from, layer="network.3")
    repair.fails_after = fails_after
    checkpoint = ModelCheckpoint(monitor="val_loss")
    with pytest.raises((ArithmeticError, ModelError), match="on purpose"):
        fit(tmp_path, repair, Shift(), checkpoint)
    assert_same(repair.before, repair.after)
    assert repair.repaired_model_path is None


def test_an_interrupt_of_the_training_leaves_everything_as_it_was(tmp_path, monkeypatch):
    # Lightning would ignore Ctrl-C from here on.
    monkeypatch.setattr("signal.signal", lambda *args: None)
    repair = witness(method=Continued())
    repair.fails_after, repair.error = 40, KeyboardInterrupt
    with pytest.raises(SystemExit):
        fit(tmp_path, repair)
    assert_same(repair.before, repair.after)


def test_a_failure_to_save_leaves_no_trace(tmp_path):
    repair = witness(start_from="best")

    class Full(Callback):
        training = True

        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.training = False

        def on_save_checkpoint(
            self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
        ) -> None:
            if not self.training:
                raise Broken("no space left on device")

    with pytest.raises(Broken):
        fit(tmp_path, repair, Full(), ModelCheckpoint(monitor="val_loss"))
    assert_same(repair.before, repair.after)
    assert repair.report is None


class Closed(Logger):
    """Cannot open its store, as `MLFlowLogger()` with a store of files today."""

    @property
    def name(self) -> str:
        raise Broken("the file store takes no runs any more")

    @property
    def version(self) -> str:
        return self.name

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


def test_a_logger_without_a_store_does_not_cost_the_fit(tmp_path):
    repair = witness()
    with pytest.warns(
        LoggingWarning, match="Closed has no folder .Broken: the file store takes no runs any more"
    ):
        fit(tmp_path, repair, logger=Closed(), enable_checkpointing=False)
    assert repair.report.status == "repaired"
    assert repair.repaired_model_path == str(tmp_path / "repair" / "repaired.ckpt")


def test_a_repair_changes_nothing_but_the_layer(tmp_path):
    repair = witness(layer="network.3")
    fit(tmp_path, repair)
    assert repair.report.status == "repaired"
    name = "network.3.weight"
    before, after = repair.before["state"].pop(name), repair.after["state"].pop(name)
    assert 0 < int((before != after).sum()) <= 30
    assert_same(repair.before, repair.after)


def damaged(where: str) -> Digits:
    """Data with one sample behind the first batch that cannot be judged."""
    data = Digits()
    images, labels = data.repair.tensors[:2]
    if where == "input":
        images[150] = torch.nan
    else:
        labels[150] = 77
    return data


@pytest.mark.parametrize("where", ["input", "no class"])
def test_a_sample_that_cannot_be_judged_is_left_out_and_named(tmp_path, trained, where):
    with pytest.warns(DataWarning, match=r"left out: .*\[?150\]?"):
        report = repair(
            quiet_trainer(tmp_path), trained, datamodule=damaged(where), **with_options(QUICK)
        )
    assert report.status == "repaired"
    assert {split.split: split.n for split in report.splits} == {"train": 400, "repair": 202}
    assert "Left out" in report.reason
    # Places in the data set are kept: sample 151 and those behind it are themselves.
    repaired = list(report.splits[1].repaired_ids)
    assert 150 not in repaired
    assert right(trained, Digits().repair)[repaired].all()


def test_data_that_are_wrong_as_a_whole_are_an_error(tmp_path, trained):
    data = Digits()
    data.repair.tensors[1][64:] = 77
    before = state_of(trained)
    with pytest.raises(EvaluationError, match="139 samples have labels below 0 or above the"):
        repair(quiet_trainer(tmp_path), trained, datamodule=data, **with_options(QUICK))
    assert same(before, trained)


@pytest.mark.parametrize(
    ("network", "layer", "method", "message"),
    [
        ("mlp", "auto", Polish("nope.ckpt"), "'nope.ckpt' cannot be read"),
        (
            "mlp",
            "auto",
            Polish(Classifier("cnn")),
            "`Polish.new` has 'network.1.weight' in the shape",
        ),
        ("mlp", ["network.1", "network.3"], "convex", "repairs only the last Linear layer"),
        ("mlp", "network.1", "convex", "is not the model's logits"),
    ],
)
def test_what_is_known_before_is_said_before(tmp_path, network, layer, method, message):
    callback = quick_repair(layer=layer, method=method)
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(
            Untrainable(network), datamodule=Digits()
        )


def test_a_report_that_cannot_be_read_does_not_stop_a_resume(tmp_path, trained_path):
    callback, checkpoint = quick_repair(), torch.load(trained_path, weights_only=True)
    checkpoint["callbacks"][callback.state_key] = {"report": '{"status": 3}'}
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    trainer = quiet_trainer(tmp_path, callback, max_epochs=4)
    with pytest.warns(DataWarning, match="the report in the checkpoint cannot be read"):
        trainer.fit(Classifier(), datamodule=Digits(), ckpt_path=tmp_path / "damaged.ckpt")
    assert callback.report.status == "repaired"


def test_a_test_of_the_best_is_not_of_the_repair(tmp_path, recwarn):
    callback, model = quick_repair(), Classifier()
    trainer = quiet_trainer(tmp_path, callback, ModelCheckpoint(monitor="val_loss"), max_epochs=1)
    trainer.fit(model, datamodule=Digits())

    def said() -> list[str]:
        return [
            str(w.message) for w in recwarn if "other weights than the repaired" in str(w.message)
        ]

    trainer.test(model, datamodule=Digits(), verbose=False)
    trainer.test(model, datamodule=Digits(), ckpt_path=callback.repaired_model_path, verbose=False)
    assert said() == []
    trainer.test(datamodule=Digits(), verbose=False)
    (text,) = said()
    assert callback.repaired_model_path in text


def test_a_checkpoint_whose_checksums_do_not_fit_is_said_to_be_damaged(tmp_path, trained_path):
    data = bytearray(trained_path.read_bytes())
    value = torch.load(trained_path, weights_only=True)["state_dict"]["network.1.weight"]
    at = data.index(value.numpy().tobytes())
    data[at + 1] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(data)

    def read(path: Path) -> None:
        trainer = quiet_trainer(
            tmp_path, WeightInterpolation(path, verbose=False), fast_dev_run=True
        )
        trainer.fit(Classifier.load_from_checkpoint(trained_path), datamodule=Digits())

    with pytest.warns(DataWarning, match=r"is damaged: the checksum of .* is wrong"):
        read(tmp_path / "damaged.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        read(trained_path)
