"""The convex problem of changing a last Linear layer: given its inputs, every margin is linear in
its
weights.

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
KEPT_MARGIN_RATIO, MAX_KEPT_MARGIN = (
    0.5,
    0.05,
)  # a passed sample keeps this part of its margin, at most this much
HEAD_TARGET_MARGIN = 0.05  # the margin that a repaired target gets
LEAST_KEPT_MARGIN = (
    0.01  # part of the required margin that a passed sample keeps after the final scaling
)
HEAD_RIDGE = 1e-4  # of the mean eigenvalue, added to each; or else directions without passed samples would be free
MAX_PATH_ROUNDS = 31  # of solving and adding constraints, at each strength
PAIRS_PER_ROUND = 400  # maximum number of constraints to add, the most violated first
VIOLATION_TOLERANCE = (
    1e-3  # in units of the median margin; the final scaling removes smaller violations
)
# Maximum samples and logits of one block. Larger data are read in smaller blocks that fit the
# cache, and only where a margin may be too small.
ROWS_PER_BLOCK, ROWS_OF_MANY = 65_536, 8_192
LOGITS_PER_BLOCK = 2**22
REACH_SLACK = 1.001  # for rounding of the distances


@dataclass(frozen=True)
class ConvexHead:
    """The last Linear layer, with `d` inputs and `C` outputs, and its recorded values on `n` of `N`
    samples.
    """

    features: (
        Tensor  # N x d, inputs; with a column of ones if the bias may change and `ones` is False
    )
    logits: Tensor  # N x C, outputs
    label: Tensor  # n int64, the true classes
    targeted: Tensor  # n bool, samples to repair; all others are passed samples to keep
    weight: Tensor | None = None  # n, relative prices of targets; None if all are equal
    rows: Tensor | None = (
        None  # n int64, the samples' rows in `features` and `logits`; None means all rows
    )
    ones: bool = False  # True if a column of ones is to be appended to the features on use

    @property
    def n_features(self) -> int:
        return self.features.shape[1] + self.ones

    @property
    def is_large(self) -> bool:
        return (
            len(self.label) > ROWS_PER_BLOCK
            or len(self.label) * self.logits.shape[1] > LOGITS_PER_BLOCK
        )

    def blocks(self, chosen: Tensor | None = None) -> Iterator[Tensor | slice]:
        """Yields the indices `chosen`, int64, in blocks. If `chosen` is None, yields slices that
        cover all samples.
        """
        n = len(self.label) if chosen is None else len(chosen)
        size = ROWS_OF_MANY if self.is_large else ROWS_PER_BLOCK
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            yield part if chosen is None else chosen[part]

    def inputs(self, some: Tensor | slice) -> Tensor:
        own = self.features[some if self.rows is None else self.rows[some]]
        return F.pad(own, (0, 1), value=1.0) if self.ones else own

    def outputs(self, some: Tensor | slice) -> Tensor:
        return self.logits[some if self.rows is None else self.rows[some]]

    def margins(self, some: Tensor | slice) -> Tensor:
        return margins_over_rivals(self.outputs(some), self.label[some])

    @cached_property
    def narrowest(self) -> Tensor:
        return torch.cat([self.margins(some).amin(1) for some in self.blocks()])

    @cached_property
    def unit(self) -> float:
        return float(self.narrowest[~self.targeted].median().clamp_min(1e-12))

    @cached_property
    def required(self) -> Tensor:
        kept = (KEPT_MARGIN_RATIO * self.narrowest).clamp(max=MAX_KEPT_MARGIN * self.unit)
        return torch.where(self.targeted, HEAD_TARGET_MARGIN * self.unit, kept)

    @cached_property
    def root(self) -> Tensor:
        """The inverse square root, `d x d`, of the second moment of the features of passed samples."""
        dtype, passed = widest(self.features.device), ~self.targeted
        moment = self.features.new_zeros(self.n_features, self.n_features, dtype=dtype)
        for some in self.blocks():
            own = self.inputs(some)[passed[some]].to(dtype)
            moment += own.T @ own
        moment /= passed.sum()
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0) + HEAD_RIDGE * values.clamp_min(0).mean().clamp_min(1e-30)
        root: Tensor = (vectors * values.rsqrt()) @ vectors.T
        return root

    def white(self, rows: Tensor) -> Tensor:
        """Returns whitened features, `m x d`: for passed samples, their second moment is the
        identity.
        """
        return self.inputs(rows).to(self.root.dtype) @ self.root

    def changed(self, change: Tensor, some: Tensor | slice) -> Tensor:
        """Returns the logits of `m` samples, `m x C`, after `change`, `C x d`, is added to the
        weights.
        """
        return self.outputs(some) + self.inputs(some) @ change.T.to(self.features)

    @cached_property
    def reach(self) -> Tensor:
        """For each sample, `n`, a limit: the sample keeps its required margin under any smaller
        change
        of the weights.

        The size of a change is the largest distance by which it moves the whitened weights of two
        classes apart.
        """
        root = self.root.to(self.features)
        # Cauchy-Schwarz: a margin changes by at most this distance times the length of the whitened
        # features.
        length = torch.cat([(self.inputs(some) @ root).norm(dim=1) for some in self.blocks()])
        return (self.narrowest - self.required) / length.clamp_min(torch.finfo(length.dtype).tiny)

    def reached(self, change: Tensor, among: Tensor) -> Tensor | None:
        """Returns indices of samples in `among`, `n` bool, whose `reach` a change exceeds; None
        means all `n`.
        """
        if not self.is_large:
            return None
        white = torch.linalg.solve(self.root, change.T.to(self.root)).T
        apart = REACH_SLACK * torch.cdist(white, white).amax(1).to(self.reach)
        return (among & (self.reach <= apart[self.label])).nonzero().flatten()

    def right(self, change: Tensor) -> Tensor:
        """Returns a mask, `n` bool, of the samples that are right after `change`, `C x d`, is added
        to the weights.
        """
        right = ~self.targeted
        for some in self.blocks(self.reached(change, torch.ones_like(right))):
            right[some] = self.changed(change, some).argmax(1) == self.label[some]
        return right


def regularization_path(
    head: ConvexHead,
    strengths: Sequence[float],
    used: Tensor | None = None,
    is_over: Callable[[], bool] = lambda: False,
    max_pairs: int | None = None,
) -> Iterator[Tensor]:
    """Yields the best change of the weights, `C x d`, at each of the `strengths`.

    A strength is the price of the margin that a target lacks. A strength of 1 just suffices to
    repair the median target if this target is the only sample. No change breaks a passed sample in
    `used`, `n` bool; other samples are ignored. Once `is_over` returns True, changes are no longer
    optimal but still break nothing. After the first change that takes more than `max_pairs`
    constraints (one per pair of a sample and a wrong class), the path ends.
    """
    used = torch.ones_like(head.targeted) if used is None else used
    missing = (head.required - head.narrowest)[used & head.targeted]
    unit = float((missing / (2 * head.white(used & head.targeted).square().sum(1))).median())
    programme = _PairProgramme(head, used, is_over)

    def is_at_end() -> bool:
        return programme.has_more_than(max_pairs) or is_over()

    for strength in strengths:
        programme.begin(strength * unit)
        add_cutting_planes(programme.solve, programme.add_violated, MAX_PATH_ROUNDS, is_at_end)
        yield _scale_back(head, programme.change @ head.root, used)
        if programme.has_more_than(max_pairs):
            return


class _PairProgramme:
    """A programme with a constraint per pair of sample and wrong class added, and its whitened
    solution `change`.
    """

    def __init__(self, head: ConvexHead, used: Tensor, is_over: Callable[[], bool]) -> None:
        self.head, self.used, self.price, self.is_over = head, used, 0.0, is_over
        device = head.root.device
        self._code = torch.zeros(0, dtype=torch.int64, device=device)  # sample * C + class
        self._multipliers = head.root.new_zeros(0)
        self.change = head.root.new_zeros(head.logits.shape[1], head.root.shape[1])

    def begin(self, price: float) -> None:
        """Sets the price of the margin that a target lacks. Drops constraints that did not bind at
        the last price.
        """
        binding = self._multipliers > 0
        self.price, self._code, self._multipliers = (
            price,
            self._code[binding],
            self._multipliers[binding],
        )

    def has_more_than(self, pairs: int | None) -> bool:
        return pairs is not None and len(self._code) > pairs

    def solve(self) -> None:
        head, n_classes = self.head, self.head.logits.shape[1]
        sample, rival = self._code // n_classes, self._code % n_classes
        features = head.white(sample)
        margin = head.margins(sample).gather(1, rival[:, None]).squeeze(1)
        required = (head.required[sample] - margin).to(features.dtype)
        price = features.new_full(
            (len(sample),), self.price
        )  # huge inputs give prices beyond single precision
        if head.weight is not None:
            price *= head.weight[sample]
        limit = torch.where(head.targeted[sample], price, torch.inf)
        sides = pair_sides(head.label[sample], rival, head.logits).to(features.dtype)
        gram = pair_gram(features, sides)
        self._multipliers = solve_dual(
            gram, required, limit, self._multipliers, is_over=self.is_over
        ).values
        self.change = sum_of_pairs(features, sides, self._multipliers)

    def add_violated(self) -> bool:
        """Adds the constraints that `change` violates most. Returns False if `change` violates no
        new constraint.
        """
        head, n_classes, change = self.head, self.head.logits.shape[1], self.change @ self.head.root
        codes, lacks = [self._code[:0]], [head.required[:0]]
        for some in head.blocks(head.reached(change, self.used)):
            missing = head.required[some][:, None] - margins_over_rivals(
                head.changed(change, some), head.label[some]
            )
            missing[~self.used[some]] = -torch.inf
            place, rival = (missing > VIOLATION_TOLERANCE * head.unit).nonzero().unbind(1)
            sample = place + some.start if isinstance(some, slice) else some[place]
            codes.append(sample * n_classes + rival)
            lacks.append(missing[place, rival])
        code, lacking = torch.cat(codes), torch.cat(lacks)
        new = ~torch.isin(code, self._code)
        code, lacking = code[new], lacking[new]
        code = code[lacking.argsort(descending=True, stable=True)[:PAIRS_PER_ROUND]]
        self._code = torch.cat([self._code, code])
        self._multipliers = torch.cat([self._multipliers, self._multipliers.new_zeros(len(code))])
        return len(code) > 0


def _scale_back(head: ConvexHead, change: Tensor, used: Tensor) -> Tensor:
    """Scales a change down until every passed sample keeps `LEAST_KEPT_MARGIN` of its required
    margin.
    """
    passed = used & ~head.targeted
    least = 1.0
    for some in head.blocks(head.reached(change, passed)):
        own = passed[some]
        old = head.margins(some)[own]
        if not len(old):
            continue
        new = margins_over_rivals(head.changed(change, some), head.label[some])[own]
        floor = LEAST_KEPT_MARGIN * head.required[some][own][:, None]
        part = torch.where(new < floor, (old - floor) / (old - new), 1)
        least = min(least, float(part.amin().clamp(0, 1)))
    return change * least


def add_cutting_planes(
    solve: Callable[[], None],
    add_violated: Callable[[], bool],
    max_rounds: int,
    is_over: Callable[[], bool] = lambda: False,
) -> bool:
    """Calls `solve` and `add_violated` in turn. Returns True if no violation is left, False if it
    stops before.
    """
    for _ in range(max_rounds):
        solve()
        if not add_violated():
            return True
        if is_over():
            break
    return False


def margins_over_rivals(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the label's logit minus each logit, `n x C`. The entry of the label itself is
    infinite.
    """
    own = label[:, None]
    return (logits.gather(1, own) - logits).scatter(1, own, float("inf"))


def pair_sides(label: Tensor, rival: Tensor, like: Tensor) -> Tensor:
    """Returns `C` values per pair: 1 at the label, -1 at the rival, 0 elsewhere, in the dtype of
    `like`, `... x C`.
    """
    n_classes = like.shape[-1]
    return (F.one_hot(label, n_classes) - F.one_hot(rival, n_classes)).to(like.dtype)


def pair_gram(features: Tensor, sides: Tensor) -> Tensor:
    """Returns inner products of m constraints, `... m x m`: outer products of a row of `sides` and
    of `features`.
    """
    return (sides @ sides.mT) * (features @ features.mT)


def sum_of_pairs(features: Tensor, sides: Tensor, multipliers: Tensor) -> Tensor:
    """Returns the deterministic sum, `... C x d`, of all constraints (see `pair_gram`) times their
    multipliers.
    """
    return (sides * multipliers[..., None]).mT @ features
