"""What to do when memory runs out, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_nrl.errors import DeviceMemoryError

__all__ = ["is_out_of_memory", "none_if_out_of_memory", "twice_if_out_of_memory"]

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    text = str(error)
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or ("out of memory" in text or "can't allocate memory" in text)


def none_if_out_of_memory(
    work: Callable[[], T], *, last_try: bool = False, free_cache: Callable[[], None] | None = None
) -> T | None:
    """What `work` gives; None if memory ran out, after what torch holds unused has been given back to the device.

    That is done by `torch.cuda.empty_cache`, where CUDA is in use, or by `free_cache`. In the `last_try` running out of
    memory is an error after all.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if last_try or not is_out_of_memory(error):
            raise
    # Not in the handler: until it is left, the traceback holds what did not fit.
    if free_cache is not None:
        free_cache()
    elif torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def twice_if_out_of_memory(work: Callable[[], T], doing: str, *, alone: bool = True) -> T:
    """What `work` gives, tried once more where memory ran out and what torch held unused has been given back.

    Args:
        work: what can be done anew: it gives the same each time.
        doing: what it does, for the message, such as "the search ran".
        alone: whether no other rank takes part, which would not know that it begins anew.

    Raises:
        DeviceMemoryError: memory ran out again.
    """
    found = none_if_out_of_memory(work) if alone else None
    if found is not None:
        return found
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        text = str(error).partition("\n")[0]
    raise DeviceMemoryError(
        f"memory ran out while {doing}: {text}",
        "free memory of the device, give `SearchOptions.budget`, name a later `layer`, or take smaller batches.",
    )
