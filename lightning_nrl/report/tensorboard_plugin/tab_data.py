"""Converts a report to the JSON values and HTML parts that the Repair tab shows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_nrl._utils.formatting import percent
from lightning_nrl.records.repair_record import StrengthPoint
from lightning_nrl.records.splits import SplitReport, by_role, pool
from lightning_nrl.records.stats import percent_up
from lightning_nrl.report.html import html_blocks
from lightning_nrl.report.page import Table
from lightning_nrl.report.repair_facts import layer_text, unseen_facts, unseen_limit
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.sample_views import SAMPLE_KINDS, SAMPLES_FOLDER, sample_name
from lightning_nrl.report.tables import confusion_changes, flipped_splits, most_telling
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
        splits, limit, verdict = (
            by_role(flipped_splits(report)),
            unseen_limit(report),
            report.verdict,
        )
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
            "made": report.provenance.made,
            "known": _numbers(splits.get("known", ())),
            "unseen": _numbers(splits.get("unseen", ())),
        }

    @cached_property
    def details(self) -> Plain:
        report = self.report
        splits, verdict = flipped_splits(report), report.verdict
        limits = [] if report.bounds is None else [("calibration", str(report.bounds))]
        _, _, reason, *blocks = report.full_page().blocks
        first = (
            next((i for i, block in enumerate(blocks) if isinstance(block, Table)), len(blocks) - 1)
            + 1
        )
        return {
            **self.summary,
            "reason": getattr(reason, "text", report.reason),
            "verdict": verdict.headline,
            "answers": [list(fact) for fact in (*verdict.facts, *limits, *unseen_facts(report))],
            "calibrated": bool(limits),
            "against": "the model that it replaces"
            if report.update
            else "the model as it was trained",
            "accepted": report.status == "repaired",
            "changes": report.status == "repaired" or bool(report.candidate),
            "outcome": html_blocks(blocks[:first]),
            "more": html_blocks(blocks[first:]),
            "classes": list(report.class_names),
            "splits": [{"name": split.split, "role": split.role, "n": split.n} for split in splits],
            "origin": "" if report.hashes is None else report.hashes.model_before or "",
            "confusion": _confusion(splits),
            "flips": self._flips(splits),
            "search": _search(report),
            "strength": list(map(_point, report.path)),
            "chosen_strength": report.chosen_strength,
        }

    def sample_file(self, split: str, position: int, kind: str) -> str | None:
        """Returns the path of a sample's file, or None if the sample did not flip or `kind` is
        unknown.
        """
        if kind not in SAMPLE_KINDS or (split, position) not in self._positions:
            return None
        return os.path.join(SAMPLES_FOLDER, sample_name(split, position, kind))

    @cached_property
    def _positions(self) -> set[tuple[str, int]]:
        return {
            (split.split, one.id) for split in flipped_splits(self.report) for one in split.flipped
        }

    def _flips(self, splits: Sequence[SplitReport]) -> Plain:
        try:
            files = set(os.listdir(self.folder.path / SAMPLES_FOLDER))
        except OSError:
            files = set()
        slices = list(
            dict.fromkeys(one.slice for split in splits for one in split.flipped if one.slice)
        )
        rows = []
        for flip in ("broken", "repaired"):
            for i, split in enumerate(splits):
                for one in most_telling(
                    [sample for sample in split.flipped if sample.flip == flip]
                ):
                    kinds = [
                        kind
                        for kind in SAMPLE_KINDS
                        if sample_name(split.split, one.id, kind) in files
                    ]
                    margins = _finite(one.margin_before), _finite(one.margin_after)
                    where = slices.index(one.slice) if one.slice else -1
                    classes = one.label, one.predicted_before, one.predicted_after
                    rows.append(
                        [
                            i,
                            one.id,
                            flip,
                            *classes,
                            *margins,
                            one.in_target,
                            where,
                            *(kinds or [""])[:1],
                        ]
                    )
        return {"rows": rows, "slices": slices}


def _numbers(splits: Sequence[SplitReport]) -> Plain | None:
    if not splits:
        return None
    split = pool(splits)
    counted = ("n", "broken", "repaired", "targeted", "repaired_in_target")
    return {name: getattr(split, name) for name in counted} | {
        "right": split.passed,
        "wrong": split.repaired + split.failing,
        "accuracy_before": percent(split.accuracy_before),
        "accuracy_after": percent(split.accuracy_after),
    }


def _confusion(splits: Sequence[SplitReport]) -> dict[str, list[list[int]]]:
    """Returns label, prediction, count before and count after of changed confusions, by role."""
    changes = {
        role: confusion_changes(pool(own).confusion) for role, own in by_role(splits).items()
    }
    return {
        role: [[cell.label, cell.prediction, cell.before, cell.after] for cell in cells]
        for role, cells in changes.items()
        if cells
    }


def _search(report: RepairReport) -> Plain | None:
    search = report.search
    if search is None or not search.history:
        return None
    curves = {name: [_finite(value) for value in curve] for name, curve in search.curves.items()}
    return {
        "curves": curves,
        "n_failed": search.n_failed,
        "n_passed": search.n_passed,
        "stopped": search.stopped,
    }


def _point(point: StrengthPoint) -> Plain:
    calibration = point.calibration
    return {
        "strength": point.strength,
        "repaired_in_target": point.repaired_in_target,
        "repaired": point.known.repaired,
        "broken": point.known.broken,
        "calibration_repaired": None if calibration is None else calibration.repaired,
        "calibration_broken": None if calibration is None else calibration.broken,
        "polished": point.polished,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
