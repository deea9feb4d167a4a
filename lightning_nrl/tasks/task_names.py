"""Tasks from what a user may write."""

from __future__ import annotations

from typing import Any

from lightning_nrl.errors import ConfigurationError, check_choice, check_kind, explain
from lightning_nrl.tasks.multiclass import Multiclass
from lightning_nrl.tasks.multilabel import Multilabel
from lightning_nrl.tasks.segmentation import Segmentation
from lightning_nrl.tasks.sequence import Sequence
from lightning_nrl.tasks.task import Task

__all__ = ["parse_task"]

NAMES: dict[str, type[Task]] = {
    "multiclass": Multiclass,
    "multilabel": Multilabel,
    "segmentation": Segmentation,
    "sequence": Sequence,
}
UNNAMED = {
    "regression": "Regression(tolerance=0.1), in the units of the target",
    "custom": "Custom(passed=function, loss=function)",
}
"""What a name alone does not say."""


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
    if isinstance(task, str):
        name = task.lower()
        if name in UNNAMED:
            raise ConfigurationError(explain(f"`task={task!r}` does not say enough.", f"write {UNNAMED[name]}."))
        check_choice("task", name, tuple(NAMES))
        return NAMES[name]()
    example = "'multiclass', 'multilabel', Regression(tolerance=0.1), or an object of a class of yours"
    check_kind("task", task, isinstance(task, Task), "Task", example)
    return task
