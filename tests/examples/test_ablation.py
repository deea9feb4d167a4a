"""The ablation of localisers: its differences to random weights, from runs made by hand, and its history."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from repository import ROOT

STUDY = ROOT / "examples" / "case_study"
sys.path[:0] = [str(STUDY), str(STUDY.parent / "studies")]


import ablation  # noqa: E402
from ablation import Run, difference, group_of, paired  # noqa: E402

ONE = Run("toy", "last", "eq1", "gradient", 0, 64, 10, 5, 1, 4, 2)


def test_a_difference_is_that_of_a_seed_and_layer_to_the_mean_of_its_draws():
    draws = [replace(ONE, localizer=f"random {i}", repaired=repaired) for i, repaired in enumerate((1, 3))]
    runs = [ONE, *draws, replace(ONE, layer="first", repaired=9), replace(draws[0], layer="first")]
    runs += [replace(ONE, seed=1, repaired=7), replace(draws[0], seed=1, repaired=8)]
    assert [group_of(run) for run in runs[:3]] == ["gradient", "random", "random"]
    # Seed 0: 5 - 2 in one layer and 9 - 1 in the other; seed 1: 7 - 8.
    assert paired(runs, lambda run: run.repaired) == {"gradient": [5.5, -1.0]}
    assert (ONE.net, ONE.known_net) == (2, 4)


def test_an_exact_test_counts_the_signs_that_give_as_much():
    # Of the 8 choices of signs of 1, 2, 3 only +++ and --- reach a sum of 6.
    assert difference([1.0, 2.0, 3.0]) == "+2.0 [-0.5, +4.5] p=0.250"
    assert difference([1.0]) == "-"


def test_all_localisers_but_one_search_as_many_weights():
    found = dict(ablation.localizers(ablation.CheckpointRuns([]), draws=2))
    asked = {name: getattr(localizer, "n_weights", None) for name, localizer in found.items()}
    assert asked.pop("all") is None
    assert set(asked.values()) == {ablation.N_WEIGHTS}
    assert [name for name in asked if name.startswith("random")] == ["random 0", "random 1"]


def test_checkpoints_are_run_once_whatever_layers_are_asked_for():
    class Once:
        """Counts its runs; all samples are right under weights that are not negative."""

        runs = 0

        def run_with(self, state, sources):
            self.runs += 1
            return type("Results", (), {"passed": torch.tensor([state["a"].min() >= 0, True])})

    class Space:
        def __init__(self, *names):
            self.parameters = dict.fromkeys(names)

    states = [
        {"a": torch.tensor([[-1.0]]), "b": torch.tensor([2.0])},
        {"a": torch.tensor([[1.0]]), "b": torch.zeros(1)},
    ]
    history, evaluator = ablation.CheckpointRuns(states), Once()
    for names, weights in ((("a", "b"), ([-1.0, 2.0], [1.0, 0.0])), (("b",), ([2.0], [0.0]))):
        points = history.points(type("Known", (), {"evaluator": evaluator, "sources": (), "space": Space(*names)}))
        assert [point.passed.tolist() for point in points] == [[0, 1], [1, 1]]
        assert [point.weights.tolist() for point in points] == [*weights]
    assert evaluator.runs == 2
