from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Multilabel

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [1.0, -3.0, -0.25], [0.0, -1.0, -1.0]])
LABELS = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0]])


def test_a_sample_passes_if_all_of_its_labels_are_right() -> None:
    task = Multilabel()
    assert task.margin(LOGITS, LABELS).tolist() == [-0.5, 0.25, 0.0]
    # A logit of exactly 0 is on neither side.
    assert task.passed(LOGITS, LABELS).tolist() == [False, True, False]
    assert task.prediction(LOGITS) is None
    assert task.label(LABELS) is None


def test_some_labels_may_be_wrong() -> None:
    task = Multilabel(wrong=1)
    assert task.margin(LOGITS, LABELS).tolist() == [1.0, 1.0, 1.0]
    assert task.passed(LOGITS, LABELS).tolist() == [True, True, True]


def test_the_threshold_is_a_probability() -> None:
    # 0.2 is a logit of ln(1/4) = -1.386294
    logits, labels = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 0]])
    torch.testing.assert_close(Multilabel(threshold=0.2).margin(logits, labels), torch.tensor([0.386294]))
    assert Multilabel(threshold=0.2).passed(logits, labels).tolist() == [True]
    assert Multilabel().passed(logits, labels).tolist() == [False]


def test_the_loss_is_the_mean_binary_cross_entropy_of_known_labels() -> None:
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[1, 0], [1, -100]])
    # (ln 2 + ln(1 + e)) / 2 and ln 2
    torch.testing.assert_close(Multilabel().loss(logits, labels), torch.tensor([1.003204, 0.693147]))
    assert Multilabel().margin(torch.tensor([[1.0, 5.0]]), torch.tensor([[1, -100]])).tolist() == [1.0]


def test_the_divergence_is_that_of_probabilities_from_the_teachers() -> None:
    # 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4), and nothing for the second label
    student, teacher = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    torch.testing.assert_close(Multilabel().divergence(student, teacher), torch.tensor([0.071921]))
    known = torch.tensor([[1, -100]])
    torch.testing.assert_close(Multilabel().divergence(student, teacher, known), torch.tensor([0.143841]))


def test_the_margin_leads_to_the_label_that_decides() -> None:
    logits = LOGITS.clone().requires_grad_()
    Multilabel().margin(logits, LABELS).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_labels_of_any_dtype_will_do(dtype: torch.dtype) -> None:
    labels = LABELS.to(dtype)
    Multilabel().check(LOGITS, labels)
    assert torch.equal(Multilabel().loss(LOGITS, labels), Multilabel().loss(LOGITS, LABELS))
    assert Multilabel().passed(LOGITS, labels).tolist() == [False, True, False]


def test_half_precision_is_judged_in_float32() -> None:
    assert Multilabel().loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32
    assert Multilabel().margin(LOGITS.half(), LABELS).tolist() == [-0.5, 0.25, 0.0]


def test_logits_that_are_not_numbers_never_pass() -> None:
    assert Multilabel().passed(torch.tensor([[torch.nan, 1.0]]), torch.tensor([[1, 1]])).tolist() == [False]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (LABELS[:, :2], r"labels of the shape of the logits, \[3, 3\], found torch.int64 \[3, 2\]"),
        (torch.tensor([0, 1, 1]), r"found torch.int64 \[3\]"),
        ([[1, 0, 0]] * 3, "found list"),
        (LABELS * 2, "found a label 2, neither 0 nor 1"),
        (LABELS * torch.nan, "found a label nan"),
        (LABELS * 0 - 100, "a sample has 0 known labels, so none need be right"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*HINT:"):
        Multilabel().check(LOGITS, target)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 2), (3, 0)])
def test_outputs_that_are_no_logits_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"multilabel needs logits \[samples, labels\]"):
        Multilabel().check(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"threshold": 1.0}, {"threshold": "0.5"}, {"wrong": -1}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"`Multilabel.{next(iter(wrong))}="):
        Multilabel(**wrong)


def test_it_says_what_right_means() -> None:
    assert str(Multilabel()) == "Multilabel: every label right"
    assert str(Multilabel(0.3, wrong=2)) == "Multilabel: all labels but 2 right at a threshold of 0.3"
