"""Arguments that a function passes on to `RegressionFreeRepair`, and the model that it is given."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import fields
from typing import Any

from torch import nn

from lightning_nrl._lightning.packages import LightningModule
from lightning_nrl._lightning.private_parts import original_module
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.entrypoints._option_support import OPTION_CLASSES, check_heeded
from lightning_nrl.errors import ConfigurationError


def callback_with(entry_point: str, **arguments: Any) -> RegressionFreeRepair:
    """A callback with these arguments; refuses unknown ones (the nearest is named) and those without effect here."""
    known = list(inspect.signature(RegressionFreeRepair).parameters)
    inside = {
        field.name: f"`{name}={kind.__name__}({field.name}=...)`"
        for name, kind in OPTION_CLASSES.items()
        for field in fields(kind)
    }
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *inside], n=1)
            hint = f"did you mean {inside.get(near[0], f'`{near[0]}`')}?" if near else f"it is one of {known}."
            raise ConfigurationError(f"`{name}` is no argument of a repair.", hint)
    check_heeded(entry_point, arguments)
    return RegressionFreeRepair(**arguments)


def check_model(model: Any, without_lightning: str) -> None:
    """Refuses a plain module, which has neither data nor a training that a Trainer knows; a compiled one is none."""
    inner = original_module(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, LightningModule):
        raise ConfigurationError(
            f"`model`: found a {type(inner).__name__} of `{type(inner).__module__}`, not a LightningModule.",
            f"give a LightningModule; for a plain PyTorch module there is `{without_lightning}`.",
        )
