"""`Method`, and the `Problem` it gets: a model, its results on known data, and what may change."""

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

N_SCORED = 100_000  # default limit of the known samples that a search uses
LACKING_SLICE_FACTOR = 4.0  # how much more the targets of a slice count while it lacks repairs


@dataclass(frozen=True)
class Trained:
    """All parameters and persistent buffers after training, with its length and planned length in epochs."""

    state: State
    epochs: float
    planned: float

    @property
    def note(self) -> str:
        """Note for the report."""
        whole = f"{self.epochs:,.4g} epoch{'s' * (self.epochs != 1)}"
        return whole if self.epochs >= self.planned else f"{whole} of {self.planned:,.4g}, {CUT}"


Renew = Callable[[State], Tensor | None]
"""Returns from the present weights how often to visit each sample from now on, `N`; None stops the training."""


class Training(Protocol):
    """Continues training a model with the known failures added to its data.

    A training that treats targets differently has `for_targets(targeted)`, which returns a copy that knows the targets,
    `N` bool by row of the results.
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
        """Trains a copy; returns its weights on the model's device, or None without time or if `renew` stops it.

        Args:
            seconds: time limit; may be infinite.
            seed: of the sample order and all other randomness.
            clock: is notified of progress.
            start: initial weights; None: the model's own.
            weight: `N` by row of the results, how often to visit each sample relative to others; None: all alike. An
                epoch has as many visits as there are known samples.
            epochs: over all known data; None: as many as the model was trained for.
            rate: of AdamW through the module's `training_step`; None: the module's own optimizers and schedules.
            renew: is called halfway.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """A model, its results on known data, and what may change to repair it.

    Attributes:
        evaluator: the original model, in evaluation mode on its device, its task, and the ranks that share the data.
            Methods must not write to the model; all ranks run the same method in step.
        known: this rank's share of the data that a method may use.
        before: the model's results on known data: `before.targeted` to repair (I_neg), `before.passed` to keep.
        space: the layers whose weights are localised and searched.
        scope: names of the parameters that may change; includes those of `space`.
        localizer: chooses the weights to search.
        fitness: ranks the candidates of a search.
        passed: `N` bool, the passed samples that a swarm scores (I_pos): all, or #pos of them.
        clock: times the stages and knows the time left.
        seed: of all randomness.
        budget: bytes for the search on the device; None: a share of what is free.
        n_scored: maximum number of known samples that a search uses; its result is evaluated on all.
        training: continues the training; None if unknown.
        whole: True if the whole network may change, so that training may continue.
        update: True if the model replaces another one that gets the targets right.
        needed: minimum number of repaired targets by slice.
        gate: how many known passed samples may break; by default none.
        held_out: `N` bool, known samples that no method may use; in `before` neither passed nor targeted.
        unmasked: the results on all known data, if samples are held out.
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
        return self.evaluator.model

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def collective(self) -> Collective:
        return self.evaluator.collective

    @property
    def used(self) -> Tensor:
        """The known samples that a method may use (not held out), `N` bool."""
        return torch.ones_like(self.before.passed) if self.held_out is None else ~self.held_out

    @property
    def epochs(self) -> int:
        """Limit on the epochs of continued training: those of the original fit, more for small data."""
        least = min(LEAST_EPOCHS, SMALL_BUDGET // max(1, len(self.before)))
        return max(1 if self.training is None else self.training.epochs, least)

    @property
    def visits(self) -> float:
        """Budget of a training: one per sample run forward, `FORWARD_BACKWARD` per sample of a training step."""
        return FORWARD_BACKWARD * self.epochs * len(self.before)

    @property
    def deadline(self) -> Deadline:
        """Deadline of the repair, the same on all ranks."""
        return self.clock.deadline(self.collective)

    def deadline_of_method(self, share: float = 1.0) -> Deadline:
        """Returns the deadline for a share of the remaining time, minus the time to judge the result."""
        return self.deadline.within(share * self.clock.left).earlier(JUDGING_PASSES * self.clock.one_pass)

    def evaluate(self, state: State) -> SampleResults:
        """Evaluates the deployed model under a state on all known data, in one forward pass."""
        return self.evaluator.run_with(state, self.known).sharing(self.before)

    def propose(self, name: str, state: State) -> Proposal:
        """Evaluates a state on all known data and returns it as a proposal."""
        return self.counted(name, state, self.evaluate(state))

    def counted(self, name: str, state: State, after: SampleResults) -> Proposal:
        """Returns a state with known results as a proposal."""
        before, flips = self.before, Flips.between(self.before, after)
        repaired, broken = flips.repaired & before.targeted, flips.broken
        missing = sum(need - got for got, need in missed_quotas(before, repaired, self.needed).values())
        worth = before.value(repaired), before.cost(broken), missing, self.excess(after, broken)
        return Proposal(name, state, after, int(repaired.sum()), int(broken.sum()), *worth)

    def original(self, name: str) -> Proposal:
        """Returns the original weights as a proposal, without running the model."""
        return self.counted(name, {}, self.before if self.unmasked is None else self.unmasked)

    def target_counts(self, after: SampleResults) -> TargetCounts:
        """Counts the known samples that a method may use."""
        return Flips.between(self.before, after).target_counts(self.before, self.used)

    def without(self, held_out: Tensor) -> Problem:
        """Returns the problem without some samples, `N` bool, and their copies in other splits."""
        held_out = held_out | (self.copies(held_out) & ~self.before.protected)
        before = replace(self.before, passed=self.before.passed & ~held_out, targeted=self.before.targeted & ~held_out)
        unmasked = self.before if self.unmasked is None else self.unmasked
        passed = self.passed & ~held_out
        return replace(self, before=before, passed=passed, needed={}, held_out=held_out, unmasked=unmasked)

    @property
    def came_with_failures(self) -> Tensor:
        """Samples that came in with the failures, `N` bool; the model was not trained on them."""
        came = torch.zeros_like(self.before.passed)
        for source in self.known:
            if source.failed:
                came[self.before.of(source.split)] = True
        return came

    def copies(self, rows: Tensor) -> Tensor:
        """Returns these rows and all rows of the same data-set positions, `N` bool, if sources know them."""
        identities = [source.identity for source in self.known if isinstance(source, Identified)]
        if len(identities) < max(2, len(self.known)):
            return rows
        samples = torch.cat(identities)
        return rows | is_among(samples, samples[rows])

    def excess(self, after: SampleResults, broken: Tensor) -> float:
        """Returns how far the cost of broken samples, `N` bool, exceeds what the gate allows."""
        counts = Flips.between(self.before, after).counts(self.used)
        return self.gate.excess_of(counts, self.gate.cost(self.before, broken))

    def steered(self, after: SampleResults) -> Problem:
        """Returns the problem with targets of slices that lack repairs weighted `LACKING_SLICE_FACTOR` times.

        `after` are the known results of the weights from which the search continues.
        """
        names = missed_quotas(self.before, self.before.targeted & after.passed, self.needed)
        return replace(self, before=upweight_slices(self.before, names, LACKING_SLICE_FACTOR)) if names else self


@runtime_checkable
class Method(Protocol):
    """A repair method. Write your own as a frozen dataclass with this call.

    Optional members, used before the first training step:

    - `trains = True`: it continues the training where possible, which is checked first.
    - `needs`, of `Need` in `lightning_nrl.evaluation.evaluator`: its requirements on task and data.
    - `check(model)`, `check_recording(recording)`: raise a `ConfigurationError` for what does not suit it.
    - `fitness`, `localizer`: defaults that the user may override; a method with `with_parts(**parts)` gets the user's.
    - `wants_checkpoints`, `with_checkpoints(paths)`: it gets the checkpoints of the Trainer.
    """

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights; leaves the model unchanged.

        Raises:
            EmptyLocalizationError: there are no weights to search.
            ConfigurationError: the method does not suit the model or the task.
        """
        ...
