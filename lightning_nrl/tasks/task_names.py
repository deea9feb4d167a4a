"""Tasks from what a user may write."""

from __future__ import annotations

from typing import Any

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.multiclass import Multiclass
from lightning_nrl.tasks.multilabel import Multilabel
from lightning_nrl.tasks.segmentation import Segmentation
from lightning_nrl.tasks.sequence import Sequence
from lightning_nrl.tasks.task import Task

__all__ = ["TASKS", "parse_task"]

TASKS: Registry[Task] = Registry(
    "Task",
    "'multiclass', 'multilabel', Regression(tolerance=0.1), or an object of a class of yours",
    lambda value: isinstance(value, Task),
)
"""The tasks that a name alone says."""

TASKS.register("multiclass")(Multiclass)
TASKS.register("multilabel")(Multilabel)
TASKS.register("segmentation")(Segmentation)
TASKS.register("sequence")(Sequence)

TASKS_WITH_ARGUMENTS = {
    "regression": "Regression(tolerance=0.1), in the units of the target",
    "custom": "Custom(passed=function, loss=function)",
}
"""Tasks that a name alone does not say, and what to write."""


def parse_task(task: Any) -> Task:
    """A task from its name or object; None is `Multiclass`.

    Raises:
        ConfigurationError: it is neither, or the name is not enough.

    Example:
        >>> parse_task("multilabel")
        Multilabel(threshold=0.5, wrong=0, ignore_index=-100)
    """
    if task is None:
        return Multiclass()
    name = task.lower() if isinstance(task, str) else task
    if isinstance(name, str) and name in TASKS_WITH_ARGUMENTS:
        hint = f"write {TASKS_WITH_ARGUMENTS[name]}."
        raise ConfigurationError(f"`task={task!r}` does not say enough.", hint)
    return TASKS.parse("task", name)
