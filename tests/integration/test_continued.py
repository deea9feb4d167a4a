"""Repairs that go on with the training: their weights, buffers and files, with a fit and without
one.
"""

from __future__ import annotations

import shutil
from typing import Any

import distributed_fit
import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Few,
    quick_repair,
    quiet_trainer,
    right,
    same,
    state_of,
)
from distributed_fit import continued
from self_writing import NothingAtAll
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, repair
from lightning_nrl.errors import TrainingWarning
from lightning_nrl.pipeline import Patch


def test_the_whole_network_is_repaired_statistics_included(tmp_path):
    callback, model, data = continued(unseen="test"), Classifier("cnn", lr=0.01), Digits()
    quiet_trainer(tmp_path, callback, max_epochs=4).fit(model, datamodule=data)
    report = callback.report
    assert report.status == "repaired"
    assert report.splits[1].repaired > 30
    assert report.seconds["fit"] > 0
    saved = torch.load(report.files["checkpoint"], weights_only=True)
    assert same(model, saved["state_dict"])
    # The statistics went on for 4 epochs of (400 + 203) samples in batches of 32, the last of them
    # dropped.
    assert int(model.network[1].num_batches_tracked) == 4 * (400 // 32) + 4 * (603 // 32)
    assert saved["global_step"] == 4 * (400 // 32)
    for split, part in zip(report.splits, (data.train, data.repair, data.test), strict=True):
        assert split.kept + split.repaired == int(right(model, part).sum())


def test_a_refused_training_leaves_the_model_as_it_was(tmp_path, trained):
    before = state_of(trained)
    callback = continued(gate=NothingAtAll())
    report = repair(quiet_trainer(tmp_path), trained, datamodule=Digits(), callback=callback)
    assert report.status == "refused"
    assert sum(split.repaired for split in report.candidate) > 0
    assert same(trained, before)
    report = repair(
        quiet_trainer(tmp_path), trained, datamodule=Digits(), callback=continued(max_time=0.01)
    )
    assert report.status == "not repaired"
    assert report.reason.startswith("no time.")


def test_a_checkpoint_goes_on_for_as_long_as_it_was_trained(tmp_path, trained_path):
    class Counted(Classifier):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Counted.steps += self.trainer.training  # not in the check before the repair
            return super().training_step(batch, batch_idx)

    trainer, data = quiet_trainer(tmp_path), Digits()
    report = repair(
        trainer, Counted(), datamodule=data, ckpt_path=trained_path, callback=continued()
    )
    assert Counted.steps == 3 * (603 // 32)
    assert report.status == "repaired"
    saved, old = (
        torch.load(path, weights_only=True) for path in (report.files["checkpoint"], trained_path)
    )
    assert saved["global_step"] == old["global_step"]
    torch.testing.assert_close(saved["optimizer_states"], old["optimizer_states"], rtol=0, atol=0)


def test_two_processes_train_what_one_trains(tmp_path, trained_path):
    shutil.copy(trained_path, tmp_path / "trained.ckpt")
    distributed_fit.fit_continued(tmp_path / "alone")
    in_two_processes(distributed_fit.fit_continued, tmp_path / "two", "ddp", 2)
    alone, first, second = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("alone/trained0.pt", "two/trained0.pt", "two/trained1.pt")
    )
    old = torch.load(trained_path, weights_only=True)["state_dict"]
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(old[name], value, rtol=1e-2)
    ranks = [
        torch.load(tmp_path / f"two/rank{rank}.pt", weights_only=True)["state"] for rank in (0, 1)
    ]
    assert same(ranks[0], ranks[1])


def test_after_a_fit_of_the_same_module_the_trainer_knows_how_long_it_was_trained(tmp_path):
    trainer, model, data = quiet_trainer(tmp_path, max_epochs=4), Classifier("cnn", lr=0.01), Few()
    trainer.fit(model, datamodule=data)
    report = repair(trainer, model, datamodule=data, callback=continued())
    assert report.status == "repaired"
    assert int(model.network[1].num_batches_tracked) == 4 * (160 // 32) + 4 * (260 // 32)
    other = Classifier("cnn", lr=0.01)
    other.load_state_dict(model.state_dict())
    start = int(other.network[1].num_batches_tracked)
    # Of another module it does not know that.
    assert repair(trainer, other, datamodule=data, callback=continued()).status == "repaired"
    assert int(other.network[1].num_batches_tracked) == start + 20 * (260 // 32)


def test_a_step_that_fails_on_other_data_costs_the_training_alone(tmp_path):
    class Bank(Classifier):
        """Reads what its own data set has, and no union of data sets."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert len(self.trainer.train_dataloader.dataset.tensors) == 3
            return super().training_step(batch, batch_idx)

    callback, model, data = continued(method="auto", gate="instance", max_time=60), Bank(), Few()
    with pytest.warns(
        TrainingWarning,
        match=r"AttributeError: 'ConcatDataset' .* \(training_step, test_continued.py:",
    ):
        quiet_trainer(tmp_path, callback).fit(model, datamodule=data)
    report = callback.report
    assert report.status == "repaired"
    assert [rung.name for rung in report.rungs] == ["search", "training", "exact", "push"]
    assert report.splits[1].repaired > 0 == report.splits[1].broken


class CountingWins(Classifier):
    """Registers a buffer when an epoch begins, which has a row more after each step."""

    def on_train_epoch_start(self) -> None:
        self.register_buffer("wins", torch.zeros(1, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():
            wins = self(batch[0]).argmax(1).bincount(minlength=10)
        self.wins = torch.cat([self.wins, wins[None]])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["auto", "finetune-polish"])
def test_a_buffer_that_training_lets_grow_is_left_out(tmp_path, method):
    callback = quick_repair(method=method)
    trainer = quiet_trainer(tmp_path, callback)
    trainer.fit(model := CountingWins(), datamodule=Few())
    assert callback.report is not None
    assert callback.report.status == "repaired"
    assert len(model.wins) == 1 + 160 // 32
    assert "network.1.weight" in Patch.load(callback.report.files["patch"]).names
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    arguments = {"datamodule": Few(), "ckpt_path": path, "method": method, "verbose": False}
    with pytest.raises(ConfigurationError, match=r"(?s)wins.*HINT: .*`strict_loading = False`"):
        repair(quiet_trainer(tmp_path), CountingWins(), **arguments)
    model = CountingWins()
    model.strict_loading = False
    report = repair(quiet_trainer(tmp_path), model, **arguments)
    assert report.status in ("repaired", "nothing to repair")
