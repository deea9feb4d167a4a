"""What the default adapter makes of batches, what errors say of them, and adapters that run the model."""

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
from lightning_nrl.data.adapters import (
    INPUT_KEYS,
    TARGET_KEYS,
    ModelAdapter,
    adapter_hint,
    as_adapter,
    bind_adapter,
    describe,
    unpack,
)
from lightning_nrl.data.batch import run_model

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
    (x,), kwargs, target = unpack(raw)
    assert (x is X, kwargs, target is Y) == (True, {}, True)


@pytest.mark.parametrize("target_key", TARGET_KEYS)
@pytest.mark.parametrize("input_key", INPUT_KEYS)
def test_a_mapping_with_usual_keys_is_one_input(input_key: str, target_key: str) -> None:
    (x,), kwargs, target = unpack({"id": 7, input_key: X, target_key: Y})
    assert (x is X, kwargs, target is Y) == (True, {}, True)


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
        (TEXT, lambda self, *a, **k: 0, (), {"input_ids": A, "attention_mask": B}),
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


@dataclass
class Graded:
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


@pytest.mark.parametrize(
    "raw",
    [
        {"signal": X, "meta": {"class": Y}},
        {"id": Y, "signal": X, "label": Y},
        (X, X, Y),
        Graded(X, Y),
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


def halved(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return module(x / 2), y


def test_an_adapter_of_two_parameters_runs_the_module() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 0])
    args, kwargs, target = bind_adapter(halved, model)((x, y))
    assert target is y
    output = run_model(model, args, kwargs)
    assert torch.equal(output, model(x / 2))
    assert output.requires_grad
    assert torch.equal(run_model(other, args, kwargs), other(x / 2))


def test_it_gives_no_inputs_without_a_module() -> None:
    with pytest.raises(ConfigurationError, match=r"f\(module, batch\) -> \(logits, target\) cannot be used here"):
        as_adapter(halved)((torch.ones(3, 2), torch.zeros(3)))


@pytest.mark.parametrize(
    ("function", "runs"), [(halved, True), (lambda batch: batch, False), (lambda batch, size=2: batch, False)]
)
def test_an_adapter_is_known_by_its_required_parameters(function: Any, runs: bool) -> None:
    assert isinstance(as_adapter(function), ModelAdapter) is runs
