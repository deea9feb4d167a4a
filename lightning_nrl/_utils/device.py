"""Out-of-memory errors, precision and repeatable gradients of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_nrl.errors import DeviceMemoryError, first_line

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def none_if_out_of_memory(work: Callable[[], T], *, last_try: bool = False) -> T | None:
    """Returns `work()`, or None if memory runs out before the last try; frees torch's cache then."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if last_try or not is_out_of_memory(error):
            raise
    # After the handler, whose traceback holds the tensors.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def twice_if_out_of_memory(work: Callable[[], T], doing: str, *, alone: bool = True) -> T:
    """Returns `work()`. An `alone` process retries once if memory runs out; other ranks would not repeat theirs.

    Raises:
        DeviceMemoryError: memory ran out again while `doing`, such as "the search ran".
    """
    found = none_if_out_of_memory(work) if alone else None
    if found is not None:
        return found
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        text = first_line(error)
    hint = "free memory of the device, give `SearchOptions.budget`, name a later `layer`, or take smaller batches."
    raise DeviceMemoryError(f"memory ran out while {doing}: {text}", hint)


Context = Callable[[], AbstractContextManager[Any]]  # entered for each forward pass, such as autocast


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def may_use_tf32(by_cudnn: bool = True) -> bool:
    """True if float32 products, and `by_cudnn` convolutions, may use TensorFloat-32 on a GPU."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32 or (by_cudnn and cudnn.allow_tf32))
    except RuntimeError:  # `fp32_precision` is set, which excludes the older flags
        return matmul.fp32_precision == "tf32" or (by_cudnn and cudnn.fp32_precision == "tf32")


@contextmanager
def repeatable_gradients(model: nn.Module | None = None) -> Iterator[None]:
    """Disables cuDNN kernels with random summation order, so that gradients are the same in every run.

    Disables all of cuDNN for a `model` with recurrent layers, for which it has no gradients in evaluation mode.
    """
    cudnn: Any = torch.backends.cudnn
    recurrent = model is not None and any(isinstance(module, nn.RNNBase) for module in model.modules())
    before = cudnn.enabled, cudnn.deterministic, cudnn.benchmark
    cudnn.enabled, cudnn.deterministic, cudnn.benchmark = cudnn.enabled and not recurrent, True, False
    try:
        yield
    finally:
        cudnn.enabled, cudnn.deterministic, cudnn.benchmark = before
