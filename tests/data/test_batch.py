from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_nrl import TensorSource
from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Batch, Source, is_sliceable, unpacked

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", "image digit")


def test_a_batch_is_as_long_as_it_has_positions() -> None:
    assert len(Batch((X,), Y, torch.tensor([4, 5]))) == 2


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
