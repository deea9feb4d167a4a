"""The weight change of a repair as one file, to be applied to the model, checked and taken back.

In: the state of a model before and after, or a file. Out: a `Patch`, a safetensors file of it, and the model, state or
checkpoint that it was applied to or taken from.
"""

from lightning_nrl.patches.patch import PATCH_NAME, Patch, patch_checkpoint
from lightning_nrl.patches.patch_file import safetensors_installed
from lightning_nrl.patches.tensor_change import TensorChange

__all__ = ["PATCH_NAME", "Patch", "TensorChange", "patch_checkpoint", "safetensors_installed"]
