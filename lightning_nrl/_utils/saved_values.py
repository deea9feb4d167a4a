"""Values as bytes and back: tensors, plain values, and records of kinds that the reader names. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.hashing import hash_tensors

__all__ = [
    "Bytes",
    "DamagedValueError",
    "UnsavableValueError",
    "from_bytes",
    "record_fields",
    "tensor_hashes",
    "to_bytes",
]

MAGIC = b"lightning_nrl saved value 1\n"

Bytes = bytes | bytearray | memoryview

LIKE = ()
"""Stands for a tensor that is the same in another value. There are no other tuples: these are written as lists."""


class UnsavableValueError(TypeError):
    """A value holds something that cannot be saved, such as an object of the user's own."""


class DamagedValueError(ValueError):
    """Bytes are not what `to_bytes` gave, or hold records of kinds that the reader does not name."""


def record_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or a named tuple that make it."""
    return {name: getattr(value, name) for name in _names(value) or ()}


def tensor_hashes(value: Any) -> list[bytes]:
    """SHA-256 of each tensor in a value that can be saved, in the order of `to_bytes`."""
    return [bytes.fromhex(hash_tensors({"": tensor})) for tensor in _tensors(_plain(value))]


def to_bytes(value: Any, like: Sequence[bytes] = ()) -> bytes:
    """A value as bytes, with a checksum.

    None, bools, numbers, text, tensors on any device, tuples, lists, dicts, and records of such values.

    Args:
        value: what is to be saved.
        like: hashes of the tensors of another value. What is the same at the same place is left out.

    Raises:
        UnsavableValueError: there is anything else in it.
    """
    plain = _plain(value)
    if like:
        plain = _without(plain, iter(like))
    stream = io.BytesIO()
    torch.save(plain, stream)
    content = stream.getbuffer()
    return b"".join((MAGIC, hashlib.sha256(content).digest(), content))


def from_bytes(
    data: Bytes, kinds: Iterable[type] = (), device: torch.device | None = None, like: Bytes | None = None
) -> Any:
    """The value of which `to_bytes` made these bytes.

    Args:
        data: the bytes.
        kinds: of the records that may be in it.
        device: where tensors go that were not on the CPU; None: the CPU.
        like: bytes of the other value, from which tensors were left out that are the same there.

    Raises:
        DamagedValueError: the checksum is wrong, there is something in it that is not expected, or there is no memory
            for it.
    """
    try:
        plain = _loaded(data)
        if like is not None:
            plain = _with(plain, iter(_tensors(_loaded(like))))
        return _value(plain, {kind.__name__: kind for kind in kinds}, device or torch.device("cpu"))
    except DamagedValueError:
        raise
    except Exception as error:
        raise DamagedValueError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _loaded(data: Bytes) -> Any:
    start = len(MAGIC)
    view = memoryview(data)
    digest, content = view[start : start + 32], view[start + 32 :]
    if view[:start] != MAGIC or hashlib.sha256(content).digest() != digest:
        raise DamagedValueError("the checksum is wrong")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensors(plain: Any) -> list[Tensor]:
    if isinstance(plain, Tensor):
        return [plain]
    items = plain.values() if isinstance(plain, Mapping) else plain if isinstance(plain, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _without(plain: Any, like: Iterator[bytes]) -> Any:
    """The same without each tensor of which the hash is the next one."""
    if isinstance(plain, Tensor):
        return LIKE if bytes.fromhex(hash_tensors({"": plain})) == next(like, b"") else plain
    if isinstance(plain, Mapping):
        return {name: _without(item, like) for name, item in plain.items()}
    return [_without(item, like) for item in plain] if isinstance(plain, list) else plain


def _with(plain: Any, like: Iterator[Tensor]) -> Any:
    """What `_without` was given, with the tensors of the other value at the same places."""
    if isinstance(plain, Tensor):
        next(like, None)
        return plain
    if isinstance(plain, tuple):
        return next(like)
    if isinstance(plain, Mapping):
        return {name: _with(item, like) for name, item in plain.items()}
    return [_with(item, like) for item in plain] if isinstance(plain, list) else plain


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
