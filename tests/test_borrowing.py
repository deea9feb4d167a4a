from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import RunningStage
from torch import nn

from lightning_nrl.borrowing import evaluating, random_state


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


class Partly(LightningModule):
    """Trains, but for its frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.frozen = nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2))
        self.frozen.eval()


@pytest.mark.parametrize("error", [None, ValueError])
def test_training_flags_and_stage_are_as_found(error: type[BaseException] | None) -> None:
    model, trainer = Partly(), SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TRAINING))
    flags = [module.training for module in model.modules()]
    assert flags == [True, True, False, False]
    lent: Any = trainer
    with nullcontext() if error is None else pytest.raises(error), evaluating(lent, model):
        assert not any(module.training for module in model.modules())
        assert trainer.state.stage is RunningStage.VALIDATING
        if error is not None:
            raise error
    assert [module.training for module in model.modules()] == flags
    assert trainer.state.stage is RunningStage.TRAINING
