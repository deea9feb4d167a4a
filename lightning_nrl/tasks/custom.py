"""A task made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lightning_nrl._utils.checks import Kind, check_per_sample
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import import_function
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.task import Task

Judge = Callable[[Tensor, Any], Tensor]
"""From an output and a target, first dimension `n`, one value a sample, `n`."""

MARGIN_ROUNDING = 1e-4
"""Margins this small beside the largest of a batch may have the wrong sign."""


class Custom(Task):
    """What right and wrong mean, in functions of your own, or their addresses as text, `package.module:function`.

    A class of your own, derived from `Task`, can say more: where logits are, what classes and divergence are.

    Args:
        passed: whether each sample is right, `n` bool.
        loss: each sample's loss, `n`, differentiable, to be made small; with PyTorch's losses that is
            `reduction="none"` and a mean over all dimensions but the first.
        margin: how far each sample is from being wrong, `n`, above 0 where it passed and below where not,
            differentiable. None: there is no such number, and only the swarm can repair.

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

    def __init__(self, passed: str | Judge, loss: str | Judge, margin: str | Judge | None = None) -> None:
        given = {"passed": passed, "loss": loss, **({} if margin is None else {"margin": margin})}
        self._functions = {name: import_function(f"Custom.{name}", function) for name, function in given.items()}
        self._names = {name: f if isinstance(f, str) else _address(f) for name, f in given.items()}

    def __repr__(self) -> str:
        return f"Custom({', '.join(f'{name}={address!r}' for name, address in self._names.items())})"

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
        return at_least_float32(self._functions["margin"](output, target)) if "margin" in self._functions else None

    def _check_signs(self, passed: Tensor, margin: Tensor) -> None:
        scale = margin[margin.isfinite()].abs().max() if margin.isfinite().any() else 0.0
        wrong = torch.where(passed, -margin, margin) > MARGIN_ROUNDING * scale
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ConfigurationError(
                f"`Custom.margin` gave {float(margin[row]):.4g} for a sample that "
                f"{'passed' if passed[row] else 'did not pass'} ({int(wrong.sum())} such in a batch).",
                "a margin is above 0 where a sample passed and below 0 where it did not; or leave it out.",
            )


def _address(function: Judge) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}:{name}"
