"""Records the inputs of the last Linear layer on known data, and finds doubtful labels by them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.state import plain_copy
from lightning_nrl.data.batch import Batch, BatchTarget, Source
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import force_eager, last_linear
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import class_logits

MAX_SAMPLES = 20_000
"""Largest number of recorded samples, to limit memory.

Targets come first, then other failures, then passed samples by rising margin.
"""

MAX_BYTES = 2**27  # of the inputs and outputs of all known samples that the first pass may record


class Features(NamedTuple):
    """Inputs and outputs of the head, the last Linear, for `n` samples, on the model's device."""

    rows: Tensor  # n int64 on the CPU: row of each sample in the results, ascending
    inputs: Tensor  # n x D: samples x input features, at least float32
    logits: Tensor  # n x C: samples x classes, as returned by `class_logits`


class HeadRecord(NamedTuple):
    """What the head did in a pass over this rank's share of the known data."""

    rows: Tensor  # n int64 on the CPU: row of each sample in the results
    sizes: list[int]  # number of samples in each batch
    inputs: Tensor  # n x D, as the head got them
    outputs: Tensor  # n x C, the logits
    targets: list[BatchTarget]  # of each batch

    def features(self, rows: Tensor, collective: Collective) -> Features:
        """Gathers the features of the samples in `rows` of the results from all ranks."""
        if collective.world_size == 1 and torch.equal(rows, self.rows):
            x = at_least_float32(self.inputs)  # without a copy, since large data may not fit twice
            return Features(rows, x, class_logits(self.outputs).to(x.dtype))
        at = torch.isin(self.rows, rows).nonzero().flatten()
        inputs, outputs = (column[at.to(column.device)] for column in (self.inputs, self.outputs))
        x = at_least_float32(inputs)
        logits = class_logits(outputs).to(x.dtype)
        return Features(*collective.gather_sorted([self.rows[at]], [x], [logits]))


class HeadRecorder:
    """Runs the model on batches, and records inputs and outputs of its head meanwhile.

    `rows` are the rows of the samples in the results, in the order of the batches. It stops
    recording if the outputs are not the logits, or if all would take more than `most_bytes`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        head: nn.Linear | None,
        rows: Tensor,
        most_bytes: float = math.inf,
    ) -> None:
        self.evaluator = evaluator
        self.head = head
        self.most_bytes = most_bytes
        empty = torch.zeros(0)
        self._record = HeadRecord(rows, [], empty, empty, [])

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the logits of a batch."""
        if self.head is None:
            return self.evaluator.output(batch)
        calls: list[tuple[Tensor, Tensor]] = []

        def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            # Copies, since the model may change its tensors in place.
            calls.append((plain_copy(args[0]), plain_copy(output)))

        with self.head.register_forward_hook(record):
            logits = self.evaluator.output(batch)
        if len(calls) != 1 or logits.ndim != 2 or not torch.equal(calls[0][1], logits):
            self._stop()
        else:
            self._add(*calls[0], batch)
        return logits

    def _add(self, x: Tensor, y: Tensor, batch: Batch) -> None:
        rows, sizes, inputs, outputs, targets = self._record
        n, start = len(rows), sum(sizes)
        if not start:
            if n * (x.nbytes + y.nbytes) > self.most_bytes * len(batch):
                self._stop()
                return
            # Allocated once, since large data may not fit twice.
            inputs, outputs = x.new_empty(n, *x.shape[1:]), y.new_empty(n, *y.shape[1:])
            self._record = self._record._replace(inputs=inputs, outputs=outputs)
        inputs[start : start + len(x)], outputs[start : start + len(y)] = x, y
        sizes.append(len(batch))
        targets.append(batch.target)

    def _stop(self) -> None:
        self.head = None
        self._record = HeadRecord(self._record.rows, [], torch.zeros(0), torch.zeros(0), [])

    def record(self) -> HeadRecord | None:
        """Returns the record after the pass.

        Returns None on all ranks unless the head returned the logits on every rank.
        """
        collective, has_record = self.evaluator.collective, bool(self._record.sizes)
        lacks_record = len(self._record.rows) > 0 and not has_record
        if collective.any(lacks_record) or not collective.any(has_record):
            return None
        return self._record


class HeadFeatures(NamedTuple):
    """Results and head features of a model on the known data."""

    results: SampleResults
    features: Features | None  # None unless the model ends in a Linear that returns the logits
    seconds: float  # duration of one pass over this rank's share of the known data


@torch.no_grad()
def collect_features(
    evaluator: Evaluator,
    known: Sequence[Source],
    head: nn.Linear | None,
    target: Target,
) -> HeadFeatures:
    """Runs the model over the known data and records inputs and outputs of its last Linear, `head`.

    If there are more than `MAX_SAMPLES` samples, a second pass records a selection. All ranks get
    the same features.
    """
    records_all = sum(len(source.index) for source in known) <= MAX_SAMPLES
    recorder = HeadRecorder(evaluator, head if records_all else None, rows_of(known))
    start = time.perf_counter()
    with force_eager():
        results = evaluator.run(known, target, forward=recorder)
    seconds = time.perf_counter() - start
    rows = _rows_near_failing(results)
    if not records_all:
        return HeadFeatures(results, head_features(evaluator, known, head, results, rows), seconds)
    record = recorder.record()
    features = None if record is None else record.features(rows, evaluator.collective)
    return HeadFeatures(results, features, seconds)


def _rows_near_failing(results: SampleResults) -> Tensor:
    """Returns the rows of at most `MAX_SAMPLES` samples, ascending."""
    rank = torch.where(results.passed, results.margin.nan_to_num(torch.inf), -1.0)
    rank[results.targeted] = -2.0
    return rank.argsort(stable=True)[:MAX_SAMPLES].sort().values


def head_features(
    evaluator: Evaluator,
    known: Sequence[Source],
    head: nn.Linear | None,
    results: SampleResults,
    rows: Tensor,
    record: HeadRecord | None = None,
) -> Features | None:
    """Returns the head features of the samples in `rows` of the results.

    They are recorded unless `record` has them. Returns None unless the model ends in a Linear that
    returns the logits.
    """
    if record is not None:
        return record.features(rows, evaluator.collective)
    of_rank = rows_of(known)
    recorder = HeadRecorder(evaluator, head, of_rank[torch.isin(of_rank, rows)])
    with force_eager():
        for batch, _ in row_batches(known, results, rows):
            recorder(batch)
    record = recorder.record()
    return None if record is None else record.features(rows, evaluator.collective)


def rows_of(known: Sequence[Source]) -> Tensor:
    """Returns the rows in the results of this rank's samples, in the order of a pass."""
    rows, start = [], 0
    for source in known:
        rows.append(source.positions + start)
        start += len(source.index)
    return torch.cat(rows)


def row_batches(
    known: Sequence[Source],
    results: SampleResults,
    rows: Tensor,
    size: int = 256,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields this rank's samples in `rows` of the results, as batches with the batches' rows."""
    for source in known:
        start = results.start(source.split)
        positions = source.positions[torch.isin(source.positions + start, rows)]
        if len(positions):
            for batch in source.draw(positions.split(size)):
                yield batch, batch.position + start


def all_batches(known: Sequence[Source], results: SampleResults) -> Iterator[tuple[Batch, Tensor]]:
    """Yields this rank's batches with their rows in the results."""
    for source in known:
        for batch in source:
            yield batch, results.rows(source.split, batch.position)


NEIGHBOURS = 10  # number of nearest passed samples
MAX_SIMILARITIES = 2**24  # largest number of cosine similarities in memory
AGREEMENT_SHARE = 0.9
"""Smallest share of neighbours in the predicted class for a label to be doubtful."""


class Neighbours(NamedTuple):
    """Labels among the neighbours (nearest passed samples) of each of `n` samples."""

    agreement: Tensor  # n float: share of the neighbours with the sample's own label; NaN if none
    label: Tensor  # n int64: most frequent label, on a tie the smallest; -1 without neighbours
    share: Tensor  # n float: share of the neighbours with that label; 0 without neighbours


class LayerSamples(NamedTuple):
    """Inputs and outputs of the last Linear layer on some samples."""

    features: Tensor  # n x D, inputs of the layer; perhaps a column of ones if it has a bias
    logits: Tensor  # n x C, outputs of the layer
    label: Tensor  # n int64, true classes

    def at(self, where: Tensor) -> LayerSamples:
        return LayerSamples(*(column[where.to(column.device)] for column in self))


@torch.no_grad()
def neighbours(
    samples: LayerSamples, passed_samples: LayerSamples, *, itself: Tensor | None = None
) -> Neighbours:
    """Compares the labels of `n` samples with the labels of the nearest passed samples.

    Distances are cosine distances of the features after subtraction of the mean over the passed
    samples. If the samples are among the passed samples, `itself`, `n` int64, has their places: no
    sample is its own neighbour.
    """
    inputs, _, label = samples
    passed, _, passed_label = passed_samples
    n_candidates = len(passed)
    if itself is not None:
        n_candidates -= 1
    k = min(NEIGHBOURS, n_candidates)
    if k < 1 or not len(inputs):
        agreement = torch.full_like(label, torch.nan, dtype=torch.float32)
        return Neighbours(agreement, torch.full_like(label, -1), torch.zeros_like(agreement))
    middle = passed.mean(0)
    directions = F.normalize(inputs - middle, dim=1)
    passed_directions = F.normalize(passed - middle, dim=1)
    n_classes = int(torch.cat([label, passed_label]).max()) + 1
    votes = torch.zeros(len(inputs), n_classes, device=inputs.device)
    rows_at_once = max(1, MAX_SIMILARITIES // len(passed))
    for start in range(0, len(inputs), rows_at_once):
        rows = slice(start, start + rows_at_once)
        similarity = directions[rows] @ passed_directions.T
        if itself is not None:
            similarity.scatter_(1, itself[rows, None], -torch.inf)
        nearest = similarity.topk(k, dim=1).indices
        votes[rows].scatter_add_(1, passed_label[nearest], votes.new_ones(nearest.shape))
    shares = votes / k
    agreement = shares.gather(1, label[:, None])[:, 0]
    share, most_frequent = shares.max(1)
    return Neighbours(agreement, most_frequent, share)


def doubtful(near: Neighbours, samples: LayerSamples, passed: LayerSamples) -> Tensor:
    """Marks doubtful labels: the model, which is sure, and the neighbours agree on another class.

    The neighbours agree if at least `AGREEMENT_SHARE` of them have the predicted class. The model
    is sure if the logit of the predicted class exceeds the logit of the label by at least a typical
    lead: the median difference of the two largest logits over the passed samples of the predicted
    class. `near` comes from `neighbours`. The result is `n` bool.
    """
    _, logits, label = samples
    largest, prediction = logits.max(1)
    lead = largest - logits.gather(1, label[:, None])[:, 0]
    first, second = passed.logits.topk(2, dim=1).values.unbind(1)
    passed_lead = first - second
    typical = logits.new_full(logits.shape[1:], torch.inf)
    for c in passed.label.unique().tolist():
        typical[c] = passed_lead[passed.label == c].median()
    agree = (near.label == prediction) & (near.share >= AGREEMENT_SHARE)
    is_sure = lead >= typical[prediction]
    return agree & is_sure & (prediction != label)


def find_label_issues(
    evaluator: Evaluator, known: Sequence[Source], results: SampleResults, record: HeadRecord | None
) -> Tensor:
    """Marks the targets with a doubtful label (see `doubtful`), `N` bool by row of `results`.

    Looks at no more than `MAX_SAMPLES` samples. Marks nothing unless the last Linear returns the
    logits. `results` are the model's results on the known data, and `record` is of the same pass;
    if it is None, the samples are recorded.
    """
    is_doubtful = torch.zeros_like(results.passed)
    _, head = last_linear(evaluator.model, evaluator.called)
    rows = _rows_near_failing(results)
    features = head_features(evaluator, known, head, results, rows, record)
    if features is None:
        return is_doubtful
    rows, inputs, logits = features
    label = results.label[rows].to(logits.device)
    right = logits.argmax(1) == label
    targets = results.targeted[rows].to(right) & ~right
    passed = results.passed[rows].to(right) & right
    if targets.any() and passed.any():
        samples = LayerSamples(inputs, logits, label)
        of_targets, of_passed = samples.at(targets), samples.at(passed)
        doubted = doubtful(neighbours(of_targets, of_passed), of_targets, of_passed)
        is_doubtful[rows[targets.cpu()][doubted.cpu()]] = True
    return is_doubtful
