"""`Solution`, the result of a method, and `Proposal`, new weights with their results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_nrl._utils.state import State
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.localization import Localization
from lightning_nrl.methods.lora import LoraAdapter
from lightning_nrl.records import CautionPoint, PricePoint, Rung, Step
from lightning_nrl.search import SearchResult


@dataclass(frozen=True)
class Proposal:
    """New weights and their results on known data.

    Attributes:
        name: the step that found the weights, such as `fit`, `polish` or `convex`.
        state: new values of whole tensors by name. All other tensors of the model stay unchanged.
        after: results of the deployed model with the new weights on known data.
        repaired: number of targets that pass.
        broken: number of known passed samples that no longer pass.
        value: total sample weight of the repaired targets (`SampleResults.weight`); by default
            `repaired`.
        cost: total sample weight of the broken samples, infinite if a protected sample breaks; by
            default `broken`.
        missing: number of repairs that slices still need to meet their quotas.
        excess: how far the cost of the broken samples exceeds the gate's limit; by default `cost`.
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
        if math.isnan(self.value):
            object.__setattr__(self, "value", float(self.repaired))
        if math.isnan(self.cost):
            object.__setattr__(self, "cost", float(self.broken))
        if math.isnan(self.excess):
            object.__setattr__(self, "excess", self.cost)

    @property
    def rank(self) -> tuple[float, int, float, float]:
        """Sort key, larger is better: least excess, missing repairs, most value, least cost."""
        return -self.excess, -self.missing, self.value, -self.cost

    def step(self, seconds: float, note: str = "", *, was_cut: bool = False) -> Step:
        return Step(self.name, self.repaired, self.broken, round(seconds, 3), note, was_cut)


@dataclass(frozen=True)
class Solution:
    """The result of a method.

    Attributes:
        proposal: the best weights; None if no weights are better than the original ones.
        reason: why the method found no better weights; empty if it found some.
        steps: the steps taken, in order.
        tried: counts of the known samples under weights that are not kept. `Auto` uses them in
            `price`.
        localization: the weights that a search could change; None if there was no search.
        search: the log of the search; None if there was no search.
        held_out: flip counts of known samples that the method could not use; None if they were not
            counted.
        n_choices: number of results among which held-out samples chose.
        rungs: report of each rung of `Auto`, from the smallest change to the largest; empty for
            other methods.
        choice: why `Auto` took one of the rungs, or why it ran only a search.
        price: for several shares of known passed samples, the best counts of `Auto` in which at
            most this share breaks.
        caution: held-out counts of a training for several values of `FineTunePolish.caution`.
        adapter: low-rank adapters that make the change of the proposal; None if it has any rank.
    """

    proposal: Proposal | None
    reason: str = ""
    steps: Sequence[Step] = ()
    tried: Sequence[TargetCounts] = ()
    localization: Localization | None = None
    search: SearchResult | None = None
    held_out: TargetCounts | None = None
    n_choices: int = 1
    rungs: tuple[Rung, ...] = ()
    choice: str = ""
    price: tuple[PricePoint, ...] = ()
    caution: tuple[CautionPoint, ...] = ()
    adapter: LoraAdapter | None = None


def better(proposals: Iterable[Proposal | None]) -> Proposal | None:
    """Returns the proposal with the best `rank`, on a tie the first. None if there is none."""
    candidates = [proposal for proposal in proposals if proposal is not None]
    return max(candidates, key=lambda proposal: proposal.rank, default=None)
