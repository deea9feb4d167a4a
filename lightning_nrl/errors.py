"""What the package raises. A message names the argument in backticks, says what was found, and ends with a hint."""

from __future__ import annotations

__all__ = ["ConfigurationError", "EmptyLocalizationError", "EvidenceError", "RepairError", "ReplayError", "explain"]


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
