"""Repairs parts of the target separately and mixes these repairs (DRWeightMerge)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.state import State, combined, current_state
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data import Target, parse_target
from lightning_nrl.errors import (
    ConfigurationError,
    EmptyLocalizationError,
    check_choice,
    check_kind,
    check_whole,
)
from lightning_nrl.methods import (
    METHODS,
    AnyMethod,
    Method,
    Problem,
    Proposal,
    Solution,
    better,
    solve,
)
from lightning_nrl.methods.budget import TIME_SHARE_OF_PARTS
from lightning_nrl.methods.local_search import parse_parts
from lightning_nrl.methods.search_samples import choose_samples, progress, record_known, scorer_for
from lightning_nrl.records import Step
from lightning_nrl.search import (
    FITNESSES,
    SEARCHERS,
    FitnessFunction,
    ParticleSwarm,
    Searcher,
    SearchResult,
    WeightStats,
    search,
)
from lightning_nrl.search.scores import Scorer, Scores
from lightning_nrl.search.scoring.last_layer_scorer import sum_over_samples
from lightning_nrl.search.scoring.scorer import scores_of_sums

COEFFICIENT_SEARCHER = ParticleSwarm(particles=30, iterations=30, patience=10)


@dataclass(frozen=True, eq=False)
class MergedRepairs(Method):
    r"""Repairs parts of the target one by one from the original weights, then mixes the repairs.

    .. math:: \theta = \theta_0 + \sum_k c_k (\theta_k - \theta_0), \quad c_k \in [0, 1]

    The model has the parameters :math:`\theta_0` before and :math:`\theta_k` after the repair of
    part k. A search finds the coefficients. Its fitness counts all targets and known passed samples
    by sample weight (`SampleOptions.risk`, `importance`, `protected`).

    Attributes:
        parts: `confusion` makes a part of each pair of true and predicted class, `label` of each
            true class. A list of targets, as objects or text, is also possible; a sample in several
            parts is repaired in each.
        most: maximum number of parts, from 1. Only the parts with the largest total sample weight
            are repaired.
        method: repairs each part: a published method or a searcher by name, such as `arachne` or
            `swarm`, or an object.
        searcher: searches the coefficients, by name or as an object. None means a swarm of 30
            particles.
        fitness: compares the coefficients, by name or as an object. None means
            `SearchOptions.fitness`.

    Raises:
        ConfigurationError: on construction, for a value of the wrong type.

    Example:
        >>> MergedRepairs(["confusion 3 -> 5", "label 8"]).most
        8
    """

    parts: Literal["confusion", "label"] | Sequence[Target | str] = "confusion"
    most: int = 8
    method: str | AnyMethod = "arachne"
    searcher: str | Searcher | None = None
    fitness: str | FitnessFunction | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            check_choice("MergedRepairs.parts", self.parts, ("confusion", "label"))
        else:
            hint = "MergedRepairs(['label 3', 'confusion 5 -> 6'])"
            is_list = isinstance(self.parts, Sequence)
            check_kind("MergedRepairs.parts", self.parts, is_list, "list of targets", hint)
            if not self.parts:
                raise ConfigurationError(
                    "`MergedRepairs.parts` is an empty list.", f"write {hint}."
                )
            object.__setattr__(self, "parts", tuple(parse_target(part) for part in self.parts))
        check_whole("MergedRepairs.most", self.most, 1)
        parse_parts(self, "MergedRepairs.", method=METHODS, searcher=SEARCHERS, fitness=FITNESSES)

    def __call__(self, problem: Problem) -> Solution:
        """Repairs the parts, then searches the coefficients.

        Raises a `ConfigurationError` for an unsuitable part.
        """
        parts = self._choose_parts(problem)
        repaired = []
        steps = []
        seconds = TIME_SHARE_OF_PARTS * problem.clock.left / len(parts)
        for number, (name, rows) in enumerate(parts.items(), start=1):
            proposal, step = self._repair_part(problem, name, rows, seconds)
            steps.append(step)
            if proposal is not None and proposal.repaired:
                repaired.append(proposal)
            problem.clock.tell(number, len(parts))
        if not repaired:
            return Solution(None, "no part of the target was repaired.", steps)
        began = time.perf_counter()
        searcher = SEARCHERS.parse("searcher", self.searcher or COEFFICIENT_SEARCHER)
        fitness = FITNESSES.parse("fitness", self.fitness or problem.fitness)
        states = [proposal.state for proposal in repaired]
        with problem.clock.stage("merge"):
            coefficients, result = search_coefficients(problem, states, searcher, fitness)
            merged = problem.propose("merge", _mix(problem, states, coefficients))
        shares = []
        for proposal, share in zip(repaired, coefficients.tolist(), strict=True):
            shares.append(f"{proposal.name} {share:.2f}")
        steps.append(merged.step(time.perf_counter() - began, ", ".join(shares)))
        best = better([merged, *repaired])
        if best is None or not best.repaired:
            return Solution(
                None, "no mix of the repairs is better than the original weights.", steps
            )
        return Solution(best, "", steps, search=result)

    def _choose_parts(self, problem: Problem) -> dict[str, Tensor]:
        before = problem.before
        parts = self._by_class(problem) if isinstance(self.parts, str) else self._by_target(problem)
        ranked = sorted(parts.items(), key=lambda part: -float(before.weight[part[1]].sum()))
        return dict(ranked[: self.most])

    def _by_class(self, problem: Problem) -> dict[str, Tensor]:
        before = problem.before
        if bool((before.label < 0).all()):
            raise ConfigurationError(
                f"`MergedRepairs.parts={self.parts!r}` needs classes, but the task has none.",
                "give targets, such as `Target.where(predicate)`.",
            )
        parts = {}
        for label in before.label[before.targeted].unique().tolist():
            of_label = before.targeted & (before.label == label)
            if self.parts == "label":
                parts[f"label {label}"] = of_label
                continue
            for predicted in before.prediction[of_label].unique().tolist():
                parts[f"{label} -> {predicted}"] = of_label & (before.prediction == predicted)
        return parts

    def _by_target(self, problem: Problem) -> dict[str, Tensor]:
        parts = {}
        for target in self.parts:
            rows = problem.evaluator.run(problem.known, parse_target(target)).targeted
            rows = rows & problem.before.targeted
            if rows.any():
                parts[str(target)] = rows
        if not parts:
            raise ConfigurationError(
                "`MergedRepairs.parts` contain no targeted sample.",
                "give parts of the `target` of the repair.",
            )
        return parts

    def _repair_part(
        self, problem: Problem, name: str, rows: Tensor, seconds: float
    ) -> tuple[Proposal | None, Step]:
        """Repairs one part as if it were the whole target; the proposal counts all repairs."""
        began = time.perf_counter()
        clock = problem.clock
        timer = StageTimer(clock.observer, seconds if math.isfinite(seconds) else None, clock.now)
        timer.seconds["collect"] = clock.one_pass
        part = replace(
            problem, before=replace(problem.before, targeted=rows), needed={}, clock=timer
        )
        try:
            solution = solve(METHODS.parse("method", self.method), part)
        except EmptyLocalizationError as error:
            solution = Solution(None, error.problem)
        del timer.seconds["collect"]
        for stage, spent in timer.seconds.items():
            clock.seconds[stage] = clock.seconds.get(stage, 0.0) + spent
        took = time.perf_counter() - began
        if solution.proposal is None:
            return None, Step(name, 0, 0, round(took, 3), solution.reason)
        proposal = problem.counted(name, solution.proposal.state, solution.proposal.after)
        n_repaired = int((rows & proposal.after.passed).sum())
        return proposal, proposal.step(
            took, f"{n_repaired:,} of {int(rows.sum()):,} targets of this part"
        )


def _mix(problem: Problem, states: Sequence[State], coefficients: Tensor) -> State:
    return combined(current_state(problem.model), states, coefficients)


def search_coefficients(
    problem: Problem, states: Sequence[State], searcher: Searcher, fitness: FitnessFunction
) -> tuple[Tensor, SearchResult]:
    """Searches the best coefficients of K states; returns them, `K`, and the log of the search.

    The search starts from the original weights, each state alone, the sum of all changes and the
    mean of the states.
    """
    device = problem.space.device
    k = len(states)
    first = torch.cat([torch.eye(k, device=device), torch.ones(2, k, device=device)])
    first[-1] /= k
    scorer, n_passed = _scorer(problem, states, fitness)
    result = search(
        scorer,
        torch.zeros(k, dtype=torch.float32, device=device),
        WeightStats(0.5, 0.3, 0.0, 1.0),
        fitness=fitness,
        searcher=searcher,
        seed=problem.seed,
        elites=first[: searcher.n_candidates - 1],
        deadline=problem.deadline_of_method(),
        on_progress=progress(problem, searcher, n_passed),
    )
    return problem.collective.agreed(result.values.clamp(0, 1)), result


def _scorer(
    problem: Problem, states: Sequence[State], fitness: FitnessFunction
) -> tuple[Scorer, int]:
    """Returns a scorer of coefficients, and the number of passed samples that it scores.

    It runs on recorded activations if possible.
    """
    space = problem.space
    before = problem.before
    if any(name not in space.parameters for state in states for name in state):
        return WholeModelScorer(problem, states, fitness), int(before.passed.sum())
    original = space.flat().to(widest(space.device))
    change = torch.stack([space.flat(state).to(original) - original for state in states])
    where = (change != 0).any(0).nonzero().flatten()
    choice = choose_samples(before, before.passed, problem.n_scored, problem.seed)
    recording = record_known(problem, choice.recorded)
    failed = before.targeted & choice.recorded
    passed = before.passed & choice.recorded
    reserve = problem.rounding_reserve
    scorer = scorer_for(problem, recording, where, failed, passed, fitness, reserve)
    mixed = MixScorer(scorer, original[where], change[:, where], space.dtype)
    return mixed, int(passed.sum())


@dataclass(frozen=True)
class MixScorer:
    """Scores coefficients of merged repairs on recorded activations."""

    weights: Scorer  # scores the weights that differ between the states
    original: Tensor  # K, these weights before the repair
    change: Tensor  # n x K, their changes in n states
    dtype: torch.dtype  # of the model

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        mixed = self.original + values.clamp(0, 1).to(self.change) @ self.change
        return self.weights(mixed.to(self.dtype))


@dataclass(frozen=True)
class WholeModelScorer:
    """Scores coefficients of merged repairs by passes of the whole model over all known data.

    A sample passes only if its margin is larger than any change by rounding in the deployed
    precision.
    """

    problem: Problem
    states: Sequence[State]
    fitness: FitnessFunction

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        before = self.problem.before
        sums = torch.stack([self._sums(coefficients) for coefficients in values.clamp(0, 1)], -1)
        return scores_of_sums(
            sums.to(values.device, widest(values.device)),
            int(before.targeted.sum()),
            int(before.passed.sum()),
            min(1.0, float(before.weight[before.targeted].min())),
            values.dtype,
        )

    def _sums(self, coefficients: Tensor) -> Tensor:
        """Returns sums over targets and over passed samples, `2 x 4`, see `scores_of_sums`."""
        problem = self.problem
        before = problem.before
        after = problem.evaluate(_mix(problem, self.states, coefficients))
        passes = after.passed
        reserve = problem.rounding_reserve
        if reserve is not None:
            passes = passes & ~(after.margin < reserve)
        sums = []
        for rows, of_passed in ((before.targeted, False), (before.passed, True)):
            sums_of_rows = sum_over_samples(
                passes[None, rows],
                after.loss[None, rows].double(),
                before.finite_weight[rows],
                self.fitness,
                of_passed=of_passed,
            )
            sums.append(sums_of_rows[:, 0])
        return torch.stack(sums)
