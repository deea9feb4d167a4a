"""What the package raises and warns of. A message names the argument, says what was found, and ends with a hint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = [
    "ConfigurationError",
    "DataWarning",
    "DeviceMemoryError",
    "EmptyLocalizationError",
    "EvaluationError",
    "LoggingWarning",
    "NotRepairedWarning",
    "OtherRankError",
    "PerformanceWarning",
    "RepairError",
    "RepairWarning",
    "ReplayError",
    "TargetError",
    "TrainingWarning",
    "check_choice",
    "check_kind",
    "explain",
]


class RepairError(Exception):
    """Base of everything that this package raises on purpose.

    Args:
        problem: what was found; it names the argument.
        hint: what to do about it.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(explain(problem, hint) if hint else problem)


class ConfigurationError(RepairError, ValueError):
    """An argument cannot be used as given; found before training wherever it can be."""


class TargetError(ConfigurationError):
    """A target cannot say of some data which of their samples it chooses."""


class EvaluationError(RepairError):
    """The data cannot be evaluated, for instance because the original model gives NaN losses."""


class OtherRankError(EvaluationError):
    """Another rank failed; its own error says why."""


class DeviceMemoryError(RepairError):
    """The memory of the device does not suffice, however little is done at once."""


class EmptyLocalizationError(RepairError):
    """No weight matters for the failed data without mattering for the passed data too."""


class ReplayError(RepairError):
    """The part of the network after a layer cannot be run on its own."""


class RepairWarning(UserWarning):
    """Base of every warning of this package, so that they can be filtered together."""


class NotRepairedWarning(RepairWarning):
    """The repair ended without new weights; the model is as training left it."""


class DataWarning(RepairWarning):
    """The data is not what a repair can rely on, such as samples that change from pass to pass."""


class TrainingWarning(RepairWarning):
    """Something around the training is not as asked for, such as a training that cannot go on."""


class PerformanceWarning(RepairWarning):
    """The result is the same, but takes longer than it has to."""


class LoggingWarning(RepairWarning):
    """A logger took no result; result and files are not affected."""


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
        f"`{argument}={value!r}` is unknown.", f"did you mean {near[0]!r}? It is {known}." if near else f"use {known}."
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
        raise ConfigurationError(f"`{argument}={value!r}` is no {kind}.", f"write {example}.")
