"""Data batch by batch, each replayed to the very bits that the whole model gives under any weights.

A batch is replayed in the size it has, by the model's own kernels. Where that gives, under the original weights, the
logits of a forward pass bit for bit, it stands for one under other weights too: the same operations on the same shapes.
Elsewhere, and where nothing can be replayed, the whole model is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk, _Group, _sort_in, _whole_group
from lightning_nrl._scoring.replay import Subject
from lightning_nrl._scoring.sample_layout import to_device
from lightning_nrl._scoring.sparse_delta import layer_output
from lightning_nrl._utils.precision import Context
from lightning_nrl.data.batch import Batch
from lightning_nrl.tasks import Task

__all__ = ["ExactBatch", "exact_batches"]


@dataclass(frozen=True)
class ExactBatch:
    """One batch, ready to be run under other weights.

    Attributes:
        recording: of this batch alone.
        chunk: all of it: rows and targets.
    """

    recording: ActivationCache
    chunk: Chunk

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        return sum(x.nbytes for group in self.recording.groups for parts in group.parts for x in parts)

    @property
    def replayed(self) -> bool:
        """Whether only what comes after the first layer is run."""
        return self.recording.replayable(self.chunk)

    def logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What the deployed model gives when the layers have these parameters, all of them by dotted name."""
        subject = self.recording.subject

        def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            new = {name.rpartition(".")[2]: parameters[name] for name in site.parameters}
            with subject.context():
                return layer_output(site.module, x, new["weight"], new.get("bias", site.module.bias))

        if self.replayed:
            return self.recording.replay(self.chunk, edit)
        group = self.recording.groups[0]
        return subject.whole(group.inputs(group.take(self.chunk.samples, subject.space.device)), parameters)


def exact_batches(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor]],
    space: ParameterSpace,
    task: Task,
    *,
    context: Context = nullcontext,
) -> Iterator[ExactBatch]:
    """Runs the model over data, one batch after the other.

    Args:
        model: the model in evaluation mode.
        batches: each with its samples' rows in the evidence, `n` int64 on the CPU.
        space: the layers that are to have other weights.
        task: finds the logits in what the model returns.
        context: entered around every forward pass, such as autocast.

    Yields:
        What is needed to run each again, on the model's device.

    Raises:
        ReplayError: a layer that is never called.
    """
    subject = Subject(model, space, task, context)
    own = {name: parameter.detach() for site in space.sites for name, parameter in site.parameters.items()}
    plans: list[_Group] = []
    for batch, rows in batches:
        with torch.no_grad():
            inputs = (batch.args, batch.kwargs)
            recording = ActivationCache(subject, list(plans), rows)
            group, stored = _sort_in(recording, inputs, len(rows))
            plans = [known for known in recording.groups if known.plan is not None]
            made = _alone(subject, group, stored, batch, rows)
            if made.replayed and not torch.equal(made.logits(own), subject.whole(inputs, {})):
                group, stored = _whole_group(recording, inputs, len(rows), "replaying it rounds in another way")
                made = _alone(subject, group, stored, batch, rows)
        yield made


def _alone(subject: Subject, group: _Group, stored: list[Tensor], batch: Batch, rows: Tensor) -> ExactBatch:
    """One batch as a recording of its own."""
    alone = _Group(group.plan, group.layouts, group.spec, group.constants)
    alone.add(stored, to_device(batch.target, torch.device("cpu")), rows)
    alone.close()
    recording = ActivationCache(subject, [alone], rows)
    (chunk,) = recording.chunks()
    return ExactBatch(recording, chunk)
