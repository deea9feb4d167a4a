"""`diagnose`, `compare` and `sweep` on a trained model, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    QUICK,
    Classifier,
    Digits,
    Untrainable,
    is_noisy,
    quick_repair,
    quiet_trainer,
    right,
    same,
)
from lightning_package import CSVLogger, ModelCheckpoint, TensorBoardLogger, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, Grid, Target, compare, diagnose, repair, sweep
from lightning_nrl.analysis.diagnosis import Diagnosis
from lightning_nrl.study import SweepResult

QUICKLY = {"search": QUICK["search"], "methods": {"swarm": QUICK["method"]}}
SWEEP = {
    "settings": Grid(fitness=["eq1", "lexicographic"], n_passed=[100], particles=[15]),
    "seeds": 3,
    "method": QUICK["method"],
    "search": QUICK["search"],
}


@contextmanager
def without_a_trace(folder: Path, trained_path: Path) -> Iterator[tuple[Trainer, Classifier]]:
    """A trainer and a model that must hold the checkpoint afterwards; nothing may be written or
    drawn.
    """
    model, trainer = Classifier(), quiet_trainer(folder, logger=True)
    random = torch.get_rng_state()
    yield trainer, model
    assert same(model, trained_path)
    assert (trainer.max_epochs, trainer.should_stop) == (3, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(folder.iterdir())


def test_a_checkpoint_is_diagnosed_without_a_trace(tmp_path, trained_path):
    data, target = Digits(), Target.where(is_noisy, name="noisy")
    with without_a_trace(tmp_path, trained_path) as (trainer, model):
        found = diagnose(trainer, model, datamodule=data, ckpt_path=trained_path, target=target)
    # The failures are those of a forward pass of our own.
    wrong = ~right(model, data.repair)
    targets = (wrong & data.repair.tensors[2]).nonzero().flatten().tolist()
    assert [(t.split, t.id) for t in found.targets] == [("repair", i) for i in targets]
    assert found.known["failed"] == int(wrong.sum()) + int((~right(model, data.train)).sum())
    assert found.head == "network.3"
    assert [layer.layer for layer in found.layers] == ["network.1", "network.3"]
    passes = {"train": right(model, data.train), "repair": ~wrong}
    assert found.binding
    assert all(passes[sample.split][sample.id] for sample in found.binding)


def test_retraining_and_repair_beside_each_other(tmp_path, trained_path):
    data, methods = Digits(), {**QUICKLY["methods"], "retraining": "retraining"}
    with without_a_trace(tmp_path, trained_path) as (trainer, model):
        comparison = compare(
            trainer,
            model,
            datamodule=data,
            ckpt_path=trained_path,
            target=Target.where(is_noisy),
            search=QUICK["search"],
            methods=methods,
        )
    wrong = ~right(model, data.repair) & data.repair.tensors[2]
    assert comparison.targets == int(wrong.sum()) > 0
    original = comparison["swarm"].curve[0]
    assert original.unseen.passed == int(right(model, data.test).sum())
    assert comparison["swarm"].scaled.known.broken == 0 < comparison["swarm"].scaled.targeted
    retraining = comparison["retraining"].given
    assert retraining.known.n == 603
    assert retraining.targeted > 0


def test_a_checkpoint_is_swept_without_a_trace_and_its_best_run_repairs(tmp_path, trained_path):
    data = Digits()
    with without_a_trace(tmp_path, trained_path) as (trainer, model):
        result = sweep(
            trainer, model, datamodule=data, ckpt_path=trained_path, calibration="val", **SWEEP
        )
    best = result.best("accuracy")
    assert (best.known.n, best.calibration.n, best.unseen.n, best.layer) == (
        603,
        100,
        300,
        "network.3",
    )
    # The same by itself, on another trainer: the same weights, the same counts.
    again = Untrainable()
    report = repair(
        quiet_trainer(tmp_path),
        again,
        datamodule=data,
        ckpt_path=trained_path,
        unseen="test",
        calibration="val",
        gate="accuracy",
        verbose=False,
        **result.arguments(best),
    )
    assert report.status == "repaired"
    splits = {split.split: split for split in report.splits}
    for counts, name in ((best.unseen, "test"), (best.calibration, "val")):
        assert counts.repaired == splits[name].repaired
        assert counts.broken == splits[name].broken
    result.write(model, best)
    assert same(model, again)


def test_the_folder_and_tensorboard_have_the_runs_of_a_sweep(tmp_path, trained):
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="")
    trainer, folder = quiet_trainer(tmp_path, logger=logger), tmp_path / "sweep"
    how = {**SWEEP, "dirpath": folder, "unseen": None}
    result = sweep(trainer, trained, datamodule=Digits(), log="run", **how)
    assert SweepResult.from_csv(folder / "sweep.csv").runs == result.runs
    assert len(list((tmp_path / "logs" / "sweep").iterdir())) == len(result.runs) == 6
    logger = TensorBoardLogger(tmp_path / "means", name="", version="")
    trainer = quiet_trainer(tmp_path, logger=logger)
    again = sweep(trainer, trained, datamodule=Digits(), log="setting", **how)
    # Wall time included: nothing was run.
    assert again.runs == result.runs
    first, second = (tmp_path / "means" / "sweep").iterdir()
    events = [EventAccumulator(str(folder)).Reload() for folder in (first, second)]
    assert "_hparams_/session_start_info" in events[0].summary_metadata
    means = sum(event.Scalars("sweep/known_broken")[0].value for event in events)
    assert means == pytest.approx(sum(run.known.broken for run in result.runs) / 3)


def test_the_best_checkpoint_of_the_trainer_can_be_diagnosed(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    trainer = quiet_trainer(tmp_path, best, logger=CSVLogger(tmp_path), max_epochs=2)
    trainer.fit(model := Classifier(), datamodule=Digits())
    before, loggers, files = dict(vars(best)), trainer.loggers, sorted(tmp_path.rglob("*"))
    diagnose(trainer, model, datamodule=Digits(), ckpt_path="best")
    assert same(model, best.best_model_path)
    assert (vars(best), trainer.loggers, sorted(tmp_path.rglob("*"))) == (before, loggers, files)


def test_data_loaders_will_do(tmp_path, trained_path):
    data, model = Digits(), Untrainable.load_from_checkpoint(trained_path)
    loaders = data.train_dataloader(), data.repair_dataloader()
    found = diagnose(quiet_trainer(tmp_path), model, *loaders, target=Target.label(8))
    assert {t.label for t in found.targets} == {8}
    assert found.target == "label 8"
    nothing = diagnose(
        quiet_trainer(tmp_path), model, *loaders, target=Target.where(lambda batch: batch[1] < 0)
    )
    assert nothing.advice.startswith("Nothing to repair")


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (diagnose, {"target": 8}, "`target=8` is no Target"),
        (
            compare,
            {**QUICKLY, "gate": "accuracy"},
            r"`gate='accuracy'`: a comparison counts[\s\S]*HINT: leave `gate`",
        ),
        (sweep, {"seed": 3}, "`seed=3`: a sweep has `seeds`"),
        (sweep, {"method": "convex"}, "`method` is a Convex: a sweep runs the paper's search"),
        (sweep, {"settings": Grid(alfa=[1])}, "did you mean 'alpha'"),
        (sweep, {"targets": None}, "did you mean `target`"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, call, arguments, message):
    given = SWEEP if call is sweep else {}
    with pytest.raises(ConfigurationError, match=message):
        call(quiet_trainer(tmp_path), Untrainable(), datamodule=Digits(), **{**given, **arguments})


@pytest.mark.parametrize("call", [diagnose, repair])
def test_a_trainer_with_a_repair_of_its_own_is_refused(tmp_path, call):
    with pytest.raises(ConfigurationError, match="`trainer` has a RegressionFreeRepair of its own"):
        call(quiet_trainer(tmp_path, quick_repair()), Untrainable(), datamodule=Digits())


def calls(
    folder: Path, checkpoint: Path, strategy: str, devices: int
) -> tuple[Diagnosis, SweepResult, Any]:
    """What a rank finds, and the weights of a run of the sweep."""
    arguments = {"datamodule": Digits(), "ckpt_path": checkpoint}
    trainers = [quiet_trainer(folder, devices=devices, strategy=strategy) for _ in range(2)]
    result = sweep(trainers[0], Classifier(), **arguments, **{**SWEEP, "seeds": 1})
    timeless = replace(result, runs=tuple(replace(run, seconds=0.0) for run in result.runs))
    diagnosis = diagnose(trainers[1], Classifier(), **arguments)
    return diagnosis, timeless, dict(result.state(result.runs[-1]))


def test_two_processes_find_what_one_finds(tmp_path, trained_path):
    first, second = in_two_processes(calls, tmp_path, trained_path, "ddp", 2)
    assert (first[0].advice, first[0].costs) == (second[0].advice, second[0].costs)
    for diagnosis, result, state in (second, calls(tmp_path, trained_path, "auto", 1)):
        assert findings(first[0]) == findings(diagnosis)
        one, other = ({(b.split, b.id) for b in found.binding} for found in (first[0], diagnosis))
        assert len(one ^ other) <= len(one) / 5  # rounding decides about a few
        assert first[1].runs == result.runs
        assert same(first[2], state)


def findings(diagnosis: Diagnosis) -> list[Any]:
    """All but costs and what rounding changes."""
    targets = [(target.split, target.id, target.fixable) for target in diagnosis.targets]
    return [diagnosis.known, diagnosis.doubts, diagnosis.mixing, targets]
