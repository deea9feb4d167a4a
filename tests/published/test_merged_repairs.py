"""Repairs of parts of a target, merged by coefficients: by hand on a line, then a network."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from toy_problems import left_alone, on_a_line, threshold
from toy_repairs import known, trained

from lightning_nrl import (
    ConfigurationError,
    ParticleSwarm,
    SampleOptions,
    Settings,
    Target,
    repair_module,
)
from lightning_nrl.methods import METHODS, Method, Problem, Solution
from lightning_nrl.published import ArachneDEFitness, MergedRepairs, bundle
from lightning_nrl.published.merged_repairs import WholeModelScorer, _scorer
from lightning_nrl.search import Fitness

QUICK = ParticleSwarm(particles=12, iterations=12)
PARTS = [
    Target.where(lambda batch: batch[0][:, 0] > 0.65, "above"),  # 0.7 of the two targets
    Target.where(lambda batch: batch[0][:, 0] < 0.65, "below"),  # 0.5
]


@dataclass(frozen=True)
class Lowered(Method):
    """A method that lowers the threshold of `on_a_line`: to 0.65 for the target 0.7, to 0.45 for
    0.5.
    """

    def __call__(self, problem: Problem) -> Solution:
        (row,) = problem.before.targeted.nonzero().flatten().tolist()
        return Solution(problem.propose("lowered", threshold({5: 0.65, 6: 0.45}[row])))


def test_parts_are_repaired_alone_and_mixed_without_a_regression():
    problem = on_a_line()
    with left_alone(problem.model):
        solution = MergedRepairs(PARTS, method=Lowered())(problem)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert [(step.name, step.repaired, step.broken) for step in solution.steps] == [
        ("where above", 1, 0),
        ("where below", 2, 1),  # who repairs 0.5 repairs 0.7 too, and breaks 0.6
        ("merge", 1, 0),
    ]
    assert solution.steps[0].note == "1 of 1 targets of this part"
    assert solution.steps[2].note.startswith("where above ")
    alone = MergedRepairs(PARTS[1:], method=Lowered())(problem).proposal
    assert (alone.repaired, alone.broken) == (1, 0)
    greedy = MergedRepairs(PARTS, method=Lowered(), fitness="arachne-de")(problem)
    assert greedy.steps[-1].repaired == 2


@pytest.mark.parametrize("weighted", [False, True])
def test_recorded_activations_and_whole_passes_score_alike(weighted):
    problem = on_a_line()
    if weighted:
        weight = torch.tensor([1, 1, 1, 1, 3, 1.5, 0.5], dtype=torch.float64)
        problem = replace(problem, before=replace(problem.before, weight=weight))
    states = [threshold(0.65), threshold(0.45)]
    values = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.5, 0.3]])
    whole = WholeModelScorer(problem, states, ArachneDEFitness())(values)
    fast = _scorer(problem, states, ArachneDEFitness())[0](values)
    assert whole.patched.tolist() == [0, 1, 2, 1, 1]
    assert whole.intact.tolist() == [5, 5, 4, 5, 5]
    for name, expected in vars(whole).items():
        if isinstance(expected, torch.Tensor):
            close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
            torch.testing.assert_close(vars(fast)[name], expected, **close)
    if weighted:
        assert whole.cost.tolist() == [0, 0, 3, 0, 0]


def test_a_mix_in_bfloat16_passes_only_what_rounding_does_not_flip():
    # At 0.69 the target 0.7 passes by 0.01; bfloat16 rounds the median margin of 1.25 by 0.02.
    for context, patched in ((nullcontext, 1), (partial(torch.autocast, "cpu", torch.bfloat16), 0)):
        problem, states = on_a_line(context=context), [threshold(0.69)]
        for scorer in (
            _scorer(problem, states, Fitness())[0],
            WholeModelScorer(problem, states, Fitness()),
        ):
            scores = scorer(torch.ones(1, 1))
            assert (int(scores.patched), int(scores.intact)) == (patched, 5)


def test_pairs_of_classes_are_parts_and_risks_are_their_weights():
    risk = {(0, 1): 4, 2: 3}
    part = bundle("arachne", searcher=QUICK)
    settings = Settings(
        method=MergedRepairs(method=part, most=2), layer="2", samples=SampleOptions(risk=risk)
    )
    report = repair_module(trained(), known(), settings).report
    *parts, merge = report.steps
    assert len(parts) == 2
    assert merge.name == "merge"
    assert all(" -> " in step.name for step in parts)
    assert report.settings["method"]["class"] == "MergedRepairs"
    assert report.splits[0].broken == 0
    assert isinstance(METHODS.parse("method", "merged"), MergedRepairs)
    assert MergedRepairs(fitness="eq1").fitness == Fitness("eq1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": "class"}, "`MergedRepairs.parts='class'`"),
        ({"parts": []}, "is an empty list"),
        ({"most": 0}, "`MergedRepairs.most=0`"),
        ({"method": "arachnid"}, "arachnid"),
    ],
)
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        MergedRepairs(**arguments)
