"""One head of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Multiclass, Multilabel, NamedHead

LOGITS, OTHER = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 5)
LABELS = torch.tensor([1, 1])


@dataclass
class Heads:
    digit: Tensor
    colour: Tensor


@pytest.mark.parametrize(
    ("name", "output", "target"),
    [
        ("digit", {"digit": LOGITS, "colour": OTHER}, {"digit": LABELS, "colour": LABELS - 1}),
        ("digit", Heads(LOGITS, OTHER), LABELS),
        (1, (OTHER, LOGITS), (LABELS - 1, LABELS)),
        ("digit", {"digit": {"logits": LOGITS}}, LABELS),
    ],
)
def test_a_task_judges_the_head_as_it_would_judge_it_alone(name: Any, output: Any, target: Any) -> None:
    task, alone = NamedHead(name), Multiclass()
    logits = task.logits(output)
    assert logits is LOGITS
    task.check(logits, target)
    assert task.passed(logits, target).tolist() == [True, False]
    assert task.margin(logits, target).tolist() == [1.0, -2.0]
    assert task.label(target).tolist() == [1, 1]
    assert torch.equal(task.loss(logits, target), alone.loss(LOGITS, LABELS))
    assert torch.equal(task.passed_and_loss(logits, target, torch.tensor([2.0, 0.0]))[0], torch.tensor([False, False]))
    assert torch.equal(task.divergence(logits, LOGITS + 1, target), alone.divergence(LOGITS, LOGITS + 1))
    assert task.prediction(logits).tolist() == [1, 0]


def test_any_task_can_judge_a_head() -> None:
    task = NamedHead("tags", Multilabel())
    assert task.passed(LOGITS - 0.5, {"tags": torch.tensor([[0, 1], [0, 1]])}).tolist() == [True, False]
    assert task.prediction(LOGITS) is None
    assert "'tags'" in str(task)


def test_a_head_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigurationError, match=r"no part of the output[\s\S]*colour: float32 \[2, 5\]"):
        NamedHead("digit").logits({"colour": OTHER})
    with pytest.raises(ConfigurationError, match=r"NamedHead\.task"):
        NamedHead("digit", "multiclass")  # type: ignore[arg-type]
