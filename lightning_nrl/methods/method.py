"""`Method`, the base class of repair methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.localization import Localizer
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Solution
from lightning_nrl.search import FitnessFunction
from lightning_nrl.search.scoring.activation_cache import ActivationCache


class Method(ABC):
    """Base class of repair methods. Your own method is a frozen dataclass with a `__call__`.

    Everything else has a default, and is read before the training or the repair starts.

    Attributes:
        trains: True if the method continues the training, and so needs no layer to search. The
            repair first checks that this is possible.
        needs: requirements on task and data.
        localizer: chooses the weights to search if the user names no localizer.
        fitness: compares new weights if the user names no fitness.
    """

    trains: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ()
    localizer: str | Localizer | None = None
    fitness: str | FitnessFunction | None = None

    @abstractmethod
    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights and leaves the model unchanged.

        Raises:
            EmptyLocalizationError: there are no weights to search.
            ConfigurationError: the method does not suit the model or the task.
        """

    def check(self, model: nn.Module) -> None:  # noqa: B027 (nothing to check by default)
        """Raises a `ConfigurationError` if an argument does not suit the model."""

    def check_recording(self, recording: ActivationCache) -> None:  # noqa: B027
        """Raises a `ConfigurationError` if the layers to search do not suit the method."""

    def with_parts(
        self,
        *,
        localizer: str | Localizer | None,
        fitness: str | FitnessFunction | None,
    ) -> Method:
        """Returns the method with the parts that the user chose; None keeps the method's own."""
        return self

    def in_trainer(self, trainer: Any, failing: Sequence[str] | None) -> Method:
        """Returns the method with what it takes from a Trainer, such as checkpoints.

        It is called before the training, to check a repair, with the names of the splits that have
        failures (`failing`), and after the training with None.
        """
        return self
