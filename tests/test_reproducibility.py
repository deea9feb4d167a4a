"""The same seed gives the same repair, for any batches, process and number of ranks."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from toy_problems import ByFunction, shares
from toy_repairs import known, quick, right, trained, unseen

from lightning_nrl import Gate, RepairReport, repair_module
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import Problem, Solution
from lightning_nrl.pipeline import Outcome
from lightning_nrl.search import Fitness


def timeless(report: RepairReport) -> str:
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    return replace(report, seconds={}, steps=steps).to_json()


def flips(outcome: Outcome) -> list[Any]:
    """All counts and rows; margins differ in their last bits with the batches."""
    return [
        (split.counts, split.targeted_ids, split.repaired_ids) for split in outcome.report.splits
    ]


def test_the_same_seed_gives_the_same_report_to_the_bit_whatever_the_global_random_state_is():
    reports = []
    for _ in range(2):
        reports.append(repair_module(trained(), known(), quick(seed=3), unseen=unseen()))
        torch.rand(3)
    assert timeless(reports[0].report) == timeless(reports[1].report)
    assert torch.equal(reports[0].change, reports[1].change)
    other = repair_module(trained(), known(), quick(seed=4), unseen=unseen())
    assert not torch.equal(other.change, reports[0].change)


def test_reports_of_another_day_are_equal_and_say_when_they_were_made(monkeypatch):
    reports = []
    for seconds in ("0", "86400"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
        report = repair_module(trained(), known(), quick(seed=3)).report
        reports.append(replace(report, seconds={}, steps=()))
    first, second = reports
    assert first.provenance.created == "1970-01-01 00:00:00+00:00"
    assert second.provenance.created == "1970-01-02 00:00:00+00:00"
    assert first == second
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    made = datetime.fromisoformat(
        repair_module(trained(), known(), quick(seed=3)).report.provenance.created
    )
    assert abs((datetime.now(timezone.utc) - made).total_seconds()) < 600


def test_data_of_the_same_size_with_other_labels_have_another_identity():
    def identity(sources: Any) -> str:
        report = diagnose_module(trained(), sources, quick())
        assert report.provenance.data["train"].n == len(sources[0].index)
        return report.provenance.data["train"].sha256

    assert identity(known()) == identity(known(batch_size=7))
    assert identity(known()) != identity(known(seed=1))


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_the_batch_size_of_the_data_does_not_matter(batch_size):
    expected = repair_module(trained(), known(), quick())
    outcome = repair_module(trained(), known(batch_size=batch_size), quick())
    assert flips(outcome) == flips(expected)
    torch.testing.assert_close(outcome.change, expected.change, rtol=1e-4, atol=1e-6)


def test_all_ranks_end_with_the_outcome_of_one_process():
    alone = repair_module(trained(), known(), quick(n_passed=50))
    models = [trained(), trained()]

    def run(collective: Any) -> Outcome:
        sources = shares(known(), collective.rank, 2, batch_size=8)
        return repair_module(
            Evaluator(models[collective.rank], collective=collective), sources, quick(n_passed=50)
        )

    first, second = on_ranks(2, run)
    assert timeless(first.report) == timeless(second.report)
    assert torch.equal(first.change, second.change)
    assert flips(first) == flips(alone)
    assert first.report.search.n_passed == alone.report.search.n_passed == 50


def test_all_ranks_go_on_with_the_values_of_the_first():
    def run(collective: Any) -> Tensor:
        return collective.agreed(torch.tensor([1.0, -2.0]) + 1e-7 * collective.rank)

    assert [values.tolist() for values in on_ranks(3, run)] == [[1.0, -2.0]] * 3


def test_passed_samples_are_drawn_by_seed_and_the_gate_counts_the_others_too():
    def drawn(**arguments: Any) -> Tensor:
        """The known samples that a method is to keep."""
        found = []

        def look(problem: Problem) -> Solution:
            found.append(problem.passed)
            return Solution(None, "nothing was searched.")

        repair_module(trained(), known(), quick(method=ByFunction(look), **arguments))
        return found[0]

    passing = right(trained(), known()[0])
    rows = drawn(n_passed=40, seed=1)
    assert int(rows.sum()) == 40
    assert not rows[: len(passing)][~passing].any()
    assert not rows[len(passing) :].any()
    assert torch.equal(rows, drawn(n_passed=40, seed=1))
    assert not torch.equal(rows, drawn(n_passed=40, seed=2))
    with pytest.warns(
        DataWarning, match=f"`n_passed=9999`: only {int(passing.sum())} samples of train pass"
    ):
        assert torch.equal(drawn(n_passed=9999)[: len(passing)], passing)
    every = torch.cat([right(trained(), source) for source in known()])
    assert torch.equal(drawn(), every)
    settings = quick(n_passed=1, fitness=Fitness("eq1", alpha=0.0), gate=Gate.instance())
    report = repair_module(trained(), known(), settings).report
    assert (report.search.n_passed, report.status) == (1, "refused")
    assert sum(split.broken for split in report.candidate) > 0
