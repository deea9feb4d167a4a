from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import metrics as F
from lightning_nrl.evaluation.metrics import NegativeFlipRate

# Five kept, two broken, three repaired, one failing.
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
OLD = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 2])
NEW = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 0, 0])
DENSE = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]])
NAN = torch.tensor([[float("nan"), 0.0], [2.0, float("nan")], [0.0, 1.0]])
Rate = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits(classes: Tensor, n_classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(classes, n_classes).float().movedim(-1, 1) - 0.5


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (F.negative_flip_rate, 2 / 11),
        (F.positive_flip_rate, 3 / 11),
        (F.negative_flip_impact, 2 / 3),
        (F.relative_negative_flip_rate, (2 / 11) / (7 / 11 * 3 / 11)),
        (F.backward_trust_compatibility, 5 / 7),
        (F.backward_error_compatibility, 1 / 3),
        (F.repair_rate, 3 / 4),
        (F.break_rate, 2 / 7),
    ],
)
def test_every_rate_follows_its_formula(rate: Rate, expected: float) -> None:
    assert rate(OLD, NEW, TARGET).item() == pytest.approx(expected)
    assert rate(logits(OLD), logits(NEW), TARGET).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("old", "new", "target", "counts"),
    [
        (OLD, NEW, TARGET, [5, 2, 3, 1]),
        (logits(OLD), logits(NEW, 7), TARGET, [5, 2, 3, 1]),  # models that know different numbers of classes
        (DENSE[0], DENSE[1], DENSE[2], [1, 1, 1, 1]),
        (logits(DENSE[0]), logits(DENSE[1]), DENSE[2], [1, 1, 1, 1]),
        # NaN logits are wrong even where argmax hits the target.
        (torch.tensor([0, 1, 0]), NAN, torch.tensor([0, 1, 1]), [0, 2, 1, 0]),
    ],
)
def test_kept_broken_repaired_and_failing_are_counted(
    old: Tensor, new: Tensor, target: Tensor, counts: list[int]
) -> None:
    metric = NegativeFlipRate()
    metric.update(old, new, target)
    assert metric.flips.tolist() == counts


@pytest.mark.parametrize(
    ("rate", "without_samples", "old_all_wrong", "new_all_right"),
    [
        (F.negative_flip_rate, math.nan, 0.0, 0.0),
        (F.positive_flip_rate, math.nan, 0.0, 0.5),
        (F.negative_flip_impact, math.nan, 0.0, math.nan),
        (F.relative_negative_flip_rate, math.nan, math.nan, math.nan),
        (F.backward_trust_compatibility, 1.0, 1.0, 1.0),
        (F.backward_error_compatibility, math.nan, 1.0, math.nan),
        (F.repair_rate, math.nan, 0.0, 1.0),
        (F.break_rate, math.nan, math.nan, 0.0),
    ],
)
def test_what_is_undefined_is_nan(
    rate: Rate, without_samples: float, old_all_wrong: float, new_all_right: float
) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert rate(empty, empty, empty).item() == pytest.approx(without_samples, nan_ok=True)
    right, wrong, half = torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([1, 0])
    assert rate(wrong, wrong, right).item() == pytest.approx(old_all_wrong, nan_ok=True)
    assert rate(half, right, right).item() == pytest.approx(new_all_right, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_rates_agree_with_each_other(rows: list[tuple[int, int, int]]) -> None:
    old, new, target = torch.tensor(rows).unbind(1)
    error_old = (old != target).double().mean().item()
    error_new = (new != target).double().mean().item()
    nfr, pfr = F.negative_flip_rate(old, new, target).item(), F.positive_flip_rate(old, new, target).item()
    assert error_old - error_new == pytest.approx(pfr - nfr, abs=1e-6)
    if error_new > 0:
        total = F.negative_flip_impact(old, new, target) + F.backward_error_compatibility(old, new, target)
        assert total.item() == pytest.approx(1.0)
        assert F.negative_flip_impact(old, new, target).item() == pytest.approx(nfr / error_new, abs=1e-6)
    if error_old < 1:
        broken = 1 - F.backward_trust_compatibility(old, new, target)
        assert broken.item() == pytest.approx(F.break_rate(old, new, target).item(), abs=1e-6)


def test_flip_rates_names_the_functions_and_takes_many_counts_at_once() -> None:
    rates = F.flip_rates(torch.tensor([[5, 2, 3, 1], [1, 0, 0, 0]], dtype=torch.float64))
    assert set(rates) == {name for name in F.__all__ if name.islower()} - {"flip_rates"}
    assert rates["negative_flip_rate"].tolist() == [2 / 11, 0.0]
    assert rates["repair_rate"][0].item() == 0.75
    assert rates["repair_rate"][1].isnan()


def test_counts_above_float32_precision_are_not_rounded_before_they_are_added() -> None:
    many = torch.tensor([2**24 + 1, 2**24 + 1, 0, 0])
    assert F.flip_rates(many)["negative_flip_rate"].item() == 0.5


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"`old_preds`: torch.int64 \[3\]"),
        (torch.rand(11), r"`old_preds`: torch.float32 \[11\] does not fit a `target` of \[11\]"),
        (torch.rand(10, 3), r"`old_preds`: torch.float32 \[10, 3\]"),
        (
            torch.zeros(11, 3, dtype=torch.int64),
            r"HINT: give classes as integers in the shape of the target, or logits",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(old: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        F.negative_flip_rate(old, NEW, TARGET)
    with pytest.raises(ConfigurationError, match=message.replace("old_preds", "new_preds")):
        F.negative_flip_rate(OLD, old, TARGET)
