from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_nrl import ConfigurationError
from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.tasks import Multiclass, Task

LOGITS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])


class Named(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclass
class Output:
    prediction: Tensor
    attention: Tensor | None = None


def test_multiclass_passes_by_arg_max_and_loses_by_cross_entropy() -> None:
    task = Multiclass()
    assert task.prediction(LOGITS).tolist() == [0, 1, 0]
    assert task.passed(LOGITS, LABELS).tolist() == [True, False, False]
    # ln(1 + 1), ln(1 + e), ln(1 + e^2)
    torch.testing.assert_close(task.loss(LOGITS, LABELS), torch.tensor([0.693147, 1.313262, 2.126928]))


def test_the_margin_is_to_the_best_other_class_and_the_divergence_from_the_teacher() -> None:
    task, output = Multiclass(), torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0]], requires_grad=True)
    margin = task.margin(output, torch.tensor([0, 2]))
    assert margin.tolist() == [1.0, -3.0]
    margin.sum().backward()
    assert output.grad.tolist() == [[1.0, 0.0, -1.0], [0.0, -1.0, 1.0]]
    # 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4)
    student, teacher = torch.tensor([[0.75, 0.25]]).log(), torch.zeros(1, 2)
    torch.testing.assert_close(task.divergence(student, teacher), torch.tensor([0.143841]))


def test_a_margin_of_no_class_does_not_raise() -> None:
    assert Multiclass().margin(LOGITS, torch.tensor([0, -100, 1])).tolist() == [0.0, -1.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_whole_kind_will_do(dtype: torch.dtype) -> None:
    labels = LABELS.to(dtype)
    assert Multiclass().label(labels).dtype == torch.int64
    assert torch.equal(Multiclass().loss(LOGITS, labels), Multiclass().loss(LOGITS, LABELS))
    assert Multiclass().passed(LOGITS, labels).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    loss = Multiclass().loss(LOGITS.to(dtype), LABELS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, Multiclass().loss(LOGITS, LABELS))
    assert at_least_float32(LOGITS.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 4)])
def test_output_that_is_no_logits_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"multiclass needs logits \[samples, classes\]"):
        Multiclass().passed(torch.zeros(shape), LABELS)


@pytest.mark.parametrize(
    "target",
    [
        LABELS[:, None],
        LABELS.double(),
        LABELS[:, None].float(),
        torch.eye(2)[LABELS],
        torch.eye(2, dtype=torch.bool)[LABELS],
        torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.25, 0.75]]),
    ],
)
def test_labels_are_also_columns_floats_one_hot_and_soft(target: Tensor) -> None:
    Multiclass().check(LOGITS, target)
    assert Multiclass().label(target).tolist() == [0, 0, 1]
    assert Multiclass().passed(LOGITS, target).tolist() == [True, False, False]
    assert Multiclass().margin(LOGITS, target).tolist() == [0.0, -1.0, -2.0]


def test_the_loss_of_soft_labels_is_the_cross_entropy_with_all_of_them() -> None:
    soft = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.75]])
    # ln 2; ln(1 + 1 / e); ln(1 + e^2) - 2 / 4
    torch.testing.assert_close(Multiclass().loss(LOGITS, soft), torch.tensor([0.693147, 0.313262, 1.626928]))


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (torch.tensor([0.0, 0.5, 1.0]), "needs whole labels"),
        (torch.eye(3), "no probabilities of 2 classes"),
        (torch.tensor([[1, 1], [0, 1], [1, 0]]), "no probabilities of 2 classes"),
        (torch.zeros(6, dtype=torch.int64), "3 rows of logits for 6 targets"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(target: Tensor, found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        Multiclass().check(LOGITS, target)


@pytest.mark.parametrize("target", [LABELS[:, None, None], LABELS.cfloat(), torch.tensor(1), [0, 0, 1]])
def test_targets_that_are_no_labels_are_refused(target: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"multiclass needs whole labels \[samples\]"):
        Multiclass().label(target)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"logits": LOGITS},
        {"loss": torch.tensor(1.0), "out": LOGITS, "aux": LOGITS + 1},
        {"loss": torch.tensor(1.0), "scores": LOGITS},
        SimpleNamespace(logits=LOGITS),
        Named(LABELS, LOGITS),
        Output(LOGITS),
        (LOGITS, LABELS),
        (torch.tensor(1.0), LOGITS, LABELS),
        [LOGITS],
    ],
)
def test_logits_are_found_in_what_models_return(output: Any) -> None:
    assert Multiclass().logits(output) is LOGITS


@pytest.mark.parametrize(
    "output", [None, {"a": LOGITS, "b": LOGITS}, (), ("a",), (torch.tensor(1.0),), SimpleNamespace(logits=None)]
)
def test_output_without_logits_is_refused(output: Any) -> None:
    with pytest.raises(ConfigurationError, match="`task`: no tensor of logits"):
        Multiclass().logits(output)


def test_a_task_has_no_classes_unless_it_says_so() -> None:
    class Sign(Task):
        def passed(self, output: Tensor, target: Any) -> Tensor:
            return output.sign() == target.sign()

        def loss(self, output: Tensor, target: Any) -> Tensor:
            return (output - target).abs()

    assert Sign().prediction(LOGITS) is None
    assert Sign().label(LABELS) is None
