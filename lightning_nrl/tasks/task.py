"""The meaning of "passed" and "loss" for one sample. Everything else in the package asks a `Task`."""

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
"""Names of the logits in an output with named parts, as Hugging Face, torchvision and others use them."""


class Task(ABC):
    """Decides, sample by sample, what is right and how wrong the rest is.

    The first dimension of an output counts samples, and so does that of each tensor in a target.
    """

    @abstractmethod
    def passed(self, output: Tensor, target: Any) -> Tensor:
        """True for each sample that is right: `n` bool from an output with first dimension `n`."""

    @abstractmethod
    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Each sample's loss, `n`, at least float32, to be made small."""

    def passed_and_loss(
        self, output: Tensor, target: Any, reserve: Tensor | None = None, with_loss: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Returns `passed` and `loss` in one call, for tasks that share work between them.

        `reserve`, `n`, is the margin that each sample must keep to pass too, for tasks with margins. Without
        `with_loss` None is returned for the loss.
        """
        passed = self.passed(output, target)
        if reserve is not None:
            margin = self.margin(output, target)
            assert margin is not None
            passed = passed & (margin >= reserve)
        return passed, self.loss(output, target) if with_loss else None

    def right(self, output: Tensor, target: Any) -> Tensor:
        """True for each sample that counts as right, `n` bool: it passes and its loss is finite."""
        passed, loss = self.passed_and_loss(output, target)
        assert loss is not None
        return passed & loss.isfinite()

    def check(self, output: Tensor, target: Any) -> None:
        """Refuses an output and a target that do not fit each other; asked once a batch before anything is counted."""
        return None

    def logits(self, output: Any) -> Tensor:
        """Returns the tensor to be judged in whatever the model returns.

        A tensor is taken as it is. Of an object, a mapping or a named tuple it is the field `logits`, else another of
        `OUTPUT_KEYS`, else the only tensor with samples; of a sequence the first tensor with samples, so that a loss
        before it does not matter.
        """
        if isinstance(output, Tensor):
            return output
        named = fields_of(output) or ({"logits": output.logits} if hasattr(output, "logits") else {})
        found = next((named[key] for key in OUTPUT_KEYS if isinstance(named.get(key), Tensor)), None)
        if found is None:
            values = list(output) if isinstance(output, (tuple, list)) else list(named.values())
            tensors = [x for x in values if isinstance(x, Tensor) and x.ndim]
            found = tensors[0] if len(tensors) == 1 or (tensors and isinstance(output, (tuple, list))) else None
        if found is None:
            raise ConfigurationError(
                f"`task`: no tensor of logits in what the model's forward returned.\n{describe(output, 'output')}",
                "return the logits from `forward`, name a head with `NamedHead`, or pass a `Task` of your own that "
                "overrides `logits`.",
            )
        return found

    def margin(self, output: Tensor, target: Any) -> Tensor | None:
        """How far each sample is from being wrong, `n`, at least float32: above 0 where it passed, below where not.

        Differentiable. 0 only on a tie, such as of two logits, which arg max decides. None where the task has no such
        number; then only methods without gradients can repair.
        """
        return None

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        """How much each sample's output differs from a teacher's, `n`, at least 0 and differentiable.

        The mean squared difference, unless the task knows better. `target` is for tasks whose truth says which parts of
        an output matter.
        """
        squares = (at_least_float32(output) - at_least_float32(teacher)).square()
        return squares[:, None].flatten(1).mean(1)

    def prediction(self, output: Tensor) -> Tensor | None:
        """The predicted class of each sample, `n` int64, or None where the task has no classes."""
        return None

    def label(self, target: Any) -> Tensor | None:
        """The true class of each sample, `n` int64, or None where the task has no classes."""
        return None

    def __repr__(self) -> str:
        """The task with its numbers and words and without memory addresses: what a cache tells tasks apart by."""
        plain = {name: x for name, x in vars(self).items() if x is None or isinstance(x, (bool, int, float, str))}
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in plain.items())})"

    def __str__(self) -> str:
        """The meaning of right in words, as reports print it."""
        return type(self).__name__


def class_logits(output: Tensor) -> Tensor:
    """Returns logits of two or more classes, `n x C x ...`: a single logit is that of class 1, class 0 has 0."""
    output = output[:, None] if output.ndim == 1 else output
    # The sigmoid of a logit is the softmax of 0 and that logit.
    return F.pad(output, (0, 0) * (output.ndim - 2) + (1, 0)) if output.shape[1] == 1 else output


def class_divergence(output: Tensor, teacher: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of class probabilities from a teacher's, `n x ...` of `n x C x ...` logits."""
    new, old = (F.log_softmax(at_least_float32(x), 1) for x in (output, teacher))
    return F.kl_div(new, old, reduction="none", log_target=True).sum(1)


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """`n`, the mean of `n x E` values over those that count, `n x E` bool; 0 where none does."""
    return torch.where(counts, values, 0.0).sum(1) / counts.sum(1).clamp_min(1)


TASKS: Registry[Task] = Registry(
    "Task",
    "'multiclass', 'multilabel', Regression(tolerance=0.1), or an object of a class of yours",
    lambda value: isinstance(value, Task),
)
"""The tasks that a name alone says."""

TASKS_WITH_ARGUMENTS = {
    "regression": "Regression(tolerance=0.1), in the units of the target",
    "custom": "Custom(passed=function, loss=function)",
}
"""Tasks that a name alone does not say, and what to write."""


def parse_task(task: Any) -> Task:
    """A task from its name or object; None is `Multiclass`.

    Example:
        >>> parse_task("multilabel")
        Multilabel(threshold=0.5, wrong=0, ignore_index=-100)
    """
    name = task.lower() if isinstance(task, str) else "multiclass" if task is None else task
    if isinstance(name, str) and name in TASKS_WITH_ARGUMENTS:
        hint = f"write {TASKS_WITH_ARGUMENTS[name]}."
        raise ConfigurationError(f"`task={task!r}` does not say enough.", hint)
    return TASKS.parse("task", name)
