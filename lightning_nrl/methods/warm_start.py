"""A local search that starts at the results of other methods and never returns anything worse.

It changes some weights of one such result, the base. Every known passed sample has to keep some
margin, since unseen samples break where known samples nearly break.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, temporary_weights
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.deployed_precision import coarse_rounding
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import Flips
from lightning_nrl.methods.local_search import SearchGoal, localize_and_search
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import preparation_seconds
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search import Searcher
from lightning_nrl.search.fitness import FitnessFunction

ORIGINAL_WEIGHTS: State = MappingProxyType({})
NO_TIME_FOR_SEARCH = f"not run: {CUT}"
KEPT_MARGIN_SHARE = 0.5  # share of its margin that a sample has to keep
SUFFICIENT_MARGIN = (
    0.04  # share of the median margin of passed samples that suffices; a polish reaches it
)


def warm_started_search(
    problem: Problem,
    searcher: Searcher[Any],
    proposals: Sequence[Proposal],
    *,
    base: State = ORIGINAL_WEIGHTS,
    end: Deadline | None = None,
) -> Solution:
    """Puts `base` into the network, localises weights in the chosen layers, then searches new
    values
    for them.

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
    end = problem.deadline_of_method() if end is None else end
    if not end.leaves(preparation_seconds(problem)):
        best = better([start, *proposals])
        step = (
            Step("swarm", 0, 0, 0.0, NO_TIME_FOR_SEARCH, was_cut=True)
            if best is None
            else _step(best, 0.0, NO_TIME_FOR_SEARCH, was_cut=True)
        )
        return Solution(best, "no time was left for a search.", (step,))
    if start is None:
        with problem.clock.stage("judge"):
            start = problem.propose("base", base)
    best = better([start, *proposals]) or start
    problem = problem.steered(start.after)
    before, passes = problem.before, start.after.passed
    reserve = _reserve(problem, start)
    failed = before.targeted & ~passes
    kept = before.passed | (passes & ~before.targeted & problem.used)
    narrow = None if failed.any() else _narrow(problem, start)
    if narrow is not None and not narrow.any():
        note = "not run: no target is left to repair and no sample is near the boundary"
        return Solution(best, steps=(_step(best, 0.0, note),))
    if narrow is not None and reserve is not None:
        failed, kept = narrow, (kept | before.targeted) & ~narrow
        reserve = reserve.where(~narrow, _sufficient(problem))
    fitness = _constrained(problem, start)
    goal = SearchGoal(failed, passes & problem.used & ~failed, kept, fitness, reserve, end, narrow)
    original = problem.space.parameters
    with temporary_weights(problem.model, base):
        elites = partial(_elites, problem.space, original, proposals)
        found = localize_and_search(problem, searcher, goal, elites)
    new = None
    if found.state is not None:
        with problem.clock.stage("judge"):
            new = problem.propose("swarm", {**base, **found.state})
    final = better([best, new]) or best
    improvement = _improvement(best, final)
    if narrow is not None and new is not None and new.rank >= best.rank:
        was, now = (int(_narrow(problem, one).sum()) for one in (start, new))
        final, improvement = (
            (new, f"{was - now:,} of {was:,} margins widened") if now < was else (best, improvement)
        )
    return found.solution(
        final,
        steps=(
            _step(
                final, found.search.seconds, f"{found.note}; {improvement}", was_cut=found.was_cut
            ),
        ),
    )


def _step(proposal: Proposal, seconds: float, note: str, *, was_cut: bool = False) -> Step:
    return replace(proposal.step(seconds, note, was_cut=was_cut), name="swarm")


def _narrow(problem: Problem, proposal: Proposal) -> Tensor:
    """`N` bool, repaired targets with too small a margin, and passed samples whose margin has
    become too small.
    """
    before, after, sufficient = problem.before, proposal.after, _sufficient(problem)
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
    """Returns the proposals' values of the weights at `where`, `K` int64: `M x K`, best first,
    without duplicates.
    """
    ranked = sorted(proposals, key=lambda proposal: proposal.rank, reverse=True)
    states: list[State] = [*(proposal.state for proposal in ranked), {}]
    own = space.flat()[where]
    found: list[Tensor] = []
    for state in states:
        whole = {**original, **state}
        flat = torch.cat([whole[name].detach().flatten() for name in space.parameters])
        values = flat.to(own)[where]
        if values.isfinite().all() and not any(
            torch.equal(values, other) for other in (own, *found)
        ):
            found.append(values)
    return torch.stack(found[:n_elites]) if found else own.new_zeros(0, len(own))


def _reserve(problem: Problem, start: Proposal) -> Tensor | None:
    """Returns the margin each sample has to keep, `N`: part of its margin under `start`, or 0 if it
    fails.
    """
    margin = start.after.margin
    if margin.isnan().all():
        return None
    kept = (KEPT_MARGIN_SHARE * margin).nan_to_num(0.0)
    kept = kept.clamp(
        0, max(_sufficient(problem), coarse_rounding(problem.evaluator.precision, problem.before))
    )
    return torch.where(start.after.passed, kept, 0.0)


def _constrained(problem: Problem, start: Proposal) -> FitnessFunction:
    """Returns the fitness with a hard constraint: no more passed samples may break than the gate
    allows.
    """
    fitness = problem.fitness
    if not hasattr(fitness, "as_constraint"):
        return fitness
    counts = Flips.between(problem.before, start.after).counts(problem.used)
    constrained: FitnessFunction = fitness.as_constraint(float(problem.gate.allowed(counts)))
    return constrained


def _improvement(best: Proposal, final: Proposal) -> str:
    parts = []
    if final.broken != best.broken:
        parts.append(f"{final.broken - best.broken:+,} broken")
    if final.repaired != best.repaired:
        parts.append(f"{final.repaired - best.repaired:+,} repaired")
    return f"compared with its start: {' and '.join(parts) or 'no change'}"
