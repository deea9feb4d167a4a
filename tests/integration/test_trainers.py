"""A repair with trainers and loggers of every kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Remember,
    camera,
    quick_repair,
    quiet_trainer,
    right,
    same,
)
from lightning_package import (
    Callback,
    CSVLogger,
    EarlyStopping,
    TensorBoardLogger,
    TQDMProgressBar,
    Trainer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_nrl import RegressionFreeRepair, Target


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


def test_training_is_the_same_with_a_repair_and_without(tmp_path: Path) -> None:
    plain, repaired = Remember(), Remember()
    fit(tmp_path, plain, network="cnn")  # has dropout, and its data are shuffled
    fit(tmp_path, repaired, quick_repair(), network="cnn")
    assert same(plain.state, repaired.state)


WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "max_steps": ({"max_steps": 5, "max_epochs": -1}, 5),
    "early stopping": (
        {"callbacks": [EarlyStopping("val_loss", patience=1, min_delta=1e3)], "max_epochs": 9},
        24,
    ),
    "accumulation": ({"accumulate_grad_batches": 4}, 3),
    "barebones": (
        {
            "barebones": True,
            "enable_checkpointing": False,
            "logger": False,
            "enable_progress_bar": False,
        },
        12,
    ),
}


@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`")
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_data_are_known_however_training_ends(tmp_path: Path, way: str) -> None:
    arguments, steps = WAYS[way]
    arguments = dict(arguments)
    repair = quick_repair()
    trainer, model = fit(tmp_path, *arguments.pop("callbacks", []), repair, **arguments)
    assert trainer.global_step == steps
    assert [(split.split, split.n) for split in repair.report.splits] == [
        ("train", 400),
        ("repair", 203),
    ]
    found = repair.report.splits[1]
    assert found.kept + found.repaired == int(right(model, Digits().repair).sum())


def test_a_fast_run_of_a_few_batches_repairs_on_those_and_writes_nothing(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kinds", [[TensorBoardLogger], [CSVLogger, TensorBoardLogger]])
def test_every_logger_is_told_what_the_report_says(tmp_path: Path, kinds: list[Any]) -> None:
    repair, loggers = quick_repair(), [kind(tmp_path, name=kind.__name__) for kind in kinds]
    trainer, _ = fit(tmp_path, repair, logger=loggers)
    folder = Path(loggers[0].log_dir)
    assert repair.repaired_model_path == str(folder / "repair" / "repaired.ckpt")
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            text = (Path(logger.log_dir) / "metrics.csv").read_text()
            assert {"repair/known_repair_rate", "repair_search/best_fitness"} <= set(
                text.splitlines()[0].split(",")
            )
        else:
            found = scalars(Path(logger.log_dir) / "repair")
            assert found["repair/accepted"] == [1.0]
            in_target = sum(s.repaired_in_target for s in repair.report.splits)
            assert found["repair/known_repaired_in_target"] == [in_target]
            assert found["repair_numbers/repair_data/broken"] == [0.0]
            assert not any(tag.startswith("repair") for tag in scalars(Path(logger.log_dir)))
            columns = hparam_columns(Path(logger.log_dir))
            assert (
                {"network", "repair/gate"}
                <= columns
                == hparam_columns(Path(logger.log_dir) / "repair")
            )
    assert trainer.callback_metrics["repair/known_broken"] == 0.0


def test_slices_reach_report_markdown_and_tensorboard(tmp_path: Path) -> None:
    given: dict[str, Any] = {"slices": camera, "importance": lambda batch: 1 + batch[2].float()}
    callback, logger = (
        quick_repair(protected=Target.label(0), unseen="test", **given),
        TensorBoardLogger(tmp_path),
    )
    fit(tmp_path, callback, logger=logger, max_epochs=3)
    report = callback.report
    rows = {(one.name, one.role): one for one in report.slices}
    assert set(rows) == {
        (name, role) for name in ("noisy", "clean") for role in ("known", "unseen")
    }
    assert (
        sum(one.targeted for one in report.slices if one.role == "known")
        == report.pooled("known").targeted
    )
    assert "## By slice" in Path(report.files["markdown"]).read_text()
    events = EventAccumulator(f"{logger.log_dir}/repair").Reload()
    logged = events.Scalars("repair_numbers/slice_noisy/unseen_broken")[0].value
    assert logged == rows["noisy", "unseen"].broken


def test_the_report_is_shown_once_and_can_be_silenced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, quick_repair(verbose=True))
    assert capsys.readouterr().out.lower().count("targeted failures pass now") == 1
    fit(tmp_path, quick_repair(verbose=False))
    assert "targeted" not in capsys.readouterr().out


def test_progress_is_shown_below_the_trainers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, TQDMProgressBar(), quick_repair(), enable_progress_bar=True)
    _, training, said = capsys.readouterr().out.partition("12/12")
    assert training
    assert {"counting", "searching"} <= set(re.findall(r"Repair: (\w+)", said))


def test_a_row_of_the_papers_table_repairs(tmp_path: Path) -> None:
    repair = RegressionFreeRepair.from_paper(
        "EXP-C1", target=Target.label(8), method=quick_repair().settings.method, verbose=False
    )
    fit(tmp_path, repair, max_epochs=2)
    assert repair.report.settings["fitness"]["perfect_intact"]
    assert repair.report.target == "label 8"
    assert repair.report.localization.requested == 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_fit_on_a_gpu_the_model_can_be_saved_and_validated(tmp_path: Path) -> None:
    repair, model = quick_repair(), Classifier()
    trainer = quiet_trainer(tmp_path, repair, accelerator="gpu", max_epochs=1)
    trainer.fit(model, datamodule=Digits())
    assert repair.report.status == "repaired"
    # Lightning has moved the model to the CPU.
    trainer.save_checkpoint(tmp_path / "later.ckpt", weights_only=False)
    saved = [
        torch.load(path, weights_only=True)
        for path in (tmp_path / "later.ckpt", repair.repaired_model_path)
    ]
    for name, value in saved[1]["state_dict"].items():
        assert torch.equal(saved[0]["state_dict"][name].cpu(), value.cpu())
    trainer.validate(model, datamodule=Digits(), verbose=False)
