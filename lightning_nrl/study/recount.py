"""Counts what weights repair and break, exactly as the deployed model does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace
from lightning_nrl.evaluation.sample_results import (
    Flips,
    SampleResults,
    TargetCounts,
    flip_masks,
)
from lightning_nrl.methods import Problem
from lightning_nrl.search.scoring.activation_cache import (
    ActivationCache,
    Chunk,
    ReplayGroup,
    split_inputs,
)
from lightning_nrl.search.scoring.memory import default_budget
from lightning_nrl.search.scoring.recording import can_be_cut, find_group
from lightning_nrl.search.scoring.sparse_delta import output_under
from lightning_nrl.search.scoring.traced_model import EditableModel, Inputs
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
        group = self.cache.groups[0]
        stored = group.take(self.chunk.samples, model.space.device)
        return model.logits(group.inputs(stored), parameters)


@torch.no_grad()
def exact_batches(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], space: ParameterSpace
) -> Iterator[ExactBatch]:
    """Records each batch. `batches` has pairs of a batch and its rows in the results, `n` int64."""
    model = EditableModel(evaluator, space)
    original = {name: parameter.detach() for name, parameter in space.parameters.items()}
    planned: list[ReplayGroup] = []  # groups of earlier batches that can be replayed
    can_cut: bool | None = None  # unknown before the first batch
    for batch, rows in batches:
        inputs: Inputs = (batch.args, batch.kwargs)
        n = len(rows)
        if can_cut is None:
            can_cut = can_be_cut(model, inputs, n)
        exact: ExactBatch | None = None
        if can_cut:
            cache = ActivationCache(model, list(planned), rows)
            group, stored = find_group(cache, inputs, n, space.device)
            exact = _of_one_batch(model, group, stored, batch, rows)
            planned = [group for group in cache.groups if group.plan is not None]
        if exact is None or not torch.equal(exact.logits(original), model.logits(inputs, {})):
            group, stored = split_inputs(inputs, n, space.device)
            exact = _of_one_batch(model, group, stored, batch, rows)
        yield exact


def _of_one_batch(
    model: EditableModel, group: ReplayGroup, stored: list[Tensor], batch: Batch, rows: Tensor
) -> ExactBatch:
    # Every tensor keeps its own layout: another layout may round differently.
    group = group.empty_like(model.space.device, False, ())
    group.add(stored, batch.target, rows)
    group.finish()
    cache = ActivationCache(model, [group], rows)
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
        return Flips(*flip_masks(right_before, right_after)).target_counts(self.before)

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
            memory_limit = default_budget(problem.space.device)
        room = memory_limit // 2
        kept: list[ExactBatch] = []
        batches = (
            (batch, self.before.rows(source.split, batch.position))
            for source in self.sources
            for batch in source
        )
        for batch in exact_batches(problem.evaluator, batches, problem.space):
            room -= batch.nbytes
            if room >= 0:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if room >= 0:
            self._kept = kept
