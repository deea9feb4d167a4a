"""The verdict on a repair: the gate's promise on known data, and evidence on other data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_nrl._utils.formatting import count, plural
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records.repair_record import RepairRecord
from lightning_nrl.records.splits import SplitReport, pool
from lightning_nrl.records.stats import Evidence, evidence_of, sign_test
from lightning_nrl.report.page import Tone
from lightning_nrl.report.tables import Fact, points_of

EvidenceSource = Literal["unseen", "held-out", "none"]
EVIDENCE_TONES: dict[Evidence, Tone] = {
    "better": "good",
    "no difference shown": "warn",
    "worse": "bad",
}
NOT_COUNTED = TargetCounts(0, 0, 0, 0)
MOST_TIMES_MORE = 10  # advice asks for at most this many times as many unseen data
LARGE_GAIN = 2.0  # gain on held-out samples, in percentage points, that justifies a looser gate
GIVE_UNSEEN = 'count it on data that the repair never looks at: `unseen="test"`'


@dataclass(frozen=True)
class Verdict:
    """The promise of a repair on known data, and the evidence on other data.

    Attributes:
        headline: status, promise and evidence in one line.
        answers: the headline without the status.
        kept: True if weights changed and the gate's promise is kept.
        promise: the promise in words, with figures.
        evidence: `better`, `no difference shown` or `worse`, by an exact two-sided sign test of
            repaired against broken samples at 5 %. It is also `worse` if one unseen split is worse.
            Updates compare with the replaced model.
        source: data of the evidence: `unseen` data or, without these, `held-out` samples (known
            samples that the taken rung did not use). `none` if there are neither.
        repaired: number of repaired samples in these data. `broken` and `n` count broken and all
            samples. If one unseen split alone makes the evidence `worse`, the three numbers are of
            this split.
        p_value: p-value of the sign test, with a Bonferroni correction if the data chose among
            several results. The test subtracts the number of leaked samples from `repaired`, but
            does not go below `broken`.
        advice: what to do next.
        tone: `bad` if the evidence is `worse`, `good` if a repair is `better` or not needed,
            otherwise `warn`.
    """

    headline: str
    answers: str
    kept: bool
    promise: str
    evidence: Evidence
    source: EvidenceSource
    repaired: int
    broken: int
    n: int
    p_value: float
    advice: str
    tone: Tone

    @property
    def facts(self) -> tuple[Fact, ...]:
        evidence = (
            f"{self.evidence}: no unseen data were given"
            if self.kept
            else "none: the weights are unchanged"
        )
        if self.source != "none":
            p = f"p = {self.p_value:.2g}" if self.p_value >= 0.0001 else "p < 0.0001"
            flips = f"{count(self.repaired)} repaired, {count(self.broken)} broken"
            evidence = f"{self.evidence}: {flips} of {plural(self.n, f'{self.source} sample')} (sign test, {p})"
        return ("promise", self.promise), ("evidence", evidence), ("advice", self.advice)


def verdict_on(report: RepairRecord) -> Verdict:
    """Derives the verdict on a repair from the counts of its report."""
    kept, unseen, held_out = (
        report.status == "repaired",
        report.unseen,
        None if report.update else report.held_out,
    )
    found = held_out if unseen is None else unseen.counts
    source: EvidenceSource = "none" if found is None else "held-out" if unseen is None else "unseen"
    counts = found or NOT_COUNTED
    leaked = sum(report.leaked.values()) if source == "unseen" else 0
    flips = max(counts.repaired - leaked, min(counts.repaired, counts.broken)), counts.broken
    choices = report.n_estimates if source == "held-out" else 1
    evidence: Evidence = evidence_of(*flips, choices)
    worst, n_splits = _worst_split(report.unseen_splits), len(report.unseen_splits)
    if (
        worst is not None
        and evidence != "worse"
        and evidence_of(*_flips(worst), n_splits) == "worse"
    ):
        # The sum over all unseen splits would hide that one of them is worse.
        evidence, counts, flips, choices = "worse", worst.counts, _flips(worst), n_splits
    answers = "promise kept" if kept else "the weights are unchanged"
    if source != "none":
        where = (
            f"unseen data ({worst.split})"
            if worst is not None and counts is worst.counts
            else "unseen data"
        )
        answers += f", {evidence} on {where if source == 'unseen' else 'held-out samples'}"
        if report.update:
            answers += (
                f" {'from' if evidence == 'no difference shown' else 'than'} the replaced model"
            )
    elif kept:
        answers += ", not counted on unseen data"
    tone = EVIDENCE_TONES[evidence]
    if report.status == "nothing to repair":
        tone = "good" if source == "none" else tone
    elif not kept and tone != "bad":
        tone = "warn"
    return Verdict(
        headline=f"{report.status.capitalize()}: {answers}",
        answers=answers,
        kept=kept,
        promise=_promise(report),
        evidence=evidence,
        source=source,
        repaired=counts.repaired,
        broken=counts.broken,
        n=counts.n,
        p_value=sign_test(*flips, choices),
        advice=_advice(report, evidence, source, flips),
        tone=tone,
    )


def _flips(split: SplitReport) -> tuple[int, int]:
    return split.counts.repaired, split.counts.broken


def _worst_split(splits: Sequence[SplitReport]) -> SplitReport | None:
    """Compares several splits. Returns the one with the lowest p-value that breaks more than it
    repairs, or None.
    """
    losing = [split for split in splits if split.counts.broken > split.counts.repaired]
    return (
        min(losing, key=lambda split: sign_test(*_flips(split)), default=None)
        if len(splits) > 1
        else None
    )


def _known(report: RepairRecord) -> TargetCounts:
    known = report.pooled("known")
    return NOT_COUNTED if known is None else known.counts


def _promise(report: RepairRecord) -> str:
    if report.status == "nothing to repair":
        return "none was needed: the weights are unchanged"
    counts = pool(report.candidate).counts if report.candidate else _known(report)
    n_broken = count(counts.broken) if counts.broken else "none"
    broken = f"{n_broken} of {count(counts.passed)} known samples that were right"
    if report.status == "repaired":
        return f"kept: {broken} broke" + (
            f", within the gate `{report.gate}`" if counts.broken else ""
        )
    found = f"the change found would break {broken}" if report.candidate else "no repair was found"
    return f"not kept: {found}; the weights are unchanged, so nothing broke"


def _advice(
    report: RepairRecord, evidence: Evidence, source: EvidenceSource, flips: tuple[int, int]
) -> str:
    if evidence == "worse":
        if report.update:
            return "do not ship the new model; keep the one that it would replace"
        return f"do not ship it; {_revert_hint(report)}"
    looser = _looser_gate_hint(report)
    if report.status == "nothing to repair":
        return "keep the model as it is"
    if report.status != "repaired":
        return f"keep the model as it is; `diagnose` says which failures can be repaired{looser}"
    if evidence == "better":
        return f"it may ship, as far as these data go{'' if source == 'unseen' else f'; first {GIVE_UNSEEN}'}{looser}"
    if source != "unseen":
        return GIVE_UNSEEN + looser
    if report.leaked:
        return f"remove the known samples from the unseen data and count again{looser}"
    for times in range(2, MOST_TIMES_MORE + 1):
        if evidence_of(*(times * n for n in flips)) != evidence:
            return f"give more unseen data: {times} times as many would show a difference of this size{looser}"
    return f"look at the unseen samples that broke; more data will hardly show a difference{looser}"


def _revert_hint(report: RepairRecord) -> str:
    patch, checkpoint = (report.files.get(kind) for kind in ("patch", "checkpoint"))
    if patch is None or checkpoint is None:
        return "the checkpoint from before the repair holds the old weights"
    paths = f"--patch {shlex.quote(patch)} --ckpt {shlex.quote(checkpoint)}"
    return f"to write the model from before the repair: `lightning-nrl revert {paths} --out original.ckpt`"


def _looser_gate_hint(report: RepairRecord) -> str:
    """Suggests a gate that would have repaired twice as many targets or gained more on held-out
    data, or returns "".
    """
    known = _known(report)
    gained = None if report.held_out is None else points_of(report.held_out)
    for point in report.price:
        if point.held_out is None or point.broken <= known.broken:
            continue
        more = points_of(point.held_out) - (gained or 0.0)
        doubled = point.repaired_in_target >= max(1, 2 * known.repaired_in_target) and more >= 0
        if doubled or (gained is not None and more >= LARGE_GAIN):
            limit = f"{100 * point.allowed:g}%" if point.allowed < 1 else str(point.broken)
            targets = f"{plural(point.repaired_in_target, 'target')} instead of {count(known.repaired_in_target)}"
            price = f"broken {plural(point.broken, 'known sample')}"
            gain = f"gained {more:.1f} points more on held-out samples"
            return f'. A looser gate would have repaired {targets}, {price} and {gain}: `gate="tolerance:{limit}"`'
    return ""
