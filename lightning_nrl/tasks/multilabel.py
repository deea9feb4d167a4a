"""Any number of labels a sample, each there or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl.errors import ConfigurationError, check_real, check_whole
from lightning_nrl.tasks.task import TASKS, Task, masked_mean


@TASKS.register("multilabel")
@dataclass(frozen=True)
class Multilabel(Task):
    """Multi-label classification from one logit a label, `n x L`: a sample is right if all of its labels are.

    A label is right if its probability, the sigmoid of the logit, is above the threshold where the label is there and
    below it where not. Targets are `n x L`, 1 or 0 of any dtype. The loss is binary cross entropy, the mean over
    labels.

    Attributes:
        threshold: of the probability, between 0 and 1.
        wrong: how many labels of a sample may be wrong and it still passes.
        ignore_index: the value of labels that are not known and do not count.

    Example:
        >>> logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1, 0, 0]])
        >>> Multilabel().margin(logits, labels), Multilabel(wrong=1).margin(logits, labels)
        (tensor([-0.5000]), tensor([1.]))
    """

    threshold: float = 0.5
    wrong: int = 0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        hint = "give a number between 0 and 1; 0.5 stands for a logit of 0."
        check_real("Multilabel.threshold", self.threshold, "probability", hint, above=0, below=1)
        check_whole("Multilabel.wrong", self.wrong, 0)

    def __str__(self) -> str:
        at = "" if self.threshold == 0.5 else f" at a threshold of {self.threshold:.4g}"
        most = f"all labels but {self.wrong}" if self.wrong else "every label"
        return f"Multilabel: {most} right{at}"

    def check(self, output: Tensor, target: Any) -> None:
        if output.ndim != 2 or not output.shape[1]:
            raise ConfigurationError(
                f"`task`: multilabel needs logits [samples, labels], the model returned {list(output.shape)}.",
                "return one logit for each label, or pass a `Task` that fits as `task=`.",
            )
        if not isinstance(target, Tensor) or target.shape != output.shape:
            raise ConfigurationError(
                f"`task`: multilabel needs labels of the shape of the logits, {list(output.shape)}, "
                f"found {described(target)}.",
                "give 1 or 0 for each label, or pass an `adapter` or a `task` that fits.",
            )
        known = self._known(target)
        other = (target != 0) & (target != 1) & known
        if other.any():
            raise ConfigurationError(
                f"`task`: multilabel found a label {target[other][0].item():g}, neither 0 nor 1.",
                "set `ignore_index` if that one means not known.",
            )
        fewest = int(known.sum(1).min()) if len(known) else output.shape[1]
        if fewest <= self.wrong:
            raise ConfigurationError(
                f"`Multilabel.wrong={self.wrong}`, and a sample has {fewest} known labels, so none need be right.",
                "leave such samples out of the data, or give a smaller number.",
            )

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return self.margin(output, target) > 0

    def loss(self, output: Tensor, target: Any) -> Tensor:
        output, known = at_least_float32(output), self._known(target)
        each = F.binary_cross_entropy_with_logits(output, (target == 1).to(output), reduction="none")
        return masked_mean(each, known)

    def margin(self, output: Tensor, target: Any) -> Tensor:
        """How far logits are on the right side of the threshold, `n`: the least, the allowed wrong ones left out."""
        output = at_least_float32(output) - math.log(self.threshold / (1 - self.threshold))
        each = torch.where(target == 1, output, -output)
        each = torch.where(each.isnan(), -torch.inf, each)
        each = torch.where(self._known(target), each, torch.inf)
        return each.kthvalue(self.wrong + 1, 1).values if self.wrong else each.amin(1)

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        new, old = at_least_float32(output), at_least_float32(teacher)
        there = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
        absent = (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))
        divergence = (there + absent).clamp_min(0)
        return divergence.mean(1) if target is None else masked_mean(divergence, self._known(target))

    def _known(self, target: Tensor) -> Tensor:
        # As floats, since a byte cannot be -100.
        return target.float() != self.ignore_index
