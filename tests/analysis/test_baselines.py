"""Baselines on problems whose answers can be worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plane import TRAIN, Moved, points, threshold
from torch import Tensor, nn
from torch.nn import functional as F
from toy_problems import ByFunction, StageTimer, left_alone, make_problem, watched_steps

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.analysis import baselines as module
from lightning_nrl.analysis.baselines import (
    DistilledFineTuning,
    FineTuning,
    FurtherTraining,
    Interpolation,
    LayerFineTuning,
    Retraining,
    fresh_weights,
)
from lightning_nrl.methods import Solution
from lightning_nrl.methods.problem import Trained
from lightning_nrl.records import hash_tensors


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 30)


KNOWN = [TRAIN, points([0.6, 0.7, 0.5], [0, 1, 1], "new", failed=True)]
"""With the threshold at 0.75 the sample 0.6 passes, and 0.7 and 0.5 are to be repaired."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    model[1].running_mean.fill_(0.25)
    model[1].running_var.fill_(2.0)
    return model


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


SOURCES = [
    TensorSource(*data(40, 1), "train", passed=True, batch_size=16),
    TensorSource(*data(24, 2), "new", failed=True, batch_size=16),
]


def tuned_by_hand(model: nn.Module, names: list[str], rate: float = 3e-4) -> dict[str, Tensor]:
    """All samples are in one batch, so every step is a step down the whole loss."""
    (x, y), (x_new, y_new) = data(40, 1), data(24, 2)
    model = copy.deepcopy(model).eval()
    weight = torch.cat([torch.ones(40), torch.where(model(x_new).argmax(1) != y_new, 3.0, 1.0)])
    moving = {name: value for name, value in model.named_parameters() if name in names}
    optimizer = torch.optim.AdamW(moving.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(
            model(torch.cat([x, x_new])), torch.cat([y, y_new]), reduction="none"
        )
        (weight * loss).sum().backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in moving.items()}


@pytest.mark.parametrize(
    ("method", "layer", "names", "rate"),
    [
        (FineTuning(), "auto", [name for name, _ in network().named_parameters()], 3e-4),
        (FineTuning(), "4", ["4.weight", "4.bias"], 3e-4),
        (LayerFineTuning(), "auto", ["4.weight"], 1e-2),
        (DistilledFineTuning(base=0, scale=0), "4", ["4.weight", "4.bias"], 3e-4),
    ],
)
def test_fine_tuning_is_adamw_on_the_deployed_network(method, layer, names, rate):
    model = network()
    state = method(make_problem(model, SOURCES, layer)).proposal.state
    torch.testing.assert_close(state, tuned_by_hand(model, names, rate), rtol=0, atol=2e-6)


def test_what_it_breaks_is_counted_and_does_not_stop_it():
    # 0.6 is of class 0 and 0.5 of class 1: whoever repairs 0.5 breaks 0.6.
    solution = FineTuning(epochs=60, learning_rate=0.1, emphasis=9.0)(
        make_problem(threshold(0.75), KNOWN)
    )
    assert (solution.proposal.repaired, solution.proposal.broken) == (2, 1)
    (step,) = solution.steps
    assert (step.repaired, step.broken, step.note) == (2, 1, "60 epochs")


@pytest.mark.parametrize(("label", "held"), [(1, True), (0, False)])
def test_distillation_holds_outputs_where_the_old_model_is_right(label, held):
    # The old logits of (1, 1) are 0.75 and 1: class 1 is right with a margin of 0.25, and class 0
    # is wrong.
    source = TensorSource(torch.tensor([[1.0, 1.0]]), torch.tensor([label]), "new", failed=True)
    margins = []
    for scale in (0.0, 1000.0):
        method = DistilledFineTuning(learning_rate=0.05, base=0.0, scale=scale, temperature=2.0)
        margins.append(float(method(make_problem(threshold(0.75), [source])).proposal.after.margin))
    free, bound = margins
    assert free > 0.5
    assert (abs(bound - 0.25) < 0.05) is held
    assert (bound == free) is not held


@pytest.mark.parametrize("method", [FineTuning(), LayerFineTuning(), DistilledFineTuning()])
def test_the_model_is_left_as_found(method):
    model = network()
    model[0].bias.requires_grad_(False)
    problem = make_problem(model, SOURCES)
    with left_alone(model):
        first, again = method(problem), method(problem)
    assert "0.bias" not in first.proposal.state
    torch.testing.assert_close(first.proposal.state, again.proposal.state)


def test_where_time_is_short_the_learning_rate_falls_all_the_same():
    rates = []
    clock = StageTimer(max_time=100.0, now=lambda: float(len(rates)))  # a second a step
    clock.seconds["collect"] = 20.0
    problem = make_problem(network(), SOURCES, clock=clock)
    with watched_steps(rates.append):
        solution = FineTuning(epochs=400, learning_rate=1.0)(problem)
    # All samples are in one step. After two it is known that there are 80, since a last pass takes
    # 20 seconds.
    assert len(rates) == 80
    assert rates[40] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx((1 + math.cos(math.pi * 79 / 80)) / 2)
    assert solution.steps[0].note == "80 epochs"


@pytest.mark.parametrize(
    ("share", "at", "repaired", "broken"),
    # A threshold below 0.7 repairs that sample, one below 0.6 breaks it, one below 0.5 repairs the
    # other.
    [(0.125, 0.65625, 1, 0), (0.25, 0.5625, 1, 1), (0.5, 0.375, 2, 1), (1.0, 0.0, 2, 1)],
)
def test_interpolation_lies_between_the_old_weights_and_the_new(share, at, repaired, broken):
    solution = Interpolation(Moved(0.0), share)(make_problem(threshold(0.75), KNOWN))
    assert torch.equal(solution.proposal.state["weight"], threshold(at).weight)
    assert (solution.proposal.repaired, solution.proposal.broken) == (repaired, broken)
    assert solution.steps[-1].note == f"a = {share:g}"


def test_training_begins_with_fresh_weights_or_with_the_old_ones_and_leaves_time_for_a_pass():
    def training(**arguments: Any) -> Any:
        given.update(arguments)
        return Trained({"weight": threshold(0.65).weight.detach()}, 1.0, 1.0)

    given, model, clock = dict[str, Any](), threshold(0.75), StageTimer(max_time=50.0)
    clock.seconds["collect"] = 8.0
    problem = make_problem(model, KNOWN, training=training, seed=5, clock=clock)
    solution = Retraining()(problem)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert (given["seconds"], given["seed"]) == (math.inf, 5)
    assert hash_tensors(given["start"]) == hash_tensors(fresh_weights(model, 5))
    solution = FurtherTraining()(problem)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert given["start"] is None
    assert 41 < given["seconds"] <= 42


@pytest.mark.parametrize(
    ("method", "arguments", "reason"),
    [
        (FineTuning(), {"clock": StageTimer(max_time=1e-9)}, "there was no time for an epoch."),
        (Interpolation(ByFunction(lambda problem: Solution(None, "nothing."))), {}, "nothing."),
        (FurtherTraining(), {}, "it is not known how the model was trained."),
        (Retraining(), {"training": lambda **_: None}, "training did not finish."),
        (
            Retraining(),
            {"training": lambda **_: None, "whole_network": False},
            "only some layers may change, but training",
        ),
    ],
)
def test_why_there_may_be_no_proposal(method, arguments, reason):
    solution = method(make_problem(threshold(0.75), KNOWN, **arguments))
    assert solution.proposal is None
    assert solution.reason.startswith(reason)


def made_anew() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(1, 3, 3),
        nn.BatchNorm1d(3),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.PReLU(),
        nn.Linear(4, 2),
    )


@pytest.mark.parametrize(("make", "dtype"), [(None, torch.float32), (made_anew, torch.float64)])
def test_fresh_weights_are_those_of_a_network_that_has_just_been_made(make, dtype):
    used = made_anew()
    used(torch.randn(8, 1, 4))
    for parameter in used.to(dtype).parameters():
        parameter.data += 1
    with left_alone(used):
        fresh = fresh_weights(used, seed=3, make=make)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert hash_tensors(fresh) == hash_tensors(made_anew().to(dtype).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fresh_weights(nn.ParameterList([torch.zeros(2)]), seed=0),
            r"`model`: it \(ParameterList\) has weights, but no `reset_parameters`",
        ),
        (lambda: fresh_weights(network(), 0, lambda: nn.Linear(2, 2)), "`fresh` lacks '0.weight'"),
        (lambda: Retraining(fresh=network()), "is no function that makes a network"),
        (lambda: Interpolation("fine-tuning"), "`new='fine-tuning'` is no method"),
        (lambda: Interpolation(a=0), "`a=0` is no share"),
        (lambda: Interpolation(a=1.5), "`a=1.5` is no share"),
        (lambda: FineTuning(epochs=0), "`epochs=0`"),
        (lambda: FineTuning(learning_rate="a"), "`learning_rate='a'`"),
        (lambda: FineTuning(emphasis=math.nan), "`emphasis=nan`"),
    ],
)
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
