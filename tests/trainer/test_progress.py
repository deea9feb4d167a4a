"""The line of a repair beside Lightning's bars: what it shows, and that nothing is left of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_package import (
    Callback,
    LightningModule,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
    Trainer,
    quiet_trainer,
)
from torch.utils.data import DataLoader, TensorDataset

import lightning_nrl
from lightning_nrl._trainer.output.progress import STAGES, RepairProgress

BARS = pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)


class Repairing(Callback):
    """Makes the steps of a repair, and notes the task that rich shows at each."""

    def __init__(self, steps: Callable[[Any, Callable[[], None]], None]) -> None:
        self.steps = steps
        self.tasks = []
        self.after = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = trainer.progress_bar_callback
        rich = bar.progress if isinstance(bar, RichProgressBar) else None

        def look() -> None:
            if rich is not None:
                task = rich.tasks[-1]
                self.tasks.append((task.description, task.completed, task.total))

        with closing(RepairProgress(trainer)) as progress:
            self.steps(progress, look)
        self.after = [] if rich is None else [task.description for task in rich.tasks]


def all_stages(progress: Any, look: Callable[[], None]) -> None:
    for name in ("collect", "localize"):
        with progress.stage(name):
            look()
    with progress.stage("search"):
        for done in (10, 20):
            progress.search(done, 40, repaired=done, broken=1)
            look()
    with progress.stage("judge"):
        look()


def nested_stages(progress: Any, look: Callable[[], None]) -> None:
    progress.search(1, 2, repaired=0, broken=0)  # no stage, no line: nothing happens
    with progress.stage("fit"):
        progress.search(1, 2)  # nobody has counted
        look()
        with progress.stage("judge"):
            progress.search(1, 2, repaired=3, broken=0)
            look()
        look()


def planned_stages(progress: Any, look: Callable[[], None]) -> None:
    """Repairs by a clock of its own: 10 s of training expected, 4 s of polish, 2 s at the end."""
    moment = [0.0]
    progress.clock = lambda: moment[0]
    progress._began = 0.0

    def after(seconds: float, done: int, total: int) -> None:
        moment[0] += seconds
        progress.search(done, total, broken=1)
        look()

    with progress.stage("collect"):
        moment[0] += 2
    progress.expect({"fit": 10, "polish": 4, "judge": 2}, most=100)
    with progress.stage("search"):
        after(4, 10, 20)
        after(4, 20, 20)
    with progress.stage("fit"):
        look()
        after(5, 10, 20)
        moment[0] += 5
    with progress.stage("polish"):
        look()
        after(1, 3, 4)
        moment[0] += 1
    with progress.stage("strength"):
        look()
        with progress.stage("judge"):
            look()


def fit(tmp_path: Any, *callbacks: Callback, bar: bool = True) -> None:
    trainer = quiet_trainer(
        max_epochs=1,
        enable_progress_bar=bar,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
    )
    trainer.fit(Tiny())


@pytest.mark.parametrize("repair_first", [True, False])
def test_tqdm_shows_every_stage_below_the_training_bar(tmp_path, capsys, repair_first):
    callbacks = [Repairing(all_stages), TQDMProgressBar()]
    fit(tmp_path, *(callbacks if repair_first else callbacks[::-1]))
    shown = capsys.readouterr().out
    words = ("counting what is", "choosing weights", "searching new values", "counting the result")
    places = [shown.index(f"Repair: {stage}") for stage in words]
    assert places == sorted(places)
    assert "Epoch 0: 100%" in shown


def test_rich_shows_every_stage_among_lightnings_tasks(tmp_path):
    repairing = Repairing(all_stages)
    fit(tmp_path, repairing, RichProgressBar())
    assert repairing.tasks == [
        ("Repair: counting what is right and wrong", 0, float("inf")),
        ("Repair: choosing weights to change", 0, float("inf")),
        ("Repair: searching new values for them (10 repaired, 1 broken)", 25, 100),
        ("Repair: searching new values for them (20 repaired, 1 broken)", 50, 100),
        ("Repair: counting the result", 0, float("inf")),
    ]
    # Lightning's own tasks are left alone.
    assert any(text.startswith("Epoch 0") for text in repairing.after)


@BARS
def test_a_stage_inside_another_takes_its_place_and_gives_it_back(tmp_path, capsys, bar):
    nesting = Repairing(nested_stages)
    fit(tmp_path, bar(), nesting)
    if bar is RichProgressBar:
        assert [text for text, *_ in nesting.tasks] == [
            "Repair: training with the failures",
            "Repair: counting the result (3 repaired, 0 broken)",
            "Repair: training with the failures",
        ]
    else:
        shown = capsys.readouterr().out
        assert shown.rindex("Repair: training") > shown.index("Repair: counting")


def test_the_bar_never_goes_back_and_shows_the_time_left(tmp_path, capsys):
    repairing = Repairing(planned_stages)
    fit(tmp_path, repairing, RichProgressBar())
    texts, shares, _ = zip(*repairing.tasks, strict=True)
    # Half a search and all that comes; what comes; the same; half the training; then its polish, a
    # quarter of that, a stage of which nothing is known, and the last count.
    seconds = [text.partition(", about ")[2].removesuffix(" s left") for text in texts]
    assert seconds == ["20", "16", "16", "11", "6", "2", "", "2"]
    assert list(shares) == [23, 38, 38, 58, 77, 90, 90, 92]
    announced = "Repair: about 16 s to 32 s from now on."  # the limit was given
    assert announced in " ".join(capsys.readouterr().out.split())


def slow_stages(progress: Any, look: Callable[[], None]) -> None:
    """Trains for 20 s, where 10 s were expected."""
    moment = [0.0]
    progress.clock = lambda: moment[0]
    progress.expect({"fit": 10, "polish": 4, "judge": 2}, most=100)
    with progress.stage("fit"):
        moment[0] += 20
    with progress.stage("polish"):
        look()


def test_a_slow_stage_corrects_the_time_left(tmp_path):
    repairing = Repairing(slow_stages)
    fit(tmp_path, repairing, RichProgressBar())
    [(text, _, _)] = repairing.tasks
    assert text.endswith(", about 12 s left")  # twice 4 s and 2 s


@BARS
def test_no_line_is_left_after_a_repair(tmp_path, capsys, bar):
    repairing = Repairing(all_stages)
    fit(tmp_path, bar(), repairing)
    assert not any("Repair" in text for text in repairing.after)
    # What a terminal shows last.
    assert "Repair" not in capsys.readouterr().out.split("\n")[-1].split("\r")[-1]


class Plain(ProgressBar):
    """A user's bar of another kind."""

    def disable(self) -> None:
        pass


@pytest.mark.parametrize(
    "bar", [None, TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0), Plain()]
)
def test_nothing_is_shown_without_a_bar_or_beside_a_disabled_or_foreign_one(tmp_path, capsys, bar):
    bars = [] if bar is None else [bar]
    fit(tmp_path, Repairing(all_stages), *bars, bar=bar is not None)
    assert "Repair" not in capsys.readouterr().out


def test_every_stage_has_words():
    sources = (path.read_text() for path in Path(lightning_nrl.__file__).parent.rglob("*.py"))
    assert {
        name for source in sources for name in re.findall(r'\.stage\("([^"]+)"\)', source)
    } <= STAGES.keys()
