"""Evidence on a repair from data that did not choose its weights, by sign tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.evaluation.stats import Evidence, evidence_of, sign_test
from lightning_nrl.records.repair_record import RepairRecord
from lightning_nrl.records.steps import PricePoint

EvidenceSource = Literal["unseen", "held-out", "none"]
NOTHING_COUNTED = TargetCounts(0, 0, 0, 0)
LARGE_GAIN = 2.0  # gain on held-out samples, in percentage points, that justifies a looser gate


@dataclass(frozen=True)
class RepairEvidence:
    """Comparison of a repaired model with the model before or, in an update, the replaced model.

    Attributes:
        source: data of the evidence. `none` if there are neither unseen nor held-out counts.
        counts: counts in these data.
        choices: number of results among which the data chose, for a Bonferroni correction.
        worse_split: the one of several unseen splits that makes the evidence `worse` alone. Empty
            if none does.
    """

    source: EvidenceSource
    counts: TargetCounts
    choices: int = 1
    worse_split: str = ""

    @property
    def evidence(self) -> Evidence:
        return self.evidence_with(1)

    @property
    def p_value(self) -> float:
        units = self.counts.units
        return sign_test(units.better, units.worse, self.choices)

    def evidence_with(self, times: int) -> Evidence:
        """Returns the evidence that `times` times as many samples would give at the same rates."""
        units = self.counts.units
        return evidence_of(times * units.better, times * units.worse, self.choices)


def evidence_on(record: RepairRecord) -> RepairEvidence:
    """Derives the evidence on a repair from unseen data or, without these, held-out samples."""
    unseen = record.unseen
    if unseen is None:
        held_out = record.held_out
        if record.update or held_out is None:
            return RepairEvidence("none", NOTHING_COUNTED)
        return RepairEvidence("held-out", held_out, record.n_estimates)
    evidence = RepairEvidence("unseen", unseen.counts)
    if evidence.evidence == "worse":
        return evidence
    # The sum over all unseen splits would hide that one of them is worse.
    worse = []
    splits = record.unseen_splits
    for split in splits:
        alone = RepairEvidence("unseen", split.counts, len(splits), split.split)
        if alone.evidence == "worse":
            worse.append(alone)
    return min(worse, key=lambda alone: alone.p_value, default=evidence)


def worthwhile_price(record: RepairRecord) -> tuple[PricePoint, float] | None:
    """Finds the first point of `price` that breaks more known samples, but is worth it.

    This point repairs twice as many targets, or gains `LARGE_GAIN` more on held-out samples.
    Returns the point and how many more percentage points it gains on held-out samples, or None.
    """
    known = record.known_counts
    taken = record.held_out
    gain_of_taken = 0.0 if taken is None else taken.points
    for point in record.price:
        if point.held_out is None or point.broken <= known.broken:
            continue
        gain = point.held_out.points - gain_of_taken
        n_targets = max(1, 2 * known.repaired_in_target)
        is_doubled = point.repaired_in_target >= n_targets and gain >= 0
        if is_doubled or (taken is not None and gain >= LARGE_GAIN):
            return point, gain
    return None
