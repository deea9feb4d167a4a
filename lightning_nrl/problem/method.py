"""The one call that every way of finding new weights answers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning_nrl.problem.problem import Problem
from lightning_nrl.problem.solution import Solution

__all__ = ["Method"]


@runtime_checkable
class Method(Protocol):
    """How new weights are found. A method of your own is a frozen dataclass with this call.

    With an attribute `trains = True` it says that it goes on with the training where it can: then it is checked before
    the first step of training whether that will be possible. With `needs`, of `Need` in
    `lightning_nrl.evaluation.requirements`, it says what it needs of the task, which is checked then, too.
    """

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights. The model is left as found.

        Raises:
            EmptyLocalizationError: no weight can be chosen; the repair then ends as `not repaired`.
            ConfigurationError: the method does not suit the model or the task.
        """
        ...
