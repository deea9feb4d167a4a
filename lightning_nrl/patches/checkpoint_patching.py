"""A patch put into a checkpoint file, or taken out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl._utils.whole_files import replacing
from lightning_nrl.patches.patch import Patch

__all__ = ["patch_checkpoint"]


def patch_checkpoint(
    patch: Patch, checkpoint: str | Path, out: str | Path, *, undo: bool = False, weights_only: bool = True
) -> None:
    """Writes a checkpoint with a patch applied; all else in it stays as it is.

    Args:
        patch: what to apply.
        checkpoint: of Lightning, or a file with a state dict.
        out: the file to write, whole or not at all; it may be `checkpoint` itself.
        undo: takes the patch out instead.
        weights_only: refuses a checkpoint that holds more than tensors and plain values; False: you trust it.

    Raises:
        ConfigurationError: the checkpoint cannot be read, or is not of the weights that the patch was made for.
    """
    hint = "give a checkpoint of tensors and plain values, or say `weights_only=False` if you trust the file."
    found = load_mapping("checkpoint", checkpoint, hint, weights_only=weights_only)
    inside: Any = found.get("state_dict")
    state = inside if isinstance(inside, Mapping) else found
    new = patch.revert(state) if undo else patch.apply(state)
    whole = {**found, "state_dict": new} if state is inside else new
    replacing(out, lambda part: torch.save(whole, part))
