"""From logits to what counts: which samples pass and how large their losses are, in one pass over the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._scoring.sparse_delta import GatheredInputs, LayerDelta
from lightning_nrl.tasks import Multiclass, Task

__all__ = ["HeadScorer", "HeadTables", "is_plain_multiclass", "make_head_scorer", "sum_passed"]

MAX_UNDECIDED_SHARE = 0.75
"""Decided samples are only left out if at most this share of all is undecided."""


def is_plain_multiclass(task: Task) -> bool:
    """Whether passed, margin and loss mean arg max, its lead and cross entropy, without anything of the user's."""
    own, plain = type(task), Multiclass
    return (own.passed, own.loss, own.prediction, own.margin) == (
        plain.passed,
        plain.loss,
        plain.prediction,
        plain.margin,
    )


@dataclass(frozen=True)
class HeadTables:
    """What is known of `n` samples in front of a last layer whose output is the model's, `U` of its classes changing.

    Only changed classes are computed for each candidate. Of the others, what matters is the largest logit, the sum of
    exponentials, and the largest logit before and after the true class, since arg max takes the first of equals. The
    reserve has no part in the loss.
    """

    rivals: Tensor  # U x 1 x n, old logits of the changed classes, -inf for the true one
    true_unit: Tensor  # 1 x 1 x n int64, place of the true class among the changed ones, 0 if it does not change
    true_logit: Tensor  # n, the true class's old logit, less the reserve
    true_changes: Tensor  # n, 1 if the true class changes, else 0
    fixed_max: Tensor  # n, the largest logit of the classes that do not change, the true one left out
    fixed_sum: Tensor  # n, their exponentials, relative to fixed_max, summed
    fixed_max_before: Tensor  # n, the largest of them before the true class
    is_before: Tensor  # U x 1 x n bool, which changed classes come before the true one
    reserve: Tensor | None  # n, how far above all others the true class must be to pass; None: not at all

    def judged(self, z: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Passes, `P x n` bool, and losses, `P x n`, or None if they are not asked for.

        `z`, `U x P x n`, is what each candidate adds to each changed class; it is used up. All may have one more
        dimension in front, with tables that have it too.
        """
        moved = z.gather(-3, self.true_unit.expand(*z.shape[:-3], 1, *z.shape[-2:])).squeeze(-3)
        true = torch.addcmul(self.true_logit, self.true_changes, moved)
        z += self.rivals
        best = torch.maximum(z.amax(-3), self.fixed_max)
        passed = true > best
        tied = true == best
        if z.device.type != "cpu" or bool(tied.any()):
            before = torch.where(self.is_before, z, -torch.inf).amax(-3).maximum(self.fixed_max_before)
            passed |= tied & (true > before)
        if not with_loss:
            return passed, None
        if self.reserve is not None:
            true = true + self.reserve
        most = torch.maximum(best, true)
        z -= most.unsqueeze(-3)
        total = z.exp_().sum(-3).add_((true - most).exp_()).addcmul_(self.fixed_sum, (self.fixed_max - most).exp_())
        return passed, total.log_().add_(most).sub_(true)


@dataclass(frozen=True)
class HeadScorer(HeadTables):
    """Samples in front of a last layer whose output is the model's, with the change of that layer."""

    delta: LayerDelta  # the change of the layer
    gathered: GatheredInputs  # what it needs to know of the samples

    @property
    def nbytes(self) -> int:
        return self.gathered.nbytes + self.rivals.nbytes + self.is_before.nbytes

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Passes, `P x n` bool, and losses, `P x n`, or None if they are not asked for, of candidates `P x K`."""
        return self.judged(self.delta.output_delta(values, self.gathered), with_loss)

    def decided(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Samples that go the same way under all candidates `P x K`: who surely passes, who surely fails, `n` bool.

        Each weight's change lies between its least and its largest over the candidates, so each logit lies between two
        bounds (interval arithmetic). A sample is decided if the bounds of its true class and of the best rival do not
        meet, with room for rounding between them: `eps * (m + 8)` times the sum of all magnitudes, for sums of `m`
        products.
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
        best_below, best_above = ((rivals + b).amax(0).maximum(self.fixed_max) for b in (below, above))
        scale = magnitude.amax(0) + self.true_logit.abs() + best_below.abs() + best_above.abs()
        if self.reserve is not None:
            scale = scale + self.reserve.abs()
        rounding = scale * (2 * (terms + 8) * torch.finfo(scale.dtype).eps)
        return true_below > best_above + rounding, true_above + rounding < best_below

    def subset(self, samples: Tensor) -> HeadScorer:
        """Some of the samples, `int64`."""

        def some(x: Tensor) -> Tensor:
            return x.index_select(-1, samples)

        own = self.gathered
        tensors: dict[str, Any] = {name: some(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        gathered = GatheredInputs(tuple(map(some, own.x)), own.base[:, samples], own.rounded[:, samples])
        return replace(self, gathered=gathered, **tensors)

    def count_passed(self, values: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """How many samples each candidate, `P x K`, passes, and what these weigh; decided ones are not computed."""
        pass_all, fail_all = self.decided(values)
        undecided = (~(pass_all | fail_all)).nonzero().flatten()
        if len(undecided) > MAX_UNDECIDED_SHARE * len(pass_all):
            return sum_passed(self.evaluate(values, with_loss=False)[0], weight)
        count, weighed = sum_passed(pass_all[None], weight)
        count, weighed = count.expand(len(values)), None if weighed is None else weighed.expand(len(values))
        if len(undecided):
            own_weight = None if weight is None else weight[undecided]
            more, more_weighed = sum_passed(self.subset(undecided).evaluate(values, with_loss=False)[0], own_weight)
            count = more + count
            weighed = None if weighed is None or more_weighed is None else more_weighed + weighed
        return count, weighed


def sum_passed(passed: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """How many of `P x n` samples pass, `P`, and what these weigh; None without weights, `n`."""
    return passed.sum(-1), None if weight is None else torch.where(passed, weight, 0.0).sum(-1)


def make_head_scorer(
    delta: LayerDelta, gathered: GatheredInputs, y: Tensor, target: Tensor, reserve: Tensor | None = None
) -> HeadScorer:
    """Prepares samples with old logits `y`, `n x C`, of which some change, true classes and margins to keep, `n`."""
    n, c = y.shape
    units, true = delta.units, target.unsqueeze(1)
    place = torch.full((c,), -1, device=y.device).index_copy(0, units, torch.arange(len(units), device=y.device))
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
        fixed_sum=torch.where(fixed_max.isneginf(), 0.0, (fixed - fixed_max.unsqueeze(1)).exp().sum(1)),
        fixed_max_before=fixed.masked_fill(classes >= true, -torch.inf).amax(1),
        is_before=(units.unsqueeze(1) < target).unsqueeze(1),
        reserve=reserve,
    )
