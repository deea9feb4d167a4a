"""Objects as plain JSON values, and hashes of their contents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from lightning_nrl._utils.state import hash_file, hash_tensors
from lightning_nrl.data.targets import Target
from lightning_nrl.gate import Gate

SCALARS = (bool, int, float, str)
NAMED = (type, FunctionType, BuiltinFunctionType, MethodType)


def fields_of(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, in order. Values stay as they are."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def plain_value(value: Any) -> Any:
    """Converts a value to plain JSON values, so that equal runs give equal values.

    Nothing in it depends on memory addresses.
    """
    if value is None or isinstance(value, SCALARS):
        return value
    if isinstance(value, (Target, Gate)):
        return str(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"{len(value)} tensors"
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_value(item) for item in value), key=str)
    if isinstance(value, NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        items = {name: plain_value(item) for name, item in fields_of(value).items()}
        return {"class": type(value).__name__, **items}
    representation: object = type(value).__repr__
    if representation is object.__repr__:
        return {"class": type(value).__name__, **_scalar_attributes(value)}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _scalar_attributes(value: object) -> dict[str, Any]:
    attributes = getattr(value, "__dict__", {})
    return {
        name: item for name, item in attributes.items() if item is None or isinstance(item, SCALARS)
    }


def content_hashes(value: Any) -> Any:
    """Returns hashes of the models, states, files and folders in a value.

    `plain_value` leaves out their contents.
    """
    if isinstance(value, nn.Module):
        return hash_tensors(value.state_dict())
    if isinstance(value, Mapping):
        items = {str(key): item for key, item in value.items()}
        nested = {
            key: content_hashes(item) for key, item in items.items() if isinstance(item, Mapping)
        }
        return [hash_tensors(items), nested]
    if isinstance(value, (list, tuple)):
        return [content_hashes(item) for item in value]
    if isinstance(value, (str, Path)):
        return _file_hashes(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: content_hashes(item) for name, item in fields_of(value).items()}
    return None


def _file_hashes(path: str | Path) -> object:
    # Any text may be a path; one that cannot be is left out.
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            return hash_file(Path(path))
        if str(path) and Path(path).is_dir():
            files = [file for file in Path(path).iterdir() if file.is_file()]
            return sorted((file.name, hash_file(file)) for file in files)
    return None


def text_hash(value: object) -> str:
    """Returns the SHA-256 of a plain value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
