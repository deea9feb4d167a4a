"""W&B and MLflow: the real ones where they are installed, and stand-ins with their signatures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_package import Logger, loggers

from lightning_nrl._trainer.tracking.loggers import track, track_release
from lightning_nrl._trainer.tracking.repair_log import RepairLog
from lightning_nrl._trainer.tracking.scalars import final_numbers, search_curves
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.report.splits import FlippedSample

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
    files = {kind: str(folder / name) for kind, name in zip(kinds, (*FILES, "repaired.ckpt"), strict=True)}
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
        self.run = Calls(log=lambda data: data, log_artifact=lambda artifact_or_path: {"artifact": artifact_or_path})
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
    fake.Image = lambda data_or_path, caption=None: ("image", np.asarray(data_or_path).shape, caption)
    fake.Table = lambda columns=None, data=None, dataframe=None: ("table", columns, data)
    fake.Html = lambda data, inject=True: ("html", data.read(), inject)
    fake.Artifact = Artifact
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_numbers_images_tables_text_the_page_and_an_artifact(wandb: Any, log: RepairLog) -> None:
    logger = FakeWandb()
    track(log, [logger])
    logged = logger.run.of("log")
    curves = search_curves(log.report)
    assert logged[: len(curves)] == [{**scalars, "trainer/global_step": i} for i, scalars in enumerate(curves)]
    assert {**final_numbers(log.report), "trainer/global_step": 120} in logged
    by_key = {key: value for entry in logged for key, value in entry.items() if "/" in key}
    assert by_key["repair/report"] == ("html", "this is report.html", False)
    assert by_key["repair_samples/broken in val"] == [("image", (8, 8, 3), CAPTION)]
    assert by_key["repair_samples/repaired in val"] == ("table", ["sample", "text"], [["2: true dog", "a bad day"]])
    kind, columns, rows = by_key["repair/flipped_samples"]
    assert (kind, columns[0], columns[-1]) == ("table", "split", "input")
    assert rows == [
        ["val", 7, "broken", "cat", "cat", "dog", 0.5, -0.25, False, "night", ("image", (8, 8, 3), None)],
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
        self.client = Calls(
            log_batch=lambda run_id, metrics=(), params=(), tags=(): {"metrics": metrics},
            log_artifact=lambda run_id, local_path, artifact_path=None: {
                "file": Path(local_path).name,
                "to": artifact_path,
            },
            log_figure=lambda run_id, figure, artifact_file, *, save_kwargs=None: {"to": artifact_file},
            log_text=lambda run_id, text, artifact_file: {"text": text, "to": artifact_file},
            log_table=lambda run_id, data, artifact_file: {"data": data, "to": artifact_file},
        )

    @property
    def experiment(self) -> Any:
        return self.client

    @property
    def run_id(self) -> str:
        return "r1"


def test_mlflow_gets_numbers_in_one_request_and_artifacts(log: RepairLog, monkeypatch: pytest.MonkeyPatch) -> None:
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    logger = FakeMlflow()
    track(replace(log, name="repair-1"), [logger])
    (batch,) = logger.client.of("log_batch")
    final = final_numbers(log.report, "repair-1")
    assert {(tag, value, 120) for tag, value in final.items()} <= set(batch["metrics"])
    assert ("repair-1_search/best_fitness", 6.5, 1) in batch["metrics"]
    assert logger.client.of("log_artifact") == [{"file": name, "to": "repair-1"} for name in FILES]
    assert logger.client.of("log_text") == [
        {"text": "2: true dog\na bad day", "to": "repair-1/samples/repaired_in_val.txt"}
    ]
    for table in logger.client.of("log_table"):
        assert table["data"]["position"] == [2, 7]
    if log.drawn:
        assert {"repair-1/figures/summary.png", "repair-1/samples/broken_in_val.png"} <= {
            figure["to"] for figure in logger.client.of("log_figure")
        }


def test_a_release_report_reaches_them_too(wandb: Any, log: RepairLog) -> None:
    loggers_ = FakeWandb(), FakeMlflow()
    track_release(SimpleNamespace(files=log.report.files), loggers_, step=3)  # type: ignore[arg-type]
    (artifact,) = (call["artifact"] for call in loggers_[0].run.of("log_artifact"))
    assert artifact.added == list(FILES)
    assert [call["to"] for call in loggers_[1].client.of("log_artifact")] == ["release"] * 4


def test_the_real_wandb_keeps_it_offline(log: RepairLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        "digits", tracking_uri=f"sqlite:///{tmp_path}/store.db", artifact_location=f"{tmp_path}/store"
    )
    track(log, [logger])
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["repair/known_repaired_in_target"] == 7.0
    assert [m.step for m in logger.experiment.get_metric_history(logger.run_id, "repair_search/repaired")] == [0, 1, 2]
    kept = tmp_path / "store" / logger.run_id / "artifacts" / "repair"
    assert [(kept / name).read_text() for name in FILES] == [f"this is {name}" for name in FILES]
