"""The decision on a release as a JUnit file, which CI services show."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl._utils.formatting import list_ids
from lightning_nrl.errors import visible
from lightning_nrl.updates.release import ReleaseReport

ALL_SPLITS = "all splits"
"""Test suite of rules that do not say which splits they judged."""

COUNTS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
"""Attribute of a test suite that counts an outcome."""


def to_junit(report: ReleaseReport) -> str:
    """Renders a test suite for each split, with a test case for each rule.

    A rule that is not satisfied is a failure with the broken samples. An undecided rule is an
    error, or skipped if the report accepts an undecided release.
    """
    cases = defaultdict(list)
    for finding in report.findings:
        for split, verdict in (finding.by_split or {ALL_SPLITS: finding.verdict}).items():
            cases[split].append((finding, verdict))
    outcomes = {"NOT satisfied": "failure", "undecided": "error"}
    if report.on_undecided == "accept":
        outcomes["undecided"] = "skipped"
    root = ElementTree.Element("testsuites", name="lightning_nrl release")
    for split, judged in cases.items():
        verdicts = [verdict for _, verdict in judged]
        suite = ElementTree.SubElement(root, "testsuite", name=visible(split))
        suite.set("tests", str(len(verdicts)))
        for outcome, attribute in COUNTS.items():
            n = sum(outcomes.get(verdict) == outcome for verdict in verdicts)
            suite.set(attribute, str(n))
        for finding, verdict in judged:
            case = ElementTree.SubElement(
                suite, "testcase", name=visible(finding.rule), classname=visible(split)
            )
            if verdict in outcomes:
                message = finding.explanation
                titles = report.titles(split, finding.ids.get(split, ()))
                if titles:
                    message += f" Samples: {list_ids(titles, 'report.json')}."
                message = visible(message)
                result = ElementTree.SubElement(case, outcomes[verdict], message=message)
                result.set("type", verdict)
                result.text = message
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"


def write_junit(report: ReleaseReport, path: str | Path) -> None:
    """Writes `to_junit` to a file, in a new folder if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_junit(report))
