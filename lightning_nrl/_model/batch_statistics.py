"""Layers by which a prediction depends on the other samples of its batch, so that nothing holds of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl.errors import ConfigurationError

__all__ = ["refusing_batch_statistics"]


@contextmanager
def refusing_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, a call of a batch norm without running statistics is an error; the model is in evaluation mode.

    Raises:
        ConfigurationError: as above; it names the layer.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None
    }
    handles = [module.register_forward_pre_hook(partial(_refuse, name)) for name, module in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(name: str, *_: Any) -> None:
    raise ConfigurationError(
        f"`model`: `{name}` is a batch norm without running statistics, so that a prediction depends on the other "
        "samples in its batch: of no sample it can be said that it stays right.",
        "make it with `track_running_stats=True`, or put a layer norm or group norm in its place.",
    )
