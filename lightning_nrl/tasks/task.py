"""The `Task` interface and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.adapters import describe, fields_of
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
    def passed(self, output: Tensor, target: Any) -> Tensor:
        """Marks the right samples, `n` bool."""

    @abstractmethod
    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Returns the loss of each sample, `n`, at least float32."""

    def passed_and_loss(
        self, output: Tensor, target: Any, reserve: Tensor | None = None, with_loss: bool = True
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
            passed = passed & (margin >= reserve)
        return passed, self.loss(output, target) if with_loss else None

    def right(self, output: Tensor, target: Any) -> Tensor:
        """Marks the samples that pass and have a finite loss, `n` bool."""
        passed, loss = self.passed_and_loss(output, target)
        assert loss is not None
        return passed & loss.isfinite()

    def check(self, output: Tensor, target: Any) -> None:
        """Raises a `ConfigurationError` if output and target of a batch do not fit together. Called
        for each batch.
        """
        return None

    def logits(self, output: Any) -> Tensor:
        """Returns the logits in the output of a model.

        A tensor is returned as it is. Of the named fields of an output, the first in `OUTPUT_KEYS`
        is returned. If no field has such a name, the first tensor of a list or tuple is returned,
        or the only tensor of another output. Scalars are ignored. Raises a `ConfigurationError` if
        no tensor is found, or several in a mapping.
        """
        if isinstance(output, Tensor):
            return output
        named = fields_of(output) or (
            {"logits": output.logits} if hasattr(output, "logits") else {}
        )
        found = next(
            (named[key] for key in OUTPUT_KEYS if isinstance(named.get(key), Tensor)), None
        )
        if found is None:
            values = list(output) if isinstance(output, (tuple, list)) else list(named.values())
            tensors = [x for x in values if isinstance(x, Tensor) and x.ndim]
            found = (
                tensors[0]
                if len(tensors) == 1 or (tensors and isinstance(output, (tuple, list)))
                else None
            )
        if found is None:
            raise ConfigurationError(
                f"`task`: the output of the model's forward has no tensor of logits.\n{describe(output, 'output')}",
                "return the logits from `forward`, name a head with `NamedHead`, or pass a `Task` of your own that "
                "overrides `logits`.",
            )
        return found

    def margin(self, output: Tensor, target: Any) -> Tensor | None:
        """Returns the margin of each sample, `n`, differentiable and at least float32.

        A margin is above 0 if the sample passed and below 0 if it failed. It is 0 only on a tie,
        such as between two logits. A task without margins returns None; only gradient-free methods
        can then repair.
        """
        return None

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        """Returns the distance, `n`, of each output from another model's output `teacher`: at least
        0,
        differentiable.

        The default is the mean squared difference. Given `target`, a task may leave out what the
        target ignores.
        """
        squares = (at_least_float32(output) - at_least_float32(teacher)).square()
        return squares[:, None].flatten(1).mean(1)

    def prediction(self, output: Tensor) -> Tensor | None:
        """Returns the predicted class of each sample, `n` int64, or None if the task has no
        classes.
        """
        return None

    def label(self, target: Any) -> Tensor | None:
        """Returns the true class of each sample, `n` int64, or None if the task has no classes."""
        return None

    def __repr__(self) -> str:
        """Returns the class name and the plain attributes, but no memory addresses, so that it can
        be a cache key.
        """
        plain = {
            name: x
            for name, x in vars(self).items()
            if x is None or isinstance(x, (bool, int, float, str))
        }
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in plain.items())})"

    def __str__(self) -> str:
        """Describes when a sample is right, for reports."""
        return type(self).__name__


def class_logits(output: Tensor) -> Tensor:
    """Returns logits `n x C x ...` of at least two classes. A single logit is for class 1, and
    class 0 gets 0.
    """
    output = output[:, None] if output.ndim == 1 else output
    # sigmoid(z) = softmax([0, z])[1]
    return F.pad(output, (0, 0) * (output.ndim - 2) + (1, 0)) if output.shape[1] == 1 else output


def class_divergence(output: Tensor, teacher: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence, `n x ...`, of logits `output` from logits `teacher`,
    `n x C x ...`.
    """
    new, old = (F.log_softmax(at_least_float32(x), 1) for x in (output, teacher))
    return F.kl_div(new, old, reduction="none", log_target=True).sum(1)


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Averages each row of `values`, `n x E`, over the entries where `counts` is True. A row
    without True gives 0.
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


def parse_task(task: Any) -> Task:
    """Returns the task named `task`, `task` itself if it is a `Task`, or `Multiclass` if it is
    None.

    Raises a `ConfigurationError` if the name is unknown, or if the named task needs arguments.

    Example:
        >>> parse_task("multilabel")
        Multilabel(threshold=0.5, wrong=0, ignore_index=-100)
    """
    name = task.lower() if isinstance(task, str) else "multiclass" if task is None else task
    if isinstance(name, str) and name in TASKS_WITH_ARGUMENTS:
        hint = f"write {TASKS_WITH_ARGUMENTS[name]}."
        raise ConfigurationError(f"`task={task!r}` needs arguments.", hint)
    return TASKS.parse("task", name)
