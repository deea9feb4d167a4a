"""What the weights of many runs do on all data, counted exactly as a forward pass of the deployed model counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk, ReplayGroup, split_inputs
from lightning_nrl._scoring.memory import default_budget
from lightning_nrl._scoring.recording import can_be_cut, find_group
from lightning_nrl._scoring.sparse_delta import output_under
from lightning_nrl._scoring.traced_model import EditableModel
from lightning_nrl.analysis.sweep._store import StoredRun
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts, flip_masks
from lightning_nrl.problem import Problem

STATES_MEMORY = 256 << 20
"""Bytes of whole layers, one a run, that are made once and not anew for every batch."""


@dataclass(frozen=True)
class ExactBatch:
    """One batch, run under other weights to the very bits that the deployed model gives.

    It is replayed in the size it has, by the model's own kernels. Where that gives, under the original weights, the
    logits of a forward pass bit for bit, it stands for one under other weights too: the same operations on the same
    shapes. Elsewhere the whole model is run.
    """

    cache: ActivationCache  # a recording of this batch alone
    chunk: Chunk  # all of it: rows and targets

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.cache.groups)

    def logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the deployed model's logits when the layers have these parameters, all of them by dotted name."""
        model = self.cache.model

        def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            with model.evaluator.context():
                return output_under(parameters, site, x)

        if self.cache.is_replayable(self.chunk):
            return self.cache.replay(self.chunk, edit)
        group = self.cache.groups[0]
        return model.logits(group.inputs(group.take(self.chunk.samples, model.space.device)), parameters)


@torch.no_grad()
def exact_batches(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], space: ParameterSpace
) -> Iterator[ExactBatch]:
    """Records data batch by batch, each with its samples' rows in the results, `n` int64 on the CPU."""
    model = EditableModel(evaluator, space)
    own = {name: parameter.detach() for name, parameter in space.parameters.items()}
    known: list[ReplayGroup] = []  # how batches before this one were replayed
    sliceable: bool | None = None  # not known before the first batch
    for batch, rows in batches:
        inputs, n = (batch.args, batch.kwargs), len(rows)
        if sliceable is None:
            sliceable = can_be_cut(model, inputs, n)
        made = None
        if sliceable:
            cache = ActivationCache(model, list(known), rows)
            made = _of_one_batch(model, *find_group(cache, inputs, n, space.device), batch, rows)
            known = [group for group in cache.groups if group.plan is not None]
        if made is None or not torch.equal(made.logits(own), model.logits(inputs, {})):
            made = _of_one_batch(model, *split_inputs(inputs, n, space.device), batch, rows)
        yield made


def _of_one_batch(
    model: EditableModel, group: ReplayGroup, stored: list[Tensor], batch: Batch, rows: Tensor
) -> ExactBatch:
    # Every tensor is kept for itself, in the layout that it came in: another one may round in another way.
    own = group.empty_like(model.space.device, False, ())
    own.add(stored, batch.target, rows)
    own.finish()
    cache = ActivationCache(model, [own], rows)
    (chunk,) = cache.chunks()
    return ExactBatch(cache, chunk)


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
