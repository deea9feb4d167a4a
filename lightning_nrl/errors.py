"""What the package raises and warns of. A message names the argument, says what was found, and ends with a hint."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real

__all__ = [
    "ConfigurationError",
    "DataWarning",
    "DeviceMemoryError",
    "EmptyLocalizationError",
    "EvaluationError",
    "FilesWarning",
    "InseparableBatchError",
    "LoggingWarning",
    "NotRepairedWarning",
    "OtherRankError",
    "PerformanceWarning",
    "RepairError",
    "RepairWarning",
    "ReplayError",
    "TargetError",
    "TrainingWarning",
    "UnusableSamplesError",
    "UnwritableFolderError",
    "check_choice",
    "check_kind",
    "check_real",
    "check_whole",
    "explain",
]

OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that turn the direction of writing, surrogates."""


class RepairError(Exception):
    """Base of everything that this package raises on purpose, of a problem and a hint what to do about it."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(explain(problem, hint) if hint else problem)


class ConfigurationError(RepairError, ValueError):
    """An argument cannot be used as given; found before training wherever it can be."""


class UnwritableFolderError(ConfigurationError):
    """The files of a repair cannot be written to the folder that is meant."""


class TargetError(ConfigurationError):
    """A target cannot say of some data which of their samples it chooses."""


class EvaluationError(RepairError):
    """The data cannot be evaluated, for instance because the original model gives NaN losses."""


class UnusableSamplesError(EvaluationError):
    """Some `samples` (positions by split) cannot be evaluated: they have no class, or no finite loss."""

    def __init__(self, problem: str, hint: str = "", samples: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__(problem, hint)
        self.samples = samples or {}


class OtherRankError(EvaluationError):
    """Another rank failed; its own error says why."""


class DeviceMemoryError(RepairError):
    """The memory of the device does not suffice, however little is done at once."""


class EmptyLocalizationError(RepairError):
    """No weight matters for the failed data without mattering for the passed data too."""


class ReplayError(RepairError):
    """The part of the network after a layer cannot be run on its own."""


class InseparableBatchError(ReplayError):
    """Samples cannot be taken out of a batch, such as one of graphs, and the layer is not the last one."""


class RepairWarning(UserWarning):
    """Base of every warning of this package, so that they can be filtered together; made like an error."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(explain(problem, hint) if hint else problem)


class NotRepairedWarning(RepairWarning):
    """The repair ended without new weights; the model is as training left it."""


class DataWarning(RepairWarning):
    """The data is not what a repair can rely on, such as samples that change from pass to pass."""


class TrainingWarning(RepairWarning):
    """Something around the training is not as asked for, such as a training that cannot go on."""


class PerformanceWarning(RepairWarning):
    """The result is the same, but takes longer than it has to."""


class FilesWarning(RepairWarning):
    """A file could not be written, or is damaged and not used; the result is not affected."""


class LoggingWarning(RepairWarning):
    """A logger took no result; result and files are not affected."""


def explain(problem: str, hint: str) -> str:
    """Joins what was found with what to do about it, in the one form that all messages have."""
    return visible(f"{problem}\nHINT: {hint}")


def visible(text: str) -> str:
    """Returns text in which what a terminal would obey, and a lone surrogate, is written out, such as ESC."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_line(error: object) -> str:
    """Returns an error's message without its hint, or what else follows its first line."""
    return str(error).strip().partition("\n")[0]


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a word that is not among the choices, and names the one that was probably meant."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    known = "one of " + ", ".join(repr(choice) for choice in choices)
    raise ConfigurationError(
        f"`{argument}={value!r}` is unknown.", f"did you mean {near[0]!r}? It is {known}." if near else f"use {known}."
    )


def check_kind(argument: str, value: object, fits: bool, kind: str, example: str) -> None:
    """Refuses a value that does not fit its argument, and a class where an object of it is meant."""
    if not fits or isinstance(value, type):
        raise ConfigurationError(f"`{argument}={value!r}` is no {kind}.", f"write {example}.")


def check_whole(argument: str, value: object, least: int, most: int | None = None) -> None:
    """Refuses what is no whole number from `least` to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        limits = f"from {least}" + (f" to {most}" if most is not None else "")
        raise ConfigurationError(f"`{argument}={value!r}` is out of range.", f"give a whole number {limits}.")


def check_real(
    argument: str,
    value: object,
    kind: str,
    hint: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuses what is no finite number within limits."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and least <= number <= most and above < number < below):
        raise ConfigurationError(f"`{argument}={value!r}` is no {kind}.", hint)
