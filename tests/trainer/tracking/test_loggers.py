"""What loggers get of a repair: numbers, pictures, text, files; W&B and MLflow as stand-ins and as
they are.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_package import (
    DummyLogger,
    Logger,
    TensorBoardLogger,
    loggers,
    rank_zero_only,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_nrl._trainer.tracking import tags
from lightning_nrl._trainer.tracking.loggers import declare, track, track_release
from lightning_nrl._trainer.tracking.repair_log import RepairLog
from lightning_nrl._trainer.tracking.scalars import (
    final_numbers,
    further_numbers,
    outcome,
    search_curves,
    strength_curves,
)
from lightning_nrl._trainer.tracking.tags import ASKED, MEASURED
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.records import SliceReport, SplitReport, StrengthPoint
from lightning_nrl.records.splits import FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView

CHANGES = {"classifier.weight": torch.tensor([[0.5, -0.25], [0.0, 0.75]])}


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

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
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
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_curves_are_scalars_where_no_figure_can_be_drawn(
    events: EventAccumulator, accepted: RepairReport, tmp_path: Path
) -> None:
    assert scalars_in(events) == expected_points(accepted, step=120)
    assert events.Tags()["images"] == []
    assert read(tmp_path / "run").Tags()["scalars"] == []


def test_with_figures_all_scalars_are_single_points_and_the_summary_is_the_first_card_of_twelve(
    tmp_path: Path, accepted: RepairReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(RepairLog, "drawn", True)
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


def test_without_figures_each_picture_is_an_image_of_its_own(
    tmp_path: Path, accepted: RepairReport
) -> None:
    views = [SampleView("val", 7, "broken", "7: true cat", np.zeros((5, 4, 3), dtype=np.uint8))]
    views.append(SampleView("val", 8, "repaired", "8: true cat", text="a *very* bad day"))
    track(RepairLog(accepted, 120, views=views), [board(tmp_path)])
    (image,) = read(tmp_path / "run" / "repair").Images("repair_samples/broken in val, 7: true cat")
    assert (image.height, image.width) == (5, 4)
    (event,) = read(tmp_path / "run" / "repair").Tensors(
        "repair_samples/repaired in val/text_summary"
    )
    assert (
        event.tensor_proto.string_val[0]
        .decode()
        .endswith("- **8: true cat**: a \\*very\\* bad day\n")
    )


def test_tensorboard_reads_back_the_report_as_text(
    events: EventAccumulator, accepted: RepairReport
) -> None:
    (event,) = events.Tensors("repair/report/text_summary")
    assert event.step == 120
    assert event.tensor_proto.string_val[0].decode() == accepted.to_markdown()
    (event,) = events.Histograms("repair_weights/change")
    assert event.step == 120
    assert (event.histogram_value.num, event.histogram_value.min, event.histogram_value.max) == (
        3,
        -0.25,
        0.75,
    )


def hparams_in(events: EventAccumulator, part: str) -> Any:
    content = events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), part)


def columns_in(events: EventAccumulator) -> tuple[list[str], list[str]]:
    found = hparams_in(events, "experiment")
    return [info.name for info in found.hparam_infos], [
        info.name.tag for info in found.metric_infos
    ]


def test_tensorboard_has_a_row_of_hyperparameters(events: EventAccumulator) -> None:
    asked = hparams_in(events, "session_start_info").hparams
    assert asked["repair/target"].string_value == "label 3"
    assert asked["repair/seed"].number_value == 3
    assert asked["repair/with fitness"].string_value == "eq2"
    assert "repair/with n_passed" not in asked
    assert columns_in(events) == (list(ASKED), list(MEASURED))
    assert set(MEASURED) & set(events.Tags()["scalars"]) == {
        tag for tag in MEASURED if "regressions" not in tag
    }


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_the_row_shows_where_training_logs_hyperparameters_of_its_own(
    tmp_path: Path, accepted: RepairReport, default_hp_metric: bool
) -> None:
    logger = TensorBoardLogger(
        tmp_path, name="", version="run", default_hp_metric=default_hp_metric
    )
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
        assert set(hparams_in(training, "session_start_info").hparams) == {
            "lr",
            "net/width",
            "path",
            "none",
        }


def test_a_second_repair_in_one_log_is_a_run_of_its_own_with_the_same_tags(
    tmp_path: Path, accepted: RepairReport
) -> None:
    logger = board(tmp_path)
    track(RepairLog(accepted, 5, changes=CHANGES), [logger])
    track(RepairLog(replace(accepted, status="refused"), 6, "repair-1"), [logger])
    track(
        RepairLog(replace(accepted, status="not repaired"), 7), [logger]
    )  # the user's folder gave it no new name
    for run, step, value in (("repair", 5, 1.0), ("repair-1", 6, 0.0), ("repair-2", 7, 0.0)):
        found = scalars_in(read(tmp_path / "run" / run))
        assert found["repair/accepted"] == [(step, value)]


@pytest.mark.parametrize("changes", [None, {}, {"weight": torch.zeros(3)}])
def test_without_a_change_there_is_no_histogram(
    tmp_path: Path, refused: RepairReport, changes: Any
) -> None:
    track(RepairLog(refused, 5, changes=changes), [board(tmp_path)])
    events = read(tmp_path / "run" / "repair")
    assert events.Tags()["histograms"] == []


def test_half_precision_changes_have_a_histogram(tmp_path: Path, accepted: RepairReport) -> None:
    changes = {"weight": torch.tensor([0.5, -0.25, 0.75]).bfloat16().requires_grad_()}
    track(RepairLog(accepted, 5, changes=changes), [board(tmp_path)])
    (event,) = read(tmp_path / "run" / "repair").Histograms("repair_weights/change")
    assert event.histogram_value.sum == 1.0


def test_a_logger_without_an_experiment_gets_every_number(accepted: RepairReport) -> None:
    notes = Notes()
    track(RepairLog(accepted, 120, changes=CHANGES), [notes])
    final = final_numbers(accepted)
    assert notes.entries == [*enumerate(search_curves(accepted)), (120, final)]


def test_no_logger_and_a_dummy_are_fine(accepted: RepairReport) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        track(RepairLog(accepted, 120, changes=CHANGES), [])
        track(RepairLog(accepted, 120, changes=CHANGES), [DummyLogger()])
    assert [w for w in told if "not logged" in str(w.message)] == []


def test_a_logger_that_raises_is_warned_of_and_the_others_go_on(accepted: RepairReport) -> None:
    notes = Notes()
    with pytest.warns(
        UserWarning, match="not logged to Broken, which raised ConnectionError: no server"
    ):
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


def test_search_curves_have_one_entry_an_iteration(accepted: RepairReport) -> None:
    first, _, last = search_curves(accepted)
    assert first == {
        "repair_search/best_fitness": 4.25,
        "repair_search/mean_fitness": -2.0,
        "repair_search/repaired": 4.0,
        "repair_search/broken": 0.0,
        "repair_search/loss_failed": 2.5,
        "repair_search/loss_passed": 0.25,
        "repair_search/diversity": 1.0,
    }
    assert last["repair_search/repaired"] == 7.0
    assert "repair_search/mean_fitness" not in search_curves(accepted)[1]  # which is not finite
    assert {tag.split("/")[0] for tag in search_curves(accepted, "second")[0]} == {"second_search"}


def test_broken_samples_are_those_no_longer_intact(accepted: RepairReport) -> None:
    assert accepted.search is not None
    history = {**accepted.search.history, "intact": [90.0, 88.0, 89.0]}
    report = replace(accepted, search=replace(accepted.search, history=history))
    assert [scalars["repair_search/broken"] for scalars in search_curves(report)] == [0.0, 2.0, 1.0]
    report = replace(accepted, search=replace(accepted.search, n_passed=None))
    assert all("repair_search/broken" not in scalars for scalars in search_curves(report))


def test_outcome_has_the_numbers_of_a_decision_and_no_other(accepted: RepairReport) -> None:
    assert list(outcome(accepted).items()) == [
        ("repair/accepted", 1.0),
        ("repair/evidence", 0.0),  # 3 to 1: no difference shown
        ("repair/known_broken", 0.0),
        ("repair/known_repaired_in_target", 7.0),
        ("repair/known_repair_rate", 0.7),
        ("repair/known_accuracy", 99 / 110),
        ("repair/unseen_broken", 1.0),
        ("repair/unseen_repaired", 3.0),
        ("repair/unseen_repair_rate", 0.75),
        ("repair/unseen_nfr", 0.05),
        ("repair/unseen_accuracy", 0.9),
    ]


def test_what_breaks_of_the_target_is_logged_and_shown(accepted: RepairReport) -> None:
    test = accepted.splits[2]
    counts = replace(test.counts, passed_in_target=6, broken_in_target=1)
    report = replace(accepted, splits=(*accepted.splits[:2], replace(test, counts=counts)))
    found = further_numbers(report)
    assert (
        found["repair_numbers/test_data/broken_in_target"],
        found["repair_numbers/test_data/n"],
    ) == (1.0, 20.0)
    assert "repair_numbers/train_data/repair_rate" not in found  # which is not defined
    assert (
        "| right samples in the target | 0 | 0 | 0 | 6 |\n| **broken of these** | **0** | **0** | **0** | **1** |"
        in (report.to_markdown())
    )


def test_slices_that_differ_in_signs_alone_have_tags_of_their_own(accepted: RepairReport) -> None:
    names = "C", "C#", "C++", "C_2", "<30", ">30", "//"
    slices = tuple(
        SliceReport(name, "known", TargetCounts(n, 0, 0, 0, n)) for n, name in enumerate(names)
    )
    found = further_numbers(replace(accepted, slices=slices), "")
    assert sorted(
        x for tag, x in found.items() if tag.endswith("known_targeted") and "slice_" in tag
    ) == [*range(7)]
    assert (
        found["_numbers/slice_C/known_targeted"],
        found["_numbers/slice_C_2/known_targeted"],
    ) == (0, 3)


def test_outcome_of_refused_weights_tells_what_they_would_have_done(refused: RepairReport) -> None:
    found = outcome(refused)
    assert found["repair/accepted"] == 0.0
    assert found["repair/known_broken"] == 0.0
    assert found["repair/refused_broken"] == 2.0
    assert found["repair/refused_repaired"] == 9.0


def test_every_number_has_a_row_in_the_table_of_tags(accepted: RepairReport) -> None:
    rows = [row for name, row in vars(tags).items() if name.endswith("_TAG")]
    patterns = [re.sub(r"\\{\w+\\}", "[^/]+", re.escape(row)) for row in rows]
    numbers = [final_numbers(accepted), *search_curves(accepted)]
    numbers += strength_curves(on_its_way(accepted)).values()
    logged = {tag for scalars in numbers for tag in scalars}
    assert {tag for tag in logged if not any(re.fullmatch(p, tag) for p in patterns)} == set()


def on_its_way(report: RepairReport) -> RepairReport:
    path = (
        StrengthPoint(0.6, 5, FlipCounts(90, 0, 6, 14), FlipCounts(18, 1, 2, 4)),
        StrengthPoint(1.15, 8, FlipCounts(89, 1, 10, 10), FlipCounts(17, 2, 3, 3)),
    )
    return replace(report, strength=path, chosen_strength=0.6)


def test_the_way_to_the_patch_begins_where_nothing_is_changed(accepted: RepairReport) -> None:
    found = strength_curves(on_its_way(accepted))
    assert list(found) == [0, 60, 115]
    assert set(found[0].values()) == {0.0}
    assert found[115] == {
        "repair_strength/repaired_in_target": 8.0,
        "repair_strength/known_repaired": 10.0,
        "repair_strength/known_broken": 1.0,
        "repair_strength/calibration_repaired": 3.0,
        "repair_strength/calibration_broken": 2.0,
    }


def test_each_rung_and_the_localised_weights_have_numbers(accepted: RepairReport) -> None:
    found = further_numbers(accepted, "")
    assert {tag.partition("/")[2]: x for tag, x in found.items() if "_data/" not in tag} == {
        "seconds": 2.0,
        "rung_search/repaired_in_target": 7.0,
        "rung_search/repaired": 9.0,
        "rung_search/broken": 0.0,
        "rung_search/weights_changed": 8.0,
        "rung_search/seconds": 1.5,
        "rung_search/held_out_repaired": 2.0,
        "rung_search/held_out_broken": 1.0,
        "rung_exact/repaired_in_target": 5.0,
        "rung_exact/repaired": 5.0,
        "rung_exact/broken": 0.0,
        "rung_exact/weights_changed": 640.0,
        "rung_exact/seconds": 0.25,
        "localization/n_g": 20.0,
        "localization/localized": 8.0,
        "localization/total": 640.0,
        "weights_changed": 8.0,
    }


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
    kinds = ("html", "markdown", "json", "patch", "checkpoint")
    files = {
        kind: str(folder / name)
        for kind, name in zip(kinds, (*FILES, "repaired.ckpt"), strict=True)
    }
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
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, signature in methods.items():
            setattr(self, name, self._noting(name, signature))

    def _noting(self, name: str, signature: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, signature(*args, **kwargs)))

        return call

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for one, arguments in self.calls if one == name]


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
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_numbers_images_tables_text_the_page_and_an_artifact(
    wandb: Any, log: RepairLog
) -> None:
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
    assert rows == [
        [
            "val",
            7,
            "broken",
            "cat",
            "cat",
            "dog",
            0.5,
            -0.25,
            False,
            "night",
            ("image", (8, 8, 3), None),
        ],
        ["val", 2, "repaired", "dog", "cat", "dog", -1.0, 0.5, True, "", None],
    ]
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


def test_mlflow_gets_numbers_and_artifacts(log: RepairLog, monkeypatch: pytest.MonkeyPatch) -> None:
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
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


def test_a_release_report_reaches_them_too(wandb: Any, log: RepairLog) -> None:
    loggers_ = FakeWandb(), FakeMlflow()
    track_release(SimpleNamespace(files=log.report.files), loggers_, step=3)  # type: ignore[arg-type]
    (artifact,) = (call["artifact"] for call in loggers_[0].run.of("log_artifact"))
    assert artifact.added == list(FILES)
    assert [call["to"] for call in loggers_[1].client.of("log_artifact")] == ["release"] * 4


def test_the_real_wandb_keeps_it_offline(
    log: RepairLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(log, [loggers.WandbLogger(project="digits", save_dir=tmp_path, offline=True)])
    real.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    media = folder / "files" / "media"
    assert next((media / "html" / "repair").iterdir()).read_text() == "this is report.html"
    (table,) = (media / "table" / "repair").iterdir()
    assert json.loads(table.read_text())["data"][0][:3] == ["val", 7, "broken"]
    assert any((media / "images" / "repair_samples").iterdir())


def test_the_real_mlflow_keeps_it_in_a_store(log: RepairLog, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    logger = loggers.MLFlowLogger(
        "digits",
        tracking_uri=f"sqlite:///{tmp_path}/store.db",
        artifact_location=f"{tmp_path}/store",
    )
    track(log, [logger])
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["repair/known_repaired_in_target"] == 7.0
    assert [
        m.step
        for m in logger.experiment.get_metric_history(logger.run_id, "repair_search/repaired")
    ] == [0, 1, 2]
    kept = tmp_path / "store" / logger.run_id / "artifacts" / "repair"
    assert [(kept / name).read_text() for name in FILES] == [f"this is {name}" for name in FILES]
