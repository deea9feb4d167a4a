"""Whether a repair may be kept: the arrow from a candidate to a verdict.

A gate looks at what became of every known sample, not only of those that the search was scored on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.evaluation.flips import FlipCounts, Flips
from lightning_nrl.evaluation.quotas import below
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = [
    "GATES",
    "Accuracy",
    "Gate",
    "Instance",
    "Tolerance",
    "Verdict",
    "allowance",
    "judge",
    "read_number",
    "spared",
]


@dataclass(frozen=True)
class Gate(ABC):
    """How many known samples a repair may break.

    `Gate.instance()`, `Gate.accuracy()` and `Gate.tolerance(limit)` make the usual ones, `Gate.parse(text)` reads
    them from text. A gate of your own is a frozen dataclass with `allowed`, `rule` and `__str__`.

    Example:
        >>> Gate.parse("tolerance:1%")
        Tolerance(limit=0.01)
        >>> Gate.tolerance(0.01).allowed(FlipCounts(kept=5_590, broken=10, repaired=40, failing=17))
        56
    """

    @abstractmethod
    def allowed(self, counts: FlipCounts) -> int:
        """The most broken samples that the gate lets through, given what became of all known samples."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """What the gate lets through, in words that end a sentence beginning with "the gate allows"."""

    @abstractmethod
    def __str__(self) -> str:
        """What `Gate.parse` reads."""

    @staticmethod
    def instance() -> Gate:
        """Not one known sample broken (instance-level suppression; paper, section III)."""
        return Instance()

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
            gate: `instance`, `accuracy`, `tolerance:3` (samples),
                `tolerance:0.01` or `tolerance:1%` (of those that passed).
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
        return make(_number(limit.strip(), gate, argument)) if limit else make()


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
        object.__setattr__(self, "limit", _checked_limit(self.limit))

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


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may replace the original weights, and why.

    Attributes:
        status: `repaired`, `refused` by the gate, or `not repaired` since no targeted sample was.
        reason: why, in a sentence or two, with figures.
        gate: the gate, as text.
        counts: what became of all known samples.
        target: what became of the targeted ones (I_neg); its `kept` and `broken` are 0.
        repaired: data-set positions of the repaired samples, by split.
        broken: data-set positions of the broken samples, by split.
    """

    status: Literal["repaired", "refused", "not repaired"]
    reason: str
    gate: str
    counts: FlipCounts
    target: FlipCounts
    repaired: dict[str, list[int]]
    broken: dict[str, list[int]]

    @property
    def accepted(self) -> bool:
        """Whether the candidate's weights are to be written into the model."""
        return self.status == "repaired"


def judge(
    before: SampleResults, after: SampleResults, gate: Gate, needed: Mapping[str, int] = MappingProxyType({})
) -> Verdict:
    """Judges a candidate by what became of all known samples, whether or not the search was scored on them.

    A candidate that repairs no targeted sample is not accepted, whatever else it repairs: it does not do what it was
    made for, and every change of weights is a risk on unseen data.

    Args:
        before: the original model on all known data; its `targeted` marks what was to be repaired.
        after: the candidate on the same data, from a real forward pass of the deployed module.
        gate: how many known samples may break. One that counts for several counts as so many; a protected one may not.
        needed: how many targets of a slice must be repaired, by its name.

    Returns:
        The verdict, the same on every rank if the tables are.

    Raises:
        EvaluationError: the tables are not about the same samples in the same order.
    """
    flips = Flips.between(before, after)
    counts, target = flips.counts(), flips.counts(before.targeted)
    lacking = below(before, flips.repaired, needed) if target.repaired else {}
    status: Literal["repaired", "refused", "not repaired"] = "repaired"
    if target.repaired == 0:
        status = "not repaired"
    elif lacking or before.harm(flips.broken) > gate.allowed(counts):
        status = "refused"
    broken = before.ids(flips.broken)
    return Verdict(
        status=status,
        reason=_reason(status, gate, counts, target, broken)
        + _counted(before, flips)
        + "".join(
            f" Of the slice {name!r} {_count(got)} {'is' if got == 1 else 'are'} repaired; its quota is {need:,}."
            for name, (got, need) in lacking.items()
        )
        + _warning(after),
        gate=str(gate),
        counts=counts,
        target=target,
        repaired=before.ids(flips.repaired),
        broken=broken,
    )


def spared(verdict: Verdict, before: SampleResults, after: SampleResults) -> Verdict:
    """The verdict on a candidate that was accepted, refused if it breaks a protected calibration sample."""
    words = _counted(before, Flips.between(before, after), "calibration ", only_protected=True)
    return replace(verdict, status="refused", reason=f"{verdict.reason}{words}") if words else verdict


def _counted(before: SampleResults, flips: Flips, kind: str = "", *, only_protected: bool = False) -> str:
    """What broken samples count, where they do not count alike; empty if they do."""
    protected = before.ids(flips.broken & before.protected)
    split = ", ".join(f"{len(ids):,} in {name}" for name, ids in protected.items() if ids)
    if split:
        return f" Protected {kind}samples may not break, and would: {split}."
    harm, n = before.harm(flips.broken), int(flips.broken.sum())
    return "" if harm == n or only_protected else f" Those that break count for {harm:,.0f}."


def _reason(status: str, gate: Gate, counts: FlipCounts, target: FlipCounts, broken: Mapping[str, list[int]]) -> str:
    if target.n == 0:
        return "No failed sample was targeted, so no change of weights is called for."
    happen, breaks = ("pass now", "broke") if status == "repaired" else ("would pass", "would break")
    gain = f"{_count(target.repaired)} of {target.n:,} targeted failure{'s' if target.n != 1 else ''} {happen}"
    split = ", ".join(f"{len(ids):,} in {name}" for name, ids in broken.items() if ids)
    loss = f"of {counts.passed:,} known samples that passed before, {_count(counts.broken)} {breaks}"
    loss += f" ({split})" if split else ""
    limit = allowance(gate, counts)
    if status == "refused":
        sentences = f"{loss}; {limit}", gain
    elif status == "repaired":
        sentences = gain, f"{loss}; {limit}"
    else:
        sentences = gain, loss
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences)


def allowance(gate: Gate, counts: FlipCounts) -> str:
    """What a gate allows, in words, and how many samples that is here."""
    allowed = f"{gate.allowed(counts):,}"
    here = "" if allowed == "0" or gate.rule.endswith(allowed) else f", here {allowed}"
    return f"the gate allows {gate.rule}{here}"


def _warning(after: SampleResults) -> str:
    n = int((~after.loss.isfinite()).sum())
    return f" The loss is not finite on {n:,} known sample{'s' if n != 1 else ''}; they count as wrong." if n else ""


def _count(n: int) -> str:
    return f"{n:,}" if n else "none"


def read_number(text: str) -> int | float:
    """A whole number, or a share, also in percent.

    Raises:
        ValueError: it is none.
    """
    if text.endswith("%"):
        return float(Fraction(text[:-1].strip()) / 100)
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _number(text: str, gate: str, argument: str) -> int | float:
    try:
        return read_number(text)
    except ValueError as error:
        raise ConfigurationError(
            explain(f"`{argument}={gate!r}`: {text!r} is no number.", f"write one of {list(GATES.forms)}.")
        ) from error


def _checked_limit(limit: int | float) -> int | float:
    if isinstance(limit, Integral) and not isinstance(limit, bool) and limit >= 0:
        return int(limit)
    if isinstance(limit, Real) and not isinstance(limit, Integral) and 0 <= limit <= 1:
        return float(limit)
    raise ConfigurationError(
        explain(
            f"`limit={limit!r}` is no tolerance.",
            "give a whole number of samples from 0, or a fraction in [0, 1] of the samples that passed.",
        )
    )
