"""Which failures a last Linear layer can repair alone, one at a time, while every known passed sample stays right.

With features h before the layer and a change D of its weights, sample p keeps its margin over class c if
(z_y - z_c) + (D_y - D_c) h >= keep, which is linear in D. For each target the smallest D is sought (in the root mean
square of what it does to the logits of passed samples) that makes it right under all of these rows. Few of them ever
bind, so they are added as they are violated (cutting planes, Kelley 1960), for all targets side by side.

What repairs several failures without a regression repairs each of them, so the number of those that can be repaired
alone bounds what any repair of this layer can reach.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._convex.batched_qp import ascend
from lightning_nrl._utils.precision import widest

__all__ = ["KEEP", "Alone", "repair_alone"]

KEEP = 1e-3
"""The margin that is asked of targets, and of passed samples that have twice as much: more than rounding takes."""

NEARLY = 0.9
"""A row that gives this share of what it is asked is not violated."""

ROUNDS = 14
"""Of cutting planes, at most: each is dearer than the one before. What is open then is undecided."""

NEW_ROWS = 12
"""Rows that one round adds for a target at most: the most violated ones, each of another sample."""

MOST_ROWS = 192
"""Rows that a target has at most; those that do not bind make way."""

RIDGE = 1e-6
"""Part of the mean square of a feature, added to all: features that never occur would cost nothing."""

PIECE = 2**24
"""Most logits (samples x targets x classes) that are held at once."""


class Alone(NamedTuple):
    """What can be said of each target. Undecided are those neither `fixable` nor `unfixable`."""

    fixable: Tensor  # T bool: a change was found that repairs it and breaks no passed sample
    unfixable: Tensor  # T bool: proved, any such change would be larger than the limit
    size: Tensor  # T, root mean square of what the change does to logits of passed samples, damped; NaN: none is known
    limit: float  # root mean square of these logits themselves, each sample's less their mean
    binds: Tensor  # T x P bool: passed samples that stand in a target's way
    change: Tensor  # T x C x D, of the weights; 0 where none is known

    def cpu(self) -> Alone:
        """The same on the CPU."""
        size, binds, change = self.size.cpu(), self.binds.cpu(), self.change.cpu()
        return Alone(self.fixable.cpu(), self.unfixable.cpu(), size, self.limit, binds, change)


class _Samples(NamedTuple):
    features: Tensor  # n x D, in coordinates in which the second moment of the passed is the identity
    logits: Tensor  # n x C
    label: Tensor  # n int64


class _Rows(NamedTuple):
    """Constraints of each target, `T x K`: the label's logit of a sample must lie above a rival's."""

    sample: Tensor  # int64, of the passed; their number stands for the target itself, -1 for no row
    rival: Tensor  # int64, a class
    dual: Tensor


@torch.no_grad()
def repair_alone(passed: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor]) -> Alone:
    """Seeks for each target the smallest change of a Linear that repairs it and keeps all passed samples right.

    Args:
        passed: inputs `P x D` of the layer, with a last column of ones if its bias may change; its outputs `P x C`; and
            the labels, `P` int64, whose output is each sample's largest.
        targets: the same of the targets, `T` of them, whose label's output is not the largest alone.

    Returns:
        Tensors on the device of the features.
    """
    device = passed[0].device
    home, dtype = (device, torch.float64) if widest(device) == torch.float64 else (torch.device("cpu"), torch.float64)
    (inputs, *rest), (mine, *others) = ([x.to(home) for x in part] for part in (passed, targets))
    root = _root(inputs.to(dtype))
    kept = _Samples(inputs.to(dtype) @ root, rest[0].to(dtype), rest[1])
    target = _Samples(mine.to(dtype) @ root, others[0].to(dtype), others[1])
    limit = float((kept.logits - kept.logits.mean(1, keepdim=True)).square().sum(1).mean().sqrt())
    n, n_passed = len(target.label), len(kept.label)
    change = torch.zeros(n, target.logits.shape[1], len(root), dtype=dtype, device=home)
    fixable, unfixable = torch.zeros(2, n, dtype=torch.bool, device=home)
    binds = torch.zeros(n, n_passed, dtype=torch.bool, device=home)
    rows, going = _first(target, n_passed), torch.arange(n, device=home)
    for _ in range(ROUNDS if n else 0):
        own = _Samples(*(x[going] for x in target))
        rows, step, value = _solve(rows, kept, own, limit)
        strength, violated = _look(step, kept, own)
        works, proved = strength > 0, value > 0.5 * limit**2
        change[going[works]] = strength[works, None, None] * step[works]
        fixable[going[works]], unfixable[going[proved]] = True, True
        binds[going] = _binding(rows, n_passed)
        left = (violated.sample >= 0).any(1) & ~proved
        rows, going = _joined(rows, violated, left), going[left]
        if not len(going):
            break
    size = torch.where(fixable, change.square().sum((1, 2)).sqrt(), torch.nan)
    return Alone(
        fixable.to(device),
        (unfixable & ~fixable).to(device),
        size.float().to(device),
        limit,
        binds.to(device),
        (change @ root.T).float().to(device),
    )


def _root(features: Tensor) -> Tensor:
    """`D x D`, times which features have the identity as second moment; directions that hardly occur are damped."""
    moment = features.T @ features / len(features)
    moment.diagonal().add_(RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny))
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(moment).T, eye, upper=True)


def _first(target: _Samples, n_passed: int) -> _Rows:
    """Each target against the class that is predicted instead."""
    rival = _margins(target.logits, target.label).argmin(1, keepdim=True)
    return _Rows(torch.full_like(rival, n_passed), rival, torch.zeros_like(rival, dtype=target.logits.dtype))


def _solve(rows: _Rows, passed: _Samples, target: _Samples, limit: float) -> tuple[_Rows, Tensor, Tensor]:
    """The optimum under the present rows: their duals, the changes `T x C x D`, lower bounds of 1/2 |change|^2."""
    own, some = rows.sample == len(passed.label), rows.sample >= 0
    at = torch.where(own | ~some, 0, rows.sample)
    x = torch.where(own[:, :, None], target.features[:, None], passed.features[at])
    label = torch.where(own, target.label[:, None], passed.label[at])
    logits = torch.where(own[:, :, None], target.logits[:, None], passed.logits[at])
    margin = (logits.gather(2, label[:, :, None]) - logits.gather(2, rows.rival[:, :, None]))[:, :, 0]
    asked = torch.where(own, KEEP, (0.5 * margin).clamp_max(KEEP))
    classes = target.logits.shape[1]
    sides = (F.one_hot(label, classes) - F.one_hot(rows.rival, classes)).to(x) * some[:, :, None]
    gram = torch.bmm(x, x.mT) * torch.bmm(sides, sides.mT)
    duals, value = ascend(gram, torch.where(some, asked - margin, 0.0), rows.dual, limit=0.5 * limit**2)
    return rows._replace(dual=duals), torch.bmm((sides * duals[:, :, None]).mT, x), value


def _look(change: Tensor, passed: _Samples, target: _Samples) -> tuple[Tensor, _Rows]:
    """How much of each change repairs its target and breaks nothing, 0 if none; and the rows that it violates most.

    Margins are linear in the strength of a change, so the largest strength that breaks nothing is known in one look.
    """
    before = _margins(passed.logits, passed.label).float()
    asked = (0.5 * before).clamp_max(KEEP) * NEARLY
    parts = [_broken(some.float(), passed, before, asked) for some in change.split(max(1, PIECE // before.numel()))]
    most, (short, sample, rival) = (
        torch.cat([p[0] for p in parts]),
        (torch.cat(x) for x in zip(*[p[1:] for p in parts], strict=True)),
    )
    old = _margins(target.logits, target.label)
    gain = _margins(torch.einsum("tcd,td->tc", change, target.features), target.label)
    new = old + gain.nan_to_num(posinf=0)
    strength = torch.where(most > 1, 1.0, 0.999 * most.double())
    repaired = (old + strength[:, None] * gain.nan_to_num(posinf=0)).amin(1) > 0
    own_short, own_rival = (new - KEEP * NEARLY).min(1, keepdim=True)
    n_passed = len(passed.label)
    short, rival = torch.cat([short, own_short], 1), torch.cat([rival, own_rival], 1)
    sample = torch.cat([sample, torch.full_like(own_rival, n_passed)], 1)
    violated = _Rows(torch.where(short < 0, sample, -1), rival, torch.zeros_like(short, dtype=change.dtype))
    return torch.where(repaired, strength, 0.0), violated


def _broken(change: Tensor, passed: _Samples, before: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
    """For each change the strength from which on it breaks something, and its worst rows: shortfall, sample, rival."""
    moved = torch.einsum("pd,tcd->tpc", passed.features.float(), change)
    at = passed.label.expand(len(change), -1)[:, :, None]
    gain = moved.gather(2, at) - moved
    breaks = (before / (-gain).clamp_min(torch.finfo(gain.dtype).tiny)).amin((1, 2))
    short, rival = (gain.add_(before - asked)).min(2)
    short, sample = short.topk(min(NEW_ROWS, short.shape[1]), largest=False)
    return breaks, short, sample, rival.gather(1, sample)


def _margins(logits: Tensor, label: Tensor) -> Tensor:
    """The label's logit above each other one, `n x C`; infinite at the label itself."""
    at = label[:, None]
    return (logits.gather(1, at) - logits).scatter(1, at, torch.inf)


def _binding(rows: _Rows, n_passed: int) -> Tensor:
    """`T x P`, the passed samples with a row whose dual is above 0."""
    out = torch.zeros(len(rows.dual), n_passed + 1, dtype=torch.bool, device=rows.dual.device)
    return out.scatter_(1, torch.where(rows.dual > 0, rows.sample, n_passed), True)[:, :n_passed]


def _joined(rows: _Rows, new: _Rows, left: Tensor) -> _Rows:
    """The rows of the targets that are left, new ones behind; without room for all, of the old those that bind."""
    rows, new = (_Rows(*(x[left] for x in part)) for part in (rows, new))
    spare = (rows.dual == 0) & (rows.sample.shape[1] + new.sample.shape[1] > MOST_ROWS)
    rows = rows._replace(sample=torch.where(spare, -1, rows.sample))
    both = _Rows(*(torch.cat(pair, 1) for pair in zip(rows, new, strict=True)))
    width = int((both.sample >= 0).sum(1).amax()) if len(both.sample) else 0
    order = (both.sample < 0).long().argsort(dim=1, stable=True)[:, :width]
    return _Rows(*(x.gather(1, order) for x in both))
