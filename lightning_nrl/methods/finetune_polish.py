"""Fine-tune, then polish: repair as many samples as possible, then restore what broke."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import check_real
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.methods.held_out import MAX_STANDARD_ERRORS, estimate
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem, Trained
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.descent import MAX_SAMPLE_WEIGHT
from lightning_nrl.methods.solvers.distill import distill
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records.steps import Step

OWN_RATE = 1e-3  # of AdamW with the user's `training_step`, tried if the user's optimizers repair too little
HEALTHY_REPAIRS = 1 / 5  # of the targets; a training that repairs fewer halfway may be stopped
# In the second half of a training, the passed samples with the lowest losses are visited half as
# often.
EASY_SHARE, EASY_VISITS = 4 / 5, 1 / 2
# Failures outside the target may have wrong labels. This half visits these less, unless held-out
# samples gain clearly.
DOUBTED_VISITS = 1 / 5


@dataclass(frozen=True)
class StepKind:
    """A way to make training steps: `distill` if `distilled`, AdamW if `rate` is given, else the
    user's optimizers.
    """

    name: str
    rate: float | None = None
    distilled: bool = False


CONTINUED, DISTILLED = StepKind("continued training"), StepKind("distilled steps", distilled=True)
OWN_STEPS = StepKind(f"AdamW through training_step, rate {OWN_RATE:g}", OWN_RATE)


@dataclass(frozen=True)
class FineTuned:
    """Weights after a training. `is_done` is False if poor results stopped the training halfway.

    `held_out` counts the flips of held-out samples, under the last weights that were trained
    without these samples.
    """

    proposal: Proposal
    step: Step
    held_out: TargetCounts | None
    is_done: bool

    @property
    def is_harmful(self) -> bool:
        """True if held-out regressions exceed held-out repairs by more than `MAX_STANDARD_ERRORS`
        standard errors.
        """
        return self.held_out is not None and _standard_errors(self.held_out) < -MAX_STANDARD_ERRORS


@dataclass(frozen=True)
class FineTunePolish(Method):
    """Continues training on the failures, then polishes until no known passed sample is broken.

    If the whole network may change and its training is known, this training continues from the
    original weights, with the known failures added to its data. If it repairs too little by
    halfway, AdamW replaces the module's optimizers. If that repairs too little, or only some layers
    may change, AdamW trains what may change on the task's loss and holds passed samples to the
    original model's outputs (`_solvers/distill.py`). In the second half of a training, passed
    samples with low losses are visited less. A polish (`_solvers/polish.py`) restores known samples
    that broke.

    Attributes:
        share: share of the time left that the training and the polish may use together.

    Raises:
        ConfigurationError: on construction, unless the share is above 0 and at most 1.
    """

    trains: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("margins",)
    share: float = 1.0

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("FineTunePolish.share", self.share, "share", hint, above=0, most=1)

    def __call__(self, problem: Problem) -> Solution:
        """Trains and polishes; raises a `ConfigurationError` if the task has no margins."""
        check_needs(self.needs, problem.before, problem.evaluator.task)
        return fine_tune_and_polish(problem, share=self.share)


def fine_tune_and_polish(
    problem: Problem, held_out_rows: Tensor | None = None, share: float = 1.0
) -> Solution:
    """Trains and polishes in at most `share` of the time left.

    The first half of the training does not use the samples in `held_out_rows`, `N` bool. If it breaks
    more of these samples than it repairs, the second half does not use them either.
    `Solution.held_out` counts the flips of these samples under the last weights that were trained
    without them.
    """
    clock, deadline = problem.clock, problem.deadline_of_method(share)
    polish = max(budget.POLISH_PASSES * clock.one_pass, budget.LEAST_POLISH_SECONDS)
    reserve = min(polish, budget.POLISH_TIME_SHARE * deadline.agreed_seconds_left())
    found, steps = _fine_tuned(
        problem, held_out_rows, deadline.earlier(reserve if deadline.is_set else 0.0)
    )
    if found is None:
        needed = (
            clock.elapsed
            + (least_seconds(problem) + budget.JUDGING_PASSES * clock.one_pass) / share
        )
        return Solution(
            None,
            f"no time was left for training: it needs about {needed:,.0f} s of `max_time`.",
            steps,
        )
    if found.is_harmful:
        reason = "continued training breaks more held-out samples than it repairs."
        return Solution(None, reason, steps, held_out=found.held_out)
    proposal, step, course = polished(problem, found.proposal, steered=True, deadline=deadline)
    reason = "" if proposal.repaired else "no target was repaired without breaking what is right."
    others = (found.proposal, proposal)
    taken = proposal if proposal.repaired else None
    return Solution(taken, reason, (*steps, step), others, course, held_out=found.held_out)


def least_seconds(problem: Problem, epochs: int = 1) -> float:
    """Estimates the seconds to start a training, run its `epochs`, evaluate it halfway and end a
    polish.
    """
    passes = epochs * budget.FORWARD_BACKWARD + 1 + budget.RESERVED_PASSES
    return budget.STARTING_SECONDS + passes * problem.clock.one_pass


def _fine_tuned(
    problem: Problem, held_out_rows: Tensor | None, deadline: Deadline
) -> tuple[FineTuned | None, tuple[Step, ...]]:
    """Tries each kind of steps until one kind does well halfway; the last kind always trains to the
    end.

    Returns the weights, and a step of the report per training. If time runs out before a training
    ends, the weights are those with the most repairs halfway, or None if no training came that far.
    """
    kinds = (
        (CONTINUED, OWN_STEPS, DISTILLED)
        if problem.whole and problem.training is not None
        else (DISTILLED,)
    )
    found: list[FineTuned] = []
    for kind in kinds:
        with problem.clock.stage("fit"):
            halfway = Halfway(problem, held_out_rows, is_last=kind is kinds[-1])
            work = partial(_fine_tuned_by, problem, held_out_rows, kind, halfway, deadline)
            trained = problem.work.once("fit", work, FineTuned)
        if trained is not None:
            found.append(trained)
            if trained.is_done:
                break
    best = max(found, key=lambda one: (one.is_done, one.proposal.repaired), default=None)
    return best, tuple(one.step for one in found)


def _fine_tuned_by(
    problem: Problem,
    held_out_rows: Tensor | None,
    kind: StepKind,
    halfway: Halfway,
    deadline: Deadline,
) -> FineTuned | None:
    began = problem.clock.elapsed
    trained = _trained(problem, kind, halfway, deadline)
    if trained is not None:
        proposal, counts = problem.propose("fit", trained.state), halfway.held_out
        if halfway.stays_held_out:
            counts = (
                None
                if held_out_rows is None
                else estimate(problem.before, proposal.after, held_out_rows)
            )
        step = proposal.step(
            problem.clock.elapsed - began,
            f"{kind.name}, {trained.note}{halfway.note}",
            was_cut=trained.was_cut,
        )
        return FineTuned(proposal, step, counts, is_done=True)
    if halfway.proposal is None:
        return None
    step = halfway.proposal.step(problem.clock.elapsed - began, f"{kind.name}, ended halfway")
    return FineTuned(halfway.proposal, replace(step, name="trial"), halfway.held_out, is_done=False)


def _trained(
    problem: Problem, kind: StepKind, halfway: Halfway, deadline: Deadline
) -> Trained | None:
    if not deadline.leaves(problem.clock.one_pass):
        return None
    if kind.distilled:
        return distill(problem, deadline=deadline, weight=halfway.first_weight, renew=halfway)
    assert problem.training is not None
    return problem.training(
        seconds=deadline.agreed_seconds_left() - problem.clock.one_pass,
        seed=problem.seed,
        clock=problem.clock,
        weight=halfway.first_weight,
        epochs=problem.epochs,
        rate=kind.rate,
        renew=halfway,
    )


class Halfway:
    """Checks the weights halfway through a training, which calls it as `renew` (see `Training`).

    A call returns new sampling weights, `N`. It returns None, to stop, if results are poor and
    `is_last` is False.
    """

    def __init__(self, problem: Problem, held_out_rows: Tensor | None, *, is_last: bool) -> None:
        self.problem, self._rows, self._is_last = problem, held_out_rows, is_last
        self.stays_held_out = True  # stays True if the training ends before it is halfway
        self.held_out: TargetCounts | None = None
        self.note = ""  # for the report: the held-out counts halfway
        self.proposal: Proposal | None = None
        used = problem.used if held_out_rows is None else problem.without(held_out_rows).used
        self.first_weight = sample_weight(problem.before).where(used, 0.0)

    def __call__(self, state: State) -> Tensor | None:
        problem, before, rows = self.problem, self.problem.before, self._rows
        self.proposal = problem.propose("fit", state)
        after = self.proposal.after
        if rows is not None:
            self.held_out = estimate(before, after, rows)
        if not (self._is_last or self._does_well()):
            return None
        gain = 0.0 if self.held_out is None else _standard_errors(self.held_out)
        self.stays_held_out = gain < 0
        if self.held_out is not None:
            self.note = f"; held-out samples halfway: {self.held_out.repaired:,} repaired, {self.held_out.broken:,} broken"
        loss = after.loss.double().where(before.passed & after.passed, torch.inf)
        easy = loss.argsort(stable=True)[: int(EASY_SHARE * int(before.passed.sum()))]
        weight = sample_weight(before)
        weight[easy[loss[easy].isfinite()]] *= EASY_VISITS
        if self.held_out is not None and gain <= 1:
            weight[~before.passed & ~before.targeted] *= (
                0.0 if self.stays_held_out else DOUBTED_VISITS
            )
        return weight.where(self.first_weight > 0 if self.stays_held_out else problem.used, 0.0)

    def _does_well(self) -> bool:
        """True if many targets are repaired, or held-out repairs minus regressions exceed a
        standard error.
        """
        assert self.proposal is not None
        n_used = int((self.problem.before.targeted & (self.first_weight > 0)).sum())
        gains = self.held_out is not None and _standard_errors(self.held_out) > 1
        return gains or self.proposal.repaired >= HEALTHY_REPAIRS * n_used


def sample_weight(before: SampleResults) -> Tensor:
    """Returns sampling weights, `N` float64. A target gets its sample weight, at most 10; other
    samples get 1.
    """
    return torch.where(before.targeted, before.weight.clamp(max=MAX_SAMPLE_WEIGHT), 1.0).double()


def _standard_errors(counts: TargetCounts) -> float:
    """Returns repairs minus regressions in units of the standard error, if both are Poisson counts."""
    return (counts.repaired - counts.broken) / math.sqrt(max(1, counts.repaired + counts.broken))
