"""What a method gives: new weights, and what they do on known data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_nrl._utils.state import State
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization import Localization
from lightning_nrl.report.run_records import Step
from lightning_nrl.search.search_log import SearchResult

__all__ = ["Proposal", "Solution", "better"]


@dataclass(frozen=True)
class Proposal:
    """New weights, and what they do on known data.

    Attributes:
        name: where they come from, such as `fit`, `polish` or `convex`.
        state: whole tensors; those that are not named stay as they are.
        after: what the deployed model does on known data under them.
        repaired: targeted samples that pass.
        broken: known passed samples that do not pass any more.
        gain: what the repairs are worth, see `SampleResults.weight`; as many as they are unless something else is said.
        harm: what the broken samples cost, likewise; infinite if one of them is protected.
        missing: repairs that slices lack of what they need.
    """

    name: str
    state: State
    after: SampleResults
    repaired: int
    broken: int
    gain: float = math.nan
    harm: float = math.nan
    missing: int = 0

    def __post_init__(self) -> None:
        for name, count in (("gain", self.repaired), ("harm", self.broken)):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, float(count))

    @property
    def rank(self) -> tuple[float, int, float]:
        """The larger the better: least harm, then the fewest repairs that slices lack, then most gain."""
        return -self.harm, -self.missing, self.gain

    def step(self, seconds: float, note: str = "") -> Step:
        """A line for the report."""
        return Step(self.name, self.repaired, self.broken, round(seconds, 3), note)


@dataclass(frozen=True)
class Solution:
    """What a method found.

    Attributes:
        proposal: the best it has; None if it has nothing better than the original weights.
        reason: why there is no proposal, in words.
        steps: what it did, in order.
        others: further proposals worth keeping, such as those along a path over strength.
        localization: which weights a swarm searched, if one did.
        result: the course of that search.
        n_passed: how many passed samples that search scored; None: those of `Problem.passed`.
    """

    proposal: Proposal | None
    reason: str = ""
    steps: tuple[Step, ...] = ()
    others: tuple[Proposal, ...] = ()
    localization: Localization | None = None
    result: SearchResult | None = None
    n_passed: int | None = None


def better(proposals: Iterable[Proposal | None]) -> Proposal | None:
    """The best proposal, of equals the earlier; None if there is none.

    Fewest known broken, then most targets repaired, each counted by its weight; between these, of slices that need a
    number of repairs, the fewest that are missing.
    """
    best: Proposal | None = None
    for proposal in proposals:
        if proposal is not None and (best is None or proposal.rank > best.rank):
            best = proposal
    return best
