"""`Regression`, a task with numeric targets and a tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl.data.batch import BatchTarget
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.tasks.task import Task


@dataclass(frozen=True)
class Regression(Task):
    """Regression: a sample is right if every output is within a tolerance of its target.

    Outputs and targets have equal sizes, `n` or `n x ...`. An error is measured in units of the
    tolerance. The margin of a sample is 1 minus its largest absolute error: 1 for a perfect output,
    below 0 outside the tolerance. The loss is the Huber loss of the errors, averaged over outputs,
    so that single outliers do not dominate.

    Attributes:
        tolerance: absolute tolerance, above 0, in the units of the target.
        relative: share of the target's absolute value that is added to `tolerance`, such as 0.05
            for 5 %.

    Example:
        >>> output, target = torch.tensor([1.25, 3.0]), torch.tensor([1.0, 2.0])
        >>> Regression(tolerance=0.5).margin(output, target)
        tensor([ 0.5000, -1.0000])
        >>> Regression(tolerance=0.5, relative=0.5).passed(output, target)
        tensor([True, True])
    """

    tolerance: float
    relative: float = 0.0

    def __post_init__(self) -> None:
        hint = "give a number above 0, in the units of the target."
        check_real("Regression.tolerance", self.tolerance, "tolerance", hint, above=0)
        hint = "give a number from 0."
        check_real("Regression.relative", self.relative, "share of the target", hint, least=0)

    def __str__(self) -> str:
        tolerance = f"{self.tolerance:.4g}"
        if self.relative:
            tolerance += f" + {self.relative:.4g} of the target"
        return f"Regression: every output within {tolerance} of its target"

    def check(self, output: Tensor, target: BatchTarget) -> None:
        if not isinstance(target, Tensor):
            raise ConfigurationError(
                "`task`: regression needs a tensor of numbers as target, found "
                f"{described(target)}.",
                "pass an `adapter` that returns one.",
            )
        same_samples = output.ndim and output.shape[:1] == target.shape[:1]
        if not same_samples or output.numel() != target.numel():
            raise ConfigurationError(
                f"`task`: regression got outputs {list(output.shape)} for targets "
                f"{list(target.shape)}.",
                "the model must return one number for each number of the target.",
            )
        n_not_finite = int((~target.isfinite()).sum())
        if n_not_finite:
            raise ConfigurationError(
                f"`task`: {n_not_finite} numbers of a batch's target are NaN or infinite.",
                "leave samples without a known target out of the data.",
            )

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.margin(output, target) > 0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        error = self._errors(output, target, target)
        return F.huber_loss(error, torch.zeros_like(error), reduction="none").mean(1)

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        margin = 1 - self._errors(output, target, target).abs().amax(1)
        return torch.where(margin.isnan(), -torch.inf, margin)

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        return self._errors(output, teacher, target).square().mean(1)

    def _errors(self, output: Tensor, reference: Tensor, target: Tensor | None) -> Tensor:
        """Returns `output - reference` in units of the tolerance, `n x D`: samples x outputs."""
        difference = _rows(output) - _rows(reference)
        if not self.relative or target is None:
            return difference / self.tolerance
        return difference / (self.tolerance + self.relative * _rows(target).abs())


def _rows(x: Tensor) -> Tensor:
    return at_least_float32(x)[:, None].flatten(1)
