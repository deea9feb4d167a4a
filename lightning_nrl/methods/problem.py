"""A method, and the problem that it is given: a model, its results on known data, and what may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, device_of
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.data.sample_identity import Identified, is_among
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.slices import missed_quotas, upweight_slices
from lightning_nrl.gate.gates import Gate, Instance
from lightning_nrl.localization import Localizer
from lightning_nrl.methods.budget import FORWARD_BACKWARD, JUDGING_PASSES, LEAST_EPOCHS, SMALL_BUDGET
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.report.run_records import CUT
from lightning_nrl.search.fitness import FitnessFunction

N_SCORED = 100_000  # known samples that a search looks at, at most, by default
LACKING_SLICE_FACTOR = 4.0  # how much more the targets of a slice count while it lacks repairs


@dataclass(frozen=True)
class Trained:
    """All parameters and persistent buffers after training, and its length in epochs of the known data."""

    state: State
    epochs: float
    planned: float

    @property
    def note(self) -> str:
        """For a line of the report."""
        whole = f"{self.epochs:,.4g} epoch{'s' * (self.epochs != 1)}"
        return whole if self.epochs >= self.planned else f"{whole} of {self.planned:,.4g}, {CUT}"


Renew = Callable[[State], Tensor | None]
"""Returns how often each sample is visited from now on, `N`, by the weights so far; None ends the training."""


class Training(Protocol):
    """Goes on with the training of the model, the known failures added to the training data.

    One that treats targets differently has `for_targets(targeted)`, which returns the same training told which samples
    are targets, `N` bool by row of the results.
    """

    @property
    def epochs(self) -> int:
        """Epochs that the model was trained for."""
        ...

    def __call__(
        self,
        *,
        seconds: float,
        seed: int,
        clock: StageTimer,
        start: State | None = None,
        weight: Tensor | None = None,
        epochs: int | None = None,
        rate: float | None = None,
        renew: Renew | None = None,
    ) -> Trained | None:
        """Trains a copy; returns its weights on the model's device, None without time, or if `renew` ends it.

        Args:
            seconds: how long that may take; infinite: as long as the epochs take.
            seed: of the order of the samples and of all else that is random.
            clock: is notified of progress.
            start: weights to begin with, such as fresh ones; None: the model's own.
            weight: `N` by row of the results, how often a sample is visited, beside others; None: all alike. An epoch
                has as many visits as there are known samples.
            epochs: over all known data; None: as many as the model was trained for.
            rate: of AdamW through the module's `training_step`; None: the module's own optimizers and schedules.
            renew: is called halfway.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """A model, what is known of it, and what may be changed to repair it.

    Attributes:
        evaluator: the original model, in evaluation mode on its device, its task, and the ranks that share the data.
            Nothing may write to the model; all ranks run the same method in step.
        known: all data that a method may use, this rank's share of it.
        before: the model's results on known data. `before.targeted` have to be repaired (I_neg), `before.passed` to be
            kept.
        space: the layers whose weights are localised and searched.
        scope: names of the parameters that may be changed at all; `space` is inside.
        localizer: how weights to be searched are chosen.
        fitness: how candidates of a swarm are ranked.
        passed: `N` bool, the passed samples that a swarm scores (I_pos): all, or #pos of them.
        clock: what stages took, and what is left of the time.
        seed: of everything random.
        budget: bytes that the search may use on the device; None takes a share of what is free.
        n_scored: known samples that a search looks at, at most; what it finds is counted on all.
        training: goes on with the training; None where it is not known how the model was trained.
        whole: whether the scope is the whole network, so that training may go on.
        update: whether the model replaces another one that gets the targets right: they are regressions of it.
        needed: targets of a slice that have to be repaired at least, by the name of the slice.
        gate: how many known passed samples may break; by default none.
        held_out: `N` bool, known samples that no method may use, to try out what it does to others; in `before` they
            are neither passed nor targeted.
        unmasked: with samples held out, what the model does on all known data.
        work: saves the results of finished steps.
    """

    evaluator: Evaluator
    known: Sequence[Source]
    before: SampleResults
    space: ParameterSpace
    scope: tuple[str, ...]
    localizer: Localizer
    fitness: FitnessFunction
    passed: Tensor
    clock: StageTimer = field(default_factory=StageTimer)
    seed: int = 0
    budget: int | None = None
    n_scored: int = N_SCORED
    training: Training | None = None
    whole: bool = True
    update: bool = False
    needed: Mapping[str, int] = field(default_factory=dict)
    gate: Gate = field(default_factory=Instance)
    held_out: Tensor | None = None
    unmasked: SampleResults | None = None
    work: ResumeStore = field(default_factory=ResumeStore)

    @property
    def model(self) -> nn.Module:
        """The original model."""
        return self.evaluator.model

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return device_of(self.model)

    @property
    def collective(self) -> Collective:
        """The ranks that share the data."""
        return self.evaluator.collective

    @property
    def used(self) -> Tensor:
        """`N` bool, the known samples that a method may use: all that are not held out."""
        return torch.ones_like(self.before.passed) if self.held_out is None else ~self.held_out

    @property
    def epochs(self) -> int:
        """Epochs over all known data that training may take: those of the fit, more where that is seconds' work."""
        least = min(LEAST_EPOCHS, SMALL_BUDGET // max(1, len(self.before)))
        return max(1 if self.training is None else self.training.epochs, least)

    @property
    def visits(self) -> float:
        """The budget of a training: a sample run forward is one visit, a training step on it `FORWARD_BACKWARD`."""
        return FORWARD_BACKWARD * self.epochs * len(self.before)

    @property
    def deadline(self) -> Deadline:
        """When the repair must be over, agreed upon over ranks."""
        return self.clock.deadline(self.collective)

    def deadline_of_method(self, share: float = 1.0) -> Deadline:
        """When a method must be over that takes a share of the time that is left; its result is judged after it."""
        return self.deadline.within(share * self.clock.left).earlier(JUDGING_PASSES * self.clock.one_pass)

    def evaluate(self, state: State) -> SampleResults:
        """Runs the deployed model on all known data under a state: one forward pass."""
        return self.evaluator.run_with(state, self.known).sharing(self.before)

    def propose(self, name: str, state: State) -> Proposal:
        """A state as a proposal, counted on all known data."""
        return self.counted(name, state, self.evaluate(state))

    def counted(self, name: str, state: State, after: SampleResults) -> Proposal:
        """A state as a proposal, with results that are there already."""
        before, flips = self.before, Flips.between(self.before, after)
        repaired, broken = flips.repaired & before.targeted, flips.broken
        missing = sum(need - got for got, need in missed_quotas(before, repaired, self.needed).values())
        worth = before.value(repaired), before.cost(broken), missing, self.excess(after, broken)
        return Proposal(name, state, after, int(repaired.sum()), int(broken.sum()), *worth)

    def original(self, name: str) -> Proposal:
        """The original weights as a proposal; nothing is run for it."""
        return self.counted(name, {}, self.before if self.unmasked is None else self.unmasked)

    def target_counts(self, after: SampleResults) -> TargetCounts:
        """Counts the known samples that a method may use."""
        return Flips.between(self.before, after).target_counts(self.before, self.used)

    def without(self, held_out: Tensor) -> Problem:
        """Returns the problem without some samples, `N` bool, and without their copies in another split."""
        held_out = held_out | (self.copies(held_out) & ~self.before.protected)
        before = replace(self.before, passed=self.before.passed & ~held_out, targeted=self.before.targeted & ~held_out)
        unmasked = self.before if self.unmasked is None else self.unmasked
        passed = self.passed & ~held_out
        return replace(self, before=before, passed=passed, needed={}, held_out=held_out, unmasked=unmasked)

    @property
    def came_with_failures(self) -> Tensor:
        """`N` bool, the samples that came in with the failed ones: the model was not trained on them."""
        came = torch.zeros_like(self.before.passed)
        for source in self.known:
            if source.failed:
                came[self.before.of(source.split)] = True
        return came

    def copies(self, rows: Tensor) -> Tensor:
        """`N` bool, these rows and all that are the same place of the same data set, where sources know that."""
        identities = [source.identity for source in self.known if isinstance(source, Identified)]
        if len(identities) < max(2, len(self.known)):
            return rows
        samples = torch.cat(identities)
        return rows | is_among(samples, samples[rows])

    def excess(self, after: SampleResults, broken: Tensor) -> float:
        """How much more harm broken samples, `N` bool, are than the gate allows with these results."""
        counts = Flips.between(self.before, after).counts(self.used)
        return self.gate.excess_of(counts, self.gate.cost(self.before, broken))

    def steered(self, after: SampleResults) -> Problem:
        """Returns the problem where targets of slices that lack repairs count `LACKING_SLICE_FACTOR` times as much.

        `after` are results on known data under the weights from which the search goes on.
        """
        names = missed_quotas(self.before, self.before.targeted & after.passed, self.needed)
        return replace(self, before=upweight_slices(self.before, names, LACKING_SLICE_FACTOR)) if names else self


@runtime_checkable
class Method(Protocol):
    """How new weights are found. A method of your own is a frozen dataclass with this call.

    It may have more, which is used before the first step of training and has a default:

    - `trains = True`: it goes on with the training where it can; it is checked that this will be possible.
    - `needs`, of `Need` in `lightning_nrl.evaluation.evaluator`: what it needs of the task and the data.
    - `check(model)`, `check_recording(recording)`: refuse what does not suit it by a `ConfigurationError`.
    - `fitness`, `localizer`: how candidates are ranked and weights chosen, unless the user says so; a method that has
      them even where the user does takes the user's by `with_parts(**parts)`.
    - `wants_checkpoints`, `with_checkpoints(paths)`: it looks at earlier models and is given those of the Trainer.
    """

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights; the model is left as found.

        If there are no weights to choose, it is an `EmptyLocalizationError`; if the method does not suit the model or
        the task, a `ConfigurationError`.
        """
        ...
