"""A repair with trainers and loggers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digit_models import (
    Classifier,
    Digits,
    Remember,
    camera,
    quick_repair,
    quiet_trainer,
    same,
)
from lightning_package import (
    Callback,
    CSVLogger,
    TensorBoardLogger,
    Trainer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


def fit(
    path: Path, *callbacks: Callback, network: str = "mlp", **arguments: Any
) -> tuple[Trainer, Classifier]:
    torch.manual_seed(3)
    trainer, model = (
        quiet_trainer(path, *callbacks, **{"max_epochs": 1, **arguments}),
        Classifier(network),
    )
    trainer.fit(model, datamodule=Digits())
    return trainer, model


def test_training_is_the_same_with_a_repair_and_without(tmp_path):
    plain, repaired = Remember(), Remember()
    fit(tmp_path, plain, network="cnn")  # has dropout, and its data are shuffled
    fit(tmp_path, repaired, quick_repair(), network="cnn")
    assert same(plain.state, repaired.state)


def test_a_fast_run_of_a_few_batches_repairs_on_those_and_writes_nothing(tmp_path):
    repair = quick_repair()
    fit(tmp_path, repair, fast_dev_run=2)
    assert [split.n for split in repair.report.splits] == [64, 128]
    assert repair.report.files == {}
    assert repair.repaired_model_path is None
    assert list(tmp_path.iterdir()) == []


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hparam_columns(folder: Path) -> set[str]:
    """Those that TensorBoard's HParams tab takes from this run."""
    content = (
        EventAccumulator(str(folder))
        .Reload()
        .SummaryMetadata("_hparams_/experiment")
        .plugin_data.content
    )
    infos = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.hparam_infos
    return {info.name for info in infos}


def test_every_logger_is_told_what_the_report_says(tmp_path):
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tensorboard")]
    trainer, _ = fit(tmp_path, repair := quick_repair(), logger=loggers)
    csv, run = (Path(logger.log_dir) for logger in loggers)
    assert repair.repaired_model_path == str(csv / "repair" / "repaired.ckpt")
    header = (csv / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"repair/known_repair_rate", "repair_search/best_fitness"} <= set(header)
    logged = scalars(run / "repair")
    assert logged["repair/accepted"] == [1.0]
    repaired = sum(split.repaired_in_target for split in repair.report.splits)
    assert logged["repair/known_repaired_in_target"] == [repaired]
    assert not any(tag.startswith("repair") for tag in scalars(run))
    columns = hparam_columns(run)
    assert {"network", "repair/gate"} <= columns == hparam_columns(run / "repair")
    assert trainer.callback_metrics["repair/known_broken"] == 0.0


def test_slices_reach_report_markdown_and_tensorboard(tmp_path):
    callback, logger = quick_repair(unseen="test", slices=camera), TensorBoardLogger(tmp_path)
    fit(tmp_path, callback, logger=logger)
    report = callback.report
    rows = {(row.name, row.role): row for row in report.slices}
    assert len(rows) == 4
    known = rows["noisy", "known"].targeted + rows["clean", "known"].targeted
    assert known == report.pooled("known").targeted
    assert "## By slice" in Path(report.files["markdown"]).read_text()
    events = EventAccumulator(f"{logger.log_dir}/repair").Reload()
    logged = events.Scalars("repair_numbers/slice_noisy/unseen_broken")[0].value
    assert logged == rows["noisy", "unseen"].broken


def test_the_report_is_shown_once_and_can_be_silenced(tmp_path, capsys):
    fit(tmp_path, quick_repair(verbose=True))
    assert capsys.readouterr().out.lower().count("targeted failures pass now") == 1
    fit(tmp_path, quick_repair(verbose=False))
    assert "targeted" not in capsys.readouterr().out
