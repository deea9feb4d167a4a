"""Distilled steps on known data: by hand, within their time, and the same on any number of ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_problems import cast, in_seconds, left_alone, make_problem, normed, same, together
from toy_repairs import known, trained

from lightning_nrl import Target
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.methods import Problem
from lightning_nrl.methods._solvers import distill as module
from lightning_nrl.methods._solvers.descent import Descent
from lightning_nrl.methods._solvers.distill import distill


@pytest.fixture(autouse=True)
def few_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITS_PER_SAMPLE", 6)


def by_hand(model: nn.Module, names: list[str], target: Target, visits: int = 6, rate: float = 1e-3) -> State:
    """All 60 samples are in one mini-batch, so each step is on the whole loss and an epoch is a step."""
    (x, y), (x_new, y_new) = ((source.inputs, source.targets) for source in known(n=40))
    x, y = torch.cat([x, x_new]), torch.cat([y, y_new])
    model = copy.deepcopy(model).eval()
    old = model(x).detach()
    right = old.argmax(1) == y
    new = torch.arange(60) >= 40
    targeted = new & ~right & (torch.ones_like(right) if target is ALL else y == 0)
    assert targeted.sum() > 0
    moving = {name: value for name, value in model.named_parameters() if name in names}
    optimizer = torch.optim.AdamW(moving.values(), weight_decay=0.01)
    for step in range(visits):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / visits)) / 2
        optimizer.zero_grad()
        output = model(x)
        kept = (old.softmax(1) * (old.log_softmax(1) - output.log_softmax(1))).sum(1)
        weight = torch.where(targeted, 3.0, 1.0)
        (weight * F.cross_entropy(output, y, reduction="none") + 5 * right * kept).sum().backward()
        optimizer.step()
    return {name: value.detach() for name, value in moving.items()}


ALL = Target.all()


@pytest.mark.parametrize("target", [ALL, Target.label(0)], ids=str)
@pytest.mark.parametrize("layer", ["auto", "0", "4"])
def test_steps_by_hand(layer: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EASY_FRACTION", 1.1)  # every epoch looks at all
    model = trained(normed).eval()
    problem = make_problem(model, known(n=40), layer, target=target)
    with left_alone(model):
        state = distill(problem)
    expected = by_hand(model, list(problem.scope), target)
    assert state.keys() == expected.keys() == set(problem.scope)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_fitted_in_their_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITS_PER_SAMPLE", 60)
    problem = make_problem(trained().to(dtype), cast(known(), dtype))
    with left_alone(problem.model):
        state = distill(problem)
    assert {value.dtype for value in state.values()} == {dtype}
    assert problem.propose("fit", state).repaired > 0


@pytest.mark.parametrize("seconds", [8.0, 20.0, 100.0])
def test_the_schedule_ends_with_the_time(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rates = [0.0], []
    monkeypatch.setattr(module, "EASY_FRACTION", 1.1)
    step = Descent.step

    def timed(self: Descent, parts: Any, loss: Any, *, rate: float) -> None:
        now[0] += 1.0 if rates else 3.0  # the first step also warms up
        rates.append(rate)
        step(self, parts, loss, rate=rate)

    monkeypatch.setattr(Descent, "step", timed)
    # 1,280 samples are ten steps an epoch; in all there are six epochs.
    problem = make_problem(trained(), known(n=900)[:1] + known(n=760, seed=1)[1:])
    distill(problem, deadline=Deadline(seconds, now=lambda: now[0]))
    assert now[0] <= seconds
    assert len(rates) == min(60, seconds - 2)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-3
    assert rates[-1] < 1e-4 or seconds == 8


def test_ranks_take_as_many_steps_as_the_first_has_time_for() -> None:
    def work(problem: Problem) -> State:
        return distill(problem, deadline=in_seconds(problem, 1e6 if problem.collective.rank else 0.05))

    first, second = together(trained(), known(), work)
    assert same(first, second)
