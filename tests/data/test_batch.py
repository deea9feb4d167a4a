from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.data.batch import Batch, Source, unpacked
from lightning_nrl.data.unpacking import INPUT_KEYS, TARGET_KEYS, unpack

X, Y, EXTRA = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([True, False])
Pair = namedtuple("Pair", "image digit")


@pytest.mark.parametrize("raw", [(X, Y), [X, Y], (X, Y, EXTRA), Pair(X, Y)])
def test_a_sequence_is_input_then_target_then_extras(raw: Any) -> None:
    args, kwargs, target = unpack(raw)
    assert len(args) == 1
    assert args[0] is X
    assert kwargs == {}
    assert target is Y


@pytest.mark.parametrize("target_key", TARGET_KEYS)
@pytest.mark.parametrize("input_key", INPUT_KEYS)
def test_a_mapping_with_usual_keys_is_one_input(input_key: str, target_key: str) -> None:
    args, kwargs, target = unpack({"id": 7, input_key: X, target_key: Y})
    assert args[0] is X
    assert kwargs == {}
    assert target is Y


def test_other_mappings_become_keyword_arguments_as_text_models_expect() -> None:
    raw = UserDict(input_ids=X, attention_mask=X > 0, labels=Y, text=["a", "b"])
    args, kwargs, target = unpack(raw)
    assert args == ()
    assert sorted(kwargs) == ["attention_mask", "input_ids"]
    assert target is Y


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (X, "a batch of type Tensor is neither"),
        ((X,), "a batch of type tuple is neither"),
        ("xy", "a batch of type str is neither"),
        ({"image": X, "class": Y}, r"the keys \['class', 'image'\] lacks a target key"),
        ({"label": Y, "text": ["a", "b"]}, "no tensor beside the target"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_way_out(raw: Any, found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`adapter`: .*{found}[\s\S]*HINT: pass `adapter=f`"):
        unpack(raw)


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
