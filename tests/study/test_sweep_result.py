from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nrl import ConfigurationError, Gate
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.study import Run, SweepResult
from lightning_nrl.study.run_store import RUN_COLUMNS

ASKED = [
    "setting",
    "fitness",
    "alpha",
    "perfect_intact",
    "n_weights",
    "n_passed",
    "particles",
    "seed",
    "layer",
]
FOUND = ["n_localized", "iterations", "value", "patched", "intact", "changed"]
COUNTED = [
    "n", "kept", "broken", "repaired", "failing", "targeted",
    "repaired_in_target", "passed_in_target", "broken_in_target",
    "accuracy_before", "accuracy_after",
]  # fmt: skip


def made(setting: str, seed: int, known: tuple[int, int], **later: tuple[int, int]) -> Run:
    """A run on 100 known samples, of which 90 are right, and 50 of each other role, of which 40
    are.
    """
    counts = {}
    for role, (repaired, broken) in {"known": known, **later}.items():
        n, passed = (100, 90) if role == "known" else (50, 40)
        counts[role] = TargetCounts(
            passed - broken, broken, repaired, n - passed - repaired, 8, min(8, repaired)
        )
    alpha = float(setting[-1]) if setting.startswith("eq1") else None
    return Run(
        setting, "eq1" if alpha else "lexicographic", alpha, False, None, 30, 20, seed, "head",
        12, 9, 1.5, 3, 30, repaired > 0, seconds=0.25, **counts,
    )  # fmt: skip


ROWS = [
    made("eq1 alpha=4", 0, (8, 2), calibration=(6, 4), unseen=(6, 3)),
    made("eq1 alpha=4", 1, (7, 0), calibration=(5, 2), unseen=(4, 2)),
    made("eq1 alpha=6", 0, (5, 0), calibration=(5, 1), unseen=(5, 0)),
    made("eq1 alpha=6", 1, (6, 0), calibration=(4, 0), unseen=(9, 9)),
    made("plain", 0, (0, 0), calibration=(0, 0), unseen=(0, 0)),
]
RESULT = SweepResult(tuple(ROWS), "label 3", "head")


def test_the_table_has_the_columns_that_figures_are_drawn_from(tmp_path):
    roles = [f"{role}_{name}" for role in ("known", "calibration", "unseen") for name in COUNTED]
    assert list(RUN_COLUMNS) == [*ASKED, *FOUND, *roles, "seconds"]
    text = RESULT.to_csv(tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == text
    first, *_, last = csv.DictReader(io.StringIO(text))
    assert (first["alpha"], first["n_weights"], first["changed"], first["unseen_broken"]) == (
        "4.0",
        "",
        "True",
        "3",
    )
    assert (last["alpha"], last["value"], last["known_accuracy_after"]) == ("", "1.5", "0.9")


def test_a_table_is_read_back(tmp_path):
    RESULT.to_csv(tmp_path / "sweep.csv")
    for source in (tmp_path / "sweep.csv", str(tmp_path / "sweep.csv"), RESULT.to_csv()):
        again = SweepResult.from_csv(source)
        assert again.runs == RESULT.runs
        assert again.best() == RESULT.best()
    assert SweepResult.from_json(RESULT.to_json()) == RESULT
    for what in (RESULT.state, RESULT.arguments):
        with pytest.raises(
            ConfigurationError, match=r"this result has no weights of 'eq1 alpha=4' with seed 0"
        ):
            what(ROWS[0])
    without = SweepResult((made("plain", 0, (1, 0)),))
    assert SweepResult.from_csv(without.to_csv()).runs == without.runs
    for wrong in (
        "a,b\n1,2\n",
        RESULT.to_csv().replace("True", "yes"),
        RESULT.to_csv().replace(",head,", ",head,x"),
    ):
        with pytest.raises(ConfigurationError, match="`source` is no table of a sweep"):
            SweepResult.from_csv(wrong)


def seen(runs: tuple[Run, ...], role: str = "known") -> list[tuple[int, int]]:
    return [(run.counts(role).broken, run.counts(role).repaired) for run in runs]


def test_the_front_goes_from_few_broken_to_many():
    assert seen(RESULT.pareto()) == [(0, 7), (2, 8)]
    assert seen(RESULT.pareto("unseen"), "unseen") == [(0, 5), (3, 6), (9, 9)]
    with pytest.raises(ConfigurationError, match="did you mean 'unseen'"):
        RESULT.pareto("unsen")
    with pytest.raises(ConfigurationError, match="`role='unseen'`: the sweep had no unseen data"):
        SweepResult((made("plain", 0, (1, 0)),)).pareto("unseen")


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12))
def test_nothing_is_better_than_what_is_on_the_front_and_what_is_not_is_worse(counts):
    front = seen(
        SweepResult(tuple(made("plain", i, pair) for i, pair in enumerate(counts))).pareto()
    )
    assert len(set(front)) == len(front)
    for repaired, broken in counts:
        better = [(b, r) for b, r in front if b <= broken and r >= repaired]
        assert better
        assert (broken, repaired) in front or any(pair != (broken, repaired) for pair in better)


def test_the_best_is_chosen_on_known_and_calibration_data():
    # Two gain 4 on calibration data; one of them breaks nothing there.
    assert RESULT.best() == ROWS[3]
    without = SweepResult(tuple(replace(run, calibration=None, unseen=None) for run in ROWS))
    assert seen((without.best(),)) == [(0, 7)]
    assert seen((without.best("tolerance:2"),)) == seen((without.best("accuracy"),)) == [(2, 8)]
    assert seen((without.best(Gate.tolerance(0.01)),)) == [(0, 7)]
    assert SweepResult((ROWS[4],)).best() is None
    assert SweepResult((ROWS[0],)).best() is None
    with pytest.raises(ConfigurationError, match="`under='best'` is no gate"):
        RESULT.best("best")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=5, max_size=5))
def test_unseen_data_have_no_part_in_the_choice(counts):
    runs = tuple(
        replace(run, unseen=made("", 0, (0, 0), unseen=u).unseen)
        for run, u in zip(ROWS, counts, strict=True)
    )
    assert SweepResult(runs).best() == runs[3]


def test_a_line_for_each_setting():
    assert [run.regression_free for run in ROWS] == [False, True, True, True, False]
    assert RESULT.of("eq1 alpha=6") == tuple(ROWS[2:4])
    with pytest.raises(ConfigurationError, match="did you mean 'eq1 alpha=6'"):
        RESULT.of("eq1 alpha=5")
    page = RESULT.render(120)
    runs = "5 runs of 3 settings in 1 s."
    failures = "8 failures to repair, 90 of 100 known samples right before, 40 of 50"
    assert f"{runs} {failures}" in page
    lines = [" ".join(line.split()) for line in page.splitlines()]
    first, later = (
        "2 7.5 (0.7) 1.0 (1.4) 50% 5.5 (0.7) 3.0 (1.4) +5.0 (1.4)",
        "5.0 (1.4) 2.5 (0.7) +5.0 (1.4)",
    )
    assert f"eq1 alpha=4 {first} {later}" in lines
    assert "plain 1 0.0 0.0 0% 0.0 0.0 +0.0 0.0 0.0 +0.0" in lines
    assert "No run." in SweepResult(()).render()
    assert "| plain | 1 |" in RESULT.to_markdown()
