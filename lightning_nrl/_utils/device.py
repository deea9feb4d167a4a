"""What to do when memory runs out, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_nrl.errors import DeviceMemoryError

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


Context = Callable[[], AbstractContextManager[Any]]
"""Is entered around every forward pass, such as autocast."""

CUDNN_LOCK = Lock()
CUDNN_SETTINGS: list[tuple[bool, bool, bool]] = []
"""How cuDNN was set when each thread that is inside came in."""


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums and ranks: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Operations in the dtypes of their arguments, also where the model itself is deployed in mixed precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def may_use_tf32(by_cudnn: bool = True) -> bool:
    """Whether products, and `by_cudnn` convolutions, of float32 on a GPU may be computed in TensorFloat-32."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32 or (by_cudnn and cudnn.allow_tf32))
    except RuntimeError:  # set by `fp32_precision`, which cannot be mixed with the older flags
        return matmul.fp32_precision == "tf32" or (by_cudnn and cudnn.fp32_precision == "tf32")


@contextmanager
def repeatable_gradients(model: nn.Module | None = None) -> Iterator[None]:
    """The same gradients in every run: cuDNN's faster kernels add in any order.

    In evaluation mode cuDNN has no gradients of recurrent layers, so a `model` with such layers does without it.
    """
    cudnn: Any = torch.backends.cudnn
    recurrent = model is not None and any(isinstance(module, nn.RNNBase) for module in model.modules())
    with CUDNN_LOCK:
        CUDNN_SETTINGS.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark))
        cudnn.enabled, cudnn.deterministic, cudnn.benchmark = cudnn.enabled and not recurrent, True, False
    try:
        yield
    finally:
        with CUDNN_LOCK:
            before = CUDNN_SETTINGS.pop()
            # Of several threads the last one sets all back.
            if not CUDNN_SETTINGS:
                cudnn.enabled, cudnn.deterministic, cudnn.benchmark = before
