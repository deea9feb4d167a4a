"""Finds targets that a change of the last layer can fix, what the change breaks, and passed samples
near the targets.

Each target is fixed alone, while every known passed sample stays right. A sample with label y,
layer inputs h and logits z keeps its margin over class c under a change D of the weights if (z_y -
z_c) + (D_y - D_c) h >= required. This is linear in D. The size of D is the root mean square of its
effect on the logits of passed samples; cutting planes find the smallest D for each target. No
repair of this layer can fix more targets than can be fixed one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.timing import StageTimer
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
from lightning_nrl.methods.solvers.convex_head import (
    add_cutting_planes,
    margins_over_rivals,
    pair_gram,
    pair_sides,
    sum_of_pairs,
)
from lightning_nrl.methods.solvers.qp import solve_dual

REQUIRED_MARGIN = (
    1e-3  # a fixed target gets this margin; a passed sample keeps it, or half of its own if less
)
FULFILLED_FRACTION = (
    0.9  # a constraint is violated if the margin is below this fraction of what it requires
)
MAX_FIX_ROUNDS = 14  # rounds of cutting planes, each more expensive; targets without a verdict then count as undecided
ROWS_PER_ROUND = (
    12  # constraints added per target and round: the most violated ones, each of another sample
)
MAX_ROWS_PER_TARGET = 192  # with more constraints, those that do not bind are dropped
FEATURE_RIDGE = 1e-6  # variance added to features, relative to the mean variance; without it, rare directions are free
MAX_LOGITS_AT_ONCE = 2**24  # largest number samples x targets x classes in memory
MAX_TARGETS_TRIED = 512  # if there are more targets, a random sample of them is tried
MAX_MULTIPLICATIONS = (
    8e9  # for all tried targets on all passed samples, once: about a second on one core
)
MIN_TARGETS_TRIED = 8  # this many targets are tried, however long it takes
MAX_FIXES_CHECKED = 96  # fixes that are repeated without held-out samples: enough for a mean
MAX_PASSED_COMPARED = 2_000  # passed samples whose own neighbours are found


class LastLayer(NamedTuple):
    targets: tuple[TargetFinding, ...]
    binding: tuple[Binding, ...]
    check: HeldOutCheck | None
    mixing: NeighbourMixing
    doubts: tuple[DoubtfulLabel, ...]
    seconds: float  # estimated time to try every target


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
    failing = torch.cat([torch.full((len(source.index),), source.failed) for source in known])
    label, passed, targeted = (
        x[features.rows] for x in (results.label, results.passed, results.targeted)
    )
    prediction = features.logits.argmax(1).cpu()
    if len(label) and (int(label.min()) < 0 or not torch.equal(prediction == label, passed)):
        return "the task does not predict the class of the largest logit."
    device, generator = features.inputs.device, torch.Generator().manual_seed(seed)
    samples = LayerSamples(features.inputs, features.logits, label.to(device))
    # A sample that passes in a tie of two classes has no margin to keep.
    top = features.logits.topk(2, dim=1).values
    kept = (passed & (top[:, 0] > top[:, 1]).cpu()).nonzero().flatten()
    targets = targeted.nonzero().flatten()
    if not len(targets) or not len(kept):
        return "there are no targets." if not len(targets) else "no known sample passes."
    ones = samples.features.new_ones(len(label), 0 if layer.bias is None else 1)
    affine = samples._replace(features=torch.cat([samples.features, ones], 1))
    most = int(
        MAX_MULTIPLICATIONS / (2 * len(kept) * affine.features.shape[1] * affine.logits.shape[1])
    )
    tried = sample_places(
        len(targets), max(MIN_TARGETS_TRIED, min(MAX_TARGETS_TRIED, most)), generator
    )
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
        near_passed = neighbours(
            own.features, own.label, theirs.features, theirs.label, itself=some
        )
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
        TargetFinding(
            *_sample(results, row), int(results.prediction[row]), float(results.margin[row])
        )
        for row in results.targeted.nonzero().flatten().tolist()
    )


def _sample(results: SampleResults, row: int) -> tuple[str, int, int]:
    split = next(split for split in results.splits if row < results.of(split).stop)
    return split, int(results.index[row]), int(results.label[row])


def _targets(
    untried: Sequence[TargetFinding], tried: Tensor, found: Fixability, agreement: Tensor
) -> tuple[TargetFinding, ...]:
    targets = [
        replace(target, agreement=share)
        for target, share in zip(untried, agreement.tolist(), strict=True)
    ]
    columns = (tried, found.fixable, found.unfixable, found.size / found.limit)
    for at, yes, no, change in zip(*(column.tolist() for column in columns), strict=True):
        targets[at] = replace(
            targets[at], fixable="yes" if yes else "no" if no else "undecided", change=change
        )
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
    return (
        torch.arange(n)
        if n <= most
        else torch.randperm(n, generator=generator)[:most].sort().values
    )


def _check(
    samples: LayerSamples,
    kept: Tensor,
    failing: Tensor,
    chosen: Tensor,
    targets: Tensor,
    generator: torch.Generator,
) -> HeldOutCheck | None:
    """Fixes each chosen target twice, each time without half of `kept[failing]`, counting what
    breaks in this half.
    """
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
    """Marks the samples that are right under each change of the weights, `T x n` bool."""
    found = [
        (samples.logits + torch.einsum("nd,cd->nc", samples.features, one)).argmax(1)
        == samples.label
        for one in change
    ]
    return torch.stack(found)


class Fixability(NamedTuple):
    """Fixes of `T` targets: changes of the weights that make one target right and break none of `P`
    passed samples.
    """

    fixable: Tensor  # T bool, True if a fix was found
    unfixable: Tensor  # T bool, True if every fix is proven to be larger than `limit`; the other targets are undecided
    size: Tensor  # T, size of the fix: root mean square of its effect on the logits of passed samples; NaN if none
    limit: float  # root mean square of the logits of passed samples, centred per sample
    binds: Tensor  # T x P bool, True if the passed sample limits the fix of the target
    change: Tensor  # T x C x D, fix as a change of the weights, classes x inputs; 0 without a fix


class LayerSamples(NamedTuple):
    """Inputs and outputs of the layer on some samples."""

    features: (
        Tensor  # n x D, inputs of the layer, followed by a column of ones if the layer has a bias
    )
    logits: Tensor  # n x C, outputs of the layer
    label: Tensor  # n int64, true classes

    def at(self, where: Tensor) -> LayerSamples:
        return LayerSamples(*(x[where.to(x.device)] for x in self))


class _Rows(NamedTuple):
    """Constraints, `K` for each of `T` targets: a sample's label must have a larger logit than a
    rival class.
    """

    sample: Tensor  # T x K int64, index of a passed sample, or their number `P` for the target, or -1 for no row
    rival: Tensor  # T x K int64, the rival class
    multiplier: Tensor  # T x K, dual variable of the constraint; above 0 if the constraint binds

    def at(self, targets: Tensor) -> _Rows:
        return _Rows(*(x[targets] for x in self))


@torch.no_grad()
def find_fixability(passed: LayerSamples, targets: LayerSamples) -> Fixability:
    """Finds for each target, which must be wrong, the smallest change that repairs it and breaks no
    passed sample.
    """
    device = passed.features.device
    home, dtype = device if widest(device) == torch.float64 else torch.device("cpu"), torch.float64
    root = _root(passed.features.to(home, dtype))
    white = [
        LayerSamples(x.features.to(home, dtype) @ root, x.logits.to(home, dtype), x.label.to(home))
        for x in (passed, targets)
    ]
    programme = _FixProgramme(*white)
    add_cutting_planes(
        programme.solve, programme.add_violated, MAX_FIX_ROUNDS if len(targets.label) else 0
    )
    fixable, change = programme.fixable, programme.change
    size = torch.where(fixable, change.square().sum((1, 2)).sqrt(), torch.nan)
    return Fixability(
        fixable.to(device),
        (programme.unfixable & ~fixable).to(device),
        size.float().to(device),
        programme.limit,
        programme.binds.to(device),
        (change @ root.T).float().to(device),
    )


def _root(features: Tensor) -> Tensor:
    """Returns the matrix that whitens the features, `D x D`. `FEATURE_RIDGE` limits it in rare
    directions.
    """
    moment = features.T @ features / len(features)
    moment.diagonal().add_(
        FEATURE_RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    )
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(moment).T, eye, upper=True)
    return root


class _FixProgramme:
    """Quadratic programmes on whitened features, one for each target without a verdict (`_going`),
    solved together.
    """

    def __init__(self, passed: LayerSamples, targets: LayerSamples) -> None:
        self.passed, self.targets = passed, targets
        n, n_passed, device = len(targets.label), len(passed.label), passed.features.device
        centred = passed.logits - passed.logits.mean(1, keepdim=True)
        self.limit = float(centred.square().sum(1).mean().sqrt())
        self.change = passed.features.new_zeros(
            n, targets.logits.shape[1], passed.features.shape[1]
        )
        self.fixable, self.unfixable = torch.zeros(2, n, dtype=torch.bool, device=device)
        self.binds = torch.zeros(n, n_passed, dtype=torch.bool, device=device)
        self._going = torch.arange(n, device=device)
        # The first constraint of each target is that its label must beat the predicted class.
        rival = margins_over_rivals(targets.logits, targets.label).argmin(1, keepdim=True)
        multiplier = torch.zeros_like(rival, dtype=targets.logits.dtype)
        self._rows = _Rows(torch.full_like(rival, n_passed), rival, multiplier)

    def solve(self) -> None:
        rows, passed, target = self._rows, self.passed, self.targets.at(self._going)
        own, some = rows.sample == len(passed.label), rows.sample >= 0
        at = torch.where(own | ~some, 0, rows.sample)
        x = torch.where(own[:, :, None], target.features[:, None], passed.features[at])
        label = torch.where(own, target.label[:, None], passed.label[at])
        logits = torch.where(own[:, :, None], target.logits[:, None], passed.logits[at])
        margin = (logits.gather(2, label[:, :, None]) - logits.gather(2, rows.rival[:, :, None]))[
            :, :, 0
        ]
        required = torch.where(own, REQUIRED_MARGIN, (0.5 * margin).clamp_max(REQUIRED_MARGIN))
        sides = pair_sides(label, rows.rival, logits) * some[:, :, None]
        solution = solve_dual(
            pair_gram(x, sides),
            torch.where(some, required - margin, 0.0),
            start=rows.multiplier,
            max_value=0.5 * self.limit**2,
        )
        self._rows = rows._replace(multiplier=solution.values)
        self._is_beyond = (~solution.is_feasible).to(self._going.device)
        self._solution = sum_of_pairs(x, sides, solution.values)

    def add_violated(self) -> bool:
        """Stores solutions that fix a target, adds constraints for the others. Returns False if no
        target is left.
        """
        going, n_passed = self._going, len(self.passed.label)
        strength, violated = _separate(self._solution, self.passed, self.targets.at(going))
        works = strength > 0
        self.change[going[works]] = strength[works, None, None] * self._solution[works]
        self.fixable[going[works]], self.unfixable[going[self._is_beyond]] = True, True
        binding = torch.zeros(len(going), n_passed + 1, dtype=torch.bool, device=going.device)
        binding.scatter_(
            1, torch.where(self._rows.multiplier > 0, self._rows.sample, n_passed), True
        )
        self.binds[going] = binding[:, :n_passed]
        left = (violated.sample >= 0).any(1) & ~self._is_beyond
        self._rows, self._going = _join(self._rows.at(left), violated.at(left)), going[left]
        return len(self._going) > 0


def _separate(change: Tensor, passed: LayerSamples, target: LayerSamples) -> tuple[Tensor, _Rows]:
    """Returns each change's largest fraction that fixes its target, or 0, and the rows which it
    violates most.
    """
    before = margins_over_rivals(passed.logits, passed.label).float()
    required = (0.5 * before).clamp_max(REQUIRED_MARGIN) * FULFILLED_FRACTION
    at_once = max(1, MAX_LOGITS_AT_ONCE // before.numel())
    parts = [_violated_by(some.float(), passed, before, required) for some in change.split(at_once)]
    most, short, sample, rival = (torch.cat(x) for x in zip(*parts, strict=True))
    old = margins_over_rivals(target.logits, target.label)
    gain = margins_over_rivals(torch.einsum("tcd,td->tc", change, target.features), target.label)
    gain = gain.nan_to_num(posinf=0)
    strength = torch.where(most > 1, 1.0, 0.999 * most.double())
    repaired = (old + strength[:, None] * gain).amin(1) > 0
    own_short, own_rival = (old + gain - REQUIRED_MARGIN * FULFILLED_FRACTION).min(1, keepdim=True)
    short, rival = torch.cat([short, own_short], 1), torch.cat([rival, own_rival], 1)
    sample = torch.cat([sample, torch.full_like(own_rival, len(passed.label))], 1)
    violated = _Rows(
        torch.where(short < 0, sample, -1), rival, torch.zeros_like(short, dtype=change.dtype)
    )
    return torch.where(repaired, strength, 0.0), violated


def _violated_by(
    change: Tensor, passed: LayerSamples, before: Tensor, required: Tensor
) -> tuple[Tensor, ...]:
    """Returns each change's smallest fraction that breaks a sample; shortfall, sample, rival of the
    worst rows.
    """
    moved = torch.einsum("pd,tcd->tpc", passed.features.float(), change)
    at = passed.label.expand(len(change), -1)[:, :, None]
    gain = moved.gather(2, at) - moved
    breaks = (before / (-gain).clamp_min(torch.finfo(gain.dtype).tiny)).amin((1, 2))
    short, rival = (gain.add_(before - required)).min(2)
    short, sample = short.topk(min(ROWS_PER_ROUND, short.shape[1]), largest=False)
    return breaks, short, sample, rival.gather(1, sample)


def _join(rows: _Rows, new: _Rows) -> _Rows:
    """Joins old and new constraints. If there are too many, drops old constraints that do not bind."""
    spare = (rows.multiplier == 0) & (
        rows.sample.shape[1] + new.sample.shape[1] > MAX_ROWS_PER_TARGET
    )
    rows = rows._replace(sample=torch.where(spare, -1, rows.sample))
    both = _Rows(*(torch.cat(pair, 1) for pair in zip(rows, new, strict=True)))
    width = int((both.sample >= 0).sum(1).amax()) if len(both.sample) else 0
    order = (both.sample < 0).long().argsort(dim=1, stable=True)[:, :width]
    return _Rows(*(x.gather(1, order) for x in both))
