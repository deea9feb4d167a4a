"""Repairs a model from end to end, without Lightning.

In: a model, its known data and `Settings`. Out: an `Outcome` with the report and the repaired
weights. `repair_module` evaluates the model, searches for new weights and judges them. It leaves
the model unchanged.
"""

from lightning_nrl.pipeline.options import BoundOptions, SearchOptions
from lightning_nrl.pipeline.patch import PATCH_NAME, Patch, patch_checkpoint
from lightning_nrl.pipeline.patch_file import TensorChange
from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import Settings

__all__ = [
    "PATCH_NAME",
    "BoundOptions",
    "Outcome",
    "Patch",
    "SearchOptions",
    "Settings",
    "TensorChange",
    "patch_checkpoint",
    "repair_module",
]
