"""Which layers a prediction is made of, and so which of them `layer="auto"` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._model.layers import find_scope
from lightning_nrl._trainer.deployed_prediction import called_layers
from lightning_nrl.evaluation.evaluator import Evaluator


class Heads(nn.Module):
    """Classes, and an auxiliary head that is registered last; `stop` detaches the features of the classes."""

    def __init__(self, stop: bool = False, joint: bool = False) -> None:
        super().__init__()
        self.body, self.classes, self.idle = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.box, self.stop, self.joint = nn.Linear(8, 3), stop, joint

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.body(x))
        box = self.box(features)
        logits = self.classes(features.detach() if self.stop else features)
        return (logits + box if self.joint else logits), box


def first(batch: Any) -> Any:
    return (batch[0],), {}, batch[1]


class FirstOutput(nn.Module):
    """A network that gives the logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)[0]
        return out


@pytest.mark.parametrize("stop", [False, True])
def test_a_second_head_is_no_part_of_the_prediction(stop: bool) -> None:
    torch.manual_seed(0)
    model, raw = FirstOutput(Heads(stop)), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    called = called_layers(model, Evaluator(model), first, raw)
    assert called == ["net.body", "net.classes"]
    space, _ = find_scope(model, called=called)
    assert [site.name for site in space.sites] == ["net.classes"]


def test_a_second_head_that_adds_to_the_logits_is_one() -> None:
    model, raw = FirstOutput(Heads(joint=True)), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    assert called_layers(model, Evaluator(model), first, raw) == ["net.body", "net.box", "net.classes"]
