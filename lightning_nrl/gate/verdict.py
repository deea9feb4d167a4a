"""Whether a repair may be kept: the arrow from a candidate to a verdict.

A gate looks at what became of every known sample, not only of those that the search was scored on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lightning_nrl.evaluation.quotas import below
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults, TargetCounts
from lightning_nrl.gate.gates import Gate, allowance


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
    made for, and every change of weights is a risk on unseen data. The verdict is the same on every rank if the tables
    are.

    Args:
        before: the original model on all known data; its `targeted` marks what was to be repaired.
        after: the candidate on the same data, from a real forward pass of the deployed module.
        gate: how many known samples may break. One that counts for several counts as so many; a protected one may not.
        needed: how many targets of a slice must be repaired, by its name.
    """
    flips = Flips.between(before, after)
    counts, target = flips.counts(), flips.counts(before.targeted)
    lacking = below(before, flips.repaired, needed) if target.repaired else {}
    status: Literal["repaired", "refused", "not repaired"] = "repaired"
    if target.repaired == 0:
        status = "not repaired"
    elif lacking or gate.excess(before, flips):
        status = "refused"
    broken = before.ids(flips.broken)
    return Verdict(
        status=status,
        reason=_reason(status, gate, flips.target_counts(before), target, broken)
        + _unequal_counts(before, flips)
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


def check_protected(verdict: Verdict, before: SampleResults, after: SampleResults) -> Verdict:
    """The verdict on a candidate that was accepted, refused if it breaks a protected calibration sample."""
    words = _unequal_counts(before, Flips.between(before, after), "calibration ", only_protected=True)
    return replace(verdict, status="refused", reason=f"{verdict.reason}{words}") if words else verdict


def _unequal_counts(before: SampleResults, flips: Flips, kind: str = "", *, only_protected: bool = False) -> str:
    """What broken samples count, where they do not count alike; empty if they do."""
    protected = before.ids(flips.broken & before.protected)
    split = ", ".join(f"{len(ids):,} in {name}" for name, ids in protected.items() if ids)
    if split:
        return f" Protected {kind}samples may not break, and would: {split}."
    harm, n = before.harm(flips.broken), int(flips.broken.sum())
    return "" if harm == n or only_protected else f" Those that break count for {harm:,.0f}."


def _reason(status: str, gate: Gate, counts: TargetCounts, target: FlipCounts, broken: Mapping[str, list[int]]) -> str:
    if target.n == 0:
        return "No failed sample was targeted, so no change of weights is called for."
    now, breaks = ("pass now", "broke") if status == "repaired" else ("would pass", "would break")
    gain = f"{_count(target.repaired)} of {target.n:,} targeted failure{'s' if target.n != 1 else ''} {now}"
    split = ", ".join(f"{len(ids):,} in {name}" for name, ids in broken.items() if ids)
    loss = f"of {counts.passed:,} known samples that passed before, {_count(counts.broken)} {breaks}"
    loss += f" ({split})" if split else ""
    limit = allowance(gate, counts)
    if gate.needs_target:
        limit += f" ({_count(counts.broken_in_target)} of {counts.passed_in_target:,} {breaks})"
    if status == "refused":
        sentences = f"{loss}; {limit}", gain
    elif status == "repaired":
        sentences = gain, f"{loss}; {limit}"
    else:
        sentences = gain, loss
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences)


def _warning(after: SampleResults) -> str:
    n = int((~after.loss.isfinite()).sum())
    return f" The loss is not finite on {n:,} known sample{'s' if n != 1 else ''}; they count as wrong." if n else ""


def _count(n: int) -> str:
    return f"{n:,}" if n else "none"
