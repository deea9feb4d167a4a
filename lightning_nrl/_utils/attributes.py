"""What modules hold beside weights and buffers, given back as it was: states of metrics, caches, moving averages."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attributes_kept"]

MAX_ITEMS_KEPT = 10_000
"""Lists and dicts with more items are not given back as they were; they are data, no state of a step."""


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Attributes of modules are as found afterwards, with the tensors, lists and dicts in them: states of metrics."""
    restores: list[Callable[[], None]] = []
    for module in model.modules():
        held = vars(module)
        before = dict(held)

        def restore(held: dict[str, Any] = held, before: dict[str, Any] = before) -> None:
            held.clear()
            held.update(before)

        restores.append(restore)
        for name, value in before.items():
            if name not in ("_parameters", "_buffers"):
                restores += _restores(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for undo in restores:
                undo()


def _write(value: Tensor, copy: Tensor) -> None:
    if not torch.equal(value, copy):
        value.data.copy_(copy)


def _restores(value: Any, depth: int = 3) -> list[Callable[[], None]]:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return [partial(_write, value, copy)]
    if type(value) not in (list, dict, set, deque, OrderedDict) or len(value) > MAX_ITEMS_KEPT or not depth:
        return []
    items = value.copy()

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)

    inside = items.values() if isinstance(items, dict) else items
    return [restore, *(undo for item in inside for undo in _restores(item, depth - 1))]
