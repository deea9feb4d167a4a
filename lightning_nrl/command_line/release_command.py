"""The release gate from files of predictions: no model is needed to decide."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_nrl._trainer.artifacts import REPORT_FILES, write_report
from lightning_nrl.reference.predictions import Predictions, read_slices
from lightning_nrl.release.model_pair import check_missing, pair_from_files
from lightning_nrl.release.release_report import Identity, ReleaseReport, make_report
from lightning_nrl.release.rules import RULES, parse_rules

__all__ = ["release_command"]


def release_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """Judges, prints and writes; the exit status is 1 for a refusal and for nothing else."""
    parser = argparse.ArgumentParser(program, description=purpose)
    rules = ", ".join(RULES.forms).replace("%", "%%")
    parser.add_argument("old", help="predictions of the model in use, a CSV file with split,id,prediction,passed")
    parser.add_argument("new", help="predictions of the new model, likewise; such as predictions.csv of a ReleaseGate")
    parser.add_argument("--rule", action="append", help=f"what must hold, also several: {rules}")
    parser.add_argument("--slices", help="a CSV file with split,id,slice")
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="SPLIT",
        help="a split of which samples may lack new predictions; how many do is in the report",
    )
    parser.add_argument("--out", help="folder for report.json, report.md and report.html")
    given = parser.parse_args(arguments)
    report = _judged(given.old, given.new, given.rule or ["instance"], given.slices, given.allow_missing)
    if given.out:
        report = _written(report, Path(given.out))
    print(report.render(120), end="")
    return report.exit_status


def _judged(old: str, new: str, rules: list[str], slices: str | None, allow_missing: list[str]) -> ReleaseReport:
    asked, sliced = parse_rules(rules), None if slices is None else read_slices(slices)
    before, after = Predictions.read(old, "old"), Predictions.read(new, "new")
    for rule in asked:
        rule.check_data(tuple(after.splits), sliced is not None)
    missing = check_missing(before, after, allow_missing)
    return make_report(
        pair_from_files(before, after, sliced),
        asked,
        new=Identity(new, after.weights or ""),
        old=Identity(old, before.weights or ""),
        task="what the files say",
        precision="that in which the predictions were made",
        seeds={},
        missing=missing,
    )


def _written(report: ReleaseReport, folder: Path) -> ReleaseReport:
    folder.mkdir(parents=True, exist_ok=True)
    report = replace(report, files={kind: str(folder / name) for kind, name in REPORT_FILES.items()})
    return write_report(report)
