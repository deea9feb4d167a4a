"""The result of a method: new weights, and their results on known data."""

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
    """New weights, and what they do on known data.

    Attributes:
        name: where they come from, such as `fit`, `polish` or `convex`.
        state: whole tensors; those that are not named stay as they are.
        after: what the deployed model does on known data under them.
        repaired: targeted samples that pass.
        broken: known passed samples that do not pass any more.
        gain: what the repairs are worth, see `SampleResults.weight`; by default `repaired`.
        harm: what the broken samples cost, likewise; infinite if one of them is protected.
        missing: repairs that slices lack of what they need.
        excess: how much more is broken, by `harm`, than the gate allows; by default all of it.
    """

    name: str
    state: State
    after: SampleResults
    repaired: int
    broken: int
    gain: float = math.nan
    harm: float = math.nan
    missing: int = 0
    excess: float = math.nan

    def __post_init__(self) -> None:
        for name, count in (("gain", self.repaired), ("harm", self.broken)):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, float(count))
        if math.isnan(self.excess):
            object.__setattr__(self, "excess", self.harm)

    @property
    def rank(self) -> tuple[float, int, float, float]:
        """The larger the better: within the gate, then fewest repairs that slices lack, most gain, and least harm."""
        return -self.excess, -self.missing, self.gain, -self.harm

    def step(self, seconds: float, note: str = "") -> Step:
        """A line for the report."""
        return Step(self.name, self.repaired, self.broken, round(seconds, 3), note)


@dataclass(frozen=True)
class Solution:
    """The result of a method.

    Attributes:
        proposal: the best it has; None if it has nothing better than the original weights.
        reason: why there is no proposal, in words.
        steps: what it did, in order.
        others: further proposals worth keeping.
        tried: what became of the known samples under other weights, such as those along a path over strength.
        localization: which weights a swarm searched, if one did.
        result: the course of that search.
        n_passed: passed samples that this search scored; None: those of `Problem.passed`.
        held_out: what the method does to known samples when it may not use them; None where that was not tried.
        rungs: of a method that tries several, from the least change to the most.
        choice: why one of them was taken.
        price: what was found where some known samples may break.
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
    """The best proposal by `Proposal.rank`, of equals the earlier; None if there is none."""
    return max((proposal for proposal in proposals if proposal is not None), key=lambda one: one.rank, default=None)
