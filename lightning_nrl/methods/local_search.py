"""Localise, then search by particle swarm: the method of the paper (section II), alone or from what others propose.

Alone it searches from the original weights. Given a base, it searches the localised weights of the chosen layer while
the rest of the network is as in the base; what other methods propose for these weights are its elites, so that it never
ends below them, and every known passed sample is a constraint with a margin of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._scoring import ActivationCache, make_scorer, record
from lightning_nrl._utils.state import State, between, holding
from lightning_nrl.data.batch import Batch
from lightning_nrl.localization import Localization
from lightning_nrl.problem import Problem, Proposal, Solution, better
from lightning_nrl.search import ParticleSwarm, SearchHistory, SearchResult, WeightStats, search
from lightning_nrl.search.fitness import Fitness

__all__ = ["by_swarm", "half", "rows"]

NOTHING: State = MappingProxyType({})

SHARE = 0.5
"""The part of its margin that a sample must keep."""

ENOUGH = 0.04
"""A margin that suffices, in parts of the median margin of passed samples: where a polish brings samples to, too."""

BEYOND = (1.15, 1.3)
"""Steps beyond the base, from the original weights on: often free after a polish."""

SPARE = 3
"""Passes over known data that are left for judging when the time of a search is over."""


@dataclass(frozen=True)
class _Task:
    """What one swarm is to do.

    Attributes:
        failed: `N` bool, samples that still fail, to localise by.
        right: `N` bool, samples that pass, to localise against.
        passed: `N` bool, the samples that candidates may not break.
        reserve: `N`, the margin that each sample must keep to count as passing; None: any.
        fitness: how candidates are ranked.
        is_over: whether its time is over; None: never.
    """

    failed: Tensor
    right: Tensor
    passed: Tensor
    reserve: Tensor | None
    fitness: Fitness
    is_over: Callable[[], bool] | None


def by_swarm(
    problem: Problem,
    settings: ParticleSwarm,
    *,
    base: State = NOTHING,
    seeds: Sequence[Proposal] = (),
    seconds: float = math.inf,
) -> Solution:
    """Localises weights of the chosen layers and searches new values for them.

    Args:
        problem: what is to be repaired.
        settings: of the swarm.
        base: the weights to start from, of any part of the network; a proposal of `seeds` may have this very state.
            Nothing: the original weights.
        seeds: what other methods found. What they have at the localised weights are elites, the best ones if there are
            many. With a base or seeds every known passed sample is a constraint, and what the base repairs beside the
            target is too. What passes under the base counts as passing while it keeps half of its margin there, or a
            small one if that is less: near misses on known data are misses on unseen data.
        seconds: that the search may take.

    Returns:
        The best of base, seeds and what was found. The note of its step says what the swarm added to them.

    Raises:
        EmptyLocalizationError: no weight matters for the failed data without mattering for the passed.
    """
    if not base and not seeds:
        return _alone(problem, settings, seconds)
    start = next((seed for seed in seeds if seed.state is base), None)
    if start is None:
        with problem.clock.stage("judge"):
            start = problem.propose("base", base)
    best = better([start, *seeds])
    assert best is not None
    problem = problem.steered(start.after)
    failed = problem.before.targeted & ~start.after.passed
    if not failed.any():
        step = replace(best.step(0.0, "not run: no target is left for it"), name="swarm")
        return Solution(best, steps=(step,))
    task = _Task(
        failed,
        start.after.passed,
        problem.before.passed | (start.after.passed & ~problem.before.targeted),
        _reserve(problem, start),
        _constrained(problem.fitness),
        _deadline(problem, seconds),
    )
    original = {name: value for site in problem.space.sites for name, value in site.parameters.items()}
    with holding(problem.model, base):
        elites = partial(_elites, problem.space, original, base, seeds)
        localization, result, unchanged, change = _run(problem, settings, task, elites)
    found = None
    if not unchanged:
        with problem.clock.stage("judge"):
            found = problem.propose("swarm", {**base, **change})
    gained = better([best, found])
    assert gained is not None
    note = f"{len(result.values):,} weights, {result.iterations:,} iterations; {_gain(best, gained)}"
    step = replace(gained.step(result.seconds, note), name="swarm")
    n_passed = int(task.passed.sum())
    return Solution(gained, steps=(step,), localization=localization, result=result, n_passed=n_passed)


def _alone(problem: Problem, settings: ParticleSwarm, seconds: float) -> Solution:
    """The paper's search from the original weights, candidates scored on I_pos alone."""
    task = _Task(
        problem.before.targeted,
        problem.before.passed,
        problem.passed,
        None,
        problem.fitness,
        _deadline(problem, seconds),
    )
    localization, result, unchanged, change = _run(problem, settings, task)
    if unchanged:
        reason = "the search found nothing better than the original weights."
        return Solution(None, reason, localization=localization, result=result)
    with problem.clock.stage("judge"):
        proposal = problem.propose("swarm", change)
    step = proposal.step(result.seconds, f"{len(result.values):,} weights, {result.iterations:,} iterations")
    return Solution(proposal, steps=(step,), localization=localization, result=result)


def _run(
    problem: Problem,
    settings: ParticleSwarm,
    task: _Task,
    elites: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Localization, SearchResult, bool, State]:
    """Localises and searches from the weights that the model has now.

    Returns:
        The weights, the search, whether it found nothing else, and whole tensors with what it found.
    """
    space, clock = problem.space, problem.clock
    with clock.stage("localize"):
        recording = record(
            problem.model,
            rows(problem),
            space,
            problem.task,
            problem.before.targeted | task.right | task.passed,
            context=problem.context,
            budget=half(problem.budget),
        )
        localization = problem.localizer(
            recording, problem.task, failed=task.failed, passed=task.right, collective=problem.collective
        )
    where = localization.weights.to(space.device)
    with clock.stage("search"):
        known = None if elites is None else elites(where, settings.particles)
        result = _search(problem, settings, task, recording, where, known)
    values = problem.collective.agreed(result.values)
    return localization, result, torch.equal(values, space.flat()[where]), space.changed(where, values)


@torch.no_grad()
def _search(
    problem: Problem,
    settings: ParticleSwarm,
    task: _Task,
    recording: ActivationCache,
    where: Tensor,
    elites: Tensor | None,
) -> SearchResult:
    space, before = recording.space, problem.before
    passed_loss = getattr(task.fitness, "uses_passed_loss", True)
    scorer = make_scorer(
        recording,
        where,
        before.targeted,
        task.passed,
        problem.task,
        collective=problem.collective,
        budget=half(problem.budget),
        passed_loss=passed_loss,
        fragility=before.loss,
        reserve=task.reserve,
        weight=before.finite_weight if before.weighted else None,
    )
    result = search(
        scorer,
        space.flat()[where],
        stats=WeightStats.around(space, where),
        fitness=task.fitness,
        searcher=settings,
        seed=problem.seed,
        elites=elites,
        is_over=task.is_over,
        on_progress=partial(_tell, problem, settings.iterations, int(task.passed.sum())),
    )
    if passed_loss:
        return result
    unknown = torch.full_like(result.history.loss_passed, torch.nan)
    return replace(result, history=replace(result.history, loss_passed=unknown))


def _elites(
    space: ParameterSpace, original: State, base: State, seeds: Sequence[Proposal], where: Tensor, particles: int
) -> Tensor:
    """What seeds have at the localised weights, best first, and steps beyond the base: `M x K`, none of them twice."""
    ranked = sorted(seeds, key=lambda seed: seed.rank, reverse=True)
    beyond = (
        [between(original, {name: base.get(name, value) for name, value in original.items()}, step) for step in BEYOND]
        if base
        else []
    )
    states: list[State] = [*(seed.state for seed in ranked), *beyond, {}]
    own = space.flat()[where]
    found: list[Tensor] = []
    for state in states:
        whole = {**original, **state}
        flat = torch.cat([whole[name].detach().flatten() for site in space.sites for name in site.parameters])
        values = flat.to(own)[where]
        if values.isfinite().all() and not any(torch.equal(values, other) for other in (own, *found)):
            found.append(values)
    return torch.stack(found[: particles // 2]) if found else own.new_zeros(0, len(own))


def _reserve(problem: Problem, start: Proposal) -> Tensor | None:
    """The margin that each sample must keep: a part of what it has at the start, none if it fails there."""
    margin, passed = start.after.margin, problem.before.passed
    if margin.isnan().all():
        return None
    enough = ENOUGH * float(problem.before.margin[passed].median())
    return torch.where(start.after.passed, (SHARE * margin).nan_to_num(0.0).clamp(0, enough), 0.0)


def _constrained(fitness: Fitness) -> Fitness:
    """The fitness with every passed sample as a hard constraint."""
    if not isinstance(fitness, Fitness):
        return fitness
    return replace(fitness, perfect_intact=True, infeasible="ranked")


def _deadline(problem: Problem, seconds: float) -> Callable[[], bool] | None:
    """Whether a search has to end, the same on all ranks: it has had its seconds, or those of the repair run out."""
    clock = problem.clock
    if seconds == math.inf and clock.left == math.inf:
        return None
    end = clock.elapsed + seconds
    spare = SPARE * clock.one_pass
    return lambda: problem.collective.any(clock.elapsed >= end or clock.left <= spare)


def _gain(best: Proposal, found: Proposal) -> str:
    """What a swarm added to what it started from."""
    parts = []
    if found.broken != best.broken:
        parts.append(f"{found.broken - best.broken:+,} broken")
    if found.repaired != best.repaired:
        parts.append(f"{found.repaired - best.repaired:+,} repaired")
    return f"{' and '.join(parts) or 'nothing'} over its seeds"


def rows(problem: Problem) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's known data, each batch with the rows of its samples in the evidence."""
    for source in problem.known:
        for batch in source:
            yield batch, problem.before.rows(source.split, batch.position)


def half(budget: int | None) -> int | None:
    """ActivationCache and scoring share what the search may use."""
    return None if budget is None else max(1, budget // 2)


def _tell(problem: Problem, total: int, n_passed: int, done: int, history: SearchHistory) -> None:
    problem.clock.tell(done, total, int(history.patched[-1]), n_passed - int(history.intact[-1]))
