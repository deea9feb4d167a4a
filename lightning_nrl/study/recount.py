"""Counts what weights repair and break, as the deployed model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_nrl.data import Source
from lightning_nrl.evaluation.head_features import MAX_BYTES, HeadRecorder, rows_of
from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.methods import Problem
from lightning_nrl.methods.known_record import KnownRecord
from lightning_nrl.study.run_store import StoredRun


@dataclass(frozen=True)
class Recount:
    """Counts what a run repairs and breaks on some data.

    From the record, if the runs change the last layer alone; otherwise by a pass for each run.
    """

    problem: Problem
    sources: Sequence[Source]
    before: SampleResults  # results of the original model
    record: KnownRecord

    def __call__(self, stored: StoredRun) -> TargetCounts:
        after = self.before
        if stored.run.changed:
            state = self.problem.space.changed(stored.where, stored.values)
            after = self.record.evaluate(self.problem.evaluator, state, self.sources, self.before)
        return Flips.between(self.before, after).target_counts(self.before)


def record_other_data(problem: Problem, sources: Sequence[Source]) -> KnownRecord:
    """Records the last layer on other data, if it is recorded on the known data."""
    cache = problem.record.cache
    if cache is None:
        return KnownRecord()
    head = cache.space.sites[0].module
    assert isinstance(head, nn.Linear)
    recorder = HeadRecorder(problem.evaluator, head, rows_of(sources), MAX_BYTES)
    problem.evaluator.run(sources, forward=recorder)
    record = recorder.record()
    return KnownRecord(None if record is None else cache.with_head(record))
