"""Records as plain values, and those as strict JSON; `deserialize` reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode  # made once: json.dumps makes one a call


class Derives:
    """A dataclass that is written with more than its fields."""

    @property
    def derived(self) -> Mapping[str, object]:
        """What follows from the fields: written beside them for other readers, and not read."""
        return {}


UNWRITTEN: Mapping[str, Any] = {"unwritten": True}
"""Metadata of a field that is neither written nor read."""


def flat(prefix: str = "") -> Mapping[str, Any]:
    """Metadata of a field whose own fields are written beside the others, with a prefix."""
    return {"flat": prefix}


def null_is(value: float) -> Mapping[str, Any]:
    """Metadata of a number in whose place a null means `value`, not NaN."""
    return {"null": value}


def to_plain(value: Any) -> Any:
    """Dicts, lists, text, numbers, bools and None; of dataclasses the fields, of arrays the numbers, else text.

    Infinities are NaN.
    """
    # By exact type: a numpy float is a float too, and a checkpoint that holds one does not load with weights_only=True.
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
    return to_plain(next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), str(value)))


def dumps(value: Any, indent: str = "") -> str:
    """Strict JSON of plain values; a number that is not finite is null.

    A list of numbers or words is on one line, and so is each object in a list if it has nothing but such.
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
    """An object of scalars; empty for anything else."""
    if not isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in value.values()):
        return ""
    return "{" + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"


def written_fields(kind: Any) -> list[Field[Any]]:
    """The fields of a dataclass that are written and read."""
    return [f for f in fields(kind) if not f.metadata.get("unwritten", False)]


def flat_kind(kind: Any, f: Field[Any]) -> Any:
    """The dataclass of a flat field, which may be optional."""
    hint = hints_of(kind)[f.name]
    return next((one for one in get_args(hint) if is_dataclass(one)), hint)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(kind)


def _plain_record(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in written_fields(type(record)):
        value = getattr(record, f.name)
        if "flat" not in f.metadata:
            found[f.name] = to_plain(value)
            continue
        names = [g.name for g in fields(flat_kind(type(record), f))]
        own = dict.fromkeys(names) if value is None else to_plain(value)
        found |= {f.metadata["flat"] + name: item for name, item in own.items()}
    return found | (to_plain(record.derived) if isinstance(record, Derives) else {})
