"""One of several classes a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.task import TASKS, Task, class_divergence

PROBABILITY_ROUNDING = 1e-2
"""How far from 1 the sum of a sample's probabilities may be; half precision rounds that much."""


@TASKS.register("multiclass")
class Multiclass(Task):
    """One of C classes from `n x C` logits: right is arg max, the loss is cross entropy in at least float32.

    The truth is a class number a sample, `n` or `n x 1`, whole or float; or `n x C` probabilities, one-hot or soft. Of
    probabilities the largest says which class is right, and the loss is the cross entropy with all of them.
    """

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuses counts that do not fit, and a label without a logit, which on a GPU would end the process."""
        self.prediction(output)
        label, classes = self.label(target), output.shape[1]
        if len(label) != len(output):
            raise ConfigurationError(
                f"`task`: the model returned {len(output)} rows of logits for {len(label)} targets.",
                "the model must give one row a sample; an `adapter` says what it is called with and what the truth is.",
            )
        self._check_values(target, classes)
        if len(label) and int(label.max()) >= classes:
            raise ConfigurationError(
                f"`task`: there is a label {int(label.max())}, and the model returned {classes} logits a sample.",
                f"labels are whole numbers from 0 to {classes - 1}; pass an `adapter` that makes them so.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.prediction(output) == self.label(target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        # A label below 0 is no class: an `Evaluator` refuses such samples by name, after a whole pass.
        output = at_least_float32(output)
        truth = target.to(output) if _is_soft(target) else self.label(target).clamp_min(0)
        return F.cross_entropy(output, truth, reduction="none")

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        output, label = at_least_float32(output), self.label(target).clamp_min(0)[:, None]
        return output.gather(1, label)[:, 0] - output.scatter(1, label, -torch.inf).amax(1)

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        return class_divergence(output, teacher)

    def prediction(self, output: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[1] < 2:
            raise ConfigurationError(
                f"`task`: multiclass needs logits [samples, classes], the model returned {list(output.shape)}.",
                "return one logit for each of two or more classes, or pass a `Task` that fits as `task=`.",
            )
        return output.argmax(1)

    def label(self, target: Tensor) -> Tensor:
        if not isinstance(target, Tensor) or target.ndim not in (1, 2) or target.is_complex():
            raise ConfigurationError(
                f"`task`: multiclass needs whole labels [samples], found {described(target)}.",
                "give class numbers in the batch, or pass an `adapter` or a `task` that fits.",
            )
        return target.float().argmax(1) if _is_soft(target) else target.flatten().long()

    def _check_values(self, target: Tensor, classes: int) -> None:
        if _is_soft(target):
            rows = target.double()
            fits = target.shape[1] == classes and bool((rows >= 0).all())
            if not fits or bool(((rows.sum(1) - 1).abs() > PROBABILITY_ROUNDING).any()):
                raise ConfigurationError(
                    f"`task`: multiclass found {described(target)} that are no probabilities of {classes} classes.",
                    "give class numbers [samples], or rows that add up to 1; of several labels a sample, "
                    "`task='multilabel'`.",
                )
        elif target.is_floating_point() and bool((target != target.round()).any()):
            raise ConfigurationError(
                "`task`: multiclass needs whole labels, and found others.",
                "numbers to be predicted are for `task=Regression(tolerance=...)`.",
            )


def _is_soft(target: Tensor) -> bool:
    return target.ndim == 2 and target.shape[1] > 1
