"""Out-of-memory errors, precision, and gradients that are the same in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_nrl.errors import DeviceMemoryError, first_line

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def none_if_out_of_memory(work: Callable[[], T], *, last_try: bool = False) -> T | None:
    """Returns `work()`, or None if memory runs out, after emptying torch's cache.

    On the last try it raises instead.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if last_try or not is_out_of_memory(error):
            raise
    # Not in the handler, where the traceback still holds the tensors.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def twice_if_out_of_memory(work: Callable[[], T], doing: str, *, alone: bool = True) -> T:
    """Returns `work()`. If memory runs out and this is the only rank (`alone`), tries once more.

    Raises:
        DeviceMemoryError: memory ran out in the last try. `doing` completes the message, as in "the
            search ran".
    """
    if alone:
        result = none_if_out_of_memory(work)
        if result is not None:
            return result
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        text = first_line(error)
    raise DeviceMemoryError(
        f"memory ran out while {doing}: {text}",
        "free memory of the device, give `SearchOptions.memory_limit`, name a later `layer`, or "
        "take smaller batches.",
    )


# Makes the context of a forward pass, such as autocast.
Context = Callable[[], AbstractContextManager[object]]


def at_least_float32(x: Tensor) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def widest(device: torch.device) -> torch.dtype:
    if device.type == "mps":
        return torch.float32
    return torch.float64


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def may_use_tf32(by_cudnn: bool = True) -> bool:
    """True if matrix products, or with `by_cudnn` convolutions, may use TensorFloat-32 on a GPU."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32 or (by_cudnn and cudnn.allow_tf32))
    except RuntimeError:  # `fp32_precision` is set, which excludes the older flags
        return matmul.fp32_precision == "tf32" or (by_cudnn and cudnn.fp32_precision == "tf32")


@contextmanager
def repeatable_gradients(model: nn.Module | None = None) -> Iterator[None]:
    """Disables cuDNN kernels with a random order of summation, so that gradients are repeatable.

    If `model` has recurrent layers, disables all of cuDNN, which cannot compute their gradients in
    evaluation mode.
    """
    modules = () if model is None else model.modules()
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    cudnn = torch.backends.cudnn
    earlier = cudnn.enabled, cudnn.deterministic, cudnn.benchmark
    cudnn.enabled = cudnn.enabled and not is_recurrent
    cudnn.deterministic = True
    cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.enabled, cudnn.deterministic, cudnn.benchmark = earlier
