"""Which layers a prediction is made of, and so which of them `layer="auto"` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._trainer.steps.called_layers import called_layers
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope, last_linear


class Heads(nn.Module):
    """Classes, and an auxiliary head that is registered last; `stop` detaches the features of the
    classes.
    """

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
        out = self.net(x)[0]
        return out


@pytest.mark.parametrize("stop", [False, True])
def test_a_second_head_is_no_part_of_the_prediction(stop):
    torch.manual_seed(0)
    model, raw = FirstOutput(Heads(stop)), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    called = called_layers(Evaluator(model), first, raw)
    assert called == ["net.body", "net.classes"]
    space, _ = find_scope(model, called=called)
    assert [site.name for site in space.sites] == ["net.classes"]


def test_a_second_head_that_adds_to_the_logits_is_one():
    model, raw = (
        FirstOutput(Heads(joint=True)),
        (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)),
    )
    assert called_layers(Evaluator(model), first, raw) == [
        "net.body",
        "net.box",
        "net.classes",
    ]


def test_where_the_heads_are_frozen_both_the_last_layer_and_the_last_free_one_have_a_part():
    model, raw = FirstOutput(Heads()), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    model.net.get_submodule("classes").requires_grad_(False)
    model.net.get_submodule("box").requires_grad_(False)
    called = called_layers(Evaluator(model), first, raw)
    assert called == ["net.body", "net.classes"]
    assert last_linear(model, called)[0] == "net.classes"
    assert [site.name for site in find_scope(model, called=called)[0].sites] == ["net.body"]


class Looked(nn.Module):
    """Its second layer gives a class by its number, or a direction, so that its size does not
    matter.
    """

    def __init__(self, by_place: bool) -> None:
        super().__init__()
        self.rows, self.place, self.by_place = nn.Linear(4, 3), nn.Linear(4, 3), by_place

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_place:
            return self.rows(x) + F.normalize(self.place(x), dim=1)
        place = self.place(x).sigmoid()[:, :1].mul(2.99).long()
        assert ((place >= 0) & (place < 3)).all()  # outside, a GPU could not go on
        return torch.eye(3)[place.squeeze(1)] + self.rows(x)


@pytest.mark.parametrize("by_place", [True, False])
def test_a_layer_may_give_places_or_directions(by_place):
    torch.manual_seed(0)
    model, raw = Looked(by_place), (3 * torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))
    assert set(called_layers(Evaluator(model), first, raw) or ()) == {"rows", "place"}
