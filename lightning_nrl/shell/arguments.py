"""Arguments that a function passes on to `RegressionFreeRepair`, and the model that it is given."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_nrl.errors import ConfigurationError, check_choice, explain
from lightning_nrl.shell.callback import RegressionFreeRepair

__all__ = ["callback_with", "check_model"]


def callback_with(**arguments: Any) -> RegressionFreeRepair:
    """A callback with these arguments.

    Raises:
        ConfigurationError: it has no such argument (the nearest one is named), or one cannot be used.
    """
    known = tuple(inspect.signature(RegressionFreeRepair).parameters)
    for name in arguments:
        check_choice("argument", name, known)
    return RegressionFreeRepair(**arguments)


def check_model(model: Any, without_lightning: str) -> None:
    """Refuses a plain module, which has neither data nor a training that a Trainer knows.

    Args:
        model: a LightningModule, compiled or not.
        without_lightning: the function for plain modules.

    Raises:
        ConfigurationError: it is none.
    """
    inner = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, pl.LightningModule):
        raise ConfigurationError(
            explain(
                f"`model`: found a {type(inner).__name__} of `{type(inner).__module__}`, not a LightningModule.",
                f"give a module of `pytorch_lightning`; for a plain PyTorch module there is `{without_lightning}`.",
            )
        )
