"""The decision on a release as JUnit, as a reader of that format sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.release import ReleaseReport, RuleResult, to_junit


def read(path: Path) -> dict[tuple[str, str], list[str]]:
    """Messages by split and rule, each after the kind of its outcome."""
    cases = {}
    for suite in JUnitXml.fromfile(str(path)):
        for case in suite:
            outcomes = [f"{type(result).__name__}: {result.message}" for result in case.result]
            cases[suite.name, case.name] = outcomes
    return cases


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Predictions of 20 samples of `suite`, of which one breaks, and 40 of `night`, kept."""
    rows = [f"suite,{i},1,1" for i in range(20)] + [f"night,{i},1,1" for i in range(40)]
    header = "split,id,prediction,passed\n"
    (tmp_path / "old.csv").write_text(header + "\n".join(rows))
    rows[7] = "suite,7,2,0"
    (tmp_path / "new.csv").write_text(header + "\n".join(rows))
    return ["release", str(tmp_path / "old.csv"), str(tmp_path / "new.csv"), "--require", "any"]


def test_a_suite_a_split_and_a_case_a_rule(tmp_path, files):
    path = tmp_path / "release.xml"
    rules = ["--rule", "instance", "--rule", "nfr:5% in night"]
    assert main([*files, *rules, "--junit", str(path)]) == 1
    cases = read(path)
    assert cases["night", "instance"] == []
    [failure] = cases["suite", "instance"]
    assert failure.startswith("Failure: suite: 1 of 20 that were right broke")
    assert failure.endswith("Samples: 7.")
    [undecided] = cases["night", "nfr:5% in night"]
    assert undecided.startswith("Error: night: negative flip rate 0.00 % (0 of 40)")
    assert "Missing: night: 59 samples would do" in undecided
    document = JUnitXml.fromfile(str(path))
    counts = {suite.name: (suite.tests, suite.failures, suite.errors) for suite in document}
    assert counts == {"suite": (1, 1, 0), "night": (2, 0, 1)}


@pytest.mark.parametrize(
    ("action", "status", "kind"), [("refuse", 1, Error), ("accept", 0, Skipped)]
)
def test_an_undecided_rule_never_passes(tmp_path, files, action, status, kind):
    path = tmp_path / "release.xml"
    rules = ["--rule", "nfr:5% in night", "--on-undecided", action]
    assert main([*files, *rules, "--junit", str(path)]) == status
    [case] = [case for suite in JUnitXml.fromfile(str(path)) for case in suite]
    assert [type(result) for result in case.result] == [kind]


def test_names_cannot_break_out_of_the_file(tmp_path, files):
    path = tmp_path / "release.xml"
    main([*files, "--out", str(tmp_path)])
    report = ReleaseReport.from_json((tmp_path / "report.json").read_text())
    hostile = RuleResult('"/><testcase name="x', False, "\x1b[2J </failure> \x00 ]]>")
    path.write_text(to_junit(replace(report, status="refused", findings=(hostile,))))
    [suite] = JUnitXml.fromfile(str(path))
    [case] = suite
    assert (suite.name, suite.tests, case.name) == ("all splits", 1, hostile.rule)
    assert isinstance(case.result[0], Failure)
    assert case.result[0].message == "\\x1b[2J </failure> \\x00 ]]>"


def test_the_summary_is_appended_to_the_file_of_the_job(tmp_path, files, monkeypatch, capsys):
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n")
    assert main([*files, "--summary"]) == 2
    assert "--summary FILE" in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main([*files, "--summary"]) == 1
    assert main([*files, "--summary", str(summary)]) == 1
    text = summary.read_text()
    assert text.startswith("# Before\n# Refused\n")
    assert text.count("# Refused\n") == 2
