"""Two repairs of one model: which samples differ, and which is better."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import SplitReport
from lightning_nrl.records.repair_record import Hashes
from lightning_nrl.records.splits import FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.side_by_side import side_by_side


def repair(known: str, unseen: str, start: str = "m") -> RepairReport:
    """A report by flips: r repaired, b broken, `.` as before."""
    splits = tuple(
        SplitReport(name, role, TargetCounts(0, 0, 0, len(flips), 0, 0), (), flipped(flips))
        for name, role, flips in (("train", "known", known), ("test", "unseen", unseen))
    )
    return RepairReport(
        status="repaired",
        reason="",
        layers=("head",),
        target="all",
        gate="instance",
        task="Multiclass",
        splits=splits,
        hashes=Hashes("a", "b", start, start + "2"),
    )


def flipped(flips: str) -> tuple[FlippedSample, ...]:
    names = {"r": "repaired", "b": "broken"}
    return tuple(
        FlippedSample(i, names[flip], True, 1, 0, 1, 0.0, 0.0)
        for i, flip in enumerate(flips)
        if flip in names
    )


def test_samples_that_one_repair_alone_gets_right_are_counted_and_named():
    page = side_by_side(repair("r..", "rrrrrrrr.b"), repair("rr.", "r......b.."), ("a", "b"))
    text = " ".join(page.plain(200).split())
    # 1 to 6 are repaired by `a` alone, 7 is broken by `b`, 9 by `a`.
    assert "Unseen data: no difference shown; 7 samples right in a alone, 1 in b alone" in text
    assert "(sign test, p = 0.07)" in text
    assert "Known data: 0 samples right in a alone, 1 in b alone." in text
    assert "test, a alone 1, 2, 3, 4, 5, 6, 7 test, b alone 9" in text
    page = side_by_side(repair("r..", "rrrrrrrr.."), repair("rr.", "r......b.."), ("a", "b"))
    assert "Unseen data: a is better; 7 samples right in a alone" in page.plain(200)


def test_other_models_or_data_are_not_compared():
    first = repair("r", "r")
    for other in (repair("r", "r", start="x"), repair("rr", "rr"), replace(first, splits=())):
        with pytest.raises(ConfigurationError, match="do not start from the same model and data"):
            side_by_side(first, other, ("a", "b"))


def test_the_command_takes_a_second_report(tmp_path, capsys):
    paths = []
    for name, unseen in (("a.json", "rrrrrrr"), ("b.json", ".......")):
        (tmp_path / name).write_text(repair("r", unseen).to_json())
        paths.append(str(tmp_path / name))
    assert main(["report", *paths]) == 0
    assert f"{paths[0]} is better" in " ".join(capsys.readouterr().out.split())
    assert main(["report", *paths, "--out", "x.html"]) == 2
