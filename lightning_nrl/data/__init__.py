"""Data: batches, their sources, and targets.

In: batches from the user's data loaders. Out: `Batch` and `Source`, a common form for batches and
splits, and `Target`, which selects the failures to repair.
"""

from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Adapter, Batch, Source, TensorSource
from lightning_nrl.data.columns import Column, Field
from lightning_nrl.data.targets import (
    AllFailures,
    And,
    Confusion,
    Label,
    Not,
    Or,
    Target,
    Where,
    parse_target,
)

__all__ = [
    "Adapter",
    "AllFailures",
    "And",
    "Batch",
    "Column",
    "Confusion",
    "Field",
    "Label",
    "Not",
    "Or",
    "Source",
    "Target",
    "TensorSource",
    "Where",
    "parse_target",
    "unpack",
]
