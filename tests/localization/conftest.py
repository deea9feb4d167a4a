from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.tasks import Task


@dataclass
class Piece:
    rows: Tensor
    x: Tensor
    target: Tensor


class WholeModel:
    """A recording that remembers nothing: every replay runs the whole model, with hooks at the
    sites.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, target: Tensor, layer: Any, include_bias: bool, size: int
    ) -> None:
        self.model, self.space = model, find_layers(model, layer, include_bias=include_bias)
        self.x, self.target, self.size = x, target, size

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterator[Piece]:
        wanted = torch.arange(len(self.x)) if keep is None else keep.nonzero().flatten()
        for rows in wanted.split(self.size):
            if len(rows):
                yield Piece(rows, self.x[rows], self.target[rows])

    def replay(self, chunk: Piece, edit: Any, copies: int = 1) -> Tensor:
        hooks = [
            site.module.register_forward_hook(
                lambda _, args, output, site=site: edit(site, args[0], output)
            )
            for site in self.space.sites
        ]
        try:
            return self.model(chunk.x)
        finally:
            for hook in hooks:
                hook.remove()


class Weighted(Task):
    """The loss is the sum of outputs times targets: the output's gradient is the target."""

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target) < 0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output * target).flatten(1).sum(1)


@pytest.fixture
def recorded():
    def make(model, x, target, layer="auto", include_bias=False, size=5):
        return WholeModel(model, x, target, layer, include_bias, size)

    return make


@pytest.fixture
def weighted() -> Evaluator:
    return Evaluator(nn.Identity(), Weighted())
