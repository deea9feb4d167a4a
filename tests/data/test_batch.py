"""Batches, and sources of tensors in memory."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Source, is_sliceable, unpacked
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", "image digit")


def test_a_source_is_known_by_what_it_has() -> None:
    assert isinstance(TensorSource(X, Y, split="train"), Source)
    assert not isinstance([(X, Y)], Source)


class Encoding(UserDict):
    """Moves itself, as those of tokenizers do."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({name: value.to(device) for name, value in self.items()})


MAPPED = {"x": X, "y": Y}


@pytest.mark.parametrize(
    "raw", [(X, Y), [X, Y, "name"], Pair(X, Y), MAPPED, UserDict(MAPPED), Encoding(MAPPED), ({"x": X}, Y)]
)
def test_raw_batches_are_moved_to_the_device(raw: Any) -> None:
    [(args, kwargs, target)] = unpacked([raw], unpack, torch.device("meta"))
    inputs = kwargs or args[0]
    assert (inputs["x"] if isinstance(inputs, dict) else inputs).is_meta
    assert target.is_meta


@pytest.mark.parametrize(
    ("inputs", "sliceable"),
    [
        ((X, Y), True),
        (((X, Y), {"mask": X, "mode": "train", "scale": torch.tensor(2.0)}), True),
        ([X[:1], X], False),
        ((X, torch.zeros(2, 7).T), False),
        ((X, object()), False),
        ((X, ["a", "b"]), False),
        ([[1.0], [2.0, 3.0]], False),
        (pack_sequence([X[0], X[1, :2]], enforce_sorted=False), False),
        ("a", False),
    ],
)
def test_samples_can_be_taken_from_inputs_that_count_them_everywhere(inputs: Any, sliceable: bool) -> None:
    assert is_sliceable(inputs, 2) is sliceable


FIVE = torch.arange(10.0).view(5, 2)
FIVE_LABELS = torch.tensor([0, 1, 0, 1, 0])
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
    (batch,) = TensorSource(FIVE, FIVE_LABELS, split="train", extras=(DARK,))
    inputs, targets, dark = batch.raw
    assert torch.equal(inputs, FIVE)
    assert torch.equal(targets, FIVE_LABELS)
    assert torch.equal(dark, DARK)
    source = TensorSource(FIVE, FIVE_LABELS, split="new", failed=True, extras=(DARK,), batch_size=2)
    evidence = Evaluator(nn.Identity()).run([source], Target.where(lambda batch: batch[2]), forward=lambda x: -x)
    assert evidence.ids(evidence.targeted) == {"new": [1]}


def test_a_tuple_of_inputs_is_given_by_position_and_a_mapping_by_name() -> None:
    (by_position,) = TensorSource((FIVE, DARK), FIVE_LABELS, split="train")
    assert [torch.equal(a, b) for a, b in zip(by_position.args, (FIVE, DARK), strict=True)] == [True, True]
    assert by_position.kwargs == {}
    (by_name,) = TensorSource({"x": FIVE, "mask": DARK}, FIVE_LABELS, split="train")
    assert by_name.args == ()
    assert torch.equal(by_name.kwargs["mask"], DARK)
    assert torch.equal(by_name.raw[0]["x"], FIVE)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"inputs": FIVE[:4]}, "`inputs` has 4 samples, `targets` has 5"),
        ({"inputs": (FIVE, FIVE[:3])}, r"`inputs\[1\]` has 3 samples"),
        ({"inputs": {"x": FIVE[:3]}}, r"`inputs\['x'\]` has 3 samples"),
        ({"extras": (DARK[:1],)}, r"`extras\[0\]` has 1 samples"),
        ({"inputs": FIVE.numpy()}, "`inputs` is a ndarray, not a tensor"),
        ({"targets": [0, 1, 0, 1, 0]}, "`targets` is a list"),
        ({"targets": torch.tensor(1)}, "`targets` is a tensor without dimensions"),
        ({"batch_size": 0}, "`batch_size=0`"),
        ({"batch_size": True}, "`batch_size=True`"),
    ],
)
def test_what_are_no_samples_is_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT"):
        TensorSource(**{"inputs": FIVE, "targets": FIVE_LABELS, "split": "train", **arguments})
