"""Values as bytes and back: tensors, plain values and the records that a type hint names. Loaded without pickle."""

from __future__ import annotations

import hashlib
import io
from dataclasses import is_dataclass
from pickle import UnpicklingError
from typing import Any, get_args, get_type_hints

import torch
from torch.serialization import add_safe_globals, default_restore_location

MAGIC = b"lightning_nrl saved value 2\n"

Bytes = bytes | bytearray | memoryview


class DamagedValueError(ValueError):
    """Bytes that `to_bytes` did not return, or that hold other records than the hint names."""


def to_bytes(value: Any) -> bytes:
    """Returns a value as bytes with a checksum; raises whatever `torch.save` raises."""
    stream = io.BytesIO()
    torch.save(value, stream)
    content = stream.getbuffer()
    return b"".join((MAGIC, hashlib.sha256(content).digest(), content))


def from_bytes(data: Bytes, hint: Any = None, device: torch.device | None = None) -> Any:
    """Returns the value of `to_bytes`.

    Args:
        data: the bytes.
        hint: a type that names, directly or in its fields, all records in the value.
        device: where tensors go that were not on the CPU; None: the CPU.

    Raises:
        DamagedValueError: the checksum is wrong, an unexpected object is in the value, or memory runs out.
    """
    start, target = len(MAGIC), str(device or "cpu")
    view = memoryview(data)
    digest, content = view[start : start + 32], view[start + 32 :]
    if view[:start] != MAGIC or hashlib.sha256(content).digest() != digest:
        raise DamagedValueError("the checksum is wrong")

    def place(storage: Any, location: str) -> Any:
        return default_restore_location(storage, location if location == "cpu" else target)

    try:
        add_safe_globals(list(_records(hint, {})))
        return torch.load(io.BytesIO(content), map_location=place, weights_only=True)
    except UnpicklingError as error:
        raise DamagedValueError("it holds an unexpected object") from error
    except Exception as error:
        raise DamagedValueError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _records(hint: Any, found: dict[type, None]) -> dict[type, None]:
    """Adds the dataclasses and named tuples in a type hint and in their fields."""
    for part in get_args(hint):
        _records(part, found)
    is_record = isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))
    if is_record and hint not in found:
        found[hint] = None
        for inner in get_type_hints(hint).values():
            _records(inner, found)
    return found
