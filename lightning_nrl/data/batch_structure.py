"""What a batch holds, in a few lines for an error, and an adapter for it that can be pasted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Graphs", "adapter_hint", "describe", "fields_of"]

MAX_STRUCTURE_LINES, MAX_STRUCTURE_DEPTH, MAX_SHOWN_ITEMS = 12, 4, 3

TARGET_NAME_PARTS = ("label", "target", "class", "truth", "mask", "answer", "y")
INPUT_NAME_PARTS = ("input", "image", "img", "pixel", "feature", "data", "audio", "text", "x")
"""What the names of a truth or of an input contain, or are, likely ones first."""


@runtime_checkable
class _NamedTuple(Protocol):
    def _asdict(self) -> dict[str, Any]: ...


@runtime_checkable
class Graphs(Protocol):
    """Graphs in one object with fields by name, as torch_geometric has them."""

    @property
    def num_nodes(self) -> int | None: ...

    def keys(self) -> Any: ...

    def __getitem__(self, key: str) -> Any: ...


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """The fields of a mapping, a data class, a named tuple or a batch of graphs, by name; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (type, Tensor)):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, _NamedTuple):
        return value._asdict()
    if isinstance(value, Graphs):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118, it is no mapping
    return None


class _Part(NamedTuple):
    """Something in a batch."""

    path: str  # as Python writes it, from the batch on
    name: str  # the last key in it
    depth: int
    value: Any


def describe(raw: Any, name: str = "batch") -> str:
    """The structure of a batch or an output: types, names, shapes and dtypes, a line each, at most about a dozen."""
    lines = [f"{'  ' * part.depth}{part.name}: {_kind(part.value)}" for part in _parts(raw, name, name)]
    if len(lines) > MAX_STRUCTURE_LINES:
        lines[MAX_STRUCTURE_LINES - 1 :] = [f"  ... and {len(lines) - MAX_STRUCTURE_LINES + 1} more"]
    return "\n".join(f"    {line}" for line in lines)


def adapter_hint(raw: Any) -> str:
    """A hint with an adapter to paste, with the names of this batch; what is input and what truth is a guess."""
    tensors = [part for part in _parts(raw) if isinstance(part.value, Tensor)]
    classes = [part for part in tensors if part.value.dtype is not torch.bool]  # a bool is rather an attribute
    truth = _likely(classes or tensors, TARGET_NAME_PARTS, lambda x: x.ndim == 1 and not x.is_floating_point())
    rest = [part for part in tensors if part is not truth]
    given = _likely(rest, INPUT_NAME_PARTS, Tensor.is_floating_point) or (rest[0] if rest else None)
    return (
        "pass `adapter=f` (`data=DataOptions(adapter=f)` in a repair), with the right fields for these:\n"
        "    def f(batch):\n"
        "        args, kwargs = (" + (given.path if given else "INPUT") + ",), {}  # what the model is called with\n"
        "        return args, kwargs, " + (truth.path if truth else "TARGET") + "  # and the truth of each sample"
    )


def _parts(value: Any, path: str = "batch", name: str = "batch", depth: int = 0) -> Iterator[_Part]:
    yield _Part(path, name, depth, value)
    if depth < MAX_STRUCTURE_DEPTH:
        for inner_path, inner_name, inner in _items(value, path):
            yield from _parts(inner, inner_path, inner_name, depth + 1)


def _items(value: Any, path: str) -> list[tuple[str, str, Any]]:
    named = fields_of(value)
    if named is not None:
        by_key = isinstance(value, Mapping)
        return [(f"{path}[{key!r}]" if by_key else f"{path}.{key}", str(key), x) for key, x in named.items()]
    if isinstance(value, (list, tuple)):
        # Of many, such as one for each sample, the first say enough.
        most = len(value) if len(value) <= 2 * MAX_SHOWN_ITEMS else MAX_SHOWN_ITEMS
        return [(f"{path}[{i}]", f"[{i}]", x) for i, x in enumerate(value[:most])]
    return []


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (bool, int, float)) or value is None:
        return repr(value)
    length = f" of {len(value)}" if isinstance(value, (list, tuple, str, Mapping)) else ""
    return f"{type(value).__name__}{length}"


def _likely(parts: Sequence[_Part], names: Sequence[str], suits: Callable[[Tensor], bool]) -> _Part | None:
    """The part with the likeliest name, else the last that suits."""
    for name in names:
        for part in parts:
            own = part.name.lower()
            if own == name or (len(name) > 1 and name in own):
                return part
    return next((part for part in reversed(parts) if suits(part.value)), None)
