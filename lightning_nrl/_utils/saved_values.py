"""Values as bytes and back: tensors, plain values, and records of kinds that the reader names. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DamagedValueError", "UnsavableValueError", "from_bytes", "record_fields", "to_bytes"]

MAGIC = b"lightning_nrl saved value 1\n"


class UnsavableValueError(TypeError):
    """A value holds something that cannot be saved, such as an object of the user's own."""


class DamagedValueError(ValueError):
    """Bytes are not what `to_bytes` gave, or hold records of kinds that the reader does not name."""


def record_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or a named tuple that make it."""
    return {name: getattr(value, name) for name in _names(value) or ()}


def to_bytes(value: Any) -> bytes:
    """A value as bytes, with a checksum.

    None, bools, numbers, text, tensors on any device, tuples, lists, dicts, and records of such values.

    Raises:
        UnsavableValueError: there is anything else in it.
    """
    stream = io.BytesIO()
    torch.save(_plain(value), stream)
    content = stream.getbuffer()
    return b"".join((MAGIC, hashlib.sha256(content).digest(), content))


def from_bytes(data: bytes, kinds: Iterable[type] = (), device: torch.device | None = None) -> Any:
    """The value of which `to_bytes` made these bytes.

    Args:
        data: the bytes.
        kinds: of the records that may be in it.
        device: where tensors go that were not on the CPU; None: the CPU.

    Raises:
        DamagedValueError: the checksum is wrong, or there is something in it that is not expected.
    """
    start = len(MAGIC)
    digest, content = data[start : start + 32], memoryview(data)[start + 32 :]
    if data[:start] != MAGIC or hashlib.sha256(content).digest() != digest:
        raise DamagedValueError("the checksum is wrong")
    try:
        plain = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return _value(plain, {kind.__name__: kind for kind in kinds}, device or torch.device("cpu"))
    except DamagedValueError:
        raise
    except Exception as error:
        raise DamagedValueError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _names(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, tuple):
        return getattr(value, "_fields", None)
    is_record = is_dataclass(value) and not isinstance(value, type)
    return tuple(f.name for f in fields(value) if f.init) if is_record else None


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.device.type != "cpu":
            return ["elsewhere", tensor.cpu()]
        # A part of a large tensor would be written with all of it.
        whole = tensor.layout != torch.strided or tensor.untyped_storage().nbytes() <= tensor.nbytes
        return tensor if whole else tensor.clone()
    if _names(value) is not None:
        return ["record", type(value).__name__, {name: _plain(item) for name, item in record_fields(value).items()}]
    if isinstance(value, Mapping):
        return ["dict", [[_plain(key), _plain(item)] for key, item in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_plain(item) for item in value]]
    raise UnsavableValueError(type(value).__name__)


def _value(plain: Any, kinds: Mapping[str, type], device: torch.device) -> Any:
    if not isinstance(plain, list):
        return plain
    kind, *rest = plain
    if kind == "elsewhere":
        return rest[0].to(device)
    if kind == "record":
        name, content = rest
        if name not in kinds:
            raise DamagedValueError(f"a {name} is not expected there")
        return kinds[name](**{key: _value(item, kinds, device) for key, item in content.items()})
    if kind == "dict":
        return {_value(key, kinds, device): _value(item, kinds, device) for key, item in rest[0]}
    items = [_value(item, kinds, device) for item in rest[0]]
    return tuple(items) if kind == "tuple" else items
