"""When two results are the same, on a processor and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_nrl._utils.device import may_use_tf32
from lightning_nrl.search._scoring.replay_plan import same_values

PARTS = (
    (torch.backends, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    if hasattr(torch.backends, "fp32_precision")
    else ()  # of older versions of torch
)
"""The first is what others inherit, unless they have one of their own, as they do once `cudnn.flags` was used."""


@pytest.fixture
def precision() -> Iterator[None]:
    before = [part.fp32_precision for part in PARTS]
    yield
    for part, setting in zip(PARTS, before, strict=True):
        part.fp32_precision = setting


def test_results_differ_by_more_than_rounding_or_not() -> None:
    a = torch.tensor([1.0, 2.0, torch.nan])
    assert same_values(a, a + 1e-4)
    assert not same_values(a, a + 1e-3)
    assert not same_values(a, a.double())
    assert not same_values(a, a[:2])


@pytest.mark.skipif(not PARTS, reason="this version of torch has no `fp32_precision`")
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("setting", "expected"), [("tf32", True), ("ieee", False)])
def test_the_newer_setting_of_precision_is_understood(setting: str, expected: bool) -> None:
    for part in PARTS:
        part.fp32_precision = setting
    assert may_use_tf32() is expected
