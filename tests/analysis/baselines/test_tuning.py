from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from baseline_problems import make_problem, threshold
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.analysis import baselines as module
from lightning_nrl.analysis.baselines import DistilledFineTuning, FineTuning, LayerFineTuning


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 30)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[1].running_mean.fill_(0.25)
    model[1].running_var.fill_(2.0)
    return model


def data(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def sources() -> list[TensorSource]:
    return [
        TensorSource(*data(40, 1), "train", passed=True, batch_size=16),
        TensorSource(*data(24, 2), "new", failed=True, batch_size=16),
    ]


def tuned_by_hand(
    model: nn.Module, names: list[str], steps: int = 30, emphasis: float = 3.0, rate: float = 3e-4
) -> dict[str, Tensor]:
    """All samples are in one batch, so every step is a step down the whole loss."""
    (x, y), (x_new, y_new) = data(40, 1), data(24, 2)
    model = copy.deepcopy(model).eval()
    wrong = model(x_new).argmax(1) != y_new
    weight = torch.cat([torch.ones(40), torch.where(wrong, emphasis, 1.0)])
    moving = {name: value for name, value in model.named_parameters() if name in names}
    optimizer = torch.optim.AdamW(moving.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (
            weight * F.cross_entropy(model(torch.cat([x, x_new])), torch.cat([y, y_new]), reduction="none")
        ).sum().backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in moving.items()}


def assert_same(state: Any, expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-6)


def test_fine_tuning_is_adamw_on_the_deployed_network() -> None:
    model = network()
    solution = FineTuning()(make_problem(model, sources()))
    assert_same(solution.proposal.state, tuned_by_hand(model, [name for name, _ in model.named_parameters()]))


def test_of_one_layer_nothing_else_moves() -> None:
    model = network()
    solution = LayerFineTuning()(make_problem(model, sources()))
    assert_same(solution.proposal.state, tuned_by_hand(model, ["4.weight"], rate=1e-2))


def test_a_named_block_bounds_fine_tuning() -> None:
    model = network()
    solution = FineTuning()(make_problem(model, sources(), layer="4"))
    assert_same(solution.proposal.state, tuned_by_hand(model, ["4.weight", "4.bias"]))


def test_what_it_breaks_is_counted_and_does_not_stop_it() -> None:
    # 0.6 is of class 0 and 0.5 of class 1: whoever repairs 0.5 breaks 0.6.
    solution = FineTuning(epochs=60, learning_rate=0.1, emphasis=9.0)(make_problem(threshold(0.75)))
    assert (solution.proposal.repaired, solution.proposal.broken) == (2, 1)
    assert (solution.steps[0].repaired, solution.steps[0].broken) == (2, 1)
    assert solution.steps[0].note == "60 epochs"


def test_distillation_without_weight_is_fine_tuning() -> None:
    model = network()
    plain, held = (
        method(make_problem(model, sources())) for method in (FineTuning(), DistilledFineTuning(base=0, scale=0))
    )
    assert_same(held.proposal.state, dict(plain.proposal.state))


@pytest.mark.parametrize(("label", "held"), [(1, True), (0, False)])
def test_distillation_holds_outputs_where_the_old_model_is_right(label: int, held: bool) -> None:
    # The old logits of (1, 1) are 0.75 and 1: class 1 is right with a margin of 0.25, and class 0 is wrong.
    source = TensorSource(torch.tensor([[1.0, 1.0]]), torch.tensor([label]), "new", failed=True)
    model, margins = threshold(0.75), []
    for scale in (0.0, 1000.0):
        method = DistilledFineTuning(learning_rate=0.05, base=0.0, scale=scale, temperature=2.0)
        margins.append(float(method(make_problem(model, [source])).proposal.after.margin))
    free, bound = margins
    assert free > 0.5
    assert (abs(bound - 0.25) < 0.05) is held
    assert (bound == free) is not held


@pytest.mark.parametrize("method", [FineTuning(), LayerFineTuning(), DistilledFineTuning()])
def test_the_model_is_left_as_found(method: Any) -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    problem = make_problem(model, sources())
    before, random = hash_tensors(model.state_dict()), torch.get_rng_state()
    first, again = method(problem), method(problem)
    assert hash_tensors(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].bias.requires_grad
    assert "0.bias" not in first.proposal.state
    assert_same(again.proposal.state, dict(first.proposal.state))


def test_where_time_is_short_the_learning_rate_falls_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steady(StageTimer):
        """A clock on which each step takes a second."""

        @property
        def elapsed(self) -> float:
            return float(len(rates))

    rates: list[float] = []
    step = module.Descent.step

    def counted(self: Any, parts: Any, loss: Any, *, rate: float) -> None:
        step(self, parts, loss, rate=rate)
        rates.append(rate)

    monkeypatch.setattr(module.Descent, "step", counted)
    monkeypatch.setattr(module, "STEPS", 400)
    clock = Steady(max_time=100.0)
    clock.seconds["collect"] = 20.0
    solution = FineTuning(learning_rate=1.0)(make_problem(network(), sources(), clock=clock))
    # All samples are in one step. After two it is known that there are 80, since a last pass takes 20 seconds.
    assert len(rates) == 80
    assert rates[40] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx((1 + math.cos(math.pi * 79 / 80)) / 2)
    assert solution.steps[0].note == "80 epochs"


def test_without_time_there_is_no_proposal() -> None:
    solution = FineTuning()(make_problem(threshold(0.75), clock=StageTimer(max_time=1e-9)))
    assert solution.proposal is None
    assert solution.reason == "there was no time for an epoch."


@pytest.mark.parametrize(
    "numbers", [{"epochs": 0}, {"epochs": 1.5}, {"learning_rate": 0}, {"learning_rate": "a"}, {"emphasis": math.nan}]
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"`{next(iter(numbers))}="):
        FineTuning(**numbers)
