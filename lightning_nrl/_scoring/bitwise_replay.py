"""Data batch by batch, each replayed to the very bits that the whole model gives under any weights.

A batch is replayed in the size it has, by the model's own kernels. Where that gives, under the original weights, the
logits of a forward pass bit for bit, it stands for one under other weights too: the same operations on the same shapes.
Elsewhere, and where nothing can be replayed, the whole model is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk, ReplayGroup
from lightning_nrl._scoring.editable_model import EditableModel, Inputs
from lightning_nrl._scoring.recording import can_be_cut, find_group, find_whole_group
from lightning_nrl._scoring.sparse_delta import output_under
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.evaluator import Evaluator

__all__ = ["ExactBatch", "exact_batches"]


@dataclass(frozen=True)
class ExactBatch:
    """One batch, ready to be run under other weights."""

    cache: ActivationCache  # a recording of this batch alone
    chunk: Chunk  # all of it: rows and targets

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(group.nbytes for group in self.cache.groups)

    @property
    def replayed(self) -> bool:
        """Whether only what comes after the first layer is run."""
        return self.cache.is_replayable(self.chunk)

    def logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What the deployed model gives when the layers have these parameters, all of them by dotted name."""
        model = self.cache.model

        def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            with model.evaluator.context():
                return output_under(parameters, site, x)

        if self.replayed:
            return self.cache.replay(self.chunk, edit)
        group = self.cache.groups[0]
        return model.logits(group.inputs(group.take(self.chunk.samples, model.space.device)), parameters)


def exact_batches(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], space: ParameterSpace
) -> Iterator[ExactBatch]:
    """Runs the model over data, batch by batch: what is needed to run each again, on the model's device.

    Each batch comes with its samples' rows in the results, `n` int64 on the CPU. A layer that is never called is a
    `ReplayError`.
    """
    editable = EditableModel(evaluator, space)
    own = {name: parameter.detach() for name, parameter in space.parameters.items()}
    known: list[ReplayGroup] = []
    sliceable: bool | None = None  # not known before the first batch
    for batch, rows in batches:
        with torch.no_grad():
            inputs: Inputs = (batch.args, batch.kwargs)
            cache = ActivationCache(editable, list(known), rows)
            if sliceable is None:
                sliceable = can_be_cut(editable, inputs, len(rows))
            if sliceable:
                group, stored = find_group(cache, inputs, len(rows), space.device)
            else:
                reason = "samples cannot be taken out of its batches"
                group, stored = find_whole_group(cache, inputs, len(rows), space.device, reason)
            known = [other for other in cache.groups if other.plan is not None]
            made = _of_one_batch(editable, group, stored, batch, rows)
            if made.replayed and not torch.equal(made.logits(own), editable.logits(inputs, {})):
                reason = "replaying it rounds in another way"
                group, stored = find_whole_group(cache, inputs, len(rows), space.device, reason)
                made = _of_one_batch(editable, group, stored, batch, rows)
        yield made


def _of_one_batch(
    model: EditableModel, group: ReplayGroup, stored: list[Tensor], batch: Batch, rows: Tensor
) -> ExactBatch:
    own = group.empty_like(model.space.device, False, ())
    own.add(stored, batch.target, rows)
    own.finish()
    cache = ActivationCache(model, [own], rows)
    (chunk,) = cache.chunks()
    return ExactBatch(cache, chunk)
