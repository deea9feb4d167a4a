"""Converts a report to the JSON values and HTML parts that the Repair tab shows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any

from lightning_nrl._utils.formatting import percent, sentence
from lightning_nrl._utils.json_records import to_plain
from lightning_nrl.evaluation.stats import percent_up
from lightning_nrl.records.splits import SplitReport, pool_by_role
from lightning_nrl.report.html import html_blocks
from lightning_nrl.report.page import Table
from lightning_nrl.report.repair_facts import layer_text, unseen_facts
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.sample_views import SAMPLE_KINDS, SAMPLES_FOLDER, sample_name
from lightning_nrl.report.side_by_side import side_by_side
from lightning_nrl.report.tables import (
    LISTED_FLIPS,
    confusion_changes,
    flipped_splits,
    most_telling,
)
from lightning_nrl.report.tensorboard_plugin.repair_folders import RepairFolder

Plain = dict[str, Any]


class LoadedRepair:
    """A report that was read from its folder."""

    def __init__(self, folder: RepairFolder) -> None:
        self.folder = folder
        self.report = RepairReport.from_json(folder.report.read_text(encoding="utf-8"))

    @cached_property
    def summary(self) -> Plain:
        report = self.report
        splits = pool_by_role(flipped_splits(report))
        limit = report.unseen_limit
        verdict = report.verdict
        return {
            "name": self.folder.name,
            "modified": self.folder.modified // 1_000_000,
            "status": report.status,
            "evidence": "" if verdict.source == "none" else verdict.evidence,
            "tone": verdict.tone,
            "target": report.target,
            "layers": layer_text(report),
            "gate": report.gate,
            "at_most": "" if limit is None else percent_up(limit),
            "weights_changed": None if report.change is None else report.change.changed,
            "seconds": sum(report.seconds.values()),
            "made": report.provenance.created,
            "known": _numbers(splits.get("known")),
            "unseen": _numbers(splits.get("unseen")),
        }

    @cached_property
    def details(self) -> Plain:
        report = self.report
        splits, verdict = flipped_splits(report), report.verdict
        facts = list(verdict.facts)
        if report.bounds is not None:
            facts.append(("calibration", str(report.bounds)))
        # The headline, the verdict and the reason are shown by themselves.
        blocks = report.full_page().blocks[3:]
        n_first = 1 + next(i for i, block in enumerate(blocks) if isinstance(block, Table))
        against = "the model that it replaces" if report.update else "the model as it was trained"
        return {
            **self.summary,
            "reason": sentence(report.reason),
            "verdict": verdict.headline,
            "answers": [*facts, *unseen_facts(report)],
            "calibrated": report.bounds is not None,
            "against": against,
            "accepted": report.status == "repaired",
            "changes": report.status == "repaired" or bool(report.candidate),
            "outcome": html_blocks(blocks[:n_first]),
            "more": html_blocks(blocks[n_first:]),
            "classes": report.class_names,
            "splits": [{"name": split.split, "role": split.role, "n": split.n} for split in splits],
            "origin": report.hashes.model_before if report.hashes else None,
            "confusion": _confusion(splits),
            "flips": self._flips(splits),
            "search": _search(report),
            "strength": to_plain(report.path),
            "chosen_strength": report.chosen_strength,
            "caution": to_plain(report.caution),
        }

    def beside(self, other: LoadedRepair) -> str:
        """Compares with another repair, as HTML. Raises an error if that is impossible."""
        names = (self.folder.name, other.folder.name)
        return html_blocks(side_by_side(self.report, other.report, names).blocks[1:])

    def sample_file(self, split: str, position: int, kind: str) -> str | None:
        """Returns the path of a sample's file, or None if there is no such file of a flip."""
        if kind not in SAMPLE_KINDS:
            return None
        for flipped in flipped_splits(self.report):
            if flipped.split == split and any(sample.id == position for sample in flipped.flipped):
                return os.path.join(SAMPLES_FOLDER, sample_name(split, position, kind))
        return None

    def _flips(self, splits: Sequence[SplitReport]) -> Plain:
        slices = {"": -1}
        for split in splits:
            for sample in split.flipped:
                slices.setdefault(sample.slice, len(slices) - 1)
        rows = []
        for flip in LISTED_FLIPS:
            for i, split in enumerate(splits):
                for sample in most_telling(split.flipped_as(flip)):
                    kinds = (
                        kind
                        for kind in SAMPLE_KINDS
                        if sample_name(split.split, sample.id, kind) in self._files
                    )
                    rows.append(
                        [
                            i,
                            sample.id,
                            flip,
                            sample.label,
                            sample.predicted_before,
                            sample.predicted_after,
                            _finite(sample.margin_before),
                            _finite(sample.margin_after),
                            sample.in_target,
                            slices[sample.slice],
                            next(kinds, ""),
                            sample.name,
                        ]
                    )
        return {"rows": rows, "slices": list(slices)[1:]}

    @cached_property
    def _files(self) -> set[str]:
        return {path.name for path in (self.folder.path / SAMPLES_FOLDER).glob("*")}


def _numbers(split: SplitReport | None) -> Plain | None:
    if split is None:
        return None
    return {
        "n": split.n,
        "broken": split.broken,
        "repaired": split.repaired,
        "targeted": split.targeted,
        "repaired_in_target": split.repaired_in_target,
        "right": split.passed,
        "wrong": split.repaired + split.failing,
        "accuracy_before": percent(split.accuracy_before),
        "accuracy_after": percent(split.accuracy_after),
    }


def _confusion(splits: Sequence[SplitReport]) -> Plain:
    """Returns label, prediction, count before and count after of changed confusions, by role."""
    changes: Plain = {}
    for role, split in pool_by_role(splits).items():
        cells = confusion_changes(split.confusion)
        if cells:
            changes[role] = list(map(astuple, cells))
    return changes


def _search(report: RepairReport) -> Plain | None:
    search = report.search
    if search is None or not search.history:
        return None
    return {
        "curves": {name: list(map(_finite, curve)) for name, curve in search.curves.items()},
        "n_failed": search.n_failed,
        "n_passed": search.n_passed,
        "stopped": search.stopped,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
