"""The result of a method: new weights and their results on known data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_nrl._utils.state import State
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.localization import Localization
from lightning_nrl.report.run_records import PricePoint, Rung, Step
from lightning_nrl.search.search_log import SearchResult


@dataclass(frozen=True)
class Proposal:
    """New weights and their results on known data.

    Attributes:
        name: their origin, such as `fit`, `polish` or `convex`.
        state: whole tensors; tensors not named stay unchanged.
        after: results of the deployed model on known data under these weights.
        repaired: number of targets that pass.
        broken: number of known passed samples that no longer pass.
        value: of the repairs, see `SampleResults.weight`; by default `repaired`.
        cost: of the broken samples; infinite if one is protected; by default `broken`.
        missing: repairs that slices lack.
        excess: `cost` beyond what the gate allows; by default all of it.
    """

    name: str
    state: State
    after: SampleResults
    repaired: int
    broken: int
    value: float = math.nan
    cost: float = math.nan
    missing: int = 0
    excess: float = math.nan

    def __post_init__(self) -> None:
        for name, count in (("value", self.repaired), ("cost", self.broken)):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, float(count))
        if math.isnan(self.excess):
            object.__setattr__(self, "excess", self.cost)

    @property
    def rank(self) -> tuple[float, int, float, float]:
        """Sort key, larger is better: within the gate, fewest missing repairs, most value, least cost."""
        return -self.excess, -self.missing, self.value, -self.cost

    def step(self, seconds: float, note: str = "") -> Step:
        """Returns the step's entry in the report."""
        return Step(self.name, self.repaired, self.broken, round(seconds, 3), note)


@dataclass(frozen=True)
class Solution:
    """The result of a method.

    Attributes:
        proposal: the best weights; None if nothing beats the original ones.
        reason: why there is no proposal.
        steps: the steps taken, in order.
        others: further proposals worth keeping.
        tried: counts of the known samples under other weights, such as those of a path over strengths.
        localization: the weights that a search changed, if there was one.
        result: the log of that search.
        n_passed: number of passed samples it scored; None: those of `Problem.passed`.
        held_out: counts of known samples that the method could not use; None if not tried.
        rungs: of a method that tries several, from the smallest change to the largest.
        choice: why one of the rungs was taken.
        price: the best results if some known samples may break.
    """

    proposal: Proposal | None
    reason: str = ""
    steps: tuple[Step, ...] = ()
    others: tuple[Proposal, ...] = ()
    tried: tuple[TargetCounts, ...] = ()
    localization: Localization | None = None
    result: SearchResult | None = None
    n_passed: int | None = None
    held_out: TargetCounts | None = None
    rungs: tuple[Rung, ...] = ()
    choice: str = ""
    price: tuple[PricePoint, ...] = ()


def better(proposals: Iterable[Proposal | None]) -> Proposal | None:
    """Returns the best proposal by `Proposal.rank`, the first of equals; None if there is none."""
    return max((proposal for proposal in proposals if proposal is not None), key=lambda one: one.rank, default=None)
