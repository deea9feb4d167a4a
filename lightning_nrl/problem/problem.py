"""What a method is given and what it gives: a problem in, a solution out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.precision import Context
from lightning_nrl._utils.state import State, holding
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.evaluator import SampleResults, collect
from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.quotas import below, raised
from lightning_nrl.localization import Localization, Localizer
from lightning_nrl.report.stages import Step
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.search.search_result import SearchResult
from lightning_nrl.tasks import Task

__all__ = ["Method", "Problem", "Proposal", "Solution", "Training", "better"]


STEER = 4.0
"""How much more the targets of a slice count while it lacks repairs."""


class Training(Protocol):
    """Goes on with the training of the model, the known failures added to the training data."""

    def __call__(
        self,
        *,
        seconds: float,
        seed: int,
        clock: StageTimer,
        start: State | None = None,
        weight: Tensor | None = None,
    ) -> State | None:
        """Trains a copy; the model stays as it is.

        Args:
            seconds: how long that may take; infinite: as many epochs as the model was trained for.
            seed: of the order of the samples and of all else that is random.
            clock: is told how it goes.
            start: weights to begin with, such as fresh ones; None: the model's own.
            weight: `N` by row of the evidence, how often a sample is trained on in an epoch, on average; None: once.

        Returns:
            Every parameter and persistent buffer after training, on the model's device; None if the time is too short
            for a training worth its name.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """A model, what is known of it, and what may be changed to repair it.

    Attributes:
        model: the original model, in evaluation mode on its device. Nothing may write to it.
        known: all data that a method may look at, this rank's share of it.
        before: what the model does on known data. `before.targeted` are to be repaired (I_neg); every one of
            `before.passed` is to be kept.
        space: the layers whose weights are localised and searched.
        scope: names of the parameters that may be changed at all; `space` is inside.
        task: what passed, loss and margin mean.
        localizer: how weights to be searched are chosen.
        fitness: how candidates of a swarm are ranked.
        passed: `N` bool, the passed samples that a swarm scores (I_pos): all, or #pos of them.
        clock: what stages took, and what is left of the time.
        seed: of everything random.
        budget: bytes that the search may use on the device; None takes a share of what is free.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the data; all of them run the same method in step.
        training: goes on with the training; None where it is not known how the model was trained.
        whole: whether the scope is the whole network, so that training may go on.
        update: whether the model replaces another one that gets the targets right: they are regressions of it.
        needed: how many targets of a slice are to be repaired at least, by the name of the slice.
    """

    model: nn.Module
    known: Sequence[Source]
    before: SampleResults
    space: ParameterSpace
    scope: tuple[str, ...]
    task: Task
    localizer: Localizer
    fitness: Fitness
    passed: Tensor
    clock: StageTimer = field(default_factory=StageTimer)
    seed: int = 0
    budget: int | None = None
    context: Context = nullcontext
    collective: Collective = field(default_factory=Collective)
    training: Training | None = None
    whole: bool = True
    update: bool = False
    needed: Mapping[str, int] = field(default_factory=dict)

    def see(self, state: State) -> SampleResults:
        """What the deployed model does on all known data under a state: one forward pass over them."""
        with holding(self.model, state):
            return collect(self.model, self.known, task=self.task, context=self.context, collective=self.collective)

    def propose(self, name: str, state: State) -> Proposal:
        """A state as a proposal, counted on all known data."""
        return self.counted(name, state, self.see(state))

    def counted(self, name: str, state: State, after: SampleResults) -> Proposal:
        """A state as a proposal, with what was seen of it."""
        flips = Flips.between(self.before, after)
        before, repaired = self.before, flips.repaired & self.before.targeted
        missing = sum(need - got for got, need in below(before, repaired, self.needed).values())
        return Proposal(
            name,
            state,
            after,
            int(repaired.sum()),
            int(flips.broken.sum()),
            before.gain(repaired),
            before.harm(flips.broken),
            missing,
        )

    def steered(self, after: SampleResults) -> Problem:
        """The same problem, where the targets of slices that lack repairs count `STEER` times as much.

        Args:
            after: what the model does on known data under the weights from which the search goes on.
        """
        repaired = self.before.targeted & after.passed
        names = below(self.before, repaired, self.needed)
        if not names:
            return self
        return replace(self, before=raised(self.before, names, STEER))


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


@runtime_checkable
class Method(Protocol):
    """How new weights are found. A method of your own is a frozen dataclass with this call.

    With an attribute `trains = True` it says that it goes on with the training where it can: then it is checked before
    the first step of training whether that will be possible. With `needs`, of `Need` in
    `lightning_nrl.evaluation.requirements`, it says what it needs of the task, which is checked then, too.
    """

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights. The model is left as found.

        Raises:
            EmptyLocalizationError: no weight can be chosen; the repair then ends as `not repaired`.
            ConfigurationError: the method does not suit the model or the task.
        """
        ...


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
