from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor

from lightning_nrl.data.tensor_source import TensorSource
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


X = torch.eye(3)
Y = tensor([0, 1, 1])


def source() -> TensorSource:
    return TensorSource(X, Y, split="train", passed=True, failed=True)


def asked(reference: Reference, model: nn.Module | None = None, task: Task | None = None) -> SampleResults:
    evaluator = Evaluator(model or Scores().eval(), task or Multiclass())
    return reference.answers(evaluator, [source()], evaluator.run([source()]))


def test_a_state_of_the_same_architecture_is_held_for_a_while() -> None:
    model = Scores().eval()
    answer = asked(OldModel(Scores(turn=1).state_dict()), model)
    assert answer.prediction.tolist() == [1, 2, 0]
    assert answer.passed.tolist() == [False, False, False]
    assert torch.equal(model.weight, torch.eye(3))


def test_a_state_is_that_of_the_time_when_it_was_given() -> None:
    model = Scores(turn=1)
    references = [OldModel(model.state_dict()), OldModel({"state_dict": model.state_dict(), "epoch": 3})]
    torch.nn.init.zeros_(model.weight)
    for reference in references:
        assert asked(reference).prediction.tolist() == [1, 2, 0]


def test_a_checkpoint_and_a_file_with_a_state_dict_say_the_same(tmp_path: Path) -> None:
    state = Scores(turn=2).state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.ckpt")
    for path in (tmp_path / "a.pt", str(tmp_path / "b.ckpt")):
        assert asked(OldModel(path)).prediction.tolist() == [2, 0, 1]


class Other(nn.Module):
    """Another architecture, with two outputs, in training mode when it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)
        self.drop = nn.Dropout(0.9)
        self.layer.weight.data = tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layer(x))


def test_a_module_of_another_architecture_runs_as_deployed_and_is_left_as_found() -> None:
    old = Other().train()
    assert asked(OldModel(old)).passed.tolist() == [True, True, True]
    assert old.training
    assert old.drop.training


@pytest.mark.parametrize("classes", [{0: 1, 1: 0}, (["a", "b"], ["b", "a", "c"]), (("a", "b"), ("b", "a", "c"))])
def test_classes_are_mapped_by_number_or_name(classes: Any) -> None:
    answer = asked(OldModel(Other(), classes=classes))
    assert answer.prediction.tolist() == [1, 0, 0]
    assert answer.passed.tolist() == [False, False, False]


def test_a_class_that_the_new_model_lacks_is_never_right() -> None:
    answer = asked(OldModel(Other(), classes={0: 0}))
    assert answer.prediction.tolist() == [0, -1, -1]
    assert answer.passed.tolist() == [True, False, False]


def test_other_inputs_come_through_an_adapter() -> None:
    def reversed_inputs(batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor], dict[str, Any], Tensor]:
        return (batch[0].flip(1),), {}, batch[1]

    assert asked(OldModel(Scores(), adapter=reversed_inputs)).prediction.tolist() == [2, 1, 0]


def test_predictions_are_cached(tmp_path: Path) -> None:
    class Counting(Scores):
        ran = 0

        def forward(self, x: Tensor) -> Tensor:
            self.ran += 1
            return super().forward(x)

    old, path = Counting(turn=1), tmp_path / "old.csv"
    first = asked(OldModel(old, cache=path))
    again = asked(OldModel(old, cache=path))
    assert old.ran == 1
    assert again.passed.tolist() == first.passed.tolist()
    assert again.prediction.tolist() == first.prediction.tolist() == [1, 2, 0]
    old.weight.data = torch.eye(3)
    assert asked(OldModel(old, cache=path)).prediction.tolist() == [0, 1, 2]
    assert old.ran == 2


def test_what_a_user_may_write(tmp_path: Path) -> None:
    Predictions({"train": {0: (1, None)}}).save(tmp_path / "old.csv")
    torch.save(Scores().state_dict(), tmp_path / "old.pt")
    assert parse_reference(None) is None
    assert isinstance(parse_reference(str(tmp_path / "old.csv")), Predictions)
    assert isinstance(parse_reference(tmp_path / "old.pt"), OldModel)
    assert isinstance(parse_reference(Scores()), OldModel)
    own = OldModel(Scores())
    assert parse_reference(own) is own


@pytest.mark.parametrize("value", [3, [1], OldModel, "nowhere.ckpt"])
def test_what_no_reference_is(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`reference=.*\nHINT: "):
        parse_reference(value)


@pytest.mark.parametrize("classes", [{0: 1, 1: 1}, {"a": 0}, ["a", "b"], (["a"], ["b"]), {}, 3])
def test_what_no_mapping_of_classes_is(classes: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`classes=.*\nHINT: write \{old number"):
        OldModel(Scores(), classes=classes)


def test_another_architecture_as_a_file_is_refused(tmp_path: Path) -> None:
    torch.save(Other().state_dict(), tmp_path / "old.pt")
    with pytest.raises(ConfigurationError, match=r"`reference` lacks 'weight'.*\nHINT: .*the module itself"):
        asked(OldModel(tmp_path / "old.pt"))
