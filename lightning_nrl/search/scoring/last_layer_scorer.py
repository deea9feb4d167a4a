"""Scores candidates of a last layer from its inputs, and computes only the logits of classes whose
weights change.

On a CPU each swarm (search) is scored alone. Samples that pass under all candidates, or fail under
all, are *decided* and skipped. On a GPU swarms are padded to a common shape and scored together.
The shape depends only on the sizes of one swarm, so that its results are the same alone and in a
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import no_autocast, widest
from lightning_nrl.search.scoring.memory import in_blocks
from lightning_nrl.search.scoring.sparse_delta import GatheredInputs, LayerDelta
from lightning_nrl.tasks import Multiclass, Task, class_logits

MAX_UNDECIDED_SHARE = 0.75  # if a larger share of the samples is undecided, no sample is skipped


def is_plain_multiclass(task: Task) -> bool:
    """True if a task defines passed, margin and loss exactly as `Multiclass` does."""
    rules = ("passed", "loss", "prediction", "margin")
    return all(getattr(type(task), name) == getattr(Multiclass, name) for name in rules)


class Sums(NamedTuple):
    """Sums over the samples of a chunk, one entry per candidate."""

    passed: Tensor  # number of passed samples
    weight: Tensor | None  # total weight of the passed samples; None: equal weights
    loss: Tensor | None = None  # sum of (weighted) losses; None: not computed
    credit: Tensor | None = None  # sum of 1 if right, else 1 / (loss + 1); None: not computed


def summed(passed: Tensor, loss: Tensor | None, weight: Tensor | None, with_credit: bool) -> Sums:
    """Computes `Sums` from a mask of passed samples, losses and sample weights. The samples are the
    last dimension.
    """
    wide = widest(passed.device)
    credit = None
    if loss is not None and with_credit:
        credit = torch.where(passed, 1.0, 1 / (loss + 1)).sum(-1, dtype=wide)
    if loss is not None and weight is not None:
        loss = loss * weight
    return Sums(
        *sum_passed(passed, weight), None if loss is None else loss.sum(-1, dtype=wide), credit
    )


def sum_passed(passed: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the number of passed samples, and their total weight (None if samples have no
    weights).
    """
    return passed.sum(-1), None if weight is None else torch.where(passed, weight, 0.0).sum(-1)


@dataclass(frozen=True)
class HeadTables:
    """Precomputed values of n samples for a last layer in which U classes have changed weights.

    Candidates change only the logits of these classes. The other logits, except that of the true
    class, are called fixed. Only the maximum and the sum of exponentials of the fixed logits are
    needed. Ties also need the maximum over classes before the true class, because arg max takes the
    first of equal logits. `reserve` does not change losses.
    """

    rivals: Tensor  # U x 1 x n, original logits of the changed classes, -inf for the true class
    true_unit: Tensor  # 1 x 1 x n int64, index of the true class among the changed classes, 0 if it does not change
    true_logit: Tensor  # n, original logit of the true class minus the reserve
    true_changes: Tensor  # n, 1 if the true class changes, else 0
    fixed_max: Tensor  # n, largest fixed logit
    fixed_sum: Tensor  # n, sum of exp(logit - fixed_max) over the fixed logits
    fixed_max_before: (
        Tensor  # n, largest fixed logit of a class with a lower number than the true class
    )
    is_before: (
        Tensor  # U x 1 x n bool, True if the changed class has a lower number than the true class
    )
    reserve: Tensor | None  # n, minimum margin to pass; None: no minimum

    def judged(self, z: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns the mask of passed samples and the losses, `P x n` each. The losses are None
        unless
        `with_loss`.

        `z`, `U x P x n`, holds the logit changes of U classes under P candidates, and is
        overwritten. For several swarms, `z` and all fields of this class have one more dimension in
        front.
        """
        moved = z.gather(-3, self.true_unit.expand(*z.shape[:-3], 1, *z.shape[-2:])).squeeze(-3)
        true = torch.addcmul(self.true_logit, self.true_changes, moved)
        z += self.rivals
        best = torch.maximum(z.amax(-3), self.fixed_max)
        passed = true > best
        tied = true == best
        if z.device.type != "cpu" or bool(tied.any()):
            before = (
                torch.where(self.is_before, z, -torch.inf).amax(-3).maximum(self.fixed_max_before)
            )
            passed |= tied & (true > before)
        if not with_loss:
            return passed, None
        if self.reserve is not None:
            true = true + self.reserve
        most = torch.maximum(best, true)
        z -= most.unsqueeze(-3)
        total = (
            z.exp_()
            .sum(-3)
            .add_((true - most).exp_())
            .addcmul_(self.fixed_sum, (self.fixed_max - most).exp_())
        )
        return passed, total.log_().add_(most).sub_(true)


@dataclass(frozen=True)
class HeadScorer(HeadTables):
    """Scores candidates of a last layer on the samples of `HeadTables`."""

    delta: LayerDelta
    gathered: GatheredInputs

    @property
    def nbytes(self) -> int:
        return self.gathered.nbytes + self.rivals.nbytes + self.is_before.nbytes

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        return self.judged(self.delta.output_delta(values, self.gathered), with_loss)

    def decided(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two masks, `n` bool: samples that pass under all candidates `P x K`, and samples
        that fail under all.

        Interval arithmetic turns the range of the candidates' weights into ranges of the logits. A
        sample is decided if the ranges of its true class and of its best other class are further
        apart than the rounding error. In sums of m products this error is at most `2 * eps * (m +
        8)` times the sum of all magnitudes.
        """
        change = self.delta.weight_delta(values, self.true_logit.dtype)
        least, most = change.aminmax(dim=0)
        ends = torch.stack([least, most, torch.maximum(most, -least)])  # 3 x (K + 1)
        low, high, size, terms = [], [], [], 0
        for bucket, x in zip(self.delta.buckets, self.gathered.x, strict=True):
            d, terms = ends[:, bucket.columns].transpose(0, 1), max(terms, bucket.columns.shape[1])
            up, down = d @ x[:, 0].clamp_min(0), d @ x[:, 0].clamp_max(0)  # u x 3 x n
            low.append(up[:, 0] + down[:, 1])
            high.append(up[:, 1] + down[:, 0])
            size.append(up[:, 2] - down[:, 2])
        below, above, magnitude = torch.cat(low), torch.cat(high), torch.cat(size)
        if self.delta.site.include_bias:
            moved = ends[:, self.delta.bias].unsqueeze(2)
            below, above, magnitude = below + moved[0], above + moved[1], magnitude + moved[2]
        rivals, unit = self.rivals[:, 0], self.true_unit[0]
        true_below = self.true_logit + self.true_changes * below.gather(0, unit)[0]
        true_above = self.true_logit + self.true_changes * above.gather(0, unit)[0]
        best_below, best_above = (
            (rivals + b).amax(0).maximum(self.fixed_max) for b in (below, above)
        )
        scale = magnitude.amax(0) + self.true_logit.abs() + best_below.abs() + best_above.abs()
        if self.reserve is not None:
            scale = scale + self.reserve.abs()
        rounding = scale * (2 * (terms + 8) * torch.finfo(scale.dtype).eps)
        return true_below > best_above + rounding, true_above + rounding < best_below

    def subset(self, samples: Tensor) -> HeadScorer:
        def some(x: Tensor) -> Tensor:
            return x.index_select(-1, samples)

        own = self.gathered
        tensors: dict[str, Any] = {
            name: some(x) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        gathered = GatheredInputs(
            tuple(map(some, own.x)), own.base[:, samples], own.rounded[:, samples]
        )
        return replace(self, gathered=gathered, **tensors)

    def count_passed(
        self, values: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the result of `sum_passed` for candidates `P x K`, faster if many samples are
        decided.
        """
        pass_all, fail_all = self.decided(values)
        undecided = (~(pass_all | fail_all)).nonzero().flatten()
        if len(undecided) > MAX_UNDECIDED_SHARE * len(pass_all):
            return sum_passed(self.evaluate(values, with_loss=False)[0], weight)
        count, weighed = sum_passed(pass_all[None], weight)
        count, weighed = (
            count.expand(len(values)),
            None if weighed is None else weighed.expand(len(values)),
        )
        if len(undecided):
            own_weight = None if weight is None else weight[undecided]
            more, more_weighed = sum_passed(
                self.subset(undecided).evaluate(values, with_loss=False)[0], own_weight
            )
            count = more + count
            weighed = None if weighed is None or more_weighed is None else more_weighed + weighed
        return count, weighed


def make_head_scorer(
    delta: LayerDelta,
    gathered: GatheredInputs,
    y: Tensor,
    target: Tensor,
    reserve: Tensor | None = None,
) -> HeadScorer:
    """Builds a scorer. `y`, `n x C`, are the original logits of C classes. `reserve`, `n`, are
    minimum margins.
    """
    units, true = delta.units + (y.shape[1] == 1), target.unsqueeze(1)
    y = class_logits(y)
    n, c = y.shape
    place = torch.full((c,), -1, device=y.device).index_copy(
        0, units, torch.arange(len(units), device=y.device)
    )
    unit = place[target]
    classes = torch.arange(c, device=y.device)
    fixed = y.index_fill(1, units, -torch.inf).scatter(1, true, -torch.inf)
    fixed_max = fixed.amax(1)
    true_logit = y.gather(1, true).squeeze(1)
    return HeadScorer(
        delta=delta,
        gathered=gathered,
        rivals=y.scatter(1, true, -torch.inf)[:, units].t().contiguous().unsqueeze(1),
        true_unit=unit.clamp_min(0).view(1, 1, n),
        true_logit=true_logit if reserve is None else true_logit - reserve,
        true_changes=(unit >= 0).to(y.dtype),
        fixed_max=fixed_max,
        fixed_sum=torch.where(
            fixed_max.isneginf(), 0.0, (fixed - fixed_max.unsqueeze(1)).exp().sum(1)
        ),
        fixed_max_before=fixed.masked_fill(classes >= true, -torch.inf).amax(1),
        is_before=(units.unsqueeze(1) < target).unsqueeze(1),
        reserve=reserve,
    )


UNIT_STEPS, WEIGHT_STEPS, SAMPLE_STEPS = 2, 1, 4
"""Padded sizes are rounded up to one of this many values per power of two, so that few different
shapes occur.
"""

OF_UNITS = (
    "rivals",
    "is_before",
)  # fields of `HeadTables` with a dimension for the changed classes
FILLS = {"true_logit": 0.0, "fixed_max": -1.0, "fixed_max_before": -torch.inf, "rivals": -torch.inf}
"""Fill value of padding by field of `HeadTables`; it is 0 for other fields. A padded sample passes
with a loss of 0.
"""


class SwarmHead(NamedTuple):
    """Scorer of one swarm on the samples of one role (I_neg or I_pos)."""

    swarm: int
    columns: (
        Tensor | None
    )  # int64, positions of the swarm's weights among K values; None: the first positions
    head: HeadScorer
    weight: Tensor | None  # n, sample weights; None: equal weights

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes after padding: number of changed classes, of weights per class (bias included), and
        of samples.
        """
        delta, n = self.head.delta, self.head.true_logit.shape[-1]
        most = (
            max((bucket.columns.shape[1] for bucket in delta.buckets), default=0)
            + delta.site.include_bias
        )
        return (
            rounded_up(len(delta.units), UNIT_STEPS),
            rounded_up(most, WEIGHT_STEPS),
            rounded_up(n, SAMPLE_STEPS),
        )

    @property
    def padded_nbytes(self) -> int:
        return math.prod(self.shape) * self.head.true_logit.element_size()


@dataclass
class HeadStack:
    """Scorers of S swarms on I_neg or on I_pos, padded to U changed classes with m weights each,
    and to n samples.
    """

    swarms: Tensor  # S int64, swarm numbers
    original: Tensor  # S x 1 x K, original values, padded with 0
    columns: Tensor  # S x 1 x (U * m) int64, position of each weight among the K values; K: the weight is unchanged
    x: Tensor  # S x U x m x n, input of each weight
    tables: HeadTables  # tables of all swarms, with dimension S in front
    counted: Tensor  # S x 1 x n bool, False for padded samples
    weight: Tensor | None  # S x 1 x n, sample weights; None: equal weights
    rows: int  # swarms times candidates times samples per pass; halved permanently when memory runs out
    deployed: torch.dtype  # dtype of the model's weights

    @property
    def total_weight(self) -> Tensor | float:
        return 0.0 if self.weight is None else self.weight.sum(-1)

    def sums(self, values: Tensor, with_loss: bool = True, with_credit: bool = False) -> Sums:
        """Scores candidates `S x P x K` of the swarms in this stack. Each tensor in the result has
        shape `S x P`.
        """
        work = partial(self._run, with_loss, with_credit)
        parts = [found for _, found in in_blocks(self, values, self.x.shape[-1], work)]

        def joined(name: str) -> Tensor | None:
            known = [
                getattr(found, name).flatten()
                for found in parts
                if getattr(found, name) is not None
            ]
            return torch.cat(known).view(values.shape[:2]) if known else None

        return Sums(*map(joined, Sums._fields))  # type: ignore[arg-type]

    def _run(self, with_loss: bool, with_credit: bool, which: slice, values: Tensor) -> Sums:
        tables = _tables(lambda name: _select(getattr(self.tables, name), which))
        dtype, x = tables.true_logit.dtype, self.x[which]
        (s, p, _), (_, u, m, n) = values.shape, x.shape
        new, old = (w.to(self.deployed).to(dtype) for w in (values, self.original[which]))
        change = F.pad(new - old, (0, 1)).gather(2, self.columns[which].expand(-1, p, -1))
        d = change.view(s, p, u, m).transpose(1, 2).reshape(s * u, p, m)
        with no_autocast(values.device):
            z = torch.bmm(d, x.view(s * u, m, n)).view(s, u, p, n)
        passed, loss = tables.judged(z, with_loss)
        counted = self.counted[which]
        passed &= counted
        # Padding has loss 0 but credit 1.
        found = summed(passed, loss, _select(self.weight, which), with_credit)
        if found.credit is None:
            return found
        return found._replace(credit=found.credit - (~counted).sum(-1))


def rounded_up(n: int, steps: int) -> int:
    """Rounds `n` up to one of `steps` values per power of two: for 4 steps 8, 10, 12, 14, 16, 20,
    24 and so on.
    """
    step = max(1, (1 << max(0, n - 1).bit_length()) // (2 * steps))
    return -(-n // step) * step


def stack_heads(swarms: Sequence[SwarmHead], n_columns: int, block_bytes: int) -> list[HeadStack]:
    """Groups swarms by their padded shape and builds one stack per shape.

    `n_columns` is K, the number of values per candidate. A pass computes at most `block_bytes` of
    logits.
    """
    shapes: dict[tuple[int, int, int], list[SwarmHead]] = {}
    for one in swarms:
        shapes.setdefault(one.shape, []).append(one)
    return [_make_stack(alike, shape, n_columns, block_bytes) for shape, alike in shapes.items()]


def _make_stack(
    alike: Sequence[SwarmHead], shape: tuple[int, int, int], n_columns: int, block_bytes: int
) -> HeadStack:
    u, m, n = shape
    first = alike[0].head
    device, dtype, deployed = (
        first.true_logit.device,
        first.true_logit.dtype,
        first.delta.original.dtype,
    )

    def table(name: str) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        own = [getattr(one.head, name) for one in alike]
        units = u if name in OF_UNITS else 1
        pads = [
            (0, n - x.shape[-1], 0, 0, 0, units - len(x)) if x.ndim == 3 else (0, n - len(x))
            for x in own
        ]
        padded = torch.stack(
            [F.pad(x, pad, value=FILLS.get(name, 0)) for x, pad in zip(own, pads, strict=True)]
        )
        return padded if padded.ndim == 4 else padded.unsqueeze(1)

    places = torch.full((len(alike), u, m), n_columns, device=device)
    x = torch.zeros(len(alike), u, m, n, dtype=dtype, device=device)
    original = torch.zeros(len(alike), 1, n_columns, dtype=deployed, device=device)
    for s, one in enumerate(alike):
        delta = one.head.delta
        own = (
            torch.arange(len(delta.original), device=device) if one.columns is None else one.columns
        )
        to_all = F.pad(own, (0, 1), value=n_columns)
        original[s, 0].index_copy_(0, own, delta.original)
        start = 0
        for bucket, inputs in zip(delta.buckets, one.head.gathered.x, strict=True):
            met = inputs[:, 0]  # u x m x n
            part = slice(start, start + len(met))
            places[s, part, : met.shape[1]] = to_all[bucket.columns]
            x[s, part, : met.shape[1], : met.shape[2]] = met
            start = part.stop
        if delta.site.include_bias:
            places[s, : len(delta.bias), -1] = to_all[delta.bias]
            x[s, : len(delta.bias), -1] = 1.0
    counts = torch.tensor([one.head.true_logit.shape[-1] for one in alike], device=device)
    weights = [
        F.pad(one.weight, (0, n - len(one.weight))) for one in alike if one.weight is not None
    ]
    return HeadStack(
        swarms=torch.tensor([one.swarm for one in alike], device=device),
        original=original,
        columns=places.view(len(alike), 1, u * m),
        x=x,
        tables=_tables(table),
        counted=torch.arange(n, device=device) < counts.view(-1, 1, 1),
        weight=torch.stack(weights).unsqueeze(1) if weights else None,
        rows=max(1, block_bytes // (u * dtype.itemsize)),
        deployed=deployed,
    )


def _tables(made: Callable[[str], Tensor | None]) -> HeadTables:
    return HeadTables(*(made(field.name) for field in fields(HeadTables)))  # type: ignore[arg-type]


def _select(x: Tensor | None, which: slice) -> Tensor | None:
    return None if x is None else x[which]
