"""Checks of the model and the arguments of `repair`, `diagnose`, `compare` and `sweep`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from lightning_nrl._trainer.lightning.packages import LightningModule
from lightning_nrl._trainer.lightning.private_parts import original_module
from lightning_nrl._trainer.reading.data_splits import DataOptions
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline.options import OPTIONS, changed_options

OPTION_CLASSES: Mapping[str, type] = {"data": DataOptions, **OPTIONS}
"""Classes of option objects by the argument of `RegressionFreeRepair` that takes them."""

SEARCH_OPTION_NAMES = (
    "target",
    "layer",
    "task",
    "unseen",
    "passed",
    "failed",
    "adapter",
    "output",
    "draws",
    "stream_limit",
    "importance",
    "fitness",
    "localizer",
    "n_passed",
    "memory_limit",
)
USED_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "compare": (*SEARCH_OPTION_NAMES, "augment", "n_scored", "max_time", "seed"),
    "sweep": (*SEARCH_OPTION_NAMES, "method", "calibration", "set_aside", "dirpath"),
}
"""Options that have an effect, by function. In other functions, all but `start_from` have one."""
SHOWN_OPTIONS = {
    **USED_OPTIONS,
    "diagnose": (
        "target",
        "task",
        "passed",
        "failed",
        "adapter",
        "output",
        "draws",
        "stream_limit",
        "seed",
    ),
}
"""Options in the help of a command. `diagnose` takes those of `repair` too, without an effect."""

REFUSALS = {
    "compare": "a comparison counts repaired and broken samples, and accepts and writes nothing",
    "sweep": "a sweep runs searches to their end, and judges and accepts nothing",
}
INSTEAD = {
    ("compare", "method"): ("a comparison runs several", "name them: `methods=[{value!r}, ...]`."),
    ("sweep", "seed"): ("a sweep has `seeds`", "write `seeds=[{value!r}]`."),
}


def check_used(entry_point: str, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments and changed options that have no effect in `entry_point`."""
    options: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple(OPTION_CLASSES.values())):
            options |= changed_options(value)
        else:
            options[name] = value
    for name in sorted(options):
        value = options[name]
        reason = ""
        hint = f"leave `{name}` out; it is an option of `repair` and `RegressionFreeRepair`."
        if name == "start_from":
            reason = "it has no meaning without training"
            hint = "name the checkpoint to start from as `ckpt_path`."
        elif name not in USED_OPTIONS.get(entry_point, (name,)):
            reason, hint = INSTEAD.get((entry_point, name), (REFUSALS[entry_point], hint))
        if reason:
            raise ConfigurationError(f"`{name}={value!r}`: {reason}.", hint.format(value=value))


def is_used(entry_point: str, argument: str) -> bool:
    """True if `argument`, or a field of its option object, has an effect in `entry_point`."""
    names = {argument}
    if argument in OPTION_CLASSES:
        names = {field.name for field in fields(OPTION_CLASSES[argument])}
    return not names.isdisjoint(SHOWN_OPTIONS.get(entry_point, names))


def callback_with(entry_point: str, **arguments: Any) -> RegressionFreeRepair:
    """Returns a callback; refuses an argument that is unknown or has no effect in `entry_point`."""
    known = list(inspect.signature(RegressionFreeRepair).parameters)
    calls = {argument: f"`{argument}`" for argument in known}
    for argument, kind in OPTION_CLASSES.items():
        for field in fields(kind):
            calls.setdefault(field.name, f"`{argument}={kind.__name__}({field.name}=...)`")
    for name in arguments:
        if name not in known:
            hint = f"it is one of {known}."
            for similar in difflib.get_close_matches(name, calls, n=1):
                hint = f"did you mean {calls[similar]}?"
            raise ConfigurationError(f"`{name}` is no argument of a repair.", hint)
    check_used(entry_point, arguments)
    return RegressionFreeRepair(**arguments)


def check_model(model: object, without_lightning: str) -> None:
    """Refuses any model but a (compiled) LightningModule.

    The hint suggests the function named `without_lightning`.
    """
    module = original_module(model) if isinstance(model, nn.Module) else model
    if not isinstance(module, LightningModule):
        kind = type(module)
        raise ConfigurationError(
            f"`model`: found a {kind.__name__} of `{kind.__module__}`, not a LightningModule.",
            f"give a LightningModule, or call `{without_lightning}` for a plain PyTorch module.",
        )
