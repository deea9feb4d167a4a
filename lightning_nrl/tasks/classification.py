"""`Multiclass` and `Binary`, with one class per sample, and `Multilabel`, with several labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl.data.batch import BatchTarget, ModelOutput
from lightning_nrl.errors import ConfigurationError, check_real, check_whole
from lightning_nrl.tasks.task import (
    TASKS,
    Task,
    binary_divergence,
    class_divergence,
    class_logits,
    masked_mean,
    refuse_boxes,
)

PROBABILITY_ROUNDING = 1e-2
"""Maximum deviation of a sample's total probability from 1, wide enough for half precision."""


@TASKS.register("multiclass")
class Multiclass(Task):
    """Multiclass classification: a sample is right if the arg max of its logits is its class.

    Logits are `n x C`, samples x classes; one logit per sample, `n` or `n x 1`, is treated as in
    `Binary`. The loss is cross entropy, in at least float32. Targets are class indices, `n` or `n x
    1`, of any real dtype, or `n x C` class probabilities. In the second case, the most probable
    class is the true class, and the loss uses all probabilities.
    """

    def check(self, output: Tensor, target: Tensor) -> None:
        self.prediction(output)
        label = self.label(target)
        n_classes = class_logits(output).shape[1]
        if len(label) != len(output):
            raise ConfigurationError(
                f"`task`: the model returned {len(output)} rows of logits for {len(label)} "
                "targets.",
                "return one row for each sample, or pass an `adapter` that sets the model's inputs "
                "and the targets.",
            )
        if _is_soft(target):
            _check_probabilities(target, n_classes)
        elif target.is_floating_point() and (target != target.round()).any():
            raise ConfigurationError(
                "`task`: multiclass needs whole-number labels, found fractions.",
                "for numeric targets use `task=Regression(tolerance=...)`.",
            )
        # On a GPU, a label without a logit would abort the process.
        if len(label) and int(label.max()) >= n_classes:
            raise ConfigurationError(
                f"`task`: there is a label {int(label.max())}, and the model returned "
                f"{list(output.shape)} logits.",
                f"give labels from 0 to {n_classes - 1}; for ordered classes with a logit for each "
                "threshold use `task='ordinal'` (CORN: `Ordinal(conditional=True)`), for numeric "
                "targets `Regression(tolerance=...)`.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.prediction(output) == self.label(target)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = at_least_float32(class_logits(output))
        if _is_soft(target):
            return F.cross_entropy(logits, target.to(logits), reduction="none")
        return F.cross_entropy(logits, self._usable_label(target), reduction="none")

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        logits = at_least_float32(class_logits(output))
        label = self._usable_label(target)[:, None]
        return logits.gather(1, label)[:, 0] - logits.scatter(1, label, -torch.inf).amax(1)

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        return class_divergence(class_logits(output), class_logits(teacher))

    def logits(self, output: ModelOutput) -> Tensor:
        logits = super().logits(output)
        return logits[:, None] if logits.ndim == 1 else logits

    def prediction(self, output: Tensor) -> Tensor:
        if output.ndim not in (1, 2) or output.shape[1:] == (0,):
            hint = "return one logit for each class (one is enough for two classes), or pass "
            if output.ndim == 3:
                hint = (
                    "write `task='sequence'` if each token has a class; average the members of an "
                    "ensemble by an `adapter`; or pass "
                )
            raise ConfigurationError(
                "`task`: multiclass needs logits [samples, classes], the model returned "
                f"{list(output.shape)}.",
                hint + "another `Task` as `task=`.",
            )
        return class_logits(output).argmax(1)

    @property
    def by_arg_max(self) -> bool:
        return True

    def label(self, target: Tensor) -> Tensor:
        if not isinstance(target, Tensor) or target.ndim not in (1, 2):
            refuse_boxes(target)
            raise ConfigurationError(
                "`task`: multiclass needs whole-number labels [samples], found "
                f"{described(target)}.",
                "give class numbers in the batch, or pass an `adapter` or a `task` that fits.",
            )
        if _is_soft(target):
            return target.float().argmax(1)
        return target.flatten().long()

    def _usable_label(self, target: Tensor) -> Tensor:
        # Negative labels raise no error here: the `Evaluator` names their samples after a pass.
        return self.label(target).clamp_min(0)


def _is_soft(target: Tensor) -> bool:
    return target.ndim == 2 and target.shape[1] > 1


def _check_probabilities(target: Tensor, n_classes: int) -> None:
    rows = target.double()
    deviation = (rows.sum(1) - 1).abs()
    is_valid = (rows >= 0).all() and (deviation <= PROBABILITY_ROUNDING).all()
    if target.shape[1] != n_classes or not is_valid:
        raise ConfigurationError(
            f"`task`: multiclass found {described(target)} that are not probabilities of "
            f"{n_classes} classes.",
            "give class numbers [samples], or rows that add up to 1; for several labels per sample "
            "use `task='multilabel'`.",
        )


@TASKS.register("binary")
class Binary(Multiclass):
    """Binary classification from one logit per sample, `n` or `n x 1`.

    A logit above 0 predicts class 1. The loss is binary cross entropy. Targets are 0 or 1, `n` or
    `n x 1`, of any dtype. `Multiclass`, the default, gives the same results for such logits.
    `Binary` rejects logits of any other shape.
    """

    def check(self, output: Tensor, target: Tensor) -> None:
        if output.shape[1:] not in ((), (1,)):
            raise ConfigurationError(
                "`task`: binary needs one logit a sample, the model returned "
                f"{list(output.shape)}.",
                "return [samples] or [samples, 1], or take `task='multiclass'`.",
            )
        super().check(output, target)


@TASKS.register("multilabel")
@dataclass(frozen=True)
class Multilabel(Task):
    """Multi-label classification: a sample is right if all its labels are right.

    A label is right if its probability, the sigmoid of the logit, is above the threshold for target
    1 and below it for target 0. Logits and targets are `n x L`, samples x labels; targets have any
    dtype. The loss is binary cross entropy, averaged over labels. The margin of a label is the
    distance of its logit from the threshold, negative if the label is wrong. A sample's margin is
    the smallest margin of its labels, without the `wrong` smallest ones.

    Attributes:
        threshold: probability threshold, between 0 and 1.
        wrong: number of wrong labels that a right sample may have.
        ignore_index: target that marks a label as unknown. Unknown labels do not count.

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
        labels = f"all labels but {self.wrong}" if self.wrong else "every label"
        text = f"Multilabel: {labels} right"
        if self.threshold != 0.5:
            text += f" at a threshold of {self.threshold:.4g}"
        return text

    def check(self, output: Tensor, target: BatchTarget) -> None:
        if output.ndim != 2 or not output.shape[1]:
            raise ConfigurationError(
                "`task`: multilabel needs logits [samples, labels], the model returned "
                f"{list(output.shape)}.",
                "return one logit for each label, or pass a `Task` that fits as `task=`.",
            )
        if not isinstance(target, Tensor) or target.shape != output.shape:
            raise ConfigurationError(
                "`task`: multilabel needs labels of the shape of the logits, "
                f"{list(output.shape)}, found {described(target)}.",
                "give 1 or 0 for each label, or pass an `adapter` or a `task` that fits.",
            )
        is_known = self._is_known(target)
        invalid = target[is_known & (target != 0) & (target != 1)]
        if len(invalid):
            raise ConfigurationError(
                f"`task`: multilabel found a label {invalid[0].item():g}, neither 0 nor 1.",
                "set `ignore_index` to the value of unknown labels.",
            )
        n_known = is_known.sum(1)
        if (n_known <= self.wrong).any():
            raise ConfigurationError(
                f"`Multilabel.wrong={self.wrong}`, and a sample has {int(n_known.min())} known "
                "labels, so none need be right.",
                "leave such samples out of the data, or give a smaller number.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.margin(output, target) > 0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = at_least_float32(output)
        truth = (target == 1).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return masked_mean(losses, self._is_known(target))

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        distance = at_least_float32(output) - math.log(self.threshold / (1 - self.threshold))
        margins = torch.where(target == 1, distance, -distance)
        margins = torch.where(margins.isnan(), -torch.inf, margins)
        margins = torch.where(self._is_known(target), margins, torch.inf)
        if self.wrong:
            return margins.kthvalue(self.wrong + 1, 1).values
        return margins.amin(1)  # faster than `kthvalue`; ties share the gradient

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        divergence = binary_divergence(output, teacher)
        if target is None:
            return divergence.mean(1)
        return masked_mean(divergence, self._is_known(target))

    def _is_known(self, target: Tensor) -> Tensor:
        # As floats, since uint8 cannot hold -100.
        return target.float() != self.ignore_index
