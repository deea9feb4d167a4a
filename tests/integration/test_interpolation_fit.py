"""Weights between the trained and the replaced model, through a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Remember,
    Untrainable,
    overwriting,
    quick_repair,
    quiet_trainer,
    right,
    same,
    state_of,
)
from distributed_fit import Frozen
from lightning_package import Callback, CSVLogger
from torch.utils.data import DataLoader
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, OldModel, WeightInterpolation
from lightning_nrl.evaluation.sample_results import FlipCounts


class Ordered(Digits):
    """Not shuffled, so that fits can be compared."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size)


class NoValidation(Ordered):
    val_dataloader = None


class Look(Remember):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self.optimizer = str(trainer.optimizers[0].state_dict())
        self.random = torch.get_rng_state()
        self.modes = [part.training for part in pl_module.modules()]


def trained_on(
    path: Path, folder: Path, *callbacks: Callback, data: Any = None, **arguments: Any
) -> Any:
    """A fit that goes on from a checkpoint, and what it leaves."""
    model = Classifier.load_from_checkpoint(path)
    before, after = Look(), Look()
    means = {"max_epochs": 1, "enable_checkpointing": False, **arguments}
    trainer = quiet_trainer(folder, before, *callbacks, after, **means)
    trainer.fit(model, datamodule=data or Ordered())
    return trainer, model, before, after


@pytest.fixture(scope="module")
def old_cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network with batch norm and dropout after an epoch."""
    folder = tmp_path_factory.mktemp("cnn")
    trainer = quiet_trainer(folder, enable_checkpointing=False, max_epochs=1, limit_val_batches=0)
    trainer.fit(Classifier("cnn"), datamodule=Ordered())
    trainer.save_checkpoint(folder / "old.ckpt")
    return folder / "old.ckpt"


def test_a_given_strength_is_taken_and_nothing_else_is_touched(trained_path, tmp_path):
    interpolation = WeightInterpolation(trained_path, strength=0.75, calibration=None)
    trainer, _, before, after = trained_on(trained_path, tmp_path, interpolation)
    old = Classifier.load_from_checkpoint(trained_path).state_dict()
    for name, value in after.state.items():
        torch.testing.assert_close(value, 0.75 * before.state[name] + 0.25 * old[name])
    assert not same(before.state, after.state)
    assert before.optimizer == after.optimizer
    assert torch.equal(before.random, after.random)
    assert before.modes == after.modes
    assert interpolation.choice is None
    assert float(trainer.callback_metrics["interpolation/strength"]) == 0.75
    assert "interpolation/nfr" not in trainer.callback_metrics


def test_the_strength_is_chosen_logged_and_repaired(old_cnn, tmp_path, capsys):
    interpolation = WeightInterpolation(old_cnn, tolerance=0.02)
    repair = quick_repair(reference=str(old_cnn), dirpath=tmp_path / "repair", layer="network.7")
    logger = CSVLogger(tmp_path)
    trainer, _, before, _ = trained_on(
        old_cnn, tmp_path, interpolation, between := Look(), repair, logger=logger
    )
    choice, val = interpolation.choice, Digits().val
    assert [point.strength for point in choice.curve] == [1 - step / 20 for step in range(11)]
    assert choice.strength < 1
    models = [Classifier.load_from_checkpoint(old_cnn) for _ in range(3)]
    for model, state in zip(models[1:], (before.state, between.state), strict=True):
        model.load_state_dict(state)
    was, trained, now = (right(model, val) for model in models)
    assert choice.curve[0].counts == FlipCounts.of(was, trained)
    assert choice.chosen.counts == FlipCounts.of(was, now)
    expected = {
        "strength": choice.strength,
        "accuracy_before": trained.double().mean().item(),
        "accuracy": now.double().mean().item(),
        "nfr_before": (was & ~trained).double().mean().item(),
        "nfr": (was & ~now).double().mean().item(),
    }
    found = {f"interpolation/{name}": value for name, value in expected.items()}
    assert {tag: float(trainer.callback_metrics[tag]) for tag in found} == pytest.approx(found)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "interpolation/nfr_before" in rows.partition("\n")[0]
    assert f"strength {choice.strength:.2f}, taken" in capsys.readouterr().out
    # What was trained, for the repair, is what lies between.
    report = repair.report
    known = sum(int(right(models[2], part).sum()) for part in (Digits().train, Digits().repair))
    assert report.pooled("known").passed == known
    # Statistics fit the weights: they are those of the training data.
    hidden = models[2].network[0](Digits().train.tensors[0])
    torch.testing.assert_close(
        between.state["network.1.running_mean"], hidden.mean((0, 2, 3)), rtol=0.02, atol=2e-3
    )
    assert before.modes == between.modes


def test_the_replaced_model_in_any_form_with_weights(trained_path, tmp_path):
    module = Classifier.load_from_checkpoint(trained_path)
    torch.save(module.state_dict(), tmp_path / "last.pt")

    class Erases(Callback):
        """The file may be gone when training ends."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / "last.pt").unlink(missing_ok=True)

    states = []
    for reference in (tmp_path / "last.pt", module, OldModel(trained_path)):
        interpolation = WeightInterpolation(reference, strength=0.5, calibration=None)
        *_, after = trained_on(
            trained_path, tmp_path, interpolation, Erases(), limit_train_batches=3
        )
        states.append(after.state)
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_a_state_dict_of_the_trained_model_itself_is_what_it_was_before(trained, tmp_path):
    expected = state_of(trained)
    interpolation = WeightInterpolation(trained.state_dict(), strength=0, calibration=None)
    trainer = quiet_trainer(tmp_path, interpolation, max_epochs=1, limit_train_batches=2)
    trainer.fit(trained, datamodule=Ordered())
    assert same(trained, expected)


def refused(path: Any, *callbacks: Callback, data: Any = None, model: Any = None) -> str:
    trainer = quiet_trainer(path, *callbacks, enable_checkpointing=False)
    with pytest.raises(ConfigurationError) as refusal:
        trainer.fit(model or Untrainable(), datamodule=data or Ordered())
    assert "\nHINT: " in str(refusal.value)
    return str(refusal.value)


def test_it_comes_before_the_repair_and_after_what_sets_weights(trained_path, tmp_path):
    def interpolation() -> WeightInterpolation:
        return WeightInterpolation(trained_path)

    message = refused(tmp_path, quick_repair(), interpolation())
    assert message.startswith(
        "`callbacks`: WeightInterpolation comes after the repair and would undo it."
    )
    assert message.endswith("put RegressionFreeRepair after it.")
    message = refused(tmp_path, interpolation(), overwriting("StochasticWeightAveraging"))
    assert "StochasticWeightAveraging comes after the interpolation and would undo it." in message
    message = refused(tmp_path, interpolation(), quick_repair(start_from="best"))
    lacking = "the best checkpoint lacks the change by WeightInterpolation before it."
    assert f"`start_from='best'`: {lacking}" in message


def test_what_does_not_fit_is_refused_before_training(trained_path, trained, tmp_path):
    message = refused(tmp_path, WeightInterpolation(trained_path), data=NoValidation())
    assert message.startswith("`calibration='val'`: there is no `val_dataloader()`.")
    assert "or a number as `strength=` with `calibration=None`" in message
    message = refused(tmp_path, WeightInterpolation(trained), model=trained)
    assert message.startswith("`reference` is the model in training")


def test_a_model_that_begins_elsewhere_is_warned_of(trained_path, tmp_path):
    trainer = quiet_trainer(
        tmp_path, WeightInterpolation(trained_path, verbose=False), fast_dev_run=True
    )
    model = Classifier()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for part in model.network:
            getattr(part, "reset_parameters", int)()
    with pytest.warns(
        UserWarning, match=r"the weights do not begin near those of `reference` \(cosine -?0\.\d"
    ):
        trainer.fit(model, datamodule=Ordered())


def distributed_fit(folder: Path, network: str, strategy: str, devices: int) -> dict[str, Any]:
    """What this rank is left with; the new model is the old one with some noise."""
    old, new = Classifier(network), Frozen(network)
    if network == "mlp":
        old.load_state_dict(torch.load(folder / "trained.ckpt", weights_only=True)["state_dict"])
    new.load_state_dict(old.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.6 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    strength = "auto" if network == "mlp" else 0.7
    interpolation = WeightInterpolation(old, strength, tolerance=0.02, verbose=False)
    trainer = quiet_trainer(
        folder,
        interpolation,
        after := Remember(),
        enable_checkpointing=False,
        limit_val_batches=0,
        limit_train_batches=2,
        max_epochs=1,
        strategy=strategy,
        devices=devices,
    )
    trainer.fit(new, datamodule=Ordered())
    choice = interpolation.choice
    curve = [(point.strength, point.counts) for point in choice.curve]
    return {"strength": choice.strength, "curve": curve, "state": after.state}


def distributed_fits(
    folder: Path, strategy: str = "auto", devices: int = 1
) -> list[dict[str, Any]]:
    return [distributed_fit(folder, network, strategy, devices) for network in ("mlp", "cnn")]


def test_two_processes_choose_as_one(trained_path):
    alone = distributed_fits(trained_path.parent)
    first, second = in_two_processes(distributed_fits, trained_path.parent, "ddp", 2)
    for a, b in zip(first, second, strict=True):
        assert same(a["state"], b["state"])
        assert (a["strength"], a["curve"]) == (b["strength"], b["curve"])
    mlp, two_mlp, cnn, two_cnn = alone[0], first[0], alone[1], first[1]
    assert mlp["curve"] == two_mlp["curve"]
    assert mlp["strength"] == two_mlp["strength"] < 1
    assert same(mlp["state"], two_mlp["state"])
    # Each rank averages over batches of its own; together they are those of all samples, in other
    # batches.
    for name in ("network.1.running_mean", "network.1.running_var"):
        torch.testing.assert_close(cnn["state"][name], two_cnn["state"][name], rtol=0.05, atol=2e-3)
    assert cnn["strength"] == two_cnn["strength"] == 0.7
