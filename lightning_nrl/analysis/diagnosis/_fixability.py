"""Which failures a last Linear layer can repair, one at a time, while every known passed sample stays right.

With features h before the layer and a change D of its weights, sample p keeps its margin over class c if
(z_y - z_c) + (D_y - D_c) h >= required, which is linear in D. For each target the smallest D is sought (in the root
mean square of what it does to the logits of passed samples) that makes it right under all of these rows, which are
added as they are violated, for all targets side by side.

What repairs several failures without a regression repairs each of them, so the number of those that can be repaired
one at a time bounds what any repair of this layer can reach.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.methods._solvers.convex_head import (
    add_cutting_planes,
    margins_over_rivals,
    pair_gram,
    pair_sides,
    sum_of_pairs,
)
from lightning_nrl.methods._solvers.qp import solve_dual

REQUIRED_MARGIN = 1e-3
"""The margin that is required of targets, and of passed samples that have twice as much: more than rounding takes."""

FULFILLED_FRACTION = 0.9
"""A row that gives this part of what it requires is not violated."""

MAX_FIX_ROUNDS = 14
"""Of cutting planes: each is dearer than the one before. What is open then is undecided."""

ROWS_PER_ROUND = 12
"""Rows that one round adds for a target at most: the most violated ones, each of another sample."""

MAX_ROWS_PER_TARGET = 192
"""Rows that a target has at most; those that do not bind make way."""

FEATURE_RIDGE = 1e-6
"""Part of the mean square of a feature, added to all: features that never occur would cost nothing."""

MAX_LOGITS_AT_ONCE = 2**24
"""Most logits (samples x targets x classes) that are held at once."""


class Fixability(NamedTuple):
    """What can be said of each target. Undecided are those neither `fixable` nor `unfixable`."""

    fixable: Tensor  # T bool: a change was found that repairs it and breaks no passed sample
    unfixable: Tensor  # T bool: proved, any such change would be larger than the limit
    size: Tensor  # T, root mean square of what the change does to logits of passed samples, damped; NaN: none is known
    limit: float  # root mean square of these logits themselves, each sample's less their mean
    binds: Tensor  # T x P bool: passed samples that stand in a target's way
    change: Tensor  # T x C x D, of the weights; 0 where none is known


class LayerSamples(NamedTuple):
    """What the layer does on some samples."""

    features: Tensor  # n x D, its inputs; with a last column of ones if its bias may change
    logits: Tensor  # n x C, its outputs
    label: Tensor  # n int64

    def at(self, where: Tensor) -> LayerSamples:
        """Some of them."""
        return LayerSamples(*(x[where] for x in self))


class _Rows(NamedTuple):
    """Constraints of each target, `T x K`: the label's logit of a sample must lie above a rival's."""

    sample: Tensor  # int64, of the passed; their number stands for the target itself, -1 for no row
    rival: Tensor  # int64, a class
    multiplier: Tensor

    def at(self, targets: Tensor) -> _Rows:
        return _Rows(*(x[targets] for x in self))


@torch.no_grad()
def find_fixability(passed: LayerSamples, targets: LayerSamples) -> Fixability:
    """Seeks for each target the smallest change of a Linear that repairs it and keeps all passed samples right.

    Labels of `passed` have the largest logit, those of `targets` have not, or not alone.
    """
    device = passed.features.device
    home, dtype = device if widest(device) == torch.float64 else torch.device("cpu"), torch.float64
    root = _root(passed.features.to(home, dtype))
    white = [
        LayerSamples(x.features.to(home, dtype) @ root, x.logits.to(home, dtype), x.label.to(home))
        for x in (passed, targets)
    ]
    programme = _FixProgramme(*white)
    add_cutting_planes(programme.solve, programme.add_violated, MAX_FIX_ROUNDS if len(targets.label) else 0)
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
    """`D x D`, times which features have the identity as second moment; directions that hardly occur are damped."""
    moment = features.T @ features / len(features)
    moment.diagonal().add_(FEATURE_RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny))
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(moment).T, eye, upper=True)
    return root


class _FixProgramme:
    """One programme for each target that is undecided, all solved at once on whitened samples; `_going` are left."""

    def __init__(self, passed: LayerSamples, targets: LayerSamples) -> None:
        self.passed, self.targets = passed, targets
        n, n_passed, device = len(targets.label), len(passed.label), passed.features.device
        centred = passed.logits - passed.logits.mean(1, keepdim=True)
        self.limit = float(centred.square().sum(1).mean().sqrt())
        self.change = passed.features.new_zeros(n, targets.logits.shape[1], passed.features.shape[1])
        self.fixable, self.unfixable = torch.zeros(2, n, dtype=torch.bool, device=device)
        self.binds = torch.zeros(n, n_passed, dtype=torch.bool, device=device)
        self._going = torch.arange(n, device=device)
        # At first each target against the class that is predicted instead.
        rival = margins_over_rivals(targets.logits, targets.label).argmin(1, keepdim=True)
        multiplier = torch.zeros_like(rival, dtype=targets.logits.dtype)
        self._rows = _Rows(torch.full_like(rival, n_passed), rival, multiplier)

    def solve(self) -> None:
        """Finds the smallest change of each target under its present rows, and a lower bound of its size."""
        rows, passed, target = self._rows, self.passed, self.targets.at(self._going)
        own, some = rows.sample == len(passed.label), rows.sample >= 0
        at = torch.where(own | ~some, 0, rows.sample)
        x = torch.where(own[:, :, None], target.features[:, None], passed.features[at])
        label = torch.where(own, target.label[:, None], passed.label[at])
        logits = torch.where(own[:, :, None], target.logits[:, None], passed.logits[at])
        margin = (logits.gather(2, label[:, :, None]) - logits.gather(2, rows.rival[:, :, None]))[:, :, 0]
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
        """Keeps what was found, and adds rows for the targets that are still undecided."""
        going, n_passed = self._going, len(self.passed.label)
        strength, violated = _separate(self._solution, self.passed, self.targets.at(going))
        works = strength > 0
        self.change[going[works]] = strength[works, None, None] * self._solution[works]
        self.fixable[going[works]], self.unfixable[going[self._is_beyond]] = True, True
        binding = torch.zeros(len(going), n_passed + 1, dtype=torch.bool, device=going.device)
        binding.scatter_(1, torch.where(self._rows.multiplier > 0, self._rows.sample, n_passed), True)
        self.binds[going] = binding[:, :n_passed]
        left = (violated.sample >= 0).any(1) & ~self._is_beyond
        self._rows, self._going = _join(self._rows.at(left), violated.at(left)), going[left]
        return len(self._going) > 0


def _separate(change: Tensor, passed: LayerSamples, target: LayerSamples) -> tuple[Tensor, _Rows]:
    """How much of each change repairs its target and breaks nothing, 0 if none; and the rows that it violates most.

    Margins are linear in the strength of a change, so one pass gives the largest strength that breaks nothing.
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
    violated = _Rows(torch.where(short < 0, sample, -1), rival, torch.zeros_like(short, dtype=change.dtype))
    return torch.where(repaired, strength, 0.0), violated


def _violated_by(change: Tensor, passed: LayerSamples, before: Tensor, required: Tensor) -> tuple[Tensor, ...]:
    """For each change the strength from which on it breaks something, and its worst rows: shortfall, sample, rival."""
    moved = torch.einsum("pd,tcd->tpc", passed.features.float(), change)
    at = passed.label.expand(len(change), -1)[:, :, None]
    gain = moved.gather(2, at) - moved
    breaks = (before / (-gain).clamp_min(torch.finfo(gain.dtype).tiny)).amin((1, 2))
    short, rival = (gain.add_(before - required)).min(2)
    short, sample = short.topk(min(ROWS_PER_ROUND, short.shape[1]), largest=False)
    return breaks, short, sample, rival.gather(1, sample)


def _join(rows: _Rows, new: _Rows) -> _Rows:
    """Old rows, and new ones behind; without memory for all, of the old those that bind."""
    spare = (rows.multiplier == 0) & (rows.sample.shape[1] + new.sample.shape[1] > MAX_ROWS_PER_TARGET)
    rows = rows._replace(sample=torch.where(spare, -1, rows.sample))
    both = _Rows(*(torch.cat(pair, 1) for pair in zip(rows, new, strict=True)))
    width = int((both.sample >= 0).sum(1).amax()) if len(both.sample) else 0
    order = (both.sample < 0).long().argsort(dim=1, stable=True)[:, :width]
    return _Rows(*(x.gather(1, order) for x in both))
