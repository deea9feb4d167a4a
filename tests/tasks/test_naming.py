from __future__ import annotations

from typing import Any

import pytest

from lightning_nrl import ConfigurationError
from lightning_nrl import RegressionFreeRepair as Repair
from lightning_nrl.tasks import Multiclass, Multilabel, Regression, Segmentation, Sequence, parse_task


def test_names_stand_for_tasks_with_their_defaults() -> None:
    assert parse_task("multilabel") == Multilabel()
    assert parse_task("Segmentation") == Segmentation()
    assert Repair(task="sequence").repair.task == Sequence()
    assert type(parse_task(None)) is type(parse_task("multiclass")) is Multiclass
    given = Regression(tolerance=2.0)
    assert Repair(task=given).repair.task is given


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("regression", r"does not say enough.\nHINT: write Regression\(tolerance=0.1\)"),
        ("custom", "does not say enough"),
        ("multi-label", "did you mean 'multilabel'"),
        (Multilabel, "is no Task"),
        (3, "is no Task"),
    ],
)
def test_what_is_no_task_is_refused(task: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Repair(task=task)
