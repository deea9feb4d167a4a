"""Functions named by text, as a YAML file has to name them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

from lightning_nrl.errors import ConfigurationError

__all__ = ["import_function"]

ADDRESS_HINT = "write `package.module:function`, with a module that Python can import from here."


def import_function(argument: str, value: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that an argument stands for, given itself or by its address.

    An address is `package.module:function`, or has a dot for the colon; what follows a colon may reach into a class.
    """
    found = _at(argument, value) if isinstance(value, str) else value
    if not callable(found):
        raise ConfigurationError(
            f"`{argument}`: a value of type {type(found).__name__} cannot be called.",
            "give a function, or its address as text, `package.module:function`.",
        )
    return found


def _at(argument: str, address: str) -> Any:
    module, _, name = address.partition(":") if ":" in address else address.rpartition(".")
    if not module or not name:
        raise ConfigurationError(f"`{argument}={address!r}` is no address.", ADDRESS_HINT)
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"`{argument}={address!r}` was not found: {error}.", ADDRESS_HINT) from error
