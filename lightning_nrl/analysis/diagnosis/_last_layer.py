"""Analyses the last layer: targets that it can fix, what fixes break, and targets' neighbours."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.preserve import shuffled
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    DoubtfulLabel,
    HeldOutCheck,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.analysis.diagnosis.fixability import Fixability, find_fixability
from lightning_nrl.data import Source
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.head_features import (
    NEIGHBOURS,
    HeadFeatures,
    LayerSamples,
    doubtful,
    neighbours,
)

MAX_TARGETS_TRIED = 512  # if there are more targets, a random sample of them is tried
# For all tried targets on all passed samples, once: about a second on one core.
MAX_MULTIPLICATIONS = 8e9
MIN_TARGETS_TRIED = 8  # this many targets are tried, however long it takes
MAX_FIXES_CHECKED = 96  # fixes that are repeated without held-out samples: enough for a mean
MAX_PASSED_COMPARED = 2_000  # passed samples whose own neighbours are found


class LastLayer(NamedTuple):
    targets: tuple[TargetFinding, ...]
    binding: tuple[Binding, ...] = ()
    check: HeldOutCheck | None = None
    mixing: NeighbourMixing | None = None
    doubts: tuple[DoubtfulLabel, ...] = ()
    seconds: float = math.nan  # estimated time to try every target


def analyze_last_layer(
    layer: nn.Linear | None,
    seen: HeadFeatures,
    known: Sequence[Source],
    seed: int,
    clock: StageTimer,
) -> LastLayer | str:
    """Returns an analysis of the last layer, or the reason why it cannot be analysed."""
    results, features = seen.results, seen.features
    if layer is None:
        return "the model has no Linear layer."
    if features is None:
        return "the last Linear does not return the logits."
    label, passed = results.label[features.rows], results.passed[features.rows]
    prediction = features.logits.argmax(1).cpu()
    if (label < 0).any() or not torch.equal(prediction == label, passed):
        return "the task does not predict the class of the largest logit."
    # A sample that passes in a tie of two classes has no margin to keep.
    top = features.logits.topk(2, dim=1).values
    kept = (passed & (top[:, 0] > top[:, 1]).cpu()).nonzero().flatten()
    targets = results.targeted[features.rows].nonzero().flatten()
    if not len(targets):
        return "there are no targets."
    if not len(kept):
        return "no known sample passes."
    generator = torch.Generator().manual_seed(seed)
    device = features.inputs.device
    if widest(device) != torch.float64:
        device = torch.device("cpu")
    samples = LayerSamples(features.inputs.to(device), features.logits.to(device), label.to(device))
    affine = samples
    if layer.bias is not None:
        ones = samples.features.new_ones(len(label), 1)
        affine = samples._replace(features=torch.cat([samples.features, ones], 1))
    with clock.stage("alone"):
        start = time.perf_counter()
        per_target = 2 * len(kept) * affine.features.shape[1] * affine.logits.shape[1]
        in_time = max(MIN_TARGETS_TRIED, int(MAX_MULTIPLICATIONS / per_target))
        tried = sample_places(len(targets), min(MAX_TARGETS_TRIED, in_time), generator)
        fixes = find_fixability(affine.at(kept), affine.at(targets[tried]))
        seconds = (time.perf_counter() - start) * len(targets) / len(tried)
    with clock.stage("held out"):
        fixed = tried[fixes.fixable.cpu()]
        checked = targets[fixed[sample_places(len(fixed), MAX_FIXES_CHECKED, generator)]]
        failing = torch.cat([torch.full((len(source.index),), source.failed) for source in known])
        held_out = failing[features.rows][kept].nonzero().flatten()
        check = _check_held_out(affine, kept, held_out, checked, targets, generator)
    findings = untried_targets(results)
    with clock.stage("neighbours"):
        mixing, doubts = _compare_labels(samples.at(targets), samples.at(kept), findings, generator)
    return LastLayer(
        _add_fixes(findings, tried, fixes),
        _binding_samples(results, features.rows[kept], fixes.binds.sum(0).cpu()),
        check,
        mixing,
        doubts,
        seconds,
    )


def sample_places(n: int, most: int, generator: torch.Generator) -> Tensor:
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:most].sort().values


def untried_targets(results: SampleResults) -> tuple[TargetFinding, ...]:
    targets = []
    for row in results.targeted.nonzero().flatten().tolist():
        prediction, margin = int(results.prediction[row]), float(results.margin[row])
        targets.append(TargetFinding(*_sample(results, row), prediction, margin))
    return tuple(targets)


def _sample(results: SampleResults, row: int) -> tuple[str, int, int]:
    split = next(split for split in results.splits if row < results.of(split).stop)
    return split, int(results.index[row]), int(results.label[row])


def _add_fixes(
    findings: Sequence[TargetFinding], tried: Tensor, fixes: Fixability
) -> tuple[TargetFinding, ...]:
    targets = list(findings)
    change = fixes.size / fixes.limit
    for i, place in enumerate(tried.tolist()):
        verdict = "undecided"
        if fixes.fixable[i]:
            verdict = "yes"
        elif fixes.unfixable[i]:
            verdict = "no"
        targets[place] = replace(targets[place], fixable=verdict, change=float(change[i]))
    return tuple(targets)


def _binding_samples(
    results: SampleResults, passed: Tensor, n_targets: Tensor
) -> tuple[Binding, ...]:
    binding = []
    for i in n_targets.argsort(descending=True, stable=True).tolist():
        row, n = int(passed[i]), int(n_targets[i])
        if n:
            binding.append(Binding(*_sample(results, row), float(results.margin[row]), n))
    return tuple(binding)


def _check_held_out(
    samples: LayerSamples,
    kept: Tensor,
    held_out: Tensor,
    checked: Tensor,
    targets: Tensor,
    generator: torch.Generator,
) -> HeldOutCheck | None:
    """Fixes each checked target twice, each time without half of `kept[held_out]`.

    Counts what breaks in this half.
    """
    if len(held_out) < 2 or not len(checked):
        return None
    halves = shuffled(held_out, generator).chunk(2)
    broken, repaired = torch.zeros(len(checked)), torch.zeros(len(checked))
    is_itself = checked[:, None] == targets
    for half in halves:
        used = torch.ones(len(kept), dtype=torch.bool)
        used[half] = False
        fixes = find_fixability(samples.at(kept[used]), samples.at(checked))
        breaks = ~_right(fixes.change, samples.at(kept[half]))
        repairs = _right(fixes.change, samples.at(targets)).cpu() & ~is_itself
        broken += breaks.sum(1).cpu()
        repaired += repairs.sum(1) / len(halves)
    return HeldOutCheck(
        repairs=len(checked),
        passed=len(held_out),
        broken=float(broken.mean()),
        other_targets=len(targets) - 1,
        repaired=float(repaired.mean()),
        harmless=float((broken == 0).float().mean()),
    )


def _right(changes: Tensor, samples: LayerSamples) -> Tensor:
    """Marks the samples that are right under each change of the weights, `T x n` bool."""
    is_right = []
    for change in changes:
        logits = samples.logits + torch.einsum("nd,cd->nc", samples.features, change)
        is_right.append(logits.argmax(1) == samples.label)
    return torch.stack(is_right)


def _compare_labels(
    targets: LayerSamples,
    passed: LayerSamples,
    findings: Sequence[TargetFinding],
    generator: torch.Generator,
) -> tuple[NeighbourMixing, tuple[DoubtfulLabel, ...]]:
    """Compares labels with those of the nearest passed samples."""
    n_passed = len(passed.label)
    near = neighbours(targets, passed)
    places = sample_places(n_passed, MAX_PASSED_COMPARED, generator).to(passed.label.device)
    near_passed = neighbours(passed.at(places), passed, itself=places)
    mixing = NeighbourMixing(
        min(NEIGHBOURS, max(1, n_passed - 1)),
        targets=float(near.agreement.double().nanmean()),
        passed=float(near_passed.agreement.double().nanmean()),
    )
    is_doubtful = doubtful(near, targets, passed)
    lead = targets.logits.amax(1) - targets.logits.gather(1, targets.label[:, None])[:, 0]
    doubts = []
    for i in is_doubtful.nonzero().flatten().tolist():
        target = findings[i]
        sample = target.split, target.id, target.label, target.prediction
        doubts.append(DoubtfulLabel(*sample, float(near.share[i]), float(lead[i])))
    doubts.sort(key=lambda doubt: (-doubt.agreed, -doubt.lead))
    return mixing, tuple(doubts)
