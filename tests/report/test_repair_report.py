"""A repair's report as data: JSON, checkpoints, settings, sums."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from test_stored_pages import REPAIRED, TRAIN

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import SearchReport, WeightChange
from lightning_nrl.report import RepairReport


def test_what_is_not_finite_is_null_and_comes_back_as_nan():
    search = SearchReport(3, "stopped", math.nan, -math.inf, {"best": [1.0, math.nan]}, 4, 9)
    odd = replace(REPAIRED, search=search, change=WeightChange(0, 4, 0.0, math.nan, 0.0))
    data = json.loads(odd.to_json())
    assert data["search"]["fitness"] is data["change"]["relative"] is None
    assert data["search"]["history"]["best"] == [1.0, None]
    back = RepairReport.from_json(odd.to_json())
    assert math.isnan(back.search.fitness)
    assert back.to_json() == odd.to_json()


def test_splits_of_a_role_are_added_up():
    assert REPAIRED.pooled("known").counts == TargetCounts(1460, 0, 23, 33, 30, 14)
    assert replace(REPAIRED, splits=(TRAIN,)).pooled("unseen") is None
    assert "Repaired: promise kept, better on unseen data; known 23 repaired, 0 broken" in repr(
        REPAIRED
    )


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00 %"),
        (1.0, "100.00 %"),
        (1e-6, "< 0.01 %"),
        (1 - 1e-6, "> 99.99 %"),
        (0.12345, "12.35 %"),
    ],
)
def test_percentages_never_round_a_sample_away(share, text):
    change = WeightChange(31, 640, 0.1, share, 0.1)
    assert f"({text} of the layers' norm)" in replace(REPAIRED, change=change).render(200)
