"""What passes over the known data have recorded, so that they need not be made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from lightning_nrl._utils.state import State, changed, live_tensors, temporary_weights
from lightning_nrl.data.batch import Batch, Source, WrappedSource
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.head_features import MAX_BYTES, HeadRecorder
from lightning_nrl.evaluation.layers import LayerRef, layer_output
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk

MAX_SECOND_BYTES = MAX_BYTES // 4  # of a pass with other weights than those of the first


@dataclass(frozen=True)
class _Pass:
    """A pass of the deployed model over the known data."""

    after: SampleResults
    tensors: Mapping[str, tuple[TensorWeakRef, int]]  # by name, with their versions
    cache: ActivationCache | None  # of the last layer, under these weights

    @classmethod
    def of(cls, state: State, after: SampleResults, cache: ActivationCache | None) -> _Pass:
        tensors = {}
        for name, tensor in state.items():
            tensors[name] = TensorWeakRef(tensor), tensor._version
        return cls(after, tensors, cache)

    @property
    def state(self) -> State:
        """The weights of the pass, without those that were freed or changed in place since."""
        state = {}
        for name, (reference, version) in self.tensors.items():
            tensor = reference()
            if tensor is not None and tensor._version == version:
                state[name] = tensor
        return state

    def differences(self, model: nn.Module, state: State) -> set[str]:
        """Returns the names of tensors that the pass did not have as the model has with `state`.

        Bits are compared. What was freed or changed in place since counts as different.
        """
        kept, live = self.state, live_tensors(model)
        lost = {id(live[name]) for name in self.tensors.keys() - kept.keys()}
        was, wanted = changed(model, kept), changed(model, state)
        names = was.keys() ^ wanted.keys()
        for name in was.keys() & wanted.keys():
            if was[name].dtype != wanted[name].dtype or not torch.equal(was[name], wanted[name]):
                names.add(name)
        return names | {name for name, value in live.items() if id(value) in lost}


@dataclass
class KnownRecord:
    """The recorded passes of a problem.

    Attributes:
        cache: activations of all known samples at the last layer, under the model's weights. None
            if they are not recorded, such as those of an inner layer.
        start: tensors in which the model differs for now from the model under repair.
        is_trusted: False once the deployed model has given other results than the record. Then
            everything is evaluated by passes.
        passes: passes of the deployed model with weights that are still in use.
    """

    cache: ActivationCache | None = None
    start: State = field(default_factory=dict)
    is_trusted: bool = True
    passes: list[_Pass] = field(default_factory=list)

    def evaluate(
        self, evaluator: Evaluator, state: State, known: Sequence[Source], before: SampleResults
    ) -> SampleResults:
        """Returns the results with the tensors of `state`: from the record, or else by a pass.

        Columns that are equal to those of `before` are kept in memory once.
        """
        cache = self._near(evaluator.model, state) if self.is_trusted else None
        if cache is None:
            return self.deployed(evaluator, state, known, before)
        with temporary_weights(evaluator.model, state):
            return _shared(_replayed(cache, known), before)

    def deployed(
        self, evaluator: Evaluator, state: State, known: Sequence[Source], before: SampleResults
    ) -> SampleResults:
        """Returns the results of the deployed model, which runs unless it did with these weights.

        The pass is recorded, too.
        """
        for earlier in self.passes:
            if not earlier.differences(evaluator.model, state):
                return earlier.after
        in_use = [earlier for earlier in self.passes if len(earlier.state) == len(earlier.tensors)]
        # Only the last cache is kept, to limit memory.
        self.passes[:] = [replace(earlier, cache=None) for earlier in in_use]
        head = None if self.cache is None else self.cache.space.sites[0].module
        rows = torch.zeros(0) if self.cache is None else self.cache.rows
        assert head is None or isinstance(head, nn.Linear)
        recorder = HeadRecorder(evaluator, head, rows, MAX_SECOND_BYTES)
        with temporary_weights(evaluator.model, state):
            after = _shared(evaluator.run(known, forward=recorder), before)
        cache = None
        record = recorder.record()
        if self.cache is not None and record is not None:
            cache = self.cache.with_head(record)
        # A state without versions cannot be told from another, and sharded tensors not compared.
        if evaluator.spare_batch is None and not any(x.is_inference() for x in state.values()):
            self.passes.append(_Pass.of({**self.start, **state}, after, cache))
        return after

    def covers(self, model: nn.Module, state: State) -> bool:
        """True if the results with the tensors of `state` follow from the record."""
        return self.is_trusted and self._near(model, state) is not None

    def covers_path(self, model: nn.Module, state: State) -> bool:
        """True if so do those on the way from the model's weights to `state`."""
        if self.cache is None or not self.is_trusted:
            return False
        return changed(model, state).keys() <= _last_layer(self.cache)

    def at(self, model: nn.Module, state: State) -> KnownRecord:
        """Returns the record of the model with the tensors of `state`, as far as it is known."""
        cache = self._near(model, state)
        if cache is not None:
            with temporary_weights(model, state):
                cache = _with_present_outputs(cache)
        return replace(self, cache=cache, start={**self.start, **state})

    def _near(self, model: nn.Module, state: State) -> ActivationCache | None:
        """Returns the record of a pass with weights that differ from `state` in the last layer."""
        if self.cache is not None and changed(model, state).keys() <= _last_layer(self.cache):
            return self.cache
        for earlier in self.passes:
            cache = earlier.cache
            if cache is not None and earlier.differences(model, state) <= _last_layer(cache):
                return cache
        return None


def _last_layer(cache: ActivationCache) -> set[str]:
    site = cache.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    return {f"{prefix}weight", f"{prefix}bias"}


def _shared(after: SampleResults, before: SampleResults) -> SampleResults:
    index, label = after.index, after.label
    if torch.equal(before.index, index) and torch.equal(before.label, label):
        index, label = before.index, before.label
    return replace(after, index=index, label=label, group=before.group)


def _output(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
    """Computes the output of a site under the weights of the model."""
    return layer_output(site.module, x, site.module.weight, site.module.bias)


@torch.no_grad()
def _with_present_outputs(cache: ActivationCache) -> ActivationCache:
    """Replaces the recorded outputs by those under the present weights of the model."""
    site = cache.space.sites[0]
    outputs = []
    with cache.model.evaluator.context():
        for chunk in _batches(cache):
            x, y = cache.activations(chunk)
            outputs.append(_output(site, x, y))
    assert cache.head is not None
    return cache.with_head(cache.head._replace(outputs=torch.cat(outputs)))


class _RecordedSource(WrappedSource):
    """The recorded samples of a source, in the batches in which they were recorded.

    Each batch has a chunk of the cache as input. `start` is the row of the source's first sample.
    """

    def __init__(self, source: Source, cache: ActivationCache, start: int) -> None:
        super().__init__(source)
        self.cache = cache
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        end = self.start + len(self.index)
        for chunk in _batches(self.cache):
            if self.start <= int(chunk.rows[0]) < end:
                yield Batch((chunk,), chunk.target, chunk.rows - self.start)


def _batches(cache: ActivationCache) -> Iterator[Chunk]:
    assert cache.head is not None
    return cache.chunks(cache.head.sizes)


def _replayed(cache: ActivationCache, known: Sequence[Source]) -> SampleResults:
    """Evaluates the recorded samples under the present weights of the model.

    Batches are those of the pass, so that results are equal to those of a pass, bit for bit.
    """
    sources, start = [], 0
    for source in known:
        sources.append(_RecordedSource(source, cache, start))
        start += len(source.index)
    return cache.model.evaluator.run(
        sources, forward=lambda batch: cache.replay(batch.args[0], _output)
    )
