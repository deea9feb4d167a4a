"""Checks of the model and the arguments that are given to `repair`, `diagnose`, `compare` and
`sweep`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from lightning_nrl._trainer.data_splits import DataOptions
from lightning_nrl._trainer.lightning.packages import LightningModule
from lightning_nrl._trainer.lightning.private_parts import original_module
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline.settings import OPTIONS, changed_options

OPTION_CLASSES: Mapping[str, type] = {"data": DataOptions, **OPTIONS}
"""Classes of option objects, such as `DataOptions`, by the argument of `RegressionFreeRepair` that
takes them.
"""

SEARCH_OPTION_NAMES = "target layer task unseen passed failed adapter draws importance fitness localizer n_passed budget"
USED_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "compare": (*SEARCH_OPTION_NAMES.split(), "augment", "n_scored", "max_time", "seed"),
    "sweep": (*SEARCH_OPTION_NAMES.split(), "method", "calibration", "set_aside", "dirpath"),
}
"""Options that have an effect, by function. In a function that is not listed, only `start_from` has
no effect.
"""

REFUSALS = {
    "compare": "a comparison counts repaired and broken samples, and accepts and writes nothing",
    "sweep": "a sweep runs searches to their end, and judges and accepts nothing",
}
INSTEAD = {
    ("compare", "method"): ("a comparison runs several", "name them: `methods=[{value!r}, ...]`."),
    ("sweep", "seed"): ("a sweep has `seeds`", "write `seeds=[{value!r}]`."),
}


def check_used(entry_point: str, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments, and changed fields of option objects, that have no effect in
    `entry_point`.
    """
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        given |= (
            changed_options(value)
            if isinstance(value, tuple(OPTION_CLASSES.values()))
            else {name: value}
        )
    for name in sorted(given):
        if name == "start_from":
            why, hint = (
                "it has no meaning without training",
                "name the checkpoint to start from as `ckpt_path`.",
            )
        elif name in USED_OPTIONS.get(entry_point, (name,)):
            continue
        else:
            hint = f"leave `{name}` out; it is an option of `repair` and `RegressionFreeRepair`."
            why, hint = INSTEAD.get((entry_point, name), (REFUSALS[entry_point], hint))
        raise ConfigurationError(
            f"`{name}={given[name]!r}`: {why}.", hint.format(value=given[name])
        )


def is_used(entry_point: str, argument: str) -> bool:
    """True if `argument`, or a field of its option object, has an effect in `entry_point`
    (`compare` or `sweep`).
    """
    kind = OPTION_CLASSES.get(argument)
    names = {argument} if kind is None else {field.name for field in fields(kind)}
    return not names.isdisjoint(USED_OPTIONS[entry_point])


def callback_with(entry_point: str, **arguments: Any) -> RegressionFreeRepair:
    """Returns a callback with these arguments. Refuses any that is unknown or has no effect in
    `entry_point`.
    """
    known = list(inspect.signature(RegressionFreeRepair).parameters)
    inside = {
        field.name: f"`{name}={kind.__name__}({field.name}=...)`"
        for name, kind in OPTION_CLASSES.items()
        for field in fields(kind)
    }
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *inside], n=1)
            hint = (
                f"did you mean {inside.get(near[0], f'`{near[0]}`')}?"
                if near
                else f"it is one of {known}."
            )
            raise ConfigurationError(f"`{name}` is no argument of a repair.", hint)
    check_used(entry_point, arguments)
    return RegressionFreeRepair(**arguments)


def check_model(model: Any, without_lightning: str) -> None:
    """Refuses any model but a (compiled) LightningModule. The hint suggests the function named
    `without_lightning`.
    """
    inner = original_module(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, LightningModule):
        problem = f"`model`: found a {type(inner).__name__} of `{type(inner).__module__}`, not a LightningModule."
        hint = f"give a LightningModule, or call `{without_lightning}` for a plain PyTorch module."
        raise ConfigurationError(problem, hint)
