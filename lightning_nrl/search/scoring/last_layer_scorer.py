"""Scores candidates of a last layer from its inputs.

Only the logits of classes whose weights change are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.search.fitness import FitnessFunction
from lightning_nrl.search.scoring.sparse_delta import GatheredInputs, LayerDelta
from lightning_nrl.tasks import Multiclass, Task, class_logits


def is_plain_multiclass(task: Task) -> bool:
    """True if a task defines passed, margin and loss exactly as `Multiclass` does."""
    kind = type(task)
    methods = (kind.passed, kind.margin, kind.prediction, kind.loss)
    plain = Multiclass
    return methods == (plain.passed, plain.margin, plain.prediction, plain.loss)


def sum_over_samples(
    passed: Tensor,
    loss: Tensor | None,
    weight: Tensor | None,
    fitness: FitnessFunction,
    *,
    of_passed: bool,
) -> Tensor:
    """Returns four sums over n samples, `4 x P`, for candidates with results `P x n`.

    The sums are the number of passed samples, the (weighted) loss, the weight of passed samples,
    or of broken samples if `of_passed` (I_pos), and the fitness's credit. A sum whose terms are not
    known is 0.
    """
    wide = widest(passed.device)
    total_loss = total_credit = passed.new_zeros(len(passed), dtype=wide)
    counted = ~passed if of_passed else passed
    total_weight = counted.sum(-1).to(wide)
    if weight is not None:
        total_weight = torch.where(counted, weight, 0.0).sum(-1)
    if loss is not None:
        weighted_loss = loss if weight is None else loss * weight
        total_loss = weighted_loss.sum(-1, dtype=wide)
        credit = fitness.credit(passed, loss)
        if credit is not None:
            total_credit = credit.sum(-1, dtype=wide)
    return torch.stack([passed.sum(-1).to(wide), total_loss, total_weight, total_credit])


@dataclass(frozen=True)
class HeadScorer:
    """Scores candidates of a last layer on n samples, with changed weights in U classes.

    Candidates change only the logits of these classes. The other logits, except that of the true
    class, are called fixed. Only the maximum and the sum of exponentials of the fixed logits are
    needed. Ties also need the maximum over classes before the true class, because arg max takes the
    first of equal logits. `reserve` does not change losses.
    """

    delta: LayerDelta
    gathered: GatheredInputs
    rivals: Tensor  # U x 1 x n, original logits of the changed classes, -inf for the true class
    true_unit: Tensor  # 1 x 1 x n int64, index of the true class among the U classes, else 0
    true_logit: Tensor  # n, original logit of the true class minus the reserve
    true_changes: Tensor  # n, 1 if the true class changes, else 0
    fixed_max: Tensor  # n, largest fixed logit
    fixed_sum: Tensor  # n, sum of exp(logit - fixed_max) over the fixed logits
    fixed_max_before: Tensor  # n, largest fixed logit of a class before the true class
    is_before: Tensor  # U x 1 x n bool, True if the changed class is before the true class
    reserve: Tensor | None  # n, minimum margin to pass; None: no minimum

    @property
    def nbytes(self) -> int:
        return self.gathered.nbytes + self.rivals.nbytes + self.is_before.nbytes

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns the mask of passed samples and the losses, `P x n` each.

        The losses are None unless `with_loss`.
        """
        logits = self.delta.output_delta(values, self.gathered)  # U x P x n, so far only changes
        change = logits.gather(0, self.true_unit.expand(1, *logits.shape[1:]))[0]
        true = torch.addcmul(self.true_logit, self.true_changes, change)
        logits += self.rivals
        best = torch.maximum(logits.amax(0), self.fixed_max)
        passed = true > best
        tied = true == best
        # On a GPU, asking for ties would wait for the device.
        if logits.device.type != "cpu" or bool(tied.any()):
            before = torch.where(self.is_before, logits, -torch.inf).amax(0)
            passed |= tied & (true > before.maximum(self.fixed_max_before))
        if not with_loss:
            return passed, None
        if self.reserve is not None:
            true = true + self.reserve
        most = torch.maximum(best, true)
        logits -= most
        total = logits.exp_().sum(0).add_((true - most).exp_())
        total.addcmul_(self.fixed_sum, (self.fixed_max - most).exp_())
        return passed, total.log_().add_(most).sub_(true)


def make_head_scorer(
    delta: LayerDelta,
    gathered: GatheredInputs,
    y: Tensor,
    target: Tensor,
    reserve: Tensor | None,
) -> HeadScorer:
    """Builds a scorer from original logits `y`, `n x C`, and minimum margins `reserve`, `n`."""
    has_one_logit = y.shape[1] == 1
    units = delta.units + 1 if has_one_logit else delta.units  # the one logit is that of class 1
    true = target.unsqueeze(1)
    y = class_logits(y)
    n, n_classes = y.shape
    classes = torch.arange(n_classes, device=y.device)
    unit_of_class = torch.full_like(classes, -1).index_copy(
        0, units, torch.arange(len(units), device=y.device)
    )
    true_unit = unit_of_class[target]
    fixed = y.index_fill(1, units, -torch.inf).scatter(1, true, -torch.inf)
    fixed_max = fixed.amax(1)
    fixed_sum = (fixed - fixed_max.unsqueeze(1)).exp().sum(1)
    true_logit = y.gather(1, true).squeeze(1)
    if reserve is not None:
        true_logit = true_logit - reserve
    return HeadScorer(
        delta=delta,
        gathered=gathered,
        rivals=y.scatter(1, true, -torch.inf)[:, units].t().contiguous().unsqueeze(1),
        true_unit=true_unit.clamp_min(0).view(1, 1, n),
        true_logit=true_logit,
        true_changes=(true_unit >= 0).to(y.dtype),
        fixed_max=fixed_max,
        fixed_sum=torch.where(fixed_max.isneginf(), 0.0, fixed_sum),
        fixed_max_before=fixed.masked_fill(classes >= true, -torch.inf).amax(1),
        is_before=(units.unsqueeze(1) < target).unsqueeze(1),
        reserve=reserve,
    )
