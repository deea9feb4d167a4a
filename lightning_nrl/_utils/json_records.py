"""Encodes dataclasses as strict JSON, and decodes JSON to dataclasses by the type hints of their
fields.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from typing_extensions import Self

from lightning_nrl.errors import ConfigurationError

_encode = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False
).encode  # json.dumps would make one per call

T = TypeVar("T")
WHOLE_NUMBER_LIMIT = 2**63
TYPE_NAMES: dict[object, str] = {int: "a whole number", bool: "true or false", str: "text"}
LONGEST_SHOWN = 60  # characters of a value in a message
PLAIN_HINT = "give JSON that `to_json` has written."

UNWRITTEN: Mapping[str, Any] = {"unwritten": True}  # metadata of a field that is not in the JSON


def flat(prefix: str = "") -> Mapping[str, Any]:
    """Returns metadata for a field that is a dataclass. The fields inside get a prefix and join the
    outer object.
    """
    return {"flat": prefix}


def null_is(value: float) -> Mapping[str, Any]:
    """Returns metadata for a number field: null in JSON is read as `value` instead of NaN."""
    return {"null": value}


class Derives:
    """Base of dataclasses whose JSON includes values computed from the fields."""

    @property
    def derived(self) -> Mapping[str, object]:
        """Values computed from the fields. They are written, and ignored when the JSON is read."""
        return {}


class Record(Derives):
    """Base of dataclasses that are written as JSON and read from JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, text and numbers, including the derived values. Infinities
        become NaN.
        """
        return cast(dict[str, Any], to_plain(self))

    def to_json(self) -> str:
        """Returns strict JSON, with null for numbers that are not finite."""
        return dumps(self.to_dict()) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the result of `to_dict`.

        Raises:
            ConfigurationError: a value, at a path in the message, is missing, unknown, infinite or
                of a wrong type.
        """
        return from_plain(cls, data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads the result of `to_json`; null becomes NaN. Raises the same errors as `from_dict`."""
        return cls.from_dict(parse_json(text))


def to_plain(value: Any) -> Any:
    """Converts dataclasses, arrays and so on to dicts, lists, text, numbers, bools and None.
    Infinities become NaN.
    """
    # Exact types: np.float64 is a subclass of float, and a checkpoint with one does not load with
    # weights_only=True.
    if type(value) is float:
        return math.nan if math.isinf(value) else value
    if value is None or type(value) in (bool, int, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain_record(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    return to_plain(
        next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), str(value))
    )


def dumps(value: Any, indent: str = "") -> str:
    """Returns strict JSON. A list of scalars takes one line, and so does an object of scalars
    inside a list.
    """
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {dumps(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        lines = [deeper + (_one_line(item) or dumps(item, deeper)) for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    if isinstance(value, list):
        return f"[{', '.join(map(dumps, value))}]"
    finite = not isinstance(value, float) or math.isfinite(value)
    return _encode(value if finite else None)


def _one_line(value: Any) -> str:
    if not isinstance(value, dict) or any(
        isinstance(item, (dict, list)) for item in value.values()
    ):
        return ""
    return "{" + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"


def _plain_record(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in _written_fields(type(record)):
        value = getattr(record, f.name)
        if "flat" not in f.metadata:
            found[f.name] = to_plain(value)
            continue
        names = [g.name for g in fields(_flat_kind(type(record), f))]
        own = dict.fromkeys(names) if value is None else to_plain(value)
        found |= {f.metadata["flat"] + name: item for name, item in own.items()}
    return found | (to_plain(record.derived) if isinstance(record, Derives) else {})


def from_plain(kind: type[T], data: object) -> T:
    """Reads the result of `to_plain` as a dataclass; null becomes NaN. Raises the same errors as
    `Record.from_dict`.
    """
    return cast(T, _read(kind, data, ""))


def parse_json(text: str) -> Any:
    """Parses strict JSON; refuses repeated keys, NaN and Infinity."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, TypeError) as error:
        raise ConfigurationError(f"this is no strict JSON: {error}.", PLAIN_HINT) from error


def _read(kind: Any, value: Any, path: str, null: float = math.nan) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, UnionType):
        others = [one for one in arguments if one is not NoneType]
        if value is None and NoneType in arguments:
            return None
        return _read(
            next((one for one in others if type(value) is one), others[0]), value, path, null
        )
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(path, f"one of {list(arguments)}", value)
        return value
    if is_dataclass(kind):
        return _read_record(kind, _object(value, path), f"{path}." if path else "")
    if origin in (tuple, Sequence):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        items = _list(value, path, len(arguments) if fixed else None)
        kinds = arguments if fixed else [arguments[0]] * len(items)
        read = [
            _read(one, item, f"{path}[{i}]")
            for i, (one, item) in enumerate(zip(kinds, items, strict=True))
        ]
        return tuple(read) if origin is tuple else read
    if origin is Mapping:
        return {
            key: _read(arguments[1], item, f"{path}.{key}")
            for key, item in _object(value, path).items()
        }
    if kind is float:
        return _read_float(value, path, null)
    if kind not in TYPE_NAMES:
        raise TypeError(f"{path}: a {kind} cannot be read")
    if type(value) is not kind:
        raise _wrong(path, TYPE_NAMES[kind], value)
    if kind is int and abs(value) >= WHOLE_NUMBER_LIMIT:
        raise _wrong(path, "a whole number of 64 bits", value)
    return value


def _read_float(value: Any, path: str, null: float) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return null
    if type(value) is int and abs(value) < WHOLE_NUMBER_LIMIT and int(float(value)) == value:
        return float(value)
    if type(value) is not float or math.isinf(value):
        raise _wrong(path, "a finite number", value)
    return value


def _read_record(kind: Any, data: Mapping[str, Any], prefix: str) -> Any:
    names = set[str]()

    def item(name: str) -> Any:
        names.add(name)
        if name not in data:
            raise _error(prefix + name, "this is missing")
        return data[name]

    read: dict[str, Any] = {}
    for f in _written_fields(kind):
        hint = hints_of(kind)[f.name]
        if "flat" in f.metadata:
            start, part = f.metadata["flat"], _flat_kind(kind, f)
            own = {g.name: item(start + g.name) for g in fields(part)}
            missing = NoneType in get_args(hint) and all(value is None for value in own.values())
            read[f.name] = None if missing else _read_record(part, own, prefix + start)
        else:
            read[f.name] = _read(
                hint, item(f.name), prefix + f.name, f.metadata.get("null", math.nan)
            )
    record = kind(**read)
    derived = record.derived if isinstance(record, Derives) else {}
    for name in sorted(data.keys() - names - derived.keys()):
        raise _error(prefix + name, "this key is unknown")
    return record


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(path, "an object", value)
    return value


def _list(value: Any, path: str, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        raise _wrong(path, "a list" if length is None else f"a list of {length}", value)
    return value


def _wrong(path: str, expected: str, value: object) -> ConfigurationError:
    text = repr(value)
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
    return _error(path, f"expected {expected}, found {shown}")


def _error(path: str, problem: str) -> ConfigurationError:
    return ConfigurationError(f"{path or 'the file'}: {problem}.", PLAIN_HINT)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} occurs twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _written_fields(kind: Any) -> list[Field[Any]]:
    return [f for f in fields(kind) if not f.metadata.get("unwritten", False)]


def _flat_kind(kind: Any, f: Field[Any]) -> Any:
    hint = hints_of(kind)[f.name]
    return next((one for one in get_args(hint) if is_dataclass(one)), hint)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
