from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Multiclass, Task
from lightning_nrl.updates import Predictions
from lightning_nrl.updates.loss_terms import ModelTeacher, PredictedTeacher

TASK = Multiclass()
X = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
Y = torch.tensor([0, 1])


class Counted(nn.Module):
    """Returns its inputs, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale


def ids(batch: Any) -> Any:
    return batch[2]


def asked(teacher: Any, x: Tensor = X, y: Tensor = Y, where: Any = (0, 1)) -> Any:
    return teacher((x,), {}, y, (x, y, torch.tensor(where)), x)


def test_it_says_what_the_old_model_says() -> None:
    found = asked(ModelTeacher(Counted(), TASK))
    assert found.passed.tolist() == [True, False]
    assert found.output.tolist() == X.tolist()
    assert found.margin.tolist() == [1.0, -2.0]
    assert not found.output.requires_grad


def test_with_an_index_each_sample_is_asked_about_once() -> None:
    model = Counted()
    teacher = ModelTeacher(model, TASK, index=ids)
    asked(teacher, where=[5, 2])
    assert model.calls == 1
    # The first samples that come back are run again, to see whether they are the same; from then on none is.
    for _ in range(3):
        found = asked(teacher, X.flip(0), Y.flip(0), [2, 5])
        assert found.output.tolist() == X.flip(0).tolist()
    assert model.calls == 2
    asked(teacher, where=[5, 40])
    assert model.calls == 3
    assert asked(teacher, where=[40, 5]).output.tolist() == X.flip(0).tolist()
    assert model.calls == 3


def test_samples_that_come_back_changed_are_asked_about_each_time() -> None:
    model = Counted()
    teacher = ModelTeacher(model, TASK, index=ids)
    asked(teacher)
    with pytest.warns(UserWarning, match="samples come back changed"):
        assert asked(teacher, 2 * X).output.tolist() == (2 * X).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(teacher, 3 * X).output.tolist() == (3 * X).tolist()


def test_what_there_is_no_room_for_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_nrl.evaluation.logit_cache.MAX_CACHED_BYTES", 3 * 4 * 10)  # ten rows of three floats
    model = Counted()
    teacher = ModelTeacher(model, TASK, index=ids)
    for _ in range(4):
        asked(teacher)
    assert model.calls == 2
    for _ in range(2):
        asked(teacher, where=[0, 11])
    assert model.calls == 4


def test_inputs_and_precision_of_its_own() -> None:
    teacher = ModelTeacher(Counted().double(), TASK, adapter=lambda batch: ((batch[0].flip(1),), {}, None))
    found = asked(teacher)
    assert found.output.dtype == torch.float64
    assert found.output.tolist() == X.flip(1).tolist()


def test_classes_in_another_order_and_classes_that_only_one_model_has() -> None:
    # Old classes 0, 1, 2 are the new ones 2, none and 0; the new class 1 is unknown to the old model.
    teacher = ModelTeacher(Counted(), TASK, classes={0: 2, 2: 0})
    y, new = torch.tensor([2, 1]), torch.zeros(2, 3)
    found = teacher((X,), {}, y, None, new)
    assert dict(zip(found.columns.tolist(), found.output[0].tolist(), strict=True)) == {2: 2.0, 0: 1.0}
    assert found.passed.tolist() == [True, False]
    assert found.margin.tolist() == [1.0, -math.inf]
    # The class that only the old model has wins: wrong, whatever the label is.
    x = torch.tensor([[0.0, 9.0, 1.0]])
    found = teacher((x,), {}, torch.tensor([0]), None, new[:1])
    assert found.passed.tolist() == [False]
    assert found.margin.tolist() == [-8.0]


def test_predictions_say_what_was_right() -> None:
    teacher = PredictedTeacher(Predictions({"train": {3: (0, None), 7: (2, None)}}), "train", TASK, ids)
    found = asked(teacher, where=[3, 7])
    assert found.passed.tolist() == [True, False]
    assert found.output is None
    assert found.margin is None
    with pytest.raises(ConfigurationError, match=r"no prediction for the samples \[4, 90\] of `train`"):
        asked(teacher, where=[4, 90])
    with pytest.raises(ConfigurationError, match=r"no predictions of `train`; there are those of `val`"):
        PredictedTeacher(Predictions({"val": {0: (0, None)}}), "train", TASK, ids)


class Near(Task):
    def passed(self, output: Tensor, target: Any) -> Tensor:
        return (output[:, 0] - target).abs() < 1

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return (output[:, 0] - target).abs()


def test_predictions_of_tasks_without_classes_say_themselves_what_passed() -> None:
    teacher = PredictedTeacher(Predictions({"train": {0: (-1, True), 1: (-1, False)}}), "train", Near(), ids)
    assert asked(teacher).passed.tolist() == [True, False]
    teacher = PredictedTeacher(Predictions({"train": {0: (1, None), 1: (1, None)}}), "train", Near(), ids)
    with pytest.raises(ConfigurationError, match="no column `passed`"):
        asked(teacher)
    with pytest.raises(ConfigurationError, match="`classes` maps classes, `task` is Near"):
        ModelTeacher(Counted(), Near(), classes={0: 0})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda batch: batch[3], "`index` raised IndexError"),
        (lambda batch: batch[2].float(), r"`index` returned torch.float32 \[2\] for a batch of 2 samples"),
        (lambda batch: batch[2][:1], r"`index` returned torch.int64 \[1\]"),
        (lambda batch: -batch[2], "whole number from 0"),
    ],
)
def test_an_index_that_is_none_is_refused(index: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asked(ModelTeacher(Counted(), TASK, index=index))


def test_another_number_of_samples_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the old model raised TypeError on a batch .*\nHINT: give it inputs"):
        ModelTeacher(Counted(), TASK)((), {}, Y, (X, Y), X)
    with pytest.raises(ConfigurationError, match=r"returned \[2, 3\] for a batch of 1 samples"):
        ModelTeacher(Counted(), TASK)((X,), {}, Y[:1], None, X[:1])
