"""Arguments that a function passes on to `RegressionFreeRepair`, and the model that it is given."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_nrl._lightning import original_module
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.errors import ConfigurationError, explain

__all__ = ["callback_with", "check_model"]


def callback_with(**arguments: Any) -> RegressionFreeRepair:
    """A callback with these arguments.

    Raises:
        ConfigurationError: it has no such argument (the nearest one is named), or one cannot be used.
    """
    known = list(inspect.signature(RegressionFreeRepair).parameters)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it is one of {known}."
            raise ConfigurationError(explain(f"`{name}` is no argument of a repair.", hint))
    return RegressionFreeRepair(**arguments)


def check_model(model: Any, without_lightning: str) -> None:
    """Refuses a plain module, which has neither data nor a training that a Trainer knows.

    Args:
        model: a LightningModule, compiled or not.
        without_lightning: the function for plain modules.

    Raises:
        ConfigurationError: it is none.
    """
    inner = original_module(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, pl.LightningModule):
        raise ConfigurationError(
            explain(
                f"`model`: found a {type(inner).__name__} of `{type(inner).__module__}`, not a LightningModule.",
                f"give a module of `pytorch_lightning`; for a plain PyTorch module there is `{without_lightning}`.",
            )
        )
