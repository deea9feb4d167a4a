"""Inputs of the last Linear layer on known data, and doubtful labels found in them."""

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
"""Largest number of samples with recorded features: failed ones, then passed ones by rising margin."""


class Features(NamedTuple):
    """Inputs of the last Linear, and its outputs if they are the logits. On the model's device."""

    rows: Tensor  # n int64 on the CPU, rows of the results, ascending
    inputs: Tensor  # n x D, at least float32
    logits: Tensor  # n x C, see `class_logits`


class HeadFeatures(NamedTuple):
    """Results of one pass over the known data."""

    results: SampleResults
    features: Features | None  # None if no Linear returns the logits
    seconds: float  # for one pass over this rank's share of the known data


@torch.no_grad()
def collect_features(
    evaluator: Evaluator, known: Sequence[Source], head: nn.Linear | None, target: Target
) -> HeadFeatures:
    """Runs the model over known data and records features; for many samples in a second pass over a selection.

    All ranks get the same features. `head` is the last Linear, if any.
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
    return HeadFeatures(results, _gather_features(recorder, torch.cat(mine), evaluator.collective), seconds)


def row_batches(
    known: Sequence[Source], results: SampleResults, rows: Tensor, size: int = 256
) -> Iterator[tuple[Any, Tensor]]:
    """Yields this rank's share of the chosen rows of the results, in batches, each with its rows."""
    for source in known:
        start = results.start(source.split)
        mine = source.positions[torch.isin(source.positions + start, rows)]
        for batch in source.draw(list(mine.split(size)) if len(mine) else []):
            yield batch, batch.position + start


class _HeadRecorder:
    """Calls the model and records the inputs of its head while the head's outputs are the logits."""

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
            lambda module, given, output: calls.append((given[0].detach().clone(), output.detach().clone()))
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


def _gather_features(recorder: _HeadRecorder, mine: Tensor, collective: Collective) -> Features | None:
    """Gathers the features of all ranks in row order; None if on any rank the layer does not return the logits."""
    usable = recorder.head is not None and bool(recorder.inputs)
    if collective.any(len(mine) > 0 and not usable) or not collective.any(usable):
        return None
    empty = torch.zeros(0, 0)
    parts = [mine, *(torch.cat(x) if x else empty for x in (recorder.inputs, recorder.logits))]
    rows, inputs, logits = (torch.cat([x for x in collective.gather(part) if x.numel()]) for part in parts)
    order = rows.argsort()
    return Features(rows[order], *(x[order.to(x.device)] for x in (inputs, logits)))


def _select_rows(results: SampleResults) -> Tensor:
    """Selects `MAX_SAMPLES` rows, ascending: targets, other failures, then passed samples by rising margin."""
    rank = torch.where(results.passed, results.margin.nan_to_num(torch.inf), -1.0)
    rank = torch.where(results.targeted, -2.0, rank)
    return rank.argsort(stable=True)[:MAX_SAMPLES].sort().values


NEIGHBOURS = 10  # nearest passed samples
MAX_SIMILARITIES = 2**24  # held at once
AGREEMENT_SHARE = 0.9  # share of neighbours of the predicted class that makes a label doubtful


class Neighbours(NamedTuple):
    """The nearest passed samples of each sample."""

    agreement: Tensor  # n float, share with the sample's label; NaN without neighbours
    label: Tensor  # n int64, most frequent label; the smallest of several
    share: Tensor  # n float, share with the most frequent label


@torch.no_grad()
def neighbours(
    inputs: Tensor, label: Tensor, passed: Tensor, passed_label: Tensor, *, itself: Tensor | None = None
) -> Neighbours:
    """Compares labels with those of the nearest passed samples, by cosine similarity of centred features.

    Features are `n x D`, those of the passed samples `P x D`. `itself`, `n` int64, is each sample's own row among the
    passed ones, which is excluded.
    """
    middle = passed.mean(0)
    left, right = (F.normalize(x - middle, dim=1) for x in (inputs, passed))
    k = min(NEIGHBOURS, len(passed) - (itself is not None))
    if k < 1 or not len(inputs):
        agreement = torch.full_like(label, torch.nan, dtype=torch.float32)
        return Neighbours(agreement, torch.full_like(label, -1), torch.zeros_like(agreement))
    classes = int(torch.cat([label, passed_label]).max()) + 1
    counts = []
    for at in torch.arange(len(left), device=left.device).split(max(1, MAX_SIMILARITIES // len(right))):
        likeness = left[at] @ right.T
        if itself is not None:
            likeness.scatter_(1, itself[at, None], -torch.inf)
        near = passed_label[likeness.topk(k, dim=1).indices]
        votes = torch.zeros(len(at), classes, device=left.device)
        counts.append(votes.scatter_add_(1, near, torch.ones_like(near, dtype=votes.dtype)))
    shares = torch.cat(counts) / k
    share, most = shares.max(1)
    return Neighbours(shares.gather(1, label[:, None])[:, 0], most, share)


def doubtful(near: Neighbours, label: Tensor, logits: Tensor, passed_logits: Tensor, passed_label: Tensor) -> Tensor:
    """Marks doubtful labels, `n` bool: neighbours and model agree on another class, and the model is sure.

    Sure means that its lead over the given label is at least its median lead over the runner-up on passed samples of
    that class, so there is no threshold to choose. `label` is `n` int64, `logits` `n x C`, of the passed samples `P`,
    `P x C`.
    """
    prediction = logits.argmax(1)
    lead = (logits.gather(1, prediction[:, None]) - logits.gather(1, label[:, None]))[:, 0]
    top = passed_logits.topk(2, dim=1).values
    usual = torch.full((logits.shape[1],), torch.inf, dtype=top.dtype, device=top.device)
    for c in passed_label.unique().tolist():
        usual[c] = (top[:, 0] - top[:, 1])[passed_label == c].median()
    agreed = (near.label == prediction) & (near.share >= AGREEMENT_SHARE) & (prediction != label)
    return agreed & (lead >= usual[prediction])


def find_label_issues(evaluator: Evaluator, known: Sequence[Source], results: SampleResults) -> Tensor:
    """Marks targets, `N` bool, whose label the model and the nearest passed samples contradict.

    Takes one pass over the known data, or over a selection of very many. Finds none unless a Linear layer returns the
    logits. `results` are those of the model on this rank's share of the splits.
    """
    found = torch.zeros_like(results.passed)
    _, head = last_linear(evaluator.model, evaluator.called)
    features = collect_features(evaluator, known, head, AllFailures()).features
    if features is None:
        return found
    label, passed, targeted = (x[features.rows] for x in (results.label, results.passed, results.targeted))
    right = features.logits.argmax(1).cpu() == label
    targets, kept = (targeted & ~right).nonzero().flatten(), (passed & right).nonzero().flatten()
    if not len(targets) or not len(kept):
        return found
    device = features.inputs.device
    label, mine, theirs = label.to(device), targets.to(device), kept.to(device)
    near = neighbours(features.inputs[mine], label[mine], features.inputs[theirs], label[theirs])
    doubted = doubtful(near, label[mine], features.logits[mine], features.logits[theirs], label[theirs])
    found[features.rows[targets[doubted.cpu()]]] = True
    return found
