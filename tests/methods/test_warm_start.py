"""A search that starts from what others propose: never below them, and nothing known at the brink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_repairs import known, trained
from toy_searcher import RandomLocalSearch

from lightning_nrl import ParticleSwarm, Target
from lightning_nrl._utils.state import snapshot
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import LocalSearch, Problem, Proposal, Solution, warm_started_search
from lightning_nrl.search import Fitness

QUICK = ParticleSwarm(particles=12, iterations=12)
ALL = Target.all()


def problem(layer: str = "2", seed: int = 0, target: Target = ALL, **changes: Any) -> Problem:
    model, sources = trained(seed=seed).eval(), known(seed)
    space, scope = find_scope(model, layer)
    before = Evaluator(model).run(sources, target)
    arguments: dict[str, Any] = {"localizer": NeuRecoverLite(n_weights=12), "fitness": Fitness(), "seed": seed}
    arguments |= {"passed": before.passed, **changes}
    return Problem(Evaluator(model), sources, before, space, scope, **arguments)


def other_layer(own: Problem) -> Proposal:
    """A proposal that changes the first layer alone, as another method would find it."""
    found = LocalSearch(QUICK)(problem("0", own.seed)).proposal
    assert found is not None
    return own.propose("other", found.state)


def total(solution: Solution) -> tuple[int, int]:
    assert solution.proposal is not None
    return solution.proposal.broken, solution.proposal.repaired


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_from_a_base_that_changes_another_layer(seed: int) -> None:
    own = problem(seed=seed)
    base, before = other_layer(own), snapshot(own.model)
    solution = warm_started_search(own, QUICK, [base], base=base.state)
    broken, repaired = total(solution)
    assert (broken, -repaired) <= (base.broken, -base.repaired)
    (step,) = solution.steps
    gain = f"+{repaired - base.repaired} repaired" if repaired > base.repaired else "nothing"
    assert step.note.endswith(f"iterations; {gain} over its seeds")
    assert solution.proposal is base or torch.equal(solution.proposal.state["0.weight"], base.state["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in snapshot(own.model).items())


def test_some_of_these_swarms_add_repairs() -> None:
    gains = []
    for seed in range(4):
        own = problem(seed=seed)
        base = other_layer(own)
        gains.append(total(warm_started_search(own, QUICK, [base], base=base.state))[1] - base.repaired)
    assert max(gains) > 0


def test_seeds_are_elites_and_nothing_better_gives_the_best_of_them() -> None:
    own = problem()
    seed = LocalSearch(QUICK)(own).proposal
    assert seed is not None
    assert seed.repaired > 0
    still = ParticleSwarm(particles=4, iterations=0, scale_min=1e-9, scale_max=1e-9)
    solution = warm_started_search(own, still, [seed])
    assert total(solution) == (seed.broken, seed.repaired)
    assert solution.result is not None
    assert solution.result.history.patched[0] >= seed.repaired or solution.proposal is seed


def test_what_a_base_repairs_beside_the_target_is_kept() -> None:
    own = problem(target=Target.label(0))
    base = other_layer(own)
    beside = base.after.passed & ~own.before.passed & ~own.before.targeted
    solution = warm_started_search(own, QUICK, [base], base=base.state)
    assert solution.n_passed == int((own.before.passed | beside).sum())
    assert solution.proposal is not None
    assert solution.proposal.after.passed[beside].all()


def test_every_known_passed_sample_counts_however_few_were_drawn() -> None:
    own = problem()
    drawn = torch.zeros_like(own.passed)
    drawn[own.passed.nonzero()[:2]] = True
    few = problem(passed=drawn)
    seed = LocalSearch(QUICK)(few).proposal
    assert seed is not None
    assert seed.broken > 0
    solution = warm_started_search(few, QUICK, [seed])
    assert total(solution)[0] == 0
    assert solution.n_passed == int(own.before.passed.sum())


def test_passed_samples_keep_half_of_their_margin_or_what_is_enough() -> None:
    own = problem()
    solution = warm_started_search(
        own, ParticleSwarm(particles=20, iterations=40), [Proposal("", {}, own.before, 0, 0)]
    )
    assert solution.proposal is not None
    assert solution.proposal.repaired > 0
    passed = own.before.passed
    margin = own.before.margin[passed]
    least = (margin / 2).clamp(max=0.04 * float(margin.median()))
    assert (solution.proposal.after.margin[passed] >= least - 1e-5).all()


def test_where_no_target_is_left_and_no_sample_is_near_the_border_nothing_is_searched() -> None:
    own = problem()
    margin = own.before.margin.clamp(min=float(own.before.margin[own.before.passed].median()))
    after = replace(own.before, passed=own.before.passed | own.before.targeted, margin=margin)
    seed = Proposal("all", {}, after, int(own.before.targeted.sum()), 0)
    solution = warm_started_search(own, QUICK, [seed], base=seed.state)
    assert solution.proposal is seed
    assert solution.result is None


def test_where_no_target_is_left_more_margin_is_searched_for_at_the_same_counts() -> None:
    own = problem()
    # Targets are right by a hair's breadth under the base, which is the original model with another bias.
    after = replace(
        own.before,
        passed=own.before.passed | own.before.targeted,
        margin=torch.where(own.before.targeted, 1e-4, own.before.margin),
    )
    seed = Proposal("all", {}, after, int(own.before.targeted.sum()), 0)
    solution = warm_started_search(own, QUICK, [seed], base=seed.state)
    assert solution.result is not None
    assert solution.localization is not None
    assert solution.proposal is not None
    assert solution.proposal.rank >= seed.rank


def test_any_searcher_goes_on_from_a_base() -> None:
    own = problem()
    base = other_layer(own)
    solution = warm_started_search(own, RandomLocalSearch(), [base], base=base.state)
    broken, repaired = total(solution)
    assert (broken, -repaired) <= (base.broken, -base.repaired)
    assert solution.steps[0].note.endswith("over its seeds")
