"""What the default adapter makes of batches as they come."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import Tensor, nn

from lightning_nrl import ConfigurationError
from lightning_nrl.data.adapters import INPUT_KEYS, TARGET_KEYS, ForwardSignature, bind_adapter, unpack

X, Y, EXTRA = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([True, False])
A, B = torch.zeros(2, 4), torch.ones(2, 5)
GRAPHS = Graphs(torch.zeros(5, 3), torch.tensor([0, 0, 1, 1, 1]), Y)
Pair = namedtuple("Pair", "image digit")
Points = namedtuple("Points", "graph V_d Y")


@dataclass
class Record:
    image: Tensor
    label: Tensor


def module_of(forward: Callable[..., Any]) -> nn.Module:
    return type("Own", (nn.Module,), {"forward": forward})()


def taken(raw: Any, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], Mapping[str, Any], Any]:
    return bind_adapter(unpack, module_of(forward))(raw)


@pytest.mark.parametrize("raw", [(X, Y), [X, Y], (X, Y, EXTRA), Pair(X, Y), (X, {"labels": Y})])
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


TEXT = UserDict(input_ids=A, attention_mask=B, labels=Y)
TABLE = {"continuous": A, "categorical": B, "target": Y}


@pytest.mark.parametrize(
    ("raw", "forward", "args", "kwargs"),
    [
        ({"image": X, "depth": A, "label": Y}, lambda self, image, depth=None: 0, (), {"image": X, "depth": A}),
        ({"image": X, "depth": A, "label": Y}, lambda self, x, features=False: 0, (X,), {}),
        ({"signal": X, "label": Y}, lambda self, x: 0, (X,), {}),
        ({"pixel_values": X, "labels": Y}, lambda self, **inputs: 0, (), {"pixel_values": X}),
        (TEXT, lambda self, **inputs: 0, (), {"input_ids": A, "attention_mask": B}),
        (TEXT, lambda self, input_ids, labels: 0, (), {"input_ids": A, "labels": Y}),
        (TEXT, lambda self, batch: 0, (TEXT,), {}),
        (TABLE, lambda self, x: 0, (TABLE,), {}),
        ({"inputs": {"a": A, "b": B}, "targets": Y}, lambda self, a, b: 0, (), {"a": A, "b": B}),
        ({"inputs": {"a": A, "b": B}, "targets": {"y": Y}}, lambda self, x: 0, ({"a": A, "b": B},), {}),
        ({"batch": {"x": X, "y": Y}}, lambda self, x: 0, (X,), {}),
        ({"batch": (X, Y)}, lambda self, x: 0, (X,), {}),
        (Record(X, Y), lambda self, x: 0, (X,), {}),
        (Points(X, None, Y), lambda self, graph, V_d=None: 0, (), {"graph": X, "V_d": None}),
        (((A, B), Y), lambda self, a, b: 0, (A, B), {}),
        (((A, B), Y), lambda self, pair: 0, ((A, B),), {}),
        ((A, B, Y), lambda self, a, b: 0, (A, B), {}),
        (({"a": A, "b": B}, Y), lambda self, a, b=None: 0, (), {"a": A, "b": B}),
        (GRAPHS, lambda self, data: 0, (GRAPHS,), {}),
        (GRAPHS, lambda self, batch: 0, (GRAPHS,), {}),
        (GRAPHS, lambda self, x, batch: 0, (), {"x": GRAPHS.x, "batch": GRAPHS.batch}),
    ],
)
def test_forward_gets_what_it_takes(raw: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
    found = taken(raw, forward)
    assert len(found[0]) == len(args)
    assert all(a is b or (type(a) is type(b) and a == b) for a, b in zip(found[0], args, strict=True))
    assert found[1].keys() == kwargs.keys()
    assert all(found[1][name] is kwargs[name] for name in kwargs)
    assert found[2] is Y


def test_a_parameter_that_is_annotated_as_a_mapping_gets_the_whole_batch() -> None:
    raw = {"image": X, "label": Y}

    def forward(self: nn.Module, x: dict[str, Tensor]) -> None: ...

    assert taken(raw, forward)[0] == (raw,)


def test_a_module_that_takes_anything_says_nothing() -> None:
    assert ForwardSignature.of(module_of(lambda self, *args, **kwargs: 0)) is None


def test_an_adapter_of_the_users_own_stays_as_it_is() -> None:
    def own(batch: Any) -> Any:
        return (batch,), {}, Y

    assert bind_adapter(own, module_of(lambda self, x: 0)) is own


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
