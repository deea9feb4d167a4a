"""The `Problem` that a method solves: a model, its results on known data, and what may change."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, device_of, temporary_weights
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.data import Source
from lightning_nrl.data.batch import SourcePart
from lightning_nrl.data.sample_identity import Identified, is_among
from lightning_nrl.errors import ModelError, RepairError, TrainingWarning, first_line
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.deployed_precision import coarse_rounding, rounding_reserve
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.slices import missed_quotas, upweight_slices
from lightning_nrl.gate import Gate, Instance
from lightning_nrl.localization import Localizer
from lightning_nrl.methods.budget import (
    FORWARD_BACKWARD,
    JUDGING_PASSES,
    LEAST_EPOCHS,
    SMALL_BUDGET,
    SMALL_NETWORK,
)
from lightning_nrl.methods.known_record import KnownRecord
from lightning_nrl.methods.solution import Proposal
from lightning_nrl.records.steps import CUT
from lightning_nrl.search import FitnessFunction

N_SCORED = 100_000  # default maximum number of known samples that a search uses
# On the sample weights of a slice's targets while the slice misses its quota.
LACKING_SLICE_FACTOR = 4.0


@dataclass(frozen=True)
class Trained:
    """All parameters and persistent buffers after a training, and the epochs made and planned."""

    state: State
    epochs: float
    planned: float

    @property
    def was_cut(self) -> bool:
        return self.epochs < self.planned

    @property
    def note(self) -> str:
        unit = "epoch" if self.epochs == 1 else "epochs"
        text = f"{self.epochs:,.4g} {unit}"
        if self.was_cut:
            text += f" of {self.planned:,.4g}, {CUT}"
        return text


class Training(ABC):
    """Continues training a model with the known failures added to its data.

    Attributes:
        epochs: number of epochs of the original training.
        origin: describes the training as JSON values. A training of another origin does not resume
            an interrupted repair.
    """

    epochs: int
    origin: object = None

    def for_targets(self, targeted: Tensor) -> Training:
        """Returns the training for these targets, `N` bool in the order of `Problem.before`.

        By default targets are treated like other samples.
        """
        return self

    @abstractmethod
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
    ) -> Trained | None:
        """Trains a copy of the model. Returns None if time is short.

        Args:
            seconds: time limit, which may be infinite.
            seed: seed of the sample order and all other randomness.
            clock: timer that is told the progress.
            start: initial weights; None means the weights of the model.
            weight: sampling weight of each known sample, `N` in the order of `Problem.before`; None
                means equal weights. An epoch makes one draw per known sample, whatever the weights.
            epochs: number of epochs over the known data; None means as many as in the original
                training.
            rate: learning rate of an AdamW that replaces the module's optimizers and schedules;
                None keeps these.
        """


@dataclass(frozen=True)
class Problem:
    """A model, its results on known data, and what may change to repair it.

    Attributes:
        evaluator: evaluates the original model, which is in evaluation mode on its device. The
            evaluator also has the task and the group of ranks. Methods must not write to the model.
            All ranks run the method in step.
        known: the known data, one source per split. Each rank holds its share of the samples.
        before: the model's results on all `N` known samples. `before.targeted` marks the samples to
            repair (I_neg), `before.passed` the samples to keep.
        space: the layers whose weights are localised and searched.
        scope: names of the parameters that may change. The parameters of `space` are among them.
        localizer: chooses the weights to search.
        fitness: compares new weights in a search.
        passed: `N` bool, the passed samples that a swarm scores (I_pos): all, or as many as
            `SearchOptions.n_passed`.
        clock: times the stages and knows the time left.
        seed: seed of all randomness.
        memory_limit: bytes of device memory that a search may use; None means a share of the free
            memory.
        n_scored: maximum number of known samples that a search uses. The result is evaluated on all
            known samples.
        training: continues the training; None if the original training is unknown.
        whole_network: True if the whole network may change.
        update: True if this model is to replace an older model, and the older model gets the
            targets right.
        needed: quotas, which map the name of a slice to the minimum number of its targets to
            repair.
        gate: decides how many known passed samples may break; by default none may.
        held_out_rows: `N` bool, known samples that a method may not use. In `before` they are
            neither passed nor targeted.
        unmasked: `before` with held-out samples still marked as passed or targeted; None if no
            samples are held out.
        work: saves the results of finished steps, so that an interrupted repair can resume.
        record: what passes over the known data have recorded.
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
    memory_limit: int | None = None
    n_scored: int = N_SCORED
    training: Training | None = None
    whole_network: bool = True
    update: bool = False
    needed: Mapping[str, int] = field(default_factory=dict)
    gate: Gate = field(default_factory=Instance)
    held_out_rows: Tensor | None = None
    unmasked: SampleResults | None = None
    work: ResumeStore = field(default_factory=ResumeStore)
    record: KnownRecord = field(default_factory=KnownRecord)

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
    def rounding(self) -> float:
        """`coarse_rounding` of the margins."""
        return coarse_rounding(self.evaluator.precision, self.before)

    @property
    def rounding_reserve(self) -> Tensor | None:
        """`N`, margins that make samples safe from rounding, see `rounding_reserve`."""
        return rounding_reserve(self.evaluator.precision, self.before)

    @property
    def used(self) -> Tensor:
        """`N` bool, the known samples that are not held out."""
        if self.held_out_rows is None:
            return torch.ones_like(self.before.passed)
        return ~self.held_out_rows

    @property
    def epochs(self) -> int:
        """Maximum epochs of continued training: as originally, but at least 16 if work is small."""
        least = min(LEAST_EPOCHS, int(SMALL_BUDGET / max(1, self.work_of_pass)))
        return max(1 if self.training is None else self.training.epochs, least)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def work_of_pass(self) -> float:
        """Number of known samples; one of a large network counts as several."""
        return len(self.before) * max(1.0, self.n_parameters / SMALL_NETWORK)

    @property
    def visits(self) -> float:
        """Cost of continued training in visits, passes of one sample.

        A training step makes three visits per sample.
        """
        return FORWARD_BACKWARD * self.epochs * len(self.before)

    @property
    def deadline(self) -> Deadline:
        """Deadline of the repair, the same on all ranks."""
        return self.clock.deadline(self.collective)

    def deadline_of_method(self, share: float = 1.0) -> Deadline:
        """Returns the deadline of a method that may use `share` of the time left.

        It leaves time to judge a result, the only reserve that all methods share.
        """
        judging = JUDGING_PASSES * self.clock.one_pass + self.clock.seconds.get("unseen", 0.0)
        return self.deadline.earlier(judging).within(share * (self.clock.left - judging))

    def evaluate(self, state: State) -> SampleResults:
        """Returns the results of the deployed model with the tensors of `state` on known data.

        If they follow from the record, no pass is made.
        """
        return self.record.evaluate(self.evaluator, state, self.known, self.before)

    def deployed(self, state: State) -> SampleResults:
        """Returns the results as `evaluate` does, of a pass in any case."""
        return self.record.deployed(self.evaluator, state, self.known, self.before)

    def evaluate_some(self, state: State, rows: Tensor) -> SampleResults:
        """Evaluates the samples in `rows`, `N` bool; what is right of others is as in `before`."""
        before = self.before
        parts = []
        for source in self.known:
            positions = rows[before.of(source.split)].nonzero().flatten()
            if len(positions):
                parts.append(SourcePart(source, positions))
        after = self.evaluator.run_with(state, parts)
        passed, loss = before.passed.clone(), before.loss.clone()
        passed[rows], loss[rows] = after.passed, after.loss
        return replace(before, passed=passed, loss=loss)

    def propose(self, name: str, state: State) -> Proposal:
        """Evaluates a state on all known data and returns it as a proposal."""
        return self.counted(name, state, self.evaluate(state))

    def counted(self, name: str, state: State, after: SampleResults) -> Proposal:
        """Returns a state as a proposal, given its results on known data (`after`)."""
        flips = Flips.between(self.before, after)
        repaired = flips.repaired & self.before.targeted
        quotas = missed_quotas(self.before, repaired, self.needed)
        return Proposal(
            name,
            state,
            after,
            int(repaired.sum()),
            int(flips.broken.sum()),
            value=self.before.value(repaired),
            cost=self.before.cost(flips.broken),
            missing=sum(needed - n_repaired for n_repaired, needed in quotas.values()),
            excess=self.excess(after, flips.broken),
        )

    def original(self, name: str) -> Proposal:
        """Returns the original weights as a proposal, without running the model."""
        return self.counted(name, {}, self.unmasked or self.before)

    def target_counts(self, after: SampleResults) -> TargetCounts:
        """Counts the flips from `before` to `after` among the samples that are not held out."""
        return Flips.between(self.before, after).target_counts(self.before, self.used)

    def without(self, rows: Tensor) -> Problem:
        """Returns a problem without quotas that holds out the samples in `rows`, `N` bool.

        So are the samples that are `related` to these.
        """
        before = self.before
        held_out = self.related(rows)
        used = ~held_out
        return replace(
            self,
            before=replace(before, passed=before.passed & used, targeted=before.targeted & used),
            passed=self.passed & used,
            needed={},
            held_out_rows=held_out,
            unmasked=self.unmasked or before,
        )

    @contextmanager
    def starting_at(self, start: Proposal) -> Iterator[Problem]:
        """Puts the weights of a proposal into the model for a block; yields what is left to do.

        In it, what is right with these weights must stay right, and the targets are those that
        still fail. It has no quotas.
        """
        after = start.after
        passed = after.right
        before = replace(
            self.before,
            prediction=after.prediction,
            loss=after.loss,
            margin=after.margin,
            passed=passed,
            targeted=self.before.targeted & ~passed,
        )
        record = self.record.at(self.model, start.state)
        with temporary_weights(self.model, start.state):
            yield replace(
                self,
                before=before,
                passed=self.passed & passed,
                needed={},
                gate=Instance(),
                record=record,
            )

    @property
    def came_with_failures(self) -> Tensor:
        """`N` bool, all samples of splits whose failures may be repaired.

        Usually these are not training splits.
        """
        mask = torch.zeros_like(self.before.passed)
        for source in self.known:
            if source.failed:
                mask[self.before.of(source.split)] = True
        return mask

    def related(self, rows: Tensor) -> Tensor:
        """Marks the samples in `rows`, `N` bool, their copies, and all samples in their groups.

        So are the groups of the copies, and so on. Copies are known only if there are several
        sources, all `Identified`.
        """
        group = self.before.group
        identities = [source.identity for source in self.known if isinstance(source, Identified)]
        are_known = len(identities) >= max(2, len(self.known))
        samples = torch.cat(identities) if are_known else None
        while True:
            linked = rows
            if group is not None:
                linked = linked | torch.isin(group, group[linked])
            if samples is not None:
                linked = linked | is_among(samples, samples[linked])
            if torch.equal(linked, rows):
                return rows
            rows = linked

    def excess(self, after: SampleResults, broken: Tensor) -> float:
        """Returns how far the cost of the samples `broken`, `N` bool, exceeds the gate's limit.

        0 if it does not.
        """
        counts = Flips.between(self.before, after).counts(self.used)
        return self.gate.excess_of(counts, self.gate.cost(self.before, broken))

    def go_on_after(self, error: Exception, name: str) -> str:
        """Warns that the step `name` failed and returns why; raises if the repair must end.

        It ends with errors of this package, which name their cause, and if memory is short. One of
        several ranks must not go on alone: the others would wait for it forever.
        """
        is_explained = isinstance(error, RepairError) and not isinstance(error, ModelError)
        if is_explained or is_out_of_memory(error) or self.collective.world_size > 1:
            raise error
        reason = f"it raised {type(error).__name__}: {first_line(error).rstrip('.')}"
        warnings.warn(
            TrainingWarning(
                f"`{name}` stopped: {reason}. The repair goes on without it.",
                "`forward` should give gradients in evaluation mode: keep `torch.no_grad`, "
                "`torch.inference_mode`, NumPy, in-place operations and `sparse=True` out of it.",
            ),
            stacklevel=2,
        )
        return reason

    def steered(self, after: SampleResults) -> Problem:
        """Returns a problem in which targets of slices that miss their quota weigh more.

        `after` holds the results of the current weights. They show which slices miss their quota.
        """
        names = missed_quotas(self.before, self.before.targeted & after.passed, self.needed)
        if not names:
            return self
        return replace(self, before=upweight_slices(self.before, names, LACKING_SLICE_FACTOR))
