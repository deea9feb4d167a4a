"""What the classes of a data set are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.validation_view import innermost_datasets


@runtime_checkable
class _HasClasses(Protocol):
    classes: Sequence[str]


def class_names(sources: Iterable[LoaderSource]) -> tuple[str, ...]:
    """The first `classes` of an innermost data set, as torchvision's have them; empty where none has any."""
    for source in sources:
        for dataset in innermost_datasets(source.loader):
            found = dataset.classes if isinstance(dataset, _HasClasses) else None
            if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
                return tuple(found)
    return ()
