"""Counts what weights repair and break, exactly as the deployed model does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.data import Batch, Source
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.head_features import all_batches
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace
from lightning_nrl.evaluation.sample_results import (
    Flips,
    SampleResults,
    TargetCounts,
    flip_masks,
)
from lightning_nrl.methods import Problem
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk, ReplayGroup
from lightning_nrl.search.scoring.memory import free_memory
from lightning_nrl.search.scoring.recording import PassRecorder
from lightning_nrl.search.scoring.replay_plan import Plan
from lightning_nrl.search.scoring.sparse_delta import output_under
from lightning_nrl.search.scoring.traced_model import EditableModel, inputs_of
from lightning_nrl.study.run_store import StoredRun


@dataclass(frozen=True)
class ExactBatch:
    """One recorded batch, whose logits equal those of the deployed model bit for bit.

    A replay runs the model only from the first searched layer on. Replays are used if a replay
    under the original weights gives exactly the logits of the whole model. Otherwise the whole
    model runs.
    """

    cache: ActivationCache  # activations of this batch alone
    chunk: Chunk  # rows and targets of the whole batch

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.cache.groups)

    def logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the deployed model's logits under new `parameters` of the searched layers."""
        model = self.cache.model

        def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            with model.evaluator.context():
                return output_under(parameters, site, x)

        if self.cache.is_replayable(self.chunk):
            return self.cache.replay(self.chunk, edit)
        return self.cache.rerun(self.chunk, parameters)


@torch.no_grad()
def exact_batches(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], space: ParameterSpace
) -> Iterator[ExactBatch]:
    """Records each batch. `batches` has pairs of a batch and its rows in the results, `n` int64."""
    recorder = PassRecorder(EditableModel(evaluator, space))
    original = {name: parameter.detach() for name, parameter in space.parameters.items()}
    for batch, rows in batches:
        inputs, n = inputs_of(batch), len(rows)
        exact = None
        if recorder.can_cut(inputs, n):
            exact = _exact_batch(recorder, *recorder.record(inputs, n), batch, rows)
        if exact is None or not torch.equal(
            exact.logits(original), recorder.model.logits(inputs, {})
        ):
            exact = _exact_batch(recorder, *recorder.record_whole(inputs, n), batch, rows)
        yield exact


def _exact_batch(
    recorder: PassRecorder, plan: Plan, stored: list[Tensor], batch: Batch, rows: Tensor
) -> ExactBatch:
    group = ReplayGroup(plan, recorder.model.space.device)
    group.add(stored, batch.target, rows)
    group.finish()
    cache = ActivationCache(recorder.model, [group], rows)
    (chunk,) = cache.chunks()
    return ExactBatch(cache, chunk)


@dataclass
class Recount:
    """Counts what a run repairs and breaks on some data.

    Recorded batches are kept for later calls if memory allows.
    """

    problem: Problem
    sources: Sequence[Source]
    before: SampleResults  # results of the original model
    _kept: list[ExactBatch] | None = None

    @torch.no_grad()
    def __call__(self, stored: StoredRun) -> TargetCounts:
        right_before = self.before.right
        right_after = self._right_under(stored) if stored.run.changed else right_before
        counted = ~self.before.leaked
        masks = [mask & counted for mask in flip_masks(right_before, right_after)]
        return Flips(*masks).target_counts(self.before)

    def _right_under(self, stored: StoredRun) -> Tensor:
        """Returns the mask of samples that are right under the weights of a run, `N` bool."""
        space, task = self.problem.space, self.problem.evaluator.task
        parameters = space.changed(stored.where, stored.values)
        right = self.before.right.to(space.device, copy=True)
        for batch in self._batches():
            rows = batch.chunk.rows.to(space.device)
            right[rows] = task.right(batch.logits(parameters), batch.chunk.target)
        return right.cpu()

    def _batches(self) -> Iterator[ExactBatch]:
        if self._kept is not None:
            yield from self._kept
            return
        problem = self.problem
        memory_limit = problem.memory_limit
        if memory_limit is None:
            memory_limit = free_memory(problem.space.device) // 4
        room = memory_limit // 2
        kept = []
        batches = all_batches(self.sources, self.before)
        for batch in exact_batches(problem.evaluator, batches, problem.space):
            room -= batch.nbytes
            if room >= 0:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if room >= 0:
            self._kept = kept
