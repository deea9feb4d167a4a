"""Samples of a group are held out together, and unused in all splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_problems import FakeTraining, make_problem, retrained
from toy_repairs import known, trained

from lightning_nrl import ParticleSwarm
from lightning_nrl._utils.resume import from_bytes, to_bytes
from lightning_nrl.evaluation.sample_results import FlipCounts, GroupCounts
from lightning_nrl.evaluation.stats import net_repairs_in_standard_errors, variance_of_net_rate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Convex, Problem, Solution
from lightning_nrl.methods.convex import N_FOLDS, _folds
from lightning_nrl.methods.held_out import draw_held_out_rows

AUTO = Auto(ParticleSwarm(particles=12, iterations=12))


def make(group: torch.Tensor | None = None, **settings: Any) -> Problem:
    """120 samples of `train`, then 60 of `new` with failures to repair."""
    problem = replace(
        make_problem(trained(), known(), **settings), localizer=NeuRecoverLite(n_weights=12)
    )
    return replace(problem, before=replace(problem.before, group=group))


# Patients 0 to 9 have six samples each in `new`; those below 5 have some in `train`, too.
NEW = torch.arange(60) // 6
TRAIN = torch.where(torch.arange(120) < 20, torch.arange(120) % 5, 100 + torch.arange(120))
PATIENTS = torch.cat([TRAIN, NEW])


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_as_a_whole(seed):
    problem = make(PATIENTS, seed=seed)
    before = problem.before
    rows = draw_held_out_rows(problem)
    held_out = problem.without(rows)
    drawn = PATIENTS[rows].unique()
    # Only samples of `new` are counted, and no other sample of these patients is used.
    assert not rows[:120].any()
    assert torch.equal(rows[120:], torch.isin(NEW, drawn))
    assert torch.equal(~held_out.used, torch.isin(PATIENTS, drawn))
    unused = ~held_out.used
    assert (unused & before.targeted).sum() <= before.targeted.sum() / 2
    assert (unused & before.passed).sum() <= before.passed.sum() / 5


def test_groups_of_protected_samples_are_used_as_a_whole():
    problem = make(PATIENTS)
    rows = draw_held_out_rows(problem)
    assert rows is not None
    protected = int((problem.without(rows).related(rows) & problem.before.passed).nonzero()[0])
    assert protected < 120  # in `train`, while its patient has samples in `new`
    weight = problem.before.weight.clone()
    weight[protected] = torch.inf
    problem = replace(problem, before=replace(problem.before, weight=weight))
    rows = draw_held_out_rows(problem)
    assert rows is not None
    used = problem.without(rows).used
    assert used[PATIENTS[protected] == PATIENTS].all()
    assert torch.equal(~used, torch.isin(PATIENTS, PATIENTS[rows].unique()))


def test_a_single_group_leaves_nothing_to_hold_out():
    assert draw_held_out_rows(make(torch.zeros(180).long())) is None


def test_a_group_is_in_one_fold():
    fold = _folds(make(PATIENTS))
    assert (fold[:120] == -1).all()
    for patient in range(10):
        assert len(fold[120:][patient == NEW].unique()) == 1
    assert len(fold[120:].unique()) == min(N_FOLDS, 10)


@pytest.mark.parametrize("group", [PATIENTS, torch.zeros(180).long()])
def test_the_exact_solution_is_cross_validated_by_group(group):
    solution = Convex()(make(group, layer="2"))
    # All groups with samples in `new`.
    assert solution.held_out.groups.passed == len(group[120:].unique())


def test_counts_of_groups_survive_a_resume():
    solution = AUTO(make(PATIENTS))
    again = from_bytes(to_bytes(solution), Solution)
    assert solution.rungs[0].held_out.groups is not None
    assert again.rungs == solution.rungs
    assert again.proposal.after.group is not None
    assert torch.equal(again.proposal.after.group, PATIENTS)


def test_the_default_trains_without_the_held_out_patients():
    problem = make(PATIENTS)
    rows = draw_held_out_rows(problem)
    training = FakeTraining(retrained(problem.model))
    solution = AUTO(replace(problem, training=training))
    first, second, last = (call["weight"] == 0 for call in training.calls)
    unused = torch.isin(PATIENTS, PATIENTS[rows])
    assert torch.equal(first, unused)
    assert torch.equal(second, unused)
    assert not last.any()
    held_out = solution.rungs[1].held_out
    assert held_out.n == rows.sum()
    assert held_out.groups is not None


def test_standard_errors_count_groups():
    alone = FlipCounts(80, 4, 12, 4)
    assert variance_of_net_rate(alone) == 16 / 84**2
    assert net_repairs_in_standard_errors(alone) == 8 / 4
    # Twelve repairs in one group and four breaks in another are two independent events.
    groups = GroupCounts(9, 1, 5, 1, 1, 1, squared_net=12**2 + 4**2)
    grouped = replace(alone, groups=groups)
    assert variance_of_net_rate(grouped) == 160 / 84**2
    assert net_repairs_in_standard_errors(grouped) == pytest.approx(8 / 160**0.5)
