"""The `Task` interface and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import NoneType

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.adapters import describe, fields_of, outputs_in
from lightning_nrl.data.batch import BatchTarget, ModelOutput
from lightning_nrl.errors import ConfigurationError

OUTPUT_KEYS = ("logits", "out", "prediction", "predictions", "preds", "output", "outputs")
"""Usual names of the logits in outputs with named fields, such as those of Hugging Face and
torchvision.
"""


class Task(ABC):
    """Decides for each sample whether its output is right, and computes its loss and margin.

    The first dimension of an output, and of each tensor in a target, is the number of samples `n`.
    """

    @abstractmethod
    def passed(self, output: Tensor, target: BatchTarget) -> Tensor:
        """Marks the right samples, `n` bool."""

    @abstractmethod
    def loss(self, output: Tensor, target: BatchTarget) -> Tensor:
        """Returns the loss of each sample, `n`, at least float32."""

    def passed_and_loss(
        self,
        output: Tensor,
        target: BatchTarget,
        reserve: Tensor | None = None,
        with_loss: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns `passed` and `loss` in one call, so that a task can share work between them.

        Args:
            output: the model's logits.
            target: the targets.
            reserve: `n`, minimum margin of each sample to pass. None means no minimum, as for tasks
                without margins.
            with_loss: if False, the second result is None.
        """
        passed = self.passed(output, target)
        if reserve is not None:
            margin = self.margin(output, target)
            assert margin is not None
            # A sample without a margin, NaN, is judged by `passed` alone.
            passed = passed & ~(margin < reserve)
        return passed, self.loss(output, target) if with_loss else None

    def right(self, output: Tensor, target: BatchTarget) -> Tensor:
        """Marks the samples that pass and have a finite loss, `n` bool."""
        return self.passed(output, target) & self.loss(output, target).isfinite()

    def check(self, output: Tensor, target: BatchTarget) -> None:
        """Raises a `ConfigurationError` if output and target of a batch do not fit together.

        Called for each batch.
        """
        return None

    def logits(self, output: ModelOutput) -> Tensor:
        """Returns the logits in the output of a model.

        A tensor is returned as it is. Of the named fields of an output, the first in `OUTPUT_KEYS`
        is returned. If no field has such a name, the first tensor of a list or tuple is returned,
        or the only tensor of another output. Scalars are ignored. Raises a `ConfigurationError` if
        no tensor is found, or several in a mapping.
        """
        if isinstance(output, Tensor):
            return output
        fields = fields_of(output) or {}
        for key in OUTPUT_KEYS:
            logits = fields.get(key)
            if isinstance(logits, Tensor):
                return logits
        tensors = list(outputs_in(output).values())
        if len(tensors) == 1 or (tensors and isinstance(output, (tuple, list))):
            return tensors[0]
        refuse_boxes(output)
        if isinstance(output, Distribution):
            raise ConfigurationError(
                f"`task`: forward returns a distribution, {type(output).__name__}.",
                "return what your loss compares with the targets, such as its mean, "
                "`module(x).mean`, by an `adapter` f(module, batch) -> (logits, target).",
            )
        raise ConfigurationError(
            "`task`: the output of the model's forward has no tensor of logits.\n"
            f"{describe(output, 'output')}",
            "return the logits from `forward`, name a head with `NamedHead`, or pass a `Task` of "
            "your own that overrides `logits`.",
        )

    def margin(self, output: Tensor, target: BatchTarget) -> Tensor | None:
        """Returns the margin of each sample, `n`, differentiable and at least float32.

        A margin is above 0 if the sample passed and below 0 if it failed. It is 0 only on a tie,
        such as between two logits. A task without margins returns None; only gradient-free methods
        can then repair.
        """
        return None

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        """Returns the distance, `n`, of each output from the output `teacher` of another model.

        Distances are at least 0 and differentiable. The default is the mean squared difference.
        Given `target`, a task may leave out what the target ignores.
        """
        difference = at_least_float32(output) - at_least_float32(teacher)
        return difference.square()[:, None].flatten(1).mean(1)

    def prediction(self, output: Tensor) -> Tensor | None:
        """Returns the predicted class of each sample, `n` int64, or None without classes."""
        return None

    def label(self, target: BatchTarget) -> Tensor | None:
        """Returns the true class of each sample, `n` int64, or None without classes."""
        return None

    @property
    def by_arg_max(self) -> bool:
        """True if the predicted class is the arg max of `class_logits`."""
        return False

    def __repr__(self) -> str:
        """Returns the class name and the plain attributes.

        It contains no memory addresses, so that it can be a cache key.
        """
        plain = (int, float, str, NoneType)
        attributes = [f"{name}={x!r}" for name, x in vars(self).items() if isinstance(x, plain)]
        return f"{type(self).__name__}({', '.join(attributes)})"

    def __str__(self) -> str:
        """Describes when a sample is right, for reports."""
        return type(self).__name__


def refuse_boxes(value: object) -> None:
    """Refuses outputs or targets of object detection: a list with a mapping for each image."""
    if not isinstance(value, (list, tuple)) or not value:
        return
    if isinstance(value[0], Mapping) and "boxes" in value[0]:
        raise ConfigurationError(
            "`task`: boxes for each image were found, but object detection and instance "
            "segmentation are not supported.",
            "judge which classes are found in an image, by `task='multilabel'` and an adapter "
            "f(module, batch) -> (logits, target); docs/modules.md has one.",
        )


def class_logits(output: Tensor) -> Tensor:
    """Returns logits `n x C x ...` of at least two classes.

    A single logit is for class 1, and class 0 gets 0.
    """
    if output.ndim == 1:
        output = output[:, None]
    if output.shape[1] != 1:
        return output
    # sigmoid(z) = softmax([0, z])[1]
    before_classes = (1, 0)
    return F.pad(output, (0, 0) * (output.ndim - 2) + before_classes)


def class_divergence(output: Tensor, teacher: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence, `n x ...`, from logits `teacher`, `n x C x ...`."""
    log_output = F.log_softmax(at_least_float32(output), 1)
    log_teacher = F.log_softmax(at_least_float32(teacher), 1)
    return F.kl_div(log_output, log_teacher, reduction="none", log_target=True).sum(1)


def binary_divergence(output: Tensor, teacher: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence of each logit's probability from the teacher's."""
    new = at_least_float32(output)
    old = at_least_float32(teacher)
    of_presence = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
    of_absence = (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))
    return (of_presence + of_absence).clamp_min(0)


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Averages each row of `values`, `n x E`, over the entries where `counts` is True.

    A row without True gives 0.
    """
    return torch.where(counts, values, 0.0).sum(1) / counts.sum(1).clamp_min(1)


TASKS: Registry[Task] = Registry(
    "Task",
    "'multiclass', 'multilabel', Regression(tolerance=0.1), or an object of your own class",
    lambda value: isinstance(value, Task),
)
"""Tasks by name, for tasks that need no arguments."""

TASKS_WITH_ARGUMENTS = {
    "regression": "Regression(tolerance=0.1), in the units of the target",
    "custom": "Custom(passed=function, loss=function)",
}
"""Tasks that need arguments, with an example of each."""


def parse_task(task: Task | str | None) -> Task:
    """Returns the task named `task`, or `Multiclass` for None. Returns a `Task` unchanged.

    Raises a `ConfigurationError` if the name is unknown, or if the named task needs arguments.

    Example:
        >>> parse_task("multilabel")
        Multilabel(threshold=0.5, wrong=0, ignore_index=-100)
    """
    if task is None:
        task = "multiclass"
    if isinstance(task, str):
        task = task.lower()
        if task in TASKS_WITH_ARGUMENTS:
            hint = f"write {TASKS_WITH_ARGUMENTS[task]}."
            raise ConfigurationError(f"`task={task!r}` needs arguments.", hint)
    return TASKS.parse("task", task)
