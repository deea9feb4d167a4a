from __future__ import annotations

import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_package import (
    Callback,
    CSVLogger,
    DummyLogger,
    LightningModule,
    Logger,
    TensorBoardLogger,
    Trainer,
    rank_zero_only,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl._tracking import outcome, search_curves, track
from lightning_nrl._tracking.scalars import final_numbers
from lightning_nrl.evaluation.flips import TargetCounts
from lightning_nrl.report import RepairReport, SplitReport

CHANGE = torch.tensor([0.5, -0.25, 0.0, 0.75])


class Notes(Logger):
    """A user's logger, which has nothing but what Lightning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "notes"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a repair has no business with the hyperparameters of training")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))


class Remote(Notes):
    """A logger whose experiment is a client of some service, as those of WandB and MLflow are."""

    experiment = object()


class Broken(Notes):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no server")


def board(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="", version="run")


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}).Reload()


@pytest.fixture
def events(tmp_path: Path, accepted: RepairReport) -> EventAccumulator:
    logger = board(tmp_path)
    track(accepted, [logger], step=120, change=CHANGE)
    logger.finalize("success")
    return read(tmp_path / "run")


def expected_points(report: RepairReport, step: int) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for at, scalars in (*enumerate(search_curves(report)), (step, final_numbers(report))):
        for tag, value in scalars.items():
            points.setdefault(tag, []).append((at, pytest.approx(value)))
    return points


def test_tensorboard_reads_back_every_scalar(events: EventAccumulator, accepted: RepairReport) -> None:
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == expected_points(accepted, step=120)


def test_tensorboard_reads_back_the_report_as_text(events: EventAccumulator, accepted: RepairReport) -> None:
    (event,) = events.Tensors("repair/report/text_summary")
    assert event.step == 120
    assert event.tensor_proto.string_val[0].decode() == accepted.to_markdown()


def test_tensorboard_reads_back_the_change_of_the_weights(events: EventAccumulator) -> None:
    (event,) = events.Histograms("repair/weight_change")
    assert event.step == 120
    assert (event.histogram_value.num, event.histogram_value.min, event.histogram_value.max) == (4, -0.25, 0.75)


def read_layout(folder: Path) -> layout_pb2.Layout:
    (event,) = read(folder).Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_tensorboard_overlays_curves_that_exist(events: EventAccumulator, tmp_path: Path) -> None:
    layout = read_layout(tmp_path / "run" / "repair")
    assert [category.title for category in layout.category] == ["repair: course of the search"]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["Fitness: best so far and mean of the swarm"] == [
        "^repair_search/best_fitness$",
        "^repair_search/mean_fitness$",
    ]
    assert charts["Best so far: samples repaired and broken"] == [
        "^repair_search/repaired$",
        "^repair_search/broken$",
    ]
    tags = {tag.strip("^$") for chart in charts.values() for tag in chart}
    assert tags <= set(events.Tags()["scalars"])


def test_tensorboard_has_a_row_of_hyperparameters(
    events: EventAccumulator, tmp_path: Path, accepted: RepairReport
) -> None:
    row = read(tmp_path / "run" / "repair")
    content = row.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    asked = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert asked["layer"].string_value == "classifier"
    assert asked["target"].string_value == "label 3"
    assert asked["seed"].number_value == 3
    assert asked["with.fitness.alpha"].number_value == 6.0
    assert "with.n_passed" not in asked
    assert set(row.Tags()["scalars"]) == set(outcome(accepted))


def test_training_and_repair_share_one_event_file(tmp_path: Path, accepted: RepairReport) -> None:
    logger = board(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    track(accepted, [logger], step=1, change=CHANGE)
    logger.finalize("success")
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_a_second_repair_in_one_log_is_told_apart(tmp_path: Path, accepted: RepairReport) -> None:
    logger = board(tmp_path)
    track(accepted, [logger], step=5, change=CHANGE)
    track(replace(accepted, status="refused"), [logger], step=6, name="repair-1")
    events = read(tmp_path / "run")
    assert [event.value for event in events.Scalars("repair/accepted")] == [1.0]
    assert [event.value for event in events.Scalars("repair-1/accepted")] == [0.0]
    assert [category.title for category in read_layout(tmp_path / "run" / "repair-1").category] == [
        "repair-1: course of the search"
    ]


def test_layout_and_hyperparameters_of_training_are_left_alone(tmp_path: Path, accepted: RepairReport) -> None:
    logger = board(tmp_path)
    logger.log_hyperparams({"lr": 0.5})
    logger.experiment.add_custom_scalars({"mine": {"chart": ["Multiline", ["loss"]]}})
    track(accepted, [logger], step=5, change=CHANGE)
    assert [category.title for category in read_layout(tmp_path / "run").category] == ["mine"]
    content = read(tmp_path / "run").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert list(plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams) == ["lr"]


@pytest.mark.parametrize("change", [None, torch.zeros(0)])
def test_without_a_change_there_is_no_histogram(
    tmp_path: Path, refused: RepairReport, change: torch.Tensor | None
) -> None:
    track(refused, [board(tmp_path)], step=5, change=change)
    assert read(tmp_path / "run").Tags()["histograms"] == []


def test_half_precision_changes_have_a_histogram(tmp_path: Path, accepted: RepairReport) -> None:
    track(accepted, [board(tmp_path)], step=5, change=CHANGE.bfloat16().requires_grad_())
    (event,) = read(tmp_path / "run").Histograms("repair/weight_change")
    assert event.histogram_value.sum == 1.0


def test_a_report_without_a_search_is_tracked(tmp_path: Path, nothing: RepairReport) -> None:
    track(nothing, [board(tmp_path)], step=5)
    events = read(tmp_path / "run")
    assert events.Scalars("repair/accepted")[0].value == 0.0
    assert "repair/report/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" not in read(tmp_path / "run" / "repair").Tags()["tensors"]


def test_csv_gets_every_number(tmp_path: Path, accepted: RepairReport) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    track(accepted, [logger], step=120, change=CHANGE)
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert set(header.split(",")) == {"step", *expected_points(accepted, step=120)}
    assert len(rows) == 3 + 1


def test_csv_keeps_what_training_has_logged(tmp_path: Path, accepted: RepairReport) -> None:
    logger = CSVLogger(tmp_path, name="", version="run", flush_logs_every_n_steps=1)
    logger.log_metrics({"train_loss": 0.125}, step=0)
    logger.save()
    track(accepted, [logger], step=120)
    header, first, *_ = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert first.split(",")[header.split(",").index("train_loss")] == "0.125"


def test_a_logger_without_an_experiment_gets_every_number(accepted: RepairReport) -> None:
    notes = Notes()
    track(accepted, [notes], step=120, change=CHANGE)
    final = final_numbers(accepted)
    assert notes.entries == [*enumerate(search_curves(accepted)), (120, final)]


def test_two_loggers_at_once_get_the_same(tmp_path: Path, accepted: RepairReport) -> None:
    notes, remote = Notes(), Remote()
    track(accepted, [notes, board(tmp_path), remote], step=120, change=CHANGE)
    assert notes.entries == remote.entries
    assert "repair/accepted" in read(tmp_path / "run").Tags()["scalars"]


def test_no_logger_and_a_dummy_are_fine(accepted: RepairReport) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        track(accepted, [], step=120, change=CHANGE)
        track(accepted, [DummyLogger()], step=120, change=CHANGE)
    assert [w for w in told if "not logged" in str(w.message)] == []


def test_a_logger_that_raises_is_warned_of_and_the_others_go_on(accepted: RepairReport) -> None:
    notes = Notes()
    with pytest.warns(UserWarning, match="not logged to Broken, which raised ConnectionError: no server"):
        track(accepted, [Broken(), notes], step=120)
    assert [step for step, _ in notes.entries] == [0, 1, 2, 120]


def test_other_ranks_log_nothing(monkeypatch: pytest.MonkeyPatch, accepted: RepairReport) -> None:
    notes = Notes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    track(accepted, [notes], step=120)
    assert notes.entries == []


def test_what_is_not_finite_reaches_no_logger(accepted: RepairReport) -> None:
    notes = Notes()
    track(replace(accepted, splits=(SplitReport("empty", "known", TargetCounts(0, 0, 0, 0)),)), [notes], step=120)
    assert "repair_splits/empty/n" in notes.entries[-1][1]
    assert all(value == value for _, scalars in notes.entries for value in scalars.values())


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tracking(Callback):
    """Tracks where a repair does."""

    def __init__(self, report: RepairReport) -> None:
        self.report = report

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        track(self.report, trainer.loggers, step=trainer.global_step, change=CHANGE)


def test_a_trainer_with_two_loggers_keeps_one_event_file(tmp_path: Path, accepted: RepairReport) -> None:
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=[board(tmp_path), CSVLogger(tmp_path, name="csv", version="run")],
        callbacks=[Tracking(accepted)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    events = read(tmp_path / "run")
    assert len(events.Scalars("train_loss")) == 4
    assert [event.step for event in events.Scalars("repair/accepted")] == [4]
    header, *rows = (tmp_path / "csv" / "run" / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "repair/accepted", "repair_search/broken"} <= set(header.split(","))
    assert len(rows) == 4 + 3 + 1
