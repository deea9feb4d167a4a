"""When two results are the same, on a processor and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_nrl._scoring.plan_search import may_use_tf32, same_values


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


def test_results_differ_by_more_than_rounding_or_not() -> None:
    a = torch.tensor([1.0, 2.0, torch.nan])
    assert same_values(a, a + 1e-4)
    assert not same_values(a, a + 1e-3)
    assert not same_values(a, a.double())
    assert not same_values(a, a[:2])


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("setting", "expected"), [("tf32", True), ("ieee", False)])
def test_the_newer_setting_of_precision_is_understood(setting: str, expected: bool) -> None:
    torch.backends.fp32_precision = setting
    assert may_use_tf32() is expected
