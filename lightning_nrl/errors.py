"""Errors and warnings.

In general, a message names the faulty argument, describes the problem, and ends with a hint.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
    "ModelError",
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

# Lone surrogates, marks that set the direction of writing, and control characters except tab and
# newline.
CONTROL_CHARACTERS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class Explained(Exception):
    """Base class of all errors and warnings of this package.

    Attributes:
        problem: the message without the hint. Control characters are escaped as in `visible`.
        hint: what to do about the problem. May be empty.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(explain(problem, hint) if hint else problem)
        self.problem = visible(problem)
        self.hint = visible(hint)


class RepairError(Explained):
    """Base class of all errors of this package."""


class ConfigurationError(RepairError, ValueError):
    """An argument is invalid. The error is raised before training if possible."""


class ModelError(ConfigurationError):
    """The model, or a task, raised an error on a batch. That error is the cause."""


class UnwritableFolderError(ConfigurationError):
    """The folder for the files of a repair is not writable."""


class TargetError(ConfigurationError):
    """A target cannot be read from its text, or cannot be applied to the samples."""


class EvaluationError(RepairError):
    """The data cannot be evaluated, for instance because the original model gives NaN losses."""


class UnusableSamplesError(EvaluationError):
    """Some samples have no class or no finite loss.

    `samples` maps a split to their data-set positions.
    """

    def __init__(
        self, problem: str, hint: str = "", samples: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        super().__init__(problem, hint)
        self.samples = samples or {}


class OtherRankError(EvaluationError):
    """Another rank failed. The error raised on that rank says why."""


class DeviceMemoryError(RepairError):
    """The device has too little memory even for the smallest batches."""


class EmptyLocalizationError(RepairError):
    """No weight affects the failed data more than the passed data."""


class ReplayError(RepairError):
    """The layers after the repaired one cannot be run alone, or their input cannot be recorded."""


class InseparableBatchError(ReplayError):
    """A batch, such as one of graphs, cannot be split into samples.

    The layer to repair is not the last layer.
    """


class RepairWarning(Explained, UserWarning):
    """Base class of all warnings of this package."""


class NotRepairedWarning(RepairWarning):
    """A repair ended without new weights; the model is unchanged."""


class DataWarning(RepairWarning):
    """The data are unreliable, for instance because samples change each time they are read."""


class TrainingWarning(RepairWarning):
    """The training differs from what was requested, for instance because it cannot continue."""


class PerformanceWarning(RepairWarning):
    """The result is correct, but takes longer than necessary."""


class FilesWarning(RepairWarning):
    """A file could not be written, or was damaged and ignored.

    The result of the repair is not affected.
    """


class LoggingWarning(RepairWarning):
    """A logger failed. The result and the files of the repair are not affected."""


def explain(problem: str, hint: str) -> str:
    """Returns a message of the problem and, on a new line, the hint, both `visible`."""
    return visible(f"{problem}\nHINT: {hint}")


def visible(text: str) -> str:
    """Escapes what a terminal would interpret, except tabs and newlines, and lone surrogates."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: object) -> str:
    """Returns the first line of an error's message, without its hint."""
    return str(error).strip().partition("\n")[0]


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raises `ConfigurationError` if `value` is not in `choices`; the hint names the nearest."""
    names = list(choices)
    if value in names:
        return
    known = "one of " + ", ".join(map(repr, names))
    hint = f"use {known}."
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}? It is {known}."
    raise ConfigurationError(f"`{argument}={value!r}` is unknown.", hint)


def check_kind(argument: str, value: object, fits: bool, kind: str, example: str) -> None:
    """Refuses a `value` for which `fits` is false, or which is a class, as no `kind`."""
    if not fits or isinstance(value, type):
        raise ConfigurationError(f"`{argument}={value!r}` is no {kind}.", f"write {example}.")


def check_whole(argument: str, value: object, least: int, most: float = math.inf) -> None:
    """Raises `ConfigurationError` if `value` is not a whole number from `least` to `most`."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return
    hint = f"give a whole number from {least}."
    if most < math.inf:
        hint = f"give a whole number from {least} to {most}."
    raise ConfigurationError(f"`{argument}={value!r}` is out of range.", hint)


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
    """Raises `ConfigurationError` unless `value` is finite and within all limits.

    The limits are `least <= value <= most` and `above < value < below`. The message says that
    `value` is no `kind`, and ends with `hint`.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and least <= number <= most and above < number < below:
            return
    raise ConfigurationError(f"`{argument}={value!r}` is no {kind}.", hint)
