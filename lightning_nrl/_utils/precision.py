"""How exactly to compute, on devices and in dtypes that differ in what they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Context", "at_least_float32", "may_use_tf32", "no_autocast", "repeatable_gradients", "widest"]

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
