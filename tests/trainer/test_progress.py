from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning_package import Callback, LightningModule, ProgressBar, RichProgressBar, TQDMProgressBar, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl._trainer.progress_bar import RepairProgress


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class Repairing(Callback):
    """Makes the steps of a repair, and notes what each looked like."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: list[str] = []
        self.silent = False
        self.tasks: list[tuple[str, float, float]] = []
        self.after: list[str] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with RepairProgress(trainer) as progress:
            self.silent = progress._line is None
            for name in ("collect", "localize"):
                with progress.stage(name):
                    self.look(progress)
            with progress.stage("search"):
                for done in (10, 20):
                    progress.search(done, 40, repaired=done, broken=1)
                    self.look(progress)
                if self.error is not None:
                    raise self.error
            with progress.stage("judge"):
                self.look(progress)
        self.after = descriptions(trainer)

    def look(self, progress: RepairProgress) -> None:
        rich = getattr(progress._line, "_progress", None)
        if rich is not None:
            rich.refresh()
            self.tasks.append([(task.description, task.completed, task.total) for task in rich.tasks][-1])


def descriptions(trainer: Trainer) -> list[str]:
    bar = trainer.progress_bar_callback
    return (
        [task.description for task in bar.progress.tasks] if isinstance(bar, RichProgressBar) and bar.progress else []
    )


def fit(tmp_path: Any, callbacks: list[Callback], **arguments: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **arguments,
    )
    trainer.fit(Tiny())
    return trainer


STAGES = ["Repair: collect", "Repair: localize", "Repair: search", "Repair: judge"]


@pytest.mark.parametrize("repair_first", [True, False])
def test_tqdm_shows_every_stage_below_the_training_bar(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], repair_first: bool
) -> None:
    callbacks: list[Callback] = [Repairing(), TQDMProgressBar()]
    fit(tmp_path, callbacks if repair_first else callbacks[::-1])
    shown = capsys.readouterr().out
    places = [shown.index(stage) for stage in STAGES]
    assert places == sorted(places)
    assert "Epoch 0: 100%" in shown


def test_rich_shows_every_stage_among_lightnings_tasks(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    repairing = Repairing()
    fit(tmp_path, [repairing, RichProgressBar()])
    assert repairing.tasks == [
        ("Repair: collect", 0, float("inf")),
        ("Repair: localize", 0, float("inf")),
        ("Repair: search (10 repaired, 1 broken)", 10, 40),
        ("Repair: search (20 repaired, 1 broken)", 20, 40),
        ("Repair: judge", 0, float("inf")),
    ]
    # Lightning's own tasks are left alone.
    assert any(text.startswith("Epoch 0") for text in repairing.after)
    assert not any("Repair" in text for text in repairing.after)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_stage_inside_another_takes_its_place_and_gives_it_back(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], bar: type[ProgressBar]
) -> None:
    class Nesting(Repairing):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with RepairProgress(trainer) as progress:
                progress.search(1, 2, repaired=0, broken=0)  # no stage, no line: nothing happens
                with progress.stage("fit"):
                    progress.search(1, 2)  # nobody has counted
                    self.look(progress)
                    with progress.stage("judge"):
                        progress.search(1, 2, repaired=3, broken=0)
                        self.look(progress)
                    self.look(progress)
            self.after = descriptions(trainer)

    nesting = Nesting()
    fit(tmp_path, [bar(), nesting])
    if bar is RichProgressBar:
        assert [task[0] for task in nesting.tasks] == [
            "Repair: fit",
            "Repair: judge (3 repaired, 0 broken)",
            "Repair: fit",
        ]
        assert not any("Repair" in text for text in nesting.after)
    else:
        shown = capsys.readouterr().out
        assert shown.rindex("Repair: fit") > shown.index("Repair: judge")
        assert "Repair" not in shown.split("\r")[-1]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("error", [None, ArithmeticError("in mid-search")])
def test_no_line_is_left_whether_a_stage_ends_or_raises(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], bar: type[ProgressBar], error: Exception | None
) -> None:
    from tqdm.auto import tqdm

    with nullcontext() if error is None else pytest.raises(ArithmeticError, match="in mid-search"):
        fit(tmp_path, [bar(), Repairing(error=error)])
    assert all("Repair" not in instance.desc for instance in getattr(tqdm, "_instances", ()))
    assert "Repair" not in capsys.readouterr().out.split("\n")[-1].split("\r")[-1]  # what a terminal shows last


class Plain(ProgressBar):
    """A user's bar of another kind."""

    def disable(self) -> None:
        pass


@pytest.mark.parametrize("bar", [None, TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0), Plain()])
def test_nothing_is_shown_without_a_bar_or_beside_a_disabled_or_foreign_one(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], bar: ProgressBar | None
) -> None:
    repairing = Repairing()
    fit(tmp_path, [repairing] if bar is None else [repairing, bar], enable_progress_bar=bar is not None)
    assert repairing.silent
    assert "Repair" not in capsys.readouterr().out


def test_nothing_is_shown_on_other_ranks(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path, [TQDMProgressBar()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "is_global_zero", False)
        with RepairProgress(trainer) as progress, progress.stage("collect"):
            progress.search(1, 2, 0, 0)
    assert "Repair" not in capsys.readouterr().out
