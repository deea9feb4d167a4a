"""Repairs parts of the target separately and merges these repairs by coefficients (DRWeightMerge)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.state import State, combined, current_state
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.targets import Target, parse_target
from lightning_nrl.errors import (
    ConfigurationError,
    EmptyLocalizationError,
    check_choice,
    check_kind,
    check_whole,
)
from lightning_nrl.evaluation.deployed_precision import rounding_reserve
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.methods.budget import TIME_SHARE_OF_PARTS
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import choose_samples, progress, record_known, scorer_for
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.published.bundles import bundle
from lightning_nrl.records.steps import Step
from lightning_nrl.search import (
    FITNESSES,
    SEARCHERS,
    ParticleSwarm,
    Searcher,
    SearchResult,
    WeightStats,
    search,
)
from lightning_nrl.search.fitness import FitnessFunction
from lightning_nrl.search.scores import Scorer, Scores

COEFFICIENT_SEARCHER = ParticleSwarm(particles=30, iterations=30, patience=10)


@dataclass(frozen=True, eq=False)
class MergedRepairs(Method):
    r"""Repairs parts of the target one by one from the original weights, then searches coefficients
    to
    mix the repairs.

    .. math:: \theta = \theta_0 + \sum_k c_k (\theta_k - \theta_0), \quad c_k \in [0, 1]

    The model has the parameters :math:`\theta_0` before and :math:`\theta_k` after the repair of
    part k. The fitness counts all targets and known passed samples by sample weight
    (`SampleOptions.risk`, `importance`, `protected`).

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
    method: str | Method | Searcher = "arachne"
    searcher: str | Searcher | None = None
    fitness: str | FitnessFunction | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            check_choice("MergedRepairs.parts", self.parts, ("confusion", "label"))
        else:
            hint = "MergedRepairs(['label 3', 'confusion 5 -> 6'])"
            check_kind(
                "MergedRepairs.parts",
                self.parts,
                isinstance(self.parts, Sequence),
                "list of targets",
                hint,
            )
            if not self.parts:
                raise ConfigurationError(
                    "`MergedRepairs.parts` is an empty list.", f"write {hint}."
                )
            object.__setattr__(self, "parts", tuple(parse_target(part) for part in self.parts))
        check_whole("MergedRepairs.most", self.most, 1)
        object.__setattr__(self, "method", _parse_method(self.method))
        if self.searcher is not None:
            object.__setattr__(
                self, "searcher", SEARCHERS.parse("MergedRepairs.searcher", self.searcher)
            )
        if self.fitness is not None:
            object.__setattr__(
                self, "fitness", FITNESSES.parse("MergedRepairs.fitness", self.fitness)
            )

    def __call__(self, problem: Problem) -> Solution:
        """Repairs the parts, then searches the coefficients; raises a `ConfigurationError` for an
        unsuitable part.
        """
        chosen = self._choose_parts(problem)
        found: list[Proposal] = []
        steps: list[Step] = []
        budget = TIME_SHARE_OF_PARTS * problem.clock.left
        for number, (name, rows) in enumerate(chosen.items()):
            proposal, step = self._repair_part(problem, name, rows, budget / len(chosen))
            steps.append(step)
            if proposal is not None and proposal.repaired:
                found.append(proposal)
            problem.clock.tell(number + 1, len(chosen))
        if not found:
            return Solution(None, "no part of the target was repaired.", tuple(steps))
        began = time.perf_counter()
        searcher: Any = COEFFICIENT_SEARCHER if self.searcher is None else self.searcher
        fitness: Any = problem.fitness if self.fitness is None else self.fitness
        states = [proposal.state for proposal in found]
        with problem.clock.stage("merge"):
            coefficients, result = search_coefficients(problem, states, searcher, fitness)
            together = problem.propose(
                "merge", combined(current_state(problem.model), states, coefficients)
            )
        shares = ", ".join(
            f"{one.name} {share:.2f}"
            for one, share in zip(found, coefficients.tolist(), strict=True)
        )
        steps.append(together.step(time.perf_counter() - began, shares))
        best = better([together, *found])
        if best is None or not best.repaired:
            return Solution(
                None, "no mix of the repairs is better than the original weights.", tuple(steps)
            )
        return Solution(best, "", tuple(steps), tuple(found), result=result)

    def _choose_parts(self, problem: Problem) -> dict[str, Tensor]:
        before = problem.before
        found: dict[str, Tensor] = {}
        if isinstance(self.parts, str):
            if bool((before.label < 0).all()):
                raise ConfigurationError(
                    f"`MergedRepairs.parts={self.parts!r}` needs classes, but the task has none.",
                    "give targets, such as `Target.where(predicate)`.",
                )
            columns = (before.label, before.prediction)[: 2 if self.parts == "confusion" else 1]
            for key in torch.stack(columns, 1)[before.targeted].unique(dim=0).tolist():
                mask = before.targeted.clone()
                for column, value in zip(columns, key, strict=True):
                    mask &= column == value
                found[" -> ".join(map(str, key)) if len(key) > 1 else f"label {key[0]}"] = mask
        else:
            for part in self.parts:
                assert isinstance(part, Target)
                mask = problem.evaluator.run(problem.known, part).targeted & before.targeted
                if mask.any():
                    found[str(part)] = mask
            if not found:
                raise ConfigurationError(
                    "`MergedRepairs.parts` contain no targeted sample.",
                    "give parts of the `target` of the repair.",
                )
        ranked = sorted(found.items(), key=lambda pair: -float(before.weight[pair[1]].sum()))
        return dict(ranked[: self.most])

    def _repair_part(
        self, problem: Problem, name: str, rows: Tensor, seconds: float
    ) -> tuple[Proposal | None, Step]:
        """Repairs one part as if it were the whole target. The proposal counts repairs in the whole
        target.
        """
        began, clock = time.perf_counter(), problem.clock
        own = StageTimer(clock.observer, seconds if math.isfinite(seconds) else None, clock.now)
        own.seconds.update({"collect": clock.one_pass})
        part = replace(problem, before=replace(problem.before, targeted=rows), needed={}, clock=own)
        method: Any = self.method
        try:
            solution = LocalSearch(method)(part) if isinstance(method, Searcher) else method(part)
        except EmptyLocalizationError as error:
            solution = Solution(None, error.problem)
        for stage, spent in own.seconds.items():
            if stage != "collect":
                clock.seconds[stage] = clock.seconds.get(stage, 0.0) + spent
        n, took = int(rows.sum()), time.perf_counter() - began
        if solution.proposal is None:
            return None, Step(name, 0, 0, round(took, 3), solution.reason)
        proposal = problem.counted(name, solution.proposal.state, solution.proposal.after)
        of_part = int((rows & proposal.after.passed).sum())
        return proposal, proposal.step(took, f"{of_part:,} of {n:,} targets of this part")


def _parse_method(method: Any) -> Any:
    if isinstance(method, str):
        return (
            SEARCHERS.parse("MergedRepairs.method", method)
            if method in SEARCHERS
            else bundle(method)
        )
    check_kind(
        "MergedRepairs.method",
        method,
        isinstance(method, (Method, Searcher)),
        "method",
        "'arachne'",
    )
    return method


def search_coefficients(
    problem: Problem, states: Sequence[State], searcher: Searcher, fitness: FitnessFunction
) -> tuple[Tensor, SearchResult]:
    """Searches the best coefficients of K states; returns the coefficients, `K`, and the log of the
    search.

    The search starts from the original weights, each state alone, the sum of all changes and the
    mean of the states.
    """
    device, k = problem.space.device, len(states)
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
    space, before = problem.space, problem.before
    if any(name not in space.parameters for state in states for name in state):
        return WholeModelScorer(problem, states), int(before.passed.sum())
    original = space.flat().to(widest(space.device))
    change = torch.stack([_flat(space, state).to(original) - original for state in states])
    where = (change != 0).any(0).nonzero().flatten()
    recorded = choose_samples(
        before, before.targeted, before.passed, problem.n_scored, problem.seed
    ).recorded
    recording = record_known(problem, recorded)
    failed, passed = before.targeted & recorded, before.passed & recorded
    reserve = rounding_reserve(problem.evaluator.precision, before)
    scorer = scorer_for(problem, recording, where, failed, passed, fitness, reserve=reserve)
    mixed = MixScorer(scorer, original[where], change[:, where], space.dtype)
    return mixed, int(passed.sum())


def _flat(space: ParameterSpace, state: State) -> Tensor:
    parameters = {**space.parameters, **state}
    return torch.cat([parameters[name].detach().flatten() for name in space.parameters])


@dataclass(frozen=True)
class MixScorer(Scorer):
    """Scores coefficients of merged repairs on recorded activations."""

    weights: Scorer  # scores the weights that differ between the states
    original: Tensor  # K, these weights before the repair
    change: Tensor  # n x K, their changes in n states
    dtype: torch.dtype  # of the model

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        mixed = self.original + values.clamp(0, 1).to(self.change) @ self.change
        return self.weights(mixed.to(self.dtype))


@dataclass(frozen=True)
class WholeModelScorer(Scorer):
    """Scores coefficients of merged repairs by passes of the whole model over all known data.

    A sample passes only if its margin is larger than any change by rounding in the deployed
    precision.
    """

    problem: Problem
    states: Sequence[State]

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        before = self.problem.before
        n_failed, n_passed = int(before.targeted.sum()), int(before.passed.sum())
        rows = [self._row(coefficients) for coefficients in values.clamp(0, 1)]
        columns = torch.tensor(rows, dtype=widest(values.device), device=values.device).T
        patched, intact, loss_failed, loss_passed, value, cost, credit_failed, credit_passed = (
            columns
        )
        scores = Scores(
            patched.float(),
            intact.float(),
            (loss_failed / max(1, n_failed)).float(),
            (loss_passed / max(1, n_passed)).float(),
            n_failed,
            n_passed,
            credit_failed=credit_failed,
            credit_passed=credit_passed,
        )
        if not before.weighted:
            return scores
        least = min(1.0, float(before.weight[before.targeted].min()))
        return replace(scores, value=value, cost=cost, least=least)

    def _row(self, coefficients: Tensor) -> list[float]:
        """Returns counts of passing samples, and sums of losses, sample weights and credits.

        Each quantity comes first for targets, then for passed samples.
        """
        problem, before = self.problem, self.problem.before
        after = problem.evaluate(combined(current_state(problem.model), self.states, coefficients))
        failed, passed, weight = before.targeted, before.passed, before.finite_weight
        reserve = rounding_reserve(problem.evaluator.precision, before)
        passes = after.passed
        if reserve is not None:
            passes = passes & (after.margin >= reserve)
        loss = after.loss.double() * weight
        credit = torch.where(passes, 1.0, 1 / (after.loss.double() + 1))
        counts = [(failed & passes).sum(), (passed & passes).sum()]
        losses = [loss[failed].sum(), loss[passed].sum()]
        weights = [weight[failed & passes].sum(), weight[passed & ~passes].sum()]
        credits = [credit[failed].sum(), credit[passed].sum()]
        return [float(total) for total in (*counts, *losses, *weights, *credits)]
