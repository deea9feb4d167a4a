from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_package import BoringModel, LightningModule, ModelCheckpoint, RandomDataset, RunningStage, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.private_parts import validating
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS, FitTimer, epochs_of, epochs_saved, starting_weights


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_stage_is_as_found(error: type[BaseException] | None) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.state.stage = RunningStage.TRAINING
    with nullcontext() if error is None else pytest.raises(error), validating(trainer):
        assert trainer.state.stage is RunningStage.VALIDATING
        if error is not None:
            raise error
    assert trainer.state.stage is RunningStage.TRAINING


class Slim(LightningModule):
    """Leaves its frozen part out of checkpoints, and has a state that is no tensor."""

    strict_loading = False

    def __init__(self, value: float) -> None:
        super().__init__()
        self.head, self.frozen = nn.Linear(2, 2), nn.BatchNorm1d(2)
        nn.init.constant_(self.head.weight, value)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if not name.startswith("frozen")}


class Best:
    """As much of a trainer as going back to the best checkpoint needs."""

    world_size = 1

    def __init__(self, model: LightningModule) -> None:
        self.checkpoint_callback = ModelCheckpoint()
        self.checkpoint_callback.best_model_path = "best.ckpt"
        self.strategy = SimpleNamespace(
            checkpoint_io=None,
            load_checkpoint=lambda path: Slim(2.0).state_dict(),
            load_model_state_dict=lambda state, strict: model.load_state_dict(state, strict=strict),
        )


@pytest.mark.parametrize(("keep", "value"), [(False, 1.0), (True, 2.0)])
def test_the_weights_of_training_come_back_unless_the_repaired_ones_stay(keep: bool, value: float) -> None:
    model = Slim(1.0)
    trainer: Any = Best(model)
    weight, statistics = model.head.weight, model.frozen.running_mean
    with starting_weights("best", trainer, model) as start:
        assert torch.equal(model.head.weight, torch.full((2, 2), 2.0))
        start.keep = keep
    assert model.head.weight is weight
    assert model.frozen.running_mean is statistics
    assert torch.equal(weight, torch.full((2, 2), value))


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [({}, 3), ({"limit_train_batches": 2}, 2), ({"max_steps": 1}, 1), ({"max_steps": 7}, 2), ({"max_steps": 9}, 2)],
)
def test_training_is_as_long_as_its_epochs_add_up_to(limits: dict[str, Any], epochs: int) -> None:
    """An epoch has 4 batches."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet, **limits)
    four_batches = DataLoader(RandomDataset(32, 64), batch_size=16)
    trainer.fit(BoringModel(), four_batches)
    assert epochs_of(trainer) == epochs


def test_a_resumed_training_took_as_long_as_all_its_batches_at_the_pace_of_the_last() -> None:
    progress = SimpleNamespace(total=SimpleNamespace(ready=90))
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)))
    timer = FitTimer.start(trainer)
    timer = replace(timer, began=timer.began - 6.0)
    progress.total.ready = 100
    assert timer.seconds(trainer) == pytest.approx(60.0, rel=0.1)
    assert replace(timer, batches=0).seconds(trainer) == pytest.approx(6.0, rel=0.1)


def test_a_checkpoint_says_how_long_it_was_trained(tmp_path: Path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
    four_batches = DataLoader(RandomDataset(32, 64), batch_size=16)
    trainer.fit(BoringModel(), four_batches)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    saved = torch.load(tmp_path / "net.ckpt", weights_only=True)
    assert epochs_saved(saved) == 2
    assert epochs_saved({"state_dict": saved["state_dict"]}) == ASSUMED_EPOCHS
