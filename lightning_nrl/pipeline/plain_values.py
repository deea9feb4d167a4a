"""Objects as plain JSON values, and hashes of their contents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any

from torch import Tensor, nn

from lightning_nrl._utils.state import hash_file, hash_tensor, hash_tensors
from lightning_nrl.data import Target
from lightning_nrl.gate import Gate

SCALARS = (NoneType, bool, int, float, str)
NAMED = (type, FunctionType, BuiltinFunctionType, MethodType)


def fields_of(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, in order. Values stay as they are."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def plain_value(value: Any) -> Any:
    """Converts a value to plain JSON values, so that equal runs give equal values.

    Nothing in it depends on memory addresses.
    """
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, (Target, Gate)):
        return str(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"{len(value)} tensors"
        return _plain_items(value)
    if isinstance(value, (list, tuple)):
        return list(map(plain_value, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain_value, value), key=str)
    if isinstance(value, NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {"class": type(value).__name__, **_plain_items(fields_of(value))}
    representation: object = type(value).__repr__
    if representation is object.__repr__:
        scalars = {name: item for name, item in vars(value).items() if isinstance(item, SCALARS)}
        return {"class": type(value).__name__, **scalars}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _plain_items(items: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain_value(item) for key, item in items.items()}


def content_hashes(value: object) -> object:
    """Returns hashes of the models, tensors, files and folders in a value.

    `plain_value` leaves out their contents.
    """
    if isinstance(value, nn.Module):
        return hash_tensors(value.state_dict())
    if isinstance(value, Tensor):
        return hash_tensor(value)
    if isinstance(value, Mapping):
        return {str(key): content_hashes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(content_hashes, value))
    if isinstance(value, (str, Path)):
        return _file_hashes(value)
    if is_dataclass(value) and not isinstance(value, type):
        return content_hashes(fields_of(value))
    return None


def _file_hashes(path: str | Path) -> object:
    # Any text may be a path; one that cannot be is left out.
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            return hash_file(Path(path))
        if str(path):
            files = filter(Path.is_file, Path(path).iterdir())
            return sorted((file.name, hash_file(file)) for file in files)
    return None


def text_hash(value: object) -> str:
    """Returns the SHA-256 of a plain value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
