"""A local search that starts at the results of other methods and never returns anything worse.

It changes some weights of one such result, the base. Every known passed sample has to keep some
margin, since unseen samples break where known samples nearly break.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, temporary_weights
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import Flips
from lightning_nrl.methods.local_search import SearchGoal, localize_and_search
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import preparation_seconds
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search import Searcher

ORIGINAL_WEIGHTS: State = MappingProxyType({})
NO_TIME_FOR_SEARCH = f"not run: {CUT}"
KEPT_MARGIN_SHARE = 0.5  # share of its margin that a sample has to keep
# Share of the median margin of passed samples that suffices. A polish reaches it.
SUFFICIENT_MARGIN = 0.04


def warm_started_search(
    problem: Problem,
    searcher: Searcher,
    proposals: Sequence[Proposal],
    *,
    base: State = ORIGINAL_WEIGHTS,
    end: Deadline | None = None,
) -> Solution:
    """Puts `base` into the network, localises weights, then searches new values for them.

    Returns the best of `base`, the proposals and the result of the search. In the search, a sample
    that passes with `base` must keep half of its margin, or the share `SUFFICIENT_MARGIN` of the
    median margin if that is less. This includes failures outside the target that `base` repairs. If
    `base` repairs all targets, small margins are widened.

    `base` may change any part of the network. If it is the `state` object of a proposal, the
    results of this proposal are used and not measured again. The search starts from `base` and from
    the values of the best proposals.
    """
    start = next((proposal for proposal in proposals if proposal.state is base), None)
    if start is None and not base:
        start = problem.original("base")
    if end is None:
        end = problem.deadline_of_method()
    if not end.leaves(preparation_seconds(problem)):
        return _without_time(better([start, *proposals]))
    if start is None:
        with problem.clock.stage("judge"):
            start = problem.propose("base", base)
    best = better([start, *proposals]) or start
    problem = problem.steered(start.after)
    goal = _goal(problem, start, end)
    if goal is None:
        note = "not run: no target is left to repair and no sample is near the boundary"
        return Solution(best, steps=(_step(best, 0.0, note),))
    elites = partial(_elites, problem.space, problem.space.parameters, proposals)
    with temporary_weights(problem.model, base):
        search = localize_and_search(problem, searcher, goal, elites)
    final = best
    improvement = "compared with its start: no change"
    if search.state is not None:
        with problem.clock.stage("judge"):
            new = problem.propose("swarm", {**base, **search.state})
        final, improvement = _compared(problem, start, best, new, widens=goal.scored is not None)
    note = f"{search.note}; {improvement}"
    step = _step(final, search.search.seconds, note, was_cut=search.was_cut)
    return search.solution(final, steps=(step,))


def _without_time(best: Proposal | None) -> Solution:
    step = Step("swarm", 0, 0, 0.0, NO_TIME_FOR_SEARCH, was_cut=True)
    if best is not None:
        step = _step(best, 0.0, NO_TIME_FOR_SEARCH, was_cut=True)
    return Solution(best, "no time was left for a search.", (step,))


def _step(proposal: Proposal, seconds: float, note: str, *, was_cut: bool = False) -> Step:
    return replace(proposal.step(seconds, note, was_cut=was_cut), name="swarm")


def _goal(problem: Problem, start: Proposal, end: Deadline) -> SearchGoal | None:
    """Returns the goal of a search from `start`.

    It is to repair targets or, if all are repaired, to widen small margins. None if there are none.
    """
    before = problem.before
    passes = start.after.passed
    failed = before.targeted & ~passes
    kept = before.passed | (passes & ~before.targeted & problem.used)
    reserve = _reserve(problem, start)
    narrow = None
    if not failed.any():
        narrow = _narrow(problem, start)
        if not narrow.any():
            return None
        if reserve is not None:
            failed = narrow
            kept = (kept | before.targeted) & ~narrow
            reserve = reserve.where(~narrow, _sufficient(problem))
    passed = passes & problem.used & ~failed
    # The gate limits the passed samples that break.
    counts = Flips.between(before, start.after).counts(problem.used)
    fitness = problem.fitness.as_constraint(float(problem.gate.allowed(counts)))
    return SearchGoal(failed, passed, kept, fitness, reserve, end, narrow)


def _compared(
    problem: Problem, start: Proposal, best: Proposal, new: Proposal, *, widens: bool
) -> tuple[Proposal, str]:
    """Returns the proposal to take, and how it differs from the best proposal so far."""
    final = better([best, new]) or best
    differences = []
    if final.broken != best.broken:
        differences.append(f"{final.broken - best.broken:+,} broken")
    if final.repaired != best.repaired:
        differences.append(f"{final.repaired - best.repaired:+,} repaired")
    improvement = f"compared with its start: {' and '.join(differences) or 'no change'}"
    if not widens or new.rank < best.rank:
        return final, improvement
    n_before = int(_narrow(problem, start).sum())
    n_after = int(_narrow(problem, new).sum())
    if n_after < n_before:
        return new, f"{n_before - n_after:,} of {n_before:,} margins widened"
    return best, improvement


def _narrow(problem: Problem, proposal: Proposal) -> Tensor:
    """Marks repaired targets with too small a margin, `N` bool.

    Passed samples whose margin has become too small are marked, too.
    """
    before = problem.before
    after = proposal.after
    sufficient = _sufficient(problem)
    was_wider = before.targeted | (before.passed & (before.margin > sufficient))
    return was_wider & after.passed & (after.margin < sufficient)


def _sufficient(problem: Problem) -> float:
    return SUFFICIENT_MARGIN * problem.before.margin_unit


def _elites(
    space: ParameterSpace,
    original: State,
    proposals: Sequence[Proposal],
    where: Tensor,
    n_elites: int,
) -> Tensor:
    """Returns the proposals' values of the weights at `where`, `K` int64: `M x K`, best first."""
    ranked = sorted(proposals, key=lambda proposal: proposal.rank, reverse=True)
    present = space.flat()[where]
    rows = [present]
    for state in [*[proposal.state for proposal in ranked], ORIGINAL_WEIGHTS]:
        values = space.flat({**original, **state}).to(present)[where]
        is_new = not any(torch.equal(values, row) for row in rows)
        if is_new and values.isfinite().all():
            rows.append(values)
    return torch.stack(rows)[1 : 1 + n_elites]


def _reserve(problem: Problem, start: Proposal) -> Tensor | None:
    """Returns the margin each sample has to keep, `N`: part of its present one, 0 if it fails."""
    margin = start.after.margin
    if margin.isnan().all():
        return None
    kept = (KEPT_MARGIN_SHARE * margin).nan_to_num(0.0)
    kept = kept.clamp(0, max(_sufficient(problem), problem.rounding))
    return torch.where(start.after.passed, kept, 0.0)
