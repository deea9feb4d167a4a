"""Changing a last Linear layer is a convex problem: with its inputs at hand, every margin is linear in its weights.

For a sample with features h and label y, the margin over class c is z_y - z_c + (D_y - D_c) h under a change D of the
weights. Sought is the D that moves the logits of passed data least, in the mean square, while every passed sample keeps
a part of its margin (hard) and targets get one (each at a price: the strength).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl._convex.cutting_planes import (
    add_cutting_planes,
    margins_over_rivals,
    pair_gram,
    pair_sides,
    sum_of_pairs,
)
from lightning_nrl._convex.qp import solve_dual
from lightning_nrl._utils.precision import widest

__all__ = ["KEPT_MARGIN_RATIO", "ConvexHead", "regularization_path"]

KEPT_MARGIN_RATIO = 0.5
"""Of its margin, a passed sample keeps at least this part."""

MAX_KEPT_MARGIN = 0.05
"""A passed sample need not keep more than this, in units of the median margin of passed data."""

HEAD_TARGET_MARGIN = 0.05
"""The margin that a repaired target gets, in the same units."""

HEAD_RIDGE = 1e-4
"""Added to the second moment of the features, in parts of its mean eigenvalue: directions that no passed sample shows
are not free."""

MAX_PATH_ROUNDS = 31
"""Most rounds of cutting planes."""

PAIRS_PER_ROUND = 400
"""Most pairs that a round adds, the most violated first."""

VIOLATION_TOLERANCE = 1e-3
"""A pair counts as violated if this part of the unit is missing; the last rest is scaled away exactly."""

ROWS_PER_BLOCK = 65_536
"""Samples whose features are held in double precision at once."""

LEAST_KEPT_MARGIN = 0.01
"""What a passed sample keeps at least of the margin required, after that scaling."""


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
    def margins(self) -> Tensor:
        """`N x C`: each sample's margin over each class, infinite over its own."""
        return margins_over_rivals(self.logits, self.label)

    @cached_property
    def unit(self) -> float:
        """The median margin of passed samples: what margins are measured in."""
        return float(self.margins.amin(1)[~self.targeted].median().clamp_min(1e-12))

    @cached_property
    def required(self) -> Tensor:
        """`N`, the margin that each sample is to have."""
        kept = (KEPT_MARGIN_RATIO * self.margins.amin(1)).clamp(max=MAX_KEPT_MARGIN * self.unit)
        return torch.where(self.targeted, HEAD_TARGET_MARGIN * self.unit, kept)

    @cached_property
    def root(self) -> Tensor:
        """`d x d`: C^(-1/2), where C is the second moment of the features of passed data."""
        dtype, passed = widest(self.features.device), ~self.targeted
        moment = self.features.new_zeros(self.features.shape[1], self.features.shape[1], dtype=dtype)
        for features, which in zip(self.features.split(ROWS_PER_BLOCK), passed.split(ROWS_PER_BLOCK), strict=True):
            own = features[which].to(dtype)
            moment += own.T @ own
        moment /= passed.sum()
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0) + HEAD_RIDGE * values.clamp_min(0).mean().clamp_min(1e-30)
        root: Tensor = (vectors * values.rsqrt()) @ vectors.T
        return root

    def white(self, rows: Tensor) -> Tensor:
        """`n x d`: the features of some samples in coordinates in which the passed ones have a second moment of 1."""
        return self.features[rows].to(self.root.dtype) @ self.root

    def changed(self, change: Tensor) -> Tensor:
        """The logits under a change of the weights, `C x d`."""
        return self.logits + self.features @ change.T.to(self.features)


def regularization_path(
    head: ConvexHead,
    strengths: Sequence[float],
    used: Tensor | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Tensor]:
    """The best change at each strength, weakest first, each solved from the one before.

    Args:
        head: the layer on known samples.
        strengths: the price of a target's missing margin, from weak to strong, in units of what the median target
            would take if it were the only one.
        used: `N` bool, the samples that count; None: all.
        is_over: whether time is over: then no step is made and no pair added any more, and more is lost by the scaling.

    Yields:
        `C x d`, a change under which every passed sample that counts stays right, with what the scaling left of the
        margin required.
    """
    used = torch.ones_like(head.targeted) if used is None else used
    missing = (head.required[:, None] - head.margins).amax(1)[used & head.targeted]
    unit = float((missing / (2 * head.white(used & head.targeted).square().sum(1))).median())
    programme = _PairProgramme(head, used, is_over)
    for strength in strengths:
        programme.begin(strength * unit)
        add_cutting_planes(programme, MAX_PATH_ROUNDS, is_over)
        yield _scale_back(head, programme.change @ head.root, used)


class _PairProgramme:
    """The programme of one price under some pairs of a sample and a class.

    Attributes:
        change: `C x d`, the solution in whitened weights.
    """

    def __init__(self, head: ConvexHead, used: Tensor, is_over: Callable[[], bool]) -> None:
        self.head, self.used, self.price, self.is_over = head, used, 0.0, is_over
        device = head.root.device
        self._code = torch.zeros(0, dtype=torch.int64, device=device)  # sample * C + class
        self._multipliers = head.root.new_zeros(0)
        self.change = head.root.new_zeros(head.logits.shape[1], head.root.shape[1])

    def begin(self, price: float) -> None:
        """Goes on at another price of a target's missing margin, with the pairs that bind."""
        binding = self._multipliers > 0
        self.price, self._code, self._multipliers = price, self._code[binding], self._multipliers[binding]

    def solve(self) -> None:
        """Finds the change that the pairs ask for."""
        head, n_classes = self.head, self.head.logits.shape[1]
        sample, rival = self._code // n_classes, self._code % n_classes
        features = head.white(sample)
        required = (head.required[sample] - head.margins.view(-1)[self._code]).to(features.dtype)
        price = self.price if head.weight is None else self.price * head.weight[sample]
        limit = torch.where(head.targeted[sample], price, torch.inf).to(features.dtype)
        sides = pair_sides(head.label[sample], rival, head.logits).to(features.dtype)
        gram = pair_gram(features, sides)
        self._multipliers = solve_dual(gram, required, limit, self._multipliers, is_over=self.is_over).values
        self.change = sum_of_pairs(features, sides, self._multipliers)

    def add_violated(self) -> bool:
        """Adds the pairs that lack most of the margin required."""
        head = self.head
        new_margins = margins_over_rivals(head.changed(self.change @ head.root), head.label)
        missing = head.required[:, None] - new_margins
        missing[~self.used] = -torch.inf
        lacking = missing.flatten()
        lacking[self._code] = -torch.inf
        code = (lacking > VIOLATION_TOLERANCE * head.unit).nonzero().flatten()
        code = code[lacking[code].argsort(descending=True, stable=True)[:PAIRS_PER_ROUND]]
        self._code = torch.cat([self._code, code])
        self._multipliers = torch.cat([self._multipliers, self._multipliers.new_zeros(len(code))])
        return len(code) > 0


def _scale_back(head: ConvexHead, change: Tensor, used: Tensor) -> Tensor:
    """The greatest part of a change that leaves every passed sample at least a hundredth of the margin required."""
    passed = used & ~head.targeted
    old, new = head.margins[passed], margins_over_rivals(head.changed(change), head.label)[passed]
    floor = LEAST_KEPT_MARGIN * head.required[passed][:, None]
    part = torch.where(new < floor, (old - floor) / (old - new), 1)
    return change * float(part.amin().clamp(0, 1)) if part.numel() else change
