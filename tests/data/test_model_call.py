from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nrl import ConfigurationError
from lightning_nrl.data.adapters import ModelAdapter, as_adapter, bind_adapter
from lightning_nrl.data.batch import run_model


def halved(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return module(x / 2), y


def test_an_adapter_of_two_parameters_runs_the_module() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 0])
    args, kwargs, target = bind_adapter(halved, model)((x, y))
    assert target is y
    output = run_model(model, args, kwargs)
    assert torch.equal(output, model(x / 2))
    assert output.requires_grad
    assert torch.equal(run_model(other, args, kwargs), other(x / 2))


def test_it_gives_no_inputs_without_a_module() -> None:
    with pytest.raises(ConfigurationError, match=r"f\(module, batch\) -> \(logits, target\) cannot be used here"):
        as_adapter(halved)((torch.ones(3, 2), torch.zeros(3)))


def test_what_is_no_pair_is_refused() -> None:
    adapter = bind_adapter(lambda module, batch: module(batch[0]), nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=r"returned Tensor, not \(logits, target\)"):
        adapter((torch.ones(3, 2), torch.zeros(3)))


@pytest.mark.parametrize(
    ("function", "runs"), [(halved, True), (lambda batch: batch, False), (lambda batch, size=2: batch, False)]
)
def test_an_adapter_is_known_by_its_required_parameters(function: Any, runs: bool) -> None:
    assert isinstance(as_adapter(function), ModelAdapter) is runs
