"""The record of a training in a folder: what goes in comes out, and what it says of samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_problems import on_a_line, threshold

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.localization import KnownData
from lightning_nrl.published import NeuRecover, TrainingRecord
from lightning_nrl.published.training_record import forget_after, write_point


def recorded(folder: Path, *thresholds: float) -> KnownData:
    """A line with the threshold at 0.75, and a record of how it got there; 0.7 and 0.5 are targets,
    0.6 passes.
    """
    problem = on_a_line()
    for step, at in enumerate(thresholds, start=1):
        results = problem.evaluate(threshold(at))
        write_point(folder, step, step - 1, results, threshold(at))
    return KnownData(problem.evaluator, problem.known, problem.before, problem.space)


def test_what_samples_went_through_by_hand(tmp_path):
    recorded(tmp_path, 0.45, 0.65, 0.45, 0.8)
    record = TrainingRecord.read(tmp_path)
    split = record.splits["all"]
    assert [(point.step, point.epoch) for point in record.points][1:3] == [(2, 1), (3, 2)]
    assert split.passed[:, 4:].tolist() == [
        [False, True, True],
        [True, True, False],
        [False, True, True],
        [True, False, False],
    ]
    assert split.forgotten.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert not split.never_learned.any()
    assert split.label.tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert split.loss.dtype == torch.float16


def test_neurecover_finds_in_a_folder_what_it_finds_in_checkpoints(tmp_path):
    known = recorded(tmp_path, 0.45, 0.65, 0.75)
    folder = NeuRecover(str(tmp_path)).on(known).flips
    checkpoints = NeuRecover([threshold(0.45), threshold(0.65)]).on(known).flips
    for name, column in vars(folder).items():
        assert torch.equal(column, vars(checkpoints)[name])


def test_points_of_a_training_that_went_on_from_an_earlier_step_are_forgotten(tmp_path):
    recorded(tmp_path, 0.45, 0.65, 0.75)
    forget_after(tmp_path, 2)
    assert [point.step for point in TrainingRecord.read(tmp_path).points] == [1, 2]


def test_what_is_no_record_or_lacks_the_layer_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="contains no training record"):
        TrainingRecord.read(tmp_path)
    known = recorded(tmp_path / "other")
    write_point(tmp_path / "other", 1, 0, known.before, {"bias": torch.zeros(2)})
    with pytest.raises(ConfigurationError, match="has no weights of 'weight'"):
        NeuRecover(tmp_path / "other").on(known)
    forget_after(tmp_path / "other", -1)
    write_point(tmp_path / "other", 1, 0, replace(known.before, splits=("train",)), threshold(0.5))
    with pytest.raises(
        ConfigurationError, match=r"records \['train'\], but the targets are in \['all'\]"
    ):
        NeuRecover(tmp_path / "other").on(known)
