"""`sweep(trainer, model, ...)`: many searches on a trained model, which stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed_sweep
import pytest
import torch
from digit_models import Classifier, Digits, Untrainable, quick_repair, quiet_trainer
from distributed_sweep import SWEEP
from lightning_package import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, Grid, repair, sweep
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.analysis.sweep import SweepResult


def timeless(result: SweepResult) -> SweepResult:
    return replace(result, runs=tuple(replace(run, seconds=0.0) for run in result.runs))


def test_a_checkpoint_is_swept_without_a_trace_and_its_best_run_repairs(tmp_path: Path, trained_path: Path) -> None:
    model, trainer = Untrainable(), quiet_trainer(tmp_path, logger=True)
    random = torch.get_rng_state()
    result = sweep(trainer, model, datamodule=Digits(), ckpt_path=trained_path, calibration="val", **SWEEP)
    trained = torch.load(trained_path, weights_only=True)["state_dict"]
    assert hash_tensors(model.state_dict()) == hash_tensors(trained)
    assert (trainer.max_epochs, trainer.should_stop) == (3, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(tmp_path.iterdir())
    best = result.best("accuracy")
    assert best is not None
    assert (best.known.n, best.calibration.n, best.unseen.n, best.layer) == (603, 100, 300, "network.3")
    # The same by itself, on another trainer: the same weights, the same counts.
    again = Untrainable()
    arguments: dict[str, Any] = {"unseen": "test", "calibration": "val", "gate": "accuracy", **result.arguments(best)}
    arguments |= {"verbose": False}
    report = repair(quiet_trainer(tmp_path), again, datamodule=Digits(), ckpt_path=trained_path, **arguments)
    assert report.status == "repaired"
    assert torch.equal(again.network[3].weight.cpu(), result.state(best)["network.3.weight"])
    test, val = ({split.split: split for split in report.splits}[name] for name in ("test", "val"))
    assert (best.unseen.repaired, best.unseen.broken) == (test.repaired, test.broken)
    assert (best.calibration.repaired, best.calibration.broken) == (val.repaired, val.broken)
    result.write(model, best)
    assert hash_tensors(model.state_dict()) == hash_tensors(again.state_dict())


def test_the_folder_and_tensorboard_have_the_runs(tmp_path: Path, trained: Classifier) -> None:
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="")
    trainer, folder = quiet_trainer(tmp_path, logger=logger), tmp_path / "sweep"
    how: dict[str, Any] = {**SWEEP, "dirpath": folder, "unseen": None}
    result = sweep(trainer, trained, datamodule=Digits(), log="run", **how)
    assert SweepResult.from_csv(folder / "sweep.csv").runs == result.runs
    assert len(list((tmp_path / "logs" / "sweep").iterdir())) == len(result.runs) == 6
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    logger = TensorBoardLogger(tmp_path / "means", name="", version="")
    again = sweep(quiet_trainer(tmp_path, logger=logger), trained, datamodule=Digits(), log="setting", **how)
    # Wall time included: nothing was run.
    assert again.runs == result.runs
    first = result.of(result.runs[0].setting)
    (row, *others) = sorted((tmp_path / "means" / "sweep").iterdir(), key=lambda path: path.stat().st_ctime_ns)
    assert len(others) == len({run.setting for run in result.runs}) - 1
    events = EventAccumulator(str(row)).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    (value,) = events.Scalars("sweep/known_broken")
    assert value.value == pytest.approx(sum(run.known.broken for run in first) / len(first))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": "accuracy"}, r"`gate='accuracy'`: a sweep runs searches to their end[\s\S]*HINT: leave `gate` out"),
        ({"seed": 3}, "`seed=3`: a sweep has `seeds`"),
        ({"max_time": 5}, "`max_time=5`: a sweep runs searches to their end"),
        ({"method": "convex"}, "`method` is a Convex: a sweep runs the paper's search"),
        ({"settings": Grid(alfa=[1])}, "did you mean `alpha`"),
        ({"seeds": []}, "names no seed"),
        ({"log": "all"}, "`log='all'` is unknown"),
        ({"targets": None}, "did you mean `target`"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(
    tmp_path: Path, trained: Classifier, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sweep(quiet_trainer(tmp_path), trained, datamodule=None, **{**SWEEP, **arguments})


def test_a_trainer_with_a_repair_and_a_plain_module_are_refused(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match="`trainer` has a RegressionFreeRepair of its own"):
        sweep(quiet_trainer(tmp_path, quick_repair()), trained, datamodule=Digits(), **SWEEP)
    with pytest.raises(ConfigurationError, match="there is `sweep_module`"):
        sweep(quiet_trainer(tmp_path), trained.network, datamodule=Digits(), **SWEEP)  # type: ignore[arg-type]


def test_two_processes_find_what_one_finds(tmp_path: Path, trained_path: Path) -> None:
    in_two_processes(distributed_sweep.on_rank, tmp_path, trained_path)
    one = sweep(quiet_trainer(tmp_path), Classifier(), datamodule=Digits(), ckpt_path=trained_path, **SWEEP)
    found = [SweepResult.from_json((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert timeless(found[0]) == timeless(one)
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in weights:
        assert hash_tensors(state) == hash_tensors(one.state(one.runs[-1]))
