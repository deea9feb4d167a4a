from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from lightning_nrl._utils.json_records import (
    UNWRITTEN,
    Derives,
    Record,
    dumps,
    flat,
    from_plain,
    null_is,
    parse_json,
    to_plain,
)
from lightning_nrl.errors import ConfigurationError


@dataclass(frozen=True)
class Size:
    width: int
    height: float = math.nan


@dataclass(frozen=True)
class Part(Derives):
    name: str
    kind: Literal["wood", "iron"]
    size: Size = field(metadata=flat())
    box: Size | None = field(default=None, metadata=flat("box_"))

    @property
    def derived(self) -> Mapping[str, object]:
        return {"area": self.size.width * self.size.height}


@dataclass(frozen=True)
class Thing(Record):
    parts: tuple[Part, ...]
    price: float = field(metadata=null_is(math.inf))
    pair: tuple[int, str] = (1, "a")
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    limit: int | float | None = None
    good: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)
    cache: object = field(default=None, metadata=UNWRITTEN, compare=False)


THING = Thing(
    (Part("leg", "wood", Size(2, 1.5)), Part("nail", "iron", Size(1), Size(3, 4.0))),
    math.inf,
    curves={"heat": [1.0, math.nan]},
    limit=0.5,
    notes={"a": {"b": [1, None, "x"]}},
    cache=object(),
)


def changed(**changes: Any) -> dict[str, Any]:
    """The thing as JSON has it, with other values at some places, such as `parts.0.width`."""
    data: dict[str, Any] = json.loads(THING.to_json())
    for path, value in changes.items():
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("__"))
        place = functools.reduce(operator.getitem, keys, data)
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    return data


def test_fields_lie_flat_and_what_follows_is_beside_them() -> None:
    data = json.loads(THING.to_json())
    assert data["parts"][0] == {
        "name": "leg",
        "kind": "wood",
        "width": 2,
        "height": 1.5,
        "box_width": None,
        "box_height": None,
        "area": 3.0,
    }
    assert data["parts"][1]["box_height"] == 4.0
    assert data["price"] is data["parts"][1]["height"] is data["parts"][1]["area"] is None
    assert data["curves"] == {"heat": [1.0, None]}
    assert "cache" not in data


def test_what_was_written_comes_back() -> None:
    for again in (Thing.from_json(THING.to_json()), Thing.from_dict(THING.to_dict())):
        assert again.parts[0] == THING.parts[0]
        assert math.isnan(again.parts[1].size.height)
        assert again.parts[1].box == Size(3, 4.0)
        assert again.price == math.inf
        assert (again.pair, again.limit, again.notes) == ((1, "a"), 0.5, THING.notes)
        assert math.isnan(again.curves["heat"][1])
        assert again.to_json() == THING.to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts__1__width": "x"}, r"^parts\[1\]\.width: expected a whole number, found 'x'\."),
        ({"parts__1__width": True}, r"^parts\[1\]\.width: expected a whole number, found True"),
        ({"parts__1__width": 2**63}, r"^parts\[1\]\.width: expected a whole number of 64 bits"),
        ({"parts__1__box_width": None}, r"^parts\[1\]\.box_width: expected a whole number, found"),
        ({"parts__0__kind": "tin"}, r"^parts\[0\]\.kind: expected one of .* found 'tin'"),
        ({"parts__0__kind": KeyError}, r"^parts\[0\]\.kind: this is missing"),
        ({"parts__0__box_width": KeyError}, r"^parts\[0\]\.box_width: this is missing"),
        ({"parts__0__colour": "red"}, r"^parts\[0\]\.colour: this key is unknown"),
        ({"parts__0": 3}, r"^parts\[0\]: expected an object, found 3"),
        ({"parts": {}}, r"^parts: expected a list, found \{\}"),
        ({"pair": [1]}, r"^pair: expected a list of 2, found \[1\]"),
        ({"pair__1": 2}, r"^pair\[1\]: expected text, found 2"),
        ({"price": math.inf}, r"^price: expected a finite number, found inf"),
        ({"price": 2**53 + 1}, r"^price: expected a finite number, found 9007199254740993"),
        ({"curves__heat__0": "1"}, r"^curves\.heat\[0\]: expected a finite number, found '1'"),
        ({"limit": "1"}, r"^limit: expected a whole number, found '1'"),
        ({"good": 1}, r"^good: expected true or false, found 1"),
        ({"price": KeyError}, r"^price: this is missing"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Thing.from_dict(changed(**changes))


@pytest.mark.parametrize("data", [3, None, [], "x", {1: 2}])
def test_the_whole_may_be_wrong(data: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^the file: expected an object"):
        from_plain(Thing, data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("1" * 5000, "no strict JSON"),
    ],
    ids=["infinity", "twice", "long"],
)
def test_what_is_no_strict_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_json(text)


def test_a_whole_number_is_a_number() -> None:
    assert Thing.from_dict(changed(price=3)).price == 3.0


def test_json_has_lists_of_numbers_and_objects_of_scalars_in_lists_on_one_line() -> None:
    assert dumps(to_plain({"a": (1, 2.5), "b": [{"c": math.nan, "d": "e"}, {"f": [3]}]})) == (
        '{\n  "a": [1, 2.5],\n  "b": [\n    {"c": null, "d": "e"},\n'
        '    {\n      "f": [3]\n    }\n  ]\n}'
    )
