"""`Ordinal`, a task with ordered classes and one logit less than classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl.data.batch import BatchTarget
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.task import TASKS, Task, binary_divergence, masked_mean


@TASKS.register("ordinal")
@dataclass(frozen=True)
class Ordinal(Task):
    """Ordinal classification: a sample is right if as many thresholds are exceeded as its class.

    Logits are `n x (C - 1)`, samples x thresholds between C ordered classes. A threshold is
    exceeded if its probability is above 0.5. Targets are class numbers from 0 to C - 1, `n` or `n x
    1`. The loss is binary cross entropy, averaged over thresholds (CORAL, Cao et al. 2020). The
    margin is the smaller distance of the logits beside the class from 0, negative if the class is
    wrong.

    Attributes:
        conditional: if True, each logit is for exceeding its threshold given that the one before is
            exceeded, as in CORN (Shi et al. 2021). The logarithm of the product of probabilities
            then takes the place of the logit, and the loss leaves out thresholds after the class.

    Example:
        >>> logits, classes = torch.tensor([[2.0, -1.0], [3.0, 0.5]]), torch.tensor([1, 1])
        >>> Ordinal().prediction(logits), Ordinal().margin(logits, classes)
        (tensor([1, 2]), tensor([ 1.0000, -0.5000]))
    """

    conditional: bool = False

    def check(self, output: Tensor, target: BatchTarget) -> None:
        if output.ndim != 2 or not output.shape[1]:
            raise ConfigurationError(
                "`task`: ordinal needs logits [samples, classes - 1], the model returned "
                f"{list(output.shape)}.",
                "return one logit for each threshold between two classes.",
            )
        most = output.shape[1]
        is_label = isinstance(target, Tensor) and target.numel() == len(output)
        if not is_label or not torch.isin(target, torch.arange(most + 1).to(target)).all():
            raise ConfigurationError(
                f"`task`: ordinal with logits {list(output.shape)} needs class numbers from 0 to "
                f"{most} [samples], found {described(target)}.",
                "pass an `adapter` that returns class numbers.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.prediction(output) == _class_numbers(target)) & ~output.isnan().any(1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = at_least_float32(output)
        label = _class_numbers(target)[:, None]
        thresholds = torch.arange(output.shape[1], device=output.device)
        truth = (thresholds < label).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        counts = thresholds <= label if self.conditional else torch.ones_like(truth).bool()
        return masked_mean(losses, counts)

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        distances = F.pad(self._distances(output).sort(1, descending=True).values, (1, 1))
        label = _class_numbers(target)[:, None]
        below = distances.gather(1, label)[:, 0].masked_fill(label[:, 0] == 0, torch.inf)
        above = distances.gather(1, label + 1)[:, 0]
        above = above.masked_fill(label[:, 0] == output.shape[1], -torch.inf)
        return torch.minimum(below, -above).masked_fill(output.isnan().any(1), -torch.inf)

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        return binary_divergence(output, teacher).mean(1)

    def prediction(self, output: Tensor) -> Tensor:
        return (self._distances(output) > 0).sum(1)

    def label(self, target: BatchTarget) -> Tensor | None:
        return _class_numbers(target) if isinstance(target, Tensor) else None

    def _distances(self, output: Tensor) -> Tensor:
        logits = at_least_float32(output)
        if not self.conditional:
            return logits
        return F.logsigmoid(logits).cumsum(1) + math.log(2)


def _class_numbers(target: Tensor) -> Tensor:
    return target.flatten().long()
