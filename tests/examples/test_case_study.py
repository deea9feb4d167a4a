"""The paper's case study: settings, data, answers from hand-made tables, and figures."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from repository import ROOT

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.study import TABLE_II, PaperRow, Run

STUDY = ROOT / "examples" / "case_study"
sys.path[:0] = [str(STUDY), str(STUDY.parent / "studies")]

import study  # noqa: E402
from digits_in_place import draw  # noqa: E402
from figures import Other, along, draw_all, tables_of  # noqa: E402
from grid import LINES, studied  # noqa: E402
from questions import Interval, answers, difference, effect, fewest_broken, like, page  # noqa: E402

ROW = PaperRow("eq1", 6, False, 282, 500, 200)


def run(
    row: PaperRow = ROW,
    seed: int = 0,
    *,
    broken: int = 0,
    repaired: int = 0,
    known: int | None = None,
    in_target: int = 0,
) -> Run:
    """A line of the table: 100 samples in each role, 80 of them right before, 40 of these in the
    target.
    """

    def counts(lost: int) -> TargetCounts:
        return TargetCounts(80 - lost, lost, repaired, 20 - repaired, 10, repaired, 40, in_target)

    return Run(
        f"{row.equation} alpha={row.alpha} lw={row.n_weights} pos={row.n_passed} p={row.particles}",
        row.equation,
        row.alpha,
        row.perfect_intact,
        row.n_weights,
        row.n_passed,
        row.particles,
        seed,
        layer="auto",
        n_localized=min(row.n_weights, 63),
        iterations=1,
        value=1.0,
        patched=repaired,
        intact=row.n_passed - broken,
        changed=True,
        known=counts(broken if known is None else known),
        unseen=counts(broken),
    )


def test_there_are_66_settings_and_table_ii_is_among_them():
    rows = studied()
    assert len(rows) == len(set(rows)) == 66
    assert rows[:12] == tuple(TABLE_II.values())


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.axis)
def test_all_settings_of_a_line_are_studied_and_differ_in_one_number(line):
    for experiment in "ABC":
        rows = line.settings(experiment)
        assert set(rows) <= set(studied())
        assert [getattr(row, line.axis) for row in rows] == list(line.values)
        assert {replace(row, **{line.axis: 0}) for row in rows} == {
            replace(rows[0], **{line.axis: 0})
        }
    rows = {row: name for name, row in TABLE_II.items()}
    assert any(row in rows for row in line.settings(line.shown[0]))


def test_an_effect_is_the_mean_of_differences_within_seeds():
    low, high = replace(ROW, alpha=4), replace(ROW, alpha=6)
    other = replace(low, n_weights=16)
    runs = [
        run(low, 0, broken=9),
        run(high, 0, broken=5),
        run(low, 1, broken=4),
        run(high, 1, broken=4),
    ]
    runs += [run(other, 0, broken=100)]  # of no pair
    found = effect(runs, "alpha", 4, 6, "unseen.broken")
    assert (
        found.mean == -2
    )  # of -4 and 0: a deviation of 2.8284, 2 of the mean, and 12.706 for one degree of freedom
    assert (found.low, found.high) == pytest.approx((-27.412, 23.412), abs=1e-3)
    assert found.sign == 0
    assert effect(runs, "alpha", 4, 5, "unseen.broken") is None


def test_the_fewest_broken_are_sought_on_known_data_among_those_that_repair():
    idle, good, better = (replace(ROW, n_weights=n) for n in (16, 32, 53))
    runs = [run(idle, s) for s in range(2)]
    runs += [run(good, s, known=1, broken=0, repaired=2) for s in range(2)]
    runs += [run(better, s, known=1, broken=9, repaired=3) for s in range(2)]
    assert fewest_broken(runs) == like(runs, better)
    assert [r.seed for r in like(runs, better)] == [0, 1]


def runs_of(broken: dict[tuple, int], seeds: int = 4) -> list:
    """Every setting of the lines; what breaks unseen is looked up by (axis, value), else 10."""
    rows = {
        row: (line.axis, v)
        for line in LINES
        for row, v in zip(line.settings("B"), line.values, strict=True)
    }
    return [
        run(row, s, broken=broken.get(key, 10), repaired=broken.get(key, 10))
        for row, key in rows.items()
        for s in range(seeds)
    ]


def verdicts(tables: dict) -> dict[str, bool | None]:
    return {
        answer.paper.partition(":")[2].strip(): answer.agrees
        for answer in answers(tables)
        if answer.question == "RQ3"
    }


FINDINGS = (
    "a larger alpha breaks fewer",
    "a larger alpha repairs fewer",
    "more passed samples, more broken",
    "16 weights break more than 32",
    "76 weights break more than 32",
)


@pytest.mark.parametrize(
    ("broken", "agrees"),
    [
        (
            {
                ("alpha", 4): 20,
                ("alpha", 5): 15,
                ("n_passed", 1000): 14,
                ("n_weights", 16): 12,
                ("n_weights", 76): 11,
            },
            True,
        ),
        (
            {("alpha", 4): 5, ("n_passed", 1000): 6, ("n_weights", 16): 8, ("n_weights", 76): 8},
            False,
        ),
        ({}, None),
    ],
)
def test_findings_agree_or_not_or_are_not_settled(broken, agrees):
    assert verdicts({"B": runs_of(broken)}) == dict.fromkeys(FINDINGS, agrees)


def test_a_difference_of_means_is_welchs():
    found = difference([3, 5], [0, 0, 3])
    # 4 - 1; variances 2 / 2 and 3 / 3, so sqrt(2) and 4 / (1 / 1 + 1 / 2) = 2.667 degrees of
    # freedom: t = 3.420
    assert (found.mean, found.low, found.high) == pytest.approx((3, -1.8363, 7.8363), abs=1e-4)
    assert difference([2, 2], [1, 1]) == Interval(1, 1, 1)
    assert difference([2], [1]).sign == 0


def test_levels_and_drift_are_answered():
    a = [run(seed=s, broken=1, repaired=5, in_target=1) for s in range(10)]
    b = [run(seed=s, repaired=2) for s in range(10)]
    c = [run(seed=s, repaired=1) for s in range(10)]
    found = {answer.paper: answer for answer in answers({"A": a, "B": b, "C": c})}
    assert {answer.agrees for answer in found.values()} == {True}
    setting = "eq1 alpha=6 lw=282 pos=500 p=200"
    assert found["fewer repairs in C than in B"].found == (
        f"{setting}: % of targets: B 20.0, C 10.0; B less C +10.0 [+10.0, +10.0]"
    )
    assert found["A: suppressed at the level of accuracy"].found == (
        f"{setting}: +4.00 [+4.00, +4.00] points of accuracy, not below in 10 of 10 runs; "
        "of all that repair something in 10 of 10 runs"
    )
    assert (
        "and in all runs of 1 of 1 settings"
        in found["B: suppressed at the level of instances"].found
    )
    lines = page(tuple(found.values())).splitlines()
    assert [line.count("|") for line in lines] == (2 + len(found)) * [5]


def test_figures_2_to_6_and_the_trade_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    runs = [
        run(row, s, broken=int(rng.poisson(30)), repaired=int(rng.poisson(40)))
        for row in studied()
        for s in range(2)
    ]
    method = FlipCounts(kept=80, broken=0, repaired=9, failing=11)
    files = draw_all(
        {"A": runs}, tmp_path, {"A": [Other("default method", method, method, repair=True)]}
    )
    assert {path.name for path in files} == {
        f"{name}.png" for name in (*(f"figure_{i}" for i in range(2, 7)), "trade_A")
    }
    assert all(1_000 < path.stat().st_size < 200_000 for path in files)
    assert along({"A": []}, LINES[0]) is None


def test_digits_have_the_attributes_of_the_vehicles():
    a, c = draw("A"), draw("C")
    assert {name: len(c[f"{name}_y"]) for name in ("train", "val", "repair", "test")} == {
        "train": 718,
        "val": 179,
        "repair": 359,
        "test": 539,
    }
    assert c["train_x"].shape == (718, 16, 16, 3)
    assert c["train_x"].dtype == np.uint8
    assert (a["train_view"] == 2).all()
    assert not c["train_occluded"].any()
    assert 0.10 < a["train_occluded"].mean() < 0.20
    assert 0.22 < a["test_occluded"].mean() < 0.38
    assert (c["train_view"] != 2).mean() < 0.09
    assert 0.42 < (c["repair_view"] != 2).mean() < 0.58
    assert np.array_equal(c["test_x"], draw("C")["test_x"])
    assert not np.array_equal(c["test_x"], draw("C", seed=1)["test_x"])


def test_a_study_runs_on_digits_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, settings = tmp_path / "study", [study.setting_of(row) for row in studied()[2:4]]
    tiny = {"seed": 0, "seeds": 1, "epochs": 1, "total": 600}
    study.study("digits", "C", settings[:1], folder, **tiny)
    table = tables_of(folder)["C"]
    assert [run.setting for run in table] == ["eq2 alpha=8 pi lw=32 pos=500 p=200"]
    assert table[0].known.n == 360  # of training and repair data
    assert table[0].known.targeted > 0
    assert table[0].unseen.n == 180
    assert 0 < table[0].unseen.passed_in_target < 120
    assert table[0].unseen.broken_in_target <= table[0].unseen.broken
    study.study("digits", "C", settings, folder, **tiny)
    again = tables_of(folder)["C"]
    assert again[0] == table[0]  # its seconds, too: it was not run again
    assert again[1].setting == "eq1 alpha=6 lw=309 pos=500 p=200"
    assert (folder / "answers.md").read_text().startswith("| | the paper | here | agrees |")
