"""Fitness functions: the paper's equations and a lexicographic ranking.

A fitness maps the scores of S searches with P candidates each to numbers, `S x P`; a larger number
is better. I_neg is the set of failed samples to repair, and I_pos is the set of passed samples that
a search scores. L(I_neg) and L(I_pos) are their mean losses under a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import check_choice, check_real
from lightning_nrl.search.scores import Scores

FitnessFunction = Callable[[Scores, Scores], Tensor]
"""Maps the scores of the candidates, `S x P`, and of the original weights, `S x 1`, to fitnesses,
`S x
P`.

A fitness may declare `uses_passed_loss = False` (it does not read `Scores.loss_passed`) and
`uses_credit = True` (it reads the credits in `Scores`), and it may have the methods `most_broken`
and `as_constraint` of `Fitness`.
"""

FITNESS_KINDS = ("lexicographic", "eq1", "eq2")
LOSS_TERMS = ("bounded", "inverse_ratio", "as_printed")
INFEASIBLE_RANKINGS = ("ranked", "zero")

FEASIBLE_FLOOR = -(2.0**20)
"""Lower limit of feasible and upper limit of infeasible fitnesses in `eq1` and `eq2` with
`infeasible="ranked"`.
"""

SMALLEST_UNCHANGED = 2.0**-10
"""With `infeasible="zero"`, the fitness of a feasible candidate that is below this number is raised
to above 0.
"""


@dataclass(frozen=True)
class Fitness:
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
        >>> from lightning_nrl.search.scores import Scores
        >>> loss = torch.ones(1, 2)
        >>> none, every = torch.tensor([[0.0]]), torch.tensor([[10.0]])
        >>> before = Scores(none, every, loss[:, :1], loss[:, :1], n_failed=4, n_passed=10)
        >>> patched, intact = torch.tensor([[1.0, 4.0]]), torch.tensor([[10.0, 9.0]])
        >>> after = Scores(patched, intact, loss, loss, n_failed=4, n_passed=10)
        >>> Fitness()(after, before)
        tensor([[ 1.2500, -0.7500]], dtype=torch.float64)
        >>> Fitness("eq2", alpha=8)(after, before)
        tensor([[8.2500, 8.2000]], dtype=torch.float64)
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
        for name in ("alpha", "beta"):
            check_real(
                f"fitness.{name}",
                getattr(self, name),
                "weight",
                "give a finite number of at least 0.",
                least=0,
            )
        check_real(
            "fitness.tolerated",
            self.tolerated,
            "number",
            "give a number of samples, at least 0.",
            least=0,
        )
        check_real(
            "fitness.delta", self.delta, "constant", "give a finite number above 0.", above=0
        )

    @property
    def uses_passed_loss(self) -> bool:
        """True if the fitness reads the loss on I_pos. If not, samples that no candidate breaks may
        be skipped.
        """
        return self.kind != "eq2" or (self.perfect_intact and self.infeasible == "ranked")

    def as_constraint(self, tolerated: float) -> Fitness:
        """Returns a copy in which candidates are infeasible if broken samples have a total weight
        above `tolerated`.
        """
        return replace(self, perfect_intact=True, infeasible="ranked", tolerated=tolerated)

    def most_broken(self, value: Tensor, n_failed: int | Tensor) -> Tensor | None:
        """Returns the total sample weight of I_pos, `S x P`, that a candidate above fitness `value`
        can break at most.

        `n_failed` is |I_neg|. Returns None if other terms of the fitness can outweigh any number of
        broken samples.
        """
        any_number = torch.full_like(value, math.inf)
        if self.perfect_intact and self.infeasible == "zero":
            return torch.where(value >= 0, self.tolerated, any_number)
        ranked = self.tolerated + (-value / (n_failed + 1)).ceil().clamp(min=0)
        if self.kind == "lexicographic":
            return ranked
        if not self.perfect_intact:
            return None
        infeasible = ((FEASIBLE_FLOOR - value) / (n_failed + 1)).ceil().clamp(min=0)
        return self.tolerated + torch.where(value >= FEASIBLE_FLOOR, 0.0, infeasible)

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """Returns the fitness of each candidate, `S x P` in float64, or float32 on MPS.

        The lexicographic order of the counts is exact in float64 for up to a million samples in
        I_neg and in I_pos. In float32 it is exact while the number of broken samples times |I_neg|
        + 1 is below 2^22.
        """
        repaired, intact, loss_failed, loss_passed = scores.columns()
        _, _, before_failed, before_passed = original.columns()
        excess = (scores.n_passed - intact - self.tolerated).clamp(min=0)

        def lexicographic() -> Tensor:
            n = scores.n_failed + scores.n_passed
            loss = (scores.n_failed * loss_failed + scores.n_passed * loss_passed) / n
            before = (scores.n_failed * before_failed + scores.n_passed * before_passed) / n
            fall = (before - loss) / (before.abs() + self.delta)
            return (
                repaired
                + scores.least * 0.25 * (1 + F.softsign(fall))
                - excess * (scores.n_failed + 1)
            )

        if self.kind == "lexicographic":
            value = lexicographic()
        else:
            value = repaired / scores.n_failed + self.alpha * (intact / scores.n_passed)
            of_failed = self._loss_term(loss_failed, before_failed)
            if self.kind == "eq1":
                value = value + of_failed + self._loss_term(loss_passed, before_passed)
            else:
                value = value + self.beta * of_failed
        if self.perfect_intact and self.infeasible == "zero":
            value = _positive(value).masked_fill(excess > 0, 0.0)
        elif self.perfect_intact and self.kind != "lexicographic":
            value = torch.where(
                excess > 0, FEASIBLE_FLOOR + lexicographic(), value.clamp(min=FEASIBLE_FLOOR)
            )
        return scores.finite(value)

    def _loss_term(self, after: Tensor, before: Tensor) -> Tensor:
        if self.loss_term == "inverse_ratio":
            return (before + self.delta) / (after + self.delta)
        ratio = (after + self.delta) / (before + self.delta)
        return ratio if self.loss_term == "as_printed" else 1 - ratio


FITNESSES: Registry[FitnessFunction] = Registry(
    "Fitness",
    "Fitness('eq1')",
    callable,
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
    """Returns how many broken samples `eq1` and `eq2` accept for one repaired sample, apart from
    their
    loss terms.

    With `n_failed` failed samples to repair, a repaired sample adds 1/n_failed to the fitness. With
    `n_passed` passed samples that the search scores, a broken sample subtracts alpha/n_passed. The
    result is n_passed / (alpha * n_failed), or infinity if alpha * n_failed is 0. No alpha in the
    paper's range (4 to 8) prevents broken samples, but `perfect_intact` and `lexicographic` do.

    Example:
        >>> exchange_rate(n_failed=20, n_passed=500, alpha=5)
        5.0
    """
    return math.inf if alpha * n_failed == 0 else n_passed / (alpha * n_failed)


def needs_passed_loss(fitness: FitnessFunction) -> bool:
    """True if a fitness reads `Scores.loss_passed`, or if it has no attribute `uses_passed_loss`."""
    return bool(getattr(fitness, "uses_passed_loss", True))


def needs_credit(fitness: FitnessFunction) -> bool:
    """True if a fitness has the attribute `uses_credit = True`, since it reads the credits of
    `Scores`.
    """
    return bool(getattr(fitness, "uses_credit", False))


def fitness_per_search(fitness: Sequence[Fitness], device: torch.device) -> FitnessFunction:
    """Returns one function for all searches, which evaluates search s by `fitness[s]`."""
    rows: dict[Fitness, list[int]] = {}
    for row, one in enumerate(fitness):
        rows.setdefault(one, []).append(row)
    if len(rows) == 1:
        return fitness[0]
    groups = [(one, torch.tensor(own, device=device)) for one, own in rows.items()]

    def grouped(scores: Scores, original: Scores) -> Tensor:
        value = scores.patched.new_empty(scores.patched.shape, dtype=widest(device))
        for one, own in groups:
            value[own] = one(_rows(scores, own), _rows(original, own))
        return value

    return grouped


def _positive(value: Tensor) -> Tensor:
    """Maps x below e = `SMALLEST_UNCHANGED` to e^2 / (2 e - x), which is positive, increasing, and
    smooth at e.
    """
    e = SMALLEST_UNCHANGED
    return torch.where(value < e, e**2 / (2 * e - value), value)


def _rows(scores: Scores, rows: Tensor) -> Scores:
    def pick(x: Any) -> Any:
        return x[rows] if isinstance(x, Tensor) and x.ndim > 0 and len(x) > 1 else x

    return Scores(**{name: pick(value) for name, value in vars(scores).items()})
