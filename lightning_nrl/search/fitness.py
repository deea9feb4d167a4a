"""Fitness functions: the paper's equations and a lexicographic ranking.

A fitness maps the scores of P candidates to numbers, `P`; a larger number is better. I_neg is the
set of failed samples to repair, and I_pos is the set of passed samples that a search scores.
L(I_neg) and L(I_pos) are their mean losses under a candidate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import check_choice, check_real
from lightning_nrl.search.scores import Columns, Scores


class FitnessFunction(ABC):
    """Base class of fitnesses. A subclass defines `__call__`."""

    @property
    def uses_passed_loss(self) -> bool:
        """True if the fitness reads `Scores.loss_passed`.

        If False, samples of I_pos that no candidate breaks may be skipped.
        """
        return True

    def credit(self, passed: Tensor, loss: Tensor) -> Tensor | None:
        """Returns what each sample adds to the credits in `Scores`, `P x n`.

        By default None: the fitness reads no credits. A fitness with credits uses losses on I_pos.
        """
        return None

    @abstractmethod
    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """Returns the fitness of each candidate, `P`; `original` is of the original weights."""

    def most_broken(self, value: Tensor, n_failed: int) -> Tensor | None:
        """Returns the total sample weight of I_pos, `P`, that a candidate can break at most.

        The candidate has a fitness above `value`, and `n_failed` is |I_neg|. None means that other
        terms of the fitness can outweigh any number of broken samples.
        """
        return None

    def as_constraint(self, tolerated: float) -> FitnessFunction:
        """Returns a fitness in which candidates that break a weight above `tolerated` lose.

        By default, a fitness has no such form and stays as it is.
        """
        return self


FITNESS_KINDS = ("lexicographic", "eq1", "eq2")
LOSS_TERMS = ("bounded", "inverse_ratio", "as_printed")
INFEASIBLE_RANKINGS = ("ranked", "zero")

# In `eq1` and `eq2` with `infeasible="ranked"`, feasible fitnesses are above, infeasible below it.
FEASIBLE_FLOOR = -(2.0**20)

# With `infeasible="zero"`, a feasible fitness below this number is raised to above 0.
SMALLEST_UNCHANGED = 2.0**-10


@dataclass(frozen=True)
class Fitness(FitnessFunction):
    r"""Fitness from the paper's equations or the lexicographic ranking.

    :math:`N_{patched}` of the failed samples :math:`I_{neg}` are repaired, and :math:`N_{intact}`
    of the passed samples :math:`I_{pos}` are kept. `loss_term` explains the loss terms :math:`l`.
    The kinds are

    - `lexicographic`: ranks by fewest broken samples, then most repaired samples, then lowest mean
      loss over I_neg and I_pos. If no sample of I_pos is broken, the fitness is N_patched plus a
      number from 0 to 1/2, which is larger for a lower loss and 1/4 for an unchanged loss. If a
      sample is broken, the fitness is negative.
    - `eq1`: :math:`N_{patched}/|I_{neg}| + \alpha N_{intact}/|I_{pos}| + l(I_{neg}) + l(I_{pos})`,
      the paper's eq. (1).
    - `eq2`: :math:`N_{patched}/|I_{neg}| + \alpha N_{intact}/|I_{pos}| + \beta l(I_{neg})`, the
      paper's eq. (2).

    With sample weights (`Scores.value`, `Scores.cost`), the counts and the loss on I_neg are
    weighted. The number from 0 to 1/2 in `lexicographic` is then multiplied by the smallest sample
    weight in I_neg, so that no loss outweighs a repaired sample. The fitness is minus infinity if a
    loss is NaN or infinite.

    Attributes:
        kind: `lexicographic`, `eq1` or `eq2`.
        alpha: factor of N_intact / |I_pos| in `eq1` and `eq2`, at least 0; see `exchange_rate`.
        beta: factor of the loss term in `eq2`, at least 0.
        delta: small constant in the loss terms, above 0.
        loss_term: reading of the paper's loss ratio in `eq1` and `eq2`, with the loss L under the
            original weights, the loss L' under the candidate, and d = `delta`. `bounded` is 1 -
            (L'+d)/(L+d), at most 1. `inverse_ratio` is (L+d)/(L'+d); it has no upper limit, so that
            one loss near 0 outweighs every count. `as_printed` is (L'+d)/(L+d), which grows with
            the loss.
        perfect_intact: the paper's pi: if True, a candidate that breaks a sample of I_pos is
            infeasible.
        infeasible: fitness of infeasible candidates. `ranked` ranks them in lexicographic order
            below all feasible candidates. `zero` gives them the paper's 0 and raises the fitness of
            feasible candidates above 0.
        tolerated: the gate's tolerance, at least 0: samples of I_pos up to this total weight may
            break without any effect on the lexicographic order and on feasibility.

    Example:
        >>> from lightning_nrl.search.scores import Columns, Scores
        >>> loss, nothing, everything = torch.ones(2), torch.tensor([0.0]), torch.tensor([10.0])
        >>> before = Scores(nothing, everything, loss[:1], loss[:1], n_failed=4, n_passed=10)
        >>> patched, intact = torch.tensor([1.0, 4.0]), torch.tensor([10.0, 9.0])
        >>> after = Scores(patched, intact, loss, loss, n_failed=4, n_passed=10)
        >>> Fitness()(after, before)
        tensor([ 1.2500, -0.7500], dtype=torch.float64)
        >>> Fitness("eq2", alpha=8)(after, before)
        tensor([8.2500, 8.2000], dtype=torch.float64)
    """

    kind: Literal["lexicographic", "eq1", "eq2"] = "lexicographic"
    alpha: float = 6.0
    beta: float = 0.25
    delta: float = 1e-3
    loss_term: Literal["bounded", "inverse_ratio", "as_printed"] = "bounded"
    perfect_intact: bool = False
    infeasible: Literal["ranked", "zero"] = "ranked"
    tolerated: float = 0.0

    def __post_init__(self) -> None:
        check_choice("fitness.kind", self.kind, FITNESS_KINDS)
        check_choice("fitness.loss_term", self.loss_term, LOSS_TERMS)
        check_choice("fitness.infeasible", self.infeasible, INFEASIBLE_RANKINGS)
        for name, factor in (("alpha", self.alpha), ("beta", self.beta)):
            hint = "give a finite number of at least 0."
            check_real(f"fitness.{name}", factor, "weight", hint, least=0)
        hint = "give a number of samples, at least 0."
        check_real("fitness.tolerated", self.tolerated, "number", hint, least=0)
        hint = "give a finite number above 0."
        check_real("fitness.delta", self.delta, "constant", hint, above=0)

    @property
    def uses_passed_loss(self) -> bool:
        return self.kind != "eq2" or (self.perfect_intact and self.infeasible == "ranked")

    def as_constraint(self, tolerated: float) -> Fitness:
        return replace(self, perfect_intact=True, infeasible="ranked", tolerated=tolerated)

    def most_broken(self, value: Tensor, n_failed: int) -> Tensor | None:
        if self.perfect_intact and self.infeasible == "zero":
            return torch.where(value >= 0, self.tolerated, torch.full_like(value, math.inf))
        ranked = self.tolerated + (-value / (n_failed + 1)).ceil().clamp(min=0)
        if self.kind == "lexicographic":
            return ranked
        if not self.perfect_intact:
            return None
        infeasible = ((FEASIBLE_FLOOR - value) / (n_failed + 1)).ceil().clamp(min=0)
        return self.tolerated + torch.where(value >= FEASIBLE_FLOOR, 0.0, infeasible)

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """Returns the fitness of each candidate, `P` in float64, or float32 on MPS.

        The lexicographic order of the counts is exact in float64 for up to a million samples in
        I_neg and in I_pos. In float32 it is exact while the number of broken samples times |I_neg|
        + 1 is below 2^22.
        """
        after, before = scores.columns(), original.columns()
        excess = (scores.n_passed - after.kept - self.tolerated).clamp(min=0)
        if self.kind == "lexicographic":
            value = self._lexicographic(scores, after, before, excess)
        else:
            value = self._equation(scores, after, before)
        if self.perfect_intact and self.infeasible == "zero":
            value = _positive(value).masked_fill(excess > 0, 0.0)
        elif self.perfect_intact and self.kind != "lexicographic":
            ranked = FEASIBLE_FLOOR + self._lexicographic(scores, after, before, excess)
            value = torch.where(excess > 0, ranked, value.clamp(min=FEASIBLE_FLOOR))
        return scores.finite(value)

    def _lexicographic(
        self, scores: Scores, after: Columns, before: Columns, excess: Tensor
    ) -> Tensor:
        loss, loss_before = _mean_loss(scores, after), _mean_loss(scores, before)
        fall = (loss_before - loss) / (loss_before.abs() + self.delta)
        bonus = scores.least * 0.25 * (1 + F.softsign(fall))
        return after.repaired + bonus - excess * (scores.n_failed + 1)

    def _equation(self, scores: Scores, after: Columns, before: Columns) -> Tensor:
        value = after.repaired / scores.n_failed + self.alpha * (after.kept / scores.n_passed)
        term = self._loss_term(after.loss_failed, before.loss_failed)
        if self.kind == "eq2":
            return value + self.beta * term
        return value + term + self._loss_term(after.loss_passed, before.loss_passed)

    def _loss_term(self, after: Tensor, before: Tensor) -> Tensor:
        if self.loss_term == "inverse_ratio":
            return (before + self.delta) / (after + self.delta)
        ratio = (after + self.delta) / (before + self.delta)
        return ratio if self.loss_term == "as_printed" else 1 - ratio


def _mean_loss(scores: Scores, columns: Columns) -> Tensor:
    """Returns the mean loss over I_neg and I_pos, `P`."""
    total = scores.n_failed * columns.loss_failed + scores.n_passed * columns.loss_passed
    return total / (scores.n_failed + scores.n_passed)


def _positive(value: Tensor) -> Tensor:
    """Raises x below e = `SMALLEST_UNCHANGED` to e^2 / (2 e - x), which is positive and smooth."""
    e = SMALLEST_UNCHANGED
    return torch.where(value < e, e**2 / (2 * e - value), value)


FITNESSES: Registry[FitnessFunction] = Registry(
    "Fitness",
    "Fitness('eq1')",
    lambda value: isinstance(value, FitnessFunction),
    on_demand={
        "arachne": "lightning_nrl.published:ArachneFitness",
        "neurecover": "lightning_nrl.published:NeuRecoverFitness",
        "arachne-de": "lightning_nrl.published:ArachneDEFitness",
    },
    group="fitnesses",
)
"""Fitnesses by name. Wherever a name is accepted, any `FitnessFunction` is accepted too."""

for _kind in FITNESS_KINDS:
    FITNESSES.register(_kind)(partial(Fitness, _kind))  # type: ignore[arg-type]


def exchange_rate(n_failed: int, n_passed: int, alpha: float) -> float:
    """Returns how many broken samples `eq1` and `eq2` accept for one repaired sample.

    This ignores their loss terms. With `n_failed` failed samples to repair, a repaired sample adds
    1/n_failed to the fitness. With `n_passed` passed samples that the search scores, a broken
    sample subtracts alpha/n_passed. The result is n_passed / (alpha * n_failed), or infinity if
    alpha * n_failed is 0. No alpha in the paper's range (4 to 8) prevents broken samples, but
    `perfect_intact` and `lexicographic` do.

    Example:
        >>> exchange_rate(n_failed=20, n_passed=500, alpha=5)
        5.0
    """
    return math.inf if alpha * n_failed == 0 else n_passed / (alpha * n_failed)
