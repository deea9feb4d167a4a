"""The verdict on a repair: the gate's promise on known data, and evidence on other data."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from lightning_nrl._utils.formatting import plural
from lightning_nrl.evaluation.sample_results import GroupCounts, TargetCounts
from lightning_nrl.evaluation.stats import Evidence
from lightning_nrl.records import RepairRecord, pool
from lightning_nrl.records.evidence import (
    EvidenceSource,
    RepairEvidence,
    evidence_on,
    worthwhile_price,
)
from lightning_nrl.report.page import Tone
from lightning_nrl.report.tables import Fact

EVIDENCE_TONES: dict[Evidence, Tone] = {
    "better": "good",
    "no difference shown": "warn",
    "worse": "bad",
}
EVIDENCE_NAMES = {"unseen": "unseen data", "held-out": "held-out samples"}
MOST_TIMES_MORE = 10  # advice asks for at most this many times as many unseen data
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
            samples that the kept rung did not use). `none` if there are neither.
        repaired: number of repaired samples in these data. `broken` and `n` count broken and all
            samples. If one unseen split alone makes the evidence `worse`, the three numbers are of
            this split.
        p_value: p-value of the sign test, with a Bonferroni correction if the data chose among
            several results.
        advice: what to do next.
        groups: counts of groups in these data, from which the test takes `better` and `worse`. None
            if samples have no groups. `test_units` names what is counted.
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
    groups: GroupCounts | None = None
    test_units: str = "groups"

    @property
    def facts(self) -> tuple[Fact, ...]:
        return ("promise", self.promise), ("evidence", self._evidence), ("advice", self.advice)

    @property
    def _evidence(self) -> str:
        if self.source != "none":
            p = f"p = {self.p_value:.2g}" if self.p_value >= 0.0001 else "p < 0.0001"
            flips = f"{self.repaired:,} repaired, {self.broken:,} broken"
            samples = plural(self.n, f"{self.source} sample")
            test = "sign test"
            if self.groups is not None:
                changed = f"{self.groups.better:,} better, {self.groups.worse:,} worse"
                test += f" of {self.test_units}, {changed}"
            return f"{self.evidence}: {flips} of {samples} ({test}, {p})"
        if self.kept:
            return f"{self.evidence}: no unseen data were given"
        return "none: the weights are unchanged"


def verdict_on(report: RepairRecord) -> Verdict:
    """Derives the verdict on a repair from the counts of its report."""
    kept = report.status == "repaired"
    evidence = evidence_on(report)
    tone = EVIDENCE_TONES[evidence.evidence]
    if report.status == "nothing to repair" and evidence.source == "none":
        tone = "good"
    elif report.status in ("refused", "not repaired") and tone != "bad":
        tone = "warn"
    answers = _answers(report, evidence)
    return Verdict(
        headline=f"{report.status.capitalize()}: {answers}",
        answers=answers,
        kept=kept,
        promise=_promise(report),
        evidence=evidence.evidence,
        source=evidence.source,
        repaired=evidence.counts.repaired,
        broken=evidence.counts.broken,
        n=evidence.counts.n,
        p_value=evidence.p_value,
        advice=_advice(report, evidence),
        tone=tone,
        groups=evidence.counts.groups,
        test_units=report.test_units,
    )


def _answers(report: RepairRecord, evidence: RepairEvidence) -> str:
    kept = report.status == "repaired"
    answers = "promise kept" if kept else "the weights are unchanged"
    if evidence.source == "none":
        return f"{answers}, not counted on unseen data" if kept else answers
    answers += f", {evidence.evidence} on {EVIDENCE_NAMES[evidence.source]}"
    if evidence.worse_split:
        answers += f" ({evidence.worse_split})"
    if report.update:
        than = "from" if evidence.evidence == "no difference shown" else "than"
        answers += f" {than} the replaced model"
    return answers


def _promise(report: RepairRecord) -> str:
    if report.status == "nothing to repair":
        return "none was needed: the weights are unchanged"
    if report.status == "repaired":
        counts = report.known_counts
        within = f", within the gate `{report.gate}`" if counts.broken else ""
        return f"kept: {_broken(counts)} broke{within}"
    change = "no repair was found"
    if report.candidate:
        change = f"the change found would break {_broken(pool(report.candidate).counts)}"
    return f"kept by changing nothing: {change}"


def _broken(counts: TargetCounts) -> str:
    n_broken = f"{counts.broken:,}" if counts.broken else "none"
    return f"{n_broken} of {counts.passed:,} known samples that were right"


def _advice(report: RepairRecord, evidence: RepairEvidence) -> str:
    if evidence.evidence == "worse":
        if report.update:
            return "do not ship the new model; keep the one that it would replace"
        return f"do not ship it; {_revert_hint(report)}"
    if report.status == "nothing to repair":
        return "keep the model as it is"
    return _advice_unless_worse(report, evidence) + _looser_gate_hint(report)


def _advice_unless_worse(report: RepairRecord, evidence: RepairEvidence) -> str:
    if report.status != "repaired":
        return "keep the model as it is; `diagnose` says which failures can be repaired"
    if evidence.evidence == "better":
        first = "" if evidence.source == "unseen" else f"; first {GIVE_UNSEEN}"
        return f"it may ship, as far as these data go{first}"
    if evidence.source != "unseen":
        return GIVE_UNSEEN
    for times in range(2, MOST_TIMES_MORE + 1):
        if evidence.evidence_with(times) != evidence.evidence:
            return (
                f"give more unseen data: {times} times as many would show a difference of this size"
            )
    return "look at the unseen samples that broke; more data will hardly show a difference"


def _revert_hint(report: RepairRecord) -> str:
    patch, checkpoint = report.files.get("patch"), report.files.get("checkpoint")
    if patch is None or checkpoint is None:
        return "the checkpoint from before the repair holds the old weights"
    paths = f"--patch {shlex.quote(patch)} --ckpt {shlex.quote(checkpoint)}"
    command = f"lightning-nrl revert {paths} --out original.ckpt"
    return f"to write the model from before the repair: `{command}`"


def _looser_gate_hint(report: RepairRecord) -> str:
    """Suggests a gate with twice as many repaired targets, or more gain on held-out data."""
    worthwhile = worthwhile_price(report)
    if worthwhile is None:
        return ""
    point, gain = worthwhile
    limit = f"{100 * point.allowed:g}%" if point.allowed < 1 else str(point.broken)
    n_targets = report.known_counts.repaired_in_target
    targets = f"{plural(point.repaired_in_target, 'target')} instead of {n_targets:,}"
    price = f"broken {plural(point.broken, 'known sample')}"
    gained = f"gained {gain:.1f} points more on held-out samples"
    return (
        f". A looser gate would have repaired {targets}, {price} and {gained}: "
        f'`gate="tolerance:{limit}"`'
    )
