"""The release gate on a command line, from files of predictions: exits with 0 if accepted, 1 if refused, 2 if misused.

python -m lightning_nrl.release old.csv new.csv --rule instance --rule "nfr:1% in test"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_nrl.errors import RepairError
from lightning_nrl.reference.predictions import Predictions
from lightning_nrl.release.prediction_files import read_slices, seen_in_files
from lightning_nrl.release.release_report import Identity, ReleaseReport, make_report
from lightning_nrl.release.rule_parsing import KINDS, parse_rules

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judges, prints and writes; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_nrl.release", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("old", help="predictions of the model in use, a CSV file with split,id,prediction,passed")
    parser.add_argument("new", help="predictions of the new model, likewise; such as predictions.csv of a ReleaseGate")
    parser.add_argument("--rule", action="append", help=f"what must hold, also several: {', '.join(KINDS)}")
    parser.add_argument("--slices", help="a CSV file with split,id,slice")
    parser.add_argument("--out", help="folder for report.json and report.md")
    given = parser.parse_args(arguments)
    try:
        report = _judged(given.old, given.new, given.rule or ["instance"], given.slices)
    except RepairError as error:
        parser.error(str(error))
    if given.out:
        folder = Path(given.out)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"json": str(folder / "report.json"), "markdown": str(folder / "report.md")}
        report = replace(report, files=files)
        for kind, text in (("json", report.to_json()), ("markdown", report.to_markdown())):
            Path(files[kind]).write_text(text, encoding="utf-8")
    print(report.render(120), end="")
    return report.exit_status


def _judged(old: str, new: str, rules: list[str], slices: str | None) -> ReleaseReport:
    asked, told = parse_rules(rules), None if slices is None else read_slices(slices)
    before, after = Predictions.read(old), Predictions.read(new)
    for rule in asked:
        rule.check_data(tuple(after.splits), told is not None)
    return make_report(
        seen_in_files(before, after, told),
        asked,
        new=Identity(new, after.weights or ""),
        old=Identity(old, before.weights or ""),
        task="what the files say",
        precision="that in which the predictions were made",
        seeds={},
    )


if __name__ == "__main__":
    sys.exit(main())
