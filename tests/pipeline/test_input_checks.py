from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.methods import Method, Problem, Solution
from lightning_nrl.pipeline.input_checks import run_sanity_check


def test_a_repair_that_fits_is_rehearsed_without_a_trace():
    model = nn.Sequential(*trained(), Counting())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_sanity_check(Evaluator(model), known(), quick(layer=["0", "2"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.calls += 1
        return x


class Detour(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.unused.weight.T


def test_a_layer_that_is_never_called_is_found():
    with pytest.raises(ReplayError, match="`layer='unused'` is never called"):
        run_sanity_check(Evaluator(Detour()), known(), quick())


class Detached(nn.Module):
    """Gives logits without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def test_a_loss_without_a_gradient_is_found_where_localisation_needs_one():
    with pytest.raises(
        ReplayError, match="the loss has no gradient with respect to the outputs of"
    ):
        run_sanity_check(Evaluator(Detached()), known(), quick())
    run_sanity_check(Evaluator(Detached()), known(), quick(localizer=AllWeights()))


def test_an_empty_localisation_of_a_few_samples_says_nothing(recwarn):
    run_sanity_check(Evaluator(trained()), known(n=2), quick(localizer=NeuRecoverLite(n_g=36)))
    assert not recwarn


class Picky(Method):
    """A method of a user's own that suits no model, or no layer."""

    def __init__(self, asked: str) -> None:
        setattr(self, asked, self._refuse)  # in the place of the method with this name

    def _refuse(self, found: object) -> None:
        raise ConfigurationError("`method`: it does not suit this model.", "choose another one.")

    def __call__(self, problem: Problem) -> Solution:
        raise AssertionError("the repair has begun")


@pytest.mark.parametrize("asked", ["check", "check_recording"])
def test_a_method_of_ones_own_is_asked_before_training(asked):
    with pytest.raises(ConfigurationError, match="it does not suit this model"):
        run_sanity_check(Evaluator(trained()), known(), quick(method=Picky(asked)))
