"""The convex problem of changing a last Linear layer: given its inputs, every margin is linear in its weights.

For a sample with features h and label y, the margin over class c is z_y - z_c + (D_y - D_c) h under a change D of the
weights. The best D moves the logits of passed data least, in the mean square, while every passed sample keeps a part of
its margin (hard) and targets get one (each at a price: the strength). Of the many rows, pairs of a sample and a rival
class, few bind: only violated ones are added (cutting planes, Kelley 1960).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import widest
from lightning_nrl.methods._solvers.qp import solve_dual

# Margins are in units of the median margin of passed data.
KEPT_MARGIN_RATIO, MAX_KEPT_MARGIN = 0.5, 0.05  # a passed sample keeps this part of its margin, at most this much
HEAD_TARGET_MARGIN = 0.05  # the margin that a repaired target gets
LEAST_KEPT_MARGIN = 0.01  # part of the required margin that a passed sample keeps after the final scaling
HEAD_RIDGE = 1e-4  # of the features' mean eigenvalue, added: directions without passed samples are not free
MAX_PATH_ROUNDS = 31  # of cutting planes
PAIRS_PER_ROUND = 400  # added, the most violated first
VIOLATION_TOLERANCE = 1e-3  # of the unit; the final scaling removes smaller violations exactly
# Samples and logits in one block. Larger data are processed in cache-sized parts, and only samples whose margin may be
# too small.
ROWS_PER_BLOCK, ROWS_OF_MANY = 65_536, 8_192
LOGITS_PER_BLOCK = 2**22
REACH_SLACK = 1.001  # covers rounding of distances in whitened weights


@dataclass(frozen=True)
class ConvexHead:
    """A last Linear layer on `n` known samples; processes one block of samples at a time."""

    features: Tensor  # N x d, inputs; with a column of ones if the bias may change and `ones` is False
    logits: Tensor  # N x C, outputs
    label: Tensor  # n int64, the true classes
    targeted: Tensor  # n bool, samples to repair; all others are passed samples to keep
    weight: Tensor | None = None  # n, relative prices of targets
    rows: Tensor | None = None  # n int64, rows of the samples among the N; None: all
    ones: bool = False  # True to append a column of ones to the features on use

    @property
    def n_features(self) -> int:
        return self.features.shape[1] + self.ones

    @property
    def is_large(self) -> bool:
        return len(self.label) > ROWS_PER_BLOCK or len(self.label) * self.logits.shape[1] > LOGITS_PER_BLOCK

    def blocks(self, chosen: Tensor | None = None) -> Iterator[Tensor | slice]:
        """Yields all or chosen samples (int64) in blocks."""
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
        """Margins of some samples over each class, `m x C`, infinite over their own."""
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
        """C^(-1/2), `d x d`, where C is the second moment of the features of passed data."""
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
        """Whitened features of some samples, `m x d`: those of passed data have a second moment of 1."""
        return self.inputs(rows).to(self.root.dtype) @ self.root

    def changed(self, change: Tensor, some: Tensor | slice) -> Tensor:
        """Logits of some samples, `m x C`, under a change of the weights, `C x d`."""
        return self.outputs(some) + self.inputs(some) @ change.T.to(self.features)

    @cached_property
    def reach(self) -> Tensor:
        """How far two classes' whitened weights must move apart before a margin can be too small, `n`.

        A margin moves by no more than this distance times the length of the whitened features (Cauchy, Schwarz).
        """
        root = self.root.to(self.features)
        length = torch.cat([(self.inputs(some) @ root).norm(dim=1) for some in self.blocks()])
        return (self.narrowest - self.required) / length.clamp_min(torch.finfo(length.dtype).tiny)

    def reached(self, change: Tensor, among: Tensor) -> Tensor | None:
        """Samples, `m` int64, whose margin a change may push below the required one; None: all, in one block."""
        if not self.is_large:
            return None
        white = torch.linalg.solve(self.root, change.T.to(self.root)).T
        apart = REACH_SLACK * torch.cdist(white, white).amax(1).to(self.reach)
        return (among & (self.reach <= apart[self.label])).nonzero().flatten()

    def right(self, change: Tensor) -> Tensor:
        """Samples that the layer gets right under a change (`C x d`), `n` bool."""
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
    """Yields the best change at each strength, weakest first, each warm-started from the one before.

    Each is `C x d` and breaks no passed sample among `used`, `N` bool. A strength is the price of a target's missing
    margin, in units of what the median target would take on its own. Once `is_over`, no step is made and no pair added,
    so the scaling loses more. The path ends after the first programme of more than `max_pairs`.
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
    """The programme at one price with some pairs of sample and class; `change`, `C x d`, is whitened."""

    def __init__(self, head: ConvexHead, used: Tensor, is_over: Callable[[], bool]) -> None:
        self.head, self.used, self.price, self.is_over = head, used, 0.0, is_over
        device = head.root.device
        self._code = torch.zeros(0, dtype=torch.int64, device=device)  # sample * C + class
        self._multipliers = head.root.new_zeros(0)
        self.change = head.root.new_zeros(head.logits.shape[1], head.root.shape[1])

    def begin(self, price: float) -> None:
        """Sets another price of a target's missing margin; keeps the binding pairs."""
        binding = self._multipliers > 0
        self.price, self._code, self._multipliers = price, self._code[binding], self._multipliers[binding]

    def has_more_than(self, pairs: int | None) -> bool:
        return pairs is not None and len(self._code) > pairs

    def solve(self) -> None:
        head, n_classes = self.head, self.head.logits.shape[1]
        sample, rival = self._code // n_classes, self._code % n_classes
        features = head.white(sample)
        margin = head.margins(sample).gather(1, rival[:, None]).squeeze(1)
        required = (head.required[sample] - margin).to(features.dtype)
        price = features.new_full((len(sample),), self.price)  # huge inputs give prices beyond single precision
        if head.weight is not None:
            price *= head.weight[sample]
        limit = torch.where(head.targeted[sample], price, torch.inf)
        sides = pair_sides(head.label[sample], rival, head.logits).to(features.dtype)
        gram = pair_gram(features, sides)
        self._multipliers = solve_dual(gram, required, limit, self._multipliers, is_over=self.is_over).values
        self.change = sum_of_pairs(features, sides, self._multipliers)

    def add_violated(self) -> bool:
        """Adds the most violated pairs."""
        head, n_classes, change = self.head, self.head.logits.shape[1], self.change @ self.head.root
        codes, lacks = [self._code[:0]], [head.required[:0]]
        for some in head.blocks(head.reached(change, self.used)):
            missing = head.required[some][:, None] - margins_over_rivals(head.changed(change, some), head.label[some])
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
    """The largest fraction of a change that leaves every passed sample `LEAST_KEPT_MARGIN` of its required margin."""
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
    """Alternates solving and adding violated rows; True if none is violated at the end."""
    for _ in range(max_rounds):
        solve()
        if not add_violated():
            return True
        if is_over():
            break
    return False


def margins_over_rivals(logits: Tensor, label: Tensor) -> Tensor:
    """The label's logit minus each other one, `n x C`; infinite at the label."""
    own = label[:, None]
    return (logits.gather(1, own) - logits).scatter(1, own, float("inf"))


def pair_sides(label: Tensor, rival: Tensor, like: Tensor) -> Tensor:
    """1 at the label and -1 at the rival, `... x C`, in the dtype of `like`: GPUs multiply no integer matrices."""
    n_classes = like.shape[-1]
    return (F.one_hot(label, n_classes) - F.one_hot(rival, n_classes)).to(like.dtype)


def pair_gram(features: Tensor, sides: Tensor) -> Tensor:
    """Inner products of pairs as rows in the layer's weights, `... m x m`, from `... m x d` and `... m x C`."""
    return (sides @ sides.mT) * (features @ features.mT)


def sum_of_pairs(features: Tensor, sides: Tensor, multipliers: Tensor) -> Tensor:
    """Sum of pairs weighted by multipliers, a change of the weights, `... C x d`; deterministic."""
    return (sides * multipliers[..., None]).mT @ features
