from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from baseline_problems import make_problem, threshold
from torch import nn

from lightning_nrl import ConfigurationError
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.analysis.baselines import FurtherTraining, Retraining, fresh_weights


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 4), nn.PReLU(), nn.Linear(4, 2)
    )


def used() -> nn.Sequential:
    """A network whose weights and statistics are no longer fresh."""
    model = network()
    model(torch.randn(8, 1, 4))
    for parameter in model.parameters():
        parameter.data += 1
    return model


def test_fresh_weights_are_those_of_a_network_that_has_just_been_made() -> None:
    model = used()
    before, random = hash_tensors(model.state_dict()), torch.get_rng_state()
    fresh = fresh_weights(model, seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert hash_tensors(model.state_dict()) == before
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert hash_tensors(fresh) == hash_tensors(network().state_dict())


def test_a_function_may_make_them() -> None:
    fresh = fresh_weights(used().double(), seed=3, make=network)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert hash_tensors(fresh) == hash_tensors(network().double().state_dict())


class Token(nn.Module):
    """Adds a vector that it learns, and cannot initialise it again."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(2))


def test_weights_that_nobody_can_initialise_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Token())
    with pytest.raises(ConfigurationError, match=r"`model`: 1 \(Token\) has weights and no `reset_parameters`"):
        fresh_weights(model, seed=0)


class Trained:
    """Training that puts the threshold at 0.65, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, **given: Any) -> Any:
        self.given = given
        return {"weight": threshold(0.65).weight.detach()}


def test_training_begins_with_fresh_weights_and_has_all_the_time_it_needs() -> None:
    training, model = Trained(), threshold(0.75)
    solution = Retraining()(make_problem(model, training=training, seed=5))
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert (training.given["seconds"], training.given["seed"]) == (math.inf, 5)
    assert hash_tensors(training.given["start"]) == hash_tensors(fresh_weights(model, 5))


def test_further_training_begins_with_the_old_weights_and_leaves_time_for_a_pass() -> None:
    training, clock = Trained(), StageTimer(max_time=50.0)
    clock.seconds["collect"] = 8.0
    solution = FurtherTraining()(make_problem(threshold(0.75), training=training, seed=5, clock=clock))
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert training.given["start"] is None
    assert 41 < training.given["seconds"] <= 42


@pytest.mark.parametrize("method", [FurtherTraining(), Retraining()])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "it is not known how the model was trained."),
        ({"training": lambda **_: None}, "training did not come to an end."),
        ({"training": Trained(), "whole": False}, "only some layers may change, and its training changes all."),
    ],
)
def test_why_there_may_be_no_training(method: Any, arguments: dict[str, Any], reason: str) -> None:
    solution = method(make_problem(threshold(0.75), **arguments))
    assert (solution.proposal, solution.reason) == (None, reason)


def test_only_a_function_that_makes_the_network_will_do() -> None:
    with pytest.raises(ConfigurationError, match=r"`fresh=Sequential[\s\S]*is no function that makes a network"):
        Retraining(fresh=network())
    for make, message in (
        (lambda: nn.Linear(2, 2), "`fresh` lacks '0.weight'"),
        (lambda: nn.Sequential(nn.Linear(1, 1)), r"`fresh` has '0.weight' in the shape \[1, 1\]"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            fresh_weights(network(), 0, make)
