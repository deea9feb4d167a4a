"""Encodes dataclasses as strict JSON, and decodes JSON by the type hints of their fields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from torch import Tensor
from typing_extensions import Self

from lightning_nrl.errors import ConfigurationError

T = TypeVar("T")
Plain: TypeAlias = Any  # dicts, lists, text, numbers, bools and None
Hint: TypeAlias = Any  # a type hint, such as `int | None`

# json.dumps would make an encoder per call.
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode

TYPE_NAMES: Mapping[object, str] = {int: "a whole number", bool: "true or false", str: "text"}
LONGEST_SHOWN = 60  # characters of a value in a message
PLAIN_HINT = "give JSON that `to_json` has written."

UNWRITTEN: Mapping[str, bool] = {"unwritten": True}  # metadata of a field that is not in the JSON
# Metadata of a field that is not in the JSON while it has its default.
OPTIONAL: Mapping[str, bool] = {"optional": True}


def flat(prefix: str = "") -> Mapping[str, str]:
    """Returns metadata for a dataclass whose fields join the outer object, with a prefix."""
    return {"flat": prefix}


class Derives:
    """Base of dataclasses whose JSON includes values computed from the fields."""

    @property
    def derived(self) -> Mapping[str, object]:
        """Values computed from the fields. They are written, and ignored when the JSON is read."""
        return {}


class Record(Derives):
    """Base of dataclasses that are written as JSON and read from JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, text and numbers, including the derived values.

        Infinities become NaN.
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
        """Reads the result of `to_json`; null becomes NaN. Raises like `from_dict`."""
        return cls.from_dict(parse_json(text))


def to_plain(value: object) -> Plain:
    """Converts dataclasses, arrays and so on to dicts, lists, text, numbers, bools and None.

    Infinities become NaN.
    """
    # Exact types: np.float64 is a subclass of float, and a checkpoint with one does not load with
    # weights_only=True.
    if type(value) is float and math.isinf(value):
        return math.nan
    if type(value) in (bool, int, str, float, NoneType):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain_record(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return to_plain(value.tolist())
    for kind in (int, float):
        if isinstance(value, kind):
            return to_plain(kind(value))
    return str(value)


def _plain_record(record: object) -> dict[str, Plain]:
    kind = type(record)
    plain = {}
    for field in _written_fields(kind):
        value = to_plain(getattr(record, field.name))
        if "optional" in field.metadata and value == field.default:
            continue
        if "flat" not in field.metadata:
            plain[field.name] = value
            continue
        if value is None:
            value = dict.fromkeys(required_fields(_flat_kind(kind, field)))
        plain |= {field.metadata["flat"] + name: item for name, item in value.items()}
    if isinstance(record, Derives):
        plain |= to_plain(record.derived)
    return plain


def dumps(value: Plain, indent: str = "") -> str:
    """Returns strict JSON; a list of scalars, or an object of scalars in a list, is one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {dumps(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list):
        if all(map(_is_scalar, value)):
            return f"[{', '.join(map(dumps, value))}]"
        lines = [deeper + _dump_item(item, deeper) for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return _encode(value)


def _dump_item(item: Plain, indent: str) -> str:
    if not isinstance(item, dict) or not all(map(_is_scalar, item.values())):
        return dumps(item, indent)
    pairs = [f"{json.dumps(key)}: {dumps(value)}" for key, value in item.items()]
    return "{" + ", ".join(pairs) + "}"


def _is_scalar(value: Plain) -> bool:
    return not isinstance(value, (dict, list))


def from_plain(kind: type[T], data: object) -> T:
    """Reads the result of `to_plain` as a dataclass; null becomes NaN.

    Raises the same errors as `Record.from_dict`.
    """
    return cast(T, _read(kind, data, ""))


def parse_json(text: str) -> Plain:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ConfigurationError(f"this is no JSON: {error}.", PLAIN_HINT) from error


def _read(kind: Hint, value: Plain, path: str) -> Any:
    origin: Hint = get_origin(kind)
    arguments = get_args(kind)
    if kind in (Any, object, NoneType):
        return value
    if origin in (Union, UnionType):
        choices = [argument for argument in arguments if argument is not NoneType]
        if type(value) in arguments:
            choices = [type(value)]
        return _read(choices[0], value, path)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(path, f"one of {list(arguments)}", value)
        return value
    if is_dataclass(kind):
        prefix = f"{path}." if path else ""
        return _read_record(kind, _object(value, path), prefix)
    if origin in (tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise _wrong(path, "a list", value)
        kinds = arguments
        if origin is Sequence or arguments[-1] is Ellipsis:
            kinds = arguments[:1] * len(value)
        if len(value) != len(kinds):
            raise _wrong(path, f"a list of {len(kinds)}", value)
        items = [_read(kinds[i], item, f"{path}[{i}]") for i, item in enumerate(value)]
        return items if origin is Sequence else tuple(items)
    if origin is Mapping:
        data = _object(value, path)
        return {key: _read(arguments[1], item, f"{path}.{key}") for key, item in data.items()}
    if kind is float:
        return _read_float(value, path)
    if type(value) is not kind:
        raise _wrong(path, TYPE_NAMES[kind], value)
    return value


def _read_float(value: Plain, path: str) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if type(value) is int:
        return float(value)
    if type(value) is not float or math.isinf(value):
        raise _wrong(path, "a finite number", value)
    return value


def _read_record(kind: Hint, data: Mapping[str, Plain], prefix: str) -> Any:
    values: dict[str, Any] = {}
    known: set[str] = set()
    for field in _written_fields(kind):
        hint = hints_of(kind)[field.name]
        if "flat" in field.metadata:
            start = field.metadata["flat"]
            inner_kind = _flat_kind(kind, field)
            names = {start + part.name: part.name for part in fields(inner_kind)}
            known.update(names)
            inner = {name: data[key] for key, name in names.items() if key in data}
            is_null = all(item is None for item in inner.values())
            is_whole = inner.keys() >= set(required_fields(inner_kind))
            if is_null and is_whole and NoneType in get_args(hint):
                values[field.name] = None
            else:
                values[field.name] = _read_record(inner_kind, inner, prefix + start)
        elif field.name in data:
            known.add(field.name)
            values[field.name] = _read(hint, data[field.name], prefix + field.name)
        elif "optional" not in field.metadata:
            raise _error(prefix + field.name, "this is missing")
    record = kind(**values)
    if isinstance(record, Derives):
        known.update(record.derived)
    for name in sorted(data.keys() - known):
        raise _error(prefix + name, "this key is unknown")
    return record


def _object(value: Plain, path: str) -> Mapping[str, Plain]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(path, "an object", value)
    return value


def _wrong(path: str, expected: str, value: object) -> ConfigurationError:
    text = repr(value)
    if len(text) > LONGEST_SHOWN:
        text = f"{text[: LONGEST_SHOWN - 3]}..."
    return _error(path, f"expected {expected}, found {text}")


def _error(path: str, problem: str) -> ConfigurationError:
    return ConfigurationError(f"{path or 'the file'}: {problem}.", PLAIN_HINT)


def required_fields(kind: Hint) -> list[str]:
    """Returns the names of the fields of a dataclass that are in its JSON in any case."""
    return [field.name for field in fields(kind) if "optional" not in field.metadata]


def _written_fields(kind: Hint) -> list[Field[Any]]:
    return [field for field in fields(kind) if "unwritten" not in field.metadata]


def _flat_kind(kind: Hint, field: Field[Any]) -> Hint:
    """Returns the dataclass of a field whose hint is the dataclass, or the dataclass or None."""
    hint = hints_of(kind)[field.name]
    return next(filter(is_dataclass, get_args(hint)), hint)


@cache
def hints_of(kind: Hint) -> dict[str, Hint]:
    return get_type_hints(kind)
