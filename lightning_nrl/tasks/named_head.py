"""One of several outputs of a model, judged by any task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_nrl.data.adapters import describe, fields_of
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.tasks.classification import Multiclass
from lightning_nrl.tasks.task import Task


@dataclass(frozen=True)
class NamedHead(Task):
    """One head of a model with several, by the name or the place that its output has; a task judges it.

    Where the target has parts too, the part of the same name is the truth. All else of the output is left out, so name
    the head's own layer as `layer`.

    Attributes:
        name: a key of a mapping, a field of an object, or a place in a tuple.
        task: what judges it.

    Example:
        >>> import torch
        >>> task = NamedHead("digit")
        >>> logits = task.logits({"digit": torch.tensor([[0.0, 1.0]]), "colour": torch.zeros(1, 3)})
        >>> task.passed(logits, {"digit": torch.tensor([1]), "colour": torch.tensor([2])})
        tensor([True])
    """

    name: str | int
    task: Task = field(default_factory=Multiclass)

    def __post_init__(self) -> None:
        check_kind("NamedHead.task", self.task, isinstance(self.task, Task), "task", "task=Multiclass()")

    def __str__(self) -> str:
        return f"{self.task} of head {self.name!r}"

    def logits(self, output: Any) -> Tensor:
        return self.task.logits(self._part(output, "output"))

    def check(self, output: Tensor, target: Any) -> None:
        self.task.check(output, self._truth(target))

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return self.task.passed(output, self._truth(target))

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return self.task.loss(output, self._truth(target))

    def passed_and_loss(
        self, output: Tensor, target: Any, reserve: Tensor | None = None, with_loss: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return self.task.passed_and_loss(output, self._truth(target), reserve, with_loss)

    def margin(self, output: Tensor, target: Any) -> Tensor | None:
        return self.task.margin(output, self._truth(target))

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        return self.task.divergence(output, teacher, None if target is None else self._truth(target))

    def prediction(self, output: Tensor) -> Tensor | None:
        return self.task.prediction(output)

    def label(self, target: Any) -> Tensor | None:
        return self.task.label(self._truth(target))

    def _truth(self, target: Any) -> Any:
        has_parts = isinstance(target, (tuple, list)) or fields_of(target) is not None
        return self._part(target, "target") if has_parts else target

    def _part(self, value: Any, what: str) -> Any:
        named = fields_of(value)
        if named is not None and self.name in named:
            return named[str(self.name)] if not isinstance(value, Mapping) else value[self.name]
        if isinstance(value, (tuple, list)) and isinstance(self.name, int) and -len(value) <= self.name < len(value):
            return value[self.name]
        raise ConfigurationError(
            f"`NamedHead.name={self.name!r}` is no part of the {what}.\n{describe(value, what)}",
            "give the key, the field or the place of a head.",
        )
