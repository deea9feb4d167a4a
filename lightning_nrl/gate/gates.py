"""How many known samples a repair may break: the gates, and how they are read from text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, final

from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults, TargetCounts


@dataclass(frozen=True)
class Gate(ABC):
    """How many known samples a repair may break.

    `Gate.instance()`, `Gate.accuracy()` and `Gate.tolerance(limit)` make the usual ones, `Gate.parse(text)` reads
    them from text. A gate of your own is a frozen dataclass with `allowed`, `rule` and `__str__`.

    Attributes:
        needs_target: whether only broken samples in the target count (`Target.covers`), and protected ones.

    Example:
        >>> Gate.parse("tolerance:1%")
        Tolerance(limit=0.01)
        >>> Gate.tolerance(0.01).allowed(FlipCounts(kept=5_590, broken=10, repaired=40, failing=17))
        56
    """

    needs_target: ClassVar[bool] = False

    @abstractmethod
    def allowed(self, counts: FlipCounts) -> int:
        """The most broken samples that the gate lets through, given what became of all known samples."""

    @final
    def excess(self, before: SampleResults, flips: Flips) -> float:
        """By how much the broken samples exceed what is allowed, by their weights; 0 if the gate accepts them."""
        return self.excess_of(flips.counts(), self.harm(before, flips.broken))

    @final
    def excess_of(self, counts: FlipCounts, harm: float | None = None) -> float:
        """By how much broken samples exceed what is allowed; 0 if the gate accepts them.

        Args:
            counts: what became of all samples.
            harm: what the broken ones count; None: all samples count alike.

        Raises:
            ConfigurationError: the gate is about the target, and the counts are of data without one.
        """
        if harm is None and self.needs_target:
            if not isinstance(counts, TargetCounts):
                raise ConfigurationError(
                    f"`gate='{self}'`: no failures are targeted here, so nothing is in the target.",
                    "write `instance` or `tolerance:1%`.",
                )
            harm = counts.broken_in_target
        return max(0.0, (counts.broken if harm is None else harm) - self.allowed(counts))

    @final
    def harm(self, before: SampleResults, broken: Tensor) -> float:
        """What broken samples, `N` bool, count against what is allowed; infinite if a protected one is among them."""
        return before.harm(broken & (before.in_target | before.protected) if self.needs_target else broken)

    @property
    @abstractmethod
    def rule(self) -> str:
        """What the gate lets through, in words that end a sentence beginning with "the gate allows"."""

    @abstractmethod
    def __str__(self) -> str:
        """What `Gate.parse` reads."""

    @staticmethod
    def instance() -> Gate:
        """Not one known sample broken: stricter than the paper's instance level, which is about the target."""
        return Instance()

    @staticmethod
    def instance_in_target() -> Gate:
        """Not one known sample of the class to be repaired broken (instance-level suppression; paper, section III)."""
        return InstanceInTarget()

    @staticmethod
    def accuracy() -> Gate:
        """No more known samples broken than repaired (accuracy-level suppression; paper, section III)."""
        return Accuracy()

    @staticmethod
    def tolerance(limit: int | float) -> Gate:
        """A few known samples broken.

        Args:
            limit: a whole number of samples, or a fraction in [0, 1] of the samples that passed before.
        """
        return Tolerance(limit)

    @staticmethod
    def parse(gate: str | Gate, argument: str = "gate") -> Gate:
        """Reads a gate from text; a gate is given back as it is.

        Args:
            gate: `instance`, `instance-in-target`, `accuracy`, `tolerance:3` (samples), `tolerance:1%` or
                `tolerance:0.01` (of those that passed).
            argument: what it was given as, for an error.

        Raises:
            ConfigurationError: the text is none of these.
        """
        if isinstance(gate, Gate):
            return gate
        kind, _, limit = str(gate).strip().lower().partition(":")
        make = GATES.factory(argument, kind) if kind in GATES else None
        if make is None or bool(limit) != (make is Tolerance):
            raise GATES.unreadable(f"`{argument}={gate!r}`", kind)
        hint = f"write one of {list(GATES.forms)}."
        return make(read_number(f"`{argument}={gate!r}`", limit.strip(), hint)) if limit else make()


GATES: Registry[Gate] = Registry("gate", "pass a `Gate`", lambda value: isinstance(value, Gate))
"""The gates that text can name."""


@GATES.register("instance")
@dataclass(frozen=True)
class Instance(Gate):
    """Not one known sample may break."""

    def allowed(self, counts: FlipCounts) -> int:
        return 0

    @property
    def rule(self) -> str:
        return "none"

    def __str__(self) -> str:
        return "instance"


@GATES.register("instance-in-target")
@dataclass(frozen=True)
class InstanceInTarget(Gate):
    """Not one known sample in the target may break (`Target.covers`); others may, save those that are protected.

    A model that repairs one class at the price of another passes: look at `broken`, too.
    """

    needs_target: ClassVar[bool] = True

    def allowed(self, counts: FlipCounts) -> int:
        return 0

    @property
    def rule(self) -> str:
        return "none in the target"

    def __str__(self) -> str:
        return "instance-in-target"


@GATES.register("accuracy")
@dataclass(frozen=True)
class Accuracy(Gate):
    """No more known samples may break than are repaired."""

    def allowed(self, counts: FlipCounts) -> int:
        return counts.repaired

    @property
    def rule(self) -> str:
        return "as many as are repaired"

    def __str__(self) -> str:
        return "accuracy"


@GATES.register("tolerance", "tolerance:3", "tolerance:0.01", "tolerance:1%")
@dataclass(frozen=True)
class Tolerance(Gate):
    """A given number or share of the known samples that passed may break.

    Attributes:
        limit: a whole number of samples, or a fraction in [0, 1] of the samples that passed before the repair.

    Raises:
        ConfigurationError: on construction, if the limit is negative, a fraction above 1 or no number.
    """

    limit: int | float

    def __post_init__(self) -> None:
        limit = count_or_share(self.limit)
        if limit is None:
            raise ConfigurationError(
                f"`limit={self.limit!r}` is no tolerance.",
                "give a whole number of samples from 0, or a fraction in [0, 1] of the samples that passed.",
            )
        object.__setattr__(self, "limit", limit)

    def allowed(self, counts: FlipCounts) -> int:
        if isinstance(self.limit, int):
            return self.limit
        # As a decimal fraction: in binary, 29 % of 100 samples would be 28.
        return math.floor(Fraction(repr(self.limit)) * counts.passed)

    @property
    def rule(self) -> str:
        if isinstance(self.limit, int):
            return f"at most {self.limit:,}"
        return f"at most {float(Fraction(repr(self.limit)) * 100):g} % of those that passed"

    def __str__(self) -> str:
        return f"tolerance:{self.limit!r}"


def allowance(gate: Gate, counts: FlipCounts) -> str:
    """What a gate allows, in words, and how many samples that is here."""
    allowed = f"{gate.allowed(counts):,}"
    here = "" if allowed == "0" or gate.rule.endswith(allowed) else f", here {allowed}"
    return f"the gate allows {gate.rule}{here}"
