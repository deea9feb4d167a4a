"""What the weights of many runs do on all data, counted exactly as a forward pass of the deployed model counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lightning_nrl._scoring.bitwise_replay import ExactBatch, exact_batches
from lightning_nrl._scoring.memory import default_budget
from lightning_nrl.analysis.sweep._store import StoredRun
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts, flip_masks
from lightning_nrl.problem import Problem

__all__ = ["Recount"]

STATES_MEMORY = 256 << 20
"""Bytes of whole layers, one a run, that are made once and not anew for every batch."""


@dataclass
class Recount:
    """Counts runs on the data of one role. What is recorded of them is `kept`, None where memory does not allow it."""

    problem: Problem
    sources: Sequence[Source]
    before: SampleResults
    kept: list[ExactBatch] | None = field(default_factory=list)
    _complete: bool = False

    @property
    def streams(self) -> bool:
        """Whether counting reads the data again."""
        return self.kept is None

    @torch.no_grad()
    def __call__(self, runs: Sequence[StoredRun]) -> list[TargetCounts]:
        """Counts what the weights of some runs do."""
        before, space = self.before, self.problem.space
        right, targeted = before.right, before.targeted
        spared = right & before.in_target
        sums = torch.zeros(4, len(runs), dtype=torch.int64, device=space.device)
        changed = [r for r, stored in enumerate(runs) if stored.run.changed]

        def whole(r: int) -> Mapping[str, Tensor]:
            return space.changed(runs[r].where, runs[r].values)

        small = len(changed) * space.size * space.dtype.itemsize <= STATES_MEMORY
        state: Callable[[int], Mapping[str, Tensor]] = cache(whole) if small else whole
        for batch in self._batches() if changed else ():
            was, aimed, own = (mask[batch.chunk.rows].to(space.device) for mask in (right, targeted, spared))
            task, target = self.problem.task, batch.chunk.target
            now = torch.stack([task.right(batch.logits(state(r)), target) for r in changed])
            _, broken, repaired, _ = flip_masks(was, now)
            sums[:, changed] += torch.stack([repaired & aimed, repaired, broken, broken & own]).sum(2)
        n, passed, n_targeted, n_spared = len(before), *(int(mask.sum()) for mask in (right, targeted, spared))
        return [
            TargetCounts(passed - broken, broken, repaired, n - passed - repaired, n_targeted, aimed, n_spared, own)
            for aimed, repaired, broken, own in sums.t().tolist()
        ]

    def _batches(self) -> Iterator[ExactBatch]:
        if self._complete:
            yield from self.kept or ()
            return
        problem, device = self.problem, self.problem.space.device
        free = (default_budget(device) if problem.budget is None else problem.budget) // 2
        batches = (
            (batch, self.before.rows(source.split, batch.position)) for source in self.sources for batch in source
        )
        for batch in exact_batches(problem.evaluator, batches, problem.space):
            free -= batch.nbytes
            if free < 0:
                self.kept = None
            elif self.kept is not None:
                self.kept.append(batch)
            yield batch
        self._complete = self.kept is not None
