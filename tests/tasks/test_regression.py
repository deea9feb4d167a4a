from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Regression

OUTPUT = torch.tensor([[1.25, 2.0], [1.0, 4.0], [1.5, 2.0]])
TARGET = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])


def test_a_sample_passes_if_every_output_is_closer_than_the_tolerance() -> None:
    task = Regression(tolerance=0.5)
    assert task.margin(OUTPUT, TARGET).tolist() == [0.5, -3.0, 0.0]
    assert task.passed(OUTPUT, TARGET).tolist() == [True, False, False]
    assert task.prediction(OUTPUT) is None
    assert task.label(TARGET) is None


def test_a_relative_tolerance_grows_with_the_size_of_the_target() -> None:
    # 0.5 + 0.25 * 6 = 2
    task, target = Regression(tolerance=0.5, relative=0.25), torch.tensor([-6.0])
    assert task.margin(torch.tensor([-7.0]), target).tolist() == [0.5]
    assert task.margin(torch.tensor([-3.0]), target).tolist() == [-0.5]


def test_the_loss_is_quadratic_within_the_tolerance_and_linear_beyond() -> None:
    # errors of 1/2 and 0, 0 and 4, 1 and 0 tolerances
    assert Regression(tolerance=0.5).loss(OUTPUT, TARGET).tolist() == [0.0625, 1.75, 0.25]


def test_the_divergence_is_the_mean_square_in_tolerances() -> None:
    assert Regression(tolerance=0.5).divergence(OUTPUT, TARGET).tolist() == [0.125, 8.0, 0.5]
    relative = Regression(tolerance=0.5, relative=0.25)
    assert relative.divergence(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([6.0])).tolist() == [1.0]


@pytest.mark.parametrize("output", [(3,), (3, 1)])
@pytest.mark.parametrize("target", [(3,), (3, 1)])
def test_a_column_and_a_list_of_numbers_are_the_same(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]).view(output), torch.tensor([1.0, 2.0, 4.0]).view(target)
    task = Regression(tolerance=0.5)
    task.check(one, other)
    assert task.margin(one, other).tolist() == [1.0, 1.0, -1.0]
    assert task.loss(one, other).shape == task.divergence(one, one).shape == (3,)


def test_whole_targets_and_half_precision_will_do() -> None:
    task, target = Regression(tolerance=1.0), torch.tensor([1, 2, 3])
    task.check(torch.tensor([1.0, 2.0, 3.0]), target)
    assert task.margin(torch.tensor([1.5, 2.0, 5.0]).bfloat16(), target).tolist() == [0.5, 1.0, -1.0]
    assert task.loss(torch.zeros(3).half(), target).dtype == torch.float32


def test_the_margin_leads_to_the_output_with_the_largest_error() -> None:
    output = OUTPUT.clone().requires_grad_()
    Regression(tolerance=0.5).margin(output, TARGET)[:2].sum().backward()
    assert output.grad is not None
    assert output.grad.tolist() == [[-2.0, 0.0], [0.0, -2.0], [0.0, 0.0]]


def test_outputs_that_are_not_numbers_never_pass() -> None:
    assert Regression(1.0).passed(torch.tensor([torch.nan, torch.inf]), torch.zeros(2)).tolist() == [False, False]


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3), r"outputs \[3, 2\] for targets \[3\]"),
        (torch.zeros(2, 3), torch.zeros(3, 2), r"outputs \[2, 3\] for targets \[3, 2\]"),
        (torch.zeros(3), [1.0, 2.0, 3.0], "tensor of numbers as target, found list"),
        (torch.zeros(2), torch.tensor([1.0, torch.nan]), "1 numbers of a batch's target are NaN"),
    ],
)
def test_targets_that_do_not_fit_are_refused(output: torch.Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*HINT:"):
        Regression(1.0).check(output, target)


@pytest.mark.parametrize("value", [0, -1.0, torch.inf, "0.1", True, None])
def test_a_tolerance_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`Regression.tolerance="):
        Regression(value)
    if value != 0:
        with pytest.raises(ConfigurationError, match=r"`Regression.relative="):
            Regression(1.0, relative=value)


def test_it_says_what_right_means() -> None:
    assert str(Regression(0.1)) == "Regression: every output within 0.1 of its target"
    assert str(Regression(5, 0.05)) == "Regression: every output within 5 + 0.05 of the target of its target"
