"""Changing a last Linear layer is a convex problem: with its inputs at hand, every margin is linear in its weights.

For a sample with features h and label y, the margin over class c is z_y - z_c + (D_y - D_c) h under a change D of the
weights. Sought is the D that moves the logits of passed data least, in the mean square, while every passed sample keeps
a share of its margin (hard) and targets get one (each at a price: the strength). Few of all pairs of a sample and a
class ever matter, so those that are violated are added to the programme until there are none (cutting planes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._convex.qp import solve_dual
from lightning_nrl._utils.precision import widest

__all__ = ["ConvexHead", "follow"]

SHARE = 0.5
"""Of its margin, a passed sample keeps at least this share."""

ENOUGH = 0.05
"""A passed sample need not keep more than this, in units of the median margin of passed data."""

GIVEN = 0.05
"""The margin that a repaired target gets, in the same units."""

RIDGE = 1e-4
"""Added to the second moment of the features, in parts of its mean eigenvalue: directions that no passed sample shows
are not free."""

ROUNDS = 30
"""Most rounds of cutting planes."""

ADDED = 400
"""Most pairs that a round adds, the most violated first."""

PRECISE = 1e-3
"""A pair counts as violated if this share of the unit is missing; the last rest is scaled away exactly."""


@dataclass(frozen=True)
class ConvexHead:
    """A last Linear layer on known samples.

    Attributes:
        features: `N x d`, what the layer gets; with a column of ones if its bias may change.
        logits: `N x C`, what it gives.
        label: `N` int64, the true classes.
        targeted: `N` bool, samples to be repaired; all others are passed and to be kept.
        weight: `N`, what the missing margin of a target costs more than that of another; None: all alike.
    """

    features: Tensor
    logits: Tensor
    label: Tensor
    targeted: Tensor
    weight: Tensor | None = None

    @cached_property
    def gaps(self) -> Tensor:
        """`N x C`: each sample's margin over each class, infinite over its own."""
        return self.over(self.logits)

    def over(self, logits: Tensor) -> Tensor:
        """Margins of the true class over each class, `N x C`, infinite over itself."""
        own = self.label[:, None]
        return (logits.gather(1, own) - logits).scatter(1, own, torch.inf)

    @cached_property
    def unit(self) -> float:
        """The median margin of passed samples: what margins are measured in."""
        return float(self.gaps.amin(1)[~self.targeted].median().clamp_min(1e-12))

    @cached_property
    def asked(self) -> Tensor:
        """`N`, the margin that each sample is to have."""
        keep = (SHARE * self.gaps.amin(1)).clamp(max=ENOUGH * self.unit)
        return torch.where(self.targeted, GIVEN * self.unit, keep)

    @cached_property
    def root(self) -> Tensor:
        """`d x d`: C^(-1/2), where C is the second moment of the features of passed data."""
        kept = self.features[~self.targeted].to(widest(self.features.device))
        moment = kept.T @ kept / len(kept)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0) + RIDGE * values.clamp_min(0).mean().clamp_min(1e-30)
        return (vectors * values.rsqrt()) @ vectors.T

    @cached_property
    def white(self) -> Tensor:
        """`N x d`: the features in coordinates in which the passed ones have a second moment of 1."""
        return self.features.to(self.root.dtype) @ self.root

    def changed(self, change: Tensor) -> Tensor:
        """The logits under a change of the weights, `C x d`."""
        return self.logits + self.features @ change.T.to(self.features)


@dataclass
class _Pairs:
    """The programme so far: pairs of a sample and a class, coded as sample * C + class, and their multipliers."""

    code: Tensor
    values: Tensor

    def of(self, kept: Tensor) -> _Pairs:
        return _Pairs(self.code[kept], self.values[kept])

    def add(self, code: Tensor) -> _Pairs:
        return _Pairs(torch.cat([self.code, code]), torch.cat([self.values, self.values.new_zeros(len(code))]))


def follow(head: ConvexHead, strengths: Sequence[float], used: Tensor | None = None) -> Iterator[Tensor]:
    """The best change at each strength, weakest first, each solved from the one before.

    Args:
        head: the layer on known samples.
        strengths: the price of a target's missing margin, from weak to strong, in units of what the median target
            would take if it were alone.
        used: `N` bool, the samples that count; None: all.

    Yields:
        `C x d`, a change under which every passed sample that counts stays right, with what the scaling left of the
        margin asked.
    """
    used = torch.ones_like(head.targeted) if used is None else used
    white = head.white
    violated = head.asked[:, None] - head.gaps
    first = violated.amax(1)[used & head.targeted]
    alone = 2 * white[used & head.targeted].square().sum(1)
    unit = float((first / alone).median())
    pairs = _Pairs(torch.zeros(0, dtype=torch.int64, device=white.device), white.new_zeros(0))
    for strength in strengths:
        change, pairs = _solve(head, pairs.of(pairs.values > 0), strength * unit)
        for _ in range(ROUNDS):
            missing = head.asked[:, None] - head.over(head.changed(change @ head.root))
            missing[~used] = -torch.inf
            missing.view(-1)[pairs.code] = -torch.inf
            new = missing.flatten()
            code = (new > PRECISE * head.unit).nonzero().flatten()
            if not len(code):
                break
            code = code[new[code].argsort(descending=True, stable=True)[:ADDED]]
            pairs = pairs.add(code)
            change, pairs = _solve(head, pairs, strength * unit)
        yield _scaled_back(head, change @ head.root, used)


def _solve(head: ConvexHead, pairs: _Pairs, limit: float) -> tuple[Tensor, _Pairs]:
    """The change in whitened weights, `C x d`, that the pairs of the programme ask for."""
    white, n_classes = head.white, head.logits.shape[1]
    sample, other = pairs.code // n_classes, pairs.code % n_classes
    own, features = head.label[sample], white[sample]
    asked = (head.asked[sample] - head.gaps.view(-1)[pairs.code]).to(white.dtype)
    price = limit if head.weight is None else limit * head.weight[sample]
    limits = torch.where(head.targeted[sample], price, torch.inf).to(white.dtype)
    # GPUs multiply no matrices of whole numbers.
    signs = (F.one_hot(own, n_classes) - F.one_hot(other, n_classes)).to(white.dtype)
    solution = solve_dual((signs @ signs.T) * (features @ features.T), asked, limits, pairs.values)
    pull = solution.values[:, None] * features
    change = torch.zeros(n_classes, white.shape[1], dtype=white.dtype, device=white.device)
    change.index_add_(0, own, pull).index_add_(0, other, -pull)
    return change, _Pairs(pairs.code, solution.values)


def _scaled_back(head: ConvexHead, change: Tensor, used: Tensor) -> Tensor:
    """The greatest share of a change that leaves every passed sample at least a hundredth of the margin asked."""
    kept = used & ~head.targeted
    old, new = head.gaps[kept], head.over(head.changed(change))[kept]
    floor = 0.01 * head.asked[kept][:, None]
    share = torch.where(new < floor, (old - floor) / (old - new), 1)
    return change * float(share.amin().clamp(0, 1)) if share.numel() else change
