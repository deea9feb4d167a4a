"""The convex problem of changing a last Linear layer, whose margins are linear in its weights.

For a sample with inputs h, logits z and label y, a change D of the weights gives the margin z_y -
z_c + (D_y - D_c) h over class c. The best D moves the logits of passed data least, in the mean
square. Every passed sample must keep a part of its margin. Each target should reach a fixed margin;
what it lacks costs a price (the strength). Each constraint is about a sample and a wrong class. Few
constraints bind: only violated ones are added (cutting planes, Kelley 1960).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import widest
from lightning_nrl.methods.solvers.qp import solve_dual

# Margins are in units of the median margin of passed data.
# A passed sample keeps this part of its margin, at most this much.
KEPT_MARGIN_RATIO = 0.5
MAX_KEPT_MARGIN = 0.05
HEAD_TARGET_MARGIN = 0.05  # the margin that a repaired target gets
# Part of the required margin that a passed sample keeps after the final scaling.
LEAST_KEPT_MARGIN = 0.01
# Share of the mean eigenvalue, added to each; or else directions without passed samples would be
# free.
HEAD_RIDGE = 1e-4
# With more inputs, the second moment is that of at most as many samples, as its factor takes d^3.
MAX_MOMENT_RANK = 2048
MAX_PATH_ROUNDS = 31  # of solving and adding constraints, at each strength
PAIRS_PER_ROUND = 400  # maximum number of constraints to add, the most violated first
VIOLATION_TOLERANCE = 1e-3  # the final scaling removes smaller violations
# Maximum samples and logits of one block. Larger data are read in smaller blocks that fit the
# cache, and only where a margin may be too small.
ROWS_PER_BLOCK = 65_536
ROWS_OF_MANY = 8_192
LOGITS_PER_BLOCK = 2**22
REACH_SLACK = 1.001  # for rounding of the distances


@dataclass(frozen=True)
class TriangularRoot:
    """A root R, upper triangular, `d x d`: R R' inverts the second moment of passed features."""

    root: Tensor

    def whiten(self, features: Tensor) -> Tensor:
        """Returns `m x d` whitened features of features `m x d`, in any precision."""
        return features @ self.root.to(features)

    def weights(self, white: Tensor) -> Tensor:
        """Returns the weights, `C x d`, that make of features what `white` makes of white ones."""
        return white @ self.root.T

    def whitened_weights(self, weights: Tensor) -> Tensor:
        """Reverts `weights`."""
        white: Tensor = torch.linalg.solve_triangular(self.root, weights.T, upper=True).T
        return white


@dataclass(frozen=True)
class LowRankRoot:
    """The symmetric root of a moment of few samples and a ridge, in their span and outside of it.

    Attributes:
        basis: orthonormal columns, `d x r`, that span the samples.
        inner: eigenvalues of the root in the span, `r`.
        outer: eigenvalue of the root outside the span.
    """

    basis: Tensor
    inner: Tensor
    outer: float

    @classmethod
    def of(cls, features: Tensor) -> LowRankRoot:
        """Returns the root for samples, `m x d`; its time grows with d m^2."""
        n, d = features.shape
        gram = (features @ features.T).to("cpu", torch.float64) / n
        eigenvalues, vectors = torch.linalg.eigh(gram)
        ridge = HEAD_RIDGE * max(float(gram.trace()) / d, 1e-30)
        # Smaller ones are rounding, and their directions are not orthogonal.
        is_real = eigenvalues > HEAD_RIDGE * ridge
        eigenvalues, vectors = eigenvalues[is_real].to(features), vectors[:, is_real].to(features)
        basis = features.T @ (vectors / (n * eigenvalues).sqrt())
        return cls(basis, (eigenvalues + ridge).rsqrt(), ridge**-0.5)

    def whiten(self, features: Tensor) -> Tensor:
        return self._times(features, self.inner, self.outer)

    weights = whiten  # the root is symmetric

    def whitened_weights(self, weights: Tensor) -> Tensor:
        return self._times(weights, 1 / self.inner, 1 / self.outer)

    def _times(self, x: Tensor, inner: Tensor, outer: float) -> Tensor:
        basis = self.basis.to(x)
        return outer * x + ((x @ basis) * (inner - outer).to(x)) @ basis.T


@dataclass(frozen=True)
class ConvexHead:
    """The last Linear layer, `d` inputs and `C` outputs, recorded on `n` of `N` samples.

    Attributes:
        features: inputs, `N x d`, without a column of ones.
        logits: outputs, `N x C`.
        rows: the samples' rows in `features` and `logits`, `n` int64.
        label: the true classes, `n` int64.
        targeted: samples to repair, `n` bool; all others are passed samples to keep.
        weight: relative prices of targets, `n`.
        has_bias: True if the bias may change; then d includes a column of ones.
    """

    features: Tensor
    logits: Tensor
    rows: Tensor
    label: Tensor
    targeted: Tensor
    weight: Tensor
    has_bias: bool

    @property
    def n_features(self) -> int:
        return self.features.shape[1] + int(self.has_bias)

    @property
    def n_classes(self) -> int:
        return self.logits.shape[1]

    @property
    def is_large(self) -> bool:
        n = len(self.label)
        return n > ROWS_PER_BLOCK or n * self.n_classes > LOGITS_PER_BLOCK

    @cached_property
    def all(self) -> Tensor:
        return torch.arange(len(self.label), device=self.label.device)

    def blocks(self, chosen: Tensor) -> Sequence[Tensor]:
        """Splits the indices `chosen`, int64, into blocks that fit the cache."""
        blocks: Sequence[Tensor] = chosen.split(ROWS_OF_MANY if self.is_large else ROWS_PER_BLOCK)
        return blocks

    def inputs(self, block: Tensor) -> Tensor:
        features = self.features[self.rows[block]]
        return F.pad(features, (0, 1), value=1.0) if self.has_bias else features

    def outputs(self, block: Tensor) -> Tensor:
        return self.logits[self.rows[block]]

    def margins(self, block: Tensor) -> Tensor:
        return margins_over_rivals(self.outputs(block), self.label[block])

    @cached_property
    def narrowest(self) -> Tensor:
        return torch.cat([self.margins(block).amin(1) for block in self.blocks(self.all)])

    @cached_property
    def unit(self) -> float:
        return float(self.narrowest[~self.targeted].median().clamp_min(1e-12))

    @cached_property
    def required(self) -> Tensor:
        kept = (KEPT_MARGIN_RATIO * self.narrowest).clamp(max=MAX_KEPT_MARGIN * self.unit)
        return torch.where(self.targeted, HEAD_TARGET_MARGIN * self.unit, kept)

    @cached_property
    def whitening(self) -> TriangularRoot | LowRankRoot:
        passed = (~self.targeted).nonzero().flatten()
        if self.n_features > MAX_MOMENT_RANK:
            spread = torch.linspace(0, len(passed) - 1, min(len(passed), MAX_MOMENT_RANK))
            return LowRankRoot.of(self.inputs(passed[spread.long()]).to(self.dtype))
        # In float64, and with a ridge above the rounding of the sum, so that a factor exists.
        ridge = HEAD_RIDGE + self.n_features * torch.finfo(self.dtype).eps
        root = whitening_root(self._moment(passed).to("cpu", torch.float64), ridge)
        return TriangularRoot(root.to(self.features.device, self.dtype))

    def _moment(self, rows: Tensor) -> Tensor:
        moment = self.features.new_zeros(self.n_features, self.n_features, dtype=self.dtype)
        for block in self.blocks(rows):
            features = self.inputs(block).to(self.dtype)
            moment += features.T @ features
        return moment / len(rows)

    @property
    def dtype(self) -> torch.dtype:
        return widest(self.features.device)

    def white(self, block: Tensor) -> Tensor:
        """Returns whitened features, `m x d`; passed samples have the identity as second moment."""
        return self.whitening.whiten(self.inputs(block).to(self.dtype))

    def changed(self, change: Tensor, block: Tensor) -> Tensor:
        """Returns the logits, `m x C`, after `change`, `C x d`, is added to the weights."""
        return self.outputs(block) + self.inputs(block) @ change.T.to(self.features)

    def changed_margins(self, change: Tensor, block: Tensor) -> Tensor:
        return margins_over_rivals(self.changed(change, block), self.label[block])

    @cached_property
    def reach(self) -> Tensor:
        """Size of the change of the weights, `n`, below which a sample keeps its required margin.

        The size of a change is the largest distance by which it moves the whitened weights of two
        classes apart.
        """
        # Cauchy-Schwarz: a margin changes by at most this distance times the length of the whitened
        # features.
        blocks = self.blocks(self.all)
        length = torch.cat(
            [self.whitening.whiten(self.inputs(block)).norm(dim=1) for block in blocks]
        )
        length = length.clamp_min(torch.finfo(length.dtype).tiny)
        return (self.narrowest - self.required) / length

    def reached(self, change: Tensor, among: Tensor) -> Tensor:
        """Returns the samples in `among`, `n` bool, whose `reach` a change exceeds.

        If there are few samples, all are returned, whether in `among` or not.
        """
        if not self.is_large:
            return self.all
        white = self.whitening.whitened_weights(change.to(self.dtype))
        # The distance of two classes is at most the sum of their distances from the mean.
        distance = (white - white.mean(0)).norm(dim=1)
        apart = REACH_SLACK * (distance + distance.amax()).to(self.reach)
        within: Tensor = among & (self.reach <= apart[self.label])
        return within.nonzero().flatten()

    def right(self, change: Tensor) -> Tensor:
        """Marks the samples that are right, `n` bool, after `change` is added to the weights."""
        right = ~self.targeted
        for block in self.blocks(self.reached(change, torch.ones_like(right))):
            right[block] = self.changed(change, block).argmax(1) == self.label[block]
        return right


def regularization_path(
    head: ConvexHead,
    strengths: Sequence[float],
    used: Tensor,
    is_over: Callable[[], bool],
    max_pairs: float,
) -> Iterator[Tensor]:
    """Yields the best change of the weights, `C x d`, at each of the `strengths`.

    A strength is the price of the margin that a target lacks. A strength of 1 just suffices to
    repair the median target if this target is the only sample. No change breaks a passed sample in
    `used`, `n` bool; other samples are ignored. Once `is_over` returns True, changes are no longer
    optimal but still break nothing. After the first change that takes more than `max_pairs`
    constraints (one per pair of a sample and a wrong class), the path ends.
    """
    targets = (used & head.targeted).nonzero().flatten()
    missing = (head.required - head.narrowest)[targets]
    unit = float((missing / (2 * head.white(targets).square().sum(1))).median())
    programme = _PairProgramme(head, used, is_over)

    def ends() -> bool:
        return programme.n_pairs > max_pairs or is_over()

    for strength in strengths:
        programme.begin(strength * unit)
        add_cutting_planes(programme.solve, programme.add_violated, MAX_PATH_ROUNDS, ends)
        yield _scale_back(head, head.whitening.weights(programme.change), used)
        if programme.n_pairs > max_pairs:
            return


class _PairProgramme:
    """A programme with a constraint per pair added, and its whitened solution `change`.

    A pair is a sample and a wrong class.
    """

    def __init__(self, head: ConvexHead, used: Tensor, is_over: Callable[[], bool]) -> None:
        self.head = head
        self.used = used
        self.is_over = is_over
        self.price = 0.0
        # sample * C + class
        self._codes = head.all[:0]
        self._multipliers = head.features.new_zeros(0, dtype=head.dtype)
        self.change = self._multipliers.new_zeros(head.n_classes, head.n_features)

    def begin(self, price: float) -> None:
        """Sets the price of missing margin; drops constraints that did not bind at the last one."""
        self.price = price
        binding = self._multipliers > 0
        self._codes = self._codes[binding]
        self._multipliers = self._multipliers[binding]

    @property
    def n_pairs(self) -> int:
        return len(self._codes)

    def solve(self) -> None:
        head = self.head
        sample = self._codes // head.n_classes
        rival = self._codes % head.n_classes
        features = head.white(sample)
        margin = head.margins(sample).gather(1, rival[:, None]).squeeze(1)
        required = (head.required[sample] - margin).to(features.dtype)
        # In double precision, since huge inputs give huge prices.
        price = self.price * head.weight[sample].to(features)
        limit = torch.where(head.targeted[sample], price, torch.inf)
        sides = pair_sides(head.label[sample], rival, head.logits).to(features.dtype)
        self._multipliers = solve_dual(
            pair_gram(features, sides), required, limit, self._multipliers, self.is_over
        )
        self.change = sum_of_pairs(features, sides, self._multipliers)

    def add_violated(self) -> bool:
        """Adds the constraints that `change` violates most; returns False if no new one is."""
        head = self.head
        change = head.whitening.weights(self.change)
        codes = [self._codes[:0]]
        lacks = [head.required[:0]]
        for block in head.blocks(head.reached(change, self.used)):
            missing = head.required[block][:, None] - head.changed_margins(change, block)
            missing[~self.used[block]] = -torch.inf
            row, rival = (missing > VIOLATION_TOLERANCE * head.unit).nonzero().unbind(1)
            codes.append(block[row] * head.n_classes + rival)
            lacks.append(missing[row, rival])
        code = torch.cat(codes)
        new = ~torch.isin(code, self._codes)
        order = torch.cat(lacks)[new].argsort(descending=True, stable=True)[:PAIRS_PER_ROUND]
        added = code[new][order]
        self._codes = torch.cat([self._codes, added])
        self._multipliers = torch.cat([self._multipliers, self._multipliers.new_zeros(len(added))])
        return len(added) > 0


def _scale_back(head: ConvexHead, change: Tensor, used: Tensor) -> Tensor:
    """Scales a change down until passed samples keep `LEAST_KEPT_MARGIN` of the required margin."""
    passed = used & ~head.targeted
    scale = 1.0
    for block in head.blocks(head.reached(change, passed)):
        old = head.margins(block)
        new = head.changed_margins(change, block)
        floor = LEAST_KEPT_MARGIN * head.required[block, None]
        is_short = passed[block, None] & (new < floor)
        part = ((old - floor) / (old - new))[is_short].clamp(0, 1)
        scale = min([scale, *part.tolist()])
    return change * scale


def whitening_root(moment: Tensor, ridge: float) -> Tensor:
    """Returns the upper triangular R, `d x d`: R R' inverts the second moment, float64.

    `ridge` is a share of the mean eigenvalue, which is added to each.
    """
    moment.diagonal().add_(ridge * moment.diagonal().mean().clamp_min(1e-30))
    factor = torch.linalg.cholesky(moment)
    del moment  # which may be large
    root = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    torch.linalg.solve_triangular(factor.T, root, upper=True, out=root)
    return root


def add_cutting_planes(
    solve: Callable[[], None],
    add_violated: Callable[[], bool],
    max_rounds: int,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Calls `solve` and `add_violated` in turn until no violation is left."""
    for _ in range(max_rounds):
        solve()
        if not add_violated() or is_over():
            return


def margins_over_rivals(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the label's logit minus each logit, `n x C`, infinite for the label itself."""
    column = label[:, None]
    return (logits.gather(1, column) - logits).scatter(1, column, float("inf"))


def pair_sides(label: Tensor, rival: Tensor, like: Tensor) -> Tensor:
    """Returns 1 at the label, -1 at the rival, 0 elsewhere, `... x C`, in the dtype of `like`."""
    n_classes = like.shape[-1]
    return (F.one_hot(label, n_classes) - F.one_hot(rival, n_classes)).to(like.dtype)


def pair_gram(features: Tensor, sides: Tensor) -> Tensor:
    """Returns inner products, `... m x m`, of outer products of rows of `sides` and `features`."""
    return (sides @ sides.mT) * (features @ features.mT)


def sum_of_pairs(features: Tensor, sides: Tensor, multipliers: Tensor) -> Tensor:
    """Returns the sum of all constraints (see `pair_gram`) times their multipliers, `... C x d`.

    The sum is the same in every run.
    """
    return (sides * multipliers[..., None]).mT @ features
