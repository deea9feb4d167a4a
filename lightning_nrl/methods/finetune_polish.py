"""Fine-tune, then polish: repair as many samples as possible, then restore what broke."""

from __future__ import annotations

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
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem, Trained
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.descent import MAX_SAMPLE_WEIGHT
from lightning_nrl.methods.solvers.distill import distill
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records.stats import CHANCE_STANDARD_ERRORS, net_repairs_in_standard_errors
from lightning_nrl.records.steps import Step

# Learning rate of AdamW with the user's `training_step`, which is tried if the user's optimizers
# repair too little.
OWN_RATE = 1e-3
HEALTHY_REPAIRS = 1 / 5  # of the targets; a training that repairs fewer halfway may be stopped
# In the second half of a training, the passed samples with the lowest losses are visited half as
# often.
EASY_SHARE, EASY_VISITS = 4 / 5, 1 / 2
# Failures outside the target may have wrong labels. The second half visits these less, unless
# held-out samples gain clearly.
DOUBTED_VISITS = 1 / 5


@dataclass(frozen=True)
class Recipe:
    """A way to make training steps.

    It is `distill` if `distilled`, AdamW if `rate` is given, else the user's optimizers.
    """

    name: str
    rate: float | None = None
    distilled: bool = False


CONTINUED = Recipe("continued training")
OWN_OPTIMIZER = Recipe(f"AdamW through training_step, rate {OWN_RATE:g}", OWN_RATE)
DISTILLED = Recipe("distilled steps", distilled=True)


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
        """True if held-out regressions significantly exceed held-out repairs."""
        return (
            self.held_out is not None
            and net_repairs_in_standard_errors(self.held_out) < -CHANCE_STANDARD_ERRORS
        )


@dataclass(frozen=True)
class FineTunePolish(Method):
    """Continues training on the failures, then polishes until no known passed sample is broken.

    If the whole network may change and its training is known, this training continues from the
    original weights, with the known failures added to its data. If it repairs too little by
    halfway, AdamW replaces the module's optimizers. If that repairs too little, or only some layers
    may change, AdamW trains what may change on the task's loss and holds passed samples to the
    original model's outputs (`solvers/distill.py`). In the second half of a training, passed
    samples with low losses are visited less. A polish (`solvers/polish.py`) restores known samples
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

    The first half of the training does not use the samples in `held_out_rows`, `N` bool. If it
    breaks more of these samples than it repairs, the second half does not use them either.
    `Solution.held_out` counts the flips of these samples under the last weights that were trained
    without them.
    """
    deadline = problem.deadline_of_method(share)
    tuned, steps = _fine_tune(problem, held_out_rows, _deadline_of_training(problem, deadline))
    if tuned is None:
        needed = least_seconds(problem) + budget.JUDGING_PASSES * problem.clock.one_pass
        seconds = problem.clock.elapsed + needed / share
        return Solution(
            None,
            f"no time was left for training: it needs about {seconds:,.0f} s of `max_time`.",
            steps,
        )
    if tuned.is_harmful:
        reason = "continued training breaks more held-out samples than it repairs."
        return Solution(None, reason, steps, held_out=tuned.held_out)
    proposal, step, course = polished(problem, tuned.proposal, steered=True, deadline=deadline)
    is_repaired = proposal.repaired > 0
    return Solution(
        proposal if is_repaired else None,
        "" if is_repaired else "no target was repaired without breaking what is right.",
        steps=(*steps, step),
        alternatives=(tuned.proposal, proposal),
        tried=course,
        held_out=tuned.held_out,
    )


def _deadline_of_training(problem: Problem, deadline: Deadline) -> Deadline:
    polish_seconds = max(budget.POLISH_PASSES * problem.clock.one_pass, budget.LEAST_POLISH_SECONDS)
    # All ranks must agree on the time left, even without a deadline.
    most_seconds = budget.POLISH_TIME_SHARE * deadline.agreed_seconds_left()
    if not deadline.is_set:
        return deadline
    return deadline.earlier(min(polish_seconds, most_seconds))


def least_seconds(problem: Problem, epochs: int = 1) -> float:
    """Estimates the seconds to train `epochs`, evaluate halfway and end a polish."""
    passes = epochs * budget.FORWARD_BACKWARD + 1 + budget.RESERVED_PASSES
    return budget.STARTING_SECONDS + passes * problem.clock.one_pass


def _fine_tune(
    problem: Problem, held_out_rows: Tensor | None, deadline: Deadline
) -> tuple[FineTuned | None, tuple[Step, ...]]:
    """Tries each recipe until one does well halfway; the last one always trains to the end.

    Returns the weights, and a step of the report per training. If time runs out before a training
    ends, the weights are those with the most repairs halfway, or None if no training came that far.
    """
    recipes: tuple[Recipe, ...] = (DISTILLED,)
    if problem.whole_network and problem.training is not None:
        recipes = (CONTINUED, OWN_OPTIMIZER, DISTILLED)
    trainings: list[FineTuned] = []
    for recipe in recipes:
        with problem.clock.stage("fit"):
            halfway = Halfway(problem, held_out_rows, is_last=recipe is recipes[-1])
            work = partial(_fine_tune_by, problem, held_out_rows, recipe, halfway, deadline)
            tuned = problem.work.once("fit", work, FineTuned)
        if tuned is not None:
            trainings.append(tuned)
            if tuned.is_done:
                break
    best = max(trainings, key=lambda tuned: (tuned.is_done, tuned.proposal.repaired), default=None)
    return best, tuple(tuned.step for tuned in trainings)


def _fine_tune_by(
    problem: Problem,
    held_out_rows: Tensor | None,
    recipe: Recipe,
    halfway: Halfway,
    deadline: Deadline,
) -> FineTuned | None:
    began = problem.clock.elapsed
    trained = _train(problem, recipe, halfway, deadline)
    if trained is not None:
        proposal = problem.propose("fit", trained.state)
        counts = halfway.held_out
        if halfway.stays_held_out and held_out_rows is not None:
            counts = estimate(problem.before, proposal.after, held_out_rows)
        seconds = problem.clock.elapsed - began
        note = f"{recipe.name}, {trained.note}{halfway.note}"
        step = proposal.step(seconds, note, was_cut=trained.was_cut)
        return FineTuned(proposal, step, counts, is_done=True)
    if halfway.proposal is None:
        return None
    step = halfway.proposal.step(problem.clock.elapsed - began, f"{recipe.name}, ended halfway")
    return FineTuned(halfway.proposal, replace(step, name="trial"), halfway.held_out, is_done=False)


def _train(
    problem: Problem, recipe: Recipe, halfway: Halfway, deadline: Deadline
) -> Trained | None:
    if not deadline.leaves(problem.clock.one_pass):
        return None
    if recipe.distilled:
        return distill(problem, deadline=deadline, weight=halfway.first_weight, renew=halfway)
    assert problem.training is not None
    return problem.training(
        seconds=deadline.agreed_seconds_left() - problem.clock.one_pass,
        seed=problem.seed,
        clock=problem.clock,
        weight=halfway.first_weight,
        epochs=problem.epochs,
        rate=recipe.rate,
        renew=halfway,
    )


class Halfway:
    """Checks the weights halfway through a training, which calls it as `renew` (see `Training`).

    A call returns new sampling weights, `N`. It returns None, to stop, if results are poor and
    `is_last` is False.
    """

    def __init__(self, problem: Problem, held_out_rows: Tensor | None, *, is_last: bool) -> None:
        self.problem = problem
        self._held_out_rows = held_out_rows
        self._is_last = is_last
        self.stays_held_out = True  # stays True if the training ends before it is halfway
        self.held_out: TargetCounts | None = None
        self.note = ""  # for the report: the held-out counts halfway
        self.proposal: Proposal | None = None
        used = problem.used
        if held_out_rows is not None:
            used = problem.without(held_out_rows).used
        self.first_weight = sample_weight(problem.before).where(used, 0.0)

    def __call__(self, state: State) -> Tensor | None:
        before = self.problem.before
        self.proposal = self.problem.propose("fit", state)
        after = self.proposal.after
        gain = 0.0
        if self._held_out_rows is not None:
            counts = self.held_out = estimate(before, after, self._held_out_rows)
            gain = net_repairs_in_standard_errors(counts)
        if not (self._is_last or self._does_well(self.proposal, gain)):
            return None
        self.stays_held_out = gain < 0
        weight = sample_weight(before)
        weight[_easy_samples(before, after)] *= EASY_VISITS
        if self.held_out is not None:
            flips = f"{self.held_out.repaired:,} repaired, {self.held_out.broken:,} broken"
            self.note = f"; held-out samples halfway: {flips}"
            if gain <= 1:
                other_failures = ~before.passed & ~before.targeted
                weight[other_failures] *= 0.0 if self.stays_held_out else DOUBTED_VISITS
        used = self.first_weight > 0 if self.stays_held_out else self.problem.used
        return weight.where(used, 0.0)

    def _does_well(self, proposal: Proposal, gain: float) -> bool:
        """True if many targets are repaired, or held-out repairs exceed what may be chance."""
        n_used = int((self.problem.before.targeted & (self.first_weight > 0)).sum())
        return gain > 1 or proposal.repaired >= HEALTHY_REPAIRS * n_used


def _easy_samples(before: SampleResults, after: SampleResults) -> Tensor:
    """Returns the rows of the passed samples with the lowest finite losses."""
    loss = after.loss.double().where(before.passed & after.passed, torch.inf)
    rows = loss.argsort(stable=True)[: int(EASY_SHARE * int(before.passed.sum()))]
    return rows[loss[rows].isfinite()]


def sample_weight(before: SampleResults) -> Tensor:
    """Returns sampling weights, `N` float64: of a target its sample weight, at most 10; else 1."""
    return torch.where(before.targeted, before.weight.clamp(max=MAX_SAMPLE_WEIGHT), 1.0).double()
