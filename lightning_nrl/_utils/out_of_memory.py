"""What to do when memory runs out, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["is_out_of_memory", "none_if_out_of_memory"]

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
