"""Functions named by text, as a YAML file has to name them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

from lightning_nrl.errors import ConfigurationError, explain

__all__ = ["check_callable", "find_function"]

HINT = "write `package.module:function`, with a module that Python can import from here."


def find_function(argument: str, address: str) -> Callable[..., Any]:
    """The function at an address, `package.module:function`; what follows the colon may reach into a class.

    Args:
        argument: whose value the address is.
        address: module and name.

    Raises:
        ConfigurationError: there is no such function.
    """
    module, _, name = address.partition(":")
    if not module or not name:
        raise ConfigurationError(explain(f"`{argument}={address!r}` is no address.", HINT))
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigurationError(explain(f"`{argument}={address!r}` was not found: {error}.", HINT)) from error
    return check_callable(argument, found)


def check_callable(argument: str, value: Any) -> Callable[..., Any]:
    """The value, if it can be called.

    Raises:
        ConfigurationError: it cannot.
    """
    if not callable(value):
        raise ConfigurationError(
            explain(
                f"`{argument}`: a value of type {type(value).__name__} cannot be called.",
                "give a function, or its address as text, `package.module:function`.",
            )
        )
    return value
