"""Using a live model without leaving a trace: whatever happens, it is given back as it was found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["evaluating", "preserve", "random_state"]


@contextmanager
def preserve(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards its training flags and buffers and the random states are as before.

    Some models draw random numbers even in evaluation mode.
    """
    # Inference mode would forbid the gradients that localisation needs.
    with random_state(), torch.inference_mode(False), evaluating(model):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards its training flags and buffers are as before.

    Some models count or cache in a buffer whenever they run. Weights need no such care: nothing writes to them on the
    way.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    try:
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


@contextmanager
def random_state() -> Iterator[None]:
    """The global random states of torch, numpy and Python are as found afterwards.

    Also after an exception, where Lightning's `isolate_rng` leaves them as they are then.
    """
    states: list[tuple[Callable[[Any], None], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)


def _same(a: Tensor, b: Tensor) -> bool:
    # Sparse tensors cannot be compared; copying does no harm.
    return a.layout == torch.strided and torch.equal(a, b)
