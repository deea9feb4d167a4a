"""What loggers get of a repair: numbers, pictures, text, files; W&B and MLflow as stand-ins and as
they are.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_package import (
    Logger,
    TensorBoardLogger,
    loggers,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_nrl._trainer.tracking import tags
from lightning_nrl._trainer.tracking.loggers import declare, track, track_release
from lightning_nrl._trainer.tracking.repair_log import RepairLog
from lightning_nrl._trainer.tracking.scalars import (
    final_numbers,
    search_curves,
    strength_curves,
)
from lightning_nrl._trainer.tracking.tags import ASKED, MEASURED
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.evaluation.slices import slice_tags
from lightning_nrl.records import SplitReport, StrengthPoint
from lightning_nrl.records.splits import FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView

CHANGES = {"classifier.weight": torch.tensor([[0.5, -0.25], [0.0, 0.75]])}


class Notes(Logger):
    """A user's logger, which has nothing but what Lightning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = []

    @property
    def name(self) -> str:
        return "notes"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a repair has no business with the hyperparameters of training")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))


class Broken(Notes):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no server")


def board(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="", version="run")


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(
        str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}
    ).Reload()


@pytest.fixture(autouse=True)
def _figures_where_they_are_looked_at(request: pytest.FixtureRequest) -> None:
    """They take half a second each time."""
    if request.node.get_closest_marker("figures") is None:
        request.getfixturevalue("without_figures")


@pytest.fixture
def events(tmp_path: Path, accepted: RepairReport) -> EventAccumulator:
    logger = board(tmp_path)
    track(RepairLog(accepted, 120, changes=CHANGES), [logger])
    logger.finalize("success")
    return read(tmp_path / "run" / "repair")


def scalars_in(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_curves_are_scalars_where_no_figure_can_be_drawn(events, accepted, tmp_path):
    scalars = scalars_in(events)
    assert scalars["repair_search/best_fitness"] == [(0, 4.25), (1, 6.5), (2, 7.5)]
    assert scalars.keys() >= final_numbers(accepted).keys()
    assert events.Tags()["images"] == []
    assert read(tmp_path / "run").Tags()["scalars"] == []


@pytest.mark.figures
def test_with_figures_all_scalars_are_single_points_and_the_summary_is_the_first_card_of_twelve(
    tmp_path, accepted
):
    pytest.importorskip("matplotlib")
    track(RepairLog(accepted, 120, changes=CHANGES), [board(tmp_path)])
    events = read(tmp_path / "run" / "repair")
    assert scalars_in(events) == {
        tag: [(120, pytest.approx(x))] for tag, x in final_numbers(accepted).items()
    }
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]]
    group = sorted(tag for tag in tags if tag.startswith("repair/"))
    assert (group[0], len(group)) == ("repair/Summary", 12)
    assert {tag.split("/")[0] for tag in tags} == {
        "repair",
        "repair_numbers",
        "repair_figures",
        "repair_weights",
    }
    (image,) = events.Images("repair_figures/Weights, change of classifier.weight")
    assert (image.step, image.encoded_image_string[:4]) == (120, b"\x89PNG")
    assert "repair_figures/Course of the search" in tags


def test_without_figures_each_picture_is_an_image_of_its_own(tmp_path, accepted):
    views = [SampleView("val", 7, "broken", "7: true cat", np.zeros((5, 4, 3), dtype=np.uint8))]
    views.append(SampleView("val", 8, "repaired", "8: true cat", text="a *very* bad day"))
    track(RepairLog(accepted, 120, views=views), [board(tmp_path)])
    (image,) = read(tmp_path / "run" / "repair").Images("repair_samples/broken in val, 7: true cat")
    assert (image.height, image.width) == (5, 4)
    (event,) = read(tmp_path / "run" / "repair").Tensors(
        "repair_samples/repaired in val/text_summary"
    )
    text = event.tensor_proto.string_val[0].decode()
    assert text.endswith("- **8: true cat**: a \\*very\\* bad day\n")


def test_tensorboard_reads_back_the_report_as_text(events, accepted):
    (event,) = events.Tensors("repair/report/text_summary")
    assert event.step == 120
    assert event.tensor_proto.string_val[0].decode() == accepted.to_markdown()
    (event,) = events.Histograms("repair_weights/change")
    change = event.histogram_value
    assert (event.step, change.num, change.min, change.max) == (120, 3, -0.25, 0.75)


def hparams_in(events: EventAccumulator, part: str) -> Any:
    content = events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), part)


def columns_in(events: EventAccumulator) -> tuple[list[str], list[str]]:
    columns = hparams_in(events, "experiment")
    names = [info.name for info in columns.hparam_infos]
    return names, [info.name.tag for info in columns.metric_infos]


def test_tensorboard_has_a_row_of_hyperparameters(events):
    asked = hparams_in(events, "session_start_info").hparams
    assert asked["repair/target"].string_value == "label 3"
    assert asked["repair/seed"].number_value == 3
    assert asked["repair/with fitness"].string_value == "eq2"
    assert "repair/with n_passed" not in asked
    assert columns_in(events) == (list(ASKED), list(MEASURED))
    assert set(MEASURED) & set(events.Tags()["scalars"]) == {
        tag for tag in MEASURED if "regressions" not in tag
    }


def test_the_row_shows_where_training_logs_hyperparameters_of_its_own(tmp_path, accepted):
    logger = board(tmp_path)
    hparams = {"lr": 0.5, "net": {"width": 8}, "path": "x" * 70, "none": None}
    declare([logger, Notes()], hparams)
    logger.log_hyperparams(hparams)  # as Lightning does when a fit begins
    track(RepairLog(accepted, 5, hparams=hparams), [logger])
    training, repair = read(tmp_path / "run"), read(tmp_path / "run" / "repair")
    assert columns_in(training) == columns_in(repair)
    names, metrics = columns_in(repair)
    assert names == ["lr", "net/width", "path", *ASKED]
    assert metrics == [*MEASURED, "hp_metric"]
    asked = hparams_in(repair, "session_start_info").hparams
    assert (asked["lr"].number_value, asked["net/width"].number_value) == (0.5, 8)
    assert asked["path"].string_value == "x" * 57 + "..."


def test_a_second_repair_in_one_log_is_a_run_of_its_own_with_the_same_tags(tmp_path, accepted):
    logger = board(tmp_path)
    track(RepairLog(accepted, 5, changes=CHANGES), [logger])
    track(RepairLog(replace(accepted, status="refused"), 6, "repair-1"), [logger])
    track(
        RepairLog(replace(accepted, status="not repaired"), 7), [logger]
    )  # the user's folder gave it no new name
    for run, step, value in (("repair", 5, 1.0), ("repair-1", 6, 0.0), ("repair-2", 7, 0.0)):
        scalars = scalars_in(read(tmp_path / "run" / run))
        assert scalars["repair/accepted"] == [(step, value)]


def test_a_logger_without_an_experiment_gets_every_number(accepted):
    notes = Notes()
    track(RepairLog(accepted, 120, changes=CHANGES), [notes])
    final = final_numbers(accepted)
    assert notes.entries == [*enumerate(search_curves(accepted)), (120, final)]


def test_a_logger_that_raises_is_warned_of_and_the_others_go_on(accepted):
    notes = Notes()
    with pytest.warns(
        UserWarning, match="not logged to Broken, which raised ConnectionError: no server"
    ):
        track(RepairLog(accepted, 120), [Broken(), notes])
    assert [step for step, _ in notes.entries] == [0, 1, 2, 120]


def test_what_is_not_finite_reaches_no_logger(accepted):
    notes = Notes()
    empty = SplitReport("empty", "known", TargetCounts(0, 0, 0, 0))
    track(RepairLog(replace(accepted, splits=(empty,)), 120), [notes])
    assert "repair_numbers/empty_data/n" in notes.entries[-1][1]
    assert all(value == value for _, scalars in notes.entries for value in scalars.values())


def test_every_number_has_a_row_in_the_table_of_tags(accepted):
    rows = [row for name, row in vars(tags).items() if name.endswith("_TAG")]
    patterns = [re.sub(r"\\{\w+\\}", "[^/]+", re.escape(row)) for row in rows]
    numbers = [final_numbers(accepted), *search_curves(accepted)]
    numbers += strength_curves(on_its_way(accepted)).values()
    logged = {tag for scalars in numbers for tag in scalars}
    assert {tag for tag in logged if not any(re.fullmatch(p, tag) for p in patterns)} == set()


def test_slices_that_differ_in_signs_alone_have_tags_of_their_own():
    names = "C", "C#", "C++", "C_2", "<30", ">30", "//"
    assert len({*slice_tags(names).values()}) == len(names)


def on_its_way(report: RepairReport) -> RepairReport:
    path = (
        StrengthPoint(0.6, 5, FlipCounts(90, 0, 6, 14), FlipCounts(18, 1, 2, 4)),
        StrengthPoint(1.15, 8, FlipCounts(89, 1, 10, 10), FlipCounts(17, 2, 3, 3)),
    )
    return replace(report, strength=path, chosen_strength=0.6)


FILES = ("report.html", "report.md", "report.json", "repair.patch.safetensors")
GREY = np.full((8, 8, 3), 128, dtype=np.uint8)
CAPTION = "7: true cat, cat -> dog, margin 0.5 -> -0.25"
FLIPPED = (
    FlippedSample(2, "repaired", True, 1, 0, 1, -1.0, 0.5),
    FlippedSample(7, "broken", False, 0, 0, 1, 0.5, -0.25, "night"),
)


@pytest.fixture
def log(accepted: RepairReport, tmp_path: Path) -> RepairLog:
    """A repair with files, a picture, a text and two flipped samples."""
    folder = tmp_path / "repair"
    folder.mkdir()
    for name in (*FILES, "repaired.ckpt"):
        (folder / name).write_text(f"this is {name}")
    names = (*FILES, "repaired.ckpt")
    kinds = ("html", "markdown", "json", "patch", "checkpoint")
    files = {kind: str(folder / name) for kind, name in zip(kinds, names, strict=True)}
    train, val, test = accepted.splits
    report = replace(
        accepted,
        splits=(train, replace(val, flipped=FLIPPED), test),
        files={**files, "predictions": str(folder / "gone.csv")},
        class_names=("cat", "dog"),
    )
    views = [
        SampleView("val", 7, "broken", CAPTION, GREY),
        SampleView("val", 2, "repaired", "2: true dog", text="a bad day"),
    ]
    return RepairLog(report, 120, changes={"head.weight": torch.tensor([[0.5, 0.0]])}, views=views)


class Calls:
    """Notes each call of a method of the real class, whose arguments it checks."""

    def __init__(self, **methods: Any) -> None:
        self.calls = []
        for name, signature in methods.items():
            setattr(self, name, self._noting(name, signature))

    def _noting(self, name: str, signature: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, signature(*args, **kwargs)))

        return call

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for method, arguments in self.calls if method == name]


class FakeWandb(loggers.WandbLogger):
    """Lightning's logger, with a run that notes what is logged."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self._prefix, self._wandb_init = "", {}
        self.run = Calls(
            log=lambda data: data,
            log_artifact=lambda artifact_or_path: {"artifact": artifact_or_path},
        )
        self.run.id = "x7k2"

    @property
    def experiment(self) -> Any:
        return self.run


class Artifact(SimpleNamespace):
    def __init__(self, name: str, type: str) -> None:
        super().__init__(name=name, type=type, added=[])

    def add_file(self, local_path: str) -> None:
        self.added.append(Path(local_path).name)


def install(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = ModuleType("wandb")
    fake.Image = lambda data_or_path, caption=None: (
        "image",
        np.asarray(data_or_path).shape,
        caption,
    )
    fake.Table = lambda columns=None, data=None, dataframe=None: ("table", columns, data)
    fake.Html = lambda data, inject=True: ("html", data.read(), inject)
    fake.Artifact = Artifact
    install(monkeypatch, fake)
    return fake


def test_wandb_gets_numbers_images_tables_text_the_page_and_an_artifact(wandb, log):
    logger = FakeWandb()
    track(log, [logger])
    logged = logger.run.of("log")
    curves = search_curves(log.report)
    assert logged[: len(curves)] == [
        {**scalars, "trainer/global_step": i} for i, scalars in enumerate(curves)
    ]
    assert {**final_numbers(log.report), "trainer/global_step": 120} in logged
    by_key = {key: value for entry in logged for key, value in entry.items() if "/" in key}
    assert by_key["repair/report"] == ("html", "this is report.html", False)
    assert by_key["repair_samples/broken in val"] == [("image", (8, 8, 3), CAPTION)]
    assert by_key["repair_samples/repaired in val"] == (
        "table",
        ["sample", "text"],
        [["2: true dog", "a bad day"]],
    )
    kind, columns, rows = by_key["repair/flipped_samples"]
    assert (kind, columns[0], columns[-1]) == ("table", "split", "input")
    assert rows[0][:3] + rows[0][-1:] == ["val", 7, "broken", ("image", (8, 8, 3), None)]
    assert rows[1] == ["val", 2, "repaired", "dog", "cat", "dog", -1.0, 0.5, True, "", "", None]
    (artifact,) = (call["artifact"] for call in logger.run.of("log_artifact"))
    assert (artifact.name, artifact.type, artifact.added) == ("repair-x7k2", "report", list(FILES))
    if log.drawn:
        assert {"repair/summary", "repair_figures/Course of the search"} <= set(by_key)


class FakeMlflow(loggers.MLFlowLogger):
    """Lightning's logger, with a client that notes what is logged."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self._prefix, self._log_batch_kwargs = "", {}
        self.client = Calls(
            log_batch=lambda run_id, metrics=(), params=(), tags=(): {"metrics": metrics},
            log_artifact=lambda run_id, local_path, artifact_path=None: {
                "file": Path(local_path).name,
                "to": artifact_path,
            },
            log_figure=lambda run_id, figure, artifact_file, *, save_kwargs=None: {
                "to": artifact_file
            },
            log_text=lambda run_id, text, artifact_file: {"text": text, "to": artifact_file},
            log_table=lambda run_id, data, artifact_file: {"data": data, "to": artifact_file},
        )

    @property
    def experiment(self) -> Any:
        return self.client

    @property
    def run_id(self) -> str:
        return "r1"


def test_mlflow_gets_numbers_and_artifacts(log, monkeypatch):
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    install(monkeypatch, ModuleType("mlflow"), entities)
    logger = FakeMlflow()
    track(replace(log, name="repair-1"), [logger])
    metrics = {metric for batch in logger.client.of("log_batch") for metric in batch["metrics"]}
    assert {
        (tag, value, 120) for tag, value in final_numbers(log.report, "repair-1").items()
    } <= metrics
    assert ("repair-1_search/best_fitness", 6.5, 1) in metrics
    assert logger.client.of("log_artifact") == [{"file": name, "to": "repair-1"} for name in FILES]
    assert logger.client.of("log_text") == [
        {"text": "2: true dog\na bad day", "to": "repair-1/samples/repaired in val.txt"}
    ]
    for table in logger.client.of("log_table"):
        assert table["data"]["position"] == [2, 7]
    if log.drawn:
        assert {"repair-1/figures/summary.png", "repair-1/samples/broken in val.png"} <= {
            figure["to"] for figure in logger.client.of("log_figure")
        }


def test_a_release_report_reaches_them_too(wandb, log):
    loggers_ = FakeWandb(), FakeMlflow()
    track_release(SimpleNamespace(files=log.report.files), loggers_, step=3)
    (artifact,) = (call["artifact"] for call in loggers_[0].run.of("log_artifact"))
    assert artifact.added == list(FILES)
    assert [call["to"] for call in loggers_[1].client.of("log_artifact")] == ["release"] * 4
