"""Models without a layer to be searched, or without a prediction of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from toy_repairs import known, mlp, quick, right, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, repair_module
from lightning_nrl.errors import RepairError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import Auto
from lightning_nrl.pipeline.input_checks import run_sanity_check


def parametrised(how: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = mlp()
    return nn.Sequential(how(model[0]), model[1], how(model[2]))


class ByFunctions(nn.Module):
    """Its layers are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.first.weight, self.first.bias))
        return F.linear(hidden, self.last.weight, self.last.bias)


class Bare(nn.Module):
    """Has parameters and no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(4, 12))
        self.last = nn.Parameter(0.3 * torch.randn(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.first) @ self.last


class TwoHeads(nn.Module):
    """Its last layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.twin = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.twin.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x))) + self.twin(F.relu(x @ self.first.weight.T))


def scripted() -> nn.Module:
    return torch.jit.script(mlp())


def traced() -> nn.Module:
    return torch.jit.trace(mlp(), torch.zeros(2, 4))


def frozen_body() -> nn.Module:
    model = mlp().eval()
    return nn.Sequential(torch.jit.freeze(torch.jit.script(model[:2].eval())), model[2])


ODD = {
    "weight norm": (lambda: parametrised(weight_norm), "has no floating-point weight of its own"),
    "spectral norm": (
        lambda: parametrised(spectral_norm),
        "has no floating-point weight of its own",
    ),
    "orthogonal": (lambda: parametrised(orthogonal), "has no floating-point weight of its own"),
    "functions": (ByFunctions, "is never called"),
    "parameters": (Bare, "found no Linear layer"),
    "shared": (TwoHeads, "shares its weights"),
    "scripted": (scripted, r"found no Linear layer[\s\S]*not scripted"),
}


@pytest.mark.parametrize("kind", ODD)
def test_only_a_method_that_trains_does_without_a_layer_to_be_searched(kind):
    make, reason = ODD[kind]
    run_sanity_check(Evaluator(make()), known(), Settings())
    with pytest.raises(RepairError, match=reason):
        run_sanity_check(Evaluator(make()), known(), quick())


@pytest.mark.parametrize("kind", ["weight norm", "functions", "scripted"])
def test_training_repairs_what_has_no_layer_to_be_searched(kind):
    make, reason = ODD[kind]
    model, data = trained(make), known()
    before = torch.cat([right(model, source) for source in data])
    method = Auto(ParticleSwarm(particles=6, iterations=4))
    outcome = repair_module(model, data, Settings(method=method))
    report = outcome.report
    search, training, *_ = report.rungs
    assert (search.kept, training.name, training.kept) == (False, "training", True)
    assert reason.partition("[")[0] in search.note
    assert outcome.write(model)
    after = torch.cat([right(model, source) for source in data])
    assert bool(after[before].all())
    assert int((after & ~before).sum()) == report.pooled("known").repaired > 0


@pytest.mark.parametrize("make", [traced, frozen_body])
def test_parts_by_torch_jit_come_back_as_they_were(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    report = repair_module(model, known(), Settings(method="finetune-polish")).report
    assert report.status == "repaired"
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_prediction_that_depends_on_the_batch_is_refused():
    norm = nn.BatchNorm1d(12, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 12), norm, nn.Linear(12, 3))
    for check in (repair_module, run_sanity_check):
        with pytest.raises(ConfigurationError, match="`1` is a batch norm without running statist"):
            check(Evaluator(model), known(batch_size=1), quick())
    unused = trained()
    unused.norm = norm
    unused.forward = lambda x: unused[2](unused[1](unused[0](x)))
    run_sanity_check(Evaluator(unused), known(), quick())


@pytest.mark.parametrize(
    "form", [lambda y: F.one_hot(y, 3), lambda y: y.double(), lambda y: y.to(torch.uint16)]
)
def test_targets_of_several_forms_are_refused(form):
    first, second = known()
    second = replace(second, targets=form(second.targets))
    with pytest.raises(
        ConfigurationError, match=r"several forms: int64 \[n\] in `train`, .* `new`"
    ):
        run_sanity_check(Evaluator(trained()), [first, second], quick())
