"""A network of two weights, whose steps can be worked out by hand."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_nrl import TensorSource
from lightning_nrl.data.batch import Batch
from lightning_nrl.methods import Problem
from lightning_nrl.methods._solvers.mini_batches import load_batches

SGD = partial(torch.optim.SGD, lr=0.1)


def two_weights(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Logits x and 0."""
    model = nn.Linear(1, 2, bias=False, dtype=dtype)
    model.weight.data = torch.tensor([[1.0], [0.0]], dtype=dtype)
    return model


def numbers(*x: float, split: str = "train", batch_size: int = 256, dtype: torch.dtype = torch.float32) -> TensorSource:
    """Samples of class 0."""
    inputs = torch.tensor(x, dtype=dtype)[:, None]
    return TensorSource(inputs, torch.zeros(len(x), dtype=torch.int64), split, True, True, batch_size=batch_size)


def parts_of(problem: Problem, *rows: int) -> list[tuple[Batch, Tensor]]:
    (parts,) = load_batches(problem, [torch.tensor(rows)])
    return parts


def first_logit(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
    return output[:, 0].sum()
