"""What a model does on known data, and what its last Linear layer is given there: one pass over them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Source, run_model
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator, Forward
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["Features", "HeadFeatures", "collect_features", "drawn"]

MAX_SAMPLES = 20_000
"""Samples whose features are recorded, at most: all failed, then the passed that are nearest to failing."""


class Features(NamedTuple):
    """Inputs and outputs of the last Linear, whose outputs are the logits. On the model's device."""

    rows: Tensor  # n int64 on the CPU, rows of the results, ascending
    inputs: Tensor  # n x D, at least float32
    logits: Tensor  # n x C


class HeadFeatures(NamedTuple):
    """The results, the features, and how long the model took."""

    results: SampleResults
    features: Features | None  # None where no Linear gives the logits
    seconds: float  # for one pass over this rank's share of the known data


@torch.no_grad()
def collect_features(
    evaluator: Evaluator, known: Sequence[Source], head: nn.Linear | None, target: Target
) -> HeadFeatures:
    """Runs the model over known data; where these are many, once more over the samples that matter most.

    All ranks get the same features. `head` is the last Linear; None if there is none.
    """
    collective = evaluator.collective
    few = sum(len(source.index) for source in known) <= MAX_SAMPLES
    start = time.perf_counter()
    with _recording(head if few else None) as recorder:
        results = evaluator.run(known, target, forward=recorder.judged(evaluator))
    seconds = time.perf_counter() - start
    if few:
        mine = torch.cat([results.rows(source.split, source.positions) for source in known])
        return HeadFeatures(results, _gathered(recorder, mine, collective), seconds)
    parts = []
    with _recording(head) as recorder:
        for batch, rows in drawn(known, results, _matter(results)):
            evaluator.output(batch, recorder.judged(evaluator))
            parts.append(rows)
    mine = torch.cat(parts) if parts else torch.zeros(0).long()
    return HeadFeatures(results, _gathered(recorder, mine, collective), seconds)


def drawn(
    known: Sequence[Source], results: SampleResults, rows: Tensor, size: int = 256
) -> Iterator[tuple[Any, Tensor]]:
    """This rank's share of chosen rows of the results, in batches, each with its rows."""
    for source in known:
        start = results.start(source.split)
        mine = source.positions[torch.isin(source.positions + start, rows)]
        for batch in source.draw(list(mine.split(size)) if len(mine) else []):
            yield batch, batch.position + start


class _HeadRecorder:
    """Collects what a layer is given as long as it gives the logits, once a pass, one row a sample."""

    def __init__(self, head: nn.Linear | None) -> None:
        self.usable = head is not None
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._calls: list[tuple[Tensor, Tensor]] = []

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Copies, since the model may go on to change its own tensors in place.
        self._calls.append((args[0].detach().clone(), output.detach().clone()))

    def judged(self, evaluator: Evaluator) -> Forward:
        """The model; each call of it adds features or ends the recording."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            output = run_model(evaluator.model, args, kwargs)
            if self.usable:
                logits = evaluator.task.logits(output)
                self.usable = len(self._calls) == 1 and logits.ndim == 2 and torch.equal(self._calls[0][1], logits)
            if self.usable:
                x, logits = self._calls[0]
                self.inputs.append(x.to(torch.promote_types(x.dtype, torch.float32)))
                self.logits.append(logits.to(self.inputs[-1].dtype))
            return output

        return forward


@contextmanager
def _recording(head: nn.Linear | None) -> Iterator[_HeadRecorder]:
    recorder = _HeadRecorder(head)
    if head is None:
        yield recorder
        return
    handle = head.register_forward_hook(recorder.note)
    try:
        yield recorder
    finally:
        handle.remove()


def _gathered(recorder: _HeadRecorder, mine: Tensor, collective: Collective) -> Features | None:
    """Every rank's features in the order of the rows; None if any rank's layer does not give the logits."""
    usable = recorder.usable and bool(recorder.inputs)
    if collective.any(len(mine) > 0 and not usable) or not collective.any(usable):
        return None
    empty = torch.zeros(0, 0)
    parts = [mine, *(torch.cat(x) if x else empty for x in (recorder.inputs, recorder.logits))]
    rows, inputs, logits = (torch.cat([x for x in collective.gather(part) if x.numel()]) for part in parts)
    order = rows.argsort()
    return Features(rows[order], *(x[order.to(x.device)] for x in (inputs, logits)))


def _matter(results: SampleResults) -> Tensor:
    """`MAX_SAMPLES` rows, ascending: of targets, of other failures, and of passed samples by rising margin."""
    rank = torch.where(results.passed, results.margin.nan_to_num(torch.inf), -1.0)
    rank = torch.where(results.targeted, -2.0, rank)
    return rank.argsort(stable=True)[:MAX_SAMPLES].sort().values
