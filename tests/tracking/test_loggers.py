from __future__ import annotations

import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_package import (
    BoringModel,
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
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_nrl._trainer.tracking.loggers import declare, track
from lightning_nrl._trainer.tracking.repair_log import RepairLog
from lightning_nrl._trainer.tracking.scalars import final_numbers, search_curves
from lightning_nrl._trainer.tracking.tensorboard import ASKED, MEASURED
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report import RepairReport, SplitReport
from lightning_nrl.report.sample_views import SampleView

CHANGES = {"classifier.weight": torch.tensor([[0.5, -0.25], [0.0, 0.75]]).bfloat16().requires_grad_()}


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


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second each time."""
    monkeypatch.setattr(RepairLog, "drawn", False)


@pytest.fixture
def events(tmp_path: Path, accepted: RepairReport) -> EventAccumulator:
    logger = board(tmp_path)
    track(RepairLog(accepted, 120, changes=CHANGES), [logger])
    logger.finalize("success")
    return read(tmp_path / "run" / "repair")


def expected_points(report: RepairReport, step: int) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for at, scalars in (*enumerate(search_curves(report)), (step, final_numbers(report))):
        for tag, value in scalars.items():
            points.setdefault(tag, []).append((at, pytest.approx(value)))
    return points


def scalars_in(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_are_scalars_without_figures(events: EventAccumulator, accepted: RepairReport, tmp_path: Path) -> None:
    assert scalars_in(events) == expected_points(accepted, step=120)
    assert events.Tags()["images"] == []
    assert read(tmp_path / "run").Tags()["scalars"] == []


def test_the_summary_is_the_first_of_twelve_cards(
    tmp_path: Path, accepted: RepairReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(RepairLog, "drawn", True)
    track(RepairLog(accepted, 120, changes=CHANGES), [board(tmp_path)])
    events = read(tmp_path / "run" / "repair")
    assert scalars_in(events) == {tag: [(120, pytest.approx(x))] for tag, x in final_numbers(accepted).items()}
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]]
    group = sorted(tag for tag in tags if tag.startswith("repair/"))
    assert (group[0], len(group)) == ("repair/Summary", 12)
    assert {tag.split("/")[0] for tag in tags} == {"repair", "repair_numbers", "repair_figures", "repair_weights"}
    (image,) = events.Images("repair_figures/Weights, change of classifier.weight")
    assert (image.step, image.encoded_image_string[:4]) == (120, b"\x89PNG")
    assert "repair_figures/Course of the search" in tags


def test_samples_are_images_of_their_own_and_text_in_the_text_tab(tmp_path: Path, accepted: RepairReport) -> None:
    views = [
        SampleView("val", 7, "broken", "7: true cat", np.zeros((5, 4, 3), dtype=np.uint8)),
        SampleView("test", 7, "broken", "7: true cat", text="a *very* bad day"),
    ]
    track(RepairLog(accepted, 120, views=views), [board(tmp_path)])
    events = read(tmp_path / "run" / "repair")
    (image,) = events.Images("repair_samples/broken in val, 7: true cat")
    assert (image.height, image.width) == (5, 4)
    (event,) = events.Tensors("repair_samples/broken in test/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == "## broken in test\n\n- **7: true cat**: a \\*very\\* bad day\n"


def test_tensorboard_has_the_page_and_the_change_of_the_weights(
    events: EventAccumulator, accepted: RepairReport
) -> None:
    (event,) = events.Tensors("repair/report/text_summary")
    assert event.step == 120
    assert event.tensor_proto.string_val[0].decode() == accepted.to_markdown()
    (event,) = events.Histograms("repair_weights/change")
    assert event.step == 120
    assert (event.histogram_value.num, event.histogram_value.min, event.histogram_value.max) == (3, -0.25, 0.75)


def hparams_in(events: EventAccumulator, part: str) -> Any:
    content = events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), part)


def columns_in(events: EventAccumulator) -> tuple[list[str], list[str]]:
    found = hparams_in(events, "experiment")
    return [info.name for info in found.hparam_infos], [info.name.tag for info in found.metric_infos]


def test_tensorboard_has_a_row_of_hyperparameters(events: EventAccumulator) -> None:
    asked = hparams_in(events, "session_start_info").hparams
    assert asked["repair/target"].string_value == "label 3"
    assert asked["repair/seed"].number_value == 3
    assert asked["repair/with fitness"].string_value == "eq2"
    assert "repair/with n_passed" not in asked
    assert columns_in(events) == (list(ASKED), list(MEASURED))
    assert set(MEASURED) & set(events.Tags()["scalars"]) == {tag for tag in MEASURED if "regressions" not in tag}


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_the_row_has_the_hyperparameters_of_training(
    tmp_path: Path, accepted: RepairReport, default_hp_metric: bool
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=default_hp_metric)
    own = {"lr": 0.5, "net": {"width": 8}, "path": "x" * 70, "none": None}
    declare([logger, Notes()], own)
    logger.log_hyperparams(own)  # as Lightning does when a fit begins
    track(RepairLog(accepted, 5, hparams=own), [logger])
    training, repair = read(tmp_path / "run"), read(tmp_path / "run" / "repair")
    assert columns_in(training) == columns_in(repair)
    names, metrics = columns_in(repair)
    assert names == ["lr", "net/width", "path", *ASKED]
    assert metrics == [*MEASURED, "hp_metric"]
    asked = hparams_in(repair, "session_start_info").hparams
    assert (asked["lr"].number_value, asked["net/width"].number_value) == (0.5, 8)
    assert asked["path"].string_value == "x" * 57 + "..."
    assert asked["repair/gate"].string_value == "instance"
    if default_hp_metric:
        assert set(hparams_in(training, "session_start_info").hparams) == {"lr", "net/width", "path", "none"}


def test_a_second_repair_in_one_log_is_a_run_with_the_same_tags(tmp_path: Path, accepted: RepairReport) -> None:
    logger = board(tmp_path)
    track(RepairLog(accepted, 5, changes=CHANGES), [logger])
    track(RepairLog(replace(accepted, status="refused"), 6, "repair-1"), [logger])
    track(RepairLog(replace(accepted, status="not repaired"), 7), [logger])  # the user's folder gave it no new name
    for run, step, value in (("repair", 5, 1.0), ("repair-1", 6, 0.0), ("repair-2", 7, 0.0)):
        found = scalars_in(read(tmp_path / "run" / run))
        assert found["repair/accepted"] == [(step, value)]


@pytest.mark.parametrize("changes", [None, {}, {"weight": torch.zeros(3)}])
def test_without_a_search_there_is_all_but_a_histogram(tmp_path: Path, nothing: RepairReport, changes: Any) -> None:
    track(RepairLog(nothing, 5, changes=changes), [board(tmp_path)])
    events = read(tmp_path / "run" / "repair")
    assert events.Tags()["histograms"] == []
    assert events.Scalars("repair/accepted")[0].value == 0.0
    assert "repair/report/text_summary" in events.Tags()["tensors"]


def test_csv_gets_every_number_and_keeps_what_training_has_logged(tmp_path: Path, accepted: RepairReport) -> None:
    logger = CSVLogger(tmp_path, name="", version="run", flush_logs_every_n_steps=1)
    logger.log_metrics({"train_loss": 0.125}, step=0)
    logger.save()
    track(RepairLog(accepted, 120, changes=CHANGES), [logger])
    header, first, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert set(header.split(",")) == {"step", "train_loss", *expected_points(accepted, step=120)}
    assert first.split(",")[header.split(",").index("train_loss")] == "0.125"
    assert len(rows) == 3 + 1


def test_each_of_several_loggers_gets_every_number(tmp_path: Path, accepted: RepairReport) -> None:
    notes, remote = Notes(), Remote()
    track(RepairLog(accepted, 120, changes=CHANGES), [notes, board(tmp_path), remote])
    assert notes.entries == remote.entries == [*enumerate(search_curves(accepted)), (120, final_numbers(accepted))]
    assert "repair/accepted" in read(tmp_path / "run" / "repair").Tags()["scalars"]


def test_no_logger_and_a_dummy_are_fine(accepted: RepairReport) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        track(RepairLog(accepted, 120, changes=CHANGES), [])
        track(RepairLog(accepted, 120, changes=CHANGES), [DummyLogger()])
    assert [w for w in told if "not logged" in str(w.message)] == []


def test_a_logger_that_raises_is_warned_of_and_the_others_go_on(accepted: RepairReport) -> None:
    notes = Notes()
    with pytest.warns(UserWarning, match="not logged to Broken, which raised ConnectionError: no server"):
        track(RepairLog(accepted, 120), [Broken(), notes])
    assert [step for step, _ in notes.entries] == [0, 1, 2, 120]


def test_other_ranks_log_nothing(monkeypatch: pytest.MonkeyPatch, accepted: RepairReport) -> None:
    notes = Notes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    track(RepairLog(accepted, 120), [notes])
    assert notes.entries == []


def test_what_is_not_finite_reaches_no_logger(accepted: RepairReport) -> None:
    notes = Notes()
    empty = SplitReport("empty", "known", TargetCounts(0, 0, 0, 0))
    track(RepairLog(replace(accepted, splits=(empty,)), 120), [notes])
    assert "repair_numbers/empty_data/n" in notes.entries[-1][1]
    assert all(value == value for _, scalars in notes.entries for value in scalars.values())


class Tracking(Callback):
    """Tracks where a repair does."""

    def __init__(self, report: RepairReport) -> None:
        self.report = report

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        track(RepairLog(self.report, trainer.global_step, changes=CHANGES), trainer.loggers)


class Tiny(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss["loss"])
        return loss


def test_a_trainer_with_two_loggers_keeps_one_event_file_a_run(tmp_path: Path, accepted: RepairReport) -> None:
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=2,
        accelerator="cpu",
        logger=[board(tmp_path), CSVLogger(tmp_path, name="csv", version="run")],
        callbacks=[Tracking(accepted)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny())
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    events = read(tmp_path / "run")
    assert len(events.Scalars("train_loss")) == 4
    (folder,) = (path for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert len(list(folder.glob("events.*"))) == 1
    assert [event.step for event in read(folder).Scalars("repair/accepted")] == [4]
    header, *rows = (tmp_path / "csv" / "run" / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "repair/accepted", "repair_search/broken"} <= set(header.split(","))
    assert len(rows) == 4 + 3 + 1
