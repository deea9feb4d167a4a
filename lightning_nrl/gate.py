"""Gates: limits on the known samples that a repair may break, their text form, and the decision."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, Literal, final

from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl._utils.formatting import exact_percent, plural
from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.slices import missed_quotas

__all__ = [
    "GATES",
    "Accuracy",
    "Gate",
    "GateDecision",
    "Instance",
    "InstanceInTarget",
    "Tolerance",
    "check_protected",
    "judge",
]


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
        """Returns the largest number of broken samples that the gate accepts.

        `counts` are the counts of all known samples.
        """

    @final
    def excess_of(self, counts: FlipCounts, cost: float | None = None) -> float:
        """Returns by how much `cost` exceeds the limit, `allowed(counts)`, or 0 if it does not.

        A limit that is not finite allows nothing: every cost exceeds it by inf.

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
        elif cost is None:
            cost = counts.broken
        allowed = self.allowed(counts)
        if not math.isfinite(allowed):
            return math.inf
        return max(0.0, cost - allowed)

    @final
    def cost(self, before: SampleResults, broken: Tensor) -> float:
        """Sums the weights of the `broken` samples, `N` bool, that the gate counts.

        The sum is inf if one of them is protected.
        """
        if self.needs_target:
            broken = broken & (before.in_target | before.protected)
        return before.cost(broken)

    @property
    @abstractmethod
    def rule(self) -> str:
        """The limit, in words that complete the sentence "the gate allows ..."."""

    @abstractmethod
    def __str__(self) -> str:
        """Returns the text that `Gate.parse` reads."""

    @staticmethod
    def instance() -> Gate:
        """Allows no broken known sample.

        Instance-level suppression in the paper only concerns the target.
        """
        return Instance()

    @staticmethod
    def instance_in_target() -> Gate:
        """Allows no broken known sample in the target.

        This is instance-level suppression (paper, section III).
        """
        return InstanceInTarget()

    @staticmethod
    def accuracy() -> Gate:
        """Allows as many broken as repaired known samples.

        This is accuracy-level suppression (paper, section III).
        """
        return Accuracy()

    @staticmethod
    def tolerance(limit: int | float) -> Gate:
        """Allows a number or a fraction of known samples to break (see `Tolerance`)."""
        return Tolerance(limit)

    @staticmethod
    def parse(gate: str | Gate, argument: str = "gate") -> Gate:
        """Reads a gate from text; returns a `Gate` unchanged.

        The text is `instance`, `instance-in-target`, `accuracy`, `tolerance:3` (3 samples),
        `tolerance:1%` or `tolerance:0.01` (1 % of the samples that passed), or the name of a
        registered gate. A number after the colon is the gate's argument; `1.0` is refused, which
        may be 1 or 100 %.

        Raises:
            ConfigurationError: the text is no gate. The message names `argument`.
        """
        if isinstance(gate, Gate):
            return gate
        quoted = f"`{argument}={gate!r}`"
        name, _, limit = str(gate).strip().lower().partition(":")
        if name not in GATES:
            raise GATES.unreadable(quoted, name)
        arguments = []
        if limit:
            hint = f"write one of {list(GATES.forms)}."
            arguments.append(read_number(quoted, limit.strip(), hint))
        make = GATES.factory(argument, name)
        try:
            inspect.signature(make).bind(*arguments)
        except TypeError:
            raise GATES.unreadable(quoted, name) from None
        return make(*arguments)


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
    """Allows no broken known sample in the target (`Target.covers`).

    Other samples may break unless they are protected. So the gate accepts a model that repairs one
    class at the expense of another: check how many samples break, too.
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


@GATES.register("tolerance", "tolerance:3", "tolerance:1%")
@dataclass(frozen=True)
class Tolerance(Gate):
    """Allows `limit` known samples to break: a number, or a share of the samples that passed."""

    limit: int | float  # a number as int, a share as float

    def __post_init__(self) -> None:
        limit = count_or_share(self.limit)
        if limit is None:
            raise ConfigurationError(
                f"`limit={self.limit!r}` is no tolerance.",
                "give a whole number of samples from 0, "
                "or a fraction in [0, 1] of the samples that passed.",
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
        if isinstance(self.limit, int):
            return f"tolerance:{self.limit}"
        return f"tolerance:{exact_percent(self.limit)}"


def allowance(gate: Gate, counts: FlipCounts) -> str:
    """Formats a gate's limit: "the gate allows at most 1 % of those that passed, here 56"."""
    allowed = f"{gate.allowed(counts):,}"
    if not math.isfinite(gate.allowed(counts)):
        return f"the gate allows {allowed}, which is no number of samples"
    limit = f"the gate allows {gate.rule}"
    if allowed == "0" or gate.rule.endswith(allowed):
        return limit
    return f"{limit}, here {allowed}"


DecisionStatus = Literal["repaired", "refused", "not repaired"]


@dataclass(frozen=True)
class GateDecision:
    """The decision whether new weights replace the weights before the repair, and why.

    `status` is `repaired`, `refused` (the gate does not accept the new weights), or `not repaired`
    (no targeted sample is right with the new weights). `counts` count all known samples.
    """

    status: DecisionStatus
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
    """Decides whether new weights are accepted.

    All known samples count, even if the search did not score them. New weights that repair no
    targeted sample are not accepted, since any change of weights is a risk on unseen data. Ranks
    with equal results decide alike.

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
    missed = missed_quotas(before, flips.repaired, needed)
    status: DecisionStatus = "repaired"
    if counts.repaired_in_target == 0:
        status, missed = "not repaired", {}  # the quotas of an unrepaired model say nothing new
    elif missed or gate.excess_of(counts, gate.cost(before, flips.broken)):
        status = "refused"
    sentences = [
        *_main_sentences(status, gate, counts, before.ids(flips.broken)),
        _protected_sentence(before, flips),
    ]
    cost = before.cost(flips.broken)
    if not sentences[-1] and cost != int(flips.broken.sum()):
        sentences.append(f"The weights of the broken samples add up to {cost:,.0f}.")
    for name, (repaired, quota) in missed.items():
        verb = "is" if repaired == 1 else "are"
        sentences.append(
            f"Of the slice {name!r} {_count(repaired)} {verb} repaired; its quota is {quota:,}."
        )
    infinite = int((~after.loss.isfinite()).sum())
    if infinite:
        samples = plural(infinite, "known sample")
        sentences.append(f"The loss is not finite on {samples}; they count as wrong.")
    return GateDecision(status, " ".join(filter(None, sentences)), counts)


def check_protected(
    decision: GateDecision, before: SampleResults, after: SampleResults
) -> GateDecision:
    """Returns `decision`, or a refusal if a protected sample of the calibration data breaks."""
    sentence = _protected_sentence(before, Flips.between(before, after), "calibration ")
    if not sentence:
        return decision
    return replace(decision, status="refused", reason=f"{decision.reason} {sentence}")


def _protected_sentence(before: SampleResults, flips: Flips, kind: str = "") -> str:
    ids = before.ids(flips.broken & before.protected)
    if not any(ids.values()):
        return ""
    return f"Protected {kind}samples would break: {_by_split(ids)}."


def _main_sentences(
    status: DecisionStatus, gate: Gate, counts: TargetCounts, broken: Mapping[str, list[int]]
) -> list[str]:
    """Says what new weights repair and what they break, the reason for the decision first."""
    if counts.targeted == 0:
        return ["No failed sample is targeted, so the weights stay as they are."]
    pass_now, broke = "would pass", "would break"
    if status == "repaired":
        pass_now, broke = "pass now", "broke"
    repaired = _count(counts.repaired_in_target).capitalize()
    gain = f"{repaired} of {plural(counts.targeted, 'targeted failure')} {pass_now}"
    loss = f"Of {counts.passed:,} known samples that passed before, {_count(counts.broken)} {broke}"
    if counts.broken:
        loss += f" ({_by_split(broken)})"
    if status == "not repaired":
        return [f"{gain}.", f"{loss}."]
    loss += f"; {allowance(gate, counts)}"
    if gate.needs_target:
        in_target = f"{_count(counts.broken_in_target)} of {counts.passed_in_target:,}"
        loss += f" ({in_target} {broke})"
    sentences = [f"{gain}.", f"{loss}."]
    if status == "refused":
        sentences.reverse()
    return sentences


def _by_split(ids: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{len(rows):,} in {name}" for name, rows in ids.items() if rows)


def _count(n: int) -> str:
    return f"{n:,}" if n else "none"
