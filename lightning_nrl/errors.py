"""What the package raises. A message names the argument in backticks, says what was found, and ends with a hint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = [
    "ConfigurationError",
    "EmptyLocalizationError",
    "EvidenceError",
    "RepairError",
    "ReplayError",
    "check_choice",
    "check_kind",
    "explain",
]


class RepairError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigurationError(RepairError, ValueError):
    """An argument cannot be used as given; found before training wherever it can be."""


class EvidenceError(RepairError):
    """The known data cannot serve as evidence, for instance because the original model gives NaN losses."""


class EmptyLocalizationError(RepairError):
    """No weight matters for the failed data without mattering for the passed data too."""


class ReplayError(RepairError):
    """The part of the network after a layer cannot be run on its own."""


def explain(problem: str, hint: str) -> str:
    """Joins what was found with what to do about it, in the one form that all messages have."""
    return f"{problem}\nHINT: {hint}"


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a word that is not among the choices, and names the one that was probably meant.

    Raises:
        ConfigurationError: `value` is none of the choices.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    known = "one of " + ", ".join(repr(choice) for choice in choices)
    raise ConfigurationError(
        explain(
            f"`{argument}={value!r}` is unknown.",
            f"did you mean {near[0]!r}? It is {known}." if near else f"use {known}.",
        )
    )


def check_kind(argument: str, value: object, fits: bool, kind: str, example: str) -> None:
    """Refuses a value of another kind than the argument's, and a class where an object of it is meant.

    Args:
        argument: its name.
        value: what was given.
        fits: whether that is of the kind.
        kind: its name.
        example: what to write instead.

    Raises:
        ConfigurationError: the value does not fit.
    """
    if not fits or isinstance(value, type):
        raise ConfigurationError(explain(f"`{argument}={value!r}` is no {kind}.", f"write {example}."))
