"""A model that fails in the middle of a repair: it is left as it was, and nothing is accepted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, right, trained

from lightning_nrl import ParticleSwarm, repair_module
from lightning_nrl.errors import ModelError, RepairError, TrainingWarning
from lightning_nrl.methods import Auto


class Fragile(nn.Module):
    """From some call on it raises, or gives nothing but NaN."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = trained(), how
        self.calls, self.fails_at = 0, 1 << 60

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls < self.fails_at:
            return self.net(x)
        if self.how == "raises":
            raise ZeroDivisionError("on purpose")
        return self.net(x) * torch.nan


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["raises", "NaN"])
@pytest.mark.parametrize("method", ["swarm", "convex", "finetune-polish"])
def test_a_failure_at_any_call_leaves_the_model_as_it_was(method, how):
    settings = quick() if method == "swarm" else quick(method=method)
    model = Fragile(how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repair_module(model, known(n=60), settings)
    total = model.calls
    for share in (0.25, 0.99):
        model.calls, model.fails_at = 0, max(2, int(share * total))
        if how == "raises":
            with pytest.raises((ZeroDivisionError, ModelError), match="on purpose"):
                repair_module(model, known(n=60), settings)
        else:
            with suppress(RepairError):
                assert repair_module(model, known(n=60), settings).report.status != "repaired"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert torch.is_grad_enabled()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def without_gradients(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def in_inference_mode(net: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(x)


def in_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return torch.from_numpy(net(x).numpy())


def without_backward(net: nn.Module, x: Tensor) -> Tensor:
    return NoBackward.apply(net(x))


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    hidden = net[0](x).exp()
    output = net(x) + 0 * hidden.sum()
    hidden /= 10
    return output


class WithoutTraining(nn.Module):
    """Gradients cannot be taken of its output."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.run = trained(), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x)


@pytest.mark.parametrize(
    "run", [without_gradients, in_inference_mode, in_numpy, without_backward, in_place]
)
def test_the_default_keeps_what_other_rungs_found_if_a_training_fails(run):
    settings = quick(method=Auto(ParticleSwarm(particles=12, iterations=12)))
    model = WithoutTraining(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(TrainingWarning, match="`training` stopped: it raised .*Error: "):
        outcome = repair_module(model, known(), settings)
    assert "`training` is not kept: it raised " in outcome.report.choice
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train, new = known()
    with torch.no_grad():
        kept, failing = right(model.net, train), ~right(model.net, new)
        assert outcome.write(model)
        assert right(model.net, train)[kept].all()
        assert right(model.net, new)[failing].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_embedding_with_sparse_gradients_is_trained():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.embedding = trained(), nn.Embedding(2, 3, sparse=True)
            nn.init.zeros_(self.embedding.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.embedding((x[:, 0] > 0).long())

    report = repair_module(Embedded(), known(), quick(method="finetune-polish")).report
    assert report.status == "repaired"
