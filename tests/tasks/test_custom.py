from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Custom

OUTPUT, TARGET = torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[1.0, 2.25], [0.0, 2.0]])


def near(output: Tensor, target: Tensor) -> Tensor:
    return far(output, target) < 0.5


def far(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().amax(1)


def spare(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 - far(output, target)


def test_functions_say_what_passed_and_loss_mean() -> None:
    task = Custom(passed=near, loss=far, margin=spare)
    task.check(OUTPUT, TARGET)
    assert task.passed(OUTPUT, TARGET).tolist() == [True, False]
    assert task.loss(OUTPUT, TARGET).tolist() == [0.25, 3.0]
    margin = task.margin(OUTPUT, TARGET)
    assert margin is not None
    assert margin.tolist() == [0.25, -2.5]
    assert task.divergence(OUTPUT, TARGET).tolist() == [0.03125, 4.5]
    assert task.loss(OUTPUT.half(), TARGET.half()).dtype == torch.float32


def test_without_a_margin_there_is_none() -> None:
    assert Custom(near, far).margin(OUTPUT, TARGET) is None


def test_addresses_will_do() -> None:
    task = Custom("test_custom:near", "test_custom.far", "test_custom:spare")
    assert task.passed(OUTPUT, TARGET).tolist() == [True, False]
    assert str(task) == "Custom: passed by test_custom:near"
    assert repr(task) == "Custom(passed='test_custom:near', loss='test_custom.far', margin='test_custom:spare')"
    assert repr(Custom(near, far)) == "Custom(passed='test_custom:near', loss='test_custom:far')"


@pytest.mark.parametrize("wrong", [{"passed": "nowhere:f"}, {"loss": 3}, {"margin": "test_custom:missing"}])
def test_what_is_no_function_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"`Custom.{next(iter(wrong))}"):
        Custom(**{"passed": near, "loss": far, **wrong})


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"passed": lambda o, t: o[:, :3] == t[:, :1, :1]}, "`Custom.passed` raised IndexError"),
        ({"passed": lambda o, t: o == t}, r"`Custom.passed` returned torch.bool \[2, 2\] for a batch of 2 samples"),
        ({"passed": lambda o, t: [True, False]}, "`Custom.passed` returned list"),
        ({"passed": lambda o, t: far(o, t)}, "`Custom.passed` returned torch.float32"),
        ({"loss": lambda o, t: far(o, t).mean()}, r"`Custom.loss` returned torch.float32 \[\] for a batch"),
        ({"margin": far}, "`Custom.margin` gave 3 for a sample that did not pass"),
        ({"margin": lambda o, t: -spare(o, t)}, r"`Custom.margin` gave -0.25 for a sample that passed \(2 such"),
    ],
)
def test_functions_that_do_not_fit_are_refused(functions: dict[str, Any], message: str) -> None:
    task = Custom(**{"passed": near, "loss": far, "margin": spare, **functions})
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*HINT:"):
        task.check(OUTPUT, TARGET)
