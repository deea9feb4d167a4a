from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.updates.predictions import Predictions


def table(label: list[int], prediction: list[int], sizes: tuple[int, ...] = (2, 1)) -> SampleResults:
    """Two splits; positions in the data set are 10 and 12, then 0."""
    right = tensor(label) == tensor(prediction)
    return SampleResults(
        splits=("train", "repair"),
        sizes=sizes,
        index=tensor([10, 12, 0]),
        label=tensor(label),
        prediction=tensor(prediction),
        loss=torch.zeros(3),
        passed=right,
        targeted=torch.zeros(3, dtype=torch.bool),
        margin=torch.zeros(3),
    )


FILE = "split,id,prediction\ntrain,10,1\ntrain,12,0\nrepair,0,2\n"


def test_a_file_says_what_the_old_model_got_right(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text(FILE)
    found = Predictions.read(tmp_path / "old.csv").results(table([1, 1, 2], [0, 1, 2]))
    assert found.prediction.tolist() == [1, 0, 2]
    assert found.passed.tolist() == [True, False, True]
    assert found.loss.tolist() == [0.0, 1.0, 0.0]
    assert found.margin.isnan().all()


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    weights = {"w": torch.arange(3.0)}
    before = Predictions.of(table([1, 1, 2], [0, 1, 2]), weights)
    before.save(tmp_path / "deep" / "old.csv")
    assert Predictions.read(tmp_path / "deep" / "old.csv") == before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["old.csv"]


def test_a_cache_is_used_for_the_same_weights_samples_and_labels_alone(tmp_path: Path) -> None:
    weights, path, like = {"w": torch.arange(3.0)}, tmp_path / "old.csv", table([1, 1, 2], [0, 1, 2])
    assert Predictions.cached(path, weights, like) is None
    Predictions.of(like, weights).save(path)
    assert Predictions.cached(path, weights, like) is not None
    assert Predictions.cached(path, {"w": torch.ones(3)}, like) is None
    assert Predictions.cached(path, weights, table([0, 1, 2], [0, 1, 2])) is None  # another label
    moved = table([1, 1, 2], [0, 1, 2], sizes=(1, 2))
    assert Predictions.cached(path, weights, moved) is None  # position 12 is in the other split


def test_a_task_without_classes_needs_passed(tmp_path: Path) -> None:
    like = table([-1, -1, -1], [-1, -1, -1])
    (tmp_path / "old.csv").write_text("split,id,passed\ntrain,10,1\ntrain,12,0\nrepair,0,1\n")
    assert Predictions.read(tmp_path / "old.csv").results(like).passed.tolist() == [True, False, True]
    (tmp_path / "old.csv").write_text(FILE)
    with pytest.raises(ConfigurationError, match=r"has no classes.*\nHINT: add a column `passed`"):
        Predictions.read(tmp_path / "old.csv").results(like)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split,id,prediction\ntrain,ten,1\n", "line 2"),
        ("split,id,prediction\ntrain,10,1\ntrain,12\n", "line 3"),
        ("split,position,prediction\ntrain,10,1\n", "line 1"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "old.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=rf"`reference=.*{message}.*\nHINT: give a CSV file with the columns"):
        Predictions.read(tmp_path / "old.csv")


def test_samples_without_a_prediction_are_named(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("split,id,prediction\ntrain,10,1\n")
    with pytest.raises(ConfigurationError, match=r"1 of 2 samples of `train` have no prediction \(\[12\]\)"):
        Predictions.read(tmp_path / "old.csv").results(table([1, 1, 2], [0, 1, 2]))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Predictions.read(tmp_path / "old.csv")
