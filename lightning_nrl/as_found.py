"""Using a live model without leaving a trace: whatever happens, it is given back as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["as_found"]


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards its training flags and buffers and the random state are as before.

    Some models count or cache in a buffer whenever they run, or draw random numbers even in evaluation mode. Weights
    need no such care: nothing writes to them on the way.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        # Inference mode would forbid the gradients that localisation needs.
        with torch.random.fork_rng(devices=list(devices)), torch.inference_mode(False):
            model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not _same(buffer, value):
                    buffer.copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    # Sparse tensors cannot be compared; copying does no harm.
    return a.layout == torch.strided and torch.equal(a, b)
