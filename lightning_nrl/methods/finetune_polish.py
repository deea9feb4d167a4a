"""Fine-tune, then polish: repair as many samples as possible, then restore what broke."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.state import between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import check_real
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.stats import CHANCE_STANDARD_ERRORS, net_repairs_in_standard_errors
from lightning_nrl.methods.adapted_problem import solve_with_adapters
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.lora import Lora, LoraAdapter, check_lora
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem, Trained
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.descent import MAX_SAMPLE_WEIGHT
from lightning_nrl.methods.solvers.distill import distill, trusted_rate
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records import CautionPoint, Step

# Learning rate of AdamW with the user's `training_step`, at most (`trusted_rate`). This is tried if
# the user's optimizers repair too little.
OWN_RATE = 1e-3
HEALTHY_REPAIRS = 1 / 5  # of the targets; a training whose first round repairs fewer may be stopped


# Values of `caution` that held-out samples may choose: the share of the way back to the original
# weights.
CAUTIONS = (0.0, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Recipe:
    """A way to make training steps.

    It is `distill` if `distilled`, AdamW if `rate` is given, else the user's optimizers.
    """

    name: str
    rate: float | None = None
    distilled: bool = False


CONTINUED = Recipe("continued training")
OWN_OPTIMIZER = Recipe("AdamW through training_step", OWN_RATE)
DISTILLED = Recipe("distilled steps", distilled=True)


@dataclass(frozen=True)
class FineTuned:
    """Weights after a training. `is_done` is False if poor results stopped it after one round.

    `held_out` counts the flips of held-out samples, under the last weights that were trained
    without these samples, in the last of `n_counts` counts. `caution` counts them on the way back
    from there.
    """

    proposal: Proposal
    step: Step
    held_out: TargetCounts | None
    caution: tuple[CautionPoint, ...]
    is_done: bool
    n_counts: int

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
    original weights in rounds (`TrainingRounds`), with the known failures added to its data. If the
    first round repairs too little, AdamW replaces the module's optimizers. If that repairs too
    little, or only some layers may change, AdamW trains what may change on the task's loss and
    holds passed samples to the original model's outputs (`solvers/distill.py`). A polish
    (`solvers/polish.py`) restores known samples that broke.

    Attributes:
        share: share of the time left that the training and the polish may use together.
        caution: share, from 0 to below 1, of the way from the trained weights back to the original
            ones, before the polish. More caution breaks fewer unseen samples and repairs fewer.
            None: 0, unless held-out samples gain more with another value of `CAUTIONS`.
        lora: rank, or `peft.LoraConfig`, of adapters (LoRA) that are trained and polished instead
            of the weights, in each Linear and convolution that may change. Their merged weights
            are judged. None moves the weights.

    Raises:
        ConfigurationError: on construction, unless the share is above 0 and at most 1, the caution
            at least 0 and below 1, and `lora` a rank from 1 or a `LoraConfig` of plain LoRA; or if
            `peft` is not installed.
    """

    trains: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("margins",)
    share: float = 1.0
    caution: float | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("FineTunePolish.share", self.share, "share", hint, above=0, most=1)
        check_caution("FineTunePolish.caution", self.caution)
        if self.lora is not None:
            check_lora("lora", self.lora)

    def check(self, model: nn.Module) -> None:
        """Raises a `ConfigurationError` if no layer can have adapters."""
        if self.lora is not None:
            parameters = dict(model.named_parameters())
            trainable = [name for name, value in parameters.items() if value.requires_grad]
            LoraAdapter.configured(self.lora, model, trainable or parameters)

    def __call__(self, problem: Problem) -> Solution:
        """Trains and polishes; raises a `ConfigurationError` if the task has no margins."""
        check_needs(self.needs, problem.before, problem.evaluator.task)
        solve = partial(fine_tune_and_polish, share=self.share, caution=self.caution)
        if self.lora is None:
            return solve(problem)
        return solve_with_adapters(problem, self.lora, solve)


def check_caution(argument: str, caution: float | None) -> None:
    """Raises a `ConfigurationError` unless the caution is None or a number from 0 to below 1."""
    if caution is not None:
        hint = "give 0 to repair most, or more, below 1, to break less."
        check_real(argument, caution, "share below 1", hint, least=0, below=1)


def fine_tune_and_polish(
    problem: Problem,
    held_out_rows: Tensor | None = None,
    share: float = 1.0,
    caution: float | None = None,
) -> Solution:
    """Trains and polishes in at most `share` of the time left.

    Only the last round of the training uses the samples in `held_out_rows`, `N` bool, and only if
    the rounds before it repair more of them than they break. `Solution.held_out` counts the flips
    of these samples under the last weights that were trained without them.
    """
    deadline = problem.deadline_of_method(share)
    cautions = sorted({*CAUTIONS, caution or 0.0})
    tuned, steps = _fine_tune(
        problem, held_out_rows, _deadline_of_training(problem, deadline), cautions
    )
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
    if caution is None:
        caution = choose_caution(tuned.caution)
    counts = problem.target_counts(tuned.proposal.after)
    start = _moved_back(problem, tuned.proposal, caution)
    tuned = replace(tuned, proposal=start)  # to free the memory of the trained weights
    proposal, step, course = polished(
        problem, start, steered=True, deadline=deadline, visits=problem.visits
    )
    is_repaired = proposal.repaired > 0
    return Solution(
        proposal if is_repaired else None,
        "" if is_repaired else "no target was repaired without breaking what is right.",
        steps=(*steps, step),
        tried=(counts, *course),
        held_out=tuned.held_out,
        n_choices=max(1, tuned.n_counts + len(steps) - 1),
        caution=tuple(replace(point, chosen=point.caution == caution) for point in tuned.caution),
    )


def choose_caution(points: Sequence[CautionPoint]) -> float:
    """Returns 0, or the caution with which held-out samples gain most, beyond chance.

    Against caution 0, the regressions avoided must exceed the repairs lost by more than one
    standard error.
    """
    chosen, most = 0.0, 1.0
    for point in points:
        avoided = points[0].held_out.broken - point.held_out.broken
        lost = points[0].held_out.repaired - point.held_out.repaired
        gain = (avoided - lost) / math.sqrt(max(1, abs(avoided) + abs(lost)))
        if gain > most:
            chosen, most = point.caution, gain
    return chosen


def _moved_back(problem: Problem, trained: Proposal, caution: float) -> Proposal:
    """Returns the proposal with the share `caution` of its change taken back."""
    if not caution:
        return trained
    state = between(current_state(problem.model), trained.state, 1 - caution)
    return problem.propose(trained.name, state)


def _deadline_of_training(problem: Problem, deadline: Deadline) -> Deadline:
    polish_seconds = max(budget.POLISH_PASSES * problem.clock.one_pass, budget.LEAST_POLISH_SECONDS)
    count_seconds = budget.RESERVED_PASSES * problem.clock.one_pass  # ends the polish
    # All ranks must agree on the time left, even without a deadline.
    left = deadline.agreed_seconds_left() - count_seconds
    if not deadline.is_set:
        return deadline
    share = budget.POLISH_TIME_SHARE if problem.record.cache is None else 0.0
    return deadline.earlier(min(polish_seconds, count_seconds + share * left))


def least_seconds(problem: Problem, epochs: int = 1) -> float:
    """Estimates the seconds to train `epochs`, evaluate the result and end a polish."""
    passes = epochs * budget.FORWARD_BACKWARD + 1 + budget.RESERVED_PASSES
    return budget.STARTING_SECONDS + passes * problem.clock.one_pass


def _fine_tune(
    problem: Problem,
    held_out_rows: Tensor | None,
    deadline: Deadline,
    cautions: Sequence[float],
) -> tuple[FineTuned | None, tuple[Step, ...]]:
    """Tries each recipe until one does well in its first round; the last one trains to the end.

    Returns the weights, and a step of the report per training. If time runs out before a training
    ends, the weights are those with the most repairs, or None if no training came that far.
    """
    recipes: tuple[Recipe, ...] = (DISTILLED,)
    if problem.whole_network and problem.training is not None:
        recipes = (CONTINUED, OWN_OPTIMIZER, DISTILLED)
    best: FineTuned | None = None
    steps: list[Step] = []
    for recipe in recipes:
        with problem.clock.stage("fit"):
            rate = recipe.rate and trusted_rate(problem, recipe.rate)
            suited = replace(recipe, rate=rate)
            rounds = TrainingRounds(problem, held_out_rows, suited, deadline, cautions)
            work = partial(rounds.run, is_last=recipe is recipes[-1])
            tuned = problem.work.once("fit", work, FineTuned)
        if tuned is None:
            continue
        steps.append(tuned.step)
        if best is None or tuned.is_done or tuned.proposal.repaired > best.proposal.repaired:
            best = tuned
        if tuned.is_done:
            break
    return best, tuple(steps)


class TrainingRounds:
    """Trains by one recipe in rounds, each from the weights of the round before.

    All rounds but the last leave the held-out samples out. After each round these samples, r of
    them repaired and b broken since the start, decide how the training goes on. Its gain is r - b
    in standard errors.

    | decision | rule |
    |---|---|
    | first rounds | `FEWEST_ROUNDS` unless the gain is below -2; more while each gains over 1 |
    | held-out samples | used in the last round, unless the gain is below 0 |
    | other failures | `DOUBTED_VISITS` unless the gain is above 1; none if it is below 0 |
    | easy samples | `EASY_VISITS` after the first round |
    | broken samples | `BROKEN_VISITS` after the first round |

    Other failures are no targets, and may have wrong labels. Easy samples are the passed ones with
    the lowest losses. Without held-out samples there are `FEWEST_ROUNDS` before the last.

    Of the last three rows, `distill` follows only `none`: it chooses easy samples by itself.
    """

    def __init__(
        self,
        problem: Problem,
        held_out_rows: Tensor | None,
        recipe: Recipe,
        deadline: Deadline,
        cautions: Sequence[float],
    ) -> None:
        self.problem = problem
        self.cautions = cautions
        self.recipe = recipe
        self.deadline = deadline
        self.began = problem.clock.elapsed
        self._held_out_rows = held_out_rows
        self._used = problem.used
        if held_out_rows is not None:
            self._used = problem.without(held_out_rows).used
        self._proposal = problem.original("fit")
        self._rounds: list[Trained] = []
        self.held_out: TargetCounts | None = None
        self._caution: tuple[CautionPoint, ...] = ()
        self._n_counts = 0
        self._gain = 0.0  # in total
        self._gain_of_round = 0.0
        self._is_short = False  # for a round without the held-out samples

    def run(self, *, is_last: bool) -> FineTuned | None:
        """Makes all rounds; stops after a poor first one unless this is the last recipe to try.

        Returns None if the training is impossible or no time is left.
        """
        self._is_short = not self._has_time_for_more()
        while self._has_time_for_more() and self._round(self._used, is_last=False):
            self._count()
            if len(self._rounds) == 1 and not (is_last or self._does_well()):
                return self._result(is_done=False)
            if not self._goes_on():
                break
        self._caution = self._count_on_the_way_back()
        used = self._used if self._gain < 0 else self.problem.used
        is_done = self._round(used, is_last=True)
        if self._gain < 0:
            self._count()
        return self._result(is_done=is_done) if self._rounds else None

    def _has_time_for_more(self) -> bool:
        """True if an epoch and its count fit three times, as the last round needs some too."""
        return self.deadline.leaves(3 * (budget.FORWARD_BACKWARD + 1) * self.problem.clock.one_pass)

    def _round(self, used: Tensor, *, is_last: bool) -> bool:
        """Trains for one round on the samples marked in `used`; False if it cannot."""
        problem, deadline = self.problem, self.deadline
        if not deadline.leaves(problem.clock.one_pass):
            return False
        if not is_last and deadline.is_set:
            deadline = deadline.within(deadline.agreed_seconds_left() / 2)
        train = partial(self._train, self._weight().where(used, 0.0), deadline, is_last)
        trained = problem.work.once("round", train, Trained)
        if trained is None:
            return False
        if self._rounds:
            self._rounds[-1] = replace(self._rounds[-1], state={})  # to free its memory
        self._rounds.append(trained)
        self._previous = self._proposal.after
        self._proposal = problem.propose("fit", trained.state)
        return True

    def _train(self, weight: Tensor, deadline: Deadline, is_last: bool) -> Trained | None:
        problem = self.problem
        share = budget.LAST_ROUND_SHARE if is_last else budget.ROUND_SHARE
        epochs = max(1, round(share * problem.epochs))
        start = self._rounds[-1].state if self._rounds else {}
        if self.recipe.distilled:
            return distill(
                problem,
                start=start,
                epochs=epochs,
                deadline=deadline,
                weight=weight,
            )
        assert problem.training is not None
        return problem.training(
            seconds=deadline.agreed_seconds_left() - problem.clock.one_pass,
            seed=problem.seed + len(self._rounds),
            clock=problem.clock,
            start=start,
            weight=weight,
            epochs=epochs,
            rate=self.recipe.rate,
        )

    def _count(self) -> None:
        """Counts the held-out samples under the present weights."""
        rows = self._held_out_rows
        if rows is None:
            return
        after = self._proposal.after
        self._n_counts += 1
        self.held_out = estimate(self.problem.before, after, rows)
        self._gain = net_repairs_in_standard_errors(self.held_out)
        of_round = Flips.between(self._previous, after).counts(rows)
        self._gain_of_round = net_repairs_in_standard_errors(of_round)

    def _count_on_the_way_back(self) -> tuple[CautionPoint, ...]:
        """Counts the held-out samples for each of `cautions`, if there is time for it."""
        problem, held_out = self.problem, self.held_out
        passes = len(self.cautions) + budget.FORWARD_BACKWARD + 1
        has_time = self.deadline.leaves(passes * problem.clock.one_pass)
        rows = self._held_out_rows
        if rows is None or held_out is None or not has_time:
            return ()
        old, new = current_state(problem.model), self._proposal.state
        points = [CautionPoint(0.0, held_out)]
        for caution in self.cautions[1:]:
            after = problem.evaluate_some(between(old, new, 1 - caution), rows)
            points.append(CautionPoint(caution, estimate(problem.before, after, rows)))
        return tuple(points)

    def _does_well(self) -> bool:
        """True if many targets are repaired, or held-out repairs exceed what may be chance."""
        n_used = int((self.problem.before.targeted & self._used).sum())
        return self._gain > 1 or self._proposal.repaired >= HEALTHY_REPAIRS * n_used

    def _goes_on(self) -> bool:
        """True if another round before the last one may pay."""
        n_rounds = len(self._rounds)
        if self._rounds[-1].was_cut or n_rounds >= budget.MOST_ROUNDS:
            return False
        if n_rounds < budget.FEWEST_ROUNDS:
            return self._gain >= -CHANCE_STANDARD_ERRORS
        return self._gain > 1 and self._gain_of_round > 1

    def _weight(self) -> Tensor:
        """Returns the sampling weights of all known samples, `N`, for the next round."""
        before, after = self.problem.before, self._proposal.after
        weight = sample_weight(before)
        if not self._rounds and not self._is_short:
            return weight
        weight[_easy_samples(before, after)] *= budget.EASY_VISITS
        weight[before.passed & ~after.passed] *= budget.BROKEN_VISITS
        if self.held_out is not None and self._gain <= 1:
            other_failures = ~before.passed & ~before.targeted
            weight[other_failures] *= 0.0 if self._gain < 0 else budget.DOUBTED_VISITS
        return weight

    def _result(self, *, is_done: bool) -> FineTuned:
        trained = Trained(
            self._proposal.state,
            sum(trained.epochs for trained in self._rounds),
            sum(trained.planned for trained in self._rounds),
        )
        rate = "" if self.recipe.rate is None else f", rate {self.recipe.rate:.2g}"
        note = f"{self.recipe.name}{rate}, {trained.note}"
        if len(self._rounds) > 1:
            note += f" in {len(self._rounds)} rounds"
        if self.held_out is not None:
            counts = self.held_out
            note += f"; held-out samples: {counts.repaired:,} repaired, {counts.broken:,} broken"
        seconds = self.problem.clock.elapsed - self.began
        step = self._proposal.step(seconds, note, was_cut=trained.was_cut)
        if not is_done:
            step = replace(step, name="trial")
        return FineTuned(
            self._proposal, step, self.held_out, self._caution, is_done, self._n_counts
        )


def _easy_samples(before: SampleResults, after: SampleResults) -> Tensor:
    """Returns the rows of the passed samples with the lowest finite losses."""
    loss = after.loss.double().where(before.passed & after.passed, torch.inf)
    rows = loss.argsort(stable=True)[: int(budget.EASY_SHARE * int(before.passed.sum()))]
    return rows[loss[rows].isfinite()]


def sample_weight(before: SampleResults) -> Tensor:
    """Returns sampling weights, `N` float64: of a target its sample weight, at most 10; else 1."""
    return torch.where(before.targeted, before.weight.clamp(max=MAX_SAMPLE_WEIGHT), 1.0).double()
