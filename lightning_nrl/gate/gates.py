"""Gates, their text form, and the decision on a repair."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, Literal, final

from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.slices import missed_quotas


@dataclass(frozen=True)
class Gate(ABC):
    """A limit on the number of known samples that a repair may break.

    `Gate.instance()`, `Gate.accuracy()` and `Gate.tolerance(limit)` return the usual gates;
    `Gate.parse(text)` reads a gate from text. A custom gate is a frozen dataclass that derives from
    `Gate` and has `allowed`, `rule` and `__str__`.

    Attributes:
        needs_target: True if a broken sample counts only if it is in the target (`Target.covers`)
            or protected.

    Example:
        >>> Gate.parse("tolerance:1%")
        Tolerance(limit=0.01)
        >>> Gate.tolerance(0.01).allowed(FlipCounts(kept=5_590, broken=10, repaired=40, failing=17))
        56
    """

    needs_target: ClassVar[bool] = False

    @abstractmethod
    def allowed(self, counts: FlipCounts) -> int:
        """Returns the largest number of broken samples that the gate accepts, given counts of all
        known samples.
        """

    @final
    def excess_of(self, counts: FlipCounts, cost: float | None = None) -> float:
        """Returns by how much `cost` exceeds the limit, `allowed(counts)`, or 0 if it does not
        exceed
        the limit.

        `cost` defaults to the number of broken samples in `counts`. If `needs_target` is True, this
        default only counts samples in the target and raises a `ConfigurationError` unless `counts`
        are `TargetCounts`.
        """
        if cost is None and self.needs_target:
            if not isinstance(counts, TargetCounts):
                raise ConfigurationError(
                    f"`gate='{self}'` needs a target, but none is given here.",
                    "write `instance` or `tolerance:1%`.",
                )
            cost = counts.broken_in_target
        return max(0.0, (counts.broken if cost is None else cost) - self.allowed(counts))

    @final
    def cost(self, before: SampleResults, broken: Tensor) -> float:
        """Sums the sample weights of the `broken` samples, `N` bool, that the gate counts: inf if
        one is protected.
        """
        return before.cost(
            broken & (before.in_target | before.protected) if self.needs_target else broken
        )

    @property
    @abstractmethod
    def rule(self) -> str:
        """The limit, in words that complete the sentence "the gate allows ..."."""

    @abstractmethod
    def __str__(self) -> str:
        """Returns the text that `Gate.parse` reads."""

    @staticmethod
    def instance() -> Gate:
        """Allows no broken known sample. Instance-level suppression in the paper only concerns the
        target.
        """
        return Instance()

    @staticmethod
    def instance_in_target() -> Gate:
        """Allows no broken known sample in the target (instance-level suppression; paper, section
        III).
        """
        return InstanceInTarget()

    @staticmethod
    def accuracy() -> Gate:
        """Allows as many broken as repaired known samples (accuracy-level suppression; paper,
        section III).
        """
        return Accuracy()

    @staticmethod
    def tolerance(limit: int | float) -> Gate:
        """Allows a number or a fraction of known samples to break (see `Tolerance`)."""
        return Tolerance(limit)

    @staticmethod
    def parse(gate: str | Gate, argument: str = "gate") -> Gate:
        """Reads a gate from text; returns a `Gate` unchanged. A `ConfigurationError` says that
        `argument` is wrong.

        The text is `instance`, `instance-in-target`, `accuracy`, `tolerance:3` (3 samples), or
        `tolerance:1%` or `tolerance:0.01` (1 % of the samples that passed).
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
"""Registry of the gates by name."""


@GATES.register("instance")
@dataclass(frozen=True)
class Instance(Gate):
    """Allows no broken known sample."""

    rule = "none"

    def allowed(self, counts: FlipCounts) -> int:
        return 0

    def __str__(self) -> str:
        return "instance"


@GATES.register("instance-in-target")
@dataclass(frozen=True)
class InstanceInTarget(Gate):
    """Allows no broken known sample in the target (`Target.covers`). Other samples may break unless
    they are protected.

    So the gate accepts a model that repairs one class at the expense of another: check how many
    samples break, too.
    """

    needs_target: ClassVar[bool] = True
    rule = "none in the target"

    def allowed(self, counts: FlipCounts) -> int:
        return 0

    def __str__(self) -> str:
        return "instance-in-target"


@GATES.register("accuracy")
@dataclass(frozen=True)
class Accuracy(Gate):
    """Allows as many broken known samples as repaired known samples."""

    rule = "as many as are repaired"

    def allowed(self, counts: FlipCounts) -> int:
        return counts.repaired

    def __str__(self) -> str:
        return "accuracy"


@GATES.register("tolerance", "tolerance:3", "tolerance:0.01", "tolerance:1%")
@dataclass(frozen=True)
class Tolerance(Gate):
    """Allows `limit` known samples to break: an int is their number, a float their share of the
    passed samples.
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
        # In binary floating point, 29 % of 100 samples would be 28.
        return math.floor(Fraction(repr(self.limit)) * counts.passed)

    @property
    def rule(self) -> str:
        if isinstance(self.limit, int):
            return f"at most {self.limit:,}"
        return f"at most {float(Fraction(repr(self.limit)) * 100):g} % of those that passed"

    def __str__(self) -> str:
        return f"tolerance:{self.limit!r}"


def allowance(gate: Gate, counts: FlipCounts) -> str:
    """Returns a gate's limit in words: "the gate allows at most 1 % of those that passed, here 56"."""
    allowed = f"{gate.allowed(counts):,}"
    here = "" if allowed == "0" or gate.rule.endswith(allowed) else f", here {allowed}"
    return f"the gate allows {gate.rule}{here}"


Status = Literal["repaired", "refused", "not repaired"]


@dataclass(frozen=True)
class GateDecision:
    """The decision whether new weights replace the weights before the repair, and why.

    `status` is `repaired`, `refused` (the gate does not accept the new weights), or `not repaired`
    (no targeted sample is right with the new weights). `counts` count all known samples.
    """

    status: Status
    reason: str
    counts: TargetCounts

    @property
    def accepted(self) -> bool:
        return self.status == "repaired"


def judge(
    before: SampleResults,
    after: SampleResults,
    gate: Gate,
    needed: Mapping[str, int] = MappingProxyType({}),
) -> GateDecision:
    """Decides whether new weights are accepted. All known samples count, even if the search did not
    score them.

    New weights that repair no targeted sample are not accepted, since any change of weights is a
    risk on unseen data. Ranks with equal results decide alike.

    Args:
        before: results of the model before the repair on all known data; the mask `targeted` marks
            samples to repair.
        after: results of the new weights on the same data, from a forward pass of the deployed
            module.
        gate: limit on the cost of broken known samples. Protected samples may never break.
        needed: quotas, which map the name of a slice to the minimum number of its targets to
            repair.
    """
    flips = Flips.between(before, after)
    counts = flips.target_counts(before)
    lacking = missed_quotas(before, flips.repaired, needed) if counts.repaired_in_target else {}
    status: Status = "repaired"
    if counts.repaired_in_target == 0:
        status = "not repaired"
    elif lacking or gate.excess_of(counts, gate.cost(before, flips.broken)):
        status = "refused"
    reason = _reason(status, gate, counts, before.ids(flips.broken)) + _unequal_counts(
        before, flips
    )
    for name, (got, need) in lacking.items():
        verb = "is" if got == 1 else "are"
        reason += f" Of the slice {name!r} {_count(got)} {verb} repaired; its quota is {need:,}."
    infinite = int((~after.loss.isfinite()).sum())
    if infinite:
        plural = "s" if infinite != 1 else ""
        reason += (
            f" The loss is not finite on {infinite:,} known sample{plural}; they count as wrong."
        )
    return GateDecision(status, reason, counts)


def check_protected(
    decision: GateDecision, before: SampleResults, after: SampleResults
) -> GateDecision:
    """Returns `decision`, or a refusal if the results on calibration data show that a protected
    sample breaks.
    """
    words = _unequal_counts(
        before, Flips.between(before, after), "calibration ", only_protected=True
    )
    return (
        replace(decision, status="refused", reason=f"{decision.reason}{words}")
        if words
        else decision
    )


def _unequal_counts(
    before: SampleResults, flips: Flips, kind: str = "", *, only_protected: bool = False
) -> str:
    """Returns a sentence on protected samples that broke, or on a cost that is not the number of
    broken samples.
    """
    protected = before.ids(flips.broken & before.protected)
    if any(protected.values()):
        return f" Protected {kind}samples would break: {_by_split(protected)}."
    cost, n = before.cost(flips.broken), int(flips.broken.sum())
    return (
        ""
        if cost == n or only_protected
        else f" The weights of the broken samples add up to {cost:,.0f}."
    )


def _reason(
    status: Status, gate: Gate, counts: TargetCounts, broken: Mapping[str, list[int]]
) -> str:
    n = counts.targeted
    if n == 0:
        return "No failed sample is targeted, so the weights stay as they are."
    now, breaks = ("pass now", "broke") if status == "repaired" else ("would pass", "would break")
    gain = f"{_count(counts.repaired_in_target)} of {n:,} targeted failure{'s' if n != 1 else ''} {now}"
    loss = (
        f"of {counts.passed:,} known samples that passed before, {_count(counts.broken)} {breaks}"
    )
    loss += f" ({_by_split(broken)})" if counts.broken else ""
    limit = allowance(gate, counts)
    if gate.needs_target:
        limit += f" ({_count(counts.broken_in_target)} of {counts.passed_in_target:,} {breaks})"
    sentences = {
        "refused": (f"{loss}; {limit}", gain),
        "repaired": (gain, f"{loss}; {limit}"),
        "not repaired": (gain, loss),
    }[status]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences)


def _by_split(ids: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{len(rows):,} in {name}" for name, rows in ids.items() if rows)


def _count(n: int) -> str:
    return f"{n:,}" if n else "none"
