"""A repair leaves the model as it found it, whatever happens."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import Target, repair_module
from lightning_nrl._utils.preserve import evaluating, preserve, random_state, seed_all
from lightning_nrl.gate import Instance
from lightning_nrl.localization import AllWeights
from lightning_nrl.search import Fitness


class Counting(nn.Module):
    """Counts its calls in one buffer in place, replaces another, and draws a random number, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().sum()[None]
        torch.rand(2)
        return x


def network() -> nn.Sequential:
    """Everything that a careless look would change: norms, dropout, own counters, frozen parts, modes and gradients."""
    model = nn.Sequential(trained()[0], nn.BatchNorm1d(12), nn.ReLU(), Counting(), nn.Dropout(0.5), trained()[2])
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(3)
    return model


def picture(model: nn.Module) -> list[Any]:
    """All that a user may notice, by identity and by value."""
    own = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(x), x.detach().clone()) for name, x in own],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [module.training for module in model.modules()],
        [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("layer", ["auto", "0", ["0", "5"]])
def test_a_repair_leaves_no_trace(layer: Any) -> None:
    model = network()
    before = picture(model)
    outcome = repair_module(model, known(), quick(layer=layer, localizer=AllWeights()), unseen=unseen())
    assert outcome.report.search is not None
    assert same(picture(model), before)


class OutOfMemory(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OutOfMemory


class FailingLocalizer(AllWeights):
    __call__ = fail


class FailingFitness(Fitness):
    __call__ = fail


class FailingGate(Instance):
    allowed = fail


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"localizer": FailingLocalizer()}, OutOfMemory),
        ({"fitness": FailingFitness()}, OutOfMemory),
        ({"gate": FailingGate()}, OutOfMemory),
        ({"target": Target.where(lambda batch: batch[7])}, ValueError),
    ],
)
def test_a_repair_that_raises_leaves_no_trace(part: dict[str, Any], error: type[Exception]) -> None:
    model = network()
    before = picture(model)
    with pytest.raises(error):
        repair_module(model, known(), quick(**part))
    assert same(picture(model), before)


def test_the_model_runs_in_evaluation_mode() -> None:
    model = network()
    seen: list[bool] = []
    model[4].register_forward_pre_hook(lambda module, args: seen.append(module.training))
    repair_module(model, known(), quick())
    assert seen
    assert not any(seen)


def test_frozen_weights_are_repaired_like_others() -> None:
    frozen = trained().requires_grad_(False)
    expected = repair_module(trained(), known(), quick())
    outcome = repair_module(frozen, known(), quick())
    assert torch.equal(outcome.change, expected.change)
    assert outcome.write(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_repair(mode: Any) -> None:
    model, sources = trained(), known()
    expected = repair_module(model, sources, quick())
    with mode():
        outcome = repair_module(model, sources, quick())
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
    assert torch.equal(outcome.change, expected.change)


def test_buffers_that_were_not_there_are_left_alone() -> None:
    model = Counting()
    with preserve(model):
        model(torch.ones(2))
        model.register_buffer("new", torch.ones(1))
        assert model.calls == 1
        assert not model.training
    assert model.training
    assert model.calls == 0
    assert model.last == 0
    assert model.nothing is None
    assert model.new == 1


def test_buffers_of_any_layout_are_given_back() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    with preserve(model):
        model.graph.mul_(2)
    assert torch.equal(model.graph.to_dense(), torch.eye(2))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(trained()[0], nn.ReLU())
        self.head = trained()[2]
        self.exit = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.body(x))


@pytest.mark.parametrize("layer", ["head", "exit"])
def test_a_layer_under_two_names_keeps_its_own_weight(layer: str) -> None:
    model = TwoNames()
    parameter, value = model.head.weight, model.head.weight.detach().clone()
    assert repair_module(model, known(), quick(layer=layer)).report.status == "repaired"
    assert model.head.weight is model.exit.weight is parameter
    assert torch.equal(parameter, value)


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_random_state_is_as_found(error: type[BaseException] | None) -> None:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    with nullcontext() if error is None else pytest.raises(error), random_state():
        draw()
        torch.manual_seed(0)
        if error is not None:
            raise error
    assert draw() == expected


class Rewritten(nn.Module):
    """Does to its weights all that a module can do in evaluation mode, and undoes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.swapped, self.lost, self.zero = (nn.Parameter(torch.zeros(2)) for _ in range(4))
        self.zero.data.copy_(torch.tensor([-0.0, torch.nan]))
        self.merged = False

    def train(self, mode: bool = True) -> Rewritten:
        if not mode:
            with torch.no_grad():
                self.written.add_(1)
            self.swapped.data = torch.ones(3, dtype=torch.float64)
            lost, self.merged = self._parameters.pop("lost"), True
            self.register_parameter("other", nn.Parameter(torch.ones(1)))
            self.register_parameter("lost", nn.Parameter(lost.detach() + 1))
            self.zero.data.abs_()
        return super().train(mode)


def test_parameters_are_given_back_to_the_bit_as_the_same_objects_in_the_same_memory() -> None:
    model = Rewritten()
    parameters = dict(model.named_parameters())
    memory = {name: value.data_ptr() for name, value in parameters.items()}
    with preserve(model):
        assert model.merged
        assert torch.equal(model.written, torch.ones(2))
        assert model.swapped.shape == (3,)
    assert [name for name, _ in model.named_parameters()] == ["written", "swapped", "lost", "zero", "other"]
    for name, value in parameters.items():
        assert getattr(model, name) is value
        assert value.data_ptr() == memory[name]
        assert value.requires_grad
    assert torch.equal(torch.stack([model.written, model.swapped, model.lost]), torch.zeros(3, 2))
    assert model.zero.signbit()[0]
    assert model.zero.isnan()[1]
    assert not model.merged


def test_weights_that_nobody_writes_to_are_not_written_back() -> None:
    model = nn.Linear(2, 2)
    version = model.weight._version
    with preserve(model):
        model(torch.ones(1, 2))
    assert model.weight._version == version


def test_what_an_inner_use_writes_is_undone_by_the_outer_one() -> None:
    model = nn.Embedding(3, 2, max_norm=0.1)
    before = model.weight.detach().clone()
    with evaluating(model), evaluating(model):
        model(torch.arange(3))
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_modules_without_values_are_left_alone() -> None:
    lazy, meta = nn.LazyLinear(2), nn.Linear(2, 2, device="meta")
    with preserve(lazy), preserve(meta):
        assert not lazy.training
    assert lazy.training
    assert meta.training


def test_the_seed_of_a_device_that_was_not_started_is_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(5)
    with random_state():
        torch.manual_seed(7)
    assert seeds == [5, 7, 5]
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("there", [True, False])
def test_devices_are_seeded_where_there_are_any(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with random_state():
        before = len(seeds)
        seed_all(5)
        drawn = torch.rand(2)
        assert seeds[before:] == [5] * there
        torch.default_generator.manual_seed(5)
        assert torch.equal(torch.rand(2), drawn)
    assert bool(seeds) == there
