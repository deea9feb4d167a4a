"""What an error says of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import Tensor

from lightning_nrl.data.adapters import adapter_hint, describe

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])


@dataclass
class Record:
    signal: Tensor
    grade: Tensor


def test_the_structure_has_names_types_and_shapes() -> None:
    raw = {"signal": X, "meta": {"class": Y, "names": ["a", "b"]}, "ragged": [X[0]] * 9, "fold": 3}
    assert describe(raw).splitlines() == [
        "    batch: dict of 4",
        "      signal: float32 [2, 3]",
        "      meta: dict of 2",
        "        class: int64 [2]",
        "        names: list of 2",
        "          [0]: str of 1",
        "          [1]: str of 1",
        "      ragged: list of 9",
        "        [0]: float32 [3]",
        "        [1]: float32 [3]",
        "        [2]: float32 [3]",
        "      fold: 3",
    ]


def test_of_many_fields_the_first_are_shown() -> None:
    lines = describe({str(i): X for i in range(40)}).splitlines()
    assert len(lines) == 12
    assert lines[-1].endswith("... and 30 more")


@pytest.mark.parametrize(
    "raw",
    [
        {"signal": X, "meta": {"class": Y}},
        {"id": Y, "signal": X, "label": Y},
        (X, X, Y),
        Record(X, Y),
        Graphs(X, Y, Y),
        {"fold": 3},
    ],
)
def test_the_adapter_is_python_with_the_names_of_the_batch(raw: Any) -> None:
    code = adapter_hint(raw).partition("\n")[2]
    names: dict[str, Any] = {"INPUT": X, "TARGET": Y}
    exec("if True:\n" + code, names)
    (x,), kwargs, y = names["f"](raw)
    assert x is X
    assert y is Y
    assert kwargs == {}


def test_a_column_of_bools_is_not_taken_for_the_truth_where_there_are_whole_numbers() -> None:
    batch = {"chars": torch.zeros(4, 7), "kind": torch.arange(4), "greek": torch.ones(4, dtype=torch.bool)}
    assert "return args, kwargs, batch['kind']" in adapter_hint(batch)
