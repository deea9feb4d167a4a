"""Finds the smallest change of the last layer that fixes a target and breaks no passed sample.

A sample with label y, layer inputs h and logits z keeps its margin over class c under a change D of
the weights if (z_y - z_c) + (D_y - D_c) h >= required. This is linear in D. The size of D is the
root mean square of its effect on the logits of passed samples; cutting planes find the smallest D
for each target. No repair of this layer can fix more targets than can be fixed one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl.evaluation.head_features import LayerSamples
from lightning_nrl.methods.solvers.convex_head import (
    add_cutting_planes,
    margins_over_rivals,
    pair_gram,
    pair_sides,
    sum_of_pairs,
    whitening_root,
)
from lightning_nrl.methods.solvers.qp import solve_duals

# A fixed target gets this margin; a passed sample keeps it, or half of its own if less.
REQUIRED_MARGIN = 1e-3
# A constraint is violated if the margin is below this fraction of what it requires.
FULFILLED_FRACTION = 0.9
# Of cutting planes, each more expensive; targets without a verdict then count as undecided.
MAX_FIX_ROUNDS = 14
# Constraints added per target and round: the most violated ones, each of another sample.
ROWS_PER_ROUND = 12
# Variance added to features, relative to the mean variance; without it, rare directions are free.
FEATURE_RIDGE = 1e-6
# A change that would break a sample is cut to this share of the fraction at which it would.
BACKOFF = 0.999
MAX_LOGITS_AT_ONCE = 2**24  # largest number samples x targets x classes in memory


class Fixability(NamedTuple):
    """Fixes of `T` targets, each a change of the weights, and the `P` passed samples that bind."""

    fixable: Tensor  # T bool, True if a fix was found
    unfixable: Tensor  # T bool, True if every fix is proven larger than `limit`; others: undecided
    size: Tensor  # T, root mean square of the fix's effect on logits of passed samples; NaN if none
    limit: float  # root mean square of the logits of passed samples, centred per sample
    binds: Tensor  # T x P bool, True if the passed sample limits the fix of the target
    change: Tensor  # T x C x D, fix as a change of the weights, classes x inputs; 0 without a fix


class _Constraints(NamedTuple):
    """`K` constraints for each of `T` targets: a sample's label must beat a rival class."""

    sample: Tensor  # T x K int64, a passed sample's index, `P` plus the target's, or -1 for no row
    rival: Tensor  # T x K int64, the rival class
    multiplier: Tensor  # T x K, dual variable; above 0 if the constraint binds

    def at(self, targets: Tensor) -> _Constraints:
        return _Constraints(*(column[targets] for column in self))


@torch.no_grad()
def find_fixability(passed: LayerSamples, targets: LayerSamples) -> Fixability:
    """Finds for each target, which must be wrong, the smallest change that fixes it alone.

    The samples must be on a device that knows float64.
    """
    features = passed.features.double()
    root = whitening_root(features.T @ features / len(features), FEATURE_RIDGE)
    programme = _FixProgramme(_whitened(passed, root), _whitened(targets, root))
    add_cutting_planes(programme.solve, programme.add_violated, MAX_FIX_ROUNDS)
    fixable, change = programme.fixable, programme.change
    size = torch.where(fixable, change.square().sum((1, 2)).sqrt(), torch.nan)
    return Fixability(
        fixable,
        programme.unfixable & ~fixable,
        size.float(),
        programme.limit,
        programme.binds,
        (change @ root.T).float(),
    )


def _whitened(samples: LayerSamples, root: Tensor) -> LayerSamples:
    return LayerSamples(samples.features.double() @ root, samples.logits.double(), samples.label)


class _FixProgramme:
    """Quadratic programmes, one for each target without a verdict (`_open`), solved together."""

    def __init__(self, passed: LayerSamples, targets: LayerSamples) -> None:
        self.passed, self.targets = passed, targets
        # A target is the sample `P` plus its own index.
        self._samples = LayerSamples(*map(torch.cat, zip(passed, targets, strict=True)))
        self._n_passed = len(passed.label)
        n_targets, n_classes = targets.logits.shape
        centred = passed.logits - passed.logits.mean(1, keepdim=True)
        self.limit = float(centred.square().sum(1).mean().sqrt())
        self._margins = margins = margins_over_rivals(self._samples.logits, self._samples.label)
        required = (0.5 * margins).clamp_max(REQUIRED_MARGIN)
        required[self._n_passed :] = REQUIRED_MARGIN
        self._missing = required - margins
        self.change = passed.features.new_zeros(n_targets, n_classes, passed.features.shape[1])
        self.binds = margins.new_zeros(n_targets, self._n_passed, dtype=torch.bool)
        self.fixable, self.unfixable = margins.new_zeros(2, n_targets, dtype=torch.bool)
        self._open = torch.arange(n_targets, device=margins.device)
        # The first constraint of each target is that its label must beat the predicted class.
        sample = self._n_passed + self._open[:, None]
        rival = margins[self._n_passed :].argmin(1, keepdim=True)
        self._rows = _Constraints(sample, rival, torch.zeros_like(rival, dtype=margins.dtype))

    def solve(self) -> None:
        rows = self._rows
        is_used = rows.sample >= 0
        places = rows.sample.clamp_min(0)
        features, logits, label = self._samples.at(places)
        sides = pair_sides(label, rows.rival, logits) * is_used[:, :, None]
        missing = torch.where(is_used, self._missing[places, rows.rival], 0.0)
        max_value = 0.5 * self.limit**2
        multipliers, value = solve_duals(pair_gram(features, sides), missing, max_value)
        self._rows = rows._replace(multiplier=multipliers)
        self._is_beyond = (value > max_value).to(self._open.device)
        self._solution = sum_of_pairs(features, sides, multipliers)

    def add_violated(self) -> bool:
        """Stores fixes and adds constraints for the targets without. False if no target is left."""
        targets = self._open
        strength, violated = self._separate()
        works = strength > 0
        self.change[targets[works]] = strength[works, None, None] * self._solution[works]
        self.fixable[targets[works]] = True
        self.unfixable[targets[self._is_beyond]] = True
        is_binding = (self._rows.multiplier > 0) & (self._rows.sample < self._n_passed)
        self.binds[targets] = False
        self.binds[targets[is_binding.nonzero()[:, 0]], self._rows.sample[is_binding]] = True
        is_open = (violated.sample >= 0).any(1) & ~self._is_beyond
        columns = zip(self._rows.at(is_open), violated.at(is_open), strict=True)
        rows = _Constraints(*(torch.cat(pair, 1) for pair in columns))
        # Columns that are empty for every target are left out.
        is_empty = rows.sample < 0
        n_used = max((~is_empty).sum(1).tolist(), default=0)
        order = is_empty.long().argsort(dim=1, stable=True)[:, :n_used]
        self._rows = _Constraints(*(column.gather(1, order) for column in rows))
        self._open = targets[is_open]
        return len(self._open) > 0

    def _separate(self) -> tuple[Tensor, _Constraints]:
        """Returns the largest fraction of each solution that is a fix, and the worst violations."""
        targets, change = self.targets.at(self._open), self._solution
        before = self._margins[: self._n_passed].float()
        at_once = max(1, MAX_LOGITS_AT_ONCE // before.numel())
        parts = [_violated_by(part.float(), self.passed, before) for part in change.split(at_once)]
        breaks_at, lack, sample, rival = map(torch.cat, zip(*parts, strict=True))
        old = self._margins[self._n_passed + self._open]
        gain = margins_over_rivals(
            torch.einsum("tcd,td->tc", change, targets.features), targets.label
        ).nan_to_num(posinf=0)
        strength = torch.where(breaks_at > 1, 1.0, BACKOFF * breaks_at.double())
        is_fixed = (old + strength[:, None] * gain).amin(1) > 0
        missing = old + gain - REQUIRED_MARGIN * FULFILLED_FRACTION
        target_lack, target_rival = missing.min(1, keepdim=True)
        lack = torch.cat([lack, target_lack], 1)
        sample = torch.cat([sample, self._n_passed + self._open[:, None]], 1)
        violated = _Constraints(
            torch.where(lack < 0, sample, -1),
            torch.cat([rival, target_rival], 1),
            torch.zeros_like(lack, dtype=change.dtype),
        )
        return torch.where(is_fixed, strength, 0.0), violated


def _violated_by(change: Tensor, passed: LayerSamples, before: Tensor) -> tuple[Tensor, ...]:
    """Returns the fraction at which each change breaks a sample, and its worst rows.

    The rows are three tensors: how far each margin lies above what is required, sample, rival.
    """
    moved = torch.einsum("pd,tcd->tpc", passed.features.float(), change)
    label = passed.label.expand(len(change), -1)[:, :, None]
    gain = moved.gather(2, label) - moved
    breaks_at = (before / (-gain).clamp_min(torch.finfo(gain.dtype).tiny)).amin((1, 2))
    required = (0.5 * before).clamp_max(REQUIRED_MARGIN) * FULFILLED_FRACTION
    lack, rival = (gain + (before - required)).min(2)
    lack, sample = lack.topk(min(ROWS_PER_ROUND, lack.shape[1]), largest=False)
    return breaks_at, lack, sample, rival.gather(1, sample)
