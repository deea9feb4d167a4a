"""Records the inputs of the last Linear layer on known data, and finds doubtful labels by comparing
these inputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Source, run_model
from lightning_nrl.data.targets import AllFailures, Target
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import force_eager, last_linear
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import class_logits

MAX_SAMPLES = 20_000
"""Largest number of recorded samples: first targets, then other failures, then passed samples by
rising margin.
"""


class Features(NamedTuple):
    """Inputs and outputs of the head, the last Linear, for `n` samples, on the model's device."""

    rows: Tensor  # n int64 on the CPU: row of each sample in the results, ascending
    inputs: Tensor  # n x D: samples x input features, at least float32
    logits: Tensor  # n x C: samples x classes, as returned by `class_logits`


class HeadFeatures(NamedTuple):
    """Results and head features of a model on the known data."""

    results: SampleResults
    features: Features | None  # None unless the model ends in a Linear that returns the logits
    seconds: float  # duration of one pass over this rank's share of the known data


@torch.no_grad()
def collect_features(
    evaluator: Evaluator, known: Sequence[Source], head: nn.Linear | None, target: Target
) -> HeadFeatures:
    """Runs the model over the known data and records the inputs and outputs of its last Linear,
    `head`.

    If there are more than `MAX_SAMPLES` samples, a second pass records a selection. All ranks get
    the same features.
    """
    few = sum(len(source.index) for source in known) <= MAX_SAMPLES
    start = time.perf_counter()
    recorder = _HeadRecorder(evaluator, head if few else None)
    results = evaluator.run(known, target, forward=recorder)
    seconds = time.perf_counter() - start
    if few:
        mine = [results.rows(source.split, source.positions) for source in known]
    else:
        mine, recorder = [torch.zeros(0).long()], _HeadRecorder(evaluator, head)
        for batch, rows in row_batches(known, results, _select_rows(results)):
            evaluator.output(batch, recorder)
            mine.append(rows)
    return HeadFeatures(
        results, _gather_features(recorder, torch.cat(mine), evaluator.collective), seconds
    )


def row_batches(
    known: Sequence[Source], results: SampleResults, rows: Tensor, size: int = 256
) -> Iterator[tuple[Any, Tensor]]:
    """Yields this rank's samples in `rows` of the results, as pairs of a `Batch` and the rows of
    its samples.
    """
    for source in known:
        start = results.start(source.split)
        mine = source.positions[torch.isin(source.positions + start, rows)]
        for batch in source.draw(list(mine.split(size)) if len(mine) else []):
            yield batch, batch.position + start


class _HeadRecorder:
    """Calls the model and records inputs and outputs of its head; stops recording if the outputs
    are not the logits.
    """

    def __init__(self, evaluator: Evaluator, head: nn.Linear | None) -> None:
        self.evaluator, self.head = evaluator, head
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.evaluator.model
        if self.head is None:
            return run_model(model, args, kwargs)
        calls: list[tuple[Tensor, Tensor]] = []
        # Copies, since the model may change its tensors in place.
        handle = self.head.register_forward_hook(
            lambda module, given, output: calls.append(
                (given[0].detach().clone(), output.detach().clone())
            )
        )
        try:
            with force_eager():
                output = run_model(model, args, kwargs)
        finally:
            handle.remove()
        logits = self.evaluator.task.logits(output)
        if len(calls) == 1 and logits.ndim == 2 and torch.equal(calls[0][1], logits):
            self.inputs.append(at_least_float32(calls[0][0]))
            self.logits.append(class_logits(calls[0][1]).to(self.inputs[-1].dtype))
        else:
            self.head = None
        return output


def _gather_features(
    recorder: _HeadRecorder, mine: Tensor, collective: Collective
) -> Features | None:
    """Gathers the features of all ranks in row order; returns None unless the head returns the
    logits on every rank.
    """
    usable = recorder.head is not None and bool(recorder.inputs)
    if collective.any(len(mine) > 0 and not usable) or not collective.any(usable):
        return None
    empty = torch.zeros(0, 0)
    parts = [mine, *(torch.cat(x) if x else empty for x in (recorder.inputs, recorder.logits))]
    rows, inputs, logits = (
        torch.cat([x for x in collective.gather(part) if x.numel()]) for part in parts
    )
    order = rows.argsort()
    return Features(rows[order], *(x[order.to(x.device)] for x in (inputs, logits)))


def _select_rows(results: SampleResults) -> Tensor:
    rank = torch.where(results.passed, results.margin.nan_to_num(torch.inf), -1.0)
    rank = torch.where(results.targeted, -2.0, rank)
    return rank.argsort(stable=True)[:MAX_SAMPLES].sort().values


NEIGHBOURS = 10  # number of nearest passed samples
MAX_SIMILARITIES = 2**24  # largest number of cosine similarities in memory
AGREEMENT_SHARE = (
    0.9  # smallest share of neighbours in the predicted class for a label to be doubtful
)


class Neighbours(NamedTuple):
    """Labels among the neighbours (nearest passed samples) of each of `n` samples."""

    agreement: Tensor  # n float: share of the neighbours with the sample's own label; NaN without neighbours
    label: Tensor  # n int64: most frequent label of the neighbours, on a tie the smallest; -1 without neighbours
    share: Tensor  # n float: share of the neighbours with the most frequent label; 0 without neighbours


@torch.no_grad()
def neighbours(
    inputs: Tensor,
    label: Tensor,
    passed: Tensor,
    passed_label: Tensor,
    *,
    itself: Tensor | None = None,
) -> Neighbours:
    """Compares the labels of `n` samples with the labels of the nearest passed samples.

    The samples have the features `inputs`, `n x D`, and the labels `label`; the `P` passed samples
    have the features `passed`, `P x D`, and the labels `passed_label`. Distances are cosine
    distances after subtraction of the mean of `passed`. If the samples are in `passed` too,
    `itself`, `n` int64, has their rows: no sample is its own neighbour.
    """
    middle = passed.mean(0)
    left, right = (F.normalize(x - middle, dim=1) for x in (inputs, passed))
    k = min(NEIGHBOURS, len(passed) - (itself is not None))
    if k < 1 or not len(inputs):
        agreement = torch.full_like(label, torch.nan, dtype=torch.float32)
        return Neighbours(agreement, torch.full_like(label, -1), torch.zeros_like(agreement))
    classes = int(torch.cat([label, passed_label]).max()) + 1
    counts = []
    for at in torch.arange(len(left), device=left.device).split(
        max(1, MAX_SIMILARITIES // len(right))
    ):
        likeness = left[at] @ right.T
        if itself is not None:
            likeness.scatter_(1, itself[at, None], -torch.inf)
        near = passed_label[likeness.topk(k, dim=1).indices]
        votes = torch.zeros(len(at), classes, device=left.device)
        counts.append(votes.scatter_add_(1, near, torch.ones_like(near, dtype=votes.dtype)))
    shares = torch.cat(counts) / k
    share, most = shares.max(1)
    return Neighbours(shares.gather(1, label[:, None])[:, 0], most, share)


def doubtful(
    near: Neighbours, label: Tensor, logits: Tensor, passed_logits: Tensor, passed_label: Tensor
) -> Tensor:
    """Marks doubtful labels: the model and the neighbours agree on another class, and the model is
    sure of it.

    The neighbours agree if at least `AGREEMENT_SHARE` of them have the predicted class. The model
    is sure if the logit of the predicted class exceeds the logit of `label` by at least a typical
    lead: the median difference of the two largest logits over the passed samples of the predicted
    class. `near` comes from `neighbours`. Shapes are `n` for `label` and the result, `n x C` for
    `logits`, `P x C` for `passed_logits`, and `P` for `passed_label`.
    """
    prediction = logits.argmax(1)
    lead = (logits.gather(1, prediction[:, None]) - logits.gather(1, label[:, None]))[:, 0]
    top = passed_logits.topk(2, dim=1).values
    usual = torch.full((logits.shape[1],), torch.inf, dtype=top.dtype, device=top.device)
    for c in passed_label.unique().tolist():
        usual[c] = (top[:, 0] - top[:, 1])[passed_label == c].median()
    agreed = (near.label == prediction) & (near.share >= AGREEMENT_SHARE) & (prediction != label)
    return agreed & (lead >= usual[prediction])


def find_label_issues(
    evaluator: Evaluator, known: Sequence[Source], results: SampleResults
) -> Tensor:
    """Marks the targets with a doubtful label (see `doubtful`), `N` bool by row of `results`.

    Runs the model over the known data once, and if there are more than `MAX_SAMPLES`, again over a
    selection. Marks nothing unless the last Linear returns the logits. `results` are the model's
    results on the known data.
    """
    found = torch.zeros_like(results.passed)
    _, head = last_linear(evaluator.model, evaluator.called)
    features = collect_features(evaluator, known, head, AllFailures()).features
    if features is None:
        return found
    label, passed, targeted = (
        x[features.rows] for x in (results.label, results.passed, results.targeted)
    )
    right = features.logits.argmax(1).cpu() == label
    targets, kept = (targeted & ~right).nonzero().flatten(), (passed & right).nonzero().flatten()
    if not len(targets) or not len(kept):
        return found
    device = features.inputs.device
    label, mine, theirs = label.to(device), targets.to(device), kept.to(device)
    near = neighbours(features.inputs[mine], label[mine], features.inputs[theirs], label[theirs])
    doubted = doubtful(
        near, label[mine], features.logits[mine], features.logits[theirs], label[theirs]
    )
    found[features.rows[targets[doubted.cpu()]]] = True
    return found
