"""`Custom`, a task made of functions, and `NamedHead`, a task for one of the heads of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lightning_nrl._utils.checks import Kind, check_per_sample
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.adapters import describe, fields_of
from lightning_nrl.data.batch import BatchTarget, ModelOutput
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.classification import Multiclass
from lightning_nrl.tasks.task import Task, parse_task

Judge = Callable[[Tensor, BatchTarget], Tensor]
"""Maps the output and the target of a batch of `n` samples to one value per sample, `n`."""

DEFAULT_OUTPUT = "logits"
"""Name of the output that a task takes by default, if none has that name."""
MARGIN_ROUNDING = 1e-4
"""Margins below this share of the batch's largest margin may have the wrong sign, by rounding."""


class Custom(Task):
    """Task defined by your functions of output and target.

    A function may also be given by its address, `package.module:function`. To define `logits`,
    `prediction`, `label` or `divergence` too, derive a class from `Task` instead.

    Args:
        passed: returns `n` bool, True for each right sample.
        loss: returns each sample's loss, `n`, differentiable. With PyTorch's losses use
            `reduction="none"` and average over all dimensions but the first.
        margin: returns each sample's distance from being wrong, `n`, differentiable: above 0 if the
            sample passed, and below 0 if not. With None there are no margins, and only
            gradient-free methods like `swarm` can repair.

    Example:
        >>> def far(output, target):
        ...     return (output - target).abs().amax(1)
        >>> def near(output, target):
        ...     return far(output, target) < 0.5
        >>> task = Custom(passed=near, loss=far)
        >>> task.passed(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.25]]))
        tensor([True])
        >>> print(Custom(passed="torch:eq", loss="torch:dist"))
        Custom: passed by torch:eq
    """

    def __init__(
        self,
        passed: str | Judge,
        loss: str | Judge,
        margin: str | Judge | None = None,
    ) -> None:
        self._arguments = {"passed": passed, "loss": loss}
        if margin is not None:
            self._arguments["margin"] = margin
        self._functions: dict[str, Judge] = {
            name: import_function(f"Custom.{name}", argument)
            for name, argument in self._arguments.items()
        }

    def __repr__(self) -> str:
        addresses = [f"{name}={_address(x)!r}" for name, x in self._arguments.items()]
        return f"Custom({', '.join(addresses)})"

    def __str__(self) -> str:
        return f"Custom: passed by {_address(self._arguments['passed'])}"

    def check(self, output: Tensor, target: BatchTarget) -> None:
        passed = self._checked("passed", output, target, "bool")
        self._checked("loss", output, target)
        if "margin" in self._functions:
            margin = self._checked("margin", output, target)
            _check_signs(passed, margin.detach())

    def passed(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self._functions["passed"](output, target)

    def loss(self, output: Tensor, target: BatchTarget) -> Tensor:
        return at_least_float32(self._functions["loss"](output, target))

    def margin(self, output: Tensor, target: BatchTarget) -> Tensor | None:
        if "margin" not in self._functions:
            return None
        return at_least_float32(self._functions["margin"](output, target))

    def _checked(
        self,
        name: str,
        output: Tensor,
        target: BatchTarget,
        kind: Kind = "number",
    ) -> Tensor:
        function = f"`Custom.{name}`"
        try:
            values = self._functions[name](output, target)
        except Exception as error:
            raise ConfigurationError(
                f"{function} raised {type(error).__name__}: {error}",
                f"it is called with the model's output, here {list(output.shape)}, and the "
                "batch's target.",
            ) from error
        return check_per_sample(function, values, len(output), kind, tensors_only=True)


def _check_signs(passed: Tensor, margin: Tensor) -> None:
    finite = margin[margin.isfinite()]
    scale = finite.abs().max() if len(finite) else 0.0
    wrong = torch.where(passed, -margin, margin) > MARGIN_ROUNDING * scale
    if wrong.any():
        row = int(wrong.nonzero()[0])
        verdict = "passed" if passed[row] else "did not pass"
        raise ConfigurationError(
            f"`Custom.margin` returned {float(margin[row]):.4g} for a sample that {verdict} "
            f"({int(wrong.sum())} such samples in a batch).",
            "return a number above 0 for samples that passed and below 0 for the others, or leave "
            "`margin` out.",
        )


def task_of_output(task: Task | str | None, output: int | str | None) -> Task:
    """Parses a task; if `output` names an output of the model, the task is for this output."""
    parsed = parse_task(task)
    return parsed if output is None else NamedHead(output, parsed)


def _address(function: str | Judge) -> str:
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


@dataclass(frozen=True)
class NamedHead(Task):
    """Task for one head of a model with several outputs.

    If the target has several parts too, its part with this `name` is used. Give a repair a `layer`
    that belongs to this head only: the repair does not protect the outputs of other heads.

    Attributes:
        name: key, field or position of the head's output.
        task: task of this head, or its name.

    Example:
        >>> task = NamedHead("digit")
        >>> logits = task.logits({"digit": torch.tensor([[0.0, 1.0]]), "colour": torch.zeros(1, 3)})
        >>> task.passed(logits, {"digit": torch.tensor([1]), "colour": torch.tensor([2])})
        tensor([True])
    """

    name: str | int
    task: Task | str = field(default_factory=Multiclass)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", parse_task(self.task))

    @property
    def head_task(self) -> Task:
        return cast(Task, self.task)

    def __str__(self) -> str:
        return f"{self.task} of head {self.name!r}"

    def logits(self, output: ModelOutput) -> Tensor:
        return self.head_task.logits(self._part(output, "output"))

    def check(self, output: Tensor, target: BatchTarget) -> None:
        self.head_task.check(output, self._head_target(target))

    def passed(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self.head_task.passed(output, self._head_target(target))

    def loss(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self.head_task.loss(output, self._head_target(target))

    def passed_and_loss(
        self,
        output: Tensor,
        target: BatchTarget,
        reserve: Tensor | None = None,
        with_loss: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        target = self._head_target(target)
        return self.head_task.passed_and_loss(output, target, reserve, with_loss)

    def margin(self, output: Tensor, target: BatchTarget) -> Tensor | None:
        return self.head_task.margin(output, self._head_target(target))

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        return self.head_task.divergence(output, teacher, self._head_target(target))

    def prediction(self, output: Tensor) -> Tensor | None:
        return self.head_task.prediction(output)

    def label(self, target: BatchTarget) -> Tensor | None:
        return self.head_task.label(self._head_target(target))

    @property
    def by_arg_max(self) -> bool:
        return self.head_task.by_arg_max

    def _head_target(self, target: BatchTarget) -> BatchTarget:
        if isinstance(target, (tuple, list)) or fields_of(target) is not None:
            return self._part(target, "target")
        return target

    def _part(self, value: ModelOutput | BatchTarget, argument: str) -> object:
        fields = fields_of(value)
        if fields is not None and self.name in fields:
            return fields[self.name]
        if (
            isinstance(value, (tuple, list))
            and isinstance(self.name, int)
            and -len(value) <= self.name < len(value)
        ):
            return value[self.name]
        if self.name == DEFAULT_OUTPUT:
            return value
        raise ConfigurationError(
            f"`NamedHead.name={self.name!r}` is not in the {argument}.\n"
            f"{describe(value, argument)}",
            "give the key, field or position of a head.",
        )
