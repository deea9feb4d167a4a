"""The replaced model in every form: a module, its weights, its predictions."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from sample_tables import sample_table
from torch import Tensor, nn, tensor

from lightning_nrl.data.batch import TensorSource
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Multiclass, Task
from lightning_nrl.updates.old_model import OldModel, Reference, parse_reference
from lightning_nrl.updates.predictions import Predictions


class Scores(nn.Module):
    """Three classes; a sample is its own logits, turned by some classes."""

    def __init__(self, turn: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3).roll(turn, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Cast(Scores):
    """The same in any precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight))


X = torch.eye(3)
Y = tensor([0, 1, 1])


def source() -> TensorSource:
    return TensorSource(X, Y, split="train", passed=True, failed=True)


def asked(
    reference: Reference, model: nn.Module | None = None, task: Task | None = None
) -> SampleResults:
    evaluator = Evaluator(model or Scores().eval(), task or Multiclass())
    return reference.answers(evaluator, [source()], evaluator.run([source()]))


def test_a_state_is_that_of_the_time_when_it_was_given():
    model = Scores(turn=1)
    references = [
        OldModel(model.state_dict()),
        OldModel({"state_dict": model.state_dict(), "epoch": 3}),
    ]
    torch.nn.init.zeros_(model.weight)
    for reference in references:
        assert asked(reference).prediction.tolist() == [1, 2, 0]


def test_a_state_may_hold_what_cannot_be_copied():
    state = {**Scores(turn=1).state_dict(), "_extra_state": threading.Lock()}
    assert asked(OldModel(state)).prediction.tolist() == [1, 2, 0]


class Undefined(Scores):
    """Returns NaN for the first sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).index_fill(0, tensor([0]), torch.nan)


def test_an_old_model_is_not_right_where_it_returns_nan():
    assert asked(OldModel(Undefined())).passed.tolist() == [False, True, False]


class Other(nn.Module):
    """Another architecture, with two outputs, in training mode when it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)
        self.drop = nn.Dropout(0.9)
        self.layer.weight.data = tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layer(x))


def test_a_module_of_another_architecture_runs_as_deployed_and_is_left_as_found():
    old = Other().train()
    assert asked(OldModel(old)).passed.tolist() == [True, True, True]
    assert old.training
    assert old.drop.training


@pytest.mark.parametrize("adapter", [None, lambda batch: (batch[0][:, :2], batch[1])])
def test_an_old_model_with_other_inputs_is_told_how_to_get_them(adapter):
    old = OldModel(nn.Linear(2, 3), adapter)
    shown = (
        r"`reference`: (Linear|its `adapter`) raised (Runtime|Value)Error on (batch 0 of )?`train` "
        r"data[\s\S]*\[3, 3\]"
        r"[\s\S]*`reference=OldModel\(old, adapter=f\)`"
    )
    with pytest.raises(ConfigurationError, match=shown):
        asked(old)


@pytest.mark.parametrize("classes", [{0: 1, 1: 0}, (["a", "b"], ["b", "a", "c"])])
def test_classes_are_mapped_by_number_or_name(classes):
    answer = asked(OldModel(Other(), classes=classes))
    assert answer.prediction.tolist() == [1, 0, 0]
    assert answer.passed.tolist() == [False, False, False]


def test_a_class_that_the_new_model_lacks_is_never_right():
    answer = asked(OldModel(Other(), classes={0: 0}))
    assert answer.prediction.tolist() == [0, -1, -1]
    assert answer.passed.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [3, [1], OldModel, "nowhere.ckpt"])
def test_what_no_reference_is(value):
    with pytest.raises(ConfigurationError, match=r"`reference=.*\nHINT: "):
        parse_reference(value)


@pytest.mark.parametrize("classes", [{0: 1, 1: 1}, {"a": 0}, ["a", "b"], (["a"], ["b"]), {}, 3])
def test_what_no_mapping_of_classes_is(classes):
    with pytest.raises(ConfigurationError, match=r"`classes=.*\nHINT: write \{old number"):
        OldModel(Scores(), classes=classes)


def table(label: list[int], prediction: list[int]) -> SampleResults:
    """Two splits; positions in the data set are 10 and 12, then 0."""
    return sample_table(
        [True] * 3,
        {"train": 2, "repair": 1},
        index=tensor([10, 12, 0]),
        label=tensor(label),
        prediction=tensor(prediction),
    )


FILE = "split,id,prediction\ntrain,10,1\ntrain,12,0\nrepair,0,2\n"


def test_a_file_says_what_the_old_model_got_right(tmp_path):
    (tmp_path / "old.csv").write_text(FILE)
    predictions = Predictions.read(tmp_path / "old.csv")
    results = predictions.results(table([1, 1, 2], [0, 1, 2]))
    assert results.prediction.tolist() == [1, 0, 2]
    assert results.passed.tolist() == [True, False, True]
    assert results.loss.tolist() == [0.0, 1.0, 0.0]
    assert results.margin.isnan().all()
    with pytest.raises(ConfigurationError, match=r"has no classes.*\nHINT: add a column `passed`"):
        predictions.results(table([-1, -1, -1], [-1, -1, -1]))


@pytest.mark.parametrize(
    "change", ["row", "weights", "label", "split", "classes", "precision", "adapter"]
)
def test_a_cache_is_used_only_for_what_it_was_made_of(change, tmp_path):
    path, made = tmp_path / "old.csv", replace(source(), targets=tensor([0, 2, 1]))
    ask = partial(OldModel, Scores(turn=1), cache=path)

    def say(
        old: OldModel, data: TensorSource = made, new: nn.Module | None = None
    ) -> SampleResults:
        evaluator = Evaluator(new or Scores().eval(), Multiclass())
        return old.answers(evaluator, [data], evaluator.run([data]))

    first, text = say(ask()), path.read_text()
    assert say(ask()).prediction.tolist() == first.prediction.tolist() == [1, 2, 0]
    assert path.read_text() == text
    if change == "row":
        path.write_text(text.replace("train,1,2,1", "train,1,1,0"))
        assert say(ask()).passed.tolist() == first.passed.tolist()
        assert path.read_text() == text
        return
    {
        "weights": lambda: say(OldModel(Scores(turn=2), cache=path)),
        "label": lambda: say(ask(), source()),
        "split": lambda: say(ask(), replace(made, split="test")),
        "classes": lambda: say(ask(classes={0: 1, 1: 0})),
        "precision": lambda: say(OldModel(Cast(turn=1), cache=path), made, Cast().double()),
        "adapter": lambda: say(ask(adapter=lambda raw: ((raw[0],), {}, raw[1]))),
    }[change]()
    assert path.read_text() != text


def test_a_task_without_classes_needs_passed(tmp_path):
    (tmp_path / "old.csv").write_text("split,id,passed\ntrain,10,1\ntrain,12,0\nrepair,0,1\n")
    predictions = Predictions.read(tmp_path / "old.csv")
    results = predictions.results(table([-1, -1, -1], [-1, -1, -1]))
    assert results.passed.tolist() == [True, False, True]


def test_passed_may_not_contradict_the_labels(tmp_path):
    (tmp_path / "old.csv").write_text(
        "split,id,prediction,passed\ntrain,10,1,1\ntrain,12,0,1\nrepair,0,,0\n"
    )
    predictions = Predictions.read(tmp_path / "old.csv")
    by_class = table([1, 1, 2], [1, 1, 2])
    message = r"1 samples of `train` have a label that contradicts `passed` \(12\)"
    with pytest.raises(ConfigurationError, match=message):
        predictions.results(by_class)
    # A task that calls other predictions right, such as one of the top five.
    results = predictions.results(table([1, 1, 2], [0, 0, 2]))
    assert results.passed.tolist() == [True, True, False]


def test_samples_without_a_prediction_are_named(tmp_path):
    (tmp_path / "old.csv").write_text("split,id,prediction\ntrain,10,1\n")
    with pytest.raises(
        ConfigurationError, match=r"1 of 2 samples of `train` have no prediction \(\[12\]\)"
    ):
        Predictions.read(tmp_path / "old.csv").results(table([1, 1, 2], [0, 1, 2]))
