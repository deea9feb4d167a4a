"""The decision on a release as a JUnit file, which CI services show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from lightning_nrl._utils.atomic_files import must_be_written, write_text
from lightning_nrl._utils.formatting import list_ids
from lightning_nrl.errors import visible
from lightning_nrl.release.release_report import ReleaseReport

ALL_SPLITS = "all splits"
"""Test suite of rules that do not say which splits they judged."""

COUNTS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
"""Attribute of a test suite that counts an outcome."""

ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="lightning_nrl release">
  <testsuite name="{0}" tests="1" failures="0" errors="1" skipped="0">
    <testcase name="decision" classname="{0}"><error message={1}/></testcase>
  </testsuite>
</testsuites>
"""


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
    with must_be_written("junit", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, to_junit(report))


@contextmanager
def errors_in_junit(path: str | Path | None) -> Iterator[None]:
    """Writes an error of the block, which prevents a decision, in place of an earlier decision."""
    try:
        yield
    except BaseException as error:
        if path is not None and str(error) != "0":  # `SystemExit(0)` follows a help text
            write_error(error, path)
        raise


def write_error(error: BaseException, path: str | Path) -> None:
    """Writes an error to a JUnit file, if the file can be written."""
    message = quoteattr(visible(f"{type(error).__name__}: {error}"))
    with suppress(OSError):
        write_text(path, ERROR.format(ALL_SPLITS, message))
