"""`Custom`, a task made of functions, and `NamedHead`, a task for one of the heads of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_nrl._utils.checks import Kind, check_per_sample
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.adapters import describe, fields_of
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.classification import Multiclass
from lightning_nrl.tasks.task import Task, parse_task

Judge = Callable[[Tensor, Any], Tensor]
"""Maps the output and the target of a batch of `n` samples to one value per sample, `n`."""

MARGIN_ROUNDING = (
    1e-4  # margins smaller than this share of the batch's largest margin may have the wrong sign
)


class Custom(Task):
    """Task defined by your functions of output and target, or by addresses of functions,
    `package.module:function`.

    To define `logits`, `prediction`, `label` or `divergence` too, derive a class from `Task`
    instead.

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
        self, passed: str | Judge, loss: str | Judge, margin: str | Judge | None = None
    ) -> None:
        given = {"passed": passed, "loss": loss, **({} if margin is None else {"margin": margin})}
        self._functions = {
            name: import_function(f"Custom.{name}", function) for name, function in given.items()
        }
        self._names = {name: f if isinstance(f, str) else _address(f) for name, f in given.items()}

    def __repr__(self) -> str:
        return (
            f"Custom({', '.join(f'{name}={address!r}' for name, address in self._names.items())})"
        )

    def __str__(self) -> str:
        return f"Custom: passed by {self._names['passed']}"

    def check(self, output: Tensor, target: Any) -> None:
        found = {}
        for name, function in self._functions.items():
            try:
                found[name] = function(output, target)
            except Exception as error:
                raise ConfigurationError(
                    f"`Custom.{name}` raised {type(error).__name__}: {error}",
                    f"it is called with the model's output, here {list(output.shape)}, and the batch's target.",
                ) from error
            kind: Kind = "bool" if name == "passed" else "number"
            check_per_sample(f"`Custom.{name}`", found[name], len(output), kind, tensors_only=True)
        if "margin" in found:
            self._check_signs(found["passed"], found["margin"].detach())

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return cast(Tensor, self._functions["passed"](output, target))

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return at_least_float32(self._functions["loss"](output, target))

    def margin(self, output: Tensor, target: Any) -> Tensor | None:
        return (
            at_least_float32(self._functions["margin"](output, target))
            if "margin" in self._functions
            else None
        )

    def _check_signs(self, passed: Tensor, margin: Tensor) -> None:
        scale = margin[margin.isfinite()].abs().max() if margin.isfinite().any() else 0.0
        wrong = torch.where(passed, -margin, margin) > MARGIN_ROUNDING * scale
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ConfigurationError(
                f"`Custom.margin` returned {float(margin[row]):.4g} for a sample that "
                f"{'passed' if passed[row] else 'did not pass'} ({int(wrong.sum())} such samples in a batch).",
                "return a number above 0 for samples that passed and below 0 for the others, or leave `margin` out.",
            )


def _address(function: Judge) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}:{name}"


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
    def _judge(self) -> Task:
        return cast("Task", self.task)

    def __str__(self) -> str:
        return f"{self.task} of head {self.name!r}"

    def logits(self, output: Any) -> Tensor:
        return self._judge.logits(self._part(output, "output"))

    def check(self, output: Tensor, target: Any) -> None:
        self._judge.check(output, self._truth(target))

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return self._judge.passed(output, self._truth(target))

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return self._judge.loss(output, self._truth(target))

    def passed_and_loss(
        self, output: Tensor, target: Any, reserve: Tensor | None = None, with_loss: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return self._judge.passed_and_loss(output, self._truth(target), reserve, with_loss)

    def margin(self, output: Tensor, target: Any) -> Tensor | None:
        return self._judge.margin(output, self._truth(target))

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        return self._judge.divergence(
            output, teacher, None if target is None else self._truth(target)
        )

    def prediction(self, output: Tensor) -> Tensor | None:
        return self._judge.prediction(output)

    def label(self, target: Any) -> Tensor | None:
        return self._judge.label(self._truth(target))

    def _truth(self, target: Any) -> Any:
        has_parts = isinstance(target, (tuple, list)) or fields_of(target) is not None
        return self._part(target, "target") if has_parts else target

    def _part(self, value: Any, what: str) -> Any:
        named = fields_of(value)
        if named is not None and self.name in named:
            return named[str(self.name)] if not isinstance(value, Mapping) else value[self.name]
        if (
            isinstance(value, (tuple, list))
            and isinstance(self.name, int)
            and -len(value) <= self.name < len(value)
        ):
            return value[self.name]
        raise ConfigurationError(
            f"`NamedHead.name={self.name!r}` is not in the {what}.\n{describe(value, what)}",
            "give the key, field or position of a head.",
        )
