"""Repairs the last Linear layer by convex optimisation; cross-validation chooses its price."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, check_whole
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods.budget import RECORDING_PASSES, TRIAL_PASSES
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.convex_head import MAX_MOMENT_RANK, regularization_path
from lightning_nrl.methods.solvers.known_head import KnownHead, head_state, not_last
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.replay_plan import ReplayPlan

# Prices of a target's missing margin. At 1 the median target would just be repaired on its own.
PRICES = tuple(2.0**power for power in range(-4, 6))
N_FOLDS = 4  # each sample from data sets with failures to repair is held out once
# Parts of the change, tried in turn, since the deployed model may round differently from the
# recording.
DEPLOYED_FRACTIONS = (1.0, 0.98, 0.9, 0.75, 0.5, 0.25)
NO_TIME_TO_SOLVE = "no time was left to solve anything."


@dataclass(frozen=True)
class Convex(Method):
    """Repairs the last Linear layer by the smallest change of the logits that breaks no sample.

    No known passed sample breaks. If there are more than `Problem.n_scored` samples, it is solved
    for as many, and a smaller part of the change is taken if all of it breaks another sample.

    The margin that a target lacks has a price: a higher price repairs more and changes more. Ten
    prices are tried, from low to high. The price with most repairs minus regressions in
    cross-validation wins.

    Attributes:
        patience: stops after this many prices in a row without a better held-out result. None means
            no limit.
        seconds: time limit in seconds.
        max_pairs: stops after a price that needs more than this number of constraints. A constraint
            is about one sample and one wrong class. None means no limit.

    Raises:
        ConfigurationError: on construction, for a `patience` or `max_pairs` below 1; when called,
            for several layers, a layer whose output is not the logits, or a task without classes.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classes", "recording")
    patience: int | None = None
    seconds: float = math.inf
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        for name, number in (("patience", self.patience), ("max_pairs", self.max_pairs)):
            if number is not None:
                check_whole(f"Convex.{name}", number, 1)

    def check_recording(self, recording: ActivationCache) -> None:
        """Raises a `ConfigurationError` unless the logits are the output of a Linear layer."""
        _check_layers(recording.space)
        for group in recording.groups:
            if not (isinstance(group.plan, ReplayPlan) and group.plan.is_last_layer):
                raise not_last(recording.space)

    def __call__(self, problem: Problem) -> Solution:
        """Solves at each price and takes the price that does best on held-out samples."""
        began = time.perf_counter()
        clock = problem.clock
        check_needs(self.needs, problem.before, problem.evaluator.task)
        _check_layers(problem.space)
        end = problem.deadline_of_method().within(self.seconds)
        passes = _passes_to_whiten(problem)
        if problem.record.cache is None:
            passes += RECORDING_PASSES
        if not end.leaves(passes * clock.one_pass):
            return Solution(None, NO_TIME_TO_SOLVE)
        with clock.stage("record"):
            known = KnownHead.record(problem)
        with clock.stage("solve"):
            if problem.record.cache is None:  # the chosen change takes a pass to count
                end = end.earlier(clock.one_pass)
            solved = _solve(problem, known, self, end)
            is_cut = problem.deadline.is_set and len(solved) < len(PRICES) and end.is_over()
            alternatives = []
            for price, (change, right) in zip(PRICES, solved, strict=False):
                after = replace(problem.before, passed=known.right(change))
                recorded = problem.counted(f"convex, price {price:g}", {}, after)
                after = replace(problem.before, passed=right)
                in_fold = known.recorded & (_folds(problem) >= 0)
                held_out = estimate(problem.before, after, in_fold)
                worth = _worth(problem, right)
                alternatives.append(_Alternative(price, change, recorded, held_out, worth))
        if not alternatives:
            return Solution(None, NO_TIME_TO_SOLVE)
        choice_note = known.note and f"; {known.note}"
        del known
        seconds = (time.perf_counter() - began) / len(alternatives)
        steps = [alternative.step(seconds, choice_note) for alternative in alternatives]
        best = max(alternatives, key=lambda alternative: alternative.rank)
        with clock.stage("judge"):
            began = time.perf_counter()
            proposal, fraction = _deployed(problem, best.change)
            note = f"price {best.price:g} is chosen"
            if fraction < 1:
                note += f", {fraction:.0%} of it"
            if is_cut:
                note += f"; higher prices were {CUT}"
            note += choice_note
            seconds = time.perf_counter() - began
        reason = ""
        if proposal is None:
            steps.append(Step("convex", 0, 0, round(seconds, 3), note, is_cut))
            reason = (
                "the change of the layer that is best on held-out samples repairs no target "
                "without a regression."
            )
        else:
            steps.append(proposal.step(seconds, note, was_cut=is_cut))
        return Solution(
            proposal,
            reason,
            steps,
            held_out=best.held_out,
            n_choices=len(alternatives),
        )


def _passes_to_whiten(problem: Problem) -> float:
    """Estimates the time to factor the moment of the layer's inputs, in passes."""
    d = problem.space.sites[0].module.weight.shape[-1]
    n = min(len(problem.before), problem.n_scored)
    # In double precision, which takes twice the time.
    return 2 * d * min(d, MAX_MOMENT_RANK) * (n + d) / (len(problem.before) * problem.n_parameters)


@dataclass(frozen=True)
class _Alternative:
    """The change at one price, which held-out samples may choose."""

    price: float
    change: Tensor  # C x d
    proposal: Proposal  # counts by the recording, without weights
    held_out: TargetCounts  # in cross-validation
    worth: float  # repairs minus regressions in cross-validation

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, larger is better: fewest missing repairs, most worth, any repair, low price."""
        return -self.proposal.missing, self.worth, self.proposal.repaired > 0, -self.price

    def step(self, seconds: float, choice_note: str) -> Step:
        counts = self.held_out
        note = f"held-out: {counts.repaired_in_target} repaired, {counts.broken} broken"
        return replace(self.proposal.step(seconds, note + choice_note), kind="alternative")


def _check_layers(space: ParameterSpace) -> None:
    names = [site.name for site in space.sites]
    if not names:
        raise ConfigurationError(space.obstacle, "name the last Linear layer as `layer`.")
    if len(names) > 1 or not isinstance(space.sites[0].module, torch.nn.Linear):
        raise ConfigurationError(
            f"`method='convex'` repairs only the last Linear layer, but `layer` names {names}.",
            "leave `layer` at 'auto', or use `method='finetune-polish'`.",
        )


@torch.no_grad()
def _solve(
    problem: Problem, known: KnownHead, method: Convex, end: Deadline
) -> list[tuple[Tensor, Tensor]]:
    """Collects the results of `_path`, which runs on the first rank, on all ranks."""
    collective = problem.collective
    logits = known.head.logits
    solved = []
    if collective.rank == 0:
        for change, right in _path(problem, known, method, end):
            solved.append((change.to("cpu", logits.dtype), right))
    return [(change.to(logits.device), right) for change, right in collective.of_first(solved)]


def _path(
    problem: Problem, known: KnownHead, method: Convex, end: Deadline
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each price the change, `C x d`, and a mask of samples, `N` bool.

    The mask marks the samples that are right in cross-validation. The samples of a fold are
    predicted with the change that was fitted without them. If time runs out at a price after the
    first, this price is left out.
    """

    def is_over() -> bool:
        return end.seconds_left <= 0  # of this rank, which solves for all ranks

    if is_over():
        return
    head = known.head
    max_pairs = math.inf if method.max_pairs is None else method.max_pairs
    fold = _folds(problem)
    kept = [torch.ones_like(head.targeted)]
    for number in range(N_FOLDS):
        in_fold = problem.related(fold == number)[known.rows]
        kept.append(~in_fold.to(head.label.device))
    paths = [regularization_path(head, PRICES, used, is_over, max_pairs) for used in kept]
    worths: list[float] = []
    for change, *changes_of_folds in zip(*paths, strict=False):
        if worths and is_over():
            return
        right = problem.before.passed.clone()
        for number, change_of_fold in enumerate(changes_of_folds):
            right = torch.where(fold == number, known.right(change_of_fold), right)
        yield change, right
        worths.append(_worth(problem, right))
        problem.clock.tell(len(worths), len(PRICES))
        n_stalled = len(worths) - 1 - worths.index(max(worths))
        if is_over() or (method.patience is not None and n_stalled >= method.patience):
            return


def _worth(problem: Problem, right: Tensor) -> float:
    before, weight = problem.before, problem.before.finite_weight
    lost = float(weight[before.passed & ~right].sum())
    return float(weight[before.targeted & right].sum()) - lost


def _folds(problem: Problem) -> Tensor:
    """Draws a fold, `N` int64, for each sample from data sets with failures to repair.

    Samples of a group are in the same fold. Other samples get -1.
    """
    before = problem.before
    fold = torch.full_like(before.label, -1)
    eligible = problem.came_with_failures & problem.used
    generator = torch.Generator().manual_seed(problem.seed)
    if before.group is not None:
        groups, number = before.group[eligible].unique(return_inverse=True)
        fold[eligible] = (torch.randperm(len(groups), generator=generator) % N_FOLDS)[number]
        return fold
    for kind in (before.passed, before.targeted, ~before.passed & ~before.targeted):
        rows = (eligible & kind).nonzero().flatten()
        fold[rows] = torch.randperm(len(rows), generator=generator) % N_FOLDS
    return fold


def _deployed(problem: Problem, change: Tensor) -> tuple[Proposal | None, float]:
    """Finds the largest part of a change with which the deployed model breaks nothing.

    Returns None instead of a proposal if nothing is repaired.
    """
    for fraction in DEPLOYED_FRACTIONS:
        if fraction < 1 and not problem.deadline.leaves(TRIAL_PASSES * problem.clock.one_pass):
            break
        proposal = problem.propose("convex", head_state(problem, fraction * change))
        if not proposal.broken:
            return (proposal if proposal.repaired else None), fraction
    return None, 0.0
