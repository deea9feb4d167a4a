"""One of several classes a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.task import Task, class_divergence, described

__all__ = ["Multiclass"]


class Multiclass(Task):
    """One of C classes from `n x C` logits: right is arg max, the loss is cross entropy in at least float32."""

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuses a label for which there is no logit, which on a GPU would end the process."""
        self.prediction(output)
        label, classes = self.label(target), output.shape[1]
        if len(label) and int(label.max()) >= classes:
            raise ConfigurationError(
                f"`task`: there is a label {int(label.max())}, and the model returned {classes} logits a sample.",
                f"labels are whole numbers from 0 to {classes - 1}; pass an `adapter` that makes them so.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.prediction(output) == self.label(target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        # A label below 0 is no class: an `Evaluator` refuses such samples by name, after a whole pass.
        return F.cross_entropy(at_least_float32(output), self.label(target).clamp_min(0), reduction="none")

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        """The logit of the true class less the largest other one, `n`."""
        output, label = at_least_float32(output), self.label(target).clamp_min(0)[:, None]
        return output.gather(1, label)[:, 0] - output.scatter(1, label, -torch.inf).amax(1)

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        """The Kullback-Leibler divergence of the class probabilities from the teacher's, `n`."""
        return class_divergence(output, teacher)

    def prediction(self, output: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[1] < 2:
            raise ConfigurationError(
                f"`task`: multiclass needs logits [samples, classes], the model returned {list(output.shape)}.",
                "return one logit for each of two or more classes, or pass a `Task` that fits as `task=`.",
            )
        return output.argmax(1)

    def label(self, target: Tensor) -> Tensor:
        if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
            raise ConfigurationError(
                f"`task`: multiclass needs whole labels [samples], found {described(target)}.",
                "give class numbers in the batch, or pass an `adapter` or a `task` that fits.",
            )
        return target.long()
