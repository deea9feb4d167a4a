"""Batches, sources of tensors in memory, and what adapters make of raw batches."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.data.adapters import (
    INPUT_KEYS,
    TARGET_KEYS,
    adapter_hint,
    bind_adapter,
    describe,
    unpack,
)
from lightning_nrl.data.batch import is_sliceable, run_model, unpacked

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", "image digit")


class Encoding(UserDict):
    """Moves itself, as those of tokenizers do."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({name: value.to(device) for name, value in self.items()})


MAPPED = {"x": X, "y": Y}


@pytest.mark.parametrize(
    "raw",
    [(X, Y), [X, Y, "name"], Pair(X, Y), MAPPED, UserDict(MAPPED), Encoding(MAPPED), ({"x": X}, Y)],
)
def test_raw_batches_are_moved_to_the_device(raw):
    [(args, kwargs, target)] = unpacked([raw], unpack, torch.device("meta"))
    inputs = kwargs or args[0]
    assert (inputs["x"] if isinstance(inputs, dict) else inputs).is_meta
    assert target.is_meta


class WithMetadata(Tensor):
    pass


def test_tensors_lose_their_metadata_but_not_their_layout():
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    raw = [X.as_subclass(WithMetadata)], nested
    [(((x,),), _, target)] = unpacked([raw], unpack, torch.device("cpu"))
    assert type(x) is Tensor
    assert type(target) is type(nested)


@pytest.mark.parametrize(
    ("inputs", "sliceable"),
    [
        ((X, Y), True),
        (((X, Y), {"mask": X, "mode": "train", "scale": torch.tensor(2.0)}), True),
        ((X, torch.zeros(2, 7).T), False),
        ((X, object()), False),
        ((X, ["a", "b"]), False),
        ([[1.0], [2.0, 3.0]], False),
        (pack_sequence([X[0], X[1, :2]], enforce_sorted=False), False),
        ("a", False),
    ],
)
def test_samples_can_be_taken_from_inputs_that_count_them_everywhere(inputs, sliceable):
    assert is_sliceable(inputs, 2) is sliceable


FIVE = torch.arange(10.0).view(5, 2)
FIVE_LABELS = torch.tensor([0, 1, 0, 1, 0])
DARK = torch.tensor([True, True, False, False, True])


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_batches_go_through_all_samples_in_order(n, sizes):
    x, y = torch.arange(2.0 * n).view(n, 2), torch.arange(n)
    source = TensorSource(x, y, split="train", batch_size=4)
    for _ in range(2):
        assert list(map(len, source)) == sizes
        for batch in source:
            assert torch.equal(batch.args[0], x[batch.position])
            assert torch.equal(batch.target, batch.position)


def test_a_forward_that_works_in_place_leaves_the_tensors_alone():
    x = torch.arange(6.0)[:, None]
    source = TensorSource(x, torch.arange(6), split="train", batch_size=4)
    for batch in (*source, *source.draw([torch.arange(6)])):
        batch.args[0].mul_(2)
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_tuple_of_inputs_is_given_by_position_and_a_mapping_by_name():
    (by_position,) = TensorSource((FIVE, DARK), FIVE_LABELS, split="train")
    assert all(map(torch.equal, by_position.args, (FIVE, DARK)))
    (by_name,) = TensorSource({"x": FIVE, "mask": DARK}, FIVE_LABELS, split="train")
    assert by_name.args == ()
    assert torch.equal(by_name.kwargs["mask"], DARK)
    assert torch.equal(by_name.raw[0]["x"], FIVE)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"inputs": FIVE[:4]}, "`inputs` has 4 samples, `targets` has 5"),
        ({"inputs": (FIVE, FIVE[:3])}, r"`inputs\[1\]` has 3 samples"),
        ({"inputs": {"x": FIVE[:3]}}, r"`inputs\['x'\]` has 3 samples"),
        ({"extras": (DARK[:1],)}, r"`extras\[0\]` has 1 samples"),
        ({"inputs": FIVE.numpy()}, "`inputs` is a ndarray, not a tensor"),
        ({"targets": [0, 1, 0, 1, 0]}, "`targets` is a list"),
        ({"targets": torch.tensor(1)}, "`targets` is a tensor without dimensions"),
        ({"batch_size": 0}, "`batch_size=0`"),
    ],
)
def test_what_are_no_samples_is_refused(arguments, problem):
    with pytest.raises(ConfigurationError, match=rf"{problem}[\s\S]*HINT"):
        TensorSource(**{"inputs": FIVE, "targets": FIVE_LABELS, "split": "train", **arguments})


A, B = torch.zeros(2, 4), torch.ones(2, 5)
GRAPHS = Graphs(torch.zeros(5, 3), torch.tensor([0, 0, 1, 1, 1]), Y)
Points = namedtuple("Points", "graph V_d Y")


@dataclass
class Record:
    image: Tensor
    label: Tensor


def taken(raw: Any, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], Mapping[str, Any], Any]:
    module = type("Network", (nn.Module,), {"forward": forward})()
    return bind_adapter(unpack, module)(raw)


@pytest.mark.parametrize("target_key", TARGET_KEYS)
@pytest.mark.parametrize("input_key", INPUT_KEYS)
def test_a_mapping_with_usual_keys_is_one_input(input_key, target_key):
    (x,), kwargs, target = unpack({"id": 7, input_key: X, target_key: Y})
    assert (x is X, kwargs, target is Y) == (True, {}, True)


TEXT = UserDict(input_ids=A, attention_mask=B, labels=Y)
TABLE = {"continuous": A, "categorical": B, "target": Y}


@pytest.mark.parametrize(
    ("raw", "forward", "args", "kwargs"),
    [
        ({"image": X, "depth": A, "label": Y}, lambda self, x, features=False: 0, (X,), {}),
        ({"signal": X, "label": Y}, lambda self, x: 0, (X,), {}),
        (TEXT, lambda self, **inputs: 0, (), {"input_ids": A, "attention_mask": B}),
        (TEXT, lambda self, *a, **k: 0, (), {"input_ids": A, "attention_mask": B}),
        (TEXT, lambda self, input_ids, labels: 0, (), {"input_ids": A, "labels": Y}),
        (TEXT, lambda self, batch: 0, (TEXT,), {}),
        (TABLE, lambda self, x: 0, (TABLE,), {}),
        ({"inputs": {"a": A, "b": B}, "targets": Y}, lambda self, a, b: 0, (), {"a": A, "b": B}),
        ({"batch": {"x": X, "y": {"y": Y}}}, lambda self, x: 0, (X,), {}),
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
def test_forward_gets_what_it_takes(raw, forward, args, kwargs):
    unpacked_args, unpacked_kwargs, target = taken(raw, forward)
    assert str(unpacked_args) == str(args)
    assert list(map(id, unpacked_kwargs.values())) == list(map(id, kwargs.values()))
    assert unpacked_kwargs.keys() == kwargs.keys()
    assert target is Y


def test_a_parameter_that_is_annotated_as_a_mapping_gets_the_whole_batch():
    raw = {"image": X, "label": Y}

    def forward(self: nn.Module, x: dict[str, Tensor]) -> None: ...

    assert taken(raw, forward)[0] == (raw,)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ((X,), "a batch of type tuple is neither"),
        ("xy", "a batch of type str is neither"),
        ({"image": X, "class": Y}, r"the keys \['class', 'image'\] lacks a target key"),
        ({"label": Y, "text": ["a", "b"]}, "no tensor besides the target"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_way_out(raw, problem):
    message = rf"`adapter`: .*{problem}[\s\S]*HINT: pass `adapter=f`"
    with pytest.raises(ConfigurationError, match=message):
        unpack(raw)


@dataclass
class Graded:
    signal: Tensor
    grade: Tensor


def test_the_structure_has_names_types_and_shapes():
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
        (X, X, Y),
        Graded(X, Y),
        Graphs(X, Y, Y),
        {"fold": 3},
    ],
)
def test_the_adapter_is_python_with_the_names_of_the_batch(raw):
    names = {"INPUT": X, "TARGET": Y}
    exec("if True:\n" + adapter_hint(raw).partition("\n")[2], names)
    (x,), kwargs, y = names["f"](raw)
    assert (x is X, kwargs, y is Y) == (True, {}, True)


@pytest.mark.parametrize("raw", [(X, Y, Y), {"image": X, "digit": Y, "large": Y}])
def test_an_adapter_with_several_candidates_is_no_guess(raw):
    assert "args, kwargs = (INPUT,), {}" in adapter_hint(raw)
    assert "return args, kwargs, TARGET" in adapter_hint(raw)


def test_a_model_is_no_adapter():
    with pytest.raises(
        ConfigurationError, match=r"`adapter`: Linear is a model.\nHINT: .*`reference=`"
    ):
        bind_adapter(nn.Linear(2, 2), nn.Linear(2, 2))


def halved(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return module(x / 2), y


def test_an_adapter_of_two_parameters_runs_the_module():
    args, kwargs, target = bind_adapter(halved, nn.Linear(3, 2))((X, Y))
    assert target is Y
    updated_model = nn.Linear(3, 2)
    output = run_model(updated_model, args, kwargs)
    assert torch.equal(output, updated_model(X / 2))
    assert output.requires_grad
