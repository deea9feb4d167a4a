"""What the last layer's features say of the targets: which are fixable, at what price, among which neighbours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.analysis.diagnosis._fixability import Fixability, LayerSamples, find_fixability
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    DoubtfulLabel,
    HeldOutCheck,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.head_features import NEIGHBOURS, HeadFeatures, doubtful, neighbours
from lightning_nrl.evaluation.sample_results import SampleResults

MAX_TARGETS_TRIED = 512  # one at a time, drawn by chance from more
MAX_MULTIPLICATIONS = 8e9  # of one pass over all passed samples: a second or so on one core
MIN_TARGETS_TRIED = 8  # whatever it takes
MAX_FIXES_CHECKED = 96  # on samples held out, twice: enough for a mean
MAX_PASSED_COMPARED = 2_000  # with their own neighbours


class LastLayer(NamedTuple):
    """Findings of the last layer."""

    targets: tuple[TargetFinding, ...]
    binding: tuple[Binding, ...]
    check: HeldOutCheck | None
    mixing: NeighbourMixing
    doubts: tuple[DoubtfulLabel, ...]
    seconds: float  # to try every target alone


def analyze_last_layer(
    layer: nn.Linear | None, seen: HeadFeatures, known: Sequence[Source], seed: int, clock: StageTimer
) -> LastLayer | str:
    """Returns all findings, or why there are none."""
    results, features = seen.results, seen.features
    if layer is None:
        return "the model has no Linear layer."
    if features is None:
        return "the last Linear does not give the logits."
    failing = torch.cat([torch.full((len(source.index),), source.failed) for source in known])
    label, passed, targeted = (x[features.rows] for x in (results.label, results.passed, results.targeted))
    prediction = features.logits.argmax(1).cpu()
    if len(label) and (int(label.min()) < 0 or not torch.equal(prediction == label, passed)):
        return "the task is not to give one label the largest logit."
    device, generator = features.inputs.device, torch.Generator().manual_seed(seed)
    samples = LayerSamples(features.inputs, features.logits, label.to(device))
    # A tie passes by the order of classes alone: it has no margin to keep.
    top = features.logits.topk(2, dim=1).values
    kept = (passed & (top[:, 0] > top[:, 1]).cpu()).nonzero().flatten()
    targets = targeted.nonzero().flatten()
    if not len(targets) or not len(kept):
        return "there are no targets." if not len(targets) else "no known sample passes."
    ones = samples.features.new_ones(len(label), 0 if layer.bias is None else 1)
    affine = samples._replace(features=torch.cat([samples.features, ones], 1))
    most = int(MAX_MULTIPLICATIONS / (2 * len(kept) * affine.features.shape[1] * affine.logits.shape[1]))
    tried = sample_places(len(targets), max(MIN_TARGETS_TRIED, min(MAX_TARGETS_TRIED, most)), generator)
    with clock.stage("alone"):
        start = time.perf_counter()
        found = find_fixability(affine.at(kept), affine.at(targets[tried]))
        seconds = (time.perf_counter() - start) * len(targets) / len(tried)
    with clock.stage("held out"):
        fixed = tried[found.fixable.cpu()]
        chosen = targets[fixed[sample_places(len(fixed), MAX_FIXES_CHECKED, generator)]]
        check = _check(affine, kept, failing[features.rows][kept], chosen, targets, generator)
    with clock.stage("neighbours"):
        mine, theirs = samples.at(targets), samples.at(kept)
        near = neighbours(mine.features, mine.label, theirs.features, theirs.label)
        some = sample_places(len(kept), MAX_PASSED_COMPARED, generator).to(device)
        own = theirs.at(some)
        near_passed = neighbours(own.features, own.label, theirs.features, theirs.label, itself=some)
        doubted = doubtful(near, mine.label, mine.logits, theirs.logits, theirs.label)
        lead = mine.logits.amax(1) - mine.logits.gather(1, mine.label[:, None])[:, 0]
    agreement, k = near.agreement.cpu(), min(NEIGHBOURS, max(1, len(kept) - 1))
    of_targets = untried_targets(results)
    columns = (x.tolist() for x in (doubted, near.share, lead))
    doubts = [
        DoubtfulLabel(target.split, target.id, target.label, target.prediction, agreed, ahead)
        for target, is_doubted, agreed, ahead in zip(of_targets, *columns, strict=True)
        if is_doubted
    ]
    return LastLayer(
        _targets(of_targets, tried, found, agreement),
        _binding(results, features.rows[kept], found.binds.sum(0).cpu()),
        check,
        NeighbourMixing(k, _histogram(agreement, k), _histogram(near_passed.agreement.cpu(), k)),
        tuple(sorted(doubts, key=lambda doubt: (-doubt.agreed, -doubt.lead))),
        seconds,
    )


def untried_targets(results: SampleResults) -> tuple[TargetFinding, ...]:
    return tuple(
        TargetFinding(*_sample(results, row), int(results.prediction[row]), float(results.margin[row]))
        for row in results.targeted.nonzero().flatten().tolist()
    )


def _sample(results: SampleResults, row: int) -> tuple[str, int, int]:
    split = next(split for split in results.splits if row < results.of(split).stop)
    return split, int(results.index[row]), int(results.label[row])


def _targets(
    untried: Sequence[TargetFinding], tried: Tensor, found: Fixability, agreement: Tensor
) -> tuple[TargetFinding, ...]:
    targets = [replace(target, agreement=share) for target, share in zip(untried, agreement.tolist(), strict=True)]
    columns = (tried, found.fixable, found.unfixable, found.size / found.limit)
    for at, yes, no, change in zip(*(column.tolist() for column in columns), strict=True):
        targets[at] = replace(targets[at], fixable="yes" if yes else "no" if no else "undecided", change=change)
    return tuple(targets)


def _binding(results: SampleResults, passed: Tensor, bound: Tensor) -> tuple[Binding, ...]:
    order = bound.argsort(descending=True, stable=True)[: int((bound > 0).sum())]
    return tuple(
        Binding(*_sample(results, row), float(results.margin[row]), targets)
        for row, targets in zip(passed[order].tolist(), bound[order].tolist(), strict=True)
    )


def _histogram(agreement: Tensor, k: int) -> tuple[int, ...]:
    known = agreement[~agreement.isnan()]
    return tuple((known * k).round().long().bincount(minlength=k + 1).tolist())


def sample_places(n: int, most: int, generator: torch.Generator) -> Tensor:
    """Places of at most so many of n things, ascending."""
    return torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values


def _check(
    samples: LayerSamples, kept: Tensor, failing: Tensor, chosen: Tensor, targets: Tensor, generator: torch.Generator
) -> HeldOutCheck | None:
    """Repairs targets that can be, twice, each time without one half of the passed samples that came with failures."""
    with_failures = failing.nonzero().flatten()
    if len(with_failures) < 2 or not len(chosen):
        return None
    halves = with_failures[torch.randperm(len(with_failures), generator=generator)].chunk(2)
    broken, repaired = torch.zeros(len(chosen)), torch.zeros(len(chosen))
    own = chosen[:, None] == targets
    for half in halves:
        rest = torch.ones(len(kept), dtype=torch.bool)
        rest[half] = False
        found = find_fixability(samples.at(kept[rest]), samples.at(chosen))
        broken += (~_right(found.change, samples.at(kept[half]))).sum(1).cpu()
        repaired += (_right(found.change, samples.at(targets)).cpu() & ~own).sum(1) / len(halves)
    return HeldOutCheck(
        repairs=len(chosen),
        passed=len(with_failures),
        broken=float(broken.mean()),
        others=len(targets) - 1,
        repaired=float(repaired.mean()),
        harmless=float((broken == 0).float().mean()),
    )


def _right(change: Tensor, samples: LayerSamples) -> Tensor:
    """`T x n`, which samples each change of the weights gives the right label."""
    found = [
        (samples.logits + torch.einsum("nd,cd->nc", samples.features, one)).argmax(1) == samples.label for one in change
    ]
    return torch.stack(found)
