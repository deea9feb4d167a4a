"""One step of a repair by linearized margins: what gradients predict, corrected by what was measured.

With the gradients of some samples' margins at the present weights, in coordinates x that measure a change by what it
does to passed data, sought is

    min over x    1/2 |x|^2 + price * (missing of targets + PASSED_PRICE_FACTOR * missing of passed),

where `missing` is what a margin lacks after the step, to first order. The solution is a sum of gradients, so that only
their inner products count (see `qp`). A margin that came out other than predicted is required for the difference as
well: the same gradients then serve a second time (second-order correction, as in sequential quadratic programming).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl._convex.qp import solve_dual
from lightning_nrl._utils.precision import widest

__all__ = ["LinearizedMargins", "TrustRadius"]

PASSED_PRICE_FACTOR = 1e3
"""A passed sample's missing margin costs so many times a target's. Not infinite: what is broken for the moment, and
what gradients contradict, must not leave the programme without a solution."""

RADIUS_GROWTH, RADIUS_SHRINKAGE = 2.0, 0.25
"""How the radius follows a step that broke nothing at once, and one that broke something however short."""


@dataclass(frozen=True)
class LinearizedMargins:
    """Margins of some samples, to first order.

    Attributes:
        gradients: `m x K`, their gradients.
        margin: `m`, at the present weights.
        required: `m`, what each is to have.
        targeted: `m` bool, samples to be repaired; the others are to be kept.
        weight: `m`, what the missing margin of a target costs more than that of another; None: all alike.
    """

    gradients: Tensor
    margin: Tensor
    required: Tensor
    targeted: Tensor
    weight: Tensor | None = None

    @cached_property
    def gram(self) -> Tensor:
        """`m x m`, inner products of the gradients."""
        return (self.gradients @ self.gradients.T).to(widest(self.gradients.device))

    def price(self) -> float:
        """What the median target would take for its missing margin were it the only one; 0 if nothing can help any."""
        length, missing = self.gram.diagonal(), (self.required - self.margin).to(self.gram)
        some = self.targeted & (missing > 0) & (length > 0)
        return float((missing[some] / length[some]).median()) if some.any() else 0.0

    def predicted(self, step: Tensor) -> Tensor:
        """`m`, the margins after a step of `K`."""
        return self.margin + self.gradients @ step

    def step(self, price: float, error: Tensor | None = None, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solves.

        Args:
            price: of a target's missing margin.
            error: `m`, by how much margins came out above what was predicted; None: not at all.
            start: `m`, multipliers of a similar programme.

        Returns:
            The step, `K`, and its multipliers, `m`.
        """
        missing = self.required - self.margin if error is None else self.required - self.margin - error
        own = price if self.weight is None else price * self.weight
        limit = torch.where(self.targeted, own, PASSED_PRICE_FACTOR * price).to(self.gram)
        values = solve_dual(self.gram, missing.to(self.gram), limit, start).values
        return self.gradients.T @ values.to(self.gradients), values


@dataclass
class TrustRadius:
    """The trust region: how long a step may be for its gradients to be trusted; at first any length."""

    value: float = torch.inf

    def within(self, step: Tensor) -> Tensor:
        """The step, shortened if it is too long."""
        length = float(step.norm())
        return step * (self.value / length) if length > self.value else step

    def grow(self, step: Tensor) -> None:
        """After a step that broke nothing at once."""
        self.value = max(self.value, RADIUS_GROWTH * float(step.norm()))

    def limit_to(self, step: Tensor) -> None:
        """After a step that is as long as could be without breaking anything."""
        self.value = float(step.norm())

    def shrink(self, step: Tensor) -> None:
        """After a step that broke something in all of its lengths."""
        self.value = RADIUS_SHRINKAGE * float(step.norm())
