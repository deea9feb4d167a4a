from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator

X = torch.arange(10.0).view(5, 2)
Y = torch.tensor([0, 1, 0, 1, 0])
DARK = torch.tensor([True, True, False, False, True])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 30), batch_size=st.integers(1, 35))
def test_batches_go_through_all_samples_in_order(n: int, batch_size: int) -> None:
    x, y = torch.arange(2.0 * n).view(n, 2), torch.arange(n)
    source = TensorSource(x, y, split="train", batch_size=batch_size)
    for _ in range(2):
        batches = list(source)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert sum(len(batch) for batch in batches) == n == len(source)
        if n:
            assert torch.equal(torch.cat([batch.args[0] for batch in batches]), x)
            assert torch.equal(torch.cat([batch.target for batch in batches]), y)
            assert torch.equal(torch.cat([batch.position for batch in batches]), source.index)


def test_a_predicate_sees_inputs_targets_and_extras() -> None:
    (batch,) = TensorSource(X, Y, split="train", extras=(DARK,))
    inputs, targets, dark = batch.raw
    assert torch.equal(inputs, X)
    assert torch.equal(targets, Y)
    assert torch.equal(dark, DARK)
    source = TensorSource(X, Y, split="new", failed=True, extras=(DARK,), batch_size=2)
    evidence = Evaluator(nn.Identity()).run([source], Target.where(lambda batch: batch[2]), forward=lambda x: -x)
    assert evidence.ids(evidence.targeted) == {"new": [1]}


def test_a_tuple_of_inputs_is_given_by_position_and_a_mapping_by_name() -> None:
    (by_position,) = TensorSource((X, DARK), Y, split="train")
    assert [torch.equal(a, b) for a, b in zip(by_position.args, (X, DARK), strict=True)] == [True, True]
    assert by_position.kwargs == {}
    (by_name,) = TensorSource({"x": X, "mask": DARK}, Y, split="train")
    assert by_name.args == ()
    assert torch.equal(by_name.kwargs["mask"], DARK)
    assert torch.equal(by_name.raw[0]["x"], X)


def test_batches_are_moved_to_the_device() -> None:
    (batch,) = TensorSource(X, Y, split="train", extras=(DARK,), device="meta")
    assert {t.device.type for t in (*batch.args, batch.target, batch.raw[2])} == {"meta"}
    assert batch.position.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"inputs": X[:4]}, "`inputs` has 4 samples, `targets` has 5"),
        ({"inputs": (X, X[:3])}, r"`inputs\[1\]` has 3 samples"),
        ({"inputs": {"x": X[:3]}}, r"`inputs\['x'\]` has 3 samples"),
        ({"extras": (DARK[:1],)}, r"`extras\[0\]` has 1 samples"),
        ({"inputs": X.numpy()}, "`inputs` is a ndarray, not a tensor"),
        ({"targets": [0, 1, 0, 1, 0]}, "`targets` is a list"),
        ({"targets": torch.tensor(1)}, "`targets` is a tensor without dimensions"),
        ({"batch_size": 0}, "`batch_size=0`"),
        ({"batch_size": True}, "`batch_size=True`"),
    ],
)
def test_what_are_no_samples_is_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT"):
        TensorSource(**{"inputs": X, "targets": Y, "split": "train", **arguments})
