"""The verdict on a repair: whether it kept its promise on known data, and whether the model is better elsewhere."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report._formatting import count, plural
from lightning_nrl.report.page import Tone
from lightning_nrl.report.run_records import RepairRecord
from lightning_nrl.report.splits import pool
from lightning_nrl.report.stats import Evidence, evidence_of, sign_test
from lightning_nrl.report.tables import Fact, points_of

EvidenceSource = Literal["unseen", "held-out", "none"]
EVIDENCE_TONES: dict[Evidence, Tone] = {"better": "good", "no difference shown": "warn", "worse": "bad"}
MOST_TIMES_MORE = 50
"""As many times more samples as are asked for to show a difference."""
LARGE_GAIN = 2.0
"""Percentage points on held-out samples for which a looser gate is named."""
GIVE_UNSEEN = 'count it on data that the repair never looks at: `unseen="test"`'


@dataclass(frozen=True)
class Verdict:
    """Two answers on a repair: did it keep its promise on known data, and is the model better on other data?

    Attributes:
        headline: both answers in one line.
        kept: whether the gate's promise was kept by weights that changed.
        promise: the same in words, with figures.
        evidence: `better`, `no difference shown` or `worse`: an exact two-sided sign test of repaired against broken
            samples, at a level of 5 %. In an update it compares the new model with the one that it replaces.
        source: `unseen` data, `held-out` samples of the taken rung where there are none, or `none`.
        repaired: samples that were wrong and are right now; likewise `broken`, of all `n` that were counted.
        p_value: of the sign test. Unseen samples that are known too count as repaired only as far as others broke.
        advice: what to do.
        tone: `good`, `warn` for no difference, no evidence or no repair, `bad` for worse.
    """

    headline: str
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
        """The promise, the evidence and the advice, each in a sentence."""
        evidence = f"{self.evidence}: no unseen data were given" if self.kept else "none: the weights are unchanged"
        if self.source != "none":
            p = f"p = {self.p_value:.2g}" if self.p_value >= 0.0001 else "p < 0.0001"
            flips = f"{count(self.repaired)} repaired, {count(self.broken)} broken"
            evidence = f"{self.evidence}: {flips} of {plural(self.n, f'{self.source} sample')} (sign test, {p})"
        return ("promise", self.promise), ("evidence", evidence), ("advice", self.advice)


def verdict_on(report: RepairRecord) -> Verdict:
    """The verdict on a repair, from the counts of its report."""
    kept = report.status == "repaired"
    source, counts = _counted(report)
    repaired, broken, n = (0, 0, 0) if counts is None else (counts.repaired, counts.broken, counts.n)
    leaked = sum(report.leaked.values()) if source == "unseen" else 0
    sure = max(repaired - leaked, min(repaired, broken))
    evidence = evidence_of(sure, broken)
    answers = "promise kept" if kept else "the weights are unchanged"
    if source != "none":
        where = "unseen data" if source == "unseen" else "held-out samples"
        beside = (
            f" {'from' if evidence == 'no difference shown' else 'than'} the replaced model" if report.update else ""
        )
        answers += f", {evidence} on {where}{beside}"
    elif kept:
        answers += ", not counted on unseen data"
    tone = EVIDENCE_TONES[evidence]
    if not kept and tone != "bad":
        tone = "good" if report.status == "nothing to repair" else "warn"
    advice = _advice(report, evidence, source, (sure, broken))
    if evidence != "worse" and (looser := _looser_gate(report)):
        advice += f". {looser}"
    return Verdict(
        headline=f"{report.status.capitalize()}: {answers}",
        kept=kept,
        promise=_promise(report),
        evidence=evidence,
        source=source,
        repaired=repaired,
        broken=broken,
        n=n,
        p_value=sign_test(sure, broken),
        advice=advice,
        tone=tone,
    )


def _counted(report: RepairRecord) -> tuple[EvidenceSource, FlipCounts | None]:
    update = report.pooled_update("unseen")
    unseen = update.now if update is not None else None if report.update else report.pooled("unseen")
    if unseen is not None and unseen.n and (report.update or report.status == "repaired"):
        return "unseen", unseen.counts
    held_out = None if report.update or report.status != "repaired" else report.held_out
    return ("none", None) if held_out is None else ("held-out", held_out)


def _promise(report: RepairRecord) -> str:
    known = pool(report.candidate) if report.candidate else report.pooled("known")
    if report.status == "nothing to repair" or known is None:
        return "kept" if report.status == "repaired" else "none was needed: the weights are unchanged"
    broken = f"{count(known.broken) if known.broken else 'none'} of {count(known.passed)} known samples that were right"
    if report.status == "repaired":
        return f"kept: {broken} broke" + (f", within the gate `{report.gate}`" if known.broken else "")
    found = f"the change that was found would break {broken}" if report.candidate else "no repair was found"
    return f"not kept: {found}; the weights are unchanged, so nothing broke"


def _advice(report: RepairRecord, evidence: Evidence, source: EvidenceSource, flips: tuple[int, int]) -> str:
    if report.update and evidence == "worse":
        return "do not ship the new model; keep the one that it would replace"
    if report.status != "repaired":
        return _advice_without_repair(report)
    if evidence == "better":
        more = "" if source == "unseen" else f"; first {GIVE_UNSEEN}"
        return f"the model may ship, as far as these data go{more}"
    if evidence == "worse":
        return f"do not ship it; {_way_back(report)}"
    if source != "unseen":
        return GIVE_UNSEEN
    if report.leaked:
        return "take the samples that are known too out of the unseen data, and count again"
    times = next(
        (k for k in range(2, MOST_TIMES_MORE + 1) if evidence_of(k * flips[0], k * flips[1]) != evidence), None
    )
    if times is None:
        return "look at the unseen samples that broke; more of them will hardly show a difference"
    return f"give more unseen data: {times} times as many would show a difference of this size"


def _advice_without_repair(report: RepairRecord) -> str:
    if report.status == "nothing to repair":
        return "keep the model as it is"
    broken = sum(split.broken for split in report.candidate)
    if broken:
        return f'keep the model as it is, or allow what would break: `gate="tolerance:{broken}"`'
    return "keep the model as it is; `diagnose` says which failures can be repaired"


def _way_back(report: RepairRecord) -> str:
    patch, checkpoint = (report.files.get(kind) for kind in ("patch", "checkpoint"))
    if patch is None or checkpoint is None:
        return "the checkpoint from before the repair holds the old weights"
    paths = f"--patch {shlex.quote(patch)} --ckpt {shlex.quote(checkpoint)}"
    return f"to write the model from before the repair: `lightning-nrl revert {paths} --out original.ckpt`"


def _looser_gate(report: RepairRecord) -> str:
    """Names the gate that would have repaired twice as many targets, or gained more on held-out samples."""
    known = report.pooled("known")
    if known is None:
        return ""
    gained = 0.0 if report.held_out is None else points_of(report.held_out)
    for point in report.price:
        if point.held_out is None or point.broken <= known.broken:
            continue
        more = points_of(point.held_out) - gained
        doubled = point.repaired_in_target >= max(1, 2 * known.repaired_in_target) and more >= 0
        if doubled or (report.held_out is not None and more >= LARGE_GAIN):
            limit = f"{100 * point.allowed:g}%" if point.allowed < 1 else str(point.broken)
            targets = f"{plural(point.repaired_in_target, 'target')} instead of {count(known.repaired_in_target)}"
            return (
                f"A looser gate would have repaired {targets} and broken {plural(point.broken, 'known sample')}, with "
                f'{more:+.1f} points on held-out samples: `gate="tolerance:{limit}"`'
            )
    return ""
