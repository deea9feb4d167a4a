"""Distilled steps on known data: by hand, within their time, and the same on any number of ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_problems import Marginless, cast, in_seconds, left_alone, make_problem, normed, same, together
from toy_repairs import known, trained

from lightning_nrl import Target, TensorSource
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import Deadline, StageTimer
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


def test_it_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITS_PER_SAMPLE", 100)
    monkeypatch.setattr(module, "DISTILL_RATE", 0.01)
    problem = make_problem(trained(), known())
    fitted = problem.propose("fit", distill(problem))
    assert fitted.repaired > 0.6 * int(problem.before.targeted.sum())
    assert fitted.broken < 0.1 * int(problem.before.passed.sum())


def test_samples_that_are_and_were_right_by_far_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EASY_FRACTION", 0.0)
    monkeypatch.setattr(module, "DISTILL_RATE", 0.0)
    rounds: list[list[int]] = []
    shuffled = module.shuffled_batches

    def listen(rows: Tensor, *args: Any) -> list[Tensor]:
        rounds.append(rows.tolist())
        return shuffled(rows, *args)

    monkeypatch.setattr(module, "shuffled_batches", listen)
    # The margins are 8, 4, 3.5, 2, 1 for passed samples, of which the median is 3.5, and -9 for the failed one: easy is
    # what has more than 3/8 of 3.5, which is 1.3125.
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[1.0], [0.0]])
    x = torch.tensor([[8.0], [4.0], [1.0], [2.0], [-9.0], [3.5]])
    distill(make_problem(model, [TensorSource(x, torch.zeros(6, dtype=torch.int64), "all", passed=True, failed=True)]))
    assert rounds[0] == [0, 1, 2, 3, 4, 5]
    assert rounds[1:] == [[2, 4]] * 15
    assert 6 + 15 * 2 == 6 * 6


def test_a_random_part_of_them_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EASY_FRACTION", 0.5)
    sizes: list[int] = []
    shuffled = module.shuffled_batches

    def listen(rows: Tensor, *args: Any) -> list[Tensor]:
        sizes.append(len(rows))
        return shuffled(rows, *args)

    monkeypatch.setattr(module, "shuffled_batches", listen)
    problem = make_problem(trained(), known())
    distill(problem)
    margin = problem.before.margin
    easy = int((margin > module.EASY_MARGIN * margin[problem.before.passed].median()).sum())
    assert sizes[0] == 180
    assert all(180 - easy < size < 180 for size in sizes[1:])
    assert len(set(sizes[1:])) > 1


def test_without_margins_no_sample_is_easy() -> None:
    told = SliceRecorder()
    problem = make_problem(trained(), known(), task=Marginless(), clock=StageTimer(told))
    state = distill(problem)
    assert not same(state, snapshot(problem.model))
    assert [done for done, *_ in told.said] == [180, 360, 540, 720, 900, 1080]


class SliceRecorder:
    """Writes down what an observer is told."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, int, int]] = []

    def stage(self, name: str) -> Any:
        raise AssertionError("a fit is a stage of whoever asks for it")

    def search(self, *numbers: int) -> None:
        self.said.append(numbers)  # type: ignore[arg-type]


def test_it_tells_how_far_it_is_and_what_it_repairs() -> None:
    told = SliceRecorder()
    problem = make_problem(trained(), known(), clock=StageTimer(told))
    distill(problem)
    done, total, repaired, broken = zip(*told.said, strict=True)
    assert set(total) == {6 * 180}
    assert list(done) == sorted(set(done))
    assert done[-1] == 6 * 180
    assert done[0] == 180
    assert 0 <= min(repaired) <= max(repaired) <= int(problem.before.targeted.sum())
    assert min(broken) >= 0


def test_statistics_and_dropout_are_as_deployed() -> None:
    model, modes = trained(normed), []
    problem = make_problem(model, known())
    model[3].register_forward_hook(lambda module, args, output: modes.append(module.training))
    with left_alone(model):
        state = distill(problem)
    assert not any(modes)
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_fitted_in_their_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITS_PER_SAMPLE", 60)
    problem = make_problem(trained().to(dtype), cast(known(), dtype))
    with left_alone(problem.model):
        state = distill(problem)
    assert {value.dtype for value in state.values()} == {dtype}
    assert problem.propose("fit", state).repaired > 0


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    states = [distill(make_problem(trained(), known(), seed=seed)) for seed in (1, 1, 2)]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize("seconds", [0, -1])
def test_without_time_the_weights_stay(seconds: float) -> None:
    problem = make_problem(trained().half(), cast(known(), torch.float16))
    assert same(distill(problem, deadline=in_seconds(problem, seconds)), snapshot(problem.model))


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
